//! Stages of mixtures: choosing experts, and the products of the chosen.
//!
//! The columns of every expert are cut into tiles, and a worker has the same tiles of all experts: so the
//! workers read equally much, whoever was chosen. Each finds out for itself which rows an expert gets.

use super::stage::{StageEmitter, Tile};
use inkwell::IntPredicate;
use inkwell::values::{IntValue, PointerValue};
use std::ops::Range;
use tilec_ir::abi::QuantRows;
use tilec_ir::format::PANEL;
use tilec_ir::schedule::Share;
use tilec_ir::stages::{BufferId, StageAnchor, StagePart, StagePiece, StageProgram};
use tilec_kernels_gen::KernelError;
use tilec_kernels_gen::experts::{ExpertLists, Route};
use tilec_kernels_gen::gemm::{Activations, Gemm};

/// Activations of an expert's product: the buffer itself if it has a row a slot, else as many rows as an
/// expert can get, gathered from it.
pub(super) fn activations(program: &StageProgram, input: BufferId, per_slot: bool) -> Activations {
    let buffer = program.buffer(input);
    match (buffer.quantized(), per_slot) {
        (true, true) => Activations::Int8(buffer.quant_rows()),
        (true, false) => Activations::Int8(QuantRows { k: buffer.cols, max_rows: program.max_rows }),
        (false, _) => Activations::F32 { stride: buffer.cols },
    }
}

/// What the code of a stage of experts knows of its expert.
struct Own<'ctx> {
    /// Where the expert's slots start in their order.
    start: IntValue<'ctx>,
    /// How many it has.
    slots: IntValue<'ctx>,
}

/// The sorted slots in scratch.
struct Lists<'ctx> {
    starts: PointerValue<'ctx>,
    rows: PointerValue<'ctx>,
    weights: PointerValue<'ctx>,
}

impl<'ctx> StageEmitter<'_, '_, 'ctx> {
    pub(super) fn route(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::Route { input, experts, routing, correction } = self.stage.anchor else {
            unreachable!("called for routes")
        };
        let kernel = self.emitter.route(&Route { experts, routing, correction: correction.is_some() })?;
        let sink = self.sink();
        let routes = self.emitter.program.buffer(sink).clone();
        let (start, count) = self.items(self.rows, workers);
        let correction = correction.map_or(self.code.null(), |slot| self.packed(slot));
        let code = &self.code;
        let scores = self.floats(self.buffer(input), code.mul(start, code.size(experts)));
        let first = code.mul(start, code.size(routing.top_k));
        let numbers = self.buffer(sink);
        let weights = self.floats(code.at(numbers, code.size(routes.route_weights())), first);
        let numbers = self.floats(numbers, first);
        code.call(
            kernel,
            &[
                scores.into(),
                count.into(),
                correction.into(),
                numbers.into(),
                weights.into(),
                self.kernel_scratch.into(),
            ],
        );
        Ok(())
    }

    pub(super) fn experts(&mut self, shares: &[Share]) -> Result<(), KernelError> {
        let StageAnchor::Experts { input, routes, experts, top_k, per_slot } = self.stage.anchor else {
            unreachable!("called for experts")
        };
        let stage = self.stage;
        let part = &stage.parts[0];
        let lists =
            self.lists(routes, ExpertLists { experts, top_k, max_rows: self.emitter.program.max_rows })?;
        let (from, to) = self.tile_range(shares, 0);
        match part.pieces.iter().position(|piece| *piece == StagePiece::Combine) {
            None => {
                let all = self.code.open(self.code.int(0), self.code.size(experts));
                let (own, skip) = self.own(&lists, all.i);
                let (activations, first) = self.activations(input, per_slot, &lists, &own)?;
                let tiles = self.code.open(from, to);
                let tile = self.product(part, input, per_slot, tiles.i, all.i, activations, first, &own)?;
                let rows = self.enter_slots(all.i, &own);
                let operands = part.weights.map_or(1, |weights| weights.operands);
                self.chain(&part.pieces, operands, tile)?;
                self.leave_slots(rows);
                self.code.close(tiles);
                self.code.close_if(skip);
                self.code.close(all);
            }
            Some(combine) => {
                let tiles = self.code.open(from, to);
                let sums = self.sums(part, tiles.i)?;
                let all = self.code.open(self.code.int(0), self.code.size(experts));
                let (own, skip) = self.own(&lists, all.i);
                let (activations, first) = self.activations(input, per_slot, &lists, &own)?;
                let tile = self.product(part, input, per_slot, tiles.i, all.i, activations, first, &own)?;
                let (at, cols, stride) = (tile.at, tile.cols, tile.stride);
                let rows = self.enter_slots(all.i, &own);
                self.part_chain(part, 0..combine, tile)?;
                self.leave_slots(rows);
                let kernel = self.emitter.add_slots()?;
                let code = &self.code;
                let own_rows = self.floats(lists.rows, own.start);
                let own_weights = self.floats(lists.weights, own.start);
                let stride = code.size(stride);
                code.call(
                    kernel,
                    &[
                        at.into(),
                        stride.into(),
                        own_rows.into(),
                        own_weights.into(),
                        own.slots.into(),
                        cols.into(),
                        sums.at.into(),
                        stride.into(),
                    ],
                );
                code.close_if(skip);
                code.close(all);
                self.part_chain(part, combine + 1..part.pieces.len(), sums)?;
                self.code.close(tiles);
            }
        }
        Ok(())
    }

    fn part_chain(
        &mut self,
        part: &StagePart,
        pieces: Range<usize>,
        tile: Tile<'ctx>,
    ) -> Result<(), KernelError> {
        let operands = part.weights.map_or(1, |weights| weights.operands);
        self.chain(&part.pieces[pieces], operands, tile)
    }

    /// Sorts the step's slots by expert.
    fn lists(&mut self, routes: BufferId, lists: ExpertLists) -> Result<Lists<'ctx>, KernelError> {
        let kernel = self.emitter.expert_lists(&lists)?;
        let buffer = self.emitter.program.buffer(routes).clone();
        let code = &self.code;
        let at = code.at(self.scratch, code.size(self.emitter.scratch.lists_at()));
        let numbers = self.buffer(routes);
        let weights = code.at(numbers, code.size(buffer.route_weights()));
        code.call(kernel, &[numbers.into(), weights.into(), self.rows.into(), at.into()]);
        Ok(Lists {
            starts: at,
            rows: code.at(at, code.size(lists.rows())),
            weights: code.at(at, code.size(lists.weights())),
        })
    }

    /// The slots of an expert; opens an `if` that skips an expert without any.
    fn own(
        &self,
        lists: &Lists<'ctx>,
        expert: IntValue<'ctx>,
    ) -> (Own<'ctx>, inkwell::basic_block::BasicBlock<'ctx>) {
        let code = &self.code;
        let entry = self.floats(lists.starts, expert);
        let start = code.load_u32(entry);
        let slots = code.sub(code.load_u32(code.at(entry, code.int(4))), start);
        let chosen = code.compare(IntPredicate::UGT, slots, code.int(0));
        (Own { start, slots }, code.open_if(chosen))
    }

    /// An expert's activations, and the row of them that is its first.
    fn activations(
        &mut self,
        input: BufferId,
        per_slot: bool,
        lists: &Lists<'ctx>,
        own: &Own<'ctx>,
    ) -> Result<(PointerValue<'ctx>, IntValue<'ctx>), KernelError> {
        let from = self.buffer(input);
        if per_slot {
            return Ok((from, own.start));
        }
        let source = self.emitter.program.buffer(input).clone();
        let to = self.code.at(self.scratch, self.code.size(self.emitter.scratch.gathered_at()));
        let rows = self.floats(lists.rows, own.start);
        match activations(self.emitter.program, input, per_slot) {
            Activations::Int8(gathered) => {
                let kernel = self.emitter.gather_quant(&source.quant_rows(), &gathered)?;
                self.code.call(kernel, &[from.into(), rows.into(), own.slots.into(), to.into()]);
            }
            Activations::F32 { stride } => {
                let kernel = self.emitter.gather_rows()?;
                let code = &self.code;
                let cols = code.size(stride);
                code.call(
                    kernel,
                    &[
                        from.into(),
                        cols.into(),
                        rows.into(),
                        own.slots.into(),
                        cols.into(),
                        to.into(),
                        cols.into(),
                    ],
                );
            }
        }
        Ok((to, self.code.int(0)))
    }

    /// A tile of an expert's product, in scratch.
    #[allow(clippy::too_many_arguments)]
    fn product(
        &mut self,
        part: &StagePart,
        input: BufferId,
        per_slot: bool,
        tile: IntValue<'ctx>,
        expert: IntValue<'ctx>,
        from: PointerValue<'ctx>,
        first_row: IntValue<'ctx>,
        own: &Own<'ctx>,
    ) -> Result<Tile<'ctx>, KernelError> {
        let weights = part.weights.expect("a part of experts has weights");
        let activations = activations(self.emitter.program, input, per_slot);
        let kernel = self.emitter.gemm(&Gemm { layout: weights.layout, activations })?;
        let stride = part.tile_panels() * weights.operands * PANEL;
        let tile_bytes = part.tile_panels() * weights.operands * weights.layout.bytes();
        let panels = self.packed(weights.slot);
        let code = &self.code;
        let (first, cols, panel_count) = self.tile_extent(part, weights.operands, tile);
        let whole = code.int(part.tile_bytes(0, part.tiles()));
        let at = code.add(code.mul(expert, whole), code.mul(tile, code.size(tile_bytes)));
        code.call(
            kernel,
            &[
                code.at(panels, at).into(),
                panel_count.into(),
                from.into(),
                first_row.into(),
                own.slots.into(),
                self.scratch.into(),
                code.size(stride).into(),
                self.kernel_scratch.into(),
            ],
        );
        Ok(Tile { at: self.scratch, stride, cols, first })
    }

    /// A tile of zeros for the sums of rows.
    fn sums(&mut self, part: &StagePart, tile: IntValue<'ctx>) -> Result<Tile<'ctx>, KernelError> {
        let kernel = self.emitter.clear_rows()?;
        let operands = part.weights.map_or(1, |weights| weights.operands);
        let stride = part.tile_panels() * operands * PANEL;
        let (first, cols, _) = self.tile_extent(part, operands, tile);
        let code = &self.code;
        let at = code.at(self.scratch, code.size(self.emitter.scratch.sums_at()));
        code.call(kernel, &[at.into(), code.size(stride).into(), self.rows.into(), cols.into()]);
        Ok(Tile { at, stride, cols, first })
    }

    /// Makes the rows of tiles an expert's slots; gives what they were.
    fn enter_slots(&mut self, expert: IntValue<'ctx>, own: &Own<'ctx>) -> IntValue<'ctx> {
        self.expert = expert;
        self.first_row = own.start;
        std::mem::replace(&mut self.rows, own.slots)
    }

    fn leave_slots(&mut self, rows: IntValue<'ctx>) {
        self.rows = rows;
        self.first_row = self.code.int(0);
    }
}
