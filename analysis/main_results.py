"""All methods side by side on the embedded model -> docs/results/main.{json,md,png}, the README's first figure and its table.

    python docs/main_results.py            # eleven methods, five seeds, two runs at a time: 40 minutes; finished runs are kept

4,096 answers a run, the teacher's among them, where a method has no number of its own (one-shot EM: ten updates of 64 answers;
fine-tuning: 2,048 answers of a teacher). Every run starts from the same model.
"""
import json
import statistics

import experiment as ex
import matplotlib.pyplot as plt

from common.plot import COLOURS

EVAL = "--eval-problems 128 --eval-k 64"
ARMS = {  # name -> script, flags, line, answers drawn, labels read
    "GRPO": ("grpo.py", EVAL, "-", 4096, 256),
    "RLOO": ("grpo.py", f"{EVAL} --advantage rloo", "--", 4096, 256),
    "REINFORCE++": ("grpo.py", f"{EVAL} --advantage reinforce++", "-.", 4096, 256),
    "Dr. GRPO": ("grpo.py", f"{EVAL} --advantage dr_grpo --aggregation constant", ":", 4096, 256),
    "PPO": ("ppo.py", EVAL, "-", 4096, 256),
    "BuPO": ("bupo.py", EVAL, "-", 4096, 256),
    "ATR-GRPO": ("kl3_grpo.py", EVAL, "-", 4096, 256),
    "one-shot EM": ("entropy_min.py", EVAL, "-", 640, 0),
    "long-CoT SFT": ("long_cot_sft.py", f"{EVAL} --max-new-tokens 112", "-", 2048, 256),
}
SECOND = {  # from another's model
    "EM, then GRPO": ("grpo.py", f"{EVAL} --steps 27 --model {{runs}}/one-shot_EM-{{seed}}/model", "--", 4096, 216),
    "SFT, then PPO": ("ppo.py", f"{EVAL} --steps 16 --max-new-tokens 112 --model {{runs}}/long-CoT_SFT-{{seed}}/model", "--",
                      4096, 384),
}


def main():
    args = ex.arguments(__doc__, seeds=5)
    results = ex.runs("main", ARMS, args.seeds, args.workers) | ex.runs("main", SECOND, args.seeds, args.workers)
    arms = ARMS | SECOND
    of = lambda name, key: [r["summary"][key] for r in results[name]]
    mean = lambda name, key: statistics.fmean(of(name, key))
    accuracy = lambda name: of(name, "avg_at_k_after")
    entropy = lambda name: statistics.fmean(row["entropy"] for r in results[name] for row in r["rows"][-4:])
    first = {"EM, then GRPO": "one-shot EM", "SFT, then PPO": "long-CoT SFT"}  # whose seconds count too
    deviation = lambda values: statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    figures = (statistics.fmean, deviation, min, max)
    spread = lambda values: "{:.3f} ± {:.3f} ({:.3f} to {:.3f})".format(*(f(values) for f in figures))
    rows = [[name, spread(accuracy(name)), "" if name == "GRPO" else ex.paired(accuracy(name), accuracy("GRPO")),
             f"{statistics.fmean(s['64'] for s in of(name, 'pass_at_after')):.3f}", f"{mean(name, 'length_after'):.0f}",
             f"{entropy(name):.3f}", f"{mean(name, 'seconds') + (mean(first[name], 'seconds') if name in first else 0):.0f}",
             *arms[name][3:]] for name in arms]
    error = statistics.fmean(x for name in arms for x in of(name, "standard_error_after"))
    before = of("GRPO", "avg_at_k_before")[0], of("GRPO", "pass_at_before")[0]["64"], of("GRPO", "length_before")[0]
    heads = ["method", "Avg@64", "minus GRPO, paired", "Pass@64", "tokens", "entropy", "seconds", "answers drawn", "labels"]
    text = ex.table(heads, [["before", f"{before[0]:.3f}", "", f"{before[1]:.3f}", f"{before[2]:.0f}", "", "", "", ""], *rows])
    text += ("\nAvg@64: mean of 64 answers at temperature 1 to each of 128 held-out problems, what Avg@8 estimates with more "
             f"noise; mean of {args.seeds} seeds ± its standard error (lowest to highest seed). All have the same problems; "
             f"one run's standard error over problems is {error:.3f}. Entropy: nats a token, last 4 steps "
             "(of the teacher's tokens for SFT). Seconds: of one core while another run has the other, evaluation included.\n")
    earlier = {name: [r["avg_at_k_after"] for r in of] for name, of in
               json.loads((ex.ROOT / "docs" / "results" / "bupo.json").read_text()).items()}
    twice = ex.table(["BuPO minus", "these seeds", "those of bupo.md", "all"], [
        [rival, ex.paired(accuracy("BuPO"), accuracy(rival)), ex.paired(earlier["BuPO"], earlier[rival]),
         ex.paired(accuracy("BuPO") + earlier["BuPO"], accuracy(rival) + earlier[rival])]
        for rival in ("GRPO", "RLOO", "REINFORCE++")])
    ex.write("main", results, {"all": text, "twice": twice})

    figure, axes = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True, width_ratios=(1.2, 1))
    color = lambda name: COLOURS[arms[first.get(name, name)][0][:-3]]
    for name, (_, _, style, *_) in arms.items():
        if "reward" in results[name][0]["rows"][0]:
            start = arms[first[name]][3] if name in first else 0
            curves = [ex.smooth(r["rows"], "reward") for r in results[name]]
            x = [start + 128 * (i + 1) for i in range(len(curves[0]))]
            ex.band(axes[0], curves, name, color(name), style, x=x, fill=style == "-")
    ex.tidy(axes[0], "share of sampled answers that are right (mean of four steps)", "answers drawn", legend=True)
    names = sorted(arms, key=lambda name: statistics.fmean(accuracy(name)))
    for y, name in enumerate(names):
        axes[1].barh(y, statistics.fmean(accuracy(name)), color=color(name), alpha=0.75 if arms[name][2] == "-" else 0.35)
        axes[1].plot(accuracy(name), [y] * args.seeds, "o", color="black", markersize=4)
    axes[1].axvline(before[0], color="black", linestyle=":", linewidth=1.5)
    axes[1].annotate(" before", (before[0], len(names) - 0.45), fontsize=11)
    axes[1].set_yticks(range(len(names)), names, fontsize=12)
    ex.tidy(axes[1], "held-out accuracy: mean and every seed", "mean of 64 answers at temperature 1")
    axes[1].tick_params(axis="y", labelsize=12)
    figure.savefig(ex.ROOT / "docs" / "results" / "main.png", dpi=110)


if __name__ == "__main__":
    main()
