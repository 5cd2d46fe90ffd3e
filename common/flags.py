"""Command-line flags from a dataclass, a reward of the user's own, and errors that are one line.

    @dataclass
    class Args(Shared):
        steps: int = flag(32, "rollouts; the paper: 300", low=1)

    args = parse_args(Args, REAL, __doc__, argv)     # REAL: {"steps": 300}, for larger models
"""
import argparse
import contextlib
import dataclasses
import json
import pathlib
import runpy
import sys

from safetensors import SafetensorError
from tqdm import tqdm

from common.distributed import process_group

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


class BadInput(ValueError):
    """A flag, file, column or model that cannot be used: one line, exit code 2, nothing is lost."""


def flag(default, help, low=-1e9, high=1e9, choices=None):
    """A dataclass field that becomes a flag, of the type it is annotated with; low <= a number <=
    high is checked."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Shared:
    """Flags of every script."""
    model: str = flag("tiny", "tiny (embedded), a model's or a run's folder, or a hub id")
    data: str = flag("arithmetic", "arithmetic (embedded), a .jsonl/.json/.parquet file, or a hub "
                     "id: owner/set, owner/set:config, owner/set:config:split")
    eval_data: str = flag(None, "the same for evaluation; default: some rows of --data")
    system: str = flag("", "system message before each problem; larger models: asks for a box")
    eval_problems: int = flag(128, "held-out problems, 8 answers each, before and after; 0: no "
                              "evaluation", low=0)
    eval_every: int = flag(0, "evaluate after every so many steps as well; 0: never", low=0)
    track: str = flag(None, "show metrics elsewhere, too: wandb, trackio or tensorboard",
                      choices=("wandb", "trackio", "tensorboard"))
    micro_batch_tokens: int = flag(1024, "tokens in one forward pass: lower it when memory runs "
                                   "out, it changes nothing else", low=1)
    lora_rank: int = flag(0, "train adapters of this rank (peft) instead of all weights", low=0)
    merge: bool = flag(False, "with --lora-rank: also write the merged, ordinary model")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "of matrix products, auto: bfloat16 on a GPU, float32 on a CPU; "
                      "weights that are trained are float32",
                      choices=("auto", "float32", "bfloat16"))
    seed: int = flag(0, "draws data order and answers", low=0)
    output: str = flag(None, "folder of the run; default: runs/<script>, numbered if taken")
    resume: str = flag(None, "folder of an interrupted run to go on with, its flags and all")


SHARED_REAL = {"system": BOXED, "micro_batch_tokens": 4096}  # defaults of larger models


def new_parser(description):
    """Of a command line; without usage, so that an error is one line."""
    return argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_args(Args, real, description, argv=None):
    """Command line -> the flags. Dashes or underscores; with --resume the run's own flags hold.

    A model larger than the embedded one takes its defaults from `real`, and for the longest answer
    at most half its context. Raises BadInput.
    """
    from common.models import SMALL, load_config  # here, since models.py imports BadInput
    parser = new_parser(description)
    fields = dataclasses.fields(Args)
    for field in fields:
        options = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            options = {"action": "store_true"}
        help = field.metadata["help"]
        if field.default not in (None, "", False):
            help += f" [{field.default}]"
        if field.name in real:
            help += f" [larger models: {real[field.name]}]"
        names = dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"])
        parser.add_argument(*names, default=field.default, help=help, **options)
    args = parser.parse_args(argv)
    if getattr(args, "resume", None):
        parser.set_defaults(**read_config(args.resume)["flags"])
    else:
        config = load_config(args.model)
        if config.hidden_size > SMALL:
            longest = min(real["max_new_tokens"], config.max_position_embeddings // 2)
            parser.set_defaults(**{**SHARED_REAL, **real, "max_new_tokens": longest})
        if getattr(args, "lora_rank", 0):
            parser.set_defaults(lr=10 * parser.get_default("lr"))  # adapters want larger steps
    args = parser.parse_args(argv)
    for field in fields:
        value = getattr(args, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:
            raise BadInput(f"--{field.name.replace('_', '-')} {value}: must be at least {low:g} "
                           f"and at most {high:g}")
    return args


def read_config(folder):
    """config.json of a run. Raises BadInput if it is not there or damaged."""
    try:
        config = json.loads(pathlib.Path(folder, "config.json").read_text(encoding="utf-8"))
        return {**config, "flags": dict(config["flags"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--resume {folder}: no run there, config.json cannot be read "
                       f"({type(error).__name__}: {error})") from error


def load_reward(place):
    """`my_rewards.py:length_bonus` -> that function; errors of the file's own code are raised."""
    path, _, name = place.rpartition(":")
    try:
        return runpy.run_path(path)[name]
    except (OSError, ImportError, KeyError) as error:
        raise BadInput(f"--reward {place}: give a file and a function in it, my_rewards.py:mine "
                       f"({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def exit_on_bad_input():
    """Around a script's main: its errors become one line; under torchrun, joins the process group.

    Exit code 2 for bad input, a library that is not installed, a full disk and memory that runs
    out, 130 for Ctrl-C.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console that has no "±" shows a "?"
    try:
        with process_group():
            yield
        return
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if not any(cause in str(error) for cause in ("out of memory", "DefaultCPUAllocator")):
            raise  # a bug
        reason = "out of memory: lower --micro-batch-tokens or --group-size, then --resume"
    except (BadInput, OSError, ImportError, SafetensorError) as error:
        reason = str(error) or type(error).__name__
    tqdm.write(f"error: {reason.splitlines()[0]}", file=sys.stderr)  # not behind a bar
    raise SystemExit(2)
