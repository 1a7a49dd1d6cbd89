//! Scalar code: the glue between kernels needs addresses, counts, loops and calls, nothing else.

use inkwell::IntPredicate;
use inkwell::basic_block::BasicBlock;
use inkwell::builder::Builder;
use inkwell::context::Context;
use inkwell::types::IntType;
use inkwell::values::{BasicMetadataValueEnum, FunctionValue, IntValue, PhiValue, PointerValue};

/// A function under construction. All counts and offsets are 64-bit.
///
/// Building fails only when the builder has no position or operands come from another context,
/// neither of which can happen here: hence the `expect`s.
pub struct Scalar<'ctx> {
    pub context: &'ctx Context,
    pub builder: Builder<'ctx>,
    pub function: FunctionValue<'ctx>,
}

/// A loop whose body is being emitted.
pub struct Loop<'ctx> {
    /// The index.
    pub i: IntValue<'ctx>,
    phi: PhiValue<'ctx>,
    head: BasicBlock<'ctx>,
    out: BasicBlock<'ctx>,
}

const BUILT: &str = "the builder has a position";

impl<'ctx> Scalar<'ctx> {
    /// Starts the body of a function.
    pub fn new(context: &'ctx Context, function: FunctionValue<'ctx>) -> Scalar<'ctx> {
        let builder = context.create_builder();
        builder.position_at_end(context.append_basic_block(function, "entry"));
        Scalar { context, builder, function }
    }

    pub fn i64(&self) -> IntType<'ctx> {
        self.context.i64_type()
    }

    pub fn int(&self, value: u64) -> IntValue<'ctx> {
        self.i64().const_int(value, false)
    }

    pub fn size(&self, value: usize) -> IntValue<'ctx> {
        self.int(value as u64)
    }

    pub fn null(&self) -> PointerValue<'ctx> {
        self.context.ptr_type(Default::default()).const_null()
    }

    pub fn ptr_arg(&self, index: u32) -> PointerValue<'ctx> {
        self.function.get_nth_param(index).expect("the function has this parameter").into_pointer_value()
    }

    pub fn int_arg(&self, index: u32) -> IntValue<'ctx> {
        self.function.get_nth_param(index).expect("the function has this parameter").into_int_value()
    }

    pub fn add(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_int_add(a, b, "").expect(BUILT)
    }

    pub fn sub(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_int_sub(a, b, "").expect(BUILT)
    }

    pub fn mul(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_int_mul(a, b, "").expect(BUILT)
    }

    pub fn div(&self, a: IntValue<'ctx>, b: usize) -> IntValue<'ctx> {
        self.builder.build_int_unsigned_div(a, self.size(b), "").expect(BUILT)
    }

    pub fn compare(&self, predicate: IntPredicate, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_int_compare(predicate, a, b, "").expect(BUILT)
    }

    pub fn select(&self, c: IntValue<'ctx>, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_select(c, a, b, "").expect(BUILT).into_int_value()
    }

    pub fn min(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.select(self.compare(IntPredicate::ULT, a, b), a, b)
    }

    /// `a - b`, 0 if that is negative.
    pub fn saturating_sub(&self, a: IntValue<'ctx>, b: IntValue<'ctx>) -> IntValue<'ctx> {
        self.select(self.compare(IntPredicate::ULT, a, b), self.int(0), self.sub(a, b))
    }

    /// `base + bytes`; the sum may leave the object that `base` points into as long as nothing is
    /// read there.
    pub fn at(&self, base: PointerValue<'ctx>, bytes: IntValue<'ctx>) -> PointerValue<'ctx> {
        // SAFETY: emits address arithmetic without `inbounds`, which wraps and is never undefined.
        unsafe { self.builder.build_gep(self.context.i8_type(), base, &[bytes], "") }.expect(BUILT)
    }

    pub fn load_ptr(&self, from: PointerValue<'ctx>) -> PointerValue<'ctx> {
        let ty = self.context.ptr_type(Default::default());
        self.builder.build_load(ty, from, "").expect(BUILT).into_pointer_value()
    }

    pub fn load_i64(&self, from: PointerValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_load(self.i64(), from, "").expect(BUILT).into_int_value()
    }

    /// A 32-bit number, widened.
    pub fn load_u32(&self, from: PointerValue<'ctx>) -> IntValue<'ctx> {
        let narrow = self.builder.build_load(self.context.i32_type(), from, "").expect(BUILT);
        self.widen(narrow.into_int_value())
    }

    pub fn widen(&self, value: IntValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_int_z_extend(value, self.i64(), "").expect(BUILT)
    }

    pub fn narrow(&self, value: IntValue<'ctx>) -> IntValue<'ctx> {
        self.builder.build_int_truncate(value, self.context.i32_type(), "").expect(BUILT)
    }

    pub fn store(&self, value: IntValue<'ctx>, to: PointerValue<'ctx>) {
        self.builder.build_store(to, value).expect(BUILT);
    }

    pub fn call(&self, function: FunctionValue<'ctx>, args: &[BasicMetadataValueEnum<'ctx>]) {
        self.builder.build_call(function, args, "").expect(BUILT);
    }

    pub fn block(&self, name: &str) -> BasicBlock<'ctx> {
        self.context.append_basic_block(self.function, name)
    }

    pub fn jump(&self, to: BasicBlock<'ctx>) {
        self.builder.build_unconditional_branch(to).expect(BUILT);
    }

    pub fn branch(&self, condition: IntValue<'ctx>, then: BasicBlock<'ctx>, otherwise: BasicBlock<'ctx>) {
        self.builder.build_conditional_branch(condition, then, otherwise).expect(BUILT);
    }

    pub fn enter(&self, block: BasicBlock<'ctx>) {
        self.builder.position_at_end(block);
    }

    pub fn ret(&self) {
        self.builder.build_return(None).expect(BUILT);
    }

    /// `for i in from..to { body(i) }`.
    pub fn each(&self, from: IntValue<'ctx>, to: IntValue<'ctx>, body: impl FnOnce(IntValue<'ctx>)) {
        let (head, inside, out) = (self.block("head"), self.block("body"), self.block("out"));
        let entry = self.builder.get_insert_block().expect(BUILT);
        self.jump(head);
        self.enter(head);
        let phi = self.builder.build_phi(self.i64(), "i").expect(BUILT);
        let i = phi.as_basic_value().into_int_value();
        self.branch(self.compare(IntPredicate::ULT, i, to), inside, out);
        self.enter(inside);
        body(i);
        let next = self.add(i, self.int(1));
        let end = self.builder.get_insert_block().expect(BUILT);
        phi.add_incoming(&[(&from, entry), (&next, end)]);
        self.jump(head);
        self.enter(out);
    }

    /// Opens `for i in from..to {`; for a body that can fail. [`Scalar::close`] ends it.
    pub fn open(&self, from: IntValue<'ctx>, to: IntValue<'ctx>) -> Loop<'ctx> {
        let (head, inside, out) = (self.block("head"), self.block("body"), self.block("out"));
        let entry = self.builder.get_insert_block().expect(BUILT);
        self.jump(head);
        self.enter(head);
        let phi = self.builder.build_phi(self.i64(), "i").expect(BUILT);
        phi.add_incoming(&[(&from, entry)]);
        let i = phi.as_basic_value().into_int_value();
        self.branch(self.compare(IntPredicate::ULT, i, to), inside, out);
        self.enter(inside);
        Loop { i, phi, head, out }
    }

    /// Ends a loop.
    pub fn close(&self, open: Loop<'ctx>) {
        let next = self.add(open.i, self.int(1));
        let end = self.builder.get_insert_block().expect(BUILT);
        open.phi.add_incoming(&[(&next, end)]);
        self.jump(open.head);
        self.enter(open.out);
    }

    /// Opens `if condition {`; what it gives ends it with [`Scalar::close_if`].
    pub fn open_if(&self, condition: IntValue<'ctx>) -> BasicBlock<'ctx> {
        let (inside, out) = (self.block("then"), self.block("out"));
        self.branch(condition, inside, out);
        self.enter(inside);
        out
    }

    /// Ends an `if`.
    pub fn close_if(&self, out: BasicBlock<'ctx>) {
        self.jump(out);
        self.enter(out);
    }

    /// `if condition { body() }`.
    pub fn when(&self, condition: IntValue<'ctx>, body: impl FnOnce()) {
        let (inside, out) = (self.block("then"), self.block("out"));
        self.branch(condition, inside, out);
        self.enter(inside);
        body();
        self.jump(out);
        self.enter(out);
    }
}
