//! Llama (1 to 3.3), SmolLM2 and others of their architecture.

use super::config::Config;
use super::decoder::{Defaults, LayerKind, layer_count};
use super::{Decoder, Family, FrontendError};

pub(super) const FAMILY: Family =
    Family { model_type: DEFAULTS.family, architecture: "LlamaForCausalLM", parse };

const DEFAULTS: Defaults = Defaults {
    family: "llama",
    vocab_size: 32000,
    intermediate_size: 11008,
    num_key_value_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    bos_token_id: Some(1),
    eos_token_id: Some(2),
};

fn parse(config: &Config) -> Result<Decoder, FrontendError> {
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    let layers = vec![LayerKind::FULL; layer_count(config)?];
    Ok(Decoder { mlp_bias, ..Decoder::parse(config, &DEFAULTS, &layers)? })
}
