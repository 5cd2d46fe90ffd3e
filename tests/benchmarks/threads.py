"""How many threads should the embedded model use on a CPU? Seconds of two GRPO steps with 1 thread and with all, idle and busy.

    python tests/benchmarks/threads.py            # about a minute; "busy" keeps one core occupied by another process

Each cell is a fresh process; the two are taken in turn, three times, medians shown.
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
from common import models
from common.arithmetic import arithmetic_problems
from common.data import encode_prompts
from common.logprobs import micro_batches, response_logprobs
from common.sampling import sample
model, tokenizer = models.load_model("tiny"), models.load_tokenizer("tiny")
torch.set_num_threads(int(sys.argv[1]))
prompts = [row["prompt"] for row in encode_prompts(tokenizer, arithmetic_problems(8, False), "", False, 400)]
for step in range(3):
    if step == 1:
        started = time.perf_counter()
    rollout = sample(model, tokenizer, prompts, 16, 80, seed=step)
    for m in micro_batches(torch.arange(128), rollout, 4096):
        logp, _ = response_logprobs(model, rollout[m])
        (logp.sum() / 5000).backward()
print((time.perf_counter() - started) / 2)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=120, help="seconds after which a measurement is given up")
    args = parser.parse_args()
    cores = os.cpu_count()
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        seconds = {1: [], cores: []}
        for _ in range(3):
            for threads in seconds:
                try:
                    done = subprocess.run([sys.executable, "-c", STEP, str(threads)], capture_output=True, text=True,
                                          timeout=args.limit, check=True)
                    seconds[threads].append(float(done.stdout))
                except subprocess.TimeoutExpired:
                    seconds[threads].append(args.limit)
        if other:
            other.kill()
        for threads, times in seconds.items():
            print(f"{time.strftime('%Y-%m-%d')} {cores} cores, {'one busy' if busy else 'idle'}, {threads} thread(s): "
                  f"{statistics.median(times):.2f} s a step ({min(times):.2f} to {max(times):.2f})", flush=True)


if __name__ == "__main__":
    main()
