//! Attention on the simulated machine against its formula in float64, over caches of random numbers: several chunks
//! and spans, windows, sinks, runs of a sequence's rows.

use super::{Outcome, Simulation, brains, floats, llama, mimo, qwen3, random_numbers, row, words};
use serde_json::{Value, json};
use tilec_codegen::passes::resident::Sizes;
use tilec_ir::format::Format;
use tilec_ir::graph::interp::Row;
use tilec_ir::launch::SampleRow;
use tilec_ir::pack::PackContent;
use tilec_ir::stages::Slot;
use tilec_runtime::sampling::SamplingParams;

/// Where a column of a key lies among the halves of its page: 16 positions together, 32 columns of one behind those of
/// another, in this order.
fn key_at(qk_dim: usize, position: usize, column: usize) -> usize {
    const ORDER: [usize; 16] = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15];
    let (tile, step) = (position / 16 * 16, column / 32 * 32);
    let line = ORDER.iter().position(|p| *p == position % 16).unwrap();
    tile * qk_dim + 16 * step + line * (qk_dim - step).min(32) + column % 32
}

/// Where a column of a value lies among the halves of its page's values: 16 positions together, 64 columns of them; of
/// every fourth position eight columns each, then the next eight.
fn value_at(v_pad: usize, position: usize, column: usize) -> usize {
    let (tile, step) = (position / 16 * 16, column / 64 * 64);
    let (p, d) = (position % 16, column % 64);
    tile * v_pad + 16 * step + p % 4 * 4 * (v_pad - step).min(64) + d / 8 * 32 + p / 4 * 8 + d % 8
}

/// Where a column of a row of `cols` halves lies: eight rows together, 32 columns of each side by side.
fn half_at(row: usize, column: usize, cols: usize) -> usize {
    row / 8 * 8 * cols.next_multiple_of(128) + column / 32 * 256 + row % 8 * 32 + column % 32
}

/// All parts that were left have been read, and are late again for the next stage; those of rows that the launch does not
/// have are as they were.
fn check_parts(simulation: &Simulation, outcome: &Outcome) {
    const POISON: u32 = 0x7fff_7fff;
    let parts = simulation.program.buffer(simulation.last_attention().parts);
    let parts = words(&outcome.arena[parts.offset..][..parts.bytes()]);
    assert!(parts.iter().all(|word| [u32::MAX, POISON].contains(word)), "parts are left for the next stage");
    assert!(parts.contains(&u32::MAX), "a launch begins with late words");
}

/// Attention of the last layer in one launch against its formula in float64, over a cache of random
/// numbers. Gives whether a head's sink had a part of its weights, and not all of them.
fn check_attention(simulation: &Simulation, rows: &[Row], blocks: usize, seed: u64) -> bool {
    let program = &simulation.program;
    let kv = program.kv;
    let attention = simulation.last_attention();
    let outcome = simulation.launch(rows, 1, blocks, seed);
    check_parts(simulation, &outcome);
    let buffer = |id| {
        let buffer = program.buffer(id);
        (&outcome.arena[buffer.offset..], buffer.cols)
    };
    let (qkv, cols) = buffer(attention.input);
    let qkv: Vec<f64> = floats(&qkv[..program.step_rows * cols * 4]).into_iter().map(f64::from).collect();
    let (out, out_cols) = buffer(attention.output);
    let out = brains(&out[..program.step_rows * out_cols.next_multiple_of(128) * 2]);
    let cache = brains(&simulation.cache());
    let layer = program.layers.last().unwrap();
    let sinks = simulation.sinks();
    let mut sink_counts = false;
    let table = attention.rope.map(|rope| rope.table);
    let found = program.packing.items.iter().find_map(|item| match &item.content {
        PackContent::RopeTable { inv_freq, .. } if table == Some(Slot::Fixed(item.offset)) => Some(inv_freq),
        _ => None,
    });
    let inv_freq = found.expect("heads are rotated");
    let (heads, group) = (attention.heads, attention.heads / attention.kv_heads);
    for (at, row) in rows.iter().enumerate() {
        let from = attention.window.map_or(0, |window| (row.position + 1).saturating_sub(window));
        let page = |p: usize, kv_head: usize| {
            let page = row.sequence as usize * simulation.pages_per_sequence() + p / kv.page_tokens;
            kv.block_offset(simulation.pages(), layer.cache, page, kv_head) / 2
        };
        for head in 0..heads {
            let mut q = qkv[at * cols + head * kv.qk_dim..][..kv.qk_dim].to_vec();
            if let Some(norm) = attention.q_norm {
                let mean = q.iter().map(|x| x * x).sum::<f64>() / kv.qk_dim as f64;
                let name = format!("model.layers.{}.self_attn.q_norm.weight", program.layers.len() - 1);
                let gains = simulation.checkpoint.tensor_f32(&name).unwrap();
                let scale = 1.0 / (mean + f64::from(norm.eps)).sqrt();
                q.iter_mut().zip(gains).for_each(|(x, gain)| *x *= scale * f64::from(gain));
            }
            let raw = q.clone();
            let half = inv_freq.len();
            for (i, frequency) in inv_freq.iter().enumerate() {
                let (sin, cos) = (f64::from(*frequency) * row.position as f64).sin_cos();
                q[i] = raw[i] * cos - raw[i + half] * sin;
                q[i + half] = raw[i + half] * cos + raw[i] * sin;
            }
            let score = |p: usize| {
                let keys = &cache[page(p, head / group)..];
                let key = |d: usize| keys[key_at(kv.qk_dim, p % kv.page_tokens, d)];
                q.iter().enumerate().map(|(d, q)| q * key(d)).sum::<f64>() * f64::from(attention.scale)
            };
            let scores: Vec<f64> = (from..=row.position).map(score).collect();
            let sink = sinks.get(head).map_or(f64::NEG_INFINITY, |sink| f64::from(*sink));
            let top = scores.iter().copied().fold(sink, f64::max);
            let total = scores.iter().map(|score| (score - top).exp()).sum::<f64>() + (sink - top).exp();
            sink_counts |= (0.01..0.99).contains(&((sink - top).exp() / total));
            let mut wanted = vec![0.0f64; kv.v_dim];
            for (p, score) in (from..=row.position).zip(&scores) {
                let values = &cache[page(p, head / group) + kv.page_tokens * kv.qk_dim..];
                let weight = (score - top).exp() / total;
                for (d, sum) in wanted.iter_mut().enumerate() {
                    *sum += weight * values[value_at(kv.v_pad(), p % kv.page_tokens, d)];
                }
            }
            let size = wanted.iter().fold(0.0f64, |size, x| size.max(x.abs()));
            for (d, wanted) in wanted.iter().enumerate() {
                let found = out[half_at(at, head * kv.v_dim + d, out_cols)];
                // Half a unit of a bfloat16 is 2^-9 of a number.
                let close = (found - wanted).abs() <= size * 0.005 + f64::from(f32::MIN_POSITIVE);
                assert!(
                    close,
                    "position {}, head {head}, column {d}: {found}, wanted {wanted}",
                    row.position
                );
            }
        }
    }
    sink_counts
}

/// Columns of heads whose chunks do not come through the ring.
const WIDE_HEAD: usize = 160;

/// A model whose cache is random.
fn random_cache(config: &Value) -> Simulation {
    cache_of(config, Sizes { context: 3072, step_rows: 8 })
}

fn cache_of(config: &Value, sizes: Sizes) -> Simulation {
    let simulation = Simulation::new(config, Format::BF16, None, sizes);
    if !simulation.sinks().is_empty() {
        // Among the scores, below all of them, and so far above that their weights vanish.
        simulation.set_sinks(&[0.5, 3.0, -7.0, f32::NEG_INFINITY, 300.0, 6.5]);
    }
    // Numbers from -2 to 2, and the padding of values, which nobody reads, as well.
    let numbers = random_numbers(1).take(simulation.cache_bytes() / 2);
    let cache: Vec<u8> = numbers.flat_map(|n| half::bf16::from_f32(2.0 * n).to_le_bytes()).collect();
    simulation.write_cache(&cache);
    simulation
}

fn rows_at(places: &[(usize, usize)]) -> Vec<Row> {
    places.iter().map(|(p, s)| row((p * 7 + s * 9) as u32 % 80, *p, *s)).collect()
}

/// A model's attention in several launches, of a narrow kernel, whose spans are short, and of a wide one.
fn check(config: &Value) {
    check_launches(&random_cache(config));
    check_launches(&cache_of(config, Sizes { context: 3072, step_rows: 16 }));
}

fn check_launches(simulation: &Simulation) {
    // Around the ends of chunks (128) and spans (1,024); a run over an end; all rows of one sequence.
    let mixed = [(2046, 0), (2047, 0), (2048, 0), (1023, 1), (1024, 1), (2900, 2), (5, 3), (1500, 4)];
    let run: Vec<(usize, usize)> = (1020..1028).map(|position| (position, 5)).collect();
    let single = [(3071, 6)];
    for (seed, (places, blocks)) in
        [(&mixed[..], 2), (&mixed[..], 40), (&run[..], 3), (&single[..], 7)].into_iter().enumerate()
    {
        let rows: Vec<Row> = places.iter().enumerate().map(|(n, (p, s))| row(n as u32 * 9, *p, *s)).collect();
        let sink_counts = check_attention(simulation, &rows, blocks, seed as u64);
        assert_eq!(sink_counts, !simulation.sinks().is_empty());
    }
}

#[test]
fn grouped_queries() {
    let mut config = llama();
    config["num_hidden_layers"] = 1.into();
    check(&config);
}

#[test]
fn a_window_of_several_chunks() {
    check(&qwen3(1500));
}

#[test]
fn sinks_and_a_window() {
    let mut config = mimo(1500);
    (config["hybrid_layer_pattern"], config["moe_layer_freq"]) = (json!([1]), json!([0]));
    config["num_hidden_layers"] = 1.into();
    check(&config);
}

#[test]
fn narrow_values_behind_a_layer_with_a_window() {
    check(&mimo(5));
}

/// What the last layer's attention makes of the rows.
fn attended(simulation: &Simulation, rows: &[Row], blocks: usize, seed: u64) -> Vec<u8> {
    let out = simulation.program.buffer(simulation.last_attention().output);
    let outcome = simulation.launch(rows, 1, blocks, seed);
    check_parts(simulation, &outcome);
    // Row by row, as they do not lie.
    let places = (0..rows.len()).flat_map(|row| (0..out.cols).map(move |column| (row, column)));
    places
        .flat_map(|(row, column)| {
            outcome.arena[out.offset + half_at(row, column, out.cols) * 2..][..2].to_vec()
        })
        .collect()
}

/// The same bits for any number of SMs, and for a sequence's rows alone: however units are dealt out, whoever adds
/// up chunks and spans, through registers or through memory.
fn check_bits(simulation: &Simulation, places: &[(usize, usize)], blocks: &[usize]) {
    let rows = rows_at(places);
    let mut sequences: Vec<usize> = places.iter().map(|(_, sequence)| *sequence).collect();
    sequences.dedup();
    let out = simulation.program.buffer(simulation.last_attention().output);
    let attended = |rows: &[Row], blocks, seed| attended(simulation, rows, blocks, seed);
    check_attention(simulation, &rows, blocks[0], 1);
    let wanted = attended(&rows, blocks[0], 2);
    for blocks in &blocks[1..] {
        assert!(attended(&rows, *blocks, 3) == wanted, "{places:?}: {blocks} blocks give other bits");
    }
    if sequences.len() == 1 {
        return;
    }
    for (seed, sequence) in sequences.into_iter().enumerate() {
        let own: Vec<usize> = (0..rows.len()).filter(|at| places[*at].1 == sequence).collect();
        let rows: Vec<Row> = own.iter().map(|at| rows[*at]).collect();
        let alone = attended(&rows, blocks[seed % blocks.len()], 4);
        assert!(
            alone == wanted[own[0] * out.cols * 2..][..alone.len()],
            "{places:?}: {sequence} alone differs"
        );
    }
}

/// Sixteen heads share a KV head, so that eight rows of a sequence have sixteen passes of queries.
#[test]
fn passes_of_one_run_are_shared_out() {
    let mut config = qwen3(1 << 20);
    (config["intermediate_size"], config["use_sliding_window"]) = (16.into(), false.into());
    let run = |first: usize, count: usize| (first..first + count).map(|p| (p, 2)).collect::<Vec<_>>();
    for head_dim in [32, WIDE_HEAD] {
        (config["num_attention_heads"], config["head_dim"]) = (16.into(), head_dim.into());
        let simulation = random_cache(&config);
        check_bits(&simulation, &run(200, 8), &[1, 7, 30]);
        // Over the end of a chunk, and of a span.
        check_bits(&simulation, &run(252, 8), &[20, 3]);
        check_bits(&simulation, &run(1021, 8), &[4, 40]);
        check_bits(&simulation, &[run(1300, 5), vec![(40, 3), (300, 4), (301, 4)]].concat(), &[40, 5]);
    }
}

/// Long runs have more rows of their own in a chunk than there are warps.
#[test]
fn runs_of_sixteen_and_thirty_two_rows() {
    let mut config = qwen3(1 << 20);
    (config["intermediate_size"], config["use_sliding_window"]) = (16.into(), false.into());
    let run = |first: usize, count: usize, sequence| (first..first + count).map(move |p| (p, sequence));
    for (step_rows, head_dim) in [(16, 32), (16, WIDE_HEAD), (32, 32)] {
        (config["num_attention_heads"], config["head_dim"]) = (4.into(), head_dim.into());
        let simulation = cache_of(&config, Sizes { context: 3072, step_rows });
        check_bits(&simulation, &run(200, step_rows, 2).collect::<Vec<_>>(), &[1, 7, 30]);
        // Over the end of a chunk, and of a span.
        check_bits(&simulation, &run(245, step_rows, 3).collect::<Vec<_>>(), &[20, 3]);
        check_bits(&simulation, &run(1015, step_rows, 3).collect::<Vec<_>>(), &[4, 40]);
        let own = step_rows - 5;
        let rows: Vec<_> = run(1300, 3, 1).chain(run(1100, own, 2)).chain([(40, 3), (300, 4)]).collect();
        check_bits(&simulation, &rows, &[40, 5]);
    }
}

/// Contexts of 1, 3, 8, 9 and 20 chunks, alone and together.
#[test]
fn chunks_are_added_up_where_it_costs_least() {
    let mut config = llama();
    for head_dim in [16, WIDE_HEAD] {
        (config["num_hidden_layers"], config["head_dim"]) = (1.into(), head_dim.into());
        let simulation = random_cache(&config);
        for last in [100, 383, 1023, 1151] {
            check_bits(&simulation, &[(last, 1)], &[1, 3, 20]);
        }
        check_bits(&simulation, &[(100, 0), (383, 1), (1023, 2), (1151, 3), (2559, 4)], &[9, 2, 40]);
    }
}

/// One SM has 48 contexts of several spans to add up; where heads are wide it keeps 32 of them in mind at a time.
#[test]
fn more_is_added_up_than_lanes_keep_in_mind() {
    let mut config = llama();
    for (key, value) in [("num_hidden_layers", 1), ("num_attention_heads", 6), ("num_key_value_heads", 6)] {
        config[key] = value.into();
    }
    for head_dim in [16, WIDE_HEAD] {
        config["head_dim"] = head_dim.into();
        more_is_added_up(&random_cache(&config));
    }
}

fn more_is_added_up(simulation: &Simulation) {
    let rows = rows_at(&(0..8).map(|sequence| (2050 + sequence, sequence)).collect::<Vec<_>>());
    check_attention(simulation, &rows, 1, 5);
    assert!(attended(simulation, &rows, 1, 6) == attended(simulation, &rows, 7, 7), "other bits");
}

/// Short and long spans, where sequences end around the ends of both; `run` rows of one, which decode or verify.
fn check_spans(config: &Value, run: usize) {
    let simulation = cache_of(config, Sizes { context: 6144, step_rows: 8 });
    for last in [255, 256, 4095, 4096, 5119, 6143] {
        check_bits(&simulation, &[(last, 1)], &[2, 40]);
    }
    // A row of the run is the first of a long span.
    let rows = |first: usize, sequence| (first..first + run).map(move |p| (p, sequence));
    check_bits(&simulation, &rows(4095, 3).collect::<Vec<_>>(), &[1, 30]);
    check_bits(&simulation, &rows(5119, 3).collect::<Vec<_>>(), &[7, 3]);
    // Short and long, so that SMs have some of both; of five some have less than others.
    let short = [(5200, 0), (700, 1), (4224, 2)].into_iter();
    let places: Vec<_> = short.chain(rows(6000, 3)).chain([(5, 5), (1500, 6)]).collect();
    check_bits(&simulation, &places, &[1, 3, 5, 40]);
    // Plans for longer contexts have longer ones.
    let simulation = cache_of(config, Sizes { context: 17 << 10, step_rows: 8 });
    check_bits(&simulation, &[(3071, 1), (3072, 2)], &[3, 40]);
}

#[test]
fn spans_of_narrow_heads() {
    let mut config = llama();
    config["num_hidden_layers"] = 1.into();
    check_spans(&config, 2);
}

/// Keys and values of a page in slots of their own, and values of more columns than are added up at a time, behind a
/// layer with a window, which sees few spans.
#[test]
fn spans_of_wide_heads() {
    check_spans(&wide_heads(128, 104), 3);
}

/// Steps of a launch follow each other: the loader waits for each of them, and a span is whole behind the second.
#[test]
fn steps_bring_spans_to_an_end() {
    let mut config = llama();
    config["num_hidden_layers"] = 2.into();
    let simulation = random_cache(&config);
    let rows = rows_at(&[(1022, 0), (2046, 1), (100, 2)]);
    let all = simulation.launch(&rows, 4, 5, 1);
    let wanted = simulation.launch(&rows, 4, 7, 2);
    assert!(all.chosen == wanted.chosen && all.logits == wanted.logits);
}

/// A model of few heads of so many columns.
fn wide_heads(qk: usize, v: usize) -> Value {
    let mut config = mimo(5);
    (config["num_attention_heads"], config["swa_num_key_value_heads"]) = (2.into(), 1.into());
    (config["head_dim"], config["v_head_dim"]) = (qk.into(), v.into());
    config
}

/// A page's keys do not fit a slot of the ring: they come in two pieces, its values in a third.
#[test]
fn keys_in_two_pieces() {
    check(&wide_heads(192, 64));
}

/// Units have more than comes through the ring: consumers load them.
#[test]
fn units_too_large_for_the_ring() {
    let simulation = random_cache(&wide_heads(192, 128));
    check_bits(&simulation, &[(1023, 1), (2046, 2), (2047, 2), (5, 3), (700, 4)], &[2, 40]);
}

/// Units are dealt out anew when a sequence comes to another chunk, or its window to another first one: the last of a
/// launch's steps is the same as alone.
#[test]
fn steps_go_on_to_other_chunks() {
    for config in [llama(), mimo(5)] {
        let simulation = random_cache(&config);
        let places = [(126, 0), (1022, 1), (253, 2), (700, 3)];
        let rows = rows_at(&places);
        let all = simulation.launch(&rows, 4, 5, 1);
        let last = |at: usize| Row {
            token: all.chosen[2 * rows.len() + at],
            position: rows[at].position + 3,
            ..rows[at]
        };
        let alone = simulation.launch(&(0..rows.len()).map(last).collect::<Vec<_>>(), 1, 3, 2);
        assert!(alone.chosen == all.chosen[3 * rows.len()..] && alone.logits == all.logits);
    }
}

/// Logits of several spans, from which a launch on other SMs chooses the same by chance.
#[test]
fn long_contexts_choose_by_chance() {
    let mut config = llama();
    config["num_hidden_layers"] = 1.into();
    let simulation = random_cache(&config);
    let rows = rows_at(&[(1023, 0), (2046, 1), (100, 2)]);
    let params = [
        SamplingParams { temperature: 2.0, seed: 3, ..SamplingParams::default() },
        SamplingParams { temperature: 1.5, top_k: 20, top_p: 0.9, seed: 4, ..SamplingParams::default() },
        SamplingParams::greedy(),
    ];
    let sampling = params.each_ref().map(SamplingParams::launch_row);
    let launch = |blocks, seed, sampling: &[SampleRow]| {
        simulation.launch_sampled(&rows, &[0, 1, 2], 3, [blocks, 0, 0], seed, sampling)
    };
    let before = simulation.cache();
    let wanted = launch(5, 1, &sampling);
    let chosen = |seed, sampling: &[SampleRow]| {
        simulation.write_cache(&before);
        launch(4, seed, sampling)
    };
    let found = chosen(2, &sampling);
    assert!(found.chosen == wanted.chosen && found.logits == wanted.logits);
    assert!(chosen(3, &[]).chosen != found.chosen, "nothing was left to chance");
}

/// Spans of one chunk, which mixtures have.
#[test]
fn spans_of_a_mixture() {
    let mut config = super::qwen3_moe();
    config["num_hidden_layers"] = 1.into();
    check_spans(&config, 2);
}

/// What a sequence has in its cache need not be finite for others to be right: an SM that had its chunk in registers takes
/// one of another sequence next, most of whose positions nobody sees.
#[test]
fn values_without_end_stay_with_their_sequence() {
    for head_dim in [32, WIDE_HEAD] {
        let mut config = llama();
        (config["num_hidden_layers"], config["head_dim"]) = (1.into(), head_dim.into());
        let simulation = random_cache(&config);
        let places = [(700, 0), (5, 1), (128, 2)];
        let wanted = attended(&simulation, &rows_at(&places[1..]), 3, 1);
        // The pages of the first sequence are the first ones.
        let mut cache = simulation.cache();
        let of_first = cache.len() * simulation.pages_per_sequence() / simulation.pages();
        for half in cache[..of_first].chunks_exact_mut(2) {
            half.copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
        }
        simulation.write_cache(&cache);
        let found = attended(&simulation, &rows_at(&places), 1, 2);
        assert!(found[found.len() - wanted.len()..] == wanted, "other bits");
    }
}

/// Whoever adds up waits for parts whatever their scores are.
#[test]
fn scores_that_are_no_numbers_leave_parts_as_well() {
    let mut config = llama();
    config["num_hidden_layers"] = 1.into();
    let simulation = random_cache(&config);
    simulation.write_cache(&vec![0xff; simulation.cache_bytes()]);
    // Several spans, and some chunks.
    let rows = rows_at(&[(2047, 0), (1500, 1), (130, 2), (131, 2)]);
    for blocks in [1, 3, 40] {
        let outcome = simulation.launch(&rows, 1, blocks, blocks as u64);
        check_parts(&simulation, &outcome);
        let found = &outcome.logits[..rows.len() * simulation.program.vocab];
        assert!(found.iter().all(|x| x.is_nan()), "{blocks} blocks");
    }
}

/// A window makes a row's first chunk and its first span.
#[test]
fn windows_begin_anywhere() {
    let mut config = qwen3(200);
    (config["num_attention_heads"], config["head_dim"]) = (4.into(), 64.into());
    config["intermediate_size"] = 16.into();
    let simulation = random_cache(&config);
    check_bits(&simulation, &[(1100, 0), (1101, 0), (1400, 1), (150, 2)], &[1, 3, 30]);
    check_bits(&simulation, &(1022..1030).map(|p| (p, 5)).collect::<Vec<_>>(), &[2, 30]);
}
