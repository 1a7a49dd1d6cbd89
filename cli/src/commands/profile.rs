//! `tilec profile`.

mod gpu;
mod rounds;

use crate::args::ProfileArgs;
use crate::commands::bench::random_tokens;
use crate::session::{self, Session};
use crate::stats::Spread;
use crate::ui::{Align, Table};
use crate::{ceiling, source, ui};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Instant;
use tilec_ir::plan::Plan;
use tilec_runtime::engine::PROFILE_FIELDS;

/// Measures the stages of one step.
pub fn run(args: &ProfileArgs) -> Result<()> {
    let (rows, context) = (args.rows as usize, args.context as usize);
    let (folder, plan) = source::plan(&args.model.path, &args.model.target)?;
    if plan.resident.is_some() {
        return gpu::run(args, &folder, &plan);
    }
    if rows > plan.limits.max_rows || context + rows > plan.limits.context {
        bail!(
            "{rows} rows behind {context} positions do not fit: the plan takes {} rows in a step and {} positions",
            plan.limits.max_rows,
            plan.limits.context
        );
    }
    let mut session = Session::new(session::load(&folder, &args.weights, true, false)?);
    let bandwidth = session.memory_rate().unwrap_or_else(|| {
        ui::note("measuring the memory bandwidth of this machine");
        ceiling::read_ceiling(ceiling::FAR_BYTES, plan.target.workers, 5)
    });
    let tokens = random_tokens(context + rows, plan.vocab);
    session.feed(&tokens[..context])?;
    // The first step warms the caches; it is the start of the clock, too.
    let steps = args.repeats as usize + 1;
    let mut clock = Clock::default();
    let mut measured = Vec::with_capacity(steps);
    for _ in 0..steps {
        session.rewind(context);
        let start = Instant::now();
        session.feed(&tokens[context..])?;
        let seconds = start.elapsed().as_secs_f64();
        let ticks = session.profile().context("the engine was loaded without a profile")?.to_vec();
        let step = Step { workers: session.workers(), stages: plan.stages.len(), ticks, seconds };
        clock.see(start, &step);
        measured.push(step);
    }
    let tick = session.tick_seconds().or_else(|| clock.seconds_per_tick());
    let tick = tick.context("the time-stamp counter stands still")?;
    let workers = session.workers();
    let profile = Profile { plan: &plan, workers, rows, context, bandwidth, tick, steps: &measured[1..] };
    if let Some(path) = &args.output {
        let trace = profile.trace().to_string();
        std::fs::write(path, trace).with_context(|| format!("cannot write {}", path.display()))?;
        ui::note(format!("trace of the last step -> {}", path.display()));
    }
    let text = if args.json { format!("{:#}\n", profile.json()) } else { profile.text() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What the engine recorded of a step.
struct Step {
    workers: usize,
    stages: usize,
    /// `[workers][stages][start, wait end, end]`.
    ticks: Vec<u64>,
    /// Of the whole step.
    seconds: f64,
}

/// One worker's time in one stage, in ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slice {
    worker: usize,
    stage: usize,
    start: u64,
    wait_end: u64,
    end: u64,
}

impl Step {
    /// The slices, without those of workers that had no share of a stage.
    fn slices(&self) -> impl Iterator<Item = Slice> {
        let stages = self.stages.max(1);
        let (records, _) = self.ticks.as_chunks::<PROFILE_FIELDS>();
        let slice = move |(number, [start, wait_end, end]): (usize, &[u64; PROFILE_FIELDS])| Slice {
            worker: number / stages,
            stage: number % stages,
            start: *start,
            wait_end: *wait_end,
            end: *end,
        };
        let sound =
            |slice: &Slice| slice.start > 0 && slice.start <= slice.wait_end && slice.wait_end <= slice.end;
        records.iter().take(self.workers * stages).enumerate().map(slice).filter(sound)
    }

    fn first_tick(&self) -> Option<u64> {
        self.slices().map(|slice| slice.start).min()
    }
}

/// Finds how long a tick is, from the first and the last step that it sees.
#[derive(Default)]
struct Clock {
    first: Option<(Instant, u64)>,
    last: Option<(Instant, u64)>,
}

impl Clock {
    fn see(&mut self, start: Instant, step: &Step) {
        let now = step.first_tick().map(|tick| (start, tick));
        self.first = self.first.or(now);
        self.last = now.or(self.last);
    }

    fn seconds_per_tick(&self) -> Option<f64> {
        let ((start, from), (end, to)) = self.first.zip(self.last)?;
        let ticks = to.checked_sub(from).filter(|ticks| *ticks > 0)?;
        Some((end - start).as_secs_f64() / ticks as f64)
    }
}

/// A kind of stage: all its runs in a step together, in seconds.
#[derive(Clone, Debug, PartialEq)]
struct Kind {
    name: String,
    runs: usize,
    /// What the bytes take at the measured bandwidth.
    floor: f64,
    /// Mean over the workers, median over the steps.
    work: f64,
    /// Mean over the workers, median over the steps.
    wait: f64,
}

struct Profile<'a> {
    plan: &'a Plan,
    workers: usize,
    rows: usize,
    context: usize,
    bandwidth: f64,
    /// Seconds.
    tick: f64,
    steps: &'a [Step],
}

/// The name of a stage without its layer: `qkv` of `l3.qkv`.
fn kind_of(stage: &str) -> &str {
    match stage.split_once('.') {
        Some((layer, kind))
            if layer.strip_prefix('l').is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())) =>
        {
            kind
        }
        _ => stage,
    }
}

impl Profile<'_> {
    /// The kinds in the order of their first run.
    fn kinds(&self) -> Vec<Kind> {
        let mut names: Vec<&str> = Vec::new();
        let mut number = BTreeMap::new();
        let mut runs = Vec::new();
        let of_stage: Vec<usize> = self
            .plan
            .stages
            .iter()
            .map(|stage| {
                let name = kind_of(stage);
                let kind = *number.entry(name).or_insert_with(|| {
                    names.push(name);
                    runs.push(0);
                    names.len() - 1
                });
                runs[kind] += 1;
                kind
            })
            .collect();
        // Per kind, the (work, wait) of each step.
        let mut times = vec![Vec::new(); names.len()];
        for step in self.steps {
            let mut sums = vec![(0u64, 0u64); names.len()];
            for slice in step.slices() {
                let sum = &mut sums[of_stage[slice.stage]];
                sum.0 += slice.end - slice.wait_end;
                sum.1 += slice.wait_end - slice.start;
            }
            let seconds = |ticks: u64| ticks as f64 * self.tick / step.workers.max(1) as f64;
            for (times, (work, wait)) in times.iter_mut().zip(sums) {
                times.push((seconds(work), seconds(wait)));
            }
        }
        let median = |values: &mut dyn Iterator<Item = f64>| Spread::of(values).map_or(0.0, |s| s.median);
        let kind = |(number, name): (usize, &&str)| {
            let costs = self.plan.costs.iter().filter(|cost| cost.stage == *name);
            let bytes: u64 = costs.map(|cost| cost.runs as u64 * cost.bytes(self.rows, self.context)).sum();
            Kind {
                name: name.to_string(),
                runs: runs[number],
                floor: bytes as f64 / self.bandwidth,
                work: median(&mut times[number].iter().map(|time| time.0)),
                wait: median(&mut times[number].iter().map(|time| time.1)),
            }
        };
        names.iter().enumerate().map(kind).collect()
    }

    fn step_seconds(&self) -> f64 {
        Spread::of(self.steps.iter().map(|step| step.seconds)).map_or(0.0, |spread| spread.median)
    }

    fn text(&self) -> String {
        let right = Align::Right;
        let mut table = Table::new(&[
            ("stage", Align::Left),
            ("runs", right),
            ("floor µs", right),
            ("work µs", right),
            ("wait µs", right),
            ("share", right),
            ("of floor", right),
        ]);
        let kinds = self.kinds();
        let whole: f64 = kinds.iter().map(|kind| kind.work + kind.wait).sum();
        let micros = |seconds: f64| format!("{:.1}", seconds * 1e6);
        let percent = |part: f64, whole: f64| match part / whole {
            share if share.is_finite() => format!("{:.1} %", 100.0 * share),
            _ => String::new(),
        };
        for kind in &kinds {
            table.row([
                kind.name.clone(),
                kind.runs.to_string(),
                micros(kind.floor),
                micros(kind.work),
                micros(kind.wait),
                percent(kind.work + kind.wait, whole),
                percent(kind.work, kind.floor).replace(" %", ""),
            ]);
        }
        let outside = (self.step_seconds() - whole).max(0.0);
        table.row(["(outside)".to_string(), String::new(), String::new(), String::new(), micros(outside)]);
        let sum = |part: &dyn Fn(&Kind) -> f64| kinds.iter().map(part).sum::<f64>();
        table.row([
            "total".to_string(),
            self.plan.stages.len().to_string(),
            micros(sum(&|kind| kind.floor)),
            micros(sum(&|kind| kind.work)),
            micros(sum(&|kind| kind.wait)),
            "100.0 %".to_string(),
            percent(sum(&|kind| kind.work), sum(&|kind| kind.floor)).replace(" %", ""),
        ]);
        format!(
            "{}\n{} row(s) behind {} positions, {} workers: {:.1} µs a step, {:.1} tokens/s.\n\
             floor: bytes at {:.1} GB/s. work and wait: mean of the workers, median of {} steps.\n\
             outside: waking and gathering the workers; the total is without it.\n\
             of floor: work in per cent of the floor; 100 is as fast as memory.\n",
            table.text(),
            self.rows,
            self.context,
            self.workers,
            self.step_seconds() * 1e6,
            self.rows as f64 / self.step_seconds(),
            self.bandwidth / 1e9,
            self.steps.len(),
        )
    }

    fn json(&self) -> Value {
        let kinds = self.kinds().into_iter().map(|kind| {
            json!({
                "stage": kind.name,
                "runs": kind.runs,
                "floor_s": kind.floor,
                "work_s": kind.work,
                "wait_s": kind.wait,
            })
        });
        json!({
            "model": self.plan.name,
            "workers": self.workers,
            "rows": self.rows,
            "context": self.context,
            "bandwidth_bytes_per_s": self.bandwidth,
            "steps": self.steps.len(),
            "step_s": self.step_seconds(),
            "stages": kinds.collect::<Vec<_>>(),
        })
    }

    /// The last step in Chrome's trace format: microseconds from its first tick.
    fn trace(&self) -> Value {
        let mut events = Vec::new();
        if let Some((step, zero)) = self.steps.last().and_then(|step| Some((step, step.first_tick()?))) {
            for worker in 0..step.workers {
                events.push(json!({
                    "ph": "M", "name": "thread_name", "pid": 0, "tid": worker,
                    "args": { "name": format!("worker {worker}") },
                }));
            }
            let mut slice = |worker: usize, name: &str, category: &str, from: u64, to: u64| {
                let micros = |ticks: u64| ticks as f64 * self.tick * 1e6;
                events.push(json!({
                    "ph": "X", "name": name, "cat": category, "pid": 0, "tid": worker,
                    "ts": micros(from.saturating_sub(zero)), "dur": micros(to - from),
                }));
            };
            for part in step.slices() {
                let name = self.plan.stages.get(part.stage).map_or("", String::as_str);
                if part.wait_end > part.start {
                    slice(part.worker, "wait", "wait", part.start, part.wait_end);
                }
                slice(part.worker, name, kind_of(name), part.wait_end, part.end);
            }
        }
        json!({ "displayTimeUnit": "ns", "traceEvents": events })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_not_part_of_a_kind() {
        assert_eq!([kind_of("l12.qkv"), kind_of("head"), kind_of("lx.y")], ["qkv", "head", "lx.y"]);
    }

    #[test]
    fn slices_know_their_worker_and_stage() {
        // Two workers, two stages; worker 1 has no share of stage 0.
        let ticks = vec![10, 11, 20, 20, 25, 30, 0, 0, 0, 12, 26, 31];
        let step = Step { workers: 2, stages: 2, ticks, seconds: 1.0 };
        let slices: Vec<Slice> = step.slices().collect();
        let slice = |worker, stage, start, wait_end, end| Slice { worker, stage, start, wait_end, end };
        assert_eq!(slices, [slice(0, 0, 10, 11, 20), slice(0, 1, 20, 25, 30), slice(1, 1, 12, 26, 31)]);
        assert_eq!(step.first_tick(), Some(10));
    }

    #[test]
    fn a_tick_is_found_from_two_steps() {
        let step = |tick| Step { workers: 1, stages: 1, ticks: vec![tick, tick, tick + 1], seconds: 1.0 };
        let start = Instant::now();
        let mut clock = Clock::default();
        clock.see(start, &step(1000));
        assert_eq!(clock.seconds_per_tick(), None);
        clock.see(start + std::time::Duration::from_secs(2), &step(5000));
        assert!((clock.seconds_per_tick().unwrap() - 0.0005).abs() < 1e-12);
    }
}
