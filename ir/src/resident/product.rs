//! Products: rows times packed weights, their norm and their epilogue.

use crate::format::{Code, Format};
use crate::graph::ActivationFn;
use crate::launch::OCTET;
use crate::octet::{apart_scales, octet_block_bytes, octet_blocks};
use crate::pack::SCORE_FEATURES;
use crate::stages::{BufferId, Slot};

/// A norm whose gains are `f32` in the packed weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The gains.
    pub gain: Slot,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// Rows that whoever makes them prepares for the products behind a norm, beside the rows themselves: times the
/// norm's gains, in bf16, and of every octet of columns the sum of its squares. A product reads half of the
/// bytes, as they are, and the divisor that normalizes a row is multiplied into its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// `[rows][columns, padded to a block of any format]`, bf16, in the order of [`prepared_order`].
    pub halves: BufferId,
    /// `[rows][octets of columns, padded to four]`, f32.
    pub squares: BufferId,
}

/// How prepared rows lie for products with weights of a format: a lane's columns of a block of `32 << order`
/// are `1 << order` pieces of 16 bytes, and first come all lanes' first pieces.
pub const fn prepared_order(format: Format) -> u32 {
    match format.code {
        Code::E2m1 => 2,
        Code::E4m3 => 1,
        _ => 0,
    }
}

/// What the makers of prepared rows need to know of a stage of the step: who reads them next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reader {
    /// Byte offset of the norm's gains.
    pub gain: u64,
    /// See [`prepared_order`].
    pub order: u32,
}

/// What becomes of a tile's sums.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Epilogue {
    /// Stored.
    Store,
    /// `activation(operand 0) * operand 1`, stored.
    Gated(ActivationFn),
    /// Added to what the buffer holds; of an expert, times its weight for the row.
    Residual,
    /// The logits; the largest of each row is kept.
    Logits,
}

/// A vector that is added to consecutive features of an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bias {
    /// Which operand.
    pub operand: usize,
    /// First feature.
    pub start: usize,
    /// `f32 [cols]`, of experts `f32 [experts][cols]`.
    pub slot: Slot,
    /// Features.
    pub cols: usize,
}

/// Rows times streamed weights.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemm {
    /// What it reads.
    pub input: BufferId,
    /// The norm in front of it.
    pub norm: Option<Norm>,
    /// Whether its input is prepared for that norm: `input` is the halves.
    pub prepared: Option<Prepared>,
    /// Only the rows whose logits are wanted.
    pub select: bool,
    /// Octets of the weights: see [`crate::pack::PackContent::Octets`].
    pub weights: Slot,
    /// Format of the weights.
    pub format: Format,
    /// Scales that lie apart: see [`crate::pack::PackContent::OctetScales`], of experts
    /// [`crate::pack::PackContent::ExpertScales`].
    pub scales: Option<Slot>,
    /// Columns of the input.
    pub k: usize,
    /// Features of one operand.
    pub cols: usize,
    /// Octets of a tile: 1, or 2 for a gated pair.
    pub operands: usize,
    /// Vectors that are added to slices of the features.
    pub bias: Vec<Bias>,
    /// What becomes of the sums.
    pub epilogue: Epilogue,
    /// Where they go; the logits have a place of their own.
    pub output: BufferId,
    /// What it prepares of them for whoever reads them behind a norm.
    pub prepares: Option<Prepared>,
    /// Whether the layer's residual stream is complete behind it, and goes to [`ResidentProgram::taps`] as
    /// well where the layer has a tap.
    pub tap: bool,
    /// Where the sums of the first parts of rows beyond [`part_columns`] wait for the others, f32: the
    /// step's rows of every operand's octets.
    pub partial: Option<BufferId>,
    /// A router's scores that it also makes.
    pub router: Option<RouterTiles>,
}

/// More tiles of a product whose results are added to the rows that a router reads: the scores of what is added
/// (`passes/router.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterTiles {
    /// Octets of four experts each: see [`crate::pack::PackContent::RouterOctets`].
    pub weights: Slot,
    /// How many experts there are.
    pub experts: usize,
    /// Scores of the rows before, f32 `[rows][experts, padded to whole octets]`, and as many columns again if
    /// [`Scores::expects`].
    pub before: BufferId,
    /// Their sums: scores without what normalizes the rows. `[rows][experts, padded]`.
    pub output: BufferId,
    /// Whether experts are foreseen by the scores before, while this product is multiplied.
    pub foresees: bool,
}

impl RouterTiles {
    /// Features of an expert, in bfloat16: what is high of its weights, and what is low.
    pub const PARTS: usize = SCORE_FEATURES;

    /// Tiles, of an octet each.
    pub const fn tiles(&self) -> usize {
        self.experts * RouterTiles::PARTS / OCTET
    }
}

impl Gemm {
    /// Tiles of its own features: one octet of each operand.
    pub const fn tiles(&self) -> usize {
        self.cols.div_ceil(OCTET)
    }

    /// Tiles of a router's scores, behind these.
    pub fn router_tiles(&self) -> usize {
        self.router.map_or(0, |router| router.tiles())
    }

    /// Blocks of an octet that it multiplies.
    pub const fn blocks(&self) -> usize {
        octet_blocks(self.format, self.k)
    }

    /// Bytes of weights that the stage reads, scales included.
    pub fn weight_bytes(&self) -> usize {
        let scales = 4 * apart_scales(self.format, self.k);
        let octets = self.tiles() * self.operands + self.router_tiles();
        octets * (self.blocks() * octet_block_bytes(self.format) + scales)
    }
}

/// What does not hold of a product alone.
pub(super) fn gemm_defect(gemm: &Gemm) -> Option<String> {
    if matches!(gemm.epilogue, Epilogue::Gated(_)) != (gemm.operands == 2) {
        return Some("a gate has two operands".into());
    }
    (gemm.scales.is_some() != (apart_scales(gemm.format, gemm.k) > 0))
        .then(|| format!("{} and its scales do not fit", gemm.format))
}
