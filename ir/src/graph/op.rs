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
            Op::Taps => "taps",
        }
    }

    /// The weight that it reads, if any.
    pub fn weight(&self) -> Option<&str> {
        match self {
            Op::Embed { weight }
            | Op::RmsNorm { weight, .. }
            | Op::Linear { weight }
            | Op::Bias { weight }
            | Op::Replace { weight, .. }
            | Op::ExpertLinear { weight, .. }
            | Op::ExpertBias { weight } => Some(weight),
            Op::Route(router) => router.correction.as_deref(),
            Op::Attention { sinks, .. } => sinks.as_deref(),
            _ => None,
        }
    }
}
