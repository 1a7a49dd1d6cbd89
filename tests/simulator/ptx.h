// In place of kernels-gen/cuda/ptx.cuh: the same functions, by machine.h.
#pragma once

__device__ __forceinline__ u8* shared_memory() { return machine::shared(); }
__device__ __forceinline__ void trap() { machine::give_up(); }
template <u32 THREADS> __device__ __forceinline__ void block_barrier(u32 number) { machine::meet(number, THREADS); }

__device__ __forceinline__ u32 anew(u32 v) { return v; }
__device__ __forceinline__ const u16* anew(const u16* v) { return v; }
__device__ __forceinline__ float anew(float v) { return v; }
__device__ __forceinline__ float4 anew(float4 v) { return v; }
__device__ __forceinline__ u64 far(u64 offset) { return offset; }
__device__ __forceinline__ u64 global_timer() { return machine::time(); }
__device__ __forceinline__ u32 cycles() { return (u32)machine::time(); }

__device__ __forceinline__ void add_release(u32* p, u32 n) { machine::yield(); *p += n; }
__device__ __forceinline__ u32 load_acquire(const u32* p) { machine::yield(); return *(const volatile u32*)p; }
__device__ __forceinline__ void shared_release(u32* p, u32 v) { *(volatile u32*)p = v; }
__device__ __forceinline__ u32 shared_acquire(const u32* p) { machine::yield(); return *(const volatile u32*)p; }
__device__ __forceinline__ void max_relaxed(u64* p, u64 v) { machine::yield(); if (v > *p) *p = v; }
__device__ __forceinline__ u64 load_relaxed(const u64* p) { machine::yield(); return *p; }
__device__ __forceinline__ u32 load_relaxed(const u32* p) { machine::yield(); return *p; }
__device__ __forceinline__ void add_relaxed(u32* p, u32 n) { machine::yield(); *p += n; }
__device__ __forceinline__ void add_relaxed(u64* p, u64 n) { machine::yield(); *p += n; }
__device__ __forceinline__ u32 fetch_add_relaxed(u32* p, u32 n) { machine::yield(); const u32 old = *p; *p += n; return old; }
// A hint is not to be relied on: half of the time it comes before what it speaks of.
__device__ __forceinline__ bool hinted(const u32* p, u32 expected) {
  machine::yield();
  return machine::luck(2) || (int)(*(const volatile u32*)p - expected) >= 0;
}
// Whoever asks again for what is not there lets the others go on.
__device__ __forceinline__ uint4 load4_relaxed(const u32* p) {
  uint4 v;
  memcpy(&v, p, sizeof v);
  if (v.x == ~0u || v.y == ~0u || v.z == ~0u || v.w == ~0u) machine::yield();
  return v;
}
__device__ __forceinline__ uint2 load2_relaxed(const u32* p) {
  uint2 v;
  memcpy(&v, p, sizeof v);
  if (v.x == ~0u || v.y == ~0u) machine::yield();
  return v;
}
__device__ __forceinline__ void store_relaxed(u32* p, u32 v) { *p = v; }
__device__ __forceinline__ void store2_relaxed(u32* p, u32 v, u32 w) { p[0] = v; p[1] = w; }
__device__ __forceinline__ void store4_relaxed(u32* p, u32 v) { p[0] = p[1] = p[2] = p[3] = v; }
__device__ __forceinline__ u32 load_host(const u32* p) { return *(const volatile u32*)p; }
__device__ __forceinline__ void store_host(u32* p, u32 v) { *(volatile u32*)p = v; }
__device__ __forceinline__ void tell_host(u32* p, u32 v) { *(volatile u32*)p = v; }
__device__ __forceinline__ float4 load4(const float* p) { float4 v; memcpy(&v, p, sizeof v); return v; }
__device__ __forceinline__ float load1(const float* p) { return *p; }
__device__ __forceinline__ uint4 load4(const u32* p) { uint4 v; memcpy(&v, p, sizeof v); return v; }

__device__ __forceinline__ float multiply(float a, float b) { return a * b; }
__device__ __forceinline__ u32 shared_add(u32* p, u32 n) { const u32 old = *p; *p += n; return old; }
// Changes nothing, but it has to be there.
__device__ __forceinline__ void prefetch_line(const void* p) { (void)*(const volatile u8*)p; }

__device__ __forceinline__ u32 half_bf16(float f) {
  const u32 u = __float_as_uint(f);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
__device__ __forceinline__ u32 half_f16(float f) {
  const _Float16 h = (_Float16)f;
  u16 bits;
  memcpy(&bits, &h, sizeof bits);
  return bits;
}
__device__ __forceinline__ u32 pack_bf16(float low, float high) { return half_bf16(low) | half_bf16(high) << 16; }
__device__ __forceinline__ u32 pack_f16(float low, float high) { return half_f16(low) | half_f16(high) << 16; }
// All halves, since converting one takes a processor long.
struct Halves {
  float of[1 << 16];
  Halves() {
    for (u32 bits = 0; bits < 1 << 16; ++bits) {
      const u16 half = (u16)bits;
      _Float16 h;
      memcpy(&h, &half, sizeof h);
      of[bits] = (float)h;
    }
  }
};
static const Halves HALVES;
__device__ __forceinline__ float widen_f16(u16 bits) { return HALVES.of[bits]; }
__device__ __forceinline__ float widen_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ float power_of_two(float v) { return exp2f(v); }
__device__ __forceinline__ float reciprocal(float v) { return 1.f / v; }
__device__ __forceinline__ float reciprocal_root(float v) { return 1.f / sqrtf(v); }
__device__ __forceinline__ u32 merge_bits(u32 mask, u32 ones, u32 zeros) { return (mask & ones) | (~mask & zeros); }
__device__ __forceinline__ u32 multiply_bf16(u32 a, u32 b) {
  return pack_bf16(widen_bf16((u16)a) * widen_bf16((u16)b), widen_bf16((u16)(a >> 16)) * widen_bf16((u16)(b >> 16)));
}
__device__ __forceinline__ u32 warp_max(u32 v) {
  const uint64_t* all = machine::exchange(v);
  for (u32 lane = 0; lane < 32; ++lane) v = (u32)all[lane] > v ? (u32)all[lane] : v;
  return v;
}
__device__ __forceinline__ u32 warp_min(u32 v) {
  const uint64_t* all = machine::exchange(v);
  for (u32 lane = 0; lane < 32; ++lane) v = (u32)all[lane] < v ? (u32)all[lane] : v;
  return v;
}

// A lane's two words of A or B at a time; of what the others have it takes its two rows and its two columns.
template <float WIDEN(u16)> __device__ __forceinline__ void product(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  float rows[2][16], columns[2][16];
  const u32 g = lane_id() / 4, at = lane_id() % 4 * 2;
  for (u32 half = 0; half < 3; ++half) {
    const u64 mine = half == 0 ? a[0] | (u64)a[1] << 32 : half == 1 ? a[2] | (u64)a[3] << 32 : b0 | (u64)b1 << 32;
    const uint64_t* all = machine::exchange(mine);
    for (u32 t = 0; t < 4; ++t) {
      for (u32 i = 0; i < 4; ++i) {
        const u32 k = t * 2 + i % 2;
        if (half < 2) rows[i / 2][half * 8 + k] = WIDEN((u16)(all[g * 4 + t] >> 16 * i));
        else for (u32 c = 0; c < 2; ++c) columns[c][i / 2 * 8 + k] = WIDEN((u16)(all[(at + c) * 4 + t] >> 16 * i));
      }
    }
  }
  for (u32 i = 0; i < 4; ++i) {
    for (u32 k = 0; k < 16; ++k) d[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { product<widen_bf16>(d, a, b0, b1); }
__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { product<widen_f16>(d, a, b0, b1); }

__device__ __forceinline__ void barrier_init(u64* b, u32 arrivals) { machine::barrier_init((uint64_t*)b, arrivals); }
__device__ __forceinline__ void barriers_visible() {}
__device__ __forceinline__ void copies_see_writes() {}
__device__ __forceinline__ void barrier_arrive(u64* b) { machine::barrier_arrive((uint64_t*)b); }
__device__ __forceinline__ void barrier_arrive(u64* b, u32 count) {
  for (u32 i = 0; i < count; ++i) barrier_arrive(b);
}
__device__ __forceinline__ bool barrier_try(u64* b, u32 parity) { return machine::barrier_try((uint64_t*)b, parity); }
__device__ __forceinline__ bool barrier_test(u64* b, u32 parity) { return machine::barrier_test((uint64_t*)b, parity); }
// Changes nothing, but it has to be there.
__device__ __forceinline__ void prefetch_bulk(const void* from, u32 bytes) {
  const volatile u8* at = (const volatile u8*)from;
  if (bytes == 0 || bytes % 16 != 0 || (size_t)from % 16 != 0 || at[0] + at[bytes - 1] > 510) __builtin_trap();
}
__device__ __forceinline__ void barrier_arrive_expect(u64* b, u32 bytes) {
  machine::barrier_expect((uint64_t*)b, bytes);
  machine::barrier_arrive((uint64_t*)b);
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, u32 bytes, u64* b) { machine::copy(to, from, bytes, (uint64_t*)b); }

__device__ __forceinline__ void copy_word(void* to, const void* from) { machine::copy_word(to, from); }
__device__ __forceinline__ void copy_group() { machine::copy_group(); }
template <u32 LEFT> __device__ __forceinline__ void copy_wait() { machine::copy_wait(LEFT); }

template <u32 N> __device__ __forceinline__ void registers_up() {}
template <u32 N> __device__ __forceinline__ void registers_down() {}
