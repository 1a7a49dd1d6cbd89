//! Counts and times of generation, by the monotonic clock.

use std::time::Duration;

/// Counts and times of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RequestStats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, tokens that were in the cache from before and were not processed.
    pub cached_tokens: usize,
    /// Tokens that were chosen, a stop token included.
    pub generated_tokens: usize,
    /// From the request's first step to its first token.
    pub first_token: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

impl RequestStats {
    /// Prompt tokens processed per second; `None` before the first token.
    pub fn prompt_rate(&self) -> Option<f64> {
        rate(self.prompt_tokens - self.cached_tokens, self.first_token)
    }

    /// Tokens per second after the first; `None` before the second.
    pub fn decode_rate(&self) -> Option<f64> {
        rate(self.generated_tokens.saturating_sub(1), self.decode)
    }
}

fn rate(count: usize, time: Duration) -> Option<f64> {
    (count > 0 && !time.is_zero()).then(|| count as f64 / time.as_secs_f64())
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTime {
    /// Rows of all sequences.
    pub rows: usize,
    /// Rows whose logits were computed.
    pub logit_rows: usize,
    /// Tokens that were chosen.
    pub tokens: usize,
    /// Time in the engine, without that of a draft.
    pub step: Duration,
    /// Time of a draft: its guesses before the step, and telling it of the step's rows.
    pub draft: Duration,
    /// Time for choosing tokens and telling of them.
    pub sampling: Duration,
}
