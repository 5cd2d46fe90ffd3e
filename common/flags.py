"""Command-line flags from dataclasses, with a reason for each default; and the flags that every script shares."""
import argparse
import dataclasses
import functools
import gc
import json
import math
import pathlib
import sys

import torch

from common.distributed import process_group
from common.errors import BadInput
from common.models import is_small

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


def flag(default, help: str, real=None, type=None, choices=None, low=None, high=None, above=None):
    """A dataclass field that becomes a flag. `real` is the default for models larger than the embedded one, if it differs.

    low <= value <= high and above < value are checked, one clear line otherwise.
    """
    type = type or (str if default is None else default.__class__)
    return dataclasses.field(default=default, metadata=dict(
        help=help, real=default if real is None else real, type=type, choices=choices, low=low, high=high, above=above))


@dataclasses.dataclass
class Shared:
    """Where things come from and go to, the same in every script."""
    model: str = flag("tiny", "tiny (embedded, no download), a local model or run folder, or a hub id such as Qwen/Qwen3-4B")
    data: str = flag("arithmetic", "arithmetic (embedded), a .jsonl/.json/.parquet file, or hub id owner/set[:config]")
    eval_data: str = flag(None, "the same for evaluation; default: held-out problems of --data", type=str)
    split: str = flag("train", "split of a hub dataset to train on")
    eval_split: str = flag("test", "split of --eval-data, if that is on the hub")
    prompt_column: str = flag(None, "column with the problem; default: problem, question, prompt or query", type=str)
    answer_column: str = flag(None, "column with the gold answer; default: answer, final_answer, reward_model, ...", type=str)
    system: str = flag("", "system message before each problem; the embedded model knows `style: long|short|direct`", real=BOXED)
    thinking: bool = flag(False, "let the chat template open a thinking block (Qwen3); off as in the BuPO paper")
    eval_problems: int = flag(128, "held-out problems before and after: a standard error of 0.03; 0 skips evaluation", low=0)
    eval_k: int = flag(8, "answers to each of them, at temperature 1", low=1)
    micro_batch_tokens: int = flag(1024, "tokens in one forward pass: lower it when memory runs out", real=16384, low=1)
    lora_rank: int = flag(0, "train adapters of this rank with peft instead of all weights; 0 trains all", low=0)
    offload_optimizer: bool = flag(False, "keep float32 masters, gradients and Adam's moments on the CPU: for small cards")
    merge: bool = flag(False, "with --lora-rank: also write the merged model, an ordinary one, to <run>/merged")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "of the weights: float32 on a CPU, else bfloat16 with float32 masters",
                      choices=("auto", "float32", "bfloat16"))
    cuda_graphs: bool = flag(False, "on a GPU: replay recorded decoding steps, no Python between them; never run on a GPU yet")
    seed: int = flag(0, "draws data order and answers; on a CPU the same seed gives the same weights", low=0)
    output: str = flag(None, "folder of the run; default: runs/<script>, with a number if that exists", type=str)
    resume: str = flag(None, "folder of an interrupted run to go on with, flags and all", type=str)
    save_every: int = flag(20, "steps between checkpoints (also on Ctrl-C); the last two are kept", low=1)


@dataclasses.dataclass
class Reading:
    """The same for the commands that look at models and train none."""
    data: str = flag("arithmetic", "arithmetic, a .jsonl/.json/.parquet file, or a hub id (owner/set or owner/set:config)")
    split: str = flag("test", "split of a hub dataset")
    prompt_column: str = flag(None, "column with the problem", type=str)
    answer_column: str = flag(None, "column with the gold answer", type=str)
    system: str = flag("", "system message before each problem", real=BOXED)
    thinking: bool = flag(False, "let the chat template open a thinking block")
    device: str = flag("auto", "auto, cpu, cuda, mps")
    dtype: str = flag("auto", "float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16"))
    cuda_graphs: bool = flag(False, "on a GPU: replay recorded decoding steps; never run on a GPU yet")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse_flags(*classes, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of all the dataclasses -> one namespace. Dashes or underscores. With --resume DIR the run's own are the defaults.

    Raises BadInput for an unknown flag or a value out of range.
    """
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    fields = {field.name: field for cls in classes for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        meta = field.metadata
        names = dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
        shown = field.default if meta["real"] == field.default else f"{field.default!r}; larger models: {meta['real']!r}"
        text = (f"{meta['help']} [{shown}]" if shown not in (None, "") else meta["help"]).replace("%", "%%")
        metavar = None if meta["choices"] else meta["type"].__name__.upper()
        kind = dict(type=meta["type"], choices=meta["choices"], metavar=metavar)
        if meta["type"] is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(*names, default=None, help=text, **kind)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    saved = read_config(given["resume"])["flags"] if given.get("resume") else {}
    merged = {**saved, **given}
    small = is_small(merged.get("model", "tiny"))
    for name, field in fields.items():
        merged.setdefault(name, field.default if small else field.metadata["real"])
        check_range(name, merged[name], field.metadata)
    return argparse.Namespace(**{name: merged[name] for name in fields})


def several_models(argv: list[str]) -> tuple[list[str], list[str]]:
    """The models of `--model A B C`, each once, `tiny` if there is none -> them, and the other arguments after `--model A`."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="+", action="extend", default=[])
    given, rest = parser.parse_known_args(argv)
    names = list(dict.fromkeys(given.model or ["tiny"]))
    return names, ["--model", names[0], *rest]


def check_range(name: str, value, meta) -> None:
    low, high, above = meta["low"], meta["high"], meta["above"]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"--{name.replace('_', '-')} {value}: must be a finite number")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not (
            (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)):
        bounds = (("at least", low), ("at most", high), ("above", above))
        rule = " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)
        raise BadInput(f"--{name.replace('_', '-')} {value}: must be {rule}")


def read_config(folder: str) -> dict:
    """config.json of a run: its "script" and its "flags". Raises BadInput."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise BadInput(f"--resume {folder}: no run there (no config.json)")
    try:
        config = json.loads(path.read_text())
        return {"script": config["script"], "flags": dict(config["flags"])}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--resume {folder}: its config.json is not a run's") from error


def exit_on_bad_input(main):
    """Wraps a script's main: BadInput becomes one line on stderr and exit code 2, a second Ctrl-C one line and 130; and the
    processes that torchrun has started find each other.

    A BadInput that has a .retry is tried once more with those arguments, after all that main held is gone from memory.
    """
    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        for last in (False, True):
            try:
                with process_group():
                    return main(*args, **kwargs)
            except BadInput as error:
                retry = None if last else error.retry
                print(f"{error}\nonce more: {' '.join(retry)}" if retry else f"error: {error}", file=sys.stderr)
                if not retry:
                    raise SystemExit(2) from None
                args, kwargs = (retry,), {}
            except torch.OutOfMemoryError as error:
                print(f"error: out of memory: {str(error).splitlines()[0][:300]}", file=sys.stderr)
                raise SystemExit(2) from None
            except KeyboardInterrupt:
                print("\ninterrupted; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
                raise SystemExit(130) from None
            gc.collect()
            torch.cuda.empty_cache()
    return wrapped
