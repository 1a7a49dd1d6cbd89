"""The draft: DFlash v1 in MiMo's variant. A few Qwen3-like layers fill a block of masks in one pass.

The keys and values of the context come from the target's residual streams, of the block from its own tokens.
Attention sees |distance| < window, both ways inside the block, with a sink per head and scaled values.
B sequences, N blocks a sequence, J rows a block, S context positions.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, rope_tables, rotate, softmax_with_sink


@dataclasses.dataclass
class DraftConfig:
    vocab: int = 4096
    hidden: int = 384
    layers: int = 3
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 32  # half of a head, as the published draft has it
    mlp: int = 512
    block: int = 8
    window: int = 512
    theta: float = 10_000.0
    value_scale: float = 0.866
    taps: tuple = (
        0,
        2,
        5,
        7,
    )  # target layers; each gives the stream behind it, the last one before the final norm
    target_layers: int = 8
    eps: float = 1e-5
    context: int = 1024
    anchors: int = 128  # blocks a training sequence
    gamma: float = 4.0  # decay of the loss along the block


class DraftLayer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.d = d
        self.norm1, self.norm2 = RMSNorm(d.hidden, d.eps), RMSNorm(d.hidden, d.eps)
        self.q_norm, self.k_norm = RMSNorm(d.head_dim, d.eps), RMSNorm(d.head_dim, d.eps)
        self.q = nn.Parameter(torch.empty(d.heads * d.head_dim, d.hidden))
        self.k = nn.Parameter(torch.empty(d.kv_heads * d.head_dim, d.hidden))
        self.v = nn.Parameter(torch.empty(d.kv_heads * d.head_dim, d.hidden))
        self.o = nn.Parameter(torch.empty(d.hidden, d.heads * d.head_dim))
        self.gate = nn.Parameter(torch.empty(d.mlp, d.hidden))
        self.up = nn.Parameter(torch.empty(d.mlp, d.hidden))
        self.down = nn.Parameter(torch.empty(d.hidden, d.mlp))
        self.sink = nn.Parameter(torch.zeros(d.heads))

    def keys_values(self, u, cos, sin):
        """k, v [..., kv_heads, head_dim] of context features or normed block rows `u` [..., D]."""
        d = self.d
        k = F.linear(u, self.k.to(u.dtype)).unflatten(-1, (d.kv_heads, d.head_dim))
        v = F.linear(u, self.v.to(u.dtype)).unflatten(-1, (d.kv_heads, d.head_dim))
        return rotate(self.k_norm(k), cos, sin), v * d.value_scale

    def forward(self, x, cos, sin, keys, values, seen, dtype):
        """x [B,N,J,D] float32; keys, values [B,S,kv,head]; seen [B,N,J,S], what a row sees of the context."""
        d = self.d
        b, n, j = x.shape[:3]
        u = self.norm1(x, dtype)
        q = F.linear(u, self.q.to(dtype)).unflatten(-1, (d.heads, d.head_dim))
        q = rotate(self.q_norm(q), cos, sin)
        k, v = self.keys_values(u, cos, sin)
        share = d.heads // d.kv_heads
        q = q.view(b, n, j, d.kv_heads, share, d.head_dim).permute(0, 3, 4, 1, 2, 5)  # [B,kv,share,N,J,h]
        context = (q.flatten(2, 4) @ keys.permute(0, 2, 3, 1)).view(b, d.kv_heads, share, n, j, -1).float()
        k = k.permute(0, 3, 1, 4, 2).unsqueeze(2)  # [B,kv,1,N,h,J]
        own = (q @ k).float()
        scores = (
            torch.cat([context.masked_fill(~seen[:, None, None], float("-inf")), own], -1) * d.head_dim**-0.5
        )
        p = softmax_with_sink(scores, self.sink.float().view(1, d.kv_heads, share, 1, 1, 1)).to(dtype)
        out = p[..., :-j].flatten(2, 4) @ values.transpose(1, 2)
        out = out.view(b, d.kv_heads, share, n, j, d.head_dim) + p[..., -j:] @ v.permute(
            0, 3, 1, 2, 4
        ).unsqueeze(2)
        out = out.permute(0, 3, 4, 1, 2, 5).reshape(b, n, j, -1)
        x = x + F.linear(out, self.o.to(dtype))
        u = self.norm2(x, dtype)
        h = F.silu(F.linear(u, self.gate.to(dtype))) * F.linear(u, self.up.to(dtype))
        return x + F.linear(h, self.down.to(dtype))


class Draft(nn.Module):
    def __init__(self, d, dtype=torch.bfloat16):
        super().__init__()
        self.d, self.dtype = d, dtype
        self.fc = nn.Parameter(torch.empty(d.hidden, d.hidden * len(d.taps)))
        self.hidden_norm, self.norm = RMSNorm(d.hidden, d.eps), RMSNorm(d.hidden, d.eps)
        self.mask = nn.Parameter(torch.empty(d.hidden))
        self.layers = nn.ModuleList(DraftLayer(d) for _ in range(d.layers))
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1 or name == "mask":
                    std = 0.02
                    if name.endswith((".o", ".down")):
                        std /= math.sqrt(2 * d.layers)
                    nn.init.normal_(p, std=std)

    def tables(self, positions):
        return rope_tables(positions, self.d.rotary_dim, self.d.theta)

    def context(self, taps, positions):
        """Keys and values of every layer for the target's streams `taps` (a list of [B,S,D]) at `positions` [B,S]."""
        feature = self.hidden_norm(F.linear(torch.cat(taps, -1), self.fc.to(self.dtype)), self.dtype)
        tables = self.tables(positions)
        return [layer.keys_values(feature, *tables) for layer in self.layers]

    def forward(self, first, anchors, context, positions, embed):
        """The final normed rows [B,N,J,D] of blocks that start with the tokens `first` [B,N] at `anchors` [B,N].

        `context` is what `context()` gave for `positions` [B,S] (or [1,S]); a block sees only what lies before its
        anchor. Row j stands for the token at its own position; row 0 is the given token. `embed` is the target's.
        """
        d = self.d
        j = torch.arange(d.block, device=first.device)
        rows = anchors[..., None] + j
        x = self.mask.float().expand(*first.shape, d.block, -1)
        x = torch.where((j == 0)[:, None], F.embedding(first, embed).float().unsqueeze(-2), x)
        at = positions[:, None, None, :]
        seen = (at < anchors[..., None, None]) & (at > rows[..., None] - d.window)
        tables = self.tables(rows)
        for layer, (keys, values) in zip(self.layers, context):
            x = layer(x, *tables, keys, values, seen, self.dtype)
        return self.norm(x, self.dtype)
