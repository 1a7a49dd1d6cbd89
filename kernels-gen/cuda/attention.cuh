// Attention of a step's rows over the paged KV cache, grouped-query, split over the context and over the queries,
// on the tensor cores: causal, or such that a row also sees the rows of its run behind it.
//
// What a run, a pass and a chunk are: units.cuh. What an SM's units are, and how their sums come together: sweeps.cuh, and for
// wide heads chunks.cuh. Here is what both do with a warp's positions, with the step's own rows, and with sums in memory.
// What is older than the step comes from the ring, or from memory. The chunk that a row itself lies in takes its key and value
// from the step, normed and rotated by each unit that needs them, and written into the cache by the one that has the row's
// first head.
//
// A warp has 16 positions of the chunk and keeps their keys and values in registers, as they lie in the
// cache (`key_at`, `value_at`). Lane 4g + t:
//   keys     16 bytes of the positions 4(g/2) + 2i + g%2 (tile i of 2), columns 32s + 8t and on
//   scores   query g, positions 4t to 4t + 3, whole: the product has 16 rows, the upper 8 are the queries
//            in the cache's type, the lower 8 what that rounding left over, and a lane has both sums
//   values   16 bytes of the positions 4t to 4t + 3, columns 64s + 8g and on
//   sums     query g, columns 64s + 16t to 64s + 16t + 15
// The orders of positions and columns inside the products are chosen so that nothing moves between lanes;
// weights are split into rounded and left over as the queries are. Sums of the warps are added up through shared
// memory, 64 columns at a time: warp n has the pass's query n, its lane l the columns 64s + 2l and 64s + 2l + 1.
//
// Sums of units that belong together lie in memory as parts, and whoever has the last of them adds them up, in the order of the
// positions. Parts are told by what they are (handoff.cuh): nobody counts them. Their memory is late words but for the time
// between who leaves a part and who reads it, once, and makes it late again; a launch begins with that. Chunks and spans lie at
// absolute positions, so a row's bits depend neither on who has which unit nor on its neighbours; and only on the
// rows that it sees, as long as the values of those behind it in the run are finite (an unseen value is
// multiplied by 0).
//
// A stage A says:
//   HEADS, KV_HEADS, QK, V     query heads, KV heads, columns of a key and of a value
//   CACHE_HEADS                KV heads that the cache has room for: the most that a layer has
//   SCALE, VALUE_SCALE         factors on the scores and, before they are cached, on the values
//   WINDOWED, window(b)        whether rows see only so many positions; NO_WINDOW of a layer without
//   deal(b)                    number of the kind of layers that units are dealt out alike for
//   BOTH_WAYS                  whether a row sees the rows of its run behind it, as far as a window goes
//   Kv, Out                    Bf16 or F16; Bf16 or F32
//   Q_NORM, K_NORM, EPS        whether heads are normed
//   SINKS, sinks(b)            whether heads have a score that carries no value, and these [HEADS]; null of a layer without
//   ROPE                       leading columns of a head that are rotated, 0 for none
//   PAGE_TOKENS, V_PAD, MAX_CHUNKS, MAX_PARTS (of a row and a head), NEAR_SPAN, FAR_SPAN (sweeps.cuh)
//   CHECKED                    whether queries, keys and values may be late (handoff.cuh)
//   kv(b)                      the cache: that of the model, or of a draft
//   q_gain(b), k_gain(b), rope(b) [positions][ROPE/2] cosines then sines, input(b) [rows][(HEADS +
//   KV_HEADS) * QK + KV_HEADS * V] f32, out(b) [rows][HEADS * V], parts(b)

// Brings numbers into L2, a line of 128 bytes a lane.
__device__ __forceinline__ void prefetch(const float* from, u32 count) {
  if (lane_id() * 32 < count) prefetch_line(from + lane_id() * 32);
}

// The sink of a head; where the layer has none, one that adds nothing.
template <class A> __device__ __forceinline__ float sink_of(const Block& b, u32 head) {
  return A::sinks(b) ? A::sinks(b)[head] : MINUS_INFINITY;
}

template <class A> struct AttentionSpace {
  static constexpr u32 K_STEPS = (A::QK + 31) / 32, V_STEPS = (A::V + 63) / 64;
  // Columns of a query, each rounded and what is left over, in the order of the products: see `query_at`. Two
  // queries that follow each other meet all banks.
  u16 q[QUERIES][K_STEPS * 64 + 8];
  u16 keys[STEP_ROWS][A::QK];    // of the run's rows in the chunk, as they go into the cache
  u16 values[STEP_ROWS][A::V];
  float sums[CONSUMERS][QUERIES][SUMMED];  // fours of columns in the order of `sums_at`
};

// Where a query's column lies; what is left over of it lies two further on. A lane's eight columns become two
// operands: the pairs 0 and 2, then 1 and 3, each with what is left over.
__device__ __forceinline__ u32 query_at(u32 column) { return column / 8 * 16 + column / 2 % 2 * 8 + column / 4 % 2 * 4 + column % 2; }

// Where the columns 16t to 16t + 3 of a query's sums lie; the fours behind them follow by `^ 4`, `^ 8`, `^ 12`. So
// eight lanes that store meet all banks.
__device__ __forceinline__ u32 sums_at(u32 query, u32 t) { return t * 16 + (t / 2 + query % 2 * 2) * 4; }

// A query's sums over positions: columns that a lane has, relative to the largest score of them, with the sum of the
// weights.
template <class A> struct Attended {
  static constexpr u32 V_STEPS = (A::V + 63) / 64;
  float top, total;
  float2 v[V_STEPS];
  __device__ __forceinline__ void clear() {
    top = MINUS_INFINITY;
    total = 0.f;
#pragma unroll
    for (u32 s = 0; s < V_STEPS; ++s) v[s] = make_float2(0.f, 0.f);
  }
  // Adds those of the positions that follow. One of two factors is 1.
  __device__ __forceinline__ void add(const Attended& next) {
    float own, others;
    follow(make_float2(next.top, next.total), own, others);
#pragma unroll
    for (u32 s = 0; s < V_STEPS; ++s) v[s] = make_float2(fmaf(others, next.v[s].x, own * v[s].x), fmaf(others, next.v[s].y, own * v[s].y));
  }
  // The same of the largest score and the sum of the weights: gives the factors of what is there and of what follows.
  __device__ __forceinline__ void follow(float2 next, float& own, float& others) {
    const float factor = power_of_two(-fabsf(top - next.x));
    const bool higher = next.x > top;
    own = higher ? factor : 1.f;
    others = higher ? 1.f : factor;
    top = higher ? next.x : top;
    total = fmaf(others, next.y, own * total);
  }
  __device__ __forceinline__ void add(float own, float others, float next, const float2 (&of)[V_STEPS]) {
    total = fmaf(others, next, own * total);
#pragma unroll
    for (u32 s = 0; s < V_STEPS; ++s) v[s] = make_float2(fmaf(others, of[s].x, own * v[s].x), fmaf(others, of[s].y, own * v[s].y));
  }
};

// The sums of rows that are spread over SMs: [row][kv head][span of the row (sweeps.cuh), or its chunk, then its span
// (chunks.cuh)][head of the group].
template <class A> struct Parts {
  float* base;
  static constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  static constexpr u32 SLOTS = A::MAX_PARTS;
  static_assert((u64)STEP_ROWS * A::HEADS * SLOTS * A::V < 1ull << 32, "a word says where a part lies");
  // Slots that follow each other are GROUP apart.
  __device__ __forceinline__ u32 at(u32 row, u32 kv_head, u32 slot, u32 h) const {
    return ((row * A::KV_HEADS + kv_head) * SLOTS + slot) * GROUP + h;
  }
  __device__ __forceinline__ float2* sum(u32 at) const { return reinterpret_cast<float2*>(base + at * A::V) + lane_id(); }
  __device__ __forceinline__ float2* weight(u32 at) const {
    return reinterpret_cast<float2*>(base + (u64)STEP_ROWS * A::HEADS * SLOTS * A::V) + at;
  }
};

// Whether a lane's columns of a step are some.
template <class A> __device__ __forceinline__ bool has_columns(u32 step) { return A::V % 64 == 0 || step * 64 + lane_id() * 2 < A::V; }

// One head of QK columns on its way through norm and rope; a warp. Lane l has the columns l, l + 32, ...
template <class A, bool NORMS> struct AttentionHead {
  static constexpr u32 EACH = (A::QK + LANES - 1) / LANES, TURNED = (A::ROPE + LANES - 1) / LANES, HALF = A::ROPE / 2;
  // Both columns of a pair are a lane's own.
  static constexpr bool OWN = HALF % LANES == 0;
  static constexpr u32 ANGLES = OWN ? HALF / LANES : TURNED;
  float v[EACH];
  float gain[NORMS ? EACH : 1];
  float c[ANGLES > 0 ? ANGLES : 1], s[ANGLES > 0 ? ANGLES : 1];

  // Asks for all that it takes.
  __device__ __forceinline__ void load(const float* raw, const float* gains, const float* rope, u32 position) {
    load_place(gains, rope, position);
    load(raw);
  }
  // What is there before the step's rows are.
  __device__ __forceinline__ void load_place(const float* gains, const float* rope, u32 position) {
#pragma unroll
    for (u32 i = 0; i < ANGLES; ++i) {
      const u32 d = lane_id() + i * LANES;
      const float* at = rope + (u64)position * HALF + (d < HALF ? d : d - HALF);
      c[i] = OWN || d < A::ROPE ? *at : 1.f;
      s[i] = OWN || d < A::ROPE ? at[(u64)A::POSITIONS * HALF] : 0.f;
    }
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
      const u32 d = lane_id() + i * LANES;
      if (NORMS && gains) gain[i] = A::QK % LANES == 0 || d < A::QK ? gains[d] : 0.f;
    }
  }
  // The head itself.
  __device__ __forceinline__ void load(const float* raw) {
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
      const u32 d = lane_id() + i * LANES;
      v[i] = A::QK % LANES == 0 || d < A::QK ? take1<A::CHECKED>(raw + d) : 0.f;
    }
  }
  // A lane's largest word of the head.
  __device__ __forceinline__ u32 word() const {
    u32 m = 0;
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) m = largest_word(m, __float_as_uint(v[i]));
    return m;
  }
  __device__ __forceinline__ void turn(bool norm) {
    if (NORMS && norm) {
      float sum = 0.f;
#pragma unroll
      for (u32 i = 0; i < EACH; ++i) sum = fmaf(v[i], v[i], sum);
#pragma unroll
      for (u32 x = LANES / 2; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
      const float rms = normalizing(sum, A::QK, A::EPS);
#pragma unroll
      for (u32 i = 0; i < EACH; ++i) v[i] = v[i] * rms * gain[i];
    }
    float old[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) old[i] = v[i];
#pragma unroll
    for (u32 i = 0; i < TURNED; ++i) {
      const u32 d = lane_id() + i * LANES;
      if constexpr (OWN) {
        constexpr u32 STEP = HALF / LANES;
        v[i] = i < STEP ? old[i] * c[i] - old[i + STEP] * s[i] : old[i] * c[i - STEP] + old[i - STEP] * s[i - STEP];
      } else {
        // The other column of the pair lies HALF further on, or back, in one of two registers of another lane.
        const float ahead = turned(old, i, HALF), back = turned(old, i, 0u - HALF);
        if (d < A::ROPE) v[i] = d < HALF ? old[i] * c[i] - ahead * s[i] : old[i] * c[i] + back * s[i];
      }
    }
  }
  // Column l + 32i + `by` of a head; any number if there is no such column.
  __device__ __forceinline__ static float turned(const float (&v)[EACH], u32 i, u32 by) {
    const u32 from = lane_id() + i * LANES + by;
    float found = 0.f;
#pragma unroll
    for (u32 j = 0; j < EACH; ++j) {
      const float other = __shfl_sync(~0u, v[j], from % LANES);
      if (from / LANES == j) found = other;
    }
    return found;
  }
};

// A pair of a row of what attention makes.
template <class A> __device__ __forceinline__ void store_out(Bf16, u16* out, u32 row, u32 column, float2 v) {
  out += half_at(row, column_place(column, A::ORDER), A::HEADS * A::V);
  hand_on(reinterpret_cast<u32*>(out), Bf16::pack(v.x, v.y));
}
template <class A> __device__ __forceinline__ void store_out(F32, float* out, u32 row, u32 column, float2 v) {
  hand_on(out + row * (A::HEADS * A::V) + column, v);
}

// The last position that a row sees, whose run ends in `last`.
template <class A> __device__ __forceinline__ u32 last_seen(const Block& b, u32 position, u32 last) {
  if constexpr (!A::BOTH_WAYS) return position;
  return A::WINDOWED && position + A::window(b) - 1 < last ? position + A::window(b) - 1 : last;
}

// Where a key's column lies among a page's keys of a head. Those of 16 positions lie as a warp loads them (Cached): 32
// columns of the positions 0, 1, 4, 5, 8, 9, 12, 13, then of the others, then the next 32; so a load is four whole lines
// (rows.cuh), and from shared memory meets each bank once. `column` is one of the 32 of a step.
template <class A> __device__ __forceinline__ u32 key_at(u32 position, u32 step, u32 column) {
  const u32 p = position % WARP_POSITIONS, width = A::QK % 32 == 0 ? 32 : least(A::QK - step * 32, 32);
  const u32 line = p / 2 % 2 * 8 + p / 4 * 2 + p % 2;
  return (position - p) * A::QK + line * width + column + step * (WARP_POSITIONS * 32);
}

// Where a value's column lies among a page's values of a head. Those of 16 positions lie as a warp loads them (Cached): of the
// positions 0, 4, 8, 12 eight columns each, then the next eight, up to 64; then those of the positions 1, 5, 9, 13, and so
// on; then the next 64 columns. So a load meets each bank once.
template <class A> __device__ __forceinline__ u32 value_at(u32 position, u32 column) {
  const u32 p = position % WARP_POSITIONS, step = column / 64, width = least(A::V_PAD - step * 64, 64);
  return (position - p) * A::V_PAD + step * (WARP_POSITIONS * 64) + p % 4 * (width * 4) + column % 64 / 8 * 32 + p / 4 * 8 + column % 8;
}

// A warp's keys and values of a chunk, in registers. Positions that nobody may see have any key, and a value of the same
// sequence or 0.
template <class A> struct Cached {
  using Space = AttentionSpace<A>;
  uint4 k[2][Space::K_STEPS];
  uint4 v[Space::V_STEPS][4];

  // Of the keys' tile i; that of the other tile is 2 further on.
  __device__ __forceinline__ static u32 key_position() {
    const u32 g = lane_id() / 4;
    return g / 2 * 4 + g % 2;
  }
  __device__ __forceinline__ static u32 base(const Place<A>& at) { return at.chunk * CHUNK + anew(warp_id()) * WARP_POSITIONS; }
  // Where they do not come through the ring: asks for the page of the warp's positions, for none if nobody sees one that is
  // older than the step. It comes into shared memory: a load on its way to a register would be waited for together with
  // those of keys and values.
  __device__ __forceinline__ static void ask_page(const Consumer& b, const Place<A>& at) {
    if (lane_id() != 0) return;
    u32& to = b.shared.pages[anew(warp_id())];
    if (!has_older(b, at)) to = NO_PAGE;
    else copy_word(&to, b.args.page_table + (u64)b.shared.sequence[at.row] * b.args.pages_per_sequence + base(at) / A::PAGE_TOKENS);
    copy_group();
  }
  // It is there.
  __device__ __forceinline__ static u32 asked_page(const Consumer& b) {
    copy_wait<0>();
    __syncwarp();
    return b.shared.pages[anew(warp_id())];
  }
  __device__ __forceinline__ static bool has_older(const Consumer& b, const Place<A>& at) {
    const u32 first = base(at);
    return first < at.position && !(A::WINDOWED && first + WARP_POSITIONS + A::window(b) <= at.position + 1);
  }
  __device__ __forceinline__ void load(const u8* block, const Place<A>& at) {
    const u32 in_page = base(at) % A::PAGE_TOKENS;
    const u8 *const keys = block + in_page * (A::QK * 2), *const values = block + (A::PAGE_TOKENS * A::QK + in_page * A::V_PAD) * 2;
    each_key([&](u32 i, u32 s, u32 offset) { k[i][s] = load4(reinterpret_cast<const u32*>(keys + offset)); });
    each_value(at.position - 1 - base(at), [&](u32 i, u32 s, u32 offset) { v[s][i] = load4(reinterpret_cast<const u32*>(values + offset)); });
  }
  // The chunk's keys and values, which are next in the ring. Gives how many slots have to be given back (`read`).
  __device__ __forceinline__ u32 take(Consumer& b, const Place<A>& at) {
    using Page = PageShape<A>;
    constexpr u32 MOST = Page::PAGES * Page::PIECES, TOGETHER = least(MOST, RING_SLOTS);
    const ChunkPages<A> pages = ChunkPages<A>::of(b, at);
    // What this warp reads of them, if anything: its page's.
    const u32 first = base(at), tile = anew(warp_id()) % Page::TILES, page = anew(warp_id()) / Page::TILES - pages.first;
    const bool own = whole_warp(has_older(b, at));
    const u32 keys = page * Page::PIECES + (Page::WHOLE ? 0 : tile / Page::KEY_TILES);
    const u32 values = page * Page::PIECES + (Page::WHOLE ? 0 : Page::KEY_PIECES + tile / Page::VALUE_TILES);
    u32 left = pages.count * Page::PIECES;
    if (!own) clear_values();
#pragma unroll 1
    for (u32 passed = 0;; passed += TOGETHER) {
      // A short ring has not all of them at once.
      const u32 count = MOST > TOGETHER ? least(left, TOGETHER) : left;
      b.wait_slots(count);
      if (own && keys - passed < count) load_keys(b.slot_ahead(keys - passed) + tile % Page::KEY_TILES * (WARP_POSITIONS * A::QK * 2));
      if (own && values - passed < count) {
        const u8* const from = b.slot_ahead(values - passed) + (Page::WHOLE ? CacheShape<A>::KEY_BYTES : 0);
        load_values(from + tile % Page::VALUE_TILES * (WARP_POSITIONS * A::V_PAD * 2), at.position - 1 - first);
      }
      if (MOST == TOGETHER || count == left) return count;
      b.give_back(count, read());
      left -= count;
    }
  }
  // Bits of all that was loaded.
  __device__ __forceinline__ u32 read() const {
    u32 bits = 0;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
#pragma unroll
      for (u32 s = 0; s < Space::K_STEPS; ++s) bits |= k[i][s].x;
    }
#pragma unroll
    for (u32 s = 0; s < Space::V_STEPS; ++s) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) bits |= v[s][i].x;
    }
    return bits;
  }
  // Where none is older than the step: what another sequence has left here is multiplied by 0, and need not be finite.
  __device__ __forceinline__ void clear_values() {
#pragma unroll
    for (u32 s = 0; s < Space::V_STEPS; ++s) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) v[s][i] = make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ void load_keys(const u8* from) {
    each_key([&](u32 i, u32 s, u32 offset) { k[i][s] = *reinterpret_cast<const uint4*>(from + offset); });
  }
  // A lane's pieces of a tile's keys, and how many bytes behind the first each lies (`key_at`).
  template <class F> __device__ __forceinline__ static void each_key(F piece) {
    const u32 lane = anew(lane_id()), g = lane / 4, column = lane % 4 * 8;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
#pragma unroll
      for (u32 s = 0; s < Space::K_STEPS; ++s) {
        const u32 width = A::QK % 32 == 0 ? 32 : least(A::QK - s * 32, 32);
        if (A::QK % 32 == 0 || s * 32 + column < A::QK) piece(i, s, (s * (WARP_POSITIONS * 32) + (i * 8 + g) * width + column) * 2);
      }
    }
  }
  __device__ __forceinline__ void load_values(const u8* from, u32 last) {
    each_value(last, [&](u32 i, u32 s, u32 offset) { v[s][i] = *reinterpret_cast<const uint4*>(from + offset); });
  }
  // A lane's pieces of a tile's values, and how many bytes behind the first each lies (`value_at`). What lies behind the `last`
  // older position may never have been written: that one in its place.
  template <class F> __device__ __forceinline__ static void each_value(u32 last, F piece) {
    const u32 lane = anew(lane_id()), g = lane / 4;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 p = least(lane % 4 * 4 + i, last);
#pragma unroll
      for (u32 s = 0; s < Space::V_STEPS; ++s) {
        if (A::V % 64 == 0 || s * 64 + g * 8 < A::V) piece(i, s, value_at<A>(p, s * 64 + g * 8) * 2);
      }
    }
  }
  // The step's own rows among the warp's positions, from shared memory; `from` is the first one's position.
  __device__ __forceinline__ void take_fresh(const Space& space, u32 base, u32 from, u32 count) {
    const u32 k_column = lane_id() % 4 * 8, v_column = lane_id() / 4 * 8;
    if (base + WARP_POSITIONS <= from || base >= from + count) return;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 n = base + key_position() + i * 2 - from;  // wraps around in front of them
      if (n >= count) continue;
#pragma unroll
      for (u32 s = 0; s < Space::K_STEPS; ++s) {
        if (A::QK % 32 == 0 || s * 32 + k_column < A::QK) k[i][s] = *reinterpret_cast<const uint4*>(&space.keys[n][s * 32 + k_column]);
      }
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 n = base + lane_id() % 4 * 4 + i - from;
      if (n >= count) continue;
#pragma unroll
      for (u32 s = 0; s < Space::V_STEPS; ++s) {
        if (A::V % 64 == 0 || s * 64 + v_column < A::V) v[s][i] = *reinterpret_cast<const uint4*>(&space.values[n][s * 64 + v_column]);
      }
    }
  }
};

// One register of a pair of positions: their columns 2r (or 2r + 1, `high`) side by side.
__device__ __forceinline__ u32 pair_up(u32 first, u32 second, bool high) { return __byte_perm(first, second, high ? 0x7632 : 0x5410); }

// Two numbers as a pair of halves, and what the rounding left over.
template <class Kv> __device__ __forceinline__ void split_pair(float low, float high, u32& rounded, u32& rest) {
  rounded = Kv::pack(low, high);
  rest = Kv::pack(low - Kv::low(rounded), high - Kv::high(rounded));
}

// Scores of the pass's query g at the positions 4t to 4t + 3, in units of log2.
template <class A> __device__ __forceinline__ void scores(const AttentionSpace<A>& space, const Cached<A>& cached, float (&score)[4]) {
  using Space = AttentionSpace<A>;
  const u32 g = lane_id() / 4, t = lane_id() % 4;
  float even[2][4] = {}, odd[2][4] = {};
#pragma unroll
  for (u32 s = 0; s < Space::K_STEPS; ++s) {
    const uint4* q = reinterpret_cast<const uint4*>(&space.q[g][s * 64 + t * 16]);
    const uint4 x = q[0], y = q[1];
    const u32 first[4] = {x.x, x.y, x.z, x.w}, second[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      mma(typename A::Kv(), even[i], first, cached.k[i][s].x, cached.k[i][s].z);
      mma(typename A::Kv(), odd[i], second, cached.k[i][s].y, cached.k[i][s].w);
    }
  }
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    score[2 * i] = (even[i][0] + odd[i][0]) + (even[i][2] + odd[i][2]);
    score[2 * i + 1] = (even[i][1] + odd[i][1]) + (even[i][3] + odd[i][3]);
  }
}

// Weights of a tile's scores, relative to the largest, `top`, of which this lane has its own part at first, and that of earlier
// tiles if their sums are kept: as pairs of halves; gives their sum.
template <class A> __device__ __forceinline__ float weigh(float (&score)[4], float& top, u32 (&weight)[4]) {
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  const float relative_to = top == MINUS_INFINITY ? 0.f : top;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) score[i] = power_of_two(score[i] - relative_to);
  float total = (score[0] + score[1]) + (score[2] + score[3]);
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  split_pair<typename A::Kv>(score[0], score[1], weight[0], weight[1]);
  split_pair<typename A::Kv>(score[2], score[3], weight[2], weight[3]);
  return total;
}

// Weights times a tile's values: of query g the columns 16t to 16t + 15 of 64.
template <class A> __device__ __forceinline__ void weighted(const u32 (&weight)[4], const uint4 (&v)[4], float (&products)[16]) {
  const u32 one[4] = {v[0].x, v[0].y, v[0].z, v[0].w}, two[4] = {v[1].x, v[1].y, v[1].z, v[1].w};
  const u32 three[4] = {v[2].x, v[2].y, v[2].z, v[2].w}, four[4] = {v[3].x, v[3].y, v[3].z, v[3].w};
#pragma unroll
  for (u32 j = 0; j < 8; ++j) {
    float d[4] = {};
    mma(typename A::Kv(), d, weight, pair_up(one[j / 2], two[j / 2], j % 2), pair_up(three[j / 2], four[j / 2], j % 2));
    products[j] = d[0] + d[2];
    products[8 + j] = d[1] + d[3];
  }
}

// Leaves a warp's sums of 64 columns where all warps find them: of query g the columns 16t to 16t + 15.
template <class A> __device__ __forceinline__ void store_sums(AttentionSpace<A>& space, const float (&sums)[16]) {
  const u32 lane = anew(lane_id()), g = lane / 4, at = sums_at(g, lane % 4);
  float* const to = space.sums[anew(warp_id())][g];
#pragma unroll
  for (u32 j = 0; j < 4; ++j) *reinterpret_cast<float4*>(to + (at ^ j * 4)) = make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
}

// Adds up what the warps have left of step s's columns, of query `warp` of the pass. `weights`: the largest score of each warp's
// positions, and the sum of the weights relative to it, by query; `factor`, of lane l, is that of the sums of warp l % 8,
// found with the first step.
template <class A> __device__ __forceinline__ void add_warps(const AttentionSpace<A>& space, const float2 (&weights)[CONSUMERS][QUERIES], u32 s, float& factor, Attended<A>& all) {
  const u32 warp = anew(warp_id()), lane = anew(lane_id());
  if (s == 0) {
    const float2 own = weights[lane % CONSUMERS][warp];
    all.top = own.x;
#pragma unroll
    for (u32 x = 1; x < CONSUMERS; x *= 2) all.top = fmaxf(all.top, __shfl_xor_sync(~0u, all.top, x));
    factor = power_of_two(own.x - all.top);
    all.total = multiply(factor, own.y);
#pragma unroll
    for (u32 x = 1; x < CONSUMERS; x *= 2) all.total += __shfl_xor_sync(~0u, all.total, x);
  }
  const float* of = space.sums[0][warp] + (sums_at(warp, lane / 8) ^ lane / 2 % 4 * 4) + lane % 2 * 2;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll
  for (u32 w = 0; w < CONSUMERS; ++w) {
    const float2 own = *reinterpret_cast<const float2*>(of + w * QUERIES * SUMMED);
    const float f = __shfl_sync(~0u, factor, w);
    sum = make_float2(fmaf(f, own.x, sum.x), fmaf(f, own.y, sum.y));
  }
  all.v[s] = sum;
}

// What a pass needs of the step: a warp has one of its queries, and a row of the run in the unit if that begins.
template <class A> struct Fresh {
  static constexpr u32 GROUP = A::HEADS / A::KV_HEADS, V_EACH = (A::V + LANES - 1) / LANES;
  static constexpr u32 QKV = (A::HEADS + A::KV_HEADS) * A::QK + A::KV_HEADS * A::V;
  using Head = AttentionHead<A, A::Q_NORM || A::K_NORM>;
  Head query, key;
  float value[V_EACH];
  u32 page;         // of the key and the value in the cache
  float sink;       // of the query's head
  float next_sink;
  bool queries;     // others than before
  u32 from, count;  // position of the run's first row in the unit, and how many there are; 0 if they are known

  // Which these are, and what is there of them before the step's rows are; or ALL of them. Keys and values of the rows at the
  // positions `start` to `behind`, none if they are known.
  template <bool ALL> __device__ __forceinline__ void open(const Consumer& b, const Place<A>& at, u32 start, u32 behind, bool new_queries) {
    const u32 warp = anew(warp_id()), n = at.pass * QUERIES + warp;
    queries = new_queries;
    if (queries && n < at.queries()) {
      query.load_place(A::q_gain(b), A::rope(b), at.position + n / GROUP);
      if constexpr (ALL) load_query(b, at, n);
    }
    from = max(start, at.position);
    const u32 end = least(behind, at.run_end());
    count = from < end ? end - from : 0;
    // The last warps, since the first have queries.
    if (CONSUMERS - 1 - warp < count) {
      open_row(b, at, CONSUMERS - 1 - warp);
      if constexpr (ALL) load_row(b, at, CONSUMERS - 1 - warp);
    }
  }
  // The rest of them.
  __device__ __forceinline__ void load(const Consumer& b, const Place<A>& at) {
    const u32 warp = anew(warp_id()), n = at.pass * QUERIES + warp;
    if (queries && n < at.queries()) load_query(b, at, n);
    if (CONSUMERS - 1 - warp < count) load_row(b, at, CONSUMERS - 1 - warp);
  }
  // Query n of the run.
  __device__ __forceinline__ void load_query(const Consumer& b, const Place<A>& at, u32 n) {
    const u32 r = at.row + n / GROUP, head = at.kv_head * GROUP + n % GROUP;
    query.load(A::input(b) + (u64)r * QKV + head * A::QK);
    if constexpr (A::SINKS) next_sink = sink_of<A>(b, head);
  }
  // Key and value of row `own` of those in the unit.
  __device__ __forceinline__ void open_row(const Consumer& b, const Place<A>& at, u32 own) {
    page = b.args.page_table[(u64)b.shared.sequence[at.row] * b.args.pages_per_sequence + (from + own) / A::PAGE_TOKENS];
    key.load_place(A::k_gain(b), A::rope(b), from + own);
  }
  __device__ __forceinline__ void load_row(const Consumer& b, const Place<A>& at, u32 own) {
    const float* raw = A::input(b) + (u64)(at.row + (from - at.position) + own) * QKV + A::HEADS * A::QK;
    key.load(raw + at.kv_head * A::QK);
#pragma unroll
    for (u32 i = 0; i < V_EACH; ++i) {
      const u32 d = lane_id() + i * LANES;
      value[i] = A::V % LANES == 0 || d < A::V ? take1<A::CHECKED>(raw + A::KV_HEADS * A::QK + at.kv_head * A::V + d) : 0.f;
    }
  }
  // A lane's largest word of them.
  __device__ __forceinline__ u32 row_word() const {
    u32 m = key.word();
#pragma unroll
    for (u32 i = 0; i < V_EACH; ++i) m = largest_word(m, __float_as_uint(value[i]));
    return m;
  }

  // Norms, rotates and rounds, into shared memory and the cache.
  __device__ __forceinline__ void prepare(Consumer& b, AttentionSpace<A>& space, u32 cache, const Place<A>& at, u32 together) {
    const u32 warp = anew(warp_id());
    sink = next_sink;
    // The same instructions for queries and keys. There are more rows than warps in the unit of a long run only: those
    // behind the first ones are not asked for ahead.
#pragma unroll 1
    for (u32 kind = queries ? 0 : 1; kind <= SLICES; ++kind) {
      const u32 own = kind * CONSUMERS - 1 - warp;
      if (kind > 0) {
        if (own >= count) break;
        if (SLICES > 1 && kind > 1) {
          open_row(b, at, own);
          load_row(b, at, own);
        }
        if constexpr (A::CHECKED) {
#pragma unroll 1
          while (b.late(row_word())) load_row(b, at, own);
        }
        query = key;
      } else if constexpr (A::CHECKED) {
        const u32 n = at.pass * QUERIES + warp;
#pragma unroll 1
        while (b.late(n < at.queries() ? query.word() : 0)) load_query(b, at, n);
      }
      query.turn(kind == 0 ? A::Q_NORM : A::K_NORM);
      if (kind == 0) {
#pragma unroll
        for (u32 i = 0; i < Head::EACH; ++i) {
          const float x = query.v[i] * (A::SCALE * LOG2_E);
          const u16 rounded = narrow<typename A::Kv>(x);
          u16* to = space.q[warp] + query_at(lane_id()) + i * 64;
          to[0] = rounded;
          to[2] = narrow<typename A::Kv>(x - widen<typename A::Kv>(rounded));
        }
        continue;
      }
      const u32 position = from + own, row = position - at.position;
      u16* const keys = reinterpret_cast<u16*>(CacheShape<A>::at(b, cache, page, at.kv_head));
      u16* const values = keys + A::PAGE_TOKENS * A::QK;
      // One of the units that need them has the row's first head, in one of its passes from this one on.
      const bool cached = row * GROUP / QUERIES - at.pass < together;
#pragma unroll
      for (u32 i = 0; i < Head::EACH; ++i) {
        const u32 d = lane_id() + i * LANES;
        if (A::QK % LANES != 0 && d >= A::QK) continue;
        const u16 rounded = narrow<typename A::Kv>(query.v[i]);
        space.keys[own][d] = rounded;
        if (cached) keys[key_at<A>(position % A::PAGE_TOKENS, i, lane_id())] = rounded;
      }
#pragma unroll
      for (u32 i = 0; i < V_EACH; ++i) {
        const u32 d = lane_id() + i * LANES;
        if (A::V % LANES != 0 && d >= A::V) continue;
        const u16 rounded = narrow<typename A::Kv>(value[i] * A::VALUE_SCALE);
        space.values[own][d] = rounded;
        if (cached) values[value_at<A>(position % A::PAGE_TOKENS, d)] = rounded;
      }
    }
  }
};

// A query's sums over all that it sees, or a part of it that goes into a slot. A sink joins only here, in units of
// log2; one far above all scores makes the divisor infinite and the result 0.
template <class A> __device__ __forceinline__ void leave(const Consumer& b, u32 row, u32 kv_head, u32 h, bool all, u32 slot, float sink, const Attended<A>& sums) {
  const u32 head = kv_head * (A::HEADS / A::KV_HEADS) + h;
  if (all) {
    float total = sums.total;
    if constexpr (A::SINKS) total += power_of_two(sink * LOG2_E - sums.top);
    const float scale = reciprocal(total);
    const u32 column = head * A::V + lane_id() * 2;
#pragma unroll
    for (u32 s = 0; s < Attended<A>::V_STEPS; ++s) {
      if (has_columns<A>(s)) store_out<A>(typename A::Out(), A::out(b), row, column + s * 64, make_float2(sums.v[s].x * scale, sums.v[s].y * scale));
    }
  } else {
    const Parts<A> parts = {A::parts(b)};
    const u32 at = parts.at(row, kv_head, slot, h);
#pragma unroll
    for (u32 s = 0; s < Attended<A>::V_STEPS; ++s) {
      if (has_columns<A>(s)) tell(parts.sum(at) + s * 32, sums.v[s]);
    }
    if (lane_id() == 0) tell(parts.weight(at), make_float2(sums.top, sums.total));
  }
}

// Adds up `count` parts of a query from a slot on, a warp, in the order of their positions, and leaves the sum as the result or
// in another slot. Waits for parts that are not there yet.
template <class A> __device__ __forceinline__ void add_parts(Consumer& b, u32 row, u32 kv_head, u32 h, u32 slot, u32 count, bool all, u32 to) {
  constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  const Parts<A> parts = {A::parts(b)};
  Attended<A> sums;
  sums.clear();
  const u32 place = parts.at(row, kv_head, slot, h);
  float sink = 0.f;
  if constexpr (A::SINKS) sink = sink_of<A>(b, kv_head * GROUP + h);
  float2 *of = parts.sum(place), *weights = parts.weight(place);
#pragma unroll 1
  for (u32 c = 0; whole_warp(c < count); c += SPAN, of += SPAN * GROUP * A::V / 2, weights += SPAN * GROUP) {
    // Their loads wait together: without conditions, for which there are not registers enough. The last part stands for
    // those behind it, and a lane without columns reads what is no part of a result.
    const u32 last = count - 1 - c;
    float2 weight, part[SPAN][Attended<A>::V_STEPS];
    u32 word;
    do {
      weight = take_pair(weights + least(lane_id(), last) * GROUP);
#pragma unroll
      for (u32 i = 0; i < SPAN; ++i) {
#pragma unroll
        for (u32 s = 0; s < Attended<A>::V_STEPS; ++s) part[i][s] = take_pair(of + least(i, last) * (GROUP * A::V / 2) + s * 32);
      }
      word = largest_word(0, weight);
#pragma unroll
      for (u32 i = 0; i < SPAN; ++i) {
#pragma unroll
        for (u32 s = 0; s < Attended<A>::V_STEPS; ++s) {
          if (has_columns<A>(s)) word = largest_word(word, part[i][s]);
        }
      }
    } while (b.late(word));
    const float2 late = make_float2(__uint_as_float(LATE), __uint_as_float(LATE));
#pragma unroll
    for (u32 i = 0; i < SPAN; ++i) {
#pragma unroll
      for (u32 s = 0; s < Attended<A>::V_STEPS; ++s) {
        if (i <= last && has_columns<A>(s)) tell(of + i * (GROUP * A::V / 2) + s * 32, late);
      }
    }
    if (lane_id() <= least(last, SPAN - 1)) tell(weights + lane_id() * GROUP, late);
    // A lane finds what `add` multiplies its part by.
    float top = weight.x;
#pragma unroll
    for (u32 x = 1; x < SPAN; x *= 2) top = fmaxf(top, __shfl_up_sync(~0u, top, x));
    float before = __shfl_up_sync(~0u, top, 1);
    before = lane_id() == 0 ? sums.top : fmaxf(before, sums.top);
    sums.top = fmaxf(sums.top, __shfl_sync(~0u, top, SPAN - 1));
    const float factor = power_of_two(-fabsf(before - weight.x));
    const bool higher = weight.x > before;
    const float others = higher ? 1.f : factor, earlier = higher ? factor : 1.f;
#pragma unroll
    for (u32 i = 0; i < SPAN; ++i) {
      const float f = __shfl_sync(~0u, earlier, i), o = __shfl_sync(~0u, others, i), total = __shfl_sync(~0u, weight.y, i);
      if (i <= last) sums.add(f, o, total, part[i]);
    }
  }
  leave<A>(b, row, kv_head, h, all, to, sink, sums);
}

// A launch begins with late words in place of parts; a crossing lies between these and the first attention.
template <class A> __device__ __forceinline__ void clear_parts(const Consumer& b) {
  const Parts<A> parts = {A::parts(b)};
  const u32 slots = (ROUND ? STEP_ROWS : b.args.rows) * A::HEADS * Parts<A>::SLOTS;
  const u32 first = blockIdx.x * CONSUMER_THREADS + threadIdx.x, each = gridDim.x * CONSUMER_THREADS;
#pragma unroll 1
  for (u32 n = first; n < slots * A::V / 4; n += each) store4_relaxed(reinterpret_cast<u32*>(parts.base) + n * 4, LATE);
#pragma unroll 1
  for (u32 n = first; n < slots; n += each) store2_relaxed(reinterpret_cast<u32*>(parts.weight(n)), LATE, LATE);
}

template <class A> __device__ __forceinline__ void attend_sweeps(Consumer& b, u32 cache);  // sweeps.cuh
template <class A> __device__ __forceinline__ void attend_chunks(Consumer& b, u32 cache);  // chunks.cuh

// (Whoever calls it finishes the stage: a router's scores may follow.)
template <class A> __device__ __forceinline__ void attend(Consumer& b, u32 cache) {
  if constexpr (PageShape<A>::RINGS) attend_sweeps<A>(b, cache);
  else attend_chunks<A>(b, cache);
}
