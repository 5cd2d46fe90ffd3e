"""What the *_results.py stand on: runs of the algorithm files as they are, watched from outside.

    args = arguments(__doc__, seeds=5)                        # --seeds, --workers, --more
    results = runs("bupo", {"GRPO": Arm("grpo.py", "--steps 32")}, args)

A run lives in runs/analysis/<experiment>/<arm>-<seed>. One that is finished is read and not
repeated, so a stopped experiment goes on.
"""
import argparse
import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import pathlib
import re
import shutil
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from analysis import plot
from common.run import Run

plt = plot.pyplot()
ROOT = pathlib.Path(__file__).parent.parent
PAGES = ROOT / "analysis" / "results"
BLUE, SKY, ORANGE, VERMILION = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PURPLE, GREY = "#009E73", "#CC79A7", "#777777"
NOT_KEPT = ("step", "tokens", "gap_", "seconds")  # metrics that are not in the JSON


@dataclass
class Arm:
    """One configuration. {seed} and {runs} in flags are filled in; the rest is what is watched."""
    script: str
    flags: str = ""
    color: str = GREY
    style: str = "-"
    probe: Callable | None = None    # probe(run) -> dict, before training and every few steps
    every: int = 4
    prepare: Callable | None = None  # prepare(run, optimizer), before the first step
    after: Callable | None = None    # after(run) -> dict, at the end
    count: Callable | None = None    # count(answers) -> dict, of an evaluation's answers


class Watched(Run):
    """A Run that is looked at. The evaluation before training is made once for all runs that
    start from the same model. What an arm replaces in a script lasts for one run: each has a
    process of its own."""
    arm: Arm

    def begin(self, optimizer, *others) -> int:
        if self.arm.prepare:
            self.arm.prepare(self, optimizer)
        first = super().begin(optimizer, *others)
        self.look(0)
        return first

    def measure(self, when: str) -> dict:
        result = self.measured(when)
        right = [round(sum(row["rewards"])) for row in result["answers"]]
        self.summary[f"right_{when}"] = "".join(map(str, right))  # of 8 answers to each problem
        if self.arm.count:
            self.summary[f"count_{when}"] = self.arm.count(result["answers"])
        return result

    def measured(self, when: str) -> dict:
        args = self.args
        model = args.model.strip("/").replace("/", "_")[-80:]
        name = f"before-{model}-{args.eval_problems}-{args.max_new_tokens}.json"
        cache = self.folder.parent / name
        if when == "before" and cache.exists():
            known = json.loads(cache.read_text())
            self.summary.update(known["summary"])
            return known["result"]
        result = super().measure(when)
        texts = [text for row in result["answers"] for text in row["responses"]]
        waits = [re.search(r"\bwait\b", text, re.IGNORECASE) is not None for text in texts]
        self.summary[f"wait_{when}"] = mean(waits)
        if when == "before":
            known = {}
            for name, value in self.summary.items():
                if name.endswith("_before") or name == "k":
                    known[name] = value
            own = cache.with_name(self.folder.name + ".before")  # another run may write it as well
            own.write_text(json.dumps({"summary": known, "result": result}))
            own.replace(cache)
        return result

    def log(self, step, problems=(), rollout=None, rewards=None, *rest, **values):
        super().log(step, problems, rollout, rewards, *rest, **values)
        self.last = (rollout, rewards)
        if (step + 1) % self.arm.every == 0:
            self.look(step + 1)

    def look(self, step: int) -> None:
        if self.arm.probe:
            row = {"step": step, **self.arm.probe(self)}
            self.model.train()
            with open(self.folder / "probe.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
        self.started = time.perf_counter()  # a look is no part of the next step

    def finish(self):
        result = super().finish()
        if self.arm.after:
            (self.folder / "after.json").write_text(json.dumps(self.arm.after(self)))
        return result


def one(job) -> str | None:
    """Makes a run, in this process -> what went wrong; what it prints goes to <run>.log."""
    folder, arm, flags, commit = job
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    script = importlib.import_module(arm.script.removesuffix(".py"))
    script.Run = Watched
    Watched.arm = arm
    with open(f"{folder}.log", "w") as log, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        try:
            script.main([*flags, "--output", str(folder)])
        except (Exception, SystemExit):  # the other runs go on
            traceback.print_exc()
            return f"{arm.script} {' '.join(flags)}: see {log.name}"
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    (folder / "commit.txt").write_text(commit)
    return None


def read(folder: pathlib.Path) -> dict:
    """A finished run -> "summary", "after", "rows", "probe", "seed", "versions", "commit"."""
    config = json.loads((folder / "config.json").read_text())
    after = folder / "after.json"
    return {
        "summary": json.loads((folder / "summary.json").read_text()),
        "after": json.loads(after.read_text()) if after.exists() else {},
        "rows": read_lines(folder / "metrics.jsonl"),
        "probe": read_lines(folder / "probe.jsonl"),
        "seed": config["flags"]["seed"],
        "versions": config["versions"],
        "commit": (folder / "commit.txt").read_text(),
    }


def read_lines(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def git(*command: str) -> str:
    done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()


def runs(experiment: str, arms: dict[str, Arm], args, first: int = 0) -> dict[str, list[dict]]:
    """Makes all runs, args.workers at a time -> name -> a result per seed, in order.

    Seeds are first, first + 1, ..., args.seeds of them. args.more is added to all flags.
    """
    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--untracked-files=no", ".", ":!analysis/results"):
        commit += " with uncommitted edits"
    base = ROOT / "runs" / "analysis" / experiment
    jobs = []
    for seed in range(first, first + args.seeds):
        for name, arm in arms.items():
            flags = arm.flags.format(seed=seed, runs=base).split()
            flags += ["--seed", str(seed), *args.more.split()]
            folder = base / f"{name.replace(' ', '_').replace('/', '_')}-{seed}"
            jobs.append((folder, arm, flags, commit))
    missing = [job for job in jobs if not (job[0] / "commit.txt").exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=1) as pool:
            ends = list(tqdm(pool.imap(one, missing), experiment, total=len(missing), unit="run"))
        failed = [end for end in ends if end]
        if failed:
            raise RuntimeError("\n".join(failed))
    done = [read(folder) for folder, *_ in jobs]
    return {name: done[number::len(arms)] for number, name in enumerate(arms)}


def arguments(description: str, seeds: int, parts=("all",)) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts, help="of the page")
    parser.add_argument("--more", default="", help="flags for every run, to try a script out: "
                        "--more '--steps 2 --eval-problems 8'")
    return parser.parse_args()


class Results(dict):
    """name -> a result per seed; the readings that tables are made of, a number per seed each."""

    def summary(self, name: str, key: str) -> list[float]:
        return [result["summary"][key] for result in self[name]]

    def accuracy(self, name: str) -> list[float]:
        return self.summary(name, "avg_at_k_after")

    def pass_at(self, name: str, k: int) -> list[float]:
        return [passes[str(k)] for passes in self.summary(name, "pass_at_after")]

    def metric(self, name: str, key: str, last: int = 0) -> list[float]:
        """The mean of a metric over the last steps; 0: over all."""
        means = []
        for result in self[name]:
            rows = result["rows"][-last:]
            means.append(mean([row.get(key, 0.0) for row in rows]))
        return means

    def curves(self, name: str, key: str) -> list[list[float]]:
        """A metric by step, running means of four steps."""
        found = []
        for result in self[name]:
            found.append(plot.smooth([row[key] for row in result["rows"]], 4))
        return found

    def probes(self, name: str, reading: Callable) -> list[list[float]]:
        return [[reading(probe) for probe in result["probe"]] for result in self[name]]


def mean(values) -> float:
    return statistics.fmean(values)


def standard_error(values) -> float:
    """Of a mean over seeds; NaN for one seed."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def spread(values, digits: int = 3) -> str:
    """mean (lowest to highest)"""
    three = mean(values), min(values), max(values)
    figures = [f"{x:.{digits}f}" for x in three]
    return "{} ({} to {})".format(*figures)


def differences(a, b) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def paired(a, b, digits: int = 3) -> str:
    """Mean difference a - b of paired seeds and its standard error."""
    found = differences(a, b)
    return f"{mean(found):+.{digits}f} ± {standard_error(found):.{digits}f}"


def crossed(a: list[dict], b: list[dict]) -> float:
    """Standard error of the mean difference of two arms when seeds and problems are both drawn
    anew: of a two-way table, seeds by problems (Cameron, Gelbach and Miller's sum of variances)."""
    table = []
    for x, y in zip(a, b, strict=True):
        x_right, y_right = x["summary"]["right_after"], y["summary"]["right_after"]
        row = []
        for p, q in zip(x_right, y_right, strict=True):
            row.append((int(p) - int(q)) / 8)
        table.append(row)
    cells = [cell for row in table for cell in row]
    columns = zip(*table, strict=True)
    by_seed = standard_error([mean(row) for row in table])
    by_problem = standard_error([mean(column) for column in columns])
    variance = by_seed ** 2 + by_problem ** 2 - standard_error(cells) ** 2
    return math.sqrt(max(variance, 0.0))  # NaN for one seed


def apart(values: dict[str, list[float]], digits: int = 3) -> str:
    """Which pairs of arms, paired by seed, differ by more than two standard errors: a line."""
    pairs = list(itertools.combinations(values, 2))
    found = []
    for a, b in pairs:
        found_differences = differences(values[a], values[b])
        size = mean(found_differences)
        if abs(size) > 2 * standard_error(found_differences):
            more, less = (a, b) if size > 0 else (b, a)
            text = f"{more} minus {less} {paired(values[more], values[less], digits)}"
            found.append((abs(size), text))
    line = f"Pairs that differ by more than two standard errors: {len(found)} of {len(pairs)}"
    if found:
        line += ": " + ", ".join(text for _, text in sorted(found, reverse=True))
    return line + ".\n"


def band(axis, curves, label=None, color=None, style="-", x=None, fill=True) -> None:
    """The mean of several curves, and the range between the lowest and the highest."""
    columns = list(zip(*curves, strict=False))
    x = x or range(1, len(columns) + 1)
    means = [mean(column) for column in columns]
    axis.plot(x, means, style, color=color, linewidth=2.2, label=label)
    if fill:
        lowest = [min(column) for column in columns]
        highest = [max(column) for column in columns]
        axis.fill_between(x, lowest, highest, color=color, alpha=0.15, linewidth=0)


def tidy(axis, title, xlabel="step", legend=False) -> None:
    axis.set_title(title, fontsize=13)
    axis.set_xlabel(xlabel, fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.25)
    if legend:
        axis.legend(fontsize=9.5)


def save(figure, name: str) -> None:
    figure.savefig(PAGES / name, dpi=110)
    plt.close(figure)


def table(heads, rows) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def kept(result: dict) -> dict:
    """What the JSON keeps of a run: everything but seconds and such."""
    names = dict.fromkeys(name for row in result["rows"] for name in row)
    by_step = {}
    for name in names:
        if not name.startswith(NOT_KEPT):
            by_step[name] = [row.get(name) for row in result["rows"]]
    origin = {name: result[name] for name in ("seed", "commit", "versions")}
    summary = dict(result["summary"])
    for when in ("before", "after"):
        summary.pop(f"by_problem_{when}", None)  # right_<when> says the same in less
    return {**origin, **summary, "by_step": by_step, "probe": result["probe"],
            "at_the_end": result["after"]}


def write(name: str, results: dict, tables: dict[str, str], page: str | None = None) -> None:
    """analysis/results/<name>.json; the tables go into <page or name>.md and are printed.

    In the page a table stands between <!-- table: key --> and <!-- end -->; the words around it
    are ours.
    """
    found = {}
    for arm, seeds in results.items():
        found[arm] = [kept(result) for result in seeds]
    (PAGES / f"{name}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
    place = PAGES / f"{page or name}.md"
    text = place.read_text()
    for key, body in tables.items():
        print(f"\n{key}\n{body}")
        before, mark, rest = text.partition(f"<!-- table: {key} -->\n")
        if mark:
            text = before + mark + body + rest[rest.index("<!-- end -->"):]
    place.write_text(text)
