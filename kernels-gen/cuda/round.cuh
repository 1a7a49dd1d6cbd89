// Rounds of a draft, many in a launch. A round is three kinds of steps: the draft's blocks guess the tokens behind the
// last one of each sequence, as many blocks a pass as fit, and as many passes as that takes; the model's step has a row
// for each last token and for each guess; and what the model chose becomes the draft's context. Between the steps control
// writes the next one's rows into shared memory, every SM for itself and to the same result. How many rows each step has
// does not change while the launch runs; it ends behind the round in which a sequence ends or has no room for another.
//
// All rows of the model's step go into the draft's cache. Those of wrong guesses lie behind the sequence's end, where
// the next block writes over them.
//
// The generated text defines VOCAB and MASK_TOKEN.

__device__ __forceinline__ u32 place_sequence(u32 place) { return place >> 8; }
__device__ __forceinline__ u32 place_row(u32 place) { return place & 255; }
// A row that the step does not have; none of a sequence's.
constexpr u32 NO_PLACE = 0xffff;

// A row of the next step, of which a lane has one: unused if it is none of a sequence's.
__device__ __forceinline__ void set_row(Shared& shared, u32 row, u32 place, u32 rows, u32 token) {
  const bool used = place != NO_PLACE;
  const RoundSequence& of = shared.rounds_of[used ? place_sequence(place) : 0];
  shared.token[row] = used ? token : 0;
  shared.position[row] = used ? of.position + place_row(place) : 0;
  shared.sequence[row] = used ? of.sequence : ~0u;
  shared.first_row[row] = used ? row - place_row(place) : rows;
}

// The rows of a pass of blocks: of each its last token and masks.
__device__ __forceinline__ void block_rows(Control& b, u32 pass) {
  Shared& shared = b.shared;
  const u32 row = lane_id();
  u32 place = NO_PLACE, token = 0, rows = 0, guesses = 0;
#pragma unroll 1
  for (u32 i = shared.pass_first[pass]; i < shared.pass_first[pass + 1]; ++i) {
    const RoundSequence& of = shared.rounds_of[i];
    const u32 own = row - rows;
    if (row >= rows && own < of.rows) {
      place = i << 8 | own;
      token = own == 0 ? of.token : MASK_TOKEN;
      if (own >= 1 && own <= of.guesses) shared.logit_row[guesses + own - 1] = row;
    }
    rows += of.rows;
    guesses += of.guesses;
  }
  if (row < STEP_ROWS) set_row(shared, row, place, rows, token);
  if (row == 0) {
    shared.rows = rows;
    shared.logit_rows = guesses;
  }
  __syncwarp();
}

// What a pass of blocks guessed. What is no token is guessed as token 0.
__device__ __forceinline__ void keep_guesses(Control& b, u32 pass, u32 guess) {
  Shared& shared = b.shared;
  // The model's rows in front of the pass's, without the first of each sequence.
  const u32 sequence = shared.pass_first[pass], first = shared.rounds_of[sequence].first_row - sequence;
  if (lane_id() < shared.logit_rows) shared.guesses[first + lane_id()] = guess < VOCAB ? guess : 0;
  __syncwarp();
}

// The rows of the model: the last token, and what was guessed.
__device__ __forceinline__ void model_rows(Control& b) {
  Shared& shared = b.shared;
  const u32 row = lane_id();
  if (row < STEP_ROWS) {
    const u32 place = shared.places[row];
    const bool used = place != NO_PLACE, guess = used && place_row(place) != 0;
    const u32 last = shared.rounds_of[used ? place_sequence(place) : 0].token;
    set_row(shared, row, place, b.args.rows, guess ? shared.guesses[row - place_sequence(place) - 1] : last);
    shared.logit_row[row] = used ? row : 0;
  }
  if (row == 0) shared.rows = shared.logit_rows = b.args.rows;
  __syncwarp();
}

// Tokens that so many rounds add if it is said how many.
__device__ __forceinline__ u32 due(u32 accept, u32 rounds) { return (accept * rounds + 500) / 1000; }

// What the model chose: each sequence takes tokens up to the first guess that was wrong, a stop token, or its last one.
// The rows stay, for the draft's context: their taps lie where it is made of them.
__device__ __forceinline__ void take_choices(Control& b, u32 token, bool halted) {
  Shared& shared = b.shared;
  const LaunchArgs& args = b.args;
  const u32 row = lane_id(), place = row < STEP_ROWS ? shared.places[row] : NO_PLACE, round = b.round();
  const bool used = place != NO_PLACE;
  const u32 own = place_row(place), first = row - own;
  RoundSequence& of = shared.rounds_of[used ? place_sequence(place) : 0];
  const u32 left = of.left;
  bool hit = used && own < of.guesses && token == shared.token[least(row + 1, STEP_ROWS - 1)];
  if (args.accept != 0) hit = used && own < of.guesses && own + 1 < due(args.accept, round + 1) - due(args.accept, round);
  bool stop = token >= NO_TOKEN || own + 1 >= left;
  for (u32 i = 0; i < args.stop_count; ++i) stop |= token == args.stop_tokens[i];
  const u32 hits = __ballot_sync(~0u, hit), ends = __ballot_sync(~0u, used && (!hit || stop));
  const u32 taken = used ? __ffs(ends >> first) : 0;  // the last row of a sequence is always an end
  if (used && blockIdx.x == 0) {
    u32* const to = args.chosen + round * (2 * LAUNCH_ROWS);
    if (own < taken) tell_host(to + LAUNCH_ROWS + row, token + 1);
    if (own == 0) tell_host(to + place_sequence(place), taken | __popc(hits >> first & ((2u << (taken - 1)) - 1)) << 8);
  }
  // The sequence's last new token.
  const bool last = used && own + 1 == taken;
  bool over = last && stop;
  __syncwarp();  // all have read
  if (last) {
    of.token = token;
    of.position += taken;
    of.left = left - taken;
    over |= of.position + max(of.rows, of.guesses + 1) > of.limit;
  }
  if (__any_sync(~0u, over) || halted) {
    if (row == 0) *(volatile u32*)&shared.steps = b.step + 2;  // the context is made in any case
  }
  if (row == 0) shared.logit_rows = 0;
  __syncwarp();
}

// Behind a step: the rows of the next one.
__device__ __forceinline__ void choose_round(Control& b) {
  if (b.second) {
    b.next_step();
    return;
  }
  const u32 row = lane_id(), kind = b.kind();
  u32 token = 0;
  const bool halted = *(volatile u32*)&b.sync().halted != 0;
  if (row < STEP_ROWS) {
    token = ~(u32)load_relaxed(&b.sync().best[b.step % 3][row]);
    // Two steps on, this cell is used again; until then every SM has passed more crossings.
    if (blockIdx.x == 0) b.sync().best[(b.step + 2) % 3][row] = 0;
  }
  if (kind == BLOCK_STEP) {
    const u32 pass = b.step % b.round_steps();
    keep_guesses(b, pass, token);
    if (pass + 1 < b.args.block_passes) block_rows(b, pass + 1);
    else model_rows(b);
  } else if (kind == MODEL_STEP) {
    take_choices(b, token, halted);
  } else {
    block_rows(b, 0);
  }
  b.next_step();
}

// The launch's sequences, into shared memory, and the rows of their first blocks.
__device__ __forceinline__ void take_sequences(Control& b) {
  Shared& shared = b.shared;
  const u32 lane = lane_id();
  if (lane < b.args.round_sequences) shared.rounds_of[lane] = b.args.round[lane];
  if (lane < STEP_ROWS) shared.places[lane] = NO_PLACE;
  __syncwarp();
  // A pass has as many blocks as fit; none is cut.
  u32 passes = 0, rows = STEP_ROWS;
  for (u32 i = 0; i < b.args.round_sequences; ++i) {
    const RoundSequence& of = shared.rounds_of[i];
    if (rows + of.rows > STEP_ROWS) {
      if (lane == 0) shared.pass_first[passes] = i;
      ++passes;
      rows = 0;
    }
    rows += of.rows;
    if (lane <= of.guesses) shared.places[of.first_row + lane] = i << 8 | lane;
  }
  if (lane == 0) shared.pass_first[passes] = b.args.round_sequences;
  __syncwarp();
  block_rows(b, 0);
}
