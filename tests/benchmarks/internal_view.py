"""What does it cost to look inside a model? Seconds and peak memory of common.internal_policy, over tokens and layers.

    python tests/benchmarks/internal_view.py            # four minutes on one core; Qwen3-0.6B's shapes, random weights, float32
    python tests/benchmarks/internal_view.py --cases 28x128x32x256     # 32 answers of 256 tokens, 128 tokens of them pooled

Random tokens stand for the answers, so nothing is sampled. Each case is a fresh process with one thread; "before" is its memory
with the model loaded and nothing read yet, "peak" is ru_maxrss at the end. The price is the unembedding, (10 L + 2) * 2 D V FLOPs
a pooled token: linear in tokens and in layers, but slower below a chunk of 2^24 logits (110 tokens here), which shares one reading
of E. Memory grows to a chunk and is flat from there, in layers too but for the weights. What would take hours is computed from the
slowest and the fastest row, and called an extrapolation.
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
from common.internal_policy import rollout_view  # noqa: E402
from common.sampling import Rollout  # noqa: E402

D, V = 1024, 151936


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def one_case(layers: int, tokens: int, answers: int = 1, length: int = 0) -> dict:
    """Pools so many tokens of answers of `length` tokens (default: one answer, all of it) in a model of so many blocks."""
    length = length or tokens
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=8,
                         head_dim=128, intermediate_size=3072, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config).eval()
    answer, lengths = torch.randint(V, (answers, length)), torch.full((answers,), length)          # (B, T), (B,)
    one = torch.ones(answers, length)                                                             # (B, T)
    rollout = Rollout([[1, 2, 3]] * answers, answer, lengths, one, one, one, lengths > 0, [""] * answers)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak that building the model has left
    before, started = peak_gib(), time.perf_counter()
    rollout_view(model, rollout, 16384, tokens)
    return {"layers": layers, "tokens": tokens, "seconds": time.perf_counter() - started, "before": before, "peak": peak_gib()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["1x64", "1x128", "1x256", "7x16", "14x16", "28x16"],
                        help="LAYERSxTOKENS, or LAYERSxTOKENSxANSWERSxLENGTH")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return print(json.dumps(one_case(*map(int, args.only.split("x")))))
    print("layers  pooled tokens  seconds   s per 1,000 tokens   GFLOP/s   GiB before    GiB peak")
    rates = []
    for case in args.cases:
        command = [sys.executable, __file__, "--only", case]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        per_token = row["seconds"] / row["tokens"]
        rates.append((10 * row["layers"] + 2) * 2 * D * V / 1e9 / per_token)
        print(f"{row['layers']:6} {row['tokens']:14} {row['seconds']:8.1f} {1000 * per_token:20.0f} {rates[-1]:9.0f} "
              f"{row['before']:12.2f} {row['peak']:11.2f}", flush=True)
    low, high = (32 * 256 * (10 * 28 + 2) * 2 * D * V / 1e9 / rate / 3600 for rate in (max(rates), min(rates)))
    print(f"extrapolated, not run: 32 answers of 256 tokens, all pooled, 28 layers: {low:.1f} to {high:.1f} h")


if __name__ == "__main__":
    main()
