//! gpt-oss: windows in every other layer, sinks and biases throughout, experts in MXFP4 with a clamped
//! gate, and a router whose softmax is over the chosen alone.

use super::config::Config;
use super::decoder::{Defaults, ExpertTensors, Experts, FULL, FeedForward, LayerKind, SLIDING, layer_count};
use super::{Decoder, Family, FrontendError};
use tilec_ir::format::Format;
use tilec_ir::graph::{ActivationFn, Router, Scoring};

pub(super) const FAMILY: Family =
    Family { model_type: DEFAULTS.family, architecture: "GptOssForCausalLM", parse };

const DEFAULTS: Defaults = Defaults {
    family: "gpt_oss",
    vocab_size: 201_088,
    intermediate_size: 2880,
    num_key_value_heads: Some(8),
    head_dim: Some(64),
    max_position_embeddings: 131_072,
    bos_token_id: None,
    eos_token_id: None,
};

/// Steepness of the gate's sigmoid; no config has a key for it.
const ALPHA: f32 = 1.702;

fn parse(config: &Config) -> Result<Decoder, FrontendError> {
    let kinds = layers(config)?;
    let mut decoder = Decoder::parse(config, &DEFAULTS, &kinds)?;
    decoder.attention_bias = config.bool_or("attention_bias", true)?;
    decoder.eps = config.positive("rms_norm_eps")?.unwrap_or(1e-5) as f32;
    decoder.layers.iter_mut().for_each(|layer| layer.sinks = true);
    let count = match config.size("num_local_experts")? {
        Some(count) => count,
        None => config.size_or("num_experts", 128)?,
    };
    let top_k = match config.size("num_experts_per_tok")? {
        Some(top_k) => top_k,
        None => config.size_or("experts_per_token", 4)?,
    };
    if top_k > count {
        return Err(
            config.error("num_experts_per_tok", format!("{top_k} of {count} experts cannot be chosen"))
        );
    }
    let limit = config.positive("swiglu_limit")?.unwrap_or(7.0) as f32;
    let router =
        Router { scoring: Scoring::ChosenSoftmax, renormalize: false, top_k, factor: 1.0, correction: None };
    let experts = Experts {
        count,
        intermediate: decoder.intermediate,
        router,
        gate: "mlp.router",
        gate_bias: true,
        activation: ActivationFn::Clamped { alpha: ALPHA, limit },
        tensors: ExpertTensors::Interleaved,
    };
    if let Some(quantization) = config.section("quantization_config")?
        && quantization.string("quant_method")? == Some("mxfp4")
    {
        decoder.published.experts = Format::MXFP4;
    }
    let feed_forward = vec![FeedForward::Experts; kinds.len()];
    Ok(Decoder { feed_forward, experts: Some(experts), ..decoder })
}

/// As `layer_types` says, else a window in the first layer and every other one.
fn layers(config: &Config) -> Result<Vec<LayerKind>, FrontendError> {
    let count = match config.has("num_hidden_layers") {
        true => layer_count(config)?,
        false => 36,
    };
    let window = match config.has_key("sliding_window") {
        true => config.positions("sliding_window")?,
        false => Some(128),
    };
    let sliding = window.map_or(LayerKind::FULL, LayerKind::sliding);
    let Some(types) = config.strings("layer_types")? else {
        return Ok((0..count).map(|layer| if layer % 2 == 0 { sliding } else { LayerKind::FULL }).collect());
    };
    if types.len() != count {
        return Err(config.error("layer_types", format!("has {} entries for {count} layers", types.len())));
    }
    types
        .into_iter()
        .map(|layer_type| match layer_type {
            FULL => Ok(LayerKind::FULL),
            SLIDING => Ok(LayerKind { layer_type: SLIDING, window }),
            other => {
                let what = format!("{other:?} is not supported: known are {FULL} and {SLIDING}");
                Err(config.error("layer_types", what))
            }
        })
        .collect()
}
