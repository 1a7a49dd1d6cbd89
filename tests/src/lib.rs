//! What the tests that span crates share: the fixtures, and compiling them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilec_codegen::compile::{DraftInput, Host, Input, compile};
use tilec_ir::plan::WeightsFrom;
use tilec_ir::spec::{Device, DflashSpec, Draft, ModelSpec};
use tilec_ir::tensor::TensorInfo;
use tilec_runtime::checkpoint::Checkpoint;
use tilec_runtime::engine::{Engine, EngineOptions};

/// Folder of the fixtures.
pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// A small checkpoint, opened.
pub struct Fixture {
    /// Name of its folder.
    pub name: String,
    /// Where it is: a folder, or a GGUF file.
    pub path: PathBuf,
    /// Its configuration.
    pub config: serde_json::Value,
    /// Its tensors.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// The checkpoint itself, its draft attached if it has one.
    pub checkpoint: Checkpoint,
    /// A draft.
    pub draft: Option<DraftFixture>,
}

/// A small draft.
pub struct DraftFixture {
    /// Its folder.
    pub path: PathBuf,
    /// Its configuration.
    pub config: serde_json::Value,
    /// Its tensors.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Fixture {
    /// Opens `hf/NAME` or `gguf/NAME`.
    pub fn open(name: &str) -> Fixture {
        let folder = fixtures().join(name);
        let gguf = folder.join("model.gguf");
        let path = if gguf.is_file() { gguf } else { folder };
        let checkpoint = Checkpoint::open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let short = name.rsplit('/').next().unwrap_or(name).to_string();
        Fixture {
            name: short,
            path,
            config: checkpoint.config().clone(),
            tensors: checkpoint.tensors().clone(),
            checkpoint,
            draft: None,
        }
    }

    /// Gives it the draft in a folder.
    pub fn with_draft(mut self, path: &Path) -> Fixture {
        let draft =
            Checkpoint::open_draft(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        self.draft = Some(DraftFixture {
            path: path.to_path_buf(),
            config: draft.config().clone(),
            tensors: draft.tensors().clone(),
        });
        self.checkpoint.attach_draft(draft);
        self
    }

    /// Opens the pair `dflash/NAME`: a target and its draft.
    pub fn open_pair(name: &str) -> Fixture {
        let folder = fixtures().join("dflash").join(name);
        Fixture::open(&format!("dflash/{}", pair_target(name))).with_draft(&folder)
    }

    /// What the compiler reads.
    pub fn input(&self) -> Input<'_> {
        Input {
            name: &self.name,
            config: &self.config,
            tensors: &self.tensors,
            weights: WeightsFrom::Checkpoint { path: self.path.clone() },
            tokenizer: None,
            draft: self.draft.as_ref().map(|draft| DraftInput {
                config: &draft.config,
                tensors: &draft.tensors,
                weights: WeightsFrom::Checkpoint { path: draft.path.clone() },
            }),
        }
    }

    /// The defaults for this checkpoint, with small limits.
    pub fn spec(&self) -> ModelSpec {
        let mut spec = ModelSpec::for_checkpoint(&self.path);
        spec.limits.rows = 16;
        spec.limits.sequences = 4;
        spec.draft = self.draft.as_ref().map(|draft| Draft {
            dflash: DflashSpec { checkpoint: draft.path.clone(), block: None, context_rope_theta: None },
        });
        spec
    }
}

/// Moves a plan to be to a GPU if `TILEC_TEST_DEVICE=cuda` asks for one, with passes of as many rows as eight sequences
/// need to have guesses; whether it does.
pub fn to_test_device(spec: &mut ModelSpec) -> bool {
    let gpu = std::env::var("TILEC_TEST_DEVICE").is_ok_and(|device| device == "cuda");
    if gpu {
        (spec.target.device, spec.target.arch) = (Device::Cuda, "sm_90a".into());
        spec.limits.pass_rows = Some(32);
    }
    gpu
}

/// A compiled fixture in a temporary folder, loaded.
pub struct Loaded {
    /// The engine.
    pub engine: Engine,
    /// Holds the plan and the packed weights.
    pub folder: tempfile::TempDir,
}

/// Compiles and loads a fixture.
pub fn load(fixture: &Fixture, spec: &ModelSpec, threads: usize) -> Loaded {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("plan");
    compile(&fixture.input(), spec, &Host { threads, cubins: None }).unwrap().write(&plan).unwrap();
    let options = EngineOptions { cache_dir: Some(folder.path().join("cache")), ..EngineOptions::default() };
    let engine = Engine::load(&plan, &options, &mut |_, _| {}).unwrap();
    Loaded { engine, folder }
}

/// Folder of the target of the pair `dflash/NAME`.
pub fn pair_target(name: &str) -> String {
    let bytes = std::fs::read(fixtures().join("dflash").join(name).join("reference.safetensors")).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let about = &metadata.metadata().as_ref().unwrap()["about"];
    let about: serde_json::Value = serde_json::from_str(about).unwrap();
    about["target"].as_str().unwrap().to_string()
}

/// Sequences of a reference file: token ids and float64 logits `[rows][vocab]`.
pub fn reference(name: &str) -> Vec<(Vec<u32>, Vec<f64>)> {
    let bytes = std::fs::read(fixtures().join(name).join("reference.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut sequences = Vec::new();
    while let Ok(ids) = file.tensor(&format!("input_ids.{}", sequences.len())) {
        let logits = file.tensor(&format!("logits64.{}", sequences.len())).unwrap();
        let ids = ids.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
        let logits = logits.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
        sequences.push((ids, logits));
    }
    assert!(!sequences.is_empty(), "{name} has no reference");
    sequences
}

/// Empties all sequences.
pub fn reset(engine: &mut Engine) {
    for sequence in 0..engine.plan().limits.sequences {
        engine.reset(sequence);
    }
}

/// What the formulas in float64 gave for a pair of target and draft, by name.
pub struct Reference {
    /// Whole numbers: tokens, and how many rounds added.
    pub whole: BTreeMap<String, Vec<u32>>,
    /// Logits of blocks, `[rows, vocab]`.
    pub logits: BTreeMap<String, Vec<f64>>,
}

impl Reference {
    /// Reads that of the pair `dflash/NAME`.
    pub fn of(pair: &str) -> Reference {
        let bytes =
            std::fs::read(fixtures().join("dflash").join(pair).join("reference.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let (mut whole, mut logits) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in file.tensors() {
            let words = tensor.data().as_chunks::<8>().0;
            if tensor.dtype() == safetensors::Dtype::F64 {
                logits.insert(name, words.iter().map(|word| f64::from_le_bytes(*word)).collect());
            } else {
                whole.insert(name, words.iter().map(|word| i64::from_le_bytes(*word) as u32).collect());
            }
        }
        Reference { whole, logits }
    }

    /// Prompt, tokens with it, and tokens added by each round.
    pub fn loops(&self) -> Vec<[&[u32]; 3]> {
        let of = |kind: &str, number: usize| self.whole.get(&format!("{kind}.{number}")).map(Vec::as_slice);
        (0..).map_while(|n| Some([of("prompt", n)?, of("tokens", n)?, of("rounds", n)?])).collect()
    }
}
