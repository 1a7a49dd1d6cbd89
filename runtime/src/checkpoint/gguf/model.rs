//! A GGUF model in the terms of Hugging Face: names of tensors, the config, the vocabulary.

use super::super::error::{CheckpointError, ErrorKind};
use super::super::file::{MappedFile, Span};
use super::super::stored::{Stored, slice};
use super::blocks::BlockType;
use super::container::{Container, GgufTensor, Meta};
use crate::tokenizer::GgufVocab;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tilec_ir::tensor::TensorInfo;

/// Architectures that are read: the file's name, Hugging Face's, and whether rows of q and k are
/// interleaved for rotary embeddings on neighbours.
const ARCHITECTURES: &[(&str, &str, &str, bool)] = &[
    ("llama", "llama", "LlamaForCausalLM", true),
    ("qwen2", "qwen2", "Qwen2ForCausalLM", false),
    ("qwen3", "qwen3", "Qwen3ForCausalLM", false),
    ("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", false),
];

/// Tensors outside of the layers.
const GLOBAL: &[(&str, &str)] =
    &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a layer.
const LAYER: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
];

/// Tensors that hold one matrix for every expert.
const EXPERTS: &[(&str, &str)] =
    &[("ffn_gate_exps", "gate_proj"), ("ffn_up_exps", "up_proj"), ("ffn_down_exps", "down_proj")];

/// Factors on the rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";

fn translate<'n>(table: &[(&str, &'n str)], name: &str) -> Option<&'n str> {
    table.iter().find(|(gguf, _)| *gguf == name).map(|(_, hf)| *hf)
}

/// A tensor under its Hugging Face name.
pub(super) struct Part {
    pub name: String,
    pub info: TensorInfo,
    pub stored: Stored,
}

/// The model that a container describes.
pub(super) struct Model<'a> {
    file: &'a MappedFile,
    container: &'a Container,
    architecture: &'a str,
    model_type: &'static str,
    class: &'static str,
    interleaved: bool,
    heads: u64,
    kv_heads: u64,
    head_dim: u64,
}

impl<'a> Model<'a> {
    pub fn read(file: &'a MappedFile, container: &'a Container) -> Result<Model<'a>, CheckpointError> {
        let keys = Keys { path: file.path(), container };
        let key = "general.architecture";
        let architecture = keys.string(key)?.ok_or_else(|| keys.missing(key))?;
        let Some((_, model_type, class, interleaved)) =
            ARCHITECTURES.iter().find(|(name, ..)| *name == architecture)
        else {
            let known: Vec<_> = ARCHITECTURES.iter().map(|(name, ..)| *name).collect();
            let problem = format!("{architecture:?} is not supported; supported are {}", known.join(", "));
            return Err(keys.error(ErrorKind::Unsupported, key, problem, "use the Hugging Face checkpoint"));
        };
        let mut model = Model {
            file,
            container,
            architecture,
            model_type,
            class,
            interleaved: *interleaved,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
        };
        if *model_type == "llama" && model.count("expert_count")?.is_some_and(|n| n > 0) {
            let remedy = "use the Hugging Face checkpoint";
            let problem = "a llama with experts (Mixtral) is not supported";
            let key = model.key("expert_count");
            return Err(keys.error(ErrorKind::Unsupported, &key, problem, remedy));
        }
        model.heads = model.required_count("attention.head_count")?;
        model.kv_heads = model.count("attention.head_count_kv")?.unwrap_or(model.heads);
        let hidden = model.required_count("embedding_length")?;
        model.head_dim = match model.count("attention.key_length")? {
            Some(length) => length,
            None => hidden.checked_div(model.heads).unwrap_or(0),
        };
        for (key, value) in
            [("attention.head_count", model.heads), ("attention.head_count_kv", model.kv_heads)]
        {
            if value == 0 {
                let remedy = "convert the model again with a current converter";
                return Err(keys.error(ErrorKind::Value, &model.key(key), "it is zero", remedy));
            }
        }
        Ok(model)
    }

    fn keys(&self) -> Keys<'a> {
        Keys { path: self.file.path(), container: self.container }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn count(&self, name: &str) -> Result<Option<u64>, CheckpointError> {
        self.keys().count(&self.key(name))
    }

    fn required_count(&self, name: &str) -> Result<u64, CheckpointError> {
        let key = self.key(name);
        self.keys().count(&key)?.ok_or_else(|| self.keys().missing(&key))
    }

    /// The tensor under its Hugging Face name; one part for every expert.
    pub fn parts(&self, name: &str, tensor: &GgufTensor) -> Result<Vec<Part>, CheckpointError> {
        let place = format!("tensor {name:?}");
        let unknown = || {
            let problem = format!("no tensor of a {} model has this name", self.architecture);
            let remedy = "convert the model again with a current converter";
            CheckpointError::new(ErrorKind::Unsupported, self.file.path(), &place, problem, remedy)
        };
        let one = |name: String, heads| {
            let info = TensorInfo::new(tensor.shape.clone(), tensor.block.format());
            Ok(vec![Part { name, info, stored: stored(tensor.span, tensor.block, heads) }])
        };
        if name == ROPE_FACTORS {
            return one(name.to_string(), None);
        }
        let (stem, suffix) = name.rsplit_once('.').ok_or_else(unknown)?;
        if let Some(hf) = translate(GLOBAL, stem) {
            return one(format!("{hf}.{suffix}"), None);
        }
        let (layer, stem) =
            stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
        let layer: u32 = layer.parse().map_err(|_| unknown())?;
        if let Some(hf) = translate(LAYER, stem) {
            let heads = match stem {
                "attn_q" if self.interleaved => Some(self.heads),
                "attn_k" if self.interleaved => Some(self.kv_heads),
                _ => None,
            };
            if let Some(heads) = heads {
                let rows = tensor.shape[0] as u64;
                if !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
                    let problem = format!("{rows} rows do not divide into {heads} heads of an even size");
                    return Err(CheckpointError::malformed(self.file.path(), &place, problem));
                }
            }
            return one(format!("model.layers.{layer}.{hf}.{suffix}"), heads.map(|heads| heads as usize));
        }
        let hf = translate(EXPERTS, stem).ok_or_else(unknown)?;
        let (&experts, shape) = tensor.shape.split_first().ok_or_else(unknown)?;
        let len = tensor.span.len / experts;
        Ok((0..experts)
            .map(|expert| Part {
                name: format!("model.layers.{layer}.mlp.experts.{expert}.{hf}.{suffix}"),
                info: TensorInfo::new(shape.to_vec(), tensor.block.format()),
                stored: stored(
                    Span { start: tensor.span.start + expert * len, len, ..tensor.span },
                    tensor.block,
                    None,
                ),
            })
            .collect())
    }

    /// The config in the form of `config.json`.
    pub fn config(&self, tensors: &BTreeMap<String, TensorInfo>) -> Result<Value, CheckpointError> {
        let keys = self.keys();
        let eps_key = self.key("attention.layer_norm_rms_epsilon");
        let eps = keys.float(&eps_key)?.ok_or_else(|| keys.missing(&eps_key))?;
        let vocab = match tensors.get("model.embed_tokens.weight") {
            Some(info) => info.shape[0],
            None => {
                let remedy = "convert the model again with a current converter";
                let place = "tensor \"token_embd.weight\"";
                let problem = "the model has no embedding";
                let file = self.file.path();
                return Err(CheckpointError::new(ErrorKind::Missing, file, place, problem, remedy));
            }
        };
        let mut config = Map::new();
        let mut put = |key: &str, value: Value| config.insert(key.to_string(), value);
        put("architectures", json!([self.class]));
        put("model_type", json!(self.model_type));
        put("hidden_size", json!(self.required_count("embedding_length")?));
        put("intermediate_size", json!(self.required_count("feed_forward_length")?));
        put("num_hidden_layers", json!(self.required_count("block_count")?));
        put("num_attention_heads", json!(self.heads));
        put("num_key_value_heads", json!(self.kv_heads));
        put("head_dim", json!(self.head_dim));
        put("vocab_size", json!(vocab));
        put("hidden_act", json!("silu"));
        put("rms_norm_eps", short_float(eps));
        let theta = keys.float(&self.key("rope.freq_base"))?.unwrap_or(10000.0);
        put("rope_theta", short_float(theta));
        put("max_position_embeddings", json!(self.required_count("context_length")?));
        put("tie_word_embeddings", json!(!tensors.contains_key("lm_head.weight")));
        let bias = |name: &str| tensors.contains_key(&format!("model.layers.0.{name}.bias"));
        put("attention_bias", json!(bias("self_attn.q_proj")));
        put("mlp_bias", json!(bias("mlp.up_proj")));
        for (key, id) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
            if let Some(id) = self.token_id(id)? {
                put(key, json!(id));
            }
        }
        if let Some(dims) = self.count("rope.dimension_count")?.filter(|&dims| dims != self.head_dim) {
            put("partial_rotary_factor", json!(dims as f64 / self.head_dim as f64));
        }
        if let Some(scaling) = self.rope_scaling()? {
            put("rope_scaling", scaling);
        }
        if let Some(window) = self.count("attention.sliding_window")?.filter(|&window| window > 0) {
            put("sliding_window", json!(window));
        }
        for (key, name) in [
            ("num_experts", "expert_count"),
            ("num_experts_per_tok", "expert_used_count"),
            ("moe_intermediate_size", "expert_feed_forward_length"),
        ] {
            if let Some(count) = self.count(name)? {
                put(key, json!(count));
            }
        }
        if self.model_type == "qwen3_moe" {
            // The converter accepts no other models of this kind.
            put("norm_topk_prob", json!(true));
        }
        Ok(Value::Object(config))
    }

    fn rope_scaling(&self) -> Result<Option<Value>, CheckpointError> {
        if let Some(tensor) = self.container.tensors.get(ROPE_FACTORS) {
            let factors: Vec<f32> = match tensor.block {
                BlockType::F32 => slice(std::slice::from_ref(self.file), &tensor.span)
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
                other => {
                    let problem = format!("factors of rotary frequencies as {other:?}; expected F32");
                    let place = format!("tensor {ROPE_FACTORS:?}");
                    return Err(CheckpointError::malformed(self.file.path(), place, problem));
                }
            };
            return Ok(Some(json!({"rope_type": "factors", "factors": factors})));
        }
        let keys = self.keys();
        let float = |name: &str| keys.float(&self.key(name));
        let kind = keys.string(&self.key("rope.scaling.type"))?;
        let factor = match float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => float("rope.scale_linear")?,
        };
        Ok(match kind {
            None if factor.is_none_or(|factor| factor == 0.0 || factor == 1.0) => None,
            Some("none") => None,
            None | Some("linear") => {
                Some(json!({"rope_type": "linear", "factor": short_float(factor.unwrap_or(1.0))}))
            }
            Some("yarn") => {
                let mut scaling = Map::new();
                scaling.insert("rope_type".into(), json!("yarn"));
                scaling.insert("factor".into(), short_float(factor.unwrap_or(1.0)));
                if let Some(context) = self.count("rope.scaling.original_context_length")? {
                    scaling.insert("original_max_position_embeddings".into(), json!(context));
                }
                for (key, name) in [
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ] {
                    if let Some(value) = float(name)? {
                        scaling.insert(key.into(), short_float(value));
                    }
                }
                Some(Value::Object(scaling))
            }
            Some(other) => {
                let key = self.key("rope.scaling.type");
                let problem = format!("{other:?} is not supported; supported are none, linear and yarn");
                let remedy = "use the Hugging Face checkpoint";
                return Err(keys.error(ErrorKind::Unsupported, &key, problem, remedy));
            }
        })
    }

    fn token_id(&self, name: &str) -> Result<Option<u32>, CheckpointError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = self.keys().count(&key)?;
        id.map(|id| {
            u32::try_from(id).map_err(|_| {
                CheckpointError::malformed(
                    self.file.path(),
                    format_args!("metadata {key:?}"),
                    format_args!("{id} is no token"),
                )
            })
        })
        .transpose()
    }

    /// The special tokens in the form of `generation_config.json`.
    pub fn generation_config(&self) -> Result<Value, CheckpointError> {
        let mut config = Map::new();
        if let Some(id) = self.token_id("bos")? {
            config.insert("bos_token_id".into(), json!(id));
        }
        let mut ends = Vec::new();
        for name in ["eos", "eot", "eom"] {
            if let Some(id) = self.token_id(name)?
                && !ends.contains(&id)
            {
                ends.push(id);
            }
        }
        if !ends.is_empty() {
            config.insert("eos_token_id".into(), json!(ends));
        }
        Ok(Value::Object(config))
    }

    pub fn chat_template(&self) -> Result<Option<String>, CheckpointError> {
        Ok(self.keys().string("tokenizer.chat_template")?.map(str::to_string))
    }

    /// The vocabulary, or `None` if the file has none.
    pub fn vocabulary(&self) -> Result<Option<GgufVocab>, CheckpointError> {
        let keys = self.keys();
        let Some(model) =
            keys.string("tokenizer.ggml.model")?.filter(|model| !matches!(*model, "none" | "no_vocab"))
        else {
            return Ok(None);
        };
        let flag = |name: &str| keys.bool(&format!("tokenizer.ggml.{name}"));
        Ok(Some(GgufVocab {
            model: model.to_string(),
            pre: keys.string("tokenizer.ggml.pre")?.unwrap_or_default().to_string(),
            tokens: keys.array("tokenizer.ggml.tokens", string)?,
            token_types: keys.array("tokenizer.ggml.token_type", |value| {
                integer(value).and_then(|n| i32::try_from(n).ok())
            })?,
            merges: keys.array("tokenizer.ggml.merges", string)?,
            scores: keys.array("tokenizer.ggml.scores", |value| match value {
                Meta::Float(x) => Some(*x as f32),
                _ => None,
            })?,
            bos: self.token_id("bos")?,
            eos: self.token_id("eos")?,
            eot: self.token_id("eot")?,
            unk: self.token_id("unknown")?,
            pad: self.token_id("padding")?,
            add_bos: flag("add_bos_token")?,
            add_eos: flag("add_eos_token")?,
            add_space_prefix: flag("add_space_prefix")?,
        }))
    }
}

/// How a tensor lies in the file.
fn stored(span: Span, block: BlockType, rotary_heads: Option<usize>) -> Stored {
    match block {
        BlockType::F32 | BlockType::F16 | BlockType::Bf16 if rotary_heads.is_none() => {
            Stored::Planes { codes: span, scales: None }
        }
        _ => Stored::Blocks { span, block, rotary_heads },
    }
}

/// A float32 of the file as the shortest decimal that means it: 1e-5, not 9.999999747378752e-6.
fn short_float(value: f64) -> Value {
    let single = value as f32;
    let exact = f64::from(single) == value;
    exact.then(|| single.to_string().parse::<f64>().ok()).flatten().map_or(json!(value), |short| json!(short))
}

fn string(value: &Meta) -> Option<String> {
    match value {
        Meta::String(text) => Some(text.clone()),
        _ => None,
    }
}

fn integer(value: &Meta) -> Option<i64> {
    match value {
        Meta::Unsigned(n) => i64::try_from(*n).ok(),
        Meta::Signed(n) => Some(*n),
        _ => None,
    }
}

/// Typed access to the metadata.
#[derive(Clone, Copy)]
struct Keys<'a> {
    path: &'a Path,
    container: &'a Container,
}

impl<'a> Keys<'a> {
    fn error(
        &self,
        kind: ErrorKind,
        key: &str,
        problem: impl std::fmt::Display,
        remedy: &'static str,
    ) -> CheckpointError {
        CheckpointError::new(kind, self.path, format_args!("metadata {key:?}"), problem, remedy)
    }

    fn missing(&self, key: &str) -> CheckpointError {
        let remedy = "convert the model again with a current converter";
        self.error(ErrorKind::Missing, key, "there is no such key", remedy)
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Meta) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        let Some(value) = self.container.metadata.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| {
            let problem = format!("expected {expected}, found {}", value.kind());
            let remedy = "convert the model again with a current converter";
            self.error(ErrorKind::Malformed, key, problem, remedy)
        })
    }

    /// An unsigned integer; some keys hold one for every layer, which must agree.
    fn count(&self, key: &str) -> Result<Option<u64>, CheckpointError> {
        self.typed(key, "an unsigned integer, the same for all layers", |value| {
            let single = |value: &Meta| integer(value).and_then(|n| u64::try_from(n).ok());
            match value {
                Meta::Array(values) => {
                    let first = single(values.first()?)?;
                    values.iter().all(|value| single(value) == Some(first)).then_some(first)
                }
                value => single(value),
            }
        })
    }

    fn float(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.typed(key, "a finite number", |value| match value {
            Meta::Float(x) if x.is_finite() => Some(*x),
            value => integer(value).map(|n| n as f64),
        })
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.typed(key, "a bool", |value| match value {
            Meta::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.typed(key, "a string", |value| match value {
            Meta::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// An array, empty if the key is missing.
    fn array<T>(&self, key: &str, convert: impl Fn(&Meta) -> Option<T>) -> Result<Vec<T>, CheckpointError> {
        let values = self.typed(key, "an array of one type", |value| match value {
            Meta::Array(values) => values.iter().map(&convert).collect::<Option<Vec<T>>>(),
            _ => None,
        })?;
        Ok(values.unwrap_or_default())
    }
}
