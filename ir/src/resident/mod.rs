//! The resident program: a step as the stages of one GPU kernel.
//!
//! It says what [`crate::stages`] says for threads, in the terms of a kernel whose weights stream
//! through every operator boundary: norms are recomputed in front of the product that reads them,
//! heads are normed, rotated and cached inside attention, and every stage ends with a crossing of
//! the chip, behind which all of its results are visible to all SMs.

use crate::abi::KvLayout;
use crate::format::Format;
use crate::graph::RopeSpec;
use crate::launch::{LAUNCH_ROWS, SLICE_ROWS};
use crate::pack::Packing;
use crate::stages::{Buffer, BufferId, Layer, Slot};

mod attention;
mod cost;
mod draft;
mod experts;
mod product;
mod text;
mod verify;

use attention::rings;
pub use attention::{Attention, CHUNK, Rope, SPAN, max_parts};
pub use draft::{Context, Conv, MAX_KEPT, MAX_RANK, Pairs, Replaced, Taps, TopK};
pub use experts::{Bands, Experts, MAX_EXPERTS, MAX_TOP_K, Route, Scores, Through, Unscaled};
use product::gemm_defect;
pub use product::{Bias, Epilogue, Gemm, Norm, Prepared, Reader, RouterTiles, prepared_order};
pub use verify::Defect;

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

/// Columns of the longest block of weights, to which rows of halves are padded.
pub const ROW_BLOCK: usize = 128;

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
}
