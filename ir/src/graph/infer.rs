//! Shape rules: the type of an operator's result, or why there is none.

use super::{Cache, Dim, Elem, Graph, Op, Type, Weight};

/// Type of `op`'s result on operands of these types.
///
/// # Errors
/// In words, when a count, an element type, an extent, a weight, a rope or a cache does not fit.
pub fn infer(graph: &Graph, op: &Op, operands: &[Type]) -> Result<Type, String> {
    let arity = match op {
        Op::Embed { .. } => 0,
        Op::KvWrite { .. } | Op::Attention { .. } | Op::Gated { .. } | Op::Add => 2,
        _ => 1,
    };
    if operands.len() != arity {
        return Err(format!("{} takes {arity} operands, not {}", op.name(), operands.len()));
    }
    match op {
        Op::Embed { weight } => Ok(Type::f32(matrix(graph, weight)?.1)),
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
            if x.elem == Elem::Kv || x.cols != input {
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
        Op::Attention { cache, heads, scale, window } => {
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
            Ok(Type::f32(product(*heads, cache.v_dim)?))
        }
        Op::Gated { .. } | Op::Add => {
            let (a, b) = (f32_operand(operands, 0)?, f32_operand(operands, 1)?);
            if a == b { Ok(a) } else { Err(format!("operands {a} and {b} differ")) }
        }
        Op::SelectRows => match f32_operand(operands, 0)? {
            x if x.rows == Dim::Rows => Ok(Type { rows: Dim::LogitRows, ..x }),
            x => Err(format!("the rows of {x} cannot be selected from, only those of the step")),
        },
        Op::Quantize => Ok(Type { elem: Elem::Q8, ..f32_operand(operands, 0)? }),
        Op::Logits => match f32_operand(operands, 0)? {
            x if x.rows == Dim::LogitRows => Ok(x),
            x => Err(format!("logits are made of selected rows, not of {x}")),
        },
    }
}

fn f32_operand(operands: &[Type], number: usize) -> Result<Type, String> {
    match operands[number] {
        ty if ty.elem == Elem::F32 => Ok(ty),
        ty => Err(format!("operand {number} must be f32, not {ty}")),
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

fn cache(graph: &Graph, number: usize) -> Result<&Cache, String> {
    graph.caches.get(number).ok_or_else(|| format!("there is no cache {number}"))
}
