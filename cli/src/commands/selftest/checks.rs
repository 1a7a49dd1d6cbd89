//! What is checked of a case on the GPU.

use super::cases::{CONTEXT, Case, Random, SEQUENCES};
use super::compare::{deviation, finite, same_bits};
use super::prepare::{Prepared, WORST};
use std::ops::ControlFlow;
use tilec_runtime::engine::{BlockInput, Engine, RoundInput, RoundOptions, RowInput, StepError};
use tilec_runtime::sampling::{Sampler, SamplingParams};

/// Tokens that each sequence decodes in a check.
pub(super) const DECODED: usize = 24;

/// Positions of the sequences that share a step, the row of that step included: chunks of attention end
/// at 128.
pub(super) const LENGTHS: [usize; SEQUENCES] =
    [1, 127, 128, 129, 300, 2, 257, 64, 33, 5, 140, 1, 128, 255, 90, 17];

/// Name of the check against the reference.
pub const PROMPT: &str = "prompt against the interpreter";

/// Name of the check of a draft against the reference.
pub const BLOCKS: &str = "draft's blocks against the interpreter";

/// Sizes of the steps that a prompt is cut into: whole passes, and less and more.
const CUTS: [usize; 9] = [1, 7, 8, 9, 3, 16, 5, 17, 31];

/// What rounds added: by round, the tokens of each sequence.
pub type Added = Vec<Vec<Vec<u32>>>;

/// What the checks need of an engine; tests have one that runs the interpreter.
pub trait Machine {
    /// [`Engine::step`].
    fn step(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<Vec<f32>, StepError>;

    /// [`Engine::decode_sampled`].
    fn decode(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        steps: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) -> Result<usize, StepError>;

    /// [`Engine::reset`].
    fn reset(&mut self, sequence: usize);

    /// [`Engine::length`].
    fn length(&self, sequence: usize) -> usize;

    /// [`Engine::poison`].
    fn poison(&mut self) -> Result<(), StepError>;

    /// [`Engine::inject`].
    fn inject(&mut self, rows: &[u32]) -> Result<(), StepError>;

    /// [`Engine::draft`].
    fn draft(&mut self, blocks: &[BlockInput]) -> Result<Vec<f32>, StepError>;

    /// [`Engine::guess`], of blocks that were just drafted: their logits.
    fn guess(&mut self, blocks: &[BlockInput], logits: &[f32], vocab: usize) -> Result<Vec<u32>, StepError> {
        let _ = blocks;
        Ok(logits.chunks_exact(vocab).map(largest).collect())
    }

    /// [`Engine::step_sampled`], of rows that were just run, all of them wanted; `chosen` is what the host made of
    /// their logits.
    fn step_sampled(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        chosen: &[u32],
    ) -> Result<Vec<u32>, StepError> {
        let _ = (rows, sampling);
        Ok(chosen.to_vec())
    }

    /// [`Engine::rounds`]: by round, the tokens of each sequence.
    fn rounds(
        &mut self,
        inputs: &[RoundInput],
        sampling: &[&SamplingParams],
        options: RoundOptions<'_>,
        vocab: usize,
    ) -> Result<Added, StepError>;
}

impl Machine for Engine {
    fn step(&mut self, rows: &[RowInput], logit_rows: &[u32]) -> Result<Vec<f32>, StepError> {
        Engine::step(self, rows, logit_rows).map(<[f32]>::to_vec)
    }

    fn decode(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        steps: usize,
        stop_tokens: &[u32],
        on_token: &mut dyn FnMut(usize, usize, u32) -> ControlFlow<()>,
    ) -> Result<usize, StepError> {
        Engine::decode_sampled(self, rows, sampling, steps, stop_tokens, on_token)
    }

    fn reset(&mut self, sequence: usize) {
        Engine::reset(self, sequence);
    }

    fn length(&self, sequence: usize) -> usize {
        Engine::length(self, sequence)
    }

    fn poison(&mut self) -> Result<(), StepError> {
        Engine::poison(self)
    }

    fn inject(&mut self, rows: &[u32]) -> Result<(), StepError> {
        Engine::inject(self, rows)
    }

    fn draft(&mut self, blocks: &[BlockInput]) -> Result<Vec<f32>, StepError> {
        Engine::draft(self, blocks).map(<[f32]>::to_vec)
    }

    fn guess(&mut self, blocks: &[BlockInput], _: &[f32], _: usize) -> Result<Vec<u32>, StepError> {
        // No token is so large.
        let tokens = Engine::guess(self, blocks)?.into_iter();
        Ok(tokens.map(|token| token.unwrap_or(u32::MAX)).collect())
    }

    fn step_sampled(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        _: &[u32],
    ) -> Result<Vec<u32>, StepError> {
        Engine::step_sampled(self, rows, &(0..rows.len() as u32).collect::<Vec<_>>(), sampling)
    }

    fn rounds(
        &mut self,
        inputs: &[RoundInput],
        sampling: &[&SamplingParams],
        options: RoundOptions<'_>,
        _: usize,
    ) -> Result<Added, StepError> {
        let mut rounds = Added::new();
        Engine::rounds(self, inputs, sampling, options, &mut |news| {
            rounds.resize(news.round + 1, Vec::new());
            rounds[news.round].push(news.tokens.to_vec());
            ControlFlow::Continue(())
        })?;
        Ok(rounds)
    }
}

/// A check and how it came out.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Name of the case.
    pub case: String,
    /// Rows that were compared.
    pub rows: usize,
    /// What was looked at.
    pub what: &'static str,
    /// Relative deviation, where a reference was compared with: the root of the mean square over rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
    /// That of the worst row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst: Option<f64>,
    /// What the deviation may be ([`WORST`] times that in a row); none where bits have to be equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<f64>,
    /// What is wrong; `None`: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Why a check did not come to its end.
#[derive(Debug)]
pub enum Stop {
    /// The numbers are wrong.
    Wrong(String),
    /// The engine refused or failed.
    Engine(StepError),
}

impl From<String> for Stop {
    fn from(what: String) -> Stop {
        Stop::Wrong(what)
    }
}

impl From<StepError> for Stop {
    fn from(error: StepError) -> Stop {
        Stop::Engine(error)
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::Wrong(what) => f.write_str(what),
            Stop::Engine(error) => error.fmt(f),
        }
    }
}

/// How the checks of a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The next case can be run.
    GoOn,
    /// The GPU or its driver is in a state that this process cannot end.
    GiveUp,
}

/// Runs all checks of a case. A check whose engine failed ends the case: the engine does nothing more.
///
/// The first runs on memory that is zero, the others on memory that is not a number, filled anew before
/// each check that starts from nothing.
pub fn run(
    case: &Case,
    prepared: &Prepared,
    machine: &mut dyn Machine,
    repeats: usize,
    outcomes: &mut Vec<Outcome>,
) -> After {
    let (whole, alone, drafted) = (Vec::new(), Vec::new(), Vec::new());
    let mut bench = Bench { case, prepared, machine, whole, alone, drafted };
    type Check = fn(&mut Bench<'_>, usize) -> Checked;
    let mut checks: Vec<(&'static str, Check)> = vec![
        (PROMPT, |bench, _| bench.prompt()),
        ("prompt on poisoned memory, same bits", |bench, _| bench.cut(&[usize::MAX])),
        ("prompt row by row, same bits", |bench, _| bench.cut(&[1])),
        ("prompt in odd steps, same bits", |bench, _| bench.cut(&CUTS)),
        ("sequences alone", |bench, _| bench.alone()),
        ("in company at any place, same bits", |bench, _| bench.company()),
        ("decoding in one launch, same tokens", |bench, _| bench.decode()),
        ("sampling in one launch, same tokens", |bench, _| bench.sample()),
        ("stop tokens and breaks", |bench, _| bench.stops()),
        ("repeats, same bits", |bench, repeats| bench.repeats(repeats)),
    ];
    if case.draft.is_some() {
        checks.extend([
            (BLOCKS, (|bench, _| bench.blocks()) as Check),
            ("context in odd steps, same blocks", |bench, _| bench.draft_cut()),
            ("blocks in company, same bits", |bench, _| bench.draft_company()),
            ("rounds, same tokens and same context", |bench, _| bench.rounds()),
            ("rounds in one launch, same tokens", |bench, _| bench.launched_rounds()),
        ]);
    }
    for (what, check) in checks {
        let result = check(&mut bench, repeats);
        let (measured, stop) = match result {
            Ok(measured) => (measured, None),
            Err((measured, stop)) => (measured, Some(stop)),
        };
        outcomes.push(Outcome {
            case: case.name.clone(),
            rows: measured.rows,
            what,
            error: measured.error,
            worst: measured.worst,
            bound: measured.bound,
            problem: stop.as_ref().map(Stop::to_string),
        });
        match stop {
            Some(Stop::Engine(StepError::Silent { .. } | StepError::Cuda(_))) => return After::GiveUp,
            Some(Stop::Engine(_)) => return After::GoOn,
            // Nothing to compare with is left.
            Some(_) if bench.whole.is_empty() || what == BLOCKS => return After::GoOn,
            _ => {}
        }
    }
    After::GoOn
}

/// What a check looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Measured {
    pub(super) rows: usize,
    pub(super) error: Option<f64>,
    pub(super) worst: Option<f64>,
    pub(super) bound: Option<f64>,
}

pub(super) type Checked = Result<Measured, (Measured, Stop)>;

/// A case on an engine.
pub(super) struct Bench<'a> {
    pub(super) case: &'a Case,
    pub(super) prepared: &'a Prepared,
    pub(super) machine: &'a mut dyn Machine,
    /// Logits of the prompt, run in one step on zeroed memory.
    whole: Vec<f32>,
    /// Logits of the last row of each of [`LENGTHS`], run alone.
    alone: Vec<f32>,
    /// Logits of the draft's blocks, in the order of the reference.
    pub(super) drafted: Vec<Vec<f32>>,
}

/// Ends a check early with what it has looked at so far.
pub(super) fn ended(rows: usize) -> impl Fn(Stop) -> (Measured, Stop) {
    move |stop| (Measured { rows, ..Measured::default() }, stop)
}

impl Bench<'_> {
    /// A step whose rows all want logits.
    pub(super) fn step(&mut self, rows: &[RowInput]) -> Result<Vec<f32>, Stop> {
        let wanted: Vec<u32> = (0..rows.len() as u32).collect();
        let logits = self.machine.step(rows, &wanted)?;
        finite("a step's logits", &logits, self.case.vocab)?;
        Ok(logits)
    }

    /// Runs the prompt in steps of these sizes, over and over, in sequence 0; all logits.
    fn feed(&mut self, sizes: &[usize]) -> Result<Vec<f32>, Stop> {
        self.machine.reset(0);
        let rows = sequence_rows(0, 0, &self.prepared.prompt);
        let mut logits = Vec::with_capacity(rows.len() * self.case.vocab);
        let (mut rest, mut sizes) = (&rows[..], sizes.iter().cycle());
        while !rest.is_empty() {
            let (step, after) = rest.split_at(rest.len().min(*sizes.next().unwrap_or(&1)));
            logits.extend(self.step(step)?);
            rest = after;
        }
        Ok(logits)
    }

    fn prompt(&mut self) -> Checked {
        let rows = self.prepared.prompt.len();
        self.whole = self.feed(&[rows]).map_err(ended(rows))?;
        let found = deviation(
            &self.whole,
            &self.prepared.reference,
            self.case.vocab,
            self.case.undecided(self.prepared.prompt.len()),
        );
        let found = found.map_err(|what| ended(rows)(Stop::Wrong(what)))?;
        let bound = Some(self.prepared.bound);
        let measured = Measured { rows, error: Some(found.typical), worst: Some(found.worst), bound };
        if found.worst > WORST * self.prepared.bound {
            let what = format!("row {} is off by {:.2e} of its size", found.row, found.worst);
            return Err((measured, Stop::Wrong(what)));
        }
        if found.typical > self.prepared.bound {
            let what = format!("rows are off by {:.2e} of their size", found.typical);
            return Err((measured, Stop::Wrong(what)));
        }
        Ok(measured)
    }

    fn cut(&mut self, sizes: &[usize]) -> Checked {
        let rows = self.prepared.prompt.len();
        let check = |bench: &mut Self| -> Result<(), Stop> {
            bench.machine.poison()?;
            let cut = bench.feed(sizes)?;
            Ok(same_bits(&cut, &bench.whole, bench.case.vocab)?)
        };
        check(self).map_err(ended(rows))?;
        Ok(Measured { rows, ..Measured::default() })
    }

    /// The last row of each of [`LENGTHS`]: token, position, sequence.
    fn last_rows(&self) -> Vec<RowInput> {
        let last = |(sequence, length): (usize, &usize)| {
            let tokens = self.tokens(sequence);
            RowInput { token: tokens[length - 1], position: (length - 1) as u32, sequence: sequence as u32 }
        };
        LENGTHS.iter().enumerate().map(last).collect()
    }

    /// The tokens of one of the sequences that share steps.
    fn tokens(&self, sequence: usize) -> Vec<u32> {
        self.case.tokens(100 + sequence as u64, CONTEXT)
    }

    /// Fills the sequences up to their last rows, and runs each of these alone.
    fn alone(&mut self) -> Checked {
        let rows = LENGTHS.len();
        let check = |bench: &mut Self| -> Result<(), Stop> {
            bench.machine.poison()?;
            bench.alone.clear();
            for (sequence, length) in LENGTHS.iter().enumerate() {
                bench.machine.reset(sequence);
                if *length > 1 {
                    let tokens = &bench.tokens(sequence)[..length - 1];
                    bench.machine.step(&sequence_rows(sequence as u32, 0, tokens), &[])?;
                }
            }
            for row in bench.last_rows() {
                let logits = bench.step(&[row])?;
                bench.alone.extend(logits);
            }
            Ok(())
        };
        check(self).map_err(ended(rows))?;
        Ok(Measured { rows, ..Measured::default() })
    }

    /// The last rows in steps with others, at every place of a pass, and behind rows of a prompt.
    fn company(&mut self) -> Checked {
        let vocab = self.case.vocab;
        let last = self.last_rows();
        let mut orders: Vec<Vec<usize>> =
            (0..SEQUENCES).map(|by| (0..SEQUENCES).map(|place| (place + by) % SEQUENCES).collect()).collect();
        orders.push((0..SEQUENCES).rev().collect());
        orders.push(vec![4, 1]);
        orders.push(vec![3, 0, 6]);
        let mut rows = 0;
        for order in &orders {
            let step: Vec<RowInput> = order.iter().map(|sequence| last[*sequence]).collect();
            rows += step.len();
            let wanted: Vec<f32> =
                order.iter().flat_map(|n| &self.alone[n * vocab..][..vocab]).copied().collect();
            let check = |bench: &mut Self| -> Result<(), Stop> {
                let found = bench.step(&step)?;
                same_bits(&found, &wanted, vocab)
                    .map_err(|what| Stop::Wrong(format!("sequences {order:?} in one step: {what}")))
            };
            check(self).map_err(ended(rows))?;
        }
        // Rows of a prompt that end inside of a pass move the others to a later one: sequence 5 begins
        // anew, with more and more rows.
        let others = [4, 0, 3, 2, 1, 7, 6];
        for before in [2, 7, 9, 13, 25] {
            let tokens = self.tokens(5);
            let mut step = sequence_rows(5, 0, &tokens[..before]);
            step.extend(others.iter().map(|sequence| last[*sequence]));
            rows += step.len();
            let wanted: Vec<f32> =
                others.iter().flat_map(|n| &self.alone[n * vocab..][..vocab]).copied().collect();
            let check = |bench: &mut Self| -> Result<(), Stop> {
                let found = bench.step(&step)?;
                let (prompt, found) = found.split_at(before * vocab);
                // Its second row is the one that was run alone.
                let n = 5 * vocab;
                same_bits(&prompt[vocab..2 * vocab], &bench.alone[n..n + vocab], vocab)
                    .and_then(|()| same_bits(found, &wanted, vocab))
                    .map_err(|what| Stop::Wrong(format!("{before} rows of a prompt before others: {what}")))
            };
            check(self).map_err(ended(rows))?;
        }
        // As before for the checks that follow: sequence 5 has two positions.
        self.machine.reset(5);
        let tokens = self.tokens(5);
        self.machine
            .step(&sequence_rows(5, 0, &tokens[..LENGTHS[5]]), &[])
            .map_err(|error| ended(rows)(error.into()))?;
        Ok(Measured { rows, ..Measured::default() })
    }

    /// The tokens that each of the rows' sequences decodes step by step, chosen as [`choose`] says, `[steps][rows]`.
    pub(super) fn stepwise(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        steps: usize,
    ) -> Result<Vec<Vec<u32>>, Stop> {
        let mut rows = rows.to_vec();
        let mut chosen = Vec::new();
        for _ in 0..steps {
            let logits = self.step(&rows)?;
            let tokens = choose(&rows, sampling, &logits, self.case.vocab)?;
            for (row, token) in rows.iter_mut().zip(&tokens) {
                (row.token, row.position) = (*token, row.position + 1);
            }
            chosen.push(tokens);
        }
        Ok(chosen)
    }

    /// The tokens of a launch, `[steps][rows]`, with the number of steps that the engine says it ran.
    /// The callback breaks in the step `until`.
    fn launch(
        &mut self,
        rows: &[RowInput],
        sampling: &[&SamplingParams],
        steps: usize,
        stop_tokens: &[u32],
        until: Option<usize>,
    ) -> Result<Vec<Vec<u32>>, Stop> {
        let mut chosen: Vec<Vec<u32>> = Vec::new();
        let mut misplaced = None;
        let done = self.machine.decode(rows, sampling, steps, stop_tokens, &mut |step, row, token| {
            if row == 0 {
                chosen.push(Vec::new());
            }
            match chosen.last_mut() {
                Some(of_step) if of_step.len() == row => of_step.push(token),
                _ => misplaced = Some((step, row)),
            }
            match until {
                Some(until) if until == step => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        })?;
        if let Some((step, row)) = misplaced {
            return Err(Stop::Wrong(format!("row {row} of step {step} was told of out of order")));
        }
        if done != chosen.len() || chosen.iter().any(|tokens| tokens.len() != rows.len()) {
            let told: usize = chosen.iter().map(Vec::len).sum();
            return Err(Stop::Wrong(format!("{done} steps of {} rows, {told} tokens told of", rows.len())));
        }
        for row in rows {
            let (length, wanted) = (self.machine.length(row.sequence as usize), row.position as usize + done);
            if length != wanted {
                return Err(Stop::Wrong(format!("a sequence has {length} positions in place of {wanted}")));
            }
        }
        Ok(chosen)
    }

    /// Sequences that a launch decodes.
    fn together(&self) -> usize {
        self.case.pass_rows.min(SEQUENCES)
    }

    fn decode(&mut self) -> Checked {
        let last = self.last_rows();
        let mut rows = 0;
        for picked in [vec![0], vec![4], vec![3, 1, 6], (0..self.together()).collect()] {
            let step: Vec<RowInput> = picked.iter().map(|sequence| last[*sequence]).collect();
            rows += DECODED * step.len();
            let check = |bench: &mut Self| -> Result<(), Stop> {
                let wanted = bench.stepwise(&step, &[], DECODED)?;
                let found = bench.launch(&step, &[], DECODED, &[], None)?;
                Ok(same_tokens(&found, &wanted).map_err(|what| format!("sequences {picked:?}: {what}"))?)
            };
            check(self).map_err(ended(rows))?;
        }
        Ok(Measured { rows, ..Measured::default() })
    }

    /// As [`Bench::decode`], by chance: rows of a launch have parameters of their own, some are greedy.
    fn sample(&mut self) -> Checked {
        let last = self.last_rows();
        let mut random = Random::new(self.case.seed, SAMPLING_STREAM);
        let mut rows = 0;
        let all: Vec<usize> = (0..self.together()).collect();
        let groups: [&[usize]; 4] = [&[2], &[5, 0, 7], &[1, 6], &all];
        for picked in groups {
            let step: Vec<RowInput> = picked.iter().map(|sequence| last[*sequence]).collect();
            let sampling: Vec<SamplingParams> =
                picked.iter().map(|_| parameters(&mut random, self.case.vocab)).collect();
            let sampling: Vec<&SamplingParams> = sampling.iter().collect();
            rows += DECODED * step.len();
            let check = |bench: &mut Self| -> Result<(), Stop> {
                let wanted = bench.stepwise(&step, &sampling, DECODED)?;
                let found = bench.launch(&step, &sampling, DECODED, &[], None)?;
                Ok(same_tokens(&found, &wanted)
                    .map_err(|what| format!("sequences {picked:?}: {what} (parameters {sampling:?})"))?)
            };
            check(self).map_err(ended(rows))?;
        }
        Ok(Measured { rows, ..Measured::default() })
    }

    fn stops(&mut self) -> Checked {
        let last = self.last_rows();
        let step = [last[4], last[0], last[3]];
        let rows = 3 * DECODED * step.len();
        let check = |bench: &mut Self| -> Result<(), Stop> {
            let all = bench.launch(&step, &[], DECODED, &[], None)?;
            // The token that appears last for the first time, in any row.
            let flat: Vec<(usize, u32)> =
                all.iter().enumerate().flat_map(|(step, row)| row.iter().map(move |t| (step, *t))).collect();
            let firsts = flat
                .iter()
                .enumerate()
                .filter(|(at, (_, token))| flat[..*at].iter().all(|(_, t)| t != token));
            let Some((end, token)) = firsts.map(|(_, first)| *first).max() else {
                return Err(Stop::Wrong("no tokens".into()));
            };
            let found = bench.launch(&step, &[], DECODED, &[token], None)?;
            same_tokens(&found, &all[..=end]).map_err(|what| format!("with stop token {token}: {what}"))?;
            // Stop tokens beyond those that the kernel knows are the host's to look for; more steps may
            // have run, but are not told of.
            let vocab = bench.case.vocab as u32;
            let mut many: Vec<u32> =
                (0..vocab).filter(|t| flat.iter().all(|(_, other)| other != t)).take(12).collect();
            many.push(token);
            let found = bench.launch(&step, &[], DECODED, &many, None)?;
            same_tokens(&found, &all[..=end]).map_err(|what| format!("with 13 stop tokens: {what}"))?;
            let found = bench.launch(&step, &[], DECODED, &[], Some(3))?;
            same_tokens(&found, &all[..=3]).map_err(|what| format!("broken off in step 3: {what}"))?;
            // What was broken off goes on as if nothing had been.
            let on: Vec<RowInput> = step
                .iter()
                .zip(&all[3])
                .map(|(row, token)| RowInput { token: *token, position: row.position + 4, ..*row })
                .collect();
            let found = bench.launch(&on, &[], DECODED - 4, &[], None)?;
            same_tokens(&found, &all[4..]).map_err(|what| format!("after a break: {what}"))?;
            Ok(())
        };
        check(self).map_err(ended(rows))?;
        Ok(Measured { rows, ..Measured::default() })
    }

    /// All sequences decode, then a step's logits tell whether keys, values and all else are the same.
    fn repeats(&mut self, repeats: usize) -> Checked {
        let mut step = self.last_rows();
        step.truncate(self.together());
        let mut rows = 0;
        let mut first: Option<(Vec<Vec<u32>>, Vec<f32>)> = None;
        for repeat in 0..repeats {
            rows += step.len() * (DECODED + 1);
            let mut check = |bench: &mut Self| -> Result<(), Stop> {
                let tokens = bench.launch(&step, &[], DECODED, &[], None)?;
                let next: Vec<RowInput> = step
                    .iter()
                    .zip(tokens.last().into_iter().flatten())
                    .map(|(row, token)| RowInput {
                        token: *token,
                        position: row.position + DECODED as u32,
                        ..*row
                    })
                    .collect();
                let logits = bench.step(&next)?;
                match &first {
                    None => first = Some((tokens, logits)),
                    Some((first_tokens, first_logits)) => {
                        same_tokens(&tokens, first_tokens)
                            .and_then(|()| same_bits(&logits, first_logits, bench.case.vocab))
                            .map_err(|what| format!("repeat {repeat}: {what}"))?;
                    }
                }
                Ok(())
            };
            check(self).map_err(ended(rows))?;
        }
        Ok(Measured { rows, ..Measured::default() })
    }
}

/// Rows of a sequence from a position on.
pub(super) fn sequence_rows(sequence: u32, start: u32, tokens: &[u32]) -> Vec<RowInput> {
    let row = |(position, token): (u32, &u32)| RowInput { token: *token, position, sequence };
    (start..).zip(tokens).map(row).collect()
}

/// The largest logit's token, the lowest among equals. The logits are finite.
/// Purpose of the random numbers that parameters are made of.
pub(super) const SAMPLING_STREAM: u64 = 0x5a3d;

/// Sampling parameters that kernels know, one in five greedy.
pub(super) fn parameters(random: &mut Random, vocab: usize) -> SamplingParams {
    if random.one_in(5) {
        return SamplingParams::greedy();
    }
    let share = random.below(1 << 20) as f32 / (1 << 20) as f32;
    SamplingParams {
        temperature: random.pick(&[0.3, 0.7, 1.0, 1.0, 2.0, 8.0]),
        top_k: random.pick(&[0, 0, 1, 7, 40, vocab / 2, vocab * 2]) as u32,
        top_p: if random.one_in(2) { 1.0 } else { (1.0 - share * share).max(f32::MIN_POSITIVE) },
        min_p: random.pick(&[0.0, 0.0, 0.02, 0.3, 1.0]),
        seed: random.next(),
        ..SamplingParams::default()
    }
}

/// The tokens that the host chooses from the rows' logits; those of the largest without `sampling`.
pub(super) fn choose(
    rows: &[RowInput],
    sampling: &[&SamplingParams],
    logits: &[f32],
    vocab: usize,
) -> Result<Vec<u32>, Stop> {
    let logits = logits.chunks_exact(vocab);
    if sampling.is_empty() {
        return Ok(logits.map(largest).collect());
    }
    let token = |((row, params), logits): ((&RowInput, &&SamplingParams), &[f32])| {
        let choice = Sampler::new((*params).clone())
            .and_then(|mut sampler| sampler.sample(logits, u64::from(row.position) + 1));
        choice.map(|choice| choice.token).map_err(|error| Stop::Wrong(error.to_string()))
    };
    rows.iter().zip(sampling).zip(logits).map(token).collect()
}

pub(super) fn largest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Whether the same tokens were chosen, `[steps][rows]`.
fn same_tokens(found: &[Vec<u32>], wanted: &[Vec<u32>]) -> Result<(), String> {
    for (step, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        if found != wanted {
            return Err(format!("step {step} chose {found:?} where there was {wanted:?}"));
        }
    }
    match found.len() == wanted.len() {
        true => Ok(()),
        false => Err(format!("{} steps ran in place of {}", found.len(), wanted.len())),
    }
}
