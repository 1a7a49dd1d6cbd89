//! The profile of rounds of a draft in one launch: the stages of the block, of the model's step and of the inject
//! of the last round, and what lies between them.

use super::gpu::{COLUMNS, Kind, Launch, cells, events_of, kinds_of, median, micros, percent};
use crate::args::ProfileArgs;
use crate::commands::bench::{Forced, pass_rows, random_tokens, resident_step_bytes};
use crate::ui::{self, Table};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::time::Instant;
use tilec_ir::cost::StageCost;
use tilec_ir::plan::{DraftPlan, Plan};
use tilec_runtime::engine::{BlockInput, Engine, RoundInput, RoundOptions};

/// Rounds of a short launch and of a long one, whose difference is rounds without a launch. The long one is traced.
const ROUNDS: [usize; 2] = [8, 24];

/// Rounds of each of some sequences.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Asked {
    /// Rows of a block, and tokens that a round adds.
    forced: Forced,
    sequences: usize,
    /// Positions of each before the last round.
    context: usize,
}

impl Asked {
    /// What options ask for, if the plan has room for it. `None`, and a note, where launches have no such rounds.
    fn of(args: &ProfileArgs, plan: &Plan, draft: &DraftPlan, forced: Forced) -> Result<Option<Asked>> {
        let sequences = args.rows as usize;
        let (rows, most) = (sequences * forced.block, pass_rows(plan));
        if draft.round.is_none() {
            ui::note(
                "rounds of this plan's draft do not fit into one kernel: only the model's step is profiled",
            );
            return Ok(None);
        }
        if rows > most.min(plan.limits.max_rows) {
            ui::note(format!(
                "blocks of {} rows of {sequences} sequence(s) are more than the {most} rows of a step: only the \
                 model's step is profiled; lower --rows or --draft-max, or compile with a larger --pass-rows",
                forced.block
            ));
            return Ok(None);
        }
        let asked = Asked { forced, sequences, context: args.context as usize };
        let end = asked.end(ROUNDS[1]);
        if end > plan.limits.context {
            bail!(
                "--context {}: rounds behind it reach position {end}, and the plan has {}: lower it, or compile \
                 with a larger --ctx-size",
                asked.context,
                plan.limits.context
            );
        }
        Ok(Some(asked))
    }

    /// Tokens that so many rounds add.
    fn added(&self, rounds: usize) -> usize {
        // As the kernel counts them.
        let thousandths = (self.forced.accept * 1000.0).round() as usize;
        (thousandths * rounds + 500) / 1000
    }

    /// Position of the first round.
    fn start(&self) -> usize {
        self.context.saturating_sub(self.added(ROUNDS[1] - 1))
    }

    /// Positions that so many rounds need.
    fn end(&self, rounds: usize) -> usize {
        self.start() + self.added(rounds) + self.forced.block
    }

    /// Rows of the model's step.
    fn rows(&self) -> usize {
        self.sequences * self.forced.block
    }

    /// Runs so many rounds; seconds.
    fn launch(&self, engine: &mut Engine, rounds: usize) -> Result<f64> {
        let (block, position) = (self.forced.block, self.start());
        for sequence in 0..self.sequences {
            // Also pages for all rounds: those that a launch takes would have to be zeroed first.
            engine.pretend_length(sequence, self.end(rounds))?;
        }
        let tokens = random_tokens(self.sequences, engine.plan().vocab);
        let input = |(sequence, token): (u32, &u32)| RoundInput {
            block: BlockInput {
                token: *token,
                position: position as u32,
                sequence,
                rows: block,
                wanted: block - 1,
            },
            left: usize::MAX,
            limit: self.end(rounds),
        };
        let inputs: Vec<RoundInput> = (0..).zip(&tokens).map(input).collect();
        let options = RoundOptions { rounds, stop_tokens: &[], accept: Some(self.forced.accept) };
        let begin = Instant::now();
        let done = engine.rounds(&inputs, &[], options, &mut |_| ControlFlow::Continue(()))?;
        let seconds = begin.elapsed().as_secs_f64();
        if done != rounds {
            bail!("the kernel ended after {done} of {rounds} rounds, which nobody asked for");
        }
        Ok(seconds)
    }
}

/// A step of a round.
struct Step<'a> {
    name: &'static str,
    /// What its stages are called in front of their names.
    prefix: &'static str,
    stages: &'a [String],
    costs: &'a [StageCost],
    /// Rows with logits.
    logit_rows: usize,
    /// Whether it reads the caches.
    reads: bool,
}

/// The steps of a round, in their order.
fn steps<'a>(plan: &'a Plan, draft: &'a DraftPlan, asked: &Asked) -> [Step<'a>; 3] {
    let (rows, guesses) = (asked.rows(), asked.rows() - asked.sequences);
    let [block, inject] = [&draft.block_pass, &draft.inject];
    // Nobody takes taps in a round: the model's step leaves them where they are read.
    let round = draft.round.as_ref().map_or(0, |round| round.stages.len());
    let injected = round.saturating_sub(block.stages.len() + plan.stages.len());
    let inject_stages = &inject.stages[inject.stages.len().saturating_sub(injected)..];
    let step = |name, prefix, stages, costs, logit_rows, reads| Step {
        name,
        prefix,
        stages,
        costs,
        logit_rows,
        reads,
    };
    [
        step("block", "draft ", &block.stages[..], &block.costs[..], guesses, true),
        step("model", "", &plan.stages, &plan.costs, rows, true),
        step("inject", "inject ", inject_stages, &inject.costs, 0, false),
    ]
}

/// What was measured.
pub(super) struct Rounds<'a> {
    plan: &'a Plan,
    draft: &'a DraftPlan,
    asked: Asked,
    /// Bytes per second.
    bandwidth: f64,
    /// Each with the seconds of a round as the host sees it.
    launches: Vec<Launch>,
}

/// Measures rounds of as many sequences as asked for. `None`, and a note, where launches have no such rounds.
///
/// # Errors
/// When the plan has no room for them, or the engine fails.
pub(super) fn measure<'a>(
    args: &ProfileArgs,
    engine: &mut Engine,
    plan: &'a Plan,
    (draft, forced): (&'a DraftPlan, Forced),
    bandwidth: f64,
) -> Result<Option<Rounds<'a>>> {
    let Some(asked) = Asked::of(args, plan, draft, forced)? else { return Ok(None) };
    let stages = steps(plan, draft, &asked).map(|step| step.stages.len());
    let mut launches = Vec::new();
    for launch in 0..=args.repeats {
        let [short, long] = [asked.launch(engine, ROUNDS[0])?, asked.launch(engine, ROUNDS[1])?];
        let times = engine.profile().context("the engine was loaded without a profile")?.to_vec();
        let round = (long - short) / (ROUNDS[1] - ROUNDS[0]) as f64;
        let traced = Launch::of_steps(times, &stages, round)?;
        // The first finds cold caches and low clocks.
        if launch > 0 {
            launches.push(traced);
        }
    }
    Ok(Some(Rounds { plan, draft, asked, bandwidth, launches }))
}

/// A step's kinds of stages.
struct Part {
    name: &'static str,
    kinds: Vec<Kind>,
}

impl Part {
    fn sum(&self, of: impl Fn(&Kind) -> f64) -> f64 {
        self.kinds.iter().map(of).sum()
    }
}

/// What a round takes beside its stages, in seconds; medians over the launches.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Between {
    /// From the block's end to the model's step: guesses become its rows.
    guesses: f64,
    /// From the model's step to the inject: tokens are accepted and committed.
    accept: f64,
    /// From the inject to the next round's block: what the host sees of a round and was not traced. Negative where
    /// the round that was traced took longer than rounds do.
    next: f64,
}

impl Rounds<'_> {
    fn parts(&self) -> Vec<Part> {
        let Asked { sequences, context, .. } = self.asked;
        let rows = self.asked.rows();
        let mut first = 0;
        let mut parts = Vec::new();
        for step in steps(self.plan, self.draft, &self.asked) {
            let predict = |name: &str| {
                let costs: Vec<StageCost> =
                    step.costs.iter().filter(|cost| cost.stage == name).cloned().collect();
                let caches = |cost: &StageCost| match step.reads {
                    true => (sequences as u64 * cost.kv_bytes(context)) as f64,
                    false => 0.0,
                };
                resident_step_bytes(&costs, None, 1, rows, &caches, step.logit_rows) / self.bandwidth
            };
            let mut kinds = kinds_of(step.stages, first, self.launches.iter(), &predict);
            kinds.iter_mut().for_each(|kind| kind.name.insert_str(0, step.prefix));
            parts.push(Part { name: step.name, kinds });
            first += step.stages.len();
        }
        parts
    }

    /// Seconds of a round, seen from the host.
    fn round(&self) -> f64 {
        median(self.launches.iter().map(|launch| launch.host_seconds))
    }

    fn between(&self) -> Between {
        let of = |gap: usize| median(self.launches.iter().map(|launch| launch.gap(gap)));
        let next = self.launches.iter().map(|launch| launch.host_seconds - launch.step());
        Between { guesses: of(0), accept: of(1), next: median(next) }
    }

    /// Seconds of a round beyond the bytes of its inject that go into accepting, committing and injecting.
    fn overhead(&self, parts: &[Part]) -> f64 {
        let Between { accept, next, .. } = self.between();
        parts.last().map_or(0.0, |inject| inject.sum(Kind::lost)) + accept + next.max(0.0)
    }

    pub(super) fn text(&self) -> String {
        let (parts, round, between) = (self.parts(), self.round(), self.between());
        let mut table = Table::new(&COLUMNS);
        for part in &parts {
            for kind in &part.kinds {
                table.row(cells(&kind.name, std::slice::from_ref(kind), round));
            }
            table.row(cells(&format!("sum of the {}", part.name), &part.kinds, round));
        }
        let Asked { forced, sequences, context } = self.asked;
        let predicted: f64 = parts.iter().map(|part| part.sum(|kind| kind.predicted)).sum();
        let next = match between.next {
            next if next < 0.0 => {
                format!("not to be seen: the traced round took {} µs longer than rounds do", micros(-next))
            }
            next => format!("{} µs (what the host sees and was not traced)", micros(next)),
        };
        format!(
            "{}\nrounds of {sequences} sequence(s), blocks of {} rows, {} tokens added in each, behind {context} \
             positions, {} SMs: {} µs a round seen from the host, {} of its floor of {} µs; tracing included.\n\
             block to model {} µs; model to inject, where tokens are accepted and committed, {} µs; inject to the \
             next block {next}.\n\
             accept, commit and inject: {} µs a round beyond the bytes of the inject.\n\
             The last round of launches of {} is traced; a round seen from the host is what {} rounds more take. \
             Medians of {} launches.\n",
            table.text(),
            forced.block,
            forced.accept,
            self.launches.first().map_or(0, Launch::sms),
            micros(round),
            percent(predicted, round),
            micros(predicted),
            micros(between.guesses),
            micros(between.accept),
            micros(self.overhead(&parts)),
            ROUNDS[1],
            ROUNDS[1] - ROUNDS[0],
            self.launches.len(),
        )
    }

    pub(super) fn json(&self) -> Value {
        let (parts, between) = (self.parts(), self.between());
        let steps = parts.iter().map(|part| {
            json!({
                "step": part.name,
                "predicted_s": part.sum(|kind| kind.predicted),
                "measured_s": part.sum(|kind| kind.took.path),
                "stages": part.kinds.iter().map(Kind::json).collect::<Vec<_>>(),
            })
        });
        json!({
            "sequences": self.asked.sequences,
            "context": self.asked.context,
            "block": self.asked.forced.block,
            "accept": self.asked.forced.accept,
            "round_s": self.round(),
            "floor_s": parts.iter().map(|part| part.sum(|kind| kind.predicted)).sum::<f64>(),
            "steps": steps.collect::<Vec<_>>(),
            "block_to_model_s": between.guesses,
            "model_to_inject_s": between.accept,
            "inject_to_block_s": between.next,
            "accept_commit_inject_beyond_floor_s": self.overhead(&parts),
        })
    }

    /// The last launch's last round for a trace.
    pub(super) fn events(&self, lines: usize) -> Vec<Value> {
        let steps = steps(self.plan, self.draft, &self.asked);
        let names: Vec<String> = steps
            .iter()
            .flat_map(|step| step.stages.iter().map(|stage| format!("{}{stage}", step.prefix)))
            .collect();
        let last = self.launches.last();
        last.map_or(Vec::new(), |launch| events_of(launch, &names, lines, (1, "round")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use crate::commands::bench::{toy_draft, toy_plan, toy_program};
    use clap::Parser;

    /// The toy plan with a draft of blocks of 4 rows: the block has the stages of the model, the inject
    /// two, and one more where it is launched by itself.
    fn toy_round() -> Plan {
        let mut plan = toy_plan();
        let program = |stages: &[&str], costs: &[StageCost]| toy_program(&plan, stages, costs);
        let names: Vec<&str> = plan.stages.iter().map(String::as_str).collect();
        let block = program(&names, &plan.costs);
        // A product of 1000 bytes, and a context of 30 a row.
        let costs =
            [plan.costs[1].clone(), StageCost { weight_bytes: 0, ..plan.costs[0].clone() }].map(|cost| {
                StageCost {
                    runs: 1,
                    stage: if cost.weight_bytes > 0 { "fc" } else { "context" }.into(),
                    ..cost
                }
            });
        let inject = program(&["taps", "fc", "context"], &costs);
        let round = program(&[&names[..], &names[..], &["fc", "context"]].concat(), &[]);
        plan.draft = Some(toy_draft(&plan, 4, [inject, block], Some(round)));
        plan
    }

    fn asked(plan: &Plan, options: &str) -> Result<Option<Asked>, String> {
        let line = format!("tilec profile m {options}");
        let Command::Profile(args) = Cli::try_parse_from(line.split_whitespace()).unwrap().command else {
            panic!("{line}")
        };
        let draft = plan.draft.as_ref().unwrap();
        let forced =
            Forced::new(args.accept, &args.draft, Some(draft.block)).map_err(|error| error.to_string())?;
        Asked::of(&args, plan, draft, forced.unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn rounds_end_behind_the_context_that_was_asked_for() {
        let plan = toy_round();
        let some = asked(&plan, "--context 300 --accept 2.5 --rows 2").unwrap().unwrap();
        assert_eq!((some.forced.block, some.sequences, some.rows()), (4, 2, 8));
        // 23 rounds of 2.5 tokens come before the last one.
        assert_eq!((some.added(23), some.start(), some.end(24)), (58, 242, 242 + 60 + 4));
        assert_eq!(asked(&plan, "--context 10").unwrap().unwrap().start(), 0);
        assert_eq!(asked(&plan, "--rows 3"), Ok(None), "12 rows do not fit 8");
        assert_eq!(asked(&plan, "--rows 3 --draft-max 1").unwrap().unwrap().rows(), 6);
        assert!(asked(&plan, "--context 999").unwrap_err().contains("--ctx-size"));
        assert!(asked(&plan, "--accept 5").unwrap_err().contains("--accept 5"));
        let mut without = toy_round();
        without.draft.as_mut().unwrap().round = None;
        assert_eq!(asked(&without, ""), Ok(None));
    }

    /// Two SMs; every stage works for a microsecond and waits 100 ns for the next. SM 1 is 200 ns late. Between
    /// block and model are 3 µs, between model and inject 5.
    fn launch(host_seconds: f64) -> Launch {
        let mut times = Vec::new();
        for sm in 0..2u64 {
            let mut now = 10_000 + 200 * sm;
            for stage in 0..14 {
                now += match stage {
                    0 => 0,
                    6 => 3000,
                    12 => 5000,
                    _ => 100,
                };
                // The first stage of a step is not waited for.
                let wait = if [0, 6, 12].contains(&stage) { now } else { now - 100 };
                times.extend([wait, now, now + 1000]);
                now += 1000;
            }
        }
        Launch::of_steps(times, &[6, 6, 2], host_seconds).unwrap()
    }

    fn close(one: f64, other: f64) {
        assert!((one - other).abs() < 1e-12, "{one} is not {other}");
    }

    fn rounds(plan: &Plan) -> Rounds<'_> {
        let asked = asked(plan, "--context 100 --accept 2 --rows 1").unwrap().unwrap();
        let launches = vec![launch(29e-6), launch(30e-6), launch(31e-6)];
        Rounds { plan, draft: plan.draft.as_ref().unwrap(), asked, bandwidth: 1e9, launches }
    }

    #[test]
    fn stages_gaps_and_what_is_left_add_up_to_the_round() {
        let plan = toy_round();
        let rounds = rounds(&plan);
        let (parts, between) = (rounds.parts(), rounds.between());
        let names: Vec<&str> =
            parts.iter().flat_map(|part| &part.kinds).map(|kind| kind.name.as_str()).collect();
        let expected = [
            "draft embed",
            "draft qkv",
            "draft attn",
            "draft head",
            "embed",
            "qkv",
            "attn",
            "head",
            "inject fc",
            "inject context",
        ];
        assert_eq!(names, expected);
        // Ends are the later SM's, starts the average of both: 100 ns go from each gap to the step in front of it.
        close(between.guesses, 2.9e-6);
        close(between.accept, 4.9e-6);
        // 14 µs of work, 11 waits, both gaps, and the late end.
        let traced = 14e-6 + 1.1e-6 + 8e-6 + 0.1e-6;
        close(between.next, 30e-6 - traced);
        let paths: f64 = parts.iter().map(|part| part.sum(|kind| kind.took.path)).sum();
        close(paths + between.guesses + between.accept + between.next, rounds.round());
        close(parts[0].sum(|kind| kind.took.path), 6.6e-6);
    }

    #[test]
    fn bytes_are_those_of_the_rows_of_each_step() {
        let plan = toy_round();
        let rounds = rounds(&plan);
        let parts = rounds.parts();
        // Three guesses have logits in the block, all four rows in the model's step; the inject has no caches to read.
        let step = |logits: f64| 7000.0 + 2.0 * 8.0 * 100.0 + 4.0 * 128.0 + logits * 20.0;
        close(parts[0].sum(|kind| kind.predicted), step(3.0) * 1e-9);
        close(parts[1].sum(|kind| kind.predicted), step(4.0) * 1e-9);
        let inject = (1000.0 + 4.0 * 10.0 + 4.0 * 100.0) * 1e-9;
        close(parts[2].sum(|kind| kind.predicted), inject);
        // What the inject takes beyond them, the gap in front of it, and what was not traced.
        let between = rounds.between();
        let overhead = (2.2e-6 - inject) + between.accept + between.next;
        close(rounds.overhead(&parts), overhead);
        let json = rounds.json();
        close(json["accept_commit_inject_beyond_floor_s"].as_f64().unwrap(), overhead);
        close(json["steps"][2]["measured_s"].as_f64().unwrap(), 2.2e-6);
        close(json["floor_s"].as_f64().unwrap(), (step(3.0) + step(4.0)) * 1e-9 + inject);
        let text = rounds.text();
        let wanted = [
            "sum of the block",
            "inject context",
            "30.0 µs a round",
            "block to model 2.9 µs",
            "6.8 µs (what",
        ];
        for wanted in wanted {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        // A round that was traced takes longer now and then: that is no time saved.
        let late = Rounds { launches: vec![launch(20e-6)], ..rounds };
        close(late.overhead(&parts), (2.2e-6 - inject) + between.accept);
        assert!(late.text().contains("traced round took 3.2 µs longer"), "{}", late.text());
        let rounds = late;
        let events = rounds.events(1);
        assert!(events.iter().all(|event| event["pid"] == json!(1)));
        assert!(events.iter().any(|event| event["name"] == "draft l0.qkv"));
    }
}
