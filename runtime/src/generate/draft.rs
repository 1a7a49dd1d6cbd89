//! Guesses by a draft: which sequences get how many, and what became of them.
//!
//! A round: the draft guesses the tokens behind the last one of a sequence in one pass; one step of the
//! model processes that token and the guesses; from the logits of each row the sampler chooses as it would
//! have chosen without guesses; and as long as a guess is what was chosen, the next row's logits are those
//! of the right text. Every token is thus the model's own, and because neither a row's numbers nor the
//! sampler's random numbers depend on the company of the row, it is the same token as without a draft.
//!
//! On a GPU a step of eight rows takes little longer than one of one row, and one of nine twice as long: so
//! as many sequences as decode share eight rows, and more than four have no guesses.

use super::{Active, Generator, Request};
use crate::engine::{BlockInput, StepError};
use std::time::Duration;

/// What became of guesses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DraftStats {
    /// Rounds by tokens that they added to the text, the model's own last one included: entry `i` is for
    /// `i + 1`. Rounds that the text's end or a limit cut short are not in it.
    pub histogram: Vec<u64>,
    /// All rounds.
    pub rounds: u64,
    /// Tokens that they added.
    pub tokens: u64,
    /// Guesses that were verified.
    pub guesses: u64,
    /// Guesses that were right.
    pub right: u64,
    /// Time for guessing.
    pub draft: Duration,
    /// Time for telling the draft of rows that were committed, but for steps of prompts alone.
    pub inject: Duration,
    /// Time of the model's steps with guesses.
    pub verify: Duration,
}

impl DraftStats {
    /// Tokens that a whole round adds on average, the model's own included; `None` without rounds.
    pub fn acceptance(&self) -> Option<f64> {
        let rounds: u64 = self.histogram.iter().sum();
        let tokens: u64 = (1u64..).zip(&self.histogram).map(|(tokens, rounds)| tokens * rounds).sum();
        (rounds > 0).then(|| tokens as f64 / rounds as f64)
    }

    /// Of each guess of a block, the share of whole rounds in which it and all before it were right.
    pub fn reach(&self) -> Vec<f64> {
        let rounds: u64 = self.histogram.iter().sum();
        let from = |guess: usize| self.histogram[guess..].iter().sum::<u64>() as f64 / rounds.max(1) as f64;
        (1..self.histogram.len()).map(from).collect()
    }

    /// Notes a round of `guesses` guesses of which `right` were right and that added `tokens` tokens;
    /// `whole` if nothing cut it short.
    pub(super) fn note(&mut self, guesses: usize, right: usize, tokens: usize, whole: bool) {
        self.rounds += 1;
        self.tokens += tokens as u64;
        self.guesses += guesses as u64;
        self.right += right as u64;
        if whole {
            if self.histogram.len() < tokens {
                self.histogram.resize(tokens, 0);
            }
            self.histogram[tokens - 1] += 1;
        }
    }

    /// Adds what became of others.
    pub fn add(&mut self, other: &DraftStats) {
        if self.histogram.len() < other.histogram.len() {
            self.histogram.resize(other.histogram.len(), 0);
        }
        for (sum, more) in self.histogram.iter_mut().zip(&other.histogram) {
            *sum += more;
        }
        self.rounds += other.rounds;
        self.tokens += other.tokens;
        self.guesses += other.guesses;
        self.right += other.right;
        self.draft += other.draft;
        self.inject += other.inject;
        self.verify += other.verify;
    }
}

/// Guesses of a sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct Guesses {
    /// The tokens behind the last one.
    pub tokens: Vec<u32>,
    /// Whether the step has a row for every guess that a block has.
    pub whole: bool,
}

impl Generator {
    /// Rows of a block, or 0 if nothing is guessed.
    pub(super) fn block(&self) -> usize {
        match self.engine.draft_block() {
            Some(most) if self.draft_rows >= 2 => most.min(self.draft_rows),
            _ => 0,
        }
    }

    /// Lets the draft guess for the sequences that decode, as far as the next step has room. One entry a
    /// sequence, without tokens where nothing is guessed.
    pub(super) fn guess(
        &mut self,
        active: &[Option<Active>],
        requests: &[Request],
        turn: usize,
    ) -> Result<Vec<Guesses>, StepError> {
        let mut guesses = vec![Guesses::default(); active.len()];
        let block = self.block();
        if block == 0 {
            return Ok(guesses);
        }
        let limits = self.engine.plan().limits;
        let decodes: Vec<usize> = (0..active.len())
            .map(|at| (turn + at) % active.len())
            .filter(|at| active[*at].as_ref().is_some_and(|a| a.tokens.len() == self.history[*at].len() + 1))
            .collect();
        // Guesses beyond what the weights are read once for cost as much as tokens that are not guessed:
        // several sequences share these rows.
        let share = self.engine.pass_rows().map_or(block, |rows| rows / decodes.len().max(1));
        let block = block.min(share);
        if block < 2 {
            return Ok(guesses);
        }
        // Every sequence has a row for its last token; the rest of the step is for guesses.
        let mut room = limits.max_rows.min(self.engine.max_logit_rows()).saturating_sub(decodes.len());
        let mut blocks = Vec::new();
        for sequence in decodes {
            let Some(current) = &active[sequence] else { continue };
            let position = self.history[sequence].len();
            if self.engine.draft_length(sequence) < position {
                continue;
            }
            // A row of the step gives a token at most, and needs a position.
            let left = requests[current.request].max_tokens - (current.tokens.len() - current.prompt);
            let rows = block.min(limits.context - position);
            let wanted = (rows - 1).min(left.saturating_sub(1)).min(room);
            if wanted == 0 {
                continue;
            }
            room -= wanted;
            let token = current.tokens[position];
            guesses[sequence].whole = wanted + 1 == block;
            blocks.push(BlockInput {
                token,
                position: position as u32,
                sequence: sequence as u32,
                rows,
                wanted,
            });
        }
        if !self.make_room(active, &blocks) {
            return Ok(vec![Guesses::default(); active.len()]);
        }
        let most = limits.max_rows / block;
        for blocks in blocks.chunks(most.max(1)) {
            let mut tokens = self.engine.guess(blocks)?.into_iter();
            for block in blocks {
                let own: Vec<Option<u32>> = tokens.by_ref().take(block.wanted).collect();
                // What a broken draft says is no guess.
                guesses[block.sequence as usize].tokens = own.into_iter().map_while(|token| token).collect();
            }
        }
        Ok(guesses)
    }

    /// Whether the cache has pages for blocks; what idle sequences have there makes room.
    fn make_room(&mut self, active: &[Option<Active>], blocks: &[BlockInput]) -> bool {
        let page = self.engine.plan().kv.page_tokens;
        let missing = |generator: &Generator| {
            let missing = |block: &BlockInput| {
                let wanted = (block.position as usize + block.rows).div_ceil(page);
                wanted.saturating_sub(generator.engine.kv().held_pages(block.sequence as usize))
            };
            // The others of the step may need a page each, too.
            blocks.iter().map(missing).sum::<usize>() + active.len()
        };
        if missing(self) > self.engine.kv().free_pages() {
            self.forget_idle(active);
        }
        let held = blocks.iter().all(|block| {
            let wanted = (block.position as usize + block.rows).div_ceil(page);
            wanted <= self.engine.kv().held_pages(block.sequence as usize)
        });
        held || missing(self) <= self.engine.kv().free_pages()
    }
}
