//! The engine on a device in software.

use super::engine::ExpertCounts;
use super::fake::*;
use crate::engine::tests::{CONTEXT, VOCAB, toy_engine_on, toy_next, toy_plan};
use crate::engine::{Engine, EngineError, EngineOptions, PROFILE_FIELDS, RowInput, StepError};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tilec_ir::launch::{LAUNCH_ROWS, LAUNCH_VERSION};

fn rows(sequence: u32, start: u32, tokens: &[u32]) -> Vec<RowInput> {
    (start..).zip(tokens).map(|(position, token)| RowInput { token: *token, position, sequence }).collect()
}

fn best(logits: &[f32]) -> Vec<u32> {
    let best = |row: &[f32]| row.iter().position(|logit| *logit == 1.0).unwrap() as u32;
    logits.chunks_exact(VOCAB).map(best).collect()
}

fn decode(
    engine: &mut Engine,
    rows: &[RowInput],
    steps: usize,
    stops: &[u32],
) -> Result<Vec<Vec<u32>>, StepError> {
    let mut told = vec![Vec::new(); rows.len()];
    let done = engine.decode(rows, steps, stops, &mut |step, row, token| {
        assert_eq!(told[row].len(), step);
        told[row].push(token);
        ControlFlow::Continue(())
    })?;
    assert!(told.iter().all(|tokens| tokens.len() == done));
    Ok(told)
}

/// What the toy says after `tokens`, and after that, so many times.
fn expected(tokens: &[u32], count: usize) -> Vec<u32> {
    let mut all = tokens.to_vec();
    (0..count).for_each(|_| all.push(toy_next(&all)));
    all.split_off(tokens.len())
}

#[test]
fn long_steps_run_in_passes_and_give_what_the_processor_gives() {
    let (mut engine, seen) = fake_engine(&EngineOptions::default());
    let mut plan = toy_plan(1);
    (plan.limits, plan.buffers[0].rows) = (engine.plan().limits, 20);
    let mut cpu = toy_engine_on(plan, &EngineOptions::default());
    let prompt: Vec<u32> = (0..11).map(|n| n * 7 % VOCAB as u32).collect();
    let steps = [
        ([rows(1, 0, &prompt), rows(0, 0, &prompt[..9])].concat(), vec![0, 7, 8, 10, 19]),
        ([rows(0, 9, &[1, 2]), rows(1, 11, &[3]), rows(2, 0, &[5])].concat(), vec![1, 2, 3]),
        // Going back forgets what came after.
        (rows(1, 4, &[60, 61]), vec![0, 1]),
        (rows(2, 1, &[1; 20]), vec![]),
    ];
    for (rows, wanted) in &steps {
        let logits = engine.step(rows, wanted).unwrap();
        assert_eq!(logits, cpu.step(rows, wanted).unwrap());
        assert_eq!(logits.len(), wanted.len() * VOCAB);
    }
    assert_eq!([0, 1, 2].map(|n| engine.length(n)), [0, 1, 2].map(|n| cpu.length(n)));
    let shape: Vec<_> =
        seen.launches.lock().unwrap().iter().map(|args| (args.rows, args.logit_rows)).collect();
    assert_eq!(shape, [(8, 2), (8, 2), (4, 1), (4, 3), (2, 2), (8, 0), (8, 0), (4, 0)]);
}

#[test]
fn wide_kernels_have_more_rows_a_pass() {
    let mut plan = cuda_plan();
    plan.resident.as_mut().unwrap().step_rows = 16;
    let (mut engine, seen) = fake_engine_on(plan.clone(), toy_kernel(plan.kv), &EngineOptions::default());
    assert_eq!((engine.pass_rows(), engine.max_decode_rows()), (Some(16), 16));
    let mut all = rows(0, 0, &[3; 18]);
    all.extend(rows(1, 0, &[4, 5]));
    let wide = engine.step(&all, &[0, 15, 16, 19]).unwrap().to_vec();
    let shape: Vec<_> =
        seen.launches.lock().unwrap().iter().map(|args| (args.rows, args.logit_rows)).collect();
    assert_eq!(shape, [(16, 2), (4, 2)]);
    let (mut narrow, _) = fake_engine(&EngineOptions::default());
    assert_eq!(narrow.step(&all, &[0, 15, 16, 19]).unwrap(), wide);
    for damaged in [0, 4, 24, 64] {
        plan.resident.as_mut().unwrap().step_rows = damaged;
        let error = plan.verify().unwrap_err();
        assert!(error.contains(&format!("resident.step_rows is {damaged}")), "{error}");
    }
}

/// A kernel of an older plan reads other arguments.
#[test]
fn kernels_with_another_interface_are_refused() {
    let mut plan = cuda_plan();
    plan.resident.as_mut().unwrap().launch_version -= 1;
    let error = plan.verify().unwrap_err();
    let wanted = format!("has interface {}, this version launches {LAUNCH_VERSION}", LAUNCH_VERSION - 1);
    assert!(error.contains(&wanted), "{error}");
}

#[test]
fn the_arguments_lead_to_what_the_kernel_needs() {
    let options = EngineOptions { patience: Duration::from_millis(700), ..Default::default() };
    let (mut engine, seen) = fake_engine(&options);
    engine.step(&rows(0, 0, &[1; 17]), &[16]).unwrap();
    engine.step(&rows(0, 17, &[1]), &[0]).unwrap();
    let copies = seen.copies_in.load(Ordering::Relaxed);
    engine.step(&rows(0, 18, &[1]), &[0]).unwrap();
    assert_eq!(seen.copies_in.load(Ordering::Relaxed) - copies, 1, "the page table did not change");
    let launches = seen.launches.lock().unwrap();
    for args in launches.iter() {
        for address in [args.weights, args.kv, args.arena] {
            assert_eq!(address % 256, 0);
        }
        assert_eq!((args.pages_per_sequence, args.kv_pages, args.steps), (3, 9, 1));
        assert_eq!((args.chosen, args.trace, args.stop_count), (0, 0, 0));
        assert_eq!(args.patience_ns, 700_000_000);
        assert_eq!((args.halt - args.stall, args.halt % 4), (128, 0));
    }
    // Every pass has inputs of its own: they are queued together.
    assert_eq!(
        (launches[1].tokens - launches[0].tokens, launches[2].tokens - launches[1].tokens),
        (2048, 2048)
    );
}

#[test]
fn bad_steps_are_refused_as_on_the_processor() {
    let (mut engine, seen) = fake_engine(&EngineOptions::default());
    let row = |token, position, sequence| RowInput { token, position, sequence };
    assert_eq!(engine.step(&[], &[]).unwrap_err(), StepError::Rows { rows: 0, max: 20 });
    assert_eq!(
        engine.step(&[row(64, 0, 0)], &[]).unwrap_err(),
        StepError::Token { row: 0, token: 64, vocab: VOCAB }
    );
    assert_eq!(
        engine.step(&[row(0, 1, 0)], &[]).unwrap_err(),
        StepError::Order { row: 0, position: 1, expected: 0 }
    );
    let mut cases = vec![
        (vec![row(0, 0, 0); 9], 1, StepError::Rows { rows: 9, max: 8 }),
        (vec![], 1, StepError::Rows { rows: 0, max: 20 }),
        (vec![row(0, 0, 0)], 0, StepError::Steps { steps: 0, max: 1024 }),
        (vec![row(0, 0, 0)], 1025, StepError::Steps { steps: 1025, max: 1024 }),
        (rows(0, 0, &[1, 2]), 1, StepError::Twice { row: 1, sequence: 0 }),
        (vec![row(0, 0, 3)], 1, StepError::Sequence { row: 0, sequence: 3, sequences: 3 }),
    ];
    let position = CONTEXT as u32;
    cases.push((vec![row(0, 0, 0)], CONTEXT + 1, StepError::Context { row: 0, position, context: CONTEXT }));
    for (rows, steps, expected) in cases {
        let error = engine.decode(&rows, steps, &[], &mut |_, _, _| panic!("nothing was decoded"));
        assert_eq!(error.unwrap_err(), expected);
    }
    assert_eq!(engine.kv().free_pages(), 9);
    assert!(seen.launches.lock().unwrap().is_empty());
    let mut cpu = crate::engine::tests::toy_engine(1, &EngineOptions::default());
    let error = cpu.decode(&[row(0, 0, 0)], 1, &[], &mut |_, _, _| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(error, StepError::NotResident);
    assert!(!cpu.is_resident() && engine.is_resident());
}

#[test]
fn sampling_parameters_are_checked_and_broken_logits_are_told_of() {
    use crate::sampling::SamplingParams;
    use tilec_ir::launch::{BROKEN_LOGITS, NO_LOGITS};
    let (mut engine, seen) = fake_engine(&EngineOptions::default());
    let d = SamplingParams::default;
    let biased = SamplingParams { logit_bias: [(1, 1.0)].into(), ..d() };
    let wild = SamplingParams { temperature: -1.0, ..d() };
    let row = rows(0, 0, &[1, 2]);
    let error = engine.step_sampled(&row, &[0, 1], &[&d()]).unwrap_err();
    assert_eq!(error, StepError::Sampling { given: 1, rows: 2 });
    let error = engine.step_sampled(&row, &[0, 1], &[&d(), &biased]).unwrap_err();
    assert_eq!(error, StepError::HostSampling { row: 1 });
    let error = engine.decode_sampled(&row[..1], &[&wild], 2, &[], &mut |_, _, _| panic!()).unwrap_err();
    assert!(matches!(error, StepError::Parameter { row: 0, .. }), "{error}");
    assert!(seen.launches.lock().unwrap().is_empty());

    // Parameters of a step's passes, and a greedy one among them.
    let many = rows(0, 0, &[3; 11]);
    let greedy = SamplingParams::greedy();
    let chosen = engine.step_sampled(&many, &[7, 9, 10], &[&d(), &greedy, &d()]).unwrap();
    assert_eq!(chosen[1], toy_next(&[3; 10]));
    let logits = engine.step(&many, &[7, 9, 10]).unwrap().to_vec();
    let mut sampler = crate::sampling::Sampler::new(d()).unwrap();
    for (at, position) in [(0, 8), (2, 11)] {
        let wanted = sampler.sample(&logits[at * VOCAB..][..VOCAB], position).unwrap().token;
        assert_eq!(chosen[at], wanted);
    }

    for (word, said) in [(BROKEN_LOGITS, "NaN"), (NO_LOGITS, "no token is possible")] {
        let broken: FakeKernel = Arc::new(move |args| {
            for step in 0..args.steps as usize {
                let token = if step + 1 == args.steps as usize { word } else { 5 };
                // SAFETY: the engine keeps the words.
                unsafe {
                    let at = (args.chosen as *const std::sync::atomic::AtomicU32).add(step * LAUNCH_ROWS);
                    (*at).store(token + 1, Ordering::Release);
                }
            }
            Ok(())
        });
        let (mut engine, _) = fake_engine_on(cuda_plan(), broken, &EngineOptions::default());
        let mut told = Vec::new();
        let error = engine.decode_sampled(&row[..1], &[&d()], 3, &[], &mut |_, _, token| {
            told.push(token);
            ControlFlow::Continue(())
        });
        let error = error.unwrap_err();
        assert!(matches!(error, StepError::Logits { row: 0, step: 2, .. }), "{error}");
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!((told, engine.length(0)), (vec![5, 5], 0));
        // The engine goes on.
        let error = engine.step_sampled(&row[..1], &[0], &[&d()]).unwrap_err();
        assert!(matches!(error, StepError::Logits { row: 0, step: 0, .. }), "{error}");
    }
}

#[test]
fn one_launch_decodes_many_steps_of_several_sequences() {
    let (mut engine, seen) = fake_engine(&EngineOptions::default());
    engine.step(&[rows(0, 0, &[1, 2]), rows(2, 0, &[5; 15])].concat(), &[]).unwrap();
    let last = [rows(2, 15, &[9]), rows(0, 2, &[3]), rows(1, 0, &[4])].concat();
    let told = decode(&mut engine, &last, 20, &[]).unwrap();
    let histories: [Vec<u32>; 3] = [[vec![5; 15], vec![9]].concat(), vec![1, 2, 3], vec![4]];
    for (told, history) in told.iter().zip(&histories) {
        assert_eq!(told, &expected(history, 20));
    }
    assert_eq!([0, 1, 2].map(|n| engine.length(n)), [22, 20, 35]);
    assert_eq!(engine.kv().free_pages(), 9 - 2 - 2 - 3);
    // Three passes of the prompts, and one launch.
    assert_eq!(seen.launches.lock().unwrap().len(), 3 + 1);
    // The last token of each was not processed; steps and launches go on from it alike.
    let mut history = [&histories[1][..], &told[1]].concat();
    let next = best(engine.step(&rows(0, 22, &history[22..]), &[0]).unwrap());
    history.extend(&next);
    assert_eq!(next, [toy_next(&history[..23])]);
    let told = decode(&mut engine, &rows(0, 23, &next), 2, &[]).unwrap();
    assert_eq!(told[0], expected(&history, 2));
}

#[test]
fn a_launch_ends_with_the_step_of_a_stop_token() {
    let tokens = expected(&[1, 2], 6);
    assert_eq!(tokens, [3, 6, 12, 24, 48, 32]);
    // The kernel knows 8; the ninth is found by the host.
    let many = [50, 51, 52, 53, 54, 55, 56, 57, 12];
    for stops in [&[12][..], &many] {
        let (mut engine, seen) = fake_engine(&EngineOptions::default());
        engine.step(&rows(0, 0, &[1]), &[]).unwrap();
        let told = decode(&mut engine, &rows(0, 1, &[2]), 40, stops).unwrap();
        assert_eq!(told[0], tokens[..3]);
        assert_eq!((engine.length(0), engine.kv().free_pages()), (4, 8));
        let count = seen.launches.lock().unwrap()[1].stop_count as usize;
        assert_eq!(count, stops.len().min(8));
    }
}

#[test]
fn a_callback_ends_a_launch_and_later_tokens_are_forgotten() {
    let (mut engine, _) = fake_engine(&EngineOptions::default());
    engine.step(&rows(1, 0, &[1]), &[]).unwrap();
    let start = Instant::now();
    let last = [rows(1, 1, &[2]), rows(0, 0, &[7])].concat();
    let mut told = Vec::new();
    let done = engine.decode(&last, 40, &[], &mut |step, row, token| {
        told.push((step, row, token));
        if step == 4 && row == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!(done, Ok(5));
    // The other row's token of the same step is told of as well.
    let (one, other) = (expected(&[1, 2], 5), expected(&[7], 5));
    let all: Vec<_> = (0..5).flat_map(|step| [(step, 0, one[step]), (step, 1, other[step])]).collect();
    assert_eq!(told, all);
    assert!(start.elapsed() < Duration::from_millis(40), "the kernel went on: {:?}", start.elapsed());
    assert_eq!((engine.length(1), engine.length(0)), (6, 5));
    assert_eq!(engine.kv().free_pages(), 7);
    // From an earlier place, with another token, as if nothing had been behind it.
    let told = decode(&mut engine, &rows(1, 3, &[40]), 3, &[]).unwrap();
    assert_eq!(told[0], expected(&[1, 2, 3, 40], 3));
}

#[test]
fn a_full_cache_refuses_a_launch_and_goes_on() {
    let options = EngineOptions { kv_pages: Some(3), ..Default::default() };
    let (mut engine, _) = fake_engine(&options);
    engine.step(&[rows(0, 0, &[1]), rows(1, 0, &[2])].concat(), &[]).unwrap();
    let error = decode(&mut engine, &rows(0, 1, &[3]), 40, &[]).unwrap_err();
    assert!(error.to_string().contains("KV cache is full"), "{error}");
    assert_eq!((engine.length(0), engine.kv().free_pages()), (1, 1));
    assert_eq!(decode(&mut engine, &rows(0, 1, &[3]), 20, &[]).unwrap()[0], expected(&[1, 3], 20));
}

#[test]
fn pages_come_back_zeroed() {
    // The toy's kernel checks it.
    let options = EngineOptions { kv_pages: Some(2), ..Default::default() };
    let (mut engine, _) = fake_engine(&options);
    for round in 1..5 {
        for sequence in 0..3 {
            engine.step(&rows(sequence, 0, &[0, round]), &[]).unwrap();
            let told = decode(&mut engine, &rows(sequence, 2, &[1]), 30, &[]).unwrap();
            assert_eq!(told[0], expected(&[0, round, 1], 30));
            engine.reset(sequence as usize);
        }
    }
}

#[test]
fn a_pretended_context_is_filled_and_can_be_decoded_behind() {
    let (mut engine, seen) = fake_engine(&EngineOptions::default());
    engine.step(&rows(0, 0, &[1]), &[]).unwrap();
    engine.pretend_length(1, 40).unwrap();
    assert_eq!((engine.length(0), engine.length(1), engine.kv().held_pages(1)), (1, 40, 3));
    let (kv, args) = (engine.plan().kv, seen.launches.lock().unwrap()[0]);
    let table = engine.kv().table().to_vec();
    let pages = engine.kv().pages();
    for page in 0..pages {
        for layer in 0..kv.layers {
            let at = kv.block_offset(pages, layer, page, 0);
            // SAFETY: a page of the cache; nothing is queued.
            let values = unsafe {
                let first = (args.kv as *const u8).add(at).cast::<f32>();
                std::slice::from_raw_parts(first, kv.kv_heads * kv.block_bytes() / 4)
            };
            let per_sequence = engine.kv().pages_per_sequence();
            if table[per_sequence..per_sequence + 3].contains(&(page as u32)) {
                assert!(values.iter().all(|value| value.abs() <= 1.0), "page {page}");
                let nothing = values.iter().filter(|value| **value == 0.0).count();
                assert!(nothing * 100 < values.len(), "page {page}: {nothing} zeros");
            } else {
                assert!(values.iter().filter(|value| **value != 0.0).count() <= 1, "page {page}");
            }
        }
    }
    // Behind it, and somewhere inside of it.
    assert_eq!(decode(&mut engine, &rows(1, 40, &[3]), 2, &[]).unwrap()[0].len(), 2);
    assert_eq!(decode(&mut engine, &rows(1, 30, &[3]), 4, &[]).unwrap()[0].len(), 4);
    assert_eq!(engine.length(1), 34);
    engine.pretend_length(1, CONTEXT).unwrap();
    assert_eq!(engine.pretend_length(3, 1), Err(StepError::Sequence { row: 0, sequence: 3, sequences: 3 }));
    let position = CONTEXT as u32;
    assert_eq!(
        engine.pretend_length(1, CONTEXT + 1),
        Err(StepError::Context { row: 0, position, context: CONTEXT })
    );
    let mut cpu = toy_engine_on(toy_plan(1), &EngineOptions::default());
    cpu.pretend_length(0, 1).unwrap();
    assert_eq!((cpu.length(0), cpu.kv().held_pages(0)), (1, 1));
    assert!(matches!(cpu.pretend_length(0, usize::MAX), Err(StepError::Context { .. })));
}

#[test]
fn poisoned_memory_is_not_a_number_before_it_is_written_and_changes_nothing_after() {
    let (plan, toy) = (cuda_plan(), toy_kernel(cuda_plan().kv));
    let arena_bytes = plan.arena_bytes();
    let (seen, launch) = (Arc::new(Mutex::new(Vec::new())), Arc::clone(&toy));
    let log = Arc::clone(&seen);
    let kernel: FakeKernel = Arc::new(move |args| {
        // SAFETY: the engine keeps the arguments valid; the toy's page 2 and its arena are never written.
        let (arena, page) = unsafe {
            let arena = std::slice::from_raw_parts(args.arena as *const u8, arena_bytes).to_vec();
            let page = cuda_plan().kv.block_offset(args.kv_pages as usize, 0, 2, 0);
            (arena, *((args.kv as usize + page) as *const f32))
        };
        log.lock().unwrap().push((arena.iter().all(|byte| *byte == 0xff), page.is_nan()));
        launch(args)
    });
    let options = EngineOptions { kv_pages: Some(3), ..Default::default() };
    let (mut engine, _) = fake_engine_on(plan, kernel, &options);
    engine.step(&rows(0, 0, &[1, 2]), &[]).unwrap();
    assert_eq!(seen.lock().unwrap()[..], [(false, false)]);
    engine.poison().unwrap();
    assert_eq!((engine.length(0), engine.kv().free_pages()), (0, 3));
    engine.step(&rows(0, 0, &[1, 2]), &[]).unwrap();
    assert_eq!(seen.lock().unwrap()[1..], [(true, true)]);
    assert_eq!(decode(&mut engine, &rows(0, 2, &[1]), 5, &[]).unwrap()[0], expected(&[1, 2, 1], 5));
    // On the processor a lane past the context is multiplied by zero: it must be a number there.
    let mut engine = crate::engine::tests::toy_engine(1, &options);
    assert_eq!(engine.poison().unwrap_err(), StepError::NotResident);
}

#[test]
fn counts_of_experts_are_summed_up_until_they_are_asked_for() {
    let toy = toy_kernel(cuda_plan().kv);
    // SAFETY: the engine keeps the arguments valid.
    let kernel: FakeKernel = Arc::new(move |args| unsafe {
        for (at, count) in [3, 2, 1].into_iter().enumerate() {
            *(args.experts as *mut u32).add(at) += count;
        }
        toy(args)
    });
    let (mut engine, _) = fake_engine_on(cuda_plan(), kernel, &EngineOptions::default());
    engine.step(&rows(0, 0, &[1; 9]), &[]).unwrap();
    engine.step(&rows(0, 9, &[1]), &[0]).unwrap();
    let counts = ExpertCounts { chosen: 9, foreseen: 6, wrong: 3 };
    assert_eq!(engine.take_expert_counts(), Some(counts), "three launches");
    assert_eq!(engine.take_expert_counts(), Some(ExpertCounts::default()));
}

#[test]
fn a_stuck_wait_is_an_error_that_says_where_and_ends_the_engine() {
    // Stage 1 is "sum".
    let record = [1, 1, 77, 6, 3, 4, 9, 0];
    let stuck = || StepError::Stuck {
        stage: "sum".into(),
        step: 9,
        sm: 77,
        who: "the control warp, for the other SMs",
        seen: 3,
        expected: 4,
    };
    for decodes in [false, true] {
        let (mut engine, seen) = fake_engine_on(cuda_plan(), stuck_kernel(record), &EngineOptions::default());
        let error = match decodes {
            false => engine.step(&rows(0, 0, &[1; 20]), &[19]).map(|_| ()).unwrap_err(),
            true => decode(&mut engine, &rows(0, 0, &[1]), 30, &[]).map(|_| ()).unwrap_err(),
        };
        assert_eq!(error, stuck());
        let text = error.to_string();
        assert!(text.contains("on SM 77") && text.contains("in stage sum of step 9: it saw 3"), "{text}");
        assert_eq!((engine.length(0), engine.profile()), (0, None));
        let error = engine.step(&rows(0, 0, &[1]), &[]).unwrap_err().to_string();
        assert!(
            error.contains("stopped working before (on SM 77") && error.contains("load the plan"),
            "{error}"
        );
        drop(engine);
        assert_eq!(seen.held.load(Ordering::Relaxed), 0, "everything is freed");
    }
}

#[test]
fn a_kernel_that_fails_without_a_record_is_the_drivers_error() {
    let (mut engine, _) = fake_engine_on(cuda_plan(), Arc::new(|_| Err(trap())), &EngineOptions::default());
    let error = decode(&mut engine, &rows(0, 0, &[1]), 3, &[]).unwrap_err();
    assert_eq!(error, StepError::Cuda(Box::new(trap())));
    assert!(matches!(engine.step(&rows(0, 0, &[1]), &[]), Err(StepError::Poisoned { .. })));
}

#[test]
fn a_kernel_that_says_nothing_is_given_up() {
    let release = Arc::new(AtomicBool::new(false));
    let kernel: FakeKernel = {
        let release = Arc::clone(&release);
        Arc::new(move |_| {
            while !release.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })
    };
    let options = EngineOptions { patience: Duration::from_millis(50), ..Default::default() };
    let (mut engine, seen) = fake_engine_on(cuda_plan(), kernel, &options);
    let start = Instant::now();
    let error = engine.step(&rows(0, 0, &[1]), &[0]).unwrap_err();
    assert!(matches!(error, StepError::Silent { .. }), "{error:?}");
    assert!(error.to_string().contains("nvidia-smi"), "{error}");
    assert!(matches!(engine.step(&rows(0, 0, &[1]), &[]), Err(StepError::Poisoned { .. })));
    drop(engine);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(seen.held.load(Ordering::Relaxed) > 0, "the kernel may still use the memory");
    release.store(true, Ordering::Relaxed);
}

#[test]
fn a_kernel_that_does_not_do_its_work_is_at_fault() {
    let (mut engine, _) = fake_engine_on(cuda_plan(), Arc::new(|_| Ok(())), &EngineOptions::default());
    let error = decode(&mut engine, &rows(0, 0, &[1]), 3, &[]).unwrap_err().to_string();
    assert!(error.contains("without having chosen a token"), "{error}");
    let kernel: FakeKernel = Arc::new(|args| {
        // SAFETY: the memory of the chosen tokens.
        unsafe { *(args.chosen as *mut u32) = VOCAB as u32 + 1 };
        Ok(())
    });
    let (mut engine, _) = fake_engine_on(cuda_plan(), kernel, &EngineOptions::default());
    let error = decode(&mut engine, &rows(0, 0, &[1]), 3, &[]).unwrap_err().to_string();
    assert!(error.contains("with token 64 for row 0 of step 0, which is none of 64"), "{error}");
    assert_eq!(engine.length(0), 0);
}

#[test]
fn the_profile_has_a_record_for_every_sm_and_stage() {
    let options = EngineOptions { profile: true, ..Default::default() };
    let (mut engine, _) = fake_engine(&options);
    engine.step(&rows(0, 0, &[1; 9]), &[]).unwrap();
    assert_eq!(
        (engine.workers(), engine.tick_seconds(), engine.memory_rate()),
        (BLOCKS, Some(1e-9), Some(1e6))
    );
    let profile = engine.profile().unwrap();
    let expected: Vec<u64> =
        (0..BLOCKS as u64).flat_map(|sm| [0, 0, 0, sm * 10 + 1, sm * 10 + 2, sm * 10 + 3]).collect();
    assert_eq!((profile, PROFILE_FIELDS), (&expected[..], 3));
    assert!(fake_engine(&EngineOptions::default()).0.profile().is_none());
}

#[test]
fn memory_that_is_not_there_is_named() {
    let plan = cuda_plan();
    let kv = plan.kv.total_bytes(9).unwrap() as u64;
    for (limit, what) in [(10, "weights"), (kv, "KV cache"), (kv + 400, "activations")] {
        let mut plan = plan.clone();
        plan.packing.bytes = 320;
        let device = FakeDevice::new(toy_kernel(plan.kv));
        let seen = device.seen();
        seen.limit.store(limit, Ordering::Relaxed);
        let error = Engine::on_device(plan, Box::new(device), &EngineOptions::default()).unwrap_err();
        assert!(matches!(error, EngineError::Cuda(_)));
        let text = error.to_string();
        assert!(
            text.contains(&format!("no GPU memory for the {what}")) && text.contains("are free"),
            "{text}"
        );
        assert_eq!(seen.held.load(Ordering::Relaxed), 0);
    }
    let (mut engine, seen) = fake_engine(&EngineOptions::default());
    engine.step(&rows(0, 0, &[1]), &[]).unwrap();
    let memory = engine.memory();
    assert_eq!((memory.kv, memory.kv_used, memory.code), (kv, kv / 9, 100));
    let sum = memory.weights + memory.kv + memory.arena + memory.scratch;
    // Memory of nothing is a byte here.
    assert_eq!(sum + 1, seen.held.load(Ordering::Relaxed));
    drop(engine);
    assert_eq!(seen.held.load(Ordering::Relaxed), 0);
}
