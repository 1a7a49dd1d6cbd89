// Causal attention of a step's rows over the paged KV cache, grouped-query, split over the context.
//
// An item is a row, a KV head and a chunk of CHUNK positions; items are dealt out over the SMs. It
// norms and rotates the queries of its group and the keys of those rows of the step that lie in its
// chunk (recomputed by each item that needs them: cheaper than a crossing), writes its own row's key
// and value into the cache, and attends. Rows with several chunks leave their parts in memory, and
// the SM that finishes a row's last chunk adds them up, in the order of the chunks.
//
// Chunks lie at absolute positions and every sum has a fixed order, so a row's bits depend only on
// its own sequence.
//
// A stage A says:
//   HEADS, KV_HEADS, QK, V     query heads, KV heads, columns of a key and of a value
//   SCALE, WINDOW              factor on the scores; positions that a row sees, 0 for all
//   Kv, Out                    Bf16 or F16; Bf16 or F32
//   Q_NORM, K_NORM, EPS        whether heads are normed
//   ROPE                       leading columns of a head that are rotated, 0 for none
//   PAGE_TOKENS, V_PAD, MAX_CHUNKS
//   q_gain(b), k_gain(b), rope(b) [positions][ROPE/2] cosines then sines, input(b) [rows][(HEADS +
//   KV_HEADS) * QK + KV_HEADS * V] f32, out(b) [rows][HEADS * V], parts(b)

constexpr u32 CHUNK = 128;
constexpr u32 WARP_POSITIONS = CHUNK / CONSUMERS;
constexpr float LOG2_E = 1.44269504f;
#define MINUS_INFINITY __int_as_float(0xff800000)

// Lanes that share a key or value of n pieces of 8 columns: at least 2, so that a warp has a load for its
// 16 positions.
__host__ __device__ constexpr u32 lanes_of_row(u32 n) { u32 p = 2; while (p < n) p *= 2; return p; }

template <class A> struct AttentionSpace {
  static constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  static constexpr u32 AT_ONCE = GROUP < 4 ? GROUP : 4;  // query heads whose sums fit in registers
  float q[GROUP][A::QK];
  float keys[STEP_ROWS][A::QK];    // of the step's own rows, rounded as the cache rounds
  float values[STEP_ROWS][A::V];
  float heads[CONSUMERS][A::QK];   // a warp's head between norm and rope
  float sums[CONSUMERS][AT_ONCE][A::V];
  float2 weight[CONSUMERS][AT_ONCE];  // largest score, and the sum of the weights relative to it
};

// The parts of rows that have several chunks: [row][kv head][chunk][head of the group].
template <class A> struct Parts {
  float* base;
  static constexpr u32 GROUP = A::HEADS / A::KV_HEADS;
  __device__ __forceinline__ u64 at(u32 row, u32 kv_head, u32 chunk, u32 h) const {
    return (((u64)row * A::KV_HEADS + kv_head) * A::MAX_CHUNKS + chunk) * GROUP + h;
  }
  __device__ __forceinline__ float* sum(u64 at) const { return base + at * A::V; }
  __device__ __forceinline__ float2* weight(u64 at) const {
    return reinterpret_cast<float2*>(base + (u64)STEP_ROWS * A::HEADS * A::MAX_CHUNKS * A::V) + at;
  }
};

// Norms and rotates one head of `QK` columns; a warp.
template <class A, bool NORM>
__device__ __forceinline__ void prepare_head(float* scratch, const float* raw, const float* gain, const float* rope, u32 position, float* to, bool round) {
  constexpr u32 EACH = (A::QK + LANES - 1) / LANES;
  float v[EACH], sum = 0.f;
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) {
    const u32 d = lane_id() + i * LANES;
    v[i] = d < A::QK ? raw[d] : 0.f;
    sum = fmaf(v[i], v[i], sum);
  }
  if constexpr (NORM) {
#pragma unroll
    for (u32 x = LANES / 2; x > 0; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
    const float rms = 1.f / sqrtf(sum / (float)A::QK + A::EPS);
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
      const u32 d = lane_id() + i * LANES;
      if (d < A::QK) v[i] = v[i] * rms * gain[d];
    }
  }
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) {
    const u32 d = lane_id() + i * LANES;
    if (d < A::QK) scratch[d] = v[i];
  }
  __syncwarp();
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) {
    const u32 d = lane_id() + i * LANES;
    float r = v[i];
    if (A::ROPE > 0 && d < A::ROPE) {
      constexpr u32 HALF = A::ROPE / 2;
      const u32 pair = d < HALF ? d : d - HALF;
      const u64 at = (u64)position * HALF + pair;
      const float c = rope[at], s = rope[(u64)A::POSITIONS * HALF + at];
      r = d < HALF ? v[i] * c - scratch[d + HALF] * s : v[i] * c + scratch[d - HALF] * s;
    }
    if (d < A::QK) to[d] = round ? widen<typename A::Kv>(narrow<typename A::Kv>(r)) : r;
  }
  __syncwarp();  // `scratch` may be used again
}

template <class Kv> __device__ __forceinline__ void unpack(const uint4& raw, float (&v)[8]) {
  v[0] = Kv::low(raw.x); v[1] = Kv::high(raw.x); v[2] = Kv::low(raw.y); v[3] = Kv::high(raw.y);
  v[4] = Kv::low(raw.z); v[5] = Kv::high(raw.z); v[6] = Kv::low(raw.w); v[7] = Kv::high(raw.w);
}

__device__ __forceinline__ void store_out(Bf16, u16* out, u64 at, float v) { out[at] = narrow<Bf16>(v); }
__device__ __forceinline__ void store_out(F32, float* out, u64 at, float v) { out[at] = v; }

template <class A> __device__ __forceinline__ void attend_item(Consumer& b, u32 cache, u32 row, u32 kv_head, u32 chunk, u32 first_chunk, u32 chunks, bool first) {
  using Space = AttentionSpace<A>;
  using Kv = typename A::Kv;
  constexpr u32 GROUP = Space::GROUP, AT_ONCE = Space::AT_ONCE;
  constexpr u32 QKV = (A::HEADS + A::KV_HEADS) * A::QK + A::KV_HEADS * A::V;
  Space& space = *reinterpret_cast<Space*>(b.scratch);
  const LaunchArgs& args = b.args;
  const u32 warp = anew(warp_id()), lane = anew(lane_id());
  const u32 position = b.shared.position[row], sequence = b.shared.sequence[row];
  const u32 first_row = b.shared.first_row[row], first_new = b.shared.position[first_row];
  const u32 from = A::WINDOW && position + 1 > A::WINDOW ? position + 1 - A::WINDOW : 0;

  // The cache's keys and values of this warp's positions, all loads in flight at once. Positions of
  // this step's rows come from shared memory below; those that the row does not see stay zero.
  constexpr u32 K_LANES = lanes_of_row(A::QK / 8), V_LANES = lanes_of_row(A::V / 8);
  constexpr u32 K_AT_ONCE = LANES / K_LANES, V_AT_ONCE = LANES / V_LANES;
  constexpr u32 K_LOADS = WARP_POSITIONS / K_AT_ONCE, V_LOADS = WARP_POSITIONS / V_AT_ONCE;
  const u32 base = chunk * CHUNK + warp * WARP_POSITIONS;
  const u32 k_column = lane % K_LANES * 8, v_column = lane % V_LANES * 8;
  uint4 k[K_LOADS], v[V_LOADS];
  const u8* block = nullptr;
  if (base < first_new && base <= position) {
    const u32 page = args.page_table[(u64)sequence * args.pages_per_sequence + base / A::PAGE_TOKENS];
    block = args.kv + (((u64)cache * args.kv_pages + page) * A::KV_HEADS + kv_head) * ((u64)A::PAGE_TOKENS * (A::QK + A::V_PAD) * 2);
  }
  const u32 in_page = base % A::PAGE_TOKENS;
#pragma unroll
  for (u32 i = 0; i < K_LOADS; ++i) {
    const u32 at = i * K_AT_ONCE + lane / K_LANES, p = base + at;
    k[i] = make_uint4(0, 0, 0, 0);
    if (p >= from && p < first_new && p <= position && k_column < A::QK) {
      k[i] = load4(reinterpret_cast<const u32*>(block + ((in_page + at) * A::QK + k_column) * 2));
    }
  }
#pragma unroll
  for (u32 i = 0; i < V_LOADS; ++i) {
    const u32 at = i * V_AT_ONCE + lane / V_LANES, p = base + at;
    v[i] = make_uint4(0, 0, 0, 0);
    if (p >= from && p < first_new && p <= position && v_column < A::V) {
      v[i] = load4(reinterpret_cast<const u32*>(block + (A::PAGE_TOKENS * A::QK + (in_page + at) * A::V_PAD + v_column) * 2));
    }
  }

  // Nothing before this needs what the step has made: the cache of older positions is read while the
  // other SMs still multiply.
  if (first) b.wait_inputs();

  // Queries, and the keys and values of the step's rows in this chunk, up to this row.
  const float* raw = A::input(b);
  const u32 chunk_start = chunk * CHUNK;
  const u32 new_from = first_new > chunk_start ? first_row : first_row + (chunk_start - first_new);
  const u32 new_to = position < chunk_start + CHUNK ? row + 1 : row + 1 - (position - chunk_start - CHUNK + 1);
  const u32 fresh = first_new < chunk_start + CHUNK && new_from < new_to ? new_to - new_from : 0;
  for (u32 n = warp; n < GROUP + fresh; n += CONSUMERS) {
    if (n < GROUP) {
      prepare_head<A, A::Q_NORM>(space.heads[warp], raw + (u64)row * QKV + (kv_head * GROUP + n) * A::QK, A::q_gain(b), A::rope(b), position, space.q[n], false);
    } else {
      const u32 r = new_from + n - GROUP;
      prepare_head<A, A::K_NORM>(space.heads[warp], raw + (u64)r * QKV + (A::HEADS + kv_head) * A::QK, A::k_gain(b), A::rope(b), b.shared.position[r], space.keys[n - GROUP], true);
    }
  }
  for (u32 n = threadIdx.x; n < fresh * A::V; n += CONSUMER_THREADS) {
    const u32 r = n / A::V, d = n % A::V;
    space.values[r][d] = widen<Kv>(narrow<Kv>(raw[(u64)(new_from + r) * QKV + (A::HEADS + A::KV_HEADS) * A::QK + kv_head * A::V + d]));
  }
  consumers_sync();

  // The row's own key and value go to the cache, by the item that has its position.
  if (position / CHUNK == chunk) {
    const u32 page = args.page_table[(u64)sequence * args.pages_per_sequence + position / A::PAGE_TOKENS];
    u16* to = reinterpret_cast<u16*>(args.kv + (((u64)cache * args.kv_pages + page) * A::KV_HEADS + kv_head) * ((u64)A::PAGE_TOKENS * (A::QK + A::V_PAD) * 2));
    const u32 at = position % A::PAGE_TOKENS;
    for (u32 d = threadIdx.x; d < A::QK; d += CONSUMER_THREADS) to[at * A::QK + d] = narrow<Kv>(space.keys[fresh - 1][d]);
    for (u32 d = threadIdx.x; d < A::V; d += CONSUMER_THREADS) to[A::PAGE_TOKENS * A::QK + at * A::V_PAD + d] = narrow<Kv>(space.values[fresh - 1][d]);
  }

  for (u32 h0 = 0; h0 < GROUP; h0 += AT_ONCE) {
    // Scores in units of log2, one per position and head, in all lanes that share the position.
    float score[K_LOADS][AT_ONCE];
#pragma unroll
    for (u32 i = 0; i < K_LOADS; ++i) {
      const u32 p = base + i * K_AT_ONCE + lane / K_LANES;
      const bool seen = p >= from && p <= position;
      float key[8];
      unpack<Kv>(k[i], key);
      if (seen && p >= first_new && k_column < A::QK) {
        const float* fresh_key = &space.keys[p - first_new + first_row - new_from][k_column];
#pragma unroll
        for (u32 d = 0; d < 8; ++d) key[d] = fresh_key[d];
      }
#pragma unroll
      for (u32 h = 0; h < AT_ONCE; ++h) {
        float s = 0.f;
        if (h0 + h < GROUP && k_column < A::QK) {
          const float* q = &space.q[h0 + h][k_column];
#pragma unroll
          for (u32 d = 0; d < 8; ++d) s = fmaf(q[d], key[d], s);
        }
#pragma unroll
        for (u32 x = K_LANES / 2; x > 0; x /= 2) s += __shfl_xor_sync(~0u, s, x);
        score[i][h] = seen ? s * (A::SCALE * LOG2_E) : MINUS_INFINITY;
      }
    }
    // The warp's largest score and its weights.
    float top[AT_ONCE], total[AT_ONCE];
#pragma unroll
    for (u32 h = 0; h < AT_ONCE; ++h) {
      float m = score[0][h];
#pragma unroll
      for (u32 i = 1; i < K_LOADS; ++i) m = fmaxf(m, score[i][h]);
#pragma unroll
      for (u32 x = K_LANES; x < LANES; x *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, x));
      top[h] = m;
      const float relative_to = m == MINUS_INFINITY ? 0.f : m;
      float sum = 0.f;
#pragma unroll
      for (u32 i = 0; i < K_LOADS; ++i) {
        score[i][h] = exp2f(score[i][h] - relative_to);
        sum += score[i][h];
      }
#pragma unroll
      for (u32 x = K_LANES; x < LANES; x *= 2) sum += __shfl_xor_sync(~0u, sum, x);
      total[h] = sum;
    }
    // Weights times values. A lane's weight of a value's position lies in the lanes of that position.
    float sums[AT_ONCE][8] = {};
#pragma unroll
    for (u32 i = 0; i < V_LOADS; ++i) {
      const u32 at = i * V_AT_ONCE + lane / V_LANES, p = base + at;
      float value[8];
      unpack<Kv>(v[i], value);
      if (p >= from && p <= position && p >= first_new && v_column < A::V) {
        const float* fresh_value = &space.values[p - first_new + first_row - new_from][v_column];
#pragma unroll
        for (u32 d = 0; d < 8; ++d) value[d] = fresh_value[d];
      }
#pragma unroll
      for (u32 h = 0; h < AT_ONCE; ++h) {
        float w;
        if constexpr (K_LANES == V_LANES) {
          w = score[i][h];
        } else if constexpr (K_AT_ONCE < V_AT_ONCE) {
          // Several score registers hold the positions of one value load.
          constexpr u32 RATIO = V_AT_ONCE / K_AT_ONCE;
          w = 0.f;
#pragma unroll
          for (u32 j = 0; j < RATIO; ++j) {
            const float other = __shfl_sync(~0u, score[i * RATIO + j][h], at % K_AT_ONCE * K_LANES);
            if (at / K_AT_ONCE % RATIO == j) w = other;
          }
        } else {
          constexpr u32 RATIO = K_AT_ONCE / V_AT_ONCE;
          w = __shfl_sync(~0u, score[i / RATIO][h], at % K_AT_ONCE * K_LANES);
        }
#pragma unroll
        for (u32 d = 0; d < 8; ++d) sums[h][d] = fmaf(w, value[d], sums[h][d]);
      }
    }
#pragma unroll
    for (u32 h = 0; h < AT_ONCE; ++h) {
#pragma unroll
      for (u32 d = 0; d < 8; ++d) {
#pragma unroll
        for (u32 x = V_LANES; x < LANES; x *= 2) sums[h][d] += __shfl_xor_sync(~0u, sums[h][d], x);
        if (lane < V_LANES && v_column < A::V) space.sums[warp][h][v_column + d] = sums[h][d];
      }
      if (lane == 0) space.weight[warp][h] = make_float2(top[h], total[h]);
    }
    consumers_sync();
    // The chunk's result over the warps.
    for (u32 n = threadIdx.x; n < AT_ONCE * A::V; n += CONSUMER_THREADS) {
      const u32 h = n / A::V, d = n % A::V;
      if (h0 + h >= GROUP) break;
      float m = MINUS_INFINITY, sum = 0.f, weight = 0.f;
#pragma unroll
      for (u32 w = 0; w < CONSUMERS; ++w) m = fmaxf(m, space.weight[w][h].x);
#pragma unroll
      for (u32 w = 0; w < CONSUMERS; ++w) {
        const float f = exp2f(space.weight[w][h].x - m);
        sum = fmaf(f, space.sums[w][h][d], sum);
        weight = fmaf(f, space.weight[w][h].y, weight);
      }
      if (chunks == 1) {
        store_out(typename A::Out(), A::out(b), ((u64)row * A::HEADS + kv_head * GROUP + h0 + h) * A::V + d, sum / weight);
      } else {
        const Parts<A> parts = {A::parts(b)};
        const u64 at = parts.at(row, kv_head, chunk - first_chunk, h0 + h);
        parts.sum(at)[d] = sum;
        if (d == 0) *parts.weight(at) = make_float2(m, weight);
      }
    }
    consumers_sync();  // the space may be used again; the parts are written
  }
  if (chunks == 1) return;

  // Whoever brings the last part of this row and head adds all of them up. The increment releases this
  // SM's parts (ordered by the barrier above) and acquires the others'.
  if (threadIdx.x == 0) {
    u32* finished = &b.sync().splits[row * A::KV_HEADS + kv_head];
    const bool last = add_acq_rel(finished, 1) == chunks - 1;
    if (last) *finished = 0;  // for the next stage; a crossing lies between
    b.shared.last_split = last;
  }
  consumers_sync();
  if (b.shared.last_split) {
    const Parts<A> parts = {A::parts(b)};
    for (u32 n = threadIdx.x; n < GROUP * A::V; n += CONSUMER_THREADS) {
      const u32 h = n / A::V, d = n % A::V;
      const u64 at = parts.at(row, kv_head, 0, h);
      // Eight chunks at a time: their loads wait together.
      float m = MINUS_INFINITY, sum = 0.f, weight = 0.f;
      for (u32 c = 0; c < chunks; c += 8) {
        float2 w[8];
        float s[8];
        float top = m;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
          w[i] = make_float2(MINUS_INFINITY, 0.f);
          s[i] = 0.f;
          if (c + i < chunks) {
            w[i] = __ldcg(parts.weight(at + (c + i) * GROUP));
            s[i] = __ldcg(parts.sum(at + (c + i) * GROUP) + d);
          }
        }
#pragma unroll
        for (u32 i = 0; i < 8; ++i) top = fmaxf(top, w[i].x);
        const float old = exp2f(m - top);
        sum *= old;
        weight *= old;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
          const float f = exp2f(w[i].x - top);
          sum = fmaf(f, s[i], sum);
          weight = fmaf(f, w[i].y, weight);
        }
        m = top;
      }
      store_out(typename A::Out(), A::out(b), ((u64)row * A::HEADS + kv_head * GROUP + h) * A::V + d, sum / weight);
    }
  }
  consumers_sync();  // before last_split is written again
}

template <class A> __device__ __forceinline__ void attend(Consumer& b, u32 cache) {
  u32 begin = 0;
  u32 item = blockIdx.x;
  bool first = true;
  for (u32 row = 0; row < b.args.rows; ++row) {
    const u32 position = b.shared.position[row];
    const u32 first_chunk = A::WINDOW && position + 1 > A::WINDOW ? (position + 1 - A::WINDOW) / CHUNK : 0;
    const u32 chunks = position / CHUNK - first_chunk + 1;
    const u32 end = begin + chunks * A::KV_HEADS;
    for (; item < end; item += gridDim.x) {
      const u32 n = item - begin;
      attend_item<A>(b, cache, row, n % A::KV_HEADS, first_chunk + n / A::KV_HEADS, first_chunk, chunks, first);
      first = false;
    }
    begin = end;
  }
  if (first) b.wait_inputs();
  b.finish_stage();
}
