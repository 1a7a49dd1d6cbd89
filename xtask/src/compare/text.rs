//! Text: llama.cpp generates greedily, tilec scores the same text, and every position is compared.
//!
//! Comparing position by position on the same text keeps one near tie from hiding everything behind it: free-running
//! texts that part once never meet again.

use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::{Engines, file_name, machine, printed};
use crate::args::Args;
use crate::error::{Context, Error, Result};
use crate::llama_cpp::library::Token;
use crate::wire::{self, Generation, Scored, Step};

/// One prompt per line; `\n` stands for a line break.
const PROMPTS: &str = include_str!("../prompts.txt");

/// What is compared.
pub struct Options {
    tokens: usize,
    tie: f32,
}

impl Options {
    /// Takes `--n` and `--tie`.
    pub fn from(args: &mut Args) -> Result<Self> {
        Ok(Self { tokens: args.number("--n", 64, 1)?, tie: args.number("--tie", NEAR_TIE, 0.0)? })
    }
}

/// Logits closer than this count as tied. Both engines quantize activations, each in its own blocks, which moves logits
/// by some tenths; llama.cpp differs from itself by as much between one batch and one token at a time.
const NEAR_TIE: f32 = 0.5;

/// Generates, scores, compares and prints a report.
pub fn compare(engines: &Engines, options: &Options) -> Result<()> {
    let scratch = Scratch::new()?;
    let prompts: Vec<String> = PROMPTS.lines().map(|line| line.replace("\\n", "\n")).collect();
    let prompts = tokenize(engines, &scratch, &prompts)?;
    eprintln!("llama.cpp: {} prompts, {} tokens each", prompts.len(), options.tokens);
    let generations = generate(engines, &scratch, &prompts, options.tokens)?;

    println!("\n{}, {}", file_name(&engines.model), machine(engines.threads));
    let mut itself = Tally::default();
    for generation in &generations {
        itself.add(generation.steps.iter().map(|step| Position::of_llama_cpp_itself(step, options.tie)));
    }
    println!("\nllama.cpp, one token at a time, beside llama.cpp, all in one batch:\n{itself}");
    if engines.tilec.is_none() {
        return Ok(());
    }

    let mut ours = Tally::default();
    for (index, generation) in generations.iter().enumerate() {
        eprintln!("tilec: prompt {} of {}", index + 1, generations.len());
        let logits = Logits::of_tilec(engines, &scratch, generation)?;
        let rows = generation.steps.iter().zip(logits.rows_from(generation.prompt.len() - 1)?);
        let positions: Vec<Position> = rows.map(|(step, row)| Position::of(step, row, options.tie)).collect();
        for (at, position) in positions.iter().enumerate() {
            if let Verdict::Different { .. } = position.verdict {
                println!("prompt {}, generated token {}: {:?}", index + 1, at + 1, position.verdict);
            }
        }
        ours.add(positions.into_iter());
    }
    println!("\nllama.cpp, one token at a time, beside tilec:\n{ours}");
    if ours.different > 0 {
        return Err(Error::new(format!("{} positions differ by more than near ties", ours.different)));
    }
    Ok(())
}

fn tokenize(engines: &Engines, scratch: &Scratch, texts: &[String]) -> Result<Vec<Vec<Token>>> {
    let file = scratch.file("texts.json");
    write(&file, &wire::text(&texts)?)?;
    let mut command = engines.llama_cpp()?;
    command.arg("--tokenize").arg(&file);
    wire::parse(&printed(command)?, "the llama.cpp worker")
}

fn generate(
    engines: &Engines,
    scratch: &Scratch,
    prompts: &[Vec<Token>],
    tokens: usize,
) -> Result<Vec<Generation>> {
    let file = scratch.file("prompts.json");
    write(&file, &wire::text(&prompts)?)?;
    let mut command = engines.llama_cpp()?;
    command.arg("--greedy").arg(&file).arg("--n").arg(tokens.to_string());
    wire::parse(&printed(command)?, "the llama.cpp worker")
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).context(|| format!("cannot write {}", path.display()))
}

/// tilec's logits of every token of a text, row by row.
struct Logits {
    values: Vec<f32>,
    vocab: usize,
}

impl Logits {
    /// Lets tilec score the prompt and what llama.cpp generated behind it.
    fn of_tilec(engines: &Engines, scratch: &Scratch, generation: &Generation) -> Result<Self> {
        // The last token has nothing behind it to compare.
        let generated = generation.steps.iter().map(|step| step.token).take(generation.steps.len() - 1);
        let text: Vec<Token> = generation.prompt.iter().copied().chain(generated).collect();
        let (tokens, output) = (scratch.file("tokens.json"), scratch.file("logits.safetensors"));
        write(&tokens, &wire::text(&text)?)?;
        let Some(mut command) = engines.tilec("logits") else {
            return Err(Error::new("tilec is not at hand"));
        };
        command.arg("--tokens-file").arg(&tokens).arg("--output").arg(&output);
        printed(command)?;
        let bytes =
            std::fs::read(&output).context(|| format!("tilec logits left no {}", output.display()))?;
        let logits = Self::parse(&bytes)?;
        if logits.values.len() != text.len() * logits.vocab {
            let rows = logits.values.len() / logits.vocab.max(1);
            return Err(Error::new(format!("tilec logits returned {rows} rows for {} tokens", text.len())));
        }
        Ok(logits)
    }

    /// Reads the logits of the first token list, the f32 tensor `logits.0` of shape [tokens, vocabulary].
    fn parse(bytes: &[u8]) -> Result<Self> {
        let what = || "tilec's logits file";
        let file = SafeTensors::deserialize(bytes).context(what)?;
        let tensor = file.tensor("logits.0").context(what)?;
        let (Dtype::F32, &[_, vocab]) = (tensor.dtype(), tensor.shape()) else {
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            return Err(Error::new(format!(
                "tilec's logits are {dtype:?} of shape {shape:?}, not f32 [tokens, vocabulary]"
            )));
        };
        let (words, _) = tensor.data().as_chunks::<4>();
        Ok(Self { values: words.iter().map(|&word| f32::from_le_bytes(word)).collect(), vocab })
    }

    fn rows_from(&self, first: usize) -> Result<impl Iterator<Item = &[f32]>> {
        if self.vocab == 0 {
            return Err(Error::new("tilec's logits have an empty vocabulary"));
        }
        Ok(self.values.chunks_exact(self.vocab).skip(first))
    }
}

/// How two engines agree at one position.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Position {
    verdict: Verdict,
    /// The largest difference over llama.cpp's largest logits; infinite when a logit is missing or not finite.
    difference: f32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    Same,
    /// Different tokens, but both engines hold the two for about equal; the larger of their two gaps.
    NearTie {
        gap: f32,
    },
    /// Different tokens, and no near tie: what each engine chose and by how much over the other's choice.
    Different {
        theirs: Token,
        their_gap: Option<f32>,
        ours: Option<Token>,
        our_gap: Option<f32>,
    },
}

impl Position {
    /// llama.cpp's step beside a full row of logits.
    fn of(step: &Step, row: &[f32], tie: f32) -> Self {
        let logit = |token: Token| usize::try_from(token).ok().and_then(|token| row.get(token)).copied();
        let mut best: Option<Scored> = None;
        for (token, &logit) in (0..).zip(row) {
            if best.is_none_or(|(_, most)| logit > most) {
                best = Some((token, logit));
            }
        }
        Self::compare(step, best, logit, tie)
    }

    /// llama.cpp's step beside llama.cpp's own logits for the whole text as one batch.
    fn of_llama_cpp_itself(step: &Step, tie: f32) -> Self {
        let other = &step.top_as_batch;
        let logit = |token: Token| other.iter().find(|(found, _)| *found == token).map(|&(_, logit)| logit);
        // A token may be among the first few of one list only; compare those in both.
        let both = step.top.iter().copied().filter(|&(token, _)| logit(token).is_some()).collect();
        let step = Step { token: step.token, top: both, top_as_batch: Vec::new() };
        Self::compare(&step, other.first().copied(), logit, tie)
    }

    fn compare(step: &Step, best: Option<Scored>, logit: impl Fn(Token) -> Option<f32>, tie: f32) -> Self {
        let differences = step.top.iter().map(|&(token, theirs)| {
            let difference = logit(token).map_or(f32::INFINITY, |ours| (ours - theirs).abs());
            if difference.is_nan() { f32::INFINITY } else { difference }
        });
        let difference = differences.fold(0.0, f32::max);
        let their_logit = |token| step.top.iter().find(|(found, _)| *found == token).map(|&(_, logit)| logit);
        // A token outside llama.cpp's largest few has no gap and so is no near tie.
        let their_gap = best.and_then(|(token, _)| Some(their_logit(step.token)? - their_logit(token)?));
        let our_gap = best.and_then(|(_, most)| Some(most - logit(step.token)?));
        let verdict = match (best, their_gap, our_gap) {
            (Some((token, _)), _, _) if token == step.token => Verdict::Same,
            (_, Some(theirs), Some(ours)) if theirs <= tie && ours <= tie => {
                Verdict::NearTie { gap: theirs.max(ours) }
            }
            _ => {
                let ours = best.map(|(token, _)| token);
                Verdict::Different { theirs: step.token, their_gap, ours, our_gap }
            }
        };
        Self { verdict, difference }
    }
}

/// Counts over all positions.
#[derive(Default)]
struct Tally {
    prompts: usize,
    same_prompts: usize,
    same: usize,
    near_ties: usize,
    /// Of the near ties, in logits.
    largest_gap: f32,
    different: usize,
    largest: f32,
    differences: f64,
}

impl Tally {
    /// Adds the positions of one prompt.
    fn add(&mut self, positions: impl Iterator<Item = Position>) {
        let before = self.same;
        let mut count = 0;
        for position in positions {
            count += 1;
            match position.verdict {
                Verdict::Same => self.same += 1,
                Verdict::NearTie { gap } => {
                    self.near_ties += 1;
                    self.largest_gap = self.largest_gap.max(gap);
                }
                Verdict::Different { .. } => self.different += 1,
            }
            self.largest = self.largest.max(position.difference);
            self.differences += f64::from(position.difference);
        }
        self.prompts += 1;
        self.same_prompts += usize::from(self.same - before == count);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let positions = self.same + self.near_ties + self.different;
        writeln!(f, "  positions                  {positions:>7}")?;
        writeln!(f, "  same token                 {:>7}", self.same)?;
        writeln!(
            f,
            "  near ties                  {:>7} (largest gap {:.3})",
            self.near_ties, self.largest_gap
        )?;
        writeln!(f, "  different                  {:>7}", self.different)?;
        writeln!(f, "  prompts with the same text {:>7} of {}", self.same_prompts, self.prompts)?;
        let mean = self.differences / positions.max(1) as f64;
        write!(f, "  largest difference of a position's top logits: mean {mean:.4}, max {:.4}", self.largest)
    }
}

/// A folder for files passed between the engines, removed with the value.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tilec-compare-{}", std::process::id()));
        std::fs::create_dir_all(&path).context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(top: &[Scored], top_as_batch: &[Scored]) -> Step {
        Step { token: top[0].0, top: top.to_vec(), top_as_batch: top_as_batch.to_vec() }
    }

    #[test]
    fn there_are_32_prompts_and_none_is_empty() {
        assert_eq!(PROMPTS.lines().count(), 32);
        assert!(PROMPTS.lines().all(|line| !line.trim().is_empty()));
    }

    #[test]
    fn verdicts() {
        let step = step(&[(1, 5.0), (2, 4.9), (0, 1.0)], &[]);
        let verdict = |row: &[f32]| Position::of(&step, row, 0.25).verdict;
        assert_eq!(verdict(&[1.0, 5.0, 4.9, 0.0]), Verdict::Same);
        assert!(
            matches!(verdict(&[1.0, 4.8, 5.0, 0.0]), Verdict::NearTie { gap } if (gap - 0.2).abs() < 1e-6)
        );
        for row in [
            [1.0, 4.0, 5.0, 0.0], // our gap is too large
            [5.1, 5.0, 4.9, 0.0], // their gap is too large
            [1.0, 5.0, 4.9, 5.1], // our token is not among theirs
            [f32::NAN; 4],
        ] {
            assert!(matches!(verdict(&row), Verdict::Different { theirs: 1, .. }), "{row:?}");
        }
        assert!(matches!(verdict(&[]), Verdict::Different { ours: None, .. }));
    }

    #[test]
    fn differences_are_over_the_top_logits() {
        let position = Position::of(&step(&[(1, 5.0), (2, 4.0)], &[]), &[100.0, 5.5, 3.75], 0.25);
        assert_eq!(position.difference, 0.5);
        let position = Position::of(&step(&[(1, 5.0), (7, 4.0)], &[]), &[0.0, 5.0], 0.25);
        assert_eq!(position.difference, f32::INFINITY);
    }

    #[test]
    fn llama_cpp_beside_itself() {
        let position =
            Position::of_llama_cpp_itself(&step(&[(1, 5.0), (2, 4.9)], &[(2, 5.0), (1, 4.8)]), 0.25);
        assert!(matches!(position.verdict, Verdict::NearTie { .. }), "{position:?}");
        assert!((position.difference - 0.2).abs() < 1e-6);
    }

    #[test]
    fn logits_are_read_from_safetensors() {
        let values = [0.5f32, -1.0, 2.0, 3.0, 4.0, 5.0];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let file = |name: &str, shape: Vec<usize>| {
            let view = safetensors::tensor::TensorView::new(Dtype::F32, shape, &bytes).unwrap();
            safetensors::serialize([(name, view)], None).unwrap()
        };
        let logits = Logits::parse(&file("logits.0", vec![2, 3])).unwrap();
        let rows: Vec<&[f32]> = logits.rows_from(1).unwrap().collect();
        assert_eq!(rows, [&values[3..]]);
        assert!(Logits::parse(&file("other", vec![2, 3])).is_err());
        assert!(Logits::parse(&file("logits.0", vec![6])).is_err());
        assert!(Logits::parse(b"short").is_err());
    }

    #[test]
    fn a_tally_counts_prompts_with_the_same_text() {
        let position = |verdict| Position { verdict, difference: 0.5 };
        let mut tally = Tally::default();
        tally.add([Verdict::Same, Verdict::Same].map(position).into_iter());
        tally.add([Verdict::Same, Verdict::NearTie { gap: 0.1 }].map(position).into_iter());
        assert_eq!((tally.prompts, tally.same_prompts, tally.same, tally.near_ties), (2, 1, 3, 1));
    }
}
