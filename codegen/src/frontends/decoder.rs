//! The dense decoder that Llama and its kin share: RMS norms before attention and feed-forward,
//! grouped-query attention with rotary embeddings, a gated feed-forward layer, residuals.

use super::config::{Config, MAX_SIZE};
use super::{FrontendError, ModelFacts, rope};
use std::collections::{BTreeMap, BTreeSet};
use tilec_ir::abi::KvType;
use tilec_ir::graph::{ActivationFn, Cache, Graph, NodeId, Op, RopeSpec, Weight};
use tilec_ir::tensor::TensorInfo;

/// What sets a layer's attention apart from that of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerAttention {
    /// Name of its rope.
    pub rope: String,
    /// Positions that a row sees, itself included; `None`: all before it.
    pub window: Option<usize>,
}

/// A dense decoder, all sizes checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoder {
    /// `model_type` of the family.
    pub family: &'static str,
    /// Token ids.
    pub vocab: usize,
    /// Columns of the residual.
    pub hidden: usize,
    /// Columns between the two halves of the feed-forward layer.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads; divides `heads`.
    pub kv_heads: usize,
    /// Columns of a head, even.
    pub head_dim: usize,
    /// Added to the mean of squares in norms.
    pub eps: f32,
    /// Whether the head is the embedding's matrix.
    pub tied: bool,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normed per head.
    pub qk_norm: bool,
    /// Rotary embeddings by name.
    pub ropes: BTreeMap<String, RopeSpec>,
    /// Attention of each layer.
    pub layers: Vec<LayerAttention>,
    /// Longest context that the model is made for.
    pub context: usize,
    /// Token that starts a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Defaults in which the families differ.
pub(super) struct Defaults {
    /// `model_type`.
    pub family: &'static str,
    pub vocab_size: usize,
    pub intermediate_size: usize,
    /// `None`: as many as query heads.
    pub num_key_value_heads: Option<usize>,
    /// `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    pub max_position_embeddings: usize,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
}

/// Layer type of attention without a window, as transformers spells it.
pub(super) const FULL: &str = "full_attention";
/// Layer type of attention with a window, as transformers spells it.
pub(super) const SLIDING: &str = "sliding_attention";

/// Type of a layer and the window that it has by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerKind {
    pub layer_type: &'static str,
    pub window: Option<usize>,
}

impl LayerKind {
    /// Attention to everything before.
    pub const FULL: LayerKind = LayerKind { layer_type: FULL, window: None };

    /// Attention to a window, the row itself included.
    pub const fn sliding(window: usize) -> LayerKind {
        LayerKind { layer_type: SLIDING, window: Some(window) }
    }
}

/// Number of decoder layers that a config asks for.
pub(super) fn layer_count(config: &Config) -> Result<usize, FrontendError> {
    config.layers_or("num_hidden_layers", 32)
}

impl Decoder {
    /// Reads what the families have in common, given the layers. Has no `mlp_bias` and no `qk_norm`.
    pub(super) fn parse(
        config: &Config,
        defaults: &Defaults,
        layers: &[LayerKind],
    ) -> Result<Decoder, FrontendError> {
        match config.string("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => {}
            other => return Err(config.error("hidden_act", format!("{other:?} is not supported: use silu"))),
        }
        let vocab = config.size_or("vocab_size", defaults.vocab_size)?;
        let hidden = config.size_or("hidden_size", 4096)?;
        let heads = config.size_or("num_attention_heads", 32)?;
        let kv_heads = match config.size("num_key_value_heads")? {
            Some(kv_heads) => kv_heads,
            None => defaults
                .num_key_value_heads
                .filter(|_| !config.has_key("num_key_value_heads"))
                .unwrap_or(heads),
        };
        if heads % kv_heads != 0 {
            let what = format!("{kv_heads} does not divide num_attention_heads {heads}");
            return Err(config.error("num_key_value_heads", what));
        }
        let head_dim = match config.size("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden % heads == 0 => hidden / heads,
            None => {
                let what = format!("{heads} does not divide hidden_size {hidden}, and there is no head_dim");
                return Err(config.error("num_attention_heads", what));
            }
        };
        if head_dim % 2 != 0 {
            return Err(config.error("head_dim", format!("{head_dim} is odd: it cannot be rotated in pairs")));
        }
        if heads * head_dim > MAX_SIZE {
            let what = format!("{heads} heads of {head_dim} are beyond {MAX_SIZE} columns");
            return Err(config.error("head_dim", what));
        }
        let max_positions =
            config.positions("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let mut ropes = BTreeMap::new();
        let mut context = usize::MAX;
        let mut attention = Vec::with_capacity(layers.len());
        for LayerKind { layer_type, window } in layers {
            let name = rope::name(config, layer_type)?;
            if !ropes.contains_key(&name) {
                let rope = rope::parse(config, layer_type, head_dim, max_positions)?;
                context = context.min(rope.context);
                ropes.insert(name.clone(), rope.spec);
            }
            attention.push(LayerAttention { rope: name, window: *window });
        }
        let eos = match config.token_ids("eos_token_id", vocab)? {
            ids if ids.is_empty() && !config.has_key("eos_token_id") => {
                defaults.eos_token_id.into_iter().collect()
            }
            ids => ids,
        };
        let bos = match config.token_ids("bos_token_id", vocab)?.first() {
            None if !config.has_key("bos_token_id") => defaults.bos_token_id,
            bos => bos.copied(),
        };
        Ok(Decoder {
            family: defaults.family,
            vocab,
            hidden,
            intermediate: config.size_or("intermediate_size", defaults.intermediate_size)?,
            heads,
            kv_heads,
            head_dim,
            eps: config.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            tied: config.bool_or("tie_word_embeddings", false)?,
            attention_bias: config.bool_or("attention_bias", false)?,
            mlp_bias: false,
            qk_norm: false,
            ropes,
            layers: attention,
            context,
            bos,
            eos,
        })
    }

    /// Columns of the queries of all heads.
    fn q_cols(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys, or the values, of all KV heads.
    fn kv_cols(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Name of the matrix that makes logits.
    fn head_weight(&self) -> &'static str {
        if self.tied { EMBEDDING } else { HEAD }
    }

    /// Names and shapes of all tensors, in model order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![(EMBEDDING.to_string(), vec![self.vocab, self.hidden])];
        for layer in 0..self.layers.len() {
            let mut vector = |name: &str, len: usize| tensors.push((tensor(layer, name), vec![len]));
            vector("input_layernorm.weight", self.hidden);
            if self.qk_norm {
                vector("self_attn.q_norm.weight", self.head_dim);
                vector("self_attn.k_norm.weight", self.head_dim);
            }
            vector("post_attention_layernorm.weight", self.hidden);
            for (name, out, input, bias) in [
                ("self_attn.q_proj", self.q_cols(), self.hidden, self.attention_bias),
                ("self_attn.k_proj", self.kv_cols(), self.hidden, self.attention_bias),
                ("self_attn.v_proj", self.kv_cols(), self.hidden, self.attention_bias),
                ("self_attn.o_proj", self.hidden, self.q_cols(), self.attention_bias),
                ("mlp.gate_proj", self.intermediate, self.hidden, self.mlp_bias),
                ("mlp.up_proj", self.intermediate, self.hidden, self.mlp_bias),
                ("mlp.down_proj", self.hidden, self.intermediate, self.mlp_bias),
            ] {
                tensors.push((tensor(layer, &format!("{name}.weight")), vec![out, input]));
                if bias {
                    tensors.push((tensor(layer, &format!("{name}.bias")), vec![out]));
                }
            }
        }
        tensors.push((FINAL_NORM.to_string(), vec![self.hidden]));
        if !self.tied {
            tensors.push((HEAD.to_string(), vec![self.vocab, self.hidden]));
        }
        tensors
    }

    /// What a runtime wants to know beside the graph.
    pub fn facts(&self) -> ModelFacts {
        ModelFacts {
            family: self.family,
            vocab: self.vocab,
            hidden: self.hidden,
            layers: self.layers.len(),
            context: self.context,
            bos: self.bos,
            eos: self.eos.clone(),
        }
    }

    /// Checks the checkpoint's tensors against the config's.
    fn check(&self, tensors: &BTreeMap<String, TensorInfo>) -> Result<(), FrontendError> {
        let expected = self.tensors();
        let mut missing = expected.iter().filter(|(name, _)| !tensors.contains_key(name));
        if let Some((name, shape)) = missing.next() {
            let (name, expected, others) = (name.clone(), shape.clone(), missing.count());
            return Err(FrontendError::MissingTensor { name, expected, others });
        }
        for (name, shape) in &expected {
            let found = &tensors[name];
            if found.shape != *shape {
                let (name, expected, found) = (name.clone(), shape.clone(), found.shape.clone());
                return Err(FrontendError::TensorShape { name, expected, found });
            }
            if shape.len() == 1 && found.format.scale.is_some() {
                let (name, found) = (name.clone(), found.format.to_string());
                return Err(FrontendError::TensorFormat { name, found });
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        let has_place = |name: &str| known.contains(name) || is_derived(name) || self.tied && name == HEAD;
        let mut unexpected = tensors.iter().filter(|(name, _)| !has_place(name));
        if let Some((name, info)) = unexpected.next() {
            let (name, found, family) = (name.clone(), info.shape.clone(), self.family);
            return Err(FrontendError::UnexpectedTensor { name, found, family, others: unexpected.count() });
        }
        Ok(())
    }

    /// The graph of a decoding step, in f32 and with all weights as stored.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape than the config implies, or has no place in the
    /// model.
    pub fn build(&self, tensors: &BTreeMap<String, TensorInfo>) -> Result<Graph, FrontendError> {
        self.check(tensors)?;
        let mut graph = Graph::new(self.family);
        for (name, shape) in self.tensors() {
            let stored = tensors[&name].format;
            graph.declare_weight(&name, Weight { shape, stored, format: stored })?;
        }
        graph.ropes = self.ropes.clone();
        let cache = Cache {
            kv_heads: self.kv_heads,
            qk_dim: self.head_dim,
            v_dim: self.head_dim,
            kv_type: KvType::F32,
        };
        graph.caches = vec![cache; self.layers.len()];

        let mut x = graph.add("embed", None, Op::Embed { weight: EMBEDDING.into() }, &[])?;
        for layer in 0..self.layers.len() {
            let mut builder = LayerBuilder { decoder: self, graph: &mut graph, layer };
            x = builder.attention(x)?;
            x = builder.feed_forward(x)?;
        }
        let rows = graph.add("select", None, Op::SelectRows, &[x])?;
        let norm = Op::RmsNorm { weight: FINAL_NORM.into(), eps: self.eps };
        let normed = graph.add("norm", None, norm, &[rows])?;
        let head = graph.add("head", None, Op::Linear { weight: self.head_weight().into() }, &[normed])?;
        graph.add("logits", None, Op::Logits, &[head])?;
        Ok(graph)
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// Full name of a layer's tensor.
fn tensor(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}")
}

/// Whether a tensor holds what follows from the config: old checkpoints store rotary frequencies,
/// GGUF stores factors on them (which reach the frontend in the config).
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name == "rope_freqs.weight"
}

/// Adds the operators of one layer.
struct LayerBuilder<'d, 'g> {
    decoder: &'d Decoder,
    graph: &'g mut Graph,
    layer: usize,
}

impl LayerBuilder<'_, '_> {
    fn add(&mut self, name: &str, op: Op, operands: &[NodeId]) -> Result<NodeId, FrontendError> {
        Ok(self.graph.add(format!("l{}.{name}", self.layer), Some(self.layer), op, operands)?)
    }

    fn norm(&mut self, name: &str, weight: &str, x: NodeId) -> Result<NodeId, FrontendError> {
        let op = Op::RmsNorm { weight: tensor(self.layer, weight), eps: self.decoder.eps };
        self.add(name, op, &[x])
    }

    fn linear(&mut self, name: &str, module: &str, bias: bool, x: NodeId) -> Result<NodeId, FrontendError> {
        let weight = tensor(self.layer, &format!("{module}.weight"));
        let y = self.add(name, Op::Linear { weight }, &[x])?;
        if !bias {
            return Ok(y);
        }
        let weight = tensor(self.layer, &format!("{module}.bias"));
        self.add(&format!("{name}_bias"), Op::Bias { weight }, &[y])
    }

    /// Queries or keys: projected, normed per head if the family does, rotated.
    fn rotated(&mut self, name: &str, x: NodeId) -> Result<NodeId, FrontendError> {
        let decoder = self.decoder;
        let mut y = self.linear(name, &format!("self_attn.{name}_proj"), decoder.attention_bias, x)?;
        if decoder.qk_norm {
            y = self.norm(&format!("{name}_norm"), &format!("self_attn.{name}_norm.weight"), y)?;
        }
        let rope = decoder.layers[self.layer].rope.clone();
        self.add(&format!("{name}_rope"), Op::Rope { rope, head_dim: decoder.head_dim }, &[y])
    }

    fn attention(&mut self, x: NodeId) -> Result<NodeId, FrontendError> {
        let decoder = self.decoder;
        let normed = self.norm("attn_norm", "input_layernorm.weight", x)?;
        let q = self.rotated("q", normed)?;
        let k = self.rotated("k", normed)?;
        let v = self.linear("v", "self_attn.v_proj", decoder.attention_bias, normed)?;
        let kv = self.add("kv", Op::KvWrite { cache: self.layer }, &[k, v])?;
        let attention = Op::Attention {
            cache: self.layer,
            heads: decoder.heads,
            scale: (1.0 / (decoder.head_dim as f64).sqrt()) as f32,
            window: decoder.layers[self.layer].window,
        };
        let mixed = self.add("attn", attention, &[q, kv])?;
        let o = self.linear("o", "self_attn.o_proj", decoder.attention_bias, mixed)?;
        self.add("attn_res", Op::Add, &[x, o])
    }

    fn feed_forward(&mut self, x: NodeId) -> Result<NodeId, FrontendError> {
        let bias = self.decoder.mlp_bias;
        let normed = self.norm("ffn_norm", "post_attention_layernorm.weight", x)?;
        let gate = self.linear("gate", "mlp.gate_proj", bias, normed)?;
        let up = self.linear("up", "mlp.up_proj", bias, normed)?;
        let act = self.add("act", Op::Gated { activation: ActivationFn::Silu }, &[gate, up])?;
        let down = self.linear("down", "mlp.down_proj", bias, act)?;
        self.add("ffn_res", Op::Add, &[x, down])
    }
}
