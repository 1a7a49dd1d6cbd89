//! Guesses by a draft: which sequences get how many, and what became of them.
//!
//! A round: the draft guesses the tokens behind the last one of a sequence in one pass; one step of the
//! model processes that token and the guesses; from the logits of each row the sampler chooses as it would
//! have chosen without guesses; and as long as a guess is what was chosen, the next row's logits are those
//! of the right text. Every token is thus the model's own, and because neither a row's numbers nor the
//! sampler's random numbers depend on the company of the row, it is the same token as without a draft.
//!
//! On a GPU a step of as many rows as its kernel has takes little longer than one of one row, and one of a
//! row more twice as long: so the sequences that decode share these rows. How many guesses each has of its
//! share, the module `adapt` says.
//!
//! A GPU runs many rounds in one launch, where its kernel can choose all tokens and all sequences have guesses: the
//! module `rounds`.
//!
//! The draft's context follows the text step by step, but for texts that have no guesses for long: those
//! whose request says so, and on a GPU those that are decoded many steps at a time. Before such a text has
//! guesses again it is read again from where the draft's context ends, as a prompt is, which changes nothing
//! of it.

use super::adapt::{Candidate, Company, Pass, choose};
use super::{Active, Generator, Request};
use crate::engine::{BlockInput, StepError};
use crate::sampling::Drawn;
use std::time::{Duration, Instant};

/// How a draft's guesses are chosen, by vLLM's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftSampleMethod {
    /// The most likely token. A guess is right if the model would have chosen that token without it: texts are
    /// the same with a draft and without.
    #[default]
    Greedy,
    /// Drawn from what the draft says at the request's temperature, and verified by rejection sampling (see
    /// [`crate::sampling::Drawn`]): more guesses are right where the model is free to say many things, and texts
    /// have the model's probabilities, but other tokens than without a draft. At temperature 0 as [`Self::Greedy`].
    Probabilistic,
}

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
    /// Whole rounds by guesses that they had: entry `i` is for `i + 1`.
    pub blocks: Vec<u64>,
    /// Tokens that came without a guess because that was faster, or because the request said so.
    pub plain: u64,
    /// Time for guessing.
    pub draft: Duration,
    /// Time for telling the draft of rows that were committed, but for steps of prompts alone.
    pub inject: Duration,
    /// Time of the model's steps with guesses.
    pub verify: Duration,
    /// Time of launches of whole rounds, which is in none of the others.
    pub launch: Duration,
}

impl DraftStats {
    /// Tokens that a whole round adds on average, the model's own included; `None` without rounds.
    pub fn acceptance(&self) -> Option<f64> {
        let rounds: u64 = self.histogram.iter().sum();
        let tokens: u64 = (1u64..).zip(&self.histogram).map(|(tokens, rounds)| tokens * rounds).sum();
        (rounds > 0).then(|| tokens as f64 / rounds as f64)
    }

    /// Of each guess of a block, the share of the whole rounds that had it in which it and all before it were
    /// right.
    pub fn reach(&self) -> Vec<f64> {
        let from = |counts: &[u64], first: usize| counts.iter().skip(first).sum::<u64>() as f64;
        let share = |guess: usize| from(&self.histogram, guess) / from(&self.blocks, guess - 1).max(1.0);
        (1..self.histogram.len()).map(share).collect()
    }

    /// Guesses that a whole round had on average; `None` without rounds.
    pub fn mean_guesses(&self) -> Option<f64> {
        let rounds: u64 = self.blocks.iter().sum();
        let guesses: u64 = (1u64..).zip(&self.blocks).map(|(guesses, rounds)| guesses * rounds).sum();
        (rounds > 0).then(|| guesses as f64 / rounds as f64)
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
            if self.blocks.len() < guesses {
                self.blocks.resize(guesses, 0);
            }
            self.blocks[guesses - 1] += 1;
        }
    }

    /// Adds what became of others.
    pub fn add(&mut self, other: &DraftStats) {
        let counts = [(&mut self.histogram, &other.histogram), (&mut self.blocks, &other.blocks)];
        for (sums, more) in counts {
            if sums.len() < more.len() {
                sums.resize(more.len(), 0);
            }
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
        self.plain += other.plain;
        self.rounds += other.rounds;
        self.tokens += other.tokens;
        self.guesses += other.guesses;
        self.right += other.right;
        self.draft += other.draft;
        self.inject += other.inject;
        self.verify += other.verify;
        self.launch += other.launch;
    }
}

/// What was chosen for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Nothing to choose: it does not decode, or there is no room or nothing left for a guess.
    Nothing,
    /// No guesses.
    Plain,
    /// So many guesses; `whole` unless the text's end left no room for more.
    Guesses { wanted: usize, whole: bool },
}

/// Guesses of a sequence.
#[derive(Clone, Debug, Default)]
pub(super) struct Guesses {
    /// The tokens behind the last one.
    pub tokens: Vec<u32>,
    /// What each of them was drawn from, where they were drawn; else nothing.
    pub drawn: Vec<Drawn>,
    /// Whether the step has a row for every guess that would be verified elsewhere, too.
    pub whole: bool,
    /// Whether there could have been guesses.
    pub plain: bool,
}

impl Generator {
    /// One more than the guesses that a round verifies at most, or 0 if nothing is guessed.
    pub(super) fn block(&self) -> usize {
        match self.engine.draft_block() {
            Some(most) if self.draft_rows >= 2 => most.min(self.draft_rows),
            _ => 0,
        }
    }

    /// Rows of a block at a position: as many as it was trained with, however few of its guesses are wanted.
    /// They see each other, and those of a shorter block are worth less.
    pub(super) fn draft_rows_at(&self, position: usize) -> usize {
        let context = self.engine.plan().limits.context;
        self.engine.draft_block().unwrap_or(0).min(context.saturating_sub(position))
    }

    /// Whether a sequence has one token that was not processed, the last one.
    pub(super) fn decodes(&self, active: &[Option<Active>], sequence: usize) -> bool {
        active[sequence].as_ref().is_some_and(|a| a.tokens.len() == self.history[sequence].len() + 1)
    }

    /// Chooses how many tokens are guessed for each sequence in the next step. What is to have guesses but
    /// the draft does not know is left to be read again first.
    pub(super) fn choose(
        &mut self,
        active: &mut [Option<Active>],
        requests: &[Request],
        turn: usize,
    ) -> Vec<Choice> {
        let mut choice = vec![Choice::Nothing; active.len()];
        let block = self.block();
        if block == 0 {
            return choice;
        }
        let limits = self.engine.plan().limits;
        let order: Vec<usize> = (0..active.len()).map(|at| (turn + at) % active.len()).collect();
        let decodes: Vec<usize> = order.into_iter().filter(|at| self.decodes(active, *at)).collect();
        // Those that may have guesses, how many at most, and as far as their texts go.
        let mut able = Vec::new();
        for &sequence in &decodes {
            let Some(current) = &active[sequence] else { continue };
            let request = &requests[current.request];
            let most = request.draft.get().min(block - 1);
            if most == 0 || current.pace.rest() > 0 && self.draft_min == 0 {
                choice[sequence] = Choice::Plain;
                continue;
            }
            // A row of the step gives a token at most, and needs a position.
            let position = self.history[sequence].len();
            let left = request.max_tokens - (current.tokens.len() - current.prompt);
            let most = most.min(limits.context - position - 1);
            if most >= 1 && left >= 2 {
                able.push((sequence, most, left - 1));
            }
        }
        // Guesses beyond what the weights are read once for cost as much as tokens that are not guessed:
        // several sequences share these rows.
        let others = decodes.len() - able.len();
        let share = match self.engine.pass_rows() {
            Some(rows) => rows.saturating_sub(others) / able.len().max(1),
            None => block,
        };
        if share < 2 || able.is_empty() {
            return choice;
        }
        able.iter_mut().for_each(|(_, most, _)| *most = (*most).min(share - 1));
        // Every sequence has a row for its last token; the rest of the step is for guesses.
        let room = limits.max_rows.min(self.engine.max_logit_rows()).saturating_sub(decodes.len());
        let launch = self.launches(active, requests);
        let blocks =
            able.iter().map(|(sequence, ..)| self.draft_rows_at(self.history[*sequence].len())).sum();
        let rounds = self.launches_rounds(active, requests)
            && decodes
                .iter()
                .all(|at| choice[*at] == Choice::Plain || able.iter().any(|(able, ..)| able == at))
            && decodes.len() <= self.engine.max_round_sequences()
            && self.engine.has_rounds(blocks, decodes.len());
        let company = Company { rows: others, room, launch, rounds };
        let rows = self.draft_rows_at(0);
        let mut paces: Vec<Option<&mut Active>> = active.iter_mut().map(Option::as_mut).collect();
        let mut candidates: Vec<Candidate<'_>> = able
            .iter()
            .filter_map(|&(sequence, most, left)| {
                let most = most.min(left);
                let pace = &mut paces[sequence].take()?.pace;
                Some(Candidate { pace, least: self.draft_min.min(most), most, rows })
            })
            .collect();
        if room == 0 {
            return choice;
        }
        let chosen = choose(&mut candidates, company, &mut self.times);
        for (&(sequence, most, left), guesses) in able.iter().zip(chosen.guesses) {
            let known = self.engine.draft_length(sequence);
            choice[sequence] = match guesses {
                // A step by itself, to see what it takes.
                0 if chosen.trial => Choice::Nothing,
                0 => Choice::Plain,
                // Read again from here on, as a prompt.
                _ if known < self.history[sequence].len() => {
                    self.history[sequence].truncate(known);
                    Choice::Nothing
                }
                wanted => Choice::Guesses { wanted, whole: wanted < left || left >= most },
            };
        }
        choice
    }

    /// Lets the draft guess what was chosen. One entry a sequence, without tokens where nothing is guessed.
    pub(super) fn guess(
        &mut self,
        active: &mut [Option<Active>],
        choice: &[Choice],
    ) -> Result<Vec<Guesses>, StepError> {
        let mut guesses = vec![Guesses::default(); active.len()];
        let mut blocks = Vec::new();
        for (sequence, choice) in choice.iter().enumerate() {
            let (Choice::Guesses { wanted, whole }, Some(current)) = (*choice, &active[sequence]) else {
                guesses[sequence].plain = *choice == Choice::Plain;
                continue;
            };
            let position = self.history[sequence].len();
            guesses[sequence].whole = whole;
            blocks.push(BlockInput {
                token: current.tokens[position],
                position: position as u32,
                sequence: sequence as u32,
                rows: self.draft_rows_at(position),
                wanted,
            });
        }
        let Some(longest) = blocks.iter().map(|block| block.rows).max() else { return Ok(guesses) };
        if !self.make_room(active, &blocks) {
            return Ok(vec![Guesses::default(); active.len()]);
        }
        let most = self.engine.plan().limits.max_rows / longest;
        for blocks in blocks.chunks(most.max(1)) {
            let start = Instant::now();
            let mut tokens = match self.draft_sample_method {
                DraftSampleMethod::Greedy => self.engine.guess(blocks)?,
                DraftSampleMethod::Probabilistic => self.draw(blocks, active, &mut guesses)?,
            }
            .into_iter();
            self.times.note(Pass::Draft, blocks.iter().map(|block| block.rows).sum(), start.elapsed());
            for block in blocks {
                let own: Vec<Option<u32>> = tokens.by_ref().take(block.wanted).collect();
                // What a broken draft says is no guess.
                guesses[block.sequence as usize].tokens = own.into_iter().map_while(|token| token).collect();
            }
        }
        Ok(guesses)
    }

    /// Lets the draft say what it guesses, and draws from that for requests that draw. What each guess was drawn
    /// from is kept with the guesses.
    fn draw(
        &mut self,
        blocks: &[BlockInput],
        active: &mut [Option<Active>],
        guesses: &mut [Guesses],
    ) -> Result<Vec<Option<u32>>, StepError> {
        let draws = |current: &Active| !current.sampler.params().is_greedy();
        let drawing = |block: &BlockInput| active[block.sequence as usize].as_ref().is_some_and(draws);
        if !blocks.iter().any(drawing) {
            return self.engine.guess(blocks);
        }
        self.engine.guess_by(blocks, &mut |block, guess, proposal| {
            let BlockInput { sequence, position, .. } = blocks[block];
            match &mut active[sequence as usize] {
                Some(current) if draws(current) => {
                    let position = u64::from(position) + 1 + guess as u64;
                    let place = current.sampler.guess(proposal.scores(), position)?;
                    guesses[sequence as usize].drawn.push(proposal.drawn());
                    Some(place)
                }
                _ => proposal.best(),
            }
        })
    }

    /// Whether the cache has pages for blocks; what idle sequences have there makes room.
    pub(super) fn make_room(&mut self, active: &[Option<Active>], blocks: &[BlockInput]) -> bool {
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
