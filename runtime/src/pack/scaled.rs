//! Rows in formats of which scales lie apart from the octets of their codes: block FP8, FP8 with one scale a row, and
//! NVFP4, whose tensor's scale every row has.
//!
//! Codes and scales are items of their own, made by jobs of their own. What is read here depends on the rows alone, not
//! on the job, so that the two fit each other; and it is read of all columns, so that a share of them is what the
//! whole has.

use crate::checkpoint::{Checkpoint, CheckpointError, ErrorKind, StoredRows};
use crate::conversion::Ledger;
use std::borrow::Cow;
use std::ops::Range;
use tilec_ir::convert::{ConvertError, PlaneView, Planes, dequantize, quantize, row_format, to_row_format};
use tilec_ir::format::Format;
use tilec_ir::launch::OCTET;
use tilec_ir::octet::{ScaleError, lay_fp8_rows, lay_nvfp4};
use tilec_ir::pack::{FP8_COLUMNS, Share};

/// Rows that share scales in block FP8.
pub(super) const FP8_ROWS: usize = Format::FP8_BLOCK.block_rows;

/// Which rows of a tensor.
pub(super) struct Wanted<'a> {
    /// Its name.
    pub tensor: &'a str,
    /// Row of the tensor by the number among those that belong together: they rise.
    pub at: &'a dyn Fn(usize) -> usize,
    /// How many belong together: blocks of 128 are counted in them.
    pub all: usize,
    /// The rows by number. They begin with an octet where octets share scales.
    pub rows: Range<usize>,
    /// Columns; all if there is no share.
    pub columns: Option<Share>,
}

/// Rows and their scales.
pub(super) struct Scaled {
    format: Format,
    rows: usize,
    cols: usize,
    /// As [`PlaneView`] has them.
    codes: Vec<u8>,
    /// Those of NVFP4 that lie in the octets.
    inner: Vec<u8>,
    /// Those that lie apart: of block FP8 `[octets][columns / 128]`, else one a row.
    apart: Vec<f32>,
}

/// Codes that mean nothing.
pub(super) fn check_codes(
    checkpoint: &Checkpoint,
    tensor: &str,
    stored: &StoredRows<'_>,
    at: &dyn Fn(usize) -> usize,
) -> Result<(), CheckpointError> {
    // A kernel reads the bits of a code without asking what they mean.
    match stored.codes.iter().position(|code| code & 0x7f == 0x7f) {
        None => Ok(()),
        Some(found) => {
            let (row, column) = (at(found / stored.cols), found % stored.cols);
            let problem = format!("the weight in row {row}, column {column} is NaN");
            Err(checkpoint.fault(tensor, ErrorKind::Value, problem, "check that the checkpoint is sound"))
        }
    }
}

/// Up to 128 rows that share scales, as block FP8: codes, and scales `f32 [octets][columns / 128]`, little endian. As
/// stored if the rows of every octet share their scales (whether the checkpoint has them per block or per tensor), else
/// quantized again, as [`quantize`] would the whole matrix; `again` is then called.
pub(super) fn block_fp8<'c>(
    checkpoint: &Checkpoint,
    tensor: &str,
    stored: StoredRows<'c>,
    at: &dyn Fn(usize) -> usize,
    again: impl FnOnce(Format, &[f32], &PlaneView<'_>) -> Result<(), ConvertError>,
) -> Result<(Cow<'c, [u8]>, Vec<u8>), CheckpointError> {
    let (rows, cols) = (stored.rows, stored.cols);
    let scale_row = cols.div_ceil(FP8_COLUMNS) * 4;
    if stored.format == row_format(Format::FP8_BLOCK) {
        check_codes(checkpoint, tensor, &stored, at)?;
        let octets = || stored.scales.chunks(OCTET * scale_row).map(|scales| scales.split_at(scale_row));
        if octets().all(|(first, rest)| rest.chunks_exact(scale_row).all(|row| row == first)) {
            let scales = octets().flat_map(|(first, _)| first.iter().copied()).collect();
            return Ok((stored.codes, scales));
        }
    }
    let fault = |error| fault(checkpoint, tensor, at, error);
    let values = values_of(&stored).map_err(fault)?;
    let converted = quantize(Format::FP8_BLOCK, rows, cols, &values).map_err(fault)?;
    again(stored.format, &values, &converted.view()).map_err(fault)?;
    let scales = converted.scales.repeat(rows.div_ceil(OCTET));
    Ok((Cow::Owned(converted.codes), scales))
}

fn fault(
    checkpoint: &Checkpoint,
    tensor: &str,
    at: &dyn Fn(usize) -> usize,
    error: ConvertError,
) -> CheckpointError {
    match error {
        ConvertError::NotFinite { row, col, value } => {
            checkpoint.convert_fault(tensor, &ConvertError::NotFinite { row: at(row), col, value })
        }
        error => checkpoint.convert_fault(tensor, &error),
    }
}

fn values_of(stored: &StoredRows<'_>) -> Result<Vec<f32>, ConvertError> {
    let mut values = vec![0.0; stored.rows * stored.cols];
    dequantize(&stored.view()?, &mut values)?;
    Ok(values)
}

/// The rows `rows` by their numbers, of those that `read` gives of a range of the tensor.
pub(super) fn gather<'c>(
    at: &dyn Fn(usize) -> usize,
    rows: Range<usize>,
    read: impl FnOnce(Range<usize>) -> Result<StoredRows<'c>, CheckpointError>,
) -> Result<StoredRows<'c>, CheckpointError> {
    let lowest = at(rows.start);
    let span = lowest..at(rows.end - 1) + 1;
    let mut stored = read(span.clone())?;
    if span.len() != rows.len() {
        let pick = |plane: &[u8]| -> Vec<u8> {
            let width = plane.len() / span.len();
            rows.clone().flat_map(|row| &plane[(at(row) - lowest) * width..][..width]).copied().collect()
        };
        (stored.codes, stored.scales, stored.mins) =
            (pick(&stored.codes).into(), pick(&stored.scales).into(), pick(&stored.mins).into());
        stored.rows = rows.len();
    }
    Ok(stored)
}

impl Scaled {
    /// Reads rows in `format`: as stored if they are stored so, else converted, which `ledger` is told of under the name
    /// `what`, if there is one.
    ///
    /// NVFP4 and fp8_channel are made of each row by itself.
    pub fn read(
        checkpoint: &Checkpoint,
        format: Format,
        wanted: &Wanted<'_>,
        ledger: Option<(&Ledger, &'static str)>,
    ) -> Result<Scaled, CheckpointError> {
        let mut scaled = match format {
            Format::FP8_BLOCK => Scaled::blocks(checkpoint, wanted, ledger)?,
            Format::NVFP4 => Scaled::nvfp4(checkpoint, wanted, ledger)?,
            _ => Scaled::channels(checkpoint, wanted, ledger)?,
        };
        if let Some(share) = wanted.columns {
            scaled.cut(share);
        }
        Ok(scaled)
    }

    fn blocks(
        checkpoint: &Checkpoint,
        wanted: &Wanted<'_>,
        ledger: Option<(&Ledger, &'static str)>,
    ) -> Result<Scaled, CheckpointError> {
        let Wanted { tensor, at, all, rows, .. } = wanted;
        let cols = checkpoint.tensor(tensor)?.cols();
        let mut scaled = Scaled {
            format: Format::FP8_BLOCK,
            rows: rows.len(),
            cols,
            codes: Vec::with_capacity(rows.len() * cols),
            inner: Vec::new(),
            apart: Vec::new(),
        };
        let scale_row = cols.div_ceil(FP8_COLUMNS);
        for first in (rows.start / FP8_ROWS * FP8_ROWS..rows.end).step_by(FP8_ROWS) {
            let block = first..(*all).min(first + FP8_ROWS);
            let stored = gather(*at, block.clone(), |span| checkpoint.rows(tensor, span))?;
            let name = |row: usize| at(first + row);
            let (codes, scales) =
                block_fp8(checkpoint, tensor, stored, &name, |from, values, view| match ledger {
                    Some((ledger, what)) => ledger.add(what, from.to_string(), "fp8".into(), values, view),
                    None => Ok(()),
                })?;
            let own = rows.start.max(first) - first..rows.end.min(block.end) - first;
            scaled.codes.extend_from_slice(&codes[own.start * cols..own.end * cols]);
            let octets = own.start / OCTET * scale_row..own.end.div_ceil(OCTET) * scale_row;
            let scales = &scales.as_chunks::<4>().0[octets];
            scaled.apart.extend(scales.iter().map(|scale| f32::from_le_bytes(*scale)));
        }
        Ok(scaled)
    }

    fn channels(
        checkpoint: &Checkpoint,
        wanted: &Wanted<'_>,
        ledger: Option<(&Ledger, &'static str)>,
    ) -> Result<Scaled, CheckpointError> {
        let Wanted { tensor, at, rows, .. } = wanted;
        let stored = gather(*at, rows.clone(), |span| checkpoint.rows(tensor, span))?;
        let name = |row: usize| at(rows.start + row);
        let cols = stored.cols;
        let scale_row = cols.div_ceil(FP8_COLUMNS);
        let format = Format::FP8_CHANNEL;
        if stored.format == row_format(format) {
            check_codes(checkpoint, tensor, &stored, &name)?;
            let scales = stored.scales.as_chunks::<4>().0;
            if scales.chunks_exact(scale_row).all(|row| row.iter().all(|scale| *scale == row[0])) {
                let apart = scales.iter().step_by(scale_row).map(|scale| f32::from_le_bytes(*scale));
                let (apart, codes) = (apart.collect(), stored.codes.into_owned());
                return Ok(Scaled { format, rows: rows.len(), cols, codes, inner: Vec::new(), apart });
            }
        }
        let fault = |error| fault(checkpoint, tensor, &name, error);
        let values = values_of(&stored).map_err(fault)?;
        let converted = quantize(format, rows.len(), cols, &values).map_err(fault)?;
        if let Some((ledger, what)) = ledger {
            let from = stored.format.to_string();
            ledger.add(what, from, format.to_string(), &values, &converted.view()).map_err(fault)?;
        }
        let apart = converted.scales.as_chunks().0.iter().map(|scale| f32::from_le_bytes(*scale)).collect();
        Ok(Scaled { format, rows: rows.len(), cols, codes: converted.codes, inner: Vec::new(), apart })
    }

    fn nvfp4(
        checkpoint: &Checkpoint,
        wanted: &Wanted<'_>,
        ledger: Option<(&Ledger, &'static str)>,
    ) -> Result<Scaled, CheckpointError> {
        let Wanted { tensor, at, rows, .. } = wanted;
        let format = Format::NVFP4;
        if let Some(scale) = checkpoint.tensor_scale(tensor)? {
            let stored = gather(*at, rows.clone(), |span| checkpoint.nvfp4_rows(tensor, span))?;
            let (cols, apart) = (stored.cols, vec![scale; rows.len()]);
            let (codes, inner) = (stored.codes.into_owned(), stored.scales.into_owned());
            return Ok(Scaled { format, rows: rows.len(), cols, codes, inner, apart });
        }
        let stored = gather(*at, rows.clone(), |span| checkpoint.rows(tensor, span))?;
        let name = |row: usize| at(rows.start + row);
        let (cols, count) = (stored.cols, rows.len());
        let fault_of = |error| fault(checkpoint, tensor, &name, error);
        let values = values_of(&stored).map_err(fault_of)?;
        let mut scaled =
            Scaled { format, rows: count, cols, codes: Vec::new(), inner: Vec::new(), apart: Vec::new() };
        let mut folded = Planes::zeroed(row_format(format), count, cols).map_err(fault_of)?;
        folded.scales.clear();
        for (row, values) in values.chunks_exact(cols).enumerate() {
            // Rows of an error count from the row.
            let name = |_| name(row);
            let own = quantize(format, 1, cols, values).map_err(|e| fault(checkpoint, tensor, &name, e))?;
            folded.scales.extend(to_row_format(&own.view()).scales);
            scaled.codes.extend(own.codes);
            scaled.inner.extend(own.scales);
            scaled.apart.push(own.tensor_scale);
        }
        if let Some((ledger, what)) = ledger {
            folded.codes.clone_from(&scaled.codes);
            let from = stored.format.to_string();
            ledger.add(what, from, format.to_string(), &values, &folded.view()).map_err(fault_of)?;
        }
        Ok(scaled)
    }

    /// Keeps a share of the columns, which begins where columns do that share a scale, and with a whole byte.
    fn cut(&mut self, share: Share) {
        let pick = |plane: &[u8], bits: usize| -> Vec<u8> {
            let rows = plane.chunks_exact((self.cols * bits).div_ceil(8));
            rows.flat_map(|row| &row[share.start * bits / 8..(share.end() * bits).div_ceil(8)])
                .copied()
                .collect()
        };
        let codes = pick(&self.codes, self.format.code.bits());
        let units = |plane: &[u8], block: usize| -> Vec<u8> {
            let rows = plane.chunks_exact(self.cols.div_ceil(block));
            rows.flat_map(|row| &row[share.start / block..share.end().div_ceil(block)]).copied().collect()
        };
        if self.format == Format::NVFP4 {
            self.inner = units(&self.inner, self.format.block);
        }
        if self.format == Format::FP8_BLOCK {
            let rows = self.apart.chunks_exact(self.cols.div_ceil(FP8_COLUMNS));
            let own = share.start / FP8_COLUMNS..share.end().div_ceil(FP8_COLUMNS);
            self.apart = rows.flat_map(|row| &row[own.clone()]).copied().collect();
        }
        (self.codes, self.cols) = (codes, share.len);
    }

    /// Lays octet number `octet` of the rows out.
    pub fn lay(&self, octet: usize, out: &mut [u8]) -> Result<(), ScaleError> {
        let rows = octet * OCTET..self.rows.min((octet + 1) * OCTET);
        let plane = |plane: &'_ [u8]| -> Range<usize> {
            let width = plane.len() / self.rows.max(1);
            rows.start * width..rows.end * width
        };
        let (codes, inner) = (&self.codes[plane(&self.codes)], &self.inner[plane(&self.inner)]);
        let view = |format, scales| {
            PlaneView::new(format, rows.len(), self.cols, codes, scales, &[], 1.0)
                .expect("planes keep the sizes of their shape")
        };
        match self.format {
            Format::NVFP4 => lay_nvfp4(&view(Format::NVFP4, inner), out),
            _ => {
                // Their scales are not the octets'.
                let bare = Format { scale: None, block: 0, block_rows: 1, ..Format::FP8_BLOCK };
                lay_fp8_rows(&view(bare, &[]), out);
                Ok(())
            }
        }
    }

    /// The scales of octet number `octet` of the rows that lie apart; zeros of rows that are not there.
    pub fn scales(&self, octet: usize, out: &mut [u8]) {
        let each = out.len() / 4;
        let own = self.apart.iter().skip(octet * each).chain(std::iter::repeat(&0.0));
        for (bytes, scale) in out.as_chunks_mut::<4>().0.iter_mut().zip(own) {
            *bytes = scale.to_le_bytes();
        }
    }
}
