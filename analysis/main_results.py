"""All methods side by side on the embedded model -> results/main.{json,md,png}.

    python -m analysis.main_results     # eleven methods, five seeds, two runs at a time: 40 minutes
    python -m analysis.main_results --parts figure      # drawn again from the JSON

4,096 answers per run, the teacher's among them, where a method has no number of its own (one-shot
EM: ten updates of 64 answers; fine-tuning: 2,048 answers of a teacher). Every run starts from the
same model. Accuracy: 8 answers to each of 1,024 held-out problems.
"""
import json
from dataclasses import dataclass

from analysis import experiment as ex
from analysis.plot import COLOURS, lighter, stored

EVAL = "--eval-problems 1024"


@dataclass
class Method(ex.Arm):
    answers: int = 4096
    labels: int = 256
    start: str = ""  # the method whose model it starts from


DR_GRPO = f"{EVAL} --advantage dr_grpo --aggregation constant"
FROM_EM = f"{EVAL} --steps 27 --model {{runs}}/one-shot_EM-{{seed}}/model"
FROM_SFT = f"{EVAL} --steps 16 --max-new-tokens 112 --model {{runs}}/long-CoT_SFT-{{seed}}/model"
ARMS = {
    "GRPO": Method("grpo.py", EVAL),
    "RLOO": Method("grpo.py", f"{EVAL} --advantage rloo", style="--"),
    "REINFORCE++": Method("grpo.py", f"{EVAL} --advantage reinforce++", style="-."),
    "Dr. GRPO": Method("grpo.py", DR_GRPO, style=":"),
    "PPO": Method("ppo.py", EVAL),
    "BuPO": Method("bupo.py", EVAL),
    "ATR-GRPO (4 updates, 1e-4)": Method("kl3_grpo.py", EVAL),
    "one-shot EM": Method("entropy_min.py", EVAL, answers=640, labels=0),
    "long-CoT SFT": Method("long_cot_sft.py", f"{EVAL} --max-new-tokens 112", answers=2048),
}
SECOND = {
    "EM, then GRPO": Method("grpo.py", FROM_EM, style="--", labels=216, start="one-shot EM"),
    "SFT, then PPO": Method("ppo.py", FROM_SFT, style="--", labels=384, start="long-CoT SFT"),
}
METHODS = ARMS | SECOND


def colour(name: str) -> str:
    first = METHODS[name].start or name
    return COLOURS[METHODS[first].script.removesuffix(".py")]


def line(results, name: str) -> list:
    """A method's row of the table."""
    accuracy = results.accuracy(name)
    seconds = ex.mean(results.summary(name, "seconds"))
    if METHODS[name].start:  # whose seconds count too
        seconds += ex.mean(results.summary(METHODS[name].start, "seconds"))
    error = ex.standard_error(accuracy)
    entropy = ""  # fine-tuning samples nothing
    if "entropy" in results[name][0]["rows"][0]:
        entropy = f"{ex.mean(results.metric(name, 'entropy', last=4)):.3f}"
    return [
        name,
        f"{ex.mean(accuracy):.3f} ± {error:.3f} ({min(accuracy):.3f} to {max(accuracy):.3f})",
        "" if name == "GRPO" else ex.paired(accuracy, results.accuracy("GRPO")),
        f"{ex.mean(results.pass_at(name, 8)):.3f}",
        f"{ex.mean(results.summary(name, 'length_after')):.0f}",
        entropy,
        f"{seconds:.0f}",
        METHODS[name].answers,
        METHODS[name].labels,
    ]


def all_methods(results, seeds: int) -> str:
    start = results["GRPO"][0]["summary"]
    before = ["before", f"{start['avg_at_k_before']:.3f}", "",
              f"{start['pass_at_before']['8']:.3f}", f"{start['length_before']:.0f}"]
    heads = ["method", "Avg@8", "minus GRPO, paired", "Pass@8", "tokens", "entropy", "seconds",
             "answers drawn", "labels"]
    rows = [[*before, "", "", "", ""], *(line(results, name) for name in METHODS)]
    errors = [ex.mean(results.summary(name, "standard_error_after")) for name in METHODS]
    return ex.table(heads, rows) + (
        f"\nAvg@8: mean of 8 answers at temperature 1 to each of 1,024 held-out problems; mean of "
        f"{seeds} seeds ± its standard error (lowest to highest seed). All have the same problems; "
        f"one run's standard error over problems is {ex.mean(errors):.3f}. Entropy: nats per "
        "token, last 4 steps. Seconds: of one core while another run has the other, evaluation "
        "included.\n")


def bupo_twice(results) -> str:
    """BuPO minus its rivals, with the seeds of bupo.json beside these."""
    earlier = {}
    for name, seeds in json.loads((ex.PAGES / "bupo.json").read_text()).items():
        earlier[name] = [result["avg_at_k_after"] for result in seeds]
    rows = []
    for rival in ("GRPO", "RLOO", "REINFORCE++"):
        these = results.accuracy("BuPO"), results.accuracy(rival)
        those = earlier["BuPO"], earlier[rival]
        together = these[0] + those[0], these[1] + those[1]
        rows.append([rival, ex.paired(*these), ex.paired(*those), ex.paired(*together)])
    return ex.table(["BuPO minus", "these seeds", "those of bupo.md", "all"], rows)


def draw_rewards(axis, results) -> None:
    for name, method in METHODS.items():
        if "reward" not in results[name][0]["rows"][0]:
            continue
        curves = results.curves(name, "reward")
        start = METHODS[method.start].answers if method.start else 0
        x = [start + 128 * (step + 1) for step in range(len(curves[0]))]
        ex.band(axis, curves, name, colour(name), method.style, x, fill=name == "GRPO")
    title = "training: share of sampled answers that are right"
    ex.tidy(axis, title, "answers drawn (means of four steps; band: GRPO's seeds)", legend=True)


def draw_accuracy(axis, results) -> None:
    names = sorted(METHODS, key=lambda name: ex.mean(results.accuracy(name)))
    for y, name in enumerate(names):
        values = results.accuracy(name)
        white = 0.2 if METHODS[name].style == "-" else 0.6
        axis.barh(y, ex.mean(values), color=lighter(colour(name), white))
        axis.plot(values, [y] * len(values), "o", color="black", markersize=4)
    before = results["GRPO"][0]["summary"]["avg_at_k_before"]
    axis.axvline(before, color="black", linestyle=":", linewidth=1.5)
    axis.annotate(" before", (before, len(names) - 0.45), fontsize=11)
    axis.set_yticks(range(len(names)), names, fontsize=12)
    axis.set_axisbelow(True)
    ex.tidy(axis, "held-out problems: mean and every seed",
            "share of sampled answers that are right")
    axis.tick_params(axis="y", labelsize=12)


def main():
    args = ex.arguments(__doc__, seeds=5, parts=("runs", "figure"))
    if "runs" in args.parts:
        results = ex.Results(ex.runs("main", ARMS, args))
        results.update(ex.runs("main", SECOND, args))
        tables = {"all": all_methods(results, args.seeds), "twice": bupo_twice(results)}
        ex.write("main", results, tables)
    if "figure" in args.parts:
        results = ex.Results(stored(ex.PAGES / "main.json"))
        figure, axes = ex.plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True,
                                       width_ratios=(1.2, 1))
        draw_rewards(axes[0], results)
        draw_accuracy(axes[1], results)
        ex.save(figure, "main.png")


if __name__ == "__main__":
    main()
