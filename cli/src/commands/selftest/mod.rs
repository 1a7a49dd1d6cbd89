//! `tilec selftest`: whole small models on the GPU, against the interpreter and against themselves.

mod cases;
mod checks;
mod compare;
mod drafts;
mod long;
mod pairs;
mod prepare;
mod scaled;
#[cfg(test)]
mod tests;

use crate::args::SelftestArgs;
use crate::ui::{self, Align, Table};
use anyhow::{Context, Result, bail};
use cases::Case;
use checks::{After, Outcome};
use long::{LONG, Long};
use pairs::{PAIRS, Pair};
use prepare::{Prepared, prepare};
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tilec_codegen::nvrtc::{Arch, Nvrtc};
use tilec_ir::spec;
use tilec_runtime::cuda::{self, DeviceInfo};
use tilec_runtime::engine::{Engine, EngineOptions};

/// Cases of a whole run, and of a quick one. Ten have all families, formats and groups of heads.
const CASES: [usize; 2] = [cases::CASES, 10];

/// Trained pairs of a model and its draft, whole and quick.
const TRAINED: [usize; 2] = [PAIRS.len(), 1];

/// A model that is checked as a whole: on an engine, with no reference of its own.
#[derive(Clone, Copy)]
enum Whole {
    Pair(&'static Pair),
    Long(&'static Long),
}

impl Whole {
    /// All of them, or some for a quick run.
    fn all(quick: bool) -> impl Iterator<Item = Whole> {
        let pairs = PAIRS.iter().take(TRAINED[usize::from(quick)]).map(Whole::Pair);
        pairs.chain(LONG.iter().map(Whole::Long))
    }

    const fn name(self) -> &'static str {
        match self {
            Whole::Pair(pair) => pair.name,
            Whole::Long(long) => long.name,
        }
    }

    /// Compiles, loads and checks it.
    fn check(self, folder: &Path, arch: Arch, options: &EngineOptions, repeats: usize) -> (Outcome, After) {
        let target = (spec::Device::Cuda, arch.name());
        let checked = match self {
            Whole::Pair(pair) => pair.load(folder, target, options).map(|engine| pairs::check(pair, engine)),
            Whole::Long(long) => {
                long.load(folder, target, options).map(|engine| long::check(long, engine, repeats))
            }
        };
        checked.unwrap_or_else(|error| (failed(self.name(), "compiling and loading", &error), After::GoOn))
    }
}

/// Repeats of the check for races, whole and quick.
const REPEATS: [u64; 2] = [200, 20];

/// Checks the GPU: fails if anything is not as it should be.
pub fn run(args: &SelftestArgs) -> Result<()> {
    let quick = usize::from(args.quick);
    let repeats = args.repeats.unwrap_or(REPEATS[quick]) as usize;
    let mut cases: Vec<Case> = (0..CASES[quick]).map(|number| Case::new(args.seed, number)).collect();
    let mut wholes: Vec<Whole> = Whole::all(args.quick).collect();
    if let Some(only) = &args.only {
        cases.retain(|case| case.name.contains(only.as_str()));
        wholes.retain(|whole| whole.name().contains(only.as_str()));
        if cases.is_empty() && wholes.is_empty() {
            bail!("no case has {only:?} in its name; without --only all are listed");
        }
    }
    let gpu = find_gpu(args.device as usize)?;
    let arch = arch_for(&gpu)?;
    let nvrtc = Nvrtc::find()?;
    ui::note(format!("{gpu}; NVRTC {} for {arch}", nvrtc.version()));

    let options = EngineOptions {
        device: args.device as usize,
        patience: Duration::from_secs(args.patience),
        ..EngineOptions::default()
    };
    let start = Instant::now();
    let outcomes = match &args.keep {
        Some(folder) => all((&cases, &wholes), folder, arch, &options, repeats),
        None => {
            let folder = tempfile::tempdir().context("cannot make a temporary folder; set TMPDIR")?;
            all((&cases, &wholes), folder.path(), arch, &options, repeats)
        }
    };
    print(args, &gpu, arch, &outcomes)?;
    let failed = outcomes.iter().filter(|outcome| outcome.problem.is_some()).count();
    ui::note(format!(
        "{} checks of {} cases in {:.0} s",
        outcomes.len(),
        cases.len() + wholes.len(),
        start.elapsed().as_secs_f64()
    ));
    match failed {
        0 => Ok(()),
        1 => bail!("a check failed"),
        failed => bail!("{failed} checks failed"),
    }
}

/// The GPU to check.
fn find_gpu(number: usize) -> Result<DeviceInfo> {
    let mut gpus = cuda::devices()?;
    match gpus.len() {
        0 => bail!("selftest checks NVIDIA GPUs, and the driver shows none: look at nvidia-smi"),
        count if number >= count => bail!("--device {number}: the driver shows {count} GPUs, from 0"),
        _ => Ok(gpus.swap_remove(number)),
    }
}

/// The best architecture that code can be made for and this GPU runs.
fn arch_for(gpu: &DeviceInfo) -> Result<Arch> {
    let runs = |arch: &&Arch| cuda::runs_on(arch.name(), gpu.capability) == Some(true);
    let found = Arch::ALL.iter().rev().find(runs).copied();
    found.with_context(|| {
        let known: Vec<&str> = Arch::ALL.iter().map(|arch| arch.name()).collect();
        format!("no kernel can be compiled for {gpu}: there are {}", known.join(", "))
    })
}

/// Runs all cases. They are prepared by as many threads as there are cores, and run one after the other. Then
/// what is checked as a whole.
fn all(
    (cases, wholes): (&[Case], &[Whole]),
    folder: &Path,
    arch: Arch,
    options: &EngineOptions,
    repeats: usize,
) -> Vec<Outcome> {
    let (next, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(cases.len());
    let mut outcomes: Vec<(usize, Vec<Outcome>)> = Vec::new();
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::channel::<(usize, Result<Prepared>)>();
        for _ in 0..threads {
            let (send, next, over) = (send.clone(), &next, &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(number) else { return };
                    let prepared = prepare(case, &folder.join(format!("case{number}")), arch.name());
                    if send.send((number, prepared)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(send);
        for (count, (number, prepared)) in receive.iter().enumerate() {
            let case = &cases[number];
            ui::note(format!("{} of {}: {}", count + 1, cases.len() + wholes.len(), case.name));
            let mut of_case = Vec::new();
            let after = one(case, prepared, options, repeats, &mut of_case);
            report(&of_case);
            outcomes.push((number, of_case));
            if after == After::GiveUp {
                over.store(true, Ordering::Relaxed);
                ui::note(GIVEN_UP);
                break;
            }
        }
    });
    for (number, whole) in wholes.iter().enumerate() {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let number = cases.len() + number;
        ui::note(format!("{} of {}: {}", number + 1, cases.len() + wholes.len(), whole.name()));
        let folder = folder.join(format!("case{number}"));
        let (outcome, after) = whole.check(&folder, arch, options, repeats);
        let of_whole = vec![outcome];
        report(&of_whole);
        outcomes.push((number, of_whole));
        if after == After::GiveUp {
            over.store(true, Ordering::Relaxed);
            ui::note(GIVEN_UP);
        }
    }
    // They come as they are prepared; the report is always in the same order.
    outcomes.sort_by_key(|(number, _)| *number);
    outcomes.into_iter().flat_map(|(_, of_case)| of_case).collect()
}

const GIVEN_UP: &str = "the GPU cannot be used any more by this process: the other cases are left out";

/// Says at once what is wrong.
fn report(outcomes: &[Outcome]) {
    for outcome in outcomes {
        if let Some(problem) = &outcome.problem {
            ui::note(format!("  FAIL {}: {problem}", outcome.what));
        }
    }
}

/// What could not be checked.
fn failed(case: &str, what: &'static str, error: &anyhow::Error) -> Outcome {
    Outcome {
        case: case.into(),
        rows: 0,
        what,
        error: None,
        worst: None,
        bound: None,
        problem: Some(format!("{error:#}")),
    }
}

/// Loads a case and checks it.
fn one(
    case: &Case,
    prepared: Result<Prepared>,
    options: &EngineOptions,
    repeats: usize,
    outcomes: &mut Vec<Outcome>,
) -> After {
    let mut failed = |what, error: &anyhow::Error| {
        outcomes.push(failed(&case.name, what, error));
        After::GoOn
    };
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return failed("compilation", &error),
    };
    match Engine::load(&prepared.plan, options, &mut |_, _| {}) {
        Ok(mut engine) => checks::run(case, &prepared, &mut engine, repeats, outcomes),
        Err(error) => failed("loading", &error.into()),
    }
}

fn print(args: &SelftestArgs, gpu: &DeviceInfo, arch: Arch, outcomes: &[Outcome]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if args.json {
        let report = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"),
            "gpu": gpu.to_string(),
            "arch": arch.name(),
            "seed": args.seed,
            "failed": outcomes.iter().filter(|outcome| outcome.problem.is_some()).count(),
            "checks": outcomes,
        });
        writeln!(out, "{report:#}")?;
        return Ok(());
    }
    let columns = [
        ("case", Align::Left),
        ("rows", Align::Right),
        ("what", Align::Left),
        ("error", Align::Right),
        ("worst row", Align::Right),
        ("bound", Align::Right),
        ("verdict", Align::Left),
    ];
    let mut table = Table::new(&columns);
    let number = |value: Option<f64>| value.map(|value| format!("{value:.1e}")).unwrap_or_default();
    for outcome in outcomes {
        table.row([
            outcome.case.clone(),
            outcome.rows.to_string(),
            outcome.what.to_string(),
            number(outcome.error),
            number(outcome.worst),
            number(outcome.bound),
            outcome.problem.as_ref().map_or_else(|| "ok".into(), |problem| format!("FAIL: {problem}")),
        ]);
    }
    write!(out, "{}", table.text())?;
    Ok(())
}
