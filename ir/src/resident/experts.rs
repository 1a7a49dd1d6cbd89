//! Mixtures of experts: a router's scores, the choice, and the experts' two products.

use crate::format::{Code, Format};
use crate::launch::OCTET;
use crate::octet::{octet_block_bytes, octet_blocks};
use crate::stages::{BufferId, Routing, Slot};

use super::{Gemm, Norm};

/// Bytes that are enough for a copy at the full rate.
const SHORT_TILE: usize = 8192;

/// SMs of the chips that tiles and bands are cut for: an H100's, and an H200's. Others run them too, but not all of their SMs
/// have as much to do.
const LARGE_CHIP: usize = 132;

/// A router's scores: rows times a small matrix, in float32, whose weights do not stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// What it reads, f32.
    pub input: BufferId,
    /// The norm in front of it.
    pub norm: Option<Norm>,
    /// The squares of its rows, if they are [`Prepared`].
    pub squares: Option<BufferId>,
    /// Octets of bf16, or `f32 [experts][k]`.
    pub weights: Slot,
    /// Which of the two.
    pub format: Format,
    /// f32 `[experts]`, added.
    pub bias: Option<Slot>,
    /// How many there are.
    pub experts: usize,
    /// Columns of the input.
    pub k: usize,
    /// Whether experts are compared by their scores' sigmoids, which stand behind the scores then.
    pub sigmoid: bool,
    /// f32 `[experts]`, added to the sigmoids, for the choice alone.
    pub correction: Option<Slot>,
    /// `[rows][experts, padded to whole octets]`, f32; with sigmoids as many columns again.
    pub output: BufferId,
    /// What lets the product that completes the rows make the scores; until `passes/router.rs` has decided.
    pub through: Option<Through>,
    /// f32 `[k]`, added to the rows first.
    pub added: Option<Slot>,
    /// Of a part: whether what experts would be compared by, if it were all, stands behind the scores. `bias`, `sigmoid`
    /// and `correction` are for that alone.
    pub expects: bool,
}

/// How scores can be made of what a product adds to rows, and of the rows before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Through {
    /// See [`RouterTiles::weights`].
    pub weights: Slot,
    /// What the product adds to all rows alike.
    pub bias: Option<Slot>,
}

impl Scores {
    /// Columns of the output.
    pub const fn output_cols(&self) -> usize {
        self.experts.next_multiple_of(OCTET) * if self.sigmoid || self.expects { 2 } else { 1 }
    }

    /// Bytes of the weights.
    pub const fn weight_bytes(&self) -> usize {
        match self.format.code {
            Code::F32 => self.experts * self.k * 4,
            _ => {
                self.experts.div_ceil(OCTET)
                    * octet_blocks(self.format, self.k)
                    * octet_block_bytes(self.format)
            }
        }
    }
}

/// How the experts of each row are found, from a router's scores. Every SM does it for itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// What [`Scores`] stores, or a product's [`RouterTiles`].
    pub scores: BufferId,
    /// How they are chosen; see [`crate::graph::Router`].
    pub routing: Routing,
    /// What scores of [`RouterTiles`] lack. What normalizes the rows is found by the choice then.
    pub unscaled: Option<Unscaled>,
}

/// What is left to be done with scores of rows that are not normed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unscaled {
    /// Columns of a row.
    pub k: usize,
    /// Added to the mean of squares.
    pub eps: f32,
    /// See [`Prepared::squares`].
    pub squares: BufferId,
    /// See [`Scores::bias`].
    pub bias: Option<Slot>,
    /// See [`Scores::correction`].
    pub correction: Option<Slot>,
    /// [`RouterTiles::before`], if experts are foreseen by it before they are chosen; by the last of its columns, if they
    /// are twice as many as those of the scores ([`Scores::expects`]).
    pub foreseen: Option<BufferId>,
}

/// Rows times the weights of the experts that they chose, of which only those stream that any row chose.
///
/// What the first product of a layer's experts stores has a slot for each expert of a row, in ascending
/// order of the experts: `[rows][top_k][cols]`. The second one reads it and adds up.
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// The product of one expert. Its weights are [`crate::pack::PackContent::ExpertOctets`], all experts
    /// one behind the other.
    pub gemm: Gemm,
    /// How many experts there are.
    pub experts: usize,
    /// Experts of a row.
    pub top_k: usize,
    /// The choice, if this stage is the first that needs it. It reads rows as they are; without one it
    /// reads the rows' slots, of the experts that an earlier stage of the layer chose.
    pub route: Option<Route>,
    /// Whether its octets are in bands, which are dealt out by columns.
    pub bands: Option<Bands>,
}

/// How the columns of a second product are shared by the consumers of all SMs. A *strip* is a block of columns of a band's
/// octets; a warp has one, for all experts, and keeps the sums of its features over all of them in registers. So every
/// SM has as many bytes of each expert, and what an expert costs a warp beside its products is little: a block of its rows,
/// and no sums to hand on. The sums of a band's strips meet when all experts are through, from warp to warp and, as words that
/// may be late, from SM to SM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bands {
    /// Octets of a band, an even number.
    pub octets: usize,
    /// Where a band's sums wait for those of its last strips, f32.
    pub parts: BufferId,
}

impl Bands {
    /// Strips of a tile: one for each consumer.
    pub const TILE: usize = 8;

    /// Octets of a band, if a second product is better dealt out in them: those with the fewest octets on a warp, of as
    /// many strips as there are. More than 14 would leave a slot of the ring room for one strip alone. Shorter rows than a
    /// tile has strips are left to tiles of several octets.
    pub fn octets(gemm: &Gemm) -> Option<usize> {
        const SIZES: [usize; 7] = [14, 12, 10, 8, 6, 4, 2];
        if gemm.format.code != Code::E2m1 || gemm.operands != 1 || gemm.blocks() < Bands::TILE {
            return None;
        }
        let fits = |octets: &&usize| gemm.tiles().is_multiple_of(**octets);
        let warps = LARGE_CHIP * Bands::TILE;
        let most = |octets: &&usize| (gemm.tiles() / **octets * gemm.blocks()).div_ceil(warps) * **octets;
        SIZES.iter().filter(fits).min_by_key(most).copied()
    }

    /// Strips of an expert.
    pub const fn strips(&self, gemm: &Gemm) -> usize {
        gemm.tiles() / self.octets * gemm.blocks()
    }

    /// Slots of the ring, of so many bytes, that a tile's strips are in together.
    pub const fn slots(&self, gemm: &Gemm, slot: usize) -> usize {
        Bands::TILE.div_ceil(slot / (self.octets * octet_block_bytes(gemm.format)))
    }

    /// Tiles of an expert.
    pub const fn tiles(&self, gemm: &Gemm) -> usize {
        self.strips(gemm).div_ceil(Bands::TILE)
    }

    /// Tiles, at most, in which a band has strips but not its last one.
    pub const fn most_parts(blocks: usize) -> usize {
        (blocks + Bands::TILE - 2) / Bands::TILE
    }

    /// Columns of a row of [`Bands::parts`]: of each band's parts the features of its octets.
    pub const fn part_cols(octets: usize, gemm: &Gemm) -> usize {
        gemm.tiles() / octets * Bands::most_parts(gemm.blocks()) * octets * OCTET
    }
}

impl Experts {
    /// Bytes of all experts' weights.
    pub fn weight_bytes(&self) -> usize {
        self.experts * self.gemm.weight_bytes()
    }

    /// Octets of a tile. Those of the second product may be short: one by one they would be small copies, each
    /// with the work of a tile around it. Several make a copy of up to [`SHORT_TILE`] bytes, as long as each SM
    /// of a large chip has a tile.
    ///
    /// Long ones are in [`Bands`], or have a tile each.
    pub fn tile_octets(&self) -> usize {
        let bytes = self.gemm.blocks() * octet_block_bytes(self.gemm.format);
        if self.route.is_some() || self.bands.is_some() || !matches!(self.gemm.format.code, Code::E2m1) {
            return 1;
        }
        let (tiles, each) = (self.gemm.tiles(), self.gemm.tiles().div_ceil(LARGE_CHIP));
        let most = (SHORT_TILE / bytes.max(1)).min(each);
        // Two of them are multiplied together.
        let fits = |octets: &usize| octets.is_multiple_of(2) && tiles.is_multiple_of(*octets);
        (2..=most).rev().find(fits).unwrap_or(1)
    }

    /// Columns of a row of the input.
    pub const fn input_cols(&self) -> usize {
        if self.route.is_some() { self.gemm.k } else { self.top_k * self.gemm.k }
    }

    /// Columns of a row of the output.
    pub const fn output_cols(&self) -> usize {
        if self.route.is_some() { self.top_k * self.gemm.cols } else { self.gemm.cols }
    }
}

/// Most experts that a step's rows choose from: their bits fit a word a lane.
pub const MAX_EXPERTS: usize = 1024;

/// Most experts of a row.
pub const MAX_TOP_K: usize = 16;
