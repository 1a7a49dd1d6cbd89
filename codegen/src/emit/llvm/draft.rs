//! Stages of drafts: convolutions along a block, and candidates with what they are worth behind each other.

use super::stage::StageEmitter;
use inkwell::IntPredicate;
use std::mem::offset_of;
use tilec_ir::abi::StepArgs;
use tilec_ir::stages::{StageAnchor, StagePiece};
use tilec_kernels_gen::KernelError;
use tilec_kernels_gen::conv::DynamicConv;
use tilec_kernels_gen::rows::{Embed, Table};
use tilec_kernels_gen::selector::{PairScores, TopK};

impl StageEmitter<'_, '_, '_> {
    pub(super) fn dynamic_conv(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::DynamicConv { input, kernel: own, base, side, group } = self.stage.anchor else {
            unreachable!("called for a convolution")
        };
        let sink = self.sink();
        let cols = self.emitter.program.buffer(input).cols;
        let added = self.stage.parts[0].pieces.iter().find_map(|piece| match piece {
            StagePiece::Residual(buffer) => Some(*buffer),
            _ => None,
        });
        let conv = DynamicConv { cols, group, residual: added.is_some() };
        let kernel = self.emitter.dynamic_conv(&conv)?;
        let (start, count) = self.items(self.rows, workers);
        let code = &self.code;
        let own = self.floats(self.buffer(own), code.size(side * 2 * conv.groups()));
        let base = self.floats(self.packed(base), code.size(side * 2 * cols));
        let added = added.map_or(code.null(), |buffer| self.buffer(buffer));
        code.call(
            kernel,
            &[
                self.buffer(input).into(),
                start.into(),
                code.add(start, count).into(),
                self.arg(offset_of!(StepArgs, sequences)).into(),
                own.into(),
                base.into(),
                added.into(),
                self.buffer(sink).into(),
            ],
        );
        Ok(())
    }

    pub(super) fn top_k(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::TopK { input, vocab, k, factor, softcap } = self.stage.anchor else {
            unreachable!("called for candidates")
        };
        let kernel = self.emitter.top_k(&TopK { vocab, k, factor, softcap })?;
        let sink = self.sink();
        let candidates = self.emitter.program.buffer(sink).clone();
        let (start, count) = self.items(self.rows, workers);
        let code = &self.code;
        let logits = self.floats(self.buffer(input), code.mul(start, code.size(vocab)));
        let first = code.mul(start, code.size(k));
        let tokens = self.buffer(sink);
        let values = self.floats(code.at(tokens, code.size(candidates.route_weights())), first);
        let tokens = self.floats(tokens, first);
        code.call(
            kernel,
            &[logits.into(), count.into(), tokens.into(), values.into(), self.kernel_scratch.into()],
        );
        Ok(())
    }

    pub(super) fn pair_scores(&mut self, workers: usize) -> Result<(), KernelError> {
        let StageAnchor::PairScores { candidates, k, hidden, tables } = self.stage.anchor else {
            unreachable!("called for pairs")
        };
        let pairs = PairScores { k, rank: tables[0].1.k };
        let kernel = self.emitter.pair_scores(&pairs)?;
        let sink = self.sink();
        let values = self.emitter.program.buffer(candidates).route_weights();
        let [(before, gather_before), (behind, gather_behind)] = {
            let mut table = |(slot, layout): (_, tilec_ir::format::PanelLayout)| {
                let embed = Embed { table: Table::Panels(layout), dim: layout.k, scale: None };
                self.emitter.embed(&embed).map(|kernel| (slot, kernel))
            };
            [table(tables[0])?, table(tables[1])?]
        };
        let (before, behind) = (self.packed(before), self.packed(behind));
        let (start, count) = self.items(self.rows, workers);
        let index = self.arg(offset_of!(StepArgs, logit_index));
        let sequences = self.arg(offset_of!(StepArgs, sequences));
        let tokens = self.arg(offset_of!(StepArgs, tokens));
        let (chosen, out) = (self.buffer(candidates), self.buffer(sink));
        let values = self.code.at(chosen, self.code.size(values));
        let hidden = self.buffer(hidden);
        let code = &self.code;
        let (width, stride) = (code.size(k), code.size(pairs.stride()));
        let left = self.kernel_scratch;
        let right = code.at(left, code.size(pairs.gathered_bytes()));
        let load = |table, at| code.load_u32(self.floats(table, at));
        code.each(start, code.add(start, count), |number| {
            let zero = code.int(0);
            let before_or_own = |value, own| {
                let some = code.compare(IntPredicate::NE, value, zero);
                (some, code.select(some, code.sub(value, code.int(1)), own))
            };
            // The row before in the sequence, else the row itself.
            let row = load(index, number);
            let (_, last) = before_or_own(row, row);
            let same = code.compare(IntPredicate::EQ, load(sequences, last), load(sequences, row));
            let last = code.select(same, last, row);
            // Its candidates, if its logits are wanted, else its token.
            let (some, other) = before_or_own(number, number);
            let wanted = code.select(some, load(index, other), code.int(u64::MAX));
            let known = code.compare(IntPredicate::NE, wanted, last);
            let other = code.mul(other, width);
            code.each(zero, width, |slot| {
                let candidate = self.floats(chosen, code.add(other, slot));
                let token = self.floats(tokens, last);
                let from = code.builder.build_select(known, token, candidate, "").expect("equal types");
                let to = self.floats(left, code.mul(slot, stride));
                let one = code.int(1);
                code.call(gather_before, &[before.into(), from.into(), one.into(), to.into(), stride.into()]);
            });
            let own = code.mul(number, width);
            let from = self.floats(chosen, own);
            code.call(
                gather_behind,
                &[behind.into(), from.into(), width.into(), right.into(), stride.into()],
            );
            let hidden = self.floats(hidden, code.mul(number, code.size(pairs.rank)));
            let to = self.floats(out, code.mul(own, width));
            code.call(
                kernel,
                &[left.into(), right.into(), hidden.into(), self.floats(values, own).into(), to.into()],
            );
        });
        Ok(())
    }
}
