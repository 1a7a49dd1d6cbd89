#!/usr/bin/env python3
"""Measures an exported checkpoint on held-out code: python3 evaluate.py --checkpoint checkpoint --out evaluation.json

Sections (--only picks some): loss, completions, acceptance, experts. `loss` also measures the unquantized target
when --state names the training state. A GPU does it in a minute; --windows and --prompts make it small.
"""

import argparse
import json
import math
import pathlib

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from checkpoint import read_draft, read_target
from common import HERE, load_tokens
from decode import acceptance, generate, repetitive, speculate
from model import Target, TargetConfig

PROMPTS = [
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
    "import os\n\n\ndef read_lines(path):\n    with open(path",
    "class TestParser(unittest.TestCase):\n    def setUp(self):\n        self.parser = Parser()\n\n    def test_empty(self):\n",
]


@torch.no_grad()
def token_loss(target, tokens, limit, batch=16):
    """Mean nats a token over windows of the target's context, and the tokens measured."""
    length = target.c.context
    windows = tokens[: len(tokens) // length * length].view(-1, length)[:limit]
    total = count = 0
    for part in windows.split(batch):
        part = part.long()
        x, _, _ = target(part)
        logits = target.logits(x[:, :-1]).float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        count += part[:, 1:].numel()
    return total / count, count


@torch.no_grad()
def distinct_experts(target, tokens, limit, batch=16, blocks=(1, 2, 4, 8, 16)):
    """Distinct experts a sparse layer uses for blocks of consecutive tokens, and the load of its busiest expert."""
    c = target.c
    length = c.context
    windows = tokens[: len(tokens) // length * length].view(-1, length)[:limit]
    masks = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda module, args, i=i: masks.__setitem__(i, module.route(args[0])[1].bool())
        )
        for i, layer in enumerate(target.layers)
        if layer.sparse
    ]
    sums = {n: torch.zeros(c.layers - 1, dtype=torch.float64) for n in blocks}
    load = torch.zeros(c.layers - 1, c.experts, dtype=torch.float64)
    parts = 0
    for part in windows.split(batch):
        target(part.long())
        for i, mask in masks.items():
            load[i - 1] += mask.sum((0, 1)).cpu().double()
            for n in blocks:
                used = mask.unflatten(1, (-1, n)).any(2).sum(-1).double()
                sums[n][i - 1] += used.mean().item() * len(part)
        parts += len(part)
    for hook in hooks:
        hook.remove()
    return {
        "experts": c.experts,
        "top_k": c.top_k,
        "windows": parts,
        "blocks": {
            str(n): {
                "layers": [round(x, 3) for x in (sums[n] / parts).tolist()],
                "mean": round((sums[n] / parts).mean().item(), 3),
                "uniform": round(c.experts * (1 - (1 - c.top_k / c.experts) ** n), 3),
            }
            for n in blocks
        },
        "busiest_over_mean": [round(x, 3) for x in (load.amax(1) / load.mean(1)).tolist()],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=HERE / "data")
    parser.add_argument("--checkpoint", type=pathlib.Path, default=HERE / "checkpoint")
    parser.add_argument(
        "--state", type=pathlib.Path, help="training state, for the loss without quantization"
    )
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "build" / "evaluation.json")
    parser.add_argument("--only", nargs="*", default=["loss", "completions", "acceptance", "experts"])
    parser.add_argument("--windows", type=int, default=10**9, help="held-out windows for loss and experts")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate")
    parser.add_argument(
        "--only-greedy", action="store_true", help="of acceptance, only the greedy loop (for a CPU)"
    )
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = json.loads(args.out.read_text()) if args.out.exists() else {}
    data = json.loads((args.data / "data.json").read_text())["heldout"]
    held = load_tokens(args.data, "heldout.bin.xz").to(device)
    target = read_target(args.checkpoint, device)
    out["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    if "loss" in args.only:
        to_bits = data["tokens"] / data["bytes"] / math.log(2)
        rows = {}

        def measure(name, model):
            nats, count = token_loss(model, held, args.windows)
            rows[name] = {
                "nats_per_token": round(nats, 5),
                "bits_per_byte": round(nats * to_bits, 5),
                "tokens": count,
            }
            print(name, rows[name], flush=True)

        measure("exported", target)
        if args.state:
            saved = torch.load(args.state, map_location="cpu", weights_only=True)
            config = dict(saved["config"])
            config["global_layers"] = tuple(config["global_layers"])
            model = Target(TargetConfig(**config))
            model.load_state_dict(saved["model"])
            model = model.to(device).eval().requires_grad_(False)
            measure("fp4_experts_rest_bf16", model)
            model.set_quantize(False)
            measure("bf16", model)
            del model
        out["loss"] = rows

    if "completions" in args.only:
        tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
        texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
            done = generate(target, ids, ids.shape[1] + 96, 0)[0].tolist()
            texts.append(tokenizer.decode(done, skip_special_tokens=False).split("<|endoftext|>")[0])
            print("-" * 40, texts[-1], sep="\n", flush=True)
        out["completions"] = texts

    if "acceptance" in args.only:
        draft = read_draft(args.checkpoint, device)
        starts = (
            torch.linspace(0, len(held) - args.prompt - 1, args.prompts, dtype=torch.float64)
            .long()
            .to(device)
        )
        prompts = held[starts[:, None] + torch.arange(args.prompt, device=device)].long()
        rows = {}
        for name, temperature, shuffled in (
            ("greedy", 0.0, False),
            ("temperature 0.8", 0.8, False),
            ("greedy, taps shuffled", 0.0, True),
        ):
            if args.only_greedy and name != "greedy":
                continue
            tokens, lengths, counts = speculate(target, draft, prompts, args.new, temperature, shuffled)
            rows[name] = acceptance(counts)
            print(name, rows[name], flush=True)
            if (
                name == "greedy"
            ):  # a small model falls into loops, which are easy to guess: say it without them, too
                looped = torch.stack(
                    [
                        (
                            repetitive(tokens[i : i + 1, args.prompt : n].contiguous())[0]
                            if n > args.prompt + 8
                            else torch.tensor(False, device=device)
                        )
                        for i, n in enumerate(lengths.tolist())
                    ]
                )
                rows["greedy, texts without loops"] = acceptance(counts[~looped]) | {
                    "texts": int((~looped).sum())
                }
                print("without loops", rows["greedy, texts without loops"], flush=True)
        if args.only_greedy:
            out["acceptance"] = out.get("acceptance", {}) | rows
            args.out.write_text(json.dumps(out, indent=1))
            return
        # The loop must say what plain decoding says; in float32, where rounding decides next to nothing.
        few = prompts[:32]
        exact = read_target(args.checkpoint, device, torch.float32)
        plain = generate(exact, few, args.prompt + args.new, 0)
        tokens, lengths, counts = speculate(
            exact, read_draft(args.checkpoint, device, torch.float32), few, args.new
        )
        upto = lengths.clamp_max(args.prompt + args.new)
        same = sum(
            int((tokens[i, args.prompt : n] == plain[i, args.prompt : n]).sum())
            for i, n in enumerate(upto.tolist())
        )
        total = int((upto - args.prompt).sum())
        rows["same as plain greedy, float32"] = f"{same} of {total}"
        print(f"{same} of {total} tokens as plain greedy decoding")
        out["acceptance"] = rows | {"prompts": args.prompts, "prompt": args.prompt, "new": args.new}

    if "experts" in args.only:
        out["experts"] = distinct_experts(target, held, args.windows)
        for n, row in out["experts"]["blocks"].items():
            print(f"blocks of {n}: {row}", flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
