// Rows times streamed weights: y[row][feature] = sum over columns of x[row][column] w[feature][column].
//
// A tile is an octet of features over all columns (one octet an operand: gate and up make a pair).
// Its blocks of 512 bytes pass through the ring. The consumers are one team, or two of 4 warps; an octet is one
// team's, of which warp w takes the blocks w, w + WARPS, w + 2 WARPS, ... and keeps the activations of just
// these columns in registers for the whole stage, so that a block costs one 16-byte load a lane and its
// tensor-core products. Two teams have two octets in work at the same time: what one waits for (its slot, its
// loads, the chain of its products) the other hides, and what an octet costs a warp beside its products is
// spread over twice as many of them.
//
// Rows too long for the registers are multiplied in parts: all tiles with the first part of the columns, then
// all with the next. Control keeps the sums in between.
//
// A tensor-core product has 16 rows, a slice of the step 8. A lane's 16 bytes of a row are the pairs p0 to p3, its
// 16 bytes of weights w0 to w3; an even product is one with (w0, w2), an odd one with (w1, w3). Two slices, p and q,
// make an even product of (p0, q0, p2, q2) and an odd one of (p1, q1, p3, q3), whose upper halves are p's sums and
// whose lower halves are q's. One slice alone goes into both products as it lies: p0 and p2 as the upper 8 rows,
// p1 and p3 as the lower 8; the upper half of the even product and the lower half of the odd one are wanted, and
// nobody looks at the others. So 16 rows take no more products than 8, and no register is moved.
//
// The order of every sum is fixed by the shape alone: block i of a slot goes to chain i % 2, each
// chain has an even and an odd sum, these are added in order, then the warps' in order, then the parts'. A
// row's bits depend on no other row.
//
// FP8 and FP4 are widened to bfloat16 in registers, which loses nothing: a lane then has 16 (32) columns
// of a row in a block, two (four) such sets of pairs. Of FP8 a block's sums are multiplied by its scales before
// they join, or all are by the feature's in the epilogue; of FP4 each weight is multiplied by its own.
//
// A stage S says:
//   Weights              Bf16, F16, E4m3, E4m3Rows, E4m3Channel, Mxfp4, Nvfp4
//   SCALES, scales(b)    of E4m3: scales of an octet, and all of them (of experts: an expert behind the other)
//   K, BLOCKS, COLS      columns of x, blocks of an octet, features of one operand
//   OPERANDS, TILES      operands, and tiles of the stage
//   ROUTER_TILES         of these, behind the others: a router's scores of what the product adds to its rows; then
//                        router_weights(b), octets of four experts each, whose features 2e and 2e + 1 add up to that of expert
//                        e; old_scores(b) [rows][OLD_STRIDE] f32, of the rows before, and scores(b) [rows][STRIDE] f32
//   TILE_OCTETS          octets of a tile, of each operand; several only of experts (whose tiles are not `multiply_tile`'s),
//                        an even number if they share a slot of the ring (SHARES_SLOT); else 1
//   Input                F32, or the half type of the products
//   CHECKED              whether x, and its squares, may be late (handoff.cuh)
//   ROW_OCTETS, ORDER    of halves: whether x lies in octets of rows, and the order of its columns (rows.cuh)
//   PREPARED             whether x is bf16 that its maker has prepared for a norm (prepared.cuh)
//   squares(b)           then: [rows][K / 8, padded to four] f32
//   SCALED               then: whether the stage before, or the choice in front of the product, has found what normalizes them
//   NORM, gain(b), EPS   whether x is normed first, or was prepared for that; its gains
//   LOGITS               whether its rows are those whose logits are wanted
//   input(block)         x, [rows][K]
//   partial(block)       of rows in parts: [TILES][OPERANDS][SLICES][LANES] float2, sums of the parts before
//   Carry, before(), finish()  the epilogue: what to load ahead, and what to do with a pair of results
//   PREPARES             whether it prepares its results for a norm (prepared.cuh)

__device__ __forceinline__ float silu_gate(float gate, float up) { return gate * sigmoid(gate) * up; }
// gpt-oss: the gate bounded from above, what it opens from both sides, and one added. NaN stays NaN, which
// fminf would not see to.
__device__ __forceinline__ float clamped_gate(float alpha, float limit, float gate, float up) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate * sigmoid(alpha * gate) * (up + 1.f);
}

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
  // A pair of FP4 is long: what it takes counts where an SM has few of them. So are tiles of several octets, unless these
  // share a slot of the ring: then they are short work, and the more of them at a time, the better.
  static constexpr bool PAIR = S::Weights::LANE_COLUMNS == 32 && S::OPERANDS == 2;
  static constexpr bool SEVERAL = S::TILE_OCTETS > 1;
  static constexpr bool SHORT = S::SHARES_SLOT;
  // Of short tiles two experts' share a slot, if a warp can keep an expert's rows: each warp has one of its own then.
  static constexpr u32 EXPERTS = SHORT && registers(1) <= 32 && 2 * S::TILE_OCTETS * S::BLOCKS * S::Weights::BLOCK_BYTES <= SLOT_BYTES ? 2 : 1;
  static constexpr u32 WARPS = SHORT ? 2 / EXPERTS : TWO && !PAIR && !SEVERAL ? HALF : CONSUMERS;
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
  // Octets that share a slot are as one to the ring; of the others there are so many in a tile.
  static constexpr u32 OCTETS = Team<S>::SHORT || JOINED ? 1 : S::OPERANDS * S::TILE_OCTETS;
  static constexpr u32 OCTET_BYTES = (Team<S>::SHORT ? S::TILE_OCTETS : JOINED ? 2 : 1) * S::BLOCKS * S::Weights::BLOCK_BYTES;
  static constexpr u32 TILE_BYTES = OCTETS * OCTET_BYTES;
  static_assert(S::TILE_OCTETS == 1 || (COUNT == 1 && S::OPERANDS == 1 && OCTET_BYTES <= SLOT_BYTES), "an octet of several is in a slot");
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

// The activations of a warp's columns, as the tensor cores take them. Lane 4r + q holds row r of each slice and the
// columns 8q to 8q + 7 (16q to 16q + 15, 32q to 32q + 31) of each of its blocks: the piece of a weight block
// that it loads as well.
template <class S> struct Activations {
  static constexpr u32 ROUNDS = (S::BLOCKS + Team<S>::WARPS - 1) / Team<S>::WARPS;
  static constexpr u32 COUNT = Slots<S>::PARTS == 1 ? ROUNDS : Slots<S>::PART * Slots<S>::WARP_BLOCKS;
  static constexpr u32 SETS = S::Weights::LANE_COLUMNS / 8;
  u32 pair[COUNT][SETS][SLICES][4];
  float scale[SLICES];  // of a row without a norm: the products are multiplied by it
};

// Which row of the input is one of the products; zeros if there is none.
struct Source {
  bool there;
  u32 row;
};

__device__ __forceinline__ float largest(float m, float4 v) {
  return fmaxf(fmaxf(fmaxf(m, fabsf(v.x)), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}
__device__ __forceinline__ float squares(float s, float4 v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, s))));
}
__device__ __forceinline__ float4 scaled(float4 v, float s) { return make_float4(v.x * s, v.y * s, v.z * s, v.w * s); }
__device__ __forceinline__ float4 plus(float4 v, float4 w) { return make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w); }
__device__ __forceinline__ float4 times(float4 v, float4 w) { return make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w); }

// Halves reach only to 65504: rows are scaled by a power of two, which changes no digit, so that the
// largest value is between 128 and 256. 0 and infinity keep the scale 1.
__device__ __forceinline__ float row_scale(Bf16, float) { return 1.f; }
__device__ __forceinline__ float row_scale(F16, float amax) {
  if (!(amax > 1e-30f) || amax > 1e30f) return 1.f;
  u32 exponent = __float_as_uint(amax) & 0x7f800000u;
  return __uint_as_float(exponent - (7u << 23));
}

// Where a row of halves begins for this lane: what differs from lane to lane and from row to row of the places of its
// pieces, in halves. It is known before the row is there.
struct RowStart {
  bool there;
  u32 at;
};

template <class S> struct RowPlaces {
  static constexpr u32 APART = S::ROW_OCTETS ? SLICE_ROWS : 1;  // from one 32 columns to the next, in these
  // Whether columns lie in the order in which the lanes here want them; or whether 32 that follow each other are a lane's.
  static constexpr bool IN_ORDER = S::ROW_OCTETS && S::Weights::LANE_COLUMNS == 8u << S::ORDER;
  static constexpr bool WHOLE = S::ORDER == 0 && S::Weights::LANE_COLUMNS == 32;
};

template <class S> __device__ __forceinline__ RowStart row_start(Source source) {
  const u32 row = S::ROW_OCTETS ? half_at(source.row, 0, S::K) : source.row * S::K;
  const u32 quarter = anew(lane_id()) % 4 * (RowPlaces<S>::IN_ORDER ? 8 : RowPlaces<S>::WHOLE ? 32 * RowPlaces<S>::APART : 0);
  return {source.there, anew(row + Team<S>::warp() * (S::Weights::BLOCK_COLUMNS * RowPlaces<S>::APART) + quarter)};
}

// Rows of a slice that lie in the half type of the products: this lane's row, or zeros if it is not there (never, if ALL);
// of a part of its columns.
template <class S, bool ALL> __device__ __forceinline__ void load_halves(const Block& b, Activations<S>& a, u32 slice, RowStart start, u32 part) {
  constexpr u32 WARPS = Team<S>::WARPS, COUNT = Activations<S>::COUNT, APART = RowPlaces<S>::APART;
  constexpr u32 BLOCK = S::Weights::BLOCK_COLUMNS, STRIDE = BLOCK * WARPS;
  const u32 quarter = anew(lane_id()) % 4, first = part * COUNT;
  const u32 column = Team<S>::warp() * BLOCK + quarter * S::Weights::LANE_COLUMNS;  // of a round's first block
  const u16* const x = S::input(b) + start.at + first * (STRIDE * APART);
  a.scale[slice] = 1.f;
#pragma unroll
  for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
    for (u32 set = 0; set < Activations<S>::SETS; ++set) {
      const u32 place = column_place(quarter * S::Weights::LANE_COLUMNS + set * 8, S::ORDER);
      const u32 behind = RowPlaces<S>::IN_ORDER ? set * (32 * APART) : RowPlaces<S>::WHOLE ? set * 8 : place % 32 + place / 32 * (32 * APART);
      const u16* from = x + behind + i * (STRIDE * APART);
      const bool whole = Slots<S>::PARTS == 1 && (i + 1) * WARPS <= S::K / BLOCK;
      uint4 v = make_uint4(0, 0, 0, 0);
      if ((ALL || start.there) && (whole || column + (first + i) * STRIDE + set * 8 < S::K)) v = take4<S::CHECKED>(reinterpret_cast<const u32*>(from));
      u32(&pair)[4] = a.pair[i][set][slice];
      pair[0] = v.x; pair[1] = v.y; pair[2] = v.z; pair[3] = v.w;
    }
  }
}

// The same of rows in float32 without a norm. The whole team.
template <class S> __device__ __forceinline__ void load_floats(Consumer& b, Activations<S>& a, u32 slice, Source source) {
  using W = typename S::Weights::Act;
  constexpr u32 WARPS = Team<S>::WARPS, COUNT = Activations<S>::COUNT;
  constexpr u32 STRIDE = S::Weights::BLOCK_COLUMNS * WARPS, QUADS = S::Weights::LANE_COLUMNS / 4;
  const u32 lane = anew(lane_id()), warp = Team<S>::warp();
  const u32 row = lane / 4, quarter = lane % 4;
  const u32 column = warp * S::Weights::BLOCK_COLUMNS + quarter * S::Weights::LANE_COLUMNS;  // of the first block
  auto inside = [&](u32 i, u32 h) {
    return source.there && ((i + 1) * STRIDE <= S::K || column + i * STRIDE + h * 4 < S::K);
  };
  a.scale[slice] = 1.f;
  static_assert(!S::NORM && !S::CHECKED && Slots<S>::PARTS == 1);
  const float* const x = S::input(b) + (u64)source.row * S::K + column;
  if constexpr (S::ROW_SCALE) {
    float amax = 0.f;
#pragma unroll 2
    for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
      for (u32 h = 0; h < QUADS; ++h) {
        if (inside(i, h)) amax = largest(amax, load4(x + i * STRIDE + h * 4));
      }
    }
    // The row over its 4 lanes, then over the team's warps.
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1)); amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
    const u32 own = anew(warp_id()), team = own - warp;
    if (quarter == 0) b.shared.row_sums[slice % 2][own][row] = amax;
    Team<S>::meet();
#pragma unroll
    for (u32 w = 0; w < WARPS; ++w) amax = fmaxf(amax, b.shared.row_sums[slice % 2][team + w][row]);
    a.scale[slice] = row_scale(W(), amax);
  }
  const float to_half = 1.f / a.scale[slice];  // a power of two: exact
#pragma unroll
  for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
    for (u32 h = 0; h < QUADS; ++h) {
      float4 v = make_float4(0, 0, 0, 0);
      if (inside(i, h)) v = scaled(load4(x + i * STRIDE + h * 4), to_half);
      a.pair[i][h / 2][slice][h % 2 * 2] = W::pack(v.x, v.y);
      a.pair[i][h / 2][slice][h % 2 * 2 + 1] = W::pack(v.z, v.w);
    }
  }
}

// A lane's largest word of rows that lie in half types.
template <class S> __device__ __forceinline__ u32 row_word(const Activations<S>& a) {
  u32 m = 0;
#pragma unroll
  for (u32 i = 0; i < Activations<S>::COUNT; ++i) {
#pragma unroll
    for (u32 set = 0; set < Activations<S>::SETS; ++set) {
#pragma unroll
      for (u32 slice = 0; slice < SLICES; ++slice) {
#pragma unroll
        for (u32 n = 0; n < 4; ++n) m = largest_word(m, a.pair[i][set][slice][n]);
      }
    }
  }
  return m;
}

// All slices; `source(row)` says what each row is. (A row that is loaded in place of those that are not there, as in
// `load_inputs`, spares the zeros, but all SMs ask for it at the same time: 8 rows of a rank of MiMo-V2.5-Pro took 15 %
// longer.)
template <class S, class F> __device__ __forceinline__ void load_rows(Consumer& b, Activations<S>& a, F source) {
#pragma unroll
  for (u32 slice = 0; slice < SLICES; ++slice) {
    const Source of = source(slice * SLICE_ROWS + anew(lane_id()) / 4);
    if constexpr (S::HALF_INPUT) load_halves<S, false>(b, a, slice, row_start<S>(of), 0);
    else load_floats<S>(b, a, slice, of);
  }
}

// Rows of a slice in float32, which may be normed. As the products want them, a lane would read pieces of 16 bytes
// all over the row, every team the same ones; so each row is read once, by a warp, as it lies, and handed out
// as halves through shared memory, as many columns at a time as fit. Halves of a normed row have its gains, and
// the products are multiplied by what normalizes it, which is known when all of the row has been seen. All
// consumers.
template <class S> __device__ __forceinline__ void share_slice(Consumer& b, Activations<S>& a, u32 slice, Source source, u32 part) {
  static_assert(CONSUMERS == SLICE_ROWS, "a warp a row");
  using W = typename S::Weights::Act;
  constexpr u32 LANE_COLUMNS = S::Weights::LANE_COLUMNS, BLOCK = S::Weights::BLOCK_COLUMNS, STRIDE = BLOCK * Team<S>::WARPS;
  constexpr u32 COUNT = Activations<S>::COUNT, ALL = (S::K + LANES * 4 - 1) / (LANES * 4);
  // A row's bytes in shared memory, beside its halves: rows begin in other banks.
  constexpr u32 PAD = LANE_COLUMNS == 8 ? 64 : 16;
  constexpr u32 FIT = ((SCRATCH_BYTES - SCALE_BYTES) / SLICE_ROWS - PAD) / 2 / STRIDE;
  constexpr u32 TURN = least(COUNT, FIT);  // rounds of the products at a time
  constexpr u32 ROW_BYTES = TURN * STRIDE * 2 + PAD, LOADS = TURN * STRIDE / (LANES * 4);
  static_assert(FIT > 0 && STRIDE % (LANES * 4) == 0 && (TURN * STRIDE * 2) % 128 == 0);
  // Whether the row is read once more, in front: of parts none sees all of it; and halves need its largest value.
  constexpr bool TWICE = (S::NORM && Slots<S>::PARTS > 1) || S::ROW_SCALE;
  const u32 lane = anew(lane_id()), own = anew(warp_id());
  const float* x = S::input(b) + (u64)source.row * S::K;
  const float* gain = S::gain(b);
  float sum = 0.f, amax = 0.f;
  auto look = [&](u32 column) {
    float4 v = make_float4(0, 0, 0, 0);
    if (column < S::K) {
      v = load4(x + column);
      if constexpr (S::NORM) {
        sum = squares(sum, v);
        v = times(v, *reinterpret_cast<const float4*>(gain + column));
      }
    }
    return v;
  };
  if (TWICE && source.there) {
#pragma unroll 4
    for (u32 i = 0; i < ALL; ++i) amax = largest(amax, look((i * LANES + lane) * 4));
#pragma unroll
    for (u32 n = LANES / 2; n > 0; n /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, n));
  }
  const float scale = S::ROW_SCALE ? row_scale(W(), amax) : 1.f;
  const float to_half = 1.f / scale;  // a power of two: exact
  float total = sum;
#pragma unroll
  for (u32 turn = 0; turn < COUNT; turn += TURN) {
    if (turn > 0) consumers_sync();  // the halves of the turn before were read
    // Of rows that are not there nobody looks at the products.
    if (source.there) {
      u8* to = b.scratch + own * ROW_BYTES + lane * 8;
      const u32 column = ((part * COUNT + turn) * (STRIDE / (LANES * 4)) * LANES + lane) * 4;
#pragma unroll 8
      for (u32 n = 0; n < LOADS; ++n) {
        const float4 v = scaled(look(column + n * (LANES * 4)), to_half);
        *reinterpret_cast<uint2*>(to + n * (LANES * 8)) = make_uint2(W::pack(v.x, v.y), W::pack(v.z, v.w));
      }
    }
    consumers_sync();
    const u8* from = b.scratch + lane / 4 * ROW_BYTES + (Team<S>::warp() * BLOCK + lane % 4 * LANE_COLUMNS) * 2;
#pragma unroll
    for (u32 i = 0; i < TURN; ++i) {
      if (turn + i >= COUNT) continue;
#pragma unroll
      for (u32 set = 0; set < Activations<S>::SETS; ++set) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + (i * STRIDE + set * 8) * 2);
        u32(&pair)[4] = a.pair[turn + i][set][slice];
        pair[0] = v.x; pair[1] = v.y; pair[2] = v.z; pair[3] = v.w;
      }
    }
  }
  if constexpr (S::NORM) {
    if constexpr (!TWICE) total = sum;
#pragma unroll
    for (u32 n = LANES / 2; n > 0; n /= 2) total += __shfl_xor_sync(~0u, total, n);
  }
  if (lane == 0) b.shared.row_scale[slice * SLICE_ROWS + own] = S::NORM ? scale * normalizing(total, S::K, S::EPS) : scale;
  consumers_sync();  // behind this, sums of tiles come to where the halves were
  a.scale[slice] = b.shared.row_scale[slice * SLICE_ROWS + lane / 4];
}

// The rows of a step, each as far as it is known before they are there. Where there is one slice, a row that is not there
// is the first one once more: nobody looks at its products, and loads without conditions need no zeros beside them.
constexpr bool ALL_ROWS = SLICES == 1;
struct Inputs {
  Source source[SLICES];
  RowStart start[SLICES];
};

template <class S> __device__ __forceinline__ Inputs find_inputs(const Block& b) {
  Inputs inputs;
  const u32 rows = S::LOGITS ? b.logit_rows() : b.rows();
#pragma unroll
  for (u32 slice = 0; slice < SLICES; ++slice) {
    if constexpr (S::HALF_INPUT) {
      const u32 row = slice * SLICE_ROWS + anew(lane_id()) / 4;
      const bool there = row < rows;
      inputs.source[slice] = {there, !there ? 0 : S::LOGITS ? b.shared.logit_row[row] : row};
      inputs.start[slice] = row_start<S>(inputs.source[slice]);
    } else {
      const u32 row = slice * SLICE_ROWS + anew(warp_id());
      inputs.source[slice] = {row < rows, S::LOGITS ? b.shared.logit_row[row] : row};
    }
  }
  return inputs;
}

// Of rows that may be late, whoever asks looks at the words.
template <class S> __device__ __forceinline__ void load_inputs(Consumer& b, Activations<S>& a, const Inputs& inputs, u32 part = 0) {
  if constexpr (S::HALF_INPUT) {
    auto load = [&] {
#pragma unroll
      for (u32 slice = 0; slice < SLICES; ++slice) load_halves<S, ALL_ROWS>(b, a, slice, inputs.start[slice], part);
    };
    if constexpr (S::PREPARED && !S::SCALED) {
      RowScales<S> scales;
      do {
        if (part == 0) scales.load(b);
        load();
      } while (S::CHECKED && b.late(largest_word(row_word<S>(a), part == 0 ? scales.word() : 0)));
      if (part == 0) {
        scales.store(b);
        scales.rest(b);
        if constexpr (Team<S>::TELLS_SCALES) b.pass_scales();
      }
    } else {
      do {
        load();
      } while (S::CHECKED && b.late(row_word<S>(a)));
    }
  } else {
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) share_slice<S>(b, a, slice, inputs.source[slice], part);
  }
}

// Four columns of a feature of octets of bfloat16, read where they lie: so many blocks behind those of `column`, which is
// the same for all lanes and stays out of what each computes.
__device__ __forceinline__ float4 octet_columns(const u8* octets, u32 blocks, u32 feature, u32 column, u32 behind) {
  const u8* block = octets + ((u64)(feature / OCTET) * blocks + column / 32) * OCTET_BLOCK + behind * OCTET_BLOCK;
  const uint2 pairs = *reinterpret_cast<const uint2*>(block + feature % OCTET * 64 + column % 32 * 2);
  return make_float4(Bf16::low(pairs.x), Bf16::high(pairs.x), Bf16::low(pairs.y), Bf16::high(pairs.y));
}

// Sums of even and odd products (see above), of two slices each, or of one.
struct Chain {
  static constexpr u32 PRODUCTS = (SLICES + 1) / 2;
  float even[PRODUCTS][4] = {}, odd[PRODUCTS][4] = {};

  // Adds the products of a piece of weights and of the same columns of all rows.
  template <class W> __device__ __forceinline__ void add(W type, const u32 (&x)[SLICES][4], u32 w0, u32 w1, u32 w2, u32 w3) {
    if constexpr (SLICES == 1) {
      mma(type, even[0], x[0], w0, w2);
      mma(type, odd[0], x[0], w1, w3);
    } else {
#pragma unroll
      for (u32 n = 0; n < PRODUCTS; ++n) {
        const u32(&p)[4] = x[2 * n], (&q)[4] = x[2 * n + 1];
        const u32 evens[4] = {p[0], q[0], p[2], q[2]}, odds[4] = {p[1], q[1], p[3], q[3]};
        mma(type, even[n], evens, w0, w2);
        mma(type, odd[n], odds, w1, w3);
      }
    }
  }
  __device__ __forceinline__ float2 total(u32 slice) const {
    const u32 half = slice % 2 * 2, other = SLICES == 1 ? 2 : half;
    return make_float2(even[slice / 2][half] + odd[slice / 2][other], even[slice / 2][half + 1] + odd[slice / 2][other + 1]);
  }
};

constexpr u32 CHAINS = 2;

// The chains of a warp, in order.
__device__ __forceinline__ float2 chains_total(const Chain (&chain)[CHAINS], u32 slice) {
  float2 total = chain[0].total(slice);
#pragma unroll
  for (u32 i = 1; i < CHAINS; ++i) {
    const float2 more = chain[i].total(slice);
    total.x += more.x;
    total.y += more.y;
  }
  return total;
}

// Scales come a few octets ahead, each warp's into a ring of its own behind the rest of the scratch: the
// time of an octet is shorter than the way to memory. A warp asks for those of several octets at a time (`ScaleTurn`).
constexpr u32 SCALE_TURNS = 4;
typedef float ScaleRing[SCALE_TURNS][LANES];

template <class S> __device__ __forceinline__ ScaleRing& scale_ring(const Block& b) {
  static_assert(S::Weights::SCALING != BY_OCTET || SCALE_BYTES == sizeof(ScaleRing) * CONSUMERS, "the emitter's size");
  return reinterpret_cast<ScaleRing*>(b.scratch + SCRATCH_BYTES - SCALE_BYTES)[warp_id()];
}

// Lanes that ask for the scales of an octet, each for that of one of the warp's blocks; octets that a warp's lanes ask for.
template <class S> struct ScaleTurn {
  static constexpr u32 COUNT = Activations<S>::COUNT;
  static constexpr u32 EACH = COUNT <= 4 ? 4 : COUNT <= 8 ? 8 : 16;
  static constexpr u32 OCTETS = LANES / EACH;
};

// Where an octet of a team's is among all of the weights, and the part of its columns; or that there is none.
struct OctetPlace {
  bool there;
  u32 part;
  u64 octet;
};

// Octet number `n` of this team's, of a product with all weights.
template <class S> __device__ __forceinline__ OctetPlace place_of(const Consumer& b, u32 n) {
  using T = Team<S>;
  // Tiles of a part that this group has.
  const u32 all = tiles<S>(b), own = b.first_tile() + T::group() * gridDim.x, step = gridDim.x * T::GROUPS;
  u32 number = n / T::OCTETS, part = 0;
  if constexpr (Slots<S>::PARTS > 1) {
    const u32 count = own < all ? (all - own + step - 1) / step : 0;
    if (count > 0) { part = number / count; number %= count; }
  }
  const u32 tile = own + number * step;
  return {tile < all && part < Slots<S>::PARTS, part, (u64)tile * S::OPERANDS + T::operand() + n % T::OCTETS};
}

// Asks for the scales of a turn of this team's octets; `place(n)` says where octet number `n` is.
template <class S, class F> __device__ __forceinline__ void fetch_scales(const Consumer& b, u32 turn, F place) {
  using T = Team<S>;
  constexpr u32 EACH = ScaleTurn<S>::EACH, OCTETS = ScaleTurn<S>::OCTETS;
  const u32 lane = anew(lane_id());
  const OctetPlace of = place(turn * OCTETS + lane / EACH);
  const u32 block = T::warp() + (of.part * Activations<S>::COUNT + lane % EACH) * T::WARPS;
  float& to = scale_ring<S>(b)[turn % SCALE_TURNS][lane];
  if (block >= S::BLOCKS || lane % EACH >= Activations<S>::COUNT) {
    to = 0.f;  // of no block: its codes are 0, and the scale must not be NaN
  } else if (of.there) {
    copy_word(&to, S::scales(b) + of.octet * S::SCALES + block / 2);
  }
  copy_group();
}

// Those of the first octets.
template <class S, class F> __device__ __forceinline__ void fetch_first_scales(const Consumer& b, F place) {
  if constexpr (S::Weights::SCALING == BY_OCTET) {
    static_assert(Activations<S>::COUNT <= ScaleTurn<S>::EACH, "a lane for the scale of each block");
#pragma unroll 1
    for (u32 turn = 0; turn < SCALE_TURNS; ++turn) fetch_scales<S>(b, turn, place);
  }
}

// Products of one block of E4m3 and the activations, onto the sums of a chain.
__device__ __forceinline__ void multiply_codes(Chain& chain, const u32 (&x)[2][SLICES][4], const uint4& w) {
  chain.add(Bf16(), x[0], E4m3::pair<0>(w.x), E4m3::pair<1>(w.x), E4m3::pair<0>(w.y), E4m3::pair<1>(w.y));
  chain.add(Bf16(), x[1], E4m3::pair<0>(w.z), E4m3::pair<1>(w.z), E4m3::pair<0>(w.w), E4m3::pair<1>(w.w));
}

// Products of a block of two octets of FP4 and the activations. Here the weights are the 16 rows of a product and
// the activations its columns: widening is what FP4 costs most, but on this chip a tensor-core product holds the
// other instructions up, and this way there are half as many. A lane has feature g = lane / 4 of both octets and the
// rows 2t and 2t + 1 of each slice, t = lane % 4. The halves of a word go to one chain each.
struct PairSums {
  float of[SLICES][CHAINS][4] = {};
};
template <class F>
__device__ __forceinline__ void multiply_pair(PairSums& d, const u32 (&x)[4][SLICES][4], const uint4& w, const uint4& v, const F& w_factors, const F& v_factors) {
  const Fp4::Words first(w), second(v);
#pragma unroll
  for (u32 set = 0; set < 4; ++set) {
    const u32 w_factor = w_factors.of(set), v_factor = v_factors.of(set);
    const u32 front[4] = {first.pair<0>(set, w_factor), second.pair<0>(set, v_factor),
                          first.pair<1>(set, w_factor), second.pair<1>(set, v_factor)};
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) mma(Bf16(), d.of[slice][0], front, x[set][slice][0], x[set][slice][1]);
    const u32 back[4] = {first.pair<2>(set, w_factor), second.pair<2>(set, v_factor),
                         first.pair<3>(set, w_factor), second.pair<3>(set, v_factor)};
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) mma(Bf16(), d.of[slice][1], back, x[set][slice][2], x[set][slice][3]);
  }
}

// The sums of such a product, in so many parts, to where those of other products lie: of rows and pairs of features.
template <u32 PARTS> __device__ __forceinline__ void store_pair(WarpSums& first, WarpSums& second, const PairSums (&sums)[PARTS], u32 lane) {
  const u32 at = lane % 4 * (2 * OCTET) + lane / 4;  // row 2t, feature g
#pragma unroll
  for (u32 slice = 0; slice < SLICES; ++slice) {
    static_assert(CHAINS == 2);
    float total[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      total[i] = 0.f;
#pragma unroll
      for (u32 part = 0; part < PARTS; ++part) total[i] += sums[part].of[slice][0][i] + sums[part].of[slice][1][i];
      total[i] *= Fp4::UNIT;
    }
    float* const to = reinterpret_cast<float*>(&first[slice]);
    float* const also = reinterpret_cast<float*>(&second[slice]);
    to[at] = total[0];
    to[at + OCTET] = total[1];
    also[at] = total[2];
    also[at + OCTET] = total[3];
  }
}

// Products of one block of FP4 and the activations, onto the sums of a chain.
template <class F> __device__ __forceinline__ void multiply_codes(Chain& chain, const u32 (&x)[4][SLICES][4], const uint4& w, const F& factors) {
  const Fp4::Words words(w);
#pragma unroll
  for (u32 set = 0; set < 4; ++set) {
    const u32 factor = factors.of(set);
    chain.add(Bf16(), x[set], words.pair<0>(set, factor), words.pair<1>(set, factor), words.pair<2>(set, factor), words.pair<3>(set, factor));
  }
}

// What a lane has of a block of FP4: 32 columns and their scales. Zeros, if there is no such block.
template <class W> struct Fp4Piece {
  uint4 codes;
  u32 scales;
  __device__ __forceinline__ void load(bool there, const u8* block, u32 lane) {
    codes = make_uint4(0, 0, 0, 0);
    scales = 0;
    if (!there) return;
    codes = reinterpret_cast<const uint4*>(block)[lane];
    scales = W::scales(block, lane);
  }
  __device__ __forceinline__ typename W::Factors factors() const { return W::factors(scales); }
};

// One octet of FP4, or a pair of them, through the ring: this warp's sums, to `sums` and as far behind it as a tile has
// warps.
template <class S, u32 OCTETS> __device__ __forceinline__ void multiply_fp4(Consumer& b, const Activations<S>& a, WarpSums* sums) {
  using W = typename S::Weights;
  using T = Team<S>;
  constexpr u32 WARP_BLOCKS = Slots<S>::WARP_BLOCKS, COUNT = Slots<S>::COUNT;
  static_assert(OCTETS * COUNT < RING_SLOTS && Slots<S>::PARTS == 1, "they are in the ring as a whole");
  static_assert(OCTETS <= 2);
  const u32 warp = T::warp(), lane = anew(lane_id());
  Chain chain[CHAINS];  // of an octet
  PairSums pair[1];     // of two
#pragma unroll
  for (u32 s = 0; s < COUNT; ++s) {
    const u8* slot[OCTETS];
    if (s == 0) {
      b.wait_tile(slot, COUNT);
    } else {
#pragma unroll
      for (u32 octet = 0; octet < OCTETS; ++octet) slot[octet] = b.wait_slot(octet * COUNT + s);
    }
#pragma unroll
    for (u32 i = 0; i < WARP_BLOCKS; ++i) {
      const u32 block = s * WARP_BLOCKS + i, first = s * Slots<S>::BLOCKS + i * T::WARPS;
      if (block >= Activations<S>::COUNT) continue;
      const bool there = first + T::WARPS <= S::BLOCKS || first + warp < S::BLOCKS;
      Fp4Piece<W> w[OCTETS];
#pragma unroll
      for (u32 octet = 0; octet < OCTETS; ++octet) w[octet].load(there, slot[octet] + (i * T::WARPS + warp) * W::BLOCK_BYTES, lane);
      if constexpr (OCTETS == 2) multiply_pair(pair[0], a.pair[block], w[0].codes, w[1].codes, w[0].factors(), w[1].factors());
      else multiply_codes(chain[i % CHAINS], a.pair[block], w[0].codes, w[0].factors());
    }
  }
  if constexpr (OCTETS == 2) {
    store_pair(sums[warp], sums[T::WARPS + warp], pair, lane);
  } else {
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) {
      const float2 total = chains_total(chain, slice);
      sums[warp][slice][lane] = make_float2(total.x * W::UNIT, total.y * W::UNIT);
    }
  }
}

// A pair of octets that lie one behind the other in the ring. The same operations in the same order.
template <class S> __device__ __forceinline__ void multiply_joined(Consumer& b, const Activations<S>& a, WarpSums* sums) {
  using W = typename S::Weights;
  using T = Team<S>;
  constexpr u32 BLOCKS = Slots<S>::BLOCKS;
  // The slot of a round of the second octet, which is behind all that the round needs.
  constexpr auto last = [](u32 round) { return (S::BLOCKS + round * T::WARPS) / BLOCKS; };
  const u32 warp = T::warp(), lane = anew(lane_id());
  const u8* begin[last(0) + 1];
  b.wait_tile(begin, 1);
  const u8* slot[Slots<S>::OF_TILE];
#pragma unroll
  for (u32 s = 0; s <= last(0); ++s) slot[s] = begin[s];
  PairSums pair[1];
#pragma unroll
  for (u32 round = 0; round < S::BLOCKS / T::WARPS; ++round) {
    if (round > 0 && last(round) > last(round - 1)) slot[last(round)] = b.wait_slot(last(round));
    Fp4Piece<W> w[2];
#pragma unroll
    for (u32 octet = 0; octet < 2; ++octet) {
      const u32 block = octet * S::BLOCKS + round * T::WARPS;
      w[octet].load(true, slot[block / BLOCKS] + (block % BLOCKS + warp) * W::BLOCK_BYTES, lane);
    }
    multiply_pair(pair[0], a.pair[round], w[0].codes, w[1].codes, w[0].factors(), w[1].factors());
  }
  store_pair(sums[warp], sums[T::WARPS + warp], pair, lane);
}

// One tile of FP4: an octet, or a pair of them side by side.
template <class S> __device__ __forceinline__ void multiply_fp4_tile(Consumer& b, const Activations<S>& a) {
  using T = Team<S>;
  static_assert(T::OCTETS == S::OPERANDS && Slots<S>::OF_TILE < RING_SLOTS && Slots<S>::PARTS == 1);
  WarpSums* const sums = b.sums(b.sum_buffer, Sums<S>::WARPS);
  if constexpr (Slots<S>::JOINED) multiply_joined<S>(b, a, sums);
  else multiply_fp4<S, T::OCTETS>(b, a, sums);
  b.template pass_tile<Slots<S>::OF_TILE>(Sums<S>::BUFFERS, T::TEAMS, T::GROUPS);
}

// One tile of several octets that do not share a slot, in pairs: all that an SM has of an expert, so that its rows are
// fetched, and control is told of sums, once.
template <class S> __device__ __forceinline__ void multiply_wide_tile(Consumer& b, const Activations<S>& a) {
  using T = Team<S>;
  static_assert(T::GROUPS == 1);
  WarpSums* sums = b.sums(b.sum_buffer, Sums<S>::WARPS);
#pragma unroll 1
  for (u32 octet = 0; octet + 2 <= S::TILE_OCTETS; octet += 2, sums += 2 * T::WARPS) {
    multiply_fp4<S, 2>(b, a, sums);
    b.template release_slots<2>(1);
  }
  if constexpr (S::TILE_OCTETS % 2 != 0) {
    multiply_fp4<S, 1>(b, a, sums);
    b.template release_slots<1>(1);
  }
  b.pass_sums(Sums<S>::BUFFERS, 1);
}

// One tile of several octets of FP4 that share a slot, each a few blocks long; or one of two experts', of which this warp
// has one, if it is there (`own`). Then the sums of even and of odd blocks stay apart, as those of two warps do, so that
// who multiplies changes no bit.
template <class S> __device__ __forceinline__ void multiply_short_tile(Consumer& b, const Activations<S>& a, bool own) {
  using W = typename S::Weights;
  using T = Team<S>;
  constexpr u32 COUNT = Activations<S>::COUNT;
  static_assert(S::TILE_OCTETS % 2 == 0, "they are multiplied in pairs");
  const u32 warp = T::warp(), lane = anew(lane_id());
  const u8* slot[1];
  b.wait_tile(slot, 1);
  WarpSums* sums = b.sums(b.sum_buffer, Sums<S>::WARPS) + T::expert() + warp;
#pragma unroll 1
  for (u32 octet = 0; own && octet < S::TILE_OCTETS; octet += 2) {
    PairSums pair[T::EXPERTS];
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
      const bool there = (i + 1) * T::WARPS <= S::BLOCKS || i * T::WARPS + warp < S::BLOCKS;
      const u8* block = slot[0] + T::expert() * Slots<S>::OCTET_BYTES + (octet * S::BLOCKS + i * T::WARPS + warp) * W::BLOCK_BYTES;
      Fp4Piece<W> w, v;
      w.load(there, block, lane);
      v.load(there, block + S::BLOCKS * W::BLOCK_BYTES, lane);
      multiply_pair(pair[i % T::EXPERTS], a.pair[i], w.codes, v.codes, w.factors(), v.factors());
    }
    WarpSums* to = sums + octet * T::MEMBERS;
    store_pair(to[0], to[T::MEMBERS], pair, lane);
  }
  b.template pass_tile<1>(Sums<S>::BUFFERS, T::GROUPS, T::GROUPS);
}

// One tile from the ring: its sums by this warp, into the next buffer. `octet` counts those with scales apart, and
// `place(octet)` is where they are.
template <class S, class F> __device__ __forceinline__ void multiply_octets(Consumer& b, const Activations<S>& a, u32 part, u32& octet, F place) {
  using W = typename S::Weights;
  using T = Team<S>;
  constexpr Scaling SCALING = W::SCALING;
  constexpr u32 BLOCK_VECTORS = W::BLOCK_BYTES / 16;
  constexpr u32 WARP_BLOCKS = Slots<S>::WARP_BLOCKS, PARTS = Slots<S>::PARTS, PART = Slots<S>::PART;
  const u32 warp = T::warp(), lane = anew(lane_id()), in_part = Slots<S>::in_part(part);
  // Of codes, which are as slow as memory, all slots of an octet are waited for, and given back, together, if they are few.
  constexpr bool TOGETHER = W::LANE_COLUMNS > 8 && PART <= RING_SLOTS / 4 && Slots<S>::COUNT % PART == 0;
  WarpSums* sums = b.sums(b.sum_buffer, S::OPERANDS * T::WARPS) + T::operand() * T::WARPS;
  if constexpr (T::SHARE > 1) b.pass_slots(T::operand() * in_part);
  // Not unrolled, so that a stage's instructions are few: a layer's should stay in the SM's cache.
#pragma unroll 1
  for (u32 n = 0; n < T::OCTETS; ++n) {
    const u32 turn = octet / ScaleTurn<S>::OCTETS, in_turn = octet % ScaleTurn<S>::OCTETS;
    if (SCALING == BY_OCTET && in_turn == 0) {
      copy_wait<SCALE_TURNS - 1>();
      __syncwarp();  // the other lanes' as well
    }
    // Behind a tile's first octet its buffer of sums is still free.
    const u8* slot[TOGETHER ? PART : 1];
    b.wait_tile(slot, 1);
    Chain chain[CHAINS];         // of what has no scales here
    float2 total[SLICES] = {};   // of FP8 that has
#pragma unroll
    for (u32 s = 0; s < PART; ++s) {
      if (Slots<S>::COUNT % PART != 0 && s >= in_part) break;
      float factor[WARP_BLOCKS];
      float2 factors[WARP_BLOCKS];
      if constexpr (SCALING == BY_OCTET) {
#pragma unroll
        for (u32 i = 0; i < WARP_BLOCKS; ++i) factor[i] = scale_ring<S>(b)[turn % SCALE_TURNS][in_turn * ScaleTurn<S>::EACH + (s * WARP_BLOCKS + i) % ScaleTurn<S>::EACH] * W::UNIT;
      }
      const u8* const at = TOGETHER ? slot[s] : s == 0 ? slot[0] : b.wait_slot();
      const uint4* from = reinterpret_cast<const uint4*>(at) + warp * BLOCK_VECTORS + lane;
      uint4 w[WARP_BLOCKS];
#pragma unroll
      for (u32 i = 0; i < WARP_BLOCKS; ++i) {
        w[i] = make_uint4(0, 0, 0, 0);
        if constexpr (SCALING == BY_FEATURE) factors[i] = make_float2(0, 0);
        const u32 first = (part * PART + s) * Slots<S>::BLOCKS + i * T::WARPS;
        if ((PARTS == 1 && first + T::WARPS <= S::BLOCKS) || S::BLOCKS % (PART * Slots<S>::BLOCKS) == 0 || first + warp < S::BLOCKS) {
          w[i] = from[i * T::WARPS * BLOCK_VECTORS];
          // Those of the features 2q and 2q + 1, whose sums this lane has.
          if constexpr (SCALING == BY_FEATURE) factors[i] = reinterpret_cast<const float2*>(from + i * T::WARPS * BLOCK_VECTORS - lane + LANES)[lane % 4];
        }
      }
#pragma unroll
      for (u32 i = 0; i < WARP_BLOCKS; ++i) {
        const u32 block = s * WARP_BLOCKS + i;
        if (block >= Activations<S>::COUNT) continue;
        if constexpr (SCALING == BY_OCTET || SCALING == BY_FEATURE) {
          Chain products;
          multiply_codes(products, a.pair[block], w[i]);
          if constexpr (SCALING == BY_OCTET) factors[i] = make_float2(factor[i], factor[i]);
          else factors[i] = make_float2(factors[i].x * W::UNIT, factors[i].y * W::UNIT);
#pragma unroll
          for (u32 slice = 0; slice < SLICES; ++slice) {
            const float2 of = products.total(slice);
            total[slice].x = fmaf(factors[i].x, of.x, total[slice].x);
            total[slice].y = fmaf(factors[i].y, of.y, total[slice].y);
          }
        } else if constexpr (SCALING == BY_SUM) {
          multiply_codes(chain[i % CHAINS], a.pair[block], w[i]);
        } else {
          chain[i % CHAINS].add(W(), a.pair[block][0], w[i].x, w[i].y, w[i].z, w[i].w);
        }
      }
      if constexpr (!TOGETHER) {
        u32 read = 0;
#pragma unroll
        for (u32 i = 0; i < WARP_BLOCKS; ++i) {
          read |= w[i].x;
          if constexpr (SCALING == BY_FEATURE) read |= __float_as_uint(factors[i].x);
        }
        b.release_slot(read, T::TEAMS);
      }
    }
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) {
      if constexpr (SCALING == UNSCALED || SCALING == BY_SUM) total[slice] = chains_total(chain, slice);
      if constexpr (SCALING == BY_SUM) total[slice] = make_float2(total[slice].x * W::UNIT, total[slice].y * W::UNIT);
      // That of a norm is control's to multiply by.
      if constexpr (S::ROW_SCALE && !S::NORM) { total[slice].x *= a.scale[slice]; total[slice].y *= a.scale[slice]; }
      sums[n * T::WARPS + warp][slice][lane] = total[slice];
    }
    if constexpr (TOGETHER) b.template release_slots<PART>(T::TEAMS);
    if constexpr (SCALING == BY_OCTET) {
      if (in_turn + 1 == ScaleTurn<S>::OCTETS) {
        __syncwarp();  // all lanes have read the turn's scales
        fetch_scales<S>(b, turn + SCALE_TURNS, place);
      }
      ++octet;
    }
  }
  if constexpr (T::SHARE > 1) b.pass_slots((T::SHARE - 1 - T::operand()) * in_part);
  b.pass_sums(Sums<S>::BUFFERS, T::GROUPS);
}

template <class S, class F> __device__ __forceinline__ void multiply_tile(Consumer& b, const Activations<S>& a, u32 part, u32& octet, F place) {
  if constexpr (S::Weights::LANE_COLUMNS == 32) multiply_fp4_tile<S>(b, a);
  else multiply_octets<S>(b, a, part, octet, place);
}

// Tiles that are another group's, whose warps arrive for this one as well: fewer than there are buffers of sums. A barrier
// tells one phase from the next only. But a group waits, in front of each of its tiles, until control has read the tile
// BUFFERS before, and control reads them in order; so the buffer of its next tile lacks at most the phase that it asks for.
template <class S> __device__ __forceinline__ void pass_tiles(Consumer& b, u32 count, u32 part = 0) {
  static_assert(Team<S>::GROUPS == 1 || Sums<S>::BUFFERS * S::OPERANDS * Slots<S>::PART <= RING_SLOTS, "no more than the ring has");
  static_assert(Team<S>::GROUPS <= Sums<S>::BUFFERS);
  b.pass_slots(count * S::OPERANDS * Slots<S>::in_part(part));
  b.skip_sums(count, Sums<S>::BUFFERS);
}

// All that an SM has of a stage, from the wait for its inputs on.
template <class S> __device__ __forceinline__ void multiply_tiles(Consumer& b) {
  u32 octet = 0;  // of this team's
#pragma unroll 1
  for (u32 part = 0; part < Slots<S>::PARTS; ++part) {
    Activations<S> a;
    const Inputs inputs = find_inputs<S>(b);
    if (part == 0) b.wait_inputs();
    if (part > 0 && !S::HALF_INPUT) {
      // The rows come to where sums of the part before may still wait for control. Behind this all of them were stored, so
      // that no barrier is asked for a phase after the next.
      consumers_sync();
#pragma unroll 1
      for (u32 buffer = 0; buffer < Sums<S>::BUFFERS; ++buffer) b.wait_sums(buffer);
      consumers_sync();
    }
    load_inputs<S>(b, a, inputs, part);
    u32 group = 0;
    for (u32 tile = b.first_tile(); tile < tiles<S>(b); tile += gridDim.x) {
      if (Team<S>::GROUPS == 1 || group == Team<S>::group()) multiply_tile<S>(b, a, part, octet, [&](u32 n) { return place_of<S>(b, n); });
      else pass_tiles<S>(b, 1, part);
      if (++group == Team<S>::GROUPS) group = 0;
    }
  }
}

template <class S> __device__ __forceinline__ void multiply(Consumer& b) {
  fetch_first_scales<S>(b, [&](u32 n) { return place_of<S>(b, n); });
  // An SM without a tile has no use for the rows. The activations live only inside: declared out here,
  // and filled on one path, they would hold their registers through all other stages.
  if (b.first_tile() < tiles<S>(b)) multiply_tiles<S>(b);
  else b.wait_inputs();
  b.finish_stage();
  b.pass_tiles(tiles<S>(b));
}

// Two neighbouring entries of a vector that is added to the features `start` to `start + cols`.
__device__ __forceinline__ void load_bias(float2& to, const u8* vector, u32 start, u32 cols, u32 feature) {
  const float* bias = reinterpret_cast<const float*>(vector);
  const u32 at = feature - start;  // wraps around in front of the vector
  if (at < cols) to.x = bias[at];
  if (at + 1 < cols) to.y = bias[at + 1];
}

// A tile's sums of a slice by all warps of its teams, which are there. Lane 4r + q has row r and the features 2q and
// 2q + 1 of the octet.
template <class S> __device__ __forceinline__ void add_sums(const Control& b, u32 slice, u32 lane, float2 (&v)[S::OPERANDS]) {
  constexpr u32 WARPS = Team<S>::WARPS;
  const WarpSums* sums = b.sums(b.sum_buffer, S::OPERANDS * WARPS);
#pragma unroll
  for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
    v[operand] = sums[operand * WARPS][slice][lane];
#pragma unroll
    for (u32 w = 1; w < WARPS; ++w) {
      const float2 more = sums[operand * WARPS + w][slice][lane];
      v[operand].x += more.x;
      v[operand].y += more.y;
    }
  }
  if constexpr (S::NORM) {
    const float scale = b.shared.row_scale[slice * SLICE_ROWS + lane / 4];
#pragma unroll
    for (u32 operand = 0; operand < S::OPERANDS; ++operand) { v[operand].x *= scale; v[operand].y *= scale; }
  }
}

// A tile that is the other warp's.
template <class S> __device__ __forceinline__ void pass_tile(Control& b) {
  b.wait_sums();
  b.pass_sums(Sums<S>::BUFFERS);
}

// Work for each slice that has rows, of `rows`.
template <class F> __device__ __forceinline__ void each_slice(u32 rows, F work) {
#pragma unroll
  for (u32 slice = 0; slice < SLICES; ++slice) {
    if (slice == 0 || slice * SLICE_ROWS < rows) work(slice);
  }
}

// The largest logit that a lane has seen of a row, the lowest token among equals; ~0 for none.
struct Best {
  float logit = 0.f;
  u32 token = ~0u;
  __device__ __forceinline__ void offer(u32 other, float its) {
    if (token == ~0u || its > logit) { logit = its; token = other; }
  }
};

// Before the head's crossing: this SM's best of each row joins the others'; and if the host wants the launch to end (`halt`,
// of one lane of all SMs), all hear of it.
__device__ __forceinline__ void offer_best(Control& b, u32 rows, const Best (&best)[SLICES], bool halt) {
  each_slice(rows, [&](u32 slice) {
    u64 key = best[slice].token == ~0u ? 0 : (u64)ordered(best[slice].logit) << 32 | (u32)~best[slice].token;
#pragma unroll
    for (u32 x = 1; x <= 2; x *= 2) {
      const u64 other = __shfl_xor_sync(~0u, key, x);
      key = other > key ? other : key;
    }
    if (lane_id() % 4 == 0 && key != 0) max_relaxed(&b.sync().best[b.step % 3][slice * SLICE_ROWS + lane_id() / 4], key);
  });
  if (halt) b.sync().halted = 1;
}

// A router's scores of what this product adds to its rows, of four experts: of each the sums of two features; and what they
// were before.
template <class S> __device__ __forceinline__ void finish_router_tile(Control& b, u32 octet, u32 lane, u32 rows) {
  const u32 expert = octet * (OCTET / 2) + lane % 4;
  auto at = [&](u32 slice, u32 stride) { return (slice * SLICE_ROWS + lane / 4) * stride + expert; };
  auto there = [&](u32 slice) { return slice * SLICE_ROWS + lane / 4 < rows; };
  float old[SLICES] = {};
  float2 v[SLICES][1];
  each_slice(rows, [&](u32 slice) {
    if (there(slice)) old[slice] = S::old_scores(b)[at(slice, S::OLD_STRIDE)];
  });
  b.wait_sums();
  each_slice(rows, [&](u32 slice) { add_sums<S>(b, slice, lane, v[slice]); });
  b.pass_sums(Sums<S>::BUFFERS);
  each_slice(rows, [&](u32 slice) {
    if (there(slice)) hand_on(S::scores(b) + at(slice, S::STRIDE), old[slice] + (v[slice][0].x + v[slice][0].y));
  });
}

// Adds up the warps' sums of each tile and runs the epilogue on them; control and the second take turns.
template <class S> __device__ __forceinline__ void finish(Control& b) {
  Best best[SLICES];
  u32 halt = 0;
  // The host's memory is far: nobody waits for it here.
  if (S::LOGITS && lane_id() == 0 && blockIdx.x == 0 && !b.second) halt = load_host(b.args.halt);
  const u32 lane = anew(lane_id()), rows = S::LOGITS ? b.logit_rows() : b.rows();
  const u32 first = b.first_tile();
  b.pass_tiles(tiles<S>(b));
  auto row_of = [&](u32 slice) { return slice * SLICE_ROWS + lane / 4; };
  auto sum_of = [&](u32 tile, u32 slice, u32 operand) {
    return S::partial(b) + (((u64)tile * S::OPERANDS + operand) * SLICES + slice) * LANES + lane;
  };
  if constexpr (Team<S>::TELLS_SCALES) {
    if (first < tiles<S>(b)) b.wait_scales();
  }
  // Sums of all parts but the last, which is an epilogue's. A lane reads again what it wrote itself.
#pragma unroll 1
  for (u32 part = 0; part + 1 < Slots<S>::PARTS; ++part) {
    bool own = !b.second;
    for (u32 tile = first; tile < tiles<S>(b); tile += gridDim.x, own = !own) {
      if (!own) { pass_tile<S>(b); continue; }
      float2 old[SLICES][S::OPERANDS] = {};
      if (part > 0) {
        each_slice(rows, [&](u32 slice) {
#pragma unroll
          for (u32 operand = 0; operand < S::OPERANDS; ++operand) old[slice][operand] = *sum_of(tile, slice, operand);
        });
      }
      b.wait_sums();
      each_slice(rows, [&](u32 slice) {
        float2 v[S::OPERANDS];
        add_sums<S>(b, slice, lane, v);
#pragma unroll
        for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
          *sum_of(tile, slice, operand) = make_float2(old[slice][operand].x + v[operand].x, old[slice][operand].y + v[operand].y);
        }
      });
      b.pass_sums(Sums<S>::BUFFERS);
    }
  }
  bool own = !b.second;
  for (u32 tile = first; tile < tiles<S>(b); tile += gridDim.x, own = !own) {
    if (!own) { pass_tile<S>(b); continue; }
    if constexpr (S::ROUTER_TILES > 0) {
      if (tile >= S::TILES - S::ROUTER_TILES) {
        finish_router_tile<S>(b, tile - (S::TILES - S::ROUTER_TILES), lane, rows);
        continue;
      }
    }
    const u32 feature = tile * OCTET + 2 * (lane % 4);
    typename S::Carry carry[SLICES] = {};
    float2 gain = {};
    each_slice(rows, [&](u32 slice) {
      if (row_of(slice) < rows) S::before(b, row_of(slice), feature, carry[slice]);
    });
    if constexpr (S::PREPARES) gain = gain_ahead<S>(b, feature);
    float2 old[SLICES][S::OPERANDS] = {}, v[SLICES][S::OPERANDS];
    if constexpr (Slots<S>::PARTS > 1) {
      each_slice(rows, [&](u32 slice) {
#pragma unroll
        for (u32 operand = 0; operand < S::OPERANDS; ++operand) old[slice][operand] = *sum_of(tile, slice, operand);
      });
    }
    b.wait_sums();
    each_slice(rows, [&](u32 slice) { add_sums<S>(b, slice, lane, v[slice]); });
    b.pass_sums(Sums<S>::BUFFERS);
    each_slice(rows, [&](u32 slice) {
      const u32 row = row_of(slice);
      const bool active = row < rows;
      if constexpr (Slots<S>::PARTS > 1) {
#pragma unroll
        for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
          v[slice][operand].x += old[slice][operand].x;
          v[slice][operand].y += old[slice][operand].y;
        }
      }
      if (active) S::finish(b, row, feature, v[slice], carry[slice]);
      if constexpr (S::LOGITS) {
        if (active && feature < S::COLS) best[slice].offer(feature, v[slice][0].x);
        if (active && feature + 1 < S::COLS) best[slice].offer(feature + 1, v[slice][0].y);
      }
      if constexpr (S::PREPARES) prepare<S>(b, active, row, feature, v[slice][0], gain);
    });
  }
  if constexpr (S::LOGITS) offer_best(b, rows, best, halt != 0);
}
