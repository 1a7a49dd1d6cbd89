//! Random numbers as a function of a counter: Philox4x32 with ten rounds (Salmon, Moraes, Dror
//! and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011).

/// Multipliers of the two halves.
const M: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
/// What the key grows by every round: the golden ratio and √3 − 1.
const W: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let halves = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..10 {
        let (high0, low0) = halves(M[0], counter[0]);
        let (high1, low1) = halves(M[1], counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(W[0]), key[1].wrapping_add(W[1])];
    }
    counter
}

/// The random bits of one position: the key is the seed, the counter is the position (low half first, the
/// upper two words 0), and the bits are the first two words of the output, low half first.
pub fn random_bits(seed: u64, position: u64) -> u64 {
    random_bits_of(seed, position, Stream::Token)
}

/// What a random number is for. Those of one position are independent of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// The token itself, where nothing was guessed that counts.
    Token = 0,
    /// A draft's guess.
    Guess = 1,
    /// Whether the guess is taken.
    Coin = 2,
    /// The token in place of a guess.
    Residual = 3,
}

/// As [`random_bits`], for one of several purposes: its number is the counter's third word.
pub fn random_bits_of(seed: u64, position: u64, stream: Stream) -> u64 {
    let words = |x: u64| [x as u32, (x >> 32) as u32];
    let [low, high] = words(position);
    let out = philox4x32_10([low, high, stream as u32, 0], words(seed));
    u64::from(out[1]) << 32 | u64::from(out[0])
}

/// The random number of one position, uniform in [0, 1): the upper 53 of its [`random_bits`].
pub fn uniform(seed: u64, position: u64) -> f64 {
    uniform_of(seed, position, Stream::Token)
}

/// As [`uniform`], for one of several purposes.
pub fn uniform_of(seed: u64, position: u64, stream: Stream) -> f64 {
    (random_bits_of(seed, position, stream) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the generator.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn both_halves_of_seed_and_position_count() {
        let numbers = [(0, 0), (1, 0), (1 << 32, 0), (0, 1), (0, 1 << 32)].map(|(s, p)| uniform(s, p));
        for (i, a) in numbers.iter().enumerate() {
            assert!((0.0..1.0).contains(a));
            assert!(numbers[..i].iter().all(|b| a != b), "{numbers:?}");
        }
    }
}
