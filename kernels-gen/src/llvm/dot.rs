//! Exact dot products of unsigned weight codes with signed activation bytes, four columns a step.
//!
//! Every engine gives the same integers; they differ in the instructions of the target.

use super::body::{Body, LANES};
use crate::Isa;
use inkwell::IntPredicate;
use inkwell::values::{PointerValue, VectorValue};
use tilec_ir::format::Code;

/// The instructions that multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    /// `vpdpbusd` on vectors of this many i32 lanes.
    Vnni { lanes: u32 },
    /// `vpmaddubsw`, sums kept in 16 bits while they fit: codes below 32.
    Small { lanes: u32 },
    /// `vpmaddubsw` of magnitudes: 8-bit codes, taken as signed.
    Signed { lanes: u32 },
    /// Multiplications of i32.
    Plain,
}

/// How dot products of one code are made on one target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dot {
    engine: Engine,
    /// Steps whose sums fit 16 bits.
    fit: usize,
}

/// Partial sums of one row and 16 features.
#[derive(Clone, Default)]
pub(crate) struct Sums<'ctx> {
    words: Vec<VectorValue<'ctx>>,
    halves: Vec<VectorValue<'ctx>>,
    pending: usize,
}

/// Four columns of 16 features, prepared for an engine.
pub(crate) struct Weights<'ctx> {
    parts: Vec<VectorValue<'ctx>>,
    /// Of signed codes: the codes themselves, whose signs the activations take.
    signs: Vec<VectorValue<'ctx>>,
}

impl Dot {
    pub(crate) fn new(isa: &Isa, code: Code) -> Dot {
        let lanes = if isa.avx512 { 16 } else { 8 };
        let engine = match code {
            _ if isa.vnni512 => Engine::Vnni { lanes: 16 },
            _ if isa.vnni256 => Engine::Vnni { lanes: 8 },
            Code::I8 if isa.avx2 => Engine::Signed { lanes },
            _ if isa.avx2 => Engine::Small { lanes },
            _ => Engine::Plain,
        };
        // Two products of 127 with at most 15 (U4) or 24 (E2M1) a step.
        Dot { engine, fit: if code == Code::U4 { 8 } else { 4 } }
    }

    /// Whether any byte codes may be summed, in 32 bits throughout.
    pub(crate) fn wide_sums(&self) -> bool {
        matches!(self.engine, Engine::Vnni { .. })
    }

    /// What the engine subtracts from each code by itself.
    pub(crate) fn zero(&self) -> i32 {
        if matches!(self.engine, Engine::Signed { .. }) { 128 } else { 0 }
    }
}

impl<'ctx> Body<'_, 'ctx> {
    fn split(&self, v: VectorValue<'ctx>, lanes: u32) -> Vec<VectorValue<'ctx>> {
        if lanes == LANES {
            return vec![v];
        }
        (0..i64::from(LANES))
            .step_by(lanes as usize)
            .map(|first| self.shuffle(v, v, &(first..first + i64::from(lanes)).collect::<Vec<_>>()))
            .collect()
    }

    /// Prepares 16 x 4 codes, a byte each.
    pub(crate) fn dot_weights(&self, dot: &Dot, codes: VectorValue<'ctx>) -> Weights<'ctx> {
        match dot.engine {
            Engine::Vnni { lanes } => Weights { parts: self.split(codes, lanes), signs: Vec::new() },
            Engine::Small { lanes } => {
                let bytes = self.ints(8, lanes * 4);
                let parts = self.split(codes, lanes).into_iter().map(|v| self.cast(v, bytes)).collect();
                Weights { parts, signs: Vec::new() }
            }
            Engine::Signed { lanes } => {
                let bytes = self.ints(8, lanes * 4);
                let flip = self.const_ints(8, &vec![-128; lanes as usize * 4]);
                let signs: Vec<_> = self
                    .split(codes, lanes)
                    .into_iter()
                    .map(|v| self.builder.build_xor(self.cast(v, bytes), flip, "").expect("equal types"))
                    .collect();
                let no = self.context.bool_type().const_zero();
                let abs = |v: &VectorValue<'ctx>| {
                    let args = [(*v).into(), no.into()];
                    self.intrinsic("llvm.abs", &[bytes.into()], &args).expect("a value").into_vector_value()
                };
                Weights { parts: signs.iter().map(abs).collect(), signs }
            }
            Engine::Plain => Weights { parts: vec![codes], signs: Vec::new() },
        }
    }

    /// Adds the products with the four activations at `x`.
    pub(crate) fn dot_step(
        &self,
        dot: &Dot,
        sums: &mut Sums<'ctx>,
        weights: &Weights<'ctx>,
        x: PointerValue<'ctx>,
    ) {
        let four = |lanes| self.splat_n(self.load(self.i32(), x, 4), lanes);
        match dot.engine {
            Engine::Vnni { lanes } => {
                let x = four(lanes);
                if sums.words.is_empty() {
                    sums.words = vec![self.ints(32, lanes).const_zero(); weights.parts.len()];
                }
                let name = format!("llvm.x86.avx512.vpdpbusd.{}", lanes * 32);
                for (sum, part) in sums.words.iter_mut().zip(&weights.parts) {
                    *sum = self.vector_intrinsic(&name, &[*sum, *part, x]);
                }
            }
            Engine::Small { lanes } => {
                let x = self.cast(four(lanes), self.ints(8, lanes * 4));
                for (i, part) in weights.parts.iter().enumerate() {
                    let pairs = self.byte_pairs(lanes, *part, x);
                    match sums.halves.get_mut(i) {
                        Some(sum) => *sum = self.iadd(*sum, pairs),
                        None => sums.halves.push(pairs),
                    }
                }
                sums.pending += 1;
                if sums.pending == dot.fit {
                    self.widen(lanes, sums);
                }
            }
            Engine::Signed { lanes } => {
                let x = self.cast(four(lanes), self.ints(8, lanes * 4));
                for (part, sign) in weights.parts.iter().zip(&weights.signs) {
                    let x = self.with_sign(lanes, x, *sign);
                    sums.halves.push(self.byte_pairs(lanes, *part, x));
                }
                self.widen(lanes, sums);
            }
            Engine::Plain => {
                for column in 0..4 {
                    let byte = self.load(self.context.i8_type(), self.off(x, column), 1).into_int_value();
                    let x = self.builder.build_int_s_extend(byte, self.i32(), "").expect("a wider type");
                    let codes = self.and(self.shr(weights.parts[0], 8 * column as i64), self.ci(0xff));
                    let product = self.imul(codes, self.splat(x));
                    match sums.words.first_mut() {
                        Some(sum) => *sum = self.iadd(*sum, product),
                        None => sums.words.push(product),
                    }
                }
            }
        }
    }

    /// Sums of two products of unsigned and signed bytes, in 16 bits.
    fn byte_pairs(&self, lanes: u32, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let wide = lanes == LANES;
        let name = if wide { "llvm.x86.avx512.pmaddubs.w.512" } else { "llvm.x86.avx2.pmadd.ub.sw" };
        self.vector_intrinsic(name, &[a, b])
    }

    /// Moves the 16-bit sums into the 32-bit ones.
    fn widen(&self, lanes: u32, sums: &mut Sums<'ctx>) {
        let wide = lanes == LANES;
        let name = if wide { "llvm.x86.avx512.pmaddw.d.512" } else { "llvm.x86.avx2.pmadd.wd" };
        let ones = self.const_ints(16, &vec![1; lanes as usize * 2]);
        for (i, halves) in std::mem::take(&mut sums.halves).into_iter().enumerate() {
            let words = self.vector_intrinsic(name, &[halves, ones]);
            match sums.words.get_mut(i) {
                Some(sum) => *sum = self.iadd(*sum, words),
                None => sums.words.push(words),
            }
        }
        sums.pending = 0;
    }

    /// `x`, negated where `sign` is negative; where `sign` is 0 the product is 0 anyway.
    fn with_sign(&self, lanes: u32, x: VectorValue<'ctx>, sign: VectorValue<'ctx>) -> VectorValue<'ctx> {
        if lanes != LANES {
            return self.vector_intrinsic("llvm.x86.avx2.psign.b", &[x, sign]);
        }
        let zero = sign.get_type().const_zero();
        let negative = self.icmp(IntPredicate::SLT, sign, zero);
        self.select(negative, self.isub(zero, x), x)
    }

    /// The finished sums as 16 lanes of i32, plus `start`.
    pub(crate) fn dot_finish(
        &self,
        dot: &Dot,
        mut sums: Sums<'ctx>,
        start: Option<VectorValue<'ctx>>,
    ) -> VectorValue<'ctx> {
        if let Engine::Small { lanes } = dot.engine
            && sums.pending > 0
        {
            self.widen(lanes, &mut sums);
        }
        let all = match sums.words[..] {
            [low, high] => self.shuffle(low, high, &(0..i64::from(LANES)).collect::<Vec<_>>()),
            _ => sums.words[0],
        };
        match start {
            Some(start) if !matches!(dot.engine, Engine::Vnni { lanes: LANES }) => self.iadd(all, start),
            _ => all,
        }
    }

    /// Sums that start at `start` where that costs nothing; pass it to [`Body::dot_finish`] too.
    pub(crate) fn dot_start(&self, dot: &Dot, start: Option<VectorValue<'ctx>>) -> Sums<'ctx> {
        match start {
            Some(start) if matches!(dot.engine, Engine::Vnni { lanes: LANES }) => {
                Sums { words: vec![start], ..Sums::default() }
            }
            _ => Sums::default(),
        }
    }
}
