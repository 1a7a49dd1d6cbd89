//! Convolutions with kernels that are made for each row. Descriptors.

use crate::KernelError;

/// A convolution over a row and the one before it; see [`tilec_ir::graph::Op::DynamicConv`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DynamicConv {
    /// Columns.
    pub cols: usize,
    /// Columns that share a value of a row's own kernel; divides the columns.
    pub group: usize,
    /// Whether other rows are added to what comes out.
    pub residual: bool,
}

impl DynamicConv {
    /// # Errors
    /// No columns, or columns that are no whole groups.
    pub fn check(&self) -> Result<(), KernelError> {
        if self.cols == 0 || self.group == 0 || !self.cols.is_multiple_of(self.group) {
            let problem = format!("{} columns in groups of {}", self.cols, self.group);
            return Err(KernelError::shape("dynamic_conv", problem, "use whole groups"));
        }
        Ok(())
    }

    /// Groups of columns.
    pub const fn groups(&self) -> usize {
        self.cols / self.group
    }
}
