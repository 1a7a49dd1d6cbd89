//! Speed: a prompt in one go, then tokens one by one behind it.

use std::time::Duration;

use super::quiet::{self, Watch};
use super::{Engines, file_name, machine, printed, spread};
use crate::args::Args;
use crate::error::{Error, Result};
use crate::memory::read_ceiling;
use crate::wire::{self, Bench, LlamaCppBench, Sample};

/// What is measured.
pub struct Options {
    prompt_tokens: u64,
    generated_tokens: u64,
    repeats: usize,
}

impl Options {
    /// Takes `--pp`, `--tg` and `--repeats`.
    pub fn from(args: &mut Args) -> Result<Self> {
        Ok(Self {
            prompt_tokens: args.number("--pp", 512, 1)?,
            generated_tokens: args.number("--tg", 128, 1)?,
            repeats: args.number("--repeats", 5, 5)?,
        })
    }
}

/// A repeat counts as undisturbed while other programs take no more than this part of all processor time. Both engines
/// wait for their slowest thread many thousand times per second, so a neighbour costs far more than its own share.
const QUIET: f64 = 0.03;

/// Disturbed repeats are measured again, but not forever: at most so many times the repeats asked for.
const PATIENCE: usize = 2;

/// How long a repeat waits for other work to end before it starts regardless.
const WAIT: Duration = Duration::from_secs(30);

/// Both engines measured right after one another.
struct Repeat {
    llama_cpp: Sample,
    tilec: Option<Sample>,
    about: LlamaCppBench,
    other_work: f64,
}

impl Repeat {
    fn measure(engines: &Engines, options: &Options, llama_cpp_first: bool) -> Result<Self> {
        let watch = Watch::start();
        let early = if llama_cpp_first { None } else { measure_tilec(engines, options)? };
        let (llama_cpp, about) = measure_llama_cpp(engines, options)?;
        let tilec = if llama_cpp_first { measure_tilec(engines, options)? } else { early };
        Ok(Self { llama_cpp, tilec, about, other_work: watch.other_work() })
    }
}

/// Repeats until enough repeats were undisturbed or patience ends; returns the least disturbed ones and the number
/// of all that were measured.
fn repeat(engines: &Engines, options: &Options) -> Result<(Vec<Repeat>, usize)> {
    let mut repeats: Vec<Repeat> = Vec::new();
    while repeats.iter().filter(|repeat| repeat.other_work <= QUIET).count() < options.repeats
        && repeats.len() < PATIENCE * options.repeats
    {
        // Turn about, so that neither engine always runs on the warmer machine.
        quiet::wait(QUIET, WAIT);
        let repeat = Repeat::measure(engines, options, repeats.len().is_multiple_of(2))?;
        let other_work = 100.0 * repeat.other_work;
        eprintln!("repeat {}: other programs took {other_work:.1} % of the processors", repeats.len() + 1);
        repeats.push(repeat);
    }
    let measured = repeats.len();
    repeats.sort_by(|a, b| a.other_work.total_cmp(&b.other_work));
    repeats.truncate(options.repeats);
    Ok((repeats, measured))
}

/// Measures both engines in turn, each repeat in a process of its own, and prints a report.
pub fn compare(engines: &Engines, options: &Options) -> Result<()> {
    let (repeats, measured) = repeat(engines, options)?;
    let about = &repeats.first().ok_or_else(|| Error::new("nothing was measured"))?.about;
    let llama_cpp: Vec<Sample> = repeats.iter().map(|repeat| repeat.llama_cpp).collect();
    let tilec: Vec<Sample> = repeats.iter().filter_map(|repeat| repeat.tilec).collect();
    let other_work = spread(repeats.iter().map(|repeat| repeat.other_work))?;

    println!("\n{}, {}", file_name(&engines.model), machine(engines.threads));
    println!(
        "llama.cpp {} ({}); medians of the {} least disturbed of {measured} alternating repeats, each in its own process",
        about.release,
        about.cpu_backend,
        repeats.len()
    );
    println!("other programs took up to {:.1} % of the processors in these\n", 100.0 * other_work.max);
    if other_work.max > QUIET {
        eprintln!(
            "warning: the machine was busy with other work, so these figures are no measure of either engine\n"
        );
    }
    let prompt = format!("pp{}, tokens/s", options.prompt_tokens);
    let generate = format!("tg{}, tokens/s", options.generated_tokens);
    println!("{:<28} {:>9}   min .. max", "", "median");
    for (name, rate) in
        [(&prompt, Sample::prompt_rate as fn(&Sample) -> f64), (&generate, Sample::generate_rate)]
    {
        println!("{:<28} {}", format!("llama.cpp  {name}"), spread(llama_cpp.iter().map(rate))?);
        if !tilec.is_empty() {
            println!("{:<28} {}", format!("tilec      {name}"), spread(tilec.iter().map(rate))?);
            let ratios = tilec.iter().zip(&llama_cpp).map(|(ours, theirs)| rate(ours) / rate(theirs));
            println!("{:<28} {}", "tilec / llama.cpp", spread(ratios)?);
        }
    }

    let floor = Floor::of(about, options);
    let ceiling = read_ceiling(usize::try_from(floor.bytes).unwrap_or(usize::MAX), engines.threads, 30);
    let far_ceiling = read_ceiling(1 << 30, engines.threads, 5);
    let floor_rate = ceiling / floor.bytes as f64;
    println!(
        "\nmemory read ceiling          {:>9.1} GB/s over the bytes of a token, {:.1} GB/s over 1 GiB",
        ceiling / 1e9,
        far_ceiling / 1e9
    );
    println!("bytes read per token         {:>9.1} MB: {floor}", floor.bytes as f64 / 1e6);
    println!("floor per token              {:>9.3} ms, {floor_rate:.1} tokens/s", 1e3 / floor_rate);
    let of_ceiling = |samples: &[Sample]| -> Result<f64> {
        Ok(100.0 * spread(samples.iter().map(Sample::generate_rate))?.median / floor_rate)
    };
    println!("llama.cpp reaches            {:>9.1} % of the ceiling", of_ceiling(&llama_cpp)?);
    if !tilec.is_empty() {
        println!("tilec reaches                {:>9.1} % of the ceiling", of_ceiling(&tilec)?);
    }
    Ok(())
}

/// The bytes that decoding one token has to read, whatever the engine.
struct Floor {
    bytes: u64,
    weights: u64,
    kv: u64,
}

impl Floor {
    fn of(about: &LlamaCppBench, options: &Options) -> Self {
        // The mean over the generated tokens of the positions each one looks at.
        let positions = options.prompt_tokens + options.generated_tokens.div_ceil(2);
        let (weights, kv) = (about.weight_bytes, positions * about.kv_bytes_per_position);
        Self { bytes: weights + kv, weights, kv }
    }
}

impl std::fmt::Display for Floor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [weights, kv] = [self.weights, self.kv].map(|bytes| bytes as f64 / 1e6);
        write!(f, "{weights:.1} of weights, {kv:.1} of K and V as f16")
    }
}

fn measure_llama_cpp(engines: &Engines, options: &Options) -> Result<(Sample, LlamaCppBench)> {
    let mut command = engines.llama_cpp()?;
    command.args(sizes(options)).args(["--repeats", "1"]);
    let measured: LlamaCppBench = wire::parse(&printed(command)?, "the llama.cpp worker")?;
    Ok((the_sample(&measured.bench, options, "the llama.cpp worker")?, measured))
}

fn measure_tilec(engines: &Engines, options: &Options) -> Result<Option<Sample>> {
    let Some(mut command) = engines.tilec("bench") else { return Ok(None) };
    command.args(sizes(options)).args(["--repeats", "1", "--json"]);
    let measured: Bench = wire::parse(&printed(command)?, "tilec bench")?;
    the_sample(&measured, options, "tilec bench").map(Some)
}

fn sizes(options: &Options) -> [String; 4] {
    ["--pp".into(), options.prompt_tokens.to_string(), "--tg".into(), options.generated_tokens.to_string()]
}

/// The one sample asked for, refused unless it measures what was asked.
fn the_sample(bench: &Bench, options: &Options, engine: &str) -> Result<Sample> {
    let [sample] = bench.samples.as_slice() else {
        return Err(Error::new(format!("{engine} returned {} samples instead of 1", bench.samples.len())));
    };
    let asked = (options.prompt_tokens, options.generated_tokens);
    if (sample.prompt_tokens, sample.generated_tokens) != asked {
        return Err(Error::new(format!("{engine} measured {sample:?}, asked were {asked:?} tokens")));
    }
    if !(sample.prompt_s > 0.0 && sample.generate_s > 0.0) {
        return Err(Error::new(format!("{engine} returned times that cannot be: {sample:?}")));
    }
    Ok(*sample)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: Options = Options { prompt_tokens: 512, generated_tokens: 128, repeats: 5 };

    fn bench(json: &str) -> Bench {
        wire::parse(json, "test").unwrap()
    }

    #[test]
    fn a_sample_is_read_from_the_shared_format() {
        let bench = bench(
            r#"{"samples": [{"prompt_tokens": 512, "prompt_s": 0.5, "generated_tokens": 128, "generate_s": 2.0,
                "more": 1}], "more": 2}"#,
        );
        let sample = the_sample(&bench, &OPTIONS, "test").unwrap();
        assert_eq!((sample.prompt_rate(), sample.generate_rate()), (1024.0, 64.0));
    }

    #[test]
    fn samples_of_something_else_are_refused() {
        for (json, expected) in [
            (r#"{"samples": []}"#, "0 samples"),
            (
                r#"{"samples": [{"prompt_tokens": 511, "prompt_s": 1, "generated_tokens": 128, "generate_s": 1}]}"#,
                "511",
            ),
            (
                r#"{"samples": [{"prompt_tokens": 512, "prompt_s": 0, "generated_tokens": 128, "generate_s": 1}]}"#,
                "cannot be",
            ),
        ] {
            let error = the_sample(&bench(json), &OPTIONS, "test").unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn the_floor_counts_weights_and_the_mean_context() {
        let about: LlamaCppBench = wire::parse(
            r#"{"release": "", "cpu_backend": "", "weight_bytes": 1000, "kv_bytes_per_position": 10, "samples": []}"#,
            "test",
        )
        .unwrap();
        assert_eq!(Floor::of(&about, &OPTIONS).bytes, 1000 + 10 * (512 + 64));
    }
}
