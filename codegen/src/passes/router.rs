//! Routers that no stage waits for.
//!
//! A router's scores are sums over the columns of a row, and what normalizes the row is one factor of all of them. The row
//! is what it was in front of attention, plus what the product behind attention adds to it. So its scores are those of the
//! row before, and those of what is added; and the latter are more features of that product, whose weights are the router's
//! times the gains times the product's, made when weights are packed. The choice then begins where the rows are complete:
//! a stage and a crossing of the chip sooner, in each layer.
//!
//! The scores of the row before say something by themselves: attention mostly adds little to a row, so the experts that
//! these would choose are mostly those that are chosen. Where experts are multiplied faster than they stream, they are
//! foreseen, and weights stream before the choice is made (`router.cuh`).
//!
//! The product multiplies in bfloat16, so each expert has two features, what is high of its weights and what is low:
//! 17 bits, of which the last is far below what rounding attention's output to bfloat16 changes.

use super::resident::{Lowering, Normed, kernel_format};
use super::tile::{segments_of, vector_content};
use tilec_ir::format::{Code, Format};
use tilec_ir::fused::{Anchor, FusedOp, Part, Piece};
use tilec_ir::launch::OCTET;
use tilec_ir::pack::PackContent;
use tilec_ir::resident::{
    Epilogue, Experts, Gemm, Kind, ResidentProgram, Route, RouterTiles, Scores, Stage, Through, Unscaled,
    part_columns,
};
use tilec_ir::stages::{BufferElem, BufferId};

impl Lowering<'_> {
    /// The weights by which the product that completes a router's rows makes its scores as well, if it can.
    pub(super) fn through(
        &mut self,
        router: &FusedOp,
        normed: Option<&Normed>,
        offsets: &mut Option<Vec<u64>>,
    ) -> Option<Through> {
        let normed = normed.filter(|normed| !normed.select)?;
        let fused = self.fused;
        let product = fused.ops.iter().find(|op| op.writes().contains(&normed.source))?;
        let [Part { weights, pieces, .. }] = &product.parts[..] else { return None };
        let ([name], Anchor::Gemm, Some(Piece::Residual(_))) =
            (&weights[..], &product.anchor, pieces.iter().rev().nth(1))
        else {
            return None;
        };
        let [Part { weights: routers, .. }] = &router.parts[..] else { return None };
        let (experts, hidden) = (fused.weights[&routers[0]].shape[0], fused.weights[&routers[0]].shape[1]);
        let k = fused.weights[name].shape[1];
        let whole = (experts * RouterTiles::PARTS).is_multiple_of(OCTET) && k.is_multiple_of(OCTET);
        // What is multiplied is what is stored.
        let stored =
            [name, &routers[0]].iter().all(|name| fused.weights[*name].format == fused.weights[*name].stored);
        // The rows have to be prepared by whoever completes them, which they are not for products in f16.
        let rows = fused.ops.iter().filter(|op| matches!(op.anchor, Anchor::Experts { .. }));
        let mut rows = rows.filter(|op| op.layer == router.layer).flat_map(|op| &op.parts[0].weights);
        let prepared = rows.all(|name| kernel_format(fused.weights[name].format).code != Code::F16);
        if kernel_format(fused.weights[name].format) != Format::BF16
            || product.layer != router.layer
            || !whole
            || !stored
            || !prepared
            || k > part_columns(self.step_rows)
        {
            return None;
        }
        let rows = 0..fused.weights[name].shape[0];
        let content = PackContent::RouterOctets {
            k,
            experts,
            hidden,
            router: Box::new(vector_content(fused, &routers[0], experts * hidden)),
            gain: Box::new(PackContent::F32 { tensor: normed.gain.clone(), len: normed.len }),
            product: segments_of(fused, product, name, rows, OCTET).ok()?,
        };
        let weights = self.packer.slot(content, offsets.as_mut());
        let bias = pieces.iter().find_map(|piece| match piece {
            Piece::Bias { weight, .. } => Some(vector_content(fused, weight, hidden)),
            _ => None,
        });
        let bias = bias.map(|content| self.packer.slot(content, offsets.as_mut()));
        Some(Through { weights, bias })
    }
}

/// Takes the routers out of all kinds of layers whose products behind attention can make their scores.
pub(super) fn scores(lowering: &mut Lowering<'_>, program: &mut ResidentProgram) {
    for body in &mut program.bodies {
        let Some(at) = body.iter().position(|stage| matches!(stage.kind, Kind::Scores(_))) else { continue };
        let changed = at.checked_sub(2).and_then(|first| {
            let mut stages = body.get(first..=at + 1)?.to_vec();
            moved(&mut stages, |name, cols| lowering.buffer(name, BufferElem::F32, cols))?;
            Some((first, stages))
        });
        match changed {
            Some((first, mut stages)) => {
                stages.remove(2);
                body.splice(first..=at + 1, stages);
            }
            // What is packed for it stays where it is, unused. (No model is known to come here.)
            None => {
                if let Kind::Scores(scores) = &mut body[at].kind {
                    scores.through = None;
                }
            }
        }
    }
}

/// Attention, the product behind it, the router and the first product of experts: changed so that the third has nothing
/// left to do. `None` if they do not fit together.
fn moved(stages: &mut [Stage], mut buffer: impl FnMut(&str, usize) -> BufferId) -> Option<()> {
    let [
        Stage { kind: Kind::Attention(attention), .. },
        Stage { kind: Kind::Gemm(product), .. },
        Stage { kind: Kind::Scores(scores), .. },
        Stage { kind: Kind::Experts(Experts { gemm, route: Some(route), .. }), .. },
    ] = stages
    else {
        return None;
    };
    let through = scores.through?;
    let norm = scores.norm?;
    let squares = scores.squares?;
    let prepared = |gemm: &Gemm| gemm.prepared.map(|prepared| prepared.squares);
    if product.prepares.map(|prepared| prepared.squares) != Some(squares)
        || prepared(gemm) != Some(squares)
        || product.output != scores.input
        || product.input != attention.output
        || product.partial.is_some()
        || product.norm.is_some()
        || product.epilogue != Epilogue::Residual
        || route.scores != scores.output
    {
        return None;
    }
    let experts = scores.experts;
    // Experts of codes are multiplied no faster than they stream: with a forecast (Qwen3-30B-A3B in MXFP4, gpt-oss-20b, a rank
    // of MiMo-V2.5-Pro) steps took as long, or longer.
    let foresees = gemm.format == Format::BF16;
    // What normalizes a row changes no order of its bare scores.
    let bare = scores.bias.is_none() && !scores.sigmoid && scores.correction.is_none();
    let expects = foresees && !bare;
    let mut part = Scores { squares: None, through: None, added: through.bias, expects, ..scores.clone() };
    if !expects {
        (part.bias, part.sigmoid, part.correction) = (None, false, None);
    }
    let before = buffer("scores.before", part.output_cols());
    let output = buffer("scores.sum", experts.next_multiple_of(OCTET));
    product.router = Some(RouterTiles { weights: through.weights, experts, before, output, foresees });
    let (bias, correction) = (scores.bias, scores.correction);
    let foreseen = foresees.then_some(before);
    let unscaled = Unscaled { k: scores.k, eps: norm.eps, squares, bias, correction, foreseen };
    *route = Route { scores: output, unscaled: Some(unscaled), routing: route.routing };
    attention.router = Some(Scores { output: before, ..part });
    Some(())
}
