// Integers, PTX in functions, and the structures that the host shares with the kernel.
//
// No header is included anywhere: NVRTC has the vector types and the special registers built in,
// and everything else that the kernel needs of the hardware is one PTX instruction below.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 LANES = 32;
constexpr u32 STEP_ROWS = 8;      // rows of a step: one tensor-core tile of 8 x 8 results
constexpr u32 OCTET = 8;          // output features of a tile
constexpr u32 OCTET_BLOCK = 512;  // bytes of 8 features x 64 bytes of columns: 16 bytes a lane

// One structure a launch, by value; ir/src/launch.rs says what each field is.
struct LaunchArgs {
  const u8* weights;
  u8* kv;
  u8* arena;
  u8* sync;
  float* logits;
  const u32* tokens;
  const u32* positions;
  const u32* sequences;
  const u32* logit_index;
  const u32* page_table;
  u32* stall;
  u32* chosen;
  const u32* halt;
  u64* trace;
  u64 patience_ns;
  u32 rows;
  u32 logit_rows;
  u32 pages_per_sequence;
  u32 kv_pages;
  u32 steps;
  u32 stop_count;
  u32 stop_tokens[8];
  u32 in_flight;
  u32 zero;
};

// The synchronization memory behind LaunchArgs::sync, zeroed before a launch. Each word that SMs
// contend for has a 128-byte line of its own.
struct Sync {
  u32 arrived;                // SMs that finished a stage, summed over all stages of the launch
  u32 stalled;                // somebody gave up waiting and writes the record
  u32 pad0[30];
  u32 halted;                 // SM 0 says that this step is the last
  u32 pad1[31];
  u64 best[3][STEP_ROWS];     // per row the largest logit so far as an ordered key; three steps in turn
  u32 splits[1];              // per (row, kv head): chunks of the context that are finished; as many as fit
};

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % LANES; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x / LANES; }
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The value, as if it were read anew: what is computed from it stays in the stage that needs it. Left
// to itself the compiler computes the addresses of all stages before the layers' loop, and spills them.
__device__ __forceinline__ u32 anew(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}

// An offset beyond 4 GB. Left as a literal it is folded into addresses, and NVRTC 13.0 has lost its upper
// half on the way.
__device__ __forceinline__ u64 far(u64 offset) {
  asm volatile("" : "+l"(offset));
  return offset;
}

__device__ __forceinline__ u64 global_timer() {
  u64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// ---- Global memory ---------------------------------------------------------------------------

// Joins everything that this thread (and whoever it synchronized with in its block) wrote before to
// the count, so that an SM that sees the count sees the data.
__device__ __forceinline__ void add_release(u32* p, u32 n) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}
__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 add_acq_rel(u32* p, u32 n) {
  u32 v;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "r"(n) : "memory");
  return v;
}
__device__ __forceinline__ void max_relaxed(u64* p, u64 v) {
  asm volatile("red.relaxed.gpu.global.max.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ u64 load_relaxed(const u64* p) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ u32 load_host(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_host(u32* p, u32 v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Loads of data that other SMs wrote in this launch. They follow an acquire in this block; the L1
// cache would only be filled with lines that nobody reads again.
__device__ __forceinline__ float4 load4(const float* p) {
  float4 v;
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load4(const u32* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// ---- Number formats --------------------------------------------------------------------------

// Two floats as two halves in one register, `low` in the lower half; nearest even.
// As weights: `Act` is the type of the activations that they are multiplied with, a block of an octet has
// BLOCK_COLUMNS of each feature, a lane LANE_COLUMNS of them.
struct Bf16 {
  using Act = Bf16;
  static constexpr u32 BLOCK_COLUMNS = 32, LANE_COLUMNS = 8;
  __device__ __forceinline__ static u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ __forceinline__ static float low(u32 pair) { return __uint_as_float(pair << 16); }
  __device__ __forceinline__ static float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
};
struct F16 {
  using Act = F16;
  static constexpr u32 BLOCK_COLUMNS = 32, LANE_COLUMNS = 8;
  __device__ __forceinline__ static u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
  }
  __device__ __forceinline__ static float low(u32 pair) { return half_to_float((u16)pair); }
  __device__ __forceinline__ static float high(u32 pair) { return half_to_float((u16)(pair >> 16)); }
  __device__ __forceinline__ static float half_to_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
  }
};
struct F32 {};
// Codes of block FP8. Every one of them is a bfloat16: its bits stay as they are, which makes it 2^120 times
// too small (the subnormal ones too), and the scale makes up for that.
struct E4m3 {
  using Act = Bf16;
  static constexpr u32 BLOCK_COLUMNS = 64, LANE_COLUMNS = 16;
  static constexpr float UNIT = 1.329227995784916e36f;  // 2^120
  // The codes 2 * PAIR and 2 * PAIR + 1 of four.
  template <u32 PAIR> __device__ __forceinline__ static u32 pair(u32 codes) {
    const u32 high = __byte_perm(codes, 0, PAIR == 0 ? 0x1404 : 0x3424);  // each in the upper byte of a half
    return (high & 0x80008000u) | (high >> 4 & 0x07f007f0u);
  }
};

// One value of a half format.
template <class T> __device__ __forceinline__ u16 narrow(float v) { return (u16)T::pack(v, 0.f); }
template <class T> __device__ __forceinline__ float widen(u16 v) { return T::low((u32)v); }

// D (16 x 8) += A (16 rows x 16 columns) x B (16 columns x 8 features). The rows do not touch each
// other. A step has at most 8 rows, so A's upper and lower half hold the same rows at other columns:
// see gemm.cuh.
__device__ __forceinline__ void mma(Bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(F16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Shared-memory barriers and bulk copies --------------------------------------------------

__device__ __forceinline__ void barrier_init(u64* b, u32 arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Behind the initialization, before anyone else (the copy engine too) may see the barriers.
__device__ __forceinline__ void barriers_visible() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_arrive(u64* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ bool barrier_try(u64* b, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
  return done != 0;
}
// One thread announces `bytes` of a copy and arrives.
__device__ __forceinline__ void barrier_arrive_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Adds `bytes` of a copy to the phase, without arriving.
__device__ __forceinline__ void barrier_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// The copy engine moves `bytes` (a multiple of 16) and counts them on the barrier.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, u32 bytes, u64* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)) : "memory");
}
#else
__device__ __forceinline__ bool barrier_try(u64* b, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
  return done != 0;
}
#endif

// Four bytes into shared memory, by the lane that asks; a group of them is what was asked for since the last.
__device__ __forceinline__ void copy_word(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this lane but the last LEFT.
template <u32 LEFT> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Registers of the warps of a warpgroup: the roles need very different numbers of them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
template <u32 N> __device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <u32 N> __device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
#else
template <u32 N> __device__ __forceinline__ void registers_up() {}
template <u32 N> __device__ __forceinline__ void registers_down() {}
#endif
