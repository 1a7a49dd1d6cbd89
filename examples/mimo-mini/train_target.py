#!/usr/bin/env python3
"""Trains the target within a box of time.

    python3 train_target.py --minutes 9 --state build/target.pt

The learning rate falls to zero as the minutes run out, start-up and compilation included. The state is saved every
--save-seconds and at the end; the same command continues from it, with the time used so far counted.
"""

import argparse
import json
import pathlib
import time

import torch
import torch.nn.functional as F

from common import HERE, Clock, Windows, load_tokens, optimisers, schedule, set_lr
from model import Target, TargetConfig

TOY = dict(
    hidden=128,
    layers=3,
    global_layers=(0, 2),
    heads=4,
    kv_heads=1,
    dense=128,
    experts=8,
    top_k=2,
    expert=64,
    context=256,
)


def loss_of(model, x, labels):
    return F.cross_entropy(model.logits(x).flatten(0, -2).float(), labels.flatten())


def heldout_loss(model, loss, tokens, length, batch, limit):
    """Mean loss a token over the first `limit` windows of the held-out tokens. Gradients stay on, so that the
    compiled code of the training steps serves."""
    windows = tokens[: (len(tokens) - 1) // length * length].view(-1, length)[:limit]
    total = count = 0.0
    for part in windows.split(batch):
        if len(part) < batch:
            break
        part = part.long()
        x, _, _ = model(part)
        total += loss(model, x[:, :-1], part[:, 1:]).item() * len(part)
        count += len(part)
    return total / max(count, 1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=HERE / "data")
    parser.add_argument("--state", type=pathlib.Path, default=HERE / "build" / "target.pt")
    parser.add_argument("--log", type=pathlib.Path, default=None)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--batch", type=int, default=64, help="sequences in one pass")
    parser.add_argument("--accumulate", type=int, default=2, help="passes in one step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=2e-3, help="step of the router's correction bias")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-seconds", type=float, default=150)
    parser.add_argument("--toy", action="store_true", help="a tiny model, for trying the script on a CPU")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    clock = Clock(args.minutes)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = TargetConfig(**TOY) if args.toy else TargetConfig()
    model = Target(config).to(device)
    opts = optimisers(model, args.lr, lambda n: n in ("embed", "head") or n.endswith("router"))
    train = load_tokens(args.data, "train.*.bin.xz").to(device)
    held = load_tokens(args.data, "heldout.bin.xz").to(device)
    windows = Windows(train, config.context, args.seed)
    step = 0
    if args.state.exists():
        saved = torch.load(args.state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, s in zip(opts, saved["optimisers"]):
            opt.load_state_dict(s)
        step, windows.passed, clock.used = saved["step"], saved["windows"], saved["seconds"]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {len(train) / 1e6:.1f} M tokens, "
        f"step {step}, {clock.seconds():.0f} s used",
        flush=True,
    )
    loss = loss_of
    if not args.no_compile:
        torch._dynamo.config.cache_size_limit = 32
        for layer in model.layers:
            layer.compile(dynamic=False)
        loss = torch.compile(loss_of, dynamic=False)

    def save():
        args.state.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.state.with_suffix(".tmp")
        torch.save(
            {
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in opts],
                "step": step,
                "windows": windows.passed,
                "seconds": clock.seconds(),
                "config": vars(config),
            },
            temporary,
        )
        temporary.replace(args.state)

    tokens_a_step = args.batch * args.accumulate * config.context
    log = []
    saved_at, said_at, said_step = time.monotonic(), time.monotonic(), step
    while (progress := clock.progress()) < 1.0:
        set_lr(opts, args.lr * schedule(progress, step))
        mean, load = 0.0, 0.0
        for _ in range(args.accumulate):
            part = windows.draw(args.batch)
            x, loads, _ = model(part)
            one = loss(model, x[:, :-1], part[:, 1:]) / args.accumulate
            one.backward()
            mean, load = mean + one.detach(), load + loads
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        # Balance without a loss: an expert with too few tokens gets a higher bias. The biases rest at the end.
        rate = args.balance * min(1.0, 4 * (1 - progress))
        for layer, l in zip(model.layers[1:], load):
            layer.mlp.bias += rate * torch.sign(l.mean() - l)
        step += 1
        if step % 50 == 0 or step == 1:
            value = mean.item()
            now = time.monotonic()
            rate = (step - said_step) * tokens_a_step / (now - said_at)
            busy = (load.amax(1) / load.mean(1)).mean().item()
            print(
                f"step {step} {clock.seconds():.0f} s loss {value:.4f} {rate / 1e3:.0f} k tokens/s "
                f"busiest expert {busy:.2f}x",
                flush=True,
            )
            log.append({"step": step, "seconds": round(clock.seconds(), 1), "loss": round(value, 4)})
            said_at, said_step = now, step
            if value != value:
                raise SystemExit("the loss is not a number; continue from the saved state with a lower --lr")
        if time.monotonic() - saved_at > args.save_seconds:
            save()
            saved_at = time.monotonic()
            said_at, said_step = saved_at, step
    save()
    final = heldout_loss(model, loss, held, config.context, args.batch, 4 * args.batch)
    print(
        f"held-out loss {final:.4f} a token; {step} steps, {step * tokens_a_step / 1e6:.0f} M tokens, "
        f"{windows.passed / windows.per_pass:.1f} passes, {clock.seconds():.0f} s"
    )
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
    if args.log:
        args.log.write_text(
            json.dumps(
                {
                    "steps": step,
                    "tokens": step * tokens_a_step,
                    "passes": windows.passed / windows.per_pass,
                    "seconds": clock.seconds(),
                    "heldout_loss": final,
                    "training": log,
                    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                }
            )
        )


if __name__ == "__main__":
    main()
