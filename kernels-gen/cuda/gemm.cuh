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
// The order of every sum is fixed by the shape alone: block i of a slot goes to chain i % 2, each
// chain has an even and an odd sum, these are added in order, then the warps' in order, then the parts'. A
// row's bits depend on no other row.
//
// Who multiplies a tile, and how it comes, says teams.cuh; how rows become activations, activations.cuh; what a block's products
// are, products.cuh.
//
// A stage S says:
//   Weights              Bf16, F16, E4m3, E4m3Rows, E4m3Channel, Mxfp4, Nvfp4
//   SCALES, scales(b)    of E4m3: scales of an octet, and all of them (of experts: an expert behind the other)
//   K, BLOCKS, COLS      columns of x, blocks of an octet, features of one operand
//   OPERANDS, TILES      operands, and tiles of the stage
//   ROUTER_TILES         of these, behind the others: a router's scores of what the product adds to its rows; then
//                        router_weights(b), octets of four experts each, whose features 2e and 2e + 1 add up to that of expert
//                        e; old_scores(b) [rows][OLD_STRIDE] f32, of the rows before, and scores(b) [rows][STRIDE] f32
//   TILE_OCTETS          octets of a tile, of each operand; several, an even number, only of experts, whose tiles are not
//                        `multiply_tile`'s; else 1
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
