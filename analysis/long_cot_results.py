"""Demystifying Long CoT's claims on the embedded model -> docs/results/long_cot.{json,md} and its figures.

    python docs/long_cot_results.py        # 9 fine-tunings and 26 RL runs, five seeds: 80 minutes on two cores

Chains are distilled (long, short, N answers a problem), constructed, or kept without verification; then PPO goes on from them.
The limit of 112 tokens for RL is twice the mean length of a long chain: it can be hit.
"""
import statistics

import experiment as ex
import matplotlib.pyplot as plt
from experiment import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

EVAL = "--eval-problems 128 --eval-k 8"
SFT = f"{EVAL} --max-new-tokens 160 --teacher-problems 192"
RL = f"{EVAL} --steps 24 --group-size 8 --max-new-tokens 112"
MODEL = "--model {{runs}}/{}-{{seed}}/model"
NS, GAMMAS = (1, 4, 16), (1.0, 0.999, 0.99)
TUNED = {f"{style} N={n}": ("long_cot_sft.py", f"{SFT} --teacher-style {style} --samples {n}")
         for style in ("long", "short") for n in NS} | {
    "constructed": ("long_cot_sft.py", f"{SFT} --source construct --samples 16"),
    "silver": ("long_cot_sft.py", f"{SFT} --samples 2 --keep all --label-noise 0.3"),
    "silver filtered": ("long_cot_sft.py", f"{SFT} --samples 2 --keep all --label-noise 0.3 --filter agree"),
}
LONG, SHORT = MODEL.format("long_N=4"), MODEL.format("short_N=4")
REINFORCED = {
    "base, cosine": ("ppo.py", RL, GREY),
    "base, critic in the policy's trunk": ("ppo.py", f"{RL} --critic shared --value-coef 1", GREEN),
    "the same, value loss x 0.01": ("ppo.py", f"{RL} --critic shared --value-coef 0.01", GREEN),
    "base, cosine, limit 56": ("ppo.py", f"{RL} --max-new-tokens 56", GREY),
    "base, classic, limit 56": ("ppo.py", f"{RL} --max-new-tokens 56 --reward classic --penalty 0", VERMILION),
    "base, reward A": ("ppo.py", f"{RL} --reward A", VERMILION),
    "base, reward B": ("ppo.py", f"{RL} --reward B", GREEN),
    "base, reward C": ("ppo.py", f"{RL} --reward C", PURPLE),
    "short, cosine": ("ppo.py", f"{RL} {SHORT}", SKY),
    "long, cosine": ("ppo.py", f"{RL} {LONG}", BLUE),
    "constructed, cosine": ("ppo.py", f"{RL} {MODEL.format('constructed')}", PURPLE),
    "long, classic": ("ppo.py", f"{RL} {LONG} --reward classic --penalty 0", VERMILION),
    "long, no penalty": ("ppo.py", f"{RL} {LONG} --penalty 0", ORANGE),
    "long, reward A": ("ppo.py", f"{RL} {LONG} --reward A", VERMILION),
    "long, reward B": ("ppo.py", f"{RL} {LONG} --reward B", GREEN),
    "long, reward C": ("ppo.py", f"{RL} {LONG} --reward C", PURPLE),
    "silver, all labels": ("ppo.py", f"{RL} {MODEL.format('silver')} --data {{runs}}/silver-{{seed}}/problems.jsonl "
                                     "--eval-data arithmetic", GREY),
    "silver, filtered labels": ("ppo.py", f"{RL} {MODEL.format('silver_filtered')} --data "
                                          "{runs}/silver_filtered-{seed}/problems.jsonl --eval-data arithmetic", GREEN),
} | {f"discounts {c}, {p}": ("ppo.py", f"{RL} {LONG} --gamma {c} --penalty-gamma {p}", BLUE)
     for c in GAMMAS for p in GAMMAS if (c, p) != (1.0, 0.99)}


def main():
    args = ex.arguments(__doc__, seeds=5)
    results = ex.runs("long_cot", TUNED, args.seeds, args.workers)
    results |= ex.runs("long_cot", REINFORCED, args.seeds, args.workers)
    of = lambda name, key: [r["summary"][key] for r in results[name]]
    mean = lambda name, key: statistics.fmean(of(name, key))
    last = lambda name, key: [statistics.fmean(row.get(key, 0.0) for row in r["rows"][-4:]) for r in results[name]]
    worst = lambda name, key: max(row.get(key, 0.0) for r in results[name] for row in r["rows"])
    wait = lambda name, when: statistics.fmean(x["wait"] for x in of(name, f"reflection_{when}"))

    tuned = ex.table(["chains", "traces", "tokens trained", "accuracy", "tokens per answer", "'wait' before", "after"],
                  [[name, f"{statistics.fmean(s['traces'] for s in of(name, 'traces')):.0f}",
                    f"{statistics.fmean(r['rows'][-1]['tokens_seen'] for r in results[name]):.0f}",
                    ex.spread(of(name, "avg_at_k_after")), f"{mean(name, 'length_after'):.0f}", f"{wait(name, 'before'):.1%}",
                    f"{wait(name, 'after'):.1%}"] for name in TUNED])
    gain = lambda name: [a - b for a, b in zip(of(name, "avg_at_k_after"), of(name, "avg_at_k_before"))]
    value = lambda name: [statistics.fmean(row["explained_variance"] for row in r["rows"]) for r in results[name]]
    heads = ["start, reward", "accuracy before", "after", "gain", "tokens before", "after", "too long, last 4 steps",
             "worst step", "repeated, last 4 steps", "'wait' before", "after", "variance that the critic explains"]
    reinforced = ex.table(heads, [[
        name, f"{mean(name, 'avg_at_k_before'):.3f}", ex.spread(of(name, "avg_at_k_after")), ex.spread(gain(name)),
        f"{mean(name, 'length_before'):.0f}", f"{mean(name, 'length_after'):.0f}",
        f"{statistics.fmean(last(name, 'exceeded')):.1%}", f"{worst(name, 'exceeded'):.0%}",
        f"{statistics.fmean(last(name, 'repeated')):.2%}", f"{wait(name, 'before'):.1%}", f"{wait(name, 'after'):.1%}",
        f"{statistics.fmean(value(name)):.3f}"]
        for name in REINFORCED if not name.startswith("discounts")])
    arm = lambda c, p: "long, cosine" if (c, p) == (1.0, 0.99) else f"discounts {c}, {p}"
    discounts = ex.table(["discount of the answer's reward", *(f"penalty {p}" for p in GAMMAS)],
                      [[c, *(f"{ex.spread(of(arm(c, p), 'avg_at_k_after'))}, {mean(arm(c, p), 'length_after'):.0f} tokens"
                             for p in GAMMAS)] for c in GAMMAS])
    discounts += "\nAccuracy by (discount, penalty's). " + ex.apart(
        {f"({c}, {p})": of(arm(c, p), "avg_at_k_after") for c in GAMMAS for p in GAMMAS})
    accuracy, tokens = (lambda name: of(name, "avg_at_k_after")), (lambda name: of(name, "length_after"))
    repeated, too_long = (lambda name: last(name, "repeated")), (lambda name: last(name, "exceeded"))
    differences = [
        ("accuracy after fine-tuning: long N=16 minus long N=1", accuracy, "long N=16", "long N=1"),
        ("the same, short chains", accuracy, "short N=16", "short N=1"),
        ("accuracy after fine-tuning: long N=16 minus short N=1", accuracy, "long N=16", "short N=1"),
        ("RL's gain in accuracy: long minus short start", gain, "long, cosine", "short, cosine"),
        ("accuracy after RL: long minus short start", accuracy, "long, cosine", "short, cosine"),
        ("accuracy: cosine minus classic, long start", accuracy, "long, cosine", "long, classic"),
        ("accuracy: cosine minus classic, base, limit 56", accuracy, "base, cosine, limit 56", "base, classic, limit 56"),
        ("share too long: the same", too_long, "base, cosine, limit 56", "base, classic, limit 56"),
        ("tokens: the same", tokens, "base, cosine, limit 56", "base, classic, limit 56"),
        ("tokens: reward A minus B, long start", tokens, "long, reward A", "long, reward B"),
        ("tokens: reward B minus C, long start", tokens, "long, reward B", "long, reward C"),
        ("tokens: reward A minus B, base", tokens, "base, reward A", "base, reward B"),
        ("tokens: reward B minus C, base", tokens, "base, reward B", "base, reward C"),
        ("share repeated: with penalty minus without", repeated, "long, cosine", "long, no penalty"),
        ("accuracy: with penalty minus without", accuracy, "long, cosine", "long, no penalty"),
        ("accuracy after RL: distilled minus constructed", accuracy, "long, cosine", "constructed, cosine"),
        ("accuracy after RL: silver labels filtered minus all", accuracy, "silver, filtered labels", "silver, all labels")]
    compare = ex.table(["difference, paired by seed", "mean ± standard error"],
                       [[what, ex.paired(measure(a), measure(b))] for what, measure, a, b in differences])
    ex.write("long_cot", results, {"tuned": tuned, "reinforced": reinforced, "discounts": discounts, "compare": compare})

    out = ex.ROOT / "docs" / "results"
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True)
    for style, color in (("long", BLUE), ("short", SKY)):
        names = [f"{style} N={n}" for n in NS]
        x = [statistics.fmean(r["rows"][-1]["tokens_seen"] for r in results[name]) for name in names]
        ex.band(axes[0], list(zip(*[of(name, "avg_at_k_after") for name in names])), f"{style} chains", color, "-o", x=x)
    axes[0].set_xscale("log")
    ex.tidy(axes[0], "accuracy after fine-tuning, N = 1, 4, 16", "tokens trained on", legend=True)
    for axis, key, title in zip(axes[1:], ("reward", "length"), ("share of answers right", "tokens per answer (limit 112)")):
        for name in ("base, cosine", "short, cosine", "long, cosine", "constructed, cosine", "long, classic"):
            ex.band(axis, [ex.smooth(r["rows"], key) for r in results[name]], name, REINFORCED[name][2])
        ex.tidy(axis, title)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=5, fontsize=9)
    figure.savefig(out / "long_cot.png", dpi=110)

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True)
    rewards = {"cosine": BLUE, "reward A": VERMILION, "reward B": GREEN, "reward C": PURPLE}
    for axis, start in zip(axes, ("base", "long")):
        for reward, color in rewards.items():
            ex.band(axis, [ex.smooth(r["rows"], "length") for r in results[f"{start}, {reward}"]], reward, color)
        ex.tidy(axis, f"tokens per answer, from {'the base model' if start == 'base' else 'long chains'}", legend=start == "base")
    for name, color, style in (("long, cosine", BLUE, "-"), ("long, no penalty", ORANGE, "--")):
        ex.band(axes[2], [ex.smooth(r["rows"], "repeated") for r in results[name]], name, color, style)
    ex.tidy(axes[2], "share of tokens in a repeated 12-gram", legend=True)
    figure.savefig(out / "long_cot_rewards.png", dpi=110)


if __name__ == "__main__":
    main()
