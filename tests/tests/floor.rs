//! The floor of a step: what the cost model says that caches of different lengths must be read for, worked out
//! here from the checkpoint's config alone.

use tilec_codegen::compile::{Host, compile};
use tilec_ir::plan::Plan;
use tilec_ir::spec::{Device, ModelSpec, Target};
use tilec_tests::Fixture;

fn plan(fixture: &Fixture, spec: &ModelSpec) -> Plan {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plan");
    compile(&fixture.input(), spec, &Host { threads: 2, cubins: None }).unwrap().write(&path).unwrap();
    Plan::load(&path).unwrap()
}

fn floor(plan: &Plan, contexts: &[usize]) -> u64 {
    plan.costs.iter().map(|cost| cost.runs as u64 * cost.bytes_of_sequences(contexts)).sum()
}

#[test]
fn caches_of_different_lengths_are_read_as_far_as_windows_see() {
    for name in ["hf/qwen3-window-layer-types", "hf/gpt-oss", "hf/llama-long"] {
        let fixture = Fixture::open(name);
        let config = &fixture.config;
        let number = |key: &str| config[key].as_u64().unwrap();
        let window = config["sliding_window"].as_u64();
        let layers: Vec<Option<u64>> = match config["layer_types"].as_array() {
            Some(types) => types.iter().map(|kind| window.filter(|_| *kind == "sliding_attention")).collect(),
            None => vec![None; number("num_hidden_layers") as usize],
        };
        assert_eq!(layers.iter().any(Option::is_some), name != "hf/llama-long", "{name}: {layers:?}");
        let position = number("num_key_value_heads") * 2 * number("head_dim");
        for device in [Device::Cpu, Device::Cuda] {
            let mut spec = fixture.spec();
            spec.target.device = device;
            spec.target.arch = Target::default_arch(device).into();
            let plan = plan(&fixture, &spec);
            let bytes = plan.kv.kv_type.bytes() as u64;
            let contexts = [0, 1, 3, 15, 16, 17, 30, 90];
            let read: u64 = layers
                .iter()
                .flat_map(|window| {
                    contexts.map(|context| (context as u64).min(window.map_or(u64::MAX, |w| w - 1)))
                })
                .sum();
            let caches = floor(&plan, &contexts) - floor(&plan, &[0; 8]);
            assert_eq!(caches, read * position * bytes, "{name} {device:?}");
            // One sequence alone, by the sum for rows of one.
            let alone: u64 = plan.costs.iter().map(|cost| cost.runs as u64 * cost.bytes(1, 90)).sum();
            assert_eq!(floor(&plan, &[90]), alone, "{name} {device:?}");
        }
    }
}
