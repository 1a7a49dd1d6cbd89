//! The resident kernel without a GPU: the text that is emitted, compiled for the processor with a
//! simulated machine (`tests/simulator`) in place of its one header of instructions. Blocks, warps and
//! copies run in a random order, unread memory is NaN, and whatever waits for ever is found.

#[path = "simulator/attention.rs"]
mod attention;
#[path = "simulator/draft.rs"]
mod draft;
#[path = "simulator/round.rs"]
mod round;
#[path = "simulator/sampling.rs"]
mod sampling;
#[path = "simulator/second.rs"]
mod second;
#[path = "simulator/steps.rs"]
mod steps;

use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tilec_codegen::emit::cuda::emit;
use tilec_codegen::frontends;
use tilec_codegen::nvrtc::Arch;
use tilec_codegen::passes::{fuse, precision, resident, shard};
use tilec_ir::abi::KvType;
use tilec_ir::convert::{dequantize, quantize};
use tilec_ir::format::Format;
use tilec_ir::graph::interp::{Row, WeightSource};
use tilec_ir::graph::{EXPERT, Graph};
use tilec_ir::handoff::Handoff;
use tilec_ir::launch::{LAUNCH_ROWS, SAMPLE_WORDS, SYNC_BYTES, SampleRow};
use tilec_ir::resident::{Attention, Kind, ResidentProgram};
use tilec_ir::spec::{Activations, ModelSpec, Precision, Shard, WeightFormat};
use tilec_ir::stages::{BufferId, Slot};
use tilec_ir::tensor::TensorInfo;
use tilec_runtime::checkpoint::Checkpoint;
use tilec_runtime::pack::pack;

/// Folder of the simulated machine.
fn simulator() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("simulator")
}

/// Runs the C++ compiler on sources that know the simulated machine's headers.
fn compile(arguments: &[&OsStr], out: &Path) {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = Command::new(&compiler)
        // Some systems check jumps between stacks, by which lanes take turns.
        .args([
            "-std=c++20",
            "-O1",
            "-w",
            "-fno-strict-aliasing",
            "-ffp-contract=off",
            "-U_FORTIFY_SOURCE",
            "-I",
        ])
        .arg(simulator())
        .args(arguments)
        .arg("-o")
        .arg(out)
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}; install g++, or set CXX"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Builds the program `simulator` in a folder, of a kernel's text with the simulator's header of instructions in
/// place of the kernel's.
fn build(folder: &Path, text: &str) {
    let source = format!("#include \"prelude.h\"\n{text}\n#include \"entry.h\"\n");
    let kernel = folder.join("kernel.cpp");
    std::fs::write(&kernel, source).unwrap();
    static MACHINE: OnceLock<PathBuf> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| {
        let object = Path::new(env!("CARGO_TARGET_TMPDIR")).join("machine.o");
        let own = object.with_extension(format!("{}.o", std::process::id()));
        compile(&["-c".as_ref(), simulator().join("machine.cpp").as_ref()], &own);
        std::fs::rename(&own, &object).unwrap();
        object
    });
    compile(&[kernel.as_ref(), machine.as_ref()], &folder.join("simulator"));
}

/// The text without the clearing of what the last layer's attention reads and makes: nobody writes it any more in the
/// step, and it is looked at.
fn keep_attention(text: &str, program: &ResidentProgram) -> String {
    let Some(last) = program.layers.len().checked_sub(1) else { return text.to_string() };
    let handoffs = program.handoffs();
    let mut boxes: Vec<BufferId> = handoffs.iter().flat_map(|handoff| handoff.clears.clone()).collect();
    boxes.sort_unstable();
    boxes.dedup();
    let kept: Vec<BufferId> = program
        .sequence()
        .into_iter()
        .filter_map(|(_, _, stage)| match &stage.kind {
            Kind::Attention(attention) => Some([attention.input, attention.output]),
            _ => None,
        })
        .flatten()
        .collect();
    let first = program.sequence().iter().position(|(_, layer, _)| *layer == Some(last));
    let clears = |(n, handoff): (usize, &Handoff)| {
        let behind = first.is_some_and(|first| n > first);
        let cleared = handoff.clears.iter().filter(|id| !(behind && kept.contains(id)));
        let bit = |id: &BufferId| 1u32 << boxes.binary_search(id).unwrap();
        format!("{:#x}", cleared.map(bit).sum::<u32>())
    };
    let name = "u32 STAGE_CLEARS[STAGES] = {";
    let (before, rest) = text.split_once(name).unwrap();
    let (_, behind) = rest.split_once('}').unwrap();
    let clears: Vec<String> = handoffs.iter().enumerate().map(clears).collect();
    format!("{before}{name}{}}}{behind}", clears.join(", "))
}

/// Compiles a kernel's text behind the simulator's own headers.
fn build_kernel(folder: &Path, text: &str) {
    let (before, rest) = text.split_once("// ==== ptx.cuh").unwrap();
    let (_, behind) = rest.split_once("// ==== formats.cuh").unwrap();
    let formats = "#include \"ptx.h\"\n// ==== formats.cuh";
    build(folder, &format!("{before}\n{formats}{behind}"));
}

/// Sequences that have pages.
const SEQUENCES: usize = 8;

/// Words of a launch in front of the page table; what rounds need is at the end.
const LAUNCH_WORDS: usize = ROUND_AT + 1 + 16 * 8 + 5 + 9 + 3;

/// Where that begins.
const ROUND_AT: usize = 11 + 4 * LAUNCH_ROWS + 1 + LAUNCH_ROWS * SAMPLE_WORDS;

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
    /// Experts that rows chose.
    experts: u32,
    /// Those that were foreseen, and of these those that no row chose.
    foreseen: [u32; 2],
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
        let shape = &self.0.checkpoint.tensor(name).map_err(|error| error.to_string())?.shape;
        // Scales that are stored are kept, and need not be those that would be chosen.
        if let ([first, rows @ .., cols], true) = (&shape[..], weight.format != weight.stored) {
            let (rows, cols) = (first * rows.iter().product::<usize>(), *cols);
            // Experts in one tensor have scales of their own only where no scale is of several rows.
            assert!(
                shape.len() == 2 || (weight.format.block_rows == 1 && !weight.format.tensor_scale),
                "{name}"
            );
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

/// How rows are sampled, as the simulator's launches have it.
fn sampling_words(rows: &[SampleRow]) -> Vec<u32> {
    let mut words = vec![u32::from(!rows.is_empty())];
    words.extend(rows.iter().flat_map(SampleRow::words));
    words.resize(1 + LAUNCH_ROWS * SAMPLE_WORDS, 0);
    words
}

/// Numbers from -1 to 1, the same ones for a seed.
fn random_numbers(seed: u64) -> impl Iterator<Item = f32> {
    let next = |state: &u64| Some(state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407));
    std::iter::successors(next(&seed), next).map(|state| (state >> 40) as f32 / (1 << 23) as f32 - 1.0)
}

fn row(token: u32, position: usize, sequence: usize) -> Row {
    Row { token, position, sequence: sequence as u32 }
}

impl Simulation {
    fn new(
        config: &Value,
        weights: Format,
        experts: Option<Format>,
        sizes: impl Into<resident::Sizes>,
    ) -> Simulation {
        Simulation::share(config, weights, experts, sizes, None)
    }

    /// The same of what one rank of several has of the model.
    fn share(
        config: &Value,
        weights: Format,
        experts: Option<Format>,
        sizes: impl Into<resident::Sizes>,
        rank: Option<Shard>,
    ) -> Simulation {
        let mut tensors = frontends::synthetic_tensors(config, Format::BF16).unwrap();
        let mut spec = ModelSpec::for_checkpoint("unused").precision;
        spec.activations = Activations::F32;
        spec.kv_cache = Some(KvType::Bf16);
        // What packing would make of each row by itself is stored so, of the layers' products.
        let by_row =
            |format: Format| [Format::NVFP4, Format::FP8_CHANNEL, Format::FP8_1X128].contains(&format);
        for (name, info) in &mut tensors {
            let own = if name.contains("experts") { experts.unwrap_or(weights) } else { weights };
            if name.contains("_proj") && info.shape.len() > 1 && !name.contains("bias") && by_row(own) {
                info.format = own;
            }
        }
        let asked = |format: Format| match by_row(format) {
            true => WeightFormat::AsStored,
            false => WeightFormat::Converted(format),
        };
        (spec.weights, spec.experts) = (asked(weights), experts.map(asked));
        Simulation::stored(config, tensors, &spec, sizes, rank)
    }

    /// The same of tensors that are stored as they say.
    fn stored(
        config: &Value,
        tensors: BTreeMap<String, TensorInfo>,
        spec: &Precision,
        sizes: impl Into<resident::Sizes>,
        rank: Option<Shard>,
    ) -> Simulation {
        let mut graph = frontends::build(config, &tensors).unwrap();
        precision::precision(&mut graph, spec).unwrap();
        if let Some(rank) = rank {
            graph = shard::shard(&graph, rank).unwrap();
        }
        let program = resident::resident(&fuse::fuse(&graph).unwrap(), sizes).unwrap();
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
        std::fs::write(folder.path().join("draft_kv.bin"), []).unwrap();
        let simulation = Simulation { folder, program, graph, checkpoint, shared_bytes: text.shared.bytes() };
        build_kernel(simulation.folder.path(), &keep_attention(&text.text, &simulation.program));
        // Whoever reads what was never written gets NaN.
        simulation.write_cache(&vec![0xff; simulation.cache_bytes()]);
        simulation
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
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
        settings: [usize; 3],
        seed: u64,
    ) -> Outcome {
        self.launch_sampled(rows, wanted, steps, settings, seed, &[])
    }

    /// The same, with tokens that are chosen so; none are all the largest logits.
    fn launch_sampled(
        &self,
        rows: &[Row],
        wanted: &[usize],
        steps: usize,
        [blocks, routing, tap_offset]: [usize; 3],
        seed: u64,
        sampling: &[SampleRow],
    ) -> Outcome {
        assert!(rows.len() <= self.program.step_rows);
        let buffers = self.program.buffers.iter();
        let arena = buffers.map(|buffer| buffer.offset + buffer.bytes()).max().unwrap();
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
            all.resize(LAUNCH_ROWS, 0);
            launch.extend(all);
        };
        column(&|_, row| row.token);
        column(&|_, row| row.position as u32);
        column(&|_, row| row.sequence);
        column(&|at, _| wanted.get(at).map_or(0, |row| *row as u32));
        launch.extend(sampling_words(sampling));
        launch.resize(LAUNCH_WORDS, 0);
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
        let chosen = chosen.chunks(LAUNCH_ROWS).flat_map(|step| step[..wanted.len()].to_vec());
        let chosen = chosen.map(|word| word - 1).collect();
        let counts = words(&read("experts.bin"));
        let (experts, foreseen) = (counts[0], [counts[1], counts[2]]);
        Outcome { logits, chosen, arena: read("arena.bin"), experts, foreseen }
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
