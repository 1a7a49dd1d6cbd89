//! The safetensors container: a length, a JSON header, the bytes. And which of its tensors belong
//! together: codes and the scales beside them become one tensor in one [`Format`].
//!
//! The header is read here rather than by the `safetensors` crate, which keeps the last of two equal
//! names and does not say which tensor is at fault.

use super::error::{CheckpointError, ErrorKind};
use super::file::{MappedFile, Span};
use super::stored::{ScaleGrid, ScaleStorage, Stored, slice};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use tilec_ir::format::{Code, Format};
use tilec_ir::tensor::TensorInfo;

/// Longest header that is read: that of the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// Types of elements, by the names that headers use, with their bits.
const DTYPES: &[(&str, Dtype, u64)] = &[
    ("BOOL", Dtype::Other("BOOL"), 8),
    ("U8", Dtype::U8, 8),
    ("I8", Dtype::Other("I8"), 8),
    ("I16", Dtype::Other("I16"), 16),
    ("U16", Dtype::Other("U16"), 16),
    ("I32", Dtype::Other("I32"), 32),
    ("U32", Dtype::Other("U32"), 32),
    ("I64", Dtype::Other("I64"), 64),
    ("U64", Dtype::Other("U64"), 64),
    ("F64", Dtype::Other("F64"), 64),
    ("C64", Dtype::Other("C64"), 64),
    ("F32", Dtype::F32, 32),
    ("F16", Dtype::F16, 16),
    ("BF16", Dtype::Bf16, 16),
    ("F8_E4M3", Dtype::E4m3, 8),
    ("F8_E8M0", Dtype::E8m0, 8),
    ("F8_E5M2", Dtype::Other("F8_E5M2"), 8),
    ("F8_E4M3FNUZ", Dtype::Other("F8_E4M3FNUZ"), 8),
    ("F8_E5M2FNUZ", Dtype::Other("F8_E5M2FNUZ"), 8),
    ("F6_E2M3", Dtype::Other("F6_E2M3"), 6),
    ("F6_E3M2", Dtype::Other("F6_E3M2"), 6),
    ("F4", Dtype::F4, 4),
];

/// Type of the elements of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dtype {
    U8,
    F32,
    F16,
    Bf16,
    E4m3,
    E8m0,
    F4,
    Other(&'static str),
}

/// A tensor as the header describes it, checked against the file.
#[derive(Clone, Debug)]
pub(super) struct RawTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    span: Span,
}

/// One entry of the header before any check.
#[derive(serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The header's entries in order, duplicates included.
struct Entries(Vec<(String, Entry)>);

impl<'de> serde::Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        struct Header;
        impl<'de> Visitor<'de> for Header {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry = map.next_value().map_err(|error| {
                        serde::de::Error::custom(format_args!("tensor {name:?}: {error}"))
                    })?;
                    entries.push((name, entry));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Header)
    }
}

/// Reads the header of file number `index`: every tensor lies inside the file, none overlaps another,
/// no byte is left over, and every length is what type and shape ask for.
pub(super) fn read_header(
    file: &MappedFile,
    index: usize,
) -> Result<BTreeMap<String, RawTensor>, CheckpointError> {
    let (path, bytes) = (file.path(), file.bytes());
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let problem = format!("the file has {} bytes, not even a header length", bytes.len());
        return Err(CheckpointError::malformed(path, "byte 0", problem));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        let problem = format!("the header would have {length} bytes, more than {MAX_HEADER}");
        return Err(CheckpointError::new(
            ErrorKind::Malformed,
            path,
            "byte 0",
            problem,
            "check that this is a safetensors file",
        ));
    }
    let Some((header, data)) = rest.split_at_checked(length as usize) else {
        let problem = format!("the header of {length} bytes ends past the file's {} bytes", bytes.len());
        return Err(CheckpointError::malformed(path, "byte 0", problem));
    };
    let Entries(entries) = serde_json::from_slice(header).map_err(|error| {
        CheckpointError::malformed(path, format_args!("header, byte {}", 8 + error.column()), error)
    })?;

    let mut tensors = BTreeMap::new();
    let mut spans = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let place = format!("tensor {name:?}");
        let (start, end) = entry.data_offsets;
        let raw = check_entry(&entry, data.len() as u64)
            .map_err(|problem| CheckpointError::malformed(path, &place, problem))?;
        spans.push((start, end, name.clone()));
        let span =
            Span { file: index, start: 8 + length as usize + start as usize, len: (end - start) as usize };
        if tensors.insert(name, RawTensor { span, ..raw }).is_some() {
            return Err(CheckpointError::malformed(path, place, "the name is used twice"));
        }
    }
    spans.sort();
    let mut expected = 0;
    for (start, end, name) in &spans {
        if *start != expected {
            let what = if *start < expected { "overlaps the tensor before it" } else { "leaves a gap" };
            let problem = format!("it starts at data byte {start}, where {expected} is due: it {what}");
            return Err(CheckpointError::malformed(path, format_args!("tensor {name:?}"), problem));
        }
        expected = *end;
    }
    if expected != data.len() as u64 {
        let problem = format!("the tensors end at data byte {expected}, the file at {}", data.len());
        return Err(CheckpointError::malformed(path, "end of the data", problem));
    }
    Ok(tensors)
}

fn check_entry(entry: &Entry, data: u64) -> Result<RawTensor, String> {
    let Some((_, dtype, bits)) = DTYPES.iter().find(|(name, ..)| *name == entry.dtype) else {
        return Err(format!("the dtype {:?} is not known", entry.dtype));
    };
    let (start, end) = entry.data_offsets;
    if start > end || end > data {
        return Err(format!("data_offsets [{start}, {end}] do not lie in the file's {data} bytes of data"));
    }
    let elements = entry.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n));
    let Some(total_bits) = elements.and_then(|n| n.checked_mul(*bits)) else {
        return Err(format!("the shape {:?} overflows", entry.shape));
    };
    if total_bits % 8 != 0 || total_bits / 8 != end - start {
        let (shape, length) = (&entry.shape, end - start);
        return Err(format!(
            "{} of shape {shape:?} needs {} bytes, data_offsets give {length}",
            entry.dtype,
            total_bits.div_ceil(8)
        ));
    }
    // A zero among the extents lets the others be anything.
    let shape: Result<Vec<usize>, _> = entry.shape.iter().map(|&n| usize::try_from(n)).collect();
    let shape = shape.map_err(|_| format!("the shape {:?} overflows", entry.shape))?;
    Ok(RawTensor { dtype: *dtype, shape, span: Span { file: 0, start: 0, len: 0 } })
}

/// How scales of block FP8 lie.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fp8Grid {
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// Groups of rows of a fused projection of queries, keys and values, whose blocks start anew in
    /// each; 1 if they do not.
    pub qkv_groups: usize,
}

/// The tensors of a checkpoint, codes joined with their scales.
#[derive(Default)]
pub(super) struct Joined {
    pub tensors: BTreeMap<String, (TensorInfo, Stored)>,
    /// Tensors that cannot be computed with: the file and what it holds.
    pub refused: BTreeMap<String, (usize, String)>,
}

/// Joins codes and scales:
///
/// | codes | beside them | format |
/// | --- | --- | --- |
/// | F32, F16, BF16 | | the same |
/// | F8_E4M3 `X` | F32 or BF16 `X_scale_inv` or `X_scale`: per block or tensor | block FP8 |
/// | F8_E4M3 `X` | the same per row | fp8_channel |
/// | U8 or F4 `X` | U8 or F8_E8M0 `X_scale`, per 32 | MXFP4 |
/// | U8 `X_blocks [.., k / 32, 16]` | U8 `X_scales` | MXFP4, as `X` |
/// | U8 or F4 `X` | F8_E4M3 `X_scale`, per 16, and F32 `X_scale_2` | NVFP4 |
/// | U8 `X_packed` | F8_E4M3 `X_scale`, F32 `X_global_scale` (its inverse) | NVFP4, as `X` |
///
/// Scales of activations are left out:
/// this runtime measures activations itself.
pub(super) fn join(
    raw: &BTreeMap<String, RawTensor>,
    files: &[MappedFile],
    fp8: Fp8Grid,
) -> Result<Joined, CheckpointError> {
    let mut joiner = Joiner { raw, files, fp8, used: BTreeSet::new(), joined: Joined::default() };
    for (name, tensor) in raw {
        match tensor.dtype {
            Dtype::E4m3 if !is_scale(name) => joiner.fp8(name, tensor)?,
            Dtype::U8 | Dtype::F4 if !is_scale(name) => joiner.fp4(name, tensor)?,
            _ => {}
        }
    }
    for (name, tensor) in raw {
        if !joiner.used.contains(name) {
            joiner.plain(name, tensor);
        }
    }
    Ok(joiner.joined)
}

const SCALE_SUFFIXES: &[&str] = &["_scale", "_scales", "_scale_inv", "_scale_2", "_global_scale"];

fn is_scale(name: &str) -> bool {
    SCALE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

struct Joiner<'a> {
    raw: &'a BTreeMap<String, RawTensor>,
    files: &'a [MappedFile],
    fp8: Fp8Grid,
    used: BTreeSet<String>,
    joined: Joined,
}

impl<'a> Joiner<'a> {
    fn path(&self, tensor: &RawTensor) -> &'a Path {
        self.files[tensor.span.file].path()
    }

    fn error(&self, name: &str, tensor: &RawTensor, problem: impl fmt::Display) -> CheckpointError {
        CheckpointError::new(
            ErrorKind::Malformed,
            self.path(tensor),
            format_args!("tensor {name:?}"),
            problem,
            "check that the checkpoint is complete and quantized in a format that is listed as supported",
        )
    }

    fn companion(&self, name: String) -> Option<(String, &'a RawTensor)> {
        self.raw.get(&name).map(|tensor| (name, tensor))
    }

    /// The value of a float32 scalar.
    fn scalar(&self, name: &str, tensor: &RawTensor) -> Result<f32, CheckpointError> {
        let value = match (tensor.dtype, slice(self.files, &tensor.span)) {
            (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            _ => {
                let problem =
                    format!("expected one F32, found {:?} of shape {:?}", tensor.dtype, tensor.shape);
                return Err(self.error(name, tensor, problem));
            }
        };
        if !value.is_finite() || value == 0.0 {
            let problem = format!("the scale of the tensor is {value}");
            let place = format_args!("tensor {name:?}");
            let remedy = "quantize the checkpoint again";
            return Err(CheckpointError::new(ErrorKind::Value, self.path(tensor), place, problem, remedy));
        }
        Ok(value)
    }

    fn insert(
        &mut self,
        name: &str,
        shape: Vec<usize>,
        format: Format,
        codes: &RawTensor,
        scales: Option<ScaleGrid>,
    ) -> Result<(), CheckpointError> {
        let stored = Stored::Planes { codes: codes.span, scales };
        if self.joined.tensors.insert(name.to_string(), (TensorInfo { shape, format }, stored)).is_some()
            || (self.raw.contains_key(name) && !self.used.contains(name))
        {
            return Err(self.error(name, codes, "the name is used twice"));
        }
        Ok(())
    }

    fn fp8(&mut self, name: &str, tensor: &'a RawTensor) -> Result<(), CheckpointError> {
        if tensor.span.len == 0 {
            return Err(self.error(name, tensor, "FP8 codes without an element"));
        }
        let scale =
            self.companion(format!("{name}_scale_inv")).or_else(|| self.companion(format!("{name}_scale")));
        let Some((scale_name, scale)) = scale else {
            let problem = format!("F8_E4M3 codes without a tensor {name}_scale_inv or {name}_scale");
            return Err(self.error(name, tensor, problem));
        };
        let storage = match scale.dtype {
            Dtype::F32 => ScaleStorage::F32,
            Dtype::F16 => ScaleStorage::F16,
            Dtype::Bf16 => ScaleStorage::Bf16,
            other => {
                return Err(self.error(&scale_name, scale, format!("FP8 scales of type {other:?}")));
            }
        };
        let info = TensorInfo::new(tensor.shape.clone(), Format::FP8_BLOCK);
        let (rows, cols) = (info.rows().unwrap_or(0), info.cols());
        let [block_rows, block_cols] = self.fp8.block;
        // Each group of a fused projection has blocks of its own, the last cut short.
        let groups = if name.ends_with("qkv_proj.weight") { self.fp8.qkv_groups } else { 1 };
        let grouped = match tensor.shape[..] {
            [rows, cols] if groups > 1 && rows % groups == 0 => {
                let blocks = groups.checked_mul((rows / groups).div_ceil(block_rows));
                blocks.map(|blocks| vec![blocks, cols.div_ceil(block_cols)])
            }
            _ => None,
        };
        let expected = |per_rows: usize, per_cols: usize| -> Vec<usize> {
            let mut shape = tensor.shape.clone();
            if let [.., rows, cols] = shape.as_mut_slice() {
                (*rows, *cols) = (rows.div_ceil(per_rows), cols.div_ceil(per_cols));
            }
            shape
        };
        let matrix =
            tensor.shape.len() == 2 || tensor.shape.last_chunk().is_some_and(|[r, _]| r % block_rows == 0);
        let mut group_rows = rows;
        let (per_rows, per_cols, format) = if scale.shape.iter().all(|&n| n == 1) {
            (rows, cols, Format::FP8_BLOCK)
        } else if grouped.as_ref() == Some(&scale.shape) {
            group_rows = rows / groups;
            (block_rows, block_cols, Format { block: block_cols, block_rows, ..Format::FP8_BLOCK })
        } else if matrix && scale.shape == expected(block_rows, block_cols) {
            (block_rows, block_cols, Format { block: block_cols, block_rows, ..Format::FP8_BLOCK })
        } else if tensor.shape.len() > 1 && (scale.shape == expected(1, cols) || scale.shape == [rows]) {
            (1, cols, Format::FP8_CHANNEL)
        } else {
            let problem = format!(
                "scales of shape {:?} fit {:?} neither per {block_rows} x {block_cols} block (that would be \
                 {:?}), nor per row, nor per tensor",
                scale.shape,
                tensor.shape,
                expected(block_rows, block_cols)
            );
            return Err(self.error(&scale_name, scale, problem));
        };
        self.used.extend([name.to_string(), scale_name]);
        let grid = ScaleGrid { span: scale.span, storage, per_rows, per_cols, group_rows, factor: 1.0 };
        self.insert(name, tensor.shape.clone(), format, tensor, Some(grid))
    }

    fn fp4(&mut self, name: &str, tensor: &'a RawTensor) -> Result<(), CheckpointError> {
        // The name of the tensor, and its shape in codes.
        let blocks = name.strip_suffix("_blocks");
        let base = blocks.or_else(|| name.strip_suffix("_packed")).unwrap_or(name);
        let scale_name = if blocks.is_some() { format!("{base}_scales") } else { format!("{base}_scale") };
        let Some((scale_name, scale)) = self.companion(scale_name) else {
            return Ok(()); // Bytes of some other kind; refused if asked for.
        };
        let mut shape = tensor.shape.clone();
        if blocks.is_some() {
            match shape.pop() {
                Some(16) if !shape.is_empty() => {}
                _ => return Err(self.error(name, tensor, "expected the innermost extent to be 16 bytes")),
            }
        }
        let codes_per_element = match (blocks.is_some(), tensor.dtype) {
            (true, _) => 32,
            (false, Dtype::F4) => 1,
            (false, _) => 2,
        };
        if let Some(cols) = shape.last_mut() {
            *cols = cols
                .checked_mul(codes_per_element)
                .ok_or_else(|| self.error(name, tensor, "the number of columns overflows"))?;
        }
        let (format, storage) = match scale.dtype {
            Dtype::U8 | Dtype::E8m0 => (Format::MXFP4, ScaleStorage::E8m0),
            Dtype::E4m3 => (Format::NVFP4, ScaleStorage::E4m3),
            other => return Err(self.error(&scale_name, scale, format!("FP4 scales of type {other:?}"))),
        };
        let mut expected = shape.clone();
        match expected.last_mut() {
            Some(cols) if *cols % format.block == 0 && *cols > 0 => *cols /= format.block,
            _ => {
                let problem = format!("{shape:?} codes do not divide into blocks of {}", format.block);
                return Err(self.error(name, tensor, problem));
            }
        }
        if scale.shape != expected {
            let problem = format!("scales of shape {:?}, but {shape:?} codes need {expected:?}", scale.shape);
            return Err(self.error(&scale_name, scale, problem));
        }
        let mut factor = 1.0;
        if format.tensor_scale {
            let second = self
                .companion(format!("{base}_scale_2"))
                .or_else(|| self.companion(format!("{base}_global_scale")));
            let Some((second_name, second)) = second else {
                let problem = format!("NVFP4 without a tensor {base}_scale_2 or {base}_global_scale");
                return Err(self.error(name, tensor, problem));
            };
            factor = self.scalar(&second_name, second)?;
            if second_name.ends_with("_global_scale") {
                factor = 1.0 / factor;
            }
            self.used.insert(second_name);
        }
        self.used.extend([name.to_string(), scale_name]);
        let (per_cols, group_rows) = (format.block, usize::MAX);
        let grid = ScaleGrid { span: scale.span, storage, per_rows: 1, per_cols, group_rows, factor };
        self.insert(base, shape, format, tensor, Some(grid))
    }

    fn plain(&mut self, name: &str, tensor: &RawTensor) {
        let code = match tensor.dtype {
            Dtype::F32 => Code::F32,
            Dtype::F16 => Code::F16,
            Dtype::Bf16 => Code::Bf16,
            Dtype::Other(dtype) => return self.refuse(name, tensor, format!("has the type {dtype}")),
            other => return self.refuse(name, tensor, format!("holds {other:?} without its other half")),
        };
        if name.ends_with(".input_scale") || name.ends_with(".input_global_scale") {
            return;
        }
        let info = TensorInfo { shape: tensor.shape.clone(), format: Format { code, ..Format::F32 } };
        let stored = Stored::Planes { codes: tensor.span, scales: None };
        self.joined.tensors.insert(name.to_string(), (info, stored));
    }

    fn refuse(&mut self, name: &str, tensor: &RawTensor, what: String) {
        self.joined.refused.insert(name.to_string(), (tensor.span.file, what));
    }
}
