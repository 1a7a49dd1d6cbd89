//! Fused operators become the stages of one resident kernel: norms move in front of the products
//! that read them, the norms and rotations of heads into attention, and weights are laid out in octets.

use std::collections::HashMap;
use tilec_ir::abi::{KvLayout, KvType};
use tilec_ir::format::{Code, Format};
use tilec_ir::fused::{Anchor, Fused, FusedOp, Part, Piece, ValueId};
use tilec_ir::graph::{Router, Scoring};
use tilec_ir::launch::{OCTET, SLICE_ROWS};
use tilec_ir::octet::apart_scales;
use tilec_ir::pack::{PackContent, Packing, RowSegment};
use tilec_ir::resident::{
    Attention, Bands, Bias, Conv, Epilogue, Experts, Gemm, Kind, MAX_EXPERTS, MAX_TOP_K, Norm, Replaced,
    ResidentProgram, Rope, Route, Scores, Stage, Taps, max_parts, part_columns,
};
use tilec_ir::stages::{Buffer, BufferElem, BufferId, Layer, Routing, Slot};

use super::inject;
use super::packer::Packer;
use super::prepare;
use super::router;
use super::selector::Lists;
use super::tile::{TileError, expert_rows, kv_layout, layerless, segments_of, vector_content};

/// Weights start on lines of this many bytes: an L2 line pair, and more than a bulk copy needs.
pub const WEIGHT_ALIGN: u64 = 256;

/// The format that a matrix has in the kernel: what the tensor cores multiply. Formats without
/// tensor-core products of their own are widened to halves, which hold all their digits but those
/// of a float32. FP8 and FP4 stay as they are in memory; the kernel widens their codes.
pub const fn kernel_format(format: Format) -> Format {
    match (format.code, format.block, format.block_rows) {
        (Code::Bf16, ..) => Format::BF16,
        (Code::E4m3, 128, 128) => Format::FP8_BLOCK,
        (Code::E4m3, 128, 1) => Format::FP8_1X128,
        (Code::E4m3, Format::WHOLE_ROW, 1) => Format::FP8_CHANNEL,
        (Code::E2m1, 32, 1) => Format::MXFP4,
        (Code::E2m1, 16, 1) if format.tensor_scale => Format::NVFP4,
        _ => Format::F16,
    }
}

/// The format of an embedding table: no row of it is multiplied, so that its octets are opened by column, which only
/// scales of whole octets do not stand in the way of.
const fn table_format(format: Format) -> Format {
    match kernel_format(format) {
        Format { code: Code::E2m1, .. } | Format { code: Code::E4m3, block_rows: 1, .. } => Format::F16,
        format => format,
    }
}

/// Sizes that a program is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Positions of a sequence, at most.
    pub context: usize,
    /// Rows of a step, at most: 8, 16 or 32.
    pub step_rows: usize,
}

impl From<usize> for Sizes {
    /// So many positions, and eight rows.
    fn from(context: usize) -> Sizes {
        Sizes { context, step_rows: SLICE_ROWS }
    }
}

/// Makes the resident program of a model.
///
/// # Errors
/// An operator that no stage can run, or sizes that do not fit the tensor cores.
pub fn resident(fused: &Fused, sizes: impl Into<Sizes>) -> Result<ResidentProgram, TileError> {
    resident_with(fused, sizes, &mut Packer::new(WEIGHT_ALIGN))
}

/// As [`resident`], with weights packed behind those of other programs in `packer`, aligned to
/// [`WEIGHT_ALIGN`]: what is there already, a draft's head say, is not packed again.
///
/// # Errors
/// As [`resident`].
pub fn resident_with(
    fused: &Fused,
    sizes: impl Into<Sizes>,
    packer: &mut Packer,
) -> Result<ResidentProgram, TileError> {
    let Sizes { context, step_rows } = sizes.into();
    let kv = kv_layout(fused)?;
    let whole = |what: String| TileError { op: fused.name.clone(), what };
    if kv.kv_type == KvType::F32 {
        return Err(whole(
            "a CUDA plan keeps keys and values in halves: set precision.kv_cache to f16 or bf16".into(),
        ));
    }
    if !kv.qk_dim.is_multiple_of(8) || !kv.v_dim.is_multiple_of(8) || kv.qk_dim.max(kv.v_dim) > 256 {
        return Err(whole(format!(
            "heads of {} and {} columns; the kernel has heads of 8 to 256 columns in steps of 8",
            kv.qk_dim, kv.v_dim
        )));
    }
    let mut lowering = Lowering {
        fused,
        context,
        step_rows,
        kv,
        buffers: Vec::new(),
        of_value: HashMap::new(),
        normed: HashMap::new(),
        heads: HashMap::new(),
        routes: HashMap::new(),
        lists: HashMap::new(),
        taps: Vec::new(),
        packer,
    };
    let mut program = ResidentProgram {
        name: fused.name.clone(),
        vocab: 0,
        context,
        step_rows,
        buffers: Vec::new(),
        kv,
        packing: Packing::default(),
        ropes: fused.ropes.iter().map(|(name, spec)| (name.clone(), spec.clone())).collect(),
        taps: None,
        before: Vec::new(),
        bodies: Vec::new(),
        layers: Vec::new(),
        after: Vec::new(),
    };
    // A program without logits fills the caches of all its layers at once.
    let fills = fused.ops.iter().all(|op| !matches!(op.anchor, Anchor::Attention { .. }));
    if fills {
        program.before = inject::stages(&mut lowering)?;
    }
    let mut at = if fills { fused.ops.len() } else { 0 };
    while at < fused.ops.len() {
        let layer = fused.ops[at].layer;
        let end = at + fused.ops[at..].iter().take_while(|op| op.layer == layer).count();
        let mut stages = Vec::new();
        let mut offsets = layer.is_some().then(Vec::new);
        let mut cache = 0;
        for op in &fused.ops[at..end] {
            if let Anchor::Attention { cache: number, .. } = op.anchor {
                cache = number;
            }
            stages.extend(lowering.stage(op, &mut offsets)?);
        }
        match (layer, offsets) {
            (Some(number), Some(offsets)) => {
                if number != program.layers.len() || !program.after.is_empty() {
                    return Err(error(&fused.ops[at], format!("layer {number} is out of order")));
                }
                let known = program.bodies.iter().position(|other| *other == stages);
                let body = known.unwrap_or_else(|| {
                    program.bodies.push(stages);
                    program.bodies.len() - 1
                });
                program.layers.push(Layer { body, offsets, cache });
            }
            _ if program.layers.is_empty() => program.before.extend(stages),
            _ => program.after.extend(stages),
        }
        at = end;
    }
    let vocab = program.after.iter().find_map(|stage| match &stage.kind {
        Kind::Gemm(gemm) if gemm.epilogue == Epilogue::Logits => Some(gemm.cols),
        _ => None,
    });
    if vocab.is_none() && !fills {
        return Err(whole("has no logits".into()));
    }
    program.vocab = vocab.unwrap_or(0);
    lowering.set_taps(&mut program)?;
    prepare::rows(&mut lowering, &mut program);
    router::scores(&mut lowering, &mut program);
    program.buffers = lowering.buffers;
    program.packing = lowering.packer.packing.clone();
    program.verify().map_err(|defect| whole(defect.to_string()))?;
    Ok(program)
}

/// Whether a piece has nothing to do where one rank runs alone: its part stands for the sum.
fn goes_on_alone(piece: &Piece) -> bool {
    matches!(piece, Piece::AllReduce(_))
}

/// The scales of octets that lie apart.
pub(super) fn octet_scales(octets: &PackContent) -> Option<PackContent> {
    match octets.clone() {
        PackContent::Octets { format, k, segments, interleave, octets } if apart_scales(format, k) > 0 => {
            Some(PackContent::OctetScales { format, k, segments, interleave, octets })
        }
        PackContent::ExpertOctets { format, k, experts, rows, sources, .. }
            if apart_scales(format, k) > 0 =>
        {
            Some(PackContent::ExpertScales { format, k, experts, rows, sources })
        }
        _ => None,
    }
}

pub(super) fn error(op: &FusedOp, what: impl Into<String>) -> TileError {
    TileError { op: op.name.clone(), what: what.into() }
}

/// The factor of values in front of their cache.
pub(super) fn value_scale(op: &FusedOp, pieces: &[Piece]) -> Result<f32, TileError> {
    match pieces {
        [Piece::WriteValues(_)] => Ok(1.0),
        [Piece::Scale(factor), Piece::WriteValues(_)] if factor.is_finite() => Ok(*factor),
        _ => Err(error(op, format!("the kernel has no epilogue for {:?}", op.parts))),
    }
}

/// A norm that waits for the product in front of which it is recomputed.
#[derive(Clone)]
pub(super) struct Normed {
    pub(super) source: ValueId,
    pub(super) gain: String,
    pub(super) len: usize,
    eps: f32,
    pub(super) select: bool,
}

/// What the parts of a product of queries, keys and values leave to attention.
#[derive(Clone)]
struct Heads {
    qkv: BufferId,
    q: HeadChain,
    k: HeadChain,
    /// Factor on the values.
    value_scale: f32,
}

/// Norm and rotation of heads.
#[derive(Clone, Default, PartialEq)]
pub(super) struct HeadChain {
    pub(super) norm: Option<(String, f32)>,
    pub(super) rope: Option<String>,
}

pub(super) struct Lowering<'a> {
    pub(super) fused: &'a Fused,
    context: usize,
    pub(super) step_rows: usize,
    pub(super) kv: KvLayout,
    pub(super) buffers: Vec<Buffer>,
    pub(super) of_value: HashMap<ValueId, BufferId>,
    normed: HashMap<ValueId, Normed>,
    heads: HashMap<ValueId, Heads>,
    /// Where the scores lie that experts are chosen by, and how; nothing once they are chosen.
    routes: HashMap<ValueId, Option<(BufferId, Router)>>,
    /// Lists of the largest logits that candidates are taken from.
    pub(super) lists: HashMap<ValueId, Lists>,
    /// Values that a draft reads.
    taps: Vec<ValueId>,
    pub(super) packer: &'a mut Packer,
}

impl<'a> Lowering<'a> {
    /// The stages of an operator; none for a norm, which the next product takes along, several for a product
    /// of long rows.
    pub(super) fn stage(
        &mut self,
        op: &FusedOp,
        offsets: &mut Option<Vec<u64>>,
    ) -> Result<Vec<Stage>, TileError> {
        let input = || match op.inputs[..] {
            [value] => Ok(value),
            _ => Err(error(op, format!("reads {} values, a stage reads one", op.inputs.len()))),
        };
        let kind = match &op.anchor {
            Anchor::Embed { weight } => Some(self.embed(op, weight)?),
            Anchor::Rows => {
                self.rows(op, input()?)?;
                None
            }
            Anchor::Gemm => Some(self.gemm(op, input()?, offsets)?),
            Anchor::Route(router) => {
                self.route(op, input()?, router)?;
                None
            }
            Anchor::Experts { top_k, per_slot } => Some(self.experts(op, *top_k, *per_slot, offsets)?),
            Anchor::Input => match op.writes()[..] {
                [value] => {
                    let cols = op.parts[0].cols;
                    Some(Kind::Taps { output: self.half_buffer("taps", value, cols) })
                }
                _ => return Err(error(op, "hands over one value")),
            },
            Anchor::Taps => {
                self.taps = op.inputs.clone();
                None
            }
            Anchor::Attention { .. } => Some(self.attention(op, input()?, offsets)?),
            Anchor::DynamicConv { weight, side, group } => {
                Some(self.conv(op, (weight, *side, *group), offsets)?)
            }
            Anchor::TopK { .. } => Some(self.candidates(op)?),
            Anchor::PairScores { predecessor, successor } => {
                return self.pairs(op, [predecessor, successor]);
            }
        };
        Ok(kind.map(|kind| Stage { name: layerless(&op.name).to_string(), kind }).into_iter().collect())
    }

    /// Lets the last stage of every kind of layer leave its residual stream, for the layers with a tap.
    fn set_taps(&self, program: &mut ResidentProgram) -> Result<(), TileError> {
        let mut layers = Vec::new();
        let mut cols = 0;
        for tap in &self.taps {
            let last = |layer: usize| self.fused.ops.iter().rfind(|op| op.layer == Some(layer));
            let op = self.fused.ops.iter().find(|op| op.writes().contains(tap));
            let Some(layer) = op.and_then(|op| op.layer) else {
                let what = format!("{} is not what a layer leaves", self.fused.value(*tap).name);
                return Err(TileError { op: "taps".into(), what });
            };
            if last(layer).map(|last| &last.name) != op.map(|op| &op.name) {
                return Err(TileError {
                    op: "taps".into(),
                    what: format!("layer {layer} leaves something else"),
                });
            }
            layers.push(layer);
            cols = self.fused.value(*tap).ty.cols;
        }
        if layers.is_empty() {
            return Ok(());
        }
        program.taps = Some(Taps { layers, cols });
        for body in &mut program.bodies {
            match body.last_mut().map(|stage| &mut stage.kind) {
                Some(Kind::Gemm(gemm) | Kind::Experts(Experts { gemm, .. }))
                    if gemm.epilogue == Epilogue::Residual =>
                {
                    gemm.tap = true;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn embed(&mut self, op: &FusedOp, weight: &str) -> Result<Kind, TileError> {
        let [Part { pieces, cols, .. }] = &op.parts[..] else { return Err(error(op, "has several parts")) };
        let [Piece::Store(value)] = pieces[..] else {
            return Err(error(op, "no kernel embeds with more pieces"));
        };
        let info = &self.fused.weights[weight];
        let format = table_format(info.format);
        let octets = self.octets(op, format, &[weight.to_string()], 1)?;
        let scales = octet_scales(&octets).map(|scales| self.packer.fixed(scales));
        let table = self.packer.fixed(octets);
        if !cols.is_multiple_of(OCTET) {
            return Err(error(
                op,
                format!("rows of {cols} columns; the kernel has rows of multiples of {OCTET}"),
            ));
        }
        let output = self.buffer("x", BufferElem::F32, *cols);
        self.of_value.insert(value, output);
        let mut replaced = None;
        // A token that has something else in place of its row, if nobody reads the row itself.
        let readers: Vec<&FusedOp> = self.fused.ops.iter().filter(|op| op.reads().contains(&value)).collect();
        if let [reader] = readers[..]
            && let ([_], [Part { pieces, .. }]) = (&reader.inputs[..], &reader.parts[..])
            && let [Piece::Replace { weight, token }, Piece::Store(masked)] = &pieces[..]
        {
            let vector = self.packer.fixed(vector_content(self.fused, weight, *cols));
            replaced = Some(Replaced { token: *token, vector });
            self.of_value.insert(*masked, output);
        }
        Ok(Kind::Embed {
            table,
            format,
            scales,
            vocab: info.shape[0],
            k: *cols,
            replaced,
            output,
            prepares: None,
        })
    }

    fn rows(&mut self, op: &FusedOp, source: ValueId) -> Result<(), TileError> {
        let [part] = &op.parts[..] else { return Err(error(op, "has several parts")) };
        let (select, chain) = match &part.pieces[..] {
            [Piece::SelectRows, chain @ ..] => (true, chain),
            chain => (false, chain),
        };
        match chain {
            // The embedding has seen to it.
            [Piece::Replace { .. }, Piece::Store(value)] if self.of_value.contains_key(value) => Ok(()),
            [Piece::RmsNorm { weight, group, eps }, Piece::Store(value)] if *group == part.cols => {
                let normed = Normed { source, gain: weight.clone(), len: *group, eps: *eps, select };
                self.normed.insert(*value, normed);
                Ok(())
            }
            _ => Err(error(op, "the kernel has no stage for these pieces on rows")),
        }
    }

    /// The buffer of a value, and the norm in front of it.
    pub(super) fn input(
        &mut self,
        op: &FusedOp,
        value: ValueId,
        offsets: &mut Option<Vec<u64>>,
    ) -> Result<(BufferId, Option<Norm>), TileError> {
        let normed = self.normed.get(&value).cloned();
        let source = normed.as_ref().map_or(value, |normed| normed.source);
        let Some(&buffer) = self.of_value.get(&source) else {
            return Err(error(op, "reads a value that has no buffer"));
        };
        let norm = normed.map(|normed| {
            let content = PackContent::F32 { tensor: normed.gain, len: normed.len };
            Norm { gain: self.packer.slot(content, offsets.as_mut()), eps: normed.eps }
        });
        Ok((buffer, norm))
    }

    fn gemm(
        &mut self,
        op: &FusedOp,
        input: ValueId,
        offsets: &mut Option<Vec<u64>>,
    ) -> Result<Kind, TileError> {
        let normed = self.normed.get(&input).cloned();
        let source = normed.as_ref().map_or(input, |normed| normed.source);
        let Some(&input) = self.of_value.get(&source) else {
            return Err(error(op, "reads a value that has no buffer"));
        };
        let names: Vec<String> = op.parts.iter().flat_map(|part| part.weights.clone()).collect();
        let first = &self.fused.weights[&names[0]];
        if let [value] = op.writes()[..]
            && let Some(router) = self.choice_by(value)
        {
            return self.scores(op, (value, router), input, normed, offsets);
        }
        // Rows that a product wrote are padded to whole octets of zeros, and so are the weights.
        let (format, k) = (kernel_format(first.format), self.buffers[input.0 as usize].cols);
        if k != first.shape[1].next_multiple_of(OCTET) {
            return Err(error(op, format!("{} columns of weights do not fit rows of {k}", first.shape[1])));
        }
        if names.iter().any(|name| kernel_format(self.fused.weights[name].format) != format) {
            return Err(error(op, "its weights are in different formats"));
        }
        let norm = match normed.as_ref() {
            Some(normed) => {
                let content = PackContent::F32 { tensor: normed.gain.clone(), len: normed.len };
                Some(Norm { gain: self.packer.slot(content, offsets.as_mut()), eps: normed.eps })
            }
            None => None,
        };
        let operands = op.parts.iter().map(|part| part.weights.len()).max().unwrap_or(1);
        let sum: usize = op.parts.iter().map(|part| part.cols).sum();
        let logits = op.parts.iter().any(|part| matches!(part.pieces.last(), Some(Piece::Logits(_))));
        let cols = if logits { sum } else { sum.next_multiple_of(OCTET) };
        let bias = self.bias(op, offsets);
        let (epilogue, output) = self.sinks(op, source, cols)?;
        let octets = self.octets(op, format, &names, operands)?;
        let scales = octet_scales(&octets).map(|scales| self.packer.slot(scales, offsets.as_mut()));
        let weights = self.packer.slot(octets, offsets.as_mut());
        // Other products of selected rows are made of all of them.
        let select = logits && normed.is_some_and(|normed| normed.select);
        let partial = self.partial(k, cols, operands);
        Ok(Kind::Gemm(Gemm {
            input,
            norm,
            prepared: None,
            select,
            weights,
            format,
            scales,
            k,
            operands,
            bias,
            epilogue,
            output,
            prepares: None,
            cols,
            tap: false,
            partial,
            router: None,
        }))
    }

    /// What becomes of the sums of a product, and where they go.
    fn sinks(
        &mut self,
        op: &FusedOp,
        source: ValueId,
        cols: usize,
    ) -> Result<(Epilogue, BufferId), TileError> {
        let refuse = || error(op, format!("the kernel has no epilogue for {:?}", op.parts));
        // Biases are added first of all.
        let is_bias = |piece: &Piece| matches!(piece, Piece::Bias { .. });
        let stays = |piece: &&Piece| !goes_on_alone(piece);
        if op
            .parts
            .iter()
            .any(|part| !part.pieces.iter().filter(stays).is_sorted_by_key(|piece| !is_bias(piece)))
        {
            return Err(refuse());
        }
        let chain = |part: &Part| -> Vec<Piece> {
            part.pieces.iter().filter(stays).filter(|piece| !is_bias(piece)).cloned().collect()
        };
        if let [part] = &op.parts[..] {
            return match &chain(part)[..] {
                [Piece::Logits(_)] => Ok((Epilogue::Logits, self.of_value[&source])),
                [Piece::Residual(old), Piece::Store(new)] => {
                    let buffer = self.residual(op, *old, *new)?;
                    Ok((Epilogue::Residual, buffer))
                }
                [Piece::Gated(activation), Piece::Store(new)] => {
                    let buffer = self.half_buffer("act", *new, cols);
                    Ok((Epilogue::Gated(*activation), buffer))
                }
                [Piece::Store(new)] => {
                    let buffer = self.half_buffer(layerless(&op.name), *new, cols);
                    Ok((Epilogue::Store, buffer))
                }
                // A norm of the whole row waits for whoever reads it.
                [Piece::RmsNorm { weight, group, eps }, Piece::Store(new)] if *group == part.cols => {
                    let buffer = self.buffer(layerless(&op.name), BufferElem::F32, cols);
                    self.of_value.insert(*new, buffer);
                    let (gain, len, eps) = (weight.clone(), *group, *eps);
                    self.normed.insert(*new, Normed { source: *new, gain, len, eps, select: false });
                    Ok((Epilogue::Store, buffer))
                }
                _ => Err(refuse()),
            };
        }
        let [q, k, v] = &op.parts[..] else { return Err(refuse()) };
        let (q, k, v) = (chain(q), chain(k), chain(v));
        let value_scale = value_scale(op, &v)?;
        let (Some(Piece::Store(queries)), Some(Piece::WriteKeys(_))) = (q.last(), k.last()) else {
            return Err(refuse());
        };
        let (q, k) = (self.head_chain(op, &q)?, self.head_chain(op, &k)?);
        if q.rope != k.rope {
            return Err(error(op, "queries and keys are rotated differently"));
        }
        let qkv = self.buffer("qkv", BufferElem::F32, cols);
        self.heads.insert(*queries, Heads { qkv, q, k, value_scale });
        Ok((Epilogue::Store, qkv))
    }

    /// What becomes of each head of queries or keys in front of their sink.
    pub(super) fn head_chain(&self, op: &FusedOp, pieces: &[Piece]) -> Result<HeadChain, TileError> {
        let mut chain = HeadChain::default();
        for piece in &pieces[..pieces.len().saturating_sub(1)] {
            match piece {
                Piece::RmsNorm { weight, group, eps } if *group == self.kv.qk_dim && chain.rope.is_none() => {
                    chain.norm = Some((weight.clone(), *eps));
                }
                Piece::Rope { rope, head_dim } if *head_dim == self.kv.qk_dim => {
                    chain.rope = Some(rope.clone())
                }
                _ => return Err(error(op, format!("the kernel has no epilogue for {:?}", op.parts))),
            }
        }
        Ok(chain)
    }

    /// The table of a rotary embedding.
    pub(super) fn rope(&mut self, name: &str) -> Rope {
        let spec = &self.fused.ropes[name];
        let content = PackContent::RopeTable {
            inv_freq: spec.inv_freq(),
            positions: self.context,
            attention_factor: spec.attention_factor(),
        };
        Rope { table: self.packer.fixed(content), positions: self.context, dims: spec.dims }
    }

    /// The choice that is made by a value, if it is a router's scores.
    fn choice_by(&self, value: ValueId) -> Option<&'a Router> {
        let mut readers = self.fused.ops.iter().filter(|op| op.inputs.contains(&value));
        readers.find_map(|op| match &op.anchor {
            Anchor::Route(router) => Some(router),
            _ => None,
        })
    }

    /// A router's scores, in float32: they decide who works.
    fn scores(
        &mut self,
        op: &FusedOp,
        (value, router): (ValueId, &Router),
        input: BufferId,
        normed: Option<Normed>,
        offsets: &mut Option<Vec<u64>>,
    ) -> Result<Kind, TileError> {
        let refuse = || error(op, format!("the kernel has no scores for {:?}", op.parts));
        let [Part { weights, pieces, .. }] = &op.parts[..] else { return Err(refuse()) };
        let ([name], [chain @ .., Piece::Store(_)]) = (&weights[..], &pieces[..]) else {
            return Err(refuse());
        };
        let weight = &self.fused.weights[name];
        let (experts, k) = (weight.shape[0], weight.shape[1]);
        if k != self.buffers[input.0 as usize].cols || self.buffers[input.0 as usize].elem != BufferElem::F32
        {
            return Err(error(op, format!("{k} columns of weights do not fit its rows")));
        }
        let bias = match chain {
            [] => None,
            [Piece::Bias { weight, .. }] => {
                let content = vector_content(self.fused, weight, experts);
                Some(self.packer.slot(content, offsets.as_mut()))
            }
            _ => return Err(refuse()),
        };
        let through = self.through(op, normed.as_ref(), offsets);
        let norm = normed.map(|normed| {
            let content = PackContent::F32 { tensor: normed.gain, len: normed.len };
            Norm { gain: self.packer.slot(content, offsets.as_mut()), eps: normed.eps }
        });
        let format = if weight.format == Format::BF16 { Format::BF16 } else { Format::F32 };
        let content = match format {
            Format::BF16 => self.octets(op, format, weights, 1)?,
            _ => vector_content(self.fused, name, experts * k),
        };
        let weights = self.packer.slot(content, offsets.as_mut());
        let sigmoid = router.scoring == Scoring::Sigmoid;
        let correction = router.correction.as_ref().map(|name| {
            let content = vector_content(self.fused, name, experts);
            self.packer.slot(content, offsets.as_mut())
        });
        let mut scores = Scores {
            input,
            norm,
            squares: None,
            weights,
            format,
            bias,
            experts,
            k,
            sigmoid,
            correction,
            output: BufferId(0),
            through,
            added: None,
            expects: false,
        };
        scores.output = self.half_buffer("scores", value, scores.output_cols());
        Ok(Kind::Scores(scores))
    }

    /// A convolution of rows, normed first where a norm stands in front.
    fn conv(
        &mut self,
        op: &FusedOp,
        (weight, side, group): (&str, usize, usize),
        offsets: &mut Option<Vec<u64>>,
    ) -> Result<Kind, TileError> {
        let ([input, kernels], [part]) = (&op.inputs[..], &op.parts[..]) else {
            return Err(error(op, "reads rows and their kernels, and has one part"));
        };
        let (input, norm) = self.input(op, *input, offsets)?;
        let (kernels, _) = self.input(op, *kernels, offsets)?;
        let (residual, output) = match part.pieces[..] {
            [Piece::Store(new)] => (false, self.half_buffer(layerless(&op.name), new, part.cols)),
            [Piece::Residual(old), Piece::Store(new)] => (true, self.residual(op, old, new)?),
            _ => return Err(error(op, format!("the kernel has no convolution with {:?}", part.pieces))),
        };
        let base = vector_content(self.fused, weight, 4 * part.cols);
        let base = self.packer.slot(base, offsets.as_mut());
        Ok(Kind::Conv(Conv { input, norm, kernels, base, side, group, residual, output }))
    }

    /// Notes how experts are chosen, for the first stage that needs to know.
    fn route(&mut self, op: &FusedOp, scores: ValueId, router: &Router) -> Result<(), TileError> {
        let [Part { pieces, .. }] = &op.parts[..] else { return Err(error(op, "has several parts")) };
        let [Piece::Store(routes)] = pieces[..] else { return Err(error(op, "has more pieces than a sink")) };
        let Some(&buffer) = self.of_value.get(&scores) else {
            return Err(error(op, "reads scores that have no buffer"));
        };
        self.routes.insert(routes, Some((buffer, router.clone())));
        Ok(())
    }

    fn experts(
        &mut self,
        op: &FusedOp,
        top_k: usize,
        per_slot: bool,
        offsets: &mut Option<Vec<u64>>,
    ) -> Result<Kind, TileError> {
        let ([input, routes], [part]) = (&op.inputs[..], &op.parts[..]) else {
            return Err(error(op, "reads a value and its routes, and has one part"));
        };
        let (weights, operands) = (&part.weights, part.weights.len());
        let [experts, rows, k] = self.fused.weights[&weights[0]].shape[..] else {
            return Err(error(op, "its weights are no matrix an expert"));
        };
        if experts > MAX_EXPERTS || top_k > MAX_TOP_K {
            let what =
                format!("{top_k} of {experts} experts; the kernel has up to {MAX_TOP_K} of {MAX_EXPERTS}");
            return Err(error(op, what));
        }
        let normed = self.normed.get(input).cloned().filter(|normed| !normed.select);
        let source = normed.as_ref().map_or(*input, |normed| normed.source);
        let Some(&buffer) = self.of_value.get(&source) else {
            return Err(error(op, "reads a value that has no buffer"));
        };
        let Some(chosen) = self.routes.get_mut(routes) else {
            return Err(error(op, "reads routes that nothing makes"));
        };
        // Whoever reads rows as they are is first; the slots are those that it makes.
        let route = chosen.take();
        if per_slot == route.is_some() {
            return Err(error(op, "experts are chosen once, by the product that reads no slots"));
        }
        let format = kernel_format(self.fused.weights[&weights[0]].format);
        if weights.iter().any(|name| kernel_format(self.fused.weights[name].format) != format) {
            return Err(error(op, "its weights are in different formats"));
        }
        let route = route.map(|(scores, Router { scoring, renormalize, top_k, factor, .. })| Route {
            scores,
            routing: Routing { scoring, renormalize, top_k, factor },
            unscaled: None,
        });
        let norm = normed.map(|normed| {
            let content = PackContent::F32 { tensor: normed.gain, len: normed.len };
            Norm { gain: self.packer.slot(content, offsets.as_mut()), eps: normed.eps }
        });
        let cols = rows.next_multiple_of(OCTET);
        let bias = part.pieces.iter().filter_map(|piece| match piece {
            Piece::ExpertBias { weight, operand } => {
                let content = vector_content(self.fused, weight, experts * rows);
                let slot = self.packer.slot(content, offsets.as_mut());
                Some(Bias { operand: *operand, start: 0, slot, cols: rows })
            }
            _ => None,
        });
        let bias = bias.collect();
        let chain: Vec<&Piece> = part
            .pieces
            .iter()
            .filter(|piece| !matches!(piece, Piece::ExpertBias { .. }) && !goes_on_alone(piece))
            .collect();
        let (epilogue, output) = match chain[..] {
            [Piece::Gated(activation), Piece::Store(new)] if !per_slot => {
                (Epilogue::Gated(*activation), self.half_buffer("slots", *new, top_k * cols))
            }
            [Piece::Combine, Piece::Residual(old), Piece::Store(new)] if per_slot => {
                (Epilogue::Residual, self.residual(op, *old, *new)?)
            }
            _ => return Err(error(op, format!("the kernel has no epilogue of experts for {chain:?}"))),
        };
        let sources = expert_rows(self.fused, op, weights)?;
        // What is packed depends on how it is dealt out.
        let gemm = Gemm {
            input: buffer,
            norm,
            prepared: None,
            select: false,
            weights: Slot::Fixed(0),
            format,
            scales: None,
            k: k.next_multiple_of(OCTET),
            operands,
            bias,
            epilogue,
            output,
            prepares: None,
            cols,
            tap: false,
            partial: None,
            router: None,
        };
        let bands = Bands::octets(&gemm).filter(|_| route.is_none()).map(|octets| {
            let parts = self.buffer("bands.parts", BufferElem::F32, Bands::part_cols(octets, &gemm));
            Bands { octets, parts }
        });
        let band = bands.map_or(1, |bands| bands.octets);
        let octets = PackContent::ExpertOctets { format, k, experts, rows, sources, band };
        let scales = octet_scales(&octets).map(|scales| self.packer.slot(scales, offsets.as_mut()));
        let weights = self.packer.slot(octets, offsets.as_mut());
        let gemm = Gemm { weights, scales, ..gemm };
        Ok(Kind::Experts(Experts { gemm, experts, top_k, route, bands }))
    }

    /// The buffer in which `old` becomes `new`: nobody reads the old one behind this operator.
    fn residual(&mut self, op: &FusedOp, old: ValueId, new: ValueId) -> Result<BufferId, TileError> {
        // Taps are taken where the value is made.
        let reads = |other: &FusedOp| other.anchor != Anchor::Taps && other.reads().contains(&old);
        let last = self.fused.ops.iter().rposition(reads);
        if last.is_none_or(|last| self.fused.ops[last].name != op.name) {
            return Err(error(op, "its residual is read again after the sum"));
        }
        let buffer = self.of_value[&old];
        self.of_value.insert(new, buffer);
        Ok(buffer)
    }

    fn attention(
        &mut self,
        op: &FusedOp,
        queries: ValueId,
        offsets: &mut Option<Vec<u64>>,
    ) -> Result<Kind, TileError> {
        let Anchor::Attention { cache, heads, scale, window, sinks, bidirectional } = &op.anchor else {
            return Err(error(op, "is no attention"));
        };
        let bidirectional = *bidirectional;
        let (heads, scale, window) = (*heads, *scale, *window);
        let kv_heads = self.fused.caches[*cache].kv_heads;
        let Some(Heads { qkv, q, k, value_scale }) = self.heads.get(&queries).cloned() else {
            return Err(error(op, "its queries do not come from one product with keys and values"));
        };
        let [Part { pieces, .. }] = &op.parts[..] else { return Err(error(op, "has several parts")) };
        let [Piece::Store(value)] = pieces[..] else { return Err(error(op, "has more pieces than a sink")) };
        let mut norm = |chain: &HeadChain| {
            chain.norm.as_ref().map(|(weight, eps)| {
                let content = PackContent::F32 { tensor: weight.clone(), len: self.kv.qk_dim };
                Norm { gain: self.packer.slot(content, offsets.as_mut()), eps: *eps }
            })
        };
        let (q_norm, k_norm) = (norm(&q), norm(&k));
        if let (Some(q), Some(k)) = (q_norm, k_norm)
            && q.eps != k.eps
        {
            return Err(error(op, "queries and keys are normed with different eps"));
        }
        let rope = q.rope.map(|name| self.rope(&name));
        let sinks = sinks.as_ref().map(|name| {
            let content = vector_content(self.fused, name, heads);
            self.packer.slot(content, offsets.as_mut())
        });
        let output = self.half_buffer("attn", value, heads * self.kv.v_dim);
        let parts = heads * max_parts(&self.kv, self.context) * (self.kv.v_dim + 2);
        let parts = self.buffer("parts", BufferElem::F32, parts);
        Ok(Kind::Attention(Attention {
            input: qkv,
            output,
            parts,
            heads,
            kv_heads,
            q_norm,
            k_norm,
            rope,
            scale,
            window,
            sinks,
            value_scale,
            bidirectional,
            router: None,
        }))
    }

    /// A buffer for a value that a product reads as it is: in the half type of that product, or in
    /// f32 where the product scales its rows.
    fn half_buffer(&mut self, name: &str, value: ValueId, cols: usize) -> BufferId {
        let reader = self.fused.ops.iter().find(|op| op.inputs.contains(&value));
        let weight = reader.and_then(|op| op.parts.first()?.weights.first());
        let elem = match weight.map(|name| kernel_format(self.fused.weights[name].format)) {
            Some(Format::F16) | None => BufferElem::F32,
            Some(_) => BufferElem::Bf16,
        };
        let buffer = self.buffer(name, elem, cols);
        self.of_value.insert(value, buffer);
        buffer
    }

    /// Room for the sums of a product's first parts, if its rows of `k` columns are longer than one.
    pub(super) fn partial(&mut self, k: usize, cols: usize, operands: usize) -> Option<BufferId> {
        let cols = cols.next_multiple_of(OCTET) * operands;
        (k > part_columns(self.step_rows)).then(|| self.buffer("partial", BufferElem::F32, cols))
    }

    /// The buffer of this name and shape. Every stage waits for all of the one before, and no stage
    /// of a layer reads what another layer's stage of this name wrote, so layers share buffers.
    pub(super) fn buffer(&mut self, name: &str, elem: BufferElem, cols: usize) -> BufferId {
        let same = |buffer: &Buffer| buffer.name == name && buffer.elem == elem && buffer.cols == cols;
        if let Some(known) = self.buffers.iter().position(same) {
            return BufferId(known as u32);
        }
        let end = self.buffers.last().map_or(0, |last| last.offset + last.bytes());
        let offset = end.next_multiple_of(WEIGHT_ALIGN as usize);
        self.buffers.push(Buffer { name: name.to_string(), elem, cols, rows: self.step_rows, offset });
        BufferId(self.buffers.len() as u32 - 1)
    }

    /// Biases of the parts, by the features that they belong to.
    pub(super) fn bias(&mut self, op: &FusedOp, offsets: &mut Option<Vec<u64>>) -> Vec<Bias> {
        let mut found = Vec::new();
        let mut start = 0;
        for part in &op.parts {
            for piece in &part.pieces {
                if let Piece::Bias { weight, operand } = piece {
                    let content = vector_content(self.fused, weight, part.cols);
                    let slot = self.packer.slot(content, offsets.as_mut());
                    found.push(Bias { operand: *operand, start, slot, cols: part.cols });
                }
            }
            start += part.cols;
        }
        found
    }

    pub(super) fn octets(
        &self,
        op: &FusedOp,
        format: Format,
        weights: &[String],
        interleave: usize,
    ) -> Result<PackContent, TileError> {
        let k = self.fused.weights[&weights[0]].shape[1];
        let mut segments = Vec::new();
        for name in weights {
            let rows = self.fused.weights[name].shape[0];
            let parts = segments_of(self.fused, op, name, 0..rows, OCTET)?;
            if parts.len() > 1 && interleave > 1 {
                return Err(error(op, format!("{name} lies in pieces, and a pair cannot")));
            }
            segments.extend(parts);
        }
        // Scales belong to blocks of 128 stored rows, and an octet has one scale for its columns.
        if format.block_rows > 1
            && let Some(crooked) = segments.iter().find(|segment| !segment.row_start.is_multiple_of(OCTET))
        {
            let RowSegment { tensor, row_start, .. } = crooked;
            let what = format!(
                "row {row_start} of {tensor} begins an octet of {format} that has two scales: set \
                 precision.weights to bf16"
            );
            return Err(error(op, what));
        }
        let octets = segments.iter().map(|segment| segment.rows.div_ceil(OCTET)).sum();
        // Pairs are padded alike; what lies one behind the other must not be.
        if interleave == 1
            && let Some(odd) =
                segments.iter().rev().skip(1).find(|segment| !segment.rows.is_multiple_of(OCTET))
        {
            let what = format!("{} rows are not whole octets", odd.rows);
            return Err(TileError { op: odd.tensor.clone(), what });
        }
        Ok(PackContent::Octets { format, k, segments, interleave, octets })
    }
}
