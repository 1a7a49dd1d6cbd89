//! The choice of guesses in made-up surroundings: texts whose guesses are right with known chances, and
//! machines whose passes take known times.

use super::adapt::*;
use super::rounds::are_short;
use crate::engine::tests::toy_plan;
use std::sync::Arc;
use std::time::Duration;
use tilec_ir::cost::StageCost;

/// Random numbers from 0 to 1, the same ones every time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Microseconds of passes by rows.
type Machine = fn(Pass, usize) -> f64;

/// A dense model on a GPU: rows of a pass cost little.
fn dense(pass: Pass, rows: usize) -> f64 {
    let passes = rows.div_ceil(8) as f64;
    match pass {
        Pass::Draft => 20.0 + passes * 150.0,
        Pass::Step => 20.0 + passes * (950.0 + 10.0 * rows as f64),
        Pass::Launch => 950.0,
        Pass::Round => passes * (1100.0 + 10.0 * rows as f64),
    }
}

/// A mixture on a GPU: every row brings experts of its own.
fn mixture(pass: Pass, rows: usize) -> f64 {
    match pass {
        Pass::Draft => 250.0,
        Pass::Step => 1000.0 + 6000.0 * (1.0 - 0.9f64.powi(rows as i32)),
        Pass::Launch => 1580.0,
        Pass::Round => mixture(Pass::Draft, rows) + mixture(Pass::Step, rows),
    }
}

/// A processor: a row is work.
fn processor(pass: Pass, rows: usize) -> f64 {
    match pass {
        Pass::Draft => 300.0 + 120.0 * rows as f64,
        _ => 1000.0 + 700.0 * rows as f64,
    }
}

fn fixed(machine: Machine) -> PassTimes {
    let mut times = PassTimes::new(CostModel::default());
    times.fixed = Some(Arc::new(move |pass, rows| Duration::from_secs_f64(machine(pass, rows) * 1e-6)));
    times
}

const COMPANY: Company = Company { rows: 0, room: 64, launch: true, rounds: false };

/// One text: chances of its guesses, what became of it.
struct Text<'a> {
    pace: Pace,
    most: usize,
    chance: &'a dyn Fn(usize, usize) -> f64,
    dice: Dice,
    tokens: usize,
    micros: f64,
    trials: usize,
    /// Guesses of every step.
    chosen: Vec<usize>,
}

impl<'a> Text<'a> {
    /// `chance(token, guess)` of the guess (from 0) of a round at a token.
    fn new(most: usize, chance: &'a dyn Fn(usize, usize) -> f64) -> Text<'a> {
        let dice = Dice(0x9e37_79b9_7f4a_7c15);
        Text { pace: Pace::new(), most, chance, dice, tokens: 0, micros: 0.0, trials: 0, chosen: Vec::new() }
    }

    /// Writes until there are so many tokens; `times` is told of what the machine took, but for hold-ups.
    fn write(
        &mut self,
        tokens: usize,
        machine: Machine,
        times: &mut PassTimes,
        slow: &mut dyn FnMut() -> f64,
    ) {
        let mut run = |pass, rows: usize, times: &mut PassTimes| {
            let micros = machine(pass, rows) * slow();
            times.note(pass, rows, Duration::from_secs_f64(micros * 1e-6));
            machine(pass, rows)
        };
        while self.tokens < tokens {
            let (guesses, trial) = match self.pace.rest() {
                0 => {
                    let most = self.most;
                    let pace = &mut self.pace;
                    let chosen = choose(&mut [Candidate { pace, least: 0, most, rows: 8 }], COMPANY, times);
                    self.trials += usize::from(chosen.trial);
                    (chosen.guesses[0], chosen.trial)
                }
                _ => (0, false),
            };
            self.chosen.push(guesses);
            if guesses == 0 {
                self.micros += run(if trial { Pass::Step } else { Pass::Launch }, 1, times);
                self.tokens += 1;
                self.pace.plain(1);
                continue;
            }
            self.micros += run(Pass::Draft, 8, times) + run(Pass::Step, guesses + 1, times);
            let right = (0..guesses)
                .take_while(|guess| self.dice.roll() < (self.chance)(self.tokens, *guess))
                .count();
            self.pace.round((right + 1).min(guesses), right, right + 1);
            self.tokens += right + 1;
        }
    }

    fn rate(&self) -> f64 {
        self.tokens as f64 / self.micros
    }
}

/// Tokens a microsecond with always so many guesses.
fn rate(guesses: usize, machine: Machine, chance: &dyn Fn(usize) -> f64) -> f64 {
    if guesses == 0 {
        return 1.0 / machine(Pass::Launch, 1);
    }
    let mut tokens = 1.0;
    let mut all = 1.0;
    for guess in 0..guesses {
        all *= chance(guess);
        tokens += all;
    }
    tokens / (machine(Pass::Draft, 8) + machine(Pass::Step, guesses + 1))
}

#[test]
fn chances_are_those_of_the_rounds_and_of_the_guess_before_where_there_are_few() {
    let mut reach = Reach::default();
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
    let start = reach.chances(3);
    close(start[0], 0.9);
    close(start[2], 0.9 * 0.9 * 0.9);
    // Of four guesses two were right: the first two were tried and right, the third tried and wrong.
    reach.note(3, 2);
    let first: f64 = (1.0 + 2.0 * 0.9) / 3.0;
    let second = (1.0 + 2.0 * first) / 3.0;
    let third = 2.0 * second / 3.0;
    let chances = reach.chances(4);
    close(chances[0], first);
    close(chances[1], first * second);
    close(chances[2], first * second * third);
    // Nobody tried the fourth: it is as the third.
    close(chances[3], chances[2] * third);
    reach.note(1, 0);
    close(reach.chances(1)[0], (0.97 + 1.8) / 3.97);
    // Many rounds leave little of the prior.
    for _ in 0..100 {
        for (tried, right) in [(2, 2), (2, 1), (2, 1), (1, 0)] {
            reach.note(tried, right);
        }
    }
    let chances = reach.chances(2);
    assert!((chances[0] - 0.75).abs() < 0.04 && (chances[1] - 0.25).abs() < 0.05, "{chances:?}");
}

/// Whatever the machine and the text, nearly as fast as the best number of guesses, and few changes.
#[test]
fn the_choice_is_nearly_the_best_one() {
    let machines: [(&str, Machine); 3] = [("dense", dense), ("mixture", mixture), ("processor", processor)];
    let mut offs = 0;
    for (name, machine) in machines {
        for percent in [0, 10, 30, 50, 70, 85, 95] {
            // Later guesses are right less often.
            let chance = |guess: usize| f64::from(percent) / 100.0 * 0.98f64.powi(guess as i32);
            let of_text = |_: usize, guess: usize| chance(guess);
            let mut text = Text::new(7, &of_text);
            text.write(20_000, machine, &mut fixed(machine), &mut || 1.0);
            let rates = (0..8).map(|guesses| (rate(guesses, machine, &chance), guesses));
            let (best, guesses) = rates.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            let share = text.rate() / best;
            let changes = text.chosen.windows(2).filter(|pair| pair[0] != pair[1]).count();
            println!("{name}, {percent} %: {share:.3} of {guesses} guesses, {changes} changes");
            assert!(share > 0.95, "{name}, {percent} %: {share} of the best");
            assert!(changes * 12 < text.chosen.len(), "{name}, {percent} %: {changes} changes");
            // Never much slower than without a draft.
            assert!(text.rate() > 0.97 * rate(0, machine, &chance), "{name}, {percent} %");
            offs += usize::from(guesses == 0);
        }
    }
    assert!((5..16).contains(&offs), "{offs}: machines and texts should differ in what is best");
}

/// Times that are measured, with noise, hold-ups and a cost model that knows nothing, lead to the same.
#[test]
fn measured_times_lead_to_nearly_the_best_choice() {
    let machines: [(&str, Machine); 3] = [("dense", dense), ("mixture", mixture), ("processor", processor)];
    for (name, machine) in machines {
        for percent in [20, 60, 90] {
            let chance = |guess: usize| f64::from(percent) / 100.0 * 0.98f64.powi(guess as i32);
            let of_text = |_: usize, guess: usize| chance(guess);
            let mut text = Text::new(7, &of_text);
            let (mut dice, mut calls) = (Dice(77), 0);
            let mut slow = || {
                calls += 1;
                match calls {
                    1..4 => 30.0,
                    n if n % 97 == 0 => 25.0,
                    _ => 0.9 + 0.3 * dice.roll(),
                }
            };
            let mut times = PassTimes::new(CostModel::default());
            text.write(20_000, machine, &mut times, &mut slow);
            let best = (0..8).map(|guesses| rate(guesses, machine, &chance)).fold(0.0, f64::max);
            let share = text.rate() / best;
            println!("{name}, {percent} %: {share:.3}, {} trials", text.trials);
            assert!(share > 0.93, "{name}, {percent} %: {share} of the best");
        }
    }
}

/// A draft that is never right rests ever longer; one that is right from some place on is found there.
#[test]
fn rests_grow_and_end_where_guesses_begin_to_be_right() {
    let of_text = |token: usize, _: usize| if (9_000..12_000).contains(&token) { 0.95 } else { 0.0 };
    let mut text = Text::new(7, &of_text);
    let mut times = fixed(dense);
    text.write(9_000, dense, &mut times, &mut || 1.0);
    let tries: Vec<usize> =
        text.chosen.split(|guesses| *guesses > 0).map(<[usize]>::len).filter(|n| *n > 0).collect();
    // One step without guesses for every token of a rest, and that which chose it.
    assert_eq!(tries[..7], [32, 64, 128, 256, 512, 1024, 1024]);
    let wasted = text.chosen.iter().filter(|guesses| **guesses > 0).count();
    assert!(wasted < 12 * tries.len(), "{wasted} rounds of {} tries", tries.len());
    assert!(text.rate() > 0.98 / dense(Pass::Launch, 1), "{}", text.rate());
    // 3,000 easy tokens: all but the rest of a rest have guesses.
    let before = text.chosen.len();
    text.write(12_000, dense, &mut times, &mut || 1.0);
    let plain = text.chosen[before..].iter().filter(|guesses| **guesses == 0).count();
    assert!(plain <= 1024, "{plain}");
    // After a try that was worth it the next rest is short again.
    let before = text.chosen.len();
    text.write(12_400, dense, &mut times, &mut || 1.0);
    let rests: Vec<usize> =
        text.chosen[before..].split(|guesses| *guesses > 0).map(<[usize]>::len).filter(|n| *n > 0).collect();
    assert_eq!(rests[..2], [32, 64], "{rests:?}");
}

#[test]
fn the_likeliest_guesses_of_several_texts_come_first() {
    let chances = [0.9, 0.5, 0.7];
    let paces = || {
        chances.map(|chance| {
            let (mut pace, mut dice) = (Pace::new(), Dice(5));
            for _ in 0..300 {
                let right = (0..7).take_while(|_| dice.roll() < chance).count();
                pace.round((right + 1).min(7), right, right + 1);
            }
            pace
        })
    };
    for (machine, room) in [(dense as Machine, 5), (mixture, 64), (processor, 64)] {
        let mut times = fixed(machine);
        let company = Company { rows: 2, room, launch: false, rounds: false };
        let mut all = paces();
        let mut candidates: Vec<Candidate<'_>> =
            all.iter_mut().map(|pace| Candidate { pace, least: 0, most: 7, rows: 8 }).collect();
        let chosen = choose(&mut candidates, company, &mut times).guesses;
        assert_eq!(chosen, {
            let mut again = paces();
            let mut candidates: Vec<Candidate<'_>> =
                again.iter_mut().map(|pace| Candidate { pace, least: 0, most: 7, rows: 8 }).collect();
            choose(&mut candidates, company, &mut times).guesses
        });
        // All there are, one by one.
        let known: Vec<Vec<f64>> = paces().iter().map(|pace| pace.chances(7)).collect();
        let rate = |guesses: &[usize]| {
            let (mut tokens, mut draft) = (5.0, 0);
            for (guesses, chances) in guesses.iter().zip(&known).filter(|(guesses, _)| **guesses > 0) {
                tokens += chances[..*guesses].iter().sum::<f64>();
                draft += 8;
            }
            let step = machine(Pass::Step, 5 + guesses.iter().sum::<usize>());
            tokens / (step + if draft > 0 { machine(Pass::Draft, draft) } else { 0.0 })
        };
        let all = (0..512).map(|n| [n % 8, n / 8 % 8, n / 64]);
        let best =
            all.filter(|guesses| guesses.iter().sum::<usize>() <= room).map(|g| rate(&g)).fold(0.0, f64::max);
        println!("{chosen:?}: {} of {best}", rate(&chosen));
        assert!(chosen.iter().sum::<usize>() <= room);
        // What was before stays unless it is 3 % slower; the draft's pass is not part of a guess's price.
        assert!(rate(&chosen) >= best * 0.95, "{chosen:?}: {} of {best}", rate(&chosen));
    }
}

#[test]
fn the_least_is_kept_as_far_as_there_is_room() {
    let mut times = fixed(processor);
    let mut paces = [Pace::new(), Pace::new(), Pace::new()];
    for pace in &mut paces {
        (0..50).for_each(|_| pace.round(1, 0, 1));
    }
    let mut fit = |least: [usize; 3], room| {
        let mut candidates: Vec<Candidate<'_>> = paces
            .iter_mut()
            .zip(least)
            .map(|(pace, least)| Candidate { pace, least, most: 7, rows: 8 })
            .collect();
        choose(&mut candidates, Company { rows: 0, room, launch: false, rounds: false }, &mut times).guesses
    };
    assert_eq!(fit([7, 7, 7], 64), [7, 7, 7]);
    assert_eq!(fit([2, 0, 7], 64), [2, 0, 7]);
    assert_eq!(fit([7, 7, 7], 10), [7, 3, 0]);
}

/// A round of 4 GB on a GPU of 4 TB/s is short, one of 16 is not.
#[test]
fn long_rounds_are_the_hosts() {
    let of = |bytes: u64| {
        let mut plan = toy_plan(1);
        plan.costs = vec![StageCost {
            stage: String::new(),
            anchor: String::new(),
            runs: 1,
            weight_bytes: bytes,
            experts: 0,
            experts_per_row: 0,
            macs_per_row: 0,
            kv_bytes_per_position: 0,
            kv_macs_per_position: 0,
            kv_window: None,
            activation_bytes_per_row: 0,
            logit_rows_only: false,
        }];
        are_short(&PassTimes::new(CostModel::new(&plan, Some(8), Some(4e12))))
    };
    assert!(of(4_000_000_000));
    assert!(!of(16_000_000_000));
}
