//! Generation: from prompts to text, several sequences in one step.
//!
//! Every step takes one row of each sequence that decodes and fills the rest with prompts, a chunk
//! at a time. Because a row's numbers do not depend on the rows beside it, a sequence's tokens are
//! the same whatever runs with it. What a sequence leaves in the cache stays until its place is
//! needed: a prompt that begins like it (the next turn of a chat) is only processed from where it
//! differs.
//!
//! A plan with a draft guesses tokens ahead: see [`DraftStats`] and the module `draft`. The texts are the
//! same as without. How many it guesses at a time is chosen step by step, between
//! [`Generator::set_draft_min`] and [`Generator::set_draft_rows`], and for each request up to its
//! [`DraftLimit`], which may change while it runs.
//!
//! On an engine with a resident kernel, which chooses tokens as the sampler does, sequences that all decode
//! do so many steps at a time, and the text streams while the kernel runs. Penalties, biases and
//! probabilities are the host's work, a step at a time. Rounds of a draft go many into a launch as well.

mod adapt;
#[cfg(test)]
mod adapt_tests;
mod draft;
mod rounds;
mod score;
mod stats;
#[cfg(test)]
mod tests;

pub use adapt::{DraftLimit, FixedTimes, Pass};
pub use draft::{DraftSampleMethod, DraftStats};
pub use rounds::{LAUNCH_ROUNDS, launch_rounds};
pub use score::{ScoreError, score};
pub use stats::{RequestStats, StepTime};

use self::adapt::{CostModel, Pace, PassTimes};
use self::draft::{Choice, Guesses};
use crate::engine::{Engine, RowInput, StepError};
use crate::sampling::{Drawn, Sampler, SamplingError, SamplingParams};
use crate::stream::{EmptyStop, StopStrings, StreamDecoder};
use crate::tokenizer::Tokenizer;
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Steps of a launch that decodes: a launch costs about a tenth of a step.
pub const LAUNCH_STEPS: usize = 64;

/// What to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Tokens that end the text and are not part of it.
    pub stop_tokens: Vec<u32>,
    /// Strings that end the text and are not part of it. They need a tokenizer.
    pub stop_strings: Vec<String>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Whether control tokens are left out of the text.
    pub skip_special: bool,
    /// How many tokens a draft guesses at a time.
    pub draft: DraftLimit,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was chosen.
    StopToken(u32),
    /// A stop string came up: its place in the request's list.
    StopString(usize),
    /// As many tokens as were asked for.
    Length,
    /// The plan's context is full.
    Context,
    /// The callback said so.
    Cancelled,
}

/// News of a request.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The request: its place in the list.
    pub request: usize,
    /// The token that was chosen; `None` when the text ends and this is what was held back.
    pub token: Option<u32>,
    /// Text to show; often empty.
    pub text: &'a str,
}

/// A finished request.
#[derive(Clone, Debug)]
pub struct Completion {
    /// The generated tokens, without a stop token. Those that spell a stop string are there.
    pub tokens: Vec<u32>,
    /// With [`SamplingParams::logprobs`]: one per token.
    pub logprobs: Vec<f32>,
    /// Their text up to a stop string; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// Counts and times.
    pub stats: RequestStats,
    /// What became of a draft's guesses; its times are zero, see [`Run::draft`].
    pub draft: DraftStats,
}

/// What [`Generator::run`] returns.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// One per request, in their order.
    pub completions: Vec<Completion>,
    /// One per step.
    pub steps: Vec<StepTime>,
    /// What became of a draft's guesses in all requests.
    pub draft: DraftStats,
}

/// Why nothing can be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// A prompt without tokens.
    #[error("request {request}: the prompt is empty; the model needs at least one token to go on from")]
    EmptyPrompt {
        /// The request.
        request: usize,
    },
    /// A prompt that is too long.
    #[error(
        "request {request}: the prompt has {tokens} tokens, the plan's context {context}; shorten it, or raise \
         limits.context in model.yaml and compile again"
    )]
    LongPrompt {
        /// The request.
        request: usize,
        /// Its tokens.
        tokens: usize,
        /// The plan's limit.
        context: usize,
    },
    /// Stop strings without a tokenizer.
    #[error("request {request}: stop strings need a tokenizer, and the checkpoint has none")]
    NoTokenizer {
        /// The request.
        request: usize,
    },
    /// An empty stop string.
    #[error("request {request}: {source}")]
    EmptyStop {
        /// The request.
        request: usize,
        /// Which string.
        source: EmptyStop,
    },
    /// A parameter out of its range, or logits that no token can be chosen from.
    #[error("request {request}: {source}")]
    Sampling {
        /// The request.
        request: usize,
        /// What is wrong.
        source: SamplingError,
    },
    /// The step itself.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// An engine with what turns tokens into text.
#[derive(Debug)]
pub struct Generator {
    engine: Engine,
    tokenizer: Option<Arc<Tokenizer>>,
    /// The tokens whose keys and values every sequence of the engine has in the cache.
    history: Vec<Vec<u32>>,
    /// See [`Generator::with_launch_steps`].
    launch_steps: usize,
    /// See [`Generator::set_draft_rows`].
    draft_rows: usize,
    /// See [`Generator::set_draft_min`].
    draft_min: usize,
    /// See [`Generator::set_draft_sample_method`].
    draft_sample_method: DraftSampleMethod,
    /// What steps and guesses take.
    times: PassTimes,
}

/// A request in progress, in the sequence of the same number.
struct Active {
    request: usize,
    sampler: Sampler,
    decoder: Option<StreamDecoder<Arc<Tokenizer>>>,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    prompt: usize,
    logprobs: Vec<f32>,
    text: String,
    stats: RequestStats,
    draft: DraftStats,
    pace: Pace,
    admitted: Instant,
    /// When the last token was chosen.
    last: Option<Instant>,
}

/// What passes of an engine take, before any was measured.
fn pass_times(engine: &Engine) -> PassTimes {
    PassTimes::new(CostModel::new(engine.plan(), engine.pass_rows(), engine.memory_rate()))
}

impl Generator {
    /// A generator on `engine`. Without a tokenizer there is no text, only tokens.
    pub fn new(mut engine: Engine, tokenizer: Option<Arc<Tokenizer>>) -> Generator {
        let sequences = engine.plan().limits.sequences;
        (0..sequences).for_each(|sequence| engine.reset(sequence));
        let times = pass_times(&engine);
        Generator {
            times,
            draft_min: 0,
            draft_sample_method: DraftSampleMethod::default(),
            engine,
            tokenizer,
            history: vec![Vec::new(); sequences],
            launch_steps: LAUNCH_STEPS,
            draft_rows: usize::MAX,
        }
    }

    /// Lets a resident kernel run up to so many steps a launch where it can choose the tokens itself;
    /// [`LAUNCH_STEPS`] unless said otherwise. One launches it for every step and chooses on the host.
    #[must_use]
    pub fn with_launch_steps(mut self, steps: usize) -> Generator {
        self.launch_steps = steps.max(1);
        self
    }

    /// Lets steps verify up to so many rows of a draft's block, the last known token included: at most the
    /// plan's number, which is the default; 0 or 1 for no guesses. Texts do not depend on it. May be changed
    /// between runs.
    pub fn set_draft_rows(&mut self, rows: usize) {
        self.draft_rows = rows;
    }

    /// Lets the draft guess at least so many tokens at a time, as far as blocks, requests and the step have
    /// room. 0 is the default: then the generator may decide for none. As many as a block has, or more, fix
    /// the number. Texts do not depend on it. May be changed between runs.
    pub fn set_draft_min(&mut self, guesses: usize) {
        self.draft_min = guesses;
    }

    /// How guesses are chosen and verified; [`DraftSampleMethod::Greedy`] unless said otherwise, which leaves
    /// every text as it is without a draft. May be changed between runs.
    pub fn set_draft_sample_method(&mut self, method: DraftSampleMethod) {
        self.draft_sample_method = method;
    }

    /// Chooses the number of guesses by these times in place of measured ones, so that it depends on the
    /// texts alone: for benchmarks and tests that want the same rounds every time. May be changed between
    /// runs.
    pub fn set_pass_times(&mut self, times: Option<FixedTimes>) {
        self.times.fixed = times;
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// Gives the engine back.
    pub fn into_engine(self) -> Engine {
        self.engine
    }

    /// Forgets what the sequences have in the cache.
    pub fn clear(&mut self) {
        for (sequence, history) in self.history.iter_mut().enumerate() {
            history.clear();
            self.engine.reset(sequence);
        }
    }

    /// Generates for all `requests`, as many at a time as the plan has sequences. `news` hears of
    /// every token, and ends a request by breaking.
    ///
    /// # Errors
    /// [`GenerateError`]. Requests are checked before the first step; an error in a step ends all.
    pub fn run(
        &mut self,
        requests: &[Request],
        news: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Run, GenerateError> {
        for (number, request) in requests.iter().enumerate() {
            self.check(number, request)?;
        }
        let mut done: Vec<Option<Completion>> = requests.iter().map(|_| None).collect();
        let mut waiting: VecDeque<usize> = (0..requests.len()).collect();
        let mut active: Vec<Option<Active>> = self.history.iter().map(|_| None).collect();
        let mut steps = Vec::new();
        let mut draft_total = DraftStats::default();
        let context = self.engine.plan().limits.context;
        // Where the next step begins to look for rows, so that none is left out for ever.
        let mut turn = 0;
        loop {
            while let Some(&number) = waiting.front() {
                let request = &requests[number];
                if request.max_tokens == 0 {
                    done[number] = Some(Completion::empty(request.prompt.len()));
                } else {
                    let Some(sequence) = self.free_sequence(&active, &request.prompt) else { break };
                    active[sequence] = Some(self.admit(sequence, number, request)?);
                }
                waiting.pop_front();
            }
            if active.iter().all(Option::is_none) {
                break;
            }

            let choice = self.choose(&mut active, requests, turn);
            if let Some(groups) = self.decoding(&active, requests, &choice) {
                for group in &groups {
                    steps.extend(self.decode(group, requests, &mut active, &mut done, news)?);
                }
                continue;
            }
            if let Some(launch) = self.rounds_of(&active, requests, &choice) {
                let start = Instant::now();
                steps.extend(self.rounds(&launch, requests, &mut active, &mut done, news)?);
                draft_total.launch += start.elapsed();
                continue;
            }
            let start = Instant::now();
            let guesses = self.guess(&mut active, &choice)?;
            let guessed = guesses.iter().any(|guesses| !guesses.tokens.is_empty());
            let mut batch = Batch::default();
            self.fill(&mut batch, &active, turn, &guesses);
            if batch.left_out {
                turn = (turn + 1) % active.len();
            }
            let listens: Vec<bool> = active.iter().map(|place| self.has_guesses(place, requests)).collect();
            // Where nothing else is asked of the logits, a GPU keeps them.
            let sampling = |wanted: &Wanted| {
                let current =
                    active[wanted.sequence].as_ref().expect("rows are only made of active sequences");
                std::iter::repeat_n(&requests[current.request].sampling, wanted.rows)
            };
            let sampling: Vec<&SamplingParams> = batch.wanted.iter().flat_map(sampling).collect();
            let by_kernel = self.block() > 0
                && !sampling.is_empty()
                && self.engine.is_resident()
                && guesses.iter().all(|guesses| guesses.drawn.is_empty())
                && sampling.iter().all(|sampling| sampling.is_for_kernels());
            let before = Instant::now();
            self.make_pages(&batch, &active);
            let (logits, chosen) = match by_kernel {
                true => (&[][..], self.engine.step_sampled(&batch.rows, &batch.logit_rows, &sampling)?),
                false => (self.engine.step(&batch.rows, &batch.logit_rows)?, Vec::new()),
            };
            let after = Instant::now();
            if batch.rows.len() == batch.logit_rows.len() {
                self.times.note(Pass::Step, batch.rows.len(), after - before);
            }
            let vocab = logits.len() / batch.logit_rows.len().max(1);
            let mut tokens = 0;
            // Rows whose tokens turn out not to be part of their text.
            let mut wrong = vec![false; batch.rows.len()];
            let mut at = 0;
            for wanted in &batch.wanted {
                let guesses = &guesses[wanted.sequence];
                let results = match by_kernel {
                    true => Results::Tokens(&chosen[at..][..wanted.rows]),
                    false => Results::Logits(&logits[at * vocab..][..wanted.rows * vocab]),
                };
                let first = batch.logit_rows[at] as usize;
                at += wanted.rows;
                let place = &mut active[wanted.sequence];
                let current = place.as_mut().expect("rows are only made of active sequences");
                let (taken, finish) =
                    current.round(results, guesses, &requests[current.request], context, news)?;
                tokens += taken;
                wrong[first + taken..first + wanted.rows].fill(true);
                if let Some(finish) = finish {
                    let current = place.take().expect("as above");
                    let request = current.request;
                    done[request] = Some(current.complete(finish, news));
                }
            }
            for row in batch.rows.iter().zip(&wrong).filter(|(_, wrong)| !**wrong).map(|(row, _)| row) {
                let history = &mut self.history[row.sequence as usize];
                history.truncate(row.position as usize);
                history.push(row.token);
            }
            let chosen = Instant::now();
            self.tell_draft(&batch, &wrong, &listens)?;
            let inject = chosen.elapsed();
            if guessed {
                draft_total.draft += before - start;
                draft_total.verify += after - before;
                draft_total.inject += inject;
            }
            let draft = if guessed { before - start + inject } else { inject };
            steps.push(StepTime {
                rows: batch.rows.len(),
                logit_rows: batch.logit_rows.len(),
                tokens,
                step: after - before,
                draft,
                sampling: chosen - after,
            });
        }
        let completions = done.into_iter().map(|completion| completion.expect("none is left waiting"));
        let completions: Vec<Completion> = completions.collect();
        // These have no times.
        completions.iter().for_each(|completion| draft_total.add(&completion.draft));
        Ok(Run { completions, steps, draft: draft_total })
    }

    /// Whether the draft is told of a sequence's text.
    fn has_guesses(&self, place: &Option<Active>, requests: &[Request]) -> bool {
        place.as_ref().is_some_and(|current| requests[current.request].draft.get() > 0)
    }

    /// Adds the rows of a step to the draft's context, but for wrong guesses, rows behind a gap, and
    /// sequences that have no guesses.
    fn tell_draft(&mut self, batch: &Batch, wrong: &[bool], listens: &[bool]) -> Result<(), StepError> {
        if self.block() == 0 {
            return Ok(());
        }
        let mut known: Vec<usize> =
            (0..self.history.len()).map(|sequence| self.engine.draft_length(sequence)).collect();
        let mut rows = Vec::with_capacity(batch.rows.len());
        for (number, row) in batch.rows.iter().enumerate() {
            let known = &mut known[row.sequence as usize];
            if listens[row.sequence as usize] && !wrong[number] && *known == row.position as usize {
                *known += 1;
                rows.push(number as u32);
            }
        }
        self.engine.inject(&rows)
    }

    fn check(&self, request: usize, given: &Request) -> Result<(), GenerateError> {
        let (tokens, context) = (given.prompt.len(), self.engine.plan().limits.context);
        if tokens == 0 {
            return Err(GenerateError::EmptyPrompt { request });
        }
        if tokens > context {
            return Err(GenerateError::LongPrompt { request, tokens, context });
        }
        if !given.stop_strings.is_empty() && self.tokenizer.is_none() {
            return Err(GenerateError::NoTokenizer { request });
        }
        StopStrings::new(&given.stop_strings)
            .map_err(|source| GenerateError::EmptyStop { request, source })?;
        given.sampling.validate().map_err(|source| GenerateError::Sampling { request, source })
    }

    /// The free sequence that has most of the prompt in the cache; among equals, the one with the
    /// least to lose.
    fn free_sequence(&self, active: &[Option<Active>], prompt: &[u32]) -> Option<usize> {
        let free = (0..active.len()).filter(|sequence| active[*sequence].is_none());
        free.max_by_key(|sequence| {
            let history = &self.history[*sequence];
            (common(history, prompt), Reverse(history.len()), Reverse(*sequence))
        })
    }

    fn admit(&mut self, sequence: usize, number: usize, request: &Request) -> Result<Active, GenerateError> {
        // The last token is always processed: its logits are what generation starts from.
        let mut cached = common(&self.history[sequence], &request.prompt).min(request.prompt.len() - 1);
        if self.block() > 0 && request.draft.get() > 0 {
            // The draft must know what is before its guesses.
            cached = cached.min(self.engine.draft_length(sequence));
        }
        self.history[sequence].truncate(cached);
        if cached == 0 {
            self.engine.reset(sequence);
        }
        let mut sampler = Sampler::new(request.sampling.clone())
            .map_err(|source| GenerateError::Sampling { request: number, source })?;
        sampler.observe_prompt(&request.prompt);
        let decoder = self.tokenizer.as_ref().map(|tokenizer| {
            StreamDecoder::new(Arc::clone(tokenizer), request.skip_special, &request.stop_strings)
        });
        let decoder =
            decoder.transpose().map_err(|source| GenerateError::EmptyStop { request: number, source })?;
        let prompt = request.prompt.len();
        Ok(Active {
            request: number,
            sampler,
            decoder,
            tokens: request.prompt.clone(),
            prompt,
            logprobs: Vec::new(),
            text: String::new(),
            draft: DraftStats::default(),
            pace: Pace::new(),
            stats: RequestStats { prompt_tokens: prompt, cached_tokens: cached, ..Default::default() },
            admitted: Instant::now(),
            last: None,
        })
    }

    /// Whether all active sequences decode, and the kernel can choose their tokens, many steps a launch.
    fn launches(&self, active: &[Option<Active>], requests: &[Request]) -> bool {
        let decodes = |(sequence, place): (usize, &Option<Active>)| match place {
            Some(current) => {
                self.decodes(active, sequence) && requests[current.request].sampling.is_for_kernels()
            }
            None => true,
        };
        self.engine.is_resident() && self.launch_steps > 1 && active.iter().enumerate().all(decodes)
    }

    /// The active sequences in groups of as many as a launch decodes, if all of them decode, nothing is
    /// guessed, and the kernel can choose their tokens.
    fn decoding(
        &self,
        active: &[Option<Active>],
        requests: &[Request],
        choice: &[Choice],
    ) -> Option<Vec<Vec<usize>>> {
        let sequences: Vec<usize> = (0..active.len()).filter(|at| active[*at].is_some()).collect();
        // Long launches tell a draft of nothing: they are for those who have no guesses for a while.
        let plain = self.block() == 0 || sequences.iter().all(|at| choice[*at] == Choice::Plain);
        let rows = self.engine.max_decode_rows();
        let launches = plain && self.launches(active, requests);
        launches.then(|| sequences.chunks(rows).map(<[usize]>::to_vec).collect())
    }

    /// Decodes a group of sequences in one launch, until the first of them ends.
    fn decode(
        &mut self,
        group: &[usize],
        requests: &[Request],
        active: &mut [Option<Active>],
        done: &mut [Option<Completion>],
        news: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<StepTime>, StepError> {
        let limits = self.engine.plan().limits;
        let mut rows = Vec::with_capacity(group.len());
        let mut sampling = Vec::with_capacity(group.len());
        let mut stops = Vec::new();
        let mut steps = self.launch_steps;
        for &sequence in group {
            let current = active[sequence].as_ref().expect("groups are made of active sequences");
            let request = &requests[current.request];
            let position = current.tokens.len() - 1;
            rows.push(RowInput {
                token: current.tokens[position],
                position: position as u32,
                sequence: sequence as u32,
            });
            sampling.push(&request.sampling);
            stops.extend(&request.stop_tokens);
            // An active sequence has a token to choose and a position for the last one: both are above 0.
            let left = request.max_tokens - (current.tokens.len() - current.prompt);
            steps = steps.min(left).min(limits.context - position);
            // Where the next guess is due.
            if current.pace.rest() > 0 {
                steps = steps.min(current.pace.rest());
            }
        }
        stops.sort_unstable();
        stops.dedup();

        let page = self.engine.plan().kv.page_tokens;
        let missing = |engine: &Engine, steps: usize| {
            let missing = |row: &RowInput| {
                let wanted = (row.position as usize + steps).div_ceil(page);
                wanted.saturating_sub(engine.kv().held_pages(row.sequence as usize))
            };
            rows.iter().map(missing).sum::<usize>()
        };
        if missing(&self.engine, steps) > self.engine.kv().free_pages() {
            self.forget_idle(active);
        }
        while steps > 1 && missing(&self.engine, steps) > self.engine.kv().free_pages() {
            steps /= 2;
        }

        let drafted = self.block() > 0;
        let mut chosen = vec![Vec::new(); rows.len()];
        let mut times = Vec::new();
        let start = Instant::now();
        let (mut before, mut there) = (Instant::now(), Instant::now());
        let last = rows.len() - 1;
        self.engine.decode_sampled(&rows, &sampling, steps, &stops, &mut |_, row, token| {
            if row == 0 {
                there = Instant::now();
            }
            chosen[row].push(token);
            let place = &mut active[group[row]];
            let current = place.as_mut().expect("the launch ends with the step of the first that ends");
            let mut flow = ControlFlow::Continue(());
            if drafted {
                current.draft.plain += 1;
                current.pace.plain(1);
            }
            if let Some(finish) =
                current.accept(token, None, &requests[current.request], limits.context, news)
            {
                let current = place.take().expect("as above");
                let request = current.request;
                done[request] = Some(current.complete(finish, news));
                flow = ControlFlow::Break(());
            }
            if row == last {
                let now = Instant::now();
                let (rows, logit_rows) = (last + 1, last + 1);
                times.push(StepTime {
                    rows,
                    logit_rows,
                    tokens: rows,
                    step: there - before,
                    draft: Duration::ZERO,
                    sampling: now - there,
                });
                before = now;
            }
            flow
        })?;
        if times.len() > 1 {
            self.times.note(Pass::Launch, rows.len(), start.elapsed() / times.len() as u32);
        }
        for (row, chosen) in rows.iter().zip(&chosen) {
            let history = &mut self.history[row.sequence as usize];
            history.truncate(row.position as usize);
            history.push(row.token);
            // The token that was chosen last was not processed.
            history.extend(&chosen[..chosen.len() - 1]);
        }
        Ok(times)
    }

    /// The rows of the next step: sequences that decode first, with their guesses, then prompts as far as
    /// there is room.
    fn fill(&self, batch: &mut Batch, active: &[Option<Active>], turn: usize, guesses: &[Guesses]) {
        let max_rows = self.engine.plan().limits.max_rows;
        let max_wanted = self.engine.max_logit_rows();
        // Guesses have their place, whoever comes first.
        let mut reserved: usize = guesses.iter().map(|guesses| guesses.tokens.len()).sum();
        for decoding in [true, false] {
            for at in 0..active.len() {
                let sequence = (turn + at) % active.len();
                let Some(current) = &active[sequence] else { continue };
                let cached = self.history[sequence].len();
                let missing = &current.tokens[cached..];
                if (missing.len() == 1) != decoding {
                    continue;
                }
                let mut count = missing.len().min(max_rows - batch.rows.len() - reserved);
                if count == missing.len() && batch.logit_rows.len() + reserved == max_wanted {
                    // The last row comes when its logits have room.
                    count -= 1;
                }
                batch.left_out |= count == 0;
                for (offset, token) in missing[..count].iter().enumerate() {
                    let position = (cached + offset) as u32;
                    batch.rows.push(RowInput { token: *token, position, sequence: sequence as u32 });
                }
                if count == missing.len() {
                    batch.logit_rows.push(batch.rows.len() as u32 - 1);
                    let guesses = &guesses[sequence].tokens;
                    for (token, position) in guesses.iter().zip((cached + count) as u32..) {
                        batch.rows.push(RowInput { token: *token, position, sequence: sequence as u32 });
                        batch.logit_rows.push(batch.rows.len() as u32 - 1);
                    }
                    reserved -= guesses.len();
                    batch.wanted.push(Wanted { sequence, rows: 1 + guesses.len() });
                }
            }
        }
    }

    /// If the cache is full, what idle sequences have there makes room for a step.
    fn make_pages(&mut self, batch: &Batch, active: &[Option<Active>]) {
        let free = self.engine.kv().free_pages();
        let page = self.engine.plan().kv.page_tokens;
        // More than a step can need: every row on a page of its own.
        if free < batch.rows.len().div_ceil(page) + active.len() {
            self.forget_idle(active);
        }
    }

    /// Forgets what sequences that are not active have in the cache.
    fn forget_idle(&mut self, active: &[Option<Active>]) {
        for (sequence, history) in self.history.iter_mut().enumerate() {
            if active[sequence].is_none() && !history.is_empty() {
                history.clear();
                self.engine.reset(sequence);
            }
        }
    }
}

/// Rows of a step.
#[derive(Default)]
struct Batch {
    rows: Vec<RowInput>,
    /// Rows whose logits are wanted.
    logit_rows: Vec<u32>,
    /// Which sequences they are of, in their order.
    wanted: Vec<Wanted>,
    /// Whether a sequence had no row for want of room.
    left_out: bool,
}

/// Rows of a sequence whose logits are wanted: the last of its text, and guesses.
struct Wanted {
    sequence: usize,
    rows: usize,
}

/// What a step gives for rows of a sequence.
#[derive(Clone, Copy)]
enum Results<'a> {
    /// `[rows][vocab]`.
    Logits(&'a [f32]),
    /// The tokens that the kernel chose.
    Tokens(&'a [u32]),
}

/// How many tokens two texts begin with in common.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Active {
    /// Chooses tokens from the results of `1 + guesses` rows as long as the guesses are right. How many
    /// were chosen, and why the text ends if it does.
    fn round(
        &mut self,
        results: Results<'_>,
        guesses: &Guesses,
        request: &Request,
        context: usize,
        news: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<(usize, Option<FinishReason>), GenerateError> {
        let guessed = guesses.tokens.len();
        let (mut taken, mut finish, mut right) = (0, None, 0);
        for row in 0..1 + guessed {
            let before = self.tokens.len();
            finish = match results {
                Results::Logits(logits) => {
                    let vocab = logits.len() / (1 + guessed);
                    let guess = guesses.tokens.get(row).copied().zip(guesses.drawn.get(row));
                    self.take(&logits[row * vocab..][..vocab], guess, request, context, news)?
                }
                Results::Tokens(tokens) => self.accept(tokens[row], None, request, context, news),
            };
            taken += 1;
            let hit =
                guesses.tokens.get(taken - 1).is_some_and(|guess| self.tokens.get(before) == Some(guess));
            right += usize::from(hit);
            if finish.is_some() || !hit {
                break;
            }
        }
        if guessed > 0 {
            self.draft.note(guessed, right, taken, guesses.whole && finish.is_none());
            self.pace.round(taken.min(guessed), right, taken);
        } else if guesses.plain {
            self.draft.plain += taken as u64;
            self.pace.plain(taken);
        }
        Ok((taken, finish))
    }

    /// Chooses the next token, which may be a guess that was drawn; says why the text ends if it does.
    fn take(
        &mut self,
        logits: &[f32],
        guess: Option<(u32, &Drawn)>,
        request: &Request,
        context: usize,
        news: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Result<Option<FinishReason>, GenerateError> {
        let number = self.request;
        let position = self.tokens.len() as u64;
        let choice = match guess {
            Some((guess, drawn)) => self.sampler.take(logits, position, guess, drawn),
            None => self.sampler.sample(logits, position),
        };
        let choice = choice.map_err(|source| GenerateError::Sampling { request: number, source })?;
        Ok(self.accept(choice.token, choice.logprob, request, context, news))
    }

    /// Takes the token that was chosen; says why the text ends if it does.
    fn accept(
        &mut self,
        token: u32,
        logprob: Option<f32>,
        request: &Request,
        context: usize,
        news: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Option<FinishReason> {
        let now = Instant::now();
        match self.last {
            None => self.stats.first_token = now - self.admitted,
            Some(last) => self.stats.decode += now - last,
        }
        self.last = Some(now);
        self.stats.generated_tokens += 1;
        if request.stop_tokens.contains(&token) {
            return Some(FinishReason::StopToken(token));
        }
        self.sampler.accept(token);
        self.tokens.push(token);
        self.logprobs.extend(logprob);
        let emit = self.decoder.as_mut().map(|decoder| decoder.push(token)).unwrap_or_default();
        self.text.push_str(&emit.text);
        let flow = news(Piece { request: self.request, token: Some(token), text: &emit.text });
        if let Some(stop) = emit.stop {
            Some(FinishReason::StopString(stop))
        } else if flow.is_break() {
            Some(FinishReason::Cancelled)
        } else if self.tokens.len() - self.prompt == request.max_tokens {
            Some(FinishReason::Length)
        } else if self.tokens.len() > context {
            // The token that was chosen has no position to be processed at.
            Some(FinishReason::Context)
        } else {
            None
        }
    }

    fn complete(
        mut self,
        mut finish: FinishReason,
        news: &mut dyn FnMut(Piece<'_>) -> ControlFlow<()>,
    ) -> Completion {
        let stopped = matches!(finish, FinishReason::StopString(_));
        let rest = self.decoder.as_mut().filter(|_| !stopped).map(StreamDecoder::finish).unwrap_or_default();
        if let Some(stop) = rest.stop {
            finish = FinishReason::StopString(stop);
        }
        if !rest.text.is_empty() {
            self.text.push_str(&rest.text);
            // The request is at its end already: what the callback answers changes nothing.
            let _ = news(Piece { request: self.request, token: None, text: &rest.text });
        }
        Completion {
            tokens: self.tokens.split_off(self.prompt),
            logprobs: self.logprobs,
            text: self.text,
            finish,
            stats: self.stats,
            draft: self.draft,
        }
    }
}

impl Completion {
    fn empty(prompt_tokens: usize) -> Completion {
        Completion {
            tokens: Vec::new(),
            logprobs: Vec::new(),
            text: String::new(),
            finish: FinishReason::Length,
            stats: RequestStats { prompt_tokens, ..Default::default() },
            draft: DraftStats::default(),
        }
    }
}
