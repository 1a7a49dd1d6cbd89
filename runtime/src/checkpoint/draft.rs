//! Drafts: checkpoints without embedding and head, whose tensors join those of their target.

use super::error::{CheckpointError, ErrorKind};
use super::stored::{ScaleGrid, Stored};
use super::{Checkpoint, hf};
use std::collections::BTreeMap;
use std::path::Path;
use tilec_ir::plan::DRAFT_PREFIX;

/// Other spellings of a draft's tensor names that are published, by their beginnings.
const ALIASES: &[(&str, &str)] = &[
    ("model.", ""),
    ("encoder.fc.", "fc."),
    ("encoder.output_norm_enc.", "hidden_norm."),
    ("midlayer.", "layers.0."),
];

impl Checkpoint {
    /// Opens the folder of a draft: `config.json` and its weights, in `model.safetensors`, in files that
    /// an index names, or in `dflash_draft_model*.safetensors`. Tensors have the names that z-lab's
    /// drafts have, whatever the file calls them.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; also two names for one tensor.
    pub fn open_draft(folder: &Path) -> Result<Checkpoint, CheckpointError> {
        let mut draft = hf::open(folder)?;
        draft.tensors = renamed(std::mem::take(&mut draft.tensors), folder)?;
        draft.stored = renamed(std::mem::take(&mut draft.stored), folder)?;
        draft.refused = renamed(std::mem::take(&mut draft.refused), folder)?;
        Ok(draft)
    }

    /// Adds the tensors of a draft; their names then begin with [`DRAFT_PREFIX`].
    pub fn attach_draft(&mut self, draft: Checkpoint) {
        let first = self.files.len();
        let prefixed = |name: String| format!("{DRAFT_PREFIX}{name}");
        self.tensors.extend(draft.tensors.into_iter().map(|(name, info)| (prefixed(name), info)));
        let stored = draft.stored.into_iter();
        self.stored.extend(stored.map(|(name, stored)| (prefixed(name), moved(stored, first))));
        let refused = draft.refused.into_iter();
        self.refused.extend(refused.map(|(name, (file, what))| (prefixed(name), (file + first, what))));
        self.files.extend(draft.files);
    }
}

/// A tensor whose files are now `first` places further on.
fn moved(stored: Stored, first: usize) -> Stored {
    let shift = |mut span: super::file::Span| {
        span.file += first;
        span
    };
    match stored {
        Stored::Planes { codes, scales } => {
            let scales = scales.map(|grid| ScaleGrid { span: shift(grid.span), ..grid });
            Stored::Planes { codes: shift(codes), scales }
        }
        Stored::Blocks { span, block, rotary_heads } => {
            Stored::Blocks { span: shift(span), block, rotary_heads }
        }
        Stored::Synthetic(synthetic) => Stored::Synthetic(synthetic),
    }
}

fn renamed<T>(named: BTreeMap<String, T>, folder: &Path) -> Result<BTreeMap<String, T>, CheckpointError> {
    let mut all = BTreeMap::new();
    for (name, value) in named {
        let mut own = name.clone();
        for (from, to) in ALIASES {
            if let Some(rest) = own.strip_prefix(from) {
                own = format!("{to}{rest}");
            }
        }
        if all.insert(own.clone(), value).is_some() {
            let problem = format!("another tensor is {own:?} too");
            let remedy = "take the draft's files as they were published";
            let place = format!("tensor {name:?}");
            return Err(CheckpointError::new(ErrorKind::Malformed, folder, place, problem, remedy));
        }
    }
    Ok(all)
}
