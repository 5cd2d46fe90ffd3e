"""One-shot entropy minimization's claims on the embedded model -> docs/results/entropy_min.{json,md} and its figures.

    python docs/em_results.py              # 15 arms, eight seeds, two runs at a time: twenty minutes; finished runs are kept
"""
import statistics
from collections import Counter

import experiment as ex
import matplotlib.pyplot as plt
from experiment import BLUE, GREEN, GREY, ORANGE

from common.evaluate import evaluate
from common.models import load_model, load_tokenizer
from common.sampling import sample
from common.verify import extract_answer
from entropy_min import logit_statistics

TEMPERATURES = (0.0, 0.3, 0.6, 1.0, 1.5)
EVAL = "--eval-problems 128 --eval-k 8"
STOPS = (0.7, 0.5, 0.3, 0.2)


def shape_of(result: dict) -> dict:
    """Format and skill apart: share of answers that end in a box, and accuracy among those."""
    answers = [("\\boxed{" in text, right) for row in result["answers"]
               for text, right in zip(row["responses"], row["correct"])]
    parsed = [right for found, right in answers if found]
    return {"accuracy": result["avg_at_k"], "length": result["length"], "parsed": len(parsed) / len(answers),
            "accuracy_parsed": statistics.fmean(parsed) if parsed else 0.0}


def probe(run) -> dict:
    """Labelled: accuracy on 64 held-out problems. Unlabelled, as a stopping rule may see it: how many of a problem's answers
    agree with their majority."""
    result = evaluate(run.model, run.tokenizer, run.held_out[:64], 8, run.cfg.max_new_tokens, seed=99)
    votes = [Counter(extract_answer(text) for text in row["responses"]).most_common(1)[0][1] / 8 for row in result["answers"]]
    return {**shape_of(result), "agreement": statistics.fmean(votes)}


def after(run) -> dict:
    """Accuracy at several temperatures, and the logits on answers of the embedded model, the same ones for every model."""
    base, tokenizer = load_model("tiny", "cpu", "float32"), load_tokenizer("tiny")
    answers = sample(base, tokenizer, [row["prompt"] for row in run.held_out[:32]], 1, run.cfg.max_new_tokens, 0.6, seed=3)
    logits = logit_statistics(run.model, answers, 4096)
    for of in logits.values():
        del of["histogram"]
    rows, longest = run.held_out[:64], run.cfg.max_new_tokens
    heat = {str(T): shape_of(evaluate(run.model, run.tokenizer, rows, 8 if T else 1, longest, T, seed=7)) for T in TEMPERATURES}
    return {"logits": logits, "temperatures": heat}


def ascend(_run, optimizer):
    """The control: the same updates uphill."""
    optimizer.adamw.param_groups[0]["maximize"] = True
    return optimizer


RL = "--steps 16"
FIRST = {  # name -> script, flags, what is watched
    "EM": ("entropy_min.py", EVAL, dict(after=after)),
    "EM 40 updates": ("entropy_min.py", f"{EVAL} --steps 40", dict(probe=probe, every=1)),
    "EM lr 6e-4": ("entropy_min.py", f"{EVAL} --lr 6e-4"),
    "EM lr 1.5e-4": ("entropy_min.py", f"{EVAL} --lr 1.5e-4"),
    "loss T 1": ("entropy_min.py", f"{EVAL} --loss-temperature 1"),
    "loss T 1.5": ("entropy_min.py", f"{EVAL} --loss-temperature 1.5"),
    "sampled as the script": ("entropy_min.py", f"{EVAL} --top-p 0.95 --repetition-penalty 1.15"),
    "authors' mask": ("entropy_min.py", f"{EVAL} --authors-mask"),
    "4 problems": ("entropy_min.py", f"{EVAL} --shots 4"),
    "16 problems": ("entropy_min.py", f"{EVAL} --shots 16"),
    "chosen by variance": ("entropy_min.py", f"{EVAL} --select 32"),
    "entropy ascent": ("entropy_min.py", EVAL, dict(prepare=ascend)),
    "GRPO": ("grpo.py", f"{EVAL} {RL}", dict(after=after)),
}
THEN = {
    "EM, then GRPO": ("grpo.py", f"{EVAL} {RL} --model {{runs}}/EM-{{seed}}/model", dict(after=after)),
    "GRPO, then EM": ("entropy_min.py", f"{EVAL} --model {{runs}}/GRPO-{{seed}}/model"),
}
BASE = {"base": ("entropy_min.py", "--eval-problems 64 --eval-k 2 --steps 1 --lr 1e-12", dict(after=after))}  # the model as it is


def near(result, key, update) -> float:
    """Mean over the look after `update` updates and its two neighbours: one look is 512 answers and noisy."""
    return statistics.fmean(p[key] for p in result["probe"] if abs(p["step"] - update) <= 1)


def floor(result, share) -> int:
    """Updates made when the sampled entropy was first seen below `share` of its first value (all of them if never)."""
    start = result["rows"][0]["entropy"]
    return next((i for i, row in enumerate(result["rows"]) if row["entropy"] < share * start), len(result["rows"]))


def first_fall(result) -> int:
    """Updates made when the agreement of answers was first seen to fall, three looks against the three before."""
    votes = [p["agreement"] for p in result["probe"]]
    return next((i for i in range(5, len(votes)) if sum(votes[i - 2:i + 1]) < sum(votes[i - 5:i - 2])), len(votes) - 1)


def main():
    args = ex.arguments(__doc__, seeds=8)
    results = ex.runs("em", FIRST, args.seeds, args.workers)
    results |= ex.runs("em", THEN, args.seeds, args.workers) | ex.runs("em", BASE, 1, args.workers)
    after_ = lambda name: [r["summary"]["avg_at_k_after"] for r in results[name]]
    names = [name for name in (*FIRST, *THEN) if name != "base"]
    before = results["EM"][0]["summary"]["avg_at_k_before"]
    arms = ex.table(["arm", "accuracy after", "minus EM, paired seeds", "Pass@8", "tokens"],
                 [[name, ex.spread(after_(name)), "" if name == "EM" else ex.paired(after_(name), after_("EM")),
                   f"{statistics.fmean(r['summary']['pass_at_after']['8'] for r in results[name]):.3f}",
                   f"{statistics.fmean(r['summary']['length_after'] for r in results[name]):.0f}"] for name in names])
    arms += f"\nBefore: {before:.3f}. Accuracy: Avg@8 at temperature 1 on 128 held-out problems, mean (lowest to highest seed).\n"

    long = results["EM 40 updates"]
    steps = [p["step"] for p in long[0]["probe"]]
    seeds_at = lambda key, update: [next(p[key] for p in r["probe"] if p["step"] == update) for r in long]
    mean = lambda key, update: statistics.fmean(seeds_at(key, update))
    course = ex.table(["updates", "accuracy", "lowest and highest seed", "parsed", "accuracy of the parsed", "tokens",
                       "agreement", "loss"],
                      [[update, f"{mean('accuracy', update):.3f}",
                        "{:.3f}, {:.3f}".format(*(f(seeds_at("accuracy", update)) for f in (min, max))),
                        f"{mean('parsed', update):.3f}", f"{mean('accuracy_parsed', update):.3f}",
                        f"{mean('length', update):.0f}", f"{mean('agreement', update):.3f}",
                        f"{statistics.fmean(r['rows'][min(update, 39)]['loss'] for r in long):.4f}"]
                       for update in (0, 2, 4, 6, 8, 10, 15, 16, 20, 25, 30, 35, 40)])
    at = lambda rule: [near(r, "accuracy", rule(r)) for r in long]
    peak = [max(near(r, "accuracy", step) for step in steps) for r in long]
    rules = {"10 updates": lambda r: 10, "agreement of answers falls": first_fall,
             **{f"entropy below {share} of its start": lambda r, s=share: floor(r, s) for share in STOPS}}
    stops = ex.table(["rule", "updates", "accuracy where it stops", "below the seed's peak"],
                     [["the peak itself (needs labels)", "", ex.spread(peak), ""],
                      *([name, ex.spread([rule(r) for r in long], 0), ex.spread(at(rule)), ex.paired(peak, at(rule))]
                        for name, rule in rules.items())])

    four = ["base", "EM", "GRPO", "EM, then GRPO"]
    heat = ex.table(["temperature of the evaluation", *four],
                 [[T if T else "greedy", *(ex.spread([r["after"]["temperatures"][str(T)]["accuracy"] for r in results[name]])
                                           for name in four)] for T in TEMPERATURES])
    form = ex.table(["at temperature 1", "accuracy", "parsed", "accuracy of the parsed", "tokens"],
                 [[name, *(f"{statistics.fmean(r['after']['temperatures']['1.0'][key] for r in results[name]):.3f}"
                           for key in ("accuracy", "parsed", "accuracy_parsed", "length"))] for name in four])
    of = lambda name, which, key: ex.spread([r["after"]["logits"][which][key] for r in results[name]], 2)
    logits = ex.table(["model", "all logits: mean", "std", "skewness", "50 largest / 0.6: mean", "std", "skewness"],
                   [[name, *(of(name, which, key) for which in ("raw", "top_k") for key in ("mean", "std", "skewness"))]
                    for name in four])
    skewness = lambda name, which: [r["after"]["logits"][which]["skewness"] for r in results[name]]
    greedy = lambda name: [r["after"]["temperatures"]["0.0"]["accuracy"] for r in results[name]]
    every = lambda values: values * args.seeds  # the one base for all seeds
    pairs = ex.table(["difference, paired by seed", "mean and its standard error"], [
        ["accuracy: EM minus before", ex.paired(after_("EM"), every([before]))],
        ["EM, then GRPO minus GRPO", ex.paired(after_("EM, then GRPO"), after_("GRPO"))],
        ["GRPO, then EM minus GRPO", ex.paired(after_("GRPO, then EM"), after_("GRPO"))],
        ["accuracy after 15 updates minus after 40",
         ex.paired(*([near(r, "accuracy", update) for r in long] for update in (15, 40)))],
        ["greedy accuracy: EM minus before", ex.paired(greedy("EM"), every(greedy("base")))],
        *([f"skewness of {what}: {name} minus before", ex.paired(skewness(name, which), every(skewness("base", which)))]
          for name in ("EM", "GRPO") for which, what in (("raw", "all logits"), ("top_k", "the 50 largest")))])
    ex.write("entropy_min", results, {"arms": arms, "pairs": pairs, "course": course, "stops": stops, "heat": heat,
                                    "form": form, "logits": logits})

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), constrained_layout=True)
    ex.band(axes[0], [[p["accuracy"] for p in r["probe"]] for r in long], "accuracy, held-out", ORANGE, x=steps)
    ex.band(axes[0], [[p["agreement"] for p in r["probe"]] for r in long], "agreement with the majority", GREEN, "--", x=steps)
    entropies = [[row["entropy"] / r["rows"][0]["entropy"] for row in r["rows"]] for r in long]
    ex.band(axes[0], entropies, "entropy / its start", GREY, ":")
    ex.tidy(axes[0], "one problem, 40 updates, eight seeds", "updates", legend=True)
    for name, color, style in zip(four, (GREY, ORANGE, BLUE, BLUE), ("-", "-", "-", ":")):
        curves = [[r["after"]["temperatures"][str(T)]["accuracy"] for T in TEMPERATURES] for r in results[name]]
        ex.band(axes[1], curves, name, color, style, x=TEMPERATURES)
    ex.tidy(axes[1], "accuracy by sampling temperature", "temperature", legend=True)
    order = [name for name in names if name in FIRST and name not in ("GRPO", "EM 40 updates")]
    for y, name in enumerate(reversed(order)):
        axes[2].plot(after_(name), [y] * args.seeds, "o", color=ORANGE if name == "EM" else GREY, alpha=0.5)
        axes[2].plot(statistics.fmean(after_(name)), y, "|", color="black", markersize=16)
    axes[2].axvline(before, color=GREY, linestyle=":")
    axes[2].set_yticks(range(len(order)), list(reversed(order)))
    ex.tidy(axes[2], "each seed (dotted: before)", "accuracy after")
    figure.savefig(ex.ROOT / "docs" / "results" / "entropy_min.png", dpi=110)


if __name__ == "__main__":
    main()
