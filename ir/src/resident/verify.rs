//! What must hold of a resident program before it runs.

use crate::format::Format;
use crate::graph::Scoring;
use crate::launch::{LAUNCH_ROWS, OCTET};
use crate::octet::feature_scales;
use crate::stages::{BufferElem, BufferId, Layer, Slot};
use std::collections::HashMap;

use super::{
    Attention, Bands, Context, Conv, Epilogue, Experts, Gemm, Kind, MAX_EXPERTS, MAX_KEPT, MAX_RANK,
    MAX_TOP_K, Pairs, ROW_BLOCK, Reader, ResidentProgram, Route, RouterTiles, Scores, Taps, TopK,
    gemm_defect, is_step_rows, part_columns, prepared_order,
};

/// Why a resident program must not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stage {stage}: {what}")]
pub struct Defect {
    /// Name with the layer.
    pub stage: String,
    /// What does not hold.
    pub what: String,
}

/// What the stages before have left.
struct Seen {
    /// By buffer, whether it is written.
    written: Vec<bool>,
    /// The layer whose experts were chosen last.
    chosen: Option<usize>,
    /// Whether there are logits.
    logits: bool,
}

/// Buffers that a stage reads, and the one that it writes; or what does not hold of it.
type Touched = Result<(Vec<BufferId>, Option<BufferId>), String>;

impl ResidentProgram {
    /// Checks that the program may run on any number of SMs.
    ///
    /// Every stage waits for all of the one before, so only three things can go wrong: a stage reads
    /// what no stage has written; it writes in place what its other tiles, or other SMs, still read
    /// whole; or its parts do not fit each other.
    ///
    /// # Errors
    /// The first [`Defect`].
    pub fn verify(&self) -> Result<(), Defect> {
        let mut seen = Seen { written: vec![false; self.buffers.len()], chosen: None, logits: false };
        if !is_step_rows(self.step_rows) {
            let what = format!("a step has 8, 16 or {LAUNCH_ROWS} rows, not {}", self.step_rows);
            return Err(Defect { stage: self.name.clone(), what });
        }
        self.verify_taps()?;
        for (name, layer, stage) in self.sequence() {
            let defect = |what: String| Defect { stage: name.clone(), what };
            let packed = |slot: Slot| match (slot, layer) {
                (Slot::Fixed(at), _) => at < self.packing.bytes,
                (Slot::Layer(n), Some(layer)) => {
                    self.layers[layer].offsets.get(n).is_some_and(|at| *at < self.packing.bytes)
                }
                (Slot::Layer(_), None) => false,
            };
            let touched = match &stage.kind {
                Kind::Embed { format, scales, output, k, .. } => self.embed(*format, *scales, *output, *k),
                Kind::Taps { output } => {
                    let first = self.before.first().is_some_and(|first| std::ptr::eq(first, stage));
                    let whole = self.buffer(*output).cols.is_multiple_of(OCTET);
                    match first && whole {
                        true => Ok((Vec::new(), Some(*output))),
                        false => Err("taps are whole octets, and a program begins with them".into()),
                    }
                }
                Kind::Context(context) => self.context(context),
                Kind::Gemm(gemm) => self.product(&mut seen, gemm),
                Kind::Scores(scores) => match self.scores_defect(scores) {
                    Some(what) => Err(what.into()),
                    None => {
                        Ok(([scores.input].into_iter().chain(scores.squares).collect(), Some(scores.output)))
                    }
                },
                Kind::Experts(experts) => self.experts(&mut seen, experts, layer),
                Kind::Attention(attention) => self.attention(&mut seen, attention),
                Kind::Conv(conv) => self.convolution(&seen, conv),
                Kind::TopK(top) => match seen.logits && top.vocab == self.vocab && self.fits_lists(top) {
                    true => Ok((Vec::new(), Some(top.lists))),
                    false => Err("candidates do not fit the logits in front of them".into()),
                },
                Kind::Pairs(pairs) => self.pairs(&mut seen, pairs),
                Kind::Walk { k, tokens, scores } => {
                    let cols = (self.buffer(*tokens).cols, self.buffer(*scores).cols);
                    match cols == (*k, k * k) && *k <= MAX_KEPT {
                        true => Ok((vec![*tokens, *scores], None)),
                        false => Err("a walk and its scores do not fit".into()),
                    }
                }
            };
            let (reads, writes) = touched.map_err(defect)?;
            if let Some(bad) = stage.kind.slots().into_iter().find(|slot| !packed(*slot)) {
                return Err(defect(format!("weights at {bad} are not packed")));
            }
            for read in reads {
                if !seen.written[read.0 as usize] {
                    return Err(defect(format!("reads {} before it is written", self.buffer(read).name)));
                }
                let stored = !matches!(&stage.kind, Kind::Gemm(gemm) if gemm.epilogue == Epilogue::Logits);
                if stored && Some(read) == writes {
                    return Err(defect(format!("writes {} while other SMs read it", self.buffer(read).name)));
                }
            }
            if let Some(writes) = writes {
                seen.written[writes.0 as usize] = true;
            }
            if let Some(prepared) = stage.kind.gemm().and_then(|gemm| gemm.prepared)
                && !seen.written[prepared.squares.0 as usize]
            {
                return Err(defect("reads rows that nobody has prepared".into()));
            }
            if let Some(prepared) = stage.kind.prepares() {
                if stage.kind.gemm().is_some_and(|gemm| gemm.input == prepared.halves) {
                    return Err(defect("prepares rows while other SMs read them".into()));
                }
                seen.written[prepared.halves.0 as usize] = true;
                seen.written[prepared.squares.0 as usize] = true;
            }
        }
        self.verify_routers()?;
        self.readers()?;
        self.verify_handoffs(&self.handoffs())
    }

    /// Of an embedding's row of `k` columns.
    fn embed(&self, format: Format, scales: Option<Slot>, output: BufferId, k: usize) -> Touched {
        if scales.is_some() != (format == Format::FP8_BLOCK) || feature_scales(format) {
            return Err(format!("{format} and its scales do not fit"));
        }
        if self.buffer(output).cols != k {
            return Err(format!("{k} columns do not fit {}", self.buffer(output).name));
        }
        Ok((Vec::new(), Some(output)))
    }

    /// Of what makes a draft's context.
    fn context(&self, context: &Context) -> Touched {
        let layer = context.kv_heads * (self.kv.qk_dim + self.kv.v_dim);
        let mut eps = context.k_norms.iter().map(|norm| norm.map(|norm| norm.eps));
        let first = eps.next();
        if context.k_norms.len() != self.kv.layers
            || context.kv_heads != self.kv.kv_heads
            || self.buffer(context.input).cols != layer * self.kv.layers
            || self.buffer(context.input).elem != BufferElem::F32
            || eps.any(|eps| Some(eps) != first)
        {
            return Err("layers, heads and buffers do not fit".into());
        }
        Ok((vec![context.input], None))
    }

    /// Of a product.
    fn product(&self, seen: &mut Seen, gemm: &Gemm) -> Touched {
        if gemm.prepared.is_none() && self.buffer(gemm.input).cols != gemm.k {
            return Err(format!("{} columns do not fit {}", gemm.k, self.buffer(gemm.input).name));
        }
        let logits = gemm.epilogue == Epilogue::Logits;
        seen.logits |= logits;
        if !logits && self.buffer(gemm.output).cols != gemm.cols {
            return Err(format!("{} features do not fit {}", gemm.cols, self.buffer(gemm.output).name));
        }
        if !logits && !gemm.cols.is_multiple_of(OCTET) {
            return Err(format!("{} features are not whole octets", gemm.cols));
        }
        if gemm.epilogue == Epilogue::Residual && !seen.written[gemm.output.0 as usize] {
            return Err(format!("adds to {} before it is written", self.buffer(gemm.output).name));
        }
        if let Some(what) = gemm_defect(gemm) {
            return Err(what);
        }
        let partial = gemm.partial.map(|id| self.buffer(id));
        if partial.is_some() != (gemm.k > part_columns(self.step_rows))
            || partial.is_some_and(|buffer| {
                buffer.elem != BufferElem::F32 || buffer.cols < gemm.tiles() * OCTET * gemm.operands
            })
        {
            return Err(format!("{} columns and room for their parts do not fit", gemm.k));
        }
        if let Some(router) = gemm.router {
            if let Some(what) = self.router_defect(gemm, &router) {
                return Err(what.into());
            }
            if !seen.written[router.before.0 as usize] {
                return Err("adds to scores that nobody has made".into());
            }
            seen.written[router.output.0 as usize] = true;
        }
        Ok((vec![gemm.input], Some(gemm.output)))
    }

    /// Of a product of experts, and of the choice in front of the first one.
    fn experts(&self, seen: &mut Seen, experts: &Experts, layer: Option<usize>) -> Touched {
        let Experts { gemm, experts: count, top_k, route, bands } = experts;
        if let Some(what) = gemm_defect(gemm) {
            return Err(what);
        }
        if *top_k == 0 || top_k > count || *count > MAX_EXPERTS || *top_k > MAX_TOP_K {
            return Err(format!("{top_k} of {count} experts"));
        }
        let (input, output) = (self.buffer(gemm.input), self.buffer(gemm.output));
        let fits = gemm.prepared.is_some() || input.cols == experts.input_cols();
        if !fits || output.cols != experts.output_cols() {
            return Err(format!("slots do not fit {} and {}", input.name, output.name));
        }
        if let Some(bands) = bands {
            let parts = self.buffer(bands.parts);
            // What is read is words of halves, each a row's own.
            let sound = route.is_none()
                && Bands::octets(gemm) == Some(bands.octets)
                && input.elem == BufferElem::Bf16
                && self.in_slots(gemm.input);
            if !sound || parts.elem != BufferElem::F32 || parts.cols != Bands::part_cols(bands.octets, gemm) {
                return Err("bands do not fit the product, or their parts".into());
            }
        }
        let mut reads = vec![gemm.input];
        match route {
            Some(Route { scores, routing, unscaled }) => {
                let sigmoid = routing.scoring == Scoring::Sigmoid && unscaled.is_none();
                if let Some(unscaled) = unscaled {
                    if gemm.prepared.map(|prepared| prepared.squares) != Some(unscaled.squares) {
                        return Err("scores and the squares of their rows do not fit".into());
                    }
                    reads.push(unscaled.squares);
                }
                if self.buffer(*scores).cols != count.next_multiple_of(OCTET) * if sigmoid { 2 } else { 1 }
                    || self.buffer(*scores).elem != BufferElem::F32
                    || routing.top_k != *top_k
                    || !matches!(gemm.epilogue, Epilogue::Gated(_))
                {
                    return Err("the choice does not fit the experts".into());
                }
                reads.push(*scores);
                seen.chosen = layer;
            }
            None => {
                if seen.chosen != layer || layer.is_none() {
                    return Err("no stage of its layer has chosen experts".into());
                }
                if gemm.epilogue != Epilogue::Residual || gemm.norm.is_some() {
                    return Err("slots are added up as they are".into());
                }
                if !seen.written[gemm.output.0 as usize] {
                    return Err(format!("adds to {} before it is written", output.name));
                }
            }
        }
        Ok((reads, Some(gemm.output)))
    }

    /// Of attention, and of the scores that are made behind it.
    fn attention(&self, seen: &mut Seen, attention: &Attention) -> Touched {
        let qk = (attention.heads + attention.kv_heads) * self.kv.qk_dim;
        if self.buffer(attention.input).cols != qk + attention.kv_heads * self.kv.v_dim
            || self.buffer(attention.output).cols != attention.heads * self.kv.v_dim
            || !(1..=self.kv.kv_heads).contains(&attention.kv_heads)
            || !attention.heads.is_multiple_of(attention.kv_heads)
        {
            return Err("heads and buffers do not fit".into());
        }
        let mut reads = vec![attention.input];
        if let Some(scores) = &attention.router {
            // They stand without a norm, and their choice is elsewhere.
            let plain = !scores.sigmoid && scores.bias.is_none() && scores.correction.is_none();
            let bare = scores.squares.is_none() && (plain || scores.expects);
            if let Some(what) = self.scores_defect(scores).or((!bare).then_some("makes no scores alone")) {
                return Err(what.into());
            }
            reads.push(scores.input);
            seen.written[scores.output.0 as usize] = true;
        }
        Ok((reads, Some(attention.output)))
    }

    /// Of a convolution.
    fn convolution(&self, seen: &Seen, conv: &Conv) -> Touched {
        let (input, kernels) = (self.buffer(conv.input), self.buffer(conv.kernels));
        let output = self.buffer(conv.output);
        if !input.cols.is_multiple_of(OCTET)
            || output.cols != input.cols
            || conv.group == 0
            || !input.cols.is_multiple_of(conv.group)
            || kernels.cols < 4 * (input.cols / conv.group)
            || conv.side > 1
            || [input.elem, kernels.elem] != [BufferElem::F32; 2]
            || conv.residual && output.elem != BufferElem::F32
        {
            return Err("a convolution and its buffers do not fit".into());
        }
        if conv.residual && !seen.written[conv.output.0 as usize] {
            return Err(format!("adds to {} before it is written", output.name));
        }
        Ok((vec![conv.input, conv.kernels], Some(conv.output)))
    }

    /// Of the scores of pairs of candidates.
    fn pairs(&self, seen: &mut Seen, pairs: &Pairs) -> Touched {
        let (k, hidden) = (pairs.top.k, self.buffer(pairs.hidden));
        let (tokens, scores) = (self.buffer(pairs.tokens), self.buffer(pairs.scores));
        let halves = |(_, format): &(Slot, Format)| [Format::BF16, Format::F16].contains(format);
        if !self.fits_lists(&pairs.top)
            || !(1..=MAX_RANK).contains(&pairs.rank)
            || hidden.cols < pairs.rank
            || (tokens.cols, scores.cols) != (k, k * k)
            || [hidden.elem, tokens.elem, scores.elem] != [BufferElem::F32; 3]
            || !pairs.tables.iter().all(halves)
        {
            return Err("pairs and their buffers do not fit".into());
        }
        seen.written[pairs.tokens.0 as usize] = true;
        Ok((vec![pairs.top.lists, pairs.hidden], Some(pairs.scores)))
    }

    /// For each stage of the step that prepares rows, who reads them next; nothing for the others.
    ///
    /// # Errors
    /// Rows that are prepared for one norm and read behind another, or whose buffers do not fit.
    pub fn readers(&self) -> Result<Vec<Reader>, Defect> {
        let mut readers = Vec::new();
        // By buffer of halves: the stage that prepared it last, and for whom.
        let mut last: HashMap<BufferId, (usize, Option<Reader>)> = HashMap::new();
        for (number, (name, layer, stage)) in self.sequence().into_iter().enumerate() {
            let fail = |what: &str| Err(Defect { stage: name.clone(), what: what.into() });
            readers.push(Reader::default());
            if let Some(gemm) = stage.kind.gemm()
                && let Some(prepared) = gemm.prepared
            {
                let (halves, squares) = (self.buffer(prepared.halves), self.buffer(prepared.squares));
                if gemm.input != prepared.halves
                    || halves.elem != BufferElem::Bf16
                    || halves.cols != gemm.k.next_multiple_of(ROW_BLOCK)
                    || squares.elem != BufferElem::F32
                    || squares.cols != (gemm.k / OCTET).next_multiple_of(4)
                    || gemm.format == Format::F16
                {
                    return fail("prepared rows and their buffers do not fit");
                }
                let gain = match (gemm.norm.map(|norm| norm.gain), layer) {
                    (Some(Slot::Fixed(at)), _) => Some(at),
                    (Some(Slot::Layer(n)), Some(layer)) => self.layers[layer].offsets.get(n).copied(),
                    _ => None,
                };
                let (Some(gain), Some((maker, reader))) = (gain, last.get_mut(&prepared.halves)) else {
                    return fail("reads prepared rows without a norm, or without their maker");
                };
                let own = Reader { gain, order: prepared_order(gemm.format) };
                if *reader.get_or_insert(own) != own {
                    return fail("reads rows that are prepared for another norm");
                }
                readers[*maker] = own;
            }
            if let Some(prepared) = stage.kind.prepares() {
                let fits = match &stage.kind {
                    Kind::Embed { k, .. } => Some(*k),
                    kind => kind.gemm().filter(|gemm| gemm.operands == 1).map(|gemm| gemm.cols),
                };
                if fits.map(|cols| cols.next_multiple_of(ROW_BLOCK))
                    != Some(self.buffer(prepared.halves).cols)
                {
                    return fail("prepares rows that do not fit their buffer");
                }
                last.insert(prepared.halves, (number, None));
            }
        }
        Ok(readers)
    }

    /// Checks that scores which are made in parts are parts of the same.
    fn verify_routers(&self) -> Result<(), Defect> {
        for stages in &self.bodies {
            let of =
                |found: fn(&Kind) -> bool| stages.iter().map(|stage| &stage.kind).find(|kind| found(kind));
            let attention = of(|kind| matches!(kind, Kind::Attention(Attention { router: Some(_), .. })));
            let product = of(|kind| matches!(kind, Kind::Gemm(Gemm { router: Some(_), .. })));
            let first = of(|kind| matches!(kind, Kind::Experts(Experts { route: Some(_), .. })));
            let before = match attention {
                Some(Kind::Attention(attention)) => attention.router.as_ref(),
                _ => None,
            };
            let added = match product {
                Some(Kind::Gemm(gemm)) => gemm.router.map(|router| (router, gemm.output)),
                _ => None,
            };
            let route = match first {
                Some(Kind::Experts(experts)) => {
                    experts.route.as_ref().map(|route| (route, experts.experts, experts.gemm.k))
                }
                _ => None,
            };
            let sound = match (before, added, route) {
                (Some(before), Some((added, rows)), Some((route, experts, k))) => {
                    before.input == rows
                        && (before.output, before.experts) == (added.before, added.experts)
                        && (route.scores, experts) == (added.output, added.experts)
                        && route.unscaled.is_some_and(|unscaled| {
                            let foreseen = added.foresees.then_some(before.output);
                            unscaled.k == before.k && before.k == k && unscaled.foreseen == foreseen
                        })
                }
                (None, None, Some((route, ..))) => route.unscaled.is_none(),
                (None, None, None) => true,
                _ => false,
            };
            if !sound {
                let stage = stages.first().map_or_else(String::new, |stage| stage.name.clone());
                return Err(Defect {
                    stage,
                    what: "the parts of a router's scores do not fit each other".into(),
                });
            }
        }
        Ok(())
    }

    /// What does not hold of a router's scores alone.
    fn scores_defect(&self, scores: &Scores) -> Option<&'static str> {
        let (input, output) = (self.buffer(scores.input), self.buffer(scores.output));
        if input.cols != scores.k
            || input.elem != BufferElem::F32
            || output.cols != scores.output_cols()
            || output.elem != BufferElem::F32
            || ![Format::BF16, Format::F32].contains(&scores.format)
        {
            return Some("scores and buffers do not fit");
        }
        let squares = self.buffer(scores.squares?);
        let fits = scores.norm.is_some()
            && squares.elem == BufferElem::F32
            && squares.cols == (scores.k / OCTET).next_multiple_of(4);
        (!fits).then_some("scores and the squares of their rows do not fit")
    }

    /// What does not hold of a product and the scores that it also makes.
    fn router_defect(&self, gemm: &Gemm, router: &RouterTiles) -> Option<&'static str> {
        let cols = router.experts.next_multiple_of(OCTET);
        let fits = |id: BufferId, halves: &[usize]| {
            let buffer = self.buffer(id);
            halves.iter().any(|halves| buffer.cols == halves * cols) && buffer.elem == BufferElem::F32
        };
        let whole = (router.experts * RouterTiles::PARTS).is_multiple_of(OCTET);
        if !whole || !fits(router.before, &[1, 2]) || !fits(router.output, &[1]) {
            return Some("a router's scores and their buffers do not fit");
        }
        let suits = gemm.format == Format::BF16
            && gemm.operands == 1
            && gemm.partial.is_none()
            && gemm.norm.is_none()
            && gemm.epilogue == Epilogue::Residual;
        (!suits).then_some("makes scores of what it does not add to its rows")
    }

    fn fits_lists(&self, top: &TopK) -> bool {
        let lists = self.buffer(top.lists);
        (1..=MAX_KEPT.min(top.vocab)).contains(&top.k)
            && top.segments > 0
            && lists.cols == 2 * top.segments * top.k
            && lists.elem == BufferElem::F32
    }

    /// Checks that every layer with a tap leaves its residual stream.
    fn verify_taps(&self) -> Result<(), Defect> {
        let fail = |what: String| Err(Defect { stage: "taps".into(), what });
        let Some(Taps { layers, cols }) = &self.taps else { return Ok(()) };
        for (number, layer) in layers.iter().enumerate() {
            let Some(Layer { body, .. }) = self.layers.get(*layer) else {
                return fail(format!("there is no layer {layer}"));
            };
            if layers[..number].contains(layer) {
                return fail(format!("layer {layer} is tapped twice"));
            }
            let stored = |gemm: &Gemm| gemm.tap && gemm.cols == *cols && gemm.epilogue == Epilogue::Residual;
            let taps =
                self.bodies[*body].iter().filter_map(|stage| stage.kind.gemm()).filter(|gemm| gemm.tap);
            if !taps.clone().all(stored) || taps.count() != 1 {
                return fail(format!("layer {layer} does not leave one residual stream of {cols} columns"));
            }
        }
        Ok(())
    }
}
