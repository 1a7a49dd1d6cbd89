//! A draft's selector as stages of a GPU's kernel: candidates of segments of each row, what they are worth behind each
//! other, and the walk.

use super::packer::Packer;
use super::resident::{Lowering, error};
use super::tile::{TileError, layerless};
use tilec_ir::format::{Code, Format};
use tilec_ir::fused::{Anchor, FusedOp, Piece, ValueId};
use tilec_ir::launch::OCTET;
use tilec_ir::resident::{Kind, MAX_KEPT, MAX_RANK, Pairs, Stage, TopK};
use tilec_ir::stages::BufferElem;

/// Logits of a segment, at least: fewer are not worth a list of their own.
const SEGMENT: usize = 512;

/// Segments of a row, at most.
const SEGMENTS: usize = 64;

/// Lists of the largest logits, and what becomes of these.
#[derive(Clone, Copy)]
pub(super) struct Lists {
    top: TopK,
    factor: f32,
    softcap: Option<f32>,
}

/// The format of a table of which rows are read: halves.
const fn halves(format: Format) -> Format {
    match format.code {
        Code::Bf16 => Format::BF16,
        _ => Format::F16,
    }
}

fn stored(op: &FusedOp) -> Result<ValueId, TileError> {
    match op.parts.iter().flat_map(|part| &part.pieces).collect::<Vec<_>>()[..] {
        [Piece::Store(value)] => Ok(*value),
        _ => Err(error(op, "has more pieces than a sink")),
    }
}

impl Lowering<'_> {
    /// The largest logits of every segment.
    pub(super) fn candidates(&mut self, op: &FusedOp) -> Result<Kind, TileError> {
        let (Anchor::TopK { k, factor, softcap }, [logits]) = (&op.anchor, &op.inputs[..]) else {
            return Err(error(op, "is no choice of candidates"));
        };
        if *k > MAX_KEPT {
            let what = format!("{k} candidates; a GPU keeps at most {MAX_KEPT}: use --no-draft or the CPU");
            return Err(error(op, what));
        }
        let vocab = self.fused.value(*logits).ty.cols;
        let segments = vocab.div_ceil(SEGMENT).clamp(1, SEGMENTS);
        let lists = self.buffer("lists", BufferElem::F32, 2 * segments * k);
        let top = TopK { vocab, k: *k, segments, lists };
        self.lists.insert(stored(op)?, Lists { top, factor: *factor, softcap: *softcap });
        Ok(Kind::TopK(top))
    }

    /// Scores of pairs, and the walk over them.
    pub(super) fn pairs(&mut self, op: &FusedOp, tables: [&String; 2]) -> Result<Vec<Stage>, TileError> {
        let [candidates, hidden] = op.inputs[..] else {
            return Err(error(op, "reads candidates and projections"));
        };
        let Some(Lists { top, factor, softcap }) = self.lists.get(&candidates).copied() else {
            return Err(error(op, "reads candidates that nothing makes"));
        };
        let Some(&hidden) = self.of_value.get(&hidden) else {
            return Err(error(op, "reads projections that have no buffer"));
        };
        let rank = self.fused.weights[tables[0]].shape[1];
        if rank > MAX_RANK {
            let what =
                format!("tables of {rank} columns; a GPU has up to {MAX_RANK}: use --no-draft or the CPU");
            return Err(error(op, what));
        }
        let mut packed = Vec::new();
        for name in tables {
            let format = halves(self.fused.weights[name].format);
            let octets = self.octets(op, format, std::slice::from_ref(name), 1)?;
            packed.push((Packer::fixed(self.packer, octets), format));
        }
        let k = top.k;
        let tokens = self.buffer("candidates", BufferElem::F32, k);
        let scores = self.buffer("pairs", BufferElem::F32, k * k);
        let pairs =
            Pairs { top, factor, softcap, hidden, rank, tables: [packed[0], packed[1]], tokens, scores };
        debug_assert_eq!(OCTET, 8, "selector.cuh says so too");
        let stage = |name: &str, kind| Stage { name: name.to_string(), kind };
        Ok(vec![
            stage(layerless(&op.name), Kind::Pairs(pairs)),
            stage("walk", Kind::Walk { k, tokens, scores }),
        ])
    }
}
