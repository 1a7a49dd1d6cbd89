//! `tilec chat`.

use crate::args::ChatArgs;
use crate::ui;
use crate::writer::Writer;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, IsTerminal, Write};
use tilec_runtime::chat::Message;

/// Talks in turns, a line of stdin each.
pub fn run(args: &ChatArgs) -> Result<()> {
    let mut writer = Writer::open(&args.model, &args.weights, &args.draft)?;
    if !writer.text.has_template() {
        bail!("{} has no chat template: use `tilec run`, which continues a text", writer.plan().name);
    }
    let interactive = std::io::stdin().is_terminal();
    if interactive {
        ui::note(format!("{}: /reset forgets the conversation, /exit ends", writer.plan().name));
    }
    let opening: Vec<Message> =
        args.system.iter().map(|system| Message::new("system", system.as_str())).collect();
    let mut messages = opening.clone();
    let mut lines = std::io::stdin().lock().lines();
    let mut out = std::io::stdout().lock();
    loop {
        if interactive {
            eprint!("> ");
        }
        let Some(line) = lines.next() else { break };
        let line = line.context("cannot read stdin")?;
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/reset" => {
                messages.clone_from(&opening);
                ui::note("the conversation starts anew");
                continue;
            }
            command if command.split_whitespace().next() == Some("/draft") => {
                ui::note(set_draft(&writer, command));
                continue;
            }
            _ => messages.push(Message::new("user", line)),
        }
        let tokens = writer.text.conversation(&messages)?;
        let context = writer.plan().limits.context;
        if tokens.len() >= context {
            let problem = format!("the conversation has {} tokens, the context {context}", tokens.len());
            if !interactive {
                bail!("{problem}: a larger --ctx-size makes room for more");
            }
            messages.pop();
            ui::note(format!("{problem}: /reset starts anew, a larger --ctx-size makes room for more"));
            continue;
        }
        let written = writer.write(tokens, &args.sampling, Some(&mut out))?;
        writeln!(out)?;
        out.flush()?;
        if written.cut_short() {
            ui::note("note: the context is full; /reset starts anew");
        }
        if args.stats {
            eprint!("{}", writer.stats(&written));
        }
        messages.push(Message::new("assistant", written.text()));
    }
    Ok(())
}

/// `/draft N` and `/draft`: what is so from now on.
fn set_draft(writer: &Writer, command: &str) -> String {
    let guesses = match command.split_whitespace().nth(1).map(str::parse) {
        None => usize::MAX,
        Some(Ok(guesses)) => guesses,
        Some(Err(_)) => {
            return format!("{command}: /draft N lets the draft guess up to N tokens, /draft 0 none");
        }
    };
    writer.limit.set(guesses);
    match guesses {
        0 => "the draft guesses no more".to_string(),
        usize::MAX => "the draft guesses as many tokens at a time as it may".to_string(),
        _ => format!("the draft guesses up to {guesses} tokens at a time"),
    }
}
