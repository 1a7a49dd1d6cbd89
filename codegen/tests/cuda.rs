//! The resident kernel, on a machine without a GPU: its levels as snapshots, its machine code on
//! every architecture, its resources where it is tuned, and programs that must be refused.

mod models;

use models::{llama, qwen3};
use serde_json::{Value, json};
use tilec_codegen::compile::{DraftInput, Host, Input, budget, compile, graphs};
use tilec_codegen::emit::cuda::{RoundPrograms, emit, emit_round};
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::{Arch, Budget, CudaText, Nvrtc, Options};
use tilec_codegen::passes::packer::Packer;
use tilec_codegen::passes::tile::TileError;
use tilec_codegen::passes::{fuse, precision, resident};
use tilec_ir::format::Format;
use tilec_ir::fused::Fused;
use tilec_ir::graph::View;
use tilec_ir::handoff::Handoff;
use tilec_ir::launch::KERNEL;
use tilec_ir::plan::WeightsFrom;
use tilec_ir::resident::{Epilogue, Kind, ResidentProgram};
use tilec_ir::spec::{Activations, Device, DflashSpec, Draft, ModelSpec, WeightFormat};
use tilec_ir::tensor::TensorInfo;

/// A llama with sizes that fill no whole octet.
fn odd_llama() -> Value {
    let mut config = llama();
    config["intermediate_size"] = 100.into();
    config["vocab_size"] = 161.into();
    config
}

/// MiMo's attention, with its sizes of heads and two of its groups of them in a matrix of q, k and v, and dense
/// feed-forward layers: a layer that sees everything, and one with a window, sinks and more KV heads.
fn dense_mimo() -> Value {
    let mut config = models::mimo_v2();
    for (key, value) in [
        ("num_attention_heads", 32.into()),
        ("num_key_value_heads", 2.into()),
        ("swa_num_key_value_heads", 4.into()),
        ("head_dim", 192.into()),
        ("v_head_dim", 128.into()),
        ("moe_layer_freq", vec![0, 0].into()),
    ] {
        config[key] = value;
    }
    config
}

/// The same in the sizes of MiMo-V2-Flash, but for the feed-forward layers.
fn flash_mimo() -> Value {
    let mut config = dense_mimo();
    for (key, value) in [
        ("hidden_size", 4096),
        ("intermediate_size", 2048),
        ("num_attention_heads", 64),
        ("num_key_value_heads", 4),
        ("swa_num_key_value_heads", 8),
        ("sliding_window", 128),
        ("vocab_size", 152_576),
        ("max_position_embeddings", 262_144),
    ] {
        config[key] = value.into();
    }
    config
}

/// A Qwen3 whose layers have 20 experts, of which a row gets 3; widths that fill no whole FP4 block.
fn qwen3_moe() -> Value {
    let mut config = qwen3();
    config["architectures"] = vec!["Qwen3MoeForCausalLM"].into();
    config["model_type"] = Value::from("qwen3_moe");
    config["num_experts"] = Value::from(20);
    config["num_experts_per_tok"] = Value::from(3);
    config["moe_intermediate_size"] = Value::from(48);
    config["decoder_sparse_step"] = Value::from(1);
    config["norm_topk_prob"] = Value::from(true);
    config["mlp_only_layers"] = Value::Array(Vec::new());
    config
}

/// The example of this name, with so many layers.
fn example(name: &str, layers: usize) -> Value {
    let path = format!("{}/../examples/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    config["num_hidden_layers"] = layers.into();
    config
}

fn program(name: &str, config: &Value, stored: Format, context: usize) -> ResidentProgram {
    lower(name, config, stored, context).unwrap()
}

fn lower(name: &str, config: &Value, stored: Format, context: usize) -> Result<ResidentProgram, TileError> {
    resident::resident(&fused(name, config, stored), context)
}

fn fused(name: &str, config: &Value, stored: Format) -> Fused {
    let tensors = frontends::synthetic_tensors(config, stored).unwrap();
    let mut graph = frontends::build(config, &tensors).unwrap();
    graph.name = name.into();
    let mut precision = ModelSpec::for_checkpoint("unused").precision;
    precision.activations = Activations::F32;
    precision::precision(&mut graph, &precision).unwrap();
    fuse::fuse(&graph).unwrap()
}

/// A draft of MiMo's kind for [`odd_llama`]: sinks, scaled values, a part of a head rotated, an embedding of
/// the mask's own.
fn mimo_draft() -> Value {
    json!({
        "architectures": ["DFlashDraftModel"], "hidden_size": 64, "intermediate_size": 72,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48,
        "v_head_dim": 40, "partial_rotary_factor": 0.334, "block_size": 8, "rope_theta": 10000.0,
        "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"], "is_causal": false,
        "dflash_config": {
            "target_layer_ids": [1, 0], "mask_token_id": 7, "attention_value_scale": 0.612,
            "attention_sink_bias": true
        }
    })
}

/// Five layers like Qwen3-8B's, with five of its layers tapped: rows of 20,480 columns.
fn qwen3_8b_draft() -> Value {
    json!({
        "architectures": ["DFlashDraftModel"], "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 5, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "block_size": 16, "rope_theta": 1000000.0,
        "dflash_config": {"target_layer_ids": [1, 9, 17, 25, 33], "mask_token_id": 7}
    })
}

/// The same draft of the second version: convolutions, and a selector of 16 candidates.
fn second(mut draft: Value) -> Value {
    draft["architectures"] = json!(["DFlash2DraftModel"]);
    let own = draft["dflash_config"].as_object_mut().unwrap();
    for (key, value) in [("conv_kernel_size", 2), ("conv_group_size", 16), ("selector_top_k", 16)] {
        own.insert(key.into(), value.into());
    }
    own.insert("selector_rank".into(), 256.into());
    own.insert("final_logit_softcapping".into(), 20.into());
    draft
}

/// A target that leaves taps, what makes the draft's context of them, and its block.
fn pair(name: &str, target: &Value, draft: &Value, stored: Format, context: usize) -> [ResidentProgram; 3] {
    let tensors = frontends::synthetic_tensors(target, stored).unwrap();
    let mut draft_tensors = frontends::synthetic_draft_tensors(draft, target, stored).unwrap();
    let hidden = draft["hidden_size"].as_u64().unwrap() as usize;
    if draft["dflash_config"].get("attention_sink_bias").is_some() {
        let mask = TensorInfo { shape: vec![hidden], format: Format::F32 };
        draft_tensors.insert("mask_embedding".into(), mask);
    }
    let weights = || WeightsFrom::Synthetic { seed: 1, config: Value::Null, tensors: Default::default() };
    let input = Input {
        name,
        config: target,
        tensors: &tensors,
        weights: weights(),
        tokenizer: None,
        draft: Some(DraftInput { config: draft, tensors: &draft_tensors, weights: weights() }),
    };
    let mut spec = ModelSpec::for_checkpoint("unused");
    spec.precision.activations = Activations::F32;
    spec.target.device = Device::Cuda;
    let dflash = DflashSpec { checkpoint: "unused".into(), block: None, context_rope_theta: None };
    spec.draft = Some(Draft { dflash });
    let (graph, draft) = graphs(&input, &spec).unwrap();
    let draft = draft.unwrap();
    let sizes = resident::Sizes { context, step_rows: draft.rows.next_multiple_of(8) };
    let mut packer = Packer::new(resident::WEIGHT_ALIGN);
    [&graph, &draft.inject, &draft.block].map(|graph| {
        let program = resident::resident_with(&fuse::fuse(graph).unwrap(), sizes, &mut packer);
        program.unwrap_or_else(|error| panic!("{name}: {error}"))
    })
}

/// What is emitted for the model itself, behind the device code that all kernels share.
fn own_text(program: &ResidentProgram) -> String {
    let text = emit(program, Arch::Sm90a).unwrap().text;
    let tables = text.find(&format!("// ==== {} ", program.name)).unwrap();
    let shared = text[tables..].find("// ==== rows.cuh").unwrap() + tables;
    let stages = text.find("\n// embed: ").unwrap();
    format!("{}...\n{}", &text[tables..shared], &text[stages..])
}

#[test]
fn layers_that_differ_in_tables_share_a_text() {
    let attentions = |config: &Value| {
        let text = emit(&program("mimo", config, Format::BF16, 200), Arch::Sm90a).unwrap().text;
        let sinks = text.matches("== ~0ull) return nullptr;").count();
        (text.matches(": attend<").count(), sinks, text.contains("LAYER_WINDOW[b.layer]"))
    };
    // More KV heads where there is a window.
    let mut config = dense_mimo();
    assert_eq!(attentions(&config), (2, 0, false));
    // Windows, rotations and sinks alone.
    config["swa_num_key_value_heads"] = config["num_key_value_heads"].clone();
    assert_eq!(attentions(&config), (1, 1, true));
    // Nothing to tell apart.
    config["hybrid_layer_pattern"] = vec![0, 0].into();
    assert_eq!(attentions(&config), (1, 0, false));
}

#[test]
fn levels_of_the_resident_kernel() {
    for (name, config, format) in [
        ("llama-q4_1", odd_llama(), Format::Q4_1),
        ("qwen3-bf16", qwen3(), Format::BF16),
        ("llama-fp8", odd_llama(), Format::FP8_BLOCK),
        ("mimo-fp8", dense_mimo(), Format::FP8_BLOCK),
    ] {
        let program = program(name, &config, format, 200);
        insta::assert_snapshot!(format!("{name}.resident"), program.to_string());
        insta::assert_snapshot!(format!("{name}.cuda"), own_text(&program));
    }
    let experts = fp4_experts();
    insta::assert_snapshot!("qwen3-moe-fp4.resident", experts.to_string());
    insta::assert_snapshot!("qwen3-moe-fp4.cuda", own_text(&experts));
    let experts = mixture("qwen3-moe-scaled", Format::FP8_CHANNEL, Format::NVFP4);
    insta::assert_snapshot!("qwen3-moe-scaled.resident", experts.to_string());
    insta::assert_snapshot!("qwen3-moe-scaled.cuda", own_text(&experts));
    // Its experts are foreseen.
    let experts = mixture("qwen3-moe-bf16", Format::BF16, Format::BF16);
    insta::assert_snapshot!("qwen3-moe-bf16.resident", experts.to_string());
    insta::assert_snapshot!("qwen3-moe-bf16.cuda", own_text(&experts));
    // Its second products are dealt out in bands.
    let experts = banded_experts();
    insta::assert_snapshot!("gpt-oss-fp4.resident", experts.to_string());
    insta::assert_snapshot!("gpt-oss-fp4.cuda", own_text(&experts));
    let [_, inject, block] = pair("pair", &odd_llama(), &mimo_draft(), Format::BF16, 200);
    insta::assert_snapshot!("mimo-draft.resident", format!("{inject}\n{block}"));
    let inject = emit(&inject, Arch::Sm90a).unwrap().text;
    let tables = inject.split("// ==== pair").nth(1).unwrap().split("// ==== rows.cuh").next().unwrap();
    let stages = inject.split_once("\n// taps: ").unwrap().1;
    insta::assert_snapshot!("mimo-draft.cuda", format!("{tables}...\n// taps: {stages}"));
    let [_, _, block] = pair("pair", &odd_llama(), &second(mimo_draft()), Format::BF16, 200);
    insta::assert_snapshot!("second-draft.resident", block.to_string());
    insta::assert_snapshot!("second-draft.cuda", own_text(&block));
    let [_, inject, _] = pair("pair", &example("qwen3-8b", 36), &qwen3_8b_draft(), Format::BF16, 200);
    insta::assert_snapshot!("qwen3-8b-inject.resident", inject.to_string());
}

#[test]
fn every_architecture_gets_machine_code() {
    let nvrtc = Nvrtc::find().unwrap();
    let [taps, inject, block] = pair("pair", &odd_llama(), &mimo_draft(), Format::FP8_BLOCK, 200);
    let [_, _, second] = pair("pair", &odd_llama(), &second(mimo_draft()), Format::FP8_BLOCK, 200);
    for program in [
        taps,
        inject,
        block,
        second,
        program("llama", &odd_llama(), Format::Q4_1, 200),
        program("qwen3", &qwen3(), Format::BF16, 200),
        program("fp8", &odd_llama(), Format::FP8_BLOCK, 200),
        fp4_experts(),
        program("mimo", &flash_mimo(), Format::FP8_BLOCK, 200),
        mixture("qwen3-moe", Format::FP8_CHANNEL, Format::NVFP4),
        mixture("qwen3-moe", Format::FP8_1X128, Format::FP8_BLOCK),
        mixture("qwen3-moe", Format::NVFP4, Format::FP8_CHANNEL),
        // Four slots of a tile's strips, where the ring may have no more.
        long_experts(),
        banded_experts(),
    ] {
        for arch in ARCHITECTURES {
            let text = emit(&program, arch).unwrap().text;
            let options = Options { fast: true, ..Options::default() };
            let cubin = nvrtc.compile(&CudaText { name: "kernel.cu", text: &text }, arch, &options).unwrap();
            cubin.kernel(KERNEL).unwrap();
        }
    }
}

const ARCHITECTURES: [Arch; 5] = [Arch::Sm80, Arch::Sm89, Arch::Sm90a, Arch::Sm100a, Arch::Sm120a];

/// The kernel of rounds of a pair.
fn round_text([model, inject, block]: &[ResidentProgram; 3], arch: Arch) -> Option<String> {
    let programs = RoundPrograms { model, inject, block, mask_token: 7 };
    emit_round(programs, arch).unwrap().map(|text| text.text)
}

#[test]
fn rounds_get_machine_code_and_keep_within_their_registers() {
    if !alone("rounds_get_machine_code_and_keep_within_their_registers") {
        return;
    }
    let nvrtc = Nvrtc::find().unwrap();
    let fast = Options { fast: true, ..Options::default() };
    for draft in [mimo_draft(), second(mimo_draft())] {
        let odd = pair("pair", &odd_llama(), &draft, Format::FP8_BLOCK, 200);
        for arch in ARCHITECTURES {
            let text = round_text(&odd, arch).unwrap();
            let cubin = nvrtc.compile(&CudaText { name: "kernel.cu", text: &text }, arch, &fast).unwrap();
            cubin.kernel(KERNEL).unwrap();
        }
    }
    let large = |draft: Value| pair("qwen3-8b", &example("qwen3-8b", 36), &draft, Format::BF16, 4096);
    let pair = large(qwen3_8b_draft());
    for pair in [&pair, &large(second(qwen3_8b_draft()))] {
        let text = round_text(pair, Arch::Sm90a).unwrap();
        let text = CudaText { name: "kernel.cu", text: &text };
        let cubin = nvrtc.compile(&text, Arch::Sm90a, &Options::default()).unwrap();
        cubin.check(&[(KERNEL, budget(16))]).unwrap_or_else(|over| panic!("{over}"));
    }
    // What has steps of other rows, or another number of tokens, is no round.
    let [model, inject, mut block] = pair;
    block.step_rows = 8;
    assert_eq!(round_text(&[model.clone(), inject.clone(), block.clone()], Arch::Sm90a), None);
    (block.step_rows, block.vocab) = (16, 5);
    assert_eq!(round_text(&[model, inject, block], Arch::Sm90a), None);
}

/// Whether a test has a process of its own; if not, it is run in one, and has to pass there. What NVRTC makes of a text
/// depends on what its process compiled before: MiMo in bf16 spills 412 bytes here and 972 behind other tests, in an
/// order that is never the same. Plans are compiled in a process of their own as well.
fn alone(test: &str) -> bool {
    const NAME: &str = "TILEC_TEST_ALONE";
    if std::env::var(NAME).is_ok_and(|name| name == test) {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(NAME, test)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    false
}

#[test]
fn the_tuned_kernel_keeps_within_its_registers() {
    if !alone("the_tuned_kernel_keeps_within_its_registers") {
        return;
    }
    let nvrtc = Nvrtc::find().unwrap();
    // Two layers have the kernel of sixteen: layers are a loop.
    let llama = example("llama-3.2-1b", 2);
    // MiMo-V2-Flash but for its experts. Keys of 192 columns leave too few registers for what lives through
    // a stage, as the step's number: it is put away in front of the loops and fetched behind them.
    let spilled = Budget { registers: 168, stack: 64, spills: 520 };
    // FP8 has the scales of blocks that are on their way as well; 1,084 bytes.
    let scaled = Budget { registers: 168, stack: 144, spills: 1184 };
    // So do rows of 12,288 columns.
    let long_rows = Budget { registers: 168, stack: 192, spills: 840 };
    let [tapped, inject, block] =
        pair("qwen3-8b", &example("qwen3-8b", 36), &qwen3_8b_draft(), Format::BF16, 4096);
    let [_, _, second] =
        pair("qwen3-8b", &example("qwen3-8b", 36), &second(qwen3_8b_draft()), Format::BF16, 4096);
    for (name, program, format, budget) in [
        ("llama-3.2-1b", program("llama", &llama, Format::BF16, 4096), Format::BF16, budget(8)),
        ("mimo", program("mimo", &flash_mimo(), Format::BF16, 4096), Format::BF16, spilled),
        ("mimo", program("mimo", &flash_mimo(), Format::FP8_BLOCK, 4096), Format::FP8_BLOCK, scaled),
        ("qwen3-8b with taps", tapped, Format::BF16, long_rows),
        ("the context of its draft", inject, Format::BF16, long_rows),
        ("a block of its draft", block, Format::BF16, long_rows),
        ("a block of its draft of the second version", second, Format::BF16, long_rows),
    ] {
        let text = emit(&program, Arch::Sm90a).unwrap().text;
        let text = CudaText { name: "kernel.cu", text: &text };
        let cubin = nvrtc.compile(&text, Arch::Sm90a, &Options::default()).unwrap();
        cubin.check(&[(KERNEL, budget)]).unwrap_or_else(|over| panic!("{name} {format}: {over}"));
    }
}

/// Keys and values of a page in one slot of the ring and in two, with norms, behind layers with windows, in long contexts,
/// and in wide steps.
#[test]
fn kernels_of_long_contexts_and_wide_steps_keep_within_their_registers() {
    if !alone("kernels_of_long_contexts_and_wide_steps_keep_within_their_registers") {
        return;
    }
    let nvrtc = Nvrtc::find().unwrap();
    let shapes =
        [("llama-3.2-1b", 8), ("qwen3-8b", 8), ("gpt-oss-20b", 8), ("qwen3-8b", 16), ("llama-3.2-1b", 32)];
    for (name, step_rows) in shapes {
        let sizes = resident::Sizes { context: 32 << 10, step_rows };
        let config = example(name, if name == "gpt-oss-20b" { 24 } else { 2 });
        let tensors = frontends::synthetic_tensors(&config, Format::BF16).unwrap();
        let mut graph = frontends::build(&config, &tensors).unwrap();
        let mut precision = ModelSpec::for_checkpoint("unused").precision;
        precision.activations = Activations::F32;
        precision::precision(&mut graph, &precision).unwrap();
        let program = resident::resident(&fuse::fuse(&graph).unwrap(), sizes).unwrap();
        let text = emit(&program, Arch::Sm90a).unwrap().text;
        let text = CudaText { name: "kernel.cu", text: &text };
        let cubin = nvrtc.compile(&text, Arch::Sm90a, &Options::default()).unwrap();
        cubin
            .check(&[(KERNEL, budget(step_rows))])
            .unwrap_or_else(|over| panic!("{name}, {step_rows} rows: {over}"));
    }
}

#[test]
fn far_offsets_are_no_literals_in_addresses() {
    let text = |layers| {
        let program = program("qwen3-8b", &example("qwen3-8b", layers), Format::BF16, 256);
        emit(&program, Arch::Sm90a).unwrap().text
    };
    assert!(!text(1).contains("weights + far("), "2.9 GB are not far");
    // The head lies behind 13 GB of layers.
    assert!(text(36).contains("struct Head") && text(36).contains("return b.args.weights + far(0x3"));
}

#[test]
fn a_context_with_more_parts_than_a_word_tells_apart_is_refused() {
    // All of MiMo's.
    emit(&program("mimo", &flash_mimo(), Format::FP8_BLOCK, 262_144), Arch::Sm90a).unwrap();
    let program = program("llama", &odd_llama(), Format::BF16, 1 << 32);
    let error = emit(&program, Arch::Sm90a).unwrap_err().to_string();
    assert_eq!(
        error,
        "8 rows of 4 heads over 4294967296 positions: too many parts of sums; lower limits.context"
    );
}

#[test]
fn the_text_grows_by_a_line_of_offsets_a_layer() {
    let text = |layers| {
        let program = program("llama", &example("llama-3.2-1b", layers), Format::BF16, 4096);
        emit(&program, Arch::Sm90a).unwrap().text.lines().count()
    };
    assert_eq!(text(70) - text(2), 68);
}

#[test]
fn handoffs_that_are_not_in_time_are_refused() {
    let llama = program("llama", &example("llama-3.2-1b", 3), Format::BF16, 4096);
    let sound = llama.handoffs();
    // Embedding, then five stages a layer, then the head: only the crossing behind the embedding is not checked.
    let checked: Vec<bool> = sound.iter().map(Handoff::checked).collect();
    assert_eq!(checked, [&[false; 2][..], &[true; 15]].concat());
    llama.verify_handoffs(&sound).unwrap();
    type Late = fn(&mut [Handoff]);
    let damages: [(&str, Late); 6] = [
        ("mailboxes that only the first stage clears", |of| {
            of.iter_mut().skip(1).for_each(|stage| stage.clears.clear());
        }),
        ("mailboxes that the first stage does not clear", |of| of[0].clears.clear()),
        ("a mailbox that is cleared while it is read", |of| of[2].clears = of[2].checks.clone()),
        ("a mailbox that is cleared in front of its maker", |of| {
            let queries = of[2].checks[0];
            of[5].clears.push(queries);
        }),
        ("squares at which nobody looks", |of| of[4].checks.truncate(1)),
        ("a checked crossing behind the embedding", |of| of[1].checks = of[6].checks.clone()),
    ];
    for (what, damage) in damages {
        let mut damaged = sound.clone();
        damage(&mut damaged);
        assert!(llama.verify_handoffs(&damaged).is_err(), "{what}");
    }
    // Where looking costs more than it brings.
    let wide = resident::Sizes { context: 4096, step_rows: 32 };
    let wide = resident::resident(&fused("llama", &example("llama-3.2-1b", 3), Format::BF16), wide).unwrap();
    assert!(wide.handoffs().iter().all(|handoff| *handoff == Handoff::default()));
    assert!(emit(&wide, Arch::Sm90a).unwrap().text.contains("constexpr u32 MAILBOXES = 0;"));
    // Attention of wide heads does not look, but what stands around it does.
    let wide_heads = program("mimo", &flash_mimo(), Format::FP8_BLOCK, 4096);
    wide_heads.verify_handoffs(&wide_heads.handoffs()).unwrap();
    for ((name, _, stage), handoff) in wide_heads.sequence().iter().zip(wide_heads.handoffs()).skip(2) {
        assert_eq!(handoff.checked(), !matches!(stage.kind, Kind::Attention(_)), "{name}");
    }
    // In a mixture neither the router looks, which reads a sum that stays, nor the second product of the experts; of a
    // layer's five in FP8 all do.
    let mixture = program("qwen3_moe", &example("qwen3-30b-a3b", 2), Format::BF16, 4096);
    let fp8 = program("llama", &example("llama-3.2-1b", 2), Format::FP8_BLOCK, 4096);
    let who = |program: &ResidentProgram| -> Vec<String> {
        let handoffs = program.handoffs();
        program.verify_handoffs(&handoffs).unwrap();
        let stages = program.sequence().into_iter().zip(&handoffs);
        stages.filter(|(_, handoff)| handoff.checked()).map(|((name, _, _), _)| name).collect()
    };
    let looking = ["attn", "attn_res", "act", "q+k+v", "attn", "attn_res", "act", "head"];
    let names = who(&mixture);
    assert!(
        names.iter().zip(looking).all(|(name, own)| name.ends_with(own)) && names.len() == 8,
        "{names:?}"
    );
    let names = who(&fp8);
    let looking =
        ["attn", "attn_res", "act", "ffn_res", "q+k+v", "attn", "attn_res", "act", "ffn_res", "head"];
    assert!(
        names.iter().zip(looking).all(|(name, own)| name.ends_with(own)) && names.len() == looking.len(),
        "{names:?}"
    );
    // Behind attention of one row most SMs come at once, which the crossing has to know.
    let text = emit(&fp8, Arch::Sm90a).unwrap().text;
    assert!(text.contains("CROSSING_CHECKED[STAGES] = {0, 1, 2, 1, 1, 1, 1, 2, 1, 1, 1, 0};"), "{text}");
}

#[test]
fn damaged_drafts_are_refused() {
    let [target, inject, _] = pair("pair", &odd_llama(), &mimo_draft(), Format::BF16, 200);
    let target_damages: [(&str, Damage); 4] = [
        ("a tap behind the layers", |p| p.taps.as_mut().unwrap().layers[0] = 2),
        ("a layer that is tapped twice", |p| p.taps.as_mut().unwrap().layers[0] = 0),
        ("a tap of other columns", |p| p.taps.as_mut().unwrap().cols = 32),
        ("a layer that leaves nothing", |p| {
            let Some(Kind::Gemm(gemm)) = p.bodies[0].last_mut().map(|stage| &mut stage.kind) else {
                panic!("the last product")
            };
            gemm.tap = false;
        }),
    ];
    let inject_damages: [(&str, Damage); 4] = [
        ("taps in the middle", |p| p.before.swap(0, 1)),
        ("more layers than caches", |p| p.kv.layers = 1),
        ("heads that do not fit", |p| context(p).kv_heads = 1),
        ("keys that are normed by two eps", |p| context(p).k_norms[1].as_mut().unwrap().eps = 0.5),
    ];
    let all = target_damages.into_iter().map(|damage| (&target, damage));
    for (sound, (what, damage)) in all.chain(inject_damages.into_iter().map(|damage| (&inject, damage))) {
        sound.verify().unwrap();
        let mut damaged = sound.clone();
        damage(&mut damaged);
        assert!(damaged.verify().is_err(), "{what} was accepted:\n{damaged}");
    }
}

fn context(program: &mut ResidentProgram) -> &mut tilec_ir::resident::Context {
    match program.before.last_mut().map(|stage| &mut stage.kind) {
        Some(Kind::Context(context)) => context,
        other => panic!("{other:?}"),
    }
}

/// A change that makes a program unsafe or meaningless.
type Damage = fn(&mut ResidentProgram);

#[test]
fn damaged_programs_are_refused() {
    let damages: [(&str, Damage); 9] = [
        ("more KV heads than the cache has", |p| p.kv.kv_heads = 1),
        ("a stage that reads what nobody wrote", |p| drop(p.bodies[0].remove(0))),
        ("stages in another order", |p| p.bodies[0].swap(1, 2)),
        ("a stage that writes what it reads", |p| {
            let Kind::Gemm(gemm) = &mut p.bodies[0][2].kind else { panic!("the output projection") };
            gemm.input = gemm.output;
            gemm.k = 64;
        }),
        ("codes without their scales", |p| {
            let Kind::Gemm(gemm) = &mut p.bodies[0][0].kind else { panic!("queries, keys and values") };
            gemm.format = Format::FP8_BLOCK;
        }),
        ("a residual that is not there", |p| p.before.clear()),
        ("weights behind the packed ones", |p| p.layers[1].offsets[1] = p.packing.bytes),
        ("a layer without its weights", |p| p.layers[0].offsets.truncate(2)),
        ("a gate with one operand", |p| {
            for stage in &mut p.bodies[0] {
                if let Kind::Gemm(gemm) = &mut stage.kind
                    && matches!(gemm.epilogue, Epilogue::Gated(_))
                {
                    gemm.operands = 1;
                }
            }
        }),
    ];
    let sound = program("llama", &odd_llama(), Format::BF16, 200);
    sound.verify().unwrap();
    for (what, damage) in damages {
        let mut damaged = sound.clone();
        damage(&mut damaged);
        assert!(damaged.verify().is_err(), "{what} was accepted:\n{damaged}");
    }
}

/// Every part of a selector and of a convolution that could be wrong is found before a kernel is made of it.
#[test]
fn damaged_selectors_are_refused() {
    let [_, _, good] = pair("pair", &odd_llama(), &second(mimo_draft()), Format::BF16, 200);
    good.verify().unwrap();
    type Damage = fn(&mut ResidentProgram);
    fn conv(program: &mut ResidentProgram) -> &mut tilec_ir::resident::Conv {
        let convs = program.bodies[0].iter_mut().filter_map(|stage| match &mut stage.kind {
            Kind::Conv(conv) => Some(conv),
            _ => None,
        });
        convs.last().unwrap()
    }
    fn pairs(program: &mut ResidentProgram) -> &mut tilec_ir::resident::Pairs {
        let pairs = program.after.iter_mut().find_map(|stage| match &mut stage.kind {
            Kind::Pairs(pairs) => Some(pairs),
            _ => None,
        });
        pairs.unwrap()
    }
    fn place(program: &ResidentProgram, of: fn(&Kind) -> bool) -> usize {
        program.after.iter().position(|stage| of(&stage.kind)).unwrap()
    }
    let damages: [(Damage, &str); 10] = [
        (|p| conv(p).group = 3, "convolution and its buffers"),
        (|p| conv(p).side = 2, "convolution and its buffers"),
        (|p| conv(p).input = conv(p).kernels, "convolution and its buffers"),
        (|p| conv(p).base = tilec_ir::stages::Slot::Layer(99), "not packed"),
        (|p| pairs(p).top.k = 33, "pairs and their buffers"),
        (|p| pairs(p).rank = 5000, "pairs and their buffers"),
        (|p| pairs(p).tables[0].1 = Format::FP8_BLOCK, "pairs and their buffers"),
        (|p| pairs(p).hidden = pairs(p).scores, "before it is written"),
        (|p| drop(p.after.remove(place(p, |kind| matches!(kind, Kind::Pairs(_))))), "before it is written"),
        (
            |p| {
                let top = place(p, |kind| matches!(kind, Kind::TopK(_)));
                let stage = p.after.remove(top);
                p.after.insert(0, stage);
            },
            "the logits in front of them",
        ),
    ];
    for (number, (damage, what)) in damages.into_iter().enumerate() {
        let mut program = good.clone();
        damage(&mut program);
        let error = program.verify().expect_err(&number.to_string()).to_string();
        assert!(error.contains(what), "{number}: {error}");
    }
    // More candidates or columns than a kernel keeps.
    for (key, value, what) in [("selector_top_k", 33, "at most 32"), ("selector_rank", 1025, "up to 1024")] {
        let mut draft = second(mimo_draft());
        draft["dflash_config"][key] = value.into();
        let refused = std::panic::catch_unwind(|| pair("pair", &odd_llama(), &draft, Format::BF16, 200));
        let problem = refused.expect_err(key);
        let problem = problem.downcast_ref::<String>().unwrap();
        assert!(problem.contains(what) && problem.contains("--no-draft"), "{problem}");
    }
}

#[test]
fn sizes_without_a_kernel_are_named() {
    let with = |key: &str, value: u64| {
        let mut config = odd_llama();
        config[key] = value.into();
        let program = lower("llama", &config, Format::BF16, 200).map_err(|error| error.to_string())?;
        emit(&program, Arch::Sm90a).map(drop).map_err(|error| error.to_string())
    };
    // Long rows are multiplied in parts.
    for (key, value) in [("hidden_size", 72), ("hidden_size", 16384), ("intermediate_size", 28672)] {
        assert_eq!(with(key, value), Ok(()), "{key} {value}");
    }
    for (key, value, said) in [
        ("hidden_size", 68, "multiples of 8"),
        ("head_dim", 20, "heads of 20"),
        ("head_dim", 512, "heads of 512"),
    ] {
        let error = with(key, value).unwrap_err();
        assert!(error.contains(said), "{key} {value}: {error}");
    }
    let mut config = qwen3_moe();
    config["hidden_size"] = 8200.into();
    let error = emit(&program("qwen3", &config, Format::BF16, 200), Arch::Sm90a).unwrap_err().to_string();
    assert!(
        error.contains("rows of 8200 columns; a kernel with 8 rows a step keeps at most 8192"),
        "{error}"
    );
}

#[test]
fn wide_kernels_keep_within_their_registers() {
    if !alone("wide_kernels_keep_within_their_registers") {
        return;
    }
    let nvrtc = Nvrtc::find().unwrap();
    let llama = fused("llama-3.2-1b", &example("llama-3.2-1b", 16), Format::BF16);
    let mixture = fused("gpt-oss-20b", &example("gpt-oss-20b", 24), Format::BF16);
    for (fused, step_rows) in [(&llama, 16), (&llama, 32), (&mixture, 16)] {
        let sizes = resident::Sizes { context: 4096, step_rows };
        let program = resident::resident(fused, sizes).unwrap();
        let text = emit(&program, Arch::Sm90a).unwrap().text;
        let text = CudaText { name: "kernel.cu", text: &text };
        let cubin = nvrtc.compile(&text, Arch::Sm90a, &Options::default()).unwrap();
        cubin.check(&[(KERNEL, budget(step_rows))]).unwrap_or_else(|over| panic!("{step_rows} rows: {over}"));
    }
    let sizes = |step_rows| resident::Sizes { context: 4096, step_rows };
    let error = resident::resident(&llama, sizes(24)).unwrap_err().to_string();
    assert!(error.contains("8, 16 or 32 rows, not 24"), "{error}");
    let mut config = qwen3_moe();
    config["hidden_size"] = 2056.into();
    let program = resident::resident(&fused("qwen3", &config, Format::BF16), sizes(32)).unwrap();
    let error = emit(&program, Arch::Sm90a).unwrap_err().to_string();
    assert!(
        error.contains("32 rows a step keeps at most 2048") && error.contains("lower limits.pass_rows"),
        "{error}"
    );
}

#[test]
fn plans_for_many_sequences_have_wide_kernels_where_rows_fit() {
    let plan = |hidden: usize, sequences: usize, pass_rows: Option<usize>| {
        let mut config = qwen3_moe();
        (config["hidden_size"], config["num_hidden_layers"]) = (hidden.into(), 1.into());
        let tensors = frontends::synthetic_tensors(&config, Format::BF16).unwrap();
        let weights = WeightsFrom::Synthetic { seed: 1, config: Value::Null, tensors: Default::default() };
        let input = Input {
            name: "qwen3",
            config: &config,
            tensors: &tensors,
            weights,
            tokenizer: None,
            draft: None,
        };
        let mut spec = ModelSpec::for_checkpoint("unused");
        spec.precision.experts = Some(WeightFormat::Converted(Format::MXFP4));
        (spec.target.device, spec.target.arch) = (Device::Cuda, "sm_90a".into());
        (spec.limits.sequences, spec.limits.context, spec.limits.pass_rows) =
            (sequences, Some(64), pass_rows);
        let compiled = compile(&input, &spec, &Host { threads: 1, cubins: None });
        compiled.map(|compiled| compiled.plan.resident.unwrap().step_rows).map_err(|error| error.to_string())
    };
    assert_eq!(plan(64, 8, None), Ok(8));
    assert_eq!(plan(64, 9, None), Ok(16));
    // Rows of experts are not multiplied in parts: what nobody asked for is left, what somebody did is an error.
    assert_eq!(plan(4104, 9, None), Ok(8));
    let error = plan(4104, 9, Some(16)).unwrap_err();
    assert!(error.contains("rows of 4104 columns") && error.contains("lower limits.pass_rows"), "{error}");
}

#[test]
fn mixtures_of_all_families_have_kernels() {
    let nvrtc = Nvrtc::find().unwrap();
    for (name, config) in [("gpt-oss", models::gpt_oss()), ("mimo", models::mimo_v2())] {
        let program = program(name, &config, Format::BF16, 64);
        let text = emit(&program, Arch::Sm90a).unwrap().text;
        let options = Options { fast: true, ..Options::default() };
        nvrtc.compile(&CudaText { name: "kernel.cu", text: &text }, Arch::Sm90a, &options).unwrap();
    }
}

#[test]
fn parts_of_a_matrix_that_octets_do_not_fit_are_refused() {
    let with = |format, part: &str, change: fn(&mut View)| {
        let mut fused = fused("mimo", &dense_mimo(), format);
        let weight = fused.weights.get_mut(&format!("model.layers.1.self_attn.qkv_proj.weight[{part}]"));
        change(weight.unwrap().view.as_mut().unwrap());
        resident::resident(&fused, 64).map(drop).map_err(|error| error.to_string())
    };
    // Rows have 64 columns.
    let shift: fn(&mut View) = |view| view.start += 4 * 64;
    assert_eq!(with(Format::BF16, "k", shift), Ok(()));
    let error = with(Format::FP8_BLOCK, "k", shift).unwrap_err();
    assert!(error.contains("two scales") && error.contains("precision.weights to bf16"), "{error}");
    for (change, said) in [
        ((|view| view.start += 1) as fn(&mut View), "not cut at whole rows of 64"),
        (|view| view.block = 100 * 64, "not multiples of 8"),
        (|view| (view.block, view.stride) = (8 * 64, usize::MAX / 64 * 64), "overflows"),
    ] {
        let error = with(Format::BF16, "q", change).unwrap_err();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn damaged_choices_of_experts_are_refused() {
    let damages: [(&str, Damage); 12] = [
        ("slots that nobody chose", |p| drop(p.bodies[0].remove(3))),
        ("a choice behind the slots", |p| p.bodies[0].swap(3, 4)),
        ("more experts of a row than there are", |p| experts(p, 3).top_k = 99),
        ("slots for another number of experts", |p| experts(p, 4).top_k = 1),
        ("scores of other experts", |p| {
            let x = p.bodies[0][0].kind.gemm().unwrap().input;
            experts(p, 3).route.as_mut().unwrap().scores = x;
        }),
        ("slots that are stored", |p| experts(p, 4).gemm.epilogue = Epilogue::Store),
        ("scores that nobody began", |p| {
            let Kind::Attention(attention) = &mut p.bodies[0][1].kind else { panic!("attention") };
            attention.router = None;
        }),
        ("scores that nobody completed", |p| {
            let Kind::Gemm(gemm) = &mut p.bodies[0][2].kind else { panic!("the output projection") };
            gemm.router = None;
        }),
        ("scores of what is not added to the rows", |p| {
            let Kind::Gemm(gemm) = &mut p.bodies[0][2].kind else { panic!("the output projection") };
            gemm.epilogue = Epilogue::Store;
        }),
        ("scores that are normalized by other rows", |p| {
            let other = p.bodies[0][0].kind.gemm().unwrap().prepared.unwrap().squares;
            experts(p, 3).route.as_mut().unwrap().unscaled.as_mut().unwrap().squares = other;
        }),
        ("a forecast that nobody asks for", |p| {
            let Kind::Gemm(gemm) = &mut p.bodies[0][2].kind else { panic!("the output projection") };
            gemm.router.as_mut().unwrap().foresees = false;
        }),
        ("a forecast by the scores that it is of", |p| {
            let route = experts(p, 3).route.as_mut().unwrap();
            route.unscaled.as_mut().unwrap().foreseen = Some(route.scores);
        }),
    ];
    let sound = program("moe", &qwen3_moe(), Format::BF16, 200);
    sound.verify().unwrap();
    for (what, damage) in damages {
        let mut damaged = sound.clone();
        damage(&mut damaged);
        assert!(damaged.verify().is_err(), "{what} was accepted:\n{damaged}");
    }
}

/// The experts of stage `number` of a layer.
fn experts(program: &mut ResidentProgram, number: usize) -> &mut tilec_ir::resident::Experts {
    let Kind::Experts(experts) = &mut program.bodies[0][number].kind else { panic!("no experts") };
    experts
}

/// Experts in FP4, all else in bfloat16.
fn fp4_experts() -> ResidentProgram {
    mixture("qwen3-moe-fp4", Format::BF16, Format::MXFP4)
}

/// gpt-oss-20b, experts in FP4.
fn banded_experts() -> ResidentProgram {
    let sizes = resident::Sizes { context: 200, step_rows: 8 };
    mixture_of("gpt-oss-fp4", &example("gpt-oss-20b", 24), Format::BF16, Format::MXFP4, sizes)
}

/// Experts whose bands have as many octets as they may.
fn long_experts() -> ResidentProgram {
    let mut config = qwen3_moe();
    config["hidden_size"] = 800.into();
    config["moe_intermediate_size"] = 10_880.into();
    let sizes = resident::Sizes { context: 200, step_rows: 8 };
    mixture_of("long experts", &config, Format::BF16, Format::MXFP4, sizes)
}

#[test]
fn damaged_bands_are_refused() {
    let sound = banded_experts();
    sound.verify().unwrap();
    let bands = experts(&mut sound.clone(), 4).bands.unwrap();
    // 45 bands of 23 strips: 1,035 of the 1,056 warps of a large chip.
    assert_eq!((bands.octets, bands.strips(&experts(&mut sound.clone(), 4).gemm)), (8, 1035));
    let damages: [(&str, Damage); 5] = [
        ("bands of other octets", |p| experts(p, 4).bands.as_mut().unwrap().octets = 4),
        ("bands of a first product", |p| {
            let bands = experts(p, 4).bands;
            experts(p, 3).bands = bands;
        }),
        ("parts in another buffer", |p| {
            let other = p.bodies[0][0].kind.gemm().unwrap().output;
            experts(p, 4).bands.as_mut().unwrap().parts = other;
        }),
        ("bands of a format that they are not made for", |p| experts(p, 4).gemm.format = Format::BF16),
        ("bands that no octets fill", |p| experts(p, 4).gemm.cols += 8),
    ];
    for (what, damage) in damages {
        let mut damaged = sound.clone();
        damage(&mut damaged);
        assert!(damaged.verify().is_err(), "{what} was accepted:\n{damaged}");
    }
    // Consumers add to rows in place, so that behind the stage that reads these no crossing is checked.
    let handoffs = sound.handoffs();
    let sequence = sound.sequence();
    let banded = |kind: &Kind| matches!(kind, Kind::Experts(experts) if experts.bands.is_some());
    let at = sequence.iter().position(|(_, _, stage)| banded(&stage.kind)).unwrap();
    assert!(handoffs[at].checked());
    let mut late = sound.clone();
    let rows = experts(&mut late, 4).gemm.output;
    experts(&mut late, 3).route.as_mut().unwrap().scores = rows;
    let mut of_late = late.handoffs();
    late.verify_handoffs(&of_late).unwrap();
    assert!(!of_late[at].checked());
    of_late[at].checks.clone_from(&handoffs[at].checks);
    let error = late.verify_handoffs(&of_late).unwrap_err().to_string();
    assert!(error.contains("while other SMs read it"), "{error}");
}

/// Experts in one format, all else in another.
fn mixture(name: &str, weights: Format, experts: Format) -> ResidentProgram {
    mixture_of(name, &qwen3_moe(), weights, experts, resident::Sizes { context: 200, step_rows: 8 })
}

fn mixture_of(
    name: &str,
    config: &Value,
    weights: Format,
    experts: Format,
    sizes: resident::Sizes,
) -> ResidentProgram {
    let tensors = frontends::synthetic_tensors(config, Format::BF16).unwrap();
    let mut graph = frontends::build(config, &tensors).unwrap();
    graph.name = name.into();
    let mut precision = ModelSpec::for_checkpoint("unused").precision;
    precision.activations = Activations::F32;
    precision.weights = WeightFormat::Converted(weights);
    precision.experts = Some(WeightFormat::Converted(experts));
    precision::precision(&mut graph, &precision).unwrap();
    resident::resident(&fuse::fuse(&graph).unwrap(), sizes).unwrap()
}

/// Mixtures of published shapes, whose experts are in FP8 and NVFP4, beside the formats that were there before.
#[test]
fn scaled_experts_keep_within_their_registers() {
    if !alone("scaled_experts_keep_within_their_registers") {
        return;
    }
    let nvrtc = Nvrtc::find().unwrap();
    let config = example("qwen3-30b-a3b", 2);
    for (weights, experts, step_rows) in [
        (Format::BF16, Format::NVFP4, 8),
        (Format::FP8_CHANNEL, Format::NVFP4, 16),
        (Format::FP8_BLOCK, Format::FP8_BLOCK, 8),
        (Format::FP8_CHANNEL, Format::FP8_CHANNEL, 8),
        (Format::FP8_1X128, Format::FP8_1X128, 8),
    ] {
        let sizes = resident::Sizes { context: 4096, step_rows };
        let program = mixture_of("qwen3-30b-a3b", &config, weights, experts, sizes);
        let text = emit(&program, Arch::Sm90a).unwrap().text;
        let text = CudaText { name: "kernel.cu", text: &text };
        let cubin = nvrtc.compile(&text, Arch::Sm90a, &Options::default()).unwrap();
        cubin
            .check(&[(KERNEL, budget(step_rows))])
            .unwrap_or_else(|over| panic!("{weights} and {experts}, {step_rows} rows: {over}"));
    }
}
