//! Scheduling: which worker does which tiles, in which order.

use std::ops::Range;
use tilec_ir::schedule::{Instr, Program, Schedule, Share};
use tilec_ir::stages::{Items, Stage, StageProgram};

/// Divides the stages among `workers` workers.
///
/// Tiles are cut by weight bytes, part by part, each worker a contiguous run of each part: one piece
/// of its tape. Items that only a step knows (rows, heads) are cut evenly when it runs. Every worker
/// signals every stage, also one in which it has nothing to do, so that each wait counts to the
/// number of workers.
pub fn schedule(stages: &StageProgram, workers: usize) -> Schedule {
    let programs = (0..workers).map(|worker| {
        let list = |list: &[Stage]| program(list, worker, workers);
        Program {
            before: list(&stages.before),
            bodies: stages.bodies.iter().map(|body| list(&body.stages)).collect(),
            after: list(&stages.after),
        }
    });
    Schedule { programs: programs.collect() }
}

/// The instructions of one worker for a list of stages.
fn program(list: &[Stage], worker: usize, workers: usize) -> Vec<Instr> {
    let mut instrs = Vec::new();
    for (number, stage) in list.iter().enumerate() {
        for wait in &stage.waits {
            instrs.push(Instr::Wait { stage: number, back: wait.back, count: workers });
        }
        let share = match stage.items() {
            Items::Tiles => Share::Tiles(tile_shares(stage, workers).swap_remove(worker)),
            Items::Rows | Items::LogitRows | Items::HeadRows { .. } => {
                Share::Items { index: worker, of: workers }
            }
        };
        instrs.push(Instr::Run { stage: number, share });
        instrs.push(Instr::Signal { stage: number });
    }
    instrs
}

/// The tiles of each worker, by part.
fn tile_shares(stage: &Stage, workers: usize) -> Vec<Vec<(usize, Range<usize>)>> {
    let mut ranges: Vec<Vec<(usize, Range<usize>)>> = vec![Vec::new(); workers];
    let mut given = vec![0u64; workers];
    let mut through = 0u64;
    for (number, part) in stage.parts.iter().enumerate() {
        let tiles = part.tiles();
        let bytes = part.tile_bytes(0, tiles);
        through += bytes;
        let mut start = 0;
        let mut left = bytes;
        for worker in 0..workers {
            // Bring this worker up to an even share of all that is given by the end of this part,
            // corrected by what the workers behind it still lack.
            let lacking: u64 =
                (worker..workers).map(|other| (through / workers as u64).saturating_sub(given[other])).sum();
            let want = (through / workers as u64).saturating_sub(given[worker]);
            let take = if worker + 1 == workers || lacking == 0 {
                tiles - start
            } else {
                let share = left as f64 * want as f64 / lacking as f64;
                ((share / (bytes as f64 / tiles as f64)).round() as usize).min(tiles - start)
            };
            if take > 0 {
                let taken = part.tile_bytes(start, start + take);
                ranges[worker].push((number, start..start + take));
                given[worker] += taken;
                left -= taken;
                start += take;
            }
        }
    }
    ranges
}
