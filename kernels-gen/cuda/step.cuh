// The beginning and the end of a step: which tokens, and what comes of the logits.

// Rows of the packed embedding table by token id, to f32. A stage E says: BLOCKS, K, Weights, table(b),
// out(b) [rows][K]; of block FP8 also SCALES and scales(b); REPLACED and replaced(b) [K], a token (none if
// ~0) and what it has in place of its row; PREPARES and what goes with it (gemm.cuh). A block of a row is a warp's.
template <class E> __device__ __forceinline__ void embed(Consumer& b) {
  constexpr u32 COLUMNS = E::Weights::BLOCK_COLUMNS, EACH = COLUMNS / LANES, OCTET_LANES = OCTET / EACH;
  static_assert(EACH == 1 || EACH == 2);
  const u32 lane = lane_id();
  for (u32 n = blockIdx.x * CONSUMERS + warp_id(); n < b.rows() * E::BLOCKS; n += gridDim.x * CONSUMERS) {
    const u32 row = n / E::BLOCKS, block = n % E::BLOCKS, token = b.shared.token[row];
    const u32 column = block * COLUMNS + lane * EACH;
    const u8* from = E::table(b) + ((u64)(token / OCTET) * E::BLOCKS + block) * OCTET_BLOCK + token % OCTET * 64;
    // One half; or two of four codes.
    const u32 word = EACH == 2 ? reinterpret_cast<const u32*>(from)[lane / 2] : reinterpret_cast<const u16*>(from)[lane];
    float v[EACH] = {};
    if (column < E::K) {
      if (E::REPLACED != ~0u && token == E::REPLACED) {
#pragma unroll
        for (u32 i = 0; i < EACH; ++i) v[i] = E::replaced(b)[column + i];
      } else if constexpr (EACH == 2) {
        const u32 pair = lane % 2 ? E::Weights::template pair<1>(word) : E::Weights::template pair<0>(word);
        const float scale = E::scales(b)[(u64)(token / OCTET) * E::SCALES + block / 2] * E::Weights::UNIT;
        v[0] = Bf16::low(pair) * scale;
        v[1] = Bf16::high(pair) * scale;
      } else {
        v[0] = widen<typename E::Weights>((u16)word);
      }
#pragma unroll
      for (u32 i = 0; i < EACH; ++i) E::out(b)[(u64)row * E::K + column + i] = v[i];
    }
    if constexpr (E::PREPARES) {
      float square = 0.f;
#pragma unroll
      for (u32 i = 0; i < EACH; ++i) square = fmaf(v[i], v[i], square);
#pragma unroll
      for (u32 x = 1; x < OCTET_LANES; x *= 2) square += __shfl_xor_sync(~0u, square, x);
      if (column >= E::K) continue;
      u16* to = E::halves(b) + half_at(row, column_place(column, STAGE_ORDER[b.number]), E::K);
#pragma unroll
      for (u32 i = 0; i < EACH; ++i) to[i] = narrow<Bf16>(v[i] * E::next_gain(b)[column + i]);
      if (column % OCTET == 0) E::next_squares(b)[row * padded_squares(E::K) + column / OCTET] = square;
    }
  }
  b.finish_stage();
}

// From here on no number is a token: sample.cuh says so where there is nothing to choose from.
constexpr u32 NO_TOKEN = 0xfffffff0u;

// Behind the head's crossing: every SM takes the same tokens and comes to the same end.
__device__ __forceinline__ void choose(Control& b) {
  if (b.second) {
    b.next_step();
    return;
  }
  const u32 row = lane_id();
  const bool halted = *(volatile u32*)&b.sync().halted != 0;
  bool stop = false;
  if (row < b.args.logit_rows) {
    const u32 token = ~(u32)load_relaxed(&b.sync().best[b.step % 3][row]);
    stop = token >= NO_TOKEN;  // the next step would read who knows what for it
    for (u32 i = 0; i < b.args.stop_count; ++i) stop |= token == b.args.stop_tokens[i];
    if (blockIdx.x == 0) {
      if (b.args.chosen) tell_host(b.args.chosen + b.step * LAUNCH_ROWS + row, token + 1);
      // Two steps on, this cell is used again; until then every SM has passed more crossings.
      b.sync().best[(b.step + 2) % 3][row] = 0;
    }
    if (b.args.steps > 1) { b.shared.token[row] = token; b.shared.position[row] += 1; }
  }
  if (__any_sync(~0u, stop) || halted) {
    if (lane_id() == 0) *(volatile u32*)&b.shared.steps = b.step + 1;
  }
  b.next_step();
  __syncwarp();
}

// The launch's rows, into shared memory.
__device__ __forceinline__ void take_rows(Control& b) {
  const u32 row = lane_id();
  if (row < STEP_ROWS) {
    const bool used = row < b.rows();
    b.shared.token[row] = used ? b.args.tokens[row] : 0;
    b.shared.position[row] = used ? b.args.positions[row] : 0;
    b.shared.sequence[row] = used ? b.args.sequences[row] : ~0u;
    b.shared.logit_row[row] = row < b.args.logit_rows ? b.args.logit_index[row] : 0;
  }
  __syncwarp();
  if (row < STEP_ROWS) {
    u32 first = row;
    while (first > 0 && b.shared.sequence[first - 1] == b.shared.sequence[row]) --first;
    b.shared.first_row[row] = first;
  }
  __syncwarp();
}
