//! A row's bits do not depend on its company: the number of rows in the step, the other sequences,
//! where the step was cut, or the number of threads.

use tilec_ir::spec::{Activations, ModelSpec, Target};
use tilec_runtime::engine::{Engine, RowInput};
use tilec_tests::{Fixture, load, reset};

const POSITIONS: usize = 40;

/// Token of a sequence at a position; sequences share no prefix.
fn token(sequence: usize, position: usize, vocab: usize) -> u32 {
    ((sequence * 7919 + position * 104_729 + position * position * 31) % vocab) as u32
}

/// Bits of the logits of every position of a sequence, by position.
type Bits = Vec<Vec<u32>>;

fn vocab(engine: &Engine) -> usize {
    engine.plan().vocab
}

fn take(logits: &[f32], vocab: usize, row: usize) -> Vec<u32> {
    logits[row * vocab..][..vocab].iter().map(|x| x.to_bits()).collect()
}

/// One row a step.
fn alone(engine: &mut Engine, sequence: usize) -> Bits {
    chunked(engine, sequence, 1)
}

/// `rows` rows of one sequence a step.
fn chunked(engine: &mut Engine, sequence: usize, rows: usize) -> Bits {
    let vocab = vocab(engine);
    reset(engine);
    let mut bits = Vec::new();
    for start in (0..POSITIONS).step_by(rows) {
        let step: Vec<RowInput> = (start..(start + rows).min(POSITIONS))
            .map(|position| RowInput {
                token: token(sequence, position, vocab),
                position: position as u32,
                sequence: 0,
            })
            .collect();
        let wanted: Vec<u32> = (0..step.len() as u32).collect();
        let logits = engine.step(&step, &wanted).unwrap();
        bits.extend((0..step.len()).map(|row| take(logits, vocab, row)));
    }
    bits
}

/// One row of each of `company` sequences a step; `sequence` is in place `place` and starts when the
/// others are `ahead` positions further.
fn in_company(engine: &mut Engine, sequence: usize, company: usize, place: usize, ahead: usize) -> Bits {
    let vocab = vocab(engine);
    reset(engine);
    let mut bits = Vec::new();
    for time in 0..POSITIONS + ahead {
        let mut step = Vec::new();
        let mut mine = None;
        for slot in 0..company {
            let (whose, position) = match slot == place {
                true if time < ahead => continue,
                true => (sequence, time - ahead),
                false => (100 + slot, time),
            };
            if slot == place {
                mine = Some(step.len());
            }
            step.push(RowInput {
                token: token(whose, position, vocab),
                position: position as u32,
                sequence: slot as u32,
            });
        }
        let wanted: Vec<u32> = (0..step.len() as u32).collect();
        let logits = engine.step(&step, &wanted).unwrap();
        bits.extend(mine.map(|row| take(logits, vocab, row)));
    }
    bits
}

fn spec(fixture: &Fixture, change: impl Fn(&mut ModelSpec)) -> ModelSpec {
    let mut spec = fixture.spec();
    spec.limits.rows = 17;
    spec.limits.sequences = 17;
    change(&mut spec);
    spec
}

fn check(name: &str, change: impl Fn(&mut ModelSpec)) {
    let fixture = Fixture::open(name);
    let spec = spec(&fixture, change);
    let expected = alone(&mut load(&fixture, &spec, 1).engine, 3);
    assert!(expected.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{name}");
    assert_ne!(expected[0], expected[1], "{name}: the logits do not depend on the input");
    for threads in [1, 2] {
        let mut loaded = load(&fixture, &spec, threads);
        let engine = &mut loaded.engine;
        assert!(alone(engine, 3) == expected, "{name}, {threads} threads: alone");
        for rows in [3, 8, 16, 17] {
            assert!(chunked(engine, 3, rows) == expected, "{name}, {threads} threads: {rows} rows a step");
        }
        for (company, place, ahead) in [(3, 1, 0), (8, 7, 5), (17, 0, 3), (17, 16, 11)] {
            let bits = in_company(engine, 3, company, place, ahead);
            assert!(
                bits == expected,
                "{name}, {threads} threads: place {place} of {company}, {ahead} behind"
            );
        }
    }
}

#[test]
fn float_weights() {
    check("hf/llama-gqa-tied", |_| {});
}

#[test]
fn odd_sizes() {
    check("hf/llama-odd", |_| {});
}

#[test]
fn windows_and_qk_norm() {
    check("hf/qwen3-window-classic", |_| {});
}

#[test]
fn quantized_weights_and_activations() {
    for name in ["gguf/llama-q4_0", "gguf/llama-q8_0", "gguf/llama-k", "gguf/qwen3-q4_1", "gguf/qwen3-mxfp4"]
    {
        check(name, |_| {});
    }
}

/// Which rows share an expert depends on the company; the bits do not.
#[test]
fn mixtures_of_experts() {
    for name in ["hf/qwen3-moe", "hf/qwen3-moe-sparse-step", "hf/gpt-oss", "hf/mimo-v2", "hf/mimo-v2-groups"]
    {
        check(name, |_| {});
    }
    check("hf/gpt-oss", |spec| spec.precision.activations = Activations::F32);
    let mxfp4 = tilec_ir::spec::WeightFormat::Converted(tilec_ir::format::Format::MXFP4);
    check("hf/qwen3-moe", |spec| spec.precision.experts = Some(mxfp4));
}

/// With integer products even the instruction set makes no difference.
#[cfg(target_arch = "x86_64")]
#[test]
fn any_instruction_set() {
    if !std::is_x86_feature_detected!("avx2") || !std::is_x86_feature_detected!("fma") {
        println!("not run: this processor has no AVX2 to compare with");
        return;
    }
    for name in ["gguf/llama-q8_0", "gguf/qwen3-q4_1", "gguf/qwen3-mxfp4"] {
        let fixture = Fixture::open(name);
        let on = |arch: &str| {
            let spec = spec(&fixture, |spec| spec.target.arch = arch.into());
            chunked(&mut load(&fixture, &spec, 2).engine, 3, 8)
        };
        assert!(on("x86-64-v3") == on(Target::HOST), "{name}: AVX2 and this processor differ");
    }
}

#[test]
fn quantized_weights_with_float_activations() {
    check("gguf/qwen3-q4_1", |spec| spec.precision.activations = Activations::F32);
}
