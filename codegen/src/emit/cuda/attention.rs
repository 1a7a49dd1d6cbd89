//! Structures of attention.

use std::fmt::Write as _;
use tilec_ir::abi::KvType;
use tilec_ir::resident::{Attention, CHUNK, SPAN};
use tilec_ir::stages::Slot;

use super::super::merge::NO_OFFSET;
use super::kernel::Deal;
use super::{Writer, float};

impl Writer<'_> {
    pub(super) fn attention(&mut self, name: &str, stage: &str, attention: &Attention) {
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
    pub(super) fn sinks(&self, sinks: Option<Slot>, floats: impl Fn(Option<Slot>) -> String) -> String {
        let all = floats(sinks);
        let Some(Slot::Layer(n)) = sinks else { return all };
        let layers = &self.program().layers;
        // Layers of other bodies have other numbers, so that this may be said where it need not be.
        match layers.iter().any(|layer| layer.offsets.get(n) == Some(&NO_OFFSET)) {
            true => format!("if (LAYER_OFFSETS[b.layer][{n}] == ~0ull) return nullptr; {all}"),
            false => all,
        }
    }

    /// Where the cache is.
    pub(super) fn kv(&mut self) {
        let body = format!("return {};", self.parts[self.at].kv);
        self.function("u8*", "kv", "const Block& b", &body);
    }
}
