"""Demystifying Long CoT's claims on the embedded model -> results/long_cot.{json,md} and figures.

    python -m analysis.long_cot_results     # 14 fine-tunings, 25 RL runs, five seeds: 90 minutes
    python -m analysis.long_cot_results --parts problems --seeds 3      # the first two tables alone
    python -m analysis.long_cot_results --parts figures                 # drawn again from the JSON

Chains are sampled from a teacher (long, short, N answers per problem), or kept without
verification under noisy labels; then PPO goes on from them. The limit of 112 tokens for RL is twice
the mean length of a long chain: it can be hit. Accuracy: 8 answers to each of 1,024 problems.
"""
import json
import random

from analysis import experiment as ex
from analysis.experiment import SKY, VERMILION, Arm, mean
from analysis.plot import lighter, stored
from common.data import load_problems

EVAL = "--eval-problems 1024"
PROBLEMS = 192
SFT = f"{EVAL} --max-new-tokens 160"
NS = (1, 4, 16)
RIGHT = "share of sampled answers that are right"
GAMMAS = (1.0, 0.999, 0.99)
LABELS = ex.ROOT / "runs" / "analysis" / "long_cot"
NOISY = f"--data {LABELS}/noisy-{{seed}}.jsonl --eval-data arithmetic"
AGREEING = f"--data {LABELS}/agreeing-{{seed}}.jsonl --eval-data arithmetic"


def noisy_labels(seed: int, share: float = 0.3) -> list[dict]:
    """Problems whose answer is off by 1, 2 or 10 in about a share of them, by seed and problem."""
    rows = load_problems("arithmetic", seed=seed, count=PROBLEMS)
    for row in rows:
        rng = random.Random(f"label {seed} {row['problem']}")
        if rng.random() < share:
            wrong = int(row["answer"]) + rng.choice((-10, -2, -1, 1, 2, 10))
            row["answer"] = str(wrong)
    return rows


def write_rows(name: str, rows: list[dict]) -> None:
    LABELS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (LABELS / f"{name}.jsonl").write_text("".join(lines))


def agreeing_labels(seed: int) -> list[dict]:
    """Rows of the silver run whose label is one of the teacher's two answers: the paper's filter.
    They hold the answers that were kept, too, for --traces."""
    rows = ex.read_lines(LABELS / f"silver-{seed}" / "traces.jsonl")
    return [row for row in rows if row["right"] > 0]


def sft(flags: str) -> Arm:
    return Arm("long_cot_sft.py", f"{SFT} {flags}")


def rl(flags: str, start: str | None = None, limit: int = 112) -> Arm:
    common = f"{EVAL} --steps 24 --group-size 8 --max-new-tokens {limit}"
    if start:
        common += f" --model {{runs}}/{start}-{{seed}}/model"
    return Arm("ppo.py", f"{common} {flags}")


SIZES = (192, 768, 2048)
ASKED = {}  # more problems, each asked once
for size in SIZES:
    for style in ("long", "short"):
        flags = f"--teacher-style {style} --teacher-problems {size} --samples 1"
        ASKED[f"{style}, {size} problems"] = sft(flags)
EQUAL = {
    "RL from long, 768 problems": rl("", "long,_768_problems"),
    "RL from short, 192 problems": rl("", "short,_192_problems"),
}
TUNED = {}
for style in ("long", "short"):
    for n in NS:
        flags = f"--teacher-style {style} --teacher-problems {PROBLEMS} --samples {n}"
        TUNED[f"{style} N={n}"] = sft(flags)
TUNED["silver"] = sft(f"--samples 2 --keep all {NOISY}")
FILTERED = {"silver filtered": sft(f"--traces {LABELS}/agreeing-{{seed}}.jsonl {AGREEING}")}
CLASSIC = "--length-reward none --penalty 0"
MAIN = {
    "base, cosine": rl(""),
    "base, cosine, limit 56": rl("", limit=56),
    "base, classic, limit 56": rl(CLASSIC, limit=56),
    "base, reward A": rl("--length-reward A"),
    "base, reward B": rl("--length-reward B"),
    "base, reward C": rl("--length-reward C"),
    "short, cosine": rl("", "short_N=4"),
    "long, cosine": rl("", "long_N=4"),
    "long, classic": rl(CLASSIC, "long_N=4"),
    "long, no penalty": rl("--penalty 0", "long_N=4"),
    "long, reward A": rl("--length-reward A", "long_N=4"),
    "long, reward B": rl("--length-reward B", "long_N=4"),
    "long, reward C": rl("--length-reward C", "long_N=4"),
    "silver, all labels": rl(NOISY, "silver"),
    "silver, filtered labels": rl(AGREEING, "silver_filtered"),
}


def discount_arm(gamma: float, penalty: float) -> str:
    """The name of the arm with these two discounts; (1, 0.99) is the default."""
    if (gamma, penalty) == (1.0, 0.99):
        return "long, cosine"
    return f"discounts {gamma}, {penalty}"


REINFORCED = dict(MAIN)
for gamma in GAMMAS:
    for penalty in GAMMAS:
        discounts = f"--gamma {gamma} --penalty-gamma {penalty}"
        name = discount_arm(gamma, penalty)
        if name not in REINFORCED:
            REINFORCED[name] = rl(discounts, "long_N=4")


def tokens_trained(results, name: str) -> float:
    """Of two passes."""
    return mean([2 * about["tokens"] for about in results.summary(name, "traces")])


def waits(results, name: str, when: str) -> str:
    """The share of answers that hold the word "wait"."""
    return f"{mean(results.summary(name, f'wait_{when}')):.1%}"


def gain(results, name: str) -> list[float]:
    after = results.accuracy(name)
    return ex.differences(after, results.summary(name, "avg_at_k_before"))


def asked_table(results) -> str:
    """More problems at one sample each, long and short."""
    rows = []
    for size in SIZES:
        long = f"long, {size} problems"
        for style in ("long", "short"):
            name = f"{style}, {size} problems"
            traces = [about["traces"] for about in results.summary(name, "traces")]
            difference = ""
            if style == "short":
                difference = ex.paired(results.accuracy(name), results.accuracy(long))
                difference += f" ({ex.crossed(results[name], results[long]):.3f})"
            rows.append([
                name,
                len(results[name]),
                f"{mean(traces):.0f}",
                f"{tokens_trained(results, name):.0f}",
                ex.spread(results.accuracy(name)),
                difference,
                f"{mean(results.summary(name, 'length_after')):.0f}",
            ])
    heads = ["chains, problems asked once", "seeds", "traces", "tokens trained", "accuracy",
             "short minus long", "tokens per answer"]
    return ex.table(heads, rows)


def equal_table(results) -> str:
    """RL from starts of nearly equal accuracy: what the paper compares, with its other half."""
    rows = []
    gains = []
    for name in EQUAL:
        before = results.summary(name, "avg_at_k_before")
        gains.append(gain(results, name))
        lengths = [mean(results.summary(name, f"length_{when}")) for when in ("before", "after")]
        rows.append([name, ex.spread(before), ex.spread(results.accuracy(name)),
                     ex.spread(gains[-1]), "{:.0f} to {:.0f}".format(*lengths)])
    after = [results.accuracy(name) for name in EQUAL]
    heads = ["start", "accuracy before", "after", "gain", "tokens per answer"]
    return ex.table(heads, rows) + (
        f"\nLong minus short, paired by seed: gain {ex.paired(*gains)}, accuracy after "
        f"{ex.paired(*after)}.\n")


def tuned_table(results) -> str:
    heads = ["chains", "traces", "tokens trained", "accuracy", "tokens per answer",
             "'wait' before", "after"]
    rows = []
    for name in (*TUNED, *FILTERED):
        traces = [about["traces"] for about in results.summary(name, "traces")]
        rows.append([
            name,
            f"{mean(traces):.0f}",
            f"{tokens_trained(results, name):.0f}",
            ex.spread(results.accuracy(name)),
            f"{mean(results.summary(name, 'length_after')):.0f}",
            waits(results, name, "before"),
            waits(results, name, "after"),
        ])
    return ex.table(heads, rows)


def reinforced_table(results) -> str:
    heads = ["start, reward", "accuracy before", "after", "gain", "tokens before", "after",
             "too long, last 4 steps", "worst step", "repeated, last 4 steps", "'wait' before",
             "after", "variance that the critic explains"]
    rows = []
    for name in MAIN:
        exceeded = [row["exceeded"] for result in results[name] for row in result["rows"]]
        rows.append([
            name,
            f"{mean(results.summary(name, 'avg_at_k_before')):.3f}",
            ex.spread(results.accuracy(name)),
            ex.spread(gain(results, name)),
            f"{mean(results.summary(name, 'length_before')):.0f}",
            f"{mean(results.summary(name, 'length_after')):.0f}",
            f"{mean(results.metric(name, 'exceeded', last=4)):.1%}",
            f"{max(exceeded):.0%}",
            f"{mean(results.metric(name, 'repeated', last=4)):.2%}",
            waits(results, name, "before"),
            waits(results, name, "after"),
            f"{mean(results.metric(name, 'explained_variance')):.3f}",
        ])
    return ex.table(heads, rows)


def discounts_table(results) -> str:
    rows = []
    accuracies = {}
    for gamma in GAMMAS:
        row = [gamma]
        for penalty in GAMMAS:
            name = discount_arm(gamma, penalty)
            accuracies[f"({gamma}, {penalty})"] = results.accuracy(name)
            tokens = mean(results.summary(name, "length_after"))
            row.append(f"{ex.spread(results.accuracy(name))}, {tokens:.0f} tokens")
        rows.append(row)
    heads = ["discount of the answer's reward", *(f"penalty {penalty}" for penalty in GAMMAS)]
    line = "\nAccuracy by (discount, penalty's). "
    return ex.table(heads, rows) + line + ex.apart(accuracies)


def compare_table(results) -> str:
    def accuracy(name):
        return results.accuracy(name)

    def tokens(name):
        return results.summary(name, "length_after")

    def gained(name):
        return gain(results, name)

    def too_long(name):
        return results.metric(name, "exceeded", last=4)

    def repeated(name):
        return results.metric(name, "repeated", last=4)

    cosine, classic = "base, cosine, limit 56", "base, classic, limit 56"
    wanted = [
        ("accuracy after fine-tuning: long N=16 minus long N=1", accuracy, "long N=16", "long N=1"),
        ("the same, short chains", accuracy, "short N=16", "short N=1"),
        ("accuracy after fine-tuning: long N=16 minus short N=1", accuracy, "long N=16",
         "short N=1"),
        ("RL's gain in accuracy: long minus short start", gained, "long, cosine", "short, cosine"),
        ("accuracy after RL: long minus short start", accuracy, "long, cosine", "short, cosine"),
        ("fine-tuning, then RL, minus RL from the base: long", accuracy, "long, cosine",
         "base, cosine"),
        ("the same, short chains", accuracy, "short, cosine", "base, cosine"),
        ("accuracy: cosine minus classic, long start", accuracy, "long, cosine", "long, classic"),
        ("accuracy: cosine minus classic, base, limit 56", accuracy, cosine, classic),
        ("share too long: the same", too_long, cosine, classic),
        ("tokens: the same", tokens, cosine, classic),
        ("tokens: reward A minus B, long start", tokens, "long, reward A", "long, reward B"),
        ("tokens: reward B minus C, long start", tokens, "long, reward B", "long, reward C"),
        ("tokens: reward A minus B, base", tokens, "base, reward A", "base, reward B"),
        ("tokens: reward B minus C, base", tokens, "base, reward B", "base, reward C"),
        ("share repeated: with penalty minus without", repeated, "long, cosine",
         "long, no penalty"),
        ("accuracy: with penalty minus without", accuracy, "long, cosine", "long, no penalty"),
        ("accuracy after RL: silver labels filtered minus all", accuracy,
         "silver, filtered labels", "silver, all labels"),
    ]
    rows = [[what, ex.paired(read(a), read(b))] for what, read, a, b in wanted]
    return ex.table(["difference, paired by seed", "mean ± standard error"], rows)


def draw_main(results) -> None:
    figure, axes = ex.plt.subplots(1, 2, figsize=(12, 4.8), constrained_layout=True)
    looks = {  # share of white, line style
        "base, cosine": (0.5, "-"),
        "short, cosine": (-0.6, "--"),
        "long, cosine": (0, "-"),
        "long, classic": (-0.6, ":"),
    }
    titles = {"reward": RIGHT, "length": "tokens per answer (limit 112)"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for name, (white, style) in looks.items():
            color = lighter(VERMILION, white)
            ex.band(axis, results.curves(name, key), name, color, style)
        ex.tidy(axis, title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=11)
    ex.save(figure, "long_cot.png")


def draw_asked(results, repeated) -> None:
    """Accuracy by tokens on both axes: problems, and (of the other arms) samples per problem."""
    figure, axis = ex.plt.subplots(figsize=(7.5, 4.8), constrained_layout=True)
    for style, color in (("long", lighter(SKY, -0.5)), ("short", SKY)):
        problems = [f"{style}, {size} problems" for size in SIZES]
        x = [tokens_trained(results, name) for name in problems]
        seeds = [results.accuracy(name) for name in problems]
        label = f"{style}: 192, 768, 2048 problems"
        axis.plot(x, [mean(values) for values in seeds], "-o", color=color, label=label)
        lowest = [min(values) for values in seeds]
        highest = [max(values) for values in seeds]
        axis.fill_between(x, lowest, highest, color=color, alpha=0.2, linewidth=0)
        samples = [f"{style} N={n}" for n in NS]
        x = [tokens_trained(repeated, name) for name in samples]
        means = [mean(repeated.accuracy(name)) for name in samples]
        axis.plot(x, means, "--s", color=color, label=f"{style}: 1, 4, 16 samples of 192")
    axis.set_xscale("log")
    ex.tidy(axis, f"after fine-tuning: {RIGHT}", "tokens trained on", legend=True)
    ex.save(figure, "long_cot_problems.png")


def draw_rewards(results) -> None:
    figure, axes = ex.plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True)
    looks = {  # share of white, line style
        "cosine": (0, "-"),
        "reward A": (-0.6, "--"),
        "reward B": (0.4, "-."),
        "reward C": (-0.3, ":"),
    }
    starts = {"base": "the base model", "long": "long chains"}
    for axis, (start, words) in zip(axes, starts.items(), strict=False):
        for reward, (white, style) in looks.items():
            curves = results.curves(f"{start}, {reward}", "length")
            ex.band(axis, curves, reward, lighter(VERMILION, white), style)
        ex.tidy(axis, f"tokens per answer, from {words}", legend=True)
    for name, white, style in (("long, cosine", 0, "-"), ("long, no penalty", -0.6, "--")):
        color = lighter(VERMILION, white)
        ex.band(axes[2], results.curves(name, "repeated"), name, color, style)
    ex.tidy(axes[2], "share of tokens in a repeated 12-gram", legend=True)
    ex.save(figure, "long_cot_rewards.png")


def main():
    args = ex.arguments(__doc__, seeds=5, parts=("problems", "arms", "figures"))
    if "problems" in args.parts:
        asked = ex.Results(ex.runs("long_cot", ASKED, args))
        asked.update(ex.runs("long_cot", EQUAL, args))
        tables = {"asked": asked_table(asked), "equal": equal_table(asked)}
        ex.write("long_cot_problems", asked, tables, page="long_cot")
    if "arms" in args.parts:
        every_arm(args)
    if "figures" in args.parts:
        results = ex.Results(stored(ex.PAGES / "long_cot.json"))
        draw_asked(ex.Results(stored(ex.PAGES / "long_cot_problems.json")), results)
        draw_main(results)
        draw_rewards(results)


def every_arm(args) -> None:
    for seed in range(args.seeds):
        write_rows(f"noisy-{seed}", noisy_labels(seed))
    results = ex.Results(ex.runs("long_cot", TUNED, args))
    for seed in range(args.seeds):
        write_rows(f"agreeing-{seed}", agreeing_labels(seed))
    results.update(ex.runs("long_cot", FILTERED, args))
    results.update(ex.runs("long_cot", REINFORCED, args))
    ex.write("long_cot", results, {
        "tuned": tuned_table(results),
        "reinforced": reinforced_table(results),
        "discounts": discounts_table(results),
        "compare": compare_table(results),
    })


if __name__ == "__main__":
    main()
