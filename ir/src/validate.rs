//! The schedule validator: proves, for one schedule, that it cannot hang, that every tile runs once,
//! and that every access to shared memory comes behind the accesses it depends on.
//!
//! The schedule is unrolled and run once, greedily. Waits only ever hold until a counter is high
//! enough and counters only rise, so what the greedy run can do, every run can do: if it gets stuck,
//! so does every run. On the way each worker carries a vector clock; a wait for all of a stage's
//! signals joins the clocks of those who signalled. A wait for fewer may be passed before any
//! particular one of them, so it orders nothing.

use crate::schedule::{Instr, Schedule, Share};
use crate::stages::{BufferId, Extent, Items, Place, Stage, StageAt, StagePiece, StageProgram};
use std::collections::HashMap;
use std::fmt;

/// Why a schedule must not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A program names stages or bodies that do not exist, or has a list too few.
    Shape {
        /// The worker.
        worker: usize,
        /// What is wrong.
        what: String,
    },
    /// A worker waits for something that never comes.
    Deadlock {
        /// The worker.
        worker: usize,
        /// The stage that it cannot start.
        stage: String,
        /// The stage that it waits for.
        waits_for: String,
        /// Signals that come.
        signals: usize,
        /// Signals that it wants.
        count: usize,
    },
    /// Tiles or items of a stage run twice or never.
    Coverage {
        /// The stage.
        stage: String,
        /// Which.
        what: String,
    },
    /// An access is not ordered behind one that it depends on.
    Race {
        /// The stage that must come first.
        first: String,
        /// Its worker.
        first_worker: usize,
        /// The stage that must come behind it.
        second: String,
        /// Its worker.
        second_worker: usize,
        /// What both touch.
        place: String,
    },
    /// A stage reads what nothing has written, writes what nobody reads, or overwrites what its own
    /// tiles still read.
    Data {
        /// The stage.
        stage: String,
        /// What is wrong.
        what: String,
    },
    /// The instructions of a stage are not its waits, its share and its signal, once each in this
    /// order: harmless for the data, but not what the compiler meant.
    Order {
        /// The worker.
        worker: usize,
        /// The stage.
        stage: String,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Shape { worker, what } => write!(f, "worker {worker}: {what}"),
            Violation::Deadlock { worker, stage, waits_for, signals, count } => write!(
                f,
                "deadlock: worker {worker} waits before {stage} for {count} signals of {waits_for}, \
                 of which {signals} can come"
            ),
            Violation::Coverage { stage, what } => write!(f, "{stage}: {what}"),
            Violation::Race { first, first_worker, second, second_worker, place } => write!(
                f,
                "race: {second} on worker {second_worker} touches {place} without waiting for {first} \
                 on worker {first_worker}"
            ),
            Violation::Data { stage, what } => write!(f, "{stage}: {what}"),
            Violation::Order { worker, stage } => write!(
                f,
                "worker {worker}: {stage} is not its waits, its share and its signal, once each in order"
            ),
        }
    }
}

impl std::error::Error for Violation {}

/// An instruction in the unrolled sequence.
struct Event<'s> {
    /// Stage number in the sequence.
    stage: usize,
    instr: &'s Instr,
}

/// A share that has run.
struct Ran {
    worker: usize,
    /// Its number among the worker's events.
    time: usize,
    /// What the worker knew to be done, by worker: events before this number.
    clock: Vec<usize>,
}

/// Checks a schedule.
///
/// # Errors
/// The first [`Violation`] found.
pub fn validate(stages: &StageProgram, schedule: &Schedule) -> Result<(), Violation> {
    let sequence = stages.sequence();
    if schedule.programs.is_empty() {
        return Err(Violation::Shape { worker: 0, what: "there are no workers".into() });
    }
    let events = (0..schedule.workers())
        .map(|worker| unroll(stages, schedule, &sequence, worker))
        .collect::<Result<Vec<_>, _>>()?;
    let ran = run(&sequence, &events)?;
    for at in &sequence {
        coverage(at, &events)?;
    }
    data(stages, &sequence, &ran)?;
    for (worker, events) in events.iter().enumerate() {
        order(worker, &sequence, events)?;
    }
    Ok(())
}

fn unroll<'s>(
    stages: &StageProgram,
    schedule: &'s Schedule,
    sequence: &[StageAt<'_>],
    worker: usize,
) -> Result<Vec<Event<'s>>, Violation> {
    let program = &schedule.programs[worker];
    let shape = |what: String| Violation::Shape { worker, what };
    if program.bodies.len() != stages.bodies.len() {
        return Err(shape(format!("has {} bodies, not {}", program.bodies.len(), stages.bodies.len())));
    }
    let mut events = Vec::new();
    let mut add = |instrs: &'s [Instr], list: &[Stage], first: usize| -> Result<(), Violation> {
        for instr in instrs {
            let (Instr::Wait { stage, .. } | Instr::Run { stage, .. } | Instr::Signal { stage }) = instr;
            if *stage >= list.len() {
                return Err(shape(format!("names stage {stage} of {}", list.len())));
            }
            let stage = first + stage;
            if let Instr::Wait { back, .. } = instr
                && (*back == 0 || *back > stage)
            {
                let name = sequence[stage].name();
                return Err(shape(format!("{name} waits {back} stages back, of {stage}")));
            }
            events.push(Event { stage, instr });
        }
        Ok(())
    };
    add(&program.before, &stages.before, 0)?;
    let mut first = stages.before.len();
    for layer in &stages.layers {
        let body = &stages.bodies[layer.body].stages;
        add(&program.bodies[layer.body], body, first)?;
        first += body.len();
    }
    add(&program.after, &stages.after, first)?;
    Ok(events)
}

/// Runs the events greedily; the shares of each stage as they ran.
fn run(sequence: &[StageAt<'_>], events: &[Vec<Event<'_>>]) -> Result<Vec<Vec<Ran>>, Violation> {
    let workers = events.len();
    let mut total = vec![0usize; sequence.len()];
    for event in events.iter().flatten() {
        if matches!(event.instr, Instr::Signal { .. }) {
            total[event.stage] += 1;
        }
    }
    let mut at = vec![0usize; workers];
    let mut clock = vec![vec![0usize; workers]; workers];
    let mut signals: Vec<(usize, Vec<usize>)> = vec![(0, vec![0; workers]); sequence.len()];
    let mut ran: Vec<Vec<Ran>> = (0..sequence.len()).map(|_| Vec::new()).collect();
    loop {
        let mut moved = false;
        for worker in 0..workers {
            while let Some(event) = events[worker].get(at[worker]) {
                match event.instr {
                    Instr::Wait { back, count, .. } => {
                        let (seen, known) = &signals[event.stage - back];
                        if seen < count {
                            break;
                        }
                        if *count == total[event.stage - back] {
                            join(&mut clock[worker], known);
                        }
                    }
                    Instr::Run { .. } => {
                        ran[event.stage].push(Ran { worker, time: at[worker], clock: clock[worker].clone() });
                    }
                    Instr::Signal { .. } => {
                        clock[worker][worker] = at[worker] + 1;
                        let (seen, known) = &mut signals[event.stage];
                        *seen += 1;
                        join(known, &clock[worker]);
                    }
                }
                at[worker] += 1;
                clock[worker][worker] = at[worker];
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    for (worker, events) in events.iter().enumerate() {
        if let Some(Event { stage, instr: Instr::Wait { back, count, .. } }) = events.get(at[worker]) {
            return Err(Violation::Deadlock {
                worker,
                stage: sequence[*stage].name(),
                waits_for: sequence[stage - back].name(),
                signals: signals[stage - back].0,
                count: *count,
            });
        }
    }
    Ok(ran)
}

fn join(into: &mut [usize], other: &[usize]) {
    for (a, b) in into.iter_mut().zip(other) {
        *a = (*a).max(*b);
    }
}

/// Every tile of every part, or every share of the items, exactly once.
fn coverage(at: &StageAt<'_>, events: &[Vec<Event<'_>>]) -> Result<(), Violation> {
    let fail = |what: String| Err(Violation::Coverage { stage: at.name(), what });
    let shares = events.iter().flatten().filter(|event| event.stage == at.number).filter_map(|event| {
        match event.instr {
            Instr::Run { share, .. } => Some(share),
            _ => None,
        }
    });
    if at.stage.items() == Items::Tiles {
        let mut runs: Vec<Vec<usize>> = at.stage.parts.iter().map(|part| vec![0; part.tiles()]).collect();
        for share in shares {
            let Share::Tiles(ranges) = share else { return fail("is shared by items, but has tiles".into()) };
            for (part, tiles) in ranges {
                for tile in tiles.clone() {
                    match runs.get_mut(*part).and_then(|part| part.get_mut(tile)) {
                        Some(count) => *count += 1,
                        None => return fail(format!("part {part} has no tile {tile}")),
                    }
                }
            }
        }
        for (part, tiles) in runs.iter().enumerate() {
            if let Some(tile) = tiles.iter().position(|count| *count != 1) {
                return fail(format!("tile {tile} of part {part} runs {} times", tiles[tile]));
            }
        }
    } else {
        let mut runs: Option<Vec<usize>> = None;
        for share in shares {
            let Share::Items { index, of } = share else {
                return fail("is shared by tiles, but has items".into());
            };
            let runs = runs.get_or_insert_with(|| vec![0; *of]);
            if runs.len() != *of || index >= of {
                return fail(format!("share {index} of {of} among shares of {}", runs.len()));
            }
            runs[*index] += 1;
        }
        match runs {
            Some(runs) if runs.iter().all(|count| *count == 1) => {}
            _ => return fail("the items' shares do not run once each".into()),
        }
    }
    Ok(())
}

/// A place in one layer's cache, or a buffer.
type Key = (Place, Option<usize>);

/// Every read behind the last write before it, every write behind that and the reads since.
fn data(stages: &StageProgram, sequence: &[StageAt<'_>], ran: &[Vec<Ran>]) -> Result<(), Violation> {
    let mut last_write: HashMap<Key, usize> = HashMap::new();
    let mut reads_since: HashMap<Key, Vec<usize>> = HashMap::new();
    for at in sequence {
        let key = |place: Place| (place, at.layer.filter(|_| place == Place::Cache));
        let (reads, writes) = (at.stage.reads(), at.stage.writes());
        for (place, extent) in &reads {
            let overwritten = writes.iter().any(|(written, own)| {
                written == place && (*extent == Extent::Whole || *own == Extent::Whole)
            });
            if overwritten {
                let what = format!("overwrites {} while its other tiles read it", name(stages, key(*place)));
                return Err(Violation::Data { stage: at.name(), what });
            }
            if let Place::Buffer(buffer) = place {
                meant(stages, sequence, at, *buffer, last_write.get(&key(*place)).copied())?;
            }
            match last_write.get(&key(*place)) {
                Some(writer) => ordered(stages, sequence, ran, *writer, at.number, key(*place))?,
                None => {
                    let what = format!("reads {}, which nothing has written", name(stages, key(*place)));
                    return Err(Violation::Data { stage: at.name(), what });
                }
            }
        }
        for (place, _) in &writes {
            let read = reads_since.contains_key(&key(*place)) || reads.iter().any(|(read, _)| read == place);
            if matches!(place, Place::Buffer(_)) && last_write.contains_key(&key(*place)) && !read {
                let what = format!("overwrites {}, which nobody has read", name(stages, key(*place)));
                return Err(Violation::Data { stage: at.name(), what });
            }
            for reader in reads_since.get(&key(*place)).into_iter().flatten() {
                ordered(stages, sequence, ran, *reader, at.number, key(*place))?;
            }
            if let Some(writer) = last_write.get(&key(*place)) {
                ordered(stages, sequence, ran, *writer, at.number, key(*place))?;
            }
        }
        for (place, _) in reads {
            reads_since.entry(key(place)).or_default().push(at.number);
        }
        for (place, _) in writes {
            last_write.insert(key(place), at.number);
            reads_since.remove(&key(place));
        }
        fits(stages, at)?;
    }
    let unread = last_write.iter().filter(|(key, _)| !reads_since.contains_key(key)).find(
        |((place, _), _)| match place {
            Place::Buffer(id) => {
                let results = [stages.logits, stages.taps, stages.pairs.map(|(_, scores)| scores)];
                !results.contains(&Some(*id))
            }
            Place::Cache => false,
        },
    );
    match unread {
        Some((key, writer)) => Err(Violation::Data {
            stage: sequence[*writer].name(),
            what: format!("writes {}, which nobody reads", name(stages, *key)),
        }),
        None => Ok(()),
    }
}

/// What a stage reads is what the stage wrote that it means to read.
fn meant(
    stages: &StageProgram,
    sequence: &[StageAt<'_>],
    at: &StageAt<'_>,
    buffer: BufferId,
    writer: Option<usize>,
) -> Result<(), Violation> {
    let meant: Vec<Option<usize>> = at
        .stage
        .sources
        .iter()
        .filter(|(id, _)| *id == buffer)
        .map(|(_, back)| at.number.checked_sub(*back))
        .collect();
    if !meant.is_empty() && meant.iter().all(|number| *number == writer) {
        return Ok(());
    }
    let of = |number: Option<usize>| number.map_or("nobody".into(), |number| sequence[number].name());
    let meant: Vec<String> = meant.into_iter().map(of).collect();
    let what = format!(
        "reads {} as {} wrote it, and means that of [{}]",
        name(stages, (Place::Buffer(buffer), None)),
        of(writer),
        meant.join(", ")
    );
    Err(Violation::Data { stage: at.name(), what })
}

/// Stored columns fit their buffers.
fn fits(stages: &StageProgram, at: &StageAt<'_>) -> Result<(), Violation> {
    for part in &at.stage.parts {
        if let Some(StagePiece::Store(buffer)) = part.pieces.last()
            && stages.buffer(*buffer).cols != part.cols
        {
            let buffer = stages.buffer(*buffer);
            let what = format!("stores {} columns into {} of {}", part.cols, buffer.name, buffer.cols);
            return Err(Violation::Data { stage: at.name(), what });
        }
    }
    Ok(())
}

fn name(stages: &StageProgram, (place, layer): Key) -> String {
    match place {
        Place::Buffer(id) => format!("buffer {}", stages.buffer(id).name),
        Place::Cache => format!("the cache of layer {}", layer.unwrap_or(0)),
    }
}

/// Every share of stage `first` is done before any share of stage `second` starts.
fn ordered(
    stages: &StageProgram,
    sequence: &[StageAt<'_>],
    ran: &[Vec<Ran>],
    first: usize,
    second: usize,
    place: Key,
) -> Result<(), Violation> {
    for later in &ran[second] {
        for earlier in &ran[first] {
            let known = if earlier.worker == later.worker {
                earlier.time < later.time
            } else {
                earlier.time < later.clock[earlier.worker]
            };
            if !known {
                return Err(Violation::Race {
                    first: sequence[first].name(),
                    first_worker: earlier.worker,
                    second: sequence[second].name(),
                    second_worker: later.worker,
                    place: name(stages, place),
                });
            }
        }
    }
    Ok(())
}

/// Stage by stage: its waits, its share, its signal.
fn order(worker: usize, sequence: &[StageAt<'_>], events: &[Event<'_>]) -> Result<(), Violation> {
    let mut rest = events;
    for at in sequence {
        let own = rest.iter().take_while(|event| event.stage == at.number).count();
        let (mine, after) = rest.split_at(own);
        rest = after;
        let waits = at.stage.waits.len();
        let fits = mine.len() == waits + 2
            && mine
                .iter()
                .zip(&at.stage.waits)
                .all(|(event, wait)| matches!(event.instr, Instr::Wait { back, .. } if *back == wait.back))
            && matches!(mine[waits].instr, Instr::Run { .. })
            && matches!(mine[waits + 1].instr, Instr::Signal { .. });
        if !fits {
            return Err(Violation::Order { worker, stage: at.name() });
        }
    }
    Ok(())
}
