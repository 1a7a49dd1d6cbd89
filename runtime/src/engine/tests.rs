//! The engine on a toy model: its next token is the sum of all tokens in the context, which it
//! remembers in the cache's pages.

use super::*;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};
use tilec_ir::abi::{ABI_VERSION, KV_GROUP, KvLayout, KvType, StepArgs};
use tilec_ir::pack::Packing;
use tilec_ir::plan::{PLAN_VERSION, PlanFile, PlanLimits, PlanTarget};
use tilec_ir::stages::{Buffer, BufferElem};

pub const VOCAB: usize = 64;
pub const CONTEXT: usize = 48;
const LAYOUT: KvLayout =
    KvLayout { kv_type: KvType::F32, layers: 2, kv_heads: 2, qk_dim: 3, v_dim: 5, page_tokens: 16 };

/// A plan of the toy model: 2 sequences, 4 rows.
pub fn toy_plan(workers: usize) -> Plan {
    let logits = Buffer { name: "logits".into(), elem: BufferElem::F32, cols: VOCAB, rows: 4, offset: 128 };
    let plan = Plan {
        plan_version: PLAN_VERSION,
        abi_version: ABI_VERSION,
        name: "toy".into(),
        family: "toy".into(),
        graph_sha256: String::new(),
        tokenizer: None,
        weights: WeightsFrom::Synthetic {
            seed: 0,
            config: serde_json::Value::Null,
            tensors: Default::default(),
        },
        target: PlanTarget {
            device: "cpu".into(),
            arch: std::env::consts::ARCH.into(),
            cpu: String::new(),
            features: Vec::new(),
            workers,
        },
        limits: PlanLimits { max_rows: 4, sequences: 2, context: CONTEXT },
        vocab: VOCAB,
        buffers: vec![logits],
        logits: 0,
        scratch_bytes: 64,
        stages: vec!["write".into(), "sum".into()],
        kv: LAYOUT,
        packing: Packing::default(),
        costs: Vec::new(),
        code: PlanFile { file: "kernel.o".into(), sha256: String::new() },
        resident: None,
        shard: None,
        draft: None,
        texts: Vec::new(),
    };
    plan.verify().unwrap();
    plan
}

#[repr(align(64))]
struct NoWeights([u8; 64]);

impl AsRef<[u8]> for NoWeights {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// An engine on the toy model.
pub fn toy_engine(workers: usize, options: &EngineOptions) -> Engine {
    toy_engine_on(toy_plan(workers), options)
}

/// An engine on a plan of the toy model with other limits.
pub fn toy_engine_on(plan: Plan, options: &EngineOptions) -> Engine {
    let entry: Entry = match plan.target.workers {
        1 => toy::<1>,
        2 => toy::<2>,
        3 => toy::<3>,
        _ => unreachable!("the toy's workers are constants"),
    };
    // SAFETY: the toy keeps to its plan.
    unsafe { Engine::with_entry(plan, Box::new(NoWeights([0; 64])), entry, options) }.unwrap()
}

/// Where the toy keeps the token of a position: a lane of the last layer's last head.
///
/// # Safety
/// The arguments are those of a step, and the position has a page.
unsafe fn cell(args: &StepArgs, sequence: u32, position: u32) -> *mut f32 {
    let (page, lane) = (position as usize / 16, position as usize % 16);
    // SAFETY: the table has this entry, the cache this block and lane.
    unsafe {
        let page = *args.page_table.add(sequence as usize * args.pages_per_sequence as usize + page);
        assert!(page < args.kv_pages);
        let offset = LAYOUT.block_offset(args.kv_pages as usize, 1, page as usize, 1);
        let group = lane / KV_GROUP * KV_GROUP * LAYOUT.qk_dim;
        args.kv.add(offset).cast::<f32>().add(group + lane % KV_GROUP)
    }
}

extern "C" fn toy<const WORKERS: u32>(args: *const StepArgs, worker: u32) {
    // SAFETY: the engine keeps the arguments valid, and calls with as many workers.
    unsafe {
        let args = &*args;
        for row in (worker..args.rows).step_by(WORKERS as usize).map(|row| row as usize) {
            *cell(args, *args.sequences.add(row), *args.positions.add(row)) = *args.tokens.add(row) as f32;
        }
        // The hand-off between the two stages.
        let counter = &*args.counters.cast::<AtomicU32>();
        counter.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0;
        while counter.load(Ordering::Acquire) < WORKERS {
            spins += 1;
            if spins % 64 == 0 {
                (args.yield_now)();
            }
            assert!(spins < args.spin_limit);
        }
        fence(Ordering::SeqCst);
        for at in (worker..args.logit_rows).step_by(WORKERS as usize).map(|at| at as usize) {
            let row = *args.logit_index.add(at) as usize;
            let (sequence, position) = (*args.sequences.add(row), *args.positions.add(row));
            let sum: f32 = (0..=position).map(|position| *cell(args, sequence, position)).sum();
            let logits = args.arena.add(128).cast::<f32>().add(at * VOCAB);
            for token in 0..VOCAB {
                *logits.add(token) = if token == sum as usize % VOCAB { 1.0 } else { 0.0 };
            }
        }
        if !args.profile.is_null() {
            *args.profile.add(worker as usize * 2 * PROFILE_FIELDS) = 1 + u64::from(worker);
        }
    }
}

/// What the toy says after `tokens`.
pub fn toy_next(tokens: &[u32]) -> u32 {
    tokens.iter().sum::<u32>() % VOCAB as u32
}

fn rows(sequence: u32, start: u32, tokens: &[u32]) -> Vec<RowInput> {
    (start..).zip(tokens).map(|(position, token)| RowInput { token: *token, position, sequence }).collect()
}

fn best(logits: &[f32]) -> Vec<u32> {
    let best = |row: &[f32]| row.iter().position(|logit| *logit == 1.0).unwrap() as u32;
    logits.chunks_exact(VOCAB).map(best).collect()
}

#[test]
fn steps_of_mixed_sequences_see_their_own_history() {
    let mut engine = toy_engine(2, &EngineOptions::default());
    let first = [rows(1, 0, &[5, 7]), rows(0, 0, &[1])].concat();
    assert_eq!(best(engine.step(&first, &[0, 1, 2]).unwrap()), [5, 12, 1]);
    let second = [rows(0, 1, &[2, 3]), rows(1, 2, &[10])].concat();
    assert_eq!(best(engine.step(&second, &[1, 2]).unwrap()), [6, 22]);
    assert_eq!((engine.length(0), engine.length(1)), (3, 3));
    assert!(engine.step(&rows(0, 3, &[0]), &[]).unwrap().is_empty());
    // Going back forgets what came after.
    assert_eq!(best(engine.step(&rows(1, 1, &[1]), &[0]).unwrap()), [6]);
    assert_eq!(engine.length(1), 2);
    engine.reset(1);
    assert_eq!(best(engine.step(&rows(1, 0, &[9]), &[0]).unwrap()), [9]);
}

#[test]
fn a_sequence_crosses_pages_up_to_the_context() {
    let mut engine = toy_engine(1, &EngineOptions::default());
    let mut sum = 0;
    for position in 0..CONTEXT as u32 {
        sum += position;
        let token = best(engine.step(&rows(0, position, &[position]), &[0]).unwrap());
        assert_eq!(token, [sum % VOCAB as u32], "position {position}");
    }
    assert_eq!(engine.kv().free_pages(), 3);
    let memory = engine.memory();
    assert_eq!(memory.kv_used * 2, memory.kv);
    let error = engine.step(&rows(0, CONTEXT as u32, &[0]), &[]).unwrap_err();
    assert_eq!(error, StepError::Context { row: 0, position: CONTEXT as u32, context: CONTEXT });
}

#[test]
fn bad_steps_are_refused_without_effect() {
    let mut engine = toy_engine(1, &EngineOptions::default());
    engine.step(&rows(0, 0, &[1, 2]), &[]).unwrap();
    let row = |token, position, sequence| RowInput { token, position, sequence };
    let cases: Vec<(Vec<RowInput>, &[u32], StepError)> = vec![
        (vec![], &[], StepError::Rows { rows: 0, max: 4 }),
        (rows(0, 0, &[0; 5]), &[], StepError::Rows { rows: 5, max: 4 }),
        (vec![row(64, 2, 0)], &[], StepError::Token { row: 0, token: 64, vocab: VOCAB }),
        (vec![row(0, 0, 2)], &[], StepError::Sequence { row: 0, sequence: 2, sequences: 2 }),
        (vec![row(0, u32::MAX, 0)], &[], StepError::Context { row: 0, position: u32::MAX, context: CONTEXT }),
        (vec![row(0, 3, 0)], &[], StepError::Order { row: 0, position: 3, expected: 2 }),
        (vec![row(0, 2, 0), row(0, 2, 0)], &[], StepError::Order { row: 1, position: 2, expected: 3 }),
        (vec![row(0, 2, 0), row(0, 0, 1), row(0, 3, 0)], &[], StepError::Apart { row: 2, sequence: 0 }),
        (vec![row(0, 2, 0)], &[1], StepError::LogitOrder { rows: 1 }),
        (vec![row(0, 2, 0), row(0, 3, 0)], &[1, 0], StepError::LogitOrder { rows: 2 }),
        (vec![row(0, 2, 0)], &[0; 5], StepError::LogitRows { rows: 5, max: 4 }),
    ];
    for (rows, wanted, expected) in cases {
        assert_eq!(engine.step(&rows, wanted).unwrap_err(), expected);
    }
    assert_eq!((engine.length(0), engine.length(1)), (2, 0));
    assert_eq!(best(engine.step(&rows(0, 2, &[4]), &[0]).unwrap()), [7]);
}

#[test]
fn a_full_cache_is_an_error_that_leaves_the_engine_usable() {
    let mut engine = toy_engine(1, &EngineOptions { kv_pages: Some(1), ..Default::default() });
    engine.step(&rows(0, 0, &[1]), &[]).unwrap();
    let error = engine.step(&rows(1, 0, &[1]), &[]).unwrap_err();
    assert!(error.to_string().contains("KV cache is full"), "{error}");
    engine.reset(0);
    assert_eq!(best(engine.step(&rows(1, 0, &[3]), &[0]).unwrap()), [3]);
}

#[test]
fn many_steps_hand_over_without_a_hang() {
    for (workers, steps) in [(3, 10_000u32), (2, 10_000)] {
        let mut engine = toy_engine(workers, &EngineOptions::default());
        let start = Instant::now();
        for step in 0..steps {
            let position = step % CONTEXT as u32;
            if position == 0 {
                engine.reset(0);
            }
            let logits = engine.step(&rows(0, position, &[1]), &[0]).unwrap();
            assert_eq!(logits[(position as usize + 1) % VOCAB], 1.0);
        }
        assert!(start.elapsed() < Duration::from_secs(120), "{:?}", start.elapsed());
    }
}

#[test]
fn a_step_may_come_from_another_thread_each_time() {
    let mut engine = toy_engine(2, &EngineOptions { pin: true, ..Default::default() });
    for position in 0..8 {
        std::thread::scope(|scope| {
            scope.spawn(|| engine.step(&rows(0, position, &[1]), &[0]).map(|_| ()).unwrap());
        });
    }
    assert_eq!(engine.length(0), 8);
}

#[test]
fn a_stall_names_the_stage_and_the_engine_goes_on() {
    extern "C" fn stalls(args: *const StepArgs, worker: u32) {
        // SAFETY: the engine keeps the arguments valid; one worker alone writes.
        unsafe {
            let args = &*args;
            if worker == 1 && *args.tokens == 13 {
                for (at, value) in [1, 1, worker, 5].into_iter().enumerate() {
                    (*args.abort.add(at).cast::<AtomicU32>()).store(value, Ordering::Release);
                }
            }
        }
    }
    let options = EngineOptions::default();
    // SAFETY: the function returns on every worker and stays inside of the abort record.
    let engine = unsafe { Engine::with_entry(toy_plan(2), Box::new(NoWeights([0; 64])), stalls, &options) };
    let mut engine = engine.unwrap();
    let error = engine.step(&rows(0, 0, &[13]), &[]).unwrap_err();
    assert_eq!(error, StepError::Stalled { stage: "sum".into(), worker: 1, seen: 5, code: 1 });
    assert_eq!(engine.length(0), 0);
    engine.step(&rows(0, 0, &[12]), &[]).unwrap();
}

#[test]
fn the_profile_is_there_when_asked_for() {
    let mut engine = toy_engine(2, &EngineOptions { profile: true, ..Default::default() });
    engine.step(&rows(0, 0, &[1]), &[]).unwrap();
    let profile = engine.profile().unwrap();
    assert_eq!((profile.len(), profile[0], profile[2 * PROFILE_FIELDS]), (2 * 2 * PROFILE_FIELDS, 1, 2));
    assert!(toy_engine(1, &EngineOptions::default()).profile().is_none());
}

#[test]
fn weights_that_are_too_few_are_refused() {
    let mut plan = toy_plan(1);
    plan.packing.bytes = 65;
    let options = EngineOptions::default();
    // SAFETY: never called.
    let engine = unsafe { Engine::with_entry(plan, Box::new(NoWeights([0; 64])), toy::<1>, &options) };
    assert!(matches!(engine, Err(EngineError::Weights { have: 64, need: 65 })), "{engine:?}");
}
