//! What a draft says of the tokens that come, before one of them is taken.

use crate::sampling::Drawn;

/// What a draft says of one token.
#[derive(Clone, Copy, Debug)]
pub enum Proposal<'a> {
    /// The logits of all tokens.
    Logits(&'a [f32]),
    /// A few tokens, each once, and what each is worth behind the guess before it.
    Candidates {
        /// The tokens.
        tokens: &'a [u32],
        /// A number each, as a logit.
        scores: &'a [f32],
    },
}

impl Proposal<'_> {
    /// A number for each token that may be guessed, as a logit.
    pub fn scores(&self) -> &[f32] {
        match self {
            Proposal::Logits(scores) | Proposal::Candidates { scores, .. } => scores,
        }
    }

    /// The token in a place of [`Proposal::scores`].
    pub fn token(&self, place: usize) -> u32 {
        match self {
            Proposal::Logits(_) => place as u32,
            Proposal::Candidates { tokens, .. } => tokens[place],
        }
    }

    /// A copy of it, for [`crate::sampling::Sampler::take`].
    pub fn drawn(&self) -> Drawn {
        let tokens = match self {
            Proposal::Logits(_) => None,
            Proposal::Candidates { tokens, .. } => Some(tokens.to_vec()),
        };
        Drawn { tokens, scores: self.scores().to_vec() }
    }

    /// The place of the largest number, the first of equals; `None` if one is no number, or none is above
    /// -infinity.
    pub fn best(&self) -> Option<usize> {
        crate::sampling::argmax(self.scores(), 0).ok().map(|place| place as usize)
    }
}

/// Candidates of the guesses of a pass, and the scores of their pairs: see
/// [`tilec_ir::graph::Op::PairScores`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Pairs<'a> {
    /// Candidates of a guess.
    pub k: usize,
    /// `[guesses][k]`.
    pub tokens: &'a [u32],
    /// `[guesses][k before][k]`.
    pub scores: &'a [f32],
}

impl<'a> Pairs<'a> {
    /// What is said of guess `number` behind the candidate in the place `before` of the guess before it. Behind a
    /// token that is known, every place says the same.
    pub fn behind(&self, number: usize, before: usize) -> Proposal<'a> {
        Proposal::Candidates {
            tokens: &self.tokens[number * self.k..][..self.k],
            scores: &self.scores[(number * self.k + before) * self.k..][..self.k],
        }
    }
}
