// Behind the kernel's text: how machine.cpp starts it.

#include <stdio.h>
#include <stdlib.h>

void __syncthreads() { machine::meet(0, BLOCK_THREADS); }

extern "C" void simulator_kernel(const void* args) { tilec_resident(*static_cast<const LaunchArgs*>(args)); }
extern "C" uint32_t simulator_threads() { return BLOCK_THREADS; }

// Times of the launch's stages, written at the end to the file that the environment names, if it names one.
struct Trace {
  const char* const path = getenv("SIMULATOR_TRACE");
  u64 times[8 * STAGES * 3] = {};
  ~Trace() {
    FILE* const file = path != nullptr ? fopen(path, "wb") : nullptr;
    if (file == nullptr) return;
    fwrite(times, sizeof(times[0]), 3 * STAGES * 8, file);
    fclose(file);
  }
};
static Trace trace;

// As in machine.cpp.
struct Launch {
  uint32_t arena_bytes, sync_bytes, vocab, rows, logit_rows, steps, pages_per_sequence, kv_pages, shared_bytes, routing, tap_offset;
  uint32_t tokens[32], positions[32], sequences[32], logit_index[32];
  uint32_t sampled, sampling[32][8];
  // Of rounds, where there are sequences.
  uint32_t round_sequences, round[16][8], block_passes, accept, block_bytes, inject_bytes, halt;
  uint32_t stop_count, stop_tokens[8];
  // Copies from here in the weights, in units of 64 bytes, never come; turns until somebody gives up, or 0.
  uint32_t lost_from, lost_to, patience;
};

extern "C" void simulator_args(void* to, const Launch& launch, const uint8_t* weights, uint8_t* kv, uint8_t* arena, uint8_t* sync, float* logits, const uint32_t* pages, uint32_t* mail, float* taps, uint8_t* choices, uint8_t* const draft[3], uint64_t seed) {
  LaunchArgs args = {};
  args.weights = weights;
  args.kv = kv;
  args.arena = arena;
  args.sync = sync;
  args.logits = logits;
  args.tokens = launch.tokens;
  args.positions = launch.positions;
  args.sequences = launch.sequences;
  args.logit_index = launch.logit_index;
  args.page_table = pages;
  args.stall = mail;
  args.halt = mail + 32;
  args.chosen = mail + 64;
  args.patience_ns = launch.patience != 0 ? launch.patience : 20000000;  // turns
  args.rows = launch.rows;
  args.logit_rows = launch.logit_rows;
  args.pages_per_sequence = launch.pages_per_sequence;
  args.kv_pages = launch.kv_pages;
  args.steps = launch.steps;
  args.in_flight = 2 << 14;
  args.experts = mail + 40;
  args.routing = launch.routing;
  args.sampling = launch.sampled != 0 ? reinterpret_cast<const SampleRow*>(launch.sampling) : nullptr;
  args.taps = taps + launch.tap_offset;
  args.choices = choices;
  args.draft_kv = draft[0];
  args.block_arena = draft[1];
  args.inject_arena = draft[2];
  args.round = reinterpret_cast<const RoundSequence*>(launch.round);
  args.round_sequences = launch.round_sequences;
  args.block_passes = launch.block_passes;
  args.accept = launch.accept;
  // Nothing is foreseen, an expert of each row, some, or all. No bit depends on it.
  const u32 foresee[4] = {0, 1, 100000 * launch.rows, ~0u};
  args.foresee = foresee[seed % 4];
  args.trace = trace.path != nullptr ? trace.times : nullptr;
  args.stop_count = launch.stop_count;
  for (int i = 0; i < 8; ++i) args.stop_tokens[i] = launch.stop_tokens[i];
  *static_cast<LaunchArgs*>(to) = args;
}
