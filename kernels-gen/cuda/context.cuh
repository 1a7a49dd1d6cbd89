// A draft's context: from taps of rows that are committed to keys and values of all draft layers.

// Rows of the taps into the arena, by the numbers that stand in place of tokens. A stage T says: COLS, Out
// (Bf16 or F32), out(b) [rows][COLS], and of Bf16 ORDER (rows.cuh).
template <class T> __device__ __forceinline__ void take_taps(Consumer& b) {
  constexpr u32 EACH = LANES * 4, PIECES = (T::COLS + EACH - 1) / EACH;
  for (u32 n = blockIdx.x * CONSUMERS + warp_id(); n < b.rows() * PIECES; n += gridDim.x * CONSUMERS) {
    const u32 row = n / PIECES, column = n % PIECES * EACH + lane_id() * 4;
    if (column >= T::COLS) continue;
    store_quad<T>(typename T::Out(), T::out(b), row, column, load4(b.args.taps + (u64)b.shared.token[row] * T::COLS + column));
  }
  b.finish_stage();
}

// Norms and rotates the rows' keys and caches them and their values, a head of a layer a warp. A stage C
// says what attention says of keys and values, and:
//   LAYERS                     that lie side by side; layer n has cache n
//   k_gain(b, layer)           gains of a layer's keys
//   input(b)                   [rows][LAYERS][KV_HEADS * QK + KV_HEADS * V] f32
template <class C> __device__ __forceinline__ void cache_context(Consumer& b) {
  constexpr u32 LAYER = C::KV_HEADS * (C::QK + C::V);
  b.wait_inputs();
  const LaunchArgs& args = b.args;
  const u32 lane = lane_id();
#pragma unroll 1
  for (u32 n = blockIdx.x * CONSUMERS + warp_id(); n < b.rows() * C::LAYERS * C::KV_HEADS; n += gridDim.x * CONSUMERS) {
    const u32 head = n % C::KV_HEADS, layer = n / C::KV_HEADS % C::LAYERS, row = n / C::KV_HEADS / C::LAYERS;
    const u32 position = b.shared.position[row];
    const float* raw = C::input(b) + ((u64)row * C::LAYERS + layer) * LAYER;
    const u32 page = args.page_table[(u64)b.shared.sequence[row] * args.pages_per_sequence + position / C::PAGE_TOKENS];
    u16* const keys = reinterpret_cast<u16*>(CacheShape<C>::at(b, layer, page, head));
    u16* const values = keys + C::PAGE_TOKENS * C::QK;
    AttentionHead<C, C::K_NORM> key;
    key.load(raw + head * C::QK, C::k_gain(b, layer), C::rope(b), position);
    key.turn(true);
#pragma unroll
    for (u32 i = 0; i < key.EACH; ++i) {
      if (lane + i * LANES < C::QK) keys[key_at<C>(position % C::PAGE_TOKENS, i, lane)] = narrow<typename C::Kv>(key.v[i]);
    }
    for (u32 d = lane; d < C::V; d += LANES) {
      values[value_at<C>(position % C::PAGE_TOKENS, d)] = narrow<typename C::Kv>(raw[C::KV_HEADS * C::QK + head * C::V + d] * C::VALUE_SCALE);
    }
  }
  b.finish_stage();
}
