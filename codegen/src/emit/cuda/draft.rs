//! Structures of what only drafts have: taps and their context, convolutions, candidates and the scores of their pairs.

use std::fmt::Write as _;
use tilec_ir::abi::KvType;
use tilec_ir::octet::octet_blocks;
use tilec_ir::resident::{Context, Conv, Pairs, TopK};
use tilec_ir::stages::BufferId;

use super::gemm::weights_type;
use super::{Writer, float};

impl Writer<'_> {
    /// A convolution.
    pub(super) fn conv(&mut self, name: &str, stage: &str, conv: &Conv) {
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
    pub(super) fn top_lists(&mut self, top: &TopK) {
        let TopK { vocab, k, segments, lists } = *top;
        line!(self, "  static constexpr u32 VOCAB = {vocab}, K = {k}, SEGMENTS = {segments};");
        self.floats("u64", "lists", lists);
    }

    /// Scores of pairs.
    pub(super) fn pairs(&mut self, name: &str, stage: &str, pairs: &Pairs) {
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

    /// Rows of taps, as the product that reads them wants them.
    pub(super) fn tap_rows(&mut self, name: &str, rows: BufferId) {
        line!(self, "struct {name} {{");
        let (out_type, elem) = self.out_types(rows);
        line!(self, "  using Out = {out_type};");
        let (cols, order) = (self.program().buffer(rows).cols, self.order_of(rows));
        line!(self, "  static constexpr u32 COLS = {cols}, ORDER = {order};");
        let out = self.buffer(rows);
        self.function(&format!("{elem}*"), "out", "const Block& b", &format!("return {out};"));
        line!(self, "}};");
    }

    /// Keys and values of all of a draft's layers.
    pub(super) fn context(&mut self, name: &str, stage: &str, context: &Context) {
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
}
