#!/usr/bin/env python3
"""Trains the draft of an exported target within a box of time.

    python3 train_draft.py --checkpoint build/checkpoint --minutes 6

Half of the sequences are the target's own continuations of training prompts (half of them greedy, half sampled at
temperature 0.8), half are training code. A block is trained to say what the target would say greedily: the label of
a row is the target's choice at that place, counted only while the text so far is what the target would have said.
Writes CHECKPOINT/dflash/. The state (draft, optimisers, generated text) is kept in --state; the same command goes on.
"""

import argparse
import json
import pathlib
import time

import torch
import torch.nn.functional as F

from checkpoint import read_target, write_draft
from common import HERE, Clock, Windows, load_tokens, optimisers, schedule, set_lr
from decode import generate, repetitive
from draft import Draft, DraftConfig


def block_targets(tokens, best, anchors, block):
    """Labels and whether they count, both [B,N,block-1], for blocks at `anchors` [B,N].

    `best` [B,S] is the target's greedy choice behind each of `tokens` [B,S]. Row k's label is the choice for
    position anchor + k. It counts while tokens anchor+1 .. anchor+k-1 are the choices for their places.
    """
    s = tokens.shape[1]
    k = torch.arange(1, block, device=tokens.device)
    at = anchors[..., None] + k
    inside = at <= s
    clamped = at.clamp_max(s) - 1
    labels = best.gather(1, clamped.flatten(1)).view_as(at)
    said = tokens.gather(1, at.clamp_max(s - 1).flatten(1)).view_as(at)
    same = (said == labels) & (at < s)
    counts = (
        torch.cat([torch.ones_like(same[..., :1]), same[..., :-1]], -1).long().cumprod(-1).bool() & inside
    )
    return labels, counts


def block_loss(h, head, labels, counts, gamma, by_chance):
    """Weighted cross entropy of rows `h` [B,N,J-1,D], and the mean number of leading rows that are right.

    The weight falls along the block: by exp(-k / gamma), or, with `by_chance` (D-PACE), as the chance that the draft
    as it is gets that far, summed over the rows behind.
    """
    logits = F.linear(h, head).float()
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    if by_chance:
        q = 0.5 * (-loss.detach()).exp() + 0.5
        reach = q.cumprod(-1) * counts
        weight = reach.flip(-1).cumsum(-1).flip(-1) * counts
    else:
        weight = torch.exp(-torch.arange(labels.shape[-1], device=h.device) / gamma) * counts
    right = ((logits.argmax(-1) == labels) & counts).long().cumprod(-1).sum(-1).float().mean()
    return (weight * loss).sum() / weight.sum().clamp_min(1e-6), right


def make_texts(target, windows, batches, batch, length, clock, stop):
    """The target's own texts [M,length] int16: `batches` of `batch`, fewer when the clock passes `stop`."""
    out = []
    for i in range(batches):
        if i and clock.progress() > stop:
            break
        size = (32, 64, 128, 256)[i % 4]
        prompts = windows.draw(batch)[:, : min(size, length // 2)].contiguous()
        temperature = torch.zeros(batch, device=prompts.device)
        temperature[batch // 2 :] = 0.8
        texts = generate(target, prompts, length, temperature)
        out.append(texts[~repetitive(texts)].to(torch.int16))
    return torch.cat(out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=HERE / "data")
    parser.add_argument("--checkpoint", type=pathlib.Path, default=HERE / "build" / "checkpoint")
    parser.add_argument("--state", type=pathlib.Path, default=HERE / "build" / "draft.pt")
    parser.add_argument("--log", type=pathlib.Path, default=None)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--texts", type=int, default=24, help="batches of the target's own texts")
    parser.add_argument("--text-batch", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--parts", default="train.*.bin.xz", help="which of the training files to read")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    clock = Clock(args.minutes)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = read_target(args.checkpoint, device)
    c = target.c
    d = DraftConfig(vocab=c.vocab, hidden=c.hidden, target_layers=c.layers, context=c.context, eps=c.eps)
    if args.toy:
        d = DraftConfig(
            vocab=c.vocab,
            hidden=c.hidden,
            target_layers=c.layers,
            context=c.context,
            eps=c.eps,
            layers=2,
            heads=2,
            kv_heads=1,
            mlp=128,
            taps=(0, 1, 2),
            anchors=16,
        )
    draft = Draft(d).to(device)
    with torch.no_grad():  # the head is the target's: start near what it can read
        draft.fc[:, -c.hidden :] += torch.eye(c.hidden, device=device)
    opts = optimisers(draft, args.lr, lambda n: False)
    train = load_tokens(args.data, args.parts).to(device)
    code = Windows(train, args.length, args.seed)
    step, own = 0, None
    if args.state.exists():
        saved = torch.load(args.state, map_location=device, weights_only=True)
        draft.load_state_dict(saved["model"])
        for opt, s in zip(opts, saved["optimisers"]):
            opt.load_state_dict(s)
        step, own, clock.used = saved["step"], saved["own"], saved["seconds"]
        code.passed = saved["windows"]
    if own is None:
        own = make_texts(
            target,
            Windows(train, args.length, args.seed + 100),
            args.texts,
            args.text_batch,
            args.length,
            clock,
            0.3,
        )
    print(
        f"{sum(p.numel() for p in draft.parameters()) / 1e6:.2f} M weights, {len(own)} own texts of {args.length} "
        f"tokens, {clock.seconds():.0f} s used",
        flush=True,
    )

    def kept(count):
        """Own texts, whole: windows at offset zero."""
        pick = torch.randint(len(own), (count,), device=device)
        return own[pick].long()

    loss_of = block_loss
    if not args.no_compile:
        torch._dynamo.config.cache_size_limit = 32
        for layer in list(target.layers) + list(draft.layers):
            layer.compile(dynamic=False)
        loss_of = torch.compile(block_loss, dynamic=False)
    head = target.head.to(draft.dtype)
    everywhere = torch.arange(args.length, device=device)[None]

    def save():
        args.state.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.state.with_suffix(".tmp")
        torch.save(
            {
                "model": draft.state_dict(),
                "optimisers": [o.state_dict() for o in opts],
                "step": step,
                "own": own,
                "windows": code.passed,
                "seconds": clock.seconds(),
            },
            temporary,
        )
        temporary.replace(args.state)
        write_draft(draft, args.checkpoint)

    log, saved_at, said_at, said_step = [], time.monotonic(), time.monotonic(), step
    while (progress := clock.progress()) < 1.0:
        set_lr(opts, args.lr * schedule(progress, step))
        half = args.batch // 2
        tokens = torch.cat([kept(args.batch - half), code.draw(half)])
        with torch.no_grad():
            x, _, taps = target(tokens, d.taps)
            best = target.logits(x).argmax(-1)
        anchors = torch.randint(8, args.length - 1, (args.batch, d.anchors), device=device)
        labels, counts = block_targets(tokens, best, anchors, d.block)
        context = draft.context(taps, everywhere)
        h = draft(tokens.gather(1, anchors), anchors, context, everywhere, target.embed)[:, :, 1:]
        loss, right = loss_of(h, head, labels, counts, d.gamma, progress > 0.3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0 or step == 1:
            now = time.monotonic()
            print(
                f"step {step} {clock.seconds():.0f} s loss {loss.item():.4f} rows right {right.item():.3f} "
                f"{(step - said_step) / (now - said_at):.1f} steps/s",
                flush=True,
            )
            log.append(
                {
                    "step": step,
                    "seconds": round(clock.seconds(), 1),
                    "loss": round(loss.item(), 4),
                    "right": round(right.item(), 4),
                }
            )
            said_at, said_step = now, step
        if time.monotonic() - saved_at > 120:
            save()
            saved_at = time.monotonic()
    save()
    print(f"{step} steps, {clock.seconds():.0f} s")
    if args.log:
        args.log.write_text(
            json.dumps(
                {
                    "steps": step,
                    "seconds": clock.seconds(),
                    "own_texts": len(own),
                    "length": args.length,
                    "batch": args.batch,
                    "training": log,
                }
            )
        )


if __name__ == "__main__":
    main()
