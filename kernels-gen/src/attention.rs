//! Attention over the paged KV cache. Descriptor.

use crate::KernelError;
use crate::pieces::check_kv;
use tilec_ir::abi::KvLayout;

/// Attention of rows that share a KV head: all query heads of the group together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Layout of the cache.
    pub layout: KvLayout,
    /// Query heads per KV head.
    pub group: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// `cap * tanh(score / cap)` after the scale.
    pub softcap: Option<f32>,
    /// Positions that a row sees, its own included; all if absent.
    pub window: Option<usize>,
    /// Whether a row also sees the rows of its sequence that come behind it in the step: keys at less
    /// than `window` positions on either side.
    pub bidirectional: bool,
    /// Whether each head has a sink logit, which joins the denominator.
    pub sinks: bool,
}

/// Positions that one step of the online softmax covers. Boundaries are multiples of this in
/// absolute positions, so a row's sums do not depend on where its neighbours start.
pub const CHUNK: usize = 256;

/// Query vectors (row, head) that share each load of K and V.
pub(crate) const MAX_QUERIES: usize = 8;

impl Attention {
    /// # Errors
    /// An impossible cache layout, no query head, an empty window, a cap or a scale that is not a
    /// positive number.
    pub fn check(&self) -> Result<(), KernelError> {
        check_kv("attention", &self.layout)?;
        let fail = |problem: String, remedy| Err(KernelError::shape("attention", problem, remedy));
        if self.group == 0 {
            return fail("no query heads".into(), "use at least one");
        }
        if self.window == Some(0) {
            return fail("an empty window".into(), "use at least one position");
        }
        if !self.scale.is_finite() || self.softcap.is_some_and(|cap| !(cap > 0.0 && cap.is_finite())) {
            return fail(format!("scale {} softcap {:?}", self.scale, self.softcap), "use finite numbers");
        }
        Ok(())
    }

    /// Query heads that are computed together, and rows beside them.
    #[cfg(feature = "llvm")]
    pub(crate) fn blocking(&self, target: &crate::Target) -> (usize, usize) {
        let most = if target.isa.avx512 { MAX_QUERIES } else { MAX_QUERIES / 2 };
        let heads = (1..=most.min(self.group)).rev().find(|h| self.group.is_multiple_of(*h)).unwrap_or(1);
        (heads, (most / heads).max(1))
    }

    /// Bytes of private scratch, whatever the context.
    pub fn scratch_bytes(&self) -> usize {
        // Scores of a chunk, the scaled query, the output so far, running maximum and sum (a vector
        // each).
        MAX_QUERIES * (CHUNK + self.layout.qk_dim.next_multiple_of(16) + self.layout.v_pad() + 32) * 4
    }

    /// KV bytes that a row at `position` reads per KV head, of those up to it.
    pub fn kv_bytes(&self, position: usize) -> usize {
        let seen = self.window.map_or(position + 1, |w| w.min(position + 1));
        seen * (self.layout.qk_dim + self.layout.v_dim) * self.layout.kv_type.bytes()
    }

    /// Multiply-adds of a row at `position`, per KV head.
    pub fn multiply_adds(&self, position: usize) -> usize {
        let seen = self.window.map_or(position + 1, |w| w.min(position + 1));
        seen * (self.layout.qk_dim + self.layout.v_dim) * self.group
    }
}
