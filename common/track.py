"""--track: the rows of metrics.jsonl, sent elsewhere as well; the file stays the truth."""
import importlib

from common.flags import BadInput


def tracker(kind: str | None, name: str, flags: dict):
    """wandb, trackio, tensorboard (in flags["output"]) -> log(row); None -> None. BadInput."""
    try:
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            run = SummaryWriter(flags["output"])
        elif kind:
            run = importlib.import_module(kind).init(project="reasoning", name=name, config=flags)
    except ImportError as error:
        raise BadInput(f"--track {kind}: not installed, pip install {kind} ({error})") from error
    def log(row: dict) -> None:
        values = {k: x for k, x in row.items() if k != "step" and isinstance(x, (int, float))}
        if kind == "tensorboard":
            for key, value in values.items():
                run.add_scalar(key, value, row["step"])
            run.flush()
        else:
            run.log(values, step=row["step"])
    return log if kind else None
