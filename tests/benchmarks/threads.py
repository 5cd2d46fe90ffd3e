"""How many threads should a model use? Seconds of a GRPO step, idle and beside others.

    python tests/benchmarks/threads.py                  # the embedded model, five minutes
    python tests/benchmarks/threads.py --model FOLDER   # and a real one, in bfloat16 on the CPU

"busy": another process holds one core. Each measurement is a fresh process, and the settings take
turns: one thread; all cores; all cores with OMP_WAIT_POLICY=PASSIVE, so that a thread that waits
for another sleeps instead of spinning. OpenMP reads that when torch is imported, not later.
"""
import argparse
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
name, threads = sys.argv[1], int(sys.argv[2])
small = name == "tiny"
n, length, dtype = (16, 80, "float32") if small else (2, 16, "bfloat16")
args = SimpleNamespace(model=name, device="cpu", dtype=dtype, lora_rank=0)
model, tokenizer = load_model(args), load_tokenizer(name)
torch.set_num_threads(threads)
prompts = [encode_prompt(tokenizer, row["problem"]) for row in load_problems("arithmetic")[:8]]
for step in range(3 if small else 2):
    if step == 1:
        started = time.perf_counter()
    rollout = sample(model, tokenizer, prompts, n, length, seed=step)
    for part in micro_batches(rollout, torch.arange(8 * n), 1024):
        response_logprobs(model, rollout[part]).sum().backward()
print((time.perf_counter() - started) / step)
"""
LIMIT = 60  # seconds after which a measurement is given up


def step_seconds(model: str, threads: int, policy: str) -> float:
    command = [sys.executable, "-c", STEP, model, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True,
                              env=environment)
        return float(done.stdout)
    except subprocess.TimeoutExpired:
        return LIMIT


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cores = os.cpu_count()
    settings = ((1, ""), (cores, ""), (cores, "PASSIVE"))
    for model in dict.fromkeys(("tiny", args.model)):
        for state in ("idle", "one busy"):
            other = None
            if state != "idle":
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            seconds = {setting: [] for setting in settings}
            for _ in range(args.rounds):
                for setting, found in seconds.items():
                    found.append(step_seconds(model, *setting))
            if other:
                other.kill()
            for (threads, policy), found in seconds.items():
                print(f"{time.strftime('%Y-%m-%d')} {os.path.basename(model)}, {cores} cores, "
                      f"{state}, {threads} thread(s) {policy}: {statistics.median(found):.2f} s "
                      f"per step ({min(found):.2f} to {max(found):.2f})", flush=True)


if __name__ == "__main__":
    main()
