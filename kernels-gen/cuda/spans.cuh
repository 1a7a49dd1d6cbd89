// Attention over the spans of a long context that are older than the step: keys and values come through the ring, as
// weights do.
//
// Only the kernel for long contexts has this (SPANS): beside it, the instructions of a layer no longer fit the SM's cache
// together in some models, which costs a step of few positions up to 3 %.
//
// attention.cuh brings a chunk's keys and values into registers: a warp has 16 positions of it, and the warps meet in
// every chunk. Nothing else can be done where the step's own rows are among them. But most of a long context is older,
// and where it lies is known as soon as the step begins: so the loader streams it, in front of the products behind it
// and while the stage before is still multiplied, and a warp that does not wait for the others has a chunk of its own.
//
// A unit is a span of a run and a KV head: eight chunks, a warp each, of whose eight tiles of 16 positions it makes
// scores, then weights, then sums. The warps' sums are added up through shared memory, once a span, and go into memory
// as those of any whole span do, to be joined with the run's others. Tiles, chunks and spans are the same positions as in
// attention.cuh, and the same operations make the same numbers of them in the same order; so it changes no bit who of
// both has a span.
//
// Runs of one pass, which decode, have spans here; those of several, which read a prompt or verify a block, none: there
// are no registers for the sums of several passes, and keys and values are read once for all of them anyway.
//
// In the ring an SM's spans follow each other, in each the chunks, in each the pages: a piece if keys and values fit a
// slot together, else one of each. Every warp passes all slots in order, and gives each back: those of other warps at
// once, its own when it has read them. So none falls behind by more than a phase of a slot's barrier.

// A span among those of an SM, which follow each other by run, KV head and span; every SM has as many, give or take one.
// Loader and consumers find the same.
template <class A> struct SpanPlace {
  u32 left = 0;            // of the SM's, this one included
  u32 row = 0, rows = 0;   // the run
  u32 spans = 0;           // of it
  u32 kv_head = 0, span = 0;

  // The first run from a row on that has spans; there is one.
  __device__ __forceinline__ void enter(const Block& b, u32 from) {
    for (u32 runs = b.shared.long_runs >> from << from;; runs &= runs - 1) {
      row = __ffs(runs) - 1;
      const u32 others = b.shared.runs >> row >> 1;
      rows = others != 0 ? __ffs(others) : b.rows() - row;
      spans = SpanShape<A>::of(b, row, rows);
      if (spans > 0) return;
    }
  }
  // Of all runs and KV heads.
  __device__ __forceinline__ static u32 count(const Block& b) {
    u32 all = 0;
#pragma unroll 1
    for (u32 runs = b.shared.long_runs; runs != 0; runs &= runs - 1) {
      const u32 first = __ffs(runs) - 1, others = b.shared.runs >> first >> 1;
      all += SpanShape<A>::of(b, first, others != 0 ? __ffs(others) : b.rows() - first) * A::KV_HEADS;
    }
    return all;
  }
  __device__ __forceinline__ void begin(const Block& b) {
    const u32 all = count(b);
    // No more than some millions of them.
    u32 target = all * blockIdx.x / gridDim.x;
    left = all * (blockIdx.x + 1) / gridDim.x - target;
    if (left == 0) return;
    enter(b, 0);
#pragma unroll 1
    while (target >= spans * A::KV_HEADS) {
      target -= spans * A::KV_HEADS;
      enter(b, row + rows);
    }
    kv_head = target / spans;
    span = target % spans;
  }
  __device__ __forceinline__ void advance(const Block& b) {
    if (--left == 0 || ++span < spans) return;
    span = 0;
    if (++kv_head < A::KV_HEADS) return;
    kv_head = 0;
    enter(b, row + rows);
  }
};

// This SM's place among all of them where units of chunks are dealt out, which come behind the spans: SMs with a span
// fewer than others are the first. (Where some have none at all it is better to leave them where they are: measured,
// Qwen3-8B behind 16,000 positions 5.17 ms in place of 5.03; Llama-3.2-1B behind 65,536 1.349 in place of 1.397.)
template <class A> __device__ __forceinline__ u32 spare_place(const Block& b) {
  const u32 all = SpanPlace<A>::count(b);
  if (all < gridDim.x) return blockIdx.x;
  const u32 most = (all + gridDim.x - 1) / gridDim.x, light = most * gridDim.x - all;  // of these there are so many
  const u32 begin = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
  const u32 before = most * blockIdx.x - begin;  // in front of this one
  return end - begin < most ? before : light + blockIdx.x - before;
}

// The stage's spans as the loader sees them. False if the launch ended.
template <class A> __device__ __forceinline__ bool stream_spans(Loader& b, u32 cache) {
  if (!SpanShape<A>::any(b)) return true;
  SpanPlace<A> at;
#pragma unroll 1
  for (at.begin(b); at.left > 0; at.advance(b)) {
    constexpr u32 PAGES = SPAN * SpanShape<A>::PAGES;
    const u32* pages = b.args.page_table + (u64)b.shared.sequence[at.row] * b.args.pages_per_sequence + at.span * PAGES;
    u32 page = *pages;
#pragma unroll 1
    for (u32 n = 0; n < PAGES; ++n) {
      const u8* const from = CacheShape<A>::at(b, cache, page, at.kv_head);
      page = pages[least(n + 1, PAGES - 1)];  // on its way while the ring is waited for
      if (!stream_page<A>(b, from)) return false;
    }
  }
  return true;
}

// A chunk's sums, as a warp has them: of query g the columns 64s + 16t to 64s + 16t + 15, relative to the largest score.
template <class A> struct ChunkSums {
  float top, total;
  float v[AttentionSpace<A>::V_STEPS][16];
};

// The warp's own chunk, which is next in the ring: gives its slots back. `asked`: whether there is a query g.
template <class A> __device__ __forceinline__ ChunkSums<A> attend_chunk(Consumer& b, const AttentionSpace<A>& space, bool asked) {
  using Shape = SpanShape<A>;
  using Space = AttentionSpace<A>;
  constexpr u32 PIECES = Shape::PIECES, TILES = CHUNK / WARP_POSITIONS;
  // Tiles whose loads are on their way together: those of a whole page would take the registers of other stages, so the
  // lanes meet in between, behind which the compiler moves no load.
  constexpr u32 NEAR = A::QK + A::V > 128 ? 1 : 2;
  const u32 lane = anew(lane_id()), g = lane / 4, t = lane % 4;
  const u8* values[Shape::PAGES];
  ChunkSums<A> sums;
  sums.top = MINUS_INFINITY;
  float top[TILES], total[TILES];
  u32 weight[TILES][4];
#pragma unroll
  for (u32 page = 0; page < Shape::PAGES; ++page) {
    const u8* const slot = b.wait_slot(page * PIECES);
    values[page] = slot + Shape::KEY_BYTES;  // if they are in the same
    u32 read = 0;
#pragma unroll
    for (u32 n = 0; n < Shape::PAGE_TILES; ++n) {
      Cached<A> tile = {};
      Cached<A>::each_key([&](u32 i, u32 s, u32 offset) {
        tile.k[i][s] = *reinterpret_cast<const uint4*>(slot + n * (WARP_POSITIONS * A::QK * 2) + offset);
        read |= tile.k[i][s].x;
      });
      // Weights relative to the tile's own largest score, as pairs of halves.
      const u32 at = page * Shape::PAGE_TILES + n;
      float score[4];
      scores<A>(space, tile, score);
      top[at] = MINUS_INFINITY;
#pragma unroll
      for (u32 i = 0; i < 4; ++i) {
        if (!asked) score[i] = MINUS_INFINITY;
        top[at] = fmaxf(top[at], score[i]);
      }
      total[at] = weigh<A>(score, top[at], weight[at]);
      sums.top = fmaxf(sums.top, top[at]);
      if (n % NEAR == NEAR - 1) __syncwarp();
    }
    if constexpr (PIECES == 2) b.release_slot(page * PIECES, read, 1);
  }
  // Added up as the lanes of a warp add up what eight warps have, in pairs.
#pragma unroll
  for (u32 n = 0; n < TILES; ++n) {
    top[n] = power_of_two(top[n] - sums.top);
    total[n] = multiply(top[n], total[n]);
  }
#pragma unroll
  for (u32 x = 1; x < TILES; x *= 2) {
#pragma unroll
    for (u32 n = 0; n < TILES; n += 2 * x) total[n] += total[n + x];
  }
  sums.total = total[0];
#pragma unroll
  for (u32 s = 0; s < Space::V_STEPS; ++s) {
#pragma unroll
    for (u32 i = 0; i < 16; ++i) sums.v[s][i] = 0.f;
  }
#pragma unroll
  for (u32 page = 0; page < Shape::PAGES; ++page) {
    if constexpr (PIECES == 2) values[page] = b.wait_slot(page * PIECES + 1);
    u32 read = 0;
#pragma unroll
    for (u32 n = 0; n < Shape::PAGE_TILES; ++n) {
      const u32 tile = page * Shape::PAGE_TILES + n;
      Cached<A> own = {};
      Cached<A>::each_value(WARP_POSITIONS, [&](u32 i, u32 s, u32 offset) {
        own.v[s][i] = *reinterpret_cast<const uint4*>(values[page] + n * (WARP_POSITIONS * A::V_PAD * 2) + offset);
        read |= own.v[s][i].x;
      });
#pragma unroll
      for (u32 s = 0; s < Space::V_STEPS; ++s) {
        float products[16];
        weighted<A>(weight[tile], own.v[s], products);
#pragma unroll
        for (u32 i = 0; i < 16; ++i) sums.v[s][i] = fmaf(top[tile], products[i], sums.v[s][i]);
      }
      if (n % NEAR == NEAR - 1) __syncwarp();
    }
    b.release_slot(page * PIECES + PIECES - 1, read, 1);
  }
  b.pass_slots(Shape::PAGES * PIECES);
  return sums;
}

// All spans of the SM, into memory, where whoever has a run's last chunk finds them (attention.cuh). Inputs are waited for
// if there are any; gives whether they were.
template <class A> __device__ __forceinline__ bool attend_spans(Consumer& b, u32 cache) {
  using Shape = SpanShape<A>;
  using Space = AttentionSpace<A>;
  if constexpr (!Shape::ANY) return false;
  SpanPlace<A> at;
  if (Shape::any(b)) at.begin(b);
  if (whole_warp(at.left == 0)) return false;
  Space& space = *reinterpret_cast<Space*>(b.scratch);
  float2(&weights)[CONSUMERS][QUERIES] = *reinterpret_cast<float2(*)[CONSUMERS][QUERIES]>(b.shared.row_sums);
  b.wait_inputs();
  Place<A> now = {};
  now.runs = b.shared.runs;
#pragma unroll 1
  for (bool first = true; whole_warp(at.left > 0); at.advance(b), first = false) {
    if (whole_warp(first || at.row != now.row || at.kv_head != now.kv_head)) {
      now.row = at.row;
      now.rows = at.rows;
      now.position = b.shared.position[at.row];
      now.kv_head = at.kv_head;
      Fresh<A> fresh = {};
      fresh.template open<true>(b, now, true, false);
      // Nobody is at the scores of queries before: all warps have met behind them.
      fresh.prepare(b, space, cache, now, 1);
      consumers_sync();
    }
    now.chunk = at.span * SPAN;
    const u32 warp = anew(warp_id()), lane = anew(lane_id()), g = lane / 4, t = lane % 4;
    // Chunks of the warps before this one, its own, and those behind it.
#pragma unroll 1
    for (u32 n = 0; n < warp * (Shape::PAGES * Shape::PIECES); ++n) b.pass_slot();
    const ChunkSums<A> own = attend_chunk<A>(b, space, g < now.queries());
#pragma unroll 1
    for (u32 n = (warp + 1) * (Shape::PAGES * Shape::PIECES); n < SPAN * (Shape::PAGES * Shape::PIECES); ++n) b.pass_slot();
    // Chunks one behind the other: of query `warp`.
    Attended<A> sums;
    sums.clear();
    float earlier[SPAN], later[SPAN];
#pragma unroll
    for (u32 s = 0; s < Space::V_STEPS; ++s) {
      consumers_sync();  // the sums before have been read
      float* const to = space.sums[warp][g];
      const u32 place = sums_at(g, t);
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        *reinterpret_cast<float4*>(to + (place ^ j * 4)) = make_float4(own.v[s][4 * j], own.v[s][4 * j + 1], own.v[s][4 * j + 2], own.v[s][4 * j + 3]);
      }
      if (s == 0 && t == 0) weights[warp][g] = make_float2(own.top, own.total);
      consumers_sync();
      const float* const of = space.sums[0][warp] + (sums_at(warp, lane / 8) ^ lane / 2 % 4 * 4) + lane % 2 * 2;
#pragma unroll
      for (u32 n = 0; n < SPAN; ++n) {
        if (s == 0) sums.follow(weights[n][warp], earlier[n], later[n]);
        const float2 next = *reinterpret_cast<const float2*>(of + n * QUERIES * SUMMED);
        sums.v[s] = make_float2(fmaf(later[n], next.x, earlier[n] * sums.v[s].x), fmaf(later[n], next.y, earlier[n] * sums.v[s].y));
      }
    }
    if (whole_warp(warp < now.queries())) {
      leave<A>(b, now.row + warp / Shape::GROUP, now.kv_head, warp % Shape::GROUP, false, A::MAX_CHUNKS + at.span, 0.f, sums);
    }
  }
  return true;
}
