//! The nouns of tilec: what a model is, at every level from `model.yaml` to the plan.
//! Nothing here knows CUDA, LLVM or files of weights.

pub mod abi;
pub mod format;
pub mod fused;
pub mod graph;
pub mod pack;
pub mod schedule;
pub mod stages;
