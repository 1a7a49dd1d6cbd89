//! From the logits of one position to a token.
//!
//! The names are those of vLLM and llama.cpp. Where those two disagree about the order, this is
//! the order of Hugging Face transformers:
//!
//! 1. `logit_bias` is added, then the repetition, presence and frequency penalties apply;
//! 2. `temperature` divides the logits (0 means greedy: the rest is skipped);
//! 3. `top_k` keeps the k most probable tokens;
//! 4. `top_p` keeps the fewest of those, most probable first, whose probabilities (normalised
//!    over what step 3 left) reach `top_p`;
//! 5. `min_p` drops what is less than `min_p` times as probable as the best token;
//! 6. one of what is left is drawn, in proportion to its probability.
//!
//! Everything is deterministic. Equal logits rank by id, lowest first. The random number is a
//! function of (seed, position) alone ([`random_bits`]): drawing a position again, in another order
//! or in another batch, as speculation does, gives the same token for the same logits. Probabilities are
//! integers ([`SampleRow`]), the best token's 2^40; what is less than 2^-40 times as probable as that is
//! never drawn. So a kernel that chooses tokens chooses the very same ones.
//!
//! Where a draft's guesses are drawn as well, [`Sampler::guess`] and [`Sampler::take`] have the same distribution,
//! but other tokens: see [`Drawn`].

mod draw;
mod philox;
mod rejection;
#[cfg(test)]
mod tests;

pub use philox::{Stream, random_bits, random_bits_of, uniform, uniform_of};
pub use rejection::Drawn;

use self::draw::{Scratch, draw};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use tilec_ir::launch::{REACH, SampleRow};

/// How tokens are chosen. The default samples from the model's own distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most probable token always.
    pub temperature: f32,
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest tokens whose probabilities reach this, in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than this times the best one's probability, in [0, 1].
    pub min_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Above 1: the logits of tokens that were seen, prompt included, are divided (positive ones)
    /// or multiplied (negative ones) by this. 1 is off.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens that were generated before. In [-2, 2].
    pub presence_penalty: f32,
    /// Taken from the logits of a token once for every time that it was generated. In [-2, 2].
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Report the probability of each chosen token. It costs an exponential for every token of
    /// the vocabulary.
    pub logprobs: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            logprobs: false,
        }
    }
}

impl SamplingParams {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the choice does not depend on the seed.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether a kernel can choose as these say: no logit is changed, and none is asked for.
    pub fn is_for_kernels(&self) -> bool {
        !self.adjusts_logits() && !self.logprobs
    }

    /// What temperature, filters and seed come to in numbers, for a kernel or for the host; the other
    /// parameters have no place there.
    pub fn launch_row(&self) -> SampleRow {
        if self.is_greedy() {
            return SampleRow::default();
        }
        let scale = (std::f64::consts::LOG2_E / f64::from(self.temperature)) as f32;
        let reach = -f64::from(self.min_p).log2() as f32;
        SampleRow {
            scale: scale.min(f32::MAX),
            reach: reach.clamp(0.0, REACH),
            top_k: self.top_k,
            reserved: 0,
            top_p: match self.top_p {
                1.0.. => 0,
                share => ((f64::from(share) * 2f64.powi(64)) as u64).max(1),
            },
            seed: self.seed,
        }
    }

    fn adjusts_logits(&self) -> bool {
        self.repetition_penalty != 1.0 || self.counts_output() || !self.logit_bias.is_empty()
    }

    fn counts_output(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks every value against its range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |name: &'static str, value: f32, fine: bool, range: &'static str| match fine {
            true => Ok(()),
            false => Err(SamplingError::Parameter { name, value, range }),
        };
        let within = |value: f32, low: f32, high: f32| (low..=high).contains(&value);
        let positive = |value: f32| value.is_finite() && value > 0.0;
        let t = self.temperature;
        check("temperature", t, t == 0.0 || positive(t), "0 (greedy) or more")?;
        check("top_p", self.top_p, within(self.top_p, f32::MIN_POSITIVE, 1.0), "above 0 and at most 1")?;
        check("min_p", self.min_p, within(self.min_p, 0.0, 1.0), "from 0 to 1")?;
        let r = self.repetition_penalty;
        check("repetition_penalty", r, positive(r), "above 0 (1 is off)")?;
        for (name, value) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            check(name, value, within(value, -2.0, 2.0), "from -2 to 2")?;
        }
        for &bias in self.logit_bias.values() {
            check("logit_bias", bias, bias.is_finite(), "a finite number")?;
        }
        Ok(())
    }
}

/// Why no token could be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// A parameter is outside of its range.
    #[error("{name} = {value}: must be {range}")]
    Parameter {
        /// Name of the parameter.
        name: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// `logit_bias` names a token that the model does not have.
    #[error("logit_bias: token {token} is beyond the {vocab} tokens of the model")]
    Bias {
        /// The token.
        token: u32,
        /// Length of the logits.
        vocab: usize,
    },
    /// The model computed NaN or +infinity.
    #[error("position {position}: the logit of token {token} is {value}: the model's numbers broke down")]
    Logit {
        /// Absolute position that the logits predict.
        position: u64,
        /// Token id of the first such logit.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// There are no logits, or all are -infinity.
    #[error("position {position}: no token is possible ({vocab} logits, none above -inf)")]
    Nothing {
        /// Absolute position that the logits predict.
        position: u64,
        /// Length of the logits.
        vocab: usize,
    },
}

/// The token of a row of logits, chosen as kernels choose it.
///
/// # Errors
/// [`SamplingError`] for logits that nothing can be chosen from.
#[cfg(test)]
pub(crate) fn choose_as_kernels(
    logits: &[f32],
    row: &SampleRow,
    position: u64,
) -> Result<u32, SamplingError> {
    let best = argmax(logits, position)?;
    Ok(match row.scale {
        0.0 => best,
        _ => draw(logits, logits[best as usize], row, position, &mut Scratch::default()),
    })
}

/// A chosen token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Token id.
    pub token: u32,
    /// With [`SamplingParams::logprobs`]: natural logarithm of the token's probability under the
    /// model's own distribution (temperature 1, no penalty, no filter).
    pub logprob: Option<f32>,
}

/// Chooses tokens for one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// How often each token was generated; 0 for tokens of the prompt alone.
    seen: HashMap<u32, u32>,
    /// Scratch: logits after bias and penalties.
    adjusted: Vec<f32>,
    scratch: Scratch,
}

impl Sampler {
    /// A sampler for a new sequence.
    pub fn new(params: SamplingParams) -> Result<Self, SamplingError> {
        params.validate()?;
        Ok(Self { params, seen: HashMap::new(), adjusted: Vec::new(), scratch: Scratch::default() })
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Tells the tokens of the prompt, for the repetition penalty.
    pub fn observe_prompt(&mut self, tokens: &[u32]) {
        if self.params.repetition_penalty != 1.0 {
            for &token in tokens {
                self.seen.entry(token).or_insert(0);
            }
        }
    }

    /// Tells that `token` is now part of the output, for the penalties. Choosing a token does not
    /// make it so: a speculated position may be drawn and thrown away.
    pub fn accept(&mut self, token: u32) {
        if self.params.repetition_penalty != 1.0 || self.params.counts_output() {
            *self.seen.entry(token).or_insert(0) += 1;
        }
    }

    /// Chooses the token at `position` (absolute: 0 is the first token of the prompt) from the
    /// `logits` that predict it, one for every token of the vocabulary.
    pub fn sample(&mut self, logits: &[f32], position: u64) -> Result<Choice, SamplingError> {
        self.sample_or_take(logits, position, None)
    }

    /// Draws a draft's guess for `position` from what the draft says, at this sampler's temperature: its place
    /// among `scores`, a number a token, as logits. With temperature 0 the place of the largest. `None` if a score
    /// is no number, or none is above -infinity.
    pub fn guess(&mut self, scores: &[f32], position: u64) -> Option<usize> {
        let best = argmax(scores, position).ok()?;
        if self.params.is_greedy() {
            return Some(best as usize);
        }
        let (row, best) = (self.params.launch_row(), scores[best as usize]);
        Some(rejection::draw_guess(scores, best, &row, position, &mut self.scratch))
    }

    /// As [`Sampler::sample`], where a draft's `guess` for the position was drawn by [`Sampler::guess`] from what
    /// `drawn` has: takes the guess, or another token in its place, so that tokens come with the model's
    /// probabilities. With temperature 0 it is the most probable token.
    pub fn take(
        &mut self,
        logits: &[f32],
        position: u64,
        guess: u32,
        drawn: &Drawn,
    ) -> Result<Choice, SamplingError> {
        self.sample_or_take(logits, position, Some((guess, drawn)))
    }

    fn sample_or_take(
        &mut self,
        logits: &[f32],
        position: u64,
        guess: Option<(u32, &Drawn)>,
    ) -> Result<Choice, SamplingError> {
        // Scratch moves out while `self` is read.
        let mut adjusted = std::mem::take(&mut self.adjusted);
        let mut scratch = std::mem::take(&mut self.scratch);
        let choice = self.choose(logits, position, guess, &mut adjusted, &mut scratch);
        self.adjusted = adjusted;
        self.scratch = scratch;
        choice
    }

    fn choose(
        &self,
        raw: &[f32],
        position: u64,
        guess: Option<(u32, &Drawn)>,
        adjusted: &mut Vec<f32>,
        scratch: &mut Scratch,
    ) -> Result<Choice, SamplingError> {
        let logits = if self.params.adjusts_logits() {
            self.adjust(raw, adjusted)?;
            adjusted.as_slice()
        } else {
            raw
        };
        let best = argmax(logits, position)?;
        let largest = logits[best as usize];
        let token = match guess {
            _ if self.params.is_greedy() => best,
            None => draw(logits, largest, &self.params.launch_row(), position, scratch),
            Some(guess) => {
                rejection::verify(logits, largest, &self.params.launch_row(), position, guess, scratch)
            }
        };
        let logprob = match self.params.logprobs {
            true if self.params.adjusts_logits() => Some(logprob(raw, argmax(raw, position)?, token)),
            true => Some(logprob(raw, best, token)),
            false => None,
        };
        Ok(Choice { token, logprob })
    }

    /// Step 1 of the module's order.
    fn adjust(&self, raw: &[f32], adjusted: &mut Vec<f32>) -> Result<(), SamplingError> {
        adjusted.clear();
        adjusted.extend_from_slice(raw);
        for (&token, &bias) in &self.params.logit_bias {
            let logit =
                adjusted.get_mut(token as usize).ok_or(SamplingError::Bias { token, vocab: raw.len() })?;
            *logit += bias;
        }
        let p = &self.params;
        for (&token, &count) in &self.seen {
            // A prompt may hold ids that the head does not predict.
            let Some(logit) = adjusted.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
            if count > 0 {
                *logit -= p.presence_penalty + p.frequency_penalty * count as f32;
            }
        }
        Ok(())
    }
}

/// The best token, the lowest id among equals. Logits must be below +infinity.
pub(crate) fn argmax(logits: &[f32], position: u64) -> Result<u32, SamplingError> {
    // The maximum of every chunk first; then only the first chunk with the best one is searched.
    const CHUNK: usize = 512;
    let (mut best, mut chunk, mut broken) = (f32::NEG_INFINITY, 0, false);
    for (i, values) in logits.chunks(CHUNK).enumerate() {
        let (max, bad) = chunk_max(values);
        broken |= bad;
        if max > best {
            (best, chunk) = (max, i);
        }
    }
    if broken {
        let at = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY).unwrap_or_default();
        return Err(SamplingError::Logit { position, token: at, value: logits[at] });
    }
    let start = chunk * CHUNK;
    match logits.get(start..).unwrap_or_default().iter().position(|&x| x == best) {
        Some(at) if best > f32::NEG_INFINITY => Ok((start + at) as u32),
        _ => Err(SamplingError::Nothing { position, vocab: logits.len() }),
    }
}

/// The maximum, and whether there is a NaN or a +infinity. In lanes of their own, which become a
/// vector: a single maximum would be one long chain of comparisons.
fn chunk_max(values: &[f32]) -> (f32, bool) {
    const LANES: usize = 16;
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    let (rows, rest) = values.as_chunks::<LANES>();
    for row in rows {
        for lane in 0..LANES {
            let x = row[lane];
            max[lane] = if x > max[lane] { x } else { max[lane] };
            bad[lane] |= x.is_nan() | (x == f32::INFINITY);
        }
    }
    let all = max.iter().chain(rest);
    (
        all.fold(f32::NEG_INFINITY, |a, &x| if x > a { x } else { a }),
        bad.contains(&true) || rest.iter().any(|x| x.is_nan() || *x == f32::INFINITY),
    )
}

/// Log-softmax of `logits` at `token`.
fn logprob(logits: &[f32], best: u32, token: u32) -> f32 {
    let best = f64::from(logits[best as usize]);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - best).exp()).sum();
    (f64::from(logits[token as usize]) - best - sum.ln()) as f32
}
