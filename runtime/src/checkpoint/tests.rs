use super::gguf::BlockType;
use super::*;
use proptest::prelude::*;
use serde_json::json;
use std::fs;
use tilec_ir::convert::{Planes, quantize, row_format};
use tilec_ir::format::{Code, Format};

// ---------------------------------------------------------------- writers

/// A tensor to write: name, dtype, shape, bytes.
type Written<'a> = (&'a str, &'a str, Vec<usize>, Vec<u8>);

/// A safetensors file by the `safetensors` crate.
fn safetensors_file(tensors: &[Written<'_>]) -> Vec<u8> {
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let dtype = serde_json::from_value(json!(dtype)).unwrap();
            (*name, ::safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap())
        })
        .collect();
    ::safetensors::serialize(views, None).unwrap()
}

/// A safetensors file with this header, sound or not, and this data.
fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Numbers from -1 to 1 that repeat late.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let hash = |i: u32| (i.wrapping_add(seed * 7919)).wrapping_mul(2654435761) >> 8;
    (0..len as u32).map(|i| hash(i) as f32 / (1 << 23) as f32 - 1.0).collect()
}

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 4}"#;

/// A folder with these files.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// A folder with a config and these weights.
fn with_weights(weights: &[u8]) -> tempfile::TempDir {
    folder(&[("config.json", CONFIG.as_bytes()), ("model.safetensors", weights)])
}

/// Writes GGUF files, sound ones and others.
#[derive(Clone)]
struct Gguf {
    version: u32,
    keys: Vec<(String, u32, Vec<u8>)>,
    /// Name, extents as in the file (innermost first), type, data.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    alignment: usize,
}

fn gguf_string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Gguf {
    /// A llama of one layer, hidden 32, 2 heads of 16 on one KV head, 8 tokens, all F32.
    fn llama() -> Gguf {
        let mut file = Gguf { version: 3, keys: Vec::new(), tensors: Vec::new(), alignment: 32 };
        file.string("general.architecture", "llama");
        for (key, value) in [
            ("llama.embedding_length", 32),
            ("llama.feed_forward_length", 32),
            ("llama.block_count", 1),
            ("llama.context_length", 64),
            ("llama.attention.head_count", 2),
            ("llama.attention.head_count_kv", 1),
            ("tokenizer.ggml.bos_token_id", 1),
            ("tokenizer.ggml.eos_token_id", 2),
            ("tokenizer.ggml.eot_token_id", 3),
        ] {
            file.key(key, 4, &u32::to_le_bytes(value));
        }
        file.key("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
        file.key("llama.rope.freq_base", 6, &5e5f32.to_le_bytes());
        file.string("tokenizer.ggml.model", "gpt2");
        file.string("tokenizer.ggml.pre", "smollm");
        file.string("tokenizer.chat_template", "{{ messages }}");
        let tokens: Vec<u8> = ["a", "b", "\u{120}c"].iter().flat_map(|t| gguf_string(t)).collect();
        file.array("tokenizer.ggml.tokens", 8, 3, &tokens);
        file.array("tokenizer.ggml.token_type", 5, 3, &[1, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
        file.array("tokenizer.ggml.merges", 8, 1, &gguf_string("a b"));
        for (name, extents) in [
            ("token_embd.weight", vec![32, 8]),
            ("output_norm.weight", vec![32]),
            ("blk.0.attn_norm.weight", vec![32]),
            ("blk.0.attn_q.weight", vec![32, 32]),
            ("blk.0.attn_k.weight", vec![32, 16]),
            ("blk.0.attn_v.weight", vec![32, 16]),
            ("blk.0.attn_output.weight", vec![32, 32]),
            ("blk.0.ffn_norm.weight", vec![32]),
            ("blk.0.ffn_gate.weight", vec![32, 32]),
            ("blk.0.ffn_up.weight", vec![32, 32]),
            ("blk.0.ffn_down.weight", vec![32, 32]),
        ] {
            let len = extents.iter().product::<u64>() as usize;
            let data = bytes(&numbers(len, file.tensors.len() as u32));
            file.tensors.push((name.into(), extents, 0, data));
        }
        file
    }

    fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.keys.push((key.into(), kind, value.to_vec()));
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8, &gguf_string(value));
    }

    fn array(&mut self, key: &str, kind: u32, count: u64, values: &[u8]) {
        self.key(key, 9, &[&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat());
    }

    fn without(mut self, key: &str) -> Gguf {
        self.keys.retain(|(name, ..)| name != key);
        self
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, u32, Vec<u8>) {
        self.tensors.iter_mut().find(|t| t.0 == name).unwrap()
    }

    fn build(&self) -> Vec<u8> {
        self.build_at(|_, offset| offset)
    }

    /// The file, with every tensor's offset passed through `place`.
    fn build_at(&self, place: impl Fn(&str, u64) -> u64) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.keys {
            out.extend(gguf_string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0;
        for (name, extents, kind, data) in &self.tensors {
            out.extend(gguf_string(name));
            out.extend((extents.len() as u32).to_le_bytes());
            extents.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(place(name, offset).to_le_bytes());
            offset += data.len().next_multiple_of(self.alignment) as u64;
        }
        for (.., data) in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(data);
        }
        out
    }

    fn open(&self) -> (tempfile::TempDir, Result<Checkpoint, CheckpointError>) {
        let dir = folder(&[("m.gguf", &self.build())]);
        let checkpoint = Checkpoint::open(&dir.path().join("m.gguf"));
        (dir, checkpoint)
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// Opens and reads everything; what it must not do is panic.
fn read_all(path: &Path) -> Result<usize, CheckpointError> {
    let checkpoint = Checkpoint::open(path)?;
    let mut elements = 0;
    for name in checkpoint.tensors().keys() {
        elements += checkpoint.tensor_f32(name).map_or(0, |values| values.len());
    }
    Ok(elements)
}

// ---------------------------------------------------------------- safetensors

#[test]
fn plain_tensors_read_back() {
    let values = numbers(24, 1);
    let half = quantize(Format::F16, 4, 6, &values).unwrap();
    let brain = quantize(Format::BF16, 2, 12, &values).unwrap();
    let file = safetensors_file(&[
        ("a.weight", "F32", vec![2, 3, 4], bytes(&values)),
        ("b.weight", "F16", vec![4, 6], half.codes.clone()),
        ("c.weight", "BF16", vec![2, 12], brain.codes.clone()),
        ("d.ids", "I64", vec![1], vec![0; 8]),
        ("scalar", "F32", vec![], bytes(&[2.5])),
    ]);
    let dir = with_weights(&file);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors()["a.weight"], TensorInfo::new([2, 3, 4], Format::F32));
    assert_eq!(checkpoint.tensors()["b.weight"], TensorInfo::new([4, 6], Format::F16));
    assert_eq!(checkpoint.tensor_f32("a.weight").unwrap(), values);
    assert_eq!(checkpoint.tensor_f32("scalar").unwrap(), [2.5]);
    for (name, planes) in [("b.weight", half), ("c.weight", brain)] {
        assert_eq!(checkpoint.tensor_f32(name).unwrap(), decoded(&planes), "{name}");
    }
    let rows = checkpoint.rows("a.weight", 2..5).unwrap();
    assert_eq!((rows.rows, rows.cols, &rows.codes[..]), (3, 4, &bytes(&values[8..20])[..]));
    assert_eq!(checkpoint.config()["hidden_size"], 4);
    assert!(matches!(checkpoint.tokenizer_source(), TokenizerSource::None));

    let refused = checkpoint.tensor_f32("d.ids").unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Unsupported);
    assert!(refused.to_string().contains("I64") && refused.to_string().contains("d.ids"), "{refused}");
    let missing = checkpoint.tensor_f32("e").unwrap_err();
    assert_eq!(missing.kind, ErrorKind::Missing);
    let beyond = checkpoint.rows("b.weight", 2..5).unwrap_err();
    assert!(beyond.to_string().contains("model.safetensors"), "{beyond}");
    checkpoint.release_pages();
    assert_eq!(checkpoint.tensor_f32("a.weight").unwrap(), values, "released pages come back");
}

fn decoded(planes: &Planes) -> Vec<f32> {
    let mut out = vec![0.0; planes.rows * planes.cols];
    dequantize(&planes.view(), &mut out).unwrap();
    out
}

#[test]
fn codes_join_their_scales() {
    let values = numbers(160 * 256, 2);
    let quantized = |format| quantize(format, 160, 256, &values).unwrap();
    let (fp8, mx, nv) = (quantized(Format::FP8_BLOCK), quantized(Format::MXFP4), quantized(Format::NVFP4));
    let per_row = Format { block: 256, block_rows: 1, ..Format::FP8_BLOCK };
    let per_tensor = Format { block: 256, block_rows: 160, ..Format::FP8_BLOCK };
    let (rows8, tensor8) = (quantized(per_row), quantized(per_tensor));
    let file = safetensors_file(&[
        ("fp8.weight", "F8_E4M3", vec![160, 256], fp8.codes.clone()),
        ("fp8.weight_scale_inv", "F32", vec![2, 2], fp8.scales.clone()),
        ("rows.weight", "F8_E4M3", vec![160, 256], rows8.codes.clone()),
        ("rows.weight_scale", "F32", vec![160, 1], rows8.scales.clone()),
        ("tensor.weight", "F8_E4M3", vec![160, 256], tensor8.codes.clone()),
        ("tensor.weight_scale", "F32", vec![], tensor8.scales.clone()),
        ("tensor.input_scale", "F32", vec![], bytes(&[1.0])),
        ("mx.weight", "U8", vec![160, 128], mx.codes.clone()),
        ("mx.weight_scale", "U8", vec![160, 8], mx.scales.clone()),
        ("mx4.weight", "F4", vec![160, 256], mx.codes.clone()),
        ("mx4.weight_scale", "F8_E8M0", vec![160, 8], mx.scales.clone()),
        ("experts.down_proj_blocks", "U8", vec![2, 80, 8, 16], mx.codes.clone()),
        ("experts.down_proj_scales", "U8", vec![2, 80, 8], mx.scales.clone()),
        ("nv.weight", "U8", vec![160, 128], nv.codes.clone()),
        ("nv.weight_scale", "F8_E4M3", vec![160, 16], nv.scales.clone()),
        ("nv.weight_scale_2", "F32", vec![], bytes(&[nv.tensor_scale])),
        ("packed.weight_packed", "U8", vec![160, 128], nv.codes.clone()),
        ("packed.weight_scale", "F8_E4M3", vec![160, 16], nv.scales.clone()),
        ("packed.weight_global_scale", "F32", vec![1], bytes(&[1.0 / nv.tensor_scale])),
    ]);
    let dir = with_weights(&file);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let names: Vec<_> = checkpoint.tensors().keys().map(String::as_str).collect();
    let expected = [
        ("experts.down_proj", Format::MXFP4, &mx),
        ("fp8.weight", Format::FP8_BLOCK, &fp8),
        ("mx.weight", Format::MXFP4, &mx),
        ("mx4.weight", Format::MXFP4, &mx),
        ("nv.weight", Format::NVFP4, &nv),
        ("packed.weight", Format::NVFP4, &nv),
        ("rows.weight", Format::FP8_CHANNEL, &rows8),
        ("tensor.weight", Format::FP8_BLOCK, &tensor8),
    ];
    assert_eq!(names, expected.map(|(name, ..)| name));
    for (name, format, planes) in expected {
        assert_eq!(checkpoint.tensors()[name].format, format, "{name}");
        let (found, exact) = (checkpoint.tensor_f32(name).unwrap(), decoded(planes));
        let worst = found.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // The inverse of the inverse of a scale is off by a rounding.
        assert!(worst <= if name == "packed.weight" { 1e-6 } else { 0.0 }, "{name}: {worst}");
        let part = checkpoint.rows(name, 120..140).unwrap();
        assert_eq!(part.format, row_format(format), "{name}");
        let mut rows = vec![0.0; 20 * 256];
        dequantize(&part.view().unwrap(), &mut rows).unwrap();
        assert_eq!(rows, found[120 * 256..140 * 256], "{name}");
    }
    assert_eq!(checkpoint.tensors()["experts.down_proj"].shape, [2, 80, 256]);
    // What NVFP4 has on top of its blocks stays apart for whoever wants it.
    for (name, wanted) in [("nv.weight", Some(nv.tensor_scale)), ("mx.weight", None), ("rows.weight", None)] {
        assert_eq!(checkpoint.tensor_scale(name).unwrap(), wanted, "{name}");
    }
    let rows = checkpoint.nvfp4_rows("nv.weight", 120..140).unwrap();
    assert_eq!((rows.format, rows.rows), (Format::NVFP4, 20));
    assert_eq!(
        (&rows.codes[..], &rows.scales[..]),
        (&nv.codes[120 * 128..140 * 128], &nv.scales[1920..2240])
    );
}

/// A fused projection of 2 groups of 160 rows, 64 columns: two rows of scales a group.
fn fused(scale_rows: usize, kv_heads: usize) -> tempfile::TempDir {
    let scales: Vec<f32> = (0..scale_rows).map(|i| (i + 1) as f32).collect();
    let weights = safetensors_file(&[
        ("l.self_attn.qkv_proj.weight", "F8_E4M3", vec![320, 64], vec![0x38; 320 * 64]),
        ("l.self_attn.qkv_proj.weight_scale_inv", "F32", vec![scale_rows, 1], bytes(&scales)),
    ]);
    let config = format!(
        r#"{{"model_type": "mimo_v2", "attention_projection_layout": "fused_qkv", "num_key_value_heads": {kv_heads}}}"#
    );
    folder(&[("config.json", config.as_bytes()), ("model.safetensors", &weights)])
}

#[test]
fn scales_of_a_fused_projection_start_anew_in_each_group() {
    let name = "l.self_attn.qkv_proj.weight";
    let first = |dir: &tempfile::TempDir| -> Vec<f32> {
        let all = Checkpoint::open(dir.path()).unwrap().tensor_f32(name).unwrap();
        all.chunks(64).map(|row| row[0]).collect()
    };
    // The code 0x38 is 1.
    let expected = |rows: &[(usize, f32)]| -> Vec<f32> {
        rows.iter().flat_map(|(count, value)| vec![*value; *count]).collect()
    };
    assert_eq!(first(&fused(4, 2)), expected(&[(128, 1.0), (32, 2.0), (128, 3.0), (32, 4.0)]));
    assert_eq!(first(&fused(3, 1)), expected(&[(128, 1.0), (128, 2.0), (64, 3.0)]));
    // Neither per group nor through.
    let error = Checkpoint::open(fused(5, 2).path()).unwrap_err().to_string();
    assert!(error.contains("qkv_proj.weight_scale_inv") && error.contains("[5, 1]"), "{error}");
}

#[test]
fn blocks_and_scales_of_all_experts_are_one_tensor() {
    let codes: Vec<u8> = (0..2 * 4 * 16).map(|i| i as u8).collect();
    let file = |blocks: Vec<usize>, scales: Vec<usize>, scale: Vec<u8>| {
        with_weights(&safetensors_file(&[
            ("e.gate_up_proj_blocks", "U8", blocks, codes.clone()),
            ("e.gate_up_proj_scales", "U8", scales, scale),
        ]))
    };
    let sound = file(vec![2, 4, 1, 16], vec![2, 4, 1], vec![128; 8]);
    let checkpoint = Checkpoint::open(sound.path()).unwrap();
    assert_eq!(checkpoint.tensors()["e.gate_up_proj"], TensorInfo::new([2, 4, 32], Format::MXFP4));
    let all = checkpoint.tensor_f32("e.gate_up_proj").unwrap();
    // Byte 1 holds the codes 1 and 0: 0.5 and 0, times 2.
    assert_eq!(all[..4], [0.0, 0.0, 1.0, 0.0]);
    for (blocks, scales, scale, word) in [
        (vec![2, 4, 1, 16], vec![4, 2, 1], vec![128; 8], "[2, 4, 1]"),
        (vec![2, 4, 2, 8], vec![2, 4, 1], vec![128; 8], "16 bytes"),
    ] {
        let error = Checkpoint::open(file(blocks, scales, scale).path()).unwrap_err().to_string();
        assert!(error.contains("e.gate_up_proj") && error.contains(word), "{error}");
    }
    let mut nan = vec![128; 8];
    nan[5] = 255;
    let lies = file(vec![2, 4, 1, 16], vec![2, 4, 1], nan);
    let error = Checkpoint::open(lies.path()).unwrap().tensor_f32("e.gate_up_proj").unwrap_err().to_string();
    assert!(error.contains("row 5") && error.contains("NaN"), "{error}");
}

#[test]
fn shards_are_one_checkpoint() {
    let values = numbers(8, 3);
    let one = safetensors_file(&[("a", "F32", vec![4], bytes(&values[..4]))]);
    let two = safetensors_file(&[("b", "F32", vec![4], bytes(&values[4..]))]);
    let index = json!({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}});
    let dir = folder(&[
        ("config.json", CONFIG.as_bytes()),
        ("model.safetensors.index.json", index.to_string().as_bytes()),
        ("1.safetensors", &one),
        ("2.safetensors", &two),
        ("generation_config.json", br#"{"eos_token_id": [7]}"#),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", br#"{"chat_template": "from config"}"#),
    ]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensor_f32("a").unwrap(), values[..4]);
    assert_eq!(checkpoint.tensor_f32("b").unwrap(), values[4..]);
    assert_eq!(checkpoint.generation_config().unwrap()["eos_token_id"][0], 7);
    assert_eq!(checkpoint.chat_template(), Some("from config"));
    assert!(matches!(checkpoint.tokenizer_source(), TokenizerSource::Json { .. }));
    assert!(matches!(checkpoint.identity(), Identity::Files(files) if files.len() == 2));

    fs::write(dir.path().join("chat_template.jinja"), "of its own").unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().chat_template(), Some("of its own"));
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    let several = json!({"chat_template": [
        {"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]});
    fs::write(dir.path().join("tokenizer_config.json"), several.to_string()).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().chat_template(), Some("d"));
}

#[test]
fn every_fixture_opens() {
    let mut opened = 0;
    for kind in ["hf", "gguf"] {
        for entry in fs::read_dir(fixtures().join(kind)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                // A folder with one .gguf file and no config stands for the file.
                assert!(read_all(&path).unwrap() > 1000, "{}", path.display());
                opened += 1;
            }
        }
    }
    assert!(opened > 20);
}

// ---------------------------------------------------------------- GGUF

/// Blocks of random bytes and the values that another implementation reads from them.
#[test]
fn blocks_decode_as_the_reference_does() {
    let bytes = fs::read(fixtures().join("gguf/blocks.safetensors")).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, number) in [("Q4_0", 2), ("Q4_1", 3), ("Q8_0", 8), ("Q4_K", 12), ("Q6_K", 14), ("MXFP4", 39)] {
        let block = BlockType::from_number(number).unwrap();
        let blocks = file.tensor(&format!("{name}.blocks")).unwrap();
        let values = file.tensor(&format!("{name}.values")).unwrap();
        let (elements, size) = block.size();
        assert_eq!((blocks.shape()[1], values.shape()[1]), (size, elements), "{name}");
        let planes = block.planes(elements, blocks.data().chunks_exact(size)).unwrap();
        for (i, (found, expected)) in decoded(&planes).iter().zip(values.data().chunks_exact(4)).enumerate() {
            let expected = f32::from_le_bytes(expected.try_into().unwrap());
            // The reference multiplies code and first-level scale in another order.
            let limit = if matches!(block, BlockType::Q6K | BlockType::Q4K) { 1e-6 } else { 0.0 };
            assert!(
                (found - expected).abs() <= limit * expected.abs().max(1.0),
                "{name} {i}: {found} {expected}"
            );
        }
        // Two blocks in a row decode like each alone.
        let wide = block.planes(2 * elements, blocks.data().chunks_exact(2 * size)).unwrap();
        assert_eq!(decoded(&wide), decoded(&planes), "{name}");
    }
}

#[test]
fn a_llama_gets_names_config_and_rows_of_hugging_face() {
    let mut file = Gguf::llama();
    file.tensors.push(("blk.0.attn_q.bias".into(), vec![32], 0, bytes(&numbers(32, 50))));
    let (_dir, checkpoint) = file.open();
    let checkpoint = checkpoint.unwrap();
    let expected = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 8, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": false,
        "bos_token_id": 1, "eos_token_id": 2,
    });
    assert_eq!(*checkpoint.config(), expected);
    assert_eq!(*checkpoint.generation_config().unwrap(), json!({"bos_token_id": 1, "eos_token_id": [2, 3]}));
    assert_eq!(checkpoint.chat_template(), Some("{{ messages }}"));
    let TokenizerSource::Gguf(vocab) = checkpoint.tokenizer_source() else { panic!("no vocabulary") };
    assert_eq!(vocab.tokens, ["a", "b", "\u{120}c"]);
    assert_eq!(vocab.token_types, [1, 3, 1]);
    assert_eq!(
        (vocab.merges.as_slice(), vocab.pre.as_str(), vocab.eot),
        (&["a b".into()][..], "smollm", Some(3))
    );

    // Row by row: Hugging Face's row 8 of a head of 16 is the file's row 1.
    let stored = |name: &str, seed| (name.to_string(), numbers(32 * 32, seed));
    let (name, q) = stored("model.layers.0.self_attn.q_proj.weight", 3);
    let found = checkpoint.tensor_f32(&name).unwrap();
    let file_row = |row: usize| {
        let (head, dim) = (row / 16, row % 16);
        head * 16 + if dim < 8 { 2 * dim } else { 2 * (dim - 8) + 1 }
    };
    for row in 0..32 {
        let at = file_row(row) * 32;
        assert_eq!(found[row * 32..][..32], q[at..at + 32], "row {row}");
    }
    let bias = checkpoint.tensor_f32("model.layers.0.self_attn.q_proj.bias").unwrap();
    let stored_bias = numbers(32, 50);
    assert!((0..32).all(|row| bias[row] == stored_bias[file_row(row)]));
    let v = checkpoint.tensor_f32("model.layers.0.self_attn.v_proj.weight").unwrap();
    assert_eq!(v, numbers(16 * 32, 5), "values are not rotated");
}

#[test]
fn rope_factors_and_scaling_reach_the_config() {
    let mut file = Gguf::llama();
    let factors: Vec<f32> = (1..=8).map(|i| i as f32).collect();
    file.tensors.push(("rope_freqs.weight".into(), vec![8], 0, bytes(&factors)));
    let (_dir, checkpoint) = file.open();
    let scaling = checkpoint.unwrap().config()["rope_scaling"].clone();
    assert_eq!(scaling, json!({"rope_type": "factors", "factors": factors}));

    let mut file = Gguf::llama();
    file.string("llama.rope.scaling.type", "yarn");
    file.key("llama.rope.scaling.factor", 6, &4f32.to_le_bytes());
    file.key("llama.rope.scaling.original_context_length", 4, &16u32.to_le_bytes());
    let (_dir, checkpoint) = file.open();
    let scaling = checkpoint.unwrap().config()["rope_scaling"].clone();
    let expected = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
    assert_eq!(scaling, expected);
}

#[test]
fn experts_become_tensors_of_their_own() {
    let mut file = Gguf::llama();
    for (key, ..) in &mut file.keys {
        *key = key.replace("llama.", "qwen3moe.");
    }
    file.keys[0].2 = gguf_string("qwen3moe");
    for (key, value) in [("expert_count", 3), ("expert_used_count", 2), ("expert_feed_forward_length", 16)] {
        file.key(&format!("qwen3moe.{key}"), 4, &u32::to_le_bytes(value));
    }
    file.tensors.retain(|t| !t.0.contains("ffn_") || t.0.contains("norm"));
    let values = numbers(3 * 16 * 32, 9);
    let planes = quantize(Format::Q8_0, 48, 32, &values).unwrap();
    // Back to blocks: a scale and 32 bytes of two's complement.
    let blocks = planes.scales.chunks(2).zip(planes.codes.chunks(32));
    let data = blocks.flat_map(|(s, c)| s.iter().copied().chain(c.iter().map(|c| c ^ 0x80))).collect();
    file.tensors.push(("blk.0.ffn_gate_exps.weight".into(), vec![32, 16, 3], 8, data));
    file.tensors.push(("blk.0.ffn_gate_inp.weight".into(), vec![32, 3], 0, bytes(&numbers(96, 1))));
    let (_dir, checkpoint) = file.open();
    let checkpoint = checkpoint.unwrap();
    let expected = decoded(&planes);
    for expert in 0..3 {
        let name = format!("model.layers.0.mlp.experts.{expert}.gate_proj.weight");
        assert_eq!(checkpoint.tensors()[&name], TensorInfo::new([16, 32], Format::Q8_0));
        assert_eq!(checkpoint.tensor_f32(&name).unwrap(), expected[expert * 512..][..512]);
    }
    assert!(checkpoint.tensors().contains_key("model.layers.0.mlp.gate.weight"));
    let config = checkpoint.config();
    assert_eq!((&config["num_experts"], &config["model_type"]), (&json!(3), &json!("qwen3_moe")));
    let q = checkpoint.tensor_f32("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(q, numbers(1024, 3), "only llama interleaves rows");
}

#[test]
fn metadata_of_every_type_is_read() {
    let mut file = Gguf::llama();
    let values: [(u32, &[u8]); 13] = [
        (0, &[1]),
        (1, &[0xff]),
        (2, &[1, 0]),
        (3, &[1, 0]),
        (4, &[1; 4]),
        (5, &[1; 4]),
        (6, &[0; 4]),
        (7, &[1]),
        (8, &[1, 0, 0, 0, 0, 0, 0, 0, b'x']),
        (9, &[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7]),
        (10, &[1; 8]),
        (11, &[1; 8]),
        (12, &[0; 8]),
    ];
    for (kind, value) in values {
        file.key(&format!("extra.{kind}"), kind, value);
    }
    file.version = 2;
    file.open().1.unwrap();
    file.alignment = 64;
    file.key("general.alignment", 4, &64u32.to_le_bytes());
    let (_dir, checkpoint) = file.open();
    let norm = checkpoint.unwrap().tensor_f32("model.norm.weight").unwrap();
    assert_eq!(norm, numbers(32, 1));
}

// ---------------------------------------------------------------- bad files

/// What is wrong, the file, and words that the message must have besides the file's name.
type BadFile = (&'static str, Vec<u8>, &'static [&'static str]);

fn bad_safetensors() -> Vec<BadFile> {
    let one = |shape: &str, offsets: &str, dtype: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let data = [0u8; 16];
    let header = |text: &str| raw_safetensors(text, &data);
    let pair = |first: &str, second: &str, name: &str| {
        format!(
            r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{first}}},
               "{name}":{{"dtype":"F32","shape":[2],"data_offsets":{second}}}}}"#
        )
    };
    let two = |first: &str, second: &str, name: &str| header(&pair(first, second, name));
    let mut bad_name = one("[4]", "[0,16]", "F32").into_bytes();
    bad_name[2] = 0xff;
    let bad_utf8 = [&(bad_name.len() as u64).to_le_bytes()[..], &bad_name, &data].concat();
    let sound = safetensors_file(&[("a", "F32", vec![4], bytes(&[1.0; 4]))]);
    let scale = |value: &[f32]| {
        safetensors_file(&[
            ("w.weight", "F8_E4M3", vec![1, 32], vec![0x38; 32]),
            ("w.weight_scale", "F32", vec![value.len()], bytes(value)),
        ])
    };
    vec![
        ("empty", vec![], &["byte 0", "empty"]),
        ("three bytes", vec![1, 2, 3], &["byte 0", "3 bytes"]),
        ("huge header", [&u64::MAX.to_le_bytes()[..], &data].concat(), &["byte 0", "header"]),
        ("header past the end", [&1000u64.to_le_bytes()[..], &data].concat(), &["byte 0", "1000"]),
        ("no JSON", header("not json at all"), &["header, byte"]),
        ("header is a list", header("[]"), &["header"]),
        ("cut data", sound[..sound.len() - 1].to_vec(), &["\"a\"", "data_offsets"]),
        ("data left over", [&sound[..], &[0; 4]].concat(), &["end of the data", "20"]),
        ("bad UTF-8 in a name", bad_utf8, &["header, byte"]),
        ("offsets past the end", header(&one("[5]", "[0,20]", "F32")), &["\"a\"", "[0, 20]"]),
        ("offsets reversed", header(&one("[4]", "[16,0]", "F32")), &["\"a\"", "[16, 0]"]),
        ("offsets negative", header(&one("[4]", "[-1,15]", "F32")), &["\"a\"", "header, byte"]),
        (
            "shape overflows",
            header(&one("[18446744073709551615,18446744073709551615]", "[0,16]", "F32")),
            &["\"a\"", "overflows"],
        ),
        ("bits overflow", header(&one("[9223372036854775808]", "[0,16]", "F32")), &["\"a\"", "overflows"]),
        ("wrong length", header(&one("[3]", "[0,16]", "F32")), &["\"a\"", "needs 12 bytes"]),
        ("half a byte", header(&one("[31]", "[0,16]", "F4")), &["\"a\"", "needs 16 bytes"]),
        ("unknown dtype", header(&one("[4]", "[0,16]", "F31")), &["\"a\"", "F31"]),
        ("dtype missing", header(r#"{"a":{"shape":[4],"data_offsets":[0,16]}}"#), &["\"a\"", "dtype"]),
        ("overlap", two("[0,8]", "[4,12]", "b"), &["\"b\"", "overlaps"]),
        ("one cut short", two("[0,4]", "[8,16]", "b"), &["\"a\"", "needs 8 bytes"]),
        ("gap", raw_safetensors(&pair("[0,8]", "[12,20]", "b"), &[0; 20]), &["\"b\"", "gap"]),
        ("duplicate name", two("[0,8]", "[8,16]", "a"), &["\"a\"", "twice"]),
        (
            "FP8 without scales",
            safetensors_file(&[("w.weight", "F8_E4M3", vec![4], vec![0; 4])]),
            &["w.weight_scale_inv"],
        ),
        ("FP8 scales of no shape", scale(&[1.0; 3]), &["w.weight_scale", "[3]"]),
        ("NaN scale", scale(&[f32::NAN]), &["w.weight", "row 0", "NaN"]),
        ("infinite scale", scale(&[f32::INFINITY]), &["w.weight", "row 0", "infinite"]),
        (
            "MXFP4 scales of the wrong shape",
            safetensors_file(&[
                ("w.weight", "U8", vec![2, 32], vec![0; 64]),
                ("w.weight_scale", "U8", vec![2, 3], vec![0; 6]),
            ]),
            &["w.weight_scale", "[2, 2]"],
        ),
        (
            "MXFP4 scale NaN",
            safetensors_file(&[
                ("w.weight", "U8", vec![2, 32], vec![0; 64]),
                ("w.weight_scale", "U8", vec![2, 2], vec![0, 0, 0, 255]),
            ]),
            &["w.weight", "row 1", "column 32"],
        ),
        (
            "NVFP4 without a tensor scale",
            safetensors_file(&[
                ("w.weight", "U8", vec![2, 8], vec![0; 16]),
                ("w.weight_scale", "F8_E4M3", vec![2, 1], vec![0; 2]),
            ]),
            &["w.weight", "w.weight_scale_2"],
        ),
        (
            "NVFP4 with an infinite tensor scale",
            safetensors_file(&[
                ("w.weight", "U8", vec![2, 8], vec![0; 16]),
                ("w.weight_scale", "F8_E4M3", vec![2, 1], vec![0; 2]),
                ("w.weight_scale_2", "F32", vec![], bytes(&[f32::INFINITY])),
            ]),
            &["w.weight_scale_2", "inf"],
        ),
    ]
}

#[test]
fn bad_safetensors_are_refused_by_name_and_place() {
    for (what, file, words) in bad_safetensors() {
        let dir = with_weights(&file);
        let result = Checkpoint::open(dir.path()).and_then(|checkpoint| {
            checkpoint.tensors().keys().try_for_each(|name| checkpoint.tensor_f32(name).map(drop))
        });
        let error = result.expect_err(what);
        let message = error.to_string();
        assert!(!error.place.is_empty() && !error.remedy.is_empty(), "{what}: {message}");
        for word in ["model.safetensors"].iter().chain(words) {
            assert!(message.contains(word), "{what}: no {word:?} in {message}");
        }
    }
}

#[test]
fn bad_folders_are_refused_by_name_and_place() {
    let sound = safetensors_file(&[("a", "F32", vec![1], bytes(&[1.0]))]);
    let config = ("config.json", CONFIG.as_bytes());
    let index = |text: &'static str| ("model.safetensors.index.json", text.as_bytes());
    let shard = ("1.safetensors", &sound[..]);
    let weights = ("model.safetensors", &sound[..]);
    type BadFolder<'a> = (&'a str, Vec<(&'a str, &'a [u8])>, &'a [&'a str]);
    let cases: Vec<BadFolder<'_>> = vec![
        ("nothing", vec![], &["config.json"]),
        ("no weights", vec![config], &["model.safetensors"]),
        ("bad JSON", vec![("config.json", b"{\"a\": 1,\n \"b\" 2}"), weights], &["config.json", "line 2"]),
        ("config is a list", vec![("config.json", b"[1]"), weights], &["config.json", "object"]),
        ("no model_type", vec![("config.json", b"{}"), weights], &["config.json", "model_type"]),
        ("bad UTF-8", vec![("config.json", b"{\"\xff\": 1}"), weights], &["config.json", "byte 2", "UTF-8"]),
        (
            "bad block size",
            vec![
                (
                    "config.json",
                    br#"{"model_type": "x", "quantization_config": {"weight_block_size": [0, 5]}}"#,
                ),
                weights,
            ],
            &["config.json", "weight_block_size"],
        ),
        ("bad index", vec![config, index("{}")], &["index.json", "weight_map"]),
        (
            "missing shard",
            vec![config, index(r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#), shard],
            &["index.json", "2.safetensors", "missing"],
        ),
        (
            "shard outside of the folder",
            vec![config, index(r#"{"weight_map": {"a": "../1.safetensors"}}"#), shard],
            &["index.json", "../1.safetensors", "plain file name"],
        ),
        (
            "tensor in no shard",
            vec![config, index(r#"{"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}"#), shard],
            &["index.json", "\"b\"", "1.safetensors"],
        ),
        (
            "tensor in two shards",
            vec![
                config,
                index(r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#),
                shard,
                ("2.safetensors", &sound),
            ],
            &["2.safetensors", "\"a\"", "another file"],
        ),
        (
            "bad generation config",
            vec![config, weights, ("generation_config.json", b"{")],
            &["generation_config"],
        ),
    ];
    for (what, files, words) in cases {
        let dir = folder(&files);
        let message = Checkpoint::open(dir.path()).expect_err(what).to_string();
        for word in words {
            assert!(message.contains(word), "{what}: no {word:?} in {message}");
        }
    }
    let error = Checkpoint::open(Path::new("/no/such/checkpoint")).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Missing);
    assert!(error.to_string().contains("/no/such/checkpoint"));
}

fn bad_gguf() -> Vec<BadFile> {
    let llama = Gguf::llama;
    let with = |change: &dyn Fn(&mut Gguf)| {
        let mut file = llama();
        change(&mut file);
        file.build()
    };
    let sound = llama().build();
    let patch = |at: usize, bytes: &[u8]| {
        let mut file = sound.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let kind = |number: u32| with(&|f| f.tensor("blk.0.ffn_up.weight").2 = number);
    let q4_1 = |d: u16, m: u16| {
        with(&|f| {
            let tensor = f.tensor("blk.0.ffn_up.weight");
            tensor.2 = 3;
            tensor.3 = (0..32)
                .flat_map(|_| [d.to_le_bytes().to_vec(), m.to_le_bytes().to_vec(), vec![0; 16]].concat())
                .collect();
        })
    };
    vec![
        ("wrong magic", patch(0, b"GGML"), &["byte 0", "GGUF"]),
        ("version 1", patch(4, &1u32.to_le_bytes()), &["byte 4", "version 1"]),
        ("big-endian", patch(4, &3u32.to_be_bytes()), &["byte 4", "big-endian"]),
        ("too many tensors", patch(8, &u64::MAX.to_le_bytes()), &["number of tensors", "byte"]),
        ("too many keys", patch(16, &(1u64 << 40).to_le_bytes()), &["number of metadata keys"]),
        ("endless key", patch(24, &u64::MAX.to_le_bytes()), &["metadata key 0", "byte"]),
        ("key not UTF-8", patch(32, &[0xff]), &["metadata key 0 at byte 32", "UTF-8"]),
        ("value of no type", with(&|f| f.key("x", 99, &[])), &["\"x\"", "99"]),
        ("bool of 2", with(&|f| f.key("x", 7, &[2])), &["\"x\"", "bool"]),
        (
            "string past the end",
            with(&|f| f.key("x", 8, &u64::MAX.to_le_bytes())),
            &["\"x\"", "bytes are due"],
        ),
        ("array past the end", with(&|f| f.array("x", 0, 1 << 60, &[])), &["\"x\"", "more than"]),
        (
            "arrays without end",
            with(&|f| {
                let one = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat();
                f.key("x", 9, &one.repeat(100));
            }),
            &["\"x\"", "nested"],
        ),
        (
            "key used twice",
            with(&|f| f.string("general.architecture", "llama")),
            &["general.architecture", "twice"],
        ),
        (
            "alignment of 3",
            with(&|f| f.key("general.alignment", 4, &3u32.to_le_bytes())),
            &["general.alignment", "3"],
        ),
        ("split", with(&|f| f.key("split.count", 2, &[2, 0])), &["split.count", "merge"]),
        (
            "no architecture",
            llama().without("general.architecture").build(),
            &["general.architecture", "no such key"],
        ),
        (
            "unknown architecture",
            with(&|f| f.keys[0].2 = gguf_string("gptj")),
            &["general.architecture", "gptj", "qwen3"],
        ),
        (
            "no embedding length",
            llama().without("llama.embedding_length").build(),
            &["llama.embedding_length"],
        ),
        (
            "no epsilon",
            llama().without("llama.attention.layer_norm_rms_epsilon").build(),
            &["llama.attention.layer_norm_rms_epsilon"],
        ),
        (
            "head count is a string",
            with(&|f| {
                f.keys.retain(|k| k.0 != "llama.attention.head_count");
                f.string("llama.attention.head_count", "2");
            }),
            &["llama.attention.head_count", "a string"],
        ),
        (
            "no heads",
            with(&|f| {
                f.keys.iter_mut().find(|k| k.0 == "llama.attention.head_count").unwrap().2 = vec![0; 4]
            }),
            &["llama.attention.head_count", "zero"],
        ),
        (
            "heads that do not divide",
            with(&|f| {
                f.keys.iter_mut().find(|k| k.0 == "llama.attention.head_count").unwrap().2 = vec![3, 0, 0, 0]
            }),
            &["blk.0.attn_q.weight", "3 heads"],
        ),
        (
            "unknown scaling",
            with(&|f| f.string("llama.rope.scaling.type", "longrope")),
            &["llama.rope.scaling.type", "longrope"],
        ),
        (
            "a llama with experts",
            with(&|f| f.key("llama.expert_count", 4, &[8, 0, 0, 0])),
            &["llama.expert_count"],
        ),
        (
            "tokens that are numbers",
            {
                let mut file = llama().without("tokenizer.ggml.tokens");
                file.array("tokenizer.ggml.tokens", 0, 2, &[1, 2]);
                file.build()
            },
            &["tokenizer.ggml.tokens"],
        ),
        ("Q5_0", kind(6), &["blk.0.ffn_up.weight", "Q5_0"]),
        ("IQ4_XS", kind(23), &["blk.0.ffn_up.weight", "IQ4_XS"]),
        ("type 4711", kind(4711), &["blk.0.ffn_up.weight", "4711"]),
        ("blocks of 256 in rows of 32", kind(12), &["blk.0.ffn_up.weight", "256"]),
        (
            "no extents",
            with(&|f| f.tensor("blk.0.ffn_up.weight").1 = vec![]),
            &["blk.0.ffn_up.weight", "0 extents"],
        ),
        (
            "nine extents",
            with(&|f| f.tensor("blk.0.ffn_up.weight").1 = vec![1; 9]),
            &["blk.0.ffn_up.weight", "9 extents"],
        ),
        (
            "an extent of 0",
            with(&|f| f.tensor("blk.0.ffn_up.weight").1 = vec![32, 0]),
            &["blk.0.ffn_up.weight", "no element"],
        ),
        (
            "extents that overflow",
            with(&|f| f.tensor("blk.0.ffn_up.weight").1 = vec![u64::MAX; 2]),
            &["blk.0.ffn_up.weight", "overflows"],
        ),
        (
            "bytes that overflow",
            with(&|f| f.tensor("blk.0.ffn_up.weight").1 = vec![u64::MAX / 2]),
            &["blk.0.ffn_up.weight", "overflows"],
        ),
        (
            "larger than the file",
            with(&|f| f.tensor("blk.0.ffn_up.weight").1 = vec![32, 1 << 30]),
            &["blk.0.ffn_up.weight", "past the file's"],
        ),
        (
            "offset past the end",
            llama().build_at(|n, o| if n == "output_norm.weight" { 1 << 40 } else { o }),
            &["output_norm.weight", "past the file's"],
        ),
        (
            "offset that overflows",
            llama().build_at(|n, o| if n == "output_norm.weight" { u64::MAX - 31 } else { o }),
            &["output_norm.weight", "past the file's"],
        ),
        (
            "crooked offset",
            llama().build_at(|n, o| if n == "output_norm.weight" { o + 4 } else { o }),
            &["output_norm.weight", "alignment"],
        ),
        (
            "overlap",
            llama().build_at(|n, o| if n == "output_norm.weight" { 0 } else { o }),
            &["inside tensor", "token_embd.weight", "output_norm.weight"],
        ),
        (
            "name used twice",
            with(&|f| f.tensor("blk.0.ffn_up.weight").0 = "output_norm.weight".into()),
            &["output_norm.weight", "twice"],
        ),
        (
            "unknown tensor",
            with(&|f| f.tensor("blk.0.ffn_up.weight").0 = "blk.0.magic.weight".into()),
            &["blk.0.magic.weight"],
        ),
        ("no embedding", with(&|f| drop(f.tensors.remove(0))), &["token_embd.weight"]),
        ("NaN scale", q4_1(0x7e00, 0), &["mlp.up_proj.weight", "row 0", "scale"]),
        ("infinite minimum", q4_1(0, 0xfc00), &["mlp.up_proj.weight", "row 0", "minimum"]),
    ]
}

#[test]
fn bad_gguf_files_are_refused_by_name_and_place() {
    for (what, file, words) in bad_gguf() {
        let dir = folder(&[("m.gguf", &file)]);
        let result = Checkpoint::open(&dir.path().join("m.gguf")).and_then(|checkpoint| {
            checkpoint.tensors().keys().try_for_each(|name| checkpoint.tensor_f32(name).map(drop))
        });
        let error = result.expect_err(what);
        let message = error.to_string();
        assert!(!error.place.is_empty() && !error.remedy.is_empty(), "{what}: {message}");
        for word in ["m.gguf"].iter().chain(words) {
            assert!(message.contains(word), "{what}: no {word:?} in {message}");
        }
    }
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = Gguf::llama().build();
    let path = dir.path().join("m.gguf");
    let header = gguf.len() - Gguf::llama().tensors.iter().map(|t| t.3.len()).sum::<usize>();
    for len in (0..header).chain((header..gguf.len()).step_by(509)) {
        fs::write(&path, &gguf[..len]).unwrap();
        let error = Checkpoint::open(&path).expect_err(&format!("{len} bytes"));
        assert!(error.to_string().contains("m.gguf"), "{error}");
    }
    fs::write(&path, &gguf).unwrap();
    Checkpoint::open(&path).unwrap();

    let file =
        safetensors_file(&[("a", "F32", vec![4], bytes(&[1.0; 4])), ("b", "BF16", vec![2, 2], vec![0; 8])]);
    for len in 0..file.len() {
        let dir = with_weights(&file[..len]);
        let error = Checkpoint::open(dir.path()).expect_err(&format!("{len} bytes"));
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let mut gguf = Gguf::llama();
        gguf.tensor("blk.0.ffn_up.weight").2 = 2;
        let mut file = gguf.build();
        let header = file.len().min(2400);
        for (at, value) in &flips {
            file[at.index(header)] = *value;
        }
        let dir = folder(&[("m.gguf", &file)]);
        let _ = read_all(dir.path());

        let mut file = safetensors_file(&[
            ("w.weight", "F8_E4M3", vec![1, 32], vec![0x38; 32]),
            ("w.weight_scale", "F32", vec![1], bytes(&[1.0])),
            ("m.weight", "U8", vec![2, 32], vec![0; 64]),
            ("m.weight_scale", "U8", vec![2, 2], vec![0; 4]),
            ("p", "BF16", vec![2, 2], vec![0; 8]),
        ]);
        for (at, value) in &flips {
            let at = at.index(file.len());
            file[at] = *value;
        }
        let dir = with_weights(&file);
        let _ = read_all(dir.path());
    }

    #[test]
    fn random_extents_never_panic(shape in prop::collection::vec(any::<u64>(), 1..5), kind in 0u32..41, offset: u64) {
        let mut file = Gguf::llama();
        let tensor = file.tensor("blk.0.ffn_up.weight");
        (tensor.1, tensor.2) = (shape, kind);
        let file = file.build_at(|name, o| if name == "blk.0.ffn_up.weight" { offset } else { o });
        let dir = folder(&[("m.gguf", &file)]);
        let _ = read_all(dir.path());
    }
}

// ---------------------------------------------------------------- synthetic

#[test]
fn synthetic_weights_have_the_declared_shapes() {
    let tensors: BTreeMap<String, TensorInfo> = [
        ("model.norm.weight".to_string(), TensorInfo::new([64], Format::F32)),
        ("w".to_string(), TensorInfo::new([48, 64], Format::MXFP4)),
        ("nv".to_string(), TensorInfo::new([48, 64], Format::NVFP4)),
    ]
    .into();
    let checkpoint = Checkpoint::synthetic(json!({"model_type": "llama"}), 5, tensors.clone());
    assert_eq!(*checkpoint.tensors(), tensors);
    for (name, info) in &tensors {
        let values = checkpoint.tensor_f32(name).unwrap();
        assert_eq!(values.len(), info.elements().unwrap());
        let rows = checkpoint.rows(name, 0..1).unwrap();
        assert_eq!(rows.format, row_format(info.format));
    }
    assert_eq!(checkpoint.rows("w", 3..5).unwrap().format.code, Code::E2m1);
    assert!(checkpoint.tensor_f32("model.norm.weight").unwrap().iter().all(|w| (0.5..1.5).contains(w)));
}
