//! Weights that nobody trained: the exact shapes of a model, made on demand from a seed.
//!
//! A weight depends on the seed, the tensor's name and its own index alone, so that any rows can be
//! made in any order, on any machine, with the same result.

use super::stored::{StoredRows, whole_blocks};
use std::ops::Range;
use tilec_ir::convert::{
    ConvertError, E2M1_MAX, E4M3_MAX, Planes, quantize_under, row_format, to_row_format,
};
use tilec_ir::format::Format;
use tilec_ir::tensor::TensorInfo;

/// How to make the weights of one tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Synthetic {
    key: u64,
    mean: f32,
    deviation: f32,
}

/// The finalizer of splitmix64: every bit of the input moves every bit of the output.
const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Synthetic {
    /// Weights of `name`: matrices of standard deviation `1 / sqrt(columns)`, so that activations keep
    /// their size; norm weights of 1 +- 0.1; other vectors of deviation 0.02.
    pub fn new(seed: u64, name: &str, info: &TensorInfo) -> Synthetic {
        let key = name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
        let (mean, deviation) = match info.shape.len() {
            0 | 1 if name.contains("norm") => (1.0, 0.1),
            0 | 1 => (0.0, 0.02),
            _ => (0.0, 1.0 / (info.cols().max(1) as f32).sqrt()),
        };
        Synthetic { key, mean, deviation }
    }

    /// The weight at a row-major index: the sum of four uniform numbers, near enough to normal, and
    /// within 3.5 deviations of the mean.
    fn weight(&self, index: u64) -> f32 {
        let bits = mix(self.key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        let sum = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as i32).sum::<i32>() - 2 * 0xffff;
        // Each uniform number has variance 65536^2 / 12.
        let unit = (3f32).sqrt() / 65536.0;
        self.mean + self.deviation * (sum as f32 * unit)
    }

    /// Rows `range`, quantized to the row format. Every row has scales of its own, whatever the
    /// stored format shares between rows, so that rows do not depend on the range they are made in.
    pub fn rows(&self, info: &TensorInfo, range: Range<usize>) -> Result<Planes, ConvertError> {
        self.block(info, range, 0..info.cols())
    }

    /// Columns `columns` of rows `range`, the same as in whole rows; `None` if they are no whole blocks, so
    /// that their scales depend on others, or if one scale covers the tensor.
    pub fn columns(
        &self,
        info: &TensorInfo,
        range: Range<usize>,
        columns: Range<usize>,
    ) -> Option<Result<StoredRows<'static>, ConvertError>> {
        let format = row_format(info.format);
        if !whole_blocks(format, info.cols(), &columns) || info.format.block == Format::WHOLE_ROW {
            return None;
        }
        Some(self.block(info, range, columns).map(|planes| {
            let Planes { format, rows, cols, codes, scales, mins, .. } = planes;
            StoredRows::owned(format, rows, cols, codes, scales, mins)
        }))
    }

    /// In the row format. Scales that the stored format has for a whole row or tensor are kept.
    fn block(
        &self,
        info: &TensorInfo,
        range: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Planes, ConvertError> {
        let planes = self.own_rows(info, range, columns)?;
        Ok(if row_format(planes.format) == planes.format { planes } else { to_row_format(&planes.view()) })
    }

    /// The scale of the whole tensor in formats that have one: no weight is beyond its range.
    pub fn tensor_scale(&self) -> f32 {
        (self.mean.abs() + 3.5 * self.deviation) / (E2M1_MAX * E4M3_MAX)
    }

    /// The same in the stored format, but that every row has scales of its own.
    pub fn own_rows(
        &self,
        info: &TensorInfo,
        range: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Planes, ConvertError> {
        let (rows, cols) = (range.len(), columns.len());
        let mut values = Vec::with_capacity(rows * cols);
        for row in range {
            let first = row as u64 * info.cols() as u64;
            values.extend(columns.clone().map(|column| self.weight(first + column as u64)));
        }
        let format = Format { block_rows: 1, ..info.format };
        quantize_under(format, rows, cols, &values, Some(self.tensor_scale()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilec_ir::convert::dequantize;

    fn values(synthetic: &Synthetic, info: &TensorInfo, range: Range<usize>) -> Vec<f32> {
        let planes = synthetic.rows(info, range).unwrap();
        let mut out = vec![0.0; planes.rows * planes.cols];
        dequantize(&planes.view(), &mut out).unwrap();
        out
    }

    #[test]
    fn weights_have_the_mean_and_deviation_that_they_should() {
        for (name, shape, mean, deviation) in [
            ("a.weight", vec![64, 256], 0.0, 1.0 / 16.0),
            ("a.norm.weight", vec![4096], 1.0, 0.1),
            ("a.bias", vec![4096], 0.0, 0.02),
        ] {
            let info = TensorInfo::new(shape, Format::F32);
            let all = values(&Synthetic::new(7, name, &info), &info, 0..info.rows().unwrap());
            let n = all.len() as f32;
            let found = all.iter().sum::<f32>() / n;
            let spread = (all.iter().map(|v| (v - found).powi(2)).sum::<f32>() / n).sqrt();
            assert!((found - mean).abs() < 4.0 * deviation / n.sqrt(), "{name}: mean {found}");
            assert!((spread / deviation - 1.0).abs() < 0.05, "{name}: deviation {spread}");
        }
    }

    #[test]
    fn weights_depend_on_seed_name_and_index_alone() {
        for (_, format) in Format::NAMED {
            let info = TensorInfo::new([40, 256], *format);
            let make = |seed, name| Synthetic::new(seed, name, &info);
            let all = values(&make(1, "a"), &info, 0..40);
            assert_eq!(values(&make(1, "a"), &info, 7..19), all[7 * 256..19 * 256], "{format}");
            assert_ne!(values(&make(2, "a"), &info, 0..40), all, "{format}");
            assert_ne!(values(&make(1, "b"), &info, 0..40), all, "{format}");
        }
    }
}
