// How rows of halves lie between the stage that makes them and the product that reads them.
//
// Eight rows, an octet, lie side by side, 32 columns of each: so what a warp loads at a time, a piece of 16 bytes a
// lane, is four whole lines of 128 bytes. An SM takes as long for a line of which it wants half, and the eight rows of
// a step touch eight lines if each lies by itself. (64 KB of 8 rows, read by all 132 SMs of an H200 just after they
// wrote them: 2,830 cycles as rows, 1,400 as octets; beside a stream of weights 3,780 and 1,950:
// measurements/rows_from_l2.cu.)
//
// Columns lie in the order in which the reader's lanes want them. Slots of experts, which are read one row here and
// one there, lie as they are.

// Columns of a row of halves, with padding to whole blocks of any order (ROW_BLOCK columns).
__device__ __forceinline__ constexpr u32 padded(u32 columns) { return (columns + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK; }

// Where a column lies in its row. The reader's blocks have 32 << order columns, its lanes 8 << order of them: the pieces
// of 8 come set by set, so that what a warp loads at a time lies side by side.
__device__ __forceinline__ u32 column_place(u32 column, u32 order) {
  const u32 piece = column / 8, set = piece & ((1u << order) - 1), quarter = piece >> order & 3;
  return (column & ~((32u << order) - 1)) + (set * 4 + quarter) * 8 + column % 8;
}

// The half at a place of a row, of so many columns.
__device__ __forceinline__ u32 half_at(u32 row, u32 place, u32 columns) {
  const u32 octet = SLICES > 1 ? row / SLICE_ROWS : 0;
  return octet * (SLICE_ROWS * padded(columns)) + (place / 32 * SLICE_ROWS + row % SLICE_ROWS) * 32 + place % 32;
}

// Two or four columns of a row of COLS, as halves or as they are. A stage S says COLS, and of halves ORDER.
template <class S> __device__ __forceinline__ void store_pair(Bf16, u16* out, u32 row, u32 column, float2 v) {
  *reinterpret_cast<u32*>(out + half_at(row, column_place(column, S::ORDER), S::COLS)) = Bf16::pack(v.x, v.y);
}
template <class S> __device__ __forceinline__ void store_pair(F32, float* out, u32 row, u32 column, float2 v) {
  *reinterpret_cast<float2*>(out + (u64)row * S::COLS + column) = v;
}
template <class S> __device__ __forceinline__ void store_quad(Bf16, u16* out, u32 row, u32 column, float4 v) {
  out += half_at(row, column_place(column, S::ORDER), S::COLS);
  *reinterpret_cast<uint2*>(out) = make_uint2(Bf16::pack(v.x, v.y), Bf16::pack(v.z, v.w));
}
template <class S> __device__ __forceinline__ void store_quad(F32, float* out, u32 row, u32 column, float4 v) {
  *reinterpret_cast<float4*>(out + (u64)row * S::COLS + column) = v;
}
