//! Structures of mixtures of experts: routers, the choice, and the two products.

use std::fmt::Write as _;
use tilec_ir::format::Format;
use tilec_ir::graph::Scoring;
use tilec_ir::launch::OCTET;
use tilec_ir::octet::{feature_scales, octet_block_bytes, octet_blocks};
use tilec_ir::resident::{Bias, Experts, Gemm, Route, Scores};

use super::{Writer, float, micros, size, type_name};

impl Writer<'_> {
    /// The scores of a router, or a part of them.
    pub(super) fn scores(&mut self, name: &str, stage: &str, scores: &Scores, part: bool) {
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
    pub(super) fn experts(&mut self, name: &str, stage: &str, experts: &Experts) {
        let Experts { gemm, experts: count, top_k, route, bands } = experts;
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
        let octets = experts.tile_octets();
        let tiles = bands.map_or(gemm.tiles().div_ceil(octets), |bands| bands.tiles(gemm));
        self.open_gemm(name, stage, gemm, (&format!("{top_k} of {count} times "), bytes), (octets, tiles));
        line!(self, "  static constexpr u32 SLOTS = {top_k};");
        line!(self, "  static constexpr bool FIRST = {};", route.is_some());
        if let Some(bands) = bands {
            line!(self, "  static constexpr u32 BAND_OCTETS = {};", bands.octets);
            self.floats("float2", "parts", bands.parts);
        }
        if route.is_some() {
            line!(self, "  using Route = {routes};");
        }
        // The epilogue of bands is that of several octets alone.
        match bands {
            Some(_) => self.prepares(gemm.prepares),
            None => self.epilogue(gemm, Some(experts)),
        }
        if bands.is_some() || octets > 1 || gemm.prepares.is_some() {
            self.sums_of_octets(gemm);
        }
        line!(self, "}};");
    }

    /// The epilogue's pieces of tiles of several octets, whose sums over the experts stay in registers.
    pub(super) fn sums_of_octets(&mut self, gemm: &Gemm) {
        let out = format!("{} + row * {}u + feature", self.buffer(gemm.output), gemm.cols);
        let at = "u32 row, u32 feature";
        let sum = format!("return reinterpret_cast<const float2*>({out});");
        self.function("const float2*", "sum", &format!("const Block& b, {at}"), &sum);
        if feature_scales(gemm.format) {
            let scale = self.feature_scale(gemm, 0, Some("expert"));
            let arguments = "const Block& b, u32 expert, u32 feature";
            self.function("float2", "scale", arguments, &format!("return {scale};"));
        }
        let load = |bias: &Bias| {
            let at = format!("{} + (u64)expert * {}", self.weight(bias.slot), bias.cols * 4);
            format!("load_bias(bias, {at}, {}, {}, feature); ", bias.start, bias.cols)
        };
        let loads: String = gemm.bias.iter().map(load).collect();
        line!(self, "  static constexpr bool BIASED = {};", !loads.is_empty());
        let arguments = "const Block& b, u32 expert, u32 feature";
        self.function("float2", "bias", arguments, &format!("float2 bias = {{}}; {loads}return bias;"));
        let mut store = format!("*reinterpret_cast<float2*>({out}) = v;");
        if let Some(tap) = self.tap(gemm, "v") {
            store = format!("{store} {tap}");
        }
        self.function("void", "store", &format!("const Block& b, {at}, float2 v"), &store);
    }
}

/// The structure of the scores that are made behind attention.
pub(super) fn router_name(attention: &str) -> String {
    format!("{attention}Scores")
}
