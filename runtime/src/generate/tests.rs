use super::*;
use crate::engine::EngineOptions;
use crate::engine::tests::{CONTEXT, VOCAB, toy_engine, toy_engine_on, toy_next, toy_plan};
use std::convert::Infallible;

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        stop_tokens: Vec::new(),
        stop_strings: Vec::new(),
        sampling: SamplingParams::greedy(),
        skip_special: true,
        draft: DraftLimit::default(),
    }
}

/// What the toy model goes on with.
fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        tokens.push(toy_next(&tokens));
    }
    tokens.split_off(prompt.len())
}

fn toy() -> Generator {
    Generator::new(toy_engine(1, &EngineOptions::default()), None)
}

fn run(generator: &mut Generator, requests: &[Request]) -> Run {
    generator.run(requests, &mut |_| ControlFlow::Continue(())).unwrap()
}

#[test]
fn a_prompt_longer_than_a_step_is_cut_into_chunks() {
    let prompt: Vec<u32> = (1..=11).collect();
    let run = run(&mut toy(), &[request(&prompt, 3)]);
    assert_eq!(run.completions[0].tokens, expected(&prompt, 3));
    assert_eq!(run.completions[0].finish, FinishReason::Length);
    let shape: Vec<_> = run.steps.iter().map(|step| (step.rows, step.logit_rows)).collect();
    assert_eq!(shape, [(4, 0), (4, 0), (3, 1), (1, 1), (1, 1)]);
    let stats = run.completions[0].stats;
    assert_eq!((stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens), (11, 0, 3));
    assert!(stats.prompt_rate().unwrap() > 0.0 && stats.decode_rate().unwrap() > 0.0);
}

#[test]
fn many_requests_share_the_steps_and_get_what_they_get_alone() {
    for max_rows in [1, 2, 3, 4] {
        let mut plan = toy_plan(1);
        plan.limits.max_rows = max_rows;
        plan.limits.sequences = 3;
        plan.buffers[0].rows = max_rows.min(2);
        let mut generator = Generator::new(toy_engine_on(plan, &EngineOptions::default()), None);
        let requests: Vec<Request> = (1..=8u32)
            .map(|n| {
                request(&(0..n * 2).map(|at| (at * 7 + n) % VOCAB as u32).collect::<Vec<_>>(), 3 + n as usize)
            })
            .collect();
        let run = run(&mut generator, &requests);
        for (request, completion) in requests.iter().zip(&run.completions) {
            assert_eq!(completion.tokens, expected(&request.prompt, request.max_tokens));
        }
        assert!(run.steps.iter().all(|step| step.rows <= max_rows && step.logit_rows <= 2));
    }
}

#[test]
fn the_next_turn_starts_where_the_texts_differ() {
    let mut generator = toy();
    let first = run(&mut generator, &[request(&[3, 4, 5], 4)]).completions.remove(0);
    let mut prompt = vec![3, 4, 5];
    prompt.extend(&first.tokens);
    prompt.extend([8, 9]);
    let second = run(&mut generator, &[request(&prompt, 4)]).completions.remove(0);
    assert_eq!(second.tokens, expected(&prompt, 4));
    // The last token that was chosen was not processed.
    assert_eq!(second.stats.cached_tokens, 3 + 4 - 1);
    let again = run(&mut generator, &[request(&[3, 4, 5], 4)]).completions.remove(0);
    assert_eq!((again.stats.cached_tokens, &again.tokens), (2, &first.tokens));
    generator.clear();
    assert_eq!(run(&mut generator, &[request(&[3, 4, 5], 1)]).completions[0].stats.cached_tokens, 0);
}

#[test]
fn texts_end_for_every_reason() {
    let mut generator = toy();
    let tokens = expected(&[1, 2], 5);
    let stopped = Request { stop_tokens: vec![tokens[2]], ..request(&[1, 2], 5) };
    let completion = run(&mut generator, &[stopped]).completions.remove(0);
    assert_eq!(completion.finish, FinishReason::StopToken(tokens[2]));
    assert_eq!(completion.tokens, tokens[..2]);

    let full = run(&mut generator, &[request(&[1; CONTEXT], 5)]).completions.remove(0);
    assert_eq!((full.finish, full.tokens.len()), (FinishReason::Context, 1));
    let full = run(&mut generator, &[request(&[1; CONTEXT - 2], 5)]).completions.remove(0);
    assert_eq!((full.finish, full.tokens.len()), (FinishReason::Context, 3));

    let none = run(&mut generator, &[request(&[1], 0), request(&[2], 1)]);
    assert!(none.completions[0].tokens.is_empty());
    assert_eq!(none.completions[1].tokens, [2]);

    let mut heard = Vec::new();
    let requests = [request(&[1, 2], 5), request(&[7], 5)];
    let run = generator.run(&requests, &mut |piece| {
        heard.push((piece.request, piece.token.unwrap()));
        if piece.request == 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let finishes: Vec<_> =
        run.unwrap().completions.iter().map(|done| (done.finish, done.tokens.len())).collect();
    assert_eq!(finishes, [(FinishReason::Length, 5), (FinishReason::Cancelled, 1)]);
    assert_eq!(heard.iter().filter(|(request, _)| *request == 0).count(), 5);
    assert!(heard.contains(&(1, 7)));
}

#[test]
fn impossible_requests_are_refused_before_the_first_step() {
    let mut generator = toy();
    let mut refuse = |request: Request| {
        let requests = [self::request(&[1], 1), request];
        let error = generator.run(&requests, &mut |_| panic!("nothing may be generated")).unwrap_err();
        error.to_string()
    };
    assert!(refuse(request(&[], 1)).contains("request 1: the prompt is empty"));
    assert!(refuse(request(&[1; CONTEXT + 1], 1)).contains("limits.context"));
    let strings = Request { stop_strings: vec!["x".into()], ..request(&[1], 1) };
    assert!(refuse(strings).contains("tokenizer"));
    let sampling = SamplingParams { top_p: 2.0, ..Default::default() };
    assert!(refuse(Request { sampling, ..request(&[1], 1) }).contains("top_p"));
}

#[test]
fn idle_sequences_make_room_in_a_small_cache() {
    let options = EngineOptions { kv_pages: Some(3), ..Default::default() };
    let mut generator = Generator::new(toy_engine(1, &options), None);
    for start in 1..6u32 {
        let prompt: Vec<u32> = (start..start + 20).collect();
        let completion = run(&mut generator, &[request(&prompt, 20)]).completions.remove(0);
        assert_eq!(completion.tokens, expected(&prompt, 20), "prompt from {start}");
    }
}

#[test]
fn scores_do_not_depend_on_the_chunk() {
    let mut engine = toy_engine(2, &EngineOptions::default());
    let tokens: Vec<u32> = (0..CONTEXT as u32).collect();
    for chunk in [0, 1, 3, 4, 100] {
        let mut seen = 0;
        score(&mut engine, &tokens, chunk, |position, logits| {
            assert_eq!(position, seen);
            assert_eq!(logits[toy_next(&tokens[..=position]) as usize], 1.0);
            seen += 1;
            Ok::<(), Infallible>(())
        })
        .unwrap();
        assert_eq!((seen, engine.length(0)), (CONTEXT, 0));
    }
    let error = score(&mut engine, &[1], 1, |_, _| Err(std::io::Error::other("full")));
    assert_eq!(error.unwrap_err().to_string(), "full");
}

/// A tokenizer whose token `n` is the n-th character from `!` on, and token 0 a control token.
fn tokenizer() -> Arc<Tokenizer> {
    let character = |token: usize| char::from(b'!' + token as u8).to_string();
    let mut vocab: serde_json::Map<_, _> = (1..VOCAB).map(|n| (character(n), n.into())).collect();
    vocab.insert("<end>".into(), 0.into());
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{
            "id": 0, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }],
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
        },
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []
        }
    });
    Arc::new(Tokenizer::from_json(json.to_string().as_bytes()).unwrap())
}

#[test]
fn text_comes_in_pieces_and_ends_before_a_stop_string() {
    let mut generator = Generator::new(toy_engine(1, &EngineOptions::default()), Some(tokenizer()));
    let mut texts = |request: Request| {
        let mut pieces = String::new();
        let run = generator.run(&[request], &mut |piece| {
            pieces.push_str(piece.text);
            ControlFlow::Continue(())
        });
        let completion = run.unwrap().completions.remove(0);
        assert_eq!(pieces, completion.text, "what is told is what is returned");
        completion
    };
    // 3, 6, 12, 24, 48, 32, 0
    assert_eq!(expected(&[1, 2], 7), [3, 6, 12, 24, 48, 32, 0]);
    let plain = texts(request(&[1, 2], 7));
    assert_eq!((plain.text.as_str(), plain.finish), ("$'-9QA", FinishReason::Length));
    let special = texts(Request { skip_special: false, ..request(&[1, 2], 7) });
    assert_eq!(special.text, "$'-9QA<end>");

    let stops = |strings: &[&str]| Request {
        stop_strings: strings.iter().map(|text| text.to_string()).collect(),
        ..request(&[1, 2], 7)
    };
    let stopped = texts(stops(&["none", "-9"]));
    assert_eq!((stopped.text.as_str(), stopped.finish), ("$'", FinishReason::StopString(1)));
    assert_eq!(stopped.tokens, [3, 6, 12, 24]);
    // The beginning of a stop string is held back until it is clear that it is none.
    let held = texts(Request { max_tokens: 3, ..stops(&["-9"]) });
    assert_eq!((held.text.as_str(), held.finish), ("$'-", FinishReason::Length));
}

#[test]
fn samplers_are_told_of_prompt_and_output() {
    // Without the penalty the toy repeats: its logits are 1 for one token and 0 for the others.
    let sampling = SamplingParams { presence_penalty: 2.0, logprobs: true, ..SamplingParams::greedy() };
    let request = Request { sampling, ..request(&[0, 0], 3) };
    let completion = run(&mut toy(), &[request]).completions.remove(0);
    // Token 0 comes first as the sum; then its logit falls below the others', of which 1 is the first.
    assert_eq!(completion.tokens[..2], [0, 1]);
    assert_eq!(completion.logprobs.len(), 3);
}

/// Token and text of every piece of a request.
type Pieces = Vec<(Option<u32>, String)>;

/// Completions, and the pieces of each request, on an engine.
fn texts_of(engine: Engine, requests: &[Request]) -> (Vec<Completion>, Vec<Pieces>, Run) {
    let mut generator = Generator::new(engine, Some(tokenizer()));
    let mut pieces = vec![Vec::new(); requests.len()];
    let mut run = generator
        .run(requests, &mut |piece| {
            pieces[piece.request].push((piece.token, piece.text.to_string()));
            let cancelled = requests[piece.request].max_tokens == 7 && pieces[piece.request].len() == 5;
            if cancelled { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    (std::mem::take(&mut run.completions), pieces, run)
}

#[test]
fn a_resident_kernel_gives_the_same_texts_in_fewer_launches() {
    use crate::cuda::fake::{cuda_plan, fake_engine_on, toy_kernel};
    let prompt = |seed: u32, len: u32| (0..len).map(|at| (at * 7 + seed) % VOCAB as u32).collect::<Vec<_>>();
    let greedy: Vec<Request> = vec![
        request(&prompt(1, 11), 20),
        Request { stop_tokens: vec![24], ..request(&[1, 2], 30) },
        Request { stop_strings: vec!["-9".into()], ..request(&[1, 2], 30) },
        // Cancelled by the callback.
        request(&prompt(9, 3), 7),
        request(&[1; CONTEXT - 2], 30),
        request(&[1; CONTEXT], 30),
        request(&[1], 0),
        Request {
            skip_special: false,
            draft: DraftLimit::default(),
            stop_tokens: (0..20).map(|n| 63 - n).collect(),
            ..request(&[1, 2], 40)
        },
        request(&prompt(30, 20), 1),
    ];
    let sampled = Request { sampling: SamplingParams { seed: 4, ..Default::default() }, ..request(&[5], 9) };
    let with_sampled: Vec<Request> = [&greedy[..4], &[sampled]].concat();
    for (requests, kv_pages) in
        [(&greedy, None), (&greedy, Some(4)), (&with_sampled, None), (&with_sampled, Some(3))]
    {
        for sequences in [1, 3, 10] {
            let mut plan = cuda_plan();
            plan.limits.sequences = sequences;
            let mut cpu_plan = toy_plan(1);
            (cpu_plan.limits, cpu_plan.buffers[0].rows) = (plan.limits, 20);
            // The cache must hold what runs together.
            let kv_pages = kv_pages.map(|pages: usize| pages.max(sequences * 3).min(pages * sequences));
            let options = EngineOptions { kv_pages, ..Default::default() };
            let (expected, expected_pieces, cpu) = texts_of(toy_engine_on(cpu_plan, &options), requests);
            let (engine, seen) = fake_engine_on(plan.clone(), toy_kernel(plan.kv), &options);
            let (completions, pieces, run) = texts_of(engine, requests);
            assert_eq!(pieces, expected_pieces);
            for (found, expected) in completions.iter().zip(&expected) {
                assert_eq!(
                    (&found.tokens, &found.text, found.finish, found.stats.generated_tokens),
                    (&expected.tokens, &expected.text, expected.finish, expected.stats.generated_tokens)
                );
                assert_eq!(found.stats.cached_tokens, expected.stats.cached_tokens);
            }
            let launches = seen.launches.lock().unwrap();
            if requests.len() == greedy.len() && sequences == 1 {
                assert!(launches.len() * 2 < cpu.steps.len(), "{} {}", launches.len(), cpu.steps.len());
                assert!(launches.iter().any(|args| args.steps > 16));
                assert_eq!(run.steps.len(), cpu.steps.len());
            }
        }
    }
}

#[test]
fn a_resident_kernel_goes_on_where_the_last_text_ended() {
    use crate::cuda::fake::fake_engine;
    let (engine, seen) = fake_engine(&EngineOptions::default());
    let mut generator = Generator::new(engine, None);
    let stop = expected(&[3, 4, 5], 4)[3];
    let first = Request { stop_tokens: vec![stop], ..request(&[3, 4, 5], 30) };
    let first = run(&mut generator, &[first]).completions.remove(0);
    assert_eq!((first.finish, first.tokens.len()), (FinishReason::StopToken(stop), 3));
    let prompt = [&[3, 4, 5][..], &first.tokens, &[stop, 8]].concat();
    let second = run(&mut generator, &[request(&prompt, 30)]).completions.remove(0);
    assert_eq!(second.tokens, expected(&prompt, 30));
    // The stop token was chosen, but not processed.
    assert_eq!(second.stats.cached_tokens, 6);
    // The prompt, its first token, then a launch of many; twice.
    let steps: Vec<u32> = seen.launches.lock().unwrap().iter().map(|args| args.steps).collect();
    assert_eq!(steps, [1, 29, 1, 29]);
}

#[test]
fn a_resident_kernel_samples_many_steps_a_launch() {
    use crate::cuda::fake::{cuda_plan, fake_engine_on, toy_kernel};
    let params = |temperature, top_k| SamplingParams { temperature, top_k, seed: 3, ..Default::default() };
    let sampled = Request { sampling: params(1.0, 0), ..request(&[5, 6], 20) };
    let kept = Request { sampling: params(3.0, 7), ..request(&[9, 8], 20) };
    let penalized = Request {
        sampling: SamplingParams { repetition_penalty: 1.5, ..params(1.0, 0) },
        ..request(&[1, 3], 20)
    };
    let launches = |requests: &[Request]| {
        let plan = cuda_plan();
        let (engine, seen) = fake_engine_on(plan.clone(), toy_kernel(plan.kv), &EngineOptions::default());
        let (found, _, _) = texts_of(engine, requests);
        let mut cpu_plan = toy_plan(1);
        (cpu_plan.limits, cpu_plan.buffers[0].rows) = (plan.limits, 20);
        let (expected, _, _) = texts_of(toy_engine_on(cpu_plan, &EngineOptions::default()), requests);
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!((&found.tokens, found.tokens.len()), (&expected.tokens, 20));
        }
        let launches = seen.launches.lock().unwrap();
        launches.iter().map(|args| (args.steps, args.sampling != 0)).collect::<Vec<_>>()
    };
    let greedy = request(&[1, 2], 20);
    assert_eq!(launches(std::slice::from_ref(&sampled)), [(1, false), (19, true)]);
    assert_eq!(launches(std::slice::from_ref(&greedy)), [(1, false), (19, false)]);
    // Rows of a launch have parameters of their own.
    assert_eq!(launches(&[sampled.clone(), greedy, kept]), [(1, false), (19, true)]);
    assert!(launches(&[sampled, penalized]).iter().all(|launch| *launch == (1, false)));
}

#[test]
fn a_small_cache_makes_launches_shorter() {
    use crate::cuda::fake::fake_engine;
    let options = EngineOptions { kv_pages: Some(3), ..Default::default() };
    let (engine, _) = fake_engine(&options);
    let mut generator = Generator::new(engine, None);
    for start in 1..6u32 {
        let prompt: Vec<u32> = (start..start + 20).collect();
        let completion = run(&mut generator, &[request(&prompt, 27)]).completions.remove(0);
        assert_eq!(completion.tokens, expected(&prompt, 27), "prompt from {start}");
    }
    let requests = [request(&[1], 15), request(&[2], 31)];
    let completions = run(&mut generator, &requests).completions;
    for (request, completion) in requests.iter().zip(&completions) {
        assert_eq!(completion.tokens, expected(&request.prompt, request.max_tokens));
    }
}

#[test]
fn launches_have_one_step_if_asked_to() {
    use crate::cuda::fake::{cuda_plan, fake_engine_on, toy_kernel};
    let plan = cuda_plan();
    let (engine, seen) = fake_engine_on(plan.clone(), toy_kernel(plan.kv), &EngineOptions::default());
    let mut generator = Generator::new(engine, None).with_launch_steps(1);
    let run = generator.run(&[request(&[1, 2], 20)], &mut |_| ControlFlow::Continue(()));
    assert_eq!(run.unwrap().completions[0].tokens.len(), 20);
    assert!(seen.launches.lock().unwrap().iter().all(|args| args.steps == 1));
}
