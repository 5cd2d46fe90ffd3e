"""common/track.py with stand-ins for the trackers; what they are given."""
import sys
from types import ModuleType, SimpleNamespace

import pytest

from common.flags import BadInput
from common.track import tracker

ROW = {"step": 3, "reward": 0.5, "skipped": 0, "layer": None, "note": "text"}
NUMBERS = {"reward": 0.5, "skipped": 0}


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_numbers_of_a_row_go_to_the_run(monkeypatch, kind):
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(log=lambda numbers, step: calls.append((numbers, step)))

    library = ModuleType(kind)
    library.init = init
    monkeypatch.setitem(sys.modules, kind, library)
    log = tracker(kind, "grpo-2", {"lr": 1e-4})
    log(ROW)
    assert calls == [
        {"project": "reasoning", "name": "grpo-2", "config": {"lr": 1e-4}},
        (NUMBERS, 3)]


def test_tensorboard_writes_into_the_run(monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, key, value, step):
            calls.append((key, value, step))

        def flush(self):
            calls.append("flush")

    library = ModuleType("torch.utils.tensorboard")
    library.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    tracker("tensorboard", "grpo", {"output": "runs/grpo"})(ROW)
    assert calls == ["runs/grpo", ("reward", 0.5, 3), ("skipped", 0, 3), "flush"]


@pytest.mark.parametrize("kind, module", [
    ("wandb", "wandb"),
    ("trackio", "trackio"),
    ("tensorboard", "torch.utils.tensorboard")])
def test_one_that_is_not_installed_is_bad_input(monkeypatch, kind, module):
    """None in sys.modules makes an import fail."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput, match=f"--track {kind}: not installed, pip install {kind}"):
        tracker(kind, "grpo", {"output": "."})
