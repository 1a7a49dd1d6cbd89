//! What the runtime hands to the native code of a plan: one C structure per step, and the layouts
//! of the memory behind its pointers. Version [`ABI_VERSION`] is part of every plan.

use crate::format::ACT_BLOCK;
use std::fmt;

/// Raised whenever [`StepArgs`] or a layout behind it changes.
pub const ABI_VERSION: u32 = 2;

/// Name of the entry point: `extern "C" fn(args: *const StepArgs, worker: u32)`.
pub const ENTRY: &str = "tilec_step";

/// Context positions in a group of the K cache: the lanes of a vector of scores.
pub const KV_GROUP: usize = 16;

/// Bytes between two counters: a cache line each, so that two never share one.
pub const COUNTER_STRIDE: usize = 64;

/// Arguments of one step. All pointers are valid for the step; `arena`, `scratch`, `weights` and
/// `kv` are aligned to 64 bytes.
#[repr(C)]
#[derive(Debug)]
pub struct StepArgs {
    /// Rows in this step, 1 to the plan's `max_rows`.
    pub rows: u32,
    /// Rows whose logits are wanted, 0 to `rows`.
    pub logit_rows: u32,
    /// Entries of the page table per sequence.
    pub pages_per_sequence: u32,
    /// Pages of the KV cache in all.
    pub kv_pages: u32,
    /// Token id of each row.
    pub tokens: *const u32,
    /// Position of each row in its sequence. Rows of a sequence are adjacent and ascending.
    pub positions: *const u32,
    /// Page-table row of each row.
    pub sequences: *const u32,
    /// Position of the last row in the step of each row's sequence: how far rows see that see both ways.
    pub ends: *const u32,
    /// The rows whose logits are wanted, ascending.
    pub logit_index: *const u32,
    /// `[sequences][pages_per_sequence]` page numbers.
    pub page_table: *const u32,
    /// The packed weights, at the offsets that the plan's packing gives.
    pub weights: *const u8,
    /// The KV cache: see [`KvLayout`].
    pub kv: *mut u8,
    /// The activation buffers, at the offsets that the plan's buffers give.
    pub arena: *mut u8,
    /// `workers x scratch_bytes` of private scratch, uninitialised.
    pub scratch: *mut u8,
    /// The counters, [`COUNTER_STRIDE`] bytes apart, all zero when a step starts.
    pub counters: *mut u8,
    /// `[abort_code, stage, worker, seen]`; the first is 0 until a worker gives up waiting.
    pub abort: *mut u32,
    /// `[workers][stages run][start, wait end, end]` in time-stamp ticks, or null.
    pub profile: *mut u64,
    /// Spins after which a wait gives up.
    pub spin_limit: u64,
    /// Gives the processor to somebody else for a moment; called now and then by a wait.
    pub yield_now: extern "C" fn(),
}

/// Type of the elements of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

impl KvType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 | KvType::Bf16 => 2,
        }
    }

    /// The name that model.yaml and the text forms use.
    pub const fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Bf16 => "bf16",
        }
    }
}

/// Layout of the KV cache of one attention layer kind: `[layer][page][kv_head]` blocks, in each
/// K as `[page_tokens / KV_GROUP][qk_dim][KV_GROUP]` (so that a vector holds one dimension of 16
/// positions), then V as `[page_tokens][v_pad]`. Pages start zeroed: a lane past the context is
/// multiplied by an exact zero and must be finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct KvLayout {
    /// Element type.
    pub kv_type: KvType,
    /// Layers that own a cache.
    pub layers: usize,
    /// KV heads of each.
    pub kv_heads: usize,
    /// Elements of a key.
    pub qk_dim: usize,
    /// Elements of a value.
    pub v_dim: usize,
    /// Positions in a page, a multiple of [`KV_GROUP`].
    pub page_tokens: usize,
}

/// As the text forms of programs have it.
impl fmt::Display for KvLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let KvLayout { kv_type, layers, kv_heads, qk_dim, v_dim, page_tokens } = self;
        let name = kv_type.name();
        write!(
            f,
            "kv {name} layers={layers} kv_heads={kv_heads} qk_dim={qk_dim} v_dim={v_dim} page_tokens={page_tokens}"
        )
    }
}

impl KvLayout {
    /// `v_dim` padded to whole vectors.
    pub const fn v_pad(&self) -> usize {
        self.v_dim.div_ceil(KV_GROUP) * KV_GROUP
    }

    /// Bytes of one (layer, page, kv head) block.
    pub const fn block_bytes(&self) -> usize {
        self.page_tokens * (self.qk_dim + self.v_pad()) * self.kv_type.bytes()
    }

    /// Where V starts in a block, in bytes.
    pub const fn v_offset(&self) -> usize {
        self.page_tokens * self.qk_dim * self.kv_type.bytes()
    }

    /// Bytes of the cache with `pages` pages, or `None` if that overflows.
    pub fn total_bytes(&self, pages: usize) -> Option<usize> {
        self.block_bytes().checked_mul(self.kv_heads)?.checked_mul(pages)?.checked_mul(self.layers)
    }

    /// Offset in bytes of a (layer, page, kv head) block, given the number of pages.
    pub const fn block_offset(&self, pages: usize, layer: usize, page: usize, head: usize) -> usize {
        ((layer * pages + page) * self.kv_heads + head) * self.block_bytes()
    }
}

/// Layout of a buffer of activations quantized to signed bytes in blocks of [`ACT_BLOCK`], three
/// planes one behind the other, each starting on a 64-byte line:
/// codes `i8 [rows][k_pad]`; per block `f32 scale [rows][k_pad/32]`; per block the sum of the codes
/// as `i32 [rows][k_pad/32]`. The tail of the last block is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct QuantRows {
    /// Columns.
    pub k: usize,
    /// Rows that the buffer is sized for.
    pub max_rows: usize,
}

impl QuantRows {
    /// Columns with padding.
    pub const fn k_pad(&self) -> usize {
        self.k.div_ceil(ACT_BLOCK) * ACT_BLOCK
    }

    /// Blocks of a row.
    pub const fn blocks(&self) -> usize {
        self.k_pad() / ACT_BLOCK
    }

    /// Where the scales start, in bytes.
    pub const fn scale_offset(&self) -> usize {
        (self.max_rows * self.k_pad()).next_multiple_of(64)
    }

    /// Where the sums start, in bytes.
    pub const fn sum_offset(&self) -> usize {
        self.scale_offset() + (self.max_rows * self.blocks() * 4).next_multiple_of(64)
    }

    /// Bytes in all.
    pub const fn bytes(&self) -> usize {
        self.sum_offset() + (self.max_rows * self.blocks() * 4).next_multiple_of(64)
    }
}
