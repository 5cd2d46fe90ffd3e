"""Figures of runs. Each run draws its own curve.png; several are compared by

    python -m common.plot runs/grpo runs/grpo-2 runs/bupo -o compare.png

Runs with the same flags but for the seed are one curve: their mean, with a band from the lowest to the highest. A method has the
same colour in every figure.
"""
import argparse
import json
import math
import pathlib

from common.errors import BadInput
from common.flags import OneLineParser, exit_on_bad_input

COLOURS = {"grpo": "#0072B2", "bupo": "#D55E00", "kl3_grpo": "#009E73", "ppo": "#CC79A7", "entropy_min": "#E69F00",
           "long_cot_sft": "#56B4E9"}
DASHES = ("-", "--", "-.", ":")
PANELS = {"reward": ("share of answers right", ("reward",)), "entropy": ("entropy, nats per token", ("entropy",)),
          "length": ("tokens per answer", ("length",)),
          "clip": ("share of tokens clipped", ("clip_fraction", "clip_up", "clip_down")),
          "seconds": ("seconds a step", ("seconds_sampling", "seconds_verifying", "seconds_training"))}


def pyplot():
    """matplotlib's pyplot, drawing into files alone; loaded only when something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def looks_of(names) -> list[dict]:
    """Colour and line of each name; four lines are told apart without colours."""
    colours = list(COLOURS.values())
    return [dict(label=name, color=colours[i % len(colours)], linestyle=DASHES[i % len(DASHES)], linewidth=2)
            for i, name in enumerate(names)]


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and those before it, a tenth of all at most."""
    width = max(1, len(values) // 10)
    return [sum(values[max(0, i + 1 - width):i + 1]) / min(width, i + 1) for i in range(len(values))]


def plot_run(folder: pathlib.Path) -> None:
    """Reads metrics.jsonl and summary.json of a run's folder, writes curve.png beside them."""
    plt = pyplot()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    steps = [row["step"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    titles = {"reward": "share of answers right", "length": "tokens per answer", "entropy": "entropy, nats per token"}
    for axis, (name, title) in zip(axes, titles.items()):
        values = [row.get(name, float("nan")) for row in rows]  # a method without a reward has no curve there
        axis.plot(steps, values, color="#0072B2", alpha=0.35, linewidth=1)
        axis.plot(steps, smooth(values), color="#0072B2", linewidth=2.5, label=f"mean of {max(1, len(values) // 10)} steps")
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.25)
        for row, following in zip(rows, rows[1:]):
            if row.get("layer") != following.get("layer"):
                axis.axvline(row["step"] + 0.5, color="black", linestyle=":", linewidth=1.5)
                axis.annotate(f" layer {row['layer']} | whole model", (row["step"] + 0.5, 0.94),
                              xycoords=("data", "axes fraction"), fontsize=10)
    if "avg_at_k_after" in summary:
        for when, x in (("before", 0), ("after", steps[-1])):
            axes[0].errorbar(x, summary[f"avg_at_k_{when}"], summary[f"standard_error_{when}"], fmt="o", color="#D55E00",
                             capsize=4, label="held-out, with standard error" if when == "before" else None)
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize=10, loc="lower right")
    figure.savefig(folder / "curve.png", dpi=110)
    plt.close(figure)


READINGS = {"entropy": "as in the paper, un-normed", "final_norm": "control: with the final norm", "l2_norm": "control: size"}


def plot_internal(views: dict[str, dict], folder: pathlib.Path) -> None:
    """flow.png, changes.png and cosines.png of common.internal_policy: all models in each, told apart by colour and by line.

    views: {model: internal_view's, as lists, with "vocabulary": V and "boundary": {quantity: {tolerance: block or None}}}.
    """
    plt = pyplot()
    looks = looks_of(views)
    for name, draw in (("flow.png", draw_flow), ("changes.png", draw_changes), ("cosines.png", draw_cosines)):
        figure, axes = draw(plt, looks, list(views.values()))
        for axis in axes.flat:
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=12)
            axis.locator_params(axis="x", integer=True)
        axes.flat[0].legend(fontsize=12)
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)


def draw_flow(plt, looks, views):
    """A line through layer in -> attention -> FFN -> layer out takes block l from x = l - 1 to l, in thirds."""
    figure, axes = plt.subplots(3, 1, figsize=(11, 11), sharex=True, constrained_layout=True)
    for axis, (quantity, title) in zip(axes, READINGS.items()):
        for look, view in zip(looks, views):
            of = view[quantity]
            line = [of["layer_in"][0]] + [y for three in zip(of["attn_out"], of["ffn_out"], of["layer_out"]) for y in three]
            x = [i / 3 for i in range(len(line))]
            step = 3 if quantity == "l2_norm" else 1  # the size of what a module adds is no station of the stream's
            axis.plot(x[::step], line[::step], **look, alpha=0.6)
            for start, mark, face in ((0, "o", look["color"]), (1, "^", "white"), (2, "s", "white")):
                axis.plot(x[start::3], line[start::3], mark, color=look["color"], markersize=6, markerfacecolor=face)
            if quantity != "l2_norm":
                axis.axhline(math.log(view["vocabulary"]), color=look["color"], linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=14)
        axis.set_ylabel("L2 norm" if quantity == "l2_norm" else "entropy (nats per token)", fontsize=13)
    axes[2].set_yscale("log")
    axes[2].set_xlabel("block   (dots: layer in and out;  triangles: attention;  squares: FFN;  dotted line: ln V)", fontsize=14)
    return figure, axes


def draw_changes(plt, looks, views):
    """Rows attention and FFN, columns as in the paper and with the final norm."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True, constrained_layout=True)
    for row, (module, what) in zip(axes, (("attn", "attention"), ("ffn", "FFN"))):
        for axis, quantity in zip(row, ("entropy", "final_norm")):
            for look, view in zip(looks, views):
                change = [out - into for out, into in zip(view[quantity][f"{module}_out"], view[quantity][f"{module}_in"])]
                axis.plot(range(1, len(change) + 1), change, marker="o", **look)
                boundary = view["boundary"][quantity][0.05]
                if module == "ffn" and boundary:
                    axis.axvline(boundary + 0.5, color=look["color"], linestyle=look["linestyle"], linewidth=1)
            axis.axhline(0, color="black", linewidth=1)
            axis.set_title(f"{what}, {READINGS[quantity]}", fontsize=14)
            axis.set_ylabel("entropy out − in (nats)", fontsize=13)
    for axis in axes[1]:
        axis.set_xlabel("block (thin vertical line: end of the exploration region)", fontsize=12)
    return figure, axes


def draw_cosines(plt, looks, views):
    """Cosines know no size, so the control below is how large a module's output is beside the stream."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True, constrained_layout=True)
    for column, module, what, stream in zip(axes.T, ("attn", "ffn"), ("attention", "FFN"), ("H^{l-1}", "H^{l-1}+A^l")):
        for look, view in zip(looks, views):
            blocks, size = range(1, len(view["cosine"][module]) + 1), view["l2_norm"]
            column[0].plot(blocks, view["cosine"][module], marker="o", **look)
            column[1].plot(blocks, [y / x for y, x in zip(size[f"{module}_out"], size["layer_in"])], marker="o", **look)
        column[0].axhline(0, color="black", linewidth=1)
        column[0].set_title(f"{what}: does it write along the stream?", fontsize=14)
        column[0].set_ylabel(f"cos(${module[0].upper()}^l$, ${stream}$)", fontsize=13)
        column[1].set_title("control: how much, mean size over mean size", fontsize=14)
        column[1].set_ylabel(f"‖${module[0].upper()}^l$‖ / ‖$H^{{l-1}}$‖", fontsize=13)
        column[1].set_ylim(bottom=0)
        column[1].set_xlabel("block", fontsize=13)
    return figure, axes


def plot_logits(found: dict[str, dict], path: pathlib.Path) -> None:
    """Histograms of entropy_min.logit_statistics, all models in both: every logit on the left, the authors' statistic right."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), constrained_layout=True)
    for axis, key, title in zip(axes, ("raw", "top_k"), ("all logits", "the largest, over the sampling temperature")):
        for look, of in zip(looks_of(found), found.values()):
            share = [sum(of[key]["histogram"][x:x + 3]) for x in range(0, 600, 3)]
            inside = [x for x, y in enumerate(share) if y > 3e-5]
            axis.plot([-59.7 + 0.6 * x for x in range(inside[0], inside[-1] + 1)], share[inside[0]:inside[-1] + 1],
                      **look | {"label": f"{look['label']}: skewness {of[key]['skewness']:.2f}"})
            axis.axvline(of[key]["mean"], color=look["color"], linestyle=look["linestyle"], linewidth=1)
        axis.set_title(title, fontsize=14)
        axis.set_xlabel("logit (thin vertical line: mean)", fontsize=12)
        axis.set_ylabel("share in a bin of 0.6", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=11, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def read_run(folder: str) -> dict:
    """A run's folder -> {"script", "flags", "rows", "summary"}. BadInput if it is none, or has no step yet."""
    path = pathlib.Path(folder)
    try:
        config = json.loads((path / "config.json").read_text())
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
        summary = json.loads((path / "summary.json").read_text()) if (path / "summary.json").exists() else {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: not a folder of a run ({type(error).__name__})") from error
    if not rows:
        raise BadInput(f"{folder}: no step in its metrics.jsonl yet")
    return {"script": config["script"], "flags": config["flags"], "rows": rows, "summary": summary}


def group_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in their seed alone belong together -> {label: runs}; labels name the flags that tell groups apart."""
    aside = {"seed", "output", "resume", "save_every", "device"}
    same = lambda run: (run["script"], json.dumps({k: v for k, v in run["flags"].items() if k not in aside}, sort_keys=True))
    groups = {}
    for run in runs:
        groups.setdefault(same(run), []).append(run)
    labelled = {}
    for (script, _), of in groups.items():
        kin = [other[0]["flags"] for (name, _), other in groups.items() if name == script]
        differ = [k for k in kin[0] if k not in aside and len({json.dumps(flags.get(k)) for flags in kin}) > 1]
        labelled[" ".join([script, *(f"{k.replace('_', '-')}={of[0]['flags'].get(k)}" for k in differ)])] = of
    return labelled


def plot_runs(groups: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Reward, entropy, length, clip fraction and seconds by step, accuracy before and after; means of a tenth of the run."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), constrained_layout=True)
    drawn = {}
    for label, runs in groups.items():
        script = runs[0]["script"]
        drawn[script] = drawn.get(script, -1) + 1
        look = dict(color=COLOURS.get(script, "#777777"), linestyle=DASHES[drawn[script] % 4])
        for axis, (title, keys) in zip(axes.flat, PANELS.values()):
            axis.set_title(title, fontsize=15)
            curves = []
            for run in runs:
                values = [sum(row[key] for key in keys if key in row) if any(key in row for key in keys) else math.nan
                          for row in run["rows"]]
                curves.append(smooth(values))
            columns, steps = list(zip(*curves)), [row["step"] for row in runs[0]["rows"]]
            if any(not math.isnan(y) for column in columns for y in column):
                axis.plot(steps[:len(columns)], [sum(c) / len(c) for c in columns], linewidth=2.5, label=label, **look)
                axis.fill_between(steps[:len(columns)], [min(c) for c in columns], [max(c) for c in columns], color=look["color"],
                                  alpha=0.15, linewidth=0)
        pairs = [(run["summary"]["avg_at_k_before"], run["summary"]["avg_at_k_after"]) for run in runs
                 if "avg_at_k_after" in run["summary"]]
        for before, after in pairs:
            axes[1][2].plot(["before", "after"], [before, after], alpha=0.35, linewidth=1, **look)
        if pairs:
            axes[1][2].plot(["before", "after"], [sum(x) / len(x) for x in zip(*pairs)], marker="o", linewidth=2.5, **look)
    axes[1][2].set_title("held-out accuracy", fontsize=15)
    for axis in axes.flat:
        axis.tick_params(labelsize=13)
        axis.grid(alpha=0.25)
        if axis is not axes[1][2]:
            axis.set_xlabel("step", fontsize=13)
    axes[1][0].set_ylim(bottom=0, top=max(0.01, axes[1][0].get_ylim()[1]))
    axes[1][1].set_ylim(bottom=0)
    figure.legend(*axes[0][1].get_legend_handles_labels(), fontsize=13, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@exit_on_bad_input
def main(argv=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("-o", "--output", required=True, help="the .png (or .pdf, .svg) to write")
    args = parser.parse_args(argv)
    output = pathlib.Path(args.output)
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"-o {output}: end it in .png, .pdf or .svg")
    groups = group_runs([read_run(folder) for folder in args.runs])
    for label, runs in groups.items():
        print(f"{label}: {len(runs)} run(s), seeds {', '.join(str(run['flags'].get('seed')) for run in runs)}")
    try:
        plot_runs(groups, output)
    except OSError as error:
        raise BadInput(f"-o {output}: cannot write there ({error.strerror})") from error
    print(f"written: {output}")


if __name__ == "__main__":
    main()
