//! Snapshots of every level for a two-layer model of each family, so that a change of the compiler
//! shows as a diff of what it makes.

mod models;

use models::{gpt_oss, llama, mimo_v2, qwen3};
use serde_json::Value;
use tilec_codegen::frontends;
use tilec_codegen::passes::{fuse, precision, schedule, shard, tile};
use tilec_ir::format::Format;
use tilec_ir::graph::{Graph, parse};
use tilec_ir::spec::{ModelSpec, Precision, Shard};
use tilec_ir::validate::validate;

fn graph(name: &str, config: &Value, stored: Format) -> Graph {
    let tensors = frontends::synthetic_tensors(config, stored).unwrap();
    let mut graph = frontends::build(config, &tensors).unwrap();
    graph.name = name.into();
    let precision: Precision = ModelSpec::for_checkpoint("unused").precision;
    precision::precision(&mut graph, &precision).unwrap();
    graph
}

fn levels(name: &str, config: &Value, stored: Format) {
    let graph = graph(name, config, stored);
    insta::assert_snapshot!(format!("{name}.graph"), graph.to_string());
    let fused = fuse::fuse(&graph).unwrap();
    insta::assert_snapshot!(format!("{name}.fused"), fused.to_string());
    let stages = tile::tile(&fused, &tile::TileOptions { max_rows: 16, context: 64 }).unwrap();
    insta::assert_snapshot!(format!("{name}.stages"), stages.to_string());
    let schedule = schedule::schedule(&stages, 2);
    validate(&stages, &schedule).unwrap();
    insta::assert_snapshot!(format!("{name}.schedule"), schedule.text(&stages));
}

#[test]
fn llama_levels() {
    levels("llama-q4_1", &llama(), Format::Q4_1);
}

#[test]
fn qwen3_levels() {
    levels("qwen3-bf16", &qwen3(), Format::BF16);
}

#[test]
fn mimo_v2_levels() {
    levels("mimo-v2-mxfp4", &mimo_v2(), Format::MXFP4);
}

#[test]
fn gpt_oss_levels() {
    levels("gpt-oss-bf16", &gpt_oss(), Format::BF16);
}

/// What rank 1 of 2 runs of a model: before is what `levels` shows.
fn share(name: &str, config: &Value, stored: Format) {
    let graph = shard::shard(&graph(name, config, stored), Shard { rank: 1, ranks: 2 }).unwrap();
    // The text is read back with its slices and sums.
    assert_eq!(parse(&graph.to_string()).unwrap().to_string(), graph.to_string());
    insta::assert_snapshot!(format!("{name}.rank-1-of-2.graph"), graph.to_string());
    let fused = fuse::fuse(&graph).unwrap();
    insta::assert_snapshot!(format!("{name}.rank-1-of-2.fused"), fused.to_string());
}

#[test]
fn shares_of_a_dense_model_and_a_mixture() {
    share("qwen3-bf16", &qwen3(), Format::BF16);
    share("gpt-oss-bf16", &gpt_oss(), Format::BF16);
}

/// What fusion is for: without any rule every operator stands alone, with all of them a layer is
/// seven stages.
#[test]
fn a_layer_is_seven_stages() {
    let fused = fuse::fuse(&graph("llama", &llama(), Format::Q4_1)).unwrap();
    let names: Vec<&str> =
        fused.ops.iter().filter(|op| op.layer == Some(1)).map(|op| op.anchor.name()).collect();
    assert_eq!(names, ["rows", "gemm", "attention", "gemm", "rows", "gemm", "gemm"]);
}

/// The same levels, byte for byte, however often they are made.
#[test]
fn levels_are_deterministic() {
    let text = || {
        let fused = fuse::fuse(&graph("qwen3", &qwen3(), Format::BF16)).unwrap();
        let stages = tile::tile(&fused, &tile::TileOptions { max_rows: 16, context: 64 }).unwrap();
        let packing = serde_json::to_string(&stages.packing).unwrap();
        schedule::schedule(&stages, 3).text(&stages) + &stages.to_string() + &packing
    };
    assert_eq!(text(), text());
}
