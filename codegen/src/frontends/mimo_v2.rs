//! MiMo-V2 (V2-Flash, V2.5, V2.5-Pro, V2.6): global layers among layers with a window, sinks in the latter, keys
//! wider than values, values scaled, part of a head rotated, q, k and v in one matrix, and a sigmoid
//! router with a correction that only chooses.

use super::config::{Config, MAX_SIZE};
use super::decoder::{Defaults, ExpertTensors, Experts, FULL, FeedForward, LayerKind, SLIDING, layer_count};
use super::{Decoder, Family, FrontendError, Published};
use tilec_ir::format::Format;
use tilec_ir::graph::{ActivationFn, RopeScaling, RopeSpec, Router, Scoring};

pub(super) const FAMILY: Family =
    Family { model_type: DEFAULTS.family, architecture: "MiMoV2ForCausalLM", parse };

/// V2-Flash: separate matrices of q, k and v. transformers writes its configs in another spelling than
/// they were published in; both are read.
pub(super) const FLASH: Family =
    Family { model_type: "mimo_v2_flash", architecture: "MiMoV2FlashForCausalLM", parse };

const DEFAULTS: Defaults = Defaults {
    family: "mimo_v2",
    vocab_size: 152_576,
    intermediate_size: 16_384,
    num_key_value_heads: Some(4),
    head_dim: Some(192),
    max_position_embeddings: 262_144,
    bos_token_id: None,
    eos_token_id: None,
};

/// What the config says of the layers of one kind.
struct Kind {
    /// Prefix of the keys that windows have of their own.
    prefix: &'static str,
    kv_heads: usize,
    sinks: bool,
}

fn parse(config: &Config) -> Result<Decoder, FrontendError> {
    let count = layer_count(config)?;
    let window = match config.positions("sliding_window")? {
        Some(window) => window,
        None => config.positions("sliding_window_size")?.unwrap_or(128),
    };
    let windowed = pattern(config, "hybrid_layer_pattern", ("layer_types", FULL, SLIDING), count)?;
    let of = |windowed: &bool| if *windowed { LayerKind::sliding(window) } else { LayerKind::FULL };
    let kinds: Vec<LayerKind> = windowed.iter().map(of).collect();
    let mut decoder = Decoder::parse_with_ropes(config, &DEFAULTS, &kinds, |layer_type, head_dim| {
        rope(config, layer_type, head_dim)
    })?;
    decoder.eps = match config.positive("layernorm_epsilon")? {
        Some(eps) => eps,
        None => config.positive("rms_norm_eps")?.unwrap_or(1e-5),
    } as f32;
    for key in ["attention_bias", "mlp_bias"] {
        if config.bool_or(key, false)? {
            return Err(config.error(key, "true is not supported: the family's checkpoints have no biases"));
        }
    }
    decoder.v_dim = config.size_or("v_head_dim", 128)?;
    decoder.value_scale = match config.number("attention_value_scale")? {
        Some(scale) if !(scale as f32).is_finite() => {
            return Err(config.error("attention_value_scale", format!("{scale} does not fit float32")));
        }
        scale => scale.map(|scale| scale as f32).filter(|scale| *scale != 1.0),
    };
    decoder.fused_qkv = match config.string("attention_projection_layout")?.unwrap_or("split") {
        "fused_qkv" => true,
        "split" | "split_qkv" => false,
        other => {
            let what = format!("{other:?} is not supported: known are fused_qkv and split");
            return Err(config.error("attention_projection_layout", what));
        }
    };
    decoder.sinks = "self_attn.attention_sink_bias";
    decoder.unused = &["model.mtp."];
    decoder.published = published(config)?;

    let global = Kind {
        prefix: "",
        kv_heads: decoder.kv_heads,
        sinks: config.bool_or("add_full_attention_sink_bias", false)?,
    };
    let swa = Kind {
        prefix: "swa_",
        kv_heads: match config.has("layer_types") {
            // As transformers' class has it, which knows no key for this.
            true => config.size_or("swa_num_key_value_heads", 2 * decoder.kv_heads)?,
            false => config.size_or("swa_num_key_value_heads", decoder.kv_heads)?,
        },
        sinks: config.bool_or("add_swa_attention_sink_bias", true)?,
    };
    for (key, have) in [
        ("swa_num_attention_heads", decoder.heads),
        ("swa_head_dim", decoder.head_dim),
        ("swa_v_head_dim", decoder.v_dim),
    ] {
        match config.size(key)? {
            Some(other) if other != have => {
                let what =
                    format!("{other} is not supported: layers with a window must have {have}, as the others");
                return Err(config.error(key, what));
            }
            _ => {}
        }
    }
    for kind in [&global, &swa] {
        let key = format!("{}num_key_value_heads", kind.prefix);
        let groups = if decoder.fused_qkv { decoder.kv_heads } else { 1 };
        if decoder.heads % kind.kv_heads != 0 || kind.kv_heads % groups != 0 {
            let what = format!(
                "{} KV heads do not fit {} query heads in {groups} groups",
                kind.kv_heads, decoder.heads
            );
            return Err(config.error(&key, what));
        }
        let cols = [kind.kv_heads, decoder.heads].map(|heads| heads * decoder.head_dim.max(decoder.v_dim));
        if cols[0] + 2 * cols[1] > MAX_SIZE {
            return Err(config.error(&key, format!("heads of beyond {MAX_SIZE} columns")));
        }
    }
    for (layer, windowed) in decoder.layers.iter_mut().zip(&windowed) {
        let kind = if *windowed { &swa } else { &global };
        (layer.kv_heads, layer.sinks) = (kind.kv_heads, kind.sinks);
    }

    let sparse = pattern(config, "moe_layer_freq", ("mlp_layer_types", "dense", "sparse"), count)?;
    let of = |sparse: &bool| if *sparse { FeedForward::Experts } else { FeedForward::Dense };
    decoder.feed_forward = sparse.iter().map(of).collect();
    if sparse.contains(&true) {
        decoder.experts = Some(experts(config)?);
    }
    Ok(decoder)
}

/// Block FP8 but for the products behind attention; experts in MXFP4 if the config says so.
fn published(config: &Config) -> Result<Published, FrontendError> {
    let Some(quantization) = config.section("quantization_config")? else { return Ok(Published::default()) };
    if quantization.string("quant_method")? != Some("fp8") {
        return Ok(Published::default());
    }
    let ignored = quantization.strings("ignored_layers")?.unwrap_or_default();
    let keeps_output = ignored.iter().any(|module| module.ends_with("self_attn.o_proj"));
    let fp4 = quantization.string("store_dtype")? == Some("mxfp4");
    Ok(Published {
        projections: Format::FP8_BLOCK,
        output: if keeps_output { Format::BF16 } else { Format::FP8_BLOCK },
        experts: if fp4 { Format::MXFP4 } else { Format::FP8_BLOCK },
    })
}

fn experts(config: &Config) -> Result<Experts, FrontendError> {
    let only = |key: &str, known: &str| match config.string(key)? {
        Some(other) if other != known => {
            Err(config.error(key, format!("{other:?} is not supported: known is {known}")))
        }
        _ => Ok(()),
    };
    only("scoring_func", "sigmoid")?;
    only("topk_method", "noaux_tc")?;
    for (key, known) in [("n_group", 1), ("topk_group", 1), ("n_shared_experts", 0)] {
        let value = config.count_or(key, known)?;
        if value != known {
            return Err(config.error(key, format!("{value} is not supported: known is {known}")));
        }
    }
    let count = config.size_or("n_routed_experts", 256)?;
    let top_k = config.size_or("num_experts_per_tok", 8)?;
    if top_k > count {
        return Err(
            config.error("num_experts_per_tok", format!("{top_k} of {count} experts cannot be chosen"))
        );
    }
    let router = Router {
        scoring: Scoring::Sigmoid,
        renormalize: config.bool_or("norm_topk_prob", true)?,
        top_k,
        factor: config.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32,
        correction: Some("mlp.gate.e_score_correction_bias".into()),
    };
    Ok(Experts {
        count,
        intermediate: config.size_or("moe_intermediate_size", 2048)?,
        router,
        gate: "mlp.gate",
        gate_bias: false,
        activation: ActivationFn::Silu,
        tensors: ExpertTensors::Each,
    })
}

/// A list of 0 and 1, one a layer; or a list of names under another key, of which the first is 0.
fn pattern(
    config: &Config,
    key: &str,
    (named, zero, one): (&str, &str, &str),
    layers: usize,
) -> Result<Vec<bool>, FrontendError> {
    let Some(list) = config.counts(key)? else {
        let Some(names) = config.strings(named)? else {
            return Err(config.error(key, "is missing: it says which layers are of which kind"));
        };
        if names.len() != layers {
            let what = format!("has {} entries for {layers} layers", names.len());
            return Err(config.error(named, what));
        }
        return match names.iter().find(|name| **name != zero && **name != one) {
            Some(name) => Err(config.error(named, format!("{name:?} is neither {zero} nor {one}"))),
            None => Ok(names.into_iter().map(|name| name == one).collect()),
        };
    };
    if list.len() != layers {
        return Err(config.error(key, format!("has {} entries for {layers} layers", list.len())));
    }
    match list.iter().find(|entry| **entry > 1) {
        Some(entry) => Err(config.error(key, format!("{entry} is neither 0 nor 1"))),
        None => Ok(list.into_iter().map(|entry| entry == 1).collect()),
    }
}

/// The rotation of a kind of layer: its base, over the leading part of each head.
fn rope(
    config: &Config,
    layer_type: &'static str,
    head_dim: usize,
) -> Result<(String, RopeSpec), FrontendError> {
    let name = if layer_type == FULL { "global" } else { "window" };
    if let Some(all) = config.section("rope_parameters")? {
        let Some(own) = all.section(layer_type)? else {
            return Err(all.error(layer_type, "is missing, but the model has such layers"));
        };
        if let Some(kind) = own.string("rope_type")?.filter(|kind| *kind != "default") {
            return Err(own.error("rope_type", format!("{kind:?} is not supported in this family")));
        }
        let (theta, dims) = (own.positive_required("rope_theta")?, rotary_dims(&own, head_dim)?);
        return Ok((name.into(), RopeSpec { dims, theta, scaling: RopeScaling::None }));
    }
    if config.section("rope_scaling")?.is_some_and(|section| {
        !matches!(section.string("rope_type").or(section.string("type")), Ok(None | Some("default")))
    }) {
        return Err(config.error("rope_scaling", "is not supported in this family"));
    }
    let theta = match layer_type {
        SLIDING => config.positive("swa_rope_theta")?.unwrap_or(10_000.0),
        _ => config.positive("rope_theta")?.unwrap_or(5_000_000.0),
    };
    let dims = rotary_dims(config, head_dim)?;
    Ok((name.into(), RopeSpec { dims, theta, scaling: RopeScaling::None }))
}

/// Columns of a head that are rotated.
fn rotary_dims(config: &Config, head_dim: usize) -> Result<usize, FrontendError> {
    let factor = config.positive("partial_rotary_factor")?.unwrap_or(0.334);
    // Cut off, as transformers does it.
    let dims = (head_dim as f64 * factor) as usize;
    if dims < 2 || !dims.is_multiple_of(2) || dims > head_dim {
        let what = format!("{factor} of heads of {head_dim} is {dims} columns: no whole pairs within a head");
        return Err(config.error("partial_rotary_factor", what));
    }
    Ok(dims)
}
