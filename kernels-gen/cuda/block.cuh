// A block: its warps' roles, its shared memory, the waits between them, and the wait for other SMs.
//
//   consumers  8 warps: multiply tiles of weights from the ring, attend, copy embeddings
//   loader     1 warp:  streams the SM's weights into the ring, in the order of the step, never
//                       waiting for activations
//   control    1 warp:  adds up the consumers' partial sums, runs the epilogues, publishes the
//                       results, and waits for the other SMs; weighs the experts that rows chose
//   second     1 warp:  runs every other epilogue beside control, and deals out attention when a step begins
//   watchdog   1 warp:  releases what the SM wrote behind checked crossings, and foresees experts (router.cuh);
//                       ends a launch in which nothing happens any more, and says who waits for what
//
// Every stage ends with a crossing: each SM adds one to `Sync::arrived` when all that it makes in the
// stage is written, and starts the next stage when all SMs have. The stream of weights does not stop
// at a crossing: the loader goes on until the ring is full.
//
// To be sure that what it wrote is in sight, an SM waits for memory. If the next stage checks what it reads
// (handoff.cuh), the crossing is a checked one: control adds one to `Sync::hints`, which orders nothing, and goes on when
// most SMs have; the watchdog's warp adds to `arrived` meanwhile. The next stage's results begin when all SMs have
// arrived, which they have long when there are any (`Control::settle`). So every stage's consumers see all of the
// stage before the last, and epilogues all of the last.
//
// The generated text defines STEP_ROWS, SLOT_BYTES, RING_SLOTS, STAGES and the sizes of the parts of shared memory; and
// of mailboxes: MAILBOX_AT, where they are in the arena, MAILBOX_ROW_BYTES, and MAILBOX_OCTETS, whether rows lie in
// octets (rows.cuh); STAGE_CLEARS, a bit for each
// that a stage clears; CROSSING_CHECKED, whether the crossing behind a stage is a checked one (1), or one in front of which
// only few SMs may have work (2).
//
// DEALS says how many kinds of layers attention is dealt out for.
//
// A kernel of rounds with a draft has three kinds of steps (round.cuh): ROUND says so. Its stages are numbered through
// all three; first_stage(kind) says where a step begins. Where there is only one kind of steps, that is 0.

// Rows of a step, at most, in slices of 8.
constexpr u32 SLICES = STEP_ROWS / SLICE_ROWS;
static_assert(STEP_ROWS <= LAUNCH_ROWS && (SLICES == 1 || SLICES == 2 || SLICES == 4), "a lane a row; products of whole pairs of slices");

// The synchronization memory behind LaunchArgs::sync, zeroed before a launch. Each word that SMs
// contend for has a 128-byte line of its own.
struct Sync {
  u32 arrived;                // SMs that finished a stage, summed over all stages of the launch
  u32 stalled;                // somebody gave up waiting and writes the record
  u32 pad0[30];
  u32 hints;                  // SMs that came to a checked crossing, summed over all of the launch
  u32 pad2[31];
  u32 halted;                 // SM 0 says that this step is the last
  u32 rounds;                 // of choices by chance that rows have asked for in this launch
  u32 pad1[30];
  u64 best[3][STEP_ROWS];     // per row the largest logit so far as an ordered key; three steps in turn
};

constexpr u32 CONSUMERS = 8;
constexpr u32 LOADER = 8;
constexpr u32 CONTROL = 9;
constexpr u32 SECOND = 10;
constexpr u32 WATCHDOG = 11;
constexpr u32 BLOCK_THREADS = 384;
constexpr u32 CONSUMER_THREADS = CONSUMERS * LANES;
constexpr u32 CONSUMER_REGISTERS = 216;
constexpr u32 OTHER_REGISTERS = 72;
// The warps share what the block was launched with; asking for more would wait for ever.
static_assert(CONSUMER_REGISTERS * CONSUMER_THREADS + OTHER_REGISTERS * 128 <= 168 * BLOCK_THREADS);
constexpr u32 KEPT_REGISTERS = 128;  // of a consumer, for activations
constexpr u32 SUM_BUFFERS = 8;       // that a stage has at most
constexpr u32 AHEAD_BYTES = 256 << 10;  // that an SM brings into L2 behind what its ring holds
constexpr u32 AHEAD_CYCLES = 1600;      // from one piece of them to the next, twice what memory takes for it

#if __CUDA_ARCH__ >= 900
constexpr u32 FULL_ARRIVALS = 1;      // the loader's announcement; the bytes are counted beside it
constexpr u32 LOADER_LANES = 1;       // the copy engine needs no more
#else
constexpr u32 FULL_ARRIVALS = LANES;  // every lane's last cp.async
constexpr u32 LOADER_LANES = LANES;
#endif

// A warp's sums of an octet: of each slice a pair of neighbouring features of a row a lane.
typedef float2 WarpSums[SLICES][LANES];

struct Shared {
  u64 full[RING_SLOTS];         // weights are in the slot
  u64 empty[RING_SLOTS];        // all consumers have read it
  u64 ready;                    // the stage's inputs are there
  u64 done;                     // the consumers have finished the stage
  u64 scaled;                   // what normalizes the rows is there, where a tile is not all consumers'
  u64 sums_full[SUM_BUFFERS];
  u64 sums_empty[SUM_BUFFERS];
  u32 stage;                    // that control is in, of the step
  u32 loader_stage;
  u32 loader_steps;             // that the loader is through with, and with what it read of their rows
  u64 sent[2];                  // barriers, in turn: there is an errand for the watchdog
  u64 opened;                   // barrier: the step's rows are there, and dealt out (a phase a step with attention)
  u32 errands[2];               // in turn: RELEASE, LEAVE, or FORESEE plus the number of the stage that asks
  u32 crossings;                // of this launch: what the watchdog wants to see grow
  u32 step;                     // that control is in, of the launch
  u32 round;                    // of a choice by chance, from 1 on in each step; 0 outside of it
  u32 rounds;                   // of them that are over in this launch
  u32 sampled;                  // rows that are chosen by chance, a bit each
  u32 waiting[BLOCK_THREADS / LANES];  // what each warp waits for, or last had to wait for: a Role
  u32 token[STEP_ROWS];
  u32 position[STEP_ROWS];
  u32 sequence[STEP_ROWS];
  u32 first_row[STEP_ROWS];     // first row of the step that is of the row's sequence
  u32 logit_row[STEP_ROWS];
  u32 runs;                     // rows that are the first of their sequence, a bit each
  u32 steps;                    // steps of this launch, lowered by control when it ends early
  u32 rows, logit_rows;         // of a step of a round
  RoundSequence rounds_of[ROUND ? STEP_ROWS / 2 : 1];  // what becomes of the launch's sequences
  u16 places[ROUND ? STEP_ROWS : 1];            // the model's rows: 256 times the sequence, and which of its rows
  u16 pass_first[ROUND ? STEP_ROWS / 2 + 1 : 1];  // the first sequence of each pass of blocks
  u32 guesses[ROUND ? STEP_ROWS : 1];           // of this round, one sequence behind the other
  u32 pages[CONSUMERS];         // attention: of each warp's positions of the next unit, see `ask_page`
  alignas(16) u32 dealt[DEALS > 0 ? DEALS : 1][16];  // attention: the SM's units, see `Sweep::Dealt` and `Own`
  u32 dealt_for[DEALS > 0 ? DEALS : 1][STEP_ROWS];     // and the runs that they are of, see `deal_key`; 0 where none begins
  alignas(8) float row_sums[2][CONSUMERS][SLICE_ROWS];
  float row_scale[STEP_ROWS];   // that the sums of a row's products are multiplied by
};

enum Role : u32 {
  LOADER_SLOT = 1, CONSUMER_WEIGHTS = 2, CONSUMER_INPUTS = 3, CONSUMER_SUMS = 4, CONTROL_CONSUMERS = 5, CONTROL_SMS = 6,
  LOADER_ROUTES = 7, CONTROL_ROUTES = 8, CONTROL_WRITES = 9, LOADER_STEP = 10, CONTROL_LOADER = 11, LOADER_FORECAST = 12,
  CONSUMER_FORECAST = 13
};

// Kinds of steps of a round (round.cuh), in their order.
enum RoundStep : u32 { BLOCK_STEP, MODEL_STEP, INJECT_STEP };

struct Block {
  const LaunchArgs& args;
  Shared& shared;
  u8* ring;     // RING_SLOTS x SLOT_BYTES
  u8* scratch;  // sums of tiles, or the attention's work space
  u32 step;     // number of the step in the launch
  u32 number;   // of the stage in the step
  u32 layer;
  u32 rotation; // first tile of the next stage that belongs to this SM

  __device__ __forceinline__ void next_step() { ++step; }
  // Of a launch's steps: those that a round has; the round; which of its steps this is, and of which kind.
  __device__ __forceinline__ u32 round_steps() const { return args.block_passes + 2; }
  __device__ __forceinline__ u32 round() const { return ROUND ? step / round_steps() : step; }
  __device__ __forceinline__ u32 kind() const {
    if constexpr (!ROUND) return 0;
    const u32 part = step % round_steps();
    return part < args.block_passes ? 0 : part - args.block_passes + 1;
  }

  // Rows of the step, and those whose logits are wanted. Of a round they differ from step to step.
  __device__ __forceinline__ u32 rows() const {
    if constexpr (ROUND) return shared.rows;
    else return args.rows;
  }
  __device__ __forceinline__ u32 logit_rows() const {
    if constexpr (ROUND) return shared.logit_rows;
    else return args.logit_rows;
  }

  __device__ __forceinline__ Sync& sync() const { return *reinterpret_cast<Sync*>(args.sync); }
  // Buffer of a tile's sums, of so many warps.
  __device__ __forceinline__ WarpSums* sums(u32 buffer, u32 warps) const { return reinterpret_cast<WarpSums*>(scratch) + buffer * warps; }

  // Whether any of the warp's words, of which this is each lane's largest, is late, so that they are to be asked for again.
  __device__ __forceinline__ bool late(u32 word) const {
    if (!__any_sync(~0u, word == LATE)) return false;
    shared.waiting[anew(warp_id())] = CONSUMER_INPUTS;
    return true;
  }

  // Tiles of a stage are dealt out round robin, and the next stage goes on where this one stopped, so
  // that every SM streams the same number of tiles, give or take one, over the whole step.
  __device__ __forceinline__ u32 first_tile() const { return rotation; }
  // It divides, so nobody does this between his last tile and saying so.
  __device__ __forceinline__ void pass_tiles(u32 tiles) {
    const u32 next = rotation + gridDim.x - tiles % gridDim.x;
    rotation = anew(next >= gridDim.x ? next - gridDim.x : next);
  }
};

// What control sends the watchdog for.
enum Errand : u32 { RELEASE, LEAVE, FORESEE };

// Waits until the phase of this parity is over; a whole warp. Lanes may see the end at different tries,
// and what follows (tensor-core products, shuffles) needs all of them together: the vote joins them.
// The watchdog is told what for, unless there is nothing to wait for. There are a hundred waits, and a layer's
// instructions should stay in the SM's cache, so that a wait itself is as short as can be.
__device__ __forceinline__ void barrier_wait(const Block& b, u64* barrier, u32 parity, Role role) {
#pragma unroll 1
  while (!__all_sync(~0u, barrier_try(barrier, parity))) b.shared.waiting[anew(warp_id())] = role;
}

// All consumer warps, and no other.
__device__ __forceinline__ void consumers_sync() { block_barrier<CONSUMER_THREADS>(1); }

// ---- The loader ------------------------------------------------------------------------------

// One lane, or all of the warp where lanes copy.
struct Loader : Block {
  __device__ __forceinline__ explicit Loader(const Block& b) : Block(b) {}
  u32 slot = 0;
  u32 parity = 1;   // a fresh barrier counts as if the phase before its first were over
  u32 most = 1;     // pieces that may be on their way at once
  u32 most_here = 1;  // the same, when the consumers have come to the stage
  u32 routes_parity = 0;
  u32 forecasts = 0;  // that were waited for in this launch
  u32 opened = 0;   // the step whose beginning was waited for last, plus one
  u32 opened_parity = 0;
  // This SM's weights of the stage, tiles of so many bytes that are gridDim.x tiles apart: how many of their bytes have
  // gone to the ring, and how many were asked for, there or in L2.
  const u8* tape = nullptr;
  u32 tile_bytes = 1;
  u32 position = 0, asked = 0, end = 0;
  u32 asked_at = 0;   // when that was, in cycles

  // The loader's lanes stay together.
  __device__ __forceinline__ static bool all(bool v) { return LOADER_LANES == 1 ? v : __all_sync(~0u, v); }
  __device__ __forceinline__ void wait(u64* barrier, u32 parity, Role role) const {
    shared.waiting[LOADER] = role;
#pragma unroll 1
    while (!all(barrier_try(barrier, parity))) {}
  }

  __device__ __forceinline__ void next_stage() {
    if (lane_id() == 0) ++shared.loader_stage;
  }
  __device__ __forceinline__ void next_step() {
    ++step;
    if (LOADER_LANES > 1) __syncwarp();  // all lanes have read
    if (lane_id() == 0) {
      shared.loader_stage = first_stage(kind());
      shared_release(&shared.loader_steps, step);
    }
  }

  // Whether there is such a step, as far as control has said. It may lower the number at any time.
  __device__ __forceinline__ bool more() const { return all(step < *(volatile u32*)&shared.steps); }

  // False if the launch ended while waiting: nobody will end the phase any more.
  __device__ __forceinline__ bool wait_unless_ended(u64* barrier, u32 parity, Role role) {
    shared.waiting[LOADER] = role;
#pragma unroll 1
    while (!all(barrier_try(barrier, parity))) {
      if (!more()) return false;
    }
    return true;
  }

  // Begins a stage of pieces of about so many bytes. What is on its way delays every other access of the chip: sums, rows,
  // the crossing itself. So it is as little as the memory's rate needs, or a little more for codes. But consumers that have
  // come to the stage, and are faster than memory (`halves`: nothing has to be widened), wait for nothing else: there,
  // three times as much keeps memory busy. Its tiles lie from `from` on, and `tiles` of them are this SM's; without any,
  // nothing is asked for ahead.
  __device__ __forceinline__ void begin_tape(bool halves, u32 piece_bytes, const u8* from, u32 bytes, u32 tiles) {
    auto pieces = [&](u32 wanted) { return least(max((wanted + piece_bytes - 1) / piece_bytes, 1u), RING_SLOTS); };
    most_here = pieces(halves ? args.in_flight * 3 : args.in_flight * 3 / 2);
    most = halves ? pieces(args.in_flight) : most_here;
    tape = from;
    tile_bytes = bytes;
    position = asked = 0;
    end = tiles * bytes;
  }
  // Whether the consumers have come to the stage that is streamed. Control may go on at any time: this says
  // only what is best for now.
  __device__ __forceinline__ bool here() const { return !all(*(volatile u32*)&shared.stage != number); }
  // Brings what comes next into L2, at half of the memory's rate. False if there is nothing more to be asked for.
  __device__ __forceinline__ bool look_ahead() {
    if (asked < position) asked = position;
    if (asked >= end || asked >= position + AHEAD_BYTES) return false;
    const u32 now = cycles();
    if (!all(now - asked_at >= AHEAD_CYCLES)) return true;
    asked_at = now;
    const u32 tile = asked / tile_bytes, at = asked % tile_bytes, bytes = least(tile_bytes - at, SLOT_BYTES);
    if (lane_id() == 0) prefetch_bulk(tape + (u64)tile * gridDim.x * tile_bytes + at, bytes);
    asked += bytes;
    return true;
  }
  // While the ring is full because the consumers are in an earlier stage, memory has nothing to do.
  __device__ __forceinline__ bool wait_empty() {
    shared.waiting[LOADER] = LOADER_SLOT;
    bool ahead = position < end;
#pragma unroll 1
    while (!all(ahead ? barrier_test(&shared.empty[slot], parity) : barrier_try(&shared.empty[slot], parity))) {
      if (!more()) return false;
      ahead = ahead && !here() && look_ahead();
    }
    return true;
  }
  // The consumers have chosen the layer's experts.
  __device__ __forceinline__ bool wait_routes(u64* routed) {
    const bool there = wait_unless_ended(routed, routes_parity, LOADER_ROUTES);
    routes_parity ^= 1;
    return there;
  }
  // The layer's experts are foreseen.
  __device__ __forceinline__ bool wait_forecast(u64* foreseen) {
    return wait_unless_ended(foreseen, forecasts++ & 1, LOADER_FORECAST);
  }

  // The rows of this step are there, how attention is dealt out, and what was written before it is in sight of the copy
  // engine. Every step with attention waits, once.
  __device__ __forceinline__ bool wait_step() {
    if (opened == step + 1) return true;
    opened = step + 1;
    if (!wait_unless_ended(&shared.opened, opened_parity, LOADER_STEP)) return false;
    opened_parity ^= 1;
    copies_see_writes();
    return true;
  }

  // Streams one piece of at most SLOT_BYTES; or two of half as many that share a slot, if there is a second one (`also`).
  // A piece of codes is short, and all that is done for it one lane does: so both barriers are looked at together, and what
  // a wait needs beside that is done by those that have to wait.
  __device__ __forceinline__ bool piece(const u8* from, u32 bytes, const u8* also = nullptr) {
    if (most != most_here && here()) most = most_here;
    // The piece before so many: it has to be there. In front of the first ones its barrier is as if it were.
    const bool wraps = slot < most;
    u64* const before = &shared.full[wraps ? slot + RING_SLOTS - most : slot - most];
    const u32 before_parity = parity ^ (u32)!wraps;
    const bool empty = barrier_test(&shared.empty[slot], parity), arrived = barrier_test(before, before_parity);
    if (!all(empty) && !wait_empty()) return false;
    if (!all(arrived)) wait(before, before_parity, CONSUMER_WEIGHTS);
    position += bytes;
#if __CUDA_ARCH__ >= 900
    if (lane_id() == 0) {
      barrier_arrive_expect(&shared.full[slot], also ? 2 * bytes : bytes);
      bulk_copy(ring + slot * SLOT_BYTES, from, bytes, &shared.full[slot]);
      if (also) bulk_copy(ring + slot * SLOT_BYTES + bytes, also, bytes, &shared.full[slot]);
    }
#else
    for (u32 at = lane_id() * 16; at < bytes; at += LANES * 16) {
      copy_piece(ring + slot * SLOT_BYTES + at, from + at);
      if (also) copy_piece(ring + slot * SLOT_BYTES + bytes + at, also + at);
    }
    copy_arrive(&shared.full[slot]);
#endif
    if (++slot == RING_SLOTS) { slot = 0; parity ^= 1; }
    return true;
  }

  // Waits for the copies that nobody will read, so that none writes into memory that is no longer ours.
  __device__ __forceinline__ void drain() {
    // A slot's barrier is in a phase of the other parity than the loader's when it was filled last.
#pragma unroll 1
    for (u32 s = 0; s < RING_SLOTS; ++s) wait(&shared.full[s], s < slot ? parity ^ 1 : parity, CONSUMER_WEIGHTS);
  }
};

// ---- The consumers ---------------------------------------------------------------------------

struct Consumer : Block {
  __device__ __forceinline__ explicit Consumer(const Block& b) : Block(b) {}
  u32 slot = 0;
  u32 parity = 0;
  u32 sum_buffer = 0;
  u32 sum_parities = (1u << SUM_BUFFERS) - 1;  // a bit a buffer
  u32 ready_parity = 0;

  // Control has read the sums of all stages before: buffers are counted anew. A step's first stage is waited for with the
  // step; only an inject's is a product, which would wait again.
  __device__ __forceinline__ void wait_inputs() {
    if (ROUND && number == first_stage(INJECT_STEP)) return;
    barrier_wait(*this, &shared.ready, ready_parity, CONSUMER_INPUTS);
    ready_parity ^= 1;
    sum_buffer = 0;
  }
  __device__ __forceinline__ const u8* wait_slot() {
    barrier_wait(*this, &shared.full[slot], parity, CONSUMER_WEIGHTS);
    return ring + slot * SLOT_BYTES;
  }
  // The slot that is `ahead` of the next one.
  __device__ __forceinline__ const u8* wait_slot(u32 ahead) {
    const bool wraps = slot + ahead >= RING_SLOTS;
    const u32 at = wraps ? slot + ahead - RING_SLOTS : slot + ahead;
    barrier_wait(*this, &shared.full[at], parity ^ (u32)wraps, CONSUMER_WEIGHTS);
    return ring + at * SLOT_BYTES;
  }
  // All of the next slots, a lane each at most, by one look at them.
  __device__ __forceinline__ void wait_slots(u32 count) {
    const u32 lane = anew(lane_id());
    const bool wraps = slot + lane >= RING_SLOTS, none = lane >= count;
    u64* const full = &shared.full[none ? slot : wraps ? slot + lane - RING_SLOTS : slot + lane];
#pragma unroll 1
    while (!__all_sync(~0u, none || barrier_try(full, parity ^ (u32)wraps))) shared.waiting[anew(warp_id())] = CONSUMER_WEIGHTS;
  }
  __device__ __forceinline__ const u8* slot_ahead(u32 ahead) const {
    return ring + (slot + ahead >= RING_SLOTS ? slot + ahead - RING_SLOTS : slot + ahead) * SLOT_BYTES;
  }
  // Gives a slot back whose loads have arrived in registers: `read` has bits of each of them. They take
  // part in the address, as nothing (`zero` is 0, which the compiler cannot know), so that the arrival
  // waits for them. Left alone it is issued right behind the loads, and the copy engine, whose writes are
  // not ordered with them, overwrites what they have not read yet. A slot that only one of `teams` reads
  // still counts an arrival for every consumer.
  __device__ __forceinline__ void release_slot(u32 read, u32 teams) {
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(&shared.empty[slot] + (read & args.zero), teams);
    if (++slot == RING_SLOTS) { slot = 0; parity ^= 1; }
  }
  // One that other warps read; it was filled, so that this warp cannot mistake its next phase for this one.
  __device__ __forceinline__ void pass_slot() {
    wait_slot();
    release_slot(0, 1);
  }
  // Those ahead are given back one by one, and passed together.
  __device__ __forceinline__ void release_slot(u32 ahead, u32 read, u32 teams) {
    const u32 at = slot + ahead >= RING_SLOTS ? slot + ahead - RING_SLOTS : slot + ahead;
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(&shared.empty[at] + (read & args.zero), teams);
  }
  __device__ __forceinline__ void pass_slots(u32 count) {
    slot += count;
    if (slot >= RING_SLOTS) { slot -= RING_SLOTS; parity ^= 1; }
  }
  // Gives back slots that were waited for together.
  __device__ __forceinline__ void give_back(u32 count, u32 read) {
    const u32 lane = anew(lane_id());
    __syncwarp();
    if (lane < count) barrier_arrive(&shared.empty[slot + lane >= RING_SLOTS ? slot + lane - RING_SLOTS : slot + lane] + (read & args.zero), 1);
    pass_slots(count);
  }
  // A buffer of sums is free.
  __device__ __forceinline__ void wait_sums(u32 buffer) {
    barrier_wait(*this, &shared.sums_empty[buffer], sum_parities >> buffer & 1, CONSUMER_SUMS);
  }
  // That of the next tile.
  __device__ __forceinline__ void wait_sums() { wait_sums(sum_buffer); }
  // A tile's first slots, of which each is `apart` behind the one before, and the buffer of its sums, by one look at all of
  // them: an answer takes longer than what is done with it, and mostly all are there. The buffer is asked for first: without
  // it, what is said of the slots may be of a phase too early (`Sums`), and does not count.
  template <u32 SLOTS> __device__ __forceinline__ void wait_tile(const u8* (&at)[SLOTS], u32 apart) {
    u64* full[SLOTS];
    u32 parities[SLOTS];
#pragma unroll
    for (u32 n = 0; n < SLOTS; ++n) {
      const bool wraps = slot + n * apart >= RING_SLOTS;
      const u32 number = wraps ? slot + n * apart - RING_SLOTS : slot + n * apart;
      full[n] = &shared.full[number];
      parities[n] = parity ^ (u32)wraps;
      at[n] = ring + number * SLOT_BYTES;
    }
#pragma unroll 1
    for (;;) {
      const bool sums = barrier_try(&shared.sums_empty[sum_buffer], sum_parities >> sum_buffer & 1);
      bool weights = true;
#pragma unroll
      for (u32 n = 0; n < SLOTS; ++n) weights &= barrier_try(full[n], parities[n]);
      if (__all_sync(~0u, sums & weights)) return;
      shared.waiting[anew(warp_id())] = sums ? CONSUMER_WEIGHTS : CONSUMER_SUMS;
    }
  }
  // This warp's sums of the tile are stored. It arrives for the warps of the other `groups` as well, which skip the tile.
  __device__ __forceinline__ void pass_sums(u32 buffers, u32 groups) {
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(&shared.sums_full[sum_buffer], groups);
    next_sums(buffers);
  }
  __device__ __forceinline__ void next_sums(u32 buffers) {
    sum_parities ^= 1u << sum_buffer;
    if (++sum_buffer == buffers) sum_buffer = 0;
  }
  // Gives the next slots back. All that this warp read of them is in sums that it has stored: so no load is still on its
  // way (see `release_slot`).
  template <u32 SLOTS> __device__ __forceinline__ void release_slots(u32 teams) {
    __syncwarp();
    if (lane_id() == 0) arrive_empty<SLOTS>(teams);
    pass_slots(SLOTS);
  }
  template <u32 SLOTS> __device__ __forceinline__ void arrive_empty(u32 teams) {
#pragma unroll
    for (u32 n = 0; n < SLOTS; ++n) barrier_arrive(&shared.empty[slot + n >= RING_SLOTS ? slot + n - RING_SLOTS : slot + n], teams);
  }
  // The same of a whole tile's slots, with its sums.
  template <u32 SLOTS> __device__ __forceinline__ void pass_tile(u32 buffers, u32 teams, u32 groups) {
    __syncwarp();
    if (lane_id() == 0) {
      arrive_empty<SLOTS>(teams);
      barrier_arrive(&shared.sums_full[sum_buffer], groups);
    }
    pass_slots(SLOTS);
    next_sums(buffers);
  }
  // The next tiles, at most as many as there are buffers, are other warps'.
  __device__ __forceinline__ void skip_sums(u32 count, u32 buffers) {
    const u32 passed = ((1u << count) - 1) << sum_buffer;
    sum_parities ^= (passed | passed >> buffers) & ((1u << buffers) - 1);
    sum_buffer += count;
    if (sum_buffer >= buffers) sum_buffer -= buffers;
  }
  // What this warp has of `row_scale` is there, for tiles that not all consumers arrive at.
  __device__ __forceinline__ void pass_scales() {
    if (lane_id() == 0) barrier_arrive(&shared.scaled);
  }
  // All that this warp reads and writes in the stage is read and written.
  __device__ __forceinline__ void finish_stage() {
    __syncwarp();
    if (lane_id() == 0) barrier_arrive(&shared.done);
  }
};

// ---- Control ---------------------------------------------------------------------------------

struct Control;
// Deals out the units of attention, for each kind of layers; gives whether the step has any. Of the generated text.
__device__ __forceinline__ bool deal_caches(Control& b);

struct Control : Block {
  __device__ __forceinline__ explicit Control(const Block& b, bool second) : Block(b), second(second) {}
  const bool second;       // the warp that runs epilogues and deals attention out, and waits for no SM
  u32 sum_buffer = 0;
  u32 sum_parities = 0;    // a bit a buffer, and the last one for `scaled`
  u32 routes_parity = 0;
  u32 crossings = 0;       // of this launch; `done` and `ready` have a phase for each
  u32 checked = 0;         // of these
  u32 turn = 0;            // of the next errand
  bool settled = true;     // what all SMs wrote in front of the last crossing is in sight

  // Nanoseconds at which this SM began to wait for a stage, could start it, and had its part written.
  __device__ __forceinline__ u64* trace_row() const {
    return args.trace + ((u64)blockIdx.x * STAGES + shared.stage) * 3;
  }

  // Lets the consumers and the second start a stage.
  __device__ __forceinline__ void open_stage() {
    if (!second) {
      __syncwarp();  // lane 0 acquired for all lanes
      if (lane_id() == 0) barrier_arrive(&shared.ready);
    }
    join_stage();
  }
  // The stage was opened, by `cross` if it is not a step's first.
  __device__ __forceinline__ void join_stage() {
    sum_buffer = 0;
    if (second) barrier_wait(*this, &shared.ready, crossings & 1, CONSUMER_INPUTS);
  }

  // The next tile's sums are there.
  __device__ __forceinline__ void wait_sums() {
    barrier_wait(*this, &shared.sums_full[sum_buffer], sum_parities >> sum_buffer & 1, CONTROL_CONSUMERS);
  }
  // Tiles are passed by both warps, whoever has read the sums.
  __device__ __forceinline__ void pass_sums(u32 buffers) {
    __syncwarp();  // all lanes have read
    if (lane_id() == 0) barrier_arrive(&shared.sums_empty[sum_buffer]);
    sum_parities ^= 1u << sum_buffer;
    if (++sum_buffer == buffers) sum_buffer = 0;
  }

  // All consumers have written what normalizes the rows.
  __device__ __forceinline__ void wait_scales() {
    barrier_wait(*this, &shared.scaled, sum_parities >> 31, CONTROL_CONSUMERS);
    sum_parities ^= 1u << 31;
  }

  // The consumers have chosen the layer's experts.
  __device__ __forceinline__ void wait_routes(u64* routed) {
    barrier_wait(*this, routed, routes_parity, CONTROL_ROUTES);
    routes_parity ^= 1;
  }

  // Which rows begin sequences, and what attention has for this SM. The second has nothing else to do when a step begins.
  __device__ __forceinline__ void open_caches() {
    const u32 row = lane_id();
    const bool first = row < rows() && shared.first_row[row] == row;
    const u32 runs = __ballot_sync(~0u, first);
    if (row == 0) shared.runs = runs;
    __syncwarp();
    const bool any = deal_caches(*this);
    __syncwarp();
    if (any && row == 0) barrier_arrive(&shared.opened);
  }

  // The loader is through with the step: rows, and how attention is dealt out, may change. All that it streamed was
  // multiplied, so it is mostly in the next step already; but on an SM without tiles it may be behind. (It may also be ahead
  // by more steps than a barrier has phases.)
  __device__ __forceinline__ void wait_loader() const {
#pragma unroll 1
    while (!__all_sync(~0u, shared_acquire(&shared.loader_steps) > step)) shared.waiting[anew(warp_id())] = CONTROL_LOADER;
  }

  // The beginning of a step: its tokens lie in shared memory, or there is no such step.
  __device__ __forceinline__ void open_step() {
    if (lane_id() == 0 && !second) {
      shared.stage = first_stage(kind());
      shared.step = step;
      // There may be no such step: the times of the last one stay.
      if (args.trace && step < *(volatile u32*)&shared.steps) trace_row()[0] = trace_row()[1] = global_timer();
    }
    open_stage();
    // The second has no part in a choice by chance but its crossings.
#pragma unroll 1
    while (second && *(volatile u32*)&shared.round != 0) {
      cross();
      open_stage();
    }
    if (second) open_caches();
  }

  // Of one lane. An errand may follow while the one before is done, but the next but one does not: whatever is released has
  // been when control comes to the next crossing's results, and a forecast when the stage that it is for ends.
  __device__ __forceinline__ void send(u32 errand) {
    *(volatile u32*)&shared.errands[turn] = errand;
    barrier_arrive(&shared.sent[turn]);
    turn ^= 1;
  }

  // This was the last step.
  __device__ __forceinline__ void leave() {
    if (lane_id() == 0 && !second) send(LEAVE);
  }

  // Behind the head's crossing: rounds, until no row asks for another. All SMs come to the same: who asks
  // does so in front of a crossing.
  __device__ __forceinline__ void choose_by_chance() {
    u32 round = 0;
    if (lane_id() == 0) shared.stage = STAGES;  // behind all others, also where steps of another kind follow
    do {
      if (lane_id() == 0) *(volatile u32*)&shared.round = ++round;
      open_stage();
      cross();
      if (lane_id() == 0) ++shared.rounds;
      __syncwarp();
    } while (load_relaxed(&sync().rounds) > *(volatile u32*)&shared.rounds);
    if (lane_id() == 0) *(volatile u32*)&shared.round = 0;
  }

  // Until all SMs have released what they wrote in front of the last crossing; lane 0 acquires it.
  __device__ __forceinline__ void wait_arrived() {
    const u32 expected = crossings * gridDim.x;
#pragma unroll 1
    while ((int)(load_acquire(&sync().arrived) - expected) < 0) {}
  }

  // In front of the results of stage n, which may read what the stage before wrote, and write what stages before
  // that read. Clears this SM's share of the mailboxes that nobody reads any more.
  __device__ __forceinline__ void settle(u32 n) {
    if constexpr (MAILBOXES == 0) return;
    if (!settled) {
      if (lane_id() == 0) {
        shared.waiting[warp_id()] = CONTROL_WRITES;
        wait_arrived();
      }
      __syncwarp();
      settled = true;
    }
    if (second) return;
#pragma unroll 1
    for (u32 left = STAGE_CLEARS[n]; left != 0; left &= left - 1) {
      const u32 box = __ffs(left) - 1, count = MAILBOX_OCTETS[box] ? (rows() + SLICE_ROWS - 1) / SLICE_ROWS * SLICE_ROWS : rows();
      const u32 bytes = MAILBOX_ROW_BYTES[box] * count;
      u8* const mailbox = args.arena + MAILBOX_AT[box];
#pragma unroll 1
      for (u32 at = (blockIdx.x * LANES + lane_id()) * 16; at < bytes; at += gridDim.x * (LANES * 16)) {
        store4_relaxed(reinterpret_cast<u32*>(mailbox + at), LATE);
      }
    }
  }

  // So many SMs may still be on their way to a checked crossing: what is asked for comes back when most of them have come,
  // and whatever is late is asked for again. That is more work the more rows there are. (Tried: from none to half of them.)
  // Behind attention of one row most SMs have nothing to do, and come at once: they say nothing about the others.
  __device__ __forceinline__ u32 stragglers(bool few) const { return rows() == 1 && !few ? gridDim.x / 2 : gridDim.x / 6; }

  // What this SM makes in the stage is written: says so, and waits for the other SMs. Lane 0 releases
  // what all lanes wrote (ordered by __syncwarp) and what the consumers wrote (ordered by `done`); behind a
  // checked crossing the watchdog's does, which this warp's arrival comes before. If there is a stage of the same step
  // behind it (`more`), lane 0 opens it at once, ordered behind what it has acquired: the others of the warp follow.
  __device__ __forceinline__ void cross(u32 checking = 0, bool more = false) {
    const bool check = MAILBOXES > 0 && checking != 0;
    settled = !check;
    if (second) {
      ++crossings;
      __syncwarp();
      if (lane_id() == 0) barrier_arrive(&shared.done);
      return;
    }
    barrier_wait(*this, &shared.done, crossings & 1, CONTROL_CONSUMERS);
    ++crossings;
    __syncwarp();
    checked += check;
    if (lane_id() == 0) {
      if (check) {
        add_relaxed(&sync().hints, 1);
        send(RELEASE);
      } else {
        add_release(&sync().arrived, 1);
      }
      const u64 finished = args.trace ? global_timer() : 0;
      shared.waiting[CONTROL] = CONTROL_SMS;
      if (check) {
        const u32 expected = checked * gridDim.x - stragglers(checking == 2);
#pragma unroll 1
        while (!hinted(&sync().hints, expected)) {}
      } else {
        wait_arrived();
      }
      if (more) barrier_arrive(&shared.ready);
      shared.crossings = crossings;
      if (args.trace && shared.stage < STAGES) {  // a choice by chance has no times
        trace_row()[2] = finished;
        if (shared.stage + 1 < STAGES) {
          trace_row()[3] = finished;          // the next stage's row follows
          trace_row()[4] = global_timer();
        }
      }
      shared.stage = least(shared.stage + 1, STAGES);  // that of all rounds
    }
    __syncwarp();
  }
};

// ---- The watchdog ----------------------------------------------------------------------------

// Leaves a record of who waited for what in the host's memory and ends the launch. The first SM that
// gives up writes it; the others wait long enough for it to get there.
__device__ __forceinline__ void give_up(const Block& b, u32 role, u32 seen, u32 expected) {
  const LaunchArgs& args = b.args;
  const volatile Shared& shared = b.shared;
  if (atomicExch(&b.sync().stalled, 1u) == 0) {
    store_host(args.stall + 1, role == LOADER_SLOT || role == LOADER_ROUTES || role == LOADER_FORECAST ? shared.loader_stage : shared.stage);
    store_host(args.stall + 2, blockIdx.x);
    store_host(args.stall + 3, role);
    store_host(args.stall + 4, seen);
    store_host(args.stall + 5, expected);
    store_host(args.stall + 6, shared.step);
    store_host(args.stall + 0, 1u);
    __threadfence_system();
  } else {
    for (u64 start = global_timer(); global_timer() - start < 1000000;) {}
  }
  trap();
}

// Makes the forecast that a stage's product asks for. Of the generated text.
__device__ __forceinline__ void foresee_experts(const Block& b, u32 stage);

// Looks on until control has left, and does its errands, which come by two barriers in turn, so that no phase of them is
// missed (`Control::send`). If this SM passes no crossing for as long as the host has patience, it is stuck, or another one is.
// That one should speak: whoever waits for other SMs is a quarter more patient.
__device__ __forceinline__ void watch(const Block& b) {
  // Only a forecast is more than a lane's work.
  if (!FORESEES && lane_id() != 0) return;
  const volatile Shared& shared = b.shared;
  u32 seen = 0;
  u64 since = global_timer();
  u32 errands = 0;  // that are done
#pragma unroll 1
  for (;;) {
    const u32 turn = errands & 1;
    // By all lanes: one of several would not be put to sleep meanwhile.
    bool sent = barrier_try(&b.shared.sent[turn], errands >> 1 & 1);
    if constexpr (FORESEES) sent = __all_sync(~0u, sent);
    if (sent) {
      const u32 errand = shared.errands[turn];
      if (errand == LEAVE) return;
      if (FORESEES && errand >= FORESEE) foresee_experts(b, errand - FORESEE);
      else if (lane_id() == 0) add_release(&b.sync().arrived, 1);
      ++errands;
    }
    if (lane_id() != 0) continue;
    const u32 crossings = shared.crossings;
    const u64 now = global_timer();
    if (crossings != seen) { seen = crossings; since = now; }
    u32 role = shared.waiting[CONTROL];
    const bool others = role == CONTROL_SMS || role == CONTROL_WRITES;
    if (now - since <= b.args.patience_ns + (others ? b.args.patience_ns / 4 : 0)) continue;
    if (others) give_up(b, role, load_acquire(&b.sync().arrived), (crossings + (role == CONTROL_SMS)) * gridDim.x);
    // What control waits for is the consumers' work, and what they wait for may be the loader's; but a loader that has gone on
    // to the next step and waits for that holds nobody up.
    if (role != CONTROL_LOADER && shared.waiting[0] != 0) role = shared.waiting[0];
    const u32 loader = shared.waiting[LOADER];
    if (role == CONSUMER_WEIGHTS && (loader == LOADER_ROUTES || loader == LOADER_FORECAST)) role = loader;
    give_up(b, role, 0, 1);
  }
}
