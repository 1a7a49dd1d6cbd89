// Rows times streamed weights: y[row][feature] = sum over columns of x[row][column] w[feature][column].
//
// A tile is an octet of features over all columns (one octet an operand: gate and up make a pair).
// Its blocks of 512 bytes pass through the ring; consumer w takes blocks w, w + 8, w + 16, ... and
// keeps the activations of just these columns in registers for the whole stage, so that a block costs
// one 16-byte load a lane and its tensor-core products, and nothing is read twice.
//
// A tensor-core product has 16 rows and a step has 8. A lane's 16 bytes of a row, the pairs p0 to p3,
// go in as they lie: p0 and p2 as the upper 8 rows, p1 and p3 as the lower 8. Its 16 bytes of weights
// w0 to w3 go in twice: a product with (w0, w2) has the wanted sums in its upper half, one with
// (w1, w3) in its lower half, and the other halves are never looked at. No register is moved.
//
// The order of every sum is fixed by the shape alone: block i of a slot goes to chain i % 2, each
// chain has an upper and a lower sum, these are added in order, then the warps' in order. A row's bits
// depend on no other row.
//
// Block FP8 and MXFP4 are widened to bfloat16 in registers, which loses nothing: a lane then has 16 (32) columns
// of a row in a block, two (four) such sets of pairs. Of FP8 a block's sums are multiplied by its scale before
// they join, of MXFP4 each weight is multiplied by its own.
//
// A stage S says:
//   Weights              Bf16, F16, E4m3, Mxfp4
//   SCALES, scales(b)    of E4m3: scales of an octet, and all of them
//   K, BLOCKS, COLS      columns of x that are multiplied, their blocks of an octet, features of one operand
//   STRIDE, ROW_BLOCKS   columns of a row of x, and blocks of an octet, over whole rows
//   OPERANDS, TILES      octets of a tile, tiles of the stage
//   Input                F32, or the half type of the products
//   NORM, EPS            whether x is normed first (gains lie in Block::gain)
//   LOGITS               whether its rows are those whose logits are wanted
//   input(block)         x, [rows][K]
//   Carry, before(), finish()  the epilogue: what to load ahead, and what to do with a pair of results

__device__ __forceinline__ float silu_gate(float gate, float up) { return gate / (1.f + expf(-gate)) * up; }
// gpt-oss: the gate bounded from above, what it opens from both sides, and one added. NaN stays NaN, which
// fminf would not see to.
__device__ __forceinline__ float clamped_gate(float alpha, float limit, float gate, float up) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (1.f + expf(-alpha * gate)) * (up + 1.f);
}

// Tiles of the stage in this launch: a step whose logits nobody wants has no head.
template <class S> __device__ __forceinline__ u32 tiles(const Block& b) { return S::LOGITS && b.args.logit_rows == 0 ? 0 : S::TILES; }

// How an octet lies in slots of the ring: as many blocks in each as there are whole rounds of the consumers.
template <class S> struct Slots {
  static constexpr u32 WARP_BLOCKS = SLOT_BYTES / S::Weights::BLOCK_BYTES / CONSUMERS;  // of a slot
  static constexpr u32 BLOCKS = WARP_BLOCKS * CONSUMERS;
  static constexpr u32 COUNT = (S::BLOCKS + BLOCKS - 1) / BLOCKS;  // of an octet
  static constexpr u32 OCTET_BYTES = S::BLOCKS * S::Weights::BLOCK_BYTES;
  static constexpr u32 TILE_BYTES = S::OPERANDS * S::ROW_BLOCKS * S::Weights::BLOCK_BYTES;
  static_assert(S::BLOCKS == S::ROW_BLOCKS || S::OPERANDS == 1, "parts of rows have one operand");
};

// A tile's octets through the ring. False if the launch ended.
template <class S> __device__ __forceinline__ bool stream_tile(Loader& b, const u8* from) {
  constexpr u32 OCTET_BYTES = Slots<S>::OCTET_BYTES, PIECE = Slots<S>::BLOCKS * S::Weights::BLOCK_BYTES;
  // Rolled up, as all that runs once a tile: a layer's instructions should stay in the SM's cache.
#pragma unroll 1
  for (u32 operand = 0; operand < S::OPERANDS; ++operand, from += OCTET_BYTES) {
#pragma unroll 1
    for (u32 at = 0; at < OCTET_BYTES; at += PIECE) {
      if (!b.piece(from + at, OCTET_BYTES - at < PIECE ? OCTET_BYTES - at : PIECE)) return false;
    }
  }
  return true;
}

// Tiles through the ring. False if the launch ended.
template <class S> __device__ __forceinline__ bool stream(Loader& b, const u8* weights) {
  for (u32 tile = b.first_tile(); tile < tiles<S>(b); tile += gridDim.x) {
    if (!stream_tile<S>(b, weights + (u64)tile * Slots<S>::TILE_BYTES)) return false;
  }
  b.pass_tiles(tiles<S>(b));
  b.next_stage();
  return true;
}

// The activations of a warp's columns, as the tensor cores take them. Lane 4r + q holds row r and the
// columns 8q to 8q + 7 (16q to 16q + 15, 32q to 32q + 31) of each of its blocks: the piece of a weight block
// that it loads as well.
template <class S> struct Activations {
  static constexpr u32 COUNT = (S::BLOCKS + CONSUMERS - 1) / CONSUMERS;
  static constexpr u32 SETS = S::Weights::LANE_COLUMNS / 8;
  u32 pair[COUNT][SETS][4];
  float scale;  // of the row: the products are multiplied by it
};

__device__ __forceinline__ float largest(float m, float4 v) {
  return fmaxf(fmaxf(fmaxf(m, fabsf(v.x)), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}
__device__ __forceinline__ float squares(float s, float4 v) {
  return fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, s))));
}
__device__ __forceinline__ float4 scaled(float4 v, float s) { return make_float4(v.x * s, v.y * s, v.z * s, v.w * s); }
__device__ __forceinline__ float4 times(float4 v, float4 w) { return make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w); }

// Halves reach only to 65504: rows are scaled by a power of two, which changes no digit, so that the
// largest value is between 128 and 256. 0 and infinity keep the scale 1.
__device__ __forceinline__ float row_scale(Bf16, float) { return 1.f; }
__device__ __forceinline__ float row_scale(F16, float amax) {
  if (!(amax > 1e-30f) || amax > 1e30f) return 1.f;
  u32 exponent = __float_as_uint(amax) & 0x7f800000u;
  return __uint_as_float(exponent - (7u << 23));
}

// Row `lane / 4` of the products is row `source` of the input, or zeros if it is not active.
template <class S> __device__ __forceinline__ void load_rows(Consumer& b, Activations<S>& a, bool active, u32 source) {
  using W = typename S::Weights::Act;
  constexpr u32 BLOCK = S::Weights::BLOCK_COLUMNS, STRIDE = BLOCK * CONSUMERS, QUADS = S::Weights::LANE_COLUMNS / 4;
  const u32 lane = anew(lane_id()), warp = anew(warp_id());
  const u32 row = lane / 4, quarter = lane % 4;
  const u32 column = warp * BLOCK + quarter * S::Weights::LANE_COLUMNS;  // of block `warp`; blocks are 8 apart
  constexpr u32 COUNT = Activations<S>::COUNT;
  // Whether there are the columns 4h and on of block i.
  auto inside = [&](u32 i, u32 h) { return active && (i * CONSUMERS + CONSUMERS <= S::K / BLOCK || column + i * STRIDE + h * 4 < S::K); };

  if constexpr (S::HALF_INPUT) {
    const u16* x = S::input(b) + (u64)source * S::STRIDE + column;
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
      for (u32 set = 0; set < Activations<S>::SETS; ++set) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (inside(i, set * 2)) v = load4(reinterpret_cast<const u32*>(x + i * STRIDE + set * 8));
        a.pair[i][set][0] = v.x; a.pair[i][set][1] = v.y; a.pair[i][set][2] = v.z; a.pair[i][set][3] = v.w;
      }
    }
    a.scale = 1.f;
  } else {
    const float* x = S::input(b) + (u64)source * S::STRIDE + column;
    const float* gain = reinterpret_cast<const float*>(b.gain) + column;
    // Long rows do not fit in registers beside their halves: they are read again from L2.
    constexpr bool KEEP = COUNT * QUADS <= 32;
    float4 kept[KEEP ? COUNT : 1][QUADS];
    float sum = 0.f, amax = 0.f;
#pragma unroll(KEEP ? COUNT : 4)
    for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
      for (u32 h = 0; h < QUADS; ++h) {
        float4 v = make_float4(0, 0, 0, 0);
        if (inside(i, h)) v = load4(x + i * STRIDE + h * 4);
        if constexpr (KEEP) kept[i][h] = v;
        if constexpr (S::NORM) {
          sum = squares(sum, v);
          if (S::ROW_SCALE && inside(i, h)) v = times(v, *reinterpret_cast<const float4*>(gain + i * STRIDE + h * 4));
        }
        if constexpr (S::ROW_SCALE) amax = largest(amax, v);
      }
    }
    // The row over its 4 lanes, then over the 8 warps.
    sum += __shfl_xor_sync(~0u, sum, 1); sum += __shfl_xor_sync(~0u, sum, 2);
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 1)); amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, 2));
    if (quarter == 0) { b.shared.row_sums[0][warp][row] = sum; b.shared.row_sums[1][warp][row] = amax; }
    consumers_sync();
    sum = 0.f; amax = 0.f;
#pragma unroll
    for (u32 w = 0; w < CONSUMERS; ++w) {
      sum += b.shared.row_sums[0][w][row];
      amax = fmaxf(amax, b.shared.row_sums[1][w][row]);
    }
    const float rms = S::NORM ? 1.f / sqrtf(sum / (float)S::K + S::EPS) : 1.f;
    a.scale = S::ROW_SCALE ? row_scale(W(), amax * rms) : 1.f;
    const float to_half = 1.f / a.scale;  // a power of two: exact
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
#pragma unroll
      for (u32 h = 0; h < QUADS; ++h) {
        float4 v = make_float4(0, 0, 0, 0);
        if constexpr (KEEP) v = kept[i][h];
        else if (inside(i, h)) v = load4(x + i * STRIDE + h * 4);
        if (S::NORM && inside(i, h)) v = times(scaled(v, rms), *reinterpret_cast<const float4*>(gain + i * STRIDE + h * 4));
        if (S::ROW_SCALE) v = scaled(v, to_half);
        a.pair[i][h / 2][h % 2 * 2] = W::pack(v.x, v.y);
        a.pair[i][h / 2][h % 2 * 2 + 1] = W::pack(v.z, v.w);
      }
    }
  }
}

template <class S> __device__ __forceinline__ void load_inputs(Consumer& b, Activations<S>& a) {
  const u32 row = anew(lane_id()) / 4;
  load_rows<S>(b, a, row < (S::LOGITS ? b.args.logit_rows : b.args.rows), S::LOGITS ? b.shared.logit_row[row] : row);
}

// Four columns of a feature of octets of bfloat16, or of rows of float32, read where they lie.
__device__ __forceinline__ float4 octet_columns(const u8* octets, u32 blocks, u32 feature, u32 column) {
  const u8* block = octets + ((u64)(feature / OCTET) * blocks + column / 32) * OCTET_BLOCK;
  const u32* pairs = reinterpret_cast<const u32*>(block + feature % OCTET * 64 + column % 32 * 2);
  return make_float4(Bf16::low(pairs[0]), Bf16::high(pairs[0]), Bf16::low(pairs[1]), Bf16::high(pairs[1]));
}

constexpr u32 CHAINS = 2;

// The chains of a warp, in order: of each the upper half of one product and the lower of the other.
__device__ __forceinline__ float2 chains_total(const float (&upper)[CHAINS][4], const float (&lower)[CHAINS][4]) {
  float2 total = make_float2(upper[0][0] + lower[0][2], upper[0][1] + lower[0][3]);
#pragma unroll
  for (u32 i = 1; i < CHAINS; ++i) {
    total.x += upper[i][0] + lower[i][2];
    total.y += upper[i][1] + lower[i][3];
  }
  return total;
}

// Scales come a few octets ahead, each warp's into a ring of its own behind the rest of the scratch: the
// time of an octet is shorter than the way to memory.
constexpr u32 SCALES_AHEAD = 4;
typedef float ScaleRing[SCALES_AHEAD][LANES];

template <class S> __device__ __forceinline__ ScaleRing& scale_ring(const Block& b) {
  static_assert(S::Weights::LANE_COLUMNS != 16 || SCALE_BYTES == sizeof(ScaleRing) * CONSUMERS, "the emitter's size");
  return reinterpret_cast<ScaleRing*>(b.scratch + SCRATCH_BYTES - SCALE_BYTES)[warp_id()];
}

// Asks for the scales of this SM's octet number `n` of the stage: lane i has that of the warp's block i.
template <class S> __device__ __forceinline__ void fetch_scales(const Consumer& b, u32 n) {
  const u32 tile = b.first_tile() + n / S::OPERANDS * gridDim.x, block = warp_id() + lane_id() * CONSUMERS;
  float& to = scale_ring<S>(b)[n % SCALES_AHEAD][lane_id()];
  if (block >= S::BLOCKS) {
    to = 0.f;  // of no block: its codes are 0, and the scale must not be NaN
  } else if (tile < tiles<S>(b)) {
    const u64 octet = (u64)tile * S::OPERANDS + n % S::OPERANDS;
    copy_word(&to, S::scales(b) + octet * S::SCALES + block / 2);
  }
  copy_group();
}

// Products of one block of E4m3 and the activations, as in `chains_total`.
__device__ __forceinline__ float2 multiply_codes(const u32 (&x)[2][4], const uint4& w) {
  float upper[4] = {}, lower[4] = {};
  mma(Bf16(), upper, x[0], E4m3::pair<0>(w.x), E4m3::pair<0>(w.y));
  mma(Bf16(), lower, x[0], E4m3::pair<1>(w.x), E4m3::pair<1>(w.y));
  mma(Bf16(), upper, x[1], E4m3::pair<0>(w.z), E4m3::pair<0>(w.w));
  mma(Bf16(), lower, x[1], E4m3::pair<1>(w.z), E4m3::pair<1>(w.w));
  return make_float2(upper[0] + lower[2], upper[1] + lower[3]);
}

// Products of one block of MXFP4 and the activations, onto the sums of a chain.
__device__ __forceinline__ void multiply_codes(float (&upper)[4], float (&lower)[4], const u32 (&x)[4][4], const uint4& w, u32 factor) {
  const u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (u32 set = 0; set < 4; ++set) {
    mma(Bf16(), upper, x[set], Mxfp4::pair<0>(words[set], factor), Mxfp4::pair<2>(words[set], factor));
    mma(Bf16(), lower, x[set], Mxfp4::pair<1>(words[set], factor), Mxfp4::pair<3>(words[set], factor));
  }
}

// One tile of MXFP4: as below, but its octets are side by side. What one octet waits for (its slot, its
// loads, its chain of products) is long beside what it does, so two of them take little longer than one.
template <class S> __device__ __forceinline__ void multiply_mx_tile(Consumer& b, const Activations<S>& a, u32 thread) {
  using W = Mxfp4;
  constexpr u32 WARP_BLOCKS = Slots<S>::WARP_BLOCKS, COUNT = Slots<S>::COUNT;
  static_assert(S::OPERANDS * COUNT < RING_SLOTS, "a tile is in the ring as a whole");
  const u32 warp = thread / LANES, lane = thread % LANES;
  float upper[S::OPERANDS][CHAINS][4] = {}, lower[S::OPERANDS][CHAINS][4] = {};
#pragma unroll
  for (u32 s = 0; s < COUNT; ++s) {
    uint4 w[S::OPERANDS][WARP_BLOCKS];
    u32 exponent[S::OPERANDS][WARP_BLOCKS];
#pragma unroll
    for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
      const u8* slot = b.wait_slot(operand * COUNT + s);
#pragma unroll
      for (u32 i = 0; i < WARP_BLOCKS; ++i) {
        w[operand][i] = make_uint4(0, 0, 0, 0);
        exponent[operand][i] = 0;
        const u32 first = s * Slots<S>::BLOCKS + i * CONSUMERS;
        if (first + CONSUMERS <= S::BLOCKS || first + warp < S::BLOCKS) {
          const u8* block = slot + (i * CONSUMERS + warp) * W::BLOCK_BYTES;
          w[operand][i] = reinterpret_cast<const uint4*>(block)[lane];
          exponent[operand][i] = block[OCTET_BLOCK + lane];
        }
      }
    }
#pragma unroll
    for (u32 i = 0; i < WARP_BLOCKS; ++i) {
      const u32 block = s * WARP_BLOCKS + i;
      if (block >= Activations<S>::COUNT) continue;
#pragma unroll
      for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
        multiply_codes(upper[operand][i % CHAINS], lower[operand][i % CHAINS], a.pair[block], w[operand][i], W::factor(exponent[operand][i]));
      }
    }
#pragma unroll
    for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
      u32 read = 0;
#pragma unroll
      for (u32 i = 0; i < WARP_BLOCKS; ++i) read |= w[operand][i].x | exponent[operand][i];
      b.release_slot(operand * COUNT + s, read);
    }
  }
  b.pass_slots(S::OPERANDS * COUNT);
  // Only now: control has had the time of the products to read the sums before the last.
  barrier_wait(b, &b.shared.sums_empty[b.sum_buffer], b.sum_parity, CONSUMER_SUMS);
  WarpSums* sums = b.sums(b.sum_buffer, S::OPERANDS);
#pragma unroll
  for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
    const float2 total = chains_total(upper[operand], lower[operand]);
    sums[operand][warp][lane] = make_float2(total.x * W::UNIT, total.y * W::UNIT);
  }
  b.pass_sums();
}

// One tile from the ring: its sums by this warp, into the next buffer. `octet` counts those with scales apart.
template <class S> __device__ __forceinline__ void multiply_octets(Consumer& b, const Activations<S>& a, u32 thread, u32& octet) {
  using W = typename S::Weights;
  constexpr bool SCALED = W::LANE_COLUMNS == 16;
  constexpr u32 WARP_BLOCKS = Slots<S>::WARP_BLOCKS;
  const u32 warp = thread / LANES;
  barrier_wait(b, &b.shared.sums_empty[b.sum_buffer], b.sum_parity, CONSUMER_SUMS);
  WarpSums* sums = b.sums(b.sum_buffer, S::OPERANDS);
  // Not unrolled, so that a stage's instructions are few: a layer's should stay in the SM's cache.
#pragma unroll 1
  for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
    if constexpr (SCALED) {
      copy_wait<SCALES_AHEAD - 1>();
      __syncwarp();  // the other lanes' as well
    }
    float upper[CHAINS][4] = {}, lower[CHAINS][4] = {};  // of halves
    float2 total = make_float2(0.f, 0.f);                // of FP8
#pragma unroll
    for (u32 s = 0; s < Slots<S>::COUNT; ++s) {
      float factor[WARP_BLOCKS];
      if constexpr (SCALED) {
#pragma unroll
        for (u32 i = 0; i < WARP_BLOCKS; ++i) factor[i] = scale_ring<S>(b)[octet % SCALES_AHEAD][(s * WARP_BLOCKS + i) % LANES] * W::UNIT;
      }
      const uint4* from = reinterpret_cast<const uint4*>(b.wait_slot()) + thread;
      uint4 w[WARP_BLOCKS];
#pragma unroll
      for (u32 i = 0; i < WARP_BLOCKS; ++i) {
        w[i] = make_uint4(0, 0, 0, 0);
        const u32 first = s * Slots<S>::BLOCKS + i * CONSUMERS;
        if (first + CONSUMERS <= S::BLOCKS || first + warp < S::BLOCKS) w[i] = from[i * CONSUMER_THREADS];
      }
#pragma unroll
      for (u32 i = 0; i < WARP_BLOCKS; ++i) {
        const u32 block = s * WARP_BLOCKS + i;
        if (block >= Activations<S>::COUNT) continue;
        if constexpr (SCALED) {
          const float2 products = multiply_codes(a.pair[block], w[i]);
          total.x = fmaf(factor[i], products.x, total.x);
          total.y = fmaf(factor[i], products.y, total.y);
        } else {
          mma(W(), upper[i % CHAINS], a.pair[block][0], w[i].x, w[i].z);
          mma(W(), lower[i % CHAINS], a.pair[block][0], w[i].y, w[i].w);
        }
      }
      u32 read = 0;
#pragma unroll
      for (u32 i = 0; i < WARP_BLOCKS; ++i) read |= w[i].x;
      b.release_slot(read);
    }
    if constexpr (!SCALED) total = chains_total(upper, lower);
    if constexpr (S::ROW_SCALE) { total.x *= a.scale; total.y *= a.scale; }
    sums[operand][warp][thread % LANES] = total;
    if constexpr (SCALED) {
      __syncwarp();  // all lanes have read the octet's scales
      fetch_scales<S>(b, octet + SCALES_AHEAD);
      ++octet;
    }
  }
  b.pass_sums();
}

template <class S> __device__ __forceinline__ void multiply_tile(Consumer& b, const Activations<S>& a, u32 thread, u32& octet) {
  if constexpr (S::Weights::LANE_COLUMNS == 32) multiply_mx_tile<S>(b, a, thread);
  else multiply_octets<S>(b, a, thread, octet);
}

template <class S> __device__ __forceinline__ void multiply_tiles(Consumer& b) {
  static_assert(S::Weights::LANE_COLUMNS != 16 || Activations<S>::COUNT <= LANES, "a lane for the scale of each block");
  const u32 thread = anew(threadIdx.x);
  Activations<S> a;
  load_inputs<S>(b, a);
  u32 octet = 0;  // of this SM's
  for (u32 tile = b.first_tile(); tile < tiles<S>(b); tile += gridDim.x) multiply_tile<S>(b, a, thread, octet);
}

template <class S> __device__ __forceinline__ void multiply(Consumer& b) {
  if constexpr (S::Weights::LANE_COLUMNS == 16) {
#pragma unroll
    for (u32 n = 0; n < SCALES_AHEAD; ++n) fetch_scales<S>(b, n);
  }
  b.wait_inputs();
  // An SM without a tile has no use for the rows. The activations live only inside: declared out here,
  // and filled on one path, they would hold their registers through all other stages.
  if (b.first_tile() < tiles<S>(b)) multiply_tiles<S>(b);
  b.pass_tiles(tiles<S>(b));
  b.finish_stage();
}

// Two neighbouring entries of a vector that is added to the features `start` to `start + cols`.
__device__ __forceinline__ void load_bias(float2& to, const u8* vector, u32 start, u32 cols, u32 feature) {
  const float* bias = reinterpret_cast<const float*>(vector);
  const u32 at = feature - start;  // wraps around in front of the vector
  if (at < cols) to.x = bias[at];
  if (at + 1 < cols) to.y = bias[at + 1];
}

// A tile's sums by all warps. Lane 4r + q has row r and the features 2q and 2q + 1 of the octet.
template <class S> __device__ __forceinline__ void add_sums(Control& b, u32 lane, float2 (&v)[S::OPERANDS]) {
  barrier_wait(b, &b.shared.sums_full[b.sum_buffer], b.sum_parity, CONTROL_CONSUMERS);
  const WarpSums* sums = b.sums(b.sum_buffer, S::OPERANDS);
#pragma unroll
  for (u32 operand = 0; operand < S::OPERANDS; ++operand) {
    v[operand] = sums[operand][0][lane];
#pragma unroll
    for (u32 w = 1; w < CONSUMERS; ++w) {
      const float2 more = sums[operand][w][lane];
      v[operand].x += more.x;
      v[operand].y += more.y;
    }
  }
  __syncwarp();  // all lanes have read
  if (lane_id() == 0) barrier_arrive(&b.shared.sums_empty[b.sum_buffer]);
  if (++b.sum_buffer == SUM_BUFFERS) { b.sum_buffer = 0; b.sum_parity ^= 1; }
}

// Adds up the warps' sums of each tile and runs the epilogue on them.
template <class S> __device__ __forceinline__ void finish(Control& b) {
  b.open_stage();
  const u32 lane = anew(lane_id());
  const u32 row = lane / 4;
  const bool active = row < (S::LOGITS ? b.args.logit_rows : b.args.rows);
  for (u32 tile = b.first_tile(); tile < tiles<S>(b); tile += gridDim.x) {
    const u32 feature = tile * OCTET + 2 * (lane % 4);
    typename S::Carry carry = {};
    if (active) S::before(b, row, feature, carry);
    float2 v[S::OPERANDS];
    add_sums<S>(b, lane, v);
    if (active) S::finish(b, row, feature, v, carry);
  }
  b.pass_tiles(tiles<S>(b));
}
