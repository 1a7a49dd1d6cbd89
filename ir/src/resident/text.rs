//! A resident program as text.

use crate::graph::Scoring;
use crate::stages::{BufferId, Routing, Slot};
use std::fmt;

use super::{
    Context, Conv, Epilogue, Experts, Gemm, Kind, Norm, Pairs, Replaced, ResidentProgram, Scores, Stage, TopK,
};

impl ResidentProgram {
    fn product_text(&self, gemm: &Gemm) -> String {
        let pair = if gemm.operands == 2 { " pair" } else { "" };
        let (cols, k, tiles) = (gemm.cols, gemm.k, gemm.tiles());
        format!("{} {cols}x{k}{pair} {} in {tiles} tiles", gemm.format, gemm.weights)
    }

    fn epilogue_text(&self, gemm: &Gemm, add: &str) -> String {
        let output = self.buffer(gemm.output).name.as_str();
        let bias: String = gemm.bias.iter().map(|bias| format!(" -> bias {}", bias.slot)).collect();
        match gemm.epilogue {
            Epilogue::Store => format!("{bias} -> store {output}"),
            Epilogue::Gated(activation) => format!("{bias} -> {activation} -> store {output}"),
            Epilogue::Residual => {
                let tap = if gemm.tap { " -> taps" } else { "" };
                format!("{bias} -> {add} to {output}{tap}")
            }
            Epilogue::Logits => format!("{bias} -> logits"),
        }
    }

    fn scores_text(&self, scores: &Scores, norm: &str) -> String {
        let Scores { weights, format, experts, k, .. } = scores;
        let name = |id: BufferId| self.buffer(id).name.as_str();
        let slot =
            |what: &str, slot: Option<Slot>| slot.map_or(String::new(), |slot| format!("{what}{slot}"));
        let norm = match scores.norm {
            Some(Norm { gain, eps }) if norm == "rms_norm" => format!("{norm} {gain} eps={eps:e} -> "),
            Some(Norm { gain, .. }) => format!("{norm} {gain} -> "),
            None => String::new(),
        };
        let sigmoid = match scores.sigmoid {
            true => format!(" and sigmoid{}", slot(" corrected by ", scores.correction)),
            false if scores.expects => " and normalized".into(),
            false => String::new(),
        };
        format!(
            "{}{} -> {norm}scores of {experts} experts {format} {experts}x{k} {weights}, {} B{}{sigmoid} -> store {}",
            name(scores.input),
            slot(" + ", scores.added),
            scores.weight_bytes(),
            slot(" -> bias ", scores.bias),
            name(scores.output)
        )
    }

    /// Text of a stage: what it does, in one or two lines.
    fn stage_text(&self, stage: &Stage) -> String {
        let name = |id: &BufferId| self.buffer(*id).name.as_str();
        let norm = |what: &str, norm: &Option<Norm>| match norm {
            Some(norm) => format!("{what} {} eps={:e} -> ", norm.gain, norm.eps),
            None => String::new(),
        };
        let prepares = match stage.kind.prepares() {
            Some(prepared) => format!(", prepares {}", name(&prepared.halves)),
            None => String::new(),
        };
        match &stage.kind {
            Kind::Embed { table, format, vocab, k, replaced, output, .. } => {
                let replaced = replaced.map_or(String::new(), |Replaced { token, vector }| {
                    format!(" -> {vector} for token {token}")
                });
                format!("embed {format} {vocab}x{k} {table}{replaced} -> {}{prepares}", name(output))
            }
            Kind::Taps { output } => format!("rows of taps -> {}", name(output)),
            Kind::Context(context) => {
                let Context { input, k_norms, kv_heads, rope, value_scale } = context;
                let norms = match k_norms.iter().flatten().next() {
                    Some(norm) => format!("k_norm eps={:e} -> ", norm.eps),
                    None => String::new(),
                };
                let rope =
                    rope.map_or(String::new(), |rope| format!("rope {} dims={} -> ", rope.table, rope.dims));
                let values = match value_scale {
                    1.0 => String::new(),
                    factor => format!("values x {factor} -> "),
                };
                let layers = k_norms.len();
                format!(
                    "{} -> {norms}{rope}{values}cache of {layers} layers, kv_heads={kv_heads}",
                    name(input)
                )
            }
            Kind::Gemm(gemm) => {
                let select = if gemm.select { "selected rows of " } else { "" };
                let router = gemm.router.map_or(String::new(), |router| {
                    format!(
                        ", and scores of {} experts {} in {} tiles -> add {} -> store {}",
                        router.experts,
                        router.weights,
                        router.tiles(),
                        name(&router.before),
                        name(&router.output)
                    )
                });
                format!(
                    "{select}{} -> {}gemm {}, {} B{}{prepares}{router}",
                    name(&gemm.input),
                    norm("rms_norm", &gemm.norm),
                    self.product_text(gemm),
                    gemm.weight_bytes(),
                    self.epilogue_text(gemm, "add")
                )
            }
            Kind::Scores(scores) => self.scores_text(scores, "rms_norm"),
            Kind::Experts(experts) => {
                let Experts { gemm, experts: count, top_k, route, bands } = experts;
                let route = route.as_ref().map_or(String::new(), |route| {
                    let Routing { scoring, renormalize, factor, .. } = &route.routing;
                    let scoring = match scoring {
                        Scoring::Softmax => "softmax",
                        Scoring::ChosenSoftmax => "chosen_softmax",
                        Scoring::Sigmoid => "sigmoid",
                    };
                    let renormalize = if *renormalize { " renormalized" } else { "" };
                    let factor = if *factor == 1.0 { String::new() } else { format!(" factor={factor}") };
                    let unscaled = route.unscaled.map_or(String::new(), |unscaled| {
                        let bias = unscaled.bias.map_or(String::new(), |slot| format!(", bias {slot}"));
                        let correction = unscaled
                            .correction
                            .map_or(String::new(), |slot| format!(", corrected by {slot}"));
                        let foreseen = unscaled
                            .foreseen
                            .map_or(String::new(), |before| format!(", foreseen by {}", name(&before)));
                        format!(" normalized eps={:e}{bias}{correction}{foreseen}", unscaled.eps)
                    });
                    format!("by {}{unscaled} {scoring}{renormalize}{factor} -> ", name(&route.scores))
                });
                let bands = bands.map_or(String::new(), |bands| {
                    let (octets, strips) = (bands.octets, bands.strips(gemm));
                    format!(" in bands of {octets} octets, {strips} strips, parts in {}", name(&bands.parts))
                });
                format!(
                    "{} -> {}{route}experts {top_k} of {count} {}, {} B{bands}{}{prepares}",
                    name(&gemm.input),
                    norm("rms_norm", &gemm.norm),
                    self.product_text(gemm),
                    experts.weight_bytes(),
                    self.epilogue_text(gemm, "weigh and add")
                )
            }
            Kind::Attention(attention) => {
                let rope = attention
                    .rope
                    .map_or(String::new(), |rope| format!("rope {} dims={} -> ", rope.table, rope.dims));
                let window = attention.window.map_or(String::new(), |window| format!(" window={window}"));
                let sinks = attention.sinks.map_or(String::new(), |sinks| format!(" sinks={sinks}"));
                let both = if attention.bidirectional { " bidirectional" } else { "" };
                let values = match attention.value_scale {
                    1.0 => String::new(),
                    factor => format!("values x {factor} -> "),
                };
                let kv_heads = match attention.kv_heads {
                    all if all == self.kv.kv_heads => String::new(),
                    fewer => format!(" kv_heads={fewer}"),
                };
                let router = attention
                    .router
                    .as_ref()
                    .map_or(String::new(), |scores| format!("; {}", self.scores_text(scores, "gain")));
                format!(
                    "{} -> {}{}{rope}{values}cache -> attention heads={}{kv_heads} scale={}{window}{sinks}{both} -> {}{router}",
                    name(&attention.input),
                    norm("q_norm", &attention.q_norm),
                    norm("k_norm", &attention.k_norm),
                    attention.heads,
                    attention.scale,
                    name(&attention.output)
                )
            }
            Kind::Conv(conv) => {
                let Conv { input, norm: in_front, kernels, base, side, group, residual, output } = conv;
                let sink = if *residual { "add to" } else { "store" };
                format!(
                    "{} -> {}dynamic_conv by {base} and {} side={side} group={group} -> {sink} {}",
                    name(input),
                    norm("rms_norm", in_front),
                    name(kernels),
                    name(output)
                )
            }
            Kind::TopK(TopK { vocab, k, segments, lists }) => {
                format!("top_k {k} of each of {segments} segments of {vocab} logits -> {}", name(lists))
            }
            Kind::Pairs(pairs) => {
                let Pairs { top, factor, softcap, hidden, rank, tables, tokens, scores } = pairs;
                let softcap = softcap.map_or(String::new(), |softcap| format!(" softcap={softcap}"));
                let [(before, format), (behind, _)] = tables;
                format!(
                    "{} -> top_k {} factor={factor}{softcap} -> {}, by {} pair_scores rank={rank} {format} {before} {behind} -> {}",
                    name(&top.lists),
                    top.k,
                    name(tokens),
                    name(hidden),
                    name(scores)
                )
            }
            Kind::Walk { k, tokens, scores } => {
                format!("walk over {k} of {} by {} -> tokens", name(tokens), name(scores))
            }
        }
    }
}

impl fmt::Display for ResidentProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "resident {:?} rows={} {{", self.name, self.step_rows)?;
        writeln!(f, "  {}", self.kv)?;
        for buffer in &self.buffers {
            writeln!(f, "  {buffer}")?;
        }
        if let Some(taps) = &self.taps {
            writeln!(f, "  taps of layers {:?}, {} columns each", taps.layers, taps.cols)?;
        }
        writeln!(f, "  packed {} bytes in {} items", self.packing.bytes, self.packing.items.len())?;
        let list = |f: &mut fmt::Formatter<'_>, title: &str, stages: &[Stage]| -> fmt::Result {
            writeln!(f, "\n  # {title}")?;
            stages
                .iter()
                .try_for_each(|stage| writeln!(f, "  stage {}: {}", stage.name, self.stage_text(stage)))
        };
        list(f, "before the layers", &self.before)?;
        for (number, body) in self.bodies.iter().enumerate() {
            let layers: Vec<usize> =
                (0..self.layers.len()).filter(|layer| self.layers[*layer].body == number).collect();
            list(f, &format!("layers {}", crate::stages::ranges(&layers)), body)?;
        }
        list(f, "after the layers", &self.after)?;
        writeln!(f, "}}")
    }
}
