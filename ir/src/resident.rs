//! The resident program: a step as the stages of one GPU kernel.
//!
//! It says what [`crate::stages`] says for threads, in the terms of a kernel whose weights stream
//! through every operator boundary: norms are recomputed in front of the product that reads them,
//! heads are normed, rotated and cached inside attention, and every stage ends with a crossing of
//! the chip, behind which all of its results are visible to all SMs.

use crate::abi::KvLayout;
use crate::cost::StageCost;
use crate::format::{Code, Format};
use crate::graph::{ActivationFn, RopeSpec, Scoring};
use crate::launch::{LAUNCH_ROWS, OCTET, SLICE_ROWS, SLOT_BYTES};
use crate::octet::{apart_scales, feature_scales, octet_block_bytes, octet_blocks};
use crate::pack::{Packing, SCORE_FEATURES};
use crate::stages::{Buffer, BufferElem, BufferId, Layer, Routing, Slot};
use std::collections::HashMap;
use std::fmt;

/// Positions of the context that one attention item covers.
pub const CHUNK: usize = 128;

/// Chunks whose sums are added up before others are.
pub const SPAN: usize = 8;

const fn rings(kv: &KvLayout) -> bool {
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

/// Columns of a slice's rows that a kernel keeps in registers.
pub const PART_COLUMNS: usize = 8192;

/// Columns of a row that a kernel keeps in registers, if its step has so many rows. Longer rows are multiplied in
/// parts.
pub const fn part_columns(step_rows: usize) -> usize {
    PART_COLUMNS / (step_rows / SLICE_ROWS)
}

/// Whether a kernel's step may have so many rows: whole slices, a power of two of them.
pub const fn is_step_rows(rows: usize) -> bool {
    rows.is_multiple_of(SLICE_ROWS) && (rows / SLICE_ROWS).is_power_of_two() && rows <= LAUNCH_ROWS
}

/// Bytes that are enough for a copy at the full rate.
const SHORT_TILE: usize = 8192;

/// Octets of a tile, at most, that have a copy each, in a step of one slice.
const WIDE_TILE: usize = 8;

/// SMs of a large chip, about.
const LARGE_CHIP: usize = 128;

/// Columns of the longest block of weights, to which rows of halves are padded.
pub const ROW_BLOCK: usize = 128;

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
    /// Long ones have a copy each. But if an SM has several of each expert, they are a tile as well: its rows are
    /// fetched once, and two octets of FP4 are multiplied in less time together than one behind the other. Sums of more
    /// than eight octets and slices of `step_rows` would leave too little of the ring.
    pub fn tile_octets(&self, step_rows: usize) -> usize {
        let bytes = self.gemm.blocks() * octet_block_bytes(self.gemm.format);
        if self.route.is_some() || !matches!(self.gemm.format.code, Code::E2m1) {
            return 1;
        }
        let (tiles, each) = (self.gemm.tiles(), self.gemm.tiles().div_ceil(LARGE_CHIP));
        let most = (SHORT_TILE / bytes.max(1)).min(each);
        // Two of them are multiplied together.
        let fits = |octets: &usize| octets.is_multiple_of(2) && tiles.is_multiple_of(*octets);
        match (2..=most).rev().find(fits) {
            Some(octets) => octets,
            None if bytes <= SLOT_BYTES
                && each * bytes > SHORT_TILE
                && (2..=WIDE_TILE * SLICE_ROWS / step_rows).contains(&each)
                && tiles.is_multiple_of(each) =>
            {
                each
            }
            None => 1,
        }
    }

    /// Whether the octets of a tile are one copy.
    pub fn shares_slot(&self, step_rows: usize) -> bool {
        let bytes = self.gemm.blocks() * octet_block_bytes(self.gemm.format);
        let octets = self.tile_octets(step_rows);
        octets > 1 && octets * bytes <= SHORT_TILE
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

/// What a stage does.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Rows of a packed table by token id.
    Embed {
        /// The table's octets.
        table: Slot,
        /// Their format.
        format: Format,
        /// Scales of block FP8.
        scales: Option<Slot>,
        /// Rows of the table.
        vocab: usize,
        /// Columns.
        k: usize,
        /// A token that the table does not know.
        replaced: Option<Replaced>,
        /// Where they go, f32.
        output: BufferId,
        /// What it prepares of them for whoever reads them behind a norm.
        prepares: Option<Prepared>,
    },
    /// Rows of the taps that a step of the target left; the rows of the launch have their numbers in place
    /// of tokens. Only the first stage of a program.
    Taps {
        /// Where they go: f32 or bf16, all taps of a row side by side.
        output: BufferId,
    },
    /// See [`Context`].
    Context(Context),
    /// See [`Gemm`].
    Gemm(Gemm),
    /// See [`Scores`].
    Scores(Scores),
    /// See [`Experts`].
    Experts(Experts),
    /// See [`Attention`].
    Attention(Attention),
    /// See [`Conv`].
    Conv(Conv),
    /// See [`TopK`]. Only behind the logits.
    TopK(TopK),
    /// See [`Pairs`].
    Pairs(Pairs),
    /// From each row's guess to the next: of its candidates the one that is worth most behind it, which takes the
    /// place of the largest logit.
    Walk {
        /// Candidates of a row.
        k: usize,
        /// See [`Pairs::tokens`].
        tokens: BufferId,
        /// See [`Pairs::scores`].
        scores: BufferId,
    },
}

impl Kind {
    /// The attention of a stage that is one.
    pub fn attention(&self) -> Option<&Attention> {
        match self {
            Kind::Attention(attention) => Some(attention),
            _ => None,
        }
    }

    /// All packed weights that a stage reads.
    pub fn slots(&self) -> Vec<Slot> {
        self.clone().slots_mut().into_iter().map(|slot| *slot).collect()
    }

    /// The same, to be found elsewhere.
    pub fn slots_mut(&mut self) -> Vec<&mut Slot> {
        fn gains<'a>(norms: impl IntoIterator<Item = &'a mut Option<Norm>>) -> Vec<&'a mut Slot> {
            norms.into_iter().flatten().map(|norm| &mut norm.gain).collect()
        }
        fn of_gemm(gemm: &mut Gemm) -> Vec<&mut Slot> {
            let mut slots = gains([&mut gemm.norm]);
            slots.push(&mut gemm.weights);
            slots.extend(&mut gemm.scales);
            slots.extend(gemm.bias.iter_mut().map(|bias| &mut bias.slot));
            slots.extend(gemm.router.as_mut().map(|router| &mut router.weights));
            slots
        }
        fn of_scores(scores: &mut Scores) -> Vec<&mut Slot> {
            let mut slots = gains([&mut scores.norm]);
            slots.push(&mut scores.weights);
            slots.extend(&mut scores.bias);
            slots.extend(&mut scores.correction);
            slots.extend(&mut scores.added);
            if let Some(Through { weights, bias }) = &mut scores.through {
                slots.push(weights);
                slots.extend(bias);
            }
            slots
        }
        match self {
            Kind::Gemm(gemm) => of_gemm(gemm),
            Kind::Scores(scores) => of_scores(scores),
            Kind::Experts(experts) => {
                let mut slots = of_gemm(&mut experts.gemm);
                if let Some(unscaled) = experts.route.as_mut().and_then(|route| route.unscaled.as_mut()) {
                    slots.extend(&mut unscaled.bias);
                    slots.extend(&mut unscaled.correction);
                }
                slots
            }
            Kind::Attention(attention) => {
                let mut slots = gains([&mut attention.q_norm, &mut attention.k_norm]);
                slots.extend(attention.rope.as_mut().map(|rope| &mut rope.table));
                slots.extend(&mut attention.sinks);
                slots.extend(attention.router.iter_mut().flat_map(of_scores));
                slots
            }
            Kind::Conv(conv) => {
                let mut slots = gains([&mut conv.norm]);
                slots.push(&mut conv.base);
                slots
            }
            Kind::Embed { table, scales, replaced, .. } => {
                let mut slots = vec![table];
                slots.extend(scales);
                slots.extend(replaced.as_mut().map(|replaced| &mut replaced.vector));
                slots
            }
            Kind::Pairs(pairs) => pairs.tables.iter_mut().map(|(table, _)| table).collect(),
            Kind::Context(context) => {
                let mut slots = gains(&mut context.k_norms);
                slots.extend(context.rope.as_mut().map(|rope| &mut rope.table));
                slots
            }
            Kind::Taps { .. } | Kind::TopK(_) | Kind::Walk { .. } => Vec::new(),
        }
    }

    /// The product of a stage that has one.
    pub fn gemm(&self) -> Option<&Gemm> {
        match self {
            Kind::Gemm(gemm) => Some(gemm),
            Kind::Experts(experts) => Some(&experts.gemm),
            Kind::Embed { .. }
            | Kind::Taps { .. }
            | Kind::Context(_)
            | Kind::Scores(_)
            | Kind::Attention(_)
            | Kind::Conv(_)
            | Kind::TopK(_)
            | Kind::Pairs(_)
            | Kind::Walk { .. } => None,
        }
    }

    /// What the stage prepares of its output.
    pub fn prepares(&self) -> Option<Prepared> {
        match self {
            Kind::Embed { prepares, .. } => *prepares,
            kind => kind.gemm().and_then(|gemm| gemm.prepares),
        }
    }
}

/// One stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Name without the layer.
    pub name: String,
    /// What it does.
    pub kind: Kind,
}

/// A whole step.
#[derive(Clone, Debug)]
pub struct ResidentProgram {
    /// Name of the model.
    pub name: String,
    /// Columns of the logits; 0 of a program that only fills a cache.
    pub vocab: usize,
    /// Positions of a sequence.
    pub context: usize,
    /// Rows of a step, at most: 8, 16 or 32.
    pub step_rows: usize,
    /// The arena's buffers, for `step_rows` rows each.
    pub buffers: Vec<Buffer>,
    /// The KV cache.
    pub kv: KvLayout,
    /// Recipe of the packed weights.
    pub packing: Packing,
    /// Rotary embeddings, for people.
    pub ropes: Vec<(String, RopeSpec)>,
    /// What a step leaves for a draft.
    pub taps: Option<Taps>,
    /// The embedding.
    pub before: Vec<Stage>,
    /// Kinds of layers.
    pub bodies: Vec<Vec<Stage>>,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// The head.
    pub after: Vec<Stage>,
}

/// What does not hold of a product alone.
fn gemm_defect(gemm: &Gemm) -> Option<String> {
    if matches!(gemm.epilogue, Epilogue::Gated(_)) != (gemm.operands == 2) {
        return Some("a gate has two operands".into());
    }
    (gemm.scales.is_some() != (apart_scales(gemm.format, gemm.k) > 0))
        .then(|| format!("{} and its scales do not fit", gemm.format))
}

/// Why a resident program must not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stage {stage}: {what}")]
pub struct Defect {
    /// Name with the layer.
    pub stage: String,
    /// What does not hold.
    pub what: String,
}

impl ResidentProgram {
    /// A buffer.
    pub fn buffer(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.0 as usize]
    }

    /// Whether a buffer holds slots of experts, rows that lie by themselves and not in octets.
    pub fn in_slots(&self, id: BufferId) -> bool {
        self.bodies.iter().flatten().any(|stage| match &stage.kind {
            Kind::Experts(experts) => experts.route.is_some() && experts.gemm.output == id,
            _ => false,
        })
    }

    /// Chunks that a sequence has at most.
    pub const fn max_chunks(&self) -> usize {
        self.context.div_ceil(CHUNK)
    }

    /// Whether keys and values of a chunk come through the ring; those of wide heads have more than it may hold.
    pub const fn rings(&self) -> bool {
        rings(&self.kv)
    }

    /// Parts of a row and a head that may lie in memory to be added up: of spans as short as any, or of chunks and their
    /// spans.
    pub const fn max_parts(&self) -> usize {
        max_parts(&self.kv, self.context)
    }

    /// Chunks of a span among a sequence's first 1,024 positions, and behind them (`kernels-gen/cuda/sweeps.cuh`). Of short spans
    /// one row is more SMs' work, of long ones several rows are less work, and of a long context there are fewer parts to add
    /// up: a wide step has rows enough. Measured on an H200, spans of 1, 2, 4 and 8 chunks, ms: one row of Llama-3.2-1B behind
    /// 512 positions 0.600, 0.608, 0.614 and 0.621, eight 0.660, 0.646, 0.645 and 0.645; one of gpt-oss-20b 1.200, 1.212, 1.270,
    /// 1.270; one of Llama behind 65,000 positions, from 2 on, 1.429, 1.177, 1.109; 32 of a kernel of 32 behind 512 positions,
    /// from 2 on, 1.070, 1.038, 1.022.
    pub fn spans(&self) -> [usize; 2] {
        let experts = self.bodies.iter().flatten().any(|stage| matches!(stage.kind, Kind::Experts(_)));
        let far = if self.context > 16 << 10 { 8 } else { 4 };
        match (self.step_rows > SLICE_ROWS, experts) {
            (true, _) => [8, 8],
            (false, true) => [1, far],
            (false, false) => [2, far],
        }
    }

    /// The unrolled sequence, with names.
    pub fn sequence(&self) -> Vec<(String, Option<usize>, &Stage)> {
        let before = self.before.iter().map(|stage| (stage.name.clone(), None, stage));
        let layers = self.layers.iter().enumerate().flat_map(|(number, layer)| {
            self.bodies[layer.body]
                .iter()
                .map(move |stage| (format!("l{number}.{}", stage.name), Some(number), stage))
        });
        let after = self.after.iter().map(|stage| (stage.name.clone(), None, stage));
        before.chain(layers).chain(after).collect()
    }

    /// Checks that the program may run on any number of SMs.
    ///
    /// Every stage waits for all of the one before, so only three things can go wrong: a stage reads
    /// what no stage has written; it writes in place what its other tiles, or other SMs, still read
    /// whole; or its parts do not fit each other.
    ///
    /// # Errors
    /// The first [`Defect`].
    pub fn verify(&self) -> Result<(), Defect> {
        let mut written = vec![false; self.buffers.len()];
        let mut chosen = None; // the layer whose experts were chosen last
        let mut logits = false;
        if !is_step_rows(self.step_rows) {
            let what = format!("a step has 8, 16 or {LAUNCH_ROWS} rows, not {}", self.step_rows);
            return Err(Defect { stage: self.name.clone(), what });
        }
        self.verify_taps()?;
        for (name, layer, stage) in self.sequence() {
            let fail = |what: String| Err(Defect { stage: name.clone(), what });
            let packed = |slot: Slot| match (slot, layer) {
                (Slot::Fixed(at), _) => at < self.packing.bytes,
                (Slot::Layer(n), Some(layer)) => {
                    self.layers[layer].offsets.get(n).is_some_and(|at| *at < self.packing.bytes)
                }
                (Slot::Layer(_), None) => false,
            };
            let (reads, writes) = match &stage.kind {
                Kind::Embed { format, scales, output, k, .. } => {
                    if scales.is_some() != (*format == Format::FP8_BLOCK) || feature_scales(*format) {
                        return fail(format!("{format} and its scales do not fit"));
                    }
                    if self.buffer(*output).cols != *k {
                        return fail(format!("{k} columns do not fit {}", self.buffer(*output).name));
                    }
                    (Vec::new(), Some(*output))
                }
                Kind::Taps { output } => {
                    let first = self.before.first().is_some_and(|first| std::ptr::eq(first, stage));
                    if !first || !self.buffer(*output).cols.is_multiple_of(OCTET) {
                        return fail("taps are whole octets, and a program begins with them".into());
                    }
                    (Vec::new(), Some(*output))
                }
                Kind::Context(context) => {
                    let layer = context.kv_heads * (self.kv.qk_dim + self.kv.v_dim);
                    let mut eps = context.k_norms.iter().map(|norm| norm.map(|norm| norm.eps));
                    let first = eps.next();
                    if context.k_norms.len() != self.kv.layers
                        || context.kv_heads != self.kv.kv_heads
                        || self.buffer(context.input).cols != layer * self.kv.layers
                        || self.buffer(context.input).elem != BufferElem::F32
                        || eps.any(|eps| Some(eps) != first)
                    {
                        return fail("layers, heads and buffers do not fit".into());
                    }
                    (vec![context.input], None)
                }
                Kind::Gemm(gemm) => {
                    if gemm.prepared.is_none() && self.buffer(gemm.input).cols != gemm.k {
                        return fail(format!(
                            "{} columns do not fit {}",
                            gemm.k,
                            self.buffer(gemm.input).name
                        ));
                    }
                    logits |= gemm.epilogue == Epilogue::Logits;
                    let logits = gemm.epilogue == Epilogue::Logits;
                    if !logits && self.buffer(gemm.output).cols != gemm.cols {
                        return fail(format!(
                            "{} features do not fit {}",
                            gemm.cols,
                            self.buffer(gemm.output).name
                        ));
                    }
                    if !logits && !gemm.cols.is_multiple_of(OCTET) {
                        return fail(format!("{} features are not whole octets", gemm.cols));
                    }
                    if gemm.epilogue == Epilogue::Residual && !written[gemm.output.0 as usize] {
                        return fail(format!(
                            "adds to {} before it is written",
                            self.buffer(gemm.output).name
                        ));
                    }
                    if let Some(what) = gemm_defect(gemm) {
                        return fail(what);
                    }
                    let partial = gemm.partial.map(|id| self.buffer(id));
                    if partial.is_some() != (gemm.k > part_columns(self.step_rows))
                        || partial.is_some_and(|buffer| {
                            buffer.elem != BufferElem::F32
                                || buffer.cols < gemm.tiles() * OCTET * gemm.operands
                        })
                    {
                        return fail(format!("{} columns and room for their parts do not fit", gemm.k));
                    }
                    if let Some(router) = gemm.router {
                        if let Some(what) = self.router_defect(gemm, &router) {
                            return fail(what.into());
                        }
                        if !written[router.before.0 as usize] {
                            return fail("adds to scores that nobody has made".into());
                        }
                        written[router.output.0 as usize] = true;
                    }
                    (vec![gemm.input], Some(gemm.output))
                }
                Kind::Scores(scores) => {
                    if let Some(what) = self.scores_defect(scores) {
                        return fail(what.into());
                    }
                    let mut reads = vec![scores.input];
                    reads.extend(scores.squares);
                    (reads, Some(scores.output))
                }
                Kind::Experts(experts) => {
                    let Experts { gemm, experts: count, top_k, route } = experts;
                    if let Some(what) = gemm_defect(gemm) {
                        return fail(what);
                    }
                    if *top_k == 0 || top_k > count || *count > MAX_EXPERTS || *top_k > MAX_TOP_K {
                        return fail(format!("{top_k} of {count} experts"));
                    }
                    let (input, output) = (self.buffer(gemm.input), self.buffer(gemm.output));
                    let fits = gemm.prepared.is_some() || input.cols == experts.input_cols();
                    if !fits || output.cols != experts.output_cols() {
                        return fail(format!("slots do not fit {} and {}", input.name, output.name));
                    }
                    let mut reads = vec![gemm.input];
                    match route {
                        Some(Route { scores, routing, unscaled }) => {
                            let sigmoid = routing.scoring == Scoring::Sigmoid && unscaled.is_none();
                            if let Some(unscaled) = unscaled {
                                if gemm.prepared.map(|prepared| prepared.squares) != Some(unscaled.squares) {
                                    return fail("scores and the squares of their rows do not fit".into());
                                }
                                reads.push(unscaled.squares);
                            }
                            if self.buffer(*scores).cols
                                != count.next_multiple_of(OCTET) * if sigmoid { 2 } else { 1 }
                                || self.buffer(*scores).elem != BufferElem::F32
                                || routing.top_k != *top_k
                                || !matches!(gemm.epilogue, Epilogue::Gated(_))
                            {
                                return fail("the choice does not fit the experts".into());
                            }
                            reads.push(*scores);
                            chosen = layer;
                        }
                        None => {
                            if chosen != layer || layer.is_none() {
                                return fail("no stage of its layer has chosen experts".into());
                            }
                            if gemm.epilogue != Epilogue::Residual || gemm.norm.is_some() {
                                return fail("slots are added up as they are".into());
                            }
                            if !written[gemm.output.0 as usize] {
                                return fail(format!("adds to {} before it is written", output.name));
                            }
                        }
                    }
                    (reads, Some(gemm.output))
                }
                Kind::Attention(attention) => {
                    let qk = (attention.heads + attention.kv_heads) * self.kv.qk_dim;
                    if self.buffer(attention.input).cols != qk + attention.kv_heads * self.kv.v_dim
                        || self.buffer(attention.output).cols != attention.heads * self.kv.v_dim
                        || !(1..=self.kv.kv_heads).contains(&attention.kv_heads)
                        || !attention.heads.is_multiple_of(attention.kv_heads)
                    {
                        return fail("heads and buffers do not fit".into());
                    }
                    let mut reads = vec![attention.input];
                    if let Some(scores) = &attention.router {
                        // They stand without a norm, and their choice is elsewhere.
                        let plain = !scores.sigmoid && scores.bias.is_none() && scores.correction.is_none();
                        let bare = scores.squares.is_none() && (plain || scores.expects);
                        if let Some(what) =
                            self.scores_defect(scores).or((!bare).then_some("makes no scores alone"))
                        {
                            return fail(what.into());
                        }
                        reads.push(scores.input);
                        written[scores.output.0 as usize] = true;
                    }
                    (reads, Some(attention.output))
                }
                Kind::Conv(conv) => {
                    let (input, kernels) = (self.buffer(conv.input), self.buffer(conv.kernels));
                    let output = self.buffer(conv.output);
                    if !input.cols.is_multiple_of(OCTET)
                        || output.cols != input.cols
                        || conv.group == 0
                        || !input.cols.is_multiple_of(conv.group)
                        || kernels.cols < 4 * (input.cols / conv.group)
                        || conv.side > 1
                        || [input.elem, kernels.elem] != [BufferElem::F32; 2]
                        || conv.residual && output.elem != BufferElem::F32
                    {
                        return fail("a convolution and its buffers do not fit".into());
                    }
                    if conv.residual && !written[conv.output.0 as usize] {
                        return fail(format!("adds to {} before it is written", output.name));
                    }
                    (vec![conv.input, conv.kernels], Some(conv.output))
                }
                Kind::TopK(top) => {
                    if !logits || top.vocab != self.vocab || !self.fits_lists(top) {
                        return fail("candidates do not fit the logits in front of them".into());
                    }
                    (Vec::new(), Some(top.lists))
                }
                Kind::Pairs(pairs) => {
                    let (k, hidden) = (pairs.top.k, self.buffer(pairs.hidden));
                    let (tokens, scores) = (self.buffer(pairs.tokens), self.buffer(pairs.scores));
                    let halves = |(_, format): &(Slot, Format)| [Format::BF16, Format::F16].contains(format);
                    if !self.fits_lists(&pairs.top)
                        || !(1..=MAX_RANK).contains(&pairs.rank)
                        || hidden.cols < pairs.rank
                        || (tokens.cols, scores.cols) != (k, k * k)
                        || [hidden.elem, tokens.elem, scores.elem] != [BufferElem::F32; 3]
                        || !pairs.tables.iter().all(halves)
                    {
                        return fail("pairs and their buffers do not fit".into());
                    }
                    written[pairs.tokens.0 as usize] = true;
                    (vec![pairs.top.lists, pairs.hidden], Some(pairs.scores))
                }
                Kind::Walk { k, tokens, scores } => {
                    if (self.buffer(*tokens).cols, self.buffer(*scores).cols) != (*k, k * k) || *k > MAX_KEPT
                    {
                        return fail("a walk and its scores do not fit".into());
                    }
                    (vec![*tokens, *scores], None)
                }
            };
            if let Some(bad) = stage.kind.slots().into_iter().find(|slot| !packed(*slot)) {
                return fail(format!("weights at {bad} are not packed"));
            }
            for read in reads {
                if !written[read.0 as usize] {
                    return fail(format!("reads {} before it is written", self.buffer(read).name));
                }
                let stored = !matches!(&stage.kind, Kind::Gemm(gemm) if gemm.epilogue == Epilogue::Logits);
                if stored && Some(read) == writes {
                    return fail(format!("writes {} while other SMs read it", self.buffer(read).name));
                }
            }
            if let Some(writes) = writes {
                written[writes.0 as usize] = true;
            }
            if let Some(prepared) = stage.kind.gemm().and_then(|gemm| gemm.prepared)
                && !written[prepared.squares.0 as usize]
            {
                return fail("reads rows that nobody has prepared".into());
            }
            if let Some(prepared) = stage.kind.prepares() {
                if stage.kind.gemm().is_some_and(|gemm| gemm.input == prepared.halves) {
                    return fail("prepares rows while other SMs read them".into());
                }
                written[prepared.halves.0 as usize] = true;
                written[prepared.squares.0 as usize] = true;
            }
        }
        self.verify_routers()?;
        self.readers()?;
        self.verify_handoffs(&self.handoffs())
    }

    /// For each stage of the step that prepares rows, who reads them next; nothing for the others.
    ///
    /// # Errors
    /// Rows that are prepared for one norm and read behind another, or whose buffers do not fit.
    pub fn readers(&self) -> Result<Vec<Reader>, Defect> {
        let mut readers = Vec::new();
        // By buffer of halves: the stage that prepared it last, and for whom.
        let mut last: HashMap<BufferId, (usize, Option<Reader>)> = HashMap::new();
        for (number, (name, layer, stage)) in self.sequence().into_iter().enumerate() {
            let fail = |what: &str| Err(Defect { stage: name.clone(), what: what.into() });
            readers.push(Reader::default());
            if let Some(gemm) = stage.kind.gemm()
                && let Some(prepared) = gemm.prepared
            {
                let (halves, squares) = (self.buffer(prepared.halves), self.buffer(prepared.squares));
                if gemm.input != prepared.halves
                    || halves.elem != BufferElem::Bf16
                    || halves.cols != gemm.k.next_multiple_of(ROW_BLOCK)
                    || squares.elem != BufferElem::F32
                    || squares.cols != (gemm.k / OCTET).next_multiple_of(4)
                    || gemm.format == Format::F16
                {
                    return fail("prepared rows and their buffers do not fit");
                }
                let gain = match (gemm.norm.map(|norm| norm.gain), layer) {
                    (Some(Slot::Fixed(at)), _) => Some(at),
                    (Some(Slot::Layer(n)), Some(layer)) => self.layers[layer].offsets.get(n).copied(),
                    _ => None,
                };
                let (Some(gain), Some((maker, reader))) = (gain, last.get_mut(&prepared.halves)) else {
                    return fail("reads prepared rows without a norm, or without their maker");
                };
                let own = Reader { gain, order: prepared_order(gemm.format) };
                if *reader.get_or_insert(own) != own {
                    return fail("reads rows that are prepared for another norm");
                }
                readers[*maker] = own;
            }
            if let Some(prepared) = stage.kind.prepares() {
                let fits = match &stage.kind {
                    Kind::Embed { k, .. } => Some(*k),
                    kind => kind.gemm().filter(|gemm| gemm.operands == 1).map(|gemm| gemm.cols),
                };
                if fits.map(|cols| cols.next_multiple_of(ROW_BLOCK))
                    != Some(self.buffer(prepared.halves).cols)
                {
                    return fail("prepares rows that do not fit their buffer");
                }
                last.insert(prepared.halves, (number, None));
            }
        }
        Ok(readers)
    }

    /// Checks that scores which are made in parts are parts of the same.
    fn verify_routers(&self) -> Result<(), Defect> {
        for stages in &self.bodies {
            let of =
                |found: fn(&Kind) -> bool| stages.iter().map(|stage| &stage.kind).find(|kind| found(kind));
            let attention = of(|kind| matches!(kind, Kind::Attention(Attention { router: Some(_), .. })));
            let product = of(|kind| matches!(kind, Kind::Gemm(Gemm { router: Some(_), .. })));
            let first = of(|kind| matches!(kind, Kind::Experts(Experts { route: Some(_), .. })));
            let before = match attention {
                Some(Kind::Attention(attention)) => attention.router.as_ref(),
                _ => None,
            };
            let added = match product {
                Some(Kind::Gemm(gemm)) => gemm.router.map(|router| (router, gemm.output)),
                _ => None,
            };
            let route = match first {
                Some(Kind::Experts(experts)) => {
                    experts.route.as_ref().map(|route| (route, experts.experts, experts.gemm.k))
                }
                _ => None,
            };
            let sound = match (before, added, route) {
                (Some(before), Some((added, rows)), Some((route, experts, k))) => {
                    before.input == rows
                        && (before.output, before.experts) == (added.before, added.experts)
                        && (route.scores, experts) == (added.output, added.experts)
                        && route.unscaled.is_some_and(|unscaled| {
                            let foreseen = added.foresees.then_some(before.output);
                            unscaled.k == before.k && before.k == k && unscaled.foreseen == foreseen
                        })
                }
                (None, None, Some((route, ..))) => route.unscaled.is_none(),
                (None, None, None) => true,
                _ => false,
            };
            if !sound {
                let stage = stages.first().map_or_else(String::new, |stage| stage.name.clone());
                return Err(Defect {
                    stage,
                    what: "the parts of a router's scores do not fit each other".into(),
                });
            }
        }
        Ok(())
    }

    /// What does not hold of a router's scores alone.
    fn scores_defect(&self, scores: &Scores) -> Option<&'static str> {
        let (input, output) = (self.buffer(scores.input), self.buffer(scores.output));
        if input.cols != scores.k
            || input.elem != BufferElem::F32
            || output.cols != scores.output_cols()
            || output.elem != BufferElem::F32
            || ![Format::BF16, Format::F32].contains(&scores.format)
        {
            return Some("scores and buffers do not fit");
        }
        let squares = self.buffer(scores.squares?);
        let fits = scores.norm.is_some()
            && squares.elem == BufferElem::F32
            && squares.cols == (scores.k / OCTET).next_multiple_of(4);
        (!fits).then_some("scores and the squares of their rows do not fit")
    }

    /// What does not hold of a product and the scores that it also makes.
    fn router_defect(&self, gemm: &Gemm, router: &RouterTiles) -> Option<&'static str> {
        let cols = router.experts.next_multiple_of(OCTET);
        let fits = |id: BufferId, halves: &[usize]| {
            let buffer = self.buffer(id);
            halves.iter().any(|halves| buffer.cols == halves * cols) && buffer.elem == BufferElem::F32
        };
        let whole = (router.experts * RouterTiles::PARTS).is_multiple_of(OCTET);
        if !whole || !fits(router.before, &[1, 2]) || !fits(router.output, &[1]) {
            return Some("a router's scores and their buffers do not fit");
        }
        let suits = gemm.format == Format::BF16
            && gemm.operands == 1
            && gemm.partial.is_none()
            && gemm.norm.is_none()
            && gemm.epilogue == Epilogue::Residual;
        (!suits).then_some("makes scores of what it does not add to its rows")
    }

    fn fits_lists(&self, top: &TopK) -> bool {
        let lists = self.buffer(top.lists);
        (1..=MAX_KEPT.min(top.vocab)).contains(&top.k)
            && top.segments > 0
            && lists.cols == 2 * top.segments * top.k
            && lists.elem == BufferElem::F32
    }

    /// Checks that every layer with a tap leaves its residual stream.
    fn verify_taps(&self) -> Result<(), Defect> {
        let fail = |what: String| Err(Defect { stage: "taps".into(), what });
        let Some(Taps { layers, cols }) = &self.taps else { return Ok(()) };
        for (number, layer) in layers.iter().enumerate() {
            let Some(Layer { body, .. }) = self.layers.get(*layer) else {
                return fail(format!("there is no layer {layer}"));
            };
            if layers[..number].contains(layer) {
                return fail(format!("layer {layer} is tapped twice"));
            }
            let stored = |gemm: &Gemm| gemm.tap && gemm.cols == *cols && gemm.epilogue == Epilogue::Residual;
            let taps =
                self.bodies[*body].iter().filter_map(|stage| stage.kind.gemm()).filter(|gemm| gemm.tap);
            if !taps.clone().all(stored) || taps.count() != 1 {
                return fail(format!("layer {layer} does not leave one residual stream of {cols} columns"));
            }
        }
        Ok(())
    }

    /// The stages of a step: of each its number among the kinds of stages (those before the layers, those of the
    /// bodies in their order, those behind the layers) and its layer.
    pub fn step_order(&self) -> Vec<(usize, Option<usize>)> {
        let mut first = vec![self.before.len()];
        for body in &self.bodies {
            first.push(first[first.len() - 1] + body.len());
        }
        let after = first[self.bodies.len()];
        let mut order: Vec<(usize, Option<usize>)> =
            (0..self.before.len()).map(|kind| (kind, None)).collect();
        for (number, layer) in self.layers.iter().enumerate() {
            let stages = 0..self.bodies[layer.body].len();
            order.extend(stages.map(|stage| (first[layer.body] + stage, Some(number))));
        }
        order.extend((0..self.after.len()).map(|stage| (after + stage, None)));
        order
    }

    /// Costs by kind of stage, those of a body with as many runs as it has layers.
    pub fn costs(&self) -> Vec<StageCost> {
        let bodies =
            self.bodies.iter().enumerate().map(|(number, body)| {
                (body, self.layers.iter().filter(|layer| layer.body == number).count())
            });
        let all = [(&self.before, 1)].into_iter().chain(bodies).chain([(&self.after, 1)]);
        all.flat_map(|(stages, runs)| stages.iter().map(move |stage| self.cost(stage, runs))).collect()
    }

    fn cost(&self, stage: &Stage, runs: usize) -> StageCost {
        let row = |id: BufferId| {
            let buffer = self.buffer(id);
            (buffer.cols * if buffer.elem == BufferElem::F32 { 4 } else { 2 }) as u64
        };
        let mut cost = StageCost {
            stage: stage.name.clone(),
            anchor: String::new(),
            runs,
            experts: 0,
            experts_per_row: 0,
            weight_bytes: 0,
            macs_per_row: 0,
            kv_bytes_per_position: 0,
            kv_macs_per_position: 0,
            kv_window: None,
            activation_bytes_per_row: 0,
            logit_rows_only: false,
        };
        match &stage.kind {
            Kind::Embed { format, k, output, .. } => {
                cost.anchor = "embed".into();
                cost.activation_bytes_per_row = format.stored_bytes(1, *k) as u64 + row(*output);
            }
            Kind::Taps { output } => {
                cost.anchor = "taps".into();
                cost.activation_bytes_per_row = self.buffer(*output).cols as u64 * 4 + row(*output);
            }
            Kind::Context(context) => {
                cost.anchor = "context".into();
                let each = self.kv.qk_dim + self.kv.v_dim;
                let cached = context.k_norms.len() * context.kv_heads * each * self.kv.kv_type.bytes();
                cost.activation_bytes_per_row = row(context.input) + cached as u64;
            }
            Kind::Gemm(gemm) => {
                cost.anchor = format!("gemm {}", gemm.format);
                cost.weight_bytes = gemm.weight_bytes() as u64;
                let router = gemm.router_tiles() * OCTET;
                cost.macs_per_row = (gemm.k * (gemm.cols * gemm.operands + router)) as u64;
                cost.activation_bytes_per_row = row(gemm.input)
                    + if gemm.epilogue == Epilogue::Logits { gemm.cols as u64 * 4 } else { row(gemm.output) };
                cost.logit_rows_only = gemm.select;
            }
            Kind::Scores(scores) => {
                cost.anchor = format!("scores {}", scores.format);
                cost.weight_bytes = scores.weight_bytes() as u64;
                cost.macs_per_row = (scores.k * scores.experts) as u64;
                cost.activation_bytes_per_row = row(scores.input) + row(scores.output);
            }
            Kind::Experts(experts) => {
                let gemm = &experts.gemm;
                cost.anchor = format!("experts {}", gemm.format);
                cost.weight_bytes = experts.weight_bytes() as u64;
                (cost.experts, cost.experts_per_row) = (experts.experts, experts.top_k);
                cost.macs_per_row = (gemm.k * gemm.cols * gemm.operands * experts.top_k) as u64;
                cost.activation_bytes_per_row = row(gemm.input) + row(gemm.output);
            }
            Kind::Attention(attention) => {
                let each = self.kv.qk_dim + self.kv.v_dim;
                cost.anchor = "attention".into();
                if let Some(scores) = &attention.router {
                    cost.weight_bytes = scores.weight_bytes() as u64;
                    cost.macs_per_row = (scores.k * scores.experts) as u64;
                }
                cost.kv_bytes_per_position = (attention.kv_heads * each * self.kv.kv_type.bytes()) as u64;
                cost.kv_macs_per_position = (attention.heads * each) as u64;
                cost.kv_window = attention.window;
                cost.activation_bytes_per_row = row(attention.input) + row(attention.output);
            }
            Kind::Conv(conv) => {
                cost.anchor = "dynamic_conv".into();
                cost.macs_per_row = 2 * self.buffer(conv.input).cols as u64;
                cost.activation_bytes_per_row = row(conv.input) + row(conv.kernels) + row(conv.output);
            }
            Kind::TopK(top) => {
                cost.anchor = "top_k".into();
                cost.activation_bytes_per_row = top.vocab as u64 * 4 + row(top.lists);
                cost.logit_rows_only = true;
            }
            Kind::Pairs(pairs) => {
                cost.anchor = "pair_scores".into();
                let (k, rank) = (pairs.top.k, pairs.rank);
                cost.macs_per_row = (k * k * rank) as u64;
                cost.activation_bytes_per_row =
                    row(pairs.top.lists) + row(pairs.scores) + (2 * k * rank * 2) as u64;
                cost.logit_rows_only = true;
            }
            Kind::Walk { scores, .. } => {
                cost.anchor = "walk".into();
                cost.activation_bytes_per_row = row(*scores);
                cost.logit_rows_only = true;
            }
        }
        cost
    }

    fn product_text(&self, gemm: &Gemm) -> String {
        let pair = if gemm.operands == 2 { " pair" } else { "" };
        let (cols, k, tiles) = (gemm.cols, gemm.k, gemm.tiles());
        format!("{} {cols}x{k}{pair} {} in {tiles} tiles", gemm.format, gemm.weights)
    }

    fn epilogue_text(&self, gemm: &Gemm, add: &str) -> String {
        let output = self.buffer(gemm.output).name.as_str();
        let bias: String = gemm.bias.iter().map(|bias| format!(" -> bias {}", bias.slot)).collect();
        match gemm.epilogue {
            Epilogue::Store => format!("{bias} -> store {output}"),
            Epilogue::Gated(activation) => format!("{bias} -> {activation} -> store {output}"),
            Epilogue::Residual => {
                let tap = if gemm.tap { " -> taps" } else { "" };
                format!("{bias} -> {add} to {output}{tap}")
            }
            Epilogue::Logits => format!("{bias} -> logits"),
        }
    }

    fn scores_text(&self, scores: &Scores, norm: &str) -> String {
        let Scores { weights, format, experts, k, .. } = scores;
        let name = |id: BufferId| self.buffer(id).name.as_str();
        let slot =
            |what: &str, slot: Option<Slot>| slot.map_or(String::new(), |slot| format!("{what}{slot}"));
        let norm = match scores.norm {
            Some(Norm { gain, eps }) if norm == "rms_norm" => format!("{norm} {gain} eps={eps:e} -> "),
            Some(Norm { gain, .. }) => format!("{norm} {gain} -> "),
            None => String::new(),
        };
        let sigmoid = match scores.sigmoid {
            true => format!(" and sigmoid{}", slot(" corrected by ", scores.correction)),
            false if scores.expects => " and normalized".into(),
            false => String::new(),
        };
        format!(
            "{}{} -> {norm}scores of {experts} experts {format} {experts}x{k} {weights}, {} B{}{sigmoid} -> store {}",
            name(scores.input),
            slot(" + ", scores.added),
            scores.weight_bytes(),
            slot(" -> bias ", scores.bias),
            name(scores.output)
        )
    }

    /// Text of a stage: what it does, in one or two lines.
    fn stage_text(&self, stage: &Stage) -> String {
        let name = |id: &BufferId| self.buffer(*id).name.as_str();
        let norm = |what: &str, norm: &Option<Norm>| match norm {
            Some(norm) => format!("{what} {} eps={:e} -> ", norm.gain, norm.eps),
            None => String::new(),
        };
        let prepares = match stage.kind.prepares() {
            Some(prepared) => format!(", prepares {}", name(&prepared.halves)),
            None => String::new(),
        };
        match &stage.kind {
            Kind::Embed { table, format, vocab, k, replaced, output, .. } => {
                let replaced = replaced.map_or(String::new(), |Replaced { token, vector }| {
                    format!(" -> {vector} for token {token}")
                });
                format!("embed {format} {vocab}x{k} {table}{replaced} -> {}{prepares}", name(output))
            }
            Kind::Taps { output } => format!("rows of taps -> {}", name(output)),
            Kind::Context(context) => {
                let Context { input, k_norms, kv_heads, rope, value_scale } = context;
                let norms = match k_norms.iter().flatten().next() {
                    Some(norm) => format!("k_norm eps={:e} -> ", norm.eps),
                    None => String::new(),
                };
                let rope =
                    rope.map_or(String::new(), |rope| format!("rope {} dims={} -> ", rope.table, rope.dims));
                let values = match value_scale {
                    1.0 => String::new(),
                    factor => format!("values x {factor} -> "),
                };
                let layers = k_norms.len();
                format!(
                    "{} -> {norms}{rope}{values}cache of {layers} layers, kv_heads={kv_heads}",
                    name(input)
                )
            }
            Kind::Gemm(gemm) => {
                let select = if gemm.select { "selected rows of " } else { "" };
                let router = gemm.router.map_or(String::new(), |router| {
                    format!(
                        ", and scores of {} experts {} in {} tiles -> add {} -> store {}",
                        router.experts,
                        router.weights,
                        router.tiles(),
                        name(&router.before),
                        name(&router.output)
                    )
                });
                format!(
                    "{select}{} -> {}gemm {}, {} B{}{prepares}{router}",
                    name(&gemm.input),
                    norm("rms_norm", &gemm.norm),
                    self.product_text(gemm),
                    gemm.weight_bytes(),
                    self.epilogue_text(gemm, "add")
                )
            }
            Kind::Scores(scores) => self.scores_text(scores, "rms_norm"),
            Kind::Experts(experts) => {
                let Experts { gemm, experts: count, top_k, route } = experts;
                let route = route.as_ref().map_or(String::new(), |route| {
                    let Routing { scoring, renormalize, factor, .. } = &route.routing;
                    let scoring = match scoring {
                        Scoring::Softmax => "softmax",
                        Scoring::ChosenSoftmax => "chosen_softmax",
                        Scoring::Sigmoid => "sigmoid",
                    };
                    let renormalize = if *renormalize { " renormalized" } else { "" };
                    let factor = if *factor == 1.0 { String::new() } else { format!(" factor={factor}") };
                    let unscaled = route.unscaled.map_or(String::new(), |unscaled| {
                        let bias = unscaled.bias.map_or(String::new(), |slot| format!(", bias {slot}"));
                        let correction = unscaled
                            .correction
                            .map_or(String::new(), |slot| format!(", corrected by {slot}"));
                        let foreseen = unscaled
                            .foreseen
                            .map_or(String::new(), |before| format!(", foreseen by {}", name(&before)));
                        format!(" normalized eps={:e}{bias}{correction}{foreseen}", unscaled.eps)
                    });
                    format!("by {}{unscaled} {scoring}{renormalize}{factor} -> ", name(&route.scores))
                });
                format!(
                    "{} -> {}{route}experts {top_k} of {count} {}, {} B{}{prepares}",
                    name(&gemm.input),
                    norm("rms_norm", &gemm.norm),
                    self.product_text(gemm),
                    experts.weight_bytes(),
                    self.epilogue_text(gemm, "weigh and add")
                )
            }
            Kind::Attention(attention) => {
                let rope = attention
                    .rope
                    .map_or(String::new(), |rope| format!("rope {} dims={} -> ", rope.table, rope.dims));
                let window = attention.window.map_or(String::new(), |window| format!(" window={window}"));
                let sinks = attention.sinks.map_or(String::new(), |sinks| format!(" sinks={sinks}"));
                let both = if attention.bidirectional { " bidirectional" } else { "" };
                let values = match attention.value_scale {
                    1.0 => String::new(),
                    factor => format!("values x {factor} -> "),
                };
                let kv_heads = match attention.kv_heads {
                    all if all == self.kv.kv_heads => String::new(),
                    fewer => format!(" kv_heads={fewer}"),
                };
                let router = attention
                    .router
                    .as_ref()
                    .map_or(String::new(), |scores| format!("; {}", self.scores_text(scores, "gain")));
                format!(
                    "{} -> {}{}{rope}{values}cache -> attention heads={}{kv_heads} scale={}{window}{sinks}{both} -> {}{router}",
                    name(&attention.input),
                    norm("q_norm", &attention.q_norm),
                    norm("k_norm", &attention.k_norm),
                    attention.heads,
                    attention.scale,
                    name(&attention.output)
                )
            }
            Kind::Conv(conv) => {
                let Conv { input, norm: in_front, kernels, base, side, group, residual, output } = conv;
                let sink = if *residual { "add to" } else { "store" };
                format!(
                    "{} -> {}dynamic_conv by {base} and {} side={side} group={group} -> {sink} {}",
                    name(input),
                    norm("rms_norm", in_front),
                    name(kernels),
                    name(output)
                )
            }
            Kind::TopK(TopK { vocab, k, segments, lists }) => {
                format!("top_k {k} of each of {segments} segments of {vocab} logits -> {}", name(lists))
            }
            Kind::Pairs(pairs) => {
                let Pairs { top, factor, softcap, hidden, rank, tables, tokens, scores } = pairs;
                let softcap = softcap.map_or(String::new(), |softcap| format!(" softcap={softcap}"));
                let [(before, format), (behind, _)] = tables;
                format!(
                    "{} -> top_k {} factor={factor}{softcap} -> {}, by {} pair_scores rank={rank} {format} {before} {behind} -> {}",
                    name(&top.lists),
                    top.k,
                    name(tokens),
                    name(hidden),
                    name(scores)
                )
            }
            Kind::Walk { k, tokens, scores } => {
                format!("walk over {k} of {} by {} -> tokens", name(tokens), name(scores))
            }
        }
    }
}

impl fmt::Display for ResidentProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "resident {:?} rows={} {{", self.name, self.step_rows)?;
        let kv = &self.kv;
        writeln!(
            f,
            "  kv {} layers={} kv_heads={} qk_dim={} v_dim={} page_tokens={}",
            kv.kv_type.name(),
            kv.layers,
            kv.kv_heads,
            kv.qk_dim,
            kv.v_dim,
            kv.page_tokens
        )?;
        for buffer in &self.buffers {
            let (elem, rows) = (buffer.elem.name(), buffer.rows);
            writeln!(
                f,
                "  buffer {:<8} {elem}[{rows}, {}] at {:#x}",
                buffer.name, buffer.cols, buffer.offset
            )?;
        }
        if let Some(taps) = &self.taps {
            writeln!(f, "  taps of layers {:?}, {} columns each", taps.layers, taps.cols)?;
        }
        writeln!(f, "  packed {} bytes in {} items", self.packing.bytes, self.packing.items.len())?;
        let list = |f: &mut fmt::Formatter<'_>, title: &str, stages: &[Stage]| -> fmt::Result {
            writeln!(f, "\n  # {title}")?;
            stages
                .iter()
                .try_for_each(|stage| writeln!(f, "  stage {}: {}", stage.name, self.stage_text(stage)))
        };
        list(f, "before the layers", &self.before)?;
        for (number, body) in self.bodies.iter().enumerate() {
            let layers: Vec<usize> =
                (0..self.layers.len()).filter(|layer| self.layers[*layer].body == number).collect();
            list(f, &format!("layers {}", crate::stages::ranges(&layers)), body)?;
        }
        list(f, "after the layers", &self.after)?;
        writeln!(f, "}}")
    }
}
