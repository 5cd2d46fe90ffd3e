"""--track: the rows of metrics.jsonl, sent elsewhere as well; the file stays the truth."""
import importlib

from common.flags import BadInput


def library(kind: str):
    """The package of wandb, trackio or tensorboard. BadInput if it is not installed."""
    try:
        return importlib.import_module(
            "torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as error:
        raise BadInput(f"--track {kind}: not installed, pip install {kind} ({error})") from error


def tracker(kind: str, name: str, flags: dict):
    """Opens a run there, tensorboard's in flags["output"] -> log(row)."""
    if kind == "tensorboard":
        writer = library(kind).SummaryWriter(flags["output"])
    else:
        writer = library(kind).init(project="reasoning", name=name, config=flags)

    def log(row: dict) -> None:
        numbers = {k: x for k, x in row.items() if k != "step" and isinstance(x, (int, float))}
        if kind != "tensorboard":
            writer.log(numbers, step=row["step"])
            return
        for key, number in numbers.items():
            writer.add_scalar(key, number, row["step"])
        writer.flush()
    return log
