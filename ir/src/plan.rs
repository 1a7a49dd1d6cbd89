//! The plan: a folder that says everything that running a model needs, except the weights.
//!
//! `plan.json` is this structure; beside it lie the text of each level, for people, and the native
//! code. Loading a plan needs neither a compiler nor LLVM. The same input makes the same bytes.

use crate::abi::{ABI_VERSION, KvLayout};
use crate::cost::StageCost;
use crate::graph::MAX_CANDIDATES;
use crate::launch::{LAUNCH_ROWS, LAUNCH_VERSION};
use crate::pack::Packing;
use crate::resident::is_step_rows;
use crate::spec::Shard;
use crate::stages::{Buffer, BufferElem};
use crate::tensor::TensorInfo;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Name of the manifest in the plan's folder.
pub const MANIFEST: &str = "plan.json";

/// Raised whenever the manifest changes in a way that older readers would misread.
pub const PLAN_VERSION: u32 = 1;

/// Where the weights come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightsFrom {
    /// A Hugging Face folder or a GGUF file.
    Checkpoint {
        /// Absolute path.
        path: PathBuf,
    },
    /// Made up from a seed, in the exact shapes.
    Synthetic {
        /// Seed.
        seed: u64,
        /// The model's config.json.
        config: serde_json::Value,
        /// Shapes and formats by tensor name.
        tensors: BTreeMap<String, TensorInfo>,
    },
}

/// The machine that the native code is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanTarget {
    /// `cpu` or `cuda`.
    pub device: String,
    /// Architecture: of the object file, as Rust names it (`x86_64`); of the cubin, as NVIDIA names it
    /// (`sm_90a`).
    pub arch: String,
    /// LLVM's name of the processor; empty on CUDA.
    pub cpu: String,
    /// LLVM features that the code needs, each with a `+`, as the processor must report them.
    pub features: Vec<String>,
    /// Workers: threads on the CPU; 1 on CUDA, where the kernel takes every SM that there is.
    pub workers: usize,
}

/// What a plan was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanLimits {
    /// Rows in a step.
    pub max_rows: usize,
    /// Sequences that have a KV cache at the same time.
    pub sequences: usize,
    /// Positions of each.
    pub context: usize,
}

impl PlanLimits {
    /// Page-table entries of a sequence.
    pub fn pages_per_sequence(&self, kv: &KvLayout) -> usize {
        self.context.div_ceil(kv.page_tokens)
    }
}

/// How a resident kernel is launched: one block on every SM, all at once (a cooperative launch), with
/// [`crate::launch::LaunchArgs`] as its one parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResidentPlan {
    /// [`crate::launch::LAUNCH_VERSION`] of the kernel.
    pub launch_version: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Rows of a launch, at most: 8, 16 or 32. Older interfaces do not say.
    #[serde(default)]
    pub step_rows: usize,
}

/// A program beside the model's own, for the same workers: its memory is its own but for the weights and
/// the page table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProgramPlan {
    /// Its arena's buffers.
    pub buffers: Vec<Buffer>,
    /// Private scratch of a worker.
    pub scratch_bytes: usize,
    /// Names of the stages in the order that they run, layers unrolled; one counter each.
    pub stages: Vec<String>,
    /// Costs by kind of stage.
    pub costs: Vec<StageCost>,
    /// The native code, as [`Plan::code`].
    pub code: PlanFile,
    /// As [`Plan::resident`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident: Option<ResidentPlan>,
}

impl ProgramPlan {
    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.offset + buffer.bytes()).max().unwrap_or(0)
    }
}

/// A DFlash draft. Behind every step of the model, `inject` turns the taps of committed rows into keys and
/// values of the draft's context; `block` then guesses the tokens of a block of rows in one pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DraftPlan {
    /// Where the weights come from; in the packing their names begin with [`DRAFT_PREFIX`].
    pub weights: WeightsFrom,
    /// Rows of a block at most: the last known token, then masks.
    pub block: usize,
    /// Token of a row to be guessed.
    pub mask_token: u32,
    /// Layers of the model whose residual streams the draft reads.
    pub taps: Vec<usize>,
    /// Number of the model's buffer with the taps, `f32 [rows][taps x hidden]`; those of all rows of a step.
    pub taps_buffer: usize,
    /// KV cache of the draft's layers; pages have the numbers of the model's.
    pub kv: KvLayout,
    /// Fills the KV cache with the context.
    pub inject: ProgramPlan,
    /// Number of `inject`'s buffer that takes the taps of the rows; none on CUDA, where it reads them where
    /// the step left them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<usize>,
    /// Guesses a block.
    pub block_pass: ProgramPlan,
    /// Number of `block_pass`'s buffer with the logits, `f32 [logit rows][vocab]`.
    pub logits: usize,
    /// What chooses among the largest logits, if the draft has that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<SelectorPlan>,
    /// On CUDA, whole rounds in one kernel, where the three programs fit together: `block_pass`, the model's step
    /// and `inject` in turn, on the buffers of these. It has none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round: Option<ProgramPlan>,
}

/// Where `block_pass` leaves what guesses are chosen by: see [`crate::graph::Op::PairScores`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelectorPlan {
    /// Number of the buffer with the candidates, `routes [logit rows][k]`: tokens, and their logits.
    pub candidates: usize,
    /// Number of the buffer with the scores of pairs, `f32 [logit rows][k][k]`.
    pub scores: usize,
}

/// What the names of a draft's tensors begin with, beside those of its target.
pub const DRAFT_PREFIX: &str = "draft.";

/// A file of the plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanFile {
    /// Name in the folder; no path.
    pub file: String,
    /// SHA-256 of its bytes, hexadecimal.
    pub sha256: String,
}

/// The manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`PLAN_VERSION`].
    pub plan_version: u32,
    /// [`ABI_VERSION`] of the native code.
    pub abi_version: u32,
    /// Name of the model.
    pub name: String,
    /// Architecture family (`llama`, `qwen3`).
    pub family: String,
    /// SHA-256 of the graph's text.
    pub graph_sha256: String,
    /// The weights.
    pub weights: WeightsFrom,
    /// A `tokenizer.json`, or the folder of one, in place of the checkpoint's.
    pub tokenizer: Option<PathBuf>,
    /// The machine.
    pub target: PlanTarget,
    /// Sizes.
    pub limits: PlanLimits,
    /// Tokens that have logits: all of the model's, or those of a rank's share.
    pub vocab: usize,
    /// The arena's buffers.
    pub buffers: Vec<Buffer>,
    /// Number of the buffer with the logits, `f32 [logit rows][vocab]`.
    pub logits: usize,
    /// Private scratch of a worker.
    pub scratch_bytes: usize,
    /// Names of the stages in the order that they run, layers unrolled; one counter each.
    pub stages: Vec<String>,
    /// KV cache.
    pub kv: KvLayout,
    /// Recipe of the packed weights.
    pub packing: Packing,
    /// Costs by kind of stage.
    pub costs: Vec<StageCost>,
    /// The native code. On the CPU a relocatable ELF object with [`crate::abi::ENTRY`] and no undefined
    /// symbols; on CUDA a cubin with [`crate::launch::KERNEL`].
    pub code: PlanFile,
    /// How the resident kernel is launched: there for CUDA, and only there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident: Option<ResidentPlan>,
    /// The one rank of several whose share of the model this is; its peers are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<Shard>,
    /// A draft that guesses tokens ahead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draft: Option<DraftPlan>,
    /// The text forms.
    pub texts: Vec<PlanFile>,
}

/// Why a plan cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A file is missing or cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The manifest is not a manifest.
    #[error("{path}: not a tilec plan: {source}; compile the model again with `tilec compile`")]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and what was expected.
        source: serde_json::Error,
    },
    /// The manifest says something impossible.
    #[error("{path}: {what}; compile the model again with `tilec compile`")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What does not hold.
        what: String,
    },
}

impl Plan {
    /// Reads and checks the manifest of a plan folder.
    ///
    /// # Errors
    /// [`PlanError`], naming the file.
    pub fn load(folder: &Path) -> Result<Plan, PlanError> {
        let path = folder.join(MANIFEST);
        let bytes = std::fs::read(&path).map_err(|source| PlanError::Io { path: path.clone(), source })?;
        #[derive(Deserialize)]
        struct Version {
            plan_version: u32,
            abi_version: u32,
        }
        // The versions first: a manifest of another version may differ anywhere else.
        let json = |source| PlanError::Json { path: path.clone(), source };
        let version: Version = serde_json::from_slice(&bytes).map_err(json)?;
        let invalid = |what| PlanError::Invalid { path: path.clone(), what };
        if (version.plan_version, version.abi_version) != (PLAN_VERSION, ABI_VERSION) {
            return Err(invalid(format!(
                "made by another version (plan {}, interface {}; this one reads {PLAN_VERSION} and {ABI_VERSION})",
                version.plan_version, version.abi_version
            )));
        }
        let plan: Plan = serde_json::from_slice(&bytes).map_err(json)?;
        plan.verify().map_err(invalid)?;
        Ok(plan)
    }

    /// The manifest's text.
    pub fn to_json(&self) -> String {
        let mut text =
            serde_json::to_string_pretty(self).expect("a plan has no maps with other keys than text");
        text.push('\n');
        text
    }

    /// Name of the model, and which rank's share of it this is if it is not all.
    pub fn title(&self) -> String {
        match self.shard {
            Some(shard) => format!("{}, {shard}", self.name),
            None => self.name.clone(),
        }
    }

    /// Tokens that a row may have: a rank has logits of its share of them.
    pub fn tokens(&self) -> usize {
        self.vocab * self.shard.map_or(1, |shard| shard.ranks)
    }

    /// Bytes of the arena.
    pub fn arena_bytes(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.offset + buffer.bytes()).max().unwrap_or(0)
    }

    /// Pages of the KV cache.
    pub fn kv_pages(&self) -> usize {
        self.limits.sequences * self.limits.pages_per_sequence(&self.kv)
    }

    /// Checks that sizes are possible and belong together, so that later arithmetic cannot overflow.
    ///
    /// # Errors
    /// In words.
    pub fn verify(&self) -> Result<(), String> {
        bounded("limits.max_rows", self.limits.max_rows, 1 << 16)?;
        bounded("limits.sequences", self.limits.sequences, 1 << 16)?;
        bounded("limits.context", self.limits.context, 1 << 30)?;
        bounded("target.workers", self.target.workers, 4096)?;
        bounded("vocab", self.vocab, 1 << 28)?;
        if let Some(Shard { rank, ranks }) = self.shard
            && (!(2..=1 << 10).contains(&ranks) || rank >= ranks)
        {
            return Err(format!("shard is rank {rank} of {ranks}"));
        }
        check_kv("kv", &self.kv)?;
        self.check_program(&self.buffers, self.scratch_bytes, &self.stages)?;
        if let Some(draft) = &self.draft {
            self.check_draft(draft)?;
        }
        match self.buffers.get(self.logits) {
            Some(logits) if logits.cols == self.vocab && !logits.quantized() => {}
            _ => return Err("there is no buffer of logits".into()),
        }
        let draft = self.draft.iter().flat_map(|draft| {
            let round = draft.round.iter().map(|round| &round.code);
            [&draft.inject.code, &draft.block_pass.code].into_iter().chain(round)
        });
        for file in self.texts.iter().chain([&self.code]).chain(draft) {
            if file.file.is_empty() || file.file.contains(['/', '\\']) || file.file.starts_with('.') {
                return Err(format!("{:?} is no file of the plan's folder", file.file));
            }
        }
        self.check_kernel(self.resident.as_ref())?;
        self.packing.verify().map_err(|error| error.to_string())
    }

    fn check_kernel(&self, resident: Option<&ResidentPlan>) -> Result<(), String> {
        match (self.target.device.as_str(), resident) {
            ("cpu", None) => Ok(()),
            ("cuda", Some(resident)) => {
                if resident.launch_version != LAUNCH_VERSION {
                    return Err(format!(
                        "its kernel has interface {}, this version launches {LAUNCH_VERSION}",
                        resident.launch_version
                    ));
                }
                if !is_step_rows(resident.step_rows) {
                    return Err(format!(
                        "resident.step_rows is {}, not 8, 16 or {LAUNCH_ROWS}",
                        resident.step_rows
                    ));
                }
                bounded("resident.threads", resident.threads as usize, 1024)?;
                bounded("resident.shared_bytes", resident.shared_bytes as usize, 1 << 20)
            }
            (device, _) => Err(format!("target.device {device:?} and its kernel do not fit")),
        }
    }

    fn check_program(
        &self,
        buffers: &[Buffer],
        scratch_bytes: usize,
        stages: &[String],
    ) -> Result<(), String> {
        bounded("scratch_bytes", scratch_bytes.max(1), 1 << 32)?;
        bounded("number of stages", stages.len(), 1 << 20)?;
        let mut end = 0;
        let mut sorted: Vec<&Buffer> = buffers.iter().collect();
        sorted.sort_by_key(|buffer| buffer.offset);
        for buffer in sorted {
            bounded(&format!("columns of buffer {}", buffer.name), buffer.cols, 1 << 28)?;
            // A buffer may have a row for every expert of a row of the step.
            let rows = self.limits.max_rows * MAX_SLOTS;
            bounded(&format!("rows of buffer {}", buffer.name), buffer.rows, rows)?;
            if buffer.offset < end || buffer.offset > 1 << 44 || !buffer.offset.is_multiple_of(64) {
                return Err(format!(
                    "buffer {} at {} overlaps or is not aligned",
                    buffer.name, buffer.offset
                ));
            }
            end = buffer.offset + buffer.bytes();
        }
        Ok(())
    }

    fn check_draft(&self, draft: &DraftPlan) -> Result<(), String> {
        check_kv("draft.kv", &draft.kv)?;
        if draft.kv.page_tokens != self.kv.page_tokens {
            return Err("draft.kv has other pages than the model's".into());
        }
        let resident = self.resident.is_some();
        // A block is never cut: its rows see each other.
        let launch = draft.block_pass.resident.map_or(usize::MAX, |kernel| kernel.step_rows);
        let max = self.limits.max_rows.min(launch);
        if !(2..=max).contains(&draft.block) {
            return Err(format!("draft.block is {}, not 2 to {max} rows", draft.block));
        }
        if draft.mask_token as usize >= self.vocab {
            return Err(format!("draft.mask_token {} is not below vocab {}", draft.mask_token, self.vocab));
        }
        for program in [&draft.inject, &draft.block_pass].into_iter().chain(&draft.round) {
            self.check_program(&program.buffers, program.scratch_bytes, &program.stages)?;
            self.check_kernel(program.resident.as_ref())?;
        }
        if let Some(round) = &draft.round {
            let step_rows = |kernel: Option<ResidentPlan>| kernel.map(|kernel| kernel.step_rows);
            let programs = [self.resident, draft.inject.resident, draft.block_pass.resident];
            if !resident || programs.iter().any(|own| step_rows(*own) != step_rows(round.resident)) {
                return Err("draft.round does not fit the kernels that it stands for".into());
            }
            if !round.buffers.is_empty() {
                return Err("draft.round has buffers, and uses those of others".into());
            }
        }
        let rows = self.limits.max_rows;
        let taps = self.buffers.get(draft.taps_buffer);
        let taps = taps.filter(|taps| taps.rows == rows && taps.elem == BufferElem::F32);
        let input = draft.input.map(|input| draft.inject.buffers.get(input));
        match (taps, input) {
            (Some(taps), Some(Some(input)))
                if taps.cols == input.cols
                    && input.rows == rows
                    && input.elem == BufferElem::F32
                    && !resident => {}
            (Some(_), None) if resident => {}
            _ => return Err("draft.input does not fit the model's taps".into()),
        }
        let buffers = &draft.block_pass.buffers;
        let logits = match buffers.get(draft.logits) {
            Some(logits) if logits.cols == self.vocab && logits.elem == BufferElem::F32 => logits,
            _ => return Err("there is no buffer of the draft's logits".into()),
        };
        let Some(selector) = draft.selector else { return Ok(()) };
        match (buffers.get(selector.candidates), buffers.get(selector.scores)) {
            (Some(candidates), Some(scores))
                if candidates.elem == BufferElem::Routes
                    && scores.elem == BufferElem::F32
                    && candidates.cols <= MAX_CANDIDATES
                    && scores.cols == candidates.cols * candidates.cols
                    && (candidates.rows, scores.rows) == (logits.rows, logits.rows) =>
            {
                Ok(())
            }
            _ => Err("draft.selector names no buffers of candidates and of their pairs' scores".into()),
        }
    }
}

/// Experts of a row, at most.
const MAX_SLOTS: usize = 1 << 12;

fn bounded(name: &str, value: usize, max: usize) -> Result<(), String> {
    match (1..=max).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value}, not 1 to {max}")),
    }
}

fn check_kv(name: &str, kv: &KvLayout) -> Result<(), String> {
    bounded(&format!("{name}.page_tokens"), kv.page_tokens, 1 << 16)?;
    bounded(&format!("{name}.layers"), kv.layers, 1 << 12)?;
    bounded(&format!("{name}.kv_heads"), kv.kv_heads, 1 << 12)?;
    bounded(&format!("{name}.qk_dim"), kv.qk_dim, 1 << 16)?;
    bounded(&format!("{name}.v_dim"), kv.v_dim, 1 << 16)?;
    if !kv.page_tokens.is_multiple_of(crate::abi::KV_GROUP) {
        return Err(format!("{name}.page_tokens {} is not whole groups", kv.page_tokens));
    }
    Ok(())
}
