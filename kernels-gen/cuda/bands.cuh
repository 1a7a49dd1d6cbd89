// The experts' second product by strips: a warp has a block of columns of a band of octets.
//
// Rows of the second product are others for each expert, and few: with 8 rows of a step one or two choose the same one. What an
// expert costs an SM beside its products is then a quarter of all: its rows, sums of eight warps, and who adds them up. So an
// expert's features and columns are shared by the warps of all SMs, not the features alone. A band is several octets, side by
// side, a strip one block of columns of all of them; a warp has a strip, the same of every expert. It takes one block of the
// expert's rows, which may be on its way while the one before is multiplied, multiplies its pairs of octets, and adds what
// comes out, times what the expert weighs for each row, to sums that stay in its registers until all experts are through. No
// expert ends with sums that anybody waits for, and all SMs have as many bytes.
//
// A tile is the strips of an SM's eight warps; a band's are some of one tile, all of others, and some of the last. When all
// experts are through, a tile's warps add up what they have of a band, a warp an octet. Whoever has the band's last strip
// waits for the parts of the tiles before, which are told by what they are, as those of attention (attention.cuh), adds them in
// order, and runs the epilogue. So an SM waits only for tiles in front of its own, which are begun no later, and somebody
// can always go on.
//
// A row's sum is that over experts in ascending order, of a strip; over strips, of a tile; over tiles. All of it is fixed by the
// shape alone. A row that did not choose an expert has zeros for it, and adds zero.
//
// The epilogue is the consumers', which do not wait until all SMs have released the stage before (`Control::settle`). What
// it adds to was written before that, and nobody reads it meanwhile (ir/src/handoff.rs makes sure).
//
// A stage S says what experts' second products say (experts.cuh), but for before() and finish(); BAND_OCTETS, octets of a band;
// parts(b) [bands][PARTS][BAND_OCTETS][SLICES][LANES] float2, late words but for the time between who leaves a part and who
// reads it.

template <class S> struct Bands {
  using W = typename S::Weights;
  static constexpr u32 OCTETS = S::BAND_OCTETS, PAIRS = OCTETS / 2;
  static constexpr u32 STRIP_BYTES = OCTETS * W::BLOCK_BYTES, STRIPS = S::COLS / OCTET / OCTETS * S::BLOCKS;
  static constexpr u32 EXPERT_BYTES = STRIPS * STRIP_BYTES;
  // Of a slot of the ring, and slots of a tile.
  static constexpr u32 SLOT_STRIPS = least(SLOT_BYTES / STRIP_BYTES, CONSUMERS), SLOTS = (CONSUMERS + SLOT_STRIPS - 1) / SLOT_STRIPS;
  static constexpr u32 PIECE = SLOT_STRIPS * STRIP_BYTES;
  // Tiles, at most, in which a band has strips, but not the last one.
  static constexpr u32 PARTS = (S::BLOCKS + CONSUMERS - 2) / CONSUMERS;
  static constexpr u32 ROUND_OCTETS = least(OCTETS, CONSUMERS);  // octets whose sums meet at a time
  static_assert(W::LANE_COLUMNS == 32 && S::OPERANDS == 1 && S::HALF_INPUT && !S::ROW_OCTETS && S::ORDER == 0);
  static_assert(OCTETS % 2 == 0 && S::BLOCKS >= CONSUMERS && SLOT_STRIPS > 0 && SLOTS <= RING_SLOTS);
  static_assert(CONSUMERS * ROUND_OCTETS * LANES * sizeof(float2) <= SUM_BYTES);

  // Strips of a tile, of which only the last has fewer than there are warps.
  __device__ __forceinline__ static u32 strips(u32 tile) { return least(CONSUMERS, STRIPS - tile * CONSUMERS); }
  __device__ __forceinline__ static float2* part(const Block& b, u32 band, u32 part, u32 octet, u32 slice) {
    return S::parts(b) + (((band * PARTS + part) * OCTETS + octet) * SLICES + slice) * LANES + lane_id();
  }
};

template <class S> __device__ __forceinline__ bool stream_bands(Loader& b, const u8* weights) {
  using B = Bands<S>;
  const Routes& routes = routes_of(b);
  const u32 count = routes.count;
  b.begin_tape(false, B::PIECE, nullptr, 1, 0);
#pragma unroll 1
  for (u32 tile = b.first_tile(); tile < S::TILES; tile += gridDim.x) {
    const u32 bytes = B::strips(tile) * B::STRIP_BYTES;
    const u8* const first = weights + (u64)tile * (CONSUMERS * B::STRIP_BYTES);
#pragma unroll 1
    for (u32 number = 0; number < count; ++number) {
      const u8* const from = first + (u64)routes.expert[number] * B::EXPERT_BYTES;
#pragma unroll 1
      for (u32 at = 0; at < bytes; at += B::PIECE) {
        if (!b.piece(from + at, least(bytes - at, B::PIECE))) return false;
      }
    }
  }
  b.pass_tiles(S::TILES);
  leave_routes(b);
  b.next_stage();
  return true;
}

// An expert's rows in the columns of a strip, as the tensor cores take them, and what the expert weighs for this lane's row of
// each slice. Lane 4r + q has the columns 32q to 32q + 31 of row r: the piece of a block that it loads as well. Of rows that
// did not choose the expert zeros.
template <class S> struct StripRows {
  u32 x[4][SLICES][4];
  float weight[SLICES];

  // This lane's first column of a block.
  __device__ __forceinline__ static u32 column_of(u32 block) {
    return block * S::Weights::BLOCK_COLUMNS + anew(lane_id()) % 4 * S::Weights::LANE_COLUMNS;
  }
  __device__ __forceinline__ void load(const Block& b, const Routes& routes, u32 number, u32 column) {
    const u32 lane = anew(lane_id());
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) {
      const u32 row = slice * SLICE_ROWS + lane / 4, slot = row < b.rows() ? routes.slot[row][number] : NO_SLOT;
      // One address for all pieces.
      const u16* const from = anew(S::input(b) + column + (u64)(row * S::SLOTS + slot) * S::K);
      const bool there = slot != NO_SLOT && column < S::K;
      weight[slice] = slot != NO_SLOT ? routes.weight[row][slot] : 0.f;
#pragma unroll
      for (u32 set = 0; set < 4; ++set) {
        constexpr bool WHOLE = S::K % S::Weights::LANE_COLUMNS == 0;  // a lane has all of its columns, or none
        uint4 v = make_uint4(0, 0, 0, 0);
        if (there && (WHOLE || column + set * 8 < S::K)) v = take4<S::CHECKED>(reinterpret_cast<const u32*>(from + set * 8));
        u32(&to)[4] = x[set][slice];
        to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
      }
    }
  }
  // A lane's largest word.
  __device__ __forceinline__ u32 word() const {
    u32 m = 0;
#pragma unroll
    for (u32 set = 0; set < 4; ++set) {
#pragma unroll
      for (u32 slice = 0; slice < SLICES; ++slice) m = largest_word(m, make_uint4(x[set][slice][0], x[set][slice][1], x[set][slice][2], x[set][slice][3]));
    }
    return m;
  }
};

// A strip's sums over experts: of each pair of octets as a product of the tensor cores leaves them (`PairSums`).
template <class S> struct StripSums {
  float of[Bands<S>::PAIRS][SLICES][4] = {};

  // Adds an expert's.
  __device__ __forceinline__ void add(const Block& b, const StripRows<S>& rows, const u8* strip, u32 expert, u32 band) {
    using W = typename S::Weights;
    const u32 lane = anew(lane_id());
    // Of the rows 2t and 2t + 1, with what the products lack.
    float weight[SLICES][2];
#pragma unroll
    for (u32 slice = 0; slice < SLICES; ++slice) {
#pragma unroll
      for (u32 i = 0; i < 2; ++i) weight[slice][i] = __shfl_sync(~0u, rows.weight[slice], lane % 4 * 8 + i * 4) * Fp4::UNIT;
    }
#pragma unroll
    for (u32 pair = 0; pair < Bands<S>::PAIRS; ++pair) {
      const u8* const block = strip + pair * (2 * W::BLOCK_BYTES);
      Fp4Piece<W> w[2];
      float scale[2] = {1.f, 1.f};
#pragma unroll
      for (u32 octet = 0; octet < 2; ++octet) {
        w[octet].load(true, block + octet * W::BLOCK_BYTES, lane);
        if constexpr (W::FEATURE_SCALES) {
          const u32 feature = (band * S::BAND_OCTETS + pair * 2 + octet) * OCTET + lane / 4;
          const float2 scales = S::scale(b, expert, feature);
          scale[octet] = feature % 2 ? scales.y : scales.x;
        }
      }
      PairSums products;
      multiply_pair(products, rows.x, w[0].codes, w[1].codes, w[0].factors(), w[1].factors());
#pragma unroll
      for (u32 slice = 0; slice < SLICES; ++slice) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
          static_assert(CHAINS == 2);
          float factor = weight[slice][i % 2];
          if constexpr (W::FEATURE_SCALES) factor *= scale[i / 2];
          of[pair][slice][i] = fmaf(factor, products.of[slice][0][i] + products.of[slice][1][i], of[pair][slice][i]);
        }
      }
    }
  }
  // Bits of sums that need all that was read of the strip: they are not there before it is.
  __device__ __forceinline__ u32 bits() const {
    u32 bits = 0;
#pragma unroll
    for (u32 pair = 0; pair < Bands<S>::PAIRS; ++pair) bits |= __float_as_uint(of[pair][0][0]);
    return bits;
  }
};

// A warp's strip of all experts that rows chose. A warp without one (of the last tile) has the last one once more, and nobody
// looks at its sums.
template <class S> __device__ __forceinline__ void multiply_strip(Consumer& b, StripSums<S>& sums, u32 tile) {
  using B = Bands<S>;
  constexpr bool AHEAD = SLICES <= 2;  // where there are registers for the next expert's rows
  const Routes& routes = routes_of(b);
  const u32 strips = B::strips(tile), own = least(anew(warp_id()), strips - 1), strip = tile * CONSUMERS + own, count = routes.count;
  const u32 column = anew(StripRows<S>::column_of(strip % S::BLOCKS)), slots = (strips + B::SLOT_STRIPS - 1) / B::SLOT_STRIPS;
  const u32 slot = own / B::SLOT_STRIPS, at = own % B::SLOT_STRIPS * B::STRIP_BYTES;
  StripRows<S> rows, ahead;
  if constexpr (AHEAD) ahead.load(b, routes, 0, column);
#pragma unroll 1
  for (u32 number = 0; number < count; ++number) {
    if constexpr (AHEAD) {
      if constexpr (S::CHECKED) {
#pragma unroll 1
        while (b.late(ahead.word())) ahead.load(b, routes, number, column);
      }
      rows = ahead;
      ahead.load(b, routes, least(number + 1, count - 1), column);
    } else {
      do {
        rows.load(b, routes, number, column);
      } while (S::CHECKED && b.late(rows.word()));
    }
    b.wait_slots(slots);
    sums.add(b, rows, b.slot_ahead(slot) + at, routes.expert[number], strip / S::BLOCKS);
    b.give_back(slots, sums.bits());
  }
}

// What a row's two features were before, biases of the row's experts, and what the next reader wants: of a band's last tile,
// where a warp completes an octet. It is asked for before the experts are multiplied.
template <class S> struct BandRow {
  static constexpr u32 BIASES = S::BIASED ? S::SLOTS : 1;
  float2 old, gain, bias[BIASES];

  __device__ __forceinline__ void load(const Block& b, u32 row, u32 feature) {
    // Of a row that is not there nothing is kept.
    row = row < b.rows() ? row : 0;
    old = *S::sum(b, row, feature);
    if constexpr (S::PREPARES) gain = gain_ahead<S>(b, feature);
    if constexpr (S::BIASED) {
#pragma unroll
      for (u32 slot = 0; slot < BIASES; ++slot) bias[slot] = S::bias(b, routes_of(b).own[row][slot], feature);
    }
  }
  // Adds the sum over all experts.
  __device__ __forceinline__ void store(const Block& b, u32 row, u32 feature, float2 v) const {
    const bool there = row < b.rows();
    if constexpr (S::BIASED) {
#pragma unroll
      for (u32 slot = 0; slot < BIASES; ++slot) {
        const float weight = routes_of(b).weight[row][slot];
        v = make_float2(fmaf(weight, bias[slot].x, v.x), fmaf(weight, bias[slot].y, v.y));
      }
    }
    v = make_float2(old.x + v.x, old.y + v.y);
    if (there) S::store(b, row, feature, v);
    if constexpr (S::PREPARES) prepare<S>(b, there, row, feature, v, gain);
  }
};

// The end of a tile, when all experts are through: its warps' sums of one octet and slice, a warp each.
// Lane 4r + q has row r and the features 2q and 2q + 1.
template <class S> struct BandEnd {
  using B = Bands<S>;
  u32 tile, strips;
  u32 split;  // strips of the tile that are of its first band; the others are of the next one, which does not end here
  u32 first;  // tile in which the first band begins

  __device__ __forceinline__ explicit BandEnd(u32 tile) : tile(tile), strips(B::strips(tile)) {
    split = least((band() + 1) * S::BLOCKS - tile * CONSUMERS, strips);
    first = band() * S::BLOCKS / CONSUMERS;
  }
  __device__ __forceinline__ u32 band() const { return tile * CONSUMERS / S::BLOCKS; }
  // Whether the first band's last strip is of this tile.
  __device__ __forceinline__ bool completes() const { return tile * CONSUMERS + split == (band() + 1) * S::BLOCKS; }
  __device__ __forceinline__ static u32 row(u32 slice) { return slice * SLICE_ROWS + anew(lane_id()) / 4; }
  __device__ __forceinline__ u32 feature(u32 octet) const { return (band() * B::OCTETS + octet) * OCTET + anew(lane_id()) % 4 * 2; }

  // Of the strips that are `within`, in order.
  template <class F> __device__ __forceinline__ static float2 add(const float2 (*sums)[LANES], F within) {
    float2 all = make_float2(0, 0);
#pragma unroll
    for (u32 w = 0; w < CONSUMERS; ++w) {
      const float2 v = sums[w * B::ROUND_OCTETS][lane_id()];
      if (within(w)) all = make_float2(all.x + v.x, all.y + v.y);
    }
    return all;
  }
  __device__ __forceinline__ void finish(Consumer& b, u32 octet, u32 slice, const float2 (*sums)[LANES], const BandRow<S>& result) const {
    const bool there = row(slice) < b.rows();
    const float2 own = add(sums, [&](u32 w) { return w < split; });
    const u32 before = tile - first;  // of the first band's parts
    const bool complete = completes();
    if (there && !complete) tell(B::part(b, band(), before, octet, slice), own);
    if (split < strips) {
      const float2 next = add(sums, [&](u32 w) { return w >= split && w < strips; });
      if (there) tell(B::part(b, band() + 1, 0, octet, slice), next);
    }
    if (!complete) return;
    float2 part[B::PARTS];
    u32 word;
    do {
      word = 0;
#pragma unroll
      for (u32 n = 0; n < B::PARTS; ++n) {
        part[n] = make_float2(0, 0);
        if (there && n < before) part[n] = take_pair(B::part(b, band(), n, octet, slice));
        word = largest_word(word, part[n]);
      }
    } while (b.late(word));
    const float2 late = make_float2(__uint_as_float(LATE), __uint_as_float(LATE));
    float2 all = make_float2(0, 0);
#pragma unroll
    for (u32 n = 0; n < B::PARTS; ++n) {
      all = make_float2(all.x + part[n].x, all.y + part[n].y);
      if (there && n < before) tell(B::part(b, band(), n, octet, slice), late);
    }
    result.store(b, row(slice), feature(octet), make_float2(all.x + own.x, all.y + own.y));
  }
};

template <class S> __device__ __forceinline__ void multiply_bands(Consumer& b) {
  using B = Bands<S>;
  typedef float2 OctetSums[LANES];
  // Where there are registers, what the end needs is asked for in front of the experts.
  constexpr bool EARLY = SLICES == 1;
  constexpr u32 ROUNDS = (B::OCTETS + CONSUMERS - 1) / CONSUMERS;
  OctetSums* const all = reinterpret_cast<OctetSums*>(b.scratch);  // [warps][octets of a round]
  const u32 warp = anew(warp_id());
  b.wait_inputs();
#pragma unroll 1
  for (u32 tile = b.first_tile(); tile < S::TILES; tile += gridDim.x) {
    const BandEnd<S> end(tile);
    BandRow<S> result[EARLY ? ROUNDS : 1] = {};
    auto load = [&](BandRow<S>& to, u32 round, u32 slice) {
      const u32 octet = round * CONSUMERS + warp;
      if (octet < B::OCTETS && end.completes()) to.load(b, end.row(slice), end.feature(octet));
    };
    if constexpr (EARLY) {
#pragma unroll
      for (u32 round = 0; round < ROUNDS; ++round) load(result[round], round, 0);
    }
    StripSums<S> sums;
    multiply_strip<S>(b, sums, tile);
#pragma unroll
    for (u32 round = 0; round < ROUNDS; ++round) {
      each_slice(b.rows(), [&](u32 slice) {
        BandRow<S>& of = result[EARLY ? round : 0];
        if constexpr (!EARLY) load(of, round, slice);
        OctetSums* const own = all + warp * B::ROUND_OCTETS;
#pragma unroll
        for (u32 n = 0; n < B::ROUND_OCTETS; ++n) {
          const u32 octet = round * CONSUMERS + n;
          if (octet >= B::OCTETS) continue;
          // Rows 2t and 2t + 1, feature g.
          const float(&v)[4] = sums.of[octet / 2][slice];
          float* const to = reinterpret_cast<float*>(&own[n]) + anew(lane_id()) % 4 * (2 * OCTET) + anew(lane_id()) / 4;
          to[0] = v[octet % 2 * 2];
          to[OCTET] = v[octet % 2 * 2 + 1];
        }
        consumers_sync();
        if (round * CONSUMERS + warp < B::OCTETS) end.finish(b, round * CONSUMERS + warp, slice, all + warp, of);
        consumers_sync();  // they were read
      });
    }
  }
  b.finish_stage();
  b.pass_tiles(S::TILES);
}

// A launch begins with late words in place of parts; a crossing lies between these and the first experts.
template <class S> __device__ __forceinline__ void clear_bands(const Consumer& b) {
  constexpr u32 PARTS = S::COLS / OCTET / S::BAND_OCTETS * Bands<S>::PARTS, WORDS = PARTS * S::BAND_OCTETS * SLICES * LANES * 2;
  u32* const parts = reinterpret_cast<u32*>(S::parts(b));
#pragma unroll 1
  for (u32 n = blockIdx.x * CONSUMER_THREADS + threadIdx.x; n < WORDS / 4; n += gridDim.x * CONSUMER_THREADS) store4_relaxed(parts + n * 4, LATE);
}
