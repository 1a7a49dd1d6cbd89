// Mixtures of experts: products with the weights of just those that the step's rows choose (router.cuh).
//
// A layer's experts are two products behind a router's scores, which mostly have no stage of their own. The first (gate
// and up) begins with the choice: the scores are there, and every SM finds all rows' experts for itself, a warp a row.
// The loader has to wait for that, the one place where it does not know what comes next; but where experts are foreseen
// (router.cuh), it begins with these. The tiles of all experts that any row chose, and of those that were foreseen, expert by
// expert, are dealt out to the SMs as those of any product.
// Every tile is multiplied with all rows of the step, which costs nothing; of the results only those rows'
// are stored that chose the expert, in the slot that the expert has among the row's.
//
// The second stage (down) has other rows for each expert: those that chose it, from their slots. An SM keeps
// the same features for all experts, so that the row's sum over its experts is made by one lane, in
// ascending order of the experts, right in the residual. What a row's neighbours choose changes only what
// lies between its own terms, which is not added to it. (Long rows of FP4 are shared out by columns as well: bands.cuh.)
//
// A stage S says what a product says (gemm.cuh; BLOCKS, TILES and COLS are of one expert), and
//   FIRST                whether it makes the choice and reads rows as they are; else it reads their slots
//   SLOTS                experts of a row
//   Route                of the first: EXPERTS; STRIDE, scores(b) [rows][STRIDE] f32, which may be late if they are
//                        CHECKED (handoff.cuh); SCORING, RENORMALIZE, FACTOR; UNSCALED, whether the scores lack what
//                        normalizes the row, then K, EPS, squares(b) (gemm.cuh), bias(b), correction(b) [EXPERTS] or null;
//                        FORESEEN, whether there is a forecast, then EXPERT_BYTES, of the first product of an expert;
//                        FORECAST_STRIDE, expected(b) [rows][FORECAST_STRIDE] f32, by which experts are compared for it
//   before(), finish()   the epilogue, which is told of the expert, of the row's slot and, but of the first, of its weight; of tiles of
//                        several octets, or that prepare rows, sum() where a row's sum lies, BIASED, bias() and store(),
//                        of NVFP4 also scale() of an expert's features

// The experts of a stage, by number: of the first as they were streamed, of the second as they were chosen.
template <class S, bool = S::FIRST> struct Listed {
  static constexpr bool FORESEEN = false;
  __device__ __forceinline__ static u32 expert(const Routes& routes, u32 n) { return routes.expert[n]; }
  __device__ __forceinline__ static u32 count(const Routes& routes) { return routes.count; }
  __device__ __forceinline__ static u32 chosen(const Routes&, u32 n) { return n; }
};
template <class S> struct Listed<S, true> {
  static constexpr bool FORESEEN = S::Route::FORESEEN;
  __device__ __forceinline__ static u32 expert(const Routes& routes, u32 n) { return FORESEEN ? routes.order[n] : routes.expert[n]; }
  __device__ __forceinline__ static u32 count(const Routes& routes) { return FORESEEN ? routes.streamed : routes.count; }
  // Which of the chosen that is, or NOT_CHOSEN.
  __device__ __forceinline__ static u32 chosen(const Routes& routes, u32 n) { return FORESEEN ? routes.number[n] : n; }
};

// The second stage's tiles of all experts. Tiles of one octet come expert by expert: the rows of an expert are
// fetched once. If a tile has several, an SM has about one of them, and a tile's experts come one behind the
// other, or two by two (`work` is told of the first): its sums stay in control's registers until all are added.
template <class S, class Work> __device__ __forceinline__ bool second_tiles(const Block& b, u32 count, Work work) {
  if constexpr (Team<S>::SHORT) {
    for (u32 t = b.first_tile(); t < S::TILES; t += gridDim.x) {
      for (u32 number = 0; number < count; number += Team<S>::EXPERTS) {
        if (!work(number, t)) return false;
      }
    }
  } else {
    for (u32 number = 0; number < count; ++number) {
      for (u32 t = b.first_tile(); t < S::TILES; t += gridDim.x) {
        if (!work(number, t)) return false;
      }
    }
  }
  return true;
}

// Nothing of the layer's choice is streamed any more.
__device__ __forceinline__ void leave_routes(Loader& b) {
  if (!FORESEES) return;
  if (LOADER_LANES > 1) __syncwarp();
  if (lane_id() == 0) shared_release(&routes_of(b).loaded, b.forecasts);
}

template <class S> __device__ __forceinline__ bool stream_experts(Loader& b, const u8* weights) {
  Routes& routes = routes_of(b);
  b.begin_tape(S::Weights::LANE_COLUMNS == 8, Slots<S>::PIECE * Team<S>::EXPERTS, nullptr, 1, 0);
  auto at = [&](u32 number, u32 tile) { return weights + ((u64)Listed<S>::expert(routes, number) * S::TILES + tile) * Slots<S>::TILE_BYTES; };
  if constexpr (S::FIRST) {
    static_assert(Team<S>::EXPERTS == 1);
    constexpr bool FORESEEN = Listed<S>::FORESEEN;
    if (FORESEEN && !b.wait_forecast(&routes.forecast)) return false;
    // Tiles of experts that are known: those of the forecast, and then all.
    u32 n = b.first_tile(), known = FORESEEN ? routes.foreseen * S::TILES : 0;
    bool all = false;
#pragma unroll 1
    for (;; n += gridDim.x) {
      if (n >= known && !all) {
        if (!b.wait_routes(&routes.routed)) return false;
        known = Listed<S>::count(routes) * S::TILES;
        all = true;
      }
      if (n >= known) break;
      if (!stream_tile<S>(b, at(n / S::TILES, n % S::TILES))) return false;
    }
    b.pass_tiles(known);
  } else {
    const u32 count = routes.count;
    auto tile = [&](u32 number, u32 tile) {
      if constexpr (Team<S>::EXPERTS == 1) return stream_tile<S>(b, at(number, tile));
      return b.piece(at(number, tile), Slots<S>::TILE_BYTES, number + 1 < count ? at(number + 1, tile) : nullptr);
    };
    if (!second_tiles<S>(b, count, tile)) return false;
    b.pass_tiles(S::TILES);
    leave_routes(b);
  }
  b.next_stage();
  return true;
}

// How the second stage's tiles are shared by the groups of an SM: a group takes runs of an expert's tiles in turn, mostly
// all that the SM has of them. A group skips fewer than there are buffers of sums (`pass_tiles`).
template <class S> struct Runs {
  static constexpr u32 OTHERS = Team<S>::GROUPS - 1, MOST = OTHERS > 0 ? (Sums<S>::BUFFERS - 1) / OTHERS : S::TILES;
  u32 each;      // tiles of an expert, of this SM
  u32 run;       // of a run
  u32 runs = 1;  // of an expert
  __device__ __forceinline__ explicit Runs(const Block& b) {
    const u32 first = b.first_tile();
    each = first < S::TILES ? (S::TILES - 1 - first) / gridDim.x + 1 : 0;
    run = each;
    if (each > MOST) {
      for (run = MOST; each % run != 0;) --run;
      runs = each / run;
    }
  }
};

// Where octet number `n` of this team's is among those of all experts, in the order in which they are multiplied below.
template <class S> __device__ __forceinline__ OctetPlace expert_place(const Consumer& b, const Routes& routes, u32 n) {
  using T = Team<S>;
  const u32 first = b.first_tile(), count = Listed<S>::count(routes);
  u32 number, tile;
  if constexpr (S::FIRST) {
    const u32 at = first + (T::group() + n / T::OCTETS * T::GROUPS) * gridDim.x;
    number = at / S::TILES;
    tile = at % S::TILES;
  } else {
    const Runs<S> deal(b);
    if (deal.each == 0) return {false, 0, 0};
    const u32 item = T::group() + n / deal.run * T::GROUPS;
    number = item / deal.runs;
    tile = first + (item % deal.runs * deal.run + n % deal.run) * gridDim.x;
  }
  if (number >= count) return {false, 0, 0};
  return {true, 0, ((u64)Listed<S>::expert(routes, number) * S::TILES + tile) * S::OPERANDS + T::operand() + n % T::OCTETS};
}

// The second stage's tiles, a run of an expert's at a time. `rows(a, there, number)` loads those of an expert, or zeros:
// filled on one path only, they would hold their registers through all stages. Where there are registers, they come while
// those before are multiplied.
template <class S, class Rows, class F>
__device__ __forceinline__ void multiply_runs(Consumer& b, const Runs<S>& deal, u32 count, Rows rows, u32& octet, F place) {
  using T = Team<S>;
  constexpr bool AHEAD = T::ROWS_AHEAD && S::HALF_INPUT;
  const u32 items = deal.each == 0 ? 0 : count * deal.runs;
  u32 next = 0;  // item whose tiles are the next ones
  auto load = [&](Activations<S>& a, u32 item) { rows(a, item < items, deal.runs == 1 ? item : item / deal.runs); };
  Activations<S> a, ahead;
  if constexpr (AHEAD) load(ahead, T::group());
#pragma unroll 1
  for (u32 item = T::group();; item += T::GROUPS) {
    if constexpr (AHEAD) {
      if constexpr (S::CHECKED) {
#pragma unroll 1
        while (b.late(row_word<S>(ahead))) load(ahead, item);
      }
      a = ahead;
      load(ahead, item + T::GROUPS);
    } else {
      do {
        load(a, item);
      } while (S::CHECKED && b.late(row_word<S>(a)));
    }
    // While the rows come.
    if constexpr (T::GROUPS > 1) pass_tiles<S>(b, (least(item, items) - next) * deal.run);
    if (item >= items) break;
#pragma unroll 1
    for (u32 tile = 0; tile < deal.run; ++tile) multiply_tile<S>(b, a, 0, octet, place);
    if constexpr (S::ROW_SCALE) T::meet();  // sums of rows were read
    next = item + 1;
  }
}

// The second stage's tiles of several octets, tile by tile of all experts: an item is one of an expert, or one of each of
// two. It takes hardly more time than its rows do, so they are loaded an item ahead.
template <class S, class Rows> __device__ __forceinline__ void multiply_tiles_of_several(Consumer& b, u32 each, u32 count, Rows rows) {
  using T = Team<S>;
  const u32 slots = (count + T::EXPERTS - 1) / T::EXPERTS;  // experts of a tile, or pairs of them
  const u32 items = slots * each;
  u32 next = 0;         // item whose tiles are the next ones
  u32 at = T::group();  // of the item that is loaded, among its tile's; a division would take as long as a tile
  Activations<S> ahead;
  bool own = false;  // whether these are of an expert
  u32 expert = 0;    // and its number
  auto load_ahead = [&](u32 item) {
#pragma unroll 1
    while (item < items && at >= slots) at -= slots;
    expert = at * T::EXPERTS + T::expert();
    own = item < items && expert < count;
    rows(ahead, own, expert);
    at += T::GROUPS;
  };
  load_ahead(T::group());
#pragma unroll 1
  for (u32 item = T::group();; item += T::GROUPS) {
    if constexpr (S::CHECKED) {
#pragma unroll 1
      while (b.late(row_word<S>(ahead))) rows(ahead, own, expert);
    }
    const Activations<S> a = ahead;
    const bool mine = own;
    if constexpr (T::ROWS_AHEAD) load_ahead(item + T::GROUPS);
    // While the rows come.
    if constexpr (T::GROUPS > 1) pass_tiles<S>(b, least(item, items) - next);
    if (item >= items) break;
    multiply_short_tile<S>(b, a, mine);
    next = item + 1;
    if constexpr (!T::ROWS_AHEAD) load_ahead(item + T::GROUPS);
  }
}

template <class S> __device__ __forceinline__ void multiply_experts(Consumer& b) {
  using T = Team<S>;
  static_assert(Slots<S>::PARTS == 1, "the emitter refuses longer rows");
  const Routes& routes = routes_of(b);
  u32 octet = 0;
  auto place = [&](u32 n) { return expert_place<S>(b, routes, n); };
  if constexpr (S::FIRST) {
    using R = typename S::Route;
    Offsets<R> offsets;
    offsets.load(b);
    b.wait_inputs();
    choose_experts<R>(b, offsets);
    fetch_first_scales<S>(b, place);
    const u32 tiles = Listed<S>::count(routes) * S::TILES;
    if (b.first_tile() < tiles) {
      Activations<S> a;
      load_inputs<S>(b, a, find_inputs<S>(b));
      u32 group = 0;
      for (u32 n = b.first_tile(); n < tiles; n += gridDim.x) {
        if (T::GROUPS == 1 || group == T::group()) multiply_tile<S>(b, a, 0, octet, place);
        else pass_tiles<S>(b, 1);
        if (++group == T::GROUPS) group = 0;
      }
    }
    b.finish_stage();
    b.pass_tiles(tiles);
  } else {
    fetch_first_scales<S>(b, place);
    Runs<S> deal(b);
    deal.each = anew(deal.each);  // it divides: in front of the wait
    b.wait_inputs();
    auto rows = [&](Activations<S>& a, bool there, u32 number) {
      load_rows<S>(b, a, [&](u32 row) {
        const u32 slot = there ? routes.slot[row][number] : NO_SLOT;
        return Source{row < b.rows() && slot != NO_SLOT, row * S::SLOTS + slot};
      });
    };
    if constexpr (T::SHORT) multiply_tiles_of_several<S>(b, deal.each, routes.count, rows);
    else multiply_runs<S>(b, deal, routes.count, rows, octet, place);
    b.finish_stage();
    b.pass_tiles(S::TILES);
  }
}

template <class S> __device__ __forceinline__ void finish_experts(Control& b) {
  const Routes& routes = routes_of(b);
  if constexpr (S::FIRST) {
    b.wait_routes(&routes_of(b).routed);
    weigh_experts<typename S::Route>(b);
  }
  const u32 lane = anew(lane_id()), rows = b.rows();
  const u32 count = Listed<S>::count(routes), first = b.first_tile();
  b.pass_tiles(S::FIRST ? count * S::TILES : S::TILES);
  auto row_of = [&](u32 slice) { return slice * SLICE_ROWS + lane / 4; };
  auto chosen_by = [&](u32 row, u32 number) {
    const u32 n = Listed<S>::chosen(routes, number);
    const u32 slot = Listed<S>::FORESEEN && n == NOT_CHOSEN ? NO_SLOT : routes.slot[row][n];
    const bool active = row < rows && slot != NO_SLOT;
    return Chosen{Listed<S>::expert(routes, number), active ? slot : NO_SLOT, active && !S::FIRST ? routes.weight[row][slot] : 0.f};
  };
  auto tile = [&](u32 number, u32 tile) {
    const u32 feature = tile * OCTET + 2 * (lane % 4);
    Chosen chosen[SLICES];
    typename S::Carry carry[SLICES] = {};
    // Behind its last expert a row is complete, whether it has chosen that one or not.
    const bool last = S::PREPARES && number + 1 == count;
    float2 gain = {}, whole[SLICES] = {}, v[SLICES][S::OPERANDS];
    each_slice(rows, [&](u32 slice) {
      const u32 row = row_of(slice);
      chosen[slice] = chosen_by(row, number);
      if (chosen[slice].slot != NO_SLOT) S::before(b, row, feature, chosen[slice], carry[slice]);
      if constexpr (S::PREPARES) {
        if (last && row < rows) whole[slice] = *S::sum(b, row, feature);
      }
    });
    if constexpr (S::PREPARES) {
      if (last) gain = gain_ahead<S>(b, feature);
    }
    b.wait_sums();
    each_slice(rows, [&](u32 slice) { add_sums<S>(b, slice, lane, v[slice]); });
    b.pass_sums(Sums<S>::BUFFERS);
    each_slice(rows, [&](u32 slice) {
      const u32 row = row_of(slice);
      const bool own = chosen[slice].slot != NO_SLOT;
      if (own) S::finish(b, row, feature, chosen[slice], v[slice], carry[slice]);
      if constexpr (S::PREPARES) {
        if (last) prepare<S>(b, row < rows, row, feature, own ? v[slice][0] : whole[slice], gain);
      }
    });
  };
  bool own = !b.second;
  if constexpr (S::FIRST) {
    if constexpr (Team<S>::TELLS_SCALES) {
      if (first < count * S::TILES) b.wait_scales();
    }
    for (u32 n = first; n < count * S::TILES; n += gridDim.x, own = !own) {
      if (own) tile(n / S::TILES, n % S::TILES);
      else pass_tile<S>(b);
    }
  } else {
    if constexpr (Team<S>::SHORT) {
      // Both warps have every other octet of each tile.
      constexpr u32 EACH = S::TILE_OCTETS / 2;
      static_assert(S::TILES * S::TILE_OCTETS * OCTET == S::COLS);
      const u32 half = b.second;
      for (u32 t = first; t < S::TILES; t += gridDim.x) {
        auto feature = [&](u32 i) { return (t * S::TILE_OCTETS + half + 2 * i) * OCTET + 2 * (lane % 4); };
        float2 sum[SLICES][EACH] = {}, gain[EACH];
        // What the end needs is asked for here: nobody would wait for it then but all SMs.
        if constexpr (S::PREPARES) {
#pragma unroll
          for (u32 i = 0; i < EACH; ++i) gain[i] = gain_ahead<S>(b, feature(i));
        }
        each_slice(rows, [&](u32 slice) {
          const u32 row = row_of(slice);
#pragma unroll
          for (u32 i = 0; i < EACH; ++i) {
            if (row < rows) sum[slice][i] = *S::sum(b, row, feature(i));
          }
        });
        // An expert's tile must not take these warps longer than it takes memory, or all others wait for them: what the
        // expert is to a row is looked up one slot ahead, and sums are read at once, without conditions. (With a branch
        // for each octet the consumers of a rank of MiMo-V2.5-Pro waited a quarter of the stage for buffers.)
        using T = Team<S>;
        Chosen next[T::EXPERTS][SLICES];
        auto look_up = [&](u32 number, u32 slice) {
#pragma unroll
          for (u32 e = 0; e < T::EXPERTS; ++e) {
            next[e][slice] = chosen_by(row_of(slice), least(number + e, count - 1));
            if (e > 0 && number + e >= count) next[e][slice].slot = NO_SLOT;
          }
        };
        each_slice(rows, [&](u32 slice) { look_up(0, slice); });
#pragma unroll 1
        for (u32 number = 0; number < count; number += T::EXPERTS) {
          Chosen own[T::EXPERTS][SLICES];
          float2 scale[T::EXPERTS][EACH], bias[T::EXPERTS][EACH], v[SLICES][EACH][T::EXPERTS];
#pragma unroll
          for (u32 e = 0; e < T::EXPERTS; ++e) {
            each_slice(rows, [&](u32 slice) { own[e][slice] = next[e][slice]; });
            // Asked for in front of the wait.
            const u32 expert = routes.expert[least(number + e, count - 1)];
#pragma unroll
            for (u32 i = 0; i < EACH; ++i) {
              if constexpr (S::Weights::FEATURE_SCALES) {
                scale[e][i] = S::scale(b, expert, feature(i));
              }
              if constexpr (S::BIASED) bias[e][i] = S::bias(b, expert, feature(i));
            }
          }
          b.wait_sums();
          const WarpSums* sums = b.sums(b.sum_buffer, Sums<S>::WARPS) + half * T::MEMBERS;
          each_slice(rows, [&](u32 slice) {
#pragma unroll
            for (u32 i = 0; i < EACH; ++i) {
#pragma unroll
              for (u32 e = 0; e < T::EXPERTS; ++e) {
                const WarpSums* const of = sums + 2 * i * T::MEMBERS + e * T::WARPS;
                float2& all = v[slice][i][e];
                all = of[0][slice][lane];
#pragma unroll
                for (u32 w = 1; w < T::WARPS; ++w) {
                  const float2 more = of[w][slice][lane];
                  all = make_float2(all.x + more.x, all.y + more.y);
                }
              }
            }
            look_up(number + T::EXPERTS, slice);
          });
          b.pass_sums(Sums<S>::BUFFERS);
          each_slice(rows, [&](u32 slice) {
#pragma unroll
            for (u32 e = 0; e < T::EXPERTS; ++e) {
              const Chosen& chosen = own[e][slice];
              const bool any = chosen.slot != NO_SLOT;
#pragma unroll
              for (u32 i = 0; i < EACH; ++i) {
                float2 of = v[slice][i][e];
                if constexpr (S::Weights::FEATURE_SCALES) of = make_float2(of.x * scale[e][i].x, of.y * scale[e][i].y);
                if constexpr (S::BIASED) of = make_float2(of.x + bias[e][i].x, of.y + bias[e][i].y);
                sum[slice][i].x = any ? fmaf(chosen.weight, of.x, sum[slice][i].x) : sum[slice][i].x;
                sum[slice][i].y = any ? fmaf(chosen.weight, of.y, sum[slice][i].y) : sum[slice][i].y;
              }
            }
          });
        }
        each_slice(rows, [&](u32 slice) {
          const u32 row = row_of(slice);
#pragma unroll
          for (u32 i = 0; i < EACH; ++i) {
            if (row < rows) S::store(b, row, feature(i), sum[slice][i]);
            if constexpr (S::PREPARES) {
              prepare<S>(b, row < rows, row, feature(i), sum[slice][i], gain[i]);
            }
          }
        });
      }
    } else {
      // Features stay with one of the warps, for all experts.
      for (u32 number = 0; number < count; ++number) {
        own = !b.second;
        for (u32 t = first; t < S::TILES; t += gridDim.x, own = !own) {
          if (own) tile(number, t);
          else pass_tile<S>(b);
        }
      }
    }
  }
}

// The end of a launch: how many experts rows chose, how many were foreseen, and how many of these for nothing.
__device__ __forceinline__ void report_experts(const Control& b) {
  if (blockIdx.x != 0 || lane_id() != 0 || b.second || !b.args.experts) return;
  const Routes& routes = routes_of(b);
  const u32 counts[3] = {routes.total, routes.all_foreseen, routes.all_wrong};
#pragma unroll
  for (u32 i = 0; i < 3; ++i) store_host(b.args.experts + i, load_host(b.args.experts + i) + counts[i]);
}
