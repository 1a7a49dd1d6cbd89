mod rejection;

use super::*;

fn sampler(params: SamplingParams) -> Sampler {
    Sampler::new(params).unwrap()
}

/// Logits with no pattern, some equal, some hopeless.
fn logits(n: usize, scale: f32) -> Vec<f32> {
    (0..n as u64).map(|i| ((uniform(99, i) * 64.0).floor() as f32 / 64.0 - 0.5) * scale).collect()
}

/// The distribution that the parameters define, written down directly: sort everything.
fn expected(params: &SamplingParams, logits: &[f32]) -> Vec<f64> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let p = |x: f32| ((x as f64 - best as f64) / params.temperature as f64).exp();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let total: f64 = order.iter().map(|&i| p(logits[i])).sum();
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for i in order {
        if sum / total >= params.top_p as f64 {
            break;
        }
        sum += p(logits[i]);
        kept.push(i);
    }
    kept.retain(|&i| p(logits[i]) >= params.min_p as f64);
    let total: f64 = kept.iter().map(|&i| p(logits[i])).sum();
    let mut out = vec![0.0; logits.len()];
    kept.iter().for_each(|&i| out[i] = p(logits[i]) / total);
    out
}

fn draws(params: &SamplingParams, logits: &[f32], n: u64) -> Vec<u64> {
    let mut sampler = sampler(params.clone());
    let mut counts = vec![0; logits.len()];
    for position in 0..n {
        counts[sampler.sample(logits, position).unwrap().token as usize] += 1;
    }
    counts
}

/// Chi-squared of counts against probabilities, and its degrees of freedom. Infinite where
/// something impossible was drawn.
fn chi_squared(counts: &[u64], probabilities: &[f64]) -> (f64, usize) {
    let n = counts.iter().sum::<u64>() as f64;
    let mut chi = 0.0;
    let mut cells = 0;
    // Cells with few expected draws go into one.
    let (mut rest_counts, mut rest_expected) = (0.0, 0.0);
    for (&count, &p) in counts.iter().zip(probabilities) {
        let (count, e) = (count as f64, p * n);
        if p == 0.0 && count > 0.0 {
            return (f64::INFINITY, 1);
        } else if e >= 10.0 {
            chi += (count - e).powi(2) / e;
            cells += 1;
        } else {
            rest_counts += count;
            rest_expected += e;
        }
    }
    if rest_expected > 0.0 {
        chi += (rest_counts - rest_expected).powi(2) / rest_expected;
        cells += 1;
    }
    (chi, cells.max(2) - 1)
}

/// The mean of chi-squared is its degrees of freedom d and its variance 2d: five deviations.
fn bound(freedom: usize) -> f64 {
    freedom as f64 + 5.0 * (2.0 * freedom as f64).sqrt()
}

#[test]
fn draws_follow_the_distribution() {
    let base = SamplingParams { seed: 7, ..Default::default() };
    let cases = [
        base.clone(),
        SamplingParams { temperature: 0.7, ..base.clone() },
        SamplingParams { temperature: 1.6, top_k: 20, ..base.clone() },
        SamplingParams { top_p: 0.8, ..base.clone() },
        SamplingParams { min_p: 0.2, ..base.clone() },
        SamplingParams { temperature: 1.3, top_k: 40, top_p: 0.9, min_p: 0.05, ..base.clone() },
    ];
    let logits = logits(200, 6.0);
    for params in cases {
        let counts = draws(&params, &logits, 100_000);
        let (chi, freedom) = chi_squared(&counts, &expected(&params, &logits));
        assert!(chi < bound(freedom), "{params:?}: chi-squared {chi} with {freedom} degrees of freedom");

        // The test would notice if every other token came a tenth too often.
        let tilted: Vec<f64> =
            (0..).zip(expected(&params, &logits)).map(|(i, p)| p * (1.05 - 0.1 * f64::from(i % 2))).collect();
        let total: f64 = tilted.iter().sum();
        let (chi, freedom) = chi_squared(&counts, &tilted.iter().map(|p| p / total).collect::<Vec<_>>());
        assert!(chi > bound(freedom), "{params:?}: chi-squared {chi} misses a wrong distribution");
    }
}

#[test]
fn greedy_takes_the_lowest_of_the_best() {
    let mut greedy = sampler(SamplingParams::greedy());
    for n in [1, 2, 511, 512, 513, 5000] {
        let mut x = vec![-1.0; n];
        for at in [0, n / 2, n - 1] {
            x[at] = 3.0;
        }
        assert_eq!(greedy.sample(&x, 0).unwrap().token, 0);
        x[0] = 2.9;
        let lowest = (1..n).find(|&i| x[i] == 3.0).unwrap_or(0);
        assert_eq!(greedy.sample(&x, 0).unwrap().token, lowest as u32);
    }
    // Zeros of both signs are equal.
    assert_eq!(greedy.sample(&[-0.0, 0.0], 0).unwrap().token, 0);
}

#[test]
fn the_choice_depends_on_seed_and_position_only() {
    let logits = logits(1000, 4.0);
    let params = SamplingParams { seed: 3, top_p: 0.95, ..Default::default() };
    let mut forwards = sampler(params.clone());
    let there: Vec<_> = (0..200).map(|p| forwards.sample(&logits, p).unwrap().token).collect();
    let mut backwards = sampler(params.clone());
    let mut back: Vec<_> = (0..200).rev().map(|p| backwards.sample(&logits, p).unwrap().token).collect();
    back.reverse();
    assert_eq!(there, back);
    let mut other = sampler(SamplingParams { seed: 4, ..params });
    let elsewhere: Vec<_> = (0..200).map(|p| other.sample(&logits, p).unwrap().token).collect();
    assert_ne!(there, elsewhere);
    assert!(there.iter().any(|t| *t != there[0]), "positions differ");
}

#[test]
fn filters_at_their_edges() {
    let flat = vec![0.5; 64];
    let only = |params: SamplingParams, logits: &[f32]| {
        let counts = draws(&params, logits, 300);
        (0..logits.len()).filter(|&i| counts[i] > 0).collect::<Vec<_>>()
    };
    let d = SamplingParams::default;
    // Equal logits: the lowest ids stay.
    assert_eq!(only(SamplingParams { top_k: 3, ..d() }, &flat), [0, 1, 2]);
    assert_eq!(only(SamplingParams { top_k: 1, temperature: 9.0, ..d() }, &flat), [0]);
    assert_eq!(only(SamplingParams { top_k: 64, ..d() }, &flat).len(), 64);
    assert_eq!(only(SamplingParams { top_k: u32::MAX, ..d() }, &flat).len(), 64);
    // A probability of exactly top_p is enough.
    assert_eq!(only(SamplingParams { top_p: 0.5, ..d() }, &flat[..4]), [0, 1]);
    assert_eq!(only(SamplingParams { top_p: f32::MIN_POSITIVE, ..d() }, &flat), [0]);
    // min_p 1 keeps what equals the best.
    assert_eq!(only(SamplingParams { min_p: 1.0, ..d() }, &[1.0, 2.0, 2.0, 0.0]), [1, 2]);
    // -inf is never drawn, not even within top_k.
    let masked = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 1.0];
    assert_eq!(only(SamplingParams { top_k: 3, ..d() }, &masked), [1, 3]);
    assert_eq!(only(d(), &masked), [1, 3]);
    // A temperature near zero is greedy.
    assert_eq!(only(SamplingParams { temperature: 1e-30, ..d() }, &[0.1, 0.2, 0.15]), [1]);
}

/// The same choice by the definition: all tokens in order, one after the other.
fn by_sorting(params: &SamplingParams, logits: &[f32], position: u64) -> u32 {
    let row = params.launch_row();
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let distance = |x: f32| (best - x) * row.scale;
    let weight = |x: f32| if distance(x) <= 40.0 { u128::from(draw::weight(distance(x))) } else { 0 };
    let mut kept: Vec<usize> = (0..logits.len()).filter(|&i| distance(logits[i]) <= 40.0).collect();
    let ranked = (row.top_k > 0 && (row.top_k as usize) < logits.len()) || row.top_p > 0;
    if ranked {
        kept.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    }
    if row.top_k > 0 {
        kept.truncate(row.top_k as usize);
    }
    if row.top_p > 0 {
        let total: u128 = kept.iter().map(|&i| weight(logits[i])).sum();
        let mut sum = 0;
        let reaches = |&i: &usize| {
            sum += weight(logits[i]);
            sum << 64 >= u128::from(row.top_p) * total
        };
        let enough = kept.iter().position(reaches).unwrap();
        kept.truncate(enough + 1);
    }
    kept.retain(|&i| distance(logits[i]) <= row.reach);
    let total: u128 = kept.iter().map(|&i| weight(logits[i])).sum();
    let mut left = (u128::from(random_bits(row.seed, position)) * total) >> 64;
    for i in kept {
        if left < weight(logits[i]) {
            return i as u32;
        }
        left -= weight(logits[i]);
    }
    unreachable!("the number is below the total")
}

#[test]
fn draws_are_those_of_the_definition() {
    let mut number = 0u64;
    let mut random = || {
        number += 1;
        uniform(5, number)
    };
    for n in [1, 2, 10, 1000, 3001, 5000] {
        for scale in [0.01, 3.0, 30.0, 4000.0] {
            let mut x = logits(n, scale);
            for _ in 0..n / 20 {
                x[(random() * n as f64) as usize] = f32::NEG_INFINITY;
            }
            x[n / 2] = 0.0;
            for _ in 0..20 {
                let pick = |value: f64, off: f64, chance: f64| if chance < 0.5 { off } else { value };
                let params = SamplingParams {
                    temperature: [0.3, 1.0, 2.5, 1e-30, 100.0][(random() * 5.0) as usize],
                    top_k: pick(random() * 1.2 * n as f64, 0.0, random()) as u32,
                    top_p: pick(random().powf(0.2), 1.0, random()).max(1e-6) as f32,
                    min_p: pick(random().powi(6), 0.0, random()) as f32,
                    seed: (random() * 1e9) as u64,
                    ..Default::default()
                };
                let mut sampler = sampler(params.clone());
                for position in 0..5 {
                    let found = sampler.sample(&x, position).unwrap().token;
                    assert_eq!(found, by_sorting(&params, &x, position), "{n}, {scale}, {params:?}");
                }
            }
        }
    }
}

#[test]
fn penalties_and_bias() {
    let x = [2.0, -2.0, 1.9, 0.0];
    let choose = |params: SamplingParams, prompt: &[u32], output: &[u32]| {
        let mut s = sampler(params);
        s.observe_prompt(prompt);
        output.iter().for_each(|&t| s.accept(t));
        s.sample(&x, 9).unwrap().token
    };
    let g = SamplingParams::greedy;
    assert_eq!(choose(g(), &[0], &[0]), 0);
    // Repetition counts the prompt; presence and frequency do not.
    assert_eq!(choose(SamplingParams { repetition_penalty: 1.2, ..g() }, &[0], &[]), 2);
    assert_eq!(choose(SamplingParams { presence_penalty: 0.2, ..g() }, &[0], &[]), 0);
    assert_eq!(choose(SamplingParams { presence_penalty: 0.2, ..g() }, &[], &[0]), 2);
    // Presence counts once, frequency every time.
    assert_eq!(choose(SamplingParams { presence_penalty: 0.08, ..g() }, &[], &[0, 0]), 0);
    assert_eq!(choose(SamplingParams { frequency_penalty: 0.08, ..g() }, &[], &[0]), 0);
    assert_eq!(choose(SamplingParams { frequency_penalty: 0.08, ..g() }, &[], &[0, 0]), 2);
    // A negative logit is multiplied: it must not rise.
    let mut s = sampler(SamplingParams { repetition_penalty: 4.0, ..g() });
    s.accept(1);
    assert_eq!(s.sample(&[-3.0, -2.0, -4.0], 0).unwrap().token, 0);
    assert_eq!(choose(SamplingParams { logit_bias: [(3, 2.5)].into(), ..g() }, &[], &[]), 3);
    let mut s = sampler(SamplingParams { logit_bias: [(4, 2.5)].into(), ..g() });
    assert_eq!(s.sample(&x, 0), Err(SamplingError::Bias { token: 4, vocab: 4 }));
}

#[test]
fn logprobs_are_of_the_models_own_distribution() {
    let x: Vec<f32> = [0.5f32, 0.3, 0.2].map(f32::ln).to_vec();
    let params = SamplingParams {
        temperature: 0.3,
        logprobs: true,
        logit_bias: [(2, 20.0)].into(),
        ..Default::default()
    };
    let choice = sampler(params).sample(&x, 0).unwrap();
    assert_eq!(choice.token, 2);
    assert!((choice.logprob.unwrap() - 0.2f32.ln()).abs() < 1e-6);
    assert_eq!(sampler(SamplingParams::greedy()).sample(&x, 0).unwrap().logprob, None);
}

#[test]
fn broken_logits_name_the_position() {
    let mut x = vec![1.0; 700];
    x[600] = f32::NAN;
    for params in [SamplingParams::greedy(), SamplingParams { top_k: 5, ..Default::default() }] {
        let error = sampler(params).sample(&x, 41).unwrap_err().to_string();
        assert!(error.contains("position 41") && error.contains("token 600"), "{error}");
    }
    let mut greedy = sampler(SamplingParams::greedy());
    assert!(matches!(greedy.sample(&[f32::INFINITY], 0), Err(SamplingError::Logit { .. })));
    assert!(matches!(greedy.sample(&[f32::NEG_INFINITY; 3], 5), Err(SamplingError::Nothing { .. })));
    assert!(matches!(greedy.sample(&[], 5), Err(SamplingError::Nothing { position: 5, vocab: 0 })));
}

#[test]
fn parameters_are_checked() {
    let d = SamplingParams::default;
    let wrong = [
        SamplingParams { temperature: -0.1, ..d() },
        SamplingParams { temperature: f32::NAN, ..d() },
        SamplingParams { temperature: f32::INFINITY, ..d() },
        SamplingParams { top_p: 0.0, ..d() },
        SamplingParams { top_p: 1.1, ..d() },
        SamplingParams { min_p: -0.1, ..d() },
        SamplingParams { repetition_penalty: 0.0, ..d() },
        SamplingParams { presence_penalty: 2.5, ..d() },
        SamplingParams { frequency_penalty: f32::NAN, ..d() },
        SamplingParams { logit_bias: [(0, f32::INFINITY)].into(), ..d() },
    ];
    for params in wrong {
        assert!(matches!(Sampler::new(params.clone()), Err(SamplingError::Parameter { .. })), "{params:?}");
    }
    assert!(serde_json::from_str::<SamplingParams>(r#"{"temprature": 1}"#).is_err());
    let read: SamplingParams = serde_json::from_str(r#"{"top_k": 40}"#).unwrap();
    assert_eq!(read, SamplingParams { top_k: 40, ..d() });
}
