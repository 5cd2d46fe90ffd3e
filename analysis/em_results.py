"""One-shot entropy minimization's claims on the embedded model -> results/entropy_min.{json,md}.

    python -m analysis.em_results                   # 16 arms, eight seeds, two at a time: an hour
    python -m analysis.em_results --parts styles    # the first table alone, 15 minutes
    python -m analysis.em_results --parts figure    # drawn again from the JSON

Accuracy: 8 answers to each of 1,024 held-out problems.
"""
import math
from collections import Counter, defaultdict

import torch

import entropy_min
from analysis import experiment as ex
from analysis import internal
from analysis.experiment import BLUE, GREY, PURPLE, Arm, mean
from analysis.logits import logit_statistics
from analysis.plot import lighter, stored
from common.data import encode_prompt, load_problems
from common.evaluate import evaluate
from common.models import load_model, load_tokenizer
from common.sampling import sample
from common.verify import extract_answer, verify

TEMPERATURES = (0.0, 0.3, 0.6, 1.0, 1.5)
LOOKS = (0, 2, 4, 6, 8, 10, 15, 16, 20, 25, 30, 35, 40)
STYLES = ("direct", "short", "long")
STYLED = ("EM", "first token only", "all but the first", "16 problems")
FOUR = ("base", "EM", "GRPO", "EM, then GRPO")
EVAL = "--eval-problems 1024"


def shape_of(result: dict) -> dict:
    """Format and skill apart: share of answers that hold a box, and accuracy among those."""
    boxed = []
    rewards = []
    for row in result["answers"]:
        for text, reward in zip(row["responses"], row["rewards"], strict=True):
            boxed.append("\\boxed{" in text)
            if boxed[-1]:
                rewards.append(reward)
    return {
        "accuracy": result["avg_at_k"],
        "length": result["length"],
        "parsed": mean(boxed),
        "accuracy_parsed": mean(rewards) if rewards else 0.0,
    }


def held_out(run, temperature: float, k: int, seed: int) -> dict:
    return evaluate(run.model, run.tokenizer, run.held_out[:64], run.reward, k,
                    run.args.max_new_tokens, temperature, seed=seed)


def probe(run) -> dict:
    """With labels: accuracy on 64 held-out problems. Without, as a stopping rule may see it: how
    many of a problem's answers agree with their majority."""
    result = held_out(run, 1.0, 8, seed=99)
    agreement = []
    for row in result["answers"]:
        votes = Counter(extract_answer(text) for text in row["responses"])
        agreement.append(votes.most_common(1)[0][1] / 8)
    return {**shape_of(result), "agreement": mean(agreement)}


def after(run) -> dict:
    """Accuracy at several temperatures, and the logits on 32 answers of the embedded model, the
    same ones for every model."""
    base = load_model(internal.Args(device="cpu"), trained=False)
    prompts = run.encode(run.held_out[:32])
    answers = sample(base, load_tokenizer("tiny"), prompts, 1, run.args.max_new_tokens, 0.6, seed=3)
    logits = logit_statistics(run.model, answers, 4096)
    for values in logits.values():
        del values["histogram"]
    by_temperature = {}
    for T in TEMPERATURES:
        result = held_out(run, T, 8 if T else 1, seed=7)
        by_temperature[str(T)] = shape_of(result)
    return {"logits": logits, "temperatures": by_temperature}


def ascend(_run, optimizer) -> None:
    """The control: the same updates uphill."""
    optimizer.param_groups[0]["maximize"] = True


def first_token_only(_run, _optimizer) -> None:
    """Answers are cut after their first token before the loss is taken."""
    def sample_first(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        rollout.lengths = torch.ones_like(rollout.lengths)
        for name in ("tokens", "logp", "entropy"):
            setattr(rollout, name, getattr(rollout, name)[:, :1])               # (B, 1)
        return rollout
    entropy_min.sample = sample_first


def style_of(text: str) -> str:
    """The embedded model's three styles: a bare result, steps, steps with checks."""
    if text.startswith("\\boxed"):
        return "direct"
    return "long" if " check " in text or " wait" in text else "short"


def by_style(answers: list[dict]) -> dict:
    """An evaluation -> style -> share of the answers and accuracy among them."""
    rewards = defaultdict(list)
    for row in answers:
        for text, reward in zip(row["responses"], row["rewards"], strict=True):
            rewards[style_of(text)].append(reward)
    total = sum(len(found) for found in rewards.values())
    styles = {}
    for style in STYLES:
        found = rewards[style]
        accuracy = mean(found) if found else 0.0
        styles[style] = {"share": len(found) / total, "accuracy": accuracy}
    return styles


def em(flags: str = "", **watch) -> Arm:
    return Arm("entropy_min.py", f"{EVAL} {flags}", count=by_style, **watch)


FIRST = {
    "EM": em(after=after),
    "EM 40 updates": em("--steps 40", probe=probe, every=1),
    "EM lr 6e-4": em("--lr 6e-4"),
    "EM lr 1.5e-4": em("--lr 1.5e-4"),
    "loss T 1": em("--loss-temperature 1"),
    "loss T 1.5": em("--loss-temperature 1.5"),
    "top-p 0.95": em("--top-p 0.95"),
    "first token only": em(prepare=first_token_only),
    "all but the first": em("--authors-mask"),
    "4 problems": em("--shots 4"),
    "16 problems": em("--shots 16"),
    "chosen by variance": em("--select 32"),
    "entropy ascent": em(prepare=ascend),
    "GRPO": Arm("grpo.py", f"{EVAL} --steps 16", after=after),
}
THEN = {
    "EM, then GRPO": Arm("grpo.py", f"{EVAL} --steps 16 --model {{runs}}/EM-{{seed}}/model",
                         after=after),
    "GRPO, then EM": em("--model {runs}/GRPO-{seed}/model"),
}
UNTRAINED = "--eval-problems 64 --steps 1 --lr 1e-12"  # leaves the model as it is
BASE = {"base": Arm("entropy_min.py", UNTRAINED, after=after)}
NAMES = [*FIRST, *THEN]


def mixed(shares: dict, accuracies: dict) -> float:
    """Accuracy of the answers of one model in the mix of styles of another."""
    return sum(shares[style]["share"] * accuracies[style]["accuracy"] for style in STYLES)


def styles_table(results) -> str:
    """How much of each arm's gain is the change of mix, at the base model's accuracy by style."""
    base = results["EM"][0]["summary"]["count_before"]
    heads = ["arm", *(f"{style}: share, accuracy" for style in STYLES), "accuracy", "gain",
             "of the mix alone", "the rest"]
    row = ["base"]
    for style in STYLES:
        row.append(f"{base[style]['share']:.3f}, {base[style]['accuracy']:.3f}")
    start = mixed(base, base)
    base_runs = []
    for run in results["EM"]:
        base_runs.append({"summary": {"right_after": run["summary"]["right_before"]}})
    rows = [[*row, f"{start:.3f}", "", "", ""]]
    for name in STYLED:
        found = results.summary(name, "count_after")
        row = [name]
        for style in STYLES:
            right = [seed[style]["share"] * seed[style]["accuracy"] for seed in found]
            share = mean([seed[style]["share"] for seed in found])
            row.append(f"{share:.3f}, {mean(right) / share if share else 0:.3f}")
        accuracy = results.accuracy(name)
        mix = [mixed(seed, base) for seed in found]
        starts = [start] * len(found)
        gained = f"{ex.paired(accuracy, starts)} ({ex.crossed(results[name], base_runs):.3f})"
        rows.append([*row, ex.spread(accuracy), gained, ex.paired(mix, starts),
                     ex.paired(accuracy, mix)])
    pairs = []
    for name in STYLED[1:]:
        difference = ex.paired(results.accuracy(name), results.accuracy("EM"))
        pairs.append(f"{name} {difference}")
    values = {}
    for name in STYLED:
        values[name] = ", ".join(f"{value:.3f}" for value in results.accuracy(name))
    return ex.table(heads, rows) + (
        f"\nMinus EM, paired by seed: {'; '.join(pairs)}. By seed: "
        + "; ".join(f"{name} {found}" for name, found in values.items()) + ".\n")


def gap(groups: dict, problems: int) -> str:
    """Mean of the wrong minus mean of the right answers, ± its error with problems as clusters.

    groups: right or not -> list of (problem, value).
    """
    means = {}
    parts = [0.0] * problems
    for right, found in groups.items():
        means[right] = mean([value for _, value in found])
        for problem, value in found:
            part = (value - means[right]) / len(found)
            parts[problem] += -part if right else part
    error = math.sqrt(sum(part * part for part in parts))
    return f"{means[False] - means[True]:+.3f} ± {error:.3f}"


def premise_table() -> str:
    """Are right answers of the base model of lower entropy? Across and within styles."""
    model = load_model(internal.Args(device="cpu"), trained=False)
    tokenizer = load_tokenizer("tiny")
    problems = load_problems("arithmetic", "test", count=1024)
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in problems]
    rows = []
    for T in (1.0, 0.5):
        answers = sample(model, tokenizer, prompts, 8, 80, T, seed=11)
        entropy = answers.entropy.sum(1) / answers.lengths                      # (B,)
        rest = answers.entropy[:, 1:].sum(1) / (answers.lengths - 1).clamp(min=1)
        groups = defaultdict(lambda: {True: [], False: []})
        for i, text in enumerate(answers.texts):
            problem = i // 8
            right = verify(text, problems[problem]["answer"]) == 1 and bool(answers.finished[i])
            groups["all"][right].append((problem, entropy[i].item()))
            groups["all, without the first token"][right].append((problem, rest[i].item()))
            groups[style_of(text)][right].append((problem, entropy[i].item()))
        for name in ("all", "all, without the first token", *STYLES):
            right = [value for _, value in groups[name][True]]
            wrong = [value for _, value in groups[name][False]]
            rows.append([
                T,
                name,
                len(right),
                len(wrong),
                f"{mean(right):.3f}",
                f"{mean(wrong):.3f}",
                gap(groups[name], len(problems)),
            ])
    heads = ["temperature", "answers", "right", "wrong", "entropy of the right, nats per token",
             "of the wrong", "wrong minus right"]
    return ex.table(heads, rows)


def near(result, key: str, update: int) -> float:
    """Mean over the look after `update` updates and its neighbours: one look is 512 answers."""
    return mean([look[key] for look in result["probe"] if abs(look["step"] - update) <= 1])


def arms_table(results) -> str:
    heads = ["arm", "accuracy after", "minus EM, paired seeds", "Pass@8", "tokens"]
    rows = []
    for name in NAMES:
        values = results.accuracy(name)
        rows.append([
            name,
            ex.spread(values),
            "" if name == "EM" else ex.paired(values, results.accuracy("EM")),
            f"{mean(results.pass_at(name, 8)):.3f}",
            f"{mean(results.summary(name, 'length_after')):.0f}",
        ])
    before = results["EM"][0]["summary"]["avg_at_k_before"]
    return ex.table(heads, rows) + (
        f"\nBefore: {before:.3f}. Accuracy: Avg@8 at temperature 1 on 1,024 held-out problems, "
        "mean (lowest to highest seed).\n")


def course_table(results) -> str:
    heads = ["updates", "accuracy", "lowest and highest seed", "parsed", "accuracy of the parsed",
             "tokens", "agreement", "loss"]
    runs = results["EM 40 updates"]
    rows = []
    for place, look in enumerate(runs[0]["probe"]):
        if look["step"] not in LOOKS:
            continue
        found = [run["probe"][place] for run in runs]
        accuracy = [seed["accuracy"] for seed in found]
        row = [look["step"], f"{mean(accuracy):.3f}", f"{min(accuracy):.3f}, {max(accuracy):.3f}"]
        for key in ("parsed", "accuracy_parsed", "length", "agreement"):
            digits = 0 if key == "length" else 3
            row.append(f"{mean([seed[key] for seed in found]):.{digits}f}")
        losses = [run["rows"][min(look["step"], len(run["rows"]) - 1)]["loss"] for run in runs]
        rows.append([*row, f"{mean(losses):.4f}"])
    return ex.table(heads, rows)


def first_below(run, share: float) -> int:
    """Updates made when the entropy of the samples is first below this share of its start."""
    entropies = [row["entropy"] for row in run["rows"]]
    for update, entropy in enumerate(entropies):
        if entropy < share * entropies[0]:
            return update
    return len(entropies)


def first_fall(run) -> int:
    """Updates made when the agreement of answers first falls, three looks against three before."""
    agreement = [look["agreement"] for look in run["probe"]]
    for last in range(5, len(agreement)):
        if sum(agreement[last - 2:last + 1]) < sum(agreement[last - 5:last - 2]):
            return run["probe"][last]["step"]
    return run["probe"][-1]["step"]


def stop_table(results) -> str:
    """Does a signal without labels find the peak of accuracy?"""
    runs = results["EM 40 updates"]
    peaks = []
    for run in runs:
        peaks.append(max(near(run, "accuracy", look["step"]) for look in run["probe"]))
    rules = {
        "10 updates": [10] * len(runs),
        "agreement of answers falls": [first_fall(run) for run in runs],
    }
    for share in (0.7, 0.5, 0.3, 0.2):
        updates = [first_below(run, share) for run in runs]
        rules[f"entropy below {share} of its start"] = updates
    rows = [["the peak itself (needs labels)", "", ex.spread(peaks), ""]]
    for rule, stops in rules.items():
        pairs = zip(runs, stops, strict=True)
        accuracy = [near(run, "accuracy", update) for run, update in pairs]
        rows.append([rule, ex.spread(stops, 0), ex.spread(accuracy), ex.paired(peaks, accuracy)])
    return ex.table(["rule", "updates", "accuracy where it stops", "below the seed's peak"], rows)


def at_temperature(results, name: str, T: float, key: str = "accuracy") -> list[float]:
    return [result["after"]["temperatures"][str(T)][key] for result in results[name]]


def heat_table(results) -> str:
    rows = []
    for T in TEMPERATURES:
        cells = [ex.spread(at_temperature(results, name, T)) for name in FOUR]
        rows.append([T or "greedy", *cells])
    return ex.table(["temperature of the evaluation", *FOUR], rows)


def logit(results, name: str, kind: str, key: str) -> list[float]:
    return [result["after"]["logits"][kind][key] for result in results[name]]


def logits_table(results) -> str:
    heads = ["model", "all logits: mean", "std", "skewness", "50 largest / 0.6: mean", "std",
             "skewness"]
    rows = []
    for name in FOUR:
        row = [name]
        for kind in ("raw", "top_k"):
            for key in ("mean", "std", "skewness"):
                row.append(ex.spread(logit(results, name, kind, key), 2))
        rows.append(row)
    return ex.table(heads, rows)


def pairs_table(results, seeds: int) -> str:
    """Differences by seed; the one untrained model stands beside every seed."""
    before = [results["EM"][0]["summary"]["avg_at_k_before"]] * seeds
    rows = [["accuracy: EM minus before", ex.paired(results.accuracy("EM"), before)]]
    for first, then in (("EM, then GRPO", "GRPO"), ("GRPO, then EM", "GRPO")):
        difference = ex.paired(results.accuracy(first), results.accuracy(then))
        rows.append([f"{first} minus {then}", difference])
    runs = results["EM 40 updates"]
    last = runs[0]["probe"][-1]["step"]
    early, late = min(15, last), min(40, last)
    rows.append([f"accuracy after {early} updates minus after {late}",
                 ex.paired([near(run, "accuracy", early) for run in runs],
                           [near(run, "accuracy", late) for run in runs])])
    greedy = at_temperature(results, "EM", 0.0)
    rows.append(["greedy accuracy: EM minus before",
                 ex.paired(greedy, at_temperature(results, "base", 0.0) * seeds)])
    for name in ("EM", "GRPO"):
        for kind, what in (("raw", "all logits"), ("top_k", "the 50 largest")):
            trained = logit(results, name, kind, "skewness")
            untrained = logit(results, "base", kind, "skewness") * seeds
            head = f"skewness of {what}: {name} minus before"
            rows.append([head, ex.paired(trained, untrained)])
    return ex.table(["difference, paired by seed", "mean and its standard error"], rows)


def draw_course(axis, results) -> None:
    name = "EM 40 updates"
    x = [look["step"] for look in results[name][0]["probe"]]
    accuracy = results.probes(name, lambda look: look["accuracy"])
    agreement = results.probes(name, lambda look: look["agreement"])
    entropies = []
    for result in results[name]:
        start = result["rows"][0]["entropy"]
        entropies.append([row["entropy"] / start for row in result["rows"]])
    ex.band(axis, accuracy, "share that are right", PURPLE, x=x)
    ex.band(axis, agreement, "share that agree with the majority", lighter(PURPLE, -0.4), "--", x=x)
    made = range(len(entropies[0]))  # updates made when the answers of a step are sampled
    ex.band(axis, entropies, "entropy / its start", lighter(PURPLE, -0.8), ":", made, fill=False)
    ex.tidy(axis, "EM, one problem: sampled answers", "updates", legend=True)


def draw_heat(axis, results) -> None:
    looks = ((GREY, "-"), (PURPLE, "-"), (BLUE, "-"), (PURPLE, "--"))
    for name, (color, style) in zip(FOUR, looks, strict=True):
        by_temperature = [at_temperature(results, name, T) for T in TEMPERATURES]
        curves = list(zip(*by_temperature, strict=True))
        ex.band(axis, curves, name, color, style, x=TEMPERATURES)
    title = "share of sampled answers that are right"
    ex.tidy(axis, title, "temperature of the samples", legend=True)


def draw_seeds(axis, results) -> None:
    others = ("base", "GRPO", "EM 40 updates", *THEN)
    names = [name for name in results if name not in others]
    names.reverse()
    for y, name in enumerate(names):
        values = results.accuracy(name)
        color = PURPLE if name == "EM" else lighter(PURPLE, 0.5)
        if name == "entropy ascent":  # the control
            color = GREY
        axis.plot(values, [y] * len(values), "o", color=color, alpha=0.7)
        axis.plot(mean(values), y, "|", color="black", markersize=16)
    before = results["EM"][0]["summary"]["avg_at_k_before"]
    axis.axvline(before, color=GREY, linestyle=":")
    axis.set_yticks(range(len(names)), names)
    ex.tidy(axis, "every seed (dotted: before)", "share of sampled answers that are right")


def main():
    args = ex.arguments(__doc__, seeds=8, parts=("styles", "arms", "figure"))
    if "styles" in args.parts:
        styled = ex.Results(ex.runs("em", {name: FIRST[name] for name in STYLED}, args))
        tables = {"styles": styles_table(styled), "premise": premise_table()}
        ex.write("entropy_styles", styled, tables, page="entropy_min")
    if "arms" in args.parts:
        every_arm(args)
    if "figure" in args.parts:
        draw(ex.Results(stored(ex.PAGES / "entropy_min.json")))


def every_arm(args) -> None:
    seeds = args.seeds
    results = ex.Results(ex.runs("em", FIRST, args))
    results.update(ex.runs("em", THEN, args))
    args.seeds, args.more = 1, ""
    results.update(ex.runs("em", BASE, args))
    ex.write("entropy_min", results, {
        "arms": arms_table(results),
        "pairs": pairs_table(results, seeds),
        "course": course_table(results),
        "stop": stop_table(results),
        "heat": heat_table(results),
        "logits": logits_table(results),
    })


def draw(results) -> None:
    figure, axes = ex.plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True)
    draw_course(axes[0], results)
    draw_heat(axes[1], results)
    draw_seeds(axes[2], results)
    ex.save(figure, "entropy_min.png")


if __name__ == "__main__":
    main()
