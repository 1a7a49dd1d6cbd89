//! The CUDA backend: the driver, the plan's resident kernel on a GPU, and its memory.
//!
//! Nothing of CUDA is needed to build this or to run plans for the processor: the driver is loaded when
//! a plan for a GPU is.

mod ceiling;
mod device;
#[cfg(test)]
mod draft_tests;
mod driver;
mod engine;
mod error;
#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
mod weights;

pub use ceiling::{Ceiling, CeilingCode, read_ceiling};
pub use driver::{DeviceInfo, devices, runs_on};
pub use engine::{ExpertCounts, RandomRouting};
pub use error::CudaError;

pub(crate) use device::{Device, Gpu};
pub(crate) use engine::{CudaEngine, Launch};

/// Steps of a launch at most: what the memory for the chosen tokens is made for.
pub(crate) const DECODE_STEPS: usize = 1024;

/// Rounds of a launch at most: as much memory.
pub(crate) const ROUNDS: usize = DECODE_STEPS * tilec_ir::launch::LAUNCH_ROWS / tilec_ir::launch::ROUND_WORDS;
