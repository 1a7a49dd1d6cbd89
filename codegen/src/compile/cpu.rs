//! A plan for the CPU: threads that run a schedule of tiles, through LLVM.

use super::{CompileError, Compiled, Input, Level, graph, level_files, limits, plan_file, sha256, verified};
use crate::emit::llvm::emit;
use crate::frontends;
use crate::passes::{fuse, schedule, tile};
use tilec_ir::abi::ABI_VERSION;
use tilec_ir::cost::costs;
use tilec_ir::plan::{PLAN_VERSION, Plan, PlanTarget};
use tilec_ir::spec::{ModelSpec, Target as TargetSpec};
use tilec_ir::validate::validate;
use tilec_kernels_gen::{KernelError, Target};

/// Name of the native code in the plan's folder.
const OBJECT: &str = "kernel.o";

/// Compiles for the processor that `spec.target.arch` names, with `threads` workers where the spec
/// leaves that open.
pub(super) fn compile(input: &Input<'_>, spec: &ModelSpec, threads: usize) -> Result<Compiled, CompileError> {
    let graph = graph(input, spec)?;
    let limits = limits(input, spec)?;
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
        logits: stages.logits.0 as usize,
        scratch_bytes: native.scratch_bytes,
        stages: stages.sequence().iter().map(|at| at.name()).collect(),
        kv: stages.kv,
        packing: stages.packing.clone(),
        costs: costs(&stages),
        code: plan_file(OBJECT, &native.object),
        resident: None,
        texts: level_files(&texts),
    })?;
    Ok(Compiled { plan, texts, object: native.object })
}

/// The target of an architecture name: `host`, or one of LLVM's processor names for this machine's
/// architecture.
fn target(arch: &str) -> Result<Target, KernelError> {
    let host = tilec_kernels_gen::llvm::host_target()?;
    if arch == TargetSpec::HOST { Ok(host) } else { Target::parse(&host.triple, arch, "") }
}
