//! The graph: one decoding step of a model as typed tensor operators.
//!
//! Nodes are operators with one result each; the edges (petgraph) carry operand numbers. Every
//! value has a [`Type`]. Two extents are symbolic: the rows of the step and the rows whose logits
//! are wanted; everything else is a number. The KV cache is not a value: [`Op::KvWrite`] and
//! [`Op::Attention`] name the cache they touch, and a `kv` token orders them.

mod infer;
pub mod interp;
mod op;
mod rope;
mod text;
mod verify;

pub use infer::infer;
pub use op::{ActivationFn, MAX_CANDIDATES, Op, Router, Scoring};
pub use rope::{RopeScaling, RopeSpec};
pub use text::{ParseError, parse};
pub use verify::verify;

use crate::abi::KvType;
use crate::format::Format;
use crate::pack::Share;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::EdgeRef;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// One extent of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// Rows in the step, known when it starts.
    Rows,
    /// Rows whose logits are wanted.
    LogitRows,
    /// A number.
    Const(usize),
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Rows => f.write_str("rows"),
            Dim::LogitRows => f.write_str("logit_rows"),
            Dim::Const(n) => write!(f, "{n}"),
        }
    }
}

/// Element type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elem {
    /// IEEE single.
    F32,
    /// Signed bytes in blocks of 32 with a float32 scale (see [`crate::abi::QuantRows`]).
    Q8,
    /// Experts chosen for a row, each with a weight: as many as there are columns.
    Routes,
    /// The order of a cache: "these positions are written". Has no data.
    Kv,
}

impl Elem {
    /// Name in the text form.
    pub const fn name(self) -> &'static str {
        match self {
            Elem::F32 => "f32",
            Elem::Q8 => "q8",
            Elem::Routes => "routes",
            Elem::Kv => "kv",
        }
    }
}

/// Type of a value: element and `[rows, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Type {
    /// Element type.
    pub elem: Elem,
    /// Rows of the step, or those with logits.
    pub rows: Dim,
    /// Columns.
    pub cols: usize,
}

impl Type {
    /// `f32[rows, cols]`.
    pub const fn f32(cols: usize) -> Type {
        Type { elem: Elem::F32, rows: Dim::Rows, cols }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.elem {
            Elem::Kv => f.write_str("kv"),
            elem => write!(f, "{}[{}, {}]", elem.name(), self.rows, self.cols),
        }
    }
}

/// Stands for the number of an expert in the name of a weight that is stored as one tensor an expert.
pub const EXPERT: &str = "{}";

/// A weight that the graph reads, by its name in the checkpoint (Hugging Face's), in which
/// [`EXPERT`] stands for each expert's number where a weight of all experts is one tensor an expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// `[out features, in features]` of a matrix, `[n]` of a vector; in front of them the number of
    /// experts where each has one.
    pub shape: Vec<usize>,
    /// Format in the checkpoint.
    pub stored: Format,
    /// Format that the kernels read. Equal to `stored` until the precision pass.
    pub format: Format,
    /// Where the whole weight lies if it is not the whole tensor of its own name.
    pub view: Option<View>,
    /// Which part of the whole weight this is, if one rank of several has only its share.
    pub slice: Option<Slice>,
}

/// The part of a weight that one rank of several holds: along every axis as many as the weight's shape
/// says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Slice {
    /// Before the first, along every axis.
    pub start: Vec<usize>,
    /// Shape of the whole weight.
    pub of: Vec<usize>,
}

impl Slice {
    /// Element (row-major) of the whole weight that is element `index` of a slice of the shape `shape`;
    /// `None` if that overflows or the numbers of axes differ.
    pub fn element(&self, shape: &[usize], index: usize) -> Option<usize> {
        if shape.len() != self.start.len() || shape.len() != self.of.len() {
            return None;
        }
        let (mut rest, mut at, mut stride) = (index, 0usize, 1usize);
        for (axis, extent) in shape.iter().enumerate().rev() {
            let place = self.start[axis].checked_add(rest.checked_rem(*extent)?)?;
            at = at.checked_add(place.checked_mul(stride)?)?;
            rest /= extent;
            stride = stride.checked_mul(self.of[axis])?;
        }
        Some(at)
    }
}

/// A weight that is part of a stored tensor: element `i` (row-major) is the tensor's element
/// `start + i / block * stride + i % block`. Rows of a matrix stay whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct View {
    /// Name of the stored tensor; as in [`Weight`], [`EXPERT`] may stand in it.
    #[serde(skip)]
    pub tensor: String,
    /// Elements before the first.
    pub start: usize,
    /// Elements that lie together; a multiple of a matrix's columns.
    pub block: usize,
    /// Elements from one block to the next.
    pub stride: usize,
}

impl View {
    /// The tensor's element that is element `index` of the weight; `None` if that overflows.
    pub fn element(&self, index: usize) -> Option<usize> {
        (index / self.block)
            .checked_mul(self.stride)?
            .checked_add(index % self.block)?
            .checked_add(self.start)
    }
}

impl Weight {
    /// A weight that is a whole tensor and read as stored.
    pub fn whole(shape: impl Into<Vec<usize>>, stored: Format) -> Weight {
        Weight { shape: shape.into(), stored, format: stored, view: None, slice: None }
    }

    /// Shape of the weight that this is a slice of; its own if it is whole.
    pub fn whole_shape(&self) -> &[usize] {
        self.slice.as_ref().map_or(&self.shape, |slice| &slice.of)
    }

    /// What this rank holds along an axis, if it is not all.
    pub fn share(&self, axis: usize) -> Option<Share> {
        let slice = self.slice.as_ref()?;
        let share = Share { start: slice.start[axis], len: self.shape[axis], of: slice.of[axis] };
        Some(share).filter(|share| !share.is_whole())
    }

    /// The name of the stored tensor, [`EXPERT`] included, of the weight called `name`.
    pub fn tensor<'w>(&'w self, name: &'w str) -> &'w str {
        self.view.as_ref().map_or(name, |view| view.tensor.as_str())
    }
}

/// The KV cache of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a key.
    pub qk_dim: usize,
    /// Elements of a value.
    pub v_dim: usize,
    /// Element type.
    pub kv_type: KvType,
}

/// Identifies a node.
pub type NodeId = NodeIndex<u32>;

/// An operator in the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// Unique name of the value, as the text form prints it behind `%`.
    pub name: String,
    /// What it computes.
    pub op: Op,
    /// Type of the result.
    pub ty: Type,
    /// Decoder layer that it belongs to.
    pub layer: Option<usize>,
}

/// A model's decoding step.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Family or model name, for people.
    pub name: String,
    /// Weights by checkpoint name.
    pub weights: BTreeMap<String, Weight>,
    /// Rotary embeddings by name.
    pub ropes: BTreeMap<String, RopeSpec>,
    /// Caches; [`Op::KvWrite`] and [`Op::Attention`] name them by position.
    pub caches: Vec<Cache>,
    /// Operators; edges lead from operand to user and carry the operand's number.
    nodes: StableDiGraph<Node, u32, u32>,
}

/// What is wrong with a graph, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("graph {graph:?}, %{node}: {what}")]
pub struct GraphError {
    /// Name of the graph.
    pub graph: String,
    /// Name of the node.
    pub node: String,
    /// What does not hold.
    pub what: String,
}

impl Graph {
    /// An empty graph.
    pub fn new(name: impl Into<String>) -> Graph {
        Graph { name: name.into(), ..Graph::default() }
    }

    /// Adds an operator; its type follows from its operands by the operator's shape rule.
    ///
    /// # Errors
    /// When the rule does not hold, a weight, rope or cache is not in the graph, or the name is taken.
    pub fn add(
        &mut self,
        name: impl Into<String>,
        layer: Option<usize>,
        op: Op,
        operands: &[NodeId],
    ) -> Result<NodeId, GraphError> {
        let name = name.into();
        if self.find(&name).is_some() {
            return Err(self.error(&name, "this name is taken".into()));
        }
        let types: Vec<Type> = operands.iter().map(|id| self.nodes[*id].ty).collect();
        let ty = infer(self, &op, &types).map_err(|what| self.error(&name, what))?;
        let id = self.nodes.add_node(Node { name, op, ty, layer });
        for (number, operand) in operands.iter().enumerate() {
            self.nodes.add_edge(*operand, id, number as u32);
        }
        Ok(id)
    }

    /// Declares a weight; the same name again must mean the same weight (a tied head, say).
    ///
    /// # Errors
    /// When the name is known with another shape or format.
    pub fn declare_weight(&mut self, name: &str, weight: Weight) -> Result<(), GraphError> {
        match self.weights.get(name) {
            Some(known) if *known != weight => {
                Err(self.error(name, format!("declared twice: {known:?} and {weight:?}")))
            }
            _ => {
                self.weights.insert(name.to_string(), weight);
                Ok(())
            }
        }
    }

    /// The node with this id.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id]
    }

    /// The node with this id, to change.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id]
    }

    /// The node whose value has this name.
    pub fn find(&self, name: &str) -> Option<NodeId> {
        self.nodes.node_indices().find(|id| self.nodes[*id].name == name)
    }

    /// Operands of a node in order.
    pub fn operands(&self, id: NodeId) -> Vec<NodeId> {
        let mut edges: Vec<(u32, NodeId)> = self
            .nodes
            .edges_directed(id, petgraph::Direction::Incoming)
            .map(|edge| (*edge.weight(), edge.source()))
            .collect();
        edges.sort_unstable();
        edges.into_iter().map(|(_, source)| source).collect()
    }

    /// Users of a node's value, each with the number of the operand that it is, in id order.
    pub fn users(&self, id: NodeId) -> Vec<(NodeId, u32)> {
        let mut users: Vec<(NodeId, u32)> = self
            .nodes
            .edges_directed(id, petgraph::Direction::Outgoing)
            .map(|edge| (edge.target(), *edge.weight()))
            .collect();
        users.sort_unstable();
        users
    }

    /// Makes `node` read `operand` as its operand `number`, in place of what it read before.
    pub fn replace_operand(&mut self, node: NodeId, number: u32, operand: NodeId) {
        let old: Vec<_> = self
            .nodes
            .edges_directed(node, petgraph::Direction::Incoming)
            .filter(|edge| *edge.weight() == number)
            .map(|edge| edge.id())
            .collect();
        for edge in old {
            self.nodes.remove_edge(edge);
        }
        self.nodes.add_edge(operand, node, number);
    }

    /// Removes a node without users. Its id is never used again.
    pub fn remove(&mut self, id: NodeId) -> Option<Node> {
        if self.nodes.edges_directed(id, petgraph::Direction::Outgoing).next().is_some() {
            return None;
        }
        self.nodes.remove_node(id)
    }

    /// All nodes in id order, which is the order they were added in.
    pub fn ids(&self) -> Vec<NodeId> {
        self.nodes.node_indices().collect()
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes.node_count()
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes.node_count() == 0
    }

    /// Nodes in an order in which operands come first; among nodes that are free to go, those of the
    /// lower id first, so that the order is the same every time. Taps come last: what they read is there
    /// long before the last layer, and no layer is to be torn apart by them.
    ///
    /// # Errors
    /// When there is a cycle; names a node on it.
    pub fn topological(&self) -> Result<Vec<NodeId>, GraphError> {
        let mut waiting: BTreeMap<NodeId, usize> =
            self.nodes.node_indices().map(|id| (id, self.operands(id).len())).collect();
        let place = |id: NodeId| (self.nodes[id].op == Op::Taps, id);
        let mut ready: std::collections::BTreeSet<(bool, NodeId)> =
            waiting.iter().filter(|(_, n)| **n == 0).map(|(id, _)| place(*id)).collect();
        let mut order = Vec::with_capacity(waiting.len());
        while let Some((_, id)) = ready.pop_first() {
            order.push(id);
            waiting.remove(&id);
            for (user, _) in self.users(id) {
                let left = waiting.get_mut(&user).expect("a user is not placed before its operand");
                *left -= 1;
                if *left == 0 {
                    ready.insert(place(user));
                }
            }
        }
        match waiting.keys().next() {
            None => Ok(order),
            Some(id) => Err(self.error(&self.nodes[*id].name, "lies on a cycle or behind one".into())),
        }
    }

    /// An error at a node of this graph.
    pub fn error(&self, node: &str, what: String) -> GraphError {
        GraphError { graph: self.name.clone(), node: node.to_string(), what }
    }
}
