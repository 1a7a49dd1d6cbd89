"""Tests of the training code; a CPU does them in a minute: python3 -m pytest test_mini.py"""

import torch
import torch.nn.functional as F

from checkpoint import by_group, pack_mxfp4, read_draft, read_target, unpack_mxfp4, write_draft, write_target
from common import Windows
from decode import choose, generate, speculate
from draft import Draft, DraftConfig
from model import Target, TargetConfig, fp8_parts, fp8_values, mxfp4_round
from train_draft import block_loss, block_targets
from train_target import TOY

TOY_DRAFT = dict(
    hidden=128, layers=2, heads=2, kv_heads=1, mlp=128, taps=(0, 1, 2), target_layers=3, window=64
)


def toy_target(seed=0):
    torch.manual_seed(seed)
    model = Target(TargetConfig(**TOY), torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 or name.endswith("sink"):
                p.normal_(std=0.1)
            else:
                p.normal_(1.0, 0.1)
        for layer in model.layers[1:]:
            layer.mlp.bias.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def toy_draft(seed=1):
    torch.manual_seed(seed)
    draft = Draft(DraftConfig(**TOY_DRAFT), torch.float32)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return draft


def test_mxfp4_codes_give_the_rounded_values():
    torch.manual_seed(0)
    w = torch.randn(64, 96) * torch.logspace(-6, 6, 64)[:, None]
    w[3, :32] = 0
    rounded = mxfp4_round(w)
    assert torch.equal(unpack_mxfp4(*pack_mxfp4(w)), rounded)
    assert torch.equal(mxfp4_round(rounded), rounded), "rounding twice is rounding once"
    blocks = w.view(64, 3, 32).abs().amax(-1, keepdim=True)
    assert ((rounded - w).view(64, 3, 32).abs() <= blocks * 0.2001).all()


def test_mxfp4_takes_the_nearest_value():
    w = torch.tensor([6.0, 0.24, 0.26, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.6, -0.2] + [0.0] * 20)[None]
    want = torch.tensor([6.0, 0.0, 0.5, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -3.0, -0.0] + [0.0] * 20)
    assert torch.equal(mxfp4_round(w)[0], want)


def test_fp8_blocks_are_cut_by_group():
    torch.manual_seed(0)
    w = torch.randn(2 * 200, 128)
    w[:200] *= 100
    codes, scales = by_group(fp8_parts, 2, w)
    assert codes.shape == (400, 128) and scales.shape == (4, 1)
    back = by_group(fp8_values, 2, codes, scales)
    assert ((back - w).abs() <= w.abs() / 16 + scales.repeat_interleave(100, 0) / 100).all()


def test_cached_rows_are_the_rows_of_a_whole_pass():
    model = toy_target()
    tokens = torch.randint(0, 4096, (2, 256))
    whole, loads, taps = model(tokens, (0, 2))
    assert (loads.sum(1) == 2 * 256 * model.c.top_k).all()
    cache, at, parts, kept = model.new_cache(2, 256, "cpu"), 0, [], []
    positions = torch.arange(256).expand(2, -1)
    for n in (100, 1, 8, 147):
        x, t = model.cached(tokens[:, at : at + n], positions[:, at : at + n], cache, (0, 2))
        parts.append(x)
        kept.append(t[1])
        at += n
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-3
    assert (torch.cat(kept, 1) - taps[1]).abs().max() < 1e-3


def test_experts_at_once_are_experts_one_by_one():
    layer = toy_target().layers[1].mlp
    x = torch.randn(1, 5, 128)
    weights, mask = layer.route(x)
    assert (mask.sum(-1) == 2).all() and (weights.sum(-1) - 1).abs().max() < 1e-5
    want = torch.zeros_like(x)
    for t in range(5):
        for e in mask[0, t].nonzero().flatten():
            gate, up, down = (mxfp4_round(w[e]) for w in (layer.gate, layer.up, layer.down))
            want[0, t] += weights[0, t, e] * (down @ (F.silu(gate @ x[0, t]) * (up @ x[0, t])))
    assert (layer(x)[0] - want).abs().max() < 1e-4


def test_a_checkpoint_read_back_is_the_model(tmp_path):
    model, draft = toy_target(), toy_draft()
    write_target(model, tmp_path)
    write_draft(draft, tmp_path)
    again = read_target(tmp_path, "cpu", torch.float32)
    tokens = torch.randint(0, 4096, (1, 128))
    a, b = model.logits(model(tokens)[0]), again.logits(again(tokens)[0])
    assert (a - b).norm() / a.norm() < 0.2, "FP8, BF16 and the routes that they turn lie between"
    write_target(again, tmp_path / "again")
    twice = read_target(tmp_path / "again", "cpu", torch.float32)
    assert torch.equal(twice.layers[1].mlp.gate, again.layers[1].mlp.gate)
    d = read_draft(tmp_path, "cpu", torch.float32)
    assert d.d == draft.d and torch.equal(d.fc, draft.fc.to(torch.bfloat16).float())


def training_rows(target, draft, tokens, anchors):
    """A block's rows as train_draft.py computes them."""
    _, _, taps = target(tokens, draft.d.taps)
    positions = torch.arange(tokens.shape[1])[None]
    return draft(tokens.gather(1, anchors), anchors, draft.context(taps, positions), positions, target.embed)


def test_training_rows_are_the_loop_rows():
    target, draft = toy_target(), toy_draft()
    tokens = torch.randint(0, 4096, (1, 256))
    rows = training_rows(target, draft, tokens, torch.tensor([[100, 130]]))
    for i, s in enumerate((100, 130)):
        cache, span = target.new_cache(1, 256, "cpu"), torch.arange(256)[None]
        _, taps = target.cached(tokens[:, :s], span[:, :s], cache, draft.d.taps)
        context = draft.context(taps, span[:, :s])
        one = draft(tokens[:, s : s + 1], torch.tensor([[s]]), context, span[:, :s], target.embed)
        assert (one[0, 0] - rows[0, i]).abs().max() < 1e-3


def test_a_block_sees_nothing_from_its_anchor_on():
    target, draft = toy_target(), toy_draft()
    tokens = torch.randint(0, 4096, (1, 256))
    anchors = torch.tensor([[100]])
    _, _, taps = target(tokens, draft.d.taps)
    positions = torch.arange(256)[None]

    def rows(taps):
        return draft(
            tokens.gather(1, anchors), anchors, draft.context(taps, positions), positions, target.embed
        )

    a = rows(taps)
    later = [t.clone() for t in taps]
    for t in later:
        t[:, 100:] += 1
    assert torch.equal(a, rows(later))
    for t in later:
        t[:, 99] += 1
    assert not torch.equal(a, rows(later))
    far = [t.clone() for t in taps]
    for t in far:
        t[:, : 100 - draft.d.window + 1] += 1  # at most W - 1 positions are seen
    assert torch.equal(a, rows(far))


def test_labels_stop_counting_behind_the_first_difference():
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    best = torch.tensor([[6, 7, 99, 9, 10, 11]])  # the target would not have said 8
    labels, counts = block_targets(tokens, best, torch.tensor([[0, 3]]), 5)
    assert labels[0, 0].tolist() == [6, 7, 99, 9]
    assert counts[0, 0].tolist() == [True, True, True, False]
    assert labels[0, 1, :3].tolist() == [9, 10, 11] and counts[0, 1].tolist() == [True, True, True, False]


def test_the_loop_says_what_plain_decoding_says():
    target, draft = toy_target(), toy_draft()
    prompts = torch.randint(2, 4096, (3, 40))
    plain = generate(target, prompts, 80, 0)
    tokens, lengths, counts = speculate(target, draft, prompts, 40)
    for i in range(3):
        n = min(int(lengths[i]), 80)
        assert torch.equal(tokens[i, :n], plain[i, :n])
    assert counts.sum() > 0


def test_a_draft_that_knows_a_text_gets_whole_blocks():
    target, draft = toy_target(), Draft(DraftConfig(**TOY_DRAFT), torch.float32)
    prompts = torch.randint(2, 4096, (1, 24))
    text = generate(target, prompts, 64, 0)
    padded = F.pad(text, (0, 64))
    x, _, taps = target(padded, draft.d.taps)
    best = target.logits(x).argmax(-1)
    positions = torch.arange(128)[None]
    anchors = torch.arange(24, 57)[None]
    labels, counts = block_targets(padded[:, :64], best[:, :64], anchors, 8)
    opt = torch.optim.AdamW(draft.parameters(), lr=3e-3)
    for i in range(120):
        h = draft(padded.gather(1, anchors), anchors, draft.context(taps, positions), positions, target.embed)
        loss, right = block_loss(h[:, :, 1:], target.head, labels, counts, 4.0, i > 60)
        opt.zero_grad()
        loss.backward()
        opt.step()
    _, _, counts = speculate(target, draft.requires_grad_(False), prompts, 32)
    assert counts[0, -1] == counts.sum() == 4, f"rounds by tokens committed: {counts.tolist()}"


def test_samples_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0]).expand(20000, -1)
    share = torch.bincount(choose(logits, 0.8), minlength=3) / 20000
    assert (share - (logits[0] / 0.8).softmax(-1)).abs().max() < 0.02


def test_windows_go_on_where_they_stopped():
    tokens = torch.arange(1000).to(torch.int16)
    a, b = Windows(tokens, 64, 1), Windows(tokens, 64, 1)
    first = [a.draw(4) for _ in range(6)]
    b.draw(12)
    c = Windows(tokens, 64, 1, b.passed)
    assert torch.equal(c.draw(4), first[3])
