//! GGUF files: the container, the block types, and the model in the terms of Hugging Face.

mod blocks;
mod container;
mod model;

pub(super) use blocks::BlockType;

use super::error::CheckpointError;
use super::file::MappedFile;
use super::stored::Stored;
use super::{Checkpoint, TokenizerSource};
use std::collections::BTreeMap;
use std::path::Path;
use tilec_ir::tensor::TensorInfo;

pub(super) fn open(path: &Path) -> Result<Checkpoint, CheckpointError> {
    let file = MappedFile::open(path)?;
    let container = container::read(&file, 0)?;
    let model = model::Model::read(&file, &container)?;
    let mut tensors: BTreeMap<String, TensorInfo> = BTreeMap::new();
    let mut stored: BTreeMap<String, Stored> = BTreeMap::new();
    for (name, tensor) in &container.tensors {
        for part in model.parts(name, tensor)? {
            if stored.insert(part.name.clone(), part.stored).is_some() {
                let problem = format!("two tensors of the file become {:?}", part.name);
                return Err(CheckpointError::malformed(path, format_args!("tensor {name:?}"), problem));
            }
            tensors.insert(part.name, part.info);
        }
    }
    Ok(Checkpoint {
        root: path.to_path_buf(),
        config: model.config(&tensors)?,
        generation_config: Some(model.generation_config()?),
        tokenizer_config: None,
        chat_template: model.chat_template()?,
        tokenizer: model.vocabulary()?.map_or(TokenizerSource::None, |v| TokenizerSource::Gguf(Box::new(v))),
        tensors,
        stored,
        refused: BTreeMap::new(),
        files: vec![file],
        synthetic: None,
    })
}
