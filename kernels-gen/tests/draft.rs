//! Convolutions, candidates and scores of pairs against plain loops in float64.
#![cfg(feature = "llvm")]

mod common;

use common::*;
use tilec_kernels_gen::conv::DynamicConv;
use tilec_kernels_gen::selector::{PairScores, TopK};

const NULL: usize = 0;

#[test]
fn convolutions_reach_the_row_before_of_the_same_sequence() {
    for (cols, group) in [(64, 16), (48, 4), (21, 7), (34, 17), (40, 40), (5, 1)] {
        let groups = cols / group;
        let sequences: Vec<u32> = vec![3, 3, 3, 1, 1, 0, 3];
        let rows = sequences.len();
        let mut random = Random(cols as u64 + 7);
        let (x, own) = (random.units(rows * cols), random.units(rows * 4 * groups));
        let (base, added) = (random.units(4 * cols), random.units(rows * cols));
        for side in [0, 1] {
            for residual in [false, true] {
                let conv = DynamicConv { cols, group, residual };
                let mut across: Vec<Vec<u32>> = Vec::new();
                for (cpu, target) in targets() {
                    let mut out = vec![f32::NAN; rows * cols];
                    let mut in_place = added.clone();
                    with_kernel(
                        &target,
                        |k| k.dynamic_conv("conv", &conv),
                        |address| {
                            let run = |start: usize, end: usize, from: usize, to: *mut f32| {
                                call!(
                                    address,
                                    x.as_ptr(),
                                    start,
                                    end,
                                    sequences.as_ptr(),
                                    own[side * 2 * groups..].as_ptr(),
                                    base[side * 2 * cols..].as_ptr(),
                                    from,
                                    to,
                                );
                            };
                            let from = if residual { added.as_ptr() as usize } else { NULL };
                            // Wherever the rows are cut.
                            run(0, 2, from, out.as_mut_ptr());
                            run(2, 3, from, out.as_mut_ptr());
                            run(3, rows, from, out.as_mut_ptr());
                            if residual {
                                let to = in_place.as_mut_ptr();
                                run(0, rows, to as usize, to);
                            }
                        },
                    );
                    for row in 0..rows {
                        for col in 0..cols {
                            let tap = |tap: usize| {
                                f64::from(base[side * 2 * cols + tap * cols + col])
                                    + f64::from(
                                        own[row * 4 * groups
                                            + side * 2 * groups
                                            + tap * groups
                                            + col / group],
                                    )
                            };
                            let at = |row: usize| f64::from(x[row * cols + col]);
                            let mut wanted = tap(0) * at(row);
                            if row > 0 && sequences[row - 1] == sequences[row] {
                                wanted += tap(1) * at(row - 1);
                            }
                            if residual {
                                wanted += f64::from(added[row * cols + col]);
                            }
                            let got = f64::from(out[row * cols + col]);
                            assert!(
                                (got - wanted).abs() < 2e-6,
                                "{cpu} {conv:?} {row} {col}: {got} {wanted}"
                            );
                        }
                    }
                    let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
                    if residual {
                        assert!(in_place.iter().map(|x| x.to_bits()).eq(bits.iter().copied()), "{cpu}");
                    }
                    across.push(bits);
                }
                // Every fused multiply-add is an explicit one.
                assert!(across.iter().all(|bits| *bits == across[0]), "{conv:?}");
            }
        }
    }
}

/// The row before may hold anything if it is another sequence's.
#[test]
fn nothing_comes_from_another_sequence() {
    let conv = DynamicConv { cols: 20, group: 4, residual: false };
    let (own, base) = (vec![0.5f32; 2 * 20], vec![1.0f32; 2 * 20]);
    let mut x = vec![f32::NAN; 20];
    x.extend([1.0; 20]);
    for (cpu, target) in targets() {
        let mut out = vec![f32::NAN; 40];
        with_kernel(
            &target,
            |k| k.dynamic_conv("conv", &conv),
            |address| {
                let sequences = [4u32, 5];
                call!(
                    address,
                    x.as_ptr(),
                    1usize,
                    2usize,
                    sequences.as_ptr(),
                    own.as_ptr(),
                    base.as_ptr(),
                    NULL,
                    out.as_mut_ptr(),
                );
            },
        );
        assert_eq!(out[20..], [1.5; 20], "{cpu}");
    }
}

fn best(logits: &[f32], k: usize) -> Vec<usize> {
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    let nan = |token: usize| logits[token].is_nan();
    tokens.sort_by(|a, b| {
        let order = (logits[*b]).partial_cmp(&logits[*a]).unwrap_or(std::cmp::Ordering::Equal);
        nan(*a).cmp(&nan(*b)).then(if nan(*a) { std::cmp::Ordering::Equal } else { order }).then(a.cmp(b))
    });
    tokens.truncate(k);
    tokens
}

#[test]
fn the_largest_logits_in_their_order() {
    for (vocab, k) in [(1, 1), (7, 7), (16, 4), (40, 3), (257, 16), (3000, 64), (64, 64)] {
        let mut random = Random(vocab as u64 * 3 + k as u64);
        let rows = 9;
        let mut logits: Vec<f32> = random.units(rows * vocab).iter().map(|x| x * 12.0).collect();
        // Rows of equals, of zeros of both signs, ascending, descending, and broken ones.
        for row in 0..rows {
            for (at, x) in logits[row * vocab..][..vocab].iter_mut().enumerate() {
                *x = match row {
                    1 => (at % 3) as f32,
                    2 => {
                        if at % 2 == 0 {
                            -0.0
                        } else {
                            0.0
                        }
                    }
                    3 => at as f32,
                    4 => -(at as f32),
                    5 if at % 2 == 1 => f32::NAN,
                    6 => f32::NAN,
                    7 if at % 3 > 0 => f32::NEG_INFINITY,
                    8 if at == vocab / 2 => f32::INFINITY,
                    _ => *x,
                };
            }
        }
        for (factor, softcap) in [(1.0f32, None), (0.25, None), (0.7, Some(5.0f32))] {
            let top = TopK { vocab, k, factor, softcap };
            for (cpu, target) in targets() {
                let (mut tokens, mut values) = (vec![u32::MAX; rows * k], vec![0f32; rows * k]);
                let mut scratch = Bytes::new(top.scratch_bytes());
                with_kernel(
                    &target,
                    |b| b.top_k("top", &top),
                    |address| {
                        call!(
                            address,
                            logits.as_ptr(),
                            rows,
                            tokens.as_mut_ptr(),
                            values.as_mut_ptr(),
                            scratch.as_mut_ptr(),
                        );
                    },
                );
                for row in 0..rows {
                    let own = &logits[row * vocab..][..vocab];
                    let wanted = best(own, k);
                    let got: Vec<usize> = tokens[row * k..][..k].iter().map(|x| *x as usize).collect();
                    assert_eq!(got, wanted, "{cpu} {top:?} row {row}");
                    for (token, value) in wanted.iter().zip(&values[row * k..]) {
                        let logit = f64::from(own[*token]) * f64::from(factor);
                        let wanted =
                            softcap.map_or(logit, |cap| f64::from(cap) * (logit / f64::from(cap)).tanh());
                        let got = f64::from(*value);
                        let same =
                            wanted.is_nan() && got.is_nan() || got == wanted || (got - wanted).abs() < 2e-6;
                        assert!(same, "{cpu} {top:?}: {got} for {wanted}");
                    }
                }
            }
        }
    }
}

#[test]
fn pairs_are_worth_logit_and_product() {
    for (k, rank) in [(1, 1), (3, 5), (16, 16), (5, 256), (64, 40)] {
        let pairs = PairScores { k, rank };
        let stride = pairs.stride();
        let mut random = Random(k as u64 * 17 + rank as u64);
        let (before, behind) = (random.units(k * stride), random.units(k * stride));
        let (hidden, logits) = (random.units(rank), random.units(k));
        for (cpu, target) in targets() {
            let mut out = vec![f32::NAN; k * k];
            let mut turned = before.clone();
            with_kernel(
                &target,
                |b| b.pair_scores("pairs", &pairs),
                |address| {
                    call!(
                        address,
                        turned.as_mut_ptr(),
                        behind.as_ptr(),
                        hidden.as_ptr(),
                        logits.as_ptr(),
                        out.as_mut_ptr(),
                    );
                },
            );
            for a in 0..k {
                for b in 0..k {
                    let term = |c: usize| {
                        f64::from(before[a * stride + c])
                            * f64::from(hidden[c])
                            * f64::from(behind[b * stride + c])
                    };
                    let wanted = f64::from(logits[b]) + (0..rank).map(term).sum::<f64>();
                    let got = f64::from(out[a * k + b]);
                    assert!((got - wanted).abs() < 5e-6, "{cpu} {pairs:?} {a} {b}: {got} {wanted}");
                }
            }
        }
    }
}
