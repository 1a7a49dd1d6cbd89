//! Fusion: the graph becomes anchors with chains of pieces.
//!
//! First every operator becomes a fused operator of its own. Then the [`RULES`] are tried in order,
//! again and again, until none applies. A rule merges one pair of operators (or three) and never
//! changes what is computed: the pieces of a chain are the operators, in their order.

use tilec_ir::fused::{Anchor, Fused, FusedOp, Part, Piece, Value, ValueId};
use tilec_ir::graph::{Graph, GraphError, Op};

/// A rewrite rule.
pub struct Rule {
    /// Name in the text form and in statistics.
    pub name: &'static str,
    /// Why it pays.
    pub reason: &'static str,
    /// Applies it at the first place where it holds; false if there is none.
    pub apply: fn(&mut Fused) -> bool,
}

/// Columns of the largest head: a norm over more than this is a norm of the row, for which a tile
/// would have to be all of it.
const MAX_HEAD: usize = 512;

/// The rules, in the order in which they are tried.
pub const RULES: &[Rule] = &[
    Rule {
        name: "all-reduce-epilogue",
        reason: "a rank's part of a sum is sent from where it is made, and the sum goes on through the chain",
        apply: all_reduce,
    },
    Rule {
        name: "bias-epilogue",
        reason: "a bias is one addition on a value that is in a register anyway",
        apply: |fused| append(fused, |piece, at| matches!(piece, Piece::Bias { .. }) && at.gemm),
    },
    Rule {
        name: "scale-epilogue",
        reason: "a constant factor is one multiplication on a value that is in a register anyway",
        apply: |fused| append(fused, |piece, at| matches!(piece, Piece::Scale(_)) && at.gemm),
    },
    Rule {
        name: "expert-epilogue",
        reason: "an expert's bias and the weight of its share are known where its product is made",
        apply: expert_epilogue,
    },
    Rule {
        name: "head-norm-epilogue",
        reason: "qk-norm needs one head, and a tile of q or k is whole heads",
        apply: |fused| {
            append(
                fused,
                |piece, at| matches!(piece, Piece::RmsNorm { group, .. } if at.gemm && *group <= MAX_HEAD),
            )
        },
    },
    Rule {
        name: "rope-epilogue",
        reason: "a rotation needs two columns of one head, and a tile of q or k is whole heads",
        apply: |fused| append(fused, |piece, at| matches!(piece, Piece::Rope { .. }) && at.gemm),
    },
    Rule {
        name: "gated-pair",
        reason: "gate and up read the same row; side by side their product never leaves the tile",
        apply: gated_pair,
    },
    Rule {
        name: "residual-epilogue",
        reason: "each column of the residual is read and written by the one tile that adds to it",
        apply: residual,
    },
    Rule {
        name: "kv-write-epilogue",
        reason: "keys and values go from the tile straight to their page",
        apply: kv_write,
    },
    Rule {
        name: "sibling-gemms",
        reason: "GEMMs on the same row are one stage: one hand-off, one stream of weights",
        apply: siblings,
    },
    Rule {
        name: "select-before-norm",
        reason: "a row is selected while it is read",
        apply: |fused| append(fused, |piece, at| matches!(piece, Piece::RmsNorm { .. }) && at.rows),
    },
    Rule {
        name: "norm-quantize",
        reason: "the norm has the row in hand; only its bytes are stored",
        apply: |fused| append(fused, |piece, at| *piece == Piece::Quantize && at.rows),
    },
    Rule {
        name: "gated-quantize",
        reason: "tiles of a gated pair are whole blocks of 32 columns, so they can store bytes",
        apply: |fused| append(fused, |piece, at| *piece == Piece::Quantize && at.gated),
    },
    Rule {
        name: "attention-quantize",
        reason: "a head of whole blocks of 32 columns can be stored as bytes",
        apply: |fused| append(fused, |piece, at| *piece == Piece::Quantize && at.blocks_per_head),
    },
    Rule {
        name: "logits-sink",
        reason: "the head writes the logits where the sampler reads them",
        apply: |fused| append(fused, |piece, at| matches!(piece, Piece::Logits(_)) && at.gemm),
    },
];

/// Fuses a graph.
///
/// # Errors
/// When the graph has a cycle.
pub fn fuse(graph: &Graph) -> Result<Fused, GraphError> {
    let mut fused = one_to_one(graph)?;
    let mut applied = vec![0; RULES.len()];
    while let Some(index) = RULES.iter().position(|rule| (rule.apply)(&mut fused)) {
        applied[index] += 1;
    }
    fused.applied =
        RULES.iter().zip(applied).filter(|(_, n)| *n > 0).map(|(rule, n)| (rule.name, n)).collect();
    fused.verify().map_err(|what| graph.error("fuse", what))?;
    Ok(fused)
}

/// Every operator of the graph as a fused operator of its own.
fn one_to_one(graph: &Graph) -> Result<Fused, GraphError> {
    let mut fused = Fused {
        name: graph.name.clone(),
        weights: graph.weights.clone(),
        ropes: graph.ropes.clone(),
        caches: graph.caches.clone(),
        ..Fused::default()
    };
    let mut value_of = std::collections::HashMap::new();
    for id in graph.topological()? {
        let node = graph.node(id);
        let operands = graph.operands(id);
        let inputs: Vec<ValueId> =
            operands.iter().filter_map(|operand| value_of.get(operand).copied()).collect();
        let value = ValueId(fused.values.len() as u32);
        let mut op = FusedOp {
            name: node.name.clone(),
            layer: node.layer,
            anchor: Anchor::Rows,
            inputs,
            after_cache: Vec::new(),
            parts: Vec::new(),
        };
        let mut part = Part { weights: Vec::new(), cols: node.ty.cols, pieces: Vec::new() };
        match &node.op {
            Op::Embed { weight } => op.anchor = Anchor::Embed { weight: weight.clone() },
            Op::Input { .. } => op.anchor = Anchor::Input,
            Op::Replace { weight, token } => {
                part.pieces.push(Piece::Replace { weight: weight.clone(), token: *token });
            }
            Op::RmsNorm { weight, eps } => {
                let group = graph.weights[weight].shape[0];
                part.pieces.push(Piece::RmsNorm { weight: weight.clone(), group, eps: *eps });
            }
            Op::Linear { weight } => {
                op.anchor = Anchor::Gemm;
                part.weights.push(weight.clone());
            }
            Op::Bias { weight } => part.pieces.push(Piece::Bias { weight: weight.clone(), operand: 0 }),
            Op::Rope { rope, head_dim } => {
                part.pieces.push(Piece::Rope { rope: rope.clone(), head_dim: *head_dim });
            }
            Op::KvWrite { cache } => {
                // Two columns blocks of two inputs; it has no value, attention is ordered by the cache.
                let keys = Part { pieces: vec![Piece::WriteKeys(*cache)], ..part.clone() };
                let values = Part { pieces: vec![Piece::WriteValues(*cache)], ..part };
                op.parts = vec![keys, values];
                fused.ops.push(op);
                continue;
            }
            Op::Scale { factor } => part.pieces.push(Piece::Scale(*factor)),
            Op::DynamicConv { weight, side, group } => {
                op.anchor = Anchor::DynamicConv { weight: weight.clone(), side: *side, group: *group };
            }
            Op::TopK { k, factor, softcap } => {
                op.anchor = Anchor::TopK { k: *k, factor: *factor, softcap: *softcap };
            }
            Op::PairScores { predecessor, successor } => {
                let (predecessor, successor) = (predecessor.clone(), successor.clone());
                op.anchor = Anchor::PairScores { predecessor, successor };
            }
            Op::Route(router) => op.anchor = Anchor::Route(router.clone()),
            Op::ExpertLinear { weight, per_slot } => {
                let top_k = graph.node(operands[1]).ty.cols;
                op.anchor = Anchor::Experts { top_k, per_slot: *per_slot };
                part.cols = graph.weights[weight].shape[1];
                part.weights.push(weight.clone());
            }
            Op::ExpertBias { weight } => {
                part.pieces.push(Piece::ExpertBias { weight: weight.clone(), operand: 0 });
            }
            Op::Combine => part.pieces.push(Piece::Combine),
            Op::Attention { cache, heads, scale, window, sinks, bidirectional } => {
                op.anchor = Anchor::Attention {
                    cache: *cache,
                    heads: *heads,
                    scale: *scale,
                    window: *window,
                    sinks: sinks.clone(),
                    bidirectional: *bidirectional,
                };
                op.after_cache.push(*cache);
            }
            Op::AllReduce { ranks } => part.pieces.push(Piece::AllReduce(*ranks)),
            Op::Gated { activation } => part.pieces.push(Piece::Gated(*activation)),
            Op::Add => {
                let residual = op.inputs.remove(0);
                part.pieces.push(Piece::Residual(residual));
            }
            Op::SelectRows => part.pieces.push(Piece::SelectRows),
            Op::Quantize => part.pieces.push(Piece::Quantize),
            Op::Logits => {}
            Op::Taps => op.anchor = Anchor::Taps,
        }
        part.pieces.push(match node.op {
            Op::Logits => Piece::Logits(value),
            _ => Piece::Store(value),
        });
        op.parts = vec![part];
        fused.values.push(Value { name: node.name.clone(), ty: node.ty });
        value_of.insert(id, value);
        fused.ops.push(op);
    }
    Ok(fused)
}

/// What a rule may ask about the chain that it would append to.
struct At {
    /// The chain hangs on a GEMM's part with one weight.
    gemm: bool,
    /// The chain hangs on rows.
    rows: bool,
    /// The chain ends in a gated product of whole blocks of 32 columns.
    gated: bool,
    /// The chain hangs on attention whose heads are whole blocks of 32 columns.
    blocks_per_head: bool,
}

/// Appends an operator on rows whose first piece satisfies `fits` to the chain that makes its only
/// input, if nobody else reads that.
fn append(fused: &mut Fused, fits: fn(&Piece, &At) -> bool) -> bool {
    let links = fused.links();
    for user in 0..fused.ops.len() {
        let op = &fused.ops[user];
        let ([input], [part], Anchor::Rows) = (&op.inputs[..], &op.parts[..], &op.anchor) else { continue };
        let Some((producer, part_of)) = links.producer(*input) else { continue };
        if links.uses(*input) != 1 {
            continue;
        }
        let target = &fused.ops[producer];
        let target_part = &target.parts[part_of];
        let at = At {
            gemm: target.anchor == Anchor::Gemm && target_part.weights.len() == 1,
            rows: target.anchor == Anchor::Rows,
            gated: target_part.pieces.iter().any(|piece| matches!(piece, Piece::Gated(_)))
                && target.anchor.has_weights(),
            blocks_per_head: match target.anchor {
                Anchor::Attention { cache, .. } => {
                    fused.caches[cache].v_dim.is_multiple_of(tilec_ir::format::ACT_BLOCK)
                }
                _ => false,
            },
        };
        // Behind a quantized value nothing but its store can come.
        if target_part.pieces.contains(&Piece::Quantize) || !fits(&part.pieces[0], &at) {
            continue;
        }
        let pieces = part.pieces.clone();
        let chain = &mut fused.ops[producer].parts[part_of].pieces;
        chain.pop();
        chain.extend(pieces);
        fused.ops.remove(user);
        return true;
    }
    false
}

/// A sum over ranks behind the product that makes this rank's part for it alone: a GEMM, or experts whose
/// slots are added up.
fn all_reduce(fused: &mut Fused) -> bool {
    let links = fused.links();
    for user in 0..fused.ops.len() {
        let op = &fused.ops[user];
        let ([input], [part], Anchor::Rows) = (&op.inputs[..], &op.parts[..], &op.anchor) else { continue };
        let Some((producer, 0)) = links.producer(*input) else { continue };
        let target = &fused.ops[producer];
        let [made] = &target.parts[..] else { continue };
        let row = target.anchor == Anchor::Gemm
            || matches!(target.anchor, Anchor::Experts { .. }) && made.pieces.contains(&Piece::Combine);
        let fits = matches!(part.pieces[0], Piece::AllReduce(_))
            && row
            && made.weights.len() == 1
            && links.uses(*input) == 1;
        if !fits {
            continue;
        }
        let pieces = part.pieces.clone();
        let chain = &mut fused.ops[producer].parts[0].pieces;
        chain.pop();
        chain.extend(pieces);
        fused.ops.remove(user);
        return true;
    }
    false
}

/// An operator on the slots of experts, behind the product that makes its first input for it alone,
/// becomes part of that product's chain.
fn expert_epilogue(fused: &mut Fused) -> bool {
    let links = fused.links();
    for user in 0..fused.ops.len() {
        let op = &fused.ops[user];
        let ([input, routes], [part], Anchor::Rows) = (&op.inputs[..], &op.parts[..], &op.anchor) else {
            continue;
        };
        if !matches!(part.pieces[0], Piece::ExpertBias { .. } | Piece::Combine) {
            continue;
        }
        let Some((producer, 0)) = links.producer(*input) else { continue };
        let target = &fused.ops[producer];
        let fits = matches!(target.anchor, Anchor::Experts { .. })
            && target.inputs.get(1) == Some(routes)
            && target.parts[0].weights.len() == 1
            && !target.parts[0].pieces.contains(&Piece::Combine)
            && links.uses(*input) == 1;
        if !fits {
            continue;
        }
        let (pieces, cols) = (part.pieces.clone(), target.parts[0].cols);
        let chain = &mut fused.ops[producer].parts[0];
        chain.pieces.pop();
        chain.pieces.extend(pieces);
        chain.cols = cols;
        fused.ops.remove(user);
        return true;
    }
    false
}

/// Gate, up and their gated product become one GEMM with interleaved weights.
fn gated_pair(fused: &mut Fused) -> bool {
    let links = fused.links();
    for user in 0..fused.ops.len() {
        let op = &fused.ops[user];
        let ([gate, up], [Part { pieces, .. }]) = (&op.inputs[..], &op.parts[..]) else { continue };
        let [Piece::Gated(activation), sink] = &pieces[..] else { continue };
        let (Some((gate_op, 0)), Some((up_op, 0))) = (links.producer(*gate), links.producer(*up)) else {
            continue;
        };
        let whole = |index: usize, value: ValueId| {
            let op = &fused.ops[index];
            op.anchor.has_weights()
                && op.parts.len() == 1
                && op.parts[0].weights.len() == 1
                && op.parts[0].pieces[..op.parts[0].pieces.len() - 1]
                    .iter()
                    .all(|piece| matches!(piece, Piece::Bias { .. } | Piece::ExpertBias { .. }))
                && links.uses(value) == 1
        };
        let same_format = || {
            let format = |index: usize| fused.weights[&fused.ops[index].parts[0].weights[0]].format;
            format(gate_op) == format(up_op)
        };
        if gate_op == up_op
            || fused.ops[gate_op].anchor != fused.ops[up_op].anchor
            || fused.ops[gate_op].inputs != fused.ops[up_op].inputs
            || !whole(gate_op, *gate)
            || !whole(up_op, *up)
            || !same_format()
        {
            continue;
        }
        let mut pieces = Vec::new();
        for (operand, index) in [gate_op, up_op].into_iter().enumerate() {
            for piece in &fused.ops[index].parts[0].pieces {
                match piece {
                    Piece::Bias { weight, .. } => {
                        pieces.push(Piece::Bias { weight: weight.clone(), operand });
                    }
                    Piece::ExpertBias { weight, .. } => {
                        pieces.push(Piece::ExpertBias { weight: weight.clone(), operand });
                    }
                    _ => {}
                }
            }
        }
        pieces.extend([Piece::Gated(*activation), sink.clone()]);
        let (first, second) = (gate_op.min(up_op), gate_op.max(up_op));
        let part = Part {
            weights: vec![
                fused.ops[gate_op].parts[0].weights[0].clone(),
                fused.ops[up_op].parts[0].weights[0].clone(),
            ],
            cols: fused.ops[gate_op].parts[0].cols,
            pieces,
        };
        let merged = FusedOp { name: op.name.clone(), parts: vec![part], ..fused.ops[first].clone() };
        // The product's place: the chain may read what lies between the two GEMMs and it.
        fused.ops[user] = merged;
        fused.ops.remove(second);
        fused.ops.remove(first);
        return true;
    }
    false
}

/// An addition whose second operand a GEMM (or experts, or a convolution) makes for it alone becomes the end of
/// that one's chain.
fn residual(fused: &mut Fused) -> bool {
    let links = fused.links();
    for user in 0..fused.ops.len() {
        let op = &fused.ops[user];
        let ([input], [Part { pieces, .. }]) = (&op.inputs[..], &op.parts[..]) else { continue };
        let [Piece::Residual(residual), sink] = &pieces[..] else { continue };
        let candidates = [(*input, *residual), (*residual, *input)];
        for (made, added) in candidates {
            let Some((producer, part)) = links.producer(made) else { continue };
            let target = &fused.ops[producer];
            let rows = target.anchor == Anchor::Gemm
                || target.parts[part].pieces.contains(&Piece::Combine) && target.anchor.has_weights();
            let conv = matches!(target.anchor, Anchor::DynamicConv { .. });
            let plain = (rows && target.parts[part].weights.len() == 1 || conv)
                && target.parts.len() == 1
                && !target.parts[part].pieces.contains(&Piece::Quantize);
            if !plain || made == added || links.uses(made) != 1 {
                continue;
            }
            let tail = [Piece::Residual(added), sink.clone()];
            let mut merged = target.clone();
            merged.parts[part].pieces.pop();
            merged.parts[part].pieces.extend(tail);
            merged.name = op.name.clone();
            fused.ops[user] = merged;
            fused.ops.remove(producer);
            return true;
        }
    }
    false
}

/// Keys and values that GEMMs make for a cache alone are written by those GEMMs.
fn kv_write(fused: &mut Fused) -> bool {
    let links = fused.links();
    for user in 0..fused.ops.len() {
        let op = &fused.ops[user];
        let ([keys, values], [Part { pieces, .. }, _]) = (&op.inputs[..], &op.parts[..]) else { continue };
        let [Piece::WriteKeys(cache)] = pieces[..] else { continue };
        let (Some(of_keys), Some(of_values)) = (links.producer(*keys), links.producer(*values)) else {
            continue;
        };
        let fits = |(index, part): (usize, usize), value: ValueId| {
            let op = &fused.ops[index];
            op.anchor == Anchor::Gemm && op.parts[part].weights.len() == 1 && links.uses(value) == 1
        };
        if !fits(of_keys, *keys) || !fits(of_values, *values) {
            continue;
        }
        for ((index, part), sink) in
            [(of_keys, Piece::WriteKeys(cache)), (of_values, Piece::WriteValues(cache))]
        {
            let chain = &mut fused.ops[index].parts[part].pieces;
            chain.pop();
            chain.push(sink);
        }
        fused.ops.remove(user);
        return true;
    }
    false
}

/// Two GEMMs of one layer (the head stays alone) on the same input become one, its parts side by side, if nothing that the
/// later one's parts need is made between them.
fn siblings(fused: &mut Fused) -> bool {
    let links = fused.links();
    for first in 0..fused.ops.len() {
        if fused.ops[first].anchor != Anchor::Gemm || fused.ops[first].layer.is_none() {
            continue;
        }
        for second in first + 1..fused.ops.len() {
            let (a, b) = (&fused.ops[first], &fused.ops[second]);
            let independent = b.reads().iter().all(|value| match links.producer(*value) {
                Some((producer, _)) => producer < first,
                None => false,
            });
            if b.anchor != Anchor::Gemm || a.inputs != b.inputs || a.layer != b.layer || !independent {
                continue;
            }
            let second = fused.ops.remove(second);
            let a = &mut fused.ops[first];
            a.name = joined_name(&a.name, &second.name);
            a.parts.extend(second.parts);
            return true;
        }
    }
    false
}

/// `l0.q_rope` and `l0.k_rope` make `l0.q_rope+k_rope`.
fn joined_name(a: &str, b: &str) -> String {
    let common = a.rfind('.').map_or(0, |dot| dot + 1);
    if a[..common] == b[..common.min(b.len())] { format!("{a}+{}", &b[common..]) } else { format!("{a}+{b}") }
}
