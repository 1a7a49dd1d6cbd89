// How fast this GPU reads memory: every SM streams its share of a buffer as the resident kernel
// streams weights, and does nothing with it but add it up. What a step can reach is measured by this.
//
// The text in front defines SLOT_BYTES and RING_SLOTS.

constexpr u32 CEILING_THREADS = 512;
constexpr u32 READERS = 8;  // warps
constexpr u32 SLOT_VECTORS = SLOT_BYTES / 16;

struct CeilingArgs {
  u8* buffer;
  u64* times;   // [SMs][2]: when each began and ended, in nanoseconds of the global timer
  u32* sum;     // the sum of all words, modulo 2^32
  u32 slots;    // bytes of the buffer / SLOT_BYTES
  u32 zero;     // 0, which the compiler cannot know
};

// Words that differ everywhere, with a sum that the host knows: word i is i times an odd constant.
extern "C" __global__ void __launch_bounds__(CEILING_THREADS) tilec_ceiling_fill(const __grid_constant__ CeilingArgs args) {
  const u64 vectors = (u64)args.slots * SLOT_VECTORS, step = (u64)gridDim.x * CEILING_THREADS;
  for (u64 i = (u64)blockIdx.x * CEILING_THREADS + threadIdx.x; i < vectors; i += step) {
    const u32 word = (u32)i * 4 * 2654435761u;
    reinterpret_cast<uint4*>(args.buffer)[i] = make_uint4(word, word + 2654435761u, word + 2 * 2654435761u, word + 3 * 2654435761u);
  }
}

__device__ __forceinline__ u32 added(const uint4& v) { return v.x + v.y + v.z + v.w; }

#if __CUDA_ARCH__ >= 900
// One warp copies 16 KB at a time into a ring, the readers add up what has arrived.
__device__ __forceinline__ u32 stream(const CeilingArgs& args) {
  extern __shared__ __align__(128) u8 memory[];
  u64* full = reinterpret_cast<u64*>(memory);
  u64* empty = full + RING_SLOTS;
  u8* ring = memory + 1024;
  static_assert(2 * RING_SLOTS * sizeof(u64) <= 1024);
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < RING_SLOTS; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, READERS);
    }
    barriers_visible();
  }
  __syncthreads();
  u32 slot = 0, parity = 0, sum = 0;
  if (threadIdx.x / 32 < READERS) {
    for (u32 n = blockIdx.x; n < args.slots; n += gridDim.x) {
      while (!barrier_try(full + slot, parity)) {}
      const uint4* from = reinterpret_cast<const uint4*>(ring + slot * SLOT_BYTES);
#pragma unroll
      for (u32 i = 0; i < SLOT_VECTORS / (READERS * 32); ++i) sum += added(from[threadIdx.x + i * READERS * 32]);
      __syncwarp();
      // Behind the loads: see Consumer::release_slot.
      if (threadIdx.x % 32 == 0) barrier_arrive(empty + slot + (sum & args.zero));
      if (++slot == RING_SLOTS) { slot = 0; parity ^= 1; }
    }
  } else if (threadIdx.x == READERS * 32) {
    for (u32 n = blockIdx.x; n < args.slots; n += gridDim.x) {
      while (!barrier_try(empty + slot, parity ^ 1)) {}
      barrier_arrive_expect(full + slot, SLOT_BYTES);
      bulk_copy(ring + slot * SLOT_BYTES, args.buffer + (u64)n * SLOT_BYTES, SLOT_BYTES, full + slot);
      if (++slot == RING_SLOTS) { slot = 0; parity ^= 1; }
    }
  }
  return sum;
}
#else
// No copy engine: plain loads of 16 bytes, many in flight in each thread.
__device__ __forceinline__ u32 stream(const CeilingArgs& args) {
  constexpr u32 AT_ONCE = 16;
  const u64 vectors = (u64)args.slots * SLOT_VECTORS, step = (u64)gridDim.x * CEILING_THREADS;
  const uint4* from = reinterpret_cast<const uint4*>(args.buffer);
  u64 i = (u64)blockIdx.x * CEILING_THREADS + threadIdx.x;
  u32 sum = 0;
  for (; i + (AT_ONCE - 1) * step < vectors; i += AT_ONCE * step) {
    uint4 v[AT_ONCE];
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; ++j) {
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w) : "l"(from + i + j * step));
    }
#pragma unroll
    for (u32 j = 0; j < AT_ONCE; ++j) sum += added(v[j]);
  }
  for (; i < vectors; i += step) sum += added(from[i]);
  return sum;
}
#endif

extern "C" __global__ void __launch_bounds__(CEILING_THREADS, 1) tilec_ceiling_read(const __grid_constant__ CeilingArgs args) {
  const u64 start = global_timer();
  const u32 sum = stream(args);
  // The sum depends on all that was read, so that nothing of it is still under way at the end.
  atomicAdd(args.sum, sum);
  __syncthreads();
  if (threadIdx.x == 0) {
    args.times[blockIdx.x * 2] = start;
    args.times[blockIdx.x * 2 + 1] = global_timer();
  }
}
