//! The draw among tokens, as kernels do it as well: the same token from the same logits, on any machine and
//! in any order of work.
//!
//! Distances are a subtraction and a multiplication in float32, weights a polynomial of fused
//! multiply-adds, rounded to integers; so sums of them do not depend on an order, and every comparison is
//! exact. Without `top_k` and `top_p`, the random number chooses among the weights in the order of ids;
//! with them, in the order of ranks, of which they and `min_p` keep the first ones. `sample.cuh` says how a
//! GPU does it.

use super::philox::random_bits;
use std::cmp::Ordering;
use tilec_ir::launch::{REACH, SampleRow, WEIGHT_BITS};

/// Steps of a power of two in which ranks are told apart by distance, before logits are compared.
const STEPS: f32 = 16.0;
const BUCKETS: usize = (REACH * STEPS) as usize + 1;

/// Ids whose weights are added up at a time.
const CHUNK: usize = 1024;

/// Room that a draw needs.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    /// Weights of chunks of ids, or of buckets of ranks.
    sums: Vec<u64>,
    /// Tokens of the buckets.
    counts: Vec<u64>,
    ranked: Vec<Ranked>,
}

#[derive(Clone, Copy, Debug)]
struct Ranked {
    logit: f32,
    token: u32,
    weight: u64,
}

/// Where a rank is.
struct Place {
    token: u32,
    /// Weights up to it, its own included.
    sum: u64,
}

/// What tokens are counted by.
#[derive(Clone, Copy, PartialEq)]
enum Measure {
    Tokens,
    Weights,
}

/// One row's logits and what was made of them.
struct Row<'a> {
    logits: &'a [f32],
    best: f32,
    scale: f32,
    /// The largest distance of a token that counts.
    reach: f32,
}

/// The token at `position`. `best` is the largest of the logits, finite, and none is NaN.
pub(super) fn draw(
    logits: &[f32],
    best: f32,
    parameters: &SampleRow,
    position: u64,
    scratch: &mut Scratch,
) -> u32 {
    let random = random_bits(parameters.seed, position);
    let Some((row, total)) = filtered(logits, best, parameters, scratch) else {
        return by_id(logits, best, parameters, random, scratch);
    };
    // The best token has a weight, and every number below the total is somebody's.
    let below = ((u128::from(random) * u128::from(total)) >> 64) as u64;
    row.rank(Measure::Weights, below, scratch).map_or(0, |place| place.token)
}

/// The token that a random number chooses in the order of ids, by temperature and `min_p` alone.
pub(super) fn by_id(
    logits: &[f32],
    best: f32,
    parameters: &SampleRow,
    random: u64,
    scratch: &mut Scratch,
) -> u32 {
    let row = Row { logits, best, scale: parameters.scale, reach: parameters.reach };
    let below = |total: u64| ((u128::from(random) * u128::from(total)) >> 64) as u64;
    row.by_id(below, &mut scratch.sums)
}

/// The weight of every token that can be drawn, 0 of all others; as for [`draw`].
pub(super) fn weights(logits: &[f32], best: f32, parameters: &SampleRow, scratch: &mut Scratch) -> Vec<u64> {
    let of = |row: &Row<'_>| logits.iter().map(|logit| row.weight(*logit)).collect();
    let Some((row, total)) = filtered(logits, best, parameters, scratch) else {
        return of(&Row { logits, best, scale: parameters.scale, reach: parameters.reach });
    };
    let mut weights: Vec<u64> = of(&row);
    // The last rank that is left; what has another rank behind it is cut off.
    if let Some(last) = row.rank(Measure::Weights, total.max(1) - 1, scratch) {
        let ranked = |token: u32, logit: f32| Ranked { logit, token, weight: 0 };
        let last = ranked(last.token, logits[last.token as usize]);
        for ((token, logit), weight) in (0u32..).zip(logits).zip(&mut weights) {
            if by_rank(&ranked(token, *logit), &last) == Ordering::Greater {
                *weight = 0;
            }
        }
    }
    weights
}

/// The weights of scores by temperature alone; none is NaN, and one is finite.
pub(super) fn guess_weights(scores: &[f32], parameters: &SampleRow) -> Vec<u64> {
    let best = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let row = Row { logits: scores, best, scale: parameters.scale, reach: REACH };
    scores.iter().map(|score| row.weight(*score)).collect()
}

/// Where `top_k` or `top_p` cuts ranks off: the row with its ranks in `scratch`, and the weights of those that are
/// left; `None` if neither does.
fn filtered<'a>(
    logits: &'a [f32],
    best: f32,
    parameters: &SampleRow,
    scratch: &mut Scratch,
) -> Option<(Row<'a>, u64)> {
    let top_k = parameters.top_k as usize;
    let cuts = top_k > 0 && top_k < logits.len();
    let row = Row { logits, best, scale: parameters.scale, reach: parameters.reach };
    if !cuts && parameters.top_p == 0 {
        return None;
    }
    // Where shares are asked for, `min_p` comes behind them.
    let min_p = (parameters.top_p != 0 && parameters.reach < REACH).then(|| row.total());
    let row = if parameters.top_p != 0 { Row { reach: REACH, ..row } } else { row };
    row.tally(scratch);
    let mut total = scratch.sums.iter().sum();
    if cuts && let Some(place) = row.rank(Measure::Tokens, top_k as u64 - 1, scratch) {
        total = place.sum;
    }
    if parameters.top_p != 0 {
        let share = u128::from(parameters.top_p) * u128::from(total);
        let wanted = (share.div_ceil(1 << 64) as u64).max(1);
        total = row.rank(Measure::Weights, wanted - 1, scratch).map_or(total, |place| place.sum);
    }
    Some((row, total.min(min_p.unwrap_or(total))))
}

impl Row<'_> {
    /// The token whose weight is the one that `below` all of them says, in the order of ids.
    fn by_id(&self, below: impl Fn(u64) -> u64, sums: &mut Vec<u64>) -> u32 {
        sums.clear();
        sums.extend(self.logits.chunks(CHUNK).map(|chunk| self.sum(chunk)));
        let mut left = below(sums.iter().sum());
        for (number, (chunk, sum)) in self.logits.chunks(CHUNK).zip(sums).enumerate() {
            if left >= *sum {
                left -= *sum;
                continue;
            }
            for (token, logit) in (number * CHUNK..).zip(chunk) {
                let weight = self.weight(*logit);
                if left < weight {
                    return token as u32;
                }
                left -= weight;
            }
        }
        0
    }

    fn total(&self) -> u64 {
        self.logits.chunks(CHUNK).map(|chunk| self.sum(chunk)).sum()
    }

    #[inline(always)]
    fn distance(&self, logit: f32) -> f32 {
        (self.best - logit) * self.scale
    }

    #[inline(always)]
    fn weight(&self, logit: f32) -> u64 {
        let distance = self.distance(logit);
        // Computed in any case: no branch keeps the sums from being a vector's.
        let weight = weight(distance.min(REACH));
        if distance <= self.reach { weight } else { 0 }
    }

    #[inline(always)]
    fn sum_all(&self, logits: &[f32]) -> u64 {
        logits.iter().fold(0, |sum: u64, logit| sum.wrapping_add(self.weight(*logit)))
    }

    fn sum(&self, logits: &[f32]) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if has_fma() {
            // SAFETY: the processor has these instructions.
            return unsafe { self.sum_fma(logits) };
        }
        self.sum_all(logits)
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn sum_fma(&self, logits: &[f32]) -> u64 {
        self.sum_all(logits)
    }

    /// Tokens and weights by bucket.
    fn tally(&self, scratch: &mut Scratch) {
        for of in [&mut scratch.sums, &mut scratch.counts] {
            of.clear();
            of.resize(BUCKETS, 0);
        }
        #[cfg(target_arch = "x86_64")]
        if has_fma() {
            // SAFETY: the processor has these instructions.
            return unsafe { self.tally_fma(scratch) };
        }
        self.tally_all(scratch);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn tally_fma(&self, scratch: &mut Scratch) {
        self.tally_all(scratch);
    }

    #[inline(always)]
    fn tally_all(&self, scratch: &mut Scratch) {
        for logit in self.logits {
            let distance = self.distance(*logit);
            if distance <= self.reach {
                let bucket = (distance * STEPS) as usize;
                scratch.sums[bucket] += weight(distance);
                scratch.counts[bucket] += 1;
            }
        }
    }

    /// The token of the rank with which what the measure adds up to exceeds `target`; `None` if it never
    /// does.
    fn rank(&self, measure: Measure, target: u64, scratch: &mut Scratch) -> Option<Place> {
        let Scratch { sums, counts, ranked } = scratch;
        let of = |tokens: u64, weights: u64| if measure == Measure::Tokens { tokens } else { weights };
        let (mut left, mut sum) = (target, 0);
        let bucket = (0..BUCKETS).find(|bucket| {
            let own = of(counts[*bucket], sums[*bucket]);
            if left < own {
                return true;
            }
            left -= own;
            sum += sums[*bucket];
            false
        })?;
        // Multiplying by a power of two is exact.
        let range = bucket as f32 / STEPS..(bucket + 1) as f32 / STEPS;
        ranked.clear();
        ranked.extend((0u32..).zip(self.logits).filter_map(|(token, &logit)| {
            let distance = self.distance(logit);
            let within = range.contains(&distance) && distance <= self.reach;
            within.then(|| Ranked { logit, token, weight: weight(distance) })
        }));
        ranked.sort_unstable_by(by_rank);
        ranked.iter().find_map(|token| {
            sum += token.weight;
            let own = of(1, token.weight);
            if left < own {
                return Some(Place { token: token.token, sum });
            }
            left -= own;
            None
        })
    }
}

/// Best first; among equals, the lowest id.
fn by_rank(a: &Ranked, b: &Ranked) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.token.cmp(&b.token))
}

#[cfg(target_arch = "x86_64")]
fn has_fma() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// 2^-distance in units of 2^-[`WEIGHT_BITS`], to 22 or 23 significant bits; `distance` is from 0
/// to [`REACH`].
#[inline(always)]
pub(super) fn weight(distance: f32) -> u64 {
    // 1.5 * 2^23: what is added to it is rounded to whole numbers, which its bits then hold.
    const WHOLE: f32 = 12_582_912.0;
    const BITS: u32 = 22;
    let shifted = distance + WHOLE;
    // 2^fraction, for fractions from -1/2 to 1/2: off by 1.1e-7 at most, and 1 at 0.
    let fraction = (shifted - WHOLE) - distance;
    let [c1, c2, c3, c4, c5] = POWERS;
    let power = c5.mul_add(fraction, c4).mul_add(fraction, c3).mul_add(fraction, c2);
    let power = power.mul_add(fraction, c1).mul_add(fraction, 1.0);
    // Between 2 and 4 a float's last bit is 2^-22.
    let mantissa = (power + 2.0).to_bits() & 0x7f_ffff;
    let whole = shifted.to_bits().wrapping_sub(WHOLE.to_bits());
    (u64::from(mantissa) << (WEIGHT_BITS - BITS)).wrapping_shr(whole)
}

/// Factors of a fraction's powers in 2^fraction, from the first power on.
#[expect(clippy::approx_constant, reason = "it is not quite the logarithm of 2")]
const POWERS: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_7];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_powers_of_two() {
        assert_eq!((weight(0.0), weight(1.0), weight(40.0)), (1 << 40, 1 << 39, 1));
        let mut last = u64::MAX;
        for step in 0..=400_000u32 {
            let distance = step as f32 * 1e-4;
            let (found, wanted) = (weight(distance) as f64, (40.0 - f64::from(distance)).exp2());
            // The polynomial, its roundings, half of the last bit, what rounding down takes.
            assert!((found - wanted).abs() <= wanted * 4e-7 + 1.0, "{distance}: {found}, {wanted}");
            assert!(weight(distance) <= last, "{distance}");
            last = weight(distance);
        }
    }

    /// The bits of all of these weights: whoever computes them otherwise chooses other tokens. The simulated
    /// kernel's test has the same number.
    #[test]
    fn weights_keep_their_bits() {
        let weights = (0..=400_000u32).map(|step| weight(step as f32 / 10_000.0));
        let digest = weights
            .fold(0u64, |digest, weight| digest.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(weight));
        assert_eq!([digest as u32, (digest >> 32) as u32], [3798205818, 2881840929]);
    }
}
