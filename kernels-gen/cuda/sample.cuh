// The choice of tokens by chance, at the end of a step that asks for it: rounds behind the head's crossing, each of
// which ends with a crossing, until every row's token lies where its largest logit was. All SMs are divided among the
// rows that are chosen so, and a row's ids among its SMs. runtime/src/sampling/draw.rs is the same on a host, and comes
// to the same tokens: all is made of single operations in float32, and of sums of integers, whose order makes no
// difference.
//
// In a round each SM looks at its ids and adds what it counted to a table of the row in memory; in the next one all SMs
// of the row read that table and come to the same decision. Without top_k and top_p, the first look adds up weights by
// SM; the random number says in which SM's ids the token is, and that one finds it. Otherwise it counts among ranks:
// the first look counts the tokens and weights of the best ones in 256 steps of distance. In the step where a number of
// tokens or a sum of weights is reached, a second look lists the tokens, and those of the steps before it as far as
// there is room, and every SM sorts that list. All that is asked for is found in it, most often; where it is not, the
// next look begins with the first one's table again. Where one step has more tokens than the list, it is divided into
// 256 steps once more; where that is not enough, for many are equal, their ranks are told apart by logit and id, a byte
// at a time.

constexpr u32 DIGITS = CONSUMER_THREADS;
constexpr u32 LISTED = 512;              // tokens that the list holds
constexpr float COARSE = 16.f;           // steps of a power of two
constexpr float FINE = COARSE * DIGITS;
constexpr float WINDOW = DIGITS / COARSE;  // distance that coarse digits cover
constexpr float SAMPLE_REACH = 40.f;     // the largest distance of a token that has a weight
constexpr u32 WINDOWS = 3;               // that cover it
constexpr u32 AT_ONCE = 4;               // logits of a lane, and as many on their way
constexpr u32 UNIT = AT_ONCE * LANES;    // ids that a warp looks at together
constexpr u32 BROKEN_LOGITS = 0xfffffffeu;
constexpr u32 NO_LOGITS = 0xfffffffdu;
static_assert(WINDOWS * WINDOW > SAMPLE_REACH);

// What a look at a row brought, summed over its SMs; zero before they add to it.
struct alignas(16) SampleTable {
  u64 weights[DIGITS];
  u32 counts[DIGITS];
  u64 total;         // weights of all tokens
  u64 within;        // of those that min_p lets through
  u32 broken;        // a logit is NaN
  u32 listed;        // tokens in the list
  u32 pad[26];
};

// Of a row, in memory; SAMPLE_ROW_BYTES of ir/src/launch.rs.
struct SampleMemory {
  SampleTable first[2];  // of a step's first look; steps that choose in turn
  SampleTable more[3];   // of the others; rounds of the launch in turn: one is added to, one is read, one is cleared
  u64 list[2][LISTED];   // ranks of listed tokens; rounds of the launch in turn
};
static_assert(sizeof(SampleMemory) == 24192);

enum Goal : u32 { BEGIN, TOP_K, TOP_P, DRAW, DONE };
enum Look : u32 { FIRST, COUNT, LIST, FIND };

// How far a row's choice has come; the same on all of its SMs.
struct SampleState {
  SampleRow asked;
  u64 random;
  u64 total;         // weights of what is kept so far
  u64 within;
  u64 base_weight;   // in front of digit 0, or of the list
  u64 low, high;     // ranks that are looked at; the id is the lower half
  float best;
  float from, to;    // distances that are looked at
  float origin;      // of digit 0
  u32 goal;
  u32 look;          // the last one
  u32 base_count;
  u32 listed;
  u32 window;
  u32 fine;          // digits are fine steps of the distance
  u32 shift;         // digits are these bits of the rank, 8 of them; of the distance if 64
};

// What the consumers tell each other, in the scratch.
struct SampleSpace {
  u64 ranks[LISTED];      // of the listed tokens
  u64 sums[LISTED];       // weights up to each
  uint2 weights[DIGITS];  // in low and high halves: of each digit or piece of ids; then up to each
  u32 counts[DIGITS];
  uint2 total, within;
  u64 parts[2][CONSUMERS];
  u64 left;
  u32 found, first;
  SampleState states[STEP_ROWS];  // of this SM's rows
};

// All consumers, whose lanes may have gone different ways.
__device__ __forceinline__ void sample_sync() {
  __syncwarp();
  consumers_sync();
}

__device__ __forceinline__ u64 joined(uint2 v) { return (u64)v.y << 32 | v.x; }
__device__ __forceinline__ uint2 halves(u64 v) { return make_uint2((u32)v, (u32)(v >> 32)); }

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

// Adds to a number of shared memory.
__device__ __forceinline__ void shared_add(uint2* p, u64 n) {
  const u32 lower = (u32)n, old = shared_add(&p->x, lower);
  const u32 upper = (u32)(n >> 32) + (u32)(old + lower < lower);
  if (upper != 0) shared_add(&p->y, upper);
}
__device__ __forceinline__ void count_token(SampleSpace& s, u32 digit, u64 weight) {
  shared_add(&s.counts[digit], 1);
  shared_add(&s.weights[digit], weight);
}

// The sum of the values up to each thread's. All consumers; before `parts` is used again, they meet.
__device__ __forceinline__ u64 add_up(u64* parts, u64 v) {
  const u32 lane = anew(lane_id()), warp = anew(warp_id());
#pragma unroll 1
  for (u32 x = 1; x < LANES; x *= 2) {
    const u64 other = __shfl_up_sync(~0u, v, x);
    if (lane >= x) v += other;
  }
  if (lane == LANES - 1) parts[warp] = v;
  sample_sync();
  u64 before = lane % CONSUMERS < warp ? parts[lane % CONSUMERS] : 0;
#pragma unroll 1
  for (u32 x = 1; x < CONSUMERS; x *= 2) before += __shfl_xor_sync(~0u, before, x);
  return v + before;
}

__device__ __forceinline__ u64 add_lanes(u64 v) {
#pragma unroll 1
  for (u32 x = 1; x < LANES; x *= 2) v += __shfl_xor_sync(~0u, v, x);
  return v;
}

// What a look brought, up to each digit.
__device__ __forceinline__ void take_table(SampleSpace& s, const SampleTable& of) {
  const u32 n = anew(threadIdx.x);
  const u64 weight = load_relaxed(&of.weights[n]);
  const u32 count = load_relaxed(&of.counts[n]);
  const u64 weights = add_up(s.parts[0], weight), counts = add_up(s.parts[1], count);
  s.weights[n] = halves(weights);
  s.counts[n] = (u32)counts;
  sample_sync();
}

// The list, sorted, with the weights up to each token.
__device__ __forceinline__ void take_list(SampleSpace& s, const u64* list, u32 count, float best, float scale) {
  const u32 n = anew(threadIdx.x);
  u32 size = 2;
#pragma unroll 1
  while (size < count) size *= 2;
  static_assert(LISTED == 2 * DIGITS);
  const u64 a = n < count ? load_relaxed(list + n) : ~0ull, b = n + DIGITS < count ? load_relaxed(list + n + DIGITS) : ~0ull;
  if (n < size) s.ranks[n] = a;
  if (n + DIGITS < size) s.ranks[n + DIGITS] = b;
  sample_sync();
  // Pairs that are `apart`, in runs that rise and fall in turn. A warp has 64 neighbouring places.
#pragma unroll 1
  for (u32 run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (u32 apart = run / 2; apart > 0; apart /= 2) {
      const u32 at = 2 * n - (n & (apart - 1));
      if (at < size) {
        const u64 x = s.ranks[at], y = s.ranks[at + apart];
        if (x > y == ((at & run) == 0)) {
          s.ranks[at] = y;
          s.ranks[at + apart] = x;
        }
      }
      if (apart > LANES || (apart == 1 && run >= 2 * LANES)) sample_sync();
      else __syncwarp();
    }
  }
  sample_sync();
  u64 weights[2];
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    const float logit = from_ordered(~(u32)(s.ranks[2 * n + i] >> 32));
    weights[i] = 2 * n + i < count ? sample_weight(multiply(best - logit, scale)) : 0;
  }
  const u64 up_to = add_up(s.parts[0], weights[0] + weights[1]);
  s.sums[2 * n] = up_to - weights[1];
  s.sums[2 * n + 1] = up_to;
  sample_sync();
}

// Where a row's tokens lie, and what an SM has of them.
struct SampleShare {
  const float* logits;
  SampleMemory* memory;
  u32 row, vocab;
  u32 number, count;  // SMs of the row
  u32 first, end;     // ids
  u32 piece;          // of them: so many ids a warp at a time; at most DIGITS pieces
};

// How a launch's rows that are chosen by chance are dealt out: row `index` of them.
__device__ __forceinline__ SampleShare sample_share(const Block& b, u32 index, u32 rows, u32 vocab) {
  u32 left = b.shared.sampled;
#pragma unroll 1
  for (u32 i = 0; i < index; ++i) left &= left - 1;
  const u32 row = __ffs(left) - 1;
  SampleShare share;
  // Not computed anew for every load.
  share.logits = reinterpret_cast<const float*>(far((u64)(b.args.logits + (u64)row * vocab)));
  share.memory = reinterpret_cast<SampleMemory*>(b.args.choices) + row;
  share.row = row;
  share.vocab = vocab;
  share.number = blockIdx.x / rows;
  share.count = least(index < gridDim.x ? (gridDim.x - 1 - index) / rows + 1 : 1, DIGITS);
  const u32 units = ((vocab + UNIT - 1) / UNIT + share.count - 1) / share.count;
  share.piece = (units + DIGITS - 1) / DIGITS * UNIT;
  share.first = least(share.number * units * UNIT, vocab);
  share.end = least(share.first + units * UNIT, vocab);
  return share;
}

// Logits of a unit, on their way.
struct SampleUnit {
  float x[AT_ONCE];

  __device__ __forceinline__ void load(const SampleShare& share, u32 id) {
    const u32 lane = anew(lane_id());
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) x[i] = load1(share.logits + least(id + i * LANES + lane, share.vocab - 1));
  }
  // The first one of a warp.
  __device__ __forceinline__ void load(const SampleShare& share) { load(share, share.first + anew(warp_id()) * share.piece); }
};

// Looks at this SM's ids, of which a warp's first ones are on their way, and adds what there is to the row's table.
// Pieces' weights stay in the scratch.
__device__ __forceinline__ void look_at(SampleSpace& s, const SampleShare& share, SampleUnit& next, const SampleState& state, u32 look, bool ranked, SampleTable& table, u64* list) {
  const u32 n = anew(threadIdx.x), lane = n % LANES;
  sample_sync();
  s.weights[n] = make_uint2(0, 0);
  s.counts[n] = 0;
  if (n == 0) s.total = s.within = make_uint2(0, 0);
  sample_sync();
  const bool weigh = look == FIRST || look == FIND;
  const bool counting = look == FIRST ? ranked : look == COUNT && state.shift == 64;
  const float best = state.best, scale = state.asked.scale, within = state.asked.reach, reach = state.asked.top_p != 0 ? SAMPLE_REACH : within;
  const float from = state.from, to = state.to, steps = state.fine ? FINE : COARSE, INFINITE = __int_as_float(0x7f800000);
  bool broken = false;
  u64 sum = 0, sum_within = 0;
  u32 number = n / LANES, start = share.first + number * share.piece, id = start;
#pragma unroll 1
  while (id < share.end) {
    const u32 own = id + lane;
    float x[AT_ONCE], distance[AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) x[i] = next.x[i];
    id += UNIT;
    const bool whole = id >= share.end || id == start + share.piece;
    if (whole) id = start += CONSUMERS * share.piece;
    if (id < share.end) next.load(share, id);
    // Without a branch for each: they do not wait for one another.
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) {
      if (own + i * LANES >= share.end) x[i] = -INFINITE;
      broken |= x[i] != x[i];
      distance[i] = multiply(best - x[i], scale);
    }
    u32 hits = 0;
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; ++i) hits |= (u32)(distance[i] <= reach && distance[i] >= from && distance[i] < to) << i;
    if (weigh || counting) {
      u64 weights[AT_ONCE];
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; ++i) {
        const u64 weight = sample_weight(fminf(distance[i], SAMPLE_REACH));
        weights[i] = distance[i] <= reach ? weight : 0;
        sum += weights[i];
        sum_within += distance[i] <= within ? weight : 0;
      }
      if (counting) {
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; ++i) {
          if (hits >> i & 1) count_token(s, (u32)((distance[i] - state.origin) * steps), weights[i]);
        }
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
      const u64 rank = (u64)~ordered(logit) << 32 | (own + i * LANES);
      if (rank < state.low || rank > state.high) continue;
      if (look == LIST) {
        const u32 at = fetch_add_relaxed(&table.listed, 1);
        if (at < LISTED) list[at] = rank;
      } else {
        count_token(s, (u32)(rank >> state.shift) % DIGITS, sample_weight(multiply(best - logit, scale)));
      }
    }
    __syncwarp();
    if (look == FIND && whole) {
      sum = add_lanes(sum);
      if (lane == 0) s.weights[number] = halves(sum);
      number += CONSUMERS;
      sum = 0;
    }
  }
  if (look == FIRST) {
    sum = add_lanes(sum);
    sum_within = add_lanes(sum_within);
    if (lane == 0 && sum != 0) {
      shared_add(&s.total, sum);
      shared_add(&s.within, sum_within);
    }
    if (broken) *(volatile u32*)&table.broken = 1;
  }
  sample_sync();
  if (look == LIST || look == FIND) return;
  const u32 count = s.counts[n];
  if (count != 0) {
    add_relaxed(&table.weights[n], joined(s.weights[n]));
    add_relaxed(&table.counts[n], count);
  }
  if (look == FIRST && n < 3) {
    // Without ranks, an SM is a digit.
    const u64 all = joined(n == 1 ? s.within : s.total);
    u64* const to = n == 0 ? &table.total : n == 1 ? &table.within : &table.weights[share.number];
    if (all != 0 && (n < 2 || !ranked)) add_relaxed(to, all);
  }
}

// The token among this SM's ids, of which `look_at` has left the pieces' weights, where `left` falls behind those
// before them: the piece, then the ids of each thread in it, then one by one.
__device__ __forceinline__ void find_token(SampleSpace& s, const SampleShare& share, const SampleState& state, u64 left, u64* to) {
  const u32 n = anew(threadIdx.x);
  {
    const u64 own = joined(s.weights[n]), before = add_up(s.parts[0], own) - own;
    if (left >= before && left - before < own) { s.found = n; s.left = left - before; }
  }
  sample_sync();
  left = s.left;
  const u32 each = (share.piece + DIGITS - 1) / DIGITS, piece = share.first + s.found * share.piece, start = piece + n * each;
  const u32 end = least(least(start + each, piece + share.piece), share.end);
  u64 before = 0;
#pragma unroll 1
  for (u32 pass = 0; pass < 2; ++pass) {
    u64 sum = 0;
#pragma unroll 1
    for (u32 id = start; id < end; ++id) {
      const float distance = multiply(state.best - load1(share.logits + id), state.asked.scale);
      const u64 weight = distance <= state.asked.reach ? sample_weight(distance) : 0;
      if (pass == 1 && left >= before + sum && left - before - sum < weight) *(volatile u64*)to = (u32)~id;
      sum += weight;
    }
    if (pass == 0) before = add_up(s.parts[1], sum) - sum;
  }
}

// What the looks so far say: the next look, the token (`to`), or by `left` where it is among this SM's ids.
__device__ __forceinline__ Look decide(SampleSpace& s, const SampleShare& share, SampleState& state, u32 round, u32 turn, u64* to, u64& left) {
  const u32 n = anew(threadIdx.x);
  const float reach = state.asked.top_p != 0 ? SAMPLE_REACH : state.asked.reach;
  const bool cuts = state.asked.top_k != 0 && state.asked.top_k < share.vocab, shares = state.asked.top_p != 0;
  SampleMemory& memory = *share.memory;
  const SampleTable* const first_table = &memory.first[turn];
  const SampleTable* table = state.look == FIRST ? first_table : &memory.more[(round + 2) % 3];
  bool listed = state.look == LIST, again = false;
  u32 token = 0, broken = 0;
  if (state.goal == BEGIN) {
    // They come with the table.
    state.total = load_relaxed(&first_table->total);
    state.within = load_relaxed(&first_table->within);
    broken = load_relaxed(&first_table->broken);
  }
  if (listed) take_list(s, memory.list[(round + 1) % 2], state.listed, state.best, state.asked.scale);
#pragma unroll 1
  while (state.goal != DONE) {
    if (again) {
      // From the best ones on.
      table = first_table;
      state.window = state.base_count = state.fine = 0;
      state.base_weight = 0;
      state.shift = 64;
      state.from = state.origin = 0.f;
      state.to = WINDOW;
      state.low = 0;
      state.high = ~0ull;
      listed = again = false;
    }
    if (!listed && table) take_table(s, *table);
    table = nullptr;
    if (state.goal == BEGIN) {
      if (broken != 0 || !(state.best < __int_as_float(0x7f800000))) token = BROKEN_LOGITS;
      else if (state.total == 0) token = NO_LOGITS;
      state.goal = token != 0 ? DONE : cuts ? TOP_K : shares ? TOP_P : DRAW;
      if (state.goal == DONE) break;
    }
    const bool tokens = state.goal == TOP_K;
    u64 target;
    if (tokens) {
      target = state.asked.top_k - 1;
    } else if (state.goal == TOP_P) {
      const u64 kept = __umul64hi(state.asked.top_p, state.total) + (u64)(state.asked.top_p * state.total != 0);
      target = kept == 0 ? 0 : kept - 1;
    } else {
      target = __umul64hi(state.random, state.total < state.within ? state.total : state.within);
    }
    const u64 base = tokens ? state.base_count : state.base_weight, at = target - base;
    if (listed) {
      if (target < base || at >= (tokens ? state.listed : s.sums[state.listed - 1])) {
        again = true;
        continue;
      }
      u32 place = (u32)at;
      if (!tokens) {
#pragma unroll 1
        for (u32 i = n; i < state.listed; i += DIGITS) {
          if (at < s.sums[i] && (i == 0 || at >= s.sums[i - 1])) s.found = i;
        }
        sample_sync();
        place = s.found;
        sample_sync();
      }
      state.total = state.base_weight + s.sums[place];
      token = (u32)s.ranks[place];
      state.goal = state.goal == DRAW ? DONE : tokens && shares ? TOP_P : DRAW;
      continue;
    }
    const bool coarse = state.shift == 64 && !state.fine;
    const u32 all_counts = s.counts[DIGITS - 1];
    const u64 all_weights = joined(s.weights[DIGITS - 1]);
    const bool beyond = at >= (tokens ? all_counts : all_weights);
    if (target < base || (beyond && !coarse)) {
      again = true;
    } else if (beyond && (state.window + 1 == WINDOWS || (state.window + 1) * WINDOW > reach)) {
      state.goal = shares ? TOP_P : DRAW;  // there are fewer tokens than top_k
      again = true;
    } else if (beyond) {
      ++state.window;
      state.base_count += all_counts;
      state.base_weight += all_weights;
      state.from = state.origin = state.window * WINDOW;
      state.to = state.from + WINDOW;
      return COUNT;
    } else {
      const u64 weight_before = n == 0 ? 0 : joined(s.weights[n - 1]);
      const u32 count_before = n == 0 ? 0 : s.counts[n - 1];
      if (at >= (tokens ? count_before : weight_before) && at < (tokens ? s.counts[n] : joined(s.weights[n]))) s.found = n;
      sample_sync();
      const u32 digit = s.found;
      const u64 before = digit == 0 ? 0 : joined(s.weights[digit - 1]);
      if (!cuts && !shares) {
        left = at - before;
        state.goal = DONE;
        return digit == share.number ? FIND : LIST;
      }
      const u32 up_to = s.counts[digit], others = digit == 0 ? 0 : s.counts[digit - 1];
      const float step_size = state.fine ? 1.f / FINE : 1.f / COARSE;
      if (up_to - others > LISTED) {
        // Told apart by finer steps, or the next byte.
        state.base_count += others;
        state.base_weight += before;
        if (state.shift == 64) {
          state.from = state.origin + digit * step_size;
          state.to = state.from + step_size;
          if (coarse) {
            state.origin = state.from;
            state.fine = 1;
          } else {
            state.shift = 56;
          }
        } else {
          state.low |= (u64)digit << state.shift;
          state.high = state.low | ((1ull << state.shift) - 1);
          state.shift -= 8;
        }
        return COUNT;
      }
      // The list: this digit and those before it, as far as there is room.
      const bool fits = n <= digit && up_to - count_before <= LISTED;
      if (fits && (n == 0 || up_to - (n == 1 ? 0 : s.counts[n - 2]) > LISTED)) s.first = n;
      sample_sync();
      const u32 first = s.first;
      if (state.shift == 64) {
        state.from = state.origin + first * step_size;
        state.to = state.origin + (digit + 1) * step_size;
      } else {
        state.high = state.low + ((u64)(digit + 1) << state.shift) - 1;
        state.low |= (u64)first << state.shift;
      }
      state.listed = up_to;
      if (first != 0) {
        state.listed -= s.counts[first - 1];
        state.base_count += s.counts[first - 1];
        state.base_weight += joined(s.weights[first - 1]);
      }
      return LIST;
    }
  }
  if (share.number == 0 && n == 0) *(volatile u64*)to = (u32)~token;
  return LIST;
}

// Clears a table for later rounds.
__device__ __forceinline__ void clear_table(SampleTable& table) {
  const u32 n = anew(threadIdx.x);
  static_assert(sizeof(SampleTable) <= 16 * DIGITS);
  if (n < sizeof(SampleTable) / 16) reinterpret_cast<uint4*>(&table)[n] = make_uint4(0, 0, 0, 0);
}

// Before the first step of a launch that chooses by chance.
__device__ __forceinline__ void sample_begin(Consumer& b, u32 vocab) {
  const u32 row = anew(lane_id());
  const u32 sampled = __ballot_sync(~0u, row < b.args.logit_rows && b.args.sampling[least(row, b.args.logit_rows - 1)].scale != 0.f);
  if (threadIdx.x == 0) b.shared.sampled = sampled;
  sample_sync();
  const u32 rows = __popc(sampled);
  if (rows == 0) return;
#pragma unroll 1
  for (u32 index = blockIdx.x % rows; index < rows; index += gridDim.x) {
    const SampleShare share = sample_share(b, index, rows, vocab);
    if (share.number != 0) continue;
    for (SampleTable& table : share.memory->first) clear_table(table);
    for (SampleTable& table : share.memory->more) clear_table(table);
  }
}

// Round `number` of a step, from 1 on, behind all others.
__device__ __forceinline__ void sample_round(Consumer& b, u32 vocab, u32 number) {
  static_assert(sizeof(SampleSpace) <= SCRATCH_BYTES - SCALE_BYTES);
  SampleSpace& s = *reinterpret_cast<SampleSpace*>(b.scratch);
  const u32 step = b.step - 1, turn = (ROUND ? step / b.round_steps() : step) % 2, round = *(volatile u32*)&b.shared.rounds, rows = __popc(b.shared.sampled);
  u32 own = 0;
#pragma unroll 1
  for (u32 index = rows == 0 ? 0 : blockIdx.x % rows; index < rows; index += gridDim.x, ++own) {
    const SampleShare share = sample_share(b, index, rows, vocab);
    if (share.number >= share.count) continue;
    const u32 row = share.row;
    SampleMemory& memory = *share.memory;
    u64* const best = &b.sync().best[step % 3][row];
    if (share.number == 0) {
      clear_table(memory.more[(round + 1) % 3]);
      if (number == 1) clear_table(memory.first[1 - turn]);
    }
    // Whatever is decided, and while it is.
    SampleUnit unit;
    unit.load(share);
    SampleState state;
    Look look = FIRST;
    u64 left = 0;
    if (number == 1) {
      const u64 key = load_relaxed(best);
      state = {};
      state.asked = b.args.sampling[row];
      state.random = random_bits(state.asked.seed, b.shared.position[b.shared.logit_row[row]] + 1);
      state.best = from_ordered((u32)(key >> 32));
      state.to = WINDOW;
      state.high = ~0ull;
      state.shift = 64;
    } else {
      state = s.states[own];
      if (state.goal == DONE) continue;
      look = decide(s, share, state, round, turn, best, left);
    }
    const bool ranked = state.asked.top_p != 0 || (state.asked.top_k != 0 && state.asked.top_k < vocab);
    if (state.goal != DONE || look == FIND) {
      look_at(s, share, unit, state, look, ranked, look == FIRST ? memory.first[turn] : memory.more[round % 3], memory.list[round % 2]);
    }
    if (look == FIND) find_token(s, share, state, left, best);
    state.look = look;
    sample_sync();
    if (threadIdx.x == 0) {
      s.states[own] = state;
      if (state.goal != DONE && share.number == 0) *(volatile u32*)&b.sync().rounds = round + 2;
    }
  }
  b.finish_stage();
}
