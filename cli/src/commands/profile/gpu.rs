//! The profile of a resident kernel: what each SM recorded of the last step of a launch.

use super::{kind_of, rounds};
use crate::args::ProfileArgs;
use crate::commands::bench::{
    Forced, decode_inputs, expert_layers, make_long, random_routing, random_tokens, resident_step_bytes,
};
use crate::stats::Spread;
use crate::ui::{Align, Table};
use crate::{ceiling, session, ui};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;
use tilec_ir::cost::StageCost;
use tilec_ir::launch::TRACE_FIELDS;
use tilec_ir::plan::Plan;
use tilec_runtime::cuda::{ExpertCounts, RandomRouting};
use tilec_runtime::engine::Engine;

/// Steps of a launch; the last is traced, behind others that warm up.
const STEPS: usize = 16;

/// Losses that are named.
const LOSSES: usize = 3;

/// Measures the stages of one step.
pub fn run(args: &ProfileArgs, folder: &Path, plan: &Plan) -> Result<()> {
    let (rows, context) = (args.rows as usize, args.context as usize);
    let limits = &plan.limits;
    if context >= limits.context {
        bail!(
            "--context {context} leaves no room in the {} positions of the plan: lower it, or compile with a \
             larger --ctx-size",
            limits.context
        );
    }
    if rows > limits.sequences {
        bail!(
            "--rows {rows} are more sequences than the {} of the plan: compile it with --sequences {rows}",
            limits.sequences
        );
    }
    let routing = random_routing(args.routing, plan)?;
    let bandwidth = match ceiling::gpu_read_ceiling(&plan.target.arch) {
        Ok((_, ceiling)) => Some(ceiling.best()),
        Err(error) => {
            ui::note(format!("the memory was not measured: {error:#}"));
            None
        }
    };
    let draft = plan.draft.as_ref().filter(|_| !args.draft.no_draft);
    let forced = Forced::new(args.accept, &args.draft, draft.map(|draft| draft.block))?;
    let mut engine = session::load(folder, &args.weights, true, draft.is_some())?;
    let most = engine.max_decode_rows();
    if rows > most {
        bail!("--rows {rows} are more than the {most} rows of a step of this plan's kernel: lower it");
    }
    let bandwidth = bandwidth.or(engine.memory_rate());
    let bandwidth = bandwidth.context("the driver does not say how fast the GPU's memory is")?;
    let mut launches = Vec::new();
    let mut counts = Vec::new();
    for launch in 0..=args.repeats {
        engine.set_routing(routing.map(|routing| RandomRouting { seed: launch as u32, ..routing }));
        engine.take_expert_counts();
        let traced = trace(&mut engine, rows, context)?;
        // The first finds cold caches and low clocks.
        if launch > 0 {
            launches.push(traced);
            counts.extend(engine.take_expert_counts());
        }
    }
    // On average over all steps of the launches, of which the last are traced.
    let choices = launches.len() * steps_of(context) * expert_layers(plan);
    let each = |of: fn(&ExpertCounts) -> u32| {
        let sum = counts.iter().map(|counts| u64::from(of(counts))).sum::<u64>();
        (sum > 0 && choices > 0).then(|| sum as f64 / choices as f64)
    };
    let (distinct, foreseen) = (each(|counts| counts.chosen), each(|counts| counts.foreseen));
    let foreseen = foreseen.map(|foreseen| (foreseen, each(|counts| counts.wrong).unwrap_or(0.0)));
    let profile = Profile { plan, rows, context, bandwidth, distinct, foreseen, launches };
    let rounds = match draft.zip(forced) {
        Some(draft) => rounds::measure(args, &mut engine, plan, draft, bandwidth)?,
        None => None,
    };
    if let Some(path) = &args.output {
        let mut events = profile.events(args.sms as usize);
        events.extend(rounds.iter().flat_map(|rounds| rounds.events(args.sms as usize)));
        let trace = json!({ "displayTimeUnit": "ns", "traceEvents": events }).to_string();
        std::fs::write(path, trace).with_context(|| format!("cannot write {}", path.display()))?;
        ui::note(format!("trace of the last step -> {}", path.display()));
    }
    let text = match args.json {
        true => {
            let mut json = profile.json();
            if let Some(rounds) = &rounds {
                json["rounds"] = rounds.json();
            }
            format!("{json:#}\n")
        }
        false => {
            let rounds = rounds.as_ref().map_or(String::new(), |rounds| format!("\n{}", rounds.text()));
            format!("{}{rounds}", profile.text())
        }
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Steps of a launch whose last one is behind `context` positions.
fn steps_of(context: usize) -> usize {
    context + 1 - context.saturating_sub(STEPS - 1)
}

/// Decodes some steps of which the last is behind `context` positions.
fn trace(engine: &mut Engine, rows: usize, context: usize) -> Result<Launch> {
    let steps = steps_of(context);
    let start = context + 1 - steps;
    for sequence in 0..rows {
        make_long(engine, sequence, context + 1)?;
    }
    let inputs = decode_inputs(&vec![start; rows], &random_tokens(rows, engine.plan().vocab));
    let begin = Instant::now();
    let done = engine.decode(&inputs, steps, &[], &mut |_, _, _| ControlFlow::Continue(()))?;
    let seconds = begin.elapsed().as_secs_f64() / steps as f64;
    if done != steps {
        bail!("the kernel ended after {done} of {steps} steps, which nobody asked for");
    }
    let times = engine.profile().context("the engine was loaded without a profile")?.to_vec();
    Launch::new(times, engine.plan().stages.len(), seconds)
}

/// What was recorded of the last step of a launch, or of the steps of its last round.
pub(super) struct Launch {
    /// `[SMs][stages][began to wait, could start, published]`, in nanoseconds.
    times: Vec<[u64; TRACE_FIELDS]>,
    /// Of all steps.
    stages: usize,
    /// The stages behind which a step ends, by number.
    last: Vec<usize>,
    /// Of a step, or of a round, seen from the host, on average over the launch.
    pub host_seconds: f64,
}

/// What a stage took, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Took {
    /// From the moment that an SM could start to the one at which its part was published; the median
    /// of the SMs.
    pub work: f64,
    /// From the moment at which an SM's part of the stage before was published to the one at which it
    /// could start; the mean of the SMs.
    pub wait: f64,
    /// From the moment that the SMs could start this stage to that at which they could start the next,
    /// on average, or at which all of a step's last stage was published: the paths of all stages are the step.
    pub path: f64,
}

impl Launch {
    fn new(times: Vec<u64>, stages: usize, host_seconds: f64) -> Result<Launch> {
        Launch::of_steps(times, &[stages], host_seconds)
    }

    /// The record of steps of so many stages each.
    pub(super) fn of_steps(times: Vec<u64>, steps: &[usize], host_seconds: f64) -> Result<Launch> {
        let stages: usize = steps.iter().sum();
        let (records, rest) = times.as_chunks::<TRACE_FIELDS>();
        if stages == 0 || records.is_empty() || !rest.is_empty() || !records.len().is_multiple_of(stages) {
            bail!("the kernel's record of {} times is not one of {stages} stages", times.len());
        }
        let last = steps.iter().scan(0, |sum, stages| {
            *sum += stages;
            Some(*sum - 1)
        });
        let launch = Launch { times: records.to_vec(), stages, last: last.collect(), host_seconds };
        for (number, [wait, start, end]) in launch.times.iter().enumerate() {
            if *wait == 0 || start < wait || end < start {
                bail!(
                    "SM {} has no times of stage {}: {wait}, {start}, {end}; please report this",
                    number / stages,
                    number % stages
                );
            }
        }
        Ok(launch)
    }

    pub(super) fn sms(&self) -> usize {
        self.times.len() / self.stages
    }

    /// The times of a stage, SM by SM.
    fn stage(&self, stage: usize) -> impl Iterator<Item = [u64; TRACE_FIELDS]> {
        self.times[stage..].iter().step_by(self.stages).copied()
    }

    /// When the step's first SM began.
    fn begin(&self) -> u64 {
        self.stage(0).map(|[_, start, _]| start).min().unwrap_or(0)
    }

    /// When all of a stage was published, from [`Launch::begin`].
    fn ended(&self, stage: usize) -> f64 {
        let begin = self.begin();
        let end = self.stage(stage).map(|[_, _, end]| end).max().unwrap_or(begin);
        end.saturating_sub(begin) as f64 * 1e-9
    }

    /// Mean time at which the SMs could start a stage, from [`Launch::begin`].
    fn started(&self, stage: usize) -> f64 {
        let begin = self.begin();
        let sum: u64 = self.stage(stage).map(|[_, start, _]| start.saturating_sub(begin)).sum();
        sum as f64 * 1e-9 / self.sms() as f64
    }

    fn took(&self, stage: usize) -> Took {
        let work = self.stage(stage).map(|[_, start, end]| (end - start) as f64 * 1e-9);
        let wait: u64 = self.stage(stage).map(|[wait, start, _]| start - wait).sum();
        Took {
            work: Spread::of(work).map_or(0.0, |spread| spread.median),
            wait: wait as f64 * 1e-9 / self.sms() as f64,
            path: match self.last.contains(&stage) {
                true => self.ended(stage) - self.started(stage),
                false => self.started(stage + 1) - self.started(stage),
            },
        }
    }

    /// From the moment that the SMs could start, on average, to the end.
    pub(super) fn step(&self) -> f64 {
        self.ended(self.stages - 1) - self.started(0)
    }

    /// From the end of a step, all of it published, to the moment that the SMs could start the next one.
    pub(super) fn gap(&self, step: usize) -> f64 {
        self.started(self.last[step] + 1) - self.ended(self.last[step])
    }
}

/// A kind of stage: all its runs in a step together, in seconds; medians over the launches.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Kind {
    pub name: String,
    pub runs: usize,
    /// What its bytes take at the read ceiling.
    pub predicted: f64,
    pub took: Took,
}

impl Kind {
    /// What the step would be shorter by if this took what is predicted.
    pub fn lost(&self) -> f64 {
        self.took.path - self.predicted
    }

    pub fn json(&self) -> Value {
        json!({
            "stage": self.name,
            "runs": self.runs,
            "predicted_s": self.predicted,
            "measured_s": self.took.path,
            "lost_s": self.lost(),
            "work_s": self.took.work,
            "wait_s": self.took.wait,
        })
    }
}

/// What is measured of kinds of stages.
pub(super) const COLUMNS: [(&str, Align); 8] = [
    ("stage", Align::Left),
    ("runs", Align::Right),
    ("predicted µs", Align::Right),
    ("measured µs", Align::Right),
    ("lost µs", Align::Right),
    ("share", Align::Right),
    ("work µs", Align::Right),
    ("wait µs", Align::Right),
];

/// Cells of a kind, or of several together, in `whole` seconds.
pub(super) fn cells(name: &str, kinds: &[Kind], whole: f64) -> [String; 8] {
    let sum = |part: &dyn Fn(&Kind) -> f64| kinds.iter().map(part).sum::<f64>();
    [
        name.to_string(),
        kinds.iter().map(|kind| kind.runs).sum::<usize>().to_string(),
        micros(sum(&|kind| kind.predicted)),
        micros(sum(&|kind| kind.took.path)),
        micros(sum(&Kind::lost)),
        percent(sum(&|kind| kind.took.path), whole),
        micros(sum(&|kind| kind.took.work)),
        micros(sum(&|kind| kind.took.wait)),
    ]
}

/// The kinds of some stages, of which the launches' record has the first at number `first`, in the order of their
/// first run. `predict` says how many seconds the bytes of a kind's costs take.
pub(super) fn kinds_of<'a>(
    stages: &[String],
    first: usize,
    launches: impl Iterator<Item = &'a Launch>,
    predict: &dyn Fn(&str) -> f64,
) -> Vec<Kind> {
    let mut names: Vec<&str> = Vec::new();
    let mut number = BTreeMap::new();
    let of_stage: Vec<usize> = (stages.iter().map(|stage| kind_of(stage)))
        .map(|name| {
            *number.entry(name).or_insert_with(|| {
                names.push(name);
                names.len() - 1
            })
        })
        .collect();
    // What each kind took in each launch.
    let sums: Vec<Vec<Took>> = launches
        .map(|launch| {
            let mut sums = vec![Took::default(); names.len()];
            for (stage, kind) in of_stage.iter().enumerate() {
                let (sum, took) = (&mut sums[*kind], launch.took(first + stage));
                sum.work += took.work;
                sum.wait += took.wait;
                sum.path += took.path;
            }
            sums
        })
        .collect();
    let kind = |(number, name): (usize, &&str)| {
        let of = |part: &dyn Fn(&Took) -> f64| median(sums.iter().map(|sums| part(&sums[number])));
        Kind {
            name: name.to_string(),
            runs: of_stage.iter().filter(|kind| **kind == number).count(),
            predicted: predict(name),
            took: Took {
                work: of(&|took| took.work),
                wait: of(&|took| took.wait),
                path: of(&|took| took.path),
            },
        }
    };
    names.iter().enumerate().map(kind).collect()
}

/// A launch's stages in Chrome's trace format, in microseconds from its beginning; a line for each of so many SMs at
/// equal distances, in the process `group`.
pub(super) fn events_of(
    launch: &Launch,
    stages: &[String],
    lines: usize,
    (number, group): (usize, &str),
) -> Vec<Value> {
    let begin = launch.begin();
    let lines = lines.clamp(1, launch.sms());
    let mut events = vec![json!({
        "ph": "M", "name": "process_name", "pid": number, "args": { "name": group },
    })];
    for line in 0..lines {
        let sm = line * launch.sms() / lines;
        events.push(json!({
            "ph": "M", "name": "thread_name", "pid": number, "tid": sm,
            "args": { "name": format!("SM {sm}") },
        }));
        let mut slice = |name: &str, category: &str, from: u64, to: u64| {
            let micros = |ns: u64| ns as f64 * 1e-3;
            events.push(json!({
                "ph": "X", "name": name, "cat": category, "pid": number, "tid": sm,
                "ts": micros(from.saturating_sub(begin)), "dur": micros(to - from),
            }));
        };
        let records = &launch.times[sm * launch.stages..][..launch.stages];
        for (name, [wait, start, end]) in stages.iter().zip(records) {
            if start > wait {
                slice("wait", "wait", *wait, *start);
            }
            slice(name, kind_of(name), *start, *end);
        }
    }
    events
}

struct Profile<'a> {
    plan: &'a Plan,
    rows: usize,
    context: usize,
    /// Bytes per second.
    bandwidth: f64,
    /// Experts of a layer whose weights a step reads.
    distinct: Option<f64>,
    /// Experts that are foreseen in a layer, and those of them that no row chose.
    foreseen: Option<(f64, f64)>,
    launches: Vec<Launch>,
}

pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    Spread::of(values).map_or(0.0, |spread| spread.median)
}

pub(super) fn micros(seconds: f64) -> String {
    format!("{:.1}", seconds * 1e6)
}

pub(super) fn percent(part: f64, whole: f64) -> String {
    match part / whole {
        share if share.is_finite() => format!("{:.1} %", 100.0 * share),
        _ => String::new(),
    }
}

impl Profile<'_> {
    /// The kinds in the order of their first run.
    fn kinds(&self) -> Vec<Kind> {
        let predict = |name: &str| {
            let costs: Vec<_> = self.plan.costs.iter().filter(|cost| cost.stage == name).cloned().collect();
            let caches = |cost: &StageCost| (self.rows as u64 * cost.kv_bytes(self.context)) as f64;
            resident_step_bytes(&costs, self.distinct, 1, self.rows, &caches, self.rows) / self.bandwidth
        };
        kinds_of(&self.plan.stages, 0, self.launches.iter(), &predict)
    }

    fn step(&self) -> f64 {
        median(self.launches.iter().map(Launch::step))
    }

    fn host_step(&self) -> f64 {
        median(self.launches.iter().map(|launch| launch.host_seconds))
    }

    fn sms(&self) -> usize {
        self.launches.first().map_or(0, Launch::sms)
    }

    /// The kinds that lose most, the worst first.
    fn losses(kinds: &[Kind]) -> Vec<&Kind> {
        let mut kinds: Vec<&Kind> = kinds.iter().filter(|kind| kind.lost() > 0.0).collect();
        kinds.sort_by(|one, other| other.lost().total_cmp(&one.lost()));
        kinds.truncate(LOSSES);
        kinds
    }

    fn text(&self) -> String {
        let mut table = Table::new(&COLUMNS);
        let kinds = self.kinds();
        let step = self.step();
        for kind in &kinds {
            table.row(cells(&kind.name, std::slice::from_ref(kind), step));
        }
        let predicted = kinds.iter().map(|kind| kind.predicted).sum::<f64>();
        table.row(cells("sum", &kinds, step));
        let mut text = format!(
            "{}\n{} row(s) behind {} positions, {} SMs: the step {} µs, {} of its floor of {} µs; {} µs a step seen \
             from the host, tracing included.\n\
             predicted: bytes at {:.0} GB/s. measured: until the SMs could start the next stage, on average; this \
             adds up to the step. work: until an SM's part was published, median of the SMs. wait: from there until \
             it could start the next, counted with the stage that it waits for; mean of the SMs. Medians of {} \
             launches.\n",
            table.text(),
            self.rows,
            self.context,
            self.sms(),
            micros(step),
            percent(predicted, step),
            micros(predicted),
            micros(self.host_step()),
            self.bandwidth / 1e9,
            self.launches.len(),
        );
        if let Some(distinct) = self.distinct {
            text.push_str(&format!("experts: a step reads those of {distinct:.1} in each layer"));
            if let Some((foreseen, wrong)) = self.foreseen {
                text.push_str(&format!(
                    ", and began with {foreseen:.1} before they were chosen, of which {wrong:.2} were not"
                ));
            }
            text.push_str(".\n");
        }
        for (number, kind) in Profile::losses(&kinds).into_iter().enumerate() {
            text.push_str(&format!(
                "loss {}: {}, {} µs beyond its bytes in {} run(s), {:.2} µs each: {} of the step\n",
                number + 1,
                kind.name,
                micros(kind.lost()),
                kind.runs,
                kind.lost() * 1e6 / kind.runs.max(1) as f64,
                percent(kind.lost(), step),
            ));
        }
        text
    }

    fn json(&self) -> Value {
        let kinds = self.kinds();
        let losses = Profile::losses(&kinds);
        let losses = losses.iter().map(|kind| json!({ "stage": kind.name, "lost_s": kind.lost() }));
        let losses: Vec<_> = losses.collect();
        let kinds = kinds.iter().map(Kind::json);
        json!({
            "model": self.plan.name,
            "shard": self.plan.shard,
            "sms": self.sms(),
            "rows": self.rows,
            "context": self.context,
            "bandwidth_bytes_per_s": self.bandwidth,
            "distinct_experts": self.distinct,
            "foreseen_experts": self.foreseen.map(|(foreseen, _)| foreseen),
            "wrongly_foreseen_experts": self.foreseen.map(|(_, wrong)| wrong),
            "launches": self.launches.len(),
            "step_s": self.step(),
            "host_step_s": self.host_step(),
            "stages": kinds.collect::<Vec<_>>(),
            "losses": losses,
        })
    }

    /// The last launch's step for a trace.
    fn events(&self, lines: usize) -> Vec<Value> {
        let last = self.launches.last();
        last.map_or(Vec::new(), |launch| events_of(launch, &self.plan.stages, lines, (0, "step")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::toy_plan;

    /// Two SMs, stages of 1, 2, ... 6 µs and 100 ns (SM 0) or 300 ns (SM 1) of waiting before all but
    /// the first, which SM 1 begins 200 ns late. All begin at their step's `begin`.
    fn launch(begin: u64) -> Launch {
        let mut times = Vec::new();
        for sm in 0..2u64 {
            let mut now = begin + 200 * sm;
            for stage in 0..6u64 {
                let start = now + if stage > 0 { 100 + 200 * sm } else { 0 };
                let end = start + 1000 * (stage + 1);
                times.extend([now, start, end]);
                now = end;
            }
        }
        Launch::new(times, 6, 3e-5).unwrap()
    }

    fn profile(plan: &Plan) -> Profile<'_> {
        let launches = vec![launch(5000), launch(70_000)];
        Profile { plan, rows: 2, context: 100, bandwidth: 1e9, distinct: None, foreseen: None, launches }
    }

    fn close(one: f64, other: f64) {
        assert!((one - other).abs() < 1e-12, "{one} is not {other}");
    }

    #[test]
    fn the_paths_of_the_stages_add_up_to_the_step() {
        let launch = launch(5000);
        assert_eq!(launch.sms(), 2);
        // SM 1's last stage ends last: 200 + 21 µs of work + 5 x 300 of waiting; the mean start is 100.
        close(launch.step(), 22.6e-6);
        close((0..6).map(|stage| launch.took(stage).path).sum(), launch.step());
        let took = launch.took(1);
        close(took.work, 2e-6);
        close(took.wait, 0.2e-6);
        // Two microseconds of work, then on average 200 ns of waiting for the next stage.
        close(took.path, 2.2e-6);
    }

    #[test]
    fn layers_are_added_up_and_the_bytes_are_predicted() {
        let plan = toy_plan();
        let kinds = profile(&plan).kinds();
        let names: Vec<(&str, usize)> = kinds.iter().map(|kind| (kind.name.as_str(), kind.runs)).collect();
        assert_eq!(names, [("embed", 1), ("qkv", 2), ("attn", 2), ("head", 1)]);
        // Two runs of 1000 bytes of weights and 10 a row, at a byte a nanosecond.
        close(kinds[1].predicted, 2.0 * 1020e-9);
        close(kinds[2].predicted, 2.0 * (2.0 * 8.0 * 100.0 + 2.0 * 4.0) * 1e-9);
        close(kinds[1].took.work, 6e-6);
        close(kinds[1].took.path, 6.4e-6);
        close(kinds[1].lost(), 6.4e-6 - 2.04e-6);
        close(kinds.iter().map(|kind| kind.took.path).sum(), 22.6e-6);
    }

    #[test]
    fn experts_that_were_foreseen_are_named_beside_those_that_were_read() {
        let plan = toy_plan();
        let of = |foreseen| Profile { distinct: Some(8.0), foreseen, ..profile(&plan) };
        assert!(of(None).text().contains("\nexperts: a step reads those of 8.0 in each layer.\n"));
        let text = of(Some((2.0, 0.031))).text();
        let said = "in each layer, and began with 2.0 before they were chosen, of which 0.03 were not.\n";
        assert!(text.contains(said), "{text}");
        let json = of(Some((2.0, 0.031))).json();
        assert_eq!(
            (&json["foreseen_experts"], &json["wrongly_foreseen_experts"]),
            (&2.0.into(), &0.031.into())
        );
    }

    #[test]
    fn the_table_sums_up_and_names_the_three_largest_losses() {
        let plan = toy_plan();
        let text = profile(&plan).text();
        let cells = |name: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).map(String::from).collect()
        };
        assert_eq!(cells("qkv"), ["qkv", "2", "2.0", "6.4", "4.4", "28.3 %", "6.0", "0.4"]);
        assert_eq!(cells("sum")[3..], ["22.6", "12.1", "100.0 %", "21.0", "1.0"]);
        let losses: Vec<&str> = text.lines().filter(|line| line.starts_with("loss ")).collect();
        // attn 8.4 - 3.216, qkv 6.4 - 2.04, head 6.6 - 5.04; the embedding loses least.
        assert_eq!(losses.len(), 3, "{text}");
        for (line, stage) in losses.iter().zip(["attn", "qkv", "head"]) {
            assert!(line.contains(&format!(": {stage},")), "{text}");
        }
        assert!(text.contains("2 SMs: the step 22.6 µs"), "{text}");
    }

    #[test]
    fn the_json_has_stages_and_losses() {
        let plan = toy_plan();
        let json = profile(&plan).json();
        assert_eq!((&json["sms"], &json["launches"]), (&json!(2), &json!(2)));
        assert_eq!(json["stages"].as_array().unwrap().len(), 4);
        close(json["stages"][1]["measured_s"].as_f64().unwrap(), 6.4e-6);
        assert_eq!(json["losses"][0]["stage"], "attn");
        close(json["step_s"].as_f64().unwrap(), 22.6e-6);
    }

    #[test]
    fn the_trace_has_a_line_for_each_chosen_sm() {
        let plan = toy_plan();
        let events = |lines| profile(&plan).events(lines);
        let one = events(1);
        // Two names, six stages, five waits.
        assert_eq!(one.len(), 13);
        assert!(one[1..].iter().all(|event| event["tid"] == json!(0)));
        let qkv = one.iter().find(|event| event["name"] == "l0.qkv").unwrap();
        assert_eq!((&qkv["ts"], &qkv["dur"], &qkv["cat"]), (&json!(1.1), &json!(2.0), &json!("qkv")));
        let both = events(9);
        assert_eq!(both.len(), 25);
        assert!(both.iter().any(|event| event["args"]["name"] == "SM 1"));
    }

    #[test]
    fn records_with_holes_are_refused() {
        let whole: Vec<u64> = launch(5000).times.concat();
        let refused = |times: Vec<u64>| Launch::new(times, 6, 1.0).map(|_| ()).unwrap_err().to_string();
        let mut hole = whole.clone();
        hole[3 * 7 + 2] = 0;
        assert!(refused(hole).contains("SM 1 has no times of stage 1"));
        assert!(refused(whole[..35].to_vec()).contains("not one of 6 stages"));
        assert!(refused(Vec::new()).contains("not one of 6 stages"));
    }
}
