//! A plan for the CPU: threads that run a schedule of tiles, through LLVM.

use super::{CompileError, Compiled, Input, Level, graphs, level_files, limits, plan_file, sha256, verified};
use crate::emit::llvm::{Native, emit};
use crate::frontends;
use crate::passes::{fuse, schedule, tile};
use tilec_ir::abi::ABI_VERSION;
use tilec_ir::cost::costs;
use tilec_ir::graph::Graph;
use tilec_ir::pack::PACK_ALIGN;
use tilec_ir::plan::{DraftPlan, PLAN_VERSION, Plan, PlanTarget, ProgramPlan, SelectorPlan};
use tilec_ir::spec::{ModelSpec, Target as TargetSpec};
use tilec_ir::stages::{BufferId, StageProgram};
use tilec_ir::validate::validate;
use tilec_kernels_gen::{KernelError, Target};

/// Name of the native code in the plan's folder.
const OBJECT: &str = "kernel.o";

/// Names of the draft's native code.
const INJECT_OBJECT: &str = "draft-inject.o";
const BLOCK_OBJECT: &str = "draft-block.o";

/// Compiles for the processor that `spec.target.arch` names, with `threads` workers where the spec
/// leaves that open.
pub(super) fn compile(input: &Input<'_>, spec: &ModelSpec, threads: usize) -> Result<Compiled, CompileError> {
    let (graph, draft) = graphs(input, spec)?;
    let limits = limits(input, spec)?;
    let workers = spec.target.threads.unwrap_or(threads);
    let target = target(&spec.target.arch)?;
    let mut compiler = Compiler {
        options: tile::TileOptions { max_rows: limits.max_rows, context: limits.context },
        workers,
        target: &target,
        packer: tile::Packer::new(PACK_ALIGN),
        texts: [Level::Graph, Level::Fused, Level::Stages, Level::Schedule, Level::Llvm]
            .map(|level| (level, String::new())),
    };
    // All programs read one set of packed weights: a draft's head is its target's.
    let (stages, native) = compiler.program(&graph)?;
    let mut objects = Vec::new();
    let draft = match (&draft, &input.draft) {
        (Some(draft), Some(input)) => {
            let (inject, inject_native) = compiler.program(&draft.inject)?;
            let (block, block_native) = compiler.program(&draft.block)?;
            let plan = DraftPlan {
                weights: input.weights.clone(),
                block: draft.rows,
                mask_token: draft.draft.mask_token,
                taps: draft.draft.taps.clone(),
                taps_buffer: number(stages.taps),
                kv: block.kv,
                input: Some(number(inject.input)),
                logits: number(block.logits),
                selector: block.pairs.map(|(candidates, scores)| SelectorPlan {
                    candidates: candidates.0 as usize,
                    scores: scores.0 as usize,
                }),
                inject: program_plan(&inject, &inject_native, INJECT_OBJECT),
                block_pass: program_plan(&block, &block_native, BLOCK_OBJECT),
                round: None,
            };
            objects.push((INJECT_OBJECT.to_string(), inject_native.object));
            objects.push((BLOCK_OBJECT.to_string(), block_native.object));
            Some(plan)
        }
        _ => None,
    };
    let texts = compiler.texts.to_vec();
    let graph_sha256 = sha256(texts[0].1.as_bytes());
    let plan = verified(Plan {
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
        logits: number(stages.logits),
        scratch_bytes: native.scratch_bytes,
        stages: stages.sequence().iter().map(|at| at.name()).collect(),
        kv: stages.kv,
        packing: compiler.packer.packing,
        costs: costs(&stages),
        code: plan_file(OBJECT, &native.object),
        resident: None,
        shard: None,
        draft,
        texts: level_files(&texts),
    })?;
    Ok(Compiled { plan, texts, object: native.object, objects })
}

/// Number of a buffer that the program has: verifying the plan finds it if it has not.
fn number(buffer: Option<BufferId>) -> usize {
    buffer.map_or(usize::MAX, |id| id.0 as usize)
}

fn program_plan(stages: &StageProgram, native: &Native, object: &str) -> ProgramPlan {
    ProgramPlan {
        buffers: stages.buffers.clone(),
        scratch_bytes: native.scratch_bytes,
        stages: stages.sequence().iter().map(|at| at.name()).collect(),
        costs: costs(stages),
        code: plan_file(object, &native.object),
        resident: None,
    }
}

/// Compiles the programs of a plan, one behind the other.
struct Compiler<'a> {
    options: tile::TileOptions,
    workers: usize,
    target: &'a Target,
    packer: tile::Packer,
    /// Text of each level, of all programs.
    texts: [(Level, String); 5],
}

impl Compiler<'_> {
    fn program(&mut self, graph: &Graph) -> Result<(StageProgram, Native), CompileError> {
        let fused = fuse::fuse(graph)?;
        let stages = tile::tile_with(&fused, &self.options, &mut self.packer)?;
        let schedule = schedule::schedule(&stages, self.workers);
        validate(&stages, &schedule).map_err(CompileError::Schedule)?;
        let native = emit(&stages, &schedule, self.target)?;
        let texts = [
            graph.to_string(),
            fused.to_string(),
            stages.to_string(),
            schedule.text(&stages),
            native.text.clone(),
        ];
        for ((_, all), text) in self.texts.iter_mut().zip(texts) {
            if !all.is_empty() {
                all.push('\n');
            }
            all.push_str(&text);
        }
        Ok((stages, native))
    }
}

/// The target of an architecture name: `host`, or one of LLVM's processor names for this machine's
/// architecture.
fn target(arch: &str) -> Result<Target, KernelError> {
    let host = tilec_kernels_gen::llvm::host_target()?;
    if arch == TargetSpec::HOST { Ok(host) } else { Target::parse(&host.triple, arch, "") }
}
