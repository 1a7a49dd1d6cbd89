//! DFlash drafts (arXiv 2602.06036): a few Qwen3-like layers that fill a block of masks in
//! one pass. They have no embedding and no head: those are the target's.
//!
//! What the draft knows of the text before the block, it takes from the target: the residual streams
//! behind some of its layers (the *taps*), side by side, through `fc` and a norm, are the feature of a
//! position, and every draft layer makes the key and value of that position of it. So a draft is two
//! graphs on one set of caches. [`Dflash::inject`] fills them from the taps of rows that are committed.
//! [`Dflash::block`] runs the rows of a block, `[last token, mask, mask, ...]`, over them; row `j` guesses
//! the token at its own position. The block's own keys and values lie where the features of the committed
//! rows will overwrite them. What the second version adds is in [`super::dflash2`].

use super::FrontendError;
use super::config::Config;
use super::dflash2::{self, Dflash2};
use super::rope;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use tilec_ir::abi::KvType;
use tilec_ir::graph::{ActivationFn, Cache, Graph, NodeId, Op, RopeSpec, Weight};
use tilec_ir::plan::DRAFT_PREFIX;
use tilec_ir::spec::MAX_BLOCK;
use tilec_ir::tensor::TensorInfo;

/// Name of the first version's architecture, in `architectures`.
const ARCHITECTURE: &str = "DFlashDraftModel";

/// Most taps that a config may name.
const MAX_TAPS: usize = 64;

/// Settings of later versions and of relatives, which change what is computed: section, key, and the value
/// that changes nothing.
const UNSUPPORTED: &[(&str, Option<f64>)] = &[
    ("input_embedding_scale", Some(1.0)),
    ("projector_type", None),
    ("markov_rank", None),
    ("markov_head_type", None),
    ("enable_confidence_head", None),
    ("gru_hidden_dim", None),
    ("shift_label", None),
    ("sample_from_anchor", None),
];

/// Settings that only the second version has, and what changes nothing.
const OF_SECOND: [(&str, Option<f64>); 6] = [
    (dflash2::KEYS[0], None),
    (dflash2::KEYS[1], None),
    (dflash2::KEYS[2], None),
    (dflash2::KEYS[3], None),
    ("output_multiplier", Some(1.0)),
    ("final_logit_softcapping", None),
];

/// What a draft has to know of its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftTarget {
    /// Token ids.
    pub vocab: usize,
    /// Columns of the residual.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
}

/// Attention of a draft's layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftAttention {
    /// Positions that a row sees on a side, itself included; `None`: all.
    pub window: Option<usize>,
    /// Whether a row sees the rows of the block behind it.
    pub bidirectional: bool,
}

/// A draft, all sizes checked against its target's.
#[derive(Clone, Debug, PartialEq)]
pub struct Dflash {
    /// Columns of the residual, also of the target's.
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
    /// Columns of a value's head.
    pub v_dim: usize,
    /// Whether q, k, v and o have biases.
    pub attention_bias: bool,
    /// Whether each head of each layer has a sink.
    pub sinks: bool,
    /// Factor on values, but for 1.
    pub value_scale: Option<f32>,
    /// The rotary embedding.
    pub rope: RopeSpec,
    /// That of the context's keys, where it is another.
    pub context_rope: Option<RopeSpec>,
    /// Attention of each layer.
    pub layers: Vec<DraftAttention>,
    /// Rows of a block that the draft was trained with.
    pub block: usize,
    /// Token that stands for one to be guessed.
    pub mask_token: u32,
    /// Layers of the target, in the order in which `fc` takes their residual streams.
    pub taps: Vec<usize>,
    /// Token ids.
    pub vocab: usize,
    /// What the second version has beyond that.
    pub second: Option<Dflash2>,
}

/// The taps of a draft of `draft_layers` layers whose config names none: evenly from the second layer to
/// the third last of `target_layers`.
pub fn default_taps(target_layers: usize, draft_layers: usize) -> Vec<usize> {
    if draft_layers == 1 {
        return vec![target_layers / 2];
    }
    let span = target_layers as f64 - 4.0;
    // Halves go to the even neighbour, as the trainer's `round` does it.
    let tap = |i: usize| (1.0 + i as f64 * span / (draft_layers as f64 - 1.0)).round_ties_even();
    (0..draft_layers).map(|i| tap(i).max(0.0) as usize).collect()
}

impl Dflash {
    /// Reads the config of a draft for a model like `target`.
    ///
    /// # Errors
    /// When the config is not one of a DFlash draft, a value cannot be, or the draft
    /// was made for another target.
    pub fn parse(config: &Value, target: DraftTarget) -> Result<Dflash, FrontendError> {
        let config = Config::new(config)?;
        let own = config.section("dflash_config")?;
        // Keys of the section, else of the whole config.
        let place = |key: &str| own.filter(|own| own.has(key)).unwrap_or(config);
        let names = config.strings("architectures")?.unwrap_or_default();
        let second = match &names[..] {
            [] => dflash2::KEYS.iter().any(|key| place(key).has(key)),
            names if names.contains(&dflash2::ARCHITECTURE) => true,
            names if names.contains(&ARCHITECTURE) => false,
            names => {
                let what = format!(
                    "{} is no DFlash draft ({ARCHITECTURE} or {})",
                    names.join(", "),
                    dflash2::ARCHITECTURE
                );
                return Err(config.error("architectures", what));
            }
        };
        for (key, harmless) in OF_SECOND.iter().filter(|_| !second) {
            if place(key).changes(key, *harmless) {
                let what = format!("is of {}, but architectures names {ARCHITECTURE}", dflash2::ARCHITECTURE);
                return Err(place(key).error(key, what));
            }
        }
        for (key, harmless) in UNSUPPORTED {
            if place(key).changes(key, *harmless) {
                return Err(place(key).error(key, "is of a kind of draft that is not supported yet"));
            }
        }
        match config.string("hidden_act")?.unwrap_or("silu") {
            "silu" | "swish" => {}
            other => return Err(config.error("hidden_act", format!("{other:?} is not supported: use silu"))),
        }
        for (key, of_target) in [("hidden_size", target.hidden), ("target_hidden_size", target.hidden)] {
            match config.size(key)? {
                Some(size) if size != of_target => {
                    let what =
                        format!("{size} is not the target's {of_target}: the draft is for another model");
                    return Err(config.error(key, what));
                }
                None if key == "hidden_size" => return Err(config.error(key, "is missing")),
                _ => {}
            }
        }
        match config.size("vocab_size")? {
            Some(vocab) if vocab != target.vocab => {
                let what =
                    format!("{vocab} is not the target's {}: the draft is for another model", target.vocab);
                return Err(config.error("vocab_size", what));
            }
            _ => {}
        }
        if config.has("draft_vocab_size") {
            return Err(
                config.error("draft_vocab_size", "a vocabulary of the draft's own is not supported yet")
            );
        }
        let required = |key: &str| config.size(key)?.ok_or_else(|| config.error(key, "is missing"));
        let heads = required("num_attention_heads")?;
        let kv_heads = config.size("num_key_value_heads")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let what = format!("{kv_heads} does not divide num_attention_heads {heads}");
            return Err(config.error("num_key_value_heads", what));
        }
        let head_dim = match config.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if target.hidden.is_multiple_of(heads) => target.hidden / heads,
            None => return Err(config.error("head_dim", "is missing")),
        };
        if !head_dim.is_multiple_of(2) {
            return Err(config.error("head_dim", format!("{head_dim} is odd: it cannot be rotated in pairs")));
        }
        let count = config.layers_or("num_hidden_layers", 0)?;
        if count == 0 {
            return Err(config.error("num_hidden_layers", "is missing"));
        }
        match place("num_target_layers").size("num_target_layers")? {
            Some(layers) if layers != target.layers => {
                let what =
                    format!("{layers} is not the target's {}: the draft is for another model", target.layers);
                return Err(config.error("num_target_layers", what));
            }
            _ => {}
        }
        let taps = match place("target_layer_ids").counts("target_layer_ids")? {
            Some(taps) => taps,
            None => default_taps(target.layers, count),
        };
        if taps.is_empty() || taps.len() > MAX_TAPS {
            let what = format!("names {} layers, not 1 to {MAX_TAPS}", taps.len());
            return Err(place("target_layer_ids").error("target_layer_ids", what));
        }
        if let Some(tap) = taps.iter().find(|tap| **tap >= target.layers) {
            let what = format!("{tap} is beyond the target's {} layers, numbered from 0", target.layers);
            return Err(place("target_layer_ids").error("target_layer_ids", what));
        }
        let block = place("block_size").size("block_size")?;
        let block = block.ok_or_else(|| config.error("block_size", "is missing"))?;
        if !(2..=MAX_BLOCK).contains(&block) {
            let what = format!("{block} is not from 2 to {MAX_BLOCK}: a block is a known token and guesses");
            return Err(place("block_size").error("block_size", what));
        }
        let masks = place("mask_token_id").token_ids("mask_token_id", target.vocab)?;
        let [mask_token] = masks[..] else {
            return Err(place("mask_token_id").error("mask_token_id", "must be one token id"));
        };
        let positions = config.positions("max_position_embeddings")?.unwrap_or(32768);
        Ok(Dflash {
            hidden: target.hidden,
            intermediate: required("intermediate_size")?,
            heads,
            kv_heads,
            head_dim,
            eps: config.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            v_dim: config.size("v_head_dim")?.unwrap_or(head_dim),
            attention_bias: config.bool_or("attention_bias", false)?,
            sinks: place("attention_sink_bias").bool_or("attention_sink_bias", false)?,
            value_scale: place("attention_value_scale")
                .number("attention_value_scale")?
                .map(|scale| scale as f32)
                .filter(|scale| *scale != 1.0),
            rope: rope::parse_partial(&config, super::decoder::FULL, head_dim, positions)?.spec,
            context_rope: None,
            layers: attention(&config, own, count)?,
            block,
            mask_token,
            taps,
            vocab: target.vocab,
            second: second.then(|| Dflash2::parse(&place, target.hidden, target.vocab)).transpose()?,
        })
    }

    /// Names (without the prefix that they have beside a target's) and shapes of all tensors.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, q, k) = (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (v, mixed) = (self.kv_heads * self.v_dim, self.heads * self.v_dim);
        let mut tensors = vec![
            ("fc.weight".to_string(), vec![hidden, self.taps.len() * hidden]),
            ("hidden_norm.weight".to_string(), vec![hidden]),
        ];
        for layer in 0..self.layers.len() {
            let mut add = |name: &str, shape: Vec<usize>| {
                tensors.push((format!("layers.{layer}.{name}"), shape));
            };
            add("input_layernorm.weight", vec![hidden]);
            add("self_attn.q_norm.weight", vec![self.head_dim]);
            add("self_attn.k_norm.weight", vec![self.head_dim]);
            add("post_attention_layernorm.weight", vec![hidden]);
            for (name, out, input) in [
                ("q_proj", q, hidden),
                ("k_proj", k, hidden),
                ("v_proj", v, hidden),
                ("o_proj", hidden, mixed),
            ] {
                add(&format!("self_attn.{name}.weight"), vec![out, input]);
                if self.attention_bias {
                    add(&format!("self_attn.{name}.bias"), vec![out]);
                }
            }
            if self.sinks {
                add("self_attn.attention_sink_bias", vec![self.heads]);
            }
            add("mlp.gate_proj.weight", vec![self.intermediate, hidden]);
            add("mlp.up_proj.weight", vec![self.intermediate, hidden]);
            add("mlp.down_proj.weight", vec![hidden, self.intermediate]);
        }
        tensors.push(("norm.weight".to_string(), vec![hidden]));
        if let Some(second) = &self.second {
            tensors.extend(second.tensors(hidden, self.layers.len(), self.vocab));
        }
        tensors
    }

    /// Makes a target keep what the draft reads: the residual streams behind the tapped layers.
    ///
    /// # Errors
    /// When a layer has no residual stream of the draft's width.
    pub fn tap(&self, target: &mut Graph) -> Result<(), FrontendError> {
        let mut streams = Vec::with_capacity(self.taps.len());
        for tap in &self.taps {
            // What leaves the layer; the operators of a layer that leave nothing are its own.
            let leaves = |id: &NodeId| {
                target.node(*id).layer == Some(*tap)
                    && target.users(*id).iter().any(|(user, _)| target.node(*user).layer != Some(*tap))
            };
            match target.ids().into_iter().filter(leaves).collect::<Vec<_>>()[..] {
                [stream] if target.node(stream).ty.cols == self.hidden => streams.push(stream),
                ref found => {
                    let what = format!("{} values leave layer {tap}, not one residual stream", found.len());
                    return Err(target.error("taps", what).into());
                }
            }
        }
        target.add("taps", None, Op::Taps, &streams)?;
        Ok(())
    }

    /// The graph that turns taps of committed rows into the draft's context: it has no result but keys
    /// and values.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape than the config implies, or has no place in a draft.
    pub fn inject(&self, tensors: &BTreeMap<String, TensorInfo>) -> Result<Graph, FrontendError> {
        self.check(tensors)?;
        let mut builder = Builder::new(self, tensors, "dflash inject");
        let rope = self.context_rope.as_ref().unwrap_or(&self.rope);
        builder.graph.ropes.insert(ROPE.into(), rope.clone());
        let taps = builder.graph.add("taps", None, Op::Input { cols: self.taps.len() * self.hidden }, &[])?;
        let fc = builder.linear(None, "fc", "fc", false, taps)?;
        let feature = builder.norm(None, "feature", "hidden_norm.weight", fc)?;
        for layer in 0..self.layers.len() {
            builder.keys_and_values(layer, feature)?;
        }
        Ok(builder.graph)
    }

    /// The graph of a block's rows; its embedding and head are those of the graph `target`.
    ///
    /// # Errors
    /// As [`Dflash::inject`]; also when the target has no plain embedding and head.
    pub fn block(
        &self,
        tensors: &BTreeMap<String, TensorInfo>,
        target: &Graph,
    ) -> Result<Graph, FrontendError> {
        self.check(tensors)?;
        let shared = Shared::of(target)?;
        let mut builder = Builder::new(self, tensors, "dflash block");
        builder.graph.ropes.insert(ROPE.into(), self.rope.clone());
        for name in [&shared.embedding, &shared.head] {
            builder.graph.declare_weight(name, target.weights[name].clone())?;
        }
        let mut x = builder.graph.add("embed", None, Op::Embed { weight: shared.embedding }, &[])?;
        if tensors.contains_key(MASK_EMBEDDING) {
            let weight = builder.weight(MASK_EMBEDDING)?;
            x = builder.add(None, "masked", Op::Replace { weight, token: self.mask_token }, &[x])?;
        }
        for layer in 0..self.layers.len() {
            x = builder.layer(layer, x)?;
        }
        let rows = builder.graph.add("select", None, Op::SelectRows, &[x])?;
        let normed = builder.norm(None, "norm", "norm.weight", rows)?;
        let head = builder.graph.add("head", None, Op::Linear { weight: shared.head }, &[normed])?;
        let logits = builder.graph.add("logits", None, Op::Logits, &[head])?;
        builder.selector(logits, normed)?;
        Ok(builder.graph)
    }

    /// Checks the checkpoint's tensors against the config's.
    fn check(&self, tensors: &BTreeMap<String, TensorInfo>) -> Result<(), FrontendError> {
        let mut expected = self.tensors();
        if tensors.contains_key(MASK_EMBEDDING) {
            expected.push(mask_embedding(self.hidden));
        }
        let mut missing = expected.iter().filter(|(name, _)| !tensors.contains_key(name));
        if let Some((name, shape)) = missing.next() {
            let (name, expected, others) = (shown(name), shape.clone(), missing.count());
            return Err(FrontendError::MissingTensor { name, expected, others });
        }
        for (name, shape) in &expected {
            let found = &tensors[name];
            if found.shape != *shape {
                let (name, expected, found) = (shown(name), shape.clone(), found.shape.clone());
                return Err(FrontendError::TensorShape { name, expected, found });
            }
            if shape.len() != 2 && found.format.scale.is_some() {
                let (name, found) = (shown(name), found.format.to_string());
                return Err(FrontendError::TensorFormat { name, found });
            }
        }
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        // Some drafts carry copies of what they share with the target, or rotary frequencies.
        let has_place = |name: &str| {
            known.contains(name)
                || ["embed_tokens.weight", "lm_head.weight"].contains(&name)
                || name.ends_with("rotary_emb.inv_freq")
        };
        let mut unexpected = tensors.iter().filter(|(name, _)| !has_place(name));
        if let Some((name, info)) = unexpected.next() {
            let (name, found, family) = (shown(name), info.shape.clone(), "dflash");
            return Err(FrontendError::UnexpectedTensor { name, found, family, others: unexpected.count() });
        }
        Ok(())
    }
}

/// The embedding of a mask that the target's table has not: MiMo's row of it is nearly zero.
pub const MASK_EMBEDDING: &str = "mask_embedding";

fn mask_embedding(hidden: usize) -> (String, Vec<usize>) {
    (MASK_EMBEDDING.to_string(), vec![hidden])
}

/// A draft's tensor in errors.
fn shown(name: &str) -> String {
    format!("{name} (of the draft)")
}

/// Attention of every layer, by the first of the keys that says it.
fn attention(
    config: &Config,
    own: Option<Config>,
    count: usize,
) -> Result<Vec<DraftAttention>, FrontendError> {
    use super::decoder::{FULL, SLIDING};
    let of_own = |key: &str| own.map_or(Ok(false), |own| own.bool_or(key, false));
    let window = match own.map_or(Ok(None), |own| own.positions("swa_window_size"))? {
        Some(window) => Some(window),
        None => config.positions("sliding_window")?,
    };
    let causal = match (config.has("is_causal"), own.filter(|own| own.has("causal"))) {
        (true, _) => Some(config.bool_or("is_causal", false)?),
        (false, Some(own)) => Some(own.bool_or("causal", false)?),
        (false, None) => None,
    };
    let full = DraftAttention { window: None, bidirectional: !causal.unwrap_or(false) };
    let Some(types) = config.strings("layer_types")? else {
        if of_own("use_swa")? {
            let Some(window) = window else {
                return Err(config.error("dflash_config.use_swa", "is set, but no window is given"));
            };
            let sliding = DraftAttention { window: Some(window), bidirectional: !causal.unwrap_or(false) };
            return Ok(vec![sliding; count]);
        }
        if config.bool_or("use_sliding_window", false)? {
            return Err(config.error("use_sliding_window", "is set: a draft then needs layer_types"));
        }
        return Ok(vec![full; count]);
    };
    if types.len() != count {
        let what = format!("has {} entries for {count} layers", types.len());
        return Err(config.error("layer_types", what));
    }
    let of = |layer_type: &str| match (layer_type, window) {
        (FULL, _) => Ok(full),
        (SLIDING, Some(window)) => {
            Ok(DraftAttention { window: Some(window), bidirectional: !causal.unwrap_or(true) })
        }
        (SLIDING, None) => Err(config.error("layer_types", "has sliding_attention, but no window is given")),
        (other, _) => {
            let what = format!("{other:?} is not supported: known are {FULL} and {SLIDING}");
            Err(config.error("layer_types", what))
        }
    };
    types.into_iter().map(of).collect()
}

/// What a draft shares with its target.
struct Shared {
    embedding: String,
    head: String,
}

impl Shared {
    fn of(target: &Graph) -> Result<Shared, FrontendError> {
        let mut embeddings = Vec::new();
        let mut heads = Vec::new();
        for id in target.ids() {
            match &target.node(id).op {
                Op::Embed { weight } => embeddings.push(weight.clone()),
                Op::Logits => {
                    for operand in target.operands(id) {
                        if let Op::Linear { weight } = &target.node(operand).op {
                            heads.push(weight.clone());
                        }
                    }
                }
                _ => {}
            }
        }
        match (&embeddings[..], &heads[..]) {
            ([embedding], [head]) => Ok(Shared { embedding: embedding.clone(), head: head.clone() }),
            _ => {
                let what = "has no plain embedding and head that a draft could share".into();
                Err(target.error("logits", what).into())
            }
        }
    }
}

/// Adds a draft's operators to a graph.
pub(super) struct Builder<'d> {
    pub(super) draft: &'d Dflash,
    graph: Graph,
    tensors: &'d BTreeMap<String, TensorInfo>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl<'d> Builder<'d> {
    fn new(draft: &'d Dflash, tensors: &'d BTreeMap<String, TensorInfo>, name: &str) -> Builder<'d> {
        let mut graph = Graph::new(name);
        let mut shapes: BTreeMap<String, Vec<usize>> = draft.tensors().into_iter().collect();
        shapes.extend([mask_embedding(draft.hidden)]);
        let cache = Cache {
            kv_heads: draft.kv_heads,
            qk_dim: draft.head_dim,
            v_dim: draft.v_dim,
            kv_type: KvType::F32,
        };
        graph.caches = vec![cache; draft.layers.len()];
        Builder { draft, graph, tensors, shapes }
    }

    /// Declares a tensor of the draft, by its name in the draft's checkpoint; returns its name in the graph.
    pub(super) fn weight(&mut self, name: &str) -> Result<String, FrontendError> {
        let stored = self.tensors[name].format;
        let weight = Weight::whole(self.shapes[name].clone(), stored);
        let name = format!("{DRAFT_PREFIX}{name}");
        self.graph.declare_weight(&name, weight)?;
        Ok(name)
    }

    pub(super) fn add(
        &mut self,
        layer: Option<usize>,
        name: &str,
        op: Op,
        operands: &[NodeId],
    ) -> Result<NodeId, FrontendError> {
        let name = layer.map_or_else(|| name.to_string(), |layer| format!("l{layer}.{name}"));
        Ok(self.graph.add(name, layer, op, operands)?)
    }

    fn norm(
        &mut self,
        layer: Option<usize>,
        name: &str,
        weight: &str,
        x: NodeId,
    ) -> Result<NodeId, FrontendError> {
        let weight = self.weight(weight)?;
        self.add(layer, name, Op::RmsNorm { weight, eps: self.draft.eps }, &[x])
    }

    pub(super) fn linear(
        &mut self,
        layer: Option<usize>,
        name: &str,
        module: &str,
        bias: bool,
        x: NodeId,
    ) -> Result<NodeId, FrontendError> {
        let weight = self.weight(&format!("{module}.weight"))?;
        let y = self.add(layer, name, Op::Linear { weight }, &[x])?;
        if !bias {
            return Ok(y);
        }
        let weight = self.weight(&format!("{module}.bias"))?;
        self.add(layer, &format!("{name}_bias"), Op::Bias { weight }, &[y])
    }

    /// Queries or keys of a layer: projected, normed per head, rotated.
    fn rotated(&mut self, layer: usize, name: &str, x: NodeId) -> Result<NodeId, FrontendError> {
        let module = format!("layers.{layer}.self_attn");
        let bias = self.draft.attention_bias;
        let y = self.linear(Some(layer), name, &format!("{module}.{name}_proj"), bias, x)?;
        let normed =
            self.norm(Some(layer), &format!("{name}_norm"), &format!("{module}.{name}_norm.weight"), y)?;
        let op = Op::Rope { rope: ROPE.into(), head_dim: self.draft.head_dim };
        self.add(Some(layer), &format!("{name}_rope"), op, &[normed])
    }

    /// Keys and values of a layer, of the context's features or of normed rows of the block.
    fn keys_and_values(&mut self, layer: usize, x: NodeId) -> Result<NodeId, FrontendError> {
        let k = self.rotated(layer, "k", x)?;
        let module = format!("layers.{layer}.self_attn.v_proj");
        let mut v = self.linear(Some(layer), "v", &module, self.draft.attention_bias, x)?;
        if let Some(factor) = self.draft.value_scale {
            v = self.add(Some(layer), "v_scaled", Op::Scale { factor }, &[v])?;
        }
        self.add(Some(layer), "kv", Op::KvWrite { cache: layer }, &[k, v])
    }

    fn layer(&mut self, layer: usize, x: NodeId) -> Result<NodeId, FrontendError> {
        let (draft, own) = (self.draft, Some(layer));
        let module = format!("layers.{layer}");
        let normed = self.norm(own, "attn_norm", &format!("{module}.input_layernorm.weight"), x)?;
        let (normed, around) = self.convolve(layer, 0, normed)?;
        let q = self.rotated(layer, "q", normed)?;
        let kv = self.keys_and_values(layer, normed)?;
        let DraftAttention { window, bidirectional } = draft.layers[layer];
        let sinks = match draft.sinks {
            true => Some(self.weight(&format!("{module}.self_attn.attention_sink_bias"))?),
            false => None,
        };
        let attention = Op::Attention {
            cache: layer,
            heads: draft.heads,
            scale: (1.0 / (draft.head_dim as f64).sqrt()) as f32,
            window,
            sinks,
            bidirectional,
        };
        let mixed = self.add(own, "attn", attention, &[q, kv])?;
        let o = self.linear(own, "o", &format!("{module}.self_attn.o_proj"), draft.attention_bias, mixed)?;
        let o = self.convolved(around, o)?;
        let x = self.add(own, "attn_res", Op::Add, &[x, o])?;
        let normed = self.norm(own, "ffn_norm", &format!("{module}.post_attention_layernorm.weight"), x)?;
        let (normed, around) = self.convolve(layer, 1, normed)?;
        let gate = self.linear(own, "gate", &format!("{module}.mlp.gate_proj"), false, normed)?;
        let up = self.linear(own, "up", &format!("{module}.mlp.up_proj"), false, normed)?;
        let act = self.add(own, "act", Op::Gated { activation: ActivationFn::Silu }, &[gate, up])?;
        let down = self.linear(own, "down", &format!("{module}.mlp.down_proj"), false, act)?;
        let down = self.convolved(around, down)?;
        self.add(own, "ffn_res", Op::Add, &[x, down])
    }
}

/// Name of the draft's rope.
const ROPE: &str = "rope";

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tilec_ir::format::Format;
    use tilec_ir::graph::verify;

    const TARGET: DraftTarget = DraftTarget { vocab: 100, hidden: 32, layers: 6 };

    fn config(patch: Value) -> Value {
        let mut config = json!({
            "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "vocab_size": 100,
            "rope_theta": 1e6, "block_size": 8,
            "dflash_config": {"mask_token_id": 99, "target_layer_ids": [1, 3, 4]},
        });
        for (key, value) in patch.as_object().unwrap() {
            match (&mut config[key], value) {
                (Value::Object(old), Value::Object(new)) => old.extend(new.clone()),
                (old, new) => *old = new.clone(),
            }
        }
        config
    }

    fn parsed(patch: Value) -> Dflash {
        Dflash::parse(&config(patch), TARGET).unwrap()
    }

    fn refused(patch: Value) -> String {
        Dflash::parse(&config(patch.clone()), TARGET).expect_err(&patch.to_string()).to_string()
    }

    fn tensors(draft: &Dflash) -> BTreeMap<String, TensorInfo> {
        let info = |shape: Vec<usize>| TensorInfo { shape, format: Format::BF16 };
        draft.tensors().into_iter().map(|(name, shape)| (name, info(shape))).collect()
    }

    #[test]
    fn default_taps_are_those_of_the_trainer() {
        assert_eq!(default_taps(36, 5), [1, 9, 17, 25, 33]);
        assert_eq!(default_taps(64, 5), [1, 16, 31, 46, 61]);
        assert_eq!(default_taps(24, 5), [1, 6, 11, 16, 21]);
        // Halves go to the even neighbour.
        assert_eq!(default_taps(30, 5), [1, 8, 14, 20, 27]);
        assert_eq!(default_taps(30, 1), [15]);
    }

    #[test]
    fn keys_are_found_at_both_levels() {
        let nested =
            parsed(json!({"block_size": null, "dflash_config": {"block_size": 4, "num_target_layers": 6}}));
        assert_eq!((nested.block, nested.mask_token, &nested.taps[..]), (4, 99, &[1, 3, 4][..]));
        let flat = parsed(json!({"dflash_config": null, "mask_token_id": 7, "num_target_layers": 6}));
        assert_eq!((flat.block, flat.mask_token, &flat.taps[..]), (8, 7, &[1, 3][..]));
    }

    #[test]
    fn attention_by_the_first_key_that_says_it() {
        let kinds = |patch| -> Vec<(Option<usize>, bool)> {
            parsed(patch).layers.iter().map(|layer| (layer.window, layer.bidirectional)).collect()
        };
        let types = json!(["sliding_attention", "full_attention"]);
        assert_eq!(kinds(json!({})), [(None, true), (None, true)]);
        let mixed = json!({"layer_types": types, "sliding_window": 9});
        assert_eq!(kinds(mixed), [(Some(9), false), (None, true)]);
        let both = json!({"layer_types": types, "sliding_window": 9, "is_causal": false});
        assert_eq!(kinds(both), [(Some(9), true), (None, true)]);
        let causal = json!({"layer_types": types, "sliding_window": 9, "is_causal": true, "dflash_config": {"causal": false}});
        assert_eq!(kinds(causal), [(Some(9), false), (None, false)]);
        let own = json!({"layer_types": types, "sliding_window": 9, "dflash_config": {"causal": false, "swa_window_size": 5}});
        assert_eq!(kinds(own), [(Some(5), true), (None, true)]);
        let swa = json!({"sliding_window": 9, "dflash_config": {"use_swa": true}});
        assert_eq!(kinds(swa), [(Some(9), true), (Some(9), true)]);
    }

    #[test]
    fn mimos_variant() {
        let draft = parsed(json!({
            "partial_rotary_factor": 0.5, "v_head_dim": 8, "num_target_layers": 6,
            "dflash_config": {"attention_sink_bias": true, "attention_value_scale": 0.612},
        }));
        assert_eq!((draft.rope.dims, draft.v_dim, draft.sinks), (8, 8, true));
        assert_eq!(draft.value_scale, Some(0.612));
        let mut tensors = tensors(&draft);
        assert_eq!(tensors["layers.1.self_attn.attention_sink_bias"].shape, [4]);
        assert_eq!(tensors["layers.1.self_attn.o_proj.weight"].shape, [32, 32]);
        let vector = TensorInfo { shape: vec![32], format: Format::BF16 };
        tensors.insert(MASK_EMBEDDING.into(), vector);
        verify(&draft.inject(&tensors).unwrap()).unwrap();
        tensors.insert(MASK_EMBEDDING.into(), TensorInfo { shape: vec![31], format: Format::BF16 });
        let error = draft.inject(&tensors).unwrap_err().to_string();
        assert!(error.contains("mask_embedding") && error.contains("[31]"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let cases = [
            (json!({"hidden_size": 64}), ["hidden_size", "the target's 32"]),
            (json!({"target_hidden_size": 64}), ["target_hidden_size", "another model"]),
            (json!({"vocab_size": 101}), ["vocab_size", "the target's 100"]),
            (json!({"num_target_layers": 7}), ["num_target_layers", "the target's 6"]),
            (json!({"dflash_config": {"target_layer_ids": [1, 6]}}), ["target_layer_ids", "6 is beyond"]),
            (json!({"dflash_config": {"target_layer_ids": []}}), ["target_layer_ids", "names 0 layers"]),
            (json!({"dflash_config": {"target_layer_ids": [1, -2]}}), ["target_layer_ids", "whole numbers"]),
            (json!({"dflash_config": {"mask_token_id": 100}}), ["mask_token_id", "not below vocab_size"]),
            (json!({"dflash_config": {"mask_token_id": null}}), ["mask_token_id", "one token id"]),
            (json!({"dflash_config": {"mask_token_id": [1, 2]}}), ["mask_token_id", "one token id"]),
            (json!({"block_size": 1}), ["block_size", "from 2"]),
            (json!({"block_size": 65}), ["block_size", "from 2 to 64"]),
            (json!({"block_size": null}), ["block_size", "missing"]),
            (json!({"num_attention_heads": null}), ["num_attention_heads", "missing"]),
            (json!({"num_key_value_heads": 3}), ["num_key_value_heads", "does not divide"]),
            (json!({"head_dim": 15}), ["head_dim", "odd"]),
            (json!({"num_hidden_layers": null}), ["num_hidden_layers", "missing"]),
            (json!({"hidden_act": "gelu"}), ["hidden_act", "silu"]),
            (json!({"layer_types": ["full_attention"]}), ["layer_types", "1 entries for 2"]),
            (json!({"layer_types": ["sliding_attention", "full_attention"]}), ["layer_types", "no window"]),
            (json!({"dflash_config": {"use_swa": true}}), ["use_swa", "no window"]),
            (json!({"architectures": ["DSparkDraftModel"]}), ["architectures", "no DFlash draft"]),
            (json!({"dflash_config": {"markov_rank": 256}}), ["markov_rank", "not supported yet"]),
            (
                json!({"dflash_config": {"selector_rank": 256}}),
                ["selector_rank", "architectures names DFlashDraft"],
            ),
            (json!({"dflash_config": {"output_multiplier": 0.5}}), ["output_multiplier", "is of DFlash2"]),
            (json!({"draft_vocab_size": 50}), ["draft_vocab_size", "not supported yet"]),
            (json!({"partial_rotary_factor": 0.1}), ["partial_rotary_factor", "no whole pairs"]),
        ];
        for (patch, parts) in cases {
            let error = refused(patch.clone());
            for part in parts {
                assert!(error.contains(part), "{patch}: {part:?} is not in {error}");
            }
        }
    }

    #[test]
    fn tensors_are_checked_and_named_as_the_drafts() {
        let draft = parsed(json!({}));
        let whole = tensors(&draft);
        assert_eq!(whole.len(), 11 * 2 + 3);
        let error = |change: &dyn Fn(&mut BTreeMap<String, TensorInfo>)| {
            let mut tensors = whole.clone();
            change(&mut tensors);
            draft.inject(&tensors).unwrap_err().to_string()
        };
        let missing = error(&|tensors| drop(tensors.remove("layers.1.mlp.up_proj.weight")));
        assert!(missing.contains("layers.1.mlp.up_proj.weight (of the draft)"), "{missing}");
        let shape = error(&|tensors| tensors.get_mut("fc.weight").unwrap().shape = vec![32, 64]);
        assert!(shape.contains("fc.weight") && shape.contains("[32, 96]"), "{shape}");
        let format = error(&|tensors| tensors.get_mut("norm.weight").unwrap().format = Format::Q8_0);
        assert!(format.contains("norm.weight") && format.contains("q8_0"), "{format}");
        let other = TensorInfo { shape: vec![2, 2, 32], format: Format::BF16 };
        let unknown =
            error(&|tensors| drop(tensors.insert("layers.0.mlp_conv.base_kernel".into(), other.clone())));
        assert!(unknown.contains("mlp_conv.base_kernel") && unknown.contains("no place"), "{unknown}");
    }
}
