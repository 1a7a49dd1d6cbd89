//! The resident kernel, on a machine without a GPU: its levels as snapshots, its machine code on
//! every architecture, its resources where it is tuned, and programs that must be refused.

mod models;

use models::{llama, qwen3};
use serde_json::Value;
use tilec_codegen::compile::BUDGET;
use tilec_codegen::emit::cuda::emit;
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::{Arch, Budget, CudaText, Nvrtc, Options};
use tilec_codegen::passes::tile::TileError;
use tilec_codegen::passes::{fuse, precision, resident};
use tilec_ir::format::Format;
use tilec_ir::fused::Fused;
use tilec_ir::graph::View;
use tilec_ir::launch::KERNEL;
use tilec_ir::resident::{Epilogue, Kind, ResidentProgram};
use tilec_ir::spec::{Activations, ModelSpec, WeightFormat};

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

/// What is emitted for the model itself, behind the device code that all kernels share.
fn own_text(program: &ResidentProgram) -> String {
    let text = emit(program, Arch::Sm90a).unwrap().text;
    let tables = text.find(&format!("// ==== {} ", program.name)).unwrap();
    let shared = text[tables..].find("// ==== attention.cuh").unwrap() + tables;
    let stages = text.find("\n// embed: ").unwrap();
    format!("{}...\n{}", &text[tables..shared], &text[stages..])
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
}

#[test]
fn every_architecture_gets_machine_code() {
    let nvrtc = Nvrtc::find().unwrap();
    for program in [
        program("llama", &odd_llama(), Format::Q4_1, 200),
        program("qwen3", &qwen3(), Format::BF16, 200),
        program("fp8", &odd_llama(), Format::FP8_BLOCK, 200),
        fp4_experts(),
        program("mimo", &flash_mimo(), Format::FP8_BLOCK, 200),
    ] {
        for arch in [Arch::Sm80, Arch::Sm89, Arch::Sm90a, Arch::Sm100a, Arch::Sm120a] {
            let text = emit(&program, arch).unwrap().text;
            let options = Options { fast: true, ..Options::default() };
            let cubin = nvrtc.compile(&CudaText { name: "kernel.cu", text: &text }, arch, &options).unwrap();
            cubin.kernel(KERNEL).unwrap();
        }
    }
}

#[test]
fn the_tuned_kernel_keeps_within_its_registers() {
    let nvrtc = Nvrtc::find().unwrap();
    // Two layers have the kernel of sixteen: layers are a loop.
    let llama = example("llama-3.2-1b", 2);
    // MiMo-V2-Flash but for its experts. Keys of 192 columns leave too few registers for what lives through
    // a stage, as the step's number: it is put away in front of the loops and fetched behind them.
    let spilled = Budget { registers: 168, stack: 64, spills: 840 };
    for (name, config, format, budget) in [
        ("llama-3.2-1b", &llama, Format::BF16, BUDGET),
        ("mimo", &flash_mimo(), Format::BF16, spilled),
        ("mimo", &flash_mimo(), Format::FP8_BLOCK, spilled),
    ] {
        let program = program(name, config, format, 4096);
        let text = emit(&program, Arch::Sm90a).unwrap().text;
        let text = CudaText { name: "kernel.cu", text: &text };
        let cubin = nvrtc.compile(&text, Arch::Sm90a, &Options::default()).unwrap();
        cubin.check(&[(KERNEL, budget)]).unwrap_or_else(|over| panic!("{name} {format}: {over}"));
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
fn a_context_with_more_parts_than_counters_is_refused() {
    // All of MiMo's.
    emit(&program("mimo", &flash_mimo(), Format::FP8_BLOCK, 262_144), Arch::Sm90a).unwrap();
    let program = program("llama", &odd_llama(), Format::BF16, 1 << 22);
    let error = emit(&program, Arch::Sm90a).unwrap_err().to_string();
    assert_eq!(
        error,
        "2 KV heads over 4194304 positions: more parts than the kernel counts; lower limits.context"
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

#[test]
fn sizes_without_a_kernel_are_named() {
    let with = |key: &str, value: u64| {
        let mut config = odd_llama();
        config[key] = value.into();
        let program = lower("llama", &config, Format::BF16, 200).map_err(|error| error.to_string())?;
        emit(&program, Arch::Sm90a).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(with("hidden_size", 72), Ok(()));
    for (key, value, said) in [
        ("hidden_size", 68, "multiples of 8"),
        ("head_dim", 20, "heads of 20"),
        ("head_dim", 512, "heads of 512"),
        ("intermediate_size", 12296, "12296 columns"),
    ] {
        let error = with(key, value).unwrap_err();
        assert!(error.contains(said), "{key} {value}: {error}");
    }
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
    let damages: [(&str, Damage); 6] = [
        ("slots that nobody chose", |p| drop(p.bodies[0].remove(4))),
        ("a choice behind the slots", |p| p.bodies[0].swap(4, 5)),
        ("more experts of a row than there are", |p| experts(p, 4).top_k = 99),
        ("slots for another number of experts", |p| experts(p, 5).top_k = 1),
        ("scores of other experts", |p| {
            let x = p.bodies[0][0].kind.gemm().unwrap().input;
            experts(p, 4).route.as_mut().unwrap().scores = x;
        }),
        ("slots that are stored", |p| experts(p, 5).gemm.epilogue = Epilogue::Store),
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
    let config = qwen3_moe();
    let tensors = frontends::synthetic_tensors(&config, Format::BF16).unwrap();
    let mut graph = frontends::build(&config, &tensors).unwrap();
    graph.name = "qwen3-moe-fp4".into();
    let mut precision = ModelSpec::for_checkpoint("unused").precision;
    precision.activations = Activations::F32;
    precision.experts = Some(WeightFormat::Converted(Format::MXFP4));
    precision::precision(&mut graph, &precision).unwrap();
    resident::resident(&fuse::fuse(&graph).unwrap(), 200).unwrap()
}
