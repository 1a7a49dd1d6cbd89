//! Logits of a given text.

use crate::engine::{Engine, RowInput, StepError};

/// Why a text cannot be scored.
#[derive(Debug, thiserror::Error)]
pub enum ScoreError<E: std::error::Error> {
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// What the receiver said.
    #[error(transparent)]
    Receiver(E),
}

/// Runs `tokens` through the engine as one sequence (number 0, forgotten before and after) and hands
/// `receive(position, logits)` the logits at every position, in order: those at a position predict
/// the token behind it.
///
/// A step has `chunk` rows, or as many as the plan allows if that is less. The logits do not depend
/// on it.
///
/// # Errors
/// A token or position past the plan's limits; an error of `receive`.
pub fn score<E: std::error::Error>(
    engine: &mut Engine,
    tokens: &[u32],
    chunk: usize,
    mut receive: impl FnMut(usize, &[f32]) -> Result<(), E>,
) -> Result<(), ScoreError<E>> {
    engine.reset(0);
    let chunk = chunk.min(engine.plan().limits.max_rows).min(engine.max_logit_rows()).max(1);
    let vocab = engine.plan().vocab;
    let mut position = 0;
    for tokens in tokens.chunks(chunk) {
        let rows: Vec<RowInput> = (position..)
            .zip(tokens)
            .map(|(position, token)| RowInput { token: *token, position: position as u32, sequence: 0 })
            .collect();
        let wanted: Vec<u32> = (0..rows.len() as u32).collect();
        let logits = engine.step(&rows, &wanted)?;
        for row in logits.chunks_exact(vocab) {
            receive(position, row).map_err(ScoreError::Receiver)?;
            position += 1;
        }
    }
    engine.reset(0);
    Ok(())
}
