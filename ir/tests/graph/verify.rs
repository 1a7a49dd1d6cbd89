use crate::{VOCAB, llama};
use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::graph::{Dim, Elem, Graph, NodeId, Op, Slice, Type, Weight, verify};

#[test]
fn a_llama_is_valid() {
    for layers in 0..4 {
        // Without layers nothing rotates.
        let mut graph = llama(layers, KvType::F16);
        if layers == 0 {
            graph.ropes.clear();
        }
        assert_eq!(verify(&graph), Ok(()));
    }
}

fn id(graph: &Graph, name: &str) -> NodeId {
    graph.find(name).unwrap()
}

fn op<'g>(graph: &'g mut Graph, name: &str) -> &'g mut Op {
    let id = id(graph, name);
    &mut graph.node_mut(id).op
}

fn operand(graph: &mut Graph, node: &str, number: u32, operand: &str) {
    let (node, operand) = (id(graph, node), id(graph, operand));
    graph.replace_operand(node, number, operand);
}

/// Makes the first layer's queries' weight a slice.
fn slice(graph: &mut Graph, start: Vec<usize>, of: Vec<usize>) {
    graph.weights.get_mut("layers.0.q.weight").unwrap().slice = Some(Slice { start, of });
}

type Damage = fn(&mut Graph);

/// Ways to damage a llama of two layers, and an error that each must give: node and words.
const DAMAGES: &[(&str, &str, Damage)] = &[
    ("l1.q", "two values have this name", |g| {
        let k = id(g, "l1.k");
        g.node_mut(k).name = "l1.q".into();
    }),
    ("", "a value of linear has no name", |g| {
        let k = id(g, "l1.k");
        g.node_mut(k).name.clear();
    }),
    ("l0.out", "is f32[rows, 8], but says f32[rows, 9]", |g| {
        let out = id(g, "l0.out");
        g.node_mut(out).ty.cols = 9;
    }),
    ("l0.quant", "is q8[rows, 12], but says f32[rows, 12]", |g| {
        let quant = id(g, "l0.quant");
        g.node_mut(quant).ty = Type::f32(12);
    }),
    ("head", "is f32[logit_rows, 16], but says f32[rows, 16]", |g| {
        let head = id(g, "head");
        g.node_mut(head).ty.rows = Dim::Rows;
    }),
    ("l0.out", "operand 1 must be f32, not q8[rows, 12]", |g| operand(g, "l0.out", 1, "l0.quant")),
    ("l0.out", "operands are numbered [0, 1, 2, 5], not from 0 without gaps", |g| {
        operand(g, "l0.out", 2, "x");
        operand(g, "l0.out", 5, "x");
    }),
    ("l0.out", "add takes 2 operands, not 3", |g| operand(g, "l0.out", 2, "x")),
    ("l0.attn_norm", "lies on a cycle or behind one", |g| operand(g, "l0.attn_norm", 0, "l0.out")),
    ("l0.out", "lies on a cycle or behind one", |g| operand(g, "l0.out", 0, "l0.out")),
    ("l1.up", "is never used", |g| operand(g, "l1.gated", 1, "l1.gate")),
    ("", "there are no logits", |g| {
        let logits = id(g, "logits");
        g.remove(logits);
    }),
    ("again", "is a second set of logits", |g| {
        let head = id(g, "head");
        g.add("again", None, Op::Logits, &[head]).unwrap();
    }),
    ("logits", "logits are used again", |g| {
        let logits = id(g, "logits");
        g.add("again", None, Op::Logits, &[logits]).unwrap();
    }),
    ("cache 1", "is written by [], not by one operator", |g| *op(g, "l1.kv") = Op::KvWrite { cache: 0 }),
    ("cache 0", "is written by [\"l0.kv\", \"l1.kv\"]", |g| *op(g, "l1.kv") = Op::KvWrite { cache: 0 }),
    ("cache 2", "is read by [], not by one operator", |g| g.caches.push(g.caches[0])),
    ("l1.attn", "reads cache 1 behind a write of cache 0", |g| operand(g, "l1.attn", 1, "l0.kv")),
    ("l1.attn", "operand 1 must come from kv_write", |g| operand(g, "l1.attn", 1, "l1.v")),
    ("cache 0", "cannot have this shape", |g| g.caches[0].v_dim = 0),
    ("cache 0", "cannot have this shape", |g| g.caches[0].kv_heads = usize::MAX / 4),
    ("l1.kv", "there is no cache 2", |g| *op(g, "l1.kv") = Op::KvWrite { cache: 2 }),
    ("l1.attn", "a window of 0 sees nothing", |g| {
        if let Op::Attention { window, .. } = op(g, "l1.attn") {
            *window = Some(0);
        }
    }),
    ("l1.attn", "scale NaN is not finite", |g| {
        if let Op::Attention { scale, .. } = op(g, "l1.attn") {
            *scale = f32::NAN;
        }
    }),
    ("l0.q", "belongs to layer 0 but needs a value of layer 1", |g| {
        let norm = id(g, "l0.attn_norm");
        g.node_mut(norm).layer = Some(1);
    }),
    // Through an operator of no layer.
    ("l1.attn_norm", "belongs to layer 1 but needs a value of layer 2", |g| {
        for (name, layer) in [("l0.out", None), ("l0.down", Some(2))] {
            let node = id(g, name);
            g.node_mut(node).layer = layer;
        }
    }),
    ("layers.0.q.weight", "this weight is never used", |g| {
        *op(g, "l0.q") = Op::Linear { weight: "layers.1.q.weight".into() }
    }),
    ("l0.q", "weight \"layers.0.q.weight\" is not declared", |g| drop(g.weights.remove("layers.0.q.weight"))),
    ("l0.q", "layers.0.down.weight takes 12 columns, not f32[rows, 8]", |g| {
        *op(g, "l0.q") = Op::Linear { weight: "layers.0.down.weight".into() }
    }),
    ("l0.q", "is no matrix", |g| *op(g, "l0.q") = Op::Linear { weight: "norm.weight".into() }),
    ("huge", "a weight cannot have the shape", |g| {
        let weight = Weight::whole([usize::MAX, 2], Format::F32);
        g.declare_weight("huge", weight).unwrap();
    }),
    // Part of a weight: beyond the whole, with another number of axes, of more than can be counted.
    ("layers.0.q.weight", "is no part of [8, 8]", |g| slice(g, [1, 0].into(), [8, 8].into())),
    ("layers.0.q.weight", "is no part of [8, 8]", |g| slice(g, [usize::MAX, 0].into(), [8, 8].into())),
    ("layers.0.q.weight", "is no part of [64]", |g| slice(g, [0].into(), [64].into())),
    ("layers.0.q.weight", "larger than can be counted", |g| slice(g, [0, 0].into(), [usize::MAX, 8].into())),
    ("l0.sum", "one rank alone has nothing to sum", |g| {
        let (out, next) = (id(g, "l0.out"), id(g, "l1.attn_norm"));
        let sum = g.add("l0.sum", Some(0), Op::AllReduce { ranks: 2 }, &[out]).unwrap();
        g.replace_operand(next, 0, sum);
        *op(g, "l0.sum") = Op::AllReduce { ranks: 1 };
    }),
    ("default", "this rope is never used", |g| {
        let other = g.ropes["default"].clone();
        g.ropes.insert("other".into(), other);
        for name in ["l0.q_rope", "l0.k_rope", "l1.q_rope", "l1.k_rope"] {
            *op(g, name) = Op::Rope { rope: "other".into(), head_dim: 4 };
        }
    }),
    ("default", "theta inf is not finite and positive", |g| {
        g.ropes.get_mut("default").unwrap().theta = f64::INFINITY
    }),
    ("l0.q_rope", "6 rotary dims of heads of 4", |g| g.ropes.get_mut("default").unwrap().dims = 6),
    ("l0.q_rope", "no rope is called \"other\"", |g| {
        *op(g, "l0.q_rope") = Op::Rope { rope: "other".into(), head_dim: 4 }
    }),
    ("norm", "eps -1 is not a small positive number", |g| {
        *op(g, "norm") = Op::RmsNorm { weight: "norm.weight".into(), eps: -1.0 }
    }),
];

#[test]
fn damaged_graphs_are_refused() {
    for (node, what, damage) in DAMAGES {
        let mut graph = llama(2, KvType::F16);
        damage(&mut graph);
        let errors = verify(&graph).expect_err(what);
        assert!(
            errors.iter().any(|error| error.node == *node && error.what.contains(what)),
            "{node}: {what} is not in {errors:#?}"
        );
    }
}

#[test]
fn all_errors_are_reported_at_once() {
    let mut graph = llama(2, KvType::F16);
    operand(&mut graph, "l1.gated", 1, "l1.gate");
    let out = id(&graph, "l0.out");
    graph.node_mut(out).ty = Type { elem: Elem::Q8, rows: Dim::Rows, cols: VOCAB };
    let errors: Vec<String> = verify(&graph).unwrap_err().iter().map(ToString::to_string).collect();
    assert!(errors.contains(&"graph \"tiny llama\", %l1.up: is never used".to_string()), "{errors:?}");
    assert!(errors.iter().any(|error| error.contains("%l0.out: is f32[rows, 8]")), "{errors:?}");
}
