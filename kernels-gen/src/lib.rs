//! Device code: one module per kernel family. Each family has a descriptor here, which says what
//! shapes are legal and what the kernel costs and needs no LLVM, and a builder in [`llvm`] that
//! emits the code.

pub mod attention;
pub mod conv;
pub mod cuda;
pub mod error;
pub mod experts;
pub mod gemm;
#[cfg(feature = "llvm")]
pub mod llvm;
pub mod pieces;
pub mod rows;
pub mod selector;
pub mod target;

pub use error::KernelError;
pub use target::{Isa, Target};
