//! The reference interpreter: what a graph means, in plain loops.
//!
//! It is the oracle that the backends are compared with, so it is written to be checked by reading,
//! not to be fast. Values between operators are float32; inside an operator sums are float64, so that
//! its own rounding is far below that of what it judges. The numbers of a row do not depend on the
//! other rows of the step.

mod ranks;

pub use ranks::Ranks;

use super::{
    ActivationFn, Cache, Dim, EXPERT, Graph, GraphError, Node, NodeId, Op, RopeSpec, Router, Scoring, Slice,
    Weight, verify,
};
use crate::abi::KvType;
use crate::format::ACT_BLOCK;
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Where the interpreter's weights come from.
pub trait WeightSource {
    /// The tensor of this checkpoint name as float32, row-major (`[out, in]` for a matrix).
    ///
    /// To model a precision pass, give the weights as they are after requantization.
    ///
    /// # Errors
    /// In words, when there is no such tensor or it cannot be read.
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String>;
}

/// Weights in memory, by name.
impl WeightSource for BTreeMap<String, Vec<f32>> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        match self.get(name) {
            Some(values) => Ok(Cow::Borrowed(values)),
            None => Err("there is no such tensor".into()),
        }
    }
}

/// One row of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Token id.
    pub token: u32,
    /// Position in the sequence, from 0.
    pub position: usize,
    /// Which sequence; a new number starts an empty one.
    pub sequence: u32,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum InterpError {
    /// The graph does not pass [`verify`].
    #[error("the graph is not valid: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Graph(Vec<GraphError>),
    /// A weight is missing or has another size.
    #[error("weight {name:?}: {what}")]
    Weight {
        /// Name in the checkpoint.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// A row of the step makes no sense.
    #[error("row {row}: {what}")]
    Row {
        /// Number of the row in the step.
        row: usize,
        /// What is wrong with it.
        what: String,
    },
    /// The graphs of several ranks do not sum the same values in the same order.
    #[error("the ranks do not meet: they are at {0}")]
    Ranks(String),
    /// The wanted logits make no sense.
    #[error("wanted logits {wanted:?} of {rows} rows: name rows of the step, ascending")]
    Logits {
        /// What was asked for.
        wanted: Vec<usize>,
        /// Rows of the step.
        rows: usize,
    },
}

/// Keys and values of one sequence in one cache: `[positions, kv_heads * dim]`.
#[derive(Clone, Debug, Default)]
struct History {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// State of one sequence.
#[derive(Clone, Debug)]
struct Sequence {
    /// Positions written.
    len: usize,
    /// One per cache of the graph.
    caches: Vec<History>,
}

/// A step that is being run.
struct Run {
    /// Number in the order of the operator that comes next.
    next: usize,
    /// Users of each value that have not run.
    users: BTreeMap<NodeId, usize>,
    /// Values that are still to be read.
    values: BTreeMap<NodeId, Vec<f32>>,
    logits: Vec<f32>,
}

/// Executes a graph step by step, with the KV cache of every sequence.
pub struct Interpreter<'a> {
    graph: &'a Graph,
    order: Vec<NodeId>,
    weights: BTreeMap<&'a str, Cow<'a, [f32]>>,
    sequences: BTreeMap<u32, Sequence>,
    /// What [`Op::Input`] gives.
    input: Vec<f32>,
}

impl<'a> Interpreter<'a> {
    /// Verifies the graph and reads its weights.
    ///
    /// # Errors
    /// When the graph is not valid, or a weight is missing or not of the declared size.
    pub fn new(graph: &'a Graph, source: &'a dyn WeightSource) -> Result<Self, InterpError> {
        verify(graph).map_err(InterpError::Graph)?;
        let order = graph.topological().map_err(|error| InterpError::Graph(vec![error]))?;
        let mut weights = BTreeMap::new();
        for (name, weight) in &graph.weights {
            let values = read(source, name, weight)
                .map_err(|what| InterpError::Weight { name: name.clone(), what })?;
            weights.insert(name.as_str(), values);
        }
        Ok(Interpreter { graph, order, weights, sequences: BTreeMap::new(), input: Vec::new() })
    }

    /// Positions that a sequence holds; 0 for one that was never seen.
    pub fn positions(&self, sequence: u32) -> usize {
        self.sequences.get(&sequence).map_or(0, |sequence| sequence.len)
    }

    /// Hands over what [`Op::Input`] gives in the steps from now on: `[rows, cols]`, row-major.
    pub fn set_input(&mut self, values: &[f32]) {
        self.input = values.to_vec();
    }

    /// Exchanges the caches of all sequences with another interpreter, whose graph has caches of the
    /// same shapes: two graphs that work on one cache take turns with it.
    ///
    /// # Errors
    /// In words, when the caches differ.
    pub fn exchange_caches(&mut self, other: &mut Interpreter<'_>) -> Result<(), String> {
        if self.graph.caches != other.graph.caches {
            return Err(format!("{} and {} have other caches", self.graph.name, other.graph.name));
        }
        std::mem::swap(&mut self.sequences, &mut other.sequences);
        Ok(())
    }

    /// Drops the positions of a sequence from `len` on.
    pub fn truncate(&mut self, sequence: u32, len: usize) {
        if let Some(sequence) = self.sequences.get_mut(&sequence) {
            sequence.len = sequence.len.min(len);
        }
    }

    /// Runs one step and returns the logits of the `wanted` rows, `[wanted.len(), vocabulary]`.
    ///
    /// Rows of a sequence are adjacent and at consecutive positions. They may start before the
    /// sequence's end: what follows is then forgotten, as when drafted tokens are rejected.
    ///
    /// # Errors
    /// When a token, a position or a wanted row makes no sense; the state is then as before.
    pub fn step(&mut self, rows: &[Row], wanted: &[usize]) -> Result<Vec<f32>, InterpError> {
        self.step_observed(rows, wanted, &mut |_, _| {})
    }

    /// [`Interpreter::step`] that shows every value to `observe` as it is computed, row-major, in
    /// topological order: to find the operator in which a backend departs. Quantized values are shown
    /// as the float32 that they stand for, routes as number and weight in turn; an [`Op::KvWrite`] has no values.
    ///
    /// # Errors
    /// As for [`Interpreter::step`].
    pub fn step_observed(
        &mut self,
        rows: &[Row],
        wanted: &[usize],
        observe: &mut dyn FnMut(&Node, &[f32]),
    ) -> Result<Vec<f32>, InterpError> {
        let mut run = self.begin(rows, wanted)?;
        while self.advance(&mut run, rows, wanted, observe).is_some() {}
        self.finish(rows);
        Ok(run.logits)
    }

    /// Checks a step and enters its sequences.
    fn begin(&mut self, rows: &[Row], wanted: &[usize]) -> Result<Run, InterpError> {
        self.check_rows(rows)?;
        for node in self.graph.nodes.node_weights() {
            if let Op::Input { cols } = node.op
                && self.input.len() != cols * rows.len()
            {
                let (have, rows) = (self.input.len(), rows.len());
                let what = format!("{have} input values are not {rows} rows of {cols}");
                return Err(InterpError::Row { row: 0, what });
            }
        }
        if wanted.iter().any(|row| *row >= rows.len()) || !wanted.is_sorted_by(|a, b| a < b) {
            return Err(InterpError::Logits { wanted: wanted.to_vec(), rows: rows.len() });
        }
        for row in rows {
            self.sequences.entry(row.sequence).or_insert_with(|| Sequence {
                len: 0,
                caches: vec![History::default(); self.graph.caches.len()],
            });
        }

        let users = self.order.iter().map(|id| (*id, self.graph.users(*id).len())).collect();
        Ok(Run { next: 0, users, values: BTreeMap::new(), logits: Vec::new() })
    }

    /// Runs up to the next sum over ranks and gives its node, whose value is this rank's part; `None`
    /// behind the last operator.
    fn advance(
        &mut self,
        run: &mut Run,
        rows: &[Row],
        wanted: &[usize],
        observe: &mut dyn FnMut(&Node, &[f32]),
    ) -> Option<NodeId> {
        while let Some(id) = self.order.get(run.next).copied() {
            run.next += 1;
            let operands = self.graph.operands(id);
            let inputs: Vec<&[f32]> = operands.iter().map(|operand| run.values[operand].as_slice()).collect();
            let value = self.evaluate(id, &inputs, rows, wanted);
            observe(self.graph.node(id), &value);
            for operand in operands {
                let left = run.users.get_mut(&operand).expect("every node is counted");
                *left -= 1;
                if *left == 0 {
                    run.values.remove(&operand);
                }
            }
            match self.graph.node(id).op {
                Op::Logits => {
                    run.logits.clone_from(&value);
                    run.values.insert(id, value);
                }
                Op::Taps | Op::PairScores { .. } => {}
                _ => drop(run.values.insert(id, value)),
            }
            if matches!(self.graph.node(id).op, Op::AllReduce { .. }) {
                return Some(id);
            }
        }
        None
    }

    /// Counts the positions that a step has written.
    fn finish(&mut self, rows: &[Row]) {
        for row in rows {
            self.sequences.get_mut(&row.sequence).expect("entered by the step").len = row.position + 1;
        }
    }

    fn check_rows(&self, rows: &[Row]) -> Result<(), InterpError> {
        let vocab = self.graph.nodes.node_weights().filter_map(|node| match &node.op {
            Op::Embed { weight } => Some(self.graph.weights[weight].shape[0]),
            _ => None,
        });
        let vocab = vocab.min().unwrap_or(usize::MAX);
        if rows.is_empty() {
            return Err(InterpError::Row { row: 0, what: "a step needs at least one row".into() });
        }
        // The position that the sequence's next row must have.
        let mut next: BTreeMap<u32, usize> = BTreeMap::new();
        for (number, row) in rows.iter().enumerate() {
            let fail = |what| Err(InterpError::Row { row: number, what });
            if row.token as usize >= vocab {
                return fail(format!("token {} of a vocabulary of {vocab}", row.token));
            }
            match next.get(&row.sequence) {
                None if row.position > self.positions(row.sequence) => {
                    return fail(format!(
                        "position {} of sequence {} leaves a gap behind its {} positions",
                        row.position,
                        row.sequence,
                        self.positions(row.sequence)
                    ));
                }
                Some(position) if *position != row.position => {
                    return fail(format!("position {} where {position} comes next", row.position));
                }
                Some(_) if rows[number - 1].sequence != row.sequence => {
                    return fail(format!("rows of sequence {} are not adjacent", row.sequence));
                }
                _ => next.insert(row.sequence, row.position.saturating_add(1)),
            };
        }
        Ok(())
    }

    /// The value of one operator. The graph is verified, so shapes are what the loops expect.
    fn evaluate(&mut self, id: NodeId, inputs: &[&[f32]], rows: &[Row], wanted: &[usize]) -> Vec<f32> {
        let node = self.graph.node(id);
        let cols = node.ty.cols;
        match &node.op {
            Op::Embed { weight } => {
                let table = &self.weights[weight.as_str()];
                rows.iter().flat_map(|row| &table[row.token as usize * cols..][..cols]).copied().collect()
            }
            Op::Replace { weight, token } => {
                let vector = &self.weights[weight.as_str()];
                let pairs = rows.iter().zip(inputs[0].chunks_exact(cols));
                pairs
                    .flat_map(|(row, x)| if row.token == *token { &vector[..] } else { x })
                    .copied()
                    .collect()
            }
            Op::Input { .. } => self.input.clone(),
            Op::RmsNorm { weight, eps } => rms_norm(inputs[0], &self.weights[weight.as_str()], *eps),
            Op::Linear { weight } => {
                let count = match node.ty.rows {
                    Dim::Rows => rows.len(),
                    Dim::LogitRows => wanted.len(),
                    Dim::Const(n) => n,
                };
                linear(inputs[0], &self.weights[weight.as_str()], count, cols)
            }
            Op::Bias { weight } => {
                let bias = self.weights[weight.as_str()].iter().cycle();
                inputs[0].iter().zip(bias).map(|(x, b)| x + b).collect()
            }
            Op::Scale { factor } => inputs[0].iter().map(|x| x * factor).collect(),
            Op::Rope { rope, head_dim } => rotate(inputs[0], &self.graph.ropes[rope], *head_dim, cols, rows),
            Op::KvWrite { cache } => {
                self.write(*cache, inputs[0], inputs[1], rows);
                Vec::new()
            }
            Op::Attention { cache, heads, scale, window, sinks, bidirectional } => {
                let sinks = sinks.as_ref().map(|sinks| self.weights[sinks.as_str()].as_ref());
                let shape = &self.graph.caches[*cache];
                let queries = inputs[0].chunks_exact(heads * shape.qk_dim);
                let step_end = |sequence: u32| {
                    let own = rows.iter().filter(|row| row.sequence == sequence);
                    own.map(|row| row.position + 1).max().unwrap_or(0)
                };
                rows.iter()
                    .zip(queries)
                    .flat_map(|(row, query)| {
                        let history = &self.sequences[&row.sequence].caches[*cache];
                        let first = window.map_or(0, |window| (row.position + 1).saturating_sub(window));
                        let end = match (bidirectional, window) {
                            (false, _) => row.position + 1,
                            (true, None) => step_end(row.sequence),
                            (true, Some(window)) => step_end(row.sequence).min(row.position + window),
                        };
                        attend(query, history, shape, *heads, *scale, sinks, first..end)
                    })
                    .collect()
            }
            Op::DynamicConv { weight, side, group } => {
                let base = &self.weights[weight.as_str()][side * 2 * cols..][..2 * cols];
                let groups = cols / group;
                let mut out = Vec::with_capacity(rows.len() * cols);
                for row in 0..rows.len() {
                    let own = &inputs[1][row * 4 * groups + side * 2 * groups..][..2 * groups];
                    let x = &inputs[0][row * cols..][..cols];
                    let follows = row > 0 && rows[row - 1].sequence == rows[row].sequence;
                    let before = follows.then(|| &inputs[0][(row - 1) * cols..][..cols]);
                    out.extend((0..cols).map(|col| {
                        let tap = |tap: usize| {
                            f64::from(base[tap * cols + col]) + f64::from(own[tap * groups + col / group])
                        };
                        let before = before.map_or(0.0, |before| tap(1) * f64::from(before[col]));
                        (tap(0) * f64::from(x[col]) + before) as f32
                    }));
                }
                out
            }
            Op::TopK { k, factor, softcap } => {
                let width = self.graph.node(self.graph.operands(id)[0]).ty.cols;
                let logits = inputs[0].chunks_exact(width);
                logits.flat_map(|row| candidates(row, *k, *factor, *softcap)).collect()
            }
            Op::PairScores { predecessor, successor } => {
                let k = self.graph.node(self.graph.operands(id)[0]).ty.cols;
                let rank = self.graph.weights[predecessor].shape[1];
                let before = &self.weights[predecessor.as_str()];
                let behind = &self.weights[successor.as_str()];
                let mut out = Vec::with_capacity(wanted.len() * k * k);
                for (number, row) in wanted.iter().enumerate() {
                    let own = &inputs[0][number * k * 2..][..k * 2];
                    let h = &inputs[1][number * rank..][..rank];
                    let last = match row.checked_sub(1) {
                        Some(last) if rows[last].sequence == rows[*row].sequence => last,
                        _ => *row,
                    };
                    let chosen = number.checked_sub(1).filter(|chosen| wanted[*chosen] == last);
                    for a in 0..k {
                        let token = match chosen {
                            Some(chosen) => inputs[0][(chosen * k + a) * 2] as usize,
                            None => rows[last].token as usize,
                        };
                        let left = &before[token * rank..][..rank];
                        out.extend(own.chunks_exact(2).map(|candidate| {
                            let right = &behind[candidate[0] as usize * rank..][..rank];
                            let terms = left.iter().zip(h).zip(right);
                            let sum: f64 = terms
                                .map(|((left, h), right)| {
                                    f64::from(*left) * f64::from(*h) * f64::from(*right)
                                })
                                .sum();
                            (f64::from(candidate[1]) + sum) as f32
                        }));
                    }
                }
                out
            }
            Op::Gated { activation } => {
                let pairs = inputs[0].iter().zip(inputs[1]);
                pairs.map(|(gate, up)| gated(*activation, f64::from(*gate), f64::from(*up)) as f32).collect()
            }
            Op::Route(router) => {
                let experts = self.graph.node(self.graph.operands(id)[0]).ty.cols;
                let correction = router.correction.as_ref().map(|name| self.weights[name.as_str()].as_ref());
                inputs[0].chunks_exact(experts).flat_map(|row| route(row, router, correction)).collect()
            }
            Op::ExpertLinear { weight, per_slot } => {
                let shape = &self.graph.weights[weight].shape;
                let (out, input) = (shape[1], shape[2]);
                let weights = &self.weights[weight.as_str()];
                let slots = cols / out;
                let width = if *per_slot { slots * input } else { input };
                let rows = inputs[0].chunks_exact(width).zip(inputs[1].chunks_exact(slots * 2));
                rows.flat_map(|(x, routes)| {
                    routes.chunks_exact(2).enumerate().flat_map(move |(slot, chosen)| {
                        let x = if *per_slot { &x[slot * input..][..input] } else { x };
                        let own = &weights[chosen[0] as usize * out * input..][..out * input];
                        linear(x, own, 1, out)
                    })
                })
                .collect()
            }
            Op::ExpertBias { weight } => {
                let bias = &self.weights[weight.as_str()];
                let len = self.graph.weights[weight].shape[1];
                let slots = inputs[0].chunks_exact(len).zip(inputs[1].chunks_exact(2));
                slots
                    .flat_map(|(x, chosen)| {
                        let own = &bias[chosen[0] as usize * len..][..len];
                        x.iter().zip(own).map(|(x, b)| x + b).collect::<Vec<_>>()
                    })
                    .collect()
            }
            Op::Combine => {
                let slots = self.graph.node(self.graph.operands(id)[1]).ty.cols;
                let rows = inputs[0].chunks_exact(slots * cols).zip(inputs[1].chunks_exact(slots * 2));
                rows.flat_map(|(x, routes)| {
                    (0..cols).map(move |col| {
                        let shares = routes
                            .chunks_exact(2)
                            .enumerate()
                            .map(|(slot, chosen)| f64::from(chosen[1]) * f64::from(x[slot * cols + col]));
                        shares.sum::<f64>() as f32
                    })
                })
                .collect()
            }
            // Alone, a rank's part stands for the sum; `Ranks` puts the sum in its place.
            Op::AllReduce { .. } => inputs[0].to_vec(),
            Op::Add => inputs[0].iter().zip(inputs[1]).map(|(a, b)| a + b).collect(),
            Op::SelectRows => {
                wanted.iter().flat_map(|row| &inputs[0][row * cols..][..cols]).copied().collect()
            }
            Op::Quantize => inputs[0].chunks_exact(cols).flat_map(fake_quantize).collect(),
            Op::Logits => inputs[0].to_vec(),
            Op::Taps => {
                let row = |row: usize| {
                    inputs.iter().flat_map(move |input| {
                        let cols = input.len() / rows.len();
                        &input[row * cols..][..cols]
                    })
                };
                (0..rows.len()).flat_map(row).copied().collect()
            }
        }
    }

    /// Writes keys and values, rounded to the cache's type as a backend stores them.
    fn write(&mut self, cache: usize, keys: &[f32], values: &[f32], rows: &[Row]) {
        let Cache { kv_heads, qk_dim, v_dim, kv_type } = self.graph.caches[cache];
        for (number, row) in rows.iter().enumerate() {
            let sequence = self.sequences.get_mut(&row.sequence).expect("entered by the step");
            let history = &mut sequence.caches[cache];
            for (stored, new, width) in [
                (&mut history.keys, keys, kv_heads * qk_dim),
                (&mut history.values, values, kv_heads * v_dim),
            ] {
                stored.truncate(row.position * width);
                stored.extend(new[number * width..][..width].iter().map(|x| stored_as(*x, kv_type)));
            }
        }
    }
}

/// A weight's values: its tensor, the experts' tensors one behind the other, a view of them, or a slice.
fn read<'a>(source: &'a dyn WeightSource, name: &str, weight: &Weight) -> Result<Cow<'a, [f32]>, String> {
    // `verify` has checked that this does not overflow.
    let expected: usize = weight.shape.iter().product();
    let tensor = weight.tensor(name);
    let (tensors, each) = match tensor.contains(EXPERT) {
        true => (weight.shape[0], expected / weight.shape[0]),
        false => (1, expected),
    };
    // The axes within a tensor.
    let axes = usize::from(tensor.contains(EXPERT))..weight.shape.len();
    let slice = weight.slice.as_ref().map(|slice| Slice {
        start: slice.start[axes.clone()].to_vec(),
        of: slice.of[axes.clone()].to_vec(),
    });
    let mut all = Cow::Borrowed(&[][..]);
    for expert in 0..tensors {
        let values = source.tensor(&tensor.replace(EXPERT, &expert.to_string()))?;
        let whole = slice.as_ref().map_or(each, |slice| slice.of.iter().product());
        if weight.view.is_none() && values.len() != whole {
            return Err(format!("{} values do not make a {:?}", values.len(), weight.whole_shape()));
        }
        let part = match (&weight.view, &slice) {
            (None, None) => values,
            (view, slice) => {
                let element = |i| {
                    let whole =
                        slice.as_ref().map_or(Some(i), |s| s.element(&weight.shape[axes.clone()], i))?;
                    let at = view.as_ref().map_or(Some(whole), |view| view.element(whole))?;
                    values.get(at).copied()
                };
                let part: Option<Vec<f32>> = (0..each).map(element).collect();
                let few = || format!("{} values of {tensor} do not hold {view:?} {slice:?}", values.len());
                Cow::Owned(part.ok_or_else(few)?)
            }
        };
        if part.len() != each {
            return Err(format!("{} values do not make a {:?}", part.len(), weight.shape));
        }
        match tensors {
            1 => all = part,
            _ => all.to_mut().extend_from_slice(&part),
        }
    }
    Ok(all)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn gated(activation: ActivationFn, gate: f64, up: f64) -> f64 {
    match activation {
        ActivationFn::Silu => gate * sigmoid(gate) * up,
        ActivationFn::Clamped { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
            gate * sigmoid(alpha * gate) * (up + 1.0)
        }
    }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let shares: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = shares.iter().sum();
    shares.iter().map(|share| share / sum).collect()
}

/// One row's routes: expert (as a number that float32 holds exactly) and weight in turn.
fn route(scores: &[f32], router: &Router, correction: Option<&[f32]>) -> Vec<f32> {
    let scores: Vec<f64> = scores.iter().map(|score| f64::from(*score)).collect();
    let shares = match router.scoring {
        Scoring::Softmax => softmax(&scores),
        Scoring::ChosenSoftmax => scores.clone(),
        Scoring::Sigmoid => scores.iter().map(|score| sigmoid(*score)).collect(),
    };
    // The softmax keeps the order of scores, but rounds apart what is equal and together what is not.
    let compared = |expert: usize| match (router.scoring, correction) {
        (Scoring::Sigmoid, Some(correction)) => shares[expert] + f64::from(correction[expert]),
        // The addition makes -0 equal to 0.
        _ => scores[expert] + 0.0,
    };
    let mut chosen: Vec<usize> = (0..scores.len()).collect();
    chosen.sort_by(|a, b| compared(*b).total_cmp(&compared(*a)).then(a.cmp(b)));
    chosen.truncate(router.top_k);
    chosen.sort_unstable();
    let mut weights: Vec<f64> = chosen.iter().map(|expert| shares[*expert]).collect();
    if router.scoring == Scoring::ChosenSoftmax {
        weights = softmax(&weights);
    } else if router.renormalize {
        let sum = weights.iter().sum::<f64>() + 1e-20;
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    let weight = |weight: &f64| (weight * f64::from(router.factor)) as f32;
    chosen.iter().zip(&weights).flat_map(|(expert, share)| [*expert as f32, weight(share)]).collect()
}

/// One row's candidates: token (as a number that float32 holds exactly) and logit in turn.
fn candidates(logits: &[f32], k: usize, factor: f32, softcap: Option<f32>) -> Vec<f32> {
    let key = |token: usize| match logits[token] {
        nan if nan.is_nan() => f32::NEG_INFINITY,
        // The addition makes -0 equal to 0.
        logit => logit + 0.0,
    };
    let mut tokens: Vec<usize> = (0..logits.len()).collect();
    // A NaN is behind the least of the others.
    tokens.sort_by(|a, b| {
        let nan = |token: usize| logits[token].is_nan();
        nan(*a).cmp(&nan(*b)).then(key(*b).total_cmp(&key(*a))).then(a.cmp(b))
    });
    let capped = |logit: f32| {
        let logit = f64::from(logit) * f64::from(factor);
        let softcap = softcap.map(f64::from);
        softcap.map_or(logit, |softcap| softcap * (logit / softcap).tanh()) as f32
    };
    tokens[..k].iter().flat_map(|token| [*token as f32, capped(logits[*token])]).collect()
}

fn stored_as(x: f32, kv_type: KvType) -> f32 {
    match kv_type {
        KvType::F32 => x,
        KvType::F16 => f16::from_f32(x).to_f32(),
        KvType::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// Float64 dot product; eight sums, so that it is a vector loop.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0f64; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f64 = std::iter::zip(a_chunks.remainder(), b_chunks.remainder())
        .map(|(x, y)| f64::from(*x) * f64::from(*y))
        .sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += f64::from(x[lane]) * f64::from(y[lane]);
        }
    }
    sums.iter().sum::<f64>() + tail
}

/// `[rows, k] x [n, k]^T`. The weight row is in the outer loop: it is read once for all rows.
fn linear(x: &[f32], weight: &[f32], rows: usize, n: usize) -> Vec<f32> {
    let k = weight.len() / n;
    let mut out = vec![0f32; rows * n];
    for (feature, weights) in weight.chunks_exact(k).enumerate() {
        for (row, x) in x.chunks_exact(k).enumerate() {
            out[row * n + feature] = dot(x, weights) as f32;
        }
    }
    out
}

fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let group = |x: &[f32]| -> Vec<f32> {
        let mean = dot(x, x) / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(eps)).sqrt();
        std::iter::zip(x, weight).map(|(x, w)| (f64::from(*x) * factor * f64::from(*w)) as f32).collect()
    };
    x.chunks_exact(weight.len()).flat_map(group).collect()
}

/// Rotates dimension `i` with `i + dims/2` of every head. The angle is a float32 product, as in the
/// models' own code: at long contexts its rounding is part of what the weights were trained with.
fn rotate(x: &[f32], rope: &RopeSpec, head_dim: usize, cols: usize, rows: &[Row]) -> Vec<f32> {
    let (inv_freq, half) = (rope.inv_freq(), rope.dims / 2);
    let factor = f64::from(rope.attention_factor());
    let mut out = x.to_vec();
    for (row, values) in rows.iter().zip(out.chunks_exact_mut(cols)) {
        for head in values.chunks_exact_mut(head_dim) {
            for (i, inv_freq) in inv_freq.iter().enumerate() {
                let (sin, cos) = f64::from(row.position as f32 * inv_freq).sin_cos();
                let (a, b) = (f64::from(head[i]), f64::from(head[i + half]));
                head[i] = ((a * cos - b * sin) * factor) as f32;
                head[i + half] = ((b * cos + a * sin) * factor) as f32;
            }
        }
    }
    out
}

/// Attention of one row over `positions` of its sequence: `[heads * v_dim]`.
fn attend(
    query: &[f32],
    history: &History,
    cache: &Cache,
    heads: usize,
    scale: f32,
    sinks: Option<&[f32]>,
    positions: std::ops::Range<usize>,
) -> Vec<f32> {
    let Cache { kv_heads, qk_dim, v_dim, .. } = *cache;
    let mut out = Vec::with_capacity(heads * v_dim);
    for (head, query) in query.chunks_exact(qk_dim).enumerate() {
        let kv_head = head / (heads / kv_heads);
        let key = |position: usize| &history.keys[(position * kv_heads + kv_head) * qk_dim..][..qk_dim];
        let scores: Vec<f64> =
            positions.clone().map(|position| dot(query, key(position)) * f64::from(scale)).collect();
        let sink = sinks.map(|sinks| f64::from(sinks[head]));
        let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let sum: f64 = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - max).exp());
        let mut mixed = vec![0f64; v_dim];
        for (position, weight) in positions.clone().zip(&weights) {
            let value = &history.values[(position * kv_heads + kv_head) * v_dim..][..v_dim];
            for (mixed, value) in mixed.iter_mut().zip(value) {
                *mixed += weight * f64::from(*value);
            }
        }
        out.extend(mixed.iter().map(|mixed| (mixed / sum) as f32));
    }
    out
}

/// One row to signed bytes in blocks of [`ACT_BLOCK`] and back.
fn fake_quantize(row: &[f32]) -> Vec<f32> {
    let block = |block: &[f32]| -> Vec<f32> {
        let scale = block.iter().fold(0f32, |amax, x| amax.max(x.abs())) / 127.0;
        let code =
            |x: f32| if scale == 0.0 { 0.0 } else { (x / scale).round_ties_even().clamp(-127.0, 127.0) };
        block.iter().map(|x| code(*x) * scale).collect()
    };
    row.chunks(ACT_BLOCK).flat_map(block).collect()
}
