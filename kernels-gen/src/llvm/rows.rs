//! Kernels over whole rows.

use super::Kernels;
use super::body::{Body, LANES, Param};
use crate::KernelError;
use crate::rows::{Embed, Quantize, RmsNorm, Table};
use inkwell::IntPredicate;
use inkwell::values::{FunctionValue, IntValue, PointerValue, VectorValue};
use tilec_ir::abi::QuantRows;
use tilec_ir::format::{ACT_BLOCK, Code, PANEL, PanelLayout};

use Param::{I64, Ptr};

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// RMSNorm of rows; see the [module](super) for arguments.
    ///
    /// # Errors
    /// See [`RmsNorm::check`].
    pub fn rms_norm(&self, name: &str, norm: &RmsNorm) -> Result<FunctionValue<'ctx>, KernelError> {
        norm.check()?;
        let b = self.kernel(name, &[Ptr, I64, Ptr, I64, Ptr, Ptr, I64, Ptr, I64], &[7]);
        let (src, src_stride, index, rows) = (b.ptr_arg(0), b.int_arg(1), b.ptr_arg(2), b.int_arg(3));
        let (weight, dst, dst_stride) = (b.ptr_arg(4), b.ptr_arg(5), b.int_arg(6));
        let (quant, quant_row) = (b.ptr_arg(7), b.int_arg(8));
        b.count(rows, |row| {
            let from = if norm.gathered { b.load_u32(b.at4(index, row)) } else { row };
            let x = b.at4(src, b.mul(from, src_stride));
            let factor = b.rms_factor(x, norm.dim, norm.eps);
            let normed = |column, mask| {
                let x = b.fmul(b.load_masked(b.at4(x, column), mask), factor);
                b.fmul(x, b.load_masked(b.at4(weight, column), mask))
            };
            // Quantized first: `dst` may be `src`.
            if let Some(to) = norm.quant_out {
                let row = b.add(quant_row, row);
                b.quantize_row(to, quant, row, b.c64(0), b.size(norm.dim), normed);
            }
            if norm.f32_out {
                let to = b.at4(dst, b.mul(row, dst_stride));
                b.columns(b.size(norm.dim), |c, mask| b.store_masked(normed(c, mask), b.at4(to, c), mask));
            }
        });
        Ok(b.finish())
    }

    /// Quantization of tile columns; see the [module](super) for arguments.
    pub fn quantize(&self, name: &str, quantize: &Quantize) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, I64, I64, Ptr, I64, I64], &[4]);
        let (tile, stride, rows, cols) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2), b.int_arg(3));
        let (quant, first_row, first_col) = (b.ptr_arg(4), b.int_arg(5), b.int_arg(6));
        b.count(rows, |row| {
            let x = b.at4(tile, b.mul(row, stride));
            let row = b.add(first_row, row);
            b.quantize_row(quantize.quant, quant, row, first_col, cols, |column, mask| {
                b.load_masked(b.at4(x, column), mask)
            });
        });
        b.finish()
    }

    /// Embedding rows; see the [module](super) for arguments.
    ///
    /// # Errors
    /// See [`Embed::check`].
    pub fn embed(&self, name: &str, embed: &Embed) -> Result<FunctionValue<'ctx>, KernelError> {
        embed.check()?;
        let b = self.kernel(name, &[Ptr, Ptr, I64, Ptr, I64], &[3]);
        let (table, tokens, rows) = (b.ptr_arg(0), b.ptr_arg(1), b.int_arg(2));
        let (dst, dst_stride) = (b.ptr_arg(3), b.int_arg(4));
        let scaled = |v| embed.scale.map_or(v, |scale| b.fmul(v, b.cf(scale)));
        b.count(rows, |row| {
            let token = b.load_u32(b.at4(tokens, row));
            let to = b.at4(dst, b.mul(row, dst_stride));
            match embed.table {
                Table::Plain(code) => {
                    let bytes = code.bits() / 8;
                    let from = b.at(table, b.mul(token, b.size(embed.dim * bytes)));
                    b.columns(b.size(embed.dim), |column, mask| {
                        let from = b.at(from, b.mul(column, b.size(bytes)));
                        let value = b.load_floats_masked(code, from, embed.dim % LANES as usize, mask);
                        b.store_masked(scaled(value), b.at4(to, column), mask);
                    });
                }
                Table::Panels(layout) => {
                    let panel = b.mul(b.div_const(token, PANEL), b.size(layout.bytes()));
                    let lane = b.rem_const(token, PANEL);
                    // Panels are padded to whole vectors of columns.
                    b.columns(b.size(embed.dim), |column, mask| {
                        let value = b.panel_columns(&layout, b.at(table, panel), lane, column);
                        b.store_masked(scaled(value), b.at4(to, column), mask);
                    });
                }
            }
        });
        Ok(b.finish())
    }

    /// Copies tile columns to a buffer (an f32 activation, the queries, the logits).
    pub fn copy_rows(&self, name: &str) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, I64, I64, Ptr, I64], &[0, 4]);
        let (tile, stride, rows, cols) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2), b.int_arg(3));
        let (dst, dst_stride) = (b.ptr_arg(4), b.int_arg(5));
        b.count(rows, |row| {
            b.copy(b.at4(tile, b.mul(row, stride)), b.at4(dst, b.mul(row, dst_stride)), cols);
        });
        b.finish()
    }

    /// Copies f32 rows by index.
    pub fn gather_rows(&self, name: &str) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, Ptr, I64, I64, Ptr, I64], &[5]);
        let (src, stride, index, rows) = (b.ptr_arg(0), b.int_arg(1), b.ptr_arg(2), b.int_arg(3));
        let (cols, dst, dst_stride) = (b.int_arg(4), b.ptr_arg(5), b.int_arg(6));
        b.count(rows, |row| {
            let from = b.load_u32(b.at4(index, row));
            b.copy(b.at4(src, b.mul(from, stride)), b.at4(dst, b.mul(row, dst_stride)), cols);
        });
        b.finish()
    }

    /// Copies quantized rows by index from a buffer `from` to the start of a buffer `to`.
    ///
    /// # Errors
    /// The buffers' columns differ.
    pub fn gather_quant(
        &self,
        name: &str,
        from: &QuantRows,
        to: &QuantRows,
    ) -> Result<FunctionValue<'ctx>, KernelError> {
        if from.k != to.k {
            let problem = format!("{} columns to {}", from.k, to.k);
            return Err(KernelError::shape("gather_quant", problem, "make them equal"));
        }
        let b = self.kernel(name, &[Ptr, Ptr, I64, Ptr], &[3]);
        let (src, index, rows, dst) = (b.ptr_arg(0), b.ptr_arg(1), b.int_arg(2), b.ptr_arg(3));
        let planes = [
            (0, 0, from.k_pad() / 4),
            (from.scale_offset(), to.scale_offset(), from.blocks()),
            (from.sum_offset(), to.sum_offset(), from.blocks()),
        ];
        b.count(rows, |row| {
            let source = b.load_u32(b.at4(index, row));
            for (src_offset, dst_offset, words) in planes {
                let from = b.at(b.off(src, src_offset), b.mul(source, b.size(words * 4)));
                let to = b.at(b.off(dst, dst_offset), b.mul(row, b.size(words * 4)));
                b.copy(from, to, b.size(words));
            }
        });
        Ok(b.finish())
    }
}

impl<'ctx> Body<'_, 'ctx> {
    /// Copies words of 4 bytes.
    fn copy(&self, from: PointerValue<'ctx>, to: PointerValue<'ctx>, words: IntValue<'ctx>) {
        self.columns(words, |column, mask| {
            let value = self.load_masked(self.at4(from, column), mask);
            self.store_masked(value, self.at4(to, column), mask);
        });
    }

    /// `1 / sqrt(mean(x^2) + eps)` of a row, in every lane.
    pub(crate) fn rms_factor(&self, x: PointerValue<'ctx>, dim: usize, eps: f32) -> VectorValue<'ctx> {
        let lanes = LANES as usize;
        let range = (self.c64(0), self.size(dim / lanes * lanes), u64::from(LANES));
        let sums = self.carry_v(range, &[self.f32x().const_zero()], |column, sums| {
            let x = self.load_f(self.at4(x, column));
            vec![self.fma(x, x, sums[0])]
        });
        let mut sum = sums[0];
        if !dim.is_multiple_of(lanes) {
            let mask = self.mask_below(self.size(dim % lanes));
            let x = self.load_masked(self.off(x, dim / lanes * lanes * 4), Some(mask));
            sum = self.fma(x, x, sum);
        }
        let mean = self.fdiv(self.sum(sum), self.cf(dim as f32));
        self.fdiv(self.cf(1.0), self.sqrt(self.fadd(mean, self.cf(eps))))
    }

    /// Quantizes `cols` values, which `value(column, mask)` makes, into columns `first_col..` of
    /// row `row`.
    pub(crate) fn quantize_row(
        &self,
        quant: QuantRows,
        base: PointerValue<'ctx>,
        row: IntValue<'ctx>,
        first_col: IntValue<'ctx>,
        cols: IntValue<'ctx>,
        value: impl Fn(IntValue<'ctx>, Option<VectorValue<'ctx>>) -> VectorValue<'ctx>,
    ) {
        let lanes = self.c64(u64::from(LANES));
        let codes = self.at(self.at(base, self.mul(row, self.size(quant.k_pad()))), first_col);
        let first_block =
            self.add(self.mul(row, self.size(quant.blocks())), self.div_const(first_col, ACT_BLOCK));
        let scales = self.at4(self.off(base, quant.scale_offset()), first_block);
        let sums = self.at4(self.off(base, quant.sum_offset()), first_block);
        let block = |column, low, high| {
            let index = self.div_const(column, ACT_BLOCK);
            let to = (self.at(codes, column), self.at4(scales, index), self.at4(sums, index));
            self.quantize_block(low, high, to);
        };
        let whole = self.floor(cols, ACT_BLOCK as u64);
        self.repeat((self.c64(0), whole, ACT_BLOCK as u64), |column| {
            block(column, value(column, None), value(self.add(column, lanes), None));
        });
        if cols.get_zero_extended_constant().is_some_and(|c| c.is_multiple_of(ACT_BLOCK as u64)) {
            return;
        }
        self.when(self.cmp(IntPredicate::ULT, whole, cols), || {
            let left = self.sub(cols, whole);
            let low = value(whole, Some(self.mask_below(left)));
            let high = value(self.add(whole, lanes), Some(self.mask_below(self.sub(left, lanes))));
            block(whole, low, high);
        });
    }

    /// Quantizes a block of 32 and writes its codes, scale and sum.
    fn quantize_block(
        &self,
        low: VectorValue<'ctx>,
        high: VectorValue<'ctx>,
        (codes, scale, sum): (PointerValue<'ctx>, PointerValue<'ctx>, PointerValue<'ctx>),
    ) {
        // As integers, magnitudes order like floats, and infinities and NaNs come out on top.
        let larger = |a, b| self.select(self.icmp(IntPredicate::SGT, a, b), a, b);
        let magnitude = |v| self.as_int(self.abs(v));
        let largest = self.tree_of(larger(magnitude(low), magnitude(high)), larger);
        let amax = self.as_float(largest);
        let finite = self.icmp(IntPredicate::SLT, largest, self.ci(0x7f80_0000));
        // Below this 127 / amax is not finite; such a block is as good as zero.
        let tiny = self.icmp(IntPredicate::SLT, largest, self.ci(i64::from(1e-35f32.to_bits())));
        let zero = self.f32x().const_zero();
        let factor = self.fdiv(self.cf(127.0), amax);
        let factor = self.select(tiny, zero, factor);
        let value = self.select(tiny, zero, self.fdiv(amax, self.cf(127.0)));
        let value = self.select(finite, value, self.cf(f32::NAN));
        let code = |v| {
            let code = self.round(self.fmul(v, factor));
            self.select(finite, code, self.i32x().const_zero())
        };
        let (low, high) = (code(low), code(high));
        let bytes = self.ints(8, LANES);
        self.store(self.trunc(low, bytes), codes, 16);
        self.store(self.trunc(high, bytes), self.off(codes, LANES as usize), 16);
        self.store(self.lane(value, 0), scale, 4);
        self.store(self.int_sum(self.iadd(low, high)), sum, 4);
    }

    /// 16 columns, from `column` (a multiple of 16) on, of one feature of a panel.
    fn panel_columns(
        &self,
        layout: &PanelLayout,
        panel: PointerValue<'ctx>,
        lane: IntValue<'ctx>,
        column: IntValue<'ctx>,
    ) -> VectorValue<'ctx> {
        let format = layout.format;
        let bits = format.code.bits();
        // Column `column` starts a group of 8 and of 4.
        let codes = self.off(panel, layout.code_offset());
        let codes = self.at(codes, self.mul(column, self.size(PANEL * bits / 8)));
        let element = if bits >= 16 { bits / 8 } else { 4 };
        let codes = self.at(codes, self.mul(lane, self.size(element)));
        let ty = self.context.custom_width_int_type((bits.max(8) as u32).try_into().expect("above 0"));
        let ty = ty.expect("a legal width");
        let word = ty.vec_type(LANES);
        let mut code = word.get_poison();
        for i in 0..LANES as usize {
            let offset = layout.code_at(0, i).0 - layout.code_offset();
            let byte = self.load(ty, self.off(codes, offset), (bits.max(8) / 8) as u32);
            let at = self.c64(i as u64);
            code = self.builder.build_insert_element(code, byte, at, "").expect("its element type");
        }
        let code = match format.code {
            Code::F32 => self.cast(code, self.f32x()),
            Code::F16 => self.f16_to_f32(code),
            Code::Bf16 => self.bf16_to_f32(code),
            Code::E4m3 => self.e4m3_to_f32(self.zext(code, self.i32x())),
            Code::I8 => self.integer_code(self.zext(code, self.i32x()), format.zero),
            Code::U4 => self.integer_code(self.nibbles(code), format.zero),
            Code::E2m1 => self.e2m1_to_f32(self.nibbles(code)),
        };
        let Some(ty) = format.scale else { return code };
        let block = self.div_const(column, format.block);
        let index = self.add(self.mul(block, self.size(PANEL)), lane);
        let at = self.at(panel, self.mul(index, self.size(ty.bytes())));
        let scale = self.load_scale_splat(ty, at);
        match format.min {
            true => self.fma(scale, code, self.load_scale_splat(ty, self.off(at, layout.min_offset()))),
            false => self.fmul(scale, code),
        }
    }

    /// The nibbles of columns 0..16 (low for the first four of each eight) as i32.
    fn nibbles(&self, bytes: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let shifts: Vec<i64> = (0..i64::from(LANES)).map(|i| if i % 8 >= 4 { 4 } else { 0 }).collect();
        let words = self.zext(bytes, self.i32x());
        let shifted = self.builder.build_right_shift(words, self.const_ints(32, &shifts), false, "");
        self.and(shifted.expect("equal types"), self.ci(0xf))
    }

    /// Integer codes, less the zero, as f32.
    pub(crate) fn integer_code(&self, code: VectorValue<'ctx>, zero: i32) -> VectorValue<'ctx> {
        self.i_to_f(if zero == 0 { code } else { self.isub(code, self.ci(i64::from(zero))) })
    }
}
