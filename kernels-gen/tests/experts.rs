//! Routers, the lists of their slots and the sums of those, against plain loops.
#![cfg(feature = "llvm")]

mod common;

use common::*;
use tilec_ir::graph::Scoring;
use tilec_ir::stages::Routing;
use tilec_kernels_gen::experts::{ExpertLists, Route};
use tilec_kernels_gen::pieces::Scale;

const NULL: usize = 0;

/// Experts and weights of one row, as `tilec_ir::graph::Router` says it, in float64.
fn reference(scores: &[f32], routing: &Routing, correction: Option<&[f32]>) -> (Vec<u32>, Vec<f64>) {
    let scores: Vec<f64> = scores.iter().map(|x| f64::from(*x)).collect();
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let all: f64 = scores.iter().map(|x| x.exp()).sum();
    let share = |e: usize| match routing.scoring {
        Scoring::Softmax => scores[e].exp() / all,
        Scoring::ChosenSoftmax => scores[e].exp(),
        Scoring::Sigmoid => sigmoid(scores[e]),
    };
    let compared = |e: usize| correction.map_or(scores[e], |c| sigmoid(scores[e]) + f64::from(c[e]));
    let mut chosen: Vec<usize> = (0..scores.len()).collect();
    chosen.sort_by(|a, b| compared(*b).partial_cmp(&compared(*a)).unwrap().then(a.cmp(b)));
    chosen.truncate(routing.top_k);
    chosen.sort_unstable();
    let sum: f64 = chosen.iter().map(|e| share(*e)).sum();
    let divide = routing.renormalize || routing.scoring == Scoring::ChosenSoftmax;
    let total = if divide { sum } else { 1.0 };
    let weights = chosen.iter().map(|e| share(*e) / total * f64::from(routing.factor)).collect();
    (chosen.into_iter().map(|e| e as u32).collect(), weights)
}

fn routed(address: usize, route: &Route, scores: &[f32], correction: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let rows = scores.len() / route.experts;
    let mut experts = vec![u32::MAX; rows * route.routing.top_k];
    let mut weights = vec![f32::NAN; rows * route.routing.top_k];
    let mut scratch = Bytes::new(route.scratch_bytes());
    let correction = if route.correction { correction.as_ptr() as usize } else { NULL };
    call!(
        address,
        scores.as_ptr(),
        rows,
        correction,
        experts.as_mut_ptr(),
        weights.as_mut_ptr(),
        scratch.as_mut_ptr(),
    );
    (experts, weights)
}

#[test]
fn routers_choose_and_weigh_as_the_plain_loop_does() {
    for (experts, top_k) in [(384, 8), (128, 8), (32, 4), (6, 2), (17, 17), (5, 1), (33, 3)] {
        for (scoring, renormalize, factor, correction) in [
            (Scoring::Softmax, false, 1.0, false),
            (Scoring::Softmax, true, 1.0, false),
            (Scoring::ChosenSoftmax, false, 1.0, false),
            (Scoring::Sigmoid, true, 2.5, true),
            (Scoring::Sigmoid, false, 1.0, false),
        ] {
            let routing = Routing { scoring, renormalize, top_k, factor };
            let route = Route { experts, routing, correction };
            let mut random = Random(experts as u64 * 31 + top_k as u64);
            let rows = 9;
            let scores: Vec<f32> = random.units(rows * experts).iter().map(|x| x * 4.0).collect();
            let bias = random.units(experts);
            let mut across: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
            for (cpu, target) in targets() {
                let (chosen, weights) = with_kernel(
                    &target,
                    |k| k.route("route", &route),
                    |address| {
                        let all = routed(address, &route, &scores, &bias);
                        // One row at a time: the same bits.
                        for row in 0..rows {
                            let own = routed(address, &route, &scores[row * experts..][..experts], &bias);
                            assert_eq!(own.0, all.0[row * top_k..][..top_k], "{cpu} {route:?}");
                            assert_eq!(bits(&own.1), bits(&all.1[row * top_k..][..top_k]), "{cpu} {route:?}");
                        }
                        all
                    },
                );
                for row in 0..rows {
                    let correction = correction.then_some(&bias[..]);
                    let (want, shares) = reference(&scores[row * experts..][..experts], &routing, correction);
                    assert_eq!(chosen[row * top_k..][..top_k], want, "{cpu} {route:?} row {row}");
                    for (got, want) in weights[row * top_k..][..top_k].iter().zip(shares) {
                        let off = (f64::from(*got) - want).abs();
                        assert!(off <= 2e-6 * want.max(1e-3), "{cpu} {route:?}: {got}, should be {want}");
                    }
                }
                across.push((chosen, bits(&weights)));
            }
            assert!(across.windows(2).all(|pair| pair[0] == pair[1]), "{route:?} differs between targets");
        }
    }
}

#[test]
fn equal_and_broken_scores_fill_every_slot() {
    let routing = Routing { scoring: Scoring::ChosenSoftmax, renormalize: false, top_k: 3, factor: 1.0 };
    let route = Route { experts: 20, routing, correction: false };
    let with = |changes: &[(usize, f32)]| {
        let mut scores = vec![-1.0f32; 20];
        changes.iter().for_each(|(at, value)| scores[*at] = *value);
        scores
    };
    let cases: [(Vec<f32>, [u32; 3]); 6] = [
        (vec![1.0; 20], [0, 1, 2]),
        (with(&[(19, 2.0), (17, 2.0), (3, 2.0), (18, 2.0)]), [3, 17, 18]),
        (with(&[(4, -0.0), (5, 0.0), (6, -0.0), (7, 0.0)]), [4, 5, 6]),
        (with(&[(0, f32::NAN), (1, f32::NAN), (9, 3.0)]), [2, 3, 9]),
        (vec![f32::NAN; 20], [0, 1, 2]),
        (vec![f32::NEG_INFINITY; 20], [0, 1, 2]),
    ];
    for (cpu, target) in targets() {
        with_kernel(
            &target,
            |k| k.route("route", &route),
            |address| {
                for (scores, want) in &cases {
                    assert_eq!(routed(address, &route, scores, &[]).0, want, "{cpu} {scores:?}");
                }
            },
        );
    }
}

#[test]
fn slots_are_sorted_by_expert_and_then_by_row() {
    let lists = ExpertLists { experts: 5, top_k: 2, max_rows: 6 };
    let experts: Vec<u32> = vec![1, 4, 0, 1, 1, 3, 0, 4];
    let weights: Vec<f32> = (0..8).map(|i| i as f32 / 8.0).collect();
    for (cpu, target) in targets() {
        with_kernel(
            &target,
            |k| Ok(k.expert_lists("lists", &lists)),
            |address| {
                let mut out = Bytes::new(lists.bytes());
                call!(address, experts.as_ptr(), weights.as_ptr(), 4, out.as_mut_ptr());
                let starts: Vec<i32> = (0..6).map(|e| out.i32_at(e * 4)).collect();
                assert_eq!(starts, [0, 2, 5, 5, 6, 8], "{cpu}");
                let rows: Vec<i32> = (0..8).map(|i| out.i32_at(lists.rows() + i * 4)).collect();
                assert_eq!(rows, [1, 3, 0, 1, 2, 2, 0, 3], "{cpu}");
                let sorted: Vec<f32> = (0..8).map(|i| out.f32_at(lists.weights() + i * 4)).collect();
                assert_eq!(sorted, [2, 6, 0, 3, 4, 5, 1, 7].map(|i| i as f32 / 8.0), "{cpu}");
                call!(address, experts.as_ptr(), weights.as_ptr(), 0, out.as_mut_ptr());
                assert_eq!((0..6).map(|e| out.i32_at(e * 4)).sum::<i32>(), 0, "{cpu}: no rows");
            },
        );
    }
}

#[test]
fn slots_are_added_to_their_rows_and_factors_multiply() {
    let (cols, stride) = (21, 24);
    let mut random = Random(3);
    let (tile, before) = (random.units(3 * stride), random.units(4 * stride));
    let (rows, weights): ([u32; 3], [f32; 3]) = ([2, 0, 2], [0.5, 2.0, -1.0]);
    for (cpu, target) in targets() {
        let mut dst = before.clone();
        with_kernel(
            &target,
            |k| Ok(k.add_slots("add")),
            |address| {
                let (rows, weights) = (rows.as_ptr(), weights.as_ptr());
                call!(address, tile.as_ptr(), stride, rows, weights, 3, cols, dst.as_mut_ptr(), stride)
            },
        );
        let mut want = before.clone();
        for (slot, row) in rows.iter().enumerate() {
            for c in 0..cols {
                let sum = &mut want[*row as usize * stride + c];
                *sum = tile[slot * stride + c].mul_add(weights[slot], *sum);
            }
        }
        assert_eq!(bits(&dst), bits(&want), "{cpu}");
        with_kernel(
            &target,
            |k| Ok(k.scale("scale", &Scale { factor: 0.612 })),
            |address| call!(address, dst.as_mut_ptr(), stride, 4, cols),
        );
        for (i, value) in want.iter_mut().enumerate().filter(|(i, _)| i % stride < cols) {
            *value *= 0.612;
            assert_eq!(dst[i].to_bits(), value.to_bits(), "{cpu}");
        }
        with_kernel(
            &target,
            |k| Ok(k.clear_rows("clear")),
            |address| call!(address, dst.as_mut_ptr(), stride, 3, cols),
        );
        for (i, value) in want.iter_mut().enumerate().filter(|(i, _)| i / stride < 3 && i % stride < cols) {
            *value = 0.0;
            assert_eq!(dst[i].to_bits(), 0, "{cpu}");
        }
        assert_eq!(bits(&dst), bits(&want), "{cpu}: what is not in the tile stays");
    }
}

#[test]
fn choosing_more_than_there_are_is_refused() {
    for top_k in [0, 5] {
        let routing = Routing { scoring: Scoring::Softmax, renormalize: false, top_k, factor: 1.0 };
        assert!(Route { experts: 4, routing, correction: false }.check().is_err());
    }
}
