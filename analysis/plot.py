"""Curves of runs: what metrics.jsonl and summary.json hold, drawn.

    python -m analysis.plot runs/grpo                                    # runs/grpo/curve.png
    python -m analysis.plot runs/grpo runs/grpo-2 runs/bupo -o compare.png

Runs with the same flags but for the seed are one curve: their mean, with a band from the lowest to
the highest. A method has the same colour in every figure. Curves are means over a tenth of a run.
"""
import json
import math
import pathlib
import statistics

from common.flags import BadInput, exit_on_bad_input, new_parser

COLOURS = {
    "grpo": "#0072B2",
    "bupo": "#E69F00",
    "kl3_grpo": "#009E73",
    "ppo": "#D55E00",
    "entropy_min": "#CC79A7",
    "long_cot_sft": "#56B4E9",
}
DASHES = ("-", "--", "-.", ":")
PANELS = {  # title -> the metrics that are added up
    "reward, mean over answers": ["reward"],
    "entropy, nats per token": ["entropy"],
    "tokens per answer": ["length"],
    "share of tokens clipped": ["clip_fraction", "clip_up", "clip_down"],
    "seconds per step": ["seconds"],
}
ASIDE = {"seed", "output", "resume", "device"}  # flags that do not tell curves apart


def pyplot():
    """matplotlib's pyplot, which draws into files alone; loaded only when something is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def smooth(values: list[float], width: int | None = None) -> list[float]:
    """The mean of each value and of those before it, `width` in all; default: a tenth of them."""
    width = width or max(1, len(values) // 10)
    means = []
    for end in range(1, len(values) + 1):
        means.append(statistics.fmean(values[max(0, end - width):end]))
    return means


def lighter(colour: str, share: float) -> tuple:
    """A shade of a colour, mixed with this share of white; of black, if it is negative."""
    from matplotlib.colors import to_rgb
    end = 1.0 if share > 0 else 0.0
    return tuple(part + abs(share) * (end - part) for part in to_rgb(colour))


def stored(path: pathlib.Path) -> dict[str, list[dict]]:
    """A page's JSON -> arm -> runs with "summary", "rows", "probe", "after", to draw them again."""
    results = {}
    for arm, runs in json.loads(path.read_text()).items():
        results[arm] = []
        for run in runs:
            names = list(run["by_step"])
            steps = zip(*run["by_step"].values(), strict=True)
            rows = [dict(zip(names, step, strict=True)) for step in steps]
            results[arm].append({"summary": run, "rows": rows, "probe": run["probe"],
                                 "after": run["at_the_end"]})
    return results


def read_run(folder: str) -> dict:
    """A run's folder -> "script", "flags", "rows", "summary". BadInput if there is no step yet."""
    path = pathlib.Path(folder)
    summary = path / "summary.json"
    try:
        config = json.loads((path / "config.json").read_text())
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        run = {"script": config["script"], "flags": config["flags"], "rows": rows}
        run["summary"] = json.loads(summary.read_text()) if summary.exists() else {}
    except (OSError, ValueError, KeyError) as error:
        reason = type(error).__name__
        raise BadInput(f"{folder}: not a folder of a run ({reason})") from error
    if not rows:
        raise BadInput(f"{folder}: no step in its metrics.jsonl yet")
    return run


def kept_flags(run: dict) -> dict:
    return {name: value for name, value in run["flags"].items() if name not in ASIDE}


def group_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in their seed alone belong together -> label -> runs.

    A label is the script and the flags that tell it from the other groups of the same script.
    """
    groups = {}
    for run in runs:
        same = json.dumps([run["script"], kept_flags(run)], sort_keys=True)
        groups.setdefault(same, []).append(run)
    labelled = {}
    for group in groups.values():
        script = group[0]["script"]
        flags = kept_flags(group[0])
        kin = [kept_flags(run) for run in runs if run["script"] == script]
        label = [script]
        for name, value in flags.items():
            if any(other.get(name) != value for other in kin):
                label.append(f"{name.replace('_', '-')}={value}")
        labelled[" ".join(label)] = group
    return labelled


def panel_values(run: dict, names: list[str]) -> list[float]:
    """A metric by step, NaN where the method has none."""
    values = []
    for row in run["rows"]:
        found = [row[name] for name in names if name in row]
        values.append(sum(found) if found else math.nan)
    return values


def draw_curve(axis, runs, names, label, look) -> None:
    curves = [smooth(panel_values(run, names)) for run in runs]
    columns = list(zip(*curves, strict=False))
    if all(math.isnan(y) for column in columns for y in column):
        return
    steps = [row["step"] for row in runs[0]["rows"]][:len(columns)]
    means = [statistics.fmean(column) for column in columns]
    axis.plot(steps, means, linewidth=2.5, label=label, **look)
    lowest = [min(column) for column in columns]
    highest = [max(column) for column in columns]
    axis.fill_between(steps, lowest, highest, color=look["color"], alpha=0.15, linewidth=0)


def draw_accuracy(axis, runs, look) -> None:
    """On held-out problems, before and after: every run thin, their mean thick."""
    pairs = []
    for run in runs:
        if "avg_at_k_after" in run["summary"]:
            pairs.append([run["summary"]["avg_at_k_before"], run["summary"]["avg_at_k_after"]])
    for pair in pairs:
        axis.plot(["before", "after"], pair, alpha=0.35, linewidth=1, **look)
    if pairs:
        means = [statistics.fmean(values) for values in zip(*pairs, strict=True)]
        axis.plot(["before", "after"], means, marker="o", linewidth=2.5, **look)


def mark_switch(axis, rows) -> None:
    """BuPO: a vertical line where the first phase ends."""
    for row, following in zip(rows, rows[1:], strict=False):
        if row.get("layer") != following.get("layer"):
            axis.axvline(row["step"] + 0.5, color="black", linestyle=":", linewidth=1.5)


def plot_runs(groups: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Six panels: reward, entropy, length, clipped tokens, seconds, accuracy before and after."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), constrained_layout=True)
    drawn = {}
    for label, runs in groups.items():
        script = runs[0]["script"]
        number = drawn.get(script, 0)
        drawn[script] = number + 1
        look = {"color": COLOURS.get(script, "#777777"), "linestyle": DASHES[number % 4]}
        for axis, names in zip(axes.flat, PANELS.values(), strict=False):
            draw_curve(axis, runs, names, label, look)
            mark_switch(axis, runs[0]["rows"])
        draw_accuracy(axes[1][2], runs, look)
    titles = [*PANELS, "share of sampled answers that are right"]
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=13)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.25)
    for axis in axes.flat[:5]:
        axis.set_xlabel("step", fontsize=12)
    axes[1][2].set_xlabel("held-out problems", fontsize=12)
    axes[1][0].set_ylim(bottom=0, top=max(0.01, axes[1][0].get_ylim()[1]))
    axes[1][1].set_ylim(bottom=0)
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=11, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@exit_on_bad_input()
def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("-o", "--output", help="the .png, .pdf or .svg to write; default, for one "
                        "run: curve.png in its folder")
    args = parser.parse_args(argv)
    if args.output is None and len(args.runs) > 1:
        raise BadInput("several runs: name the figure, -o compare.png")
    output = pathlib.Path(args.output or pathlib.Path(args.runs[0]) / "curve.png")
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"-o {output}: end it in .png, .pdf or .svg")
    groups = group_runs([read_run(folder) for folder in args.runs])
    for label, runs in groups.items():
        seeds = [str(run["flags"].get("seed")) for run in runs]
        print(f"{label}: {len(runs)} run(s), seeds {', '.join(seeds)}")
    try:
        plot_runs(groups, output)
    except OSError as error:
        raise BadInput(f"-o {output}: cannot write there ({error.strerror})") from error
    print(f"written: {output}")


if __name__ == "__main__":
    main()
