"""The target: a MiMo-V2 mixture of experts in plain PyTorch, and the number formats of its checkpoint.

It computes what transformers' `mimo_v2_flash` class computes; export.py writes its weights under the published
names. Shapes in the comments: B sequences, S positions, D hidden size, E experts, I expert width.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class TargetConfig:
    vocab: int = 4096
    hidden: int = 384
    layers: int = 8
    global_layers: tuple = (0, 4, 7)  # the others see a window
    heads: int = 8
    kv_heads: int = 2  # groups of the fused projection; a window layer has two KV heads a group
    qk_dim: int = 96
    v_dim: int = 64
    rotary_dim: int = 32  # int(qk_dim * 0.334)
    window: int = 128
    theta_global: float = 100_000.0
    theta_window: float = 10_000.0
    value_scale: float = 0.866  # sqrt(hidden / (heads * v_dim))
    dense: int = 768  # width of the dense first layer
    experts: int = 32
    top_k: int = 4
    expert: int = 128  # width of one expert
    eps: float = 1e-5
    context: int = 1024

    def is_global(self, layer):
        return layer in self.global_layers

    def layer_kv_heads(self, layer):
        """KV heads of a layer; transformers gives a window layer twice those of a global one."""
        return self.kv_heads if self.is_global(layer) else 2 * self.kv_heads


# --------------------------------------------------------------------------------------------------------------
# Number formats

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_parts(w):
    """Rounds `w` [..., K], K a multiple of 32, to MXFP4.

    Returns (values, exponents): the E2M1 values in [-6, 6] with `w`'s shape, and the exponents of the power-of-two
    scales [..., K / 32] (int32, biased by 127, at least 1). Ties go to the even code. The scale is the OCP one, but a
    largest value above 7/8 of the next power of two takes that power, where clipping would cost more than it saves.
    """
    blocks = w.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    # The exponent of a float is in its bits; log2 would be off by one near powers of two.
    exponent = ((largest * (8.0 / 7.0)).view(torch.int32) >> 23) - 2
    exponent = exponent.clamp(1, 252)
    inverse = ((254 - exponent) << 23).view(torch.float32)
    a = (blocks * inverse).clamp(-6.0, 6.0)
    size = a.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return (torch.round(a / step) * step).flatten(-2), exponent.squeeze(-1)


def mxfp4_round(w):
    """`w` as it comes back from MXFP4, in float32."""
    values, exponent = mxfp4_parts(w)
    scale = (exponent << 23).view(torch.float32).unsqueeze(-1)
    return (values.unflatten(-1, (-1, 32)) * scale).flatten(-2)


def fake_mxfp4(w):
    """MXFP4 in the forward pass, the identity for the gradient."""
    return w + (mxfp4_round(w.detach()) - w.detach())


def fp8_parts(w):
    """Rounds `w` [N, K] to float8 e4m3 with one float32 scale for each block of 128 x 128.

    Returns (codes [N, K] float8_e4m3fn, scales [ceil(N/128), ceil(K/128)]); a value is code times scale.
    """
    n, k = w.shape
    rows, cols = math.ceil(n / 128), math.ceil(k / 128)
    padded = F.pad(w.float(), (0, cols * 128 - k, 0, rows * 128 - n))
    blocks = padded.view(rows, 128, cols, 128)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-12) / 448.0
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(rows * 128, cols * 128)[:n, :k].contiguous(), scale


def fp8_values(codes, scale):
    """The float32 values of `fp8_parts`."""
    n, k = codes.shape
    wide = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return codes.float() * wide


# --------------------------------------------------------------------------------------------------------------
# Layers


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x, dtype=None):
        """Normalises in float32; the result has `dtype`, or x's."""
        dtype = dtype or x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.float() * x).to(dtype)


def rope_tables(positions, rotary_dim, theta):
    """cos and sin [..., rotary_dim / 2] in float32 of integer `positions` [...]."""
    inverse = theta ** (
        -torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    )
    angle = positions.float().unsqueeze(-1) * inverse
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turns the first 2 * cos.shape[-1] features of `x` [..., heads, features] (half-split pairs); the rest stay."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


def softmax_with_sink(scores, sink):
    """Softmax over the last axis of float32 `scores`; `sink` (broadcastable, last axis 1) takes part but keeps its
    share to itself. `sink` None is a plain softmax."""
    if sink is None:
        return scores.softmax(-1)
    largest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    e = (scores - largest).exp()
    return e / (e.sum(-1, keepdim=True) + (sink - largest).exp())


class Attention(nn.Module):
    """Attention with a fused projection, its rows in `kv_heads` groups of [Q | K | V] as the checkpoint stores them."""

    def __init__(self, c, layer):
        super().__init__()
        self.c, self.is_global = c, c.is_global(layer)
        self.kv = c.layer_kv_heads(layer)
        self.group_q = c.heads // c.kv_heads
        self.group_kv = self.kv // c.kv_heads
        self.group_rows = self.group_q * c.qk_dim + self.group_kv * (c.qk_dim + c.v_dim)
        self.qkv = nn.Parameter(torch.empty(c.kv_heads * self.group_rows, c.hidden))
        self.o = nn.Parameter(torch.empty(c.hidden, c.heads * c.v_dim))
        self.sink = None if self.is_global else nn.Parameter(torch.zeros(c.heads))

    def project(self, x, cos, sin):
        """q [B,S,heads,qk], k [B,S,kv,qk], v [B,S,kv,v] of normed `x` [B,S,D]; rotated, v scaled."""
        c = self.c
        y = F.linear(x, self.qkv.to(x.dtype)).unflatten(-1, (c.kv_heads, self.group_rows))
        q, k, v = y.split([self.group_q * c.qk_dim, self.group_kv * c.qk_dim, self.group_kv * c.v_dim], -1)
        q = q.reshape(*x.shape[:2], c.heads, c.qk_dim)
        k = k.reshape(*x.shape[:2], self.kv, c.qk_dim)
        v = v.reshape(*x.shape[:2], self.kv, c.v_dim) * c.value_scale
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin):
        """Causal attention over whole sequences; S must be a multiple of the window in window layers."""
        c = self.c
        q, k, v = self.project(x, cos, sin)
        b, s = x.shape[:2]
        share = c.heads // self.kv
        if self.is_global:
            k = k.repeat_interleave(share, 2).transpose(1, 2)
            v = v.repeat_interleave(share, 2).transpose(1, 2)
            v = F.pad(v, (0, c.qk_dim - c.v_dim))  # flash attention wants one head size
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
            out = out[..., : c.v_dim].transpose(1, 2)
        else:
            # A window of W positions lies in the query's own block of W and the one before.
            w = c.window
            n = s // w
            q = q.view(b, n, w, self.kv, share, c.qk_dim).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
            k = k.view(b, n, w, self.kv, c.qk_dim).transpose(2, 3)
            v = v.view(b, n, w, self.kv, c.v_dim).transpose(2, 3)
            k = torch.cat([F.pad(k, (0, 0, 0, 0, 0, 0, 1, 0))[:, :n], k], 3)  # [B,n,kv,2W,qk]
            v = torch.cat([F.pad(v, (0, 0, 0, 0, 0, 0, 1, 0))[:, :n], v], 3)
            scores = (q @ k.transpose(-1, -2)).float() * c.qk_dim**-0.5
            scores = scores.view(b, n, self.kv, share, w, 2 * w)
            i = torch.arange(w, device=x.device)[:, None] + w
            j = torch.arange(2 * w, device=x.device)[None, :]
            seen = (j <= i) & (j > i - w)
            first = seen & (j >= w)  # nothing lies before the first block
            seen = torch.cat([first[None], seen[None].expand(n - 1, -1, -1)])[None, :, None, None]
            scores = scores.masked_fill(~seen, float("-inf"))
            p = softmax_with_sink(scores, self.sink.float().view(1, 1, self.kv, share, 1, 1)).to(x.dtype)
            out = p.flatten(3, 4) @ v  # [B,n,kv,share*W,v]
            out = out.view(b, n, self.kv, share, w, c.v_dim).permute(0, 1, 4, 2, 3, 5)
        return F.linear(out.reshape(b, s, c.heads * c.v_dim), self.o.to(x.dtype))

    def cached(self, x, cos, sin, positions, cache):
        """As `forward`, for rows at `positions` [B,S] behind a cache (k [B,C,kv,qk], v [B,C,kv,v]) that it writes.

        Entries at later positions are neither read nor need they be valid, so a shorter length is a rollback.
        """
        c = self.c
        q, k, v = self.project(x, cos, sin)
        b, s = x.shape[:2]
        keys, values = cache
        row = torch.arange(b, device=x.device)[:, None]
        keys[row, positions] = k.to(keys.dtype)
        values[row, positions] = v.to(values.dtype)
        share = c.heads // self.kv
        q = q.view(b, s, self.kv, share, c.qk_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B,kv,share*S,qk]
        scores = (q @ keys.to(x.dtype).permute(0, 2, 3, 1)).float() * c.qk_dim**-0.5
        scores = scores.view(b, self.kv, share, s, -1)
        j = torch.arange(keys.shape[1], device=x.device)
        seen = j <= positions[..., None]
        if not self.is_global:
            seen &= j > positions[..., None] - c.window
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        sink = None if self.sink is None else self.sink.float().view(1, self.kv, share, 1, 1)
        p = softmax_with_sink(scores, sink).to(x.dtype).flatten(2, 3)
        out = (p @ values.to(x.dtype).transpose(1, 2)).view(b, self.kv, share, s, c.v_dim)
        out = out.permute(0, 3, 1, 2, 4).reshape(b, s, c.heads * c.v_dim)
        return F.linear(out, self.o.to(x.dtype))


class Dense(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(c.dense, c.hidden))
        self.up = nn.Parameter(torch.empty(c.dense, c.hidden))
        self.down = nn.Parameter(torch.empty(c.hidden, c.dense))

    def forward(self, x):
        g, u = F.linear(x, self.gate.to(x.dtype)), F.linear(x, self.up.to(x.dtype))
        return F.linear(F.silu(g) * u, self.down.to(x.dtype))


class Experts(nn.Module):
    """Sigmoid router with a correction bias, and `experts` small SwiGLUs.

    Experts of this size are multiplied all at once, the unchosen ones with weight zero: two large products and no
    gather, which is faster on a GPU than eight times fewer operations in pieces.
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.router = nn.Parameter(torch.empty(c.experts, c.hidden))
        self.register_buffer("bias", torch.zeros(c.experts))
        self.gate = nn.Parameter(torch.empty(c.experts, c.expert, c.hidden))
        self.up = nn.Parameter(torch.empty(c.experts, c.expert, c.hidden))
        self.down = nn.Parameter(torch.empty(c.experts, c.hidden, c.expert))
        self.quantize = True

    def route(self, x):
        """Weights [B,S,E] in float32, zero for experts that were not chosen; the chosen ones sum to 1."""
        scores = F.linear(x.float(), self.router.float()).sigmoid()
        chosen = (scores + self.bias).topk(self.c.top_k, -1).indices
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        weights = scores * mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), mask

    def weights(self, dtype):
        w = (self.gate, self.up, self.down)
        return [(fake_mxfp4(x) if self.quantize else x).to(dtype) for x in w]

    def forward(self, x):
        """Returns (output [B,S,D], tokens an expert got [E])."""
        weights, mask = self.route(x)
        gate, up, down = self.weights(x.dtype)
        g = F.linear(x, gate.flatten(0, 1))
        u = F.linear(x, up.flatten(0, 1))
        h = (F.silu(g) * u).unflatten(-1, (self.c.experts, -1)) * weights.to(x.dtype).unsqueeze(-1)
        return F.linear(h.flatten(-2), down.transpose(0, 1).flatten(1)), mask.sum((0, 1)).detach()


class Layer(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(c.hidden, c.eps), RMSNorm(c.hidden, c.eps)
        self.attention = Attention(c, layer)
        self.sparse = layer > 0
        self.mlp = Experts(c) if self.sparse else Dense(c)

    def finish(self, x, dtype):
        y = self.mlp(self.norm2(x, dtype))
        y, load = y if self.sparse else (y, None)
        return x + y, load

    def forward(self, x, cos, sin, dtype):
        return self.finish(x + self.attention(self.norm1(x, dtype), cos, sin), dtype)

    def cached(self, x, cos, sin, positions, cache, dtype):
        return self.finish(x + self.attention.cached(self.norm1(x, dtype), cos, sin, positions, cache), dtype)


class Target(nn.Module):
    """The whole target. `dtype` is what products are computed in; the residual stream is float32."""

    def __init__(self, c, dtype=torch.bfloat16):
        super().__init__()
        self.c, self.dtype = c, dtype
        self.embed = nn.Parameter(torch.empty(c.vocab, c.hidden))
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.head = nn.Parameter(torch.empty(c.vocab, c.hidden))
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    std = 0.02
                    if name.endswith((".o", ".down")):
                        std /= math.sqrt(2 * c.layers)
                    nn.init.normal_(p, std=std)

    def set_quantize(self, on):
        """Whether the experts' weights go through MXFP4 in the forward pass; off for weights that are exact in it."""
        for layer in self.layers[1:]:
            layer.mlp.quantize = on

    def tables(self, positions):
        c = self.c
        return {
            g: rope_tables(positions, c.rotary_dim, c.theta_global if g else c.theta_window)
            for g in (True, False)
        }

    def logits(self, x):
        return F.linear(self.norm(x, self.dtype), self.head.to(self.dtype))

    def forward(self, tokens, taps=()):
        """Residual stream [B,S,D] behind the last layer, loads [layers-1,E], and the streams behind the `taps`."""
        tables = self.tables(torch.arange(tokens.shape[1], device=tokens.device)[None])
        x = F.embedding(tokens, self.embed).float()
        loads, kept = [], []
        for i, layer in enumerate(self.layers):
            x, load = layer(x, *tables[self.c.is_global(i)], self.dtype)
            if load is not None:
                loads.append(load)
            if i in taps:
                kept.append(x.to(self.dtype))
        return x, torch.stack(loads), kept

    def new_cache(self, batch, length, device):
        c = self.c
        return [
            (
                torch.zeros(batch, length, c.layer_kv_heads(i), c.qk_dim, device=device, dtype=self.dtype),
                torch.zeros(batch, length, c.layer_kv_heads(i), c.v_dim, device=device, dtype=self.dtype),
            )
            for i in range(c.layers)
        ]

    def cached(self, tokens, positions, cache, taps=()):
        """As `forward`, for `tokens` [B,S] at `positions` [B,S] behind `cache`. Returns (stream, taps' streams)."""
        tables = self.tables(positions)
        x = F.embedding(tokens, self.embed).float()
        kept = []
        for i, layer in enumerate(self.layers):
            x, _ = layer.cached(x, *tables[self.c.is_global(i)], positions, cache[i], self.dtype)
            if i in taps:
                kept.append(x.to(self.dtype))
        return x, kept
