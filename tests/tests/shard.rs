//! Tensor parallelism against the whole model. The interpreter runs the graphs of all ranks in lock step
//! and sums where they say so; their logits side by side have to be those of transformers in float64. Each
//! rank gets its weights only from what is packed for it, and NaN for all else.

use half::{bf16, f16};
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;
use tilec_codegen::compile::{self, CompileError, Host};
use tilec_codegen::emit::cuda::emit;
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::Arch;
use tilec_codegen::passes::{fuse, resident, shard::ShardError};
use tilec_ir::abi::KvType;
use tilec_ir::convert::{e2m1_to_f32, e4m3_to_f32};
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{Interpreter, Ranks, Row, WeightSource};
use tilec_ir::graph::{EXPERT, Graph};
use tilec_ir::launch::{OCTET, OCTET_BLOCK};
use tilec_ir::octet::{band_place, octet_block_bytes, octet_blocks};
use tilec_ir::pack::{PackContent, Packing, RowSegment, RowView};
use tilec_ir::plan::WeightsFrom;
use tilec_ir::spec::{Activations, Device, DflashSpec, Draft, ModelSpec, Target, WeightFormat};
use tilec_runtime::checkpoint::Checkpoint;
use tilec_runtime::pack::pack;
use tilec_tests::{Fixture, fixtures, reference};

/// What a rank has of the checkpoint's tensors: NaN where nothing is packed.
struct Held<'c> {
    checkpoint: &'c Checkpoint,
    tensors: BTreeMap<String, Vec<f32>>,
}

/// Octets that lie in bands, one behind the other.
fn one_behind_the_other(format: Format, k: usize, band: usize, bytes: &[u8]) -> Vec<u8> {
    let (blocks, each) = (octet_blocks(format, k), octet_block_bytes(format));
    let block = |at: usize| &bytes[band_place(band, blocks, at / blocks, at % blocks) * each..][..each];
    (0..bytes.len() / each).flat_map(block).copied().collect()
}

impl WeightSource for Held<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        self.tensors
            .get(name)
            .map(|values| Cow::Borrowed(&values[..]))
            .ok_or("nothing is packed of it".into())
    }
}

impl<'c> Held<'c> {
    /// Packs a program's weights, and reads them back as the layouts' documentation says.
    fn pack(checkpoint: &'c Checkpoint, packing: &Packing) -> Held<'c> {
        let packed = pack(checkpoint, packing, &mut |_, _| {}).unwrap();
        let mut held = Held { checkpoint, tensors: BTreeMap::new() };
        // Scales that lie apart, by the features that they belong to.
        let mut scales: Vec<(Format, &[RowSegment], usize, &[u8])> = Vec::new();
        let mut expert_scales: Vec<(&[RowView], usize, &[u8])> = Vec::new();
        let bytes = |offset: u64, content: &PackContent| {
            &packed.as_slice()[offset as usize..][..content.bytes().unwrap() as usize]
        };
        for item in &packing.items {
            let bytes = bytes(item.offset, &item.content);
            let each =
                |format: Format, k: usize| if format == Format::FP8_BLOCK { k.div_ceil(128) * 4 } else { 32 };
            match &item.content {
                PackContent::OctetScales { format, k, segments, .. } => {
                    scales.push((*format, segments, each(*format, *k), bytes));
                }
                PackContent::ExpertScales { format, k, sources, .. } => {
                    expert_scales.push((sources, each(*format, *k), bytes));
                }
                _ => {}
            }
        }
        for item in &packing.items {
            let bytes = bytes(item.offset, &item.content);
            match &item.content {
                PackContent::Octets { format, k, segments, interleave, .. } => {
                    let own = scales.iter().find(|(of, others, ..)| of == format && *others == &segments[..]);
                    let mut octet = 0;
                    for group in segments.chunks(*interleave) {
                        for row in (0..group[0].rows.next_multiple_of(OCTET)).step_by(OCTET) {
                            for segment in group {
                                let scales =
                                    own.map_or(&[][..], |(_, _, each, all)| &all[octet * each..][..*each]);
                                let values = open(*format, *k, bytes, octet, scales);
                                let columns = segment.columns.map_or(0, |share| share.start);
                                for (feature, values) in values.chunks_exact(*k).enumerate() {
                                    if row + feature < segment.rows {
                                        let row = segment.row_start + row + feature;
                                        held.set(&segment.tensor, row, columns, values);
                                    }
                                }
                                octet += 1;
                            }
                        }
                    }
                }
                PackContent::ExpertOctets { format, k, experts, rows, sources, band } => {
                    let bytes = &one_behind_the_other(*format, *k, *band, bytes);
                    let own = expert_scales.iter().find(|(others, ..)| *others == &sources[..]);
                    let mut octet = 0;
                    for expert in 0..*experts {
                        for first in (0..*rows).step_by(OCTET) {
                            for view in sources {
                                let scales =
                                    own.map_or(&[][..], |(_, each, all)| &all[octet * each..][..*each]);
                                let values = open(*format, *k, bytes, octet, scales);
                                for (feature, values) in values.chunks_exact(*k).enumerate() {
                                    if first + feature < *rows {
                                        held.set_expert(view, expert, *rows, first + feature, values);
                                    }
                                }
                                octet += 1;
                            }
                        }
                    }
                }
                PackContent::F32 { tensor, len } => {
                    for (at, value) in bytes.as_chunks().0.iter().enumerate() {
                        held.set(tensor, 0, at, &[f32::from_le_bytes(*value)]);
                    }
                    assert_eq!(bytes.len(), len * 4);
                }
                PackContent::Elements { tensor, start, block, stride, share, .. } => {
                    for (at, value) in bytes.as_chunks().0.iter().enumerate() {
                        let at = share.map_or(at, |s| at / s.len * s.of + s.start + at % s.len);
                        let at = start + at / block * stride + at % block;
                        held.set(tensor, 0, at, &[f32::from_le_bytes(*value)]);
                    }
                }
                // A router's octets hold products of tensors, and no tensor can be read back from them.
                PackContent::OctetScales { .. }
                | PackContent::ExpertScales { .. }
                | PackContent::RouterOctets { .. }
                | PackContent::RopeTable { .. } => {}
                other => panic!("no layout of a GPU: {other:?}"),
            }
        }
        held
    }

    fn set_expert(&mut self, view: &RowView, expert: usize, rows: usize, row: usize, values: &[f32]) {
        let each = view.tensor.contains(EXPERT);
        let of = view.rows.map_or(rows, |share| share.of);
        let whole = view.rows.map_or(0, |share| share.start) + row + if each { 0 } else { expert * of };
        let stored = view.start + whole / view.block * view.stride + whole % view.block;
        let name = view.tensor.replace(EXPERT, &expert.to_string());
        self.set(&name, stored, view.columns.map_or(0, |share| share.start), values);
    }

    fn set(&mut self, tensor: &str, row: usize, column: usize, values: &[f32]) {
        let info = &self.checkpoint.tensors()[tensor];
        let all = self
            .tensors
            .entry(tensor.to_string())
            .or_insert_with(|| vec![f32::NAN; info.elements().unwrap()]);
        all[row * info.cols() + column..][..values.len()].copy_from_slice(values);
    }
}

/// The 8 features of an octet as float32.
fn open(format: Format, k: usize, bytes: &[u8], octet: usize, scales: &[u8]) -> Vec<f32> {
    let block_bytes = octet_block_bytes(format);
    let all = octet_blocks(format, k) * block_bytes;
    let bytes = &bytes[octet * all..][..all];
    let mut values = Vec::with_capacity(OCTET * k);
    for feature in 0..OCTET {
        for column in 0..k {
            let of_block = 512 / format.code.bits();
            let block = &bytes[column / of_block * block_bytes..][..block_bytes];
            let piece = &block[feature * OCTET_BLOCK / OCTET..][..OCTET_BLOCK / OCTET];
            let at = column % of_block;
            let half = || u16::from_le_bytes([piece[2 * at], piece[2 * at + 1]]);
            values.push(match format {
                Format::F16 => f16::from_bits(half()).to_f32(),
                Format::BF16 => bf16::from_bits(half()).to_f32(),
                Format::FP8_BLOCK | Format::FP8_1X128 | Format::FP8_CHANNEL => {
                    let scale = match format {
                        Format::FP8_BLOCK => &scales[column / 128 * 4..],
                        Format::FP8_CHANNEL => &scales[feature * 4..],
                        _ => &block[OCTET_BLOCK + feature * 4..],
                    };
                    let scale = scale[..4].try_into().unwrap();
                    // The tables in `octet.rs`.
                    let word = u32::from_le_bytes(piece[at / 4 * 4..][..4].try_into().unwrap());
                    let half = word >> (at % 2 * 16);
                    let code = match at % 4 / 2 {
                        0 => half >> 8 & 0x80 | half >> 4 & 0x7f,
                        _ => half >> 4 & 0x80 | half >> 8 & 0x70 | half & 0x0f,
                    };
                    e4m3_to_f32(code as u8) * f32::from_le_bytes(scale)
                }
                Format::MXFP4 | Format::NVFP4 => {
                    // The tables in `octet.rs`: halves of two words, and what both have of their last columns.
                    let halves: [u32; 4] = std::array::from_fn(|n| {
                        let bytes = &piece[at / 16 * 8 + n * 2..][..2];
                        u32::from(u16::from_le_bytes(bytes.try_into().unwrap()))
                    });
                    let rest = |half: usize| halves[half] & 0x0c18 | (halves[2 + half] & 0x0c18) << 2;
                    let (word, half) = (at % 16 / 8, at % 2);
                    let (own, other) = (halves[word * 2 + half], halves[word * 2 + 1 - half]);
                    let (sign, magnitude) = match (at % 8 / 2, word) {
                        (0, _) => (own >> 15, own >> 6),
                        (1, _) => (own >> 9, own),
                        (2, _) => (other >> 5, own >> 12),
                        (_, 0) => (rest(half) >> 13, rest(half) >> 4),
                        _ => (rest(1 - half) >> 3, rest(half) >> 10),
                    };
                    let (sign, magnitude) = (sign & 1, magnitude & 7);
                    let code = e2m1_to_f32((sign << 3 | magnitude) as u8);
                    if format == Format::MXFP4 {
                        let scale = block[OCTET_BLOCK + feature * 4 + at / 32];
                        code * 2f32.powi(i32::from(scale) - 62 - 127)
                    } else {
                        let scale = block[OCTET_BLOCK + (feature * 4 + at / 32) * 2 + at % 32 / 16];
                        let (exponent, eighths) = (i32::from(scale >> 3) - 9, f32::from(scale & 7));
                        let scale = (1.0 + eighths / 8.0) * 2f32.powi(exponent);
                        let tensor = f32::from_le_bytes(scales[feature * 4..][..4].try_into().unwrap());
                        // In the order in which the checkpoint's values are made.
                        code * (scale * tensor)
                    }
                }
                other => panic!("no octets of {other}"),
            });
        }
    }
    values
}

/// The graph to interpret and what is packed of its weights.
fn program<'c>(model: &'c Model, spec: &ModelSpec) -> Result<(Graph, Held<'c>), CompileError> {
    let mut spec = spec.clone();
    spec.precision.activations = Activations::F32;
    let graph = compile::graph(&model.input(), &spec)?;
    let fused = fuse::fuse(&graph)?;
    let program = resident::resident(&fused, 64)?;
    let held = Held::pack(&model.checkpoint, &program.packing);
    // Rounding in the cache would hide what is looked for.
    spec.precision.kv_cache = Some(KvType::F32);
    Ok((compile::graph(&model.input(), &spec)?, held))
}

/// A checkpoint, stored or made up.
struct Model {
    name: String,
    config: serde_json::Value,
    checkpoint: Checkpoint,
    weights: WeightsFrom,
}

impl Model {
    fn stored(name: &str) -> Model {
        let Fixture { name, path, config, checkpoint, .. } = Fixture::open(name);
        Model { name, config, checkpoint, weights: WeightsFrom::Checkpoint { path } }
    }

    fn made_up(config: serde_json::Value) -> Model {
        let tensors = frontends::published_tensors(&config).unwrap();
        let checkpoint = Checkpoint::synthetic(config.clone(), 7, tensors.clone());
        let weights = WeightsFrom::Synthetic { seed: 7, config: config.clone(), tensors };
        Model { name: "made-up".into(), config, checkpoint, weights }
    }

    fn input(&self) -> compile::Input<'_> {
        compile::Input {
            name: &self.name,
            config: &self.config,
            tensors: self.checkpoint.tensors(),
            weights: self.weights.clone(),
            tokenizer: None,
            draft: None,
        }
    }

    /// Whole, for a GPU, in the formats that a kernel keeps.
    fn spec(&self) -> ModelSpec {
        let mut spec = ModelSpec::for_checkpoint("unused");
        spec.target = Target { device: Device::Cuda, arch: "sm_90a".into(), ..Target::default() };
        spec.limits.rows = 8;
        spec.limits.context = Some(64);
        spec
    }

    /// What the ranks of a shared model run.
    fn programs(&self, spec: &ModelSpec, ranks: usize) -> Result<Programs<'_>, CompileError> {
        let mut programs = Programs { graphs: Vec::new(), held: Vec::new() };
        for rank in 0..ranks {
            let mut spec = spec.clone();
            (spec.target.gpus, spec.target.only_rank) = (Some(ranks), Some(rank));
            let (graph, held) = program(self, &spec)?;
            programs.graphs.push(graph);
            programs.held.push(held);
        }
        Ok(programs)
    }

    /// Logits of all rows, by the whole model.
    fn whole(&self, spec: &ModelSpec, steps: &[Vec<u32>]) -> Vec<f32> {
        let (graph, held) = program(self, spec).unwrap();
        let mut interpreter = Interpreter::new(&graph, &held).unwrap();
        run(steps, |rows, wanted| interpreter.step(rows, wanted).unwrap())
    }
}

/// One of each for every rank.
struct Programs<'c> {
    graphs: Vec<Graph>,
    held: Vec<Held<'c>>,
}

impl Programs<'_> {
    /// Logits of all rows, by the ranks together.
    fn logits(&self, steps: &[Vec<u32>]) -> Vec<f32> {
        let sources: Vec<&dyn WeightSource> =
            self.held.iter().map(|held| held as &dyn WeightSource).collect();
        let mut ranks = Ranks::new(&self.graphs, &sources).unwrap();
        run(steps, |rows, wanted| ranks.step(rows, wanted).unwrap())
    }
}

/// Feeds the tokens of steps, and collects the logits of all rows.
fn run(steps: &[Vec<u32>], mut step: impl FnMut(&[Row], &[usize]) -> Vec<f32>) -> Vec<f32> {
    let mut all = Vec::new();
    let mut position = 0;
    for tokens in steps {
        let row = |(at, token): (usize, &u32)| Row { token: *token, position: position + at, sequence: 0 };
        let rows: Vec<Row> = tokens.iter().enumerate().map(row).collect();
        position += rows.len();
        all.extend(step(&rows, &(0..rows.len()).collect::<Vec<_>>()));
    }
    all
}

/// Largest distance in units of a row's root mean square. NaN never passes.
fn distance(logits: &[f32], others: &[f64], vocab: usize) -> f64 {
    assert_eq!(logits.len(), others.len());
    let rows = logits.chunks(vocab).zip(others.chunks(vocab)).map(|(ours, theirs)| {
        let scale = (theirs.iter().map(|x| x * x).sum::<f64>() / vocab as f64).sqrt();
        let far = ours.iter().zip(theirs).map(|(a, b)| {
            let far = (f64::from(*a) - b).abs() / scale;
            if far.is_nan() { f64::INFINITY } else { far }
        });
        far.fold(0.0, f64::max)
    });
    rows.fold(0.0, f64::max)
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// The checkpoint's own values.
struct Stored<'c>(&'c Checkpoint);

impl WeightSource for Stored<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        self.0.tensor_f32(name).map(Cow::Owned).map_err(|error| error.to_string())
    }
}

/// Every small checkpoint that can be shared out, by 2 and 4 ranks.
#[test]
fn ranks_together_are_transformers() {
    let mut names: Vec<String> = std::fs::read_dir(fixtures().join("hf"))
        .unwrap()
        .map(|entry| format!("hf/{}", entry.unwrap().file_name().to_string_lossy()))
        .collect();
    names.sort();
    let mut shared = Vec::new();
    for name in &names {
        let model = Model::stored(name);
        let mut spec = model.spec();
        // Blocks of these small matrices are longer than a rank's share; halves can be cut anywhere.
        spec.precision.weights = WeightFormat::Converted(Format::BF16);
        let vocab = frontends::facts(&model.config).unwrap().vocab;
        let (ids, logits) = reference(name).swap_remove(0);
        let ids = &ids[..ids.len().min(24)];
        let steps: Vec<Vec<u32>> = ids.chunks(5).map(<[u32]>::to_vec).collect();
        for ranks in [2, 4] {
            let programs = match model.programs(&spec, ranks) {
                Ok(programs) => programs,
                Err(CompileError::Shard(ShardError::Uneven { .. })) => continue,
                Err(error) => panic!("{name}, {ranks} ranks: {error}"),
            };
            // With what is packed for each rank, in bf16.
            let ours = programs.logits(&steps);
            let from_whole = distance(&ours, &wide(&model.whole(&spec, &steps)), vocab);
            assert!(from_whole < 2e-5, "{name}, {ranks} ranks: {from_whole:e} from the whole model");
            // With what is stored.
            let stored = Stored(&model.checkpoint);
            let sources = vec![&stored as &dyn WeightSource; ranks];
            let mut lock_step = Ranks::new(&programs.graphs, &sources).unwrap();
            let ours = run(&steps, |rows, wanted| lock_step.step(rows, wanted).unwrap());
            let from_reference = distance(&ours, &logits[..ours.len()], vocab);
            assert!(from_reference < 1e-4, "{name}, {ranks} ranks: {from_reference:e} from transformers");
            println!(
                "{name}, {ranks} ranks: {from_whole:.1e} from the whole, {from_reference:.1e} from float64"
            );
            shared.push((name.trim_start_matches("hf/"), ranks));
        }
    }
    for wanted in [
        ("llama-gqa-tied", 2),
        ("llama-gqa-tied", 4),
        ("qwen3-bf16", 2),
        ("gpt-oss", 2),
        ("gpt-oss", 4),
        ("qwen3-moe", 2),
        ("mimo-v2", 2),
        ("mimo-v2", 4),
        ("mimo-v2-flash", 2),
        ("mimo-v2-groups", 2),
        ("mimo-v2-groups", 4),
    ] {
        assert!(shared.contains(&wanted), "{wanted:?} is not among {shared:?}");
    }
}

/// A dense model with a bias behind every product.
fn biased_llama() -> Model {
    Model::made_up(json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true,
    }))
}

/// MiMo in its own formats, of blocks that 2 and 4 ranks can share.
fn mimo() -> Model {
    let layers = |of: [usize; 3]| json!(of);
    Model::made_up(json!({
        "model_type": "mimo_v2", "vocab_size": 64, "hidden_size": 128, "intermediate_size": 512,
        "moe_intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "swa_num_key_value_heads": 4, "head_dim": 48, "v_head_dim": 32,
        "swa_head_dim": 48, "swa_v_head_dim": 32, "swa_num_attention_heads": 8,
        "hybrid_layer_pattern": layers([0, 1, 0]), "moe_layer_freq": layers([0, 1, 1]),
        "attention_projection_layout": "fused_qkv", "attention_value_scale": 0.7, "sliding_window": 4,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": false,
        "quantization_config": {
            "quant_method": "fp8", "store_dtype": "mxfp4",
            "ignored_layers": ["model.layers.0.self_attn.o_proj"],
        },
    }))
}

/// MiMo with its layers' products in one format and its experts in another, which it is not published in.
fn mimo_in(weights: Format, experts: Format) -> Model {
    let mut config = mimo().config;
    config["moe_intermediate_size"] = json!(512);
    let mut tensors = frontends::published_tensors(&config).unwrap();
    for (name, info) in &mut tensors {
        // Its columns are too few for blocks of 128 on 4 ranks.
        if name.contains("o_proj") && weights.block == 128 {
            info.format = Format::BF16;
        } else if name.contains("_proj.weight") {
            info.format = if name.contains("experts") { experts } else { weights };
        }
    }
    let checkpoint = Checkpoint::synthetic(config.clone(), 7, tensors.clone());
    let weights = WeightsFrom::Synthetic { seed: 7, config: config.clone(), tensors };
    Model { name: "made-up".into(), config, checkpoint, weights }
}

/// What a kernel keeps as it is stored is packed without a loss. (Synthetic weights have scales of rows, so that those
/// of 128 rows are chosen when block FP8 is packed.)
#[test]
fn what_is_packed_as_stored_is_what_is_stored() {
    for (weights, experts) in [
        (Format::FP8_CHANNEL, Format::NVFP4),
        (Format::FP8_1X128, Format::FP8_CHANNEL),
        (Format::NVFP4, Format::FP8_1X128),
        (Format::MXFP4, Format::MXFP4),
    ] {
        let model = mimo_in(weights, experts);
        let (_, held) = program(&model, &model.spec()).unwrap();
        let mut seen = 0;
        for (name, found) in held.tensors.iter().filter(|(name, _)| name.contains("_proj.weight")) {
            let stored = model.checkpoint.tensor_f32(name).unwrap();
            assert_eq!(found, &stored, "{name} in {weights} and {experts}");
            seen += 1;
        }
        assert!(seen > 40, "{seen}");
    }
}

/// What is converted is off by no more than its format's rounding.
#[test]
fn what_is_converted_is_close_to_what_is_stored() {
    let model = mimo_in(Format::BF16, Format::BF16);
    for (format, bound) in [
        (Format::FP8_BLOCK, 0.03),
        (Format::FP8_1X128, 0.03),
        (Format::FP8_CHANNEL, 0.03),
        (Format::NVFP4, 0.11),
        (Format::MXFP4, 0.13),
    ] {
        let mut spec = model.spec();
        spec.precision.weights = WeightFormat::Converted(format);
        spec.precision.experts = Some(WeightFormat::Converted(format));
        let (_, held) = program(&model, &spec).unwrap();
        for (name, found) in held.tensors.iter().filter(|(name, _)| name.contains("_proj.weight")) {
            let stored = model.checkpoint.tensor_f32(name).unwrap();
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let off = square(&mut found.iter().zip(&stored).map(|(a, b)| a - b));
            let off = (off / square(&mut stored.iter().copied())).sqrt();
            assert!(off < bound && off > bound / 4.0, "{name} in {format}: {off}");
        }
    }
}

/// Some tokens in steps of several rows.
fn some_steps(vocab: u32) -> Vec<Vec<u32>> {
    vec![(0..5).map(|at| at * 7 % vocab).collect(), vec![3], (0..4).map(|at| (at * 11 + 2) % vocab).collect()]
}

/// In the formats that the kernel keeps: a rank's weights are bit for bit those of the whole model, ranks
/// together have all of them, and their logits are the whole model's.
#[test]
fn shares_in_blocks_are_the_whole_models() {
    for (model, vocab) in [
        (biased_llama(), 96),
        (mimo(), 64),
        (mimo_in(Format::FP8_CHANNEL, Format::NVFP4), 64),
        (mimo_in(Format::FP8_1X128, Format::FP8_BLOCK), 64),
        (mimo_in(Format::NVFP4, Format::FP8_CHANNEL), 64),
        (mimo_in(Format::FP8_BLOCK, Format::FP8_1X128), 64),
    ] {
        let spec = model.spec();
        let (_, whole) = program(&model, &spec).unwrap();
        let steps = some_steps(vocab as u32);
        let wanted = wide(&model.whole(&spec, &steps));
        for ranks in [2, 4] {
            let programs = model.programs(&spec, ranks).unwrap();
            for (name, all) in &whole.tensors {
                let mut owners = vec![0; all.len()];
                for (rank, held) in programs.held.iter().enumerate() {
                    let Some(own) = held.tensors.get(name) else { continue };
                    for (at, (own, all)) in own.iter().zip(all).enumerate() {
                        if !own.is_nan() {
                            assert_eq!(own.to_bits(), all.to_bits(), "rank {rank} of {ranks}: {name}[{at}]");
                            owners[at] += 1;
                        }
                    }
                }
                let lost = owners.iter().position(|owners| *owners == 0);
                assert_eq!(lost, None, "{name}: no rank of {ranks} has this element");
                // What is cut along columns, or by rows of heads that are there once, is nowhere twice.
                if name.contains("o_proj.weight") || name.contains("down_proj.weight") {
                    assert!(owners.iter().all(|owners| *owners == 1), "{name}: ranks of {ranks} share it");
                }
            }
            let far = distance(&programs.logits(&steps), &wanted, vocab);
            assert!(far < 2e-5, "{}, {ranks} ranks: {far:e} from the whole model", model.name);
            // The sums are what makes it so: a rank alone is another model.
            let alone = Interpreter::new(&programs.graphs[0], &programs.held[0]);
            let mut alone = alone.unwrap();
            let ours = run(&steps, |rows, wanted| alone.step(rows, wanted).unwrap());
            let own: Vec<f64> = wanted.chunks(vocab).flat_map(|row| &row[..vocab / ranks]).copied().collect();
            assert!(distance(&ours, &own, vocab / ranks) > 0.05);
        }
    }
}

#[test]
fn what_cannot_be_shared_out_is_refused() {
    let refused = |model: &Model, gpus: usize, change: &dyn Fn(&mut ModelSpec), words: &[&str]| {
        let mut spec = model.spec();
        (spec.target.gpus, spec.target.only_rank) = (Some(gpus), Some(0));
        change(&mut spec);
        let host = Host { threads: 1, cubins: None };
        let error =
            compile::compile(&model.input(), &spec, &host).expect_err(&format!("{words:?}")).to_string();
        for word in words {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    };
    let unchanged = |_: &mut ModelSpec| {};
    let llama = biased_llama();
    refused(
        &llama,
        8,
        &|spec| spec.target.only_rank = None,
        &["target.gpus is 8", "not built yet", "only_rank: 0"],
    );
    refused(&llama, 8, &|spec| spec.target.only_rank = Some(8), &["only_rank 8", "0 to 7"]);
    refused(&llama, 8, &|spec| spec.target.gpus = None, &["only_rank 0", "gpus: 8"]);
    refused(
        &llama,
        3,
        &unchanged,
        &["target.gpus is 3", "2 KV heads of cache 0", "use 1 or 2 or 4 or 6 or 8"],
    );
    refused(&llama, 6, &unchanged, &["target.gpus is 6", "8 query heads", "use 1 or 2 or 4 or 8"]);
    let draft = |spec: &mut ModelSpec| {
        let dflash = DflashSpec { checkpoint: "draft".into(), block: None, context_rope_theta: None };
        spec.draft = Some(Draft { dflash });
    };
    refused(&llama, 2, &draft, &["draft", "--no-draft", "target.only_rank"]);
    let other = |key: &str, value: usize| {
        let mut config = llama.config.clone();
        config[key] = json!(value);
        Model::made_up(config)
    };
    refused(&other("vocab_size", 97), 2, &unchanged, &["97 logits of head", "use 1"]);
    refused(&other("intermediate_size", 126), 4, &unchanged, &["126 intermediate columns of l0.gate"]);
    // 512 / 8 columns of a dense layer in FP8, 128 / 8 of an expert in FP4.
    let mimo = mimo();
    refused(
        &mimo,
        8,
        &unchanged,
        &["64 of the 512 columns", "down_proj", "128", "fp8", "precision.weights to bf16"],
    );
    let bf16 = |spec: &mut ModelSpec| spec.precision.weights = WeightFormat::Converted(Format::BF16);
    let but_experts = |spec: &mut ModelSpec| {
        bf16(spec);
        spec.precision.experts = Some(WeightFormat::AsStored);
    };
    refused(
        &mimo,
        8,
        &but_experts,
        &["16 of the 128 columns", "experts", "32", "mxfp4", "precision.experts to bf16"],
    );
}

/// The example's shares, of their exact sizes: every rank has an eighth of all but the embedding, the routers
/// and the norms, and a kernel.
#[test]
fn an_eighth_of_the_largest_example_fits_one_gpu() {
    let folder = fixtures().join("../../examples/mimo-v2.5-pro");
    let mut spec = ModelSpec::load(&folder.join("mimo-v2.5-pro-shard.yaml")).unwrap();
    let config = std::fs::read(folder.join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let tensors = frontends::published_tensors(&config).unwrap();
    let weights = WeightsFrom::Synthetic { seed: 1, config: config.clone(), tensors: tensors.clone() };
    let input = compile::Input {
        name: "mimo",
        config: &config,
        tensors: &tensors,
        weights,
        tokenizer: None,
        draft: None,
    };
    let bytes = |spec: &ModelSpec| {
        let mut spec = spec.clone();
        spec.precision.activations = Activations::F32;
        let graph = compile::graph(&input, &spec).unwrap();
        resident::resident(&fuse::fuse(&graph).unwrap(), 8192).unwrap()
    };
    let embedding = 152_576 * 6144 * 2;
    let each = bytes(&spec);
    emit(&each, Arch::Sm90a).unwrap();
    assert!((71_000_000_000..72_500_000_000).contains(&each.packing.bytes), "{}", each.packing.bytes);
    spec.target.only_rank = Some(7);
    assert_eq!(bytes(&spec).packing.bytes, each.packing.bytes);
    spec.target.gpus = None;
    spec.target.only_rank = None;
    // What every rank has: the embedding, and less than 10 MB of routers and norms a layer.
    let whole = bytes(&spec).packing.bytes;
    let shared = embedding + 70 * 10_000_000;
    assert!(each.packing.bytes - shared <= (whole - embedding) / 8 + (1 << 20), "{whole}");
    assert!(each.packing.bytes - embedding >= (whole - embedding) / 8, "{whole}");
}
