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

/// Integers, and the structures that the host shares with the kernel. First.
pub const BASE: Header = Header { name: "base.cuh", text: include_str!("../cuda/base.cuh") };

/// Every instruction that C++ does not have, in functions. Behind [`BASE`].
pub const PTX: Header = Header { name: "ptx.cuh", text: include_str!("../cuda/ptx.cuh") };

/// Number formats. Behind [`PTX`].
pub const FORMATS: Header = Header { name: "formats.cuh", text: include_str!("../cuda/formats.cuh") };

/// Words that stages hand on. Behind [`PTX`].
pub const HANDOFF: Header = Header { name: "handoff.cuh", text: include_str!("../cuda/handoff.cuh") };

/// Roles, barriers, crossings. Behind the constants that size a block.
pub const BLOCK: Header = Header { name: "block.cuh", text: include_str!("../cuda/block.cuh") };

/// How rows of halves lie. Behind [`BLOCK`].
pub const ROWS: Header = Header { name: "rows.cuh", text: include_str!("../cuda/rows.cuh") };

/// Rows on their way from a maker to the products behind a norm. Behind [`ROWS`] and the tables of the step.
pub const PREPARED: Header = Header { name: "prepared.cuh", text: include_str!("../cuda/prepared.cuh") };

/// Who multiplies a tile, and how it passes through the ring. Behind [`PREPARED`].
pub const TEAMS: Header = Header { name: "teams.cuh", text: include_str!("../cuda/teams.cuh") };

/// Rows as activations in registers. Behind [`TEAMS`].
pub const ACTIVATIONS: Header =
    Header { name: "activations.cuh", text: include_str!("../cuda/activations.cuh") };

/// Tensor-core products of a block of weights. Behind [`ACTIVATIONS`].
pub const PRODUCTS: Header = Header { name: "products.cuh", text: include_str!("../cuda/products.cuh") };

/// Rows times streamed weights. Behind [`PRODUCTS`].
pub const GEMM: Header = Header { name: "gemm.cuh", text: include_str!("../cuda/gemm.cuh") };

/// Scores of experts, their forecast, and the choice. Behind [`GEMM`].
pub const ROUTER: Header = Header { name: "router.cuh", text: include_str!("../cuda/router.cuh") };

/// Products with the experts that a step's rows choose. Behind [`ROUTER`].
pub const EXPERTS: Header = Header { name: "experts.cuh", text: include_str!("../cuda/experts.cuh") };

/// The experts' second product by strips of bands. Behind [`EXPERTS`].
pub const BANDS: Header = Header { name: "bands.cuh", text: include_str!("../cuda/bands.cuh") };

/// What attention goes by, and the cache's way through the ring. Behind [`BLOCK`].
pub const UNITS: Header = Header { name: "units.cuh", text: include_str!("../cuda/units.cuh") };

/// Attention over the paged cache. Behind [`UNITS`].
pub const ATTENTION: Header = Header { name: "attention.cuh", text: include_str!("../cuda/attention.cuh") };

/// Attention whose warps go through their positions of a span alone. Behind [`ATTENTION`].
pub const SWEEPS: Header = Header { name: "sweeps.cuh", text: include_str!("../cuda/sweeps.cuh") };

/// Attention of wide heads, chunk by chunk. Behind [`ATTENTION`].
pub const CHUNKS: Header = Header { name: "chunks.cuh", text: include_str!("../cuda/chunks.cuh") };

/// Convolutions of a draft's rows. Behind [`PREPARED`].
pub const CONV: Header = Header { name: "conv.cuh", text: include_str!("../cuda/conv.cuh") };

/// A draft's selector. Behind [`SAMPLE`].
pub const SELECTOR: Header = Header { name: "selector.cuh", text: include_str!("../cuda/selector.cuh") };

/// What a draft's context is made of. Behind [`ATTENTION`].
pub const CONTEXT: Header = Header { name: "context.cuh", text: include_str!("../cuda/context.cuh") };

/// Embedding, and the choice of the next tokens.
pub const STEP: Header = Header { name: "step.cuh", text: include_str!("../cuda/step.cuh") };

/// The choice of tokens by chance. Behind [`STEP`].
pub const SAMPLE: Header = Header { name: "sample.cuh", text: include_str!("../cuda/sample.cuh") };

/// Rounds of a draft. Behind [`STEP`] and the constants of its own.
pub const ROUND: Header = Header { name: "round.cuh", text: include_str!("../cuda/round.cuh") };

/// Bytes of the scratch that [`SAMPLE`] needs at most.
const SAMPLE_BYTES: usize = 15616;

/// Threads of a block: 8 consumer warps, the loader, control, its second, and the watchdog.
pub const BLOCK_THREADS: u32 = 384;

/// Consumer warps.
pub const CONSUMERS: usize = 8;

pub use tilec_ir::launch::{SLICE_ROWS, SLOT_BYTES};

/// Slots beyond which a deeper ring brought nothing.
const MAX_SLOTS: usize = 14;

/// Least slots with which loads and products still overlap.
const MIN_SLOTS: usize = 3;

/// How a block's shared memory is used, in bytes from its start: barriers and rows, scratch, the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedLayout {
    /// Slots of the ring.
    pub slots: usize,
    /// Bytes of one.
    pub slot: usize,
    /// Bytes for barriers and what the roles tell each other.
    pub fixed: usize,
    /// Bytes for sums of tiles, or attention's work.
    pub scratch: usize,
}

/// Sizes that decide the use of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedNeeds {
    /// Slices of a step's rows, eight each.
    pub slices: usize,
    /// Columns of the longest row in float32 that a product reads.
    pub row_columns: usize,
    /// Octets of the largest tile: 2 with gated pairs.
    pub operands: usize,
    /// Slots of the ring that a tile is in as a whole.
    pub together: usize,
    /// Whether octets have scales by 128 columns that lie apart.
    pub scaled: bool,
    /// Most bytes by which blocks are longer for the scales that follow their codes.
    pub block_scales: usize,
    /// Columns of a key.
    pub qk: usize,
    /// Columns of a value.
    pub v: usize,
    /// Most experts of a layer, and most of a row; 0 without experts.
    pub experts: usize,
    /// Most experts of a row.
    pub top_k: usize,
    /// Whether experts are foreseen.
    pub foresees: bool,
    /// Numbers that a thread has of each row of a router's: of scores, and of squares.
    pub scores: usize,
    /// Kinds of layers whose attention is dealt out alike.
    pub deals: usize,
}

impl SharedNeeds {
    /// What serves both.
    #[must_use]
    pub fn both(self, other: SharedNeeds) -> SharedNeeds {
        SharedNeeds {
            slices: self.slices.max(other.slices),
            row_columns: self.row_columns.max(other.row_columns),
            operands: self.operands.max(other.operands),
            together: self.together.max(other.together),
            scaled: self.scaled | other.scaled,
            block_scales: self.block_scales.max(other.block_scales),
            qk: self.qk.max(other.qk),
            v: self.v.max(other.v),
            experts: self.experts.max(other.experts),
            top_k: self.top_k.max(other.top_k),
            foresees: self.foresees | other.foresees,
            scores: self.scores.max(other.scores),
            deals: self.deals + other.deals,
        }
    }

    /// Bytes of attention's work space: queries in two halves, the step's own keys and values, sums of all
    /// warps, so many columns at a time.
    pub const fn attention(&self) -> usize {
        let (queries, summed) = (8, 64);
        let steps = self.qk.div_ceil(32);
        let own = 2 * self.slices * SLICE_ROWS * (self.qk + self.v);
        2 * queries * (steps * 64 + 8) + own + 4 * CONSUMERS * queries * summed + 64
    }

    /// Bytes of what attention has for the SM, and of which runs that is.
    pub const fn deals(&self) -> usize {
        (self.deals * (64 + self.slices * SLICE_ROWS * 4)).next_multiple_of(128)
    }

    /// Bytes of the choice of experts: counts, a bit for every expert of each row, slots of the rows by the
    /// number of the expert, weights, numbers of the experts that any row chose, and those of each row; what is foreseen.
    pub fn routes(&self) -> usize {
        if self.experts == 0 {
            return 0;
        }
        let rows = self.slices * SLICE_ROWS;
        let chosen = self.experts.min(rows * self.top_k);
        let (seen, streamed) = match self.foresees {
            true => (self.experts.div_ceil(32), self.experts.min(2 * chosen)),
            false => (1, 1),
        };
        let bytes = 16
            + 32
            + rows * self.experts.div_ceil(32) * 4
            + rows * chosen.next_multiple_of(4)
            + rows * self.top_k * (4 + 2)
            + 2 * chosen
            + 4 * seen
            + 2 * 2 * streamed
            + 8;
        bytes.next_multiple_of(128)
    }

    /// Bytes of the buffers in which consumers leave a tile's sums: at least two, so that they can go on.
    pub const fn sums(&self) -> usize {
        2 * self.operands * self.slices * CONSUMERS * 256
    }

    /// Bytes of the rows of a product's input on their way to the consumers, so many columns at a time.
    pub const fn rows(&self, columns: usize) -> usize {
        let row_columns = self.row_columns.next_multiple_of(1024);
        8 * (2 * if row_columns < columns { row_columns } else { columns } + 64)
    }

    /// Bytes of a router's sums of a slice's rows, a part of every consumer thread's.
    pub const fn scored(&self) -> usize {
        self.scores * 8 * CONSUMERS * 32 * 4
    }

    /// Bytes of a choice of experts: what a slice's rows compare, and what each lane has chosen.
    pub const fn compared(&self) -> usize {
        if self.experts == 0 { 0 } else { 8 * 32 * (self.experts.div_ceil(32) * 4 + 8) }
    }

    /// Bytes of a slot of the ring: what the copy engine moves at once, and four blocks for each consumer.
    pub const fn slot(&self) -> usize {
        SLOT_BYTES + 4 * CONSUMERS * self.block_scales
    }

    /// Bytes of the scales that are on their way: of 32 blocks a consumer, of one octet or several, four times. They
    /// are at the end of the scratch and share it with nothing.
    pub const fn scales(&self) -> usize {
        if self.scaled { CONSUMERS * 4 * 32 * 4 } else { 0 }
    }

    /// The layout within `available` bytes, or `None` if too little is left for a ring.
    pub fn layout(&self, available: usize) -> Option<SharedLayout> {
        let fixed = 1920 + (self.slices - 1) * 256 + self.deals() + self.routes();
        let columns = if available >= 128 << 10 { 2048 } else { 1024 };
        let experts = self.scored().max(self.compared());
        let work = self.attention().max(self.sums()).max(self.rows(columns)).max(experts).max(SAMPLE_BYTES);
        let scratch = work.next_multiple_of(128) + self.scales();
        let slots = available.checked_sub(fixed + scratch)? / self.slot();
        let slots = slots.min(MAX_SLOTS);
        let fits = slots >= MIN_SLOTS.max(self.together);
        fits.then_some(SharedLayout { slots, slot: self.slot(), fixed, scratch })
    }
}

impl SharedLayout {
    /// Bytes in all.
    pub const fn bytes(&self) -> usize {
        self.fixed + self.scratch + self.slots * self.slot
    }
}

/// How fast a GPU reads memory. Behind [`PTX`]; see [`CeilingKernel`].
pub const CEILING: Header = Header { name: "ceiling.cuh", text: include_str!("../cuda/ceiling.cuh") };

/// The kernels that measure how fast a GPU reads memory: `tilec_ceiling_fill` writes a buffer,
/// `tilec_ceiling_read` streams it through every SM as the resident kernel streams weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CeilingKernel {
    /// Slots of an SM's ring of [`SLOT_BYTES`] each; 0 where plain loads are used.
    pub slots: usize,
}

impl CeilingKernel {
    /// Name of the kernel that writes the buffer.
    pub const FILL: &str = "tilec_ceiling_fill";

    /// Name of the kernel that reads it.
    pub const READ: &str = "tilec_ceiling_read";

    /// Threads of a block; one block on every SM.
    pub const THREADS: u32 = 512;

    /// Slots that are enough: 192 KB in flight on an SM reach the ceiling.
    const SLOTS: usize = 12;

    /// Bytes in front of the ring, for its barriers.
    const FIXED: usize = 1024;

    /// The kernels for a GPU: with a ring if it has bulk copies (`sm_90` and newer) and room for three
    /// slots in the `shared_bytes` that a block may have. `None` if it has bulk copies and no room.
    pub fn new(bulk_copies: bool, shared_bytes: usize) -> Option<CeilingKernel> {
        let slots = shared_bytes.saturating_sub(Self::FIXED) / SLOT_BYTES;
        match bulk_copies {
            false => Some(CeilingKernel { slots: 0 }),
            true => (slots >= MIN_SLOTS).then_some(CeilingKernel { slots: slots.min(Self::SLOTS) }),
        }
    }

    /// Dynamic shared memory of the reading kernel's block, in bytes.
    pub const fn shared_bytes(&self) -> u32 {
        if self.slots == 0 { 0 } else { (Self::FIXED + self.slots * SLOT_BYTES) as u32 }
    }

    /// Their text, complete.
    pub fn text(&self) -> String {
        format!(
            "{}\n{}\nconstexpr u32 SLOT_BYTES = {SLOT_BYTES};\nconstexpr u32 RING_SLOTS = {};\n\n{}",
            BASE.text,
            PTX.text,
            self.slots.max(1),
            CEILING.text
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_hopper_holds_a_deep_ring() {
        let needs =
            SharedNeeds { slices: 1, operands: 2, scaled: false, qk: 128, v: 128, ..SharedNeeds::default() };
        let layout = needs.layout(227 << 10).unwrap();
        assert!(layout.slots >= 10, "{layout:?}");
        assert!(layout.bytes() <= 227 << 10);
        assert_eq!(needs.layout(64 << 10), None);
    }

    #[test]
    fn the_ring_of_the_ceiling_fits_its_gpu() {
        let kernel = CeilingKernel::new(true, 227 << 10).unwrap();
        assert_eq!((kernel.slots, kernel.shared_bytes()), (12, 1024 + (192 << 10)));
        assert_eq!(CeilingKernel::new(true, 99 << 10).unwrap().slots, 6);
        assert_eq!(CeilingKernel::new(true, 48 << 10), None);
        let plain = CeilingKernel::new(false, 48 << 10).unwrap();
        assert_eq!(plain.shared_bytes(), 0);
        assert!(kernel.text().contains("RING_SLOTS = 12;") && kernel.text().contains(CeilingKernel::READ));
        assert!(kernel.text().contains(CeilingKernel::FILL));
    }
}
