//! `xtask llama-cpp-worker`: llama.cpp in a process of its own, measuring with its own clock.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::library::{Library, LlamaContext, Model, RELEASE, Token};
use crate::args::Args;
use crate::error::{Context, Error, Result};
use crate::setup;
use crate::wire::{self, Bench, Generation, LlamaCppBench, Sample, Scored, Step};

/// How many of the largest logits a generation records at every step.
const TOP: usize = 8;

/// What the worker is to print.
enum Job {
    Bench { prompt_tokens: usize, generated_tokens: usize, repeats: usize },
    Greedy { prompts: PathBuf, tokens: usize },
    Tokenize { texts: PathBuf },
}

/// Runs the worker and prints its result as JSON.
///
/// # Errors
/// On bad arguments and whatever llama.cpp reports.
pub fn main(mut args: Args) -> Result<()> {
    let model = args.path("--model")?;
    let library = args.path("--library")?;
    let threads = args.number("--threads", 2, 1)?;
    let verbose = args.flag("--verbose");
    let job = match (args.path("--greedy")?, args.path("--tokenize")?) {
        (Some(_), Some(_)) => {
            return Err(Error::new("--greedy and --tokenize are two jobs: give one of them"));
        }
        (Some(prompts), None) => Job::Greedy { prompts, tokens: args.number("--n", 64, 1)? },
        (None, Some(texts)) => Job::Tokenize { texts },
        (None, None) => Job::Bench {
            prompt_tokens: args.number("--pp", 512, 1)?,
            generated_tokens: args.number("--tg", 128, 1)?,
            repeats: args.number("--repeats", 1, 1)?,
        },
    };
    args.finish()?;

    let model = model.map_or_else(setup::smollm2, Ok)?;
    let library = Library::load(&library.map_or_else(setup::llama_cpp, Ok)?, verbose)?;
    let model = library.model(&model)?;
    let json = match job {
        Job::Bench { prompt_tokens, generated_tokens, repeats } => wire::text(&LlamaCppBench {
            release: RELEASE.to_owned(),
            cpu_backend: library.cpu_backend(),
            weight_bytes: model.weight_bytes(),
            kv_bytes_per_position: model.kv_bytes_per_position(),
            bench: bench(&model, threads, prompt_tokens, generated_tokens, repeats)?,
        })?,
        Job::Greedy { prompts, tokens } => wire::text(&greedy(&model, threads, &prompts, tokens)?)?,
        Job::Tokenize { texts } => wire::text(&tokenize(&model, &texts)?)?,
    };
    println!("{json}");
    Ok(())
}

/// Any tokens will do: a dense model does the same work for each. These spread over the vocabulary.
fn arbitrary_token(index: usize, vocab: usize) -> Token {
    let token = (index * 7919 + 17) % vocab.max(1);
    Token::try_from(token).unwrap_or(0)
}

/// Positions rounded up as llama.cpp pads its KV cache.
fn context_size(positions: usize) -> Result<u32> {
    u32::try_from(positions.next_multiple_of(256)).context(|| format!("{positions} positions are too many"))
}

fn bench(
    model: &Model<'_>,
    threads: usize,
    prompt_tokens: usize,
    generated_tokens: usize,
    repeats: usize,
) -> Result<Bench> {
    let vocab = model.vocab_size();
    let prompt: Vec<Token> = (0..prompt_tokens).map(|index| arbitrary_token(index, vocab)).collect();
    let mut context = model.context(context_size(prompt_tokens + generated_tokens)?, threads)?;
    let mut measure = |generated_tokens: usize| -> Result<Sample> {
        context.clear();
        let start = Instant::now();
        context.decode(&prompt, false)?;
        context.logits(-1)?;
        let prompt_s = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for index in 0..generated_tokens {
            context.decode(&[arbitrary_token(prompt_tokens + index, vocab)], false)?;
            context.logits(-1)?;
        }
        let generate_s = start.elapsed().as_secs_f64();
        let (prompt_tokens, generated_tokens) = (prompt_tokens as u64, generated_tokens as u64);
        Ok(Sample { prompt_tokens, prompt_s, generated_tokens, generate_s })
    };
    // The first pass maps the file's pages and builds the graphs.
    measure(generated_tokens.min(16))?;
    Ok(Bench { samples: (0..repeats).map(|_| measure(generated_tokens)).collect::<Result<_>>()? })
}

fn greedy(model: &Model<'_>, threads: usize, prompts: &Path, tokens: usize) -> Result<Vec<Generation>> {
    let prompts: Vec<Vec<Token>> = wire::read(prompts)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let mut context = model.context(context_size(longest + tokens)?, threads)?;
    prompts.into_iter().map(|prompt| generate(&mut context, prompt, tokens)).collect()
}

fn generate(context: &mut LlamaContext<'_>, prompt: Vec<Token>, tokens: usize) -> Result<Generation> {
    if prompt.is_empty() {
        return Err(Error::new("a prompt holds no tokens"));
    }
    context.clear();
    context.decode(&prompt, false)?;
    let mut tops = vec![top(context.logits(-1)?)];
    let mut text = prompt.clone();
    for _ in 1..tokens {
        let token = best(tops.last())?;
        text.push(token);
        context.decode(&[token], false)?;
        tops.push(top(context.logits(-1)?));
    }

    context.clear();
    context.decode(&text, true)?;
    let mut steps = Vec::with_capacity(tokens);
    for (row, top_by_step) in (prompt.len() - 1..).zip(tops) {
        let row = i32::try_from(row).context(|| "too many rows")?;
        let token = best(Some(&top_by_step))?;
        steps.push(Step { token, top: top_by_step, top_as_batch: top(context.logits(row)?) });
    }
    Ok(Generation { prompt, steps })
}

fn best(top: Option<&Vec<Scored>>) -> Result<Token> {
    let best = top.and_then(|top| top.first());
    best.map(|&(token, _)| token).ok_or_else(|| Error::new("llama.cpp returned no finite logits"))
}

/// The `TOP` largest logits, decreasing; of equal ones the smaller token id first.
fn top(logits: &[f32]) -> Vec<Scored> {
    let mut top: Vec<Scored> = Vec::with_capacity(TOP + 1);
    for (token, &logit) in (0..).zip(logits) {
        let full = top.len() == TOP;
        if logit.is_nan() || (full && top.last().is_some_and(|&(_, least)| logit <= least)) {
            continue;
        }
        let at = top.partition_point(|&(_, other)| other >= logit);
        top.insert(at, (token, logit));
        top.truncate(TOP);
    }
    top
}

fn tokenize(model: &Model<'_>, texts: &Path) -> Result<Vec<Vec<Token>>> {
    let texts: Vec<String> = wire::read(texts)?;
    texts.iter().map(|text| model.tokenize(text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logits_come_first() {
        let logits: Vec<f32> = (0..100).map(|index| ((index * 37) % 100) as f32).collect();
        let found = top(&logits);
        let mut expected: Vec<Scored> = (0..).zip(logits.iter().copied()).collect();
        expected.sort_by(|a, b| b.1.total_cmp(&a.1));
        expected.truncate(TOP);
        assert_eq!(found, expected);
    }

    #[test]
    fn ties_go_to_the_smaller_token_and_nan_is_passed_over() {
        assert_eq!(top(&[1.0, f32::NAN, 3.0, 3.0, 2.0]), [(2, 3.0), (3, 3.0), (4, 2.0), (0, 1.0)]);
        assert!(best(Some(&top(&[f32::NAN]))).is_err());
    }

    #[test]
    fn arbitrary_tokens_lie_in_the_vocabulary_and_differ() {
        let tokens: std::collections::HashSet<Token> =
            (0..640).map(|index| arbitrary_token(index, 49_152)).collect();
        assert_eq!(tokens.len(), 640);
        assert!(tokens.iter().all(|token| (0..49_152).contains(token)));
    }
}
