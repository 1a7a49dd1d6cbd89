//! Tiling: fused operators become stages, with buffers, packed weights, tiles and waits.

pub use super::packer::Packer;
use std::collections::HashMap;
use tilec_ir::abi::KvLayout;
use tilec_ir::format::{ACT_BLOCK, PanelLayout};
use tilec_ir::fused::{Anchor, Fused, FusedOp, Links, Part, Piece, ValueId};
use tilec_ir::graph::{Cache, Dim, Elem, Router, View};
use tilec_ir::pack::{PACK_ALIGN, PackContent, Packing, RowSegment, RowView};
use tilec_ir::stages::{
    Body, Buffer, BufferElem, BufferId, Extent, Layer, PartWeights, Place, Routing, Slot, Stage, StageAnchor,
    StagePart, StagePiece, StageProgram, StageWait,
};

/// Least columns of a tile: below this a tile's fixed costs show, far above it the shares of few
/// tiles get uneven.
const TILE_COLS: usize = 32;

/// Positions in a page of the KV cache: small enough that short contexts waste little.
const PAGE_TOKENS: usize = 64;

/// Sizes that tiling needs.
#[derive(Clone, Copy, Debug)]
pub struct TileOptions {
    /// Rows that a step may have.
    pub max_rows: usize,
    /// Positions of a sequence: the length of rope tables.
    pub context: usize,
}

/// Why a fused graph has no stages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{op}: {what}")]
pub struct TileError {
    /// The operator.
    pub op: String,
    /// What does not fit.
    pub what: String,
}

/// Cuts a fused graph into stages.
///
/// # Errors
/// An operator that no stage can run, layers whose caches differ, operators of a layer apart.
pub fn tile(fused: &Fused, options: &TileOptions) -> Result<StageProgram, TileError> {
    tile_with(fused, options, &mut Packer::new(PACK_ALIGN))
}

/// As [`tile`], with weights packed behind those of other programs in `packer`: what is there already,
/// a draft's head say, is not packed again.
///
/// # Errors
/// As [`tile`].
pub fn tile_with(
    fused: &Fused,
    options: &TileOptions,
    packer: &mut Packer,
) -> Result<StageProgram, TileError> {
    let kv = kv_layout(fused)?;
    let mut tiler = Tiler {
        fused,
        links: fused.links(),
        options,
        buffers: Buffers::new(fused, options.max_rows),
        packer,
    };
    let mut program = StageProgram {
        name: fused.name.clone(),
        max_rows: options.max_rows,
        vocab: 0,
        buffers: Vec::new(),
        logits: None,
        taps: None,
        pairs: None,
        input: None,
        kv,
        packing: Packing::default(),
        ropes: fused.ropes.iter().map(|(name, spec)| (name.clone(), spec.clone())).collect(),
        before: Vec::new(),
        bodies: Vec::new(),
        layers: Vec::new(),
        after: Vec::new(),
    };
    let mut at = 0;
    while at < fused.ops.len() {
        let layer = fused.ops[at].layer;
        let end = at + fused.ops[at..].iter().take_while(|op| op.layer == layer).count();
        let mut stages = Vec::new();
        let mut offsets = Vec::new();
        for index in at..end {
            stages.push(tiler.stage(index, layer.is_some().then_some(&mut offsets))?);
        }
        match layer {
            None if program.layers.is_empty() => program.before.extend(stages),
            None => program.after.extend(stages),
            Some(number) => {
                if number != program.layers.len() || !program.after.is_empty() {
                    return Err(error(&fused.ops[at], format!("layer {number} is out of order")));
                }
                // A layer that only fills its cache has no attention.
                let cache = fused.ops[at..end].iter().find_map(|op| match op.anchor {
                    Anchor::Attention { cache, .. } => Some(cache),
                    _ => op.written_caches().first().copied(),
                });
                let body = Body { stages };
                let known = program.bodies.iter().position(|other| *other == body);
                let body = known.unwrap_or_else(|| {
                    program.bodies.push(body);
                    program.bodies.len() - 1
                });
                program.layers.push(Layer { body, offsets, cache: cache.unwrap_or(0) });
            }
        }
        at = end;
    }
    let logits = fused.ops.iter().flat_map(|op| &op.parts).find_map(|part| match part.pieces.last() {
        Some(Piece::Logits(value)) => Some(*value),
        _ => None,
    });
    if logits.is_none() && fused.ops.iter().all(|op| op.written_caches().is_empty()) {
        return Err(TileError { op: fused.name.clone(), what: "has no logits".into() });
    }
    let stored_by = |anchor: &Anchor| {
        let op = fused.ops.iter().find(|op| op.anchor == *anchor)?;
        op.writes().first().map(|value| tiler.buffers.of(*value))
    };
    (program.taps, program.input) = (stored_by(&Anchor::Taps), stored_by(&Anchor::Input));
    program.pairs = fused.ops.iter().find_map(|op| match (&op.anchor, &op.inputs[..], &op.writes()[..]) {
        (Anchor::PairScores { .. }, [candidates, ..], [scores]) => {
            Some((tiler.buffers.of(*candidates), tiler.buffers.of(*scores)))
        }
        _ => None,
    });
    program.vocab = logits.map_or(0, |logits| fused.value(logits).ty.cols);
    program.logits = logits.map(|logits| tiler.buffers.of(logits));
    program.buffers = tiler.buffers.all;
    program.packing = tiler.packer.packing.clone();
    set_waits(&mut program)?;
    Ok(program)
}

fn error(op: &FusedOp, what: String) -> TileError {
    TileError { op: op.name.clone(), what }
}

pub(super) fn kv_layout(fused: &Fused) -> Result<KvLayout, TileError> {
    let fail = |what: String| TileError { op: fused.name.clone(), what };
    let Some(first) = fused.caches.first() else { return Err(fail("has no KV cache".into())) };
    let same = |cache: &Cache| Cache { kv_heads: first.kv_heads, ..*cache } == *first;
    if let Some(number) = fused.caches.iter().position(|cache| !same(cache)) {
        return Err(fail(format!(
            "caches 0 and {number} differ in more than their number of heads, which is not supported"
        )));
    }
    // A layer with fewer heads leaves those of its blocks unused.
    let kv_heads = fused.caches.iter().map(|cache| cache.kv_heads).max().unwrap_or(first.kv_heads);
    Ok(KvLayout {
        kv_type: first.kv_type,
        layers: fused.caches.len(),
        kv_heads,
        qk_dim: first.qk_dim,
        v_dim: first.v_dim,
        page_tokens: PAGE_TOKENS,
    })
}

/// Buffers by value. A buffer is free again behind the last reader of its value.
struct Buffers {
    all: Vec<Buffer>,
    of_value: HashMap<ValueId, BufferId>,
    last_use: HashMap<ValueId, usize>,
    /// Buffers that hold no value, with the operator that read them last.
    free: Vec<(BufferId, usize)>,
    max_rows: usize,
    end: usize,
}

impl Buffers {
    fn new(fused: &Fused, max_rows: usize) -> Buffers {
        let mut last_use = HashMap::new();
        for (index, op) in fused.ops.iter().enumerate() {
            for value in op.reads() {
                last_use.insert(value, index);
            }
        }
        // What is read behind the step stays, also if a stage of it has read it.
        for op in &fused.ops {
            let logits = op.parts.iter().filter_map(|part| match part.pieces.last() {
                Some(Piece::Logits(value)) => Some(*value),
                _ => None,
            });
            let candidates = op.inputs.first().filter(|_| matches!(op.anchor, Anchor::PairScores { .. }));
            for value in logits.chain(candidates.copied()) {
                last_use.insert(value, usize::MAX);
            }
        }
        Buffers { all: Vec::new(), of_value: HashMap::new(), last_use, free: Vec::new(), max_rows, end: 0 }
    }

    fn of(&self, value: ValueId) -> BufferId {
        self.of_value[&value]
    }

    /// A buffer for the value that operator `index` stores.
    /// It has `slots` rows for each of the step, each with `slots` times fewer columns.
    fn place(
        &mut self,
        fused: &Fused,
        index: usize,
        value: ValueId,
        in_place: Option<ValueId>,
        slots: usize,
    ) -> BufferId {
        let info = fused.value(value);
        let elem = match info.ty.elem {
            Elem::Q8 => BufferElem::Q8,
            Elem::Routes => BufferElem::Routes,
            _ => BufferElem::F32,
        };
        let (cols, rows) = (info.ty.cols / slots, self.max_rows * slots);
        // Each column of a residual is read and written by one tile alone, so its sum may take its
        // place if nobody reads it later.
        let inherited = in_place.filter(|old| self.last_use.get(old) == Some(&index)).map(|old| self.of(old));
        let fits = |buffer: &Buffer| (buffer.elem, buffer.cols, buffer.rows) == (elem, cols, rows);
        let buffer = match inherited {
            Some(buffer) => buffer,
            None => {
                let reusable = (0..self.free.len())
                    .filter(|slot| {
                        fits(&self.all[self.free[*slot].0.0 as usize]) && self.free[*slot].1 < index
                    })
                    .min_by_key(|slot| self.free[*slot].0);
                match reusable {
                    Some(slot) => self.free.remove(slot).0,
                    None => self.allocate(layerless(&info.name), elem, cols, rows),
                }
            }
        };
        self.of_value.insert(value, buffer);
        buffer
    }

    fn allocate(&mut self, name: &str, elem: BufferElem, cols: usize, rows: usize) -> BufferId {
        let id = BufferId(self.all.len() as u32);
        let buffer = Buffer { name: name.to_string(), elem, cols, rows, offset: self.end };
        self.end += buffer.bytes();
        self.all.push(buffer);
        id
    }

    /// Frees what operator `index` read last, but for what it passed on in place.
    fn release(&mut self, reads: &[ValueId], writes: &[ValueId], index: usize) {
        for value in reads {
            let buffer = self.of(*value);
            let kept = writes.iter().any(|written| self.of(*written) == buffer);
            let freed = self.free.iter().any(|(free, _)| *free == buffer);
            if self.last_use.get(value) == Some(&index) && !kept && !freed {
                self.free.push((buffer, index));
            }
        }
    }
}

/// `l12.attn_norm` without its layer.
pub(super) fn layerless(name: &str) -> &str {
    match name.split_once('.') {
        Some((layer, rest)) if layer.starts_with('l') && layer[1..].chars().all(|c| c.is_ascii_digit()) => {
            rest
        }
        _ => name,
    }
}

struct Tiler<'a> {
    fused: &'a Fused,
    links: Links,
    options: &'a TileOptions,
    buffers: Buffers,
    packer: &'a mut Packer,
}

impl Tiler<'_> {
    fn stage(&mut self, index: usize, mut offsets: Option<&mut Vec<u64>>) -> Result<Stage, TileError> {
        let fused = self.fused;
        let op = &fused.ops[index];
        let reads = op.reads();
        let mut parts = Vec::new();
        for part in &op.parts {
            parts.push(self.part(index, part, offsets.as_deref_mut())?);
        }
        let select = op.parts.iter().any(|part| part.pieces.contains(&Piece::SelectRows));
        let input = || match op.inputs[..] {
            [value] => Ok(self.buffers.of(value)),
            _ => Err(error(op, format!("reads {} values, a stage reads one", op.inputs.len()))),
        };
        let anchor = match &op.anchor {
            Anchor::Embed { weight } => {
                let shape = &fused.weights[weight].shape;
                let (content, layout) = self.panels(op, std::slice::from_ref(weight), shape[0])?;
                StageAnchor::Embed { table: self.packer.fixed(content), layout, vocab: shape[0] }
            }
            Anchor::Input => StageAnchor::Input,
            Anchor::Taps => {
                StageAnchor::Taps { inputs: op.inputs.iter().map(|value| self.buffers.of(*value)).collect() }
            }
            Anchor::Rows => StageAnchor::Rows { input: input()?, select },
            Anchor::Gemm => StageAnchor::Gemm { input: input()? },
            Anchor::DynamicConv { weight, side, group } => {
                let [input, kernel] = self.pair(op)?;
                let len = fused.weights[weight].shape.iter().product();
                let base = self.vector(weight, len, offsets);
                StageAnchor::DynamicConv { input, kernel, base, side: *side, group: *group }
            }
            Anchor::TopK { k, factor, softcap } => StageAnchor::TopK {
                input: input()?,
                vocab: fused.value(op.inputs[0]).ty.cols,
                k: *k,
                factor: *factor,
                softcap: *softcap,
            },
            Anchor::PairScores { predecessor, successor } => {
                let [candidates, hidden] = self.pair(op)?;
                let mut table = |weight: &String| {
                    let rows = fused.weights[weight].shape[0];
                    let (content, layout) = self.panels(op, std::slice::from_ref(weight), rows)?;
                    Ok((self.packer.fixed(content), layout))
                };
                let tables = [table(predecessor)?, table(successor)?];
                StageAnchor::PairScores { candidates, k: fused.value(op.inputs[0]).ty.cols, hidden, tables }
            }
            Anchor::Route(Router { scoring, renormalize, top_k, factor, correction }) => {
                let input = input()?;
                let experts = fused.value(op.inputs[0]).ty.cols;
                let routing =
                    Routing { scoring: *scoring, renormalize: *renormalize, top_k: *top_k, factor: *factor };
                let correction =
                    correction.as_ref().map(|name| self.vector(name, experts, offsets.as_deref_mut()));
                StageAnchor::Route { input, experts, routing, correction }
            }
            Anchor::Experts { top_k, per_slot } => {
                let [input, routes] = op.inputs[..] else {
                    return Err(error(op, "reads no routes".into()));
                };
                StageAnchor::Experts {
                    input: self.buffers.of(input),
                    routes: self.buffers.of(routes),
                    experts: fused.weights[&op.parts[0].weights[0]].shape[0],
                    top_k: *top_k,
                    per_slot: *per_slot,
                }
            }
            Anchor::Attention { cache, heads, scale, window, sinks, bidirectional } => {
                let input = input()?;
                let sinks = sinks.as_ref().map(|name| self.vector(name, *heads, offsets));
                let kv_heads = fused.caches[*cache].kv_heads;
                let (heads, scale, window, bidirectional) = (*heads, *scale, *window, *bidirectional);
                StageAnchor::Attention { input, heads, kv_heads, scale, window, sinks, bidirectional }
            }
        };
        self.check_pieces(op, &parts, select)?;
        self.buffers.release(&reads, &op.writes(), index);
        let rows = |value: &ValueId| fused.value(*value).ty.rows;
        let rows = op.writes().first().or(op.inputs.first()).map_or(Dim::Rows, rows);
        // An operator is a stage, so distances between operators are distances between stages.
        let source = |value: &ValueId| {
            let (producer, _) = self.links.producer(*value).expect("a value that is read has been made");
            (self.buffers.of(*value), index - producer)
        };
        let mut sources: Vec<(BufferId, usize)> = reads.iter().map(source).collect();
        sources.dedup();
        let name = layerless(&op.name).to_string();
        Ok(Stage { name, rows, anchor, parts, sources, waits: Vec::new() })
    }

    /// The buffers of an operator's two inputs.
    fn pair(&self, op: &FusedOp) -> Result<[BufferId; 2], TileError> {
        match op.inputs[..] {
            [one, other] => Ok([self.buffers.of(one), self.buffers.of(other)]),
            _ => Err(error(op, format!("reads {} values, a stage reads two", op.inputs.len()))),
        }
    }

    /// Refuses chains that no kernel of the anchor can run.
    fn check_pieces(&self, op: &FusedOp, parts: &[StagePart], select: bool) -> Result<(), TileError> {
        for part in parts {
            let (sink, chain) = part.pieces.split_last().expect("a chain has a sink");
            let runs = match op.anchor {
                Anchor::Gemm => true,
                Anchor::Experts { .. } => {
                    let combined = chain.iter().position(|piece| *piece == StagePiece::Combine);
                    let (slots, rows) = chain.split_at(combined.unwrap_or(chain.len()));
                    let stored = matches!(sink, StagePiece::Store(_));
                    // Behind the sum there is a row as behind any product; before it there are slots,
                    // which only some pieces can work on.
                    stored
                        && parts.len() == 1
                        && slots.iter().all(|piece| {
                            matches!(piece, StagePiece::ExpertBias { .. } | StagePiece::Gated(_))
                        })
                        && rows
                            .iter()
                            .skip(1)
                            .all(|piece| matches!(piece, StagePiece::Residual(_) | StagePiece::Scale(_)))
                }
                Anchor::Embed { .. }
                | Anchor::Attention { .. }
                | Anchor::Route(_)
                | Anchor::TopK { .. }
                | Anchor::PairScores { .. }
                | Anchor::Input
                | Anchor::Taps => chain.is_empty() && matches!(sink, StagePiece::Store(_)),
                Anchor::DynamicConv { .. } => {
                    let float = |buffer: &BufferId| !self.buffers.all[buffer.0 as usize].quantized();
                    matches!(chain, [] | [StagePiece::Residual(_)])
                        && matches!(sink, StagePiece::Store(buffer) if float(buffer))
                }
                Anchor::Rows => {
                    let norm = |piece: &StagePiece| matches!(piece, StagePiece::RmsNorm { group, .. } if *group == part.cols);
                    let stored = match sink {
                        StagePiece::Store(buffer) => Some(&self.buffers.all[buffer.0 as usize]),
                        _ => None,
                    };
                    match chain {
                        [] => stored.is_some_and(|buffer| buffer.quantized() && !select),
                        [StagePiece::Replace { .. }] => {
                            stored.is_some_and(|buffer| !buffer.quantized() && !select)
                        }
                        [piece] => norm(piece) && stored.is_some(),
                        _ => false,
                    }
                }
            };
            if !runs {
                let what = format!("{} has no kernel for the chain {:?}", op.anchor.name(), part.pieces);
                return Err(error(op, what));
            }
        }
        Ok(())
    }

    fn part(
        &mut self,
        index: usize,
        part: &Part,
        mut offsets: Option<&mut Vec<u64>>,
    ) -> Result<StagePart, TileError> {
        let fused = self.fused;
        let op = &fused.ops[index];
        let tile_cols = match op.anchor {
            Anchor::Gemm | Anchor::Experts { .. } => tile_cols(fused, part).min(part.cols),
            _ => part.cols,
        };
        let weights = if part.weights.is_empty() {
            None
        } else {
            let (content, layout) = match op.anchor {
                Anchor::Experts { .. } => self.expert_panels(op, &part.weights)?,
                _ => self.panels(op, &part.weights, tile_cols)?,
            };
            let slot = self.packer.slot(content, offsets.as_deref_mut());
            Some(PartWeights { slot, layout, operands: part.weights.len() })
        };
        let mut residual = None;
        let mut pieces = Vec::new();
        for piece in &part.pieces {
            pieces.push(match piece {
                // Both follow from where the stage reads and stores.
                Piece::SelectRows | Piece::Quantize => continue,
                Piece::Bias { weight, operand } => StagePiece::Bias {
                    slot: self.vector(weight, part.cols, offsets.as_deref_mut()),
                    operand: *operand,
                },
                Piece::ExpertBias { weight, operand } => {
                    let len = fused.weights[weight].shape.iter().product();
                    let slot = self.vector(weight, len, offsets.as_deref_mut());
                    StagePiece::ExpertBias { slot, operand: *operand }
                }
                Piece::Replace { weight, token } => StagePiece::Replace {
                    slot: self.vector(weight, part.cols, offsets.as_deref_mut()),
                    token: *token,
                },
                Piece::Combine => StagePiece::Combine,
                Piece::Scale(factor) => StagePiece::Scale(*factor),
                Piece::RmsNorm { weight, group, eps } => StagePiece::RmsNorm {
                    slot: self.vector(weight, *group, offsets.as_deref_mut()),
                    group: *group,
                    eps: *eps,
                },
                Piece::Rope { rope, head_dim } => {
                    let spec = &fused.ropes[rope];
                    let content = PackContent::RopeTable {
                        inv_freq: spec.inv_freq(),
                        positions: self.options.context,
                        attention_factor: spec.attention_factor(),
                    };
                    StagePiece::Rope {
                        table: self.packer.fixed(content),
                        positions: self.options.context,
                        head_dim: *head_dim,
                        dims: spec.dims,
                    }
                }
                Piece::AllReduce(_) => {
                    return Err(error(op, "the processor has no stage that sums over ranks".into()));
                }
                Piece::Gated(activation) => StagePiece::Gated(*activation),
                Piece::Residual(value) => {
                    residual = Some(*value);
                    StagePiece::Residual(self.buffers.of(*value))
                }
                Piece::Store(value) | Piece::Logits(value) => {
                    let slots = match op.anchor {
                        Anchor::Experts { top_k, .. } if !part.pieces.contains(&Piece::Combine) => top_k,
                        _ => 1,
                    };
                    StagePiece::Store(self.buffers.place(fused, index, *value, residual, slots))
                }
                Piece::WriteKeys(_) => StagePiece::WriteKeys,
                Piece::WriteValues(_) => StagePiece::WriteValues,
            });
        }
        let rows = part.stored().map(|value| fused.value(value).ty.rows);
        let selected = matches!(
            op.anchor,
            Anchor::Rows | Anchor::Gemm | Anchor::TopK { .. } | Anchor::PairScores { .. }
        );
        if rows == Some(Dim::LogitRows) && !selected {
            return Err(error(op, format!("no stage of {} runs on selected rows", op.anchor.name())));
        }
        Ok(StagePart { weights, cols: part.cols, tile_cols, pieces })
    }

    /// The place of a vector, or of the vectors of all experts.
    fn vector(&mut self, name: &str, len: usize, offsets: Option<&mut Vec<u64>>) -> Slot {
        let content = vector_content(self.fused, name, len);
        self.packer.slot(content, offsets)
    }

    /// Panels of matrices of all experts, side by side.
    fn expert_panels(
        &self,
        op: &FusedOp,
        weights: &[String],
    ) -> Result<(PackContent, PanelLayout), TileError> {
        let weight = &self.fused.weights[&weights[0]];
        let (experts, rows, k) = (weight.shape[0], weight.shape[1], weight.shape[2]);
        let layout = PanelLayout::new(weight.format, k);
        let sources = expert_rows(self.fused, op, weights)?;
        Ok((PackContent::ExpertPanels { layout, experts, rows, sources }, layout))
    }

    /// Panels of matrices side by side, tile by tile.
    fn panels(
        &self,
        op: &FusedOp,
        weights: &[String],
        tile_rows: usize,
    ) -> Result<(PackContent, PanelLayout), TileError> {
        let weight = &self.fused.weights[&weights[0]];
        let (rows, k) = (weight.shape[0], weight.shape[1]);
        let layout = PanelLayout::new(weight.format, k);
        // Whole panels need no padding between tiles.
        let step = if tile_rows.is_multiple_of(tilec_ir::format::PANEL) { rows } else { tile_rows };
        let mut segments = Vec::new();
        let mut panels = 0;
        for row_start in (0..rows).step_by(step) {
            for tensor in weights {
                let own = row_start..row_start + step.min(rows - row_start);
                let parts = segments_of(self.fused, op, tensor, own, tilec_ir::format::PANEL)?;
                if parts.len() > 1 && weights.len() > 1 {
                    return Err(error(op, format!("{tensor} lies in pieces, and a pair cannot")));
                }
                panels += parts.iter().map(RowSegment::panels).sum::<usize>();
                segments.extend(parts);
            }
        }
        Ok((PackContent::Panels { layout, segments, interleave: weights.len(), panels }, layout))
    }
}

/// A vector, or the vectors of all experts, as float32.
pub(super) fn vector_content(fused: &Fused, name: &str, len: usize) -> PackContent {
    let weight = &fused.weights[name];
    let share = weight.share(weight.shape.len() - 1);
    match &weight.view {
        None if share.is_none() => PackContent::F32 { tensor: name.to_string(), len },
        None => PackContent::Elements { tensor: name.to_string(), len, start: 0, block: 1, stride: 1, share },
        Some(View { tensor, start, block, stride }) => {
            let (start, block, stride) = (*start, *block, *stride);
            PackContent::Elements { tensor: tensor.clone(), len, start, block, stride, share }
        }
    }
}

/// Rows of a matrix (of this rank's share of it) as rows of stored tensors that lie together.
pub(super) fn segments_of(
    fused: &Fused,
    op: &FusedOp,
    name: &str,
    rows: std::ops::Range<usize>,
    unit: usize,
) -> Result<Vec<RowSegment>, TileError> {
    let weight = &fused.weights[name];
    let before = weight.share(0).map_or(0, |share| share.start);
    let all = RowSegment::new(name, before + rows.start, rows.len());
    let mut parts = match &weight.view {
        None => vec![all],
        Some(view) => cut(op, &rows_of(op, view, weight.whole_shape()[1])?, &all, unit)?,
    };
    for part in &mut parts {
        part.columns = weight.share(1);
    }
    Ok(parts)
}

/// Where the rows of matrices of all experts lie.
pub(super) fn expert_rows(
    fused: &Fused,
    op: &FusedOp,
    weights: &[String],
) -> Result<Vec<RowView>, TileError> {
    let source = |name: &String| {
        let weight = &fused.weights[name];
        let whole = match &weight.view {
            None => RowView::whole(name),
            Some(view) => rows_of(op, view, weight.whole_shape()[2])?,
        };
        Ok(RowView { rows: weight.share(1), columns: weight.share(2), ..whole })
    };
    weights.iter().map(source).collect()
}

/// A view of elements as one of rows of `k` columns.
pub(super) fn rows_of(op: &FusedOp, view: &View, k: usize) -> Result<RowView, TileError> {
    if [view.start, view.block, view.stride].iter().any(|elements| !elements.is_multiple_of(k)) {
        return Err(error(op, format!("{} is not cut at whole rows of {k}: {view:?}", view.tensor)));
    }
    let (start, block, stride) = (view.start / k, view.block / k, view.stride / k);
    Ok(RowView { start, block, stride, ..RowView::whole(&view.tensor) })
}

/// Rows of a view as rows of the stored tensor that lie together: whole panels or octets, of `unit` rows.
pub(super) fn cut(
    op: &FusedOp,
    view: &RowView,
    rows: &RowSegment,
    unit: usize,
) -> Result<Vec<RowSegment>, TileError> {
    let mut parts = Vec::new();
    let (mut at, end) = (rows.row_start, rows.row_start + rows.rows);
    while at < end {
        let count = (view.block - at % view.block).min(end - at);
        let Some(row_start) = view.row(at) else { return Err(error(op, format!("{view:?} overflows"))) };
        if at + count < end && !count.is_multiple_of(unit) {
            let tensor = &view.tensor;
            let what = format!("{tensor} lies in pieces of {count} rows, which are not multiples of {unit}");
            return Err(error(op, what));
        }
        parts.push(RowSegment::new(&view.tensor, row_start, count));
        at += count;
    }
    Ok(parts)
}

/// Columns of a GEMM part's tile: whole heads where a piece works on heads, whole activation blocks
/// where the result is quantized.
fn tile_cols(fused: &Fused, part: &Part) -> usize {
    let mut unit = tilec_ir::format::PANEL;
    for piece in &part.pieces {
        unit = match piece {
            Piece::RmsNorm { group, .. } => head_unit(unit, *group),
            Piece::Rope { head_dim, .. } => head_unit(unit, *head_dim),
            Piece::WriteKeys(cache) => head_unit(unit, fused.caches[*cache].qk_dim),
            Piece::WriteValues(cache) => head_unit(unit, fused.caches[*cache].v_dim),
            Piece::Quantize => lcm(unit, ACT_BLOCK),
            _ => unit,
        };
    }
    let wanted = if part.stored().is_some_and(|value| fused.value(value).ty.rows == Dim::LogitRows) {
        // The head is long: larger tiles cost nothing in balance.
        2 * TILE_COLS
    } else {
        TILE_COLS
    };
    if unit.is_multiple_of(tilec_ir::format::PANEL) { unit * wanted.div_ceil(unit) } else { unit }
}

/// The unit of tiles that are whole heads: heads that are no whole panels get a tile each, so that
/// each starts on a panel.
fn head_unit(unit: usize, head: usize) -> usize {
    if head.is_multiple_of(tilec_ir::format::PANEL) { lcm(unit, head) } else { head }
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// Gives each stage the fewest waits that put every conflicting access behind it: for each earlier
/// stage that touches the same place (one of them writing), nearest first, unless a stage that is
/// waited for already has waited for it.
fn set_waits(program: &mut StageProgram) -> Result<(), TileError> {
    type Places = Vec<(Place, Option<usize>)>;
    let sequence = program.sequence();
    let at_layer = |places: Vec<(Place, Extent)>, layer: Option<usize>| -> Places {
        // Each layer has a cache of its own; buffers are shared.
        places.into_iter().map(|(place, _)| (place, layer.filter(|_| place == Place::Cache))).collect()
    };
    let touched: Vec<(Places, Places)> = sequence
        .iter()
        .map(|at| (at_layer(at.stage.reads(), at.layer), at_layer(at.stage.writes(), at.layer)))
        .collect();
    let hits = |a: &Places, b: &Places| a.iter().any(|place| b.contains(place));
    let mut behind: Vec<Vec<bool>> = Vec::new();
    let mut waits: Vec<Vec<usize>> = Vec::new();
    for number in 0..sequence.len() {
        let (reads, writes) = &touched[number];
        let mut done = vec![false; number];
        let mut needed = Vec::new();
        for earlier in (0..number).rev() {
            let (their_reads, their_writes) = &touched[earlier];
            let conflict =
                hits(their_writes, reads) || hits(their_reads, writes) || hits(their_writes, writes);
            if done[earlier] || !conflict {
                continue;
            }
            needed.push(number - earlier);
            done[earlier] = true;
            for (before, flag) in behind[earlier].iter().enumerate() {
                done[before] |= flag;
            }
        }
        behind.push(done);
        waits.push(needed);
    }
    // Layers of a body share its waits: the union is safe, all of them name earlier stages.
    let lens: Vec<usize> = program.bodies.iter().map(|body| body.stages.len()).collect();
    let before = program.before.len();
    let layers: usize = program.layers.iter().map(|layer| lens[layer.body]).sum();
    let mut number = 0;
    let give = |stage: &mut Stage, number: usize| {
        for back in &waits[number] {
            let wait = StageWait { back: *back };
            if !stage.waits.contains(&wait) {
                stage.waits.push(wait);
            }
        }
        stage.waits.sort_unstable();
    };
    for stage in &mut program.before {
        give(stage, number);
        number += 1;
    }
    for layer in &program.layers {
        for stage in &mut program.bodies[layer.body].stages {
            give(stage, number);
            number += 1;
        }
    }
    for (index, stage) in program.after.iter_mut().enumerate() {
        give(stage, before + layers + index);
    }
    let bad = program.sequence().iter().find_map(|at| {
        let far = at.stage.waits.iter().any(|wait| wait.back > at.number);
        far.then(|| TileError { op: at.name(), what: "would wait for a stage before the first".into() })
    });
    bad.map_or(Ok(()), Err)
}
