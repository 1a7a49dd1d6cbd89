#!/usr/bin/env python3
"""Loads an exported target in transformers and compares its logits with the training code's.

    python3 check_transformers.py --checkpoint checkpoint

transformers has the architecture as `mimo_v2_flash`, with separate q, k and v projections and no reader for MXFP4 in
this layout. So the weights are widened to float32 and written once under the names that its loader takes. Needs
transformers 5.17; exits with 1 when the logits differ by more than 1e-3.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import torch
from safetensors.torch import save_file

from checkpoint import plain_weights, read_target
from common import HERE, load_tokens


def write_flash(checkpoint, folder):
    """Writes `checkpoint`'s target as a float32 `mimo_v2_flash` checkpoint."""
    c, weights = plain_weights(checkpoint)
    out = {}
    for name, w in weights.items():
        if "qkv_proj" not in name:
            out[name] = w.contiguous()
            continue
        layer = int(name.split(".")[2])
        kv = c.layer_kv_heads(layer)
        rows = [c.heads // c.kv_heads * c.qk_dim, kv // c.kv_heads * c.qk_dim, kv // c.kv_heads * c.v_dim]
        groups = w.view(c.kv_heads, -1, c.hidden).split(rows, 1)
        for x, part in zip("qkv", groups):
            out[name.replace("qkv_proj", f"{x}_proj")] = part.reshape(-1, c.hidden).contiguous()
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    kinds = ["full_attention" if c.is_global(i) else "sliding_attention" for i in range(c.layers)]
    rope = {"rope_type": "default", "partial_rotary_factor": 0.334}
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["MiMoV2FlashForCausalLM"],
                "model_type": "mimo_v2_flash",
                "vocab_size": c.vocab,
                "hidden_size": c.hidden,
                "intermediate_size": c.dense,
                "num_hidden_layers": c.layers,
                "num_attention_heads": c.heads,
                "num_key_value_heads": c.kv_heads,
                "head_dim": c.qk_dim,
                "v_head_dim": c.v_dim,
                "sliding_window": c.window,
                "layer_types": kinds,
                "mlp_layer_types": ["dense"] + ["sparse"] * (c.layers - 1),
                "moe_intermediate_size": c.expert,
                "n_routed_experts": c.experts,
                "num_experts_per_tok": c.top_k,
                "rms_norm_eps": c.eps,
                "attention_value_scale": c.value_scale,
                "max_position_embeddings": c.context,
                "bos_token_id": None,
                "eos_token_id": 0,
                "pad_token_id": None,
                "tie_word_embeddings": False,
                "torch_dtype": "float32",
                "rope_parameters": {
                    "full_attention": rope | {"rope_theta": c.theta_global},
                    "sliding_attention": rope | {"rope_theta": c.theta_window},
                },
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, default=HERE / "checkpoint")
    parser.add_argument("--data", type=pathlib.Path, default=HERE / "data")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    mine = read_target(args.checkpoint, "cpu", torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        write_flash(args.checkpoint, pathlib.Path(folder))
        theirs, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    lost = {k: v for k, v in report.items() if v}
    if lost:
        sys.exit(f"transformers did not take every tensor: {lost}")
    if list(args.data.glob("heldout.bin.xz")):
        tokens = load_tokens(args.data, "heldout.bin.xz")[: 2 * 512].view(2, 512).long()
    else:
        tokens = torch.randint(2, mine.c.vocab, (2, 512), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        x, _, _ = mine(tokens)
        a, b = mine.logits(x), theirs.eval()(tokens).logits
    worst = (a - b).abs().max().item()
    same = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
    print(
        f"logits to {a.abs().max():.2f}; largest difference {worst:.2e}; same choice at {same:.2%} of positions"
    )
    if not worst < 1e-3:
        sys.exit("the logits differ: the checkpoint or its reading is wrong")


if __name__ == "__main__":
    main()
