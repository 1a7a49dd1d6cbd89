// Words that stages hand on, and how whoever reads them tells whether they have been written.
//
// What all SMs wrote is in sight of all others only behind a release by each of them and an acquire of what they
// released, a microsecond and more of waiting for memory. So a stage's rows may be handed on without: their buffer,
// a mailbox, is full of LATE words until it is written, and the reader asks again for what is late. Every word is
// written whole, by one store, and says by itself that it is there; nothing else is concluded from it.
// ir/src/handoff.rs decides which buffers are mailboxes, and when they are cleared. The generated text has MAILBOXES, how
// many there are.
//
// Hardware answers NaN with one pattern, whatever went in; LATE is another one. So no result is ever late for good.

constexpr u32 LATE = ~0u;

// The largest of some words: LATE if any of them is.
__device__ __forceinline__ u32 largest_word(u32 m, u32 w) { return w > m ? w : m; }
__device__ __forceinline__ u32 largest_word(u32 m, uint4 v) {
  return largest_word(largest_word(largest_word(largest_word(m, v.x), v.y), v.z), v.w);
}
__device__ __forceinline__ u32 largest_word(u32 m, float4 v) {
  return largest_word(m, make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)));
}

// A load of words that may be late, if they are CHECKED; else it follows an acquire.
template <bool CHECKED> __device__ __forceinline__ uint4 take4(const u32* p) {
  if constexpr (CHECKED) return load4_relaxed(p);
  return load4(p);
}
template <bool CHECKED> __device__ __forceinline__ float4 take4(const float* p) {
  if constexpr (!CHECKED) return load4(p);
  const uint4 v = load4_relaxed(reinterpret_cast<const u32*>(p));
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
// A pair that may be late, whatever the kernel, and one that somebody may be waiting for.
__device__ __forceinline__ float2 take_pair(const float2* p) {
  const uint2 v = load2_relaxed(reinterpret_cast<const u32*>(p));
  return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
}
__device__ __forceinline__ void tell(float2* p, float2 v) {
  store2_relaxed(reinterpret_cast<u32*>(p), __float_as_uint(v.x), __float_as_uint(v.y));
}
__device__ __forceinline__ u32 largest_word(u32 m, float2 v) { return largest_word(largest_word(m, __float_as_uint(v.x)), __float_as_uint(v.y)); }
template <bool CHECKED> __device__ __forceinline__ float take1(const float* p) {
  if constexpr (CHECKED) return __uint_as_float(load_relaxed(reinterpret_cast<const u32*>(p)));
  return *p;
}

// Stores of words that somebody may be waiting for, if the kernel has mailboxes.
__device__ __forceinline__ void hand_on(u32* p, u32 v) {
  if constexpr (MAILBOXES == 0) *p = v;
  else store_relaxed(p, v);
}
__device__ __forceinline__ void hand_on(float* p, float v) {
  if constexpr (MAILBOXES == 0) *p = v;
  else store_relaxed(reinterpret_cast<u32*>(p), __float_as_uint(v));
}
__device__ __forceinline__ void hand_on(float* p, float2 v) {
  if constexpr (MAILBOXES == 0) *reinterpret_cast<float2*>(p) = v;
  else store2_relaxed(reinterpret_cast<u32*>(p), __float_as_uint(v.x), __float_as_uint(v.y));
}
