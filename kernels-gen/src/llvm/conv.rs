//! Convolutions with kernels that are made for each row.

use super::Kernels;
use super::body::{LANES, Param};
use crate::KernelError;
use crate::conv::DynamicConv;
use inkwell::IntPredicate;
use inkwell::values::{FunctionValue, IntValue, VectorValue};

use Param::{I64, Ptr};

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// A convolution over two rows; see the [module](super) for arguments.
    ///
    /// # Errors
    /// See [`DynamicConv::check`].
    pub fn dynamic_conv(&self, name: &str, conv: &DynamicConv) -> Result<FunctionValue<'ctx>, KernelError> {
        conv.check()?;
        let b = self.kernel(name, &[Ptr, I64, I64, Ptr, Ptr, Ptr, Ptr, Ptr], &[]);
        let (x, start, end, sequences) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2), b.ptr_arg(3));
        let (own, base, added, dst) = (b.ptr_arg(4), b.ptr_arg(5), b.ptr_arg(6), b.ptr_arg(7));
        let (cols, groups) = (b.size(conv.cols), conv.groups());
        b.repeat((start, end, 1), |row| {
            let first = b.cmp(IntPredicate::EQ, row, b.c64(0));
            let last = b.pick(first, row, b.sub(row, b.c64(1)));
            let sequence = |row| b.load_u32(b.at4(sequences, row));
            let other = b.cmp(IntPredicate::NE, sequence(last), sequence(row));
            // Nothing is read of a row that is not there.
            let lanes = b.pick(first, b.c64(0), b.pick(other, b.c64(0), b.c64(u64::from(LANES))));
            let follows = b.mask_below(lanes);
            let (now, before) = (b.at4(x, b.mul(row, cols)), b.at4(x, b.mul(last, cols)));
            let own = b.at4(own, b.mul(row, b.size(4 * groups)));
            let (added, dst) = (b.at4(added, b.mul(row, cols)), b.at4(dst, b.mul(row, cols)));
            b.count(b.size(groups), |group| {
                let taps = [b.at4(own, group), b.at4(own, b.add(group, b.size(groups)))];
                let taps = taps.map(|tap| b.load_splat(tap));
                let column = b.mul(group, b.size(conv.group));
                b.columns(b.size(conv.group), |c: IntValue<'ctx>, mask: Option<VectorValue<'ctx>>| {
                    let c = b.add(column, c);
                    let kernel = |tap: usize| {
                        let base = b.at4(b.off(base, tap * conv.cols * 4), c);
                        b.fadd(b.load_masked(base, mask), taps[tap])
                    };
                    let seen = mask.map_or(follows, |mask| b.and(mask, follows));
                    let own = b.fmul(kernel(0), b.load_masked(b.at4(now, c), mask));
                    let mixed = b.fma(kernel(1), b.load_masked(b.at4(before, c), Some(seen)), own);
                    let sum = match conv.residual {
                        true => b.fadd(mixed, b.load_masked(b.at4(added, c), mask)),
                        false => mixed,
                    };
                    b.store_masked(sum, b.at4(dst, c), mask);
                });
            });
        });
        Ok(b.finish())
    }
}
