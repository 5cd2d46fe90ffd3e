"""The README's figure and first table: grpo.py and bupo.py on the embedded model -> docs/results/main.{md,png}.

    python docs/main_results.py            # reads two arms of bupo_results.py, or runs them: ten runs, a minute and a half each
"""
import statistics

import matplotlib.pyplot as plt
from bupo_results import ARMS
from experiment import ROOT, arguments, band, paired, runs, smooth, spread, table, tidy


def main():
    args = arguments(__doc__, seeds=5)
    results = runs("bupo", {name: ARMS[name] for name in ("GRPO", "BuPO")}, args.seeds, args.workers)
    of = lambda name, key: [r["summary"][key] for r in results[name]]
    tokens = lambda name: " → ".join(f"{statistics.fmean(of(name, f'length_{when}')):.0f}" for when in ("before", "after"))
    pass_at = lambda name, k: spread([summary[str(k)] for summary in of(name, "pass_at_after")])
    rows = [[name, f"{of(name, 'avg_at_k_before')[0]:.3f}", spread(of(name, "avg_at_k_after")), tokens(name), pass_at(name, 8)]
            for name in results]
    text = table(["method", "accuracy before", "after", "tokens per answer", "Pass@8 after"], rows)
    error = statistics.fmean(x for name in results for x in of(name, "standard_error_after"))
    text += (f"\nMean of 64 answers at temperature 1 to each of 128 held-out problems; {args.seeds} seeds, mean (lowest to "
             f"highest). One run's standard error over problems is {error:.3f}. BuPO minus GRPO, paired by seed: "
             f"{paired(of('BuPO', 'avg_at_k_after'), of('GRPO', 'avg_at_k_after'))}.\n")
    print(text)
    out = ROOT / "docs" / "results"
    (out / "main.md").write_text(text)

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    titles = {"reward": "share of answers right", "length": "tokens per answer", "entropy": "entropy, nats per token"}
    for axis, (key, title) in zip(axes, titles.items()):
        for name in results:
            band(axis, [smooth(r["rows"], key) for r in results[name]], name, ARMS[name][2])
        tidy(axis, title, "step (8 problems x 16 answers)", legend=key == "reward")
    figure.savefig(out / "main.png", dpi=110)


if __name__ == "__main__":
    main()
