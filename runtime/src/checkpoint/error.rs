//! The one error of everything that reads checkpoints.

use std::fmt;
use std::path::{Path, PathBuf};

/// What kind of fault a checkpoint has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The file system refused.
    Io,
    /// The bytes contradict the file format or each other.
    Malformed,
    /// The file is sound, but holds something that is not supported.
    Unsupported,
    /// A file, tensor or key is not there.
    Missing,
    /// A stored value cannot be computed with.
    Value,
}

/// A fault of a checkpoint: the file, the place in it (an offset, a key, a tensor), what is wrong and
/// what to do about it.
#[derive(Debug, thiserror::Error)]
pub struct CheckpointError {
    /// Kind of fault.
    pub kind: ErrorKind,
    /// The file.
    pub file: PathBuf,
    /// Where in the file.
    pub place: String,
    /// What is wrong there.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl fmt::Display for CheckpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CheckpointError { file, place, problem, remedy, .. } = self;
        write!(f, "{}: {place}: {problem}; {remedy}", file.display())
    }
}

/// What helps against a file that is cut short or garbled.
pub(crate) const FETCH_AGAIN: &str = "copy or download the file again";

impl CheckpointError {
    pub(crate) fn new(
        kind: ErrorKind,
        file: &Path,
        place: impl fmt::Display,
        problem: impl fmt::Display,
        remedy: &'static str,
    ) -> CheckpointError {
        let (place, problem) = (place.to_string(), problem.to_string());
        CheckpointError { kind, file: file.to_path_buf(), place, problem, remedy }
    }

    /// A file that contradicts its format.
    pub(crate) fn malformed(
        file: &Path,
        place: impl fmt::Display,
        problem: impl fmt::Display,
    ) -> CheckpointError {
        CheckpointError::new(ErrorKind::Malformed, file, place, problem, FETCH_AGAIN)
    }
}
