//! Weight formats as data: what a stored code means, which scale covers it, and how the packed
//! panels that the kernels stream are laid out.
//!
//! One equation covers every format here:
//!
//! ```text
//! weight = scale[block] * (code - zero) + min[block]
//! ```
//!
//! `scale` is absent for plain floats, `min` exists only in the formats with a minimum (Q4_1,
//! Q4_K), and `zero` is a constant of the format (8 for Q4_0, 128 for I8 stored as bytes).

use serde::{Deserialize, Serialize};
use std::fmt;

/// Output features that one packed panel holds: the lanes of a 512-bit vector of f32.
pub const PANEL: usize = 16;

/// Columns that one block of quantized activations covers, and the unit that K is padded to.
pub const ACT_BLOCK: usize = 32;

/// The stored code of one weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Code {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// OCP FP8 E4M3 (finite; 0x7f and 0xff are NaN).
    E4m3,
    /// OCP FP4 E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
    E2m1,
    /// Signed byte. Packed as `byte ^ 0x80`, so that kernels see an unsigned code with zero 128.
    I8,
    /// Unsigned nibble.
    U4,
}

impl Code {
    /// Bits of one code.
    pub const fn bits(self) -> usize {
        match self {
            Code::F32 => 32,
            Code::F16 | Code::Bf16 => 16,
            Code::E4m3 | Code::I8 => 8,
            Code::E2m1 | Code::U4 => 4,
        }
    }
}

/// The stored type of a block's scale and minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleType {
    /// IEEE single.
    F32,
    /// IEEE half (the GGUF legacy quants).
    F16,
    /// A power of two, `2^(byte - 127)`; 255 is NaN (OCP MX).
    E8m0,
    /// FP8 E4M3 (NVFP4; a float32 scale of the whole tensor comes on top).
    E4m3,
}

impl ScaleType {
    /// Bytes of one scale.
    pub const fn bytes(self) -> usize {
        match self {
            ScaleType::F32 => 4,
            ScaleType::F16 => 2,
            ScaleType::E8m0 | ScaleType::E4m3 => 1,
        }
    }
}

/// One weight format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Format {
    /// What one code is.
    pub code: Code,
    /// What is subtracted from the code before the scale applies.
    pub zero: i32,
    /// Input columns that share a scale; 0 if there is no scale, [`Format::WHOLE_ROW`] if all do.
    pub block: usize,
    /// Output rows that share a scale (128 in block FP8, else 1).
    pub block_rows: usize,
    /// Type of the scale, if any.
    pub scale: Option<ScaleType>,
    /// Whether a minimum of the scale's type is added.
    pub min: bool,
    /// Whether one float32 scale of the whole tensor comes on top (NVFP4).
    pub tensor_scale: bool,
}

const fn plain(code: Code) -> Format {
    Format { code, zero: 0, block: 0, block_rows: 1, scale: None, min: false, tensor_scale: false }
}

const fn blocked(code: Code, zero: i32, block: usize, scale: ScaleType, min: bool) -> Format {
    Format { code, zero, block, block_rows: 1, scale: Some(scale), min, tensor_scale: false }
}

impl Format {
    /// The block of formats in which all columns of a row share a scale.
    pub const WHOLE_ROW: usize = usize::MAX;

    /// IEEE single.
    pub const F32: Format = plain(Code::F32);
    /// IEEE half.
    pub const F16: Format = plain(Code::F16);
    /// bfloat16.
    pub const BF16: Format = plain(Code::Bf16);
    /// E2M1 codes, blocks of 32, E8M0 scales (OCP MX, gpt-oss, MiMo).
    pub const MXFP4: Format = blocked(Code::E2m1, 0, 32, ScaleType::E8m0, false);
    /// E2M1 codes, blocks of 16, E4M3 scales and a float32 scale of the tensor.
    pub const NVFP4: Format =
        Format { tensor_scale: true, ..blocked(Code::E2m1, 0, 16, ScaleType::E4m3, false) };
    /// E4M3 codes, one float32 scale per 128 x 128 block.
    pub const FP8_BLOCK: Format =
        Format { block_rows: 128, ..blocked(Code::E4m3, 0, 128, ScaleType::F32, false) };
    /// E4M3 codes, one float32 scale per row and 128 columns.
    pub const FP8_1X128: Format = blocked(Code::E4m3, 0, 128, ScaleType::F32, false);
    /// E4M3 codes, one float32 scale per row ("per channel").
    pub const FP8_CHANNEL: Format = blocked(Code::E4m3, 0, Format::WHOLE_ROW, ScaleType::F32, false);
    /// GGUF Q4_0: `d * (q - 8)`, blocks of 32.
    pub const Q4_0: Format = blocked(Code::U4, 8, 32, ScaleType::F16, false);
    /// GGUF Q4_1: `d * q + m`, blocks of 32.
    pub const Q4_1: Format = blocked(Code::U4, 0, 32, ScaleType::F16, true);
    /// GGUF Q8_0: `d * q`, blocks of 32.
    pub const Q8_0: Format = blocked(Code::I8, 128, 32, ScaleType::F16, false);
    /// GGUF Q4_K with its two-level scales multiplied out: `d * q + m`, blocks of 32, float32.
    pub const Q4_K: Format = blocked(Code::U4, 0, 32, ScaleType::F32, true);
    /// GGUF Q6_K with its two-level scales multiplied out: bytes, blocks of 16, float32.
    pub const Q6_K: Format = blocked(Code::I8, 128, 16, ScaleType::F32, false);

    /// Every named format, in the order that help texts list them.
    pub const NAMED: &[(&'static str, Format)] = &[
        ("f32", Format::F32),
        ("f16", Format::F16),
        ("bf16", Format::BF16),
        ("mxfp4", Format::MXFP4),
        ("nvfp4", Format::NVFP4),
        ("fp8", Format::FP8_BLOCK),
        ("fp8_1x128", Format::FP8_1X128),
        ("fp8_channel", Format::FP8_CHANNEL),
        ("q4_0", Format::Q4_0),
        ("q4_1", Format::Q4_1),
        ("q8_0", Format::Q8_0),
        ("q4_k", Format::Q4_K),
        ("q6_k", Format::Q6_K),
    ];

    /// The format of this name, as `model.yaml` and the text forms spell it.
    pub fn by_name(name: &str) -> Option<Format> {
        Self::NAMED.iter().find(|(n, _)| *n == name).map(|(_, f)| *f)
    }

    /// The name of this format; `None` for a combination that has none.
    pub fn name(&self) -> Option<&'static str> {
        Self::NAMED.iter().find(|(_, f)| f == self).map(|(n, _)| *n)
    }

    /// Whether codes are integers (after the zero is subtracted and, for E2M1, after doubling),
    /// so that an integer dot product with 8-bit activations is exact.
    pub const fn integer_codes(&self) -> bool {
        matches!(self.code, Code::I8 | Code::U4 | Code::E2m1)
    }

    /// Bytes of `rows` x `cols` weights as stored: codes, scales and minima, without padding.
    pub const fn stored_bytes(&self, rows: usize, cols: usize) -> usize {
        let codes = (rows * cols * self.code.bits()).div_ceil(8);
        let scales = match self.scale {
            Some(scale) => {
                let blocks = rows.div_ceil(self.block_rows) * cols.div_ceil(self.block);
                blocks * scale.bytes() * if self.min { 2 } else { 1 }
            }
            None => 0,
        };
        codes + scales + if self.tensor_scale { 4 } else { 0 }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{:?}x{}", self.code, self.block),
        }
    }
}

/// How one panel of [`PANEL`] output features over all of K lies in memory: a plane of scales, a
/// plane of minima, a plane of codes, each starting on a 64-byte line.
///
/// * Scales and minima: `[k_pad / block][PANEL]`, one row a block.
/// * 32-bit and 16-bit codes: `[k_pad][PANEL]`.
/// * 8-bit codes: `[k_pad / 4][PANEL][4]`: the four columns of a dot product lie together.
/// * 4-bit codes: `[k_pad / 8][PANEL][4]` bytes; byte `j` of group `g` holds column `8g + j` in its
///   low nibble and column `8g + 4 + j` in its high nibble.
///
/// K is padded to [`ACT_BLOCK`] with codes that mean zero (for formats with a minimum the padded
/// blocks have scale and minimum 0); features past the matrix's last row are padded in the same way.
/// The float32 tensor scale of NVFP4 is multiplied into a plane of float32 scales by the packer; a scale of a
/// whole row is repeated for every 128 columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PanelLayout {
    /// Format of the codes and scales in the panel (what the kernel decodes).
    pub format: Format,
    /// Columns of the matrix.
    pub k: usize,
}

impl PanelLayout {
    /// Layout of a panel over `k` columns in `format`.
    ///
    /// Block FP8's scales are repeated per row, a row's own for every 128 columns, NVFP4's tensor scale is
    /// folded in: the layout's own format is the one that results.
    pub fn new(format: Format, k: usize) -> PanelLayout {
        let mut format = format;
        format.block_rows = 1;
        if format.block == Format::WHOLE_ROW {
            format.block = Format::FP8_BLOCK.block;
        }
        if format.tensor_scale {
            format.tensor_scale = false;
            format.scale = Some(ScaleType::F32);
        }
        PanelLayout { format, k }
    }

    /// Columns with padding.
    pub const fn k_pad(&self) -> usize {
        self.k.div_ceil(ACT_BLOCK) * ACT_BLOCK
    }

    /// Scale blocks along K, padding included.
    pub const fn blocks(&self) -> usize {
        match self.format.block {
            0 => 0,
            block => self.k_pad().div_ceil(block),
        }
    }

    /// Bytes of the plane of scales, and of that of minima if there is one.
    pub fn scale_bytes(&self) -> usize {
        let bytes = self.format.scale.map_or(0, ScaleType::bytes);
        (self.blocks() * PANEL * bytes).next_multiple_of(64)
    }

    /// Where the minima start, in bytes from the panel's start.
    pub fn min_offset(&self) -> usize {
        self.scale_bytes()
    }

    /// Where the codes start, in bytes from the panel's start.
    pub fn code_offset(&self) -> usize {
        self.scale_bytes() * if self.format.min { 2 } else { 1 }
    }

    /// Bytes of the panel, a multiple of 64.
    pub fn bytes(&self) -> usize {
        self.code_offset() + (self.k_pad() * PANEL * self.format.code.bits() / 8).next_multiple_of(64)
    }

    /// Where the code of (`lane`, `column`) lies: the byte from the panel's start and, for 4-bit
    /// codes, whether it is the high nibble.
    pub fn code_at(&self, lane: usize, column: usize) -> (usize, bool) {
        let base = self.code_offset();
        match self.format.code.bits() {
            32 => (base + (column * PANEL + lane) * 4, false),
            16 => (base + (column * PANEL + lane) * 2, false),
            8 => (base + ((column / 4) * PANEL + lane) * 4 + column % 4, false),
            _ => (base + ((column / 8) * PANEL + lane) * 4 + column % 4, column % 8 >= 4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_round_trip() {
        for (name, format) in Format::NAMED {
            assert_eq!(Format::by_name(name), Some(*format));
            assert_eq!(format.name(), Some(*name));
        }
    }

    #[test]
    fn every_code_of_a_panel_has_its_own_place() {
        for (_, format) in Format::NAMED {
            let layout = PanelLayout::new(*format, 40);
            let mut seen = std::collections::HashSet::new();
            for lane in 0..PANEL {
                for column in 0..layout.k_pad() {
                    let place = layout.code_at(lane, column);
                    assert!(place.0 >= layout.code_offset() && place.0 < layout.bytes());
                    assert!(seen.insert(place), "{format}: {lane},{column} twice");
                }
            }
        }
    }
}
