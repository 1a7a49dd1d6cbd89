//! A router's scores as features of the product behind attention: [`tilec_ir::pack::PackContent::RouterOctets`].

use super::{lay_octet, not_finite, octet_unit, stored_rows, vector_values};
use crate::checkpoint::{Checkpoint, CheckpointError, ErrorKind};
use std::ops::Range;
use tilec_ir::convert::{ConvertError, Planes, dequantize, quantize};
use tilec_ir::format::Format;
use tilec_ir::launch::OCTET;
use tilec_ir::pack::{PackContent, RowSegment, SCORE_FEATURES};

/// Rows of the product that are read at a time: as float32 it may be larger than all that is packed of it.
const PRODUCT_ROWS: usize = 64;

/// Columns that are summed up at a time: those of [`PRODUCT_ROWS`] rows stay in a core's cache while all experts
/// multiply them.
const COLUMNS: usize = 512;

/// What the octets are made of, as the recipe says it.
#[derive(Clone, Copy)]
pub(super) struct RouterScores<'a> {
    pub k: usize,
    pub experts: usize,
    pub router: &'a PackContent,
    pub gain: &'a PackContent,
    pub product: &'a [RowSegment],
}

/// Lays the octets out in `out`, all of which is written.
pub(super) fn lay_router(
    checkpoint: &Checkpoint,
    scores: &RouterScores<'_>,
    out: &mut [u8],
) -> Result<(), CheckpointError> {
    let sums = multiply(checkpoint, scores)?;
    let each = OCTET / SCORE_FEATURES;
    let octets = out.chunks_exact_mut(octet_unit(Format::BF16, scores.k));
    for (octet, (sums, out)) in sums.chunks(each * scores.k).zip(octets).enumerate() {
        let mut rows = Vec::with_capacity(OCTET * scores.k * 2);
        for (number, sums) in sums.chunks_exact(scores.k).enumerate() {
            let expert = octet * each + number;
            for codes in split(sums).map_err(|error| fault(checkpoint, scores, expert, error))? {
                rows.extend(codes);
            }
        }
        lay_octet(&rows, scores.k * 2, out);
    }
    Ok(())
}

/// The rows of C, `[experts][k]`.
fn multiply(checkpoint: &Checkpoint, scores: &RouterScores<'_>) -> Result<Vec<f64>, CheckpointError> {
    let router = vector_values(checkpoint, scores.router)?;
    let gain = vector_values(checkpoint, scores.gain)?;
    let mut sums = vec![0.0; scores.experts * scores.k];
    let mut first = 0;
    for segment in scores.product {
        let end = segment.row_start + segment.rows;
        for start in (segment.row_start..end).step_by(PRODUCT_ROWS) {
            let rows = start..end.min(start + PRODUCT_ROWS);
            let own = first..first + rows.len();
            let product = product_rows(checkpoint, segment, rows)?;
            let weights = weights(&router, &gain, own.clone());
            add_rows(&mut sums, &weights, &product, scores.k);
            first = own.end;
        }
    }
    Ok(sums)
}

/// Rows of the product in float32.
fn product_rows(
    checkpoint: &Checkpoint,
    segment: &RowSegment,
    rows: Range<usize>,
) -> Result<Vec<f32>, CheckpointError> {
    let stored = stored_rows(checkpoint, &segment.tensor, rows, segment.columns)?;
    let mut values = vec![0.0; stored.rows * stored.cols];
    let read = stored.view().and_then(|view| dequantize(&view, &mut values));
    read.map_err(|error| checkpoint.convert_fault(&segment.tensor, &error))?;
    Ok(values)
}

/// Columns `own` of the router times their gains, `[experts][own]`.
fn weights(router: &[f32], gain: &[f32], own: Range<usize>) -> Vec<f64> {
    let scaled = |(weight, gain): (&f32, &f32)| f64::from(*weight) * f64::from(*gain);
    let rows = router.chunks_exact(gain.len());
    rows.flat_map(|row| row[own.clone()].iter().zip(&gain[own.clone()]).map(scaled)).collect()
}

/// Adds to `sums`, `[experts][k]`, the product of `weights`, `[experts][rows]`, and of `product`, `[rows][k]`.
fn add_rows(sums: &mut [f64], weights: &[f64], product: &[f32], k: usize) {
    let rows = product.len() / k;
    for columns in (0..k).step_by(COLUMNS).map(|start| start..k.min(start + COLUMNS)) {
        for (sums, weights) in sums.chunks_exact_mut(k).zip(weights.chunks_exact(rows)) {
            let sums = &mut sums[columns.clone()];
            for (weight, row) in weights.iter().zip(product.chunks_exact(k)) {
                for (sum, value) in sums.iter_mut().zip(&row[columns.clone()]) {
                    *sum += weight * f64::from(*value);
                }
            }
        }
    }
}

/// Why a row of C cannot be laid out.
enum Unfit {
    /// The value in this column.
    Value {
        column: usize,
        value: f64,
    },
    Convert(ConvertError),
}

/// Bfloat16 codes of the high and of the low part of each number.
fn split(sums: &[f64]) -> Result<[Vec<u8>; SCORE_FEATURES], Unfit> {
    let high = halves(sums)?;
    if let Some(column) = not_finite(Format::BF16.code, &high.codes) {
        return Err(Unfit::Value { column, value: sums[column] });
    }
    let mut rounded = vec![0.0; sums.len()];
    dequantize(&high.view(), &mut rounded).map_err(Unfit::Convert)?;
    let rest: Vec<f64> = sums.iter().zip(rounded).map(|(sum, high)| sum - f64::from(high)).collect();
    Ok([high.codes, halves(&rest)?.codes])
}

fn halves(values: &[f64]) -> Result<Planes, Unfit> {
    let values: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    quantize(Format::BF16, 1, values.len(), &values).map_err(Unfit::Convert)
}

/// An expert whose scores are at fault: which of the tensors is to blame cannot be told from what came out.
fn fault(checkpoint: &Checkpoint, scores: &RouterScores<'_>, expert: usize, error: Unfit) -> CheckpointError {
    let name = |content: &'_ PackContent| match content {
        PackContent::F32 { tensor, .. } | PackContent::Elements { tensor, .. } => tensor.clone(),
        _ => unreachable!("the recipe is verified"),
    };
    let (router, gain) = (name(scores.router), name(scores.gain));
    let (column, value) = match error {
        Unfit::Value { column, value } => (column, value),
        Unfit::Convert(error) => return checkpoint.convert_fault(&router, &error),
    };
    let mut product: Vec<String> = scores.product.iter().map(|own| format!("{:?}", own.tensor)).collect();
    product.dedup();
    let problem = format!(
        "its row of expert {expert}, times the gain {gain:?} and column {column} of the product {}, is {value}, which \
         bf16 cannot hold",
        product.join(", ")
    );
    checkpoint.fault(&router, ErrorKind::Value, problem, "check that the checkpoint is sound")
}
