//! Emission: a program becomes code, one backend a file or folder.

pub mod cuda;
#[cfg(feature = "llvm")]
pub mod llvm;
mod merge;
