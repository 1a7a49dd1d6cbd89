//! `tilec inspect`.

use crate::args::InspectArgs;
use crate::source::{self, Source};
use crate::ui::{Align, Table, count, mib};
use crate::{ceiling, ui};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use tilec_ir::cost::StageCost;
use tilec_ir::format::PanelLayout;
use tilec_ir::pack::PackContent;
use tilec_ir::plan::{Plan, WeightsFrom};

/// Shows the stages of a plan, their floors, and the memory it needs.
pub fn run(args: &InspectArgs) -> Result<()> {
    let plan = load(args)?;
    let (rows, context) = (args.rows as usize, args.context as usize);
    if rows > plan.limits.max_rows || context + rows > plan.limits.context {
        bail!(
            "{rows} rows behind {context} positions do not fit: the plan takes {} rows in a step and {} positions",
            plan.limits.max_rows,
            plan.limits.context
        );
    }
    let bandwidth = match args.bandwidth {
        Some(bandwidth) => f64::from(bandwidth) * 1e9,
        None if plan.resident.is_some() => gpu_bandwidth(),
        None => {
            ui::note("measuring the memory bandwidth of this machine; --bandwidth names another");
            ceiling::read_ceiling(ceiling::FAR_BYTES, plan.target.workers, 5)
        }
    };
    let report = Report { plan: &plan, rows, context, bandwidth };
    let text = if args.json { report.json()? } else { report.text()? };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// Bytes a second of the GPU that is here; what an H200 reads if none is.
fn gpu_bandwidth() -> f64 {
    const H200: f64 = 4.59e12;
    let here = tilec_runtime::cuda::devices().ok().and_then(|gpus| Some((gpus.first()?.memory_rate?) as f64));
    let (rate, whose) = match here {
        Some(rate) => (rate, "this machine's GPU (its nominal rate)"),
        None => (H200, "an H200: there is no GPU here"),
    };
    ui::note(format!("the floor is that of {whose}; --bandwidth names another"));
    rate
}

/// The plan, compiled in memory if it is none yet.
fn load(args: &InspectArgs) -> Result<Plan> {
    match Source::find(&args.model.path)? {
        Source::Plan(_) => Ok(source::plan(&args.model.path, &args.model.target)?.1),
        Source::Model(mut model) => {
            model.apply(&args.model.target);
            Ok(model.compile()?.plan)
        }
    }
}

/// Weights of a plan, counted as elements of the model: padding and tables that are made up are none.
pub fn parameters(plan: &Plan) -> u64 {
    let mut seen = std::collections::BTreeSet::new();
    let mut total = 0u64;
    for item in &plan.packing.items {
        match &item.content {
            PackContent::Panels { layout: PanelLayout { k, .. }, segments, .. }
            | PackContent::Octets { k, segments, .. } => {
                for segment in segments {
                    // A tied head may be packed a second time; it is the same weight.
                    if seen.insert((segment.tensor.as_str(), segment.row_start)) {
                        total = total.saturating_add((segment.rows as u64).saturating_mul(*k as u64));
                    }
                }
            }
            PackContent::ExpertPanels { layout: PanelLayout { k, .. }, experts, rows, sources }
            | PackContent::ExpertOctets { k, experts, rows, sources, .. } => {
                for source in sources {
                    if seen.insert((source.tensor.as_str(), source.start)) {
                        let rows = (*experts as u64).saturating_mul(*rows as u64);
                        total = total.saturating_add(rows.saturating_mul(*k as u64));
                    }
                }
            }
            PackContent::Elements { tensor, len, start, .. } => {
                if seen.insert((tensor.as_str(), *start)) {
                    total = total.saturating_add(*len as u64);
                }
            }
            PackContent::F32 { tensor, len } => {
                if seen.insert((tensor.as_str(), 0)) {
                    total = total.saturating_add(*len as u64);
                }
            }
            // A router's octets are made of weights that are packed, and counted, elsewhere too.
            PackContent::OctetScales { .. }
            | PackContent::ExpertScales { .. }
            | PackContent::RouterOctets { .. }
            | PackContent::RopeTable { .. } => {}
        }
    }
    total
}

/// What one execution of the plan's step must do.
struct Report<'a> {
    plan: &'a Plan,
    rows: usize,
    context: usize,
    /// Bytes per second.
    bandwidth: f64,
}

/// Memory that running a plan needs, in bytes.
struct Memory {
    weights: u64,
    kv: u64,
    arena: u64,
    scratch: u64,
}

impl Memory {
    fn of(plan: &Plan) -> Result<Memory> {
        let overflow = "the size of the KV cache overflows";
        let kv = plan.kv.total_bytes(plan.kv_pages()).context(overflow)?;
        let mut memory = Memory {
            weights: plan.packing.bytes,
            kv: kv as u64,
            arena: plan.arena_bytes() as u64,
            scratch: (plan.target.workers * plan.scratch_bytes) as u64,
        };
        // A draft has all of its own but the weights.
        if let Some(draft) = &plan.draft {
            memory.kv += draft.kv.total_bytes(plan.kv_pages()).context(overflow)? as u64;
            for program in [&draft.inject, &draft.block_pass] {
                memory.arena += program.arena_bytes() as u64;
                memory.scratch += (plan.target.workers * program.scratch_bytes) as u64;
            }
        }
        Ok(memory)
    }

    fn total(&self) -> u64 {
        self.weights + self.kv + self.arena + self.scratch
    }
}

impl Report<'_> {
    /// Seconds that all runs of a kind of stage take at least.
    fn floor(&self, cost: &StageCost) -> f64 {
        cost.runs as f64 * cost.bytes(self.rows, self.context) as f64 / self.bandwidth
    }

    fn total_floor(&self) -> f64 {
        self.plan.costs.iter().map(|cost| self.floor(cost)).sum()
    }

    fn macs(&self) -> u64 {
        self.plan.costs.iter().map(|cost| cost.runs as u64 * cost.macs(self.rows, self.context)).sum()
    }

    fn text(&self) -> Result<String> {
        let plan = self.plan;
        let mut out = String::new();
        let target = &plan.target;
        let weights = match &plan.weights {
            WeightsFrom::Checkpoint { path } => path.display().to_string(),
            WeightsFrom::Synthetic { seed, .. } => format!("synthetic, seed {seed}"),
        };
        writeln!(out, "{} ({}, {} parameters)", plan.title(), plan.family, count(parameters(plan)))?;
        writeln!(out, "  weights  {weights}")?;
        writeln!(
            out,
            "  target   {} {} {}, {} workers",
            target.device, target.arch, target.cpu, target.workers
        )?;
        if let Some(shard) = plan.shard {
            writeln!(
                out,
                "  share    {shard} alone: bytes and floors are its own, sums over ranks cost nothing"
            )?;
        }
        let limits = &plan.limits;
        let pass = plan.resident.map_or(String::new(), |kernel| format!(" ({} a pass)", kernel.step_rows));
        writeln!(
            out,
            "  limits   {} rows in a step{pass}, {} sequences of {} positions\n",
            limits.max_rows, limits.sequences, limits.context
        )?;

        let right = Align::Right;
        let mut table = Table::new(&[
            ("stage", Align::Left),
            ("runs", right),
            ("anchor", Align::Left),
            ("weights MB", right),
            ("MMAC/row", right),
            ("floor µs", right),
            ("share", right),
        ]);
        let total = self.total_floor();
        for cost in &plan.costs {
            let runs = cost.runs as u64;
            table.row([
                cost.stage.clone(),
                runs.to_string(),
                cost.anchor.clone(),
                format!("{:.2}", (runs * cost.streamed_bytes(self.rows)) as f64 / 1e6),
                format!("{:.2}", (runs * cost.macs(1, self.context)) as f64 / 1e6),
                format!("{:.1}", self.floor(cost) * 1e6),
                format!("{:.1} %", 100.0 * self.floor(cost) / total),
            ]);
        }
        let streamed = |cost: &StageCost| cost.runs as u64 * cost.streamed_bytes(self.rows);
        let streamed: u64 = plan.costs.iter().map(streamed).sum();
        table.row([
            "total".to_string(),
            plan.stages.len().to_string(),
            String::new(),
            format!("{:.2}", streamed as f64 / 1e6),
            format!("{:.2}", self.macs() as f64 / self.rows as f64 / 1e6),
            format!("{:.1}", total * 1e6),
            "100.0 %".to_string(),
        ]);
        out.push_str(&table.text());
        writeln!(
            out,
            "\nAll runs of a stage together, {} row(s) behind {} positions, at {:.1} GB/s: \
             no faster than {:.1} tokens/s.",
            self.rows,
            self.context,
            self.bandwidth / 1e9,
            self.rows as f64 / total
        )?;
        if let Some(cost) = plan.costs.iter().find(|cost| cost.experts > 0) {
            writeln!(
                out,
                "Experts: {} of {} a row; {:.1} of a layer are read, if each row chooses at random.",
                cost.experts_per_row,
                cost.experts,
                cost.experts as f64 * cost.streamed_bytes(self.rows) as f64 / cost.weight_bytes as f64
            )?;
        }

        let memory = Memory::of(plan)?;
        writeln!(out, "\nmemory")?;
        for (name, bytes) in [
            ("packed weights", memory.weights),
            ("KV cache", memory.kv),
            ("arena", memory.arena),
            ("scratch", memory.scratch),
            ("total", memory.total()),
        ] {
            writeln!(out, "  {name:<14}  {:>12}", mib(bytes))?;
        }
        Ok(out)
    }

    fn json(&self) -> Result<String> {
        let plan = self.plan;
        let total = self.total_floor();
        let stages: Vec<_> = plan
            .costs
            .iter()
            .map(|cost| {
                json!({
                    "stage": cost.stage,
                    "runs": cost.runs,
                    "anchor": cost.anchor,
                    "weight_bytes": cost.weight_bytes,
                    "streamed_weight_bytes": cost.streamed_bytes(self.rows),
                    "bytes": cost.bytes(self.rows, self.context),
                    "macs": cost.macs(self.rows, self.context),
                    "floor_s": self.floor(cost) / cost.runs.max(1) as f64,
                    "floor_all_runs_s": self.floor(cost),
                    "share": self.floor(cost) / total,
                })
            })
            .collect();
        let memory = Memory::of(plan)?;
        let report = json!({
            "name": plan.name,
            "shard": plan.shard,
            "family": plan.family,
            "parameters": parameters(plan),
            "target": plan.target,
            "limits": plan.limits,
            "rows": self.rows,
            "context": self.context,
            "bandwidth_bytes_per_s": self.bandwidth,
            "stages": stages,
            "floor_s": total,
            "floor_tokens_per_s": self.rows as f64 / total,
            "macs": self.macs(),
            "memory_bytes": {
                "weights": memory.weights,
                "kv": memory.kv,
                "arena": memory.arena,
                "scratch": memory.scratch,
                "total": memory.total(),
            },
        });
        Ok(format!("{report:#}\n"))
    }
}
