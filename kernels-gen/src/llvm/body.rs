//! Short names for the instructions that kernels are made of.

use crate::Isa;
use inkwell::builder::{Builder, BuilderError};
use inkwell::context::Context;
use inkwell::intrinsics::Intrinsic;
use inkwell::module::Module;
use inkwell::types::{BasicType, BasicTypeEnum, FloatType, IntType, VectorType};
use inkwell::values::{
    BasicMetadataValueEnum, BasicValue, BasicValueEnum, FunctionValue, IntValue, PointerValue, VectorValue,
};
use inkwell::{AddressSpace, FloatPredicate, IntPredicate};

/// Lanes of every vector: a panel's features, a group of positions.
pub(crate) const LANES: u32 = 16;

/// Type of a parameter of generated functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Param {
    /// An address.
    Ptr,
    /// A count, index or stride.
    I64,
}

/// A function under construction: a builder at the end of its current block.
///
/// Vectors have 16 lanes of f32 or i32 unless said otherwise; counts and indices are i64.
pub struct Body<'a, 'ctx> {
    pub(crate) context: &'ctx Context,
    pub(crate) module: &'a Module<'ctx>,
    pub(crate) builder: Builder<'ctx>,
    pub(crate) isa: Isa,
    function: FunctionValue<'ctx>,
}

/// Takes the value of an instruction. The builder refuses only instructions without a place or
/// with operands of the wrong type, which no input can cause.
fn ok<T>(result: Result<T, BuilderError>) -> T {
    result.expect("kernel builders place well-typed instructions")
}

impl<'a, 'ctx> Body<'a, 'ctx> {
    /// An empty body for `function`.
    pub(crate) fn new(
        context: &'ctx Context,
        module: &'a Module<'ctx>,
        isa: Isa,
        function: FunctionValue<'ctx>,
    ) -> Self {
        let builder = context.create_builder();
        builder.position_at_end(context.append_basic_block(function, "entry"));
        Body { context, module, builder, isa, function }
    }

    /// Ends the function.
    pub(crate) fn finish(self) -> FunctionValue<'ctx> {
        ok(self.builder.build_return(None));
        self.function
    }

    pub(crate) fn ptr_arg(&self, index: u32) -> PointerValue<'ctx> {
        self.arg(index).into_pointer_value()
    }

    pub(crate) fn int_arg(&self, index: u32) -> IntValue<'ctx> {
        self.arg(index).into_int_value()
    }

    fn arg(&self, index: u32) -> BasicValueEnum<'ctx> {
        self.function.get_nth_param(index).expect("the kernel declares the parameters it reads")
    }

    // Types.

    pub(crate) fn f32(&self) -> FloatType<'ctx> {
        self.context.f32_type()
    }

    pub(crate) fn i32(&self) -> IntType<'ctx> {
        self.context.i32_type()
    }

    pub(crate) fn i64(&self) -> IntType<'ctx> {
        self.context.i64_type()
    }

    pub(crate) fn f32x(&self) -> VectorType<'ctx> {
        self.f32().vec_type(LANES)
    }

    pub(crate) fn i32x(&self) -> VectorType<'ctx> {
        self.i32().vec_type(LANES)
    }

    pub(crate) fn ints(&self, bits: u32, lanes: u32) -> VectorType<'ctx> {
        self.context
            .custom_width_int_type(bits.try_into().expect("a width above 0"))
            .expect("a legal width")
            .vec_type(lanes)
    }

    // Scalars.

    pub(crate) fn c64(&self, value: u64) -> IntValue<'ctx> {
        self.i64().const_int(value, false)
    }

    pub(crate) fn size(&self, value: usize) -> IntValue<'ctx> {
        self.c64(value as u64)
    }

    pub(crate) fn add(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        ok(self.builder.build_int_add(a, b, ""))
    }

    pub(crate) fn sub(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        ok(self.builder.build_int_sub(a, b, ""))
    }

    pub(crate) fn mul(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        ok(self.builder.build_int_mul(a, b, ""))
    }

    pub(crate) fn div_const(&self, a: IntValue<'ctx>, b: usize) -> IntValue<'ctx> {
        ok(self.builder.build_int_unsigned_div(a, self.size(b), ""))
    }

    pub(crate) fn rem_const(&self, a: IntValue<'ctx>, b: usize) -> IntValue<'ctx> {
        ok(self.builder.build_int_unsigned_rem(a, self.size(b), ""))
    }

    /// `a` rounded down to a multiple of `b`, a power of two.
    pub(crate) fn floor(&self, a: IntValue<'ctx>, b: u64) -> IntValue<'ctx> {
        ok(self.builder.build_and(a, self.c64(!(b - 1)), ""))
    }

    pub(crate) fn cmp(&self, op: IntPredicate, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        ok(self.builder.build_int_compare(op, a, b, ""))
    }

    pub(crate) fn both(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        ok(self.builder.build_and(a, b, ""))
    }

    pub(crate) fn pick(&self, c: IntValue<'ctx>, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        ok(self.builder.build_select(c, a, b, "")).into_int_value()
    }

    pub(crate) fn umin(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.pick(self.cmp(IntPredicate::ULT, a, b), a, b)
    }

    pub(crate) fn to_i32(&self, a: IntValue<'ctx>) -> IntValue<'ctx> {
        ok(self.builder.build_int_truncate(a, self.i32(), ""))
    }

    // Memory.

    /// `base + bytes`.
    pub(crate) fn at(&self, base: PointerValue<'ctx>, bytes: IntValue<'ctx>) -> PointerValue<'ctx> {
        // SAFETY: an address computation in generated code; its bounds are the kernel's contract.
        ok(unsafe { self.builder.build_in_bounds_gep(self.context.i8_type(), base, &[bytes], "") })
    }

    /// `base + bytes`, a constant.
    pub(crate) fn off(&self, base: PointerValue<'ctx>, bytes: usize) -> PointerValue<'ctx> {
        if bytes == 0 { base } else { self.at(base, self.size(bytes)) }
    }

    /// Address of element `index` of 4 bytes.
    pub(crate) fn at4(&self, base: PointerValue<'ctx>, index: IntValue<'ctx>) -> PointerValue<'ctx> {
        // SAFETY: as in `at`.
        ok(unsafe { self.builder.build_in_bounds_gep(self.i32(), base, &[index], "") })
    }

    pub(crate) fn load<T: BasicType<'ctx>>(
        &self,
        ty: T,
        from: PointerValue<'ctx>,
        align: u32,
    ) -> BasicValueEnum<'ctx> {
        let value = ok(self.builder.build_load(ty, from, ""));
        let instruction = value.as_instruction_value().expect("a load is an instruction");
        instruction.set_alignment(align).expect("a power of two");
        value
    }

    pub(crate) fn load_v(
        &self,
        ty: VectorType<'ctx>,
        from: PointerValue<'ctx>,
        align: u32,
    ) -> VectorValue<'ctx> {
        self.load(ty, from, align).into_vector_value()
    }

    /// 16 floats.
    pub(crate) fn load_f(&self, from: PointerValue<'ctx>) -> VectorValue<'ctx> {
        self.load_v(self.f32x(), from, 4)
    }

    /// One float in every lane.
    pub(crate) fn load_splat(&self, from: PointerValue<'ctx>) -> VectorValue<'ctx> {
        self.splat(self.load(self.f32(), from, 4))
    }

    /// One i32 in every lane.
    pub(crate) fn load_splat_i32(&self, from: PointerValue<'ctx>) -> VectorValue<'ctx> {
        self.splat(self.load(self.i32(), from, 4))
    }

    /// A `u32` as i64.
    pub(crate) fn load_u32(&self, from: PointerValue<'ctx>) -> IntValue<'ctx> {
        let value = self.load(self.i32(), from, 4).into_int_value();
        ok(self.builder.build_int_z_extend(value, self.i64(), ""))
    }

    pub(crate) fn store<V: BasicValue<'ctx>>(&self, value: V, to: PointerValue<'ctx>, align: u32) {
        ok(self.builder.build_store(to, value)).set_alignment(align).expect("a power of two");
    }

    /// 16 floats where the mask is set, 0 elsewhere; all without a mask.
    pub(crate) fn load_masked(
        &self,
        from: PointerValue<'ctx>,
        mask: Option<VectorValue<'ctx>>,
    ) -> VectorValue<'ctx> {
        let Some(mask) = mask else { return self.load_f(from) };
        let ptr = self.context.ptr_type(AddressSpace::default());
        let align = self.i32().const_int(4, false);
        let args = [from.into(), align.into(), mask.into(), self.f32x().const_zero().into()];
        self.intrinsic("llvm.masked.load", &[self.f32x().into(), ptr.into()], &args)
            .expect("a value")
            .into_vector_value()
    }

    pub(crate) fn store_masked(
        &self,
        value: VectorValue<'ctx>,
        to: PointerValue<'ctx>,
        mask: Option<VectorValue<'ctx>>,
    ) {
        let Some(mask) = mask else { return self.store(value, to, 4) };
        let ptr = self.context.ptr_type(AddressSpace::default());
        let align = self.i32().const_int(4, false);
        let types = [value.get_type().into(), ptr.into()];
        self.intrinsic("llvm.masked.store", &types, &[value.into(), to.into(), align.into(), mask.into()]);
    }

    /// Asks for the line at `from` to be brought into the second-level cache. The address may be
    /// anything.
    pub(crate) fn prefetch(&self, from: PointerValue<'ctx>) {
        let c = |v| self.i32().const_int(v, false).into();
        let ptr = self.context.ptr_type(AddressSpace::default());
        // Read, second level, data.
        self.intrinsic("llvm.prefetch", &[ptr.into()], &[from.into(), c(0), c(2), c(1)]);
    }

    // Vectors.

    pub(crate) fn intrinsic(
        &self,
        name: &str,
        types: &[BasicTypeEnum<'ctx>],
        args: &[BasicMetadataValueEnum<'ctx>],
    ) -> Option<BasicValueEnum<'ctx>> {
        let intrinsic = Intrinsic::find(name).expect("an intrinsic of this LLVM version");
        let function = intrinsic.get_declaration(self.module, types).expect("its overload");
        ok(self.builder.build_call(function, args, "")).try_as_basic_value().basic()
    }

    /// An intrinsic of one overload or none that returns a vector.
    pub(crate) fn vector_intrinsic(&self, name: &str, args: &[VectorValue<'ctx>]) -> VectorValue<'ctx> {
        let args: Vec<_> = args.iter().map(|v| (*v).into()).collect();
        self.intrinsic(name, &[], &args).expect("a value").into_vector_value()
    }

    pub(crate) fn splat<V: BasicValue<'ctx>>(&self, value: V) -> VectorValue<'ctx> {
        self.splat_n(value, LANES)
    }

    pub(crate) fn splat_n<V: BasicValue<'ctx>>(&self, value: V, lanes: u32) -> VectorValue<'ctx> {
        let ty = match value.as_basic_value_enum() {
            BasicValueEnum::FloatValue(v) => v.get_type().vec_type(lanes),
            BasicValueEnum::IntValue(v) => v.get_type().vec_type(lanes),
            _ => unreachable!("only scalars are broadcast"),
        };
        let zero = self.i32().const_zero();
        let first = ok(self.builder.build_insert_element(ty.get_poison(), value, zero, ""));
        let mask = self.i32().vec_type(lanes).const_zero();
        ok(self.builder.build_shuffle_vector(first, ty.get_poison(), mask, ""))
    }

    pub(crate) fn cf(&self, value: f32) -> VectorValue<'ctx> {
        let value = self.f32().const_float(f64::from(value));
        VectorType::const_vector(&[value; LANES as usize])
    }

    pub(crate) fn const_floats(&self, values: &[f32; LANES as usize]) -> VectorValue<'ctx> {
        VectorType::const_vector(&values.map(|v| self.f32().const_float(f64::from(v))))
    }

    pub(crate) fn ci(&self, value: i64) -> VectorValue<'ctx> {
        VectorType::const_vector(&[self.i32().const_int(value as u64, true); LANES as usize])
    }

    /// A constant vector of `bits`-wide integers.
    pub(crate) fn const_ints(&self, bits: u32, values: &[i64]) -> VectorValue<'ctx> {
        let ty = self.ints(bits, 1).get_element_type().into_int_type();
        let values: Vec<_> = values.iter().map(|v| ty.const_int(*v as u64, true)).collect();
        VectorType::const_vector(&values)
    }

    /// Lanes of `a` (and of `b`, counted on) in the order of `indices`.
    pub(crate) fn shuffle(
        &self,
        a: VectorValue<'ctx>,
        b: VectorValue<'ctx>,
        indices: &[i64],
    ) -> VectorValue<'ctx> {
        // The mask's type is that of the operands in inkwell's signature only.
        ok(self.builder.build_shuffle_vector(a, b, self.const_ints(32, indices), ""))
    }

    pub(crate) fn lane(&self, v: VectorValue<'ctx>, index: u64) -> BasicValueEnum<'ctx> {
        ok(self.builder.build_extract_element(v, self.c64(index), ""))
    }

    pub(crate) fn cast(&self, v: VectorValue<'ctx>, ty: VectorType<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_bit_cast(v, ty, "")).into_vector_value()
    }

    pub(crate) fn as_int(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.cast(v, self.i32x())
    }

    pub(crate) fn as_float(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.cast(v, self.f32x())
    }

    pub(crate) fn zext(&self, v: VectorValue<'ctx>, ty: VectorType<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_int_z_extend(v, ty, ""))
    }

    pub(crate) fn sext(&self, v: VectorValue<'ctx>, ty: VectorType<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_int_s_extend(v, ty, ""))
    }

    pub(crate) fn trunc(&self, v: VectorValue<'ctx>, ty: VectorType<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_int_truncate(v, ty, ""))
    }

    pub(crate) fn i_to_f(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_signed_int_to_float(v, self.f32x(), ""))
    }

    pub(crate) fn iadd(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_int_add(a, b, ""))
    }

    pub(crate) fn isub(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_int_sub(a, b, ""))
    }

    pub(crate) fn imul(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_int_mul(a, b, ""))
    }

    pub(crate) fn and(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_and(a, b, ""))
    }

    pub(crate) fn or(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_or(a, b, ""))
    }

    /// Shift of i32 lanes by a constant.
    pub(crate) fn shl(&self, v: VectorValue<'ctx>, bits: i64) -> VectorValue<'ctx> {
        if bits == 0 { v } else { ok(self.builder.build_left_shift(v, self.ci(bits), "")) }
    }

    /// Logical shift of i32 lanes by a constant.
    pub(crate) fn shr(&self, v: VectorValue<'ctx>, bits: i64) -> VectorValue<'ctx> {
        if bits == 0 { v } else { ok(self.builder.build_right_shift(v, self.ci(bits), false, "")) }
    }

    /// Arithmetic shift of i32 lanes by a constant.
    pub(crate) fn sar(&self, v: VectorValue<'ctx>, bits: i64) -> VectorValue<'ctx> {
        ok(self.builder.build_right_shift(v, self.ci(bits), true, ""))
    }

    pub(crate) fn fadd(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_float_add(a, b, ""))
    }

    pub(crate) fn fsub(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_float_sub(a, b, ""))
    }

    pub(crate) fn fmul(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_float_mul(a, b, ""))
    }

    pub(crate) fn fdiv(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_float_div(a, b, ""))
    }

    pub(crate) fn fneg(&self, a: VectorValue<'ctx>) -> VectorValue<'ctx> {
        ok(self.builder.build_float_neg(a, ""))
    }

    pub(crate) fn sqrt(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.intrinsic("llvm.sqrt", &[self.f32x().into()], &[v.into()]).expect("a value").into_vector_value()
    }

    pub(crate) fn abs(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.as_float(self.and(self.as_int(v), self.ci(0x7fff_ffff)))
    }

    pub(crate) fn icmp(
        &self,
        op: IntPredicate,
        a: VectorValue<'ctx>,
        b: VectorValue<'ctx>,
    ) -> VectorValue<'ctx> {
        ok(self.builder.build_int_compare(op, a, b, ""))
    }

    pub(crate) fn fcmp(
        &self,
        op: FloatPredicate,
        a: VectorValue<'ctx>,
        b: VectorValue<'ctx>,
    ) -> VectorValue<'ctx> {
        ok(self.builder.build_float_compare(op, a, b, ""))
    }

    pub(crate) fn select(
        &self,
        c: VectorValue<'ctx>,
        a: VectorValue<'ctx>,
        b: VectorValue<'ctx>,
    ) -> VectorValue<'ctx> {
        ok(self.builder.build_select(c, a, b, "")).into_vector_value()
    }

    /// The larger; `a` if either is NaN.
    pub(crate) fn fmax(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.select(self.fcmp(FloatPredicate::OLT, a, b), b, a)
    }

    /// The smaller; `a` if either is NaN.
    pub(crate) fn fmin(&self, a: VectorValue<'ctx>, b: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.select(self.fcmp(FloatPredicate::OGT, a, b), b, a)
    }

    /// `a * b + c`, rounded once, on every target.
    pub(crate) fn fma(
        &self,
        a: VectorValue<'ctx>,
        b: VectorValue<'ctx>,
        c: VectorValue<'ctx>,
    ) -> VectorValue<'ctx> {
        if self.isa.fma {
            let args = [a.into(), b.into(), c.into()];
            return self
                .intrinsic("llvm.fma", &[self.f32x().into()], &args)
                .expect("a value")
                .into_vector_value();
        }
        self.emulated_fma(a, b, c)
    }

    /// The product is exact in f64; the sum is rounded to odd there, so that rounding it to f32 is
    /// as good as rounding the exact sum.
    fn emulated_fma(
        &self,
        a: VectorValue<'ctx>,
        b: VectorValue<'ctx>,
        c: VectorValue<'ctx>,
    ) -> VectorValue<'ctx> {
        let wide = self.context.f64_type().vec_type(LANES);
        let bits = self.i64().vec_type(LANES);
        let ext = |v| ok(self.builder.build_float_ext(v, wide, ""));
        let (product, c) = (self.fmul(ext(a), ext(b)), ext(c));
        let sum = self.fadd(product, c);
        let c_part = self.fsub(sum, product);
        let error = self.fadd(self.fsub(product, self.fsub(sum, c_part)), self.fsub(c, c_part));
        let zero = wide.const_zero();
        let one = VectorType::const_vector(&[self.c64(1); LANES as usize]);
        let raw = self.cast(sum, bits);
        let even = self.icmp(IntPredicate::EQ, self.and(raw, one), bits.const_zero());
        let inexact = self.and(self.fcmp(FloatPredicate::ONE, error, zero), even);
        let up = self.fcmp(FloatPredicate::OGT, error, zero);
        let positive = self.fcmp(FloatPredicate::OGT, sum, zero);
        let away = self.icmp(IntPredicate::EQ, up, positive);
        let odd = self.select(away, self.iadd(raw, one), self.isub(raw, one));
        let sum = self.cast(self.select(inexact, odd, raw), wide);
        ok(self.builder.build_float_trunc(sum, self.f32x(), ""))
    }

    /// Lanes `indices` of 0..16.
    fn rotate(&self, v: VectorValue<'ctx>, by: i64) -> VectorValue<'ctx> {
        let indices: Vec<i64> = (0..i64::from(LANES)).map(|i| (i + by) % i64::from(LANES)).collect();
        self.shuffle(v, v, &indices)
    }

    /// Joins the 16 lanes in a fixed tree (8, 4, 2, 1 apart); the result is in every lane.
    pub(crate) fn tree_of(
        &self,
        v: VectorValue<'ctx>,
        join: impl Fn(VectorValue<'ctx>, VectorValue<'ctx>) -> VectorValue<'ctx>,
    ) -> VectorValue<'ctx> {
        [8, 4, 2, 1].iter().fold(v, |v, by| join(v, self.rotate(v, *by)))
    }

    /// Sum of the lanes, in every lane.
    pub(crate) fn sum(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.tree_of(v, |a, b| self.fadd(a, b))
    }

    /// Largest lane, in every lane.
    pub(crate) fn largest(&self, v: VectorValue<'ctx>) -> VectorValue<'ctx> {
        self.tree_of(v, |a, b| self.fmax(a, b))
    }

    /// Sum of the i32 lanes.
    pub(crate) fn int_sum(&self, v: VectorValue<'ctx>) -> IntValue<'ctx> {
        self.lane(self.tree_of(v, |a, b| self.iadd(a, b)), 0).into_int_value()
    }

    /// `[0, 1, .. 15]` as i32.
    pub(crate) fn iota(&self) -> VectorValue<'ctx> {
        self.const_ints(32, &(0..i64::from(LANES)).collect::<Vec<_>>())
    }

    /// Lanes below `count` (i64).
    pub(crate) fn mask_below(&self, count: IntValue<'ctx>) -> VectorValue<'ctx> {
        self.icmp(IntPredicate::SLT, self.iota(), self.splat(self.to_i32(count)))
    }

    // Control flow.

    /// `for i in (start..end).step_by(step)`, with values carried from round to round.
    pub(crate) fn carry<V: BasicValue<'ctx> + Copy>(
        &self,
        (start, end, step): (IntValue<'ctx>, IntValue<'ctx>, u64),
        initial: &[V],
        body: impl FnOnce(IntValue<'ctx>, &[BasicValueEnum<'ctx>]) -> Vec<V>,
    ) -> Vec<BasicValueEnum<'ctx>> {
        self.cycle(start, end, initial, |i, values| {
            let values = body(i, values);
            (ok(self.builder.build_int_nuw_add(i, self.c64(step), "")), values)
        })
    }

    /// A loop while the index is below `end`; `body` gives the next index and carried values.
    fn cycle<V: BasicValue<'ctx> + Copy>(
        &self,
        start: IntValue<'ctx>,
        end: IntValue<'ctx>,
        initial: &[V],
        body: impl FnOnce(IntValue<'ctx>, &[BasicValueEnum<'ctx>]) -> (IntValue<'ctx>, Vec<V>),
    ) -> Vec<BasicValueEnum<'ctx>> {
        let before = self.builder.get_insert_block().expect("a place");
        let head = self.context.append_basic_block(self.function, "loop");
        let inside = self.context.append_basic_block(self.function, "body");
        let after = self.context.append_basic_block(self.function, "done");
        ok(self.builder.build_unconditional_branch(head));
        self.builder.position_at_end(head);
        let index = ok(self.builder.build_phi(self.i64(), ""));
        index.add_incoming(&[(&start, before)]);
        let phis: Vec<_> = initial
            .iter()
            .map(|value| {
                let phi = ok(self.builder.build_phi(value.as_basic_value_enum().get_type(), ""));
                phi.add_incoming(&[(value, before)]);
                phi
            })
            .collect();
        let i = index.as_basic_value().into_int_value();
        let more = self.cmp(IntPredicate::ULT, i, end);
        ok(self.builder.build_conditional_branch(more, inside, after));
        self.builder.position_at_end(inside);
        let values: Vec<_> = phis.iter().map(|phi| phi.as_basic_value()).collect();
        let (following, next) = body(i, &values);
        let latch = self.builder.get_insert_block().expect("a place");
        index.add_incoming(&[(&following, latch)]);
        for (phi, value) in phis.iter().zip(&next) {
            phi.add_incoming(&[(value, latch)]);
        }
        ok(self.builder.build_unconditional_branch(head));
        self.builder.position_at_end(after);
        values
    }

    /// [`Body::carry`] for vectors.
    pub(crate) fn carry_v(
        &self,
        range: (IntValue<'ctx>, IntValue<'ctx>, u64),
        initial: &[VectorValue<'ctx>],
        body: impl FnOnce(IntValue<'ctx>, &[VectorValue<'ctx>]) -> Vec<VectorValue<'ctx>>,
    ) -> Vec<VectorValue<'ctx>> {
        let vectors = |values: &[BasicValueEnum<'ctx>]| -> Vec<_> {
            values.iter().map(|v| v.into_vector_value()).collect()
        };
        vectors(&self.carry(range, initial, |i, values| body(i, &vectors(values))))
    }

    /// A loop that carries nothing.
    pub(crate) fn repeat(
        &self,
        range: (IntValue<'ctx>, IntValue<'ctx>, u64),
        body: impl FnOnce(IntValue<'ctx>),
    ) {
        self.carry::<VectorValue<'ctx>>(range, &[], |i, _| {
            body(i);
            Vec::new()
        });
    }

    /// `for i in 0..count`.
    pub(crate) fn count(&self, count: IntValue<'ctx>, body: impl FnOnce(IntValue<'ctx>)) {
        self.repeat((self.c64(0), count, 1), body);
    }

    /// `i = start; while i < end { i = body(i) }`.
    pub(crate) fn walk(
        &self,
        start: IntValue<'ctx>,
        end: IntValue<'ctx>,
        body: impl FnOnce(IntValue<'ctx>) -> IntValue<'ctx>,
    ) {
        self.cycle(start, end, &[] as &[VectorValue<'ctx>], |i, _| (body(i), Vec::new()));
    }

    /// Runs `body` if `condition` holds.
    pub(crate) fn when(&self, condition: IntValue<'ctx>, body: impl FnOnce()) {
        let inside = self.context.append_basic_block(self.function, "then");
        let after = self.context.append_basic_block(self.function, "after");
        ok(self.builder.build_conditional_branch(condition, inside, after));
        self.builder.position_at_end(inside);
        body();
        ok(self.builder.build_unconditional_branch(after));
        self.builder.position_at_end(after);
    }

    /// Columns `0..cols` 16 at a time: `body(first column, mask)`; the mask is absent for whole
    /// vectors, so `body` runs twice while the code is built.
    pub(crate) fn columns(
        &self,
        cols: IntValue<'ctx>,
        body: impl Fn(IntValue<'ctx>, Option<VectorValue<'ctx>>),
    ) {
        let whole = self.floor(cols, u64::from(LANES));
        self.repeat((self.c64(0), whole, u64::from(LANES)), |column| body(column, None));
        // A constant number of whole vectors has no tail to build.
        if cols.get_zero_extended_constant().is_some_and(|c| c.is_multiple_of(u64::from(LANES))) {
            return;
        }
        self.when(self.cmp(IntPredicate::ULT, whole, cols), || {
            body(whole, Some(self.mask_below(self.sub(cols, whole))));
        });
    }
}
