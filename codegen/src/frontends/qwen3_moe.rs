//! Qwen3 with a mixture of experts in some or all layers: Qwen3's attention, a softmax router.

use super::config::Config;
use super::decoder::{Defaults, ExpertTensors, Experts, FeedForward, LayerKind, layer_count};
use super::{Decoder, Family, FrontendError};
use tilec_ir::graph::{ActivationFn, Router, Scoring};

pub(super) const FAMILY: Family =
    Family { model_type: DEFAULTS.family, architecture: "Qwen3MoeForCausalLM", parse };

const DEFAULTS: Defaults = Defaults {
    family: "qwen3_moe",
    vocab_size: 151_936,
    intermediate_size: 6144,
    num_key_value_heads: Some(4),
    head_dim: None,
    max_position_embeddings: 32_768,
    bos_token_id: None,
    eos_token_id: None,
};

fn parse(config: &Config) -> Result<Decoder, FrontendError> {
    let count = layer_count(config)?;
    let window = match config.bool_or("use_sliding_window", false)? {
        true if config.has_key("sliding_window") => config.positions("sliding_window")?,
        true => Some(4096),
        false => None,
    };
    let kind = window.map_or(LayerKind::FULL, LayerKind::sliding);
    let decoder = Decoder::parse(config, &DEFAULTS, &vec![kind; count])?;
    let dense = config.counts("mlp_only_layers")?.unwrap_or_default();
    if let Some(layer) = dense.iter().find(|layer| **layer >= count) {
        return Err(config.error("mlp_only_layers", format!("there is no layer {layer} among {count}")));
    }
    let step = config.size_or("decoder_sparse_step", 1)?;
    let feed_forward = (0..count).map(|layer| match !dense.contains(&layer) && (layer + 1) % step == 0 {
        true => FeedForward::Experts,
        false => FeedForward::Dense,
    });
    let experts = experts(config)?;
    let feed_forward: Vec<FeedForward> = feed_forward.collect();
    let experts = feed_forward.contains(&FeedForward::Experts).then_some(experts);
    Ok(Decoder { qk_norm: true, feed_forward, experts, ..decoder })
}

fn experts(config: &Config) -> Result<Experts, FrontendError> {
    let count = match config.size("num_experts")? {
        Some(count) => count,
        None => config.size_or("num_local_experts", 128)?,
    };
    let top_k = config.size_or("num_experts_per_tok", 8)?;
    if top_k > count {
        return Err(
            config.error("num_experts_per_tok", format!("{top_k} of {count} experts cannot be chosen"))
        );
    }
    let router = Router {
        scoring: Scoring::Softmax,
        renormalize: config.bool_or("norm_topk_prob", false)?,
        top_k,
        factor: 1.0,
        correction: None,
    };
    Ok(Experts {
        count,
        intermediate: config.size_or("moe_intermediate_size", 768)?,
        router,
        gate: "mlp.gate",
        gate_bias: false,
        activation: ActivationFn::Silu,
        tensors: ExpertTensors::Each,
    })
}
