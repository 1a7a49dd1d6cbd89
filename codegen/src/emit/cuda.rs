//! The text of a resident kernel: the device code of `kernels-gen/cuda`, a structure of constants and
//! an epilogue for every stage, and for each role the order of its work in a step.

use std::fmt::Write as _;
use tilec_ir::abi::KvType;
use tilec_ir::format::{Code, Format};
use tilec_ir::graph::{ActivationFn, Scoring};
use tilec_ir::handoff::Handoff;
use tilec_ir::launch::{KERNEL, OCTET, SLICE_ROWS};
use tilec_ir::octet::{apart_scales, feature_scales, octet_block_bytes, octet_block_scales, octet_blocks};
use tilec_ir::resident::{
    Attention, Bias, CHUNK, Context, Conv, Epilogue, Experts, Gemm, Kind, Norm, Pairs, Prepared, ROW_BLOCK,
    Reader, Replaced, ResidentProgram, Route, RouterTiles, SPAN, Scores, Stage, Taps, TopK, part_columns,
    prepared_order,
};
use tilec_ir::stages::{BufferElem, BufferId, Slot};
use tilec_kernels_gen::cuda::{
    ATTENTION, BASE, BLOCK, CHUNKS, CONTEXT, CONV, EXPERTS, FORMATS, GEMM, HANDOFF, Header, PREPARED, PTX,
    ROUND, ROWS, SAMPLE, SELECTOR, STEP, SWEEPS, SharedLayout, SharedNeeds, UNITS,
};

use super::merge::{NO_OFFSET, NO_WINDOW, merge_layers};
use crate::nvrtc::Arch;

/// A line of the text; `writeln!` to a string cannot fail.
macro_rules! line {
    ($out:expr) => { $out.text.push('\n') };
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out.text, $($arg)*); }};
}

/// Bytes a second that the floors in comments assume: what one H200 reads.
const FLOOR_BYTES_PER_SECOND: f64 = 4.59e12;

/// The text of a kernel, and what launching it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaText {
    /// CUDA C++, complete: no header is included.
    pub text: String,
    /// Use of shared memory.
    pub shared: SharedLayout,
}

/// Why a program has no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// An expert's row, or one that is multiplied with FP4, is too long.
    #[error(
        "stage {stage} has rows of {k} columns; a kernel with {rows} rows a step keeps at most {most} of experts and of FP4 in registers{}",
        if *rows > SLICE_ROWS { "; lower limits.pass_rows" } else { "" }
    )]
    Columns {
        /// The stage.
        stage: String,
        /// Columns of its input.
        k: usize,
        /// Rows of the kernel's step.
        rows: usize,
        /// Columns that it keeps.
        most: usize,
    },
    /// Shared memory is too small.
    #[error(
        "{arch} has {available} bytes of shared memory for a block, too little for a ring beside heads of {heads} columns"
    )]
    Shared {
        /// The architecture.
        arch: &'static str,
        /// Its bytes.
        available: usize,
        /// Columns of a head.
        heads: usize,
    },
    /// The parts of a context's attention are more numbers than a word tells apart.
    #[error(
        "{rows} rows of {heads} heads over {context} positions: too many parts of sums; lower limits.context"
    )]
    Parts {
        /// Rows of a step.
        rows: usize,
        /// Query heads.
        heads: usize,
        /// Positions of a sequence.
        context: usize,
    },
}

/// Shared memory that a block may have, in bytes.
const fn shared_available(arch: Arch) -> usize {
    match arch {
        Arch::Sm80 => 163 << 10,
        Arch::Sm89 | Arch::Sm120a => 99 << 10,
        Arch::Sm90a | Arch::Sm100a => 227 << 10,
    }
}

/// The programs of a round: a block guesses, a step of the model verifies, and what it leaves becomes the draft's
/// context. All have steps of as many rows.
#[derive(Clone, Copy, Debug)]
pub struct RoundPrograms<'p> {
    /// The model's step, which leaves taps.
    pub model: &'p ResidentProgram,
    /// What makes the draft's context.
    pub inject: &'p ResidentProgram,
    /// A block of the draft.
    pub block: &'p ResidentProgram,
    /// Token of a row to be guessed.
    pub mask_token: u32,
}

impl RoundPrograms<'_> {
    /// What the names of a round's stages begin with, in the order of its steps.
    pub const PREFIXES: [&'static str; 3] = ["draft ", "", "inject "];

    /// The inject of a round, and the buffer of its taps. The rows of the model's step are all injected, and in their
    /// order: so the step leaves their taps where the first product reads them, and no stage takes them there.
    fn inject(&self) -> Option<(ResidentProgram, BufferId)> {
        let mut inject = self.inject.clone();
        let mut taken = None;
        inject.before.retain(|stage| match stage.kind {
            Kind::Taps { output } => {
                taken = Some(output);
                false
            }
            _ => true,
        });
        taken.map(|taken| (inject, taken))
    }

    /// Names of the stages of a round, in their order.
    pub fn stages(&self) -> Vec<String> {
        let inject = self.inject();
        let inject = inject.as_ref().map_or(self.inject, |(inject, _)| inject);
        let programs = [self.block, self.model, inject].into_iter().zip(RoundPrograms::PREFIXES);
        let names = |(program, prefix): (&ResidentProgram, &str)| -> Vec<String> {
            program.sequence().into_iter().map(|(name, _, _)| format!("{prefix}{name}")).collect()
        };
        programs.flat_map(names).collect()
    }
}

/// Emits the kernel of a program for an architecture. The same program makes the same text.
///
/// # Errors
/// [`CudaError`].
pub fn emit(program: &ResidentProgram, arch: Arch) -> Result<CudaText, CudaError> {
    emit_parts(&[(program, ["", "b.args.arena", "b.args.kv"])], None, arch)
}

/// Emits the kernel that runs whole rounds of a draft. `None` where the programs do not fit together into one
/// kernel: one has steps of other rows, pieces of weights would be cut otherwise than in the model's own kernel (and
/// so sums have other bits), or shared memory is too small for all.
///
/// # Errors
/// [`CudaError`], as for each program by itself.
pub fn emit_round(round: RoundPrograms<'_>, arch: Arch) -> Result<Option<CudaText>, CudaError> {
    let RoundPrograms { model, block, mask_token, .. } = round;
    let Some((inject, taps)) = round.inject() else { return Ok(None) };
    let parts = [
        (block, ["Draft", "b.args.block_arena", "b.args.draft_kv"]),
        (model, ["", "b.args.arena", "b.args.kv"]),
        (&inject, ["Inject", "b.args.inject_arena", "b.args.draft_kv"]),
    ];
    let fits = parts.iter().all(|(program, _)| {
        program.step_rows == model.step_rows && program.kv.page_tokens == model.kv.page_tokens
    });
    if !fits || together(&parts).slot() != needs(model).slot() || block.vocab != model.vocab {
        return Ok(None);
    }
    match emit_parts(&parts, Some(Round { mask_token, taps }), arch) {
        Err(CudaError::Shared { .. }) => Ok(None),
        text => text.map(Some),
    }
}

/// What a kernel of rounds has beside its programs.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Token of a row to be guessed.
    mask_token: u32,
    /// Buffer of the inject's rows of taps.
    taps: BufferId,
}

/// A program of a kernel; what its structures' names begin with, and where its activations and its cache are.
type NamedProgram<'p> = (&'p ResidentProgram, [&'static str; 3]);

/// Shared memory for all programs of a kernel.
fn together(parts: &[NamedProgram<'_>]) -> SharedNeeds {
    parts.iter().map(|(program, _)| needs(program)).reduce(SharedNeeds::both).unwrap_or_default()
}

/// The kernel of one program, or of those of a round.
fn emit_parts(
    programs: &[NamedProgram<'_>],
    round: Option<Round>,
    arch: Arch,
) -> Result<CudaText, CudaError> {
    let needs = together(programs);
    let available = shared_available(arch);
    let shared =
        needs.layout(available).ok_or(CudaError::Shared { arch: arch.name(), available, heads: needs.qk })?;
    for (program, _) in programs {
        check(program)?;
    }
    let merged: Vec<_> = programs.iter().map(|(program, _)| merge_layers(program)).collect();
    let parts = programs.iter().zip(&merged).map(|((program, [prefix, arena, kv]), (merged, windows))| {
        // A verified program has readers.
        let readers = program.readers().unwrap_or_default();
        // In rounds, whose text is that of three programs, looks cost more than they save.
        let handoffs = match round {
            Some(_) => vec![Handoff::default(); merged.sequence().len()],
            None => merged.handoffs(),
        };
        Part { program: merged, windows, readers, handoffs, prefix, arena, kv }
    });
    let mut out = Writer { text: String::new(), parts: parts.collect(), at: 0, checks: Vec::new(), round };
    out.head(&shared, &needs);
    out.tables();
    out.order();
    out.header(&ROWS);
    out.header(&UNITS);
    out.header(&ATTENTION);
    for (header, ring) in [(&SWEEPS, true), (&CHUNKS, false)] {
        if programs.iter().any(|(program, _)| program.rings() == ring) {
            out.header(header);
        }
    }
    out.header(&PREPARED);
    out.header(&GEMM);
    if needs.experts > 0 {
        out.header(&EXPERTS);
    }
    let any = |of: fn(&Kind) -> bool| {
        programs.iter().any(|(program, _)| program.sequence().iter().any(|(_, _, stage)| of(&stage.kind)))
    };
    if any(|kind| matches!(kind, Kind::Conv(_))) {
        out.header(&CONV);
    }
    let of_context = |stage: &Stage| matches!(stage.kind, Kind::Taps { .. } | Kind::Context(_));
    if programs.iter().any(|(program, _)| program.before.iter().any(of_context)) {
        out.header(&CONTEXT);
    }
    out.header(&STEP);
    if out.vocab() > 0 {
        out.header(&SAMPLE);
    }
    if any(|kind| matches!(kind, Kind::Pairs(_))) {
        out.header(&SELECTOR);
    }
    if let Some(Round { mask_token, taps }) = round {
        line!(out, "\nconstexpr u32 VOCAB = {}, MASK_TOKEN = {mask_token};", out.vocab());
        out.header(&ROUND);
        out.at = 2;
        line!(out, "\n// Taps, which the model's step leaves where the draft's context is made of them.");
        out.tap_rows("TapRows", taps);
    }
    for part in 0..out.parts.len() {
        out.at = part;
        let mut checks = out.parts[part].checks().into_iter();
        for (prefix, stages) in out.parts[part].lists() {
            for stage in stages {
                out.checks = checks.next().unwrap_or_default();
                out.stage(&prefix, stage);
            }
        }
    }
    out.roles();
    out.kernel(needs.experts > 0);
    Ok(CudaText { text: out.text, shared })
}

/// Checks what a kernel has no room for.
fn check(program: &ResidentProgram) -> Result<(), CudaError> {
    let (rows, most) = (program.step_rows, part_columns(program.step_rows));
    for (stage, _, Stage { kind, .. }) in program.sequence() {
        if let Kind::Attention(Attention { heads, .. }) = kind {
            let (heads, context) = (*heads, program.context);
            let parts = heads * program.max_parts() * program.kv.v_dim;
            if u32::try_from(rows * parts).is_err() {
                return Err(CudaError::Parts { rows, heads, context });
            }
        }
        let whole = |gemm: &&Gemm| matches!(kind, Kind::Experts(_)) || gemm.format.code == Code::E2m1;
        if let Some(k) = kind.gemm().filter(whole).map(|gemm| gemm.k).filter(|k| *k > most) {
            return Err(CudaError::Columns { stage, k, rows, most });
        }
    }
    Ok(())
}

/// The tap of a layer that has none.
const NO_TAP: u32 = u32::MAX;

fn needs(program: &ResidentProgram) -> SharedNeeds {
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
            let unscaled = experts.route.as_ref().and_then(|route| route.unscaled);
            needs.foresees |= unscaled.is_some_and(|unscaled| unscaled.foreseen.is_some());
            if !experts.shares_slot(program.step_rows) {
                needs.operands = needs.operands.max(experts.tile_octets(program.step_rows));
            }
        }
    }
    needs
}

/// A kind of layers whose attention is dealt out alike: the structures of their stages, and one of them.
struct Deal {
    /// That of the layer first.
    names: Vec<String>,
    /// Query heads, KV heads, and the window.
    heads: (usize, usize, u32),
    /// Of the kernel's programs.
    part: usize,
    /// Of all programs, one behind the other.
    layer: usize,
}

/// A program of the kernel's.
struct Part<'p> {
    program: &'p ResidentProgram,
    /// Windows of the layers, where one body has several.
    windows: &'p [u32],
    /// Who reads what the stages of the step prepare.
    readers: Vec<Reader>,
    /// How the stages of the step hand on what they make.
    handoffs: Vec<Handoff>,
    /// What the names of its structures begin with.
    prefix: &'p str,
    /// Where its activations are, and its cache.
    arena: &'p str,
    kv: &'p str,
}

struct Writer<'p> {
    text: String,
    parts: Vec<Part<'p>>,
    /// The part whose stages are written.
    at: usize,
    /// Mailboxes at whose words the stage that is written looks.
    checks: Vec<BufferId>,
    /// What only a kernel of rounds has.
    round: Option<Round>,
}

impl<'p> Part<'p> {
    /// The lists of stages with the prefix of their names.
    fn lists(&self) -> Vec<(String, &'p [Stage])> {
        let (program, prefix) = (self.program, self.prefix);
        let bodies =
            program.bodies.iter().enumerate().map(|(n, body)| (format!("{prefix}Layer{n}"), body.as_slice()));
        let before = [(prefix.to_string(), program.before.as_slice())];
        let after = [(prefix.to_string(), program.after.as_slice())];
        before.into_iter().chain(bodies).chain(after).collect()
    }

    /// Kinds of stages.
    fn kinds(&self) -> usize {
        self.lists().iter().map(|(_, stages)| stages.len()).sum()
    }

    /// The mailboxes that each kind of stage looks at, in one layer or another.
    fn checks(&self) -> Vec<Vec<BufferId>> {
        let mut checks = vec![Vec::new(); self.kinds()];
        for ((kind, _), handoff) in self.program.step_order().into_iter().zip(&self.handoffs) {
            checks[kind].extend(&handoff.checks);
        }
        checks
    }

    /// The mailboxes that the step's stages clear.
    fn mailboxes(&self) -> Vec<BufferId> {
        let mut boxes: Vec<_> =
            self.handoffs.iter().flat_map(|handoff| handoff.clears.iter().copied()).collect();
        boxes.sort_unstable();
        boxes.dedup();
        boxes
    }
}

impl<'p> Writer<'p> {
    /// The program whose stages are written.
    fn program(&self) -> &'p ResidentProgram {
        self.parts[self.at].program
    }

    /// Columns of the logits; 0 without.
    fn vocab(&self) -> usize {
        self.parts.iter().map(|part| part.program.vocab).max().unwrap_or(0)
    }

    /// Layers of all programs.
    fn layers(&self) -> usize {
        self.parts.iter().map(|part| part.program.layers.len()).sum()
    }

    fn header(&mut self, header: &Header) {
        line!(self, "\n// ==== {} {}\n", header.name, "=".repeat(88 - header.name.len()));
        self.text.push_str(header.text);
    }

    fn head(&mut self, shared: &SharedLayout, needs: &SharedNeeds) {
        let layers = match self.layers() {
            0 => String::new(),
            layers => format!(" of {layers} layers"),
        };
        let costs = self.parts.iter().flat_map(|part| part.program.costs());
        let bytes: u64 = costs.map(|cost| cost.streamed_bytes(1) * cost.runs as u64).sum();
        let what = if self.round.is_some() { "rounds with a draft" } else { "a step" };
        let name = &self.model().name;
        line!(self, "// {name}: {what}{layers} as one resident kernel.");
        line!(
            self,
            "// Streams {} of weights {}: {:.1} us at {:.2} TB/s.",
            size(bytes),
            if self.round.is_some() { "a round" } else { "a step" },
            micros(bytes),
            FLOOR_BYTES_PER_SECOND / 1e12
        );
        self.header(&BASE);
        self.header(&PTX);
        self.header(&FORMATS);
        line!(self, "\n// Sizes of this kernel.");
        line!(self, "constexpr u32 STEP_ROWS = {};  // rows of a step, at most", self.program().step_rows);
        line!(self, "constexpr u32 SLOT_BYTES = {};", shared.slot);
        line!(self, "constexpr u32 RING_SLOTS = {};", shared.slots);
        line!(self, "constexpr u32 FIXED_BYTES = {};", shared.fixed);
        line!(self, "constexpr u32 SCRATCH_BYTES = {};", shared.scratch);
        line!(self, "constexpr u32 SUM_BYTES = {};  // of these, for sums", shared.scratch - needs.scales());
        line!(self, "constexpr u32 SCALE_BYTES = {};  // of these, at the end", needs.scales());
        if needs.experts > 0 {
            line!(self, "constexpr u32 ROUTES_BYTES = {};  // of the fixed ones, at the end", needs.routes());
            let (experts, slots) = (needs.experts, needs.top_k);
            line!(self, "constexpr u32 MAX_EXPERTS = {experts}, MAX_SLOTS = {slots};");
        }
        line!(self, "constexpr bool FORESEES = {};  // experts, before they are chosen", needs.foresees);
        line!(self, "constexpr u32 LAYERS = {};", self.layers());
        let counts: Vec<usize> = self.parts.iter().map(|part| part.program.sequence().len()).collect();
        let stages: usize = counts.iter().sum();
        let round = self.round.is_some();
        let whole = if round { "round" } else { "step" };
        line!(self, "constexpr u32 STAGES = {stages};  // of a {whole}");
        line!(self, "constexpr bool ROUND = {round};");
        line!(self, "constexpr u32 DEALS = {};", self.deals().len());
        let first = match counts[..] {
            [block, model, _] => format!("kind == 0 ? 0 : kind == 1 ? {block} : {}", block + model),
            _ => "0".into(),
        };
        line!(self, "__device__ __forceinline__ u32 first_stage(u32 kind) {{ return {first}; }}");
        let ends = match counts[..] {
            [block, model, _] => format!("n == {block} || n == {} || n == STAGES", block + model),
            _ => "n == STAGES".into(),
        };
        line!(self, "// Whether a step ends in front of stage n.");
        line!(self, "__device__ __forceinline__ bool ends_step(u32 n) {{ return {ends}; }}");
        self.mailboxes();
        self.header(&HANDOFF);
        self.header(&BLOCK);
    }

    /// Where mailboxes are, who clears them, and which crossings they check.
    fn mailboxes(&mut self) {
        let list = |values: Vec<String>| values.join(", ");
        let (mut at, mut bytes, mut octets) = (Vec::new(), Vec::new(), Vec::new());
        let (mut clears, mut checked) = (Vec::new(), Vec::new());
        for part in &self.parts {
            let boxes = part.mailboxes();
            for buffer in boxes.iter().map(|id| part.program.buffer(*id)) {
                at.push(format!("{:#x}", buffer.offset));
                bytes.push(buffer.row_bytes().to_string());
                octets.push(u8::from(buffer.elem == BufferElem::Bf16).to_string());
            }
            let sequence = part.program.sequence();
            for (n, handoff) in part.handoffs.iter().enumerate() {
                let bit = |id: &BufferId| 1u32 << boxes.binary_search(id).unwrap_or_default();
                clears.push(format!("{:#x}", handoff.clears.iter().map(bit).sum::<u32>()));
                let next = part.handoffs.get(n + 1).is_some_and(Handoff::checked);
                let few = matches!(sequence[n].2.kind, Kind::Attention(_));
                checked.push(if next { 1 + u8::from(few) } else { 0 }.to_string());
            }
        }
        debug_assert!(
            at.len() <= 32 && (at.is_empty() || self.parts.len() == 1),
            "a bit each, of one program"
        );
        line!(
            self,
            "// Mailboxes, where there are any, the stages that clear them, and the crossings that are checked."
        );
        line!(self, "constexpr u32 MAILBOXES = {};", at.len());
        let count = at.len().max(1);
        line!(self, "__constant__ u64 MAILBOX_AT[{count}] = {{{}}};", list(at));
        line!(self, "__constant__ u32 MAILBOX_ROW_BYTES[{count}] = {{{}}};", list(bytes));
        line!(self, "__constant__ u8 MAILBOX_OCTETS[{count}] = {{{}}};", list(octets));
        line!(self, "__constant__ u32 STAGE_CLEARS[STAGES] = {{{}}};", list(clears));
        line!(self, "__constant__ u8 CROSSING_CHECKED[STAGES] = {{{}}};", list(checked));
    }

    /// Whether a stage looks at the words of a buffer.
    fn checked(&self, buffer: BufferId) -> bool {
        self.checks.contains(&buffer)
    }

    /// The program that leaves taps, or the only one.
    fn model(&self) -> &'p ResidentProgram {
        self.parts.get(1).unwrap_or(&self.parts[0]).program
    }

    /// What differs from layer to layer: offsets of weights, caches.
    fn tables(&mut self) {
        let name = &self.model().name;
        line!(self, "\n// ==== {name} {}\n", "=".repeat(88_usize.saturating_sub(name.len())));
        for stage in self.parts.iter().flat_map(|part| &part.program.before) {
            if let Kind::Context(context) = &stage.kind {
                let slots = context.k_norms.iter().map(|norm| match norm.map(|norm| norm.gain) {
                    Some(Slot::Fixed(at)) => at,
                    _ => 0,
                });
                let gains: Vec<String> = slots.map(|at| format!("{at:#x}")).collect();
                line!(self, "// Gains of the keys of each layer.");
                let layers = context.k_norms.len();
                line!(self, "__constant__ u64 KEY_GAIN[{layers}] = {{{}}};", gains.join(", "));
            }
        }
        if self.layers() == 0 {
            return;
        }
        let layers = || self.parts.iter().flat_map(|part| &part.program.layers);
        let columns = layers().map(|layer| layer.offsets.len()).max().unwrap_or(0).max(1);
        line!(self, "// Byte offsets of each layer's weights, in the order of its stages.");
        line!(self, "__constant__ u64 LAYER_OFFSETS[LAYERS][{columns}] = {{");
        for layer in layers() {
            let offsets: Vec<String> = layer.offsets.iter().map(|at| format!("{at:#x}")).collect();
            line!(self, "  {{{}}},", offsets.join(", "));
        }
        line!(self, "}};");
        let list = |values: Vec<u64>| values.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let caches = list(layers().map(|layer| layer.cache as u64).collect());
        line!(self, "__constant__ u32 LAYER_CACHE[LAYERS] = {{{caches}}};");
        if self.parts.iter().any(|part| !part.windows.is_empty()) {
            // Of a program without, nobody asks.
            let of = |part: &Part<'_>, layer| part.windows.get(layer).copied().unwrap_or(NO_WINDOW);
            let windows = self
                .parts
                .iter()
                .flat_map(|part| (0..part.program.layers.len()).map(move |layer| u64::from(of(part, layer))));
            let windows = list(windows.collect());
            line!(self, "__constant__ u32 LAYER_WINDOW[LAYERS] = {{{windows}}};");
        }
        if let Some(Taps { layers: tapped, cols }) = &self.model().taps {
            let tap = |layer: usize| tapped.iter().position(|own| *own == layer);
            let taps = self.parts.iter().flat_map(|part| {
                let own = std::ptr::eq(part.program, self.model());
                (0..part.program.layers.len()).map(move |layer| tap(layer).filter(|_| own))
            });
            let taps = list(taps.map(|tap| tap.map_or(u64::from(NO_TAP), |tap| tap as u64)).collect());
            line!(self, "// What a draft reads: which tap a layer's residual stream is.");
            line!(self, "constexpr u32 TAPS = {}, TAP_COLS = {cols}, NO_TAP = {NO_TAP};", tapped.len());
            line!(self, "__constant__ u32 LAYER_TAP[LAYERS] = {{{taps}}};");
        }
    }

    /// The stages of a step. A kind of stage is one structure, whatever the layer.
    fn order(&mut self) {
        // Kinds and layers of all programs, one behind the other.
        let (mut kinds, mut layers) = (0, 0);
        let mut sequence = Vec::new();
        for part in &self.parts {
            let of = |(kind, layer): (usize, Option<usize>)| (kinds + kind, layer.map(|n| layers + n));
            sequence.extend(part.program.step_order().into_iter().map(of));
            kinds += part.kinds();
            layers += part.program.layers.len();
        }
        let list = |numbers: Vec<usize>| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        line!(self, "// The stages of a step, by kind, and their layers.");
        let kinds = list(sequence.iter().map(|(kind, _)| *kind).collect());
        line!(self, "__constant__ u16 STAGE_KIND[STAGES] = {{{kinds}}};");
        let layers = list(sequence.iter().map(|(_, layer)| layer.unwrap_or(0)).collect());
        line!(self, "__constant__ u16 STAGE_LAYER[STAGES] = {{{layers}}};");
        let prepares = |part: &Part<'_>| {
            part.program.sequence().iter().any(|(_, _, stage)| stage.kind.prepares().is_some())
        };
        let readers = || self.parts.iter().flat_map(|part| &part.readers);
        if self.parts.iter().any(prepares) {
            line!(
                self,
                "// Of stages that prepare rows: byte offset of the gains, and the order of the pieces."
            );
            let gains: Vec<String> = readers().map(|reader| format!("{:#x}", reader.gain)).collect();
            line!(self, "__constant__ u64 STAGE_GAIN[STAGES] = {{{}}};", gains.join(", "));
        }
        line!(self, "constexpr u32 ROW_BLOCK = {ROW_BLOCK};");
        let orders = list(readers().map(|reader| reader.order as usize).collect());
        line!(self, "__constant__ u8 STAGE_ORDER[STAGES] = {{{orders}}};");
    }

    fn stage(&mut self, prefix: &str, stage: &Stage) {
        line!(self);
        let name = type_name(prefix, &stage.name);
        match &stage.kind {
            Kind::Embed { table, format, scales, vocab, k, replaced, output, prepares } => {
                line!(self, "// {}: a row of {vocab} x {k} {format} for each token.", stage.name);
                line!(self, "struct {name} {{");
                line!(self, "  using Weights = {};", weights_type(*format));
                line!(self, "  static constexpr u32 K = {k}, BLOCKS = {};", octet_blocks(*format, *k));
                let table = self.weight(*table);
                self.function("const u8*", "table", "const Block& b", &format!("return {table};"));
                self.scales(*format, *scales, *k);
                let (token, vector) = match replaced {
                    Some(Replaced { token, vector }) => (
                        format!("{token}u"),
                        format!("return reinterpret_cast<const float*>({});", self.weight(*vector)),
                    ),
                    None => ("~0u".into(), "return nullptr;".into()),
                };
                line!(self, "  static constexpr u32 REPLACED = {token};");
                self.function("const float*", "replaced", "const Block& b", &vector);
                let out = self.buffer(*output);
                self.function("float*", "out", "const Block& b", &format!("return {out};"));
                self.prepares(*prepares);
                line!(self, "}};");
            }
            Kind::Taps { output } => {
                let cols = self.program().buffer(*output).cols;
                line!(self, "// {}: {cols} columns of each row.", stage.name);
                self.tap_rows(&name, *output);
            }
            Kind::Context(context) => self.context(&name, &stage.name, context),
            Kind::Gemm(gemm) => {
                self.open_gemm(&name, &stage.name, gemm, ("", gemm.weight_bytes() as u64), (1, false));
                self.epilogue(gemm, None);
                line!(self, "}};");
            }
            Kind::Scores(scores) => self.scores(&name, &stage.name, scores, false),
            Kind::Experts(experts) => self.experts(&name, &stage.name, experts),
            Kind::Attention(attention) => {
                self.attention(&name, &stage.name, attention);
                if let Some(scores) = &attention.router {
                    line!(self);
                    self.scores(&router_name(&name), "scores of the rows before", scores, true);
                }
            }
            Kind::Conv(conv) => self.conv(&name, &stage.name, conv),
            Kind::TopK(top) => {
                line!(self, "// {}: {} of each segment.", stage.name, top.k);
                line!(self, "struct {name} {{");
                self.top_lists(top);
                line!(self, "}};");
            }
            Kind::Pairs(pairs) => self.pairs(&name, &stage.name, pairs),
            Kind::Walk { k, tokens, scores } => {
                line!(self, "// {}: from guess to guess.", stage.name);
                line!(self, "struct {name} {{");
                line!(self, "  static constexpr u32 K = {k};");
                self.floats("u32", "tokens", *tokens);
                self.floats("float", "scores", *scores);
                line!(self, "}};");
            }
        }
    }

    /// A function that gives a buffer of four bytes a value, as these.
    fn floats(&mut self, elem: &str, name: &str, buffer: BufferId) {
        let at = format!("return reinterpret_cast<{elem}*>({});", self.buffer(buffer));
        self.function(&format!("{elem}*"), name, "const Block& b", &at);
    }

    /// A convolution.
    fn conv(&mut self, name: &str, stage: &str, conv: &Conv) {
        let Conv { input, norm, kernels, base, side, group, residual, output } = conv;
        let cols = self.program().buffer(*input).cols;
        line!(self, "// {stage}: {cols} columns in groups of {group}, side {side}.");
        line!(self, "struct {name} {{");
        let (out_type, elem) = self.out_types(*output);
        line!(self, "  using Out = {out_type};");
        let stride = self.program().buffer(*kernels).cols;
        line!(
            self,
            "  static constexpr u32 COLS = {cols}, GROUP = {group}, KERNELS = {stride}, SIDE = {side}, ORDER = {};",
            self.order_of(*output)
        );
        line!(self, "  static constexpr bool NORM = {}, RESIDUAL = {residual};", norm.is_some());
        line!(self, "  static constexpr float EPS = {};", float(norm.map_or(0.0, |norm| norm.eps)));
        self.gain(*norm);
        self.floats("const float", "input", *input);
        self.floats("const float", "kernels", *kernels);
        let base = format!("return reinterpret_cast<const float*>({});", self.weight(*base));
        self.function("const float*", "base", "const Block& b", &base);
        let out = self.buffer(*output);
        self.function(&format!("{elem}*"), "out", "const Block& b", &format!("return {out};"));
        line!(self, "}};");
    }

    /// What lists of the largest logits are like.
    fn top_lists(&mut self, top: &TopK) {
        let TopK { vocab, k, segments, lists } = *top;
        line!(self, "  static constexpr u32 VOCAB = {vocab}, K = {k}, SEGMENTS = {segments};");
        self.floats("u64", "lists", lists);
    }

    /// Scores of pairs.
    fn pairs(&mut self, name: &str, stage: &str, pairs: &Pairs) {
        let Pairs { top, factor, softcap, hidden, rank, tables, tokens, scores } = pairs;
        line!(self, "// {stage}: {0} x {0} by {rank} columns.", top.k);
        line!(self, "struct {name} {{");
        self.top_lists(top);
        let stride = self.program().buffer(*hidden).cols;
        let blocks = octet_blocks(tables[0].1, *rank);
        line!(self, "  static constexpr u32 RANK = {rank}, BLOCKS = {blocks}, HIDDEN = {stride};");
        line!(self, "  static constexpr float FACTOR = {};", float(*factor));
        let capped = match softcap {
            Some(softcap) => format!("return {0} * tanhf(v / {0});", float(*softcap)),
            None => "return v;".into(),
        };
        self.function("float", "softcap", "float v", &capped);
        for ((slot, format), (of, what)) in tables.iter().zip([("before", "Before"), ("behind", "Behind")]) {
            line!(self, "  using {what} = {};", weights_type(*format));
            let table = format!("return {};", self.weight(*slot));
            self.function("const u8*", of, "const Block& b", &table);
        }
        self.floats("const float", "hidden", *hidden);
        self.floats("u32", "tokens", *tokens);
        self.floats("float", "scores", *scores);
        line!(self, "}};");
    }

    fn function(&mut self, result: &str, name: &str, arguments: &str, body: &str) {
        line!(self, "  __device__ __forceinline__ static {result} {name}({arguments}) {{ {body} }}");
    }

    /// Scales of block FP8, a row for each octet. (Those of features are the epilogue's.)
    fn scales(&mut self, format: Format, slot: Option<Slot>, k: usize) {
        if let Some(slot) = slot.filter(|_| !feature_scales(format)) {
            line!(self, "  static constexpr u32 SCALES = {};", apart_scales(format, k));
            let scales = format!("return reinterpret_cast<const float*>({});", self.weight(slot));
            self.function("const float*", "scales", "const Block& b", &scales);
        }
    }

    /// What a product says of itself, but for its epilogue. `times` says how often it is made, of `bytes`.
    fn open_gemm(
        &mut self,
        name: &str,
        stage: &str,
        gemm: &Gemm,
        (times, bytes): (&str, u64),
        (octets, shares_slot): (usize, bool),
    ) {
        let pair = if gemm.operands == 2 { "2 x " } else { "" };
        let (router_tiles, tiles) =
            (gemm.router_tiles(), gemm.tiles().div_ceil(octets) + gemm.router_tiles());
        line!(
            self,
            "// {stage}: {times}{pair}{} x {} {}, {}, {:.2} us.",
            gemm.cols,
            gemm.k,
            gemm.format,
            size(bytes),
            micros(bytes)
        );
        line!(self, "struct {name} {{");
        line!(self, "  using Weights = {};", weights_type(gemm.format));
        line!(
            self,
            "  static constexpr u32 K = {}, BLOCKS = {}, COLS = {};",
            gemm.k,
            gemm.blocks(),
            gemm.cols
        );
        line!(self, "  static constexpr u32 OPERANDS = {}, TILES = {tiles};", gemm.operands);
        line!(self, "  static constexpr u32 TILE_OCTETS = {octets}, ROUTER_TILES = {router_tiles};");
        line!(self, "  static constexpr bool SHARES_SLOT = {shares_slot};");
        let half = self.program().buffer(gemm.input).elem != BufferElem::F32;
        let logits = gemm.epilogue == Epilogue::Logits;
        line!(
            self,
            "  static constexpr bool NORM = {}, PREPARED = {}, SCALED = {}, HALF_INPUT = {half}, ROW_SCALE = {}, LOGITS = {logits};",
            gemm.norm.is_some(),
            gemm.prepared.is_some(),
            self.scaled(gemm),
            gemm.format == Format::F16
        );
        let row_octets = half && !self.program().in_slots(gemm.input);
        line!(
            self,
            "  static constexpr bool ROW_OCTETS = {row_octets}, CHECKED = {};",
            self.checked(gemm.input)
        );
        let order =
            if gemm.prepared.is_some() { prepared_order(gemm.format) } else { self.order_of(gemm.input) };
        line!(self, "  static constexpr u32 ORDER = {order};");
        line!(self, "  static constexpr float EPS = {};", float(gemm.norm.map_or(0.0, |norm| norm.eps)));
        let weights = self.weight(gemm.weights);
        self.function("const u8*", "weights", "const Block& b", &format!("return {weights};"));
        self.scales(gemm.format, gemm.scales, gemm.k);
        let input = self.buffer(gemm.input);
        let elem = if half { "u16" } else { "float" };
        self.function(&format!("const {elem}*"), "input", "const Block& b", &format!("return {input};"));
        match gemm.prepared {
            Some(prepared) => {
                let squares = format!("return {};", self.buffer(prepared.squares));
                self.function("const float*", "squares", "const Block& b", &squares);
            }
            None => self.gain(gemm.norm),
        }
        if let Some(router) = gemm.router {
            let [stride, old] = [router.output, router.before].map(|id| self.program().buffer(id).cols);
            line!(
                self,
                "  static constexpr u32 STRIDE = {stride}, OLD_STRIDE = {old};  // of scores of {} experts",
                router.experts
            );
            let weights = format!("return {};", self.weight(router.weights));
            self.function("const u8*", "router_weights", "const Block& b", &weights);
            self.floats("const float", "old_scores", router.before);
            self.floats("float", "scores", router.output);
        }
        let partial = gemm
            .partial
            .map_or("nullptr".into(), |id| format!("reinterpret_cast<float2*>({})", self.buffer(id)));
        self.function("float2*", "partial", "const Block& b", &format!("return {partial};"));
    }

    /// Whether the stage before is a router of the same rows, which leaves what normalizes them; or a choice in front of
    /// the product does.
    fn scaled(&self, gemm: &Gemm) -> bool {
        let chooses = |stage: &Stage| match &stage.kind {
            Kind::Experts(experts) => {
                let unscaled = experts.route.as_ref().is_some_and(|route| route.unscaled.is_some());
                unscaled && std::ptr::eq(&experts.gemm, gemm)
            }
            _ => false,
        };
        if self.program().bodies.iter().flatten().any(chooses) {
            return true;
        }
        let same = |stages: &[Stage]| match (&stages[0].kind, stages[1].kind.gemm()) {
            (Kind::Scores(scores), Some(next)) => {
                std::ptr::eq(next, gemm)
                    && scores.squares.is_some()
                    && scores.squares == gemm.prepared.map(|prepared| prepared.squares)
            }
            _ => false,
        };
        self.program().bodies.iter().any(|stages| stages.windows(2).any(same))
    }

    /// The gains of a norm that a stage sees to itself.
    fn gain(&mut self, norm: Option<Norm>) {
        let gain = norm.map_or("nullptr".into(), |norm| {
            format!("reinterpret_cast<const float*>({})", self.weight(norm.gain))
        });
        self.function("const float*", "gain", "const Block& b", &format!("return {gain};"));
    }

    /// What a stage prepares for a norm.
    fn prepares(&mut self, prepares: Option<Prepared>) {
        line!(self, "  static constexpr bool PREPARES = {};", prepares.is_some());
        if let Some(Prepared { halves, squares }) = prepares {
            let (halves, squares) = (self.buffer(halves), self.buffer(squares));
            self.function("u16*", "halves", "const Block& b", &format!("return {halves};"));
            self.function("float*", "next_squares", "const Block& b", &format!("return {squares};"));
            let gain = "return reinterpret_cast<const float*>(b.args.weights + STAGE_GAIN[b.number]);";
            self.function("const float*", "next_gain", "const Block& b", gain);
        }
    }

    /// The scores of a router, or a part of them.
    fn scores(&mut self, name: &str, stage: &str, scores: &Scores, part: bool) {
        let Scores { experts, k, format, .. } = scores;
        let bytes = scores.weight_bytes() as u64;
        line!(self, "// {stage}: {experts} x {k} {format}, {}, {:.2} us.", size(bytes), micros(bytes));
        line!(self, "struct {name} {{");
        let stride = self.program().buffer(scores.output).cols;
        line!(self, "  static constexpr u32 K = {k}, EXPERTS = {experts}, STRIDE = {stride};");
        let (norm, prepared) = (scores.norm.is_some(), scores.squares.is_some());
        // What it reads is a sum that stays, no mailbox.
        line!(
            self,
            "  static constexpr bool NORM = {norm}, PREPARED = {prepared}, CHECKED = false, LOGITS = false;"
        );
        line!(self, "  static constexpr float EPS = {};", float(scores.norm.map_or(0.0, |norm| norm.eps)));
        let weights = self.weight(scores.weights);
        let weights = match *format {
            Format::BF16 => {
                let blocks = octet_blocks(*format, *k);
                format!("return octet_columns({weights}, {blocks}, expert, column, more / 32);")
            }
            _ => format!(
                "return *reinterpret_cast<const float4*>({weights} + ((u64)expert * K + column + more) * 4);"
            ),
        };
        self.gain(scores.norm);
        if let Some(squares) = scores.squares {
            let squares = format!("return {};", self.buffer(squares));
            self.function("const float*", "squares", "const Block& b", &squares);
        }
        self.function("float4", "weights4", "const Block& b, u32 expert, u32 column, u32 more", &weights);
        let bias = scores.bias.map_or("nullptr".into(), |slot| {
            format!("reinterpret_cast<const float*>({})", self.weight(slot))
        });
        self.function("const float*", "bias", "const Block& b", &format!("return {bias};"));
        line!(
            self,
            "  static constexpr bool SIGMOID = {}, PART = {part}, ADDED = {}, EXPECTS = {};",
            scores.sigmoid,
            scores.added.is_some(),
            scores.expects
        );
        if part {
            let (unit, experts) = match *format {
                Format::BF16 => {
                    let octet = octet_blocks(*format, *k) * octet_block_bytes(*format);
                    (octet, OCTET)
                }
                _ => (*k * 4, 1),
            };
            let weights = self.weight(scores.weights);
            let place = format!(
                "const u32 first = expert / {experts}; from = {weights} + (u64)first * {unit}; \
                 bytes = ((expert + count - 1) / {experts} - first + 1) * {unit};"
            );
            self.function(
                "void",
                "place",
                "const Block& b, u32 expert, u32 count, const u8*& from, u32& bytes",
                &place,
            );
        }
        if let Some(added) = scores.added {
            let added = format!("return reinterpret_cast<const float*>({});", self.weight(added));
            self.function("const float*", "added", "const Block& b", &added);
        }
        let correction = scores.correction.map_or("nullptr".into(), |slot| {
            format!("reinterpret_cast<const float*>({})", self.weight(slot))
        });
        self.function("const float*", "correction", "const Block& b", &format!("return {correction};"));
        let (input, out) = (self.buffer(scores.input), self.buffer(scores.output));
        self.function("const float*", "input", "const Block& b", &format!("return {input};"));
        self.function("float*", "out", "const Block& b", &format!("return {out};"));
        line!(self, "}};");
    }

    /// A product of experts, and how they are chosen if it is the first of its layer.
    fn experts(&mut self, name: &str, stage: &str, experts: &Experts) {
        let Experts { gemm, experts: count, top_k, route } = experts;
        let routes = type_name(name, "route");
        if let Some(Route { scores, routing, unscaled }) = route {
            let scoring = match routing.scoring {
                Scoring::Softmax => "SOFTMAX",
                Scoring::ChosenSoftmax => "CHOSEN_SOFTMAX",
                Scoring::Sigmoid => "SIGMOID",
            };
            line!(self, "// The choice of {top_k} of {count} experts.");
            line!(self, "struct {routes} {{");
            let stride = self.program().buffer(*scores).cols;
            line!(
                self,
                "  static constexpr u32 EXPERTS = {count}, SLOTS = {top_k}, STRIDE = {stride}, SCORING = {scoring};"
            );
            let factor = float(routing.factor);
            line!(
                self,
                "  static constexpr bool RENORMALIZE = {}, CHECKED = {};",
                routing.renormalize,
                self.checked(*scores)
            );
            line!(self, "  static constexpr float FACTOR = {factor};");
            let foreseen = unscaled.and_then(|unscaled| unscaled.foreseen);
            line!(
                self,
                "  static constexpr bool UNSCALED = {}, FORESEEN = {};",
                unscaled.is_some(),
                foreseen.is_some()
            );
            let scores = format!("return {};", self.buffer(*scores));
            self.function("const float*", "scores", "const Block& b", &scores);
            if let Some(before) = foreseen {
                let (cols, bytes) = (self.program().buffer(before).cols, gemm.weight_bytes());
                line!(self, "  static constexpr u32 FORECAST_STRIDE = {cols}, EXPERT_BYTES = {bytes};");
                let half = if cols > stride { format!(" + {stride}") } else { String::new() };
                let expected = format!("return {}{half};", self.buffer(before));
                self.function("const float*", "expected", "const Block& b", &expected);
            }
            if let Some(unscaled) = unscaled {
                let (k, eps) = (unscaled.k, float(unscaled.eps));
                line!(self, "  static constexpr u32 K = {k};");
                line!(self, "  static constexpr float EPS = {eps};");
                self.floats("const float", "squares", unscaled.squares);
                for (name, slot) in [("bias", unscaled.bias), ("correction", unscaled.correction)] {
                    let vector = slot.map_or("nullptr".into(), |slot| {
                        format!("reinterpret_cast<const float*>({})", self.weight(slot))
                    });
                    self.function("const float*", name, "const Block& b", &format!("return {vector};"));
                }
            }
            line!(self, "}};");
        }
        let bytes = (*top_k * gemm.weight_bytes()) as u64;
        let rows = self.program().step_rows;
        let octets = experts.tile_octets(rows);
        self.open_gemm(
            name,
            stage,
            gemm,
            (&format!("{top_k} of {count} times "), bytes),
            (octets, experts.shares_slot(rows)),
        );
        line!(self, "  static constexpr u32 SLOTS = {top_k};");
        line!(self, "  static constexpr bool FIRST = {};", route.is_some());
        if route.is_some() {
            line!(self, "  using Route = {routes};");
        }
        self.epilogue(gemm, Some(experts));
        if octets > 1 || gemm.prepares.is_some() {
            self.sums_of_octets(gemm);
        }
        line!(self, "}};");
    }

    /// Leaves a pair of the residual stream for a draft, in the layers with a tap.
    fn tap(&self, gemm: &Gemm, pair: &str) -> Option<String> {
        let store = match self.round {
            Some(_) => format!(
                "store_pair<TapRows>(TapRows::Out(), TapRows::out(b), row, LAYER_TAP[b.layer] * TAP_COLS + feature, \
                 {pair});"
            ),
            None => format!(
                "*reinterpret_cast<float2*>(b.args.taps + ((u64)row * TAPS + LAYER_TAP[b.layer]) * TAP_COLS + \
                 feature) = {pair};"
            ),
        };
        (gemm.tap && self.program().taps.is_some())
            .then(|| format!("if (LAYER_TAP[b.layer] != NO_TAP) {store}"))
    }

    /// The epilogue's pieces of tiles of several octets, whose sums over the experts stay in registers.
    fn sums_of_octets(&mut self, gemm: &Gemm) {
        let out = format!("{} + row * {}u + feature", self.buffer(gemm.output), gemm.cols);
        let at = "u32 row, u32 feature";
        let sum = format!("return reinterpret_cast<const float2*>({out});");
        self.function("const float2*", "sum", &format!("const Control& b, {at}"), &sum);
        if feature_scales(gemm.format) {
            let scale = self.feature_scale(gemm, 0, Some("expert"));
            let arguments = "const Control& b, u32 expert, u32 feature";
            self.function("float2", "scale", arguments, &format!("return {scale};"));
        }
        let load = |bias: &Bias| {
            let at = format!("{} + (u64)expert * {}", self.weight(bias.slot), bias.cols * 4);
            format!("load_bias(bias, {at}, {}, {}, feature); ", bias.start, bias.cols)
        };
        let loads: String = gemm.bias.iter().map(load).collect();
        line!(self, "  static constexpr bool BIASED = {};", !loads.is_empty());
        let arguments = "const Control& b, u32 expert, u32 feature";
        self.function("float2", "bias", arguments, &format!("float2 bias = {{}}; {loads}return bias;"));
        let mut store = format!("*reinterpret_cast<float2*>({out}) = v;");
        if let Some(tap) = self.tap(gemm, "v") {
            store = format!("{store} {tap}");
        }
        self.function("void", "store", &format!("const Control& b, {at}, float2 v"), &store);
    }

    /// The scales of a pair of features of an operand, whose octets alternate with the others'.
    fn feature_scale(&self, gemm: &Gemm, operand: usize, expert: Option<&str>) -> String {
        // A verified program has them.
        let scales = gemm.scales.map_or("nullptr".into(), |slot| self.weight(slot));
        let octets = match gemm.operands {
            1 => "feature / 2".to_string(),
            operands => {
                format!("feature / 8 * {} + {} + feature % 8 / 2", operands * 4, operand * 4)
            }
        };
        let pairs = gemm.tiles() * gemm.operands * 4;
        let before = expert.map_or(String::new(), |expert| format!("(u64){expert} * {pairs} + "));
        format!("reinterpret_cast<const float2*>({scales})[{before}{octets}]")
    }

    /// The epilogue's pieces, composed: what it loads ahead, then scale, bias, gate, residual and store.
    fn epilogue(&mut self, gemm: &Gemm, experts: Option<&Experts>) {
        let mut carried = Vec::new();
        let mut before = Vec::new();
        let mut body = Vec::new();
        let operands = gemm.operands;
        let chosen = if experts.is_some() { "const Chosen& chosen, " } else { "" };
        if feature_scales(gemm.format) {
            carried.push(format!("float2 scale[{operands}];"));
            for operand in 0..operands {
                let scale = self.feature_scale(gemm, operand, experts.map(|_| "chosen.expert"));
                before.push(format!("carry.scale[{operand}] = {scale};"));
                body.push(format!(
                    "v[{operand}].x *= carry.scale[{operand}].x; v[{operand}].y *= carry.scale[{operand}].y;"
                ));
            }
        }
        if !gemm.bias.is_empty() {
            carried.push(format!("float2 bias[{operands}];"));
            for bias in &gemm.bias {
                let (operand, start, cols) = (bias.operand, bias.start, bias.cols);
                let mut at = self.weight(bias.slot);
                if experts.is_some() {
                    at = format!("{at} + (u64)chosen.expert * {}", cols * 4);
                }
                before.push(format!("load_bias(carry.bias[{operand}], {at}, {start}, {cols}, feature);"));
            }
            for operand in 0..operands {
                body.push(format!(
                    "v[{operand}].x += carry.bias[{operand}].x; v[{operand}].y += carry.bias[{operand}].y;"
                ));
            }
        }
        let cols = gemm.cols;
        let place = match experts {
            Some(experts) if experts.route.is_some() => format!("(row * {}u + chosen.slot)", experts.top_k),
            _ => "row".into(),
        };
        let out = format!("{} + {place} * {cols}u + feature", self.buffer(gemm.output));
        let store = match self.program().buffer(gemm.output).elem {
            _ if gemm.epilogue == Epilogue::Residual => format!("*reinterpret_cast<float2*>({out}) = v[0];"),
            BufferElem::Bf16 => {
                let out = match experts {
                    Some(_) => out.clone(),
                    None => format!(
                        "{} + half_at(row, column_place(feature, {}), {cols})",
                        self.buffer(gemm.output),
                        self.order_of(gemm.output)
                    ),
                };
                format!("hand_on(reinterpret_cast<u32*>({out}), Bf16::pack(v[0].x, v[0].y));")
            }
            _ => format!("hand_on({out}, v[0]);"),
        };
        match gemm.epilogue {
            Epilogue::Store => body.push(store),
            Epilogue::Gated(activation) => {
                let gate = match activation {
                    ActivationFn::Silu => "silu_gate(".to_string(),
                    ActivationFn::Clamped { alpha, limit } => {
                        format!("clamped_gate({}, {}, ", float(alpha), float(limit))
                    }
                };
                body.push(format!("v[0].x = {gate}v[0].x, v[1].x); v[0].y = {gate}v[0].y, v[1].y);"));
                body.push(store);
            }
            Epilogue::Residual => {
                carried.push("float2 residual;".into());
                before.push(format!("carry.residual = *reinterpret_cast<const float2*>({out});"));
                body.push(match experts {
                    Some(_) => "v[0].x = fmaf(chosen.weight, v[0].x, carry.residual.x); v[0].y = fmaf(chosen.weight, v[0].y, carry.residual.y);".into(),
                    None => "v[0].x += carry.residual.x; v[0].y += carry.residual.y;".to_string(),
                });
                body.push(store);
                body.extend(self.tap(gemm, "v[0]"));
            }
            Epilogue::Logits => {
                body.push(format!("float* to = b.args.logits + (u64)row * {cols} + feature;"));
                body.push("to[0] = v[0].x;".into());
                let second = "to[1] = v[0].y;";
                body.push(if cols.is_multiple_of(8) {
                    second.into()
                } else {
                    format!("if (feature + 1 < {cols}) {{ {second} }}")
                });
            }
        }
        self.prepares(gemm.prepares);
        let guard =
            if cols.is_multiple_of(8) { String::new() } else { format!("if (feature >= {cols}) return; ") };
        line!(self, "  struct Carry {{ {} }};", carried.join(" "));
        self.function(
            "void",
            "before",
            &format!("const Control& b, u32 row, u32 feature, {chosen}Carry& carry"),
            &format!("{guard}{}", before.join(" ")),
        );
        line!(
            self,
            "  __device__ __forceinline__ static void finish(Control& b, u32 row, u32 feature, {chosen}float2 (&v)[{operands}], const Carry& carry) {{"
        );
        if !guard.is_empty() {
            line!(self, "    {}", guard.trim());
        }
        for statement in body {
            line!(self, "    {statement}");
        }
        line!(self, "  }}");
    }

    fn attention(&mut self, name: &str, stage: &str, attention: &Attention) {
        let kv = &self.program().kv;
        line!(
            self,
            "// {stage}: {} query heads over {} KV heads of {} and {} columns; {} B of cache a position.",
            attention.heads,
            attention.kv_heads,
            kv.qk_dim,
            kv.v_dim,
            attention.kv_heads * (kv.qk_dim + kv.v_dim) * kv.kv_type.bytes()
        );
        line!(self, "struct {name} {{");
        let half = if kv.kv_type == KvType::Bf16 { "Bf16" } else { "F16" };
        let (out_type, out_elem) = self.out_types(attention.output);
        line!(self, "  using Kv = {half};");
        line!(self, "  using Out = {out_type};");
        line!(
            self,
            "  static constexpr u32 HEADS = {}, KV_HEADS = {}, CACHE_HEADS = {}, QK = {}, V = {}, ORDER = {};",
            attention.heads,
            attention.kv_heads,
            kv.kv_heads,
            kv.qk_dim,
            kv.v_dim,
            self.order_of(attention.output)
        );
        let window = match attention.window {
            _ if !self.parts[self.at].windows.is_empty() => "LAYER_WINDOW[b.layer]".into(),
            Some(window) => window.to_string(),
            None => "NO_WINDOW".into(),
        };
        let windowed = attention.window.is_some() || !self.parts[self.at].windows.is_empty();
        let both = attention.bidirectional;
        line!(self, "  static constexpr bool WINDOWED = {windowed}, BOTH_WAYS = {both};");
        self.function("u32", "window", "const Block& b", &format!("return {window};"));
        let deals = self.deals();
        let named = |deal: &Deal| deal.names.iter().any(|own| own == name);
        let mut own = deals.iter().enumerate().filter(|(_, deal)| named(deal)).peekable();
        let mut deal = String::new();
        while let Some((number, of)) = own.next() {
            match own.peek() {
                Some(_) => deal.push_str(&format!("{window} == {} ? {number} : ", of.heads.2)),
                None => deal.push_str(&number.to_string()),
            }
        }
        self.function("u32", "deal", "const Block& b", &format!("return {deal};"));
        line!(
            self,
            "  static constexpr float SCALE = {}, VALUE_SCALE = {};",
            float(attention.scale),
            float(attention.value_scale)
        );
        let eps = attention.q_norm.or(attention.k_norm).map_or(0.0, |norm| norm.eps);
        line!(
            self,
            "  static constexpr bool Q_NORM = {}, K_NORM = {}, SINKS = {}, CHECKED = {};",
            attention.q_norm.is_some(),
            attention.k_norm.is_some(),
            attention.sinks.is_some(),
            self.checked(attention.input)
        );
        line!(self, "  static constexpr float EPS = {};", float(eps));
        let (dims, positions) = attention.rope.map_or((0, 0), |rope| (rope.dims, rope.positions));
        line!(
            self,
            "  static constexpr u32 ROPE = {dims}, POSITIONS = {positions}, PAGE_TOKENS = {}, V_PAD = {}, MAX_CHUNKS = {}, MAX_PARTS = {};",
            kv.page_tokens,
            kv.v_pad(),
            self.program().max_chunks(),
            self.program().max_parts()
        );
        let [near, far] = self.program().spans();
        line!(self, "  static constexpr u32 NEAR_SPAN = {near}, FAR_SPAN = {far};");
        self.kv();
        let floats = |slot: Option<Slot>| match slot {
            Some(slot) => format!("return reinterpret_cast<const float*>({});", self.weight(slot)),
            None => "return nullptr;".into(),
        };
        let gains = [
            ("q_gain", floats(attention.q_norm.map(|norm| norm.gain))),
            ("k_gain", floats(attention.k_norm.map(|norm| norm.gain))),
            ("rope", floats(attention.rope.map(|rope| rope.table))),
            ("sinks", self.sinks(attention.sinks, floats)),
        ];
        for (function, body) in gains {
            self.function("const float*", function, "const Block& b", &body);
        }
        let (input, out, parts) =
            (self.buffer(attention.input), self.buffer(attention.output), self.buffer(attention.parts));
        self.function("const float*", "input", "const Block& b", &format!("return {input};"));
        self.function(&format!("{out_elem}*"), "out", "const Block& b", &format!("return {out};"));
        self.function("float*", "parts", "const Block& b", &format!("return {parts};"));
        line!(self, "}};");
        debug_assert_eq!((CHUNK, SPAN), (128, 8), "units.cuh says so too");
    }

    /// Where sinks are: in some layers of a text nowhere.
    fn sinks(&self, sinks: Option<Slot>, floats: impl Fn(Option<Slot>) -> String) -> String {
        let all = floats(sinks);
        let Some(Slot::Layer(n)) = sinks else { return all };
        let layers = &self.program().layers;
        // Layers of other bodies have other numbers, so that this may be said where it need not be.
        match layers.iter().any(|layer| layer.offsets.get(n) == Some(&NO_OFFSET)) {
            true => format!("if (LAYER_OFFSETS[b.layer][{n}] == ~0ull) return nullptr; {all}"),
            false => all,
        }
    }

    /// Rows of taps, as the product that reads them wants them.
    fn tap_rows(&mut self, name: &str, rows: BufferId) {
        line!(self, "struct {name} {{");
        let (out_type, elem) = self.out_types(rows);
        line!(self, "  using Out = {out_type};");
        let (cols, order) = (self.program().buffer(rows).cols, self.order_of(rows));
        line!(self, "  static constexpr u32 COLS = {cols}, ORDER = {order};");
        let out = self.buffer(rows);
        self.function(&format!("{elem}*"), "out", "const Block& b", &format!("return {out};"));
        line!(self, "}};");
    }

    /// Where the cache is.
    fn kv(&mut self) {
        let body = format!("return {};", self.parts[self.at].kv);
        self.function("u8*", "kv", "const Block& b", &body);
    }

    /// The order of the columns of rows of halves, as their readers want it; plain if these do not agree.
    fn order_of(&self, buffer: BufferId) -> u32 {
        let program = self.program();
        let gemms = program.sequence().into_iter().filter_map(|(_, _, stage)| stage.kind.gemm());
        let mut orders = gemms.filter(|gemm| gemm.input == buffer).map(|gemm| prepared_order(gemm.format));
        let first = orders.next().unwrap_or(0);
        if orders.all(|order| order == first) && !program.in_slots(buffer) { first } else { 0 }
    }

    /// Types of a buffer's elements: as stages name them, and as they lie in memory.
    fn out_types(&self, buffer: BufferId) -> (&'static str, &'static str) {
        match self.program().buffer(buffer).elem {
            BufferElem::Bf16 => ("Bf16", "u16"),
            _ => ("F32", "float"),
        }
    }

    /// Keys and values of all of a draft's layers.
    fn context(&mut self, name: &str, stage: &str, context: &Context) {
        let kv = &self.program().kv;
        let Context { input, k_norms, kv_heads, rope, value_scale } = context;
        let layers = k_norms.len();
        line!(
            self,
            "// {stage}: {layers} layers of {kv_heads} KV heads of {} and {} columns; {} B of cache a position.",
            kv.qk_dim,
            kv.v_dim,
            layers * kv_heads * (kv.qk_dim + kv.v_dim) * kv.kv_type.bytes()
        );
        line!(self, "struct {name} {{");
        line!(self, "  using Kv = {};", if kv.kv_type == KvType::Bf16 { "Bf16" } else { "F16" });
        line!(
            self,
            "  static constexpr u32 LAYERS = {layers}, KV_HEADS = {kv_heads}, CACHE_HEADS = {}, QK = {}, V = {};",
            kv.kv_heads,
            kv.qk_dim,
            kv.v_dim
        );
        let norm = k_norms.first().copied().flatten();
        line!(self, "  static constexpr bool K_NORM = {}, CHECKED = false;", norm.is_some());
        let eps = norm.map_or(0.0, |norm| norm.eps);
        line!(self, "  static constexpr float EPS = {}, VALUE_SCALE = {};", float(eps), float(*value_scale));
        let (dims, positions) = rope.map_or((0, 0), |rope| (rope.dims, rope.positions));
        line!(
            self,
            "  static constexpr u32 ROPE = {dims}, POSITIONS = {positions}, PAGE_TOKENS = {}, V_PAD = {};",
            kv.page_tokens,
            kv.v_pad()
        );
        self.kv();
        let gain = "return reinterpret_cast<const float*>(b.args.weights + KEY_GAIN[layer]);";
        self.function("const float*", "k_gain", "const Block& b, u32 layer", gain);
        let rope = match rope {
            Some(rope) => format!("return reinterpret_cast<const float*>({});", self.weight(rope.table)),
            None => "return nullptr;".into(),
        };
        self.function("const float*", "rope", "const Block& b", &rope);
        let input = self.buffer(*input);
        self.function("const float*", "input", "const Block& b", &format!("return {input};"));
        line!(self, "}};");
    }

    /// The work of each role in a step.
    fn roles(&mut self) {
        line!(self, "\n// ---- The step, as each role sees it {}", "-".repeat(63));
        self.deal_caches();
        self.foresee_experts();
        self.role("bool load_step(Loader& b)", "", "return true;", "", |name, kind| match kind {
            Kind::Gemm(_) => format!("if (!stream<{name}>(b, {name}::weights(b))) return false;"),
            Kind::Attention(Attention { router, .. }) => {
                let scores = router
                    .as_ref()
                    .map_or(String::new(), |_| format!("prefetch_router<{}>(b); ", router_name(name)));
                format!("{scores}if (!stream_cache<{name}>(b, LAYER_CACHE[b.layer])) return false;")
            }
            Kind::Scores(scores) => format!("b.pass_tiles({}); b.next_stage();", scores.experts),
            Kind::Experts(_) => {
                format!("if (!stream_experts<{name}>(b, {name}::weights(b))) return false;")
            }
            _ => "b.next_stage();".into(),
        });
        self.role("void consume_step(Consumer& b)", "", "", "", |name, kind| match kind {
            Kind::Embed { .. } => format!("embed<{name}>(b);"),
            Kind::Gemm(_) => format!("multiply<{name}>(b);"),
            Kind::Scores(_) => format!("score_experts<{name}>(b);"),
            Kind::Experts(_) => format!("multiply_experts<{name}>(b);"),
            Kind::Attention(Attention { router, .. }) => {
                let scores = router
                    .as_ref()
                    .map_or(String::new(), |_| format!(" score_experts<{}>(b);", router_name(name)));
                format!("attend<{name}>(b, LAYER_CACHE[b.layer]);{scores} b.finish_stage();")
            }
            Kind::Taps { .. } => format!("take_taps<{name}>(b);"),
            Kind::Context(_) => format!("cache_context<{name}>(b);"),
            Kind::Conv(_) => format!("convolve<{name}>(b);"),
            Kind::TopK(_) => format!("take_segments<{name}>(b);"),
            Kind::Pairs(_) => format!("score_pairs<{name}>(b);"),
            Kind::Walk { .. } => format!("walk<{name}>(b);"),
        });
        let join = "if (n > 0 && !ends_step(n)) b.join_stage();  // the first with the step";
        let join = &format!("{join}\n    b.settle(n);");
        self.role(
            "void control_step(Control& b)",
            join,
            "",
            "b.cross(CROSSING_CHECKED[n], !ends_step(n + 1));",
            |name, kind| match kind {
                Kind::Embed { .. } | Kind::Taps { .. } | Kind::Context(_) => String::new(),
                Kind::Gemm(_) if asks_forecast(kind) => format!("ask_forecast(b, n); finish<{name}>(b);"),
                Kind::Gemm(_) => format!("finish<{name}>(b);"),
                Kind::Scores(scores) => format!("b.pass_tiles({});", scores.experts),
                Kind::Experts(_) => format!("finish_experts<{name}>(b);"),
                Kind::Attention(_) | Kind::Conv(_) | Kind::TopK(_) | Kind::Pairs(_) | Kind::Walk { .. } => {
                    String::new()
                }
            },
        );
    }

    /// The kinds of stages, in the order of their numbers, with the prefix of their names.
    fn kinds(&self) -> Vec<(String, &'p Stage)> {
        let lists = self.parts.iter().flat_map(Part::lists);
        lists.flat_map(|(prefix, stages)| stages.iter().map(move |stage| (prefix.clone(), stage))).collect()
    }

    /// Kinds of layers whose attention is dealt out alike.
    fn deals(&self) -> Vec<Deal> {
        let (mut deals, mut layers) = (Vec::<Deal>::new(), 0);
        for (part, Part { program, windows, prefix, .. }) in self.parts.iter().enumerate() {
            for (number, layer) in program.layers.iter().enumerate() {
                for stage in &program.bodies[layer.body] {
                    let Some(attention) = stage.kind.attention() else { continue };
                    let own = attention.window.map(|window| window as u32);
                    let name = type_name(&format!("{prefix}Layer{}", layer.body), &stage.name);
                    let window = windows.get(number).copied().or(own).unwrap_or(NO_WINDOW);
                    let heads = (attention.heads, attention.kv_heads, window);
                    match deals.iter_mut().find(|other| other.part == part && other.heads == heads) {
                        Some(other) if other.names.contains(&name) => {}
                        Some(other) => other.names.push(name),
                        None => deals.push(Deal { names: vec![name], heads, part, layer: layers + number }),
                    }
                }
            }
            layers += program.layers.len();
        }
        deals
    }

    /// What the second does when a step begins.
    fn deal_caches(&mut self) {
        line!(self, "\n__device__ __forceinline__ bool deal_caches(Control& b) {{");
        let round = self.round.is_some();
        for part in 0..self.parts.len() {
            let deals: Vec<Deal> = self.deals().into_iter().filter(|deal| deal.part == part).collect();
            if deals.is_empty() {
                continue;
            }
            if round {
                line!(self, "  if (b.kind() == {part}) {{");
            }
            let indent = if round { "    " } else { "  " };
            for Deal { names, layer, .. } in deals {
                line!(self, "{indent}b.layer = {layer};");
                line!(self, "{indent}deal_units<{}>(b);", names[0]);
            }
            line!(self, "{indent}return true;");
            if round {
                line!(self, "  }}");
            }
        }
        if round || self.deals().is_empty() {
            line!(self, "  return false;");
        }
        line!(self, "}}");
    }

    /// What the watchdog does for the stages that ask for a forecast.
    fn foresee_experts(&mut self) {
        let asks = |stage: &Stage| asks_forecast(&stage.kind);
        let chooses = |stage: &Stage| matches!(stage.kind, Kind::Experts(Experts { route: Some(_), .. }));
        let mut cases = Vec::new();
        let mut number = 0;
        for (prefix, stages) in self.parts.iter().flat_map(Part::lists) {
            // A verified program has both.
            let [asks, chooses] = [stages.iter().position(asks), stages.iter().position(chooses)];
            if let Some((asks, chooses)) = asks.zip(chooses) {
                let route = type_name(&type_name(&prefix, &stages[chooses].name), "route");
                cases.push((number + asks, route));
            }
            number += stages.len();
        }
        line!(self, "\n__device__ __forceinline__ void foresee_experts(const Block& b, u32 stage) {{");
        if !cases.is_empty() {
            line!(self, "  switch (STAGE_KIND[stage]) {{");
            for (asks, route) in cases {
                line!(self, "    case {asks}: foresee<{route}>(b); break;");
            }
            line!(self, "  }}");
        }
        line!(self, "}}");
    }

    /// A loop over the step's stages, so that what they share is in the text, and in the SM's cache of
    /// instructions, once.
    fn role(
        &mut self,
        signature: &str,
        front: &str,
        end: &str,
        behind: &str,
        work: impl Fn(&str, &Kind) -> String,
    ) {
        line!(self, "\n__device__ __forceinline__ {signature} {{");
        let round = self.round.is_some();
        if round {
            line!(self, "  u32 n = first_stage(b.kind());");
        }
        line!(self, "#pragma unroll 1");
        line!(self, "{}", if round { "  do {" } else { "  for (u32 n = 0; n < STAGES; ++n) {" });
        line!(self, "    b.number = n;");
        line!(self, "    b.layer = STAGE_LAYER[n];");
        if !front.is_empty() {
            line!(self, "    {front}");
        }
        line!(self, "    switch (STAGE_KIND[n]) {{");
        for (number, (prefix, stage)) in self.kinds().into_iter().enumerate() {
            let work = work(&type_name(&prefix, &stage.name), &stage.kind);
            line!(self, "    case {number}: {work}{}break;", if work.is_empty() { "" } else { " " });
        }
        line!(self, "    }}");
        if !behind.is_empty() {
            line!(self, "    {behind}");
        }
        line!(self, "{}", if round { "  } while (!ends_step(++n));" } else { "  }" });
        if !end.is_empty() {
            line!(self, "  {end}");
        }
        line!(self, "}}");
    }

    fn kernel(&mut self, experts: bool) {
        // Behind the stages, if the launch asks for it.
        let round = self.round.is_some();
        let (steps, take, choose) = match round {
            true => ("(args.block_passes + 2) * args.steps", "take_sequences", "choose_round"),
            false => ("args.steps", "take_rows", "choose"),
        };
        let ([begin, sample], sampled) = match self.vocab() {
            0 => ([String::new(), String::new()], ""),
            vocab => (
                [
                    format!("\n    if (args.sampling) sample_begin(b, {vocab});"),
                    format!(
                        "\n      const u32 round = *(volatile u32*)&shared.round;\
                         \n      if (round != 0) {{\
                         \n        sample_round(b, {vocab}, round);\
                         \n        continue;\
                         \n      }}"
                    ),
                ],
                match round {
                    true => {
                        "\n        if (args.sampling && !b.second && b.kind() == MODEL_STEP) \
                         b.choose_by_chance();"
                    }
                    false => "\n        if (args.sampling && !b.second) b.choose_by_chance();",
                },
            ),
        };
        // What experts add.
        let (routes_bytes, routed, report) = match experts {
            true => (
                " - ROUTES_BYTES",
                "\n    Routes& routes = *reinterpret_cast<Routes*>(scratch - ROUTES_BYTES);\
                 \n    barrier_init(&routes.routed, CONSUMERS);\
                 \n    barrier_init(&routes.forecast, 1);\
                 \n    routes.total = routes.asks = routes.loaded = routes.all_foreseen = routes.all_wrong = 0;",
                "\n      report_experts(b);",
            ),
            false => ("", "", ""),
        };
        let attentions: Vec<String> = self
            .kinds()
            .iter()
            .filter(|(_, stage)| matches!(stage.kind, Kind::Attention(_)))
            .map(|(prefix, stage)| type_name(prefix, &stage.name))
            .collect();
        line!(self);
        for name in &attentions {
            line!(self, "static_assert(sizeof(AttentionSpace<{name}>) <= SCRATCH_BYTES - SCALE_BYTES);");
        }
        let clear: String = attentions.iter().map(|name| format!("\n    clear_parts<{name}>(b);")).collect();
        let _ = write!(
            self.text,
            r#"static_assert(sizeof(Shared) <= FIXED_BYTES{routes_bytes});

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) {KERNEL}(const __grid_constant__ LaunchArgs args) {{
  u8* const memory = shared_memory();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  u8* const scratch = memory + FIXED_BYTES;
  u8* const ring = scratch + SCRATCH_BYTES;
  if (threadIdx.x == 0) {{
    for (u32 i = 0; i < RING_SLOTS; ++i) {{
      barrier_init(&shared.full[i], FULL_ARRIVALS);
      barrier_init(&shared.empty[i], CONSUMERS);
    }}
    barrier_init(&shared.ready, 1);
    for (u64& sent : shared.sent) barrier_init(&sent, 1);
    barrier_init(&shared.opened, 1);
    barrier_init(&shared.scaled, CONSUMERS);
    barrier_init(&shared.done, CONSUMERS + 1);  // and the second{routed}
    for (u32 i = 0; i < SUM_BUFFERS; ++i) {{
      barrier_init(&shared.sums_full[i], CONSUMERS);
      barrier_init(&shared.sums_empty[i], 2);
    }}
    shared.steps = {steps};
    shared.stage = shared.loader_stage = shared.loader_steps = shared.crossings = shared.step = shared.round = shared.rounds = 0;
    for (u32& role : shared.waiting) role = 0;
    for (auto& dealt : shared.dealt_for) dealt[0] = ~0u;  // no runs
    barriers_visible();
  }}
  __syncthreads();
  const Block block = {{args, shared, ring, scratch, 0, 0, 0, blockIdx.x}};
  if (warp_id() < CONSUMERS) {{
    registers_up<CONSUMER_REGISTERS>();
    Consumer b(block);{clear}{begin}
    for (;;) {{
      b.wait_inputs();{sample}
      // Control opens the first stage of a step when it knows whether there is one.
      if (b.step >= *(volatile u32*)&shared.steps) break;
      consume_step(b);
      b.next_step();
    }}
  }} else {{
    registers_down<OTHER_REGISTERS>();
    if (warp_id() == LOADER) {{
      if (lane_id() < LOADER_LANES) {{
        Loader b(block);
        while (b.more() && load_step(b)) b.next_step();
        b.drain();
      }}
    }} else if (warp_id() == CONTROL || warp_id() == SECOND) {{
      Control b(block, warp_id() == SECOND);
      if (!b.second) {take}(b);
      for (b.open_step(); b.step < *(volatile u32*)&shared.steps; b.open_step()) {{
        control_step(b);{sampled}
        b.wait_loader();
        {choose}(b);
      }}{report}
      b.leave();
    }} else {{
      watch(block);
    }}
  }}
}}
"#
        );
    }

    /// The address of packed weights.
    fn weight(&self, slot: Slot) -> String {
        match slot {
            Slot::Fixed(at) if at >= 1 << 32 => format!("b.args.weights + far({at:#x})"),
            Slot::Fixed(at) => format!("b.args.weights + {at:#x}"),
            Slot::Layer(n) => format!("b.args.weights + LAYER_OFFSETS[b.layer][{n}]"),
        }
    }

    /// The address of a buffer, typed.
    fn buffer(&self, id: BufferId) -> String {
        let buffer = self.program().buffer(id);
        let elem = if buffer.elem == BufferElem::F32 { "float" } else { "u16" };
        let arena = self.parts[self.at].arena;
        format!("reinterpret_cast<{elem}*>({arena} + {:#x} /* {} */)", buffer.offset, buffer.name)
    }
}

/// `q+k+v` behind the prefix `Layer0`: `Layer0QKV`.
fn type_name(prefix: &str, name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let upper = |word: &str| {
        let mut chars = word.chars();
        chars.next().map_or(String::new(), |first| first.to_ascii_uppercase().to_string() + chars.as_str())
    };
    let name: String = words.map(upper).collect();
    format!("{prefix}{name}")
}

/// Whether a stage's product asks for a forecast of experts.
fn asks_forecast(kind: &Kind) -> bool {
    matches!(kind, Kind::Gemm(Gemm { router: Some(RouterTiles { foresees: true, .. }), .. }))
}

/// The structure of the scores that are made behind attention.
fn router_name(attention: &str) -> String {
    format!("{attention}Scores")
}

fn weights_type(format: Format) -> &'static str {
    match format {
        Format::BF16 => "Bf16",
        Format::FP8_BLOCK => "E4m3",
        Format::FP8_1X128 => "E4m3Rows",
        Format::FP8_CHANNEL => "E4m3Channel",
        Format::MXFP4 => "Mxfp4",
        Format::NVFP4 => "Nvfp4",
        _ => "F16",
    }
}

/// A float literal that reads back as the same number.
fn float(value: f32) -> String {
    let text = format!("{value:e}");
    match text.strip_suffix("e0") {
        Some(plain) if plain.contains('.') => format!("{plain}f"),
        Some(whole) => format!("{whole}.0f"),
        None => format!("{text}f"),
    }
}

fn micros(bytes: u64) -> f64 {
    bytes as f64 / FLOOR_BYTES_PER_SECOND * 1e6
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
