//! A plan for a GPU: one resident kernel, through NVRTC.

use super::{CompileError, Compiled, Input, Level, graphs, level_files, limits, plan_file, sha256, verified};
use crate::emit::cuda::{CudaError, CudaText, RoundPrograms, emit, emit_round};
use crate::frontends;
use crate::nvrtc::{self, Arch, Budget, Cubin, CubinCache, Nvrtc, Options};
use crate::passes::packer::Packer;
use crate::passes::{fuse, resident};
use std::path::Path;
use tilec_ir::abi::ABI_VERSION;
use tilec_ir::graph::Graph;
use tilec_ir::launch::{KERNEL, LAUNCH_VERSION, SLICE_ROWS};
use tilec_ir::plan::{DraftPlan, PLAN_VERSION, Plan, PlanTarget, ProgramPlan, ResidentPlan};
use tilec_ir::resident::ResidentProgram;
use tilec_ir::spec::{Activations, ModelSpec};
use tilec_ir::stages::{Buffer, BufferElem};
use tilec_kernels_gen::cuda::BLOCK_THREADS;

/// Name of the machine code in the plan's folder.
const CUBIN: &str = "kernel.cubin";

/// What a kernel may use of each thread: 168 registers when it starts (its roles then share them out), and as much
/// memory as what lives from stage to stage may take (the stage's number, the layer): it is put away in front of a
/// stage and fetched behind it; somewhat more if a step has more than eight rows.
pub const fn budget(step_rows: usize) -> Budget {
    Budget { registers: 168, stack: if step_rows > SLICE_ROWS { 184 } else { 64 }, spills: 1000 }
}

/// Names of the draft's machine code.
const INJECT_CUBIN: &str = "draft-inject.cubin";
const BLOCK_CUBIN: &str = "draft-block.cubin";
const ROUND_CUBIN: &str = "draft-round.cubin";

/// Compiles for the architecture that `spec.target.arch` names.
pub(super) fn compile(
    input: &Input<'_>,
    spec: &ModelSpec,
    cubins: Option<&Path>,
) -> Result<Compiled, CompileError> {
    if spec.target.threads.is_some() {
        return Err(CompileError::Meaningless { key: "threads", device: "cuda" });
    }
    // The tensor cores multiply halves: activations are never quantized to integers.
    let mut spec = spec.clone();
    spec.precision.activations = Activations::F32;
    let (graph, draft) = graphs(input, &spec)?;
    let limits = limits(input, &spec)?;
    let graphs: Vec<&Graph> =
        [&graph].into_iter().chain(draft.iter().flat_map(|draft| [&draft.inject, &draft.block])).collect();
    let arch = Arch::parse(&spec.target.arch)?;
    let mut choices = super::pass_rows(&spec, draft.as_ref()).into_iter().peekable();
    let (mut compiler, programs) = loop {
        let step_rows = choices.next().unwrap_or(SLICE_ROWS);
        let mut compiler = Compiler::new(resident::Sizes { context: limits.context, step_rows }, arch);
        // All programs read one set of packed weights: a draft's embedding and head are its target's.
        let programs: Result<Vec<_>, _> = graphs.iter().map(|graph| compiler.program(graph)).collect();
        match programs {
            // Nobody has asked for so many rows.
            Err(CompileError::Cuda(CudaError::Columns { .. })) if choices.peek().is_some() => {}
            programs => break (compiler, programs?),
        }
    };
    let round = match (&draft, &programs[..]) {
        (Some(draft), [(model, _), (inject, _), (block, _)]) => {
            compiler.round(RoundPrograms { model, inject, block, mask_token: draft.draft.mask_token })?
        }
        _ => None,
    };
    let texts = programs.iter().map(|(program, text)| (text, program.step_rows));
    let texts: Vec<_> = texts.chain(round.iter().map(|(text, _)| (text, programs[0].0.step_rows))).collect();
    let mut cubins = assemble(input.name, &texts, compiler.arch, cubins)?.into_iter();
    let kernels = programs.into_iter().zip(cubins.by_ref()).map(|((program, text), cubin)| Kernel {
        program,
        shared_bytes: text.shared.bytes() as u32,
        cubin,
    });
    let mut kernels: Vec<Kernel> = kernels.collect();
    let round = round.zip(cubins.next());
    let of_draft = kernels.split_off(1);
    let model = kernels.remove(0);
    let mut buffers = model.program.buffers.clone();
    let logits = apart(&mut buffers, "logits", model.program.vocab, limits.max_rows);
    let mut objects = Vec::new();
    let draft = match (&draft, &input.draft, &of_draft[..]) {
        (Some(draft), Some(input), [inject, block]) => {
            let tapped = model.program.taps.as_ref().map_or(0, |taps| taps.layers.len() * taps.cols);
            let mut block_buffers = block.program.buffers.clone();
            let block_logits = apart(&mut block_buffers, "logits", block.program.vocab, limits.max_rows);
            let plan = DraftPlan {
                weights: input.weights.clone(),
                block: draft.rows,
                mask_token: draft.draft.mask_token,
                taps: draft.draft.taps.clone(),
                taps_buffer: apart(&mut buffers, "taps", tapped, limits.max_rows),
                kv: block.program.kv,
                input: None,
                logits: block_logits,
                selector: None,
                inject: inject.plan(inject.program.buffers.clone(), INJECT_CUBIN),
                block_pass: block.plan(block_buffers, BLOCK_CUBIN),
                round: round.as_ref().map(|((text, stages), cubin)| ProgramPlan {
                    buffers: Vec::new(),
                    scratch_bytes: 0,
                    stages: stages.clone(),
                    // Those of the three.
                    costs: Vec::new(),
                    code: plan_file(ROUND_CUBIN, &cubin.bytes),
                    resident: Some(resident_plan(text.shared.bytes() as u32, model.program.step_rows)),
                }),
            };
            objects.extend(round.map(|(_, cubin)| (ROUND_CUBIN.to_string(), cubin.bytes)));
            objects.push((INJECT_CUBIN.to_string(), inject.cubin.bytes.clone()));
            objects.push((BLOCK_CUBIN.to_string(), block.cubin.bytes.clone()));
            Some(plan)
        }
        _ => None,
    };
    let texts = compiler.texts.to_vec();
    let graph_sha256 = sha256(texts[0].1.as_bytes());
    let ProgramPlan { stages, costs, code, resident, .. } = model.plan(Vec::new(), CUBIN);
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
            arch: compiler.arch.name().into(),
            cpu: String::new(),
            features: Vec::new(),
            workers: 1,
        },
        limits,
        vocab: model.program.vocab,
        buffers,
        logits,
        scratch_bytes: 0,
        stages,
        kv: model.program.kv,
        packing: compiler.packer.packing,
        costs,
        code,
        resident,
        shard: spec.target.shard(),
        draft,
        texts: level_files(&texts),
    })?;
    Ok(Compiled { plan, texts, object: model.cubin.bytes.clone(), objects })
}

/// Adds a buffer that does not belong to the rows of a launch but to those of all launches of a step, behind all
/// others; its number.
fn apart(buffers: &mut Vec<Buffer>, name: &str, cols: usize, rows: usize) -> usize {
    let end = buffers.iter().map(|buffer| buffer.offset + buffer.bytes()).max().unwrap_or(0);
    let offset = end.next_multiple_of(256);
    buffers.push(Buffer { name: name.into(), elem: BufferElem::F32, cols, rows, offset });
    buffers.len() - 1
}

/// Compiles the programs of a plan, one behind the other.
struct Compiler {
    sizes: resident::Sizes,
    arch: Arch,
    packer: Packer,
    /// Text of each level, of all programs.
    texts: [(Level, String); 4],
}

/// A program and its kernel.
struct Kernel {
    program: ResidentProgram,
    shared_bytes: u32,
    cubin: Cubin,
}

impl Compiler {
    fn new(sizes: resident::Sizes, arch: Arch) -> Compiler {
        let levels = [Level::Graph, Level::Fused, Level::Resident, Level::Cuda];
        let texts = levels.map(|level| (level, String::new()));
        Compiler { sizes, arch, packer: Packer::new(resident::WEIGHT_ALIGN), texts }
    }

    /// The program of a graph, and the text of its kernel.
    fn program(&mut self, graph: &Graph) -> Result<(ResidentProgram, CudaText), CompileError> {
        let fused = fuse::fuse(graph)?;
        let program = resident::resident_with(&fused, self.sizes, &mut self.packer)?;
        let kernel = emit(&program, self.arch)?;
        let texts = [graph.to_string(), fused.to_string(), program.to_string(), kernel.text.clone()];
        for ((_, all), text) in self.texts.iter_mut().zip(texts) {
            if !all.is_empty() {
                all.push('\n');
            }
            all.push_str(&text);
        }
        Ok((program, kernel))
    }

    /// The text of the kernel of rounds, with the names of its stages; none if the programs do not fit together.
    fn round(
        &mut self,
        programs: RoundPrograms<'_>,
    ) -> Result<Option<(CudaText, Vec<String>)>, CompileError> {
        let Some(kernel) = emit_round(programs, self.arch)? else { return Ok(None) };
        if let Some((_, all)) = self.texts.iter_mut().find(|(level, _)| *level == Level::Cuda) {
            all.push('\n');
            all.push_str(&kernel.text);
        }
        Ok(Some((kernel, programs.stages())))
    }
}

/// How a kernel is launched.
fn resident_plan(shared_bytes: u32, step_rows: usize) -> ResidentPlan {
    ResidentPlan { launch_version: LAUNCH_VERSION, threads: BLOCK_THREADS, shared_bytes, step_rows }
}

impl Kernel {
    fn plan(&self, buffers: Vec<Buffer>, file: &str) -> ProgramPlan {
        ProgramPlan {
            buffers,
            scratch_bytes: 0,
            stages: self.program.sequence().into_iter().map(|(name, _, _)| name).collect(),
            costs: self.program.costs(),
            code: plan_file(file, &self.cubin.bytes),
            resident: Some(resident_plan(self.shared_bytes, self.program.step_rows)),
        }
    }
}

/// Machine code of all kernels, each by a thread of its own: it takes seconds. A kernel is a text and the rows of
/// its step.
fn assemble(
    name: &str,
    kernels: &[(&CudaText, usize)],
    arch: Arch,
    cubins: Option<&Path>,
) -> Result<Vec<Cubin>, CompileError> {
    std::thread::scope(|scope| {
        let started: Vec<_> = kernels
            .iter()
            .map(|(kernel, step_rows)| {
                scope.spawn(|| assemble_one(name, kernel, budget(*step_rows), arch, cubins))
            })
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Machine code of a kernel.
fn assemble_one(
    name: &str,
    kernel: &CudaText,
    budget: Budget,
    arch: Arch,
    cubins: Option<&Path>,
) -> Result<Cubin, CompileError> {
    let nvrtc = Nvrtc::find()?;
    let file = format!("{name}.cu");
    let text = nvrtc::CudaText { name: &file, text: &kernel.text };
    let options = Options::default();
    let cubin = match cubins {
        Some(folder) => CubinCache::new(folder).compile(&nvrtc, &text, arch, &options)?.cubin,
        None => nvrtc.compile(&text, arch, &options)?,
    };
    // A kernel that spills is right, and slow. The tests hold every family's kernel to this budget.
    if let Err(over) = cubin.check(&[(KERNEL, budget)]) {
        tracing::warn!("{over}");
    }
    Ok(cubin)
}
