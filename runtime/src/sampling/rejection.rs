//! Guesses that are drawn, and rejection sampling: whether a guess is taken, and what stands in its place.
//!
//! A draft's guess is drawn from the draft's own distribution `q`. It is taken with the probability
//! `min(1, p / q)` of that token, where `p` is the model's distribution behind temperature, filters and
//! penalties; else a token is drawn in proportion to `max(p - q, 0)`. What comes out has the distribution `p`
//! (Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", 2023), whatever
//! `q` is; guesses are right as often as the two overlap. But it is not the token that is drawn without a
//! guess: texts then depend on the draft, not in their distribution, but in their tokens.
//!
//! The guess, the coin and the token in its place have random numbers of their own ([`Stream`]), each a function
//! of seed and position, as the draw without guesses has. A guess behind one that was rejected is thrown away
//! without having been looked at, so that its numbers may be used again.

use super::draw::{Scratch, guess_weights, weights};
use super::philox::{Stream, random_bits_of, uniform_of};
use tilec_ir::launch::{REACH, SampleRow};

/// What a guess was drawn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The tokens that could have been guessed; `None` for all, by number.
    pub tokens: Option<Vec<u32>>,
    /// A number for each, as a logit; finite or -infinity.
    pub scores: Vec<f32>,
}

/// A row of `q`: temperature alone.
pub(super) fn of_draft(row: &SampleRow) -> SampleRow {
    SampleRow { reach: REACH, top_k: 0, top_p: 0, ..*row }
}

/// The place of the guess for `position` among `scores`, of which `best` is the largest, finite.
pub(super) fn draw_guess(
    scores: &[f32],
    best: f32,
    row: &SampleRow,
    position: u64,
    scratch: &mut Scratch,
) -> usize {
    let random = random_bits_of(row.seed, position, Stream::Guess);
    super::draw::by_id(scores, best, &of_draft(row), random, scratch) as usize
}

/// The token at `position`: `guess`, which was drawn from `drawn`, or one in its place. `best` is the largest of
/// the model's logits, finite, and none is NaN.
pub(super) fn verify(
    logits: &[f32],
    best: f32,
    row: &SampleRow,
    position: u64,
    (guess, drawn): (u32, &Drawn),
    scratch: &mut Scratch,
) -> u32 {
    let model = weights(logits, best, row, scratch);
    let own = guess_weights(&drawn.scores, &of_draft(row));
    let sum = |weights: &[u64]| weights.iter().sum::<u64>() as f64;
    let (model_sum, own_sum) = (sum(&model), sum(&own));
    let place = match &drawn.tokens {
        None => Some(guess as usize),
        Some(tokens) => tokens.iter().position(|token| *token == guess),
    };
    let share = |weights: &[u64], place: Option<usize>, sum: f64| {
        place.and_then(|place| weights.get(place)).map_or(0.0, |weight| *weight as f64 / sum)
    };
    let (p, q) = (share(&model, Some(guess as usize), model_sum), share(&own, place, own_sum));
    if uniform_of(row.seed, position, Stream::Coin) * q < p {
        return guess;
    }
    let mut left: Vec<f64> = model.iter().map(|weight| *weight as f64 / model_sum).collect();
    for (place, weight) in own.iter().enumerate() {
        let token = drawn.tokens.as_ref().map_or(place, |tokens| tokens[place] as usize);
        if let Some(left) = left.get_mut(token) {
            *left = (*left - *weight as f64 / own_sum).max(0.0);
        }
    }
    let residual: f64 = left.iter().sum();
    let mut at = uniform_of(row.seed, position, Stream::Residual) * residual;
    let mut last = None;
    for (token, share) in left.iter().enumerate().filter(|(_, share)| **share > 0.0) {
        last = Some(token as u32);
        if at < *share {
            break;
        }
        at -= share;
    }
    // Where roundings leave nothing, the two are equal, and so the guess is as good as any.
    last.unwrap_or(guess)
}
