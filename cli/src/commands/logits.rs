//! `tilec logits`.

use crate::args::{Backend, LogitsArgs};
use crate::session::{Session, max_logit_rows};
use crate::{source, ui};
use anyhow::{Context, Result, bail};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::Path;

/// Computes the logits of every given token and writes them.
pub fn run(args: &LogitsArgs) -> Result<()> {
    let lists = match &args.tokens_file {
        Some(path) => read_lists(path)?,
        None => vec![args.tokens.clone()],
    };
    if let Some(empty) = lists.iter().position(Vec::is_empty) {
        bail!("list {empty} has no tokens: every list needs at least one");
    }
    let (vocab, logits) = match args.backend {
        Backend::Cpu => compiled(args, &lists)?,
        Backend::Interpreter => interpreted(args, &lists)?,
    };
    write(&args.output, vocab, &lists, &logits)?;
    let rows: usize = lists.iter().map(Vec::len).sum();
    ui::note(format!("{rows} rows of {vocab} logits -> {}", args.output.display()));
    Ok(())
}

/// Reads a list of token ids, or a list of such lists.
fn read_lists(path: &Path) -> Result<Vec<Vec<u32>>> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Lists {
        One(Vec<u32>),
        Many(Vec<Vec<u32>>),
    }
    let text = std::fs::read(path).with_context(|| format!("cannot open {}", path.display()))?;
    let lists = serde_json::from_slice(&text)
        .with_context(|| format!("{}: not a list of token ids, or a list of such lists", path.display()))?;
    Ok(match lists {
        Lists::One(list) => vec![list],
        Lists::Many(lists) => lists,
    })
}

fn check_tokens(lists: &[Vec<u32>], vocab: usize, context: usize) -> Result<()> {
    for (number, list) in lists.iter().enumerate() {
        if list.len() > context {
            bail!("list {number} has {} tokens, but the context is {context}: raise --ctx-size", list.len());
        }
        if let Some(token) = list.iter().find(|token| **token as usize >= vocab) {
            bail!("list {number} has token {token}, but the vocabulary ends at {}", vocab.saturating_sub(1));
        }
    }
    Ok(())
}

/// The vocabulary, and per list the logits of every row.
type Logits = (usize, Vec<Vec<f32>>);

fn compiled(args: &LogitsArgs, lists: &[Vec<u32>]) -> Result<Logits> {
    let (folder, plan) = source::plan(&args.model.path, &args.model.target)?;
    check_tokens(lists, plan.tokens(), plan.limits.context)?;
    let max_rows = max_logit_rows(&plan);
    let rows = args.rows_per_step.map_or(max_rows, |rows| rows as usize);
    if rows > max_rows {
        bail!("--rows-per-step {rows}: a step of this plan has at most {max_rows} rows with logits");
    }
    let mut session = Session::open(&folder, &args.weights)?;
    let progress = ui::step_progress("computing", lists.iter().map(|list| list.len() as u64).sum());
    let mut logits = Vec::with_capacity(lists.len());
    for list in lists {
        session.reset();
        let mut of_list = Vec::with_capacity(list.len() * plan.vocab);
        for step in list.chunks(rows) {
            of_list.extend_from_slice(session.score(step)?);
            progress.inc(step.len() as u64);
        }
        logits.push(of_list);
    }
    progress.finish_and_clear();
    Ok((plan.vocab, logits))
}

fn interpreted(args: &LogitsArgs, lists: &[Vec<u32>]) -> Result<Logits> {
    use crate::source::Source;
    use tilec_ir::graph::interp::{Interpreter, Row};

    let mut model = match Source::find(&args.model.path)? {
        Source::Model(model) => model,
        Source::Plan(folder) => bail!(
            "{}: the interpreter runs a model, not a plan: give the model.yaml or the checkpoint",
            folder.display()
        ),
    };
    if args.weights.checkpoint.is_some() {
        bail!("--checkpoint is for plans: the interpreter reads the model that it is given");
    }
    model.apply(&args.model.target);
    let description = model.describe()?;
    let graph = model.graph(&description)?;
    let context = model.spec.limits.context(tilec_codegen::frontends::max_context(&description.config)?)?;
    let tokens = tilec_codegen::frontends::facts(&description.config)?.vocab;
    check_tokens(lists, tokens, context)?;
    // Of one rank of several: its share of them.
    let logits = graph.ids().into_iter().find(|id| graph.node(*id).op == tilec_ir::graph::Op::Logits);
    let vocab = logits.map_or(tokens, |id| graph.node(id).ty.cols);
    let weights = Weights { checkpoint: source::open_weights(&description.weights)?, graph: &graph };
    let mut interpreter = Interpreter::new(&graph, &weights)?;
    let progress = ui::step_progress("computing", lists.iter().map(|list| list.len() as u64).sum());
    let mut logits = Vec::with_capacity(lists.len());
    for (sequence, list) in (0u32..).zip(lists) {
        let rows = args.rows_per_step.map_or(list.len(), |rows| rows as usize);
        let all: Vec<Row> = list
            .iter()
            .enumerate()
            .map(|(position, token)| Row { token: *token, position, sequence })
            .collect();
        let mut of_list = Vec::with_capacity(list.len() * vocab);
        for step in all.chunks(rows) {
            let wanted: Vec<usize> = (0..step.len()).collect();
            of_list.extend(interpreter.step(step, &wanted)?);
            progress.inc(step.len() as u64);
        }
        logits.push(of_list);
    }
    progress.finish_and_clear();
    Ok((vocab, logits))
}

/// The checkpoint's weights as the kernels see them: converted where the precision pass says so.
struct Weights<'g> {
    checkpoint: tilec_runtime::checkpoint::Checkpoint,
    graph: &'g tilec_ir::graph::Graph,
}

impl tilec_ir::graph::interp::WeightSource for Weights<'_> {
    fn tensor(&self, name: &str) -> Result<std::borrow::Cow<'_, [f32]>, String> {
        use tilec_ir::convert::{dequantize, quantize};
        let mut values = self.checkpoint.tensor_f32(name).map_err(|error| error.to_string())?;
        if let Some(weight) = self.graph.weights.get(name).filter(|weight| weight.stored != weight.format) {
            let cols = weight.whole_shape().last().copied().unwrap_or(1).max(1);
            let rows = values.len() / cols;
            let planes = quantize(weight.format, rows, cols, &values).map_err(|error| error.to_string())?;
            dequantize(&planes.view(), &mut values).map_err(|error| error.to_string())?;
        }
        Ok(values.into())
    }
}

/// Writes `logits.i` and `tokens.i` for every list.
fn write(path: &Path, vocab: usize, lists: &[Vec<u32>], logits: &[Vec<f32>]) -> Result<()> {
    let mut parts: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (number, (tokens, logits)) in lists.iter().zip(logits).enumerate() {
        let ids = tokens.iter().flat_map(|token| i64::from(*token).to_le_bytes()).collect();
        let values = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        parts.push((format!("tokens.{number}"), Dtype::I64, vec![tokens.len()], ids));
        parts.push((format!("logits.{number}"), Dtype::F32, vec![tokens.len(), vocab], values));
    }
    let views = parts.iter().map(|(name, dtype, shape, bytes)| {
        TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name.as_str(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>().context("cannot lay the logits out")?;
    safetensors::serialize_to_file(views, None, path)
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn one_list_and_many_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.json");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_lists(&path)
        };
        assert_eq!(read("[1, 2]").unwrap(), [[1, 2]]);
        assert_eq!(read("[[1], [2, 3]]").unwrap(), vec![vec![1], vec![2, 3]]);
        for wrong in ["[-1]", "{}", "[[1], 2]", "[1"] {
            let error = format!("{:#}", read(wrong).unwrap_err());
            assert!(error.contains("tokens.json"), "{error}");
        }
    }

    #[test]
    fn tokens_are_checked_against_the_model() {
        assert!(check_tokens(&[vec![0, 9]], 10, 2).is_ok());
        assert!(check_tokens(&[vec![0, 10]], 10, 2).unwrap_err().to_string().contains("token 10"));
        assert!(check_tokens(&[vec![0; 3]], 10, 2).unwrap_err().to_string().contains("--ctx-size"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("logits.safetensors");
        let lists = [vec![5], vec![1, 2]];
        write(&path, 2, &lists, &[vec![0.5, -1.0], vec![1.0, 2.0, 3.0, 4.0]]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits.1").unwrap();
        assert_eq!((logits.shape(), logits.dtype()), (&[2, 2][..], Dtype::F32));
        assert_eq!(logits.data()[4..8], 2.0f32.to_le_bytes());
        assert_eq!(file.tensor("tokens.0").unwrap().data(), 5i64.to_le_bytes());
    }
}
