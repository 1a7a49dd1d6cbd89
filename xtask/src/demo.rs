//! `cargo xtask demo`: from a fresh machine to an answer, and to a text that is written with a draft and without.

use std::path::Path;
use std::process::Command;

use serde::Deserialize;

use crate::args::Args;
use crate::error::{Error, Result};
use crate::shell::{self, Parts};
use crate::{build, setup, wire};

/// Where `examples/mimo-mini` goes on from.
const CODE: &str = "def fibonacci(n):";

/// SmolLM2 answers; then mimo-mini goes on with a line of code, with its draft and without, on the processor and on a
/// GPU if there is one.
///
/// # Errors
/// On bad arguments, when a part fails, and when a text is another one without the draft.
pub fn main(mut args: Args) -> Result<()> {
    let prompt =
        args.text("--prompt")?.unwrap_or_else(|| "Explain why the sky is blue in two sentences.".into());
    let max_tokens = args.number("--max-tokens", 96usize, 1)?;
    let threads = args.number("--threads", 0usize, 1)?;
    args.finish()?;
    let mut parts = Parts::default();
    parts.run("set-up: LLVM 19", setup::llvm)?;
    parts.run("set-up: SmolLM2", setup::smollm2)?;
    let tilec = parts.run("build", build::tilec)?;
    let threads: Vec<String> = match threads {
        0 => Vec::new(),
        threads => vec!["--threads".into(), threads.to_string()],
    };
    let plan = setup::cache()?.join("smollm2-demo.plan");
    parts.run("compile", || {
        let mut compile = Command::new(&tilec);
        compile.arg("compile").arg(shell::workspace_root().join("examples/smollm2/model.yaml"));
        shell::run(compile.args(&threads).arg("--output").arg(&plan))
    })?;
    parts.run("answer", || {
        let mut run = Command::new(&tilec);
        run.arg("run").arg(&plan).arg("--prompt").arg(&prompt);
        run.args(["--max-tokens", &max_tokens.to_string(), "--temperature", "0", "--stats"]);
        shell::run(&mut run)
    })?;
    let mut devices = vec!["cpu"];
    if has_gpu(&tilec) {
        parts.run("set-up: NVRTC", setup::nvrtc)?;
        devices.push("cuda");
    }
    let mut rows = Vec::new();
    for device in devices {
        let threads = if device == "cpu" { &threads[..] } else { &[] };
        rows.extend(parts.run(&format!("mimo-mini on {device}"), || drafted(&tilec, device, threads))?);
    }
    eprintln!("\n{}", table(&rows));
    eprint!("{}", parts.table());
    Ok(())
}

/// Whether the driver shows a GPU.
fn has_gpu(tilec: &Path) -> bool {
    // Its verdict on the machine is no matter here.
    let doctor = Command::new(tilec).args(["doctor", "--json"]).output();
    let text = doctor.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let checks = wire::parse::<Doctor>(&text, "tilec doctor").map_or(Vec::new(), |doctor| doctor.checks);
    checks.iter().any(|check| check.name == "NVIDIA GPU" && check.verdict == "ok")
}

#[derive(Deserialize)]
struct Doctor {
    checks: Vec<Check>,
}

#[derive(Deserialize)]
struct Check {
    name: String,
    verdict: String,
}

/// What `tilec run --json` prints of a text.
#[derive(Clone, Debug, Deserialize)]
struct Written {
    text: String,
    tokens: Vec<u32>,
    decode_tokens_per_s: Option<f64>,
    draft: Option<Drafted>,
}

#[derive(Clone, Debug, Deserialize)]
struct Drafted {
    rounds: u64,
    tokens_per_round: Option<f64>,
}

/// A line of the table.
struct Row {
    device: &'static str,
    what: &'static str,
    written: Written,
}

/// Writes the text on a device: with the draft as it guesses by default, with whole blocks every time, and without.
fn drafted(tilec: &Path, device: &'static str, threads: &[String]) -> Result<Vec<Row>> {
    let write = |options: &[&str]| -> Result<Written> {
        let mut run = Command::new(tilec);
        run.arg("run").arg(shell::workspace_root().join("examples/mimo-mini/model.yaml"));
        run.args([
            "--device",
            device,
            "--prompt",
            CODE,
            "--max-tokens",
            "128",
            "--temperature",
            "0",
            "--json",
        ]);
        let text = shell::output(run.args(threads).args(options))?;
        wire::parse(&text, "tilec run")
    };
    // A model that was never run is compiled and packed first.
    write(&[])?;
    let ways: [(&str, &[&str]); 3] =
        [("draft", &[]), ("draft, whole blocks", &["--draft-min", "7"]), ("no draft", &["--no-draft"])];
    let mut rows = Vec::new();
    for (what, options) in ways {
        rows.push(Row { device, what, written: write(options)? });
    }
    eprintln!("{CODE}{}\n", rows[0].written.text);
    check(&rows)?;
    Ok(rows)
}

/// The same text however it was written, with guesses where there is a draft and without where there is none.
fn check(rows: &[Row]) -> Result<()> {
    for row in rows {
        if row.written.tokens != rows[0].written.tokens {
            return Err(Error::new(format!(
                "on {}, the text by `{}` is not that by `{}`: {:?}",
                row.device, row.what, rows[0].what, row.written.text
            )));
        }
        let rounds = row.written.draft.as_ref().map_or(0, |draft| draft.rounds);
        let whole = row.what.contains("whole");
        if whole && rounds == 0 || row.what == "no draft" && rounds != 0 {
            return Err(Error::new(format!(
                "on {}, `{}` had {rounds} rounds of a draft",
                row.device, row.what
            )));
        }
    }
    Ok(())
}

/// Speeds of all texts.
fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<8} {:<22} {:>10} {:>8} {:>16}\n",
        "device", "mimo-mini", "tokens/s", "rounds", "tokens a round"
    );
    for Row { device, what, written } in rows {
        let number =
            |value: Option<f64>, digits| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        let draft = written.draft.as_ref().filter(|draft| draft.rounds > 0);
        text.push_str(&format!(
            "{device:<8} {what:<22} {:>10} {:>8} {:>16}\n",
            number(written.decode_tokens_per_s, 1),
            draft.map_or("-".into(), |draft| draft.rounds.to_string()),
            number(draft.and_then(|draft| draft.tokens_per_round), 2),
        ));
    }
    text.push_str(
        "On each device the text is the same in all lines. Over 96 prompts PyTorch's loop adds 4.04 tokens a round:\n\
         examples/mimo-mini/compare_loop.py compares all of its 4,248 rounds.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(what: &'static str, tokens: &[u32], rounds: Option<u64>) -> Row {
        let draft = rounds.map(|rounds| Drafted { rounds, tokens_per_round: Some(4.25) });
        let written =
            Written { text: "x".into(), tokens: tokens.to_vec(), decode_tokens_per_s: Some(123.45), draft };
        Row { device: "cpu", what, written }
    }

    #[test]
    fn texts_that_differ_and_drafts_that_do_nothing_are_errors() {
        let good = || vec![row("draft", &[1, 2], Some(3)), row("draft, whole blocks", &[1, 2], Some(2))];
        let with = |last: Row| good().into_iter().chain([last]).collect::<Vec<_>>();
        check(&with(row("no draft", &[1, 2], None))).unwrap();
        assert!(
            check(&with(row("no draft", &[1, 3], None))).unwrap_err().to_string().contains("not that by")
        );
        assert!(
            check(&with(row("no draft", &[1, 2], Some(4)))).unwrap_err().to_string().contains("4 rounds")
        );
        let idle = [row("draft, whole blocks", &[1, 2], None)];
        assert!(check(&idle).unwrap_err().to_string().contains("0 rounds"));
    }

    #[test]
    fn the_table_has_speeds_and_acceptance() {
        let text = table(&[row("draft", &[1], Some(30)), row("no draft", &[1], None)]);
        let cells = |line: usize| text.lines().nth(line).unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(cells(1), ["cpu", "draft", "123.5", "30", "4.25"]);
        assert_eq!(cells(2), ["cpu", "no", "draft", "123.5", "-", "-"]);
    }

    #[test]
    fn what_tilec_prints_is_read() {
        let text = r#"{"text": "a", "tokens": [1], "finish": "length", "decode_tokens_per_s": 5.5,
            "draft": {"rounds": 2, "tokens_per_round": 3.5, "histogram": [1]}}"#;
        let written: Written = wire::parse(text, "tilec run").unwrap();
        assert_eq!(written.draft.unwrap().tokens_per_round, Some(3.5));
        let none: Written = wire::parse(
            &text.replace(&text[text.find("{\"rounds").unwrap()..text.len() - 1], "null"),
            "tilec run",
        )
        .unwrap();
        assert!(none.draft.is_none());
    }
}
