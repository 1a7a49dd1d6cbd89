use crate::{HIDDEN, VOCAB, llama};
use half::{bf16, f16};
use std::collections::BTreeMap;
use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{InterpError, Interpreter, Row};
use tilec_ir::graph::{
    ActivationFn, Cache, Graph, NodeId, Op, RopeScaling, RopeSpec, Router, Scoring, Slice, View, Weight,
};

type Weights = BTreeMap<String, Vec<f32>>;

/// Reproducible values in (-1, 1) for every weight.
fn weights(graph: &Graph) -> Weights {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    };
    let values = |weight: &Weight| weight.shape.iter().product::<usize>();
    graph
        .weights
        .iter()
        .map(|(name, weight)| (name.clone(), (0..values(weight)).map(|_| next()).collect()))
        .collect()
}

fn rows(sequence: u32, first: usize, tokens: &[u32]) -> Vec<Row> {
    tokens.iter().enumerate().map(|(i, token)| Row { token: *token, position: first + i, sequence }).collect()
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= 1e-6 * expected.abs().max(1.0), "{i}: {got}, not {expected}");
    }
}

/// A graph whose logits are what `build` makes of the embedding `x`: tests one operator at a time.
struct One {
    graph: Graph,
    weights: Weights,
}

impl One {
    /// One row of `table` per token.
    fn new(table: &[&[f32]], build: impl FnOnce(&mut One, NodeId) -> NodeId) -> One {
        let mut one = One { graph: Graph::new("one"), weights: Weights::new() };
        let embed = one.weight("table", &[table.len(), table[0].len()], &table.concat());
        let x = one.graph.add("x", None, Op::Embed { weight: embed }, &[]).unwrap();
        let y = build(&mut one, x);
        let selected = one.graph.add("selected", None, Op::SelectRows, &[y]).unwrap();
        one.graph.add("logits", None, Op::Logits, &[selected]).unwrap();
        one
    }

    fn weight(&mut self, name: &str, shape: &[usize], values: &[f32]) -> String {
        let weight = Weight::whole(shape, Format::F32);
        self.graph.declare_weight(name, weight).unwrap();
        self.weights.insert(name.into(), values.to_vec());
        name.into()
    }

    fn add(&mut self, name: &str, op: Op, operands: &[NodeId]) -> NodeId {
        self.graph.add(name, None, op, operands).unwrap()
    }

    fn interpreter(&self) -> Interpreter<'_> {
        Interpreter::new(&self.graph, &self.weights).unwrap()
    }

    /// What becomes of tokens 0, 1, ... `n - 1` at positions 0, 1, ...
    fn run(&self, n: usize) -> Vec<f32> {
        let tokens: Vec<u32> = (0..n as u32).collect();
        let wanted: Vec<usize> = (0..n).collect();
        self.interpreter().step(&rows(0, 0, &tokens), &wanted).unwrap()
    }
}

#[test]
fn linear_bias_and_add() {
    let one = One::new(&[&[1.0, 2.0, 3.0], &[-1.0, 0.5, 0.0]], |one, x| {
        let weight = one.weight("w", &[3, 3], &[1.0, 0.0, 2.0, 0.0, -1.0, 0.5, 3.0, 3.0, 3.0]);
        let bias = one.weight("b", &[3], &[10.0, 20.0, 30.0]);
        let y = one.add("y", Op::Linear { weight }, &[x]);
        let y = one.add("b", Op::Bias { weight: bias }, &[y]);
        one.add("sum", Op::Add, &[y, x])
    });
    assert_eq!(one.run(2), [18.0, 21.5, 51.0, 8.0, 20.0, 28.5]);
}

#[test]
fn rms_norm_in_groups() {
    // Mean squares: (9 + 16) / 2 = 12.5 and (0 + 4) / 2 = 2; eps 0.5 makes 13 and 2.5.
    let one = One::new(&[&[3.0, 4.0, 0.0, 2.0]], |one, x| {
        let weight = one.weight("w", &[2], &[1.0, 2.0]);
        one.add("y", Op::RmsNorm { weight, eps: 0.5 }, &[x])
    });
    let (a, b) = (13f32.sqrt(), 2.5f32.sqrt());
    assert_close(&one.run(1), &[3.0 / a, 8.0 / a, 0.0, 4.0 / b]);
}

#[test]
fn rope_turns_the_halves_of_the_first_dims() {
    // Heads of 6, 4 of them rotary: pairs (0, 2) and (1, 3), frequencies 1 and 1/10.
    let row: &[f32] = &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let one = One::new(&[row, row, row], |one, x| {
        let rope = RopeSpec { dims: 4, theta: 100.0, scaling: RopeScaling::None };
        one.graph.ropes.insert("r".into(), rope);
        one.add("y", Op::Rope { rope: "r".into(), head_dim: 6 }, &[x])
    });
    let got = one.run(3);
    assert_eq!(got[..6], *row);
    let ((s, c), (t, d)) = (2f32.sin_cos(), 0.2f32.sin_cos());
    assert_close(
        &got[12..],
        &[1.0 * c - 3.0 * s, 2.0 * d - 4.0 * t, 3.0 * c + 1.0 * s, 4.0 * d + 2.0 * t, 5.0, 6.0],
    );
}

#[test]
fn rope_applies_the_attention_factor_to_rotary_dims_only() {
    let scaling = RopeScaling::Yarn {
        factor: 2.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: 64,
        attention_factor: 1.5,
        truncate: true,
    };
    let one = One::new(&[&[1.0, 2.0, 3.0, 4.0]], |one, x| {
        one.graph.ropes.insert("r".into(), RopeSpec { dims: 2, theta: 100.0, scaling });
        one.add("y", Op::Rope { rope: "r".into(), head_dim: 4 }, &[x])
    });
    assert_eq!(one.run(1), [1.5, 3.0, 3.0, 4.0]);
}

#[test]
fn silu_gates() {
    let one = One::new(&[&[0.0, 1.0, -2.0]], |one, x| {
        one.add("y", Op::Gated { activation: ActivationFn::Silu }, &[x, x])
    });
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    assert_close(&one.run(1), &[0.0, sigmoid(1.0), 4.0 * sigmoid(-2.0)]);
}

#[test]
fn quantize_rounds_to_even_in_blocks() {
    // A block of 32 with amax 127 has scale 1; the tail of 3 has its own scale, 2 / 127.
    let mut row = vec![0f32; 35];
    row[..5].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, 3.4]);
    row[32..].copy_from_slice(&[2.0, -1.0, 0.0]);
    let one = One::new(&[&row, &[0.0; 35]], |one, x| {
        let eye: Vec<f32> = (0..35 * 35).map(|i| if i / 35 == i % 35 { 1.0 } else { 0.0 }).collect();
        let weight = one.weight("eye", &[35, 35], &eye);
        let quant = one.add("quant", Op::Quantize, &[x]);
        one.add("y", Op::Linear { weight }, &[quant])
    });
    let got = one.run(2);
    assert_eq!(got[..5], [127.0, 0.0, 2.0, -2.0, 3.0]);
    assert_close(&got[32..35], &[2.0, -64.0 * 2.0 / 127.0, 0.0]);
    assert_eq!(got[35..], [0.0; 35]);
}

/// Attention of `heads` heads, all of which query with the embedding, over keys and values that are
/// the embedding too.
fn attention(heads: usize, window: Option<usize>, kv_type: KvType, table: &[&[f32]]) -> One {
    let dim = table[0].len();
    One::new(table, |one, x| {
        let repeated: Vec<f32> =
            (0..heads * dim * dim).map(|i| if i / dim % dim == i % dim { 1.0 } else { 0.0 }).collect();
        let weight = one.weight("repeat", &[heads * dim, dim], &repeated);
        one.graph.caches.push(Cache { kv_heads: 1, qk_dim: dim, v_dim: dim, kv_type });
        let q = one.add("q", Op::Linear { weight }, &[x]);
        let kv = one.add("kv", Op::KvWrite { cache: 0 }, &[x, x]);
        one.add(
            "y",
            Op::Attention { cache: 0, heads, scale: 0.5, window, sinks: None, bidirectional: false },
            &[q, kv],
        )
    })
}

#[test]
fn attention_mixes_what_is_behind() {
    let one = attention(2, None, KvType::F32, &[&[1.0, 0.0], &[0.0, 2.0], &[1.0, 1.0]]);
    let got = one.run(3);
    // Row 0 sees itself alone; both heads do.
    assert_eq!(got[..4], [1.0, 0.0, 1.0, 0.0]);
    // Row 1: scores 0 and 2. Row 2: scores 0.5, 1 and 1.
    let e = 2f32.exp();
    assert_close(&got[4..6], &[1.0 / (1.0 + e), 2.0 * e / (1.0 + e)]);
    let (a, b) = (0.5f32.exp(), 1f32.exp());
    assert_close(&got[8..10], &[(a + b) / (a + 2.0 * b), (2.0 * b + b) / (a + 2.0 * b)]);
    assert_eq!(got[8..10], got[10..12]);
}

#[test]
fn a_window_counts_the_row_itself() {
    let table: &[&[f32]] = &[&[1.0, 0.0], &[0.0, 2.0], &[1.0, 1.0]];
    assert_eq!(attention(1, Some(1), KvType::F32, table).run(3), [1.0, 0.0, 0.0, 2.0, 1.0, 1.0]);
    // Row 2 sees rows 1 and 2, both with score 1.
    assert_close(&attention(1, Some(2), KvType::F32, table).run(3)[4..], &[0.5, 1.5]);
    assert_eq!(
        attention(1, Some(3), KvType::F32, table).run(3),
        attention(1, None, KvType::F32, table).run(3)
    );
}

#[test]
fn query_heads_share_kv_heads_in_groups() {
    // Four query heads, two KV heads with values 10 and 20: heads 0 and 1 get 10, 2 and 3 get 20.
    let one = One::new(&[&[1.0, 1.0]], |one, x| {
        let q = one.weight("q", &[4, 2], &[1.0; 8]);
        let v = one.weight("v", &[2, 2], &[10.0, 0.0, 0.0, 20.0]);
        one.graph.caches.push(Cache { kv_heads: 2, qk_dim: 1, v_dim: 1, kv_type: KvType::F32 });
        let (q, v) =
            (one.add("q", Op::Linear { weight: q }, &[x]), one.add("v", Op::Linear { weight: v }, &[x]));
        let kv = one.add("kv", Op::KvWrite { cache: 0 }, &[x, v]);
        one.add(
            "y",
            Op::Attention { cache: 0, heads: 4, scale: 1.0, window: None, sinks: None, bidirectional: false },
            &[q, kv],
        )
    });
    assert_eq!(one.run(1), [10.0, 10.0, 20.0, 20.0]);
}

#[test]
fn the_cache_rounds_as_it_stores() {
    let x = 1.0 + 1.0 / 300.0;
    let stored = |kv_type| attention(1, Some(1), kv_type, &[&[x, -x]]).run(1);
    assert_eq!(stored(KvType::F32), [x, -x]);
    assert_eq!(stored(KvType::F16), [f16::from_f32(x).to_f32(), f16::from_f32(-x).to_f32()]);
    assert_eq!(stored(KvType::Bf16), [bf16::from_f32(x).to_f32(), bf16::from_f32(-x).to_f32()]);
    assert_ne!(stored(KvType::F16), stored(KvType::Bf16));
}

const PROMPT: [u32; 7] = [3, 14, 1, 5, 9, 2, 6];

/// Logits of every row of [`PROMPT`], run at once.
fn at_once(graph: &Graph, weights: &Weights) -> Vec<f32> {
    let wanted: Vec<usize> = (0..PROMPT.len()).collect();
    Interpreter::new(graph, weights).unwrap().step(&rows(0, 0, &PROMPT), &wanted).unwrap()
}

#[test]
fn one_row_at_a_time_is_the_prompt_at_once() {
    for kv_type in [KvType::F32, KvType::F16, KvType::Bf16] {
        let graph = llama(2, kv_type);
        let weights = weights(&graph);
        let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
        let mut decoded = Vec::new();
        for (position, token) in PROMPT.iter().enumerate() {
            decoded.extend(interpreter.step(&rows(0, position, &[*token]), &[0]).unwrap());
        }
        // Not only close: the numbers of a row do not depend on the other rows.
        assert_eq!(decoded, at_once(&graph, &weights));
        assert_eq!(interpreter.positions(0), PROMPT.len());
    }
}

#[test]
fn every_token_before_matters_to_the_last() {
    let graph = llama(2, KvType::F32);
    let weights = weights(&graph);
    let last = |tokens: &[u32]| {
        let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
        interpreter.step(&rows(0, 0, tokens), &[tokens.len() - 1]).unwrap()
    };
    let before = last(&PROMPT);
    assert_eq!(before.len(), VOCAB);
    for changed in 0..PROMPT.len() {
        let mut tokens = PROMPT;
        tokens[changed] = 15;
        assert_ne!(last(&tokens), before, "token {changed}");
    }
}

#[test]
fn sequences_do_not_see_each_other() {
    let graph = llama(2, KvType::F16);
    let weights = weights(&graph);
    let other = [7, 7, 0, 11];
    let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
    // 2 rows of sequence 0, 3 of sequence 9; then 5 and 1, in the other order.
    let first = [rows(0, 0, &PROMPT[..2]), rows(9, 0, &other[..3])].concat();
    let second = [rows(9, 3, &other[3..]), rows(0, 2, &PROMPT[2..])].concat();
    let first = interpreter.step(&first, &[0, 1]).unwrap();
    let second = interpreter.step(&second, &[1, 2, 3, 4, 5]).unwrap();
    assert_eq!([first, second].concat(), at_once(&graph, &weights));
}

#[test]
fn rejected_rows_are_forgotten() {
    let graph = llama(2, KvType::F32);
    let weights = weights(&graph);
    let expected = at_once(&graph, &weights)[6 * VOCAB..].to_vec();
    let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
    interpreter.step(&rows(0, 0, &PROMPT[..3]), &[]).unwrap();
    interpreter.step(&rows(0, 3, &[8, 8, 8, 8, 8, 8]), &[]).unwrap();
    assert_eq!(interpreter.step(&rows(0, 3, &PROMPT[3..]), &[3]).unwrap(), expected);
    assert_eq!(interpreter.positions(0), 7);
    interpreter.truncate(0, 6);
    assert_eq!(interpreter.step(&rows(0, 6, &PROMPT[6..]), &[0]).unwrap(), expected);
    interpreter.truncate(0, 3);
    let error = interpreter.step(&rows(0, 4, &[1]), &[0]).unwrap_err();
    assert!(error.to_string().contains("leaves a gap behind its 3 positions"), "{error}");
}

#[test]
fn steps_that_make_no_sense_are_errors_and_change_nothing() {
    let graph = llama(1, KvType::F32);
    let weights = weights(&graph);
    let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
    interpreter.step(&rows(0, 0, &PROMPT[..2]), &[]).unwrap();
    let row = |token, position, sequence| Row { token, position, sequence };
    let cases: &[(&[Row], &[usize], &str)] = &[
        (&[], &[], "row 0: a step needs at least one row"),
        (&[row(16, 2, 0)], &[0], "row 0: token 16 of a vocabulary of 16"),
        (&[row(1, 3, 0)], &[0], "row 0: position 3 of sequence 0 leaves a gap behind its 2 positions"),
        (&[row(1, usize::MAX, 5)], &[0], "leaves a gap behind its 0 positions"),
        (&[row(1, 2, 0), row(1, 4, 0)], &[0], "row 1: position 4 where 3 comes next"),
        (&[row(1, 2, 0), row(1, 2, 0)], &[0], "row 1: position 2 where 3 comes next"),
        (&[row(1, 2, 0), row(1, 0, 1), row(1, 3, 0)], &[0], "row 2: rows of sequence 0 are not adjacent"),
        (&[row(1, 2, 0)], &[1], "wanted logits [1] of 1 rows"),
        (&[row(1, 2, 0), row(1, 3, 0)], &[1, 0], "wanted logits [1, 0] of 2 rows"),
        (&[row(1, 2, 0), row(1, 3, 0)], &[1, 1], "wanted logits [1, 1] of 2 rows"),
    ];
    for (rows, wanted, what) in cases {
        let error = interpreter.step(rows, wanted).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!((interpreter.positions(0), interpreter.positions(1)), (2, 0));
    }
    let got = interpreter.step(&rows(0, 2, &PROMPT[2..]), &[4]).unwrap();
    assert_eq!(got, at_once(&graph, &weights)[6 * VOCAB..]);
}

#[test]
fn weights_and_graphs_that_do_not_fit_are_refused() {
    let mut graph = llama(1, KvType::F32);
    let mut weights = weights(&graph);
    let refusal = |graph: &Graph, weights: &Weights| match Interpreter::new(graph, weights) {
        Ok(_) => panic!("was not refused"),
        Err(error) => error.to_string(),
    };
    weights.get_mut("norm.weight").unwrap().pop();
    assert_eq!(refusal(&graph, &weights), "weight \"norm.weight\": 7 values do not make a [8]");
    weights.remove("norm.weight");
    assert_eq!(refusal(&graph, &weights), "weight \"norm.weight\": there is no such tensor");
    graph.caches.clear();
    assert!(
        matches!(Interpreter::new(&graph, &weights), Err(InterpError::Graph(errors)) if errors.len() == 2)
    );
}

#[test]
fn an_observer_sees_every_value() {
    let graph = llama(2, KvType::F32);
    let weights = weights(&graph);
    let mut seen = BTreeMap::new();
    let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
    let logits = interpreter
        .step_observed(&rows(0, 0, &[4, 2]), &[1], &mut |node, values| {
            seen.insert(node.name.clone(), values.to_vec());
        })
        .unwrap();
    assert_eq!(seen.len(), graph.len());
    assert_eq!(seen["logits"], logits);
    assert_eq!(
        seen["x"],
        [&weights["embed.weight"][4 * HIDDEN..][..HIDDEN], &weights["embed.weight"][2 * HIDDEN..][..HIDDEN]]
            .concat()
    );
    assert_eq!(seen["last"], seen["l1.out"][HIDDEN..]);
    assert!(seen["l0.kv"].is_empty());
}

/// What a mixture of `values.len()` experts makes of one row of router scores, where expert `e` turns
/// everything into `values[e]`.
fn mixed(scores: &[f32], router: Router, values: &[f32]) -> f32 {
    let one = One::new(&[scores], |one, x| {
        let routes = one.add("routes", Op::Route(router), &[x]);
        // The row's first score, divided away again: an expert's product needs an input that is not 0.
        let inverse: Vec<f32> =
            (0..scores.len()).map(|i| if i == 0 { 1.0 / scores[0] } else { 0.0 }).collect();
        let matrices: Vec<f32> = values.iter().flat_map(|v| inverse.iter().map(move |i| i * v)).collect();
        let weight = one.weight("experts", &[values.len(), 1, scores.len()], &matrices);
        let y = one.add("y", Op::ExpertLinear { weight, per_slot: false }, &[x, routes]);
        one.add("sum", Op::Combine, &[y, routes])
    });
    one.run(1)[0]
}

fn router(scoring: Scoring, top_k: usize, renormalize: bool) -> Router {
    Router { scoring, renormalize, top_k, factor: 1.0, correction: None }
}

#[test]
fn routers_weigh_as_their_families_do() {
    let scores = [1.0f32, 3.0, 2.0, -1.0];
    let e = |x: f32| f64::from(x).exp();
    let all: f64 = scores.iter().map(|x| e(*x)).sum();
    let (values, expected) = ([1.0, 10.0, 100.0, 1000.0], |a: f64, b: f64| (10.0 * a + 100.0 * b) as f32);
    let plain = mixed(&scores, router(Scoring::Softmax, 2, false), &values);
    assert_close(&[plain], &[expected(e(3.0) / all, e(2.0) / all)]);
    let chosen = e(3.0) + e(2.0);
    for same in [router(Scoring::Softmax, 2, true), router(Scoring::ChosenSoftmax, 2, false)] {
        assert_close(&[mixed(&scores, same, &values)], &[expected(e(3.0) / chosen, e(2.0) / chosen)]);
    }
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let doubled = Router { factor: 2.0, ..router(Scoring::Sigmoid, 2, false) };
    let wanted = expected(2.0 * sigmoid(3.0), 2.0 * sigmoid(2.0));
    assert_close(&[mixed(&scores, doubled, &values)], &[wanted]);
}

#[test]
fn ties_go_to_the_lower_expert() {
    for scores in [[2.0f32, 2.0, 2.0, 2.0], [2.0, 2.0, 0.0, -0.0], [1.0, -0.0, 0.0, -1.0]] {
        let sum = mixed(&scores, router(Scoring::ChosenSoftmax, 2, false), &[1.0, 1.0, 9.0, 9.0]);
        assert_close(&[sum], &[1.0]);
    }
}

#[test]
fn a_correction_chooses_and_does_not_weigh() {
    let one = One::new(&[&[1.0, 0.5, 0.0]], |one, x| {
        let correction = Some(one.weight("correction", &[3], &[0.0, 0.0, 5.0]));
        let router = Router { correction, ..router(Scoring::Sigmoid, 2, true) };
        let routes = one.add("routes", Op::Route(router), &[x]);
        let weight = one.weight("experts", &[3, 1, 3], &[1.0, 0.0, 0.0, 7.0, 0.0, 0.0, 2.0, 0.0, 0.0]);
        let y = one.add("y", Op::ExpertLinear { weight, per_slot: false }, &[x, routes]);
        let bias = one.weight("bias", &[3, 1], &[0.5, 9.0, 0.25]);
        let y = one.add("biased", Op::ExpertBias { weight: bias }, &[y, routes]);
        one.add("sum", Op::Combine, &[y, routes])
    });
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    let (a, b) = (sigmoid(1.0), sigmoid(0.0));
    assert_close(&one.run(1), &[(1.5 * a + 2.25 * b) / (a + b)]);
}

#[test]
fn a_slot_has_a_row_of_its_own() {
    let one = One::new(&[&[1.0, 0.0, 3.0]], |one, x| {
        let routes = one.add("routes", Op::Route(router(Scoring::ChosenSoftmax, 2, false)), &[x]);
        let up = one.weight("up", &[3, 2, 3], &[1.0; 18]);
        let y = one.add("up_", Op::ExpertLinear { weight: up, per_slot: false }, &[x, routes]);
        // Expert 0 keeps the first of its two columns, expert 2 twice the second.
        let down = one.weight("down", &[3, 1, 2], &[1.0, 0.0, 9.0, 9.0, 0.0, 2.0]);
        let y = one.add("down_", Op::ExpertLinear { weight: down, per_slot: true }, &[y, routes]);
        one.add("sum", Op::Combine, &[y, routes])
    });
    let (a, b) = (1f32.exp(), 3f32.exp());
    assert_close(&one.run(1), &[(4.0 * a + 8.0 * b) / (a + b)]);
}

#[test]
fn clamped_gates() {
    let activation = ActivationFn::Clamped { alpha: 1.5, limit: 2.0 };
    let one = One::new(&[&[0.5, 3.0, -3.0]], |one, x| one.add("y", Op::Gated { activation }, &[x, x]));
    let gate = |g: f32, u: f32| g / (1.0 + (-1.5 * g).exp()) * (u + 1.0);
    assert_close(&one.run(1), &[gate(0.5, 0.5), gate(2.0, 2.0), gate(-3.0, -2.0)]);
}

#[test]
fn a_sink_takes_its_share_and_gives_nothing() {
    let one = One::new(&[&[1.0, 0.0]], |one, x| {
        one.graph.caches.push(Cache { kv_heads: 1, qk_dim: 2, v_dim: 2, kv_type: KvType::F32 });
        let kv = one.add("kv", Op::KvWrite { cache: 0 }, &[x, x]);
        let sinks = Some(one.weight("sinks", &[1], &[3.0]));
        one.add(
            "y",
            Op::Attention { cache: 0, heads: 1, scale: 1.0, window: None, sinks, bidirectional: false },
            &[x, kv],
        )
    });
    let share = 1f32.exp() / (1f32.exp() + 3f32.exp());
    assert_close(&one.run(1), &[share, 0.0]);
}

#[test]
fn views_and_experts_of_their_own_are_put_together() {
    // Rows 1 and 3 of a tensor of 4 rows; two experts of which each has a tensor.
    let view = View { tensor: "stored".into(), start: 2, block: 2, stride: 4 };
    let build = |name: &'static str, shape: Vec<usize>, view: Option<View>| {
        let mut one = One::new(&[&[1.0, 2.0]], |one, x| {
            let weight = Weight { view, ..Weight::whole(shape, Format::F32) };
            one.graph.declare_weight(name, weight).unwrap();
            if name == "part" {
                return one.add("y", Op::Linear { weight: name.into() }, &[x]);
            }
            let routes = one.add("routes", Op::Route(router(Scoring::ChosenSoftmax, 1, false)), &[x]);
            let y = Op::ExpertLinear { weight: name.into(), per_slot: false };
            one.add("y", y, &[x, routes])
        });
        one.weights.insert("stored".into(), vec![9.0, 9.0, 1.0, 0.0, 9.0, 9.0, 0.0, 1.0]);
        one.weights.insert("e.0".into(), vec![9.0, 9.0]);
        one.weights.insert("e.1".into(), vec![1.0, 1.0]);
        one
    };
    assert_eq!(build("part", vec![2, 2], Some(view.clone())).run(1), [1.0, 2.0]);
    assert_eq!(build("e.{}", vec![2, 1, 2], None).run(1), [3.0]);
    // A view of more than there is.
    let far = build("part", vec![2, 2], Some(View { stride: 6, ..view }));
    let error = Interpreter::new(&far.graph, &far.weights).err().unwrap().to_string();
    assert!(error.contains("8 values of stored do not hold"), "{error}");
}

/// A slice is a part of the whole, wherever that lies: columns of a matrix, rows of a view, of experts.
#[test]
fn slices_are_parts_of_the_whole() {
    let run = |name: &'static str, shape: &[usize], start: &[usize], of: &[usize], view: Option<View>| {
        let mut one = One::new(&[&[1.0, 2.0]], |one, x| {
            let slice = Some(Slice { start: start.into(), of: of.into() });
            let weight = Weight { view, slice, ..Weight::whole(shape, Format::F32) };
            one.graph.declare_weight(name, weight).unwrap();
            if shape.len() == 2 {
                return one.add("y", Op::Linear { weight: name.into() }, &[x]);
            }
            let routes = one.add("routes", Op::Route(router(Scoring::ChosenSoftmax, 2, false)), &[x]);
            one.add("y", Op::ExpertLinear { weight: name.into(), per_slot: false }, &[x, routes])
        });
        one.weights.insert("wide".into(), (0..12).map(|n| n as f32).collect());
        one.weights.insert("e.0".into(), (0..12).map(|n| n as f32).collect());
        one.weights.insert("e.1".into(), (100..112).map(|n| n as f32).collect());
        let outcome = Interpreter::new(&one.graph, &one.weights).map(drop);
        outcome.map_err(|error| error.to_string()).map(|()| one.run(1))
    };
    let pair = |a: f32, b: f32| a + 2.0 * b;
    // Columns 2 and 3 of three rows of four.
    let columns = run("wide", &[3, 2], &[0, 2], &[3, 4], None).unwrap();
    assert_eq!(columns, [pair(2.0, 3.0), pair(6.0, 7.0), pair(10.0, 11.0)]);
    // Of every other row of two columns, the second and the third.
    let view = View { tensor: "wide".into(), start: 0, block: 2, stride: 4 };
    let rows = run("part", &[2, 2], &[1, 0], &[3, 2], Some(view.clone())).unwrap();
    assert_eq!(rows, [pair(4.0, 5.0), pair(8.0, 9.0)]);
    // Of each of two experts the last of three rows of four, columns 1 and 2.
    let experts = run("e.{}", &[2, 1, 2], &[0, 2, 1], &[2, 3, 4], None).unwrap();
    assert_eq!(experts, [pair(9.0, 10.0), pair(109.0, 110.0)]);
    // A whole that the tensor is not.
    let error = run("wide", &[3, 2], &[0, 2], &[3, 5], None).unwrap_err();
    assert!(error.contains("12 values do not make a [3, 5]"), "{error}");
    let error = run("part", &[2, 2], &[2, 0], &[4, 2], Some(view)).unwrap_err();
    assert!(error.contains("12 values of wide do not hold"), "{error}");
}

/// Two rows behind a context of one: with both ways each sees the other, as far as a window reaches.
#[test]
fn rows_may_see_what_comes_behind_them_in_the_step() {
    // Queries of zeros weigh all that is seen alike: the result is the mean of the values.
    let means = |window, bidirectional| {
        let mut graph = Graph::new("both ways");
        let format = tilec_ir::format::Format::F32;
        graph.declare_weight("e", tilec_ir::graph::Weight::whole([4, 2], format)).unwrap();
        graph.declare_weight("zero", tilec_ir::graph::Weight::whole([2, 2], format)).unwrap();
        graph.caches.push(Cache { kv_heads: 1, qk_dim: 2, v_dim: 2, kv_type: tilec_ir::abi::KvType::F32 });
        let x = graph.add("x", None, Op::Embed { weight: "e".into() }, &[]).unwrap();
        let q = graph.add("q", None, Op::Linear { weight: "zero".into() }, &[x]).unwrap();
        let kv = graph.add("kv", None, Op::KvWrite { cache: 0 }, &[x, x]).unwrap();
        let op = Op::Attention { cache: 0, heads: 1, scale: 1.0, window, sinks: None, bidirectional };
        let y = graph.add("y", None, op, &[q, kv]).unwrap();
        let y = graph.add("rows", None, Op::SelectRows, &[y]).unwrap();
        graph.add("logits", None, Op::Logits, &[y]).unwrap();
        let weights = std::collections::BTreeMap::from([
            ("e".to_string(), vec![0.0, 0.0, 3.0, 0.0, 6.0, 0.0, 12.0, 0.0]),
            ("zero".to_string(), vec![0.0; 4]),
        ]);
        let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
        let row = |position: usize| Row { token: position as u32, position, sequence: 5 };
        interpreter.step(&[row(0)], &[]).unwrap();
        let y = interpreter.step(&[row(1), row(2), row(3)], &[0, 1, 2]).unwrap();
        [y[0], y[2], y[4]]
    };
    assert_eq!(means(None, false), [1.5, 3.0, 5.25]);
    assert_eq!(means(None, true), [5.25; 3]);
    assert_eq!(means(Some(2), false), [1.5, 4.5, 9.0]);
    assert_eq!(means(Some(2), true), [3.0, 7.0, 9.0]);
}

/// Input, replaced tokens and taps; and a graph whose result is what it writes into its cache.
#[test]
fn a_graph_may_be_fed_and_tapped() {
    let format = tilec_ir::format::Format::F32;
    let mut graph = Graph::new("fed");
    graph.declare_weight("e", tilec_ir::graph::Weight::whole([3, 2], format)).unwrap();
    graph.declare_weight("mask", tilec_ir::graph::Weight::whole([2], format)).unwrap();
    let x = graph.add("x", None, Op::Embed { weight: "e".into() }, &[]).unwrap();
    let input = graph.add("input", None, Op::Input { cols: 2 }, &[]).unwrap();
    let op = Op::Replace { weight: "mask".into(), token: 1 };
    let masked = graph.add("masked", None, op, &[x]).unwrap();
    let sum = graph.add("sum", None, Op::Add, &[masked, input]).unwrap();
    graph.add("taps", None, Op::Taps, &[sum, x]).unwrap();
    let rows = graph.add("rows", None, Op::SelectRows, &[sum]).unwrap();
    graph.add("logits", None, Op::Logits, &[rows]).unwrap();
    assert_eq!(graph.node(graph.find("taps").unwrap()).ty.to_string(), "f32[rows, 4]");
    // Taps come last, whatever their number.
    assert_eq!(graph.topological().unwrap().last().copied(), graph.find("taps"));
    let weights = std::collections::BTreeMap::from([
        ("e".to_string(), vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ("mask".to_string(), vec![-1.0, -2.0]),
    ]);
    let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
    let rows = [0, 1].map(|position| Row { token: position as u32, position, sequence: 0 });
    let error = interpreter.step(&rows, &[]).unwrap_err().to_string();
    assert!(error.contains("0 input values are not 2 rows of 2"), "{error}");
    interpreter.set_input(&[10.0, 20.0, 30.0, 40.0]);
    let mut taps = Vec::new();
    let logits = interpreter.step_observed(&rows, &[1], &mut |node, values| {
        if node.op == Op::Taps {
            taps = values.to_vec();
        }
    });
    assert_eq!(logits.unwrap(), [29.0, 38.0]);
    assert_eq!(taps, [11.0, 22.0, 1.0, 2.0, 29.0, 38.0, 3.0, 4.0]);

    let mut filled = Graph::new("filled");
    filled.caches.push(Cache { kv_heads: 1, qk_dim: 2, v_dim: 2, kv_type: tilec_ir::abi::KvType::F32 });
    let x = filled.add("x", None, Op::Input { cols: 2 }, &[]).unwrap();
    filled.add("kv", None, Op::KvWrite { cache: 0 }, &[x, x]).unwrap();
    tilec_ir::graph::verify(&filled).unwrap();
    assert_eq!(tilec_ir::graph::parse(&filled.to_string()).unwrap().to_string(), filled.to_string());
    let none = BTreeMap::new();
    let mut filler = Interpreter::new(&filled, &none).unwrap();
    assert!(filler.exchange_caches(&mut interpreter).unwrap_err().contains("other caches"));
    filler.set_input(&[1.0, 2.0, 3.0, 4.0]);
    assert!(filler.step(&rows, &[]).unwrap().is_empty());
    assert_eq!(filler.positions(0), 2);
    let mut other = Interpreter::new(&filled, &none).unwrap();
    other.exchange_caches(&mut filler).unwrap();
    assert_eq!((other.positions(0), filler.positions(0)), (2, 0));
}

/// A DFlash2 draft's operators, by hand: rows of two sequences in one step.
#[test]
fn convolutions_candidates_and_pairs() {
    let format = tilec_ir::format::Format::F32;
    let weight = |shape: &[usize]| tilec_ir::graph::Weight::whole(shape.to_vec(), format);
    let mut graph = Graph::new("selector");
    for (name, shape) in [
        ("e", &[4, 2][..]),
        ("base", &[2, 2, 2]),
        ("k", &[4, 2]),
        ("head", &[4, 2]),
        ("p", &[4, 1]),
        ("s", &[4, 1]),
    ] {
        graph.declare_weight(name, weight(shape)).unwrap();
    }
    graph.declare_weight("h", weight(&[1, 2])).unwrap();
    let x = graph.add("x", None, Op::Embed { weight: "e".into() }, &[]).unwrap();
    // One group of two columns: kernels of 2 sides by 2 taps.
    let own = graph.add("own", None, Op::Linear { weight: "k".into() }, &[x]).unwrap();
    let conv = |graph: &mut Graph, name: &str, side, x| {
        let op = Op::DynamicConv { weight: "base".into(), side, group: 2 };
        graph.add(name, None, op, &[x, own]).unwrap()
    };
    let pre = conv(&mut graph, "pre", 0, x);
    let post = conv(&mut graph, "post", 1, pre);
    let rows = graph.add("rows", None, Op::SelectRows, &[post]).unwrap();
    let head = graph.add("head", None, Op::Linear { weight: "head".into() }, &[rows]).unwrap();
    let logits = graph.add("logits", None, Op::Logits, &[head]).unwrap();
    let top = Op::TopK { k: 2, factor: 0.5, softcap: Some(4.0) };
    let top = graph.add("top", None, top, &[logits]).unwrap();
    let h = graph.add("h", None, Op::Linear { weight: "h".into() }, &[rows]).unwrap();
    let op = Op::PairScores { predecessor: "p".into(), successor: "s".into() };
    graph.add("pairs", None, op, &[top, h]).unwrap();
    tilec_ir::graph::verify(&graph).unwrap();
    let weights = std::collections::BTreeMap::from(
        [
            ("e", vec![1.0, 2.0, 3.0, 5.0, -1.0, 1.0, 2.0, 0.0]),
            ("base", vec![1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 10.0, 20.0]),
            // Own kernels: the first column to tap 1 of side 0, the second to tap 0 of side 1.
            ("k", vec![0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0]),
            ("head", vec![1.0, 0.0, 0.0, 1.0, 0.0, 1.0, f32::NAN, 0.0]),
            ("p", vec![1.0, 2.0, 3.0, 4.0]),
            ("s", vec![5.0, 7.0, 11.0, 13.0]),
            ("h", vec![1.0, 0.0]),
        ]
        .map(|(name, values)| (name.to_string(), values)),
    );
    let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
    let row = |token, position, sequence| Row { token, position, sequence };
    let rows = [row(0, 0, 0), row(1, 1, 0), row(2, 2, 0), row(3, 0, 1), row(0, 1, 1)];
    let mut seen = std::collections::BTreeMap::new();
    interpreter
        .step_observed(&rows, &[1, 2, 4], &mut |node, values| {
            seen.insert(node.name.clone(), values.to_vec());
        })
        .unwrap();
    // x + own[0] * before, nothing before the first row of either sequence.
    assert_eq!(seen["pre"], [1.0, 2.0, 6.0, 11.0, -4.0, -4.0, 2.0, 0.0, 3.0, 2.0]);
    // ([1, 2] + own[1]) * pre + [10, 20] * before.
    let post = [3.0, 8.0, 46.0, 117.0, 52.0, 208.0, 2.0, 0.0, 29.0, 8.0];
    assert_eq!(seen["post"], post);
    // NaN comes last, and of equals the lower token first.
    let capped = |logit: f32| (4.0 * (f64::from(logit) * 0.5 / 4.0).tanh()) as f32;
    let top =
        [1.0, capped(117.0), 2.0, capped(117.0), 1.0, capped(208.0), 2.0, capped(208.0), 0.0, capped(29.0)];
    assert_eq!(seen["top"][..10], top);
    assert_eq!(seen["top"][10..], [1.0, capped(8.0)]);
    // Behind token 0, which is known; behind candidates 1 and 2; behind token 3, which is known.
    let pair = |top: usize, p: f32, h: f32, s: f32| seen["top"][top * 2 + 1] + p * h * s;
    let expected = [
        [pair(0, 1.0, 46.0, 7.0), pair(1, 1.0, 46.0, 11.0)],
        [pair(0, 1.0, 46.0, 7.0), pair(1, 1.0, 46.0, 11.0)],
        [pair(2, 2.0, 52.0, 7.0), pair(3, 2.0, 52.0, 11.0)],
        [pair(2, 3.0, 52.0, 7.0), pair(3, 3.0, 52.0, 11.0)],
        [pair(4, 4.0, 29.0, 5.0), pair(5, 4.0, 29.0, 7.0)],
        [pair(4, 4.0, 29.0, 5.0), pair(5, 4.0, 29.0, 7.0)],
    ];
    assert_eq!(seen["pairs"], expected.concat());
    let text = graph.to_string();
    assert_eq!(tilec_ir::graph::parse(&text).unwrap().to_string(), text);
    // What does not fit: groups that do not divide, more candidates than tokens, tables of other tokens.
    let refused = |op, operands: &[_]| graph.clone().add("bad", None, op, operands).unwrap_err().to_string();
    let error = refused(Op::DynamicConv { weight: "base".into(), side: 0, group: 3 }, &[x, own]);
    assert!(error.contains("groups of 3 of 2 columns"), "{error}");
    let error = refused(Op::TopK { k: 5, factor: 1.0, softcap: None }, &[logits]);
    assert!(error.contains("5 of 4 columns"), "{error}");
    let error = refused(Op::TopK { k: 2, factor: 0.0, softcap: None }, &[logits]);
    assert!(error.contains("must be above 0"), "{error}");
    let mut short = graph.clone();
    short.weights.get_mut("p").unwrap().shape = vec![3, 1];
    let errors = tilec_ir::graph::verify(&short).unwrap_err();
    assert!(errors.iter().any(|error| error.to_string().contains("3 and 4 tokens")), "{errors:?}");
    short.weights.get_mut("s").unwrap().shape = vec![3, 1];
    let errors = tilec_ir::graph::verify(&short).unwrap_err();
    assert!(errors.iter().any(|error| error.to_string().contains("its candidates are of 4")), "{errors:?}");
}
