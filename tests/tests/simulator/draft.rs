//! A draft's three kernels on the simulated machine: a step of the target that leaves taps, the kernel that
//! makes the draft's context of them, and the kernel of a block; against the formulas in float64, and round
//! by round against the loop of the formulas.

use super::{Outcome, Simulation, Weights, deviation, random_numbers, row};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tilec_codegen::compile::{DraftInput, Input, graphs};
use tilec_codegen::frontends;
use tilec_codegen::passes::packer::Packer;
use tilec_codegen::passes::resident::Sizes;
use tilec_codegen::passes::{fuse, resident};
use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{Interpreter, Row};
use tilec_ir::graph::{Graph, Op};
use tilec_ir::plan::WeightsFrom;
use tilec_ir::resident::ResidentProgram;
use tilec_ir::spec::{Activations, DflashSpec, Draft, ModelSpec, WeightFormat};
use tilec_ir::tensor::TensorInfo;
use tilec_runtime::checkpoint::Checkpoint;
use tilec_tests::{Fixture, Reference};

/// Rows of a step, of which a launch has eight.
const ROWS: usize = 24;

/// The three programs, with what each has of the memory that they share.
pub(super) struct Pair {
    pub target: Simulation,
    pub inject: Simulation,
    pub block: Simulation,
    pub mask: u32,
    /// Columns of a row of all taps.
    pub tap_cols: usize,
    /// Varies the order of everything.
    seed: std::cell::Cell<u64>,
}

impl Pair {
    /// A pair of the fixtures, its weights in float16.
    pub fn fixture(name: &str, sizes: impl Into<Sizes>) -> Pair {
        let fixture = Fixture::open_pair(name);
        let mut spec = fixture.spec();
        spec.precision.kv_cache = Some(KvType::F16);
        Pair::open(&fixture.input(), spec, sizes.into(), &|| Fixture::open_pair(name).checkpoint)
    }

    /// A pair of random weights; the mask has an embedding of its own, and the context another rope.
    pub fn synthetic(target: &Value, draft: &Value, weights: Format, sizes: impl Into<Sizes>) -> Pair {
        let tensors = frontends::synthetic_tensors(target, Format::BF16).unwrap();
        let mut draft_tensors = frontends::synthetic_draft_tensors(draft, target, Format::BF16).unwrap();
        let hidden = target["hidden_size"].as_u64().unwrap() as usize;
        draft_tensors
            .insert("mask_embedding".into(), TensorInfo { shape: vec![hidden], format: Format::F32 });
        let synthetic = |seed, config: &Value, tensors: &BTreeMap<String, TensorInfo>| {
            Checkpoint::synthetic(config.clone(), seed, tensors.clone())
        };
        let unused = |tensors: &BTreeMap<String, TensorInfo>, config: &Value| WeightsFrom::Synthetic {
            seed: 1,
            config: config.clone(),
            tensors: tensors.clone(),
        };
        let input = Input {
            name: "random",
            config: target,
            tensors: &tensors,
            weights: unused(&tensors, target),
            tokenizer: None,
            draft: Some(DraftInput {
                config: draft,
                tensors: &draft_tensors,
                weights: unused(&draft_tensors, draft),
            }),
        };
        let mut spec = ModelSpec::for_checkpoint("unused");
        let half = if weights == Format::F16 { KvType::F16 } else { KvType::Bf16 };
        spec.precision.kv_cache = Some(half);
        spec.precision.weights = WeightFormat::Converted(weights);
        let dflash = DflashSpec { checkpoint: "unused".into(), block: None, context_rope_theta: Some(500) };
        spec.draft = Some(Draft { dflash });
        Pair::open(&input, spec, sizes.into(), &|| {
            let mut checkpoint = synthetic(7, target, &tensors);
            checkpoint.attach_draft(synthetic(8, draft, &draft_tensors));
            checkpoint
        })
    }

    fn open(
        input: &Input<'_>,
        mut spec: ModelSpec,
        sizes: Sizes,
        checkpoint: &dyn Fn() -> Checkpoint,
    ) -> Pair {
        spec.precision.activations = Activations::F32;
        let (target, draft) = graphs(input, &spec).unwrap();
        let draft = draft.unwrap();
        let programs = lower([&target, &draft.inject, &draft.block], sizes);
        let tap_cols = programs[0].taps.as_ref().map(|taps| taps.layers.len() * taps.cols).unwrap();
        let simulations = programs
            .into_iter()
            .zip([target, draft.inject, draft.block])
            .map(|(program, graph)| Simulation::of(program, graph, checkpoint()));
        let Ok([target, inject, block]) = <[Simulation; 3]>::try_from(simulations.collect::<Vec<_>>()) else {
            panic!("three programs");
        };
        let pair = Pair { target, inject, block, mask: draft.draft.mask_token, tap_cols, seed: 1.into() };
        pair.write_taps(&vec![0xff; ROWS * tap_cols * 4]);
        pair
    }

    fn write_taps(&self, bytes: &[u8]) {
        for simulation in [&self.target, &self.inject] {
            std::fs::write(simulation.path("taps.bin"), bytes).unwrap();
        }
    }

    pub fn seed(&self) -> u64 {
        self.seed.set(self.seed.get() + 1);
        self.seed.get()
    }

    /// One step of the target in launches of eight rows; the logits of all rows.
    pub fn step(&self, rows: &[Row]) -> Vec<f32> {
        assert!(rows.len() <= ROWS);
        let mut logits = Vec::new();
        let most = self.target.program.step_rows;
        for (number, rows) in rows.chunks(most).enumerate() {
            let all: Vec<usize> = (0..rows.len()).collect();
            let at = number * most * self.tap_cols;
            let seed = self.seed();
            logits.extend(self.target.launch_at(rows, &all, 1, [2 + seed as usize % 3, 0, at], seed).logits);
        }
        self.write_taps(&std::fs::read(self.target.path("taps.bin")).unwrap());
        logits
    }

    /// Adds rows of the last step to the draft's context.
    pub fn inject(&self, rows: &[Row], chosen: &[usize]) {
        for chosen in chosen.chunks(self.inject.program.step_rows) {
            let rows: Vec<Row> =
                chosen.iter().map(|number| Row { token: *number as u32, ..rows[*number] }).collect();
            let seed = self.seed();
            self.inject.launch_at(&rows, &[], 1, [2 + seed as usize % 3, 0, 0], seed);
        }
        self.share_cache();
    }

    /// The kernels of the draft have one cache.
    pub fn share_cache(&self) {
        self.block.write_cache(&self.inject.cache());
    }

    /// The logits of the guesses of blocks, each with its token, its position, its sequence and its rows.
    pub fn blocks(&self, blocks: &[(u32, usize, usize, usize)]) -> Vec<f32> {
        self.block(blocks).logits
    }

    /// The guesses of blocks, as the kernel chooses them.
    pub fn guesses(&self, blocks: &[(u32, usize, usize, usize)]) -> Vec<u32> {
        self.block(blocks).chosen
    }

    fn block(&self, blocks: &[(u32, usize, usize, usize)]) -> Outcome {
        let mut rows = Vec::new();
        let mut wanted = Vec::new();
        for (token, position, sequence, count) in blocks {
            wanted.extend(rows.len() + 1..rows.len() + count);
            let token = |n| if n == 0 { *token } else { self.mask };
            rows.extend((0..*count).map(|n| row(token(n), position + n, *sequence)));
        }
        let seed = self.seed();
        let outcome = self.block.launch_at(&rows, &wanted, 1, [2 + seed as usize % 3, 0, 0], seed);
        self.inject.write_cache(&self.block.cache());
        outcome
    }

    /// Puts tokens into both contexts, `chunk` rows a step.
    pub fn feed(&self, tokens: &[u32], sequence: usize, chunk: usize) {
        let rows: Vec<Row> =
            tokens.iter().enumerate().map(|(position, token)| row(*token, position, sequence)).collect();
        for rows in rows.chunks(chunk) {
            self.step(rows);
            self.inject(rows, &(0..rows.len()).collect::<Vec<_>>());
        }
    }
}

fn lower(graphs: [&Graph; 3], sizes: Sizes) -> [ResidentProgram; 3] {
    let mut packer = Packer::new(resident::WEIGHT_ALIGN);
    graphs.map(|graph| {
        resident::resident_with(&fuse::fuse(graph).unwrap(), sizes, &mut packer)
            .unwrap_or_else(|e| panic!("{e}"))
    })
}

/// Contexts of random taps, so many positions each, then a block behind each of them: against the interpreter.
pub(super) fn check_random_context(pair: &Pair, lengths: &[usize], bound: f64) {
    let weights = [Weights(&pair.inject), Weights(&pair.block)];
    let mut inject = Interpreter::new(&pair.inject.graph, &weights[0]).unwrap();
    let mut block = Interpreter::new(&pair.block.graph, &weights[1]).unwrap();
    let vocab = pair.block.program.vocab;
    let mut random = random_numbers(5);
    for (sequence, length) in lengths.iter().enumerate() {
        let most = pair.inject.program.step_rows;
        for first in (0..*length).step_by(most) {
            let rows: Vec<Row> =
                (first..*length.min(&(first + most))).map(|position| row(0, position, sequence)).collect();
            // Rows of the taps in another order than those of the launch.
            let taps: Vec<f32> = random.by_ref().take(rows.len() * pair.tap_cols).collect();
            let reversed: Vec<f32> = taps.chunks(pair.tap_cols).rev().flatten().copied().collect();
            inject.set_input(&taps);
            inject.step(&rows, &[]).unwrap();
            let mut bytes: Vec<u8> = reversed.iter().flat_map(|value| value.to_le_bytes()).collect();
            bytes.resize(ROWS * pair.tap_cols * 4, 0xff);
            pair.write_taps(&bytes);
            let last = rows.len() as u32 - 1;
            let rows: Vec<Row> =
                rows.iter().zip((0..=last).rev()).map(|(row, token)| Row { token, ..*row }).collect();
            let seed = pair.seed();
            pair.inject.launch_at(&rows, &[], 1, [2 + seed as usize % 3, 0, 0], seed);
        }
    }
    pair.share_cache();
    block.exchange_caches(&mut inject).unwrap();
    for (sequence, length) in lengths.iter().enumerate() {
        let token = 11 + sequence as u32;
        let found = pair.blocks(&[(token, *length, sequence, 8)]);
        let mut rows: Vec<Row> = (0..8).map(|n| row(pair.mask, length + n, sequence)).collect();
        rows[0].token = token;
        let wanted: Vec<usize> = (1..8).collect();
        let wanted = block.step(&rows, &wanted).unwrap();
        let off = deviation(&found, &wanted, vocab);
        println!("behind {length} positions: {off:e}");
        assert!(off < bound, "behind {length} positions: off by {off:e}");
    }
}

/// Blocks of a pair against those of the formulas in float64, behind contexts made in different chunks.
fn check_blocks(name: &str) {
    let pair = Pair::fixture(name, 96);
    let reference = Reference::of(name);
    let vocab = pair.block.program.vocab;
    let mut worst: f64 = 0.0;
    let mut compared = 0;
    for number in 0..4 {
        let tokens = &reference.whole[&format!("block_tokens.{number}")];
        let (token, before) = tokens.split_last().unwrap();
        // Nothing is read that this text did not write.
        for simulation in [&pair.target, &pair.inject] {
            simulation.write_cache(&vec![0xff; simulation.cache_bytes()]);
        }
        pair.feed(before, 1, [24, 3, 7, 24][number]);
        for rows in [2, 5, 8] {
            // What the last block left behind the context is overwritten.
            if let Some(logits) = reference.logits.get(&format!("block.{number}.{rows}")) {
                let found = pair.blocks(&[(*token, before.len(), 1, rows)]);
                let logits: Vec<f32> = logits.iter().map(|logit| *logit as f32).collect();
                worst = worst.max(deviation(&found, &logits, vocab));
                compared += 1;
            }
        }
    }
    println!("{name}: {compared} blocks, {worst:e}");
    // Weights, keys, values and rows are rounded to float16.
    assert!(compared >= 8 && worst < 0.01, "{name}: {compared} blocks are off by {worst:e}");
}

#[test]
fn blocks_are_those_of_the_formulas() {
    check_blocks("full");
}

#[test]
fn blocks_behind_default_taps_are_those_of_the_formulas() {
    check_blocks("default-taps");
}

#[test]
fn causal_blocks_with_windows_are_those_of_the_formulas() {
    check_blocks("sliding-causal");
}

#[test]
fn blocks_with_windows_are_those_of_the_formulas() {
    check_blocks("sliding-both-ways");
}

pub(super) fn best(logits: &[f32]) -> u32 {
    let better = |best: usize, at: usize| if logits[at] > logits[best] { at } else { best };
    (0..logits.len()).reduce(better).unwrap() as u32
}

/// Rounds of two sequences in turn: a block, a step that verifies it, committed rows; against the tokens and
/// the rounds of the loop in float64.
#[test]
fn rounds_are_those_of_the_reference() {
    let name = "sliding-both-ways";
    let pair = Pair::fixture(name, 128);
    let reference = Reference::of(name);
    let vocab = pair.target.program.vocab;
    struct Text<'a> {
        tokens: Vec<u32>,
        wanted: &'a [u32],
        rounds: &'a [u32],
        added: Vec<u32>,
    }
    let mut texts: Vec<Text> = Vec::new();
    for number in [0, 1] {
        let of = |kind: &str| &reference.whole[&format!("{kind}.{number}")][..];
        let (prompt, wanted) = (of("prompt"), of("tokens"));
        pair.feed(&prompt[..prompt.len() - 1], number, 24);
        let last = row(prompt[prompt.len() - 1], prompt.len() - 1, number);
        let first = best(&pair.step(&[last]));
        pair.inject(&[last], &[0]);
        let tokens = [prompt, &[first]].concat();
        texts.push(Text { tokens, wanted, rounds: of("rounds"), added: Vec::new() });
    }
    for _ in 0..12 {
        for (sequence, text) in texts.iter_mut().enumerate() {
            if text.added.len() == text.rounds.len() {
                continue;
            }
            let position = text.tokens.len() - 1;
            let guesses = pair.blocks(&[(text.tokens[position], position, sequence, 8)]);
            let guesses: Vec<u32> = guesses.chunks(vocab).map(best).collect();
            let tokens = text.tokens[position..].iter().chain(&guesses);
            let verified: Vec<Row> =
                tokens.enumerate().map(|(n, token)| row(*token, position + n, sequence)).collect();
            let chosen: Vec<u32> = pair.step(&verified).chunks(vocab).map(best).collect();
            let right = chosen.iter().zip(&guesses).take_while(|(chosen, guess)| chosen == guess).count();
            text.tokens.extend(&chosen[..right + 1]);
            text.added.push(right as u32 + 1);
            pair.inject(&verified, &(0..=right).collect::<Vec<_>>());
        }
    }
    for text in &texts {
        assert_eq!(text.added, text.rounds[..text.added.len()]);
        let count = text.tokens.len().min(text.wanted.len());
        assert_eq!(text.tokens[..count], text.wanted[..count]);
        assert!(text.added.iter().any(|added| *added > 2) && text.added.contains(&1));
    }
}

/// A block's rows next to another block's: the same bits, whatever the order and the number of SMs.
#[test]
fn company_changes_no_bit_of_a_block() {
    let pair = Pair::fixture("full", 96);
    let vocab = pair.block.program.vocab;
    let texts: [Vec<u32>; 2] =
        [13, 30].map(|length| (0..length).map(|n| (n * 7 + length) % vocab as u32).collect());
    for (sequence, text) in texts.iter().enumerate() {
        pair.feed(text, sequence, 8);
    }
    let blocks = [(5, 13, 0, 3), (9, 30, 1, 5)];
    let cache = pair.block.cache();
    let alone: Vec<f32> = blocks
        .iter()
        .flat_map(|block| {
            pair.block.write_cache(&cache);
            pair.blocks(&[*block])
        })
        .collect();
    for _ in 0..3 {
        pair.block.write_cache(&cache);
        assert!(pair.blocks(&blocks) == alone, "in company a block has other bits");
    }
    // A row of a block sees those behind it: without them it guesses otherwise.
    pair.block.write_cache(&cache);
    assert!(pair.blocks(&[(5, 13, 0, 2)]) != alone[..vocab]);
}

/// A draft of one layer for a target of two with so many columns; its taps are not in the order of the layers.
fn small_draft(hidden: usize) -> Value {
    json!({
        "architectures": ["DFlashDraftModel"], "hidden_size": hidden, "intermediate_size": 72,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "block_size": 8, "dflash_config": {"target_layer_ids": [1, 0], "mask_token_id": 7}
    })
}

/// A mixture adds to its residual stream expert by expert; what it leaves for a draft is the last sum, in the
/// order of the taps, of rows in a later launch at a later place.
#[test]
fn a_mixture_leaves_the_interpreters_taps() {
    let pair = Pair::synthetic(&super::qwen3_moe(), &small_draft(144), Format::BF16, 64);
    let weights = Weights(&pair.target);
    let mut interpreter = Interpreter::new(&pair.target.graph, &weights).unwrap();
    let rows: Vec<Row> = (0..7)
        .map(|n| row(n * 7 % 80, n as usize, 0))
        .chain((0..4).map(|n| row(n * 5 + 3, n as usize, 1)))
        .collect();
    let mut wanted = Vec::new();
    interpreter
        .step_observed(&rows, &[], &mut |node, values| {
            if node.op == Op::Taps {
                wanted = values.to_vec();
            }
        })
        .unwrap();
    pair.step(&rows);
    let found = super::floats(&std::fs::read(pair.target.path("taps.bin")).unwrap());
    let (found, unused) = found.split_at(wanted.len());
    let off = deviation(found, &wanted, pair.tap_cols / 2);
    assert!(off < 0.03, "off by {off:e}");
    assert!(unused.iter().all(|value| value.is_nan()), "rows that the step did not have");
}

/// Drafts of MiMo's kind and unlike their targets, against the interpreter: sinks, values scaled and narrower
/// than keys, a part of a head rotated, another rope for the context, an embedding of the mask's own, windows
/// inside of a block; contexts of several chunks and spans; `fc` in parts.
fn check_mimos_kind(window: usize, weights: Format, lengths: &[usize], bound: f64) {
    let target = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 136, "intermediate_size": 72, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 83,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 3072,
        "tie_word_embeddings": true
    });
    let mut draft = json!({
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": 136,
        "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 48, "v_head_dim": 40, "partial_rotary_factor": 0.334, "block_size": 8,
        "vocab_size": 83, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "sliding_window": 1100,
        "layer_types": ["full_attention", "sliding_attention"], "is_causal": false, "attention_bias": true,
        "dflash_config": {
            "target_layer_ids": [2, 0, 1], "mask_token_id": 7, "attention_value_scale": 0.612,
            "attention_sink_bias": true
        }
    });
    draft["sliding_window"] = window.into();
    let pair = Pair::synthetic(&target, &draft, weights, 1152);
    check_random_context(&pair, lengths, bound);
}

// Blocks across the end of a chunk (128) and of a span (1,024).

#[test]
fn drafts_of_mimos_kind_are_the_interpreters_in_f16() {
    check_mimos_kind(200, Format::F16, &[124, 1021], 0.01);
}

#[test]
fn drafts_of_mimos_kind_are_the_interpreters_in_bf16() {
    check_mimos_kind(3, Format::BF16, &[125, 5], 0.03);
}

#[test]
fn drafts_of_mimos_kind_are_the_interpreters_in_fp8() {
    check_mimos_kind(5, Format::FP8_BLOCK, &[3, 126], 0.03);
}
