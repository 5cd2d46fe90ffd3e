"""Comparing runs in one figure: which runs belong together, and what is refused."""
import json

import pytest

from common import plot


def folder(path, script, rows=3, **flags):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"script": script, "flags": {"seed": 0, "lr": 1e-3, "output": str(path), **flags}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "reward": 0.1 * i, "entropy": 1.0, "seconds_sampling": 2.0}) + "\n"
                                                for i in range(rows)))
    return str(path)


def test_seeds_are_one_curve(tmp_path, capsys):
    """Two seeds of grpo.py at lr 1e-3, one run at 1e-2, one of bupo.py: three curves; only the flag that differs is in the label. Runs of
    different length, and an unfinished last line, are drawn as far as they go."""
    runs = [folder(tmp_path / "a", "grpo"), folder(tmp_path / "b", "grpo", seed=1, rows=2), folder(tmp_path / "c", "grpo", lr=1e-2),
            folder(tmp_path / "d", "bupo")]
    with open(tmp_path / "d" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    groups = plot.group_runs([plot.read_run(run) for run in runs])
    assert {label: len(of) for label, of in groups.items()} == {"grpo lr=0.001": 2, "grpo lr=0.01": 1, "bupo": 1}
    plot.main([*runs, "-o", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 10_000 and "seeds 0, 1" in capsys.readouterr().out


@pytest.mark.parametrize("rows, output, message", [(0, "x.png", "no step"), (None, "x.png", "not a folder of a run"), (1, "x.txt", "end it in"),
                                                   (1, "nowhere/x.png", "cannot write")])
def test_bad_input(rows, output, message, tmp_path, capsys):
    run = str(tmp_path / "missing") if rows is None else folder(tmp_path / "a", "grpo", rows=rows)
    with pytest.raises(SystemExit) as stop:
        plot.main([run, "-o", str(tmp_path / output)])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / output).exists()
