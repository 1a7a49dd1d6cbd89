//! The verbs of tilec: from a model's description to a plan. Knows nothing of files of weights and of
//! devices.

pub mod emit;
pub mod passes;
