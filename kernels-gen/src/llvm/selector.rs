//! Candidates for the next tokens, and what they are worth behind each other.

use super::Kernels;
use super::body::{LANES, Param};
use super::experts::CHOSEN;
use crate::KernelError;
use crate::selector::{PairScores, TopK};
use inkwell::values::{FunctionValue, IntValue, VectorValue};
use inkwell::{FloatPredicate, IntPredicate};

use Param::{I64, Ptr};

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// The tokens of the largest logits; see the [module](super) for arguments.
    ///
    /// Logits are compared as whole numbers that have their order, NaN the least.
    ///
    /// # Errors
    /// See [`TopK::check`].
    pub fn top_k(&self, name: &str, top: &TopK) -> Result<FunctionValue<'ctx>, KernelError> {
        top.check()?;
        let b = self.kernel(name, &[Ptr, I64, Ptr, Ptr, Ptr], &[2, 3, 4]);
        let (logits, rows) = (b.ptr_arg(0), b.int_arg(1));
        let (tokens, values, keys) = (b.ptr_arg(2), b.ptr_arg(3), b.ptr_arg(4));
        let lanes = b.off(keys, (top.k * 4).next_multiple_of(64));
        let (k, least) = (b.size(top.k), b.i32().const_int(CHOSEN as u64, true));
        let key_of = |slot: IntValue<'ctx>| b.load(b.i32(), b.at4(keys, slot), 4).into_int_value();
        b.count(rows, |row| {
            let logits = b.at4(logits, b.mul(row, b.size(top.vocab)));
            let (tokens, values) = (b.at4(tokens, b.mul(row, k)), b.at4(values, b.mul(row, k)));
            b.count(k, |slot| {
                b.store(least, b.at4(keys, slot), 4);
                b.store(b.i32().const_zero(), b.at4(tokens, slot), 4);
            });
            // Puts a token in its place, behind its equals; what it displaces moves on.
            let insert = |key: IntValue<'ctx>, token: IntValue<'ctx>| {
                let initial = [b.c64(0), key, token];
                b.carry((b.c64(0), k, 1), &initial, |slot, moving| {
                    let [moves, key, token] = [0, 1, 2].map(|at| moving[at].into_int_value());
                    let (key_at, token_at) = (b.at4(keys, slot), b.at4(tokens, slot));
                    let there = key_of(slot);
                    let kept = b.load(b.i32(), token_at, 4).into_int_value();
                    let larger = b.cmp(IntPredicate::SGT, key, there);
                    let moves = b.pick(larger, b.c64(1), moves);
                    let takes = b.cmp(IntPredicate::NE, moves, b.c64(0));
                    b.store(b.pick(takes, key, there), key_at, 4);
                    b.store(b.pick(takes, token, kept), token_at, 4);
                    vec![moves, b.pick(takes, there, key), b.pick(takes, kept, token)]
                });
            };
            b.columns(b.size(top.vocab), |c: IntValue<'ctx>, mask: Option<VectorValue<'ctx>>| {
                let key = b.order_key(b.load_masked(b.at4(logits, c), mask));
                let key = mask.map_or(key, |mask| b.select(mask, key, b.ci(CHOSEN)));
                let last = b.size(top.k - 1);
                let larger = |x, y| b.select(b.icmp(IntPredicate::SGT, y, x), y, x);
                let best = b.lane(b.tree_of(key, larger), 0).into_int_value();
                b.when(b.cmp(IntPredicate::SGT, best, key_of(last)), || {
                    b.store(key, lanes, 4);
                    b.count(b.c64(u64::from(LANES)), |lane| {
                        let key = b.load(b.i32(), b.at4(lanes, lane), 4).into_int_value();
                        b.when(b.cmp(IntPredicate::SGT, key, key_of(last)), || {
                            insert(key, b.to_i32(b.add(c, lane)));
                        });
                    });
                });
            });
            b.count(k, |slot| {
                let logit = b.load_splat(b.at4(logits, b.load_u32(b.at4(tokens, slot))));
                let logit = b.fmul(logit, b.cf(top.factor));
                let logit = top.softcap.map_or(logit, |softcap| {
                    let capped = b.fmul(b.tanh(b.fdiv(logit, b.cf(softcap))), b.cf(softcap));
                    b.select(b.fcmp(FloatPredicate::UNO, logit, logit), logit, capped)
                });
                b.store(b.lane(logit, 0), b.at4(values, slot), 4);
            });
        });
        Ok(b.finish())
    }

    /// Scores of the pairs of one row; see the [module](super) for arguments.
    ///
    /// # Errors
    /// See [`PairScores::check`].
    pub fn pair_scores(&self, name: &str, pairs: &PairScores) -> Result<FunctionValue<'ctx>, KernelError> {
        pairs.check()?;
        let b = self.kernel(name, &[Ptr, Ptr, Ptr, Ptr, Ptr], &[0, 4]);
        let (before, behind, hidden) = (b.ptr_arg(0), b.ptr_arg(1), b.ptr_arg(2));
        let (logits, dst) = (b.ptr_arg(3), b.ptr_arg(4));
        let (k, stride, lanes) = (b.size(pairs.k), b.size(pairs.stride()), LANES as usize);
        let whole = pairs.rank / lanes * lanes;
        b.count(k, |a| {
            let left = b.at4(before, b.mul(a, stride));
            b.columns(b.size(pairs.rank), |c, mask| {
                let turned =
                    b.fmul(b.load_masked(b.at4(left, c), mask), b.load_masked(b.at4(hidden, c), mask));
                b.store_masked(turned, b.at4(left, c), mask);
            });
            b.count(k, |candidate| {
                let right = b.at4(behind, b.mul(candidate, stride));
                let range = (b.c64(0), b.size(whole), u64::from(LANES));
                let mut sum = b.carry_v(range, &[b.f32x().const_zero()], |c, sum| {
                    vec![b.fma(b.load_f(b.at4(left, c)), b.load_f(b.at4(right, c)), sum[0])]
                })[0];
                if whole < pairs.rank {
                    let mask = Some(b.mask_below(b.size(pairs.rank - whole)));
                    let tail = |from| b.load_masked(b.off(from, whole * 4), mask);
                    sum = b.fma(tail(left), tail(right), sum);
                }
                let score = b.fadd(b.load_splat(b.at4(logits, candidate)), b.sum(sum));
                b.store(b.lane(score, 0), b.at4(dst, b.add(b.mul(a, k), candidate)), 4);
            });
        });
        Ok(b.finish())
    }
}
