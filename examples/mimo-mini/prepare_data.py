#!/usr/bin/env python3
"""Makes the training data: Python source of permissively licensed PyPI packages, and a tokenizer for it.

    python3 prepare_data.py --out data [--wheels DIR]

Reads packages.txt (one `name==version` a line, held-out ones behind the line `# held out`), downloads the
wheels with `pip download --no-deps`, and keeps their .py files. A package whose metadata does not name a
permissive licence stops the run. Writes below --out:

    tokenizer.json    byte-level BPE, 4096 tokens; 0 is <|endoftext|>, 1 is <|mask|>
    train.N.bin.xz    uint16 tokens, little endian, documents ended by token 0 (parts of similar size)
    heldout.bin.xz    the same for the held-out packages
    data.json         packages, licences, files, bytes and tokens

Files are deduplicated by hash, then by lines: a file more than half of whose long lines were seen before
is dropped. A held-out file is dropped when more than a fifth of its long lines occur in the training part.
"""

import argparse
import email
import hashlib
import json
import lzma
import multiprocessing
import pathlib
import random
import re
import subprocess
import sys
import zipfile

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).resolve().parent
VOCAB = 4096
SEED = 20261127
PARTS = 4
MAX_FILE = 200_000  # bytes; longer files are tables or generated
SPECIAL = ["<|endoftext|>", "<|mask|>"]
# What a licence field or classifier may say. Anything else has to be looked at by a person.
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|0BSD|Zero-Clause|Unlicense|HPND|CC0|Zlib)\b", re.I
)
COPYLEFT = re.compile(r"\b(A?L?GPL|GNU|MPL|Mozilla|EUPL|CDDL|EPL|CC-BY-NC|Proprietary|SSPL|BUSL)", re.I)
# Published without a usable licence field; the licence was read from the licence file in the wheel.
READ_BY_HAND = {}
SKIPPED = re.compile(
    r"(^|/)(_vendor|vendored?|_vendored|third_party|extern|externals|node_modules|locale)/|_pb2(_grpc)?\.py$"
)


def package_lists(path):
    """Reads packages.txt. Returns (training, held out) lists of `name==version`."""
    train, held = [], []
    now = train
    for line in path.read_text().splitlines():
        line = line.strip()
        if line == "# held out":
            now = held
        elif line and not line.startswith("#"):
            if "==" not in line:
                sys.exit(f"{path}: `{line}` is not pinned; write name==version")
            now.append(line)
    return train, held


def find_wheel(folder, name, version):
    """The wheel of a package in `folder`, or None."""
    plain = lambda s: re.sub(r"[-_.]+", "_", s).lower()
    for path in folder.glob("*.whl"):
        parts = path.name.split("-")
        if plain(parts[0]) == plain(name) and parts[1] == version:
            return path
    return None


def download(requirement, folder):
    """Fetches the wheel of `name==version` into `folder` unless it is there. Returns its path."""
    name, version = requirement.split("==")
    if found := find_wheel(folder, name, version):
        return found
    platforms = [
        "manylinux_2_28_x86_64",
        "manylinux_2_27_x86_64",
        "manylinux_2_17_x86_64",
        "manylinux2014_x86_64",
        "any",
    ]
    for python in ("3.13", "3.12", "3.11"):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            "-d",
            str(folder),
            requirement,
        ]
        for platform in platforms:
            command += ["--platform", platform]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            if found := find_wheel(folder, name, version):
                return found
    sys.exit(f"{requirement}: pip finds no wheel; pin another version in packages.txt")


def licence(wheel, name):
    """The licence that a wheel's metadata names; stops the run when it is not a permissive one."""
    if name in READ_BY_HAND:
        return READ_BY_HAND[name]
    with zipfile.ZipFile(wheel) as z:
        meta = next(n for n in z.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        headers = email.message_from_bytes(z.read(meta))
    said = [str(headers.get("License-Expression") or "")]
    said += [
        c.split("::")[-1].strip() for c in headers.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    text = str(headers.get("License") or "").strip().splitlines()
    said += text[:1]
    said = [s for s in said if s and s not in ("OSI Approved", "UNKNOWN")]
    if not any(PERMISSIVE.search(s) for s in said) or any(COPYLEFT.search(s) for s in said):
        sys.exit(
            f"{wheel.name}: its metadata says {said!r}, which is no licence this script knows as permissive; "
            "take the package out of packages.txt, or read its licence file and add it to READ_BY_HAND"
        )
    return next(s for s in said if PERMISSIVE.search(s))


def sources(wheel):
    """The Python files of a wheel as (name, text), without vendored and generated ones."""
    with zipfile.ZipFile(wheel) as z:
        for info in sorted(z.infolist(), key=lambda i: i.filename):
            name = info.filename
            if not name.endswith(".py") or SKIPPED.search(name) or not 200 <= info.file_size <= MAX_FILE:
                continue
            try:
                text = z.read(name).decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError:
                continue
            head = text[:2000].lower()
            if (
                "\x00" in text
                or "autogenerated" in head
                or "auto-generated" in head
                or "generated by" in head
            ):
                continue
            if COPYLEFT.search(text[:3000]) and not re.search(r"\b(MIT|BSD|Apache)\b", text[:3000]):
                continue
            lines = text.splitlines()
            if max(map(len, lines)) > 1000 or sum(map(len, lines)) / len(lines) > 100:
                continue
            yield name, text.rstrip("\n") + "\n"


def long_lines(text):
    """Hashes of the lines that are long enough to tell where a text comes from."""
    return [
        hash(s)
        for s in (line.strip() for line in text.splitlines())
        if len(s) >= 24 and not s.startswith("#")
    ]


def encode(job):
    path, texts = job
    tokenizer = Tokenizer.from_file(path)
    out = []
    for e in tokenizer.encode_batch(texts):
        out.append(np.array(e.ids + [0], dtype="<u2"))
    return np.concatenate(out)


def compress(job):
    path, raw = job
    # Two bytes a token: alignment of two.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}]
    pathlib.Path(path).write_bytes(lzma.compress(raw, format=lzma.FORMAT_XZ, filters=filters))
    return path


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "data")
    parser.add_argument("--wheels", type=pathlib.Path, default=HERE / "build" / "wheels")
    parser.add_argument("--packages", type=pathlib.Path, default=HERE / "packages.txt")
    parser.add_argument(
        "--max-package-mb", type=float, default=2.4, help="no package gives more than this much source"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.wheels.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    train_names, held_names = package_lists(args.packages)

    report, seen_files, seen_lines, train, held = [], set(), set(), [], []
    for part, names in (("train", train_names), ("heldout", held_names)):
        for requirement in names:
            wheel = download(requirement, args.wheels)
            row = {
                "package": requirement,
                "part": part,
                "licence": licence(wheel, requirement.split("==")[0]),
                "files": 0,
                "bytes": 0,
            }
            files = list(sources(wheel))
            rng.shuffle(files)
            for _, text in files:
                if row["bytes"] > args.max_package_mb * 1e6:
                    break
                digest = hashlib.sha256(text.encode()).digest()
                if digest in seen_files:
                    continue
                seen_files.add(digest)
                lines = long_lines(text)
                known = sum(line in seen_lines for line in lines)
                if known > (0.2 if part == "heldout" else 0.5) * max(1, len(lines)):
                    continue
                seen_lines.update(lines)
                (train if part == "train" else held).append(text)
                row["files"] += 1
                row["bytes"] += len(text.encode())
            report.append(row)
    rng.shuffle(train)
    rng.shuffle(held)
    print(
        f"training: {len(train)} files, {sum(map(len, train)) / 1e6:.1f} MB; held out: {len(held)} files, "
        f"{sum(map(len, held)) / 1e6:.1f} MB"
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Runs of blanks stay whole, so that an indentation is one token; digits go one by one.
            pre_tokenizers.Split(
                Regex(r"\n[ ]*|[ ]{2,}(?=[^ ])|[ ]?[A-Za-z_]+|[0-9]| ?[^\sA-Za-z_0-9]+|\s+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample, size = [], 0
    for text in train:
        sample.append(text)
        size += len(text)
        if size > 25_000_000:
            break
    tokenizer.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    path = str(args.out / "tokenizer.json")
    tokenizer.save(path)
    for text in held[:20]:
        if tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) != text:
            sys.exit("the tokenizer does not give a held-out text back; its pre-tokenizer must be wrong")

    # Not by forking: the tokenizer's threads would not be in the children.
    with multiprocessing.get_context("spawn").Pool() as pool:
        step = max(1, len(train) // 64)
        pieces = pool.map(encode, [(path, train[i : i + step]) for i in range(0, len(train), step)])
        tokens = np.concatenate(pieces)
        held_tokens = encode((path, held))
        jobs = [
            (str(args.out / f"train.{i}.bin.xz"), part.tobytes())
            for i, part in enumerate(np.array_split(tokens, PARTS))
        ]
        jobs.append((str(args.out / "heldout.bin.xz"), held_tokens.tobytes()))
        pool.map(compress, jobs, chunksize=1)
    report = {
        "seed": SEED,
        "packages": report,
        "train": {"files": len(train), "bytes": sum(len(t.encode()) for t in train), "tokens": len(tokens)},
        "heldout": {
            "files": len(held),
            "bytes": sum(len(t.encode()) for t in held),
            "tokens": len(held_tokens),
        },
    }
    (args.out / "data.json").write_text(json.dumps(report, indent=1))
    print({k: report[k] for k in ("train", "heldout")})


if __name__ == "__main__":
    main()
