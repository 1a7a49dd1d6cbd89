//! How one tensor lies in its file, and reading rows of it as planes.

use super::file::{MappedFile, Span};
use super::gguf::BlockType;
use super::synthetic::Synthetic;
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Range;
use tilec_ir::convert::{ConvertError, PlaneView, Planes, dequantize, e4m3_to_f32, row_format};
use tilec_ir::format::{Format, ScaleType};
use tilec_ir::tensor::TensorInfo;

/// Rows of a tensor as planes, in the [`row_format`] of the stored format: the codes as stored, the
/// scales repeated for every row and the tensor's scale folded in. The planes are laid out as
/// [`PlaneView`] says.
#[derive(Clone, Debug)]
pub struct StoredRows<'a> {
    /// Format of the planes.
    pub format: Format,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The plane of codes.
    pub codes: Cow<'a, [u8]>,
    /// The plane of scales.
    pub scales: Cow<'a, [u8]>,
    /// The plane of minima.
    pub mins: Cow<'a, [u8]>,
}

impl StoredRows<'_> {
    /// A view of all rows.
    ///
    /// # Errors
    /// If planes were given other sizes than the shape asks for.
    pub fn view(&self) -> Result<PlaneView<'_>, ConvertError> {
        PlaneView::new(self.format, self.rows, self.cols, &self.codes, &self.scales, &self.mins, 1.0)
    }

    /// Columns `columns` of the rows, which have them; as float32 if they are no whole blocks of codes and
    /// scales.
    ///
    /// # Errors
    /// If planes were given other sizes than the shape asks for.
    pub fn columns(self, columns: Range<usize>) -> Result<StoredRows<'static>, ConvertError> {
        let view = self.view()?;
        let (cols, rows) = (columns.len(), self.rows);
        if !whole_blocks(self.format, self.cols, &columns) {
            let mut values = vec![0.0; rows * self.cols];
            dequantize(&view, &mut values)?;
            let codes = values
                .chunks_exact(self.cols.max(1))
                .flat_map(|row| &row[columns.clone()])
                .flat_map(|value| value.to_le_bytes())
                .collect();
            return Ok(StoredRows::owned(Format::F32, rows, cols, codes, Vec::new(), Vec::new()));
        }
        let pick = |plane: &[u8], unit: Range<usize>| -> Vec<u8> {
            if plane.is_empty() {
                return Vec::new();
            }
            plane
                .chunks_exact(plane.len() / rows.max(1))
                .flat_map(|row| &row[unit.clone()])
                .copied()
                .collect()
        };
        let bits = self.format.code.bits();
        let codes = pick(&self.codes, columns.start * bits / 8..(columns.end * bits).div_ceil(8));
        let scale = self.format.scale.map_or(0, ScaleType::bytes);
        let block = self.format.block.max(1);
        let blocks = columns.start / block * scale..columns.end.div_ceil(block) * scale;
        let (scales, mins) = (pick(&self.scales, blocks.clone()), pick(&self.mins, blocks));
        Ok(StoredRows::owned(self.format, rows, cols, codes, scales, mins))
    }
}

/// Whether columns of rows of `cols` columns begin and end where blocks with one scale and whole bytes do.
pub(super) fn whole_blocks(format: Format, cols: usize, columns: &Range<usize>) -> bool {
    let unit = format.block.max(8 / format.code.bits().min(8));
    columns.start.is_multiple_of(unit) && (columns.end.is_multiple_of(unit) || columns.end == cols)
}

/// How a scale lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScaleStorage {
    F32,
    F16,
    Bf16,
    E8m0,
    E4m3,
}

impl ScaleStorage {
    pub fn bytes(self) -> usize {
        match self {
            ScaleStorage::F32 => 4,
            ScaleStorage::F16 | ScaleStorage::Bf16 => 2,
            ScaleStorage::E8m0 | ScaleStorage::E4m3 => 1,
        }
    }

    fn get(self, plane: &[u8], index: usize) -> f32 {
        let bytes = &plane[index * self.bytes()..][..self.bytes()];
        match self {
            ScaleStorage::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            ScaleStorage::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            ScaleStorage::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            ScaleStorage::E8m0 => ScaleType::E8m0.decode(bytes),
            ScaleStorage::E4m3 => e4m3_to_f32(bytes[0]),
        }
    }
}

/// A grid of scales: for every `group_rows` rows `[ceil(group_rows / per_rows)][ceil(cols / per_cols)]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScaleGrid {
    pub span: Span,
    pub storage: ScaleStorage,
    pub per_rows: usize,
    pub per_cols: usize,
    /// Rows behind which the grid starts anew; at least all of them if it does not.
    pub group_rows: usize,
    /// Multiplied into every scale.
    pub factor: f32,
}

/// How a tensor is stored.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored {
    /// Codes row by row in a tensor of their own, scales in another.
    Planes { codes: Span, scales: Option<ScaleGrid> },
    /// GGUF: blocks that hold codes and scales, row by row. `rotary_heads` says that rows of every
    /// head are interleaved for rotary embeddings on neighbours, and how many heads there are.
    Blocks { span: Span, block: BlockType, rotary_heads: Option<usize> },
    /// Made when asked for.
    Synthetic(Synthetic),
}

/// Where row `row` of a head-wise interleaved matrix of `rows` rows comes from: the file has dimensions
/// 0, d/2, 1, d/2 + 1, ... of every head, in that order.
pub(super) fn interleaved_row(row: usize, rows: usize, heads: usize) -> usize {
    let head_dim = rows / heads;
    let (head, dim) = (row / head_dim, row % head_dim);
    let (half, pair) = (dim / (head_dim / 2), dim % (head_dim / 2));
    head * head_dim + 2 * pair + half
}

impl Stored {
    /// Rows `range` of the tensor. The caller has checked the range, the constructor of the `Stored`
    /// that all spans fit `info`.
    pub fn rows<'a>(
        &self,
        files: &'a [MappedFile],
        info: &TensorInfo,
        range: Range<usize>,
    ) -> Result<StoredRows<'a>, ConvertError> {
        let cols = info.cols();
        match self {
            Stored::Planes { codes, scales } => {
                let row_bytes = (cols * info.format.code.bits()).div_ceil(8);
                let codes = &slice(files, codes)[range.start * row_bytes..range.end * row_bytes];
                let format = row_format(info.format);
                let scales = match scales {
                    Some(grid) => grid.rows(files, format, cols, range.clone()),
                    None => Cow::Borrowed(&[][..]),
                };
                let (codes, mins) = (Cow::Borrowed(codes), Cow::Borrowed(&[][..]));
                Ok(StoredRows { format, rows: range.len(), cols, codes, scales, mins })
            }
            Stored::Blocks { span, block, rotary_heads } => {
                let bytes = slice(files, span);
                // A vector has one row for the shape, but its elements are permuted like rows.
                if let (Some(heads), 1) = (rotary_heads, info.shape.len()) {
                    let element = info.format.code.bits() / 8;
                    let codes = (0..cols)
                        .flat_map(|i| bytes[interleaved_row(i, cols, *heads) * element..][..element].to_vec())
                        .collect();
                    return Ok(StoredRows::owned(info.format, 1, cols, codes, Vec::new(), Vec::new()));
                }
                let rows = info.rows().unwrap_or(0);
                let source = |row| rotary_heads.map_or(row, |heads| interleaved_row(row, rows, heads));
                let row_bytes = block.row_bytes(cols);
                let planes =
                    block.planes(cols, range.map(|row| &bytes[source(row) * row_bytes..][..row_bytes]))?;
                let (rows, format) = (planes.rows, planes.format);
                Ok(StoredRows::owned(format, rows, cols, planes.codes, planes.scales, planes.mins))
            }
            Stored::Synthetic(synthetic) => {
                let planes = synthetic.rows(info, range)?;
                let (rows, format) = (planes.rows, planes.format);
                Ok(StoredRows::owned(format, rows, cols, planes.codes, planes.scales, planes.mins))
            }
        }
    }
}

impl Stored {
    /// The scale of the whole tensor, if it has one.
    pub fn tensor_scale(&self, info: &TensorInfo) -> Option<f32> {
        match self {
            _ if !info.format.tensor_scale => None,
            Stored::Planes { scales: Some(grid), .. } if grid.storage == ScaleStorage::E4m3 => {
                Some(grid.factor)
            }
            Stored::Synthetic(synthetic) => Some(synthetic.tensor_scale()),
            _ => None,
        }
    }

    /// Rows `range` of a tensor with a scale of its own, which is left out, in its format.
    pub fn under_tensor_scale<'a>(
        &self,
        files: &'a [MappedFile],
        info: &TensorInfo,
        range: Range<usize>,
    ) -> Result<StoredRows<'a>, ConvertError> {
        let (format, cols) = (info.format, info.cols());
        match self {
            Stored::Planes { scales: Some(grid), .. } => {
                let row_bytes = cols.div_ceil(grid.per_cols) * grid.storage.bytes();
                let scales = &slice(files, &grid.span)[range.start * row_bytes..range.end * row_bytes];
                let rows = self.rows(files, info, range)?;
                Ok(StoredRows { format, scales: Cow::Borrowed(scales), ..rows })
            }
            Stored::Synthetic(synthetic) => {
                let planes = synthetic.own_rows(info, range, 0..cols)?;
                let Planes { rows, codes, scales, mins, .. } = planes;
                Ok(StoredRows::owned(format, rows, cols, codes, scales, mins))
            }
            // None of them has one.
            _ => self.rows(files, info, range),
        }
    }
}

impl StoredRows<'_> {
    pub(super) fn owned(
        format: Format,
        rows: usize,
        cols: usize,
        codes: Vec<u8>,
        scales: Vec<u8>,
        mins: Vec<u8>,
    ) -> StoredRows<'static> {
        let (codes, scales, mins) = (Cow::Owned(codes), Cow::Owned(scales), Cow::Owned(mins));
        StoredRows { format, rows, cols, codes, scales, mins }
    }
}

impl ScaleGrid {
    /// The plane of scales of the rows, of the type and block that `format` has.
    fn rows<'a>(
        &self,
        files: &'a [MappedFile],
        format: Format,
        cols: usize,
        range: Range<usize>,
    ) -> Cow<'a, [u8]> {
        let plane = slice(files, &self.span);
        let grid_cols = cols.div_ceil(self.per_cols);
        let same_type = matches!(
            (self.storage, format.scale),
            (ScaleStorage::E8m0, Some(ScaleType::E8m0)) | (ScaleStorage::F32, Some(ScaleType::F32))
        );
        if same_type && self.per_rows == 1 && self.per_cols == format.block && self.factor == 1.0 {
            let row_bytes = grid_cols * self.storage.bytes();
            return Cow::Borrowed(&plane[range.start * row_bytes..range.end * row_bytes]);
        }
        let blocks = cols.div_ceil(format.block);
        let mut out = Vec::with_capacity(range.len() * blocks * 4);
        for row in range {
            for b in 0..blocks {
                let (group, inside) = (row / self.group_rows, row % self.group_rows);
                // One group needs no number of blocks, which a grid of all rows might overflow.
                let before = if group == 0 { 0 } else { group * self.group_rows.div_ceil(self.per_rows) };
                let index = (before + inside / self.per_rows) * grid_cols + b * format.block / self.per_cols;
                out.extend_from_slice(&(self.storage.get(plane, index) * self.factor).to_le_bytes());
            }
        }
        Cow::Owned(out)
    }
}

pub(super) fn slice<'a>(files: &'a [MappedFile], span: &Span) -> &'a [u8] {
    &files[span.file].bytes()[span.start..span.start + span.len]
}
