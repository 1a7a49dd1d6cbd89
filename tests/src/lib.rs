//! What the tests that span crates share: the fixtures, and compiling them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use tilec_codegen::compile::Input;
use tilec_ir::plan::WeightsFrom;
use tilec_ir::spec::ModelSpec;
use tilec_ir::tensor::TensorInfo;
use tilec_runtime::checkpoint::Checkpoint;

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
    /// The checkpoint itself.
    pub checkpoint: Checkpoint,
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
        }
    }

    /// What the compiler reads.
    pub fn input(&self) -> Input<'_> {
        Input {
            name: &self.name,
            config: &self.config,
            tensors: &self.tensors,
            weights: WeightsFrom::Checkpoint { path: self.path.clone() },
        }
    }

    /// The defaults for this checkpoint, with small limits.
    pub fn spec(&self) -> ModelSpec {
        let mut spec = ModelSpec::for_checkpoint(&self.path);
        spec.limits.rows = 16;
        spec.limits.sequences = 4;
        spec
    }
}
