//! Cases whose matrices are stored in FP8 with scales of rows, and in NVFP4, as published checkpoints have them; and one
//! whose experts become block FP8.

use super::cases::{CONTEXT, Case, Random};
use anyhow::{Context, Result};
use safetensors::Dtype;
use serde_json::{Value, json};
use tilec_ir::abi::KvType;
use tilec_ir::convert::{Planes, quantize};
use tilec_ir::format::Format;
use tilec_ir::spec::{Precision, WeightFormat};

/// Formats of the layers' matrices, and of the experts'.
const KINDS: [(Format, Option<Format>); KIND_COUNT] = [
    (Format::FP8_CHANNEL, None),
    (Format::FP8_1X128, None),
    (Format::NVFP4, None),
    (Format::BF16, Some(Format::FP8_BLOCK)),
    (Format::BF16, Some(Format::NVFP4)),
    (Format::FP8_CHANNEL, Some(Format::NVFP4)),
    (Format::FP8_CHANNEL, Some(Format::FP8_CHANNEL)),
    (Format::FP8_BLOCK, Some(Format::FP8_1X128)),
];

/// How many there are.
pub const KIND_COUNT: usize = 8;

/// Formats of a case's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scaled {
    weights: Format,
    experts: Option<Format>,
}

/// A tensor of the file: its name, what its elements are, its shape, its bytes.
pub type Part = (String, Dtype, Vec<usize>, Vec<u8>);

impl Scaled {
    /// The formats, config and name of kind `kind`.
    pub fn new(random: &mut Random, kind: usize) -> (Scaled, Value) {
        let (weights, experts) = KINDS[kind];
        // Columns of NVFP4 are whole blocks.
        let hidden = random.pick(&[64, 144, 256, 1024]);
        let intermediate = random.pick(&[48, 208, 256, 400]);
        let (kv_heads, group) = (random.pick(&[1, 2, 3]), random.pick(&[1, 2, 4]));
        let head_dim = random.pick(&[32, 48, 64, 80, 128]);
        let mut config = json!({
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": random.pick(&[161, 512, 1003]),
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": false,
            "bos_token_id": null,
            "eos_token_id": null,
            // Of FP8 that has scales for parts of rows.
            "quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 128]},
        });
        let own = match experts {
            None => json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "attention_bias": true, "mlp_bias": true,
            }),
            Some(_) => {
                // So many that the last one chosen weighs little; once all there are.
                let (top_k, count) = random.pick(&[(5, 24), (5, 136), (6, 6)]);
                json!({
                    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
                    "attention_bias": false, "num_experts": count, "num_experts_per_tok": top_k,
                    "moe_intermediate_size": intermediate, "norm_topk_prob": true,
                    "decoder_sparse_step": 1, "mlp_only_layers": [],
                })
            }
        };
        for (key, value) in own.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        (Scaled { weights, experts }, config)
    }

    /// What the model is called.
    pub fn name(&self) -> String {
        let experts = self.experts.map(|experts| format!(" experts-{experts}"));
        format!("{}{}", self.weights, experts.unwrap_or_default())
    }

    /// Multiplications of a row in all matrices of a model of this config.
    pub fn products(config: &Value) -> usize {
        let of = |key: &str| config[key].as_u64().unwrap_or(1) as usize;
        let (hidden, experts) = (of("hidden_size"), config.get("num_experts").is_some());
        let heads = 2 * (of("num_attention_heads") + of("num_key_value_heads")) * of("head_dim");
        let forward = 3 * of("intermediate_size") * if experts { of("num_experts_per_tok") } else { 1 };
        let router = if experts { of("num_experts") } else { 0 };
        of("num_hidden_layers") * hidden * (heads + forward + router) + of("vocab_size") * hidden
    }

    /// The format in which a tensor is stored, if not in the case's own.
    pub fn stored(&self, name: &str) -> Option<Format> {
        let format = if name.contains(".experts.") { self.experts? } else { self.weights };
        let matrix = name.ends_with("_proj.weight") || name == "lm_head.weight";
        // Block FP8 is made when it is packed.
        (matrix && ![Format::FP8_BLOCK, Format::BF16].contains(&format)).then_some(format)
    }

    /// What is converted.
    pub fn precision(&self, precision: &mut Precision) {
        precision.weights = converted(self.weights);
        precision.experts = self.experts.map(converted);
    }

    /// The tensors of the file that hold a matrix in one of these formats, as published checkpoints have them.
    ///
    /// # Errors
    /// When it cannot be quantized.
    pub fn parts(name: &str, format: Format, [rows, cols]: [usize; 2], values: &[f32]) -> Result<Vec<Part>> {
        let Planes { codes, scales, tensor_scale, .. } =
            quantize(format, rows, cols, values).with_context(|| format!("cannot quantize {name}"))?;
        let scale = |suffix: &str| format!("{name}{suffix}");
        Ok(match format {
            Format::NVFP4 => vec![
                (name.into(), Dtype::U8, vec![rows, cols / 2], codes),
                (scale("_scale"), Dtype::F8_E4M3, vec![rows, cols / 16], scales),
                (scale("_scale_2"), Dtype::F32, vec![], tensor_scale.to_le_bytes().to_vec()),
            ],
            Format::FP8_CHANNEL => vec![
                (name.into(), Dtype::F8_E4M3, vec![rows, cols], codes),
                (scale("_scale"), Dtype::F32, vec![rows, 1], scales),
            ],
            _ => vec![
                (name.into(), Dtype::F8_E4M3, vec![rows, cols], codes),
                (scale("_scale_inv"), Dtype::F32, vec![rows, cols.div_ceil(128)], scales),
            ],
        })
    }
}

/// How matrices of this format get it.
fn converted(format: Format) -> WeightFormat {
    match format {
        Format::FP8_BLOCK => WeightFormat::Converted(format),
        _ => WeightFormat::AsStored,
    }
}

impl Case {
    /// A model with such matrices.
    pub(super) fn scaled(mut random: Random, number: usize, kind: usize, pass_rows: usize) -> Case {
        let (scaled, config) = Scaled::new(&mut random, kind);
        let kv = random.pick(&[KvType::F16, KvType::Bf16]);
        let of = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
        let (hidden, vocab, layers) = (of("hidden_size"), of("vocab_size"), of("num_hidden_layers"));
        let mut name = format!(
            "{number} {} bf16 kv-{} {hidden}x{} {}/{}x{} L{layers} v{vocab} {}",
            config["model_type"].as_str().unwrap_or_default(),
            kv.name(),
            of("intermediate_size"),
            of("num_attention_heads"),
            of("num_key_value_heads"),
            of("head_dim"),
            scaled.name(),
        );
        if config.get("num_experts").is_some() {
            name.push_str(&format!(" {}of{}", of("num_experts_per_tok"), of("num_experts")));
        }
        name.push_str(&format!(" r{pass_rows}"));
        Case {
            name,
            seed: random.next(),
            products: Scaled::products(&config),
            config,
            stored: Format::BF16,
            fp8: false,
            fp4_experts: false,
            scaled: Some(scaled),
            pass_rows,
            kv,
            layers,
            vocab,
            shard: None,
            loud: 1.0,
            draft: None,
        }
    }
}
