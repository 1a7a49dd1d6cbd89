//! Drafts on a device in software. The toy's taps are a row's token and position, its draft remembers the
//! tokens of its context in a cache of its own, and guesses by the toy's own rule, now and then wrongly.

use super::device::Program;
use super::fake::*;
use crate::engine::tests::{VOCAB, toy_next};
use crate::engine::{BlockInput, Engine, EngineOptions, RoundInput, RoundOptions, RowInput, StepError};
use crate::generate::{DraftLimit, DraftStats, FinishReason, Generator, Pass, Request};
use crate::sampling::SamplingParams;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tilec_ir::abi::{KvLayout, KvType};
use tilec_ir::launch::{
    LAUNCH_ROWS, LaunchArgs, ROUND_WORDS, RoundResult, RoundSequence, SLICE_ROWS, TRACE_FIELDS,
};
use tilec_ir::plan::{DraftPlan, Plan, PlanFile, ProgramPlan, WeightsFrom};
use tilec_ir::stages::{Buffer, BufferElem};

const DRAFT_KV: KvLayout =
    KvLayout { kv_type: KvType::F32, layers: 1, kv_heads: 1, qk_dim: 4, v_dim: 4, page_tokens: 16 };

/// Token of a row to be guessed.
const MASK: u32 = 63;

/// Positions at which a guess is wrong: those that this divides.
const WRONG: u32 = 5;

/// The toy's plan with a draft of blocks of up to 6 rows.
fn draft_plan() -> Plan {
    let mut plan = cuda_plan();
    let rows = plan.limits.max_rows;
    let f32s =
        |name: &str, cols, offset| Buffer { name: name.into(), elem: BufferElem::F32, cols, rows, offset };
    plan.buffers.push(f32s("taps", 2, 1 << 16));
    let program = |file: &str, buffers| ProgramPlan {
        buffers,
        scratch_bytes: 0,
        stages: vec![format!("{file} first"), format!("{file} second")],
        costs: Vec::new(),
        code: PlanFile { file: file.into(), sha256: String::new() },
        resident: plan.resident,
    };
    let synthetic =
        WeightsFrom::Synthetic { seed: 0, config: serde_json::Value::Null, tensors: Default::default() };
    plan.draft = Some(DraftPlan {
        weights: synthetic,
        block: 6,
        mask_token: MASK,
        taps: vec![0],
        taps_buffer: 1,
        kv: DRAFT_KV,
        inject: program("inject", vec![f32s("kv", 8, 0)]),
        input: None,
        block_pass: program("block", vec![f32s("logits", VOCAB, 0)]),
        logits: 0,
        selector: None,
        round: None,
    });
    plan.verify().unwrap();
    plan
}

/// The rows of a launch.
///
/// # Safety
/// The arguments are those of a launch.
unsafe fn columns(args: &LaunchArgs) -> Vec<RowInput> {
    // SAFETY: the caller's promise: a launch has as many of each.
    let column = |address: u64, row| unsafe { *(address as *const u32).add(row) };
    let row = |row| RowInput {
        token: column(args.tokens, row),
        position: column(args.positions, row),
        sequence: column(args.sequences, row),
    };
    (0..args.rows as usize).map(row).collect()
}

/// The kernels: the toy with taps, and its draft's two. `runs` hears of the rows of every launch of a block.
fn kernels(runs: &Arc<Mutex<Vec<u32>>>) -> (FakeKernel, [FakeKernel; 2]) {
    let toy = toy_kernel(cuda_plan().kv);
    // SAFETY: the engine keeps the arguments valid.
    let model: FakeKernel = Arc::new(move |args| unsafe {
        for (number, row) in columns(args).iter().enumerate() {
            *(args.taps as *mut [f32; 2]).add(number) = [row.token as f32, row.position as f32];
        }
        toy(args)
    });
    // SAFETY: as above; rows have pages.
    let inject: FakeKernel = Arc::new(|args| unsafe {
        assert!((1..=2 * SLICE_ROWS as u32).contains(&args.rows) && args.logit_rows == 0 && args.trace == 0);
        for row in columns(args) {
            // The number of the taps' row stands in place of the token.
            let [token, position] = *(args.taps as *const [f32; 2]).add(row.token as usize);
            assert_eq!(position, row.position as f32, "taps of another row");
            *cell(&DRAFT_KV, args, row.sequence, row.position) = token;
        }
        Ok(())
    });
    let runs = Arc::clone(runs);
    // SAFETY: as above.
    let block: FakeKernel = Arc::new(move |args| unsafe {
        let rows = columns(args);
        runs.lock().unwrap().push(args.rows);
        // The last token of a text may be the mask's as well.
        let first = |at: usize| rows.iter().position(|row| row.sequence == rows[at].sequence).unwrap_or(at);
        for wanted in 0..args.logit_rows as usize {
            let row = *(args.logit_index as *const u32).add(wanted) as usize;
            let first = &rows[first(row)];
            assert_eq!(first.sequence, rows[row].sequence);
            let context = (0..first.position).map(|at| *cell(&DRAFT_KV, args, first.sequence, at) as u32);
            let mut history: Vec<u32> = context.chain([first.token]).collect();
            while history.len() <= rows[row].position as usize {
                history.push(toy_next(&history));
            }
            let wrong = u32::from(rows[row].position.is_multiple_of(WRONG));
            let guess = (history[history.len() - 1] + wrong) % VOCAB as u32;
            if args.chosen != 0 {
                *(args.chosen as *mut u32).add(wanted) = guess + 1;
            }
            let logits = (args.logits as *mut f32).add(wanted * VOCAB);
            (0..VOCAB).for_each(|token| *logits.add(token) = if token as u32 == guess { 1.0 } else { 0.0 });
        }
        for row in &rows {
            *cell(&DRAFT_KV, args, row.sequence, row.position) = f32::NAN;
        }
        Ok(())
    });
    (model, [inject, block])
}

fn draft_engine(options: &EngineOptions) -> (Engine, Arc<Seen>, Arc<Mutex<Vec<u32>>>) {
    let runs = Arc::new(Mutex::new(Vec::new()));
    let (model, draft) = kernels(&runs);
    let device = FakeDevice::with_draft(model, draft);
    let seen = device.seen();
    (Engine::on_device(draft_plan(), Box::new(device), options).unwrap(), seen, runs)
}

/// The same plan for kernels of so many rows a step, with whole rounds.
fn round_plan(step_rows: usize) -> Plan {
    let mut plan = draft_plan();
    let resident = plan.resident.map(|kernel| tilec_ir::plan::ResidentPlan { step_rows, ..kernel });
    plan.resident = resident;
    let Some(draft) = &mut plan.draft else { panic!("a draft") };
    (draft.inject.resident, draft.block_pass.resident) = (resident, resident);
    let names = |program: &ProgramPlan| program.stages.clone();
    let stages = [names(&draft.block_pass), plan.stages.clone(), names(&draft.inject)].concat();
    draft.round = Some(ProgramPlan { buffers: Vec::new(), stages, ..draft.block_pass.clone() });
    plan.verify().unwrap();
    plan
}

/// Rounds of the three kernels, as the kernel of rounds has them. Takes a millisecond for each.
fn round_kernel(step_rows: u32, (model, [inject, block]): (FakeKernel, [FakeKernel; 2])) -> FakeKernel {
    // SAFETY: the engine keeps the arguments valid; what is handed on lives through the calls.
    Arc::new(move |args| unsafe {
        let trace = args.trace;
        let args = &LaunchArgs { trace: 0, ..*args };
        let mut sequences: Vec<RoundSequence> = (0..args.round_sequences as usize)
            .map(|n| *(args.round as *const RoundSequence).add(n))
            .collect();
        let stops = &args.stop_tokens[..args.stop_count as usize];
        let [mut chosen, mut guessed] = [[0u32; LAUNCH_ROWS]; 2];
        // A launch of one of the kernels on rows, of which some are wanted.
        let launch = |kernel: &FakeKernel, rows: &[RowInput], wanted: &[u32], own: LaunchArgs| {
            let column = |of: fn(&RowInput) -> u32| rows.iter().map(of).collect::<Vec<u32>>();
            let (tokens, positions) = (column(|row| row.token), column(|row| row.position));
            let sequences = column(|row| row.sequence);
            kernel(&LaunchArgs {
                tokens: tokens.as_ptr() as u64,
                positions: positions.as_ptr() as u64,
                sequences: sequences.as_ptr() as u64,
                logit_index: wanted.as_ptr() as u64,
                rows: rows.len() as u32,
                logit_rows: wanted.len() as u32,
                steps: 1,
                stop_count: 0,
                ..own
            })
        };
        let draft =
            LaunchArgs { kv: args.draft_kv, sampling: 0, chosen: guessed.as_mut_ptr() as u64, ..*args };
        for round in 0..args.steps as usize {
            // As many blocks a pass as fit.
            let mut passes: Vec<Vec<&RoundSequence>> = Vec::new();
            for of in &sequences {
                assert!(of.position + of.rows.max(of.guesses + 1) <= of.limit, "no room for a round");
                match passes.last_mut() {
                    Some(pass) if pass.iter().map(|of| of.rows).sum::<u32>() + of.rows <= step_rows => {
                        pass.push(of);
                    }
                    _ => passes.push(vec![of]),
                }
            }
            assert_eq!(passes.len(), args.block_passes as usize);
            let mut guesses = Vec::new();
            for pass in passes {
                let (mut rows, mut wanted) = (Vec::new(), Vec::new());
                for of in pass {
                    wanted.extend((0..of.guesses).map(|guess| rows.len() as u32 + 1 + guess));
                    rows.extend((0..of.rows).map(|row| RowInput {
                        token: if row == 0 { of.token } else { MASK },
                        position: of.position + row,
                        sequence: of.sequence,
                    }));
                }
                launch(&block, &rows, &wanted, LaunchArgs { arena: args.block_arena, ..draft })?;
                guesses.extend(std::ptr::read_volatile(&guessed)[..wanted.len()].iter().map(|word| word - 1));
            }
            let mut guesses = guesses.into_iter();
            let mut rows = Vec::new();
            for of in &sequences {
                assert_eq!(rows.len(), of.first_row as usize);
                let tokens = std::iter::once(of.token).chain(guesses.by_ref().take(of.guesses as usize));
                rows.extend(tokens.zip(of.position..).map(|(token, position)| RowInput {
                    token,
                    position,
                    sequence: of.sequence,
                }));
            }
            assert_eq!((rows.len(), rows.len()), (args.rows as usize, args.logit_rows as usize));
            let all: Vec<u32> = (0..args.rows).collect();
            launch(&model, &rows, &all, LaunchArgs { chosen: chosen.as_mut_ptr() as u64, ..*args })?;
            let tokens = std::ptr::read_volatile(&chosen).map(|word| word.wrapping_sub(1));
            let numbers: Vec<RowInput> =
                rows.iter().zip(0..).map(|(row, token)| RowInput { token, ..*row }).collect();
            launch(&inject, &numbers, &[], LaunchArgs { arena: args.inject_arena, ..draft })?;
            std::thread::sleep(Duration::from_millis(1));
            let to = std::slice::from_raw_parts(
                (args.chosen as *const AtomicU32).add(round * ROUND_WORDS),
                ROUND_WORDS,
            );
            let mut over = false;
            for (number, of) in sequences.iter_mut().enumerate() {
                let first = of.first_row as usize;
                let hit =
                    |at: usize| at < of.guesses as usize && rows[first + at + 1].token == tokens[first + at];
                let stop = |at: usize| stops.contains(&tokens[first + at]) || at + 1 >= of.left as usize;
                let last = (0..=of.guesses as usize).find(|at| !hit(*at) || stop(*at)).unwrap();
                let right = (0..=last).filter(|at| hit(*at)).count();
                // In any order.
                to[number].store(RoundResult { tokens: last + 1, right }.word(), Ordering::Release);
                for at in (0..=last).rev() {
                    to[LAUNCH_ROWS + first + at].store(tokens[first + at] + 1, Ordering::Release);
                }
                over |= stop(last);
                (of.token, of.position, of.left) =
                    (tokens[first + last], of.position + last as u32 + 1, of.left - last as u32 - 1);
                over |= of.position + of.rows.max(of.guesses + 1) > of.limit;
            }
            let halted = (*(args.halt as *const AtomicU32)).load(Ordering::Acquire) != 0;
            if over || halted {
                break;
            }
        }
        if trace != 0 {
            let times = std::slice::from_raw_parts_mut(trace as *mut u64, BLOCKS * 6 * TRACE_FIELDS);
            times.iter_mut().zip(1000..).for_each(|(time, number)| *time = number);
        }
        Ok(())
    })
}

fn round_engine(step_rows: usize, options: &EngineOptions) -> (Engine, Arc<Seen>) {
    let runs = Arc::default();
    let (model, draft) = kernels(&runs);
    let device =
        FakeDevice::with_draft(model, draft).with_rounds(round_kernel(step_rows as u32, kernels(&runs)));
    let seen = device.seen();
    (Engine::on_device(round_plan(step_rows), Box::new(device), options).unwrap(), seen)
}

fn rows(sequence: u32, start: u32, tokens: &[u32]) -> Vec<RowInput> {
    (start..).zip(tokens).map(|(position, token)| RowInput { token: *token, position, sequence }).collect()
}

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

/// What the toy says after `tokens`, and after that, so many times.
fn expected(tokens: &[u32], count: usize) -> Vec<u32> {
    let mut all = tokens.to_vec();
    (0..count).for_each(|_| all.push(toy_next(&all)));
    all.split_off(tokens.len())
}

#[test]
fn texts_with_a_draft_are_the_toys_and_rounds_end_at_its_mistakes() {
    let (engine, seen, _) = draft_engine(&EngineOptions::default());
    assert_eq!(engine.draft_block(), Some(6));
    let mut generator = Generator::new(engine, None);
    generator.set_draft_min(usize::MAX);
    let requests =
        [request(&[1, 2, 3, 4, 9, 8, 7, 6, 5, 5, 5], 30), request(&[9], 22), request(&[60, 1], 40)];
    // Five guesses a block, of which that of every fifth position is wrong: a round goes from one of these
    // to the next, but for the first of a text.
    let mut histograms = Vec::new();
    for request in &requests {
        let run = generator.run(std::slice::from_ref(request), &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(run.completions[0].tokens, expected(&request.prompt, request.max_tokens));
        histograms.push(run.draft.histogram);
    }
    assert_eq!(histograms, [vec![0, 0, 0, 1, 4], vec![0, 0, 0, 0, 4], vec![0, 0, 1, 0, 7]]);
    // Three sequences share the eight rows of a pass: a guess each. Those that go on have more.
    generator.clear();
    let launched = seen.launches.lock().unwrap().len();
    let run = generator.run(&requests, &mut |_| ControlFlow::Continue(())).unwrap();
    for (done, request) in run.completions.iter().zip(&requests) {
        assert_eq!(done.tokens, expected(&request.prompt, request.max_tokens));
    }
    let added = |draft: &crate::generate::DraftStats| draft.tokens as f64 / draft.rounds as f64;
    assert!((1.2..2.5).contains(&added(&run.completions[1].draft)), "{:?}", run.completions[1].draft);
    assert!(added(&run.completions[2].draft) > 2.0, "{:?}", run.completions[2].draft);
    let prompts = 2;
    let rows: Vec<u32> =
        seen.launches.lock().unwrap()[launched + prompts..].iter().map(|args| args.rows).collect();
    assert!(rows.iter().all(|rows| (1..=8).contains(rows)), "{rows:?}");
    // Where guesses are verified greedily, tokens come back in place of logits.
    assert!(seen.launches.lock().unwrap()[launched..].iter().any(|args| args.chosen != 0));
    assert_eq!(seen.launches.lock().unwrap().iter().filter(|args| args.steps > 1).count(), 0);
    // The same texts without guesses, many steps a launch; then with them again behind what is cached.
    generator.set_draft_rows(0);
    generator.clear();
    let plain = generator.run(&requests, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(seen.launches.lock().unwrap().iter().any(|args| args.steps > 1));
    for (done, drafted) in plain.completions.iter().zip(&run.completions) {
        assert_eq!(done.tokens, drafted.tokens);
    }
    generator.set_draft_rows(3);
    let longer = [&requests[1].prompt[..], &plain.completions[1].tokens].concat();
    let again = generator.run(&[request(&longer, 10)], &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(again.completions[0].tokens, expected(&longer, 10));
    assert!(again.draft.rounds > 2, "{:?}", again.draft);
}

/// Guesses are verified by tokens that the kernel samples, each row by its own sequence's parameters; the texts are
/// those without a draft, and those of a host that samples, which penalties ask for.
#[test]
fn sampled_texts_with_a_draft_are_those_without() {
    let params = |temperature: f32, seed| SamplingParams { temperature, seed, ..Default::default() };
    let sampled = |sampling| Request { sampling, ..request(&[1, 2, 3, 4, 9, 8], 30) };
    // At a tenth the largest logit has 99 % of it all.
    let requests = [sampled(params(0.1, 5)), sampled(params(1.0, 6)), sampled(SamplingParams::greedy())];
    let biased = |request: &Request| {
        let sampling = SamplingParams { logit_bias: [(0, 0.0)].into(), ..request.sampling.clone() };
        Request { sampling, ..request.clone() }
    };
    let on_host: Vec<Request> = requests.iter().map(biased).collect();
    let texts = |draft_rows, requests: &[Request]| {
        let (engine, seen, _) = draft_engine(&EngineOptions::default());
        let mut generator = Generator::new(engine, None);
        generator.set_draft_rows(draft_rows);
        generator.set_draft_min(usize::MAX);
        let mut texts = Vec::new();
        let mut right = 0;
        for requests in [&requests[..1], &requests[1..2], requests] {
            let run = generator.run(requests, &mut |_| ControlFlow::Continue(())).unwrap();
            right += run.draft.right;
            texts.extend(run.completions.into_iter().map(|done| done.tokens));
            generator.clear();
        }
        let launches = seen.launches.lock().unwrap();
        let count = |wanted: fn(&LaunchArgs) -> bool| launches.iter().filter(|args| wanted(args)).count();
        (texts, right, count(|args| args.sampling != 0), count(|args| args.steps > 1))
    };
    let (drafted, right, by_kernel, long) = texts(6, &requests);
    assert!(right > 10 && by_kernel > 10 && long == 0, "{right} {by_kernel} {long}");
    let (plain, _, by_kernel, long) = texts(0, &requests);
    assert!(by_kernel > 0 && long > 0, "{by_kernel} {long}");
    let (host, right, by_kernel, long) = texts(6, &on_host);
    assert!(right > 10 && (by_kernel, long) == (0, 0), "{right} {by_kernel} {long}");
    assert_eq!((&drafted, &drafted[..2]), (&plain, &drafted[2..4]));
    assert_eq!(drafted, host);
    assert_ne!(drafted[0], drafted[1]);
}

/// By times that are said, the same rounds every time: guesses where they pay, long launches where they do not, and
/// where both take turns the draft's context catches up before it guesses again.
#[test]
fn guesses_are_made_where_they_pay_and_texts_stay() {
    let requests = [request(&[1, 2, 3, 4, 9, 8, 7], 40), request(&[9], 45)];
    let texts: Vec<Vec<u32>> = requests.iter().map(|r| expected(&r.prompt, r.max_tokens)).collect();
    let run = |draft_micros: u64, step_micros: fn(usize) -> u64, requests: &[Request]| {
        let (engine, seen, _) = draft_engine(&EngineOptions::default());
        let mut generator = Generator::new(engine, None);
        generator.set_pass_times(Some(Arc::new(move |pass, rows| {
            Duration::from_micros(if pass == Pass::Draft { draft_micros } else { step_micros(rows) })
        })));
        let run = generator.run(requests, &mut |_| ControlFlow::Continue(())).unwrap();
        let texts: Vec<Vec<u32>> = run.completions.iter().map(|done| done.tokens.clone()).collect();
        let long = seen.launches.lock().unwrap().iter().filter(|args| args.steps > 1).count();
        (texts, run.draft, long)
    };
    // Cheap guesses, four of five right.
    let (found, draft, long) = run(10, |_| 100, &requests[..1]);
    assert_eq!((&found[..], long, draft.plain), (&texts[..1], 0, 0));
    assert_eq!(draft.mean_guesses(), Some(5.0), "{draft:?}");
    let again = run(10, |_| 100, &requests[..1]).1;
    assert_eq!((again.histogram, again.blocks), (draft.histogram, draft.blocks));
    // Guesses that cost ten steps.
    let (found, draft, long) = run(1000, |_| 100, &requests);
    assert_eq!(found, texts);
    assert!(draft.rounds == 0 && long > 0 && draft.plain > 60, "{long} {draft:?}");
    // Each row costs: a guess or two, as long as they are thought to be right.
    let (found, draft, _) = run(5, |rows| 100 + 60 * rows as u64, &requests);
    assert_eq!(found, texts, "{draft:?}");
    assert!((1.0..4.0).contains(&draft.mean_guesses().unwrap()), "{draft:?}");

    // Switches that are turned from the callback.
    let (engine, seen, _) = draft_engine(&EngineOptions::default());
    let mut generator = Generator::new(engine, None).with_launch_steps(4);
    generator.set_draft_min(usize::MAX);
    for (on, off) in [(10, 20), (1, 2), (7, 31), (40, 5)] {
        generator.clear();
        requests.iter().for_each(|request| request.draft.set(0));
        seen.launches.lock().unwrap().clear();
        let mut told = 0;
        let run = generator
            .run(&requests, &mut |piece| {
                told += 1;
                // The other one's: what is on its way knows nothing of it.
                let limit = &requests[1 - piece.request].draft;
                match told % (on + off) {
                    n if n == off => limit.set(3),
                    0 => limit.set(0),
                    _ => {}
                }
                ControlFlow::Continue(())
            })
            .unwrap();
        let found: Vec<Vec<u32>> = run.completions.iter().map(|done| done.tokens.clone()).collect();
        assert_eq!(found, texts, "{on} {off}");
        assert!(run.draft.rounds > 0 && run.draft.plain > 0, "{on} {off}: {:?}", run.draft);
        assert!(run.draft.blocks.len() <= 3, "{:?}", run.draft);
        let launches = seen.launches.lock().unwrap();
        assert!(launches.iter().any(|args| args.steps > 1), "{on} {off}");
    }
}

#[test]
fn taps_of_all_passes_stay_until_they_are_injected() {
    let (mut engine, seen, runs) = draft_engine(&EngineOptions::default());
    let (one, other): (Vec<u32>, Vec<u32>) = ((1..12).collect(), (20..28).collect());
    engine.step(&[rows(0, 0, &one), rows(2, 0, &other)].concat(), &[]).unwrap();
    let taps: Vec<u64> = seen.launches.lock().unwrap().iter().map(|args| args.taps).collect();
    assert_eq!((taps[1] - taps[0], taps[2] - taps[1]), (64, 64), "8 rows of two floats");
    // All rows but the last one of the first sequence: 18 rows, three passes.
    let chosen: Vec<u32> = (0..10).chain(11..19).collect();
    engine.inject(&chosen).unwrap();
    assert_eq!([0, 1, 2].map(|n| engine.draft_length(n)), [10, 0, 8]);
    assert_eq!(seen.programs.lock().unwrap()[3..], [Program::Inject; 3]);
    // Blocks are not cut: of 5, 4 and 2 rows, the first fills a launch with its neighbour's too much.
    engine.step(&rows(1, 0, &[40]), &[]).unwrap();
    engine.inject(&[0]).unwrap();
    let block = |sequence, position: u32, token, rows| BlockInput {
        token,
        position,
        sequence,
        rows,
        wanted: rows - 1,
    };
    let blocks = [block(0, 10, 11, 5), block(2, 8, 28, 4), block(1, 1, 40, 2)];
    let logits = engine.draft(&blocks).unwrap();
    let guesses: Vec<u32> = logits
        .chunks_exact(VOCAB)
        .map(|row| row.iter().position(|logit| *logit == 1.0).unwrap() as u32)
        .collect();
    let mut wanted = Vec::new();
    for (history, count) in [(&one[..10], 5), (&other[..], 4), (&[40][..], 2)] {
        let token = if count == 5 {
            11
        } else if count == 4 {
            28
        } else {
            40
        };
        let history = [history, &[token]].concat();
        let wrong = |(at, token): (usize, u32)| (token + u32::from((at as u32).is_multiple_of(WRONG))) % 64;
        wanted.extend((history.len()..).zip(expected(&history, count - 1)).map(wrong));
    }
    assert_eq!(guesses, wanted);
    assert_eq!(runs.lock().unwrap()[..], [5, 6]);
    // The same without logits.
    let guesses: Option<Vec<u32>> = engine.guess(&blocks).unwrap().into_iter().collect();
    assert_eq!(guesses, Some(wanted));
    // What the block left in the cache is gone with the next rows of the context.
    assert_eq!(engine.draft_length(0), 10);
    engine.step(&rows(0, 10, &[11, 12]), &[]).unwrap();
    engine.inject(&[0, 1]).unwrap();
    assert_eq!(engine.draft_length(0), 12);
}

#[test]
fn a_decoding_launch_leaves_a_gap_in_the_context_and_says_so() {
    let (mut engine, _, _) = draft_engine(&EngineOptions::default());
    engine.step(&rows(0, 0, &[1, 2, 3]), &[]).unwrap();
    engine.inject(&[0, 1, 2]).unwrap();
    let told = engine.decode(&rows(0, 3, &[4]), 5, &[], &mut |_, _, _| ControlFlow::Continue(())).unwrap();
    assert_eq!((told, engine.length(0), engine.draft_length(0)), (5, 8, 3));
    assert!(matches!(engine.inject(&[0]), Err(StepError::Inject { rows: 0 })));
    let block = BlockInput { token: 9, position: 8, sequence: 0, rows: 4, wanted: 3 };
    assert!(matches!(engine.draft(&[block]), Err(StepError::DraftGap { context: 3, position: 8, .. })));
    assert!(matches!(
        engine.draft(&[BlockInput { rows: 7, ..block }]),
        Err(StepError::Block { rows: 7, max: 6 })
    ));
    // A pretended context is the draft's as well.
    engine.pretend_length(1, 20).unwrap();
    assert_eq!(engine.draft_length(1), 20);
}

#[test]
fn tokens_of_several_passes_are_those_of_the_largest_logits() {
    let (mut engine, _, _) = draft_engine(&EngineOptions::default());
    let (one, other): (Vec<u32>, Vec<u32>) = ((1..12).collect(), (20..28).collect());
    let step = [rows(0, 0, &one), rows(2, 0, &other)].concat();
    let wanted = [0, 3, 7, 8, 10, 18];
    let logits = engine.step(&step, &wanted).unwrap();
    let best = |row: &[f32]| row.iter().position(|logit| *logit == 1.0).unwrap() as u32;
    let tokens: Vec<u32> = logits.chunks_exact(VOCAB).map(best).collect();
    assert_eq!(engine.step_greedy(&step, &wanted).unwrap(), tokens);
    assert_eq!([0, 1, 2].map(|n| engine.length(n)), [11, 0, 8]);
    engine.inject(&[0, 1]).unwrap();
    assert_eq!(engine.draft_length(0), 2);
    // A kernel that does not choose is at fault.
    let silent: FakeKernel = Arc::new(|_| Ok(()));
    let device = FakeDevice::new(silent);
    let mut engine = Engine::on_device(cuda_plan(), Box::new(device), &EngineOptions::default()).unwrap();
    let error = engine.step_greedy(&rows(0, 0, &[1]), &[0]).unwrap_err();
    assert!(matches!(error, StepError::Kernel { .. }), "{error:?}");
    let mut cpu = crate::engine::tests::toy_engine(1, &EngineOptions::default());
    assert_eq!(cpu.step_greedy(&rows(0, 0, &[1]), &[0]), Err(StepError::NotResident));
}

/// An `inject` that takes long is not waited for; what comes behind it sees what it has done, also when the
/// page table changes meanwhile, or another one follows at once.
#[test]
fn nobody_waits_for_an_inject() {
    let runs = Arc::default();
    let (model, [inject, block]) = kernels(&runs);
    let slow: FakeKernel = Arc::new(move |args| {
        std::thread::sleep(Duration::from_millis(80));
        inject(args)
    });
    let device = FakeDevice::with_draft(model, [slow, block]);
    let mut engine = Engine::on_device(draft_plan(), Box::new(device), &EngineOptions::default()).unwrap();
    engine.step(&rows(0, 0, &[1, 2, 3]), &[]).unwrap();
    let start = Instant::now();
    engine.inject(&[0, 1]).unwrap();
    assert!(start.elapsed() < Duration::from_millis(60), "{:?}", start.elapsed());
    engine.inject(&[2]).unwrap();
    let block = |token, position| BlockInput { token, position, sequence: 0, rows: 2, wanted: 1 };
    let best = |logits: &[f32]| logits.iter().position(|logit| *logit == 1.0);
    assert_eq!(best(engine.draft(&[block(4, 3)]).unwrap()), Some(10));
    // Another sequence gets a page, and its rows come in front of the taps that are still to be read.
    engine.step(&rows(0, 3, &[4]), &[]).unwrap();
    engine.inject(&[0]).unwrap();
    engine.step(&rows(1, 0, &[7; 9]), &[]).unwrap();
    // At the fifth position a guess is wrong by one.
    assert_eq!(best(engine.draft(&[block(11, 4)]).unwrap()), Some(22));
    engine.step(&rows(0, 4, &[11]), &[]).unwrap();
    engine.inject(&[0]).unwrap();
    drop(engine);
}

#[test]
fn a_stuck_inject_is_the_error_of_what_comes_next() {
    let record = [1, 1, 77, 6, 3, 4, 0, 0];
    let (model, [_, block]) = kernels(&Arc::default());
    let device = FakeDevice::with_draft(model, [stuck_kernel(record), block]);
    let mut engine = Engine::on_device(draft_plan(), Box::new(device), &EngineOptions::default()).unwrap();
    engine.step(&rows(0, 0, &[1]), &[]).unwrap();
    engine.inject(&[0]).unwrap();
    let error = engine.step(&rows(0, 1, &[1]), &[]).unwrap_err();
    assert!(matches!(&error, StepError::Stuck { stage, .. } if stage == "inject second"), "{error:?}");
    assert!(matches!(engine.inject(&[0]), Err(StepError::Inject { .. } | StepError::Poisoned { .. })));
}

#[test]
fn a_draft_that_is_not_wanted_takes_no_memory() {
    let options = EngineOptions { draft: false, ..Default::default() };
    let (mut engine, seen, _) = draft_engine(&options);
    assert_eq!(engine.draft_block(), None);
    let without = seen.held.load(Ordering::Relaxed);
    engine.step(&rows(0, 0, &[1, 2]), &[]).unwrap();
    assert_eq!(engine.inject(&[0]), Err(StepError::NoDraft));
    let (mut engine, seen, _) = draft_engine(&EngineOptions::default());
    let draft = DRAFT_KV.total_bytes(9).unwrap() + 20 * 8 * 4 + 20 * VOCAB * 4;
    assert_eq!(seen.held.load(Ordering::Relaxed) - without, draft as u64);
    let memory = engine.memory();
    let all = memory.weights + memory.kv + memory.arena + memory.scratch;
    assert_eq!(all + 1, seen.held.load(Ordering::Relaxed), "memory of nothing is a byte here");
    engine.poison().unwrap();
    engine.step(&rows(0, 0, &[1, 2]), &[]).unwrap();
    engine.inject(&[0, 1]).unwrap();
    let block = BlockInput { token: 3, position: 2, sequence: 0, rows: 2, wanted: 1 };
    assert_eq!(engine.draft(&[block]).unwrap().iter().position(|logit| *logit == 1.0), Some(6));
}

#[test]
fn a_stuck_draft_names_its_own_stage() {
    let record = [1, 1, 77, 6, 3, 4, 0, 0];
    let (model, [inject, _]) = kernels(&Arc::default());
    let device = FakeDevice::with_draft(model, [inject, stuck_kernel(record)]);
    let mut engine = Engine::on_device(draft_plan(), Box::new(device), &EngineOptions::default()).unwrap();
    engine.step(&rows(0, 0, &[1]), &[]).unwrap();
    engine.inject(&[0]).unwrap();
    let block = BlockInput { token: 3, position: 1, sequence: 0, rows: 2, wanted: 1 };
    let error = engine.draft(&[block]).unwrap_err();
    assert!(matches!(&error, StepError::Stuck { stage, .. } if stage == "block second"), "{error:?}");
    assert!(matches!(engine.step(&rows(0, 1, &[1]), &[]), Err(StepError::Poisoned { .. })));
}

/// What became of guesses, without times.
fn counts(draft: &DraftStats) -> DraftStats {
    let zero = Duration::ZERO;
    DraftStats { draft: zero, inject: zero, verify: zero, launch: zero, ..draft.clone() }
}

/// Texts and counts of rounds in launches are those of the host's rounds; nothing else runs while texts are decoded.
#[test]
fn launched_rounds_are_the_hosts() {
    let (on_host, _, _) = draft_engine(&EngineOptions::default());
    let mut on_host = Generator::new(on_host, None);
    let (engine, seen) = round_engine(SLICE_ROWS, &EngineOptions::default());
    let mut launched = Generator::new(engine, None);
    let context = launched.engine().plan().limits.context;
    let prompts: [&[u32]; 3] = [&[1, 2, 3, 4, 9, 8, 7, 6, 5, 5, 5], &[9], &[60, 1]];
    for draft_rows in [6, 3, 2] {
        for max_tokens in [1, 2, 3, 7, 30, 37, 1000] {
            for prompt in prompts {
                let run = |generator: &mut Generator| {
                    generator.clear();
                    generator.set_draft_min(usize::MAX);
                    generator.set_draft_rows(draft_rows);
                    let request = request(prompt, max_tokens);
                    generator.run(&[request], &mut |_| ControlFlow::Continue(())).unwrap()
                };
                seen.programs.lock().unwrap().clear();
                let (wanted, found) = (run(&mut on_host), run(&mut launched));
                let [one, other] = [&wanted, &found].map(|run| &run.completions[0]);
                assert_eq!(one.tokens, other.tokens, "{draft_rows} {max_tokens} {prompt:?}");
                assert_eq!((one.finish, counts(&one.draft)), (other.finish, counts(&other.draft)));
                assert_eq!(counts(&wanted.draft), counts(&found.draft));
                assert_eq!(one.tokens.len(), max_tokens.min(context + 1 - prompt.len()));
                let programs = seen.programs.lock().unwrap().clone();
                let first = programs.iter().position(|program| *program == Program::Round);
                // A prompt of one token is decoded from the start; a guess is worth its while from two tokens on.
                let least = if prompt.len() == 1 { 2 } else { 3 };
                assert_eq!(first.is_some(), max_tokens >= least, "{programs:?}");
                let whole = first.map_or(&[][..], |first| &programs[first..]);
                // The last token of a text may be left to a step of its own.
                let others = whole.iter().filter(|program| **program != Program::Round).count();
                assert!(others <= 2, "{programs:?}");
                assert!(found.draft.launch > Duration::ZERO || first.is_none());
            }
        }
    }
    // Rounds of a launch grow with what is known of a text.
    let steps: Vec<u32> = seen.rounds.lock().unwrap().iter().map(|args| args.steps).collect();
    assert!(steps.contains(&4) && steps.iter().any(|steps| *steps > 4), "{steps:?}");
}

/// Up to three sequences in one launch, which accept differently, by the largest logits and by chance, in one pass of
/// blocks or in several.
#[test]
fn launched_rounds_of_several_sequences() {
    let requests = |sampled: bool| {
        let prompts: [&'static [u32]; 4] = [&[1, 2, 3, 4, 9, 8, 7], &[9], &[60, 1, 2], &[5, 6, 7, 8, 9]];
        prompts.into_iter().zip([31, 33, 9, 40]).zip(0..).map(move |((prompt, max_tokens), n)| {
            let chance = SamplingParams { temperature: 0.1 + n as f32 / 50.0, seed: n, ..Default::default() };
            let sampling = if sampled && n != 1 { chance } else { SamplingParams::greedy() };
            Request { sampling, ..request(prompt, max_tokens) }
        })
    };
    for (sampled, step_rows) in [(false, 16), (true, 16), (false, 8), (true, 8)] {
        let (engine, seen) = round_engine(step_rows, &EngineOptions::default());
        let mut generator = Generator::new(engine, None);
        generator.set_draft_min(usize::MAX);
        let mut plain = Generator::new(draft_engine(&EngineOptions::default()).0, None);
        plain.set_draft_rows(0);
        for together in [1, 2, 3, 4] {
            let requests: Vec<Request> = requests(sampled).take(together).collect();
            generator.clear();
            plain.clear();
            seen.rounds.lock().unwrap().clear();
            let found = generator.run(&requests, &mut |_| ControlFlow::Continue(())).unwrap();
            let wanted = plain.run(&requests, &mut |_| ControlFlow::Continue(())).unwrap();
            for (found, wanted) in found.completions.iter().zip(&wanted.completions) {
                assert_eq!((&found.tokens, found.finish), (&wanted.tokens, wanted.finish), "{together}");
                assert_eq!(found.stats.generated_tokens, found.tokens.len());
            }
            let launches = seen.rounds.lock().unwrap();
            let most = launches.iter().map(|args| args.round_sequences).max().unwrap();
            assert_eq!(most, together.min(3) as u32);
            assert_eq!(launches.iter().any(|args| args.sampling != 0), sampled);
            assert!(launches.iter().all(|args| args.rows <= step_rows as u32));
            let passes = launches.iter().map(|args| args.block_passes).max().unwrap();
            assert_eq!(passes, (together.min(3) * 6).div_ceil(step_rows / 6 * 6) as u32);
        }
    }
}

/// Texts without guesses ride along in launches of rounds, a token a round, and may have guesses again at any time.
#[test]
fn texts_without_guesses_share_launches_of_rounds() {
    let prompts: [&[u32]; 3] = [&[1, 2, 3, 4, 9, 8, 7], &[9], &[60, 1, 2]];
    for step_rows in [8, 16] {
        let (engine, seen) = round_engine(step_rows, &EngineOptions::default());
        let mut generator = Generator::new(engine, None);
        generator.set_draft_min(usize::MAX);
        for off in 0..3 {
            generator.clear();
            let requests: Vec<Request> = prompts.iter().map(|prompt| request(prompt, 33)).collect();
            requests[off].draft.set(0);
            seen.programs.lock().unwrap().clear();
            seen.rounds.lock().unwrap().clear();
            let run = generator.run(&requests, &mut |_| ControlFlow::Continue(())).unwrap();
            for (done, request) in run.completions.iter().zip(&requests) {
                assert_eq!(done.tokens, expected(&request.prompt, 33));
            }
            let draft = &run.completions[off].draft;
            assert!(draft.rounds == 0 && draft.plain >= 10, "{draft:?}");
            let others: Vec<_> = (0..3).filter(|n| *n != off).map(|n| &run.completions[n].draft).collect();
            assert!(others.iter().all(|draft| draft.right > 5), "{others:?}");
            // All three are in some launch, of which one has no guesses.
            let launches = seen.rounds.lock().unwrap();
            let all = launches.iter().find(|args| args.round_sequences == 3).expect("a launch of all");
            assert!(all.rows > 3, "{}", all.rows);
            // While the others write, nothing else is launched.
            let programs = seen.programs.lock().unwrap();
            let first = programs.iter().position(|program| *program == Program::Round).unwrap();
            let last = programs.iter().rposition(|program| *program == Program::Round).unwrap();
            let others = programs[first..last].iter().filter(|program| **program != Program::Round).count();
            assert!(others <= 4, "{programs:?}");
        }
        // Switched on and off from the callback.
        let mut switched = [0; 2];
        for turn in [2, 3, 5, 11] {
            generator.clear();
            let requests: Vec<Request> = prompts.iter().map(|prompt| request(prompt, 40)).collect();
            let mut told = 0;
            let run = generator
                .run(&requests, &mut |piece| {
                    told += 1;
                    let limit = if told / turn % 2 == 0 { 0 } else { 5 };
                    requests[(piece.request + 1) % 3].draft.set(limit);
                    ControlFlow::Continue(())
                })
                .unwrap();
            for (done, request) in run.completions.iter().zip(&requests) {
                assert_eq!(done.tokens, expected(&request.prompt, 40), "{turn}");
            }
            switched[0] += run.draft.plain;
            switched[1] += run.draft.rounds;
        }
        assert!(switched.iter().all(|count| *count > 10), "{switched:?}");
    }
}

/// What a launch of rounds takes, and what it leaves of the draft's context.
#[test]
fn sequences_without_guesses_stand_behind_the_others() {
    let (mut engine, _) = round_engine(SLICE_ROWS, &EngineOptions::default());
    for sequence in 0..2 {
        engine.step(&rows(sequence, 0, &[1, 2]), &[]).unwrap();
    }
    // The draft knows all of the first sequence, and nothing of the second.
    engine.step(&rows(0, 0, &[1, 2]), &[]).unwrap();
    engine.inject(&[0, 1]).unwrap();
    let input = |sequence, rows, wanted| {
        let block = BlockInput { token: 3, position: 2, sequence, rows, wanted };
        RoundInput { block, left: 30, limit: 40 }
    };
    let options = RoundOptions { rounds: 2, stop_tokens: &[], accept: None };
    let mut go = |inputs: &[RoundInput]| {
        let mut news = Vec::new();
        let done = engine.rounds(inputs, &[], options, &mut |round| {
            news.push((round.sequence, round.tokens.to_vec()));
            ControlFlow::Continue(())
        });
        done.map(|_| (news, [0, 1].map(|sequence| (engine.length(sequence), engine.draft_length(sequence)))))
    };
    for wrong in
        [&[input(1, 0, 0)][..], &[input(1, 0, 0), input(0, 6, 5)], &[input(0, 6, 0)], &[input(0, 0, 3)]]
    {
        assert!(matches!(go(wrong), Err(StepError::Block { .. })), "{wrong:?}");
    }
    let (news, lengths) = go(&[input(0, 6, 5), input(1, 0, 0)]).unwrap();
    let own: Vec<u32> =
        news.iter().filter(|(of, _)| *of == 1).flat_map(|(_, tokens)| tokens.clone()).collect();
    assert_eq!(own, expected(&[1, 2, 3], 2));
    let first: usize = news.iter().filter(|(of, _)| *of == 0).map(|(_, tokens)| tokens.len()).sum();
    assert_eq!(lengths, [(2 + first, 2 + first), (4, 0)]);
    // More of them than there are places for.
    let many: Vec<RoundInput> =
        (0..5).map(|n| input(n, if n == 0 { 2 } else { 0 }, usize::from(n == 0))).collect();
    assert!(matches!(
        engine.rounds(&many, &[], options, &mut |_| ControlFlow::Continue(())),
        Err(StepError::Rows { rows: 5, max: 4 })
    ));
}

/// The record is that of what ran last, a step or rounds.
#[test]
fn rounds_have_times_of_all_their_stages() {
    let (mut engine, _) = round_engine(SLICE_ROWS, &EngineOptions { profile: true, ..Default::default() });
    let one = engine.plan().stages.len() * BLOCKS * TRACE_FIELDS;
    engine.step(&rows(0, 0, &[1, 2]), &[]).unwrap();
    engine.inject(&[0, 1]).unwrap();
    assert_eq!(engine.profile().unwrap().len(), one);
    let block = BlockInput { token: 3, position: 2, sequence: 0, rows: 6, wanted: 5 };
    let input = RoundInput { block, left: 30, limit: 40 };
    let options = RoundOptions { rounds: 2, stop_tokens: &[], accept: None };
    engine.rounds(&[input], &[], options, &mut |_| ControlFlow::Continue(())).unwrap();
    let times: Vec<u64> = (1000..).take(3 * one).collect();
    assert_eq!(engine.profile().unwrap(), times);
    let position = engine.length(0) as u32;
    engine.step(&rows(0, position, &[4]), &[]).unwrap();
    assert_eq!(engine.profile().unwrap().len(), one);
}

/// Stop tokens inside of a block, more of them than the kernel knows, a callback that wants no more.
#[test]
fn launched_rounds_end_with_their_texts() {
    let (engine, _) = round_engine(SLICE_ROWS, &EngineOptions::default());
    let mut generator = Generator::new(engine, None);
    generator.set_draft_min(usize::MAX);
    let prompt = [1, 2, 3, 4, 9, 8, 7, 6, 5, 5, 5];
    let text = expected(&prompt, 40);
    for at in 0..30 {
        for others in [0, 9] {
            generator.clear();
            let unused = (64..64 + others).collect::<Vec<u32>>();
            let stop_tokens = [unused, vec![text[at]]].concat();
            let until = text.iter().position(|token| *token == text[at]).unwrap();
            let asked = Request { stop_tokens, ..request(&prompt, 40) };
            let run = generator.run(&[asked], &mut |_| ControlFlow::Continue(())).unwrap();
            let done = &run.completions[0];
            assert_eq!((&done.tokens[..], done.finish), (&text[..until], FinishReason::StopToken(text[at])));
            // What comes behind it goes on from what is cached.
            let longer = [&prompt[..], &text[..until], &[11, 12]].concat();
            let run = generator.run(&[request(&longer, 8)], &mut |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(run.completions[0].tokens, expected(&longer, 8), "{at} {others}");
            assert!(until == 0 || run.completions[0].stats.cached_tokens >= prompt.len());
        }
        generator.clear();
        let mut told = 0;
        let run = generator.run(&[request(&prompt, 40)], &mut |_| {
            told += 1;
            if told > at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let done = &run.unwrap().completions[0];
        assert_eq!((&done.tokens[..], done.finish), (&text[..=at], FinishReason::Cancelled));
    }
}

/// With few pages launches are short, and texts stay.
#[test]
fn launched_rounds_make_do_with_few_pages() {
    let requests = [request(&[1, 2, 3], 40), request(&[7, 7], 30)];
    for kv_pages in 4..8 {
        let options = EngineOptions { kv_pages: Some(kv_pages), ..EngineOptions::default() };
        let (engine, seen) = round_engine(16, &options);
        let mut generator = Generator::new(engine, None);
        generator.set_draft_min(usize::MAX);
        let Ok(run) = generator.run(&requests, &mut |_| ControlFlow::Continue(())) else {
            assert!(kv_pages < 6, "{kv_pages} pages");
            continue;
        };
        for (done, request) in run.completions.iter().zip(&requests) {
            assert_eq!(done.tokens, expected(&request.prompt, request.max_tokens));
        }
        assert!(!seen.rounds.lock().unwrap().is_empty());
    }
}

#[test]
fn rounds_say_what_is_wrong_with_them() {
    let (mut engine, seen) = round_engine(SLICE_ROWS, &EngineOptions::default());
    engine.step(&rows(0, 0, &[1, 2, 3]), &[]).unwrap();
    engine.inject(&[0, 1]).unwrap();
    let block = BlockInput { token: 4, position: 2, sequence: 0, rows: 6, wanted: 5 };
    let input = RoundInput { block, left: 9, limit: 20 };
    let options = RoundOptions { rounds: 3, ..RoundOptions::default() };
    let refused = |engine: &mut Engine, inputs: &[RoundInput], options| {
        engine.rounds(inputs, &[], options, &mut |_| ControlFlow::Continue(())).unwrap_err()
    };
    let with = |block| RoundInput { block, ..input };
    let gap = refused(&mut engine, &[with(BlockInput { position: 3, ..block })], options);
    assert!(matches!(gap, StepError::DraftGap { context: 2, position: 3, .. }), "{gap:?}");
    let short = refused(&mut engine, &[RoundInput { limit: 7, ..input }], options);
    assert!(matches!(short, StepError::Context { .. }), "{short:?}");
    let long = refused(&mut engine, &[RoundInput { limit: 4000, ..input }], options);
    assert!(matches!(long, StepError::Context { .. }), "{long:?}");
    let none = refused(&mut engine, &[with(BlockInput { wanted: 0, ..block })], options);
    assert!(matches!(none, StepError::Block { .. }), "{none:?}");
    let over = refused(&mut engine, &[RoundInput { left: 0, ..input }], options);
    assert!(matches!(over, StepError::Block { .. }), "{over:?}");
    let many =
        refused(&mut engine, &[input, with(BlockInput { sequence: 1, position: 0, ..block })], options);
    assert!(matches!(many, StepError::Rows { rows: 12, max: 8 }), "{many:?}");
    for rounds in [0, 513] {
        let steps = refused(&mut engine, &[input], RoundOptions { rounds, ..options });
        assert_eq!(steps, StepError::Steps { steps: rounds, max: 512 });
    }
    assert!(seen.rounds.lock().unwrap().is_empty());
    // Forced rounds reach the kernel as thousandths. All nine tokens fit into twenty rounds.
    let forced = RoundOptions { accept: Some(2.5), rounds: 20, ..options };
    let mut told = Vec::new();
    let done = engine.rounds(&[input], &[], forced, &mut |news| {
        assert_eq!(news.sequence, 0);
        told.resize(news.round + 1, 0);
        told[news.round] += news.tokens.len();
        ControlFlow::Continue(())
    });
    assert_eq!((done, told.iter().sum::<usize>()), (Ok(told.len()), 9));
    assert_eq!(seen.rounds.lock().unwrap()[0].accept, 2500);
    assert_eq!((engine.length(0), engine.draft_length(0)), (11, 11));
    let (mut plain, _, _) = draft_engine(&EngineOptions::default());
    assert_eq!(refused(&mut plain, &[input], options), StepError::NoDraft);
}

/// A wait that gave up inside of a round: its stage, of whichever kernel, and the round.
#[test]
fn a_stuck_round_names_its_stage() {
    for (stage, name) in [(1, "block second"), (4, "inject first"), (6, "choice of tokens")] {
        let record = [1, stage, 77, 6, 3, 4, 7, 0];
        let (model, draft) = kernels(&Arc::default());
        let device = FakeDevice::with_draft(model, draft).with_rounds(stuck_kernel(record));
        let mut engine =
            Engine::on_device(round_plan(SLICE_ROWS), Box::new(device), &EngineOptions::default()).unwrap();
        engine.step(&rows(0, 0, &[1]), &[]).unwrap();
        engine.inject(&[0]).unwrap();
        let block = BlockInput { token: 3, position: 1, sequence: 0, rows: 2, wanted: 1 };
        let input = RoundInput { block, left: 5, limit: 9 };
        let options = RoundOptions { rounds: 3, ..RoundOptions::default() };
        let error = engine.rounds(&[input], &[], options, &mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(
            matches!(&error, StepError::Stuck { stage, step: 2, .. } if stage == name),
            "{name}: {error:?}"
        );
        assert!(matches!(engine.step(&rows(0, 1, &[1]), &[]), Err(StepError::Poisoned { .. })));
    }
}

/// A kernel that ends without a round, with a token that is none, or with more than there are.
#[test]
fn rounds_that_cannot_be_are_the_kernels_fault() {
    let said = |words: &'static [(usize, u32)]| -> StepError {
        let (model, draft) = kernels(&Arc::default());
        let kernel: FakeKernel = Arc::new(move |args| {
            for (at, word) in words {
                // SAFETY: the engine keeps the words.
                unsafe { (*(args.chosen as *const AtomicU32).add(*at)).store(*word, Ordering::Release) };
            }
            Ok(())
        });
        let device = FakeDevice::with_draft(model, draft).with_rounds(kernel);
        let mut engine =
            Engine::on_device(round_plan(SLICE_ROWS), Box::new(device), &EngineOptions::default()).unwrap();
        engine.step(&rows(0, 0, &[1]), &[]).unwrap();
        engine.inject(&[0]).unwrap();
        let block = BlockInput { token: 3, position: 1, sequence: 0, rows: 3, wanted: 2 };
        let input = RoundInput { block, left: 5, limit: 9 };
        let options = RoundOptions { rounds: 3, ..RoundOptions::default() };
        let told = engine.rounds(&[input], &[], options, &mut |_| ControlFlow::Continue(()));
        told.unwrap_err()
    };
    for (words, problem) in [
        (&[][..], "without having finished a round"),
        (&[(0, 2), (LAUNCH_ROWS, 5)], "without having finished a round"),
        (&[(0, 4), (LAUNCH_ROWS, 5)], "with more tokens for row 0 of round 0"),
        (&[(0, 1), (LAUNCH_ROWS, 1000)], "with token 999 for row 0 of round 0"),
    ] {
        let error = said(words);
        assert!(matches!(&error, StepError::Kernel { problem: own } if own.contains(problem)), "{error:?}");
    }
    let broken = said(&[(0, 1), (LAUNCH_ROWS, tilec_ir::launch::BROKEN_LOGITS + 1)]);
    assert!(matches!(broken, StepError::Logits { row: 0, step: 0, .. }), "{broken:?}");
}
