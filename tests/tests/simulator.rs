//! The resident kernel without a GPU: the text that is emitted, compiled for the processor with a
//! simulated machine (`tests/simulator`) in place of its one header of instructions. Blocks, warps and
//! copies run in a random order, unread memory is NaN, and whatever waits for ever is found.

#[path = "simulator/draft.rs"]
mod draft;

use serde_json::{Value, json};
use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use tilec_codegen::emit::cuda::emit;
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::Arch;
use tilec_codegen::passes::{fuse, precision, resident, shard};
use tilec_ir::abi::KvType;
use tilec_ir::convert::{dequantize, quantize};
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_ir::graph::{EXPERT, Graph};
use tilec_ir::launch::{STEP_ROWS, SYNC_BYTES};
use tilec_ir::pack::PackContent;
use tilec_ir::resident::{Attention, Kind, ResidentProgram};
use tilec_ir::spec::{Activations, ModelSpec, Shard, WeightFormat};
use tilec_ir::stages::Slot;
use tilec_runtime::checkpoint::Checkpoint;
use tilec_runtime::pack::pack;

/// Sequences that have pages.
const SEQUENCES: usize = 8;

/// A model as the simulator runs it.
struct Simulation {
    folder: tempfile::TempDir,
    program: ResidentProgram,
    graph: Graph,
    checkpoint: Checkpoint,
    shared_bytes: usize,
}

/// What a launch left.
struct Outcome {
    logits: Vec<f32>,
    chosen: Vec<u32>,
    arena: Vec<u8>,
    sync: Vec<u8>,
    /// Experts that were streamed.
    experts: u32,
}

/// The checkpoint's weights, in the formats that the graph reads.
struct Weights<'a>(&'a Simulation);

impl WeightSource for Weights<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        let mut values = self.0.checkpoint.tensor_f32(name).map_err(|error| error.to_string())?;
        // What the graph calls weights may be parts of a stored matrix, or of one an expert.
        let read = |stored: &str| match stored.split_once(EXPERT) {
            Some((before, behind)) => name.starts_with(before) && name.ends_with(behind),
            None => stored == name,
        };
        let known = self.0.graph.weights.iter().find(|(own, weight)| read(weight.tensor(own)));
        let (_, weight) = known.ok_or("no weight lies there")?;
        if let [rows, cols] = self.0.checkpoint.tensor(name).map_err(|error| error.to_string())?.shape[..] {
            let planes = quantize(weight.format, rows, cols, &values).map_err(|error| error.to_string())?;
            dequantize(&planes.view(), &mut values).map_err(|error| error.to_string())?;
        }
        Ok(values.into())
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    words(bytes).into_iter().map(f32::from_bits).collect()
}

fn brains(bytes: &[u8]) -> Vec<f64> {
    let halves = bytes.as_chunks::<2>().0.iter();
    halves.map(|half| half::bf16::from_le_bytes(*half).to_f64()).collect()
}

fn row(token: u32, position: usize, sequence: usize) -> Row {
    Row { token, position, sequence: sequence as u32 }
}

impl Simulation {
    fn new(config: &Value, weights: Format, experts: Option<Format>, context: usize) -> Simulation {
        Simulation::share(config, weights, experts, context, None)
    }

    /// The same of what one rank of several has of the model.
    fn share(
        config: &Value,
        weights: Format,
        experts: Option<Format>,
        context: usize,
        rank: Option<Shard>,
    ) -> Simulation {
        let tensors = frontends::synthetic_tensors(config, Format::BF16).unwrap();
        let mut graph = frontends::build(config, &tensors).unwrap();
        let mut spec = ModelSpec::for_checkpoint("unused").precision;
        spec.activations = Activations::F32;
        spec.kv_cache = Some(KvType::Bf16);
        spec.weights = WeightFormat::Converted(weights);
        spec.experts = experts.map(WeightFormat::Converted);
        precision::precision(&mut graph, &spec).unwrap();
        if let Some(rank) = rank {
            graph = shard::shard(&graph, rank).unwrap();
        }
        let program = resident::resident(&fuse::fuse(&graph).unwrap(), context).unwrap();
        let checkpoint = Checkpoint::synthetic(config.clone(), 7, tensors);
        Simulation::of(program, graph, checkpoint)
    }

    /// The kernel of a program, with weights packed as it says.
    fn of(program: ResidentProgram, graph: Graph, checkpoint: Checkpoint) -> Simulation {
        let text = emit(&program, Arch::Sm90a).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let packed = pack(&checkpoint, &program.packing, &mut |_, _| ()).unwrap();
        std::fs::write(folder.path().join("weights.bin"), packed.as_slice()).unwrap();
        std::fs::write(folder.path().join("taps.bin"), []).unwrap();
        let simulation = Simulation { folder, program, graph, checkpoint, shared_bytes: text.shared.bytes() };
        simulation.build(&text.text);
        // Whoever reads what was never written gets NaN.
        simulation.write_cache(&vec![0xff; simulation.cache_bytes()]);
        simulation
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Compiles the kernel's text behind the simulator's own headers.
    fn build(&self, text: &str) {
        let (before, rest) = text.split_once("// ==== ptx.cuh").unwrap();
        let (_, behind) = rest.split_once("// ==== formats.cuh").unwrap();
        let formats = "#include \"ptx.h\"\n// ==== formats.cuh";
        let source = format!("#include \"prelude.h\"\n{before}\n{formats}{behind}\n#include \"entry.h\"\n");
        std::fs::write(self.path("kernel.cpp"), source).unwrap();
        let simulator = Path::new(env!("CARGO_MANIFEST_DIR")).join("simulator");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let output = Command::new(&compiler)
            .args(["-std=c++20", "-O1", "-w", "-fno-strict-aliasing", "-I"])
            .arg(&simulator)
            .arg(self.path("kernel.cpp"))
            .arg(simulator.join("machine.cpp"))
            .arg("-o")
            .arg(self.path("simulator"))
            .output()
            .unwrap_or_else(|error| panic!("{compiler}: {error}; install g++, or set CXX"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Attention of the last layer.
    fn last_attention(&self) -> &Attention {
        let body = &self.program.bodies[self.program.layers.last().unwrap().body];
        let found = body.iter().find_map(|stage| match &stage.kind {
            Kind::Attention(attention) => Some(attention),
            _ => None,
        });
        found.expect("every layer has attention")
    }

    /// Where the sinks of the last layer lie among the weights; nothing if it has none.
    fn sinks_at(&self) -> Range<usize> {
        let attention = self.last_attention();
        let Some(Slot::Layer(number)) = attention.sinks else { return 0..0 };
        let at = self.program.layers.last().unwrap().offsets[number] as usize;
        at..at + attention.heads * 4
    }

    /// Sinks of the last layer.
    fn sinks(&self) -> Vec<f32> {
        floats(&std::fs::read(self.path("weights.bin")).unwrap()[self.sinks_at()])
    }

    /// Gives the last layer other sinks.
    fn set_sinks(&self, sinks: &[f32]) {
        let mut weights = std::fs::read(self.path("weights.bin")).unwrap();
        let bytes: Vec<u8> = sinks.iter().flat_map(|sink| sink.to_le_bytes()).collect();
        weights[self.sinks_at()].copy_from_slice(&bytes);
        std::fs::write(self.path("weights.bin"), weights).unwrap();
    }

    /// Pages of the cache in all.
    fn pages(&self) -> usize {
        SEQUENCES * self.pages_per_sequence()
    }

    fn pages_per_sequence(&self) -> usize {
        self.program.context.div_ceil(self.program.kv.page_tokens)
    }

    fn cache_bytes(&self) -> usize {
        self.program.kv.total_bytes(self.pages()).unwrap()
    }

    fn cache(&self) -> Vec<u8> {
        std::fs::read(self.path("kv.bin")).unwrap()
    }

    fn write_cache(&self, bytes: &[u8]) {
        std::fs::write(self.path("kv.bin"), bytes).unwrap();
    }

    /// Runs a launch on so many blocks; all rows want logits.
    fn launch(&self, rows: &[Row], steps: usize, blocks: usize, seed: u64) -> Outcome {
        self.launch_routed(rows, steps, blocks, seed, 0)
    }

    /// The same, with experts as `LaunchArgs::routing` says.
    fn launch_routed(&self, rows: &[Row], steps: usize, blocks: usize, seed: u64, routing: usize) -> Outcome {
        let all: Vec<usize> = (0..rows.len()).collect();
        self.launch_at(rows, &all, steps, [blocks, routing, 0], seed)
    }

    /// The same, of which the rows `wanted` want logits, with taps from an element on. `settings` are
    /// blocks, routing and that element.
    fn launch_at(
        &self,
        rows: &[Row],
        wanted: &[usize],
        steps: usize,
        [blocks, routing, tap_offset]: [usize; 3],
        seed: u64,
    ) -> Outcome {
        assert!(rows.len() <= STEP_ROWS);
        let buffers = self.program.buffers.iter();
        let arena = buffers.map(|buffer| buffer.offset + STEP_ROWS * buffer.cols * 4).max().unwrap();
        let pages = self.pages();
        let mut launch: Vec<u32> = [
            arena,
            SYNC_BYTES,
            self.program.vocab,
            rows.len(),
            wanted.len(),
            steps,
            self.pages_per_sequence(),
            pages,
            self.shared_bytes,
            routing,
            tap_offset,
        ]
        .map(|value| value as u32)
        .to_vec();
        let mut column = |value: &dyn Fn(usize, &Row) -> u32| {
            let mut all: Vec<u32> = rows.iter().enumerate().map(|(at, row)| value(at, row)).collect();
            all.resize(STEP_ROWS, 0);
            launch.extend(all);
        };
        column(&|_, row| row.token);
        column(&|_, row| row.position as u32);
        column(&|_, row| row.sequence);
        column(&|at, _| wanted.get(at).map_or(0, |row| *row as u32));
        launch.extend(0..pages as u32);
        let bytes: Vec<u8> = launch.iter().flat_map(|word| word.to_le_bytes()).collect();
        std::fs::write(self.path("launch.bin"), bytes).unwrap();
        let output = Command::new(self.path("simulator"))
            .arg(self.folder.path())
            .args([blocks.to_string(), seed.to_string()])
            .output()
            .unwrap();
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "seed {seed}, {blocks} blocks: {problem}");
        let read = |name: &str| std::fs::read(self.path(name)).unwrap();
        let mut logits = floats(&read("logits.bin"));
        logits.truncate(wanted.len() * self.program.vocab);
        let chosen = words(&read("chosen.bin"));
        let chosen = chosen.chunks(STEP_ROWS).flat_map(|step| step[..wanted.len()].to_vec());
        let chosen = chosen.map(|word| word - 1).collect();
        let experts = words(&read("experts.bin"))[0];
        Outcome { logits, chosen, arena: read("arena.bin"), sync: read("sync.bin"), experts }
    }
}

/// The largest deviation of a row from the wanted one, relative to its size.
fn deviation(found: &[f32], wanted: &[f32], cols: usize) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let rows = found.chunks(cols).zip(wanted.chunks(cols));
    let error = |(found, wanted): (&[f32], &[f32])| {
        let square = |x: f32| f64::from(x) * f64::from(x);
        let off: f64 = found.iter().zip(wanted).map(|(f, w)| square(f - w)).sum();
        let size: f64 = wanted.iter().map(|w| square(*w)).sum();
        (off / size).sqrt()
    };
    // NaN is no small number.
    rows.map(error).fold(0.0, |worst, error| if error <= worst { worst } else { error })
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 200, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 40, "vocab_size": 83,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 3072,
        "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true
    })
}

fn qwen3(window: usize) -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 264, "num_hidden_layers": 1,
        "num_attention_heads": 9, "num_key_value_heads": 1, "head_dim": 72, "vocab_size": 96,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 3072,
        "tie_word_embeddings": false, "attention_bias": false,
        "use_sliding_window": true, "sliding_window": window, "max_window_layers": 0
    })
}

/// MiMo without experts: a layer with a window and sinks, then one without either and with fewer KV heads;
/// values are scaled.
fn mimo(window: usize) -> Value {
    json!({
        "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "hidden_act": "silu",
        "hidden_size": 72, "intermediate_size": 136, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 1, "swa_num_key_value_heads": 2,
        "head_dim": 48, "v_head_dim": 40, "vocab_size": 96, "layernorm_epsilon": 1e-5,
        "rope_theta": 1000000.0, "swa_rope_theta": 10000.0, "partial_rotary_factor": 0.334,
        "max_position_embeddings": 3072, "sliding_window": window, "hybrid_layer_pattern": [1, 0],
        "moe_layer_freq": [0, 0], "attention_value_scale": 0.612,
        "attention_projection_layout": "split", "tie_word_embeddings": false
    })
}

/// The same with q, k and v in one matrix, in two groups: octets of its FP8 lie at rows of its own.
/// Its second layer has experts.
fn mimo_fused() -> Value {
    let mut config = mimo(5);
    (config["architectures"], config["model_type"]) = (json!(["MiMoV2ForCausalLM"]), "mimo_v2".into());
    (config["num_key_value_heads"], config["swa_num_key_value_heads"]) = (2.into(), 6.into());
    config["attention_projection_layout"] = "fused_qkv".into();
    config["moe_layer_freq"] = json!([0, 1]);
    for (key, value) in [("n_routed_experts", 6), ("num_experts_per_tok", 2), ("moe_intermediate_size", 40)] {
        config[key] = value.into();
    }
    config
}

/// A clamped gate, biases of experts, and layers that differ by their windows.
fn gpt_oss() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu",
        "hidden_size": 72, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 96,
        "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "max_position_embeddings": 256,
        "sliding_window": 5, "num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 7.0
    })
}

/// Experts whose second product has four octets a tile: a row of it is one block, and there are many. A row of the
/// first is so long that all consumers are one team for it.
fn short_experts() -> Value {
    let mut config = qwen3_moe();
    for (key, value) in [
        ("hidden_size", 3200),
        ("num_hidden_layers", 1),
        ("num_experts", 3),
        ("moe_intermediate_size", 72),
        ("num_attention_heads", 1),
        ("head_dim", 16),
        ("vocab_size", 24),
    ] {
        config[key] = json!(value);
    }
    config
}

/// Rows that are multiplied in parts.
fn long(hidden: usize, intermediate: usize) -> Value {
    let mut config = qwen3(5);
    for (key, value) in [
        ("hidden_size", hidden),
        ("intermediate_size", intermediate),
        ("num_attention_heads", 1),
        ("num_key_value_heads", 1),
        ("head_dim", 16),
        ("vocab_size", 24),
    ] {
        config[key] = json!(value);
    }
    config
}

/// More experts than a word has bits, and than there are SMs on a large chip, so that a router's are multiplied
/// several at a time; fewer than four are chosen, so that most of a step's are of one row.
fn qwen3_moe() -> Value {
    let mut config = qwen3(5);
    config["architectures"] = json!(["Qwen3MoeForCausalLM"]);
    config["model_type"] = json!("qwen3_moe");
    for (key, value) in [
        ("hidden_size", 144),
        ("num_hidden_layers", 2),
        ("num_experts", 140),
        ("num_experts_per_tok", 3),
        ("moe_intermediate_size", 136),
        ("decoder_sparse_step", 1),
    ] {
        config[key] = json!(value);
    }
    config["norm_topk_prob"] = json!(true);
    config["mlp_only_layers"] = json!([]);
    config
}

#[test]
fn steps_give_the_interpreters_logits_whatever_the_order_of_blocks_and_copies() {
    for (name, config, format, experts, bound) in [
        ("llama bf16", llama(), Format::BF16, None, 0.03),
        ("llama f16", llama(), Format::F16, None, 0.01),
        ("llama fp8", llama(), Format::FP8_BLOCK, None, 0.03),
        ("long bf16", long(40, 8264), Format::BF16, None, 0.03),
        ("long fp8", long(40, 8264), Format::FP8_BLOCK, None, 0.03),
        ("long f16", long(8264, 16), Format::F16, None, 0.01),
        ("gpt-oss f16", gpt_oss(), Format::F16, Some(Format::F16), 0.01),
        ("qwen3 moe mxfp4", qwen3_moe(), Format::BF16, Some(Format::MXFP4), 0.03),
        ("short mxfp4", short_experts(), Format::BF16, Some(Format::MXFP4), 0.03),
        ("mimo fp8, mxfp4", mimo_fused(), Format::FP8_BLOCK, Some(Format::MXFP4), 0.03),
    ] {
        let simulation = Simulation::new(&config, format, experts, 256);
        let vocab = simulation.program.vocab;
        let weights = Weights(&simulation);
        let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
        let first: Vec<Row> =
            (0..6).map(|n| row(n * 7 % 24, n as usize, 0)).chain([row(3, 0, 1), row(9, 1, 1)]).collect();
        let second: Vec<Row> = (6..9)
            .map(|n| row(n * 7 % 24, n as usize, 0))
            .chain((2..6).map(|n| row(n * 5 % 24, n as usize, 1)))
            .collect();
        // Long rows take the simulator long: one step, in two orders.
        let long = name.starts_with("long") || name.starts_with("short");
        for (number, rows) in [&first, &second].into_iter().take(if long { 1 } else { 2 }).enumerate() {
            let wanted: Vec<usize> = (0..rows.len()).collect();
            let wanted = interpreter.step(rows, &wanted).unwrap();
            let before = simulation.cache();
            let found = simulation.launch(rows, 1, 3 + number, number as u64);
            let off = deviation(&found.logits, &wanted, vocab);
            assert!(off < bound, "{name}, step {number}: off by {off}");
            // Other orders, other numbers of blocks: the same bits, in the cache as well.
            let cache = simulation.cache();
            for seed in 10..if name == "llama bf16" { 13 } else { 11 } {
                simulation.write_cache(&before);
                let again = simulation.launch(rows, 1, 2 + seed as usize % 5, seed);
                assert!(again.logits == found.logits, "{name}, step {number}: seed {seed} has other bits");
                assert!(simulation.cache() == cache, "{name}, step {number}: seed {seed} has another cache");
            }
        }
        if long {
            continue;
        }
        if name == "qwen3 moe mxfp4" {
            check_routing(&simulation, &first);
        }
        // The second sequence's rows alone.
        let ends: Vec<Row> = [row(1, 9, 0), row(2, 6, 1)].into();
        let before = simulation.cache();
        let both = simulation.launch(&ends, 1, 4, 20);
        simulation.write_cache(&before);
        let alone = simulation.launch(&ends[1..], 1, 4, 21);
        assert!(alone.logits == both.logits[vocab..], "{name}: alone and in company differ");
        // Three steps of one launch choose what three launches choose.
        simulation.write_cache(&before);
        let launched = simulation.launch(&ends, 3, 4, 22);
        simulation.write_cache(&before);
        let mut rows = ends.clone();
        for step in 0..3 {
            let single = simulation.launch(&rows, 1, 5, 23 + step);
            assert_eq!(single.chosen, launched.chosen[step as usize * 2..][..2], "{name}, step {step}");
            for (row, token) in rows.iter_mut().zip(&single.chosen) {
                (row.token, row.position) = (*token, row.position + 1);
            }
        }
    }
}

/// One rank alone is the interpreter of its graph, in which its own parts stand for sums: heads, columns of
/// matrices and of experts are cut, in blocks of FP8 and FP4 as well.
#[test]
fn a_rank_alone_gives_the_interpreters_logits() {
    let mut mimo = mimo_fused();
    for (key, value) in [
        ("num_attention_heads", 8),
        ("swa_num_key_value_heads", 4),
        ("v_head_dim", 32),
        ("intermediate_size", 256),
        ("moe_intermediate_size", 64),
    ] {
        mimo[key] = value.into();
    }
    for (name, config, format, experts, bound) in [
        ("gpt-oss f16", gpt_oss(), Format::F16, Some(Format::F16), 0.01),
        ("mimo fp8, mxfp4", mimo, Format::FP8_BLOCK, Some(Format::MXFP4), 0.03),
    ] {
        for rank in 0..2 {
            let rank = Shard { rank, ranks: 2 };
            let simulation = Simulation::share(&config, format, experts, 256, Some(rank));
            assert_eq!(simulation.program.vocab, 48);
            let weights = Weights(&simulation);
            let mut interpreter = Interpreter::new(&simulation.graph, &weights).unwrap();
            let rows: Vec<Row> = (0..8).map(|n| row(n * 11 % 96, n as usize, 0)).collect();
            let wanted = interpreter.step(&rows, &(0..rows.len()).collect::<Vec<_>>()).unwrap();
            let found = simulation.launch(&rows, 1, 3, 1);
            let off = deviation(&found.logits, &wanted, simulation.program.vocab);
            assert!(off < bound, "{name}, {rank}: off by {off}");
        }
    }
}

/// Experts that chance chooses for 8 rows, 3 each in two layers: all alike, one alike, each by itself.
fn check_routing(simulation: &Simulation, rows: &[Row]) {
    let before = simulation.cache();
    let streamed = [1001, 335, 1].map(|routing| {
        let [one, again] = [5, 6].map(|seed| simulation.launch_routed(rows, 1, 3, seed, routing));
        assert!(one.logits.iter().all(|logit| logit.is_finite()), "{routing}");
        assert!(one.logits == again.logits && one.experts == again.experts, "{routing}");
        one.experts
    });
    assert_eq!(streamed[0], 2 * 3);
    assert!(streamed[1] <= 2 * (1 + 8 * 2) && streamed[2] <= 2 * 8 * 3, "{streamed:?}");
    assert!(streamed.is_sorted() && streamed[2] > 2 * 12, "{streamed:?}");
    simulation.write_cache(&before);
}

/// Attention of the last layer in one launch against its formula in float64, over a cache of random
/// numbers. Gives whether a head's sink had a part of its weights, and not all of them.
fn check_attention(simulation: &Simulation, rows: &[Row], blocks: usize, seed: u64) -> bool {
    let program = &simulation.program;
    let kv = program.kv;
    let attention = simulation.last_attention();
    let outcome = simulation.launch(rows, 1, blocks, seed);
    let counters = words(&outcome.sync);
    // The counts of parts lie behind the three cells of the best logits; a crossing's count stays.
    assert!(counters[112..].iter().all(|count| *count == 0), "counts are left for the next stage");
    let buffer = |id| {
        let buffer = program.buffer(id);
        (&outcome.arena[buffer.offset..], buffer.cols)
    };
    let (qkv, cols) = buffer(attention.input);
    let qkv: Vec<f64> = floats(&qkv[..STEP_ROWS * cols * 4]).into_iter().map(f64::from).collect();
    let (out, out_cols) = buffer(attention.output);
    let out = brains(&out[..STEP_ROWS * out_cols * 2]);
    let cache = brains(&simulation.cache());
    let layer = program.layers.last().unwrap();
    let sinks = simulation.sinks();
    let mut sink_counts = false;
    let table = attention.rope.map(|rope| rope.table);
    let found = program.packing.items.iter().find_map(|item| match &item.content {
        PackContent::RopeTable { inv_freq, .. } if table == Some(Slot::Fixed(item.offset)) => Some(inv_freq),
        _ => None,
    });
    let inv_freq = found.expect("heads are rotated");
    let (heads, group) = (attention.heads, attention.heads / attention.kv_heads);
    for (at, row) in rows.iter().enumerate() {
        let from = attention.window.map_or(0, |window| (row.position + 1).saturating_sub(window));
        let page = |p: usize, kv_head: usize| {
            let page = row.sequence as usize * simulation.pages_per_sequence() + p / kv.page_tokens;
            kv.block_offset(simulation.pages(), layer.cache, page, kv_head) / 2
        };
        for head in 0..heads {
            let mut q = qkv[at * cols + head * kv.qk_dim..][..kv.qk_dim].to_vec();
            if let Some(norm) = attention.q_norm {
                let mean = q.iter().map(|x| x * x).sum::<f64>() / kv.qk_dim as f64;
                let name = format!("model.layers.{}.self_attn.q_norm.weight", program.layers.len() - 1);
                let gains = simulation.checkpoint.tensor_f32(&name).unwrap();
                let scale = 1.0 / (mean + f64::from(norm.eps)).sqrt();
                q.iter_mut().zip(gains).for_each(|(x, gain)| *x *= scale * f64::from(gain));
            }
            let raw = q.clone();
            let half = inv_freq.len();
            for (i, frequency) in inv_freq.iter().enumerate() {
                let (sin, cos) = (f64::from(*frequency) * row.position as f64).sin_cos();
                q[i] = raw[i] * cos - raw[i + half] * sin;
                q[i + half] = raw[i + half] * cos + raw[i] * sin;
            }
            let score = |p: usize| {
                let key = &cache[page(p, head / group) + p % kv.page_tokens * kv.qk_dim..][..kv.qk_dim];
                q.iter().zip(key).map(|(q, k)| q * k).sum::<f64>() * f64::from(attention.scale)
            };
            let scores: Vec<f64> = (from..=row.position).map(score).collect();
            let sink = sinks.get(head).map_or(f64::NEG_INFINITY, |sink| f64::from(*sink));
            let top = scores.iter().copied().fold(sink, f64::max);
            let total = scores.iter().map(|score| (score - top).exp()).sum::<f64>() + (sink - top).exp();
            sink_counts |= (0.01..0.99).contains(&((sink - top).exp() / total));
            let mut wanted = vec![0.0f64; kv.v_dim];
            for (p, score) in (from..=row.position).zip(&scores) {
                let base =
                    page(p, head / group) + kv.page_tokens * kv.qk_dim + p % kv.page_tokens * kv.v_pad();
                let weight = (score - top).exp() / total;
                wanted.iter_mut().zip(&cache[base..]).for_each(|(sum, v)| *sum += weight * v);
            }
            let size = wanted.iter().fold(0.0f64, |size, x| size.max(x.abs()));
            for (d, wanted) in wanted.iter().enumerate() {
                let found = out[at * out_cols + head * kv.v_dim + d];
                // Half a unit of a bfloat16 is 2^-9 of a number.
                let close = (found - wanted).abs() <= size * 0.005 + f64::from(f32::MIN_POSITIVE);
                assert!(
                    close,
                    "position {}, head {head}, column {d}: {found}, wanted {wanted}",
                    row.position
                );
            }
        }
    }
    sink_counts
}

#[test]
fn attention_adds_up_chunks_and_spans() {
    let mut sunk = mimo(1500);
    (sunk["hybrid_layer_pattern"], sunk["moe_layer_freq"]) = (json!([1]), json!([0]));
    sunk["num_hidden_layers"] = 1.into();
    let [mut llama, mut qwen3] = [llama(), qwen3(1500)];
    (llama["num_hidden_layers"], qwen3["num_hidden_layers"]) = (1.into(), 1.into());
    for config in [llama, qwen3, sunk, mimo(5)] {
        let simulation = Simulation::new(&config, Format::BF16, None, 3072);
        if !simulation.sinks().is_empty() {
            // Among the scores, below all of them, and so far above that their weights vanish.
            simulation.set_sinks(&[0.5, 3.0, -7.0, f32::NEG_INFINITY, 300.0, 6.5]);
        }
        // Numbers from -2 to 2, and the padding of values, which nobody reads, as well.
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 22) as f32 - 2.0
        };
        let numbers = simulation.cache_bytes() / 2;
        let cache: Vec<u8> =
            (0..numbers).flat_map(|_| half::bf16::from_f32(random()).to_le_bytes()).collect();
        simulation.write_cache(&cache);
        // Around the ends of chunks (128) and spans (1,024); a run over an end; all rows of one sequence. On
        // two blocks an SM has more than the 32 items that are counted at once.
        let mixed = [(2046, 0), (2047, 0), (2048, 0), (1023, 1), (1024, 1), (2900, 2), (5, 3), (1500, 4)];
        let run: Vec<(usize, usize)> = (1020..1028).map(|position| (position, 5)).collect();
        let single = [(3071, 6)];
        for (seed, (places, blocks)) in
            [(&mixed[..], 2), (&mixed[..], 40), (&run[..], 3), (&single[..], 7)].into_iter().enumerate()
        {
            let rows: Vec<Row> =
                places.iter().enumerate().map(|(n, (p, s))| row(n as u32 * 9, *p, *s)).collect();
            let sink_counts = check_attention(&simulation, &rows, blocks, seed as u64);
            assert_eq!(sink_counts, !simulation.sinks().is_empty());
        }
    }
}
