//! The engine's work on a GPU: launches of the plan's resident kernel.
//!
//! What a launch needs is queued at once (rows, zeroed counters, the kernel, a copy of the logits), and
//! the host waits for the queue, asleep most of the time. A kernel cannot be ended from outside: one
//! that waits for too long ends itself and says where; if not even that is heard of, the engine gives
//! up, and leaves its memory to the system.

use super::device::{Device, HostMemory, Memory, Program};
use super::error::CudaError;
use super::{DECODE_STEPS, weights};
use crate::engine::{EngineError, EngineOptions, RoundNews, RowInput, StepError};
use crate::kv::{KV_LIMITS, PageTable, fill_random};
use crate::memory::Breakdown;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tilec_ir::abi::KvLayout;
use tilec_ir::launch::{
    BROKEN_LOGITS, EXPERT_COUNTS, LAUNCH_ROWS, LaunchArgs, NO_LOGITS, ROUND_SEQUENCE_WORDS, ROUND_WORDS,
    RoundResult, RoundSequence, SAMPLE_ROW_BYTES, SAMPLE_WORDS, SLICE_ROWS, STALL_WORDS, STOP_TOKENS,
    SYNC_BYTES, SampleRow, StallRecord, TRACE_FIELDS,
};
use tilec_ir::plan::{DraftPlan, Plan};

/// How much longer than the kernel itself the host waits before it gives up.
const MARGIN: Duration = Duration::from_millis(500);

/// How long the host looks for the end of a short launch without sleeping: waking up takes about as long
/// as a tenth of a step.
const WATCH: Duration = Duration::from_millis(1);

/// A byte that makes every float of it NaN: float32, bfloat16 and float16.
const POISON: u8 = 0xff;

/// How long it sleeps between two looks.
const NAP: Duration = Duration::from_micros(20);

/// Bytes of made-up keys and values that are copied to many places.
const FILL_BYTES: usize = 4 << 20;

/// How long copying them may take.
const FILL_PATIENCE: Duration = Duration::from_secs(30);

// The inputs of a pass, in words: four columns of rows, then the number of the pass, from 1.
const TOKENS: usize = 0;
const POSITIONS: usize = LAUNCH_ROWS;
const SEQUENCES: usize = 2 * LAUNCH_ROWS;
const LOGIT_INDEX: usize = 3 * LAUNCH_ROWS;
const PASS_NUMBER: usize = 4 * LAUNCH_ROWS;
/// In place of rows, [`RoundSequence`]s.
const ROUND: usize = 0;
const _: () = assert!(LAUNCH_ROWS / 2 * ROUND_SEQUENCE_WORDS <= PASS_NUMBER);
/// How the tokens of wanted rows are chosen: [`SampleRow`]s.
const SAMPLING: usize = 6 * LAUNCH_ROWS;
/// Words from one pass to the next.
const PASS_WORDS: usize = 512;
const _: () = assert!(SAMPLING + LAUNCH_ROWS * SAMPLE_WORDS <= PASS_WORDS && SAMPLING.is_multiple_of(2));

// What host and kernel tell each other while it runs, in words, each on a cache line of its own: the
// record of a wait that gave up, the word that ends a launch, and the number of the last pass that is
// done.
const STALL: usize = 0;
const HALT: usize = 32;
const DONE: usize = 64;
/// What is known of experts, summed up: the words of [`ExpertCounts`].
const EXPERTS: usize = 96;
const MAIL_WORDS: usize = 128;

/// See [`LaunchArgs::foresee`]. Qwen3-30B-A3B in bf16 with one row (H200) took 1.880 ms with nothing, 1.851 with an expert
/// foreseen in each layer, 1.795 with two, 1.802 with three, 1.826 with six.
const FORESEE_BYTES: u32 = 8 << 20;

/// What an `inject` has of the mail and of the inputs begins behind what all others have: it may still run
/// while the next pass is written.
const INJECT_MAIL: usize = MAIL_WORDS;

/// The kernel's `f32` and `u32`.
const WORD: usize = 4;

/// Rows of a pass, and which of the wanted rows of logits it has.
type Pass = (Range<usize>, Range<usize>);

/// Weights, memory and kernels of a plan on a GPU.
pub struct CudaEngine {
    weights: Memory,
    kv: Memory,
    arena: Memory,
    draft: Option<CudaDraft>,
    /// Where the taps of a step lie in the arena; 0 without a draft.
    taps: u64,
    /// Bytes of a row of them.
    tap_bytes: u64,
    sync: Memory,
    choices: Memory,
    logits: Memory,
    inputs: Memory,
    /// The first pass of `inputs` that is for `inject`.
    inject_pass: usize,
    table: Memory,
    trace: Option<Memory>,
    inputs_host: HostMemory,
    table_host: HostMemory,
    logits_host: HostMemory,
    trace_host: Option<HostMemory>,
    /// Stages of the program that was traced last.
    traced: usize,
    /// `u32 [DECODE_STEPS or passes][LAUNCH_ROWS]`, the tokens of a launch's steps, or of passes, plus one.
    chosen: HostMemory,
    mail: HostMemory,
    /// [`PageTable::version`] of the table on the device.
    table_version: u64,
    pages: usize,
    /// What pages are filled with that change hands: zero, or [`POISON`].
    fresh: u8,
    patience: Duration,
    /// How experts are chosen, if not by the model.
    routing: Option<RandomRouting>,
    /// An `inject` is queued that nobody has waited for: the next wait is for it as well.
    injecting: bool,
    /// Why this engine cannot go on.
    poisoned: Option<String>,
    /// Last: everything above was made by it.
    device: Box<dyn Device>,
}

/// Memory of a draft's kernels.
struct CudaDraft {
    kv: Memory,
    inject: Memory,
    block: Memory,
}

/// Experts that are chosen at random, all with the same weight, for measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomRouting {
    /// Thousandths of a row's experts that all rows of a step choose alike, rounded down to whole experts;
    /// each row chooses the others by itself.
    pub shared_permille: u16,
    /// Start of the random numbers.
    pub seed: u32,
}

/// Experts of all steps and layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertCounts {
    /// Those that any row of a step chose.
    pub chosen: u32,
    /// Those whose weights began to stream before rows chose.
    pub foreseen: u32,
    /// Of these, those that no row chose: their first products' weights streamed for nothing.
    pub wrong: u32,
}

/// What a run leaves for the host.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Wanted<'a> {
    /// The logits.
    Logits,
    /// The tokens that are chosen so, one for each wanted row; without entries, those of the largest logits.
    Tokens(&'a [SampleRow]),
}

/// How a wait for the device ended, if not well.
enum Trouble {
    /// The device says so.
    Failed(CudaError),
    /// Nothing happened for so long.
    Silent(Duration),
}

impl CudaEngine {
    /// Takes the memory of a plan with `pages` pages of KV cache. The weights are zero.
    ///
    /// # Errors
    /// [`CudaError`], with what the memory is for.
    pub fn new(
        plan: &Plan,
        device: Box<dyn Device>,
        pages: usize,
        options: &EngineOptions,
    ) -> Result<CudaEngine, EngineError> {
        const ROWS: &str = "limits.rows";
        let sized = |what, lower, bytes: Option<usize>| device.allocate(what, bytes, lower);
        let logit_rows = plan.buffers[plan.logits].rows;
        let row_bytes = plan.vocab.checked_mul(WORD);
        let logits_bytes = row_bytes.and_then(|bytes| bytes.checked_mul(logit_rows));
        let logits_bytes = logits_bytes.ok_or(CudaError::Overflow { what: "logits", lower: ROWS })?;
        // Of two passes of blocks one behind the other at least one is more than half full.
        let passes = plan.limits.max_rows.div_ceil(narrowest(plan) / 2) + 1;
        let inject_passes = plan.limits.max_rows.div_ceil(narrowest(plan));
        let inputs_bytes = (passes + inject_passes) * PASS_WORDS * WORD;
        let table_bytes = plan.limits.sequences.checked_mul(plan.limits.pages_per_sequence(&plan.kv));
        let table_bytes = table_bytes.and_then(|entries| entries.checked_mul(WORD));
        let table_bytes = table_bytes.ok_or(CudaError::Overflow { what: "page table", lower: KV_LIMITS })?;
        let draft = plan.draft.as_ref().filter(|_| options.draft);
        let rounds = draft.and_then(|draft| draft.round.as_ref()).map_or(0, |round| round.stages.len());
        let traced = plan.stages.len().max(rounds);
        let trace_bytes = device.blocks().checked_mul(traced * TRACE_FIELDS * 8);
        let trace_bytes = trace_bytes.filter(|_| options.profile);

        // The largest first, so that what is short of memory is named for what it is.
        let weights_bytes = usize::try_from(plan.packing.bytes).ok();
        let weights = sized("weights", "precision.weights", weights_bytes)?;
        let kv = sized("KV cache", KV_LIMITS, plan.kv.total_bytes(pages))?;
        let trace = trace_bytes.map(|bytes| sized("profile", ROWS, Some(bytes))).transpose()?;
        let draft = match plan.draft.as_ref().filter(|_| options.draft) {
            Some(draft) => Some(CudaDraft {
                kv: sized("KV cache of the draft", KV_LIMITS, draft.kv.total_bytes(pages))?,
                inject: sized("activations of the draft", ROWS, Some(draft.inject.arena_bytes()))?,
                block: sized("activations of the draft", ROWS, Some(draft.block_pass.arena_bytes()))?,
            }),
            None => None,
        };
        let arena = sized("activations", ROWS, Some(plan.arena_bytes()))?;
        let taps = plan.draft.as_ref().map(|draft| &plan.buffers[draft.taps_buffer]);
        let mut engine = CudaEngine {
            weights,
            kv,
            taps: taps.map_or(0, |taps| arena.address() + taps.offset as u64),
            tap_bytes: taps.map_or(0, |taps| (taps.cols * WORD) as u64),
            arena,
            draft,
            sync: sized("counters", ROWS, Some(SYNC_BYTES))?,
            choices: sized("sums of choices", ROWS, Some(LAUNCH_ROWS * SAMPLE_ROW_BYTES))?,
            logits: sized("logits", ROWS, row_bytes.and_then(|bytes| bytes.checked_mul(LAUNCH_ROWS)))?,
            inputs: sized("rows", ROWS, Some(inputs_bytes))?,
            inject_pass: passes,
            table: sized("page table", KV_LIMITS, Some(table_bytes))?,
            trace,
            inputs_host: device.allocate_host(inputs_bytes)?,
            table_host: device.allocate_host(table_bytes)?,
            logits_host: device.allocate_host(logits_bytes)?,
            trace_host: trace_bytes.map(|bytes| device.allocate_host(bytes)).transpose()?,
            traced: plan.stages.len(),
            chosen: device.allocate_host(DECODE_STEPS.max(passes) * LAUNCH_ROWS * WORD)?,
            mail: device.allocate_host((INJECT_MAIL + MAIL_WORDS) * WORD)?,
            table_version: 0,
            pages,
            fresh: 0,
            patience: options.patience,
            routing: None,
            injecting: false,
            poisoned: None,
            device,
        };
        let draft = engine.draft.iter().flat_map(|draft| [&draft.kv, &draft.inject, &draft.block]);
        for memory in [&engine.weights, &engine.kv, &engine.arena].into_iter().chain(draft) {
            // SAFETY: all of memory that stays as long as the device.
            unsafe { engine.device.zero(memory.address(), memory.bytes()) }?;
        }
        Ok(engine)
    }

    /// Whether the plan's draft was loaded.
    pub fn has_draft(&self) -> bool {
        self.draft.is_some()
    }

    /// The KV caches, with where they are.
    fn caches(&self, plan: &Plan) -> Vec<(KvLayout, u64)> {
        let draft = self.draft.iter().zip(&plan.draft).map(|(own, draft)| (draft.kv, own.kv.address()));
        std::iter::once((plan.kv, self.kv.address())).chain(draft).collect()
    }

    /// Fills the weights.
    ///
    /// # Errors
    /// [`EngineError`] if they cannot be read, packed or copied.
    pub fn load_weights(
        &mut self,
        plan: &Plan,
        options: &EngineOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), EngineError> {
        weights::load(&mut *self.device, &self.weights, plan, options, progress)
    }

    /// Fills the KV caches, the activations and the logits with [`POISON`] before whatever is queued next,
    /// and from now on every page that is cleared.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn poison(&mut self, plan: &Plan) -> Result<(), StepError> {
        self.ready()?;
        self.fresh = POISON;
        let draft = self.draft.iter().flat_map(|draft| [&draft.kv, &draft.inject, &draft.block]);
        let all = [&self.kv, &self.arena, &self.logits].into_iter().chain(draft);
        let all: Vec<(u64, usize)> = all.map(|memory| (memory.address(), memory.bytes())).collect();
        for (address, bytes) in all {
            // SAFETY: all of memory that stays as long as the device.
            let filled = unsafe { self.device.fill(address, POISON, bytes) };
            filled.map_err(|error| self.fail(&plan.stages, Trouble::Failed(error)))?;
        }
        Ok(())
    }

    /// Zeroes pages of the KV caches (or poisons them) before whatever is queued next.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn clear(&mut self, plan: &Plan, pages: &[u32]) -> Result<(), StepError> {
        if pages.is_empty() {
            return Ok(());
        }
        self.ready()?;
        for (kv, address) in self.caches(plan) {
            let bytes = kv.kv_heads * kv.block_bytes();
            for page in pages {
                for layer in 0..kv.layers {
                    let offset = kv.block_offset(self.pages, layer, *page as usize, 0);
                    // SAFETY: a page of the cache, which stays as long as the device.
                    let filled = unsafe { self.device.fill(address + offset as u64, self.fresh, bytes) };
                    filled.map_err(|error| self.fail(&plan.stages, Trouble::Failed(error)))?;
                }
            }
        }
        Ok(())
    }

    /// Fills pages of the KV caches with numbers that no token made, from -1 to 1, before whatever is
    /// queued next.
    ///
    /// # Errors
    /// [`StepError`].
    pub fn fill(&mut self, plan: &Plan, pages: &[u32]) -> Result<(), StepError> {
        self.caches(plan).into_iter().try_for_each(|(kv, address)| self.fill_cache(plan, kv, address, pages))
    }

    fn fill_cache(
        &mut self,
        plan: &Plan,
        kv: KvLayout,
        address: u64,
        pages: &[u32],
    ) -> Result<(), StepError> {
        self.ready()?;
        let page_bytes = kv.kv_heads * kv.block_bytes();
        let mut host = self.device.allocate_host(FILL_BYTES.max(page_bytes))?;
        let pages_at_once = host.bytes() / page_bytes;
        // SAFETY: nothing is queued on it yet.
        fill_random(kv.kv_type, unsafe { host.slice_mut(0..host.bytes()) });
        let mut queued = Ok(());
        for run in pages.chunk_by(|one, next| one + 1 == *next) {
            for part in run.chunks(pages_at_once) {
                for layer in 0..kv.layers {
                    let to = address + kv.block_offset(self.pages, layer, part[0] as usize, 0) as u64;
                    // SAFETY: neighbouring pages of a layer are one range of the cache; the host's memory
                    // stays until the wait below.
                    let copied = unsafe { self.device.copy_in(to, &host, 0..part.len() * page_bytes) };
                    queued = queued.and(copied);
                }
            }
        }
        let result = queued
            .map_err(Trouble::Failed)
            .and_then(|()| wait(&mut *self.device, FILL_PATIENCE, Duration::ZERO, &mut || 0));
        result.map_err(|trouble| self.fail(&plan.stages, trouble))
    }

    /// Runs a step that was checked and has its pages, in passes of as many rows as its kernel has; returns the
    /// logits `[logit_rows][vocab]`.
    ///
    /// # Errors
    /// [`StepError`]; after one of these the engine does nothing more.
    pub fn step(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        rows: &[RowInput],
        logit_rows: &[u32],
    ) -> Result<&[f32], StepError> {
        let passes = split(rows.len(), logit_rows, step_rows(plan, Program::Model));
        self.run(Program::Model, plan, pages, (rows, logit_rows, &passes), Wanted::Logits)?;
        Ok(self.logits(plan, logit_rows.len()))
    }

    /// Runs a step as [`CudaEngine::step`], of which only tokens are wanted: the logits stay where they are.
    /// `sampling` says how each is chosen; if it is empty, they are those of the largest logits (the lowest id
    /// among equals).
    ///
    /// # Errors
    /// [`StepError`]; after one of these, but for [`StepError::Logits`], the engine does nothing more.
    pub fn step_tokens(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        rows: &[RowInput],
        logit_rows: &[u32],
        sampling: &[SampleRow],
    ) -> Result<Vec<u32>, StepError> {
        let passes = split(rows.len(), logit_rows, step_rows(plan, Program::Model));
        self.run(Program::Model, plan, pages, (rows, logit_rows, &passes), Wanted::Tokens(sampling))?;
        self.chosen_tokens(plan, &passes)
    }

    /// Fills the draft's cache at the positions of `rows`, of which `chosen` has the numbers in the last
    /// step. Nobody needs to know when that is done: it is queued in front of whatever comes next, and an
    /// error of the kernel is that one's.
    ///
    /// # Errors
    /// [`StepError`] if there is no draft; after another one the engine does nothing more.
    pub fn inject(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        rows: &[RowInput],
        chosen: &[u32],
    ) -> Result<(), StepError> {
        // The kernel takes the number of a row's taps for its token.
        let rows: Vec<RowInput> =
            rows.iter().zip(chosen).map(|(row, number)| RowInput { token: *number, ..*row }).collect();
        let Some(draft) = plan.draft.as_ref().filter(|_| self.has_draft()) else {
            return Err(StepError::NoDraft);
        };
        self.settle(plan)?;
        let passes = split(rows.len(), &[], step_rows(plan, Program::Inject));
        self.write_passes(self.inject_pass, &rows, &[], &passes);
        let queued = self.queue_passes(Program::Inject, plan, pages, &passes, Wanted::Logits);
        queued.map_err(|error| self.fail(&draft.inject.stages, Trouble::Failed(error)))?;
        self.injecting = true;
        Ok(())
    }

    /// Waits for an `inject` that is queued.
    fn settle(&mut self, plan: &Plan) -> Result<(), StepError> {
        self.ready()?;
        if !self.injecting {
            return Ok(());
        }
        let result = wait(&mut *self.device, self.patience + MARGIN, WATCH, &mut || 0);
        self.finish(plan, Program::Inject, result)
    }

    /// Runs blocks of the draft that were checked and have their pages; returns the logits
    /// `[logit_rows][vocab]`. No block has more rows than a pass.
    ///
    /// # Errors
    /// [`StepError`] if there is no draft; after another one the engine does nothing more.
    pub fn block(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        rows: &[RowInput],
        logit_rows: &[u32],
    ) -> Result<&[f32], StepError> {
        let passes = split_blocks(rows, logit_rows, step_rows(plan, Program::Block));
        self.run(Program::Block, plan, pages, (rows, logit_rows, &passes), Wanted::Logits)?;
        Ok(self.logits(plan, logit_rows.len()))
    }

    /// Runs blocks as [`CudaEngine::block`], of which only the tokens of the largest logits are wanted.
    ///
    /// # Errors
    /// [`StepError`] if there is no draft; after another one the engine does nothing more.
    pub fn guess(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        rows: &[RowInput],
        logit_rows: &[u32],
    ) -> Result<Vec<u32>, StepError> {
        let passes = split_blocks(rows, logit_rows, step_rows(plan, Program::Block));
        self.run(Program::Block, plan, pages, (rows, logit_rows, &passes), Wanted::Tokens(&[]))?;
        self.chosen_tokens(plan, &passes)
    }

    /// Logits of the last run, so many rows.
    fn logits(&self, plan: &Plan, rows: usize) -> &[f32] {
        let bytes = rows * plan.vocab * WORD;
        // SAFETY: nothing that is queued writes them: whoever ran a kernel for them has waited.
        bytemuck::cast_slice(unsafe { self.logits_host.slice(0..bytes) })
    }

    /// Tokens that the last run's passes have chosen.
    fn chosen_tokens(&mut self, plan: &Plan, passes: &[Pass]) -> Result<Vec<u32>, StepError> {
        let words = self.chosen.words().chunks_exact(LAUNCH_ROWS).zip(passes);
        let words = words.flat_map(|(words, (_, wanted))| &words[..wanted.len()]);
        // 0 wraps around to what is no token.
        let tokens: Vec<u32> = words.map(|word| word.load(Ordering::Acquire).wrapping_sub(1)).collect();
        match tokens.iter().position(|token| *token as usize >= plan.vocab) {
            None => Ok(tokens),
            Some(row) => {
                if let Some(problem) = broken(tokens[row]) {
                    return Err(StepError::Logits { row, step: 0, problem });
                }
                let problem =
                    format!("with token {} for row {row}, which is none of {}", tokens[row], plan.vocab);
                let error = StepError::Kernel { problem };
                self.poisoned = Some(error.to_string());
                Err(error)
            }
        }
    }

    /// Runs a kernel on rows of which some are wanted, pass by pass.
    fn run(
        &mut self,
        program: Program,
        plan: &Plan,
        pages: &PageTable,
        (rows, logit_rows, passes): (&[RowInput], &[u32], &[Pass]),
        wanted: Wanted<'_>,
    ) -> Result<(), StepError> {
        self.ready()?;
        if program != Program::Model && !self.has_draft() {
            return Err(StepError::NoDraft);
        }
        self.settle_table(plan, pages)?;
        self.write_passes(0, rows, logit_rows, passes);
        if let Wanted::Tokens(sampling) = wanted
            && !sampling.is_empty()
        {
            for (number, (_, wanted)) in passes.iter().enumerate() {
                self.write_sampling(number, &sampling[wanted.clone()]);
            }
        }
        for word in &self.chosen.words()[..passes.len() * LAUNCH_ROWS] {
            word.store(0, Ordering::Relaxed);
        }
        let queued = self.queue_passes(program, plan, pages, passes, wanted);
        let result = queued.map_err(Trouble::Failed).and_then(|()| {
            let mail = self.mail.words();
            let done = &mail[DONE];
            wait(&mut *self.device, self.patience + MARGIN, WATCH, &mut || {
                u64::from(done.load(Ordering::Relaxed))
            })
        });
        self.finish(plan, program, result)
    }

    fn queue_passes(
        &mut self,
        program: Program,
        plan: &Plan,
        pages: &PageTable,
        passes: &[Pass],
        output: Wanted<'_>,
    ) -> Result<(), CudaError> {
        let first = if program == Program::Inject { self.inject_pass } else { 0 };
        self.queue_inputs(program, pages, first..first + passes.len())?;
        for (number, (rows, wanted)) in (first..).zip(passes) {
            let mut args = self.args(program, pages, number, rows.len(), wanted.len());
            if program == Program::Model {
                args.taps += rows.start as u64 * self.tap_bytes;
            }
            if let Wanted::Tokens(sampling) = output {
                args.chosen = self.chosen.address() + (number * LAUNCH_ROWS * WORD) as u64;
                args.sampling = if sampling.is_empty() { 0 } else { self.sampling_of(number) };
            }
            self.queue_launch(program, &args)?;
            let row_bytes = plan.vocab * WORD;
            let done = self.inputs.address() + ((number * PASS_WORDS + PASS_NUMBER) * WORD) as u64;
            let device = &mut *self.device;
            // SAFETY: as many rows as the step's logits have room for, which was checked; then one word
            // of the inputs. Nobody touches either on the host until all is done, but for the word,
            // which is an atomic.
            unsafe {
                if !wanted.is_empty() && output == Wanted::Logits {
                    let to = wanted.start * row_bytes..wanted.end * row_bytes;
                    device.copy_out(&self.logits_host, to, self.logits.address())?;
                }
                let word = mail_of(program) + DONE;
                device.copy_out(&self.mail, word * WORD..(word + 1) * WORD, done)?;
            }
        }
        if program == Program::Model { self.queue_trace(plan.stages.len()) } else { Ok(()) }
    }

    /// Decodes in one launch: see [`crate::engine::Engine::decode`]. The rows were checked and have
    /// pages for all steps.
    ///
    /// # Errors
    /// [`StepError`]; after one of these the engine does nothing more.
    pub fn decode(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        (rows, sampling): (&[RowInput], &[SampleRow]),
        steps: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        self.ready()?;
        self.settle_table(plan, pages)?;
        self.write_rows(0, rows, 0..rows.len() as u32);
        for word in &self.chosen.words()[..steps * LAUNCH_ROWS] {
            word.store(0, Ordering::Relaxed);
        }
        let mut args = self.args(Program::Model, pages, 0, rows.len(), rows.len());
        args.steps = steps as u32;
        args.chosen = self.chosen.address();
        if !sampling.is_empty() {
            self.write_sampling(0, sampling);
            args.sampling = self.sampling_of(0);
        }
        set_stops(&mut args, stop_tokens);

        let mut told = Told { steps: 0, ended: false, bad: None };
        let queued = self
            .queue_inputs(Program::Model, pages, 0..1)
            .and_then(|()| self.queue_launch(Program::Model, &args))
            .and_then(|()| self.queue_trace(plan.stages.len()));
        let result = queued.map_err(Trouble::Failed).and_then(|()| {
            let (chosen, halt) = (self.chosen.words(), &self.mail.words()[HALT]);
            wait(&mut *self.device, self.patience + MARGIN, Duration::ZERO, &mut || {
                told.look(chosen, rows.len(), steps, plan.vocab, stop_tokens, on_token);
                if told.ended {
                    halt.store(1, Ordering::Release);
                }
                told.steps as u64
            })
        });
        self.finish(plan, Program::Model, result)?;
        let problem = match told.bad {
            Some((step, row, token)) => {
                if let Some(problem) = broken(token) {
                    return Err(StepError::Logits { row, step, problem });
                }
                format!("with token {token} for row {row} of step {step}, which is none of {}", plan.vocab)
            }
            None if told.steps == 0 => "without having chosen a token".to_string(),
            None => return Ok(told.steps),
        };
        let error = StepError::Kernel { problem };
        self.poisoned = Some(error.to_string());
        Err(error)
    }

    /// Runs rounds of a draft in one launch: see [`crate::engine::Engine::rounds`]. The sequences were checked and
    /// have pages up to their limits; `sampling` has an entry for each row of the model's step, or none.
    ///
    /// # Errors
    /// [`StepError`]; after one of these the engine does nothing more.
    pub fn rounds(
        &mut self,
        plan: &Plan,
        pages: &PageTable,
        (sequences, sampling): (&[RoundSequence], &[SampleRow]),
        launch: Launch<'_>,
        on_round: &mut dyn FnMut(RoundNews<'_>) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        let Launch { rounds, stop_tokens, accept } = launch;
        if !self.has_rounds(plan) {
            return Err(StepError::NoDraft);
        }
        self.ready()?;
        self.settle_table(plan, pages)?;
        let words = &self.inputs_host.words()[ROUND..];
        for (word, value) in words.iter().zip(sequences.iter().flat_map(RoundSequence::words)) {
            word.store(value, Ordering::Relaxed);
        }
        for word in &self.chosen.words()[..rounds * ROUND_WORDS] {
            word.store(0, Ordering::Relaxed);
        }
        let sum = |of: fn(&RoundSequence) -> u32| sequences.iter().map(of).sum::<u32>();
        let rows = sum(|of| of.guesses) as usize + sequences.len();
        let mut args = self.args(Program::Round, pages, 0, rows, rows);
        args.steps = rounds as u32;
        args.chosen = self.chosen.address();
        args.round_sequences = sequences.len() as u32;
        args.block_passes = block_passes(sequences, step_rows(plan, Program::Round)) as u32;
        args.accept = accept;
        if !sampling.is_empty() {
            self.write_sampling(0, sampling);
            args.sampling = self.sampling_of(0);
        }
        set_stops(&mut args, stop_tokens);
        let round = plan.draft.as_ref().and_then(|draft| draft.round.as_ref());
        let round_stages = round.map_or(0, |round| round.stages.len());

        let mut told = ToldRounds { rounds: 0, ended: false, bad: None };
        let queued = self
            .queue_inputs(Program::Round, pages, 0..1)
            .and_then(|()| self.queue_launch(Program::Round, &args))
            .and_then(|()| self.queue_trace(round_stages));
        let result = queued.map_err(Trouble::Failed).and_then(|()| {
            let (chosen, halt) = (self.chosen.words(), &self.mail.words()[HALT]);
            wait(&mut *self.device, self.patience + MARGIN, WATCH, &mut || {
                told.look(chosen, sequences, rounds, plan.vocab, on_round);
                if told.ended {
                    halt.store(1, Ordering::Release);
                }
                told.rounds as u64
            })
        });
        self.finish(plan, Program::Round, result)?;
        let problem = match told.bad {
            Some((round, row, Some(token))) => {
                if let Some(problem) = broken(token) {
                    return Err(StepError::Logits { row, step: round, problem });
                }
                format!("with token {token} for row {row} of round {round}, which is none of {}", plan.vocab)
            }
            Some((round, row, None)) => {
                format!("with more tokens for row {row} of round {round} than it has")
            }
            None if told.rounds == 0 => "without having finished a round".to_string(),
            None => return Ok(told.rounds),
        };
        let error = StepError::Kernel { problem };
        self.poisoned = Some(error.to_string());
        Err(error)
    }

    /// Whether whole rounds of a draft fit into a launch.
    pub fn has_rounds(&self, plan: &Plan) -> bool {
        self.has_draft() && plan.draft.as_ref().is_some_and(|draft| draft.round.is_some())
    }

    /// Waits for an `inject` that may still copy the page table if that has to be copied anew.
    fn settle_table(&mut self, plan: &Plan, pages: &PageTable) -> Result<(), StepError> {
        if self.table_version == pages.version() { Ok(()) } else { self.settle(plan) }
    }

    /// Writes the rows of passes, from number `first` on.
    fn write_passes(&mut self, first: usize, rows: &[RowInput], logit_rows: &[u32], passes: &[Pass]) {
        for (number, (range, wanted)) in (first..).zip(passes) {
            let start = range.start as u32;
            let wanted = logit_rows[wanted.clone()].iter().map(|row| row - start);
            self.write_rows(number, &rows[range.clone()], wanted);
        }
    }

    /// Writes rows, and the numbers of those whose logits are wanted, for a pass.
    fn write_rows(&mut self, pass: usize, rows: &[RowInput], wanted: impl Iterator<Item = u32>) {
        let words = &self.inputs_host.words()[pass * PASS_WORDS..][..PASS_WORDS];
        let set = |at: usize, value: u32| words[at].store(value, Ordering::Relaxed);
        for (at, row) in rows.iter().enumerate() {
            set(TOKENS + at, row.token);
            set(POSITIONS + at, row.position);
            set(SEQUENCES + at, row.sequence);
        }
        wanted.enumerate().for_each(|(at, row)| set(LOGIT_INDEX + at, row));
        set(PASS_NUMBER, pass as u32 + 1);
    }

    /// Writes how the tokens of a pass are chosen.
    fn write_sampling(&mut self, pass: usize, sampling: &[SampleRow]) {
        let words = &self.inputs_host.words()[pass * PASS_WORDS + SAMPLING..][..LAUNCH_ROWS * SAMPLE_WORDS];
        for (word, value) in words.iter().zip(sampling.iter().flat_map(SampleRow::words)) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Where that is on the device.
    fn sampling_of(&self, pass: usize) -> u64 {
        self.inputs.address() + ((pass * PASS_WORDS + SAMPLING) * WORD) as u64
    }

    /// Queues copies of the rows of passes, and of the page table if it changed; clears the program's mail.
    fn queue_inputs(
        &mut self,
        program: Program,
        pages: &PageTable,
        passes: Range<usize>,
    ) -> Result<(), CudaError> {
        let mail = &self.mail.words()[mail_of(program)..][..MAIL_WORDS];
        // The sums over experts go on until somebody asks for them.
        let sums = EXPERTS..EXPERTS + EXPERT_COUNTS;
        for (_, word) in mail.iter().enumerate().filter(|(at, _)| !sums.contains(at)) {
            word.store(0, Ordering::Release);
        }
        if self.table_version != pages.version() {
            for (word, page) in self.table_host.words().iter().zip(pages.table()) {
                word.store(*page, Ordering::Relaxed);
            }
            let bytes = self.table_host.bytes();
            // SAFETY: the tables are equally long; this one stays as it is until the step is done.
            unsafe { self.device.copy_in(self.table.address(), &self.table_host, 0..bytes) }?;
            self.table_version = pages.version();
        }
        let bytes = passes.start * PASS_WORDS * WORD..passes.end * PASS_WORDS * WORD;
        let to = self.inputs.address() + bytes.start as u64;
        // SAFETY: both have room for all passes of the plan's largest step; as above.
        unsafe { self.device.copy_in(to, &self.inputs_host, bytes) }
    }

    fn queue_launch(&mut self, program: Program, args: &LaunchArgs) -> Result<(), CudaError> {
        let trace = self.trace.as_ref().map(|trace| (trace.address(), trace.bytes()));
        // SAFETY: the counters and the trace are this long. The arguments lead to memory of this engine,
        // of the sizes that the plan and `LaunchArgs` say; it stays until the kernel has ended, because
        // every step waits for that, or is leaked.
        unsafe {
            self.device.zero(self.sync.address(), SYNC_BYTES)?;
            if let Some((address, bytes)) = trace.filter(|_| args.trace != 0) {
                self.device.zero(address, bytes)?;
            }
            self.device.launch(program, args)
        }
    }

    /// Brings the times of a program of so many stages to the host.
    fn queue_trace(&mut self, stages: usize) -> Result<(), CudaError> {
        self.traced = stages;
        if let (Some(trace), Some(host)) = (&self.trace, &self.trace_host) {
            // SAFETY: both are equally long; nobody looks before all is done.
            unsafe { self.device.copy_out(host, 0..trace.bytes(), trace.address()) }?;
        }
        Ok(())
    }

    /// The arguments of a launch of one step.
    fn args(
        &self,
        program: Program,
        pages: &PageTable,
        pass: usize,
        rows: usize,
        logit_rows: usize,
    ) -> LaunchArgs {
        let (kv, arena) = match (program, &self.draft) {
            (Program::Inject, Some(draft)) => (&draft.kv, &draft.inject),
            (Program::Block, Some(draft)) => (&draft.kv, &draft.block),
            _ => (&self.kv, &self.arena),
        };
        let of_draft =
            |part: fn(&CudaDraft) -> &Memory| self.draft.as_ref().map_or(0, |draft| part(draft).address());
        // The draft's own kernels have no times.
        let timed = matches!(program, Program::Model | Program::Round);
        let trace = self.trace.as_ref().filter(|_| timed);
        let input = |word: usize| self.inputs.address() + ((pass * PASS_WORDS + word) * WORD) as u64;
        let mail = |word: usize| self.mail.address() + ((mail_of(program) + word) * WORD) as u64;
        LaunchArgs {
            weights: self.weights.address(),
            kv: kv.address(),
            arena: arena.address(),
            sync: self.sync.address(),
            logits: self.logits.address(),
            tokens: input(TOKENS),
            positions: input(POSITIONS),
            sequences: input(SEQUENCES),
            logit_index: input(LOGIT_INDEX),
            page_table: self.table.address(),
            stall: mail(STALL),
            chosen: 0,
            halt: mail(HALT),
            trace: trace.map_or(0, Memory::address),
            experts: mail(EXPERTS),
            taps: self.taps,
            sampling: 0,
            choices: self.choices.address(),
            draft_kv: of_draft(|draft| &draft.kv),
            block_arena: of_draft(|draft| &draft.block),
            inject_arena: of_draft(|draft| &draft.inject),
            round: input(ROUND),
            patience_ns: u64::try_from(self.patience.as_nanos()).unwrap_or(u64::MAX),
            rows: rows as u32,
            logit_rows: logit_rows as u32,
            pages_per_sequence: pages.pages_per_sequence() as u32,
            kv_pages: self.pages as u32,
            steps: 1,
            stop_count: 0,
            stop_tokens: [0; STOP_TOKENS],
            in_flight: in_flight(self.device.memory_rate(), self.device.blocks()),
            zero: 0,
            routing: self.routing.map_or(0, |routing| 1 + u32::from(routing.shared_permille)),
            routing_seed: self.routing.map_or(0, |routing| routing.seed),
            round_sequences: 0,
            block_passes: 0,
            accept: 0,
            foresee: FORESEE_BYTES,
        }
    }

    fn ready(&self) -> Result<(), StepError> {
        match &self.poisoned {
            Some(reason) => Err(StepError::Poisoned { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Looks whether a wait of a kernel gave up, that of `program` or one that was queued in front of it, and
    /// at how the host's own wait ended.
    fn finish(
        &mut self,
        plan: &Plan,
        program: Program,
        result: Result<(), Trouble>,
    ) -> Result<(), StepError> {
        let injecting = std::mem::take(&mut self.injecting);
        let before = injecting && self.stall(INJECT_MAIL).code != 0;
        let (mail, stages) = match (if before { Program::Inject } else { program }, &plan.draft) {
            (Program::Inject, Some(draft)) => (INJECT_MAIL, &draft.inject.stages),
            (Program::Block, Some(draft)) => (0, &draft.block_pass.stages),
            (Program::Round, Some(DraftPlan { round: Some(round), .. })) => (0, &round.stages),
            _ => (0, &plan.stages),
        };
        // The kernel counts the three steps of a round.
        let steps = if program == Program::Round && !before { 3 } else { 1 };
        match result {
            Ok(()) if self.stall(mail).code == 0 => Ok(()),
            // The kernel ended well, and yet says that it is stuck.
            Ok(()) => Err(self.fail_at(mail, (stages, steps), Trouble::Silent(Duration::ZERO))),
            Err(trouble) => Err(self.fail_at(mail, (stages, steps), trouble)),
        }
    }

    /// The record in a mail.
    fn stall(&self, mail: usize) -> StallRecord {
        let words = &self.mail.words()[mail + STALL..][..STALL_WORDS];
        // The code is written last.
        let code = words[0].load(Ordering::Acquire);
        let word = |at: usize| words[at].load(Ordering::Relaxed);
        StallRecord {
            code,
            stage: word(1),
            sm: word(2),
            role: word(3),
            seen: word(4),
            expected: word(5),
            step: word(6),
            reserved: word(7),
        }
    }

    /// Ends the use of this engine with the error that says most.
    fn fail(&mut self, stages: &[String], trouble: Trouble) -> StepError {
        self.fail_at(0, (stages, 1), trouble)
    }

    /// The same, where a kernel would have left its record in this mail, whose stages have these names, and so many
    /// steps are one to the host.
    fn fail_at(
        &mut self,
        mail: usize,
        (stages, steps_of_round): (&[String], u32),
        trouble: Trouble,
    ) -> StepError {
        let record = self.stall(mail);
        if let Trouble::Silent(after) = trouble
            && !after.is_zero()
        {
            // Whether the kernel still looks at this is unknown: its memory must stay.
            for mail in [0, INJECT_MAIL] {
                self.mail.words()[mail + HALT].store(1, Ordering::Release);
            }
            self.device.abandon();
        }
        let error = match trouble {
            _ if record.code != 0 => {
                let stage = match record.stage as usize {
                    at if at < stages.len() => stages[at].clone(),
                    // Behind the head, if tokens are chosen by chance.
                    at if at == stages.len() => "choice of tokens".into(),
                    at => format!("number {at}"),
                };
                StepError::Stuck {
                    stage,
                    step: record.step / steps_of_round,
                    sm: record.sm,
                    who: record.role_name(),
                    seen: record.seen,
                    expected: record.expected,
                }
            }
            Trouble::Failed(error) => error.into(),
            Trouble::Silent(after) => StepError::Silent { after },
        };
        self.poisoned = Some(error.to_string());
        error
    }

    /// From now on experts are chosen so; by the model if `None`.
    pub fn set_routing(&mut self, routing: Option<RandomRouting>) {
        self.routing = routing;
    }

    /// What is known of experts since this was asked for last.
    pub fn take_expert_counts(&mut self) -> ExpertCounts {
        let [chosen, foreseen, wrong] =
            [0, 1, 2].map(|at| self.mail.words()[EXPERTS + at].swap(0, Ordering::Relaxed));
        ExpertCounts { chosen, foreseen, wrong }
    }

    /// Times of the last step, or of the last round of a launch, in nanoseconds.
    pub fn profile(&self) -> Option<&[u64]> {
        let host = self.trace_host.as_ref().filter(|_| self.poisoned.is_none())?;
        let bytes = self.device.blocks() * self.traced * TRACE_FIELDS * 8;
        // SAFETY: every step waits for what it queued, or fails for good.
        Some(bytemuck::cast_slice(unsafe { host.slice(0..bytes.min(host.bytes())) }))
    }

    /// What the GPU's memory is for, but for the pages that are in use.
    pub fn memory(&self) -> Breakdown {
        let bytes = |memory: &Memory| memory.bytes() as u64;
        let small = [&self.sync, &self.choices, &self.logits, &self.inputs, &self.table].map(bytes);
        let draft = |of: fn(&CudaDraft) -> u64| self.draft.as_ref().map_or(0, of);
        Breakdown {
            weights: bytes(&self.weights),
            kv: bytes(&self.kv) + draft(|draft| draft.kv.bytes() as u64),
            kv_used: 0,
            arena: bytes(&self.arena) + draft(|draft| (draft.inject.bytes() + draft.block.bytes()) as u64),
            scratch: small.iter().sum::<u64>() + self.trace.as_ref().map_or(0, bytes),
            code: self.device.code_bytes() as u64,
        }
    }

    /// Blocks of a launch.
    pub fn blocks(&self) -> usize {
        self.device.blocks()
    }

    /// Bytes per second of the memory at best.
    pub fn memory_rate(&self) -> Option<f64> {
        self.device.memory_rate().map(|rate| rate as f64)
    }
}

impl Drop for CudaEngine {
    fn drop(&mut self) {
        if self.poisoned.is_none() && !self.injecting {
            return;
        }
        // Whatever is left in the queue goes first; if it does not, nothing may be freed.
        let quiet = wait(&mut *self.device, MARGIN, Duration::ZERO, &mut || 0);
        if matches!(quiet, Err(Trouble::Silent(_))) {
            self.device.abandon();
        }
    }
}

/// What is wrong with logits for which the kernel gives this in place of a token.
const fn broken(token: u32) -> Option<&'static str> {
    match token {
        BROKEN_LOGITS => Some("a logit is NaN or +infinity: the model's numbers broke down"),
        NO_LOGITS => Some("no token is possible: no logit is above -infinity"),
        _ => None,
    }
}

/// The kernel knows some of the tokens that end a text; this side looks for all of them.
fn set_stops(args: &mut LaunchArgs, stop_tokens: &[u32]) {
    for (to, token) in args.stop_tokens.iter_mut().zip(stop_tokens) {
        *to = *token;
    }
    args.stop_count = stop_tokens.len().min(STOP_TOKENS) as u32;
}

/// Where the mail of a program begins.
const fn mail_of(program: Program) -> usize {
    match program {
        Program::Model | Program::Block | Program::Round => 0,
        Program::Inject => INJECT_MAIL,
    }
}

/// Rows that a program's kernel has at a time.
fn step_rows(plan: &Plan, program: Program) -> usize {
    let draft = plan.draft.as_ref();
    let kernel = match program {
        Program::Model => plan.resident,
        Program::Inject => draft.and_then(|draft| draft.inject.resident),
        Program::Block => draft.and_then(|draft| draft.block_pass.resident),
        Program::Round => draft.and_then(|draft| draft.round.as_ref()).and_then(|round| round.resident),
    };
    kernel.map_or(SLICE_ROWS, |kernel| kernel.step_rows)
}

/// Rows that every kernel of a plan has at a time.
fn narrowest(plan: &Plan) -> usize {
    let programs = [Program::Model, Program::Inject, Program::Block];
    let programs = &programs[..if plan.draft.is_some() { 3 } else { 1 }];
    programs.iter().map(|program| step_rows(plan, *program)).min().unwrap_or(SLICE_ROWS)
}

/// The passes of a step, of at most `most` rows: which rows, and which of the wanted rows of logits, each has.
fn split(rows: usize, logit_rows: &[u32], most: usize) -> Vec<Pass> {
    let starts = (0..rows).step_by(most);
    with_wanted(starts.map(|start| start..rows.min(start + most)), logit_rows)
}

/// The passes of blocks, which are not cut: their rows see each other. As many of them as fit to a pass.
fn split_blocks(rows: &[RowInput], logit_rows: &[u32], most: usize) -> Vec<Pass> {
    let mut passes: Vec<Range<usize>> = Vec::new();
    let mut end = 0;
    for block in rows.chunk_by(|a, b| a.sequence == b.sequence) {
        let start = end;
        end += block.len();
        match passes.last_mut() {
            Some(last) if end - last.start <= most => last.end = end,
            _ => passes.push(start..end),
        }
    }
    with_wanted(passes.into_iter(), logit_rows)
}

/// Passes of at most `most` rows that the blocks of a round take, as the kernel deals them out: see [`split_blocks`].
fn block_passes(sequences: &[RoundSequence], most: usize) -> usize {
    let (mut passes, mut rows) = (0, most);
    for of in sequences.iter().map(|of| of.rows as usize) {
        if rows + of > most {
            (passes, rows) = (passes + 1, 0);
        }
        rows += of;
    }
    passes
}

/// Adds to each pass which of the wanted rows of logits it has.
fn with_wanted(passes: impl Iterator<Item = Range<usize>>, logit_rows: &[u32]) -> Vec<Pass> {
    let mut wanted = 0;
    passes
        .map(|pass| {
            let first = wanted;
            wanted += logit_rows[first..].iter().take_while(|row| (**row as usize) < pass.end).count();
            (pass, first..wanted)
        })
        .collect()
}

/// How far the tokens of a launch were told of.
struct Told {
    steps: usize,
    /// Whether a token ended the launch.
    ended: bool,
    /// A token that is none: step, row, token.
    bad: Option<(usize, usize, u32)>,
}

impl Told {
    /// Tells of the steps whose tokens are all there.
    fn look(
        &mut self,
        chosen: &[AtomicU32],
        rows: usize,
        steps: usize,
        vocab: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) {
        while self.steps < steps && !self.ended {
            let words = &chosen[self.steps * LAUNCH_ROWS..][..rows];
            let mut tokens = [0; LAUNCH_ROWS];
            for (token, word) in tokens.iter_mut().zip(words) {
                match word.load(Ordering::Acquire) {
                    0 => return,
                    word => *token = word - 1,
                }
            }
            for (row, token) in tokens[..rows].iter().copied().enumerate() {
                if token as usize >= vocab {
                    self.bad = Some((self.steps, row, token));
                    self.ended = true;
                    return;
                }
                let flow = on_token(self.steps, row, token);
                self.ended |= flow.is_break() || stop_tokens.contains(&token);
            }
            self.steps += 1;
        }
    }
}

/// How rounds of a launch run.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// How many at most.
    pub rounds: usize,
    /// Tokens behind which the launch ends.
    pub stop_tokens: &'a [u32],
    /// See [`LaunchArgs::accept`].
    pub accept: u32,
}

/// How far the rounds of a launch were told of.
struct ToldRounds {
    rounds: usize,
    /// Whether somebody wanted no more.
    ended: bool,
    /// What is none of the model's tokens, or of the rows that there are: round, row, token.
    bad: Option<(usize, usize, Option<u32>)>,
}

impl ToldRounds {
    /// Tells of the rounds of which all is there.
    fn look(
        &mut self,
        chosen: &[AtomicU32],
        sequences: &[RoundSequence],
        rounds: usize,
        vocab: usize,
        on_round: &mut dyn FnMut(RoundNews<'_>) -> ControlFlow<()>,
    ) {
        while self.rounds < rounds && !self.ended {
            let (results, words) = chosen[self.rounds * ROUND_WORDS..][..ROUND_WORDS].split_at(LAUNCH_ROWS);
            let mut tokens = [0; LAUNCH_ROWS];
            let mut brought = [RoundResult { tokens: 0, right: 0 }; LAUNCH_ROWS];
            for ((of, result), brought) in sequences.iter().zip(results).zip(&mut brought) {
                *brought = match result.load(Ordering::Acquire) {
                    0 => return,
                    word => RoundResult::of(word),
                };
                let first = of.first_row as usize;
                if brought.tokens > of.guesses as usize + 1 {
                    self.bad = Some((self.rounds, first, None));
                    self.ended = true;
                    return;
                }
                for row in first..first + brought.tokens {
                    tokens[row] = match words[row].load(Ordering::Acquire) {
                        0 => return,
                        word => word - 1,
                    };
                    if tokens[row] as usize >= vocab {
                        self.bad = Some((self.rounds, row, Some(tokens[row])));
                        self.ended = true;
                        return;
                    }
                }
            }
            for (number, (of, brought)) in sequences.iter().zip(brought).enumerate() {
                let own = &tokens[of.first_row as usize..][..brought.tokens];
                let news =
                    RoundNews { round: self.rounds, sequence: number, tokens: own, right: brought.right };
                self.ended |= on_round(news).is_break();
            }
            self.rounds += 1;
        }
    }
}

/// Waits until the device is done, and looks at `progress` all the while, once more at the end. Gives up
/// if that stays the same for `limit`. Does not sleep for the first `watch`.
fn wait(
    device: &mut dyn Device,
    limit: Duration,
    watch: Duration,
    progress: &mut dyn FnMut() -> u64,
) -> Result<(), Trouble> {
    let start = Instant::now();
    let (mut last, mut seen) = (start, progress());
    loop {
        let idle = device.idle().map_err(Trouble::Failed)?;
        let now = progress();
        if idle {
            return Ok(());
        }
        let time = Instant::now();
        if now != seen {
            (last, seen) = (time, now);
        } else if time - last > limit {
            return Err(Trouble::Silent(time - last));
        }
        if time - start < watch {
            std::thread::yield_now();
        } else {
            std::thread::sleep(NAP);
        }
    }
}

/// Waits for copies; see [`wait`].
///
/// # Errors
/// What the device says, or that it says nothing.
pub(super) fn wait_for_copies(device: &mut dyn Device) -> Result<(), EngineError> {
    match wait(device, Duration::from_secs(30), Duration::ZERO, &mut || 0) {
        Ok(()) => Ok(()),
        Err(Trouble::Failed(error)) => Err(error.into()),
        Err(Trouble::Silent(after)) => {
            device.abandon();
            Err(EngineError::Silent { after })
        }
    }
}

/// Bytes that an SM has on their way ahead of its consumers: its share of the memory's rate (bytes a second) times
/// the latency of a memory that is not overrun, about 0.8 us. Half or twice as much costs a few per cent of a step.
fn in_flight(memory_rate: Option<u64>, sms: usize) -> u32 {
    const LATENCY: f64 = 0.8e-6;
    let rate = memory_rate.unwrap_or(3_350_000_000_000) as f64 / sms.max(1) as f64;
    (rate * LATENCY) as u32
}
