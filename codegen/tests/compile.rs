//! Whole compilations, in memory.
#![cfg(feature = "llvm")]

use serde_json::json;
use tilec_codegen::compile::{Compiled, Host, Input, Level, compile};
use tilec_codegen::frontends;
use tilec_ir::format::Format;
use tilec_ir::plan::WeightsFrom;
use tilec_ir::spec::ModelSpec;

fn smollm2(arch: &str) -> Compiled {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": true
    });
    let tensors = frontends::synthetic_tensors(&config, Format::Q4_1).unwrap();
    let weights = WeightsFrom::Checkpoint { path: "/nowhere".into() };
    let mut spec = ModelSpec::for_checkpoint("/nowhere");
    spec.target.arch = arch.into();
    let input =
        Input { name: "smollm2", config: &config, tensors: &tensors, weights, tokenizer: None, draft: None };
    compile(&input, &spec, &Host { threads: 2, cubins: None }).unwrap()
}

/// Symbols of an ELF object that are not defined in it, read from its text form of names: a defined
/// private function never shows up as undefined.
fn undefined(object: &[u8]) -> Vec<String> {
    use object::{Object, ObjectSymbol};
    let file = object::File::parse(object).unwrap();
    file.symbols()
        .filter(|symbol| symbol.is_undefined() && !symbol.name().unwrap_or("").is_empty())
        .map(|symbol| symbol.name().unwrap().to_string())
        .collect()
}

#[test]
fn a_plan_is_the_same_bytes_every_time_and_needs_no_library() {
    let (a, b) = (smollm2("haswell"), smollm2("haswell"));
    assert!(a.object == b.object, "the native code differs between two compilations");
    assert_eq!(a.plan.to_json(), b.plan.to_json());
    assert_eq!(undefined(&a.object), Vec::<String>::new());
    // A loop over the layers, not thirty copies.
    assert!(a.text(Level::Llvm).matches("define").count() < 60);
    assert_eq!(a.plan.stages.len(), 1 + 30 * 7 + 2);
}

#[test]
fn every_kind_of_processor_compiles() {
    for arch in ["x86-64", "x86-64-v3", "x86-64-v4", "znver4", "alderlake"] {
        let compiled = smollm2(arch);
        assert_eq!(undefined(&compiled.object), Vec::<String>::new(), "{arch}");
    }
}

/// The functions of this backend in the module's text, without the kernels that they call.
fn glue(text: &str) -> String {
    let mut kept = String::new();
    for function in text.split("\ndefine ").skip(1) {
        let end = function.find("\n}").expect("a function ends");
        let name = function.split('@').nth(1).unwrap_or("");
        let ours = ["tilec_step(", "wait(", "\"before.", "\"body0.", "\"after."];
        if ours.iter().any(|start| name.starts_with(start)) {
            kept.push_str("define ");
            kept.push_str(&function[..end + 2]);
            kept.push_str("\n\n");
        }
    }
    kept
}

/// 384 experts in 69 layers: one text for all of them, and a plan that stays small.
#[test]
fn the_largest_mixture_compiles_to_little() {
    let path = format!("{}/../examples/mimo-v2.5-pro/config.json", env!("CARGO_MANIFEST_DIR"));
    let config = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let tensors = frontends::published_tensors(&config).unwrap();
    let weights = WeightsFrom::Synthetic { seed: 1, config: config.clone(), tensors: tensors.clone() };
    let spec = ModelSpec::for_checkpoint("/nowhere");
    let input =
        Input { name: "mimo", config: &config, tensors: &tensors, weights, tokenizer: None, draft: None };
    let compiled = compile(&input, &spec, &Host { threads: 2, cubins: None }).unwrap();
    assert_eq!(undefined(&compiled.object), Vec::<String>::new());
    // Three kinds of layers: a dense one, mixtures with a window, mixtures without.
    let llvm = compiled.text(Level::Llvm);
    assert!(llvm.contains("@body2.") || llvm.contains("@\"body2."), "three bodies");
    assert!(!llvm.contains("@body3.") && !llvm.contains("@\"body3."), "no more than three bodies");
    let sizes = [compiled.plan.to_json().len(), compiled.object.len(), compiled.text(Level::Graph).len()];
    assert!(sizes.iter().all(|size| *size < 1 << 20), "bytes of plan, code and graph: {sizes:?}");
    assert_eq!(compiled.plan.stages.len(), 1 + 7 + 69 * 10 + 2);
    assert!(compiled.plan.packing.bytes > 540_000_000_000);
}

#[test]
fn the_glue_of_a_two_layer_model() {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
        "tie_word_embeddings": true
    });
    let tensors = frontends::synthetic_tensors(&config, Format::Q4_1).unwrap();
    let weights = WeightsFrom::Checkpoint { path: "/nowhere".into() };
    let mut spec = ModelSpec::for_checkpoint("/nowhere");
    spec.target.arch = "x86-64-v3".into();
    let input =
        Input { name: "llama", config: &config, tensors: &tensors, weights, tokenizer: None, draft: None };
    let compiled = compile(&input, &spec, &Host { threads: 2, cubins: None }).unwrap();
    insta::assert_snapshot!("llama-q4_1.llvm", glue(compiled.text(Level::Llvm)));
}
