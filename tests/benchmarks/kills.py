"""How many kills does a run survive? Each script is killed at drawn moments, resumed, and compared.

    python tests/benchmarks/kills.py                       # six scripts, 20 kills each: minutes
    python tests/benchmarks/kills.py --scripts grpo --kills 5

SIGKILL comes 0 to 60 ms after a phase has begun: loading, evaluating, sampling, training, logging,
saving, finishing. In the end everything is compared with an uninterrupted run, bit for bit, but
for what a clock gave. Each run is a process of its own, forked from one that only imports.
"""
import argparse
import collections
import importlib
import itertools
import json
import mmap
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
COMMON = "--max-new-tokens 24 --eval-problems 3"
LOOP = f"{COMMON} --steps 5 --group-size 8"
FLAGS = {
    "grpo": f"{LOOP} --prompts-per-step 4 --updates-per-rollout 2",
    "bupo": f"{LOOP} --prompts-per-step 4 --internal-steps 2",
    "kl3_grpo": f"{LOOP} --prompts-per-step 4 --dtype bfloat16",
    "entropy_min": f"{LOOP} --select 3 --select-k 2",
    "long_cot_sft": f"{COMMON} --teacher-problems 8 --samples 4 --batch-size 4 --epochs 1",
    "ppo": f"{LOOP} --prompts-per-step 4",
}
METHODS = {"begin": "beginning", "measure": "evaluating", "log": "logging",
           "save": "saving", "finish": "finishing"}
PHASES = ["loading", "training", *METHODS.values(), "saving"]  # saving twice as often
PHASE = mmap.mmap(-1, 64)  # shared with the forked process, which writes here what it does
CLOCKS = ("tokens_per_second",)


def say(phase: str) -> None:
    PHASE[:] = phase.encode().ljust(64)


def announce(owner, name: str, phase: str) -> None:
    """Makes a method of a class say its phase when it is called."""
    original = getattr(owner, name)

    def wrapped(self, *args, **kwargs):
        say(phase)
        return original(self, *args, **kwargs)
    setattr(owner, name, wrapped)


def launch(script: str, argv: list[str], folder: pathlib.Path) -> int:
    """Starts a run in a fork of this process -> its number."""
    say("loading")
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(folder.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        from torch.optim import AdamW

        from common.run import Run
        announce(AdamW, "step", "training")
        for name, phase in METHODS.items():
            announce(Run, name, phase)
        importlib.import_module(script).main(argv)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


def kill_at(child: int, phase: str, delay: float) -> tuple[int, str]:
    """Waits for a phase, then a moment, and kills -> (how the process ended, its phase then)."""
    while PHASE[:].split()[0].decode() != phase:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), phase
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)  # one that has ended waits to be asked, so the number is its own
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), PHASE[:].split()[0].decode()


def result(folder: pathlib.Path) -> list:
    """Everything of a finished run that must not depend on when it was killed."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows.append(json.loads((folder / "summary.json").read_text()))
    kept = []
    for row in rows:
        kept.append({name: repr(value) for name, value in row.items()
                     if name not in CLOCKS and not name.startswith("seconds")})
    files = sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")
    answers = folder / "rollouts.jsonl"
    if answers.exists():
        kept.append(answers.read_text())
    return [kept, files, (folder / "model" / "model.safetensors").read_bytes()]


def measure(script: str, kills: int, rng: random.Random, folder: pathlib.Path):
    """-> (kills of runs that ended as the whole one, Counter of kills by phase)."""
    flags = FLAGS[script].split()
    whole = folder / "whole"
    status = os.waitpid(launch(script, [*flags, "--output", str(whole)], whole), 0)[1]
    if status:
        raise SystemExit(f"{script}: the whole run failed\n{whole.with_suffix('.log').read_text()}")
    survived = 0
    where = collections.Counter()
    for number in itertools.count():
        if where.total() == kills:
            return survived, where
        cut = folder / f"cut{number}"
        here = 0
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            argv = [*flags, "--output", str(cut)]
            if (cut / "config.json").exists():  # before that there is nothing to lose
                argv = ["--resume", str(cut)]
            child = launch(script, argv, cut)
            if where.total() < kills:
                code, phase = kill_at(child, rng.choice(PHASES), rng.uniform(0, 0.06))
            else:
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code == -signal.SIGKILL:
                where[phase] += 1
                here += 1
        if code == 0 and result(cut) == result(whole):
            survived += here
        else:
            print(f"{script}: {cut.name} ended with code {code} and is not the whole run\n"
                  + cut.with_suffix(".log").read_text()[-2000:])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=list(FLAGS), choices=list(FLAGS))
    parser.add_argument("--kills", type=int, default=20, help="of each script")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch
    import transformers
    for script in args.scripts:
        importlib.import_module(script)
    transformers.Qwen3ForCausalLM  # noqa: B018  imported here, it is there in every fork
    torch.set_num_threads(1)
    total = 0
    started = time.time()
    for script in args.scripts:
        rng = random.Random(f"{script} {args.seed}")
        with tempfile.TemporaryDirectory() as folder:
            survived, where = measure(script, args.kills, rng, pathlib.Path(folder))
        total += survived
        phases = ", ".join(f"{phase} {count}" for phase, count in where.most_common())
        print(f"{script}: {survived} of {args.kills} kills survived; while {phases}", flush=True)
    wanted = args.kills * len(args.scripts)
    print(f"{time.strftime('%Y-%m-%d')} {total} of {wanted} kills survived, "
          f"{time.time() - started:.0f} s")
    raise SystemExit(total != wanted)


if __name__ == "__main__":
    main()
