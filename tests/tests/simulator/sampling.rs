//! The choice of tokens in the kernel against the host's sampler: the very same tokens.

use super::*;
use tilec_kernels_gen::cuda::{BASE, BLOCK, FORMATS, HANDOFF, SAMPLE};
use tilec_runtime::sampling::{Sampler, SamplingError, SamplingParams, uniform};

/// The choice behind a head that only finds each row's best one of given logits; step by step, positions rise.
const CHOOSER: &str = r#"
__device__ __forceinline__ bool deal_caches(Control&) { return false; }
__device__ __forceinline__ void foresee_experts(const Block&, u32) {}

extern "C" __global__ void tilec_resident(const LaunchArgs& args) {
  const u32 vocab = args.pages_per_sequence, rows = args.logit_rows;
  if (rows == 0) {
    // In place of tokens, a digest of all weights: that of `sampling::tests`.
    u64 digest = 0;
    for (u32 n = 0; n <= 400000; ++n) digest = digest * 0x9e3779b97f4a7c15ull + sample_weight((float)n / 10000.f);
    store_host(args.chosen, (u32)digest);
    store_host(args.chosen + 1, (u32)(digest >> 32));
    return;
  }
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  if (threadIdx.x == 0) {
    barrier_init(&shared.ready, 1);
    barrier_init(&shared.done, CONSUMERS + 1);
    shared.steps = args.steps;
    shared.stage = shared.crossings = shared.step = shared.round = shared.rounds = 0;
    for (u32 row = 0; row < rows; ++row) {
      shared.logit_row[row] = rows - 1 - row;
      shared.position[rows - 1 - row] = args.positions[row];
    }
  }
  __syncthreads();
  LaunchArgs own = args;
  own.logits = reinterpret_cast<float*>(const_cast<u8*>(args.weights));
  const Block block = {own, shared, nullptr, shared_memory() + sizeof(Shared), 0, 0, 0, blockIdx.x};
  if (warp_id() < CONSUMERS) {
    Consumer b(block);
    sample_begin(b, vocab);
    for (;;) {
      b.wait_inputs();
      if (shared.round != 0) {
        sample_round(b, vocab, shared.round);
        continue;
      }
      if (b.step >= shared.steps) break;
      if (threadIdx.x < rows && threadIdx.x % gridDim.x == blockIdx.x) {
        // As the head's epilogue finds it.
        const float* logits = own.logits + (u64)threadIdx.x * vocab;
        u32 best = 0;
        for (u32 id = 1; id < vocab; ++id) best = logits[id] > logits[best] ? id : best;
        b.sync().best[b.step % 3][threadIdx.x] = (u64)ordered(logits[best]) << 32 | (u32)~best;
      }
      b.finish_stage();
      b.next_step();
    }
  } else if (warp_id() == CONTROL || warp_id() == SECOND) {
    Control b(block, warp_id() == SECOND);
    for (b.open_step(); b.step < shared.steps; b.open_step()) {
      b.cross();
      if (!b.second) {
        b.choose_by_chance();
        if (lane_id() < rows) {
          if (blockIdx.x == 0) {
            store_host(args.chosen + b.step * LAUNCH_ROWS + lane_id(), ~(u32)load_relaxed(&b.sync().best[b.step % 3][lane_id()]) + 1);
            b.sync().best[(b.step + 2) % 3][lane_id()] = 0;
          }
          ++shared.position[lane_id()];
        }
      }
      b.next_step();
    }
  }
}
"#;

/// Sizes that the headers ask for.
const SIZES: &str = "constexpr u32 STEP_ROWS = 32, SLOT_BYTES = 16384, RING_SLOTS = 4, STAGES = 1, SCRATCH_BYTES = 15616, SCALE_BYTES = 0;
constexpr bool ROUND = false;
constexpr u32 DEALS = 0;
__device__ __forceinline__ u32 first_stage(u32) { return 0; }
constexpr bool FORESEES = false;
constexpr u32 MAILBOXES = 0, MAILBOX_ROW_BYTES[1] = {}, MAILBOX_OCTETS[1] = {}, STAGE_CLEARS[1] = {};
constexpr u64 MAILBOX_AT[1] = {};";

/// The choice alone, of logits of any kind.
struct Chooser(tempfile::TempDir);

/// Blocks, steps and a seed of a launch.
#[derive(Clone, Copy)]
struct Run {
    blocks: usize,
    steps: usize,
    seed: u64,
}

impl Chooser {
    fn new() -> Chooser {
        let folder = tempfile::tempdir().unwrap();
        let texts = [
            BASE.text,
            "#include \"ptx.h\"",
            FORMATS.text,
            SIZES,
            HANDOFF.text,
            BLOCK.text,
            SAMPLE.text,
            CHOOSER,
        ];
        build(folder.path(), &texts.join("\n"));
        for name in ["kv.bin", "draft_kv.bin", "taps.bin"] {
            std::fs::write(folder.path().join(name), []).unwrap();
        }
        Chooser(folder)
    }

    /// A token for every row of `logits`, each of `vocab`, behind its position, in every step.
    fn choose(&self, logits: &[f32], vocab: usize, rows: &[(SampleRow, u32)], run: Run) -> Vec<Vec<u32>> {
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        std::fs::write(self.0.path().join("weights.bin"), bytes).unwrap();
        let shared_bytes = 4096 + 15616;
        let sizes = [256, 2048, 1, rows.len(), rows.len(), run.steps, vocab, 1, shared_bytes, 0, 0];
        let mut launch: Vec<u32> = sizes.map(|size| size as u32).to_vec();
        let positions: Vec<u32> = rows.iter().map(|(_, position)| *position).collect();
        launch.extend([0; LAUNCH_ROWS]);
        launch.extend(&positions);
        launch.resize(sizes.len() + 4 * LAUNCH_ROWS, 0);
        launch.extend(sampling_words(&rows.iter().map(|(row, _)| *row).collect::<Vec<_>>()));
        launch.resize(LAUNCH_WORDS, 0);
        let bytes: Vec<u8> = launch.iter().flat_map(|word| word.to_le_bytes()).collect();
        std::fs::write(self.0.path().join("launch.bin"), bytes).unwrap();
        let mut command = Command::new(self.0.path().join("simulator"));
        let output =
            command.arg(self.0.path()).args([run.blocks.to_string(), run.seed.to_string()]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let chosen = words(&std::fs::read(self.0.path().join("chosen.bin")).unwrap());
        let tokens = |step: &[u32]| step[..rows.len()].iter().map(|word| word.wrapping_sub(1)).collect();
        chosen.chunks(LAUNCH_ROWS).map(tokens).collect()
    }

    /// Wants the host's tokens of all rows and steps; those of the first step.
    fn check(&self, logits: &[f32], vocab: usize, rows: &[(SamplingParams, u32)], run: Run) -> Vec<u32> {
        let given: Vec<_> = rows.iter().map(|(params, position)| (params.launch_row(), *position)).collect();
        let found = self.choose(logits, vocab, &given, run);
        for (step, found) in found.iter().enumerate() {
            for (((params, position), own), token) in rows.iter().zip(logits.chunks(vocab)).zip(found) {
                let position = u64::from(*position) + step as u64 + 1;
                let wanted = match Sampler::new(params.clone()).unwrap().sample(own, position) {
                    Ok(choice) => choice.token,
                    Err(SamplingError::Logit { .. }) => tilec_ir::launch::BROKEN_LOGITS,
                    Err(SamplingError::Nothing { .. }) => tilec_ir::launch::NO_LOGITS,
                    Err(error) => panic!("{error}"),
                };
                let Run { blocks, seed, .. } = run;
                let place = format!("{vocab} tokens, {blocks} blocks, seed {seed}, step {step}");
                assert_eq!(*token, wanted, "{place}, {params:?}");
            }
        }
        found.into_iter().next().unwrap()
    }
}

/// Numbers without a pattern, from 0 to below 1.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f64 {
        self.0 += 1;
        uniform(2, self.0)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() * end as f64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

fn parameters(numbers: &mut Numbers, vocab: usize) -> SamplingParams {
    let top_k = match numbers.below(4) {
        0 | 1 => 0,
        2 => 1 + numbers.below(50),
        _ => 1 + numbers.below(vocab + vocab / 8),
    };
    SamplingParams {
        temperature: numbers.pick(&[0.2, 0.7, 1.0, 1.0, 2.5, 1e-30, 60.0]),
        top_k: top_k as u32,
        top_p: if numbers.below(2) == 0 { 1.0 } else { numbers.next().powf(0.2) as f32 },
        min_p: if numbers.below(2) == 0 { 0.0 } else { numbers.next().powi(5) as f32 },
        seed: (numbers.next() * 1e15) as u64,
        ..SamplingParams::default()
    }
}

/// Logits as a model may have them: spread widely or narrowly, with equal ones, with -infinity.
fn random_logits(numbers: &mut Numbers, vocab: usize) -> Vec<f32> {
    let spread = numbers.pick(&[0.001, 0.2, 2.0, 6.0, 40.0]);
    let steps = numbers.pick(&[1e6, 1e6, 32.0, 1.0]);
    let gone = numbers.pick(&[0.0, 0.0, 0.01, 0.98]);
    let mut logits: Vec<f32> = (0..vocab)
        .map(|_| {
            let normal = (0..6).map(|_| numbers.next() - 0.5).sum::<f64>();
            let logit = (normal * steps).round() / steps * spread - 3.0;
            if numbers.next() < gone { f32::NEG_INFINITY } else { logit as f32 }
        })
        .collect();
    let finite = numbers.below(vocab);
    logits[finite] = numbers.pick(&[0.0, -0.0, 1e-20, 5.0]);
    logits
}

/// As many rows as blocks and more, and fewer, whose ids several blocks share.
#[test]
fn kernels_choose_the_very_tokens_of_the_host() {
    let chooser = Chooser::new();
    let mut numbers = Numbers(0);
    for (vocab, rounds) in [(1, 2), (7, 3), (256, 4), (1001, 12), (5003, 16), (70_001, 2)] {
        for round in 0..rounds {
            let blocks = numbers.pick(&[1, 3, 4, 7, 11]);
            let count = numbers.pick(&[1, 1, 2, 3, 5, 8, LAUNCH_ROWS]);
            let mut logits = Vec::new();
            let mut rows = Vec::new();
            for row in 0..count as u32 {
                logits.extend(random_logits(&mut numbers, vocab));
                rows.push((parameters(&mut numbers, vocab), row * 977 + round));
            }
            let steps = if vocab > 10_000 { 1 } else { numbers.pick(&[1, 2, 5]) };
            chooser.check(&logits, vocab, &rows, Run { blocks, steps, seed: u64::from(round) });
        }
    }
}

/// Where sums overflowed halves, or rounds of one step met those of the next, this would show: rows that take one look
/// beside rows that take many, step after step, on many blocks.
#[test]
fn rows_that_take_many_rounds_do_not_disturb_others() {
    let chooser = Chooser::new();
    let vocab = 4099;
    let mut numbers = Numbers(3_000_000);
    let d = SamplingParams::default;
    let params = [
        SamplingParams { seed: 1, ..d() },
        SamplingParams { top_k: 3000, top_p: 0.9, seed: 2, ..d() },
        SamplingParams::greedy(),
        SamplingParams { temperature: 1e-30, top_p: 0.5, ..d() },
        SamplingParams { top_p: 0.95, min_p: 0.2, seed: 3, ..d() },
    ];
    // Of the second row, all are equal; of the last one, all lie close together.
    let mut logits: Vec<f32> = (0..vocab * params.len()).map(|_| 9.0 * numbers.next() as f32).collect();
    logits[vocab..2 * vocab].fill(-2.5);
    logits[4 * vocab..].iter_mut().for_each(|logit| *logit *= 0.01);
    let rows: Vec<_> = params.into_iter().zip([5, 70, 2, 0, 9]).collect();
    for (blocks, seed) in [(3, 1), (17, 2)] {
        chooser.check(&logits, vocab, &rows, Run { blocks, steps: 7, seed });
    }
    // One row has them all.
    chooser.check(&logits[vocab..2 * vocab], vocab, &rows[1..2], Run { blocks: 19, steps: 4, seed: 3 });
}

#[test]
fn weights_have_the_bits_of_the_hosts() {
    let chooser = Chooser::new();
    chooser.choose(&[0.0], 1, &[], Run { blocks: 3, steps: 1, seed: 0 });
    let digest = words(&std::fs::read(chooser.0.path().join("chosen.bin")).unwrap());
    assert_eq!(digest[..2], WEIGHT_DIGEST);
}

/// As in the tests of the host's weights.
const WEIGHT_DIGEST: [u32; 2] = [3798205818, 2881840929];

/// Many tokens so far from the best one that they are not counted at first, and yet weigh as much together.
#[test]
fn kernels_count_what_is_far_away() {
    let chooser = Chooser::new();
    let mut numbers = Numbers(7_000_000);
    let vocab = 70_001;
    let mut far = 0;
    for (round, blocks) in (0..).zip([3, 9, 24]) {
        // 16 to 17 powers of two.
        let mut logits: Vec<f32> = (0..vocab * 8).map(|_| -11.8 + 0.6 * numbers.next() as f32).collect();
        let mut rows = Vec::new();
        for row in 0..8 {
            logits[row * vocab + numbers.below(vocab)] = 0.0;
            let cut = SamplingParams {
                top_k: 20_000 + numbers.below(50_000) as u32,
                top_p: numbers.pick(&[1.0, 0.95]),
                seed: round * 100 + row as u64,
                ..SamplingParams::default()
            };
            rows.push((cut, 1000 * row as u32));
        }
        let found = chooser.check(&logits, vocab, &rows, Run { blocks, steps: 1, seed: round });
        far +=
            found.iter().zip(logits.chunks(vocab)).filter(|(token, own)| own[**token as usize] < 0.0).count();
    }
    assert!((4..20).contains(&far), "{far} of 24 tokens");
}

/// All equal, so that ids alone tell ranks apart; and logits that nothing can be chosen from.
#[test]
fn kernels_choose_among_equals_and_say_where_nothing_can_be_chosen() {
    let chooser = Chooser::new();
    let vocab = 3000;
    let d = SamplingParams::default;
    let params = [
        SamplingParams { top_k: 2100, seed: 1, ..d() },
        SamplingParams { top_p: 0.7, seed: 2, ..d() },
        SamplingParams { top_k: 2999, top_p: 0.999, min_p: 1.0, seed: 3, ..d() },
        SamplingParams { seed: 4, ..d() },
        SamplingParams { top_p: f32::MIN_POSITIVE, ..d() },
        SamplingParams { top_k: 5, ..d() },
        d(),
        SamplingParams { min_p: 0.3, ..d() },
    ];
    let rows = params.map(|params| (params, 40));
    for blocks in [3, 21] {
        let run = Run { blocks, steps: 2, seed: 1 };
        let mut logits = vec![0.25; vocab * rows.len()];
        let found = chooser.check(&logits, vocab, &rows, run);
        assert!(found.iter().any(|token| *token > 512), "{found:?}");
        logits[7] = f32::NAN;
        logits[vocab + 2999] = f32::NAN;
        logits[2 * vocab + 1500] = f32::INFINITY;
        logits[3 * vocab] = f32::INFINITY;
        logits[4 * vocab..5 * vocab].fill(f32::NEG_INFINITY);
        logits[6 * vocab..7 * vocab].fill(f32::NEG_INFINITY);
        logits[7 * vocab] = -f32::NAN;
        let found = chooser.check(&logits, vocab, &rows, run);
        assert_eq!(found.iter().filter(|token| **token >= tilec_ir::launch::NO_LOGITS).count(), 7);
    }
}

#[test]
fn launches_of_several_steps_choose_for_each_row_by_its_own_parameters() {
    let simulation = Simulation::new(&llama(), Format::BF16, None, 256);
    let vocab = simulation.program.vocab;
    let d = SamplingParams::default;
    let params = [
        SamplingParams::greedy(),
        SamplingParams { temperature: 3.0, seed: 9, ..d() },
        SamplingParams { temperature: 2.0, top_k: 12, top_p: 0.8, seed: 1 << 40, ..d() },
        SamplingParams { top_p: 0.9, min_p: 0.1, ..d() },
    ];
    let rows: Vec<Row> = (0..4).map(|n| row(n as u32 * 7, 0, n)).collect();
    let wanted: Vec<usize> = (0..4).collect();
    let given = params.clone().map(|params| params.launch_row());
    let before = simulation.cache();
    let mut expected = Vec::new();
    let mut at = rows.clone();
    for step in 0..5 {
        let single = simulation.launch(&at, 1, 3, step);
        for ((row, params), logits) in at.iter_mut().zip(&params).zip(single.logits.chunks(vocab)) {
            row.position += 1;
            let mut sampler = Sampler::new(params.clone()).unwrap();
            row.token = sampler.sample(logits, row.position as u64).unwrap().token;
            expected.push(row.token);
        }
    }
    for (blocks, seed) in [(2, 7), (5, 8)] {
        simulation.write_cache(&before);
        let launched = simulation.launch_sampled(&rows, &wanted, 5, [blocks, 0, 0], seed, &given);
        assert_eq!(launched.chosen, expected);
    }
    // Not the largest ones, and of rows whose logits are wanted only.
    simulation.write_cache(&before);
    let greedy = simulation.launch(&rows, 5, 3, 9);
    assert_ne!(greedy.chosen, expected);
    let all: Vec<usize> = vec![1, 3];
    simulation.write_cache(&before);
    let two = simulation.launch_sampled(&rows, &all, 1, [3, 0, 0], 10, &[given[1], given[3]]);
    assert_eq!(two.chosen, [expected[1], expected[3]]);
}
