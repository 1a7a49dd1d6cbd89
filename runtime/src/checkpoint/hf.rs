//! A Hugging Face folder: config.json, weights in one or several safetensors files, and what belongs to
//! the tokenizer.

use super::error::{CheckpointError, ErrorKind, FETCH_AGAIN};
use super::file::MappedFile;
use super::safetensors::{self, Fp8Grid, RawTensor};
use super::{Checkpoint, TokenizerSource};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The part of the index that matters.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

pub(super) fn open(folder: &Path) -> Result<Checkpoint, CheckpointError> {
    let config = required_json(&folder.join(CONFIG))?;
    if !config.get("model_type").is_some_and(Value::is_string) {
        return Err(CheckpointError::new(
            ErrorKind::Missing,
            &folder.join(CONFIG),
            "key `model_type`",
            "there is no string of this name",
            "take the config.json that the model was published with",
        ));
    }
    let (files, raw) = weights(folder)?;
    let joined = safetensors::join(&raw, &files, fp8_grid(&folder.join(CONFIG), &config)?)?;
    let mut tensors = BTreeMap::new();
    let mut stored = BTreeMap::new();
    for (name, (info, how)) in joined.tensors {
        tensors.insert(name.clone(), info);
        stored.insert(name, how);
    }
    let tokenizer = folder.join("tokenizer.json");
    let tokenizer_config = optional_json(&folder.join("tokenizer_config.json"))?;
    Ok(Checkpoint {
        root: folder.to_path_buf(),
        chat_template: chat_template(folder, tokenizer_config.as_ref())?,
        generation_config: optional_json(&folder.join("generation_config.json"))?,
        tokenizer: match tokenizer.is_file() {
            true => TokenizerSource::Json { path: tokenizer },
            false => TokenizerSource::None,
        },
        tokenizer_config,
        config,
        tensors,
        stored,
        refused: joined.refused,
        files,
        synthetic: None,
    })
}

/// The files of weights and what their headers say.
fn weights(folder: &Path) -> Result<(Vec<MappedFile>, BTreeMap<String, RawTensor>), CheckpointError> {
    let (index_path, single) = (folder.join(INDEX), folder.join(WEIGHTS));
    let drafts = if single.is_file() || index_path.is_file() { Vec::new() } else { draft_files(folder) };
    if !drafts.is_empty() {
        let mut files = Vec::new();
        let mut tensors = BTreeMap::new();
        for path in drafts {
            let file = MappedFile::open(&path)?;
            for (tensor, raw) in safetensors::read_header(&file, files.len())? {
                if tensors.insert(tensor.clone(), raw).is_some() {
                    let place = format!("tensor {tensor:?}");
                    return Err(CheckpointError::malformed(&path, place, "another file has this tensor too"));
                }
            }
            files.push(file);
        }
        return Ok((files, tensors));
    }
    if single.is_file() || !index_path.is_file() {
        if !single.is_file() {
            return Err(CheckpointError::new(
                ErrorKind::Missing,
                folder,
                WEIGHTS,
                format_args!("there is neither this file nor {INDEX}"),
                "download the weights too, or give the path of a .gguf file",
            ));
        }
        let file = MappedFile::open(&single)?;
        let tensors = safetensors::read_header(&file, 0)?;
        return Ok((vec![file], tensors));
    }
    let index: Index = parse_json(&index_path)?;
    let mut numbers = BTreeMap::new();
    let mut files = Vec::new();
    let mut tensors: BTreeMap<String, RawTensor> = BTreeMap::new();
    for name in index.weight_map.values().collect::<BTreeSet<_>>() {
        let place = format!("file {name:?} in `weight_map`");
        // A name, not a path: an index must not reach out of its folder.
        if Path::new(name).file_name().is_none_or(|file| file != name.as_str()) {
            return Err(CheckpointError::malformed(&index_path, place, "it is not a plain file name"));
        }
        let path = folder.join(name);
        if !path.is_file() {
            let remedy = "download the missing file into the checkpoint's folder";
            let problem = format!("{} is missing", path.display());
            return Err(CheckpointError::new(ErrorKind::Missing, &index_path, place, problem, remedy));
        }
        let file = MappedFile::open(&path)?;
        for (tensor, raw) in safetensors::read_header(&file, files.len())? {
            if tensors.insert(tensor.clone(), raw).is_some() {
                let place = format!("tensor {tensor:?}");
                return Err(CheckpointError::malformed(&path, place, "another file has this tensor too"));
            }
            numbers.insert(tensor, name);
        }
        files.push(file);
    }
    for (tensor, file) in &index.weight_map {
        if numbers.get(tensor) != Some(&file) {
            let problem = format!("{file} does not hold this tensor");
            return Err(CheckpointError::malformed(&index_path, format_args!("tensor {tensor:?}"), problem));
        }
    }
    Ok((files, tensors))
}

/// How scales of block FP8 lie, as the config says.
fn fp8_grid(path: &Path, config: &Value) -> Result<Fp8Grid, CheckpointError> {
    let fused = config.get("attention_projection_layout").and_then(Value::as_str) == Some("fused_qkv");
    let groups = config.get("num_key_value_heads").filter(|_| fused).and_then(Value::as_u64);
    let qkv_groups = groups.and_then(|groups| usize::try_from(groups).ok()).unwrap_or(1);
    Ok(Fp8Grid { block: fp8_block(path, config)?, qkv_groups })
}

/// Files of a draft's weights under the name that MiMo's have, in order.
fn draft_files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> = entries
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("dflash_draft_model") && name.ends_with(".safetensors")
        })
        .collect();
    files.sort();
    files
}

/// Block shape of block FP8, 128 x 128 unless the config says otherwise.
fn fp8_block(path: &Path, config: &Value) -> Result<[usize; 2], CheckpointError> {
    let Some(block) = config.pointer("/quantization_config/weight_block_size").filter(|b| !b.is_null())
    else {
        return Ok([128, 128]);
    };
    let extents: Option<Vec<u64>> = block.as_array().and_then(|b| b.iter().map(Value::as_u64).collect());
    match extents.as_deref() {
        // Packed panels hold whole activation blocks of 32 columns.
        Some(&[rows @ 1..=65536, cols @ 32..=65536]) if cols % 32 == 0 => Ok([rows as usize, cols as usize]),
        _ => Err(CheckpointError::new(
            ErrorKind::Unsupported,
            path,
            "key `quantization_config.weight_block_size`",
            format_args!("{block} is not [rows, columns] with columns a multiple of 32"),
            "use a checkpoint with blocks of 128 x 128",
        )),
    }
}

/// The chat template: a file of its own, or an entry of tokenizer_config.json.
fn chat_template(folder: &Path, config: Option<&Value>) -> Result<Option<String>, CheckpointError> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        return read_text(&path).map(Some);
    }
    let separate = optional_json(&folder.join("chat_template.json"))?;
    let find = |config: &Value| match config.get("chat_template")? {
        Value::String(template) => Some(template.clone()),
        // Several, by name.
        Value::Array(templates) => templates
            .iter()
            .find(|template| template.get("name").and_then(Value::as_str) == Some("default"))?
            .get("template")?
            .as_str()
            .map(str::to_string),
        _ => None,
    };
    Ok(separate.as_ref().and_then(find).or_else(|| config.and_then(find)))
}

/// Longest text file that is read: tokenizers with merges are the largest, at some 30 MB.
const MAX_TEXT: u64 = 256 << 20;

fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let io = |error: std::io::Error| {
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        let kind = if missing { ErrorKind::Missing } else { ErrorKind::Io };
        let remedy = "check that the folder is a complete checkpoint";
        CheckpointError::new(kind, path, "reading", error, remedy)
    };
    if std::fs::metadata(path).map_err(io)?.len() > MAX_TEXT {
        return Err(CheckpointError::malformed(path, "its length", "more than 256 MB of text"));
    }
    let bytes = std::fs::read(path).map_err(io)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        CheckpointError::malformed(path, format_args!("byte {at}"), "not valid UTF-8")
    })
}

fn parse_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    serde_json::from_str(&read_text(path)?).map_err(|error| {
        let place = format!("line {}, column {}", error.line(), error.column());
        CheckpointError::new(ErrorKind::Malformed, path, place, error, FETCH_AGAIN)
    })
}

fn required_json(path: &Path) -> Result<Value, CheckpointError> {
    let value: Value = parse_json(path)?;
    if !value.is_object() {
        return Err(CheckpointError::malformed(path, "line 1", "not a JSON object"));
    }
    Ok(value)
}

fn optional_json(path: &Path) -> Result<Option<Value>, CheckpointError> {
    if path.is_file() { required_json(path).map(Some) } else { Ok(None) }
}
