//! Precision: the format that each weight is read in, the type of the KV cache, and which linear
//! layers read quantized activations.
//!
//! Matrices get the format that the spec gives their role, norms and biases are always f32. A
//! linear layer with int8 activations reads its input through an [`Op::Quantize`]; siblings (q, k and
//! v, say) share one.

use std::collections::{BTreeMap, BTreeSet};
use tilec_ir::format::{ACT_BLOCK, Format};
use tilec_ir::graph::{Elem, Graph, GraphError, NodeId, Op};
use tilec_ir::spec::{Activations, Precision, WeightFormat};

/// What the pass did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Matrices that are read in another format than they are stored in: name, from, to.
    pub converted: Vec<(String, Format, Format)>,
    /// Linear layers with int8 activations.
    pub int8_linears: usize,
    /// Linear layers with f32 activations.
    pub f32_linears: usize,
    /// Values that are quantized for them.
    pub quantized_values: usize,
}

/// Why the precision asked for does not fit the model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrecisionError {
    /// A key names weights that the model does not have.
    #[error("precision.{key} is set, but the model has no {key}: remove it")]
    NoSuchWeights {
        /// Key in the `precision` section.
        key: &'static str,
    },
    /// One matrix with two roles cannot be in two formats.
    #[error("precision.{} is {} and precision.{} is {}, but they are one matrix, {weight}: make them equal, or remove one", one.0, one.1, other.0, other.1)]
    Tied {
        /// Name of the matrix.
        weight: String,
        /// A role and its format.
        one: (&'static str, WeightFormat),
        /// The other role and its format.
        other: (&'static str, WeightFormat),
    },
    /// int8 activations need integer codes.
    #[error(
        "precision.activations is int8, but {weight} is {format}, which has no integer codes in blocks of 16 or 32: convert it (`{key}: q8_0`), or use `activations: auto`"
    )]
    NoIntegerCodes {
        /// Name of the matrix.
        weight: String,
        /// Its format.
        format: Format,
        /// Key in the `precision` section that sets it.
        key: &'static str,
    },
    /// Blocks of activations would reach from one expert's columns into the next one's.
    #[error(
        "precision.activations is int8, but {weight} reads {cols} columns an expert, which are no whole blocks of \
         {ACT_BLOCK}: use `activations: auto`"
    )]
    PartialBlocks {
        /// Name of the matrix.
        weight: String,
        /// Columns that it reads.
        cols: usize,
    },
    /// The graph is broken.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// What a matrix is for: the key of the `precision` section that sets its format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Embedding,
    Attention,
    Experts,
    /// Always read as stored and with f32 activations: what it rounds decides who works, or which
    /// candidate of a draft is guessed.
    Router,
    Head,
    /// Whatever no other key names.
    Other,
}

impl Role {
    const fn key(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Attention => "attention",
            Role::Experts => "experts",
            Role::Head => "head",
            Role::Router | Role::Other => "weights",
        }
    }

    /// What the spec says of this role, if it has a key of its own that is set.
    fn chosen(self, spec: &Precision) -> Option<WeightFormat> {
        match self {
            Role::Embedding => spec.embedding,
            Role::Attention => spec.attention,
            Role::Experts => spec.experts,
            Role::Head => spec.head,
            Role::Router => Some(WeightFormat::AsStored),
            Role::Other => None,
        }
    }
}

/// Sets formats and the type of the caches, and quantizes the inputs of linear layers.
///
/// # Errors
/// When the spec names weights that the graph does not have, wants one matrix in two formats, or int8
/// activations for weights that have no integer codes.
pub fn precision(graph: &mut Graph, spec: &Precision) -> Result<Report, PrecisionError> {
    let roles = roles(graph);
    let mut report = Report::default();
    let present = |role: Role| roles.values().any(|roles| roles.contains(&role));
    let absent = [Role::Embedding, Role::Attention, Role::Experts, Role::Head]
        .into_iter()
        .find(|role| role.chosen(spec).is_some() && !present(*role))
        .map(Role::key);
    if let Some(key) = absent {
        return Err(PrecisionError::NoSuchWeights { key });
    }
    for (name, weight) in &mut graph.weights {
        weight.format = match roles.get(name) {
            Some(roles) => choose(name, roles, spec)?.applied_to(weight.stored),
            None => Format::F32,
        };
        if weight.format != weight.stored && roles.contains_key(name) {
            report.converted.push((name.clone(), weight.stored, weight.format));
        }
    }
    for cache in &mut graph.caches {
        cache.kv_type = spec.kv_type();
    }
    quantize(graph, spec, &roles, &mut report)?;
    Ok(report)
}

/// The roles of each matrix; a tied one has two.
fn roles(graph: &Graph) -> BTreeMap<String, BTreeSet<Role>> {
    let mut roles: BTreeMap<String, BTreeSet<Role>> = BTreeMap::new();
    for id in graph.ids() {
        let role = match &graph.node(id).op {
            Op::Embed { .. } => Role::Embedding,
            Op::Linear { .. } => linear_role(graph, id),
            Op::ExpertLinear { .. } => Role::Experts,
            Op::PairScores { .. } => Role::Router,
            _ => continue,
        };
        for weight in graph.node(id).op.weights() {
            roles.entry(weight.to_string()).or_default().insert(role);
        }
    }
    roles
}

/// Attention's are the linear layers that make its operands or take its result, a router is one that
/// makes scores for routes or projections for pairs, the head is the one that makes the logits.
fn linear_role(graph: &Graph, linear: NodeId) -> Role {
    let takes_attention = |id: &NodeId| matches!(graph.node(*id).op, Op::Attention { .. });
    if graph.operands(linear).iter().any(takes_attention) {
        return Role::Attention;
    }
    let mut values = vec![linear];
    while let Some(value) = values.pop() {
        for (user, _) in graph.users(value) {
            match graph.node(user).op {
                Op::KvWrite { .. } | Op::Attention { .. } => return Role::Attention,
                Op::Logits => return Role::Head,
                Op::Route(_) | Op::PairScores { .. } => return Role::Router,
                Op::Scale { .. } | Op::Bias { .. } | Op::RmsNorm { .. } | Op::Rope { .. } => {
                    values.push(user)
                }
                _ => {}
            }
        }
    }
    Role::Other
}

/// The one choice that all roles of a matrix agree on.
fn choose(weight: &str, roles: &BTreeSet<Role>, spec: &Precision) -> Result<WeightFormat, PrecisionError> {
    let mut chosen = roles.iter().filter_map(|role| Some((role.key(), role.chosen(spec)?)));
    let Some(one) = chosen.next() else { return Ok(spec.weights) };
    match chosen.find(|other| other.1 != one.1) {
        Some(other) => Err(PrecisionError::Tied { weight: weight.to_string(), one, other }),
        None => Ok(one.1),
    }
}

/// Whether there is an integer dot product with activations in blocks of 32.
fn takes_int8(format: Format) -> bool {
    format.integer_codes() && format.scale.is_some() && matches!(format.block, 16 | 32)
}

/// Puts an [`Op::Quantize`] between linear layers with int8 activations and their inputs.
fn quantize(
    graph: &mut Graph,
    spec: &Precision,
    roles: &BTreeMap<String, BTreeSet<Role>>,
    report: &mut Report,
) -> Result<(), PrecisionError> {
    let mut quantized: BTreeMap<NodeId, NodeId> = BTreeMap::new();
    for linear in graph.ids() {
        let node = graph.node(linear);
        let (weight, per_slot) = match &node.op {
            Op::Linear { weight } => (weight, false),
            Op::ExpertLinear { weight, per_slot } => (weight, *per_slot),
            _ => continue,
        };
        let format = graph.weights[weight].format;
        let cols = graph.weights[weight].shape.last().copied().unwrap_or(0);
        let partial = per_slot && !cols.is_multiple_of(ACT_BLOCK);
        let int8 = match spec.activations {
            _ if roles[weight].contains(&Role::Router) => false,
            Activations::F32 => false,
            Activations::Auto if partial => false,
            Activations::Int8 if partial => {
                return Err(PrecisionError::PartialBlocks { weight: weight.clone(), cols });
            }
            Activations::Auto => takes_int8(format),
            Activations::Int8 if takes_int8(format) => true,
            Activations::Int8 => {
                // A tied matrix has two keys; the last, the head's, is the one to name.
                let key = roles[weight].last().map_or("weights", |role| role.key());
                return Err(PrecisionError::NoIntegerCodes { weight: weight.clone(), format, key });
            }
        };
        if !int8 {
            report.f32_linears += 1;
            continue;
        }
        report.int8_linears += 1;
        let layer = node.layer;
        let input = graph.operands(linear)[0];
        if graph.node(input).ty.elem == Elem::Q8 {
            continue;
        }
        let codes = match quantized.get(&input) {
            Some(codes) => *codes,
            None => {
                let name = format!("{}.q8", graph.node(input).name);
                let codes = graph.add(name, layer, Op::Quantize, &[input])?;
                quantized.insert(input, codes);
                codes
            }
        };
        graph.replace_operand(linear, 0, codes);
    }
    report.quantized_values = quantized.len();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontends;
    use serde_json::{Value, json};
    use tilec_ir::abi::KvType;
    use tilec_ir::graph::verify;

    /// A Qwen3 of one layer, its matrices stored in `format`.
    fn model(format: Format, patch: Value) -> Graph {
        let mut config = json!({
            "model_type": "qwen3", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        });
        config.as_object_mut().unwrap().extend(patch.as_object().unwrap().clone());
        let tensors = frontends::synthetic_tensors(&config, format).unwrap();
        frontends::build(&config, &tensors).unwrap()
    }

    fn spec(yaml: Value) -> Precision {
        serde_json::from_value(yaml).unwrap()
    }

    /// Formats of the matrices (without their layer's prefix).
    fn formats(graph: &Graph) -> Vec<String> {
        let matrices = graph.weights.iter().filter(|(_, weight)| weight.shape.len() == 2);
        let short = |name: &str| name.trim_start_matches("model.layers.0.").replace(".weight", "");
        matrices.map(|(name, weight)| format!("{} {}", short(name), weight.format)).collect()
    }

    /// `user <- operand` for every user of a quantized value.
    fn quantized(graph: &Graph) -> Vec<String> {
        let mut lines = Vec::new();
        for id in graph.ids() {
            for operand in graph.operands(id) {
                if matches!(graph.node(operand).op, Op::Quantize) {
                    lines.push(format!("{} <- {}", graph.node(id).name, graph.node(operand).name));
                }
            }
        }
        lines
    }

    fn apply(graph: &mut Graph, precision: Value) -> Result<Report, PrecisionError> {
        let report = super::precision(graph, &spec(precision));
        verify(graph).unwrap();
        report
    }

    #[test]
    fn integer_weights_get_int8_activations_shared_by_siblings() {
        let mut graph = model(Format::Q4_1, json!({}));
        let report = apply(&mut graph, json!({})).unwrap();
        assert_eq!(
            quantized(&graph),
            [
                "l0.q <- l0.attn_norm.q8",
                "l0.k <- l0.attn_norm.q8",
                "l0.v <- l0.attn_norm.q8",
                "l0.o <- l0.attn.q8",
                "l0.gate <- l0.ffn_norm.q8",
                "l0.up <- l0.ffn_norm.q8",
                "l0.down <- l0.act.q8",
                "head <- norm.q8",
            ]
        );
        let counts = (report.int8_linears, report.f32_linears, report.quantized_values);
        assert_eq!(counts, (8, 0, 5));
        assert!(report.converted.is_empty());
        let codes = graph.node(graph.find("l0.act.q8").unwrap());
        assert_eq!((codes.layer, codes.ty.to_string()), (Some(0), "q8[rows, 96]".to_string()));
        let head = graph.node(graph.find("norm.q8").unwrap());
        assert_eq!((head.layer, head.ty.to_string()), (None, "q8[logit_rows, 64]".to_string()));
    }

    #[test]
    fn a_second_run_changes_nothing() {
        let mut graph = model(Format::Q8_0, json!({}));
        apply(&mut graph, json!({})).unwrap();
        let (nodes, links) = (graph.len(), quantized(&graph));
        let report = apply(&mut graph, json!({})).unwrap();
        assert_eq!((graph.len(), quantized(&graph)), (nodes, links));
        assert_eq!((report.int8_linears, report.quantized_values), (8, 0));
    }

    #[test]
    fn float_weights_keep_f32_activations() {
        for format in [Format::F32, Format::F16, Format::BF16, Format::FP8_BLOCK] {
            let mut graph = model(format, json!({}));
            let before = graph.len();
            let report = apply(&mut graph, json!({})).unwrap();
            assert_eq!((report.int8_linears, report.f32_linears), (0, 8), "{format}");
            assert_eq!(graph.len(), before, "{format}");
        }
        let mut graph = model(Format::Q8_0, json!({}));
        assert_eq!(apply(&mut graph, json!({"activations": "f32"})).unwrap().f32_linears, 8);
        assert!(quantized(&graph).is_empty());
    }

    #[test]
    fn formats_follow_the_role_of_a_matrix() {
        let mut graph = model(Format::BF16, json!({}));
        let wanted =
            json!({"weights": "mxfp4", "attention": "q8_0", "embedding": "as-stored", "head": "f16"});
        let report = apply(&mut graph, wanted).unwrap();
        assert_eq!(
            formats(&graph),
            [
                "lm_head f16",
                "model.embed_tokens bf16",
                "mlp.down_proj mxfp4",
                "mlp.gate_proj mxfp4",
                "mlp.up_proj mxfp4",
                "self_attn.k_proj q8_0",
                "self_attn.o_proj q8_0",
                "self_attn.q_proj q8_0",
                "self_attn.v_proj q8_0",
            ]
        );
        assert_eq!(report.converted.len(), 8);
        assert_eq!(report.converted[0], ("lm_head.weight".into(), Format::BF16, Format::F16));
        // Only the head has float codes.
        assert_eq!((report.int8_linears, report.f32_linears), (7, 1));
        assert!(graph.weights.values().all(|weight| weight.stored != Format::MXFP4));
    }

    #[test]
    fn vectors_are_read_as_f32_and_caches_as_asked() {
        let config = json!({"attention_bias": true});
        for (precision, kv_type) in
            [(json!({}), KvType::F16), (json!({"weights": "q4_0", "kv_cache": "f32"}), KvType::F32)]
        {
            let mut graph = model(Format::BF16, config.clone());
            for weight in graph.weights.values_mut() {
                (weight.stored, weight.format) = (Format::BF16, Format::BF16);
            }
            apply(&mut graph, precision).unwrap();
            let vectors = graph.weights.values().filter(|weight| weight.shape.len() == 1);
            assert_eq!(vectors.map(|weight| assert_eq!(weight.format, Format::F32)).count(), 9);
            assert_eq!(graph.caches[0].kv_type, kv_type);
        }
    }

    #[test]
    fn a_tied_matrix_has_one_format() {
        let tied = || model(Format::BF16, json!({"tie_word_embeddings": true}));
        let format = |precision| {
            let mut graph = tied();
            apply(&mut graph, precision).unwrap();
            graph.weights["model.embed_tokens.weight"].format
        };
        assert_eq!(format(json!({})), Format::BF16);
        assert_eq!(format(json!({"weights": "q4_0", "head": "q8_0"})), Format::Q8_0);
        assert_eq!(format(json!({"weights": "q4_0", "embedding": "q8_0"})), Format::Q8_0);
        assert_eq!(format(json!({"head": "q8_0", "embedding": "q8_0"})), Format::Q8_0);
        let error = apply(&mut tied(), json!({"head": "q8_0", "embedding": "bf16"})).unwrap_err().to_string();
        for part in ["head is q8_0", "embedding is bf16", "model.embed_tokens.weight"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let error =
            |format, precision| apply(&mut model(format, json!({})), precision).unwrap_err().to_string();
        let int8 = error(Format::Q8_0, json!({"activations": "int8", "head": "bf16"}));
        assert!(int8.contains("lm_head.weight is bf16") && int8.contains("`head: q8_0`"), "{int8}");
        let int8 = error(Format::F16, json!({"activations": "int8"}));
        assert!(int8.contains("self_attn.q_proj.weight is f16"), "{int8}");
        let experts = error(Format::Q8_0, json!({"experts": "mxfp4"}));
        assert!(experts.contains("precision.experts") && experts.contains("no experts"), "{experts}");
    }

    /// A Qwen3 with 4 experts, 2 of them for a row.
    fn mixture(format: Format, intermediate: usize) -> Graph {
        model(
            format,
            json!({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": intermediate}),
        )
    }

    #[test]
    fn experts_have_a_key_of_their_own_and_routers_stay_as_stored() {
        let mut graph = mixture(Format::BF16, 32);
        let report =
            apply(&mut graph, json!({"weights": "q8_0", "experts": "mxfp4", "activations": "auto"})).unwrap();
        let format = |name: &str| graph.weights[&format!("model.layers.0.mlp.{name}.weight")].format;
        assert_eq!(format("gate"), Format::BF16);
        for name in ["gate", "up", "down"] {
            assert_eq!(format(&format!("experts.{{}}.{name}_proj")), Format::MXFP4, "{name}");
        }
        assert_eq!(
            quantized(&graph)[4..],
            [
                "l0.gate <- l0.ffn_norm.q8",
                "l0.up <- l0.ffn_norm.q8",
                "l0.down <- l0.act.q8",
                "head <- norm.q8"
            ]
        );
        assert_eq!((report.int8_linears, report.f32_linears), (8, 1));
        let act = graph.node(graph.find("l0.act.q8").unwrap());
        assert_eq!(act.ty.to_string(), "q8[rows, 64]");
    }

    #[test]
    fn blocks_of_activations_do_not_reach_from_slot_to_slot() {
        let mut graph = mixture(Format::Q8_0, 24);
        apply(&mut graph, json!({})).unwrap();
        assert!(!quantized(&graph).iter().any(|line| line.starts_with("l0.down")), "{:?}", quantized(&graph));
        let error = apply(&mut mixture(Format::Q8_0, 24), json!({"activations": "int8"}));
        let error = error.unwrap_err().to_string();
        assert!(error.contains("down_proj.weight reads 24 columns"), "{error}");
    }
}
