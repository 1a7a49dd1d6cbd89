#!/usr/bin/env python3
"""Plain yardsticks for the held-out loss: xz on the held-out text, and a 5-gram model of the training tokens.

    python3 baseline.py --out build/baseline.json

The 5-gram is interpolated after Witten and Bell: an order's counts are trusted by how many of its contexts' followers
were new. Tokens of 12 bits let a run of five fit in 64 bits, so counting is sorting. Takes 8 GB of memory.
"""

import argparse
import json
import lzma
import math
import pathlib

import numpy as np
from tokenizers import Tokenizer

from common import HERE, load_tokens

ORDER = 5


def runs(tokens, n):
    """Every run of `n` tokens as one number; entry i ends at token i + n - 1."""
    key = np.zeros(len(tokens) - n + 1, dtype=np.uint64)
    for i in range(n):
        key = key << np.uint64(12) | tokens[i : len(tokens) - n + 1 + i].astype(np.uint64)
    return key


def look_up(keys, values, wanted):
    at = np.searchsorted(keys, wanted).clip(0, len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def five_gram(train, held):
    """Mean nats a token of `held` under the 5-gram model of `train`."""
    vocab = 4096
    probability = np.full(len(held), 1.0 / vocab)
    for n in range(1, ORDER + 1):
        keys, counts = np.unique(runs(train, n), return_counts=True)
        # Contexts: how often each was followed, and by how many different tokens.
        first = np.flatnonzero(np.r_[True, keys[1:] >> np.uint64(12) != keys[:-1] >> np.uint64(12)])
        contexts = keys[first] >> np.uint64(12)
        totals = np.add.reduceat(counts, first)
        kinds = np.diff(np.r_[first, len(keys)])
        wanted = runs(held, n)
        count = look_up(keys, counts, wanted)
        total = look_up(contexts, totals, wanted >> np.uint64(12))
        kind = look_up(contexts, kinds, wanted >> np.uint64(12))
        tail = probability[n - 1 :]
        probability[n - 1 :] = np.where(total > 0, (count + kind * tail) / np.maximum(total + kind, 1), tail)
    return float(-np.log(probability).mean())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=HERE / "data")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "build" / "baseline.json")
    args = parser.parse_args()
    data = json.loads((args.data / "data.json").read_text())["heldout"]
    held = load_tokens(args.data, "heldout.bin.xz").numpy()
    tokenizer = Tokenizer.from_file(str(args.data / "tokenizer.json"))
    text = tokenizer.decode(held.tolist(), skip_special_tokens=True).encode()
    packed = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    out = {"text_bytes": len(text), "xz_bits_per_byte": round(8 * packed / len(text), 4)}
    print(out, flush=True)
    nats = five_gram(load_tokens(args.data, "train.*.bin.xz").numpy(), held)
    out["five_gram_nats_per_token"] = round(nats, 4)
    out["five_gram_bits_per_byte"] = round(nats * data["tokens"] / data["bytes"] / math.log(2), 4)
    print(out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(out))


if __name__ == "__main__":
    main()
