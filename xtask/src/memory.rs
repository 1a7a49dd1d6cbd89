//! The memory read ceiling: how fast threads can read a buffer, the floor under every decoded token.

use std::hint::black_box;
use std::time::Instant;

/// Sums a slice in independent lanes, so that reading and not the additions bounds it.
fn sum(words: &[u64]) -> u64 {
    const LANES: usize = 64;
    let mut lanes = [0u64; LANES];
    let (blocks, rest) = words.as_chunks::<LANES>();
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |total, word| total.wrapping_add(*word))
}

/// The best rate, in bytes per second, of `passes` passes in which `threads` threads read `bytes` bytes in equal parts.
///
/// The best, because it is a ceiling: whatever slows a pass down is not the memory.
pub fn read_ceiling(bytes: usize, threads: usize, passes: usize) -> f64 {
    let words: Vec<u64> = (0..bytes as u64 / 8).collect();
    let part = words.len().div_ceil(threads.max(1)).max(1);
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(part) {
                scope.spawn(move || black_box(sum(black_box(part))));
            }
        });
        (words.len() * 8) as f64 / start.elapsed().as_secs_f64()
    };
    (0..passes).map(|_| pass()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        let words: Vec<u64> = (1..=1000).collect();
        assert_eq!(sum(&words), 500_500);
        assert_eq!(sum(&words[..3]), 6);
        assert_eq!(sum(&[]), 0);
    }

    #[test]
    fn the_rate_is_a_plausible_one() {
        // Slower than a disk or faster than any memory would mean that the loop was removed or the bytes miscounted.
        let rate = read_ceiling(64 << 20, 2, 3);
        assert!((1e8..1e13).contains(&rate), "{rate} bytes/s");
    }
}
