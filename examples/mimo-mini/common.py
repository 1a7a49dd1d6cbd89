"""What the scripts share: tokens, the optimiser, the clock of a time-boxed run."""

import concurrent.futures
import lzma
import math
import pathlib
import time

import numpy as np
import torch

HERE = pathlib.Path(__file__).resolve().parent
END, MASK = 0, 1  # token ids of <|endoftext|> and <|mask|>


def load_tokens(folder, pattern):
    """The tokens of the files that match `pattern`, joined in the order of their names, as an int16 tensor."""
    paths = sorted(pathlib.Path(folder).glob(pattern))
    if not paths:
        raise SystemExit(f"{folder}/{pattern}: no such file; run prepare_data.py first")
    with concurrent.futures.ThreadPoolExecutor() as pool:  # lzma lets other threads run
        parts = list(pool.map(lambda p: np.frombuffer(lzma.decompress(p.read_bytes()), dtype="<u2"), paths))
    return torch.from_numpy(np.concatenate(parts).astype(np.int16))


class Windows:
    """Endless shuffled windows of `length` tokens; every pass over the data starts at another offset."""

    def __init__(self, tokens, length, seed, passed=0):
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_pass = (len(tokens) - length) // length
        self.passed = passed  # windows drawn so far; with the seed, the whole state
        self.order = None

    def draw(self, count):
        """[count, length] int64 on the tokens' device."""
        out = []
        while count:
            epoch, at = divmod(self.passed, self.per_pass)
            if self.order is None or self.order[0] != epoch:
                g = torch.Generator().manual_seed(self.seed + epoch)
                offset = int(torch.randint(self.length, (1,), generator=g))
                self.order = epoch, (torch.randperm(self.per_pass, generator=g) * self.length + offset).to(
                    self.tokens.device
                )
            starts = self.order[1][at : at + count]
            span = torch.arange(self.length, device=self.tokens.device)
            out.append(self.tokens[(starts[:, None] + span[None]).clamp_max(len(self.tokens) - 1)].long())
            self.passed += len(starts)
            count -= len(starts)
        return torch.cat(out)


class Clock:
    """Progress of a time-boxed run, start-up included, over restarts."""

    def __init__(self, minutes, used=0.0):
        self.start, self.used, self.box = time.monotonic(), used, minutes * 60

    def seconds(self):
        return self.used + time.monotonic() - self.start

    def progress(self):
        return min(1.0, self.seconds() / self.box)


def schedule(progress, step, warmup=100):
    """Factor of the learning rate: linear over `warmup` steps, then a cosine of the progress, to zero."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


def orthogonal(g):
    """Five Newton-Schulz steps towards the orthogonal factor of each matrix of `g` [n, rows, cols]."""
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for stacks of matrices [..., rows, cols], its steps scaled to the size of AdamW's."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.1):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(p.shape), []).append(p)
            for shape, params in shapes.items():
                for p in params:
                    if "m" not in self.state[p]:
                        self.state[p]["m"] = torch.zeros_like(p)
                grads, ms = [p.grad for p in params], [self.state[p]["m"] for p in params]
                torch._foreach_lerp_(ms, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, ms, group["momentum"]))
                update = orthogonal(update.flatten(0, -3)).view(len(params), *shape).float()
                scale = 0.2 * math.sqrt(max(shape[-2:])) * group["lr"]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind(0)), alpha=-scale)


def optimisers(model, lr, adam_only):
    """Muon for the matrices inside the layers, AdamW for embeddings, head, router and vectors. `adam_only(name)`
    says which matrices are AdamW's."""
    muon, adam, plain = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.dim() < 2 else adam if adam_only(name) else muon).append(p)
    fused = next(model.parameters()).is_cuda
    return [
        Muon(muon, lr),
        torch.optim.AdamW(
            [{"params": adam, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=lr,
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=fused,
        ),
    ]


def set_lr(opts, lr):
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr
