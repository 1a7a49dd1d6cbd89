//! The stages: fused operators cut into tiles, with buffers, packed weights and the hand-offs
//! between them.
//!
//! A step runs a fixed sequence of stages: those before the layers, then each layer's body, then
//! those after. Layers of the same structure share a body and differ in a table of offsets (a loop,
//! not unrolled text). Stages are numbered through the whole unrolled sequence; a wait names a stage
//! by its distance back in that sequence, which is the same in every layer.

use crate::abi::{KvLayout, QuantRows};
use crate::format::{PANEL, PanelLayout};
use crate::graph::{ActivationFn, Dim, RopeSpec, Router, Scoring};
use crate::launch::SLICE_ROWS;
use crate::pack::Packing;
use crate::resident::ROW_BLOCK;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Identifies an activation buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BufferId(pub u32);

/// How the elements of an activation buffer are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BufferElem {
    /// IEEE single, `[rows][cols]`.
    F32,
    /// bfloat16, `[rows][cols]`: octets of rows, 32 columns of each row side by side (`rows.cuh`); or slots of
    /// experts, each of which is a row as it lies.
    Bf16,
    /// Signed bytes in blocks: [`QuantRows`].
    Q8,
    /// Experts and their weights, a column a slot: a plane of numbers `u32 [rows][cols]`, then, on a
    /// line of 64 bytes, a plane of weights `f32 [rows][cols]`.
    Routes,
}

impl BufferElem {
    /// The name that the text forms use.
    pub const fn name(self) -> &'static str {
        match self {
            BufferElem::F32 => "f32",
            BufferElem::Bf16 => "bf16",
            BufferElem::Q8 => "q8",
            BufferElem::Routes => "routes",
        }
    }
}

/// An activation buffer in the arena.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Buffer {
    /// Name, for people.
    pub name: String,
    /// Type of its elements.
    pub elem: BufferElem,
    /// Columns.
    pub cols: usize,
    /// Rows that it is sized for.
    pub rows: usize,
    /// Where it starts in the arena, in bytes.
    pub offset: usize,
}

/// As the text forms of programs have it.
impl fmt::Display for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Buffer { name, rows, cols, offset, .. } = self;
        write!(f, "buffer {name:<8} {}[{rows}, {cols}] at {offset:#x}", self.elem.name())
    }
}

impl Buffer {
    /// Bytes of the buffer.
    pub fn bytes(&self) -> usize {
        match self.elem {
            BufferElem::Q8 => self.quant_rows().bytes(),
            BufferElem::F32 => (self.rows * self.cols * 4).next_multiple_of(64),
            BufferElem::Bf16 => {
                (self.rows.next_multiple_of(SLICE_ROWS) * self.row_bytes()).next_multiple_of(64)
            }
            BufferElem::Routes => 2 * self.route_weights(),
        }
    }

    /// Bytes of a row of numbers.
    pub const fn row_bytes(&self) -> usize {
        match self.elem {
            BufferElem::Bf16 => self.cols.next_multiple_of(ROW_BLOCK) * 2,
            _ => self.cols * 4,
        }
    }

    /// Where the weights of routes start, in bytes from the buffer's start.
    pub fn route_weights(&self) -> usize {
        (self.rows * self.cols * 4).next_multiple_of(64)
    }

    /// Layout of a quantized buffer.
    pub fn quant_rows(&self) -> QuantRows {
        QuantRows { k: self.cols, max_rows: self.rows }
    }

    /// Whether it holds signed bytes with scales.
    pub fn quantized(&self) -> bool {
        self.elem == BufferElem::Q8
    }
}

/// Where a packed weight is found: at a fixed offset, or in the layer's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slot {
    /// Byte offset in the packed weights.
    Fixed(u64),
    /// Entry of [`Layer::offsets`].
    Layer(usize),
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Fixed(offset) => write!(f, "@{offset:#x}"),
            Slot::Layer(number) => write!(f, "@layer[{number}]"),
        }
    }
}

/// What a stage is built around.
#[derive(Clone, Debug, PartialEq)]
pub enum StageAnchor {
    /// Rows of a packed table by token id.
    Embed {
        /// The table's panels.
        table: Slot,
        /// Layout of a panel.
        layout: PanelLayout,
        /// Rows of the table.
        vocab: usize,
    },
    /// Nothing to do: the runtime has filled the buffer that the stage stores.
    Input,
    /// Rows of several buffers side by side.
    Taps {
        /// The buffers, f32, in the order of their columns.
        inputs: Vec<BufferId>,
    },
    /// Rows of a buffer.
    Rows {
        /// The buffer, f32.
        input: BufferId,
        /// Only the rows whose logits are wanted.
        select: bool,
    },
    /// A buffer times the weights of each part.
    Gemm {
        /// The activations, f32 or quantized.
        input: BufferId,
    },
    /// Attention over the layer's cache.
    Attention {
        /// The queries, f32.
        input: BufferId,
        /// Query heads.
        heads: usize,
        /// KV heads of this layer, at most the cache's.
        kv_heads: usize,
        /// Factor on the scores.
        scale: f32,
        /// Positions that a row sees, itself included.
        window: Option<usize>,
        /// f32 `[heads]`: scores that join the softmax and carry no value.
        sinks: Option<Slot>,
        /// Whether a row also sees the rows of its sequence behind it in the step.
        bidirectional: bool,
    },
    /// A convolution over two rows; see [`crate::graph::Op::DynamicConv`].
    DynamicConv {
        /// What is convolved, f32.
        input: BufferId,
        /// The rows' own kernels, f32.
        kernel: BufferId,
        /// f32 `[2][2][cols]`.
        base: Slot,
        /// Which half of the kernels.
        side: usize,
        /// Columns that share a value of a row's own kernel.
        group: usize,
    },
    /// The tokens of the largest logits; see [`crate::graph::Op::TopK`].
    TopK {
        /// The logits, f32.
        input: BufferId,
        /// Logits of a row.
        vocab: usize,
        /// How many tokens.
        k: usize,
        /// Multiplied into every logit.
        factor: f32,
        /// Bound of the logits' magnitudes.
        softcap: Option<f32>,
    },
    /// Scores of pairs of candidates; see [`crate::graph::Op::PairScores`].
    PairScores {
        /// The candidates.
        candidates: BufferId,
        /// Candidates of a row.
        k: usize,
        /// The rows' projections, f32.
        hidden: BufferId,
        /// Panels of the table of tokens before, and of the table of candidates.
        tables: [(Slot, PanelLayout); 2],
    },
    /// From a router's scores to the experts of each row; see [`crate::graph::Router`].
    Route {
        /// The scores, f32.
        input: BufferId,
        /// Experts to choose from.
        experts: usize,
        /// How they are chosen.
        routing: Routing,
        /// f32 `[experts]`, added for the choice alone.
        correction: Option<Slot>,
    },
    /// A buffer times the weights that each part has of the experts that routes name. The rows of a
    /// buffer with a row a slot are sorted by expert, then by row of the step: every stage that reads or
    /// writes one finds the same order from the routes.
    Experts {
        /// The activations, f32 or quantized.
        input: BufferId,
        /// The routes.
        routes: BufferId,
        /// How many there are.
        experts: usize,
        /// Slots: experts of a row.
        top_k: usize,
        /// Whether the input has a row a slot, or one for all.
        per_slot: bool,
    },
}

/// How experts are chosen; see [`crate::graph::Router`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// From scores to what is compared.
    pub scoring: Scoring,
    /// Whether the weights of the chosen are divided by their sum.
    pub renormalize: bool,
    /// Experts that each row gets.
    pub top_k: usize,
    /// Multiplied into every weight.
    pub factor: f32,
}

/// Streamed weights of a part.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PartWeights {
    /// The panels.
    pub slot: Slot,
    /// Layout of a panel.
    pub layout: PanelLayout,
    /// Matrices side by side in a tile: 1, or 2 for a gated pair.
    pub operands: usize,
}

/// A step in the chain behind an anchor; see [`crate::fused::Piece`].
#[derive(Clone, Debug, PartialEq)]
pub enum StagePiece {
    /// Puts a vector in place of the rows of one token.
    Replace {
        /// f32 vector.
        slot: Slot,
        /// The token.
        token: u32,
    },
    /// Adds a vector to an operand's columns.
    Bias {
        /// f32 vector.
        slot: Slot,
        /// Which operand.
        operand: usize,
    },
    /// Adds the vector of the slot's expert to an operand's columns.
    ExpertBias {
        /// f32 `[experts][cols]`.
        slot: Slot,
        /// Which operand.
        operand: usize,
    },
    /// The weighted sum over a row's slots; what follows works on rows.
    Combine,
    /// Multiplies by a constant.
    Scale(f32),
    /// RMS norm over groups of columns.
    RmsNorm {
        /// f32 vector of a group's length.
        slot: Slot,
        /// Columns of a group.
        group: usize,
        /// Added to the mean of squares.
        eps: f32,
    },
    /// Rotary embedding of heads, by the row's position.
    Rope {
        /// Table of cos and sin.
        table: Slot,
        /// Positions of the table.
        positions: usize,
        /// Columns of a head.
        head_dim: usize,
        /// Leading columns of a head that are rotated.
        dims: usize,
    },
    /// `activation(operand 0) * operand 1`.
    Gated(ActivationFn),
    /// Adds the same tile of a buffer.
    Residual(BufferId),
    /// Sink: stores f32, or quantizes and stores bytes, by the buffer's type.
    Store(BufferId),
    /// Sink: the cache's keys.
    WriteKeys,
    /// Sink: the cache's values.
    WriteValues,
}

/// A slice of a stage's columns with its chain.
#[derive(Clone, Debug, PartialEq)]
pub struct StagePart {
    /// Weights, for a GEMM and for experts.
    pub weights: Option<PartWeights>,
    /// Columns (of each operand).
    pub cols: usize,
    /// Columns of a tile; the last tile may have fewer. Equal to `cols` unless the anchor has weights.
    pub tile_cols: usize,
    /// The chain.
    pub pieces: Vec<StagePiece>,
}

impl StagePart {
    /// Tiles that the columns are cut into.
    pub fn tiles(&self) -> usize {
        self.cols.div_ceil(self.tile_cols)
    }

    /// Panels of each operand in a whole tile.
    pub fn tile_panels(&self) -> usize {
        self.tile_cols.div_ceil(PANEL)
    }

    /// Weight bytes that tiles `from..to` stream, of one expert if there are several.
    pub fn tile_bytes(&self, from: usize, to: usize) -> u64 {
        let Some(weights) = self.weights else { return 0 };
        let panels = |tile: usize| {
            let cols = self.cols.saturating_sub(tile * self.tile_cols).min(self.tile_cols);
            cols.div_ceil(PANEL) * weights.operands
        };
        (from..to).map(|tile| (panels(tile) * weights.layout.bytes()) as u64).sum()
    }
}

/// How a stage's work is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Items {
    /// Tiles of columns, known when compiled; each covers all rows of the step.
    Tiles,
    /// One item a row.
    Rows,
    /// One item a row whose logits are wanted.
    LogitRows,
    /// One item a (KV head, row).
    HeadRows {
        /// KV heads.
        kv_heads: usize,
    },
}

/// A wait for an earlier stage to be whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StageWait {
    /// How many stages back in the unrolled sequence; at least 1.
    pub back: usize,
}

/// One stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Name without the layer.
    pub name: String,
    /// Rows that it makes: those of the step, or those whose logits are wanted.
    pub rows: Dim,
    /// What it is built around.
    pub anchor: StageAnchor,
    /// Slices of its columns.
    pub parts: Vec<StagePart>,
    /// Which stage wrote what it reads: for each buffer, how many stages back. This is the meaning
    /// of the program that sharing buffers and ordering stages must not change.
    pub sources: Vec<(BufferId, usize)>,
    /// What must be whole before its first tile.
    pub waits: Vec<StageWait>,
}

/// One access of a stage to memory that stages share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// A buffer.
    Buffer(BufferId),
    /// The KV cache of the layer.
    Cache,
}

/// How much of a place one tile or item touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extent {
    /// All of it.
    Whole,
    /// Only what belongs to the tile or item: other tiles of the same stage touch other parts.
    Own,
}

impl Stage {
    /// How its work is divided.
    pub fn items(&self) -> Items {
        match self.anchor {
            StageAnchor::Embed { .. } | StageAnchor::Rows { .. } if self.rows == Dim::LogitRows => {
                Items::LogitRows
            }
            StageAnchor::TopK { .. } | StageAnchor::PairScores { .. } => Items::LogitRows,
            StageAnchor::Embed { .. }
            | StageAnchor::Input
            | StageAnchor::Taps { .. }
            | StageAnchor::Rows { .. }
            | StageAnchor::DynamicConv { .. }
            | StageAnchor::Route { .. } => Items::Rows,
            StageAnchor::Gemm { .. } | StageAnchor::Experts { .. } => Items::Tiles,
            StageAnchor::Attention { kv_heads, .. } => Items::HeadRows { kv_heads },
        }
    }

    /// What its tiles read.
    pub fn reads(&self) -> Vec<(Place, Extent)> {
        let mut reads = match &self.anchor {
            StageAnchor::Embed { .. } | StageAnchor::Input => Vec::new(),
            StageAnchor::Taps { inputs } => {
                inputs.iter().map(|input| (Place::Buffer(*input), Extent::Whole)).collect()
            }
            StageAnchor::Rows { input, .. } => vec![(Place::Buffer(*input), Extent::Whole)],
            StageAnchor::Gemm { input } => vec![(Place::Buffer(*input), Extent::Whole)],
            StageAnchor::Route { input, .. } | StageAnchor::TopK { input, .. } => {
                vec![(Place::Buffer(*input), Extent::Whole)]
            }
            StageAnchor::DynamicConv { input: one, kernel: other, .. }
            | StageAnchor::PairScores { candidates: one, hidden: other, .. } => {
                vec![(Place::Buffer(*one), Extent::Whole), (Place::Buffer(*other), Extent::Whole)]
            }
            StageAnchor::Experts { input, routes, .. } => {
                vec![(Place::Buffer(*input), Extent::Whole), (Place::Buffer(*routes), Extent::Whole)]
            }
            StageAnchor::Attention { input, .. } => {
                vec![(Place::Buffer(*input), Extent::Whole), (Place::Cache, Extent::Whole)]
            }
        };
        for piece in self.parts.iter().flat_map(|part| &part.pieces) {
            if let StagePiece::Residual(buffer) = piece {
                reads.push((Place::Buffer(*buffer), Extent::Own));
            }
        }
        reads
    }

    /// What its tiles write.
    pub fn writes(&self) -> Vec<(Place, Extent)> {
        let mut writes = Vec::new();
        for piece in self.parts.iter().flat_map(|part| &part.pieces) {
            let place = match piece {
                StagePiece::Store(buffer) => Place::Buffer(*buffer),
                StagePiece::WriteKeys | StagePiece::WriteValues => Place::Cache,
                _ => continue,
            };
            if !writes.contains(&(place, Extent::Own)) {
                writes.push((place, Extent::Own));
            }
        }
        writes
    }

    /// Weight bytes that the whole stage streams, of all experts if there are several.
    pub fn weight_bytes(&self) -> u64 {
        let one: u64 = self.parts.iter().map(|part| part.tile_bytes(0, part.tiles())).sum();
        one * self.experts().unwrap_or(1) as u64
    }

    /// Experts that its weights are of, if it is a stage of experts.
    pub fn experts(&self) -> Option<usize> {
        match self.anchor {
            StageAnchor::Experts { experts, .. } => Some(experts),
            _ => None,
        }
    }
}

/// The stages of one kind of layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Body {
    /// Stages in order.
    pub stages: Vec<Stage>,
}

/// One layer: which body, with which weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Number of the body.
    pub body: usize,
    /// Byte offsets of its packed weights, by [`Slot::Layer`] number.
    pub offsets: Vec<u64>,
    /// Layer of the KV cache.
    pub cache: usize,
}

/// A whole step as stages.
#[derive(Clone, Debug)]
pub struct StageProgram {
    /// Name of the model.
    pub name: String,
    /// Rows that a step may have.
    pub max_rows: usize,
    /// Vocabulary: columns of the logits; 0 without logits.
    pub vocab: usize,
    /// The arena's buffers.
    pub buffers: Vec<Buffer>,
    /// Where the logits are, if the step has any: a step may only fill its caches.
    pub logits: Option<BufferId>,
    /// Where the taps are, for a model that has a draft.
    pub taps: Option<BufferId>,
    /// Where the candidates of a draft that has a selector are, and the scores of their pairs.
    pub pairs: Option<(BufferId, BufferId)>,
    /// What the runtime hands over before the step.
    pub input: Option<BufferId>,
    /// Layout of the KV cache.
    pub kv: KvLayout,
    /// Recipe of the packed weights.
    pub packing: Packing,
    /// Rotary embeddings, for people.
    pub ropes: Vec<(String, RopeSpec)>,
    /// Stages before the layers.
    pub before: Vec<Stage>,
    /// Kinds of layers.
    pub bodies: Vec<Body>,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// Stages after the layers.
    pub after: Vec<Stage>,
}

/// A stage in the unrolled sequence.
#[derive(Clone, Copy, Debug)]
pub struct StageAt<'p> {
    /// Number in the sequence.
    pub number: usize,
    /// The stage.
    pub stage: &'p Stage,
    /// Layer that it belongs to.
    pub layer: Option<usize>,
}

impl StageAt<'_> {
    /// Name with the layer: `l3.qkv`.
    pub fn name(&self) -> String {
        match self.layer {
            Some(layer) => format!("l{layer}.{}", self.stage.name),
            None => self.stage.name.clone(),
        }
    }
}

impl StageProgram {
    /// A buffer.
    pub fn buffer(&self, id: BufferId) -> &Buffer {
        &self.buffers[id.0 as usize]
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.offset + buffer.bytes()).max().unwrap_or(0)
    }

    /// The unrolled sequence.
    pub fn sequence(&self) -> Vec<StageAt<'_>> {
        let before = self.before.iter().map(|stage| (None, stage));
        let layers = self.layers.iter().enumerate().flat_map(|(number, layer)| {
            self.bodies[layer.body].stages.iter().map(move |stage| (Some(number), stage))
        });
        let after = self.after.iter().map(|stage| (None, stage));
        before
            .chain(layers)
            .chain(after)
            .enumerate()
            .map(|(number, (layer, stage))| StageAt { number, stage, layer })
            .collect()
    }
}

impl fmt::Display for StageProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "stages {:?} max_rows={} {{", self.name, self.max_rows)?;
        writeln!(f, "  {}", self.kv)?;
        for buffer in &self.buffers {
            writeln!(f, "  {buffer}")?;
        }
        writeln!(f, "  packed {} bytes in {} items", self.packing.bytes, self.packing.items.len())?;
        self.list(f, "before the layers", &self.before)?;
        for (number, body) in self.bodies.iter().enumerate() {
            let layers: Vec<usize> =
                (0..self.layers.len()).filter(|layer| self.layers[*layer].body == number).collect();
            self.list(f, &format!("layers {}", ranges(&layers)), &body.stages)?;
        }
        self.list(f, "after the layers", &self.after)?;
        writeln!(f, "}}")
    }
}

/// `0..=3, 5` for the numbers 0, 1, 2, 3 and 5.
pub(crate) fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &number in numbers {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => parts.push((number, number)),
        }
    }
    let text = |(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}..={b}") };
    parts.iter().map(text).collect::<Vec<_>>().join(", ")
}

impl StageProgram {
    fn list(&self, f: &mut fmt::Formatter<'_>, title: &str, stages: &[Stage]) -> fmt::Result {
        writeln!(f, "\n  # {title}")?;
        for stage in stages {
            let buffer = |id: &BufferId| self.buffer(*id).name.clone();
            let anchor = match &stage.anchor {
                StageAnchor::Embed { table, layout, vocab } => {
                    format!("embed {} {}x{} {table}", layout.format, vocab, layout.k)
                }
                StageAnchor::Input => "input".into(),
                StageAnchor::Taps { inputs } => {
                    format!("taps of {}", inputs.iter().map(buffer).collect::<Vec<_>>().join(", "))
                }
                StageAnchor::Rows { input, select: false } => format!("rows of {}", buffer(input)),
                StageAnchor::Rows { input, select: true } => format!("selected rows of {}", buffer(input)),
                StageAnchor::Gemm { input } => format!("gemm on {}", buffer(input)),
                StageAnchor::Attention { input, heads, kv_heads, scale, window, sinks, bidirectional } => {
                    let window = window.map_or(String::new(), |window| format!(" window={window}"));
                    let sinks = sinks.map_or(String::new(), |sinks| format!(" sinks {sinks}"));
                    let both = if *bidirectional { " bidirectional" } else { "" };
                    let own = match *kv_heads == self.kv.kv_heads {
                        true => String::new(),
                        false => format!(" kv_heads={kv_heads}"),
                    };
                    format!(
                        "attention of {} heads={heads}{own} scale={scale}{window}{both}{sinks}",
                        buffer(input)
                    )
                }
                StageAnchor::DynamicConv { input, kernel, base, side, group } => {
                    let (input, kernel) = (buffer(input), buffer(kernel));
                    format!("dynamic_conv of {input} by {base} and {kernel} side={side} group={group}")
                }
                StageAnchor::TopK { input, vocab, k, factor, softcap } => {
                    let softcap = softcap.map_or(String::new(), |softcap| format!(" softcap={softcap}"));
                    format!("top_k {k} of {vocab} of {} factor={factor}{softcap}", buffer(input))
                }
                StageAnchor::PairScores { candidates, k, hidden, tables } => {
                    let [(before, layout), (behind, _)] = tables;
                    let (candidates, hidden) = (buffer(candidates), buffer(hidden));
                    let rank = layout.k;
                    format!("pair_scores {k}x{k} of {candidates} by {hidden} rank={rank} {before} {behind}")
                }
                StageAnchor::Route { input, experts, routing, correction } => {
                    let Routing { scoring, renormalize, top_k, factor } = *routing;
                    let router = Router { scoring, renormalize, top_k, factor, correction: None };
                    let correction = correction.map_or(String::new(), |slot| format!(" correction {slot}"));
                    format!("route {} of {experts} {router}{correction}", buffer(input))
                }
                StageAnchor::Experts { input, routes, experts, top_k, per_slot } => {
                    let slots = if *per_slot { " a row a slot" } else { "" };
                    let (input, routes) = (buffer(input), buffer(routes));
                    format!("experts {top_k} of {experts} on {input}{slots} by {routes}")
                }
            };
            let waits: Vec<String> = stage.waits.iter().map(|wait| format!("-{}", wait.back)).collect();
            let sources: Vec<String> =
                stage.sources.iter().map(|(id, back)| format!("{} of -{back}", buffer(id))).collect();
            writeln!(
                f,
                "  stage {} [{}]: {anchor}; reads [{}]; waits [{}]",
                stage.name,
                stage.rows,
                sources.join(", "),
                waits.join(", ")
            )?;
            for part in &stage.parts {
                write!(f, "    ")?;
                if let Some(weights) = &part.weights {
                    let pair = if weights.operands == 2 { " pair" } else { "" };
                    write!(
                        f,
                        "{} {}x{}{pair} {} in {} tiles of {}, {} B ",
                        weights.layout.format,
                        part.cols,
                        weights.layout.k,
                        weights.slot,
                        part.tiles(),
                        part.tile_cols,
                        part.tile_bytes(0, part.tiles())
                    )?;
                }
                let pieces: Vec<String> = part
                    .pieces
                    .iter()
                    .map(|piece| match piece {
                        StagePiece::Replace { slot, token } => format!("replace token {token} by {slot}"),
                        StagePiece::Bias { slot, operand: 0 } => format!("bias {slot}"),
                        StagePiece::Bias { slot, operand } => format!("bias {slot} on operand {operand}"),
                        StagePiece::RmsNorm { slot, group, eps } => {
                            format!("rms_norm {slot} group={group} eps={eps:e}")
                        }
                        StagePiece::Rope { table, head_dim, dims, .. } => {
                            format!("rope {table} head_dim={head_dim} dims={dims}")
                        }
                        StagePiece::ExpertBias { slot, operand: 0 } => format!("expert_bias {slot}"),
                        StagePiece::ExpertBias { slot, operand } => {
                            format!("expert_bias {slot} on operand {operand}")
                        }
                        StagePiece::Combine => "combine".into(),
                        StagePiece::Scale(factor) => format!("scale {factor}"),
                        StagePiece::Gated(activation) => activation.to_string(),
                        StagePiece::Residual(id) => format!("add {}", buffer(id)),
                        StagePiece::Store(id) => format!("store {}", buffer(id)),
                        StagePiece::WriteKeys => "write keys".into(),
                        StagePiece::WriteValues => "write values".into(),
                    })
                    .collect();
                writeln!(f, "-> {}", pieces.join(" -> "))?;
            }
        }
        Ok(())
    }
}
