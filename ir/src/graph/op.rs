//! The operators. To add one: a variant here, its shape rule in `infer.rs`, its meaning in
//! `interp.rs`; the text form follows from the derives.

use serde::{Deserialize, Serialize};

/// Gate activation of a gated feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationFn {
    /// `x * sigmoid(x)`.
    Silu,
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
    /// Causal attention of queries (operand 0) over a cache (operand 1 orders it behind the write),
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
    },
    /// `activation(gate) * up`.
    Gated {
        /// Activation of the gate (operand 0).
        activation: ActivationFn,
    },
    /// `a + b`.
    Add,
    /// The rows whose logits are wanted.
    SelectRows,
    /// Signed bytes in blocks of 32 columns with a float32 scale (amax / 127, nearest even).
    Quantize,
    /// Marks the logits: the step's result.
    Logits,
}

impl Op {
    /// Name in the text form.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::RmsNorm { .. } => "rms_norm",
            Op::Linear { .. } => "linear",
            Op::Bias { .. } => "bias",
            Op::Rope { .. } => "rope",
            Op::KvWrite { .. } => "kv_write",
            Op::Attention { .. } => "attention",
            Op::Gated { .. } => "gated",
            Op::Add => "add",
            Op::SelectRows => "select_rows",
            Op::Quantize => "quantize",
            Op::Logits => "logits",
        }
    }

    /// The weight that it reads, if any.
    pub fn weight(&self) -> Option<&str> {
        match self {
            Op::Embed { weight }
            | Op::RmsNorm { weight, .. }
            | Op::Linear { weight }
            | Op::Bias { weight } => Some(weight),
            _ => None,
        }
    }
}
