//! Text on the way into a model and out of it: the tokenizer and the chat template of its checkpoint.

use crate::args::WeightsArgs;
use crate::source;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use tilec_ir::plan::Plan;
use tilec_runtime::chat::{ChatTemplate, Message, TemplateArgs, TokenizerConfig};
use tilec_runtime::checkpoint::{Checkpoint, TokenizerSource};
use tilec_runtime::tokenizer::Tokenizer;

/// The tokenizer of a model, and its chat template if it has one.
pub struct Text {
    /// Between text and token ids.
    pub tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
}

impl Text {
    /// Reads what the plan's checkpoint has.
    ///
    /// # Errors
    /// When the checkpoint has no tokenizer, or one that is not understood.
    pub fn load(plan: &Plan, weights: &WeightsArgs) -> Result<Text> {
        let checkpoint = match &weights.checkpoint {
            Some(path) => Checkpoint::open(path)?,
            None => source::open_weights(&plan.weights)?,
        };
        let tokenizer = tokenizer(plan, &checkpoint)?;
        let template = match checkpoint.chat_template() {
            None => None,
            Some(source) => {
                let config: TokenizerConfig = match checkpoint.tokenizer_config() {
                    Some(config) => {
                        serde_json::from_value(config.clone()).context("tokenizer_config.json")?
                    }
                    None => TokenizerConfig::default(),
                };
                let spelled = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
                let bos = config.bos_token.or_else(|| spelled(tokenizer.bos()));
                let eos = config.eos_token.or_else(|| spelled(tokenizer.eos()));
                Some(ChatTemplate::new(source, bos.as_deref(), eos.as_deref())?)
            }
        };
        Ok(Text { tokenizer: Arc::new(tokenizer), template })
    }

    /// Whether the checkpoint has a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Token ids of a conversation, up to where the assistant answers.
    ///
    /// # Errors
    /// When there is no template, or it refuses the conversation.
    pub fn conversation(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let template = self.template.as_ref().context("the checkpoint has no chat template")?;
        let text = template.render(messages, true, &TemplateArgs::new())?;
        tracing::debug!("prompt: {text:?}");
        Ok(self.tokenizer.encode(&text, false)?)
    }

    /// Token ids of text as it is, behind the token that starts a text.
    ///
    /// # Errors
    /// When the tokenizer refuses it.
    pub fn plain(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = self.tokenizer.encode(text, true)?;
        if tokens.is_empty() {
            // A model needs something to continue.
            tokens.extend(self.tokenizer.bos());
        }
        Ok(tokens)
    }
}

fn tokenizer(plan: &Plan, checkpoint: &Checkpoint) -> Result<Tokenizer> {
    match (plan.tokenizer.as_deref(), checkpoint.tokenizer_source()) {
        (Some(path), _) => from_json(path, checkpoint),
        (None, TokenizerSource::Json { path }) => from_json(path, checkpoint),
        (None, TokenizerSource::Gguf(vocab)) => Ok(Tokenizer::from_gguf((**vocab).clone())?),
        (None, TokenizerSource::None) => bail!(
            "{} has no tokenizer, so it reads and writes no text: \
             put tokenizer.json beside the weights, or use `tilec logits` with token ids",
            plan.name
        ),
    }
}

/// Reads a `tokenizer.json`, or the one in a folder.
fn from_json(path: &Path, checkpoint: &Checkpoint) -> Result<Tokenizer> {
    let path = if path.is_dir() { &path.join("tokenizer.json") } else { path };
    let bytes = std::fs::read(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut tokenizer =
        Tokenizer::from_json(&bytes).with_context(|| format!("cannot use {}", path.display()))?;
    let key = |name: &str| {
        let generation = checkpoint.generation_config().and_then(|config| config.get(name));
        generation.or_else(|| checkpoint.config().get(name)).map(ids).unwrap_or_default()
    };
    tokenizer.set_special(key("bos_token_id").first().copied(), &key("eos_token_id"));
    Ok(tokenizer)
}

/// One token id or a list of them.
fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ends_are_a_number_or_a_list() {
        assert_eq!(ids(&json!(7)), [7]);
        assert_eq!(ids(&json!([7, 9])), [7, 9]);
        assert_eq!(ids(&json!(null)), [0u32; 0]);
        assert_eq!(ids(&json!(-1)), [0u32; 0]);
    }
}
