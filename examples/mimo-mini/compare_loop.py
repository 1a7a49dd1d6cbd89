"""Compares `tilec run` with the rounds of the PyTorch loop in `tests/fixtures/mimo-mini/rounds.json`.

Needs nothing but the program. Every prompt is run with guesses of a whole block; the texts must be the same
but for near ties, and the tokens that a round adds must be those of the loop within 2 %. What follows -- goes
to `tilec run`:

    python3 compare_loop.py --tilec target/release/tilec -- --activations f32 --kv-cache-type f32
    python3 compare_loop.py --tilec target/release/tilec --tie 0.5 --out gpu.json -- --device cuda

How many tokens a round adds depends on the text more than on anything else. So the 2 % are those of the texts that are
the loop's to the end; those that go on to something else behind a near tie are only in the sums. With `--plain` all
texts are written without the draft once more, and must be those with it.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
END = 0  # the token that ends a text


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tilec", default="tilec", help="the program")
    parser.add_argument(
        "--model", type=pathlib.Path, default=HERE / "model.yaml", help="model.yaml or a plan"
    )
    parser.add_argument(
        "--rounds",
        type=pathlib.Path,
        default=HERE.parents[1] / "tests" / "fixtures" / "mimo-mini" / "rounds.json",
    )
    parser.add_argument(
        "--texts", type=int, help="as many of the texts, from all of them alike; all by default"
    )
    parser.add_argument(
        "--tie", type=float, default=0.02, help="logits so close may change places (default: 0.02)"
    )
    parser.add_argument("--plain", action="store_true", help="also without the draft")
    parser.add_argument("--out", type=pathlib.Path, help="where the result goes, as JSON")
    parser.add_argument("options", nargs="*", help="for tilec run")
    args = parser.parse_args()

    texts = json.loads(args.rounds.read_text())["texts"]
    if args.texts:
        texts = [texts[len(texts) * n // args.texts] for n in range(min(args.texts, len(texts)))]
    ours, theirs, alike = [0, 0], [0, 0], [[0, 0], [0, 0]]
    same, ties, wrong, plain_same = 0, [], [], 0
    rates = {"draft": [0, 0.0], "plain": [0, 0.0]}
    for number, text in enumerate(texts):
        done = run(args, text, ["--draft-min", "7"])
        note(rates["draft"], done)
        # The first token of a text is no round's.
        own = [done["draft"]["rounds"], done["draft"]["tokens"]]
        wanted = [
            sum(text["rounds"]),
            sum((added + 1) * rounds for added, rounds in enumerate(text["rounds"])),
        ]
        ours, theirs = add(ours, own), add(theirs, wanted)
        found = done["tokens"] + ([END] if done["finish"] == "end of text" else [])
        place = next((n for n, pair in enumerate(zip(found, text["tokens"])) if pair[0] != pair[1]), None)
        if place is None and found == text["tokens"]:
            same += 1
            alike = [add(alike[0], own), add(alike[1], wanted)]
        else:
            place = min(len(found), len(text["tokens"])) if place is None else place
            other = found[place] if place < len(found) else None
            apart = next((a for p, token, a in text["ties"] if p == place and token == other), None)
            entry = {
                "text": number,
                "place": place,
                "theirs": text["tokens"][place],
                "ours": other,
                "apart": apart,
            }
            (wrong if apart is None or apart > args.tie else ties).append(entry)
        if args.plain:
            plain = run(args, text, ["--no-draft"])
            note(rates["plain"], plain)
            plain_same += plain["tokens"] == done["tokens"]
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {len(texts)}", end="", file=sys.stderr)
    here, there = ours[1] / ours[0], theirs[1] / theirs[0]
    result = {
        "options": args.options,
        "texts": len(texts),
        "same": same,
        "near_ties": ties,
        "unexplained": wrong,
        "rounds": ours[0],
        "tokens_per_round": round(here, 4),
        "loop_rounds": theirs[0],
        "loop_tokens_per_round": round(there, 4),
        "off": round(here / there - 1, 5),
        "of_same_texts": [{"rounds": n, "tokens_per_round": round(tokens / max(n, 1), 4)} for n, tokens in alike],
        "tokens_per_s": {kind: round(n / s, 1) for kind, (n, s) in rates.items() if s},
    }
    if args.plain:
        result["same_without_draft"] = plain_same
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result | {"near_ties": len(ties)}, indent=1))
    problems = [
        (alike[1][1] == 0, "no text is the loop's"),
        (
            abs(alike[0][1] * alike[1][0] - alike[1][1] * alike[0][0]) > 0.02 * alike[1][1] * alike[0][0],
            "the acceptance is more than 2 % off",
        ),
        (not args.texts and alike[0][0] < 2000, "fewer than 2,000 rounds of the same texts"),
        (wrong, f"{len(wrong)} texts differ, and no near tie explains it"),
        (args.plain and plain_same < len(texts), "texts differ with and without the draft"),
    ]
    failed = [problem for so, problem in problems if so]
    for problem in failed:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(bool(failed))


def run(args, text, options):
    """What `tilec run` says of a prompt."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text["prompt"])
        file.flush()
        command = [
            args.tilec,
            "run",
            str(args.model),
            "--raw",
            "-f",
            file.name,
            "--json",
            "--temperature",
            "0",
        ]
        command += ["-n", str(len(text["tokens"])), *options, *args.options]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def add(one, other):
    """Sums of rounds, and of tokens."""
    return [a + b for a, b in zip(one, other)]


def note(rate, done):
    """Adds tokens and seconds."""
    rate[0] += done["decoded_tokens"]
    rate[1] += done["decode_s"]


if __name__ == "__main__":
    main()
