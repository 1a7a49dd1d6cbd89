//! The fused graph: operators grouped around anchors, in the order that they run.
//!
//! An anchor is what a stage is built around: a table lookup, work on rows, a GEMM on streamed
//! weights, routing, products with the experts that were chosen, attention. Its result goes through a chain of pieces (bias, norm, rope, gate, residual,
//! quantize) into a sink (a stored value, the KV cache, the logits). A GEMM may have several parts,
//! each with a chain of its own: q, k and v read the same row and are one stream of weights.

use crate::graph::{ActivationFn, Cache, RopeSpec, Router, Type, Weight};
use std::collections::BTreeMap;
use std::fmt;

/// Identifies a value that passes between fused operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

/// A value that passes between fused operators.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Name, as in the graph.
    pub name: String,
    /// Type, as in the graph.
    pub ty: Type,
}

/// What a fused operator is built around.
#[derive(Clone, Debug, PartialEq)]
pub enum Anchor {
    /// Rows of a table by token id.
    Embed {
        /// `[vocab, hidden]`.
        weight: String,
    },
    /// Rows that the runtime has handed over: they are there when the step starts.
    Input,
    /// The inputs side by side.
    Taps,
    /// The input as it is; the pieces do the work.
    Rows,
    /// The input times the transposed weights of each part.
    Gemm,
    /// Attention of the input (queries) over a cache.
    Attention {
        /// Cache number.
        cache: usize,
        /// Query heads.
        heads: usize,
        /// Factor on the scores.
        scale: f32,
        /// Positions that a row sees, itself included.
        window: Option<usize>,
        /// `[heads]`: a score that joins each head's softmax and carries no value.
        sinks: Option<String>,
        /// Whether a row also sees the rows of its sequence behind it in the step.
        bidirectional: bool,
    },
    /// A convolution of the first input over two rows, with a kernel of the row's own in the second; see
    /// [`crate::graph::Op::DynamicConv`].
    DynamicConv {
        /// The kernel's base, `[2, 2, cols]`.
        weight: String,
        /// Which half of the kernels.
        side: usize,
        /// Columns that share a value of a row's own kernel.
        group: usize,
    },
    /// The tokens of the largest logits; see [`crate::graph::Op::TopK`].
    TopK {
        /// How many.
        k: usize,
        /// Multiplied into every logit.
        factor: f32,
        /// Bound of the logits' magnitudes.
        softcap: Option<f32>,
    },
    /// Scores of pairs of candidates (input 0) by the rows' projections (input 1); see
    /// [`crate::graph::Op::PairScores`].
    PairScores {
        /// `[vocab, rank]`, of the token before.
        predecessor: String,
        /// `[vocab, rank]`, of the candidate.
        successor: String,
    },
    /// From the input, a router's scores, to the experts of each row and their weights.
    Route(Router),
    /// The input times the transposed weights of each part, `[experts, out, in]`, of the experts that
    /// the routes (input 1) name. A chain works on a slot's columns up to [`Piece::Combine`].
    Experts {
        /// Slots: experts of a row.
        top_k: usize,
        /// Whether the input has a row a slot, or one for all.
        per_slot: bool,
    },
}

impl Anchor {
    /// Name in the text form.
    pub fn name(&self) -> &'static str {
        match self {
            Anchor::Embed { .. } => "embed",
            Anchor::Input => "input",
            Anchor::Taps => "taps",
            Anchor::Rows => "rows",
            Anchor::Gemm => "gemm",
            Anchor::Attention { .. } => "attention",
            Anchor::DynamicConv { .. } => "dynamic_conv",
            Anchor::TopK { .. } => "top_k",
            Anchor::PairScores { .. } => "pair_scores",
            Anchor::Route(_) => "route",
            Anchor::Experts { .. } => "experts",
        }
    }

    /// Whether it streams the weights of its parts.
    pub fn has_weights(&self) -> bool {
        matches!(self, Anchor::Gemm | Anchor::Experts { .. })
    }
}

/// A step in the chain behind an anchor.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Takes the rows whose logits are wanted. Only first, behind [`Anchor::Rows`].
    SelectRows,
    /// Puts a vector in place of the rows of one token. Only alone, behind [`Anchor::Rows`].
    Replace {
        /// `[cols]`.
        weight: String,
        /// The token.
        token: u32,
    },
    /// Adds a vector to operand `operand` of the part (1 for the second weight of a pair).
    Bias {
        /// `[cols]`.
        weight: String,
        /// Which weight's columns.
        operand: usize,
    },
    /// Adds the vector of a slot's expert to operand `operand` of the part. Only behind
    /// [`Anchor::Experts`].
    ExpertBias {
        /// `[experts, cols]`.
        weight: String,
        /// Which weight's columns.
        operand: usize,
    },
    /// The sum over a row's slots, each times its weight in the routes, in their order. Only behind
    /// [`Anchor::Experts`]; what follows works on rows.
    Combine,
    /// Multiplies by a constant.
    Scale(f32),
    /// RMS norm over groups of `group` columns.
    RmsNorm {
        /// `[group]`.
        weight: String,
        /// Columns of a group.
        group: usize,
        /// Added to the mean of squares.
        eps: f32,
    },
    /// Rotary embedding of heads.
    Rope {
        /// Name in the table of ropes.
        rope: String,
        /// Columns of a head.
        head_dim: usize,
    },
    /// `activation(operand 0) * operand 1` of a part with two weights.
    Gated(ActivationFn),
    /// The sum over this many ranks, each of which has made a part of it.
    AllReduce(usize),
    /// Adds a value.
    Residual(ValueId),
    /// Quantizes to signed bytes in blocks of 32 columns.
    Quantize,
    /// Sink: writes a value.
    Store(ValueId),
    /// Sink: writes the keys of a cache.
    WriteKeys(usize),
    /// Sink: writes the values of a cache.
    WriteValues(usize),
    /// Sink: writes the logits.
    Logits(ValueId),
}

/// A slice of an anchor's columns with its own chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Weights of a part of a GEMM or of experts: one, or two for a gated pair. Empty for other anchors.
    pub weights: Vec<String>,
    /// Columns that each weight makes (of a slot, behind experts).
    pub cols: usize,
    /// The chain; the last piece is a sink.
    pub pieces: Vec<Piece>,
}

impl Part {
    /// The value that the sink stores, if it stores one.
    pub fn stored(&self) -> Option<ValueId> {
        match self.pieces.last() {
            Some(Piece::Store(value) | Piece::Logits(value)) => Some(*value),
            _ => None,
        }
    }
}

/// A fused operator.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedOp {
    /// Unique name.
    pub name: String,
    /// Decoder layer.
    pub layer: Option<usize>,
    /// What it is built around.
    pub anchor: Anchor,
    /// Values that the anchor reads.
    pub inputs: Vec<ValueId>,
    /// Caches that must have been written by an operator before it.
    pub after_cache: Vec<usize>,
    /// Slices of its columns.
    pub parts: Vec<Part>,
}

impl FusedOp {
    /// Every value that it reads, those of the pieces included.
    pub fn reads(&self) -> Vec<ValueId> {
        let pieces = self.parts.iter().flat_map(|part| &part.pieces).filter_map(|piece| match piece {
            Piece::Residual(value) => Some(*value),
            _ => None,
        });
        self.inputs.iter().copied().chain(pieces).collect()
    }

    /// Every value that it writes.
    pub fn writes(&self) -> Vec<ValueId> {
        self.parts.iter().filter_map(Part::stored).collect()
    }

    /// Every cache that it writes.
    pub fn written_caches(&self) -> Vec<usize> {
        let mut caches: Vec<usize> = self
            .parts
            .iter()
            .filter_map(|part| match part.pieces.last() {
                Some(Piece::WriteKeys(cache) | Piece::WriteValues(cache)) => Some(*cache),
                _ => None,
            })
            .collect();
        caches.dedup();
        caches
    }
}

/// A model's decoding step as fused operators, in an order in which operands come first.
#[derive(Clone, Debug, Default)]
pub struct Fused {
    /// Name of the model.
    pub name: String,
    /// Weights by checkpoint name.
    pub weights: BTreeMap<String, Weight>,
    /// Rotary embeddings by name.
    pub ropes: BTreeMap<String, RopeSpec>,
    /// Caches by number.
    pub caches: Vec<Cache>,
    /// Values.
    pub values: Vec<Value>,
    /// Operators in order.
    pub ops: Vec<FusedOp>,
    /// The rules that made it, with how often each was applied.
    pub applied: Vec<(&'static str, usize)>,
}

/// Who makes and who reads every value of a [`Fused`] as it was when asked for.
#[derive(Clone, Debug)]
pub struct Links {
    producers: Vec<Option<(usize, usize)>>,
    uses: Vec<usize>,
}

impl Links {
    /// The operator and part that store a value.
    pub fn producer(&self, value: ValueId) -> Option<(usize, usize)> {
        self.producers[value.0 as usize]
    }

    /// How many operators read a value, each counted as often as it reads.
    pub fn uses(&self, value: ValueId) -> usize {
        self.uses[value.0 as usize]
    }
}

impl Fused {
    /// A value.
    pub fn value(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }

    /// Who makes and who reads every value, as the operators are now.
    pub fn links(&self) -> Links {
        let mut links = Links { producers: vec![None; self.values.len()], uses: vec![0; self.values.len()] };
        for (index, op) in self.ops.iter().enumerate() {
            for value in op.reads() {
                links.uses[value.0 as usize] += 1;
            }
            for (part, value) in op.parts.iter().enumerate().filter_map(|(n, part)| Some((n, part.stored()?)))
            {
                links.producers[value.0 as usize] = Some((index, part));
            }
        }
        links
    }

    /// Checks that values and caches are written once and before they are read, and that every
    /// chain ends in its only sink.
    ///
    /// # Errors
    /// In words, naming the operator.
    pub fn verify(&self) -> Result<(), String> {
        let mut written = vec![false; self.values.len()];
        let mut caches = vec![false; self.caches.len()];
        for op in &self.ops {
            for value in op.reads() {
                if !written[value.0 as usize] {
                    return Err(format!(
                        "{}: reads %{} before it is written",
                        op.name,
                        self.value(value).name
                    ));
                }
            }
            for cache in &op.after_cache {
                if !caches[*cache] {
                    return Err(format!("{}: reads cache {cache} before it is written", op.name));
                }
            }
            for part in &op.parts {
                let sinks = part.pieces.iter().filter(|piece| piece.is_sink()).count();
                if sinks != 1 || !part.pieces.last().is_some_and(Piece::is_sink) {
                    return Err(format!("{}: a chain needs one sink, at its end", op.name));
                }
                if op.anchor.has_weights() == part.weights.is_empty() {
                    let what = "the parts of a gemm or of experts, and no others, have weights";
                    return Err(format!("{}: {what}", op.name));
                }
            }
            for value in op.writes() {
                if std::mem::replace(&mut written[value.0 as usize], true) {
                    return Err(format!("{}: writes %{} again", op.name, self.value(value).name));
                }
            }
            for cache in op.written_caches() {
                caches[cache] = true;
            }
        }
        Ok(())
    }
}

impl Piece {
    /// Whether the chain ends here.
    pub fn is_sink(&self) -> bool {
        matches!(self, Piece::Store(_) | Piece::WriteKeys(_) | Piece::WriteValues(_) | Piece::Logits(_))
    }
}

impl fmt::Display for Fused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "fused {:?} {{", self.name)?;
        for (rule, count) in &self.applied {
            writeln!(f, "  # {rule}: {count}x")?;
        }
        let mut layer = None;
        for op in &self.ops {
            if op.layer != layer {
                layer = op.layer;
                match layer {
                    Some(number) => writeln!(f, "\n  # layer {number}")?,
                    None => writeln!(f)?,
                }
            }
            let inputs: Vec<String> =
                op.inputs.iter().map(|value| format!("%{}", self.value(*value).name)).collect();
            write!(f, "  {} = {}({})", op.name, op.anchor.name(), inputs.join(", "))?;
            match &op.anchor {
                Anchor::Embed { weight } => write!(f, " weight={weight:?}")?,
                Anchor::Attention { cache, heads, scale, window, sinks, bidirectional } => {
                    write!(f, " cache={cache} heads={heads} scale={scale}")?;
                    if let Some(window) = window {
                        write!(f, " window={window}")?;
                    }
                    if let Some(sinks) = sinks {
                        write!(f, " sinks={sinks:?}")?;
                    }
                    if *bidirectional {
                        write!(f, " bidirectional")?;
                    }
                }
                Anchor::DynamicConv { weight, side, group } => {
                    write!(f, " weight={weight:?} side={side} group={group}")?;
                }
                Anchor::TopK { k, factor, softcap } => {
                    write!(f, " k={k} factor={factor}")?;
                    if let Some(softcap) = softcap {
                        write!(f, " softcap={softcap}")?;
                    }
                }
                Anchor::PairScores { predecessor, successor } => {
                    write!(f, " predecessor={predecessor:?} successor={successor:?}")?;
                }
                Anchor::Route(router) => write!(f, " {router}")?,
                Anchor::Experts { top_k, per_slot } => {
                    write!(f, " top_k={top_k}{}", if *per_slot { ", a row a slot" } else { "" })?;
                }
                Anchor::Input | Anchor::Taps | Anchor::Rows | Anchor::Gemm => {}
            }
            writeln!(f)?;
            for part in &op.parts {
                write!(f, "    ")?;
                if !part.weights.is_empty() {
                    let weight = &self.weights[&part.weights[0]];
                    let experts = match op.anchor {
                        Anchor::Experts { .. } => format!(" x {} experts", weight.shape[0]),
                        _ => String::new(),
                    };
                    let names = part.weights.join(" | ");
                    write!(f, "[{names} {} x {}{experts}] ", weight.format, part.cols)?;
                }
                let chain: Vec<String> = part.pieces.iter().map(|piece| self.piece_text(piece)).collect();
                writeln!(f, "-> {}", chain.join(" -> "))?;
            }
        }
        writeln!(f, "}}")
    }
}

impl Fused {
    fn piece_text(&self, piece: &Piece) -> String {
        let value = |id: &ValueId| format!("%{}: {}", self.value(*id).name, self.value(*id).ty);
        match piece {
            Piece::SelectRows => "select_rows".into(),
            Piece::Replace { weight, token } => format!("replace token {token} by {weight:?}"),
            Piece::Bias { weight, operand: 0 } => format!("bias {weight:?}"),
            Piece::Bias { weight, operand } => format!("bias {weight:?} on operand {operand}"),
            Piece::RmsNorm { weight, group, eps } => format!("rms_norm {weight:?} group={group} eps={eps:e}"),
            Piece::Rope { rope, head_dim } => format!("rope {rope:?} head_dim={head_dim}"),
            Piece::ExpertBias { weight, operand: 0 } => format!("expert_bias {weight:?}"),
            Piece::ExpertBias { weight, operand } => format!("expert_bias {weight:?} on operand {operand}"),
            Piece::Combine => "combine".into(),
            Piece::Scale(factor) => format!("scale {factor}"),
            Piece::Gated(activation) => activation.to_string(),
            Piece::AllReduce(ranks) => format!("all_reduce over {ranks} ranks"),
            Piece::Residual(id) => format!("add %{}", self.value(*id).name),
            Piece::Quantize => "quantize".into(),
            Piece::Store(id) => format!("store {}", value(id)),
            Piece::WriteKeys(cache) => format!("write keys of cache {cache}"),
            Piece::WriteValues(cache) => format!("write values of cache {cache}"),
            Piece::Logits(id) => format!("logits {}", value(id)),
        }
    }
}
