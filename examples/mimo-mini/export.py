#!/usr/bin/env python3
"""Writes a trained target as a checkpoint: python3 export.py --state build/target.pt --out build/checkpoint"""

import argparse
import pathlib

import torch

from checkpoint import write_target
from common import HERE
from model import Target, TargetConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=pathlib.Path, default=HERE / "build" / "target.pt")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "build" / "checkpoint")
    parser.add_argument("--tokenizer", type=pathlib.Path, default=HERE / "data" / "tokenizer.json")
    args = parser.parse_args()
    saved = torch.load(args.state, map_location="cpu", weights_only=True)
    config = dict(saved["config"])
    config["global_layers"] = tuple(config["global_layers"])
    model = Target(TargetConfig(**config))
    model.load_state_dict(saved["model"])
    write_target(model, args.out, args.tokenizer)
    for path in sorted(args.out.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>10}  {path.relative_to(args.out)}")


if __name__ == "__main__":
    main()
