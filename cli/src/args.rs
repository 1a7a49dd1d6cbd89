//! The command line: what every subcommand takes, and what its help says.

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use std::path::PathBuf;
use tilec_ir::abi::KvType;
use tilec_ir::resident::is_step_rows;
use tilec_ir::spec::{Activations, Device, WeightFormat};
use tilec_runtime::engine::{MAX_ROUNDS, PATIENCE};
use tilec_runtime::sampling::SamplingParams;

/// Compiles language models to native code and runs them.
#[derive(Debug, Parser)]
#[command(
    name = "tilec",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "\
Examples:
  tilec run model.gguf -p 'What is the capital of France?'
  tilec compile model.yaml -o model.plan && tilec chat model.plan
  tilec compile model.yaml --emit stages
  tilec bench model.plan -p 512 -n 128

Environment:
  TILEC_CACHE   folder for compiled plans [default: ~/.cache/tilec]
  TILEC_LOG     log filter in place of -v, such as tilec_runtime=debug

Exit codes: 0 done, 1 failed, 2 not understood."
)]
pub struct Cli {
    /// Log more to stderr: -v what is done, -vv details, -vvv everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Output")]
    pub verbose: u8,
    /// No notes and no progress bars on stderr
    #[arg(short, long, global = true, help_heading = "Output")]
    pub quiet: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Compile a model into a plan, or print a level of the compiler
    Compile(CompileArgs),
    /// Continue or answer a prompt
    Run(RunArgs),
    /// Talk in turns
    Chat(ChatArgs),
    /// Show a plan's stages, what each costs, and the memory it needs
    Inspect(InspectArgs),
    /// Measure speed, beside the floor that memory bandwidth sets
    Bench(BenchArgs),
    /// Measure each stage, beside what the cost model predicts
    Profile(ProfileArgs),
    /// Write the logits of given tokens to a safetensors file
    Logits(LogitsArgs),
    /// Check this machine and this build
    Doctor(DoctorArgs),
    /// Check the kernels of this machine's GPU with small random models
    Selftest(SelftestArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// What a model is compiled for; keys of model.yaml that the command line overrides.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Compilation (overrides model.yaml)")]
pub struct TargetArgs {
    /// Worker threads [default: one per physical core]
    #[arg(short, long, value_name = "N", value_parser = count(1024))]
    pub threads: Option<u64>,
    /// Positions of a sequence, prompt included [default: what the model allows, at most 4096]
    #[arg(short, long, value_name = "N", value_parser = count(16_777_216))]
    pub ctx_size: Option<u64>,
    /// What runs the plan: cpu, or cuda for one NVIDIA GPU
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub device: Option<Device>,
    /// Architecture: host, or LLVM's name of a processor such as haswell or znver4; for cuda sm_80, sm_89,
    /// sm_90a, sm_100a or sm_120a [default: host, for cuda sm_90a]
    #[arg(long, value_name = "ARCH")]
    pub arch: Option<String>,
    /// GPUs that share the model; more than one needs --only-rank
    #[arg(long, value_name = "N", value_parser = count(8))]
    pub gpus: Option<u64>,
    /// Only this rank's share (0 to GPUs - 1), to be measured alone on one GPU: what the others would add
    /// is left out, so its speed means something and its text nothing
    #[arg(long, value_name = "RANK", value_parser = clap::value_parser!(u64).range(0..8))]
    pub only_rank: Option<u64>,
    /// Elements of the KV cache: f32, f16 or bf16
    #[arg(long, value_name = "TYPE", value_parser = kv_type)]
    pub kv_cache_type: Option<KvType>,
    /// Format that weights are converted to when they are packed, such as q8_0 [default: as-stored]
    #[arg(long, value_name = "FORMAT", value_parser = weight_format)]
    pub weights: Option<WeightFormat>,
    /// Inputs of linear layers: auto, int8 or f32
    #[arg(long, value_name = "TYPE", value_parser = activations)]
    pub activations: Option<Activations>,
    /// Tokens that one step takes at most
    #[arg(long, value_name = "N", value_parser = count(1024))]
    pub max_rows: Option<u64>,
    /// Rows for which a GPU reads the weights once: 8, 16 or 32 [default: 8, or as many as a draft's block needs]
    #[arg(long, visible_alias = "ubatch-size", value_name = "N", value_parser = pass_rows)]
    pub pass_rows: Option<u64>,
    /// Sequences that have a KV cache at the same time
    #[arg(long, value_name = "N", value_parser = count(1024))]
    pub sequences: Option<u64>,
    /// A DFlash draft's folder: it guesses tokens ahead, and the text stays the same
    #[arg(long, value_name = "PATH", value_hint = ValueHint::DirPath)]
    pub draft: Option<PathBuf>,
}

impl TargetArgs {
    /// The first option that was given, but for `--threads`.
    pub fn given(&self) -> Option<&'static str> {
        let options = [
            ("--ctx-size", self.ctx_size.is_some()),
            ("--device", self.device.is_some()),
            ("--arch", self.arch.is_some()),
            ("--gpus", self.gpus.is_some()),
            ("--only-rank", self.only_rank.is_some()),
            ("--kv-cache-type", self.kv_cache_type.is_some()),
            ("--weights", self.weights.is_some()),
            ("--activations", self.activations.is_some()),
            ("--max-rows", self.max_rows.is_some()),
            ("--pass-rows", self.pass_rows.is_some()),
            ("--sequences", self.sequences.is_some()),
            ("--draft", self.draft.is_some()),
        ];
        options.into_iter().find_map(|(name, given)| given.then_some(name))
    }
}

/// A model to run, and how to compile it if it is not compiled yet.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// A plan folder, a model.yaml, a checkpoint folder or a .gguf file
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    pub path: PathBuf,
    /// Compilation, when the model is no plan
    #[command(flatten)]
    pub target: TargetArgs,
}

/// Where a plan's weights are.
#[derive(Clone, Debug, Default, Args)]
pub struct WeightsArgs {
    /// A checkpoint to read in place of the one that the plan names, which may have moved
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub checkpoint: Option<PathBuf>,
}

/// How a plan's draft guesses.
#[derive(Clone, Debug, Default, Args)]
pub struct DraftArgs {
    /// Do not use the plan's draft: every token takes a step of its own
    #[arg(long, conflicts_with = "draft_max", help_heading = "Draft")]
    pub no_draft: bool,
    /// Tokens that the draft guesses at a time, at most [default: what the plan has]
    #[arg(long, value_name = "N", value_parser = count(63), help_heading = "Draft")]
    pub draft_max: Option<u64>,
}

impl DraftArgs {
    /// Rows of a block.
    pub fn rows(&self) -> usize {
        match self.draft_max {
            _ if self.no_draft => 0,
            Some(guesses) => guesses as usize + 1,
            None => usize::MAX,
        }
    }
}

/// How many tokens a plan's draft guesses at a time.
#[derive(Clone, Debug, Default, Args)]
pub struct GuessArgs {
    /// Whether and how many at most
    #[command(flatten)]
    pub draft: DraftArgs,
    /// Tokens that the draft guesses at a time, at least. The number is chosen while the text is written, by how
    /// often guesses are right and what they cost; as large as --draft-max, this fixes it
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..64),
          conflicts_with = "no_draft", help_heading = "Draft")]
    pub draft_min: u64,
    /// How guesses are chosen, by vLLM's names
    #[arg(
        long,
        value_name = "METHOD",
        value_enum,
        default_value_t,
        conflicts_with = "no_draft",
        help_heading = "Draft"
    )]
    pub draft_sample_method: DraftSampleMethod,
}

/// How a plan's draft chooses its guesses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DraftSampleMethod {
    /// The most likely token: the text is the same as without a draft
    #[default]
    Greedy,
    /// Drawn at the request's temperature and verified by rejection sampling: more guesses are right, and tokens come
    /// with the model's probabilities, but other ones than without a draft
    Probabilistic,
}

impl From<DraftSampleMethod> for tilec_runtime::generate::DraftSampleMethod {
    fn from(method: DraftSampleMethod) -> Self {
        match method {
            DraftSampleMethod::Greedy => Self::Greedy,
            DraftSampleMethod::Probabilistic => Self::Probabilistic,
        }
    }
}

/// A level of the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EmitLevel {
    /// Typed operators
    Graph,
    /// Operators fused around anchors
    Fused,
    /// Tiles, buffers and waits
    Stages,
    /// The program of every worker
    Schedule,
    /// LLVM IR before optimization
    Llvm,
    /// Stages of the resident kernel (device: cuda)
    Resident,
    /// CUDA C++ of the resident kernel (device: cuda)
    Cuda,
}

impl EmitLevel {
    /// The compiler's level.
    pub fn level(self) -> tilec_codegen::compile::Level {
        use tilec_codegen::compile::Level;
        match self {
            EmitLevel::Graph => Level::Graph,
            EmitLevel::Fused => Level::Fused,
            EmitLevel::Stages => Level::Stages,
            EmitLevel::Schedule => Level::Schedule,
            EmitLevel::Llvm => Level::Llvm,
            EmitLevel::Resident => Level::Resident,
            EmitLevel::Cuda => Level::Cuda,
        }
    }
}

/// `tilec compile`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tilec compile examples/smollm2/model.yaml
  tilec compile SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2.plan --ctx-size 2048
  tilec compile model.yaml --emit stages --emit schedule | less")]
pub struct CompileArgs {
    /// A model.yaml, a checkpoint folder or a .gguf file
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    pub model: PathBuf,
    /// Folder of the plan [default: the model's name with .plan]
    #[arg(short, long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub output: Option<PathBuf>,
    /// Print this level to stdout; without --output no plan is written
    #[arg(long, value_name = "LEVEL", value_enum)]
    pub emit: Vec<EmitLevel>,
    /// Print the plan's manifest as JSON
    #[arg(long, conflicts_with = "emit", help_heading = "Output")]
    pub json: bool,
    /// What to compile for
    #[command(flatten)]
    pub target: TargetArgs,
}

/// Which tokens chance may choose.
#[derive(Clone, Debug, Args)]
pub struct ChanceArgs {
    /// 0 takes the likeliest token; higher is more random
    #[arg(long, help_heading = "Sampling", visible_alias = "temp", value_name = "T", default_value_t = 0.0, value_parser = non_negative)]
    pub temperature: f32,
    /// Only the K likeliest tokens; 0: all
    #[arg(long, help_heading = "Sampling", value_name = "K", default_value_t = 0)]
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability
    #[arg(long, help_heading = "Sampling", value_name = "P", default_value_t = 1.0, value_parser = fraction)]
    pub top_p: f32,
    /// Only tokens at least this probable, relative to the likeliest
    #[arg(long, help_heading = "Sampling", value_name = "P", default_value_t = 0.0, value_parser = fraction)]
    pub min_p: f32,
    /// Start of the random numbers: the same seed gives the same text
    #[arg(long, help_heading = "Sampling", value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl ChanceArgs {
    /// Parameters that say so.
    pub fn parameters(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: u32::try_from(self.top_k).unwrap_or(u32::MAX),
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            ..SamplingParams::default()
        }
    }
}

/// How tokens are chosen.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Most tokens to generate [default: until the model ends or the context is full]
    #[arg(short = 'n', long, value_name = "N", value_parser = count(1 << 30))]
    pub max_tokens: Option<u64>,
    /// The random choice
    #[command(flatten)]
    pub chance: ChanceArgs,
    /// Factor against tokens that came before; 1: none
    #[arg(long, value_name = "F", default_value_t = 1.0, value_parser = positive)]
    pub repeat_penalty: f32,
    /// Stop before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

/// `tilec run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  tilec run model.gguf -p 'What is the capital of France?' --stats
  tilec run model.plan -f question.txt --temperature 0.7 --top-p 0.9 --seed 1
  tilec run model.plan --raw -p 'Once upon a time' -n 100
  git diff | tilec run model.plan -f - --system 'Summarize this change.'")]
pub struct RunArgs {
    /// The prompt
    #[arg(short, long, value_name = "TEXT", required_unless_present = "file", conflicts_with = "file")]
    pub prompt: Option<String>,
    /// Read the prompt from a file; - is stdin
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,
    /// What the model is told before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// The prompt as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// Print speed and memory to stderr at the end
    #[arg(long, help_heading = "Output")]
    pub stats: bool,
    /// Print one JSON object at the end in place of text as it comes
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Its weights
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Its draft
    #[command(flatten)]
    pub draft: GuessArgs,
    /// How tokens are chosen
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `tilec chat`.
#[derive(Debug, Args)]
#[command(after_help = "\
Every line of stdin is a turn. /reset forgets the conversation, /exit and Ctrl-D end.
With a draft, /draft N lets it guess up to N tokens at a time from now on, /draft 0 none,
/draft as many as there may be.

Examples:
  tilec chat model.gguf
  tilec chat model.plan --system 'Answer in one sentence.' --temperature 0.7
  printf 'My name is Ada.\\nWhat is my name?\\n' | tilec chat model.plan")]
pub struct ChatArgs {
    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Print speed and memory to stderr after every answer
    #[arg(long, help_heading = "Output")]
    pub stats: bool,
    /// Its weights
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Its draft
    #[command(flatten)]
    pub draft: GuessArgs,
    /// How tokens are chosen
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `tilec inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
A stage's floor is the time that its bytes take at the given bandwidth: no program is faster.

Examples:
  tilec inspect model.plan
  tilec inspect model.plan --bandwidth 40 --rows 8 --context 2048
  tilec inspect model.yaml --json")]
pub struct InspectArgs {
    /// Memory bandwidth in GB/s [default: measured on this machine]
    #[arg(long, value_name = "GB/s", value_parser = positive)]
    pub bandwidth: Option<f32>,
    /// Tokens in the step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1024))]
    pub rows: u64,
    /// Positions in the KV cache before the step
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..16_777_216))]
    pub context: u64,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
}

/// How `tilec bench` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BenchOutput {
    /// A Markdown table
    Md,
    /// JSON, with every repeat
    Json,
}

/// `tilec bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each repeat reads a prompt of random tokens in one go (pp), then decodes tokens one by one
behind it (tg). One repeat before the first is not counted. The floor is the speed at which
memory could deliver the bytes that must be read; this program measures memory first.

With --rows or --context, and always on a GPU, steps of --rows sequences behind --context positions
are measured, -n of them, on a GPU in one launch; half of them lie before that position and half
behind it. What is in the cache is random. A range of positions is spread evenly over the sequences
of a step, so that their caches hold as much as if each length were as likely as any other; shortest
and longest alternate. A measurement of one sequence takes its middle.

Examples:
  tilec bench model.gguf
  tilec bench model.plan -p 0 -n 64 -r 10
  tilec bench gpu.plan --rows 1,8,32 --context 512,4096 --block 8
  tilec bench gpu.plan --rows 32 --context 1..8192 -p 0
  tilec bench model.plan --json > bench.json")]
pub struct BenchArgs {
    /// Tokens of the prompt; 0: no prompt
    #[arg(short, long = "pp", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u64).range(0..1 << 24))]
    pub prompt_tokens: u64,
    /// Tokens to decode; 0: none
    #[arg(short = 'n', long = "tg", value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u64).range(0..1 << 24))]
    pub generated_tokens: u64,
    /// Repeats that are counted [default: 5, on a GPU 9]
    #[arg(short, long, value_name = "N", value_parser = count(10_000))]
    pub repeats: Option<u64>,
    /// Sequences in a step [default: on a GPU 1,8, and as many as a pass has rows]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = count(1024))]
    pub rows: Vec<u64>,
    /// Positions in each sequence's KV cache; a range such as 1..8192, both ends included, gives each sequence
    /// of a step another number [default: on a GPU 512,4096]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = contexts)]
    pub context: Vec<Contexts>,
    /// On a GPU: also measure steps of N rows of one sequence, with all of their logits
    #[arg(long, value_name = "N", value_parser = count(1024))]
    pub block: Option<u64>,
    /// On a GPU, of a mixture of experts: who chooses. `model`; `uniform`: every row by itself, at random;
    /// or the share of experts, from 0 to 1, that all rows choose alike
    #[arg(long, value_name = "WHO", default_value = "model", value_parser = routing)]
    pub routing: Routing,
    /// On a GPU: how the kernel chooses tokens; those of the likeliest tokens cost nothing
    #[command(flatten)]
    pub chance: ChanceArgs,
    /// With a draft: tokens that a round adds on average, whatever the guesses are worth on random tokens
    /// [default: half a block]
    #[arg(long, value_name = "TOKENS", value_parser = non_negative, help_heading = "Draft")]
    pub accept: Option<f32>,
    /// On a GPU, with a draft: rounds of a launch, up to 512; 0 launches the kernels of each round one by one
    /// [default: 32 where rounds are short, 0 where they take milliseconds]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(0..=MAX_ROUNDS as u64), help_heading = "Draft")]
    pub launch_rounds: Option<u64>,
    /// Its draft
    #[command(flatten)]
    pub draft: DraftArgs,
    /// How to print
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = BenchOutput::Md, help_heading = "Output")]
    pub output: BenchOutput,
    /// Print JSON: --output json
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Its weights
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `tilec profile`.
#[derive(Debug, Args)]
#[command(after_help = "\
The trace opens in ui.perfetto.dev and in chrome://tracing: a line per worker, a slice per stage.

On a GPU, --rows are sequences of --context positions each, and the last step of a launch is traced.
With a draft also the last round of a launch of rounds: its block, the model's step and the inject,
and what lies between them.

Examples:
  tilec profile model.plan
  tilec profile model.plan --rows 8 --context 512 -o trace.json
  tilec profile gpu.plan --context 4096 --trace trace.json --sms 132
  tilec profile gpu.plan --draft draft/ --accept 6.5")]
pub struct ProfileArgs {
    /// Tokens in the step
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(1024))]
    pub rows: u64,
    /// Positions in the KV cache before the step
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u64).range(0..16_777_216))]
    pub context: u64,
    /// Steps that are measured; the median of each stage is shown
    #[arg(short, long, value_name = "N", default_value_t = 10, value_parser = count(10_000))]
    pub repeats: u64,
    /// Write a trace of the last step
    #[arg(short, long, visible_alias = "trace", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// On a GPU, of a mixture of experts: who chooses. `model`; `uniform`: every row by itself, at random;
    /// or the share of experts, from 0 to 1, that all rows choose alike
    #[arg(long, value_name = "WHO", default_value = "model", value_parser = routing)]
    pub routing: Routing,
    /// On a GPU: lines of the trace, spread over its SMs
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1024))]
    pub sms: u64,
    /// On a GPU, with a draft: tokens that a round adds on average, whatever the guesses are worth on random tokens
    /// [default: half a block]
    #[arg(long, value_name = "TOKENS", value_parser = non_negative, help_heading = "Draft")]
    pub accept: Option<f32>,
    /// Its draft
    #[command(flatten)]
    pub draft: DraftArgs,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Its weights
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
}

/// What computes logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// The compiled plan
    Cpu,
    /// The graph, operator by operator in float32: slow, for comparison
    Interpreter,
}

/// `tilec logits`.
#[derive(Debug, Args)]
#[command(after_help = "\
The file has, for each list i of tokens, `logits.i` (f32 [tokens, vocabulary]) and `tokens.i` (i64).

Examples:
  tilec logits model.plan --tokens 1,2,3 -o logits.safetensors
  tilec logits model.gguf --tokens-file lists.json --backend interpreter -o reference.safetensors")]
pub struct LogitsArgs {
    /// Token ids, separated by commas
    #[arg(
        long,
        value_name = "IDS",
        value_delimiter = ',',
        required_unless_present = "tokens_file",
        conflicts_with = "tokens_file"
    )]
    pub tokens: Vec<u32>,
    /// A JSON file with a list of token ids, or a list of lists
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tokens_file: Option<PathBuf>,
    /// Tokens of one step [default: as many as the plan allows]
    #[arg(long, value_name = "N", value_parser = count(1024))]
    pub rows_per_step: Option<u64>,
    /// What computes
    #[arg(long, value_enum, default_value_t = Backend::Cpu)]
    pub backend: Backend,
    /// The safetensors file to write
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Its weights
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// The model
    #[command(flatten)]
    pub model: ModelArgs,
}

/// `tilec doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// `tilec selftest`.
#[derive(Debug, Args)]
#[command(after_help = "\
Small random models are compiled, run on the GPU, and compared: with the logits of the interpreter,
and bit for bit with themselves, alone and beside others, step by step and many steps in a launch,
again and again. This needs NVRTC.

Examples:
  tilec selftest --quick
  tilec selftest --seed 7 --only 'qwen3 bf16' --repeats 1000")]
pub struct SelftestArgs {
    /// A quarter of the models, and a tenth of the repeats
    #[arg(long)]
    pub quick: bool,
    /// Start of the random numbers: other seeds are other models
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Repeats of a decoding that must have the same bits each time [default: 200; quick: 20]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    pub repeats: Option<u64>,
    /// Only cases with this text in their names
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// Number of the GPU
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub device: u64,
    /// Seconds after which a wait on the GPU counts as stuck: more where a tool such as compute-sanitizer slows it down
    #[arg(long, value_name = "SECONDS", default_value_t = PATIENCE.as_secs(), value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub patience: u64,
    /// Keep checkpoints and plans in this folder
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub keep: Option<PathBuf>,
    /// Print JSON
    #[arg(long, help_heading = "Output")]
    pub json: bool,
}

/// A number from 1 to `max`.
fn count(max: u64) -> clap::builder::RangedU64ValueParser<u64> {
    clap::builder::RangedU64ValueParser::new().range(1..=max)
}

fn number(text: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| "not a number".to_string())?;
    if value.is_finite() { Ok(value) } else { Err("not a finite number".into()) }
}

/// Who chooses experts in a measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Routing {
    /// The model's own router.
    Model,
    /// Chance, with this share of the experts the same for all rows.
    Random(f32),
}

fn routing(text: &str) -> Result<Routing, String> {
    match text {
        "model" => Ok(Routing::Model),
        "uniform" => Ok(Routing::Random(0.0)),
        share => match share.parse::<f32>() {
            Ok(share) if (0.0..=1.0).contains(&share) => Ok(Routing::Random(share)),
            _ => Err("give model, uniform, or a share from 0 to 1".into()),
        },
    }
}

/// How many positions the sequences of a step have in the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contexts {
    /// The fewest.
    pub first: usize,
    /// The most; as many if all have the same.
    pub last: usize,
}

impl Contexts {
    /// The same for all.
    pub const fn all(context: usize) -> Contexts {
        Contexts { first: context, last: context }
    }

    /// Of each of `rows` sequences: spread evenly from the fewest to the most, both included, shortest and longest
    /// in turn, so that neighbours differ and as many rows anywhere in a step have about as much to read. Of one
    /// sequence, the middle.
    pub fn of(self, rows: usize) -> Vec<usize> {
        let wide = self.last - self.first;
        let nth = |rank: usize| match rows {
            1 => self.first + wide / 2,
            _ => self.first + (wide * rank + (rows - 1) / 2) / (rows - 1),
        };
        (0..rows).map(|row| nth(if row % 2 == 0 { row / 2 } else { rows - 1 - row / 2 })).collect()
    }
}

impl std::fmt::Display for Contexts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Contexts { first, last } if first == last => write!(f, "{first}"),
            Contexts { first, last } => write!(f, "{first}..{last}"),
        }
    }
}

fn contexts(text: &str) -> Result<Contexts, String> {
    const MOST: usize = 1 << 24;
    let number = |text: &str| match text.parse() {
        Ok(number) if number < MOST => Ok(number),
        _ => Err(format!("give positions below {MOST}, or a range of them such as 1..8192")),
    };
    let (first, last) = text.split_once("..").unwrap_or((text, text));
    let contexts = Contexts { first: number(first)?, last: number(last)? };
    match contexts.first <= contexts.last {
        true => Ok(contexts),
        false => Err("the range ends before it begins".into()),
    }
}

fn non_negative(text: &str) -> Result<f32, String> {
    let value = number(text)?;
    if value >= 0.0 { Ok(value) } else { Err("must not be negative".into()) }
}

fn positive(text: &str) -> Result<f32, String> {
    let value = number(text)?;
    if value > 0.0 { Ok(value) } else { Err("must be above 0".into()) }
}

fn fraction(text: &str) -> Result<f32, String> {
    let value = number(text)?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err("must be from 0 to 1".into()) }
}

/// Reads a name as model.yaml does, so that both accept the same spellings.
fn named<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(serde_json::Value::String(text.to_string())).map_err(|error| error.to_string())
}

fn pass_rows(text: &str) -> Result<u64, String> {
    let rows = text.parse().ok().filter(|rows| is_step_rows(*rows));
    rows.map(|rows| rows as u64).ok_or_else(|| "8, 16 or 32 are possible".into())
}

fn device(text: &str) -> Result<Device, String> {
    named(text)
}

fn kv_type(text: &str) -> Result<KvType, String> {
    named(text)
}

fn weight_format(text: &str) -> Result<WeightFormat, String> {
    named(text)
}

fn activations(text: &str) -> Result<Activations, String> {
    named(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    /// `reference.md`: the long help of every command.
    fn reference() -> String {
        let mut root = Cli::command().term_width(100);
        root.build();
        let mut out = String::from(
            "# The tilec command\n\nMade from the help texts: \
             `TILEC_UPDATE_REFERENCE=1 cargo test -p tilec reference` writes it again.\n",
        );
        let mut section = |title: &str, command: &mut clap::Command| {
            let help = command.render_long_help().to_string();
            let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
            out.push_str(&format!("\n## {title}\n\n```text\n{}\n```\n", lines.join("\n").trim_end()));
        };
        section("tilec", &mut root);
        for command in root.get_subcommands_mut().filter(|command| command.get_name() != "help") {
            let title = format!("tilec {}", command.get_name());
            section(&title, command);
        }
        out
    }

    #[test]
    fn the_reference_is_up_to_date() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("reference.md");
        if std::env::var_os("TILEC_UPDATE_REFERENCE").is_some() {
            std::fs::write(&path, reference()).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == reference(),
            "cli/reference.md is stale: TILEC_UPDATE_REFERENCE=1 cargo test -p tilec reference"
        );
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for line in [
            "tilec run m -p x --top-p 1.5",
            "tilec run m -p x --temperature -1",
            "tilec run m -p x --temperature nan",
            "tilec run m -p x --repeat-penalty 0",
            "tilec run m -p x --threads 0",
            "tilec bench m --repeats 0",
            "tilec compile m --kv-cache-type f8",
            "tilec compile m --weights q9",
            "tilec run m",
            "tilec run m -p x -f y",
            "tilec logits m -o x",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn options_are_read() {
        let Ok(Cli { command: Command::Run(run), .. }) =
            parse("tilec run m -p hello --temp 0.5 --stop a --stop b -c 99 --kv-cache-type bf16 -n 3")
        else {
            panic!("not parsed");
        };
        assert_eq!((run.sampling.chance.temperature, run.sampling.max_tokens), (0.5, Some(3)));
        assert_eq!(run.sampling.stop, ["a", "b"]);
        let target = &run.model.target;
        assert_eq!((target.ctx_size, target.kv_cache_type), (Some(99), Some(KvType::Bf16)));
        assert_eq!((target.given(), TargetArgs::default().given()), (Some("--ctx-size"), None));
    }

    #[test]
    fn the_same_line_works_for_both_engines_of_the_comparison() {
        let line = "tilec bench m --threads 2 --pp 512 --tg 128 --repeats 1 --json";
        let Ok(Cli { command: Command::Bench(bench), .. }) = parse(line) else { panic!("not parsed") };
        assert_eq!((bench.prompt_tokens, bench.generated_tokens, bench.repeats), (512, 128, Some(1)));
        assert!(bench.json);
    }

    #[test]
    fn lists_of_rows_and_contexts_are_read() {
        let line = "tilec bench m --rows 1,8,32 --context 0,4096 --block 8";
        let Ok(Cli { command: Command::Bench(bench), .. }) = parse(line) else { panic!("not parsed") };
        let contexts = vec![Contexts::all(0), Contexts::all(4096)];
        assert_eq!((bench.rows, bench.context, bench.block), (vec![1, 8, 32], contexts, Some(8)));
        assert!(parse("tilec bench m --rows 1,0").is_err());
        let line = "tilec bench m --context 1..8192,7,3..3";
        let Ok(Cli { command: Command::Bench(bench), .. }) = parse(line) else { panic!("not parsed") };
        assert_eq!(bench.context, [(1, 8192), (7, 7), (3, 3)].map(|(first, last)| Contexts { first, last }));
        let texts: Vec<String> = bench.context.iter().map(Contexts::to_string).collect();
        assert_eq!(texts, ["1..8192", "7", "3"]);
        for wrong in ["8..1", "1..", "..8", "1...8", "a", "-1", "1..99999999"] {
            assert!(parse(&format!("tilec bench m --context {wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_range_is_spread_evenly_over_the_sequences_of_a_step() {
        let range = Contexts { first: 1, last: 8192 };
        let contexts = range.of(32);
        let mut sorted = contexts.clone();
        sorted.sort_unstable();
        assert_eq!((contexts[0], contexts[1], sorted[0], sorted[31]), (1, 8192, 1, 8192));
        // Steps of 8191 / 31 = 264.2 positions, and the sum that the middle gives.
        assert!(sorted.windows(2).all(|pair| (264..=265).contains(&(pair[1] - pair[0]))), "{sorted:?}");
        assert_eq!(contexts.iter().sum::<usize>(), 32 * 8193 / 2);
        // Passes of 8 rows have the same to read.
        for pass in contexts.chunks(8) {
            assert_eq!(pass.iter().sum::<usize>(), 8 * 8193 / 2);
        }
        assert_eq!((range.of(1), range.of(2), range.of(3)), (vec![4096], vec![1, 8192], vec![1, 8192, 4097]));
        assert_eq!(Contexts::all(5).of(4), [5; 4]);
        assert_eq!(range.of(0), [0; 0]);
    }
}
