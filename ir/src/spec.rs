//! `model.yaml`: which weights, in which precision, for which machine, within which limits.
//!
//! Every key has a default but the source of the weights, and an unknown key is an error that shows
//! the line and the keys that are accepted. `examples/model.schema.json` is [`json_schema`] for
//! editors.

use crate::abi::KvType;
use crate::format::Format;
use crate::launch::LAUNCH_ROWS;
use crate::resident::is_step_rows;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Deserializer, Error as _, Unexpected, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::borrow::Cow;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Context that is planned for when the spec names none and the model allows it.
pub const DEFAULT_CONTEXT: usize = 4096;

/// A whole `model.yaml`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "tilec model.yaml")]
pub struct ModelSpec {
    /// Where the weights and the architecture come from.
    #[schemars(with = "RawModel")]
    pub model: Model,
    /// Formats of weights, activations and KV cache.
    #[serde(default)]
    pub precision: Precision,
    /// The machine that is compiled for.
    #[serde(default)]
    #[schemars(with = "RawTarget")]
    pub target: Target,
    /// Sizes that the plan is made for.
    #[serde(default)]
    pub limits: Limits,
    /// A small model that guesses tokens ahead; by default none.
    #[serde(default)]
    pub draft: Option<Draft>,
}

/// The `draft` section: what guesses tokens ahead for the model to verify. The text is the same as
/// without it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Draft {
    /// A DFlash draft: it fills a block of masks in one pass, from the model's own residual streams.
    pub dflash: DflashSpec,
}

/// A DFlash draft.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DflashSpec {
    /// The draft's folder with config.json and *.safetensors, relative to this file. Beside a model with
    /// synthetic weights config.json is enough. `~`, `${NAME}` and `${NAME:-default}` are expanded.
    #[serde(deserialize_with = "expanded")]
    #[schemars(with = "String")]
    pub checkpoint: PathBuf,
    /// Rows of a block, the last known token included: at most that many tokens are committed at a time.
    /// By default, and at most, as many as the draft was trained with.
    #[serde(default, deserialize_with = "block", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = MAX_BLOCK))]
    pub block: Option<usize>,
    /// Base of the rotary embedding of the context's keys, where it is not the draft's own `rope_theta`:
    /// drafts are known of which loaders disagree. Try it if guesses are hardly ever right.
    #[serde(
        default,
        deserialize_with = "some_count::<_, 1_000_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub context_rope_theta: Option<usize>,
}

/// A number of rows from 2 up.
fn block<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    match some_count::<_, MAX_BLOCK>(deserializer)? {
        Some(1) => {
            let what = format!("a block of 1 row guesses nothing: use a number from 2 to {MAX_BLOCK}");
            Err(D::Error::custom(what))
        }
        block => Ok(block),
    }
}

/// Most rows of a draft's block.
pub const MAX_BLOCK: usize = 64;

/// A path with variables.
fn expanded<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.trim().is_empty() {
        return Err(D::Error::custom("the path is empty"));
    }
    expand(&text, &|name| std::env::var(name).ok()).map(PathBuf::from).map_err(D::Error::custom)
}

/// Where the weights come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder with `config.json` and `*.safetensors`, or a `.gguf` file.
    Checkpoint(PathBuf),
    /// Random weights of the shapes that the config implies.
    Synthetic {
        /// Start of the random sequence: the same seed gives the same weights.
        seed: u64,
    },
}

/// The `model` section. Paths are relative to `model.yaml` in the file and resolved after
/// [`ModelSpec::load`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawModel")]
pub struct Model {
    /// The weights.
    pub source: Source,
    /// The architecture, in the form of Hugging Face's `config.json`; `None`: what the checkpoint says.
    pub config: Option<PathBuf>,
    /// `tokenizer.json`; `None`: the one in the checkpoint, if any.
    pub tokenizer: Option<PathBuf>,
}

/// Where the weights and the architecture come from: `checkpoint`, or `synthetic` with `config`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Model")]
struct RawModel {
    /// A checkpoint folder or a .gguf file, relative to this file. `~`, `${NAME}` and
    /// `${NAME:-default}` are expanded.
    checkpoint: Option<String>,
    /// Random weights in place of a checkpoint.
    synthetic: Option<Synthetic>,
    /// config.json, relative to this file; by default the checkpoint's own.
    config: Option<String>,
    /// tokenizer.json, relative to this file; by default the checkpoint's own.
    tokenizer: Option<String>,
}

/// Random weights in place of a checkpoint.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Synthetic {
    /// Start of the random sequence.
    seed: u64,
}

impl TryFrom<RawModel> for Model {
    type Error = String;

    fn try_from(raw: RawModel) -> Result<Model, String> {
        let path = |key: &str, text: Option<String>| match text {
            Some(text) if text.trim().is_empty() => Err(format!("model.{key} is empty: give a path")),
            Some(text) => expand(&text, &|name| std::env::var(name).ok())
                .map(|path| Some(PathBuf::from(path)))
                .map_err(|problem| format!("model.{key}: {problem}")),
            None => Ok(None),
        };
        let checkpoint = path("checkpoint", raw.checkpoint)?;
        let config = path("config", raw.config)?;
        let tokenizer = path("tokenizer", raw.tokenizer)?;
        let source = match (checkpoint, raw.synthetic) {
            (Some(checkpoint), None) => Source::Checkpoint(checkpoint),
            (None, Some(Synthetic { seed })) => Source::Synthetic { seed },
            (Some(_), Some(_)) => {
                return Err("model has both checkpoint and synthetic: keep one of them".into());
            }
            (None, None) => {
                return Err("model has no weights: add `checkpoint: PATH` or `synthetic: {seed: 1}`".into());
            }
        };
        if config.is_none() && matches!(source, Source::Synthetic { .. }) {
            return Err("synthetic weights need an architecture: add `config: config.json`".into());
        }
        Ok(Model { source, config, tokenizer })
    }
}

/// Replaces `${NAME}` and `${NAME:-default}`, then a leading `~/`. As in a shell, the default also
/// stands in for a variable that is empty; unlike there, a variable without either is an error.
fn expand(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once("${") {
        out.push_str(before);
        let Some((inner, after)) = behind.split_once('}') else {
            return Err(format!("`${{` without `}}` in {text:?}"));
        };
        let (name, default) = match inner.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inner, None),
        };
        let is_name = |c: char| c == '_' || c.is_ascii_alphanumeric();
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(format!("`${{{inner}}}` is no `${{NAME}}` or `${{NAME:-default}}`"));
        }
        match (variable(name).filter(|value| !value.is_empty()), default) {
            (Some(value), _) => out.push_str(&value),
            (None, Some(default)) => out.push_str(default),
            (None, None) => {
                return Err(format!("{name} is not set: set it, or write `${{{name}:-default}}`"));
            }
        }
        rest = after;
    }
    out.push_str(rest);
    if out != "~" && !out.starts_with("~/") {
        return Ok(out);
    }
    match variable("HOME").filter(|home| !home.is_empty()) {
        Some(home) => Ok(format!("{home}{}", &out[1..])),
        None => Err(format!("HOME is not set: write {out:?} without `~`")),
    }
}

/// The format that a class of weights is read in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// That of the checkpoint.
    #[default]
    AsStored,
    /// Converted when the weights are packed.
    Converted(Format),
}

impl WeightFormat {
    const AS_STORED: &str = "as-stored";

    /// Every spelling, in the order that help texts list them.
    pub fn names() -> impl Iterator<Item = &'static str> {
        std::iter::once(Self::AS_STORED).chain(Format::NAMED.iter().map(|(name, _)| *name))
    }

    /// The format that weights stored in `stored` are read in.
    pub fn applied_to(self, stored: Format) -> Format {
        match self {
            WeightFormat::AsStored => stored,
            WeightFormat::Converted(format) => format,
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightFormat::AsStored => f.write_str(Self::AS_STORED),
            WeightFormat::Converted(format) => format.fmt(f),
        }
    }
}

impl Serialize for WeightFormat {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WeightFormat {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WeightFormat, D::Error> {
        let name = String::deserialize(deserializer)?;
        if name == WeightFormat::AS_STORED {
            return Ok(WeightFormat::AsStored);
        }
        Format::by_name(&name).map(WeightFormat::Converted).ok_or_else(|| {
            let names: Vec<&str> = WeightFormat::names().collect();
            D::Error::custom(format!("no weight format is called {name:?}: use one of {}", names.join(", ")))
        })
    }
}

impl JsonSchema for WeightFormat {
    fn schema_name() -> Cow<'static, str> {
        "WeightFormat".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names: Vec<&str> = WeightFormat::names().collect();
        json_schema!({
            "description": "as-stored: the checkpoint's own format; otherwise converted when packed.",
            "type": "string",
            "enum": names,
        })
    }
}

/// What linear layers read their inputs as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// int8 in front of weights with integer codes in blocks of 16 or 32, f32 in front of others.
    #[default]
    Auto,
    /// Signed bytes in blocks of 32 with a float32 scale; an error if a weight does not allow it.
    Int8,
    /// IEEE single.
    F32,
}

/// The `precision` section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Precision {
    /// All matrices that no other key names.
    pub weights: WeightFormat,
    /// The token embedding; by default what `weights` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding: Option<WeightFormat>,
    /// The projections of attention; by default what `weights` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention: Option<WeightFormat>,
    /// The routed experts of a mixture; by default what `weights` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts: Option<WeightFormat>,
    /// The output head; by default what `weights` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head: Option<WeightFormat>,
    /// Elements of the KV cache; by default f16.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "kv_schema")]
    pub kv_cache: Option<KvType>,
    /// Inputs of linear layers.
    pub activations: Activations,
}

fn kv_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "enum": ["f32", "f16", "bf16"] })
}

impl Precision {
    /// Element type of the KV cache.
    pub fn kv_type(&self) -> KvType {
        self.kv_cache.unwrap_or(KvType::F16)
    }
}

/// What runs the plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// Native code on the processor.
    #[default]
    Cpu,
    /// One resident kernel on one or more GPUs.
    Cuda,
}

/// The `target` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawTarget")]
pub struct Target {
    /// What runs the plan.
    pub device: Device,
    /// An LLVM processor name or `host` (cpu), or an architecture such as `sm_90a` (cuda).
    pub arch: String,
    /// Worker threads (cpu); `None`: one per physical core.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// GPUs (cuda) that share the model; `None`: one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpus: Option<usize>,
    /// The one rank of these whose share is compiled, to run alone on one GPU; below `gpus`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub only_rank: Option<usize>,
}

/// One rank of several that share a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are, at least 2.
    pub ranks: usize,
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank, self.ranks)
    }
}

/// The machine that is compiled for.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Target")]
struct RawTarget {
    /// What runs the plan.
    device: Device,
    /// cpu: `host` (the default) or an LLVM processor name such as haswell or x86-64-v4.
    /// cuda: an architecture, by default sm_90a.
    arch: Option<String>,
    /// Worker threads (cpu only), by default one per physical core.
    threads: Option<Count<1024>>,
    /// GPUs (cuda only) that share the model. With more than one, `only_rank` has to be set: running on
    /// several GPUs is not built yet.
    gpus: Option<Count<8>>,
    /// The one rank (0 to `gpus` - 1) whose share of the model is compiled, to run and be measured alone on
    /// one GPU. What the other ranks would add is left out: its speed means something, its text nothing.
    #[schemars(range(min = 0, max = 7))]
    only_rank: Option<usize>,
}

impl Target {
    /// The processor of the machine that compiles.
    pub const HOST: &str = "host";

    /// The rank whose share is compiled; `None` if it is the whole model.
    pub fn shard(&self) -> Option<Shard> {
        let ranks = self.gpus.filter(|gpus| *gpus > 1)?;
        self.only_rank.map(|rank| Shard { rank, ranks })
    }

    /// Whether GPUs have a meaning, and there is a rank of that number.
    ///
    /// # Errors
    /// In words.
    pub fn check_gpus(&self) -> Result<(), String> {
        let key = if self.gpus.is_some() { "gpus" } else { "only_rank" };
        match (self.only_rank, self.gpus) {
            (None, None) => Ok(()),
            _ if self.device == Device::Cpu => {
                Err(format!("target.{key} has no meaning with `device: cpu`: remove it"))
            }
            (Some(rank), None) => {
                Err(format!("target.only_rank {rank} is one of how many? add target.gpus, such as `gpus: 8`"))
            }
            (Some(rank), Some(gpus)) if rank >= gpus => {
                Err(format!("target.only_rank {rank} is none of {gpus} GPUs: use 0 to {}", gpus - 1))
            }
            _ => Ok(()),
        }
    }

    /// The architecture where none is named.
    pub const fn default_arch(device: Device) -> &'static str {
        match device {
            Device::Cpu => Target::HOST,
            Device::Cuda => "sm_90a",
        }
    }
}

impl Default for Target {
    fn default() -> Target {
        Target { device: Device::Cpu, arch: Target::HOST.into(), threads: None, gpus: None, only_rank: None }
    }
}

impl TryFrom<RawTarget> for Target {
    type Error = String;

    fn try_from(raw: RawTarget) -> Result<Target, String> {
        let arch = raw.arch.unwrap_or_else(|| Target::default_arch(raw.device).into());
        match raw.device {
            _ if arch.is_empty() => Err("target.arch is empty: leave it out, or name an architecture".into()),
            Device::Cpu if arch.starts_with("sm_") => {
                Err(format!("target.arch {arch} is a GPU's: write `device: cuda`, or use `arch: host`"))
            }
            Device::Cuda if !arch.starts_with("sm_") => {
                Err(format!("target.arch {arch} is no GPU's: use one such as sm_90a"))
            }
            Device::Cuda if raw.threads.is_some() => {
                Err("target.threads has no meaning with `device: cuda`: remove it".into())
            }
            device => {
                let (threads, gpus) = (raw.threads.map(|n| n.0), raw.gpus.map(|n| n.0));
                let target = Target { device, arch, threads, gpus, only_rank: raw.only_rank };
                target.check_gpus()?;
                Ok(target)
            }
        }
    }
}

/// The `limits` section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sequences that are decoded side by side.
    #[serde(deserialize_with = "count::<_, 1024>")]
    #[schemars(range(min = 1, max = 1024))]
    pub sequences: usize,
    /// Positions of a sequence, prompt included; by default the model's maximum or 4096, whichever
    /// is less.
    #[serde(deserialize_with = "some_count::<_, 16_777_216>", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub context: Option<usize>,
    /// Tokens that one step takes at most, over all sequences.
    #[serde(deserialize_with = "count::<_, 1024>")]
    #[schemars(range(min = 1, max = 1024))]
    pub rows: usize,
    /// Rows for which a GPU reads the weights once: 8, 16 or 32, a token of any sequence each. Longer steps are
    /// several passes. More of them make a kernel larger, which costs a step of few rows a little. By default 8, or as
    /// many as a draft's block needs.
    #[serde(deserialize_with = "pass_rows", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 8, max = 32))]
    pub pass_rows: Option<usize>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { sequences: 4, context: None, rows: 64, pass_rows: None }
    }
}

impl Limits {
    /// The context to plan for, given the longest that the model is made for.
    ///
    /// # Errors
    /// [`SpecError::Context`] when the spec asks for more than that.
    pub fn context(&self, model_max: usize) -> Result<usize, SpecError> {
        match self.context {
            Some(context) if context > model_max => Err(SpecError::Context { context, model_max }),
            Some(context) => Ok(context),
            None => Ok(model_max.min(DEFAULT_CONTEXT)),
        }
    }
}

/// A number from 1 to `MAX`.
struct Count<const MAX: usize>(usize);

impl<'de, const MAX: usize> Deserialize<'de> for Count<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InRange(RangeInclusive<u64>);

        impl Visitor<'_> for InRange {
            type Value = u64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a number from {} to {}", self.0.start(), self.0.end())
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<u64, E> {
                if self.0.contains(&value) {
                    Ok(value)
                } else {
                    Err(E::invalid_value(Unexpected::Unsigned(value), &self))
                }
            }
        }
        let value = deserializer.deserialize_u64(InRange(1..=MAX as u64))?;
        Ok(Count(value as usize))
    }
}

impl<const MAX: usize> JsonSchema for Count<MAX> {
    fn schema_name() -> Cow<'static, str> {
        format!("CountTo{MAX}").into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": 1, "maximum": MAX })
    }
}

fn count<'de, D: Deserializer<'de>, const MAX: usize>(deserializer: D) -> Result<usize, D::Error> {
    Count::<MAX>::deserialize(deserializer).map(|count| count.0)
}

fn some_count<'de, D: Deserializer<'de>, const MAX: usize>(
    deserializer: D,
) -> Result<Option<usize>, D::Error> {
    Ok(Option::<Count<MAX>>::deserialize(deserializer)?.map(|count| count.0))
}

fn pass_rows<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    match Option::<Count<LAUNCH_ROWS>>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Count(rows)) if is_step_rows(rows) => Ok(Some(rows)),
        Some(Count(rows)) => Err(D::Error::custom(format!("{rows} rows a pass: 8, 16 or 32 are possible"))),
    }
}

/// Why there is no usable spec.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is no valid spec.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The line, what is wrong with it, and what would be accepted.
        message: String,
    },
    /// More positions are asked for than the model is made for.
    #[error("limits.context is {context}, but the model is made for {model_max}: lower it")]
    Context {
        /// Positions asked for.
        context: usize,
        /// Positions of the model.
        model_max: usize,
    },
}

impl ModelSpec {
    /// Reads a `model.yaml`. Its relative paths become relative to the working directory.
    ///
    /// # Errors
    /// When the file cannot be read or is no valid spec; with the line.
    pub fn load(path: &Path) -> Result<ModelSpec, SpecError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| SpecError::Read { path: path.to_path_buf(), source })?;
        ModelSpec::parse(&text, path)
    }

    /// Reads the text of a `model.yaml` that lies at `path`.
    ///
    /// # Errors
    /// When it is no valid spec; with the line.
    pub fn parse(text: &str, path: &Path) -> Result<ModelSpec, SpecError> {
        let mut spec: ModelSpec = serde_saphyr::from_str(text).map_err(|error| {
            let mut message = error.to_string();
            if message.contains("unknown field `speculation`") {
                message.push_str("\nwrite `draft: {dflash: {checkpoint: PATH}}`");
            }
            SpecError::Invalid { path: path.to_path_buf(), message }
        })?;
        let base = path.parent().unwrap_or(Path::new(""));
        let Model { source, config, tokenizer } = &mut spec.model;
        let checkpoint = match source {
            Source::Checkpoint(path) => Some(path),
            Source::Synthetic { .. } => None,
        };
        for path in [checkpoint, config.as_mut(), tokenizer.as_mut()].into_iter().flatten() {
            *path = base.join(&*path);
        }
        if let Some(Draft { dflash }) = &mut spec.draft {
            dflash.checkpoint = base.join(&dflash.checkpoint);
        }
        Ok(spec)
    }

    /// The spec of a checkpoint with everything at its default: a folder or a `.gguf` file.
    pub fn for_checkpoint(path: impl Into<PathBuf>) -> ModelSpec {
        ModelSpec {
            model: Model { source: Source::Checkpoint(path.into()), config: None, tokenizer: None },
            precision: Precision::default(),
            target: Target::default(),
            limits: Limits::default(),
            draft: None,
        }
    }
}

/// JSON schema of `model.yaml`, as text that ends in a newline.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(ModelSpec);
    let mut text = serde_json::to_string_pretty(&schema).expect("a schema is plain JSON");
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelSpec, SpecError> {
        ModelSpec::parse(text, Path::new("models/model.yaml"))
    }

    /// The error of a spec that must be refused.
    fn refused(text: &str) -> String {
        parse(text).expect_err(text).to_string()
    }

    #[test]
    fn everything_but_the_source_has_a_default() {
        let spec = parse("model: {checkpoint: smollm2.gguf}").unwrap();
        assert_eq!(spec, ModelSpec::for_checkpoint("models/smollm2.gguf"));
        assert_eq!(spec.precision.kv_type(), KvType::F16);
        assert_eq!(spec.precision.activations, Activations::Auto);
        assert_eq!(spec.target, Target::default());
        assert_eq!(spec.limits, Limits { sequences: 4, context: None, rows: 64, pass_rows: None });
    }

    #[test]
    fn every_key_is_read() {
        let spec = parse(
            "model:\n  synthetic: {seed: 7}\n  config: config.json\n  tokenizer: /abs/tokenizer.json\n\
             precision:\n  weights: mxfp4\n  head: q8_0\n  embedding: bf16\n  experts: as-stored\n  \
             attention: fp8\n  kv_cache: bf16\n  activations: int8\n\
             target: {device: cpu, arch: haswell, threads: 3}\n\
             limits: {sequences: 2, context: 512, rows: 16}\n",
        )
        .unwrap();
        assert_eq!(spec.model.source, Source::Synthetic { seed: 7 });
        assert_eq!(spec.model.config.as_deref(), Some(Path::new("models/config.json")));
        assert_eq!(spec.model.tokenizer.as_deref(), Some(Path::new("/abs/tokenizer.json")));
        assert_eq!(spec.precision.weights, WeightFormat::Converted(Format::MXFP4));
        assert_eq!(spec.precision.head, Some(WeightFormat::Converted(Format::Q8_0)));
        assert_eq!(spec.precision.embedding, Some(WeightFormat::Converted(Format::BF16)));
        assert_eq!(spec.precision.experts, Some(WeightFormat::AsStored));
        assert_eq!(spec.precision.attention, Some(WeightFormat::Converted(Format::FP8_BLOCK)));
        assert_eq!(spec.precision.kv_type(), KvType::Bf16);
        assert_eq!(spec.precision.activations, Activations::Int8);
        assert_eq!(
            spec.target,
            Target {
                device: Device::Cpu,
                arch: "haswell".into(),
                threads: Some(3),
                gpus: None,
                only_rank: None
            }
        );
        assert_eq!(spec.limits, Limits { sequences: 2, context: Some(512), rows: 16, pass_rows: None });
        let cuda = parse("model: {checkpoint: x}\ntarget: {device: cuda, gpus: 8}").unwrap().target;
        assert_eq!((cuda.device, cuda.arch.as_str(), cuda.gpus), (Device::Cuda, "sm_90a", Some(8)));
        assert_eq!(cuda.shard(), None);
        let target = |keys: &str| {
            parse(&format!("model: {{checkpoint: x}}\ntarget: {{device: cuda, {keys}}}")).unwrap().target
        };
        let shard = target("gpus: 8, only_rank: 7").shard();
        assert_eq!(shard, Some(Shard { rank: 7, ranks: 8 }));
        assert_eq!(shard.unwrap().to_string(), "rank 7 of 8");
        // The only rank of one GPU has everything.
        assert_eq!(target("gpus: 1, only_rank: 0").shard(), None);
    }

    #[test]
    fn errors_show_the_line_and_the_remedy() {
        let model = "model: {checkpoint: x}\n";
        let cases: &[(&str, &[&str])] = &[
            ("model: {chekpoint: x}", &["line 1", "chekpoint", "checkpoint", "synthetic", "tokenizer"]),
            ("model: {config: c.json}", &["line 1", "add `checkpoint: PATH`"]),
            ("model: {checkpoint: x, synthetic: {seed: 1}}", &["keep one"]),
            ("model: {synthetic: {seed: 1}}", &["add `config: config.json`"]),
            ("model: {synthetic: {sede: 1}, config: c}", &["sede", "seed"]),
            ("model: {checkpoint: ''}", &["model.checkpoint is empty"]),
            ("precision: {weights: q8_0}", &["model"]),
            (&format!("{model}precision:\n  weights: q9"), &["line 3", "q9", "as-stored", "mxfp4", "q6_k"]),
            (&format!("{model}precision:\n  kv_cache: f8"), &["line 3", "f8", "bf16"]),
            (&format!("{model}precision:\n  activations: int4"), &["line 3", "int4", "int8"]),
            (&format!("{model}precision:\n  expert: q8_0"), &["line 3", "expert", "experts"]),
            (&format!("{model}target:\n  device: tpu"), &["line 3", "tpu", "cpu", "cuda"]),
            (&format!("{model}target:\n  threads: 0"), &["line 3", "from 1 to 1024"]),
            (&format!("{model}target: {{gpus: 2}}"), &["line 2", "target.gpus"]),
            (&format!("{model}target: {{only_rank: 0}}"), &["line 2", "target.only_rank", "device: cpu"]),
            (&format!("{model}target: {{device: cuda, only_rank: 1}}"), &["line 2", "add target.gpus"]),
            (&format!("{model}target: {{device: cuda, gpus: 4, only_rank: 4}}"), &["line 2", "0 to 3"]),
            (&format!("{model}target: {{device: cuda, gpus: 9}}"), &["line 2", "from 1 to 8"]),
            (&format!("{model}target: {{device: cuda, gpus: 8, only_rank: -1}}"), &["line 2"]),
            (&format!("{model}target: {{arch: sm_90a}}"), &["line 2", "device: cuda"]),
            (&format!("{model}target: {{device: cuda, arch: haswell}}"), &["line 2", "sm_90a"]),
            (&format!("{model}target: {{device: cuda, threads: 2}}"), &["line 2", "target.threads"]),
            (&format!("{model}limits:\n  rows: 0"), &["line 3", "from 1 to 1024"]),
            (&format!("{model}limits:\n  rows: 100000"), &["line 3", "from 1 to 1024"]),
            (&format!("{model}limits:\n  pass_rows: 33"), &["line 3", "from 1 to 32"]),
            (&format!("{model}limits:\n  pass_rows: 24"), &["24 rows", "8, 16 or 32"]),
            (&format!("{model}limits:\n  context: -5"), &["line 3"]),
            (&format!("{model}limits:\n  sequences: many"), &["line 3"]),
            (&format!("{model}speculation: {{dflash: {{}}}}"), &["line 2", "draft: {dflash"]),
            (&format!("{model}draft: {{dflash: {{}}}}"), &["line 2", "checkpoint"]),
            (&format!("{model}draft: {{dflash: {{checkpoint: ' '}}}}"), &["line 2", "empty"]),
            (&format!("{model}draft: {{dflash: {{checkpoint: d, block: 1}}}}"), &["line 2", "from 2 to 64"]),
            (&format!("{model}draft: {{eagle: {{checkpoint: d}}}}"), &["line 2", "eagle", "dflash"]),
            (&format!("{model}{model}"), &["line 2", "duplicate"]),
            ("model: [", &["line 1"]),
            ("", &["model"]),
        ];
        for (text, parts) in cases {
            let error = refused(text);
            assert!(error.starts_with("models/model.yaml: "), "{error}");
            for part in *parts {
                assert!(error.contains(part), "{text:?}: {part:?} is not in {error}");
            }
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = ModelSpec::load(Path::new("no/such/model.yaml")).unwrap_err().to_string();
        assert!(error.starts_with("no/such/model.yaml: "), "{error}");
    }

    #[test]
    fn variables_and_home_are_expanded() {
        let variable = |name: &str| match name {
            "HOME" => Some("/home/me".to_string()),
            "CACHE" => Some("/cache".to_string()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        let expand = |text| super::expand(text, &variable);
        for (text, expanded) in [
            ("plain/path", "plain/path"),
            ("~/m", "/home/me/m"),
            ("a/~/m", "a/~/m"),
            ("~other/m", "~other/m"),
            ("${CACHE}/m", "/cache/m"),
            ("${CACHE:-~/x}/m", "/cache/m"),
            ("${NONE:-~/x}/m", "/home/me/x/m"),
            ("${EMPTY:-d}/${CACHE}", "d//cache"),
            ("$CACHE", "$CACHE"),
        ] {
            assert_eq!(expand(text).as_deref(), Ok(expanded), "{text}");
        }
        for (text, part) in [("${NONE}/m", "NONE is not set"), ("${CACHE", "without"), ("${A B}", "${A B}")] {
            assert!(expand(text).unwrap_err().contains(part), "{text}");
        }
        assert!(super::expand("~/m", &|_| None).unwrap_err().contains("HOME"));
    }

    #[test]
    fn context_is_bounded_by_the_model() {
        let limits = |context| Limits { context, ..Limits::default() };
        assert_eq!(limits(None).context(2048).unwrap(), 2048);
        assert_eq!(limits(None).context(40960).unwrap(), DEFAULT_CONTEXT);
        assert_eq!(limits(Some(8192)).context(8192).unwrap(), 8192);
        let error = limits(Some(8193)).context(8192).unwrap_err().to_string();
        assert!(error.contains("8193") && error.contains("8192"), "{error}");
    }

    #[test]
    fn sections_survive_serialization() {
        let precision = Precision {
            head: Some(WeightFormat::Converted(Format::NVFP4)),
            kv_cache: Some(KvType::F32),
            ..Precision::default()
        };
        let text = serde_json::to_string(&precision).unwrap();
        assert_eq!(text, r#"{"weights":"as-stored","head":"nvfp4","kv_cache":"f32","activations":"auto"}"#);
        assert_eq!(serde_json::from_str::<Precision>(&text).unwrap(), precision);
        let target = Target { threads: Some(2), ..Target::default() };
        let text = serde_json::to_string(&target).unwrap();
        assert_eq!(serde_json::from_str::<Target>(&text).unwrap(), target);
    }

    #[test]
    fn the_examples_are_valid() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let inside = |path: &Path| std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        let specs: Vec<PathBuf> = inside(&examples)
            .filter(|path| path.is_dir())
            .flat_map(|folder| inside(&folder).collect::<Vec<_>>())
            .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
            .collect();
        for path in &specs {
            let spec = ModelSpec::load(path).unwrap_or_else(|error| panic!("{error}"));
            if let Some(config) = spec.model.config {
                assert!(config.exists(), "{}: no {}", path.display(), config.display());
            }
        }
        assert!(specs.len() >= 2, "only {specs:?}");
    }

    #[test]
    fn the_committed_schema_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/model.schema.json");
        if std::env::var_os("TILEC_UPDATE_SCHEMA").is_some() {
            std::fs::write(&path, json_schema()).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == json_schema(),
            "{} is stale: run `TILEC_UPDATE_SCHEMA=1 cargo test -p tilec-ir the_committed_schema`",
            path.display()
        );
    }
}
