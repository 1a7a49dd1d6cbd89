//! DFlash drafts against an implementation of their own: `fixtures/make_dflash.py` computes blocks and the
//! whole loop in float64 with plain PyTorch, without a cache. And the promise that texts are the same with
//! and without a draft. With `TILEC_TEST_DEVICE=cuda` a GPU draws in the tests of probabilities (`probabilities`,
//! `right_more_often`); the others ask for more digits than it has.

#[path = "dflash/rejection.rs"]
mod rejection;
#[path = "dflash/second.rs"]
mod second;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Relaxed;
use tilec_ir::abi::KvType;
use tilec_ir::spec::{Activations, ModelSpec};
use tilec_runtime::engine::{BlockInput, Engine, RowInput};
use tilec_runtime::generate::{DraftLimit, Generator, Request, Run};
use tilec_runtime::sampling::SamplingParams;
use tilec_runtime::tokenizer::Tokenizer;
use tilec_tests::{Fixture, Loaded, Reference, fixtures, load, to_test_device};

const PAIRS: &[&str] =
    &["full", "default-taps", "sliding-causal", "sliding-both-ways", "second", "second-capped"];

/// Nothing is rounded but sums; on a GPU what it rounds.
fn f32_everywhere(fixture: &Fixture) -> ModelSpec {
    let mut spec = fixture.spec();
    if !to_test_device(&mut spec) {
        spec.precision.kv_cache = Some(KvType::F32);
        spec.precision.activations = Activations::F32;
    }
    spec.limits.rows = 24;
    spec
}

fn rows(tokens: &[u32], sequence: u32) -> Vec<RowInput> {
    (0u32..).zip(tokens).map(|(position, token)| RowInput { token: *token, position, sequence }).collect()
}

/// Puts tokens before the rows of a block into both contexts, `chunk` rows a step.
fn feed(engine: &mut Engine, tokens: &[u32], sequence: u32, chunk: usize) {
    for rows in rows(tokens, sequence).chunks(chunk) {
        engine.step(rows, &[]).unwrap();
        let all: Vec<u32> = (0..rows.len() as u32).collect();
        engine.inject(&all).unwrap();
    }
}

/// Largest distance in units of the row's root mean square.
fn distance(ours: &[f32], theirs: &[f64], vocab: usize) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let rows = ours.chunks(vocab).zip(theirs.chunks(vocab));
    rows.map(|(ours, theirs)| {
        let scale = (theirs.iter().map(|x| x * x).sum::<f64>() / vocab as f64).sqrt();
        let far = |(a, b): (&f32, &f64)| match (f64::from(*a) - b).abs() {
            nan if nan.is_nan() => f64::INFINITY,
            distance => distance,
        };
        ours.iter().zip(theirs).map(far).fold(0.0, f64::max) / scale
    })
    .fold(0.0, f64::max)
}

/// Distance of every block of the reference, whatever the chunk that the context was made in.
fn block_distance(engine: &mut Engine, reference: &Reference) -> f64 {
    let vocab = engine.plan().vocab;
    let mut worst: f64 = 0.0;
    let mut blocks = 0;
    for (name, logits) in &reference.logits {
        let ["block", number, rows] = name.split('.').collect::<Vec<_>>()[..] else { continue };
        let tokens = &reference.whole[&format!("block_tokens.{number}")];
        let (token, before) = tokens.split_last().unwrap();
        for chunk in [1, 7, 24] {
            engine.reset(1);
            feed(engine, before, 1, chunk);
            let rows: usize = rows.parse().unwrap();
            let block = BlockInput {
                token: *token,
                position: before.len() as u32,
                sequence: 1,
                rows,
                wanted: rows - 1,
            };
            worst = worst.max(distance(engine.draft(&[block]).unwrap(), logits, vocab));
        }
        blocks += 1;
    }
    assert!(blocks >= 8, "{blocks}");
    worst
}

#[test]
fn blocks_are_those_of_the_formulas() {
    for pair in PAIRS {
        let fixture = Fixture::open_pair(pair);
        let mut loaded = load(&fixture, &f32_everywhere(&fixture), 2);
        let worst = block_distance(&mut loaded.engine, &Reference::of(pair));
        println!("{pair}: {worst:e}");
        assert!(worst < 1e-4, "{pair}: off by {worst:e}");
    }
}

/// Guesses as many tokens at a time as it may.
fn generator(fixture: &Fixture, spec: &ModelSpec, threads: usize) -> (Generator, tempfile::TempDir) {
    let Loaded { engine, folder } = load(fixture, spec, threads);
    let mut generator = Generator::new(engine, None);
    generator.set_draft_min(usize::MAX);
    (generator, folder)
}

fn request(prompt: &[u32], max_tokens: usize, sampling: SamplingParams) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        stop_tokens: Vec::new(),
        stop_strings: Vec::new(),
        sampling,
        skip_special: true,
        draft: DraftLimit::default(),
    }
}

fn run(generator: &mut Generator, requests: &[Request]) -> Run {
    generator.run(requests, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// Round by round the loop adds what the reference's loop adds.
#[test]
fn rounds_are_those_of_the_reference() {
    for pair in PAIRS {
        let fixture = Fixture::open_pair(pair);
        let (mut generator, _folder) = generator(&fixture, &f32_everywhere(&fixture), 2);
        let reference = Reference::of(pair);
        let mut compared = 0;
        for [prompt, tokens, rounds] in reference.loops() {
            generator.clear();
            let new = tokens.len() - prompt.len();
            let run = run(&mut generator, &[request(prompt, new, SamplingParams::greedy())]);
            assert_eq!(run.completions[0].tokens, tokens[prompt.len()..], "{pair}: {prompt:?}");
            // The reference begins its rounds behind the first token, and so does the prompt's last step.
            let ours: Vec<u32> = run
                .steps
                .iter()
                .filter(|step| step.logit_rows > 0)
                .skip(1)
                .map(|step| step.tokens as u32)
                .collect();
            assert_eq!(ours, rounds, "{pair}: {prompt:?}");
            compared += rounds.len();
        }
        assert!(compared >= 200, "{pair}: {compared} rounds");
    }
}

/// Prompts without a pattern.
fn prompts(count: usize, vocab: usize) -> Vec<Vec<u32>> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as u32
    };
    (0..count)
        .map(|_| {
            let length = 1 + next(30);
            (0..length).map(|_| next(vocab)).collect()
        })
        .collect()
}

/// Every way to choose tokens that the sampler knows.
fn samplings() -> Vec<SamplingParams> {
    let base = |temperature, seed| SamplingParams { temperature, seed, ..Default::default() };
    vec![
        SamplingParams::greedy(),
        base(0.3, 1),
        SamplingParams { top_k: 7, ..base(0.8, 2) },
        SamplingParams { top_p: 0.8, min_p: 0.05, ..base(1.3, 3) },
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, ..SamplingParams::greedy() },
        SamplingParams { presence_penalty: 0.7, logprobs: true, ..base(0.7, 4) },
    ]
}

/// What may not depend on a draft.
fn texts(run: &Run) -> Vec<(Vec<u32>, Vec<u32>, String)> {
    let text = |done: &tilec_runtime::generate::Completion| {
        let logprobs = done.logprobs.iter().map(|x| x.to_bits()).collect();
        (done.tokens.clone(), logprobs, format!("{:?}", done.finish))
    };
    run.completions.iter().map(text).collect()
}

/// With a draft and without, alone and in company that accepts other lengths, whatever the block: the same
/// tokens, probabilities and ends.
fn check_identity(pair: &str, change: impl Fn(&mut ModelSpec)) {
    let fixture = Fixture::open_pair(pair);
    let mut spec = fixture.spec();
    (spec.limits.rows, spec.limits.sequences, spec.limits.context) = (24, 5, Some(96));
    change(&mut spec);
    let (mut generator, _folder) = generator(&fixture, &spec, 2);
    let vocab = generator.engine().plan().vocab;
    let samplings = samplings();
    let requests: Vec<Request> = prompts(18, vocab)
        .iter()
        .zip(samplings.iter().cycle())
        .enumerate()
        .map(|(number, (prompt, sampling))| Request {
            // Some run into a stop token or the end of the context.
            stop_tokens: if number % 4 == 0 { vec![2, 5, 8, 11, 14] } else { Vec::new() },
            ..request(prompt, if number % 5 == 0 { 200 } else { 24 + number }, sampling.clone())
        })
        .collect();
    generator.set_draft_rows(0);
    let plain = run(&mut generator, &requests);
    assert_eq!(plain.draft.rounds, 0);
    let expected = texts(&plain);
    let ends: std::collections::BTreeSet<_> = expected.iter().map(|(_, _, end)| &end[..4]).collect();
    assert!(ends.len() >= 3, "{ends:?}");
    for block in [2, 4, 8, 16] {
        generator.set_draft_rows(block);
        generator.clear();
        let together = run(&mut generator, &requests);
        assert!(texts(&together) == expected, "{pair}, block {block}: in company");
        let draft = &together.draft;
        assert!(draft.rounds > 100 && draft.right > 0 && draft.right < draft.guesses, "{draft:?}");
        for (request, expected) in requests.iter().zip(&expected) {
            let alone = run(&mut generator, std::slice::from_ref(request));
            assert!(texts(&alone)[0] == *expected, "{pair}, block {block}: alone");
        }
    }
}

#[test]
fn texts_are_the_same_with_and_without_a_draft() {
    for pair in PAIRS {
        check_identity(pair, |_| {});
    }
}

#[test]
fn texts_are_the_same_with_quantized_weights_and_few_rows() {
    let q8 = tilec_ir::spec::WeightFormat::Converted(tilec_ir::format::Format::Q8_0);
    check_identity("full", |spec| spec.precision.weights = q8);
    check_identity("sliding-both-ways", |spec| spec.limits.rows = 8);
}

/// Guessing is switched off and on and up and down while texts are written, by what times seem to be and by
/// whoever holds a request's switch, at random steps: the same texts as without a draft, in company.
#[test]
fn texts_are_the_same_however_guessing_is_switched_while_they_are_written() {
    let mut switched = 0;
    for (pair, seed) in [("full", 1), ("sliding-causal", 2), ("sliding-both-ways", 3)] {
        let fixture = Fixture::open_pair(pair);
        let mut spec = fixture.spec();
        (spec.limits.rows, spec.limits.sequences, spec.limits.context) = (24, 4, Some(96));
        let (mut generator, _folder) = generator(&fixture, &spec, 2);
        let vocab = generator.engine().plan().vocab;
        let requests: Vec<Request> = prompts(12, vocab)
            .iter()
            .zip(samplings().iter().cycle())
            .map(|(prompt, sampling)| request(prompt, 60, sampling.clone()))
            .collect();
        generator.set_draft_rows(0);
        let expected = texts(&run(&mut generator, &requests));
        generator.set_draft_rows(usize::MAX);
        let state = std::sync::atomic::AtomicU64::new(seed);
        let state = std::sync::Arc::new(state);
        let dice = move || {
            let next = |x: u64| Some(x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407));
            state.fetch_update(Relaxed, Relaxed, next).unwrap() >> 33
        };
        // Steps that take anything, whatever their rows.
        let wild = dice.clone();
        generator.set_pass_times(Some(std::sync::Arc::new(move |_, _| {
            std::time::Duration::from_micros(1000 + wild() % 1500)
        })));
        for turn in 0..6 {
            // Every other time behind what is cached.
            if turn % 2 == 0 {
                generator.clear();
            }
            // These drafts are seldom right: by their choice some texts would have few guesses.
            generator.set_draft_min(turn % 3);
            for request in &requests {
                request.draft.set(dice() as usize % 4);
            }
            let mut turned = 0;
            let run = generator
                .run(&requests, &mut |_| {
                    if dice() % 6 == 0 {
                        let guesses = [0, 1, 3, 7, 15, usize::MAX][dice() as usize % 6];
                        requests[dice() as usize % requests.len()].draft.set(guesses);
                        turned += 1;
                    }
                    ControlFlow::Continue(())
                })
                .unwrap();
            assert!(texts(&run) == expected, "{pair}, turn {turn}");
            let draft = &run.draft;
            assert!(turned > 50 && draft.rounds > 0 && draft.plain > 20, "{turned} {draft:?}");
            assert!(turn % 3 == 0 || draft.rounds > 100, "{draft:?}");
            assert!(draft.blocks.iter().filter(|count| **count > 0).count() >= 3, "{draft:?}");
            switched += turned;
        }
    }
    assert!(switched > 1000, "{switched}");
}

/// Decoding goes on where it was when guessing is switched off and on again between runs.
#[test]
fn guessing_may_be_switched_between_runs() {
    let fixture = Fixture::open_pair("default-taps");
    let (mut generator, _folder) = generator(&fixture, &fixture.spec(), 1);
    let mut text = vec![3, 4, 5, 6];
    let mut rounds = Vec::new();
    for block in [8, 0, 8, 4, 0, 2] {
        generator.set_draft_rows(block);
        let run = run(&mut generator, &[request(&text, 12, SamplingParams::greedy())]);
        rounds.push(run.draft.rounds > 0);
        text.extend(&run.completions[0].tokens);
    }
    assert_eq!(rounds, [true, false, true, true, false, true]);
    generator.set_draft_rows(0);
    generator.clear();
    let plain = run(&mut generator, &[request(&text[..4], 72, SamplingParams::greedy())]);
    assert_eq!(plain.completions[0].tokens, text[4..]);
}

/// A copy of a checkpoint with other weights and another config.
fn altered(
    folder: &std::path::Path,
    weights: &dyn Fn(&str, &mut Vec<f32>),
    config: &dyn Fn(&mut serde_json::Value),
) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let words = tensor.data().as_chunks::<4>().0;
            let mut values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
            weights(&name, &mut values);
            let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, tensor.shape().to_vec(), bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &copy.path().join("model.safetensors")).unwrap();
    let text = std::fs::read(folder.join("config.json")).unwrap();
    let mut value: serde_json::Value = serde_json::from_slice(&text).unwrap();
    config(&mut value);
    std::fs::write(copy.path().join("config.json"), value.to_string()).unwrap();
    copy
}

fn fixture_at(folder: &std::path::Path) -> Fixture {
    // An absolute path replaces the folder of the fixtures.
    Fixture::open(folder.to_str().unwrap())
}

/// A target that says token 0 whatever comes, with a draft that says so too, and with one that never does.
#[test]
fn drafts_that_always_and_never_agree() {
    let folder = fixtures().join("dflash");
    let constant = altered(
        &folder.join("target-qwen3"),
        &|name, values| match name {
            // All logits are equal; the lowest id wins.
            "model.norm.weight" => values.fill(0.0),
            // A draft with a norm of its own finds something better than token 0.
            "lm_head.weight" => values[..32].fill(0.0),
            _ => {}
        },
        &|_| {},
    );
    for (agrees, added) in [(true, 16), (false, 1)] {
        let draft = altered(
            &folder.join("full"),
            &|name, values| {
                if agrees && name == "norm.weight" {
                    values.fill(0.0);
                }
            },
            &|_| {},
        );
        let fixture = fixture_at(constant.path()).with_draft(draft.path());
        let mut spec = fixture.spec();
        spec.limits.rows = 16;
        let (mut generator, _folder) = generator(&fixture, &spec, 1);
        let run = run(&mut generator, &[request(&[3, 4, 5], 1 + 16 * 5, SamplingParams::greedy())]);
        assert_eq!(run.completions[0].tokens, vec![0; 81]);
        let mut histogram = vec![0; added];
        // The last round of all is cut short by the number of tokens.
        histogram[added - 1] = if agrees { 4 } else { 65 };
        let draft = &run.draft;
        assert_eq!(draft.histogram, histogram, "{draft:?}");
        assert_eq!(draft.acceptance(), Some(added as f64));
        assert_eq!(draft.right == draft.guesses, agrees);
    }
}

/// What a draft adds a round over the reference's texts, and the engine that had it. Whatever the draft says, the text is
/// the target's.
fn acceptance_over(fixture: &Fixture, reference: &Reference) -> (f64, Engine) {
    let (mut generator, _folder) = generator(fixture, &f32_everywhere(fixture), 2);
    let requests: Vec<Request> = reference
        .loops()
        .iter()
        .map(|[prompt, tokens, _]| request(prompt, tokens.len() - prompt.len(), SamplingParams::greedy()))
        .collect();
    let run = run(&mut generator, &requests);
    for (done, [prompt, tokens, _]) in run.completions.iter().zip(reference.loops()) {
        assert_eq!(done.tokens, tokens[prompt.len()..]);
    }
    (run.draft.acceptance().unwrap(), generator.into_engine())
}

/// Mistakes that leave every text as it is and only cost speed. Each one changes the blocks by far more than
/// rounding, and the acceptance with them, so the comparisons above would notice it.
#[test]
fn silent_mistakes_show() {
    type Config = Box<dyn Fn(&mut serde_json::Value)>;
    type Weights = Box<dyn Fn(&str, &mut Vec<f32>)>;
    let as_is = || -> Weights { Box::new(|_, _| {}) };
    let same = || -> Config { Box::new(|_| {}) };
    let ones = |what: &'static str| -> Weights {
        Box::new(move |name, values| {
            if name.ends_with(what) {
                values.fill(1.0);
            }
        })
    };
    let taps = |taps: &'static [usize]| -> Config {
        Box::new(move |config| config["dflash_config"]["target_layer_ids"] = taps.into())
    };
    let set = |key: &'static str, value: serde_json::Value| -> Config {
        Box::new(move |config| config[key] = value.clone())
    };
    let own = |key: &'static str, value: serde_json::Value| -> Config {
        Box::new(move |config| config["dflash_config"][key] = value.clone())
    };
    let cases: Vec<(&str, &str, Weights, Config)> = vec![
        ("sliding-both-ways", "taps in another order", as_is(), taps(&[3, 0, 2])),
        ("sliding-both-ways", "taps a layer later", as_is(), taps(&[1, 3, 4])),
        ("full", "taps a layer later", as_is(), taps(&[5, 1, 3])),
        (
            "default-taps",
            "taps a layer later",
            as_is(),
            set(
                "dflash_config",
                serde_json::json!({
                    "mask_token_id": 18, "target_layer_ids": [2, 3]
                }),
            ),
        ),
        ("sliding-both-ways", "no learned weight behind fc", ones("hidden_norm.weight"), same()),
        ("sliding-both-ways", "another mask", as_is(), own("mask_token_id", 7.into())),
        ("sliding-both-ways", "another base", as_is(), set("rope_theta", 1_000_000.0.into())),
        ("sliding-both-ways", "no window", as_is(), own("use_swa", false.into())),
        ("sliding-both-ways", "causal", as_is(), set("is_causal", true.into())),
        ("sliding-causal", "both ways", as_is(), set("is_causal", false.into())),
        ("full", "causal", as_is(), set("is_causal", true.into())),
        ("sliding-both-ways", "no norm of keys", ones("k_norm.weight"), same()),
    ];
    let mut right = BTreeMap::new();
    for (pair, mistake, weights, config) in cases {
        let reference = Reference::of(pair);
        let expected =
            *right.entry(pair).or_insert_with(|| acceptance_over(&Fixture::open_pair(pair), &reference).0);
        let draft = altered(&fixtures().join("dflash").join(pair), &*weights, &*config);
        let target = format!("dflash/{}", tilec_tests::pair_target(pair));
        let fixture = Fixture::open(&target).with_draft(draft.path());
        let (found, mut engine) = acceptance_over(&fixture, &reference);
        let far = block_distance(&mut engine, &reference);
        println!("{pair}: {mistake}: acceptance {found:.2} in place of {expected:.2}, blocks {far:.2} off");
        assert!(far > 1e-2, "{pair}: {mistake}: blocks are only {far:e} off");
        // Mostly for the worse; where a small draft loses its way on a text, it may be luck.
        let change = (found / expected - 1.0).abs();
        assert!(change > 0.003, "{pair}: {mistake}: acceptance {found}, as before");
    }
}

/// A draft that carries an embedding and a head of its own is run with the target's.
#[test]
fn embedding_and_head_are_the_targets() {
    let pair = fixtures().join("dflash/full");
    let copy = altered(&pair, &|_, _| {}, &|_| {});
    let bytes = std::fs::read(pair.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let junk = vec![0u8; 20 * 32 * 4];
    let mut views: Vec<(String, safetensors::tensor::TensorView<'_>)> = file.tensors();
    for name in ["embed_tokens.weight", "lm_head.weight"] {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![20, 32], &junk);
        views.push((name.to_string(), view.unwrap()));
    }
    // Under the prefix that some drafts have.
    let views = views.into_iter().map(|(name, view)| (format!("model.{name}"), view));
    safetensors::serialize_to_file(views, None, &copy.path().join("model.safetensors")).unwrap();
    let fixture = Fixture::open("dflash/target-qwen3").with_draft(copy.path());
    let mut loaded = load(&fixture, &f32_everywhere(&fixture), 1);
    let worst = block_distance(&mut loaded.engine, &Reference::of("full"));
    assert!(worst < 1e-4, "off by {worst:e}");
}

/// The context does not depend on where steps were cut, on neighbours, or on what was there before.
#[test]
fn the_context_survives_rewinding_and_company() {
    let fixture = Fixture::open_pair("sliding-causal");
    let mut loaded = load(&fixture, &f32_everywhere(&fixture), 2);
    let engine = &mut loaded.engine;
    let vocab = engine.plan().vocab;
    let text: Vec<u32> = (0..40).map(|n| (n * 7 + 3) % vocab as u32).collect();
    let block = |sequence, position: usize| BlockInput {
        token: text[position],
        position: position as u32,
        sequence,
        rows: 8,
        wanted: 7,
    };
    let bits = |logits: &[f32]| -> Vec<u32> { logits.iter().map(|x| x.to_bits()).collect() };
    feed(engine, &text[..32], 0, 1);
    let expected = bits(engine.draft(&[block(0, 32)]).unwrap());
    feed(engine, &text[..30], 1, 24);
    let shorter = bits(engine.draft(&[block(1, 30)]).unwrap());
    assert_ne!(expected, shorter);
    // Two blocks in one pass; the first has been drafted at this position before.
    let both = bits(engine.draft(&[block(0, 32), block(1, 30)]).unwrap());
    assert_eq!(both, [expected.clone(), shorter].concat());
    // Sequence 1 goes wrong for a while, and back.
    let wrong: Vec<RowInput> = rows(&[9; 40], 1).split_off(25)[..8].to_vec();
    engine.step(&wrong, &[]).unwrap();
    engine.inject(&[0, 1, 2, 3]).unwrap();
    assert_eq!(engine.draft_length(1), 29);
    let right: Vec<RowInput> = rows(&text, 1)[25..32].to_vec();
    engine.step(&right, &[]).unwrap();
    assert_eq!(engine.draft_length(1), 25);
    let refused = engine.draft(&[block(1, 32)]).unwrap_err().to_string();
    assert!(refused.contains("25 positions") && refused.contains("inject"), "{refused}");
    assert!(engine.inject(&[1, 2]).unwrap_err().to_string().contains("position 26 is next"));
    assert!(engine.inject(&[0, 7]).is_err());
    engine.inject(&[0, 1, 2, 3, 4, 5, 6]).unwrap();
    assert_eq!(bits(engine.draft(&[block(1, 32)]).unwrap()), expected);
}

/// Drawn tokens have the target's probabilities, also where a guess was verified: chi-squared over pairs of
/// tokens, with probabilities from the target's logits.
#[test]
fn drawn_tokens_have_the_targets_probabilities() {
    const DRAWS: usize = 12_000;
    let fixture = Fixture::open_pair("sliding-both-ways");
    let spec = f32_everywhere(&fixture);
    let (mut generator, _folder) = generator(&fixture, &spec, 1);
    let vocab = generator.engine().plan().vocab;
    let temperature = 1.7f64;
    let draw = |generator: &mut Generator, prompt: &[u32], seed: u64| {
        let sampling = SamplingParams { temperature: temperature as f32, seed, ..Default::default() };
        let run = run(generator, &[request(prompt, 2, sampling)]);
        let [first, second] = run.completions[0].tokens[..] else { panic!("two tokens were asked for") };
        (first as usize, second as usize, run.draft.right as usize)
    };
    // A text behind which guesses are right often, and often wrong.
    let reference = Reference::of("sliding-both-ways");
    let prefixes = reference.loops().into_iter().flat_map(|[_, text, _]| (8..24).map(|n| text[..n].to_vec()));
    let mut fits = |prompt: &Vec<u32>| {
        let right: usize = (0..40).map(|seed| draw(&mut generator, prompt, seed).2).sum();
        (10..30).contains(&right)
    };
    let prompt = prefixes.into_iter().find(&mut fits).expect("some text is neither easy nor hard");
    let mut probabilities = vec![0.0; vocab * vocab];
    {
        let mut loaded = load(&fixture, &spec, 1);
        let softmax = |logits: &[f32]| -> Vec<f64> {
            let weights: Vec<f64> = logits.iter().map(|x| (f64::from(*x) / temperature).exp()).collect();
            let sum: f64 = weights.iter().sum();
            weights.iter().map(|weight| weight / sum).collect()
        };
        let last = prompt.len() as u32;
        let first = softmax(loaded.engine.step(&rows(&prompt, 0), &[last - 1]).unwrap());
        for (token, first) in (0u32..).zip(&first) {
            let row = RowInput { token, position: last, sequence: 0 };
            let second = softmax(loaded.engine.step(&[row], &[0]).unwrap());
            for (other, second) in second.iter().enumerate() {
                probabilities[token as usize * vocab + other] = first * second;
            }
        }
    }
    let mut counts = vec![0usize; vocab * vocab];
    let mut right = 0;
    for seed in 0..DRAWS as u64 {
        let (first, second, hits) = draw(&mut generator, &prompt, seed);
        counts[first * vocab + second] += 1;
        right += hits;
    }
    assert!(right > DRAWS / 10, "only {right} guesses were right");
    let (mut chi, mut cells, mut rest) = (0.0, 0usize, (0.0, 0usize));
    for (count, probability) in counts.iter().zip(&probabilities) {
        let expected = probability * DRAWS as f64;
        if expected < 5.0 {
            rest = (rest.0 + expected, rest.1 + count);
        } else {
            chi += (*count as f64 - expected).powi(2) / expected;
            cells += 1;
        }
    }
    chi += (rest.1 as f64 - rest.0).powi(2) / rest.0.max(1.0);
    // Mean and spread of chi-squared with as many degrees of freedom as cells (the rest is one of them).
    let freedom = cells as f64;
    let sigmas = (chi - freedom) / (2.0 * freedom).sqrt();
    println!("chi-squared {chi:.1} of {freedom} degrees, {sigmas:.2} sigmas, {right} guesses right");
    assert!(cells > 20, "{cells}");
    assert!(sigmas.abs() < 4.0, "chi-squared {chi} with {freedom} degrees of freedom");
}

/// Every level of all three programs prints, and all of them are validated when compiled.
#[test]
fn levels_of_a_pair() {
    use tilec_codegen::compile::{Host, Level, compile};
    let fixture = Fixture::open_pair("sliding-both-ways");
    let compiled = compile(&fixture.input(), &fixture.spec(), &Host { threads: 2, cubins: None }).unwrap();
    for level in [Level::Graph, Level::Fused, Level::Stages] {
        insta::assert_snapshot!(format!("pair-{}", level.name()), compiled.text(level));
    }
    for level in [Level::Schedule, Level::Llvm] {
        assert!(!compiled.text(level).is_empty());
    }
    let draft = compiled.plan.draft.as_ref().unwrap();
    assert_eq!((draft.block, draft.mask_token, &draft.taps[..]), (8, 19, &[0, 2, 3][..]));
    // What a draft shares with its target is packed once.
    let heads =
        compiled.plan.packing.items.iter().filter(|item| {
            serde_json::to_string(&item.content).unwrap().contains("model.embed_tokens.weight")
        });
    assert_eq!(heads.count(), 1);
}

/// What `make_mimo_rounds.py` wrote.
#[derive(serde::Deserialize)]
struct MimoText {
    prompt: String,
    /// Behind the prompt; 0 ends a text.
    tokens: Vec<u32>,
    /// How many rounds added 1, 2, ... tokens.
    rounds: Vec<u64>,
    /// Place, another token, and how far its logit is below that of the chosen one.
    ties: Vec<(usize, u32, f64)>,
}

/// The trained demo, a mixture with FP4 experts and MiMo's kind of draft (sinks, scaled values, half of a head
/// rotated, a mask with an embedding of its own): the texts of its PyTorch loop but for near ties, as many
/// tokens a round, and the same texts without the draft. Every `step`th text; how many rounds there were.
fn compare_with_the_demos_loop(step: usize) -> u64 {
    let text = std::fs::read_to_string(fixtures().join("mimo-mini/rounds.json")).unwrap();
    let mut all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let every: Vec<MimoText> = serde_json::from_value(all["texts"].take()).unwrap();
    let loops: Vec<MimoText> = every.into_iter().step_by(step).collect();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/mimo-mini/checkpoint");
    let tokenizer = Tokenizer::from_json(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let fixture = fixture_at(&folder).with_draft(&folder.join("dflash"));
    let mut spec = f32_everywhere(&fixture);
    (spec.limits.rows, spec.limits.context) = (48, Some(512));
    let (mut generator, _folder) = generator(&fixture, &spec, 2);
    let requests: Vec<Request> = loops
        .iter()
        .map(|text| Request {
            stop_tokens: vec![0],
            ..request(
                &tokenizer.encode(&text.prompt, false).unwrap(),
                text.tokens.len(),
                SamplingParams::greedy(),
            )
        })
        .collect();
    let drafted = run(&mut generator, &requests);
    let mut equal = 0;
    for (number, (done, text)) in drafted.completions.iter().zip(&loops).enumerate() {
        let mut found = done.tokens.clone();
        if found.len() < text.tokens.len() {
            found.push(0);
        }
        match found.iter().zip(&text.tokens).position(|(ours, theirs)| ours != theirs) {
            None => equal += usize::from(found.len() == text.tokens.len()),
            Some(place) => {
                let tie = text.ties.iter().find(|tie| (tie.0, tie.1) == (place, found[place]));
                assert!(tie.is_some_and(|tie| tie.2 < 0.02), "text {number}, token {place}: {tie:?}");
            }
        }
    }
    let rounds: u64 = loops.iter().flat_map(|text| &text.rounds).sum();
    let added = loops.iter().flat_map(|text| (1..).zip(&text.rounds)).map(|(tokens, rounds)| tokens * rounds);
    let there = added.sum::<u64>() as f64 / rounds as f64;
    let here = drafted.draft.tokens as f64 / drafted.draft.rounds as f64;
    println!(
        "{here:.4} tokens a round in {} rounds, {there:.4} in {rounds} by PyTorch; {equal} of {} texts the same",
        drafted.draft.rounds,
        requests.len()
    );
    assert!((here / there - 1.0).abs() < 0.02, "{here} tokens a round, not {there}");
    // Float32 sums in another order may tip a near tie.
    assert!(equal * 10 >= requests.len() * 9, "{equal} of {}", requests.len());
    generator.set_draft_rows(0);
    generator.clear();
    assert!(texts(&run(&mut generator, &requests)) == texts(&drafted));
    drafted.draft.rounds
}

#[test]
fn the_demos_draft_accepts_what_its_own_loop_does() {
    let rounds = compare_with_the_demos_loop(6);
    assert!(rounds >= 600, "{rounds}");
}

#[test]
#[ignore = "all 96 texts, half a minute; examples/mimo-mini/compare_loop.py does it on any device"]
fn the_demos_draft_accepts_what_its_own_loop_does_over_all_texts() {
    let rounds = compare_with_the_demos_loop(1);
    assert!(rounds >= 4000, "{rounds}");
}

/// A pair for a GPU: three kernels on one set of packed weights, blocks as long as a launch has rows.
#[test]
fn a_pair_has_kernels_for_a_gpu() {
    use tilec_codegen::compile::{Host, Level, compile};
    use tilec_ir::plan::Plan;
    use tilec_ir::spec::Device;
    for pair in ["sliding-both-ways", "full"] {
        let fixture = Fixture::open_pair(pair);
        let mut spec = fixture.spec();
        (spec.target.device, spec.target.arch) = (Device::Cuda, "sm_90a".into());
        let host = Host { threads: 2, cubins: None };
        let compiled = compile(&fixture.input(), &spec, &host).unwrap();
        if pair == "sliding-both-ways" {
            insta::assert_snapshot!("pair-resident", compiled.text(Level::Resident));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan");
        compiled.write(&path).unwrap();
        let plan = Plan::load(&path).unwrap();
        let draft = plan.draft.as_ref().unwrap();
        // The full draft was trained with 16 rows, and the kernels have as many.
        let rows = if pair == "full" { 16 } else { 8 };
        assert_eq!((draft.block, draft.input, plan.buffers[draft.taps_buffer].rows), (rows, None, 16));
        for kernel in [plan.resident, draft.inject.resident, draft.block_pass.resident] {
            assert_eq!(kernel.unwrap().step_rows, rows);
        }
        let embeddings = plan.packing.items.iter().filter(|item| {
            serde_json::to_string(&item.content).unwrap().contains("model.embed_tokens.weight")
        });
        assert_eq!(embeddings.count(), 1, "the target's embedding is packed once");
        // Whole rounds run the stages of the three, but for the one that takes taps.
        let round = draft.round.as_ref().unwrap();
        let own = [&draft.block_pass.stages, &plan.stages, &draft.inject.stages];
        assert_eq!(round.stages.len() + 1, own.iter().map(|stages| stages.len()).sum::<usize>());
        assert!(draft.inject.stages[0] == "taps" && !round.stages.iter().any(|stage| stage == "inject taps"));
        assert!(round.stages[0].starts_with("draft ") && round.resident.unwrap().step_rows == rows);
        for program in [&draft.inject, &draft.block_pass, round] {
            assert!(path.join(&program.code.file).is_file() && program.resident.is_some());
        }
        let mut bad = plan.clone();
        bad.draft.as_mut().unwrap().block = rows + 1;
        assert!(bad.verify().unwrap_err().contains(&format!("not 2 to {rows} rows")));
        let mut bad = plan.clone();
        bad.draft.as_mut().unwrap().inject.resident = None;
        assert!(bad.verify().unwrap_err().contains("its kernel do not fit"));
        let mut bad = plan.clone();
        bad.draft.as_mut().unwrap().round.as_mut().unwrap().resident.as_mut().unwrap().step_rows = 32;
        assert!(bad.verify().unwrap_err().contains("draft.round does not fit"));
        // Asked for, a longer block is an error, not a shorter one.
        (spec.limits.rows, spec.limits.pass_rows) = (64, Some(8));
        spec.draft.as_mut().unwrap().dflash.block = Some(12);
        let error = compile(&fixture.input(), &spec, &host).unwrap_err().to_string();
        let said = if pair == "full" { "has 8 rows at a time" } else { "was trained with 8" };
        assert!(error.contains(said), "{error}");
    }
}
