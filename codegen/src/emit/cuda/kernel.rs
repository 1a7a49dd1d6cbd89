//! The order of each role's work in a step, and the kernel itself.

use std::fmt::Write as _;
use tilec_ir::launch::KERNEL;
use tilec_ir::resident::{Attention, Experts, Gemm, Kind, RouterTiles, Stage};

use super::super::merge::NO_WINDOW;
use super::experts::router_name;
use super::{Part, Writer, type_name};

/// A kind of layers whose attention is dealt out alike: the structures of their stages, and one of them.
pub(super) struct Deal {
    /// That of the layer first.
    pub(super) names: Vec<String>,
    /// Query heads, KV heads, and the window.
    pub(super) heads: (usize, usize, u32),
    /// Of the kernel's programs.
    part: usize,
    /// Of all programs, one behind the other.
    layer: usize,
}

impl<'p> Writer<'p> {
    /// The work of each role in a step.
    pub(super) fn roles(&mut self) {
        line!(self, "\n// ---- The step, as each role sees it {}", "-".repeat(63));
        self.deal_caches();
        self.foresee_experts();
        self.role("bool load_step(Loader& b)", "", "return true;", "", |name, kind| match kind {
            Kind::Gemm(_) => format!("if (!stream<{name}>(b, {name}::weights(b))) return false;"),
            Kind::Attention(Attention { router, .. }) => {
                let scores = router
                    .as_ref()
                    .map_or(String::new(), |_| format!("prefetch_router<{}>(b); ", router_name(name)));
                format!("{scores}if (!stream_cache<{name}>(b, LAYER_CACHE[b.layer])) return false;")
            }
            Kind::Scores(scores) => format!("b.pass_tiles({}); b.next_stage();", scores.experts),
            Kind::Experts(Experts { bands: Some(_), .. }) => {
                format!("if (!stream_bands<{name}>(b, {name}::weights(b))) return false;")
            }
            Kind::Experts(_) => {
                format!("if (!stream_experts<{name}>(b, {name}::weights(b))) return false;")
            }
            _ => "b.next_stage();".into(),
        });
        self.role("void consume_step(Consumer& b)", "", "", "", |name, kind| match kind {
            Kind::Embed { .. } => format!("embed<{name}>(b);"),
            Kind::Gemm(_) => format!("multiply<{name}>(b);"),
            Kind::Scores(_) => format!("score_experts<{name}>(b);"),
            Kind::Experts(Experts { bands: Some(_), .. }) => format!("multiply_bands<{name}>(b);"),
            Kind::Experts(_) => format!("multiply_experts<{name}>(b);"),
            Kind::Attention(Attention { router, .. }) => {
                let scores = router
                    .as_ref()
                    .map_or(String::new(), |_| format!(" score_experts<{}>(b);", router_name(name)));
                format!("attend<{name}>(b, LAYER_CACHE[b.layer]);{scores} b.finish_stage();")
            }
            Kind::Taps { .. } => format!("take_taps<{name}>(b);"),
            Kind::Context(_) => format!("cache_context<{name}>(b);"),
            Kind::Conv(_) => format!("convolve<{name}>(b);"),
            Kind::TopK(_) => format!("take_segments<{name}>(b);"),
            Kind::Pairs(_) => format!("score_pairs<{name}>(b);"),
            Kind::Walk { .. } => format!("walk<{name}>(b);"),
        });
        let join = "if (n > 0 && !ends_step(n)) b.join_stage();  // the first with the step";
        let join = &format!("{join}\n    b.settle(n);");
        self.role(
            "void control_step(Control& b)",
            join,
            "",
            "b.cross(CROSSING_CHECKED[n], !ends_step(n + 1));",
            |name, kind| match kind {
                Kind::Embed { .. } | Kind::Taps { .. } | Kind::Context(_) => String::new(),
                Kind::Gemm(_) if asks_forecast(kind) => format!("ask_forecast(b, n); finish<{name}>(b);"),
                Kind::Gemm(_) => format!("finish<{name}>(b);"),
                Kind::Scores(scores) => format!("b.pass_tiles({});", scores.experts),
                Kind::Experts(Experts { gemm, bands: Some(bands), .. }) => {
                    format!("b.pass_tiles({});", bands.tiles(gemm))
                }
                Kind::Experts(_) => format!("finish_experts<{name}>(b);"),
                Kind::Attention(_) | Kind::Conv(_) | Kind::TopK(_) | Kind::Pairs(_) | Kind::Walk { .. } => {
                    String::new()
                }
            },
        );
    }

    /// The kinds of stages, in the order of their numbers, with the prefix of their names.
    pub(super) fn kinds(&self) -> Vec<(String, &'p Stage)> {
        let lists = self.parts.iter().flat_map(Part::lists);
        lists.flat_map(|(prefix, stages)| stages.iter().map(move |stage| (prefix.clone(), stage))).collect()
    }

    /// Kinds of layers whose attention is dealt out alike.
    pub(super) fn deals(&self) -> Vec<Deal> {
        let (mut deals, mut layers) = (Vec::<Deal>::new(), 0);
        for (part, Part { program, windows, prefix, .. }) in self.parts.iter().enumerate() {
            for (number, layer) in program.layers.iter().enumerate() {
                for stage in &program.bodies[layer.body] {
                    let Some(attention) = stage.kind.attention() else { continue };
                    let own = attention.window.map(|window| window as u32);
                    let name = type_name(&format!("{prefix}Layer{}", layer.body), &stage.name);
                    let window = windows.get(number).copied().or(own).unwrap_or(NO_WINDOW);
                    let heads = (attention.heads, attention.kv_heads, window);
                    match deals.iter_mut().find(|other| other.part == part && other.heads == heads) {
                        Some(other) if other.names.contains(&name) => {}
                        Some(other) => other.names.push(name),
                        None => deals.push(Deal { names: vec![name], heads, part, layer: layers + number }),
                    }
                }
            }
            layers += program.layers.len();
        }
        deals
    }

    /// What the second does when a step begins.
    pub(super) fn deal_caches(&mut self) {
        line!(self, "\n__device__ __forceinline__ bool deal_caches(Control& b) {{");
        let round = self.round.is_some();
        for part in 0..self.parts.len() {
            let deals: Vec<Deal> = self.deals().into_iter().filter(|deal| deal.part == part).collect();
            if deals.is_empty() {
                continue;
            }
            if round {
                line!(self, "  if (b.kind() == {part}) {{");
            }
            let indent = if round { "    " } else { "  " };
            for Deal { names, layer, .. } in deals {
                line!(self, "{indent}b.layer = {layer};");
                line!(self, "{indent}deal_units<{}>(b);", names[0]);
            }
            line!(self, "{indent}return true;");
            if round {
                line!(self, "  }}");
            }
        }
        if round || self.deals().is_empty() {
            line!(self, "  return false;");
        }
        line!(self, "}}");
    }

    /// What the watchdog does for the stages that ask for a forecast.
    pub(super) fn foresee_experts(&mut self) {
        let asks = |stage: &Stage| asks_forecast(&stage.kind);
        let chooses = |stage: &Stage| matches!(stage.kind, Kind::Experts(Experts { route: Some(_), .. }));
        let mut cases = Vec::new();
        let mut number = 0;
        for (prefix, stages) in self.parts.iter().flat_map(Part::lists) {
            // A verified program has both.
            let [asks, chooses] = [stages.iter().position(asks), stages.iter().position(chooses)];
            if let Some((asks, chooses)) = asks.zip(chooses) {
                let route = type_name(&type_name(&prefix, &stages[chooses].name), "route");
                cases.push((number + asks, route));
            }
            number += stages.len();
        }
        line!(self, "\n__device__ __forceinline__ void foresee_experts(const Block& b, u32 stage) {{");
        if !cases.is_empty() {
            line!(self, "  switch (STAGE_KIND[stage]) {{");
            for (asks, route) in cases {
                line!(self, "    case {asks}: foresee<{route}>(b); break;");
            }
            line!(self, "  }}");
        }
        line!(self, "}}");
    }

    /// A loop over the step's stages, so that what they share is in the text, and in the SM's cache of
    /// instructions, once.
    pub(super) fn role(
        &mut self,
        signature: &str,
        front: &str,
        end: &str,
        behind: &str,
        work: impl Fn(&str, &Kind) -> String,
    ) {
        line!(self, "\n__device__ __forceinline__ {signature} {{");
        let round = self.round.is_some();
        if round {
            line!(self, "  u32 n = first_stage(b.kind());");
        }
        line!(self, "#pragma unroll 1");
        line!(self, "{}", if round { "  do {" } else { "  for (u32 n = 0; n < STAGES; ++n) {" });
        line!(self, "    b.number = n;");
        line!(self, "    b.layer = STAGE_LAYER[n];");
        if !front.is_empty() {
            line!(self, "    {front}");
        }
        line!(self, "    switch (STAGE_KIND[n]) {{");
        for (number, (prefix, stage)) in self.kinds().into_iter().enumerate() {
            let work = work(&type_name(&prefix, &stage.name), &stage.kind);
            line!(self, "    case {number}: {work}{}break;", if work.is_empty() { "" } else { " " });
        }
        line!(self, "    }}");
        if !behind.is_empty() {
            line!(self, "    {behind}");
        }
        line!(self, "{}", if round { "  } while (!ends_step(++n));" } else { "  }" });
        if !end.is_empty() {
            line!(self, "  {end}");
        }
        line!(self, "}}");
    }

    pub(super) fn kernel(&mut self, experts: bool) {
        // Behind the stages, if the launch asks for it.
        let round = self.round.is_some();
        let (steps, take, choose) = match round {
            true => ("(args.block_passes + 2) * args.steps", "take_sequences", "choose_round"),
            false => ("args.steps", "take_rows", "choose"),
        };
        let ([begin, sample], sampled) = match self.vocab() {
            0 => ([String::new(), String::new()], ""),
            vocab => (
                [
                    format!("\n    if (args.sampling) sample_begin(b, {vocab});"),
                    format!(
                        "\n      const u32 round = *(volatile u32*)&shared.round;\
                         \n      if (round != 0) {{\
                         \n        sample_round(b, {vocab}, round);\
                         \n        continue;\
                         \n      }}"
                    ),
                ],
                match round {
                    true => {
                        "\n        if (args.sampling && !b.second && b.kind() == MODEL_STEP) \
                         b.choose_by_chance();"
                    }
                    false => "\n        if (args.sampling && !b.second) b.choose_by_chance();",
                },
            ),
        };
        // What experts add.
        let (routes_bytes, routed, report) = match experts {
            true => (
                " - ROUTES_BYTES",
                "\n    Routes& routes = *reinterpret_cast<Routes*>(scratch - ROUTES_BYTES);\
                 \n    barrier_init(&routes.routed, CONSUMERS);\
                 \n    barrier_init(&routes.forecast, 1);\
                 \n    routes.total = routes.asks = routes.loaded = routes.all_foreseen = routes.all_wrong = 0;",
                "\n      report_experts(b);",
            ),
            false => ("", "", ""),
        };
        let attentions: Vec<String> = self
            .kinds()
            .iter()
            .filter(|(_, stage)| matches!(stage.kind, Kind::Attention(_)))
            .map(|(prefix, stage)| type_name(prefix, &stage.name))
            .collect();
        line!(self);
        for name in &attentions {
            line!(self, "static_assert(sizeof(AttentionSpace<{name}>) <= SCRATCH_BYTES - SCALE_BYTES);");
        }
        let banded = |kind: &Kind| matches!(kind, Kind::Experts(Experts { bands: Some(_), .. }));
        let bands = self.kinds().into_iter().filter(|(_, stage)| banded(&stage.kind));
        let clears =
            attentions.iter().map(|name| format!("\n    clear_parts<{name}>(b);")).chain(bands.map(
                |(prefix, stage)| format!("\n    clear_bands<{}>(b);", type_name(&prefix, &stage.name)),
            ));
        let clear: String = clears.collect();
        let _ = write!(
            self.text,
            r#"static_assert(sizeof(Shared) <= FIXED_BYTES{routes_bytes});

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) {KERNEL}(const __grid_constant__ LaunchArgs args) {{
  u8* const memory = shared_memory();
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  u8* const scratch = memory + FIXED_BYTES;
  u8* const ring = scratch + SCRATCH_BYTES;
  if (threadIdx.x == 0) {{
    for (u32 i = 0; i < RING_SLOTS; ++i) {{
      barrier_init(&shared.full[i], FULL_ARRIVALS);
      barrier_init(&shared.empty[i], CONSUMERS);
    }}
    barrier_init(&shared.ready, 1);
    for (u64& sent : shared.sent) barrier_init(&sent, 1);
    barrier_init(&shared.opened, 1);
    barrier_init(&shared.scaled, CONSUMERS);
    barrier_init(&shared.done, CONSUMERS + 1);  // and the second{routed}
    for (u32 i = 0; i < SUM_BUFFERS; ++i) {{
      barrier_init(&shared.sums_full[i], CONSUMERS);
      barrier_init(&shared.sums_empty[i], 2);
    }}
    shared.steps = {steps};
    shared.stage = shared.loader_stage = shared.loader_steps = shared.crossings = shared.step = shared.round = shared.rounds = 0;
    for (u32& role : shared.waiting) role = 0;
    for (auto& dealt : shared.dealt_for) dealt[0] = ~0u;  // no runs
    barriers_visible();
  }}
  __syncthreads();
  const Block block = {{args, shared, ring, scratch, 0, 0, 0, blockIdx.x}};
  if (warp_id() < CONSUMERS) {{
    registers_up<CONSUMER_REGISTERS>();
    Consumer b(block);{clear}{begin}
    for (;;) {{
      b.wait_inputs();{sample}
      // Control opens the first stage of a step when it knows whether there is one.
      if (b.step >= *(volatile u32*)&shared.steps) break;
      consume_step(b);
      b.next_step();
    }}
  }} else {{
    registers_down<OTHER_REGISTERS>();
    if (warp_id() == LOADER) {{
      if (lane_id() < LOADER_LANES) {{
        Loader b(block);
        while (b.more() && load_step(b)) b.next_step();
        b.drain();
      }}
    }} else if (warp_id() == CONTROL || warp_id() == SECOND) {{
      Control b(block, warp_id() == SECOND);
      if (!b.second) {take}(b);
      for (b.open_step(); b.step < *(volatile u32*)&shared.steps; b.open_step()) {{
        control_step(b);{sampled}
        b.wait_loader();
        {choose}(b);
      }}{report}
      b.leave();
    }} else {{
      watch(block);
    }}
  }}
}}
"#
        );
    }
}

/// Whether a stage's product asks for a forecast of experts.
pub(super) fn asks_forecast(kind: &Kind) -> bool {
    matches!(kind, Kind::Gemm(Gemm { router: Some(RouterTiles { foresees: true, .. }), .. }))
}
