"""How right and how fast is the verifier? Labelled rows, by kind; and fuzzing, the slowest input.

    python tests/benchmarks/verifier.py cases.jsonl     # rows text (pred), gold, right (expect)
    python tests/benchmarks/verifier.py --fuzz 100000   # no rows: only the fuzzing
    git show 3ba9b2d:common/verify.py > old.py          # another verifier, --other old.py
    pip install math-verify[antlr4_13_2]                # the rival, if it is to be compared

Seconds are the processor's. Math-Verify gets the gold between dollar signs and its own defaults.
"""
import argparse
import json
import logging
import pathlib
import random
import runpy
import sys
import time

from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from common.verify import equivalent, parses, verify  # noqa: E402

PIECES = [*"{}()[]|.,!_^+-*/=<>&$:;'\"\\ \n\0xyfei0123456789%°½²∞√", "yes", "answer is", "####"]
PIECES += r"""\frac \sqrt \{ \} \le \in \cup \pm \sin \log \pi \infty \text{ \text{cm} \\ \binom
    \begin{pmatrix} \end{pmatrix} \overline \boxed{ \left( \right) \sum_{n=0}^ 9^{9^{9}} 1e999
    99999999! __import__ \ne \setminus \lfloor million and or <think> </think> \approx""".split()
PIECES += ["\ud800", "\u202e", "中", "٣", "  "]


def fuzz(count: int, seed: int = 0) -> tuple[float, str]:
    """-> the slowest input's seconds, and its beginning. An exception ends the program."""
    rng, slowest = random.Random(seed), (0.0, "")
    for _ in tqdm(range(count), desc="fuzzing"):
        a = "".join(rng.choices(PIECES, k=int(10 ** rng.uniform(0, 3))))
        b = "".join(rng.choices(PIECES, k=int(10 ** rng.uniform(0, 3))))
        if rng.random() < 0.02:  # long ones, up to a megabyte
            a *= rng.choice((10, 100, 1000))
        a = a[:1_000_000]
        questions = [
            (verify, rf"\boxed{{{a}}}", b), (verify, a, b), (equivalent, a, a), (parses, b)]
        for function, *arguments in questions:
            started = time.process_time()
            function(*arguments)
            slowest = max(slowest, (time.process_time() - started, a[:80]))
    return slowest


def math_verify_judge():
    """Math-Verify as (text, gold) -> bool, None if it is not installed."""
    try:
        import math_verify
    except ImportError:
        print("Math-Verify is not installed: pip install math-verify[antlr4_13_2]")
        return None
    logging.disable(logging.ERROR)

    def judge(text: str, gold: str) -> bool:
        return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(text))
    return judge


def rate(name: str, rows: list[tuple], judge) -> dict[str, list]:
    """Print one line on a judge -> per kind: rows, wrongly accepted, wrongly refused."""
    kinds: dict[str, list] = {}
    started = time.process_time()
    found = [bool(judge(text, gold)) for text, gold, *_ in tqdm(rows, desc=name, leave=False)]
    seconds = time.process_time() - started
    for yes, (_, _, right, kind) in zip(found, rows, strict=True):
        counts = kinds.setdefault(kind, [0, 0, 0])
        counts[0] += 1
        counts[1] += yes and not right
        counts[2] += right and not yes
    accepted = sum(counts[1] for counts in kinds.values())
    refused = sum(counts[2] for counts in kinds.values())
    share = 1 - (accepted + refused) / len(rows)
    positive = sum(right for *_, right, _ in rows)
    print(f"| {name} | {len(rows)} | {share:.1%} | {accepted} of {len(rows) - positive} "
          f"| {refused} of {positive} | {len(rows) / seconds:.0f} |")
    return kinds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?")
    parser.add_argument("--fuzz", type=int, default=20_000, help="random inputs")
    parser.add_argument("--other", help="a file with verify(text, gold) or reward(text, gold)")
    args = parser.parse_args()
    if args.rows:
        lines = pathlib.Path(args.rows).read_text(encoding="utf-8").splitlines()
        rows = []
        for row in map(json.loads, lines):
            right = row["right"] if "right" in row else row["expect"]
            if right is not None:
                text = row["text"] if "text" in row else row["pred"]
                rows.append((text, row["gold"], bool(right), row.get("kind", "")))
        print("| verifier | rows | right | wrong accepted | right refused | rows/s |")
        print("| --- | --- | --- | --- | --- | --- |")
        judges = {"common/verify.py": verify, "Math-Verify": math_verify_judge()}
        if args.other:
            other = runpy.run_path(args.other)
            judges[args.other] = other.get("verify", other["reward"])
        found = {name: rate(name, rows, judge) for name, judge in judges.items() if judge}
        print("\n| kind | rows |" + "".join(f" {name}: accepted, refused |" for name in found))
        print("| --- | --- |" + " --- |" * len(found))
        for kind, (count, *_) in sorted(found["common/verify.py"].items()):
            cells = (f" {counts[kind][1]}, {counts[kind][2]} |" for counts in found.values())
            print(f"| {kind} | {count} |" + "".join(cells))
    if args.fuzz:
        seconds, text = fuzz(args.fuzz)
        print(f"{args.fuzz} random inputs, no exception; slowest {1000 * seconds:.0f} ms: {text!r}")


if __name__ == "__main__":
    main()
