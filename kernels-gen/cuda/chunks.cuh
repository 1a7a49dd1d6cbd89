// Attention where heads are wide: units of a chunk.
//
// Keys and values of a chunk that have more than comes through the ring (PageShape::RINGS) are loaded by the consumers, into
// registers, of which there are none left to keep sums in (sweeps.cuh). So a unit is a run, a KV head, a group of passes and a
// chunk; the warps meet in every chunk, and all passes of a group read its keys and values once. Those of the next unit are
// asked for behind the last use of what is there, the first unit's in front of the stage's inputs.
//
// A chunk's sums are added to those of the chunks before it in its span, eight chunks, and a row's spans are
// added up the same way, in the order of the positions. An SM that has all chunks of a span keeps their sum in
// registers. Where a span's chunks are spread over SMs each leaves its own in memory, as a part, and whoever has the last of
// them adds them up, with the same operations in the same order; so with spans. An SM waits only for units in front of its
// own, so that somebody can always go on.

// What decides how units are dealt out, by which bits do not change: what a unit's keys and values cost an SM, what a
// pass costs it, and adding up what lies in memory. Measured on an H200 by what a step takes: Llama-3.2-1B, 1 row, 512
// positions, 0.820 ms if four chunks are one SM's, 0.730 if they are four's (when its heads still came here).
constexpr u32 LOAD_COST = 1;
constexpr u32 PASS_COST = 2;
constexpr u32 JOIN_COST = 2;

// A unit, and a pass of it. Units are ordered by run, KV head, group and chunk.
template <class A> struct Unit : Place<A> {
  u32 unit;
  u32 groups, group;

  __device__ __forceinline__ u32 units() const { return this->chunks * groups * A::KV_HEADS; }
  // What the run has of the span that the chunk lies in: chunks `share` to `share_end`.
  __device__ __forceinline__ u32 share() const { return max(this->chunk / SPAN * SPAN, this->from); }
  __device__ __forceinline__ u32 share_end() const { return least(this->chunk / SPAN * SPAN + SPAN, this->from + this->chunks); }
  __device__ __forceinline__ u32 spans() const { return (this->from + this->chunks - 1) / SPAN - this->from / SPAN + 1; }
  // The pass behind the unit's last.
  __device__ __forceinline__ u32 pass_end(u32 together) const { return least((group + 1) * together, this->passes()); }

  // The run that begins in a row, with so many passes together; no rows behind the last.
  __device__ __forceinline__ void enter(const Block& b, u32 first, u32 together) {
    Place<A>::enter(b, first);
    groups = (this->passes() + together - 1) / together;
  }
  // The first pass of the unit of this number; there is one.
  __device__ __forceinline__ void seek(const Block& b, u32 target, u32 together) {
    unit = target;
    enter(b, 0, together);
#pragma unroll 1
    while (whole_warp(target >= units())) {
      target -= units();
      enter(b, this->row + this->rows, together);
    }
    this->chunk = this->from + target % this->chunks;
    target /= this->chunks;
    group = target % groups;
    this->kv_head = target / groups;
    this->pass = group * together;
  }
  // The next pass; none of a run behind the last.
  __device__ __forceinline__ void advance(const Block& b, u32 together) {
    if (++this->pass < pass_end(together)) return;
    ++unit;
    if (++this->chunk == this->from + this->chunks) {
      this->chunk = this->from;
      if (++group == groups) {
        group = 0;
        if (++this->kv_head == A::KV_HEADS) {
          this->kv_head = 0;
          enter(b, this->row + this->rows, together);
          this->chunk = this->from;
        }
      }
    }
    this->pass = group * together;
  }
};

// How a stage's units are dealt out: every SM takes as many as any other, give or take one; or those of the spans
// that begin there.
struct Deal {
  u32 together;  // passes of a unit
  bool spans;
  u32 units, each;
};

// What costs least, with 1, 2, 4 or 8 passes together. A lane has a row, which stands for the run that begins there.
template <class A> __device__ __forceinline__ Deal deal(const Block& b, u32 runs) {
  const u32 row = lane_id();
  Deal best = {};
  u32 least_cost = ~0u;
#pragma unroll 1
  for (u32 together = 1; together <= 8; together *= 2) {
    u32 units = 0, longest = 0;  // share of a span; and whether a run has several
    if (runs >> row & 1) {
      Unit<A> run = {};
      run.enter(b, row, together);
      units = run.units();
      longest = least(run.chunks, SPAN) + (run.spans() > 1 ? 16 : 0);
    }
    longest = warp_max(longest);
#pragma unroll
    for (u32 x = 1; x < LANES; x *= 2) units += __shfl_xor_sync(~0u, units, x);
    const u32 each = (units + gridDim.x - 1) / gridDim.x, share = longest % 16;
    const u32 unit_cost = LOAD_COST + PASS_COST * together;
    const u32 spread = each * unit_cost + (longest > 1 ? JOIN_COST : 0);
    const u32 whole = (each <= share ? share : (each + SPAN - 1) / SPAN * SPAN) * unit_cost + (longest > 16 ? JOIN_COST : 0);
    // Sums stay in registers where a unit has one pass.
    if (together == 1) {
      best = {1, true, units, each};
      least_cost = whole;
    }
    if (spread < least_cost) {
      best = {together, false, units, each};
      least_cost = spread;
    }
  }
  return best;
}

// An SM's units.
template <class A> struct alignas(16) Own {
  u32 together, end;
  Unit<A> next;  // the first

  __device__ __forceinline__ static Own& of(const Block& b) {
    static_assert(sizeof(Own) == sizeof b.shared.dealt[0]);
    return *reinterpret_cast<Own*>(b.shared.dealt[A::deal(b)]);
  }
};

// Finds this SM's units, which mostly are those of the step before; a whole warp.
template <class A> __device__ __forceinline__ void deal_chunks(const Block& b, bool same) {
  if (same) {
    Unit<A>& first = Own<A>::of(b).next;
    if (lane_id() == 0) first.position = b.shared.position[first.row];
    return;
  }
  Unit<A> next = {};
  const Deal dealt = deal<A>(b, b.shared.runs);
  u32 target = least((blockIdx.x + 1) * dealt.each, dealt.units), end = 0;
#pragma unroll 1
  for (u32 n = 0; n < 3; ++n) {
    next.unit = target;
    u32 on = 0;
    if (whole_warp(target < dealt.units)) {
      next.seek(b, target, dealt.together);
      if (dealt.spans && next.chunk != next.share()) on = next.share_end() - next.chunk;
    }
    target += on;
    if (n == 0) {
      end = target;
      target = least(blockIdx.x * dealt.each, dealt.units);
    }
  }
  if (lane_id() == 0) Own<A>::of(b) = {dealt.together, end, next};
}

// What an SM has to add up, of a run, a KV head and a group: the chunks of a span, all spans, or both.
template <class A> struct Ended {
  // Groups of a run, KV heads and spans share what a row and the levels leave.
  static constexpr u32 GROUPS = (A::HEADS / A::KV_HEADS * STEP_ROWS + QUERIES - 1) / QUERIES, SPANS = (A::MAX_CHUNKS + SPAN - 1) / SPAN;
  static_assert((u64)LAUNCH_ROWS * 4 * GROUPS * A::KV_HEADS * SPANS < 1ull << 32, "a word has all of it");
  u32 bits;
  __device__ __forceinline__ u32 row() const { return bits % LAUNCH_ROWS; }
  __device__ __forceinline__ bool on(u32 level) const { return bits / LAUNCH_ROWS >> level & 1; }
  __device__ __forceinline__ u32 group() const { return bits / (LAUNCH_ROWS * 4) % GROUPS; }
  __device__ __forceinline__ u32 kv_head() const { return bits / (LAUNCH_ROWS * 4 * GROUPS) % A::KV_HEADS; }
  __device__ __forceinline__ u32 span() const { return bits / (LAUNCH_ROWS * 4 * GROUPS * A::KV_HEADS); }
  __device__ __forceinline__ static u32 of(const Unit<A>& at, bool chunks, bool spans) {
    return at.row | (chunks + 2 * spans) * LAUNCH_ROWS | LAUNCH_ROWS * 4 * (at.group + GROUPS * (at.kv_head + A::KV_HEADS * (at.chunk / SPAN)));
  }
};

// Adds up what of a group's queries is left in memory, a warp a query: on the first level the chunks of a span, on the
// second the spans.
template <class A> __device__ __forceinline__ void add_group(Consumer& b, Ended<A> ended, u32 level, u32 together) {
  constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  Place<A> at = {};
  at.enter(b, ended.row());
  const u32 kv_head = ended.kv_head(), span = ended.span(), last = at.run_end() - 1;
  const u32 end = least((ended.group() + 1) * together, at.passes());
#pragma unroll 1
  for (u32 pass = ended.group() * together; whole_warp(pass < end); ++pass) {
    const u32 query = pass * QUERIES + anew(warp_id());
    if (whole_warp(query >= at.queries())) break;
    const u32 h = query % GROUP, r = at.row + query / GROUP, position = at.position + query / GROUP;
    const u32 from = first_chunk<A>(b, position), to = last_seen<A>(b, position, last) / CHUNK + 1;
    const u32 spans = (to - 1) / SPAN - from / SPAN + 1;
    u32 slot = A::MAX_CHUNKS, count = spans;
    if (whole_warp(level == 0)) {
      const u32 first = max(span * SPAN, from), behind = least(span * SPAN + SPAN, to);
      // A row with one chunk has left it as a whole, and one may not see the span.
      if (whole_warp(to - from == 1 || first >= behind)) continue;
      slot = first - from;
      count = behind - first;
    } else if (whole_warp(spans == 1)) {
      continue;
    }
    add_parts<A>(b, r, kv_head, h, slot, count, level > 0 || spans == 1, A::MAX_CHUNKS + span - from / SPAN);
  }
}

// Adds up what this SM has to, a lane each: spans behind all chunks, since its own may be among them.
template <class A> __device__ __forceinline__ void join(Consumer& b, Ended<A> own, u32 count, u32 together) {
  constexpr u32 LEVELS = A::MAX_CHUNKS > SPAN ? 2 : 1;
#pragma unroll 1
  for (u32 level = 0; level < LEVELS; ++level) {
#pragma unroll 1
    for (u32 n = 0; n < count; ++n) {
      const Ended<A> ended = {__shfl_sync(~0u, own.bits, n)};
      if (whole_warp(ended.on(level))) add_group<A>(b, ended, level, together);
    }
  }
}

template <class A> __device__ __forceinline__ void attend_chunks(Consumer& b, u32 cache) {
  using Space = AttentionSpace<A>;
  constexpr u32 GROUP = A::HEADS / A::KV_HEADS, V_STEPS = Space::V_STEPS;
  // Whether what can be done in front of the stage's inputs is done there: in a wide step there are many units, of which it
  // is the first's alone.
  constexpr bool EARLY = SLICES == 1;
  Space& space = *reinterpret_cast<Space*>(b.scratch);
  // The largest score of each warp's positions, and the sum of the weights relative to it, by query.
  float2(&weights)[CONSUMERS][QUERIES] = *reinterpret_cast<float2(*)[CONSUMERS][QUERIES]>(b.shared.row_sums);
  const u32 warp = anew(warp_id()), lane = anew(lane_id());
  const u32 g = lane / 4, t = lane % 4;
  u32 left = 0;          // to be added up
  Ended<A> ended = {0};  // a lane each
  bool ready = false;    // the stage's inputs are there
  Unit<A> next = Own<A>::of(b).next;
  const u32 first = next.unit, end = Own<A>::of(b).end, together = Own<A>::of(b).together;
  if (whole_warp(first >= end)) {
    b.wait_inputs();
    return;
  }
#pragma unroll 1
  do {
    Cached<A> cached = {};
    Fresh<A> fresh = {};
    Attended<A> sums;
    sums.clear();
    Unit<A> now = next;
    bool there = false;          // a pass to multiply
#pragma unroll 1
    while (true) {
      const bool new_unit = !there || next.unit != now.unit;
      // No lane is left for what may have to be added up behind the next span: first what there is.
      const bool full = left == LANES - 1 && there && new_unit && now.chunk + 1 == now.share_end();
      const bool more = next.unit < end && !full;
      const bool new_keys = whole_warp(more && new_unit);
      if (new_keys) Cached<A>::ask_page(b, next);
      const u32 base = Cached<A>::base(now), query = now.pass * QUERIES;
      float score[4] = {};
      if (whole_warp(there)) {
        fresh.prepare(b, space, cache, now, together);
        // The queries are there, and the last pass's sums have been read.
        consumers_sync();
        cached.take_fresh(space, base, fresh.from, fresh.count);
        scores<A>(space, cached, score);
      }
      const u32 page = new_keys ? Cached<A>::asked_page(b) : NO_PAGE;
      auto block = [&] { return CacheShape<A>::at(b, cache, page, next.kv_head); };
      // While the other SMs still multiply.
      if (!there && page != NO_PAGE) cached.load(block(), next);
      const bool same = there && next.row == now.row && next.kv_head == now.kv_head && next.pass == now.pass;
      if (EARLY && more) fresh.template open<false>(b, next, next.chunk * CHUNK, (next.chunk + new_unit) * CHUNK, !same);
      if (whole_warp(!ready)) {
        if constexpr (A::Q_NORM && !EARLY) prefetch(A::q_gain(b), A::QK);
        if constexpr (A::K_NORM && !EARLY) prefetch(A::k_gain(b), A::QK);
        if (A::SINKS && A::sinks(b)) prefetch(A::sinks(b), A::HEADS);
        b.wait_inputs();
        ready = true;
      }
      if (EARLY && more) fresh.load(b, next);
      if (!EARLY && more) fresh.template open<true>(b, next, next.chunk * CHUNK, (next.chunk + new_unit) * CHUNK, !same);
      const u32 last = now.run_end() - 1;
      Attended<A> chunk = {};
      if (whole_warp(there)) {
        // Weights relative to the query's largest score among the warp's positions.
        u32 weight[4];
        {
          const bool asked = query + g < now.queries();
          const u32 position = now.position + (query + g) / GROUP;
          const u32 from = A::WINDOWED && position + 1 > A::window(b) ? position + 1 - A::window(b) : 0;
          const u32 seen = last_seen<A>(b, position, last);
          float top = MINUS_INFINITY;
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            const u32 p = base + t * 4 + i;
            if (!asked || p > seen || (A::WINDOWED && p < from)) score[i] = MINUS_INFINITY;
            top = fmaxf(top, score[i]);
          }
          const float total = weigh<A>(score, top, weight);
          if (t == 0) weights[warp][g] = make_float2(top, total);
        }

        // Weights times values, and their sums over the warps: of query `warp` of the pass.
        float factor = 0.f;
#pragma unroll
        for (u32 s = 0; s < V_STEPS; ++s) {
          float products[16];
          weighted<A>(weight, cached.v[s], products);
          // Keys as well, only here: one counter is for all loads of a loop, and these values would be waited for with them.
          if (s + 1 == V_STEPS && page != NO_PAGE) cached.load(block(), next);
          else if (s + 1 == V_STEPS && new_keys) cached.clear_values();
          if (s > 0) consumers_sync();  // the columns before have been read
          store_sums<A>(space, products);
          consumers_sync();
          add_warps<A>(space, weights, s, factor, chunk);
        }
      }
      if (whole_warp(there)) {
        // To the span's sums, or into memory.
        const u32 share = now.share(), share_end = now.share_end(), begins = now.unit - (now.chunk - share);
        const bool whole = together == 1 && begins >= first && begins + (share_end - share) <= end;
        const bool ends = now.chunk + 1 == share_end || next.unit == end;
        if (query + warp < now.queries()) {
          const u32 r = now.row + (query + warp) / GROUP, position = now.position + (query + warp) / GROUP;
          const u32 from = first_chunk<A>(b, position), to = last_seen<A>(b, position, last) / CHUNK;
          const bool seen = now.chunk >= from && now.chunk <= to;
          if (seen) sums.add(chunk);
          // Who adds up waits for what the row sees, whatever its scores are.
          if (whole ? ends && from < share_end && to >= share : seen) {
            const bool all = whole ? from / SPAN == to / SPAN : from == to;
            leave<A>(b, r, now.kv_head, (query + warp) % GROUP, all, whole ? A::MAX_CHUNKS + share / SPAN - from / SPAN : now.chunk - from, fresh.sink, sums);
          }
        }
        if (!whole || ends) sums.clear();
        if (new_unit) {
          // The span ends here: whoever has its last chunk adds up what others have of it, and of the last span all spans.
          const bool chunks = !whole && now.chunks > 1, spans = now.chunk + 1 == now.from + now.chunks && now.spans() > 1;
          if (now.chunk + 1 == share_end && (chunks || spans)) {
            if (left == lane) ended.bits = Ended<A>::of(now, chunks, spans);
            ++left;
          }
        }
      }
      if (whole_warp(!more)) break;
      there = true;
      now = next;
      next.advance(b, together);
    }
    if (whole_warp(left > 0)) join<A>(b, ended, left, together);
    left = 0;
  } while (whole_warp(next.unit < end));
}
