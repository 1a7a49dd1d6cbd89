//! What the second version of DFlash adds to a draft.
//!
//! Around attention and around the feed-forward part of each layer, the rows of a block are convolved with
//! the row before them (a dynamic kernel: a learned base, and what a product makes of the layer's normed
//! input). And guesses are not the largest logits: of the `top_k` largest of each row, a selector takes the
//! one that is worth most behind the guess before it: `logit + <P[before] * (H h), S[candidate]>`. The
//! context's keys and values are as in the first version.

use super::FrontendError;
use super::config::Config;
use super::dflash::Builder;
use tilec_ir::graph::{MAX_CANDIDATES, NodeId, Op};

/// Name of the architecture, in `architectures`.
pub(super) const ARCHITECTURE: &str = "DFlash2DraftModel";

/// Keys that every config of this version has.
pub(super) const KEYS: [&str; 4] = ["conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"];

/// What is convolved around: the modules that hold the kernels.
const CONVOLUTIONS: [&str; 2] = ["attention_conv", "mlp_conv"];

/// Settings of a draft of the second version.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dflash2 {
    /// Columns that share a value of a row's own kernel; divides the residual's.
    pub group: usize,
    /// Columns of the selector's tables.
    pub rank: usize,
    /// Candidates of a row.
    pub top_k: usize,
    /// Multiplied into every logit.
    pub factor: f32,
    /// Bound of the logits' magnitudes.
    pub softcap: Option<f32>,
}

impl Dflash2 {
    /// Reads the settings; `place` finds the section of a key.
    ///
    /// # Errors
    /// When one is missing, or cannot be for a residual of `hidden` columns and `vocab` tokens.
    pub(super) fn parse<'c>(
        place: &dyn Fn(&str) -> Config<'c>,
        hidden: usize,
        vocab: usize,
    ) -> Result<Dflash2, FrontendError> {
        let required = |key: &str| {
            let missing = || place(key).error(key, format!("is missing: {ARCHITECTURE} needs it"));
            place(key).size(key)?.ok_or_else(missing)
        };
        let [taps, group, rank, top_k] = KEYS;
        let error = |key: &str, what: String| Err(place(key).error(key, what));
        let kernel = required(taps)?;
        if kernel != 2 {
            return error(
                taps,
                format!("{kernel} is not 2, the only size that is known: a row and the one before it"),
            );
        }
        let (group_size, candidates) = (required(group)?, required(top_k)?);
        if !hidden.is_multiple_of(group_size) {
            return error(group, format!("{group_size} does not divide hidden_size {hidden}"));
        }
        if candidates > vocab {
            return error(top_k, format!("{candidates} is above the target's vocabulary of {vocab}"));
        }
        if candidates > MAX_CANDIDATES {
            return error(
                top_k,
                format!("{candidates} is beyond the most that is supported, {MAX_CANDIDATES}"),
            );
        }
        let (multiplier, softcap) = ("output_multiplier", "final_logit_softcapping");
        // Numbers that float32 has, too.
        let float = |key: &str, number: f64| match number as f32 {
            float if float.is_normal() => Ok(float),
            float => Err(place(key)
                .error(key, format!("{number} is {float:e} as float32: it must be a normal number"))),
        };
        let factor = place(multiplier).positive(multiplier)?;
        // Not above 0 means none.
        let bound = place(softcap).number(softcap)?.filter(|bound| *bound > 0.0);
        Ok(Dflash2 {
            group: group_size,
            rank: required(rank)?,
            top_k: candidates,
            factor: factor.map_or(Ok(1.0), |factor| float(multiplier, factor))?,
            softcap: bound.map(|bound| float(softcap, bound)).transpose()?,
        })
    }

    /// Names and shapes of the tensors that it adds.
    pub(super) fn tensors(&self, hidden: usize, layers: usize, vocab: usize) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::new();
        for layer in 0..layers {
            for conv in CONVOLUTIONS {
                let module = format!("layers.{layer}.{conv}");
                tensors.push((format!("{module}.base_kernel"), vec![2, 2, hidden]));
                let kernels = 2 * 2 * (hidden / self.group);
                tensors.push((format!("{module}.kernel_projection.weight"), vec![kernels, hidden]));
            }
        }
        let table = |name: &str| (format!("candidate_selector.{name}_codebook"), vec![vocab, self.rank]);
        tensors.push(("candidate_selector.hidden_projection.weight".into(), vec![self.rank, hidden]));
        tensors.extend([table("predecessor"), table("successor")]);
        tensors
    }
}

/// A convolution around a part of a layer: what makes its kernels is known, and what is convolved first is.
pub(super) struct Around {
    /// The rows' own kernels.
    kernels: NodeId,
    /// The base, by its name in the graph.
    base: String,
    group: usize,
    layer: usize,
    name: &'static str,
}

impl Builder<'_> {
    /// Convolves the normed input of a layer's attention (`part` 0) or feed-forward (1); the rest of it is for
    /// [`Builder::convolved`]. Nothing without convolutions.
    pub(super) fn convolve(
        &mut self,
        layer: usize,
        part: usize,
        normed: NodeId,
    ) -> Result<(NodeId, Option<Around>), FrontendError> {
        let Some(Dflash2 { group, .. }) = self.draft.second else { return Ok((normed, None)) };
        let (name, own) = (["attn", "ffn"][part], Some(layer));
        let module = format!("layers.{layer}.{}", CONVOLUTIONS[part]);
        let projection = format!("{module}.kernel_projection");
        // Both halves of the kernels follow from what is there before either is used.
        let kernels = self.linear(own, &format!("{name}_kernels"), &projection, false, normed)?;
        let base = self.weight(&format!("{module}.base_kernel"))?;
        let op = Op::DynamicConv { weight: base.clone(), side: 0, group };
        let x = self.add(own, &format!("{name}_conv"), op, &[normed, kernels])?;
        Ok((x, Some(Around { kernels, base, group, layer, name })))
    }

    /// The other side of a convolution: what comes out of what it is around.
    pub(super) fn convolved(&mut self, around: Option<Around>, y: NodeId) -> Result<NodeId, FrontendError> {
        let Some(Around { kernels, base, group, layer, name }) = around else { return Ok(y) };
        let op = Op::DynamicConv { weight: base, side: 1, group };
        self.add(Some(layer), &format!("{name}_out_conv"), op, &[y, kernels])
    }

    /// The selector behind a block's logits, if there is one. `h` are the normed rows that made them.
    pub(super) fn selector(&mut self, logits: NodeId, h: NodeId) -> Result<(), FrontendError> {
        let Some(Dflash2 { top_k: k, factor, softcap, .. }) = self.draft.second else { return Ok(()) };
        let candidates = self.add(None, "candidates", Op::TopK { k, factor, softcap }, &[logits])?;
        let h = self.linear(None, "selector", "candidate_selector.hidden_projection", false, h)?;
        let predecessor = self.weight("candidate_selector.predecessor_codebook")?;
        let successor = self.weight("candidate_selector.successor_codebook")?;
        self.add(None, "pairs", Op::PairScores { predecessor, successor }, &[candidates, h])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Dflash, DraftTarget};
    use super::*;
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use tilec_ir::format::Format;
    use tilec_ir::tensor::TensorInfo;

    const TARGET: DraftTarget = DraftTarget { vocab: 100, hidden: 32, layers: 6 };

    fn config(patch: Value) -> Value {
        let mut config = json!({
            "architectures": ["DFlash2DraftModel"], "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "vocab_size": 100, "rope_theta": 1e6, "is_causal": false,
            "dflash_config": {
                "block_size": 8, "mask_token_id": 99, "target_layer_ids": [1, 3, 4], "conv_kernel_size": 2,
                "conv_group_size": 16, "selector_rank": 24, "selector_top_k": 16,
            },
        });
        for (key, value) in patch.as_object().unwrap() {
            match (&mut config[key], value) {
                (Value::Object(old), Value::Object(new)) => old.extend(new.clone()),
                (old, new) => *old = new.clone(),
            }
        }
        config
    }

    fn own(patch: Value) -> Value {
        config(json!({ "dflash_config": patch }))
    }

    fn tensors(draft: &Dflash) -> BTreeMap<String, TensorInfo> {
        let info = |shape: Vec<usize>| TensorInfo { shape, format: Format::BF16 };
        draft.tensors().into_iter().map(|(name, shape)| (name, info(shape))).collect()
    }

    #[test]
    fn settings_are_read_wherever_they_stand() {
        let draft = Dflash::parse(&config(json!({})), TARGET).unwrap();
        let plain = Dflash2 { group: 16, rank: 24, top_k: 16, factor: 1.0, softcap: None };
        assert_eq!(draft.second, Some(plain));
        let capped = own(json!({"output_multiplier": 0.25, "final_logit_softcapping": 20}));
        let capped = Dflash::parse(&capped, TARGET).unwrap().second;
        assert_eq!(capped, Some(Dflash2 { factor: 0.25, softcap: Some(20.0), ..plain }));
        // A bound of 0 is none.
        let zero = own(json!({"final_logit_softcapping": 0}));
        assert_eq!(Dflash::parse(&zero, TARGET).unwrap().second, Some(plain));
        // At the top level, and without a name.
        let mut flat = config(json!({"architectures": null}));
        let nested = flat["dflash_config"].take();
        flat.as_object_mut().unwrap().extend(nested.as_object().unwrap().clone());
        assert_eq!(Dflash::parse(&flat, TARGET).unwrap().second, Some(plain));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let cases = [
            (json!({"conv_kernel_size": 3}), ["dflash_config.conv_kernel_size", "3 is not 2"]),
            (json!({"conv_kernel_size": null}), ["conv_kernel_size", "is missing"]),
            (
                json!({"conv_group_size": 12}),
                ["dflash_config.conv_group_size", "12 does not divide hidden_size 32"],
            ),
            (json!({"conv_group_size": 0}), ["conv_group_size", "from 1 up"]),
            (
                json!({"selector_top_k": 101}),
                ["dflash_config.selector_top_k", "101 is above the target's vocabulary of 100"],
            ),
            (json!({"selector_top_k": 65}), ["dflash_config.selector_top_k", "most that is supported, 64"]),
            (json!({"selector_top_k": null}), ["selector_top_k", "DFlash2DraftModel needs it"]),
            (json!({"selector_rank": -1}), ["selector_rank", "from 1 up"]),
            (json!({"selector_rank": null}), ["selector_rank", "is missing"]),
            (json!({"output_multiplier": 0}), ["output_multiplier", "above 0"]),
            (json!({"output_multiplier": 1e-60}), ["output_multiplier", "as float32"]),
            (json!({"final_logit_softcapping": 1e60}), ["final_logit_softcapping", "as float32"]),
            (json!({"final_logit_softcapping": "x"}), ["final_logit_softcapping", "a number"]),
            (json!({"input_embedding_scale": 2.0}), ["input_embedding_scale", "not supported yet"]),
        ];
        for (patch, parts) in cases {
            let error = Dflash::parse(&own(patch.clone()), TARGET).expect_err(&patch.to_string()).to_string();
            for part in parts {
                assert!(error.contains(part), "{patch}: {part:?} is not in {error}");
            }
        }
    }

    #[test]
    fn tensors_have_their_published_names_and_shapes() {
        let draft = Dflash::parse(&config(json!({})), TARGET).unwrap();
        let whole = tensors(&draft);
        assert_eq!(whole.len(), 11 * 2 + 3 + 4 * 2 + 3);
        assert_eq!(whole["layers.1.attention_conv.base_kernel"].shape, [2, 2, 32]);
        assert_eq!(whole["layers.0.mlp_conv.kernel_projection.weight"].shape, [8, 32]);
        assert_eq!(whole["candidate_selector.hidden_projection.weight"].shape, [24, 32]);
        assert_eq!(whole["candidate_selector.predecessor_codebook"].shape, [100, 24]);
        assert_eq!(whole["candidate_selector.successor_codebook"].shape, [100, 24]);
        let error = |change: &dyn Fn(&mut BTreeMap<String, TensorInfo>)| {
            let mut tensors = whole.clone();
            change(&mut tensors);
            draft.inject(&tensors).unwrap_err().to_string()
        };
        let missing = error(&|tensors| drop(tensors.remove("candidate_selector.successor_codebook")));
        assert!(
            missing.contains("successor_codebook (of the draft)") && missing.contains("missing"),
            "{missing}"
        );
        let shape = error(&|tensors| {
            tensors.get_mut("layers.0.attention_conv.base_kernel").unwrap().shape = vec![2, 3, 32];
        });
        assert!(shape.contains("base_kernel") && shape.contains("[2, 2, 32]"), "{shape}");
        let format = error(&|tensors| {
            tensors.get_mut("layers.0.mlp_conv.base_kernel").unwrap().format = Format::Q8_0;
        });
        assert!(format.contains("mlp_conv.base_kernel") && format.contains("q8_0"), "{format}");
    }

    /// Kernels follow from the normed row, not from what they have convolved; the context's keys and values from
    /// no convolution.
    #[test]
    fn convolutions_stand_around_attention_and_feed_forward() {
        let draft = Dflash::parse(&config(json!({})), TARGET).unwrap();
        let all = tensors(&draft);
        let target = json!({
            "model_type": "qwen3", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        });
        let target_tensors = super::super::synthetic_tensors(&target, Format::F32).unwrap();
        let target = super::super::build(&target, &target_tensors).unwrap();
        let (inject, block) = (draft.inject(&all).unwrap(), draft.block(&all, &target).unwrap());
        tilec_ir::graph::verify(&inject).unwrap();
        tilec_ir::graph::verify(&block).unwrap();
        assert!(inject.ids().into_iter().all(|id| !matches!(inject.node(id).op, Op::DynamicConv { .. })));
        let operands = |name: &str| -> Vec<String> {
            let of = block.operands(block.find(name).unwrap());
            of.into_iter().map(|id| block.node(id).name.clone()).collect()
        };
        assert_eq!(operands("l1.attn_kernels"), ["l1.attn_norm"]);
        assert_eq!(operands("l1.attn_conv"), ["l1.attn_norm", "l1.attn_kernels"]);
        assert_eq!(operands("l1.k"), ["l1.attn_conv"]);
        assert_eq!(operands("l1.attn_out_conv"), ["l1.o", "l1.attn_kernels"]);
        assert_eq!(operands("l1.attn_res"), ["l0.ffn_res", "l1.attn_out_conv"]);
        assert_eq!(operands("l0.ffn_kernels"), ["l0.ffn_norm"]);
        assert_eq!(operands("l0.up"), ["l0.ffn_conv"]);
        assert_eq!(operands("l0.ffn_out_conv"), ["l0.down", "l0.ffn_kernels"]);
        assert_eq!(operands("selector"), ["norm"]);
        assert_eq!(operands("pairs"), ["candidates", "selector"]);
    }
}
