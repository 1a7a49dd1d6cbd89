//! What a case needs before a GPU runs it: a checkpoint, a plan, and the logits that there should be.

use super::cases::{Case, DRAFT_FOLDER, SHARPNESS};
use super::drafts::{self, ReferenceBlock};
use crate::source;
use anyhow::{Context, Result};
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use tilec_codegen::compile::{self, DraftGraphs, DraftInput, Host, Input};
use tilec_codegen::passes::resident::kernel_format;
use tilec_ir::abi::KvType;
use tilec_ir::convert::{dequantize, quantize};
use tilec_ir::graph::interp::{Interpreter, Row, WeightSource};
use tilec_ir::graph::{EXPERT, Graph, Weight};
use tilec_ir::plan::WeightsFrom;
use tilec_ir::spec::ModelSpec;
use tilec_runtime::checkpoint::Checkpoint;

/// Multiplications that a reference may take: seconds on one core.
const REFERENCE_PRODUCTS: usize = 1_200_000_000;

/// Rows of a reference: more than two passes, so that one is not full, up to three chunks of context.
const REFERENCE_ROWS: std::ops::RangeInclusive<usize> = 21..=300;

/// Purpose of the prompt's random numbers.
const PROMPT: u64 = 1;

/// A case that can be run.
pub struct Prepared {
    /// The folder of its plan.
    pub plan: PathBuf,
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Logits behind each token of the prompt, `[prompt][vocab]`, by the interpreter.
    pub reference: Vec<f32>,
    /// How far the kernel's logits may be from the reference: see [`bound`].
    pub bound: f64,
    /// Blocks of the draft, by the interpreter; none without a draft.
    pub blocks: Vec<ReferenceBlock>,
    /// Rows of a block at most.
    pub draft_rows: usize,
    /// How far the guesses' logits may be from the reference.
    pub draft_bound: f64,
}

/// A case's checkpoint, what to compile, and the graph of it.
pub struct Model {
    spec: ModelSpec,
    checkpoint: Checkpoint,
    /// The same without the draft's tensors beside the model's.
    alone: Checkpoint,
    path: PathBuf,
    /// The graph, for the interpreter.
    pub graph: Graph,
    /// Those of its draft.
    pub draft: Option<DraftGraphs>,
    /// The draft's own checkpoint; its tensors are in the model's as well.
    draft_checkpoint: Option<Checkpoint>,
}

impl Model {
    /// Writes the checkpoint into `folder` and makes its graph.
    ///
    /// # Errors
    /// When a file cannot be written or the frontend refuses the model.
    pub fn new(case: &Case, folder: &Path, arch: &str) -> Result<Model> {
        let path = std::path::absolute(folder.join("checkpoint"))?;
        case.write(&path)?;
        let [alone, mut checkpoint] = [Checkpoint::open(&path)?, Checkpoint::open(&path)?];
        let spec = case.spec(path.clone(), arch);
        let open = || Checkpoint::open_draft(&path.join(DRAFT_FOLDER));
        let draft_checkpoint = case.draft.as_ref().map(|_| open()).transpose()?;
        let (graph, draft) = compile::graphs(&input(case, &alone, draft_checkpoint.as_ref(), &path), &spec)?;
        if draft_checkpoint.is_some() {
            checkpoint.attach_draft(open()?);
        }
        Ok(Model { spec, checkpoint, alone, path, graph, draft, draft_checkpoint })
    }

    /// The weights as the kernel multiplies them.
    pub fn weights(&self) -> KernelWeights<'_> {
        self.weights_of(&self.graph)
    }

    /// Those of one of the draft's graphs.
    pub fn weights_of<'a>(&'a self, graph: &'a Graph) -> KernelWeights<'a> {
        KernelWeights { checkpoint: &self.checkpoint, graph }
    }

    /// What the compiler reads.
    pub fn input<'a>(&'a self, case: &'a Case) -> Input<'a> {
        input(case, &self.alone, self.draft_checkpoint.as_ref(), &self.path)
    }

    /// A prompt that the interpreter can run in seconds.
    pub fn prompt(&self, case: &Case) -> Vec<u32> {
        let rows = REFERENCE_PRODUCTS / case.products.max(1);
        case.tokens(PROMPT, rows.clamp(*REFERENCE_ROWS.start(), *REFERENCE_ROWS.end()))
    }
}

fn input<'a>(
    case: &'a Case,
    checkpoint: &'a Checkpoint,
    draft: Option<&'a Checkpoint>,
    path: &Path,
) -> Input<'a> {
    let folder = path.join(DRAFT_FOLDER);
    Input {
        name: "selftest",
        config: &case.config,
        tensors: checkpoint.tensors(),
        weights: WeightsFrom::Checkpoint { path: path.to_path_buf() },
        tokenizer: None,
        draft: draft.map(|draft| DraftInput {
            config: draft.config(),
            tensors: draft.tensors(),
            weights: WeightsFrom::Checkpoint { path: folder },
        }),
    }
}

/// Writes the case's checkpoint and its plan into `folder`, and computes the reference.
///
/// # Errors
/// When a file cannot be written, the model does not compile, or the interpreter refuses it.
pub fn prepare(case: &Case, folder: &Path, arch: &str) -> Result<Prepared> {
    let model = Model::new(case, folder, arch)?;
    let cubins = source::cache_folder().ok().map(|folder| folder.join("cubins"));
    let compiled = compile::compile(&model.input(case), &model.spec, &Host { threads: 1, cubins })?;
    let plan = folder.join("plan");
    compiled.write(&plan)?;
    let prompt = model.prompt(case);
    let reference = reference(&model.graph, &model.weights(), &prompt)?;
    let blocks = drafts::reference(&model, case, &prompt)?;
    let draft_rows = model.draft.as_ref().map_or(0, |draft| draft.rows);
    Ok(Prepared {
        plan,
        prompt,
        reference,
        bound: bound(case),
        blocks,
        draft_rows,
        draft_bound: draft_bound(case),
    })
}

/// The logits behind each token of a prompt, `[prompt][vocab]`: float32 activations.
///
/// # Errors
/// When the interpreter refuses the model or the weights.
pub fn reference(graph: &Graph, weights: &dyn WeightSource, prompt: &[u32]) -> Result<Vec<f32>> {
    let mut interpreter = Interpreter::new(graph, weights).context("the interpreter refuses the model")?;
    let row = |(position, token): (usize, &u32)| Row { token: *token, position, sequence: 0 };
    let rows: Vec<Row> = prompt.iter().enumerate().map(row).collect();
    let wanted: Vec<usize> = (0..rows.len()).collect();
    Ok(interpreter.step(&rows, &wanted)?)
}

/// The checkpoint's weights, rounded to the type that the tensor cores multiply.
pub struct KernelWeights<'a> {
    checkpoint: &'a Checkpoint,
    graph: &'a Graph,
}

impl WeightSource for KernelWeights<'_> {
    fn tensor(&self, name: &str) -> Result<Cow<'_, [f32]>, String> {
        let mut values = self.checkpoint.tensor_f32(name).map_err(|error| error.to_string())?;
        // What the graph calls weights may be parts of a stored matrix, or of one an expert.
        let is_read = |stored: &str| match stored.split_once(EXPERT) {
            Some((before, behind)) => name.starts_with(before) && name.ends_with(behind),
            None => stored == name,
        };
        let known = self.graph.weights.iter().find(|(own, weight)| is_read(weight.tensor(own)));
        let shape = &self.checkpoint.tensor(name).map_err(|error| error.to_string())?.shape;
        // Scales that are stored are kept, and need not be those that would be chosen.
        let as_stored = |weight: &Weight| kernel_format(weight.format) == weight.stored;
        if let (Some((_, weight)), [rows, cols]) = (known.filter(|(_, own)| !as_stored(own)), &shape[..]) {
            let format = kernel_format(weight.format);
            let planes = quantize(format, *rows, *cols, &values);
            let planes = planes.map_err(|error| error.to_string())?;
            dequantize(&planes.view(), &mut values).map_err(|error| error.to_string())?;
        }
        Ok(values.into())
    }
}

/// How much more than [`bound`] one row may be off: rows whose residual is small by chance have errors of
/// several times the others'.
pub const WORST: f64 = 3.0;

/// How far rows of logits may be from the reference, relative to their size, in the root of the mean
/// square over rows.
///
/// Every input of a product is rounded to a half: an error of at most `h` = 2^-9 (bfloat16) or 2^-12
/// (float16) of its size, as the root of the mean square over all values; keys and values are rounded
/// once more, `k`. Random errors go through a product unchanged in relative size, and add up as squares:
/// in a layer those of the four products (qkv, o, gate and up, down), of the values, and of the scores,
/// whose absolute error is [`SHARPNESS`] `s` times those of the query's and the key's inputs and of the
/// rounded key; then those of the head. So the variance is
/// `h^2 (4 L + 1) + L (k^2 + s^2 (2 h^2 + k^2))`; with experts, whose shares are as a router's scores of
/// deviation `d` are, `2 L d^2 h^2` on top. Twice its root is what is allowed: 2.4 % with three
/// layers of bfloat16, 0.3 % with float16. Errors of this kind, tried with the interpreter, stay below
/// two thirds of that; a tensor that is left out moves logits by 10 % and more.
pub fn bound(case: &Case) -> f64 {
    bound_of(case, case.layers, 1)
}

/// The same for the guesses of a draft: behind the layers of the target, `fc`, then keys and values of that
/// one feature, and the draft's own layers and head. A layer with convolutions counts twice: each of its four
/// multiplies rows by what a product has made of them, and adds neighbours that may be nearly opposite.
pub fn draft_bound(case: &Case) -> f64 {
    let own =
        case.draft.as_ref().map_or(0, |draft| draft.layers * if draft.candidates.is_some() { 2 } else { 1 });
    bound_of(case, case.layers + own, 3)
}

/// For so many layers, and products beside theirs.
fn bound_of(case: &Case, layers: usize, others: usize) -> f64 {
    let rounding = |bf16: bool| if bf16 { 2f64.powi(-9) } else { 2f64.powi(-12) };
    let h2 = rounding(case.multiplies_bf16()).powi(2);
    let k2 = rounding(case.kv == KvType::Bf16).powi(2);
    let layers = layers as f64;
    let scores = SHARPNESS.powi(2) * (2.0 * h2 + k2);
    let shares = case.decision().powi(2) * 2.0 * h2;
    2.0 * (h2 * (4.0 * layers + others as f64) + layers * (k2 + scores + shares)).sqrt()
}
