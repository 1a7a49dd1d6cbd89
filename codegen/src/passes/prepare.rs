//! Rows that products read behind a norm are prepared by whoever makes them.
//!
//! Left to the readers, every SM would read whole rows in float32, multiply them with the gains, add up their
//! squares and round them, in front of its first product and once for every stage. The maker has a row's values in
//! registers anyway: it leaves them as bf16 times the gains, and the squares of an octet as one number. A
//! reader's consumers then load halves as they are.
//!
//! Products in f16 keep doing it for themselves: their rows are scaled by their largest value first, which no
//! maker of a part of a row knows.

use super::resident::Lowering;
use tilec_ir::format::Format;
use tilec_ir::launch::OCTET;
use tilec_ir::resident::{Epilogue, Gemm, Kind, Prepared, ROW_BLOCK, ResidentProgram, Stage};
use tilec_ir::stages::{BufferElem, BufferId};

/// Prepares the rows of every buffer whose makers can.
pub(super) fn rows(lowering: &mut Lowering<'_>, program: &mut ResidentProgram) {
    let behind_norm = stages(program).filter_map(|stage| stage.kind.gemm()).filter(|gemm| wants(gemm));
    let mut sources: Vec<BufferId> = behind_norm.map(|gemm| gemm.input).collect();
    sources.sort_unstable();
    sources.dedup();
    for source in sources {
        let (name, cols) = {
            let buffer = &lowering.buffers[source.0 as usize];
            (buffer.name.clone(), buffer.cols)
        };
        if !stages(program).filter(|stage| output(&stage.kind) == Some(source)).all(|stage| can(&stage.kind))
        {
            continue;
        }
        let known = lowering.buffers.len();
        let halves = cols.next_multiple_of(ROW_BLOCK);
        let squares = (cols / OCTET).next_multiple_of(4);
        let mut set = |name: String| Prepared {
            halves: lowering.buffer(&format!("{name}.halves"), BufferElem::Bf16, halves),
            squares: lowering.buffer(&format!("{name}.squares"), BufferElem::F32, squares),
        };
        // What a layer's last maker leaves, and what those in its middle do: a set is cleared between its readers and
        // its next maker (`tilec_ir::handoff`), which takes a few stages.
        let makers =
            |list: &Vec<Stage>| list.iter().filter(|stage| output(&stage.kind) == Some(source)).count();
        let last = set(name.clone());
        let middle = if program.bodies.iter().any(|body| makers(body) > 1) {
            set(format!("{name}.middle"))
        } else {
            last
        };
        let sets = [last, middle];
        let mut changed = program.clone();
        changed.buffers.clone_from(&lowering.buffers);
        for list in lists_mut(&mut changed) {
            let makers = makers(list);
            let (mut made, mut read) = (0, sets[0]);
            for stage in list {
                let makes = output(&stage.kind) == Some(source);
                made += usize::from(makes);
                let own = sets[usize::from(made < makers)];
                prepare(stage, source, read, own);
                if makes {
                    read = own;
                }
            }
        }
        // Two norms of the same rows would need two preparations.
        if changed.readers().is_ok() {
            *program = changed;
        } else {
            lowering.buffers.truncate(known);
        }
    }
}

/// Has a stage read the rows of one set, and make those of another.
fn prepare(stage: &mut Stage, source: BufferId, read: Prepared, made: Prepared) {
    let makes = output(&stage.kind) == Some(source);
    match &mut stage.kind {
        Kind::Embed { prepares, .. } if makes => *prepares = Some(made),
        // A router reads the rows in float32, but does not have to look at them twice.
        Kind::Scores(scores) if scores.input == source && scores.norm.is_some() => {
            scores.squares = Some(read.squares);
        }
        Kind::Gemm(gemm) | Kind::Experts(tilec_ir::resident::Experts { gemm, .. }) => {
            if makes {
                gemm.prepares = Some(made);
            }
            if gemm.input == source && wants(gemm) {
                gemm.input = read.halves;
                gemm.prepared = Some(read);
            }
        }
        _ => {}
    }
}

/// Whether a product would read prepared rows.
fn wants(gemm: &Gemm) -> bool {
    gemm.norm.is_some() && gemm.format != Format::F16 && gemm.prepared.is_none()
}

/// What a stage writes.
fn output(kind: &Kind) -> Option<BufferId> {
    match kind {
        Kind::Embed { output, .. } | Kind::Taps { output } => Some(*output),
        Kind::Scores(scores) => Some(scores.output),
        Kind::Attention(attention) => Some(attention.output),
        Kind::Conv(conv) => Some(conv.output),
        Kind::Context(_) | Kind::TopK(_) | Kind::Pairs(_) | Kind::Walk { .. } => None,
        kind => kind.gemm().filter(|gemm| gemm.epilogue != Epilogue::Logits).map(|gemm| gemm.output),
    }
}

/// Whether a stage has the values of its output in registers, octet by octet.
fn can(kind: &Kind) -> bool {
    match kind {
        Kind::Embed { .. } => true,
        Kind::Gemm(gemm) => matches!(gemm.epilogue, Epilogue::Store | Epilogue::Residual),
        Kind::Experts(experts) => experts.gemm.epilogue == Epilogue::Residual,
        _ => false,
    }
}

fn stages(program: &ResidentProgram) -> impl Iterator<Item = &Stage> {
    program.before.iter().chain(program.bodies.iter().flatten()).chain(&program.after)
}

/// The lists of stages. What the first makes, and the last stage of a layer, is what the next one reads.
fn lists_mut(program: &mut ResidentProgram) -> impl Iterator<Item = &mut Vec<Stage>> {
    [&mut program.before].into_iter().chain(&mut program.bodies).chain([&mut program.after])
}
