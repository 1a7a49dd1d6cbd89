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
