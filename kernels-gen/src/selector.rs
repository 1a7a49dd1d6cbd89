//! Candidates for the next tokens, and what they are worth behind each other. Descriptors.

use crate::KernelError;
use tilec_ir::graph::MAX_CANDIDATES;

/// The tokens of the largest logits; see [`tilec_ir::graph::Op::TopK`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TopK {
    /// Logits of a row.
    pub vocab: usize,
    /// How many tokens.
    pub k: usize,
    /// Multiplied into every logit; above 0.
    pub factor: f32,
    /// Bound of the logits' magnitudes; above 0.
    pub softcap: Option<f32>,
}

impl TopK {
    /// # Errors
    /// No candidates, more than there are tokens or than [`MAX_CANDIDATES`], or more tokens than have numbers.
    pub fn check(&self) -> Result<(), KernelError> {
        if self.k == 0 || self.k > self.vocab.min(MAX_CANDIDATES) || self.vocab > i32::MAX as usize {
            let problem = format!("{} of {} tokens", self.k, self.vocab);
            let remedy = "choose from 1 to 64, and not more than there are";
            return Err(KernelError::shape("top_k", problem, remedy));
        }
        Ok(())
    }

    /// Bytes of private scratch, whatever the number of rows.
    pub const fn scratch_bytes(&self) -> usize {
        // What the candidates are compared by, then one vector of logits.
        (self.k * 4).next_multiple_of(64) + 64
    }
}

/// Scores of pairs; see [`tilec_ir::graph::Op::PairScores`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PairScores {
    /// Candidates of a row.
    pub k: usize,
    /// Columns of the tables.
    pub rank: usize,
}

impl PairScores {
    /// # Errors
    /// No candidates or no columns.
    pub fn check(&self) -> Result<(), KernelError> {
        if self.k == 0 || self.rank == 0 {
            let problem = format!("{} candidates by {} columns", self.k, self.rank);
            return Err(KernelError::shape("pair_scores", problem, "use at least one of each"));
        }
        Ok(())
    }

    /// Elements from a table's row to the next, where rows are gathered.
    pub const fn stride(&self) -> usize {
        self.rank.next_multiple_of(16)
    }

    /// Bytes of the gathered rows of one table.
    pub const fn gathered_bytes(&self) -> usize {
        self.k * self.stride() * 4
    }
}
