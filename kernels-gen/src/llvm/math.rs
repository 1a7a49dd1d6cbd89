//! Number formats and functions, in plain arithmetic: no library calls.

use super::body::{Body, LANES};
use inkwell::FloatPredicate;
use inkwell::IntPredicate;
use inkwell::values::{PointerValue, VectorValue};
use tilec_ir::abi::KvType;
use tilec_ir::format::{Code, ScaleType};

const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

impl<'ctx> Body<'_, 'ctx> {
    /// f16 (16 lanes of i16) to f32.
    pub(crate) fn f16_to_f32(&self, half: VectorValue<'ctx>) -> VectorValue<'ctx> {
        if self.isa.f16c {
            let half = self.cast(half, self.context.f16_type().vec_type(LANES));
            return self.builder.build_float_ext(half, self.f32x(), "").expect("f16 is narrower than f32");
        }
        let raw = self.zext(half, self.i32x());
        let rest = self.and(raw, self.ci(0x7fff));
        let sign = self.shl(self.and(raw, self.ci(0x8000)), 16);
        // The exponent is off by 112; multiplying sets it right, for subnormals as well.
        let shifted = self.shl(rest, 13);
        let value = self.as_int(self.fmul(self.as_float(shifted), self.cf(2f32.powi(112))));
        let special = self.or(shifted, self.ci(0x7f80_0000));
        let quiet = self.or(special, self.ci(0x0040_0000));
        let special = self.select(self.icmp(IntPredicate::UGT, rest, self.ci(0x7c00)), quiet, special);
        let value = self.select(self.icmp(IntPredicate::UGE, rest, self.ci(0x7c00)), special, value);
        self.as_float(self.or(value, sign))
    }

    /// f32 to f16 (16 lanes of i16), to nearest even.
    pub(crate) fn f32_to_f16(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let i16x = self.ints(16, LANES);
        if self.isa.f16c {
            let ty = self.context.f16_type().vec_type(LANES);
            let half = self.builder.build_float_trunc(v, ty, "").expect("f16 is narrower than f32");
            return self.cast(half, i16x);
        }
        let raw = self.as_int(v);
        let sign = self.and(self.shr(raw, 16), self.ci(0x8000));
        let abs = self.and(raw, self.ci(0x7fff_ffff));
        let odd = self.and(self.shr(abs, 13), self.ci(1));
        let rounded = self.shr(self.iadd(abs, self.iadd(odd, self.ci(0xfff))), 13);
        let normal = self.isub(rounded, self.ci(112 << 10));
        // Adding 0.5 rounds at the place of f16's smallest subnormal.
        let half = self.ci(0x3f00_0000);
        let small = self.isub(self.as_int(self.fadd(self.as_float(abs), self.cf(0.5))), half);
        let value = self.select(self.icmp(IntPredicate::ULT, abs, self.ci(0x3880_0000)), small, normal);
        let value =
            self.select(self.icmp(IntPredicate::UGE, abs, self.ci(0x477f_f000)), self.ci(0x7c00), value);
        let payload = self.and(self.shr(abs, 13), self.ci(0x3ff));
        let nan = self.or(payload, self.ci(0x7e00));
        let value = self.select(self.icmp(IntPredicate::UGT, abs, self.ci(0x7f80_0000)), nan, value);
        self.trunc(self.or(value, sign), i16x)
    }

    /// bf16 (16 lanes of i16) to f32.
    pub(crate) fn bf16_to_f32(&self, half: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.as_float(self.shl(self.zext(half, self.i32x()), 16))
    }

    /// f32 to bf16 (16 lanes of i16), to nearest even.
    pub(crate) fn f32_to_bf16(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let raw = self.as_int(v);
        let odd = self.and(self.shr(raw, 16), self.ci(1));
        let rounded = self.shr(self.iadd(raw, self.iadd(odd, self.ci(0x7fff))), 16);
        let nan = self.or(self.shr(raw, 16), self.ci(0x40));
        let is_nan = self.icmp(IntPredicate::UGT, self.and(raw, self.ci(0x7fff_ffff)), self.ci(0x7f80_0000));
        self.trunc(self.select(is_nan, nan, rounded), self.ints(16, LANES))
    }

    /// E4M3 codes in the low byte of i32 lanes to f32.
    pub(crate) fn e4m3_to_f32(&self, code: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let rest = self.and(code, self.ci(0x7f));
        let sign = self.shl(self.and(code, self.ci(0x80)), 24);
        // As for f16: exponent bias 7 against 127.
        let value = self.as_int(self.fmul(self.as_float(self.shl(rest, 20)), self.cf(2f32.powi(120))));
        let nan = self.icmp(IntPredicate::EQ, rest, self.ci(0x7f));
        self.as_float(self.or(self.select(nan, self.ci(0x7fc0_0000), value), sign))
    }

    /// E8M0 codes in i32 lanes to f32.
    pub(crate) fn e8m0_to_f32(&self, code: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let value = self.shl(code, 23);
        let value = self.select(self.icmp(IntPredicate::EQ, code, self.ci(0)), self.ci(0x0040_0000), value);
        let nan = self.icmp(IntPredicate::EQ, code, self.ci(0xff));
        self.as_float(self.select(nan, self.ci(0x7fc0_0000), value))
    }

    /// E2M1 codes in i32 lanes (0..16) to twice their value plus 12, in 0..=24.
    pub(crate) fn e2m1_to_int(&self, code: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let rest = self.and(code, self.ci(7));
        let twice = [(5, 6), (6, 8), (7, 12)].iter().fold(rest, |value, (code, twice)| {
            self.select(self.icmp(IntPredicate::EQ, rest, self.ci(*code)), self.ci(*twice), value)
        });
        let negative = self.icmp(IntPredicate::UGE, code, self.ci(8));
        let zero = self.ci(12);
        self.select(negative, self.isub(zero, twice), self.iadd(zero, twice))
    }

    /// E2M1 codes in i32 lanes (0..16) to f32.
    pub(crate) fn e2m1_to_f32(&self, code: VectorValue<'ctx>) -> VectorValue<'ctx> {
        if self.isa.avx512 {
            let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
            let table: Vec<i64> = values
                .iter()
                .map(|v: &f32| i64::from(v.to_bits()))
                // The minus zero of code 8 is as good as zero, and the integer path has none.
                .chain(values.iter().map(|v| if *v == 0.0 { 0 } else { i64::from((-v).to_bits()) }))
                .collect();
            let table = self.as_float(self.const_ints(32, &table));
            return self.vector_intrinsic("llvm.x86.avx512.permvar.sf.512", &[table, code]);
        }
        let twice = self.isub(self.e2m1_to_int(code), self.ci(12));
        self.fmul(self.i_to_f(twice), self.cf(0.5))
    }

    /// Loads a vector of scales or minima as f32.
    pub(crate) fn load_scale(&self, ty: ScaleType, from: PointerValue<'ctx>) -> VectorValue<'ctx> {
        match ty {
            ScaleType::F32 => self.load_v(self.f32x(), from, 64),
            ScaleType::F16 => self.f16_to_f32(self.load_v(self.ints(16, LANES), from, 32)),
            ScaleType::E8m0 | ScaleType::E4m3 => {
                let code = self.zext(self.load_v(self.ints(8, LANES), from, 16), self.i32x());
                if ty == ScaleType::E8m0 { self.e8m0_to_f32(code) } else { self.e4m3_to_f32(code) }
            }
        }
    }

    /// Loads one scale or minimum as f32 into every lane.
    pub(crate) fn load_scale_splat(&self, ty: ScaleType, from: PointerValue<'ctx>) -> VectorValue<'ctx> {
        match ty {
            ScaleType::F32 => self.load_splat(from),
            ScaleType::F16 => self.f16_to_f32(self.splat(self.load(self.context.i16_type(), from, 2))),
            ScaleType::E8m0 | ScaleType::E4m3 => {
                let code = self.splat(self.load(self.context.i8_type(), from, 1));
                let code = self.zext(code, self.i32x());
                if ty == ScaleType::E8m0 { self.e8m0_to_f32(code) } else { self.e4m3_to_f32(code) }
            }
        }
    }

    /// Like [`Body::load_floats`]; under a mask only the first `valid` elements are read.
    pub(crate) fn load_floats_masked(
        &self,
        code: Code,
        from: PointerValue<'ctx>,
        valid: usize,
        mask: Option<VectorValue<'ctx>>,
    ) -> VectorValue<'ctx> {
        if mask.is_none() || code == Code::F32 {
            return mask.map_or_else(|| self.load_floats(code, from), |_| self.load_masked(from, mask));
        }
        let mut half = self.ints(16, LANES).const_zero();
        for i in 0..valid {
            let element = self.load(self.context.i16_type(), self.off(from, 2 * i), 2);
            let at = self.c64(i as u64);
            half = self.builder.build_insert_element(half, element, at, "").expect("its element type");
        }
        if code == Code::F16 { self.f16_to_f32(half) } else { self.bf16_to_f32(half) }
    }

    /// Loads 16 adjacent floats of 16 or 32 bits as f32, aligned to their own size.
    pub(crate) fn load_floats(&self, code: Code, from: PointerValue<'ctx>) -> VectorValue<'ctx> {
        match code {
            Code::F16 => self.f16_to_f32(self.load_v(self.ints(16, LANES), from, 2)),
            Code::Bf16 => self.bf16_to_f32(self.load_v(self.ints(16, LANES), from, 2)),
            _ => self.load_f(from),
        }
    }

    /// Rounds 16 floats to the cache's type: a vector of f32 or of i16.
    pub(crate) fn to_kv(&self, ty: KvType, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        match ty {
            KvType::F32 => v,
            KvType::F16 => self.f32_to_f16(v),
            KvType::Bf16 => self.f32_to_bf16(v),
        }
    }

    /// The nearest integers (ties to even) of values within +-2^22, as i32.
    pub(crate) fn round(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let bits = self.as_int(self.fadd(v, self.cf(MAGIC)));
        self.isub(bits, self.ci(i64::from(MAGIC.to_bits())))
    }

    /// `e^x` within 2 ulp for results of at least 2^-125; below that 0. NaN stays NaN, and
    /// `e^0` is exactly 1.
    pub(crate) fn exp(&self, x: VectorValue<'ctx>) -> VectorValue<'ctx> {
        // x = n ln2 + r with |r| <= ln2 / 2; ln2 in two parts so that n * high is exact.
        let shifted = self.fma(x, self.cf(std::f32::consts::LOG2_E), self.cf(MAGIC));
        let n = self.fsub(shifted, self.cf(MAGIC));
        let r = self.fma(n, self.cf(-0.693_359_4), x);
        let r = self.fma(n, self.cf(2.121_944_4e-4), r);
        // The Taylor polynomial whose term of r^7 is spread over the lower odd ones (Chebyshev). Twice
        // that, so that 2^(n-1) is a normal number up to the largest n, 128.
        let coefficients = [1.0 / 720.0, 8.375_04e-3, 1.0 / 24.0, 1.666_641_6e-1, 0.5, 1.0, 1.0];
        let mut twice = self.cf(2.0 * coefficients[0]);
        for c in &coefficients[1..] {
            twice = self.fma(twice, r, self.cf(2.0 * c));
        }
        let power = self.iadd(self.shl(self.as_int(shifted), 23), self.ci(126 << 23));
        let value = self.fmul(twice, self.as_float(power));
        let value = self.select(self.fcmp(FloatPredicate::OLT, x, self.cf(-86.6)), self.cf(0.0), value);
        self.select(self.fcmp(FloatPredicate::OGT, x, self.cf(88.722_83)), self.cf(f32::INFINITY), value)
    }

    /// `1 / (1 + e^-x)`.
    pub(crate) fn sigmoid(&self, x: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.fdiv(self.cf(1.0), self.fadd(self.cf(1.0), self.exp(self.fneg(x))))
    }

    /// `tanh(x)`.
    pub(crate) fn tanh(&self, x: VectorValue<'ctx>) -> VectorValue<'ctx> {
        // 1 - 2 / (e^2x + 1) is right at both ends: e^2x becomes 0 or infinite.
        let e = self.exp(self.fadd(x, x));
        self.fsub(self.cf(1.0), self.fdiv(self.cf(2.0), self.fadd(e, self.cf(1.0))))
    }
}
