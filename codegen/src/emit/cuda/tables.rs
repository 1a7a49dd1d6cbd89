//! What stands in front of a kernel's stages: its sizes, and the tables of its mailboxes, layers and stages.

use std::fmt::Write as _;
use tilec_ir::handoff::Handoff;
use tilec_ir::resident::{Kind, ROW_BLOCK, Taps};
use tilec_ir::stages::{BufferElem, BufferId, Slot};
use tilec_kernels_gen::cuda::{BASE, BLOCK, FORMATS, HANDOFF, PTX, SharedLayout, SharedNeeds};

use super::super::merge::NO_WINDOW;
use super::{FLOOR_BYTES_PER_SECOND, Part, Writer, micros, size};

/// The tap of a layer that has none.
const NO_TAP: u32 = u32::MAX;

impl Writer<'_> {
    pub(super) fn head(&mut self, shared: &SharedLayout, needs: &SharedNeeds) {
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
    pub(super) fn mailboxes(&mut self) {
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
                let few = match &sequence[n].2.kind {
                    Kind::Attention(_) => true,
                    // Who completes a band is the last.
                    Kind::Experts(experts) => experts.bands.is_some(),
                    _ => false,
                };
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

    /// What differs from layer to layer: offsets of weights, caches.
    pub(super) fn tables(&mut self) {
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
    pub(super) fn order(&mut self) {
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
}
