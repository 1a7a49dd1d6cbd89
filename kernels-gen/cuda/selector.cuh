// A draft's selector: candidates of each row, what each is worth behind each candidate of the row before, and the walk
// from guess to guess.
//
// A candidate is a key: the order of its logit, then its token, the lower one first. So keys are all different, and a
// warp keeps the largest of them sorted, one a lane: a new one finds its place by a vote, and those behind it move on.

__device__ __forceinline__ u64 shuffled(u64 v, u32 lane) {
  return (u64)__shfl_sync(~0u, (u32)(v >> 32), lane) << 32 | __shfl_sync(~0u, (u32)v, lane);
}

// The larger keys of `mine` (sorted over the lanes, the largest first) and of what every lane brings; the first K are right.
template <u32 K> __device__ __forceinline__ void keep_largest(u64& mine, u64 key) {
  static_assert(K >= 1 && K <= LANES, "a key a lane");
  u32 waiting = __ballot_sync(~0u, key > shuffled(mine, K - 1));
#pragma unroll 1
  while (waiting != 0) {
    const u64 next = shuffled(key, __ffs(waiting) - 1);
    waiting &= waiting - 1;
    const u32 place = __popc(__ballot_sync(~0u, mine > next));
    const u64 moved = __shfl_up_sync(~0u, mine, 1);
    if (lane_id() >= place) mine = lane_id() == place ? next : moved;
  }
}

// The key of a token; NaN comes last.
__device__ __forceinline__ u64 key_of(float logit, u32 token) {
  const u32 order = logit == logit ? max(ordered(logit + 0.f), 2u) : 1u;
  return (u64)order << 32 | (u32)~token;
}

// The largest logits of a segment of a row, a segment a warp. A stage T says: VOCAB, K, SEGMENTS, and lists(b)
// [logit rows][SEGMENTS][K] keys.
template <class T> __device__ __forceinline__ void take_segments(Consumer& b) {
  constexpr u32 EACH = (T::VOCAB + T::SEGMENTS * LANES - 1) / (T::SEGMENTS * LANES) * LANES;
  b.wait_inputs();
#pragma unroll 1
  for (u32 n = blockIdx.x * CONSUMERS + warp_id(); n < b.logit_rows() * T::SEGMENTS; n += gridDim.x * CONSUMERS) {
    const u32 row = n / T::SEGMENTS, first = n % T::SEGMENTS * EACH, end = least(first + EACH, T::VOCAB);
    const float* logits = b.args.logits + (u64)row * T::VOCAB;
    u64 mine = 0;
#pragma unroll 1
    for (u32 at = first; at < end; at += LANES) {
      const u32 token = at + lane_id();
      keep_largest<T::K>(mine, token < end ? key_of(load1(logits + token), token) : 0);
    }
    if (lane_id() < T::K) T::lists(b)[(u64)n * T::K + lane_id()] = mine;
  }
  b.finish_stage();
}

template <u32 K> struct PairSpace {
  u32 tokens[K], before[K];
  float logits[K];
};

// A row's largest keys, of all its segments.
template <class P> __device__ __forceinline__ u64 merged(Consumer& b, u32 row) {
  const u64* lists = P::lists(b) + (u64)row * P::SEGMENTS * P::K;
  u64 mine = 0;
#pragma unroll 1
  for (u32 at = 0; at < P::SEGMENTS * P::K; at += LANES) {
    const u32 own = at + lane_id();
    keep_largest<P::K>(mine, own < P::SEGMENTS * P::K ? load_relaxed(lists + own) : 0);
  }
  return mine;
}

// Scores of the pairs of a row, a row an SM. A stage P says what T says of lists, FACTOR and softcap(v) of logits, and:
//   RANK, HIDDEN               columns of the tables, and values from row to row of
//   hidden(b)                  [rows][HIDDEN] f32
//   before(b), behind(b)       tables of halves (Before, Behind) in octets, BLOCKS of them each
//   tokens(b)                  [logit rows][K]: the candidates, the largest logit first
//   scores(b)                  [logit rows][K before][K] f32
template <class P> __device__ __forceinline__ void score_pairs(Consumer& b) {
  constexpr u32 BLOCKS = P::BLOCKS, K = P::K;
  static_assert(sizeof(PairSpace<K>) <= SCRATCH_BYTES - SCALE_BYTES);
  PairSpace<K>& space = *reinterpret_cast<PairSpace<K>*>(b.scratch);
  const u32 lane = lane_id(), warp = warp_id();
  b.wait_inputs();
#pragma unroll 1
  for (u32 n = blockIdx.x; n < b.logit_rows(); n += gridDim.x) {
    const u32 row = b.shared.logit_row[n];
    // The row before in the sequence, else the row itself; its candidates if its logits are wanted, else its token.
    const u32 last = b.shared.first_row[row] < row ? row - 1 : row;
    const bool chosen = n > 0 && b.shared.logit_row[n - 1] == last;
    if (warp == 0) {
      const u64 mine = merged<P>(b, n);
      if (lane < K) {
        space.tokens[lane] = ~(u32)mine;
        space.logits[lane] = P::softcap(from_ordered((u32)(mine >> 32)) * P::FACTOR);
        P::tokens(b)[n * K + lane] = ~(u32)mine;
      }
    } else if (warp == 1) {
      const u64 mine = chosen ? merged<P>(b, n - 1) : 0;
      if (lane < K) space.before[lane] = chosen ? ~(u32)mine : b.shared.token[last];
    }
    consumers_sync();
    const float* hidden = P::hidden(b) + (u64)row * P::HIDDEN;
#pragma unroll 1
    for (u32 a = warp; a < K; a += CONSUMERS) {
      float left[BLOCKS];
#pragma unroll
      for (u32 block = 0; block < BLOCKS; ++block) {
        const u32 column = block * LANES + lane, token = space.before[a];
        const u8* from = P::before(b) + ((u64)(token / OCTET) * BLOCKS + block) * OCTET_BLOCK + token % OCTET * 64;
        left[block] = column < P::RANK ? widen<typename P::Before>(reinterpret_cast<const u16*>(from)[lane]) * load1(hidden + column) : 0.f;
      }
#pragma unroll 1
      for (u32 c = 0; c < K; ++c) {
        const u32 token = space.tokens[c];
        const u8* from = P::behind(b) + (u64)(token / OCTET) * BLOCKS * OCTET_BLOCK + token % OCTET * 64;
        float sum = 0.f;
#pragma unroll
        for (u32 block = 0; block < BLOCKS; ++block) {
          const float right = widen<typename P::Behind>(reinterpret_cast<const u16*>(from + block * OCTET_BLOCK)[lane]);
          if (block * LANES + lane < P::RANK) sum = fmaf(left[block], right, sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) P::scores(b)[((u64)n * K + a) * K + c] = space.logits[c] + sum;
      }
    }
    consumers_sync();  // the space is another row's
  }
  b.finish_stage();
}

// The walk: of each row the candidate that is worth most behind the one before, by one warp of all. It takes the place of
// the row's largest logit, which `choose` looks at. A stage W says K, tokens(b) and scores(b).
template <class W> __device__ __forceinline__ void walk(Consumer& b) {
  b.wait_inputs();
  if (blockIdx.x == 0 && warp_id() == 0) {
    const u32 lane = lane_id();
    u32 place = 0;
#pragma unroll 1
    for (u32 n = 0; n < b.logit_rows(); ++n) {
      const u32 row = b.shared.logit_row[n];
      // Behind a token that is known, every place says the same.
      if (n == 0 || b.shared.logit_row[n - 1] + 1 != row || b.shared.first_row[row] == row) place = 0;
      u32 key = 0;
      if (lane < W::K) {
        const float score = load1(W::scores(b) + ((u64)n * W::K + place) * W::K + lane);
        key = score == score ? max(ordered(score + 0.f), 2u) : 1u;
      }
      const u32 top = warp_max(key);
      place = warp_min(key == top && lane < W::K ? lane : ~0u);
      if (lane == 0) {
        const u32 token = load_relaxed(W::tokens(b) + n * W::K + place);
        b.sync().best[b.step % 3][n] = (u64)top << 32 | (u32)~token;
      }
    }
  }
  b.finish_stage();
}
