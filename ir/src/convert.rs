//! Conversion between float32 and every weight format: exact decoding of codes and scales,
//! quantization, and the packing of rows into panels.
//!
//! Everything here is exact or rounds to nearest, ties to even, so that two machines that convert the
//! same weights get the same bytes.

use crate::format::{Code, Format, PANEL, PanelLayout, ScaleType};
use half::{bf16, f16};
use std::ops::Range;

/// Largest finite E4M3 value.
pub const E4M3_MAX: f32 = 448.0;

/// Largest E2M1 value.
pub const E2M1_MAX: f32 = 6.0;

/// Why a conversion was refused.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ConvertError {
    /// A plane does not have the size that shape and format ask for.
    #[error("the plane of {plane} has {found} bytes where {rows} x {cols} in {format} needs {expected}")]
    PlaneSize {
        /// "codes", "scales", "minima", "values" or "panel".
        plane: &'static str,
        /// Bytes (elements for "values") needed.
        expected: usize,
        /// Bytes given.
        found: usize,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Format of the matrix.
        format: Format,
    },
    /// A size overflows.
    #[error("{rows} x {cols} weights in {format} overflow the address space")]
    Overflow {
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Format of the matrix.
        format: Format,
    },
    /// A weight to be quantized is NaN or infinite.
    #[error("the weight in row {row}, column {col} is {value}, which no block format can hold")]
    NotFinite {
        /// Row of the weight.
        row: usize,
        /// Column of the weight.
        col: usize,
        /// The weight.
        value: f32,
    },
    /// Integer codes without a scale, or full floats with one.
    #[error("weights cannot be quantized to {format}: codes need a scale, and plain floats have none")]
    Unsupported {
        /// The format.
        format: Format,
    },
    /// Rows and panel are not of the same kind.
    #[error("rows of {rows} x {cols} in {format} do not fit a panel of k = {k} in {panel}")]
    PanelMismatch {
        /// Rows given.
        rows: usize,
        /// Columns given.
        cols: usize,
        /// Format given.
        format: Format,
        /// Columns of the panel.
        k: usize,
        /// Format of the panel.
        panel: Format,
    },
}

/// The integer nearest to `x`, ties to even, for magnitudes up to 2^22. (The addition leaves no room for
/// a fraction; unlike a call to round, it runs in vectors everywhere.)
#[inline]
fn nearest_integer(x: f32) -> i32 {
    const ROOM: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + ROOM).to_bits() as i32 - ROOM.to_bits() as i32
}

/// The value of an E2M1 code (bits 0 to 3 of `code`).
pub const fn e2m1_to_f32(code: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[(code & 7) as usize];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The E2M1 code nearest to `x`, ties to even; magnitudes above 6 become 6, NaN becomes 0.
pub fn f32_to_e2m1(x: f32) -> u8 {
    let a = x.abs();
    // One comparison per midpoint between neighbours; `>=` where the upper code is the even one.
    let code = (a > 0.25) as u8
        + (a >= 0.75) as u8
        + (a > 1.25) as u8
        + (a >= 1.75) as u8
        + (a > 2.5) as u8
        + (a >= 3.5) as u8
        + (a > 5.0) as u8;
    code | if x.is_sign_negative() { 8 } else { 0 }
}

/// The value of an E4M3 code; 0x7f and 0xff are NaN.
pub const fn e4m3_to_f32(code: u8) -> f32 {
    let magnitude = code & 0x7f;
    let value = if magnitude == 0x7f {
        f32::NAN
    } else if magnitude < 8 {
        // Subnormal: units of 2^-9.
        magnitude as f32 * (1.0 / 512.0)
    } else {
        f32::from_bits(((magnitude as u32) << 20) + ((127 - 7) << 23))
    };
    if code & 0x80 == 0 { value } else { -value }
}

static E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = e4m3_to_f32(code as u8);
        code += 1;
    }
    table
};

/// The E4M3 code nearest to `x`, ties to even; magnitudes above 448 become 448, NaN stays NaN.
pub fn f32_to_e4m3(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let a = x.abs();
    let code = if a < 1.0 / 64.0 {
        // Units of 2^-9; 8 of them are the smallest normal number, whose code is 8.
        nearest_integer(a * 512.0) as u32
    } else {
        let bits = a.to_bits();
        let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
        (rounded - ((127 - 7) << 3)).min(0x7e)
    };
    sign | code as u8
}

/// The value of an E8M0 scale: `2^(code - 127)`; 255 is NaN. Code 0 is a subnormal float32.
pub const fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        code => f32::from_bits((code as u32) << 23),
    }
}

/// The E8M0 code of `2^floor(log2(x))`, for positive `x`; 0 for zero, below range and NaN.
pub fn f32_to_e8m0_floor(x: f32) -> u8 {
    if x.is_nan() || x <= 0.0 {
        return 0;
    }
    // The exponent field is the code; that of an infinity (255) would be NaN.
    ((x.to_bits() >> 23) as u8).min(254)
}

impl ScaleType {
    /// The value of the stored scale. `bytes` has [`ScaleType::bytes`] bytes, little endian.
    ///
    /// # Panics
    /// If `bytes` is shorter.
    pub fn decode(self, bytes: &[u8]) -> f32 {
        match self {
            ScaleType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            ScaleType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            ScaleType::E8m0 => e8m0_to_f32(bytes[0]),
            ScaleType::E4m3 => E4M3[bytes[0] as usize],
        }
    }

    /// Stores the scale nearest to `x` in `bytes` and returns its value. Finite scales stay finite;
    /// E8M0 takes the power of two at or below `x`.
    ///
    /// # Panics
    /// If `bytes` is shorter than [`ScaleType::bytes`].
    pub fn encode(self, x: f32, bytes: &mut [u8]) -> f32 {
        match self {
            ScaleType::F32 => bytes[..4].copy_from_slice(&x.to_le_bytes()),
            ScaleType::F16 => {
                let limit = f16::MAX.to_f32();
                bytes[..2].copy_from_slice(&f16::from_f32(x.clamp(-limit, limit)).to_le_bytes());
            }
            ScaleType::E8m0 => bytes[0] = f32_to_e8m0_floor(x),
            ScaleType::E4m3 => bytes[0] = f32_to_e4m3(x),
        }
        self.decode(bytes)
    }
}

/// Sizes of the planes of a matrix.
struct Geometry {
    code_row: usize,
    scale_row: usize,
    scale_rows: usize,
}

impl Geometry {
    fn new(format: Format, rows: usize, cols: usize) -> Result<Geometry, ConvertError> {
        let overflow = || ConvertError::Overflow { rows, cols, format };
        let code_row = cols.checked_mul(format.code.bits()).ok_or_else(overflow)?.div_ceil(8);
        let scale_row = match format.scale {
            Some(scale) => cols.div_ceil(format.block.max(1)) * scale.bytes(),
            None => 0,
        };
        let scale_rows = if scale_row == 0 { 0 } else { rows.div_ceil(format.block_rows.max(1)) };
        code_row.checked_mul(rows).ok_or_else(overflow)?;
        scale_row.checked_mul(scale_rows).ok_or_else(overflow)?;
        rows.checked_mul(cols).ok_or_else(overflow)?;
        Ok(Geometry { code_row, scale_row, scale_rows })
    }
}

/// A matrix in a [`Format`], as planes that somebody else owns.
///
/// * `codes`: `[rows][cols * bits / 8]`, every row starting on a byte. 4-bit codes: column `2i` in
///   the low nibble of byte `i`. [`Code::I8`] is stored biased, `value ^ 0x80`, so that the format's
///   equation with zero 128 holds. Little endian.
/// * `scales`, `mins`: `[rows / block_rows][cols / block]`, both rounded up, of the scale's type;
///   empty where the format has none.
#[derive(Clone, Copy, Debug)]
pub struct PlaneView<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    codes: &'a [u8],
    scales: &'a [u8],
    mins: &'a [u8],
    tensor_scale: f32,
}

/// A matrix in a [`Format`] with planes of its own; the layout is that of [`PlaneView`].
#[derive(Clone, Debug, PartialEq)]
pub struct Planes {
    /// Format of the planes.
    pub format: Format,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The plane of codes.
    pub codes: Vec<u8>,
    /// The plane of scales.
    pub scales: Vec<u8>,
    /// The plane of minima.
    pub mins: Vec<u8>,
    /// The scale of the whole tensor; 1 where the format has none.
    pub tensor_scale: f32,
}

impl Planes {
    /// Planes of zero bytes with the sizes that the shape asks for.
    pub fn zeroed(format: Format, rows: usize, cols: usize) -> Result<Planes, ConvertError> {
        let g = Geometry::new(format, rows, cols)?;
        let scales = vec![0; g.scale_row * g.scale_rows];
        let mins = if format.min { scales.clone() } else { Vec::new() };
        Ok(Planes { format, rows, cols, codes: vec![0; g.code_row * rows], scales, mins, tensor_scale: 1.0 })
    }

    /// A view of all rows.
    ///
    /// # Panics
    /// If the planes were given other sizes than their shape asks for.
    pub fn view(&self) -> PlaneView<'_> {
        PlaneView::new(
            self.format,
            self.rows,
            self.cols,
            &self.codes,
            &self.scales,
            &self.mins,
            self.tensor_scale,
        )
        .expect("planes keep the sizes of their shape")
    }
}

impl<'a> PlaneView<'a> {
    /// A view of planes whose sizes are checked against the shape. `tensor_scale` counts only in
    /// formats that have one.
    pub fn new(
        format: Format,
        rows: usize,
        cols: usize,
        codes: &'a [u8],
        scales: &'a [u8],
        mins: &'a [u8],
        tensor_scale: f32,
    ) -> Result<PlaneView<'a>, ConvertError> {
        let g = Geometry::new(format, rows, cols)?;
        let scale_bytes = g.scale_row * g.scale_rows;
        let check = |plane, expected, found| {
            if expected == found {
                return Ok(());
            }
            Err(ConvertError::PlaneSize { plane, expected, found, rows, cols, format })
        };
        check("codes", g.code_row * rows, codes.len())?;
        check("scales", scale_bytes, scales.len())?;
        check("minima", if format.min { scale_bytes } else { 0 }, mins.len())?;
        let tensor_scale = if format.tensor_scale { tensor_scale } else { 1.0 };
        Ok(PlaneView { format, rows, cols, codes, scales, mins, tensor_scale })
    }

    /// Format of the planes.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The plane of codes.
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// The plane of scales.
    pub fn scales(&self) -> &'a [u8] {
        self.scales
    }

    fn code_row(&self) -> usize {
        (self.cols * self.format.code.bits()).div_ceil(8)
    }

    fn scale_row(&self) -> usize {
        self.format.scale.map_or(0, |scale| self.cols.div_ceil(self.format.block.max(1)) * scale.bytes())
    }

    /// The codes of a row.
    pub(crate) fn row_codes(&self, row: usize) -> &'a [u8] {
        &self.codes[row * self.code_row()..][..self.code_row()]
    }

    /// The part of the plane of scales or minima that covers a row.
    pub(crate) fn row_scales<'p>(&self, plane: &'p [u8], row: usize) -> &'p [u8] {
        if plane.is_empty() {
            return plane;
        }
        &plane[row / self.format.block_rows.max(1) * self.scale_row()..][..self.scale_row()]
    }

    /// The rows of `range`, without copying; for formats whose scales cover one row.
    ///
    /// # Panics
    /// If the range exceeds the rows or a scale covers several rows.
    pub fn slice(&self, range: Range<usize>) -> PlaneView<'a> {
        assert!(self.format.block_rows <= 1, "slicing rows that share scales");
        let part = |plane: &'a [u8], row: usize| &plane[range.start * row..range.end * row];
        PlaneView {
            rows: range.len(),
            codes: part(self.codes, self.code_row()),
            scales: part(self.scales, self.scale_row()),
            mins: if self.mins.is_empty() { self.mins } else { part(self.mins, self.scale_row()) },
            ..*self
        }
    }

    /// The first scale or minimum that is NaN or infinite: (row, column where its block starts,
    /// whether it is a minimum). In block FP8 the row is the block's first.
    pub fn bad_scale(&self) -> Option<(usize, usize, bool)> {
        let scale = self.format.scale?;
        let per_row = (self.scale_row() / scale.bytes()).max(1);
        let find = |plane: &[u8]| {
            let index = plane.chunks_exact(scale.bytes()).position(|bytes| match scale {
                ScaleType::F32 => bytes[3] & 0x7f == 0x7f && bytes[2] & 0x80 != 0,
                ScaleType::F16 => bytes[1] & 0x7c == 0x7c,
                ScaleType::E8m0 => bytes[0] == 0xff,
                ScaleType::E4m3 => bytes[0] & 0x7f == 0x7f,
            })?;
            Some((index / per_row * self.format.block_rows.max(1), index % per_row * self.format.block))
        };
        match find(self.scales) {
            Some((row, col)) => Some((row, col, false)),
            None => find(self.mins).map(|(row, col)| (row, col, true)),
        }
    }
}

/// The format that rows of `format` have once scales are repeated for every row and the tensor's scale
/// is folded into them: what [`PanelLayout::new`] asks for.
pub fn row_format(format: Format) -> Format {
    PanelLayout::new(format, 0).format
}

/// The planes of `view` in its [`row_format`]: the codes unchanged.
pub fn to_row_format(view: &PlaneView<'_>) -> Planes {
    let format = row_format(view.format);
    let expand = |plane: &[u8], row| match (view.format.tensor_scale, view.format.scale) {
        (true, Some(scale)) => view
            .row_scales(plane, row)
            .chunks_exact(scale.bytes())
            .flat_map(|bytes| (scale.decode(bytes) * view.tensor_scale).to_le_bytes())
            .collect(),
        // One of the whole row.
        _ if view.format.block > format.block => {
            view.row_scales(plane, row).repeat(view.cols.div_ceil(format.block))
        }
        _ => view.row_scales(plane, row).to_vec(),
    };
    let expand_all = |plane: &[u8]| (0..view.rows).flat_map(|row| expand(plane, row)).collect::<Vec<u8>>();
    Planes {
        format,
        rows: view.rows,
        cols: view.cols,
        codes: view.codes.to_vec(),
        scales: expand_all(view.scales),
        mins: expand_all(view.mins),
        tensor_scale: 1.0,
    }
}

/// Decodes codes of one row, less the format's zero, without any scale.
fn decode_codes(format: Format, bytes: &[u8], out: &mut [f32]) {
    let zero = format.zero;
    match format.code {
        Code::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        Code::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        Code::Bf16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
            }
        }
        Code::E4m3 => {
            for (o, &b) in out.iter_mut().zip(bytes) {
                *o = E4M3[b as usize];
            }
        }
        Code::I8 => {
            for (o, &b) in out.iter_mut().zip(bytes) {
                *o = (i32::from(b) - zero) as f32;
            }
        }
        Code::E2m1 => {
            for (pair, &b) in out.chunks_mut(2).zip(bytes) {
                pair[0] = e2m1_to_f32(b & 15);
                if let Some(high) = pair.get_mut(1) {
                    *high = e2m1_to_f32(b >> 4);
                }
            }
        }
        Code::U4 => {
            for (pair, &b) in out.chunks_mut(2).zip(bytes) {
                pair[0] = (i32::from(b & 15) - zero) as f32;
                if let Some(high) = pair.get_mut(1) {
                    *high = (i32::from(b >> 4) - zero) as f32;
                }
            }
        }
    }
}

/// Writes the weights of `view` to `out`, row-major float32: `scale * (code - zero) + min`, each
/// operation rounded to float32 (the tensor's scale is multiplied into the block's first).
pub fn dequantize(view: &PlaneView<'_>, out: &mut [f32]) -> Result<(), ConvertError> {
    let PlaneView { format, rows, cols, .. } = *view;
    if out.len() != rows * cols {
        let (expected, found) = (rows * cols, out.len());
        return Err(ConvertError::PlaneSize { plane: "values", expected, found, rows, cols, format });
    }
    if cols == 0 {
        return Ok(());
    }
    for (row, out) in out.chunks_exact_mut(cols).enumerate() {
        decode_codes(format, view.row_codes(row), out);
        let Some(scale) = format.scale else { continue };
        let scales = view.row_scales(view.scales, row).chunks_exact(scale.bytes());
        let mut mins = view.row_scales(view.mins, row).chunks_exact(scale.bytes());
        for (block, bytes) in out.chunks_mut(format.block.max(1)).zip(scales) {
            let s = match format.tensor_scale {
                true => scale.decode(bytes) * view.tensor_scale,
                false => scale.decode(bytes),
            };
            match mins.next() {
                Some(bytes) => {
                    let m = scale.decode(bytes);
                    block.iter_mut().for_each(|v| *v = *v * s + m);
                }
                None => block.iter_mut().for_each(|v| *v *= s),
            }
        }
    }
    Ok(())
}

/// What a block's scale is chosen from.
#[derive(Clone, Copy, Default)]
struct Extremes {
    min: f32,
    max: f32,
}

impl Extremes {
    fn amax(self) -> f32 {
        self.max.max(-self.min)
    }
}

/// One block of a matrix: its rows, its columns.
struct Block<'a> {
    values: &'a [f32],
    stride: usize,
    rows: Range<usize>,
    cols: Range<usize>,
}

impl Block<'_> {
    fn rows(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.rows.clone().map(|row| (row, &self.values[row * self.stride..][self.cols.clone()]))
    }

    /// Calls `step(lane, value)` for all values, spread over eight lanes so that the compiler may take
    /// eight at a time.
    #[inline]
    fn for_each(&self, mut step: impl FnMut(usize, f32)) {
        for (_, row) in self.rows() {
            let (eights, rest) = row.as_chunks::<8>();
            for eight in eights {
                for (lane, &v) in eight.iter().enumerate() {
                    step(lane, v);
                }
            }
            for (lane, &v) in rest.iter().enumerate() {
                step(lane, v);
            }
        }
    }

    fn extremes(&self) -> Extremes {
        let (mut min, mut max) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
        self.for_each(|lane, v| {
            min[lane] = if v < min[lane] { v } else { min[lane] };
            max[lane] = if v > max[lane] { v } else { max[lane] };
        });
        Extremes {
            min: min.into_iter().fold(f32::INFINITY, f32::min),
            max: max.into_iter().fold(f32::NEG_INFINITY, f32::max),
        }
    }

    /// Squared error of E2M1 under the scale whose inverse is given, in units of that scale.
    fn e2m1_error(&self, inverse: f32) -> f32 {
        let mut sums = [0f32; 8];
        self.for_each(|lane, v| {
            let a = (v * inverse).abs();
            // Steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6: powers of two, made from the exponent.
            // From 7 on everything becomes 6.
            let clipped = a.min(7.0);
            let exponent = ((clipped.to_bits() >> 23) as i32 - 127).max(0);
            let step = f32::from_bits(((exponent + 126) << 23) as u32);
            let per_step = f32::from_bits(((128 - exponent) << 23) as u32);
            let rounded = (nearest_integer(clipped * per_step) as f32 * step).min(E2M1_MAX);
            sums[lane] += (rounded - a) * (rounded - a);
        });
        sums.into_iter().sum()
    }
}

/// Quantizes a row-major matrix of float32 to `format`.
///
/// * Plain floats round to nearest even (float16 beyond its range becomes infinite).
/// * MXFP4: the OCP scale `2^(floor(log2(amax)) - 2)` or twice that, whichever gives the block the
///   smaller squared error (the OCP scale clips magnitudes above 6 of the 8 that it admits).
/// * NVFP4: tensor scale `amax / (6 * 448)`, block scale `amax / 6` over that, in E4M3.
/// * E4M3 codes: `amax / 448` of the block or row; bytes: `amax / 127`; nibbles with a zero: the extreme of larger
///   magnitude becomes code 0; nibbles with a minimum: the block's range over 15.
///
/// Codes are chosen for the scale as stored, so a scale's own rounding costs no second error.
///
/// # Errors
/// A weight is not finite, which no scaled format holds; or the format has none of the kinds above.
pub fn quantize(format: Format, rows: usize, cols: usize, values: &[f32]) -> Result<Planes, ConvertError> {
    quantize_under(format, rows, cols, values, None)
}

/// The same with this tensor scale, in formats that have one: part of a tensor is then as in the whole.
///
/// # Errors
/// As [`quantize`].
pub fn quantize_under(
    format: Format,
    rows: usize,
    cols: usize,
    values: &[f32],
    tensor_scale: Option<f32>,
) -> Result<Planes, ConvertError> {
    let mut planes = Planes::zeroed(format, rows, cols)?;
    if values.len() != rows * cols {
        let (expected, found) = (rows * cols, values.len());
        return Err(ConvertError::PlaneSize { plane: "values", expected, found, rows, cols, format });
    }
    let float = matches!(format.code, Code::F32 | Code::F16 | Code::Bf16);
    if float == format.scale.is_some() && format.code != Code::E4m3 {
        return Err(ConvertError::Unsupported { format });
    }
    let Some(scale_type) = format.scale else {
        encode_plain(format.code, values, &mut planes.codes);
        return Ok(planes);
    };
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(ConvertError::NotFinite { row: at / cols, col: at % cols, value: values[at] });
    }
    if format.tensor_scale {
        let amax = values.iter().fold(0f32, |a, v| a.max(v.abs()));
        let scale = tensor_scale.unwrap_or(amax / (E2M1_MAX * E4M3_MAX));
        // A subnormal scale has too few bits to divide by; such a tensor is all but zero.
        planes.tensor_scale = if scale.is_normal() { scale } else { 1.0 };
    }
    let block = format.block.max(1);
    let block_rows = format.block_rows.max(1);
    let blocks = cols.div_ceil(block);
    let code_row = (cols * format.code.bits()).div_ceil(8);
    let mut scratch = Vec::with_capacity(block.min(cols));
    for block_row in 0..rows.div_ceil(block_rows) {
        for b in 0..blocks {
            let part = Block {
                values,
                stride: cols,
                rows: block_row * block_rows..rows.min((block_row + 1) * block_rows),
                cols: b * block..cols.min((b + 1) * block),
            };
            let at = (block_row * blocks + b) * scale_type.bytes();
            let mins = planes.mins.get_mut(at..).filter(|m| !m.is_empty());
            let (scale, min) =
                choose_scale(format, scale_type, &part, planes.tensor_scale, &mut planes.scales[at..], mins);
            for (row, values) in part.rows() {
                encode_codes(format, values, scale, min, &mut scratch);
                put_codes(format, &scratch, part.cols.start, &mut planes.codes[row * code_row..][..code_row]);
            }
        }
    }
    Ok(planes)
}

/// Stores a block's scale and minimum and returns their values; the tensor's scale is included.
fn choose_scale(
    format: Format,
    scale_type: ScaleType,
    block: &Block<'_>,
    tensor_scale: f32,
    scale_out: &mut [u8],
    min_out: Option<&mut [u8]>,
) -> (f32, f32) {
    let range = block.extremes();
    let amax = range.amax();
    if let Some(min_out) = min_out {
        let min = scale_type.encode(range.min, min_out);
        // The halves are subtracted first: the range of a block may exceed float32.
        let step = (range.max / 15.0 - range.min / 15.0).min(f32::MAX);
        return (scale_type.encode(step, scale_out), min);
    }
    if scale_type == ScaleType::E8m0 && format.code == Code::E2m1 {
        let low = f32_to_e8m0_floor(amax).saturating_sub(2);
        let high = (low + 1).min(254);
        // An error of 1 under the higher scale is one of 2 under the lower.
        let error = |code| block.e2m1_error(1.0 / e8m0_to_f32(code));
        let better = amax > 0.0 && 4.0 * error(high) < error(low);
        scale_out[0] = if better { high } else { low };
        return (e8m0_to_f32(scale_out[0]), 0.0);
    }
    let wanted = match format.code {
        Code::E2m1 => amax / E2M1_MAX,
        Code::E4m3 => amax / E4M3_MAX,
        Code::I8 => amax / 127.0,
        // Code 0 reaches one step further than code 15: give it to the larger extreme.
        Code::U4 if range.max > -range.min => range.max / -(format.zero.max(1) as f32),
        Code::U4 => range.min / -(format.zero.max(1) as f32),
        Code::F32 | Code::F16 | Code::Bf16 => 1.0,
    };
    let stored = scale_type.encode(wanted / tensor_scale, scale_out);
    (stored * tensor_scale, 0.0)
}

/// The codes, 4 or 8 bits each, of part of a row under one scale and minimum.
fn encode_codes(format: Format, values: &[f32], scale: f32, min: f32, out: &mut Vec<u8>) {
    fn fill(out: &mut Vec<u8>, values: &[f32], code: impl Fn(f32) -> u8) {
        out.clear();
        out.extend(values.iter().map(|&v| code(v)));
    }
    // Without a scale every weight is the minimum.
    let divide = |v: f32| if scale == 0.0 { 0.0 } else { (v - min) / scale };
    let zero = format.zero as f32;
    let integer =
        |v: f32, low: f32, high: f32| nearest_integer(divide(v).clamp(low - zero, high - zero)) + format.zero;
    match format.code {
        Code::E2m1 => fill(out, values, |v| f32_to_e2m1(divide(v))),
        Code::E4m3 => fill(out, values, |v| f32_to_e4m3(divide(v))),
        Code::I8 => fill(out, values, |v| integer(v, 1.0, 255.0) as u8),
        Code::U4 => fill(out, values, |v| integer(v, 0.0, 15.0) as u8),
        // Plain floats have no scale: `encode_plain` does them.
        Code::F32 | Code::F16 | Code::Bf16 => out.clear(),
    }
}

/// Puts codes of 4 or 8 bits into a row from column `first` on; nibbles of the row are zero before.
fn put_codes(format: Format, codes: &[u8], first: usize, row: &mut [u8]) {
    match (format.code.bits(), first % 2) {
        (8, _) => row[first..][..codes.len()].copy_from_slice(codes),
        (_, 0) => {
            for (byte, pair) in row[first / 2..].iter_mut().zip(codes.chunks(2)) {
                *byte = pair[0] | (pair.get(1).copied().unwrap_or(0) << 4);
            }
        }
        _ => {
            for (col, code) in (first..).zip(codes) {
                row[col / 2] |= code << (4 * (col % 2));
            }
        }
    }
}

/// Encodes a format without scales.
fn encode_plain(code: Code, values: &[f32], out: &mut [u8]) {
    match code {
        Code::F32 => put_all(values, out, |v| v.to_le_bytes()),
        Code::F16 => put_all(values, out, |v| f16::from_f32(v).to_le_bytes()),
        Code::Bf16 => put_all(values, out, |v| bf16::from_f32(v).to_le_bytes()),
        Code::E4m3 => put_all(values, out, |v| [f32_to_e4m3(v)]),
        // `quantize` refuses these without a scale.
        Code::I8 | Code::E2m1 | Code::U4 => {}
    }
}

fn put_all<const N: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    for (bytes, &v) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *bytes = encode(v);
    }
}

/// The byte (or nibble pair) that means weight zero in every column.
fn zero_byte(format: Format) -> u8 {
    match format.code {
        Code::I8 => format.zero as u8,
        Code::U4 => (format.zero as u8 & 15) * 0x11,
        _ => 0,
    }
}

/// Nibbles 0 to 7 of a word (columns in order) to the order of a panel: column `j` in the low and
/// column `4 + j` in the high nibble of byte `j`.
#[inline]
const fn panel_nibbles(word: u32) -> u32 {
    const fn spread(x: u32) -> u32 {
        let x = (x | (x << 8)) & 0x00ff_00ff;
        (x | (x << 4)) & 0x0f0f_0f0f
    }
    spread(word & 0xffff) | (spread(word >> 16) << 4)
}

/// Packs up to 16 rows into one panel, `out` being [`PanelLayout::bytes`] long; all of it is written.
///
/// `rows` is in the layout's format, which is the [`row_format`] of the stored one. Missing rows and
/// the columns up to [`PanelLayout::k_pad`] are padded with codes that mean zero; scales and minima of
/// blocks that hold no column, and of missing rows, are zero bytes. (The padded columns of a block that
/// holds some columns see that block's minimum: the activations there are zero by contract.)
pub fn pack_panel(layout: &PanelLayout, rows: &PlaneView<'_>, out: &mut [u8]) -> Result<(), ConvertError> {
    let format = layout.format;
    if rows.rows > PANEL || rows.cols != layout.k || rows.format != format {
        let PlaneView { rows, cols, format: given, .. } = *rows;
        return Err(ConvertError::PanelMismatch { rows, cols, format: given, k: layout.k, panel: format });
    }
    if out.len() != layout.bytes() {
        let (expected, found) = (layout.bytes(), out.len());
        let (rows, cols) = (PANEL, layout.k);
        return Err(ConvertError::PlaneSize { plane: "panel", expected, found, rows, cols, format });
    }
    let (head, codes) = out.split_at_mut(layout.code_offset());
    if let Some(scale) = format.scale {
        let (scales, mins) = head.split_at_mut(layout.min_offset());
        pack_scales(scale, rows, rows.scales, scales);
        if format.min {
            pack_scales(scale, rows, rows.mins, mins);
        }
    }
    pack_codes(layout, rows, codes);
    Ok(())
}

fn pack_scales(scale: ScaleType, rows: &PlaneView<'_>, plane: &[u8], out: &mut [u8]) {
    fn transpose<const N: usize>(rows: &PlaneView<'_>, plane: &[u8], out: &mut [u8]) {
        for lane in 0..rows.rows {
            let source = rows.row_scales(plane, lane).chunks_exact(N);
            for (line, bytes) in out.chunks_exact_mut(PANEL * N).zip(source) {
                line[lane * N..][..N].copy_from_slice(bytes);
            }
        }
    }
    out.fill(0);
    match scale.bytes() {
        1 => transpose::<1>(rows, plane, out),
        2 => transpose::<2>(rows, plane, out),
        _ => transpose::<4>(rows, plane, out),
    }
}

/// Words of a lane that are transposed together: a square of 16 x 16 words is 1 KiB.
const TILE: usize = 16;

fn pack_codes(layout: &PanelLayout, rows: &PlaneView<'_>, out: &mut [u8]) {
    let format = layout.format;
    let words = layout.k_pad() * format.code.bits() / 32;
    let padding = zero_byte(format);
    let (out, tail) = out.split_at_mut(words * PANEL * 4);
    tail.fill(0);
    // The byte of a row that holds one nibble only, whose other half is padding.
    let half_full = (format.code.bits() == 4 && layout.k % 2 == 1).then_some(layout.k / 2);
    for lane in 0..PANEL {
        let source = if lane < rows.rows { rows.row_codes(lane) } else { &[] };
        let mut source = source.chunks_exact(TILE * 4);
        // Columns past the last whole tile go through a padded copy of it.
        let mut rest = [padding; TILE * 4];
        let remainder = source.remainder();
        rest[..remainder.len()].copy_from_slice(remainder);
        let mut rest = Some(rest);
        for (number, tile) in out.chunks_mut(TILE * PANEL * 4).enumerate() {
            let mut block = [padding; TILE * 4];
            match source.next() {
                Some(whole) => block.copy_from_slice(whole),
                None => block = rest.take().unwrap_or(block),
            }
            if let Some(last) = half_full.filter(|last| last / (TILE * 4) == number) {
                let byte = &mut block[last % (TILE * 4)];
                *byte = (*byte & 0x0f) | (padding & 0xf0);
            }
            match format.code.bits() {
                4 => put_lane(tile, lane, &block, panel_nibbles),
                16 => put_lane_16(tile, lane, &block),
                _ => put_lane(tile, lane, &block, |word| word),
            }
        }
    }
}

/// Writes a lane's words to their places in a tile of up to `TILE` lines of 16 words.
#[inline]
fn put_lane(tile: &mut [u8], lane: usize, block: &[u8; TILE * 4], order: impl Fn(u32) -> u32) {
    let mut words = [0u32; TILE];
    for (word, b) in words.iter_mut().zip(block.chunks_exact(4)) {
        *word = order(u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    }
    for (line, word) in tile.chunks_exact_mut(PANEL * 4).zip(words) {
        line[lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// The same for 16-bit codes: a word holds two columns, which go to two lines.
#[inline]
fn put_lane_16(tile: &mut [u8], lane: usize, block: &[u8; TILE * 4]) {
    for (line, code) in tile.chunks_exact_mut(PANEL * 2).zip(block.chunks_exact(2)) {
        line[lane * 2..][..2].copy_from_slice(code);
    }
}

/// Undoes [`pack_panel`]: the planes of all 16 lanes over the layout's `k` columns, in its format.
pub fn unpack_panel(layout: &PanelLayout, panel: &[u8]) -> Result<Planes, ConvertError> {
    let (format, k) = (layout.format, layout.k);
    if panel.len() != layout.bytes() {
        let (expected, found) = (layout.bytes(), panel.len());
        return Err(ConvertError::PlaneSize {
            plane: "panel",
            expected,
            found,
            rows: PANEL,
            cols: k,
            format,
        });
    }
    let mut planes = Planes::zeroed(format, PANEL, k)?;
    if let Some(scale) = format.scale {
        let n = scale.bytes();
        let blocks = k.div_ceil(format.block);
        for lane in 0..PANEL {
            for b in 0..blocks {
                let (from, to) = ((b * PANEL + lane) * n, (lane * blocks + b) * n);
                planes.scales[to..to + n].copy_from_slice(&panel[from..from + n]);
                if format.min {
                    let from = layout.min_offset() + from;
                    planes.mins[to..to + n].copy_from_slice(&panel[from..from + n]);
                }
            }
        }
    }
    let code_row = (k * format.code.bits()).div_ceil(8);
    for lane in 0..PANEL {
        let row = &mut planes.codes[lane * code_row..][..code_row];
        for col in 0..k {
            let (at, high) = layout.code_at(lane, col);
            match format.code.bits() {
                4 => row[col / 2] |= ((panel[at] >> (4 * high as u32)) & 15) << (4 * (col % 2)),
                bits => row[col * bits / 8..][..bits / 8].copy_from_slice(&panel[at..at + bits / 8]),
            }
        }
    }
    Ok(planes)
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
