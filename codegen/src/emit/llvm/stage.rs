//! A stage as a function: walks the worker's share, calls the anchor's kernel into a tile in private
//! scratch, runs the chain over the tile, and stores it.

use super::Emitter;
use super::scalar::Scalar;
use inkwell::IntPredicate;
use inkwell::values::{FunctionValue, IntValue, PointerValue};
use std::mem::offset_of;
use std::ops::Range;
use tilec_ir::abi::StepArgs;
use tilec_ir::format::PANEL;
use tilec_ir::graph::{ActivationFn, Dim};
use tilec_ir::schedule::Share;
use tilec_ir::stages::{Slot, Stage, StageAnchor, StagePart, StagePiece};
use tilec_kernels_gen::KernelError;
use tilec_kernels_gen::attention::Attention;
use tilec_kernels_gen::gemm::{Activations, Gemm};
use tilec_kernels_gen::llvm::Param;
use tilec_kernels_gen::pieces::{Glu, HeadNorm, KvHalf, KvWrite, Rope, Scale};
use tilec_kernels_gen::rows::{Embed, Quantize, RmsNorm, Table};

/// Parameters of a stage function, in order.
pub const STAGE_PARAMS: &[Param] = &[
    Param::Ptr, // the step's arguments
    Param::I64, // worker
    Param::Ptr, // the layer's offsets, null outside of layers
    Param::I64, // layer of the cache
];

/// A tile in scratch, while its chain is emitted.
pub(super) struct Tile<'ctx> {
    pub at: PointerValue<'ctx>,
    /// Elements from row to row.
    pub stride: usize,
    /// Columns (of each operand).
    pub cols: IntValue<'ctx>,
    /// First column in the part.
    pub first: IntValue<'ctx>,
}

/// The stage function being emitted.
pub struct StageEmitter<'e, 'a, 'ctx> {
    pub(super) emitter: &'e mut Emitter<'a, 'ctx>,
    pub(super) code: Scalar<'ctx>,
    pub(super) stage: &'e Stage,
    /// Rows of a tile.
    pub(super) rows: IntValue<'ctx>,
    /// The buffers' row that is a tile's first.
    pub(super) first_row: IntValue<'ctx>,
    /// The expert whose product a tile is.
    pub(super) expert: IntValue<'ctx>,
    pub(super) scratch: PointerValue<'ctx>,
    pub(super) kernel_scratch: PointerValue<'ctx>,
}

/// Emits the function of a stage; `shares` are the workers' shares of it.
pub fn emit<'e, 'a, 'ctx>(
    emitter: &'e mut Emitter<'a, 'ctx>,
    name: &str,
    stage: &'e Stage,
    shares: &[Share],
) -> Result<FunctionValue<'ctx>, KernelError> {
    let function = emitter.kernels.function(name, STAGE_PARAMS, inkwell::module::Linkage::Private);
    for (param, name) in function.get_param_iter().zip(["args", "worker", "layer", "cache"]) {
        param.set_name(name);
    }
    let code = Scalar::new(emitter.kernels.context, function);
    let args = code.ptr_arg(0);
    let field = match stage.rows {
        Dim::LogitRows => offset_of!(StepArgs, logit_rows),
        _ => offset_of!(StepArgs, rows),
    };
    let rows = code.load_u32(code.at(args, code.size(field)));
    rows.set_name("rows");
    let all = code.load_ptr(code.at(args, code.size(offset_of!(StepArgs, scratch))));
    let scratch = code.at(all, code.mul(code.int_arg(1), code.size(emitter.scratch.bytes())));
    let kernel_scratch = code.at(scratch, code.size(emitter.scratch.tile));
    scratch.set_name("tile_scratch");
    kernel_scratch.set_name("kernel_scratch");
    let zero = code.int(0);
    let mut stage_emitter =
        StageEmitter { emitter, code, stage, rows, first_row: zero, expert: zero, scratch, kernel_scratch };
    match &stage.anchor {
        StageAnchor::Gemm { .. } => stage_emitter.gemm(shares)?,
        StageAnchor::Embed { .. } => stage_emitter.embed(shares.len())?,
        // The runtime has done it.
        StageAnchor::Input => {}
        StageAnchor::Taps { .. } => stage_emitter.taps(shares.len())?,
        StageAnchor::Rows { .. } => stage_emitter.on_rows(shares.len())?,
        StageAnchor::Attention { .. } => stage_emitter.attention(shares.len())?,
        StageAnchor::DynamicConv { .. } => stage_emitter.dynamic_conv(shares.len())?,
        StageAnchor::TopK { .. } => stage_emitter.top_k(shares.len())?,
        StageAnchor::PairScores { .. } => stage_emitter.pair_scores(shares.len())?,
        StageAnchor::Route { .. } => stage_emitter.route(shares.len())?,
        StageAnchor::Experts { .. } => stage_emitter.experts(shares)?,
    }
    stage_emitter.code.ret();
    Ok(function)
}

impl<'ctx> StageEmitter<'_, '_, 'ctx> {
    pub(super) fn arg(&self, offset: usize) -> PointerValue<'ctx> {
        let code = &self.code;
        code.load_ptr(code.at(code.ptr_arg(0), code.size(offset)))
    }

    /// Address of a packed weight.
    pub(super) fn packed(&self, slot: Slot) -> PointerValue<'ctx> {
        let code = &self.code;
        let offset = match slot {
            Slot::Fixed(offset) => code.int(offset),
            Slot::Layer(number) => code.load_i64(code.at(code.ptr_arg(2), code.size(number * 8))),
        };
        let packed = code.at(self.arg(offset_of!(StepArgs, weights)), offset);
        packed.set_name("packed");
        packed
    }

    pub(super) fn buffer(&self, id: tilec_ir::stages::BufferId) -> PointerValue<'ctx> {
        let buffer = self.emitter.program.buffer(id);
        let at = self.code.at(self.arg(offset_of!(StepArgs, arena)), self.code.size(buffer.offset));
        at.set_name(&buffer.name);
        at
    }

    pub(super) fn floats(&self, base: PointerValue<'ctx>, elements: IntValue<'ctx>) -> PointerValue<'ctx> {
        self.code.at(base, self.code.mul(elements, self.code.int(4)))
    }

    /// The worker's items `n * w / W .. n * (w + 1) / W`: start and count.
    pub(super) fn items(&self, n: IntValue<'ctx>, workers: usize) -> (IntValue<'ctx>, IntValue<'ctx>) {
        let code = &self.code;
        let worker = code.int_arg(1);
        let start = code.div(code.mul(n, worker), workers);
        let end = code.div(code.mul(n, code.add(worker, code.int(1))), workers);
        (start, code.sub(end, start))
    }

    fn gemm(&mut self, shares: &[Share]) -> Result<(), KernelError> {
        let StageAnchor::Gemm { input } = self.stage.anchor else { unreachable!("called for a gemm") };
        let stage = self.stage;
        let source = self.emitter.program.buffer(input).clone();
        let activations = if source.quantized() {
            Activations::Int8(source.quant_rows())
        } else {
            Activations::F32 { stride: source.cols }
        };
        for (number, part) in stage.parts.iter().enumerate() {
            let weights = part.weights.expect("a gemm's part has weights");
            let kernel = self.emitter.gemm(&Gemm { layout: weights.layout, activations })?;
            let stride = part.tile_panels() * weights.operands * PANEL;
            let (from, to) = self.tile_range(shares, number);
            let panels = self.packed(weights.slot);
            let from_buffer = self.buffer(input);
            let tile_bytes = part.tile_panels() * weights.operands * weights.layout.bytes();
            let tiles = self.code.open(from, to);
            let code = &self.code;
            let (first, cols, panel_count) = self.tile_extent(part, weights.operands, tiles.i);
            let at = code.at(panels, code.mul(tiles.i, code.size(tile_bytes)));
            code.call(
                kernel,
                &[
                    at.into(),
                    panel_count.into(),
                    from_buffer.into(),
                    code.int(0).into(),
                    self.rows.into(),
                    self.scratch.into(),
                    code.size(stride).into(),
                    self.kernel_scratch.into(),
                ],
            );
            let tile = Tile { at: self.scratch, stride, cols, first };
            self.chain(&part.pieces, weights.operands, tile)?;
            self.code.close(tiles);
        }
        Ok(())
    }

    /// First column, columns (of each operand) and panels of a tile.
    pub(super) fn tile_extent(
        &self,
        part: &StagePart,
        operands: usize,
        tile: IntValue<'ctx>,
    ) -> (IntValue<'ctx>, IntValue<'ctx>, IntValue<'ctx>) {
        let code = &self.code;
        let first = code.mul(tile, code.size(part.tile_cols));
        let cols = code.min(code.size(part.tile_cols), code.sub(code.size(part.cols), first));
        let groups = code.div(code.add(cols, code.size(PANEL - 1)), PANEL);
        let panel_count = code.mul(groups, code.size(operands));
        first.set_name("first_col");
        cols.set_name("cols");
        panel_count.set_name("panels");
        (first, cols, panel_count)
    }

    /// The worker's tiles of a part, from a table of the shares.
    pub(super) fn tile_range(&mut self, shares: &[Share], part: usize) -> (IntValue<'ctx>, IntValue<'ctx>) {
        let ranges: Vec<Range<usize>> = shares
            .iter()
            .map(|share| match share {
                Share::Tiles(ranges) => {
                    ranges.iter().find(|(number, _)| *number == part).map_or(0..0, |(_, tiles)| tiles.clone())
                }
                Share::Items { .. } => 0..0,
            })
            .collect();
        let flat: Vec<u64> = ranges.iter().flat_map(|range| [range.start as u64, range.end as u64]).collect();
        let table = self.emitter.table("shares", &flat);
        let code = &self.code;
        let entry = code.at(table, code.mul(code.int_arg(1), code.int(16)));
        (code.load_i64(entry), code.load_i64(code.at(entry, code.int(8))))
    }

    /// The chain of a GEMM's part over a tile.
    pub(super) fn chain(
        &mut self,
        pieces: &[StagePiece],
        operands: usize,
        tile: Tile<'ctx>,
    ) -> Result<(), KernelError> {
        let mut added = None;
        for piece in pieces {
            match piece {
                StagePiece::Bias { slot, operand } => {
                    let vector = self.packed(*slot);
                    self.bias(vector, *operand, operands, &tile)?;
                }
                StagePiece::ExpertBias { slot, operand } => {
                    let own = self.code.mul(self.expert, self.code.size(self.stage.parts[0].cols));
                    let vector = self.floats(self.packed(*slot), own);
                    self.bias(vector, *operand, operands, &tile)?;
                }
                StagePiece::Scale(factor) => {
                    let kernel = self.emitter.scale(&Scale { factor: *factor })?;
                    let stride = self.code.size(tile.stride);
                    self.code
                        .call(kernel, &[tile.at.into(), stride.into(), self.rows.into(), tile.cols.into()]);
                }
                StagePiece::Replace { .. } => unreachable!("tiling lets it stand behind rows alone"),
                // Emitted between the two halves of the chain.
                StagePiece::Combine => {}
                StagePiece::RmsNorm { slot, group, eps } => {
                    let kernel = self.emitter.head_norm(&HeadNorm { head_dim: *group, eps: *eps })?;
                    let weight = self.packed(*slot);
                    let heads = self.code.div(tile.cols, *group);
                    let stride = self.code.size(tile.stride);
                    self.code.call(
                        kernel,
                        &[tile.at.into(), stride.into(), self.rows.into(), heads.into(), weight.into()],
                    );
                }
                StagePiece::Rope { table, positions, head_dim, dims } => {
                    let kernel = self.emitter.rope(&Rope { head_dim: *head_dim, rotary_dims: *dims })?;
                    let cos = self.packed(*table);
                    let sin = self.code.at(cos, self.code.size(positions * dims / 2 * 4));
                    let heads = self.code.div(tile.cols, *head_dim);
                    let stride = self.code.size(tile.stride);
                    let rows_positions = self.arg(offset_of!(StepArgs, positions));
                    self.code.call(
                        kernel,
                        &[
                            tile.at.into(),
                            stride.into(),
                            self.rows.into(),
                            heads.into(),
                            rows_positions.into(),
                            cos.into(),
                            sin.into(),
                        ],
                    );
                }
                StagePiece::Gated(activation) => self.gated(*activation, &tile)?,
                StagePiece::Residual(buffer) => added = Some(*buffer),
                StagePiece::Store(buffer) => self.store(*buffer, added, &tile)?,
                StagePiece::WriteKeys => self.kv_write(KvHalf::Key, &tile)?,
                StagePiece::WriteValues => self.kv_write(KvHalf::Value, &tile)?,
            }
        }
        Ok(())
    }

    fn bias(
        &mut self,
        vector: PointerValue<'ctx>,
        operand: usize,
        operands: usize,
        tile: &Tile<'ctx>,
    ) -> Result<(), KernelError> {
        let kernel = self.emitter.bias()?;
        let code = &self.code;
        let (rows, stride) = (self.rows, code.size(tile.stride));
        // Panels of a pair alternate, so its operands are reached 16 columns at a time.
        let width = if operands == 1 { code.size(tile.stride) } else { code.size(PANEL) };
        let steps = if operands == 1 {
            code.int(1)
        } else {
            code.div(code.add(tile.cols, code.size(PANEL - 1)), PANEL)
        };
        code.each(code.int(0), steps, |step| {
            let done = code.mul(step, width);
            let cols = code.min(width, code.sub(tile.cols, done));
            let column = code.add(code.mul(done, code.size(operands)), code.size(operand * PANEL));
            let at = self.floats(tile.at, column);
            let from = self.floats(vector, code.add(tile.first, done));
            code.call(kernel, &[at.into(), stride.into(), rows.into(), cols.into(), from.into()]);
        });
        Ok(())
    }

    /// Gate and up alternate panel by panel; their products end up side by side from the first column.
    fn gated(&mut self, activation: ActivationFn, tile: &Tile<'ctx>) -> Result<(), KernelError> {
        let kernel = self.emitter.glu(&match activation {
            ActivationFn::Silu => Glu::Silu,
            ActivationFn::Clamped { alpha, limit } => Glu::Clamped { alpha, limit },
        })?;
        let code = &self.code;
        let stride = code.size(tile.stride);
        let groups = code.div(code.add(tile.cols, code.size(PANEL - 1)), PANEL);
        code.each(code.int(0), groups, |group| {
            let done = code.mul(group, code.size(PANEL));
            let cols = code.min(code.size(PANEL), code.sub(tile.cols, done));
            let gate = self.floats(tile.at, code.mul(done, code.int(2)));
            let up = code.at(gate, code.size(PANEL * 4));
            let to = self.floats(tile.at, done);
            code.call(
                kernel,
                &[
                    gate.into(),
                    up.into(),
                    stride.into(),
                    self.rows.into(),
                    cols.into(),
                    to.into(),
                    stride.into(),
                ],
            );
        });
        Ok(())
    }

    fn store(
        &mut self,
        buffer: tilec_ir::stages::BufferId,
        added: Option<tilec_ir::stages::BufferId>,
        tile: &Tile<'ctx>,
    ) -> Result<(), KernelError> {
        let target = self.emitter.program.buffer(buffer).clone();
        let rows = self.rows;
        let stride = self.code.size(tile.stride);
        let in_place = added == Some(buffer);
        if let Some(other) = added.filter(|_| !in_place) {
            let kernel = self.emitter.add_rows()?;
            let cols = self.emitter.program.buffer(other).cols;
            let from = self.floats(self.buffer(other), self.element(cols, tile.first));
            let code = &self.code;
            let other_stride = code.size(cols);
            code.call(
                kernel,
                &[
                    from.into(),
                    other_stride.into(),
                    rows.into(),
                    tile.cols.into(),
                    tile.at.into(),
                    stride.into(),
                ],
            );
        }
        if target.quantized() {
            let kernel = self.emitter.quantize(&Quantize { quant: target.quant_rows() })?;
            let to = self.buffer(buffer);
            let code = &self.code;
            code.call(
                kernel,
                &[
                    tile.at.into(),
                    stride.into(),
                    rows.into(),
                    tile.cols.into(),
                    to.into(),
                    self.first_row.into(),
                    tile.first.into(),
                ],
            );
        } else {
            let kernel = if in_place { self.emitter.add_rows()? } else { self.emitter.copy_rows()? };
            let to = self.floats(self.buffer(buffer), self.element(target.cols, tile.first));
            let code = &self.code;
            let to_stride = code.size(target.cols);
            code.call(
                kernel,
                &[tile.at.into(), stride.into(), rows.into(), tile.cols.into(), to.into(), to_stride.into()],
            );
        }
        Ok(())
    }

    /// Number of the element in column `col` of the first row that tiles stand for.
    fn element(&self, cols: usize, col: IntValue<'ctx>) -> IntValue<'ctx> {
        self.code.add(self.code.mul(self.first_row, self.code.size(cols)), col)
    }

    fn kv_layer(&self) -> PointerValue<'ctx> {
        let code = &self.code;
        let kv = &self.emitter.program.kv;
        let pages = code.load_u32(code.at(code.ptr_arg(0), code.size(offset_of!(StepArgs, kv_pages))));
        let blocks = code.mul(code.mul(code.int_arg(3), pages), code.size(kv.kv_heads));
        code.at(self.arg(offset_of!(StepArgs, kv)), code.mul(blocks, code.size(kv.block_bytes())))
    }

    fn pages_per_sequence(&self) -> IntValue<'ctx> {
        let code = &self.code;
        code.load_u32(code.at(code.ptr_arg(0), code.size(offset_of!(StepArgs, pages_per_sequence))))
    }

    fn kv_write(&mut self, half: KvHalf, tile: &Tile<'ctx>) -> Result<(), KernelError> {
        let layout = self.emitter.program.kv;
        let head_dim = match half {
            KvHalf::Key => layout.qk_dim,
            KvHalf::Value => layout.v_dim,
        };
        let kernel = self.emitter.kv_write(&KvWrite { layout, half })?;
        let positions = self.arg(offset_of!(StepArgs, positions));
        let sequences = self.arg(offset_of!(StepArgs, sequences));
        let table = self.arg(offset_of!(StepArgs, page_table));
        let (per_sequence, kv_layer) = (self.pages_per_sequence(), self.kv_layer());
        let code = &self.code;
        let first_head = code.div(tile.first, head_dim);
        code.each(code.int(0), code.div(tile.cols, head_dim), |head| {
            let at = self.floats(tile.at, code.mul(head, code.size(head_dim)));
            code.call(
                kernel,
                &[
                    at.into(),
                    code.size(tile.stride).into(),
                    self.rows.into(),
                    positions.into(),
                    sequences.into(),
                    table.into(),
                    per_sequence.into(),
                    kv_layer.into(),
                    code.add(first_head, head).into(),
                ],
            );
        });
        Ok(())
    }

    fn embed(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::Embed { table, layout, .. } = self.stage.anchor else {
            unreachable!("called for an embedding")
        };
        let buffer = self.sink();
        let dim = layout.k;
        let kernel = self.emitter.embed(&Embed { table: Table::Panels(layout), dim, scale: None })?;
        let (start, count) = self.items(self.rows, workers);
        let to = self.buffer(buffer);
        let code = &self.code;
        let tokens = self.floats(self.arg(offset_of!(StepArgs, tokens)), start);
        let to = self.floats(to, code.mul(start, code.size(dim)));
        code.call(
            kernel,
            &[self.packed(table).into(), tokens.into(), count.into(), to.into(), code.size(dim).into()],
        );
        Ok(())
    }

    /// The buffer that the only part stores.
    pub(super) fn sink(&self) -> tilec_ir::stages::BufferId {
        match self.stage.parts[0].pieces.last() {
            Some(StagePiece::Store(buffer)) => *buffer,
            other => unreachable!("tiling lets no sink {other:?} through here"),
        }
    }

    fn taps(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::Taps { inputs } = &self.stage.anchor else { unreachable!("called for taps") };
        let sink = self.sink();
        let target = self.emitter.program.buffer(sink).clone();
        let kernel = self.emitter.copy_rows()?;
        let (start, count) = self.items(self.rows, workers);
        let code = &self.code;
        let mut column = 0;
        for input in inputs {
            let cols = self.emitter.program.buffer(*input).cols;
            let from = self.floats(self.buffer(*input), code.mul(start, code.size(cols)));
            let first = code.add(code.mul(start, code.size(target.cols)), code.size(column));
            let to = self.floats(self.buffer(sink), first);
            code.call(
                kernel,
                &[
                    from.into(),
                    code.size(cols).into(),
                    count.into(),
                    code.size(cols).into(),
                    to.into(),
                    code.size(target.cols).into(),
                ],
            );
            column += cols;
        }
        Ok(())
    }

    fn on_rows(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::Rows { input, select } = self.stage.anchor else { unreachable!("called for rows") };
        let sink = self.sink();
        let source = self.emitter.program.buffer(input).clone();
        let target = self.emitter.program.buffer(sink).clone();
        let (start, count) = self.items(self.rows, workers);
        let from = self.buffer(input);
        let to = self.buffer(sink);
        let stride = self.code.size(source.cols);
        let index = self.floats(self.arg(offset_of!(StepArgs, logit_index)), start);
        let from_own = self.floats(from, self.code.mul(start, stride));
        let to_own = self.floats(to, self.code.mul(start, self.code.size(target.cols)));
        let to_stride = self.code.size(target.cols);
        let source_rows = if select { from } else { from_own };
        match self.stage.parts[0].pieces.first() {
            Some(StagePiece::Replace { slot, token }) => {
                let kernel = self.emitter.copy_rows()?;
                let vector = self.packed(*slot);
                let tokens = self.floats(self.arg(offset_of!(StepArgs, tokens)), start);
                let code = &self.code;
                let copy = |from: PointerValue<'ctx>, rows: IntValue<'ctx>, to: PointerValue<'ctx>| {
                    code.call(
                        kernel,
                        &[
                            from.into(),
                            stride.into(),
                            rows.into(),
                            stride.into(),
                            to.into(),
                            to_stride.into(),
                        ],
                    );
                };
                copy(from_own, count, to_own);
                code.each(code.int(0), count, |row| {
                    let own = code.load_u32(self.floats(tokens, row));
                    let masked = code.compare(IntPredicate::EQ, own, code.int(u64::from(*token)));
                    code.when(masked, || {
                        copy(vector, code.int(1), self.floats(to_own, code.mul(row, to_stride)));
                    });
                });
            }
            Some(StagePiece::RmsNorm { slot, eps, .. }) => {
                let quant_out = target.quantized().then(|| target.quant_rows());
                let norm = RmsNorm {
                    dim: source.cols,
                    eps: *eps,
                    f32_out: !target.quantized(),
                    quant_out,
                    gathered: select,
                };
                let kernel = self.emitter.rms_norm(&norm)?;
                let weight = self.packed(*slot);
                let code = &self.code;
                let (f32_to, quant_to) =
                    if target.quantized() { (code.null(), to) } else { (to_own, code.null()) };
                let index = if select { index } else { code.null() };
                code.call(
                    kernel,
                    &[
                        source_rows.into(),
                        stride.into(),
                        index.into(),
                        count.into(),
                        weight.into(),
                        f32_to.into(),
                        to_stride.into(),
                        quant_to.into(),
                        start.into(),
                    ],
                );
            }
            _ => {
                let kernel = self.emitter.quantize(&Quantize { quant: target.quant_rows() })?;
                let code = &self.code;
                code.call(
                    kernel,
                    &[
                        from_own.into(),
                        stride.into(),
                        count.into(),
                        stride.into(),
                        to.into(),
                        start.into(),
                        code.int(0).into(),
                    ],
                );
            }
        }
        Ok(())
    }

    fn attention(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::Attention { input, heads, kv_heads, scale, window, sinks, bidirectional } =
            self.stage.anchor
        else {
            unreachable!("called for attention")
        };
        let layout = self.emitter.program.kv;
        let group = heads / kv_heads;
        let sink = self.sink();
        let target = self.emitter.program.buffer(sink).clone();
        let queries = self.buffer(input);
        let to = self.buffer(sink);
        let kernel = self.emitter.attention(&Attention {
            layout,
            group,
            scale,
            softcap: None,
            window,
            sinks: sinks.is_some(),
            bidirectional,
        })?;
        let sinks = sinks.map_or(self.code.null(), |slot| self.packed(slot));
        let quantize = match target.quantized() {
            true => Some(self.emitter.quantize(&Quantize { quant: target.quant_rows() })?),
            false => None,
        };
        let positions = self.arg(offset_of!(StepArgs, positions));
        let sequences = self.arg(offset_of!(StepArgs, sequences));
        let ends = self.arg(offset_of!(StepArgs, ends));
        let table = self.arg(offset_of!(StepArgs, page_table));
        let (per_sequence, kv_layer) = (self.pages_per_sequence(), self.kv_layer());
        let code = &self.code;
        let items = code.mul(self.rows, code.size(kv_heads));
        let (start, count) = self.items(items, workers);
        let end = code.add(start, count);
        let group_cols = group * layout.v_dim;
        code.each(code.int(0), code.size(kv_heads), |kv_head| {
            // Items are numbered head by head: this head's rows are `kv_head * rows ..`.
            let base = code.mul(kv_head, self.rows);
            let row_start = code.saturating_sub(start, base);
            let row_end = code.min(code.saturating_sub(end, base), self.rows);
            code.when(code.compare(IntPredicate::ULT, row_start, row_end), || {
                let column = code.mul(kv_head, code.size(group_cols));
                // The kernel writes absolute rows and columns. For bytes it writes into scratch, whose
                // address is moved back so that the first row and column land at its start.
                let (out, stride) = if target.quantized() {
                    let skipped = code.add(code.mul(row_start, code.size(group_cols)), column);
                    let back = code.sub(code.int(0), code.mul(skipped, code.int(4)));
                    (code.at(self.scratch, back), group_cols)
                } else {
                    (to, target.cols)
                };
                code.call(
                    kernel,
                    &[
                        queries.into(),
                        code.size(heads * layout.qk_dim).into(),
                        positions.into(),
                        sequences.into(),
                        table.into(),
                        per_sequence.into(),
                        kv_layer.into(),
                        kv_head.into(),
                        row_start.into(),
                        row_end.into(),
                        sinks.into(),
                        out.into(),
                        code.size(stride).into(),
                        self.kernel_scratch.into(),
                        ends.into(),
                    ],
                );
                if let Some(quantize) = quantize {
                    code.call(
                        quantize,
                        &[
                            self.scratch.into(),
                            code.size(group_cols).into(),
                            code.sub(row_end, row_start).into(),
                            code.size(group_cols).into(),
                            to.into(),
                            row_start.into(),
                            column.into(),
                        ],
                    );
                }
            });
        });
        Ok(())
    }
}
