//! The nouns of tilec: what a model is, at every level from `model.yaml` to the plan.
//! Nothing here knows CUDA, LLVM or files of weights.

pub mod abi;
pub mod convert;
pub mod cost;
pub mod format;
pub mod fused;
pub mod graph;
pub mod handoff;
pub mod launch;
pub mod octet;
pub mod pack;
pub mod plan;
pub mod resident;
pub mod schedule;
pub mod spec;
pub mod stages;
pub mod tensor;
pub mod validate;
