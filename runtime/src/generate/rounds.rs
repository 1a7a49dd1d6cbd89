//! Many rounds of a draft in one launch, where a GPU's kernel can choose all tokens and all sequences decode. Those
//! that have no guesses for a while get a token a round. The host only reads tokens, which come round by round while the launch runs. Each
//! sequence has the same number of guesses in all rounds of a launch; the next launch may have another.

use super::adapt::{Pass, PassTimes};
use super::draft::{Choice, DraftSampleMethod};
use super::{Active, Completion, Generator, Piece, Request, StepTime, pass_times};
use crate::engine::{BlockInput, Engine, RoundInput, RoundNews, RoundOptions, StepError};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Rounds of a launch at most. A launch costs a small part of a round, and the number of guesses is chosen anew for
/// each.
pub const LAUNCH_ROUNDS: usize = 32;

/// Predicted seconds of a round from which on the host drives rounds: a kernel by itself hands on rows without waiting
/// for memory, the one of rounds does not, and in a long round that is worth more than the host's part. On an H200
/// 5.04 and 5.20 ms with Qwen3-8B and its draft, but 0.37 and 0.31 ms with mimo-mini.
const LONG_ROUND: f64 = 2e-3;

/// How many rounds of its draft an engine's launches best have: 0 if the host better drives them.
pub fn launch_rounds(engine: &Engine) -> usize {
    if launches(engine, &pass_times(engine)) { LAUNCH_ROUNDS } else { 0 }
}

fn launches(engine: &Engine, times: &PassTimes) -> bool {
    engine.has_rounds(0, 0) && are_short(times)
}

pub(super) fn are_short(times: &PassTimes) -> bool {
    times.predicted(Pass::Round, 1) < LONG_ROUND
}

/// Rounds of a text's first launch, when little is known of its guesses.
const FIRST_ROUNDS: usize = 4;

/// A launch of rounds.
pub(super) struct RoundLaunch {
    inputs: Vec<RoundInput>,
    rounds: usize,
}

impl Generator {
    /// Whether a launch may have many rounds: they are short, all active sequences decode, the kernel can choose their
    /// tokens, and guesses are the draft's most likely tokens: those that are drawn come with what they were drawn from, which is the host's work.
    pub(super) fn launches_rounds(&self, active: &[Option<Active>], requests: &[Request]) -> bool {
        let greedy = |current: &Active| requests[current.request].sampling.is_greedy();
        let drawn = self.draft_sample_method == DraftSampleMethod::Probabilistic;
        launches(&self.engine, &self.times)
            && self.launches(active, requests)
            && (!drawn || active.iter().flatten().all(greedy))
    }

    /// What the next launch is made of, if some active sequence has guesses, the others none on purpose, and a launch can
    /// have them all. Those without guesses come last: each round adds a token to them.
    pub(super) fn rounds_of(
        &mut self,
        active: &[Option<Active>],
        requests: &[Request],
        choice: &[Choice],
    ) -> Option<RoundLaunch> {
        if !self.launches_rounds(active, requests) {
            return None;
        }
        let context = self.engine.plan().limits.context;
        let mut inputs = Vec::new();
        let mut plain = Vec::new();
        let mut rounds = LAUNCH_ROUNDS.min(self.launch_steps);
        // Tokens that a round adds to each, as far as is known.
        let mut expected = Vec::new();
        for (sequence, place) in active.iter().enumerate() {
            let Some(current) = place else { continue };
            let position = self.history[sequence].len();
            let (rows, wanted) = match choice[sequence] {
                Choice::Guesses { wanted, .. } => (self.draft_rows_at(position), wanted),
                Choice::Plain => (0, 0),
                Choice::Nothing => return None,
            };
            let block = BlockInput {
                token: current.tokens[position],
                position: position as u32,
                sequence: sequence as u32,
                rows,
                wanted,
            };
            let left = requests[current.request].max_tokens - (current.tokens.len() - current.prompt);
            if rows == 0 {
                // Until its next guess is due.
                if current.pace.rest() > 0 {
                    rounds = rounds.min(current.pace.rest());
                }
                plain.push(RoundInput { block, left, limit: 0 });
                continue;
            }
            rounds = rounds.min((current.draft.rounds as usize).max(FIRST_ROUNDS));
            expected.push(1.0 + current.pace.chances(wanted).iter().sum::<f64>());
            inputs.push(RoundInput { block, left, limit: 0 });
        }
        if inputs.is_empty() || inputs.len() + plain.len() > self.engine.max_round_sequences() {
            return None;
        }
        expected.extend(plain.iter().map(|_| 1.0));
        inputs.extend(plain);
        let sum = |of: fn(&BlockInput) -> usize| inputs.iter().map(|input| of(&input.block)).sum();
        if !self.engine.has_rounds(sum(|block| block.rows), sum(|block| block.wanted + 1)) {
            return None;
        }
        let blocks: Vec<BlockInput> = inputs.iter().map(|input| input.block).collect();
        if !self.make_room(active, &blocks) {
            return None;
        }
        // Room for what is expected, and for the last block. The launch ends where there is no more.
        let limit = |input: &RoundInput, expected: f64, rounds: usize| {
            let RoundInput { block, left, .. } = input;
            let before = ((rounds - 1) as f64 * expected).ceil() as usize;
            (block.position as usize + before.min(*left) + block.rows.max(1)).min(context)
        };
        let page = self.engine.plan().kv.page_tokens;
        let missing = |generator: &Generator, rounds: usize| {
            let missing = |(input, expected): (&RoundInput, &f64)| {
                let wanted = limit(input, *expected, rounds).div_ceil(page);
                wanted.saturating_sub(generator.engine.kv().held_pages(input.block.sequence as usize))
            };
            inputs.iter().zip(&expected).map(missing).sum::<usize>()
        };
        if missing(self, rounds) > self.engine.kv().free_pages() {
            self.forget_idle(active);
        }
        while rounds > 1 && missing(self, rounds) > self.engine.kv().free_pages() {
            rounds /= 2;
        }
        let limits: Vec<usize> =
            inputs.iter().zip(&expected).map(|(input, expected)| limit(input, *expected, rounds)).collect();
        inputs.iter_mut().zip(limits).for_each(|(input, limit)| input.limit = limit);
        Some(RoundLaunch { inputs, rounds })
    }

    /// Runs a launch of rounds, until the first of its texts ends.
    pub(super) fn rounds(
        &mut self,
        launch: &RoundLaunch,
        requests: &[Request],
        active: &mut [Option<Active>],
        done: &mut [Option<Completion>],
        news: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<StepTime>, StepError> {
        let RoundLaunch { inputs, rounds } = launch;
        let context = self.engine.plan().limits.context;
        let mut sampling = Vec::with_capacity(inputs.len());
        let mut stops = Vec::new();
        for input in inputs {
            let current =
                active[input.block.sequence as usize].as_ref().expect("rounds are of active sequences");
            sampling.push(&requests[current.request].sampling);
            stops.extend(&requests[current.request].stop_tokens);
        }
        stops.sort_unstable();
        stops.dedup();
        let rows: usize = inputs.iter().map(|input| input.block.wanted + 1).sum();
        let mut chosen = vec![Vec::new(); inputs.len()];
        let mut times = Vec::new();
        let start = Instant::now();
        let (mut before, mut there, mut tokens) = (start, start, 0);
        let options = RoundOptions { rounds: *rounds, stop_tokens: &stops, accept: None };
        self.engine.rounds(inputs, &sampling, options, &mut |round| {
            let RoundNews { sequence: number, tokens: added, right, .. } = round;
            if number == 0 {
                (there, tokens) = (Instant::now(), 0);
            }
            let block = &inputs[number].block;
            let place = &mut active[block.sequence as usize];
            let current = place.as_mut().expect("the launch ends with the round of the first that ends");
            let request = &requests[current.request];
            let plain = block.rows == 0;
            // Guesses that could become tokens.
            let left = request.max_tokens - (current.tokens.len() - current.prompt);
            let guessed = block.wanted.min(left - 1);
            let mut finish = None;
            let mut taken = 0;
            for token in added {
                finish = current.accept(*token, None, request, context, news);
                chosen[number].push(*token);
                taken += 1;
                if finish.is_some() {
                    break;
                }
            }
            tokens += taken;
            if plain {
                current.draft.plain += taken as u64;
                current.pace.plain(taken);
            } else if guessed > 0 {
                let right = right.min(taken).min(guessed);
                current.draft.note(guessed, right, taken, guessed == block.wanted && finish.is_none());
                current.pace.round(taken.min(guessed), right, taken);
            }
            let mut flow = ControlFlow::Continue(());
            if let Some(finish) = finish {
                let current = place.take().expect("as above");
                let request = current.request;
                done[request] = Some(current.complete(finish, news));
                flow = ControlFlow::Break(());
            }
            if number + 1 == inputs.len() {
                let now = Instant::now();
                let (step, sampling) = (there - before, now - there);
                let draft = Duration::ZERO;
                times.push(StepTime { rows, logit_rows: rows, tokens, step, draft, sampling });
                before = now;
            }
            flow
        })?;
        if times.len() > 1 {
            self.times.note(Pass::Round, rows, start.elapsed() / times.len() as u32);
        }
        for (input, chosen) in inputs.iter().zip(&chosen) {
            let history = &mut self.history[input.block.sequence as usize];
            history.push(input.block.token);
            // The token that was chosen last was not processed.
            history.extend(&chosen[..chosen.len() - 1]);
        }
        Ok(times)
    }
}
