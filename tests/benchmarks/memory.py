"""Is the memory plan right? A run at Qwen3-0.6B's shapes, random weights, on this machine: what was printed and what was then held.

    python tests/benchmarks/memory.py                       # three cases on a CPU, float32, ten minutes on two cores, 12 GiB
    python tests/benchmarks/memory.py --cases full

entropy_min.py trains, since it needs no right answer. Measured: the peak of the resident set less what Python and its libraries
hold before a model is there (of GPU memory if there is a GPU).
"""
import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = pathlib.Path(__file__).parents[2]
CASES = {"full": "", "adapters of rank 32": "--lora-rank 32", "longer answers": "--max-new-tokens 256 --group-size 4"}
FLAGS = "--steps 2 --group-size 8 --max-new-tokens 64 --eval-problems 0 --micro-batch-tokens 512 --data arithmetic --save-every 9"
IMPORTS = "import resource, common.run, common.internal_policy, matplotlib.pyplot, peft; print(resource.getrusage(0).ru_maxrss)"


def build(folder: pathlib.Path) -> None:
    """Qwen3-0.6B's shapes with random weights; the embedded model's tokenizer."""
    config = Qwen3Config(vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                         head_dim=128, intermediate_size=3072, tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=None)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in (ROOT / "common" / "tiny").iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--build", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        return build(args.build)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        subprocess.run([sys.executable, __file__, "--build", str(folder / "model")], check=True)  # a child inherits our peak
        base = int(subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True).stdout) / 2**20
        base = 0.0 if torch.cuda.is_available() else base
        print(f"held before a model is loaded: {base:.2f} GiB\n\n| case | planned, GiB | measured | ratio | the plan |")
        print("| --- | --- | --- | --- | --- |")
        for case in args.cases:
            out = folder / case.replace(" ", "_")
            command = [sys.executable, ROOT / "entropy_min.py", "--model", folder / "model", *FLAGS.split(), *CASES[case].split()]
            done = subprocess.run([*map(str, command), "--output", str(out)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            line = re.search(r"memory plan, GiB: (.*), peak (.*)", done.stdout)
            measured = max(json.loads(row)["peak_gb"] for row in (out / "metrics.jsonl").read_text().splitlines()) - base
            planned = float(line[2])
            print(f"| {case} | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} | {line[1]} |", flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
