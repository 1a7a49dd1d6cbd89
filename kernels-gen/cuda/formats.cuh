// Number formats of activations and weights.

// Where weights have their scales: nowhere, or an octet's by 128 columns lie apart, or its features' follow the codes
// of a block; or sums alone are multiplied by them, which is the epilogue's work.
enum Scaling : u32 { UNSCALED, BY_OCTET, BY_FEATURE, BY_SUM };

// Halves in pairs, the first in the lower half. As weights: `Act` is the type of the activations that they
// are multiplied with, a block of an octet has BLOCK_BYTES and BLOCK_COLUMNS of each feature, a lane
// LANE_COLUMNS of them.
struct Bf16 {
  using Act = Bf16;
  static constexpr Scaling SCALING = UNSCALED;
  static constexpr u32 BLOCK_BYTES = OCTET_BLOCK, BLOCK_COLUMNS = 32, LANE_COLUMNS = 8;
  __device__ __forceinline__ static u32 pack(float low, float high) { return pack_bf16(low, high); }
  __device__ __forceinline__ static float low(u32 pair) { return __uint_as_float(pair << 16); }
  __device__ __forceinline__ static float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
};
struct F16 {
  using Act = F16;
  static constexpr Scaling SCALING = UNSCALED;
  static constexpr u32 BLOCK_BYTES = OCTET_BLOCK, BLOCK_COLUMNS = 32, LANE_COLUMNS = 8;
  __device__ __forceinline__ static u32 pack(float low, float high) { return pack_f16(low, high); }
  __device__ __forceinline__ static float low(u32 pair) { return widen_f16((u16)pair); }
  __device__ __forceinline__ static float high(u32 pair) { return widen_f16((u16)(pair >> 16)); }
};
struct F32 {};
// Codes of block FP8, four in a word, as ir/src/octet.rs lays them. Every one of them is a bfloat16: its bits stay as
// they are, which makes it 2^120 times too small (the subnormal ones too), and the scale makes up for that.
struct E4m3 {
  using Act = Bf16;
  static constexpr Scaling SCALING = BY_OCTET;
  static constexpr u32 BLOCK_BYTES = OCTET_BLOCK, BLOCK_COLUMNS = 64, LANE_COLUMNS = 16;
  static constexpr float UNIT = 1.329227995784916e36f;  // 2^120
  // The codes 2 * PAIR and 2 * PAIR + 1 of four.
  template <u32 PAIR> __device__ __forceinline__ static u32 pair(u32 codes) {
    if constexpr (PAIR == 0) return codes & 0x87f087f0u;
    return (codes << 4 & 0x80f080f0u) | (codes >> 4 & 0x07000700u);
  }
};

// The same with scales of each feature by 128 columns, and with one of all its columns.
struct E4m3Rows : E4m3 {
  static constexpr Scaling SCALING = BY_FEATURE;
  static constexpr u32 BLOCK_BYTES = OCTET_BLOCK + OCTET * sizeof(float);
};
struct E4m3Channel : E4m3 {
  static constexpr Scaling SCALING = BY_SUM;
};

// Codes of FP4, eight in a word, as ir/src/octet.rs lays them; scales follow the codes of a block.
// Masked, a code is a bfloat16 that is 2^126 times too small; its factor makes up for all but 2^64 of that.
struct Fp4 {
  using Act = Bf16;
  static constexpr Scaling SCALING = BY_SUM;
  static constexpr u32 BLOCK_COLUMNS = 128, LANE_COLUMNS = 32;
  static constexpr float UNIT = 1.8446744073709552e19f;  // 2^64
  // A lane's words. Of each the first three pairs of codes lie by themselves; `rest` has the last ones of two.
  struct Words {
    u32 own[4], rest[2];
    __device__ __forceinline__ explicit Words(const uint4& v) : own{v.x, v.y, v.z, v.w}, rest{together(v.x, v.y), together(v.z, v.w)} {}
    // The codes 2 * PAIR and 2 * PAIR + 1 of a word.
    template <u32 PAIR> __device__ __forceinline__ u32 pair(u32 word, u32 factor) const {
      u32 bits;
      if constexpr (PAIR == 0) bits = own[word];
      else if constexpr (PAIR == 1) bits = own[word] << 6;
      else if constexpr (PAIR == 2) bits = turned(own[word], 6);
      else bits = word % 2 == 0 ? rest[word / 2] << 2 : turned(rest[word / 2], 4);
      return multiply_bf16(bits & 0x81c081c0u, factor);
    }
    __device__ __forceinline__ static u32 turned(u32 bits, u32 right) { return bits >> right | bits << (32 - right); }
    __device__ __forceinline__ static u32 together(u32 first, u32 second) {
      return merge_bits(0x0c180c18u, first, second << 2);
    }
  };
};
// A power of two for a lane's columns.
struct Mxfp4 : Fp4 {
  static constexpr bool FEATURE_SCALES = false;
  static constexpr u32 BLOCK_BYTES = OCTET_BLOCK + LANES;
  // Pairs of bfloat16 that are both the factor of words of a lane's codes.
  struct Factors {
    u32 all;
    __device__ __forceinline__ u32 of(u32) const { return all; }
  };
  // A lane's scales in a block, and what becomes of them.
  __device__ __forceinline__ static u32 scales(const u8* block, u32 lane) { return block[OCTET_BLOCK + lane]; }
  __device__ __forceinline__ static Factors factors(u32 scales) { return {(u32)(u8)scales * 0x00800080u}; }
};
// A number with four significant bits for 16 columns, so two for a lane's; codes have two bits, and their product is
// exact. The scale of the tensor is the epilogue's.
struct Nvfp4 : Fp4 {
  static constexpr bool FEATURE_SCALES = true;
  static constexpr u32 BLOCK_BYTES = OCTET_BLOCK + 2 * LANES;
  struct Factors {
    u32 first, second;
    __device__ __forceinline__ u32 of(u32 word) const { return word < 2 ? first : second; }
  };
  __device__ __forceinline__ static u32 scales(const u8* block, u32 lane) { return reinterpret_cast<const u16*>(block + OCTET_BLOCK)[lane]; }
  __device__ __forceinline__ static Factors factors(u32 scales) { return {factor(scales & 0xff), factor(scales >> 8)}; }
  __device__ __forceinline__ static u32 factor(u32 scale) { return scale * 0x00100010u + 0x5a005a00u; }
};

// Floats as unsigned integers in the same order.
__device__ __forceinline__ u32 ordered(float v) {
  const u32 bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(u32 v) { return __uint_as_float(v & 0x80000000u ? v & 0x7fffffffu : ~v); }

// A division, a root or an exponential to the last bit is half a kilobyte of instructions, which are cold in every
// layer; these are a few, within three units of the last place (of an exponential, of its exponent).
constexpr float LOG2_E = 1.44269504f;
__device__ __forceinline__ float sigmoid(float v) { return reciprocal(1.f + power_of_two(-v * LOG2_E)); }
// What a row of so many columns is multiplied by to be normed, by the sum of its squares.
__device__ __forceinline__ float normalizing(float squares, u32 columns, float eps) {
  const float mean = fmaf(squares, 1.f / (float)columns, eps), root = reciprocal_root(mean);
  return fmaf(root * 0.5f, fmaf(-mean * root, root, 1.f), root);  // one step of Newton's
}

// One value of a half format.
template <class T> __device__ __forceinline__ u16 narrow(float v) { return (u16)T::pack(v, 0.f); }
template <class T> __device__ __forceinline__ float widen(u16 v) { return T::low((u32)v); }

// D (16 x 8) += A (16 rows x 16 columns) x B (16 columns x 8 features). The rows do not touch each
// other: A's upper and lower half are rows of two slices, or the same rows at other columns: see products.cuh.
__device__ __forceinline__ void mma(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(d, a, b0, b1); }
__device__ __forceinline__ void mma(F16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(d, a, b0, b1); }
