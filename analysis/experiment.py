"""What the docs/*_results.py stand on: runs of the algorithm files as they are, several at a time, watched from outside.

    results = runs("bupo", {"GRPO": ("grpo.py", "--steps 32")}, seeds=5, workers=2)     # -> {"GRPO": [a dict a seed]}

A run lives in runs/docs/<experiment>/<arm>-<seed>; one that is finished is read, not repeated, so a stopped experiment goes on.
"""
import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import pathlib
import shutil
import statistics
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common.run  # noqa: E402

BLUE, SKY, ORANGE, VERMILION, GREEN, PURPLE, GREY = "#0072B2 #56B4E9 #E69F00 #D55E00 #009E73 #CC79A7 #777777".split()


class Watched(common.run.Run):
    """A run that is looked at every few steps; the model before training is evaluated once for all runs of an experiment."""
    probe, every, prepare, after = None, 4, None, None

    def attach(self, name, part):
        return super().attach(name, self.prepare(self, part) if self.prepare and name == "optimizer" else part)

    def look(self, step):
        was = self.model.training
        row = {"step": step, **self.probe(self)}
        self.model.train(was)
        with open(self.folder / "probe.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def measure(self, when):
        if when == "before" and self.probe:
            self.look(0)
        cfg = self.cfg
        name = cfg.model.strip("/").replace("/", "_")
        cache = self.folder.parent / f"before-{name[-80:]}-{cfg.eval_problems}x{cfg.eval_k}-{cfg.max_new_tokens}.json"
        if when == "before" and cache.exists():
            self.summary |= json.loads(cache.read_text())
            return None
        result = super().measure(when)
        if when == "before":
            known = {key: value for key, value in self.summary.items() if key.endswith("_before") or key == "k"}
            common.run.write_atomically(cache, json.dumps(known))
        return result

    def finish(self):
        super().finish()
        if self.after:
            (self.folder / "after.json").write_text(json.dumps(self.after(self)))

    def log(self, *args, **values):
        super().log(*args, **values)
        self.last = args
        if self.probe and (self.step + 1) % self.every == 0:
            self.look(self.step + 1)


def one(job):
    """One run in this process; what it prints goes to <run>.log. probe(run) -> dict is called every few steps, after(run) -> dict
    at the end, prepare(run, optimizer) -> optimizer before the first step."""
    folder, script, flags, watch, commit = job
    if not (folder / "commit.txt").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        common.run.Run = type("Watched", (Watched,), {k: staticmethod(v) if callable(v) else v for k, v in watch.items()})
        with open(f"{folder}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                importlib.import_module(script.removesuffix(".py")).main([*flags, "--output", str(folder)])
            except SystemExit as error:
                raise RuntimeError(f"{script} {' '.join(flags)}: see {log.name}") from error
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        (folder / "commit.txt").write_text(commit)
    read = lambda name, default: (folder / name).read_text() if (folder / name).exists() else default
    rows, probes = ([json.loads(line) for line in read(name, "").splitlines()] for name in ("metrics.jsonl", "probe.jsonl"))
    config = json.loads(read("config.json", ""))
    return {"summary": json.loads(read("summary.json", "{}")), "after": json.loads(read("after.json", "{}")), "rows": rows,
            "probe": probes, "seed": config["flags"]["seed"], "versions": config["versions"], "commit": read("commit.txt", "")}


def runs(experiment: str, arms: dict, seeds: int, workers: int = 2, first: int = 0, **watch) -> dict[str, list[dict]]:
    """arms: name -> (script, flags, ...), {seed} and {runs} filled in; seeds first, first + 1, .... watch: probe, every, after,
    prepare, for all; an arm's own come in a dict as its last element. -> name -> a result a seed, in order."""
    git = lambda *command: subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    edited = " with uncommitted edits" if git("status", "--porcelain", "--untracked-files=no", ".", ":!docs/results") else ""
    commit, base, jobs = git("rev-parse", "--short", "HEAD") + edited, ROOT / "runs" / "docs" / experiment, []
    for seed in range(first, first + seeds):
        for name, arm in arms.items():
            own = arm[-1] if isinstance(arm[-1], dict) else {}
            flags = arm[1].format(seed=seed, runs=base).split() + ["--seed", str(seed)]
            jobs.append((base / f"{name.replace(' ', '_').replace('/', '_')}-{seed}", arm[0], flags, {**watch, **own}, commit))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = list(tqdm(pool.imap(one, jobs), total=len(jobs), desc=experiment, unit="run"))
    return {name: done[i::len(arms)] for i, name in enumerate(arms)}


def arguments(description: str, seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; each takes one core")
    return parser.parse_args()


def spread(values, digits=3) -> str:
    """mean (lowest to highest)"""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(statistics.fmean(values), min(values), max(values), d=digits)


def paired(a, b, digits=3) -> str:
    """Mean difference a - b of paired seeds and its standard error."""
    differences = [x - y for x, y in zip(a, b)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return f"{statistics.fmean(differences):+.{digits}f} ± {error:.{digits}f}"


def apart(values: dict[str, list[float]], digits=3) -> str:
    """Which of all pairs of arms, paired by seed, differ by more than two standard errors: a line of text."""
    pairs = list(itertools.combinations(values, 2))
    found = []
    for a, b in pairs:
        differences = [x - y for x, y in zip(values[a], values[b])]
        mean, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
        if abs(mean) > 2 * error:
            first, second = (a, b) if mean > 0 else (b, a)
            found.append((abs(mean), f"{first} minus {second} {paired(values[first], values[second], digits)}"))
    return f"Pairs that differ by more than two standard errors: {len(found)} of {len(pairs)}" + (
        ": " + ", ".join(text for _, text in sorted(found, reverse=True)) if found else "") + ".\n"


def smooth(rows, key, width=4) -> list[float]:
    """Running mean of the last `width` values of a metric."""
    values = [row[key] for row in rows]
    return [statistics.fmean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]


def band(axis, curves, label=None, color=None, style="-", x=None, fill=True) -> None:
    """The mean of several curves, and the range between the lowest and the highest."""
    columns = list(zip(*curves))
    x = x or range(1, len(columns) + 1)
    axis.plot(x, [statistics.fmean(c) for c in columns], style, color=color, linewidth=2.2, label=label)
    if fill:
        axis.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, linewidth=0)


def tidy(axis, title, xlabel="step", legend=False) -> None:
    axis.set_title(title, fontsize=13)
    axis.set_xlabel(xlabel, fontsize=12)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.25)
    if legend:
        axis.legend(fontsize=9.5)


def table(heads, rows) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def write(name: str, results: dict, tables: dict[str, str]) -> None:
    """docs/results/<name>.json with every run's seed, commit, versions, summary and metrics by step, but for seconds and such;
    tables go into <name>.md, and are printed.

    In the Markdown file a table stands between <!-- table: key --> and <!-- end -->; the words around it are ours.
    """
    out = ROOT / "docs" / "results"
    of_the_machine = ("step", "tokens", "peak_gb", "gap_", "seconds_")
    by_step = lambda rows: {key: [row.get(key) for row in rows] for key in {key: 0 for row in rows for key in row}
                            if not key.startswith(of_the_machine)}
    kept = {arm: [{"seed": r["seed"], "commit": r["commit"], "versions": r["versions"], **r["summary"],
                   "by_step": by_step(r["rows"]), "probe": r["probe"], "at_the_end": r["after"]} for r in of]
            for arm, of in results.items()}
    (out / f"{name}.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    page = out / f"{name}.md"
    text = page.read_text() if page.exists() else "".join(f"<!-- table: {key} -->\n<!-- end -->\n\n" for key in tables)
    for key, body in tables.items():
        print(f"\n{key}\n{body}")
        before, mark, rest = text.partition(f"<!-- table: {key} -->\n")
        text = before + mark + body + rest[rest.index("<!-- end -->"):] if mark else text
    page.write_text(text)
