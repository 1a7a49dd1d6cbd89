//! The engine's work on the processor: native functions, which every worker thread calls; inside of them
//! they meet at counters.

use super::error::{EngineError, StepError};
use super::proposal::Pairs;
use super::team::{Panicked, Team};
use super::{EngineOptions, PROFILE_FIELDS, RowInput, Weights};
use crate::kv::{KvMemory, PageTable};
use crate::memory::{Breakdown, Region};
use crate::native::{Entry, NativeCode};
use std::sync::atomic::{AtomicU32, Ordering};
use tilec_ir::abi::{COUNTER_STRIDE, StepArgs};
use tilec_ir::plan::{DraftPlan, Plan, ProgramPlan};
use tilec_ir::stages::Buffer;

/// Weights, memory and threads of a plan on the processor.
pub struct CpuEngine {
    weights: Weights,
    kv: KvMemory,
    program: Program,
    draft: Option<CpuDraft>,
    /// `[workers][stages][PROFILE_FIELDS]` of `u64`.
    profile: Option<Region>,
    team: Team,
    spin_limit: u64,
    rows: Columns,
}

/// The programs of a draft and the cache that they share.
struct CpuDraft {
    kv: KvMemory,
    inject: Program,
    block: Program,
}

/// A native function with the memory that is its own.
struct Program {
    entry: Entry,
    /// Keeps what `entry` points at.
    code: Option<NativeCode>,
    arena: Region,
    scratch: Region,
    /// A counter for every stage, then the abort record on a line of its own.
    counters: Region,
}

/// Columns of the rows, as the native code takes them.
#[derive(Default)]
struct Columns {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<u32>,
    ends: Vec<u32>,
}

impl Columns {
    fn set(&mut self, rows: &[RowInput]) {
        self.tokens.clear();
        self.tokens.extend(rows.iter().map(|row| row.token));
        self.positions.clear();
        self.positions.extend(rows.iter().map(|row| row.position));
        self.sequences.clear();
        self.sequences.extend(rows.iter().map(|row| row.sequence));
        self.ends.clear();
        // Rows of a sequence are adjacent and ascending.
        for group in rows.chunk_by(|a, b| a.sequence == b.sequence) {
            self.ends.extend(group.iter().map(|_| group[group.len() - 1].position));
        }
    }
}

impl Program {
    fn new(
        entry: Entry,
        code: Option<NativeCode>,
        workers: usize,
        arena_bytes: usize,
        scratch_bytes: usize,
        stages: usize,
    ) -> Result<Program, EngineError> {
        let scratch = workers.checked_mul(scratch_bytes);
        Ok(Program {
            entry,
            code,
            arena: Region::zeroed("activations", Some(arena_bytes), "limits.rows")?,
            scratch: Region::zeroed("scratch of the workers", scratch, "target.threads or limits.rows")?,
            counters: Region::zeroed("counters", Some((stages + 1) * COUNTER_STRIDE), "target.threads")?,
        })
    }

    fn of_plan(plan: &ProgramPlan, code: NativeCode, workers: usize) -> Result<Program, EngineError> {
        let entry = code.entry().expect("loaded code has its entry: `load` checks");
        let (arena, scratch, stages) = (plan.arena_bytes(), plan.scratch_bytes, plan.stages.len());
        Program::new(entry, Some(code), workers, arena, scratch, stages)
    }

    /// Values of a float32 buffer: its first `rows` rows.
    fn floats(&self, buffer: &Buffer, rows: usize) -> &[f32] {
        let bytes = rows * buffer.cols * 4;
        bytemuck::cast_slice(&self.arena.as_slice()[buffer.offset..][..bytes])
    }
}

/// What a run of a program borrows from the engine.
struct Run<'a> {
    team: &'a mut Team,
    weights: &'a Weights,
    rows: &'a Columns,
    pages: &'a PageTable,
    spin_limit: u64,
}

impl Run<'_> {
    /// Runs a program on the rows; `stages` are its stages' names.
    ///
    /// # Errors
    /// [`StepError`] if a worker gives up waiting or panics.
    fn run(
        &mut self,
        program: &mut Program,
        kv: &mut KvMemory,
        logit_rows: &[u32],
        profile: Option<&mut Region>,
        stages: &[String],
    ) -> Result<(), StepError> {
        program.counters.as_mut_slice().fill(0);
        let counters = program.counters.as_mut_ptr();
        let abort = counters.wrapping_add(stages.len() * COUNTER_STRIDE).cast::<u32>();
        let rows = self.rows;
        let args = Shared(StepArgs {
            rows: rows.tokens.len() as u32,
            logit_rows: logit_rows.len() as u32,
            pages_per_sequence: self.pages.pages_per_sequence() as u32,
            kv_pages: self.pages.pages() as u32,
            tokens: rows.tokens.as_ptr(),
            positions: rows.positions.as_ptr(),
            sequences: rows.sequences.as_ptr(),
            ends: rows.ends.as_ptr(),
            logit_index: logit_rows.as_ptr(),
            page_table: self.pages.table().as_ptr(),
            weights: (**self.weights).as_ref().as_ptr(),
            kv: kv.region().as_mut_ptr(),
            arena: program.arena.as_mut_ptr(),
            scratch: program.scratch.as_mut_ptr(),
            counters,
            abort,
            profile: profile.map_or(std::ptr::null_mut(), |map| map.as_mut_ptr().cast()),
            spin_limit: self.spin_limit,
            yield_now,
        });
        let entry = program.entry;
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
            let name = stages.get(stage as usize);
            let stage = name.map_or_else(|| format!("number {stage}"), Clone::clone);
            return Err(StepError::Stalled { stage, worker, seen, code });
        }
        Ok(())
    }
}

impl CpuEngine {
    /// An engine on a function, which `code` keeps if it is a plan's. `draft` has the code of the plan's
    /// draft, if it is to run: that which injects, and that of a block.
    ///
    /// # Safety
    /// `entry` and the entries of `draft` must do what the plan and [`StepArgs`] promise: touch only the
    /// memory that they describe, and return on every worker.
    ///
    /// # Errors
    /// [`EngineError`] if weights are too few or not aligned, or memory or threads cannot be had.
    pub unsafe fn new(
        plan: &Plan,
        weights: Weights,
        entry: Entry,
        code: Option<NativeCode>,
        draft: Option<[NativeCode; 2]>,
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
        let program = Program::new(entry, code, workers, plan.arena_bytes(), plan.scratch_bytes, stages)?;
        let draft = match (&plan.draft, draft) {
            (Some(draft), Some([inject, block])) => Some(CpuDraft {
                kv: KvMemory::new(draft.kv, pages)?,
                inject: Program::of_plan(&draft.inject, inject, workers)?,
                block: Program::of_plan(&draft.block_pass, block, workers)?,
            }),
            _ => None,
        };
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
            kv,
            program,
            draft,
            profile,
            team,
            spin_limit: options.spin_limit,
            rows: Columns::default(),
        })
    }

    /// Zeroes pages of the KV caches.
    pub fn clear(&mut self, pages: &[u32]) {
        pages.iter().for_each(|page| self.kv.clear(*page));
        if let Some(draft) = &mut self.draft {
            pages.iter().for_each(|page| draft.kv.clear(*page));
        }
    }

    /// Fills pages of the KV caches with numbers that no token made, from -1 to 1.
    pub fn fill(&mut self, pages: &[u32]) {
        pages.iter().for_each(|page| self.kv.fill(*page));
        if let Some(draft) = &mut self.draft {
            pages.iter().for_each(|page| draft.kv.fill(*page));
        }
    }

    /// Whether the plan's draft was loaded.
    pub fn has_draft(&self) -> bool {
        self.draft.is_some()
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
        self.rows.set(rows);
        let CpuEngine { team, weights, rows, spin_limit, program, kv, profile, .. } = self;
        let mut run = Run { team, weights, rows, pages, spin_limit: *spin_limit };
        run.run(program, kv, logit_rows, profile.as_mut(), &plan.stages)?;
        Ok(self.program.floats(&plan.buffers[plan.logits], logit_rows.len()))
    }

    /// Fills the draft's cache at the positions of `rows`, of which `chosen` has the numbers in the last
    /// step.
    ///
    /// # Errors
    /// [`StepError`] if there is no draft, or a worker gives up waiting or panics.
    pub fn inject(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        rows: &[RowInput],
        chosen: &[u32],
    ) -> Result<(), StepError> {
        let (Some(plan_draft), Some(draft)) = (&plan.draft, &mut self.draft) else {
            return Err(StepError::NoDraft);
        };
        // A plan for the processor names the buffer: `verify` checks.
        let Some(input) = plan_draft.input else { return Err(StepError::NoDraft) };
        let (taps, input) = (&plan.buffers[plan_draft.taps_buffer], &plan_draft.inject.buffers[input]);
        let bytes = taps.cols * 4;
        let from = &self.program.arena.as_slice()[taps.offset..];
        let to = &mut draft.inject.arena.as_mut_slice()[input.offset..];
        for (row, to) in chosen.iter().zip(to.chunks_exact_mut(bytes)) {
            to.copy_from_slice(&from[*row as usize * bytes..][..bytes]);
        }
        self.rows.set(rows);
        let CpuEngine { team, weights, rows, spin_limit, .. } = self;
        let mut run = Run { team, weights, rows, pages, spin_limit: *spin_limit };
        let Some(draft) = &mut self.draft else { return Err(StepError::NoDraft) };
        run.run(&mut draft.inject, &mut draft.kv, &[], None, &plan_draft.inject.stages)
    }

    /// Runs blocks of the draft that were checked and have their pages; returns the logits
    /// `[logit_rows][vocab]`.
    ///
    /// # Errors
    /// [`StepError`] if a worker gives up waiting or panics.
    pub fn block(
        &mut self,
        draft_plan: &DraftPlan,
        pages: &PageTable,
        rows: &[RowInput],
        logit_rows: &[u32],
    ) -> Result<&[f32], StepError> {
        self.rows.set(rows);
        let CpuEngine { team, weights, rows, spin_limit, .. } = self;
        let mut run = Run { team, weights, rows, pages, spin_limit: *spin_limit };
        let Some(draft) = &mut self.draft else { return Err(StepError::NoDraft) };
        run.run(&mut draft.block, &mut draft.kv, logit_rows, None, &draft_plan.block_pass.stages)?;
        Ok(draft.block.floats(&draft_plan.block_pass.buffers[draft_plan.logits], logit_rows.len()))
    }

    /// What the last pass of blocks said of its `guesses` guesses: the logits `[guesses][vocab]`, and
    /// candidates if the draft chooses among them.
    ///
    /// # Errors
    /// [`StepError`] if there is no draft.
    pub fn proposals(
        &self,
        draft_plan: &DraftPlan,
        guesses: usize,
    ) -> Result<(&[f32], Option<Pairs<'_>>), StepError> {
        let block = &self.draft.as_ref().ok_or(StepError::NoDraft)?.block;
        let buffers = &draft_plan.block_pass.buffers;
        let pairs = draft_plan.selector.map(|selector| {
            let candidates = &buffers[selector.candidates];
            let k = candidates.cols;
            let tokens = &block.arena.as_slice()[candidates.offset..][..guesses * k * 4];
            let scores = block.floats(&buffers[selector.scores], guesses);
            Pairs { k, tokens: bytemuck::cast_slice(tokens), scores }
        });
        Ok((block.floats(&buffers[draft_plan.logits], guesses), pairs))
    }

    /// Times of the last step, in ticks of the processor's time-stamp counter.
    pub fn profile(&self) -> Option<&[u64]> {
        self.profile.as_ref().map(|region| bytemuck::cast_slice(region.as_slice()))
    }

    /// What the memory is for, but for the pages that are in use.
    pub fn memory(&self) -> Breakdown {
        let draft = self.draft.iter().flat_map(|draft| [&draft.inject, &draft.block]);
        let programs = || std::iter::once(&self.program).chain(draft.clone());
        let draft_kv = self.draft.as_ref().map_or(0, |draft| draft.kv.bytes());
        Breakdown {
            weights: (*self.weights).as_ref().len() as u64,
            kv: (self.kv.bytes() + draft_kv) as u64,
            kv_used: 0,
            arena: programs().map(|program| program.arena.len() as u64).sum(),
            scratch: programs().map(|program| program.scratch.len() as u64).sum(),
            code: programs()
                .filter_map(|program| program.code.as_ref())
                .map(|code| code.bytes() as u64)
                .sum(),
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
