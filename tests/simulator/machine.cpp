// See machine.h. Run as: simulator FOLDER BLOCKS SEED; the files in the folder are those of `main`.
#include "machine.h"

#include <fcntl.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

// Of the kernel's text.
extern "C" void simulator_kernel(const void* args);
extern "C" uint32_t simulator_threads();

namespace machine {
namespace {

constexpr size_t STACK = 128 << 10;

struct Fiber {
  ucontext_t context;  // in which it begins
  jmp_buf place;       // where it goes on
};

// Short, since whoever waits is looked at often.
struct Lane {
  Fiber* fiber;
  uint32_t thread, block;
  bool begun = false;
  bool done = false;
  const uint64_t* round = nullptr;  // waits for this to be another than `last`
  uint64_t last;
  std::function<bool()> condition;  // none: may run
};

struct Warp {
  uint64_t sleeps_until = 0;
  uint32_t arrived = 0;
  uint64_t round = 0;
  uint64_t in[WARP], out[WARP];
};

struct Barrier {
  uint32_t arrivals, pending;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Meeting {
  uint32_t arrived = 0;
  uint64_t round = 0;
};

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes;
  Barrier* barrier;
  uint64_t at;
};

// Words that a lane has asked for, by group, and how many groups it has closed.
struct Word {
  void* to;
  const void* from;
  uint64_t group;
};
struct Words {
  std::vector<Word> asked;
  uint64_t groups = 0;
};

std::vector<Lane> lanes;
std::vector<Words> words;  // by lane
std::vector<Fiber> fibers;
std::vector<Warp> warps;
constexpr uint32_t MEETINGS = 4;  // of a block: all, the consumers, two teams of them
std::vector<Meeting> meetings;    // [block][number]
std::unordered_map<uint64_t*, Barrier> barriers;
std::vector<Copy> copies;
std::mt19937_64 dice;
std::vector<uint8_t> shared_memory;
size_t shared_bytes;
uint32_t block_count;
uint64_t now;
uint64_t tries_given_up;  // how often all tries at barriers have given up
ucontext_t caller;
jmp_buf scheduler;
Lane* current;
const void* arguments;

Warp& warp_of(const Lane& lane) { return warps[(&lane - lanes.data()) / WARP]; }

void settle(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
  }
}

Barrier& known(uint64_t* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) fail("a barrier that was not initialized");
  return found->second;
}

void run_lane() {
  simulator_kernel(arguments);
  current->done = true;
  _longjmp(scheduler, 1);
}

// Lets a lane run until it waits. A context asks the system for the mask of signals at every change, which takes
// longer than all that a lane does in between; so contexts only give lanes their stacks.
void resume(Lane& lane) {
  if (_setjmp(scheduler) != 0) return;
  if (lane.begun) _longjmp(lane.fiber->place, 1);
  lane.begun = true;
  swapcontext(&caller, &lane.fiber->context);
}

bool ready(const Lane& lane) {
  if (lane.done || (lane.round && *lane.round == lane.last)) return false;
  return !lane.condition || lane.condition();
}

// Copies from there never come.
const void* lost_from = nullptr;
const void* lost_to = nullptr;
// What a wait that gives up has left.
const uint32_t* record = nullptr;

// Waits for the end of a round.
void wait_round(const uint64_t& round, uint64_t last) {
  if (round != last) return;
  current->round = &round;
  current->last = last;
  yield();
  current->round = nullptr;
}

void finish_copies() {
  for (size_t i = 0; i < copies.size();) {
    if (copies[i].at > now) {
      ++i;
      continue;
    }
    const Copy copy = copies[i];
    copies[i] = copies.back();
    copies.pop_back();
    memcpy(copy.to, copy.from, copy.bytes);
    copy.barrier->bytes -= copy.bytes;
    settle(*copy.barrier);
  }
}

// Runs the lanes of a warp that may run; whether there was one.
bool run_warp(size_t warp) {
  bool ran = false;
  for (size_t i = warp * WARP; i < (warp + 1) * WARP; ++i) {
    if (!ready(lanes[i])) continue;
    current = &lanes[i];
    current->condition = nullptr;
    resume(*current);
    current = nullptr;
    ran = true;
  }
  return ran;
}

void report() {
  for (const Lane& lane : lanes) {
    if (!lane.done && lane.thread % WARP == 0) fprintf(stderr, "block %u, warp %u waits\n", lane.block, lane.thread / WARP);
  }
}

void run(uint64_t seed, const void* args, size_t shared_size) {
  dice.seed(seed);
  arguments = args;
  shared_bytes = (shared_size + 127) / 128 * 128;
  shared_memory.assign(shared_bytes * block_count + 128, 0xff);
  const uint32_t threads = simulator_threads();
  lanes = std::vector<Lane>(size_t(threads) * block_count);
  words = std::vector<Words>(lanes.size());
  fibers = std::vector<Fiber>(lanes.size());
  warps.assign(lanes.size() / WARP, Warp());
  meetings.assign(size_t(block_count) * MEETINGS, Meeting());
  const size_t bytes = lanes.size() * STACK;
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) fail("no memory for stacks");
  for (size_t i = 0; i < lanes.size(); ++i) {
    Lane& lane = lanes[i];
    lane.thread = i % threads;
    lane.block = i / threads;
    lane.fiber = &fibers[i];
    ucontext_t& context = lane.fiber->context;
    getcontext(&context);
    context.uc_stack.ss_sp = static_cast<uint8_t*>(stacks) + i * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, run_lane, 0);
  }
  uint64_t stuck_at = 0;
  for (uint64_t idle = 0;; ++now) {
    finish_copies();
    const size_t warp = dice() % warps.size();
    if (warps[warp].sleeps_until <= now && run_warp(warp)) {
      idle = 0;
      if (dice() % 200 == 0) warps[warp].sleeps_until = now + dice() % 4000;
      continue;
    }
    // Many picks in vain: all is done, or those that can go on sleep, or nobody can.
    if (++idle < 16 * warps.size() || !copies.empty()) continue;
    idle = 0;
    bool done = true, alive = false;
    uint64_t state = 0;  // what has come about so far
    for (const Lane& lane : lanes) {
      done = done && lane.done;
      alive = alive || ready(lane);
      state += lane.done;
    }
    for (const auto& [address, barrier] : barriers) state += barrier.phase;
    if (done) break;
    // Nobody can go on, unless a try at a barrier gives up: who looks at something else then may.
    if (!alive && state + 1 != stuck_at) {
      stuck_at = state + 1;
      ++tries_given_up;
      continue;
    }
    if (!alive) {
      report();
      fail("a deadlock");
    }
  }
  munmap(stacks, bytes);
  barriers.clear();
}

}  // namespace

uint32_t thread() { return current->thread; }
uint32_t block() { return current->block; }
uint32_t blocks() { return block_count; }
uint64_t time() { return now; }

uint8_t* shared() {
  const uintptr_t start = (reinterpret_cast<uintptr_t>(shared_memory.data()) + 127) / 128 * 128;
  return reinterpret_cast<uint8_t*>(start) + shared_bytes * current->block;
}

bool luck(uint32_t of) { return dice() % of == 0; }

void yield() {
  if (_setjmp(current->fiber->place) == 0) _longjmp(scheduler, 1);
}

void wait(std::function<bool()> condition) {
  if (condition()) return;
  current->condition = std::move(condition);
  yield();
}

const uint64_t* exchange(uint64_t value) {
  Warp& warp = warp_of(*current);
  warp.in[current->thread % WARP] = value;
  const uint64_t round = warp.round;
  if (++warp.arrived == WARP) {
    memcpy(warp.out, warp.in, sizeof warp.in);
    warp.arrived = 0;
    ++warp.round;
  }
  wait_round(warp.round, round);
  return warp.out;
}

void meet(uint32_t number, uint32_t threads) {
  Meeting& meeting = meetings[current->block * MEETINGS + number];
  const uint64_t round = meeting.round;
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    ++meeting.round;
  }
  wait_round(meeting.round, round);
}

void give_up() {
  fprintf(stderr, "stage %u, role %u, step %u\n", record[1], record[3], record[6]);
  fail("the kernel gave up waiting");
}

void fail(const char* what) {
  fprintf(stderr, "the simulation failed: %s\n", what);
  exit(1);
}

void barrier_init(uint64_t* barrier, uint32_t arrivals) { barriers[barrier] = Barrier{arrivals, arrivals}; }

void barrier_arrive(uint64_t* barrier) {
  yield();
  Barrier& found = known(barrier);
  if (found.pending == 0) fail("more arrivals on a barrier than it counts");
  --found.pending;
  settle(found);
}

void barrier_expect(uint64_t* barrier, uint32_t bytes) { known(barrier).bytes += bytes; }

bool barrier_try(uint64_t* barrier, uint32_t parity) {
  Barrier& found = known(barrier);
  const uint64_t given_up = tries_given_up;
  wait([&found, parity, given_up] { return (found.phase & 1) != parity || given_up != tries_given_up || dice() % 2000 == 0; });
  return (found.phase & 1) != parity;
}

bool barrier_test(uint64_t* barrier, uint32_t parity) {
  yield();
  return (known(barrier).phase & 1) != parity;
}

void copy_word(void* to, const void* from) {
  Words& own = words[current - lanes.data()];
  own.asked.push_back({to, from, own.groups});
  memset(to, 0xff, 4);
}

void copy_group() { ++words[current - lanes.data()].groups; }

void copy_wait(uint32_t left) {
  Words& own = words[current - lanes.data()];
  const auto there = [&](const Word& word) { return word.group + left < own.groups; };
  for (const Word& word : own.asked) {
    if (there(word)) memcpy(word.to, word.from, 4);
  }
  own.asked.erase(std::remove_if(own.asked.begin(), own.asked.end(), there), own.asked.end());
}

void copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  memset(to, 0xff, bytes);
  if (from >= lost_from && from < lost_to) return;
  const uint64_t late = dice() % 16 == 0 ? dice() % 20000 : dice() % 400;
  copies.push_back({static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), bytes, &known(barrier), now + late});
}

}  // namespace machine

namespace {

// A file's bytes in memory; what is written there goes into the file.
uint8_t* map(const std::string& path) {
  const int file = open(path.c_str(), O_RDWR);
  if (file < 0) machine::fail(("cannot open " + path).c_str());
  const off_t bytes = lseek(file, 0, SEEK_END);
  void* memory = mmap(nullptr, bytes > 0 ? bytes : 1, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) machine::fail(("cannot map " + path).c_str());
  close(file);
  return static_cast<uint8_t*>(memory);
}

void store(const std::string& path, const void* from, size_t bytes) {
  FILE* file = fopen(path.c_str(), "wb");
  if (!file || fwrite(from, 1, bytes, file) != bytes || fclose(file) != 0) machine::fail(("cannot write " + path).c_str());
}

// NaN as floats and as halves, and no late word (handoff.cuh): who waits for one has to have it cleared.
uint8_t* poisoned(size_t bytes) {
  uint8_t* memory = static_cast<uint8_t*>(aligned_alloc(256, (bytes + 511) / 256 * 256));
  for (size_t i = 0; i < bytes; ++i) memory[i] = i % 2 ? 0x7f : 0xff;
  return memory;
}

}  // namespace

// Words of launch.bin, then the page table.
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

extern "C" void simulator_args(void* args, const Launch& launch, const uint8_t* weights, uint8_t* kv, uint8_t* arena, uint8_t* sync, float* logits, const uint32_t* pages, uint32_t* mail, float* taps, uint8_t* choices, uint8_t* const draft[3], uint64_t seed);

// Reads weights.bin and launch.bin, reads and writes kv.bin, draft_kv.bin and taps.bin, writes arena.bin, logits.bin,
// chosen.bin and experts.bin.
int main(int, char** argv) {
  const std::string folder = std::string(argv[1]) + "/";
  machine::block_count = atoi(argv[2]);
  const uint8_t* weights = map(folder + "weights.bin");
  uint8_t* kv = map(folder + "kv.bin");
  uint8_t* taps = map(folder + "taps.bin");
  const uint8_t* words = map(folder + "launch.bin");
  const Launch& launch = *reinterpret_cast<const Launch*>(words);
  uint8_t* arena = poisoned(launch.arena_bytes);
  uint8_t* sync = poisoned(launch.sync_bytes);
  memset(sync, 0, launch.sync_bytes);
  const size_t logit_bytes = size_t(32) * launch.vocab * 4;
  uint8_t* logits = poisoned(logit_bytes);
  // The record of a stall, a word that halts, from 40 on experts, from 64 on the tokens, or what rounds brought.
  const size_t chosen = launch.steps * (launch.round_sequences != 0 ? 64 : 32);
  std::vector<uint32_t> mail(64 + chosen);
  mail[32] = launch.halt;
  uint8_t* const draft[3] = {map(folder + "draft_kv.bin"), poisoned(launch.block_bytes), poisoned(launch.inject_bytes)};
  uint8_t* choices = poisoned(32 * 24192);  // of as many rows as there may ever be
  machine::lost_from = weights + size_t(launch.lost_from) * 64;
  machine::lost_to = weights + size_t(launch.lost_to) * 64;
  machine::record = mail.data();
  uint64_t args[64];
  simulator_args(args, launch, weights, kv, arena, sync, reinterpret_cast<float*>(logits), reinterpret_cast<const uint32_t*>(words + sizeof(Launch)), mail.data(), reinterpret_cast<float*>(taps), choices, draft, atoll(argv[3]));
  machine::run(atoll(argv[3]), args, launch.shared_bytes);
  store(folder + "arena.bin", arena, launch.arena_bytes);
  store(folder + "logits.bin", logits, logit_bytes);
  store(folder + "experts.bin", mail.data() + 40, 12);
  store(folder + "chosen.bin", mail.data() + 64, chosen * 4);
}
