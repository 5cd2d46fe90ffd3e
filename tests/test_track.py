"""--track with stand-ins for the trackers; what they are given."""
import pathlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from common.run import tracker

NUMBERS = {"reward": 0.5, "skipped": 0}


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_numbers_go_to_the_run(monkeypatch, kind):
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(log=lambda numbers, step: calls.append((numbers, step)))

    library = ModuleType(kind)
    library.init = init
    monkeypatch.setitem(sys.modules, kind, library)
    log = tracker(kind, pathlib.Path("runs/grpo-2"), {"lr": 1e-4})
    log(NUMBERS, step=3)
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

    library = ModuleType("torch.utils.tensorboard")
    library.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", library)
    folder = pathlib.Path("runs/grpo")
    tracker("tensorboard", folder, {})(NUMBERS, step=3)
    assert calls == [folder, ("reward", 0.5, 3), ("skipped", 0, 3)]
