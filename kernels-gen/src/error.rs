//! Why a kernel cannot be generated.

/// Errors of descriptors and builders.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum KernelError {
    /// The descriptor asks for something that the family does not do.
    #[error("{kernel}: {problem}; {remedy}")]
    Shape {
        /// The kernel family.
        kernel: &'static str,
        /// What is wrong.
        problem: String,
        /// What would be accepted.
        remedy: &'static str,
    },
    /// The processor is not one that code can be generated for.
    #[error("target `{target}`: {problem}")]
    Target {
        /// Triple or CPU as given.
        target: String,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// LLVM refused the module.
    #[error("LLVM: {0}")]
    Llvm(String),
}

impl KernelError {
    pub(crate) fn shape(kernel: &'static str, problem: impl Into<String>, remedy: &'static str) -> Self {
        KernelError::Shape { kernel, problem: problem.into(), remedy }
    }
}
