//! The block types of GGUF that are read, and turning rows of blocks into planes.

use half::f16;
use tilec_ir::convert::{ConvertError, Planes};
use tilec_ir::format::Format;

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q8_0,
    Q4K,
    Q6K,
    Mxfp4,
}

/// Types that exist, by number, with their names: a refusal should say what the file holds.
const NAMES: &[(u32, &str)] = &[
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (6, "Q5_0"),
    (7, "Q5_1"),
    (8, "Q8_0"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (30, "BF16"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl BlockType {
    /// The type of this number, or in words what is wrong with it.
    pub fn from_number(number: u32) -> Result<BlockType, String> {
        Ok(match number {
            0 => BlockType::F32,
            1 => BlockType::F16,
            2 => BlockType::Q4_0,
            3 => BlockType::Q4_1,
            8 => BlockType::Q8_0,
            12 => BlockType::Q4K,
            14 => BlockType::Q6K,
            30 => BlockType::Bf16,
            39 => BlockType::Mxfp4,
            _ => {
                let name = NAMES.iter().find(|(n, _)| *n == number).map_or("unknown", |(_, name)| name);
                return Err(format!("it is stored as {name} (type {number}), which is not supported"));
            }
        })
    }

    /// The format of the planes that its blocks become.
    pub fn format(self) -> Format {
        match self {
            BlockType::F32 => Format::F32,
            BlockType::F16 => Format::F16,
            BlockType::Bf16 => Format::BF16,
            BlockType::Q4_0 => Format::Q4_0,
            BlockType::Q4_1 => Format::Q4_1,
            BlockType::Q8_0 => Format::Q8_0,
            BlockType::Q4K => Format::Q4_K,
            BlockType::Q6K => Format::Q6_K,
            BlockType::Mxfp4 => Format::MXFP4,
        }
    }

    /// Elements and bytes of a block.
    pub fn size(self) -> (usize, usize) {
        match self {
            BlockType::F32 => (1, 4),
            BlockType::F16 | BlockType::Bf16 => (1, 2),
            BlockType::Q4_0 => (32, 18),
            BlockType::Q4_1 => (32, 20),
            BlockType::Q8_0 => (32, 34),
            BlockType::Q4K => (256, 144),
            BlockType::Q6K => (256, 210),
            BlockType::Mxfp4 => (32, 17),
        }
    }

    /// Bytes of a row; `cols` is a multiple of the block.
    pub fn row_bytes(self, cols: usize) -> usize {
        let (elements, bytes) = self.size();
        cols / elements * bytes
    }

    /// Planes of rows of blocks, `cols` elements each.
    pub fn planes<'a>(
        self,
        cols: usize,
        rows: impl ExactSizeIterator<Item = &'a [u8]>,
    ) -> Result<Planes, ConvertError> {
        let format = self.format();
        let mut planes = Planes::zeroed(format, rows.len(), cols)?;
        let row_codes = cols * format.code.bits() / 8;
        let row_scales = planes.scales.len().checked_div(rows.len()).unwrap_or(0);
        for (index, row) in rows.enumerate() {
            let codes = &mut planes.codes[index * row_codes..][..row_codes];
            let scales = &mut planes.scales[index * row_scales..][..row_scales];
            let mins = match format.min {
                true => &mut planes.mins[index * row_scales..][..row_scales],
                false => &mut [],
            };
            self.row(row, codes, scales, mins);
        }
        Ok(planes)
    }

    fn row(self, row: &[u8], codes: &mut [u8], scales: &mut [u8], mins: &mut [u8]) {
        match self {
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => codes.copy_from_slice(row),
            BlockType::Q4_0 => nibbles::<18, 2>(row, codes, scales),
            BlockType::Mxfp4 => nibbles::<17, 1>(row, codes, scales),
            BlockType::Q4_1 => {
                let (blocks, _) = row.as_chunks::<20>();
                let (out, _) = codes.as_chunks_mut::<16>();
                let planes = scales.chunks_exact_mut(2).zip(mins.chunks_exact_mut(2));
                for ((block, codes), (scale, min)) in blocks.iter().zip(out).zip(planes) {
                    scale.copy_from_slice(&block[..2]);
                    min.copy_from_slice(&block[2..4]);
                    in_order(&block[4..], codes);
                }
            }
            BlockType::Q8_0 => {
                let (blocks, _) = row.as_chunks::<34>();
                let (out, _) = codes.as_chunks_mut::<32>();
                for ((block, codes), scale) in blocks.iter().zip(out).zip(scales.chunks_exact_mut(2)) {
                    scale.copy_from_slice(&block[..2]);
                    for (code, byte) in codes.iter_mut().zip(&block[2..]) {
                        *code = byte ^ 0x80;
                    }
                }
            }
            BlockType::Q4K => {
                let (blocks, _) = row.as_chunks::<144>();
                let planes = scales.chunks_exact_mut(32).zip(mins.chunks_exact_mut(32));
                for ((block, codes), (scales, mins)) in
                    blocks.iter().zip(codes.chunks_exact_mut(128)).zip(planes)
                {
                    q4_k(block, codes, scales, mins);
                }
            }
            BlockType::Q6K => {
                let (blocks, _) = row.as_chunks::<210>();
                let planes = codes.chunks_exact_mut(256).zip(scales.chunks_exact_mut(64));
                for (block, (codes, scales)) in blocks.iter().zip(planes) {
                    q6_k(block, codes, scales);
                }
            }
        }
    }
}

/// Blocks of a scale of `SCALE` bytes and 32 nibbles.
fn nibbles<const BLOCK: usize, const SCALE: usize>(row: &[u8], codes: &mut [u8], scales: &mut [u8]) {
    let (blocks, _) = row.as_chunks::<BLOCK>();
    let (out, _) = codes.as_chunks_mut::<16>();
    for ((block, codes), scale) in blocks.iter().zip(out).zip(scales.chunks_exact_mut(SCALE)) {
        scale.copy_from_slice(&block[..SCALE]);
        in_order(&block[SCALE..], codes);
    }
}

/// Sixteen bytes whose low nibbles are columns 0 to 15 and high nibbles 16 to 31, to column order.
#[inline]
fn in_order(bytes: &[u8], out: &mut [u8; 16]) {
    for (i, pair) in bytes.chunks_exact(2).take(8).enumerate() {
        out[i] = (pair[0] & 15) | (pair[1] << 4);
        out[8 + i] = (pair[0] >> 4) | (pair[1] & 0xf0);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// `d`, `dmin` (halves), 12 bytes with eight 6-bit scales and minima, 128 bytes of nibbles: 64 columns
/// in 32 bytes, the first 32 in the low nibbles. The weight is `d * scale * q - dmin * min`.
fn q4_k(block: &[u8; 144], codes: &mut [u8], scales: &mut [u8], mins: &mut [u8]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    let (scales, _) = scales.as_chunks_mut::<4>();
    let (mins, _) = mins.as_chunks_mut::<4>();
    for (j, (scale_out, min_out)) in scales.iter_mut().zip(mins).enumerate() {
        let (scale, min) = if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            // The upper two bits lie above the six of scale and minimum j - 4.
            let low = packed[j + 4];
            ((low & 15) | ((packed[j - 4] >> 6) << 4), (low >> 4) | ((packed[j] >> 6) << 4))
        };
        *scale_out = (d * f32::from(scale)).to_le_bytes();
        *min_out = (-(dmin * f32::from(min))).to_le_bytes();
    }
    for (bytes, out) in block[16..].chunks_exact(32).zip(codes.chunks_exact_mut(32)) {
        let (first, second) = out.split_at_mut(16);
        for (i, pair) in bytes.chunks_exact(2).enumerate() {
            first[i] = (pair[0] & 15) | (pair[1] << 4);
            second[i] = (pair[0] >> 4) | (pair[1] & 0xf0);
        }
    }
}

/// 128 bytes of lower nibbles, 64 of upper bit pairs, 16 signed scales, `d` (half). The weight is
/// `d * scale * (q - 32)`; the code kept is `q - 32` as a biased byte.
fn q6_k(block: &[u8; 210], codes: &mut [u8], scales: &mut [u8]) {
    const BIAS: u8 = 128 - 32;
    let d = half_at(block, 208);
    for (scale, out) in block[192..208].iter().zip(scales.chunks_exact_mut(4)) {
        out.copy_from_slice(&(d * f32::from(*scale as i8)).to_le_bytes());
    }
    for (half, codes) in codes.chunks_exact_mut(128).enumerate() {
        let low = &block[half * 64..][..64];
        let high = &block[128 + half * 32..][..32];
        for i in 0..32 {
            let (a, b, h) = (low[i], low[i + 32], high[i]);
            codes[i] = ((a & 15) | ((h & 3) << 4)) + BIAS;
            codes[i + 32] = ((b & 15) | (((h >> 2) & 3) << 4)) + BIAS;
            codes[i + 64] = ((a >> 4) | (((h >> 4) & 3) << 4)) + BIAS;
            codes[i + 96] = ((b >> 4) | ((h >> 6) << 4)) + BIAS;
        }
    }
}
