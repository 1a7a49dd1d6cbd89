//! Checkpoints: a Hugging Face folder, a GGUF file, or weights made from a seed, behind one interface.
//!
//! Whatever the source, tensors have the names, shapes and row order of Hugging Face's
//! implementations, and the config has the form of their `config.json`. Files are mapped, not read;
//! everything that a file says is checked against its length when it is opened.
//!
//! The files must not be changed or shortened while a checkpoint is open.

mod draft;
mod error;
mod file;
mod gguf;
mod hf;
mod safetensors;
mod stored;
mod synthetic;
#[cfg(test)]
mod tests;

pub use error::{CheckpointError, ErrorKind};
pub use file::FileIdentity;
pub use stored::StoredRows;

use crate::tokenizer::GgufVocab;
use file::MappedFile;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use stored::Stored;
use synthetic::Synthetic;
use tilec_ir::convert::{ConvertError, dequantize};
use tilec_ir::graph::EXPERT;
use tilec_ir::tensor::TensorInfo;

/// Elements that are decoded at a time: the planes of a piece stay in the cache.
const PIECE: usize = 1 << 18;

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    config: Value,
    generation_config: Option<Value>,
    tokenizer_config: Option<Value>,
    chat_template: Option<String>,
    tokenizer: TokenizerSource,
    tensors: BTreeMap<String, TensorInfo>,
    stored: BTreeMap<String, Stored>,
    /// Tensors of types that cannot be computed with: the file and what is the matter.
    refused: BTreeMap<String, (usize, String)>,
    files: Vec<MappedFile>,
    synthetic: Option<u64>,
}

/// Where the tokenizer is.
#[derive(Clone, Debug)]
pub enum TokenizerSource {
    /// A `tokenizer.json`.
    Json {
        /// The file.
        path: PathBuf,
    },
    /// The vocabulary in a GGUF file.
    Gguf(Box<GgufVocab>),
    /// The checkpoint has none.
    None,
}

/// What tells one checkpoint from another, for caches of what is made from it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Identity {
    /// The files that hold the weights.
    Files(Vec<FileIdentity>),
    /// Made from a seed; shapes are part of what is made.
    Synthetic {
        /// The seed.
        seed: u64,
        /// The files of a draft beside it.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        files: Vec<FileIdentity>,
    },
}

impl Checkpoint {
    /// Opens a folder in Hugging Face layout, a `.gguf` file, or a folder that holds one `.gguf` file
    /// and no config.json.
    ///
    /// # Errors
    /// If a file is missing or contradicts itself; the error says which, where and what to do.
    pub fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
        if !path.is_dir() {
            return gguf::open(path);
        }
        if !path.join("config.json").exists() {
            let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
            let mut found = entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "gguf"));
            if let (Some(only), None) = (found.next(), found.next()) {
                return gguf::open(&only);
            }
        }
        hf::open(path)
    }

    /// Weights made from `seed`, in the shapes and formats of `tensors`, for a model of this config. A
    /// tensor whose name has [`EXPERT`] in it stands for one an expert, its first extent for their number.
    pub fn synthetic(config: Value, seed: u64, tensors: BTreeMap<String, TensorInfo>) -> Checkpoint {
        let mut all = BTreeMap::new();
        for (name, info) in tensors {
            match info.shape.split_first() {
                // One an expert, described all at once.
                Some((experts, shape)) if name.contains(EXPERT) => {
                    let of = |expert: usize| name.replace(EXPERT, &expert.to_string());
                    let one = TensorInfo { shape: shape.to_vec(), format: info.format };
                    all.extend((0..*experts).map(|expert| (of(expert), one.clone())));
                }
                _ => drop(all.insert(name, info)),
            }
        }
        let tensors = all;
        let stored = tensors
            .iter()
            .map(|(name, info)| (name.clone(), Stored::Synthetic(Synthetic::new(seed, name, info))))
            .collect();
        Checkpoint {
            root: PathBuf::from(format!("synthetic weights of seed {seed}")),
            config,
            generation_config: None,
            tokenizer_config: None,
            chat_template: None,
            tokenizer: TokenizerSource::None,
            tensors,
            stored,
            refused: BTreeMap::new(),
            files: Vec::new(),
            synthetic: Some(seed),
        }
    }

    /// The folder or file that was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The architecture, in the form of Hugging Face's `config.json`. For GGUF it is derived from the
    /// metadata; factors of rotary frequencies stand in `rope_scaling` with `rope_type` "factors".
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// `generation_config.json`, or for GGUF the special tokens in its form.
    pub fn generation_config(&self) -> Option<&Value> {
        self.generation_config.as_ref()
    }

    /// `tokenizer_config.json`.
    pub fn tokenizer_config(&self) -> Option<&Value> {
        self.tokenizer_config.as_ref()
    }

    /// The Jinja template that turns messages into a prompt.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Where the tokenizer is.
    pub fn tokenizer_source(&self) -> &TokenizerSource {
        &self.tokenizer
    }

    /// Shape and stored format of every tensor, by its Hugging Face name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Shape and stored format of one tensor.
    ///
    /// # Errors
    /// If the checkpoint has no such tensor, or has it in a type that is not supported.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        if let Some(info) = self.tensors.get(name) {
            return Ok(info);
        }
        let place = format!("tensor {name:?}");
        if let Some((file, what)) = self.refused.get(name) {
            let remedy = "convert it to BF16, F16 or F32";
            let path = self.files[*file].path();
            return Err(CheckpointError::new(ErrorKind::Unsupported, path, place, what, remedy));
        }
        let remedy = "check that config and weights belong together";
        Err(CheckpointError::new(
            ErrorKind::Missing,
            &self.root,
            place,
            "there is no tensor of this name",
            remedy,
        ))
    }

    /// Rows of a tensor, outer extents flattened, as planes in the row format of the stored format.
    ///
    /// # Errors
    /// If there is no such tensor or no such rows, or if a scale is NaN or infinite.
    pub fn rows(&self, name: &str, range: Range<usize>) -> Result<StoredRows<'_>, CheckpointError> {
        let info = self.tensor(name)?;
        let rows = info.rows().unwrap_or(0);
        if range.start > range.end || range.end > rows {
            let problem = format!("rows {range:?} of a tensor of {rows} rows, shape {:?}", info.shape);
            let remedy = "compile the model again from this checkpoint";
            return Err(self.fault(name, ErrorKind::Missing, problem, remedy));
        }
        let planes = self.stored[name]
            .rows(&self.files, info, range.clone())
            .map_err(|error| self.convert_fault(name, &error))?;
        let bad = planes.view().map_err(|error| self.convert_fault(name, &error))?.bad_scale();
        if let Some((row, col, min)) = bad {
            let what = if min { "minimum" } else { "scale" };
            let row = range.start + row;
            let problem = format!("the {what} of row {row} from column {col} on is NaN or infinite");
            return Err(self.fault(name, ErrorKind::Value, problem, "quantize the checkpoint again"));
        }
        Ok(planes)
    }

    /// The float32 scale that all of a tensor has on top of its blocks' (NVFP4); `None` if it has none.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn tensor_scale(&self, name: &str) -> Result<Option<f32>, CheckpointError> {
        let info = self.tensor(name)?;
        Ok(self.stored[name].tensor_scale(info))
    }

    /// Rows of a tensor with a [`Checkpoint::tensor_scale`], which is left out: codes and scales as stored.
    ///
    /// # Errors
    /// As [`Checkpoint::rows`].
    pub(crate) fn nvfp4_rows(
        &self,
        name: &str,
        range: Range<usize>,
    ) -> Result<StoredRows<'_>, CheckpointError> {
        // It says what is wrong with the range and with scales.
        self.rows(name, range.clone())?;
        let info = self.tensor(name)?;
        let rows = self.stored[name].under_tensor_scale(&self.files, info, range);
        rows.map_err(|error| self.convert_fault(name, &error))
    }

    /// Columns `columns` of rows of a tensor, as [`Checkpoint::rows`] gives all of them. Columns that begin or
    /// end inside of a block with one scale are given as float32.
    ///
    /// # Errors
    /// As [`Checkpoint::rows`], and if there are no such columns.
    pub fn columns(
        &self,
        name: &str,
        range: Range<usize>,
        columns: Range<usize>,
    ) -> Result<StoredRows<'_>, CheckpointError> {
        let info = self.tensor(name)?;
        if columns.start >= columns.end || columns.end > info.cols() {
            let problem = format!("columns {columns:?} of a tensor of {} columns", info.cols());
            let remedy = "compile the model again from this checkpoint";
            return Err(self.fault(name, ErrorKind::Missing, problem, remedy));
        }
        // Made on demand: what is not wanted need not be made.
        if let (Stored::Synthetic(synthetic), true) =
            (&self.stored[name], range.end <= info.rows().unwrap_or(0) && range.start <= range.end)
            && let Some(rows) = synthetic.columns(info, range.clone(), columns.clone())
        {
            return rows.map_err(|error| self.convert_fault(name, &error));
        }
        let rows = self.rows(name, range)?;
        rows.columns(columns).map_err(|error| self.convert_fault(name, &error))
    }

    /// All elements of a tensor as float32, row-major.
    ///
    /// # Errors
    /// As [`Checkpoint::rows`].
    pub fn tensor_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let info = self.tensor(name)?;
        let Some(elements) = info.elements() else {
            let problem = format!("the shape {:?} overflows", info.shape);
            return Err(self.fault(name, ErrorKind::Malformed, problem, "check the shapes of the model"));
        };
        let (rows, cols) = (info.rows().unwrap_or(0), info.cols());
        let mut out = vec![0.0; elements];
        let step = (PIECE / cols.max(1)).max(1);
        for (start, out) in (0..rows).step_by(step).zip(out.chunks_mut((step * cols).max(1))) {
            let planes = self.rows(name, start..rows.min(start + step))?;
            planes
                .view()
                .and_then(|view| dequantize(&view, out))
                .map_err(|error| self.convert_fault(name, &error))?;
        }
        Ok(out)
    }

    /// What tells this checkpoint from others.
    pub fn identity(&self) -> Identity {
        let files = self.files.iter().map(|file| file.identity.clone()).collect();
        match self.synthetic {
            Some(seed) => Identity::Synthetic { seed, files },
            None => Identity::Files(files),
        }
    }

    /// Gives the memory that holds what was read of the files back to the system.
    pub fn release_pages(&self) {
        self.files.iter().for_each(MappedFile::release);
    }

    /// The file that holds a tensor.
    fn file_of(&self, name: &str) -> &Path {
        let span = match self.stored.get(name) {
            Some(Stored::Planes { codes, .. }) => codes,
            Some(Stored::Blocks { span, .. }) => span,
            _ => return &self.root,
        };
        self.files[span.file].path()
    }

    /// An error about a tensor that exists.
    pub(crate) fn fault(
        &self,
        name: &str,
        kind: ErrorKind,
        problem: impl fmt::Display,
        remedy: &'static str,
    ) -> CheckpointError {
        CheckpointError::new(kind, self.file_of(name), format_args!("tensor {name:?}"), problem, remedy)
    }

    pub(crate) fn convert_fault(&self, name: &str, error: &ConvertError) -> CheckpointError {
        let remedy = "check that the checkpoint is sound, or take its weights as stored";
        self.fault(name, ErrorKind::Value, error, remedy)
    }
}
