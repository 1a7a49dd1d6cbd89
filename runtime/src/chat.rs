//! Chat templates as Hugging Face checkpoints carry them: Jinja with the settings, functions and
//! Python habits that `transformers` gives them.

mod json;
#[cfg(test)]
mod tests;
mod time;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde::{Deserialize, Serialize};
use serde_json::Map;
use std::error::Error as _;

/// Arguments of a template beside the messages: `tools`, `enable_thinking`, `documents`, ...
pub type TemplateArgs = Map<String, serde_json::Value>;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// The text; `None` for a message that is tool calls alone.
    #[serde(default)]
    pub content: Option<String>,
    /// Further fields that the template may look at: `tool_calls`, `name`, `reasoning_content`.
    #[serde(flatten)]
    pub extra: TemplateArgs,
}

impl Message {
    /// A message that is text alone.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), extra: Map::new() }
    }

    fn to_value(&self) -> Value {
        let head = [
            ("role".to_owned(), Value::from(self.role.as_str())),
            ("content".to_owned(), self.content.as_deref().map_or(Value::from(()), Value::from)),
        ];
        let extra = self.extra.iter().map(|(key, value)| (key.clone(), json::to_value(value)));
        Value::from_pairs(head.into_iter().chain(extra))
    }
}

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template is not valid Jinja.
    #[error("{template}:{line}: syntax error: {message}")]
    Syntax {
        /// Name of the template.
        template: String,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The template called `raise_exception`: it does not take this conversation.
    #[error("{template}:{line}: the chat template refuses these messages: {message}")]
    Refused {
        /// Name of the template.
        template: String,
        /// Line, from 1.
        line: usize,
        /// What the template says.
        message: String,
    },
    /// The template failed while it ran.
    #[error("{template}:{line}: {message}")]
    Render {
        /// Name of the template.
        template: String,
        /// Line, from 1.
        line: usize,
        /// What went wrong.
        message: String,
    },
    /// `tokenizer_config.json` cannot be parsed.
    #[error("tokenizer_config.json: {0}")]
    Config(#[from] serde_json::Error),
}

/// What `raise_exception` throws, to be told from other errors.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Name of the template in error messages.
const NAME: &str = "chat_template";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bos", &self.bos).field("eos", &self.eos).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `source`. `bos` and `eos` are the texts that the template sees as `bos_token` and
    /// `eos_token`.
    pub fn new(source: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build().map_err(|e| syntax_error(&e))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| time::strftime(format, time::now()));
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| syntax_error(&e))?;
        Ok(Self { environment, bos: bos.map(str::to_owned), eos: eos.map(str::to_owned) })
    }

    /// Renders a conversation. `add_generation_prompt` opens the assistant's turn at the end.
    /// `extra` goes to the template as it is, and wins over the arguments that are always there.
    ///
    /// The result spells out every special token, BOS too where the model wants one: encode it
    /// with `add_special = false`.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &TemplateArgs,
    ) -> Result<String, ChatError> {
        let messages: Vec<Value> = messages.iter().map(Message::to_value).collect();
        // `transformers` always passes the last two; templates ask `tools is not none`.
        let mut args = vec![
            ("messages".to_owned(), Value::from(messages)),
            ("add_generation_prompt".to_owned(), Value::from(add_generation_prompt)),
            ("tools".to_owned(), Value::from(())),
            ("documents".to_owned(), Value::from(())),
        ];
        for (name, token) in [("bos_token", &self.bos), ("eos_token", &self.eos)] {
            if let Some(token) = token {
                args.push((name.to_owned(), Value::from(token.as_str())));
            }
        }
        args.retain(|(name, _)| !extra.contains_key(name));
        args.extend(extra.iter().map(|(name, value)| (name.clone(), json::to_value(value))));
        let template = self.environment.get_template(NAME).map_err(|e| render_error(&e))?;
        template.render(Value::from_pairs(args)).map_err(|e| render_error(&e))
    }
}

fn place(error: &Error) -> (String, usize, String) {
    let message = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    (error.name().unwrap_or(NAME).to_owned(), error.line().unwrap_or(0), message)
}

fn syntax_error(error: &Error) -> ChatError {
    let (template, line, message) = place(error);
    ChatError::Syntax { template, line, message }
}

fn render_error(error: &Error) -> ChatError {
    let (template, line, message) = place(error);
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return ChatError::Refused { template, line, message: message.clone() };
        }
        source = cause.source();
    }
    ChatError::Render { template, line, message }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// `tojson` of `transformers`: Python's `json.dumps` without ASCII escapes, and without the HTML
/// escapes of Jinja's own filter.
fn tojson(value: &Value, args: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = args.get("indent")?;
    let ensure_ascii: Option<bool> = args.get("ensure_ascii")?;
    let sort_keys: Option<bool> = args.get("sort_keys")?;
    let separators: Option<Vec<String>> = args.get("separators")?;
    args.assert_all_used()?;
    let mut style = json::Style::new(indent, ensure_ascii.unwrap_or(false), sort_keys.unwrap_or(false));
    match separators.as_deref() {
        None => {}
        Some([item, key]) => style.set_separators(item, key),
        Some(_) => {
            let what = "tojson: separators must be two strings";
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    }
    style.write(value)
}

/// `{% generation %}` marks what the assistant wrote, for training. As text it is nothing, and
/// `{% if true %}` is nothing as well, with the same effect on the white space around.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|at| at + 2) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end);
        let name = tag[2..end - 2].trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// What `tokenizer_config.json` of a Hugging Face checkpoint says about text.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TokenizerConfig {
    /// Begins a text.
    #[serde(deserialize_with = "token_text")]
    pub bos_token: Option<String>,
    /// Ends a text.
    #[serde(deserialize_with = "token_text")]
    pub eos_token: Option<String>,
    /// The chat template; newer checkpoints have it in `chat_template.jinja` instead.
    #[serde(deserialize_with = "default_template")]
    pub chat_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads `tokenizer_config.json`.
    pub fn from_json(json: &[u8]) -> Result<Self, ChatError> {
        Ok(serde_json::from_slice(json)?)
    }
}

/// A token is its text, or an object with the text in `content`.
fn token_text<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Token {
        Text(String),
        Object { content: String },
    }
    Ok(Option::deserialize(deserializer)?.map(|token| match token {
        Token::Text(content) | Token::Object { content } => content,
    }))
}

/// A template is its text, or a list of named ones of which `default` counts.
fn default_template<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
        template: String,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Templates {
        One(String),
        Many(Vec<Named>),
    }
    Ok(Option::deserialize(deserializer)?.and_then(|templates| match templates {
        Templates::One(template) => Some(template),
        Templates::Many(named) => named.into_iter().find(|n| n.name == "default").map(|n| n.template),
    }))
}
