//! Kernels over whole rows: norms, quantization, embedding, copies. Descriptors.

use crate::KernelError;
use tilec_ir::abi::QuantRows;
use tilec_ir::format::{Code, PanelLayout};

/// `out = x / sqrt(mean(x^2) + eps) * weight`, per row, to f32, to quantized rows, or to both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Columns.
    pub dim: usize,
    /// Added to the mean of the squares.
    pub eps: f32,
    /// Whether f32 rows are written.
    pub f32_out: bool,
    /// The quantized rows written, if any; their `k` is `dim`.
    pub quant_out: Option<QuantRows>,
    /// Whether row `i` of the call reads source row `index[i]` instead of `i`.
    pub gathered: bool,
}

impl RmsNorm {
    /// # Errors
    /// No column, no output, or quantized rows of another width.
    pub fn check(&self) -> Result<(), KernelError> {
        let fail = |problem: String, remedy| Err(KernelError::shape("rms_norm", problem, remedy));
        match self.quant_out {
            _ if self.dim == 0 => fail("no columns".into(), "give at least one"),
            Some(quant) if quant.k != self.dim => {
                fail(format!("quantized rows have {} columns, not {}", quant.k, self.dim), "make them equal")
            }
            None if !self.f32_out => fail("no output".into(), "ask for f32 or quantized rows"),
            _ => Ok(()),
        }
    }
}

/// f32 columns to quantized columns: per block of 32, `scale = amax / 127`, codes rounded to
/// nearest even. A block with an infinity or a NaN gets a NaN scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quantize {
    /// The rows written.
    pub quant: QuantRows,
}

/// Where embedding rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// Packed panels: a token is an output feature.
    Panels(PanelLayout),
    /// `[vocabulary][dim]` of F32, F16 or Bf16.
    Plain(Code),
}

/// One row of a table per token, as f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Embed {
    /// The table.
    pub table: Table,
    /// Columns.
    pub dim: usize,
    /// A constant that every element is multiplied by, if any.
    pub scale: Option<f32>,
}

impl Embed {
    /// # Errors
    /// Panels of another width, or a plain table of a quantized code.
    pub fn check(&self) -> Result<(), KernelError> {
        let fail = |problem: String, remedy| Err(KernelError::shape("embed", problem, remedy));
        match self.table {
            _ if self.dim == 0 => fail("no columns".into(), "give at least one"),
            Table::Panels(layout) if layout.k != self.dim => {
                fail(format!("panels have {} columns, not {}", layout.k, self.dim), "make them equal")
            }
            Table::Plain(code) if !matches!(code, Code::F32 | Code::F16 | Code::Bf16) => {
                fail(format!("a plain table of {code:?}"), "use f32, f16 or bf16, or panels")
            }
            _ => Ok(()),
        }
    }
}
