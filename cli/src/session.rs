//! One sequence on a loaded plan.

use crate::args::WeightsArgs;
use crate::{source, ui};
use anyhow::Result;
use std::ops::Deref;
use std::path::Path;
use tilec_ir::plan::Plan;
use tilec_runtime::engine::{Engine, EngineOptions, RowInput};

/// The sequence of a plan that commands use.
const SEQUENCE: u32 = 0;

/// Loads a plan, with its draft if it has one and it is wanted, and a progress bar while its weights are
/// packed. Packed weights are kept in the
/// cache folder.
///
/// # Errors
/// When the plan or its weights cannot be read, or this machine cannot run it.
pub fn load(folder: &Path, weights: &WeightsArgs, profile: bool, draft: bool) -> Result<Engine> {
    let options = EngineOptions {
        cache_dir: Some(source::cache_folder()?.join("packed")),
        checkpoint: weights.checkpoint.clone(),
        profile,
        draft,
        ..EngineOptions::default()
    };
    let progress = ui::byte_progress("packing weights", 0);
    let engine = Engine::load(folder, &options, &mut |done, total| {
        progress.set_length(total);
        progress.set_position(done);
    });
    progress.finish_and_clear();
    let engine = engine?;
    if let Some(shard) = engine.plan().shard {
        ui::note(format!(
            "note: this is {shard}, without its peers: what it takes is measured, what it says means nothing"
        ));
    }
    for conversion in engine.conversions() {
        ui::note(format!("packed {conversion}"));
    }
    Ok(engine)
}

/// A loaded plan and how far its one sequence is.
pub struct Session {
    engine: Engine,
    /// Tokens that were fed and not forgotten.
    length: usize,
    rows: Vec<RowInput>,
    logit_rows: Vec<u32>,
}

impl Session {
    /// Loads a plan.
    ///
    /// # Errors
    /// As [`load`].
    pub fn open(folder: &Path, weights: &WeightsArgs) -> Result<Session> {
        Ok(Session::new(load(folder, weights, false, false)?))
    }

    /// An empty sequence on an engine.
    pub fn new(engine: Engine) -> Session {
        Session { engine, length: 0, rows: Vec::new(), logit_rows: Vec::new() }
    }

    /// A session with the plan's draft loaded, if it has one and it is wanted.
    ///
    /// # Errors
    /// As [`load`].
    pub fn open_with_draft(folder: &Path, weights: &WeightsArgs, draft: bool) -> Result<Session> {
        Ok(Session::new(load(folder, weights, false, draft)?))
    }

    /// The engine, to run steps that the session knows nothing of: reset it behind them.
    pub fn engine_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Forgets everything that was fed.
    pub fn reset(&mut self) {
        self.engine.reset(SEQUENCE as usize);
        self.length = 0;
    }

    /// Forgets all but the first `length` tokens.
    pub fn rewind(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Appends tokens, in steps as large as the plan allows, and returns the logits behind the last,
    /// `[vocab]`; none for no tokens.
    ///
    /// # Errors
    /// When a step is refused or fails.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        let max_rows = self.plan().limits.max_rows;
        let head = tokens.len().saturating_sub(1) / max_rows * max_rows;
        for step in tokens[..head].chunks(max_rows) {
            self.step(step, 0)?;
        }
        match &tokens[head..] {
            [] => Ok(&[]),
            last => self.step(last, 1),
        }
    }

    /// Appends tokens in one step and returns the logits behind each, `[tokens][vocab]`.
    ///
    /// # Errors
    /// When the step is refused or fails.
    pub fn score(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.step(tokens, tokens.len())
    }

    /// Appends tokens in one step and returns the logits behind the last `wanted` of them.
    fn step(&mut self, tokens: &[u32], wanted: usize) -> Result<&[f32]> {
        let row = |(token, position): (&u32, u32)| RowInput { token: *token, position, sequence: SEQUENCE };
        self.rows.clear();
        self.rows.extend(tokens.iter().zip(self.length as u32..).map(row));
        self.logit_rows.clear();
        self.logit_rows.extend((tokens.len() - wanted.min(tokens.len())) as u32..tokens.len() as u32);
        let logits = self.engine.step(&self.rows, &self.logit_rows)?;
        self.length += tokens.len();
        Ok(logits)
    }
}

impl Deref for Session {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

/// The most rows whose logits one step of a plan can return.
pub fn max_logit_rows(plan: &Plan) -> usize {
    plan.buffers.get(plan.logits).map_or(1, |logits| logits.rows).min(plan.limits.max_rows)
}
