//! Guesses that are drawn and verified by rejection sampling, through whole models: tokens come with the model's
//! probabilities, and more guesses are right.

use super::*;
use tilec_runtime::generate::DraftSampleMethod;

/// A generator that draws its guesses, as many at a time as it may.
fn drawing(fixture: &Fixture, spec: &ModelSpec) -> (Generator, tempfile::TempDir) {
    let (mut generator, folder) = generator(fixture, spec, 2);
    generator.set_draft_sample_method(DraftSampleMethod::Probabilistic);
    (generator, folder)
}

/// Probabilities of logits behind a temperature and a share of the most probable, in float64.
fn probabilities(logits: &[f32], temperature: f64, top_p: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    let share = |token: usize| (f64::from(logits[token]) / temperature).exp();
    let all: f64 = order.iter().map(|token| share(*token)).sum();
    let mut kept = vec![0.0; logits.len()];
    let mut sum = 0.0;
    for token in order {
        if sum / all >= top_p {
            break;
        }
        sum += share(token);
        kept[token] = share(token);
    }
    kept.iter().map(|share| share / sum).collect()
}

/// Chi-squared over triples of tokens behind a prompt, all of which are guessed, against the probabilities that
/// the model's logits have. How many guesses were right, of how many.
fn check_triples(pair: &str, temperature: f64, top_p: f64, draws: usize) -> (u64, u64) {
    let fixture = Fixture::open_pair(pair);
    let mut spec = f32_everywhere(&fixture);
    (spec.limits.rows, spec.limits.sequences) = (64, 8);
    let reference = Reference::of(pair);
    let [_, text, _] = reference.loops()[0];
    let prompt = &text[..18];
    let last = prompt.len() as u32;
    let mut expected = Vec::new();
    let vocab = {
        let mut engine = load(&fixture, &spec, 1).engine;
        let vocab = engine.plan().vocab;
        let own = |logits: &[f32]| probabilities(logits, temperature, top_p);
        let first = own(engine.step(&rows(prompt, 0), &[last - 1]).unwrap());
        for (token, first) in (0u32..).zip(&first) {
            let row = RowInput { token, position: last, sequence: 0 };
            let second = own(engine.step(&[row], &[0]).unwrap());
            for (other, second) in (0u32..).zip(&second) {
                let row = RowInput { token: other, position: last + 1, sequence: 0 };
                let third = own(engine.step(&[row], &[0]).unwrap());
                expected.extend(third.iter().map(|third| first * second * third));
            }
        }
        vocab
    };
    let (mut generator, _folder) = drawing(&fixture, &spec);
    let mut counts = vec![0u64; expected.len()];
    let (mut right, mut guesses) = (0, 0);
    let base = SamplingParams { temperature: temperature as f32, top_p: top_p as f32, ..Default::default() };
    for seeds in (0..draws as u64).collect::<Vec<_>>().chunks(4000) {
        // One more than what is compared: else the last would never be guessed.
        let requests: Vec<Request> = seeds
            .iter()
            .map(|seed| request(prompt, 4, SamplingParams { seed: *seed, ..base.clone() }))
            .collect();
        let run = run(&mut generator, &requests);
        for done in &run.completions {
            let place = done.tokens[..3].iter().fold(0, |place, token| place * vocab + *token as usize);
            counts[place] += 1;
        }
        right += run.draft.right;
        guesses += run.draft.guesses;
    }
    let (mut chi, mut cells, mut rest) = (0.0, 0usize, (0.0, 0u64));
    for (count, probability) in counts.iter().zip(&expected) {
        let wanted = probability * draws as f64;
        assert!(wanted > 0.0 || *count == 0, "{pair}: a token that cannot be was drawn");
        if wanted < 5.0 {
            rest = (rest.0 + wanted, rest.1 + count);
        } else {
            chi += (*count as f64 - wanted).powi(2) / wanted;
            cells += 1;
        }
    }
    chi += (rest.1 as f64 - rest.0).powi(2) / rest.0.max(1.0);
    let freedom = cells as f64;
    let sigmas = (chi - freedom) / (2.0 * freedom).sqrt();
    println!(
        "{pair}: chi-squared {chi:.1} of {freedom} degrees, {sigmas:.2} sigmas, {right} of {guesses} right"
    );
    assert!(cells > 20, "{pair}: {cells}");
    assert!(sigmas.abs() < 4.5, "{pair}: chi-squared {chi} with {freedom} degrees of freedom");
    (right, guesses)
}

#[test]
fn tokens_of_drawn_guesses_have_the_models_probabilities() {
    for (pair, temperature, top_p, draws) in [
        ("second", 1.5, 1.0, 100_000),
        ("sliding-both-ways", 2.2, 0.95, 30_000),
        ("second-capped", 0.9, 1.0, 30_000),
    ] {
        let (right, guesses) = check_triples(pair, temperature, top_p, draws);
        assert!(right > guesses / 10 && right < guesses * 9 / 10, "{pair}: {right} of {guesses}");
    }
}

/// Where the model is free to say many things, what a draft draws is right more often than its likeliest guess.
#[test]
fn drawn_guesses_are_right_more_often() {
    for (pair, temperature) in
        [("second", 1.5), ("second-capped", 1.5), ("sliding-both-ways", 1.5), ("full", 1.0)]
    {
        let fixture = Fixture::open_pair(pair);
        let spec = f32_everywhere(&fixture);
        let requests: Vec<Request> = prompts(40, 20)
            .iter()
            .enumerate()
            .map(|(seed, prompt)| {
                let sampling = SamplingParams { temperature, seed: seed as u64, ..Default::default() };
                request(prompt, 60, sampling)
            })
            .collect();
        let (mut generator, _folder) = drawing(&fixture, &spec);
        let drawn = run(&mut generator, &requests).draft.acceptance().unwrap();
        generator.clear();
        generator.set_draft_sample_method(DraftSampleMethod::Greedy);
        let greedy = run(&mut generator, &requests).draft.acceptance().unwrap();
        println!(
            "{pair}, temperature {temperature}: {drawn:.3} tokens a round, {greedy:.3} with the likeliest"
        );
        assert!(drawn > greedy * 1.05, "{pair}: {drawn} and {greedy}");
    }
}

/// At temperature 0 nothing is drawn: the same texts as without a draft, also beside requests that draw; and
/// stop tokens, limits and penalties end texts of drawn guesses as any other.
#[test]
fn greedy_requests_stay_as_they_are_beside_those_that_draw() {
    for pair in ["second", "full"] {
        let fixture = Fixture::open_pair(pair);
        let mut spec = fixture.spec();
        (spec.limits.rows, spec.limits.sequences, spec.limits.context) = (48, 4, Some(96));
        let (mut generator, _folder) = drawing(&fixture, &spec);
        let requests: Vec<Request> = prompts(16, 20)
            .iter()
            .enumerate()
            .map(|(number, prompt)| {
                let sampling = match number % 2 {
                    0 => SamplingParams::greedy(),
                    _ => SamplingParams {
                        seed: number as u64,
                        frequency_penalty: 0.3,
                        logprobs: true,
                        top_k: 12,
                        ..Default::default()
                    },
                };
                let stop_tokens = if number % 4 == 1 { vec![2, 5] } else { Vec::new() };
                Request { stop_tokens, ..request(prompt, if number % 5 == 0 { 200 } else { 30 }, sampling) }
            })
            .collect();
        let together = run(&mut generator, &requests);
        generator.clear();
        generator.set_draft_rows(0);
        let plain = run(&mut generator, &requests);
        let (mut changed, mut stopped) = (0, 0);
        for (number, (drawn, plain)) in together.completions.iter().zip(&plain.completions).enumerate() {
            if number % 2 == 0 {
                assert_eq!((&drawn.tokens, drawn.finish), (&plain.tokens, plain.finish), "{pair} {number}");
                continue;
            }
            changed += usize::from(drawn.tokens != plain.tokens);
            assert_eq!(drawn.logprobs.len(), drawn.tokens.len());
            match drawn.finish {
                tilec_runtime::generate::FinishReason::StopToken(token) => {
                    assert!(requests[number].stop_tokens.contains(&token));
                    stopped += 1;
                }
                _ => assert!(
                    drawn.tokens.len() >= 30 || drawn.tokens.len() + requests[number].prompt.len() >= 96
                ),
            }
            assert!(drawn.tokens.iter().all(|token| !requests[number].stop_tokens.contains(token)));
        }
        assert!(changed > 3 && stopped > 0, "{pair}: {changed} changed, {stopped} stopped");
        assert!(together.draft.right > 20, "{:?}", together.draft);
    }
}
