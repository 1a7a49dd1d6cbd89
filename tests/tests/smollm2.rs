//! A real model with a draft: SmolLM2-135M-Instruct writes the same texts with guesses and without, alone and in
//! company whose guesses are right more or less often. Its draft is `fixtures/smollm2-draft`.
//!
//! The model is too large to keep here: set `TILEC_SMOLLM2_GGUF` to the path of
//! `SmolLM2-135M-Instruct.Q4_1.gguf` to run this, as `cargo xtask test` does. With `TILEC_TEST_DEVICE=cuda` it runs on a
//! GPU.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use tilec_runtime::checkpoint::TokenizerSource;
use tilec_runtime::generate::{DraftLimit, DraftStats, Generator, Request, Run};
use tilec_runtime::sampling::SamplingParams;
use tilec_runtime::tokenizer::Tokenizer;
use tilec_tests::{Fixture, fixtures, load, to_test_device};

/// One prompt per line; `\n` stands for a line break.
const PROMPTS: &str = include_str!("../../xtask/src/prompts.txt");

/// Sequences at a time.
const COMPANY: usize = 8;

/// Greedy, and three temperatures, with every filter and with penalties.
fn samplings() -> [SamplingParams; 4] {
    let base = |temperature, seed| SamplingParams { temperature, seed, ..Default::default() };
    [
        SamplingParams::greedy(),
        base(0.4, 1),
        SamplingParams { top_k: 40, top_p: 0.95, ..base(0.8, 2) },
        SamplingParams { min_p: 0.05, repetition_penalty: 1.1, ..base(1.2, 3) },
    ]
}

fn run(generator: &mut Generator, requests: &[Request]) -> Run {
    generator.run(requests, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// What may not depend on a draft.
fn texts(run: &Run) -> Vec<(&[u32], String)> {
    run.completions.iter().map(|done| (&done.tokens[..], format!("{:?}", done.finish))).collect()
}

/// Every text of `tokens` tokens behind every `step`th prompt, by every way to choose them, is the same with
/// blocks of these sizes as without, `alone` and in company. Nothing without the model.
fn compare(step: usize, tokens: usize, blocks: &[usize], alone: bool) {
    let Ok(path) = std::env::var("TILEC_SMOLLM2_GGUF") else {
        eprintln!("skipped: TILEC_SMOLLM2_GGUF is not set");
        return;
    };
    let path = Path::new(&path).canonicalize().unwrap();
    let fixture = Fixture::open(path.to_str().unwrap()).with_draft(&fixtures().join("smollm2-draft"));
    let TokenizerSource::Gguf(vocab) = fixture.checkpoint.tokenizer_source() else {
        panic!("no vocabulary in the file")
    };
    let tokenizer = Tokenizer::from_gguf(vocab.as_ref().clone()).unwrap();
    let mut spec = fixture.spec();
    (spec.limits.rows, spec.limits.sequences, spec.limits.context) = (COMPANY * 16, COMPANY, Some(256));
    to_test_device(&mut spec);
    let loaded = load(&fixture, &spec, 2);
    let mut generator = Generator::new(loaded.engine, None);
    generator.set_draft_min(usize::MAX);

    let prompts = PROMPTS.lines().step_by(step);
    let prompts = prompts.map(|line| tokenizer.encode(&line.replace("\\n", "\n"), false).unwrap());
    // Neighbours choose otherwise, and go on behind other prompts. Those with penalties come last: on a GPU they have
    // the host drive rounds that are launched otherwise.
    let mut ways: Vec<(usize, Vec<u32>)> =
        prompts.flat_map(|prompt| [0, 1, 2, 3].map(|way| (way, prompt.clone()))).collect();
    ways.sort_by_key(|(way, _)| *way == 3);
    let requests: Vec<Request> = ways
        .iter()
        .map(|(way, prompt)| (prompt.clone(), samplings()[*way].clone()))
        .map(|(prompt, sampling)| Request {
            prompt,
            max_tokens: tokens,
            stop_tokens: tokenizer.end_tokens().to_vec(),
            stop_strings: Vec::new(),
            sampling,
            skip_special: true,
            draft: DraftLimit::default(),
        })
        .collect();
    generator.set_draft_rows(0);
    let start = Instant::now();
    let plain = run(&mut generator, &requests);
    let expected = texts(&plain);
    println!("{} texts without a draft: {:.1} s", expected.len(), start.elapsed().as_secs_f64());
    assert_eq!(plain.draft.rounds, 0);
    let ends: BTreeSet<&str> = expected.iter().map(|(_, end)| &end[..4]).collect();
    assert!(ends.len() == 2, "some end by themselves and some do not: {ends:?}");
    for &block in blocks {
        generator.set_draft_rows(block);
        generator.clear();
        let start = Instant::now();
        let together = run(&mut generator, &requests);
        assert!(texts(&together) == expected, "blocks of {block}, in company");
        let draft = &together.draft;
        assert!(draft.right > 0 && draft.right < draft.guesses, "{draft:?}");
        for neighbours in together.completions.chunks(COMPANY) {
            let added: BTreeSet<(u64, u64)> =
                neighbours.iter().map(|done| (done.draft.tokens, done.draft.rounds)).collect();
            assert!(added.len() > 1, "neighbours take as much: {added:?}");
        }
        let time = start.elapsed().as_secs_f64();
        let of = ways.iter().map(|(way, _)| *way);
        println!("blocks of {block} in company: {} in {time:.1} s", said(&together, of));
        if generator.engine().has_rounds(0, 0) {
            assert!(!draft.launch.is_zero(), "{draft:?}");
        }
        if !alone {
            continue;
        }
        let start = Instant::now();
        for (number, request) in requests.iter().enumerate() {
            generator.clear();
            let alone = run(&mut generator, std::slice::from_ref(request));
            assert!(texts(&alone)[0] == expected[number], "blocks of {block}, text {number} alone");
        }
        println!("blocks of {block} alone: the same in {:.1} s", start.elapsed().as_secs_f64());
    }
}

/// Tokens a round by every way to choose them.
fn said(run: &Run, ways: impl Iterator<Item = usize>) -> String {
    let mut sums = [0; 4].map(|_: u8| DraftStats::default());
    run.completions.iter().zip(ways).for_each(|(done, way)| sums[way].add(&done.draft));
    let of =
        |sum: &DraftStats| format!("{:.2} ({} rounds)", sum.tokens as f64 / sum.rounds as f64, sum.rounds);
    format!("{} tokens a round", sums.each_ref().map(of).join(", "))
}

#[test]
fn some_texts_are_the_same_with_and_without_a_draft() {
    compare(8, 32, &[4, 16], true);
}

#[test]
#[ignore = "32 prompts by 4 ways to choose tokens, 128 tokens each: half an hour on two cores"]
fn all_texts_are_the_same_with_and_without_a_draft() {
    compare(1, 128, &[2, 4, 8, 16], true);
}
