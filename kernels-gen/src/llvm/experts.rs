//! Choosing experts, sorting their rows, adding up what they make.

use super::Kernels;
use super::body::{Body, LANES, Param};
use crate::KernelError;
use crate::experts::{ExpertLists, Route};
use inkwell::values::{FunctionValue, IntValue, PointerValue, VectorValue};
use inkwell::{FloatPredicate, IntPredicate};
use tilec_ir::graph::Scoring;

use Param::{I64, Ptr};

/// Key of an expert that is chosen already, below all others.
pub(super) const CHOSEN: i64 = i32::MIN as i64;

impl<'a, 'ctx> Kernels<'a, 'ctx> {
    /// The experts of rows and their weights; see the [module](super) for arguments.
    ///
    /// A row's scores are compared as whole numbers that have their order, so that NaN (the least) cannot
    /// keep a slot empty; of equals the lower expert wins.
    ///
    /// # Errors
    /// See [`Route::check`].
    pub fn route(&self, name: &str, route: &Route) -> Result<FunctionValue<'ctx>, KernelError> {
        route.check()?;
        let b = self.kernel(name, &[Ptr, I64, Ptr, Ptr, Ptr, Ptr], &[3, 4, 5]);
        let (scores, rows, correction) = (b.ptr_arg(0), b.int_arg(1), b.ptr_arg(2));
        let (experts, weights, scratch) = (b.ptr_arg(3), b.ptr_arg(4), b.ptr_arg(5));
        let places = Places {
            shares: scratch,
            keys: b.off(scratch, route.padded() * 4),
            chosen: b.off(scratch, route.padded() * 8),
        };
        let top_k = b.size(route.routing.top_k);
        b.count(rows, |row| {
            let scores = b.at4(scores, b.mul(row, b.size(route.experts)));
            let all = b.shares(route, scores, correction, &places);
            b.count(top_k, |_| {
                let best = b.best(&places, route.padded());
                b.store(b.i32().const_int(CHOSEN as u64, true), b.at4(places.keys, best), 4);
            });
            b.collect(&places, route.experts);
            let to = b.mul(row, top_k);
            b.weigh(route, &places, all, b.at4(experts, to), b.at4(weights, to));
        });
        Ok(b.finish())
    }

    /// The slots of a step sorted by expert; see the [module](super) for arguments.
    pub fn expert_lists(&self, name: &str, lists: &ExpertLists) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, Ptr, I64, Ptr], &[3]);
        let (experts, weights, rows, out) = (b.ptr_arg(0), b.ptr_arg(1), b.int_arg(2), b.ptr_arg(3));
        let (starts, cursors) = (out, b.off(out, lists.cursors()));
        let (row_list, weight_list) = (b.off(out, lists.rows()), b.off(out, lists.weights()));
        let slots = b.mul(rows, b.size(lists.top_k));
        let put = |value: IntValue<'ctx>, to: PointerValue<'ctx>| b.store(b.to_i32(value), to, 4);
        b.count(b.size(lists.experts), |expert| put(b.c64(0), b.at4(cursors, expert)));
        b.count(slots, |slot| {
            let cursor = b.at4(cursors, b.load_u32(b.at4(experts, slot)));
            put(b.add(b.load_u32(cursor), b.c64(1)), cursor);
        });
        // From numbers of slots to the places where they start.
        let end = b.carry((b.c64(0), b.size(lists.experts), 1), &[b.c64(0)], |expert, start| {
            let start = start[0].into_int_value();
            let cursor = b.at4(cursors, expert);
            let count = b.load_u32(cursor);
            put(start, b.at4(starts, expert));
            put(start, cursor);
            vec![b.add(start, count)]
        });
        put(end[0].into_int_value(), b.at4(starts, b.size(lists.experts)));
        b.count(slots, |slot| {
            let cursor = b.at4(cursors, b.load_u32(b.at4(experts, slot)));
            let place = b.load_u32(cursor);
            put(b.div_const(slot, lists.top_k), b.at4(row_list, place));
            b.store(b.load(b.f32(), b.at4(weights, slot), 4), b.at4(weight_list, place), 4);
            put(b.add(place, b.c64(1)), cursor);
        });
        b.finish()
    }

    /// Adds slots to their rows, each times its weight; see the [module](super) for arguments.
    pub fn add_slots(&self, name: &str) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, Ptr, Ptr, I64, I64, Ptr, I64], &[0, 6]);
        let (tile, stride, row_list, weights) = (b.ptr_arg(0), b.int_arg(1), b.ptr_arg(2), b.ptr_arg(3));
        let (slots, cols, dst, dst_stride) = (b.int_arg(4), b.int_arg(5), b.ptr_arg(6), b.int_arg(7));
        b.count(slots, |slot| {
            let row = b.load_u32(b.at4(row_list, slot));
            let (from, to) = (b.at4(tile, b.mul(slot, stride)), b.at4(dst, b.mul(row, dst_stride)));
            let weight = b.load_splat(b.at4(weights, slot));
            b.columns(cols, |c, mask| {
                let to = b.at4(to, c);
                let sum = b.fma(b.load_masked(b.at4(from, c), mask), weight, b.load_masked(to, mask));
                b.store_masked(sum, to, mask);
            });
        });
        b.finish()
    }

    /// Sets a tile to zero.
    pub fn clear_rows(&self, name: &str) -> FunctionValue<'ctx> {
        let b = self.kernel(name, &[Ptr, I64, I64, I64], &[0]);
        let (tile, stride, rows, cols) = (b.ptr_arg(0), b.int_arg(1), b.int_arg(2), b.int_arg(3));
        b.count(rows, |row| {
            let x = b.at4(tile, b.mul(row, stride));
            b.columns(cols, |c, mask| b.store_masked(b.f32x().const_zero(), b.at4(x, c), mask));
        });
        b.finish()
    }
}

/// Where a row's scratch lies.
struct Places<'ctx> {
    /// What the weights are made of: f32, an expert each.
    shares: PointerValue<'ctx>,
    /// What is compared: i32, an expert each, padded with [`CHOSEN`] to whole vectors.
    keys: PointerValue<'ctx>,
    /// Numbers of the chosen, ascending, and one place more.
    chosen: PointerValue<'ctx>,
}

impl<'ctx> Body<'_, 'ctx> {
    /// Fills shares and keys of a row; gives the sum of the shares of a softmax.
    fn shares(
        &self,
        route: &Route,
        scores: PointerValue<'ctx>,
        correction: PointerValue<'ctx>,
        places: &Places<'ctx>,
    ) -> VectorValue<'ctx> {
        let lanes = LANES as usize;
        let whole = (self.c64(0), self.size(route.experts / lanes * lanes), u64::from(LANES));
        let tail = route.experts % lanes;
        let mask = (tail > 0).then(|| self.mask_below(self.size(tail)));
        let softmax = route.routing.scoring != Scoring::Sigmoid;
        let largest = softmax.then(|| {
            let lowest = self.cf(f32::NEG_INFINITY);
            let largest = self.carry_v(whole, &[lowest], |c, largest| {
                vec![self.fmax(largest[0], self.load_f(self.at4(scores, c)))]
            })[0];
            let largest = match mask {
                None => largest,
                Some(mask) => {
                    let last = self.load_masked(self.at4(scores, whole.1), Some(mask));
                    self.fmax(largest, self.select(mask, last, lowest))
                }
            };
            self.largest(largest)
        });
        let step = |c: IntValue<'ctx>, mask: Option<VectorValue<'ctx>>| {
            let score = self.load_masked(self.at4(scores, c), mask);
            let share = match largest {
                Some(largest) => self.exp(self.fsub(score, largest)),
                None => self.sigmoid(score),
            };
            let compared = match (softmax, route.correction) {
                (true, _) => score,
                (false, false) => score,
                (false, true) => self.fadd(share, self.load_masked(self.at4(correction, c), mask)),
            };
            self.store(share, self.at4(places.shares, c), 4);
            let key = self.order_key(compared);
            let key = mask.map_or(key, |mask| self.select(mask, key, self.ci(CHOSEN)));
            self.store(key, self.at4(places.keys, c), 4);
            mask.map_or(share, |mask| self.select(mask, share, self.cf(0.0)))
        };
        let sum = self.carry_v(whole, &[self.cf(0.0)], |c, sum| vec![self.fadd(sum[0], step(c, None))])[0];
        let sum = match mask {
            None => sum,
            Some(mask) => self.fadd(sum, step(whole.1, Some(mask))),
        };
        self.sum(sum)
    }

    /// Whole numbers in the order of these floats, -0 with +0; NaN is the least, above [`CHOSEN`].
    pub(crate) fn order_key(&self, x: VectorValue<'ctx>) -> VectorValue<'ctx> {
        let bits = self.as_int(self.fadd(x, self.cf(0.0)));
        let flip = self.and(self.sar(bits, 31), self.ci(0x7fff_ffff));
        // Exclusive or: a negative float's magnitude bits turn over.
        let key = self.isub(self.or(bits, flip), self.and(bits, flip));
        self.select(self.fcmp(FloatPredicate::UNO, x, x), self.ci(CHOSEN + 1), key)
    }

    /// The expert with the largest key, the lowest of equals.
    fn best(&self, places: &Places<'ctx>, padded: usize) -> IntValue<'ctx> {
        let range = (self.c64(0), self.size(padded), u64::from(LANES));
        let initial = [self.ci(CHOSEN), self.ci(i64::from(i32::MAX))];
        let best = self.carry_v(range, &initial, |c, best| {
            let key = self.load_v(self.i32x(), self.at4(places.keys, c), 4);
            let index = self.iadd(self.splat(self.to_i32(c)), self.iota());
            // Later equals do not replace earlier ones.
            let better = self.icmp(IntPredicate::SGT, key, best[0]);
            vec![self.select(better, key, best[0]), self.select(better, index, best[1])]
        });
        let largest = self.tree_of(best[0], |a, b| self.select(self.icmp(IntPredicate::SGT, b, a), b, a));
        let is_best = self.icmp(IntPredicate::EQ, best[0], largest);
        let index = self.select(is_best, best[1], self.ci(i64::from(i32::MAX)));
        let lowest = self.tree_of(index, |a, b| self.select(self.icmp(IntPredicate::SLT, b, a), b, a));
        let lowest = self.lane(lowest, 0).into_int_value();
        self.builder.build_int_z_extend(lowest, self.i64(), "").expect("an index widens")
    }

    /// Lists the chosen in ascending order.
    fn collect(&self, places: &Places<'ctx>, experts: usize) {
        let chosen_key = self.i32().const_int(CHOSEN as u64, true);
        self.carry((self.c64(0), self.size(experts), 1), &[self.c64(0)], |expert, found| {
            let found = found[0].into_int_value();
            let key = self.load(self.i32(), self.at4(places.keys, expert), 4).into_int_value();
            let chosen = self.cmp(IntPredicate::EQ, key, chosen_key);
            // What is not chosen is overwritten by the next; the place behind the last takes the rest.
            self.store(self.to_i32(expert), self.at4(places.chosen, found), 4);
            vec![self.add(found, self.pick(chosen, self.c64(1), self.c64(0)))]
        });
    }

    /// Writes the chosen and their weights.
    fn weigh(
        &self,
        route: &Route,
        places: &Places<'ctx>,
        all: VectorValue<'ctx>,
        experts: PointerValue<'ctx>,
        weights: PointerValue<'ctx>,
    ) {
        let routing = &route.routing;
        let slots = (self.c64(0), self.size(routing.top_k), 1);
        let share = |slot| {
            let expert = self.load_u32(self.at4(places.chosen, slot));
            (expert, self.load_splat(self.at4(places.shares, expert)))
        };
        let of_chosen = routing.renormalize || routing.scoring == Scoring::ChosenSoftmax;
        let total = if of_chosen {
            let zero = self.cf(0.0);
            let sum = self.carry_v(slots, &[zero], |slot, sum| vec![self.fadd(sum[0], share(slot).1)])[0];
            self.fadd(sum, self.cf(1e-20))
        } else if routing.scoring == Scoring::Softmax {
            all
        } else {
            self.cf(1.0)
        };
        self.repeat(slots, |slot| {
            let (expert, share) = share(slot);
            let weight = self.fmul(self.fdiv(share, total), self.cf(routing.factor));
            self.store(self.to_i32(expert), self.at4(experts, slot), 4);
            self.store(self.lane(weight, 0), self.at4(weights, slot), 4);
        });
    }
}
