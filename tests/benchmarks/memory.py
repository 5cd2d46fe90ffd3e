"""Is the line "memory, GiB" right? Eight blocks of Qwen3-0.6B's shapes, random weights, on a CPU.

    python tests/benchmarks/memory.py           # three cases, float32: minutes, 8 GiB

entropy_min.py trains, since it needs no right answer. Measured is the most that the process holds
for itself (Linux: RssAnon and VmSwap) less what it holds before a model is there. Aim: within 15 %.
"""
import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ("--steps 2 --group-size 16 --max-new-tokens 64 --eval-problems 0 --data arithmetic "
         "--device cpu --micro-batch-tokens ")
CASES = {"all weights": "512", "adapters of rank 32": "512 --lora-rank 32",
         "four times the micro-batch": "2048"}
CHILD = """
import re, sys, threading, time
sys.path.insert(0, sys.argv[1])
import entropy_min, peft, transformers
transformers.Qwen3ForCausalLM

def held():
    status = open("/proc/self/status").read()
    kib = re.findall(r"(?:RssAnon|VmSwap):\\s+(\\d+)", status)
    return sum(map(int, kib)) / 2**20

def watch():
    while True:
        seen.append(held())
        time.sleep(0.005)

seen = [held()]
threading.Thread(target=watch, daemon=True).start()
entropy_min.main(sys.argv[2:])
print("held", seen[0], max(seen))
"""


def build(folder: pathlib.Path) -> None:
    """Random weights, with the embedded model's tokenizer."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True,
        max_position_embeddings=4096, bos_token_id=None)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in (ROOT / "common" / "tiny").iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)


def main():
    argparse.ArgumentParser(description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| case | printed, GiB | measured | ratio | the line |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        model = pathlib.Path(place) / "model"
        build(model)
        for number, (case, own) in enumerate(CASES.items()):
            flags = [*FLAGS.split(), *own.split(), "--model", str(model)]
            command = [sys.executable, "-c", CHILD, str(ROOT), *flags,
                       "--output", f"{place}/{number}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            line = re.search(r"memory, GiB: (.*): about (\S+)", done.stdout)
            before, peak = map(float, re.search(r"held (\S+) (\S+)", done.stdout).groups())
            printed, measured = float(line[2]), peak - before
            print(f"| {case} | {printed:.2f} | {measured:.2f} | {printed / measured:.2f} | "
                  f"{line[1]} |", flush=True)
            shutil.rmtree(f"{place}/{number}")


if __name__ == "__main__":
    main()
