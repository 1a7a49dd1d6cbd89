//! What goes wrong between CUDA text and a cubin.

use super::{Arch, Diagnostic, Version};
use std::fmt;
use std::path::PathBuf;

/// What to do when NVRTC is missing.
pub const REMEDY: &str = "run `cargo xtask setup nvrtc` in tilec's sources, or `pip install \
     nvidia-cuda-nvrtc==13.0.88`, or set TILEC_NVRTC to libnvrtc.so.13 or to its folder";

/// A failure of finding NVRTC, of compiling, or of a budget.
#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    /// No usable NVRTC in any of the places.
    #[error("NVRTC, the compiler of CUDA text, is not on this machine: {REMEDY}{}", tried_list(.tried))]
    Missing {
        /// What was found and refused, and why.
        tried: Vec<String>,
    },
    /// The NVRTC that was asked for cannot be used.
    #[error("NVRTC at {} cannot be used: {reason}; {REMEDY}", .path.display())]
    Unusable {
        /// The file or folder that was named.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// No architecture has that name.
    #[error("no GPU architecture is called `{name}`; there are: {}", Arch::ALL.map(Arch::name).join(", "))]
    UnknownArch {
        /// The name given.
        name: String,
    },
    /// This NVRTC is too old or too new for the architecture.
    #[error("NVRTC {version} ({}) does not compile for {arch}; {REMEDY}", .path.display())]
    UnsupportedArch {
        /// What was asked for.
        arch: Arch,
        /// The NVRTC in use.
        version: Version,
        /// Its file.
        path: PathBuf,
    },
    /// A name, a text or a define that cannot be handed to the compiler.
    #[error("{0}")]
    Input(String),
    /// A call failed that does not depend on the text.
    #[error("NVRTC's {call} failed: {reason}")]
    Call {
        /// The function of NVRTC.
        call: &'static str,
        /// Its own words.
        reason: String,
    },
    /// The text does not compile.
    #[error("{0}")]
    Compile(Box<CompileFailure>),
    /// The compiler's report on resources is not understood.
    #[error("the compiler's report is not understood ({reason}): `{line}`; {REMEDY}")]
    Report {
        /// What was expected.
        reason: &'static str,
        /// The line of the log.
        line: String,
    },
    /// A kernel to be checked is not in the cubin.
    #[error("the cubin has no kernel `{kernel}`; it has: {}", .there.join(", "))]
    NoKernel {
        /// The kernel asked for.
        kernel: String,
        /// The kernels there are.
        there: Vec<String>,
    },
    /// Kernels need more than they may.
    #[error("over budget: {}", .over.join("; "))]
    OverBudget {
        /// A sentence for each kernel and resource.
        over: Vec<String>,
    },
}

/// Why a text did not compile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileFailure {
    /// The name of the text.
    pub name: String,
    /// What it was compiled for.
    pub arch: Arch,
    /// The compiler.
    pub version: Version,
    /// The errors, in the compiler's order; never empty.
    pub diagnostics: Vec<Diagnostic>,
    /// The whole log.
    pub log: String,
}

impl fmt::Display for CompileFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More hide the first, which is mostly the cause of the others.
        const SHOWN: usize = 8;
        write!(f, "{} does not compile for {} (NVRTC {}):", self.name, self.arch, self.version)?;
        for diagnostic in self.diagnostics.iter().take(SHOWN) {
            write!(f, "\n{diagnostic}")?;
        }
        match self.diagnostics.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\nand {more} more errors"),
        }
    }
}

fn tried_list(tried: &[String]) -> String {
    tried.iter().map(|line| format!("\n  tried {line}")).collect()
}
