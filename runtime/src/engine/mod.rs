//! The engine: a loaded plan that runs steps.
//!
//! A step takes rows (a token at a position of a sequence) of any mix of sequences, prompts and
//! decoding alike, writes their keys and values into the cache, and returns the logits of the rows
//! that are asked for. One native function does the work; every worker thread calls it, and inside
//! of it they meet at counters.

mod error;
mod team;
#[cfg(test)]
pub(crate) mod tests;

pub use error::{EngineError, StepError};

use crate::checkpoint::Checkpoint;
use crate::kv::KvCache;
use crate::memory::{Breakdown, Region};
use crate::native::{Entry, NativeCode};
use crate::pack::{PackedWeights, pack, pack_cached};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use team::{Panicked, Team};
use tilec_ir::abi::{COUNTER_STRIDE, StepArgs};
use tilec_ir::plan::{Plan, WeightsFrom};

/// Spins after which a wait of a worker for the others gives up, by default: of the order of ten
/// seconds, so that a busy machine is no error, and a fault is one soon enough.
pub const SPIN_LIMIT: u64 = 1 << 29;

/// Ticks of a stage on a worker: start, end of its waits, end.
pub const PROFILE_FIELDS: usize = 3;

/// Packed weights as bytes, on a boundary of 64.
pub type Weights = Box<dyn AsRef<[u8]> + Send + Sync>;

/// How to load and run a plan.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Where packed weights are kept from one run to the next; `None` packs anew every time.
    pub cache_dir: Option<PathBuf>,
    /// A checkpoint to use in place of the one that the plan names.
    pub checkpoint: Option<PathBuf>,
    /// Pages of the KV cache, if fewer than all sequences can use.
    pub kv_pages: Option<usize>,
    /// Whether every worker stays on a processor of its own, as far as there are enough.
    pub pin: bool,
    /// Whether steps record when every stage ran: see [`Engine::profile`].
    pub profile: bool,
    /// Spins after which a wait gives up.
    pub spin_limit: u64,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            cache_dir: None,
            checkpoint: None,
            kv_pages: None,
            pin: false,
            profile: false,
            spin_limit: SPIN_LIMIT,
        }
    }
}

/// One row of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowInput {
    /// Token id, less than the vocabulary.
    pub token: u32,
    /// Position in the sequence, less than the context.
    pub position: u32,
    /// Sequence, less than the plan's limit.
    pub sequence: u32,
}

/// A loaded plan with its weights, memory and threads.
pub struct Engine {
    plan: Plan,
    weights: Weights,
    entry: Entry,
    /// Keeps what `entry` points at.
    code: Option<NativeCode>,
    kv: KvCache,
    arena: Region,
    scratch: Region,
    /// A counter for every stage, then the abort record on a line of its own.
    counters: Region,
    /// `[workers][stages][PROFILE_FIELDS]` of `u64`.
    profile: Option<Region>,
    team: Team,
    spin_limit: u64,
    /// Positions of every sequence whose keys and values are in the cache.
    lengths: Vec<usize>,
    /// Number of the last step that a sequence had rows in.
    seen: Vec<u64>,
    steps: u64,
    /// Columns of the rows, as the native code takes them.
    columns: [Vec<u32>; 3],
}

impl Engine {
    /// Loads a plan: reads and packs its weights (or finds them in the cache), loads its code, and
    /// starts its threads. `progress(done, total)` is told of bytes packed.
    ///
    /// # Errors
    /// [`EngineError`], with the file or the limit that is the cause.
    pub fn load(
        folder: &Path,
        options: &EngineOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine, EngineError> {
        let plan = Plan::load(folder)?;
        // What is quickly known to fail comes before hours of packing.
        let code = NativeCode::load(folder, &plan.code, &plan.target)?;
        let entry = code.entry().expect("a loaded plan has its entry: `load` checks");
        let checkpoint = open_checkpoint(&plan, options)?;
        let weights = match &options.cache_dir {
            Some(cache) => pack_cached(&checkpoint, &plan.packing, cache, progress)?,
            None => pack(&checkpoint, &plan.packing, progress)?,
        };
        tracing::debug!(bytes = weights.len(), cached = weights.from_cache(), "weights are there");
        // SAFETY: the code came with the plan, under its checksum, and stays loaded beside it.
        let mut engine = unsafe { Engine::with_entry(plan, Box::new(weights), entry, options) }?;
        engine.code = Some(code);
        Ok(engine)
    }

    /// An engine on a function in place of a plan's native code.
    ///
    /// # Safety
    /// `entry` must do what the plan and [`StepArgs`] promise: touch only the memory that they
    /// describe, and return on every worker.
    ///
    /// # Errors
    /// [`EngineError`] if weights are too few or not aligned, or memory or threads cannot be had.
    pub unsafe fn with_entry(
        plan: Plan,
        weights: Weights,
        entry: Entry,
        options: &EngineOptions,
    ) -> Result<Engine, EngineError> {
        let bytes = (*weights).as_ref();
        if (bytes.len() as u64) < plan.packing.bytes || !bytes.as_ptr().addr().is_multiple_of(64) {
            return Err(EngineError::Weights { have: bytes.len() as u64, need: plan.packing.bytes });
        }
        let stages = plan.stages.len();
        let workers = plan.target.workers;
        let kv_pages = options.kv_pages.unwrap_or(usize::MAX);
        let kv = KvCache::new(&plan, kv_pages)?;
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
        Ok(Engine {
            entry,
            code: None,
            kv,
            arena,
            scratch,
            counters,
            profile,
            team,
            spin_limit: options.spin_limit,
            lengths: vec![0; plan.limits.sequences],
            seen: vec![0; plan.limits.sequences],
            steps: 0,
            columns: Default::default(),
            weights,
            plan,
        })
    }

    /// Runs one step on `rows` and returns the logits `[logit_rows][vocab]` of the rows whose
    /// numbers `logit_rows` has, ascending.
    ///
    /// Rows of a sequence are adjacent, at consecutive positions, of which the first is at most the
    /// sequence's length: a smaller one forgets what came after it.
    ///
    /// # Errors
    /// [`StepError`]. A step that was refused has no effect; one that failed leaves the sequences
    /// at the lengths before it.
    pub fn step(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<&[f32], StepError> {
        self.steps += 1;
        self.check(rows, logit_rows)?;
        for row in rows {
            self.kv.reserve(row.sequence as usize, row.position as usize + 1)?;
        }
        let [tokens, positions, sequences] = &mut self.columns;
        tokens.clear();
        tokens.extend(rows.iter().map(|row| row.token));
        positions.clear();
        positions.extend(rows.iter().map(|row| row.position));
        sequences.clear();
        sequences.extend(rows.iter().map(|row| row.sequence));

        self.counters.as_mut_slice().fill(0);
        let stages = self.plan.stages.len();
        let counters = self.counters.as_mut_ptr();
        let abort = counters.wrapping_add(stages * COUNTER_STRIDE).cast::<u32>();
        let args = Shared(StepArgs {
            rows: rows.len() as u32,
            logit_rows: logit_rows.len() as u32,
            pages_per_sequence: self.kv.pages_per_sequence() as u32,
            kv_pages: self.kv.pages() as u32,
            tokens: tokens.as_ptr(),
            positions: positions.as_ptr(),
            sequences: sequences.as_ptr(),
            logit_index: logit_rows.as_ptr(),
            page_table: self.kv.table().as_ptr(),
            weights: (*self.weights).as_ref().as_ptr(),
            kv: self.kv.memory().as_mut_ptr(),
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
            // the plan's limits, and their pages are there. `with_entry` answers for the function.
            unsafe { entry(args.get(), worker as u32) }
        };
        self.team.run(&job).map_err(|Panicked(worker)| StepError::Panicked { worker })?;

        // SAFETY: a line of the region, aligned; workers write it as these atomics do.
        let abort: &[AtomicU32; 4] = unsafe { &*abort.cast() };
        let [code, stage, worker, seen] = abort.each_ref().map(|word| word.load(Ordering::Acquire));
        if code != 0 {
            let name = self.plan.stages.get(stage as usize);
            let stage = name.map_or_else(|| format!("number {stage}"), Clone::clone);
            return Err(StepError::Stalled { stage, worker, seen, code });
        }
        for row in rows {
            self.lengths[row.sequence as usize] = row.position as usize + 1;
        }
        let logits = self.plan.buffers[self.plan.logits].offset;
        let bytes = logit_rows.len() * self.plan.vocab * 4;
        Ok(bytemuck::cast_slice(&self.arena.as_slice()[logits..logits + bytes]))
    }

    fn check(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<(), StepError> {
        let limits = &self.plan.limits;
        if rows.is_empty() || rows.len() > limits.max_rows {
            return Err(StepError::Rows { rows: rows.len(), max: limits.max_rows });
        }
        for (row, input) in rows.iter().enumerate() {
            let RowInput { token, position, sequence } = *input;
            let number = sequence as usize;
            if token as usize >= self.plan.vocab {
                return Err(StepError::Token { row, token, vocab: self.plan.vocab });
            }
            if number >= limits.sequences {
                return Err(StepError::Sequence { row, sequence, sequences: limits.sequences });
            }
            if position as usize >= limits.context {
                return Err(StepError::Context { row, position, context: limits.context });
            }
            match row.checked_sub(1).map(|before| rows[before]).filter(|before| before.sequence == sequence) {
                Some(before) if before.position + 1 == position => continue,
                Some(before) => {
                    return Err(StepError::Order { row, position, expected: before.position + 1 });
                }
                None if self.seen[number] == self.steps => return Err(StepError::Apart { row, sequence }),
                None => self.seen[number] = self.steps,
            }
            if position as usize > self.lengths[number] {
                return Err(StepError::Order { row, position, expected: self.lengths[number] as u32 });
            }
        }
        let max = self.plan.buffers[self.plan.logits].rows;
        if logit_rows.len() > max {
            return Err(StepError::LogitRows { rows: logit_rows.len(), max });
        }
        let ascending = logit_rows.windows(2).all(|pair| pair[0] < pair[1]);
        match logit_rows.last() {
            Some(last) if !ascending || *last as usize >= rows.len() => {
                Err(StepError::LogitOrder { rows: rows.len() })
            }
            _ => Ok(()),
        }
    }

    /// Forgets a sequence and gives its pages back. Numbers past the limit are no sequences, and
    /// nothing is done.
    pub fn reset(&mut self, sequence: usize) {
        if let Some(length) = self.lengths.get_mut(sequence) {
            *length = 0;
            self.kv.release(sequence);
        }
    }

    /// Positions of a sequence that are in the cache.
    pub fn length(&self, sequence: usize) -> usize {
        self.lengths.get(sequence).copied().unwrap_or(0)
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The KV cache's pages.
    pub fn kv(&self) -> &KvCache {
        &self.kv
    }

    /// Logits of how many rows a step can return.
    pub fn max_logit_rows(&self) -> usize {
        self.plan.buffers[self.plan.logits].rows
    }

    /// What the memory is for.
    pub fn memory(&self) -> Breakdown {
        let (pages, free) = (self.kv.pages() as u64, self.kv.free_pages() as u64);
        Breakdown {
            weights: (*self.weights).as_ref().len() as u64,
            kv: self.kv.bytes() as u64,
            kv_used: self.kv.bytes() as u64 / pages * (pages - free),
            arena: self.arena.len() as u64,
            scratch: self.scratch.len() as u64,
            code: self.code.as_ref().map_or(0, |code| code.bytes() as u64),
        }
    }

    /// Times of the last step if [`EngineOptions::profile`] was set: `[workers][stages]
    /// [start, wait end, end]` in ticks of the processor's time-stamp counter.
    pub fn profile(&self) -> Option<&[u64]> {
        self.profile.as_ref().map(|region| bytemuck::cast_slice(region.as_slice()))
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Engine");
        out.field("plan", &self.plan.name).field("lengths", &self.lengths).finish_non_exhaustive()
    }
}

/// The checkpoint that a plan's weights come from.
///
/// # Errors
/// If it cannot be opened.
pub fn open_checkpoint(plan: &Plan, options: &EngineOptions) -> Result<Checkpoint, EngineError> {
    Ok(match (&options.checkpoint, &plan.weights) {
        (Some(path), _) | (None, WeightsFrom::Checkpoint { path }) => Checkpoint::open(path)?,
        (None, WeightsFrom::Synthetic { seed, config, tensors }) => {
            Checkpoint::synthetic(config.clone(), *seed, tensors.clone())
        }
    })
}

impl AsRef<[u8]> for PackedWeights {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
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
