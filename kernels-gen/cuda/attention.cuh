// Attention of a step's rows over the paged KV cache, grouped-query, split over the context, on the tensor
// cores: causal, or such that a row also sees the rows of its run behind it.
//
// A run is a sequence's rows in the step; their positions follow each other. An item is a run, a KV head
// and a chunk of CHUNK positions; each SM has a row of neighbours, so that queries stay as they are from
// chunk to chunk. An item norms and rotates the keys of
// those of the run's rows that lie in the chunk and writes them and their values into the cache, then attends
// for all rows of the run and all query heads of the KV head, eight such pairs (queries) in a pass. So a
// chunk of the cache is read once for all rows of its sequence.
//
// A warp has 16 positions of the chunk and keeps their keys and values in registers, as they come from
// memory. Lane 4g + t:
//   keys     16 bytes of the positions 4(g/2) + 2i + g%2 (tile i of 2), columns 32s + 8t and on
//   scores   query g, positions 4t to 4t + 3, whole: the product has 16 rows, the upper 8 are the queries
//            in the cache's type, the lower 8 what that rounding left over, and a lane has both sums
//   values   16 bytes of the positions 4t to 4t + 3, columns 64s + 8g and on
//   sums     query g, columns 64s + 16t to 64s + 16t + 15
// The orders of positions and columns inside the products are chosen so that nothing moves between lanes;
// weights are split into rounded and left over as the queries are.
//
// Queries whose row has several chunks leave their parts in memory. Whoever finishes the last of the
// eight chunks of a span adds these up, and whoever finishes the last span adds up the spans, each in the
// order of the positions. Chunks and spans lie at absolute positions and every sum has a fixed order, so
// a row's bits depend only on its own sequence; and only on the rows that it sees, as long as the values of
// those behind it in the run are finite (an unseen value is multiplied by 0).
//
// A stage A says:
//   HEADS, KV_HEADS, QK, V     query heads, KV heads, columns of a key and of a value
//   CACHE_HEADS                KV heads that the cache has room for: the most that a layer has
//   SCALE, VALUE_SCALE         factors on the scores and, before they are cached, on the values
//   WINDOWED, window(b)        whether rows see only so many positions; NO_WINDOW of a layer without
//   BOTH_WAYS                  whether a row sees the rows of its run behind it, as far as a window goes
//   Kv, Out                    Bf16 or F16; Bf16 or F32
//   Q_NORM, K_NORM, EPS        whether heads are normed
//   SINKS, sinks(b)            whether each head has a score that carries no value, and these [HEADS]
//   ROPE                       leading columns of a head that are rotated, 0 for none
//   PAGE_TOKENS, V_PAD, MAX_CHUNKS
//   q_gain(b), k_gain(b), rope(b) [positions][ROPE/2] cosines then sines, input(b) [rows][(HEADS +
//   KV_HEADS) * QK + KV_HEADS * V] f32, out(b) [rows][HEADS * V], parts(b)

constexpr u32 CHUNK = 128;
constexpr u32 WARP_POSITIONS = CHUNK / CONSUMERS;
constexpr u32 SPAN = 8;     // chunks
constexpr u32 NO_WINDOW = 0x7fffffff;  // no position is so large
constexpr u32 QUERIES = 8;  // of a pass
constexpr u32 SUMMED = 4;   // queries whose sums are in shared memory at a time
constexpr float LOG2_E = 1.44269504f;
#define MINUS_INFINITY __int_as_float(0xff800000)
static_assert(WARP_POSITIONS == 16 && QUERIES == CONSUMERS, "a warp's share of a product; a warp prepares a query");

template <class A> struct AttentionSpace {
  static constexpr u32 K_STEPS = (A::QK + 31) / 32, V_STEPS = (A::V + 63) / 64;
  // Rows of queries, so that eight of them meet all banks.
  static constexpr u32 Q_STRIDE = K_STEPS * 32 + (K_STEPS % 2 ? 0 : 32);
  u16 q[2][QUERIES][Q_STRIDE];   // rounded, and what is left over
  u16 keys[STEP_ROWS][A::QK];    // of the run's rows in the chunk, as they go into the cache
  u16 values[STEP_ROWS][A::V];
  union {
    float heads[CONSUMERS][A::QK];          // a warp's head between norm and rope
    float sums[CONSUMERS][SUMMED][A::V];
  };
  float2 weight[CONSUMERS][QUERIES];  // largest score, and the sum of the weights relative to it
};

// The parts of rows that have several chunks: [row][kv head][chunk of the row, then span of the row][head
// of the group].
template <class A> struct Parts {
  float* base;
  static constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  static constexpr u32 SPANS = (A::MAX_CHUNKS + SPAN - 1) / SPAN;
  static constexpr u32 SLOTS = A::MAX_CHUNKS + SPANS;
  __device__ __forceinline__ u64 at(u32 row, u32 kv_head, u32 slot, u32 h) const {
    return (((u64)row * A::KV_HEADS + kv_head) * SLOTS + slot) * GROUP + h;
  }
  __device__ __forceinline__ float* sum(u64 at) const { return base + at * A::V; }
  __device__ __forceinline__ float2* weight(u64 at) const {
    return reinterpret_cast<float2*>(base + (u64)STEP_ROWS * A::HEADS * SLOTS * A::V) + at;
  }
};

// Norms and rotates one head of QK columns; a warp. Lane l has the columns l, l + 32, ... All loads are
// asked for at once.
template <class A, bool NORM>
__device__ __forceinline__ void prepare_head(float* scratch, const float* raw, const float* gain, const float* rope, u32 position, float (&v)[(A::QK + LANES - 1) / LANES]) {
  constexpr u32 EACH = (A::QK + LANES - 1) / LANES, TURNED = (A::ROPE + LANES - 1) / LANES, HALF = A::ROPE / 2;
  float c[TURNED > 0 ? TURNED : 1], s[TURNED > 0 ? TURNED : 1];
#pragma unroll
  for (u32 i = 0; i < TURNED; ++i) {
    const u32 d = lane_id() + i * LANES;
    const u64 at = (u64)position * HALF + (d < HALF ? d : d - HALF);
    c[i] = d < A::ROPE ? rope[at] : 1.f;
    s[i] = d < A::ROPE ? rope[(u64)A::POSITIONS * HALF + at] : 0.f;
  }
  float sum = 0.f;
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) {
    const u32 d = lane_id() + i * LANES;
    v[i] = d < A::QK ? raw[d] : 0.f;
    sum = fmaf(v[i], v[i], sum);
  }
  if constexpr (NORM) {
#pragma unroll
    for (u32 x = LANES / 2; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
    const float rms = 1.f / sqrtf(sum / (float)A::QK + A::EPS);
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
      const u32 d = lane_id() + i * LANES;
      if (d < A::QK) v[i] = v[i] * rms * gain[d];
    }
  }
  if constexpr (A::ROPE > 0) {
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
      const u32 d = lane_id() + i * LANES;
      if (d < A::QK) scratch[d] = v[i];
    }
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < TURNED; ++i) {
      const u32 d = lane_id() + i * LANES;
      if (d < A::ROPE) v[i] = d < HALF ? v[i] * c[i] - scratch[d + HALF] * s[i] : v[i] * c[i] + scratch[d - HALF] * s[i];
    }
    __syncwarp();  // `scratch` may be used again
  }
}

__device__ __forceinline__ void store_out(Bf16, u16* out, u64 at, float v) { out[at] = narrow<Bf16>(v); }
__device__ __forceinline__ void store_out(F32, float* out, u64 at, float v) { out[at] = v; }

// The end of a head's softmax: `sum` and `total` relative to the largest score `top` of a position, in
// units of log2. A sink joins only here, so that parts of a context need not know of it. One far above all
// scores makes the divisor infinite and the result 0.
template <class A> __device__ __forceinline__ float normalize(const Consumer& b, u32 head, float top, float sum, float total) {
  if constexpr (A::SINKS) total += exp2f(A::sinks(b)[head] * LOG2_E - top);
  return sum / total;
}

// The first chunk that a row sees.
template <class A> __device__ __forceinline__ u32 first_chunk(const Block& b, u32 position) {
  return A::WINDOWED && position + 1 > A::window(b) ? (position + 1 - A::window(b)) / CHUNK : 0;
}

// The last position that a row sees, whose run ends in `last`.
template <class A> __device__ __forceinline__ u32 last_seen(const Block& b, u32 position, u32 last) {
  if constexpr (!A::BOTH_WAYS) return position;
  return A::WINDOWED && position + A::window(b) - 1 < last ? position + A::window(b) - 1 : last;
}

// A place among the items of a stage, which are ordered by run, KV head and chunk.
template <class A> struct Walk {
  u32 item = 0, begin = 0;  // this item, and the first of its run
  u32 row = 0, rows = 0;    // of the run
  u32 from = 0, chunks = 0;

  __device__ __forceinline__ explicit Walk(const Consumer& b) { enter(b); }
  __device__ __forceinline__ bool there(const Consumer& b) const { return row < b.args.rows; }
  __device__ __forceinline__ u32 kv_head() const { return (item - begin) / chunks; }
  // The last position that a row of the run sees.
  __device__ __forceinline__ u32 last_seen(const Consumer& b, u32 position) const {
    return ::last_seen<A>(b, position, b.shared.position[row + rows - 1]);
  }
  __device__ __forceinline__ u32 chunk() const { return from + (item - begin) % chunks; }
  // So many items on.
  __device__ __forceinline__ void skip(const Consumer& b, u32 items) {
    item += items;
#pragma unroll 1
    while (there(b) && item - begin >= chunks * A::KV_HEADS) {
      begin += chunks * A::KV_HEADS;
      row += rows;
      enter(b);
    }
  }
  __device__ __forceinline__ void enter(const Consumer& b) {
    if (!there(b)) return;
    rows = 1;
#pragma unroll 1
    while (row + rows < b.args.rows && b.shared.first_row[row + rows] == row) ++rows;
    from = first_chunk<A>(b, b.shared.position[row]);
    chunks = b.shared.position[row + rows - 1] / CHUNK - from + 1;
  }
  // Items of the stage in all.
  __device__ __forceinline__ static u32 count(const Consumer& b) {
    Walk all(b);
    while (all.there(b)) all.skip(b, all.chunks * A::KV_HEADS);
    return all.item;
  }
};

// A warp's keys and values of a chunk, in registers.
template <class A> struct Cached {
  using Space = AttentionSpace<A>;
  uint4 k[2][Space::K_STEPS];
  uint4 v[Space::V_STEPS][4];

  __device__ __forceinline__ static u32 key_position(u32 tile) {
    const u32 g = lane_id() / 4;
    return g / 2 * 4 + tile * 2 + g % 2;
  }
  // Block of the cache with the warp's positions, or null if none of them is older than the step.
  __device__ __forceinline__ static const u8* block(const Consumer& b, u32 cache, const Walk<A>& at) {
    const u32 base = at.chunk() * CHUNK + warp_id() * WARP_POSITIONS;
    if (base >= b.shared.position[at.row]) return nullptr;
    const LaunchArgs& args = b.args;
    const u32 page = args.page_table[(u64)b.shared.sequence[at.row] * args.pages_per_sequence + base / A::PAGE_TOKENS];
    return args.kv + (((u64)cache * args.kv_pages + page) * A::CACHE_HEADS + at.kv_head()) * ((u64)A::PAGE_TOKENS * (A::QK + A::V_PAD) * 2);
  }
  // Positions that the step's rows do not have themselves and that any of them sees; all else is zero.
  __device__ __forceinline__ static bool old(const Consumer& b, const Walk<A>& at, u32 p) {
    const u32 first = b.shared.position[at.row];
    return p < first && (!A::WINDOWED || p + A::window(b) > first);
  }
  __device__ __forceinline__ void load_keys(const Consumer& b, const u8* block, const Walk<A>& at) {
    const u32 base = at.chunk() * CHUNK + warp_id() * WARP_POSITIONS, in_page = base % A::PAGE_TOKENS;
    const u32 column = lane_id() % 4 * 8;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 p = key_position(i);
      const u8* from = block + ((in_page + p) * A::QK + column) * 2;
#pragma unroll
      for (u32 s = 0; s < Space::K_STEPS; ++s) {
        k[i][s] = make_uint4(0, 0, 0, 0);
        if (block && old(b, at, base + p) && s * 32 + column < A::QK) k[i][s] = load4(reinterpret_cast<const u32*>(from + s * 64));
      }
    }
  }
  __device__ __forceinline__ void load_values(const Consumer& b, const u8* block, const Walk<A>& at) {
    const u32 base = at.chunk() * CHUNK + warp_id() * WARP_POSITIONS, in_page = base % A::PAGE_TOKENS;
    const u32 column = lane_id() / 4 * 8;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 p = lane_id() % 4 * 4 + i;
      const u8* from = block + (A::PAGE_TOKENS * A::QK + (in_page + p) * A::V_PAD + column) * 2;
#pragma unroll
      for (u32 s = 0; s < Space::V_STEPS; ++s) {
        v[s][i] = make_uint4(0, 0, 0, 0);
        if (block && old(b, at, base + p) && s * 64 + column < A::V) v[s][i] = load4(reinterpret_cast<const u32*>(from + s * 128));
      }
    }
  }
  // The step's own rows among the warp's positions, from shared memory; `from` is the first one's position.
  __device__ __forceinline__ void take_fresh(const Space& space, u32 base, u32 from, u32 count) {
    const u32 k_column = lane_id() % 4 * 8, v_column = lane_id() / 4 * 8;
    if (base + WARP_POSITIONS <= from || base >= from + count) return;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 n = base + key_position(i) - from;  // wraps around in front of them
#pragma unroll
      for (u32 s = 0; s < Space::K_STEPS; ++s) {
        if (n < count && s * 32 + k_column < A::QK) k[i][s] = *reinterpret_cast<const uint4*>(&space.keys[n][s * 32 + k_column]);
      }
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u32 n = base + lane_id() % 4 * 4 + i - from;
#pragma unroll
      for (u32 s = 0; s < Space::V_STEPS; ++s) {
        if (n < count && s * 64 + v_column < A::V) v[s][i] = *reinterpret_cast<const uint4*>(&space.values[n][s * 64 + v_column]);
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
    const uint4 q = *reinterpret_cast<const uint4*>(&space.q[0][g][s * 32 + t * 8]);
    const uint4 rest = *reinterpret_cast<const uint4*>(&space.q[1][g][s * 32 + t * 8]);
    const u32 first[4] = {q.x, rest.x, q.z, rest.z}, second[4] = {q.y, rest.y, q.w, rest.w};
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

// Column d of parts that are GROUP apart, added up in their order, and their weight; eight at a time, so
// that their loads wait together.
template <class A> __device__ __forceinline__ float fold(const Parts<A>& parts, u64 at, u32 count, u32 d, float2& weight) {
  float m = MINUS_INFINITY, sum = 0.f, total = 0.f;
#pragma unroll 1
  for (u32 c = 0; c < count; c += SPAN) {
    float2 w[SPAN];
    float v[SPAN];
    float top = m;
#pragma unroll
    for (u32 i = 0; i < SPAN; ++i) {
      w[i] = make_float2(MINUS_INFINITY, 0.f);
      v[i] = 0.f;
      if (c + i < count) {
        const u64 part = at + (c + i) * Parts<A>::GROUP;
        w[i] = __ldcg(parts.weight(part));
        v[i] = __ldcg(parts.sum(part) + d);
      }
    }
#pragma unroll
    for (u32 i = 0; i < SPAN; ++i) top = fmaxf(top, w[i].x);
    const float old = exp2f(m - top);
    sum *= old;
    total *= old;
#pragma unroll
    for (u32 i = 0; i < SPAN; ++i) {
      const float f = exp2f(w[i].x - top);
      sum = fmaf(f, v[i], sum);
      total = fmaf(f, w[i].y, total);
    }
    m = top;
  }
  weight = make_float2(m, total);
  return sum;
}

// What a run has of the span that an item lies in: chunks `begin` to `end`.
template <class A> struct Share {
  u32 span, begin, end, spans;
  __device__ __forceinline__ explicit Share(const Walk<A>& item) {
    const u32 run_end = item.from + item.chunks;
    span = item.chunk() / SPAN;
    begin = span * SPAN > item.from ? span * SPAN : item.from;
    end = span * SPAN + SPAN < run_end ? span * SPAN + SPAN : run_end;
    spans = (run_end - 1) / SPAN - item.from / SPAN + 1;
  }
};

// Adds up parts of an item's run for every row that has several: on the first level the chunks of the item's
// span, at least one of them here, on the second the spans.
template <class A> __device__ __forceinline__ void join_parts(Consumer& b, const Walk<A>& item, u32 level) {
  using P = Parts<A>;
  constexpr u32 GROUP = P::GROUP;
  const P parts = {A::parts(b)};
  const Share<A> share(item);
  const u32 kv_head = item.kv_head();
#pragma unroll 1
  for (u32 r = item.row; r < item.row + item.rows; ++r) {
    const u32 position = b.shared.position[r], from = first_chunk<A>(b, position), to = item.last_seen(b, position) / CHUNK + 1;
    const u32 spans = (to - 1) / SPAN - from / SPAN + 1;
    const u32 first = share.begin > from ? share.begin : from, behind = share.end < to ? share.end : to;
    if (level == 0 ? to - from == 1 || first >= behind : spans == 1) continue;
    const bool whole = level > 0 || spans == 1;
    const u32 slot = level == 0 ? first - from : A::MAX_CHUNKS, count = level == 0 ? behind - first : spans;
#pragma unroll 1
    for (u32 n = threadIdx.x; n < GROUP * A::V; n += CONSUMER_THREADS) {
      const u32 h = n / A::V, d = n % A::V, head = kv_head * GROUP + h;
      float2 weight;
      const float sum = fold(parts, parts.at(r, kv_head, slot, h), count, d, weight);
      if (whole) {
        store_out(typename A::Out(), A::out(b), ((u64)r * A::HEADS + head) * A::V + d, normalize<A>(b, head, weight.x, sum, weight.y));
      } else {
        const u64 part = parts.at(r, kv_head, A::MAX_CHUNKS + share.span - from / SPAN, h);
        parts.sum(part)[d] = sum;
        if (d == 0) *parts.weight(part) = weight;
      }
    }
  }
}

// Behind all of this SM's items, `count` from `own` on: adds up what it is the last to bring. A lane
// counts for an item, so that 32 of them cost the way to L2 and back once. The increment releases this
// SM's parts (ordered by the barrier behind each item) and acquires the others'. Who ends a count leaves
// the counter ready for the next stage: a crossing lies between.
template <class A> __device__ __forceinline__ void join(Consumer& b, const Walk<A>& own, u32 count) {
  constexpr u32 COUNTERS = Parts<A>::SPANS + 1, LEVELS = A::MAX_CHUNKS > SPAN ? 2 : 1;
  const u32 warp = anew(warp_id());
  auto number = [&](u32 n) {
    Walk<A> item = own;
    item.skip(b, n);
    return item;
  };
#pragma unroll 1
  for (u32 first = 0; first < count; first += LANES) {
    bool last = false;
    u32* counters = nullptr;
    u32 spans = 0;
#pragma unroll 1
    for (u32 level = 0; level < LEVELS; ++level) {
      if (warp == 0) {
        u32* counter = nullptr;
        u32 wanted = 0;
        if (level == 0 && first + lane_id() < count) {
          const Walk<A> item = number(first + lane_id());
          if (item.chunks > 1) {
            const Share<A> share(item);
            counters = b.sync().splits + (item.row * A::KV_HEADS + item.kv_head()) * COUNTERS;
            spans = share.spans;
            counter = counters + share.span;
            wanted = share.end - share.begin;
          }
        } else if (level > 0 && last && spans > 1) {
          counter = counters + COUNTERS - 1;
          wanted = spans;
        }
        last = counter && add_acq_rel(counter, 1) == wanted - 1;
        if (last) *counter = 0;
        const u32 all = __ballot_sync(~0u, last);
        if (lane_id() == 0) b.shared.last_splits[level] = all;
      }
      consumers_sync();
      const u32 ended = b.shared.last_splits[level];
      if (!ended) break;
#pragma unroll 1
      for (u32 left = ended; left; left &= left - 1) join_parts(b, number(first + __ffs(left) - 1), level);
      if (level + 1 < LEVELS) consumers_sync();  // the spans' parts are written
    }
    if (first + LANES < count) consumers_sync();  // `last_splits` was read
  }
}

// Prepares a pass's queries, a warp each: heads of the rows from `row` on, GROUP to a row.
template <class A> __device__ __forceinline__ void prepare_query(Consumer& b, AttentionSpace<A>& space, u32 row, u32 kv_head, u32 query, u32 count) {
  using Space = AttentionSpace<A>;
  constexpr u32 GROUP = A::HEADS / A::KV_HEADS, EACH = (A::QK + LANES - 1) / LANES;
  constexpr u32 QKV = (A::HEADS + A::KV_HEADS) * A::QK + A::KV_HEADS * A::V;
  const u32 warp = anew(warp_id()), n = query + warp, r = row + n / GROUP;
  float v[EACH] = {};
  if (n < count) {
    const float* raw = A::input(b) + (u64)r * QKV + (kv_head * GROUP + n % GROUP) * A::QK;
    prepare_head<A, A::Q_NORM>(space.heads[warp], raw, A::q_gain(b), A::rope(b), b.shared.position[r], v);
  }
#pragma unroll
  for (u32 i = 0; i < Space::K_STEPS; ++i) {
    const u32 d = lane_id() + i * LANES;
    const float x = v[i] * (A::SCALE * LOG2_E);
    const u16 rounded = narrow<typename A::Kv>(x);
    space.q[0][warp][d] = rounded;
    space.q[1][warp][d] = narrow<typename A::Kv>(x - widen<typename A::Kv>(rounded));
  }
}

// Prepares keys and values of the run's rows in the chunk, `row` on, and writes them into the cache.
template <class A> __device__ __forceinline__ void prepare_fresh(Consumer& b, AttentionSpace<A>& space, u32 cache, u32 kv_head, u32 row, u32 count) {
  constexpr u32 EACH = (A::QK + LANES - 1) / LANES;
  constexpr u32 QKV = (A::HEADS + A::KV_HEADS) * A::QK + A::KV_HEADS * A::V;
  const LaunchArgs& args = b.args;
  // At most as many as warps; the last ones, because the first have queries to prepare.
  const u32 warp = anew(warp_id()), n = CONSUMERS - 1 - warp;
  if (n >= count) return;
  const u32 r = row + n, position = b.shared.position[r];
  const float* raw = A::input(b) + (u64)r * QKV + A::HEADS * A::QK;
  constexpr u32 V_EACH = (A::V + LANES - 1) / LANES;
  float v[EACH], value[V_EACH];
#pragma unroll
  for (u32 i = 0; i < V_EACH; ++i) {
    const u32 d = lane_id() + i * LANES;
    value[i] = d < A::V ? raw[A::KV_HEADS * A::QK + kv_head * A::V + d] : 0.f;
  }
  prepare_head<A, A::K_NORM>(space.heads[warp], raw + kv_head * A::QK, A::k_gain(b), A::rope(b), position, v);
  const u32 page = args.page_table[(u64)b.shared.sequence[r] * args.pages_per_sequence + position / A::PAGE_TOKENS];
  u16* keys = reinterpret_cast<u16*>(args.kv + (((u64)cache * args.kv_pages + page) * A::CACHE_HEADS + kv_head) * ((u64)A::PAGE_TOKENS * (A::QK + A::V_PAD) * 2));
  u16* values = keys + A::PAGE_TOKENS * A::QK + position % A::PAGE_TOKENS * A::V_PAD;
  keys += position % A::PAGE_TOKENS * A::QK;
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) {
    const u32 d = lane_id() + i * LANES;
    if (d < A::QK) keys[d] = space.keys[n][d] = narrow<typename A::Kv>(v[i]);
  }
#pragma unroll
  for (u32 i = 0; i < V_EACH; ++i) {
    const u32 d = lane_id() + i * LANES;
    if (d < A::V) values[d] = space.values[n][d] = narrow<typename A::Kv>(value[i] * A::VALUE_SCALE);
  }
}

template <class A> __device__ __forceinline__ void attend(Consumer& b, u32 cache) {
  using Space = AttentionSpace<A>;
  constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  Space& space = *reinterpret_cast<Space*>(b.scratch);
  const Parts<A> parts = {A::parts(b)};
  const u32 warp = anew(warp_id()), lane = anew(lane_id());
  const u32 g = lane / 4, t = lane % 4;
  const u32 all = Walk<A>::count(b), each = (all + gridDim.x - 1) / gridDim.x;
  const u32 first = blockIdx.x * each, items = first >= all ? 0 : all - first < each ? all - first : each;
  Walk<A> item(b);
  item.skip(b, first);
  if (items == 0) {
    b.wait_inputs();
    b.finish_stage();
    return;
  }
  // Nothing here needs what the step has made: the cache of older positions is read while the other SMs
  // still multiply.
  Cached<A> cached;
  {
    const u8* block = Cached<A>::block(b, cache, item);
    cached.load_keys(b, block, item);
    cached.load_values(b, block, item);
  }
  b.wait_inputs();
  bool several = false;
  u32 prepared = ~0u;  // the rows and the KV head whose queries lie in `space.q`
  for (u32 n = 0; n < items; ++n) {
    several |= item.chunks > 1;
    const bool more = n + 1 < items;
    const Walk<A> now = item;
    item.skip(b, 1);
    const u8* block = more ? Cached<A>::block(b, cache, item) : nullptr;
    const u32 kv_head = now.kv_head(), start = now.chunk() * CHUNK, base = start + warp * WARP_POSITIONS;
    const u32 run_position = b.shared.position[now.row], run_end = run_position + now.rows;
    // Rows of the run that see the chunk, and those that lie in it.
    u32 ahead = 0;  // how far a row sees
    if (A::BOTH_WAYS) ahead = A::WINDOWED ? A::window(b) - 1 : NO_WINDOW;
    const u32 row = now.row + (start > run_position + ahead ? start - run_position - ahead : 0);
    u32 row_end = now.row + now.rows;
    if (A::WINDOWED && start + CHUNK + A::window(b) - 1 < run_end) row_end = now.row + (start + CHUNK + A::window(b) - 1 - run_position);
    const u32 count = (row_end - row) * GROUP;
    const u32 fresh_from = start > run_position ? start : run_position;
    const u32 fresh_end = start + CHUNK < run_end ? start + CHUNK : run_end;
    const u32 fresh = fresh_from < fresh_end ? fresh_end - fresh_from : 0;
    if (fresh) prepare_fresh<A>(b, space, cache, kv_head, now.row + (fresh_from - run_position), fresh);
    for (u32 query = 0; query < count; query += QUERIES) {
      const bool last = query + QUERIES >= count;
      // Queries stay for the next chunk if there is one pass of them and the same rows see it.
      const u32 queries = (row * (STEP_ROWS + 1) + row_end) * A::KV_HEADS + kv_head;
      const bool known = queries == prepared;
      if (!known) prepare_query<A>(b, space, row, kv_head, query, count);
      prepared = count <= QUERIES ? queries : ~0u;
      if (!known || fresh) consumers_sync();
      if (query == 0) cached.take_fresh(space, base, fresh_from, fresh);
      float score[4];
      scores<A>(space, cached, score);
      // The next item's keys come while this one's values are multiplied, its values while sums are.
      if (last && more) cached.load_keys(b, block, item);

      // Weights relative to the query's largest score among the warp's positions.
      const u32 position = query + g < count ? b.shared.position[row + (query + g) / GROUP] : 0;
      const u32 from = A::WINDOWED && position + 1 > A::window(b) ? position + 1 - A::window(b) : 0;
      const u32 end = last_seen<A>(b, position, run_end - 1);
      float top = MINUS_INFINITY;
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        const u32 p = base + t * 4 + i;
        if (query + g >= count || p > end || (A::WINDOWED && p < from)) score[i] = MINUS_INFINITY;
        top = fmaxf(top, score[i]);
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float relative_to = top == MINUS_INFINITY ? 0.f : top;
#pragma unroll
      for (u32 i = 0; i < 4; ++i) score[i] = exp2f(score[i] - relative_to);
      float total = (score[0] + score[1]) + (score[2] + score[3]);
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (t == 0) space.weight[warp][g] = make_float2(top, total);

      // Weights times values.
      u32 weight[4];
      split_pair<typename A::Kv>(score[0], score[1], weight[0], weight[1]);
      split_pair<typename A::Kv>(score[2], score[3], weight[2], weight[3]);
      float sums[Space::V_STEPS][16];
#pragma unroll
      for (u32 s = 0; s < Space::V_STEPS; ++s) {
        const uint4(&v)[4] = cached.v[s];
        const u32 first[4] = {v[0].x, v[0].y, v[0].z, v[0].w}, second[4] = {v[1].x, v[1].y, v[1].z, v[1].w};
        const u32 third[4] = {v[2].x, v[2].y, v[2].z, v[2].w}, fourth[4] = {v[3].x, v[3].y, v[3].z, v[3].w};
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
          float d[4] = {};
          mma(typename A::Kv(), d, weight, pair_up(first[j / 2], second[j / 2], j % 2), pair_up(third[j / 2], fourth[j / 2], j % 2));
          sums[s][j] = d[0] + d[2];
          sums[s][8 + j] = d[1] + d[3];
        }
      }
      if (last && more) cached.load_values(b, block, item);

      // The chunk's result over the warps, SUMMED queries at a time.
#pragma unroll 1
      for (u32 half = 0; half < QUERIES; half += SUMMED) {
        if (half > 0 && query + half >= count) break;
        if (half > 0) consumers_sync();  // the sums of the first have been read
        if (g >= half && g < half + SUMMED) {
#pragma unroll
          for (u32 s = 0; s < Space::V_STEPS; ++s) {
#pragma unroll
            for (u32 j = 0; j < 16; j += 4) {
              const u32 column = s * 64 + t * 16 + j;
              if (column < A::V) {
                *reinterpret_cast<float4*>(&space.sums[warp][g - half][column]) = make_float4(sums[s][j], sums[s][j + 1], sums[s][j + 2], sums[s][j + 3]);
              }
            }
          }
        }
        consumers_sync();
#pragma unroll 1
        for (u32 n = threadIdx.x; n < SUMMED * A::V; n += CONSUMER_THREADS) {
          const u32 q = half + n / A::V, d = n % A::V;
          if (query + q >= count) break;
          float m = MINUS_INFINITY, sum = 0.f, all = 0.f;
#pragma unroll
          for (u32 w = 0; w < CONSUMERS; ++w) m = fmaxf(m, space.weight[w][q].x);
#pragma unroll
          for (u32 w = 0; w < CONSUMERS; ++w) {
            const float f = exp2f(space.weight[w][q].x - m);
            sum = fmaf(f, space.sums[w][q - half][d], sum);
            all = fmaf(f, space.weight[w][q].y, all);
          }
          const u32 r = row + (query + q) / GROUP, h = (query + q) % GROUP, head = kv_head * GROUP + h;
          const u32 own_from = first_chunk<A>(b, b.shared.position[r]);
          if (last_seen<A>(b, b.shared.position[r], run_end - 1) / CHUNK == own_from) {
            store_out(typename A::Out(), A::out(b), ((u64)r * A::HEADS + head) * A::V + d, normalize<A>(b, head, m, sum, all));
          } else {
            const u64 part = parts.at(r, kv_head, now.chunk() - own_from, h);
            parts.sum(part)[d] = sum;
            if (d == 0) *parts.weight(part) = make_float2(m, all);
          }
        }
      }
      consumers_sync();  // the space may be used again
    }
  }
  if (several) {
    // Looked for again: kept, it would take registers from the loop, where they are short.
    Walk<A> own(b);
    own.skip(b, anew(first));
    join<A>(b, own, items);
  }
  b.finish_stage();
}
