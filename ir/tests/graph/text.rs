use crate::llama;
use proptest::prelude::*;
use tilec_ir::abi::KvType;
use tilec_ir::format::{Code, Format};
use tilec_ir::graph::{
    ActivationFn, Cache, Graph, NodeId, Op, RopeScaling, RopeSpec, Router, Scoring, Slice, View, Weight,
    parse,
};

#[test]
fn a_llama_reads_well() {
    insta::assert_snapshot!(llama(2, KvType::F16));
}

/// Everything that a graph says, apart from ids: they follow the order of the text.
fn assert_same(a: &Graph, b: &Graph) {
    assert_eq!(a.name, b.name);
    assert_eq!(a.weights, b.weights);
    assert_eq!(a.ropes, b.ropes);
    assert_eq!(a.caches, b.caches);
    let nodes = |graph: &Graph| -> Vec<_> {
        let name = |id: NodeId| graph.node(id).name.clone();
        let order = graph.topological().unwrap();
        order
            .into_iter()
            .map(|id| (graph.node(id).clone(), graph.operands(id).into_iter().map(name).collect::<Vec<_>>()))
            .collect()
    };
    assert_eq!(nodes(a), nodes(b));
}

#[test]
fn what_is_printed_is_read_back() {
    let graph = llama(3, KvType::Bf16);
    let text = graph.to_string();
    let again = parse(&text).unwrap();
    assert_same(&graph, &again);
    assert_eq!(again.to_string(), text);
}

#[test]
fn blanks_comments_and_left_out_types_do_not_matter() {
    let graph = parse(
        "# before\ngraph \"a \\\"b\\\"\"{weight \"w\"[2,\n 4 ]bf16#c\n%\"x y\"=embed()weight=\"w\"\n\
         layer 7{%n=quantize(%\"x y\"):q8[ rows ,4]}}  # after",
    )
    .unwrap();
    insta::assert_snapshot!(graph, @r##"
    graph "a \"b\"" {
      weight "w" [2, 4] bf16

      %"x y" = embed() weight="w" : f32[rows, 4]
      layer 7 {
        %n = quantize(%"x y") : q8[rows, 4]
      }
    }
    "##);
}

#[test]
fn a_format_without_a_name_is_an_object() {
    let odd = Format { block: 64, ..Format::Q4_0 };
    let mut graph = Graph::new("odd");
    graph.declare_weight("w", Weight { format: odd, ..Weight::whole([2, 64], Format::BF16) }).unwrap();
    let text = graph.to_string();
    assert!(text.contains(r#" bf16 as {"code":"u4","zero":8,"block":64,"#), "{text}");
    assert_same(&graph, &parse(&text).unwrap());
}

#[test]
fn a_graph_with_a_cycle_still_prints() {
    let mut graph = llama(1, KvType::F32);
    let (x, out) = (graph.find("l0.attn_norm").unwrap(), graph.find("l0.out").unwrap());
    graph.replace_operand(x, 0, out);
    let text = graph.to_string();
    assert!(text.contains("# not in order: graph \"tiny llama\", %l0.attn_norm: lies on a cycle"), "{text}");
    assert!(text.contains("%l0.attn_norm = rms_norm(%l0.out)"), "{text}");
    let error = parse(&text).unwrap_err();
    assert_eq!(error.what, "%l0.out is not the name of a value above");
}

/// Texts that are no graph, and the place and the words of the error.
const BROKEN: &[(&str, usize, usize, &str)] = &[
    ("", 1, 1, "expected `graph`, found the end"),
    ("grap \"x\" {}", 1, 1, "expected `graph`, found `grap`"),
    ("graph x {}", 1, 7, "expected the graph's name in quotes, found `x`"),
    ("graph \"x\" {", 1, 12, "`layer`, a `%value` or `}`, found the end"),
    ("graph \"x\" {}\n\n# more\n  more", 4, 3, "expected the end of the text, found `more`"),
    ("graph \"x\" {\n  wait \"w\" [2] f32\n}", 2, 3, "expected `weight`, `rope`, `cache`"),
    ("graph \"x\" {\n  weight \"w\" [2, -4] f32\n}", 2, 18, "expected an extent, a whole number"),
    ("graph \"x\" {\n  weight \"w\" [2 4] f32\n}", 2, 17, "expected `,` or `]`, found `4]`"),
    ("graph \"x\" {\n  weight \"w\" [2, 4] f33\n}", 2, 21, "expected a format: f32, f16, bf16"),
    ("graph \"x\" {\n  weight \"w [2, 4] f32", 2, 10, "expected a JSON value (EOF while parsing a string)"),
    (
        "graph \"x\" {\n  weight \"w\" [2] f32\n  weight \"w\" [2] f32\n}",
        3,
        10,
        "weight \"w\" is declared twice",
    ),
    (
        "graph \"x\" {\n  rope \"r\" dims=3 theta=1.0 scaling={\"type\":\"none\"}\n}",
        2,
        8,
        "rope \"r\": 3 dims are not whole pairs",
    ),
    ("graph \"x\" {\n  rope \"r\" dims=4 theta=1.0\n}", 2, 8, "rope: missing field `scaling`"),
    (
        "graph \"x\" {\n  cache 1 kv_heads=1 qk_dim=1 v_dim=1 kv_type=\"f16\"\n}",
        2,
        9,
        "expected cache 0: caches are numbered from 0 without gaps, found `1`",
    ),
    (
        "graph \"x\" {\n  cache 0 kv_heads=1 qk_dim=1 v_dim=1 kv_type=\"f8\"\n}",
        2,
        9,
        "cache: unknown variant `f8`",
    ),
    ("graph \"x\" {\n  layer 0 {\n    weight\n  }\n}", 3, 5, "expected a `%value` or `}`, found `weight`"),
    ("W %x embed()", 2, 6, "expected `=`, found `embed()`"),
    ("W % = embed()", 2, 3, "expected a name behind `%`"),
    ("W %x = embed() weight=w", 2, 23, "expected a JSON value (expected value)"),
    ("W %x = embed() weight=\"w\" wait=1", 2, 27, "embed has no attribute `wait` of this value"),
    ("W %x = embed() weight=\"w\" weight=\"w\"", 2, 27, "attribute `weight` is given twice"),
    ("W %x = embed()", 2, 8, "embed: missing field `weight`"),
    ("W %x = embod() weight=\"w\"", 2, 8, "embod: unknown variant `embod`"),
    ("W %x = embed() weight=\"v\"", 2, 3, "%x: weight \"v\" is not declared"),
    ("W %x = embed() weight=\"w\" : f32[rows, 5]", 2, 29, "expected f32[rows, 4], not f32[rows, 5]"),
    ("W %x = embed() weight=\"w\" : f32[rows; 4]", 2, 37, "expected `,`, found `;`"),
    ("W %x = embed() weight=\"w\" : f64[rows, 4]", 2, 29, "expected a type: `f32[rows, cols]`"),
    ("W %x = add(%y, %y)", 2, 12, "%y is not the name of a value above"),
    ("W %x = embed() weight=\"w\" %x = embed() weight=\"w\"", 2, 27, "%x: this name is taken"),
    ("W %é = embed()", 2, 3, "expected a name behind `%`, found `%é`"),
    ("W %\"é\" = embed() weight=", 3, 1, "expected a JSON value"),
];

#[test]
fn errors_say_where_and_what() {
    let mut surprises = Vec::new();
    for (text, line, column, what) in BROKEN {
        let text = match text.strip_prefix("W ") {
            Some(node) => format!("graph \"x\" {{ weight \"w\" [2, 4] f32\n  {node}\n}}"),
            None => text.to_string(),
        };
        let error = parse(&text).expect_err(&text);
        if (error.line, error.column) != (*line, *column) || !error.what.contains(what) {
            surprises.push(format!("{text}\n{error}\nnot {line}:{column}: {what}"));
        }
    }
    assert!(surprises.is_empty(), "{}", surprises.join("\n\n"));
}

#[test]
fn sizes_that_overflow_are_errors() {
    let text = r#"graph "x" {
        weight "w" [2, 4] f32
        cache 0 kv_heads=9223372036854775807 qk_dim=4 v_dim=4 kv_type="f32"
        %x = embed() weight="w"
        %kv = kv_write(%x, %x) cache=0
    }"#;
    let error = parse(text).unwrap_err();
    assert!(error.what.contains("more than can be counted"), "{error}");
}

fn positive_f64() -> impl Strategy<Value = f64> {
    any::<f64>().prop_map(f64::abs).prop_filter("a positive number", |x| x.is_finite() && *x > 0.0)
}

fn finite_f32() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("a finite number", |x| x.is_finite())
}

fn scaling() -> impl Strategy<Value = RopeScaling> {
    prop_oneof![
        Just(RopeScaling::None),
        positive_f64().prop_map(|factor| RopeScaling::Linear { factor }),
        (positive_f64(), 1.0..4.0f64, 1usize..1 << 40).prop_map(|(factor, low, original_context)| {
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: low * 4.0,
                original_context,
            }
        }),
        (positive_f64(), positive_f64(), 1usize..1 << 40, any::<bool>()).prop_map(
            |(factor, beta_fast, original_context, truncate)| RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow: 1.0,
                original_context,
                attention_factor: 0.1 * factor.ln().abs() + 1.0,
                truncate,
            }
        ),
        proptest::collection::vec(finite_f32().prop_map(|x| x.abs().max(1e-30)), 2)
            .prop_map(|factors| RopeScaling::Factors { factors }),
    ]
}

fn format() -> impl Strategy<Value = Format> {
    prop_oneof![
        4 => (0..Format::NAMED.len()).prop_map(|i| Format::NAMED[i].1),
        1 => (0i32..256, 1usize..100)
            .prop_map(|(zero, block)| Format { code: Code::U4, zero, block, ..Format::Q8_0 }),
    ]
}

/// What one operator is made of: which, operands, a float, a name, a layer.
type Draft = (usize, usize, usize, f32, String, Option<usize>);

/// A graph of whatever of these drafts the shape rules allow. It need not pass the verifier.
fn build(name: String, weights: Vec<(String, Format, Format)>, rope: RopeSpec, drafts: Vec<Draft>) -> Graph {
    let mut graph = Graph::new(name);
    graph.ropes.insert("some rope".into(), rope);
    graph.caches.push(Cache { kv_heads: 2, qk_dim: 4, v_dim: 4, kv_type: KvType::F16 });
    let mut matrices = vec!["w".to_string()];
    let square = |stored, format| Weight { format, ..Weight::whole([8, 8], stored) };
    graph.declare_weight("w", square(Format::F32, Format::F32)).unwrap();
    let vector = Weight::whole([8], Format::F32);
    graph.declare_weight("v", vector).unwrap();
    graph.declare_weight("experts.{}.w", Weight::whole([8, 8, 8], Format::MXFP4)).unwrap();
    graph.declare_weight("sides", Weight::whole([2, 2, 8], Format::BF16)).unwrap();
    let view = Some(View { tensor: "all biases".into(), start: 1, block: 1, stride: 2 });
    let slice = Some(Slice { start: vec![0, 8], of: vec![8, 24] });
    graph
        .declare_weight("experts[b]", Weight { view, slice, ..Weight::whole([8, 8], Format::BF16) })
        .unwrap();
    for (name, stored, format) in weights {
        if graph.declare_weight(&name, square(stored, format)).is_ok() {
            matrices.push(name);
        }
    }
    let mut ids = vec![graph.add("first", None, Op::Embed { weight: "w".into() }, &[]).unwrap()];
    for (which, a, b, number, name, layer) in drafts {
        let (one, two) = (ids[a % ids.len()], ids[b % ids.len()]);
        let weight = matrices[b % matrices.len()].clone();
        let (op, operands) = match which {
            0 => (Op::Embed { weight }, vec![]),
            1 => (Op::RmsNorm { weight: "v".into(), eps: number.abs() }, vec![one]),
            2 => (Op::Linear { weight }, vec![one]),
            3 => (Op::Bias { weight: "v".into() }, vec![one]),
            4 => (Op::Rope { rope: "some rope".into(), head_dim: 4 }, vec![one]),
            5 => (Op::KvWrite { cache: 0 }, vec![one, two]),
            6 => {
                let window = (b % 3 > 0).then_some(b + 1);
                (
                    Op::Attention {
                        cache: 0,
                        heads: 2,
                        scale: number,
                        window,
                        sinks: None,
                        bidirectional: false,
                    },
                    vec![one, two],
                )
            }
            7 => (Op::Gated { activation: ActivationFn::Silu }, vec![one, two]),
            8 => (Op::Add, vec![one, two]),
            9 => (Op::SelectRows, vec![one]),
            10 => (Op::Quantize, vec![one]),
            11 => (Op::Scale { factor: number }, vec![one]),
            12 => {
                let scoring = [Scoring::Softmax, Scoring::ChosenSoftmax, Scoring::Sigmoid][b % 3];
                let correction = (b % 6 == 5).then(|| "v".to_string());
                let renormalize = b % 2 == 0;
                let router = Router { scoring, renormalize, top_k: b % 8 + 1, factor: number, correction };
                (Op::Route(router), vec![one])
            }
            13 => (Op::ExpertLinear { weight: "experts.{}.w".into(), per_slot: b % 2 == 0 }, vec![one, two]),
            14 => (Op::ExpertBias { weight: "experts[b]".into() }, vec![one, two]),
            15 => (Op::Combine, vec![one, two]),
            16 => {
                let activation = ActivationFn::Clamped { alpha: number, limit: number.abs() };
                (Op::Gated { activation }, vec![one, two])
            }
            17 => (Op::AllReduce { ranks: b % 9 }, vec![one]),
            18 => {
                let op = Op::DynamicConv { weight: "sides".into(), side: b % 3, group: b % 9 };
                (op, vec![one, two])
            }
            19 => {
                let softcap = (b % 2 == 0).then_some(number.abs());
                (Op::TopK { k: b % 70, factor: number, softcap }, vec![one])
            }
            20 => {
                let op = Op::PairScores { predecessor: weight, successor: "w".into() };
                (op, vec![one, two])
            }
            _ => (Op::Logits, vec![one]),
        };
        ids.extend(graph.add(name, layer, op, &operands));
    }
    graph
}

fn graphs() -> impl Strategy<Value = Graph> {
    let name = || prop_oneof![3 => "[A-Za-z0-9_.-]{1,12}", 1 => any::<String>()];
    let weights = proptest::collection::vec((name(), format(), format()), 0..4);
    let rope = (positive_f64(), scaling()).prop_map(|(theta, scaling)| RopeSpec { dims: 4, theta, scaling });
    let layer = proptest::option::of(0usize..3);
    let draft = (0usize..22, any::<usize>(), 0usize..1000, finite_f32(), name(), layer);
    (name(), weights, rope, proptest::collection::vec(draft, 0..40))
        .prop_map(|(name, weights, rope, drafts)| build(name, weights, rope, drafts))
}

proptest! {
    #[test]
    fn any_graph_is_read_back(graph in graphs()) {
        let text = graph.to_string();
        let again = parse(&text).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
        assert_same(&graph, &again);
        prop_assert_eq!(again.to_string(), text);
    }

    #[test]
    fn a_changed_text_is_an_error_and_no_panic(at in any::<prop::sample::Index>(), c in any::<char>()) {
        let mut chars: Vec<char> = llama(1, KvType::F32).to_string().chars().collect();
        let at = at.index(chars.len());
        chars[at] = c;
        let text: String = chars.into_iter().collect();
        if let Err(error) = parse(&text) {
            prop_assert!((1..=text.lines().count() + 1).contains(&error.line), "{}", error);
        }
    }

    #[test]
    fn a_cut_text_is_an_error(at in any::<prop::sample::Index>()) {
        let text = llama(1, KvType::F32).to_string();
        let cut = &text[..at.index(text.len() - 1)];
        prop_assert!(parse(cut).is_err());
    }
}
