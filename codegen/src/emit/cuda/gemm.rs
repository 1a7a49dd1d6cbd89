//! Structures of products: their weights, their rows, and the epilogue.

use std::fmt::Write as _;
use tilec_ir::format::Format;
use tilec_ir::graph::ActivationFn;
use tilec_ir::octet::{apart_scales, feature_scales};
use tilec_ir::resident::{Epilogue, Experts, Gemm, Kind, Norm, Prepared, Stage, prepared_order};
use tilec_ir::stages::{BufferElem, BufferId, Slot};

use super::{Writer, float, micros, size};

impl Writer<'_> {
    /// Scales of block FP8, a row for each octet. (Those of features are the epilogue's.)
    pub(super) fn scales(&mut self, format: Format, slot: Option<Slot>, k: usize) {
        if let Some(slot) = slot.filter(|_| !feature_scales(format)) {
            line!(self, "  static constexpr u32 SCALES = {};", apart_scales(format, k));
            let scales = format!("return reinterpret_cast<const float*>({});", self.weight(slot));
            self.function("const float*", "scales", "const Block& b", &scales);
        }
    }

    /// What a product says of itself, but for its epilogue. `times` says how often it is made, of `bytes`.
    pub(super) fn open_gemm(
        &mut self,
        name: &str,
        stage: &str,
        gemm: &Gemm,
        (times, bytes): (&str, u64),
        (octets, tiles): (usize, usize),
    ) {
        let pair = if gemm.operands == 2 { "2 x " } else { "" };
        let router_tiles = gemm.router_tiles();
        let tiles = tiles + router_tiles;
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
    pub(super) fn scaled(&self, gemm: &Gemm) -> bool {
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
    pub(super) fn gain(&mut self, norm: Option<Norm>) {
        let gain = norm.map_or("nullptr".into(), |norm| {
            format!("reinterpret_cast<const float*>({})", self.weight(norm.gain))
        });
        self.function("const float*", "gain", "const Block& b", &format!("return {gain};"));
    }

    /// What a stage prepares for a norm.
    pub(super) fn prepares(&mut self, prepares: Option<Prepared>) {
        line!(self, "  static constexpr bool PREPARES = {};", prepares.is_some());
        if let Some(Prepared { halves, squares }) = prepares {
            let (halves, squares) = (self.buffer(halves), self.buffer(squares));
            self.function("u16*", "halves", "const Block& b", &format!("return {halves};"));
            self.function("float*", "next_squares", "const Block& b", &format!("return {squares};"));
            let gain = "return reinterpret_cast<const float*>(b.args.weights + STAGE_GAIN[b.number]);";
            self.function("const float*", "next_gain", "const Block& b", gain);
        }
    }

    /// Leaves a pair of the residual stream for a draft, in the layers with a tap.
    pub(super) fn tap(&self, gemm: &Gemm, pair: &str) -> Option<String> {
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

    /// The scales of a pair of features of an operand, whose octets alternate with the others'.
    pub(super) fn feature_scale(&self, gemm: &Gemm, operand: usize, expert: Option<&str>) -> String {
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
    pub(super) fn epilogue(&mut self, gemm: &Gemm, experts: Option<&Experts>) {
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

    /// The order of the columns of rows of halves, as their readers want it; plain if these do not agree.
    pub(super) fn order_of(&self, buffer: BufferId) -> u32 {
        let program = self.program();
        let gemms = program.sequence().into_iter().filter_map(|(_, _, stage)| stage.kind.gemm());
        let mut orders = gemms.filter(|gemm| gemm.input == buffer).map(|gemm| prepared_order(gemm.format));
        let first = orders.next().unwrap_or(0);
        if orders.all(|order| order == first) && !program.in_slots(buffer) { first } else { 0 }
    }

    /// Types of a buffer's elements: as stages name them, and as they lie in memory.
    pub(super) fn out_types(&self, buffer: BufferId) -> (&'static str, &'static str) {
        match self.program().buffer(buffer).elem {
            BufferElem::Bf16 => ("Bf16", "u16"),
            _ => ("F32", "float"),
        }
    }
}

pub(super) fn weights_type(format: Format) -> &'static str {
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
