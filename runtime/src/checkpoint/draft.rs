//! Drafts: checkpoints without embedding and head, whose tensors join those of their target.

use super::error::{CheckpointError, ErrorKind};
use super::file::{MappedFile, Span};
use super::stored::{ScaleGrid, Stored};
use super::{Checkpoint, hf};
use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::path::Path;
use tilec_ir::format::Format;
use tilec_ir::plan::DRAFT_PREFIX;
use tilec_ir::tensor::TensorInfo;

/// Other spellings of a draft's tensor names that are published, by their beginnings.
const ALIASES: &[(&str, &str)] = &[
    ("model.", ""),
    ("encoder.fc.", "fc."),
    ("encoder.output_norm_enc.", "hidden_norm."),
    ("midlayer.", "layers.0."),
    ("candidate_selector.predecessor_codebook.weight", "candidate_selector.predecessor_codebook"),
    ("candidate_selector.successor_codebook.weight", "candidate_selector.successor_codebook"),
];

/// A vector beside the weights: the embedding of a mask, which the target's table has not.
const MASK_EMBEDDING_FILE: &str = "mask_embedding.pt";

/// Its name among the tensors.
const MASK_EMBEDDING: &str = "mask_embedding";

/// Bytes that such a vector, or what describes it, has at most.
const MAX_MASK: u64 = 1 << 22;

impl Checkpoint {
    /// Opens the folder of a draft: `config.json` and its weights, in `model.safetensors`, in files that
    /// an index names, or in `dflash_draft_model*.safetensors`. Tensors have the names that z-lab's
    /// drafts have, whatever the file calls them.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; also two names for one tensor.
    pub fn open_draft(folder: &Path) -> Result<Checkpoint, CheckpointError> {
        let mut draft = hf::open(folder)?;
        let mask = folder.join(MASK_EMBEDDING_FILE);
        if mask.is_file() {
            draft.add_mask_embedding(&mask)?;
        }
        draft.tensors = renamed(std::mem::take(&mut draft.tensors), folder)?;
        draft.stored = renamed(std::mem::take(&mut draft.stored), folder)?;
        draft.refused = renamed(std::mem::take(&mut draft.refused), folder)?;
        Ok(draft)
    }

    /// Adds the vector of a file that PyTorch has written, a dictionary with one tensor in it. The container
    /// says where the numbers lie. Of the pickle that describes them only the name of their type is looked
    /// for: nothing in it is run.
    fn add_mask_embedding(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let malformed =
            |place: &str, problem: &dyn std::fmt::Display| CheckpointError::malformed(path, place, problem);
        let file = MappedFile::open(path)?;
        let mut archive = zip::ZipArchive::new(Cursor::new(file.bytes()))
            .map_err(|error| malformed("the zip container", &error))?;
        let mut pickle = Vec::new();
        let mut storages = Vec::new();
        for index in 0..archive.len() {
            let mut entry =
                archive.by_index(index).map_err(|error| malformed("the zip container", &error))?;
            let name = entry.name().map_err(|error| malformed("the zip container", &error))?.into_owned();
            let own = name.split_once('/').map_or(&name[..], |(_, own)| own);
            let storage = own.strip_prefix("data/").is_some_and(|key| key.parse::<u32>().is_ok());
            if own != "data.pkl" && !storage {
                continue;
            }
            if entry.compression() != zip::CompressionMethod::Stored || entry.size() > MAX_MASK {
                return Err(malformed(
                    &format!("entry {name:?}"),
                    &"compressed, or larger than an embedding",
                ));
            }
            // Reading it whole compares the sum that the container has of it.
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(|error| malformed(&format!("entry {name:?}"), &error))?;
            if storage {
                let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
                let start = start.ok_or_else(|| malformed(&format!("entry {name:?}"), &"lies nowhere"))?;
                storages.push(Span { file: self.files.len(), start, len: bytes.len() });
            } else {
                pickle = bytes;
            }
        }
        let types =
            [("BFloat16Storage", Format::BF16), ("HalfStorage", Format::F16), ("FloatStorage", Format::F32)];
        let named = types.iter().filter(|(name, _)| {
            // A line of its own, behind the module's.
            pickle.windows(name.len() + 2).any(|found| found == format!("\n{name}\n").as_bytes())
        });
        let ([span], [(_, format)]) = (&storages[..], &named.collect::<Vec<_>>()[..]) else {
            let problem = "not one vector of bfloat16, float16 or float32";
            return Err(malformed("data.pkl", &problem));
        };
        let bits = format.code.bits();
        if !(span.len * 8).is_multiple_of(bits) || span.len == 0 || span.start + span.len > file.bytes().len()
        {
            return Err(malformed("the vector's storage", &format_args!("{} bytes", span.len)));
        }
        let info = TensorInfo { shape: vec![span.len * 8 / bits], format: *format };
        self.tensors.insert(MASK_EMBEDDING.into(), info);
        self.stored.insert(MASK_EMBEDDING.into(), Stored::Planes { codes: *span, scales: None });
        self.files.push(file);
        Ok(())
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
    let shift = |mut span: Span| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn demo() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples/mimo-mini/checkpoint/dflash")
    }

    #[test]
    fn the_demos_draft_and_its_mask() {
        let draft = Checkpoint::open_draft(&demo()).unwrap();
        let info = draft.tensor(MASK_EMBEDDING).unwrap();
        assert_eq!((&info.shape[..], info.format), (&[384][..], Format::BF16));
        let mask = draft.tensor_f32(MASK_EMBEDDING).unwrap();
        // Printed by PyTorch.
        assert_eq!(mask[..4], MASK_BEGIN);
        assert_eq!(draft.tensor("fc.weight").unwrap().shape, [384, 1536]);
    }

    const MASK_BEGIN: [f32; 4] = [-95.0 / 2048.0, -33.0 / 256.0, 159.0 / 2048.0, -143.0 / 2048.0];

    /// Every cut and every changed byte is an error or the same vector; never a panic.
    #[test]
    fn damaged_masks_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let copy = |name: &str| {
            std::fs::copy(demo().join(name), folder.path().join(name)).unwrap();
        };
        copy("config.json");
        copy("dflash_draft_model.safetensors");
        let whole = std::fs::read(demo().join(MASK_EMBEDDING_FILE)).unwrap();
        let expected = Checkpoint::open_draft(&demo()).unwrap().tensor_f32(MASK_EMBEDDING).unwrap();
        let open = |bytes: &[u8]| {
            std::fs::write(folder.path().join(MASK_EMBEDDING_FILE), bytes).unwrap();
            Checkpoint::open_draft(folder.path())
        };
        for cut in (0..whole.len()).step_by(61) {
            let error = open(&whole[..cut]).unwrap_err().to_string();
            assert!(error.contains(MASK_EMBEDDING_FILE), "{cut}: {error}");
        }
        let mut refused = 0;
        for at in (0..whole.len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            match open(&bytes) {
                Ok(draft) => assert_eq!(draft.tensor_f32(MASK_EMBEDDING).unwrap(), expected, "byte {at}"),
                Err(error) => {
                    refused += 1;
                    assert!(error.to_string().contains(MASK_EMBEDDING_FILE), "{error}");
                }
            }
        }
        assert!(refused > 150, "{refused}");
    }

    #[test]
    fn two_names_for_one_tensor_are_refused() {
        let names = BTreeMap::from([("fc.weight".to_string(), ()), ("model.fc.weight".to_string(), ())]);
        let error = renamed(names, &demo()).unwrap_err().to_string();
        assert!(error.contains("model.fc.weight") && error.contains("too"), "{error}");
    }
}
