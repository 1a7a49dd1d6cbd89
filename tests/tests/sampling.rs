//! The sampler against transformers' own warpers: which tokens it draws, and how often.

use serde_json::Value;
use tilec_runtime::sampling::{Sampler, SamplingParams};

const DRAWS: u64 = 20_000;

#[test]
fn draws_follow_transformers_probabilities() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/sampling.json");
    let rows: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (mut cases, mut filtered) = (0, 0);
    for row in &rows {
        let floats = |of: &Value| -> Vec<f64> {
            of.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
        };
        let logits: Vec<f32> = floats(&row["logits"]).into_iter().map(|logit| logit as f32).collect();
        for case in row["cases"].as_array().unwrap() {
            let or = |key: &str, value: f64| case[key].as_f64().unwrap_or(value);
            let params = SamplingParams {
                temperature: or("temperature", 1.0) as f32,
                top_k: or("top_k", 0.0) as u32,
                top_p: or("top_p", 1.0) as f32,
                min_p: or("min_p", 0.0) as f32,
                seed: cases,
                ..SamplingParams::default()
            };
            let mut probabilities = vec![0.0; logits.len()];
            for (token, probability) in floats(&case["kept"]).iter().zip(floats(&case["probabilities"])) {
                probabilities[*token as usize] = probability;
            }
            let mut sampler = Sampler::new(params.clone()).unwrap();
            let mut counts = vec![0u64; logits.len()];
            for position in 0..DRAWS {
                counts[sampler.sample(&logits, position).unwrap().token as usize] += 1;
            }
            check(&counts, &probabilities).unwrap_or_else(|what| panic!("{params:?}: {what}"));
            // The test notices another temperature, and one token more or less.
            let tilted: Vec<f64> = probabilities.iter().map(|p| p.powf(0.5)).collect();
            let total: f64 = tilted.iter().sum();
            let tilted: Vec<f64> = tilted.iter().map(|p| p / total).collect();
            let kept = probabilities.iter().filter(|p| **p > 0.0).count();
            assert!(kept == 1 || check(&counts, &tilted).is_err(), "{params:?}: any temperature will do");
            cases += 1;
            filtered += usize::from(kept < logits.len());
        }
    }
    assert!(cases == 48 && filtered > 30, "{cases} {filtered}");
}

/// Chi-squared of the counts: its mean is the degrees of freedom d, its variance 2d; five deviations. What has no
/// probability is never drawn, what has one above a thousandth is.
fn check(counts: &[u64], probabilities: &[f64]) -> Result<(), String> {
    let (mut chi, mut cells) = (0.0, 0);
    let (mut rest_count, mut rest_expected) = (0.0, 0.0);
    for (token, (count, probability)) in counts.iter().zip(probabilities).enumerate() {
        if (*probability == 0.0 && *count > 0) || (*probability > 1e-3 && *count == 0) {
            return Err(format!("token {token} of probability {probability} was drawn {count} times"));
        }
        let (count, expected) = (*count as f64, probability * DRAWS as f64);
        if expected >= 10.0 {
            chi += (count - expected).powi(2) / expected;
            cells += 1;
        } else {
            rest_count += count;
            rest_expected += expected;
        }
    }
    if rest_expected > 0.0 {
        chi += (rest_count - rest_expected).powi(2) / rest_expected;
        cells += 1;
    }
    let freedom = f64::from((cells - 1).max(1));
    let bound = freedom + 5.0 * (2.0 * freedom).sqrt();
    if chi < bound { Ok(()) } else { Err(format!("chi-squared is {chi}, at most {bound} is likely")) }
}
