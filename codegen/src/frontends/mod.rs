//! Frontends: from a model's `config.json` and the shapes of its tensors to a [`Graph`].
//!
//! To add a family: a file here that reads its config into a [`Decoder`], and a line in [`FAMILIES`].
//! Every value of the config is checked before anything is built, and every tensor before it is used.

mod config;
mod decoder;
mod dflash;
mod dflash2;
mod gpt_oss;
mod llama;
mod mimo_v2;
mod qwen3;
mod qwen3_moe;
mod rope;
#[cfg(test)]
mod tests;

pub use decoder::{Decoder, ExpertTensors, Experts, FeedForward, LayerAttention, Published};
pub use dflash::{Dflash, DraftAttention, DraftTarget, default_taps};
pub use dflash2::Dflash2;

use config::Config;
use serde_json::Value;
use std::collections::BTreeMap;
use tilec_ir::format::Format;
use tilec_ir::graph::{Graph, GraphError};
use tilec_ir::tensor::TensorInfo;

/// An architecture family.
pub struct Family {
    /// `model_type` in the config.
    pub model_type: &'static str,
    /// Entry of `architectures` in the config.
    pub architecture: &'static str,
    /// Reads the config.
    parse: fn(&Config) -> Result<Decoder, FrontendError>,
}

/// The families that are known.
pub const FAMILIES: &[Family] =
    &[llama::FAMILY, qwen3::FAMILY, qwen3_moe::FAMILY, gpt_oss::FAMILY, mimo_v2::FAMILY, mimo_v2::FLASH];

/// What is wrong with a config or a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrontendError {
    /// No frontend reads this config.
    #[error("unknown architecture {found}: known are {}", known())]
    UnknownArchitecture {
        /// What the config says.
        found: String,
    },
    /// A key of the config has a value that cannot be.
    #[error("config key `{key}`: {what}")]
    Config {
        /// The key, with those that it is nested in.
        key: String,
        /// What does not hold.
        what: String,
    },
    /// The config implies a tensor that the checkpoint does not have.
    #[error("tensor {name} of shape {expected:?} is missing from the checkpoint{}", more(*.others))]
    MissingTensor {
        /// The first that is missing.
        name: String,
        /// Its shape.
        expected: Vec<usize>,
        /// How many others are missing too.
        others: usize,
    },
    /// A tensor has another shape than the config implies.
    #[error("tensor {name} has shape {found:?}, but the config implies {expected:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Shape that follows from the config.
        expected: Vec<usize>,
        /// Shape in the checkpoint.
        found: Vec<usize>,
    },
    /// A tensor is stored in a format that makes no sense for it.
    #[error("tensor {name} is stored as {found}, but norms and biases must be f32, f16 or bf16")]
    TensorFormat {
        /// The tensor.
        name: String,
        /// Its format.
        found: String,
    },
    /// Experts that are read as one are stored in several formats.
    #[error(
        "tensor {name} is stored as {found}, but {other} as {other_found}: all experts of a layer must have one \
         format; quantize the checkpoint again"
    )]
    MixedExperts {
        /// The first that differs.
        name: String,
        /// Its format.
        found: String,
        /// The first expert's.
        other: String,
        /// That one's format.
        other_found: String,
    },
    /// The checkpoint has a tensor that the architecture, as the config describes it, has no use for:
    /// leaving it out would give wrong results without a word.
    #[error("tensor {name} of shape {found:?} has no place in a {family} model of this config{}", more(*.others))]
    UnexpectedTensor {
        /// The first such tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// `model_type` of the family.
        family: &'static str,
        /// How many others there are.
        others: usize,
    },
    /// An operator does not fit its operands.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

fn known() -> String {
    let names: Vec<String> =
        FAMILIES.iter().map(|family| format!("{} ({})", family.model_type, family.architecture)).collect();
    names.join(", ")
}

fn more(others: usize) -> String {
    if others == 0 { String::new() } else { format!(", and {others} more") }
}

/// What a runtime wants to know of a model beside its graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFacts {
    /// `model_type` of the family.
    pub family: &'static str,
    /// Token ids.
    pub vocab: usize,
    /// Columns of the residual.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Longest context that the model is made for.
    pub context: usize,
    /// Token that starts a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Reads a config in the form of Hugging Face's `config.json`.
///
/// # Errors
/// When the architecture is unknown or a value cannot be.
pub fn parse(config: &Value) -> Result<Decoder, FrontendError> {
    let config = Config::new(config)?;
    (find_family(&config)?.parse)(&config)
}

/// The graph of a decoding step, in f32 and with all weights as stored.
///
/// # Errors
/// When the config is not valid (see [`parse`]), or a tensor is missing, has another shape than the
/// config implies, or has no place in the model.
pub fn build(config: &Value, tensors: &BTreeMap<String, TensorInfo>) -> Result<Graph, FrontendError> {
    parse(config)?.build(tensors)
}

/// Names and shapes of the tensors that a checkpoint of this config has, in model order.
///
/// # Errors
/// As [`parse`].
pub fn expected_tensors(config: &Value) -> Result<Vec<(String, Vec<usize>)>, FrontendError> {
    Ok(parse(config)?.tensors())
}

/// The tensors of a checkpoint of this config, all stored in `format` (matrices) and in float32
/// (norms and biases): what a checkpoint of synthetic weights declares. Tensors that are one an expert
/// stand there once, named with [`tilec_ir::graph::EXPERT`] and with the number of experts as first extent.
///
/// # Errors
/// As [`parse`].
pub fn synthetic_tensors(
    config: &Value,
    format: Format,
) -> Result<BTreeMap<String, TensorInfo>, FrontendError> {
    let tensors = parse(config)?.stored().into_iter().map(|stored| {
        let format = if stored.vector { Format::F32 } else { format };
        (stored.name, TensorInfo { shape: stored.shape, format })
    });
    Ok(tensors.collect())
}

/// The tensors of a draft of this config for a model of the config `target`, by their own names and as in
/// [`synthetic_tensors`]; without an embedding of its own for masks.
///
/// # Errors
/// As [`parse`], of either; and when the draft is for another model.
pub fn synthetic_draft_tensors(
    config: &Value,
    target: &Value,
    format: Format,
) -> Result<BTreeMap<String, TensorInfo>, FrontendError> {
    let facts = facts(target)?;
    let target = DraftTarget { vocab: facts.vocab, hidden: facts.hidden, layers: facts.layers };
    let tensors = Dflash::parse(config, target)?.tensors().into_iter().map(|(name, shape)| {
        let format = if shape.len() == 2 { format } else { Format::F32 };
        (name, TensorInfo { shape, format })
    });
    Ok(tensors.collect())
}

/// The tensors of a checkpoint of this config in the formats that the model is published in, which its
/// `quantization_config` says: matrices bf16 but for those, vectors float32. Otherwise as
/// [`synthetic_tensors`].
///
/// # Errors
/// As [`parse`].
pub fn published_tensors(config: &Value) -> Result<BTreeMap<String, TensorInfo>, FrontendError> {
    let tensors = parse(config)?.stored().into_iter().map(|stored| {
        let format = if stored.vector { Format::F32 } else { stored.format };
        (stored.name, TensorInfo { shape: stored.shape, format })
    });
    Ok(tensors.collect())
}

/// What is known of the model from its config alone.
///
/// # Errors
/// As [`parse`].
pub fn facts(config: &Value) -> Result<ModelFacts, FrontendError> {
    Ok(parse(config)?.facts())
}

/// `model_type` of the family that reads this config.
///
/// # Errors
/// When there is none.
pub fn family(config: &Value) -> Result<&'static str, FrontendError> {
    Ok(find_family(&Config::new(config)?)?.model_type)
}

/// Longest context that a model of this config is made for, in positions.
///
/// # Errors
/// As [`parse`].
pub fn max_context(config: &Value) -> Result<usize, FrontendError> {
    Ok(parse(config)?.context)
}

/// The family that the config names: by `architectures`, which is exact, else by `model_type`.
fn find_family(config: &Config) -> Result<&'static Family, FrontendError> {
    let architectures = config.strings("architectures")?.unwrap_or_default();
    let model_type = config.string("model_type")?;
    let found = if architectures.is_empty() {
        FAMILIES.iter().find(|family| Some(family.model_type) == model_type)
    } else {
        FAMILIES.iter().find(|family| architectures.contains(&family.architecture))
    };
    found.ok_or_else(|| {
        let found = match (architectures.as_slice(), model_type) {
            ([], None) => "(the config has neither architectures nor model_type)".to_string(),
            ([], Some(model_type)) => model_type.to_string(),
            (architectures, _) => architectures.join(", "),
        };
        FrontendError::UnknownArchitecture { found }
    })
}
