//! The checkpoint of `examples/mimo-mini` is whole and follows the layout of MiMo-V2.5-Pro-FP4-DFlash: names, shapes,
//! stored types, config fields and sizes. Everything expected is worked out from `config.json`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A tensor's stored type and shape.
type Stored = (Dtype, Vec<usize>);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/mimo-mini/checkpoint")
}

fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn number(config: &Value, name: &str) -> usize {
    config[name].as_u64().unwrap_or_else(|| panic!("config.json: `{name}` is no whole number")) as usize
}

fn flags(config: &Value, name: &str) -> Vec<bool> {
    let list = config[name].as_array().unwrap_or_else(|| panic!("config.json: `{name}` is no list"));
    list.iter().map(|v| v.as_u64() == Some(1)).collect()
}

/// The safetensors files of a folder, sorted by name.
fn weight_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
        .map(|entry| entry.expect("readable folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    files
}

/// Fails when the values of a tensor cannot be weights: not finite, or all alike where training moves them.
fn check_values(name: &str, dtype: Dtype, data: &[u8]) {
    match dtype {
        Dtype::BF16 => {
            for bits in data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])) {
                assert!(bits & 0x7f80 != 0x7f80, "{name}: a value is not finite");
            }
        }
        Dtype::F32 => {
            for value in data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])) {
                assert!(value.is_finite(), "{name}: a value is not finite");
                assert!(!name.ends_with("_scale_inv") || value > 0.0, "{name}: a scale is not positive");
            }
        }
        Dtype::F8_E4M3 => {
            assert!(data.iter().all(|b| b & 0x7f != 0x7f), "{name}: a value is not a number");
        }
        Dtype::U8 if name.ends_with("_scale") => {
            assert!(data.iter().all(|&b| b != 255), "{name}: a scale is not a number");
        }
        Dtype::U8 => {}
        other => panic!("{name}: no tensor of this layout is stored as {other:?}"),
    }
    if !name.ends_with("_scale") && !name.ends_with("_scale_inv") {
        assert!(data.chunks_exact(2).any(|pair| pair != &data[..2]), "{name}: every value is the same");
    }
}

/// Name to type and shape of every tensor in `files`, and name to file. Reads every value once.
fn stored(files: &[PathBuf]) -> (BTreeMap<String, Stored>, BTreeMap<String, String>) {
    let (mut tensors, mut place) = (BTreeMap::new(), BTreeMap::new());
    for file in files {
        let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        // Reading also proves that the file is whole: the header's last offset has to be its end.
        let parsed = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        for (name, view) in parsed.tensors() {
            check_values(&name, view.dtype(), view.data());
            let file = file.file_name().expect("a file").to_string_lossy().into_owned();
            assert!(place.insert(name.clone(), file).is_none(), "{name} is stored twice");
            tensors.insert(name, (view.dtype(), view.shape().to_vec()));
        }
    }
    (tensors, place)
}

fn assert_same(found: &BTreeMap<String, Stored>, expected: &BTreeMap<String, Stored>) {
    for (name, want) in expected {
        assert_eq!(found.get(name), Some(want), "{name}");
    }
    for name in found.keys() {
        assert!(expected.contains_key(name), "{name} is no tensor of this layout");
    }
}

/// The tensors that the published layout has for this `config.json`.
fn target_layout(config: &Value) -> BTreeMap<String, Stored> {
    let n = |name| number(config, name);
    let (hidden, heads, groups) = (n("hidden_size"), n("num_attention_heads"), n("num_key_value_heads"));
    let (qk, v) = (n("head_dim"), n("v_head_dim"));
    let block = 128;
    let mut all = BTreeMap::new();
    let mut put = |name: String, dtype, shape: Vec<usize>| {
        assert!(all.insert(name, (dtype, shape)).is_none());
    };
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        put(name.into(), Dtype::BF16, vec![n("vocab_size"), hidden]);
    }
    put("model.norm.weight".into(), Dtype::BF16, vec![hidden]);
    let (windows, sparse) = (flags(config, "hybrid_layer_pattern"), flags(config, "moe_layer_freq"));
    assert_eq!(windows.len(), n("num_hidden_layers"));
    assert_eq!(sparse.len(), n("num_hidden_layers"));
    for (layer, (&window, &sparse)) in windows.iter().zip(&sparse).enumerate() {
        let p = format!("model.layers.{layer}.");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            put(format!("{p}{norm}.weight"), Dtype::BF16, vec![hidden]);
        }
        // The fused projection is cut into as many groups as a global layer has KV heads, in every layer; the
        // scales are cut group by group.
        let kv = if window { n("swa_num_key_value_heads") } else { groups };
        let rows = heads / groups * qk + kv / groups * (qk + v);
        let qkv = format!("{p}self_attn.qkv_proj.weight");
        let scales = vec![groups * rows.div_ceil(block), hidden.div_ceil(block)];
        put(format!("{qkv}_scale_inv"), Dtype::F32, scales);
        put(qkv, Dtype::F8_E4M3, vec![groups * rows, hidden]);
        put(format!("{p}self_attn.o_proj.weight"), Dtype::BF16, vec![hidden, heads * v]);
        if window {
            put(format!("{p}self_attn.attention_sink_bias"), Dtype::BF16, vec![heads]);
        }
        if sparse {
            let (experts, width) = (n("n_routed_experts"), n("moe_intermediate_size"));
            put(format!("{p}mlp.gate.weight"), Dtype::BF16, vec![experts, hidden]);
            put(format!("{p}mlp.gate.e_score_correction_bias"), Dtype::F32, vec![experts]);
            for expert in 0..experts {
                for (name, out, k) in
                    [("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)]
                {
                    let name = format!("{p}mlp.experts.{expert}.{name}_proj.weight");
                    put(format!("{name}_scale"), Dtype::U8, vec![out, k / 32]);
                    put(name, Dtype::U8, vec![out, k / 2]);
                }
            }
        } else {
            let width = n("intermediate_size");
            for (name, out, k) in [("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)] {
                let name = format!("{p}mlp.{name}_proj.weight");
                put(format!("{name}_scale_inv"), Dtype::F32, vec![out.div_ceil(block), k.div_ceil(block)]);
                put(name, Dtype::F8_E4M3, vec![out, k]);
            }
        }
    }
    all
}

/// The tensors that a DFlash draft has for this `dflash/config.json`.
fn draft_layout(config: &Value) -> BTreeMap<String, Stored> {
    let n = |name| number(config, name);
    let (hidden, heads, kv, head) =
        (n("hidden_size"), n("num_attention_heads"), n("num_key_value_heads"), n("head_dim"));
    let taps = config["dflash_config"]["target_layer_ids"].as_array().expect("taps").len();
    let mut all: Vec<(String, Vec<usize>)> = vec![
        ("fc.weight".into(), vec![hidden, taps * hidden]),
        ("hidden_norm.weight".into(), vec![hidden]),
        ("norm.weight".into(), vec![hidden]),
    ];
    for layer in 0..n("num_hidden_layers") {
        let width = n("intermediate_size");
        for (name, shape) in [
            ("input_layernorm.weight", vec![hidden]),
            ("post_attention_layernorm.weight", vec![hidden]),
            ("self_attn.q_proj.weight", vec![heads * head, hidden]),
            ("self_attn.k_proj.weight", vec![kv * head, hidden]),
            ("self_attn.v_proj.weight", vec![kv * head, hidden]),
            ("self_attn.o_proj.weight", vec![hidden, heads * head]),
            ("self_attn.q_norm.weight", vec![head]),
            ("self_attn.k_norm.weight", vec![head]),
            ("self_attn.attention_sink_bias", vec![heads]),
            ("mlp.gate_proj.weight", vec![width, hidden]),
            ("mlp.up_proj.weight", vec![width, hidden]),
            ("mlp.down_proj.weight", vec![hidden, width]),
        ] {
            all.push((format!("layers.{layer}.{name}"), shape));
        }
    }
    all.into_iter().map(|(name, shape)| (name, (Dtype::BF16, shape))).collect()
}

#[test]
fn the_target_follows_the_layout() {
    let folder = folder();
    let config = json(&folder.join("config.json"));
    let (tensors, place) = stored(&weight_files(&folder));
    assert_same(&tensors, &target_layout(&config));

    let index = json(&folder.join("model.safetensors.index.json"));
    let map: BTreeMap<String, String> =
        serde_json::from_value(index["weight_map"].clone()).expect("weight_map names files");
    assert_eq!(map, place, "the index names other files than those that hold the tensors");
    let width = |dtype| match dtype {
        Dtype::F32 => 4,
        Dtype::BF16 => 2,
        _ => 1,
    };
    let bytes: usize = tensors.values().map(|(d, shape)| width(*d) * shape.iter().product::<usize>()).sum();
    assert_eq!(index["metadata"]["total_size"].as_u64(), Some(bytes as u64));
}

#[test]
fn the_config_has_the_family_s_fields() {
    let config = json(&folder().join("config.json"));
    assert_eq!(config["architectures"], serde_json::json!(["MiMoV2ForCausalLM"]));
    for (name, want) in [
        ("model_type", serde_json::json!("mimo_v2")),
        ("attention_projection_layout", serde_json::json!("fused_qkv")),
        ("add_swa_attention_sink_bias", serde_json::json!(true)),
        ("add_full_attention_sink_bias", serde_json::json!(false)),
        ("attention_bias", serde_json::json!(false)),
        ("tie_word_embeddings", serde_json::json!(false)),
        ("scoring_func", serde_json::json!("sigmoid")),
        ("topk_method", serde_json::json!("noaux_tc")),
        ("norm_topk_prob", serde_json::json!(true)),
        ("n_group", serde_json::json!(1)),
        ("topk_group", serde_json::json!(1)),
        ("n_shared_experts", Value::Null),
        ("routed_scaling_factor", Value::Null),
        ("sliding_window", serde_json::json!(128)),
        ("partial_rotary_factor", serde_json::json!(0.334)),
        ("hidden_act", serde_json::json!("silu")),
    ] {
        assert!(config.get(name).is_some(), "config.json has no `{name}`");
        assert_eq!(config[name], want, "{name}");
    }
    for name in ["rope_theta", "swa_rope_theta", "attention_value_scale", "layernorm_epsilon"] {
        assert!(config[name].as_f64().is_some_and(|x| x > 0.0), "{name}");
    }
    assert!(number(&config, "num_experts_per_tok") < number(&config, "n_routed_experts"));
    assert_ne!(config["head_dim"], config["v_head_dim"], "the family's head sizes differ");
    assert_eq!(config["swa_head_dim"], config["head_dim"]);
    assert_eq!(config["swa_v_head_dim"], config["v_head_dim"]);

    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quant_method"], "fp8");
    assert_eq!(quantization["fmt"], "e4m3");
    assert_eq!(quantization["weight_block_size"], serde_json::json!([128, 128]));
    assert_eq!(quantization["store_dtype"], "mxfp4");
    assert_eq!(quantization["mxfp4_block_size"], 32);
    let ignored: Vec<String> = (0..number(&config, "num_hidden_layers"))
        .map(|layer| format!("model.layers.{layer}.self_attn.o_proj"))
        .collect();
    assert_eq!(quantization["ignored_layers"], serde_json::json!(ignored));
}

#[test]
fn the_draft_follows_the_layout() {
    let target = json(&folder().join("config.json"));
    let folder = folder().join("dflash");
    let config = json(&folder.join("config.json"));
    let (tensors, _) = stored(&weight_files(&folder));
    assert_same(&tensors, &draft_layout(&config));

    assert_eq!(config["architectures"], serde_json::json!(["DFlashDraftModel"]));
    assert_eq!(config["hidden_size"], target["hidden_size"]);
    assert_eq!(config["vocab_size"], target["vocab_size"]);
    assert_eq!(config["num_target_layers"], target["num_hidden_layers"]);
    assert_eq!(config["block_size"], 8);
    let dflash = &config["dflash_config"];
    assert_eq!(dflash["block_size"], config["block_size"]);
    assert_eq!(dflash["use_swa"], true);
    assert_eq!(dflash["attention_sink_bias"], true);
    assert_eq!(dflash["swa_window_size"], config["sliding_window"]);
    assert!(dflash["attention_value_scale"].as_f64().is_some());
    for tap in dflash["target_layer_ids"].as_array().expect("taps") {
        assert!(tap.as_u64().expect("a layer") < target["num_hidden_layers"].as_u64().expect("layers"));
    }
    // The mask's embedding is a torch file: a zip whose entries are stored as they are. The vector itself is BF16.
    let mask = std::fs::read(folder.join("mask_embedding.pt")).expect("mask_embedding.pt");
    assert!(mask.starts_with(b"PK\x03\x04"), "mask_embedding.pt is no torch file");
    assert!(mask.len() > 2 * number(&config, "hidden_size"), "mask_embedding.pt is too short");
    for key in [b"mask_token_id".as_slice(), b"mask_embedding"] {
        assert!(mask.windows(key.len()).any(|w| w == key), "mask_embedding.pt lacks a key");
    }
}

#[test]
fn the_tokenizer_fits_the_vocabulary() {
    let config = json(&folder().join("config.json"));
    let draft = json(&folder().join("dflash/config.json"));
    let tokenizer = json(&folder().join("tokenizer.json"));
    let vocabulary = tokenizer["model"]["vocab"].as_object().expect("a BPE vocabulary");
    let mut ids: Vec<u64> = vocabulary.values().map(|id| id.as_u64().expect("an id")).collect();
    ids.sort_unstable();
    assert_eq!(ids, (0..config["vocab_size"].as_u64().expect("vocab_size")).collect::<Vec<_>>());
    assert_eq!(vocabulary["<|endoftext|>"], config["eos_token_id"]);
    assert_eq!(vocabulary["<|mask|>"], draft["dflash_config"]["mask_token_id"]);
}

#[test]
fn the_files_are_small() {
    let mut total = 0;
    for folder in [folder(), folder().join("dflash")] {
        for entry in std::fs::read_dir(&folder).expect("the checkpoint's folder") {
            let entry = entry.expect("readable folder");
            let meta = entry.metadata().expect("readable file");
            if meta.is_file() {
                assert!(meta.len() <= 16_000_000, "{} is larger than 16 MB", entry.path().display());
                total += meta.len();
            }
        }
    }
    assert!(total <= 40_000_000, "the checkpoint has {total} bytes, more than 40 MB");
}
