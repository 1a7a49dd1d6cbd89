//! From a description of a model to a plan: the passes in order, and the folder that they end in.

#[cfg(feature = "llvm")]
mod cpu;
mod cuda;

pub use cuda::budget;

use crate::emit::cuda::CudaError;
use crate::frontends::{self, Dflash, DraftTarget};
use crate::nvrtc::NvrtcError;
use crate::passes::shard::{ShardError, shard};
use crate::passes::{precision, tile};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilec_ir::graph::{Graph, GraphError, RopeSpec, verify};
use tilec_ir::launch::{LAUNCH_ROWS, SLICE_ROWS};
use tilec_ir::plan::{MANIFEST, Plan, PlanError, PlanFile, PlanLimits, WeightsFrom};
use tilec_ir::spec::{Device, ModelSpec, Precision, SpecError};
use tilec_ir::tensor::TensorInfo;
use tilec_ir::validate::Violation;
use tilec_kernels_gen::KernelError;

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
    /// The draft that the spec asks for.
    pub draft: Option<DraftInput<'a>>,
}

/// A draft's checkpoint.
#[derive(Clone, Debug)]
pub struct DraftInput<'a> {
    /// Its config.json.
    pub config: &'a serde_json::Value,
    /// Its tensors, by their own names.
    pub tensors: &'a BTreeMap<String, TensorInfo>,
    /// Where the runtime will find the weights.
    pub weights: WeightsFrom,
}

/// A draft as the compiler knows it, beside its target's graph.
#[derive(Clone, Debug)]
pub struct DraftGraphs {
    /// Its config.
    pub draft: Dflash,
    /// Turns taps of the target into the draft's context.
    pub inject: Graph,
    /// Guesses a block.
    pub block: Graph,
    /// Rows of a block at most, as the spec asks for or the draft was trained with.
    pub rows: usize,
}

/// What the machine that compiles brings along.
#[derive(Clone, Debug)]
pub struct Host {
    /// Workers of a plan for the CPU where the spec leaves their number open.
    pub threads: usize,
    /// Where compiled GPU kernels are kept; `None` compiles every time.
    pub cubins: Option<PathBuf>,
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
    /// Stages of the resident kernel.
    Resident,
    /// CUDA C++ of the resident kernel.
    Cuda,
}

impl Level {
    /// All levels in the order that they are made.
    pub const ALL: [Level; 7] = [
        Level::Graph,
        Level::Fused,
        Level::Stages,
        Level::Schedule,
        Level::Llvm,
        Level::Resident,
        Level::Cuda,
    ];

    /// The name that `--emit` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Graph => "graph",
            Level::Fused => "fused",
            Level::Stages => "stages",
            Level::Schedule => "schedule",
            Level::Llvm => "llvm",
            Level::Resident => "resident",
            Level::Cuda => "cuda",
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
            Level::Resident => "resident.txt",
            Level::Cuda => "kernel.cu",
        }
    }
}

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
    #[cfg(feature = "llvm")]
    #[error(transparent)]
    Emit(#[from] crate::emit::llvm::EmitError),
    /// The model has no resident kernel.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The kernel could not be compiled.
    #[error(transparent)]
    Nvrtc(#[from] NvrtcError),
    /// The compiler for the CPU was left out of this build.
    #[error(
        "target.device is cpu, but this tilec was built without LLVM; build it with the feature `llvm`, or set target.device to cuda"
    )]
    WithoutLlvm,
    /// A larger block than the draft or the step has.
    #[error("draft.dflash.block is {block}, but {what}: lower it")]
    Block {
        /// Rows asked for.
        block: usize,
        /// What is smaller.
        what: String,
    },
    /// The draft's checkpoint is not there.
    #[error("the spec has a draft, but its checkpoint was not read")]
    NoDraft,
    /// Running on several GPUs is not built.
    #[error(
        "target.gpus is {gpus}, and running on several GPUs is not built yet: add `only_rank: 0` (up to {}) to \
         compile one rank's share for one GPU, or remove target.gpus", gpus - 1
    )]
    SeveralGpus {
        /// GPUs asked for.
        gpus: usize,
    },
    /// A rank that is none.
    #[error("{0}")]
    Rank(String),
    /// The draft's config or tensors are not those of a draft for this model.
    #[error(
        "the draft {draft}: {source}; take config.json and weights as they were published together, for this model"
    )]
    Draft {
        /// Its folder, or what it is instead.
        draft: String,
        /// What is wrong with it.
        source: frontends::FrontendError,
    },
    /// A draft beside a shard.
    #[error(
        "a draft cannot be shared out among GPUs yet: use --no-draft, or remove `draft` or target.only_rank"
    )]
    DraftOfRank,
    /// The model has no equal shares.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Something that only another device has.
    #[error("target.{key} has no meaning on {device}; remove it")]
    Meaningless {
        /// The key in the spec.
        key: &'static str,
        /// The device.
        device: &'static str,
    },
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
    /// Native code of the plan's other programs, with the names of their files.
    pub objects: Vec<(String, Vec<u8>)>,
}

/// The model's graph, precision applied and verified: what the interpreter runs.
///
/// # Errors
/// [`CompileError`].
pub fn graph(input: &Input<'_>, spec: &ModelSpec) -> Result<Graph, CompileError> {
    Ok(graphs(input, spec)?.0)
}

/// The model's graph and those of its draft, precision applied and verified.
///
/// # Errors
/// [`CompileError`].
pub fn graphs(input: &Input<'_>, spec: &ModelSpec) -> Result<(Graph, Option<DraftGraphs>), CompileError> {
    check_ranks(spec)?;
    let mut graph = frontends::build(input.config, input.tensors)?;
    graph.name = input.name.to_string();
    let draft = match (&spec.draft, &input.draft) {
        (None, _) => None,
        (Some(_), None) => return Err(CompileError::NoDraft),
        (Some(asked), Some(input_draft)) => {
            let facts = frontends::facts(input.config)?;
            let target = DraftTarget { vocab: facts.vocab, hidden: facts.hidden, layers: facts.layers };
            let place = match &input_draft.weights {
                WeightsFrom::Checkpoint { path } => path.display().to_string(),
                WeightsFrom::Synthetic { .. } => "with made-up weights".to_string(),
            };
            let wrong = |source| CompileError::Draft { draft: place.clone(), source };
            let mut draft = Dflash::parse(input_draft.config, target).map_err(wrong)?;
            if let Some(theta) = asked.dflash.context_rope_theta {
                draft.context_rope = Some(RopeSpec { theta: theta as f64, ..draft.rope.clone() });
            }
            let rows = block_rows(&draft, asked.dflash.block, spec)?;
            draft.tap(&mut graph).map_err(wrong)?;
            let mut inject = draft.inject(input_draft.tensors).map_err(wrong)?;
            let mut block = draft.block(input_draft.tensors, &graph).map_err(wrong)?;
            // A draft has no experts, and the context none of the target's matrices.
            let of_block = Precision { experts: None, ..spec.precision };
            let of_inject = Precision { embedding: None, head: None, ..of_block };
            for (graph, precision) in [(&mut inject, of_inject), (&mut block, of_block)] {
                graph.name = format!("{} {}", input.name, graph.name);
                first(verify(graph))?;
                precision::precision(graph, &precision)?;
                first(verify(graph))?;
            }
            Some(DraftGraphs { draft, inject, block, rows })
        }
    };
    first(verify(&graph))?;
    precision::precision(&mut graph, &spec.precision)?;
    first(verify(&graph))?;
    // Behind the precision pass: what lies together depends on formats.
    if let Some(rank) = spec.target.shard() {
        graph = shard(&graph, rank)?;
    }
    Ok((graph, draft))
}

/// Refuses what cannot be shared out.
fn check_ranks(spec: &ModelSpec) -> Result<(), CompileError> {
    spec.target.check_gpus().map_err(CompileError::Rank)?;
    match (spec.target.gpus, spec.target.shard()) {
        (Some(gpus), None) if gpus > 1 => Err(CompileError::SeveralGpus { gpus }),
        (_, Some(_)) if spec.draft.is_some() => Err(CompileError::DraftOfRank),
        _ => Ok(()),
    }
}

/// Rows of a block: as many as asked for, or as the draft was trained with and a step has.
fn block_rows(draft: &Dflash, asked: Option<usize>, spec: &ModelSpec) -> Result<usize, CompileError> {
    let step = spec.limits.rows;
    // The rows of a block see each other, so that a launch has all of them.
    let launch = match spec.target.device {
        Device::Cpu => usize::MAX,
        Device::Cuda => spec.limits.pass_rows.unwrap_or(LAUNCH_ROWS),
    };
    let limits = [
        (draft.block, format!("the draft was trained with {}", draft.block)),
        (step, format!("limits.rows is {step}")),
        (launch, format!("a GPU's kernel has {launch} rows at a time")),
    ];
    for (limit, what) in &limits {
        match asked {
            Some(block) if block > *limit => return Err(CompileError::Block { block, what: what.clone() }),
            _ => {}
        }
    }
    match asked.unwrap_or(draft.block.min(step).min(launch)) {
        block @ 2.. => Ok(block),
        block => {
            Err(CompileError::Block { block, what: "a block has at least 2 rows: raise limits.rows".into() })
        }
    }
}

/// Rows that a GPU's kernel may have at a time, the best choice first: as many as asked for; or as few as have room
/// for a block, but 16 where more than 8 sequences are decoded, if that is possible.
fn pass_rows(spec: &ModelSpec, draft: Option<&DraftGraphs>) -> Vec<usize> {
    let block = draft.map_or(1, |draft| draft.rows);
    let least = SLICE_ROWS * block.div_ceil(SLICE_ROWS).next_power_of_two();
    match spec.limits.pass_rows {
        Some(rows) => vec![rows],
        None if spec.limits.sequences > SLICE_ROWS && least == SLICE_ROWS => vec![2 * SLICE_ROWS, least],
        None => vec![least],
    }
}

fn first(result: Result<(), Vec<GraphError>>) -> Result<(), GraphError> {
    result.map_err(|mut errors| errors.swap_remove(0))
}

/// Compiles a model for the device that `spec.target` names.
///
/// # Errors
/// [`CompileError`].
pub fn compile(input: &Input<'_>, spec: &ModelSpec, host: &Host) -> Result<Compiled, CompileError> {
    match spec.target.device {
        #[cfg(feature = "llvm")]
        Device::Cpu => cpu::compile(input, spec, host.threads),
        #[cfg(not(feature = "llvm"))]
        Device::Cpu => Err(CompileError::WithoutLlvm),
        Device::Cuda if spec.target.shard().is_some() && spec.draft.is_some() => {
            Err(CompileError::DraftOfRank)
        }
        Device::Cuda => cuda::compile(input, spec, host.cubins.as_deref()),
    }
}

fn limits(input: &Input<'_>, spec: &ModelSpec) -> Result<PlanLimits, CompileError> {
    Ok(PlanLimits {
        max_rows: spec.limits.rows,
        sequences: spec.limits.sequences,
        context: spec.limits.context(frontends::max_context(input.config)?)?,
    })
}

fn plan_file(name: &str, bytes: &[u8]) -> PlanFile {
    PlanFile { file: name.to_string(), sha256: sha256(bytes) }
}

fn level_files(texts: &[(Level, String)]) -> Vec<PlanFile> {
    texts.iter().map(|(level, text)| plan_file(level.file(), text.as_bytes())).collect()
}

/// A plan that every reader accepts.
fn verified(plan: Plan) -> Result<Plan, CompileError> {
    plan.verify().map_err(|what| PlanError::Invalid { path: MANIFEST.into(), what })?;
    Ok(plan)
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
        write(&self.plan.code.file, &self.object)?;
        for (name, object) in &self.objects {
            write(name, object)?;
        }
        write(MANIFEST, self.plan.to_json().as_bytes())
    }
}
