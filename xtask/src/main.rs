//! Project tasks: `cargo xtask help`.

mod args;
mod build;
mod compare;
mod demo;
mod error;
mod llama_cpp;
mod memory;
mod setup;
mod shell;
mod wire;

use std::process::ExitCode;
use std::time::Instant;

use args::Args;
use error::{Error, Result};
use shell::Parts;

const HELP: &str = "\
Project tasks.

Usage: cargo xtask TASK [OPTIONS]

  setup [STEP...]     prepare this machine; without names: rust llvm smollm2 (also: llamacpp nvrtc)
  test                set up, then formatting, lints and all tests
  demo                set up, build tilec, let SmolLM2-135M-Instruct answer, and mimo-mini write code with its
                      draft and without, on a GPU as well if there is one
      --prompt TEXT      what to ask                     --max-tokens N     at most so many tokens (96)
      --threads N        threads (as many as cores)
  compare-llama-cpp   tilec beside llama.cpp: speed, or with --text every token of greedy texts
      --threads N        threads of each engine (2)      --model FILE       a GGUF file (SmolLM2)
      --pp N             prompt tokens (512)             --plan PATH        what tilec runs (the model file)
      --tg N             generated tokens (128)          --tilec FILE       the command (built if not given)
      --repeats N        quiet repeats, at least 5       --llama-cpp-only   leave tilec out
      --text             compare text                    --n N              tokens per prompt (64)
      --tie X            logits this close are tied (0.5)
  llama-cpp-worker    llama.cpp in its own process, printing JSON
      --model FILE, --threads N, --library DIR, --verbose, and one of:
      --pp N --tg N --repeats N        measure
      --greedy FILE --n N              generate for prompts given as lists of token ids
      --tokenize FILE                  token ids of a list of texts
  help                this text

Downloads are kept in TILEC_CACHE, else in ~/.cache/tilec.";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let task = args.next().unwrap_or_else(|| "help".into());
    let args = Args::new(args);
    let result = match task.as_str() {
        "setup" => set_up(args),
        "test" => test(args),
        "demo" => demo::main(args),
        "compare-llama-cpp" => compare::main(args),
        "llama-cpp-worker" => llama_cpp::worker::main(args),
        "help" | "--help" | "-h" => {
            println!("{HELP}");
            Ok(())
        }
        _ => Err(Error::new(format!("no task is called `{task}`\n\n{HELP}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn set_up(mut args: Args) -> Result<()> {
    let mut steps = args.positional();
    args.finish()?;
    if steps.is_empty() {
        steps = ["rust", "llvm", "smollm2"].map(str::to_owned).to_vec();
    }
    steps.iter().try_for_each(|name| setup::step(name))
}

/// Everything continuous integration checks.
fn test(args: Args) -> Result<()> {
    args.finish()?;
    let start = Instant::now();
    let mut parts = Parts::default();
    parts.run("set-up: rust", setup::rust_components)?;
    parts.run("set-up: LLVM 19", setup::llvm)?;
    let model = parts.run("set-up: SmolLM2", setup::smollm2)?;
    let nvrtc = parts.run("set-up: NVRTC", setup::nvrtc)?;
    parts.run("formatting", || shell::run(shell::cargo().args(["fmt", "--all", "--check"])))?;
    parts.run("lints", || {
        let clippy = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        shell::run(shell::cargo().args(clippy))
    })?;
    // Last, so that its closing lines are the last to be seen.
    parts.run("tests", || {
        let mut test = shell::cargo();
        test.args(["test", "--workspace"]).env("TILEC_SMOLLM2_GGUF", &model).env("TILEC_NVRTC", &nvrtc);
        shell::run(&mut test)
    })?;
    eprintln!("all checks passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
