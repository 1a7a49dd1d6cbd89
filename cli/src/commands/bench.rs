//! `tilec bench`: llama-bench's table, with the floor that memory sets beside each figure.

mod gpu;

#[cfg(test)]
pub use gpu::tests::{toy_draft, toy_plan, toy_program};
pub use gpu::{decode_inputs, expert_layers, make_long, pass_rows, random_routing, resident_step_bytes};

use crate::args::{BenchArgs, BenchOutput, Contexts, DraftArgs};
use crate::commands::inspect::parameters;
use crate::host::{self, Resident};
use crate::session::{Session, max_logit_rows};
use crate::stats::Spread;
use crate::ui::{Align, Table, count, mib};
use crate::{ceiling, source, ui};
use anyhow::{Result, bail};
use gpu::{check_sequences, context_json, starts};
use serde::Serialize;
use serde_json::json;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::time::Instant;
use tilec_ir::cost::StageCost;
use tilec_ir::plan::Plan;
use tilec_runtime::engine::{BlockInput, Engine, RoundInput, RoundOptions, RowInput};
use tilec_runtime::generate::launch_rounds;
use tilec_runtime::sampling::SamplingParams;

/// Measures the ceiling of memory, then the model.
pub fn run(args: &BenchArgs) -> Result<()> {
    let (prompt, generated) = (args.prompt_tokens as usize, args.generated_tokens as usize);
    let (folder, plan) = source::plan(&args.model.path, &args.model.target)?;
    if plan.resident.is_some() {
        return gpu::run(args, &folder, &plan);
    }
    if args.block.is_some() || args.chance.temperature > 0.0 {
        bail!(
            "--block and --temperature are for plans that run on a GPU, and {} runs on the processor: leave them \
             out, or compile it with target.device cuda",
            plan.name
        );
    }
    let repeats = args.repeats.unwrap_or(5);
    if prompt + generated == 0 {
        bail!("nothing to measure: give -p or -n a number above 0");
    }
    let cases = Sequences::cases(args, &plan)?;
    // Their steps are what is decoded.
    let generated = if cases.is_empty() { generated } else { 0 };
    if prompt + generated > plan.limits.context {
        bail!(
            "{prompt} + {generated} tokens are more than the {} positions of the plan: \
             lower -p or -n, or compile with a larger --ctx-size",
            plan.limits.context
        );
    }

    let floor = Floor::measure(&plan, prompt, generated);
    host::reset_peak();
    let draft = !args.draft.no_draft && cases.is_empty();
    let mut session = Session::open_with_draft(&folder, &args.weights, draft)?;
    let forced = Forced::of(args, session.draft_block())?;
    let tokens = random_tokens(prompt + generated, plan.vocab);
    let progress = ui::step_progress("measuring", repeats + 1 + cases.len() as u64);
    let (mut samples, mut drafted) = (Vec::new(), Vec::new());
    for repeat in 0..=repeats {
        let sample = measure(&mut session, &tokens, prompt)?;
        let rounds = match forced.filter(|_| generated > 0) {
            Some(forced) => Some(measure_rounds(&mut session, &tokens, prompt, forced)?),
            None => None,
        };
        progress.inc(1);
        // The first warms caches and branch predictors.
        if repeat > 0 {
            samples.push(sample);
            drafted.extend(rounds);
        }
    }
    let mut decoded = Vec::new();
    session.reset();
    for case in cases {
        // As above.
        case.measure(session.engine_mut())?;
        let seconds: Result<Vec<f64>> = (0..repeats).map(|_| case.measure(session.engine_mut())).collect();
        decoded.push(Decoded { seconds: seconds?, case });
        progress.inc(1);
    }
    progress.finish_and_clear();
    let resident = host::resident();
    let report = Report { plan: &plan, floor, samples, decoded, forced, drafted, resident };
    let text = if args.json || args.output == BenchOutput::Json { report.json() } else { report.markdown() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// One repeat.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Sample {
    prompt_tokens: usize,
    /// Seconds from the first token of the prompt to the logits behind its last.
    prompt_s: f64,
    generated_tokens: usize,
    /// Seconds for all of them, logits included.
    generate_s: f64,
}

/// Reads the first `prompt` tokens in one go and the others one by one, as if they had been generated.
fn measure(session: &mut Session, tokens: &[u32], prompt: usize) -> Result<Sample> {
    session.reset();
    let (before, behind) = tokens.split_at(prompt);
    let start = Instant::now();
    if !before.is_empty() {
        session.feed(before)?;
    }
    let prompt_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    for token in behind {
        session.feed(std::slice::from_ref(token))?;
    }
    let generate_s = start.elapsed().as_secs_f64();
    Ok(Sample { prompt_tokens: prompt, prompt_s, generated_tokens: behind.len(), generate_s })
}

/// Steps of one token each of several sequences.
#[derive(Clone, Debug, PartialEq)]
struct Sequences {
    /// Positions of each that were asked for.
    contexts: Contexts,
    /// Positions of each before the first step.
    starts: Vec<usize>,
    steps: usize,
}

impl Sequences {
    /// Those that the command line asks for.
    fn cases(args: &BenchArgs, plan: &Plan) -> Result<Vec<Sequences>> {
        let (steps, limits) = (args.generated_tokens as usize, &plan.limits);
        if steps == 0 || (args.rows.is_empty() && args.context.is_empty()) {
            return Ok(Vec::new());
        }
        let mut rows: Vec<usize> = args.rows.iter().map(|rows| *rows as usize).collect();
        let mut contexts = args.context.clone();
        check_sequences(&rows, &contexts, limits)?;
        let most = max_logit_rows(plan);
        if let Some(rows) = rows.iter().find(|rows| **rows > most) {
            bail!(
                "--rows {rows} are more than the {most} rows whose logits a step of the plan has: lower it"
            );
        }
        if steps > limits.context {
            bail!("-n {steps} is more than the {} positions of the plan: lower it", limits.context);
        }
        if rows.is_empty() {
            rows.push(1);
        }
        if contexts.is_empty() {
            contexts.push(Contexts::all(512.min(limits.context / 2)));
        }
        let mut cases = Vec::new();
        for contexts in contexts {
            cases.extend(rows.iter().map(|rows| {
                let starts = starts(*rows, contexts, steps, limits.context);
                Sequences { contexts, starts, steps }
            }));
        }
        Ok(cases)
    }

    fn name(&self) -> String {
        format!("tg{} of {} around {}", self.steps, self.starts.len(), self.contexts)
    }

    /// Seconds for all steps, logits included.
    fn measure(&self, engine: &mut Engine) -> Result<f64> {
        for (sequence, start) in self.starts.iter().enumerate() {
            make_long(engine, sequence, start + self.steps)?;
        }
        let rows = self.starts.len();
        let tokens = random_tokens(rows * self.steps, engine.plan().vocab);
        let all: Vec<u32> = (0..rows as u32).collect();
        let begin = Instant::now();
        for (step, tokens) in tokens.chunks(rows).enumerate() {
            let positions: Vec<usize> = self.starts.iter().map(|start| start + step).collect();
            std::hint::black_box(engine.step(&decode_inputs(&positions, tokens), &all)?);
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Bytes that all steps must read: the weights once each, and every sequence's cache.
    fn bytes(&self, plan: &Plan) -> f64 {
        let step = |step: usize| {
            let positions: Vec<usize> = self.starts.iter().map(|start| start + step).collect();
            let of = |cost: &StageCost| cost.runs as f64 * cost.bytes_of_sequences(&positions) as f64;
            plan.costs.iter().map(of).sum::<f64>()
        };
        (0..self.steps).map(step).sum()
    }
}

/// What was measured of them.
struct Decoded {
    case: Sequences,
    /// For all steps, each time.
    seconds: Vec<f64>,
}

/// Rounds with a draft whose guesses are taken as right as often as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Forced {
    /// Rows of a block.
    pub block: usize,
    /// Tokens that a round adds on average.
    pub accept: f64,
    /// Rounds of a launch; 0 launches each kernel by itself. As the engine has them where nobody says.
    launch: Option<usize>,
}

impl Forced {
    /// As [`Forced::new`], with as many rounds a launch as the command line says.
    fn of(args: &BenchArgs, most: Option<usize>) -> Result<Option<Forced>> {
        let forced = Forced::new(args.accept, &args.draft, most)?;
        Ok(forced.map(|forced| Forced { launch: args.launch_rounds.map(|rounds| rounds as usize), ..forced }))
    }

    /// What options say, with a draft of at most so many rows; `None` without one.
    ///
    /// # Errors
    /// When they do not fit the draft, or there is none to fit.
    pub fn new(accept: Option<f32>, draft: &DraftArgs, most: Option<usize>) -> Result<Option<Forced>> {
        let Some(most) = most else {
            if accept.is_some() {
                bail!("--accept is for plans with a draft, and this one has none, or --no-draft is given");
            }
            return Ok(None);
        };
        let block = match draft.draft_max {
            Some(guesses) if guesses as usize >= most => {
                bail!("--draft-max {guesses}: the plan's draft guesses at most {} tokens at a time", most - 1)
            }
            _ => draft.rows().min(most),
        };
        let accept = accept.map_or(block as f64 / 2.0, f64::from);
        if !(1.0..=block as f64).contains(&accept) {
            bail!("--accept {accept}: a round adds from 1 token to the {block} of a block");
        }
        Ok(Some(Forced { block, accept, launch: None }))
    }
}

/// Rounds of one repeat.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
struct Rounds {
    rounds: usize,
    tokens: usize,
    /// Rounds by tokens that they added: entry `i` is for `i + 1`.
    histogram: Vec<usize>,
    /// Seconds for guessing.
    draft_s: f64,
    /// Seconds for the model's steps.
    verify_s: f64,
    /// Seconds for telling the draft of what was accepted.
    inject_s: f64,
    /// Seconds of launches of whole rounds, which are in none of the others.
    launch_s: f64,
}

impl Rounds {
    fn seconds(&self) -> f64 {
        self.draft_s + self.verify_s + self.inject_s + self.launch_s
    }

    /// Notes a round that added so many tokens, at least one.
    fn note(&mut self, tokens: usize) {
        self.rounds += 1;
        self.tokens += tokens;
        if self.histogram.len() < tokens {
            self.histogram.resize(tokens, 0);
        }
        self.histogram[tokens - 1] += 1;
    }

    /// Tokens a round of all these, and how many rounds added how many.
    fn said(all: &[Rounds]) -> String {
        let rounds: usize = all.iter().map(|rounds| rounds.rounds).sum();
        let tokens: usize = all.iter().map(|rounds| rounds.tokens).sum();
        let share = |added: usize| -> Option<String> {
            let count: usize = all.iter().filter_map(|rounds| rounds.histogram.get(added - 1)).sum();
            (count > 0).then(|| format!("{added}: {:.0} %", 100.0 * count as f64 / rounds as f64))
        };
        let most = all.iter().map(|rounds| rounds.histogram.len()).max().unwrap_or(0);
        let shares: Vec<String> = (1..=most).filter_map(share).collect();
        format!("{:.2} tokens a round ({})", tokens as f64 / rounds.max(1) as f64, shares.join(", "))
    }
}

/// Reads the prompt, then runs whole rounds until all tokens are there.
fn measure_rounds(session: &mut Session, tokens: &[u32], prompt: usize, forced: Forced) -> Result<Rounds> {
    session.reset();
    let engine = session.engine_mut();
    let max_rows = engine.plan().limits.max_rows;
    let row = |position: usize, token: u32| RowInput { token, position: position as u32, sequence: 0 };
    for start in (0..prompt).step_by(max_rows) {
        let chunk: Vec<RowInput> =
            (start..prompt.min(start + max_rows)).map(|at| row(at, tokens[at])).collect();
        engine.step(&chunk, &[])?;
        engine.inject(&(0..chunk.len() as u32).collect::<Vec<_>>())?;
    }
    let sum = rounds(engine, tokens, prompt, forced, &SamplingParams::greedy())?;
    session.reset();
    Ok(sum)
}

/// Whole rounds behind the first `prompt` of the tokens, which model and draft know, until all are there. A
/// resident kernel chooses what verifies the guesses as `sampling` says.
fn rounds(
    engine: &mut Engine,
    tokens: &[u32],
    prompt: usize,
    forced: Forced,
    sampling: &SamplingParams,
) -> Result<Rounds> {
    let row = |position: usize, token: u32| RowInput { token, position: position as u32, sequence: 0 };
    let mut sum = Rounds::default();
    let launch = forced.launch.unwrap_or_else(|| launch_rounds(engine));
    let (vocab, context) = (engine.plan().vocab, engine.plan().limits.context);
    while prompt + sum.tokens < tokens.len() {
        let position = prompt + sum.tokens;
        let rows = forced.block.min(context - position);
        if rows >= 2 && launch > 0 && engine.has_rounds(rows, rows) {
            let text = (&tokens[position..], position, rows);
            launched_rounds(engine, text, (launch, forced.accept), sampling, &mut sum)?;
            continue;
        }
        let start = Instant::now();
        let mut block = vec![row(position, tokens[position])];
        if rows >= 2 {
            let wanted = rows - 1;
            let input =
                BlockInput { token: tokens[position], position: position as u32, sequence: 0, rows, wanted };
            let guesses = engine.guess(&[input])?;
            block.extend((position + 1..).zip(guesses).map(|(at, token)| row(at, token.unwrap_or_default())));
        }
        let guessed = Instant::now();
        let all: Vec<u32> = (0..block.len() as u32).collect();
        let chosen: Vec<u32> = match engine.is_resident() {
            true => engine.step_sampled(&block, &all, &vec![sampling; block.len()])?,
            false => engine.step(&block, &all)?.chunks_exact(vocab).map(best).collect(),
        };
        std::hint::black_box(chosen);
        let verified = Instant::now();
        // The whole number nearest to the average so far.
        let due = (forced.accept * (sum.rounds + 1) as f64).round() as usize;
        let added = due.saturating_sub(sum.tokens).clamp(1, rows).min(tokens.len() - position);
        engine.inject(&all[..added])?;
        sum.note(added);
        sum.draft_s += (guessed - start).as_secs_f64();
        sum.verify_s += (verified - guessed).as_secs_f64();
        sum.inject_s += verified.elapsed().as_secs_f64();
    }
    Ok(sum)
}

/// As many rounds as go into a launch, behind the first of the tokens that are still to come.
fn launched_rounds(
    engine: &mut Engine,
    (tokens, position, rows): (&[u32], usize, usize),
    (rounds, accept): (usize, f64),
    sampling: &SamplingParams,
    sum: &mut Rounds,
) -> Result<()> {
    let limit = engine.plan().limits.context.min(position + tokens.len() + rows);
    let block =
        BlockInput { token: tokens[0], position: position as u32, sequence: 0, rows, wanted: rows - 1 };
    let input = RoundInput { block, left: tokens.len(), limit };
    let options = RoundOptions { rounds, stop_tokens: &[], accept: Some(accept) };
    let start = Instant::now();
    engine.rounds(&[input], &[sampling], options, &mut |news| {
        sum.note(news.tokens.len());
        ControlFlow::Continue(())
    })?;
    sum.launch_s += start.elapsed().as_secs_f64();
    Ok(())
}

/// The largest logit's token.
fn best(logits: &[f32]) -> u32 {
    (0u32..)
        .zip(logits)
        .fold((0, f32::NEG_INFINITY), |best, (token, x)| if *x > best.1 { (token, *x) } else { best })
        .0
}

/// Token ids without a pattern, the same ones every time.
pub fn random_tokens(n: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab.max(1) as u64) as u32
    };
    (0..n).map(|_| next()).collect()
}

/// What memory bandwidth allows.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Floor {
    /// Bytes per second out of memory, over a buffer that no cache holds.
    far: f64,
    /// Bytes per second over a buffer as large as what a decoded token reads: caches may help.
    near: f64,
    /// Bytes that the prompt must read.
    prompt_bytes: f64,
    /// Bytes that all decoded tokens must read.
    generate_bytes: f64,
}

impl Floor {
    fn measure(plan: &Plan, prompt: usize, generated: usize) -> Floor {
        let prompt_bytes = prompt_bytes(plan, prompt);
        let generate_bytes: f64 =
            (prompt..prompt + generated).map(|position| step_bytes(plan, 1, position, true)).sum();
        let workers = plan.target.workers;
        let per_token = step_bytes(plan, 1, prompt + generated / 2, true) as usize;
        let progress = ui::step_progress("measuring memory", 2);
        let far = ceiling::read_ceiling(ceiling::FAR_BYTES, workers, 8);
        progress.inc(1);
        let near = ceiling::read_ceiling(per_token, workers, 30);
        progress.finish_and_clear();
        Floor { far, near, prompt_bytes, generate_bytes }
    }

    /// The rate that the floor is computed with: the higher one, so that a share is never flattered.
    fn rate(&self) -> f64 {
        self.far.max(self.near)
    }
}

/// Bytes that a step of `rows` rows of one sequence behind `context` positions must read.
fn step_bytes(plan: &Plan, rows: usize, context: usize, logits: bool) -> f64 {
    let costs = plan.costs.iter().filter(|cost| logits || !cost.logit_rows_only);
    costs.map(|cost| cost.runs as f64 * cost.bytes(rows, context) as f64).sum()
}

/// Bytes that a prompt must read, in steps as large as the plan allows; only the last has logits.
fn prompt_bytes(plan: &Plan, prompt: usize) -> f64 {
    let rows = plan.limits.max_rows.max(1);
    let steps = (0..prompt).step_by(rows).map(|start| (start, rows.min(prompt - start)));
    steps.map(|(start, rows)| step_bytes(plan, rows, start, start + rows == prompt)).sum()
}

/// A line of the table.
struct Test {
    name: String,
    tokens: usize,
    /// Tokens per second.
    rate: Spread,
    /// Tokens per second at the floor.
    floor: f64,
    /// Number of the steps of several sequences that this is of.
    decoded: Option<usize>,
}

struct Report<'a> {
    plan: &'a Plan,
    floor: Floor,
    samples: Vec<Sample>,
    decoded: Vec<Decoded>,
    forced: Option<Forced>,
    drafted: Vec<Rounds>,
    resident: Option<Resident>,
}

impl Report<'_> {
    fn tests(&self) -> Vec<Test> {
        let Some(first) = self.samples.first() else { return Vec::new() };
        let (prompt, generated) = (first.prompt_tokens, first.generated_tokens);
        let test = |name: String, tokens: usize, bytes: f64, seconds: &dyn Fn(&Sample) -> f64| {
            let rate = Spread::of(self.samples.iter().map(|sample| tokens as f64 / seconds(sample)))?;
            let floor = tokens as f64 * self.floor.rate() / bytes;
            (tokens > 0).then_some(Test { name, tokens, rate, floor, decoded: None })
        };
        let behind = if prompt > 0 { format!(" @ d{prompt}") } else { String::new() };
        let tests = [
            test(format!("pp{prompt}"), prompt, self.floor.prompt_bytes, &|sample| sample.prompt_s),
            test(format!("tg{generated}{behind}"), generated, self.floor.generate_bytes, &|sample| {
                sample.generate_s
            }),
        ];
        let decoded = (0..self.decoded.len()).filter_map(|number| self.decoded_test(number));
        tests.into_iter().flatten().chain(self.draft_test(&behind)).chain(decoded).collect()
    }

    /// Steps of several sequences.
    fn decoded_test(&self, number: usize) -> Option<Test> {
        let Decoded { case, seconds } = &self.decoded[number];
        let tokens = case.starts.len() * case.steps;
        let rate = Spread::of(seconds.iter().map(|seconds| tokens as f64 / seconds))?;
        let floor = tokens as f64 * self.floor.rate() / case.bytes(self.plan);
        Some(Test { name: case.name(), tokens, rate, floor, decoded: Some(number) })
    }

    /// The rounds with a draft.
    fn draft_test(&self, behind: &str) -> Option<Test> {
        let (Forced { block, accept, .. }, draft) = (self.forced?, self.plan.draft.as_ref()?);
        let first = self.drafted.first()?;
        let rate = Spread::of(self.drafted.iter().map(|rounds| rounds.tokens as f64 / rounds.seconds()))?;
        let context = self.samples.first()?.prompt_tokens + first.tokens / 2;
        let own = draft.inject.costs.iter().chain(&draft.block_pass.costs);
        let own: f64 = own.map(|cost| cost.runs as f64 * cost.bytes(block, context) as f64).sum();
        let bytes = first.rounds as f64 * (own + step_bytes(self.plan, block, context, true));
        let name = format!("tg{}{behind}, draft of {block} rows, {accept} accepted", first.tokens);
        Some(Test {
            name,
            tokens: first.tokens,
            rate,
            floor: first.tokens as f64 * self.floor.rate() / bytes,
            decoded: None,
        })
    }

    fn markdown(&self) -> String {
        let right = Align::Right;
        let mut table = Table::new(&[
            ("model", Align::Left),
            ("size", right),
            ("params", right),
            ("backend", Align::Left),
            ("threads", right),
            ("test", right),
            ("t/s", right),
            ("memory floor t/s", right),
            ("of floor", right),
        ]);
        let plan = self.plan;
        for test in self.tests() {
            table.row([
                plan.name.clone(),
                mib(plan.packing.bytes),
                count(parameters(plan)),
                format!("{} {}", plan.target.device, plan.target.cpu),
                plan.target.workers.to_string(),
                test.name,
                format!("{:.2} ± {:.2}", test.rate.mean, test.rate.stddev),
                format!("{:.2}", test.floor),
                format!("{:.1} %", 100.0 * test.rate.mean / test.floor),
            ]);
        }
        let mut text = table.markdown();
        text.push_str(&format!(
            "\nread ceiling {:.1} GB/s out of memory, {:.1} GB/s over the bytes of a token\n",
            self.floor.far / 1e9,
            self.floor.near / 1e9
        ));
        let total: f64 = self.drafted.iter().map(Rounds::seconds).sum();
        if total > 0.0 {
            let share = |part: fn(&Rounds) -> f64| 100.0 * self.drafted.iter().map(part).sum::<f64>() / total;
            text.push_str(&format!(
                "rounds: draft {:.0} %, its context {:.0} %, verify {:.0} % of the time; {}\n",
                share(|rounds| rounds.draft_s),
                share(|rounds| rounds.inject_s),
                share(|rounds| rounds.verify_s),
                Rounds::said(&self.drafted),
            ));
        }
        if let Some(resident) = self.resident {
            text.push_str(&format!("resident {}, at most {}\n", mib(resident.now), mib(resident.peak)));
        }
        text
    }

    fn json(&self) -> String {
        let plan = self.plan;
        let tests: Vec<_> = self
            .tests()
            .into_iter()
            .map(|test| {
                let mut line = json!({
                    "test": test.name,
                    "tokens": test.tokens,
                    "tokens_per_s": test.rate,
                    "floor_tokens_per_s": test.floor,
                    "share_of_floor": test.rate.median / test.floor,
                });
                if let Some(Decoded { case, seconds }) = test.decoded.map(|number| &self.decoded[number]) {
                    line["rows"] = json!(case.starts.len());
                    line["context"] = context_json(case.contexts);
                    line["lengths"] = json!(case.starts);
                    line["samples_s"] = json!(seconds);
                }
                line
            })
            .collect();
        let report = json!({
            "model": plan.name,
            "size_bytes": plan.packing.bytes,
            "parameters": parameters(plan),
            "backend": plan.target.device,
            "cpu": plan.target.cpu,
            "machine": host::cpu_name(),
            "threads": plan.target.workers,
            "tests": tests,
            "samples": self.samples,
            "draft": self.forced.map(|forced| json!({ "forced": forced, "samples": self.drafted })),
            "read_ceiling_bytes_per_s": { "memory": self.floor.far, "bytes_of_a_token": self.floor.near },
            "floor_bytes": { "prompt": self.floor.prompt_bytes, "generate": self.floor.generate_bytes },
            "resident_bytes": self.resident.map(|held| json!({ "steady": held.now, "peak": held.peak })),
        });
        format!("{report:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    #[test]
    fn tokens_are_in_the_vocabulary_and_differ() {
        let tokens = random_tokens(1000, 64);
        assert!(tokens.iter().all(|token| *token < 64));
        let distinct: std::collections::BTreeSet<_> = tokens.iter().collect();
        assert_eq!(distinct.len(), 64);
        assert_eq!(tokens, random_tokens(1000, 64));
    }

    fn cases(options: &str, plan: &Plan) -> Result<Vec<Sequences>, String> {
        let line = format!("tilec bench m {options}");
        let Command::Bench(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("{line}")
        };
        Sequences::cases(&args, plan).map_err(|error| error.to_string())
    }

    #[test]
    fn sequences_of_different_lengths_are_measured_within_the_limits() {
        let plan = toy_plan();
        let case = |first, last, starts: &[usize]| Sequences {
            contexts: Contexts { first, last },
            starts: starts.to_vec(),
            steps: 10,
        };
        assert_eq!(cases("", &plan), Ok(vec![]));
        assert_eq!(cases("--rows 3 -n 0", &plan), Ok(vec![]));
        assert_eq!(cases("--rows 2 -n 10", &plan), Ok(vec![case(500, 500, &[495, 495])]));
        let expected =
            [case(1, 1000, &[495]), case(1, 1000, &[0, 990, 496]), case(9, 9, &[4]), case(9, 9, &[4; 3])];
        assert_eq!(cases("--rows 1,3 --context 1..1000,9 -n 10", &plan).unwrap(), expected);
        let mut short = toy_plan();
        short.buffers[0].rows = 2;
        for (options, plan, problem) in [
            ("--rows 9", &plan, "--sequences 9"),
            ("--context 1..1001", &plan, "--context 1..1001 is more than the 1000"),
            ("--rows 1 -n 1001", &plan, "-n 1001"),
            ("--rows 3", &short, "the 2 rows whose logits"),
        ] {
            let error = cases(options, plan).unwrap_err();
            assert!(error.contains(problem), "{options}: {error}");
        }
    }

    #[test]
    fn rounds_are_counted_by_what_they_added() {
        let mut one = Rounds::default();
        [3, 1, 3].into_iter().for_each(|added| one.note(added));
        assert_eq!((one.rounds, one.tokens, &one.histogram[..]), (3, 7, &[1, 0, 2][..]));
        let mut other = Rounds::default();
        other.note(2);
        assert_eq!(Rounds::said(&[one, other]), "2.25 tokens a round (1: 25 %, 2: 25 %, 3: 50 %)");
        assert_eq!(Rounds::said(&[]), "0.00 tokens a round ()");
    }

    #[test]
    fn the_floor_of_sequences_has_the_cache_of_each() {
        let plan = toy_plan();
        // Weights, and 148 bytes of activations a row; 16 bytes a position in front of a row.
        let case = &cases("--rows 3 --context 1..1000 -n 10", &plan).unwrap()[0];
        let positions = (0..10).map(|step| step + (990 + step) + (496 + step)).sum::<usize>();
        assert_eq!(case.bytes(&plan), (10 * (7000 + 3 * 148) + 16 * positions) as f64);
        let mut narrow = toy_plan();
        narrow.costs[2].kv_window = Some(100);
        let positions = (0..10).map(|step| step + 2 * 99).sum::<usize>();
        assert_eq!(case.bytes(&narrow), (10 * (7000 + 3 * 148) + 16 * positions) as f64);
        assert_eq!(case.name(), "tg10 of 3 around 1..1000");
    }
}
