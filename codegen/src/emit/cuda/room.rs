//! Whether a kernel has room for a program: its shared memory, and what it keeps in registers.

use tilec_ir::format::{Code, Format};
use tilec_ir::launch::{SLICE_ROWS, SLOT_BYTES};
use tilec_ir::octet::octet_block_scales;
use tilec_ir::resident::{Attention, Experts, Gemm, Kind, ResidentProgram, Stage, part_columns};
use tilec_ir::stages::BufferElem;
use tilec_kernels_gen::cuda::SharedNeeds;

use super::{CudaError, NamedProgram};
use crate::nvrtc::Arch;

/// Shared memory that a block may have, in bytes.
pub(super) const fn shared_available(arch: Arch) -> usize {
    match arch {
        Arch::Sm80 => 163 << 10,
        Arch::Sm89 | Arch::Sm120a => 99 << 10,
        Arch::Sm90a | Arch::Sm100a => 227 << 10,
    }
}

/// Shared memory for all programs of a kernel.
pub(super) fn together(parts: &[NamedProgram<'_>]) -> SharedNeeds {
    parts.iter().map(|(program, _)| needs(program)).reduce(SharedNeeds::both).unwrap_or_default()
}

/// Checks what a kernel has no room for.
pub(super) fn check(program: &ResidentProgram) -> Result<(), CudaError> {
    let (rows, most) = (program.step_rows, part_columns(program.step_rows));
    for (stage, _, Stage { kind, .. }) in program.sequence() {
        if let Kind::Attention(Attention { heads, .. }) = kind {
            let (heads, context) = (*heads, program.context);
            let parts = heads * program.max_parts() * program.kv.v_dim;
            if u32::try_from(rows * parts).is_err() {
                return Err(CudaError::Parts { rows, heads, context });
            }
        }
        // A strip's columns are few, however long the rows are.
        if matches!(kind, Kind::Experts(Experts { bands: Some(_), .. })) {
            continue;
        }
        let whole = |gemm: &&Gemm| matches!(kind, Kind::Experts(_)) || gemm.format.code == Code::E2m1;
        if let Some(k) = kind.gemm().filter(whole).map(|gemm| gemm.k).filter(|k| *k > most) {
            return Err(CudaError::Columns { stage, k, rows, most });
        }
    }
    Ok(())
}

pub(super) fn needs(program: &ResidentProgram) -> SharedNeeds {
    let mut needs = SharedNeeds {
        slices: program.step_rows / SLICE_ROWS,
        operands: 1,
        scaled: false,
        qk: program.kv.qk_dim,
        v: program.kv.v_dim,
        ..SharedNeeds::default()
    };
    let attention = program.bodies.iter().flatten().filter_map(|stage| stage.kind.attention());
    let mut heads: Vec<_> = attention.map(|of| (of.heads, of.kv_heads, of.window)).collect();
    heads.sort_unstable();
    heads.dedup();
    needs.deals = heads.len();
    for (_, _, stage) in program.sequence() {
        if let Some(gemm) = stage.kind.gemm() {
            needs.operands = needs.operands.max(gemm.operands);
            needs.scaled |= gemm.format == Format::FP8_BLOCK;
            needs.block_scales = needs.block_scales.max(octet_block_scales(gemm.format));
            if program.buffer(gemm.input).elem == BufferElem::F32 {
                needs.row_columns = needs.row_columns.max(gemm.k);
            }
        }
        match &stage.kind {
            Kind::Scores(scores) => {
                let squares = usize::from(scores.norm.is_some() && scores.squares.is_none());
                needs.scores = needs.scores.max(1 + squares);
            }
            Kind::Attention(Attention { router: Some(scores), .. }) => {
                needs.scores = needs.scores.max(1 + usize::from(scores.expects));
            }
            _ => {}
        }
        if let Kind::Experts(experts) = &stage.kind {
            needs.experts = needs.experts.max(experts.experts);
            needs.top_k = needs.top_k.max(experts.top_k);
            // Slots are no shorter than that.
            let together = experts.bands.map_or(0, |bands| bands.slots(&experts.gemm, SLOT_BYTES));
            needs.together = needs.together.max(together);
            let unscaled = experts.route.as_ref().and_then(|route| route.unscaled);
            needs.foresees |= unscaled.is_some_and(|unscaled| unscaled.foreseen.is_some());
        }
    }
    needs
}
