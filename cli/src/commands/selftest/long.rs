//! Long contexts. Attention goes by spans of some chunks, whose sums are added up. A row that decodes and rows of a prompt
//! have to come to the same bits, alone and in company, around the ends of spans, and over the steps of a launch.

use super::cases::Random;
use super::checks::{After, Outcome, Stop, sequence_rows};
use super::compare::{finite, same_bits};
use crate::source;
use anyhow::Result;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::Path;
use tilec_codegen::compile::{Host, Input, compile};
use tilec_codegen::frontends;
use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::plan::WeightsFrom;
use tilec_ir::spec::{Device, Limits, ModelSpec, WeightFormat};
use tilec_runtime::engine::{Engine, EngineOptions, RowInput, StepError};

/// Spans end at multiples of so many positions, at least.
const SPAN_POSITIONS: usize = 1024;

/// Positions of a sequence.
const CONTEXT: usize = 4096 + SPAN_POSITIONS;

/// Tokens of the sequences: up to the ends of spans, over them, and short of the first.
const LENGTHS: [usize; 8] = [
    SPAN_POSITIONS - 1,
    SPAN_POSITIONS,
    SPAN_POSITIONS + 1,
    2 * SPAN_POSITIONS + 4,
    CONTEXT - 2 * STEPS,
    2 * SPAN_POSITIONS - STEPS / 2,
    100,
    1500,
];

/// Rows at the end of a sequence that are run one by one as well.
const LAST: usize = 8;

/// Steps of a launch.
const STEPS: usize = 24;

/// A small model with a long context.
pub struct Long {
    /// What it is, for people: also what `--only` looks at.
    pub name: &'static str,
    heads: [usize; 2],
    head_dim: usize,
    kv: KvType,
    /// Whether its feed-forward layers are experts, of FP4.
    experts: bool,
    /// Rows of a pass.
    pass_rows: usize,
}

/// One that the others differ from.
const PLAIN: Long = Long {
    name: "long contexts, heads of 64",
    heads: [8, 2],
    head_dim: 64,
    kv: KvType::Bf16,
    experts: false,
    pass_rows: 8,
};

/// All of them: keys and values of a page in one slot of the ring and in two, experts, and wide passes.
pub const LONG: [Long; 5] = [
    PLAIN,
    Long { name: "long contexts, heads of 128", heads: [4, 1], head_dim: 128, kv: KvType::F16, ..PLAIN },
    Long { name: "long contexts, experts", experts: true, ..PLAIN },
    Long { name: "long contexts, passes of 16", heads: [4, 1], head_dim: 128, pass_rows: 16, ..PLAIN },
    Long {
        name: "long contexts, experts, passes of 32",
        experts: true,
        kv: KvType::F16,
        pass_rows: 32,
        ..PLAIN
    },
];

impl Long {
    fn config(&self) -> Value {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 500,
            "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1],
            "head_dim": self.head_dim, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "max_position_embeddings": CONTEXT, "tie_word_embeddings": false,
        });
        if self.experts {
            config["architectures"] = json!(["Qwen3MoeForCausalLM"]);
            config["model_type"] = "qwen3_moe".into();
            for (key, value) in [
                ("num_experts", 24),
                ("num_experts_per_tok", 4),
                ("moe_intermediate_size", 192),
                ("decoder_sparse_step", 1),
            ] {
                config[key] = value.into();
            }
            config["norm_topk_prob"] = true.into();
            config["mlp_only_layers"] = json!([]);
        }
        config
    }

    /// Compiles the model for a device of this architecture, in `folder`, and loads it.
    ///
    /// # Errors
    /// When a file cannot be written, or the model is refused.
    pub fn load(&self, folder: &Path, target: (Device, &str), options: &EngineOptions) -> Result<Engine> {
        let config = self.config();
        let tensors = frontends::synthetic_tensors(&config, Format::BF16)?;
        let mut spec = ModelSpec::for_checkpoint(folder);
        (spec.target.device, spec.target.arch) = (target.0, target.1.into());
        spec.precision.kv_cache = Some(self.kv);
        if self.experts {
            spec.precision.experts = Some(WeightFormat::Converted(Format::MXFP4));
        }
        let pass_rows = Some(self.pass_rows);
        spec.limits = Limits { sequences: LENGTHS.len(), context: Some(CONTEXT), rows: 64, pass_rows };
        let weights = WeightsFrom::Synthetic { seed: 3, config: config.clone(), tensors: tensors.clone() };
        let input = Input {
            name: "selftest",
            config: &config,
            tensors: &tensors,
            weights,
            tokenizer: None,
            draft: None,
        };
        let cubins = source::cache_folder().ok().map(|folder| folder.join("cubins"));
        let plan = folder.join("plan");
        compile(&input, &spec, &Host { threads: 1, cubins })?.write(&plan)?;
        Ok(Engine::load(&plan, options, &mut |_, _| {})?)
    }
}

/// The rows of all sequences.
struct Texts {
    rows: Vec<Vec<RowInput>>,
    vocab: usize,
}

impl Texts {
    fn new(vocab: usize) -> Texts {
        let mut random = Random::new(11, 50_000);
        let rows = LENGTHS.iter().enumerate().map(|(sequence, length)| {
            let tokens: Vec<u32> = (0..*length).map(|_| random.below(vocab) as u32).collect();
            sequence_rows(sequence as u32, 0, &tokens)
        });
        Texts { rows: rows.collect(), vocab }
    }

    fn last(&self) -> impl Iterator<Item = &[RowInput]> {
        self.rows.iter().map(|rows| &rows[rows.len() - LAST..])
    }
}

/// Logits of all rows of a step.
fn step(engine: &mut Engine, rows: &[RowInput], vocab: usize) -> Result<Vec<f32>, Stop> {
    let wanted: Vec<u32> = (0..rows.len() as u32).collect();
    let logits = engine.step(rows, &wanted)?.to_vec();
    finite("a step's logits", &logits, vocab)?;
    Ok(logits)
}

/// The token of a row's largest logit, the lowest among equals.
fn largest(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    best.expect("a vocabulary has tokens") as u32
}

/// Compares; gives how many rows were.
fn compare(engine: &mut Engine, repeats: usize) -> Result<usize, (usize, Stop)> {
    let texts = Texts::new(engine.plan().vocab);
    let vocab = texts.vocab;
    let mut compared = 0;
    let mut check = || -> Result<(), Stop> {
        if engine.is_resident() {
            engine.poison()?;
        }
        // Runs of so many rows have several passes of queries.
        let mut together = Vec::new();
        for rows in &texts.rows {
            engine.reset(rows[0].sequence as usize);
            for part in rows[..rows.len() - LAST].chunks(64) {
                engine.step(part, &[])?;
            }
        }
        for rows in texts.last() {
            together.push(step(engine, rows, vocab)?);
        }
        let mut same = |found: &[f32], wanted: &[f32], what: &str| -> Result<(), Stop> {
            compared += found.len() / vocab;
            same_bits(found, wanted, vocab).map_err(|wrong| Stop::Wrong(format!("{what}: {wrong}")))
        };
        for (rows, wanted) in texts.last().zip(&together) {
            let what = format!("{} positions, row by row", rows[LAST - 1].position + 1);
            for (row, wanted) in rows.iter().zip(wanted.chunks(vocab)) {
                same(&step(engine, &[*row], vocab)?, wanted, &what)?;
            }
            // Two rows of four heads are a pass of their own.
            let pair = step(engine, &rows[LAST - 2..], vocab)?;
            same(&pair, &wanted[(LAST - 2) * vocab..], &what.replace("row by row", "in pairs"))?;
        }
        let last: Vec<RowInput> = texts.last().map(|rows| rows[LAST - 1]).collect();
        let wanted: Vec<f32> =
            together.iter().flat_map(|logits| logits[(LAST - 1) * vocab..].iter().copied()).collect();
        for _ in 0..repeats {
            same(&step(engine, &last, vocab)?, &wanted, "all sequences in one step")?;
        }
        if !engine.is_resident() {
            return Ok(());
        }
        // Behind these, the steps of a launch against single steps.
        let greedy: Vec<u32> = wanted.chunks(vocab).map(largest).collect();
        let first: Vec<RowInput> = last
            .iter()
            .zip(&greedy)
            .map(|(row, token)| RowInput { token: *token, position: row.position + 1, ..*row })
            .collect();
        let mut chosen = vec![vec![0; first.len()]; STEPS];
        engine.decode(&first, STEPS, &[], &mut |step, row, token| {
            chosen[step][row] = token;
            ControlFlow::Continue(())
        })?;
        let mut rows = first;
        for (number, chosen) in chosen.iter().enumerate() {
            let logits = step(engine, &rows, vocab)?;
            compared += rows.len();
            for (row, (logits, chosen)) in rows.iter_mut().zip(logits.chunks(vocab).zip(chosen)) {
                let token = largest(logits);
                if token != *chosen {
                    let position = row.position;
                    let what = format!(
                        "step {number} of a launch, position {position}: token {chosen} where a single step has {token}"
                    );
                    return Err(Stop::Wrong(what));
                }
                (row.token, row.position) = (token, row.position + 1);
            }
        }
        Ok(())
    };
    match check() {
        Ok(()) => Ok(compared),
        Err(wrong) => Err((compared, wrong)),
    }
}

/// Checks a loaded model: what was found, and how it ended.
pub fn check(long: &Long, mut engine: Engine, repeats: usize) -> (Outcome, After) {
    let (rows, problem, after) = match compare(&mut engine, repeats) {
        Ok(rows) => (rows, None, After::GoOn),
        Err((rows, Stop::Wrong(what))) => (rows, Some(what), After::GoOn),
        Err((rows, Stop::Engine(error))) => {
            let broken = matches!(error, StepError::Silent { .. } | StepError::Cuda(_));
            (rows, Some(error.to_string()), if broken { After::GiveUp } else { After::GoOn })
        }
    };
    let outcome = Outcome {
        case: long.name.into(),
        rows,
        what: "rows that decode and rows of a prompt, same bits",
        error: None,
        worst: None,
        bound: None,
        problem,
    };
    (outcome, after)
}

#[cfg(all(test, feature = "llvm"))]
mod tests {
    use super::*;

    /// There are no launches of several steps there; what is left of the check has to hold.
    #[test]
    fn long_contexts_have_the_same_bits_on_the_processor() {
        let folder = tempfile::tempdir().unwrap();
        let long = &LONG[0];
        let target = (Device::Cpu, tilec_ir::spec::Target::default_arch(Device::Cpu));
        let engine = long.load(folder.path(), target, &EngineOptions::default()).unwrap();
        let (outcome, after) = check(long, engine, 1);
        assert_eq!((outcome.problem, after), (None, After::GoOn));
        assert_eq!(outcome.rows, LENGTHS.len() * (LAST + 2 + 1));
    }
}
