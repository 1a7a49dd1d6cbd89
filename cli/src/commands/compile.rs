//! `tilec compile`.

use crate::args::CompileArgs;
use crate::source::{Model, Source};
use crate::ui;
use anyhow::{Result, bail};
use std::io::Write;
use std::path::PathBuf;

/// Compiles a model and writes its plan, or prints levels of it.
pub fn run(args: &CompileArgs) -> Result<()> {
    match Source::find(&args.model)? {
        Source::Plan(folder) => {
            bail!("{} is a plan already; `tilec inspect` shows it", folder.display())
        }
        Source::Model(model) => compile(args, *model),
    }
}

fn compile(args: &CompileArgs, mut model: Model) -> Result<()> {
    model.apply(&args.target);
    let compiled = model.compile()?;
    let mut out = std::io::stdout().lock();
    let mut printed = Vec::new();
    for level in &args.emit {
        if !printed.contains(level) {
            printed.push(*level);
            out.write_all(compiled.text(level.level()).as_bytes())?;
        }
    }
    if args.output.is_some() || args.emit.is_empty() {
        let folder = args.output.clone().unwrap_or_else(|| PathBuf::from(format!("{}.plan", model.name)));
        compiled.write(&folder)?;
        let plan = &compiled.plan;
        ui::note(format!(
            "compiled {} for {} ({} workers): {} of weights, {} stages -> {}",
            plan.title(),
            if plan.resident.is_some() { &plan.target.arch } else { &plan.target.cpu },
            plan.target.workers,
            ui::mib(plan.packing.bytes),
            plan.stages.len(),
            folder.display(),
        ));
        if !args.json && args.emit.is_empty() {
            writeln!(out, "{}", folder.display())?;
        }
    }
    if args.json {
        out.write_all(compiled.plan.to_json().as_bytes())?;
    }
    out.flush()?;
    Ok(())
}
