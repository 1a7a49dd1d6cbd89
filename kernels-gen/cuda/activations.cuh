// Rows of a product's input as activations in registers (gemm.cuh says what a stage S says).

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
