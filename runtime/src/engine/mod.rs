//! The engine: a loaded plan that runs steps.
//!
//! A step takes rows (a token at a position of a sequence) of any mix of sequences, prompts and
//! decoding alike, writes their keys and values into the cache, and returns the logits of the rows
//! that are asked for. Here is what does not depend on the machine: which rows may come next, and which
//! pages they need. A plan with a draft has two more operations: [`Engine::inject`] tells the draft of rows
//! that are committed, and [`Engine::draft`] lets it guess the tokens behind them. The work itself is done by one of two back ends, as the plan says.

mod cpu;
mod error;
mod proposal;
mod team;
#[cfg(test)]
pub(crate) mod tests;

pub use error::{EngineError, StepError};
pub use proposal::Proposal;

use crate::checkpoint::Checkpoint;
use crate::conversion::Conversion;
use crate::cuda::{self, CudaEngine};
use crate::cuda::{ExpertCounts, RandomRouting};
use crate::kv::PageTable;
use crate::memory::Breakdown;
use crate::native::{Entry, NativeCode};
use crate::pack::{PackedWeights, pack, pack_cached};
use crate::sampling::SamplingParams;
use cpu::CpuEngine;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tilec_ir::launch::{RoundSequence, SampleRow};
use tilec_ir::plan::{Plan, WeightsFrom};

/// Spins after which a wait of a worker for the others gives up, by default: of the order of ten
/// seconds, so that a busy machine is no error, and a fault is one soon enough.
pub const SPIN_LIMIT: u64 = 1 << 29;

/// Time after which a wait of a resident kernel gives up, by default: a thousand times what a step of a
/// large model takes.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// Ticks of a stage on a worker: start, end of its waits, end.
pub const PROFILE_FIELDS: usize = 3;

/// Steps that [`Engine::decode`] takes at most.
pub const MAX_DECODE_STEPS: usize = cuda::DECODE_STEPS;

/// Rounds that [`Engine::rounds`] takes at most.
pub const MAX_ROUNDS: usize = cuda::ROUNDS;

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
    /// Spins after which a wait of a worker on the processor gives up.
    pub spin_limit: u64,
    /// Number of the GPU, for plans that run on one.
    pub device: usize,
    /// Time after which a wait on a GPU gives up.
    pub patience: Duration,
    /// Whether the plan's draft is loaded, if it has one.
    pub draft: bool,
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
            device: 0,
            patience: PATIENCE,
            draft: true,
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

/// What the draft is to guess: the tokens behind the last one of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockInput {
    /// The last token of the sequence, which the model has not processed.
    pub token: u32,
    /// Its position: the length of the draft's context, or less to go back.
    pub position: u32,
    /// Sequence.
    pub sequence: u32,
    /// Rows of the block, the token included: 2 to the plan's. Guesses depend on it.
    pub rows: usize,
    /// Guesses whose logits are wanted: the first of `rows - 1`.
    pub wanted: usize,
}

/// A sequence of [`Engine::rounds`]. One whose block has no rows has no guesses: each round adds a token. Those
/// stand behind all others, of which there is at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundInput {
    /// The block of its first round, whose `wanted` guesses are verified in each round.
    pub block: BlockInput,
    /// Tokens that may be added at most, from 1 on.
    pub left: usize,
    /// Positions that it gets pages for: a round begins while it fits into them, as the first one does. At most the
    /// plan's context.
    pub limit: usize,
}

/// What a round of [`Engine::rounds`] brought a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundNews<'a> {
    /// Number of the round in the launch.
    pub round: usize,
    /// Number of the sequence among the inputs.
    pub sequence: usize,
    /// Tokens that it adds, at least one.
    pub tokens: &'a [u32],
    /// Guesses among them.
    pub right: usize,
}

/// How [`Engine::rounds`] ends, and what it is for.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundOptions<'a> {
    /// Rounds at most, from 1 to [`MAX_ROUNDS`].
    pub rounds: usize,
    /// Tokens that end it: behind the round in which a text chose one.
    pub stop_tokens: &'a [u32],
    /// For measurements: tokens that a round adds on average, whatever was guessed.
    pub accept: Option<f64>,
}

/// A loaded plan with its weights, memory and threads.
pub struct Engine {
    plan: Plan,
    pages: PageTable,
    /// Pages that a step has to zero first.
    stale: Vec<u32>,
    /// Positions of every sequence whose keys and values are in the cache.
    lengths: Vec<usize>,
    /// Number of the last step that a sequence had rows in.
    seen: Vec<u64>,
    steps: u64,
    /// Rows of the last step, whose taps are still there; none if it failed.
    tapped: Vec<RowInput>,
    /// Positions of every sequence in the draft's context.
    draft_lengths: Vec<usize>,
    /// What was converted while packing.
    conversions: Vec<Conversion>,
    back: Back,
}

/// What does the work.
enum Back {
    Cpu(Box<CpuEngine>),
    Cuda(Box<CudaEngine>),
}

impl Engine {
    /// Loads a plan: reads and packs its weights (or finds them in the cache), loads its code, and
    /// starts its threads or opens its GPU. `progress(done, total)` is told of bytes packed and copied.
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
        if plan.resident.is_some() {
            let gpu = cuda::Gpu::open(options.device, folder, &plan, options.draft)?;
            let mut engine = Engine::on_device(plan, Box::new(gpu), options)?;
            if let Back::Cuda(back) = &mut engine.back {
                back.load_weights(&engine.plan, options, progress)?;
            }
            return Ok(engine);
        }
        let code = NativeCode::load(folder, &plan.code, &plan.target)?;
        let draft = match plan.draft.as_ref().filter(|_| options.draft) {
            Some(draft) => Some([
                NativeCode::load(folder, &draft.inject.code, &plan.target)?,
                NativeCode::load(folder, &draft.block_pass.code, &plan.target)?,
            ]),
            None => None,
        };
        let entry = code.entry().expect("a loaded plan has its entry: `load` checks");
        let checkpoint = open_checkpoint(&plan, options)?;
        let weights = packed_weights(&checkpoint, &plan, options, progress)?;
        let conversions = weights.conversions().to_vec();
        // SAFETY: the code came with the plan, under its checksum, and stays loaded beside it.
        let engine =
            unsafe { Engine::on_threads(plan, Box::new(weights), entry, Some(code), draft, options) };
        Ok(Engine { conversions, ..engine? })
    }

    /// What was converted when the weights were packed, and what it cost; nothing of weights that came
    /// from the cache, or for a GPU.
    pub fn conversions(&self) -> &[Conversion] {
        &self.conversions
    }

    /// An engine on a function in place of a plan's native code.
    ///
    /// # Safety
    /// `entry` must do what the plan and [`tilec_ir::abi::StepArgs`] promise: touch only the memory that
    /// they describe, and return on every worker.
    ///
    /// # Errors
    /// [`EngineError`] if weights are too few or not aligned, or memory or threads cannot be had.
    pub unsafe fn with_entry(
        plan: Plan,
        weights: Weights,
        entry: Entry,
        options: &EngineOptions,
    ) -> Result<Engine, EngineError> {
        // SAFETY: the caller's promise.
        unsafe { Engine::on_threads(plan, weights, entry, None, None, options) }
    }

    /// # Safety
    /// See [`Engine::with_entry`].
    unsafe fn on_threads(
        plan: Plan,
        weights: Weights,
        entry: Entry,
        code: Option<NativeCode>,
        draft: Option<[NativeCode; 2]>,
        options: &EngineOptions,
    ) -> Result<Engine, EngineError> {
        let pages = PageTable::new(&plan, options.kv_pages.unwrap_or(usize::MAX));
        // SAFETY: the caller's promise.
        let back = unsafe { CpuEngine::new(&plan, weights, entry, code, draft, pages.pages(), options) }?;
        Ok(Engine::new(plan, pages, Back::Cpu(Box::new(back))))
    }

    /// An engine on a device with the plan's kernel; the weights are still to come.
    pub(crate) fn on_device(
        plan: Plan,
        device: Box<dyn cuda::Device>,
        options: &EngineOptions,
    ) -> Result<Engine, EngineError> {
        let pages = PageTable::new(&plan, options.kv_pages.unwrap_or(usize::MAX));
        let back = CudaEngine::new(&plan, device, pages.pages(), options)?;
        Ok(Engine::new(plan, pages, Back::Cuda(Box::new(back))))
    }

    fn new(plan: Plan, pages: PageTable, back: Back) -> Engine {
        Engine {
            pages,
            stale: Vec::new(),
            lengths: vec![0; plan.limits.sequences],
            seen: vec![0; plan.limits.sequences],
            steps: 0,
            tapped: Vec::new(),
            draft_lengths: vec![0; plan.limits.sequences],
            conversions: Vec::new(),
            back,
            plan,
        }
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
        self.begin_step(rows, logit_rows)?;
        let logits = match &mut self.back {
            Back::Cpu(back) => back.step(&self.plan, &self.pages, rows, logit_rows)?,
            Back::Cuda(back) => back.step(&self.plan, &self.pages, rows, logit_rows)?,
        };
        for row in rows {
            self.lengths[row.sequence as usize] = row.position as usize + 1;
        }
        self.tapped.extend_from_slice(rows);
        Ok(logits)
    }

    /// As [`Engine::step`], on engines with a resident kernel, but gives only the token of the largest logit
    /// of each row that `logit_rows` names, the lowest id among equals: logits then need not leave the GPU.
    ///
    /// # Errors
    /// As [`Engine::step`]; also without a resident kernel.
    pub fn step_greedy(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<Vec<u32>, StepError> {
        self.step_sampled(rows, logit_rows, &[])
    }

    /// As [`Engine::step_greedy`], with tokens that are chosen as `sampling` says, which has an entry for each
    /// row that `logit_rows` names, or none: then all are the largest logits. They are the tokens that a
    /// [`crate::sampling::Sampler`] chooses from the rows' logits, each for the position behind its row's.
    ///
    /// # Errors
    /// As [`Engine::step`]; also without a resident kernel, for parameters that are out of range or that kernels
    /// do not know, and for logits that nothing can be chosen from.
    pub fn step_sampled(
        &mut self,
        rows: &[RowInput],
        logit_rows: &[u32],
        sampling: &[&SamplingParams],
    ) -> Result<Vec<u32>, StepError> {
        if !self.is_resident() {
            return Err(StepError::NotResident);
        }
        let sampling = launch_rows(sampling, logit_rows.len())?;
        self.begin_step(rows, logit_rows)?;
        let Back::Cuda(back) = &mut self.back else { return Err(StepError::NotResident) };
        let tokens = back.step_tokens(&self.plan, &self.pages, rows, logit_rows, &sampling)?;
        for row in rows {
            self.lengths[row.sequence as usize] = row.position as usize + 1;
        }
        self.tapped.extend_from_slice(rows);
        Ok(tokens)
    }

    /// Checks the rows of a step and gets pages for them.
    fn begin_step(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<(), StepError> {
        self.check(rows, logit_rows)?;
        self.reserve(rows.iter().map(|row| (row.sequence as usize, row.position as usize + 1)))?;
        self.tapped.clear();
        for row in rows {
            // What the draft knows of the positions from here on is about other tokens.
            let known = &mut self.draft_lengths[row.sequence as usize];
            *known = (*known).min(row.position as usize);
        }
        Ok(())
    }

    /// Rows of a block that the draft takes at most, if there is a draft.
    pub fn draft_block(&self) -> Option<usize> {
        let loaded = match &self.back {
            Back::Cpu(back) => back.has_draft(),
            Back::Cuda(back) => back.has_draft(),
        };
        self.plan.draft.as_ref().filter(|_| loaded).map(|draft| draft.block)
    }

    /// Positions of a sequence in the draft's context.
    pub fn draft_length(&self, sequence: usize) -> usize {
        self.draft_lengths.get(sequence).copied().unwrap_or(0)
    }

    /// Adds rows of the last step to the draft's context: those whose tokens are part of their texts.
    /// `rows` has their numbers, ascending. In each sequence the first is at the length of the draft's
    /// context, and the others follow it without a gap.
    ///
    /// # Errors
    /// [`StepError`]; when it was refused, nothing has changed.
    pub fn inject(&mut self, rows: &[u32]) -> Result<(), StepError> {
        if self.draft_block().is_none() {
            return Err(StepError::NoDraft);
        }
        let ascending = rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || rows.last().is_some_and(|row| *row as usize >= self.tapped.len()) {
            return Err(StepError::Inject { rows: self.tapped.len() });
        }
        if rows.is_empty() {
            return Ok(());
        }
        let chosen: Vec<RowInput> = rows.iter().map(|row| self.tapped[*row as usize]).collect();
        for (number, row) in chosen.iter().enumerate() {
            let before = number.checked_sub(1).map(|before| chosen[before]);
            let context = match before.filter(|before| before.sequence == row.sequence) {
                Some(before) => before.position as usize + 1,
                None => self.draft_lengths[row.sequence as usize],
            };
            if row.position as usize != context {
                let (sequence, position) = (row.sequence, row.position);
                return Err(StepError::DraftGap { sequence, context, position });
            }
        }
        match &mut self.back {
            Back::Cpu(back) => back.inject(&self.plan, &self.pages, &chosen, rows)?,
            Back::Cuda(back) => back.inject(&self.plan, &self.pages, &chosen, rows)?,
        }
        for row in &chosen {
            self.draft_lengths[row.sequence as usize] = row.position as usize + 1;
        }
        Ok(())
    }

    /// Lets the draft guess blocks, each of another sequence, in one pass: the logits of the wanted
    /// guesses, `[guesses][vocab]`, block by block. The first is for the position behind the block's token.
    ///
    /// # Errors
    /// [`StepError`]; when it was refused, nothing has changed.
    pub fn draft(&mut self, blocks: &[BlockInput]) -> Result<&[f32], StepError> {
        let (rows, logit_rows) = self.begin_blocks(blocks)?;
        match (&mut self.back, &self.plan.draft) {
            (Back::Cpu(back), Some(draft)) => back.block(draft, &self.pages, &rows, &logit_rows),
            (Back::Cuda(back), Some(_)) => back.block(&self.plan, &self.pages, &rows, &logit_rows),
            (_, None) => Err(StepError::NoDraft),
        }
    }

    /// As [`Engine::draft`], but gives only the guesses themselves: the most likely token behind the guess
    /// before it, by a draft that has a selector, else the token of the largest logit; of equals the one with
    /// the larger logit or the lower id. `None` for what a broken draft says, and behind that: logits that are
    /// no numbers, where they are looked at.
    ///
    /// # Errors
    /// As [`Engine::draft`].
    pub fn guess(&mut self, blocks: &[BlockInput]) -> Result<Vec<Option<u32>>, StepError> {
        if !self.is_resident() {
            return self.guess_by(blocks, &mut |_, _, proposal| proposal.best());
        }
        let (rows, logit_rows) = self.begin_blocks(blocks)?;
        let Back::Cuda(back) = &mut self.back else { return Err(StepError::NotResident) };
        let tokens = back.guess(&self.plan, &self.pages, &rows, &logit_rows)?;
        Ok(tokens.into_iter().map(Some).collect())
    }

    /// As [`Engine::guess`], with guesses that `choose(block, guess, proposal)` chooses, by their places in what
    /// the draft says of them: block by block, and in a block from the first on. Where it chooses nothing, the
    /// block has no guesses from there on.
    ///
    /// # Errors
    /// As [`Engine::draft`].
    pub fn guess_by(
        &mut self,
        blocks: &[BlockInput],
        choose: &mut dyn FnMut(usize, usize, Proposal<'_>) -> Option<usize>,
    ) -> Result<Vec<Option<u32>>, StepError> {
        let (rows, logit_rows) = self.begin_blocks(blocks)?;
        let (logits, pairs) = match (&mut self.back, &self.plan.draft) {
            (Back::Cpu(back), Some(draft)) => {
                back.block(draft, &self.pages, &rows, &logit_rows)?;
                back.proposals(draft, logit_rows.len())?
            }
            (Back::Cuda(back), Some(_)) => (back.block(&self.plan, &self.pages, &rows, &logit_rows)?, None),
            (_, None) => return Err(StepError::NoDraft),
        };
        let vocab = self.plan.vocab;
        let mut tokens = Vec::with_capacity(logit_rows.len());
        for (block, input) in blocks.iter().enumerate() {
            // The place of the guess before; any, behind the token that is known.
            let mut before = Some(0);
            for guess in 0..input.wanted {
                let number = tokens.len();
                let proposal = |before| match pairs {
                    Some(pairs) => pairs.behind(number, before),
                    None => Proposal::Logits(&logits[number * vocab..][..vocab]),
                };
                let token = before.map(proposal).and_then(|proposal| {
                    before = choose(block, guess, proposal).filter(|place| *place < proposal.scores().len());
                    before.map(|place| proposal.token(place))
                });
                tokens.push(token);
            }
        }
        Ok(tokens)
    }

    /// The rows of blocks and which of them are wanted, checked, with pages.
    fn begin_blocks(&mut self, blocks: &[BlockInput]) -> Result<(Vec<RowInput>, Vec<u32>), StepError> {
        let (Some(max), Some(draft)) = (self.draft_block(), &self.plan.draft) else {
            return Err(StepError::NoDraft);
        };
        let mask = draft.mask_token;
        let mut rows = Vec::new();
        let mut logit_rows = Vec::new();
        for block in blocks {
            let (sequence, context) = (block.sequence, self.draft_length(block.sequence as usize));
            if !(2..=max).contains(&block.rows) || block.wanted >= block.rows {
                return Err(StepError::Block { rows: block.rows, max });
            }
            if block.position as usize > context {
                return Err(StepError::DraftGap { sequence, context, position: block.position });
            }
            let first = rows.len() as u32;
            logit_rows.extend(first + 1..first + 1 + block.wanted as u32);
            rows.extend((0..block.rows as u32).map(|row| RowInput {
                token: if row == 0 { block.token } else { mask },
                position: block.position.saturating_add(row),
                sequence,
            }));
        }
        self.check(&rows, &[])?;
        let room = draft_logit_rows(&self.plan);
        if logit_rows.len() > room {
            return Err(StepError::LogitRows { rows: logit_rows.len(), max: room });
        }
        self.reserve(rows.iter().map(|row| (row.sequence as usize, row.position as usize + 1)))?;
        for block in blocks {
            // The block's keys and values lie where those of the context will come.
            self.draft_lengths[block.sequence as usize] = block.position as usize;
        }
        Ok((rows, logit_rows))
    }

    /// Whether this engine has [`Engine::decode`]: its plan has a resident kernel.
    pub fn is_resident(&self) -> bool {
        matches!(self.back, Back::Cuda(_))
    }

    /// Rows that a step has for the price of one, where reading the weights is all that it costs; `None` on
    /// a processor, where every row costs.
    pub fn pass_rows(&self) -> Option<usize> {
        self.plan.resident.map(|kernel| kernel.step_rows)
    }

    /// Rows that [`Engine::decode`] takes.
    pub fn max_decode_rows(&self) -> usize {
        self.pass_rows().unwrap_or(1).min(self.plan.limits.max_rows)
    }

    /// Decodes up to `steps` tokens of each row's sequence in one launch, greedily: the largest logit,
    /// the lowest id among equals. Every row is the last token of a sequence of its own; each step goes
    /// on with the tokens that the one before chose, one position on.
    ///
    /// `on_token(step, row, token)` is told of every token as soon as it is there, step by step, rows in
    /// their order. All ends after the step in which a token is one of `stop_tokens` or the callback
    /// breaks. Returns how many steps that were: so many tokens of each row were told of, and each
    /// sequence is at its row's position plus so many. The token that was chosen last is not processed.
    ///
    /// # Errors
    /// [`StepError`]; as with [`Engine::step`], sequences are at their old lengths then.
    pub fn decode(
        &mut self,
        rows: &[RowInput],
        steps: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        self.decode_sampled(rows, &[], steps, stop_tokens, on_token)
    }

    /// As [`Engine::decode`], with tokens that are chosen as `sampling` says: see [`Engine::step_sampled`].
    ///
    /// # Errors
    /// As [`Engine::decode`] and [`Engine::step_sampled`]. Tokens of steps before the one whose logits are broken
    /// were told of.
    pub fn decode_sampled(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        steps: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        if !self.is_resident() {
            return Err(StepError::NotResident);
        }
        let most = self.max_decode_rows();
        if rows.len() > most {
            return Err(StepError::Rows { rows: rows.len(), max: most });
        }
        if !(1..=cuda::DECODE_STEPS).contains(&steps) {
            return Err(StepError::Steps { steps, max: cuda::DECODE_STEPS });
        }
        self.check(rows, &[])?;
        let sampling = launch_rows(sampling, rows.len())?;
        let context = self.plan.limits.context;
        for (row, input) in rows.iter().enumerate() {
            if rows[..row].iter().any(|other| other.sequence == input.sequence) {
                return Err(StepError::Twice { row, sequence: input.sequence });
            }
            if input.position as usize + steps > context {
                let position = input.position + steps as u32 - 1;
                return Err(StepError::Context { row, position, context });
            }
        }
        self.reserve(rows.iter().map(|row| (row.sequence as usize, row.position as usize + steps)))?;
        // The taps of all steps but the last are gone, and the draft is told of none.
        self.tapped.clear();
        for row in rows {
            let known = &mut self.draft_lengths[row.sequence as usize];
            *known = (*known).min(row.position as usize);
        }
        let Back::Cuda(back) = &mut self.back else { return Err(StepError::NotResident) };
        let done = back.decode(&self.plan, &self.pages, (rows, &sampling), steps, stop_tokens, on_token);
        for row in rows {
            let sequence = row.sequence as usize;
            if let Ok(done) = done {
                self.lengths[sequence] = row.position as usize + done;
            }
            // Pages for steps that did not run are for others.
            self.pages.trim(sequence, self.lengths[sequence]);
        }
        done
    }

    /// Whether whole rounds of the draft run in one launch, those of sequences with so many rows of blocks and of
    /// the model's step in all: see [`Engine::rounds`].
    pub fn has_rounds(&self, block_rows: usize, rows: usize) -> bool {
        let (blocks, most) = (self.plan.limits.max_rows, self.max_decode_rows());
        match &self.back {
            Back::Cuda(back) => back.has_rounds(&self.plan) && block_rows <= blocks && rows <= most,
            Back::Cpu(_) => false,
        }
    }

    /// Sequences of [`Engine::rounds`] at most: each could have a guess.
    pub fn max_round_sequences(&self) -> usize {
        self.max_decode_rows() / 2
    }

    /// Runs rounds of the draft in one launch. In each, a block behind the last token of every sequence guesses, a
    /// step of the model verifies, its tokens are taken up to the first guess that it did not choose, and the draft's
    /// context follows. The tokens are those of single steps, chosen as `sampling` says: see
    /// [`Engine::step_sampled`]; it has an entry for each sequence, or none.
    ///
    /// `on_round` is told of every sequence of `inputs` in every round, as soon as its tokens are there. All ends
    /// behind the round in which the callback breaks, or a sequence chose a stop token, had all tokens that it may
    /// have, or has no room for another round. Returns how many rounds were told of. Each sequence, and what the draft
    /// knows of it, is at the position of its last token then, which is not processed.
    ///
    /// # Errors
    /// [`StepError`]; as with [`Engine::step`], sequences are at their old lengths then.
    pub fn rounds(
        &mut self,
        inputs: &[RoundInput],
        sampling: &[&SamplingParams],
        options: RoundOptions<'_>,
        on_round: &mut dyn FnMut(RoundNews<'_>) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        let RoundOptions { rounds, stop_tokens, accept } = options;
        let block_rows = inputs.iter().map(|input| input.block.rows).sum();
        let rows = inputs.iter().map(|input| input.block.wanted + 1).sum::<usize>();
        let max = self.max_decode_rows();
        let most = self.max_round_sequences();
        if !self.has_rounds(0, 0) {
            return Err(if self.is_resident() { StepError::NoDraft } else { StepError::NotResident });
        }
        if inputs.len() > most {
            return Err(StepError::Rows { rows: inputs.len(), max: most });
        }
        if inputs.is_empty() || !self.has_rounds(block_rows, rows) {
            let max = if rows > max || inputs.is_empty() { max } else { self.plan.limits.max_rows };
            return Err(StepError::Rows { rows: rows.max(block_rows), max });
        }
        if !(1..=MAX_ROUNDS).contains(&rounds) {
            return Err(StepError::Steps { steps: rounds, max: MAX_ROUNDS });
        }
        let each = launch_rows(sampling, inputs.len())?;
        let of = each.iter().zip(inputs);
        let sampling: Vec<SampleRow> =
            of.flat_map(|(row, input)| std::iter::repeat_n(*row, input.block.wanted + 1)).collect();
        let context = self.plan.limits.context;
        let mut sequences = Vec::with_capacity(inputs.len());
        let mut first_row = 0;
        for (row, RoundInput { block, left, limit }) in inputs.iter().enumerate() {
            let room = block.position as usize + block.rows.max(block.wanted + 1);
            if room > *limit || *limit > context {
                return Err(StepError::Context { row, position: room.max(*limit) as u32 - 1, context });
            }
            // Only behind those with guesses.
            let rests = (block.rows, block.wanted) == (0, 0) && inputs[0].block.rows > 0;
            let after = !rests && row > 0 && inputs[row - 1].block.rows == 0;
            if block.rows.min(block.wanted) == 0 && !rests || after || *left == 0 {
                return Err(StepError::Block {
                    rows: block.rows,
                    max: self.plan.draft.as_ref().map_or(0, |d| d.block),
                });
            }
            sequences.push(RoundSequence {
                token: block.token,
                position: block.position,
                sequence: block.sequence,
                guesses: block.wanted as u32,
                rows: block.rows as u32,
                left: u32::try_from(*left).unwrap_or(u32::MAX),
                limit: *limit as u32,
                first_row,
            });
            first_row += block.wanted as u32 + 1;
        }
        let blocks = inputs.iter().map(|input| input.block).filter(|block| block.rows > 0);
        self.begin_blocks(&blocks.collect::<Vec<_>>())?;
        let plain = inputs.iter().filter(|input| input.block.rows == 0);
        let plain =
            plain.map(|RoundInput { block: BlockInput { token, position, sequence, .. }, .. }| RowInput {
                token: *token,
                position: *position,
                sequence: *sequence,
            });
        let plain: Vec<RowInput> = plain.collect();
        if !plain.is_empty() {
            self.check(&plain, &[])?;
        }
        // What the draft knows of a text without guesses may end before it: then it stays.
        for row in &plain {
            let known = &mut self.draft_lengths[row.sequence as usize];
            *known = (*known).min(row.position as usize);
        }
        self.reserve(inputs.iter().map(|input| (input.block.sequence as usize, input.limit)))?;
        // The taps of all rounds are injected.
        self.tapped.clear();
        let mut added = vec![0; inputs.len()];
        let launch = cuda::Launch {
            rounds,
            stop_tokens,
            accept: accept.map_or(0, |tokens| (tokens * 1000.0).round() as u32),
        };
        let Back::Cuda(back) = &mut self.back else { return Err(StepError::NotResident) };
        let done = back.rounds(&self.plan, &self.pages, (&sequences, &sampling), launch, &mut |news| {
            added[news.sequence] += news.tokens.len();
            on_round(news)
        });
        for (input, added) in inputs.iter().zip(added) {
            let (sequence, position) = (input.block.sequence as usize, input.block.position as usize);
            if done.is_ok() {
                self.lengths[sequence] = position + added;
                // All rows become the draft's context, which may have a gap in front of them.
                if self.draft_lengths[sequence] == position {
                    self.draft_lengths[sequence] = position + added;
                }
            }
            // Pages for rounds that did not run are for others.
            self.pages.trim(sequence, self.lengths[sequence]);
        }
        done
    }

    /// Makes a sequence `length` positions long with keys and values that no token made: random numbers
    /// from -1 to 1. For measurements behind long contexts; what is computed behind them means nothing.
    ///
    /// # Errors
    /// [`StepError`] for a sequence or a length past the limits, and without pages enough.
    pub fn pretend_length(&mut self, sequence: usize, length: usize) -> Result<(), StepError> {
        let limits = &self.plan.limits;
        if sequence >= limits.sequences {
            let (sequence, sequences) = (sequence as u32, limits.sequences);
            return Err(StepError::Sequence { row: 0, sequence, sequences });
        }
        if length > limits.context {
            let position = length.saturating_sub(1) as u32;
            return Err(StepError::Context { row: 0, position, context: limits.context });
        }
        self.reset(sequence);
        self.reserve([(sequence, length)].into_iter())?;
        let first = sequence * self.pages.pages_per_sequence();
        let pages = self.pages.table()[first..first + self.pages.held_pages(sequence)].to_vec();
        let drafted = match &mut self.back {
            Back::Cpu(back) => {
                back.fill(&pages);
                back.has_draft()
            }
            Back::Cuda(back) => {
                back.fill(&self.plan, &pages)?;
                back.has_draft()
            }
        };
        self.lengths[sequence] = length;
        // Also for the draft.
        self.draft_lengths[sequence] = if drafted { length } else { 0 };
        Ok(())
    }

    /// Fills the KV cache, the activations and the logits with NaN, and from now on every page that a
    /// sequence is given; forgets all sequences. For tests: a resident kernel reads nothing that was not
    /// written, so no number changes by this.
    ///
    /// # Errors
    /// [`StepError`] without a resident kernel, or when the GPU fails.
    pub fn poison(&mut self) -> Result<(), StepError> {
        let Back::Cuda(back) = &mut self.back else { return Err(StepError::NotResident) };
        back.poison(&self.plan)?;
        (0..self.plan.limits.sequences).for_each(|sequence| self.reset(sequence));
        Ok(())
    }

    /// Gives sequences pages for so many positions.
    fn reserve(&mut self, wanted: impl Iterator<Item = (usize, usize)>) -> Result<(), StepError> {
        self.stale.clear();
        let mut wanted = wanted;
        let reserved = wanted
            .try_for_each(|(sequence, positions)| self.pages.reserve(sequence, positions, &mut self.stale));
        // Also if there were too few: those that were given out stay where they are.
        match &mut self.back {
            Back::Cpu(back) => back.clear(&self.stale),
            Back::Cuda(back) => back.clear(&self.plan, &self.stale)?,
        }
        Ok(reserved?)
    }

    fn check(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<(), StepError> {
        self.steps += 1;
        let limits = &self.plan.limits;
        if rows.is_empty() || rows.len() > limits.max_rows {
            return Err(StepError::Rows { rows: rows.len(), max: limits.max_rows });
        }
        for (row, input) in rows.iter().enumerate() {
            let RowInput { token, position, sequence } = *input;
            let number = sequence as usize;
            if token as usize >= self.plan.tokens() {
                return Err(StepError::Token { row, token, vocab: self.plan.tokens() });
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
            self.draft_lengths[sequence] = 0;
            self.pages.release(sequence);
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
    pub fn kv(&self) -> &PageTable {
        &self.pages
    }

    /// Logits of how many rows a step can return.
    pub fn max_logit_rows(&self) -> usize {
        self.plan.buffers[self.plan.logits].rows
    }

    /// What the memory is for: the GPU's, for plans that run on one.
    pub fn memory(&self) -> Breakdown {
        let (pages, free) = (self.pages.pages() as u64, self.pages.free_pages() as u64);
        let memory = match &self.back {
            Back::Cpu(back) => back.memory(),
            Back::Cuda(back) => back.memory(),
        };
        Breakdown { kv_used: memory.kv / pages * (pages - free), ..memory }
    }

    /// Times of the last step if [`EngineOptions::profile`] was set: `[workers][stages]
    /// [start, wait end, end]`, in ticks of the processor's time-stamp counter, or of a length that
    /// [`Engine::tick_seconds`] says. A stage in which a worker had no part is zero.
    ///
    /// A step of a resident kernel that ran in several launches has the times of the last one. Behind
    /// [`Engine::rounds`] these are the times of the last round, with the stages of `draft.round` of the plan.
    pub fn profile(&self) -> Option<&[u64]> {
        match &self.back {
            Back::Cpu(back) => back.profile(),
            Back::Cuda(back) => back.profile(),
        }
    }

    /// From now on experts are chosen so, for measurements; by the model if `None`. False, and nothing
    /// changes, on a processor.
    pub fn set_routing(&mut self, routing: Option<RandomRouting>) -> bool {
        match &mut self.back {
            Back::Cpu(_) => false,
            Back::Cuda(back) => {
                back.set_routing(routing);
                true
            }
        }
    }

    /// What is known of experts since this was asked for last. `None` on a processor.
    pub fn take_expert_counts(&mut self) -> Option<ExpertCounts> {
        match &mut self.back {
            Back::Cpu(_) => None,
            Back::Cuda(back) => Some(back.take_expert_counts()),
        }
    }

    /// Workers that run a step: threads, or SMs of the GPU.
    pub fn workers(&self) -> usize {
        match &self.back {
            Back::Cpu(_) => self.plan.target.workers,
            Back::Cuda(back) => back.blocks(),
        }
    }

    /// Seconds of a tick of [`Engine::profile`], if they are known.
    pub fn tick_seconds(&self) -> Option<f64> {
        match &self.back {
            Back::Cpu(_) => None,
            // The GPU's clock counts nanoseconds.
            Back::Cuda(_) => Some(1e-9),
        }
    }

    /// Bytes per second that the GPU's memory can deliver at best, by its clock and width, if that is
    /// known.
    pub fn memory_rate(&self) -> Option<f64> {
        match &self.back {
            Back::Cpu(_) => None,
            Back::Cuda(back) => back.memory_rate(),
        }
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
    let mut checkpoint = match (&options.checkpoint, &plan.weights) {
        (Some(path), _) | (None, WeightsFrom::Checkpoint { path }) => Checkpoint::open(path)?,
        (None, WeightsFrom::Synthetic { seed, config, tensors }) => {
            Checkpoint::synthetic(config.clone(), *seed, tensors.clone())
        }
    };
    // Its weights are part of the packing, whether it runs or not.
    match plan.draft.as_ref().map(|draft| &draft.weights) {
        Some(WeightsFrom::Checkpoint { path }) => checkpoint.attach_draft(Checkpoint::open_draft(path)?),
        Some(WeightsFrom::Synthetic { seed, config, tensors }) => {
            checkpoint.attach_draft(Checkpoint::synthetic(config.clone(), *seed, tensors.clone()));
        }
        None => {}
    }
    Ok(checkpoint)
}

/// Rows whose logits one pass of the draft can return.
fn draft_logit_rows(plan: &Plan) -> usize {
    plan.draft.as_ref().map_or(0, |draft| draft.block_pass.buffers[draft.logits].rows)
}

/// The packed weights, from the cache if there is one.
pub(crate) fn packed_weights(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &EngineOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<PackedWeights, EngineError> {
    let weights = match &options.cache_dir {
        Some(cache) => pack_cached(checkpoint, &plan.packing, cache, progress)?,
        None => pack(checkpoint, &plan.packing, progress)?,
    };
    tracing::debug!(bytes = weights.len(), cached = weights.from_cache(), "weights are there");
    Ok(weights)
}

impl AsRef<[u8]> for PackedWeights {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

/// Parameters of `rows` rows in numbers for a kernel; none if each row's token is that of the largest logit.
fn launch_rows(sampling: &[&SamplingParams], rows: usize) -> Result<Vec<SampleRow>, StepError> {
    if !sampling.is_empty() && sampling.len() != rows {
        return Err(StepError::Sampling { given: sampling.len(), rows });
    }
    if let Some(row) = sampling.iter().position(|params| !params.is_for_kernels()) {
        return Err(StepError::HostSampling { row });
    }
    for (row, params) in sampling.iter().enumerate() {
        params.validate().map_err(|error| StepError::Parameter { row, problem: error.to_string() })?;
    }
    Ok(match sampling.iter().all(|params| params.is_greedy()) {
        true => Vec::new(),
        false => sampling.iter().map(|params| params.launch_row()).collect(),
    })
}
