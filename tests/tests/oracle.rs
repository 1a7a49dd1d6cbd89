//! Logits against implementations that this project did not write: transformers, in float64, on
//! small random checkpoints; and the compiled code against the interpreter on quantized ones.

use std::borrow::Cow;
use std::path::PathBuf;
use tilec_codegen::compile;
use tilec_ir::abi::KvType;
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_ir::spec::{Activations, ModelSpec};
use tilec_runtime::checkpoint::Checkpoint;
use tilec_runtime::engine::{Engine, RowInput};
use tilec_tests::{Fixture, fixtures, load, reference, reset};

/// Sequences that no engine with a cache can reproduce: transformers recomputes every key with
/// another base once the context passes the trained one.
const BEYOND_CONTEXT: &[(&str, usize)] = &[("hf/llama-rope-dynamic", 2)];

fn cases(kind: &str) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(fixtures().join(kind))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path: &PathBuf| path.join("reference.safetensors").is_file())
        .map(|path| format!("{kind}/{}", path.file_name().unwrap().to_string_lossy()))
        .collect();
    names.sort();
    assert!(names.len() >= 6, "{kind}: {names:?}");
    names
}

struct Weights<'a>(&'a Checkpoint);

impl WeightSource for Weights<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        self.0.tensor_f32(name).map(Cow::Owned).map_err(|error| error.to_string())
    }
}

/// Logits of every row, `rows` rows a step.
fn engine_logits(engine: &mut Engine, ids: &[u32], rows: usize) -> Vec<f32> {
    reset(engine);
    let mut all = Vec::new();
    for (chunk, tokens) in ids.chunks(rows).enumerate() {
        let step: Vec<RowInput> = tokens
            .iter()
            .enumerate()
            .map(|(row, token)| RowInput {
                token: *token,
                position: (chunk * rows + row) as u32,
                sequence: 0,
            })
            .collect();
        let wanted: Vec<u32> = (0..step.len() as u32).collect();
        all.extend_from_slice(engine.step(&step, &wanted).unwrap());
    }
    all
}

fn interpreted(fixture: &Fixture, spec: &ModelSpec, ids: &[u32]) -> Vec<f32> {
    let graph = compile::graph(&fixture.input(), spec).unwrap();
    let weights = Weights(&fixture.checkpoint);
    let mut interpreter = Interpreter::new(&graph, &weights).unwrap();
    let rows: Vec<Row> = ids
        .iter()
        .enumerate()
        .map(|(position, token)| Row { token: *token, position, sequence: 0 })
        .collect();
    let wanted: Vec<usize> = (0..ids.len()).collect();
    interpreter.step(&rows, &wanted).unwrap()
}

/// Largest distance in units of the reference's own size (root mean square over a row).
fn error(logits: &[f32], reference: &[f64], vocab: usize) -> f64 {
    errors(logits, reference, vocab).into_iter().fold(0.0, f64::max)
}

/// [`error`] of each row.
fn errors(logits: &[f32], reference: &[f64], vocab: usize) -> Vec<f64> {
    assert_eq!(logits.len(), reference.len());
    let rows = logits.chunks(vocab).zip(reference.chunks(vocab));
    rows.map(|(ours, theirs)| {
        let scale = (theirs.iter().map(|x| x * x).sum::<f64>() / vocab as f64).sqrt();
        let worst = ours.iter().zip(theirs).map(|(a, b)| {
            let distance = (f64::from(*a) - b).abs();
            // NaN never passes.
            if distance.is_nan() { f64::INFINITY } else { distance }
        });
        worst.fold(0.0, f64::max) / scale
    })
    .collect()
}

fn f32_everywhere(fixture: &Fixture) -> ModelSpec {
    let mut spec = fixture.spec();
    spec.precision.kv_cache = Some(KvType::F32);
    spec.precision.activations = Activations::F32;
    spec
}

/// Checkpoints of every family, option and stored float type; and GGUF files of every type, with
/// float activations: nothing is rounded but sums, so all are within 1e-4.
#[test]
fn float_logits_are_those_of_transformers() {
    let mut worst: f64 = 0.0;
    for name in cases("hf").iter().chain(&cases("gguf")) {
        let fixture = Fixture::open(name);
        let spec = f32_everywhere(&fixture);
        let mut loaded = load(&fixture, &spec, 2);
        let vocab = loaded.engine.plan().vocab;
        for (number, (ids, logits)) in reference(name).iter().enumerate() {
            if BEYOND_CONTEXT.contains(&(name.as_str(), number)) {
                continue;
            }
            let interpreted = error(&interpreted(&fixture, &spec, ids), logits, vocab);
            assert!(
                interpreted < 1e-4,
                "{name}, sequence {number}: the interpreter is off by {interpreted:e}"
            );
            for rows in [1, 5, 16] {
                let compiled = error(&engine_logits(&mut loaded.engine, ids, rows), logits, vocab);
                worst = worst.max(compiled);
                assert!(compiled < 1e-4, "{name}, sequence {number}, {rows} rows: off by {compiled:e}");
            }
        }
    }
    println!("largest relative distance from float64: {worst:e}");
}

/// 8-bit activations and a 16-bit cache: the interpreter rounds at the same places, so the compiled
/// code is as close to it as float sums allow, up to activations that round the other way; and both
/// are as far from transformers as that rounding explains.
#[test]
fn quantized_logits_are_those_of_the_interpreter() {
    // Of the mixtures those with experts in FP4.
    let mixtures = ["hf/gpt-oss", "hf/mimo-v2", "hf/mimo-v2-groups"].map(String::from);
    for name in cases("gguf").into_iter().chain(mixtures) {
        let fixture = Fixture::open(&name);
        let spec = fixture.spec();
        let mut loaded = load(&fixture, &spec, 2);
        let vocab = loaded.engine.plan().vocab;
        for (ids, logits) in reference(&name) {
            let ours = engine_logits(&mut loaded.engine, &ids, 16);
            let oracle: Vec<f64> = interpreted(&fixture, &spec, &ids).iter().map(|x| f64::from(*x)).collect();
            let from_oracle = error(&ours, &oracle, vocab);
            let mut rows = errors(&ours, &logits, vocab);
            rows.sort_by(f64::total_cmp);
            // Rounding sends a row to another expert now and then, which makes it another row.
            let spared = if name.starts_with("hf/") { rows.len() / 8 } else { 0 };
            let from_reference = rows[rows.len() - 1 - spared];
            println!("{name}: {from_oracle:.4} from the interpreter, {from_reference:.4} from float64");
            assert!(from_oracle < 0.05, "{name}: {from_oracle} from the interpreter");
            assert!(from_reference < 0.5, "{name}: {from_reference} from transformers");
        }
    }
}
