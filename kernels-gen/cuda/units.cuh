// Attention's units: how they are dealt out to SMs, and how what is older than the step comes to them.
//
// A run is a sequence's rows in the step; their positions follow each other. Its rows' heads of a KV head are the run's
// queries of that head, row by row; a pass has eight of them, a warp's share of a product. A unit is a run, a KV head, a
// group of passes and a chunk of CHUNK positions. An SM takes units that follow each other.
//
// Which these are is known as soon as the step's rows are. The second finds it while the embedding is copied, once for all
// layers with the same heads and the same window; the loader streams the pages of a layer's units in front of the
// products behind it, while the stage before is still multiplied; and the consumers have them in the ring when they come.

constexpr u32 CHUNK = 128;
constexpr u32 WARP_POSITIONS = CHUNK / CONSUMERS;
constexpr u32 SPAN = 8;     // chunks
constexpr u32 NO_WINDOW = 0x7fffffff;  // no position is so large
constexpr u32 NO_PAGE = ~0u;
constexpr u32 QUERIES = 8;  // of a pass
constexpr u32 SUMMED = 64;  // columns whose sums are in shared memory at a time
#define MINUS_INFINITY __int_as_float(0xff800000)
static_assert(WARP_POSITIONS == 16 && QUERIES == CONSUMERS, "a warp's share of a product; a warp prepares a query");

// What decides how units are dealt out, by which bits do not change: what a unit's keys and values cost an SM, what a
// pass costs it, and adding up what lies in memory. Measured on an H200 by what a step takes: Llama-3.2-1B, 1 row, 512
// positions, 0.820 ms if four chunks are one SM's, 0.730 if they are four's.
constexpr u32 LOAD_COST = 1;
constexpr u32 PASS_COST = 2;
constexpr u32 JOIN_COST = 2;

// A condition that holds for all lanes of a warp or for none. The vote tells the compiler so, which otherwise guards
// every exchange of lanes behind it by a dozen instructions.
__device__ __forceinline__ bool whole_warp(bool condition) { return __all_sync(~0u, condition); }

// The first chunk that a row sees.
template <class A> __device__ __forceinline__ u32 first_chunk(const Block& b, u32 position) {
  return A::WINDOWED && position + 1 > A::window(b) ? (position + 1 - A::window(b)) / CHUNK : 0;
}

// A page's keys and values of a KV head, one behind the other.
template <class A> struct CacheShape {
  static constexpr u32 KEY_BYTES = A::PAGE_TOKENS * A::QK * 2, VALUE_BYTES = A::PAGE_TOKENS * A::V_PAD * 2;
  static constexpr u32 BLOCK_BYTES = KEY_BYTES + VALUE_BYTES;
  __device__ __forceinline__ static u8* at(const Block& b, u32 cache, u32 page, u32 kv_head) {
    return A::kv(b) + (((u64)cache * b.args.kv_pages + page) * A::CACHE_HEADS + kv_head) * (u64)BLOCK_BYTES;
  }
};

// Which spans come through the ring, and how (spans.cuh).
template <class A> struct SpanShape {
  static constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  static constexpr u32 KEY_BYTES = CacheShape<A>::KEY_BYTES, VALUE_BYTES = CacheShape<A>::VALUE_BYTES;
  static constexpr u32 PIECES = KEY_BYTES + VALUE_BYTES <= SLOT_BYTES ? 1 : 2;  // of a page
  static constexpr u32 PAGES = CHUNK / A::PAGE_TOKENS;                          // of a chunk
  static constexpr u32 PAGE_TILES = A::PAGE_TOKENS / WARP_POSITIONS;
  static constexpr bool ANY = SPANS && !A::BOTH_WAYS && GROUP <= QUERIES && A::MAX_CHUNKS > SPAN && CHUNK % A::PAGE_TOKENS == 0 &&
                              KEY_BYTES <= SLOT_BYTES && VALUE_BYTES <= SLOT_BYTES && PAGES * PIECES < RING_SLOTS;
  static_assert(CHUNK * SPAN == SPAN_POSITIONS && SPAN == CONSUMERS, "a chunk of a span a warp");
  // A layer's window cuts most spans: it has none.
  __device__ __forceinline__ static bool any(const Block& b) {
    if constexpr (!ANY) return false;
    return !A::WINDOWED || A::window(b) == NO_WINDOW;
  }
  // The spans of the run that begins in a row; all of its positions are behind them.
  __device__ __forceinline__ static u32 of(const Block& b, u32 row, u32 rows) {
    return rows * GROUP <= QUERIES ? b.shared.position[row] / SPAN_POSITIONS : 0;
  }
};

// A run, and a unit and a pass in it. Units are ordered by run, KV head, group and chunk.
template <class A> struct Place {
  static constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  u32 runs;          // a bit a row: a run begins there
  u32 unit;
  u32 row, rows;     // the run
  u32 position;      // of its first row; those of the others follow
  u32 from, chunks;  // that its rows see
  u32 groups;
  u32 kv_head, group, chunk, pass;

  // Chunks of them that have no unit: those of spans that come through the ring.
  __device__ __forceinline__ u32 behind(const Block& b) const {
    if constexpr (!SpanShape<A>::ANY) return 0;
    return SpanShape<A>::any(b) ? SpanShape<A>::of(b, row, rows) * SPAN : 0;
  }
  __device__ __forceinline__ u32 queries() const { return rows * GROUP; }
  __device__ __forceinline__ u32 units(const Block& b) const { return (chunks - behind(b)) * groups * A::KV_HEADS; }
  __device__ __forceinline__ u32 passes() const { return (queries() + QUERIES - 1) / QUERIES; }
  __device__ __forceinline__ u32 run_end() const { return position + rows; }
  // What the run has of the span that the chunk lies in: chunks `share` to `share_end`.
  __device__ __forceinline__ u32 share() const { return max(chunk / SPAN * SPAN, from); }
  __device__ __forceinline__ u32 share_end() const { return least(chunk / SPAN * SPAN + SPAN, from + chunks); }
  __device__ __forceinline__ u32 spans() const { return (from + chunks - 1) / SPAN - from / SPAN + 1; }
  // The pass behind the unit's last.
  __device__ __forceinline__ u32 pass_end(u32 together) const { return least((group + 1) * together, passes()); }

  // The run that begins in a row, with so many passes together; no rows behind the last.
  __device__ __forceinline__ void enter(const Block& b, u32 first, u32 together) {
    row = first;
    rows = 0;
    if (first >= b.rows()) return;
    const u32 others = runs >> row >> 1;
    rows = others != 0 ? __ffs(others) : b.rows() - row;
    position = b.shared.position[row];
    from = first_chunk<A>(b, position);
    chunks = (run_end() - 1) / CHUNK - from + 1;
    groups = (passes() + together - 1) / together;
  }
  // The first pass of the unit of this number; there is one.
  __device__ __forceinline__ void seek(const Block& b, u32 target, u32 together) {
    unit = target;
    enter(b, 0, together);
#pragma unroll 1
    while (whole_warp(target >= units(b))) {
      target -= units(b);
      enter(b, row + rows, together);
    }
    const u32 old = behind(b);
    chunk = from + old + target % (chunks - old);
    target /= chunks - old;
    group = target % groups;
    kv_head = target / groups;
    pass = group * together;
  }
  // The next unit's first pass; no rows behind the last.
  __device__ __forceinline__ void advance_unit(const Block& b, u32 together) {
    pass = pass_end(together) - 1;
    advance(b, together);
  }
  // The next pass; none of a run behind the last.
  __device__ __forceinline__ void advance(const Block& b, u32 together) {
    if (++pass < pass_end(together)) return;
    ++unit;
    if (++chunk == from + chunks) {
      chunk = from + behind(b);
      if (++group == groups) {
        group = 0;
        if (++kv_head == A::KV_HEADS) {
          kv_head = 0;
          enter(b, row + rows, together);
          chunk = from + behind(b);
        }
      }
    }
    pass = group * together;
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
      Place<A> run = {};
      run.runs = runs;
      run.enter(b, row, together);
      units = run.units(b);
      longest = least(run.chunks - run.behind(b), SPAN) + (run.spans() > 1 ? 16 : 0);
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
  Place<A> next;  // the first

  __device__ __forceinline__ static Own& of(const Block& b) {
    static_assert(sizeof(Own) == sizeof b.shared.dealt[0]);
    return *reinterpret_cast<Own*>(b.shared.dealt[A::deal(b)]);
  }
};

template <class A> __device__ __forceinline__ u32 spare_place(const Block& b);  // spans.cuh

// What decides which units there are of the run that begins in a row: its first and its last chunk, and how many rows it has.
template <class A> __device__ __forceinline__ u32 deal_key(const Place<A>& run) {
  // Of the last chunk and of the first that is seen only whether they are the one or the next is left to say.
  return run.position / CHUNK << 8 | (run.from + run.chunks) % 2 << 7 | run.from % 2 << 6 | run.rows;
}

// Finds this SM's units in layers like this one; a whole warp. Mostly they are those of the step before, and the text of all
// this is in no cache: the second would be waited for.
template <class A> __device__ __forceinline__ void deal_units(const Block& b) {
  Place<A> next = {};
  next.runs = b.shared.runs;
  const u32 row = lane_id();
  u32 key = 0;
  if (next.runs >> row & 1) {
    next.enter(b, row, 1);
    key = deal_key(next);
  }
  u32& kept = b.shared.dealt_for[A::deal(b)][least(row, STEP_ROWS - 1)];
  const bool same = whole_warp(row >= STEP_ROWS || key == kept);
  if (row < STEP_ROWS) kept = key;
  if (same) {
    Place<A>& first = Own<A>::of(b).next;
    if (row == 0) first.position = b.shared.position[first.row];
    return;
  }
  const Deal dealt = deal<A>(b, next.runs);
  u32 place = blockIdx.x;
  if constexpr (SpanShape<A>::ANY) {
    if (SpanShape<A>::any(b)) place = spare_place<A>(b);
  }
  u32 target = least((place + 1) * dealt.each, dealt.units), end = 0;
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
      target = least(place * dealt.each, dealt.units);
    }
  }
  if (lane_id() == 0) Own<A>::of(b) = {dealt.together, end, next};
}

// How a page's keys and values of a KV head come through the ring: as one piece if they fit into a slot together, else
// pieces of keys, then of values, of as many positions as fit.
//
// Where a unit has much, its pages do not come through the ring (RINGS), but consumers load them: else the few SMs that have
// units of one sequence would begin the next product with an empty ring, and all others wait for them. Measured on an H200,
// through the ring and not (ms): one and eight rows of a rank of MiMo-V2.5-Pro, whose units have 80 KB, 2.937, 5.693 and 2.785,
// 5.531; eight rows of Llama-3.2-1B (32 KB) 0.669 and 0.689, 32 of them 1.135 and 1.185, one behind 4,090 positions 0.650 and
// 0.668, one behind 512 0.604 and 0.606; Qwen3-8B (64 KB) with eight rows behind 4,080 4.986 and 5.150. To decide it step by
// step, with the text of both, costs more than either: 0.677, 1.170, and 2.886, 5.671 for the rank.
template <class A> struct PageShape {
  static constexpr u32 PAGES = CHUNK / A::PAGE_TOKENS, TILES = A::PAGE_TOKENS / WARP_POSITIONS;  // of a chunk, of a page
  static_assert(PAGES * TILES == CONSUMERS, "a tile a warp");
  static constexpr u32 fitting(u32 row) {
    u32 tiles = TILES;
    while (tiles * WARP_POSITIONS * row > SLOT_BYTES) tiles /= 2;
    return tiles;
  }
  static constexpr bool RINGS = PAGES * CacheShape<A>::BLOCK_BYTES <= (64 << 10);
  static constexpr bool WHOLE = CacheShape<A>::BLOCK_BYTES <= SLOT_BYTES;
  static constexpr u32 KEY_TILES = fitting(A::QK * 2), VALUE_TILES = fitting(A::V_PAD * 2);  // of a piece
  static_assert(KEY_TILES > 0 && VALUE_TILES > 0, "the rows of a tile fit into a slot");
  static constexpr u32 KEY_BYTES = KEY_TILES * WARP_POSITIONS * A::QK * 2, VALUE_BYTES = VALUE_TILES * WARP_POSITIONS * A::V_PAD * 2;
  static constexpr u32 KEY_PIECES = TILES / KEY_TILES, PIECES = WHOLE ? 1 : KEY_PIECES + TILES / VALUE_TILES;
  static constexpr u32 BYTES = WHOLE ? CacheShape<A>::BLOCK_BYTES : KEY_BYTES > VALUE_BYTES ? KEY_BYTES : VALUE_BYTES;  // of the largest
};

// A unit's pages that come through the ring: those of positions that are older than the step and that a row of it sees.
template <class A> struct UnitPages {
  u32 first, count;  // of the chunk's
  __device__ __forceinline__ static UnitPages of(const Block& b, const Place<A>& at) {
    const u32 start = at.chunk * CHUNK, old = least(at.position - least(start, at.position), CHUNK);
    const u32 end = (old + A::PAGE_TOKENS - 1) / A::PAGE_TOKENS;
    u32 first = 0;
    if constexpr (A::WINDOWED) {
      const u32 unseen = at.position + 1 - least(A::window(b), at.position + 1);  // positions in front of what rows see
      if (unseen > start) first = least((unseen - start) / A::PAGE_TOKENS, end);
    }
    return {first, end - first};
  }
};

// A page's keys and values of a KV head. False if the launch ended.
template <class A> __device__ __forceinline__ bool stream_page(Loader& b, const u8* from) {
  using Page = PageShape<A>;
  if constexpr (Page::WHOLE) return b.piece(from, Page::BYTES);
#pragma unroll 1
  for (u32 n = 0; n < Page::PIECES; ++n) {
    const u32 bytes = n < Page::KEY_PIECES ? Page::KEY_BYTES : Page::VALUE_BYTES;
    if (!b.piece(from, bytes)) return false;
    from += bytes;
  }
  return true;
}

template <class A> __device__ __forceinline__ bool stream_spans(Loader& b, u32 cache);  // spans.cuh

// The stage as the loader sees it. False if the launch ended.
template <class A> __device__ __forceinline__ bool stream_cache(Loader& b, u32 cache) {
  if (!b.wait_step()) return false;
  b.begin_tape(true, PageShape<A>::BYTES, nullptr, 1, 0);
  if constexpr (SpanShape<A>::ANY) {
    if (!stream_spans<A>(b, cache)) return false;
  }
  const u32 together = Own<A>::of(b).together, end = PageShape<A>::RINGS ? Own<A>::of(b).end : 0;
  Place<A> at = Own<A>::of(b).next;
#pragma unroll 1
  for (; at.unit < end; at.advance_unit(b, together)) {
    const UnitPages<A> pages = UnitPages<A>::of(b, at);
    const u32* const entry = b.args.page_table + (u64)b.shared.sequence[at.row] * b.args.pages_per_sequence + at.chunk * PageShape<A>::PAGES + pages.first;
    u32 page = pages.count > 0 ? *entry : 0;
#pragma unroll 1
    for (u32 n = 0; n < pages.count; ++n) {
      const u8* const from = CacheShape<A>::at(b, cache, page, at.kv_head);
      page = entry[least(n + 1, pages.count - 1)];  // on its way while the ring is waited for
      if (!stream_page<A>(b, from)) return false;
    }
  }
  b.next_stage();
  return true;
}
