//! The frontends against checkpoints that transformers wrote: the tensors that a config implies, and
//! the logits of the graph, interpreted in float32.

use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tilec_codegen::frontends;
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{Interpreter, Row};
use tilec_ir::tensor::TensorInfo;

/// Largest distance of a logit from float64's, in units of `1 + |logit|`. transformers' own float32
/// is within 3e-5; a wrong rope, window or bias is off by more than 0.05.
const TOLERANCE: f64 = 1e-4;

/// A checkpoint with reference logits.
struct Case {
    name: String,
    config: serde_json::Value,
    tensors: BTreeMap<String, TensorInfo>,
    values: BTreeMap<String, Vec<f32>>,
    reference: Vec<u8>,
}

fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/hf");
    let mut folders = files(&root);
    folders.retain(|folder| folder.join("config.json").exists());
    assert!(folders.len() >= 20, "only {} fixtures in {}", folders.len(), root.display());
    // Quantized checkpoints need a reader: tests/tests/oracle.rs has one.
    folders.iter().filter(|folder| !quantized(folder)).map(|folder| case(folder)).collect()
}

fn quantized(folder: &Path) -> bool {
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    !config["quantization_config"].is_null()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn case(folder: &Path) -> Case {
    let config = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let (mut tensors, mut values) = (BTreeMap::new(), BTreeMap::new());
    for file in files(folder) {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let bytes = std::fs::read(&file).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let (format, decoded) = decode(view.dtype(), view.data());
            tensors.insert(name.clone(), TensorInfo::new(view.shape(), format));
            values.insert(name, decoded);
        }
    }
    let name = folder.file_name().unwrap().to_string_lossy().into_owned();
    let reference = std::fs::read(folder.join("reference.safetensors")).unwrap();
    Case { name, config, tensors, values, reference }
}

fn decode(dtype: Dtype, data: &[u8]) -> (Format, Vec<f32>) {
    let halves =
        |value: fn(u16) -> f32| data.as_chunks().0.iter().map(|b| value(u16::from_le_bytes(*b))).collect();
    match dtype {
        Dtype::F32 => (Format::F32, data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => (Format::F16, halves(|bits| f16::from_bits(bits).to_f32())),
        Dtype::BF16 => (Format::BF16, halves(|bits| bf16::from_bits(bits).to_f32())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn configs_imply_the_tensors_that_are_stored() {
    for case in cases() {
        let expected: BTreeMap<String, Vec<usize>> =
            frontends::expected_tensors(&case.config).unwrap().into_iter().collect();
        let stored: BTreeMap<String, Vec<usize>> =
            case.tensors.into_iter().map(|(name, info)| (name, info.shape)).collect();
        assert_eq!(expected, stored, "{}", case.name);
    }
}

#[test]
fn graphs_give_the_logits_of_transformers() {
    let mut beyond_context = Vec::new();
    for case in cases() {
        let graph = frontends::build(&case.config, &case.tensors).unwrap();
        let mut interpreter = Interpreter::new(&graph, &case.values).unwrap();
        let reference = SafeTensors::deserialize(&case.reference).unwrap();
        let max_context = frontends::max_context(&case.config).unwrap();
        let mut sequence = 0;
        while let Ok(ids) = reference.tensor(&format!("input_ids.{sequence}")) {
            let ids: Vec<i64> = ids.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
            let rows =
                ids.iter().enumerate().map(|(position, id)| Row { token: *id as u32, position, sequence });
            let rows: Vec<Row> = rows.collect();
            if rows.len() > max_context {
                beyond_context.push(format!("{} {sequence}", case.name));
                sequence += 1;
                continue;
            }
            let wanted: Vec<usize> = (0..rows.len()).collect();
            let logits = interpreter.step(&rows, &wanted).unwrap();
            let exact = reference.tensor(&format!("logits64.{sequence}")).unwrap();
            let exact: Vec<f64> = exact.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
            assert_eq!(logits.len(), exact.len(), "{}", case.name);
            let distance = |(got, exact): (&f32, &f64)| (f64::from(*got) - exact).abs() / (1.0 + exact.abs());
            // A NaN would win no comparison, so it is looked for.
            assert!(logits.iter().all(|logit| logit.is_finite()), "{}", case.name);
            let worst = logits.iter().zip(&exact).map(distance).fold(0.0, f64::max);
            assert!(worst <= TOLERANCE, "{}, sequence {sequence}: off by {worst:e}", case.name);
            sequence += 1;
        }
        assert!(sequence > 0, "{} has no sequences", case.name);
    }
    // transformers changes the frequencies there; a plan does not reach that far.
    assert_eq!(beyond_context, ["llama-rope-dynamic 2"]);
}
