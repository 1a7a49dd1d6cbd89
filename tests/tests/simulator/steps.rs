//! Steps of small models on the simulated machine against the interpreter: logits within rounding, and the same
//! bits whatever the order of blocks and copies, the number of blocks, the neighbours, the steps of a launch.

use super::{
    Simulation, Weights, deviation, gpt_oss, llama, long, mimo_fused, qwen3_moe, row, short_experts,
};
use serde_json::Value;
use std::borrow::Cow;
use tilec_codegen::frontends;
use tilec_codegen::passes::resident::Sizes;
use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_ir::resident::{Experts, Kind, Stage};
use tilec_ir::spec::{Activations, ModelSpec, Shard, WeightFormat};
use tilec_ir::stages::Slot;

/// Six rows of one sequence and two of another.
fn first_rows() -> Vec<Row> {
    wide_rows(8)
}

/// Three quarters of so many rows of one sequence, the others of another.
fn wide_rows(count: usize) -> Vec<Row> {
    let first = count * 3 / 4;
    let one = (0..first).map(|n| row(n as u32 * 7 % 24, n, 0));
    one.chain((0..count - first).map(|n| row((3 + n as u32 * 6) % 24, n, 1))).collect()
}

/// Sizes of a small kernel with so many rows a step.
fn sizes(step_rows: usize) -> Sizes {
    Sizes { context: 256, step_rows }
}

/// One step of rows, in two orders; `seeds` are those of further orders that have to give the same bits, in the cache
/// as well.
fn check_step(
    simulation: &Simulation,
    interpreter: &mut Interpreter<'_>,
    rows: &[Row],
    [number, seeds]: [usize; 2],
    bound: f64,
) {
    let wanted: Vec<usize> = (0..rows.len()).collect();
    let wanted = interpreter.step(rows, &wanted).unwrap();
    let before = simulation.cache();
    let found = simulation.launch(rows, 1, 3 + number, number as u64);
    let off = deviation(&found.logits, &wanted, simulation.program.vocab);
    assert!(off < bound, "step {number}: off by {off}");
    let cache = simulation.cache();
    for seed in 10..10 + seeds {
        simulation.write_cache(&before);
        let again = simulation.launch(rows, 1, 2 + seed % 5, seed as u64);
        assert!(again.logits == found.logits, "step {number}: seed {seed} has other bits");
        assert!(simulation.cache() == cache, "step {number}: seed {seed} has another cache");
    }
}

/// One step: rows so long that they take the simulator long.
fn check_long(config: &Value, weights: Format, experts: Option<Format>, bound: f64) {
    let simulation = Simulation::new(config, weights, experts, 256);
    let weights = Weights(&simulation);
    let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
    check_step(&simulation, &mut interpreter, &first_rows(), [0, 1], bound);
}

/// Two steps, each in `seeds` further orders; rows alone; three steps of one launch.
fn check_steps(config: &Value, weights: Format, experts: Option<Format>, seeds: usize, bound: f64) {
    check_wide_steps(config, weights, experts, 8, seeds, bound);
}

/// The same with a kernel of so many rows a step, which steps fill but for one.
fn check_wide_steps(
    config: &Value,
    weights: Format,
    experts: Option<Format>,
    step_rows: usize,
    seeds: usize,
    bound: f64,
) {
    let simulation = Simulation::new(config, weights, experts, sizes(step_rows));
    let vocab = simulation.program.vocab;
    let weights = Weights(&simulation);
    let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
    let first = wide_rows(step_rows);
    let (one, other) = (step_rows * 3 / 4, step_rows / 4);
    let more = step_rows / 2;
    let second: Vec<Row> = (one..one + more - 1)
        .map(|n| row(n as u32 * 7 % 24, n, 0))
        .chain((other..other + more).map(|n| row(n as u32 * 5 % 24, n, 1)))
        .collect();
    for (number, rows) in [first, second].into_iter().enumerate() {
        check_step(&simulation, &mut interpreter, &rows, [number, seeds], bound);
    }
    // The second sequence's rows alone.
    let ends: Vec<Row> = [row(1, one + more - 1, 0), row(2, other + more, 1)].into();
    let before = simulation.cache();
    let both = simulation.launch(&ends, 1, 4, 20);
    simulation.write_cache(&before);
    let alone = simulation.launch(&ends[1..], 1, 4, 21);
    assert!(alone.logits == both.logits[vocab..], "alone and in company differ");
    // Three steps of one launch choose what three launches choose.
    simulation.write_cache(&before);
    let launched = simulation.launch(&ends, 3, 4, 22);
    simulation.write_cache(&before);
    let mut rows = ends.clone();
    for step in 0..3 {
        let single = simulation.launch(&rows, 1, 5, 23 + step);
        assert_eq!(single.chosen, launched.chosen[step as usize * 2..][..2], "step {step}");
        for (row, token) in rows.iter_mut().zip(&single.chosen) {
            (row.token, row.position) = (*token, row.position + 1);
        }
    }
}

#[test]
fn llama_in_bf16() {
    check_steps(&llama(), Format::BF16, None, 3, 0.03);
}

#[test]
fn llama_in_f16() {
    check_steps(&llama(), Format::F16, None, 1, 0.01);
}

#[test]
fn llama_in_fp8() {
    check_steps(&llama(), Format::FP8_BLOCK, None, 1, 0.03);
}

/// Readers of the same rows that want their columns in different orders get them in none of these.
#[test]
fn layers_that_are_stored_differently_share_rows() {
    let config = llama();
    let mut tensors = frontends::synthetic_tensors(&config, Format::BF16).unwrap();
    for (name, info) in &mut tensors {
        let read = ["layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"];
        if read.iter().any(|read| name.ends_with(read)) {
            info.format = Format::FP8_CHANNEL;
        }
    }
    let mut spec = ModelSpec::for_checkpoint("unused").precision;
    (spec.activations, spec.kv_cache) = (Activations::F32, Some(KvType::Bf16));
    spec.weights = WeightFormat::AsStored;
    let simulation = Simulation::stored(&config, tensors, &spec, sizes(8), None);
    let readers = |name: &str| {
        let program = &simulation.program;
        let gemms = program.bodies.iter().flatten().filter_map(|stage| stage.kind.gemm());
        let read = gemms.filter(|gemm| program.buffer(gemm.input).name == name);
        read.map(|gemm| (gemm.input, gemm.format)).collect::<Vec<_>>()
    };
    for name in ["attn", "act"] {
        let [(one, codes), (other, halves)] = readers(name)[..] else {
            panic!("{name}: {:?}", readers(name))
        };
        assert_eq!((one, codes, halves), (other, Format::FP8_CHANNEL, Format::BF16), "{name}");
    }
    let weights = Weights(&simulation);
    let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
    check_step(&simulation, &mut interpreter, &first_rows(), [0, 1], 0.03);
}

/// The same rows by kernels of 8 and of so many rows a step have the same bits, beside other rows as well. (Where rows are
/// multiplied in parts, these are others, and so are the bits; or where a product has two teams of one kernel's consumers
/// and one of the other's, as with 65 blocks of halves.)
fn check_widths(config: &Value, weights: Format, experts: Option<Format>, widths: &[usize]) {
    let rows = first_rows();
    let narrow = Simulation::new(config, weights, experts, sizes(8)).launch(&rows, 1, 3, 1);
    for &step_rows in widths {
        let wide = Simulation::new(config, weights, experts, sizes(step_rows));
        let before = wide.cache();
        let alone = wide.launch(&rows, 1, 4, 2);
        assert!(alone.logits == narrow.logits, "{step_rows} rows a step have other bits");
        wide.write_cache(&before);
        // Another sequence's rows in front.
        let others = step_rows - rows.len();
        let all: Vec<Row> =
            (0..others).map(|n| row(n as u32 * 3 % 24, n, 2)).chain(rows.iter().copied()).collect();
        let company = wide.launch(&all, 1, 5, 3);
        assert!(
            company.logits[others * wide.program.vocab..] == narrow.logits,
            "{step_rows}: company changes bits"
        );
    }
}

#[test]
fn width_changes_no_bit_of_llama() {
    for weights in [Format::BF16, Format::F16, Format::FP8_BLOCK] {
        check_widths(&llama(), weights, None, &[16, 32]);
    }
}

#[test]
fn width_changes_no_bit_of_a_mixture() {
    check_widths(&qwen3_moe(), Format::BF16, Some(Format::MXFP4), &[16, 32]);
    check_widths(&gpt_oss(), Format::F16, Some(Format::F16), &[16, 32]);
}

#[test]
fn sixteen_rows_of_llama() {
    check_wide_steps(&llama(), Format::BF16, None, 16, 2, 0.03);
    check_wide_steps(&llama(), Format::F16, None, 16, 0, 0.01);
}

#[test]
fn thirty_two_rows_of_llama() {
    check_wide_steps(&llama(), Format::BF16, None, 32, 1, 0.03);
    check_wide_steps(&llama(), Format::FP8_BLOCK, None, 32, 0, 0.03);
}

#[test]
fn sixteen_rows_of_gpt_oss() {
    check_wide_steps(&gpt_oss(), Format::F16, Some(Format::F16), 16, 1, 0.01);
}

#[test]
fn sixteen_rows_of_qwen3_moe() {
    check_wide_steps(&qwen3_moe(), Format::BF16, Some(Format::MXFP4), 16, 1, 0.03);
}

#[test]
fn thirty_two_rows_of_mimo() {
    check_wide_steps(&mimo_fused(), Format::FP8_BLOCK, Some(Format::MXFP4), 32, 1, 0.03);
}

#[test]
fn wide_steps_of_long_rows() {
    for (weights, step_rows) in [(Format::BF16, 16), (Format::FP8_BLOCK, 16), (Format::BF16, 32)] {
        let simulation = Simulation::new(&long(40, 4168), weights, None, sizes(step_rows));
        let weights = Weights(&simulation);
        let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
        check_step(&simulation, &mut interpreter, &wide_rows(step_rows), [0, 1], 0.03);
    }
}

/// Rows for a norm that are longer than a part, and of more squares than a warp asks for at a time.
#[test]
fn wide_steps_of_long_norms() {
    for (hidden, step_rows) in [(2056, 32), (4104, 16)] {
        let simulation = Simulation::new(&long(hidden, 16), Format::BF16, None, sizes(step_rows));
        let weights = Weights(&simulation);
        let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
        check_step(&simulation, &mut interpreter, &wide_rows(step_rows), [0, 1], 0.03);
    }
}

/// Several octets a tile: their sums over all experts stay in control's registers, of two slices. Of the longer ones there are
/// no registers for the next expert's rows.
#[test]
fn wide_steps_of_short_experts() {
    for intermediate in [72, 600] {
        let mut config = short_experts();
        config["moe_intermediate_size"] = intermediate.into();
        let simulation = Simulation::new(&config, Format::BF16, Some(Format::MXFP4), sizes(16));
        let octets = simulation.program.bodies.iter().flatten().filter_map(|stage| match &stage.kind {
            Kind::Experts(experts) => Some(experts.tile_octets()),
            _ => None,
        });
        assert!(octets.max().unwrap() > 1, "no tile has several octets");
        let weights = Weights(&simulation);
        let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
        check_step(&simulation, &mut interpreter, &wide_rows(16), [0, 1], 0.03);
    }
}

#[test]
fn long_rows_in_bf16() {
    check_long(&long(40, 8264), Format::BF16, None, 0.03);
}

#[test]
fn long_rows_in_fp8() {
    check_long(&long(40, 8264), Format::FP8_BLOCK, None, 0.03);
}

#[test]
fn long_norms_in_f16() {
    check_long(&long(8264, 16), Format::F16, None, 0.01);
}

#[test]
fn gpt_oss_in_f16() {
    check_steps(&gpt_oss(), Format::F16, Some(Format::F16), 1, 0.01);
}

#[test]
fn qwen3_moe_with_mxfp4() {
    check_steps(&qwen3_moe(), Format::BF16, Some(Format::MXFP4), 1, 0.03);
}

#[test]
fn short_experts_in_mxfp4() {
    check_long(&short_experts(), Format::BF16, Some(Format::MXFP4), 0.03);
}

/// Octets of two blocks: a warp multiplies both, of one expert, with 8 rows a step; two warps do, with 16. It is the same.
#[test]
fn short_experts_of_two_blocks() {
    let mut config = short_experts();
    config["moe_intermediate_size"] = 200.into();
    check_long(&config, Format::BF16, Some(Format::MXFP4), 0.03);
    // With 32 rows a step those of attention are multiplied in parts.
    check_widths(&config, Format::BF16, Some(Format::MXFP4), &[16]);
}

/// Second products by strips: bands that begin and end within tiles, and that are a tile each; many strips of few octets, in a
/// last tile that not all warps have one of; and more octets of a band than there are warps.
#[test]
fn bands_of_experts() {
    for (hidden, intermediate, octets, experts) in [
        (2048, 1160, 4, Format::NVFP4),
        (512, 1024, 2, Format::MXFP4),
        (64, 4200, 2, Format::MXFP4),
        (800, 10_880, 10, Format::MXFP4),
    ] {
        let mut config = short_experts();
        config["hidden_size"] = hidden.into();
        config["moe_intermediate_size"] = intermediate.into();
        let simulation = Simulation::new(&config, Format::BF16, Some(experts), sizes(8));
        let bands = simulation.program.bodies.iter().flatten().find_map(|stage| match &stage.kind {
            Kind::Experts(experts) => experts.bands,
            _ => None,
        });
        assert_eq!(bands.map(|bands| bands.octets), Some(octets), "{hidden} x {intermediate}");
        check_long(&config, Format::BF16, Some(experts), 0.03);
        // The last takes long, and has nothing of its own in wide steps.
        if octets <= 8 {
            check_widths(&config, Format::BF16, Some(experts), &[16]);
        }
    }
}

/// An odd number of long octets is no band: an expert's rows, of words that may be late, have no registers beside those that
/// are multiplied.
#[test]
fn long_experts_without_bands() {
    let mut config = short_experts();
    config["hidden_size"] = 72.into();
    config["moe_intermediate_size"] = 4200.into();
    check_long(&config, Format::BF16, Some(Format::MXFP4), 0.03);
}

/// Pairs of octets that come as one: both in a slot, and in three slots of which they share the second.
#[test]
fn joined_pairs_of_octets() {
    for (hidden, experts) in [(1024, Format::NVFP4), (6144, Format::MXFP4)] {
        let mut config = short_experts();
        config["hidden_size"] = hidden.into();
        check_long(&config, Format::BF16, Some(experts), 0.03);
    }
}

/// Scores with biases, of the router and of the product that they are made by, in layers that share a text; and biases of wide
/// tiles.
#[test]
fn routers_of_gpt_oss_through_attention() {
    let mut config = gpt_oss();
    // Every row takes all experts, so that no rounding of a router's input decides; their weights are what scores make of them.
    config["num_local_experts"] = 8.into();
    config["num_experts_per_tok"] = 8.into();
    let made = |config: &Value| {
        let simulation = Simulation::new(config, Format::BF16, Some(Format::MXFP4), sizes(8));
        let mut stages = simulation.program.bodies.iter().flatten();
        stages.any(|stage| {
            stage.kind.attention().is_some_and(|of| of.router.as_ref().is_some_and(|own| own.added.is_some()))
        })
    };
    assert!(made(&config), "no scores are made behind attention");
    check_steps(&config, Format::BF16, Some(Format::MXFP4), 1, 0.03);
    check_wide_steps(&config, Format::BF16, Some(Format::MXFP4), 16, 0, 0.03);
    check_ranks(&config, Format::BF16, Format::BF16, 0.03);
    for (key, value) in [
        ("hidden_size", 3072),
        ("intermediate_size", 1184),
        ("num_hidden_layers", 1),
        ("num_local_experts", 4),
        ("num_experts_per_tok", 4),
    ] {
        config[key] = value.into();
    }
    config["layer_types"] = ["full_attention"].into_iter().collect();
    check_long(&config, Format::BF16, Some(Format::MXFP4), 0.03);
}

/// An odd number of short octets is no tile.
#[test]
fn odd_numbers_of_short_octets() {
    let mut config = short_experts();
    config["hidden_size"] = 2088.into();
    check_long(&config, Format::BF16, Some(Format::MXFP4), 0.03);
}

#[test]
fn mimo_in_fp8_with_mxfp4() {
    check_steps(&mimo_fused(), Format::FP8_BLOCK, Some(Format::MXFP4), 1, 0.03);
}

/// Heads as wide as the real ones: attention does not look whether its words are written, but products and experts around
/// it do; of a whole model and of a rank.
#[test]
fn mimo_with_wide_heads() {
    let mut config = mimo_fused();
    for (key, value) in [
        ("num_attention_heads", 4),
        ("num_key_value_heads", 2),
        ("swa_num_key_value_heads", 4),
        ("head_dim", 192),
        ("v_head_dim", 128),
        ("intermediate_size", 256),
        ("moe_intermediate_size", 64),
    ] {
        config[key] = value.into();
    }
    for weights in [Format::FP8_BLOCK, Format::BF16] {
        let program = Simulation::new(&config, weights, Some(Format::MXFP4), sizes(8)).program;
        let handoffs = program.handoffs();
        let checked = |kind: fn(&Kind) -> bool| {
            let stages = program.sequence();
            stages
                .iter()
                .zip(&handoffs)
                .any(|((_, _, stage), handoff)| kind(&stage.kind) && handoff.checked())
        };
        assert!(!checked(|kind| matches!(kind, Kind::Attention(_))));
        assert!(
            checked(|kind| matches!(kind, Kind::Gemm(_))) && checked(|kind| matches!(kind, Kind::Experts(_)))
        );
        check_steps(&config, weights, Some(Format::MXFP4), 1, 0.03);
    }
    check_ranks(&config, Format::FP8_BLOCK, Format::MXFP4, 0.03);
}

/// Two layers with experts and as many KV heads share a text, though they differ in windows, rotations and sinks.
#[test]
fn layers_of_mimo_that_share_a_text() {
    let mut config = mimo_fused();
    config["swa_num_key_value_heads"] = config["num_key_value_heads"].clone();
    config["moe_layer_freq"] = [1, 1].into_iter().collect();
    check_steps(&config, Format::BF16, Some(Format::MXFP4), 1, 0.03);
}

/// Experts that chance chooses for 8 rows, 3 each in two layers: all alike, one alike, each by itself.
#[test]
fn experts_by_chance() {
    let simulation = Simulation::new(&qwen3_moe(), Format::BF16, Some(Format::MXFP4), 256);
    let streamed = [1001, 335, 1].map(|routing| {
        let [one, again] = [5, 6].map(|seed| simulation.launch_routed(&first_rows(), 1, 3, seed, routing));
        assert!(one.logits.iter().all(|logit| logit.is_finite()), "{routing}");
        assert!(one.logits == again.logits && one.experts == again.experts, "{routing}");
        one.experts
    });
    assert_eq!(streamed[0], 2 * 3);
    assert!(streamed[1] <= 2 * (1 + 8 * 2) && streamed[2] <= 2 * 8 * 3, "{streamed:?}");
    assert!(streamed.is_sorted() && streamed[2] > 2 * 12, "{streamed:?}");
}

/// Experts of halves are foreseen, an expert of each row, some or all of them, by scores that order them alone, with biases,
/// and by sigmoids with corrections: rightly or not, no bit depends on it. (Seeds choose what is foreseen; see `entry.h`.)
#[test]
fn forecasts_change_no_bit() {
    for mut config in [qwen3_moe(), gpt_oss(), mimo_fused()] {
        // As many as make whole octets of scores.
        for key in ["num_local_experts", "n_routed_experts"] {
            if let Some(experts) = config.get_mut(key) {
                *experts = 8.into();
            }
        }
        check_steps(&config, Format::BF16, Some(Format::BF16), 2, 0.03);
        let name = &config["model_type"];
        let simulation = Simulation::new(&config, Format::BF16, Some(Format::BF16), sizes(8));
        let foreseen = |stage: &Stage| match &stage.kind {
            Kind::Experts(Experts { route: Some(route), .. }) => {
                route.unscaled.is_some_and(|of| of.foreseen.is_some())
            }
            _ => false,
        };
        let layers = simulation.program.layers.iter();
        let layers =
            layers.filter(|layer| simulation.program.bodies[layer.body].iter().any(foreseen)).count() as u32;
        assert!(layers > 0, "{name}: nothing is foreseen");
        let cache = simulation.cache();
        let launch = |rows: &[Row], seed: u64, blocks: usize| {
            simulation.write_cache(&cache);
            simulation.launch(rows, 1, blocks, seed)
        };
        // Of each row alone, so that no expert is right for another row's sake.
        let (mut all_foreseen, mut right, mut late) = (0, 0, 0);
        for token in 0..8 {
            let [none, one, all] = [4, 5, 7].map(|seed| launch(&[row(token * 3, 0, 0)], seed, 3));
            assert_eq!((none.foreseen, one.foreseen[0]), ([0, 0], layers), "{name}");
            assert_eq!(all.foreseen[0], none.experts, "{name}: as many as are chosen");
            assert!(one.logits == none.logits && all.logits == none.logits, "{name}");
            (all_foreseen, right) =
                (all_foreseen + all.foreseen[0], right + all.foreseen[0] - all.foreseen[1]);
            late += none.experts + one.foreseen[1] - one.foreseen[0];
        }
        // Far more of them than of any experts, but not all.
        let kinds = simulation.program.bodies.iter().flatten();
        let experts = kinds.clone().find_map(|stage| match &stage.kind {
            Kind::Experts(experts) => Some(experts),
            _ => None,
        });
        let [count, top_k] = experts.map(|of| [of.experts as u32, of.top_k as u32]).unwrap();
        assert!(2 * right * count > 3 * all_foreseen * top_k, "{name}: {right} of {all_foreseen}");
        assert!(right < all_foreseen && late > 0, "{name}: {right} of {all_foreseen}, {late}");
        let outcomes = [4, 5, 6, 7].map(|seed| launch(&first_rows(), seed, 3));
        let counts = outcomes.each_ref().map(|outcome| outcome.foreseen[0]);
        assert!(
            counts.is_sorted() && counts[0] == 0 && counts[1] >= layers && counts[3] > counts[1],
            "{name}: {counts:?}"
        );
        // On so many blocks some have no tile of the product behind attention, where forecasts are asked for and what was
        // written is released at nearly the same time.
        for outcome in
            outcomes[1..].iter().chain(&[5, 6, 7, 9, 10, 11].map(|seed| launch(&first_rows(), seed, 16)))
        {
            assert!(outcome.logits == outcomes[0].logits && outcome.experts == outcomes[0].experts, "{name}");
            let [foreseen, wrong] = outcome.foreseen;
            assert!(wrong <= foreseen && foreseen - wrong <= outcome.experts, "{name}: {foreseen}, {wrong}");
        }
    }
    check_wide_steps(&qwen3_moe(), Format::BF16, Some(Format::BF16), 16, 1, 0.03);
    // What is chosen by chance cannot be foreseen.
    let simulation = Simulation::new(&qwen3_moe(), Format::BF16, Some(Format::BF16), sizes(8));
    let chance = [4, 7].map(|seed| simulation.launch_routed(&first_rows(), 1, 3, seed, 1));
    assert!(chance[0].logits == chance[1].logits && chance[1].foreseen == [0, 0]);
}

/// An SM looks after three experts at a time, or after none; what normalizes the rows it finds in any case.
#[test]
fn routers_of_few_and_of_many_experts() {
    // Of numbers that are no multiples of four a stage of its own makes the scores.
    for experts in [6, 302, 300] {
        let mut config = mimo_fused();
        config["n_routed_experts"] = experts.into();
        let simulation = Simulation::new(&config, Format::BF16, Some(Format::MXFP4), 256);
        let weights = Weights(&simulation);
        let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
        let before = simulation.cache();
        check_step(&simulation, &mut interpreter, &first_rows(), [0, 1], 0.03);
        let launch = |blocks| {
            simulation.write_cache(&before);
            simulation.launch(&first_rows(), 1, blocks, 7).logits
        };
        assert!(launch(9) == launch(2), "{experts} experts: other bits");
    }
}

/// The weights, but for routers, to which all experts are alike.
struct Alike<'a>(Weights<'a>);

impl WeightSource for Alike<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        let mut values = self.0.tensor(name)?;
        if name.ends_with("mlp.gate.weight") {
            values.to_mut().fill(0.0);
        }
        Ok(values)
    }
}

/// Of equal scores, each another lane's, the lowest experts are chosen.
#[test]
fn experts_that_are_alike() {
    // A lane has one, or three.
    check_alike(&qwen3_moe());
    let mut config = qwen3_moe();
    config["num_experts"] = 96.into();
    config["num_experts_per_tok"] = 9.into();
    check_alike(&config);
}

fn check_alike(config: &Value) {
    let simulation = Simulation::new(config, Format::BF16, Some(Format::MXFP4), 256);
    let mut packed = std::fs::read(simulation.path("weights.bin")).unwrap();
    for layer in &simulation.program.layers {
        for stage in &simulation.program.bodies[layer.body] {
            // Of the rows before attention, and of what is added to them.
            let (weights, octets, k) = match &stage.kind {
                Kind::Attention(attention) => {
                    let scores = attention.router.as_ref().expect("no stage of its own makes scores");
                    assert_eq!(scores.format, Format::BF16);
                    (scores.weights, scores.experts.div_ceil(8), scores.k)
                }
                Kind::Gemm(gemm) if gemm.router.is_some() => {
                    (gemm.router.unwrap().weights, gemm.router_tiles(), gemm.k)
                }
                _ => continue,
            };
            let Slot::Layer(number) = weights else { panic!("a layer's weights") };
            let at = layer.offsets[number] as usize;
            packed[at..at + octets * k.div_ceil(32) * 512].fill(0);
        }
    }
    std::fs::write(simulation.path("weights.bin"), packed).unwrap();
    let weights = Alike(Weights(&simulation));
    let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
    check_step(&simulation, &mut interpreter, &first_rows(), [0, 1], 0.03);
    let found = simulation.launch(&first_rows(), 1, 3, 4);
    let each = config["num_experts_per_tok"].as_u64().unwrap() as u32;
    assert_eq!(found.experts, 2 * each, "all rows choose the same in both layers");
}

/// One rank alone is the interpreter of its graph, in which its own parts stand for sums: heads, columns of
/// matrices and of experts are cut, in blocks of FP8 and FP4 as well.
fn check_ranks(config: &Value, weights: Format, experts: Format, bound: f64) {
    for rank in 0..2 {
        let rank = Shard { rank, ranks: 2 };
        let simulation = Simulation::share(config, weights, Some(experts), 256, Some(rank));
        assert_eq!(simulation.program.vocab, 48);
        let weights = Weights(&simulation);
        let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
        let rows: Vec<Row> = (0..8).map(|n| row(n * 11 % 96, n as usize, 0)).collect();
        check_step(&simulation, &mut interpreter, &rows, [0, 0], bound);
    }
}

#[test]
fn a_rank_of_gpt_oss() {
    check_ranks(&gpt_oss(), Format::F16, Format::F16, 0.01);
}

#[test]
fn a_rank_of_mimo() {
    let mut mimo = mimo_fused();
    for (key, value) in [
        ("num_attention_heads", 8),
        ("swa_num_key_value_heads", 4),
        ("v_head_dim", 32),
        ("intermediate_size", 256),
        ("moe_intermediate_size", 64),
    ] {
        mimo[key] = value.into();
    }
    check_ranks(&mimo, Format::FP8_BLOCK, Format::MXFP4, 0.03);
}

#[test]
fn llama_in_fp8_with_scales_of_rows() {
    for weights in [Format::FP8_CHANNEL, Format::FP8_1X128] {
        check_steps(&llama(), weights, None, 1, 0.03);
    }
}

#[test]
fn llama_in_nvfp4() {
    check_steps(&llama(), Format::NVFP4, None, 1, 0.03);
}

#[test]
fn long_rows_in_fp8_with_scales_of_rows() {
    for weights in [Format::FP8_CHANNEL, Format::FP8_1X128] {
        check_long(&long(40, 8264), weights, None, 0.03);
    }
}

#[test]
fn mixtures_in_fp8() {
    for experts in [Format::FP8_BLOCK, Format::FP8_CHANNEL, Format::FP8_1X128] {
        check_steps(&qwen3_moe(), Format::BF16, Some(experts), 1, 0.03);
    }
    check_steps(&mimo_fused(), Format::FP8_BLOCK, Some(Format::FP8_BLOCK), 1, 0.03);
}

#[test]
fn mixtures_in_nvfp4() {
    check_steps(&qwen3_moe(), Format::BF16, Some(Format::NVFP4), 1, 0.03);
    check_steps(&mimo_fused(), Format::FP8_CHANNEL, Some(Format::NVFP4), 1, 0.03);
    // All experts in one tensor, gate and up in turns, with biases.
    for experts in [Format::NVFP4, Format::FP8_CHANNEL, Format::FP8_1X128] {
        check_steps(&gpt_oss(), Format::BF16, Some(experts), 0, 0.03);
    }
}

#[test]
fn short_experts_in_nvfp4() {
    check_long(&short_experts(), Format::BF16, Some(Format::NVFP4), 0.03);
}

/// Every row takes all experts, so that no rounding of a router's input decides. (Kernels of all widths have the same
/// bits, with experts that are chosen: `width_changes_no_bit_of_scaled_weights`.)
fn all_experts(mut config: Value) -> Value {
    for key in ["num_experts", "n_routed_experts", "num_experts_per_tok"] {
        config[key] = 5.into();
    }
    config
}

#[test]
fn sixteen_rows_of_scaled_mixtures() {
    for experts in [Format::FP8_BLOCK, Format::FP8_CHANNEL, Format::FP8_1X128, Format::NVFP4] {
        check_wide_steps(&all_experts(qwen3_moe()), Format::BF16, Some(experts), 16, 0, 0.03);
    }
}

#[test]
fn thirty_two_rows_of_scaled_mixtures() {
    for (weights, experts) in [
        (Format::FP8_CHANNEL, Format::FP8_BLOCK),
        (Format::FP8_1X128, Format::NVFP4),
        (Format::NVFP4, Format::FP8_CHANNEL),
    ] {
        check_wide_steps(&all_experts(mimo_fused()), weights, Some(experts), 32, 0, 0.03);
    }
}

#[test]
fn width_changes_no_bit_of_scaled_weights() {
    for weights in [Format::FP8_CHANNEL, Format::FP8_1X128, Format::NVFP4] {
        check_widths(&llama(), weights, None, &[16, 32]);
    }
    for experts in [Format::FP8_BLOCK, Format::FP8_1X128, Format::NVFP4] {
        check_widths(&qwen3_moe(), Format::BF16, Some(experts), &[16, 32]);
    }
}

#[test]
fn ranks_of_scaled_mixtures() {
    for (weights, experts) in [
        (Format::FP8_CHANNEL, Format::NVFP4),
        (Format::FP8_1X128, Format::FP8_CHANNEL),
        (Format::FP8_BLOCK, Format::FP8_BLOCK),
    ] {
        let mut mimo = all_experts(mimo_fused());
        for (key, value) in [
            ("num_attention_heads", 8),
            ("swa_num_key_value_heads", 4),
            ("v_head_dim", 32),
            ("intermediate_size", 256),
            ("moe_intermediate_size", 256),
        ] {
            mimo[key] = value.into();
        }
        check_ranks(&mimo, weights, experts, 0.03);
    }
}
