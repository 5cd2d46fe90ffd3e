"""What does it cost to look inside a model? Seconds and memory, over tokens and blocks.

    python tests/benchmarks/internal_view.py             # four minutes on one core
    python tests/benchmarks/internal_view.py --cases 28x128x32x256

The second reads 32 answers of 256 tokens and pools 128 tokens of them. Qwen3-0.6B's shapes, random
weights, float32; random tokens stand for the answers, so nothing is sampled. Each case is a fresh
process with one thread; "before" is its memory with the model loaded and nothing read yet. The
price is the unembedding, 12 L * 2 D V FLOPs per pooled token: linear in tokens and in blocks,
but slower below a chunk of 2^24 logits (110 tokens here), which shares one reading of E. Memory
grows to a chunk and is flat from there, in blocks too but for the weights. What would take hours is
computed from the slowest and the fastest row, and called an extrapolation.
"""
import argparse
import json
import pathlib
import resource
import subprocess
import sys
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from analysis.internal import rollout_view  # noqa: E402
from common.sampling import Rollout  # noqa: E402

D, V = 1024, 151936
CASES = ["1x64", "1x128", "1x256", "7x16", "14x16", "28x16"]


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def gflop_per_token(blocks: int) -> float:
    return 12 * blocks * 2 * D * V / 1e9


def random_rollout(answers: int, length: int) -> Rollout:
    one = torch.ones(answers, length)                                           # (B, T)
    lengths = torch.full((answers,), length)                                    # (B,)
    tokens = torch.randint(V, (answers, length))                                # (B, T)
    return Rollout([[1, 2, 3]] * answers, tokens, lengths, one, one, lengths > 0,
                   [""] * answers)


def one_case(blocks: int, tokens: int, answers: int = 1, length: int = 0) -> dict:
    """Pools so many tokens of answers of `length` tokens; default: one answer, all of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=D, num_hidden_layers=blocks, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True))
    rollout = random_rollout(answers, length or tokens)
    # Linux: forget the peak that building the model has left.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = peak_gib()
    started = time.perf_counter()
    rollout_view(model.eval(), rollout, 16384, tokens)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "before": before, "peak": peak_gib()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES,
                        help="BLOCKSxTOKENS, or BLOCKSxTOKENSxANSWERSxLENGTH")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        numbers = [int(part) for part in args.only.split("x")]
        print(json.dumps(one_case(*numbers)))
        return
    print("blocks  pooled tokens  seconds   s per 1,000 tokens   GFLOP/s   GiB before    GiB peak")
    rates = []
    for case in args.cases:
        command = [sys.executable, __file__, "--only", case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        blocks, tokens = [int(part) for part in case.split("x")[:2]]
        per_token = row["seconds"] / tokens
        rates.append(gflop_per_token(blocks) / per_token)
        print(f"{blocks:6} {tokens:14} {row['seconds']:8.1f} {1000 * per_token:20.0f} "
              f"{rates[-1]:9.0f} {row['before']:12.2f} {row['peak']:11.2f}", flush=True)
    hours = [32 * 256 * gflop_per_token(28) / rate / 3600 for rate in (max(rates), min(rates))]
    print(f"extrapolated, not run: 32 answers of 256 tokens, all pooled, 28 blocks: {hours[0]:.1f} "
          f"to {hours[1]:.1f} h")


if __name__ == "__main__":
    main()
