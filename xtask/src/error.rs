//! One error for all tasks: a message that names the place and the remedy.

use std::fmt;

/// A failed task. Tasks are run by people at a terminal, so the message is all there is.
#[derive(Debug)]
pub struct Error(String);

/// The result of a task.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with the given message.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// Puts what was being done in front of a cause.
pub trait Context<T> {
    /// Turns the cause into `what: cause`. `what` is evaluated only on failure.
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|cause| Error(format!("{}: {cause}", what().into())))
    }
}
