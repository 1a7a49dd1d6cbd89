//! Bytes and operations of a program's stages.

use crate::cost::StageCost;
use crate::launch::OCTET;
use crate::stages::{BufferElem, BufferId};

use super::{Epilogue, Kind, ResidentProgram, Stage};

impl ResidentProgram {
    /// Costs by kind of stage, those of a body with as many runs as it has layers.
    pub fn costs(&self) -> Vec<StageCost> {
        let bodies =
            self.bodies.iter().enumerate().map(|(number, body)| {
                (body, self.layers.iter().filter(|layer| layer.body == number).count())
            });
        let all = [(&self.before, 1)].into_iter().chain(bodies).chain([(&self.after, 1)]);
        all.flat_map(|(stages, runs)| stages.iter().map(move |stage| self.cost(stage, runs))).collect()
    }

    fn cost(&self, stage: &Stage, runs: usize) -> StageCost {
        let row = |id: BufferId| {
            let buffer = self.buffer(id);
            (buffer.cols * if buffer.elem == BufferElem::F32 { 4 } else { 2 }) as u64
        };
        let mut cost = StageCost {
            stage: stage.name.clone(),
            anchor: String::new(),
            runs,
            experts: 0,
            experts_per_row: 0,
            weight_bytes: 0,
            macs_per_row: 0,
            kv_bytes_per_position: 0,
            kv_macs_per_position: 0,
            kv_window: None,
            activation_bytes_per_row: 0,
            logit_rows_only: false,
        };
        match &stage.kind {
            Kind::Embed { format, k, output, .. } => {
                cost.anchor = "embed".into();
                cost.activation_bytes_per_row = format.stored_bytes(1, *k) as u64 + row(*output);
            }
            Kind::Taps { output } => {
                cost.anchor = "taps".into();
                cost.activation_bytes_per_row = self.buffer(*output).cols as u64 * 4 + row(*output);
            }
            Kind::Context(context) => {
                cost.anchor = "context".into();
                let each = self.kv.qk_dim + self.kv.v_dim;
                let cached = context.k_norms.len() * context.kv_heads * each * self.kv.kv_type.bytes();
                cost.activation_bytes_per_row = row(context.input) + cached as u64;
            }
            Kind::Gemm(gemm) => {
                cost.anchor = format!("gemm {}", gemm.format);
                cost.weight_bytes = gemm.weight_bytes() as u64;
                let router = gemm.router_tiles() * OCTET;
                cost.macs_per_row = (gemm.k * (gemm.cols * gemm.operands + router)) as u64;
                cost.activation_bytes_per_row = row(gemm.input)
                    + if gemm.epilogue == Epilogue::Logits { gemm.cols as u64 * 4 } else { row(gemm.output) };
                cost.logit_rows_only = gemm.select;
            }
            Kind::Scores(scores) => {
                cost.anchor = format!("scores {}", scores.format);
                cost.weight_bytes = scores.weight_bytes() as u64;
                cost.macs_per_row = (scores.k * scores.experts) as u64;
                cost.activation_bytes_per_row = row(scores.input) + row(scores.output);
            }
            Kind::Experts(experts) => {
                let gemm = &experts.gemm;
                cost.anchor = format!("experts {}", gemm.format);
                cost.weight_bytes = experts.weight_bytes() as u64;
                (cost.experts, cost.experts_per_row) = (experts.experts, experts.top_k);
                cost.macs_per_row = (gemm.k * gemm.cols * gemm.operands * experts.top_k) as u64;
                cost.activation_bytes_per_row = row(gemm.input) + row(gemm.output);
            }
            Kind::Attention(attention) => {
                let each = self.kv.qk_dim + self.kv.v_dim;
                cost.anchor = "attention".into();
                if let Some(scores) = &attention.router {
                    cost.weight_bytes = scores.weight_bytes() as u64;
                    cost.macs_per_row = (scores.k * scores.experts) as u64;
                }
                cost.kv_bytes_per_position = (attention.kv_heads * each * self.kv.kv_type.bytes()) as u64;
                cost.kv_macs_per_position = (attention.heads * each) as u64;
                cost.kv_window = attention.window;
                cost.activation_bytes_per_row = row(attention.input) + row(attention.output);
            }
            Kind::Conv(conv) => {
                cost.anchor = "dynamic_conv".into();
                cost.macs_per_row = 2 * self.buffer(conv.input).cols as u64;
                cost.activation_bytes_per_row = row(conv.input) + row(conv.kernels) + row(conv.output);
            }
            Kind::TopK(top) => {
                cost.anchor = "top_k".into();
                cost.activation_bytes_per_row = top.vocab as u64 * 4 + row(top.lists);
                cost.logit_rows_only = true;
            }
            Kind::Pairs(pairs) => {
                cost.anchor = "pair_scores".into();
                let (k, rank) = (pairs.top.k, pairs.rank);
                cost.macs_per_row = (k * k * rank) as u64;
                cost.activation_bytes_per_row =
                    row(pairs.top.lists) + row(pairs.scores) + (2 * k * rank * 2) as u64;
                cost.logit_rows_only = true;
            }
            Kind::Walk { scores, .. } => {
                cost.anchor = "walk".into();
                cost.activation_bytes_per_row = row(*scores);
                cost.logit_rows_only = true;
            }
        }
        cost
    }
}
