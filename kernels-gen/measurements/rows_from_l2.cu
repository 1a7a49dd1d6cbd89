// How fast all SMs of a GPU read the same 8 rows of 4,096 halves (64 KB) just after all of them wrote them, which is what
// every stage of a step with 8 rows begins with (`cuda/rows.cuh`), for several ways to lay them out and to fetch them.
//
//   nvcc -std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a rows_from_l2.cu -o rows_from_l2 && ./rows_from_l2
//
// A turn: each SM writes its columns, all meet at a counter, then eight warps bring all rows into registers: a lane has
// 16 pieces of 16 bytes. Clocks are those of the last part alone, the mean over SMs and turns. Beside it a lane may keep
// some copies of 16 KB of other memory on their way, as the loader does with weights.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

enum Way {
  ROWS,       // row by row: a warp's load has 64 bytes of each of eight rows
  OCTETS,     // 32 columns of eight rows side by side: a warp's load is 512 bytes in one piece
  COPIES,     // the copy engine brings them into shared memory, eight times 8 KB
  MULTICAST,  // the same in pairs of SMs, each of which has the engine write half of the rows to both
  PAIRS,      // octets, of which each SM of a pair loads half and stores it into the other's shared memory as well
  ONE_ROW,    // only the first row of eight, row by row
  ONE_OCTET,  // only the first row of an octet
};

constexpr u32 BYTES = 65536, ROW_BYTES = BYTES / 8, SLOT = 16384, SLOTS = 6, TURNS = 2000, WARM = 20, WARPS = 8, LOADS = 16;

#define CHECK(call)                                                      \
  do {                                                                   \
    const cudaError_t error = (call);                                    \
    if (error != cudaSuccess) {                                          \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));     \
      exit(1);                                                           \
    }                                                                    \
  } while (0)

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ uint4 load(const u8* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ uint4 load_shared(u32 p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(p) : "memory");
  return v;
}
__device__ u32 in_pair() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// An address of this SM's shared memory in the other SM of the pair.
__device__ u32 others(u32 address) {
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(in_pair() ^ 1));
  return there;
}
__device__ void wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}
__device__ void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ void copy_to_both(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"((unsigned short)3) : "memory");
}
__device__ void warps_meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

struct Arguments {
  u8* rows;  // three times BYTES, which take turns
  const u8* weights;
  u64 weight_bytes;
  u32* arrived;
  u32 in_flight;  // copies of weights
  u64* clocks;    // by SM; behind them what keeps the loads alive
};

// Copies of other memory, one behind the other, until the rows are done.
__device__ void stream(const Arguments& a, u8* slots, u64* barriers, const volatile u32& stop) {
  u64 at = (u64)blockIdx.x * SLOT, n = 0;
  for (; !stop; ++n) {
    const u32 slot = n % a.in_flight;
    if (n >= a.in_flight) wait(shared_address(barriers + slot), (n / a.in_flight - 1) & 1);
    expect(shared_address(barriers + slot), SLOT);
    copy(shared_address(slots + slot * SLOT), a.weights + at, SLOT, shared_address(barriers + slot));
    at += (u64)gridDim.x * SLOT;
    if (at + SLOT > a.weight_bytes) at = (u64)blockIdx.x * SLOT;
  }
  for (u64 k = n >= a.in_flight ? n - a.in_flight : 0; k < n; ++k) wait(shared_address(barriers + k % a.in_flight), (k / a.in_flight) & 1);
}

template <Way WAY> __global__ void __launch_bounds__(WARPS * 32 + 32, 1) read_rows(Arguments a) {
  extern __shared__ __align__(128) u8 memory[];  // rows, then slots
  __shared__ __align__(8) u64 rows_there, slot_there[SLOTS];
  __shared__ volatile u32 stop;
  constexpr bool PAIR = WAY == MULTICAST || WAY == PAIRS, OCTET = WAY == OCTETS || WAY == PAIRS || WAY == ONE_OCTET;
  constexpr bool ONE = WAY == ONE_ROW || WAY == ONE_OCTET;
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
  const u32 mine = shared_address(memory), barrier = shared_address(&rows_there);
  if (threadIdx.x == 0) {
    stop = 0;
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
    for (u64& b : slot_there) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&b)));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (PAIR) asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  if (warp == WARPS) {
    if (lane == 0 && a.in_flight > 0) stream(a, memory + BYTES, slot_there, stop);
    return;
  }
  u64 clocks = 0;
  u32 kept = 0, meetings = 0;
  // All SMs have written what they write.
  auto meet = [&] {
    ++meetings;
    if (warp == 0) {
      __syncwarp();
      if (lane == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.arrived) : "memory");
        u32 seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(a.arrived) : "memory");
        while (seen < meetings * gridDim.x);
      }
    }
    warps_meet();
  };
  // Where this lane's piece i lies.
  auto piece = [&](u32 i) { return OCTET ? (i * WARPS + warp) * 512 + lane * 16 : row * ROW_BYTES + (i * WARPS + warp) * 64 + quarter * 16; };
  for (u32 turn = 0; turn < TURNS + WARM; ++turn) {
    u8* const rows = a.rows + turn % 3 * BYTES;
    if (warp == 0) {
      // Eight columns of all rows, as an epilogue has them.
      for (u32 tile = blockIdx.x; tile < ROW_BYTES / 16; tile += gridDim.x) {
        const u32 at = OCTET ? tile / 4 * 512 + row * 64 + tile % 4 * 16 : row * ROW_BYTES + tile * 16;
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(rows + at + quarter * 4), "r"(turn + tile) : "memory");
      }
    }
    meet();
    const u64 start = clock64();
    uint4 v[LOADS] = {};
    if (WAY == COPIES || WAY == MULTICAST) {
      if (threadIdx.x == 0) {
        asm volatile("fence.proxy.async;" ::: "memory");  // what others wrote, for the copy engine
        expect(barrier, BYTES);
        for (u32 k = 0; k < 8; ++k) {
          if (WAY == COPIES) copy(mine + k * ROW_BYTES, rows + k * ROW_BYTES, ROW_BYTES, barrier);
          else if (k / 4 == in_pair()) copy_to_both(mine + k * ROW_BYTES, rows + k * ROW_BYTES, ROW_BYTES, barrier);
        }
      }
      wait(barrier, turn & 1);
#pragma unroll
      for (u32 i = 0; i < LOADS; ++i) v[i] = load_shared(mine + (i * WARPS + warp) * 512 + lane * 16);
    } else if (WAY == PAIRS) {
      const u32 there = others(mine), half = in_pair() * (LOADS / 2);
#pragma unroll
      for (u32 i = 0; i < LOADS / 2; ++i) v[i] = load(rows + piece(half + i));
#pragma unroll
      for (u32 i = 0; i < LOADS / 2; ++i) {
        asm volatile("st.shared::cluster.v4.u32 [%0], {%1,%2,%3,%4};"
                     ::"r"(there + piece(i)), "r"(v[i].x), "r"(v[i].y), "r"(v[i].z), "r"(v[i].w) : "memory");
      }
      warps_meet();
      if (threadIdx.x == 0) asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(others(barrier)) : "memory");
      wait(barrier, turn & 1);
#pragma unroll
      for (u32 i = 0; i < LOADS / 2; ++i) v[LOADS / 2 + i] = load_shared(mine + piece(i));
    } else {
#pragma unroll
      for (u32 i = 0; i < LOADS; ++i) {
        if (!ONE || row == 0) v[i] = load(rows + piece(i));
      }
    }
#pragma unroll
    for (u32 i = 0; i < LOADS; ++i) kept = kept * 3 + (v[i].x ^ v[i].y ^ v[i].z ^ v[i].w);
    if (kept == 0x12345) a.clocks[gridDim.x] = kept;  // all loads have arrived
    warps_meet();
    if (turn >= WARM) clocks += clock64() - start;
  }
  if (threadIdx.x == 0) {
    a.clocks[blockIdx.x] = clocks;
    stop = 1;
  }
  if (PAIR) meet();  // nobody leaves whose memory another one writes
}

template <Way WAY> void measure(const char* name, Arguments a, int sms) {
  const u32 shared = BYTES + SLOTS * SLOT;
  CHECK(cudaFuncSetAttribute(read_rows<WAY>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  printf("%-42s", name);
  for (u32 in_flight : {0u, 2u, 4u}) {
    a.in_flight = in_flight;
    CHECK(cudaMemset(a.arrived, 0, sizeof(u32)));
    cudaLaunchAttribute pair = {};
    pair.id = cudaLaunchAttributeClusterDimension;
    pair.val.clusterDim = {2, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = sms;
    config.blockDim = WARPS * 32 + 32;
    config.dynamicSmemBytes = shared;
    config.attrs = &pair;
    config.numAttrs = WAY == MULTICAST || WAY == PAIRS;
    CHECK(cudaLaunchKernelEx(&config, read_rows<WAY>, a));
    CHECK(cudaDeviceSynchronize());
    std::vector<u64> clocks(sms);
    CHECK(cudaMemcpy(clocks.data(), a.clocks, sms * sizeof(u64), cudaMemcpyDeviceToHost));
    double sum = 0;
    for (u64 n : clocks) sum += n;
    printf("  %6.0f", sum / sms / TURNS);
  }
  printf("\n");
}

int main() {
  cudaDeviceProp gpu;
  CHECK(cudaGetDeviceProperties(&gpu, 0));
  const int sms = gpu.multiProcessorCount / 2 * 2;
  Arguments a = {};
  a.weight_bytes = 4ull << 30;
  CHECK(cudaMalloc((void**)&a.weights, a.weight_bytes));
  CHECK(cudaMemset((void*)a.weights, 1, a.weight_bytes));
  CHECK(cudaMalloc(&a.rows, 3 * BYTES));
  CHECK(cudaMalloc(&a.arrived, sizeof(u32)));
  CHECK(cudaMalloc(&a.clocks, (sms + 1) * sizeof(u64)));
  printf("%s, %d SMs: cycles with 0, 2, 4 copies of 16 KB on their way\n", gpu.name, sms);
  measure<ROWS>("8 rows, one behind the other", a, sms);
  measure<OCTETS>("8 rows, in octets", a, sms);
  measure<COPIES>("8 rows, by the copy engine", a, sms);
  measure<MULTICAST>("8 rows, by the copy engine to pairs", a, sms);
  measure<PAIRS>("8 rows, in octets, halves handed to pairs", a, sms);
  measure<ONE_ROW>("a row alone", a, sms);
  measure<ONE_OCTET>("a row of an octet", a, sms);
}
