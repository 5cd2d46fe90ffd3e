"""BuPO's claims on the embedded model: first phase, layer, baselines -> docs/results/bupo.{json,png} and bupo_table.md.

    python docs/bupo_results.py            # nine arms, three seeds, two runs at a time: about 20 minutes; finished runs are kept
"""
import argparse
import json
import pathlib
import statistics
from concurrent.futures import ThreadPoolExecutor

import matplotlib
from main_results import ROOT, run, spread
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ARMS = {  # name -> script, flags, colour, line
    "GRPO": ("grpo.py", "", "#0072B2", "-"),
    "RLOO": ("grpo.py", "--advantage rloo", "#56B4E9", "-"),
    "REINFORCE++": ("grpo.py", "--advantage reinforce++", "#999999", "-"),
    "BuPO": ("bupo.py", "", "#D55E00", "-"),                                       # 3 of 32 steps, a tenth
    "BuPO 5 steps": ("bupo.py", "--internal-steps 5", "#D55E00", "--"),            # 16 %; the paper: 50 of 300
    "BuPO 7 steps": ("bupo.py", "--internal-steps 7", "#D55E00", ":"),             # 22 %; the paper: 70 of 300
    "layer 2 only": ("bupo.py", "--layer 2 --internal-steps 32", "#009E73", ":"),
    "layer 5 only": ("bupo.py", "--layer 5 --internal-steps 32", "#009E73", "--"),
    "layer 7 only": ("bupo.py", "--layer 7 --internal-steps 32", "#009E73", "-"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time; each takes one core")
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "main", help="shared with main_results.py")
    args = parser.parse_args()
    jobs = [(name, seed) for seed in range(args.seeds) for name in ARMS]

    def job(pair):
        name, seed = pair
        script, flags, *_ = ARMS[name]
        return run(script, seed, args.runs / f"{name.replace(' ', '_')}-{seed}", flags.split())

    with ThreadPoolExecutor(args.workers) as pool:
        done = dict(zip(jobs, tqdm(pool.map(job, jobs), total=len(jobs), unit="run")))
    results = {name: [done[name, seed] for seed in range(args.seeds)] for name in ARMS}

    out = ROOT / "docs" / "results"
    summaries = {name: [summary for summary, _ in runs] for name, runs in results.items()}
    (out / "bupo.json").write_text(json.dumps(summaries, indent=1) + "\n")
    heads = ["arm", "flags", "accuracy after", "Pass@8 after", "tokens", "entropy, last 4 steps", "most truncated in a step"]
    table = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, runs in results.items():
        script, flags, *_ = ARMS[name]
        last = [statistics.fmean(row["entropy"] for row in rows[-4:]) for _, rows in runs]
        worst = max(row["truncated"] for _, rows in runs for row in rows)
        table.append(f"| {name} | `{script} {flags}` | {spread([s['avg_at_k_after'] for s, _ in runs])} | "
                     f"{spread([s['pass_at_after']['8'] for s, _ in runs])} | "
                     f"{statistics.fmean(s['length_after'] for s, _ in runs):.0f} | {spread(last)} | {worst:.0%} |")
    (out / "bupo_table.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    titles = {"reward": "share of answers right", "length": "tokens per answer", "entropy": "entropy, nats per token"}
    for axis, (key, title) in zip(axes, titles.items()):
        for name, runs in results.items():
            columns = list(zip(*[[statistics.fmean(row[key] for row in rows[max(0, i - 3):i + 1]) for i in range(len(rows))]
                                 for _, rows in runs]))
            axis.plot(range(1, len(columns) + 1), [statistics.fmean(c) for c in columns], ARMS[name][3], color=ARMS[name][2],
                      linewidth=2.2, label=name)
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=9.5, loc="center right", bbox_to_anchor=(1.0, 0.31))
    figure.savefig(out / "bupo.png", dpi=110)


if __name__ == "__main__":
    main()
