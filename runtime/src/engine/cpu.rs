//! The engine's work on the processor: one native function, which every worker thread calls; inside of
//! it they meet at counters.

use super::error::{EngineError, StepError};
use super::team::{Panicked, Team};
use super::{EngineOptions, PROFILE_FIELDS, RowInput, Weights};
use crate::kv::{KvMemory, PageTable};
use crate::memory::{Breakdown, Region};
use crate::native::{Entry, NativeCode};
use std::sync::atomic::{AtomicU32, Ordering};
use tilec_ir::abi::{COUNTER_STRIDE, StepArgs};
use tilec_ir::plan::Plan;

/// Weights, memory and threads of a plan on the processor.
pub struct CpuEngine {
    weights: Weights,
    entry: Entry,
    /// Keeps what `entry` points at.
    code: Option<NativeCode>,
    kv: KvMemory,
    arena: Region,
    scratch: Region,
    /// A counter for every stage, then the abort record on a line of its own.
    counters: Region,
    /// `[workers][stages][PROFILE_FIELDS]` of `u64`.
    profile: Option<Region>,
    team: Team,
    spin_limit: u64,
    /// Columns of the rows, as the native code takes them.
    columns: [Vec<u32>; 3],
}

impl CpuEngine {
    /// An engine on a function, which `code` keeps if it is a plan's.
    ///
    /// # Safety
    /// `entry` must do what the plan and [`StepArgs`] promise: touch only the memory that they
    /// describe, and return on every worker.
    ///
    /// # Errors
    /// [`EngineError`] if weights are too few or not aligned, or memory or threads cannot be had.
    pub unsafe fn new(
        plan: &Plan,
        weights: Weights,
        entry: Entry,
        code: Option<NativeCode>,
        pages: usize,
        options: &EngineOptions,
    ) -> Result<CpuEngine, EngineError> {
        let bytes = (*weights).as_ref();
        if (bytes.len() as u64) < plan.packing.bytes || !bytes.as_ptr().addr().is_multiple_of(64) {
            return Err(EngineError::Weights { have: bytes.len() as u64, need: plan.packing.bytes });
        }
        let stages = plan.stages.len();
        let workers = plan.target.workers;
        let kv = KvMemory::new(plan.kv, pages)?;
        let arena = Region::zeroed("activations", Some(plan.arena_bytes()), "limits.rows")?;
        let scratch = workers.checked_mul(plan.scratch_bytes);
        let scratch = Region::zeroed("scratch of the workers", scratch, "target.threads or limits.rows")?;
        let counters = Region::zeroed("counters", Some((stages + 1) * COUNTER_STRIDE), "target.threads")?;
        let profile = if options.profile {
            let bytes = workers.checked_mul(stages).and_then(|n| n.checked_mul(PROFILE_FIELDS * 8));
            Some(Region::zeroed("profile", bytes, "target.threads")?)
        } else {
            None
        };
        if std::thread::available_parallelism().is_ok_and(|processors| processors.get() < workers) {
            tracing::warn!(workers, "the plan has more workers than this process has processors: slow");
        }
        let team =
            Team::new(workers, options.pin).map_err(|source| EngineError::Threads { workers, source })?;
        Ok(CpuEngine {
            weights,
            entry,
            code,
            kv,
            arena,
            scratch,
            counters,
            profile,
            team,
            spin_limit: options.spin_limit,
            columns: Default::default(),
        })
    }

    /// Zeroes pages of the KV cache.
    pub fn clear(&mut self, pages: &[u32]) {
        pages.iter().for_each(|page| self.kv.clear(*page));
    }

    /// Runs a step that was checked and has its pages; returns the logits `[logit_rows][vocab]`.
    ///
    /// # Errors
    /// [`StepError`] if a worker gives up waiting or panics.
    pub fn step(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        rows: &[RowInput],
        logit_rows: &[u32],
    ) -> Result<&[f32], StepError> {
        let [tokens, positions, sequences] = &mut self.columns;
        tokens.clear();
        tokens.extend(rows.iter().map(|row| row.token));
        positions.clear();
        positions.extend(rows.iter().map(|row| row.position));
        sequences.clear();
        sequences.extend(rows.iter().map(|row| row.sequence));

        self.counters.as_mut_slice().fill(0);
        let stages = plan.stages.len();
        let counters = self.counters.as_mut_ptr();
        let abort = counters.wrapping_add(stages * COUNTER_STRIDE).cast::<u32>();
        let args = Shared(StepArgs {
            rows: rows.len() as u32,
            logit_rows: logit_rows.len() as u32,
            pages_per_sequence: pages.pages_per_sequence() as u32,
            kv_pages: pages.pages() as u32,
            tokens: tokens.as_ptr(),
            positions: positions.as_ptr(),
            sequences: sequences.as_ptr(),
            logit_index: logit_rows.as_ptr(),
            page_table: pages.table().as_ptr(),
            weights: (*self.weights).as_ref().as_ptr(),
            kv: self.kv.region().as_mut_ptr(),
            arena: self.arena.as_mut_ptr(),
            scratch: self.scratch.as_mut_ptr(),
            counters,
            abort,
            profile: self.profile.as_mut().map_or(std::ptr::null_mut(), |map| map.as_mut_ptr().cast()),
            spin_limit: self.spin_limit,
            yield_now,
        });
        let entry = self.entry;
        let job = |worker: usize| {
            // SAFETY: the pointers are to memory of this engine, of the sizes that the plan says,
            // that nothing else uses until all workers have returned; the rows were checked against
            // the plan's limits, and their pages are there. `new`'s caller answers for the function.
            unsafe { entry(args.get(), worker as u32) }
        };
        self.team.run(&job).map_err(|Panicked(worker)| StepError::Panicked { worker })?;

        // SAFETY: a line of the region, aligned; workers write it as these atomics do.
        let abort: &[AtomicU32; 4] = unsafe { &*abort.cast() };
        let [code, stage, worker, seen] = abort.each_ref().map(|word| word.load(Ordering::Acquire));
        if code != 0 {
            let name = plan.stages.get(stage as usize);
            let stage = name.map_or_else(|| format!("number {stage}"), Clone::clone);
            return Err(StepError::Stalled { stage, worker, seen, code });
        }
        let logits = plan.buffers[plan.logits].offset;
        let bytes = logit_rows.len() * plan.vocab * 4;
        Ok(bytemuck::cast_slice(&self.arena.as_slice()[logits..logits + bytes]))
    }

    /// Times of the last step, in ticks of the processor's time-stamp counter.
    pub fn profile(&self) -> Option<&[u64]> {
        self.profile.as_ref().map(|region| bytemuck::cast_slice(region.as_slice()))
    }

    /// What the memory is for, but for the pages that are in use.
    pub fn memory(&self) -> Breakdown {
        Breakdown {
            weights: (*self.weights).as_ref().len() as u64,
            kv: self.kv.bytes() as u64,
            kv_used: 0,
            arena: self.arena.len() as u64,
            scratch: self.scratch.len() as u64,
            code: self.code.as_ref().map_or(0, |code| code.bytes() as u64),
        }
    }
}

/// Arguments that all workers see.
struct Shared(StepArgs);

// SAFETY: workers share the structure itself only for reading; what its pointers lead to is shared
// as the schedule says, with counters between writers and readers.
unsafe impl Sync for Shared {}

impl Shared {
    fn get(&self) -> *const StepArgs {
        &self.0
    }
}

extern "C" fn yield_now() {
    std::thread::yield_now();
}
