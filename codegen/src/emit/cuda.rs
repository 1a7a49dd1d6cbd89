//! The text of a resident kernel: the device code of `kernels-gen/cuda`, a structure of constants and
//! an epilogue for every stage, and for each role the order of its work in a step.

use std::fmt::Write as _;
use tilec_ir::abi::KvType;
use tilec_ir::format::Format;
use tilec_ir::graph::{ActivationFn, Scoring};
use tilec_ir::launch::{KERNEL, SYNC_BYTES};
use tilec_ir::octet::{octet_block_bytes, octet_blocks};
use tilec_ir::pack::FP8_COLUMNS;
use tilec_ir::resident::{
    Attention, CHUNK, Context, Epilogue, Experts, Gemm, Kind, MAX_K, Norm, Replaced, ResidentProgram, Route,
    SPAN, Scores, Stage, Taps,
};
use tilec_ir::stages::{BufferElem, BufferId, Slot};
use tilec_kernels_gen::cuda::{
    ATTENTION, BASE, BLOCK, CONTEXT, EXPERTS, FORMATS, GEMM, Header, PTX, SLOT_BYTES, STEP, SharedLayout,
    SharedNeeds,
};

use crate::nvrtc::Arch;

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
    /// A row is too long.
    #[error("stage {stage} reads rows of {k} columns; the kernel keeps at most {MAX_K} in registers")]
    Columns {
        /// The stage.
        stage: String,
        /// Columns of its input.
        k: usize,
    },
    /// Shared memory is too small.
    #[error(
        "{arch} has {available} bytes of shared memory for a block, too little for a ring beside norms of {norm_columns} columns and heads of {heads}"
    )]
    Shared {
        /// The architecture.
        arch: &'static str,
        /// Its bytes.
        available: usize,
        /// Columns of the widest norm.
        norm_columns: usize,
        /// Columns of a head.
        heads: usize,
    },
    /// Too many parts of a context to count.
    #[error(
        "{kv_heads} KV heads over {context} positions: more parts than the kernel counts; lower limits.context"
    )]
    Counters {
        /// KV heads.
        kv_heads: usize,
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

/// Emits the kernel of a program for an architecture. The same program makes the same text.
///
/// # Errors
/// [`CudaError`].
pub fn emit(program: &ResidentProgram, arch: Arch) -> Result<CudaText, CudaError> {
    let needs = needs(program);
    let available = shared_available(arch);
    let shared = needs.layout(available).ok_or(CudaError::Shared {
        arch: arch.name(),
        available,
        norm_columns: needs.norm_columns,
        heads: needs.qk,
    })?;
    // A counter for each span of a row and KV head, and one for its spans.
    let counters = tilec_ir::launch::STEP_ROWS * program.kv.kv_heads * (program.max_spans() + 1);
    if counters > (SYNC_BYTES - 512) / 4 {
        return Err(CudaError::Counters { kv_heads: program.kv.kv_heads, context: program.context });
    }
    for (name, _, stage) in program.sequence() {
        if let Some(gemm) = stage.kind.gemm()
            && gemm.k > MAX_K
        {
            return Err(CudaError::Columns { stage: name, k: gemm.k });
        }
    }
    let (merged, windows) = merge_windows(program);
    let program = &merged;
    let mut out = Writer { text: String::new(), program, windows };
    out.head(&shared, &needs);
    out.tables();
    out.header(&ATTENTION);
    out.header(&GEMM);
    if needs.experts > 0 {
        out.header(&EXPERTS);
    }
    let of_context = |stage: &Stage| matches!(stage.kind, Kind::Taps { .. } | Kind::Context(_));
    if program.before.iter().any(of_context) {
        out.header(&CONTEXT);
    }
    out.header(&STEP);
    for (prefix, stages) in out.lists() {
        for stage in stages {
            out.stage(&prefix, stage);
        }
    }
    out.roles();
    out.kernel(needs.experts > 0);
    Ok(CudaText { text: out.text, shared })
}

/// A program whose layers differ only by their windows has one body for them, so that its instructions are
/// there once; with the window of each layer. No windows if there is nothing to merge.
fn merge_windows(program: &ResidentProgram) -> (ResidentProgram, Vec<u32>) {
    let mut merged = program.clone();
    let mut window = vec![NO_WINDOW; merged.bodies.len()];
    for (body, window) in merged.bodies.iter_mut().zip(&mut window) {
        for stage in body {
            if let Kind::Attention(attention) = &mut stage.kind {
                *window = attention.window.take().map_or(NO_WINDOW, |window| window as u32);
            }
        }
    }
    let first: Vec<usize> = (0..merged.bodies.len())
        .map(|body| merged.bodies.iter().position(|other| *other == merged.bodies[body]).unwrap_or(body))
        .collect();
    if first.iter().enumerate().all(|(body, first)| body == *first) {
        return (program.clone(), Vec::new());
    }
    let kept: Vec<usize> = (0..first.len()).filter(|body| first[*body] == *body).collect();
    let windows = program.layers.iter().map(|layer| window[layer.body]).collect();
    for layer in &mut merged.layers {
        layer.body = kept.iter().position(|body| *body == first[layer.body]).unwrap_or(0);
    }
    merged.bodies = kept.iter().map(|body| merged.bodies[*body].clone()).collect();
    (merged, windows)
}

/// The tap of a layer that has none.
const NO_TAP: u32 = u32::MAX;

/// The window of a layer without one: no position is so large.
const NO_WINDOW: u32 = 0x7fff_ffff;

fn needs(program: &ResidentProgram) -> SharedNeeds {
    let mut needs = SharedNeeds {
        operands: 1,
        scaled: false,
        qk: program.kv.qk_dim,
        v: program.kv.v_dim,
        ..SharedNeeds::default()
    };
    for (_, _, stage) in program.sequence() {
        if let Some(gemm) = stage.kind.gemm() {
            needs.operands = needs.operands.max(gemm.operands);
            needs.scaled |= gemm.scales.is_some();
        }
        if let Some((_, k)) = stage.kind.norm() {
            needs.norm_columns = needs.norm_columns.max(k);
        }
        if let Kind::Experts(experts) = &stage.kind {
            needs.experts = needs.experts.max(experts.experts);
            needs.top_k = needs.top_k.max(experts.top_k);
        }
    }
    needs
}

struct Writer<'p> {
    text: String,
    program: &'p ResidentProgram,
    /// Windows of the layers, where one body has several.
    windows: Vec<u32>,
}

/// A line of the text; `writeln!` to a string cannot fail.
macro_rules! line {
    ($out:expr) => { $out.text.push('\n') };
    ($out:expr, $($arg:tt)*) => {{ let _ = writeln!($out.text, $($arg)*); }};
}

impl<'p> Writer<'p> {
    /// The lists of stages with the prefix of their names.
    fn lists(&self) -> Vec<(String, &'p [Stage])> {
        let program = self.program;
        let bodies =
            program.bodies.iter().enumerate().map(|(n, body)| (format!("Layer{n}"), body.as_slice()));
        let before = [(String::new(), program.before.as_slice())];
        let after = [(String::new(), program.after.as_slice())];
        before.into_iter().chain(bodies).chain(after).collect()
    }

    fn header(&mut self, header: &Header) {
        line!(self, "\n// ==== {} {}\n", header.name, "=".repeat(88 - header.name.len()));
        self.text.push_str(header.text);
    }

    fn head(&mut self, shared: &SharedLayout, needs: &SharedNeeds) {
        let program = self.program;
        let layers = match program.layers.len() {
            0 => String::new(),
            layers => format!(" of {layers} layers"),
        };
        let bytes: u64 = program.costs().iter().map(|cost| cost.streamed_bytes(1) * cost.runs as u64).sum();
        line!(self, "// {}: a step{layers} as one resident kernel.", program.name);
        line!(
            self,
            "// Streams {} of weights a step: {:.1} us at {:.2} TB/s.",
            size(bytes),
            micros(bytes),
            FLOOR_BYTES_PER_SECOND / 1e12
        );
        self.header(&BASE);
        self.header(&PTX);
        self.header(&FORMATS);
        line!(self, "\n// Sizes of this kernel.");
        line!(self, "constexpr u32 SLOT_BYTES = {SLOT_BYTES};");
        line!(self, "constexpr u32 RING_SLOTS = {};", shared.slots);
        line!(self, "constexpr u32 FIXED_BYTES = {};", shared.fixed);
        line!(self, "constexpr u32 GAIN_BYTES = {};", shared.gain);
        line!(self, "constexpr u32 SCRATCH_BYTES = {};", shared.scratch);
        line!(self, "constexpr u32 SCALE_BYTES = {};  // of these, at the end", needs.scales());
        if needs.experts > 0 {
            line!(self, "constexpr u32 ROUTES_BYTES = {};  // of the fixed ones, at the end", needs.routes());
            let (experts, slots) = (needs.experts, needs.top_k);
            line!(self, "constexpr u32 MAX_EXPERTS = {experts}, MAX_SLOTS = {slots};");
        }
        line!(self, "constexpr u32 LAYERS = {};", program.layers.len());
        line!(self, "constexpr u32 STAGES = {};  // of a step", program.sequence().len());
        self.header(&BLOCK);
    }

    /// What differs from layer to layer: offsets of weights, caches, the first norm's gains.
    fn tables(&mut self) {
        let program = self.program;
        line!(
            self,
            "\n// ==== {} {}\n",
            program.name,
            "=".repeat(88_usize.saturating_sub(program.name.len()))
        );
        for stage in &program.before {
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
        if program.layers.is_empty() {
            return;
        }
        let columns = program.layers.iter().map(|layer| layer.offsets.len()).max().unwrap_or(0).max(1);
        line!(self, "// Byte offsets of each layer's weights, in the order of its stages.");
        line!(self, "__constant__ u64 LAYER_OFFSETS[LAYERS][{columns}] = {{");
        for layer in &program.layers {
            let offsets: Vec<String> = layer.offsets.iter().map(|at| format!("{at:#x}")).collect();
            line!(self, "  {{{}}},", offsets.join(", "));
        }
        line!(self, "}};");
        let list = |values: Vec<u64>| values.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let caches = list(program.layers.iter().map(|layer| layer.cache as u64).collect());
        line!(self, "__constant__ u32 LAYER_CACHE[LAYERS] = {{{caches}}};");
        if !self.windows.is_empty() {
            let windows = list(self.windows.iter().map(|window| u64::from(*window)).collect());
            line!(self, "__constant__ u32 LAYER_WINDOW[LAYERS] = {{{windows}}};");
        }
        if let Some(Taps { layers, cols }) = &program.taps {
            let tap = |layer: usize| layers.iter().position(|tapped| *tapped == layer);
            let taps =
                (0..program.layers.len()).map(|layer| tap(layer).map_or(u64::from(NO_TAP), |tap| tap as u64));
            let taps = list(taps.collect());
            line!(self, "// What a draft reads: which tap a layer's residual stream is.");
            line!(self, "constexpr u32 TAPS = {}, TAP_COLS = {cols}, NO_TAP = {NO_TAP};", layers.len());
            line!(self, "__constant__ u32 LAYER_TAP[LAYERS] = {{{taps}}};");
        }
        if program.bodies.len() > 1 {
            let bodies = list(program.layers.iter().map(|layer| layer.body as u64).collect());
            line!(self, "__constant__ u32 LAYER_BODY[LAYERS] = {{{bodies}}};");
        }
        let gain =
            |stages: &[Stage], offsets: &[u64]| match stages.first().and_then(|stage| stage.kind.gemm()) {
                Some(Gemm { norm: Some(Norm { gain, .. }), .. }) => match gain {
                    Slot::Fixed(at) => *at,
                    Slot::Layer(n) => offsets[*n],
                },
                _ => 0,
            };
        let mut gains: Vec<u64> =
            program.layers.iter().map(|layer| gain(&program.bodies[layer.body], &layer.offsets)).collect();
        gains.push(gain(&program.after, &[]));
        line!(self, "// Gains of the norm that each layer begins with, and the head.");
        line!(self, "__constant__ u64 FIRST_GAIN[LAYERS + 1] = {{{}}};", list(gains));
    }

    fn stage(&mut self, prefix: &str, stage: &Stage) {
        line!(self);
        let name = type_name(prefix, &stage.name);
        match &stage.kind {
            Kind::Embed { table, format, scales, vocab, k, replaced, output } => {
                line!(self, "// {}: a row of {vocab} x {k} {format} for each token.", stage.name);
                line!(self, "struct {name} {{");
                line!(self, "  using Weights = {};", weights_type(*format));
                line!(self, "  static constexpr u32 K = {k}, BLOCKS = {};", octet_blocks(*format, *k));
                let table = self.weight(*table);
                self.function("const u8*", "table", "const Block& b", &format!("return {table};"));
                self.scales(*scales, *k, 0);
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
                line!(self, "}};");
            }
            Kind::Taps { output } => {
                let cols = self.program.buffer(*output).cols;
                line!(self, "// {}: {cols} columns of each row.", stage.name);
                line!(self, "struct {name} {{");
                let (out_type, elem) = self.out_types(*output);
                line!(self, "  using Out = {out_type};");
                line!(self, "  static constexpr u32 COLS = {cols};");
                let out = self.buffer(*output);
                self.function(&format!("{elem}*"), "out", "const Block& b", &format!("return {out};"));
                line!(self, "}};");
            }
            Kind::Context(context) => self.context(&name, &stage.name, context),
            Kind::Gemm(gemm) => {
                self.open_gemm(&name, &stage.name, gemm, "", gemm.weight_bytes() as u64);
                self.epilogue(gemm, None);
                line!(self, "}};");
            }
            Kind::Scores(scores) => self.scores(&name, &stage.name, scores),
            Kind::Experts(experts) => self.experts(&name, &stage.name, experts),
            Kind::Attention(attention) => self.attention(&name, &stage.name, attention),
        }
    }

    fn function(&mut self, result: &str, name: &str, arguments: &str, body: &str) {
        line!(self, "  __device__ __forceinline__ static {result} {name}({arguments}) {{ {body} }}");
    }

    /// Scales of block FP8, a row of `k` columns for each octet, from column `first` on.
    fn scales(&mut self, slot: Option<Slot>, k: usize, first: usize) {
        if let Some(slot) = slot {
            line!(self, "  static constexpr u32 SCALES = {};", k.div_ceil(FP8_COLUMNS));
            let first = match first / FP8_COLUMNS {
                0 => String::new(),
                first => format!(" + {first}"),
            };
            let scales = format!("return reinterpret_cast<const float*>({}){first};", self.weight(slot));
            self.function("const float*", "scales", "const Block& b", &scales);
        }
    }

    /// What a product says of itself, but for its epilogue. `times` says how often it is made, of `bytes`.
    fn open_gemm(&mut self, name: &str, stage: &str, gemm: &Gemm, times: &str, bytes: u64) {
        let pair = if gemm.operands == 2 { "2 x " } else { "" };
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
        let row_blocks = gemm.row_blocks();
        line!(self, "  static constexpr u32 STRIDE = {}, ROW_BLOCKS = {row_blocks};", gemm.row);
        line!(self, "  static constexpr u32 OPERANDS = {}, TILES = {};", gemm.operands, gemm.tiles());
        let half = self.program.buffer(gemm.input).elem != BufferElem::F32;
        let logits = gemm.epilogue == Epilogue::Logits;
        line!(
            self,
            "  static constexpr bool NORM = {}, HALF_INPUT = {half}, ROW_SCALE = {}, LOGITS = {logits};",
            gemm.norm.is_some(),
            gemm.format == Format::F16
        );
        line!(self, "  static constexpr float EPS = {};", float(gemm.norm.map_or(0.0, |norm| norm.eps)));
        let mut weights = self.weight(gemm.weights);
        let mut input = self.buffer(gemm.input);
        if gemm.first > 0 {
            let blocks = octet_blocks(gemm.format, gemm.first);
            weights = format!("{weights} + {}", blocks * octet_block_bytes(gemm.format));
            input = format!("{input} + {}", gemm.first);
        }
        self.function("const u8*", "weights", "const Block& b", &format!("return {weights};"));
        self.scales(gemm.scales, gemm.row, gemm.first);
        let elem = if half { "u16" } else { "float" };
        self.function(&format!("const {elem}*"), "input", "const Block& b", &format!("return {input};"));
    }

    /// The scores of a router.
    fn scores(&mut self, name: &str, stage: &str, scores: &Scores) {
        let Scores { experts, k, format, .. } = scores;
        let bytes = scores.weight_bytes() as u64;
        line!(self, "// {stage}: {experts} x {k} {format}, {}, {:.2} us.", size(bytes), micros(bytes));
        line!(self, "struct {name} {{");
        let stride = self.program.buffer(scores.output).cols;
        line!(self, "  static constexpr u32 K = {k}, EXPERTS = {experts}, STRIDE = {stride};");
        line!(self, "  static constexpr bool NORM = {};", scores.norm.is_some());
        line!(self, "  static constexpr float EPS = {};", float(scores.norm.map_or(0.0, |norm| norm.eps)));
        let weights = self.weight(scores.weights);
        let weights = match *format {
            Format::BF16 => {
                let blocks = tilec_ir::octet::octet_blocks(*format, *k);
                format!("return octet_columns({weights}, {blocks}, expert, column);")
            }
            _ => format!(
                "return *reinterpret_cast<const float4*>({weights} + ((u64)expert * K + column) * 4);"
            ),
        };
        self.function("float4", "weights4", "const Block& b, u32 expert, u32 column", &weights);
        let bias = scores.bias.map_or("nullptr".into(), |slot| {
            format!("reinterpret_cast<const float*>({})", self.weight(slot))
        });
        self.function("const float*", "bias", "const Block& b", &format!("return {bias};"));
        let (input, out) = (self.buffer(scores.input), self.buffer(scores.output));
        self.function("const float*", "input", "const Block& b", &format!("return {input};"));
        self.function("float*", "out", "const Block& b", &format!("return {out};"));
        line!(self, "}};");
    }

    /// A product of experts, and how they are chosen if it is the first of its layer.
    fn experts(&mut self, name: &str, stage: &str, experts: &Experts) {
        let Experts { gemm, experts: count, top_k, route } = experts;
        let routes = type_name(name, "route");
        if let Some(Route { scores, routing, correction }) = route {
            let scoring = match routing.scoring {
                Scoring::Softmax => "SOFTMAX",
                Scoring::ChosenSoftmax => "CHOSEN_SOFTMAX",
                Scoring::Sigmoid => "SIGMOID",
            };
            line!(self, "// The choice of {top_k} of {count} experts.");
            line!(self, "struct {routes} {{");
            let stride = self.program.buffer(*scores).cols;
            line!(
                self,
                "  static constexpr u32 EXPERTS = {count}, SLOTS = {top_k}, STRIDE = {stride}, SCORING = {scoring};"
            );
            let factor = float(routing.factor);
            line!(self, "  static constexpr bool RENORMALIZE = {};", routing.renormalize);
            line!(self, "  static constexpr float FACTOR = {factor};");
            let scores = format!("return {};", self.buffer(*scores));
            self.function("const float*", "scores", "const Block& b", &scores);
            let correction = correction.map_or("nullptr".into(), |slot| {
                format!("reinterpret_cast<const float*>({})", self.weight(slot))
            });
            self.function("const float*", "correction", "const Block& b", &format!("return {correction};"));
            line!(self, "}};");
        }
        let bytes = (*top_k * gemm.weight_bytes()) as u64;
        self.open_gemm(name, stage, gemm, &format!("{top_k} of {count} times "), bytes);
        line!(self, "  static constexpr u32 SLOTS = {top_k};");
        line!(self, "  static constexpr bool FIRST = {};", route.is_some());
        if route.is_some() {
            line!(self, "  using Route = {routes};");
        }
        self.epilogue(gemm, Some(experts));
        line!(self, "}};");
    }

    /// The epilogue's pieces, composed: what it loads ahead, then bias, gate, residual and store.
    fn epilogue(&mut self, gemm: &Gemm, experts: Option<&Experts>) {
        let mut carried = Vec::new();
        let mut before = Vec::new();
        let mut body = Vec::new();
        let operands = gemm.operands;
        let chosen = if experts.is_some() { "const Chosen& chosen, " } else { "" };
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
        let store = match self.program.buffer(gemm.output).elem {
            BufferElem::Bf16 => format!("*reinterpret_cast<u32*>({out}) = Bf16::pack(v[0].x, v[0].y);"),
            _ => format!("*reinterpret_cast<float2*>({out}) = v[0];"),
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
                if gemm.tap && self.program.taps.is_some() {
                    body.push(
                        "if (LAYER_TAP[b.layer] != NO_TAP) *reinterpret_cast<float2*>(b.args.taps + ((u64)row * \
                         TAPS + LAYER_TAP[b.layer]) * TAP_COLS + feature) = v[0];"
                            .into(),
                    );
                }
            }
            Epilogue::Logits => {
                body.push(format!("float* to = b.args.logits + (u64)row * {cols} + feature;"));
                body.push("to[0] = v[0].x; offer(b, feature, v[0].x);".into());
                let second = "to[1] = v[0].y; offer(b, feature + 1, v[0].y);";
                body.push(if cols.is_multiple_of(8) {
                    second.into()
                } else {
                    format!("if (feature + 1 < {cols}) {{ {second} }}")
                });
            }
        }
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
        let kv = &self.program.kv;
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
            "  static constexpr u32 HEADS = {}, KV_HEADS = {}, CACHE_HEADS = {}, QK = {}, V = {};",
            attention.heads,
            attention.kv_heads,
            kv.kv_heads,
            kv.qk_dim,
            kv.v_dim
        );
        let window = match attention.window {
            _ if !self.windows.is_empty() => "LAYER_WINDOW[b.layer]".into(),
            Some(window) => window.to_string(),
            None => "NO_WINDOW".into(),
        };
        let windowed = attention.window.is_some() || !self.windows.is_empty();
        let both = attention.bidirectional;
        line!(self, "  static constexpr bool WINDOWED = {windowed}, BOTH_WAYS = {both};");
        self.function("u32", "window", "const Block& b", &format!("return {window};"));
        line!(
            self,
            "  static constexpr float SCALE = {}, VALUE_SCALE = {};",
            float(attention.scale),
            float(attention.value_scale)
        );
        let eps = attention.q_norm.or(attention.k_norm).map_or(0.0, |norm| norm.eps);
        line!(
            self,
            "  static constexpr bool Q_NORM = {}, K_NORM = {}, SINKS = {};",
            attention.q_norm.is_some(),
            attention.k_norm.is_some(),
            attention.sinks.is_some()
        );
        line!(self, "  static constexpr float EPS = {};", float(eps));
        let (dims, positions) = attention.rope.map_or((0, 0), |rope| (rope.dims, rope.positions));
        line!(
            self,
            "  static constexpr u32 ROPE = {dims}, POSITIONS = {positions}, PAGE_TOKENS = {}, V_PAD = {}, MAX_CHUNKS = {};",
            kv.page_tokens,
            kv.v_pad(),
            self.program.max_chunks()
        );
        let floats = |slot: Option<Slot>| match slot {
            Some(slot) => format!("return reinterpret_cast<const float*>({});", self.weight(slot)),
            None => "return nullptr;".into(),
        };
        let gains = [
            ("q_gain", floats(attention.q_norm.map(|norm| norm.gain))),
            ("k_gain", floats(attention.k_norm.map(|norm| norm.gain))),
            ("rope", floats(attention.rope.map(|rope| rope.table))),
            ("sinks", floats(attention.sinks)),
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
        debug_assert_eq!((CHUNK, SPAN), (128, 8), "attention.cuh says so too");
    }

    /// Types of a buffer's elements: as stages name them, and as they lie in memory.
    fn out_types(&self, buffer: BufferId) -> (&'static str, &'static str) {
        match self.program.buffer(buffer).elem {
            BufferElem::Bf16 => ("Bf16", "u16"),
            _ => ("F32", "float"),
        }
    }

    /// Keys and values of all of a draft's layers.
    fn context(&mut self, name: &str, stage: &str, context: &Context) {
        let kv = &self.program.kv;
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
            "  static constexpr u32 LAYERS = {layers}, KV_HEADS = {kv_heads}, QK = {}, V = {};",
            kv.qk_dim,
            kv.v_dim
        );
        let norm = k_norms.first().copied().flatten();
        line!(self, "  static constexpr bool K_NORM = {};", norm.is_some());
        let eps = norm.map_or(0.0, |norm| norm.eps);
        line!(self, "  static constexpr float EPS = {}, VALUE_SCALE = {};", float(eps), float(*value_scale));
        let (dims, positions) = rope.map_or((0, 0), |rope| (rope.dims, rope.positions));
        line!(
            self,
            "  static constexpr u32 ROPE = {dims}, POSITIONS = {positions}, PAGE_TOKENS = {}, V_PAD = {};",
            kv.page_tokens,
            kv.v_pad()
        );
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
        self.role(
            "bool load_step(Loader& b)",
            |_, name, stage, _| match &stage.kind {
                Kind::Gemm(_) => vec![format!("if (!stream<{name}>(b, {name}::weights(b))) return false;")],
                Kind::Scores(scores) => {
                    vec![format!("b.pass_tiles({});", scores.experts), "b.next_stage();".into()]
                }
                Kind::Experts(_) => {
                    vec![format!("if (!stream_experts<{name}>(b, {name}::weights(b))) return false;")]
                }
                _ => vec!["b.next_stage();".into()],
            },
            "return true;",
        );
        self.role(
            "void consume_step(Consumer& b)",
            |_, name, stage, _| match &stage.kind {
                Kind::Embed { .. } => vec![format!("embed<{name}>(b);")],
                Kind::Gemm(_) => vec![format!("multiply<{name}>(b);")],
                Kind::Scores(_) => vec![format!("score_experts<{name}>(b);")],
                Kind::Experts(_) => vec![format!("multiply_experts<{name}>(b);")],
                Kind::Attention(_) => vec![format!("attend<{name}>(b, LAYER_CACHE[b.layer]);")],
                Kind::Taps { .. } => vec![format!("take_taps<{name}>(b);")],
                Kind::Context(_) => vec![format!("cache_context<{name}>(b);")],
            },
            "",
        );
        self.role(
            "void control_step(Control& b)",
            |writer, name, stage, next| {
                let mut lines = match &stage.kind {
                    // Opened by the step's beginning.
                    Kind::Embed { .. } | Kind::Taps { .. } => Vec::new(),
                    Kind::Gemm(gemm) => {
                        let mut lines = vec![format!("finish<{name}>(b);")];
                        if gemm.epilogue == Epilogue::Logits {
                            lines.push("offer_best(b);".into());
                        }
                        lines
                    }
                    Kind::Scores(scores) => {
                        vec!["b.open_stage();".into(), format!("b.pass_tiles({});", scores.experts)]
                    }
                    Kind::Experts(_) => vec![format!("finish_experts<{name}>(b);")],
                    Kind::Attention(_) | Kind::Context(_) => vec!["b.open_stage();".into()],
                };
                let norm = match next {
                    Next::Stage(kind) => kind.norm().map(|(norm, k)| (norm.gain, k)),
                    _ => None,
                };
                lines.push(match (norm, next) {
                    (Some((gain, k)), _) => format!("b.cross({}, {});", writer.weight(gain), k * 4),
                    (_, Next::FirstOfLayer(number, k)) if k > 0 => {
                        format!("b.cross(b.args.weights + FIRST_GAIN[{number}], {});", k * 4)
                    }
                    _ => "b.cross();".into(),
                });
                lines
            },
            "",
        );
    }

    fn role(
        &mut self,
        signature: &str,
        lines: impl Fn(&Writer<'p>, &str, &Stage, Next<'p>) -> Vec<String>,
        end: &str,
    ) {
        let program = self.program;
        line!(self, "\n__device__ __forceinline__ {signature} {{");
        // Columns of the norm that a list begins with; 0 if it begins with something else.
        let first = |stages: &[Stage]| match stages.first().and_then(|stage| stage.kind.gemm()) {
            Some(gemm) if gemm.norm.is_some() => gemm.k,
            _ => 0,
        };
        let layer_k = program.bodies.first().map_or(0, |body| first(body));
        let emit =
            |writer: &mut Writer<'p>, prefix: &str, stages: &'p [Stage], indent: &str, behind: Next<'p>| {
                for (number, stage) in stages.iter().enumerate() {
                    let next = stages.get(number + 1).map_or(behind, |stage| Next::Stage(&stage.kind));
                    for text in lines(writer, &type_name(prefix, &stage.name), stage, next) {
                        line!(writer, "{indent}{text}");
                    }
                }
            };
        let before = if program.layers.is_empty() { Next::End } else { Next::FirstOfLayer("0", layer_k) };
        emit(self, "", &program.before, "  ", before);
        if !program.layers.is_empty() {
            self.role_layers(&emit, layer_k);
        }
        emit(self, "", &program.after, "  ", Next::End);
        if !end.is_empty() {
            line!(self, "  {end}");
        }
        line!(self, "}}");
    }

    /// The loop over the layers in a role's work.
    fn role_layers(
        &mut self,
        emit: &impl Fn(&mut Writer<'p>, &str, &'p [Stage], &str, Next<'p>),
        layer_k: usize,
    ) {
        let program = self.program;
        line!(self, "  for (b.layer = 0; b.layer < LAYERS; ++b.layer) {{");
        let behind = Next::FirstOfLayer("b.layer + 1", layer_k);
        if let [body] = &program.bodies[..] {
            emit(self, "Layer0", body, "    ", behind);
        } else {
            line!(self, "    switch (LAYER_BODY[b.layer]) {{");
            for (number, body) in program.bodies.iter().enumerate() {
                line!(self, "    case {number}:");
                emit(self, &format!("Layer{number}"), body, "      ", behind);
                line!(self, "      break;");
            }
            line!(self, "    }}");
        }
        line!(self, "  }}");
    }

    fn kernel(&mut self, experts: bool) {
        // What experts add.
        let (routes_bytes, routed, report) = match experts {
            true => (
                " - ROUTES_BYTES",
                "\n    Routes& routes = *reinterpret_cast<Routes*>(gain - ROUTES_BYTES);\
                 \n    barrier_init(&routes.routed, CONSUMERS);\
                 \n    routes.total = 0;",
                "\n      report_experts(b);",
            ),
            false => ("", "", ""),
        };
        let spaces: Vec<String> = self
            .lists()
            .iter()
            .flat_map(|(prefix, stages)| stages.iter().map(move |stage| (prefix, stage)))
            .filter(|(_, stage)| matches!(stage.kind, Kind::Attention(_)))
            .map(|(prefix, stage)| type_name(prefix, &stage.name))
            .collect();
        line!(self);
        for name in spaces {
            line!(self, "static_assert(sizeof(AttentionSpace<{name}>) <= SCRATCH_BYTES - SCALE_BYTES);");
        }
        let _ = write!(
            self.text,
            r#"static_assert(sizeof(Shared) <= FIXED_BYTES{routes_bytes});

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) {KERNEL}(const __grid_constant__ LaunchArgs args) {{
  u8* const memory = shared_memory();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  u8* const gain = memory + FIXED_BYTES;
  u8* const scratch = gain + GAIN_BYTES;
  u8* const ring = scratch + SCRATCH_BYTES;
  if (threadIdx.x == 0) {{
    for (u32 i = 0; i < RING_SLOTS; ++i) {{
      barrier_init(&shared.full[i], FULL_ARRIVALS);
      barrier_init(&shared.empty[i], CONSUMERS);
    }}
    barrier_init(&shared.ready, 1);
    barrier_init(&shared.done, CONSUMERS);{routed}
    for (u32 i = 0; i < SUM_BUFFERS; ++i) {{
      barrier_init(&shared.sums_full[i], CONSUMERS);
      barrier_init(&shared.sums_empty[i], 1);
    }}
    shared.steps = args.steps;
    shared.stage = shared.loader_stage = 0;
    barriers_visible();
  }}
  __syncthreads();
  const Block block = {{args, shared, ring, gain, scratch, 0, 0, blockIdx.x}};
  if (warp_id() < CONSUMERS) {{
    registers_up<CONSUMER_REGISTERS>();
    Consumer b(block);
    // Control opens the first stage of a step when it knows whether there is one.
    for (b.wait_inputs(); b.step < *(volatile u32*)&shared.steps; b.wait_inputs()) {{
      consume_step(b);
      b.next_step();
    }}
  }} else {{
    registers_down<OTHER_REGISTERS>();
    if (warp_id() == LOADER) {{
      Loader b(block);
      while (b.more() && load_step(b)) b.next_step();
      b.drain();
    }} else if (warp_id() == CONTROL) {{
      Control b(block);
      take_rows(b);
      for (b.open_step(); b.step < *(volatile u32*)&shared.steps; b.open_step()) {{
        control_step(b);
        choose(b);
      }}{report}
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
        let buffer = self.program.buffer(id);
        let elem = if buffer.elem == BufferElem::F32 { "float" } else { "u16" };
        format!("reinterpret_cast<{elem}*>(b.args.arena + {:#x} /* {} */)", buffer.offset, buffer.name)
    }
}

/// What a stage's crossing leads to.
#[derive(Clone, Copy)]
enum Next<'p> {
    Stage(&'p Kind),
    /// The first stage of the layer of this number (an expression), or of what follows the layers;
    /// columns of its norm.
    FirstOfLayer(&'static str, usize),
    End,
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

fn weights_type(format: Format) -> &'static str {
    match format {
        Format::BF16 => "Bf16",
        Format::FP8_BLOCK => "E4m3",
        Format::MXFP4 => "Mxfp4",
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
