//! Models with drafts that were trained on them, through the generator: eight sequences at a time whose guesses
//! are right more or less often, and which end at different places, write the same texts without a draft, with
//! rounds that the host drives, and with rounds in launches. Random models have drafts that are hardly ever right.

use super::cases::Random;
use super::checks::{After, Outcome};
use crate::source;
use anyhow::{Context, Result};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;
use tilec_codegen::compile::DraftInput;
use tilec_codegen::compile::{Host, Input, compile};
use tilec_ir::plan::WeightsFrom;
use tilec_ir::spec::{Device, DflashSpec, Draft, Limits, ModelSpec};
use tilec_runtime::checkpoint::Checkpoint;
use tilec_runtime::engine::{Engine, EngineOptions, StepError};
use tilec_runtime::generate::{DraftLimit, GenerateError, Generator, Request, Run};
use tilec_runtime::sampling::SamplingParams;

/// Sequences at a time.
const COMPANY: usize = 8;

/// Texts of a pair.
const TEXTS: usize = 24;

/// Rows of a block that are verified. Eight sequences share the 32 rows of a pass, four rows each.
const VERIFIED: [usize; 4] = [2, 3, 4, usize::MAX];

/// A checkpoint's two files.
type Files = [&'static [u8]; 2];

/// A small model and its draft.
pub struct Pair {
    /// What they are, for people: also what `--only` looks at.
    pub name: &'static str,
    model: Files,
    draft: Files,
}

macro_rules! files {
    ($name:literal) => {
        [
            include_bytes!(concat!("../../../../tests/fixtures/dflash/", $name, "/config.json")),
            include_bytes!(concat!("../../../../tests/fixtures/dflash/", $name, "/model.safetensors")),
        ]
    };
}

/// All pairs.
pub const PAIRS: [Pair; 3] = [
    Pair {
        name: "pair llama, draft of 8 rows",
        model: files!("target-llama"),
        draft: files!("sliding-both-ways"),
    },
    Pair { name: "pair qwen3, draft of 16 rows", model: files!("target-qwen3"), draft: files!("full") },
    Pair { name: "pair qwen3, dflash2 of 8 rows", model: files!("target-qwen3"), draft: files!("second") },
];

impl Pair {
    /// Compiles the pair for a device of this architecture, in `folder`, and loads it.
    ///
    /// # Errors
    /// When a file cannot be written, or the pair is refused.
    pub fn load(&self, folder: &Path, target: (Device, &str), options: &EngineOptions) -> Result<Engine> {
        let folder = std::path::absolute(folder)?;
        let [model, draft] = [("model", &self.model), ("draft", &self.draft)].map(|(name, files)| {
            let path = folder.join(name);
            std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
            for (name, bytes) in ["config.json", "model.safetensors"].into_iter().zip(files) {
                let file = path.join(name);
                std::fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))?;
            }
            anyhow::Ok(path)
        });
        let (model, draft) = (model?, draft?);
        let [target_checkpoint, draft_checkpoint] =
            [Checkpoint::open(&model)?, Checkpoint::open_draft(&draft)?];
        let mut spec = ModelSpec::for_checkpoint(&model);
        let dflash = DflashSpec { checkpoint: draft.clone(), block: None, context_rope_theta: None };
        spec.draft = Some(Draft { dflash });
        (spec.target.device, spec.target.arch) = (target.0, target.1.into());
        let gpu = target.0 == Device::Cuda;
        spec.limits = Limits {
            sequences: COMPANY,
            context: Some(128),
            // Whole blocks of all sequences.
            rows: COMPANY * 16,
            pass_rows: gpu.then_some(32),
        };
        let input = Input {
            name: "selftest",
            config: target_checkpoint.config(),
            tensors: target_checkpoint.tensors(),
            weights: WeightsFrom::Checkpoint { path: model },
            tokenizer: None,
            draft: Some(DraftInput {
                config: draft_checkpoint.config(),
                tensors: draft_checkpoint.tensors(),
                weights: WeightsFrom::Checkpoint { path: draft },
            }),
        };
        let cubins = source::cache_folder().ok().map(|folder| folder.join("cubins"));
        let plan = folder.join("plan");
        compile(&input, &spec, &Host { threads: 1, cubins })?.write(&plan)?;
        Ok(Engine::load(&plan, options, &mut |_, _| {})?)
    }
}

/// Texts behind random prompts, greedy and by chance. Some end with a stop token, the others at different
/// lengths.
fn requests(vocab: usize) -> Vec<Request> {
    let base = |temperature, seed| SamplingParams { temperature, seed, ..Default::default() };
    let samplings = [
        SamplingParams::greedy(),
        base(0.3, 1),
        SamplingParams { top_k: 7, ..base(0.8, 2) },
        SamplingParams { top_p: 0.8, min_p: 0.05, ..base(1.3, 3) },
    ];
    let mut random = Random::new(7, 40_000);
    let samplings = samplings.into_iter().cycle();
    let request = |(number, sampling): (usize, SamplingParams)| Request {
        prompt: (0..1 + random.below(40)).map(|_| random.below(vocab) as u32).collect(),
        max_tokens: 40 + 2 * number,
        stop_tokens: if number % 3 == 0 { vec![3] } else { Vec::new() },
        stop_strings: Vec::new(),
        sampling,
        skip_special: true,
        // Some have no guesses, and ride along with the others.
        draft: if number % 7 == 5 { DraftLimit::off() } else { DraftLimit::default() },
    };
    (0..TEXTS).zip(samplings).map(request).collect()
}

/// How texts are written.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Way {
    /// Rows of a block that are verified; 0 for no draft.
    rows: usize,
    /// Many steps or rounds a launch, if the engine has that.
    launches: bool,
    /// All sequences at once.
    company: bool,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rows {
            0 => f.write_str("no draft")?,
            usize::MAX => f.write_str("whole blocks")?,
            rows => write!(f, "{rows} rows of a block")?,
        }
        f.write_str(if self.launches { ", in launches" } else { ", driven by the host" })?;
        f.write_str(if self.company { ", in company" } else { ", alone" })
    }
}

/// Writes the texts in a way, from empty caches.
fn write(engine: Engine, requests: &[Request], way: Way) -> Result<(Engine, Run), GenerateError> {
    let mut generator = Generator::new(engine, None);
    if !way.launches {
        generator = generator.with_launch_steps(1);
    }
    generator.set_draft_rows(way.rows);
    generator.set_draft_min(usize::MAX);
    let news = &mut |_: tilec_runtime::generate::Piece<'_>| ControlFlow::Continue(());
    if way.company {
        let run = generator.run(requests, news)?;
        return Ok((generator.into_engine(), run));
    }
    let mut all = Run::default();
    for request in requests {
        generator.clear();
        let run = generator.run(std::slice::from_ref(request), news)?;
        all.completions.extend(run.completions);
        all.draft.add(&run.draft);
    }
    Ok((generator.into_engine(), all))
}

/// Whether the texts are those that there should be.
fn same_texts(found: &Run, wanted: &Run) -> Result<(), String> {
    for (number, (found, wanted)) in found.completions.iter().zip(&wanted.completions).enumerate() {
        if (&found.tokens, found.finish) == (&wanted.tokens, wanted.finish) {
            continue;
        }
        let at =
            found.tokens.iter().zip(&wanted.tokens).take_while(|(found, wanted)| found == wanted).count();
        return Err(format!(
            "text {number}, token {at}: {:?} where it should be {:?}; it ends by {:?}, not {:?}",
            found.tokens.get(at),
            wanted.tokens.get(at),
            found.finish,
            wanted.finish
        ));
    }
    match found.completions.len() == wanted.completions.len() {
        true => Ok(()),
        false => Err(format!("{} texts, not {}", found.completions.len(), wanted.completions.len())),
    }
}

/// Whether a run shows what it should: guesses right and wrong, and neighbours that differ in it.
fn tells(run: &Run, way: Way, launches: bool) -> Result<(), String> {
    let draft = &run.draft;
    if way.rows == 0 {
        return if draft.rounds == 0 { Ok(()) } else { Err("there were guesses".into()) };
    }
    if draft.right == 0 || draft.right == draft.guesses {
        return Err(format!("{} of {} guesses were right", draft.right, draft.guesses));
    }
    let neighbours = run.completions[..COMPANY].iter().filter(|done| done.draft.rounds > 0);
    let added: BTreeSet<u64> =
        neighbours.map(|done| 1000 * done.draft.tokens / done.draft.rounds.max(1)).collect();
    if added.len() < 3 {
        return Err(format!("neighbours accept alike: {added:?} thousandths of a token a round"));
    }
    if launches && way.launches == draft.launch.is_zero() {
        return Err(format!("{:?} of launched rounds", draft.launch));
    }
    Ok(())
}

/// All ways but the first, which the others are compared with.
fn ways() -> impl Iterator<Item = Way> {
    let all = VERIFIED.into_iter().flat_map(|rows| {
        [(false, true), (true, true), (true, false)].map(|(launches, company)| Way {
            rows,
            launches,
            company,
        })
    });
    [Way { rows: 0, launches: true, company: true }].into_iter().chain(all)
}

/// Checks a loaded pair: what was found, and how it ended.
pub fn check(pair: &Pair, mut engine: Engine) -> (Outcome, After) {
    let mut outcome = Outcome {
        case: pair.name.into(),
        rows: 0,
        what: "eight sequences with a draft and without, same texts",
        error: None,
        worst: None,
        bound: None,
        problem: None,
    };
    let requests = requests(engine.plan().vocab);
    let launches = engine.has_rounds(0, 0);
    let mut first: Option<Run> = None;
    for way in [Way { rows: 0, launches: false, company: true }].into_iter().chain(ways()) {
        let run = match write(engine, &requests, way) {
            Ok((back, run)) => {
                engine = back;
                run
            }
            Err(error) => {
                let broken =
                    matches!(error, GenerateError::Step(StepError::Silent { .. } | StepError::Cuda(_)));
                outcome.problem = Some(format!("{way}: {error}"));
                return (outcome, if broken { After::GiveUp } else { After::GoOn });
            }
        };
        outcome.rows += run.completions.iter().map(|done| done.tokens.len()).sum::<usize>();
        let same = first.as_ref().map_or(Ok(()), |wanted| same_texts(&run, wanted));
        if let Err(problem) = same.and_then(|()| tells(&run, way, launches)) {
            outcome.problem = Some(format!("{way}: {problem}"));
            return (outcome, After::GoOn);
        }
        first.get_or_insert(run);
    }
    (outcome, After::GoOn)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(feature = "llvm")]
    use tilec_ir::spec::Target;
    #[cfg(feature = "llvm")]
    use tilec_runtime::generate::FinishReason;

    #[cfg(feature = "llvm")]
    fn cpu(pair: &Pair) -> (Engine, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let target = (Device::Cpu, Target::default_arch(Device::Cpu));
        let engine = pair.load(folder.path(), target, &EngineOptions::default()).unwrap();
        (engine, folder)
    }

    /// On the processor, where the host drives all rounds.
    #[cfg(feature = "llvm")]
    #[test]
    fn pairs_write_the_same_texts_on_the_processor() {
        for pair in &PAIRS {
            let (engine, _folder) = cpu(pair);
            let (outcome, after) = check(pair, engine);
            assert_eq!((outcome.problem, after), (None, After::GoOn), "{}", pair.name);
            assert!(outcome.rows > 10_000, "{}", outcome.rows);
        }
    }

    #[cfg(feature = "llvm")]
    #[test]
    fn what_is_wrong_is_found() {
        let (engine, _folder) = cpu(&PAIRS[0]);
        let requests = requests(engine.plan().vocab);
        let way = Way { rows: 4, launches: true, company: true };
        let (engine, wanted) = write(engine, &requests, way).unwrap();
        same_texts(&wanted, &wanted).unwrap();
        tells(&wanted, way, false).unwrap();
        // They end in several ways, and not all at one length.
        let ends: BTreeSet<String> =
            wanted.completions.iter().map(|done| format!("{:?}", done.finish)).collect();
        assert!(ends.len() >= 2, "{ends:?}");
        // No rounds in launches where there should be some; guesses where there should be none.
        assert!(tells(&wanted, way, true).unwrap_err().contains("launched rounds"));
        assert!(tells(&wanted, Way { rows: 0, ..way }, false).unwrap_err().contains("guesses"));
        let mut other = wanted.clone();
        other.completions[5].tokens[7] ^= 1;
        assert!(same_texts(&other, &wanted).unwrap_err().contains("text 5, token 7"));
        let mut other = wanted.clone();
        other.completions[9].finish = FinishReason::Cancelled;
        assert!(same_texts(&other, &wanted).unwrap_err().contains("text 9"));
        let mut other = wanted.clone();
        other.completions.pop();
        assert!(same_texts(&other, &wanted).unwrap_err().contains("23 texts"));
        // Neighbours that are all alike, and guesses that are never right.
        let mut other = wanted.clone();
        let one = other.completions[0].draft.clone();
        other.completions.iter_mut().for_each(|done| done.draft = one.clone());
        assert!(tells(&other, way, false).unwrap_err().contains("alike"));
        other.draft.right = 0;
        assert!(tells(&other, way, false).unwrap_err().contains("0 of"));
        drop(engine);
    }

    /// The kernels that a GPU would run.
    #[test]
    fn pairs_have_kernels_of_rounds() {
        let folder = tempfile::tempdir().unwrap();
        // Without a GPU it is compiled, and not loaded.
        let problem = PAIRS[0].load(folder.path(), (Device::Cuda, "sm_90a"), &EngineOptions::default());
        let plan = tilec_ir::plan::Plan::load(&folder.path().join("plan")).unwrap();
        assert!(plan.draft.unwrap().round.is_some());
        assert_eq!(plan.resident.unwrap().step_rows, 32);
        drop(problem);
    }
}
