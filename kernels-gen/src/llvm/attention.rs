//! Attention over the paged cache: online softmax in chunks of positions.
//!
//! A *query* is one head of one row. A block of queries (the heads of a KV head, and neighbouring
//! rows of the same sequence) shares every load of K and V. What a query computes does not depend
//! on its block: lanes are absolute positions modulo 16, chunks start at absolute multiples, and a
//! position that a query does not see changes nothing (its score is -inf, its probability an exact
//! zero).

use super::Kernels;
use super::body::{Body, LANES, Param};
use crate::KernelError;
use crate::attention::{Attention, CHUNK, MAX_QUERIES};
use inkwell::values::{FunctionValue, IntValue, PointerValue, VectorValue};
use inkwell::{FloatPredicate, IntPredicate};
use tilec_ir::abi::KV_GROUP;

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// Attention of rows on one KV head; see the [module](super) for arguments.
    ///
    /// # Errors
    /// See [`Attention::check`].
    pub fn attention(&self, name: &str, attention: &Attention) -> Result<FunctionValue<'ctx>, KernelError> {
        use Param::{I64, Ptr};
        attention.check()?;
        let params = [Ptr, I64, Ptr, Ptr, Ptr, I64, Ptr, I64, I64, I64, Ptr, Ptr, I64, Ptr, Ptr];
        let b = self.kernel(name, &params, &[11, 13]);
        let (row_start, row_end) = (b.int_arg(8), b.int_arg(9));
        let (heads, rows) = attention.blocking(self.target);
        let spec = *attention;
        // Pairs of groups lie in one page only if pages are whole pairs.
        let pair = b.isa.avx512 && spec.layout.page_tokens.is_multiple_of(2 * KV_GROUP);
        let scratch = Scratch::new(&spec);
        let emit = Emit { b: &b, spec, scratch, heads, groups: if pair { 2 } else { 1 } };
        if rows == 1 {
            b.repeat((row_start, row_end, 1), |row| emit.block(1, row));
            return Ok(b.finish());
        }
        b.walk(row_start, row_end, |row| {
            let sequences = b.ptr_arg(3);
            let last = b.add(row, b.size(rows - 1));
            let inside = b.cmp(IntPredicate::ULT, last, row_end);
            let last = b.pick(inside, last, row);
            let sequence = |row| b.load_u32(b.at4(sequences, row));
            let same = b.cmp(IntPredicate::EQ, sequence(row), sequence(last));
            let whole = b.both(inside, same);
            b.when(whole, || emit.block(rows, row));
            b.when(b.cmp(IntPredicate::EQ, whole, b.context.bool_type().const_zero()), || emit.block(1, row));
            b.add(row, b.pick(whole, b.size(rows), b.c64(1)))
        });
        Ok(b.finish())
    }
}

/// Where things lie in the scratch, in bytes. Planes are `[query][..]`.
#[derive(Clone, Copy)]
struct Scratch {
    query_stride: usize,
    output_stride: usize,
    scores: usize,
    queries: usize,
    outputs: usize,
    largest: usize,
    totals: usize,
}

impl Scratch {
    fn new(spec: &Attention) -> Scratch {
        let query_stride = spec.layout.qk_dim.next_multiple_of(LANES as usize) * 4;
        let output_stride = spec.layout.v_pad() * 4;
        let queries = MAX_QUERIES * CHUNK * 4;
        let outputs = queries + MAX_QUERIES * query_stride;
        let largest = outputs + MAX_QUERIES * output_stride;
        let totals = largest + MAX_QUERIES * 64;
        debug_assert_eq!(totals + MAX_QUERIES * 64, spec.scratch_bytes());
        Scratch { query_stride, output_stride, scores: 0, queries, outputs, largest, totals }
    }
}

struct Emit<'k, 'a, 'ctx> {
    b: &'k Body<'a, 'ctx>,
    spec: Attention,
    scratch: Scratch,
    /// Query heads of a block.
    heads: usize,
    /// Groups of positions whose scores are made together.
    groups: usize,
}

/// What a block of queries works on.
struct Block<'ctx> {
    queries: usize,
    /// Position of each row, as i64.
    positions: Vec<IntValue<'ctx>>,
    /// Position of the last row that the last row sees, as i64.
    end: IntValue<'ctx>,
    /// The sequence's row of the page table.
    table: PointerValue<'ctx>,
    base: PointerValue<'ctx>,
}

impl<'ctx> Emit<'_, '_, 'ctx> {
    fn at(&self, block: &Block<'ctx>, plane: usize, query: usize, stride: usize) -> PointerValue<'ctx> {
        self.b.off(block.base, plane + query * stride)
    }

    fn scores(&self, block: &Block<'ctx>, query: usize) -> PointerValue<'ctx> {
        self.at(block, self.scratch.scores, query, CHUNK * 4)
    }

    /// All heads of the group for `rows` rows of one sequence.
    fn block(&self, rows: usize, row: IntValue<'ctx>) {
        let (b, spec) = (self.b, &self.spec);
        let positions: Vec<_> =
            (0..rows).map(|r| b.load_u32(b.at4(b.ptr_arg(2), b.add(row, b.size(r))))).collect();
        let last = positions[rows - 1];
        let end = match (spec.bidirectional, spec.window) {
            (false, _) => last,
            (true, None) => b.load_u32(b.at4(b.ptr_arg(14), row)),
            (true, Some(window)) => b.umin(
                b.load_u32(b.at4(b.ptr_arg(14), row)),
                b.add(last, b.size((window - 1).min(i32::MAX as usize))),
            ),
        };
        let sequence = b.load_u32(b.at4(b.ptr_arg(3), row));
        let table = b.at4(b.ptr_arg(4), b.mul(sequence, b.int_arg(5)));
        let block = Block { queries: rows * self.heads, positions, end, table, base: b.ptr_arg(13) };
        b.count(b.size(spec.group / self.heads), |part| {
            let first = b.add(b.mul(b.int_arg(7), b.size(spec.group)), b.mul(part, b.size(self.heads)));
            self.begin(&block, row, first);
            self.chunks(&block);
            self.finish(&block, row, first);
        });
    }

    /// Row, and head from the first, of a query.
    fn place(&self, query: usize) -> (usize, usize) {
        (query / self.heads, query % self.heads)
    }

    /// Copies the queries, scaled, and sets the running state.
    fn begin(&self, block: &Block<'ctx>, row: IntValue<'ctx>, first_head: IntValue<'ctx>) {
        let (b, spec, scratch) = (self.b, &self.spec, &self.scratch);
        let zero = b.f32x().const_zero();
        for query in 0..block.queries {
            let (r, h) = self.place(query);
            let head = b.add(first_head, b.size(h));
            let from = b.at4(b.ptr_arg(0), b.mul(b.add(row, b.size(r)), b.int_arg(1)));
            let from = b.at4(from, b.mul(head, b.size(spec.layout.qk_dim)));
            let to = self.at(block, scratch.queries, query, scratch.query_stride);
            b.columns(b.size(spec.layout.qk_dim), |c, mask| {
                let q = b.fmul(b.load_masked(b.at4(from, c), mask), b.cf(spec.scale));
                b.store(q, b.at4(to, c), 64);
            });
            let (largest, total) = if spec.sinks {
                // The sink is a score seen before all others: it adds e^(sink - largest).
                let one = b.const_floats(&std::array::from_fn(|i| if i == 0 { 1.0 } else { 0.0 }));
                (b.load_splat(b.at4(b.ptr_arg(10), head)), one)
            } else {
                (b.cf(f32::NEG_INFINITY), zero)
            };
            b.store(largest, self.at(block, scratch.largest, query, 64), 64);
            b.store(total, self.at(block, scratch.totals, query, 64), 64);
            let outputs = self.at(block, scratch.outputs, query, scratch.output_stride);
            b.columns(b.size(spec.layout.v_pad()), |c, _| b.store(zero, b.at4(outputs, c), 64));
        }
    }

    /// All chunks that a row of the block sees.
    fn chunks(&self, block: &Block<'ctx>) {
        let b = self.b;
        let span = (self.groups * KV_GROUP) as u64;
        let first = match self.spec.window {
            None => b.c64(0),
            Some(window) => {
                let end = b.add(block.positions[0], b.c64(1));
                let before = b.cmp(IntPredicate::ULT, end, b.size(window));
                b.pick(before, b.c64(0), b.sub(end, b.size(window)))
            }
        };
        let (from, to) = (b.floor(first, span), b.add(b.floor(block.end, span), b.c64(span)));
        b.repeat((b.floor(first, CHUNK as u64), to, CHUNK as u64), |chunk| {
            let start = b.pick(b.cmp(IntPredicate::ULT, chunk, from), from, chunk);
            let end = b.umin(to, b.add(chunk, b.size(CHUNK)));
            self.score_chunk(block, chunk, start, end);
            let shrink: Vec<_> = (0..block.queries)
                .map(|query| self.softmax(block, query, b.sub(start, chunk), b.sub(end, chunk)))
                .collect();
            self.accumulate(block, chunk, start, end, &shrink);
        });
    }

    /// Scores of positions `start..end`.
    fn score_chunk(
        &self,
        block: &Block<'ctx>,
        chunk: IntValue<'ctx>,
        start: IntValue<'ctx>,
        end: IntValue<'ctx>,
    ) {
        let (b, layout) = (self.b, &self.spec.layout);
        let dim_bytes = KV_GROUP * layout.kv_type.bytes();
        let group_bytes = layout.qk_dim * dim_bytes;
        let unroll = [4, 2, 1].into_iter().find(|n| layout.qk_dim.is_multiple_of(*n)).unwrap_or(1);
        b.repeat((start, end, (self.groups * KV_GROUP) as u64), |position| {
            let kv = b.kv_block(layout, b.ptr_arg(6), block.table, position, b.int_arg(7));
            let group = b.div_const(b.rem_const(position, layout.page_tokens), KV_GROUP);
            let keys = b.at(kv, b.mul(group, b.size(group_bytes)));
            let zero = vec![b.f32x().const_zero(); block.queries * self.groups];
            let dims = (b.c64(0), b.size(layout.qk_dim), unroll as u64);
            let scores = b.carry_v(dims, &zero, |dim, scores| {
                let mut scores = scores.to_vec();
                for d in 0..unroll {
                    let keys = b.at(b.off(keys, d * dim_bytes), b.mul(dim, b.size(dim_bytes)));
                    let keys: Vec<_> = (0..self.groups)
                        .map(|g| b.load_kv(layout.kv_type, b.off(keys, g * group_bytes)))
                        .collect();
                    for query in 0..block.queries {
                        let q = self.at(block, self.scratch.queries, query, self.scratch.query_stride);
                        let q = b.load_splat(b.at4(b.off(q, d * 4), dim));
                        for (g, keys) in keys.iter().enumerate() {
                            let score = &mut scores[query * self.groups + g];
                            *score = b.fma(*keys, q, *score);
                        }
                    }
                }
                scores
            });
            for (i, score) in scores.into_iter().enumerate() {
                let (query, g) = (i / self.groups, i % self.groups);
                let first = b.add(position, b.size(g * KV_GROUP));
                let score = self.mask(block, self.place(query).0, first, self.cap(score));
                let at = b.add(b.sub(position, chunk), b.size(g * KV_GROUP));
                b.store(score, b.at4(self.scores(block, query), at), 64);
            }
        });
    }

    fn cap(&self, score: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let b = self.b;
        self.spec.softcap.map_or(score, |cap| b.fmul(b.tanh(b.fdiv(score, b.cf(cap))), b.cf(cap)))
    }

    /// -inf for positions (from `first` on) that the row does not see.
    fn mask(
        &self,
        block: &Block<'ctx>,
        row: usize,
        first: IntValue<'ctx>,
        score: VectorValue<'ctx>,
    ) -> VectorValue<'ctx> {
        let b = self.b;
        // Distances are small and signed: position of the row less that of the lane.
        let distance = b.to_i32(b.sub(block.positions[row], first));
        let distance = b.isub(b.splat(distance), b.iota());
        let hidden = b.cf(f32::NEG_INFINITY);
        let window = |window: usize| i64::try_from(window).unwrap_or(i64::MAX).min(i64::from(i32::MAX));
        let score = if self.spec.bidirectional {
            // Rows of a block are of one sequence, so all of them end where its last row sees to.
            let behind = b.to_i32(b.sub(block.end, first));
            let behind = b.isub(b.splat(behind), b.iota());
            let score = b.select(b.icmp(IntPredicate::SGE, behind, b.ci(0)), score, hidden);
            match self.spec.window {
                None => score,
                Some(size) => {
                    b.select(b.icmp(IntPredicate::SGT, distance, b.ci(-window(size))), score, hidden)
                }
            }
        } else {
            b.select(b.icmp(IntPredicate::SGE, distance, b.ci(0)), score, hidden)
        };
        match self.spec.window {
            None => score,
            Some(size) => b.select(b.icmp(IntPredicate::SLT, distance, b.ci(window(size))), score, hidden),
        }
    }

    /// Scores `start..end` of the chunk to probabilities; returns what earlier sums shrink by.
    fn softmax(
        &self,
        block: &Block<'ctx>,
        query: usize,
        start: IntValue<'ctx>,
        end: IntValue<'ctx>,
    ) -> VectorValue<'ctx> {
        let (b, scratch) = (self.b, &self.scratch);
        let (largest_at, total_at) =
            (self.at(block, scratch.largest, query, 64), self.at(block, scratch.totals, query, 64));
        let scores = self.scores(block, query);
        let range = (start, end, u64::from(LANES));
        let lowest = b.cf(f32::NEG_INFINITY);
        let vector = |i| b.load_v(b.f32x(), b.at4(scores, i), 64);
        let largest = b.carry_v(range, &[lowest], |i, largest| vec![b.fmax(largest[0], vector(i))]);
        let before = b.load_v(b.f32x(), largest_at, 64);
        let largest = b.fmax(before, b.largest(largest[0]));
        b.store(largest, largest_at, 64);
        // Before a row sees anything: e^(-inf - 0) is the zero wanted, e^(-inf + inf) would be NaN.
        let nothing = b.fcmp(FloatPredicate::OEQ, largest, lowest);
        let largest = b.select(nothing, b.cf(0.0), largest);
        let shrink = b.exp(b.fsub(before, largest));
        let total = b.fmul(b.load_v(b.f32x(), total_at, 64), shrink);
        let total = b.carry_v(range, &[total], |i, total| {
            let p = b.exp(b.fsub(vector(i), largest));
            b.store(p, b.at4(scores, i), 64);
            vec![b.fadd(total[0], p)]
        });
        b.store(total[0], total_at, 64);
        shrink
    }

    /// Adds the probabilities' shares of V, positions ascending.
    fn accumulate(
        &self,
        block: &Block<'ctx>,
        chunk: IntValue<'ctx>,
        start: IntValue<'ctx>,
        end: IntValue<'ctx>,
        shrink: &[VectorValue<'ctx>],
    ) {
        let (b, layout, scratch) = (self.b, &self.spec.layout, &self.scratch);
        let bytes = layout.kv_type.bytes();
        let vectors = layout.v_pad() / LANES as usize;
        let registers = if b.isa.avx512 { 24 } else { 4 };
        let slab = (registers / block.queries).clamp(1, 4);
        for first in (0..vectors).step_by(slab) {
            let width = slab.min(vectors - first);
            let at = |query, v| {
                let row = self.at(block, scratch.outputs, query, scratch.output_stride);
                b.off(row, (first + v) * 64)
            };
            let places: Vec<_> = (0..block.queries).flat_map(|q| (0..width).map(move |v| (q, v))).collect();
            let initial: Vec<_> =
                places.iter().map(|(q, v)| b.fmul(b.load_v(b.f32x(), at(*q, *v), 64), shrink[*q])).collect();
            let sums = b.carry_v((start, end, KV_GROUP as u64), &initial, |position, sums| {
                let kv = b.kv_block(layout, b.ptr_arg(6), block.table, position, b.int_arg(7));
                let inside = b.rem_const(position, layout.page_tokens);
                let values = b.off(kv, layout.v_offset() + first * KV_GROUP * bytes);
                let values = b.at(values, b.mul(inside, b.size(layout.v_pad() * bytes)));
                let first_score = b.sub(position, chunk);
                b.carry_v((b.c64(0), b.size(KV_GROUP), 2), sums, |i, sums| {
                    let mut sums = sums.to_vec();
                    for step in 0..2 {
                        let i = b.add(i, b.c64(step));
                        let row = b.at(values, b.mul(i, b.size(layout.v_pad() * bytes)));
                        let row: Vec<_> = (0..width)
                            .map(|v| b.load_kv(layout.kv_type, b.off(row, v * KV_GROUP * bytes)))
                            .collect();
                        for query in 0..block.queries {
                            let p = b.load_splat(b.at4(self.scores(block, query), b.add(first_score, i)));
                            for (v, value) in row.iter().enumerate() {
                                let sum = &mut sums[query * width + v];
                                *sum = b.fma(*value, p, *sum);
                            }
                        }
                    }
                    sums
                })
            });
            for (sum, (q, v)) in sums.into_iter().zip(&places) {
                b.store(sum, at(*q, *v), 64);
            }
        }
    }

    /// Divides by the sums and writes the heads' outputs.
    fn finish(&self, block: &Block<'ctx>, row: IntValue<'ctx>, first_head: IntValue<'ctx>) {
        let (b, spec, scratch) = (self.b, &self.spec, &self.scratch);
        for query in 0..block.queries {
            let (r, h) = self.place(query);
            let total = b.load_v(b.f32x(), self.at(block, scratch.totals, query, 64), 64);
            let factor = b.fdiv(b.cf(1.0), b.sum(total));
            let from = self.at(block, scratch.outputs, query, scratch.output_stride);
            let to = b.at4(b.ptr_arg(11), b.mul(b.add(row, b.size(r)), b.int_arg(12)));
            let head = b.add(first_head, b.size(h));
            let to = b.at4(to, b.mul(head, b.size(spec.layout.v_dim)));
            b.columns(b.size(spec.layout.v_dim), |c, mask| {
                let value = b.fmul(b.load_v(b.f32x(), b.at4(from, c), 64), factor);
                // A sum may be -0, which further zero shares turn into +0: make it +0 in any case.
                b.store_masked(b.fadd(value, b.cf(0.0)), b.at4(to, c), mask);
            });
        }
    }
}
