// What NVRTC has built in, for the kernel's text on a processor. Goes in front of it.
#pragma once
#include <math.h>
#include <string.h>

#include "machine.h"

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH__ 900

struct Index { unsigned x; };
#define threadIdx (Index{machine::thread()})
#define blockIdx (Index{machine::block()})
#define gridDim (Index{machine::blocks()})

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline float __int_as_float(int i) { return __uint_as_float((unsigned)i); }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <class T> inline T __ldcg(const T* p) { return *p; }
inline unsigned atomicExch(unsigned* p, unsigned v) { const unsigned old = *p; *p = v; return old; }
inline void __threadfence_system() {}
inline void __syncthreads();

inline void __syncwarp() { machine::exchange(0); }
inline float __shfl_xor_sync(unsigned, float v, unsigned x) { return __uint_as_float((unsigned)machine::exchange(__float_as_uint(v))[machine::thread() % 32 ^ x]); }
inline unsigned __shfl_xor_sync(unsigned, unsigned v, unsigned x) { return (unsigned)machine::exchange(v)[machine::thread() % 32 ^ x]; }
inline unsigned __shfl_sync(unsigned, unsigned v, unsigned lane) { return (unsigned)machine::exchange(v)[lane % 32]; }
inline float __shfl_sync(unsigned, float v, unsigned lane) { return __uint_as_float((unsigned)machine::exchange(__float_as_uint(v))[lane % 32]); }
inline unsigned long long __shfl_xor_sync(unsigned, unsigned long long v, unsigned x) { return machine::exchange(v)[machine::thread() % 32 ^ x]; }
inline unsigned __shfl_up_sync(unsigned, unsigned v, unsigned n) {
  const uint64_t* all = machine::exchange(v);
  const unsigned lane = machine::thread() % 32;
  return lane < n ? v : (unsigned)all[lane - n];
}
inline unsigned long long __shfl_up_sync(unsigned, unsigned long long v, unsigned n) {
  const uint64_t* all = machine::exchange(v);
  const unsigned lane = machine::thread() % 32;
  return lane < n ? v : all[lane - n];
}
inline float __shfl_up_sync(unsigned mask, float v, unsigned n) { return __uint_as_float(__shfl_up_sync(mask, __float_as_uint(v), n)); }
inline unsigned __ballot_sync(unsigned, bool p) {
  const uint64_t* all = machine::exchange(p);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) result |= (unsigned)(all[i] != 0) << i;
  return result;
}
inline bool __any_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) != 0; }
inline bool __all_sync(unsigned mask, bool p) { return __ballot_sync(mask, p) == ~0u; }
