"""How many threads should the embedded model use? Seconds of a GRPO step, idle and beside others.

    python tests/benchmarks/threads.py       # minutes; "busy": another process holds one core

Each measurement is a fresh process; one thread and all cores take turns, three times each.
"""
import os
import statistics
import subprocess
import sys
import time

STEP = """
import sys, time, torch
sys.path.insert(0, ".")
from types import SimpleNamespace
from common.data import encode_prompt, load_problems
from common.logprobs import micro_batches, response_logprobs
from common.models import load_model, load_tokenizer
from common.sampling import sample
args = SimpleNamespace(model="tiny", device="cpu", dtype="float32", lora_rank=0)
model, tokenizer = load_model(args), load_tokenizer("tiny")
torch.set_num_threads(int(sys.argv[1]))
prompts = [encode_prompt(tokenizer, row["problem"]) for row in load_problems("arithmetic")[:8]]
for step in range(3):
    if step == 1:
        started = time.perf_counter()
    rollout = sample(model, tokenizer, prompts, 16, 80, seed=step)
    for part in micro_batches(rollout, torch.arange(128), 1024):
        response_logprobs(model, rollout[part]).sum().backward()
print((time.perf_counter() - started) / 2)
"""
LIMIT = 120  # seconds after which a measurement is given up


def step_seconds(threads: int) -> float:
    command = [sys.executable, "-c", STEP, str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
        return float(done.stdout)
    except subprocess.TimeoutExpired:
        return LIMIT


def main():
    cores = os.cpu_count()
    for state in ("idle", "one busy"):
        other = None
        if state != "idle":
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        seconds = {1: [], cores: []}
        for _ in range(3):
            for threads, found in seconds.items():
                found.append(step_seconds(threads))
        if other:
            other.kill()
        for threads, found in seconds.items():
            print(f"{time.strftime('%Y-%m-%d')} {cores} cores, {state}, {threads} thread(s): "
                  f"{statistics.median(found):.2f} s per step "
                  f"({min(found):.2f} to {max(found):.2f})", flush=True)


if __name__ == "__main__":
    main()
