use super::*;
use serde_json::json;
use std::path::Path;
use tilec_ir::graph::{Op, RopeScaling};

/// A Llama of 2 layers with this patch on its config.
fn llama(patch: Value) -> Value {
    patched(
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64,
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        }),
        patch,
    )
}

/// A Qwen3 of 3 layers with this patch on its config.
fn qwen3(patch: Value) -> Value {
    patched(
        json!({
            "model_type": "qwen3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 256,
        }),
        patch,
    )
}

/// Sets the keys of `patch`; `{"key": "remove!"}` takes a key out.
fn patched(mut config: Value, patch: Value) -> Value {
    let object = config.as_object_mut().unwrap();
    for (key, value) in patch.as_object().unwrap() {
        if value == "remove!" {
            object.remove(key);
        } else {
            object.insert(key.clone(), value.clone());
        }
    }
    config
}

fn graph(config: &Value) -> Graph {
    build(config, &synthetic_tensors(config, Format::BF16).unwrap()).unwrap()
}

/// Names of all values, without those of the layers after `layer`.
fn names(graph: &Graph, layer: usize) -> Vec<String> {
    let nodes = graph.ids().into_iter().map(|id| graph.node(id));
    nodes.filter(|node| node.layer.is_none_or(|l| l <= layer)).map(|node| node.name.clone()).collect()
}

fn scaling(config: &Value) -> RopeScaling {
    parse(config).unwrap().ropes["rope"].scaling.clone()
}

#[test]
fn llama_layers_have_the_usual_operators() {
    let graph = graph(&llama(json!({})));
    let wanted = "embed l0.attn_norm l0.q l0.q_rope l0.k l0.k_rope l0.v l0.kv l0.attn l0.o l0.attn_res \
                  l0.ffn_norm l0.gate l0.up l0.act l0.down l0.ffn_res select norm head logits";
    assert_eq!(names(&graph, 0).join(" "), wanted);
    let operands = |name: &str| -> Vec<String> {
        let ids = graph.operands(graph.find(name).unwrap());
        ids.into_iter().map(|id| graph.node(id).name.clone()).collect()
    };
    assert_eq!(operands("l0.kv"), ["l0.k_rope", "l0.v"]);
    assert_eq!(operands("l0.attn"), ["l0.q_rope", "l0.kv"]);
    assert_eq!(operands("l0.act"), ["l0.gate", "l0.up"]);
    assert_eq!(operands("l0.ffn_res"), ["l0.attn_res", "l0.down"]);
    assert_eq!(operands("l1.attn_norm"), ["l0.ffn_res"]);
    assert_eq!(operands("select"), ["l1.ffn_res"]);
    match &graph.node(graph.find("l1.attn").unwrap()).op {
        Op::Attention { cache: 1, heads: 4, scale, window: None, sinks: None, bidirectional: false } => {
            assert_eq!(*scale, 0.353_553_38);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(graph.caches.len(), 2);
    assert_eq!((graph.caches[0].kv_heads, graph.caches[0].qk_dim, graph.caches[0].v_dim), (2, 8, 8));
    let weight = &graph.weights["lm_head.weight"];
    assert_eq!((weight.stored, weight.format), (Format::BF16, Format::BF16));
}

#[test]
fn biases_and_head_norms_stand_behind_their_projections() {
    let llama = graph(&llama(json!({"attention_bias": true, "mlp_bias": true})));
    let wanted = "embed l0.attn_norm l0.q l0.q_bias l0.q_rope l0.k l0.k_bias l0.k_rope l0.v l0.v_bias \
                  l0.kv l0.attn l0.o l0.o_bias l0.attn_res l0.ffn_norm l0.gate l0.gate_bias l0.up \
                  l0.up_bias l0.act l0.down l0.down_bias l0.ffn_res select norm head logits";
    assert_eq!(names(&llama, 0).join(" "), wanted);
    let qwen3 = graph(&qwen3(json!({"attention_bias": true, "mlp_bias": true})));
    let wanted = "embed l0.attn_norm l0.q l0.q_bias l0.q_norm l0.q_rope l0.k l0.k_bias l0.k_norm l0.k_rope \
                  l0.v l0.v_bias l0.kv l0.attn l0.o l0.o_bias l0.attn_res l0.ffn_norm l0.gate l0.up \
                  l0.act l0.down l0.ffn_res select norm head logits";
    assert_eq!(names(&qwen3, 0).join(" "), wanted);
    assert_eq!(qwen3.weights["model.layers.0.self_attn.q_norm.weight"].shape, [16]);
}

#[test]
fn a_tied_head_is_the_embedding() {
    let config = llama(json!({"tie_word_embeddings": true}));
    let mut tensors = synthetic_tensors(&config, Format::Q8_0).unwrap();
    assert!(!tensors.contains_key("lm_head.weight"));
    // Some checkpoints store the copy all the same.
    tensors.insert("lm_head.weight".into(), TensorInfo::new([64, 32], Format::Q8_0));
    let graph = build(&config, &tensors).unwrap();
    let head = graph.node(graph.find("head").unwrap());
    assert!(head.op.weights().eq(["model.embed_tokens.weight"]));
    assert!(!graph.weights.contains_key("lm_head.weight"));
}

#[test]
fn expected_tensors_are_in_model_order() {
    let tensors = expected_tensors(&qwen3(json!({"num_hidden_layers": 1}))).unwrap();
    let lines: Vec<String> = tensors.iter().map(|(name, shape)| format!("{name} {shape:?}")).collect();
    assert_eq!(
        lines,
        [
            "model.embed_tokens.weight [64, 32]",
            "model.layers.0.input_layernorm.weight [32]",
            "model.layers.0.self_attn.q_norm.weight [16]",
            "model.layers.0.self_attn.k_norm.weight [16]",
            "model.layers.0.post_attention_layernorm.weight [32]",
            "model.layers.0.self_attn.q_proj.weight [64, 32]",
            "model.layers.0.self_attn.k_proj.weight [32, 32]",
            "model.layers.0.self_attn.v_proj.weight [32, 32]",
            "model.layers.0.self_attn.o_proj.weight [32, 64]",
            "model.layers.0.mlp.gate_proj.weight [48, 32]",
            "model.layers.0.mlp.up_proj.weight [48, 32]",
            "model.layers.0.mlp.down_proj.weight [32, 48]",
            "model.norm.weight [32]",
            "lm_head.weight [64, 32]",
        ]
    );
}

#[test]
fn defaults_are_those_of_transformers() {
    let llama = parse(&json!({"model_type": "llama"})).unwrap();
    assert_eq!((llama.vocab, llama.hidden, llama.intermediate), (32000, 4096, 11008));
    assert_eq!((llama.heads, llama.kv_heads, llama.head_dim, llama.layers.len()), (32, 32, 128, 32));
    assert_eq!((llama.eps, llama.tied, llama.context), (1e-6, false, 2048));
    assert_eq!((llama.bos, llama.eos), (Some(1), vec![2]));
    assert_eq!(llama.ropes["rope"].theta, 10000.0);
    let qwen3 = parse(&json!({"model_type": "qwen3", "num_attention_heads": 64})).unwrap();
    assert_eq!((qwen3.vocab, qwen3.intermediate, qwen3.context), (151_936, 22_016, 32_768));
    assert_eq!((qwen3.heads, qwen3.kv_heads, qwen3.head_dim), (64, 32, 128));
    assert_eq!((qwen3.bos, qwen3.eos), (None, vec![]));
    // null is not "absent" here: it asks for as many KV heads as query heads.
    let mha = json!({"model_type": "qwen3", "num_attention_heads": 64, "num_key_value_heads": null});
    assert_eq!(parse(&mha).unwrap().kv_heads, 64);
}

#[test]
fn facts_come_from_the_config() {
    let config = llama(json!({"eos_token_id": [5, 7], "bos_token_id": null}));
    let wanted = ModelFacts {
        family: "llama",
        vocab: 64,
        hidden: 32,
        layers: 2,
        context: 256,
        bos: None,
        eos: vec![5, 7],
    };
    assert_eq!(facts(&config).unwrap(), wanted);
}

#[test]
fn ropes_are_read_in_both_spellings() {
    let classic = |scaling: Value| llama(json!({"rope_theta": 5e5, "rope_scaling": scaling}));
    let current = |mut parameters: Value| {
        parameters.as_object_mut().unwrap().insert("rope_theta".into(), json!(5e5));
        llama(json!({"rope_parameters": parameters}))
    };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64,
    };
    let yarn = |attention_factor: f64, original_context: usize, truncate: bool| RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context,
        attention_factor,
        truncate,
    };
    let magnitude = 0.1 * 4f64.ln() + 1.0;
    let cases = [
        (json!({"rope_type": "default"}), RopeScaling::None, 256),
        (json!({"rope_type": "linear", "factor": 3.0}), RopeScaling::Linear { factor: 3.0 }, 256),
        (json!({"type": "linear", "factor": 3}), RopeScaling::Linear { factor: 3.0 }, 256),
        (json!({"rope_type": "dynamic", "factor": 2.0}), RopeScaling::None, 256),
        (
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64}),
            llama3,
            256,
        ),
        (
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
            yarn(magnitude, 128, true),
            512,
        ),
        (json!({"rope_type": "yarn", "factor": 4.0}), yarn(magnitude, 256, true), 1024),
        (
            json!({"rope_type": "yarn", "original_max_position_embeddings": 64, "truncate": false}),
            yarn(magnitude, 64, false),
            256,
        ),
        (
            json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5, "beta_fast": 0, "mscale": 2}),
            yarn(0.5, 256, true),
            1024,
        ),
        (
            json!({"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0.5}),
            yarn((0.2 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0), 256, true),
            1024,
        ),
        (
            json!({"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 0}),
            yarn(magnitude, 256, true),
            1024,
        ),
        (
            json!({"rope_type": "factors", "factors": [1.0, 2.0, 4.0, 8.0]}),
            RopeScaling::Factors { factors: vec![1.0, 2.0, 4.0, 8.0] },
            256,
        ),
    ];
    for (parameters, wanted, context) in cases {
        for config in [classic(parameters.clone()), current(parameters.clone())] {
            let decoder = parse(&config).unwrap();
            let rope = &decoder.ropes["rope"];
            assert_eq!((rope.dims, rope.theta), (8, 5e5), "{parameters}");
            assert_eq!((&rope.scaling, decoder.context), (&wanted, context), "{parameters}");
        }
    }
}

#[test]
fn rope_keys_have_the_precedence_of_transformers() {
    let theta = |patch| parse(&llama(patch)).unwrap().ropes["rope"].theta;
    assert_eq!(theta(json!({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}})), 9.0);
    assert_eq!(theta(json!({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default"}})), 7.0);
    assert_eq!(theta(json!({"rope_scaling": null, "rope_theta": 7.0})), 7.0);
    let both =
        json!({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 9.0}});
    assert_eq!(scaling(&llama(both)), RopeScaling::Linear { factor: 2.0 });
    let yarn = json!({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16});
    let beside = json!({"rope_parameters": yarn, "original_max_position_embeddings": 32});
    match scaling(&llama(beside)) {
        RopeScaling::Yarn { original_context, .. } => assert_eq!(original_context, 32),
        other => panic!("{other:?}"),
    }
}

#[test]
fn qwen3_windows_follow_either_spelling() {
    let windows = |patch| -> Vec<Option<usize>> {
        parse(&qwen3(patch)).unwrap().layers.iter().map(|layer| layer.window).collect()
    };
    let w = Some(16);
    let sliding = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
    assert_eq!(windows(sliding), [None, w, w]);
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let by_type = json!({"use_sliding_window": true, "sliding_window": 16, "layer_types": types});
    assert_eq!(windows(by_type), [w, None, w]);
    assert_eq!(windows(json!({"sliding_window": 16, "max_window_layers": 0})), [None, None, None]);
    let null = json!({"use_sliding_window": true, "sliding_window": null, "max_window_layers": 0});
    assert_eq!(windows(null), [None, None, None]);
    let default = json!({"use_sliding_window": true, "max_window_layers": 2});
    assert_eq!(windows(default), [None, None, Some(4096)]);
}

#[test]
fn each_layer_type_may_have_its_own_rope() {
    let config = qwen3(json!({
        "use_sliding_window": true, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }));
    let graph = graph(&config);
    let rope_of = |name: &str| match &graph.node(graph.find(name).unwrap()).op {
        Op::Rope { rope, .. } => rope.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!([rope_of("l0.q_rope"), rope_of("l1.k_rope")], ["sliding_attention", "full_attention"]);
    assert_eq!(graph.ropes["full_attention"].theta, 1e6);
    assert_eq!(graph.ropes["sliding_attention"].theta, 1e4);
    // The layers without scaling bound the context.
    assert_eq!(facts(&config).unwrap().context, 256);
}

#[test]
fn impossible_configs_are_refused() {
    let rope = |parameters: Value| llama(json!({"rope_parameters": parameters}));
    let types = |types: Value| qwen3(json!({"layer_types": types}));
    let cases: Vec<(Value, &[&str])> = vec![
        (json!([]), &["(top)", "JSON object"]),
        (json!({}), &["unknown architecture", "neither", "llama", "Qwen3ForCausalLM"]),
        (json!({"model_type": "gpt2"}), &["unknown architecture gpt2", "known are llama"]),
        (llama(json!({"architectures": ["LlamaForSequenceClassification"]})), &["ForSequenceClassification"]),
        (llama(json!({"architectures": "LlamaForCausalLM"})), &["`architectures`", "list of texts"]),
        (llama(json!({"hidden_act": "gelu"})), &["`hidden_act`", "gelu", "silu"]),
        (llama(json!({"hidden_size": 0})), &["`hidden_size`", "from 1 up"]),
        (llama(json!({"hidden_size": -32})), &["`hidden_size`", "-32"]),
        (llama(json!({"hidden_size": 32.5})), &["`hidden_size`", "32.5"]),
        (llama(json!({"hidden_size": "32"})), &["`hidden_size`", "\"32\""]),
        (llama(json!({"vocab_size": u64::MAX})), &["`vocab_size`", "beyond"]),
        (llama(json!({"num_hidden_layers": 0})), &["`num_hidden_layers`"]),
        (llama(json!({"num_hidden_layers": 1_000_000})), &["`num_hidden_layers`", "beyond"]),
        (
            llama(json!({"num_attention_heads": 5, "num_key_value_heads": 5})),
            &["5 does not divide hidden_size 32"],
        ),
        (llama(json!({"num_key_value_heads": 3})), &["3 does not divide num_attention_heads 4"]),
        (llama(json!({"head_dim": 7})), &["`head_dim`", "odd"]),
        (llama(json!({"head_dim": 2_000_000})), &["`head_dim`", "beyond"]),
        (llama(json!({"max_position_embeddings": 0})), &["`max_position_embeddings`"]),
        (llama(json!({"rms_norm_eps": 0.0})), &["`rms_norm_eps`", "above 0"]),
        (llama(json!({"tie_word_embeddings": "yes"})), &["`tie_word_embeddings`", "true or false"]),
        (llama(json!({"eos_token_id": 64})), &["`eos_token_id`", "vocab_size 64"]),
        (llama(json!({"eos_token_id": [1, "x"]})), &["`eos_token_id`"]),
        (llama(json!({"rope_theta": -1.0})), &["`rope_theta`", "above 0"]),
        (llama(json!({"rope_scaling": "linear"})), &["`rope_scaling`", "an object"]),
        (llama(json!({"partial_rotary_factor": 0.5})), &["`partial_rotary_factor`"]),
        (rope(json!({"rope_type": "longrope"})), &["`rope_parameters.rope_type`", "longrope", "yarn"]),
        (rope(json!({"rope_type": "linear"})), &["`rope_parameters.factor`", "missing"]),
        (rope(json!({"rope_type": "linear", "factor": 0})), &["`rope_parameters.factor`", "above 0"]),
        (
            rope(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
            &["high_freq_factor", "above low_freq_factor"],
        ),
        (rope(json!({"rope_type": "yarn", "factor": 4, "beta_fast": 0.5})), &["beta_fast"]),
        (rope(json!({"rope_type": "yarn", "factor": 4, "rope_theta": 1.0})), &["rope_theta", "above 1"]),
        (rope(json!({"rope_type": "factors", "factors": [1.0]})), &["factors", "1 values for 4"]),
        (rope(json!({"rope_type": "factors", "factors": [1.0, 1.0, 0.0, 1.0]})), &["factors", "above 0"]),
        (rope(json!({"sliding_attention": {"rope_type": "default"}})), &["rope_parameters.full_attention"]),
        (types(json!(["full_attention"])), &["`layer_types`", "1 entries for 3 layers"]),
        (types(json!(["full_attention", "chunked", "full_attention"])), &["`layer_types`", "chunked"]),
        (
            types(json!(["full_attention", "sliding_attention", "full_attention"])),
            &["`layer_types`", "use_sliding_window"],
        ),
        (qwen3(json!({"use_sliding_window": true, "sliding_window": 0})), &["`sliding_window`"]),
    ];
    for (config, parts) in cases {
        let error = parse(&config).expect_err(&config.to_string()).to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let config = llama(json!({}));
    let good = synthetic_tensors(&config, Format::BF16).unwrap();
    let error = |change: &dyn Fn(&mut BTreeMap<String, TensorInfo>)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        build(&config, &tensors).unwrap_err().to_string()
    };
    let down = "model.layers.1.mlp.down_proj.weight";
    assert_eq!(
        error(&|tensors| drop(tensors.remove(down))),
        format!("tensor {down} of shape [32, 48] is missing from the checkpoint")
    );
    assert!(error(&|tensors| tensors.clear()).ends_with("missing from the checkpoint, and 20 more"));
    assert_eq!(
        error(&|tensors| tensors.get_mut(down).unwrap().shape = vec![48, 32]),
        format!("tensor {down} has shape [48, 32], but the config implies [32, 48]")
    );
    let norm = error(&|tensors| tensors.get_mut("model.norm.weight").unwrap().format = Format::Q8_0);
    assert!(norm.contains("model.norm.weight is stored as q8_0"), "{norm}");
    let bias = error(&|tensors| {
        let info = TensorInfo::new([32], Format::F32);
        tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), info);
    });
    assert!(bias.contains("q_proj.bias of shape [32] has no place in a llama model"), "{bias}");
    // What follows from the config anyway may be stored.
    let mut tensors = good.clone();
    for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "rope_freqs.weight"] {
        tensors.insert(name.into(), TensorInfo::new([4], Format::F32));
    }
    assert!(build(&config, &tensors).is_ok());
}

#[test]
fn the_example_has_as_many_parameters_as_qwen3_0_6b() {
    let config = example("qwen3-0.6b/config.json");
    let tensors = expected_tensors(&config).unwrap();
    assert_eq!(tensors.len(), 310);
    let parameters: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(parameters, 596_049_920);
    assert_eq!(max_context(&config).unwrap(), 40960);
}

fn example(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../examples/{name}"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A MiMo-V2 of 2 layers, the second a mixture with a window, with this patch on its config.
fn mimo_v2(patch: Value) -> Value {
    patched(
        json!({
            "model_type": "mimo_v2", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
            "swa_num_key_value_heads": 2, "head_dim": 24, "v_head_dim": 16, "sliding_window": 8,
            "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 32, "attention_value_scale": 0.5,
            "attention_projection_layout": "fused_qkv", "max_position_embeddings": 256,
        }),
        patch,
    )
}

fn gpt_oss(patch: Value) -> Value {
    patched(
        json!({
            "model_type": "gpt_oss", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256,
        }),
        patch,
    )
}

fn qwen3_moe(patch: Value) -> Value {
    patched(
        qwen3(json!({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                     "moe_intermediate_size": 24})),
        patch,
    )
}

#[test]
fn mixtures_have_a_router_and_experts_in_place_of_the_feed_forward_layer() {
    let mimo = graph(&mimo_v2(json!({})));
    let own = |layer: &str| -> Vec<String> {
        let nodes = mimo.ids().into_iter().map(|id| mimo.node(id).name.clone());
        nodes.filter_map(|name| Some(name.strip_prefix(layer)?.to_string())).collect()
    };
    let attention = "attn_norm q q_rope k k_rope v v_scale kv attn o attn_res ffn_norm";
    assert_eq!(own("l0.").join(" "), format!("{attention} gate up act down ffn_res"));
    assert_eq!(own("l1.").join(" "), format!("{attention} router route gate up act down experts ffn_res"));
    let view = |part: &str| {
        let weight = &mimo.weights[&format!("model.layers.1.self_attn.qkv_proj.weight[{part}]")];
        let view = weight.view.as_ref().unwrap();
        (weight.shape[0], view.start / 64, view.block / 64, view.stride / 64)
    };
    assert_eq!([view("q"), view("k"), view("v")], [(96, 0, 96, 176), (48, 96, 48, 176), (32, 144, 32, 176)]);
    let sinks = |name: &str| match &mimo.node(mimo.find(name).unwrap()).op {
        Op::Attention { sinks, window, .. } => (sinks.clone(), *window),
        other => panic!("{other:?}"),
    };
    assert_eq!(sinks("l0.attn"), (None, None));
    let name = "model.layers.1.self_attn.attention_sink_bias".to_string();
    assert_eq!(sinks("l1.attn"), (Some(name), Some(8)));
    assert_eq!(mimo.caches.iter().map(|cache| cache.kv_heads).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((mimo.ropes["global"].dims, mimo.ropes["window"].dims), (8, 8));

    let oss = graph(&gpt_oss(json!({})));
    let gate = &oss.weights["model.layers.0.mlp.experts.gate_up_proj[gate]"];
    assert_eq!((gate.shape.clone(), gate.view.as_ref().unwrap().stride), (vec![4, 32, 64], 128));
    let bias = &oss.weights["model.layers.0.mlp.experts.gate_up_proj_bias[up]"];
    assert_eq!((bias.shape.clone(), bias.view.as_ref().unwrap().start), (vec![4, 32], 1));
    tilec_ir::graph::verify(&mimo).unwrap();
    tilec_ir::graph::verify(&oss).unwrap();
}

#[test]
fn the_demo_checkpoint_is_what_its_config_says() {
    let tensors = expected_tensors(&example("mimo-mini/checkpoint/config.json")).unwrap();
    let parameters: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    assert_eq!(parameters, 42_683_016);
}

#[test]
fn impossible_mixtures_are_refused() {
    let cases: Vec<(Value, &[&str])> = vec![
        (qwen3_moe(json!({"num_experts_per_tok": 5})), &["`num_experts_per_tok`", "5 of 4 experts"]),
        (qwen3_moe(json!({"num_experts_per_tok": 0})), &["`num_experts_per_tok`", "from 1 up"]),
        (qwen3_moe(json!({"mlp_only_layers": [3]})), &["`mlp_only_layers`", "no layer 3 among 3"]),
        (qwen3_moe(json!({"mlp_only_layers": 1})), &["`mlp_only_layers`", "list of whole numbers"]),
        (gpt_oss(json!({"num_experts_per_tok": 5})), &["`num_experts_per_tok`", "5 of 4 experts"]),
        (gpt_oss(json!({"swiglu_limit": -1})), &["`swiglu_limit`", "above 0"]),
        (gpt_oss(json!({"layer_types": ["full_attention"]})), &["`layer_types`", "1 entries for 2"]),
        (mimo_v2(json!({"num_experts_per_tok": 5})), &["`num_experts_per_tok`", "5 of 4 experts"]),
        (mimo_v2(json!({"hybrid_layer_pattern": [0]})), &["`hybrid_layer_pattern`", "1 entries for 2"]),
        (mimo_v2(json!({"moe_layer_freq": [0, 2]})), &["`moe_layer_freq`", "neither 0 nor 1"]),
        (mimo_v2(json!({"moe_layer_freq": "remove!"})), &["`moe_layer_freq`", "missing"]),
        (mimo_v2(json!({"n_group": 2})), &["`n_group`", "2 is not supported"]),
        (mimo_v2(json!({"n_shared_experts": 1})), &["`n_shared_experts`", "1 is not supported"]),
        (mimo_v2(json!({"scoring_func": "softmax"})), &["`scoring_func`", "sigmoid"]),
        (mimo_v2(json!({"swa_head_dim": 32})), &["`swa_head_dim`", "must have 24"]),
        (mimo_v2(json!({"swa_num_key_value_heads": 3})), &["`swa_num_key_value_heads`", "3 KV heads"]),
        (mimo_v2(json!({"partial_rotary_factor": 0.01})), &["`partial_rotary_factor`", "no whole pairs"]),
        (mimo_v2(json!({"attention_value_scale": 1e300})), &["`attention_value_scale`", "float32"]),
        (mimo_v2(json!({"attention_projection_layout": "x"})), &["`attention_projection_layout`"]),
        (
            mimo_v2(json!({"hybrid_layer_pattern": "remove!", "layer_types": ["full_attention", "x"]})),
            &["`layer_types`", "\"x\" is neither full_attention nor sliding_attention"],
        ),
        (
            mimo_v2(json!({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}})),
            &["`rope_parameters.sliding_attention`", "missing"],
        ),
    ];
    for (config, parts) in cases {
        let error = parse(&config).expect_err(&config.to_string()).to_string();
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in {error:?}");
        }
    }
}

#[test]
fn experts_that_are_missing_or_differ_are_named() {
    let config = qwen3_moe(json!({}));
    let good: BTreeMap<String, TensorInfo> = expected_tensors(&config)
        .unwrap()
        .into_iter()
        .map(|(name, shape)| (name, TensorInfo::new(shape, Format::F32)))
        .collect();
    assert!(build(&config, &good).is_ok());
    let error = |change: &dyn Fn(&mut BTreeMap<String, TensorInfo>)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        build(&config, &tensors).unwrap_err().to_string()
    };
    let name = "model.layers.2.mlp.experts.3.down_proj.weight";
    assert_eq!(
        error(&|tensors| drop(tensors.remove(name))),
        format!("tensor {name} of shape [32, 24] is missing from the checkpoint")
    );
    let shape = error(&|tensors| tensors.get_mut(name).unwrap().shape = vec![24, 32]);
    assert_eq!(shape, format!("tensor {name} has shape [24, 32], but the config implies [32, 24]"));
    let mixed = error(&|tensors| tensors.get_mut(name).unwrap().format = Format::MXFP4);
    assert!(mixed.contains(&format!("{name} is stored as mxfp4")) && mixed.contains("f32"), "{mixed}");
    let extra = error(&|tensors| {
        let info = TensorInfo::new([32, 24], Format::F32);
        tensors.insert(name.replace(".3.", ".4."), info);
    });
    assert!(extra.contains("has no place in a qwen3_moe model"), "{extra}");
}

fn parameters(config: &Value) -> usize {
    expected_tensors(config).unwrap().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

#[test]
fn the_examples_of_mixtures_have_the_published_sizes() {
    assert_eq!(parameters(&example("qwen3-30b-a3b/config.json")), 30_532_122_624);
    assert_eq!(parameters(&example("gpt-oss-20b/config.json")), 20_914_757_184);
    assert_eq!(parameters(&example("gpt-oss-120b/config.json")), 116_829_156_672);
    // What the headers of the published files sum up to: bytes of experts in MXFP4, and of FP8 codes less
    // those of the three layers of multi-token prediction, which are not run.
    let mimo = published_tensors(&example("mimo-v2.5-pro/config.json")).unwrap();
    let sum = |format: Format, bytes: fn(usize) -> usize| -> usize {
        let of = mimo.values().filter(|info| info.format == format);
        of.map(|info| bytes(info.shape.iter().product())).sum()
    };
    assert_eq!(sum(Format::MXFP4, |weights| weights / 2 + weights / 32), 531_351_207_936);
    assert_eq!(sum(Format::FP8_BLOCK, |weights| weights), 13_378_781_184 - 3 * (27_136 + 3 * 16_384) * 6144);
}
