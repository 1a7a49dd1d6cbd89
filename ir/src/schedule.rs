//! The schedule: one program per worker (a thread, an SM), made of waits, shares of stages and
//! signals. Programs follow the shape of the stages: before the layers, a program for each body, and
//! after the layers.
//!
//! A stage owns one counter per place in the unrolled sequence. A worker adds 1 to it when its share
//! is done; a wait holds until the counter has the stated count. Counters start at 0 each step and
//! are never reset within it.

use crate::stages::{Items, Stage, StageProgram};
use std::fmt;
use std::ops::Range;

/// A worker's share of a stage.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Share {
    /// Tiles `tiles` of part `part`, for each entry.
    Tiles(Vec<(usize, Range<usize>)>),
    /// Items `n * index / of .. n * (index + 1) / of` of the step's `n` items.
    Items {
        /// Which share.
        index: usize,
        /// Of how many.
        of: usize,
    },
}

/// One instruction of a worker. Stages are named by their number in the list that the program
/// belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Instr {
    /// Holds until the counter of the stage `back` places before stage `stage` in the sequence has
    /// reached `count`.
    Wait {
        /// The stage that waits.
        stage: usize,
        /// Distance back.
        back: usize,
        /// Signals to wait for.
        count: usize,
    },
    /// Runs a share.
    Run {
        /// The stage.
        stage: usize,
        /// The share.
        share: Share,
    },
    /// Adds 1 to the stage's counter.
    Signal {
        /// The stage.
        stage: usize,
    },
}

/// The program of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Program {
    /// Before the layers.
    pub before: Vec<Instr>,
    /// For each body.
    pub bodies: Vec<Vec<Instr>>,
    /// After the layers.
    pub after: Vec<Instr>,
}

/// A part of a worker's weight tape: bytes that it streams in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapeSpan {
    /// Stage number in the unrolled sequence.
    pub stage: usize,
    /// Byte range in the packed weights.
    pub bytes: Range<u64>,
}

/// The schedule of a step.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Schedule {
    /// Programs by worker.
    pub programs: Vec<Program>,
}

impl Schedule {
    /// Workers.
    pub fn workers(&self) -> usize {
        self.programs.len()
    }

    /// The weights that a worker streams in a step, in order; of experts all that may be chosen.
    pub fn tape(&self, stages: &StageProgram, worker: usize) -> Vec<TapeSpan> {
        let program = &self.programs[worker];
        let mut tape = Vec::new();
        let mut add = |instrs: &[Instr], list: &[Stage], first: usize, offsets: &[u64]| {
            for instr in instrs {
                let Instr::Run { stage, share: Share::Tiles(ranges) } = instr else { continue };
                for (part, tiles) in ranges {
                    let part = &list[*stage].parts[*part];
                    let Some(weights) = part.weights else { continue };
                    let base = match weights.slot {
                        crate::stages::Slot::Fixed(offset) => offset,
                        crate::stages::Slot::Layer(slot) => offsets[slot],
                    };
                    let whole = part.tile_bytes(0, part.tiles());
                    for expert in 0..list[*stage].experts().unwrap_or(1) as u64 {
                        let start = base + expert * whole + part.tile_bytes(0, tiles.start);
                        let end = base + expert * whole + part.tile_bytes(0, tiles.end);
                        tape.push(TapeSpan { stage: first + stage, bytes: start..end });
                    }
                }
            }
        };
        add(&program.before, &stages.before, 0, &[]);
        let mut first = stages.before.len();
        for layer in &stages.layers {
            let body = &stages.bodies[layer.body].stages;
            add(&program.bodies[layer.body], body, first, &layer.offsets);
            first += body.len();
        }
        add(&program.after, &stages.after, first, &[]);
        tape
    }

    /// The text form.
    pub fn text(&self, stages: &StageProgram) -> String {
        Text { schedule: self, stages }.to_string()
    }
}

struct Text<'a> {
    schedule: &'a Schedule,
    stages: &'a StageProgram,
}

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (schedule, stages) = (self.schedule, self.stages);
        let all: usize = stages.sequence().len();
        writeln!(f, "schedule {:?} workers={} counters={all} {{", stages.name, schedule.workers())?;
        for (worker, program) in schedule.programs.iter().enumerate() {
            let bytes: u64 =
                schedule.tape(stages, worker).iter().map(|span| span.bytes.end - span.bytes.start).sum();
            writeln!(f, "  worker {worker} {{  # tape of {bytes} B")?;
            self.list(f, "    ", &program.before, &stages.before)?;
            for (number, instrs) in program.bodies.iter().enumerate() {
                let layers: Vec<String> = (0..stages.layers.len())
                    .filter(|layer| stages.layers[*layer].body == number)
                    .map(|layer| layer.to_string())
                    .collect();
                writeln!(f, "    for layer in [{}] {{", layers.join(" "))?;
                self.list(f, "      ", instrs, &stages.bodies[number].stages)?;
                writeln!(f, "    }}")?;
            }
            self.list(f, "    ", &program.after, &stages.after)?;
            writeln!(f, "  }}")?;
        }
        writeln!(f, "}}")
    }
}

impl Text<'_> {
    fn list(
        &self,
        f: &mut fmt::Formatter<'_>,
        indent: &str,
        instrs: &[Instr],
        list: &[Stage],
    ) -> fmt::Result {
        for instr in instrs {
            match instr {
                Instr::Wait { stage, back, count } => {
                    writeln!(f, "{indent}wait {} - {back} >= {count}", list[*stage].name)?;
                }
                Instr::Run { stage, share: Share::Items { index, of } } => {
                    let what = match list[*stage].items() {
                        Items::Rows => "rows",
                        Items::LogitRows => "logit rows",
                        Items::HeadRows { .. } => "kv heads x rows",
                        Items::Tiles => "tiles",
                    };
                    writeln!(f, "{indent}run {} {what} {index}/{of}", list[*stage].name)?;
                }
                Instr::Run { stage, share: Share::Tiles(ranges) } => {
                    let ranges: Vec<String> = ranges
                        .iter()
                        .map(|(part, tiles)| format!("part {part} tiles {}..{}", tiles.start, tiles.end))
                        .collect();
                    writeln!(f, "{indent}run {} {}", list[*stage].name, ranges.join(", "))?;
                }
                Instr::Signal { stage } => writeln!(f, "{indent}signal {}", list[*stage].name)?,
            }
        }
        Ok(())
    }
}
