//! The operators. To add one: a variant here, its shape rule in `infer.rs`, its meaning in
//! `interp.rs`; the text form follows from the derives.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Gate activation of a gated feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationFn {
    /// `gate * sigmoid(gate) * up`.
    Silu,
    /// gpt-oss: `g = min(gate, limit)`, `u = clamp(up, -limit, limit)`,
    /// `g * sigmoid(alpha * g) * (u + 1)`.
    Clamped {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound of both halves; above 0.
        limit: f32,
    },
}

impl fmt::Display for ActivationFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ActivationFn::Silu => f.write_str("silu_gate"),
            ActivationFn::Clamped { alpha, limit } => write!(f, "clamped_gate alpha={alpha} limit={limit}"),
        }
    }
}

/// What a router's scores become before the largest are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Nothing; the weights are the softmax over the chosen.
    ChosenSoftmax,
    /// `1 / (1 + exp(-score))` of each.
    Sigmoid,
}

/// Chooses experts for a row. With `p` the scores after [`Scoring`], the experts with the `top_k`
/// largest `p + correction` are chosen, ties going to the lower number. The weight of each is its `p`
/// (without the correction), divided by their sum if `renormalize`, times `factor`; for
/// [`Scoring::ChosenSoftmax`] the softmax over the chosen scores, times `factor`. The chosen stand in
/// ascending order of their number, so that every sum over them has one order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Router {
    /// From scores to what is compared.
    pub scoring: Scoring,
    /// Whether the weights of the chosen are divided by their sum (plus 1e-20).
    #[serde(default)]
    pub renormalize: bool,
    /// Experts that each row gets; from 1 to the number of experts.
    pub top_k: usize,
    /// Multiplied into every weight.
    pub factor: f32,
    /// `[experts]`, added for the choice alone. Only with [`Scoring::Sigmoid`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<String>,
}

impl fmt::Display for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scoring = match self.scoring {
            Scoring::Softmax => "softmax",
            Scoring::ChosenSoftmax => "chosen_softmax",
            Scoring::Sigmoid => "sigmoid",
        };
        write!(f, "{scoring} top_k={}", self.top_k)?;
        if self.renormalize {
            f.write_str(" renormalized")?;
        }
        if self.factor != 1.0 {
            write!(f, " factor={}", self.factor)?;
        }
        match &self.correction {
            Some(correction) => write!(f, " correction={correction:?}"),
            None => Ok(()),
        }
    }
}

/// Whether a flag is off, which the text form leaves out.
fn off(flag: &bool) -> bool {
    !flag
}

/// Most candidates that [`Op::TopK`] keeps of a row.
pub const MAX_CANDIDATES: usize = 64;

/// An operator. Weights are named as in the checkpoint; matrices are `[out, in]`, as there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Op {
    /// Rows of a table by token id: `[rows, in features of the weight]`.
    Embed {
        /// `[vocab, hidden]`.
        weight: String,
    },
    /// `x`, but for rows of one token, which become a vector: a mask whose embedding the table has not.
    Replace {
        /// `[cols]`.
        weight: String,
        /// The token.
        token: u32,
    },
    /// Rows of float32 that the runtime hands over with the step: `[rows, cols]`.
    Input {
        /// Columns.
        cols: usize,
    },
    /// `x / sqrt(mean(x^2) + eps) * weight`, over groups of `weight.len()` columns: the whole row
    /// for a layer norm, a head for qk-norm.
    RmsNorm {
        /// `[group]`; divides the columns.
        weight: String,
        /// Added to the mean of squares.
        eps: f32,
    },
    /// `x * W^T`.
    Linear {
        /// `[out, in]`.
        weight: String,
    },
    /// `x + b`, the same for each row.
    Bias {
        /// `[cols]`.
        weight: String,
    },
    /// `x * factor`.
    Scale {
        /// The factor, finite.
        factor: f32,
    },
    /// Rotary position embedding, half-split (NeoX, as Hugging Face stores q and k): in each head
    /// dimension `i` of the first `dims/2` is rotated with dimension `i + dims/2`.
    Rope {
        /// Name in the graph's table of ropes.
        rope: String,
        /// Columns of a head.
        head_dim: usize,
    },
    /// Writes keys (operand 0) and values (operand 1) of the rows at their positions.
    KvWrite {
        /// Cache number.
        cache: usize,
    },
    /// Attention of queries (operand 0) over a cache (operand 1 orders it behind the write),
    /// grouped-query: `heads / kv_heads` query heads share a KV head. `[rows, heads * v_dim]`.
    Attention {
        /// Cache number.
        cache: usize,
        /// Query heads.
        heads: usize,
        /// Factor on the scores.
        scale: f32,
        /// Positions that a row sees, itself included; `None`: all before it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        window: Option<usize>,
        /// `[heads]`: a score that joins each head's softmax and carries no value.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sinks: Option<String>,
        /// Whether a row also sees the rows of its sequence that come behind it in the step, as far as
        /// the window reaches: `|distance| < window`. Otherwise it sees itself and what is before it.
        #[serde(default, skip_serializing_if = "off")]
        bidirectional: bool,
    },
    /// A convolution over two rows whose kernel is made for each row (DFlash2). With `k` the part of the
    /// kernel's base and of the row's own (operand 1, `[rows, 2 * 2 * groups]`) that is of this `side`, a row
    /// of `x` (operand 0) becomes `(base[0] + k[0]) * x + (base[1] + k[1]) * before`, column by column, each
    /// value of `k` for a group of columns. `before` is the row before it in the step if that is of the same
    /// sequence, else zero.
    DynamicConv {
        /// The kernel's base, `[2 sides, 2 taps, cols]`; tap 0 is the row's own.
        weight: String,
        /// 0: in front of what is convolved around, 1: behind it.
        side: usize,
        /// Columns that share a value of the row's own kernel; divides the columns.
        group: usize,
    },
    /// Gate (operand 0) and up (operand 1) joined.
    Gated {
        /// How.
        activation: ActivationFn,
    },
    /// From a router's scores `[rows, experts]` to `routes[rows, top_k]`.
    Route(Router),
    /// `x * W[e]^T` for every chosen expert `e` of a row, slot by slot: `[rows, top_k * out]`. Operand 0
    /// is one row for all slots `[rows, in]` or one a slot `[rows, top_k * in]`; operand 1 the routes.
    ExpertLinear {
        /// `[experts, out, in]`.
        weight: String,
        /// Whether operand 0 has a row a slot.
        per_slot: bool,
    },
    /// `x + b[e]` for every chosen expert `e` of a row. Operand 0 is `[rows, top_k * cols]`, operand 1
    /// the routes.
    ExpertBias {
        /// `[experts, cols]`.
        weight: String,
    },
    /// The sum over the slots of `x` (operand 0, `[rows, top_k * cols]`), in their order, each times its
    /// weight in the routes (operand 1): `[rows, cols]`.
    Combine,
    /// The sum of the operand over all ranks, each of which has a part of it: `[rows, cols]` on every one.
    /// Where one rank runs alone, its own part stands for the sum.
    AllReduce {
        /// How many there are, at least 2.
        ranks: usize,
    },
    /// `a + b`.
    Add,
    /// The rows whose logits are wanted.
    SelectRows,
    /// Signed bytes in blocks of 32 columns with a float32 scale (amax / 127, nearest even).
    Quantize,
    /// Marks the logits: the step's result.
    Logits,
    /// The `k` tokens of the largest logits of each row, the largest first, of equals the lower token, NaN
    /// last; each with its logit times `factor`, then `softcap * tanh(logit / softcap)`: `routes[rows, k]`.
    TopK {
        /// How many; from 1 to the logits' columns, at most [`MAX_CANDIDATES`].
        k: usize,
        /// Multiplied into every logit; above 0, so that it changes no order.
        factor: f32,
        /// Bound of the logits' magnitudes; above 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        softcap: Option<f32>,
    },
    /// What each candidate of a row is worth behind each possible one before it: a result of the step
    /// beside its logits. Operand 0 is the candidates `routes[logit_rows, k]`, operand 1 the rows'
    /// projections `h`, `[logit_rows, rank]`. Value `a * k + b` of a row is the logit of its candidate `b`
    /// plus `<P[p] * h, S[b]>`, with `p` candidate `a` of the row before it in its sequence. Where that row's
    /// logits are not wanted, its token is known, and `p` is this for every `a`; a row without one before
    /// it goes by its own token.
    PairScores {
        /// `P`, `[vocab, rank]`.
        predecessor: String,
        /// `S`, `[vocab, rank]`.
        successor: String,
    },
    /// The operands side by side, a result of the step beside its logits: what a draft reads of its
    /// target. `[rows, sum of columns]`.
    Taps,
}

impl Op {
    /// Name in the text form.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Replace { .. } => "replace",
            Op::Input { .. } => "input",
            Op::RmsNorm { .. } => "rms_norm",
            Op::Linear { .. } => "linear",
            Op::Bias { .. } => "bias",
            Op::Scale { .. } => "scale",
            Op::Rope { .. } => "rope",
            Op::KvWrite { .. } => "kv_write",
            Op::Attention { .. } => "attention",
            Op::DynamicConv { .. } => "dynamic_conv",
            Op::Gated { .. } => "gated",
            Op::Route(_) => "route",
            Op::ExpertLinear { .. } => "expert_linear",
            Op::ExpertBias { .. } => "expert_bias",
            Op::Combine => "combine",
            Op::AllReduce { .. } => "all_reduce",
            Op::Add => "add",
            Op::SelectRows => "select_rows",
            Op::Quantize => "quantize",
            Op::Logits => "logits",
            Op::TopK { .. } => "top_k",
            Op::PairScores { .. } => "pair_scores",
            Op::Taps => "taps",
        }
    }

    /// The weights that it reads.
    pub fn weights(&self) -> impl Iterator<Item = &str> {
        let (one, other) = match self {
            Op::Embed { weight }
            | Op::RmsNorm { weight, .. }
            | Op::Linear { weight }
            | Op::Bias { weight }
            | Op::Replace { weight, .. }
            | Op::DynamicConv { weight, .. }
            | Op::ExpertLinear { weight, .. }
            | Op::ExpertBias { weight } => (Some(weight.as_str()), None),
            Op::PairScores { predecessor, successor } => {
                (Some(predecessor.as_str()), Some(successor.as_str()))
            }
            Op::Route(router) => (router.correction.as_deref(), None),
            Op::Attention { sinks, .. } => (sinks.as_deref(), None),
            _ => (None, None),
        };
        one.into_iter().chain(other)
    }
}
