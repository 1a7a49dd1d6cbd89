// Who multiplies a tile of a product, and how it passes through the ring (gemm.cuh says what a stage S says).

// Tiles of the stage in this launch: a step whose logits nobody wants has no head.
template <class S> __device__ __forceinline__ u32 tiles(const Block& b) { return !ROUND && S::LOGITS && b.args.logit_rows == 0 ? 0 : S::TILES; }

// Blocks that fit a slot of the ring: a fixed number, whatever else the kernel has longer slots for.
template <class W> constexpr u32 SLOT_BLOCKS = SLOT_BYTES / W::BLOCK_BYTES < 4 * CONSUMERS ? SLOT_BYTES / W::BLOCK_BYTES : 4 * CONSUMERS;

// Who multiplies a tile.
template <class S> struct Team {
  // Registers of the rows' columns that a lane keeps, if an octet is shared by so many warps.
  __device__ static constexpr u32 registers(u32 warps) { return (S::BLOCKS + warps - 1) / warps * (S::Weights::LANE_COLUMNS / 2) * SLICES; }
  __device__ static constexpr u32 idle(u32 warps) { return (warps - S::BLOCKS % warps) % warps; }
  static constexpr u32 HALF = CONSUMERS / 2;
  static constexpr u32 HALF_SLOTS = (S::BLOCKS + SLOT_BLOCKS<typename S::Weights> / HALF * HALF - 1) / (SLOT_BLOCKS<typename S::Weights> / HALF * HALF);
  // Octets of halves are long: one team, unless it would have more idle warps. Octets of codes are short.
  static constexpr bool TWO = registers(HALF) <= KEPT_REGISTERS * 3 / 4 && 2 * S::OPERANDS * HALF_SLOTS <= RING_SLOTS &&
                              (S::Weights::LANE_COLUMNS > 8 || idle(HALF) < idle(CONSUMERS));
  // A pair of FP4 is long: what it takes counts where an SM has few of them. Tiles of several octets are short work, and the
  // more of them at a time, the better.
  static constexpr bool PAIR = S::Weights::LANE_COLUMNS == 32 && S::OPERANDS == 2;
  static constexpr bool SHORT = S::TILE_OCTETS > 1;
  // Of short tiles two experts' share a slot, if a warp can keep an expert's rows: each warp has one of its own then.
  static constexpr u32 EXPERTS = SHORT && registers(1) <= 32 && 2 * S::TILE_OCTETS * S::BLOCKS * S::Weights::BLOCK_BYTES <= SLOT_BYTES ? 2 : 1;
  static constexpr u32 WARPS = SHORT ? 2 / EXPERTS : TWO && !PAIR ? HALF : CONSUMERS;
  // Whether there are registers for the next expert's rows beside those that are multiplied.
  static constexpr bool ROWS_AHEAD = registers(WARPS) <= KEPT_REGISTERS / 2;
  static constexpr u32 TEAMS = CONSUMERS / WARPS;
  // Octets of a tile, by the same team. Two of FP4 are multiplied together.
  static constexpr u32 OCTETS = S::Weights::LANE_COLUMNS == 32 ? S::OPERANDS : S::OPERANDS > TEAMS ? S::OPERANDS / TEAMS : 1;
  static constexpr u32 SHARE = S::OPERANDS / OCTETS;         // teams that share a tile
  static constexpr u32 MEMBERS = WARPS * SHARE * EXPERTS;    // warps that share a tile, or the tiles of a slot
  static constexpr u32 GROUPS = CONSUMERS / MEMBERS;         // of these; so many tiles, or slots, are in work at a time
  // Whether a tile's sums do not say that all consumers have written what normalizes the rows (`Shared::scaled` does).
  static constexpr bool TELLS_SCALES = GROUPS > 1 && S::PREPARED && !S::SCALED;

  __device__ __forceinline__ static u32 warp() { return anew(warp_id()) % WARPS; }
  __device__ __forceinline__ static u32 group() { return anew(warp_id()) / MEMBERS; }
  // Which of the experts of a slot this team has.
  __device__ __forceinline__ static u32 expert() { return EXPERTS > 1 ? anew(warp_id()) / WARPS % EXPERTS : 0; }
  // The first operand that this team has of its tiles.
  __device__ __forceinline__ static u32 operand() { return anew(warp_id()) / WARPS % SHARE; }
  __device__ __forceinline__ static void meet() { block_barrier<WARPS * LANES>(2 + anew(warp_id()) / WARPS); }
};

// How an octet lies in slots of the ring: as many blocks in each as there are whole rounds of a team.
template <class S> struct Slots {
  static constexpr u32 WARP_BLOCKS = SLOT_BLOCKS<typename S::Weights> / Team<S>::WARPS;  // of a slot
  static constexpr u32 BLOCKS = WARP_BLOCKS * Team<S>::WARPS;
  static constexpr u32 COUNT = (S::BLOCKS + BLOCKS - 1) / BLOCKS;  // of an octet
  // A pair of FP4, of whole rounds each, comes as one octet of twice as many blocks, if that is fewer pieces: each takes the
  // loader as long as memory takes for 10 KB. (One of Qwen3-30B-A3B's is half as long.)
  static constexpr bool JOINED = Team<S>::PAIR && S::BLOCKS % Team<S>::WARPS == 0 && (2 * S::BLOCKS + BLOCKS - 1) / BLOCKS < 2 * COUNT;
  static constexpr u32 OF_TILE = JOINED ? (2 * S::BLOCKS + BLOCKS - 1) / BLOCKS : S::OPERANDS * COUNT;
  // Octets that share a slot are as one to the ring.
  static constexpr u32 OCTETS = Team<S>::SHORT || JOINED ? 1 : S::OPERANDS;
  static constexpr u32 OCTET_BYTES = (Team<S>::SHORT ? S::TILE_OCTETS : JOINED ? 2 : 1) * S::BLOCKS * S::Weights::BLOCK_BYTES;
  static constexpr u32 TILE_BYTES = OCTETS * OCTET_BYTES;
  static_assert(S::TILE_OCTETS == 1 || (COUNT == 1 && S::OPERANDS == 1 && OCTET_BYTES <= SLOT_BYTES), "several octets are in a slot");
  static constexpr u32 PIECE_BYTES = Team<S>::SHORT ? OCTET_BYTES : BLOCKS * S::Weights::BLOCK_BYTES;
  static constexpr u32 PIECE = PIECE_BYTES < OCTET_BYTES ? PIECE_BYTES : OCTET_BYTES;
  // Parts of the columns, and slots of an octet in each but perhaps the last.
  static constexpr u32 FIT = KEPT_REGISTERS / (S::Weights::LANE_COLUMNS / 2 * SLICES) / WARP_BLOCKS, ALLOWED = FIT > 0 ? FIT : 1;
  static constexpr u32 PARTS = (COUNT + ALLOWED - 1) / ALLOWED;
  static constexpr u32 PART = (COUNT + PARTS - 1) / PARTS;
  __device__ __forceinline__ static u32 in_part(u32 part) {
    if constexpr (COUNT % PART == 0) return PART;
    return part + 1 < PARTS ? PART : COUNT - part * PART;
  }
};

// Buffers for sums of tiles. With two teams they also bound how far one runs ahead of the other: a team takes a
// tile when control has the sums of the tile BUFFERS before. All slots up to that one's were filled then, so
// that a barrier of a slot is never asked for a phase after the next.
template <class S> struct Sums {
  // That a tile, or those of a slot, have sums of.
  static constexpr u32 WARPS = S::OPERANDS * S::TILE_OCTETS * Team<S>::WARPS * Team<S>::EXPERTS;
  static constexpr u32 IN_SCRATCH = SUM_BYTES / (WARPS * sizeof(WarpSums));
  static constexpr u32 IN_RING = Team<S>::TEAMS > 1 ? RING_SLOTS / (S::OPERANDS * Slots<S>::PART) : SUM_BUFFERS;
  static constexpr u32 BUFFERS = least(SUM_BUFFERS, least(IN_SCRATCH, IN_RING));
  static_assert(BUFFERS >= 2);
};

// A tile's octets through the ring, as far as they are of a part. False if the launch ended.
template <class S> __device__ __forceinline__ bool stream_tile(Loader& b, const u8* from, u32 part = 0) {
  using L = Slots<S>;
  // Rolled up, as all that runs once a tile: a layer's instructions should stay in the SM's cache.
#pragma unroll 1
  for (u32 octet = 0; octet < L::OCTETS; ++octet, from += L::OCTET_BYTES) {
    const u32 start = part * (L::PART * L::PIECE);
    const u32 end = L::PARTS == 1 || part + 1 == L::PARTS ? L::OCTET_BYTES : start + L::PART * L::PIECE;
#pragma unroll 1
    for (u32 at = start; at < end; at += L::PIECE) {
      if (!b.piece(from + at, end - at < L::PIECE ? end - at : L::PIECE)) return false;
    }
  }
  return true;
}

// Tiles through the ring. False if the launch ended.
template <class S> __device__ __forceinline__ bool stream(Loader& b, const u8* weights) {
  const u32 first = b.first_tile(), all = tiles<S>(b) - S::ROUTER_TILES;
  // Rows in parts come in another order than they lie in, and are not brought into L2 ahead.
  const u32 own = Slots<S>::PARTS == 1 && first < all ? (all - first + gridDim.x - 1) / gridDim.x : 0;
  constexpr bool HALVES = S::Weights::LANE_COLUMNS == 8;
  b.begin_tape(HALVES, Slots<S>::PIECE, weights + (u64)first * Slots<S>::TILE_BYTES, Slots<S>::TILE_BYTES, own);
#pragma unroll 1
  for (u32 part = 0; part < Slots<S>::PARTS; ++part) {
    for (u32 tile = b.first_tile(); tile < tiles<S>(b); tile += gridDim.x) {
      const u8* from = weights + (u64)tile * Slots<S>::TILE_BYTES;
      if constexpr (S::ROUTER_TILES > 0) {
        if (tile >= all) from = S::router_weights(b) + (tile - all) * Slots<S>::TILE_BYTES;
      }
      if (!stream_tile<S>(b, from, part)) return false;
    }
  }
  b.pass_tiles(tiles<S>(b));
  b.next_stage();
  return true;
}
