"""Writes and reads checkpoints in the layout of MiMo-V2.5-Pro-FP4-DFlash.

| part | names | stored as |
| --- | --- | --- |
| experts | `model.layers.N.mlp.experts.E.{gate,up,down}_proj.weight`, `.weight_scale` | U8, two E2M1 codes a byte, the even k in the low half; U8 E8M0 scales of 32 |
| attention in | `model.layers.N.self_attn.qkv_proj.weight`, `.weight_scale_inv` | F8_E4M3, rows in groups of [Q, K, V]; F32 scales of 128 x 128, cut by group |
| dense layer | `model.layers.0.mlp.{gate,up,down}_proj.weight`, `.weight_scale_inv` | F8_E4M3; F32 scales of 128 x 128 |
| correction bias | `model.layers.N.mlp.gate.e_score_correction_bias` | F32 |
| the rest | embeddings, head, `o_proj`, norms, sinks, `mlp.gate` | BF16 |
"""

import json
import pathlib
import shutil

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import END, MASK
from draft import Draft, DraftConfig
from model import E2M1, Target, TargetConfig, fp8_parts, fp8_values, mxfp4_parts

SHARD = 15_500_000  # bytes; no file goes above 16 MB


# --------------------------------------------------------------------------------------------------------------
# Tensors


def pack_mxfp4(w):
    """(codes [N, K/2] uint8, scales [N, K/32] uint8) of `w` [N, K]."""
    values, exponent = mxfp4_parts(w)
    grid = torch.tensor(E2M1, device=w.device)
    code = torch.searchsorted(grid, values.abs().contiguous()).to(torch.uint8)
    code |= (values < 0).to(torch.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4, exponent.to(torch.uint8)


def unpack_mxfp4(codes, scales):
    """The float32 values [N, K] of `pack_mxfp4`."""
    code = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    values = torch.tensor(E2M1 + tuple(-x for x in E2M1))[code]
    scale = (scales.to(torch.int32) << 23).view(torch.float32)
    return values * scale.repeat_interleave(32, -1)


def by_group(function, groups, *tensors):
    """Applies `function` to each of `groups` equal parts of the tensors' rows and joins the results."""
    parts = [function(*p) for p in zip(*(t.chunk(groups) for t in tensors))]
    return [torch.cat(p) for p in zip(*parts)] if isinstance(parts[0], tuple) else torch.cat(parts)


def target_tensors(model):
    """The tensors of a target under their published names, as stored."""
    c, out = model.c, {}
    bf16 = lambda p: p.detach().to(torch.bfloat16).contiguous()

    def fp8(name, w, groups=1):
        out[name + ".weight"], out[name + ".weight_scale_inv"] = by_group(fp8_parts, groups, w.detach())

    out["model.embed_tokens.weight"] = bf16(model.embed)
    out["lm_head.weight"] = bf16(model.head)
    out["model.norm.weight"] = bf16(model.norm.weight)
    for i, layer in enumerate(model.layers):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"] = bf16(layer.norm1.weight)
        out[p + "post_attention_layernorm.weight"] = bf16(layer.norm2.weight)
        fp8(p + "self_attn.qkv_proj", layer.attention.qkv, c.kv_heads)
        out[p + "self_attn.o_proj.weight"] = bf16(layer.attention.o)
        if layer.attention.sink is not None:
            out[p + "self_attn.attention_sink_bias"] = bf16(layer.attention.sink)
        if layer.sparse:
            out[p + "mlp.gate.weight"] = bf16(layer.mlp.router)
            out[p + "mlp.gate.e_score_correction_bias"] = layer.mlp.bias.float().clone()
            for e in range(c.experts):
                for name in ("gate", "up", "down"):
                    codes, scales = pack_mxfp4(getattr(layer.mlp, name)[e].detach())
                    q = f"{p}mlp.experts.{e}.{name}_proj."
                    out[q + "weight"], out[q + "weight_scale"] = codes, scales
        else:
            for name in ("gate", "up", "down"):
                fp8(f"{p}mlp.{name}_proj", getattr(layer.mlp, name))
    return {k: v.cpu().contiguous() for k, v in out.items()}


def target_config(c):
    """config.json of a target."""
    windows = [0 if c.is_global(i) else 1 for i in range(c.layers)]
    return {
        "architectures": ["MiMoV2ForCausalLM"],
        "model_type": "mimo_v2",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "store_dtype": "mxfp4",
            "mxfp4_block_size": 32,
            "ignored_layers": [f"model.layers.{i}.self_attn.o_proj" for i in range(c.layers)],
        },
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "attention_bias": False,
        "attention_chunk_size": c.window,
        "attention_dropout": 0.0,
        "attention_projection_layout": "fused_qkv",
        "attention_value_scale": c.value_scale,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END,
        "head_dim": c.qk_dim,
        "hidden_act": "silu",
        "hidden_size": c.hidden,
        "hybrid_layer_pattern": windows,
        "initializer_range": 0.02,
        "intermediate_size": c.dense,
        "layernorm_epsilon": c.eps,
        "max_position_embeddings": c.context,
        "moe_intermediate_size": c.expert,
        "moe_layer_freq": [0] + [1] * (c.layers - 1),
        "n_group": 1,
        "n_routed_experts": c.experts,
        "n_shared_experts": None,
        "norm_topk_prob": True,
        "num_attention_heads": c.heads,
        "num_experts_per_tok": c.top_k,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "partial_rotary_factor": 0.334,
        "rope_theta": c.theta_global,
        "routed_scaling_factor": None,
        "scoring_func": "sigmoid",
        "sliding_window": c.window,
        "sliding_window_size": c.window,
        "swa_head_dim": c.qk_dim,
        "swa_num_attention_heads": c.heads,
        "swa_num_key_value_heads": 2 * c.kv_heads,
        "swa_rope_theta": c.theta_window,
        "swa_v_head_dim": c.v_dim,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": c.v_dim,
        "vocab_size": c.vocab,
    }


def draft_config(d):
    """dflash/config.json of a draft."""
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": d.hidden,
        "intermediate_size": d.mlp,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "v_head_dim": d.head_dim,
        "partial_rotary_factor": d.rotary_dim / d.head_dim,
        "block_size": d.block,
        "dflash_config": {
            "target_layer_ids": list(d.taps),
            "mask_token_id": MASK,
            "num_anchors": d.anchors,
            "block_size": d.block,
            "loss_decay_gamma": d.gamma,
            "use_swa": True,
            "swa_window_size": d.window,
            "attention_value_scale": d.value_scale,
            "attention_sink_bias": True,
        },
        "num_target_layers": d.target_layers,
        "vocab_size": d.vocab,
        "max_position_embeddings": d.context,
        "rope_theta": d.theta,
        "sliding_window": d.window,
        "is_causal": False,
        "rms_norm_eps": d.eps,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": END,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def draft_names(d):
    """Published name -> name in draft.py."""
    names = {"fc.weight": "fc", "hidden_norm.weight": "hidden_norm.weight", "norm.weight": "norm.weight"}
    for i in range(d.layers):
        p = f"layers.{i}."
        names[p + "input_layernorm.weight"] = p + "norm1.weight"
        names[p + "post_attention_layernorm.weight"] = p + "norm2.weight"
        names[p + "self_attn.attention_sink_bias"] = p + "sink"
        for x in ("q", "k", "v", "o"):
            names[f"{p}self_attn.{x}_proj.weight"] = p + x
        for x in ("q", "k"):
            names[f"{p}self_attn.{x}_norm.weight"] = f"{p}{x}_norm.weight"
        for x in ("gate", "up", "down"):
            names[f"{p}mlp.{x}_proj.weight"] = p + x
    return names


# --------------------------------------------------------------------------------------------------------------
# Folders


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_target(model, folder, tokenizer=None):
    """Writes config.json, the shards with their index and, from `tokenizer` (a path), the tokenizer."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    tensors = target_tensors(model)
    shards, size = [{}], 0
    for name, t in tensors.items():
        n = t.numel() * t.element_size() + 160  # its line in the header, too
        if size + n > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += n
    for i, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{i:05}-of-{len(shards):05}.safetensors", metadata={"format": "pt"})
    describe_target(model.c, folder, tokenizer)


def describe_target(c, folder, tokenizer=None):
    """Writes what lies beside the shards in `folder`: config.json, their index and, from `tokenizer` (a path), the
    tokenizer."""
    folder = pathlib.Path(folder)
    where, total = {}, 0
    for path in sorted(folder.glob("model-*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():
                t = f.get_tensor(name)
                where[name] = path.name
                total += t.numel() * t.element_size()
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )
    write_json(folder / "config.json", target_config(c))
    if tokenizer:
        if pathlib.Path(tokenizer).resolve() != (folder / "tokenizer.json").resolve():
            shutil.copy(tokenizer, folder / "tokenizer.json")
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "clean_up_tokenization_spaces": False,
                "model_max_length": c.context,
            },
        )


def write_draft(draft, folder):
    """Writes dflash/: config.json, dflash_draft_model.safetensors and mask_embedding.pt."""
    folder = pathlib.Path(folder) / "dflash"
    folder.mkdir(parents=True, exist_ok=True)
    state = draft.state_dict()
    tensors = {
        name: state[mine].to(torch.bfloat16).cpu().contiguous() for name, mine in draft_names(draft.d).items()
    }
    save_file(tensors, folder / "dflash_draft_model.safetensors", metadata={"format": "pt"})
    mask = state["mask"].to(torch.bfloat16).cpu()
    torch.save({"mask_token_id": MASK, "mask_embedding": mask}, folder / "mask_embedding.pt")
    write_json(folder / "config.json", draft_config(draft.d))


def read_tensors(folder, pattern="*.safetensors"):
    out = {}
    for path in sorted(pathlib.Path(folder).glob(pattern)):
        with safe_open(path, "pt") as f:
            out.update({k: f.get_tensor(k) for k in f.keys()})
    if not out:
        raise SystemExit(f"{folder}/{pattern}: no weights there; run export.py first")
    return out


def read_config(folder):
    j = json.loads((pathlib.Path(folder) / "config.json").read_text())
    return TargetConfig(
        vocab=j["vocab_size"],
        hidden=j["hidden_size"],
        layers=j["num_hidden_layers"],
        global_layers=tuple(i for i, w in enumerate(j["hybrid_layer_pattern"]) if not w),
        heads=j["num_attention_heads"],
        kv_heads=j["num_key_value_heads"],
        qk_dim=j["head_dim"],
        v_dim=j["v_head_dim"],
        rotary_dim=int(j["head_dim"] * j["partial_rotary_factor"]),
        window=j["sliding_window"],
        theta_global=j["rope_theta"],
        theta_window=j["swa_rope_theta"],
        value_scale=j["attention_value_scale"],
        dense=j["intermediate_size"],
        experts=j["n_routed_experts"],
        top_k=j["num_experts_per_tok"],
        expert=j["moe_intermediate_size"],
        eps=j["layernorm_epsilon"],
        context=j["max_position_embeddings"],
    )


def plain_weights(folder):
    """(config, weights as float32 under their published names, quantized ones widened) of an exported target."""
    c, t = read_config(folder), read_tensors(folder)
    out = {}
    for name, w in t.items():
        if name.endswith((".weight_scale", ".weight_scale_inv")):
            continue
        if name + "_scale" in t:
            w = unpack_mxfp4(w, t[name + "_scale"])
        elif name + "_scale_inv" in t:
            groups = c.kv_heads if "qkv_proj" in name else 1
            w = by_group(fp8_values, groups, w, t[name + "_scale_inv"])
        out[name] = w.float()
    return c, out


def read_target(folder, device, dtype=torch.bfloat16):
    """The target of an exported folder, its weights as stored; nothing is rounded again in the forward pass."""
    c, w = plain_weights(folder)
    model = Target(c, dtype)
    state = {
        "embed": w["model.embed_tokens.weight"],
        "head": w["lm_head.weight"],
        "norm.weight": w["model.norm.weight"],
    }
    for i in range(c.layers):
        p, q = f"model.layers.{i}.", f"layers.{i}."
        state[q + "norm1.weight"] = w[p + "input_layernorm.weight"]
        state[q + "norm2.weight"] = w[p + "post_attention_layernorm.weight"]
        state[q + "attention.qkv"] = w[p + "self_attn.qkv_proj.weight"]
        state[q + "attention.o"] = w[p + "self_attn.o_proj.weight"]
        if not c.is_global(i):
            state[q + "attention.sink"] = w[p + "self_attn.attention_sink_bias"]
        if i == 0:
            for x in ("gate", "up", "down"):
                state[f"{q}mlp.{x}"] = w[f"{p}mlp.{x}_proj.weight"]
        else:
            state[q + "mlp.router"] = w[p + "mlp.gate.weight"]
            state[q + "mlp.bias"] = w[p + "mlp.gate.e_score_correction_bias"]
            for x in ("gate", "up", "down"):
                state[f"{q}mlp.{x}"] = torch.stack(
                    [w[f"{p}mlp.experts.{e}.{x}_proj.weight"] for e in range(c.experts)]
                )
    model.load_state_dict(state)
    model.set_quantize(False)
    return model.to(device).eval().requires_grad_(False)


def read_draft(folder, device, dtype=torch.bfloat16):
    """The draft of an exported folder."""
    folder = pathlib.Path(folder) / "dflash"
    j = json.loads((folder / "config.json").read_text())
    f = j["dflash_config"]
    d = DraftConfig(
        vocab=j["vocab_size"],
        hidden=j["hidden_size"],
        layers=j["num_hidden_layers"],
        heads=j["num_attention_heads"],
        kv_heads=j["num_key_value_heads"],
        head_dim=j["head_dim"],
        rotary_dim=int(j["head_dim"] * j["partial_rotary_factor"]),
        mlp=j["intermediate_size"],
        block=j["block_size"],
        window=f["swa_window_size"],
        theta=j["rope_theta"],
        value_scale=f["attention_value_scale"],
        taps=tuple(f["target_layer_ids"]),
        target_layers=j["num_target_layers"],
        eps=j["rms_norm_eps"],
        context=j["max_position_embeddings"],
        anchors=f["num_anchors"],
        gamma=f["loss_decay_gamma"],
    )
    t = read_tensors(folder)
    state = {mine: t[name].float() for name, mine in draft_names(d).items()}
    state["mask"] = torch.load(folder / "mask_embedding.pt", weights_only=True)["mask_embedding"].float()
    draft = Draft(d, dtype)
    draft.load_state_dict(state)
    return draft.to(device).eval().requires_grad_(False)
