//! Mapped files and places in them.

use super::error::{CheckpointError, ErrorKind, FETCH_AGAIN};
use memmap2::Mmap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// What tells a file from another of the same name.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FileIdentity {
    /// The file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// When it was last written, in nanoseconds since 1970.
    pub modified: u128,
}

/// A file, mapped for reading.
#[derive(Debug)]
pub(super) struct MappedFile {
    pub identity: FileIdentity,
    map: Mmap,
}

/// A range of bytes of one of the mapped files, checked against its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub file: usize,
    pub start: usize,
    pub len: usize,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<MappedFile, CheckpointError> {
        let io = |what: &str, error: std::io::Error| {
            let kind =
                if error.kind() == std::io::ErrorKind::NotFound { ErrorKind::Missing } else { ErrorKind::Io };
            CheckpointError::new(kind, path, what, error, "check the path, and that the file can be read")
        };
        let file = File::open(path).map_err(|e| io("opening", e))?;
        let metadata = file.metadata().map_err(|e| io("reading its length", e))?;
        if !metadata.is_file() {
            let remedy = "give a .gguf file, or a folder with config.json and .safetensors files";
            return Err(CheckpointError::new(ErrorKind::Io, path, "opening", "not a regular file", remedy));
        }
        if metadata.len() == 0 {
            let error =
                CheckpointError::new(ErrorKind::Malformed, path, "byte 0", "the file is empty", FETCH_AGAIN);
            return Err(error);
        }
        let modified =
            metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        // SAFETY: the map is only ever read as bytes, any of which is valid. That nobody shortens a
        // checkpoint while it is in use is asked of the user, as by every program that maps files.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| io("mapping", e))?;
        let identity =
            FileIdentity { path: path.to_path_buf(), len: metadata.len(), modified: modified.as_nanos() };
        Ok(MappedFile { identity, map })
    }

    pub fn path(&self) -> &Path {
        &self.identity.path
    }

    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Gives the pages that were read back to the system; they are read from the file again if needed.
    pub fn release(&self) {
        // SAFETY: the mapping is read-only and backed by the file, so that a dropped page comes back
        // with the same content.
        let result = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        if let Err(error) = result {
            tracing::debug!(file = %self.path().display(), %error, "pages were not released");
        }
    }
}
