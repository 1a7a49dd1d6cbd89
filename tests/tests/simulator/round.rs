//! Rounds of a draft in one launch: what the three kernels give round by round, and the loop of the formulas.

use super::draft::{Pair, best};
use super::{ROUND_AT, SEQUENCES, build_kernel, row, sampling_words, words};
use serde_json::json;
use std::process::Command;
use tilec_codegen::emit::cuda::{RoundPrograms, emit_round};
use tilec_codegen::nvrtc::Arch;
use tilec_codegen::passes::resident::Sizes;
use tilec_ir::format::Format;
use tilec_ir::graph::interp::Row;
use tilec_ir::launch::{LAUNCH_ROWS, ROUND_WORDS, RoundResult, RoundSequence, SYNC_BYTES, SampleRow};
use tilec_ir::resident::{Epilogue, Kind, ResidentProgram};
use tilec_ir::stages::Slot;
use tilec_runtime::pack::pack;
use tilec_runtime::sampling::{Sampler, SamplingParams};
use tilec_tests::Reference;

/// The kernel of rounds beside the three of a pair, whose caches it goes on with.
struct Rounds<'p> {
    pair: &'p Pair,
    folder: tempfile::TempDir,
    shared_bytes: usize,
}

/// What a launch is told beside its sequences.
#[derive(Clone, Default)]
struct Asked {
    rounds: usize,
    /// Of each sequence; none for the largest logits.
    sampling: Vec<SampleRow>,
    stops: Vec<u32>,
    accept: u32,
    halt: bool,
    /// Whether times are recorded, in `trace.bin`.
    trace: bool,
    /// Bytes of the weights that never come, and turns until somebody says so.
    lost: Option<(usize, u32)>,
}

impl Asked {
    fn rounds(rounds: usize) -> Asked {
        Asked { rounds, ..Asked::default() }
    }
}

/// What became of a sequence in a round.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Added {
    tokens: Vec<u32>,
    right: usize,
}

/// Names of the stages of a round.
fn stage_names(pair: &Pair) -> Vec<String> {
    let [model, inject, block] =
        [&pair.target, &pair.inject, &pair.block].map(|simulation| &simulation.program);
    RoundPrograms { model, inject, block, mask_token: pair.mask }.stages()
}

fn arena_bytes(program: &ResidentProgram) -> usize {
    program.buffers.iter().map(|buffer| buffer.offset + buffer.bytes()).max().unwrap()
}

impl<'p> Rounds<'p> {
    fn new(pair: &'p Pair) -> Rounds<'p> {
        let programs = [&pair.target, &pair.inject, &pair.block].map(|simulation| &simulation.program);
        let [model, inject, block] = programs;
        let programs = RoundPrograms { model, inject, block, mask_token: pair.mask };
        let text = emit_round(programs, Arch::Sm90a).unwrap().expect("the programs fit together");
        assert_eq!(text, emit_round(programs, Arch::Sm90a).unwrap().unwrap());
        let folder = tempfile::tempdir().unwrap();
        // The last program's recipe has what all of them read.
        let packed = pack(&pair.block.checkpoint, &block.packing, &mut |_, _| ()).unwrap();
        std::fs::write(folder.path().join("weights.bin"), packed.as_slice()).unwrap();
        build_kernel(folder.path(), &text.text);
        Rounds { pair, folder, shared_bytes: text.shared.bytes() }
    }

    /// Runs rounds on so many blocks, and leaves the caches to the pair. By round, what was added to each sequence.
    fn launch(
        &self,
        sequences: &[RoundSequence],
        asked: &Asked,
        blocks: usize,
        seed: u64,
    ) -> Vec<Vec<Added>> {
        let found = self.try_launch(sequences, asked, blocks, seed);
        found.unwrap_or_else(|problem| panic!("seed {seed}, {blocks} blocks: {problem}"))
    }

    /// The same, or what the machine says.
    fn try_launch(
        &self,
        sequences: &[RoundSequence],
        asked: &Asked,
        blocks: usize,
        seed: u64,
    ) -> Result<Vec<Vec<Added>>, String> {
        let (pair, target) = (self.pair, &self.pair.target);
        let path = |name: &str| self.folder.path().join(name);
        std::fs::write(path("kv.bin"), target.cache()).unwrap();
        std::fs::write(path("draft_kv.bin"), pair.block.cache()).unwrap();
        std::fs::write(path("taps.bin"), vec![0xff; LAUNCH_ROWS * pair.tap_cols * 4]).unwrap();
        let rows: usize = sequences.iter().map(|of| of.guesses as usize + 1).sum();
        let (pages, per_sequence) = (target.pages(), target.pages_per_sequence());
        let sizes = [
            arena_bytes(&target.program),
            SYNC_BYTES,
            target.program.vocab,
            rows,
            rows,
            asked.rounds,
            per_sequence,
            pages,
            self.shared_bytes,
            0,
            0,
        ];
        let mut launch: Vec<u32> = sizes.map(|size| size as u32).to_vec();
        launch.resize(sizes.len() + 4 * LAUNCH_ROWS, u32::MAX);
        // Every row of the model's step as its sequence.
        let of = sequences.iter().zip(&asked.sampling);
        let sampling: Vec<SampleRow> =
            of.flat_map(|(of, sampling)| vec![*sampling; of.guesses as usize + 1]).collect();
        launch.extend(sampling_words(&sampling));
        assert_eq!(launch.len(), ROUND_AT);
        launch.push(sequences.len() as u32);
        launch.extend(sequences.iter().flat_map(RoundSequence::words));
        launch.resize(ROUND_AT + 1 + 16 * 8, 0);
        let mut passes = vec![0];
        for of in sequences {
            match passes.last_mut() {
                Some(rows) if *rows + of.rows as usize <= target.program.step_rows => {
                    *rows += of.rows as usize
                }
                _ => passes.push(of.rows as usize),
            }
        }
        let arenas = [&pair.block, &pair.inject].map(|of| arena_bytes(&of.program) as u32);
        launch.extend([passes.len() as u32, asked.accept, arenas[0], arenas[1], u32::from(asked.halt)]);
        launch.push(asked.stops.len() as u32);
        launch.extend(&asked.stops);
        launch.resize(super::LAUNCH_WORDS - 3, 0);
        let (lost, patience) = asked.lost.map_or((0, 0), |(at, turns)| (at as u32 / 64, turns));
        launch.extend([lost, lost + u32::from(asked.lost.is_some()), patience]);
        launch.extend(0..pages as u32);
        let bytes: Vec<u8> = launch.iter().flat_map(|word| word.to_le_bytes()).collect();
        std::fs::write(path("launch.bin"), bytes).unwrap();
        let mut command = Command::new(path("simulator"));
        if asked.trace {
            command.env("SIMULATOR_TRACE", path("trace.bin"));
        }
        let output =
            command.arg(self.folder.path()).args([blocks.to_string(), seed.to_string()]).output().unwrap();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        target.write_cache(&std::fs::read(path("kv.bin")).unwrap());
        let draft = std::fs::read(path("draft_kv.bin")).unwrap();
        [&pair.block, &pair.inject].iter().for_each(|of| of.write_cache(&draft));
        let chosen = words(&std::fs::read(path("chosen.bin")).unwrap());
        let round = |words: &[u32]| -> Option<Vec<Added>> {
            let (results, tokens) = words.split_at(LAUNCH_ROWS);
            if results.iter().all(|word| *word == 0) {
                assert!(tokens.iter().all(|word| *word == 0), "tokens of a round that is not there");
                return None;
            }
            let added = |(number, of): (usize, &RoundSequence)| {
                let RoundResult { tokens: count, right } = RoundResult::of(results[number]);
                assert!(count >= 1 && count <= of.guesses as usize + 1);
                let own = &tokens[of.first_row as usize..][..of.guesses as usize + 1];
                assert!(own[count..].iter().all(|word| *word == 0), "tokens behind the last");
                Added { tokens: own[..count].iter().map(|word| word - 1).collect(), right }
            };
            Some(sequences.iter().enumerate().map(added).collect())
        };
        let all: Vec<Option<Vec<Added>>> = chosen.chunks(ROUND_WORDS).map(round).collect();
        let there = all.iter().take_while(|round| round.is_some()).count();
        assert!(all[there..].iter().all(Option::is_none));
        Ok(all.into_iter().flatten().collect())
    }

    /// Runs the same launch in several orders, on several numbers of blocks; all give the same.
    fn launch_orders(&self, sequences: &[RoundSequence], asked: &Asked, orders: usize) -> Vec<Vec<Added>> {
        let before = [self.pair.target.cache(), self.pair.block.cache()];
        let mut found: Option<Vec<Vec<Added>>> = None;
        for order in 0..orders {
            self.restore(&before);
            let again = self.launch(sequences, asked, 2 + order % 4, 40 + order as u64);
            assert_eq!(*found.get_or_insert_with(|| again.clone()), again, "order {order}");
        }
        found.unwrap()
    }

    fn restore(&self, [target, draft]: &[Vec<u8>; 2]) {
        self.pair.target.write_cache(target);
        [&self.pair.block, &self.pair.inject].iter().for_each(|of| of.write_cache(draft));
    }
}

/// Sequences side by side, each behind its tokens, of which caches have all but the last.
fn behind(texts: &[&[u32]], rows: u32, guesses: u32, limit: usize) -> Vec<RoundSequence> {
    let one = |(number, tokens): (usize, &&[u32])| RoundSequence {
        token: tokens[tokens.len() - 1],
        position: tokens.len() as u32 - 1,
        sequence: number as u32,
        guesses,
        rows,
        left: 1000,
        limit: limit as u32,
        first_row: number as u32 * (guesses + 1),
    };
    texts.iter().enumerate().map(one).collect()
}

/// Puts texts into both caches but for their last tokens.
fn feed(pair: &Pair, texts: &[&[u32]]) {
    for (sequence, tokens) in texts.iter().enumerate() {
        pair.feed(&tokens[..tokens.len() - 1], sequence, 24);
    }
}

/// Rounds by the three kernels, in the way of the host: tokens and right guesses of each sequence.
fn by_host(pair: &Pair, sequences: &[RoundSequence], rounds: usize) -> Vec<Vec<Added>> {
    let vocab = pair.target.program.vocab;
    let mut all = vec![Vec::new(); rounds];
    for (number, of) in sequences.iter().enumerate() {
        let (mut token, mut position) = (of.token, of.position as usize);
        let (rows, guesses) = (of.rows as usize, of.guesses as usize);
        for round in &mut all {
            let mut guessed = pair.guesses(&[(token, position, number, rows)]);
            guessed.truncate(guesses);
            let tokens = std::iter::once(token).chain(guessed.iter().copied());
            let step: Vec<Row> = tokens.zip(position..).map(|(token, at)| row(token, at, number)).collect();
            let chosen: Vec<u32> = pair.step(&step).chunks(vocab).map(best).collect();
            let right = chosen.iter().zip(&guessed).take_while(|(chosen, guess)| chosen == guess).count();
            pair.inject(&step, &(0..=right).collect::<Vec<_>>());
            round.push(Added { tokens: chosen[..=right].to_vec(), right });
            (token, position) = (chosen[right], position + right + 1);
        }
    }
    all
}

/// The text of a sequence behind its beginning.
fn text(before: &[u32], rounds: &[Vec<Added>], sequence: usize) -> Vec<u32> {
    let added = rounds.iter().flat_map(|round| round[sequence].tokens.clone());
    before.iter().copied().chain(added).collect()
}

/// A block behind a text that rounds have made has the bits of one behind the whole text.
fn check_context(pair: &Pair, text: &[u32], sequence: usize) {
    let (token, before) = text.split_last().unwrap();
    let block = [(*token, before.len(), sequence, 8)];
    let found = pair.blocks(&block);
    let step = |pair: &Pair| pair.step(&[row(*token, before.len(), sequence)]);
    let own = step(pair);
    for simulation in [&pair.target, &pair.inject, &pair.block] {
        simulation.write_cache(&vec![0xff; simulation.cache_bytes()]);
    }
    pair.feed(before, sequence, 24);
    assert!(found == pair.blocks(&block), "a block behind rounds has other bits");
    assert!(own == step(pair), "a step behind rounds has other bits");
}

const WIDE: Sizes = Sizes { context: 128, step_rows: 16 };

/// Two sequences of a step with sixteen rows, against the tokens and the rounds of the loop in float64.
#[test]
fn launched_rounds_are_those_of_the_reference() {
    let name = "sliding-both-ways";
    let pair = Pair::fixture(name, WIDE);
    let reference = Reference::of(name);
    let mut texts: Vec<Vec<u32>> = Vec::new();
    let of = |kind: &str, number: usize| &reference.whole[&format!("{kind}.{number}")][..];
    for number in [0, 1] {
        let prompt = of("prompt", number);
        texts.push([prompt, &of("tokens", number)[prompt.len()..][..1]].concat());
    }
    let begun: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
    feed(&pair, &begun);
    let rounds = Rounds::new(&pair);
    let least = [0, 1].map(|number| of("rounds", number).len()).into_iter().min().unwrap().min(12);
    let first = rounds.launch_orders(&behind(&begun, 8, 7, 128), &Asked::rounds(least - 4), 3);
    assert_eq!(first.len(), least - 4);
    // And on from there, in another launch.
    let middle: Vec<Vec<u32>> = (0..2).map(|sequence| text(begun[sequence], &first, sequence)).collect();
    let middle: Vec<&[u32]> = middle.iter().map(Vec::as_slice).collect();
    let second = rounds.launch(&behind(&middle, 8, 7, 128), &Asked::rounds(4), 4, 9);
    let all = [first, second].concat();
    for number in [0, 1] {
        let added: Vec<u32> = all.iter().map(|round| round[number].tokens.len() as u32).collect();
        assert_eq!(added, of("rounds", number)[..added.len()]);
        assert!(all.iter().all(|round| round[number].right + 1 == round[number].tokens.len()));
        let found = text(begun[number], &all, number);
        let count = found.len().min(of("tokens", number).len());
        assert_eq!(found[..count], of("tokens", number)[..count]);
    }
    let added = |number: usize| all.iter().map(move |round| round[number].tokens.len());
    assert!(added(0).any(|added| added > 2) && !added(0).eq(added(1)), "{all:?}");
    let last = text(begun[1], &all, 1);
    check_context(&pair, &last, 1);
}

/// What ends a launch: stop tokens inside of a block, the number of tokens, room, the host's word.
#[test]
fn launches_end_behind_the_round_in_which_a_text_ends() {
    let name = "sliding-both-ways";
    let pair = Pair::fixture(name, WIDE);
    let reference = Reference::of(name);
    let begun: Vec<&[u32]> =
        (0..2).map(|number| &reference.whole[&format!("tokens.{number}")][..20]).collect();
    feed(&pair, &begun);
    let before = [pair.target.cache(), pair.block.cache()];
    let rounds = Rounds::new(&pair);
    let launch = |sequences: &[RoundSequence], asked: &Asked, seed| {
        rounds.restore(&before);
        rounds.launch(sequences, asked, 3, seed)
    };
    let sequences = behind(&begun, 8, 7, 128);
    let all = launch(&sequences, &Asked::rounds(10), 1);
    assert_eq!(all.len(), 10);
    // A token inside of a block, behind others of it, that comes up nowhere before.
    let (round, sequence, at) = (1..10)
        .flat_map(|round| [0, 1].map(|sequence| (round, sequence)))
        .find_map(|(round, sequence)| {
            let tokens = &all[round][sequence].tokens;
            let (before, own) = (&all[..round], &tokens[..tokens.len() - 1]);
            let new = |token: &u32| {
                let used = |round: &Vec<Added>| round.iter().any(|added| added.tokens.contains(token));
                !before.iter().any(used) && !all[round][1 - sequence].tokens.contains(token)
            };
            let at = own.iter().position(new)?;
            (!own[..at].contains(&own[at])).then_some((round, sequence, at))
        })
        .unwrap();
    let stop = all[round][sequence].tokens[at];
    let asked = Asked { stops: vec![90_000, stop], ..Asked::rounds(10) };
    let stopped = launch(&sequences, &asked, 2);
    assert_eq!(stopped.len(), round + 1);
    assert_eq!(stopped[..round], all[..round]);
    let mut wanted = all[round].clone();
    wanted[sequence].tokens.truncate(at + 1);
    wanted[sequence].right = at + 1;
    assert_eq!(stopped[round], wanted);
    // Both contexts are made, up to what was taken.
    for sequence in [0, 1] {
        rounds.restore(&before);
        let stopped = rounds.launch(&sequences, &asked, 4, 3);
        check_context(&pair, &text(begun[sequence], &stopped, sequence), sequence);
    }
    // As many tokens as one may have: all but the last of some round.
    let longest = (1..10).max_by_key(|round| all[*round][1].tokens.len()).unwrap();
    let count = |until: usize| all[..until].iter().map(|round| round[1].tokens.len()).sum::<usize>();
    let mut limited = sequences.clone();
    limited[1].left = count(longest + 1) as u32 - 1;
    let found = launch(&limited, &Asked::rounds(10), 4);
    assert_eq!(found.len(), longest + 1);
    assert_eq!(found[longest][0], all[longest][0]);
    let tokens = &all[longest][1].tokens;
    assert_eq!(found[longest][1].tokens, tokens[..tokens.len() - 1]);
    // No room for the fifth round.
    let mut short = sequences.clone();
    short[1].limit = (begun[1].len() - 1 + count(4)) as u32 + 7;
    assert_eq!(launch(&short, &Asked::rounds(10), 5), all[..4]);
    short[1].limit += 1;
    assert_eq!(
        launch(&short, &Asked::rounds(10), 6)[..],
        all[..5.max(launch(&short, &Asked::rounds(10), 6).len())]
    );
    // The host's word is heard at a head.
    assert_eq!(launch(&sequences, &Asked { halt: true, ..Asked::rounds(10) }, 7), all[..1]);
}

/// So many tokens a round as are asked for, whatever was guessed.
#[test]
fn rounds_add_as_many_tokens_as_they_are_told() {
    let pair = Pair::fixture("full", 96);
    let text: Vec<u32> = (0..9).map(|n| n * 7 % 50).collect();
    feed(&pair, &[&text]);
    let before = [pair.target.cache(), pair.block.cache()];
    let rounds = Rounds::new(&pair);
    for (accept, wanted) in
        [(1000, [1; 6]), (3500, [4, 3, 4, 3, 4, 3]), (8000, [8; 6]), (2300, [2, 3, 2, 2, 3, 2])]
    {
        rounds.restore(&before);
        let asked = Asked { accept, ..Asked::rounds(6) };
        let found = rounds.launch(&behind(&[&text], 8, 7, 96), &asked, 3, u64::from(accept));
        let added: Vec<usize> = found.iter().map(|round| round[0].tokens.len()).collect();
        assert_eq!(added, wanted);
        assert!(found.iter().all(|round| round[0].right + 1 == round[0].tokens.len()));
    }
}

/// Sequences by chance, each by its own parameters, or by the largest logits; texts are those of single steps. Blocks
/// of `rows` rows take so many passes.
fn check_sampled(step_rows: usize, count: usize, [rows, guesses, passes]: [u32; 3]) {
    let name = "full";
    let pair = Pair::fixture(name, Sizes { context: 96, step_rows });
    let reference = Reference::of(name);
    let vocab = pair.target.program.vocab;
    let begun: Vec<&[u32]> =
        (0..count).map(|number| &reference.whole[&format!("tokens.{number}")][..14 + number]).collect();
    let params = [
        SamplingParams { temperature: 0.7, seed: 5, ..SamplingParams::default() },
        SamplingParams { temperature: 1.3, top_k: 9, top_p: 0.9, seed: 6, ..SamplingParams::default() },
        SamplingParams::greedy(),
    ];
    assert_eq!(count.div_ceil(step_rows / rows as usize), passes as usize);
    feed(&pair, &begun);
    let rounds = Rounds::new(&pair);
    let sampling = params[..count].iter().map(SamplingParams::launch_row).collect();
    let asked = Asked { sampling, ..Asked::rounds(7) };
    let found = rounds.launch_orders(&behind(&begun, rows, guesses, 96), &asked, 2);
    assert_eq!(found.len(), 7);
    for (sequence, params) in params[..count].iter().enumerate() {
        let wanted = text(begun[sequence], &found, sequence);
        let mut sampler = Sampler::new(params.clone()).unwrap();
        for position in begun[sequence].len() - 1..wanted.len() - 1 {
            let logits = pair.step(&[row(wanted[position], position, sequence)]);
            let choice = sampler.sample(&logits[..vocab], position as u64 + 1).unwrap();
            assert_eq!(choice.token, wanted[position + 1], "sequence {sequence}, position {position}");
        }
    }
}

#[test]
fn sampled_rounds_choose_what_single_steps_choose() {
    check_sampled(16, 3, [5, 3, 1]);
}

#[test]
fn sampled_rounds_with_passes_of_blocks_choose_what_single_steps_choose() {
    check_sampled(8, 2, [5, 3, 2]);
    check_sampled(8, 3, [5, 1, 3]);
}

/// Blocks of several sequences in passes of their own, whose guesses are verified in one step.
#[test]
fn blocks_take_as_many_passes_as_they_need() {
    let name = "sliding-both-ways";
    let pair = Pair::fixture(name, 96);
    let reference = Reference::of(name);
    let begun: Vec<&[u32]> =
        (0..4).map(|number| &reference.whole[&format!("tokens.{}", number % 2)][..13 + 5 * number]).collect();
    feed(&pair, &begun);
    let before = [pair.target.cache(), pair.block.cache()];
    let rounds = Rounds::new(&pair);
    // Two passes of whole blocks; three, of which the second has two short blocks.
    let mut uneven = behind(&begun, 8, 1, 96);
    (uneven[1].rows, uneven[2].rows) = (3, 5);
    for (sequences, count) in [(behind(&begun[..2], 8, 3, 96), 4), (uneven, 3)] {
        rounds.restore(&before);
        let wanted = by_host(&pair, &sequences, count);
        rounds.restore(&before);
        let found = rounds.launch_orders(&sequences, &Asked::rounds(count), 2);
        assert_eq!(found, wanted);
    }
}

/// A mixture with a draft unlike it, whose guesses are wrong nearly always; one whose guesses are short.
#[test]
fn rounds_of_a_mixture_are_those_of_three_kernels() {
    let draft = json!({
        "architectures": ["DFlashDraftModel"], "hidden_size": 144, "intermediate_size": 72,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6,
        "block_size": 8, "dflash_config": {"target_layer_ids": [1, 0], "mask_token_id": 7}
    });
    let pair = Pair::synthetic(&super::qwen3_moe(), &draft, Format::BF16, 64);
    let begun: Vec<u32> = (0..11).map(|n| n * 5 % 90).collect();
    feed(&pair, &[&begun]);
    let before = [pair.target.cache(), pair.block.cache()];
    let rounds = Rounds::new(&pair);
    for (rows, guesses) in [(8, 7), (8, 2), (5, 4)] {
        let sequences = behind(&[&begun], rows, guesses, 64);
        rounds.restore(&before);
        let wanted = by_host(&pair, &sequences, 4);
        rounds.restore(&before);
        assert_eq!(rounds.launch(&sequences, &Asked::rounds(4), 3, u64::from(rows + guesses)), wanted);
    }
    let sequences = behind(&[&begun], 8, 7, 64);
    rounds.restore(&before);
    let found = rounds.launch(&sequences, &Asked::rounds(3), 5, 77);
    check_context(&pair, &text(&begun, &found, 0), 0);
}

/// Four sequences fill the widest step, each with its own way of accepting.
#[test]
fn four_sequences_share_thirty_two_rows() {
    let name = "sliding-both-ways";
    let pair = Pair::fixture(name, Sizes { context: 96, step_rows: 32 });
    let reference = Reference::of(name);
    let begun: Vec<&[u32]> =
        (0..4).map(|number| &reference.whole[&format!("tokens.{}", number % 2)][..17 + 5 * number]).collect();
    feed(&pair, &begun);
    let before = [pair.target.cache(), pair.block.cache()];
    let sequences = behind(&begun, 8, 7, 96);
    let wanted = by_host(&pair, &sequences, 3);
    let rounds = Rounds::new(&pair);
    rounds.restore(&before);
    let found = rounds.launch_orders(&sequences, &Asked::rounds(3), 2);
    assert_eq!(found, wanted);
    let added: Vec<usize> = (0..4).map(|n| found.iter().map(|round| round[n].tokens.len()).sum()).collect();
    assert!(added.iter().any(|count| *count != added[0]), "{added:?}");
}

/// Eight sequences with blocks in two passes; one ends by a stop token that nobody else says, or has few tokens left.
#[test]
fn eight_sequences_accept_differently_until_one_ends() {
    let name = "sliding-both-ways";
    let pair = Pair::fixture(name, Sizes { context: 96, step_rows: 32 });
    let reference = Reference::of(name);
    let begun: Vec<&[u32]> =
        (0..8).map(|number| &reference.whole[&format!("tokens.{}", number % 2)][..9 + 3 * number]).collect();
    feed(&pair, &begun);
    let before = [pair.target.cache(), pair.block.cache()];
    let sequences = behind(&begun, 8, 3, 96);
    let wanted = by_host(&pair, &sequences, 3);
    let rounds = Rounds::new(&pair);
    rounds.restore(&before);
    assert_eq!(rounds.launch(&sequences, &Asked::rounds(3), 3, 11), wanted);
    let of = |round: usize| wanted[round].iter().map(|added| added.tokens.len()).collect::<Vec<_>>();
    let lengths: std::collections::BTreeSet<usize> = (0..3).flat_map(of).collect();
    assert!(lengths.len() >= 3, "{wanted:?}");
    // A token that some sequence says inside of what it takes, as late as there is one.
    let says = |round: &Vec<Added>, token: u32| round.iter().any(|added| added.tokens.contains(&token));
    let inside = |round: &Vec<Added>, token: u32| {
        round.iter().any(|added| added.tokens[..added.tokens.len() - 1].contains(&token))
    };
    let ends = |token: u32| {
        let round = wanted.iter().position(|round| says(round, token))?;
        inside(&wanted[round], token).then_some((round, token))
    };
    let tokens = 0..pair.target.program.vocab as u32;
    let (last, stop) = tokens.filter_map(ends).max().expect("a token that ends a launch");
    let mut cut = wanted[..=last].to_vec();
    for added in &mut cut[last] {
        if let Some(at) = added.tokens.iter().position(|token| *token == stop) {
            added.tokens.truncate(at + 1);
            added.right = added.right.min(at + 1);
        }
    }
    assert!(cut[last] != wanted[last] && cut[last].iter().zip(&wanted[last]).any(|(cut, all)| cut == all));
    rounds.restore(&before);
    let asked = Asked { stops: vec![stop], ..Asked::rounds(3) };
    assert_eq!(rounds.launch(&sequences, &asked, 4, 12), cut);
    // As many tokens as one may have are there in the first round.
    let mut few = sequences.clone();
    few[5].left = wanted[0][5].tokens.len() as u32;
    rounds.restore(&before);
    assert_eq!(rounds.launch(&few, &Asked::rounds(3), 2, 13), wanted[..1]);
}

/// Sequences without guesses stand behind the others: a token each round, and the draft's context as well. Their rows
/// fit behind blocks that fill a pass.
#[test]
fn sequences_without_guesses_ride_along() {
    let name = "sliding-both-ways";
    let pair = Pair::fixture(name, WIDE);
    let reference = Reference::of(name);
    let begun: Vec<&[u32]> =
        (0..4).map(|number| &reference.whole[&format!("tokens.{}", number % 2)][..13 + 3 * number]).collect();
    feed(&pair, &begun);
    let before = [pair.target.cache(), pair.block.cache()];
    let mut sequences = behind(&begun, 8, 5, 128);
    for (number, of) in sequences.iter_mut().enumerate().skip(2) {
        (of.rows, of.guesses, of.first_row) = (0, 0, 12 + number as u32 - 2);
    }
    let count = 4;
    let guessed = by_host(&pair, &sequences[..2], count);
    let rounds = Rounds::new(&pair);
    rounds.restore(&before);
    let found = rounds.launch_orders(&sequences, &Asked::rounds(count), 2);
    assert_eq!(found.len(), count);
    for (found, guessed) in found.iter().zip(&guessed) {
        assert_eq!(found[..2], guessed[..]);
        assert!(found[2..].iter().all(|added| (added.tokens.len(), added.right) == (1, 0)));
    }
    let vocab = pair.target.program.vocab;
    for sequence in [2, 3] {
        let wanted = text(begun[sequence], &found, sequence);
        for position in begun[sequence].len() - 1..wanted.len() - 1 {
            let logits = pair.step(&[row(wanted[position], position, sequence)]);
            assert_eq!(
                best(&logits[..vocab]),
                wanted[position + 1],
                "sequence {sequence}, position {position}"
            );
        }
    }
    check_context(&pair, &text(begun[3], &found, 3), 3);
}

/// Every SM has times of all stages of the last round, each step's behind those of the step before; they change no
/// token.
#[test]
fn the_last_round_has_times_of_all_its_stages() {
    let pair = Pair::fixture("full", 96);
    let begun: Vec<u32> = (0..9).map(|n| n * 7 % 50).collect();
    feed(&pair, &[&begun]);
    let before = [pair.target.cache(), pair.block.cache()];
    let rounds = Rounds::new(&pair);
    let sequences = behind(&[&begun], 8, 7, 96);
    let wanted = rounds.launch(&sequences, &Asked::rounds(3), 3, 21);
    rounds.restore(&before);
    let blocks = 3;
    let asked = Asked { trace: true, ..Asked::rounds(3) };
    assert_eq!(rounds.launch(&sequences, &asked, blocks, 22), wanted);
    let bytes = std::fs::read(rounds.folder.path().join("trace.bin")).unwrap();
    let times: Vec<u64> = bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    let steps = [&pair.block, &pair.target].map(|of| of.program.sequence().len());
    let stages = stage_names(&pair).len();
    let mut firsts = [0, steps[0], steps[0] + steps[1]].map(|first| (first, Vec::new()));
    for block in 0..blocks {
        let records = times[block * stages * 3..][..stages * 3].as_chunks::<3>().0;
        let mut last = 0;
        for (stage, [wait, start, end]) in records.iter().enumerate() {
            assert!(
                last <= *wait && 0 < *wait && wait <= start && start < end,
                "{block} {stage}: {records:?}"
            );
            last = *end;
        }
        for (first, starts) in &mut firsts {
            let [wait, start, _] = records[*first];
            assert_eq!(wait, start, "a step begins when its rows are there");
            starts.push(start);
        }
    }
    // No step begins before all SMs have ended the one before.
    for (first, starts) in &firsts[1..] {
        let ended = (0..blocks).map(|block| times[(block * stages + first - 1) * 3 + 2]).max().unwrap();
        assert!(starts.iter().all(|start| *start >= ended), "{starts:?} {ended}");
    }
}

/// A draft whose context is not a number guesses nonsense, and changes no token.
#[test]
fn a_broken_draft_changes_no_token() {
    let pair = Pair::fixture("full", 96);
    let begun: Vec<u32> = (0..9).map(|n| n * 7 % 50).collect();
    feed(&pair, &[&begun]);
    let broken = vec![0xff; pair.block.cache_bytes()];
    [&pair.block, &pair.inject].iter().for_each(|of| of.write_cache(&broken));
    let rounds = Rounds::new(&pair);
    let found = rounds.launch(&behind(&[&begun], 8, 7, 96), &Asked::rounds(5), 3, 5);
    let wanted = text(&begun, &found, 0);
    assert!(found.len() == 5 && wanted.len() >= begun.len() + 5);
    for position in begun.len() - 1..wanted.len() - 1 {
        let logits = pair.step(&[row(wanted[position], position, 0)]);
        assert_eq!(best(&logits), wanted[position + 1], "position {position}");
    }
}

/// Weights that never come are missed in their stage of the round, by the number that the plan's names have.
#[test]
fn a_wait_that_gives_up_names_its_stage() {
    let pair = Pair::fixture("full", 96);
    let begun: Vec<u32> = (0..9).map(|n| n * 7 % 50).collect();
    feed(&pair, &[&begun]);
    let before = [pair.target.cache(), pair.block.cache()];
    let rounds = Rounds::new(&pair);
    let programs = [&pair.block, &pair.target, &pair.inject].map(|simulation| &simulation.program);
    let names = stage_names(&pair);
    for (step, program) in programs.into_iter().enumerate() {
        // The last product by itself, which is no other program's.
        let sequence = program.sequence();
        let (at, number, name) = (0..sequence.len())
            .rev()
            .find_map(|number| {
                let (name, layer, stage) = &sequence[number];
                let Kind::Gemm(gemm) = &stage.kind else { return None };
                match (gemm.weights, layer) {
                    (Slot::Layer(n), Some(layer)) => Some((program.layers[*layer].offsets[n], number, name)),
                    // The head is both programs'.
                    (Slot::Fixed(at), _) if gemm.epilogue != Epilogue::Logits => Some((at, number, name)),
                    _ => None,
                }
            })
            .unwrap();
        rounds.restore(&before);
        let asked = Asked { lost: Some((at as usize, 3_000_000)), ..Asked::rounds(2) };
        let problem = rounds.try_launch(&behind(&[&begun], 8, 7, 96), &asked, 2, step as u64).unwrap_err();
        let first: usize = programs[..step].iter().map(|program| program.sequence().len()).sum();
        // In a round nobody takes taps.
        let number = if step == 2 { number - 1 } else { number };
        let wanted = format!("stage {}, role 2, step {step}\n", first + number);
        assert!(problem.contains(&wanted), "{wanted}{problem}");
        assert!(names[first + number].ends_with(name.as_str()));
    }
}

/// A draft whose guesses a selector chooses, in blocks of two sequences and alone.
#[test]
fn rounds_of_the_second_version_are_those_of_three_kernels() {
    let pair = Pair::fixture("second", WIDE);
    let vocab = pair.target.program.vocab;
    // Texts behind which guesses are right now and then.
    let reference = Reference::of("second");
    let begun = [0, 1].map(|number| &reference.whole[&format!("tokens.{number}")][..30]);
    feed(&pair, &begun);
    let before = [pair.target.cache(), pair.block.cache()];
    let rounds = Rounds::new(&pair);
    let mut right = 0;
    for (rows, guesses, texts) in [(8, 7, 2), (8, 2, 1)] {
        let sequences = behind(&begun[..texts], rows, guesses, 128);
        rounds.restore(&before);
        let wanted = by_host(&pair, &sequences, 4);
        rounds.restore(&before);
        let found = rounds.launch(&sequences, &Asked::rounds(4), 3, u64::from(rows + guesses));
        assert_eq!(found, wanted, "{guesses} guesses of {rows} rows");
        right += found.iter().flatten().map(|added| added.right).sum::<usize>();
    }
    assert!(right > 5, "{right} guesses were right");
    // Not all guesses are the largest logits, or this would show nothing.
    rounds.restore(&before);
    let others = (4..30).step_by(5).filter(|position| {
        let block = [(begun[0][*position], *position, 0, 8)];
        let logits = pair.blocks(&block);
        pair.guesses(&block) != logits.chunks(vocab).map(best).collect::<Vec<_>>()
    });
    assert!(others.count() > 1);
}

const _: () = assert!(SEQUENCES >= 8);
