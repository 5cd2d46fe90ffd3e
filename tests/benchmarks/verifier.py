"""How right and how fast is the verifier? Labelled pairs, against Math-Verify if it is installed; and fuzzing, with the slowest input.

    python tests/benchmarks/verifier.py pairs.jsonl          # rows {"pred": an answer's text, "gold", "expect": true or false}
    python tests/benchmarks/verifier.py --fuzz 100000        # no pairs: only the fuzzing
    pip install math-verify[antlr4_13_2]                     # the rival; it is not needed otherwise

One core. Math-Verify gets the gold between dollar signs and its own defaults (5 s a side, by signal).
"""
import argparse
import json
import logging
import pathlib
import random
import sys
import time

from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from common.verify import equivalent, parses, reward  # noqa: E402

PIECES = [*"{}()[]|.,!_^+-*/=<>&$:;'\"\\ \n\0xyfei0123456789%°½²∞√", r"\frac", r"\sqrt", r"\{", r"\}", r"\le", r"\in", r"\cup",
          r"\pm", r"\sin", r"\log", r"\pi", r"\infty", r"\text{", r"\text{cm}", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\",
          r"\binom", r"\overline", r"\boxed{", r"\left(", r"\right)", r"\sum_{n=0}^", "9^{9^{9}}", "99999999!", "1e999", "yes",
          "answer is", "####", "\ud800", "\u202e", "中", "٣", "__import__", "  "]


def fuzz(count: int, seed: int = 0) -> tuple[float, str]:
    """-> the slowest input's seconds, and its beginning. An exception ends the program."""
    rng, slowest = random.Random(seed), (0.0, "")
    for _ in tqdm(range(count), desc="fuzzing"):
        a, b = ("".join(rng.choices(PIECES, k=int(10 ** rng.uniform(0, 3)))) for _ in range(2))
        if rng.random() < 0.02:  # long ones, up to a megabyte
            a *= rng.choice((10, 100, 1000))
        a = a[:1_000_000]
        started = time.perf_counter()
        reward(rf"\boxed{{{a}}}", b), reward(a, b), equivalent(a, a), parses(b)
        slowest = max(slowest, (time.perf_counter() - started, a[:80]))
    return slowest


def rate(name: str, rows: list[dict], judge) -> None:
    started = time.perf_counter()
    found = [judge(row) for row in tqdm(rows, desc=name, leave=False)]
    seconds = time.perf_counter() - started
    right = sum(f == row["expect"] for f, row in zip(found, rows)) / len(rows)
    of = lambda expect: [f for f, row in zip(found, rows) if row["expect"] == expect]
    false_positive, false_negative = sum(of(False)) / max(1, len(of(False))), 1 - sum(of(True)) / max(1, len(of(True)))
    print(f"| {name} | {len(rows)} | {right:.2%} | {false_positive:.2%} | {false_negative:.2%} | {len(rows) / seconds:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?")
    parser.add_argument("--fuzz", type=int, default=20_000, help="random inputs")
    args = parser.parse_args()
    if args.pairs:
        rows = [json.loads(line) for line in pathlib.Path(args.pairs).read_text(encoding="utf-8").splitlines()]
        print("| verifier | pairs | right | wrong accepted | right refused | pairs/s |\n| --- | --- | --- | --- | --- | --- |")
        rate("common/verify.py", rows, lambda row: reward(row["pred"], row["gold"]) == 1)
        try:
            import math_verify
        except ImportError:
            print("Math-Verify is not installed: pip install math-verify[antlr4_13_2]")
        else:
            logging.disable(logging.ERROR)
            rate("Math-Verify", rows, lambda row: math_verify.verify(math_verify.parse(f"${row['gold']}$"),
                                                                     math_verify.parse(row["pred"])))
    seconds, text = fuzz(args.fuzz)
    print(f"{args.fuzz} random inputs, no exception; the slowest took {1000 * seconds:.0f} ms for its four questions: {text!r}")


if __name__ == "__main__":
    main()
