//! GEMM on packed panels: shapes and costs. The code is built by `llvm::Kernels::gemm`.

use crate::KernelError;
use tilec_ir::abi::QuantRows;
use tilec_ir::format::{ACT_BLOCK, Code, PANEL, PanelLayout};

/// What the activations of a GEMM are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activations {
    /// Signed bytes in blocks of 32 with a float32 scale each: integer dot products, exact and the
    /// same on every target. Only for formats with [integer codes].
    ///
    /// [integer codes]: tilec_ir::format::Format::integer_codes
    Int8(QuantRows),
    /// `f32 [rows][stride]`; weights are decoded to f32.
    F32 {
        /// Elements from one row to the next, at least K.
        stride: usize,
    },
}

/// `out[row][feature] = sum over k of activation[row][k] * weight[feature][k]`, for a run of panels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gemm {
    /// Layout of one panel.
    pub layout: PanelLayout,
    /// The activations.
    pub activations: Activations,
}

impl Gemm {
    /// # Errors
    /// A combination that has no kernel: integer activations with float codes or with blocks other
    /// than 16 and 32, a K that differs, a stride below K, a float format with blocks below 16.
    pub fn check(&self) -> Result<(), KernelError> {
        let fail = |problem: String, remedy| Err(KernelError::shape("gemm", problem, remedy));
        let (format, k) = (self.layout.format, self.layout.k);
        if k == 0 {
            return fail("K is 0".into(), "give at least one column");
        }
        if format.block_rows != 1 || format.tensor_scale {
            return fail(format!("{format} is not a panel format"), "use PanelLayout::new");
        }
        if format.scale.is_some()
            && !(format.block == 16 || format.block.is_multiple_of(32) && format.block > 0)
        {
            return fail(
                format!("{format} has scale blocks of {}", format.block),
                "use 16 or multiples of 32",
            );
        }
        match self.activations {
            Activations::Int8(_) if !format.integer_codes() || format.scale.is_none() => {
                fail(format!("{format} has no integer codes"), "use f32 activations")
            }
            Activations::Int8(_) if format.block != 16 && format.block != 32 => {
                fail(format!("{format} has scale blocks of {}", format.block), "use f32 activations")
            }
            Activations::Int8(quant) if quant.k != k => {
                fail(format!("activations have {} columns, weights {k}", quant.k), "make them equal")
            }
            Activations::F32 { stride } if stride < k => {
                fail(format!("the activations' stride {stride} is below K {k}"), "use a stride of at least K")
            }
            _ => Ok(()),
        }
    }

    /// Columns that one entry of the correction plane covers (see [`Gemm::scratch_bytes`]).
    pub(crate) fn corrected(&self) -> bool {
        matches!(self.activations, Activations::Int8(_))
            && (self.layout.format.min || integer_zero(self.layout.format.code, self.layout.format.zero) != 0)
    }

    /// Bytes of private scratch for a call with up to `rows` rows: what each (row, scale block)
    /// subtracts for the codes' zero, or adds for the minimum. 0 if the format has neither.
    pub fn scratch_bytes(&self, rows: usize) -> usize {
        if self.corrected() { (rows * self.layout.blocks() * 4).next_multiple_of(64) } else { 0 }
    }

    /// Weight bytes that `features` output features read.
    pub fn weight_bytes(&self, features: usize) -> usize {
        features.div_ceil(PANEL) * self.layout.bytes()
    }

    /// Activation bytes that `rows` rows read.
    pub fn activation_bytes(&self, rows: usize) -> usize {
        match self.activations {
            Activations::Int8(quant) => rows * (quant.k_pad() + quant.blocks() * 8),
            Activations::F32 { .. } => rows * self.layout.k * 4,
        }
    }

    /// Multiply-adds on `rows` rows and `features` features, padding included.
    pub fn multiply_adds(&self, rows: usize, features: usize) -> usize {
        rows * features.next_multiple_of(PANEL) * self.layout.k.next_multiple_of(ACT_BLOCK)
    }
}

/// The zero that the integer kernels subtract. E2M1 codes become `2 * value + 12`, and their
/// scale is halved.
pub(crate) fn integer_zero(code: Code, zero: i32) -> i32 {
    if code == Code::E2m1 { 12 } else { zero }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilec_ir::format::Format;

    #[test]
    fn illegal_combinations_are_refused() {
        let int8 = |format, k, qk| Gemm {
            layout: PanelLayout::new(format, k),
            activations: Activations::Int8(QuantRows { k: qk, max_rows: 8 }),
        };
        assert!(int8(Format::Q4_1, 64, 64).check().is_ok());
        assert!(int8(Format::NVFP4, 64, 64).check().is_ok());
        assert!(int8(Format::BF16, 64, 64).check().is_err());
        assert!(int8(Format::FP8_BLOCK, 128, 128).check().is_err());
        assert!(int8(Format::Q4_1, 64, 96).check().is_err());
        let float = |stride| Gemm {
            layout: PanelLayout::new(Format::FP8_BLOCK, 64),
            activations: Activations::F32 { stride },
        };
        assert!(float(64).check().is_ok());
        assert!(float(63).check().is_err());
    }

    #[test]
    fn only_formats_with_a_zero_or_a_minimum_need_scratch() {
        let bytes = |format| {
            let layout = PanelLayout::new(format, 64);
            let quant = QuantRows { k: 64, max_rows: 8 };
            Gemm { layout, activations: Activations::Int8(quant) }.scratch_bytes(3)
        };
        assert_eq!(bytes(Format::Q4_1), 64);
        assert_eq!(bytes(Format::MXFP4), 64);
        assert_eq!(bytes(Format { zero: 0, ..Format::Q4_0 }), 0);
    }
}
