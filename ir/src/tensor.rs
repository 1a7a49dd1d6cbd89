//! What is known of a stored tensor without reading it.

use crate::format::Format;
use serde::{Deserialize, Serialize};

/// Shape and stored format of one tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorInfo {
    /// Extents, outermost first: `[out_features, in_features]` for a weight matrix.
    pub shape: Vec<usize>,
    /// How the elements are stored. Packed codes count as elements: an MXFP4 matrix whose file holds
    /// bytes `[out, in / 2]` has the shape `[out, in]`.
    pub format: Format,
}

impl TensorInfo {
    /// A tensor of `shape` in `format`.
    pub fn new(shape: impl Into<Vec<usize>>, format: Format) -> TensorInfo {
        TensorInfo { shape: shape.into(), format }
    }

    /// Elements of a row: the innermost extent, 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows when all outer extents are flattened; a vector is one row. `None` if that overflows.
    pub fn rows(&self) -> Option<usize> {
        let outer = self.shape.split_last().map_or(&[][..], |(_, outer)| outer);
        outer.iter().try_fold(1usize, |product, &n| product.checked_mul(n))
    }

    /// Elements in all, or `None` if that overflows.
    pub fn elements(&self) -> Option<usize> {
        self.rows()?.checked_mul(self.cols())
    }
}
