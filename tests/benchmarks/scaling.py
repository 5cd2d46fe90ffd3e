"""What would a step cost on 1, 8 and 64 GPUs, and where does it stop scaling? Arithmetic from what one device does.

    python tests/benchmarks/scaling.py                     # with what we aim at; nothing here has been measured on a GPU yet
    python tests/benchmarks/scaling.py --decoding 1.7 --share 0.5 --matmul 700 --copy 2900       # with gpu.py's rows for a card

A rollout is BuPO's: 128 problems x 8 answers, here all of 2,048 tokens (and 200 of prompt), one update, blocks computed twice.
Sampling: each card decodes its answers in rounds of as many as the memory plan leaves room for; a token costs `decoding` times
reading all weights and the cache once, and the weights do not get fewer with more cards. Training: 8 FLOPs a weight and token at
`share` of the matmul rate. Sending: in every micro-batch of 16,384 tokens each block twice and float32 gradients once, over the
slowest link, while others compute; so the longer of training and sending counts.
"""
import argparse
import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from recipes import SHAPES, plan  # noqa: E402

ANSWERS, NEW, PROMPT, BUDGET = 1024, 2048, 200, 16384


def weights_of(name: str) -> tuple[int, int]:
    """-> trained numbers, bytes of cache a token in bfloat16."""
    hidden, inner, blocks, heads, tied = SHAPES[name]
    block = hidden * 128 * (2 * heads + 2 * 8) + 3 * hidden * inner + 2 * hidden + 2 * 128
    return blocks * block + 151936 * hidden * (1 if tied else 2) + hidden, 2 * blocks * 8 * 128 * 2


def seconds(name: str, cards: int, args) -> dict:
    """A step's seconds by part, and the plan's peak in GiB."""
    numel, cache_token = weights_of(name)
    gib, at_once = plan(name, 80, cards, 0, False, ANSWERS // cards)
    answers, link = ANSWERS // cards, args.node if cards <= 8 else args.network
    read = math.ceil(answers / at_once) * 2 * numel + answers * cache_token * (PROMPT + NEW / 2)  # bytes a token, all parts
    sampling = NEW * args.decoding * read / (args.copy * 1e9)
    tokens = answers * (PROMPT + NEW)
    training = 8 * numel * tokens / (args.share * args.matmul * 1e12)
    once = (cards - 1) / cards / (link * 1e9)  # seconds to send a byte of every weight
    sending = math.ceil(tokens / BUDGET) * (2 * 2 + 4) * numel * once
    return {"rows": at_once, "sampling": sampling + 2 * numel * once, "training": training, "sending": sending, "peak": gib["peak"],
            "step": sampling + 2 * numel * once + max(training, sending)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, unit in (("decoding", 2.0, "times the floor's seconds (gpu.py)"), ("share", 0.45, "of the matmul rate (gpu.py)"),
                                ("matmul", 700.0, "TFLOP/s in bfloat16 (gpu.py)"), ("copy", 3000.0, "GB/s (gpu.py)"),
                                ("node", 300.0, "GB/s a card within a node"), ("network", 40.0, "GB/s a card between nodes")):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{unit} [{default}]")
    args = parser.parse_args()
    print("assumed, not measured: " + ", ".join(f"{name} {value:g}" for name, value in vars(args).items()) + "\n\n"
          "| model | cards | answers at once | peak, GiB | sampling, s | training, s | sending, s | step, s | of linear |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in ("Qwen3-4B", "Qwen3-8B", "Qwen3-32B"):
        base = None
        for cards in (1, 8, 64):
            of = seconds(name, cards, args)
            if of["peak"] > 0.97 * 80:
                print(f"| {name} | {cards} | | {of['peak']:.0f}: does not fit | | | | | |")
                continue
            base = base or cards * of["step"]
            print(f"| {name} | {cards} | {of['rows']} | {of['peak']:.0f} | {of['sampling']:.0f} | {of['training']:.1f} | "
                  f"{of['sending']:.1f} | {of['step']:.0f} | {base / cards / of['step']:.0%} |")


if __name__ == "__main__":
    main()
