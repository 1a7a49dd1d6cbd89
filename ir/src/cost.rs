//! The cost model: what a stage must read and multiply, from its description alone.

use crate::stages::{BufferElem, Stage, StageAnchor, StageProgram};
use serde::{Deserialize, Serialize};

/// What one kind of stage costs, per run of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageCost {
    /// Name without the layer.
    pub stage: String,
    /// Anchor, for people.
    pub anchor: String,
    /// How often it runs in a step.
    pub runs: usize,
    /// Weight bytes that it streams, padding included, whatever the number of rows; of experts, all that
    /// there are.
    pub weight_bytes: u64,
    /// Experts that the weights are of, each as large as the others; 0 if all weights are streamed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub experts: usize,
    /// Experts that each row needs.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub experts_per_row: usize,
    /// Multiply-adds with weights, per row.
    pub macs_per_row: u64,
    /// KV cache bytes that it reads per row and position of context.
    pub kv_bytes_per_position: u64,
    /// Multiply-adds with the KV cache per row and position of context.
    pub kv_macs_per_position: u64,
    /// Positions that a row sees, itself included; `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_window: Option<usize>,
    /// Activation bytes that it reads and writes per row.
    pub activation_bytes_per_row: u64,
    /// Counts only the rows whose logits are wanted.
    pub logit_rows_only: bool,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

impl StageCost {
    /// Weight bytes that one run for `rows` rows streams. Of experts those of as many as the rows choose
    /// between them, if each row chooses at random: an expectation.
    pub fn streamed_bytes(&self, rows: usize) -> u64 {
        if self.experts == 0 {
            return self.weight_bytes;
        }
        let missed = 1.0 - self.experts_per_row as f64 / self.experts as f64;
        let share = 1.0 - missed.powi(i32::try_from(rows).unwrap_or(i32::MAX));
        (self.weight_bytes as f64 * share).round() as u64
    }

    /// Of `context` positions in front of a row, those that it sees.
    pub fn seen(&self, context: usize) -> usize {
        self.kv_window.map_or(context, |window| context.min(window.saturating_sub(1)))
    }

    /// KV cache bytes that one run reads for the rows of one sequence behind `context` positions: once for all
    /// of them.
    pub fn kv_bytes(&self, context: usize) -> u64 {
        self.kv_bytes_per_position * self.seen(context) as u64
    }

    /// Bytes that one run must move for `rows` rows of one sequence behind `context` positions.
    pub fn bytes(&self, rows: usize, context: usize) -> u64 {
        self.streamed_bytes(rows) + self.kv_bytes(context) + self.activation_bytes_per_row * rows as u64
    }

    /// Bytes that one run must move for a row each of as many sequences as `contexts` has positions in front
    /// of one.
    pub fn bytes_of_sequences(&self, contexts: &[usize]) -> u64 {
        let rows = contexts.len();
        let caches: u64 = contexts.iter().map(|context| self.kv_bytes(*context)).sum();
        self.streamed_bytes(rows) + caches + self.activation_bytes_per_row * rows as u64
    }

    /// Multiply-adds of one run.
    pub fn macs(&self, rows: usize, context: usize) -> u64 {
        rows as u64 * (self.macs_per_row + self.kv_macs_per_position * self.seen(context) as u64)
    }
}

/// Shortest possible time of a step in seconds: all bytes at `bytes_per_second`, or all
/// multiply-adds at `macs_per_second`, whichever takes longer.
pub fn floor_seconds(
    costs: &[StageCost],
    rows: usize,
    context: usize,
    bytes_per_second: f64,
    macs_per_second: Option<f64>,
) -> f64 {
    let sum = |each: &dyn Fn(&StageCost) -> u64| -> f64 {
        costs.iter().map(|cost| cost.runs as f64 * each(cost) as f64).sum()
    };
    let bytes = sum(&|cost| cost.bytes(rows, context)) / bytes_per_second;
    match macs_per_second {
        Some(rate) => bytes.max(sum(&|cost| cost.macs(rows, context)) / rate),
        None => bytes,
    }
}

/// Costs of a program's stages, those of a body with as many runs as it has layers.
pub fn costs(program: &StageProgram) -> Vec<StageCost> {
    let mut costs = Vec::new();
    let mut add = |stages: &[Stage], runs: usize| {
        costs.extend(stages.iter().map(|stage| cost(program, stage, runs)));
    };
    add(&program.before, 1);
    for (number, body) in program.bodies.iter().enumerate() {
        add(&body.stages, program.layers.iter().filter(|layer| layer.body == number).count());
    }
    add(&program.after, 1);
    costs
}

fn cost(program: &StageProgram, stage: &Stage, runs: usize) -> StageCost {
    let buffer_bytes = |cols: usize, elem: BufferElem| match elem {
        BufferElem::Q8 => cols + cols.div_ceil(crate::format::ACT_BLOCK) * 8,
        BufferElem::F32 => cols * 4,
        BufferElem::Bf16 => cols * 2,
        BufferElem::Routes => cols * 8,
    };
    let mut cost = StageCost {
        stage: stage.name.clone(),
        anchor: String::new(),
        runs,
        weight_bytes: stage.weight_bytes(),
        experts: 0,
        experts_per_row: 0,
        macs_per_row: 0,
        kv_bytes_per_position: 0,
        kv_macs_per_position: 0,
        kv_window: None,
        activation_bytes_per_row: 0,
        logit_rows_only: stage.rows == crate::graph::Dim::LogitRows,
    };
    for place in stage.reads().into_iter().chain(stage.writes()) {
        if let (crate::stages::Place::Buffer(id), _) = place {
            let buffer = program.buffer(id);
            // A row of the step has one row in most buffers, and as many as slots in some.
            let rows = (buffer.rows / program.max_rows).max(1) as u64;
            cost.activation_bytes_per_row += rows * buffer_bytes(buffer.cols, buffer.elem) as u64;
        }
    }
    match &stage.anchor {
        StageAnchor::Embed { layout, .. } => {
            cost.anchor = "embed".into();
            cost.activation_bytes_per_row += layout.format.stored_bytes(1, layout.k) as u64;
        }
        StageAnchor::Input => cost.anchor = "input".into(),
        StageAnchor::Taps { .. } => cost.anchor = "taps".into(),
        StageAnchor::Rows { .. } => cost.anchor = "rows".into(),
        StageAnchor::Gemm { .. } => {
            let weights = stage.parts.iter().filter_map(|part| part.weights.map(|weights| (part, weights)));
            let formats: Vec<String> =
                weights.clone().map(|(_, weights)| weights.layout.format.to_string()).collect();
            cost.anchor = format!("gemm {}", formats.first().map_or("", String::as_str));
            cost.macs_per_row = weights.map(|(part, w)| (part.cols * w.operands * w.layout.k) as u64).sum();
        }
        StageAnchor::Route { .. } => cost.anchor = "route".into(),
        StageAnchor::DynamicConv { input, .. } => {
            cost.anchor = "dynamic_conv".into();
            cost.macs_per_row = 2 * program.buffer(*input).cols as u64;
        }
        StageAnchor::TopK { .. } => cost.anchor = "top_k".into(),
        StageAnchor::PairScores { k, tables, .. } => {
            cost.anchor = "pair_scores".into();
            // A row reads its own candidates' rows and those of the row before.
            let rows = tables.iter().map(|(_, layout)| layout.format.stored_bytes(*k, layout.k) as u64);
            cost.activation_bytes_per_row += rows.sum::<u64>();
            cost.macs_per_row = (k * k * tables[0].1.k) as u64;
        }
        StageAnchor::Experts { experts, top_k, .. } => {
            let weights = stage.parts.iter().filter_map(|part| part.weights.map(|weights| (part, weights)));
            let format = weights.clone().map(|(_, weights)| weights.layout.format.to_string()).next();
            cost.anchor = format!("experts {}", format.unwrap_or_default());
            let one: u64 = weights.map(|(part, w)| (part.cols * w.operands * w.layout.k) as u64).sum();
            cost.macs_per_row = one * *top_k as u64;
            (cost.experts, cost.experts_per_row) = (*experts, *top_k);
        }
        StageAnchor::Attention { heads, kv_heads, window, .. } => {
            cost.anchor = "attention".into();
            cost.kv_window = *window;
            let kv = &program.kv;
            cost.kv_bytes_per_position = (kv_heads * (kv.qk_dim + kv.v_pad()) * kv.kv_type.bytes()) as u64;
            cost.kv_macs_per_position = (heads * (kv.qk_dim + kv.v_dim)) as u64;
        }
    }
    cost
}
