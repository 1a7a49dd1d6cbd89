// Tensor-core products of a block of weights and the activations of its columns.
//
// A tensor-core product has 16 rows, a slice of the step 8. A lane's 16 bytes of a row are the pairs p0 to p3, its
// 16 bytes of weights w0 to w3; an even product is one with (w0, w2), an odd one with (w1, w3). Two slices, p and q,
// make an even product of (p0, q0, p2, q2) and an odd one of (p1, q1, p3, q3), whose upper halves are p's sums and
// whose lower halves are q's. One slice alone goes into both products as it lies: p0 and p2 as the upper 8 rows,
// p1 and p3 as the lower 8; the upper half of the even product and the lower half of the odd one are wanted, and
// nobody looks at the others. So 16 rows take no more products than 8, and no register is moved.
//
// FP8 and FP4 are widened to bfloat16 in registers, which loses nothing: a lane then has 16 (32) columns
// of a row in a block, two (four) such sets of pairs. Of FP8 a block's sums are multiplied by its scales before
// they join, or all are by the feature's in the epilogue; of FP4 each weight is multiplied by its own.

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

// One tile of several octets of FP4, which share a slot, each a few blocks long; or one of two experts', of which this warp
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
