"""Drawing runs: which of them belong together, where the figure goes, and what is refused."""
import json

import pytest

from analysis import plot


def folder(path, script, rows=3, **flags):
    """A run of so many steps at seed 0 and lr 1e-3, unless flags say otherwise."""
    path.mkdir(parents=True)
    flags = {"seed": 0, "lr": 1e-3, "output": str(path), **flags}
    (path / "config.json").write_text(json.dumps({"script": script, "flags": flags}))
    lines = []
    for step in range(1, rows + 1):
        row = {"step": step, "reward": 0.1 * step, "entropy": 1.0, "seconds": 2.0}
        lines.append(json.dumps(row) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))
    return str(path)


def test_seeds_are_one_curve(tmp_path, capsys):
    """Two seeds of grpo.py at lr 1e-3, one run at 1e-2, one of bupo.py: three curves; only the flag
    that differs is in the label. Runs of different length, and an unfinished last line, are drawn
    as far as they go."""
    runs = [folder(tmp_path / "a", "grpo"), folder(tmp_path / "b", "grpo", seed=1, rows=2),
            folder(tmp_path / "c", "grpo", lr=1e-2), folder(tmp_path / "d", "bupo")]
    with open(tmp_path / "d" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    groups = plot.group_runs([plot.read_run(run) for run in runs])
    sizes = {label: len(group) for label, group in groups.items()}
    assert sizes == {"grpo lr=0.001": 2, "grpo lr=0.01": 1, "bupo": 1}
    plot.main([*runs, "-o", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert "seeds 0, 1" in capsys.readouterr().out


def test_one_run_is_drawn_beside_itself(tmp_path):
    run = folder(tmp_path / "a", "bupo")
    summary = {"avg_at_k_before": 0.3, "avg_at_k_after": 0.7}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    plot.main([run])
    assert (tmp_path / "a" / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_smooth():
    """Widths 2 and, for a tenth of 20 values, 2 as well: 0, then the mean of i - 1 and i."""
    assert plot.smooth([0, 2, 6], 2) == [0, 1, 4]
    assert plot.smooth(list(range(20))) == [0, *(i - 0.5 for i in range(1, 20))]


@pytest.mark.parametrize("rows, output, message", [
    (0, "x.png", "no step"),
    (None, "x.png", "not a folder of a run"),
    (1, "x.txt", "end it in"),
    (1, "nowhere/x.png", "cannot write"),
])
def test_bad_input(rows, output, message, tmp_path, capsys):
    run = str(tmp_path / "missing")
    if rows is not None:
        run = folder(tmp_path / "a", "grpo", rows=rows)
    with pytest.raises(SystemExit) as stop:
        plot.main([run, "-o", str(tmp_path / output)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / output).exists()


def test_several_runs_need_a_name(tmp_path, capsys):
    runs = [folder(tmp_path / "a", "grpo"), folder(tmp_path / "b", "grpo", seed=1)]
    with pytest.raises(SystemExit) as stop:
        plot.main(runs)
    assert stop.value.code == 2
    assert "-o compare.png" in capsys.readouterr().err


def test_the_json_of_a_page_is_read_back(tmp_path):
    """Columns by step become rows, and what stood at the end is "after"."""
    run = {"seed": 3, "avg_at_k_after": 0.5, "probe": [{"step": 0}], "at_the_end": {"x": 1},
           "by_step": {"reward": [0.1, 0.2], "entropy": [1.0, None]}}
    (tmp_path / "page.json").write_text(json.dumps({"GRPO": [run]}))
    [found] = plot.stored(tmp_path / "page.json")["GRPO"]
    assert found["rows"] == [{"reward": 0.1, "entropy": 1.0}, {"reward": 0.2, "entropy": None}]
    assert found["summary"]["avg_at_k_after"] == 0.5
    assert (found["probe"], found["after"]) == ([{"step": 0}], {"x": 1})


def test_shades_by_hand():
    """Half of the way from (1, 0, 0.2) to white is (1, 0.5, 0.6), to black (0.5, 0, 0.1)."""
    assert plot.lighter("#FF0033", 0.5) == pytest.approx((1.0, 0.5, 0.6))
    assert plot.lighter("#FF0033", -0.5) == pytest.approx((0.5, 0.0, 0.1))
