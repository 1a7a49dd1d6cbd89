//! Emission: a scheduled program becomes code, one backend a folder.

#[cfg(feature = "llvm")]
pub mod llvm;
