//! The verbs of tilec: from a model's description to a plan. Knows nothing of files of weights and of
//! devices.

pub mod ceiling;
pub mod compile;
pub mod emit;
pub mod frontends;
pub mod nvrtc;
pub mod passes;
