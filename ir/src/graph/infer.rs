//! Shape rules: the type of an operator's result, or why there is none.

use super::{ActivationFn, Cache, Dim, Elem, Graph, MAX_CANDIDATES, Op, Router, Scoring, Type, Weight};

/// Type of `op`'s result on operands of these types.
///
/// # Errors
/// In words, when a count, an element type, an extent, a weight, a rope or a cache does not fit.
pub fn infer(graph: &Graph, op: &Op, operands: &[Type]) -> Result<Type, String> {
    let arity = match op {
        Op::Embed { .. } | Op::Input { .. } => 0,
        // Any number of them.
        Op::Taps => operands.len().max(1),
        Op::KvWrite { .. } | Op::Attention { .. } | Op::Gated { .. } | Op::Add => 2,
        Op::ExpertLinear { .. } | Op::ExpertBias { .. } | Op::Combine => 2,
        Op::DynamicConv { .. } | Op::PairScores { .. } => 2,
        _ => 1,
    };
    if operands.len() != arity {
        return Err(format!("{} takes {arity} operands, not {}", op.name(), operands.len()));
    }
    match op {
        Op::Embed { weight } => Ok(Type::f32(matrix(graph, weight)?.1)),
        Op::Replace { weight, .. } => {
            let x = f32_operand(operands, 0)?;
            match vector(graph, weight)? {
                len if len == x.cols && x.rows == Dim::Rows => Ok(x),
                len => Err(format!("{weight} has {len} values for rows {x} of tokens")),
            }
        }
        Op::Input { cols: 0 } => Err("an input has no columns".into()),
        Op::Input { cols } => Ok(Type::f32(*cols)),
        Op::RmsNorm { weight, eps } => {
            let group = vector(graph, weight)?;
            let x = f32_operand(operands, 0)?;
            if group == 0 || x.cols % group != 0 {
                return Err(format!("{} columns are not whole groups of {group} ({weight})", x.cols));
            }
            if !eps.is_finite() || *eps < 0.0 {
                return Err(format!("eps {eps} is not a small positive number"));
            }
            Ok(x)
        }
        Op::Linear { weight } => {
            let (out, input) = matrix(graph, weight)?;
            let x = operands[0];
            if !matches!(x.elem, Elem::F32 | Elem::Q8) || x.cols != input {
                return Err(format!("{weight} takes {input} columns, not {x}"));
            }
            Ok(Type { elem: Elem::F32, rows: x.rows, cols: out })
        }
        Op::Bias { weight } => {
            let x = f32_operand(operands, 0)?;
            match vector(graph, weight)? {
                len if len == x.cols => Ok(x),
                len => Err(format!("{weight} has {len} values for {} columns", x.cols)),
            }
        }
        Op::Scale { factor } if !factor.is_finite() => Err(format!("factor {factor} is not finite")),
        Op::Scale { .. } => f32_operand(operands, 0),
        Op::Rope { rope, head_dim } => {
            let x = f32_operand(operands, 0)?;
            let spec = graph.ropes.get(rope).ok_or_else(|| format!("no rope is called {rope:?}"))?;
            spec.check().map_err(|what| format!("rope {rope:?}: {what}"))?;
            if x.rows != Dim::Rows {
                return Err(format!("rope needs a position for each row, which {x} has not"));
            }
            if *head_dim == 0 || x.cols % head_dim != 0 || spec.dims > *head_dim {
                return Err(format!("{} rotary dims of heads of {head_dim} in {x}", spec.dims));
            }
            Ok(x)
        }
        Op::KvWrite { cache } => {
            let cache = self::cache(graph, *cache)?;
            let (k, v) = (f32_operand(operands, 0)?, f32_operand(operands, 1)?);
            let want = (product(cache.kv_heads, cache.qk_dim)?, product(cache.kv_heads, cache.v_dim)?);
            if (k.cols, v.cols) != want || k.rows != Dim::Rows || v.rows != Dim::Rows {
                return Err(format!("keys {k} and values {v} do not fit a cache of {want:?} columns"));
            }
            Ok(Type { elem: Elem::Kv, rows: Dim::Rows, cols: 0 })
        }
        Op::Attention { cache, heads, scale, window, sinks, bidirectional: _ } => {
            let cache = self::cache(graph, *cache)?;
            let q = f32_operand(operands, 0)?;
            if operands[1].elem != Elem::Kv {
                return Err(format!("operand 1 must come from kv_write, not be {}", operands[1]));
            }
            if cache.kv_heads == 0 || *heads == 0 || heads % cache.kv_heads != 0 {
                return Err(format!("{heads} query heads do not share {} KV heads", cache.kv_heads));
            }
            if q.cols != product(*heads, cache.qk_dim)? || q.rows != Dim::Rows {
                return Err(format!("queries {q} are not {heads} heads of {}", cache.qk_dim));
            }
            if *window == Some(0) {
                return Err("a window of 0 sees nothing".into());
            }
            if !scale.is_finite() {
                return Err(format!("scale {scale} is not finite"));
            }
            if let Some(sinks) = sinks
                && vector(graph, sinks)? != *heads
            {
                return Err(format!("{sinks} has {} values for {heads} heads", vector(graph, sinks)?));
            }
            Ok(Type::f32(product(*heads, cache.v_dim)?))
        }
        Op::Route(router) => {
            let scores = f32_operand(operands, 0)?;
            check_router(graph, router, scores.cols)?;
            Ok(Type { elem: Elem::Routes, rows: scores.rows, cols: router.top_k })
        }
        Op::ExpertLinear { weight, per_slot } => {
            let (_, out, input) = expert_matrices(graph, weight)?;
            let (x, routes) = (operands[0], routes_operand(operands)?);
            let slots = if *per_slot { routes.cols } else { 1 };
            let wanted = product(slots, input)?;
            if !matches!(x.elem, Elem::F32 | Elem::Q8) || x.cols != wanted || x.rows != routes.rows {
                return Err(format!("{weight} takes {wanted} columns of {}, not {x}", routes.rows));
            }
            Ok(Type { elem: Elem::F32, rows: x.rows, cols: product(routes.cols, out)? })
        }
        Op::ExpertBias { weight } => {
            let (x, routes) = (f32_operand(operands, 0)?, routes_operand(operands)?);
            let (_, cols) = expert_vectors(graph, weight)?;
            if x.cols != product(routes.cols, cols)? || x.rows != routes.rows {
                return Err(format!("{weight} has {cols} values for {} slots of {x}", routes.cols));
            }
            Ok(x)
        }
        Op::Combine => {
            let (x, routes) = (f32_operand(operands, 0)?, routes_operand(operands)?);
            if routes.cols == 0 || x.cols % routes.cols != 0 || x.rows != routes.rows {
                return Err(format!("{x} are not {} slots for {routes}", routes.cols));
            }
            Ok(Type { cols: x.cols / routes.cols, ..x })
        }
        Op::DynamicConv { weight, side, group } => {
            let (x, kernel) = (f32_operand(operands, 0)?, f32_operand(operands, 1)?);
            match self::weight(graph, weight)?.shape[..] {
                [2, 2, cols] if cols == x.cols => {}
                ref shape => return Err(format!("{weight:?} of shape {shape:?} is no [2, 2, {}]", x.cols)),
            }
            if *side > 1 || *group == 0 || x.cols % group != 0 {
                return Err(format!("side {side}, groups of {group} of {} columns", x.cols));
            }
            if kernel.cols != product(4, x.cols / group)? || (x.rows, kernel.rows) != (Dim::Rows, Dim::Rows) {
                return Err(format!("kernels {kernel} do not fit {x} in groups of {group}"));
            }
            Ok(x)
        }
        Op::Gated { activation } => {
            if let ActivationFn::Clamped { alpha, limit } = activation
                && !(alpha.is_finite() && limit.is_finite() && *limit > 0.0)
            {
                return Err(format!(
                    "alpha {alpha} and limit {limit} are no finite numbers with a limit above 0"
                ));
            }
            let (a, b) = (f32_operand(operands, 0)?, f32_operand(operands, 1)?);
            if a == b { Ok(a) } else { Err(format!("operands {a} and {b} differ")) }
        }
        Op::Add => {
            let (a, b) = (f32_operand(operands, 0)?, f32_operand(operands, 1)?);
            if a == b { Ok(a) } else { Err(format!("operands {a} and {b} differ")) }
        }
        Op::AllReduce { ranks: 0 | 1 } => Err("one rank alone has nothing to sum".into()),
        Op::AllReduce { .. } => f32_operand(operands, 0),
        Op::SelectRows => match f32_operand(operands, 0)? {
            x if x.rows == Dim::Rows => Ok(Type { rows: Dim::LogitRows, ..x }),
            x => Err(format!("the rows of {x} cannot be selected from, only those of the step")),
        },
        Op::Quantize => Ok(Type { elem: Elem::Q8, ..f32_operand(operands, 0)? }),
        Op::Logits => match f32_operand(operands, 0)? {
            x if x.rows == Dim::LogitRows => Ok(x),
            x => Err(format!("logits are made of selected rows, not of {x}")),
        },
        Op::TopK { k, factor, softcap } => {
            let x = f32_operand(operands, 0)?;
            if *k == 0 || *k > x.cols.min(MAX_CANDIDATES) {
                return Err(format!(
                    "{k} of {} columns: take from 1 to {MAX_CANDIDATES}, at most all",
                    x.cols
                ));
            }
            let positive = |value: f32| value.is_finite() && value > 0.0;
            if !positive(*factor) || !softcap.is_none_or(positive) {
                return Err(format!("factor {factor} and softcap {softcap:?} must be above 0"));
            }
            match x.rows {
                Dim::LogitRows => Ok(Type { elem: Elem::Routes, rows: x.rows, cols: *k }),
                _ => Err(format!("candidates are of logits, not of {x}")),
            }
        }
        Op::PairScores { predecessor, successor } => {
            let (candidates, h) = (operands[0], f32_operand(operands, 1)?);
            if candidates.elem != Elem::Routes {
                return Err(format!("operand 0 must be candidates, not {candidates}"));
            }
            for name in [predecessor, successor] {
                let (_, rank) = matrix(graph, name)?;
                if rank != h.cols {
                    return Err(format!("{name} has rows of {rank} for projections {h}"));
                }
            }
            if (h.rows, candidates.rows) != (Dim::LogitRows, Dim::LogitRows) {
                return Err(format!("pairs are of rows with logits, not of {candidates} and {h}"));
            }
            Ok(Type { elem: Elem::F32, rows: h.rows, cols: product(candidates.cols, candidates.cols)? })
        }
        Op::Taps => {
            let mut cols = 0usize;
            for number in 0..operands.len() {
                match f32_operand(operands, number)? {
                    x if x.rows == Dim::Rows => {
                        cols = cols.checked_add(x.cols).ok_or("more columns than can be counted")?;
                    }
                    x => return Err(format!("taps are of the rows of the step, not {x}")),
                }
            }
            Ok(Type::f32(cols))
        }
    }
}

fn f32_operand(operands: &[Type], number: usize) -> Result<Type, String> {
    match operands[number] {
        ty if ty.elem == Elem::F32 => Ok(ty),
        ty => Err(format!("operand {number} must be f32, not {ty}")),
    }
}

fn routes_operand(operands: &[Type]) -> Result<Type, String> {
    match operands[1] {
        ty if ty.elem == Elem::Routes => Ok(ty),
        ty => Err(format!("operand 1 must be routes, not {ty}")),
    }
}

/// Whether a router can choose among `experts` experts.
fn check_router(graph: &Graph, router: &Router, experts: usize) -> Result<(), String> {
    if router.top_k == 0 || router.top_k > experts {
        return Err(format!("top_k {} of {experts} experts: choose from 1 to all of them", router.top_k));
    }
    if !router.factor.is_finite() {
        return Err(format!("factor {} is not finite", router.factor));
    }
    match &router.correction {
        None => Ok(()),
        Some(_) if router.scoring != Scoring::Sigmoid => Err("only a sigmoid router has a correction".into()),
        Some(correction) => match vector(graph, correction)? {
            len if len == experts => Ok(()),
            len => Err(format!("{correction} has {len} values for {experts} experts")),
        },
    }
}

fn product(a: usize, b: usize) -> Result<usize, String> {
    a.checked_mul(b).ok_or_else(|| format!("{a} x {b} columns are more than can be counted"))
}

fn weight<'g>(graph: &'g Graph, name: &str) -> Result<&'g Weight, String> {
    graph.weights.get(name).ok_or_else(|| format!("weight {name:?} is not declared"))
}

fn matrix(graph: &Graph, name: &str) -> Result<(usize, usize), String> {
    match weight(graph, name)?.shape[..] {
        [out, input] if out > 0 && input > 0 => Ok((out, input)),
        ref shape => Err(format!("{name:?} of shape {shape:?} is no matrix")),
    }
}

fn vector(graph: &Graph, name: &str) -> Result<usize, String> {
    match weight(graph, name)?.shape[..] {
        [len] => Ok(len),
        ref shape => Err(format!("{name:?} of shape {shape:?} is no vector")),
    }
}

/// Experts, out and in features of the matrices of all experts.
pub(super) fn expert_matrices(graph: &Graph, name: &str) -> Result<(usize, usize, usize), String> {
    match weight(graph, name)?.shape[..] {
        [experts, out, input] if experts > 0 && out > 0 && input > 0 => Ok((experts, out, input)),
        ref shape => Err(format!("{name:?} of shape {shape:?} is no matrix an expert")),
    }
}

/// Experts and values of the vectors of all experts.
pub(super) fn expert_vectors(graph: &Graph, name: &str) -> Result<(usize, usize), String> {
    match weight(graph, name)?.shape[..] {
        [experts, len] if experts > 0 && len > 0 => Ok((experts, len)),
        ref shape => Err(format!("{name:?} of shape {shape:?} is no vector an expert")),
    }
}

fn cache(graph: &Graph, number: usize) -> Result<&Cache, String> {
    graph.caches.get(number).ok_or_else(|| format!("there is no cache {number}"))
}
