"""ATR-GRPO's claims on the embedded model: which gate, how wide -> docs/results/kl3_grpo.{json,md} and its figures.

    python docs/kl3_results.py             # twelve arms, five paired seeds, two at a time: 15 minutes; finished runs are kept

Every rollout is gone through four times (four updates), so that the policy leaves the one that sampled and gates act.
"""
import json
import math
import statistics

import experiment as ex
import matplotlib.pyplot as plt
import numpy as np
import torch
from experiment import BLUE, GREEN, GREY, PURPLE, SKY, VERMILION

from common.logprobs import response_logprobs
from kl3_grpo import clip_range, group_advantages

SIZE = "--lr 3e-4 --eval-problems 128 --eval-k 16 --group-size 8 --steps 16 --updates-per-rollout 1"
FOUR = SIZE + " --ppo-epochs 4"
BINS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
DELTAS = (0.02, 0.05, 0.1, 0.2)


@torch.no_grad()
def probe(run) -> dict:
    """After a step's four updates, by the old probability of its tokens: share of tokens, share outside the gate's window and
    pushed further out, and the mean change of probability where A > 0 and where A < 0."""
    if not hasattr(run, "last"):
        return {}
    rollout, rewards, cfg = *run.last[:2], run.cfg
    A = group_advantages(rewards).flatten()[:, None].expand_as(rollout.mask)           # (B, T)
    new, _ = response_logprobs(run.model, rollout)                                      # (B, T)
    keep = (rollout.mask > 0) & (A != 0)
    A, old, new = A[keep], rollout.logp[keep].exp(), new[keep].exp()                    # (N,) each
    low, high = 0.0, math.inf
    if cfg.clip_low is not None:
        low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    elif cfg.measure != "kl":
        low, high = clip_range(cfg.delta or 0.02, cfg.measure)
    outside = ((A > 0) & (new / old > high)) | ((A < 0) & (new / old < low))
    place = torch.bucketize(old, torch.tensor(BINS[1:-1]), right=True)                  # (N,)
    mean = lambda x, where: x[where].float().mean().item() if where.any() else 0.0
    return {"bins": [{"share": mean(place == b, A != 0), "outside": mean(outside, place == b),
                      "rise": mean(new - old, (place == b) & (A > 0)), "fall": mean(new - old, (place == b) & (A < 0))}
                     for b in range(len(BINS) - 1)]}


ARMS = {  # name -> script, flags, colour, line
    "none": ("kl3_grpo.py", f"{FOUR} --measure none", GREY, "-"),
    "ratio 0.02": ("kl3_grpo.py", f"{FOUR} --measure ratio --delta 0.02", BLUE, "-"),         # 1 +- 0.2
    "clip-higher": ("kl3_grpo.py", f"{FOUR} --clip-low 0.2 --clip-high 0.28", SKY, "-"),
    "kl2 0.02": ("kl3_grpo.py", f"{FOUR} --measure kl2 --delta 0.02", VERMILION, "-"),
    "kl3 0.02": ("kl3_grpo.py", f"{FOUR} --measure kl3 --delta 0.02", GREEN, "-"),
    "kl 0.02": ("kl3_grpo.py", f"{FOUR} --measure kl --delta 0.02", PURPLE, "-"),
} | {f"{measure} {delta}": ("kl3_grpo.py", f"{FOUR} --measure {measure} --delta {delta}", color, style)
     for delta, style in ((0.05, "--"), (0.1, "-."), (0.2, ":")) for measure, color in (("ratio", BLUE), ("kl3", GREEN))}
TWICE = [("none", "ratio 0.02", "accuracy"), ("kl3 0.02", "ratio 0.02", "accuracy"), ("clip-higher", "kl2 0.02", "accuracy"),
         ("kl3 0.02", "ratio 0.02", "entropy, last 4 steps"), ("kl3 0.2", "ratio 0.2", "reward, mean of all steps"),
         ("kl3 0.2", "ratio 0.2", "accuracy")]  # what is set beside the first set of runs
ONCE = {f"{measure}, one update": ("kl3_grpo.py", f"{SIZE} --steps 6 --eval-problems 0 --measure {measure}")
        for measure in ("none", "ratio", "kl2", "kl3")}


def at_accuracy(result, goal=0.5) -> float:
    """Entropy (mean of four steps) when the training reward (mean of four steps) first reaches the goal; the last if never."""
    rewards, entropies = (ex.smooth(result["rows"], key) for key in ("reward", "entropy"))
    return next((e for r, e in zip(rewards[3:], entropies[3:]) if r >= goal), entropies[-1])


def main():
    args = ex.arguments(__doc__, seeds=5)
    once = ex.runs("kl3", ONCE, 1, args.workers)
    results = ex.runs("kl3", ARMS, args.seeds, args.workers, probe=probe, every=2)
    after = lambda name, key="avg_at_k_after": [r["summary"][key] for r in results[name]]
    last = lambda name, key, n=4: [statistics.fmean(row[key] for row in r["rows"][-n:]) for r in results[name]]
    whole = lambda name, key: [statistics.fmean(row.get(key, 0.0) for row in r["rows"]) for r in results[name]]
    equal = lambda name: [at_accuracy(r) for r in results[name]]
    largest = lambda name: [max(row.get("ratio_max", 0.0) for row in r["rows"]) for r in results[name]]
    arms = ex.table(["gate", "window of the ratio", "accuracy", "minus ratio 0.02, paired", "Pass@16", "entropy, last 4 steps",
                  "entropy when reward reaches 0.5", "cut for A > 0", "cut for A < 0", "mean KL3", "largest ratio"],
                 [[name, window_of(name), ex.spread(after(name)),
                   "" if name == "ratio 0.02" else ex.paired(after(name), after("ratio 0.02")),
                   f"{statistics.fmean(r['summary']['pass_at_after']['16'] for r in results[name]):.3f}",
                   ex.spread(last(name, "entropy")), ex.spread(equal(name)),
                   *(f"{statistics.fmean(whole(name, key)):.2%}" for key in ("clip_up", "clip_down")),
                   f"{statistics.fmean(whole(name, 'kl3')):.4f}", f"{statistics.fmean(largest(name)):.1f}"] for name in ARMS])
    width = ex.table(["delta", "accuracy: kl3 minus ratio of the same width", "entropy at the last steps",
                   "entropy at equal reward", "reward, mean of all steps"],
                  [[delta, *(ex.paired(of(f"kl3 {delta}"), of(f"ratio {delta}")) for of in (
                      after, lambda n: last(n, "entropy"), equal, lambda n: whole(n, "reward")))] for delta in DELTAS])
    width += "\nAccuracy of the five gates of the usual width. " + ex.apart({name: after(name) for name in list(ARMS)[1:6]})
    binned = lambda name, b, key: [statistics.fmean(p["bins"][b][key] for p in r["probe"] if "bins" in p) for r in results[name]]
    bins = lambda name, b, key: statistics.fmean(binned(name, b, key))
    edges = [f"{low} to {high}" for low, high in zip(BINS, BINS[1:])]
    mass = ex.table(["old probability", "share of tokens", *(f"{name}: {what}" for name in ("none", "ratio 0.2", "kl3 0.2")
                                                          for what in ("outside", "change, A > 0", "A < 0")),
                  "kl3 0.2 minus ratio 0.2: change, A > 0", "A < 0"],
                 [[edge, f"{bins('ratio 0.2', b, 'share'):.1%}",
                   *(text for name in ("none", "ratio 0.2", "kl3 0.2") for text in (
                       f"{bins(name, b, 'outside'):.1%}", f"{bins(name, b, 'rise'):+.4f}", f"{bins(name, b, 'fall'):+.4f}")),
                   *(ex.paired(binned("kl3 0.2", b, key), binned("ratio 0.2", b, key), 4) for key in ("rise", "fall"))]
                  for b, edge in enumerate(edges)])
    same = {name: [(row["reward"], row["length"], row.get("loss"), row.get("grad_norm")) for row in of[0]["rows"]]
            for name, of in once.items()}
    reference = next(iter(same.values()))
    single = ex.table(["gate", "rewards, lengths, losses and gradient norms of six steps"],
                   [[name, "equal to the first line in every digit" if of == reference else "different"]
                    for name, of in same.items()])
    first = json.loads((ex.ROOT / "docs" / "results" / "kl3_first.json").read_text())
    now = {"accuracy": after, "entropy, last 4 steps": lambda n: last(n, "entropy"),
           "reward, mean of all steps": lambda n: whole(n, "reward")}
    twice = ex.table(["", "first set", "these runs", "both, ten differences"],
                     [[f"{a} minus {b}, {of}", ex.paired(first[a][of], first[b][of]), ex.paired(now[of](a), now[of](b)),
                       ex.paired(first[a][of] + now[of](a), first[b][of] + now[of](b))] for a, b, of in TWICE])
    ex.write("kl3_grpo", results, {"arms": arms, "width": width, "mass": mass, "once": single, "twice": twice})

    out = ex.ROOT / "docs" / "results"
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), constrained_layout=True)
    w = np.linspace(0.3, 2.2, 400)
    for name, color, f in (("KL3: w - 1 - log w", GREEN, w - 1 - np.log(w)), ("KL2: (log w)² / 2", VERMILION, np.log(w) ** 2 / 2),
                           ("ratio: (w - 1)² / 2", BLUE, (w - 1) ** 2 / 2), ("|KL1|: |log w|", GREY, np.abs(np.log(w)))):
        axes[0].plot(w, f, color=color, linewidth=2.2, label=name)
    for delta in DELTAS:
        axes[0].axhline(delta, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_ylim(0, 0.4)
    ex.tidy(axes[0], "what is held below delta (dotted: four deltas)", "ratio w = new / old probability", legend=True)
    looks = {"kl3": GREEN, "kl2": VERMILION, "ratio": BLUE, "abs_kl1": GREY, "kl1": GREY}
    for y, (measure, color) in enumerate(reversed(looks.items())):
        for delta, height in ((0.2, 0.16), (0.02, 0.34)):
            low, high = clip_range(delta, measure)
            axes[1].barh(y, min(high, 2.2) - low, left=low, height=height, color=color, alpha=0.45 if delta == 0.2 else 1)
            if high > 2.2:
                axes[1].text(2.22, y, "open", va="center")
    axes[1].barh(-1, 0.48, left=0.8, height=0.34, color=SKY)
    axes[1].axvline(1, color="black", linewidth=0.8)
    axes[1].set_xlim(0.3, 2.45)
    axes[1].set_yticks(range(-1, 5), ["clip-higher", *reversed(looks)])
    ex.tidy(axes[1], "the windows: delta 0.02 (thick) and 0.2 (thin)", "ratio w")
    figure.savefig(out / "kl3_windows.png", dpi=110)

    figure, rows = plt.subplots(2, 2, figsize=(12, 7.6), constrained_layout=True)
    for axes, names in zip(rows, (list(ARMS)[:6], [f"{m} {d}" for d in DELTAS[1:] for m in ("ratio", "kl3")])):
        for axis, key, title in zip(axes, ("reward", "entropy"), ("share of answers right", "entropy, nats per token")):
            for name in names:
                ex.band(axis, [ex.smooth(r["rows"], key) for r in results[name]], name, ARMS[name][2], ARMS[name][3], fill=False)
            ex.tidy(axis, title, legend=key == "reward")
    figure.savefig(out / "kl3_curves.png", dpi=110)

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, of, title in zip(axes, (after, equal, lambda n: last(n, "entropy")),
                               ("accuracy", "entropy at equal reward, nats", "entropy at the last steps, nats")):
        for x, delta in enumerate(DELTAS):
            differences = [a - b for a, b in zip(of(f"kl3 {delta}"), of(f"ratio {delta}"))]
            axis.plot([x] * len(differences), differences, "o", color=GREEN, alpha=0.45)
            error = statistics.stdev(differences) / len(differences) ** 0.5
            axis.errorbar(x + 0.15, statistics.fmean(differences), error, fmt="s", color="black", capsize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(DELTAS)), DELTAS)
        ex.tidy(axis, title, "delta")
    figure.suptitle("KL3 minus ratio of the same width: five paired seeds, mean with its standard error", fontsize=14)
    figure.savefig(out / "kl3_width.png", dpi=110)


def window_of(name: str) -> str:
    """The two clip bounds of an arm."""
    if name == "clip-higher":
        return "0.800 to 1.280"
    measure, _, delta = name.partition(" ")
    if measure == "kl":
        return "none: a predicate"
    return "{:.3f} to {:.3f}".format(*clip_range(float(delta or 0), measure))


if __name__ == "__main__":
    main()
