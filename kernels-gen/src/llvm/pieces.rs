//! Epilogue pieces over a tile.

use super::Kernels;
use super::body::{Body, LANES, Param};
use crate::KernelError;
use crate::pieces::{Glu, HeadNorm, KvHalf, KvWrite, Rope, Scale};
use inkwell::values::{FunctionValue, IntValue, PointerValue, VectorValue};
use tilec_ir::abi::{KV_GROUP, KvLayout, KvType};

use Param::{I64, Ptr};

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// `dst += tile`: the residual.
    pub fn add_rows(&self, name: &str) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, I64, I64, Ptr, I64], &[0, 4]);
        let (tile, stride, rows, cols) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2), b.int_arg(3));
        let (dst, dst_stride) = (b.ptr_arg(4), b.int_arg(5));
        b.count(rows, |row| {
            let (from, to) = (b.at4(tile, b.mul(row, stride)), b.at4(dst, b.mul(row, dst_stride)));
            b.columns(cols, |c, mask| {
                let to = b.at4(to, c);
                let sum = b.fadd(b.load_masked(to, mask), b.load_masked(b.at4(from, c), mask));
                b.store_masked(sum, to, mask);
            });
        });
        b.finish()
    }

    /// `dst = fma(tile, row_weights[row], dst)`: an expert's share.
    pub fn add_weighted(&self, name: &str) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, Ptr, I64, I64, Ptr, I64], &[0, 5]);
        let (tile, stride, weights, rows) = (b.ptr_arg(0), b.int_arg(1), b.ptr_arg(2), b.int_arg(3));
        let (cols, dst, dst_stride) = (b.int_arg(4), b.ptr_arg(5), b.int_arg(6));
        b.count(rows, |row| {
            let (from, to) = (b.at4(tile, b.mul(row, stride)), b.at4(dst, b.mul(row, dst_stride)));
            let weight = b.load_splat(b.at4(weights, row));
            b.columns(cols, |c, mask| {
                let to = b.at4(to, c);
                let sum = b.fma(b.load_masked(b.at4(from, c), mask), weight, b.load_masked(to, mask));
                b.store_masked(sum, to, mask);
            });
        });
        b.finish()
    }

    /// `tile += bias`.
    pub fn bias(&self, name: &str) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, I64, I64, Ptr], &[0]);
        let (tile, stride, rows, cols) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2), b.int_arg(3));
        let bias = b.ptr_arg(4);
        b.count(rows, |row| {
            let x = b.at4(tile, b.mul(row, stride));
            b.columns(cols, |c, mask| {
                let sum = b.fadd(b.load_masked(b.at4(x, c), mask), b.load_masked(b.at4(bias, c), mask));
                b.store_masked(sum, b.at4(x, c), mask);
            });
        });
        b.finish()
    }

    /// `tile *= factor`.
    pub fn scale(&self, name: &str, scale: &Scale) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, I64, I64], &[0]);
        let (tile, stride, rows, cols) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2), b.int_arg(3));
        b.count(rows, |row| {
            let x = b.at4(tile, b.mul(row, stride));
            b.columns(cols, |c, mask| {
                let product = b.fmul(b.load_masked(b.at4(x, c), mask), b.cf(scale.factor));
                b.store_masked(product, b.at4(x, c), mask);
            });
        });
        b.finish()
    }

    /// RMSNorm of each head, in place.
    ///
    /// # Errors
    /// See [`HeadNorm::check`].
    pub fn head_norm(&self, name: &str, norm: &HeadNorm) -> Result<FunctionValue<'ctx>, KernelError> {
        norm.check()?;
        let b = self.kernel(name, &[Ptr, I64, I64, I64, Ptr], &[0]);
        let weight = b.ptr_arg(4);
        b.heads(norm.head_dim, |_, head| {
            let factor = b.rms_factor(head, norm.head_dim, norm.eps);
            b.columns(b.size(norm.head_dim), |c, mask| {
                let x = b.fmul(b.load_masked(b.at4(head, c), mask), factor);
                let x = b.fmul(x, b.load_masked(b.at4(weight, c), mask));
                b.store_masked(x, b.at4(head, c), mask);
            });
        });
        Ok(b.finish())
    }

    /// Rotary embedding of each head, in place.
    ///
    /// # Errors
    /// See [`Rope::check`].
    pub fn rope(&self, name: &str, rope: &Rope) -> Result<FunctionValue<'ctx>, KernelError> {
        rope.check()?;
        let b = self.kernel(name, &[Ptr, I64, I64, I64, Ptr, Ptr, Ptr], &[0]);
        let (positions, cos, sin) = (b.ptr_arg(4), b.ptr_arg(5), b.ptr_arg(6));
        let half = rope.rotary_dims / 2;
        b.heads(rope.head_dim, |row, head| {
            let position = b.load_u32(b.at4(positions, row));
            let table = b.mul(position, b.size(half));
            let (cos, sin) = (b.at4(cos, table), b.at4(sin, table));
            b.columns(b.size(half), |c, mask| {
                let (low, high) = (b.at4(head, c), b.at4(b.off(head, half * 4), c));
                let (x, y) = (b.load_masked(low, mask), b.load_masked(high, mask));
                let (cos, sin) = (b.load_masked(b.at4(cos, c), mask), b.load_masked(b.at4(sin, c), mask));
                b.store_masked(b.fma(b.fneg(y), sin, b.fmul(x, cos)), low, mask);
                b.store_masked(b.fma(x, sin, b.fmul(y, cos)), high, mask);
            });
        });
        Ok(b.finish())
    }

    /// One head's keys or values into the cache.
    ///
    /// # Errors
    /// See [`KvWrite::check`].
    pub fn kv_write(&self, name: &str, write: &KvWrite) -> Result<FunctionValue<'ctx>, KernelError> {
        write.check()?;
        let b = self.kernel(name, &[Ptr, I64, I64, Ptr, Ptr, Ptr, I64, Ptr, I64], &[0, 7]);
        let (tile, stride, rows) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2));
        let (positions, sequences, pages) = (b.ptr_arg(3), b.ptr_arg(4), b.ptr_arg(5));
        let (per_sequence, kv, head) = (b.int_arg(6), b.ptr_arg(7), b.int_arg(8));
        let layout = &write.layout;
        let bytes = layout.kv_type.bytes();
        let lanes = LANES as usize;
        b.count(rows, |row| {
            let x = b.at4(tile, b.mul(row, stride));
            let position = b.load_u32(b.at4(positions, row));
            let sequence = b.load_u32(b.at4(sequences, row));
            let table = b.at4(pages, b.mul(sequence, per_sequence));
            let block = b.kv_block(layout, kv, table, position, head);
            let inside = b.rem_const(position, layout.page_tokens);
            let vector = |from, valid: usize| {
                let mask = (valid < lanes).then(|| b.mask_below(b.size(valid)));
                b.to_kv(layout.kv_type, b.load_masked(from, mask))
            };
            match write.half {
                KvHalf::Key => {
                    let group =
                        b.mul(b.div_const(inside, KV_GROUP), b.size(layout.qk_dim * KV_GROUP * bytes));
                    let lane = b.mul(b.rem_const(inside, KV_GROUP), b.size(bytes));
                    let to = b.at(b.at(block, group), lane);
                    let column = |first: IntValue<'ctx>, valid| {
                        let keys = vector(b.at4(x, first), valid);
                        let to = b.at(to, b.mul(first, b.size(KV_GROUP * bytes)));
                        for i in 0..valid {
                            b.store(b.lane(keys, i as u64), b.off(to, i * KV_GROUP * bytes), bytes as u32);
                        }
                    };
                    let whole = layout.qk_dim / lanes * lanes;
                    b.repeat((b.c64(0), b.size(whole), lanes as u64), |first| column(first, lanes));
                    column(b.size(whole), layout.qk_dim - whole);
                }
                KvHalf::Value => {
                    let to =
                        b.at(b.off(block, layout.v_offset()), b.mul(inside, b.size(layout.v_pad() * bytes)));
                    for first in (0..layout.v_dim).step_by(lanes) {
                        let valid = (layout.v_dim - first).min(lanes);
                        b.store(vector(b.off(x, first * 4), valid), b.off(to, first * bytes), bytes as u32);
                    }
                }
            }
        });
        Ok(b.finish())
    }

    /// Gate and up halves joined.
    pub fn glu(&self, name: &str, glu: &Glu) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, Ptr, I64, I64, I64, Ptr, I64], &[]);
        let (gate, up, stride, rows) = (b.ptr_arg(0), b.ptr_arg(1), b.int_arg(2), b.int_arg(3));
        let (cols, dst, dst_stride) = (b.int_arg(4), b.ptr_arg(5), b.int_arg(6));
        b.count(rows, |row| {
            let at = b.mul(row, stride);
            let (gate, up, dst) = (b.at4(gate, at), b.at4(up, at), b.at4(dst, b.mul(row, dst_stride)));
            b.columns(cols, |c, mask| {
                let (gate, up) = (b.load_masked(b.at4(gate, c), mask), b.load_masked(b.at4(up, c), mask));
                b.store_masked(b.glu(glu, gate, up), b.at4(dst, c), mask);
            });
        });
        b.finish()
    }
}

impl<'ctx> Body<'_, 'ctx> {
    /// Runs over rows and heads of a piece whose first arguments are tile, stride, rows, heads.
    fn heads(&self, head_dim: usize, body: impl FnOnce(IntValue<'ctx>, PointerValue<'ctx>)) {
        let (tile, stride, rows, heads) =
            (self.ptr_arg(0), self.int_arg(1), self.int_arg(2), self.int_arg(3));
        self.count(rows, |row| {
            let x = self.at4(tile, self.mul(row, stride));
            self.count(heads, |head| body(row, self.at4(x, self.mul(head, self.size(head_dim)))));
        });
    }

    /// The block of the cache that holds a position of the sequence whose page table is given.
    pub(crate) fn kv_block(
        &self,
        layout: &KvLayout,
        kv_layer: PointerValue<'ctx>,
        table: PointerValue<'ctx>,
        position: IntValue<'ctx>,
        head: IntValue<'ctx>,
    ) -> PointerValue<'ctx> {
        let page = self.load_u32(self.at4(table, self.div_const(position, layout.page_tokens)));
        let block = self.add(self.mul(page, self.size(layout.kv_heads)), head);
        self.at(kv_layer, self.mul(block, self.size(layout.block_bytes())))
    }

    fn glu(&self, glu: &Glu, gate: VectorValue<'ctx>, up: VectorValue<'ctx>) -> VectorValue<'ctx> {
        match *glu {
            Glu::Silu => self.fmul(self.fmul(gate, self.sigmoid(gate)), up),
            Glu::GeluTanh => {
                // 0.5 x (1 + tanh(y)) = x sigmoid(2 y) with y = sqrt(2 / pi) (x + 0.044715 x^3); the
                // sigmoid keeps its digits where tanh is near -1.
                let cube = self.fmul(self.fmul(gate, gate), gate);
                let inner = self.fma(cube, self.cf(0.044_715), gate);
                let sigmoid = self.sigmoid(self.fmul(inner, self.cf(1.595_769)));
                self.fmul(self.fmul(gate, sigmoid), up)
            }
            Glu::Clamped { alpha, limit } => {
                let gate = self.fmin(gate, self.cf(limit));
                let up = self.fmin(self.fmax(up, self.cf(-limit)), self.cf(limit));
                let sigmoid = self.sigmoid(self.fmul(gate, self.cf(alpha)));
                self.fmul(self.fmul(gate, sigmoid), self.fadd(up, self.cf(1.0)))
            }
        }
    }

    /// Loads 16 elements of the cache as f32.
    pub(crate) fn load_kv(&self, ty: KvType, from: PointerValue<'ctx>) -> VectorValue<'ctx> {
        let halves = |bytes| self.load_v(self.ints(16, LANES), from, bytes);
        match ty {
            KvType::F32 => self.load_v(self.f32x(), from, 64),
            KvType::F16 => self.f16_to_f32(halves(32)),
            KvType::Bf16 => self.bf16_to_f32(halves(32)),
        }
    }
}
