"""How many kills does a run survive? Each script is killed (SIGKILL) at drawn moments, resumed each time, and compared in the end.

    python tests/benchmarks/kills.py                             # every script, 20 kills each, ten minutes
    python tests/benchmarks/kills.py --scripts grpo --kills 3

A moment is the start of a phase (loading, evaluating, sampling, ..., saving) plus 0 to 60 ms. Compared with an uninterrupted run,
bit for bit: final weights, summary.json, and metrics.jsonl without what a clock or a meter gave: seconds, tokens/s, peak memory.
Each run is a process of its own, forked from this one, which has done nothing but import: a start takes no seconds then.
"""
import argparse
import collections
import importlib
import json
import mmap
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
FLAGS, LOOP = "--save-every 1 --max-new-tokens 24 --eval-problems 3 --eval-k 2", "--steps 5 --group-size 8"
OWN = {"grpo": f"{LOOP} --prompts-per-step 4 --updates-per-rollout 2", "bupo": f"{LOOP} --prompts-per-step 4 --internal-steps 2",
       "kl3_grpo": f"{LOOP} --prompts-per-step 4 --dtype bfloat16", "entropy_min": f"{LOOP} --select 3 --select-k 2",
       "long_cot_sft": "--teacher-problems 8 --samples 4 --batch-size 4 --epochs 1", "ppo": f"{LOOP} --prompts-per-step 4"}
PHASES = ["loading", "beginning", "evaluating", "sampling", "training", "logging", "saving", "saving", "finishing"]  # saving twice as often
PHASE = mmap.mmap(-1, 64)  # shared with the forked process, which says here what it does


def say(phase: str) -> None:
    PHASE[:] = phase.encode().ljust(64)


def watch(run_class) -> None:
    """Makes every Run of this process say its phase."""
    def before(name, phase):
        original = getattr(run_class, name)

        def wrapped(self, *args, **kwargs):
            say(phase or args[0])
            return original(self, *args, **kwargs)
        setattr(run_class, name, wrapped)
    for name, phase in (("begin", "beginning"), ("clock", None), ("log", "logging"), ("save", "saving"), ("finish", "finishing")):
        before(name, phase)


def launch(script: str, argv: list[str], folder: pathlib.Path) -> int:
    say("loading")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(folder.with_suffix(".log"), "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            from common.run import Run
            watch(Run)
            importlib.import_module(script).main(argv)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int | None:
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def kill_at(child: int, phase: str, delay: float) -> tuple[int | None, str]:
    """Waits for a phase, then a moment, and kills -> (exit code if it had ended before, phase it was in)."""
    code = None
    while code is None and PHASE[:].split()[0].decode() != phase:
        code = ended(child)
        time.sleep(0.0005)
    time.sleep(delay)
    code = ended(child) if code is None else code
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return code, PHASE[:].split()[0].decode()


def result(folder: pathlib.Path) -> tuple:
    """Everything of a finished run that must not depend on when it was killed."""
    clocked = lambda name: name.startswith("seconds") or name in ("tokens_per_second", "peak_gb")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    left = sorted(path.name for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir()])
    return ((folder / "model" / "model.safetensors").read_bytes(), left,
            *([(k, repr(v)) for k, v in row.items() if not clocked(k)] for row in [*rows, summary]))


def measure(script: str, kills: int, rng: random.Random, folder: pathlib.Path) -> tuple[int, collections.Counter]:
    """-> kills of runs that ended as the whole one, kills by phase."""
    flags, whole = f"{FLAGS} {OWN[script]}".split(), folder / "whole"
    _, status = os.waitpid(launch(script, [*flags, "--output", str(whole)], whole), 0)
    if status:
        raise SystemExit(f"{script}: the uninterrupted run failed\n" + whole.with_suffix(".log").read_text()[-2000:])
    expected, survived, where, runs = result(whole), 0, collections.Counter(), 0
    while where.total() < kills:
        runs += 1
        cut, code, here = folder / f"cut{runs}", None, 0
        while code is None:
            begun = (cut / "config.json").exists()  # killed before that, nothing was there to lose
            child = launch(script, ["--resume", str(cut)] if begun else [*flags, "--output", str(cut)], cut)
            if where.total() < kills:
                code, phase = kill_at(child, rng.choice(PHASES), rng.uniform(0, 0.06))
            else:
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code is None:
                where[phase] += 1
                here += 1
        same = code == 0 and result(cut) == expected
        survived += here * same
        if not same:
            print(f"{script}: run {runs} ended with code {code} and is not the whole one\n" + cut.with_suffix(".log").read_text()[-2000:])
    return survived, where


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [name for name in OWN if (ROOT / f"{name}.py").exists()]
    parser.add_argument("--scripts", nargs="+", default=there, choices=there)
    parser.add_argument("--kills", type=int, default=20, help="of each script")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for script in args.scripts:
        importlib.import_module(script)
    import matplotlib.pyplot  # noqa: F401  imported here, it is there in every fork
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM  # noqa: F401
    torch.set_num_threads(1)
    total, started = 0, time.time()
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            survived, where = measure(script, args.kills, random.Random(f"{script} {args.seed}"), pathlib.Path(folder))
        total += survived
        print(f"{script}: {survived} of {args.kills} kills survived; while " + ", ".join(f"{p} {n}" for p, n in where.most_common()), flush=True)
    print(f"{time.strftime('%Y-%m-%d')} {total} of {args.kills * len(args.scripts)} kills survived, {time.time() - started:.0f} s")
    raise SystemExit(total != args.kills * len(args.scripts))


if __name__ == "__main__":
    main()
