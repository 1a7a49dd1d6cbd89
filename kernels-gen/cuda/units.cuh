// What attention goes by, and how what is older than the step comes to it.
//
// A run is a sequence's rows in the step; their positions follow each other. Its rows' heads of a KV head are the run's
// queries of that head, row by row; a pass has eight of them, a warp's share of a product. Positions lie in chunks of CHUNK, of
// which a warp has 16. What of these is an SM's unit, and how units are dealt out, there are two answers to: sweeps.cuh and,
// where heads are wide, chunks.cuh.
//
// Which units an SM has is known as soon as the step's rows are. The second finds it while the embedding is copied, once for all
// layers with the same heads and the same window; the loader streams the pages of a layer's units in front of the
// products behind it, while the stage before is still multiplied; and the consumers have them in the ring when they come.

constexpr u32 CHUNK = 128;
constexpr u32 WARP_POSITIONS = CHUNK / CONSUMERS;
constexpr u32 SPAN = 8;  // parts that are asked for together; chunks whose sums are added up before others are (chunks.cuh)
constexpr u32 NO_WINDOW = 0x7fffffff;  // no position is so large
constexpr u32 NO_PAGE = ~0u;
constexpr u32 QUERIES = 8;  // of a pass
constexpr u32 SUMMED = 64;  // columns whose sums are in shared memory at a time
#define MINUS_INFINITY __int_as_float(0xff800000)
static_assert(WARP_POSITIONS == 16 && QUERIES == CONSUMERS, "a warp's share of a product; a warp prepares a query");

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

// How a page's keys and values of a KV head come through the ring: as one piece if they fit into a slot together, else
// pieces of keys, then of values, of as many positions as fit.
//
// Where a chunk has much, its pages do not come through the ring (RINGS), but consumers load them: else the few SMs that have
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

// A run, and of it a KV head, a pass and a chunk.
template <class A> struct Place {
  u32 row, rows;     // the run
  u32 position;      // of its first row; those of the others follow
  u32 from, chunks;  // that its rows see
  u32 kv_head, pass, chunk;

  __device__ __forceinline__ u32 queries() const { return rows * (A::HEADS / A::KV_HEADS); }
  __device__ __forceinline__ u32 passes() const { return (queries() + QUERIES - 1) / QUERIES; }
  __device__ __forceinline__ u32 run_end() const { return position + rows; }

  // The run that begins in a row; no rows behind the last.
  __device__ __forceinline__ void enter(const Block& b, u32 first) {
    row = first;
    rows = 0;
    if (first >= b.rows()) return;
    const u32 others = b.shared.runs >> row >> 1;
    rows = others != 0 ? __ffs(others) : b.rows() - row;
    position = b.shared.position[row];
    from = first_chunk<A>(b, position);
    chunks = (run_end() - 1) / CHUNK - from + 1;
  }
};

template <class A> __device__ __forceinline__ void deal_chunks(const Block& b, bool same);  // chunks.cuh
template <class A> __device__ __forceinline__ void deal_sweeps(const Block& b);             // sweeps.cuh

// What decides which units there are of the run that begins in a row: its first and its last chunk, and how many rows it has.
template <class A> __device__ __forceinline__ u32 deal_key(const Place<A>& run) {
  // Of the last chunk and of the first that is seen only whether they are the one or the next is left to say.
  return run.position / CHUNK << 8 | (run.from + run.chunks) % 2 << 7 | run.from % 2 << 6 | run.rows;
}

// Finds this SM's units in layers like this one; a whole warp. Mostly they are those of the step before, and the text of all
// this is in no cache: the second would be waited for.
template <class A> __device__ __forceinline__ void deal_units(const Block& b) {
  const u32 row = lane_id();
  u32 key = 0;
  if (b.shared.runs >> row & 1) {
    Place<A> run = {};
    run.enter(b, row);
    key = deal_key(run);
  }
  u32& kept = b.shared.dealt_for[A::deal(b)][least(row, STEP_ROWS - 1)];
  const bool same = whole_warp(row >= STEP_ROWS || key == kept);
  if (row < STEP_ROWS) kept = key;
  if constexpr (PageShape<A>::RINGS) {
    if (!same) deal_sweeps<A>(b);
  } else {
    deal_chunks<A>(b, same);
  }
}

// A chunk's pages that come through the ring: those of positions that are older than the step and that a row of it sees.
template <class A> struct ChunkPages {
  u32 first, count;
  __device__ __forceinline__ static ChunkPages of(const Block& b, const Place<A>& at) {
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

// What is older than the step of the place's chunk, as the loader sees it. False if the launch ended.
template <class A> __device__ __forceinline__ bool stream_chunk(Loader& b, u32 cache, const Place<A>& at) {
  const ChunkPages<A> pages = ChunkPages<A>::of(b, at);
  const u32* const entry = b.args.page_table + (u64)b.shared.sequence[at.row] * b.args.pages_per_sequence + at.chunk * PageShape<A>::PAGES + pages.first;
  u32 page = pages.count > 0 ? *entry : 0;
#pragma unroll 1
  for (u32 n = 0; n < pages.count; ++n) {
    const u8* const from = CacheShape<A>::at(b, cache, page, at.kv_head);
    page = entry[least(n + 1, pages.count - 1)];  // on its way while the ring is waited for
    if (!stream_page<A>(b, from)) return false;
  }
  return true;
}

template <class A> __device__ __forceinline__ bool stream_sweeps(Loader& b, u32 cache);  // sweeps.cuh

// The stage as the loader sees it. False if the launch ended.
template <class A> __device__ __forceinline__ bool stream_cache(Loader& b, u32 cache) {
  if (!b.wait_step()) return false;
  b.begin_tape(true, PageShape<A>::BYTES, nullptr, 1, 0);
  if constexpr (PageShape<A>::RINGS) {
    if (!stream_sweeps<A>(b, cache)) return false;
  }
  b.next_stage();
  return true;
}
