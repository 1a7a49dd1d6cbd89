//! Attention against a scalar softmax in f64, and the independence of its rows.
#![cfg(feature = "llvm")]

mod common;

use common::*;
use tilec_ir::abi::{KvLayout, KvType};
use tilec_kernels_gen::Target;
use tilec_kernels_gen::attention::Attention;

/// A cache of random keys and values, with sequences spread over shuffled pages.
struct Cache {
    layout: KvLayout,
    per_sequence: usize,
    table: Vec<u32>,
    data: Bytes,
}

impl Cache {
    fn random(layout: KvLayout, sequences: usize, per_sequence: usize, random: &mut Random) -> Cache {
        let pages = sequences * per_sequence;
        let mut table: Vec<u32> = (0..pages as u32).collect();
        for i in (1..pages).rev() {
            table.swap(i, random.bits() as usize % (i + 1));
        }
        let mut data = Bytes::new(layout.total_bytes(pages).unwrap());
        let size = layout.kv_type.bytes();
        for at in (0..data.bytes().len()).step_by(size) {
            let v = random.unit();
            match layout.kv_type {
                KvType::F32 => data.put(at, &v.to_le_bytes()),
                KvType::F16 => data.put(at, &half::f16::from_f32(v).to_le_bytes()),
                KvType::Bf16 => data.put(at, &half::bf16::from_f32(v).to_le_bytes()),
            }
        }
        Cache { layout, per_sequence, table, data }
    }

    fn read(&self, sequence: usize, position: usize, head: usize, value: bool, column: usize) -> f64 {
        let l = &self.layout;
        let page = self.table[sequence * self.per_sequence + position / l.page_tokens] as usize;
        let inside = position % l.page_tokens;
        let element = match value {
            false => (inside / 16 * l.qk_dim + column) * 16 + inside % 16,
            true => inside * l.v_pad() + column,
        };
        let base = l.block_offset(self.table.len(), 0, page, head) + if value { l.v_offset() } else { 0 };
        let at = base + element * l.kv_type.bytes();
        let bytes = self.data.bytes();
        f64::from(match l.kv_type {
            KvType::F32 => self.data.f32_at(at),
            KvType::F16 => half::f16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).to_f32(),
            KvType::Bf16 => half::bf16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).to_f32(),
        })
    }
}

/// Rows of one step.
struct Step {
    q: Vec<f32>,
    q_stride: usize,
    positions: Vec<u32>,
    sequences: Vec<u32>,
    sinks: Vec<f32>,
    ends: Vec<u32>,
}

fn reference(spec: &Attention, cache: &Cache, step: &Step, row: usize, head: usize) -> Vec<f64> {
    let l = &spec.layout;
    let (position, sequence) = (step.positions[row] as usize, step.sequences[row] as usize);
    let first = spec.window.map_or(0, |w| (position + 1).saturating_sub(w));
    let q = &step.q[row * step.q_stride + head * l.qk_dim..][..l.qk_dim];
    let end = match (spec.bidirectional, spec.window) {
        (false, _) => position,
        (true, None) => step.ends[row] as usize,
        (true, Some(window)) => (step.ends[row] as usize).min(position + window - 1),
    };
    let scores: Vec<f64> = (first..=end)
        .map(|p| {
            let dot: f64 = (0..l.qk_dim)
                .map(|d| f64::from(q[d]) * cache.read(sequence, p, head / spec.group, false, d))
                .sum();
            let score = dot * f64::from(spec.scale);
            spec.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
        })
        .collect();
    let sink = if spec.sinks { f64::from(step.sinks[head]) } else { f64::NEG_INFINITY };
    let largest = scores.iter().copied().fold(sink, f64::max);
    let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum::<f64>() + (sink - largest).exp();
    (0..l.v_dim)
        .map(|c| {
            let terms = scores.iter().enumerate().map(|(i, s)| {
                (s - largest).exp() * cache.read(sequence, first + i, head / spec.group, true, c)
            });
            terms.sum::<f64>() / total
        })
        .collect()
}

/// The output of rows `start..end`, all other rows NaN.
fn run(address: usize, spec: &Attention, cache: &Cache, step: &Step, start: usize, end: usize) -> Vec<f32> {
    let l = &spec.layout;
    let out_stride = l.kv_heads * spec.group * l.v_dim + 2;
    let mut out = vec![f32::NAN; step.positions.len() * out_stride];
    let mut scratch = Bytes::new(spec.scratch_bytes());
    for head in 0..l.kv_heads {
        call!(
            address,
            step.q.as_ptr(),
            step.q_stride,
            step.positions.as_ptr(),
            step.sequences.as_ptr(),
            cache.table.as_ptr(),
            cache.per_sequence,
            cache.data.as_ptr(),
            head,
            start,
            end,
            step.sinks.as_ptr(),
            out.as_mut_ptr(),
            out_stride,
            scratch.as_mut_ptr(),
            step.ends.as_ptr(),
        );
    }
    out
}

fn check(name: &str, target: &Target, spec: &Attention, cache: &Cache, step: &Step) {
    let l = &spec.layout;
    let heads = l.kv_heads * spec.group;
    let out_stride = heads * l.v_dim + 2;
    let rows = step.positions.len();
    with_kernel(
        target,
        |k| k.attention("attention", spec),
        |address| {
            let all = run(address, spec, cache, step, 0, rows);
            for row in 0..rows {
                for head in 0..heads {
                    let want = reference(spec, cache, step, row, head);
                    for (c, want) in want.iter().enumerate() {
                        let got = all[row * out_stride + head * l.v_dim + c];
                        close(got, *want, 3e-6, || format!("{name} {spec:?} row {row} head {head} {c}"));
                    }
                }
                assert!(all[row * out_stride + heads * l.v_dim].is_nan(), "{name}: written past the heads");
                // The same row by itself.
                let alone = run(address, spec, cache, step, row, row + 1);
                let range = row * out_stride..row * out_stride + heads * l.v_dim;
                assert_eq!(bits(&alone[range.clone()]), bits(&all[range]), "{name} {spec:?} row {row}");
            }
            // From an odd row on: other blocks of rows.
            let some = run(address, spec, cache, step, 1, rows);
            assert_eq!(bits(&some[out_stride..]), bits(&all[out_stride..]), "{name} {spec:?}");
        },
    );
}

fn case(spec: Attention, positions: &[(u32, u32)], seed: u64) {
    let mut random = Random(seed);
    let l = spec.layout;
    let longest = positions.iter().map(|(_, p)| *p as usize + 1).max().unwrap();
    let sequences = positions.iter().map(|(s, _)| *s as usize + 1).max().unwrap();
    let cache = Cache::random(l, sequences, longest.div_ceil(l.page_tokens), &mut random);
    let heads = l.kv_heads * spec.group;
    let q_stride = heads * l.qk_dim + 1;
    let step = Step {
        q: random.units(positions.len() * q_stride).iter().map(|v| v * 3.0).collect(),
        q_stride,
        positions: positions.iter().map(|(_, p)| *p).collect(),
        sequences: positions.iter().map(|(s, _)| *s).collect(),
        sinks: random.units(heads),
        ends: positions
            .iter()
            .map(|(s, _)| positions.iter().filter(|(t, _)| t == s).map(|(_, p)| *p).max().unwrap())
            .collect(),
    };
    for (name, target) in targets() {
        check(name, &target, &spec, &cache, &step);
    }
}

fn spec(kv_type: KvType, group: usize, qk_dim: usize, v_dim: usize, page_tokens: usize) -> Attention {
    let layout = KvLayout { kv_type, layers: 1, kv_heads: 2, qk_dim, v_dim, page_tokens };
    Attention { layout, group, scale: 0.125, softcap: None, window: None, sinks: false, bidirectional: false }
}

/// Rows of one sequence from `first` on.
fn prompt(sequence: u32, first: u32, rows: u32) -> Vec<(u32, u32)> {
    (first..first + rows).map(|p| (sequence, p)).collect()
}

#[test]
fn prompts_and_single_rows() {
    let mut rows = prompt(1, 0, 9);
    rows.extend([(0, 300)]);
    rows.extend(prompt(2, 250, 8));
    case(spec(KvType::F16, 3, 64, 64, 64), &rows, 1);
}

#[test]
fn groups_and_dimensions() {
    let rows = [prompt(0, 14, 5), vec![(1, 0), (2, 47)]].concat();
    case(spec(KvType::F32, 1, 16, 16, 16), &rows, 2);
    case(spec(KvType::Bf16, 8, 128, 128, 32), &rows, 3);
    case(spec(KvType::F16, 9, 40, 24, 16), &rows, 4);
    case(spec(KvType::Bf16, 5, 192, 128, 64), &rows, 5);
}

#[test]
fn windows_sinks_and_caps() {
    let rows = [prompt(0, 500, 9), vec![(1, 0)], prompt(2, 254, 5)].concat();
    let base = spec(KvType::Bf16, 4, 64, 64, 32);
    case(Attention { window: Some(7), sinks: true, ..base }, &rows, 6);
    case(Attention { window: Some(128), ..base }, &rows, 7);
    case(Attention { sinks: true, softcap: Some(5.0), ..base }, &rows, 8);
    case(Attention { window: Some(100_000), ..base }, &rows, 9);
    for window in [None, Some(2), Some(7), Some(128), Some(100_000)] {
        case(Attention { window, bidirectional: true, sinks: window == Some(7), ..base }, &rows, 10);
    }
}
