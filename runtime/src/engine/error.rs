//! What can go wrong on loading and running a plan.

use crate::checkpoint::CheckpointError;
use crate::cuda::CudaError;
use crate::kv::OutOfPages;
use crate::memory::MemoryError;
use crate::native::NativeError;
use crate::pack::PackError;
use std::time::Duration;
use tilec_ir::plan::PlanError;

/// Why a plan cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The manifest.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The native code.
    #[error(transparent)]
    Native(#[from] NativeError),
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Packing.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A GPU that says nothing.
    #[error("the GPU has not copied the weights in {:.0} s: look at nvidia-smi", after.as_secs_f64())]
    Silent {
        /// How long.
        after: Duration,
    },
    /// Weights that are not the plan's.
    #[error("the packed weights have {have} bytes, the plan needs {need} on a boundary of 64")]
    Weights {
        /// Bytes that there are.
        have: u64,
        /// Bytes that the plan needs.
        need: u64,
    },
    /// Threads.
    #[error("cannot start {workers} workers: {source}; lower target.threads in model.yaml and compile again")]
    Threads {
        /// How many.
        workers: usize,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Why a step was refused or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// No rows, or more than the plan was compiled for.
    #[error("a step of {rows} rows: the plan takes 1 to {max} (limits.rows)")]
    Rows {
        /// Rows that were given.
        rows: usize,
        /// The plan's limit.
        max: usize,
    },
    /// No such token.
    #[error("row {row}: token {token} is not in the vocabulary of {vocab}")]
    Token {
        /// The row.
        row: usize,
        /// Its token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// No such sequence.
    #[error("row {row}: sequence {sequence} is none of the plan's {sequences} (limits.sequences)")]
    Sequence {
        /// The row.
        row: usize,
        /// Its sequence.
        sequence: u32,
        /// The plan's limit.
        sequences: usize,
    },
    /// Past the context.
    #[error("row {row}: position {position} is past the context of {context} (limits.context)")]
    Context {
        /// The row.
        row: usize,
        /// Its position.
        position: u32,
        /// The plan's limit.
        context: usize,
    },
    /// A position that does not follow.
    #[error("row {row}: position {position} does not follow; the next of its sequence is {expected}")]
    Order {
        /// The row.
        row: usize,
        /// Its position.
        position: u32,
        /// The next position.
        expected: u32,
    },
    /// A sequence in two places of a step.
    #[error("row {row}: other rows lie between this and the earlier rows of sequence {sequence}")]
    Apart {
        /// The row.
        row: usize,
        /// Its sequence.
        sequence: u32,
    },
    /// Too many rows of logits.
    #[error("logits of {rows} rows: the plan has room for {max}")]
    LogitRows {
        /// Rows that were asked for.
        rows: usize,
        /// Rows of the buffer.
        max: usize,
    },
    /// Rows of logits that are none or not in order.
    #[error("the rows whose logits are wanted must ascend and be less than {rows}")]
    LogitOrder {
        /// Rows of the step.
        rows: usize,
    },
    /// Not as many parameters as rows whose tokens are wanted.
    #[error(
        "{given} sampling parameters for {rows} rows whose tokens are wanted: each has its own, or none has"
    )]
    Sampling {
        /// Parameters.
        given: usize,
        /// Rows.
        rows: usize,
    },
    /// A sampling parameter is out of its range.
    #[error("row {row}: {problem}")]
    Parameter {
        /// The row, of those whose tokens are wanted.
        row: usize,
        /// Which, and its range.
        problem: String,
    },
    /// A kernel is to choose what only the host can.
    #[error(
        "row {row}: penalties, logit_bias and logprobs need the logits on the host; run a step for them, or \
         leave them out"
    )]
    HostSampling {
        /// The row, of those whose tokens are wanted.
        row: usize,
    },
    /// The kernel computed logits that no token can be chosen from.
    #[error("step {step}, row {row}: {problem}")]
    Logits {
        /// The row, of those whose tokens are wanted.
        row: usize,
        /// The step of the launch.
        step: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// A draft is asked for and there is none.
    #[error("the plan has no draft; add `draft` to model.yaml and compile again, or go on without one")]
    NoDraft,
    /// A block that the draft does not take.
    #[error("a block of {rows} rows: the plan's draft takes 2 to {max} (draft.dflash.block)")]
    Block {
        /// Rows of the block.
        rows: usize,
        /// The plan's limit.
        max: usize,
    },
    /// A draft that has not seen what is before a position.
    #[error(
        "the draft's context of sequence {sequence} has {context} positions, but position {position} is next:          inject the rows between"
    )]
    DraftGap {
        /// The sequence.
        sequence: u32,
        /// Positions of the draft's context.
        context: usize,
        /// The position.
        position: u32,
    },
    /// Rows to inject that the last step has not.
    #[error("the rows to inject must ascend and be of the last step's {rows}")]
    Inject {
        /// Rows of the last step.
        rows: usize,
    },
    /// No room in the cache.
    #[error(transparent)]
    Pages(#[from] OutOfPages),
    /// A worker waited too long for others.
    #[error(
        "worker {worker} gave up waiting for stage {stage}, of which {seen} parts were done (code {code}); \
         if the machine is overloaded, lower target.threads and compile again"
    )]
    Stalled {
        /// Name of the stage that was waited for.
        stage: String,
        /// Who waited.
        worker: u32,
        /// What its counter had reached.
        seen: u32,
        /// The native code's own number.
        code: u32,
    },
    /// A worker panicked.
    #[error("worker {worker} panicked")]
    Panicked {
        /// Which.
        worker: usize,
    },
    /// Decoding in one launch without a kernel for it.
    #[error(
        "this plan's code runs one step at a time; compile it with target.device cuda to decode in one launch"
    )]
    NotResident,
    /// No steps, or too many.
    #[error("{steps} steps in a launch: there can be 1 to {max}")]
    Steps {
        /// Steps that were asked for.
        steps: usize,
        /// The limit.
        max: usize,
    },
    /// A sequence that would decode twice.
    #[error("row {row}: sequence {sequence} has a row already, and decodes one token at a time")]
    Twice {
        /// The row.
        row: usize,
        /// Its sequence.
        sequence: u32,
    },
    /// A part of a resident kernel waited too long for another.
    #[error(
        "on SM {sm}, {who} gave up waiting in stage {stage} of step {step}: it saw {seen} and waited for {expected}; \
         if another program uses this GPU, end it; load the plan again to go on"
    )]
    Stuck {
        /// Name of the stage.
        stage: String,
        /// Step of the launch.
        step: u32,
        /// The SM.
        sm: u32,
        /// The part of the kernel that waited, and for what.
        who: &'static str,
        /// What it saw.
        seen: u32,
        /// What it waited for.
        expected: u32,
    },
    /// Nothing was heard of a kernel.
    #[error(
        "the GPU has not answered for {:.1} s, and the kernel cannot be ended from here: another program may \
         keep the GPU busy; end this process, look at nvidia-smi, and start again", after.as_secs_f64()
    )]
    Silent {
        /// How long.
        after: Duration,
    },
    /// A kernel that ended without having done its work.
    #[error("the kernel ended {problem}; the plan's code is at fault: compile the model again")]
    Kernel {
        /// What is missing.
        problem: String,
    },
    /// The GPU.
    #[error(transparent)]
    Cuda(Box<CudaError>),
    /// An engine that cannot go on.
    #[error("this engine stopped working before ({reason}): load the plan again")]
    Poisoned {
        /// The error that it stopped with.
        reason: String,
    },
}

impl From<CudaError> for StepError {
    fn from(error: CudaError) -> StepError {
        StepError::Cuda(Box::new(error))
    }
}
