//! Two-layer models, one of each family, with as much of it as fits.

use serde_json::{Value, json};

/// Biases, a tied head.
pub fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
        "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true
    })
}

/// Norms of heads, a head of its own, a layer with a window.
pub fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 160,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 256,
        "tie_word_embeddings": false, "attention_bias": false,
        "use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1
    })
}

/// A dense layer that sees everything, and a mixture with a window, sinks and more KV heads.
#[allow(dead_code)]
pub fn mimo_v2() -> Value {
    json!({
        "architectures": ["MiMoV2ForCausalLM"], "model_type": "mimo_v2", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "swa_num_key_value_heads": 2,
        "head_dim": 48, "v_head_dim": 32, "vocab_size": 160, "layernorm_epsilon": 1e-5,
        "rope_theta": 1000000.0, "swa_rope_theta": 10000.0, "partial_rotary_factor": 0.334,
        "max_position_embeddings": 256, "sliding_window": 16, "attention_value_scale": 0.612,
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "attention_projection_layout": "fused_qkv", "tie_word_embeddings": false
    })
}

/// Experts with biases, rows of gate and up alternating, sinks, a clamped gate.
#[allow(dead_code)]
pub fn gpt_oss() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160,
        "rms_norm_eps": 1e-5, "rope_theta": 150000.0, "max_position_embeddings": 256,
        "sliding_window": 16, "num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 7.0
    })
}
