//! Guesses that are drawn, against distributions that are written down directly.

use super::*;

/// A draft's scores for all tokens, or for some.
fn drawn(tokens: Option<Vec<u32>>, scores: Vec<f32>) -> Drawn {
    Drawn { tokens, scores }
}

/// The draft's own probabilities, of all tokens.
fn own(temperature: f32, drawn: &Drawn, vocab: usize) -> Vec<f64> {
    let alone = SamplingParams { temperature, ..Default::default() };
    let shares = expected(&alone, &drawn.scores);
    let mut all = vec![0.0; vocab];
    for (place, share) in shares.into_iter().enumerate() {
        all[drawn.tokens.as_ref().map_or(place, |tokens| tokens[place] as usize)] += share;
    }
    all
}

/// Tokens that come out, by number, and how often the guess did.
fn outcomes(params: &SamplingParams, logits: &[f32], drawn: &Drawn, n: u64) -> (Vec<u64>, u64) {
    let mut sampler = sampler(params.clone());
    let (mut counts, mut right) = (vec![0; logits.len()], 0);
    for position in 0..n {
        let place = sampler.guess(&drawn.scores, position).unwrap();
        let guess = drawn.tokens.as_ref().map_or(place as u32, |tokens| tokens[place]);
        let token = sampler.take(logits, position, guess, drawn).unwrap().token;
        counts[token as usize] += 1;
        right += u64::from(token == guess);
    }
    (counts, right)
}

#[test]
fn taken_guesses_follow_the_distribution() {
    const N: u64 = 100_000;
    let base = SamplingParams { seed: 11, ..Default::default() };
    let model = logits(64, 6.0);
    let noise = |seed: u64, scale: f32| -> Vec<f32> {
        model.iter().enumerate().map(|(i, x)| x + scale * (uniform(seed, i as u64) as f32 - 0.5)).collect()
    };
    let mut best: Vec<u32> = (0..64).collect();
    best.sort_by(|a, b| model[*b as usize].total_cmp(&model[*a as usize]));
    let some = |tokens: &[u32]| {
        drawn(Some(tokens.to_vec()), tokens.iter().map(|token| model[*token as usize] * 0.8).collect())
    };
    let drafts = [
        // Nearly right, half right, the same, another one, and one that is sure of a single token.
        ("near", drawn(None, noise(1, 1.0))),
        ("broad", drawn(None, noise(2, 4.0))),
        ("same", drawn(None, model.clone())),
        ("other", drawn(None, model.iter().rev().copied().collect())),
        ("sure", drawn(None, (0..64).map(|i| if i == 60 { 20.0 } else { 0.0 }).collect())),
        // Candidates: the best, hopeless ones, a single one, and one of them impossible.
        ("candidates", some(&best[..16])),
        ("hopeless", some(&best[48..])),
        ("single", some(&best[3..4])),
        ("impossible", drawn(Some(best[..3].to_vec()), vec![1.0, f32::NEG_INFINITY, 0.5])),
    ];
    let filters = [
        base.clone(),
        SamplingParams { temperature: 0.6, ..base.clone() },
        SamplingParams { temperature: 1.6, top_k: 20, ..base.clone() },
        SamplingParams { top_p: 0.8, ..base.clone() },
        SamplingParams { temperature: 1.3, top_k: 40, top_p: 0.9, min_p: 0.05, ..base.clone() },
    ];
    let (mut higher, mut pairs) = (0, 0);
    for (name, draft) in &drafts {
        for params in &filters {
            let (counts, right) = outcomes(params, &model, draft, N);
            let (p, q) = (expected(params, &model), own(params.temperature, draft, model.len()));
            let (chi, freedom) = chi_squared(&counts, &p);
            assert!(chi < bound(freedom), "{name} {params:?}: chi-squared {chi} of {freedom}");
            // As often as the two distributions overlap.
            let overlap: f64 = p.iter().zip(&q).map(|(p, q)| p.min(*q)).sum();
            let (share, n) = (right as f64 / N as f64, N as f64);
            let sigma = (overlap * (1.0 - overlap) / n).sqrt().max(1e-4);
            assert!((share - overlap).abs() < 5.0 * sigma, "{name} {params:?}: {share} taken, not {overlap}");
            // The likeliest guess, verified by what the model draws, is right as often as it is drawn.
            let likeliest = (0..q.len()).max_by(|a, b| q[*a].total_cmp(&q[*b])).unwrap();
            pairs += 1;
            higher += usize::from(overlap > p[likeliest]);
            if ["near", "broad", "same", "candidates"].contains(name) {
                assert!(share > 1.3 * p[likeliest], "{name} {params:?}: {share}, {}", p[likeliest]);
            }
        }
    }
    println!("{higher} of {pairs} drafts are right more often when drawn");
}

/// What the comparison above would notice: guesses that are taken unseen, and a token in place of a guess that is
/// drawn as if nothing had been guessed.
#[test]
fn wrong_rules_would_show() {
    const N: u64 = 100_000;
    let params = SamplingParams { seed: 5, ..Default::default() };
    let model = logits(200, 6.0);
    let scores: Vec<f32> = (0..200).map(|i| model[i] + 2.0 * (uniform(8, i as u64) as f32 - 0.5)).collect();
    let (draft, p) = (drawn(None, scores), expected(&params, &model));
    let (mut unseen, mut careless) = (vec![0; 200], vec![0; 200]);
    let mut sampler = sampler(params.clone());
    for position in 0..N {
        let guess = sampler.guess(&draft.scores, position).unwrap();
        unseen[guess] += 1;
        let taken = sampler.take(&model, position, guess as u32, &draft).unwrap().token as usize;
        let plain = sampler.sample(&model, position).unwrap().token as usize;
        careless[if taken == guess { guess } else { plain }] += 1;
    }
    for counts in [unseen, careless] {
        let (chi, freedom) = chi_squared(&counts, &p);
        assert!(chi > 2.0 * bound(freedom), "chi-squared {chi} of {freedom}");
    }
}

/// Bias and penalties count for guesses as they do without.
#[test]
fn guesses_are_taken_behind_penalties() {
    const N: u64 = 100_000;
    let model = logits(60, 5.0);
    let params = SamplingParams {
        seed: 3,
        repetition_penalty: 1.4,
        frequency_penalty: 0.5,
        logit_bias: [(7, 2.0), (9, -3.0)].into(),
        ..Default::default()
    };
    let draft = drawn(None, model.clone());
    let mut sampler = sampler(params.clone());
    sampler.observe_prompt(&[1, 2, 3]);
    for token in [4, 4, 5] {
        sampler.accept(token);
    }
    let mut adjusted = model.clone();
    (adjusted[7], adjusted[9]) = (adjusted[7] + 2.0, adjusted[9] - 3.0);
    for (token, count) in [(1, 0.0), (2, 0.0), (3, 0.0), (4, 2.0), (5, 1.0)] {
        let x: &mut f32 = &mut adjusted[token];
        *x = if *x > 0.0 { *x / 1.4 } else { *x * 1.4 } - 0.5 * count;
    }
    let mut counts = vec![0; 60];
    for position in 0..N {
        let guess = sampler.guess(&draft.scores, position).unwrap() as u32;
        counts[sampler.take(&model, position, guess, &draft).unwrap().token as usize] += 1;
    }
    let (chi, freedom) = chi_squared(&counts, &expected(&params, &adjusted));
    assert!(chi < bound(freedom), "chi-squared {chi} of {freedom}");
    let (chi, freedom) = chi_squared(&counts, &expected(&params, &model));
    assert!(chi > bound(freedom), "penalties make no difference: {chi} of {freedom}");
}

/// The model's weights are those that plain draws are made of, to the last one.
#[test]
fn weights_are_those_of_plain_draws() {
    let mut number = 0u64;
    let mut random = || {
        number += 1;
        uniform(6, number)
    };
    for n in [1, 2, 10, 1000, 3001] {
        for scale in [0.01, 3.0, 30.0, 4000.0] {
            let x = logits(n, scale);
            let best = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for _ in 0..20 {
                let pick = |value: f64, off: f64, chance: f64| if chance < 0.5 { off } else { value };
                let params = SamplingParams {
                    temperature: [0.3, 1.0, 2.5, 100.0][(random() * 4.0) as usize],
                    top_k: pick(random() * 1.2 * n as f64, 0.0, random()) as u32,
                    top_p: pick(random().powf(0.2), 1.0, random()).max(1e-6) as f32,
                    min_p: pick(random().powi(6), 0.0, random()) as f32,
                    seed: (random() * 1e9) as u64,
                    ..Default::default()
                };
                let row = params.launch_row();
                let weights = draw::weights(&x, best, &row, &mut Scratch::default());
                let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
                let mut order: Vec<usize> = (0..n).collect();
                if (row.top_k > 0 && (row.top_k as usize) < n) || row.top_p > 0 {
                    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
                }
                for position in 0..5 {
                    let mut left = (u128::from(random_bits(row.seed, position)) * total) >> 64;
                    let token = order.iter().find(|token| {
                        let weight = u128::from(weights[**token]);
                        let found = left < weight;
                        left -= if found { 0 } else { weight };
                        found
                    });
                    let wanted = by_sorting(&params, &x, position);
                    assert_eq!(token.map(|token| *token as u32), Some(wanted), "{n} {scale} {params:?}");
                }
            }
        }
    }
}

#[test]
fn edges() {
    let x = [1.0f32, 3.0, 2.0];
    let mut greedy = sampler(SamplingParams::greedy());
    // With temperature 0 the guess is the best of the draft's, the token the best of the model's.
    let draft = drawn(None, vec![5.0, 1.0, 5.0]);
    assert_eq!(greedy.guess(&draft.scores, 4), Some(0));
    assert_eq!(greedy.take(&x, 4, 0, &draft).unwrap().token, 1);
    let mut warm = sampler(SamplingParams { seed: 1, logprobs: true, ..Default::default() });
    // Broken scores are no guess, broken logits an error with their place.
    assert_eq!(warm.guess(&[0.0, f32::NAN], 0), None);
    assert_eq!(warm.guess(&[f32::NEG_INFINITY; 2], 0), None);
    assert_eq!(warm.guess(&[], 0), None);
    let error = warm.take(&[0.0, f32::NAN, 0.0], 7, 0, &draft).unwrap_err().to_string();
    assert!(error.contains("position 7") && error.contains("token 1"), "{error}");
    // A guess that the model would never make, and one that no token stands in the place of.
    let sure = drawn(Some(vec![2]), vec![0.0]);
    let choice = warm.take(&[1.0, 0.5, f32::NEG_INFINITY], 3, 2, &sure).unwrap();
    assert!(choice.token < 2 && choice.logprob.unwrap() < 0.0);
    let only = [f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0];
    assert_eq!(warm.take(&only, 3, 2, &sure).unwrap().token, 2);
    // The same numbers again, in another order.
    let draft = drawn(None, vec![0.1, 0.2, 0.3]);
    let mut at = |position| {
        let guess = warm.guess(&draft.scores, position).unwrap() as u32;
        (guess, warm.take(&x, position, guess, &draft).unwrap().token)
    };
    let there: Vec<_> = (0..40).map(&mut at).collect();
    let back: Vec<_> = (0..40).rev().map(&mut at).collect();
    assert!(there.iter().eq(back.iter().rev()));
    let streams = [Stream::Token, Stream::Guess, Stream::Coin, Stream::Residual];
    let bits: std::collections::BTreeSet<u64> =
        streams.iter().flat_map(|stream| (0..50).map(|at| random_bits_of(9, at, *stream))).collect();
    assert_eq!(bits.len(), 200);
    assert_eq!(random_bits_of(9, 7, Stream::Token), random_bits(9, 7));
}
