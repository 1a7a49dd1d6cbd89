//! Qwen3, dense: queries and keys normed per head, and optionally windows in some layers.

use super::config::Config;
use super::decoder::{Defaults, FULL, LayerKind, SLIDING, layer_count};
use super::{Decoder, Family, FrontendError};

pub(super) const FAMILY: Family =
    Family { model_type: DEFAULTS.family, architecture: "Qwen3ForCausalLM", parse };

const DEFAULTS: Defaults = Defaults {
    family: "qwen3",
    vocab_size: 151_936,
    intermediate_size: 22_016,
    num_key_value_heads: Some(32),
    head_dim: Some(128),
    max_position_embeddings: 32_768,
    bos_token_id: None,
    eos_token_id: None,
};

fn parse(config: &Config) -> Result<Decoder, FrontendError> {
    let layers = layers(config, layer_count(config)?)?;
    Ok(Decoder { qk_norm: true, ..Decoder::parse(config, &DEFAULTS, &layers)? })
}

/// Type and window of each layer: as `layer_types` says, else full attention up to
/// `max_window_layers`. A window counts the row itself (a key is seen if `key > row - window`).
fn layers(config: &Config, count: usize) -> Result<Vec<LayerKind>, FrontendError> {
    let window = match config.bool_or("use_sliding_window", false)? {
        true if config.has_key("sliding_window") => config.positions("sliding_window")?,
        true => Some(4096),
        false => None,
    };
    let Some(types) = config.strings("layer_types")? else {
        let first = config.count_or("max_window_layers", 28)?;
        let of = |layer| match window {
            Some(window) if layer >= first => LayerKind::sliding(window),
            _ => LayerKind::FULL,
        };
        return Ok((0..count).map(of).collect());
    };
    if types.len() != count {
        let what = format!("has {} entries for {count} layers", types.len());
        return Err(config.error("layer_types", what));
    }
    types
        .into_iter()
        .map(|layer_type| match (layer_type, window) {
            (FULL, _) => Ok(LayerKind::FULL),
            (SLIDING, Some(window)) => Ok(LayerKind::sliding(window)),
            (SLIDING, None) => {
                let what = "has sliding_attention, but use_sliding_window and sliding_window give no window";
                Err(config.error("layer_types", what))
            }
            (other, _) => {
                let what = format!("{other:?} is not supported: known are {FULL} and {SLIDING}");
                Err(config.error("layer_types", what))
            }
        })
        .collect()
}
