//! Octets: the layout in which weights stream to the tensor cores, 8 features at a time.
//!
//! An octet is its blocks one behind the other. A block holds 64 bytes of consecutive columns of each of
//! its 8 features, feature by feature; lane `4f + q` of a warp loads the 16 bytes `q` of feature `f`.
//! Columns past the last and features past a matrix's last row are zero.
//!
//! Halves lie in the order of their columns. Of codes only the words do: those of a word lie where few
//! instructions make bfloat16 of them.
//!
//! A word of FP8 is 4 columns. In each 16-bit half of it (the even columns in the lower, the odd ones in the upper
//! half), with the sign `s` and the magnitude `eeeemmm` of a code:
//!
//! | bit | 15 | 14 13 12 | 11 | 10 to 4 | 3 2 1 0 |
//! | --- | --- | --- | --- | --- | --- |
//! | columns 0 and 1 | s | | | eeeemmm | |
//! | columns 2 and 3 | | eee | s | | emmm |
//!
//! Masked, columns 0 and 1 are bfloat16 that are `2^120` times too small. Columns 2 and 3 are put together of two
//! shifts by 4 bits, one to the left and one to the right.
//!
//! Of MXFP4 a lane's 16 bytes are 32 columns, one scale's, as 4 words of 8 columns. In each 16-bit half of a word
//! likewise, with the sign `s` and the magnitude `eem` of a code:
//!
//! | bit | 15 | 14 13 12 | 11 10 | 9 | 8 7 6 | 5 | 4 3 | 2 1 0 |
//! | --- | --- | --- | --- | --- | --- | --- | --- | --- |
//! | columns 0 and 1 | s | | | | eem | | | |
//! | columns 2 and 3 | | | | s | | | | eem |
//! | columns 4 and 5 | | eem | | | | s' | | |
//! | columns 6 and 7 | | | x | | | | x | |
//!
//! Brought to where columns 0 and 1 are, by a shift of 6 bits to the left or a turn of 6 to the right, and masked, a code is a
//! bfloat16 that is `2^126` times too small. `s'` is of the other half, since the whole word is turned. The places of four codes
//! that one turn each brings there do not fit a half, so the last columns of two words (`x`) are put together: bits 3, 4, 10 and
//! 11 of the first one, and those of the second two bits further to the left. Of what comes out
//!
//! | bit | 13 | 12 11 10 | 6 5 4 | 3 |
//! | --- | --- | --- | --- | --- |
//! | columns 6 and 7 of the first | s | | eem | |
//! | columns 6 and 7 of the second | | eem | | s' |
//!
//! the former are shifted by 2 bits to the left, the latter turned by 4 to the right. In all that is 16 instructions for 16 columns, where a word by itself
//! needs 11 for 8 at least.
//! The lanes' scales follow the codes of a block, a byte each, as the exponent of the bfloat16 that makes up
//! for it but for `2^64`, which a kernel multiplies into its sums: no product leaves the range of bfloat16.
//!
//! NVFP4 has the same words. A lane's 32 columns have two scales, two bytes that follow the codes of a block, lane by
//! lane: five bits of exponent and three of mantissa, `(1 + mmm / 8) * 2^(eeeee - 9)`, which holds every E4M3 scale
//! (the subnormal ones as normal numbers). Four bits lower in a bfloat16 and with an exponent added, this is the scale
//! times `2^62`. A code has two significant bits and a scale four, so that their product is a bfloat16. A scale that is
//! negative has the signs of its codes turned over; that of the tensor lies apart.
//!
//! Octets may lie in bands, several of them block by block: the first blocks of all, then all second ones. So what the
//! products with some columns need of many features is one piece of memory.
//!
//! Scales of FP8 lie apart ([`apart_scales`]): of block FP8 one for each octet and 128 columns, of formats with one
//! scale a row, and of the tensor's of NVFP4, one for each feature. With scales for each row and 128 columns, those of
//! the 8 features follow the codes of a block as float32.

use crate::convert::PlaneView;
use crate::format::{Code, Format};
use crate::launch::{OCTET, OCTET_BLOCK};
use crate::pack::FP8_COLUMNS;

/// Bytes of a feature in a block.
const PIECE: usize = OCTET_BLOCK / OCTET;

/// Columns that share a scale of MXFP4.
const MX_COLUMNS: usize = Format::MXFP4.block;

/// Columns of a row that a lane has of a block of FP4.
const LANE_COLUMNS: usize = 32;

/// Scales of MXFP4, as their stored bytes, with which every code is a normal bfloat16: 2^-60 to 2^65.
pub const MX_SCALES: std::ops::RangeInclusive<u8> = 67..=192;

/// What is added to the byte of a scale: it counts from 127, and `126 - 64` has to be made up for.
const MX_EXPONENT: u8 = 62;

/// Blocks of an octet of `k` columns: a block holds 64 bytes of each of its features.
pub const fn octet_blocks(format: Format, k: usize) -> usize {
    k.div_ceil(PIECE * 8 / format.code.bits())
}

/// Bytes of the scales that lie in a block.
pub const fn octet_block_scales(format: Format) -> usize {
    match (format.code, format.block, format.block_rows) {
        (Code::E2m1, block, _) => OCTET * PIECE * 2 / block,
        (Code::E4m3, FP8_COLUMNS, 1) => OCTET * 4,
        _ => 0,
    }
}

/// Bytes of a block, with the scales that lie in it.
pub const fn octet_block_bytes(format: Format) -> usize {
    OCTET_BLOCK + octet_block_scales(format)
}

/// Float32 scales of an octet of `k` columns that lie apart from its codes: of block FP8 one for every 128 columns, of
/// fp8_channel and NVFP4 one for each feature.
pub const fn apart_scales(format: Format, k: usize) -> usize {
    match (format.code, format.block_rows) {
        _ if format.tensor_scale => OCTET,
        (Code::E4m3, 1) if format.block == Format::WHOLE_ROW => OCTET,
        (Code::E4m3, 1) => 0,
        (Code::E4m3, _) => k.div_ceil(FP8_COLUMNS),
        _ => 0,
    }
}

/// Whether the scales that lie apart are the features', so that sums are multiplied by them.
pub const fn feature_scales(format: Format) -> bool {
    apart_scales(format, 0) == OCTET
}

/// Where a block of an octet of so many lies, counted in blocks, if `band` octets are a band.
pub const fn band_place(band: usize, blocks: usize, octet: usize, block: usize) -> usize {
    (octet / band * blocks + block) * band + octet % band
}

/// Bytes of an octet of `k` columns, or `None` if they cannot be counted.
pub fn octet_bytes(format: Format, k: usize) -> Option<usize> {
    octet_blocks(format, k).checked_mul(octet_block_bytes(format))
}

/// Why rows of FP4 cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the scale of row {row}, columns {column} and on is {}", scale_text(*.format, *.byte))]
pub struct ScaleError {
    /// Row of those given.
    pub row: usize,
    /// First column of the block.
    pub column: usize,
    /// The scale as it is stored.
    pub byte: u8,
    /// Format of the rows.
    pub format: Format,
}

fn scale_text(format: Format, byte: u8) -> String {
    match byte {
        _ if format == Format::NVFP4 => "NaN".into(),
        255 => "NaN".into(),
        _ => format!("2^{}; the kernel has scales from 2^-60 to 2^65", i32::from(byte) - 127),
    }
}

/// The columns 2i and 2i + 1, a byte of codes as they are stored, in their places in two words; by i of 8.
const PLACES: [[u64; 256]; 8] = {
    const SECOND: u32 = 32; // bits from a word to the next
    const fn place(pair: usize, half: u32, code: u64) -> u64 {
        let (sign, magnitude) = (code >> 3, code & 7);
        // The word, this half of it, and the other half.
        let (word, own, other) = (pair as u32 / 4 * SECOND, half * 16, (1 - half) * 16);
        match pair {
            0 | 4 => (sign << 15 | magnitude << 6) << (word + own),
            1 | 5 => (sign << 9 | magnitude) << (word + own),
            2 | 6 => magnitude << (word + own + 12) | sign << (word + other + 5),
            // 13 and 6 to 4 of both words together.
            3 => (magnitude & 1) << (own + 4) | (magnitude >> 1 << 3 | sign << 11) << (SECOND + own),
            // 12 to 10, and 3 of the other half.
            _ => {
                (magnitude & 3) << (own + 10) | (magnitude >> 2) << (SECOND + own + 10) | sign << (other + 3)
            }
        }
    }
    let mut tables = [[0; 256]; 8];
    let mut pair = 0;
    while pair < 8 {
        let mut byte = 0;
        while byte < 256 {
            tables[pair][byte] = place(pair, 0, byte as u64 & 15) | place(pair, 1, byte as u64 >> 4);
            byte += 1;
        }
        pair += 1;
    }
    tables
};

/// The word of four codes of FP8, the first in the lowest byte.
pub const fn lay_fp8(codes: u32) -> u32 {
    const fn place(first: u32, second: u32) -> u32 {
        (first & 0x80) << 8
            | (first & 0x7f) << 4
            | (second & 0x80) << 4
            | (second & 0x70) << 8
            | second & 0x0f
    }
    let [a, b, c, d] = codes.to_le_bytes();
    place(a as u32, c as u32) | place(b as u32, d as u32) << 16
}

/// The byte of a scale of NVFP4: the E4M3 number without its sign, in five bits of exponent and three of mantissa.
/// `None` if it is zero or NaN.
const fn nv_scale(code: u8) -> Option<u8> {
    match code & 0x7f {
        0 | 0x7f => None,
        // Units of 2^-9: the highest bit becomes the implicit one.
        subnormal @ 1..8 => {
            let exponent = subnormal.ilog2() as u8;
            Some(exponent << 3 | (subnormal << (3 - exponent)) & 7)
        }
        // Exponents count from 7 there and from 9 here.
        normal => Some(normal + (2 << 3)),
    }
}

/// The codes of lane `lane` in block `number`: its row, its first column, and 32 codes, zeros where there are none.
fn lane_codes(rows: &PlaneView<'_>, number: usize, lane: usize) -> (usize, usize, [u8; 16]) {
    let (row, column) = (lane / 4, number * PIECE * 2 + lane % 4 * LANE_COLUMNS);
    let (k, mut from) = (rows.cols(), [0; 16]);
    if row < rows.rows() && column < k {
        let stored = &rows.row_codes(row)[column / 2..];
        let count = stored.len().min(16);
        from[..count].copy_from_slice(&stored[..count]);
        if k % 2 == 1 && column + LANE_COLUMNS > k {
            from[count - 1] &= 0x0f;
        }
    }
    (row, column, from)
}

/// Puts a lane's codes of FP4 where they belong in its words.
fn place_codes(from: [u8; 16], to: &mut [u8; 16]) {
    for (words, bytes) in to.as_chunks_mut::<8>().0.iter_mut().zip(from.as_chunks::<8>().0) {
        let places = PLACES.iter().zip(bytes);
        let all = places.fold(0, |words, (places, byte)| words | places[usize::from(*byte)]);
        *words = all.to_le_bytes();
    }
}

/// Lays up to 8 rows of MXFP4 out as an octet, `out`, all of which is written.
///
/// # Errors
/// A scale of a block that is not all zeros is NaN or outside of [`MX_SCALES`].
///
/// # Panics
/// If the rows are not MXFP4, are more than 8, or `out` has another size than their octet.
pub fn lay_mxfp4(rows: &PlaneView<'_>, out: &mut [u8]) -> Result<(), ScaleError> {
    assert!(rows.format() == Format::MXFP4 && rows.rows() <= OCTET);
    assert_eq!(Some(out.len()), octet_bytes(Format::MXFP4, rows.cols()));
    for (number, block) in out.chunks_exact_mut(octet_block_bytes(Format::MXFP4)).enumerate() {
        let (codes, scales) = block.split_at_mut(OCTET_BLOCK);
        for (lane, (to, scale)) in codes.as_chunks_mut::<16>().0.iter_mut().zip(scales).enumerate() {
            let (row, column, from) = lane_codes(rows, number, lane);
            *scale = 127;
            // A block of zeros may have any scale.
            if from.iter().any(|codes| codes & 0x77 != 0) {
                let byte = rows.row_scales(rows.scales(), row)[column / MX_COLUMNS];
                if !MX_SCALES.contains(&byte) {
                    return Err(ScaleError { row, column, byte, format: Format::MXFP4 });
                }
                *scale = byte + MX_EXPONENT;
            }
            place_codes(from, to);
        }
    }
    Ok(())
}

/// Lays up to 8 rows of NVFP4 out as an octet, `out`, all of which is written. The scale of the tensor is left out.
///
/// # Errors
/// A scale of a block that is not all zeros is NaN.
///
/// # Panics
/// If the rows are not NVFP4, are more than 8, or `out` has another size than their octet.
pub fn lay_nvfp4(rows: &PlaneView<'_>, out: &mut [u8]) -> Result<(), ScaleError> {
    const BLOCK: usize = Format::NVFP4.block;
    assert!(rows.format() == Format::NVFP4 && rows.rows() <= OCTET);
    assert_eq!(Some(out.len()), octet_bytes(Format::NVFP4, rows.cols()));
    for (number, block) in out.chunks_exact_mut(octet_block_bytes(Format::NVFP4)).enumerate() {
        let (codes, scales) = block.split_at_mut(OCTET_BLOCK);
        let scales = scales.as_chunks_mut::<2>().0;
        for (lane, (to, pair)) in codes.as_chunks_mut::<16>().0.iter_mut().zip(scales).enumerate() {
            let (row, column, mut from) = lane_codes(rows, number, lane);
            for (half, (scale, from)) in pair.iter_mut().zip(from.as_chunks_mut::<8>().0).enumerate() {
                *scale = 0;
                // A block of zeros may have any scale.
                if from.iter().all(|codes| codes & 0x77 == 0) {
                    continue;
                }
                let column = column + half * BLOCK;
                let byte = rows.row_scales(rows.scales(), row)[column / BLOCK];
                let turn = if byte & 0x80 == 0 { 0 } else { 0x88 };
                match nv_scale(byte) {
                    Some(normal) => {
                        *scale = normal;
                        from.iter_mut().for_each(|codes| *codes ^= turn);
                    }
                    // Whatever the codes are.
                    None if byte & 0x7f == 0 => from.fill(0),
                    None => return Err(ScaleError { row, column, byte, format: Format::NVFP4 }),
                }
            }
            place_codes(from, to);
        }
    }
    Ok(())
}

/// Lays up to 8 rows of FP8 out as an octet, `out`, all of which is written: the codes, and of fp8_1x128 the scales.
///
/// # Panics
/// If the rows are not FP8, are more than 8, or `out` has another size than their octet.
pub fn lay_fp8_rows(rows: &PlaneView<'_>, out: &mut [u8]) {
    let (format, k) = (rows.format(), rows.cols());
    assert!(format.code == Code::E4m3 && rows.rows() <= OCTET);
    assert_eq!(Some(out.len()), octet_bytes(format, k));
    for (number, block) in out.chunks_exact_mut(octet_block_bytes(format)).enumerate() {
        let (codes, scales) = block.split_at_mut(OCTET_BLOCK);
        let first = number * PIECE;
        for (row, piece) in codes.as_chunks_mut::<PIECE>().0.iter_mut().enumerate() {
            *piece = [0; PIECE];
            if row < rows.rows() {
                let count = PIECE.min(k - first);
                piece[..count].copy_from_slice(&rows.row_codes(row)[first..first + count]);
            }
            for word in piece.as_chunks_mut::<4>().0 {
                *word = lay_fp8(u32::from_le_bytes(*word)).to_le_bytes();
            }
        }
        for (row, scale) in scales.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *scale = [0; 4];
            if row < rows.rows() {
                let all = rows.row_scales(rows.scales(), row);
                scale.copy_from_slice(&all[first / FP8_COLUMNS * 4..][..4]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::{Planes, e2m1_to_f32, e4m3_to_f32};
    use half::bf16;

    /// What a kernel makes of two of a lane's words, but for their scale: 8 pairs of bfloat16.
    fn pairs(words: &[u8]) -> [u32; 8] {
        const MASK: u32 = 0x81c0_81c0;
        const FIRST: u32 = 0x0c18_0c18;
        let [first, second] = [0, 4].map(|at| u32::from_le_bytes(words[at..][..4].try_into().unwrap()));
        let rest = (first & FIRST) | (second << 2 & !FIRST);
        let own = |word: u32| [word, word << 6, word.rotate_right(6)];
        let ([a, b, c], [d, e, f]) = (own(first), own(second));
        [a, b, c, rest << 2, d, e, f, rest.rotate_right(4)].map(|bits| bits & MASK)
    }

    /// The same, with it: 16 bfloat16 numbers, in the order of their columns.
    fn unfold(words: &[u8], scale: u8) -> [f32; 16] {
        let pairs = pairs(words);
        let factor = bf16::from_bits(u16::from(scale) << 7).to_f32();
        let number = |half: u32| {
            let exact = bf16::from_bits(half as u16).to_f32() * factor;
            let rounded = bf16::from_f32(exact);
            assert!(rounded.to_f32() == exact && rounded.is_finite(), "{half:#x} times {factor}");
            rounded.to_f32() * 2f32.powi(64)
        };
        std::array::from_fn(|column| number(pairs[column / 2] >> (column % 2 * 16) & 0xffff))
    }

    #[test]
    fn every_code_of_fp8_comes_back() {
        for code in 0..=255u8 {
            for place in 0..4 {
                // Neighbours that have none of its bits, and all of them.
                let codes: [u8; 4] = std::array::from_fn(|i| if i == place { code } else { !code });
                let word = lay_fp8(u32::from_le_bytes(codes));
                // What a kernel makes of it.
                let first = word & 0x87f0_87f0;
                let second = (word << 4 & 0x80f0_80f0) | (word >> 4 & 0x0700_0700);
                let half = [first, second][place / 2] >> (place % 2 * 16) & 0xffff;
                assert_eq!(
                    half,
                    u32::from(code & 0x80) << 8 | u32::from(code & 0x7f) << 4,
                    "{code:#x} at {place}"
                );
            }
        }
    }

    #[test]
    fn every_code_with_every_scale_comes_back() {
        for scale in MX_SCALES {
            // 8 rows of 64 columns, all codes at all places of two words.
            let mut planes = Planes::zeroed(Format::MXFP4, OCTET, 64).unwrap();
            for (at, byte) in planes.codes.iter_mut().enumerate() {
                let code = |column: usize| (column * 5 + at / 8) % 16;
                *byte = (code(at * 2) | code(at * 2 + 1) << 4) as u8;
            }
            planes.scales.fill(scale);
            let mut out = vec![0xee; octet_bytes(Format::MXFP4, 64).unwrap()];
            lay_mxfp4(&planes.view(), &mut out).unwrap();
            let mut seen = [[false; 16]; 16];
            for row in 0..OCTET {
                for column in 0..128 {
                    let lane = row * 4 + column / 32;
                    let words = &out[lane * 16 + column % 32 / 16 * 8..][..8];
                    let found = unfold(words, out[OCTET_BLOCK + lane])[column % 16];
                    if column >= 64 {
                        assert_eq!(found, 0.0);
                        continue;
                    }
                    let code = planes.codes[row * 32 + column / 2] >> (column % 2 * 4) & 15;
                    let wanted = e2m1_to_f32(code) * 2f32.powi(i32::from(scale) - 127);
                    assert_eq!(found.to_bits(), wanted.to_bits(), "{row}, {column}: code {code}, 2^{scale}");
                    seen[column % 16][usize::from(code)] = true;
                }
            }
            assert!(seen.iter().flatten().all(|seen| *seen));
        }
    }

    #[test]
    fn scales_that_do_not_fit_are_refused_unless_nothing_has_them() {
        for (byte, fits) in [(0, false), (66, false), (67, true), (192, true), (193, false), (255, false)] {
            let mut planes = Planes::zeroed(Format::MXFP4, 3, 40).unwrap();
            planes.scales.fill(127);
            planes.scales[3] = byte;
            let mut out = vec![0; octet_bytes(Format::MXFP4, 40).unwrap()];
            // Zeros, one of them negative.
            planes.codes[36] = 0x80;
            assert_eq!(lay_mxfp4(&planes.view(), &mut out), Ok(()));
            planes.codes[38] = 0x30;
            let wanted = if fits {
                Ok(())
            } else {
                Err(ScaleError { row: 1, column: 32, byte, format: Format::MXFP4 })
            };
            assert_eq!(lay_mxfp4(&planes.view(), &mut out), wanted);
        }
        let error = ScaleError { row: 1, column: 32, byte: 193, format: Format::MXFP4 }.to_string();
        assert!(error.contains("row 1, columns 32 and on is 2^66"), "{error}");
        assert!(
            ScaleError { row: 0, column: 0, byte: 255, format: Format::MXFP4 }
                .to_string()
                .ends_with("is NaN")
        );
    }

    #[test]
    fn rows_of_odd_lengths_end_in_zeros() {
        for k in [1, 31, 33, 127, 129] {
            let mut planes = Planes::zeroed(Format::MXFP4, 1, k).unwrap();
            planes.codes.fill(0x22);
            planes.scales.fill(127);
            let mut out = vec![0xee; octet_bytes(Format::MXFP4, k).unwrap()];
            lay_mxfp4(&planes.view(), &mut out).unwrap();
            let mut ones = 0;
            for block in out.chunks_exact(octet_block_bytes(Format::MXFP4)) {
                for (lane, scale) in block[OCTET_BLOCK..].iter().enumerate() {
                    for words in block[lane * 16..][..16].as_chunks::<8>().0 {
                        let values = unfold(words, *scale);
                        ones += values.iter().filter(|value| **value == 1.0).count();
                        assert!(values.iter().all(|value| [0.0, 1.0].contains(value)));
                    }
                }
            }
            assert_eq!(ones, k);
        }
    }

    /// What a kernel makes of a scale of NVFP4: a bfloat16 that is the scale times 2^62.
    fn nv_factor(scale: u8) -> bf16 {
        let pair = u32::from(scale) * 0x0010_0010 + 0x5a00_5a00;
        assert_eq!(pair >> 16, pair & 0xffff);
        bf16::from_bits(pair as u16)
    }

    #[test]
    fn every_code_of_nvfp4_with_every_scale_comes_back() {
        // 8 rows of 64 columns: 32 scales of 16 columns at a time, and all codes with each.
        for first in (0..256usize).step_by(32) {
            let mut planes = Planes::zeroed(Format::NVFP4, OCTET, 64).unwrap();
            for (at, byte) in planes.codes.iter_mut().enumerate() {
                let code = |column: usize| (column * 5 + at / 8) % 16;
                *byte = (code(at * 2) | code(at * 2 + 1) << 4) as u8;
            }
            for (at, scale) in planes.scales.iter_mut().enumerate() {
                // NaN has a test of its own.
                *scale = (first + at) as u8;
                if *scale & 0x7f == 0x7f {
                    *scale = 0x31;
                }
            }
            let mut out = vec![0xee; octet_bytes(Format::NVFP4, 64).unwrap()];
            lay_nvfp4(&planes.view(), &mut out).unwrap();
            for row in 0..OCTET {
                for column in 0..128 {
                    let lane = row * 4 + column / 32;
                    let words = &out[lane * 16 + column % 32 / 16 * 8..][..8];
                    // The bits of the code, less all of its scale but the exponents.
                    let (pair, half) = (column % 16 / 2, column % 2 * 16);
                    let bits = pairs(words)[pair];
                    let code = bf16::from_bits((bits >> half) as u16).to_f32();
                    let factor = nv_factor(out[OCTET_BLOCK + lane * 2 + column % 32 / 16]).to_f32();
                    let product = f64::from(code) * f64::from(factor);
                    let rounded = bf16::from_f64(product);
                    assert!(rounded.to_f64() == product, "{code} times {factor} is no bfloat16");
                    let wanted = if column < 64 {
                        let code = planes.codes[row * 32 + column / 2] >> (column % 2 * 4) & 15;
                        e2m1_to_f32(code) * e4m3_to_f32(planes.scales[row * 4 + column / 16])
                    } else {
                        0.0
                    };
                    assert_eq!(rounded.to_f64() * 2f64.powi(64), f64::from(wanted), "{row}, {column}");
                }
            }
        }
    }

    #[test]
    fn scales_of_nvfp4_that_are_nan_are_refused_unless_nothing_has_them() {
        for nan in [0x7f, 0xff] {
            let mut planes = Planes::zeroed(Format::NVFP4, 3, 40).unwrap();
            planes.scales[3 + 2] = nan;
            let mut out = vec![0; octet_bytes(Format::NVFP4, 40).unwrap()];
            planes.codes[36] = 0x80;
            assert_eq!(lay_nvfp4(&planes.view(), &mut out), Ok(()));
            planes.codes[36] = 0x20;
            let error = ScaleError { row: 1, column: 32, byte: nan, format: Format::NVFP4 };
            assert_eq!(lay_nvfp4(&planes.view(), &mut out), Err(error));
            assert!(error.to_string().contains("row 1, columns 32 and on is NaN"), "{error}");
        }
    }

    #[test]
    fn rows_of_fp8_have_their_scales_behind_the_codes_of_a_block() {
        for (rows, k) in [(8, 256), (3, 130), (8, 1), (5, 64), (8, 191)] {
            let mut planes = Planes::zeroed(Format::FP8_1X128, rows, k).unwrap();
            for (at, code) in planes.codes.iter_mut().enumerate() {
                *code = (at * 7 % 127) as u8 | (at as u8 & 1) << 7;
            }
            for (at, scale) in planes.scales.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                *scale = (at as f32 + 1.5).to_le_bytes();
            }
            let mut out = vec![0xee; octet_bytes(Format::FP8_1X128, k).unwrap()];
            lay_fp8_rows(&planes.view(), &mut out);
            let scale_row = k.div_ceil(128);
            for (number, block) in out.chunks_exact(octet_block_bytes(Format::FP8_1X128)).enumerate() {
                for row in 0..OCTET {
                    let scale = f32::from_le_bytes(block[OCTET_BLOCK + row * 4..][..4].try_into().unwrap());
                    let wanted = if row < rows { (row * scale_row + number / 2) as f32 + 1.5 } else { 0.0 };
                    assert_eq!(scale, wanted);
                    for (at, word) in block[row * PIECE..][..PIECE].as_chunks::<4>().0.iter().enumerate() {
                        let code = |i: usize| {
                            let column = number * PIECE + at * 4 + i;
                            if row < rows && column < k { planes.codes[row * k + column] } else { 0 }
                        };
                        let codes = u32::from_le_bytes(std::array::from_fn(code));
                        assert_eq!(u32::from_le_bytes(*word), lay_fp8(codes));
                    }
                }
            }
        }
    }
}
