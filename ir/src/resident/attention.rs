//! Attention, and how a context is cut into chunks and spans.

use crate::abi::KvLayout;
use crate::stages::{BufferId, Slot};

use super::{Norm, Scores};

/// Positions of the context that one attention item covers.
pub const CHUNK: usize = 128;

/// Chunks whose sums are added up before others are.
pub const SPAN: usize = 8;

pub(super) const fn rings(kv: &KvLayout) -> bool {
    CHUNK * (kv.qk_dim + kv.v_pad()) * kv.kv_type.bytes() <= 64 << 10
}

/// As [`ResidentProgram::max_parts`].
pub const fn max_parts(kv: &KvLayout, context: usize) -> usize {
    let chunks = context.div_ceil(CHUNK);
    if !rings(kv) {
        return chunks + chunks.div_ceil(SPAN);
    }
    // See `ResidentProgram::spans`.
    let (near, far) = (8, 4);
    if chunks < near { chunks } else { near + (chunks - near).div_ceil(far) }
}

/// A rotary embedding of heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rope {
    /// Table of cosines, then of sines.
    pub table: Slot,
    /// Positions of the table.
    pub positions: usize,
    /// Leading columns of a head that are rotated.
    pub dims: usize,
}

/// Attention over the layer's cache, from raw queries, keys and values.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// `[rows][heads * qk + kv_heads * qk + kv_heads * v]`, f32.
    pub input: BufferId,
    /// `[rows][heads * v]`.
    pub output: BufferId,
    /// Room for the parts of rows with more than one span, or chunk where heads are wide.
    pub parts: BufferId,
    /// Query heads.
    pub heads: usize,
    /// KV heads: at most as many as a page of the cache has room for in each layer.
    pub kv_heads: usize,
    /// Norm of each query head.
    pub q_norm: Option<Norm>,
    /// Norm of each key.
    pub k_norm: Option<Norm>,
    /// Rotary embedding of queries and keys.
    pub rope: Option<Rope>,
    /// Factor on the scores.
    pub scale: f32,
    /// Positions that a row sees, itself included.
    pub window: Option<usize>,
    /// `f32 [heads]`: a score that joins each head's softmax and carries no value.
    pub sinks: Option<Slot>,
    /// Factor on the values, before they are cached.
    pub value_scale: f32,
    /// Whether a row also sees the rows of its sequence behind it in the step; with a window so many
    /// positions, itself included.
    pub bidirectional: bool,
    /// A router's scores of the rows before what attention adds to them, for the [`RouterTiles`] of the product behind it;
    /// made behind attention by SMs with nothing else to do.
    pub router: Option<Scores>,
}
