//! The trained demo checkpoint, `examples/mimo-mini`, as stored: its logits are those of transformers.

use tilec_ir::abi::KvType;
use tilec_ir::spec::{Activations, ModelSpec};
use tilec_runtime::engine::RowInput;
use tilec_tests::{Fixture, fixtures, load};

/// What `make_transformers.py` computed in float64: ids, the likeliest token of every row, and the
/// logits of some rows.
struct Reference {
    ids: Vec<u32>,
    choice: Vec<usize>,
    rows: Vec<usize>,
    logits: Vec<f32>,
}

fn reference() -> Reference {
    let bytes = std::fs::read(fixtures().join("mimo-mini/reference.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |name: &str| -> Vec<i64> {
        file.tensor(name).unwrap().data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
    };
    let logits = file.tensor("logits").unwrap();
    Reference {
        ids: numbers("input_ids").into_iter().map(|id| id as u32).collect(),
        choice: numbers("choice").into_iter().map(|id| id as usize).collect(),
        rows: numbers("rows").into_iter().map(|row| row as usize).collect(),
        logits: logits.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

/// Logits of every row, by row.
fn logits(ids: &[u32], change: impl Fn(&mut ModelSpec)) -> Vec<Vec<f32>> {
    let fixture = Fixture::open("../../examples/mimo-mini/checkpoint");
    let mut spec = fixture.spec();
    spec.limits.rows = 64;
    change(&mut spec);
    let mut loaded = load(&fixture, &spec, 2);
    let vocab = loaded.engine.plan().vocab;
    let mut all = Vec::new();
    for (start, tokens) in ids.chunks(64).enumerate().map(|(n, tokens)| (n * 64, tokens)) {
        let rows = tokens.iter().enumerate();
        let step: Vec<RowInput> = rows
            .map(|(row, token)| RowInput { token: *token, position: (start + row) as u32, sequence: 0 })
            .collect();
        let wanted: Vec<u32> = (0..step.len() as u32).collect();
        all.extend(loaded.engine.step(&step, &wanted).unwrap().chunks(vocab).map(<[f32]>::to_vec));
    }
    all
}

fn choices(logits: &[Vec<f32>]) -> Vec<usize> {
    let best = |row: &Vec<f32>| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
    logits.iter().map(best).collect()
}

#[test]
fn float_logits_are_those_of_transformers() {
    let reference = reference();
    let ours = logits(&reference.ids, |spec| {
        spec.precision.kv_cache = Some(KvType::F32);
        spec.precision.activations = Activations::F32;
    });
    assert_eq!(choices(&ours), reference.choice);
    let vocab = ours[0].len();
    for (row, theirs) in reference.rows.iter().zip(reference.logits.chunks(vocab)) {
        let size = (theirs.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / vocab as f64).sqrt();
        let off = ours[*row].iter().zip(theirs).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        // A NaN is no less than anything.
        assert!(off / size < 1e-4, "row {row}: off by {off} of {size}");
    }
}

#[test]
fn rounded_activations_choose_nearly_always_the_same() {
    let reference = reference();
    let ours = choices(&logits(&reference.ids, |_| {}));
    let same = ours.iter().zip(&reference.choice).filter(|(a, b)| a == b).count();
    println!("{same} of {} choices are the same", ours.len());
    assert!(same * 100 >= ours.len() * 95, "{same} of {}", ours.len());
}
