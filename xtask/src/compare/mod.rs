//! `cargo xtask compare-llama-cpp`: tilec beside llama.cpp, on the same machine, model file and threads.

mod quiet;
mod speed;
mod stats;
mod text;

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::args::Args;
use crate::error::{Context, Error, Result};
use crate::{build, setup, shell};

/// Both engines, ready to be started.
struct Engines {
    /// The model file that both read.
    model: PathBuf,
    /// What `tilec` is given: a plan compiled from the same file, or the file itself.
    plan: PathBuf,
    /// The `tilec` command; `None` to look at llama.cpp alone.
    tilec: Option<PathBuf>,
    /// The folder of llama.cpp's library.
    library: PathBuf,
    threads: usize,
}

/// Compares speed, or with `--text` the greedy text.
///
/// # Errors
/// On bad arguments, when an engine fails, and with `--text` when texts differ by more than near ties.
pub fn main(mut args: Args) -> Result<()> {
    let text = args.flag("--text").then(|| text::Options::from(&mut args)).transpose()?;
    let speed = if text.is_none() { Some(speed::Options::from(&mut args)?) } else { None };
    let model = args.path("--model")?;
    let plan = args.path("--plan")?;
    let tilec = args.path("--tilec")?;
    let llama_cpp_only = args.flag("--llama-cpp-only");
    let threads = args.number("--threads", 2, 1)?;
    args.finish()?;

    let library = setup::llama_cpp()?;
    let model = model.map_or_else(setup::smollm2, Ok)?;
    let tilec = match tilec {
        _ if llama_cpp_only => None,
        Some(path) => Some(path),
        None => {
            setup::llvm()?;
            Some(build::tilec()?)
        }
    };
    let plan = plan.unwrap_or_else(|| model.clone());
    let engines = Engines { model, plan, tilec, library, threads };
    match (speed, text) {
        (Some(options), _) => speed::compare(&engines, &options),
        (None, Some(options)) => text::compare(&engines, &options),
        (None, None) => unreachable!("one of the two is chosen above"),
    }
}

impl Engines {
    /// The llama.cpp worker: this very program in another mode.
    fn llama_cpp(&self) -> Result<Command> {
        let this = std::env::current_exe().context(|| "cannot find this program's own file")?;
        let mut command = Command::new(this);
        command.arg("llama-cpp-worker").arg("--model").arg(&self.model).arg("--library").arg(&self.library);
        command.arg("--threads").arg(self.threads.to_string());
        Ok(command)
    }

    /// `tilec SUBCOMMAND PLAN --threads N`, or `None` when llama.cpp is looked at alone.
    fn tilec(&self, subcommand: &str) -> Option<Command> {
        let mut command = Command::new(self.tilec.as_ref()?);
        command.arg(subcommand).arg(&self.plan).arg("--threads").arg(self.threads.to_string());
        Some(command)
    }
}

/// A line about the machine, for the head of a report.
fn machine(threads: usize) -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or("unknown CPU", |(_, name)| name);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{name}, {cores} cores, {threads} threads each")
}

/// The file's name, for reports.
fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Runs an engine and returns what it printed.
fn printed(mut command: Command) -> Result<String> {
    shell::output(&mut command)
}

/// The spread of values that are known to exist.
fn spread(values: impl IntoIterator<Item = f64>) -> Result<stats::Spread> {
    stats::Spread::of(values).ok_or_else(|| Error::new("an engine measured nothing"))
}
