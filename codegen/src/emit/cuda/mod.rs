//! The text of a resident kernel: the device code of `kernels-gen/cuda`, a structure of constants and
//! an epilogue for every stage, and for each role the order of its work in a step.

use std::fmt::Write as _;
use tilec_ir::handoff::Handoff;
use tilec_ir::launch::SLICE_ROWS;
use tilec_ir::octet::octet_blocks;
use tilec_ir::resident::{Experts, Kind, Reader, Replaced, ResidentProgram, Stage};
use tilec_ir::stages::{BufferElem, BufferId, Slot};
use tilec_kernels_gen::cuda::{
    ACTIVATIONS, ATTENTION, BANDS, CHUNKS, CONTEXT, CONV, EXPERTS, GEMM, Header, PREPARED, PRODUCTS, ROUND,
    ROUTER, ROWS, SAMPLE, SELECTOR, STEP, SWEEPS, SharedLayout, TEAMS, UNITS,
};

use super::merge::merge_layers;
use crate::nvrtc::Arch;
use experts::router_name;
use gemm::weights_type;
use room::{check, needs, shared_available, together};

/// A line of the text; `writeln!` to a string cannot fail.
macro_rules! line {
    ($out:expr) => { $out.text.push('\n') };
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out.text, $($arg)*); }};
}

mod attention;
mod draft;
mod experts;
mod gemm;
mod kernel;
mod room;
mod tables;

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
    out.header(&TEAMS);
    out.header(&ACTIVATIONS);
    out.header(&PRODUCTS);
    out.header(&GEMM);
    if needs.experts > 0 {
        out.header(&ROUTER);
        out.header(&EXPERTS);
    }
    let any = |of: fn(&Kind) -> bool| {
        programs.iter().any(|(program, _)| program.sequence().iter().any(|(_, _, stage)| of(&stage.kind)))
    };
    if any(|kind| matches!(kind, Kind::Experts(Experts { bands: Some(_), .. }))) {
        out.header(&BANDS);
    }
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

    /// Whether a stage looks at the words of a buffer.
    fn checked(&self, buffer: BufferId) -> bool {
        self.checks.contains(&buffer)
    }

    /// The program that leaves taps, or the only one.
    fn model(&self) -> &'p ResidentProgram {
        self.parts.get(1).unwrap_or(&self.parts[0]).program
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
                self.open_gemm(&name, &stage.name, gemm, ("", gemm.weight_bytes() as u64), (1, gemm.tiles()));
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

    fn function(&mut self, result: &str, name: &str, arguments: &str, body: &str) {
        line!(self, "  __device__ __forceinline__ static {result} {name}({arguments}) {{ {body} }}");
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
