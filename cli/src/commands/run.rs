//! `tilec run`.

use crate::args::RunArgs;
use crate::ui;
use crate::writer::Writer;
use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::path::Path;
use tilec_runtime::chat::Message;

/// Generates behind one prompt.
pub fn run(args: &RunArgs) -> Result<()> {
    let prompt = match (&args.prompt, &args.file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => read(file)?,
        (None, None) => String::new(),
    };
    let mut writer = Writer::open(&args.model, &args.weights, &args.draft)?;
    let templated = !args.raw && writer.text.has_template();
    let tokens = if templated {
        let system = args.system.iter().map(|system| Message::new("system", system));
        writer.text.conversation(&system.chain([Message::new("user", prompt)]).collect::<Vec<_>>())?
    } else {
        if args.system.is_some() {
            ui::note("note: the checkpoint has no chat template, so --system is put before the prompt");
        }
        let system = args.system.as_ref().map_or(String::new(), |system| format!("{system}\n\n"));
        writer.text.plain(&format!("{system}{prompt}"))?
    };
    let mut out = std::io::stdout().lock();
    let written = writer.write(tokens, &args.sampling, (!args.json).then_some(&mut out))?;
    if args.json {
        writeln!(out, "{:#}", writer.json(&written))?;
    } else {
        writeln!(out)?;
    }
    if written.cut_short() {
        ui::note("note: the context is full; --ctx-size makes room for more");
    }
    if args.stats {
        eprint!("\n{}", writer.stats(&written));
    }
    Ok(())
}

/// The text of a file without its last line break; `-` is stdin.
fn read(file: &Path) -> Result<String> {
    let mut text = String::new();
    if file.as_os_str() == "-" {
        std::io::stdin().lock().read_to_string(&mut text).context("cannot read stdin")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    let end = text.trim_end_matches(['\r', '\n']).len();
    text.truncate(end);
    Ok(text)
}
