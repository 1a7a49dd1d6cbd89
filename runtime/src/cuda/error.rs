//! What can go wrong with a GPU.

use crate::memory::Size;
use std::path::PathBuf;

/// Why the GPU cannot be used, or stopped working.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// No driver.
    #[error(
        "there is no CUDA driver (libcuda.so.1) on this machine: install NVIDIA's driver, pass the GPU through \
         to the container (docker run --gpus all), or compile the model with target.device cpu"
    )]
    NoDriver,
    /// A driver without a function that is needed.
    #[error("the CUDA driver has no {symbol}: install a newer NVIDIA driver")]
    OldDriver {
        /// The function.
        symbol: &'static str,
    },
    /// No such GPU.
    #[error(
        "there is no GPU number {device}: the driver shows {count}; look at CUDA_VISIBLE_DEVICES and nvidia-smi"
    )]
    NoDevice {
        /// The number that was asked for.
        device: usize,
        /// GPUs that there are.
        count: usize,
    },
    /// A call of the driver's.
    #[error("{call} failed: {name} ({number}): {text}; {remedy}")]
    Call {
        /// The function.
        call: &'static str,
        /// The driver's number of the error.
        number: u32,
        /// Its name.
        name: String,
        /// What the driver says about it.
        text: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The GPU's memory is too small or in use.
    #[error(
        "no GPU memory for the {what}: it needs {}, {} of {} are free; lower {lower} in model.yaml and compile \
         again, or end other programs on this GPU", Size(*.wanted), Size(*.free), Size(*.total)
    )]
    Memory {
        /// What needs it.
        what: &'static str,
        /// Bytes.
        wanted: u64,
        /// Bytes that are free.
        free: u64,
        /// Bytes that the GPU has.
        total: u64,
        /// Limits that make it smaller.
        lower: &'static str,
    },
    /// A size that no memory has.
    #[error("the size of the {what} overflows: lower {lower} in model.yaml and compile again")]
    Overflow {
        /// What needs it.
        what: &'static str,
        /// Limits that make it smaller.
        lower: &'static str,
    },
    /// Code for another architecture.
    #[error(
        "the plan's kernel is for {arch}, {device} has compute capability {}.{}: set target.arch to {wanted} in \
         model.yaml and compile again", capability.0, capability.1
    )]
    Arch {
        /// The plan's architecture.
        arch: String,
        /// Name of the GPU.
        device: String,
        /// The GPU's compute capability.
        capability: (u32, u32),
        /// The architecture that would run.
        wanted: String,
    },
    /// Something that the GPU cannot do.
    #[error("{device} {problem}; use another GPU, or compile the model with target.device cpu")]
    Unfit {
        /// Name of the GPU.
        device: String,
        /// What is the matter.
        problem: String,
    },
    /// The file of the kernel.
    #[error("{}: {problem}; compile the model again with `tilec compile`", path.display())]
    Code {
        /// The file.
        path: PathBuf,
        /// What is the matter.
        problem: String,
    },
}
