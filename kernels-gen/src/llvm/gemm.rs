//! GEMM on packed panels.
//!
//! One panel is 16 output features, the lanes of a vector; each row has accumulators of its own,
//! and a block of rows shares the unpacking of the weights.

use super::Kernels;
use super::body::{Body, LANES, Param};
use super::dot::{Dot, Sums};
use crate::KernelError;
use crate::gemm::{Activations, Gemm, integer_zero};
use inkwell::values::{FunctionValue, IntValue, PointerValue, VectorValue};
use tilec_ir::abi::QuantRows;
use tilec_ir::format::{ACT_BLOCK, Code, PANEL, PanelLayout};

/// Columns that the loop of the f32 kernel covers in one round: every scale block is a multiple.
const FLOAT_STEP: usize = 16;

/// Accumulators per row of the f32 kernel, one per column parity: two chains hide the latency of
/// a fused multiply-add at one row, and eight rows of them still fit the registers.
const CHAINS: usize = 2;

/// Bytes that a prefetch is ahead at least: what arrives in the time that memory takes to answer.
const PREFETCH_BYTES: usize = 8192;

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// The product of activation rows with a run of panels; see the [module](super) for arguments.
    ///
    /// # Errors
    /// See [`Gemm::check`].
    pub fn gemm(&self, name: &str, gemm: &Gemm) -> Result<FunctionValue<'ctx>, KernelError> {
        use Param::{I64, Ptr};
        gemm.check()?;
        let b = self.kernel(name, &[Ptr, I64, Ptr, I64, I64, Ptr, I64, Ptr], &[5, 7]);
        let (panels, panel_count, activations) = (b.ptr_arg(0), b.int_arg(1), b.ptr_arg(2));
        let (row_start, rows) = (b.int_arg(3), b.int_arg(4));
        let (out, out_stride, scratch) = (b.ptr_arg(5), b.int_arg(6), b.ptr_arg(7));
        let out_bytes = b.mul(out_stride, b.c64(4));
        let row_block = match gemm.activations {
            Activations::Int8(_) => self.target.int8_rows(),
            Activations::F32 { .. } => self.target.f32_rows(),
        };
        let each = |block: &dyn Fn(usize, IntValue<'ctx>, PointerValue<'ctx>, PointerValue<'ctx>)| {
            b.count(panel_count, |p| {
                let panel = b.at(panels, b.mul(p, b.size(gemm.layout.bytes())));
                let out = b.at(out, b.mul(p, b.size(PANEL * 4)));
                row_blocks(&b, rows, row_block, |size, row| {
                    block(size, row, panel, b.at(out, b.mul(row, out_bytes)));
                });
            });
        };
        match gemm.activations {
            Activations::Int8(quant) => {
                let int8 = Int8::new(&b, gemm.layout, quant, activations, row_start, scratch);
                int8.prepare(rows);
                each(&|size, row, panel, out| int8.block(size, row, panel, out, out_bytes));
            }
            Activations::F32 { stride } => {
                let first = b.at(activations, b.mul(row_start, b.size(stride * 4)));
                let float = Float { b: &b, layout: gemm.layout, stride, first };
                each(&|size, row, panel, out| float.block(size, row, panel, out, out_bytes));
            }
        }
        Ok(b.finish())
    }
}

/// Runs `body(size, first row)` over all rows: whole blocks, then halves down to single rows.
fn row_blocks<'ctx>(
    b: &Body<'_, 'ctx>,
    rows: IntValue<'ctx>,
    block: usize,
    body: impl Fn(usize, IntValue<'ctx>),
) {
    let whole = b.floor(rows, block as u64);
    b.repeat((b.c64(0), whole, block as u64), |row| body(block, row));
    let mut size = block / 2;
    let mut row = whole;
    while size > 0 {
        // The bit of `rows` says whether a block of this size remains.
        let end = b.floor(rows, size as u64);
        b.repeat((row, end, size as u64), |row| body(size, row));
        row = end;
        size /= 2;
    }
}

/// The integer kernel.
struct Int8<'k, 'a, 'ctx> {
    b: &'k Body<'a, 'ctx>,
    layout: PanelLayout,
    quant: QuantRows,
    dot: Dot,
    /// What is left to subtract from each code.
    zero: i32,
    codes: PointerValue<'ctx>,
    scales: PointerValue<'ctx>,
    sums: PointerValue<'ctx>,
    /// `[rows][layout.blocks()]`: `-zero * sum` as i32, or `scale * sum` as f32 for a minimum.
    correction: PointerValue<'ctx>,
}

impl<'k, 'a, 'ctx> Int8<'k, 'a, 'ctx> {
    fn new(
        b: &'k Body<'a, 'ctx>,
        layout: PanelLayout,
        quant: QuantRows,
        activations: PointerValue<'ctx>,
        row_start: IntValue<'ctx>,
        scratch: PointerValue<'ctx>,
    ) -> Self {
        let dot = Dot::new(&b.isa, layout.format.code);
        let plane = |offset, row_bytes| b.at(b.off(activations, offset), b.mul(row_start, b.size(row_bytes)));
        Int8 {
            b,
            layout,
            quant,
            dot,
            zero: integer_zero(layout.format.code, layout.format.zero) - dot.zero(),
            codes: plane(0, quant.k_pad()),
            scales: plane(quant.scale_offset(), quant.blocks() * 4),
            sums: plane(quant.sum_offset(), quant.blocks() * 4),
            correction: scratch,
        }
    }

    /// Weight scale blocks in one activation block.
    fn parts(&self) -> usize {
        ACT_BLOCK / self.layout.format.block
    }

    /// Fills the correction plane, so that the loop over panels only broadcasts from it.
    fn prepare(&self, rows: IntValue<'ctx>) {
        let (b, blocks) = (self.b, self.layout.blocks());
        if !self.layout.format.min && self.zero == 0 {
            return;
        }
        let correct = |sum: VectorValue<'ctx>, scale: PointerValue<'ctx>| {
            if self.layout.format.min {
                b.fmul(b.i_to_f(sum), b.load_f(scale))
            } else {
                b.imul(sum, b.ci(-i64::from(self.zero)))
            }
        };
        b.count(rows, |row| {
            let base = b.at(self.correction, b.mul(row, b.size(blocks * 4)));
            let plane = b.mul(row, b.size(self.quant.blocks() * 4));
            let (sums, scales) = (b.at(self.sums, plane), b.at(self.scales, plane));
            if self.parts() > 1 {
                let codes = b.at(self.codes, b.mul(row, b.size(self.quant.k_pad())));
                let columns = self.layout.format.block;
                b.count(b.size(blocks), |block| {
                    let code = b.at(codes, b.mul(block, b.size(columns)));
                    let code = b.sext(b.load_v(b.ints(8, LANES), code, 16), b.i32x());
                    let sum = b.int_sum(code);
                    // Formats with a minimum have blocks of 32, so this is the zero's correction.
                    let sum = b.builder.build_int_mul(
                        sum,
                        b.i32().const_int(-i64::from(self.zero) as u64, true),
                        "",
                    );
                    b.store(sum.expect("equal types"), b.at4(base, block), 4);
                });
                return;
            }
            // Whole vectors, the last one moved back over blocks that are done already.
            let lanes = LANES as usize;
            for first in (0..blocks).step_by(lanes) {
                if blocks >= lanes {
                    let at = first.min(blocks - lanes) * 4;
                    let sum = b.load_v(b.i32x(), b.off(sums, at), 4);
                    b.store(correct(sum, b.off(scales, at)), b.off(base, at), 4);
                    continue;
                }
                for block in first..blocks {
                    let sum = b.load_splat_i32(b.off(sums, block * 4));
                    let value = if self.layout.format.min {
                        b.fmul(b.i_to_f(sum), b.load_splat(b.off(scales, block * 4)))
                    } else {
                        b.imul(sum, b.ci(-i64::from(self.zero)))
                    };
                    b.store(b.lane(value, 0), b.off(base, block * 4), 4);
                }
            }
        });
    }

    /// `size` rows from `row` on with one panel.
    fn block(
        &self,
        size: usize,
        row: IntValue<'ctx>,
        panel: PointerValue<'ctx>,
        out: PointerValue<'ctx>,
        out_bytes: IntValue<'ctx>,
    ) {
        let (b, layout) = (self.b, &self.layout);
        let codes = b.at(self.codes, b.mul(row, b.size(self.quant.k_pad())));
        let scales = b.at(self.scales, b.mul(row, b.size(self.quant.blocks() * 4)));
        let correction = b.at(self.correction, b.mul(row, b.size(layout.blocks() * 4)));
        let weights = b.off(panel, layout.code_offset());
        let zero = vec![b.f32x().const_zero(); size];
        let blocks = (b.c64(0), b.size(self.quant.blocks()), 1);
        let accumulators = b.carry_v(blocks, &zero, |block, accumulators| {
            let mut accumulators = accumulators.to_vec();
            let block_bytes = ACT_BLOCK * PANEL * layout.format.code.bits() / 8;
            let weights = b.at(weights, b.mul(block, b.size(block_bytes)));
            let x = b.at(codes, b.mul(block, b.size(ACT_BLOCK)));
            let scales = b.at4(scales, block);
            self.prefetch_ahead(block, panel);
            for part in 0..self.parts() {
                let index = b.add(b.mul(block, b.size(self.parts())), b.size(part));
                self.part(
                    part,
                    index,
                    panel,
                    weights,
                    x,
                    scales,
                    b.at4(correction, index),
                    &mut accumulators,
                );
            }
            accumulators
        });
        for (i, value) in accumulators.into_iter().enumerate() {
            b.store(value, b.at(out, b.mul(out_bytes, b.size(i))), 4);
        }
    }

    /// Asks for bytes that are wanted a panel later, as many as this activation block's share of a
    /// panel. A panel is read as several short runs, on which the hardware's prefetchers start anew
    /// each time.
    fn prefetch_ahead(&self, block: IntValue<'ctx>, panel: PointerValue<'ctx>) {
        let (b, bytes) = (self.b, self.layout.bytes());
        let lines = (bytes / 64).div_ceil(self.quant.blocks());
        let ahead = b.off(panel, bytes.max(PREFETCH_BYTES));
        let ahead = b.at(ahead, b.mul(block, b.size(lines * 64)));
        for line in 0..lines {
            b.prefetch(b.off(ahead, line * 64));
        }
    }

    /// One weight scale block: `index` of the panel, `part` of the activation block.
    #[allow(clippy::too_many_arguments)]
    fn part(
        &self,
        part: usize,
        index: IntValue<'ctx>,
        panel: PointerValue<'ctx>,
        weights: PointerValue<'ctx>,
        x: PointerValue<'ctx>,
        scales: PointerValue<'ctx>,
        correction: PointerValue<'ctx>,
        accumulators: &mut [VectorValue<'ctx>],
    ) {
        let (b, format) = (self.b, &self.layout.format);
        let row_stride = |r: usize| r * self.layout.blocks() * 4;
        let start = |r: usize| {
            let needed = !format.min && self.zero != 0;
            needed.then(|| b.load_splat_i32(b.off(correction, row_stride(r))))
        };
        let starts: Vec<_> = (0..accumulators.len()).map(start).collect();
        let mut sums: Vec<_> = starts.iter().map(|s| b.dot_start(&self.dot, *s)).collect();
        // A single row is a chain of dependent steps: odd groups get a chain of their own. High
        // nibbles then need no shift either: their sums are 16 times too large, exactly.
        let split = accumulators.len() == 1 && self.dot.wide_sums();
        let in_place = split && format.code == Code::U4;
        let mut odd = Sums::default();
        let groups = format.block / 4;
        for group in part * groups..(part + 1) * groups {
            let codes = b.dot_weights(&self.dot, self.group(weights, group, in_place));
            for (r, sums) in sums.iter_mut().enumerate() {
                let sums = if split && group % 2 == 1 { &mut odd } else { sums };
                b.dot_step(&self.dot, sums, &codes, b.off(x, r * self.quant.k_pad() + group * 4));
            }
        }
        let odd = split.then(|| {
            let sum = b.dot_finish(&self.dot, odd, None);
            if in_place { b.sar(sum, 4) } else { sum }
        });
        let scale_type = format.scale.expect("integer formats have scales");
        let at = b.mul(index, b.size(PANEL * scale_type.bytes()));
        let mut scale = b.load_scale(scale_type, b.at(panel, at));
        if format.code == Code::E2m1 {
            scale = b.fmul(scale, b.cf(0.5));
        }
        let min =
            format.min.then(|| b.load_scale(scale_type, b.off(b.at(panel, at), self.layout.min_offset())));
        for (r, (sums, accumulator)) in sums.into_iter().zip(accumulators).enumerate() {
            let dot = b.dot_finish(&self.dot, sums, starts[r]);
            let dot = b.i_to_f(odd.map_or(dot, |odd| b.iadd(dot, odd)));
            let x_scale = b.load_splat(b.off(scales, r * self.quant.blocks() * 4));
            *accumulator = b.fma(dot, b.fmul(scale, x_scale), *accumulator);
            if let Some(min) = min {
                let sum = b.load_splat(b.off(correction, row_stride(r)));
                *accumulator = b.fma(min, sum, *accumulator);
            }
        }
    }

    /// Codes of four columns as bytes: group `group` of an activation block. High nibbles stay where
    /// they are if `in_place`.
    fn group(&self, weights: PointerValue<'ctx>, group: usize, in_place: bool) -> VectorValue<'ctx> {
        let b = self.b;
        let load = |index| b.load_v(b.i32x(), b.off(weights, index * PANEL * 4), 64);
        if self.layout.format.code == Code::I8 {
            return load(group);
        }
        let both = load(group / 2);
        if in_place && group % 2 == 1 {
            return b.and(both, b.ci(0xf0f0_f0f0));
        }
        let nibbles = b.and(b.shr(both, 4 * (group % 2) as i64), b.ci(0x0f0f_0f0f));
        if self.layout.format.code == Code::E2m1 { e2m1_bytes(b, nibbles) } else { nibbles }
    }
}

/// E2M1 codes (bytes) to twice their value plus 12.
fn e2m1_bytes<'ctx>(b: &Body<'_, 'ctx>, codes: VectorValue<'ctx>) -> VectorValue<'ctx> {
    let table = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
    let look_up = |name, lanes: u32, codes: VectorValue<'ctx>| {
        let table: Vec<i64> = table.iter().cycle().take(lanes as usize).copied().collect();
        let codes = b.cast(codes, b.ints(8, lanes));
        b.vector_intrinsic(name, &[b.const_ints(8, &table), codes])
    };
    if b.isa.avx512 {
        return b.cast(look_up("llvm.x86.avx512.pshuf.b.512", 64, codes), b.i32x());
    }
    let lanes: Vec<i64> = (0..i64::from(LANES)).collect();
    if b.isa.avx2 {
        let half = |range| look_up("llvm.x86.avx2.pshuf.b", 32, b.shuffle(codes, codes, range));
        let words = b.ints(32, LANES / 2);
        return b.shuffle(b.cast(half(&lanes[..8]), words), b.cast(half(&lanes[8..]), words), &lanes);
    }
    (0..4).fold(b.i32x().const_zero(), |bytes, i| {
        let code = b.and(b.shr(codes, 8 * i), b.ci(0xf));
        b.or(bytes, b.shl(b.e2m1_to_int(code), 8 * i))
    })
}

/// The f32 kernel.
struct Float<'k, 'a, 'ctx> {
    b: &'k Body<'a, 'ctx>,
    layout: PanelLayout,
    stride: usize,
    first: PointerValue<'ctx>,
}

impl<'ctx> Float<'_, '_, 'ctx> {
    fn block(
        &self,
        size: usize,
        row: IntValue<'ctx>,
        panel: PointerValue<'ctx>,
        out: PointerValue<'ctx>,
        out_bytes: IntValue<'ctx>,
    ) {
        let (b, k) = (self.b, self.layout.k);
        let x = b.at(self.first, b.mul(row, b.size(self.stride * 4)));
        let zero = vec![b.f32x().const_zero(); size * CHAINS];
        let steps = (b.c64(0), b.size(k / FLOAT_STEP), 1);
        let mut sums = b.carry_v(steps, &zero, |step, sums| {
            let mut sums = sums.to_vec();
            self.step(FLOAT_STEP, step, panel, x, &mut sums);
            sums
        });
        self.step(k % FLOAT_STEP, b.size(k / FLOAT_STEP), panel, x, &mut sums);
        for (i, chains) in sums.chunks(CHAINS).enumerate() {
            b.store(b.fadd(chains[0], chains[1]), b.at(out, b.mul(out_bytes, b.size(i))), 4);
        }
    }

    /// `columns` columns from `step * FLOAT_STEP` on.
    fn step(
        &self,
        columns: usize,
        step: IntValue<'ctx>,
        panel: PointerValue<'ctx>,
        x: PointerValue<'ctx>,
        sums: &mut [VectorValue<'ctx>],
    ) {
        if columns == 0 {
            return;
        }
        let (b, layout) = (self.b, &self.layout);
        let x = b.at(x, b.mul(step, b.size(FLOAT_STEP * 4)));
        let step_bytes = FLOAT_STEP * PANEL * layout.format.code.bits() / 8;
        let codes = b.at(b.off(panel, layout.code_offset()), b.mul(step, b.size(step_bytes)));
        let scales = layout.format.scale.map(|ty| {
            let block = b.div_const(step, layout.format.block / FLOAT_STEP);
            let at = b.at(panel, b.mul(block, b.size(PANEL * ty.bytes())));
            let min = layout.format.min.then(|| b.load_scale(ty, b.off(at, layout.min_offset())));
            (b.load_scale(ty, at), min)
        });
        for column in 0..columns {
            let code = self.column(codes, column);
            let weight = match scales {
                None => code,
                Some((scale, None)) => b.fmul(scale, code),
                Some((scale, Some(min))) => b.fma(scale, code, min),
            };
            for (r, chains) in sums.chunks_mut(CHAINS).enumerate() {
                let x = b.load_splat(b.off(x, (r * self.stride + column) * 4));
                let sum = &mut chains[column % CHAINS];
                *sum = b.fma(weight, x, *sum);
            }
        }
    }

    /// Codes of one column, less the zero, as f32.
    fn column(&self, codes: PointerValue<'ctx>, column: usize) -> VectorValue<'ctx> {
        let (b, format) = (self.b, &self.layout.format);
        // Loads that several columns share are merged by LLVM.
        let word = |index: usize| b.load_v(b.i32x(), b.off(codes, index * PANEL * 4), 64);
        let byte = |shift: usize, mask| {
            b.and(b.shr(word(column / 4), 8 * (column % 4) as i64 + shift as i64), b.ci(mask))
        };
        let nibble = || {
            let shift = 8 * (column % 4) + if column % 8 >= 4 { 4 } else { 0 };
            b.and(b.shr(word(column / 8), shift as i64), b.ci(0xf))
        };
        match format.code {
            Code::F32 => b.load_v(b.f32x(), b.off(codes, column * PANEL * 4), 64),
            Code::F16 | Code::Bf16 => b.load_floats(format.code, b.off(codes, column * PANEL * 2)),
            Code::E4m3 => b.e4m3_to_f32(byte(0, 0xff)),
            Code::I8 => b.integer_code(byte(0, 0xff), format.zero),
            Code::U4 => b.integer_code(nibble(), format.zero),
            Code::E2m1 => b.e2m1_to_f32(nibble()),
        }
    }
}
