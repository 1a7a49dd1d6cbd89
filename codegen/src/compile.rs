//! From a description of a model to a plan: the passes in order, and the folder that they end in.

use crate::emit::llvm::{EmitError, emit};
use crate::frontends;
use crate::passes::{fuse, precision, schedule, tile};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilec_ir::abi::ABI_VERSION;
use tilec_ir::cost::costs;
use tilec_ir::graph::{Graph, GraphError, verify};
use tilec_ir::plan::{
    MANIFEST, PLAN_VERSION, Plan, PlanError, PlanFile, PlanLimits, PlanTarget, WeightsFrom,
};
use tilec_ir::spec::{Device, ModelSpec, SpecError};
use tilec_ir::tensor::TensorInfo;
use tilec_ir::validate::{Violation, validate};
use tilec_kernels_gen::{KernelError, Target};

/// What a compilation reads, beside the spec.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// Name of the model, for people.
    pub name: &'a str,
    /// The model's config.json.
    pub config: &'a serde_json::Value,
    /// The checkpoint's tensors.
    pub tensors: &'a BTreeMap<String, TensorInfo>,
    /// Where the runtime will find the weights.
    pub weights: WeightsFrom,
    /// Where it will find a tokenizer, if not in the checkpoint.
    pub tokenizer: Option<PathBuf>,
}

/// A level that can be printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Typed operators.
    Graph,
    /// Anchors with chains.
    Fused,
    /// Tiles, buffers and waits.
    Stages,
    /// Programs of the workers.
    Schedule,
    /// LLVM IR before optimization.
    Llvm,
}

impl Level {
    /// All levels in the order that they are made.
    pub const ALL: [Level; 5] = [Level::Graph, Level::Fused, Level::Stages, Level::Schedule, Level::Llvm];

    /// The name that `--emit` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Graph => "graph",
            Level::Fused => "fused",
            Level::Stages => "stages",
            Level::Schedule => "schedule",
            Level::Llvm => "llvm",
        }
    }

    /// The file in the plan's folder.
    const fn file(self) -> &'static str {
        match self {
            Level::Graph => "graph.txt",
            Level::Fused => "fused.txt",
            Level::Stages => "stages.txt",
            Level::Schedule => "schedule.txt",
            Level::Llvm => "kernel.ll",
        }
    }
}

/// Name of the native code in the plan's folder.
const OBJECT: &str = "kernel.o";

/// Why a model does not compile.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The spec asks for something impossible.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The architecture or its tensors are not understood.
    #[error(transparent)]
    Frontend(#[from] frontends::FrontendError),
    /// A pass was handed or made a broken graph.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The precision asked for does not fit the model.
    #[error(transparent)]
    Precision(#[from] precision::PrecisionError),
    /// An operator has no stage.
    #[error(transparent)]
    Tile(#[from] tile::TileError),
    /// The schedule is not safe to run. Never the user's fault.
    #[error("the schedule that was made is not safe: {0}; please report this model")]
    Schedule(Violation),
    /// The target is not known.
    #[error(transparent)]
    Target(#[from] KernelError),
    /// No code could be made.
    #[error(transparent)]
    Emit(#[from] EmitError),
    /// A device without a backend.
    #[error("target.device is {0}, for which there is no backend; use cpu")]
    Device(&'static str),
    /// A file of the plan could not be written.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// A compiled model, in memory.
#[derive(Debug)]
pub struct Compiled {
    /// The manifest.
    pub plan: Plan,
    /// Text of each level.
    pub texts: Vec<(Level, String)>,
    /// The native code.
    pub object: Vec<u8>,
}

/// The model's graph, precision applied and verified: what the interpreter runs.
///
/// # Errors
/// [`CompileError`].
pub fn graph(input: &Input<'_>, spec: &ModelSpec) -> Result<Graph, CompileError> {
    let mut graph = frontends::build(input.config, input.tensors)?;
    graph.name = input.name.to_string();
    first(verify(&graph))?;
    precision::precision(&mut graph, &spec.precision)?;
    first(verify(&graph))?;
    Ok(graph)
}

fn first(result: Result<(), Vec<GraphError>>) -> Result<(), GraphError> {
    result.map_err(|mut errors| errors.swap_remove(0))
}

/// Compiles a model for the processor that `spec.target.arch` names, with `threads` workers where the
/// spec leaves that open.
///
/// # Errors
/// [`CompileError`].
pub fn compile(input: &Input<'_>, spec: &ModelSpec, threads: usize) -> Result<Compiled, CompileError> {
    if spec.target.device != Device::Cpu {
        return Err(CompileError::Device("cuda"));
    }
    let graph = graph(input, spec)?;
    let limits = PlanLimits {
        max_rows: spec.limits.rows,
        sequences: spec.limits.sequences,
        context: spec.limits.context(frontends::max_context(input.config)?)?,
    };
    let workers = spec.target.threads.unwrap_or(threads);
    let fused = fuse::fuse(&graph)?;
    let stages =
        tile::tile(&fused, &tile::TileOptions { max_rows: limits.max_rows, context: limits.context })?;
    let schedule = schedule::schedule(&stages, workers);
    validate(&stages, &schedule).map_err(CompileError::Schedule)?;
    let target = target(&spec.target.arch)?;
    let native = emit(&stages, &schedule, &target)?;

    let graph_text = graph.to_string();
    let graph_sha256 = sha256(graph_text.as_bytes());
    let texts = vec![
        (Level::Graph, graph_text),
        (Level::Fused, fused.to_string()),
        (Level::Stages, stages.to_string()),
        (Level::Schedule, schedule.text(&stages)),
        (Level::Llvm, native.text),
    ];
    let file = |name: &str, bytes: &[u8]| PlanFile { file: name.to_string(), sha256: sha256(bytes) };
    let plan = Plan {
        plan_version: PLAN_VERSION,
        abi_version: ABI_VERSION,
        name: input.name.to_string(),
        family: frontends::family(input.config)?.to_string(),
        graph_sha256,
        weights: input.weights.clone(),
        tokenizer: input.tokenizer.clone(),
        target: PlanTarget {
            device: "cpu".into(),
            arch: target.triple.split('-').next().unwrap_or_default().to_string(),
            cpu: target.cpu.clone(),
            features: target.required_features(),
            workers,
        },
        limits,
        vocab: stages.vocab,
        buffers: stages.buffers.clone(),
        logits: stages.logits.0 as usize,
        scratch_bytes: native.scratch_bytes,
        stages: stages.sequence().iter().map(|at| at.name()).collect(),
        kv: stages.kv,
        packing: stages.packing.clone(),
        costs: costs(&stages),
        code: file(OBJECT, &native.object),
        resident: None,
        texts: texts.iter().map(|(level, text)| file(level.file(), text.as_bytes())).collect(),
    };
    plan.verify().map_err(|what| PlanError::Invalid { path: MANIFEST.into(), what })?;
    Ok(Compiled { plan, texts, object: native.object })
}

/// The target of an architecture name: `host`, or one of LLVM's processor names for this machine's
/// architecture.
fn target(arch: &str) -> Result<Target, KernelError> {
    let host = tilec_kernels_gen::llvm::host_target()?;
    if arch == tilec_ir::spec::Target::HOST { Ok(host) } else { Target::parse(&host.triple, arch, "") }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Compiled {
    /// Text of a level.
    pub fn text(&self, level: Level) -> &str {
        self.texts.iter().find(|(other, _)| *other == level).map_or("", |(_, text)| text)
    }

    /// Writes the plan's folder. It is filled beside its place and moved there whole: an interruption
    /// or a full disk leaves what was there before, or nothing.
    ///
    /// # Errors
    /// What could not be written. Also a folder at this place that holds something else than a plan.
    pub fn write(&self, folder: &Path) -> Result<(), PlanError> {
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| PlanError::Io { path, source }
        };
        if folder.exists() && !folder.join(MANIFEST).is_file() {
            let full = !folder.is_dir() || std::fs::read_dir(folder).map_err(io(folder))?.next().is_some();
            if full {
                return Err(PlanError::Invalid {
                    path: folder.to_path_buf(),
                    what: "is there already and is no plan; choose another -o".into(),
                });
            }
        }
        let parent = match folder.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        std::fs::create_dir_all(&parent).map_err(io(&parent))?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let fresh = parent.join(format!(".{name}.{}.new", std::process::id()));
        let result = self.fill(&fresh).and_then(|()| {
            if folder.exists() {
                // Only files that a plan has are removed; anything else makes the rename fail.
                let old = parent.join(format!(".{name}.{}.old", std::process::id()));
                std::fs::rename(folder, &old).map_err(io(folder))?;
                std::fs::rename(&fresh, folder).map_err(io(folder))?;
                std::fs::remove_dir_all(&old).map_err(io(&old))
            } else {
                std::fs::rename(&fresh, folder).map_err(io(folder))
            }
        });
        if result.is_err() {
            let _ = std::fs::remove_dir_all(&fresh);
        }
        result
    }

    fn fill(&self, folder: &Path) -> Result<(), PlanError> {
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).map_err(|source| PlanError::Io { path, source })
        };
        std::fs::create_dir_all(folder)
            .map_err(|source| PlanError::Io { path: folder.to_path_buf(), source })?;
        for (level, text) in &self.texts {
            write(level.file(), text.as_bytes())?;
        }
        write(OBJECT, &self.object)?;
        write(MANIFEST, self.plan.to_json().as_bytes())
    }
}
