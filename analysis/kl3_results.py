"""ATR-GRPO's claims on the embedded model: which gate, how wide -> results/kl3_grpo.{json,md}.

    python -m analysis.kl3_results                      # 16 gates, five paired seeds: 40 minutes
    python -m analysis.kl3_results --parts acting --seeds 3     # where a gate acts, 20 minutes

Every rollout makes four updates, each on its share of the problems. In the part "acting" the model
is less certain of its tokens and every rollout is gone through four times, so that the policy
leaves the one that sampled and gates act. Accuracy: 8 answers to each of 1,024 held-out problems.
"""
import math
from functools import partial

import numpy as np
import torch

import kl3_grpo
from analysis import experiment as ex
from analysis import internal
from analysis.experiment import BLUE, GREEN, GREY, Arm, mean
from common.data import batch_of
from common.logprobs import response_logprobs
from common.models import load_model, load_tokenizer
from common.sampling import sample
from kl3_grpo import clip_range, group_advantages

SIZE = "--lr 3e-4 --eval-problems 1024 --group-size 8 --steps 16"
NO_GATE = "--delta 1e9"
PASSES = 4
SOFTER = 1.5  # what divides the logits of the less certain model
ACTING_SIZE = f"{SIZE} --updates-per-rollout {2 * PASSES} --model {{runs}}/softer"
KL_MEASURES = ("kl3", "kl2", "kl1", "abs_kl1")
BINS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
DELTAS = (0.02, 0.05, 0.1, 0.2)
TITLES = {
    "reward": "share of sampled answers that are right",
    "entropy": "entropy, nats per token",
}


def mean_where(x, where) -> float:
    """The mean of x (N,) where a condition (N,) holds; 0 where it never does."""
    return x[where].float().mean().item() if where.any() else 0.0


@torch.no_grad()
def probe(run) -> dict:
    """After the updates of a step, by the old probability of its tokens: share of tokens, share
    outside the window and pushed further out, mean change of probability where A > 0, A < 0."""
    if not hasattr(run, "last"):
        return {}
    rollout, rewards = run.last
    A = group_advantages(rewards).flatten()                                     # (B,)
    A = A[:, None].expand_as(rollout.mask)                                      # (B, T)
    new_logp = response_logprobs(run.model, rollout)                            # (B, T)
    inside = (rollout.mask > 0) & (A != 0)
    A = A[inside]                                                               # (N,)
    old, new = rollout.logp[inside].exp(), new_logp[inside].exp()               # (N,) each
    low, high = clip_range(run.args.delta, run.args.measure)
    outside = ((A > 0) & (new / old > high)) | ((A < 0) & (new / old < low))    # (N,)
    place = torch.bucketize(old, torch.tensor(BINS[1:-1]), right=True)          # (N,)
    found = []
    for number in range(len(BINS) - 1):
        here = place == number                                                  # (N,)
        found.append({
            "share": here.float().mean().item(),
            "outside": mean_where(outside, here),
            "rise": mean_where(new - old, here & (A > 0)),
            "fall": mean_where(new - old, here & (A < 0)),
        })
    return {"bins": found}


def four_passes(run, _optimizer) -> None:
    """Every rollout is gone through four times, in halves: its rows four times over, eight updates,
    two of them to a pass."""
    def batch_four_times(*args, **kwargs):
        return batch_of(*args, **kwargs) * PASSES

    def sample_once(model, tokenizer, prompts, *args, **kwargs):
        rollout = sample(model, tokenizer, prompts[:len(prompts) // PASSES], *args, **kwargs)
        rows = torch.arange(len(rollout.texts))
        return rollout[rows.repeat(PASSES)]

    kl3_grpo.batch_of = batch_four_times
    kl3_grpo.sample = sample_once


def gate(flags: str, color=GREY, style="-") -> Arm:
    return Arm("kl3_grpo.py", f"{SIZE} {flags}", color, style, probe, every=2)


ARMS = {"none": gate(NO_GATE), "kl2 0.02": gate("--measure kl2 --delta 0.02", GREEN, "--")}
for delta in DELTAS:
    for measure, color in (("ratio", BLUE), ("kl3", GREEN)):
        ARMS[f"{measure} {delta}"] = gate(f"--measure {measure} --delta {delta}", color)


def acting_gate(flags: str, color) -> Arm:
    return Arm("kl3_grpo.py", f"{ACTING_SIZE} {flags}", color, "-", probe, prepare=four_passes)


ACTING = {"none": acting_gate(NO_GATE, GREY), "ratio 0.02": acting_gate("--measure ratio", BLUE)}
for measure in KL_MEASURES:
    ACTING[f"{measure} 0.02"] = acting_gate(f"--measure {measure}", GREEN)


def label(name: str) -> str:
    """An arm's name as pages and figures write it."""
    return name.replace("none", "no gate").replace("abs_", "abs ").replace("kl", "KL")


def equal_reward(results, name: str, goal: float = 0.5) -> list[float]:
    """Entropy (mean of four steps) when the reward (mean of four steps) first reaches the goal;
    the last one if it never does."""
    found = []
    rewards = results.curves(name, "reward")
    entropies = results.curves(name, "entropy")
    for reward, entropy in zip(rewards, entropies, strict=True):
        reached = [e for r, e in zip(reward[3:], entropy[3:], strict=True) if r >= goal]
        found.append(reached[0] if reached else entropy[-1])
    return found


def window_of(name: str) -> str:
    """The two clip bounds of an arm."""
    if name == "none":
        return "0 to inf"
    measure, delta = name.split()
    low, high = clip_range(float(delta), measure)
    return f"{low:.3f} to {high:.3f}"


def arms_table(results) -> str:
    heads = ["gate", "window of the ratio", "accuracy", "minus ratio 0.02, paired", "Pass@8",
             "entropy, last 4 steps", "entropy when reward reaches 0.5", "cut for A > 0",
             "cut for A < 0", "mean KL3"]
    usual = results.accuracy("ratio 0.02")
    rows = []
    for name in ARMS:
        values = results.accuracy(name)
        rows.append([
            label(name),
            window_of(name),
            ex.spread(values),
            "" if name == "ratio 0.02" else ex.paired(values, usual),
            f"{mean(results.pass_at(name, 8)):.3f}",
            ex.spread(results.metric(name, "entropy", last=4)),
            ex.spread(equal_reward(results, name)),
            f"{mean(results.metric(name, 'clip_up')):.2%}",
            f"{mean(results.metric(name, 'clip_down')):.2%}",
            f"{mean(results.metric(name, 'kl3')):.4f}",
        ])
    return ex.table(heads, rows)


def write_softer() -> None:
    """The embedded model with its logits divided by SOFTER, so less certain of its tokens."""
    model = load_model(internal.Args(device="cpu"), trained=False)
    model.lm_head.weight.div_(SOFTER)
    place = ex.ROOT / "runs" / "analysis" / "kl3_acting" / "softer"
    model.save_pretrained(place)
    load_tokenizer("tiny").save_pretrained(place)


def certain(results, name: str, first: bool) -> float:
    """Share of sampled tokens of probability above 0.9, at the first or last look; NaN if none."""
    looks = []
    for result in results[name]:
        bins = [look["bins"] for look in result["probe"] if "bins" in look]
        if bins:
            looks.append(bins[0 if first else -1][-1]["share"])
    return mean(looks) if looks else math.nan


def acting_table(results) -> str:
    heads = ["gate", "window of the ratio", "accuracy", "minus no gate", "minus ratio 0.02",
             "reward", "entropy, last 4 steps", "cut for A > 0", "cut for A < 0"]
    rows = []
    for name in ACTING:
        values = results.accuracy(name)
        row = [label(name), window_of(name), ex.spread(values)]
        for other in ("none", "ratio 0.02"):
            difference = ""
            if name != other:
                error = ex.crossed(results[name], results[other])
                difference = f"{ex.paired(values, results.accuracy(other))} ({error:.3f})"
            row.append(difference)
        rows.append([
            *row,
            ex.spread(results.metric(name, "reward")),
            ex.spread(results.metric(name, "entropy", last=4)),
            f"{mean(results.metric(name, 'clip_up')):.2%}",
            f"{mean(results.metric(name, 'clip_down')):.2%}",
        ])
    before = results["none"][0]["summary"]["avg_at_k_before"]
    usual = {label(name): results.accuracy(name) for name in ACTING}
    return ex.table(heads, rows) + (
        f"\nBefore: {before:.3f}. Reward: mean of all rollouts. Cut: share of the tokens of all "
        f"updates. Tokens of probability above 0.9: {certain(results, 'ratio 0.02', True):.0%} "
        f"at the first look, {certain(results, 'ratio 0.02', False):.0%} at the last. Errors over "
        "seeds (in brackets: with the problems drawn anew as well). " + ex.apart(usual))


def pair_table(results) -> str:
    """KL3 and the ratio of its width where they act, with two more seeds. A run's end is one
    moment of a policy that swings from rollout to rollout, so the rewards stand beside it."""
    heads = ["seed", "accuracy at the end: KL3 0.02", "ratio 0.02", "difference",
             "reward, mean of all rollouts: KL3 0.02", "ratio 0.02", "difference"]
    columns = []
    differences = []
    for reading in (results.accuracy, partial(results.metric, key="reward")):
        kl3, ratio = reading("kl3 0.02"), reading("ratio 0.02")
        columns += [kl3, ratio, ex.differences(kl3, ratio)]
        differences.append(ex.paired(kl3, ratio))
    rows = []
    for seed, values in enumerate(zip(*columns, strict=True)):
        rows.append([seed, *(f"{value:.3f}" for value in values)])
    means = [f"{mean(column):.3f}" for column in columns]
    means[2], means[5] = differences
    rows.append(["all", *means])
    return ex.table(heads, rows)


def readings(results, name: str) -> list[list[float]]:
    """What KL3 and the ratio of the same width are compared by, a number per seed each."""
    return [
        results.accuracy(name),
        results.metric(name, "entropy", last=4),
        equal_reward(results, name),
        results.metric(name, "reward"),
    ]


def width_table(results) -> str:
    heads = ["delta", "accuracy: KL3 minus ratio of the same width", "entropy at the last steps",
             "entropy at equal reward", "reward, mean of all steps"]
    rows = []
    for delta in DELTAS:
        kl3 = readings(results, f"kl3 {delta}")
        ratio = readings(results, f"ratio {delta}")
        pairs = zip(kl3, ratio, strict=True)
        rows.append([delta, *(ex.paired(a, b) for a, b in pairs)])
    usual = {label(name): results.accuracy(name) for name in ARMS if name.endswith(" 0.02")}
    line = "\nAccuracy of the three gates of the usual width. "
    return ex.table(heads, rows) + line + ex.apart(usual)


def binned(results, name: str, number: int, key: str) -> list[float]:
    """A reading of one bin, the mean over a run's probes, by seed."""
    found = []
    for result in results[name]:
        looks = [look["bins"][number][key] for look in result["probe"] if "bins" in look]
        found.append(mean(looks))
    return found


def mass_table(results) -> str:
    names = ("none", "ratio 0.2", "kl3 0.2")
    heads = ["old probability", "share of tokens"]
    for name in names:
        gate_name = label(name)
        heads += [f"{gate_name}: outside", f"{gate_name}: change, A > 0", f"{gate_name}: A < 0"]
    heads += ["KL3 0.2 minus ratio 0.2: change, A > 0", "A < 0"]
    rows = []
    for number in range(len(BINS) - 1):
        share = mean(binned(results, "ratio 0.2", number, "share"))
        row = [f"{BINS[number]} to {BINS[number + 1]}", f"{share:.1%}"]
        for name in names:
            row.append(f"{mean(binned(results, name, number, 'outside')):.1%}")
            row.append(f"{mean(binned(results, name, number, 'rise')):+.4f}")
            row.append(f"{mean(binned(results, name, number, 'fall')):+.4f}")
        for key in ("rise", "fall"):
            kl3 = binned(results, "kl3 0.2", number, key)
            ratio = binned(results, "ratio 0.2", number, key)
            row.append(ex.paired(kl3, ratio, 4))
        rows.append(row)
    return ex.table(heads, rows)


def draw_measures(axis) -> None:
    w = np.linspace(0.3, 2.2, 400)
    axis.plot(w, w - 1 - np.log(w), color=GREEN, linewidth=2.2, label="KL3: w - 1 - log w")
    axis.plot(w, np.log(w) ** 2 / 2, "--", color=GREEN, linewidth=2.2, label="KL2: (log w)² / 2")
    axis.plot(w, (w - 1) ** 2 / 2, color=BLUE, linewidth=2.2, label="ratio: (w - 1)² / 2")
    axis.plot(w, np.abs(np.log(w)), ":", color=GREEN, linewidth=2.2, label="abs KL1: |log w|")
    for delta in DELTAS:
        axis.axhline(delta, color="black", linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 0.4)
    title = "what is held below delta (dotted: four deltas)"
    ex.tidy(axis, title, "ratio w = new / old probability", legend=True)


def draw_windows(axis) -> None:
    measures = ("kl1", "abs_kl1", "ratio", "kl2", "kl3")
    for y, measure in enumerate(measures):
        color = BLUE if measure == "ratio" else GREEN
        for delta, height, alpha in ((0.2, 0.16, 0.45), (0.02, 0.34, 1)):
            low, high = clip_range(delta, measure)
            axis.barh(y, min(high, 2.2) - low, height, low, color=color, alpha=alpha)
            if high > 2.2:
                axis.text(2.22, y, "open", va="center")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlim(0.3, 2.45)
    axis.set_yticks(range(len(measures)), map(label, measures))
    ex.tidy(axis, "the windows: delta 0.02 (thick) and 0.2 (thin)", "ratio w")


def draw_panels(results, arms, panels: dict[str, list[str]], file: str) -> None:
    """Reward above, entropy below; a column per panel: title -> names of its arms."""
    figure, rows = ex.plt.subplots(2, len(panels), figsize=(13, 7.6), sharey="row",
                                   constrained_layout=True)
    for axes, (key, title) in zip(rows, TITLES.items(), strict=True):
        axes[0].set_ylabel(title, fontsize=11)
        for axis, (head, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                look = arms[name].color, arms[name].style
                curves = results.curves(name, key)
                ex.band(axis, curves, label(name), *look, fill=arms[name].style == "-")
            ex.tidy(axis, head, legend=key == "entropy")
    ex.save(figure, file)


def draw_curves(results) -> None:
    panels = {}
    for delta in DELTAS:
        names = [name for name in ARMS if name.endswith(f" {delta}")]
        panels[f"delta {delta}"] = ["none", *names]
    draw_panels(results, ARMS, panels, "kl3_curves.png")


def draw_acting(results) -> None:
    panels = {}
    for measure in KL_MEASURES:
        panels[label(measure)] = ["none", "ratio 0.02", f"{measure} 0.02"]
    draw_panels(results, ACTING, panels, "kl3_acting.png")


def draw_width(results) -> None:
    figure, axes = ex.plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    titles = (TITLES["reward"], "entropy at the last steps, nats", "entropy at equal reward, nats")
    for number, title in enumerate(titles):
        axis = axes[number]
        for x, delta in enumerate(DELTAS):
            kl3 = readings(results, f"kl3 {delta}")[number]
            found = ex.differences(kl3, readings(results, f"ratio {delta}")[number])
            axis.plot([x] * len(found), found, "o", color=GREEN, alpha=0.45)
            error = ex.standard_error(found)
            if not math.isnan(error):
                axis.errorbar(x + 0.15, mean(found), error, fmt="s", color="black", capsize=4)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(DELTAS)), DELTAS)
        ex.tidy(axis, title, "delta")
    title = "KL3 minus ratio of the same width: paired seeds, mean with its standard error"
    figure.suptitle(title, fontsize=14)
    ex.save(figure, "kl3_width.png")


def main():
    args = ex.arguments(__doc__, seeds=5, parts=("arms", "acting"))
    if "acting" in args.parts:
        write_softer()
        acting = ex.Results(ex.runs("kl3_acting", ACTING, args))
        draw_acting(acting)
        args.seeds += 2  # more of the two that are compared
        pair = {name: ACTING[name] for name in ("ratio 0.02", "kl3 0.02")}
        pair = ex.Results(ex.runs("kl3_acting", pair, args))
        args.seeds -= 2
        tables = {"acting": acting_table(acting), "pair": pair_table(pair)}
        ex.write("kl3_acting", {**acting, **pair}, tables, page="kl3_grpo")
    if "arms" in args.parts:
        every_arm(args)


def every_arm(args) -> None:
    results = ex.Results(ex.runs("kl3", ARMS, args))
    ex.write("kl3_grpo", results, {
        "arms": arms_table(results),
        "width": width_table(results),
        "mass": mass_table(results),
    })
    figure, axes = ex.plt.subplots(1, 2, figsize=(13, 4.4), constrained_layout=True)
    draw_measures(axes[0])
    draw_windows(axes[1])
    ex.save(figure, "kl3_windows.png")
    draw_curves(results)
    draw_width(results)


if __name__ == "__main__":
    main()
