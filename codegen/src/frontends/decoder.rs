//! The decoder that the families share: RMS norms before attention and feed-forward, grouped-query
//! attention with rotary embeddings, a gated feed-forward layer or a mixture of such, residuals.

use super::config::{Config, MAX_SIZE};
use super::{FrontendError, ModelFacts, rope};
use std::collections::{BTreeMap, BTreeSet};
use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::graph::{ActivationFn, Cache, EXPERT, Graph, NodeId, Op, RopeSpec, Router, View, Weight};
use tilec_ir::tensor::TensorInfo;

/// What sets a layer's attention apart from that of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerAttention {
    /// Name of its rope.
    pub rope: String,
    /// Positions that a row sees, itself included; `None`: all before it.
    pub window: Option<usize>,
    /// KV heads; divides the query heads.
    pub kv_heads: usize,
    /// Whether each query head has a score that joins its softmax and carries no value.
    pub sinks: bool,
}

/// Feed-forward half of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedForward {
    /// One gated layer of [`Decoder::intermediate`] columns.
    Dense,
    /// Those of [`Decoder::experts`].
    Experts,
}

/// How the matrices of experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertTensors {
    /// A tensor each: `experts.N.gate_proj.weight`, `up_proj`, `down_proj`.
    Each,
    /// One of all experts for gate and up, whose rows alternate, and one for down; each with a bias:
    /// `experts.gate_up_proj`, `experts.down_proj` (gpt-oss).
    Interleaved,
}

/// The experts of a mixture layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub count: usize,
    /// Columns between the two halves of each.
    pub intermediate: usize,
    /// How they are chosen; the name of a correction is that behind the layer's prefix.
    pub router: Router,
    /// Module of the router's matrix, behind the layer's prefix.
    pub gate: &'static str,
    /// Whether the router has a bias.
    pub gate_bias: bool,
    /// How gate and up are joined.
    pub activation: ActivationFn,
    /// How they are stored.
    pub tensors: ExpertTensors,
}

/// Formats in which a model's matrices are published; what is not named here is bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Queries, keys, values, and the dense feed-forward layers.
    pub projections: Format,
    /// The product behind attention.
    pub output: Format,
    /// Experts.
    pub experts: Format,
}

impl Default for Published {
    fn default() -> Published {
        Published { projections: Format::BF16, output: Format::BF16, experts: Format::BF16 }
    }
}

/// A decoder, all sizes checked.
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
    /// KV heads of the config; a layer may have others.
    pub kv_heads: usize,
    /// Columns of a head of queries and keys, even.
    pub head_dim: usize,
    /// Columns of a head of values.
    pub v_dim: usize,
    /// Multiplies the values before they are cached.
    pub value_scale: Option<f32>,
    /// Whether q, k and v are one matrix whose rows are `kv_heads` groups of `[q | k | v]`.
    pub fused_qkv: bool,
    /// Name of the sinks behind the layer's prefix.
    pub sinks: &'static str,
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
    /// Feed-forward half of each layer.
    pub feed_forward: Vec<FeedForward>,
    /// The experts, if a layer has them.
    pub experts: Option<Experts>,
    /// Formats that the model is published in.
    pub published: Published,
    /// Tensors of parts that are not run: names that start so are passed over.
    pub unused: &'static [&'static str],
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

fn max_positions(config: &Config, defaults: &Defaults) -> Result<usize, FrontendError> {
    Ok(config.positions("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings))
}

/// Number of decoder layers that a config asks for.
pub(super) fn layer_count(config: &Config) -> Result<usize, FrontendError> {
    config.layers_or("num_hidden_layers", 32)
}

impl Decoder {
    /// Reads what the families have in common, given the layers. Has no `mlp_bias`, no `qk_norm` and no
    /// experts.
    pub(super) fn parse(
        config: &Config,
        defaults: &Defaults,
        layers: &[LayerKind],
    ) -> Result<Decoder, FrontendError> {
        let max_positions = max_positions(config, defaults)?;
        let mut context = usize::MAX;
        let decoder = Decoder::parse_with_ropes(config, defaults, layers, |layer_type, head_dim| {
            let rope = rope::parse(config, layer_type, head_dim, max_positions)?;
            context = context.min(rope.context);
            Ok((rope::name(config, layer_type)?, rope.spec))
        })?;
        Ok(Decoder { context, ..decoder })
    }

    /// [`Decoder::parse`] for a family that reads the rope of a layer type (name and frequencies, given
    /// the columns of a head) in its own way.
    pub(super) fn parse_with_ropes(
        config: &Config,
        defaults: &Defaults,
        layers: &[LayerKind],
        mut rope_of: impl FnMut(&'static str, usize) -> Result<(String, RopeSpec), FrontendError>,
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
        let mut ropes = BTreeMap::new();
        let mut name_of: BTreeMap<&str, String> = BTreeMap::new();
        let mut attention = Vec::with_capacity(layers.len());
        for LayerKind { layer_type, window } in layers {
            let name = match name_of.get(layer_type) {
                Some(name) => name.clone(),
                None => {
                    let (name, spec) = rope_of(layer_type, head_dim)?;
                    ropes.entry(name.clone()).or_insert(spec);
                    name_of.insert(layer_type, name.clone());
                    name
                }
            };
            attention.push(LayerAttention { rope: name, window: *window, kv_heads, sinks: false });
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
            v_dim: head_dim,
            value_scale: None,
            fused_qkv: false,
            sinks: "self_attn.sinks",
            eps: config.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            tied: config.bool_or("tie_word_embeddings", false)?,
            attention_bias: config.bool_or("attention_bias", false)?,
            mlp_bias: false,
            qk_norm: false,
            ropes,
            feed_forward: vec![FeedForward::Dense; attention.len()],
            layers: attention,
            experts: None,
            published: Published::default(),
            unused: &[],
            context: max_positions(config, defaults)?,
            bos,
            eos,
        })
    }

    /// Columns of the queries of all heads.
    fn q_cols(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Name of the matrix that makes logits.
    fn head_weight(&self) -> &'static str {
        if self.tied { EMBEDDING } else { HEAD }
    }

    /// Names and shapes of all tensors, in model order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        for stored in self.stored() {
            if stored.each {
                let shape = &stored.shape[1..];
                tensors.extend((0..stored.shape[0]).map(|expert| (stored.of(expert), shape.to_vec())));
            } else {
                tensors.push((stored.name, stored.shape));
            }
        }
        tensors
    }

    /// All tensors in model order, those of experts as one, and the weights in them.
    pub(super) fn stored(&self) -> Vec<Stored> {
        let mut all = vec![Stored::matrix(EMBEDDING, self.vocab, self.hidden)];
        for layer in 0..self.layers.len() {
            self.stored_layer(layer, &mut all);
        }
        all.push(Stored::vector(FINAL_NORM, self.hidden));
        if !self.tied {
            all.push(Stored::matrix(HEAD, self.vocab, self.hidden));
        }
        all
    }

    fn stored_layer(&self, layer: usize, all: &mut Vec<Stored>) {
        let attention = &self.layers[layer];
        let mut vector = |name: &str, len: usize| all.push(Stored::vector(&tensor(layer, name), len));
        vector("input_layernorm.weight", self.hidden);
        if self.qk_norm {
            vector("self_attn.q_norm.weight", self.head_dim);
            vector("self_attn.k_norm.weight", self.head_dim);
        }
        if attention.sinks {
            vector(self.sinks, self.heads);
        }
        vector("post_attention_layernorm.weight", self.hidden);
        let (q, k, v) = self.qkv_cols(layer);
        let mut linear = |name: &str, out: usize, input: usize, bias: bool| {
            let format = match name {
                "self_attn.o_proj" => self.published.output,
                // A router's module is no projection.
                _ if name.ends_with("_proj") => self.published.projections,
                _ => Format::BF16,
            };
            let stored = Stored::matrix(&tensor(layer, &format!("{name}.weight")), out, input);
            all.push(Stored { format, ..stored });
            if bias {
                all.push(Stored::vector(&tensor(layer, &format!("{name}.bias")), out));
            }
        };
        let biased = self.attention_bias;
        if self.fused_qkv {
            linear("self_attn.qkv_proj", q + k + v, self.hidden, false);
        } else {
            linear("self_attn.q_proj", q, self.hidden, biased);
            linear("self_attn.k_proj", k, self.hidden, biased);
            linear("self_attn.v_proj", v, self.hidden, biased);
        }
        linear("self_attn.o_proj", self.hidden, self.heads * self.v_dim, biased);
        if self.feed_forward[layer] == FeedForward::Dense {
            linear("mlp.gate_proj", self.intermediate, self.hidden, self.mlp_bias);
            linear("mlp.up_proj", self.intermediate, self.hidden, self.mlp_bias);
            linear("mlp.down_proj", self.hidden, self.intermediate, self.mlp_bias);
        } else if let Some(experts) = &self.experts {
            linear(experts.gate, experts.count, self.hidden, experts.gate_bias);
            if let Some(correction) = &experts.router.correction {
                all.push(Stored::vector(&tensor(layer, correction), experts.count));
            }
            self.stored_experts(layer, experts, all);
        }
        if self.fused_qkv {
            // The rows are groups, each with its share of the query heads, keys and values.
            let name = tensor(layer, "self_attn.qkv_proj.weight");
            let groups = self.kv_heads;
            let stride = (q + k + v) / groups * self.hidden;
            let mut start = 0;
            let mut weights = Vec::new();
            for (part, cols) in [("q", q), ("k", k), ("v", v)] {
                let block = cols / groups * self.hidden;
                let view = View { tensor: name.clone(), start, block, stride };
                weights.push((format!("{name}[{part}]"), vec![cols, self.hidden], Some(view)));
                start += block;
            }
            if let Some(fused) = all.iter_mut().find(|stored| stored.name == name) {
                fused.weights = weights;
            }
        }
    }

    fn stored_experts(&self, layer: usize, experts: &Experts, all: &mut Vec<Stored>) {
        let Experts { count, intermediate, .. } = *experts;
        let mut add = |name: &str, shape: &[usize], each: bool, vector: bool| {
            let name = tensor(layer, name);
            let weights = vec![(name.clone(), shape.to_vec(), None)];
            let format = if vector { Format::BF16 } else { self.published.experts };
            all.push(Stored { name, shape: shape.to_vec(), each, vector, format, weights });
        };
        match experts.tensors {
            ExpertTensors::Each => {
                for (name, out, input) in [
                    ("gate", intermediate, self.hidden),
                    ("up", intermediate, self.hidden),
                    ("down", self.hidden, intermediate),
                ] {
                    let name = format!("mlp.experts.{EXPERT}.{name}_proj.weight");
                    add(&name, &[count, out, input], true, false);
                }
            }
            ExpertTensors::Interleaved => {
                add("mlp.experts.gate_up_proj", &[count, 2 * intermediate, self.hidden], false, false);
                add("mlp.experts.gate_up_proj_bias", &[count, 2 * intermediate], false, true);
                add("mlp.experts.down_proj", &[count, self.hidden, intermediate], false, false);
                add("mlp.experts.down_proj_bias", &[count, self.hidden], false, true);
                // Rows of gate and up alternate: a row of a matrix, or a value of a bias.
                let first = all.len() - 4;
                for (stored, unit) in all[first..first + 2].iter_mut().zip([self.hidden, 1]) {
                    let mut shape = stored.shape.clone();
                    shape[1] = intermediate;
                    let part = |(number, part): (usize, &str)| {
                        let (start, block, stride) = (number * unit, unit, 2 * unit);
                        let view = View { tensor: stored.name.clone(), start, block, stride };
                        (format!("{}[{part}]", stored.name), shape.clone(), Some(view))
                    };
                    stored.weights = [(0, "gate"), (1, "up")].map(part).to_vec();
                }
            }
        }
    }

    /// Columns of the queries, keys and values of a layer.
    fn qkv_cols(&self, layer: usize) -> (usize, usize, usize) {
        let kv_heads = self.layers[layer].kv_heads;
        (self.q_cols(), kv_heads * self.head_dim, kv_heads * self.v_dim)
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

    /// Checks the checkpoint's tensors against the config's and gives the format of each of `stored`.
    fn check(
        &self,
        stored: &[Stored],
        tensors: &BTreeMap<String, TensorInfo>,
    ) -> Result<Vec<Format>, FrontendError> {
        // Tensors that are one an expert may also be described all at once, under the name with the mark.
        let names = |stored: &Stored| match stored.each && !tensors.contains_key(&stored.name) {
            true => (0..stored.shape[0]).map(|expert| stored.of(expert)).collect(),
            false => vec![stored.name.clone()],
        };
        let mut known: BTreeSet<String> = BTreeSet::new();
        let mut missing: Option<(String, Vec<usize>)> = None;
        let mut others = 0;
        for stored in stored {
            for name in names(stored) {
                if !tensors.contains_key(&name) {
                    others += usize::from(missing.is_some());
                    missing.get_or_insert_with(|| {
                        (name.clone(), stored.shape[usize::from(stored.each)..].to_vec())
                    });
                }
                known.insert(name);
            }
        }
        if let Some((name, expected)) = missing {
            return Err(FrontendError::MissingTensor { name, expected, others });
        }
        let mut formats = Vec::with_capacity(stored.len());
        for stored in stored {
            let mut first: Option<(String, Format)> = None;
            for name in names(stored) {
                let info = &tensors[&name];
                let expected = &stored.shape[usize::from(stored.each && name != stored.name)..];
                if info.shape != expected {
                    let (expected, found) = (expected.to_vec(), info.shape.clone());
                    return Err(FrontendError::TensorShape { name, expected, found });
                }
                if stored.vector && info.format.scale.is_some() {
                    let found = info.format.to_string();
                    return Err(FrontendError::TensorFormat { name, found });
                }
                match &first {
                    None => first = Some((name, info.format)),
                    Some((_, format)) if *format == info.format => {}
                    Some((other, format)) => {
                        let (found, other_found) = (info.format.to_string(), format.to_string());
                        let other = other.clone();
                        return Err(FrontendError::MixedExperts { name, found, other, other_found });
                    }
                }
            }
            // A tensor has a name, and a mixture at least one expert.
            formats.extend(first.map(|(_, format)| format));
        }
        let has_place = |name: &str| {
            known.contains(name)
                || is_derived(name)
                || self.tied && name == HEAD
                || self.unused.iter().any(|prefix| name.starts_with(prefix))
        };
        let mut unexpected = tensors.iter().filter(|(name, _)| !has_place(name));
        if let Some((name, info)) = unexpected.next() {
            let (name, found, family) = (name.clone(), info.shape.clone(), self.family);
            return Err(FrontendError::UnexpectedTensor { name, found, family, others: unexpected.count() });
        }
        Ok(formats)
    }

    /// The graph of a decoding step, in f32 and with all weights as stored.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape than the config implies, or has no place in the
    /// model.
    pub fn build(&self, tensors: &BTreeMap<String, TensorInfo>) -> Result<Graph, FrontendError> {
        let all = self.stored();
        let formats = self.check(&all, tensors)?;
        let mut graph = Graph::new(self.family);
        for (stored, format) in all.into_iter().zip(formats) {
            for (name, shape, view) in stored.weights {
                graph.declare_weight(&name, Weight { view, ..Weight::whole(shape, format) })?;
            }
        }
        graph.ropes = self.ropes.clone();
        let cache = |layer: &LayerAttention| Cache {
            kv_heads: layer.kv_heads,
            qk_dim: self.head_dim,
            v_dim: self.v_dim,
            kv_type: KvType::F32,
        };
        graph.caches = self.layers.iter().map(cache).collect();

        let mut x = graph.add("embed", None, Op::Embed { weight: EMBEDDING.into() }, &[])?;
        for layer in 0..self.layers.len() {
            let mut builder = LayerBuilder { decoder: self, graph: &mut graph, layer };
            x = builder.attention(x)?;
            x = match (self.feed_forward[layer], &self.experts) {
                (FeedForward::Experts, Some(experts)) => builder.mixture(experts, x)?,
                _ => builder.feed_forward(x)?,
            };
        }
        let rows = graph.add("select", None, Op::SelectRows, &[x])?;
        let norm = Op::RmsNorm { weight: FINAL_NORM.into(), eps: self.eps };
        let normed = graph.add("norm", None, norm, &[rows])?;
        let head = graph.add("head", None, Op::Linear { weight: self.head_weight().into() }, &[normed])?;
        graph.add("logits", None, Op::Logits, &[head])?;
        Ok(graph)
    }
}

/// A weight of the graph in a stored tensor: its name, shape, and where it lies if not in all of it.
type WeightIn = (String, Vec<usize>, Option<View>);

/// A tensor as the checkpoint stores it, or one for each expert.
pub(super) struct Stored {
    /// Its name; [`EXPERT`] stands for the number if there is one an expert.
    pub name: String,
    /// Its shape; the number of experts comes first if there is one an expert.
    pub shape: Vec<usize>,
    /// Whether there is one an expert.
    pub each: bool,
    /// Whether it holds vectors: norms, biases, sinks.
    pub vector: bool,
    /// Format that it is published in.
    pub format: Format,
    /// The weights in it.
    pub weights: Vec<WeightIn>,
}

impl Stored {
    fn matrix(name: &str, out: usize, input: usize) -> Stored {
        Stored::whole(name, vec![out, input], false)
    }

    fn vector(name: &str, len: usize) -> Stored {
        Stored::whole(name, vec![len], true)
    }

    fn whole(name: &str, shape: Vec<usize>, vector: bool) -> Stored {
        let weights = vec![(name.to_string(), shape.clone(), None)];
        Stored { name: name.to_string(), shape, each: false, vector, format: Format::BF16, weights }
    }

    /// Name of an expert's tensor.
    fn of(&self, expert: usize) -> String {
        self.name.replace(EXPERT, &expert.to_string())
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
        let mut y = self.projected(name, x)?;
        if decoder.qk_norm {
            y = self.norm(&format!("{name}_norm"), &format!("self_attn.{name}_norm.weight"), y)?;
        }
        let rope = decoder.layers[self.layer].rope.clone();
        self.add(&format!("{name}_rope"), Op::Rope { rope, head_dim: decoder.head_dim }, &[y])
    }

    fn attention(&mut self, x: NodeId) -> Result<NodeId, FrontendError> {
        let decoder = self.decoder;
        let own = &decoder.layers[self.layer];
        let normed = self.norm("attn_norm", "input_layernorm.weight", x)?;
        let q = self.rotated("q", normed)?;
        let k = self.rotated("k", normed)?;
        let mut v = self.projected("v", normed)?;
        if let Some(factor) = decoder.value_scale {
            v = self.add("v_scale", Op::Scale { factor }, &[v])?;
        }
        let kv = self.add("kv", Op::KvWrite { cache: self.layer }, &[k, v])?;
        let attention = Op::Attention {
            cache: self.layer,
            heads: decoder.heads,
            scale: (1.0 / (decoder.head_dim as f64).sqrt()) as f32,
            window: own.window,
            sinks: own.sinks.then(|| tensor(self.layer, decoder.sinks)),
            bidirectional: false,
        };
        let mixed = self.add("attn", attention, &[q, kv])?;
        let o = self.linear("o", "self_attn.o_proj", decoder.attention_bias, mixed)?;
        self.add("attn_res", Op::Add, &[x, o])
    }

    /// Queries, keys or values before anything is done to them.
    fn projected(&mut self, name: &str, x: NodeId) -> Result<NodeId, FrontendError> {
        if self.decoder.fused_qkv {
            let weight = tensor(self.layer, &format!("self_attn.qkv_proj.weight[{name}]"));
            return self.add(name, Op::Linear { weight }, &[x]);
        }
        self.linear(name, &format!("self_attn.{name}_proj"), self.decoder.attention_bias, x)
    }

    fn mixture(&mut self, experts: &Experts, x: NodeId) -> Result<NodeId, FrontendError> {
        let normed = self.norm("ffn_norm", "post_attention_layernorm.weight", x)?;
        let scores = self.linear("router", experts.gate, experts.gate_bias, normed)?;
        let mut router = experts.router.clone();
        router.correction = router.correction.map(|name| tensor(self.layer, &name));
        let routes = self.add("route", Op::Route(router), &[scores])?;
        let gate = self.experts(experts, "gate", normed, routes)?;
        let up = self.experts(experts, "up", normed, routes)?;
        let act = self.add("act", Op::Gated { activation: experts.activation }, &[gate, up])?;
        let down = self.experts(experts, "down", act, routes)?;
        let sum = self.add("experts", Op::Combine, &[down, routes])?;
        self.add("ffn_res", Op::Add, &[x, sum])
    }

    /// One of the three products of all chosen experts.
    fn experts(
        &mut self,
        experts: &Experts,
        name: &str,
        x: NodeId,
        routes: NodeId,
    ) -> Result<NodeId, FrontendError> {
        let per_slot = name == "down";
        let (weight, bias) = match (experts.tensors, per_slot) {
            (ExpertTensors::Each, _) => (format!("mlp.experts.{EXPERT}.{name}_proj.weight"), None),
            (ExpertTensors::Interleaved, false) => (
                format!("mlp.experts.gate_up_proj[{name}]"),
                Some(format!("mlp.experts.gate_up_proj_bias[{name}]")),
            ),
            (ExpertTensors::Interleaved, true) => {
                ("mlp.experts.down_proj".into(), Some("mlp.experts.down_proj_bias".into()))
            }
        };
        let weight = tensor(self.layer, &weight);
        let y = self.add(name, Op::ExpertLinear { weight, per_slot }, &[x, routes])?;
        match bias {
            None => Ok(y),
            Some(bias) => {
                let weight = tensor(self.layer, &bias);
                self.add(&format!("{name}_bias"), Op::ExpertBias { weight }, &[y, routes])
            }
        }
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
