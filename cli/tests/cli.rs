//! The `tilec` program as a user meets it: what it prints, where, and with which exit code.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// A working folder with a cache of its own.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tilec"));
        command.args(args).current_dir(self.folder.path()).env("TILEC_CACHE", self.path("cache"));
        command.env_remove("TILEC_LOG").stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Stdout of a run that must succeed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Stderr of a run that must fail as a user expects: code 1, `error:`, nothing on stdout.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
        assert!(stderr.lines().any(|line| line.starts_with("error: ")), "{args:?}: {stderr}");
        assert!(!stderr.contains("panicked") && !stderr.contains("RUST_BACKTRACE"), "{args:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
        stderr
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    path.canonicalize().unwrap().to_str().unwrap().to_string()
}

#[test]
fn help_is_complete_and_goes_to_stdout() {
    let bench = Bench::new();
    let help = bench.ok(&["--help"]);
    for command in
        ["compile", "run", "chat", "inspect", "bench", "profile", "logits", "doctor", "completions"]
    {
        assert!(help.contains(&format!("\n  {command} ")), "{help}");
        let own = bench.ok(&[command, "--help"]);
        assert!(own.contains(&format!("Usage: tilec {command}")), "{own}");
    }
    assert!(bench.ok(&["--version"]).starts_with("tilec "));
}

#[test]
fn what_is_not_understood_has_code_2() {
    let bench = Bench::new();
    for args in [
        &[][..],
        &["frobnicate"],
        &["run"],
        &["run", "model"],
        &["run", "model", "-p", "x", "--top-p", "2"],
        &["compile", "model", "--emit", "ptx"],
        &["compile", "model", "--kv-cache-type", "f8"],
        &["logits", "model", "--tokens", "1,x", "-o", "out"],
    ] {
        let output = bench.run(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn completions_name_the_commands() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(bench.ok(&["completions", shell]).contains("inspect"), "{shell}");
    }
}

#[test]
fn models_that_cannot_be_are_refused_by_name() {
    let bench = Bench::new();
    assert!(bench.fails(&["run", "missing.gguf", "-p", "x"]).contains("missing.gguf"));
    bench.write("notes.txt", "hello");
    assert!(bench.fails(&["inspect", "notes.txt"]).contains("model.yaml"));
    std::fs::create_dir(bench.path("empty")).unwrap();
    assert!(bench.fails(&["inspect", "empty"]).contains("plan.json"));
    bench.write("typo.yaml", "model:\n  chekpoint: x\n");
    let error = bench.fails(&["compile", "typo.yaml"]);
    assert!(error.contains("typo.yaml") && error.contains("chekpoint") && error.contains('2'), "{error}");
    bench.write("gone.yaml", "model: {checkpoint: gone.gguf}");
    assert!(bench.fails(&["compile", "gone.yaml"]).contains("gone.gguf"));
}

/// One rank of two of a model: compiled for a GPU (which needs none), shown as what it is; and what is no
/// rank is refused.
#[test]
fn one_rank_of_several_is_compiled_and_shown() {
    let bench = Bench::new();
    let model = fixture("hf/llama-gqa-tied");
    let cuda = ["compile", model.as_str(), "--device", "cuda"];
    let with = |more: &[&'static str]| [&cuda[..], more].concat();
    bench.ok(&with(&["--gpus", "2", "--only-rank", "1", "-o", "half.plan"]));
    bench.ok(&with(&["-o", "whole.plan"]));
    let json =
        |plan: &str| -> Value { serde_json::from_str(&bench.ok(&["inspect", plan, "--json"])).unwrap() };
    let (half, whole) = (json("half.plan"), json("whole.plan"));
    assert_eq!(half["shard"], serde_json::json!({"rank": 1, "ranks": 2}));
    assert_eq!(whole["shard"], Value::Null);
    assert!(half["parameters"].as_u64().unwrap() < whole["parameters"].as_u64().unwrap());
    let text = bench.ok(&["inspect", "half.plan"]);
    assert!(text.contains("llama-gqa-tied, rank 1 of 2 (llama"), "{text}");
    assert!(text.contains("rank 1 of 2 alone"), "{text}");
    let graph = bench.ok(&with(&["--gpus", "2", "--only-rank", "1", "--emit", "graph"]));
    assert!(graph.contains("all_reduce(%l0.o) ranks=2"), "{graph}");
    for (more, words) in [
        (&["--gpus", "2"][..], &["target.gpus is 2", "only_rank: 0"][..]),
        (&["--gpus", "2", "--only-rank", "2"], &["only_rank 2", "0 to 1"]),
        (&["--only-rank", "0"], &["target.only_rank 0", "gpus: 8"]),
        (&["--gpus", "3", "--only-rank", "0"], &["target.gpus is 3", "KV heads", "use 1 or 2 or 4"]),
    ] {
        let stderr = bench.fails(&with(more));
        for word in words {
            assert!(stderr.contains(word), "{more:?}: no {word:?} in {stderr}");
        }
    }
    let stderr = bench.fails(&["compile", model.as_str(), "--gpus", "2", "--only-rank", "0"]);
    assert!(stderr.contains("no meaning with `device: cpu`"), "{stderr}");
}

#[test]
fn damaged_checkpoints_are_errors_that_name_the_file() {
    let bench = Bench::new();
    let whole = std::fs::read(fixture("gguf/llama-q8_0/model.gguf")).unwrap();
    for (name, bytes) in [
        ("empty.gguf", &[][..]),
        ("magic.gguf", b"not a model at all, but long enough to hold a header"),
        ("header.gguf", &whole[..20]),
        ("short.gguf", &whole[..whole.len() / 2]),
    ] {
        bench.write(name, bytes);
        let error = bench.fails(&["run", name, "-p", "x"]);
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_damaged_plan_is_an_error_that_says_what_to_do() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("x.plan")).unwrap();
    for manifest in ["", "{}", r#"{"plan_version": 999, "abi_version": 1}"#, "[1"] {
        bench.write("x.plan/plan.json", manifest);
        let error = bench.fails(&["inspect", "x.plan"]);
        assert!(error.contains("plan.json") && error.contains("tilec compile"), "{error}");
    }
}

#[test]
fn doctor_finds_the_machine() {
    let bench = Bench::new();
    let report: Value = serde_json::from_str(&bench.ok(&["doctor", "--json"])).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let verdict = |name: &str| {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        check["verdict"].as_str().unwrap().to_string()
    };
    assert_eq!((verdict("processor"), verdict("plan cache")), ("ok".into(), "ok".into()));
    for check in checks {
        assert!(check["verdict"] == "ok" || check["remedy"].is_string(), "{check}");
    }
    assert!(bench.ok(&["doctor"]).contains("read bandwidth"));
}

/// Everything that needs a compiler.
#[cfg(feature = "llvm")]
mod compiled {
    use super::*;
    use safetensors::SafeTensors;
    use std::io::Write;

    const TINY: &str = "hf/llama-gqa-tied";
    /// A tiny model with a tokenizer and a chat template.
    const CHAT: &str = "hf/qwen3-chat";

    #[test]
    fn levels_are_printed_and_nothing_is_written() {
        let bench = Bench::new();
        let graph = bench.ok(&["compile", &fixture(TINY), "--emit", "graph"]);
        assert!(graph.contains("rms_norm"), "{graph}");
        let both = bench.ok(&["compile", &fixture(TINY), "--emit", "stages", "--emit", "schedule"]);
        assert!(both.starts_with("stages ") && both.len() > graph.len(), "{both}");
        assert_eq!(std::fs::read_dir(bench.folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_plan_is_written_where_asked_and_inspected() {
        let bench = Bench::new();
        assert_eq!(
            bench.ok(&["compile", &fixture(TINY), "-o", "out/tiny.plan", "-t", "2"]),
            "out/tiny.plan\n"
        );
        bench.ok(&["compile", &fixture(TINY), "-q"]);
        assert!(bench.path("llama-gqa-tied.plan/plan.json").is_file());

        let inspect = ["inspect", "out/tiny.plan", "--bandwidth", "10"];
        let table = bench.ok(&inspect);
        assert!(
            table.contains("attn_norm") && table.contains("100.0 %") && table.contains("10.0 GB/s"),
            "{table}"
        );
        let report: Value = serde_json::from_str(&bench.ok(&[&inspect[..], &["--json"]].concat())).unwrap();
        let stages = report["stages"].as_array().unwrap();
        let shares: f64 = stages.iter().map(|stage| stage["share"].as_f64().unwrap()).sum();
        assert!((shares - 1.0).abs() < 1e-9, "{shares}");
        let bytes: f64 = stages
            .iter()
            .map(|stage| stage["runs"].as_f64().unwrap() * stage["bytes"].as_f64().unwrap())
            .sum();
        assert!((report["floor_s"].as_f64().unwrap() * 10e9 / bytes - 1.0).abs() < 1e-6);

        // What was fixed when the plan was compiled is not changed in silence.
        assert!(bench.fails(&["inspect", "out/tiny.plan", "--ctx-size", "8"]).contains("--ctx-size"));
        assert!(bench.fails(&["inspect", "out/tiny.plan", "-t", "1"]).contains("2 threads"));
        assert!(bench.fails(&["inspect", "out/tiny.plan", "--rows", "1000"]).contains("rows"));
        assert!(bench.fails(&["compile", "out/tiny.plan"]).contains("plan already"));
        // A folder that holds something else is not overwritten.
        bench.write("out/notes.txt", "mine");
        assert!(bench.fails(&["compile", &fixture(TINY), "-o", "out"]).contains("out"));
        assert!(bench.path("out/notes.txt").is_file());
    }

    #[test]
    fn a_mixture_of_experts_completes_code() {
        let bench = Bench::new();
        let model = fixture("../../examples/mimo-mini/model.yaml");
        let prompt = "def fibonacci(n):";
        let run = |threads: &str| {
            bench.ok(&["run", &model, "--prompt", prompt, "-n", "24", "--temp", "0", "-t", threads])
        };
        let (one, two) = (run("1"), run("2"));
        assert_eq!(one, two, "the number of threads changes the text");
        assert!(one.contains("return") || one.contains("\"\"\""), "{one:?} is no body of a function");
        let inspect = bench.ok(&["inspect", &model, "--bandwidth", "10", "--rows", "8"]);
        assert!(inspect.contains("experts mxfp4") && inspect.contains("Experts: 4 of 32 a row"), "{inspect}");
        // 32 experts, of which 8 rows that choose 4 each miss (7/8)^8.
        assert!(inspect.contains("21.0 of a layer are read"), "{inspect}");
    }

    #[test]
    fn experts_are_quantized_when_asked_and_what_it_cost_is_told() {
        let bench = Bench::new();
        let yaml = format!(
            "model: {{checkpoint: {}}}\nprecision: {{experts: mxfp4}}\nlimits: {{context: 64}}\n",
            fixture("hf/qwen3-moe")
        );
        bench.write("moe.yaml", yaml);
        let output = bench.run(&["logits", "moe.yaml", "--tokens", "1,2,3", "-o", "logits.safetensors"]);
        let stderr = text(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        assert!(stderr.contains("weights of experts from f32 to mxfp4: off by"), "{stderr}");
        bench.write(
            "wrong.yaml",
            format!("model: {{checkpoint: {}}}\nprecision: {{experts: mxfp4}}\n", fixture(TINY)),
        );
        let error = bench.fails(&["compile", "wrong.yaml"]);
        assert!(error.contains("precision.experts") && error.contains("no experts"), "{error}");
    }

    #[test]
    fn a_reader_that_leaves_early_is_no_error() {
        let bench = Bench::new();
        let mut command = bench.command(&["compile", &fixture(TINY), "--emit", "llvm"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(text(&output.stderr), "");
    }

    /// The f32 tensor `name`.
    fn values(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
        let (words, _) = file.tensor(name).unwrap().data().as_chunks::<4>();
        words.iter().map(|word| f32::from_le_bytes(*word)).collect()
    }

    /// Compares the logits of a fixture with transformers'.
    fn logits_agree(case: &str, options: &[&str], tolerance: f32) {
        let bench = Bench::new();
        let reference = std::fs::read(fixture(&format!("{case}/reference.safetensors"))).unwrap();
        let reference = SafeTensors::deserialize(&reference).unwrap();
        let mut lists: Vec<Vec<i64>> = Vec::new();
        while let Ok(ids) = reference.tensor(&format!("input_ids.{}", lists.len())) {
            let (words, _) = ids.data().as_chunks::<8>();
            lists.push(words.iter().map(|word| i64::from_le_bytes(*word)).collect());
        }
        assert!(lists.len() > 1);
        bench.write("tokens.json", serde_json::to_string(&lists).unwrap());
        let model = fixture(case);
        let args = ["logits", &model, "--tokens-file", "tokens.json", "-o", "out.safetensors"];
        bench.ok(&[&args[..], options].concat());
        let bytes = std::fs::read(bench.path("out.safetensors")).unwrap();
        let ours = SafeTensors::deserialize(&bytes).unwrap();
        for (number, list) in lists.iter().enumerate() {
            let name = format!("logits.{number}");
            let (ours, theirs) = (values(&ours, &name), values(&reference, &name));
            assert_eq!((ours.len(), theirs.len() % list.len()), (theirs.len(), 0));
            let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < tolerance, "{case} {options:?}, list {number}: {worst}");
        }
        let ids = ours.tensor("tokens.1").unwrap();
        assert_eq!(ids.shape(), [lists[1].len()]);
    }

    #[test]
    fn compiled_logits_are_those_of_transformers() {
        let exact = ["--activations", "f32", "--kv-cache-type", "f32"];
        logits_agree(TINY, &exact, 1e-3);
        logits_agree(TINY, &[&exact[..], &["--rows-per-step", "1"]].concat(), 1e-3);
    }

    #[test]
    fn interpreted_logits_are_those_of_transformers() {
        let exact = ["--activations", "f32", "--kv-cache-type", "f32"];
        logits_agree(TINY, &[&exact[..], &["--backend", "interpreter"]].concat(), 1e-3);
    }

    #[test]
    fn tokens_that_do_not_fit_are_refused() {
        let bench = Bench::new();
        let model = fixture(TINY);
        let logits = |tokens: &str| bench.fails(&["logits", &model, "--tokens", tokens, "-o", "out"]);
        assert!(logits("1,99999").contains("99999"));
        let many = vec!["1"; 5_000].join(",");
        assert!(logits(&many).contains("5000"));
        bench.write("bad.json", "[[1, -2]]");
        let error = bench.fails(&["logits", &model, "--tokens-file", "bad.json", "-o", "out"]);
        assert!(error.contains("bad.json"), "{error}");
    }

    #[test]
    fn a_checkpoint_runs_and_its_plan_is_kept() {
        let bench = Bench::new();
        let model = fixture(CHAT);
        let args = ["run", &model, "--prompt", "hello", "-n", "6", "--json"];
        let first = bench.run(&args);
        assert!(first.status.success(), "{}", text(&first.stderr));
        assert!(text(&first.stderr).contains("compiling"), "{}", text(&first.stderr));
        let second = bench.run(&args);
        assert!(!text(&second.stderr).contains("compiling"), "{}", text(&second.stderr));
        let [first, second] = [first, second].map(|output| {
            let mut report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert!(report["prompt_tokens"].as_u64().unwrap() > 1, "{report}");
            report["tokens"].take()
        });
        assert_eq!(first, second);
        assert!(!first.as_array().unwrap().is_empty() && first.as_array().unwrap().len() <= 6, "{first}");

        // The same text as it comes; a template makes a difference; statistics are not on stdout.
        let plain = bench.run(&["run", &model, "-p", "hello", "-n", "6", "--stats"]);
        assert!(plain.status.success() && plain.stdout.ends_with(b"\n"));
        assert!(text(&plain.stderr).contains("tokens/s"), "{}", text(&plain.stderr));
        let raw: Value = serde_json::from_str(&bench.ok(&[&args[..], &["--raw"]].concat())).unwrap();
        let templated: Value = serde_json::from_str(&bench.ok(&args)).unwrap();
        assert!(raw["prompt_tokens"].as_u64() < templated["prompt_tokens"].as_u64());
    }

    #[test]
    fn seeds_repeat_a_text() {
        let bench = Bench::new();
        let model = fixture(CHAT);
        let run = |seed: &str| {
            bench.ok(&["run", &model, "-p", "hello", "-n", "24", "--temp", "1.5", "--seed", seed, "--json"])
        };
        let tokens = |seed| serde_json::from_str::<Value>(&run(seed)).unwrap()["tokens"].take();
        assert_eq!(tokens("3"), tokens("3"));
        assert_ne!(tokens("3"), tokens("4"));
    }

    #[test]
    fn a_prompt_comes_from_a_file_or_stdin() {
        let bench = Bench::new();
        let model = fixture(CHAT);
        bench.write("prompt.txt", "hello\n");
        let from = |file: &str, stdin: Stdio| {
            let args = ["run", &model, "-f", file, "-n", "4"];
            let output = bench.command(&args).stdin(stdin).output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
            text(&output.stdout)
        };
        let expected = bench.ok(&["run", &model, "-p", "hello", "-n", "4"]);
        assert_eq!(from("prompt.txt", Stdio::null()), expected);
        let file = std::fs::File::open(bench.path("prompt.txt")).unwrap();
        assert_eq!(from("-", file.into()), expected);
        assert!(bench.fails(&["run", &model, "-f", "none.txt"]).contains("none.txt"));
    }

    #[test]
    fn a_chat_reads_a_pipe_and_forgets_on_reset() {
        let bench = Bench::new();
        let mut command = bench.command(&["chat", &fixture(CHAT), "-n", "5"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let turns = "hello\n\n/reset\nhello\n/exit\nnot read\n";
        child.stdin.take().unwrap().write_all(turns.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let alone = bench.ok(&["run", &fixture(CHAT), "-p", "hello", "-n", "5"]);
        assert_eq!(text(&output.stdout), format!("{alone}{alone}"));
    }

    #[test]
    fn a_model_without_a_tokenizer_says_so() {
        let bench = Bench::new();
        let error = bench.fails(&["run", &fixture(TINY), "-p", "hello"]);
        assert!(error.contains("tokenizer"), "{error}");
    }

    #[test]
    fn a_yaml_finds_its_files_beside_it() {
        let bench = Bench::new();
        let config = std::fs::read(format!("{}/config.json", fixture(TINY))).unwrap();
        std::fs::create_dir(bench.path("tiny")).unwrap();
        bench.write("tiny/config.json", config);
        bench.write(
            "tiny/model.yaml",
            "model: {synthetic: {seed: 1}, config: config.json}\nprecision: {weights: q8_0}\n\
             target: {threads: 2}\nlimits: {context: 32}\n",
        );
        let args = ["logits", "tiny/model.yaml", "--tokens", "1,2,3", "-o", "out.safetensors"];
        bench.ok(&args);
        let first = std::fs::read(bench.path("out.safetensors")).unwrap();
        bench.ok(&["compile", "tiny", "-o", "made.plan"]);
        bench.ok(&["logits", "made.plan", "--tokens", "1,2,3", "-o", "out.safetensors"]);
        assert!(first == std::fs::read(bench.path("out.safetensors")).unwrap());
    }

    #[test]
    fn a_plan_runs_on_a_checkpoint_that_moved() {
        let bench = Bench::new();
        std::fs::create_dir(bench.path("here")).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(format!("{}/{file}", fixture(TINY)), bench.path("here").join(file)).unwrap();
        }
        bench.ok(&["compile", "here", "-o", "x.plan"]);
        std::fs::rename(bench.path("here"), bench.path("there")).unwrap();
        let args = ["logits", "x.plan", "--tokens", "1,2", "-o", "out.safetensors"];
        assert!(bench.fails(&args).contains("here"));
        bench.ok(&[&args[..], &["--checkpoint", "there"]].concat());
        // Another model's weights do not fit.
        let other = fixture("hf/llama-bias-mha");
        bench.fails(&[&args[..], &["--checkpoint", &other]].concat());
    }

    #[test]
    fn bench_measures_what_was_asked() {
        let bench = Bench::new();
        let model = fixture(TINY);
        let args = ["bench", &model, "--threads", "1", "--pp", "12", "--tg", "5", "--repeats", "2"];
        let report: Value = serde_json::from_str(&bench.ok(&[&args[..], &["--json"]].concat())).unwrap();
        let samples = report["samples"].as_array().unwrap();
        assert_eq!(samples.len(), 2);
        for sample in samples {
            assert_eq!((&sample["prompt_tokens"], &sample["generated_tokens"]), (&12.into(), &5.into()));
            assert!(
                sample["prompt_s"].as_f64().unwrap() > 0.0 && sample["generate_s"].as_f64().unwrap() > 0.0
            );
        }
        let tests: Vec<&str> =
            report["tests"].as_array().unwrap().iter().map(|test| test["test"].as_str().unwrap()).collect();
        assert_eq!(tests, ["pp12", "tg5 @ d12"]);
        let table = bench.ok(&["bench", &model, "-t", "1", "-p", "0", "-n", "3", "-r", "1"]);
        assert!(table.contains("tg3 ") && table.contains("GB/s"), "{table}");
        assert!(bench.fails(&["bench", &model, "-p", "60000"]).contains("--ctx-size"));

        // Several sequences, each of another length.
        let args = ["bench", &model, "-t", "1", "-p", "0", "-n", "4", "-r", "2"];
        let args = [&args[..], &["--rows", "1,3", "--context", "1..40", "--sequences", "3"]].concat();
        let report: Value = serde_json::from_str(&bench.ok(&[&args[..], &["--json"]].concat())).unwrap();
        let tests = report["tests"].as_array().unwrap();
        assert_eq!(tests.len(), 2, "{report}");
        assert_eq!(tests[1]["lengths"], serde_json::json!([0, 38, 19]));
        assert_eq!((&tests[1]["context"], &tests[1]["tokens"]), (&"1..40".into(), &12.into()));
        assert_eq!(tests[1]["samples_s"].as_array().unwrap().len(), 2);
        assert!(bench.ok(&args).contains("| tg4 of 3 around 1..40 |"));
        assert!(bench.fails(&["bench", &model, "--rows", "65"]).contains("--sequences 65"));
    }

    #[test]
    fn a_profile_covers_every_stage() {
        let bench = Bench::new();
        let args = ["profile", &fixture(TINY), "-t", "2", "--context", "4", "-r", "2", "-o", "trace.json"];
        let report: Value = serde_json::from_str(&bench.ok(&[&args[..], &["--json"]].concat())).unwrap();
        let stages = report["stages"].as_array().unwrap();
        assert!(stages.iter().any(|stage| stage["stage"] == "attn"), "{report}");
        assert!(stages.iter().map(|stage| stage["work_s"].as_f64().unwrap()).sum::<f64>() > 0.0);
        let trace: Value = serde_json::from_slice(&std::fs::read(bench.path("trace.json")).unwrap()).unwrap();
        assert!(trace["traceEvents"].as_array().unwrap().len() > stages.len());
    }
}

/// A limit on the size of files fails a write in the middle, as a full disk does.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_partial_plan() {
    let bench = Bench::new();
    let model = fixture("hf/llama-gqa-tied");
    let limited = |plan: &Path| {
        // Signal 25 is SIGXFSZ: ignored, the write returns an error in its place.
        let script = "trap '' 25; ulimit -f 16; exec \"$0\" compile \"$1\" -o \"$2\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", script, env!("CARGO_BIN_EXE_tilec"), &model]).arg(plan);
        shell.current_dir(bench.folder.path()).env("TILEC_CACHE", bench.path("cache"));
        let output = shell.output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("kernel.ll") || stderr.contains("kernel.o"), "{stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    };
    let names = || {
        let entries = std::fs::read_dir(bench.folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.retain(|name| name != "cache");
        names.sort();
        names
    };
    limited(&bench.path("new.plan"));
    assert_eq!(names(), Vec::<std::ffi::OsString>::new());
    // What was there before stays as it was.
    bench.ok(&["compile", &model, "-o", "old.plan"]);
    let before = std::fs::read(bench.path("old.plan").join("plan.json")).unwrap();
    limited(&bench.path("old.plan"));
    assert_eq!(names(), ["old.plan"]);
    assert_eq!(std::fs::read(bench.path("old.plan").join("plan.json")).unwrap(), before);
}

/// The demo with its draft and without: the same tokens; and what became of the guesses.
#[cfg(feature = "llvm")]
#[test]
fn a_draft_changes_no_token() {
    let bench = Bench::new();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/mimo-mini/model.yaml");
    let model = model.to_str().unwrap();
    let run = |more: &[&str]| -> Value {
        let args = ["run", model, "-p", "def fibonacci(n):", "-n", "48", "--json"];
        serde_json::from_str(&bench.ok(&[&args[..], more].concat())).unwrap()
    };
    let plain = run(&["--no-draft"]);
    assert!(plain["draft"].is_null());
    let always = [&["--draft-min", "7"][..], &["--draft-max", "3", "--draft-min", "3"]];
    for (more, rows) in [(always[0], 8), (always[1], 4), (&["--draft-max", "3"], 4), (&[], 8)] {
        let drafted = run(more);
        assert_eq!((&drafted["tokens"], &drafted["text"]), (&plain["tokens"], &plain["text"]));
        let draft = &drafted["draft"];
        assert!(draft["blocks"].as_array().unwrap().len() < rows, "{draft}");
        if !more.contains(&"--draft-min") {
            // By what this machine's time says.
            assert!(draft["plain_tokens"].as_u64().unwrap() <= 48, "{draft}");
            continue;
        }
        assert_eq!(draft["mean_guesses"].as_f64(), Some(rows as f64 - 1.0), "{draft}");
        assert_eq!(draft["plain_tokens"].as_u64(), Some(0), "{draft}");
        assert!(draft["acceptance"].as_f64().unwrap() > 1.5, "{draft}");
        assert!(draft["histogram"].as_array().unwrap().len() <= rows, "{draft}");
    }
    // Nothing is drawn at temperature 0. At others what is drawn is verified.
    let drawing = ["--draft-min", "7", "--draft-sample-method", "probabilistic"];
    assert_eq!(run(&drawing)["tokens"], plain["tokens"]);
    let warm = ["--temperature", "1", "--seed", "6", "-n", "200"];
    let acceptance = |more: &[&str]| {
        let args = ["run", model, "-p", "def fibonacci(n):", "--json"];
        let found: Value = serde_json::from_str(&bench.ok(&[&args[..], &warm, more].concat())).unwrap();
        found["draft"]["acceptance"].as_f64().unwrap()
    };
    let (drawn, likeliest) = (acceptance(&drawing), acceptance(&drawing[..2]));
    println!("{drawn} tokens a round drawn, {likeliest} with the likeliest guesses");
    assert!(drawn > 1.5, "{drawn}");
    let error = bench.fails(&["run", model, "-p", "x", "--draft-max", "8"]);
    assert!(error.contains("--draft-max 8") && error.contains("at most 7"), "{error}");
    let error = bench.fails(&["run", model, "-p", "x", "--draft-min", "8"]);
    assert!(error.contains("--draft-min 8") && error.contains("at most 7"), "{error}");
    let error = bench.fails(&["run", model, "-p", "x", "--draft-min", "4", "--draft-max", "3"]);
    assert!(error.contains("--draft-min 4") && error.contains("--draft-max 3"), "{error}");
}

#[cfg(feature = "llvm")]
#[test]
fn bench_takes_guesses_as_right() {
    let bench = Bench::new();
    let (target, draft) = (fixture("dflash/target-llama"), fixture("dflash/sliding-both-ways"));
    let args = ["bench", &target, "--draft", &draft, "--pp", "8", "--tg", "24", "-r", "1", "-t", "1"];
    let json = bench.ok(&[&args[..], &["--accept", "3", "--json"]].concat());
    let report: Value = serde_json::from_str(&json).unwrap();
    let rounds = &report["draft"]["samples"][0];
    assert_eq!((rounds["rounds"].as_u64(), rounds["tokens"].as_u64()), (Some(8), Some(24)), "{report}");
    let none = bench.ok(&[&args[..], &["--no-draft"]].concat());
    assert!(!none.contains("draft of"), "{none}");
    assert!(bench.ok(&args).contains("draft of 8 rows, 4 accepted"));
    let error = bench.fails(&[&args[..], &["--accept", "9"]].concat());
    assert!(error.contains("--accept 9") && error.contains('8'), "{error}");
    let wrong = fixture("dflash/full");
    let error = bench.fails(&["bench", &target, "--draft", &wrong]);
    assert!(error.contains("num_target_layers") && error.contains("another model"), "{error}");

    // Weights that are made up, of both.
    for (from, to) in [(&target, "model"), (&draft, "draft")] {
        std::fs::create_dir(bench.path(to)).unwrap();
        std::fs::copy(Path::new(from).join("config.json"), bench.path(to).join("config.json")).unwrap();
    }
    let yaml = "model: {synthetic: {seed: 1}, config: model/config.json}\nlimits: {rows: 16, context: 64}\n";
    bench.write("made-up.yaml", yaml);
    let made_up =
        ["bench", "made-up.yaml", "--draft", "draft", "--pp", "8", "--tg", "24", "-r", "1", "-t", "1"];
    assert!(bench.ok(&made_up).contains("draft of 8 rows, 4 accepted"));
    // A checkpoint's draft has weights.
    let error = bench.fails(&["bench", &target, "--draft", "draft"]);
    assert!(error.contains("cannot read the draft") && error.contains("safetensors"), "{error}");
}
