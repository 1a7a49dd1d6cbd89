//! Random models: configurations of the known families, and weights that leave no part without effect.

use super::drafts::DraftCase;
use super::scaled::{KIND_COUNT, Scaled};
use anyhow::{Context, Result, ensure};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tilec_codegen::frontends;
use tilec_ir::abi::KvType;
use tilec_ir::convert::quantize;
use tilec_ir::format::Format;
use tilec_ir::spec::{self, ModelSpec, Shard};

/// Positions that every sequence of a case can have.
pub const CONTEXT: usize = 384;

/// Rows that a step of a case can have, so that a whole prompt is one step.
pub const ROWS: usize = 320;

/// Sequences of a case: two slices of a pass.
pub const SEQUENCES: usize = 2 * tilec_ir::launch::SLICE_ROWS;

/// Deviation of the scores of attention. At 1 many positions weigh the same, and the average of their
/// values all but vanishes behind the residual.
pub const SHARPNESS: f64 = 1.5;

/// Gain of the last feed-forward layer's norm in loud models: its activations are then far beyond what
/// a float16 holds.
const LOUD: f32 = 300.0;

/// The case with heads of one 16-byte piece.
pub const NARROW_HEADS: usize = 40;

/// The cases that multiply block FP8.
pub const FP8: std::ops::Range<usize> = 42..46;

/// The cases with experts: of float16, of FP4 beside float16, of bfloat16, of FP4 beside bfloat16.
pub const EXPERTS: std::ops::Range<usize> = MIMO.end..MIMO.end + 4;

/// The cases that are one rank's share of a model: of bfloat16 with a tied head; of a mixture in FP4 with fewer
/// KV heads than ranks; of block FP8 with q, k and v in one matrix.
pub const SHARES: std::ops::Range<usize> = EXPERTS.end..EXPERTS.end + 3;

/// The cases with a draft.
pub const DRAFTS: std::ops::Range<usize> = SHARES.end..SHARES.end + 8;

/// The cases stored in FP8 with scales of rows, in NVFP4, or with experts in block FP8.
pub const SCALED: std::ops::Range<usize> = DRAFTS.end..DRAFTS.end + KIND_COUNT;

/// The cases with experts behind attention of heads of 192 columns, whose keys do not come through the ring: passes of 8, 16
/// and 32 rows.
pub const WIDE_HEADS: std::ops::Range<usize> = SCALED.end..SCALED.end + PASS_ROWS.len();

/// The cases whose experts' second products are dealt out in bands: passes of 8, 16 and 32 rows.
pub const BANDS: std::ops::Range<usize> = WIDE_HEADS.end..WIDE_HEADS.end + PASS_ROWS.len();

/// Rows of a pass, in turn.
const PASS_ROWS: [usize; 3] = [8, 16, 32];

/// Folder of a case's draft, in that of its checkpoint.
pub const DRAFT_FOLDER: &str = "dflash";

/// Cases in all.
pub const CASES: usize = BANDS.end;

/// Deviation of a router's scores. What a rounded input can change is then a choice between experts that
/// weigh little.
const DECISION: f64 = 5.0;

/// The case whose rows a consumer's registers do not hold, so that they are multiplied in parts; the one before
/// it has such rows without a norm.
pub const LONG_ROWS: usize = 41;

/// The cases of MiMo's attention: sinks in layers with a window, keys wider than values, a third of a head
/// rotated. All but the first scale values, from the third on windows have more KV heads, and from the fourth
/// on q, k and v are one matrix: in bfloat16, then in block FP8.
pub const MIMO: std::ops::Range<usize> = 46..51;

/// Numbers from a seed: splitmix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of `seed` for the purpose `stream`.
    pub fn new(seed: u64, stream: u64) -> Random {
        let mut seeded = Random(seed);
        Random(seeded.next() ^ Random(stream).next())
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// One of `all`, of which there is at least one.
    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// Whether something happens that happens once in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Mean 0, deviation 1: the sum of four uniform numbers, near enough to normal.
    pub fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as i32).sum::<i32>() - 2 * 0xffff;
        sum as f32 * (3f32.sqrt() / 65536.0)
    }
}

/// A small model.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is, for people: also what `--only` looks at.
    pub name: String,
    /// Start of its random numbers.
    pub seed: u64,
    /// Its config.json.
    pub config: Value,
    /// How its matrices are stored.
    pub stored: Format,
    /// Whether they are converted to block FP8.
    pub fp8: bool,
    /// Whether its experts are converted to FP4.
    pub fp4_experts: bool,
    /// Formats of the matrices, if they have scales that lie otherwise.
    pub scaled: Option<Scaled>,
    /// Rows of a pass: 8, 16 or 32.
    pub pass_rows: usize,
    /// Elements of its KV cache.
    pub kv: KvType,
    /// Decoder layers.
    pub layers: usize,
    /// Token ids that have logits.
    pub vocab: usize,
    /// The rank whose share it is, if it is not a whole model.
    pub shard: Option<Shard>,
    /// Multiplications of a row in all matrices.
    pub products: usize,
    /// Factor on the gains of the last feed-forward layer's norm.
    pub(super) loud: f32,
    /// Its draft.
    pub draft: Option<DraftCase>,
}

impl Case {
    /// Case `number` of the models that `seed` makes. Families, formats and heads of a KV head take
    /// turns; all else is random, but for [`NARROW_HEADS`] and [`LONG_ROWS`].
    pub fn new(seed: u64, number: usize) -> Case {
        let mut random = Random::new(seed, number as u64);
        if MIMO.contains(&number) {
            return Case::mimo(random, number);
        }
        if SHARES.contains(&number) {
            return Case::share(random, number);
        }
        if SCALED.contains(&number) {
            return Case::scaled(random, number, number - SCALED.start, PASS_ROWS[number % 3]);
        }
        if WIDE_HEADS.contains(&number) {
            return Case::wide_heads(random, number, PASS_ROWS[number - WIDE_HEADS.start]);
        }
        if BANDS.contains(&number) {
            return Case::bands(random, number, number - BANDS.start);
        }
        let moe = EXPERTS.contains(&number);
        let qwen = moe || !number.is_multiple_of(2);
        // A float32 matrix is rounded to float16 on packing.
        let stored = match number % 8 {
            _ if moe => [Format::F16, Format::BF16][(number - EXPERTS.start) / 2],
            0 | 1 | 4 | 5 => Format::BF16,
            6 => Format::F32,
            _ => Format::F16,
        };
        let group = [1, 2, 3, 4, 8][number % 5];
        let head_dim = match (number, random.pick(&[16, 24, 32, 40, 64, 72, 80, 96, 120, 128])) {
            (NARROW_HEADS, _) => 8,
            (_, head_dim) => head_dim,
        };
        let kv_heads = random.pick(&[1, 2, 3, 4]).min((1536 / (group * head_dim)).max(1));
        let heads = group * kv_heads;
        let hidden = match (number, random.pick(&[64, 72, 128, 200, 256, 328, 576, 768, 1024])) {
            (LONG_ROWS, _) => 8456,
            (_, hidden) => hidden,
        };
        let mut intermediate = random.pick(&[64, 72, 200, 256, 1000, 1536, 3000]);
        if moe {
            intermediate = intermediate.min(264);
        }
        if number + 1 == LONG_ROWS {
            intermediate = 8712;
        }
        let vocab = random.pick(&[161, 512, 1000, 1003, 2048, 4099]);
        let layers = 1 + random.below(3);
        let kv = random.pick(&[KvType::F16, KvType::Bf16]);
        let tied = random.one_in(2);
        let attention_bias = random.one_in(2);
        let mlp_bias = random.one_in(2) && !qwen;
        let window = (qwen && random.one_in(2)).then(|| random.pick(&[5, 64, 128, 200]));
        // Not all layers are alike, but one has the window.
        let first_window = random.below(2).min(layers - 1);
        let theta = random.pick(&[10_000.0, 1_000_000.0]);
        let fp8 = FP8.contains(&number);
        let drafts = DRAFTS.contains(&number);
        let loud = stored != Format::BF16 && !fp8 && !moe && !drafts && random.one_in(2);
        // Numbers of their own: the other cases are what they were.
        let mut routed = Random::new(seed, 10_000 + number as u64);
        // So many that the last one chosen weighs little; once all there are.
        let (top_k, experts) = [(5, 5), (5, 136), (4, 24), (8, 40)][number % 4];
        let fp4_experts = moe && (number - EXPERTS.start) % 2 == 1;
        let renormalized = routed.one_in(2);

        let mut config = json!({
            "architectures": [match () {
                _ if moe => "Qwen3MoeForCausalLM",
                _ if qwen => "Qwen3ForCausalLM",
                _ => "LlamaForCausalLM",
            }],
            "model_type": if moe { "qwen3_moe" } else if qwen { "qwen3" } else { "llama" },
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-5,
            "rope_theta": theta,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": tied,
            "attention_bias": attention_bias,
            "bos_token_id": null,
            "eos_token_id": null,
        });
        if moe {
            config["num_experts"] = experts.into();
            config["num_experts_per_tok"] = top_k.into();
            config["moe_intermediate_size"] = intermediate.into();
            config["norm_topk_prob"] = renormalized.into();
            config["decoder_sparse_step"] = 1.into();
            config["mlp_only_layers"] = json!([]);
        }
        if mlp_bias {
            config["mlp_bias"] = true.into();
        }
        if let Some(window) = window {
            config["use_sliding_window"] = true.into();
            config["sliding_window"] = window.into();
            config["max_window_layers"] = first_window.into();
        }
        let feed_forward = if moe { 3 * intermediate * top_k + experts } else { 3 * intermediate };
        let products = layers * hidden * (2 * (heads + kv_heads) * head_dim + feed_forward) + vocab * hidden;
        let mut name = format!(
            "{number} {} {} kv-{} {hidden}x{intermediate} {heads}/{kv_heads}x{head_dim} L{layers} v{vocab}",
            config["model_type"].as_str().unwrap_or_default(),
            stored.name().unwrap_or_default(),
            kv.name(),
        );
        for (part, there) in
            [("fp8", fp8), ("tied", tied), ("bias", attention_bias), ("mlp-bias", mlp_bias), ("loud", loud)]
        {
            if there {
                name.push(' ');
                name.push_str(part);
            }
        }
        if moe {
            let fp4 = if fp4_experts { " mxfp4" } else { "" };
            name.push_str(&format!(" {top_k}of{experts}{fp4}"));
        }
        if let Some(window) = window {
            name.push_str(&format!(" w{window}+{first_window}"));
        }
        name.push_str(&format!(" r{}", PASS_ROWS[number % 3]));
        let draft = drafts.then(|| {
            let mut random = Random::new(seed, 20_000 + number as u64);
            let (draft, what) = DraftCase::new(&mut random, hidden, layers, vocab);
            name.push_str(&format!(", {what}"));
            draft
        });
        Case {
            name,
            seed: random.next(),
            config,
            stored,
            fp8,
            fp4_experts,
            scaled: None,
            pass_rows: PASS_ROWS[number % 3],
            kv,
            layers,
            vocab,
            shard: None,
            products,
            loud: if loud { LOUD } else { 1.0 },
            draft,
        }
    }

    /// MiMo with a dense feed-forward layer in place of its experts.
    fn mimo(mut random: Random, number: usize) -> Case {
        let (head_dim, v_head_dim) = random.pick(&[(48, 32), (96, 64), (192, 128)]);
        let (kv_heads, group) = (random.pick(&[1, 2]), random.pick(&[2, 4, 16]));
        let heads = kv_heads * group;
        let window_kv_heads = if number >= MIMO.start + 2 { 2 * kv_heads } else { kv_heads };
        let hidden = random.pick(&[72, 128, 200, 256]);
        let intermediate = random.pick(&[72, 200, 256]);
        let vocab = random.pick(&[161, 512, 1003]);
        let window = random.pick(&[5, 64, 128, 200]);
        let kv = random.pick(&[KvType::F16, KvType::Bf16]);
        let (fused, fp8) = (number >= MIMO.start + 3, number >= MIMO.start + 4);
        let value_scale = (number > MIMO.start).then_some(0.612);
        let config = json!({
            "architectures": [if fused { "MiMoV2ForCausalLM" } else { "MiMoV2FlashForCausalLM" }],
            "model_type": if fused { "mimo_v2" } else { "mimo_v2_flash" },
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "swa_num_key_value_heads": window_kv_heads,
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "partial_rotary_factor": 0.334,
            "vocab_size": vocab,
            "layernorm_epsilon": 1e-5,
            "rope_theta": 5_000_000.0,
            "swa_rope_theta": 10_000.0,
            "max_position_embeddings": CONTEXT,
            "sliding_window": window,
            "hybrid_layer_pattern": [1, 0],
            "moe_layer_freq": [0, 0],
            "attention_value_scale": value_scale,
            "attention_projection_layout": if fused { "fused_qkv" } else { "split" },
            "tie_word_embeddings": false,
            "bos_token_id": null,
            "eos_token_id": null,
        });
        let all_heads = 2 * heads + kv_heads + window_kv_heads;
        Case {
            name: format!(
                "{number} mimo bf16 kv-{} {hidden}x{intermediate} {heads}/{kv_heads}|{window_kv_heads}x{head_dim}+{v_head_dim} \
                 v{vocab} sinks w{window}{}{}",
                kv.name(),
                if fused { " fused" } else { "" },
                if fp8 { " fp8" } else { "" },
            ),
            seed: random.next(),
            config,
            stored: Format::BF16,
            fp8,
            fp4_experts: false,
            scaled: None,
            pass_rows: PASS_ROWS[number % 3],
            kv,
            layers: 2,
            vocab,
            shard: None,
            products: hidden * (all_heads * (head_dim + v_head_dim) + 6 * intermediate) + vocab * hidden,
            loud: 1.0,
            draft: None,
        }
    }

    /// A mixture in bfloat16 but for its experts, which are in FP4.
    fn with_fp4_experts(
        name: String,
        seed: u64,
        config: Value,
        pass_rows: usize,
        kv: KvType,
        products: usize,
    ) -> Case {
        let of = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
        Case {
            name,
            seed,
            layers: of("num_hidden_layers"),
            vocab: of("vocab_size"),
            config,
            stored: Format::BF16,
            fp8: false,
            fp4_experts: true,
            scaled: None,
            pass_rows,
            kv,
            shard: None,
            products,
            loud: 1.0,
            draft: None,
        }
    }

    /// MiMo with heads as wide as its own: a dense layer with a window, and experts of FP4 behind one without.
    fn wide_heads(mut random: Random, number: usize, pass_rows: usize) -> Case {
        let (hidden, intermediate) = (random.pick(&[128, 200, 256]), random.pick(&[96, 256, 288]));
        let (vocab, kv) = (random.pick(&[161, 512, 1003]), random.pick(&[KvType::F16, KvType::Bf16]));
        let (heads, kv_heads, top_k, experts) = (8, 2, 3, 40);
        let config = json!({
            "architectures": ["MiMoV2ForCausalLM"], "model_type": "mimo_v2", "hidden_act": "silu",
            "hidden_size": hidden, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": vocab,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "swa_num_key_value_heads": kv_heads,
            "head_dim": 192, "v_head_dim": 128, "partial_rotary_factor": 0.334,
            "layernorm_epsilon": 1e-5, "rope_theta": 5_000_000.0, "swa_rope_theta": 10_000.0,
            "max_position_embeddings": CONTEXT, "sliding_window": 64,
            "hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1],
            "n_routed_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": intermediate,
            "attention_value_scale": 0.612, "attention_projection_layout": "fused_qkv",
            "tie_word_embeddings": false, "bos_token_id": null, "eos_token_id": null,
        });
        let columns = 2 * (heads + kv_heads) * (192 + 128) + 3 * 256 + 3 * intermediate * top_k + experts;
        let name = format!(
            "{number} mimo_v2 bf16 kv-{} {hidden}x{intermediate} {heads}/{kv_heads}x192+128 v{vocab} {top_k}of{experts} \
             mxfp4 r{pass_rows}",
            kv.name()
        );
        let products = hidden * columns + vocab * hidden;
        Case::with_fp4_experts(name, random.next(), config, pass_rows, kv, products)
    }

    /// A mixture in FP4 whose experts' rows are long.
    fn bands(mut random: Random, number: usize, kind: usize) -> Case {
        let (hidden, intermediate, top_k, experts) =
            [(2048, 4352, 2, 3), (1536, 1160, 5, 24), (768, 2880, 4, 10)][kind];
        let (pass_rows, layers, heads, kv_heads, head_dim) = (PASS_ROWS[kind], 2, 4, 2, 64);
        let (vocab, kv) = (random.pick(&[161, 512, 1003]), random.pick(&[KvType::F16, KvType::Bf16]));
        let config = json!({
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
            "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "vocab_size": vocab, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0,
            "max_position_embeddings": CONTEXT, "tie_word_embeddings": true, "attention_bias": false,
            "num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": intermediate,
            "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "bos_token_id": null, "eos_token_id": null,
        });
        let columns = 2 * (heads + kv_heads) * head_dim + 3 * intermediate * top_k + experts;
        let name = format!(
            "{number} qwen3_moe bf16 kv-{} {layers}x{hidden}x{intermediate} {heads}/{kv_heads}x{head_dim} v{vocab} \
             {top_k}of{experts} mxfp4 r{pass_rows}",
            kv.name()
        );
        let products = layers * hidden * columns + vocab * hidden;
        Case::with_fp4_experts(name, random.next(), config, pass_rows, kv, products)
    }

    /// One rank's share of a model.
    fn share(mut random: Random, number: usize) -> Case {
        let kind = number - SHARES.start;
        let ranks = 2;
        let shard = Shard { rank: random.below(ranks), ranks };
        // Of this rank; rows of block FP8 are cut at octets.
        let unit = if kind == 2 { 8 } else { 1 };
        let vocab = random.pick(&[83usize, 256, 501]).next_multiple_of(unit);
        let hidden = random.pick(&[72, 128, 256]);
        let kv = random.pick(&[KvType::F16, KvType::Bf16]);
        let layers = 2;
        let config = json!({
            "hidden_act": "silu",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "vocab_size": vocab * ranks,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": null,
            "eos_token_id": null,
        });
        let (own, columns, heads) = match kind {
            0 => (
                json!({
                    "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                    "intermediate_size": 400, "num_attention_heads": 12, "num_key_value_heads": 4,
                    "head_dim": 40, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
                    "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true,
                }),
                3 * 400,
                (12 + 4) * 2 * 40,
            ),
            1 => (
                json!({
                    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
                    "intermediate_size": 400, "num_attention_heads": 8, "num_key_value_heads": 1,
                    "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
                    "tie_word_embeddings": false, "attention_bias": false,
                    "num_experts": 24, "num_experts_per_tok": 5, "moe_intermediate_size": 256,
                    "norm_topk_prob": true, "decoder_sparse_step": 1, "mlp_only_layers": [],
                }),
                3 * 256 * 5 + 24,
                (8 + 1) * 2 * 64,
            ),
            // 128 columns of FP8 share a scale: 256 of values, 256 or 128 between gate and down, each. Its experts are compared by
            // sigmoids.
            _ => (
                json!({
                    "architectures": ["MiMoV2ForCausalLM"], "model_type": "mimo_v2",
                    "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2,
                    "swa_num_key_value_heads": 4, "head_dim": 48, "v_head_dim": 32,
                    "partial_rotary_factor": 0.334, "layernorm_epsilon": 1e-5,
                    "rope_theta": 5_000_000.0, "swa_rope_theta": 10_000.0, "sliding_window": 64,
                    "hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1],
                    "n_routed_experts": 40, "num_experts_per_tok": 3, "moe_intermediate_size": 256,
                    "attention_value_scale": 0.612, "attention_projection_layout": "fused_qkv",
                    "tie_word_embeddings": false,
                }),
                (3 * 512 + 3 * 3 * 256 + 40) / 2,
                (2 * 16 + 2 + 4) * (48 + 32) / 2,
            ),
        };
        let mut config = config;
        for (key, value) in own.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let family = config["model_type"].as_str().unwrap_or_default();
        let format = ["", " mxfp4", " fp8"][kind];
        let name = format!("{number} {family} bf16 kv-{} {hidden} v{vocab}{format}, {shard}", kv.name());
        Case {
            name,
            seed: random.next(),
            config,
            stored: Format::BF16,
            fp8: kind == 2,
            fp4_experts: kind == 1,
            scaled: None,
            pass_rows: PASS_ROWS[number % 3],
            kv,
            layers,
            vocab,
            shard: Some(shard),
            products: (layers * hidden * (heads + columns) + vocab * ranks * hidden) / ranks,
            loud: 1.0,
            draft: None,
        }
    }

    /// Whether the products' inputs are bfloat16; else they are float16.
    pub fn multiplies_bf16(&self) -> bool {
        self.stored == Format::BF16 || self.fp8 || self.fp4_experts
    }

    /// Deviation of a router's scores; 0 without one. Where all experts are chosen anyway, or are compared by
    /// sigmoids, of which the chosen ones would all be 1, sharp scores would only make their rounding loud.
    pub fn decision(&self) -> f64 {
        match (self.experts(), self.undecided(ROWS)) {
            (None, _) => 0.0,
            (Some(_), 0) => 1.0,
            _ if self.config.get("n_routed_experts").is_some() => 1.0,
            _ => DECISION,
        }
    }

    /// Experts of a layer, under the name of either family.
    fn experts(&self) -> Option<u64> {
        ["num_experts", "n_routed_experts"].iter().find_map(|key| self.config[*key].as_u64())
    }

    /// Of so many rows, those that may be far from the reference: where two experts have nearly the same
    /// score, a rounded input decides between them, and that may be an expert that weighs much.
    pub fn undecided(&self, rows: usize) -> usize {
        match (self.experts(), self.config["num_experts_per_tok"].as_u64()) {
            (Some(experts), Some(top_k)) if top_k < experts => rows / 8,
            _ => 0,
        }
    }

    /// Random tokens, a list for each purpose `stream`.
    pub fn tokens(&self, stream: u64, count: usize) -> Vec<u32> {
        let mut random = Random::new(self.seed, stream);
        (0..count).map(|_| random.below(self.vocab) as u32).collect()
    }

    /// What to compile, with the checkpoint in `folder`, for a GPU of this architecture.
    pub fn spec(&self, folder: PathBuf, arch: &str) -> ModelSpec {
        let draft = self.draft.as_ref().map(|draft| spec::DflashSpec {
            checkpoint: folder.join(DRAFT_FOLDER),
            block: None,
            context_rope_theta: draft.context_theta,
        });
        let mut spec = ModelSpec::for_checkpoint(folder);
        spec.draft = draft.map(|dflash| spec::Draft { dflash });
        spec.precision.kv_cache = Some(self.kv);
        if self.fp8 {
            spec.precision.weights = spec::WeightFormat::Converted(Format::FP8_BLOCK);
        }
        if self.fp4_experts {
            spec.precision.experts = Some(spec::WeightFormat::Converted(Format::MXFP4));
        }
        if let Some(scaled) = &self.scaled {
            scaled.precision(&mut spec.precision);
        }
        spec.precision.activations = spec::Activations::F32;
        spec.target.device = spec::Device::Cuda;
        spec.target.arch = arch.into();
        if let Some(Shard { rank, ranks }) = self.shard {
            (spec.target.gpus, spec.target.only_rank) = (Some(ranks), Some(rank));
        }
        spec.limits = spec::Limits {
            sequences: SEQUENCES,
            context: Some(CONTEXT),
            rows: ROWS,
            pass_rows: Some(self.pass_rows),
        };
        spec
    }

    /// Mean and deviation of a tensor's values.
    fn distribution(&self, name: &str, shape: &[usize]) -> (f32, f32) {
        let of = |part: &str| name.contains(part);
        let cols = shape.last().copied().unwrap_or(1).max(1) as f32;
        let qk_norm = self.config["model_type"] != "llama";
        let last = format!("layers.{}.post_attention_layernorm", self.layers - 1);
        let sharp = SHARPNESS as f32;
        match shape.len() {
            // Either the norm of the queries or their matrix makes attention sharp.
            1 if of("q_norm") => (sharp, 0.3 * sharp),
            1 if of(&last) => (self.loud, 0.3 * self.loud),
            1 if of("norm") => (1.0, 0.3),
            1 if of("sink") => (2.0, 0.5),
            1 => (0.0, 0.3),
            // About the identity, and far enough from it.
            3 if of("base_kernel") => (0.6, 0.2),
            _ if of("kernel_projection") => (0.0, 0.3 / cols.sqrt()),
            _ if of("mlp.gate.") => (0.0, self.decision() as f32 / cols.sqrt()),
            _ if of("q_proj") && !qk_norm => (0.0, sharp / cols.sqrt()),
            // Queries and keys share it.
            _ if of("qkv_proj") => (0.0, (sharp / cols).sqrt()),
            // What attention and the feed-forward layer add is then about as large as the residual.
            _ if of("o_proj") || of("down_proj") => (0.0, 2.0 / cols.sqrt()),
            // A head that is this matrix, too, would otherwise repeat its input for ever.
            _ if of("embed_tokens") && self.config["tie_word_embeddings"] != true => (0.0, 1.0),
            _ => (0.0, 1.0 / cols.sqrt()),
        }
    }

    /// Names and shapes of the draft's tensors.
    ///
    /// # Errors
    /// When the draft does not fit the model.
    pub fn draft_tensors(&self, draft: &DraftCase) -> Result<Vec<(String, Vec<usize>)>> {
        let tensors = frontends::synthetic_draft_tensors(&draft.config, &self.config, self.stored)?;
        let mut tensors: Vec<_> = tensors.into_iter().map(|(name, info)| (name, info.shape)).collect();
        if draft.mask_embedding {
            let hidden = self.config["hidden_size"].as_u64().unwrap_or_default() as usize;
            tensors.push(("mask_embedding".into(), vec![hidden]));
        }
        Ok(tensors)
    }

    /// Writes the checkpoint, and that of its draft: matrices as [`Case::stored`], all else as float32.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        self.write_tensors(folder, &self.config, frontends::expected_tensors(&self.config)?, 1000)?;
        match &self.draft {
            Some(draft) => {
                let tensors = self.draft_tensors(draft)?;
                self.write_tensors(&folder.join(DRAFT_FOLDER), &draft.config, tensors, 3000)
            }
            None => Ok(()),
        }
    }

    fn write_tensors(
        &self,
        folder: &Path,
        config: &Value,
        tensors: Vec<(String, Vec<usize>)>,
        stream: u64,
    ) -> Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join("config.json");
        std::fs::write(&path, format!("{config:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
        let mut parts: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for (number, (name, shape)) in tensors.into_iter().enumerate() {
            let (mean, deviation) = self.distribution(&name, &shape);
            let mut random = Random::new(self.seed, stream + number as u64);
            let count: usize = shape.iter().product();
            let values: Vec<f32> = (0..count).map(|_| mean + deviation * random.normal()).collect();
            let format = if shape.len() == 1 { Format::F32 } else { self.stored };
            let cols = shape.last().copied().unwrap_or(1);
            if let Some(scaled) = self.scaled.and_then(|scaled| scaled.stored(&name)) {
                parts.extend(Scaled::parts(&name, scaled, [count / cols, cols], &values)?);
                continue;
            }
            let dtype = match format {
                Format::BF16 => Dtype::BF16,
                Format::F16 => Dtype::F16,
                _ => Dtype::F32,
            };
            let codes = quantize(format, count / cols, cols, &values)?.codes;
            ensure!(codes.len() == count * dtype.bitsize() / 8, "{name}: the codes are not plain");
            parts.push((name, dtype, shape, codes));
        }
        let views = parts.iter().map(|(name, dtype, shape, bytes)| {
            TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name.as_str(), view))
        });
        let views = views.collect::<Result<Vec<_>, _>>().context("cannot lay the weights out")?;
        let path = folder.join("model.safetensors");
        safetensors::serialize_to_file(views, None, &path)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}
