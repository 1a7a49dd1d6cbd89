//! Machine code with its resources, and what kernels may use.

use super::{KernelResources, NvrtcError, report};

/// Machine code of one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cubin {
    /// The ELF file that the driver loads.
    pub bytes: Vec<u8>,
    /// What each kernel uses.
    pub resources: Vec<KernelResources>,
    /// What the compiler said, without times: the same text gives the same log.
    pub log: String,
}

/// The most that a kernel may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// 32-bit registers per thread.
    pub registers: u32,
    /// Bytes of stack per thread.
    pub stack: u32,
    /// Bytes of spill stores and spill loads per thread, together.
    pub spills: u32,
}

impl Cubin {
    /// A cubin with the log of its compilation.
    ///
    /// # Errors
    /// [`NvrtcError::Report`] when the log does not say what the kernels use.
    pub(super) fn new(bytes: Vec<u8>, log: &str) -> Result<Cubin, NvrtcError> {
        let log = report::lasting(log);
        Ok(Cubin { bytes, resources: report::kernels(&log)?, log })
    }

    /// What a kernel uses.
    ///
    /// # Errors
    /// [`NvrtcError::NoKernel`].
    pub fn kernel(&self, name: &str) -> Result<&KernelResources, NvrtcError> {
        self.resources.iter().find(|kernel| kernel.name == name).ok_or_else(|| NvrtcError::NoKernel {
            kernel: name.into(),
            there: self.resources.iter().map(|kernel| kernel.name.clone()).collect(),
        })
    }

    /// What the compiler warns of: warnings of the text, and what the assembler had to do that costs time.
    pub fn warnings(&self) -> Vec<&str> {
        report::warnings(&self.log)
    }

    /// Holds kernels to their budgets.
    ///
    /// # Errors
    /// [`NvrtcError::OverBudget`], which names every excess, and [`NvrtcError::NoKernel`].
    pub fn check(&self, budgets: &[(&str, Budget)]) -> Result<(), NvrtcError> {
        let mut over = Vec::new();
        for (name, budget) in budgets {
            let used = self.kernel(name)?;
            let spills = u64::from(used.spill_stores) + u64::from(used.spill_loads);
            for (what, used, most) in [
                ("registers a thread", u64::from(used.registers), budget.registers),
                ("bytes of stack a thread", u64::from(used.stack), budget.stack),
                ("bytes of spills a thread", spills, budget.spills),
            ] {
                if used > u64::from(most) {
                    over.push(format!("{name} uses {used} {what} of {most}"));
                }
            }
        }
        if over.is_empty() { Ok(()) } else { Err(NvrtcError::OverBudget { over }) }
    }
}
