//! The stages of a program that only fills a cache: rows of taps, what is made of them, and then keys and
//! values of all layers in one product and one stage that caches them.
//!
//! The layers read the same rows, and none waits for another: as layers of their own they would cost a
//! crossing of the chip each.

use super::resident::{HeadChain, Lowering, error, kernel_format, value_scale};
use super::tile::TileError;
use tilec_ir::fused::{Anchor, FusedOp, Part, Piece};
use tilec_ir::launch::OCTET;
use tilec_ir::pack::PackContent;
use tilec_ir::resident::{Bias, Context, Epilogue, Gemm, Kind, Norm, Stage};
use tilec_ir::stages::BufferElem;

/// All stages of the program.
///
/// # Errors
/// What is no product of keys and values of a layer, and layers that differ by more than their weights.
pub(super) fn stages(lowering: &mut Lowering<'_>) -> Result<Vec<Stage>, TileError> {
    let fused = lowering.fused;
    let mut stages = Vec::new();
    let mut layers: Vec<&FusedOp> = Vec::new();
    for op in &fused.ops {
        match op.written_caches()[..] {
            [] => stages.extend(lowering.stage(op, &mut None)?),
            [cache] if cache == layers.len() && op.anchor == Anchor::Gemm => layers.push(op),
            _ => return Err(error(op, "is no product of a layer's keys and values, in the layers' order")),
        }
    }
    let Some(first) = layers.first() else {
        return Err(TileError { op: fused.name.clone(), what: "has no logits, and fills no cache".into() });
    };
    if !matches!(stages.first(), Some(Stage { kind: Kind::Taps { .. }, .. })) {
        return Err(error(first, "is not made of taps"));
    }
    let [source] = first.inputs[..] else { return Err(error(first, "reads one value")) };
    let (input, norm) = lowering.input(first, source, &mut None)?;

    let kv_heads = fused.caches[0].kv_heads;
    let each = kv_heads * (lowering.kv.qk_dim + lowering.kv.v_dim);
    let mut names = Vec::new();
    let mut bias = Vec::new();
    let mut k_norms = Vec::new();
    let mut shared: Option<(Option<String>, Option<f32>, f32)> = None;
    for (number, op) in layers.iter().enumerate() {
        let (keys, values) = match &op.parts[..] {
            [keys, values] if op.inputs == first.inputs && keys.cols + values.cols == each => (keys, values),
            _ => return Err(error(op, "is not a product of keys and values like that of the first layer")),
        };
        let HeadChain { norm, rope } = lowering.head_chain(op, &behind_bias(keys))?;
        let factor = value_scale(op, &behind_bias(values))?;
        let own = (rope, norm.as_ref().map(|(_, eps)| *eps), factor);
        if *shared.get_or_insert_with(|| own.clone()) != own {
            return Err(error(op, "rotates or scales otherwise than the first layer"));
        }
        k_norms.push(norm.map(|(weight, eps)| {
            let content = PackContent::F32 { tensor: weight, len: lowering.kv.qk_dim };
            Norm { gain: lowering.packer.fixed(content), eps }
        }));
        names.extend(op.parts.iter().flat_map(|part| part.weights.clone()));
        let shifted = lowering.bias(op, &mut None).into_iter();
        bias.extend(shifted.map(|bias| Bias { start: bias.start + number * each, ..bias }));
    }
    let Some((rope, _, value_scale)) = shared else { return Err(error(first, "has no layers")) };

    let format = kernel_format(fused.weights[&names[0]].format);
    if let Some(other) = names.iter().find(|name| kernel_format(fused.weights[*name].format) != format) {
        return Err(error(first, format!("{other} is in another format than {}", names[0])));
    }
    let k = lowering.buffers[input.0 as usize].cols;
    if let Some(odd) = names.iter().find(|name| fused.weights[*name].shape[1].next_multiple_of(OCTET) != k) {
        return Err(error(first, format!("{odd} does not fit rows of {k}")));
    }
    let octets = lowering.octets(first, format, &names, 1)?;
    let scales = super::resident::octet_scales(&octets).map(|scales| lowering.packer.fixed(scales));
    let weights = lowering.packer.fixed(octets);
    let output = lowering.buffer("kv", BufferElem::F32, each * layers.len());
    stages.push(Stage {
        name: "k+v".into(),
        kind: Kind::Gemm(Gemm {
            input,
            norm,
            prepared: None,
            select: false,
            weights,
            format,
            scales,
            k,
            cols: each * layers.len(),
            operands: 1,
            bias,
            epilogue: Epilogue::Store,
            output,
            prepares: None,
            tap: false,
            partial: lowering.partial(k, each * layers.len(), 1),
            router: None,
        }),
    });
    let rope = rope.map(|name| lowering.rope(&name));
    let context = Context { input: output, k_norms, kv_heads, rope, value_scale };
    stages.push(Stage { name: "context".into(), kind: Kind::Context(context) });
    Ok(stages)
}

/// A part's chain without its biases, which come first.
fn behind_bias(part: &Part) -> Vec<Piece> {
    part.pieces.iter().skip_while(|piece| matches!(piece, Piece::Bias { .. })).cloned().collect()
}
