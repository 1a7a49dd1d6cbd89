// The choice of tokens by chance, at the end of a step that asks for it: behind the head's crossing an SM
// chooses for a row, by its parameters, and leaves the token where the row's largest logit was; one more
// crossing. runtime/src/sampling/draw.rs is the same on a host, and comes to the same tokens: all is made of
// single operations in float32, and of sums of integers, whose order makes no difference.
//
// Without top_k and top_p, one look at all logits adds up their weights by segments of ids; the random number
// says in which one the token is, and which it is. Otherwise it counts among ranks: the same look counts the
// tokens and weights of the best ones in 256 steps of distance (those of most rows are few). In the step where a
// number of tokens or a sum of weights is reached, a second look lists the tokens, and those of the steps
// before it as far as there is room. All that is asked for is found in this list, most often; where it is not,
// there is another look. Where one step has more tokens than the list, it is divided into 256 steps once more;
// where that is not enough, for many are equal, their ranks are told apart by logit and id, a byte at a time.

constexpr u32 DIGITS = CONSUMER_THREADS;
constexpr u32 LISTED = 512;              // tokens that the list holds
constexpr float COARSE = 16.f;           // steps of a power of two
constexpr float FINE = COARSE * DIGITS;
constexpr float COARSE_STEP = 1.f / COARSE, FINE_STEP = 1.f / FINE;
constexpr float WINDOW = DIGITS / COARSE;  // distance that coarse digits cover
constexpr float SAMPLE_REACH = 40.f;     // the largest distance of a token that has a weight
constexpr u32 WINDOWS = 3;               // that cover it
constexpr u32 AT_ONCE = 8;               // logits that a lane has on their way
constexpr u32 BROKEN_LOGITS = 0xfffffffeu;
constexpr u32 NO_LOGITS = 0xfffffffdu;
static_assert(WINDOWS * WINDOW > SAMPLE_REACH);

// What the consumers tell each other, in the scratch.
enum SampleTable : u32 { SEGMENTS, SUMS, COUNTS };
struct SampleSpace {
  u64 ranks[LISTED];      // of the listed tokens, by digit; the id is the lower half
  u64 weights[LISTED];
  // Sums, in low and high halves; first of each entry, then up to each: weights of the segments, weights of the
  // digits, tokens of the digits.
  uint2 tables[3][DIGITS];
  u32 cursor[DIGITS];     // tokens of a digit that are listed
  u32 broken;             // a logit is NaN
  u32 digit;
  u32 first;
  u32 token;
  u64 sum;                // weights up to the token
};

// All consumers, whose lanes may have gone different ways.
__device__ __forceinline__ void sample_sync() {
  __syncwarp();
  consumers_sync();
}

__device__ __forceinline__ u64 joined(uint2 v) { return (u64)v.y << 32 | v.x; }
__device__ __forceinline__ uint2 halves(u64 v) { return make_uint2((u32)v, (u32)(v >> 32)); }
__device__ __forceinline__ float from_ordered(u32 v) { return __uint_as_float(v & 0x80000000u ? v & 0x7fffffffu : ~v); }

// 2^-distance in units of 2^-40.
__device__ __forceinline__ u64 sample_weight(float distance) {
  constexpr float WHOLE = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to whole numbers
  const float shifted = distance + WHOLE;
  const float fraction = (shifted - WHOLE) - distance;
  float power = 0.0013264727f;
  power = fmaf(power, fraction, 0.009671513f);
  power = fmaf(power, fraction, 0.055507336f);
  power = fmaf(power, fraction, 0.24022242f);
  power = fmaf(power, fraction, 0.693147f);
  power = fmaf(power, fraction, 1.f);
  return (u64)(__float_as_uint(power + 2.f) & 0x7fffffu) << 18 >> (__float_as_uint(shifted) - __float_as_uint(WHOLE));
}

// Philox4x32 with ten rounds: runtime/src/sampling/philox.rs.
__device__ __forceinline__ u64 random_bits(u64 seed, u32 position) {
  u32 c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll 1
  for (u32 round = 0; round < 10; ++round) {
    const u64 a = (u64)0xd2511f53u * c0, b = (u64)0xcd9e8d57u * c2;
    c0 = (u32)(b >> 32) ^ c1 ^ k0;
    c1 = (u32)b;
    c2 = (u32)(a >> 32) ^ c3 ^ k1;
    c3 = (u32)a;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return (u64)c1 << 32 | c0;
}

__device__ __forceinline__ void count_token(SampleSpace& s, u32 digit, u64 weight) {
  shared_add(&s.tables[COUNTS][digit].x, 1);
  const u32 lower = (u32)weight, old = shared_add(&s.tables[SUMS][digit].x, lower);
  const u32 upper = (u32)(weight >> 32) + (u32)(old + lower < lower);
  if (upper != 0) shared_add(&s.tables[SUMS][digit].y, upper);
}

// Sums up to each entry, of entries that are whole. All consumers.
__device__ __forceinline__ void add_up(uint2* of) {
  const u32 n = anew(threadIdx.x);
#pragma unroll 1
  for (u32 step = 1; step < DIGITS; step *= 2) {
    const u64 other = n >= step ? joined(of[n - step]) : 0;
    sample_sync();
    of[n] = halves(joined(of[n]) + other);
    sample_sync();
  }
}

// The token of a row; the same on all consumers, who all call this.
__device__ __forceinline__ u32 sample_row(SampleSpace& s, const SampleRow& row, const float* logits, u32 vocab, u32 best_key, u64 random) {
  enum Goal : u32 { FLOOR, WEIGH, TOP_K, TOP_P, DRAW };
  const float INFINITE = __int_as_float(0x7f800000);
  const u32 n = anew(threadIdx.x), lane = n % LANES;
  logits = reinterpret_cast<const float*>(far((u64)logits));  // not computed anew for every load
  const float best = from_ordered(best_key), scale = row.scale;
  if (!(best < INFINITE)) return BROKEN_LOGITS;
  const bool cuts = row.top_k != 0 && row.top_k < vocab, shares = row.top_p != 0;
  const bool ranked = cuts || shares;
  const u32 segment = (vocab + 65535) / 65536 * (AT_ONCE * LANES);  // ids of one
  // Where shares are asked for, min_p comes behind them: what it leaves is weighed first.
  Goal goal = shares && row.reach < SAMPLE_REACH ? FLOOR : WEIGH;
  float reach = row.reach;
  u64 floor_total = ~0ull, total = 0;
  // A look: at tokens from the distance `from` to below `to`, at ranks from `low` to `high`, by their digit, which
  // is a step of the distance from `origin` on (`shift` of 64; `steps` of them are one, and multiples of a step are
  // exact), or a byte of the rank.
  bool listing = false;
  float from = 0.f, to = ranked && goal == WEIGH ? WINDOW : 0.f, origin = 0.f, steps = COARSE, step = COARSE_STEP;
  u64 low = 0, high = ~0ull;
  u32 shift = 64, window = 0;
  u32 first = 0, last = DIGITS - 1;  // digits that are listed, or counted
  bool listed = false;
  u64 base_count = 0, base_sum = 0;  // tokens and weights in front of digit 0
  if (n == 0) s.broken = 0;
#pragma unroll 1
  for (;;) {
    sample_sync();
    if (listing) {
      s.cursor[n] = 0;
    } else {
      s.tables[SUMS][n] = s.tables[COUNTS][n] = make_uint2(0, 0);
    }
    if (goal <= WEIGH) s.tables[SEGMENTS][n] = make_uint2(0, 0);
    sample_sync();
    bool broken = false;
    const bool counting = !listing && shift == 64;
#pragma unroll 1
    for (u32 number = n / LANES; number * segment < vocab; number += CONSUMERS) {
      u64 sum = 0;
#pragma unroll 1
      for (u32 part = 0; part < segment; part += AT_ONCE * LANES) {
        const u32 id = number * segment + part + lane;
        float x[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) x[i] = load1(logits + least(id + i * LANES, vocab - 1));
        float distance[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
          if (id + i * LANES >= vocab) x[i] = -INFINITE;
          broken |= x[i] != x[i];
          distance[i] = multiply(best - x[i], scale);
        }
        // Without a branch for each: they do not wait for one another.
        u64 weights[AT_ONCE] = {};
        if (goal <= WEIGH || counting) {
#pragma unroll
          for (u32 i = 0; i < AT_ONCE; ++i) {
            const u64 weight = sample_weight(fminf(distance[i], SAMPLE_REACH));
            weights[i] = distance[i] <= reach ? weight : 0;
            sum += weights[i];
          }
        }
        u32 hits = 0;
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) hits |= (u32)(distance[i] <= reach && distance[i] >= from && distance[i] < to) << i;
        if (counting) {
#pragma unroll
          for (u32 i = 0; i < AT_ONCE; ++i) {
            if (hits >> i & 1) count_token(s, (u32)((distance[i] - origin) * steps), weights[i]);
          }
          hits = 0;
        }
#pragma unroll 1
        while (hits != 0) {
          const u32 i = __ffs(hits) - 1;
          hits &= hits - 1;
          float logit = x[0];
#pragma unroll
          for (u32 k = 1; k < AT_ONCE; ++k) logit = i == k ? x[k] : logit;
          const float distance = multiply(best - logit, scale);
          const u64 rank = (u64)~ordered(logit) << 32 | (id + i * LANES);
          if (rank < low || rank > high) continue;
          const u32 digit = shift == 64 ? (u32)((distance - origin) * steps) : (u32)(rank >> shift) % DIGITS;
          if (digit < first || digit > last) continue;
          const u64 weight = sample_weight(distance);
          if (listing) {
            const u64 before = (digit == 0 ? 0 : joined(s.tables[COUNTS][digit - 1])) - (first == 0 ? 0 : joined(s.tables[COUNTS][first - 1]));
            const u32 at = (u32)before + shared_add(&s.cursor[digit], 1);
            s.ranks[at] = rank;
            s.weights[at] = weight;
          } else {
            count_token(s, digit, weight);
          }
        }
      }
      if (goal <= WEIGH) {
#pragma unroll 1
        for (u32 x = 1; x < LANES; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
        if (lane == 0) s.tables[SEGMENTS][number] = halves(sum);
      }
    }
    if (broken) s.broken = 1;
    sample_sync();
#pragma unroll 1
    for (u32 table = goal <= WEIGH ? SEGMENTS : SUMS; table <= (listing || to == 0.f ? SEGMENTS : COUNTS); ++table) add_up(s.tables[table]);

    if (goal <= WEIGH) {
      if (s.broken != 0) return BROKEN_LOGITS;
      total = joined(s.tables[SEGMENTS][DIGITS - 1]);
      if (total == 0) return NO_LOGITS;
      if (goal == FLOOR) {
        floor_total = total;
        goal = WEIGH;
        reach = SAMPLE_REACH;
        to = WINDOW;
        continue;
      }
      goal = cuts ? TOP_K : shares ? TOP_P : DRAW;
      if (!ranked) break;
    }
    listed = listing;
    listing = false;

    // What is asked for is found among what is known, as long as that is enough. All consumers come to the same.
    bool look = false;
#pragma unroll 1
    while (!look) {
      u64 target;
      if (goal == TOP_K) {
        target = row.top_k - 1;
      } else if (goal == TOP_P) {
        const u64 share = __umul64hi(row.top_p, total) + (u64)(row.top_p * total != 0);
        target = share == 0 ? 0 : share - 1;
      } else {
        target = __umul64hi(random, total < floor_total ? total : floor_total);
      }
      const u64 base = goal == TOP_K ? base_count : base_sum;
      const uint2* of = s.tables[goal == TOP_K ? COUNTS : SUMS];
      const bool beyond = target - base >= joined(of[DIGITS - 1]), coarse = shift == 64 && steps == COARSE;
      if (target < base || (beyond && !coarse)) {
        // From the best ones on again.
        window = 0;
        base_count = base_sum = 0;
        look = true;
      } else if (beyond && window + 1 == WINDOWS) {
        goal = shares ? TOP_P : DRAW;  // there are fewer tokens than top_k
      } else if (beyond) {
        ++window;
        base_count += joined(s.tables[COUNTS][DIGITS - 1]);
        base_sum += joined(s.tables[SUMS][DIGITS - 1]);
        look = true;
      } else {
        const u64 at = target - base;
        if (at < joined(of[n]) && (n == 0 || at >= joined(of[n - 1]))) s.digit = n;
        sample_sync();
        const u32 digit = s.digit;
        const u64 count_before = digit == 0 ? 0 : joined(s.tables[COUNTS][digit - 1]), sum_before = digit == 0 ? 0 : joined(s.tables[SUMS][digit - 1]);
        const u64 count_up_to = joined(s.tables[COUNTS][digit]);
        const u32 tokens = (u32)(count_up_to - count_before);
        if (tokens > LISTED) {
          // Told apart by finer steps, or the next byte.
          base_count += count_before;
          base_sum += sum_before;
          if (shift == 64) {
            from = origin + digit * step;
            to = from + step;
            if (coarse) {
              origin = from;
              steps = FINE;
              step = FINE_STEP;
            } else {
              shift = 56;
            }
          } else {
            low |= (u64)digit << shift;
            high = low | ((1ull << shift) - 1);
            shift -= 8;
          }
          first = 0;
          last = DIGITS - 1;
          break;
        }
        if (!listed || digit < first || digit > last) {
          // The list: this digit and those before it, as far as there is room.
          const u64 before = n == 0 ? 0 : joined(s.tables[COUNTS][n - 1]);
          const bool fits = n <= digit && count_up_to - before <= LISTED;
          if (fits && (n == 0 || count_up_to - (n == 1 ? 0 : joined(s.tables[COUNTS][n - 2])) > LISTED)) s.first = n;
          sample_sync();
          first = s.first;
          last = digit;
          if (shift == 64) {
            from = origin + first * step;
            to = origin + (last + 1) * step;
          }
          listing = true;
          break;
        }
        const u32 start = (u32)(count_before - (first == 0 ? 0 : joined(s.tables[COUNTS][first - 1])));
#pragma unroll 1
        for (u32 i = n; i < tokens; i += DIGITS) {
          const u64 rank = s.ranks[start + i], weight = s.weights[start + i];
          u64 count = 0, sum = 0;
#pragma unroll 1
          for (u32 k = start; k < start + tokens; ++k) {
            if (s.ranks[k] < rank) { ++count; sum += s.weights[k]; }
          }
          const u64 left = at - (goal == TOP_K ? count_before + count : sum_before + sum);
          // Wraps around where the target is before this token.
          if (left < (goal == TOP_K ? 1 : weight)) {
            s.token = (u32)rank;
            s.sum = base_sum + sum_before + sum + weight;
          }
        }
        sample_sync();
        const u32 token = s.token;
        total = s.sum;
        sample_sync();
        if (goal == DRAW) return token;
        goal = goal == TOP_K && shares ? TOP_P : DRAW;
      }
      if (look) {
        // The window's digits.
        shift = 64;
        steps = COARSE;
        step = COARSE_STEP;
        origin = from = window * WINDOW;
        to = from + WINDOW;
        low = 0;
        high = ~0ull;
        first = 0;
        last = DIGITS - 1;
      }
    }
  }

  // In the order of ids: the segment, then the ids of each thread in it, then one by one.
  u64 left = __umul64hi(random, total);
  {
    const u64 before = n == 0 ? 0 : joined(s.tables[SEGMENTS][n - 1]);
    if (left >= before && left < joined(s.tables[SEGMENTS][n])) { s.digit = n; s.sum = before; }
  }
  sample_sync();
  left -= s.sum;
  const u32 each = segment / DIGITS, start = s.digit * segment + n * each;
  u64 own = 0;
#pragma unroll 1
  for (u32 pass = 0; pass < 2; ++pass) {
    u64 sum = 0;
#pragma unroll 1
    for (u32 id = start; id < start + each && id < vocab; ++id) {
      const float distance = multiply(best - load1(logits + id), scale);
      const u64 weight = distance <= reach ? sample_weight(distance) : 0;
      if (pass == 1 && left >= own + sum && left - own - sum < weight) s.token = id;
      sum += weight;
    }
    if (pass == 0) {
      s.tables[SUMS][n] = halves(sum);
      sample_sync();
      add_up(s.tables[SUMS]);
      own = joined(s.tables[SUMS][n]) - sum;
    }
  }
  sample_sync();
  return s.token;
}

// The rows' tokens, a row an SM.
__device__ __forceinline__ void sample(Consumer& b, u32 vocab) {
  static_assert(sizeof(SampleSpace) <= SCRATCH_BYTES - SCALE_BYTES);
  b.wait_inputs();
  SampleSpace& space = *reinterpret_cast<SampleSpace*>(b.scratch);
#pragma unroll 1
  for (u32 row = anew(blockIdx.x); row < b.args.logit_rows; row += gridDim.x) {
    const SampleRow parameters = b.args.sampling[row];
    if (parameters.scale == 0.f) continue;  // the largest logit
    u64* best = &b.sync().best[b.step % 3][row];
    const u64 key = load_relaxed(best);
    const u64 random = random_bits(parameters.seed, b.shared.position[b.shared.logit_row[row]] + 1);
    const u32 token = sample_row(space, parameters, b.args.logits + (u64)row * vocab, vocab, (u32)(key >> 32), random);
    sample_sync();
    if (threadIdx.x == 0) *(volatile u64*)best = (u32)~token;
  }
  b.finish_stage();
}
