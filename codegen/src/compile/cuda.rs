//! A plan for a GPU: one resident kernel, through NVRTC.

use super::{CompileError, Compiled, Input, Level, graph, level_files, limits, plan_file, sha256, verified};
use crate::emit::cuda::{CudaText, emit};
use crate::frontends;
use crate::nvrtc::{self, Arch, Budget, Cubin, CubinCache, Nvrtc, Options};
use crate::passes::{fuse, resident};
use std::path::Path;
use tilec_ir::abi::ABI_VERSION;
use tilec_ir::launch::{KERNEL, LAUNCH_VERSION};
use tilec_ir::plan::{PLAN_VERSION, Plan, PlanTarget, ResidentPlan};
use tilec_ir::spec::{Activations, ModelSpec};
use tilec_ir::stages::{Buffer, BufferElem};
use tilec_kernels_gen::cuda::BLOCK_THREADS;

/// Name of the machine code in the plan's folder.
const CUBIN: &str = "kernel.cubin";

/// What a kernel may use of each thread: 168 registers when it starts (its roles then share them out),
/// and no memory.
pub const BUDGET: Budget = Budget { registers: 168, stack: 0, spills: 0 };

/// Compiles for the architecture that `spec.target.arch` names.
pub(super) fn compile(
    input: &Input<'_>,
    spec: &ModelSpec,
    cubins: Option<&Path>,
) -> Result<Compiled, CompileError> {
    if spec.target.threads.is_some() {
        return Err(CompileError::Meaningless { key: "threads", device: "cuda" });
    }
    let arch = Arch::parse(&spec.target.arch)?;
    // The tensor cores multiply halves: activations are never quantized to integers.
    let mut spec = spec.clone();
    spec.precision.activations = Activations::F32;
    let graph = graph(input, &spec)?;
    let limits = limits(input, &spec)?;
    let fused = fuse::fuse(&graph)?;
    let program = resident::resident(&fused, limits.context)?;
    let kernel = emit(&program, arch)?;
    let cubin = assemble(input.name, &kernel, arch, cubins)?;

    let graph_text = graph.to_string();
    let graph_sha256 = sha256(graph_text.as_bytes());
    let texts = vec![
        (Level::Graph, graph_text),
        (Level::Fused, fused.to_string()),
        (Level::Resident, program.to_string()),
        (Level::Cuda, kernel.text),
    ];
    // The logits lie apart from the arena, since the host reads them: a buffer behind all others.
    let mut buffers = program.buffers.clone();
    let end = buffers.iter().map(|buffer| buffer.offset + buffer.bytes()).max().unwrap_or(0);
    buffers.push(Buffer {
        name: "logits".into(),
        elem: BufferElem::F32,
        cols: program.vocab,
        rows: limits.max_rows,
        offset: end.next_multiple_of(256),
    });
    let logits = buffers.len() - 1;
    let plan = verified(Plan {
        plan_version: PLAN_VERSION,
        abi_version: ABI_VERSION,
        name: input.name.to_string(),
        family: frontends::family(input.config)?.to_string(),
        graph_sha256,
        weights: input.weights.clone(),
        tokenizer: input.tokenizer.clone(),
        target: PlanTarget {
            device: "cuda".into(),
            arch: arch.name().into(),
            cpu: String::new(),
            features: Vec::new(),
            workers: 1,
        },
        limits,
        vocab: program.vocab,
        buffers,
        logits,
        scratch_bytes: 0,
        stages: program.sequence().into_iter().map(|(name, _, _)| name).collect(),
        kv: program.kv,
        packing: program.packing.clone(),
        costs: program.costs(),
        code: plan_file(CUBIN, &cubin.bytes),
        resident: Some(ResidentPlan {
            launch_version: LAUNCH_VERSION,
            threads: BLOCK_THREADS,
            shared_bytes: kernel.shared.bytes() as u32,
        }),
        shard: spec.target.shard(),
        draft: None,
        texts: level_files(&texts),
    })?;
    Ok(Compiled { plan, texts, object: cubin.bytes, objects: Vec::new() })
}

/// Machine code of a kernel.
fn assemble(name: &str, kernel: &CudaText, arch: Arch, cubins: Option<&Path>) -> Result<Cubin, CompileError> {
    let nvrtc = Nvrtc::find()?;
    let file = format!("{name}.cu");
    let text = nvrtc::CudaText { name: &file, text: &kernel.text };
    let options = Options::default();
    let cubin = match cubins {
        Some(folder) => CubinCache::new(folder).compile(&nvrtc, &text, arch, &options)?.cubin,
        None => nvrtc.compile(&text, arch, &options)?,
    };
    // A kernel that spills is right, and slow. The tests hold every family's kernel to this budget.
    if let Err(over) = cubin.check(&[(KERNEL, BUDGET)]) {
        tracing::warn!("{over}");
    }
    Ok(cubin)
}
