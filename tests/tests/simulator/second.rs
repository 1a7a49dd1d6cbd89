//! Drafts of the second version on the simulated machine: convolutions, candidates, pairs and the walk.

use super::draft::{Pair, check_random_context};
use super::{Outcome, deviation, row};
use serde_json::json;
use tilec_ir::format::Format;
use tilec_ir::graph::interp::Row;
use tilec_ir::resident::{Kind, Pairs};
use tilec_tests::Reference;

const SECOND: [&str; 2] = ["second", "second-capped"];

/// What a launch of a block left of its selector: candidates and scores of all guesses.
struct Selected {
    k: usize,
    tokens: Vec<u32>,
    scores: Vec<f32>,
}

impl Selected {
    fn of(pair: &Pair, outcome: &Outcome, guesses: usize) -> Selected {
        let program = &pair.block.program;
        let found = program.after.iter().find_map(|stage| match &stage.kind {
            Kind::Pairs(pairs) => Some(pairs),
            _ => None,
        });
        let Pairs { top, tokens, scores, .. } = found.unwrap();
        let words = |buffer, count: usize| -> Vec<u32> {
            let at = program.buffer(buffer).offset;
            let bytes = &outcome.arena[at..at + count * 4];
            bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
        };
        let tokens = words(*tokens, guesses * top.k);
        let scores = words(*scores, guesses * top.k * top.k).into_iter().map(f32::from_bits).collect();
        Selected { k: top.k, tokens, scores }
    }

    /// The scores of a guess behind a place of the guess before it.
    fn behind(&self, guess: usize, place: usize) -> (&[u32], &[f32]) {
        let (k, at) = (self.k, guess * self.k + place);
        (&self.tokens[guess * k..][..k], &self.scores[at * k..][..k])
    }
}

/// The tokens of the largest of a row's logits, of equals the lower.
fn largest(logits: &[f32], k: usize) -> Vec<u32> {
    let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
    tokens.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    tokens.truncate(k);
    tokens
}

/// Rows of blocks (token, position, sequence, rows), and which are guesses.
fn rows_of(pair: &Pair, blocks: &[(u32, usize, usize, usize)]) -> (Vec<Row>, Vec<usize>) {
    let (mut rows, mut wanted) = (Vec::new(), Vec::new());
    for (token, position, sequence, count) in blocks {
        wanted.extend(rows.len() + 1..rows.len() + count);
        let token = |n| if n == 0 { *token } else { pair.mask };
        rows.extend((0..*count).map(|n| row(token(n), position + n, *sequence)));
    }
    (rows, wanted)
}

/// Blocks, candidates, scores and guesses against the formulas in float64.
#[test]
fn guesses_are_chosen_as_the_formulas_do() {
    for name in SECOND {
        let pair = Pair::fixture(name, 96);
        let reference = Reference::of(name);
        let vocab = pair.block.program.vocab;
        let (mut worst, mut off, mut same, mut guesses): (f64, f64, usize, usize) = (0.0, 0.0, 0, 0);
        for number in 0..4 {
            let tokens = &reference.whole[&format!("block_tokens.{number}")];
            let (token, before) = tokens.split_last().unwrap();
            for simulation in [&pair.target, &pair.inject] {
                simulation.write_cache(&vec![0xff; simulation.cache_bytes()]);
            }
            pair.feed(before, 1, [24, 3, 7, 24][number]);
            for count in [2, 5, 6, 8] {
                let of = format!("{number}.{count}");
                let Some(path) = reference.whole.get(&format!("walk.{of}")) else { continue };
                let (rows, wanted) = rows_of(&pair, &[(*token, before.len(), 1, count)]);
                let seed = pair.seed();
                let outcome = pair.block.launch_at(&rows, &wanted, 1, [2 + seed as usize % 3, 0, 0], seed);
                let theirs: Vec<f32> =
                    reference.logits[&format!("block.{of}")].iter().map(|logit| *logit as f32).collect();
                worst = worst.max(deviation(&outcome.logits, &theirs, vocab));
                let selected = Selected::of(&pair, &outcome, wanted.len());
                let k = selected.k;
                let (scores, candidates) = (
                    &reference.logits[&format!("scores.{of}")],
                    &reference.whole[&format!("candidates.{of}")],
                );
                let (mut place, mut their_place) = (0, 0);
                for (guess, logits) in outcome.logits.chunks(vocab).enumerate() {
                    let (tokens, own) = selected.behind(guess, place);
                    assert_eq!(tokens, largest(logits, k), "{name} {of}: candidates of guess {guess}");
                    place = (0..k).fold(0, |best, at| if own[at] > own[best] { at } else { best });
                    assert_eq!(outcome.chosen[guess], tokens[place], "{name} {of}: guess {guess}");
                    same += usize::from(tokens[place] == path[guess]);
                    guesses += 1;
                    // On the reference's way, where it leads over our candidates.
                    let (_, own) = selected.behind(guess, their_place);
                    for (token, score) in tokens.iter().zip(own) {
                        if let Some(at) = candidates[guess * k..][..k].iter().position(|other| other == token)
                        {
                            off = off.max((f64::from(*score) - scores[guess * k + at]).abs());
                        }
                    }
                    let Some(next) = tokens.iter().position(|token| *token == path[guess]) else { break };
                    their_place = next;
                }
            }
        }
        println!("{name}: blocks {worst:e} off, scores {off:e}, {same} of {guesses} guesses the same");
        // Everything is rounded to float16; scores are up to ten in size.
        assert!(worst < 0.02 && off < 0.1, "{name}: blocks are {worst:e} off, scores {off:e}");
        assert!(guesses >= 40 && same * 10 >= guesses * 9, "{name}: {same} of {guesses}");
    }
}

/// Blocks in one launch: the same bits and guesses as each alone, whatever the order and the number of SMs.
#[test]
fn blocks_of_the_second_version_do_not_see_each_other() {
    let pair = Pair::fixture("second", 96);
    let vocab = pair.block.program.vocab;
    for (sequence, length) in [13u32, 30].into_iter().enumerate() {
        let text: Vec<u32> = (0..length).map(|n| (n * 7 + length) % vocab as u32).collect();
        pair.feed(&text, sequence, 8);
    }
    let blocks = [(5, 13, 0, 3), (9, 30, 1, 5)];
    let cache = pair.block.cache();
    let launch = |blocks: &[(u32, usize, usize, usize)]| {
        pair.block.write_cache(&cache);
        let (rows, wanted) = rows_of(&pair, blocks);
        let seed = pair.seed();
        let outcome = pair.block.launch_at(&rows, &wanted, 1, [1 + seed as usize % 4, 0, 0], seed);
        let Selected { tokens, scores, .. } = Selected::of(&pair, &outcome, wanted.len());
        (outcome.logits, tokens, scores, outcome.chosen[..wanted.len()].to_vec())
    };
    let [one, other] = blocks.map(|block| launch(&[block]));
    for _ in 0..3 {
        let both = launch(&blocks);
        assert!(both.0 == [&one.0[..], &other.0].concat(), "in company a block has other bits");
        assert!(both.1 == [&one.1[..], &other.1].concat() && both.2 == [&one.2[..], &other.2].concat());
        assert_eq!(both.3, [&one.3[..], &other.3].concat());
    }
    let swapped = launch(&[blocks[1], blocks[0]]);
    assert_eq!(swapped.3, [&other.3[..], &one.3].concat());
}

/// Unlike their targets, in formats whose rows are prepared and in such whose rows are scaled; groups that are no
/// powers of two, blocks across the end of a chunk.
fn check_random(weights: Format, bound: f64) {
    let target = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 136, "intermediate_size": 72, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 1083,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 3072,
        "tie_word_embeddings": true
    });
    let draft = json!({
        "architectures": ["DFlash2DraftModel"], "model_type": "qwen3", "hidden_size": 136,
        "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 48, "vocab_size": 1083, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"], "is_causal": false, "attention_bias": true,
        "dflash_config": {
            "block_size": 8, "target_layer_ids": [2, 0, 1], "mask_token_id": 7, "conv_kernel_size": 2,
            "conv_group_size": 17, "selector_rank": 72, "selector_top_k": 20
        }
    });
    let pair = Pair::synthetic(&target, &draft, weights, 256);
    check_random_context(&pair, &[124, 3], bound);
    // The candidates of logits in several segments, and the walk over them.
    let (rows, wanted) = rows_of(&pair, &[(11, 124, 0, 5), (12, 3, 1, 3)]);
    let outcome = pair.block.launch_at(&rows, &wanted, 1, [3, 0, 0], 9);
    let selected = Selected::of(&pair, &outcome, wanted.len());
    let mut place = 0;
    for (guess, logits) in outcome.logits.chunks(1083).enumerate() {
        place = if [0, 4].contains(&guess) { 0 } else { place };
        let (tokens, scores) = selected.behind(guess, place);
        assert_eq!(tokens, largest(logits, 20), "{weights}: guess {guess}");
        place = (0..20).fold(0, |best, at| if scores[at] > scores[best] { at } else { best });
        assert_eq!(outcome.chosen[guess], tokens[place], "{weights}: guess {guess}");
        // Behind a token that is known, every place says the same.
        let known = [0, 4].contains(&guess);
        assert_eq!(known, (1..20).all(|other| selected.behind(guess, other) == selected.behind(guess, 0)));
    }
}

#[test]
fn random_drafts_of_the_second_version_are_the_interpreters_in_bf16() {
    check_random(Format::BF16, 0.03);
}

#[test]
fn random_drafts_of_the_second_version_are_the_interpreters_in_fp8() {
    check_random(Format::FP8_BLOCK, 0.04);
}
