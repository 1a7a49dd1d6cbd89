// Every instruction that C++ does not have, a function each. Nothing else in the kernel depends on the
// machine: the tests put another text in this one's place and run the kernel on a processor.

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// The block's shared memory. Its address is read anew, so that it stays in a register: left to itself the compiler
// computes it in front of most accesses, from a special register that takes 30 cycles.
__device__ __forceinline__ u8* shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  u32 at = shared_address(memory);
  asm volatile("" : "+r"(at));
  return reinterpret_cast<u8*>(__cvta_shared_to_generic(at));
}
__device__ __forceinline__ void trap() { asm volatile("trap;"); }
// A barrier of THREADS threads of the block; 0 is that of the whole block.
template <u32 THREADS> __device__ __forceinline__ void block_barrier(u32 number) { asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(THREADS) : "memory"); }

// The value, as if it were read anew: what is computed from it stays in the stage that needs it. Left
// to itself the compiler computes the addresses of all stages before the layers' loop, and spills them.
__device__ __forceinline__ u32 anew(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ const u16* anew(const u16* v) {
  asm volatile("" : "+l"(v));
  return v;
}
__device__ __forceinline__ float anew(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
__device__ __forceinline__ float4 anew(float4 v) {
  asm volatile("" : "+f"(v.x), "+f"(v.y), "+f"(v.z), "+f"(v.w));
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
// A word of shared memory by which a warp tells another one how far it is: what it read and wrote before is over.
__device__ __forceinline__ void shared_release(u32* p, u32 v) {
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(shared_address(p)), "r"(v) : "memory");
}
__device__ __forceinline__ u32 shared_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared_address(p)) : "memory");
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
__device__ __forceinline__ u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void add_relaxed(u32* p, u32 n) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(n) : "memory");
}
__device__ __forceinline__ void add_relaxed(u64* p, u64 n) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(n) : "memory");
}
// Whether a count that orders nothing has come so far.
__device__ __forceinline__ bool hinted(const u32* p, u32 expected) { return (int)(load_relaxed(p) - expected) >= 0; }
// Words that are told by what they are (handoff.cuh).
__device__ __forceinline__ uint4 load4_relaxed(const u32* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load2_relaxed(const u32* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store2_relaxed(u32* p, u32 v, u32 w) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(v), "r"(w) : "memory");
}
__device__ __forceinline__ void store4_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(p), "r"(v) : "memory");
}
// What it was before.
__device__ __forceinline__ u32 fetch_add_relaxed(u32* p, u32 n) {
  u32 v;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "r"(n) : "memory");
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
// A word that says all by itself: nothing has to be in the host's sight before it.
__device__ __forceinline__ void tell_host(u32* p, u32 v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Loads of data that other SMs wrote in this launch. They follow an acquire in this block; the L1
// cache would only be filled with lines that nobody reads again.
__device__ __forceinline__ float4 load4(const float* p) {
  float4 v;
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ float load1(const float* p) {
  float v;
  asm volatile("ld.global.L1::no_allocate.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load4(const u32* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
// A clock of the SM.
__device__ __forceinline__ u32 cycles() {
  u32 now;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
  return now;
}

// Brings a line into L2.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- Numbers ---------------------------------------------------------------------------------

// A product that is rounded, whatever is done with it.
__device__ __forceinline__ float multiply(float a, float b) {
  float r;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Two floats as a pair of halves, `low` in the lower one; nearest even.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float widen_f16(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
// 2^v, 1 / v and 1 / sqrt(v) within two units of the last place; what is below the normal numbers is 0.
__device__ __forceinline__ float power_of_two(float v) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float reciprocal_root(float v) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
// The bits of `ones` where `mask` has ones, and else those of `zeros`, in one instruction: left to itself the compiler makes
// it two.
__device__ __forceinline__ u32 merge_bits(u32 mask, u32 ones, u32 zeros) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(mask), "r"(ones), "r"(zeros));
  return r;
}
// Products of two pairs of bfloat16, rounded to nearest even; the third operand is -0, which adds nothing.
__device__ __forceinline__ u32 multiply_bf16(u32 a, u32 b) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  return r;
}
// The largest and the smallest of a warp's values.
__device__ __forceinline__ u32 warp_max(u32 v) {
  u32 r;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
  return r;
}
__device__ __forceinline__ u32 warp_min(u32 v) {
  u32 r;
  asm volatile("redux.sync.min.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
  return r;
}
// D (16 x 8) += A (16 x 16) x B (16 x 8), a whole warp.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- Shared-memory counts, barriers and bulk copies ------------------------------------------

// Adds to a word of shared memory; what it was before.
__device__ __forceinline__ u32 shared_add(u32* p, u32 n) {
  u32 old;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(old) : "r"(shared_address(p)), "r"(n) : "memory");
  return old;
}

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

// Whether the phase of this parity is over; `barrier_try` may wait for it for a while.
__device__ __forceinline__ bool barrier_test(u64* b, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
  return done != 0;
}

#if __CUDA_ARCH__ >= 900
// `count` arrivals.
__device__ __forceinline__ void barrier_arrive(u64* b, u32 count) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ bool barrier_try(u64* b, u32 parity) {
  u32 done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
  return done != 0;
}
// Brings `bytes` (a multiple of 16) into L2.
__device__ __forceinline__ void prefetch_bulk(const void* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// One thread announces `bytes` of a copy and arrives.
__device__ __forceinline__ void barrier_arrive_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// The copy engine moves `bytes` (a multiple of 16) and counts them on the barrier. They are read once a step: in L2 they are
// the first to make room, so that the kernel's text and the activations stay there.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, u32 bytes, u64* b) {
  u64 once;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(once));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(once) : "memory");
}
#else
__device__ __forceinline__ void barrier_arrive(u64* b, u32 count) {
  for (u32 i = 0; i < count; ++i) barrier_arrive(b);
}
// Sixteen bytes by the lane that asks, and an arrival when all that this lane asked for has come.
__device__ __forceinline__ void copy_piece(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_arrive(u64* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ bool barrier_try(u64* b, u32 parity) { return barrier_test(b, parity); }
// No such instruction: weights come when they are copied.
__device__ __forceinline__ void prefetch_bulk(const void*, u32) {}
#endif

// What this thread has acquired is in sight of the copies that it asks for from here on: the copy engine is a proxy of its own.
__device__ __forceinline__ void copies_see_writes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// Four bytes into shared memory, by the lane that asks; a group of them is what was asked for since the last.
__device__ __forceinline__ void copy_word(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this lane but the last LEFT.
template <u32 LEFT> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Registers of the warps of a warpgroup: the roles need different numbers of them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL)
template <u32 N> __device__ __forceinline__ void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <u32 N> __device__ __forceinline__ void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
#else
template <u32 N> __device__ __forceinline__ void registers_up() {}
template <u32 N> __device__ __forceinline__ void registers_down() {}
#endif
