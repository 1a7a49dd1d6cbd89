//! The graph: its text form, its verifier and its reference interpreter.

mod interp;
mod text;
mod verify;

use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::graph::{ActivationFn, Cache, Graph, NodeId, Op, RopeScaling, RopeSpec, Weight};

pub(crate) const HIDDEN: usize = 8;
pub(crate) const VOCAB: usize = 16;
const HEADS: usize = 2;
const HEAD_DIM: usize = 4;
const INTERMEDIATE: usize = 12;

/// A llama of this many layers with every operator in it: 2 query heads on 1 KV head, partial rotary,
/// a window in odd layers, a bias on q, quantized inputs of the down projection, a tied head.
pub(crate) fn llama(layers: usize, kv_type: KvType) -> Graph {
    let mut graph = Graph::new("tiny llama");
    graph.ropes.insert("default".into(), RopeSpec { dims: 2, theta: 10000.0, scaling: RopeScaling::None });
    let embed = matrix(&mut graph, "embed", VOCAB, HIDDEN);
    let mut x = graph.add("x", None, Op::Embed { weight: embed.clone() }, &[]).unwrap();
    for layer in 0..layers {
        x = decoder_layer(&mut graph, layer, x, kv_type);
    }
    let rows = graph.add("last", None, Op::SelectRows, &[x]).unwrap();
    let norm = vector(&mut graph, "norm", HIDDEN);
    let norm = graph.add("norm", None, Op::RmsNorm { weight: norm, eps: 1e-5 }, &[rows]).unwrap();
    let head = graph.add("head", None, Op::Linear { weight: embed }, &[norm]).unwrap();
    graph.add("logits", None, Op::Logits, &[head]).unwrap();
    graph
}

fn decoder_layer(graph: &mut Graph, layer: usize, x: NodeId, kv_type: KvType) -> NodeId {
    let cache = graph.caches.len();
    graph.caches.push(Cache { kv_heads: 1, qk_dim: HEAD_DIM, v_dim: HEAD_DIM, kv_type });
    let mut add = |name: &str, op: Op, operands: &[NodeId], shape: &[usize]| {
        let op = match op {
            Op::Linear { .. } => {
                Op::Linear { weight: matrix(graph, &format!("layers.{layer}.{name}"), shape[0], shape[1]) }
            }
            Op::RmsNorm { eps, .. } => {
                Op::RmsNorm { weight: vector(graph, &format!("layers.{layer}.{name}"), shape[0]), eps }
            }
            Op::Bias { .. } => {
                Op::Bias { weight: vector(graph, &format!("layers.{layer}.{name}"), shape[0]) }
            }
            op => op,
        };
        graph.add(format!("l{layer}.{name}"), Some(layer), op, operands).unwrap()
    };
    let linear = || Op::Linear { weight: String::new() };
    let norm = || Op::RmsNorm { weight: String::new(), eps: 1e-5 };
    let rope = || Op::Rope { rope: "default".into(), head_dim: HEAD_DIM };
    let window = (layer % 2 == 1).then_some(3);

    let normed = add("attn_norm", norm(), &[x], &[HIDDEN]);
    let q = add("q", linear(), &[normed], &[HEADS * HEAD_DIM, HIDDEN]);
    let q = add("q_bias", Op::Bias { weight: String::new() }, &[q], &[HEADS * HEAD_DIM]);
    let k = add("k", linear(), &[normed], &[HEAD_DIM, HIDDEN]);
    let v = add("v", linear(), &[normed], &[HEAD_DIM, HIDDEN]);
    let q = add("q_rope", rope(), &[q], &[]);
    let k = add("k_rope", rope(), &[k], &[]);
    let kv = add("kv", Op::KvWrite { cache }, &[k, v], &[]);
    let mixed = add(
        "attn",
        Op::Attention { cache, heads: HEADS, scale: 0.5, window, sinks: None, bidirectional: false },
        &[q, kv],
        &[],
    );
    let o = add("o", linear(), &[mixed], &[HIDDEN, HEADS * HEAD_DIM]);
    let x = add("attn_out", Op::Add, &[x, o], &[]);
    let normed = add("mlp_norm", norm(), &[x], &[HIDDEN]);
    let gate = add("gate", linear(), &[normed], &[INTERMEDIATE, HIDDEN]);
    let up = add("up", linear(), &[normed], &[INTERMEDIATE, HIDDEN]);
    let gated = add("gated", Op::Gated { activation: ActivationFn::Silu }, &[gate, up], &[]);
    let quant = add("quant", Op::Quantize, &[gated], &[]);
    let down = add("down", linear(), &[quant], &[HIDDEN, INTERMEDIATE]);
    add("out", Op::Add, &[x, down], &[])
}

fn matrix(graph: &mut Graph, name: &str, out: usize, input: usize) -> String {
    let format = if name.ends_with("down") { Format::MXFP4 } else { Format::BF16 };
    declare(graph, name, vec![out, input], Format::BF16, format)
}

fn vector(graph: &mut Graph, name: &str, len: usize) -> String {
    declare(graph, name, vec![len], Format::F32, Format::F32)
}

fn declare(graph: &mut Graph, name: &str, shape: Vec<usize>, stored: Format, format: Format) -> String {
    let name = format!("{name}.weight");
    graph.declare_weight(&name, Weight { format, ..Weight::whole(shape, stored) }).unwrap();
    name
}
