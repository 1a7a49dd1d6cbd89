// Prepared rows: what stands for a norm between the stage that makes a row and the one that multiplies it.
//
// The maker has the row's values in registers: it leaves them times the norm's gains as bf16, in the order in which
// the reader's lanes want them, and of each octet the sum of its squares. So the reader's consumers load what
// their products take, and a warp a row adds up a few hundred squares meanwhile; control multiplies the sums by
// what normalizes the row. The order of the squares' sum is fixed by the row's length alone.
//
// A maker M says: COLS, halves(b) [rows][COLS] bf16 (rows.cuh), next_squares(b) [rows][octets, padded] f32,
// next_gain(b) [COLS] f32. A reader says: K, EPS, LOGITS, squares(b). The generated text has STAGE_ORDER and, for next_gain, STAGE_GAIN: who reads next differs from layer to layer.

// Squares of a row: one an octet, padded to what a load has.
__device__ __forceinline__ constexpr u32 padded_squares(u32 columns) { return (columns / OCTET + 3) / 4 * 4; }

// A pair of results, `v` in the columns `feature` and the next, times the gains of the norm; the squares of an
// octet. A lane in four has a pair of the same octet. The whole warp, some of whose rows may not be there.
template <class S> __device__ __forceinline__ void prepare(const Block& b, bool there, u32 row, u32 feature, float2 v, float2 gain) {
  float square = there ? fmaf(v.y, v.y, v.x * v.x) : 0.f;
  square += __shfl_xor_sync(~0u, square, 1);
  square += __shfl_xor_sync(~0u, square, 2);
  if (!there) return;
  const u32 at = half_at(row, column_place(feature, STAGE_ORDER[b.number]), S::COLS);
  hand_on(reinterpret_cast<u32*>(S::halves(b) + at), Bf16::pack(v.x * gain.x, v.y * gain.y));
  if (feature % OCTET == 0) hand_on(S::next_squares(b) + row * padded_squares(S::COLS) + feature / OCTET, square);
}
template <class S> __device__ __forceinline__ float2 gain_ahead(const Block& b, u32 feature) {
  return *reinterpret_cast<const float2*>(S::next_gain(b) + feature);
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (u32 x = LANES / 2; x > 0; x /= 2) v += __shfl_xor_sync(~0u, v, x);
  return v;
}

// The squares of a row, by a warp: all are asked for at once, and added up in the order of the lanes.
template <class S, bool CHECKED> struct Squares {
  static constexpr u32 OCTETS = S::K / OCTET, LOADS = (OCTETS + LANES * 4 - 1) / (LANES * 4);
  float4 v[LOADS];

  __device__ __forceinline__ void load(const Block& b, u32 row) {
    const float* squares = S::squares(b) + row * padded_squares(S::K);
#pragma unroll
    for (u32 n = 0; n < LOADS; ++n) {
      const u32 at = (n * LANES + anew(lane_id())) * 4;
      constexpr u32 ALL = LANES * 4;
      if ((n + 1) * ALL <= OCTETS) {
        v[n] = take4<CHECKED>(squares + at);
        continue;
      }
      v[n] = make_float4(0, 0, 0, 0);
      if (at < OCTETS) v[n] = take4<CHECKED>(squares + at);
      if (OCTETS % 4 != 0 && at + 4 > OCTETS) {  // behind the row
        if (at + 1 >= OCTETS) v[n].y = 0.f;
        if (at + 2 >= OCTETS) v[n].z = 0.f;
        v[n].w = 0.f;
      }
    }
  }
  // A lane's largest word.
  __device__ __forceinline__ u32 word() const {
    u32 m = 0;
#pragma unroll
    for (u32 n = 0; n < LOADS; ++n) m = largest_word(m, v[n]);
    return m;
  }
  // What the row is multiplied by to be normed.
  __device__ __forceinline__ float normalizer() const {
    float sum = 0.f;
#pragma unroll
    for (u32 n = 0; n < LOADS; ++n) sum += (v[n].x + v[n].y) + (v[n].z + v[n].w);
    return normalizing(warp_sum(sum), S::K, S::EPS);
  }
};

// What normalizes the rows, a warp each of a slice, for control. It reads them behind a tile's sums: every consumer
// arrives there behind this, or, if a tile is not all consumers', at a barrier of its own (`Team::TELLS_SCALES`).
//
// The squares of as many slices as there are registers for are asked for together, in front of whatever else is read with
// them: one behind the other each would be a way to L2.
template <class S> struct RowScales {
  typedef Squares<S, S::CHECKED> Row;
  static constexpr u32 FIT = 8 / Row::LOADS > 0 ? 8 / Row::LOADS : 1, AHEAD = least(SLICES, FIT);
  Row of[AHEAD];

  __device__ __forceinline__ static u32 rows(const Block& b) { return S::LOGITS ? b.logit_rows() : b.rows(); }
  __device__ __forceinline__ static u32 row(u32 slice) { return slice * SLICE_ROWS + anew(warp_id()); }
  // Of a row that is not there nothing is kept.
  __device__ __forceinline__ void load(const Block& b, u32 first = 0) {
    static_assert(CONSUMERS == SLICE_ROWS, "a warp a row");
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
      const u32 n = row(first + i);
      of[i] = {};
      if (n < rows(b)) of[i].load(b, S::LOGITS ? b.shared.logit_row[n] : n);
    }
  }
  __device__ __forceinline__ u32 word() const {
    u32 m = 0;
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) m = largest_word(m, of[i].word());
    return m;
  }
  __device__ __forceinline__ void store(const Block& b, u32 first = 0) const {
    if (row(first) >= rows(b)) return;
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
      const float normalizer = of[i].normalizer();
      const u32 n = row(first + i);
      if (n < rows(b) && lane_id() == 0) b.shared.row_scale[n] = normalizer;
    }
  }
  // Those of the other slices.
  __device__ __forceinline__ void rest(Consumer& b) {
    if constexpr (AHEAD == SLICES) return;
#pragma unroll 1
    for (u32 first = AHEAD; row(first) < rows(b); first += AHEAD) {
      do {
        load(b, first);
      } while (S::CHECKED && b.late(word()));
      store(b, first);
    }
  }
};

// The same, where nothing else is read.
template <class S> __device__ __forceinline__ void scale_rows(Consumer& b) {
  RowScales<S> scales;
  do {
    scales.load(b);
  } while (S::CHECKED && b.late(scales.word()));
  scales.store(b);
  scales.rest(b);
}
