//! Mixtures of experts: choosing them, and which rows each of them gets. Descriptors.

use crate::KernelError;
use tilec_ir::stages::Routing;

/// Experts of each row and their weights, from a router's scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// Experts to choose from: columns of the scores.
    pub experts: usize,
    /// How.
    pub routing: Routing,
    /// Whether a correction is added for the choice.
    pub correction: bool,
}

impl Route {
    /// # Errors
    /// No expert to choose, or more than there are.
    pub fn check(&self) -> Result<(), KernelError> {
        let top_k = self.routing.top_k;
        if top_k == 0 || top_k > self.experts {
            let problem = format!("{top_k} of {} experts", self.experts);
            return Err(KernelError::shape("route", problem, "choose from 1 to all of them"));
        }
        Ok(())
    }

    /// Experts, padded to whole vectors.
    #[cfg(feature = "llvm")]
    pub(crate) const fn padded(&self) -> usize {
        self.experts.next_multiple_of(16)
    }

    /// Bytes of private scratch, whatever the number of rows.
    pub const fn scratch_bytes(&self) -> usize {
        // Shares and keys of all experts, then the chosen and one place more.
        let padded = self.experts.next_multiple_of(16);
        ((2 * padded + self.routing.top_k + 1) * 4).next_multiple_of(64)
    }
}

/// The slots of a step sorted by expert, as words of 4 bytes: where each expert's slots start
/// (`experts + 1` of them), places for sorting, then for each slot in order the row that it belongs to,
/// and its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertLists {
    /// Experts.
    pub experts: usize,
    /// Slots of a row.
    pub top_k: usize,
    /// Rows that the lists have room for.
    pub max_rows: usize,
}

impl ExpertLists {
    /// Where the places for sorting start, in bytes.
    pub const fn cursors(&self) -> usize {
        (self.experts + 1) * 4
    }

    /// Where the rows start, in bytes.
    pub const fn rows(&self) -> usize {
        (self.cursors() + self.experts * 4).next_multiple_of(64)
    }

    /// Where the weights start, in bytes.
    pub const fn weights(&self) -> usize {
        self.rows() + (self.max_rows * self.top_k * 4).next_multiple_of(64)
    }

    /// Bytes in all.
    pub const fn bytes(&self) -> usize {
        self.weights() + (self.max_rows * self.top_k * 4).next_multiple_of(64)
    }
}
