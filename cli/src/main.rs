//! The `tilec` command: compiles language models and runs them.
//!
//! Results go to stdout; notes, progress and logs go to stderr. See `tilec help`.

mod args;
mod ceiling;
mod commands;
mod host;
mod session;
mod source;
mod stats;
mod text;
mod ui;
mod writer;

use anyhow::Result;
use args::{Cli, Command};
use clap::{CommandFactory, Parser};
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    end_quietly_on_broken_pipes();
    let cli = Cli::parse();
    if cli.quiet {
        ui::be_quiet();
    }
    log(cli.verbose);
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", message(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Compile(args) => commands::compile::run(args),
        Command::Run(args) => commands::run::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Profile(args) => commands::profile::run(args),
        Command::Logits(args) => commands::logits::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Selftest(args) => commands::selftest::run(args),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "tilec", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// Lets a reader such as `head` close the pipe: the system then ends the process without a word, as
/// it does other commands. (Rust programs otherwise see an error at the next line printed.)
fn end_quietly_on_broken_pipes() {
    // SAFETY: called first in `main`, before there are other threads; installs no handler of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Sends logs to stderr: warnings, and more with each `-v`. `TILEC_LOG` overrides.
fn log(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    let filter = EnvFilter::try_from_env("TILEC_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .init();
}

/// An error with its causes. Many errors quote their cause already: what was said is not repeated.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str("\n  because: ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn causes_are_said_once() {
        let error = Err::<(), _>(anyhow!("no such file"))
            .context("x.gguf: no such file")
            .context("cannot open the checkpoint")
            .unwrap_err();
        assert_eq!(message(&error), "cannot open the checkpoint\n  because: x.gguf: no such file");
    }
}
