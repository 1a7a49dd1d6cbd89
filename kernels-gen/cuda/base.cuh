// Integers, and the structures that the host shares with the kernel.
//
// No header is included anywhere: NVRTC has the vector types and the special registers built in,
// and everything else that the kernel needs of the hardware is an instruction in ptx.cuh.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 LANES = 32;
constexpr u32 SLICE_ROWS = 8;     // rows of a slice of the step: one tensor-core tile of 8 x 8 results
constexpr u32 LAUNCH_ROWS = 32;   // rows that what host and kernel share has room for
constexpr u32 OCTET = 8;          // output features of a tile
constexpr u32 OCTET_BLOCK = 512;  // bytes of 8 features x 64 bytes of columns: 16 bytes a lane

// How a row's token is chosen; ir/src/launch.rs says what each field is.
struct SampleRow {
  float scale;
  float reach;
  u32 top_k;
  u32 reserved;
  u64 top_p;
  u64 seed;
};

// A sequence that a launch writes with a draft; ir/src/launch.rs says what each field is.
struct RoundSequence {
  u32 token;
  u32 position;
  u32 sequence;
  u32 guesses;
  u32 rows;
  u32 left;
  u32 limit;
  u32 first_row;
};

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
  u32* experts;
  float* taps;
  const SampleRow* sampling;
  u8* choices;
  u8* draft_kv;
  u8* block_arena;
  u8* inject_arena;
  const RoundSequence* round;
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
  u32 routing;
  u32 routing_seed;
  u32 round_sequences;
  u32 block_passes;
  u32 accept;
  u32 foresee;
};

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % LANES; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x / LANES; }
__device__ __forceinline__ constexpr u32 least(u32 a, u32 b) { return a < b ? a : b; }
