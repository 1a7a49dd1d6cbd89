//! The graphs of all ranks in lock step: what several devices would compute together.

use super::{InterpError, Interpreter, Row, WeightSource};
use crate::graph::Graph;

/// Interprets the graphs of all ranks of a model side by side, and sums at every
/// [`Op::AllReduce`](crate::graph::Op::AllReduce).
pub struct Ranks<'a> {
    ranks: Vec<Interpreter<'a>>,
}

impl<'a> Ranks<'a> {
    /// Verifies the graphs, one a rank, and reads their weights, each from a source of its own.
    ///
    /// # Errors
    /// As [`Interpreter::new`]; [`InterpError::Ranks`] when there is no rank, or not a source for each.
    pub fn new(graphs: &'a [Graph], sources: &[&'a dyn WeightSource]) -> Result<Self, InterpError> {
        if graphs.is_empty() || graphs.len() != sources.len() {
            let what = format!("{} graphs with {} sources of weights", graphs.len(), sources.len());
            return Err(InterpError::Ranks(what));
        }
        let ranks = graphs.iter().zip(sources).map(|(graph, source)| Interpreter::new(graph, *source));
        Ok(Ranks { ranks: ranks.collect::<Result<_, _>>()? })
    }

    /// Runs one step on every rank and returns the logits of the `wanted` rows, those of all ranks side
    /// by side: `[wanted.len(), vocabulary]`.
    ///
    /// # Errors
    /// As [`Interpreter::step`]; [`InterpError::Ranks`] when the ranks do not meet at the same sums.
    pub fn step(&mut self, rows: &[Row], wanted: &[usize]) -> Result<Vec<f32>, InterpError> {
        let mut runs = Vec::with_capacity(self.ranks.len());
        for rank in &mut self.ranks {
            runs.push(rank.begin(rows, wanted)?);
        }
        loop {
            let mut at = Vec::with_capacity(runs.len());
            for (rank, run) in self.ranks.iter_mut().zip(&mut runs) {
                at.push(rank.advance(run, rows, wanted, &mut |_, _| {}));
            }
            let names: Vec<Option<&str>> = std::iter::zip(&self.ranks, &at)
                .map(|(rank, id)| id.map(|id| rank.graph.node(id).name.as_str()))
                .collect();
            if names.iter().any(|name| *name != names[0]) {
                return Err(InterpError::Ranks(format!("{names:?}")));
            }
            let Some(at) = at.into_iter().collect::<Option<Vec<_>>>() else { break };
            let mut sums: Vec<f64> = Vec::new();
            for (run, id) in runs.iter().zip(&at) {
                let part = &run.values[id];
                sums.resize(part.len(), 0.0);
                sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(*part));
            }
            for (run, id) in runs.iter_mut().zip(at) {
                run.values.insert(id, sums.iter().map(|sum| *sum as f32).collect());
            }
        }
        self.ranks.iter_mut().for_each(|rank| rank.finish(rows));
        let mut logits = Vec::new();
        for row in 0..wanted.len() {
            for run in &runs {
                let cols = run.logits.len() / wanted.len();
                logits.extend_from_slice(&run.logits[row * cols..][..cols]);
            }
        }
        Ok(logits)
    }
}
