//! What a MODEL argument means: a plan, or something that is compiled into one on the way.

// Without a compiler nothing uses what prepares a compilation.

use crate::args::TargetArgs;
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilec_codegen::frontends;
use tilec_ir::format::Format;
use tilec_ir::plan::{MANIFEST, Plan, WeightsFrom};
use tilec_ir::spec::{self, ModelSpec, WeightFormat};
use tilec_ir::tensor::TensorInfo;
use tilec_runtime::checkpoint::Checkpoint;

/// What lies at the path of a MODEL argument.
pub enum Source {
    /// The folder of a compiled plan.
    Plan(PathBuf),
    /// Something to compile.
    Model(Box<Model>),
}

impl Source {
    /// Looks at a path.
    ///
    /// # Errors
    /// When there is nothing, or nothing that is understood.
    pub fn find(path: &Path) -> Result<Source> {
        let kind = std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if kind.is_dir() {
            let has = |name: &str| path.join(name).is_file();
            return if has(MANIFEST) {
                Ok(Source::Plan(path.to_path_buf()))
            } else if has("model.yaml") {
                // Before config.json: a model.yaml of synthetic weights has one beside it.
                Ok(Source::Model(Box::new(Model::of_yaml(&path.join("model.yaml"))?)))
            } else if has("config.json") || holds_gguf(path) {
                Ok(Source::Model(Box::new(Model::of_checkpoint(path))))
            } else {
                bail!(
                    "{} is no plan (it has no {MANIFEST}) and no checkpoint (it has neither config.json nor \
                     a .gguf file), and has no model.yaml",
                    path.display()
                )
            };
        }
        match extension.to_ascii_lowercase().as_str() {
            "yaml" | "yml" => Ok(Source::Model(Box::new(Model::of_yaml(path)?))),
            "gguf" => Ok(Source::Model(Box::new(Model::of_checkpoint(path)))),
            _ if path.file_name().is_some_and(|name| name == MANIFEST) => Ok(Source::Plan(folder_of(path))),
            "safetensors" | "json" if folder_of(path).join("config.json").is_file() => {
                bail!("{} is one file of a checkpoint: give its folder", path.display())
            }
            _ => bail!(
                "{} is not understood: give a plan folder, a model.yaml, a checkpoint folder or a .gguf file",
                path.display()
            ),
        }
    }
}

/// Whether a folder has a `.gguf` file in it.
fn holds_gguf(folder: &Path) -> bool {
    holds(folder, "gguf")
}

/// Whether a folder has weights as Hugging Face has them.
fn holds_safetensors(folder: &Path) -> bool {
    holds(folder, "safetensors")
}

fn holds(folder: &Path, wanted: &str) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .any(|path| path.extension().is_some_and(|extension| extension == wanted))
}

fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// A model that is not compiled yet.
pub struct Model {
    /// Name, for people and files.
    pub name: String,
    /// What is asked for.
    pub spec: ModelSpec,
    /// Whether nothing but the command line says what for: there is no model.yaml.
    bare: bool,
}

/// What compiling reads of a checkpoint.
pub struct Description {
    /// In the form of Hugging Face's config.json.
    pub config: Value,
    /// Shapes and stored formats.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// Where the runtime finds the weights.
    pub weights: WeightsFrom,
    /// A tokenizer that the spec names in place of the checkpoint's.
    pub tokenizer: Option<PathBuf>,
    /// The draft that the spec names.
    pub draft: Option<DraftDescription>,
}

/// What compiling reads of a draft's checkpoint.
pub struct DraftDescription {
    config: Value,
    tensors: BTreeMap<String, TensorInfo>,
    weights: WeightsFrom,
}

impl DraftDescription {
    /// `made_up` has the seed, the config and the format of a target with synthetic weights: a draft's folder
    /// without weights then means synthetic ones as well.
    fn read(draft: &spec::Draft, made_up: Option<(u64, &Value, Format)>) -> Result<DraftDescription> {
        let path = &draft.dflash.checkpoint;
        if let Some((seed, target, format)) = made_up
            && !holds_safetensors(path)
        {
            let config = read_json(&path.join("config.json")).context("cannot read the draft")?;
            let tensors = frontends::synthetic_draft_tensors(&config, target, format)?;
            // Weights depend on their names, which are the target's in part.
            let seed = seed.wrapping_add(1);
            let weights = WeightsFrom::Synthetic { seed, config: config.clone(), tensors: tensors.clone() };
            return Ok(DraftDescription { config, tensors, weights });
        }
        let checkpoint = Checkpoint::open_draft(path).context("cannot read the draft")?;
        Ok(DraftDescription {
            config: checkpoint.config().clone(),
            tensors: checkpoint.tensors().clone(),
            weights: WeightsFrom::Checkpoint { path: absolute(path)? },
        })
    }
}

impl Model {
    fn of_yaml(path: &Path) -> Result<Model> {
        // `examples/smollm2/model.yaml` is called smollm2.
        let named = match path.file_stem().and_then(|stem| stem.to_str()) {
            Some("model") | None => std::path::absolute(folder_of(path))?,
            Some(_) => path.with_extension(""),
        };
        Ok(Model { name: name_of(&named), spec: ModelSpec::load(path)?, bare: false })
    }

    fn of_checkpoint(path: &Path) -> Model {
        let whole = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        let named = if path.is_file() { whole.with_extension("") } else { whole };
        Model { name: name_of(&named), spec: ModelSpec::for_checkpoint(path), bare: true }
    }

    /// Lets options of the command line override the spec.
    pub fn apply(&mut self, args: &TargetArgs) {
        let ModelSpec { precision, target, limits, draft, .. } = &mut self.spec;
        let size = |value: u64| value as usize;
        if let Some(threads) = args.threads {
            target.threads = Some(size(threads));
        }
        if let Some(context) = args.ctx_size {
            limits.context = Some(size(context));
        }
        if let Some(device) = args.device
            && device != target.device
        {
            target.device = device;
            target.arch = spec::Target::default_arch(device).into();
            if device == spec::Device::Cpu {
                (target.gpus, target.only_rank) = (None, None);
            }
        }
        if let Some(arch) = &args.arch {
            // What follows `device` is worth a name of its own; `cpu` means the processor at hand.
            target.arch = if arch == "cpu" { spec::Target::HOST.into() } else { arch.clone() };
        }
        if let Some(gpus) = args.gpus {
            target.gpus = Some(size(gpus));
        }
        if let Some(rank) = args.only_rank {
            target.only_rank = Some(size(rank));
        }
        if let Some(rows) = args.max_rows {
            limits.rows = size(rows);
        }
        if let Some(rows) = args.pass_rows {
            limits.pass_rows = Some(size(rows));
        }
        if let Some(sequences) = args.sequences {
            limits.sequences = size(sequences);
        }
        if let Some(checkpoint) = &args.draft {
            let settings = draft.as_ref().map(|draft| &draft.dflash);
            let (block, context_rope_theta) =
                settings.map_or((None, None), |own| (own.block, own.context_rope_theta));
            let checkpoint = checkpoint.clone();
            *draft = Some(spec::Draft { dflash: spec::DflashSpec { checkpoint, block, context_rope_theta } });
        }
        precision.kv_cache = args.kv_cache_type.or(precision.kv_cache);
        precision.weights = args.weights.unwrap_or(precision.weights);
        precision.activations = args.activations.unwrap_or(precision.activations);
    }

    /// Reads what compiling needs to know of the weights.
    ///
    /// # Errors
    /// When the checkpoint or the config cannot be read.
    pub fn describe(&self) -> Result<Description> {
        let config = self.spec.model.config.as_deref().map(read_json).transpose()?;
        let tokenizer = self.spec.model.tokenizer.as_deref().map(absolute).transpose()?;
        let draft = |made_up| {
            self.spec.draft.as_ref().map(|draft| DraftDescription::read(draft, made_up)).transpose()
        };
        match &self.spec.model.source {
            spec::Source::Checkpoint(path) => {
                let draft = draft(None)?;
                let checkpoint = Checkpoint::open(path)?;
                Ok(Description {
                    config: config.unwrap_or_else(|| checkpoint.config().clone()),
                    tensors: checkpoint.tensors().clone(),
                    weights: WeightsFrom::Checkpoint { path: absolute(path)? },
                    tokenizer,
                    draft,
                })
            }
            spec::Source::Synthetic { seed } => {
                let config = config.context("synthetic weights need model.config")?;
                let tensors = match self.spec.precision.weights {
                    WeightFormat::AsStored => frontends::published_tensors(&config)?,
                    WeightFormat::Converted(format) => frontends::synthetic_tensors(&config, format)?,
                };
                let format = match self.spec.precision.weights {
                    WeightFormat::AsStored => Format::BF16,
                    WeightFormat::Converted(format) => format,
                };
                let draft = draft(Some((*seed, &config, format)))?;
                let weights =
                    WeightsFrom::Synthetic { seed: *seed, config: config.clone(), tensors: tensors.clone() };
                Ok(Description { config, tensors, weights, tokenizer, draft })
            }
        }
    }

    /// Compiles.
    ///
    /// # Errors
    /// When the checkpoint cannot be read or the model does not compile.
    pub fn compile(&self) -> Result<tilec_codegen::compile::Compiled> {
        self.compile_described(&self.describe()?)
    }

    fn compile_described(&self, model: &Description) -> Result<tilec_codegen::compile::Compiled> {
        let start = std::time::Instant::now();
        let compiled = tilec_codegen::compile::compile(&self.input(model), &self.spec, &self.host())
            .with_context(|| format!("cannot compile {}", self.name))?;
        tracing::info!("compiled {} in {:.2} s", self.name, start.elapsed().as_secs_f64());
        Ok(compiled)
    }

    fn host(&self) -> tilec_codegen::compile::Host {
        let cubins = cache_folder().ok().map(|folder| folder.join("cubins"));
        tilec_codegen::compile::Host { threads: host::physical_cores(), cubins }
    }

    /// The graph, with the precision that the spec asks for.
    ///
    /// # Errors
    /// When the frontend or the precision pass refuses the model.
    pub fn graph(&self, model: &Description) -> Result<tilec_ir::graph::Graph> {
        let input = self.input(model);
        tilec_codegen::compile::graph(&input, &self.spec)
            .with_context(|| format!("cannot compile {}", self.name))
    }

    fn input<'a>(&'a self, model: &'a Description) -> tilec_codegen::compile::Input<'a> {
        tilec_codegen::compile::Input {
            name: &self.name,
            config: &model.config,
            tensors: &model.tensors,
            weights: model.weights.clone(),
            tokenizer: model.tokenizer.clone(),
            draft: model.draft.as_ref().map(|draft| tilec_codegen::compile::DraftInput {
                config: &draft.config,
                tensors: &draft.tensors,
                weights: draft.weights.clone(),
            }),
        }
    }

    /// The folder of this model's plan in the cache; compiled if it is not there.
    fn cached_plan(&self) -> Result<PathBuf> {
        let description = self.describe()?;
        let folder = cache_folder()?.join("plans").join(format!("{}-{}", self.name, self.key(&description)?));
        // A plan that cannot be read (damaged, say) is made again.
        if Plan::load(&folder).is_ok() {
            tracing::info!("the plan is {}", folder.display());
            return Ok(folder);
        }
        ui::note(format!("compiling {} -> {}", self.name, folder.display()));
        let written = self.compile_described(&description)?.write(&folder);
        match Plan::load(&folder) {
            // Another process may have put the same plan there first.
            Ok(_) => Ok(folder),
            Err(unreadable) => {
                written?;
                Err(unreadable.into())
            }
        }
    }

    /// Names everything that a plan follows from, the compiler included.
    fn key(&self, model: &Description) -> Result<String> {
        use sha2::{Digest, Sha256};
        let program = std::env::current_exe().and_then(std::fs::metadata);
        let program = program.context("cannot look at the tilec program itself")?;
        let built = program.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let spec = &self.spec;
        let everything = serde_json::json!([
            [env!("CARGO_PKG_VERSION"), program.len(), built.as_nanos().to_string()],
            [spec.precision, spec.target, spec.limits],
            [self.name, model.config, model.tensors, model.weights, model.tokenizer],
            [spec.draft, model.draft.as_ref().map(|draft| (&draft.config, &draft.tensors, &draft.weights))],
            [host::cpu_name(), host::cpu_features(), host::physical_cores()],
        ]);
        let digest = Sha256::digest(everything.to_string());
        Ok(digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect())
    }
}

/// The folder and the manifest of the plan that a MODEL argument means. A model that is no plan is
/// compiled into the cache; `tune` may change what for, where neither a model.yaml nor an option says.
///
/// # Errors
/// When there is no such model, it does not compile, or the plan does not fit the options.
pub fn plan(path: &Path, target: &TargetArgs) -> Result<(PathBuf, Plan)> {
    let folder = match Source::find(path)? {
        Source::Plan(folder) => folder,
        Source::Model(mut model) => {
            if model.bare {
                // A command serves one sequence; memory for more would lie idle.
                model.spec.limits.sequences = 1;
            }
            model.apply(target);
            let folder = model.cached_plan()?;
            let plan = Plan::load(&folder)?;
            return Ok((folder, plan));
        }
    };
    let plan = Plan::load(&folder)?;
    if let Some(option) = target.given() {
        bail!(
            "{} is compiled already, so {option} comes too late: give it to `tilec compile`",
            folder.display()
        );
    }
    match target.threads {
        Some(threads) if threads != plan.target.workers as u64 => bail!(
            "{} is compiled for {} threads, not {threads}: compile it again with --threads {threads}",
            folder.display(),
            plan.target.workers
        ),
        _ => Ok((folder, plan)),
    }
}

/// Opens the weights that a plan names.
///
/// # Errors
/// When the checkpoint cannot be read.
pub fn open_weights(weights: &WeightsFrom) -> Result<Checkpoint> {
    Ok(match weights {
        WeightsFrom::Checkpoint { path } => Checkpoint::open(path)?,
        WeightsFrom::Synthetic { seed, config, tensors } => {
            Checkpoint::synthetic(config.clone(), *seed, tensors.clone())
        }
    })
}

/// The folder for compiled plans: `TILEC_CACHE`, else `~/.cache/tilec`.
///
/// # Errors
/// When the environment names neither.
pub fn cache_folder() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("TILEC_CACHE")
        .or_else(|| set("HOME").map(|home| home.join(".cache/tilec")))
        .context("neither TILEC_CACHE nor HOME is set: set TILEC_CACHE to a folder for compiled plans")
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).with_context(|| format!("cannot open {}", path.display()))
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).with_context(|| format!("cannot open {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))
}

/// The last part of a path, fit for a file name.
fn name_of(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let name: String = name.chars().map(|c| if c.is_control() || c == '/' { '-' } else { c }).collect();
    if name.is_empty() { "model".into() } else { name }
}
