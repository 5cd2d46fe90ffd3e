"""The learning curve of a run: reward, length and entropy a step, with the accuracy before and after."""
import json
import pathlib


def plot_run(folder: pathlib.Path) -> None:
    """Reads metrics.jsonl and summary.json of a run's folder, writes curve.png beside them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    steps = [row["step"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for axis, (name, title) in zip(axes, (("reward", "share of answers right"), ("length", "tokens per answer"), ("entropy", "entropy, nats per token"))):
        values = [row.get(name, float("nan")) for row in rows]
        window = max(1, len(values) // 10)
        smooth = [sum(values[max(0, i - window + 1):i + 1]) / min(window, i + 1) for i in range(len(values))]
        axis.plot(steps, values, color="#0072B2", alpha=0.35, linewidth=1)
        axis.plot(steps, smooth, color="#0072B2", linewidth=2.5, label=f"mean of {window} steps")
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("step", fontsize=12)
        axis.tick_params(labelsize=11)
        axis.grid(alpha=0.25)
        for row, following in zip(rows, rows[1:]):
            if row.get("layer") != following.get("layer"):
                axis.axvline(row["step"] + 0.5, color="black", linestyle=":", linewidth=1.5)
                axis.annotate(f" layer {row['layer']} | whole model", (row["step"] + 0.5, 0.02), xycoords=("data", "axes fraction"), fontsize=10)
    if "avg_at_k_after" in summary:
        for when, x in (("before", 0), ("after", steps[-1])):
            axes[0].errorbar(x, summary[f"avg_at_k_{when}"], summary[f"standard_error_{when}"], fmt="o", color="#D55E00", capsize=4,
                             label="held-out, with standard error" if when == "before" else None)
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize=10, loc="upper left")
    figure.savefig(folder / "curve.png", dpi=110)
    plt.close(figure)
