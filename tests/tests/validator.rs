//! The schedule validator refuses every damaged schedule and accepts every one that is made.

use std::collections::BTreeMap;
use tilec_codegen::compile;
use tilec_codegen::passes::{fuse, schedule, tile};
use tilec_ir::schedule::{Instr, Program, Schedule, Share};
use tilec_ir::stages::{BufferId, Stage, StageAnchor, StagePiece, StageProgram};
use tilec_ir::validate::{Violation, validate};
use tilec_tests::Fixture;

const MODELS: &[&str] =
    &["hf/llama-gqa-tied", "hf/llama-odd", "hf/qwen3-gqa-tied", "gguf/llama-q4_0", "hf/qwen3-moe"];

fn stages(name: &str) -> StageProgram {
    let fixture = Fixture::open(name);
    let graph = compile::graph(&fixture.input(), &fixture.spec()).unwrap();
    let fused = fuse::fuse(&graph).unwrap();
    tile::tile(&fused, &tile::TileOptions { max_rows: 16, context: 64 }).unwrap()
}

#[test]
fn every_schedule_that_is_made_is_accepted() {
    for model in MODELS {
        let stages = stages(model);
        for workers in [1, 2, 3, 4, 7, 16, 33] {
            let schedule = schedule::schedule(&stages, workers);
            validate(&stages, &schedule)
                .unwrap_or_else(|violation| panic!("{model}, {workers}: {violation}"));
        }
    }
}

/// The instruction lists of a program, each with where it is.
fn lists(program: &mut Program) -> Vec<&mut Vec<Instr>> {
    let mut lists = vec![&mut program.before];
    lists.extend(program.bodies.iter_mut());
    lists.push(&mut program.after);
    lists
}

/// One change of one instruction list at one place; `None` if it does not apply there.
type Mutation = (&'static str, fn(&mut Vec<Instr>, usize) -> Option<()>);

const MUTATIONS: &[Mutation] = &[
    ("drop", |list, at| {
        list.remove(at);
        Some(())
    }),
    ("double", |list, at| {
        list.insert(at, list[at].clone());
        Some(())
    }),
    ("swap with the next", |list, at| {
        (at + 1 < list.len() && list[at] != list[at + 1]).then(|| list.swap(at, at + 1))
    }),
    ("count one more", |list, at| match &mut list[at] {
        Instr::Wait { count, .. } => {
            *count += 1;
            Some(())
        }
        _ => None,
    }),
    ("count one less", |list, at| match &mut list[at] {
        Instr::Wait { count, .. } => {
            *count -= 1;
            Some(())
        }
        _ => None,
    }),
    ("wait for the stage before", |list, at| match &mut list[at] {
        Instr::Wait { back, .. } => {
            *back += 1;
            Some(())
        }
        _ => None,
    }),
    ("wait for itself", |list, at| match &mut list[at] {
        Instr::Wait { back, .. } => {
            *back -= 1;
            Some(())
        }
        _ => None,
    }),
    ("signal another stage", |list, at| match &mut list[at] {
        Instr::Signal { stage } if *stage > 0 => {
            *stage -= 1;
            Some(())
        }
        _ => None,
    }),
    ("one tile more", |list, at| match &mut list[at] {
        Instr::Run { share: Share::Tiles(ranges), .. } => {
            ranges.first_mut()?.1.end += 1;
            Some(())
        }
        _ => None,
    }),
    ("one tile less", |list, at| match &mut list[at] {
        Instr::Run { share: Share::Tiles(ranges), .. } => {
            ranges.first_mut()?.1.start += 1;
            Some(())
        }
        _ => None,
    }),
    ("another share", |list, at| match &mut list[at] {
        Instr::Run { share: Share::Items { index, of }, .. } => {
            *index = (*index + 1) % *of;
            Some(())
        }
        _ => None,
    }),
    ("a share of more", |list, at| match &mut list[at] {
        Instr::Run { share: Share::Items { of, .. }, .. } => {
            *of += 1;
            Some(())
        }
        _ => None,
    }),
    ("run first, wait later", |list, at| match &list[at..] {
        [Instr::Wait { .. }, Instr::Run { .. }, Instr::Signal { .. }, ..] => {
            let wait = list.remove(at);
            list.insert(at + 2, wait);
            Some(())
        }
        _ => None,
    }),
];

fn kind(violation: &Violation) -> &'static str {
    match violation {
        Violation::Shape { .. } => "shape",
        Violation::Deadlock { .. } => "deadlock",
        Violation::Coverage { .. } => "coverage",
        Violation::Race { .. } => "race",
        Violation::Data { .. } => "data",
        Violation::Order { .. } => "order",
    }
}

#[test]
fn every_damaged_schedule_is_refused() {
    let mut refused: BTreeMap<&str, usize> = BTreeMap::new();
    for model in MODELS {
        let stages = stages(model);
        let good = schedule::schedule(&stages, 2);
        for worker in 0..2 {
            let mut count = good.clone();
            let lens: Vec<usize> = lists(&mut count.programs[worker]).iter().map(|list| list.len()).collect();
            for (list, len) in lens.iter().enumerate() {
                for at in 0..*len {
                    for (name, mutate) in MUTATIONS {
                        let mut bad = good.clone();
                        let target = lists(&mut bad.programs[worker]).swap_remove(list);
                        if mutate(target, at).is_none() {
                            continue;
                        }
                        match validate(&stages, &bad) {
                            Ok(()) => {
                                panic!("{model}: worker {worker}, list {list}, {at}: {name} is accepted")
                            }
                            Err(violation) => *refused.entry(kind(&violation)).or_default() += 1,
                        }
                    }
                }
            }
        }
    }
    println!("refused: {refused:?}");
    assert!(refused.values().sum::<usize>() >= 200, "{refused:?}");
    // Each way to be wrong is found as what it is, not only as a strange order.
    for kind in ["shape", "deadlock", "coverage", "race", "order"] {
        assert!(refused.get(kind).is_some_and(|count| *count >= 8), "{kind}: {refused:?}");
    }
}

fn each_stage(program: &mut StageProgram) -> Vec<&mut Stage> {
    let bodies = program.bodies.iter_mut().flat_map(|body| &mut body.stages);
    program.before.iter_mut().chain(bodies).chain(&mut program.after).collect()
}

/// Two buffers become one although both are in use, some stage stores into another buffer, or a stage
/// forgets to wait.
#[test]
fn reused_buffers_and_forgotten_waits_are_refused() {
    let mut refused = 0;
    for model in MODELS {
        let good = stages(model);
        let buffers = good.buffers.len() as u32;
        for (kept, lost) in (0..buffers).flat_map(|a| (0..buffers).map(move |b| (BufferId(a), BufferId(b)))) {
            let alike = |a: BufferId, b: BufferId| {
                let (a, b) = (good.buffer(a), good.buffer(b));
                (a.cols, a.elem) == (b.cols, b.elem)
            };
            if kept == lost || !alike(kept, lost) {
                continue;
            }
            let mut bad = good.clone();
            for stage in each_stage(&mut bad) {
                merge(stage, kept, lost);
            }
            // Tiling shares every buffer that can be shared, so no two of those left can be.
            let violation = validate(&bad, &schedule::schedule(&bad, 2));
            assert!(violation.is_err(), "{model}: buffers {kept:?} and {lost:?} may be one");
            refused += 1;
        }
        let count = each_stage(&mut good.clone()).len();
        for number in 0..count {
            for other in 0..buffers {
                let mut bad = good.clone();
                let stage = each_stage(&mut bad).swap_remove(number);
                let Some(StagePiece::Store(buffer)) = stage.parts[0].pieces.last_mut() else { continue };
                if *buffer == BufferId(other) {
                    continue;
                }
                *buffer = BufferId(other);
                let violation = validate(&bad, &schedule::schedule(&bad, 2));
                assert!(violation.is_err(), "{model}: stage {number} may store into buffer {other}");
                refused += 1;
            }
            let mut bad = good.clone();
            let stage = each_stage(&mut bad).swap_remove(number);
            if !stage.waits.is_empty() {
                stage.waits.clear();
                assert!(validate(&bad, &schedule::schedule(&bad, 2)).is_err(), "{model}: stage {number}");
                refused += 1;
            }
        }
    }
    println!("refused: {refused}");
    assert!(refused >= 50, "{refused}");
}

/// Every mention of a buffer becomes one of another.
fn merge(stage: &mut Stage, kept: BufferId, lost: BufferId) {
    let swap = |id: &mut BufferId| {
        if *id == lost {
            *id = kept;
        }
    };
    match &mut stage.anchor {
        StageAnchor::Rows { input, .. }
        | StageAnchor::Gemm { input }
        | StageAnchor::Route { input, .. }
        | StageAnchor::TopK { input, .. }
        | StageAnchor::Experts { input, .. }
        | StageAnchor::Attention { input, .. } => {
            swap(input);
        }
        StageAnchor::DynamicConv { input: one, kernel: other, .. }
        | StageAnchor::PairScores { candidates: one, hidden: other, .. } => {
            swap(one);
            swap(other);
        }
        StageAnchor::Taps { inputs } => inputs.iter_mut().for_each(swap),
        StageAnchor::Embed { .. } | StageAnchor::Input => {}
    }
    for piece in stage.parts.iter_mut().flat_map(|part| &mut part.pieces) {
        if let StagePiece::Residual(id) | StagePiece::Store(id) = piece {
            swap(id);
        }
    }
    stage.sources.iter_mut().for_each(|(id, _)| swap(id));
}

/// Two workers that run two stages in opposite orders and wait for each other never finish.
#[test]
fn cycles_are_deadlocks() {
    let stages = stages(MODELS[0]);
    let good = schedule::schedule(&stages, 2);
    let mut bad: Schedule = good.clone();
    let body = &mut bad.programs[1].bodies[0];
    // Worker 1 starts the layer's second stage before it has signalled the first.
    let second: Vec<Instr> = body.iter().filter(|i| stage_of(i) == 1).cloned().collect();
    body.retain(|instr| stage_of(instr) != 1);
    body.splice(0..0, second);
    assert!(matches!(validate(&stages, &bad), Err(Violation::Deadlock { .. })));
}

fn stage_of(instr: &Instr) -> usize {
    match instr {
        Instr::Wait { stage, .. } | Instr::Run { stage, .. } | Instr::Signal { stage } => *stage,
    }
}
