// Attention by sweeps: a warp goes through its positions of a span without meeting the others.
//
// A unit is a pass of a run and a KV head, and what the run has of a span. A warp takes its 16 positions of one chunk after the
// other, with the same registers, and keeps their sums relative to the largest score so far. Behind the last chunk the warps
// add up theirs through shared memory. A row that sees one span has its result then; otherwise sums lie in memory as parts,
// and the SM with the last span of the pass and KV head adds up all of them, in the order of the positions.
//
// Spans are short where few positions lie before them, so that a row's first thousands are many SMs' work, and long behind that,
// so that there are few parts. Where steps are wide all SMs have work anyway. Spans, chunks and tiles lie at absolute positions,
// whoever has them; and what a row does not see changes nothing in its sums: it is multiplied by 0, and a largest score that
// stays gives a factor of 1.
//
// An SM has two lists of units: spans that are not a run's last, and last ones, both dealt out by what they cost. Only who
// has last ones waits for others, behind all that it has.

// What a unit costs beside its chunks, in chunks: queries, adding up, and the meetings for both.
constexpr u32 SWEEP_COST = 2;

// A row's spans: of NEAR_SPAN chunks up to the chunk NEAR, then of FAR_SPAN.
template <class A> struct Spans {
  static constexpr bool ALIKE = A::NEAR_SPAN == A::FAR_SPAN;
  static constexpr u32 NEAR = 8, COUNT = NEAR / A::NEAR_SPAN;
  static_assert(NEAR % A::NEAR_SPAN == 0);
  // That in which a chunk lies.
  __device__ __forceinline__ static constexpr u32 of(u32 chunk) {
    return ALIKE || chunk < NEAR ? chunk / A::NEAR_SPAN : COUNT + (chunk - NEAR) / A::FAR_SPAN;
  }
  // Its first chunk.
  __device__ __forceinline__ static u32 begin(u32 span) {
    return ALIKE || span < COUNT ? span * A::NEAR_SPAN : NEAR + (span - COUNT) * A::FAR_SPAN;
  }
};

// A unit among those of an SM, and a chunk of it, `at.chunk`.
template <class A> struct Sweep {
  Place<A> at;
  u32 span;
  u32 list;  // 0: spans in front of a run's last, 1: last ones, 2: behind all
  u32 left;  // of the list, this one included; 0 in front of a list and behind all

  // Which are an SM's: how many of both lists, and the first of each.
  struct First {
    u32 row, kv_head, pass, span;
  };
  struct alignas(16) Dealt {
    u32 count[2];
    First first[2];
  };
  __device__ __forceinline__ static Dealt& dealt(const Block& b) {
    static_assert(sizeof(Dealt) <= sizeof b.shared.dealt[0]);
    return *reinterpret_cast<Dealt*>(b.shared.dealt[A::deal(b)]);
  }

  __device__ __forceinline__ u32 first_span() const { return Spans<A>::of(at.from); }
  __device__ __forceinline__ u32 last_span() const { return Spans<A>::of(at.from + at.chunks - 1); }
  // The chunks of the span that the run sees.
  __device__ __forceinline__ u32 begin() const { return max(Spans<A>::begin(span), at.from); }
  __device__ __forceinline__ u32 end() const { return least(Spans<A>::begin(span + 1), at.from + at.chunks); }
  __device__ __forceinline__ bool any() const { return whole_warp(left > 0); }

  // In front of a list's first.
  __device__ __forceinline__ static Sweep before(u32 list) {
    Sweep unit = {};
    unit.list = list - 1;
    return unit;
  }
  __device__ __forceinline__ void advance(const Block& b) {
    u32 row = at.row + at.rows;
    bool enters = false, spans = false;  // another run; another span than that which follows
    if (left > 1) {
      --left;
      if (list == 1 || ++span == last_span()) {
        spans = true;
        if (++at.pass == at.passes()) {
          at.pass = 0;
          enters = ++at.kv_head == A::KV_HEADS;
          if (enters) at.kv_head = 0;
        }
      }
    } else {
      const Dealt& own = dealt(b);
      left = 0;
      if (++list == 0) left = own.count[0];
      if (left == 0 && list < 1) ++list;
      if (list == 1) left = own.count[1];
      if (left == 0) return;
      const First first = own.first[list];
      row = first.row;
      at.kv_head = first.kv_head;
      at.pass = first.pass;
      span = first.span;
      enters = true;
    }
    if (enters) {
#pragma unroll 1
      do {
        at.enter(b, row);
        row += at.rows;
      } while (list == 0 && first_span() == last_span());
    }
    if (spans) span = list == 1 ? last_span() : first_span();
    at.chunk = begin();
  }
};

// The sum of what the lanes before have.
__device__ __forceinline__ u32 sum_before(u32 own) {
  u32 sum = own;
#pragma unroll
  for (u32 x = 1; x < LANES; x *= 2) {
    const u32 before = __shfl_up_sync(~0u, sum, x);
    if (lane_id() >= x) sum += before;
  }
  return sum - own;
}

// Finds this SM's units; a whole warp, of which a lane has a row, which stands for the run that begins there.
template <class A> __device__ __forceinline__ void deal_sweeps(const Block& b) {
  Sweep<A> run = {};
  u32 groups = 0, first = 0, last = 0;  // passes of all KV heads; spans
  if (b.shared.runs >> lane_id() & 1) {
    run.at.enter(b, lane_id());
    groups = run.at.passes() * A::KV_HEADS;
    first = run.first_span();
    last = run.last_span();
  }
  // In front of the last one.
  const u32 near = least(last, Spans<A>::COUNT) - least(first, Spans<A>::COUNT), far = last - first - near;
  auto& dealt = Sweep<A>::dealt(b);
  u32 taken = 0;  // SMs with units of the list before
#pragma unroll 1
  for (u32 list = 0; list < 2; ++list) {
    run.span = last;
    const u32 spans = list == 0 ? near + far : 1, units = groups * spans, units_before = sum_before(units);
    // If there are few, each has an SM of its own.
    const bool few = __shfl_sync(~0u, units_before + units, LANES - 1) <= gridDim.x;
    const u32 near_cost = few ? 1 : SWEEP_COST + A::NEAR_SPAN, far_cost = few ? 1 : SWEEP_COST + A::FAR_SPAN;
    const u32 last_cost = few ? 1 : SWEEP_COST + run.end() - run.begin();
    const u32 cost = groups == 0 ? 0 : list == 0 ? near * near_cost + far * far_cost : last_cost;  // of a pass and KV head
    const u32 most = groups == 0 ? 0 : list == 1 ? last_cost : far > 0 ? far_cost : near > 0 ? near_cost : 0;
    const u32 costs_before = sum_before(groups * cost), costs = __shfl_sync(~0u, costs_before + groups * cost, LANES - 1);
    // An SM has those that begin in its share of all costs. Few units are the first SMs', since the last ones have a
    // router's scores to make (router.cuh); of the second list SMs without units of the first come first.
    const u32 share = max(max((costs + gridDim.x - 1) / gridDim.x, warp_max(most)), 1u);
    const u32 place = (blockIdx.x + gridDim.x - taken) % gridDim.x;
    u32 bounds[2];  // numbers of the first and of the one behind the last
#pragma unroll 1
    for (u32 n = 0; n < 2; ++n) {
      const u32 target = share * (place + n), own = least(target - least(target, costs_before), groups * cost);
      const u32 whole = own / max(cost, 1u), rest = own - whole * cost, of_near = least(rest, near * near_cost);
      u32 count = whole * spans + (list == 1 && rest > 0);
      if (list == 0) count += (of_near + near_cost - 1) / near_cost + (rest - of_near + far_cost - 1) / far_cost;
#pragma unroll
      for (u32 x = 1; x < LANES; x *= 2) count += __shfl_xor_sync(~0u, count, x);
      (n == 0 ? bounds[0] : bounds[1]) = count;
    }
    if (lane_id() == 0) dealt.count[list] = bounds[1] - bounds[0];
    const u32 own = bounds[0] - units_before;
    if (bounds[0] >= units_before && own < units) {
      const u32 group = own / spans;
      dealt.first[list] = {lane_id(), group / run.at.passes(), group % run.at.passes(), list == 0 ? first + own % spans : last};
    }
    taken = (costs + share - 1) / share % gridDim.x;
  }
}

// The stage's units as the loader sees them. False if the launch ended.
template <class A> __device__ __forceinline__ bool stream_sweeps(Loader& b, u32 cache) {
  Sweep<A> unit = Sweep<A>::before(0);
  u32 end = 0;
#pragma unroll 1
  while (true) {
    if (++unit.at.chunk >= end) {
      unit.advance(b);
      if (unit.left == 0) return true;
      end = unit.end();
    }
    if (!stream_chunk<A>(b, cache, unit.at)) return false;
  }
}

// Adds up the spans of the runs whose last ones this SM has, a warp a query. Waits for those that are not there yet.
template <class A> __device__ __forceinline__ void join_sweeps(Consumer& b) {
  constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  static_assert(Spans<A>::of(A::MAX_CHUNKS - 1) < Parts<A>::SLOTS, "a span a part");
  Sweep<A> unit = Sweep<A>::before(1);
#pragma unroll 1
  while (true) {
    unit.advance(b);
    if (!unit.any()) break;
    const u32 query = unit.at.pass * QUERIES + anew(warp_id());
    if (whole_warp(query >= unit.at.queries())) continue;
    const u32 row = unit.at.row + query / GROUP, position = unit.at.position + query / GROUP;
    const u32 from = Spans<A>::of(first_chunk<A>(b, position)), to = Spans<A>::of(last_seen<A>(b, position, unit.at.run_end() - 1) / CHUNK);
    if (whole_warp(from < to)) add_parts<A>(b, row, unit.at.kv_head, query % GROUP, 0, to + 1 - from, true, 0);
  }
}

template <class A> __device__ __forceinline__ void attend_sweeps(Consumer& b, u32 cache) {
  using Space = AttentionSpace<A>;
  constexpr u32 GROUP = A::HEADS / A::KV_HEADS, V_STEPS = Space::V_STEPS;
  // Whether what can be done in front of the stage's inputs is done there: in a wide step there are many units, of which it
  // is the first's alone.
  constexpr bool EARLY = SLICES == 1;
  Space& space = *reinterpret_cast<Space*>(b.scratch);
  float2(&weights)[CONSUMERS][QUERIES] = *reinterpret_cast<float2(*)[CONSUMERS][QUERIES]>(b.shared.row_sums);
  const u32 warp = anew(warp_id()), lane = anew(lane_id());
  const u32 g = lane / 4, t = lane % 4;
  Sweep<A> now = {}, next = Sweep<A>::before(0);
  next.advance(b);
  if (!next.any()) {
    b.wait_inputs();
    return;
  }
  Cached<A> cached = {};
  Fresh<A> fresh = {};
  u32 taken = 0;       // slots of the chunk in registers that have not been given back
  bool ahead = false;  // the next chunk is there already
  // While the other SMs still multiply.
  if constexpr (EARLY) {
    // When all warps have met, all of them are behind the slots of the product before; else one could still wait for what a
    // slot had then, and its barrier would be in a phase too early for it.
    consumers_sync();
    taken = cached.take(b, next.at);
    ahead = true;
  }
  bool ready = false, there = false;  // the stage's inputs; a unit to multiply
#pragma unroll 1
  while (true) {
    const u32 query = now.at.pass * QUERIES, run_last = now.at.run_end() - 1;
    float top = MINUS_INFINITY, total = 0.f, sums[V_STEPS][16] = {};
    if (whole_warp(there)) {
      fresh.prepare(b, space, cache, now.at, 1);
      // The queries are there, and the last unit's sums have been read.
      consumers_sync();
      const u32 end = now.end();
#pragma unroll 1
      do {
        const u32 base = Cached<A>::base(now.at);
        if (!ahead) taken = cached.take(b, now.at);
        ahead = false;
        cached.take_fresh(space, base, fresh.from, fresh.count);
        float score[4];
        scores<A>(space, cached, score);
        b.give_back(taken, cached.read());
        const float before = top;
        // Where all rows see all of the warp's positions there is nothing to ask.
        const bool inside = base + WARP_POSITIONS <= now.at.position && (!A::WINDOWED || run_last < base + A::window(b));
        if (!whole_warp(inside)) {
          const u32 position = now.at.position + (query + g) / GROUP, seen = last_seen<A>(b, position, run_last);
          const u32 from = A::WINDOWED && position + 1 > A::window(b) ? position + 1 - A::window(b) : 0;
#pragma unroll
          for (u32 i = 0; i < 4; ++i) {
            const u32 p = base + t * 4 + i;
            if (p > seen || (A::WINDOWED && p < from)) score[i] = MINUS_INFINITY;
          }
        }
#pragma unroll
        for (u32 i = 0; i < 4; ++i) top = fmaxf(top, score[i]);
        u32 weight[4];
        const float own = weigh<A>(score, top, weight);
        // 0 in front of the first position that is seen.
        const float factor = power_of_two(before - (top == MINUS_INFINITY ? 0.f : top));
        total = fmaf(factor, total, own);
#pragma unroll
        for (u32 s = 0; s < V_STEPS; ++s) {
          float products[16];
          weighted<A>(weight, cached.v[s], products);
#pragma unroll
          for (u32 i = 0; i < 16; ++i) sums[s][i] = fmaf(factor, sums[s][i], products[i]);
        }
      } while (whole_warp(++now.at.chunk < end));
    }
    // The next unit's queries and rows are asked for in front of the sums.
    const bool more = next.any();
    const bool same = there && next.at.row == now.at.row && next.at.kv_head == now.at.kv_head && next.at.pass == now.at.pass;
    if (EARLY && more) fresh.template open<false>(b, next.at, next.begin() * CHUNK, next.end() * CHUNK, !same);
    Sweep<A> after = next;
    if (more) after.advance(b);
    if (whole_warp(!ready)) {
      if constexpr (A::Q_NORM && !EARLY) prefetch(A::q_gain(b), A::QK);
      if constexpr (A::K_NORM && !EARLY) prefetch(A::k_gain(b), A::QK);
      if (A::SINKS && A::sinks(b)) prefetch(A::sinks(b), A::HEADS);
      b.wait_inputs();
      ready = true;
    }
    if (EARLY && more) fresh.load(b, next.at);
    if (!EARLY && more) fresh.template open<true>(b, next.at, next.begin() * CHUNK, next.end() * CHUNK, !same);
    if (whole_warp(there)) {
      if (t == 0) weights[warp][g] = make_float2(top, total);
      Attended<A> all = {};
      float factor = 0.f;
#pragma unroll
      for (u32 s = 0; s < V_STEPS; ++s) {
        if (s > 0) consumers_sync();  // the columns before have been read
        store_sums<A>(space, sums[s]);
        consumers_sync();
        add_warps<A>(space, weights, s, factor, all);
      }
      if (query + warp < now.at.queries()) {
        const u32 r = (query + warp) / GROUP, position = now.at.position + r;
        const u32 from = Spans<A>::of(first_chunk<A>(b, position)), to = Spans<A>::of(last_seen<A>(b, position, run_last) / CHUNK);
        // Who adds up waits for what the row sees, whatever its scores are.
        if (now.span >= from && now.span <= to) {
          leave<A>(b, now.at.row + r, now.at.kv_head, (query + warp) % GROUP, from == to, now.span - from, fresh.sink, all);
        }
      }
    }
    if (!more) break;
    there = true;
    now = next;
    next = after;
  }
  join_sweeps<A>(b);
}
