//! The measurements on a GPU: steps of the resident kernel, beside what its memory allows.

use crate::args::{BenchArgs, BenchOutput, Contexts, Routing};
use crate::commands::bench::{Forced, Rounds, random_tokens, rounds};
use crate::commands::inspect::parameters;
use crate::stats::Spread;
use crate::ui::{Align, Table, count, mib};
use crate::{ceiling, session, ui};
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use tilec_ir::cost::StageCost;
use tilec_ir::plan::{Plan, PlanLimits};
use tilec_runtime::cuda::{Ceiling, DeviceInfo, RandomRouting};
use tilec_runtime::engine::{Engine, RowInput};
use tilec_runtime::memory::Breakdown;
use tilec_runtime::sampling::SamplingParams;

/// Sequences in a step, where the command line does not say; and as many as a pass has rows.
const ROWS: [usize; 2] = [1, 8];

/// Positions of each.
const CONTEXTS: [Contexts; 2] = [Contexts::all(512), Contexts::all(4096)];

/// Steps of a block in a repeat: each goes through the host, and one alone is too short to time.
const BLOCK_STEPS: usize = 16;

/// Measures the ceiling of the GPU's memory, then the model.
pub fn run(args: &BenchArgs, folder: &Path, plan: &Plan) -> Result<()> {
    let mut cases = Cases::of(args, &plan.limits, pass_rows(plan))?;
    let repeats = args.repeats.unwrap_or(9) as usize;
    let draft = plan.draft.as_ref().filter(|_| !args.draft.no_draft);
    if let Some(forced) = Forced::of(args, draft.map(|draft| draft.block))? {
        cases.add_rounds(args, &plan.limits, forced);
    }
    let sampling = args.chance.parameters();
    sampling.validate()?;
    ui::note("measuring the GPU's memory");
    let (gpu, ceiling) = ceiling::gpu_read_ceiling(&plan.target.arch)?;
    let mut engine = session::load(folder, &args.weights, false, draft.is_some())?;
    let routing = random_routing(args.routing, plan)?;
    let progress = ui::step_progress("measuring", cases.tests.len() as u64);
    let mut lines = Vec::new();
    for test in &cases.tests {
        let mut seconds = Vec::with_capacity(repeats);
        let mut all_chosen = Vec::new();
        let mut split = Vec::new();
        // The first finds cold caches and low clocks.
        for repeat in 0..=repeats {
            let seed = repeat as u32;
            engine.set_routing(routing.map(|routing| RandomRouting { seed, ..routing }));
            engine.take_expert_counts();
            let (measured, rounds) = measure(&mut engine, test, &sampling)?;
            if repeat > 0 {
                seconds.push(measured);
                split.extend(rounds);
                let chosen = engine.take_expert_counts().map(|counts| counts.chosen);
                all_chosen.extend(chosen.filter(|experts| *experts > 0));
            }
        }
        let choices = test.passes(plan) as f64 * expert_layers(plan) as f64;
        let distinct = (!all_chosen.is_empty() && choices > 0.0).then(|| {
            all_chosen.iter().map(|experts| f64::from(*experts)).sum::<f64>()
                / all_chosen.len() as f64
                / choices
        });
        lines.push(Line { rounds: split, ..Line::new(plan, *test, seconds, distinct) });
        progress.inc(1);
    }
    progress.finish_and_clear();
    let report = Report { plan, gpu, ceiling, sampling, lines, memory: engine.memory() };
    let json = args.json || args.output == BenchOutput::Json;
    let text = if json { format!("{:#}\n", report.json()) } else { report.markdown() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// One thing that is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Test {
    /// Steps of one token each of several sequences.
    Decode {
        rows: usize,
        /// That were asked for.
        contexts: Contexts,
        steps: usize,
        /// Positions that a sequence can have.
        limit: usize,
    },
    /// A step of several rows of one sequence.
    Block { rows: usize, context: usize },
    /// A prompt, in steps as large as the plan allows.
    Prompt { tokens: usize },
    /// Rounds of a draft, until so many tokens are there.
    Rounds {
        forced: Forced,
        /// That was asked for.
        context: usize,
        /// Position of the first token.
        start: usize,
        tokens: usize,
    },
}

/// What is measured, in order.
struct Cases {
    tests: Vec<Test>,
}

impl Cases {
    /// Those that the command line asks for, or the defaults that the limits allow.
    fn of(args: &BenchArgs, limits: &PlanLimits, pass_rows: usize) -> Result<Cases> {
        let (prompt, steps) = (args.prompt_tokens as usize, args.generated_tokens as usize);
        if prompt + steps == 0 && args.block.is_none() {
            bail!("nothing to measure: give -p, -n or --block a number above 0");
        }
        let list = |given: &[u64]| given.iter().map(|n| *n as usize).collect::<Vec<_>>();
        let (mut rows, mut contexts) = (list(&args.rows), args.context.clone());
        check_sequences(&rows, &contexts, limits)?;
        if rows.is_empty() {
            rows =
                ROWS.into_iter().chain([pass_rows.max(8)]).map(|rows| rows.min(limits.sequences)).collect();
            rows.dedup();
        }
        if contexts.is_empty() {
            contexts = CONTEXTS.into_iter().filter(|contexts| contexts.last <= limits.context).collect();
            if contexts.is_empty() {
                contexts = vec![Contexts::all(limits.context / 2)];
            }
        }
        let mut tests = Vec::new();
        if steps > 0 {
            let most = limits.context.min(tilec_runtime::engine::MAX_DECODE_STEPS);
            if steps > most {
                bail!(
                    "-n {steps} is more than the {most} steps that a launch of this plan can have: lower it"
                );
            }
            let limit = limits.context;
            for contexts in contexts.iter().copied() {
                tests.extend(rows.iter().map(|rows| Test::Decode { rows: *rows, contexts, steps, limit }));
            }
        }
        if let Some(rows) = args.block.map(|rows| rows as usize) {
            if rows > limits.max_rows {
                bail!(
                    "--block {rows} is more than the {} rows of the plan: compile it with a larger --max-rows",
                    limits.max_rows
                );
            }
            for contexts in &contexts {
                let context = contexts.of(1)[0].min(limits.context.saturating_sub(rows));
                tests.push(Test::Block { rows, context });
            }
        }
        if prompt > limits.context {
            bail!(
                "-p {prompt} is more than the {} positions of the plan: lower -p, or compile with a larger \
                 --ctx-size",
                limits.context
            );
        }
        if prompt > 0 {
            tests.push(Test::Prompt { tokens: prompt });
        }
        Ok(Cases { tests })
    }

    /// Adds rounds of a draft where single steps are decoded.
    fn add_rounds(&mut self, args: &BenchArgs, limits: &PlanLimits, forced: Forced) {
        let tokens = args.generated_tokens as usize;
        let mut starts: Vec<(usize, usize)> = Vec::new();
        for test in &self.tests {
            if let Test::Decode { contexts, .. } = *test {
                let context = contexts.of(1)[0];
                // The last block may go beyond the tokens.
                let most = limits.context.saturating_sub(tokens + forced.block);
                starts.push((context, context.saturating_sub(tokens / 2).min(most)));
            }
        }
        starts.dedup();
        let test = |(context, start)| Test::Rounds { forced, context, start, tokens };
        self.tests.extend(starts.into_iter().filter(|_| tokens > 0).map(test));
    }
}

impl Test {
    fn name(&self) -> String {
        match self {
            Test::Decode { .. } => "decode".into(),
            Test::Block { rows, .. } => format!("block of {rows}"),
            Test::Prompt { tokens } => format!("pp{tokens}"),
            Test::Rounds { forced: Forced { block, accept, .. }, .. } => {
                format!("draft of {block} rows, {accept} accepted")
            }
        }
    }

    /// Rows of a step.
    fn rows(&self, plan: &Plan) -> usize {
        match self {
            Test::Decode { rows, .. } | Test::Block { rows, .. } => *rows,
            Test::Prompt { tokens } => plan.limits.max_rows.min(*tokens),
            Test::Rounds { forced, .. } => forced.block,
        }
    }

    /// Tokens that go in, or come out of a round, while the time is measured that is shown.
    fn tokens(&self) -> f64 {
        match self {
            Test::Decode { rows, .. } | Test::Block { rows, .. } => *rows as f64,
            Test::Prompt { tokens } => *tokens as f64,
            Test::Rounds { forced, .. } => forced.accept,
        }
    }

    fn contexts(&self) -> Contexts {
        match self {
            Test::Decode { contexts, .. } => *contexts,
            Test::Block { context, .. } | Test::Rounds { context, .. } => Contexts::all(*context),
            Test::Prompt { .. } => Contexts::all(0),
        }
    }

    /// Positions in each sequence's cache before the first step.
    fn starts(&self) -> Vec<usize> {
        match *self {
            Test::Decode { rows, contexts, steps, limit } => starts(rows, contexts, steps, limit),
            Test::Block { context, .. } => vec![context],
            Test::Rounds { start, .. } => vec![start],
            Test::Prompt { .. } => vec![0],
        }
    }

    /// Launches' worth of steps in one measurement: each reads the weights once.
    fn passes(&self, plan: &Plan) -> usize {
        match self {
            Test::Decode { rows, steps, .. } => steps * rows.div_ceil(pass_rows(plan)),
            Test::Block { rows, .. } => BLOCK_STEPS * rows.div_ceil(pass_rows(plan)),
            Test::Prompt { tokens } => {
                let most = plan.limits.max_rows.max(1);
                (0..*tokens).step_by(most).map(|at| most.min(tokens - at).div_ceil(pass_rows(plan))).sum()
            }
            Test::Rounds { forced, tokens, .. } => (*tokens as f64 / forced.accept).ceil() as usize,
        }
    }

    /// Bytes that must be read and written, and those that the kernel moves: it reads the weights once
    /// for every pass; of experts those of `distinct` ones each time, or as many as are to be
    /// expected.
    fn bytes(&self, plan: &Plan, distinct: Option<f64>) -> (f64, f64) {
        let passes = |rows: usize| rows.div_ceil(pass_rows(plan));
        match self {
            Test::Decode { rows, steps, .. } => {
                let starts = self.starts();
                let caches = |cost: &StageCost| mean_kv_bytes(cost, &starts, *steps);
                let bytes =
                    |passes| resident_step_bytes(&plan.costs, distinct, passes, *rows, &caches, *rows);
                (bytes(1), bytes(passes(*rows)))
            }
            Test::Block { rows, context } => {
                let bytes = |passes| {
                    let caches = |cost: &StageCost| (passes as u64 * cost.kv_bytes(*context)) as f64;
                    resident_step_bytes(&plan.costs, distinct, passes, *rows, &caches, *rows)
                };
                (bytes(1), bytes(passes(*rows)))
            }
            Test::Prompt { tokens } => {
                let max_rows = plan.limits.max_rows.max(1);
                let steps = (0..*tokens).step_by(max_rows).map(|start| (start, max_rows.min(tokens - start)));
                steps.fold((0.0, 0.0), |(must, does), (start, rows)| {
                    let logits = usize::from(start + rows == *tokens);
                    let bytes = |passes, logits| {
                        let caches = |cost: &StageCost| (passes as u64 * cost.kv_bytes(start)) as f64;
                        resident_step_bytes(&plan.costs, distinct, passes, rows, &caches, logits)
                    };
                    // The kernel streams the head in any case.
                    (must + bytes(1, logits), does + bytes(passes(rows), 1))
                })
            }
            Test::Rounds { forced: Forced { block, accept, .. }, start, tokens, .. } => {
                let mean = start + tokens / 2;
                let step = |costs: &[StageCost], distinct, rows, logit_rows| {
                    let cache = |cost: &StageCost| cost.kv_bytes(mean) as f64;
                    resident_step_bytes(costs, distinct, 1, rows, &cache, logit_rows)
                };
                let own = plan.draft.as_ref().map_or(0.0, |draft| {
                    let committed = accept.round() as usize;
                    step(&draft.inject.costs, None, committed, 0)
                        + step(&draft.block_pass.costs, None, *block, block - 1)
                });
                let bytes = own + step(&plan.costs, distinct, *block, *block);
                (bytes, bytes)
            }
        }
    }
}

/// Refuses steps of more sequences, and of longer ones, than a plan has.
pub fn check_sequences(rows: &[usize], contexts: &[Contexts], limits: &PlanLimits) -> Result<()> {
    if let Some(rows) = rows.iter().find(|rows| **rows > limits.sequences) {
        bail!(
            "--rows {rows} are more sequences than the {} of the plan: compile it with --sequences {rows}",
            limits.sequences
        );
    }
    if let Some(contexts) = contexts.iter().find(|contexts| contexts.last > limits.context) {
        bail!(
            "--context {contexts} is more than the {} positions of the plan: compile it with a larger \
             --ctx-size",
            limits.context
        );
    }
    Ok(())
}

/// Positions of `rows` sequences before the first of `steps` steps: half of the steps lie before what was asked
/// for, half behind it, as far as there is room from 0 to `limit`, which is at least `steps`.
pub fn starts(rows: usize, contexts: Contexts, steps: usize, limit: usize) -> Vec<usize> {
    let start = |context: usize| context.saturating_sub(steps / 2).min(limit - steps);
    contexts.of(rows).into_iter().map(start).collect()
}

/// KV cache bytes that a run of a stage reads for a row each of sequences that begin with so many positions, on
/// average over `steps` steps.
pub fn mean_kv_bytes(cost: &StageCost, starts: &[usize], steps: usize) -> f64 {
    if cost.kv_bytes_per_position == 0 || steps == 0 {
        return 0.0;
    }
    let of = |start: usize| (start..start + steps).map(|position| cost.kv_bytes(position)).sum::<u64>();
    starts.iter().map(|start| of(*start)).sum::<u64>() as f64 / steps as f64
}

/// Bytes of a step: weights read `passes` times, `caches` that a run of a stage reads in all of them, activations
/// of so many `rows`. Without `logit_rows` the head is left out; with any, it is read
/// in all passes. Of experts `distinct` are read in a pass; as many as are to be expected if that is unknown.
pub fn resident_step_bytes(
    costs: &[StageCost],
    distinct: Option<f64>,
    passes: usize,
    rows: usize,
    caches: &dyn Fn(&StageCost) -> f64,
    logit_rows: usize,
) -> f64 {
    let one = |cost: &StageCost| {
        let (passes, rows) = match cost.logit_rows_only {
            true => (if logit_rows == 0 { 0 } else { passes }, logit_rows),
            false => (passes, rows),
        };
        let weights = match distinct.filter(|_| cost.experts > 0) {
            Some(distinct) => cost.weight_bytes as f64 * distinct / cost.experts as f64,
            None => cost.streamed_bytes(rows.div_ceil(passes.max(1))) as f64,
        };
        weights * passes as f64 + caches(cost) + (cost.activation_bytes_per_row * rows as u64) as f64
    };
    costs.iter().map(|cost| cost.runs as f64 * one(cost)).sum()
}

/// How chance is to choose experts, if it is to.
pub fn random_routing(routing: Routing, plan: &Plan) -> Result<Option<RandomRouting>> {
    let Routing::Random(share) = routing else { return Ok(None) };
    if expert_layers(plan) == 0 {
        bail!("{} has no experts to choose: leave --routing out", plan.name);
    }
    Ok(Some(RandomRouting { shared_permille: (share * 1000.0) as u16, seed: 0 }))
}

/// Layers with experts.
pub fn expert_layers(plan: &Plan) -> usize {
    // Two stages each: into the intermediate columns and back.
    plan.costs.iter().filter(|cost| cost.experts > 0).map(|cost| cost.runs).sum::<usize>() / 2
}

/// Rows for which the plan's kernel reads the weights once.
pub fn pass_rows(plan: &Plan) -> usize {
    plan.resident.map_or(1, |kernel| kernel.step_rows)
}

/// Measures once: seconds of a step, of a round, or of the prompt; and what rounds were made of.
fn measure(engine: &mut Engine, test: &Test, sampling: &SamplingParams) -> Result<(f64, Option<Rounds>)> {
    let vocab = engine.plan().vocab;
    match *test {
        Test::Decode { rows, steps, .. } => {
            let starts = test.starts();
            for (sequence, start) in starts.iter().enumerate() {
                // Pages for all steps: those that a launch takes would have to be zeroed first.
                make_long(engine, sequence, start + steps)?;
            }
            let inputs = decode_inputs(&starts, &random_tokens(rows, vocab));
            let mut seconds = 0.0;
            for pass in inputs.chunks(engine.max_decode_rows()) {
                let begin = Instant::now();
                let sampling = vec![sampling; pass.len()];
                let mut on = |_, _, _| ControlFlow::Continue(());
                let done = engine.decode_sampled(pass, &sampling, steps, &[], &mut on)?;
                seconds += begin.elapsed().as_secs_f64();
                if done != steps {
                    bail!("the kernel ended after {done} of {steps} steps, which nobody asked for");
                }
            }
            Ok((seconds / steps as f64, None))
        }
        Test::Block { rows, context } => {
            make_long(engine, 0, context + rows)?;
            let inputs = of_one_sequence(context, &random_tokens(rows, vocab));
            let logit_rows: Vec<u32> = (0..rows.min(engine.max_logit_rows()) as u32).collect();
            let begin = Instant::now();
            for _ in 0..BLOCK_STEPS {
                engine.step(&inputs, &logit_rows)?;
            }
            Ok((begin.elapsed().as_secs_f64() / BLOCK_STEPS as f64, None))
        }
        Test::Prompt { tokens } => {
            engine.reset(0);
            let prompt = random_tokens(tokens, vocab);
            let begin = Instant::now();
            let mut position = 0;
            for part in prompt.chunks(engine.plan().limits.max_rows) {
                let last = position + part.len() == tokens;
                let wanted = part.len() as u32 - 1;
                engine.step(
                    &of_one_sequence(position, part),
                    if last { std::slice::from_ref(&wanted) } else { &[] },
                )?;
                position += part.len();
            }
            Ok((begin.elapsed().as_secs_f64(), None))
        }
        Test::Rounds { forced, start, tokens, .. } => {
            // Also pages for all of them.
            let all = start + tokens + forced.block;
            if engine.length(0).min(engine.draft_length(0)) < start || engine.kv().held_pages(0) == 0 {
                engine.pretend_length(0, all.min(engine.plan().limits.context))?;
            }
            let sum = rounds(engine, &random_tokens(start + tokens, vocab), start, forced, sampling)?;
            Ok((sum.seconds() / sum.rounds as f64, Some(sum)))
        }
    }
}

/// A row for each sequence, each at its own position.
pub fn decode_inputs(positions: &[usize], tokens: &[u32]) -> Vec<RowInput> {
    let row = |(sequence, (token, position)): (u32, (&u32, &usize))| RowInput {
        token: *token,
        position: *position as u32,
        sequence,
    };
    (0..).zip(tokens.iter().zip(positions)).map(row).collect()
}

/// Gives a sequence at least so many positions, with random keys and values.
///
/// # Errors
/// When the plan has no room for them.
pub fn make_long(engine: &mut Engine, sequence: usize, length: usize) -> Result<()> {
    if engine.length(sequence) < length {
        engine.pretend_length(sequence, length)?;
    }
    Ok(())
}

fn of_one_sequence(position: usize, tokens: &[u32]) -> Vec<RowInput> {
    (position as u32..)
        .zip(tokens)
        .map(|(position, token)| RowInput { token: *token, position, sequence: 0 })
        .collect()
}

/// A line of the table.
struct Line {
    test: Test,
    rows: usize,
    /// Seconds of a step, or of the prompt, each time.
    seconds: Vec<f64>,
    spread: Spread,
    /// Bytes that must be moved.
    floor_bytes: f64,
    /// Bytes that are moved.
    bytes: f64,
    /// Experts of a layer whose weights were read in a pass, on average.
    distinct: Option<f64>,
    /// What rounds were made of, each time.
    rounds: Vec<Rounds>,
}

impl Line {
    fn new(plan: &Plan, test: Test, seconds: Vec<f64>, distinct: Option<f64>) -> Line {
        let nothing = Spread { mean: 0.0, stddev: 0.0, median: 0.0, min: 0.0, max: 0.0 };
        let spread = Spread::of(seconds.iter().copied()).unwrap_or(nothing);
        let (floor_bytes, bytes) = test.bytes(plan, distinct);
        Line {
            test,
            rows: test.rows(plan),
            seconds,
            spread,
            floor_bytes,
            bytes,
            distinct,
            rounds: Vec::new(),
        }
    }

    fn tokens_per_second(&self) -> f64 {
        self.test.tokens() / self.spread.median
    }

    /// How the time of rounds divides, if it is one of them.
    fn split(&self) -> Option<String> {
        let total: f64 = self.rounds.iter().map(Rounds::seconds).sum();
        let rounds: usize = self.rounds.iter().map(|rounds| rounds.rounds).sum();
        let part = |of: fn(&Rounds) -> f64| 1e6 * self.rounds.iter().map(of).sum::<f64>() / rounds as f64;
        let launched = part(|rounds| rounds.launch_s);
        let context = self.test.contexts();
        if launched * rounds as f64 >= 0.99e6 * total && total > 0.0 {
            let said = Rounds::said(&self.rounds);
            return Some(format!(
                "a round behind {context}: {launched:.0} us, whole rounds in launches; {said}\n"
            ));
        }
        (total > 0.0).then(|| {
            format!(
                "a round behind {}: draft {:.0} us, verify {:.0} us, its context {:.0} us; {}\n",
                context,
                part(|rounds| rounds.draft_s),
                part(|rounds| rounds.verify_s),
                part(|rounds| rounds.inject_s),
                Rounds::said(&self.rounds),
            )
        })
    }

    /// Bytes per second.
    fn rate(&self) -> f64 {
        self.bytes / self.spread.median
    }
}

/// A number, or of a range its text.
pub fn context_json(contexts: Contexts) -> Value {
    if contexts.first == contexts.last { json!(contexts.first) } else { json!(contexts.to_string()) }
}

struct Report<'a> {
    plan: &'a Plan,
    gpu: DeviceInfo,
    ceiling: Ceiling,
    /// How tokens were chosen that were decoded.
    sampling: SamplingParams,
    lines: Vec<Line>,
    memory: Breakdown,
}

impl Report<'_> {
    fn markdown(&self) -> String {
        let right = Align::Right;
        let mut table = Table::new(&[
            ("test", Align::Left),
            ("rows", right),
            ("context", right),
            ("experts", right),
            ("ms", right),
            ("±", right),
            ("t/s", right),
            ("GB", right),
            ("GB/s", right),
            ("of ceiling", right),
            ("floor ms", right),
            ("of floor", right),
        ]);
        let best = self.ceiling.best();
        for line in &self.lines {
            let floor = line.floor_bytes / best;
            table.row([
                line.test.name(),
                line.rows.to_string(),
                line.test.contexts().to_string(),
                line.distinct.map_or("-".into(), |distinct| format!("{distinct:.1}")),
                format!("{:.4}", line.spread.median * 1e3),
                format!("{:.4}", line.spread.stddev * 1e3),
                format!("{:.1}", line.tokens_per_second()),
                format!("{:.4}", line.bytes / 1e9),
                format!("{:.0}", line.rate() / 1e9),
                format!("{:.1} %", 100.0 * line.rate() / best),
                format!("{:.4}", floor * 1e3),
                format!("{:.1} %", 100.0 * floor / line.spread.median),
            ]);
        }
        let memory = &self.memory;
        format!(
            "{}, {} parameters, {} packed, {}\n{}\n{}\n\
             ms: median of {} repeats, of a step, of a round, or of the whole prompt (pp). GB: what the kernel moves; it \
             reads the weights once for every {} rows. floor: the weights once, each context and the \
             activations, at the read ceiling. experts: those of a layer whose weights a pass reads.\n\
             read ceiling {:.0} GB/s, median {:.0} GB/s of {} passes over {}\n\
             GPU memory: weights {}, KV cache {}, activations and tables {}\n{}",
            self.plan.title(),
            count(parameters(self.plan)),
            mib(self.plan.packing.bytes),
            self.gpu,
            self.chosen(),
            table.markdown(),
            self.lines.first().map_or(0, |line| line.seconds.len()),
            pass_rows(self.plan),
            best / 1e9,
            self.ceiling.median() / 1e9,
            self.ceiling.passes.len(),
            mib(self.ceiling.bytes),
            mib(memory.weights),
            mib(memory.kv),
            mib(memory.arena + memory.scratch),
            self.lines.iter().filter_map(Line::split).collect::<String>(),
        )
    }

    /// How tokens were chosen, if by chance.
    fn chosen(&self) -> String {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.sampling;
        if self.sampling.is_greedy() {
            return String::new();
        }
        format!("tokens sampled at temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}\n")
    }

    fn json(&self) -> Value {
        let best = self.ceiling.best();
        let lines = self.lines.iter().map(|line| {
            json!({
                "test": line.test.name(),
                "rows": line.rows,
                "context": context_json(line.test.contexts()),
                "lengths": line.test.starts(),
                "distinct_experts": line.distinct,
                "tokens": line.test.tokens(),
                "seconds": line.spread,
                "samples_s": line.seconds,
                "rounds": line.rounds,
                "tokens_per_s": line.tokens_per_second(),
                "bytes": line.bytes,
                "bytes_per_s": line.rate(),
                "share_of_ceiling": line.rate() / best,
                "floor_bytes": line.floor_bytes,
                "floor_s": line.floor_bytes / best,
                "share_of_floor": line.floor_bytes / best / line.spread.median,
            })
        });
        let memory = &self.memory;
        json!({
            "model": self.plan.name,
            "shard": self.plan.shard,
            "size_bytes": self.plan.packing.bytes,
            "parameters": parameters(self.plan),
            "backend": self.plan.target.device,
            "gpu": self.gpu.name,
            "sms": self.gpu.sms,
            "arch": self.plan.target.arch,
            "sampling": self.sampling,
            "read_ceiling": {
                "best_bytes_per_s": best,
                "median_bytes_per_s": self.ceiling.median(),
                "buffer_bytes": self.ceiling.bytes,
                "passes_s": self.ceiling.passes,
            },
            "tests": lines.collect::<Vec<_>>(),
            "gpu_memory_bytes": {
                "weights": memory.weights,
                "kv": memory.kv,
                "other": memory.arena + memory.scratch,
            },
        })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;
    use tilec_ir::abi::{ABI_VERSION, KvLayout, KvType};
    use tilec_ir::launch::LAUNCH_VERSION;
    use tilec_ir::pack::Packing;
    use tilec_ir::plan::{
        DraftPlan, PLAN_VERSION, PlanFile, PlanTarget, ProgramPlan, ResidentPlan, WeightsFrom,
    };
    use tilec_ir::spec::Shard;
    use tilec_ir::stages::{Buffer, BufferElem};

    /// A program of the plan's, of these stages and costs.
    pub fn toy_program(plan: &Plan, stages: &[&str], costs: &[StageCost]) -> ProgramPlan {
        ProgramPlan {
            buffers: Vec::new(),
            scratch_bytes: 0,
            stages: stages.iter().map(|stage| stage.to_string()).collect(),
            costs: costs.to_vec(),
            code: plan.code.clone(),
            resident: plan.resident,
        }
    }

    /// A draft of the plan's, of its inject and its block.
    pub fn toy_draft(
        plan: &Plan,
        block: usize,
        [inject, block_pass]: [ProgramPlan; 2],
        round: Option<ProgramPlan>,
    ) -> DraftPlan {
        DraftPlan {
            weights: plan.weights.clone(),
            block,
            mask_token: 0,
            taps: vec![0],
            taps_buffer: 0,
            kv: plan.kv,
            inject,
            input: None,
            block_pass,
            logits: 0,
            selector: None,
            round,
        }
    }

    /// Two layers of a product and an attention, between an embedding and a head.
    pub fn toy_plan() -> Plan {
        let cost =
            |stage: &str, runs, weight_bytes, kv_bytes_per_position, activation_bytes_per_row| StageCost {
                stage: stage.into(),
                anchor: String::new(),
                runs,
                weight_bytes,
                experts: 0,
                experts_per_row: 0,
                macs_per_row: 0,
                kv_bytes_per_position,
                kv_macs_per_position: 0,
                kv_window: None,
                activation_bytes_per_row,
                logit_rows_only: stage == "head",
            };
        Plan {
            plan_version: PLAN_VERSION,
            abi_version: ABI_VERSION,
            name: "toy".into(),
            family: "llama".into(),
            graph_sha256: String::new(),
            weights: WeightsFrom::Checkpoint { path: "toy".into() },
            tokenizer: None,
            target: PlanTarget {
                device: "cuda".into(),
                arch: "sm_90a".into(),
                cpu: String::new(),
                features: Vec::new(),
                workers: 1,
            },
            limits: PlanLimits { max_rows: 16, sequences: 8, context: 1000 },
            vocab: 5,
            buffers: vec![Buffer {
                name: "logits".into(),
                elem: BufferElem::F32,
                cols: 5,
                rows: 16,
                offset: 0,
            }],
            logits: 0,
            scratch_bytes: 0,
            stages: ["embed", "l0.qkv", "l0.attn", "l1.qkv", "l1.attn", "head"].map(String::from).into(),
            kv: KvLayout {
                kv_type: KvType::Bf16,
                layers: 2,
                kv_heads: 1,
                qk_dim: 1,
                v_dim: 1,
                page_tokens: 16,
            },
            packing: Packing { bytes: 7000, ..Packing::default() },
            costs: vec![
                cost("embed", 1, 0, 0, 100),
                cost("qkv", 2, 1000, 0, 10),
                cost("attn", 2, 0, 8, 4),
                cost("head", 1, 5000, 0, 20),
            ],
            code: PlanFile { file: "kernel.cubin".into(), sha256: String::new() },
            resident: Some(ResidentPlan {
                launch_version: LAUNCH_VERSION,
                threads: 384,
                shared_bytes: 0,
                step_rows: 8,
            }),
            shard: None,
            draft: None,
            texts: Vec::new(),
        }
    }

    fn args(options: &str) -> BenchArgs {
        let line = format!("tilec bench m {options}");
        match Cli::try_parse_from(line.split_whitespace()).unwrap().command {
            Command::Bench(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn cases(options: &str) -> Result<Vec<Test>, String> {
        let cases = Cases::of(&args(options), &toy_plan().limits, 8);
        cases.map(|cases| cases.tests).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_what_the_limits_allow() {
        let decode =
            |rows, context, limit| Test::Decode { rows, contexts: Contexts::all(context), steps: 128, limit };
        let expected = [decode(1, 512, 1000), decode(8, 512, 1000), Test::Prompt { tokens: 512 }];
        assert_eq!(cases("").unwrap(), expected);
        assert_eq!(expected[1].starts(), [448; 8]);
        let mut limits = toy_plan().limits;
        (limits.sequences, limits.context) = (4, 600);
        let tests = Cases::of(&args("-p 0"), &limits, 16).unwrap().tests;
        assert_eq!(tests, [decode(1, 512, 600), decode(4, 512, 600)]);
        limits.sequences = 40;
        let tests = Cases::of(&args("-p 0"), &limits, 16).unwrap().tests;
        assert_eq!(tests, [1, 8, 16].map(|rows| decode(rows, 512, 600)));
        (limits.sequences, limits.context) = (1, 200);
        assert_eq!(Cases::of(&args("-p 0"), &limits, 16).unwrap().tests, [decode(1, 100, 200)]);
        assert_eq!(decode(1, 100, 200).starts(), [36]);
    }

    #[test]
    fn lists_are_measured_within_the_limits() {
        let tests = cases("--rows 2,3 --context 0,1000,4..900 --block 9 -p 0 -n 10").unwrap();
        let decode = |rows, first, last| Test::Decode {
            rows,
            contexts: Contexts { first, last },
            steps: 10,
            limit: 1000,
        };
        let block = |context| Test::Block { rows: 9, context };
        let expected = [
            decode(2, 0, 0),
            decode(3, 0, 0),
            decode(2, 1000, 1000),
            decode(3, 1000, 1000),
            decode(2, 4, 900),
            decode(3, 4, 900),
            block(0),
            block(991),
            block(452),
        ];
        assert_eq!(tests, expected);
        assert_eq!((tests[1].starts(), tests[3].starts()), (vec![0; 3], vec![990; 3]));
        assert_eq!(tests[5].starts(), [0, 895, 447]);
        for (options, problem) in [
            ("--rows 9", "--sequences 9"),
            ("--context 1001", "--ctx-size"),
            ("--context 1..1001", "--context 1..1001"),
            ("--block 17", "--max-rows"),
            ("-p 1001", "--ctx-size"),
            ("-n 1001", "1000 steps"),
            ("-p 0 -n 0", "nothing to measure"),
        ] {
            let error = cases(options).unwrap_err();
            assert!(error.contains(problem), "{options}: {error}");
        }
    }

    #[test]
    fn bytes_are_those_of_weights_contexts_and_rows() {
        let plan = toy_plan();
        // Mean position 104.5; 3 caches in each of 2 layers.
        let test = Test::Decode { rows: 3, contexts: Contexts::all(105), steps: 10, limit: 1000 };
        let bytes = test.bytes(&plan, None);
        let expected = 7000.0 + 2.0 * 3.0 * 8.0 * 104.5 + 3.0 * (100.0 + 2.0 * 14.0 + 20.0);
        assert_eq!(bytes, (expected, expected));
        // Caches that begin with 0, 795 and 397 positions.
        let test =
            Test::Decode { rows: 3, contexts: Contexts { first: 4, last: 800 }, steps: 10, limit: 1000 };
        let bytes = test.bytes(&plan, None);
        let positions = 0.0 + 795.0 + 397.0 + 3.0 * 4.5;
        let expected = 7000.0 + 2.0 * 8.0 * positions + 3.0 * (100.0 + 2.0 * 14.0 + 20.0);
        assert_eq!(bytes, (expected, expected));
        // Rows that see themselves and 99 positions, of the 0 to 9, 795 and more, and 397 and more that there are.
        let mut narrow = toy_plan();
        narrow.costs[2].kv_window = Some(100);
        let positions = 4.5 + 99.0 + 99.0;
        let expected = 7000.0 + 2.0 * 8.0 * positions + 3.0 * (100.0 + 2.0 * 14.0 + 20.0);
        assert_eq!(test.bytes(&narrow, None), (expected, expected));
        // Two passes: the weights twice, the one cache twice.
        let (must, does) = Test::Block { rows: 9, context: 50 }.bytes(&plan, None);
        assert_eq!(must, 7000.0 + 2.0 * 8.0 * 50.0 + 9.0 * 148.0);
        assert_eq!(does, 14000.0 + 4.0 * 8.0 * 50.0 + 9.0 * 148.0);
        // Steps of 16 rows and of 4, of which the second has one row of logits.
        let (must, does) = Test::Prompt { tokens: 20 }.bytes(&plan, None);
        assert_eq!(must, 2000.0 + 16.0 * 128.0 + 7000.0 + 2.0 * 8.0 * 16.0 + 4.0 * 128.0 + 20.0);
        // Three passes, and the head in all of them.
        let head = 20.0;
        assert_eq!(does, 21000.0 + 16.0 * 128.0 + head + 2.0 * 8.0 * 16.0 + 4.0 * 128.0 + head);
    }

    #[test]
    fn rounds_are_measured_where_steps_are() {
        let mut cases = Cases::of(&args("-n 64"), &toy_plan().limits, 8).unwrap();
        let forced = Forced::of(&args("--accept 3.5"), Some(8)).unwrap().unwrap();
        assert_eq!(forced, Forced { block: 8, accept: 3.5, launch: None });
        cases.add_rounds(&args("-n 64"), &toy_plan().limits, forced);
        let rounds = Test::Rounds { forced, context: 512, start: 480, tokens: 64 };
        assert_eq!(cases.tests[3..], [rounds]);
        assert_eq!((rounds.rows(&toy_plan()), rounds.tokens(), rounds.passes(&toy_plan())), (8, 3.5, 19));
        let mut plan = toy_plan();
        let program = || toy_program(&plan, &[], &plan.costs);
        plan.draft = Some(toy_draft(&plan, 8, [program(), program()], None));
        // Contexts of 512 positions; 4 rows injected without a head, 8 of the block with 7 guesses, 8 verified.
        let step = |rows: f64, logits: f64| 2000.0 + 2.0 * 8.0 * 512.0 + rows * 128.0 + logits * 20.0;
        let wanted = step(4.0, 0.0) + step(8.0, 7.0) + step(8.0, 8.0) + 2.0 * 5000.0;
        assert_eq!(rounds.bytes(&plan, None), (wanted, wanted));
        let without = Forced::of(&args("--accept 2"), None).unwrap_err().to_string();
        assert!(without.contains("plans with a draft"), "{without}");
        let part = |draft_s| Rounds {
            rounds: 2,
            tokens: 7,
            draft_s,
            verify_s: 4e-4,
            inject_s: 2e-5,
            ..Rounds::default()
        };
        let line = Line::new(&plan, rounds, vec![3e-4, 4e-4], None);
        let line = Line { rounds: vec![part(1e-4), part(3e-4)], ..line };
        let wanted =
            "a round behind 512: draft 100 us, verify 200 us, its context 10 us; 3.50 tokens a round ()\n";
        assert_eq!(line.split().as_deref(), Some(wanted));
        let launched =
            Rounds { rounds: 4, tokens: 9, histogram: vec![0, 3, 1], launch_s: 8e-4, ..Rounds::default() };
        let line = Line { rounds: vec![launched], ..line };
        assert_eq!(
            line.split().as_deref(),
            Some(
                "a round behind 512: 200 us, whole rounds in launches; 2.25 tokens a round (2: 75 %, 3: 25 %)\n"
            )
        );
    }

    fn report(plan: &Plan) -> Report<'_> {
        let decode = Test::Decode { rows: 2, contexts: Contexts::all(100), steps: 9, limit: 1000 };
        Report {
            sampling: args("--temperature 0.7 --top-k 40").chance.parameters(),
            plan,
            gpu: DeviceInfo {
                number: 0,
                name: "H200".into(),
                sms: 132,
                capability: (9, 0),
                memory: 1 << 30,
                shared_bytes: 0,
                cooperative: true,
                memory_rate: None,
                driver: (13, 0),
            },
            ceiling: Ceiling { bytes: 4000, passes: vec![2e-3, 1e-3, 4e-3] },
            lines: vec![Line::new(plan, decode, vec![4e-3, 6e-3, 5e-3], None)],
            memory: Breakdown { weights: 7000, kv: 10, kv_used: 0, arena: 1, scratch: 2, code: 3 },
        }
    }

    #[test]
    fn the_table_has_rates_and_shares() {
        let text = report(&toy_plan()).markdown();
        // 7000 + 2 x 2 x 8 x 100 + 2 x 148 = 10496 bytes; the ceiling is 4 MB/s.
        let line = text.lines().find(|line| line.starts_with("| decode")).unwrap();
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let expected = [
            "decode", "2", "100", "-", "5.0000", "1.0000", "400.0", "0.0000", "0", "52.5 %", "2.6240",
            "52.5 %",
        ];
        assert_eq!(cells, expected);
        assert!(text.contains("of 3 passes over 3.91 KiB"), "{text}");
        // One rank of several says that it is.
        let plan = Plan { shard: Some(Shard { rank: 3, ranks: 8 }), ..toy_plan() };
        assert!(report(&plan).markdown().starts_with("toy, rank 3 of 8, "), "{}", report(&plan).markdown());
        assert_eq!(report(&plan).json()["shard"], json!({"rank": 3, "ranks": 8}));
    }

    #[test]
    fn the_json_has_what_the_table_has() {
        let json = report(&toy_plan()).json();
        let test = &json["tests"][0];
        assert_eq!(
            (&test["rows"], &test["context"], &test["bytes"]),
            (&json!(2), &json!(100), &json!(10496.0))
        );
        assert_eq!(test["lengths"], json!([96, 96]));
        assert_eq!(context_json(Contexts { first: 1, last: 8192 }), json!("1..8192"));
        assert_eq!(
            (&test["seconds"]["median"], &test["samples_s"]),
            (&json!(5e-3), &json!([4e-3, 6e-3, 5e-3]))
        );
        let share = test["share_of_floor"].as_f64().unwrap();
        assert!((share - 10496.0 / 4e6 / 5e-3).abs() < 1e-12);
        assert_eq!(json["read_ceiling"]["best_bytes_per_s"], json!(4e6));
        assert_eq!(json["read_ceiling"]["median_bytes_per_s"], json!(2e6));
        assert_eq!(json["gpu_memory_bytes"]["other"], json!(3));
    }
}
