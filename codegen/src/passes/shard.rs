//! Tensor parallelism: a model's graph becomes that of one of several ranks.
//!
//! Every rank has whole query and KV heads (a KV head is there on several ranks if there are fewer heads
//! than ranks), a range of the columns between the two halves of every feed-forward layer and of every
//! expert, and a range of the vocabulary's logits. Products in front of these ranges give up rows of their
//! matrices, those behind them columns; what the latter make is a part of a sum, which an
//! [`Op::AllReduce`] completes where it is first needed whole. Everything else (residual, norms, routers,
//! the embedding) is there on every rank.
//!
//! The pass works on the graph and not on fused operators: the shape rules check every cut, the
//! interpreter can run all ranks in lock step as an oracle, and fusion treats the sum as one more operator
//! behind a product.
//!
//! Biases: that of a product with a part of a sum is added behind the sum, so that all ranks run the same
//! program. That of experts lies before the sum over slots; only rank 0 has it.

use super::resident::kernel_format;
use std::collections::{BTreeMap, BTreeSet};
use tilec_ir::format::{ACT_BLOCK, Format};
use tilec_ir::graph::{Graph, GraphError, NodeId, Op, Slice, View, Weight, verify};
use tilec_ir::launch::OCTET;
use tilec_ir::pack::Share;
use tilec_ir::spec::Shard;

/// Why a model cannot be shared out among so many ranks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// Something has no equal share for every rank.
    #[error(
        "target.gpus is {ranks}, but the {count} {what} of {op} do not divide among so many: use {remedy}"
    )]
    Uneven {
        /// The operator.
        op: String,
        /// What is counted.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// Among how many.
        ranks: usize,
        /// Numbers of GPUs that would do.
        remedy: String,
    },
    /// A share begins or ends inside of a block with one scale.
    #[error(
        "target.gpus is {ranks}, but {len} of the {of} {axis} of {weight} for each are no multiple of {block}, \
         which {format} wants: use fewer GPUs, or set precision.{key} to bf16"
    )]
    Block {
        /// Name of the weight.
        weight: String,
        /// Rows or columns.
        axis: &'static str,
        /// How many a rank would have.
        len: usize,
        /// Of how many.
        of: usize,
        /// How many lie together.
        block: usize,
        /// Format that the kernel reads.
        format: String,
        /// Among how many.
        ranks: usize,
        /// Key of the spec that would help.
        key: &'static str,
    },
    /// An operator that has no share.
    #[error("{op}: {what}")]
    Op {
        /// The operator.
        op: String,
        /// What does not work.
        what: String,
    },
    /// The graph is broken.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// Makes the graph of `shard.rank` of a whole model's graph, after the precision pass.
///
/// # Errors
/// When heads, columns or the vocabulary have no equal shares, a share would cut a block that has one
/// scale, or the graph has operators that are not shared out (those of drafts).
pub fn shard(graph: &Graph, shard: Shard) -> Result<Graph, ShardError> {
    let mut new = Graph::new(format!("{}, {shard}", graph.name));
    new.ropes = graph.ropes.clone();
    let mut sharding = Sharding { old: graph, new, shard, made: BTreeMap::new(), sums: BTreeMap::new() };
    for (number, cache) in graph.caches.iter().enumerate() {
        let mut cache = *cache;
        cache.kv_heads = sharding.kv_heads(&format!("cache {number}"), cache.kv_heads)?.len;
        sharding.new.caches.push(cache);
    }
    for id in graph.topological()? {
        sharding.node(id)?;
    }
    verify(&sharding.new).map_err(|mut errors| errors.swap_remove(0))?;
    Ok(sharding.new)
}

/// What a rank holds of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// All of it, as every rank.
    Whole,
    /// A share of its columns (of each slot's, behind experts).
    Share(Share),
    /// A part of the sum that it is.
    Part,
}

/// What a product's columns are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Columns {
    /// Query heads.
    Queries { heads: usize },
    /// KV heads.
    Kv { heads: usize },
    /// Those between the halves of a feed-forward layer.
    Intermediate,
    /// Logits.
    Vocabulary,
    /// Scores of experts.
    Scores,
}

struct Sharding<'g> {
    old: &'g Graph,
    new: Graph,
    shard: Shard,
    /// Values of the new graph by those of the old.
    made: BTreeMap<NodeId, (NodeId, Held)>,
    /// Sums of the values that ranks have parts of.
    sums: BTreeMap<NodeId, NodeId>,
}

impl Sharding<'_> {
    fn node(&mut self, id: NodeId) -> Result<(), ShardError> {
        let old = self.old;
        let node = old.node(id);
        let operands = old.operands(id);
        let name = node.name.as_str();
        let refuse = |what: &str| ShardError::Op { op: name.to_string(), what: what.to_string() };
        let first = operands.first().map(|operand| self.made[operand]);
        let mut op = node.op.clone();
        let (inputs, held): (Vec<NodeId>, Held) = match &mut op {
            Op::AllReduce { .. } => return Err(refuse("is the sum of a graph that is shared out already")),
            Op::Taps
            | Op::Input { .. }
            | Op::Replace { .. }
            | Op::DynamicConv { .. }
            | Op::TopK { .. }
            | Op::PairScores { .. } => {
                return Err(refuse("belongs to a draft, and drafts are not shared out yet"));
            }
            Op::Embed { weight } => {
                *weight = self.whole_weight(weight)?;
                (Vec::new(), Held::Whole)
            }
            Op::Linear { weight } => match first {
                Some((input, Held::Share(share))) => {
                    *weight = self.slice(weight, 1, share, false)?;
                    (vec![input], Held::Part)
                }
                _ => {
                    let input = self.whole(id, operands[0])?;
                    let share = self.product(id, node.ty.cols)?;
                    *weight = self.slice(weight, 0, share, false)?;
                    (vec![input], held(share))
                }
            },
            Op::ExpertLinear { weight, per_slot } => {
                let routes = self.whole(id, operands[1])?;
                match first {
                    Some((input, Held::Share(share))) if *per_slot => {
                        *weight = self.slice(weight, 2, share, true)?;
                        (vec![input, routes], Held::Part)
                    }
                    _ => {
                        let input = self.whole(id, operands[0])?;
                        let share = self.product(id, old.weights[weight.as_str()].shape[1])?;
                        *weight = self.slice(weight, 1, share, true)?;
                        (vec![input, routes], held(share))
                    }
                }
            }
            Op::ExpertBias { weight } => {
                let routes = self.whole(id, operands[1])?;
                match self.made[&operands[0]] {
                    // One rank's is enough: behind the sum over slots it could not be told apart.
                    (input, Held::Part) if self.shard.rank > 0 => {
                        self.made.insert(id, (input, Held::Part));
                        return Ok(());
                    }
                    (input, held @ Held::Share(share)) => {
                        *weight = self.slice(weight, 1, share, true)?;
                        (vec![input, routes], held)
                    }
                    (input, held) => {
                        *weight = self.whole_weight(weight)?;
                        (vec![input, routes], held)
                    }
                }
            }
            Op::Bias { weight } => match first {
                Some((input, held @ Held::Share(share))) => {
                    *weight = self.slice(weight, 0, share, false)?;
                    (vec![input], held)
                }
                _ => {
                    *weight = self.whole_weight(weight)?;
                    (vec![self.whole(id, operands[0])?], Held::Whole)
                }
            },
            Op::RmsNorm { weight, .. } => {
                let group = old.weights[weight.as_str()].shape[0];
                *weight = self.whole_weight(weight)?;
                self.groups(id, operands[0], group)?
            }
            Op::Rope { head_dim, .. } => self.groups(id, operands[0], *head_dim)?,
            Op::Quantize => self.groups(id, operands[0], ACT_BLOCK)?,
            // A factor may come before the sum or behind it.
            Op::Scale { .. } => match first {
                Some((input, held)) => (vec![input], held),
                None => return Err(refuse("has no operand")),
            },
            Op::KvWrite { .. } => {
                let (keys, values) = (self.made[&operands[0]], self.made[&operands[1]]);
                if keys.1 == Held::Part || values.1 == Held::Part {
                    return Err(refuse("writes keys or values that are parts of a sum"));
                }
                // All of what this rank's cache has room for.
                (vec![keys.0, values.0], Held::Whole)
            }
            Op::Attention { cache, heads, sinks, .. } => {
                let (queries, kv) = (self.made[&operands[0]], self.made[&operands[1]]);
                let share = self.even(name, "query heads", *heads)?;
                let shape = &old.caches[*cache];
                let kv_share = self.kv_heads(name, shape.kv_heads)?;
                // The first query head's KV head has to be the first here.
                let group = *heads / shape.kv_heads.max(1);
                let wanted = Share {
                    start: share.start * shape.qk_dim,
                    len: share.len * shape.qk_dim,
                    of: *heads * shape.qk_dim,
                };
                if queries.1 != Held::Share(wanted) || share.start / group.max(1) != kv_share.start {
                    return Err(refuse("its query heads do not lie with their KV heads"));
                }
                if let Some(sinks) = sinks {
                    *sinks = self.slice(sinks, 0, share, false)?;
                }
                *heads = share.len;
                let of = |heads: usize| heads * shape.v_dim;
                let out = Share { start: of(share.start), len: of(share.len), of: of(share.of) };
                (vec![queries.0, kv.0], Held::Share(out))
            }
            Op::Gated { .. } => {
                let (gate, up) = (self.made[&operands[0]], self.made[&operands[1]]);
                match (gate.1, up.1) {
                    (Held::Share(a), Held::Share(b)) if a == b => (vec![gate.0, up.0], Held::Share(a)),
                    _ => (vec![self.whole(id, operands[0])?, self.whole(id, operands[1])?], Held::Whole),
                }
            }
            Op::Route(router) => {
                if let Some(correction) = &mut router.correction {
                    *correction = self.whole_weight(correction)?;
                }
                (vec![self.whole(id, operands[0])?], Held::Whole)
            }
            Op::Combine => {
                let routes = self.whole(id, operands[1])?;
                match self.made[&operands[0]] {
                    (_, Held::Share(_)) => return Err(refuse("sums slots of which a rank has a share")),
                    (input, held) => (vec![input, routes], held),
                }
            }
            Op::Add => {
                let (a, b) = (self.made[&operands[0]], self.made[&operands[1]]);
                match (a.1, b.1) {
                    // A mixture and its shared expert: one sum for both.
                    (Held::Part, Held::Part) => (vec![a.0, b.0], Held::Part),
                    _ => (vec![self.whole(id, operands[0])?, self.whole(id, operands[1])?], Held::Whole),
                }
            }
            Op::SelectRows => (vec![self.whole(id, operands[0])?], Held::Whole),
            // Every rank has those of its share of the vocabulary.
            Op::Logits => match first {
                Some((input, held @ (Held::Share(_) | Held::Whole))) => (vec![input], held),
                _ => (vec![self.whole(id, operands[0])?], Held::Whole),
            },
        };
        let made = self.new.add(name, node.layer, op, &inputs)?;
        self.made.insert(id, (made, held));
        Ok(())
    }

    /// The new value of `operand` for an operator that needs all of it: the sum, where it is one.
    fn whole(&mut self, user: NodeId, operand: NodeId) -> Result<NodeId, ShardError> {
        match self.made[&operand] {
            (value, Held::Whole) => Ok(value),
            (part, Held::Part) => {
                if let Some(sum) = self.sums.get(&operand) {
                    return Ok(*sum);
                }
                let node = self.old.node(operand);
                let op = Op::AllReduce { ranks: self.shard.ranks };
                let sum = self.new.add(format!("{}_sum", node.name), node.layer, op, &[part])?;
                self.sums.insert(operand, sum);
                Ok(sum)
            }
            (_, Held::Share(_)) => {
                let what =
                    format!("needs all of %{}, of which a rank has a share", self.old.node(operand).name);
                Err(ShardError::Op { op: self.old.node(user).name.clone(), what })
            }
        }
    }

    /// The operand of an operator that works on groups of columns: a share of whole groups, or all.
    fn groups(
        &mut self,
        id: NodeId,
        operand: NodeId,
        group: usize,
    ) -> Result<(Vec<NodeId>, Held), ShardError> {
        match self.made[&operand] {
            (input, held @ Held::Share(share)) => {
                if [share.start, share.len].iter().any(|columns| !columns.is_multiple_of(group.max(1))) {
                    let (start, end) = (share.start, share.end());
                    let what =
                        format!("columns {start} to {end} of its operand are not whole groups of {group}");
                    return Err(ShardError::Op { op: self.old.node(id).name.clone(), what });
                }
                Ok((vec![input], held))
            }
            _ => Ok((vec![self.whole(id, operand)?], Held::Whole)),
        }
    }

    /// The share of the `cols` columns that a product makes of whole rows, by what they are used for.
    fn product(&self, id: NodeId, cols: usize) -> Result<Share, ShardError> {
        let name = self.old.node(id).name.as_str();
        let mut uses = self.columns(id).into_iter();
        let all = Share { start: 0, len: cols, of: cols };
        let Some(used) = uses.next() else { return Ok(all) };
        if let Some(other) = uses.next() {
            let what = format!("its columns are {used:?} and {other:?} at once");
            return Err(ShardError::Op { op: name.to_string(), what });
        }
        let of_heads = |share: Share| {
            let width = cols / share.of.max(1);
            Share { start: share.start * width, len: share.len * width, of: cols }
        };
        match used {
            Columns::Scores => Ok(all),
            Columns::Queries { heads } => Ok(of_heads(self.even(name, "query heads", heads)?)),
            Columns::Kv { heads } => Ok(of_heads(self.kv_heads(name, heads)?)),
            Columns::Intermediate => self.even(name, "intermediate columns", cols),
            Columns::Vocabulary => self.even(name, "logits", cols),
        }
    }

    /// What a product's columns are used for.
    fn columns(&self, product: NodeId) -> BTreeSet<Columns> {
        let mut found = BTreeSet::new();
        let mut values = vec![product];
        while let Some(value) = values.pop() {
            for (user, operand) in self.old.users(value) {
                found.extend(match &self.old.node(user).op {
                    Op::KvWrite { cache } => Some(Columns::Kv { heads: self.old.caches[*cache].kv_heads }),
                    Op::Attention { heads, .. } if operand == 0 => Some(Columns::Queries { heads: *heads }),
                    Op::Gated { .. } => Some(Columns::Intermediate),
                    Op::Logits => Some(Columns::Vocabulary),
                    Op::Route(_) if operand == 0 => Some(Columns::Scores),
                    Op::Scale { .. } | Op::Bias { .. } | Op::ExpertBias { .. } | Op::Quantize => {
                        values.push(user);
                        None
                    }
                    Op::RmsNorm { .. } | Op::Rope { .. } => {
                        values.push(user);
                        None
                    }
                    _ => None,
                });
            }
        }
        found
    }

    /// An equal share of `count` things.
    fn even(&self, op: &str, what: &'static str, count: usize) -> Result<Share, ShardError> {
        let Shard { rank, ranks } = self.shard;
        if !count.is_multiple_of(ranks) {
            return Err(self.uneven(op, what, count, |ranks| count.is_multiple_of(ranks)));
        }
        let len = count / ranks;
        Ok(Share { start: rank * len, len, of: count })
    }

    /// A share of KV heads: as many for every rank, or one for several ranks.
    fn kv_heads(&self, op: &str, heads: usize) -> Result<Share, ShardError> {
        let Shard { rank, ranks } = self.shard;
        if heads > 0 && ranks.is_multiple_of(heads) {
            return Ok(Share { start: rank / (ranks / heads), len: 1, of: heads });
        }
        self.even(op, "KV heads", heads).map_err(|_| {
            let fits = |ranks: usize| heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads.max(1));
            self.uneven(op, "KV heads", heads, fits)
        })
    }

    fn uneven(&self, op: &str, what: &'static str, count: usize, fits: impl Fn(usize) -> bool) -> ShardError {
        let ranks: Vec<String> =
            (1..=8).filter(|ranks| fits(*ranks)).map(|ranks| ranks.to_string()).collect();
        let (op, remedy) = (op.to_string(), ranks.join(" or "));
        ShardError::Uneven { op, what, count, ranks: self.shard.ranks, remedy }
    }

    /// Declares all of a weight, and gives its name.
    fn whole_weight(&mut self, name: &str) -> Result<String, ShardError> {
        let weight = self.old.weights.get(name).cloned();
        let weight = weight.ok_or_else(|| self.old.error(name, "this weight is not declared".into()))?;
        self.declare(name, weight)
    }

    /// Declares the share of a weight along an axis, and gives its name.
    fn slice(&mut self, name: &str, axis: usize, share: Share, expert: bool) -> Result<String, ShardError> {
        let weight = self.old.weights.get(name).cloned();
        let mut weight = weight.ok_or_else(|| self.old.error(name, "this weight is not declared".into()))?;
        if weight.slice.is_some() || weight.shape.get(axis) != Some(&share.of) {
            let what = format!("{share:?} is no share of axis {axis} of {:?}", weight.shape);
            return Err(self.old.error(name, what).into());
        }
        if share.is_whole() {
            return self.declare(name, weight);
        }
        self.check_blocks(name, &weight, axis, share, expert)?;
        let mut start = vec![0; weight.shape.len()];
        start[axis] = share.start;
        weight.slice = Some(Slice { start, of: weight.shape.clone() });
        weight.shape[axis] = share.len;
        self.declare(name, weight)
    }

    /// Whether a share of a matrix keeps what lies together together.
    fn check_blocks(
        &self,
        name: &str,
        weight: &Weight,
        axis: usize,
        share: Share,
        expert: bool,
    ) -> Result<(), ShardError> {
        let matrix = if expert { 3 } else { 2 };
        if weight.shape.len() != matrix {
            return Ok(());
        }
        let format = kernel_format(weight.format);
        let (axis, block) = match axis + 1 == matrix {
            true if format.block == Format::WHOLE_ROW => ("columns", 0),
            true => ("columns", format.block),
            // An octet has one row of scales.
            false if format.block_rows > 1 => ("rows", OCTET),
            false => ("rows", 0),
        };
        if block == 0 || share.start.is_multiple_of(block) && share.len.is_multiple_of(block) {
            return Ok(());
        }
        Err(ShardError::Block {
            weight: name.to_string(),
            axis,
            len: share.len,
            of: share.of,
            block,
            format: format.to_string(),
            ranks: self.shard.ranks,
            key: if expert { "experts" } else { "weights" },
        })
    }

    /// Declares a weight under its name, or under another if that means another part of the tensor: a tied
    /// head is a share of the embedding's.
    fn declare(&mut self, name: &str, mut weight: Weight) -> Result<String, ShardError> {
        if self.new.weights.get(name).is_none_or(|known| *known == weight) {
            self.new.declare_weight(name, weight)?;
            return Ok(name.to_string());
        }
        let all: usize = weight.whole_shape().iter().product();
        let whole = View { tensor: name.to_string(), start: 0, block: all, stride: all };
        weight.view.get_or_insert(whole);
        let part: Vec<String> = match &weight.slice {
            None => vec!["all".into()],
            Some(slice) => std::iter::zip(&slice.start, &weight.shape)
                .map(|(start, len)| format!("{start}..{}", start + len))
                .collect(),
        };
        let name = format!("{name}[{}]", part.join(", "));
        self.new.declare_weight(&name, weight)?;
        Ok(name)
    }
}

/// What a rank holds of the columns of a product of which it makes a share.
fn held(share: Share) -> Held {
    if share.is_whole() { Held::Whole } else { Held::Share(share) }
}
