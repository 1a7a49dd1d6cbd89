//! The device code of the resident kernel, as text, and the descriptor that says how it uses a block's
//! shared memory. The headers lie in `kernels-gen/cuda/`; `codegen` puts them in front of what it emits.

/// A header with its file's name.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Name of the file.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// Integers, PTX in functions, the structures that the host shares with the kernel. First.
pub const BASE: Header = Header { name: "base.cuh", text: include_str!("../cuda/base.cuh") };

/// Roles, barriers, crossings. Behind the constants that size a block.
pub const BLOCK: Header = Header { name: "block.cuh", text: include_str!("../cuda/block.cuh") };

/// Rows times streamed weights.
pub const GEMM: Header = Header { name: "gemm.cuh", text: include_str!("../cuda/gemm.cuh") };

/// Attention over the paged cache.
pub const ATTENTION: Header = Header { name: "attention.cuh", text: include_str!("../cuda/attention.cuh") };

/// Embedding, and the choice of the next tokens.
pub const STEP: Header = Header { name: "step.cuh", text: include_str!("../cuda/step.cuh") };

/// Threads of a block: 8 consumer warps, the loader, control, and two that idle.
pub const BLOCK_THREADS: u32 = 384;

/// Consumer warps.
pub const CONSUMERS: usize = 8;

/// Bytes of a slot of the ring: what the copy engine moves at once, and 4 blocks for each consumer.
pub const SLOT_BYTES: usize = 16 << 10;

/// Slots beyond which a deeper ring brought nothing.
const MAX_SLOTS: usize = 14;

/// Least slots with which loads and products still overlap.
const MIN_SLOTS: usize = 3;

/// How a block's shared memory is used, in bytes from its start: barriers and rows, gains, scratch,
/// the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedLayout {
    /// Slots of the ring.
    pub slots: usize,
    /// Bytes for barriers and what the roles tell each other.
    pub fixed: usize,
    /// Bytes for the gains of a norm.
    pub gain: usize,
    /// Bytes for sums of tiles, or attention's work.
    pub scratch: usize,
}

/// Sizes that decide the use of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedNeeds {
    /// Columns of the widest norm.
    pub norm_columns: usize,
    /// Octets of the largest tile: 2 with gated pairs.
    pub operands: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Columns of a key.
    pub qk: usize,
    /// Columns of a value.
    pub v: usize,
}

impl SharedNeeds {
    /// Bytes of attention's work space: queries, the step's own keys and values, heads between norm
    /// and rope, sums and weights of the warps.
    pub const fn attention(&self) -> usize {
        let at_once = if self.group < 4 { self.group } else { 4 };
        let rows = 8 * (self.qk + self.v);
        4 * (self.group * self.qk + rows + CONSUMERS * self.qk + CONSUMERS * at_once * (self.v + 2))
    }

    /// Bytes of the buffers in which consumers leave a tile's sums: two, so that they can go on.
    pub const fn sums(&self) -> usize {
        2 * self.operands * CONSUMERS * 256
    }

    /// The layout within `available` bytes, or `None` if too little is left for a ring.
    pub fn layout(&self, available: usize) -> Option<SharedLayout> {
        let fixed = 2048;
        let gain = (self.norm_columns * 4).next_multiple_of(128);
        let scratch = self.attention().max(self.sums()).next_multiple_of(128);
        let slots = available.checked_sub(fixed + gain + scratch)? / SLOT_BYTES;
        let slots = slots.min(MAX_SLOTS);
        (slots >= MIN_SLOTS).then_some(SharedLayout { slots, fixed, gain, scratch })
    }
}

impl SharedLayout {
    /// Bytes in all.
    pub const fn bytes(&self) -> usize {
        self.fixed + self.gain + self.scratch + self.slots * SLOT_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_hopper_holds_a_deep_ring() {
        let needs = SharedNeeds { norm_columns: 4096, operands: 2, group: 4, qk: 128, v: 128 };
        let layout = needs.layout(227 << 10).unwrap();
        assert!(layout.slots >= 10, "{layout:?}");
        assert!(layout.bytes() <= 227 << 10);
        assert_eq!(needs.layout(64 << 10), None);
    }
}
