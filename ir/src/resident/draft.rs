//! What only drafts have: taps and the context that is made of them, convolutions, candidates and the scores of their pairs.

use crate::format::Format;
use crate::stages::{BufferId, Slot};

use super::{Norm, Rope};

/// An embedding of a token's own, in place of its row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The token.
    pub token: u32,
    /// f32 `[cols]`.
    pub vector: Slot,
}

/// Keys and values of several layers at once, normed, rotated and cached; nothing is attended.
#[derive(Clone, Debug, PartialEq)]
pub struct Context {
    /// `[rows][layers][kv_heads * qk + kv_heads * v]`, f32.
    pub input: BufferId,
    /// Norm of the keys of each layer: as many as there are layers, all with the same `eps`. Layer n has
    /// cache n.
    pub k_norms: Vec<Option<Norm>>,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Rotary embedding of the keys.
    pub rope: Option<Rope>,
    /// Factor on the values.
    pub value_scale: f32,
}

/// Which layers' residual streams a step leaves for a draft, in
/// [`crate::launch::LaunchArgs::taps`]: `f32 [rows][taps][cols]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taps {
    /// The layers, in the order of the taps.
    pub layers: Vec<usize>,
    /// Columns of a residual stream.
    pub cols: usize,
}

/// A convolution of rows with the row before them in their sequence; see [`crate::graph::Op::DynamicConv`].
#[derive(Clone, Debug, PartialEq)]
pub struct Conv {
    /// What is convolved, f32.
    pub input: BufferId,
    /// The norm in front of it.
    pub norm: Option<Norm>,
    /// `[rows][2 sides][2 taps][groups]`, f32: the rows' own kernels.
    pub kernels: BufferId,
    /// f32 `[2 sides][2 taps][cols]`, added to them.
    pub base: Slot,
    /// Which half of the kernels.
    pub side: usize,
    /// Columns that share a value of a row's own kernel.
    pub group: usize,
    /// Whether the output is added to.
    pub residual: bool,
    /// Where it goes.
    pub output: BufferId,
}

/// Most candidates of a row: a warp has one a lane.
pub const MAX_KEPT: usize = 32;

/// Most columns of a selector's tables: a lane keeps a value of each 32.
pub const MAX_RANK: usize = 1024;

/// The tokens of the largest logits of each segment of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopK {
    /// Logits of a row.
    pub vocab: usize,
    /// How many tokens of each segment.
    pub k: usize,
    /// Segments of a row.
    pub segments: usize,
    /// `[rows][segments][k]` keys of 8 bytes, as pairs of f32.
    pub lists: BufferId,
}

/// What each candidate of a row is worth behind each one of the row before; see [`crate::graph::Op::PairScores`].
#[derive(Clone, Debug, PartialEq)]
pub struct Pairs {
    /// The lists that the candidates are the largest of.
    pub top: TopK,
    /// Multiplied into every logit.
    pub factor: f32,
    /// Bound of the logits' magnitudes.
    pub softcap: Option<f32>,
    /// The rows' projections, f32; of all rows of the step.
    pub hidden: BufferId,
    /// Columns of the tables.
    pub rank: usize,
    /// Octets of halves of the table of tokens before, and of the table of candidates.
    pub tables: [(Slot, Format); 2],
    /// `[rows][k]`, 4 bytes each: the candidates.
    pub tokens: BufferId,
    /// `[rows][k before][k]`, f32.
    pub scores: BufferId,
}
