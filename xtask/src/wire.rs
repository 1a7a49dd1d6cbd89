//! The JSON that engines print and that the comparisons read.
//!
//! `tilec bench --json` and `xtask llama-cpp-worker` print the same [`Bench`], so neither side is read in its own way.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Result};
use crate::llama_cpp::library::Token;

/// What one process measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Bench {
    /// One entry per repeat.
    pub samples: Vec<Sample>,
}

/// One repeat: a prompt in one go, then tokens one by one behind it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Seconds from the prompt's first token to the logits behind its last.
    pub prompt_s: f64,
    /// Tokens decoded one by one.
    pub generated_tokens: u64,
    /// Seconds for all of them, logits included.
    pub generate_s: f64,
}

impl Sample {
    /// Prompt tokens per second.
    pub fn prompt_rate(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_s
    }

    /// Generated tokens per second.
    pub fn generate_rate(&self) -> f64 {
        self.generated_tokens as f64 / self.generate_s
    }
}

/// What the llama.cpp worker says about itself and the model, beside the samples.
#[derive(Debug, Serialize, Deserialize)]
pub struct LlamaCppBench {
    /// The release of llama.cpp.
    pub release: String,
    /// The CPU backend in use, by file name.
    pub cpu_backend: String,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of f16 K and V per position of context.
    pub kv_bytes_per_position: u64,
    /// What was measured.
    #[serde(flatten)]
    pub bench: Bench,
}

/// A token and its logit.
pub type Scored = (Token, f32);

/// A greedy generation of llama.cpp.
#[derive(Debug, Serialize, Deserialize)]
pub struct Generation {
    /// The token ids of the prompt.
    pub prompt: Vec<Token>,
    /// One entry per generated token.
    pub steps: Vec<Step>,
}

/// One generated token and what stood beside it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Step {
    /// The token with the largest logit.
    pub token: Token,
    /// The largest logits, decreasing, when the token was generated behind the ones before it.
    pub top: Vec<Scored>,
    /// The largest logits of the same position when llama.cpp reads the whole text as one batch.
    pub top_as_batch: Vec<Scored>,
}

/// Reads a JSON file.
///
/// # Errors
/// When the file cannot be read or is not the JSON expected; the message names the file and the place in it.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).context(|| format!("{} is not the JSON expected", path.display()))
}

/// Reads the JSON that a program printed.
///
/// # Errors
/// When it is not the JSON expected; the message names the program.
pub fn parse<T: DeserializeOwned>(text: &str, program: &str) -> Result<T> {
    serde_json::from_str(text).context(|| format!("{program} printed something else than the JSON expected"))
}

/// The JSON text of a value.
///
/// # Errors
/// When the value cannot be written as JSON.
pub fn text(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).context(|| "cannot write JSON")
}
