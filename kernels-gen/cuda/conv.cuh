// Convolutions of a draft's rows with the row before them, by kernels that are made for each row.
//
// A stage C says: COLS, GROUP (columns that share a value of a row's own kernel), KERNELS (values from row to row), SIDE,
// NORM with EPS and gain(b), RESIDUAL, Out (Bf16 or F32), and
//   input(b)    [rows][COLS] f32, normed first if NORM
//   kernels(b)  [rows][2 sides][2 taps][COLS / GROUP] f32; tap 0 is the row's own
//   base(b)     [2 sides][2 taps][COLS] f32, added to them
//   out(b)      [rows][COLS]; what comes out is added to it if RESIDUAL
// A quad of columns a lane; what normalizes a row each warp adds up for itself, in an order of its own lanes.


template <class C> __device__ __forceinline__ float row_normalizer(const float* x) {
  float sum = 0.f;
#pragma unroll 4
  for (u32 column = lane_id() * 4; column < C::COLS; column += LANES * 4) {
    const float4 v = load4(x + column);
    sum = fmaf(v.x, v.x, sum);
    sum = fmaf(v.y, v.y, sum);
    sum = fmaf(v.z, v.z, sum);
    sum = fmaf(v.w, v.w, sum);
  }
  return normalizing(warp_sum(sum), C::COLS, C::EPS);
}

template <class C> __device__ __forceinline__ void convolve(Consumer& b) {
  constexpr u32 EACH = LANES * 4, PIECES = (C::COLS + EACH - 1) / EACH, GROUPS = C::COLS / C::GROUP;
  static_assert(C::COLS % 4 == 0, "whole quads");
  b.wait_inputs();
#pragma unroll 1
  for (u32 n = blockIdx.x * CONSUMERS + warp_id(); n < b.rows() * PIECES; n += gridDim.x * CONSUMERS) {
    const u32 row = n / PIECES, column = n % PIECES * EACH + lane_id() * 4;
    const bool follows = b.shared.first_row[row] < row;
    const float* now = C::input(b) + (u64)row * C::COLS;
    float scale = 1.f, scale_before = 1.f;
    if constexpr (C::NORM) {
      scale = row_normalizer<C>(now);
      if (follows) scale_before = row_normalizer<C>(now - C::COLS);
    }
    if (column >= C::COLS) continue;
    const float4 one = load4(now + column);
    const float4 other = follows ? load4(now - C::COLS + column) : make_float4(0, 0, 0, 0);
    float x[4] = {one.x * scale, one.y * scale, one.z * scale, one.w * scale};
    float before[4] = {other.x * scale_before, other.y * scale_before, other.z * scale_before, other.w * scale_before};
    const float* base = C::base(b) + C::SIDE * 2 * C::COLS + column;
    const float* kernel = C::kernels(b) + (u64)row * C::KERNELS + C::SIDE * 2 * GROUPS;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      if constexpr (C::NORM) {
        x[i] *= C::gain(b)[column + i];
        before[i] *= C::gain(b)[column + i];
      }
      const u32 group = (column + i) / C::GROUP;
      const float own = (base[i] + load1(kernel + group)) * x[i];
      x[i] = fmaf(base[C::COLS + i] + load1(kernel + GROUPS + group), before[i], own);
    }
    if constexpr (C::RESIDUAL) {
      const float4 sum = load4(C::out(b) + (u64)row * C::COLS + column);
      x[0] += sum.x; x[1] += sum.y; x[2] += sum.z; x[3] += sum.w;
    }
    store_quad<C>(typename C::Out(), C::out(b), row, column, make_float4(x[0], x[1], x[2], x[3]));
  }
  b.finish_stage();
}
