// Routers, and the choice of experts: their scores, a forecast of who will be chosen, and the choice itself.
//
// The scores are the one product in float32: they decide who works. They are few, so that no weights stream for
// them: an SM has a few experts or none, and their weights are in registers before the rows are there.
//
// Mostly no stage has to wait for them. Scores are sums over a row's columns, which what normalizes the row is multiplied
// into: so they are those of the row before attention, and those of what the product behind attention adds to it. The
// latter are more features of that product, nearly as exact (gemm.cuh, ROUTER_TILES); the former are made behind attention,
// by SMs that have no units (PART); and whoever chooses normalizes their sum (UNSCALED). So the choice begins where the rows
// are complete, a crossing and a stage sooner.
//
// The forecast. From the last weights behind attention to the first of an expert nothing would stream: a crossing, the choice
// and a way to memory, 5 us and more of each layer. But attention mostly adds little to a row, and the scores of the row
// before it are there a stage sooner: by these the watchdog's warp of every SM foresees the experts of all rows, while the
// product behind attention is multiplied, and the loader goes on with their weights. Of each row one, and more only as far as
// memory can bring them until the choice is made (LaunchArgs::foresee): those with the largest scores, of which fewest are wrong.
// Foreseen experts are multiplied first; behind them come those that rows chose and nobody foresaw. An expert that no row
// chose is multiplied for nothing, and nobody reads its sums: a forecast changes no bit, only what a step takes. All SMs
// foresee the same, from the same words by the same operations; else they would not deal out the same tiles.
//
// A stage R says:
// K, EXPERTS, STRIDE, NORM, gain(b), EPS, PREPARED, CHECKED, LOGITS, squares(b) (gemm.cuh); weights4(b, expert, column, more)
// four columns, `more` behind that one, a multiple of 32; bias(b) [EXPERTS] or null; input(b), out(b) [rows][STRIDE]. What
// normalizes prepared rows is left in shared memory, for the stage behind it, which reads them as well. If experts are
// compared by SIGMOID, a row's second half has what is compared, the sigmoid and correction(b) [EXPERTS] or null: made once,
// where every SM would make it for itself. PART: of rows to which added(b) [K] is added first, if they are ADDED; the sums
// alone, without what normalizes them; then place(b, expert, count, from, bytes) says where weights of so many experts lie.
// EXPECTS: with what experts would be compared by, if this were all, in a row's second half.
// The generated text defines MAX_EXPERTS and MAX_SLOTS, the most that any layer has.

enum Scoring : u32 { SOFTMAX, CHOSEN_SOFTMAX, SIGMOID };

constexpr u32 EXPERT_WORDS = (MAX_EXPERTS + 31) / 32;
constexpr u32 MAX_CHOSEN = STEP_ROWS * MAX_SLOTS < MAX_EXPERTS ? STEP_ROWS * MAX_SLOTS : MAX_EXPERTS;
constexpr u32 MAX_STREAMED = 2 * MAX_CHOSEN < MAX_EXPERTS ? 2 * MAX_CHOSEN : MAX_EXPERTS;
constexpr u32 SLOT_WORDS = (MAX_CHOSEN + 3) / 4;  // of the slots of a row
constexpr u32 NO_SLOT = 255, NOT_CHOSEN = 0xffff;
static_assert(EXPERT_WORDS <= LANES && SLICE_ROWS == CONSUMERS, "a lane a word; a warp a row of a slice");

// The choice of a layer, in shared memory behind `Shared`.
struct Routes {
  u64 routed;                             // barrier: the choice is made (a phase a layer)
  u32 count;                              // experts that any row chose
  u32 total;                              // the sum of these counts over the launch
  u64 forecast;                           // barrier: experts are foreseen (a phase a layer)
  u32 asks;                               // for forecasts, in this launch
  u32 loaded;                             // of these, those whose layers the loader is through with
  u32 foreseen;                           // experts of the forecast
  u32 streamed;                           // these, and behind them what was chosen and not foreseen
  u32 all_foreseen, all_wrong;            // sums over the launch, and of those that no row chose
  u32 seen[FORESEES ? EXPERT_WORDS : 1];  // a bit an expert that is foreseen
  u32 chosen[STEP_ROWS][EXPERT_WORDS];    // a bit an expert
  alignas(4) u8 slot[STEP_ROWS][SLOT_WORDS * 4];  // by number in `expert`: the row's slot, or NO_SLOT
  float weight[STEP_ROWS][MAX_SLOTS];     // by slot; what was compared, until control has weighed the row
  u16 expert[MAX_CHOSEN];                 // in ascending order
  u16 order[FORESEES ? MAX_STREAMED : 1];  // experts as the first product takes them
  u16 number[FORESEES ? MAX_STREAMED : 1]; // which of the chosen each of them is, or NOT_CHOSEN
  u16 own[STEP_ROWS][MAX_SLOTS];          // by slot: the row's experts, in ascending order
  // Of the barriers, in the layer that was asked for last.
  __device__ __forceinline__ u32 parity() const { return (*(const volatile u32*)&asks + 1) & 1; }
};
static_assert(sizeof(Routes) <= ROUTES_BYTES);

__device__ __forceinline__ Routes& routes_of(const Block& b) { return *reinterpret_cast<Routes*>(b.scratch - ROUTES_BYTES); }

// What an epilogue is told beside row and feature.
struct Chosen {
  u32 expert;
  u32 slot;
  float weight;
};

// ---- The scores ------------------------------------------------------------------------------

// One of a lane's N numbers, lane l the number l % N, added up over the N lanes that follow each other.
template <u32 N> __device__ __forceinline__ float fold(float (&v)[N]) {
#pragma unroll
  for (u32 n = N / 2; n > 0; n /= 2) {
    const bool upper = lane_id() & n;
#pragma unroll
    for (u32 i = 0; i < n; ++i) {
      const float own = upper ? v[i + n] : v[i], other = upper ? v[i] : v[i + n];
      v[i] = own + __shfl_xor_sync(~0u, other, n);
    }
  }
  return v[0];
}

// How a router's experts are shared by the SMs: so many at a time, each thread some columns of all of them. Parts are made by
// few SMs, which have the more experts.
template <class R> struct ScoreShape {
  static constexpr u32 ROUND = CONSUMER_THREADS * 4, ROUNDS = (R::K + ROUND - 1) / ROUND;
  static constexpr u32 SMS = R::PART ? 16 : 128, FIT = 24 / ROUNDS > 0 ? 24 / ROUNDS : 1;
  static constexpr u32 EACH = least((R::EXPERTS + SMS - 1) / SMS, least(R::PART ? 8 : 4, FIT));
  // So many lanes share out their sums.
  static constexpr u32 FOLD = EACH > 4 ? 8 : EACH > 2 ? 4 : EACH;
  // This SM's first expert. Units of attention are dealt out from the first SM on, parts of scores from the last one.
  __device__ __forceinline__ static u32 first(const Block& b) { return R::PART ? (gridDim.x - 1 - blockIdx.x) * EACH : b.first_tile(); }
};

// Has this SM's part of a router's weights brought into L2, long before it is wanted.
template <class R> __device__ __forceinline__ void prefetch_router(const Loader& b) {
  const u32 first = ScoreShape<R>::first(b);
  if (lane_id() != 0 || first >= R::EXPERTS) return;
  const u8* from;
  u32 bytes;
  R::place(b, first, least(ScoreShape<R>::EACH, R::EXPERTS - first), from, bytes);
#pragma unroll 1
  for (u32 at = 0; at < bytes; at += SLOT_BYTES) prefetch_bulk(from + at, least(bytes - at, SLOT_BYTES));
}

template <class R> __device__ __forceinline__ void score_experts(Consumer& b) {
  constexpr u32 ROUND = ScoreShape<R>::ROUND, ROUNDS = ScoreShape<R>::ROUNDS;
  // Every thread's part of the products of a slice's rows; behind them the squares, if nobody prepared them.
  typedef float Parts[SLICE_ROWS][CONSUMER_THREADS];
  constexpr u32 OWN = R::NORM && !R::PREPARED && (!R::PART || R::EXPECTS);
  constexpr u32 EACH = ScoreShape<R>::EACH, FOLD = ScoreShape<R>::FOLD;
  static_assert(SLICE_ROWS == CONSUMERS && (1 + OWN) * sizeof(Parts) <= SCRATCH_BYTES - SCALE_BYTES, "a warp a row");
  const u32 thread = anew(threadIdx.x), warp = thread / LANES, lane = thread % LANES, column = thread * 4;
  Parts* const parts = reinterpret_cast<Parts*>(b.scratch);
  float4 w[EACH][ROUNDS];
  // A round's columns, or some others whose products are not wanted: without a branch all loads are on their way
  // together, with one each waits for the one before, a thousand cycles.
  auto all = [](u32 i) { return (i + 1) * ROUND <= R::K; };
  auto there = [&](u32 i) { return all(i) || column + i * ROUND < R::K; };
  auto at = [&](u32 i) { return there(i) ? column + i * ROUND : 0; };
  auto expert_of = [&](u32 first, u32 e) { return R::PART ? first + e : first + e * gridDim.x; };
  auto load_weights = [&](u32 first) {
#pragma unroll
    for (u32 e = 0; e < EACH; ++e) {
      const u32 expert = least(expert_of(first, e), R::EXPERTS - 1);
#pragma unroll
      for (u32 i = 0; i < ROUNDS; ++i) w[e][i] = all(i) ? R::weights4(b, expert, column, i * ROUND) : R::weights4(b, expert, at(i), 0);
    }
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) {
      float4 gain = make_float4(1, 1, 1, 1);
      if constexpr (R::NORM) gain = *reinterpret_cast<const float4*>(R::gain(b) + at(i));
      if (!there(i)) gain = make_float4(0, 0, 0, 0);
#pragma unroll
      for (u32 e = 0; e < EACH; ++e) w[e][i] = times(w[e][i], gain);
    }
  };
  // What all threads have of this warp's row; of those `apart` lanes from each other.
  auto whole = [&](const Parts& of, u32 apart) {
    float sum = 0.f;
#pragma unroll
    for (u32 n = 0; n < CONSUMERS; ++n) sum += of[warp][n * LANES + lane];
#pragma unroll
    for (u32 x = LANES / 2; x >= apart; x /= 2) sum += __shfl_xor_sync(~0u, sum, x);
    return sum;
  };
  bool ready = R::PART;  // the stage's inputs are there
#pragma unroll 1
  for (u32 first = ScoreShape<R>::first(b); first < R::EXPERTS; first += EACH * gridDim.x) {
    load_weights(first);
    // Here, so that all that is done with them is done before the rows are there.
#pragma unroll
    for (u32 e = 0; e < EACH; ++e) {
#pragma unroll
      for (u32 i = 0; i < ROUNDS; ++i) w[e][i] = anew(w[e][i]);
    }
    // A lane an expert, for what is added to its scores.
    const u32 expert = lane < EACH ? expert_of(first, lane) : R::EXPERTS;
    float bias = 0.f, correction = 0.f;
    if (expert < R::EXPERTS) {
      if (R::bias(b)) bias = R::bias(b)[expert];
      if (R::SIGMOID && R::correction(b)) correction = R::correction(b)[expert];
    }
    bias = anew(bias);
    correction = anew(correction);
    float4 added[ROUNDS] = {};
    if constexpr (R::ADDED) {
#pragma unroll
      for (u32 i = 0; i < ROUNDS; ++i) added[i] = *reinterpret_cast<const float4*>(R::added(b) + at(i));
    }
    if (!ready) b.wait_inputs();
    else consumers_sync();  // the sums, or what attention had there, were read
    ready = true;
#pragma unroll 1
    for (u32 start = 0; start < b.rows(); start += SLICE_ROWS) {
      const u32 own = start + warp;
      Squares<R, R::CHECKED> squares = {};
      if constexpr (R::PREPARED) {
        if (own < b.rows()) squares.load(b, own);
      }
      if (start > 0) consumers_sync();  // the sums were read
      // Row by row, the next one's loads ahead: loads of all rows at once would wait together, but their text costs more
      // than that.
      const u32 rows = least(b.rows() - start, SLICE_ROWS);
      float4 ahead[ROUNDS];
      auto load_row = [&](u32 row) {
        const float* x = R::input(b) + (start + row) * R::K;
#pragma unroll
        for (u32 i = 0; i < ROUNDS; ++i) ahead[i] = load4(x + at(i));
      };
      load_row(0);
#pragma unroll 1
      for (u32 row = 0; row < rows; ++row) {
        float4 v[ROUNDS];
#pragma unroll
        for (u32 i = 0; i < ROUNDS; ++i) {
          v[i] = ahead[i];
          if constexpr (R::ADDED) v[i] = plus(v[i], added[i]);
          if (!there(i)) v[i] = make_float4(0, 0, 0, 0);
        }
        load_row(least(row + 1, rows - 1));
        float dot[FOLD] = {}, square = 0.f;
#pragma unroll
        for (u32 i = 0; i < ROUNDS; ++i) {
          if constexpr (OWN != 0) square = ::squares(square, v[i]);
#pragma unroll
          for (u32 e = 0; e < EACH; ++e) {
            dot[e] = fmaf(v[i].w, w[e][i].w, fmaf(v[i].z, w[e][i].z, fmaf(v[i].y, w[e][i].y, fmaf(v[i].x, w[e][i].x, dot[e]))));
          }
        }
        parts[0][row][thread] = fold(dot);
        if constexpr (OWN != 0) parts[1][row][thread] = square;
      }
      consumers_sync();
      if (own >= b.rows()) continue;
      float scale = 1.f;
      if constexpr (R::PREPARED) {
        scale = squares.normalizer();
        if (lane == 0) b.shared.row_scale[own] = scale;
      } else if constexpr (OWN != 0) scale = normalizing(whole(parts[1], 1), R::K, R::EPS);
      const float sum = whole(parts[0], FOLD), score = sum * scale + bias;
      if (expert < R::EXPERTS) {
        float* const to = R::out(b) + own * R::STRIDE + expert;
        hand_on(to, R::PART ? sum : score);
        if constexpr (R::SIGMOID || R::EXPECTS) hand_on(to + R::STRIDE / 2, R::SIGMOID ? sigmoid(score) + correction : score);
      }
    }
  }
  if constexpr (!R::PART) {
    if (!ready) {
      b.wait_inputs();
      if constexpr (R::PREPARED) scale_rows<R>(b);
    }
    b.finish_stage();
    b.pass_tiles(R::EXPERTS);
  }
}

// ---- The forecast ----------------------------------------------------------------------------

// Has the watchdog make a layer's forecast; control, when what the scores were before is in sight. The loader has to be
// through with the experts of the layer before, which are in the same place: mostly it is, as far as all of their tiles were
// multiplied, but on an SM that had none of them.
__device__ __forceinline__ void ask_forecast(Control& b, u32 stage) {
  if (b.second) return;
  Routes& routes = routes_of(b);
  const u32 layers = routes.asks;  // before this one
#pragma unroll 1
  while (!__all_sync(~0u, (int)(shared_acquire(&routes.loaded) - layers) >= 0)) b.shared.waiting[anew(warp_id())] = CONTROL_LOADER;
  if (lane_id() != 0) return;
  *(volatile u32*)&routes.asks = layers + 1;
  b.send(FORESEE + stage);
}

// A warp. Lane l looks after the experts l, l + 32, ... What is chosen by chance cannot be foreseen.
template <class R> __device__ __forceinline__ void foresee(const Block& b) {
  constexpr u32 EACH = (R::EXPERTS + LANES - 1) / LANES;
  Routes& routes = routes_of(b);
  const u32 lane = lane_id(), rows = b.rows();
  const bool none = b.args.foresee == 0 || b.args.routing != 0;
  const u32 each = none ? 0 : least((b.args.foresee - 1) / R::EXPERT_BYTES / rows + 1, R::SLOTS);
  u32 listed = 0, count = 0;  // a bit for each of the lane's that is in the list; its length
  auto there = [&](u32 i) { return (i + 1) * LANES <= R::EXPERTS || i * LANES + lane < R::EXPERTS; };
  float ahead[EACH];
  auto load = [&](u32 row) {
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) ahead[i] = take1<true>(R::expected(b) + row * R::FORECAST_STRIDE + (there(i) ? i * LANES + lane : 0));
  };
  if (each > 0) load(0);
#pragma unroll 1
  for (u32 row = 0; row < rows && each > 0; ++row) {
    u32 key[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) key[i] = there(i) ? max(ordered(ahead[i] + 0.f), 1u) : 0;
    load(least(row + 1, rows - 1));
#pragma unroll 1
    for (u32 n = 0; n < each; ++n) {
      u32 best = key[0], which = 0;
#pragma unroll
      for (u32 i = 1; i < EACH; ++i) {
        if (key[i] > best) { best = key[i]; which = i; }
      }
      const u32 holders = __ballot_sync(~0u, best == warp_max(best));
      bool fresh = false;
      if (lane + 1 == __ffs(holders)) {
#pragma unroll
        for (u32 i = 0; i < EACH; ++i) key[i] = i == which ? 0 : key[i];
        fresh = (listed >> which & 1) == 0;
        listed |= 1u << which;
        if (fresh) routes.order[count] = (u16)(which * LANES + lane);
      }
      count += __any_sync(~0u, fresh);
    }
  }
#pragma unroll 1
  for (u32 i = 0; i < EACH; ++i) {
    const u32 word = __ballot_sync(~0u, listed >> i & 1);
    if (lane == 0) routes.seen[i] = word;
  }
  if (lane == 0) {
    routes.foreseen = count;
    routes.all_foreseen += count;
  }
  __syncwarp();  // the list is written
  if (lane == 0) barrier_arrive(&routes.forecast);
}

// ---- The choice ------------------------------------------------------------------------------

// Any number, from several: for experts that are chosen at random.
__device__ __forceinline__ u32 mixed(u32 a, u32 b) {
  u32 x = (a ^ b * 0x9e3779b9u) * 0x85ebca6bu;
  x = (x ^ x >> 15) * 0xc2b2ae35u;
  return x ^ x >> 13;
}

// What a lane's experts l, l + 32, ... have beside a row: it is asked for in front of the wait for the rows, since it comes
// from far away.
template <class R> struct Offsets {
  static constexpr u32 EACH = (R::EXPERTS + LANES - 1) / LANES;
  float bias[EACH] = {}, correction[EACH] = {};
  __device__ __forceinline__ void load(const Block& b) {
    if constexpr (R::UNSCALED) {
#pragma unroll
      for (u32 i = 0; i < EACH; ++i) {
        const u32 expert = least(i * LANES + lane_id(), R::EXPERTS - 1);
        if (R::bias(b)) bias[i] = R::bias(b)[expert];
        if (R::correction(b)) correction[i] = R::correction(b)[expert];
      }
    }
  }
};

// The score of an expert, once more: but for scores beside what is compared, some lane has seen it, so it is not late.
template <class R> __device__ __forceinline__ float score_of(const Block& b, u32 row, u32 expert) {
  float score = take1<R::CHECKED>(R::scores(b) + row * R::STRIDE + expert);
  if constexpr (R::UNSCALED) score = fmaf(score, b.shared.row_scale[row], R::bias(b) ? R::bias(b)[expert] : 0.f);
  return score;
}

// For measurements experts may be chosen at random: some that all rows choose alike, then some of the row's own. Keys change
// in front of both.
template <class R> struct RandomKeys {
  u32 alike, seed, row;
  u32 renewed;  // the choice in front of which that is
  __device__ __forceinline__ RandomKeys(const Block& b, u32 row)
      : alike(b.args.routing != 0 ? (b.args.routing - 1) * R::SLOTS / 1000 : 0), seed(mixed(b.args.routing_seed + b.step, b.layer)),
        row(row), renewed(b.args.routing != 0 ? 0 : ~0u) {}
  // What keys of choice `n` are made of with an expert's number.
  __device__ __forceinline__ u32 renew(u32 n) {
    renewed = n < alike ? alike : ~0u;
    return mixed(seed, n < alike ? ~0u : row);
  }
};

// The experts of a row, if they are few: those with the largest keys, the lowest first among equals. Lane l has the experts l,
// l + 32, ... in registers.
template <class R, u32 EACH> __device__ __forceinline__ void take_best(const Block& b, Routes& routes, u32 row, const float (&compared)[EACH], u32 (&key)[EACH]) {
  const u32 lane = lane_id();
  RandomKeys<R> random(b, row);
  u32 taken[EACH] = {};  // a bit a lane
#pragma unroll 1
  for (u32 n = 0; n < R::SLOTS; ++n) {
    if (n == random.renewed) {
      const u32 own = random.renew(n);
#pragma unroll
      for (u32 i = 0; i < EACH; ++i) key[i] = key[i] != 0 ? mixed(own, i * LANES + lane) | 1 : 0;
    }
    u32 best = key[0];
#pragma unroll
    for (u32 i = 1; i < EACH; ++i) best = max(best, key[i]);
    const u32 top = warp_max(best);
    bool found = false;
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
      const u32 holders = __ballot_sync(~0u, key[i] == top), first = found ? 0 : holders & (0 - holders);
      found |= holders != 0;
      taken[i] |= first;
      if (first >> lane & 1) key[i] = 0;
    }
  }
  u32 before = 0;
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) {
    const u32 slot = before + __popc(taken[i] & ((1u << lane) - 1));
    if (lane == 0) routes.chosen[row][i] = taken[i];
    if (taken[i] >> lane & 1) {
      routes.weight[row][slot] = compared[i];  // for `weigh_row`
      routes.own[row][slot] = (u16)(i * LANES + lane);
    }
    before += __popc(taken[i]);
  }
}

// The experts of a row; a warp. Lane l looks after the experts l, l + 32, ..., whose keys, if they are many, lie in shared
// memory: in registers each of them would have instructions of its own, ten kilobytes in all, which are cold in every layer and
// cost more than the choice.
template <class R> __device__ __forceinline__ void choose_row(const Consumer& b, Routes& routes, u32 row, const Offsets<R>& offsets) {
  constexpr u32 EACH = Offsets<R>::EACH;
  static_assert(R::SLOTS <= LANES && SLICE_ROWS * LANES * (EACH * sizeof(u32) + sizeof(uint2)) <= SCRATCH_BYTES - SCALE_BYTES);
  const u32 lane = lane_id();
  const float* const scores = R::scores(b) + row * R::STRIDE;
  const float* const compared = scores + (R::SCORING == SIGMOID && !R::UNSCALED ? R::STRIDE / 2 : 0);
  u32* const keys = reinterpret_cast<u32*>(b.scratch) + row % SLICE_ROWS * (EACH * LANES) + lane;
  // Nothing is chosen yet. The votes below come before any of it is.
  constexpr bool FEW = EACH <= 4;
  if (!FEW && lane < EACH) routes.chosen[row][lane] = 0;
#pragma unroll 1
  for (u32 n = lane; n < SLOT_WORDS; n += LANES) reinterpret_cast<u32*>(routes.slot[row])[n] = NO_SLOT * 0x01010101u;
  auto there = [&](u32 i) { return (i + 1) * LANES <= R::EXPERTS || i * LANES + lane < R::EXPERTS; };
  // All loads together: one after the other they would take a thousand cycles each.
  auto expert_of = [&](u32 i) { return there(i) ? i * LANES + lane : R::EXPERTS - 1; };
  float loaded[EACH];
  float scale = 1.f;
  u32 words;
  do {
    words = 0;
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) loaded[i] = take1<R::CHECKED>(compared + expert_of(i));
    if constexpr (R::UNSCALED) {
      Squares<R, R::CHECKED> squares;
      squares.load(b, row);
      words = squares.word();
      scale = squares.normalizer();
    }
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) words = largest_word(words, __float_as_uint(loaded[i]));
  } while (R::CHECKED && b.late(words));
  if constexpr (R::UNSCALED) {
    if (lane == 0) b.shared.row_scale[row] = scale;
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) {
      loaded[i] = fmaf(loaded[i], scale, offsets.bias[i]);
      if constexpr (R::SCORING == SIGMOID) loaded[i] = sigmoid(loaded[i]) + offsets.correction[i];
    }
  }
  // 0 is no expert. The addition makes -0 equal to 0.
  u32 key[EACH];
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) key[i] = there(i) ? max(ordered(loaded[i] + 0.f), 1u) : 0;
  if constexpr (FEW) {
    take_best<R>(b, routes, row, loaded, key);
    return;
  }
#pragma unroll
  for (u32 i = 0; i < EACH; ++i) keys[i * LANES] = key[i];
  // A lane knows the largest two of its own, the lowest expert first among equals, or, behind these, none (`known`):
  // few lanes ever have to look again.
  u32 best = 0, second = 0, at = ~0u, second_at = ~0u, known = 0;
  uint2* const chosen = reinterpret_cast<uint2*>(b.scratch + SLICE_ROWS * EACH * LANES * sizeof(u32)) + row % SLICE_ROWS * LANES;
  RandomKeys<R> random(b, row);
#pragma unroll 1
  for (u32 n = 0; n < R::SLOTS; ++n) {
    if (n == random.renewed) {
      const u32 own = random.renew(n);
#pragma unroll 2
      for (u32 i = 0; i < EACH; ++i) {
        const u32 any = mixed(own, i * LANES + lane) | 1;
        keys[i * LANES] = keys[i * LANES] != 0 ? any : 0;
      }
      known = 0;
    }
    if (known == 0) {
      best = second = 0;
      at = second_at = ~0u;
      known = 2;
#pragma unroll 4
      for (u32 i = 0; i < EACH; ++i) {
        const u32 own = keys[i * LANES], expert = i * LANES + lane;
        if (own > best) {
          second = best;
          second_at = at;
          best = own;
          at = expert;
        } else if (own > second) {
          second = own;
          second_at = expert;
        }
      }
    }
    __syncwarp();  // together again
    const u32 top = warp_max(best);
    u32 holders = __ballot_sync(~0u, best == top);
    // Mostly one lane has it: to look for the lowest of equal ones takes as long as all else.
    if ((holders & (holders - 1)) != 0) {
      const u32 lowest = warp_min(best == top ? at : ~0u);
      holders = __ballot_sync(~0u, at == lowest);
    }
    if (lane + 1 == __ffs(holders)) {
      chosen[n] = make_uint2(at, best);
      keys[at - lane] = 0;
      best = second;
      at = second_at;
      --known;
    }
  }
  __syncwarp();  // the chosen are in sight
  const u32 mine = lane < R::SLOTS ? chosen[lane].x : 0, compared_as = lane < R::SLOTS ? chosen[lane].y : 0;
  u32 slot = 0;  // chosen experts below this lane's
#pragma unroll
  for (u32 n = 0; n < R::SLOTS; n += 2) {
    const uint4 two = *reinterpret_cast<const uint4*>(chosen + n);
    slot += two.x < mine;
    if (n + 1 < R::SLOTS) slot += two.z < mine;
  }
  if (lane < R::SLOTS) {
    routes.weight[row][slot] = from_ordered(compared_as);  // for `weigh_row`
    routes.own[row][slot] = (u16)mine;
    shared_add(&routes.chosen[row][mine / LANES], 1u << mine % LANES);
  }
}

// What a row's experts weigh, of what was compared; a warp of control's.
template <class R> __device__ __forceinline__ void weigh_row(const Control& b, Routes& routes, u32 row) {
  const u32 lane = lane_id(), slot = least(lane, R::SLOTS - 1);
  const bool random = b.args.routing != 0;
  // What is compared of sigmoids is another number.
  float score = routes.weight[row][slot];
  if constexpr (R::SCORING == SIGMOID) {
    do {
      score = score_of<R>(b, row, routes.own[row][slot]);
    } while (R::CHECKED && !R::UNSCALED && b.late(__float_as_uint(score)));
  }
  // Shares of the chosen, and what they are divided by.
  const float top = R::SCORING == SIGMOID ? 0.f : from_ordered(warp_max(ordered(score)));
  auto share_of = [&](float score) {
    if constexpr (R::SCORING == SIGMOID) return random ? 1.f : sigmoid(score);
    return random ? 1.f : power_of_two((score - top) * LOG2_E);
  };
  const float share = lane < R::SLOTS ? share_of(score) : 0.f;
  float sum = share;
  if (R::SCORING == SOFTMAX && !R::RENORMALIZE) {
    sum = 0.f;
#pragma unroll 1
    for (u32 expert = lane; expert < R::EXPERTS; expert += LANES) sum += share_of(score_of<R>(b, row, expert));
  }
  sum = warp_sum(sum);
  if (R::SCORING == SIGMOID) sum = R::RENORMALIZE ? sum + 1e-20f : 1.f;
  if (lane < R::SLOTS) routes.weight[row][lane] = share / sum * R::FACTOR;
}

// Every consumer warp: the experts of all rows, and those that any of them chose.
template <class R> __device__ __forceinline__ void choose_experts(Consumer& b, const Offsets<R>& offsets) {
  constexpr u32 WORDS = (R::EXPERTS + LANES - 1) / LANES;
  Routes& routes = routes_of(b);
  const u32 warp = anew(warp_id()), lane = anew(lane_id());
  // It was made long ago, but nobody has waited for it here.
  if constexpr (R::FORESEEN) barrier_wait(b, &routes.forecast, routes.parity(), CONSUMER_FORECAST);
#pragma unroll 1
  for (u32 row = warp; row < STEP_ROWS; row += SLICE_ROWS) {
    if (row < b.rows()) choose_row<R>(b, routes, row, offsets);
    else if (lane < WORDS) routes.chosen[row][lane] = 0;
  }
  // A row by itself: what it chose is all that anybody chose, and its warp need not wait for the others to say so.
  if (!R::FORESEEN && b.rows() == 1) {
    __syncwarp();  // the row's experts are there
    if (warp == 0 && lane < R::SLOTS) {
      routes.expert[lane] = routes.own[0][lane];
      routes.slot[0][lane] = (u8)lane;
    }
    if (warp == 0 && lane == 0) {
      routes.count = R::SLOTS;
      routes.total += R::SLOTS;
    }
    __syncwarp();  // all lanes have written
    if (lane == 0) barrier_arrive(&routes.routed);
    consumers_sync();
    return;
  }
  consumers_sync();
  u32 all = 0;
  if (lane < WORDS) {
#pragma unroll 8
    for (u32 row = 0; row < STEP_ROWS; ++row) all |= routes.chosen[row][lane];
  }
  // Bits in the words up to this lane's.
  auto up_to = [&](u32 word) {
    u32 sum = __popc(word);
#pragma unroll
    for (u32 n = 1; n < WORDS; n *= 2) {
      const u32 more = __shfl_up_sync(~0u, sum, n);
      if (lane >= n) sum += more;
    }
    return sum;
  };
  u32 number = up_to(all);
  if (warp == 0 && lane == WORDS - 1) {
    routes.count = number;
    routes.total += number;
  }
  number -= __popc(all);  // of those before
  auto bit = [](u32 word, u32 expert) { return word >> expert % LANES & 1; };
  auto below = [](u32 word, u32 expert) { return __popc(word & ((1u << expert % LANES) - 1)); };
  // Chosen and not foreseen: their places are behind the forecast.
  u32 late = 0, place = 0;
  if constexpr (R::FORESEEN) {
    const u32 foreseen = routes.foreseen, seen = lane < WORDS ? routes.seen[lane] : 0;
    late = all & ~seen;
    place = foreseen + up_to(late);
    if (warp == 0 && lane == WORDS - 1) {
      routes.streamed = place;
      routes.all_wrong += place - (number + __popc(all));
    }
    place -= __popc(late);
    // Which of the chosen are those that were foreseen.
#pragma unroll 1
    for (u32 first = warp * LANES; first < foreseen; first += CONSUMER_THREADS) {
      const u32 n = first + lane, expert = n < foreseen ? routes.order[n] : 0;
      const u32 word = __shfl_sync(~0u, all, expert / LANES), at = __shfl_sync(~0u, number, expert / LANES) + below(word, expert);
      if (n < foreseen) routes.number[n] = bit(word, expert) ? (u16)at : NOT_CHOSEN;
    }
  }
  // A lane has one of its row's experts, and finds its number. Rows that chose the same one write the same.
#pragma unroll 1
  for (u32 row = warp; row < b.rows(); row += SLICE_ROWS) {
    const u32 expert = lane < R::SLOTS ? routes.own[row][lane] : 0;
    const u32 at = __shfl_sync(~0u, number, expert / LANES) + below(__shfl_sync(~0u, all, expert / LANES), expert);
    if (lane < R::SLOTS) {
      routes.expert[at] = (u16)expert;
      routes.slot[row][at] = (u8)lane;
    }
    if constexpr (R::FORESEEN) {
      const u32 word = __shfl_sync(~0u, late, expert / LANES), n = __shfl_sync(~0u, place, expert / LANES) + below(word, expert);
      if (lane < R::SLOTS && bit(word, expert)) {
        routes.order[n] = (u16)expert;
        routes.number[n] = (u16)at;
      }
    }
  }
  __syncwarp();  // all lanes have written
  if (lane == 0) barrier_arrive(&routes.routed);  // for the loader and control
  consumers_sync();                               // for the consumers
}

// Weights are wanted in the second stage only, and control has nothing to do until the first weights have come: its two warps
// have every other row.
template <class R> __device__ __forceinline__ void weigh_experts(const Control& b) {
#pragma unroll 1
  for (u32 row = b.second; row < b.rows(); row += 2) weigh_row<R>(b, routes_of(b), row);
}
