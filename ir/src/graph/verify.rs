//! What must hold of a whole graph, beyond the shape rule of each operator.
//!
//! Run after every pass: a pass that leaves a graph which this accepts may still compute the wrong
//! numbers, but the levels below will not trip over its shape.

use super::infer::{expert_matrices, expert_vectors};
use super::{Graph, GraphError, NodeId, Op, Slice, Type, infer};
use petgraph::Direction;
use std::collections::{BTreeMap, BTreeSet};

/// Checks a graph; `Ok` means that every level below may rely on all of this:
///
/// * operands are numbered 0, 1, ... without gaps, and there is no cycle;
/// * the type of every value is what its operator's shape rule gives;
/// * names are unique, and every value but the results is used;
/// * there is one [`Op::Logits`], read by nothing but [`Op::TopK`], and at most one [`Op::Taps`] and one
///   [`Op::PairScores`]; a graph whose results are keys and values in its caches has none of them;
/// * each cache has one [`Op::KvWrite`] and one [`Op::Attention`], the latter behind the former; a graph
///   without logits has no attention;
/// * the operators on experts have weights for as many experts as their routes choose from, and scores of
///   pairs rows for as many tokens as their candidates are chosen from;
/// * layers do not decrease along an edge, also through operators that belong to no layer;
/// * every declared weight and rope is used, has sensible numbers, and every used one is declared.
///
/// # Errors
/// All that does not hold, each with the node, weight, rope or cache that it is about.
pub fn verify(graph: &Graph) -> Result<(), Vec<GraphError>> {
    let mut errors = Vec::new();
    names(graph, &mut errors);
    operands_and_types(graph, &mut errors);
    uses(graph, &mut errors);
    caches(graph, &mut errors);
    experts(graph, &mut errors);
    tables(graph, &mut errors);
    match graph.topological() {
        Ok(order) => layers(graph, &order, &mut errors),
        Err(cycle) => errors.push(cycle),
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

fn names(graph: &Graph, errors: &mut Vec<GraphError>) {
    let mut seen = BTreeSet::new();
    for node in graph.nodes.node_weights() {
        if node.name.is_empty() {
            errors.push(graph.error("", format!("a value of {} has no name", node.op.name())));
        } else if !seen.insert(&node.name) {
            errors.push(graph.error(&node.name, "two values have this name".into()));
        }
    }
}

fn operands_and_types(graph: &Graph, errors: &mut Vec<GraphError>) {
    for id in graph.ids() {
        let node = graph.node(id);
        let mut numbers: Vec<u32> =
            graph.nodes.edges_directed(id, Direction::Incoming).map(|edge| *edge.weight()).collect();
        numbers.sort_unstable();
        if !numbers.iter().copied().eq(0..numbers.len() as u32) {
            let what = format!("operands are numbered {numbers:?}, not from 0 without gaps");
            errors.push(graph.error(&node.name, what));
            continue;
        }
        let types: Vec<Type> = graph.operands(id).into_iter().map(|operand| graph.node(operand).ty).collect();
        match infer(graph, &node.op, &types) {
            Ok(ty) if ty == node.ty => {}
            Ok(ty) => errors.push(graph.error(&node.name, format!("is {ty}, but says {}", node.ty))),
            Err(what) => errors.push(graph.error(&node.name, what)),
        }
    }
}

fn uses(graph: &Graph, errors: &mut Vec<GraphError>) {
    let (mut logits, mut taps, mut pairs, mut unread_caches) = (0, 0, 0, 0);
    for id in graph.ids() {
        let node = graph.node(id);
        let used = graph.nodes.edges_directed(id, Direction::Outgoing).next().is_some();
        match (&node.op, used) {
            (Op::Logits, _) => {
                let chosen = |user: NodeId| matches!(graph.node(user).op, Op::TopK { .. });
                if !graph.users(id).into_iter().all(|(user, _)| chosen(user)) {
                    errors.push(graph.error(&node.name, "logits are used again".into()));
                }
                logits += 1;
                if logits > 1 {
                    errors.push(graph.error(&node.name, "is a second set of logits".into()));
                }
            }
            (Op::PairScores { .. }, true) => {
                errors.push(graph.error(&node.name, "scores of pairs are used again".into()));
            }
            (Op::PairScores { .. }, false) => {
                pairs += 1;
                if pairs > 1 {
                    errors.push(graph.error(&node.name, "is a second set of scores of pairs".into()));
                }
            }
            (Op::Taps, true) => errors.push(graph.error(&node.name, "taps are used again".into())),
            (Op::Taps, false) => {
                taps += 1;
                if taps > 1 {
                    errors.push(graph.error(&node.name, "is a second set of taps".into()));
                }
            }
            (_, true) => {}
            (Op::KvWrite { .. }, false) if !has_logits(graph) => unread_caches += 1,
            (_, false) => errors.push(graph.error(&node.name, "is never used".into())),
        }
    }
    if logits == 0 && unread_caches == 0 {
        errors.push(graph.error("", "there are no logits".into()));
    }
}

fn has_logits(graph: &Graph) -> bool {
    graph.nodes.node_weights().any(|node| node.op == Op::Logits)
}

fn caches(graph: &Graph, errors: &mut Vec<GraphError>) {
    let mut writes: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
    let mut reads: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
    for id in graph.ids() {
        match graph.node(id).op {
            Op::KvWrite { cache } => writes.entry(cache).or_default().push(id),
            Op::Attention { cache, .. } => {
                reads.entry(cache).or_default().push(id);
                let order = graph.operands(id).get(1).map(|operand| &graph.node(*operand).op);
                if let Some(Op::KvWrite { cache: written }) = order
                    && *written != cache
                {
                    let what = format!("reads cache {cache} behind a write of cache {written}");
                    errors.push(graph.error(&graph.node(id).name, what));
                }
            }
            _ => {}
        }
    }
    for (number, cache) in graph.caches.iter().enumerate() {
        let place = format!("cache {number}");
        for (verb, users) in [("written", writes.get(&number)), ("read", reads.get(&number))] {
            let users = users.map_or(&[][..], Vec::as_slice);
            let wanted = if verb == "read" && !has_logits(graph) { 0 } else { 1 };
            if users.len() != wanted {
                let names: Vec<&str> = users.iter().map(|id| graph.node(*id).name.as_str()).collect();
                let wanted = if wanted == 1 { "by one operator" } else { "where there are no logits" };
                errors.push(graph.error(&place, format!("is {verb} by {names:?}, not {wanted}")));
            }
        }
        let position = cache.qk_dim.checked_add(cache.v_dim).and_then(|n| n.checked_mul(cache.kv_heads));
        if cache.kv_heads == 0 || cache.qk_dim == 0 || cache.v_dim == 0 || position.is_none() {
            errors.push(graph.error(&place, format!("cannot have this shape: {cache:?}")));
        }
    }
}

/// Operators on experts against the scores that their routes were made of.
fn experts(graph: &Graph, errors: &mut Vec<GraphError>) {
    for id in graph.ids() {
        let node = graph.node(id);
        let rows = |weight: &String| graph.weights.get(weight).map(|weight| weight.shape[0]);
        let (have, routes) = match &node.op {
            Op::ExpertLinear { weight, .. } => (expert_matrices(graph, weight).ok().map(|shape| shape.0), 1),
            Op::ExpertBias { weight } => (expert_vectors(graph, weight).ok().map(|shape| shape.0), 1),
            Op::PairScores { predecessor, successor } => match (rows(predecessor), rows(successor)) {
                (Some(one), Some(other)) if one != other => {
                    let what = format!("has {one} and {other} tokens before and behind");
                    errors.push(graph.error(&node.name, what));
                    continue;
                }
                (have, _) => (have, 0),
            },
            _ => continue,
        };
        let tokens = routes == 0;
        let Some(routes) = graph.operands(id).get(routes).copied() else { continue };
        let (Some(have), Some(scores)) = (have, graph.operands(routes).first().copied()) else { continue };
        let chosen_from = graph.node(scores).ty.cols;
        let read = graph.nodes.node_weights().filter_map(|node| match &node.op {
            Op::Embed { weight } => graph.weights.get(weight).map(|table| table.shape[0]),
            _ => None,
        });
        if let Some(most) = read.max().filter(|most| tokens && *most > have) {
            let what = format!("has rows for {have} tokens, rows of the step may have {most}");
            errors.push(graph.error(&node.name, what));
        }
        match &graph.node(routes).op {
            Op::Route(_) if !tokens && have == chosen_from => {}
            Op::TopK { .. } if tokens && have == chosen_from => {}
            Op::Route(_) if !tokens => {
                let what = format!("has weights for {have} experts, its routes choose from {chosen_from}");
                errors.push(graph.error(&node.name, what));
            }
            Op::TopK { .. } if tokens => {
                let what = format!("has rows for {have} tokens, its candidates are of {chosen_from}");
                errors.push(graph.error(&node.name, what));
            }
            Op::Route(_) | Op::TopK { .. } => {
                errors
                    .push(graph.error(&node.name, "takes experts for tokens, or tokens for experts".into()));
            }
            _ => {}
        }
    }
}

fn tables(graph: &Graph, errors: &mut Vec<GraphError>) {
    let ops = || graph.nodes.node_weights().map(|node| &node.op);
    let weights: BTreeSet<&str> = ops().flat_map(Op::weights).collect();
    for (name, weight) in &graph.weights {
        if !weights.contains(name.as_str()) {
            errors.push(graph.error(name, "this weight is never used".into()));
        }
        let size = weight.shape.iter().try_fold(1usize, |size, extent| size.checked_mul(*extent));
        if weight.shape.is_empty() || matches!(size, None | Some(0)) {
            errors.push(graph.error(name, format!("a weight cannot have the shape {:?}", weight.shape)));
        }
        let sound = |slice: &Slice| {
            let axes = slice.start.iter().zip(&slice.of).zip(&weight.shape);
            (slice.start.len(), slice.of.len()) == (weight.shape.len(), weight.shape.len())
                && axes
                    .clone()
                    .all(|((start, of), len)| start.checked_add(*len).is_some_and(|end| end <= *of))
        };
        if let Some(slice) = weight.slice.as_ref().filter(|slice| !sound(slice)) {
            let what = format!("{:?} from {:?} on is no part of {:?}", weight.shape, slice.start, slice.of);
            errors.push(graph.error(name, what));
            continue;
        }
        let size = weight.whole_shape().iter().try_fold(1usize, |size, extent| size.checked_mul(*extent));
        if size.is_none() && weight.slice.is_some() {
            errors.push(graph.error(name, "the whole weight is larger than can be counted".into()));
        }
        if let (Some(view), Some(size)) = (&weight.view, size)
            && (view.block == 0 || view.stride < view.block || view.element(size.max(1) - 1).is_none())
        {
            errors.push(graph.error(name, format!("a view cannot be {view:?}")));
        }
    }
    let ropes: BTreeSet<&str> = ops()
        .filter_map(|op| if let Op::Rope { rope, .. } = op { Some(rope.as_str()) } else { None })
        .collect();
    for (name, spec) in &graph.ropes {
        if !ropes.contains(name.as_str()) {
            errors.push(graph.error(name, "this rope is never used".into()));
        }
        if let Err(what) = spec.check() {
            errors.push(graph.error(name, what));
        }
    }
}

fn layers(graph: &Graph, order: &[NodeId], errors: &mut Vec<GraphError>) {
    // The last layer that each value depends on.
    let mut reached: BTreeMap<NodeId, usize> = BTreeMap::new();
    for id in order {
        let node = graph.node(*id);
        let before = graph.operands(*id).iter().filter_map(|operand| reached.get(operand)).max().copied();
        if let (Some(layer), Some(before)) = (node.layer, before)
            && layer < before
        {
            let what = format!("belongs to layer {layer} but needs a value of layer {before}");
            errors.push(graph.error(&node.name, what));
        }
        if let Some(layer) = node.layer.max(before) {
            reached.insert(*id, layer);
        }
    }
}
