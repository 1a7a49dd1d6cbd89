//! Epilogue pieces over a tile in private scratch. Descriptors.

use crate::KernelError;
use tilec_ir::abi::KvLayout;

/// RMSNorm of each head (qk-norm).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorm {
    /// Columns of a head.
    pub head_dim: usize,
    /// Added to the mean of the squares.
    pub eps: f32,
}

impl HeadNorm {
    /// # Errors
    /// A head without columns.
    pub fn check(&self) -> Result<(), KernelError> {
        match self.head_dim {
            0 => Err(KernelError::shape("head_norm", "a head without columns", "use at least one")),
            _ => Ok(()),
        }
    }
}

/// Rotary embedding, half split (NeoX): column `i` turns with column `i + rotary_dims / 2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rope {
    /// Columns of a head.
    pub head_dim: usize,
    /// Leading columns that turn, even, at most `head_dim`.
    pub rotary_dims: usize,
}

impl Rope {
    /// # Errors
    /// An odd number of rotary dimensions, or more than the head has.
    pub fn check(&self) -> Result<(), KernelError> {
        if self.rotary_dims == 0 || !self.rotary_dims.is_multiple_of(2) || self.rotary_dims > self.head_dim {
            let problem = format!("{} rotary dimensions of a head of {}", self.rotary_dims, self.head_dim);
            return Err(KernelError::shape("rope", problem, "use an even number, at most the head's"));
        }
        Ok(())
    }
}

/// A constant factor on a tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// The factor.
    pub factor: f32,
}

/// What joins the gate and up halves of an MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Glu {
    /// `silu(gate) * up`.
    Silu,
    /// `gelu_tanh(gate) * up`.
    GeluTanh,
    /// gpt-oss: `g = min(gate, limit)`, `u = clamp(up, -limit, limit)`,
    /// `g * sigmoid(alpha * g) * (u + 1)`.
    Clamped {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Bound of both halves.
        limit: f32,
    },
}

/// Which half of the KV cache a write goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvHalf {
    /// Keys: groups of 16 positions, transposed.
    Key,
    /// Values: rows, padded to 16 columns with zeros.
    Value,
}

/// One head's keys or values of the tile's rows into the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvWrite {
    /// Layout of the cache.
    pub layout: KvLayout,
    /// Keys or values.
    pub half: KvHalf,
}

impl KvWrite {
    /// # Errors
    /// See [`check_kv`].
    pub fn check(&self) -> Result<(), KernelError> {
        check_kv("kv_write", &self.layout)
    }
}

/// # Errors
/// A page that is not a whole number of groups, or an empty head.
pub fn check_kv(kernel: &'static str, layout: &KvLayout) -> Result<(), KernelError> {
    if layout.page_tokens == 0 || !layout.page_tokens.is_multiple_of(tilec_ir::abi::KV_GROUP) {
        let problem = format!("pages of {} positions", layout.page_tokens);
        return Err(KernelError::shape(kernel, problem, "use a multiple of 16"));
    }
    if layout.qk_dim == 0 || layout.v_dim == 0 {
        return Err(KernelError::shape(kernel, "a head without columns", "use at least one"));
    }
    Ok(())
}
