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
    /// Weight bytes that it streams, padding included, whatever the number of rows.
    pub weight_bytes: u64,
    /// Multiply-adds with weights, per row.
    pub macs_per_row: u64,
    /// KV cache bytes that it reads per row and position of context.
    pub kv_bytes_per_position: u64,
    /// Multiply-adds with the KV cache per row and position of context.
    pub kv_macs_per_position: u64,
    /// Activation bytes that it reads and writes per row.
    pub activation_bytes_per_row: u64,
    /// Counts only the rows whose logits are wanted.
    pub logit_rows_only: bool,
}

impl StageCost {
    /// Bytes that one run must move for `rows` rows of one sequence behind `context` positions.
    pub fn bytes(&self, rows: usize, context: usize) -> u64 {
        // The cache of a sequence is read once for all of its rows in a step.
        self.weight_bytes
            + self.kv_bytes_per_position * context as u64
            + self.activation_bytes_per_row * rows as u64
    }

    /// Multiply-adds of one run.
    pub fn macs(&self, rows: usize, context: usize) -> u64 {
        rows as u64 * (self.macs_per_row + self.kv_macs_per_position * context as u64)
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
    };
    let mut cost = StageCost {
        stage: stage.name.clone(),
        anchor: String::new(),
        runs,
        weight_bytes: stage.weight_bytes(),
        macs_per_row: 0,
        kv_bytes_per_position: 0,
        kv_macs_per_position: 0,
        activation_bytes_per_row: 0,
        logit_rows_only: stage.rows == crate::graph::Dim::LogitRows,
    };
    for place in stage.reads().into_iter().chain(stage.writes()) {
        if let (crate::stages::Place::Buffer(id), _) = place {
            let buffer = program.buffer(id);
            cost.activation_bytes_per_row += buffer_bytes(buffer.cols, buffer.elem) as u64;
        }
    }
    match &stage.anchor {
        StageAnchor::Embed { layout, .. } => {
            cost.anchor = "embed".into();
            cost.activation_bytes_per_row += layout.format.stored_bytes(1, layout.k) as u64;
        }
        StageAnchor::Rows { .. } => cost.anchor = "rows".into(),
        StageAnchor::Gemm { .. } => {
            let weights = stage.parts.iter().filter_map(|part| part.weights.map(|weights| (part, weights)));
            let formats: Vec<String> =
                weights.clone().map(|(_, weights)| weights.layout.format.to_string()).collect();
            cost.anchor = format!("gemm {}", formats.first().map_or("", String::as_str));
            cost.macs_per_row = weights.map(|(part, w)| (part.cols * w.operands * w.layout.k) as u64).sum();
        }
        StageAnchor::Attention { heads, .. } => {
            cost.anchor = "attention".into();
            let kv = &program.kv;
            cost.kv_bytes_per_position = (kv.kv_heads * (kv.qk_dim + kv.v_pad()) * kv.kv_type.bytes()) as u64;
            cost.kv_macs_per_position = (heads * (kv.qk_dim + kv.v_dim)) as u64;
        }
    }
    cost
}
