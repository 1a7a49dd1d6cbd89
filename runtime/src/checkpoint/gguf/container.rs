//! The GGUF container, versions 2 and 3, little endian: metadata, tensor descriptions, data.

use super::super::error::{CheckpointError, ErrorKind};
use super::super::file::{MappedFile, Span};
use super::blocks::BlockType;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

/// Longest name or key. The format allows 64 bytes for names; files go beyond.
const MAX_NAME: u64 = 1 << 16;

/// Arrays in arrays that are followed.
const MAX_DEPTH: u32 = 4;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Meta {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<Meta>),
}

impl Meta {
    pub fn kind(&self) -> &'static str {
        match self {
            Meta::Unsigned(_) | Meta::Signed(_) => "an integer",
            Meta::Float(_) => "a float",
            Meta::Bool(_) => "a bool",
            Meta::String(_) => "a string",
            Meta::Array(_) => "an array",
        }
    }
}

/// A tensor as the file describes it, checked against the file.
#[derive(Clone, Debug)]
pub(super) struct GgufTensor {
    /// Outermost extent first (the file has them the other way round).
    pub shape: Vec<usize>,
    pub block: BlockType,
    pub span: Span,
}

/// What a GGUF file says.
#[derive(Debug)]
pub(super) struct Container {
    pub metadata: HashMap<String, Meta>,
    pub tensors: BTreeMap<String, GgufTensor>,
}

/// Reads numbers and strings, and knows where it is.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, what: impl fmt::Display, problem: impl fmt::Display) -> CheckpointError {
        CheckpointError::malformed(self.path, format_args!("{what} at byte {}", self.at), problem)
    }

    fn take(&mut self, n: u64, what: impl fmt::Display) -> Result<&'a [u8], CheckpointError> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(n) {
            Ok(n) if n <= left => {
                self.at += n;
                Ok(&self.bytes[self.at - n..self.at])
            }
            _ => Err(self.error(what, format_args!("{n} bytes are due, the file has {left} more"))),
        }
    }

    fn array<const N: usize>(&mut self, what: impl fmt::Display) -> Result<[u8; N], CheckpointError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: impl fmt::Display) -> Result<u32, CheckpointError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: impl fmt::Display) -> Result<u64, CheckpointError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, limit: u64, what: impl fmt::Display) -> Result<String, CheckpointError> {
        let length = self.u64(&what)?;
        if length > limit {
            return Err(self.error(what, format_args!("a string of {length} bytes")));
        }
        let start = self.at;
        let bytes = self.take(length, &what)?;
        String::from_utf8(bytes.to_vec()).map_err(|error| {
            let at = start + error.utf8_error().valid_up_to();
            CheckpointError::malformed(self.path, format_args!("{what} at byte {at}"), "not valid UTF-8")
        })
    }

    /// A count of things that take at least `least` bytes each: bounded by what the file can hold.
    fn count(&mut self, least: u64, what: &str) -> Result<u64, CheckpointError> {
        let count = self.u64(what)?;
        let left = (self.bytes.len() - self.at) as u64;
        if count > left / least {
            return Err(self.error(what, format_args!("{count} is more than the file's rest can hold")));
        }
        Ok(count)
    }

    /// A value of type `kind`, after the file's numbering.
    fn value(&mut self, kind: u32, key: &str, depth: u32) -> Result<Meta, CheckpointError> {
        let what = format_args!("metadata {key:?}");
        Ok(match kind {
            0 => Meta::Unsigned(self.array::<1>(what)?[0].into()),
            1 => Meta::Signed(i8::from_le_bytes(self.array(what)?).into()),
            2 => Meta::Unsigned(u16::from_le_bytes(self.array(what)?).into()),
            3 => Meta::Signed(i16::from_le_bytes(self.array(what)?).into()),
            4 => Meta::Unsigned(self.u32(what)?.into()),
            5 => Meta::Signed(i32::from_le_bytes(self.array(what)?).into()),
            6 => Meta::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => match self.array::<1>(what)? {
                [byte @ 0..=1] => Meta::Bool(byte == 1),
                [byte] => return Err(self.error(what, format_args!("{byte} is no bool"))),
            },
            8 => Meta::String(self.string(u64::MAX, what)?),
            9 => {
                let kind = self.u32(what)?;
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                if depth >= MAX_DEPTH {
                    return Err(
                        self.error(what, format_args!("arrays are nested more than {MAX_DEPTH} deep"))
                    );
                }
                let count = self.count(least, &what.to_string())?;
                // Not reserved in advance: a value takes more memory here than in the file.
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, key, depth + 1)?);
                }
                Meta::Array(values)
            }
            10 => Meta::Unsigned(self.u64(what)?),
            11 => Meta::Signed(i64::from_le_bytes(self.array(what)?)),
            12 => Meta::Float(f64::from_le_bytes(self.array(what)?)),
            other => return Err(self.error(what, format_args!("{other} is no type of value"))),
        })
    }
}

/// Reads the file that is number `index` of the checkpoint.
pub(super) fn read(file: &MappedFile, index: usize) -> Result<Container, CheckpointError> {
    let path = file.path();
    let mut reader = Reader { path, bytes: file.bytes(), at: 0 };
    let refuse = |place: &str, problem: String, remedy| {
        Err(CheckpointError::new(ErrorKind::Unsupported, path, place, problem, remedy))
    };
    if &reader.array::<4>("magic")? != b"GGUF" {
        let problem = "the file does not begin with \"GGUF\"".to_string();
        return refuse("byte 0", problem, "give a .gguf file, or a folder with config.json");
    }
    match reader.u32("version")? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            let remedy = "convert the model again on a little-endian machine";
            return refuse("byte 4", "the file is big-endian".into(), remedy);
        }
        version => {
            let problem = format!("version {version} of GGUF; 2 and 3 are supported");
            return refuse("byte 4", problem, "convert the model again with a current converter");
        }
    }
    // A description takes at least a length, an extent count, a type and an offset; a key at least a
    // length, a type and a byte.
    let tensor_count = reader.count(24, "number of tensors")?;
    let key_count = reader.count(13, "number of metadata keys")?;

    let mut metadata = HashMap::new();
    for i in 0..key_count {
        let key = reader.string(MAX_NAME, format_args!("metadata key {i}"))?;
        let kind = reader.u32(format_args!("type of metadata {key:?}"))?;
        let value = reader.value(kind, &key, 0)?;
        if metadata.contains_key(&key) {
            return Err(reader.error(format_args!("metadata {key:?}"), "the key is used twice"));
        }
        metadata.insert(key, value);
    }
    if let Some(Meta::Unsigned(2..)) = metadata.get("split.count") {
        let remedy = "merge the parts into one file (llama-gguf-split --merge)";
        return refuse("metadata \"split.count\"", "the model is split over several files".into(), remedy);
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Meta::Unsigned(n)) if n.is_power_of_two() && (8..=1 << 20).contains(n) => *n,
        Some(other) => {
            let problem = format!("{other:?} is not a power of two from 8 to 1048576");
            return Err(CheckpointError::malformed(path, "metadata \"general.alignment\"", problem));
        }
    };

    let mut descriptions = BTreeMap::new();
    for i in 0..tensor_count {
        let name = reader.string(MAX_NAME, format_args!("name of tensor {i}"))?;
        let place = format!("tensor {name:?}");
        let extents = reader.u32(&place)?;
        if !(1..=4).contains(&extents) {
            return Err(reader.error(place, format_args!("{extents} extents; 1 to 4 are possible")));
        }
        let mut shape = Vec::new();
        for _ in 0..extents {
            shape.push(reader.u64(&place)?);
        }
        shape.reverse();
        let number = reader.u32(&place)?;
        let offset = reader.u64(&place)?;
        let block = BlockType::from_number(number).map_err(|problem| {
            let remedy = "convert it to Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, MXFP4, BF16, F16 or F32";
            CheckpointError::new(ErrorKind::Unsupported, path, &place, problem, remedy)
        })?;
        if descriptions.insert(name, (shape, block, offset)).is_some() {
            return Err(reader.error(place, "the name is used twice"));
        }
    }

    let data = (reader.at as u64).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    let mut spans = Vec::new();
    for (name, (shape, block, offset)) in descriptions {
        let place = format!("tensor {name:?}");
        let span = span(&shape, block, offset, data, alignment, file.bytes().len() as u64)
            .map_err(|problem| CheckpointError::malformed(path, &place, problem))?;
        spans.push((span.start, span.start + span.len, name.clone()));
        let shape = shape.iter().map(|&n| n as usize).collect();
        tensors.insert(name, GgufTensor { shape, block, span: Span { file: index, ..span } });
    }
    spans.sort();
    for pair in spans.windows(2) {
        if pair[1].0 < pair[0].1 {
            let problem = format!("it starts at byte {}, inside tensor {:?}", pair[1].0, pair[0].2);
            return Err(CheckpointError::malformed(path, format_args!("tensor {:?}", pair[1].2), problem));
        }
    }
    Ok(Container { metadata, tensors })
}

/// Where a tensor's data lies, all sizes checked.
fn span(
    shape: &[u64],
    block: BlockType,
    offset: u64,
    data: u64,
    alignment: u64,
    file: u64,
) -> Result<Span, String> {
    let (elements, bytes) = block.size();
    let cols = shape.last().copied().unwrap_or(0);
    if shape.contains(&0) {
        return Err(format!("the shape {shape:?} has no element"));
    }
    if !cols.is_multiple_of(elements as u64) {
        return Err(format!("rows of {cols} elements do not divide into blocks of {elements}"));
    }
    let count = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n));
    let len = count.and_then(|n| (n / elements as u64).checked_mul(bytes as u64));
    let Some(len) = len.filter(|&len| usize::try_from(len).is_ok()) else {
        return Err(format!("the shape {shape:?} overflows"));
    };
    if !offset.is_multiple_of(alignment) {
        return Err(format!("the offset {offset} is no multiple of the alignment {alignment}"));
    }
    let start = data.checked_add(offset);
    match start.and_then(|start| Some((start, start.checked_add(len)?))) {
        Some((start, end)) if end <= file => Ok(Span { file: 0, start: start as usize, len: len as usize }),
        _ => Err(format!(
            "its {len} bytes from {offset} bytes after the data's start at {data} end past the file's {file} bytes"
        )),
    }
}
