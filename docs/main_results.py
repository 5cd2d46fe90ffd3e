"""The README's table and figure: grpo.py and bupo.py on the embedded model, several seeds -> docs/results/main.{json,md,png}.

    python docs/main_results.py            # three seeds of two scripts, about a minute and a half each; finished runs are kept
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
ARMS = {"GRPO": ("grpo.py", "#0072B2"), "BuPO": ("bupo.py", "#D55E00")}


def run(script: str, seed: int, folder: pathlib.Path, more: list[str] = ()) -> tuple[dict, list[dict]]:
    """One run with default flags and `more`, evaluated on 256 problems -> its summary and its rows."""
    if not (folder / "summary.json").exists() or "seconds" not in json.loads((folder / "summary.json").read_text()):
        flags = ["--seed", str(seed), "--eval-problems", "256", "--output", str(folder), *more]
        subprocess.run([sys.executable, ROOT / script, *flags], check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        (folder / "commit.txt").write_text(commit)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {**summary, "seed": seed, "commit": (folder / "commit.txt").read_text()}, rows


def spread(values) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "main")
    args = parser.parse_args()
    results = {name: [run(script, seed, args.runs / f"{name}-{seed}") for seed in range(args.seeds)]
               for name, (script, _) in ARMS.items()}

    out = ROOT / "docs" / "results"
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((args.runs / "GRPO-0" / "config.json").read_text())
    (out / "main.json").write_text(json.dumps({"versions": config["versions"], "runs": {
        name: [summary for summary, _ in runs] for name, runs in results.items()}}, indent=1) + "\n")

    heads = ["method", "accuracy before", "after", "tokens before", "after", "Pass@8 after", "s sampling / verifying / training"]
    table = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, runs in results.items():
        of = lambda key: spread([summary[key] for summary, _ in runs])  # noqa: B023
        tokens = lambda key: f"{statistics.fmean(summary[key] for summary, _ in runs):.0f}"  # noqa: B023
        pass8 = spread([summary["pass_at_after"]["8"] for summary, _ in runs])
        seconds = " / ".join(f"{statistics.median(row[f'seconds_{part}'] for _, rows in runs for row in rows):.2f}"
                             for part in ("sampling", "verifying", "training"))
        table.append(f"| {name} | {of('avg_at_k_before')} | {of('avg_at_k_after')} | {tokens('length_before')} | "
                     f"{tokens('length_after')} | {pass8} | {seconds} |")
    error = statistics.fmean(summary["standard_error_after"] for runs in results.values() for summary, _ in runs)
    table.append(f"\nAvg@8 at temperature 1 on 256 held-out problems, mean of {args.seeds} seeds (lowest to highest); "
                 f"one run's standard error over problems is {error:.3f}. Seconds are medians.")
    training = [[row["seconds_training"] for _, rows in results["BuPO"] for row in rows if (row["layer"] is None) == whole]
                for whole in (False, True)]
    table[-1] += " BuPO's training takes {:.2f} s in the first phase, {:.2f} s after.".format(*map(statistics.median, training))
    (out / "main.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    titles = {"reward": "share of answers right", "length": "tokens per answer", "entropy": "entropy, nats per token"}
    for axis, (key, title) in zip(axes, titles.items()):
        for name, runs in results.items():
            curves = [[statistics.fmean(row[key] for row in rows[max(0, i - 3):i + 1]) for i in range(len(rows))]
                      for _, rows in runs]                                                    # means of four steps
            steps, columns, color = range(1, len(curves[0]) + 1), list(zip(*curves)), ARMS[name][1]
            axis.plot(steps, [statistics.fmean(c) for c in columns], color=color, linewidth=2.5, label=name)
            axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.2, linewidth=0)
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step (8 problems x 16 answers)", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=12)
    figure.savefig(out / "main.png", dpi=110)


if __name__ == "__main__":
    main()
