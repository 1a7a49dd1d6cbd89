"""Generation: plain in large batches, and the exact DFlash loop."""

import torch
import torch.nn.functional as F

from common import END


def choose(logits, temperature):
    """The next tokens [...] of `logits` [..., V]: the largest, or a sample. `temperature` is a number or a tensor
    [...] whose rows of 0 are greedy."""
    if not torch.is_tensor(temperature):
        if temperature == 0:
            return logits.argmax(-1)
        temperature = torch.tensor(float(temperature), device=logits.device)
    noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().clamp_min(1e-30).log()
    return (logits.float() + temperature.unsqueeze(-1) * noise).argmax(
        -1
    )  # Gumbel, scaled instead of the logits


@torch.no_grad()
def generate(target, prompts, length, temperature):
    """Continues `prompts` [B,P] to `length` tokens. Returns [B,length]. On a GPU the step is captured once."""
    b, p = prompts.shape
    device = prompts.device
    tokens = torch.zeros(b, length, dtype=torch.long, device=device)
    tokens[:, :p] = prompts
    cache = target.new_cache(b, length, device)
    at = torch.arange(p, device=device).expand(b, -1)
    last = []
    for rows in torch.arange(b, device=device).split(256):  # a prompt's scores are large
        part = [(k[rows[0] : rows[-1] + 1], v[rows[0] : rows[-1] + 1]) for k, v in cache]
        x, _ = target.cached(prompts[rows], at[rows], part)
        last.append(target.logits(x[:, -1]))
    one = choose(torch.cat(last), temperature)
    tokens[:, p] = one
    token, position = one[:, None].clone(), torch.full((b, 1), p, device=device)

    def step():
        x, _ = target.cached(token, position, cache)
        return target.logits(x[:, -1])

    graph = None
    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step()
    for i in range(p + 1, length):
        if graph:
            graph.replay()
        else:
            logits = step()
        one = choose(logits, temperature)
        tokens[:, i] = one
        token.copy_(one[:, None])
        position.fill_(i)
    return tokens


def repetitive(tokens):
    """Which of `tokens` [B,S] have fewer than a third of their runs of four tokens distinct."""
    t = tokens.long()
    run = ((t[:, :-3] * 4099 + t[:, 1:-2]) * 4099 + t[:, 2:-1]) * 4099 + t[:, 3:]
    run = run.sort(1).values
    return (run[:, 1:] != run[:, :-1]).float().mean(1) < 1 / 3


@torch.no_grad()
def speculate(target, draft, prompts, new, temperature=0.0, shuffle_taps=False):
    """The exact loop over `prompts` [B,P], each row at its own pace, for `new` tokens or to the end of its text.

    A round: the draft proposes block - 1 tokens, the target chooses one at each of `block` rows (the largest, or a
    sample), and the proposals are kept while they are what the target chose. So every token is the target's own.
    Returns (tokens [B,P+new+2*block], lengths [B], accepted [B,block]): `accepted` counts a text's rounds by tokens
    committed, the target's own last one included; entry i is for i + 1 tokens. The first token of all is no round.
    """
    d = draft.d
    b, p = prompts.shape
    device = prompts.device
    length = p + new + 2 * d.block
    everywhere = torch.arange(length, device=device)[None]
    row = torch.arange(b, device=device)[:, None]
    span = torch.arange(d.block, device=device)
    tokens = torch.zeros(b, length, dtype=torch.long, device=device)
    tokens[:, :p] = prompts
    cache = target.new_cache(b, length, device)
    context = [
        tuple(torch.zeros(b, length, d.kv_heads, d.head_dim, device=device, dtype=draft.dtype) for _ in "kv")
        for _ in draft.layers
    ]

    def inject(taps, positions):
        if shuffle_taps:
            taps = taps[1:] + taps[:1]
        for (keys, values), (k, v) in zip(context, draft.context(taps, positions)):
            keys[row, positions], values[row, positions] = k.to(keys.dtype), v.to(values.dtype)

    at = everywhere[:, :p].expand(b, -1)
    x, taps = target.cached(prompts, at, cache, d.taps)
    inject(taps, at)
    tokens[:, p] = choose(target.logits(x[:, -1]), temperature)
    s = torch.full((b,), p, device=device)
    alive = tokens[:, p] != END
    accepted = torch.zeros(b, d.block, dtype=torch.long, device=device)
    while alive.any():
        first = tokens[row, s[:, None]]
        h = draft(first, s[:, None], context, everywhere, target.embed)[:, 0, 1:]
        proposed = F.linear(h, target.head.to(h.dtype)).argmax(-1)
        at = s[:, None] + span
        x, taps = target.cached(torch.cat([first, proposed], 1), at, cache, d.taps)
        chosen = choose(target.logits(x), temperature)
        count = (proposed == chosen[:, :-1]).long().cumprod(1).sum(1)
        inject(taps, at)
        kept = chosen.clone()
        old = tokens[row, at + 1]
        tokens[row, at + 1] = torch.where(alive[:, None] & (span <= count[:, None]), kept, old)
        accepted.scatter_add_(1, count[:, None], alive.long()[:, None])
        ended = ((chosen == END) & (span <= count[:, None])).any(1)
        s = torch.where(alive, s + count + 1, s)
        alive = alive & ~ended & (s < p + new)
    return tokens, s + 1, accepted


def acceptance(counts):
    """Mean tokens a round, histogram (shares of 1..block) and the share of rounds that keep proposal 1, 2, ...

    `counts` is `speculate`'s [B,block]."""
    c = counts.double().sum(0)
    total = c.sum()
    sizes = torch.arange(1, len(c) + 1, device=c.device)
    reach = [(c[i:].sum() / total).item() for i in range(1, len(c))]
    return {
        "mean": (c * sizes).sum().item() / total.item(),
        "rounds": int(total),
        "histogram": [round(x, 4) for x in (c / total).tolist()],
        "reach": [round(x, 4) for x in reach],
    }
