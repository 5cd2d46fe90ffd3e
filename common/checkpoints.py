"""Files and folders that are whole or not there, whatever moment a run dies at; and which checkpoint to go on from.

Everything is written beside its place, synced, and renamed into it. A checkpoint lists its files and their sizes, so that one
that was cut short or comes from elsewhere is told before anything is loaded.
"""
import contextlib
import json
import os
import pathlib
import shutil

import torch
from safetensors import SafetensorError

from common.distributed import rank, size, whole
from common.errors import BadInput
from common.models import causal_lm

FORMAT = 2  # goes up when what lies in a checkpoint changes its meaning


def sync(path: pathlib.Path) -> None:
    if os.name == "nt":  # cannot open folders there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: pathlib.Path, text: str) -> None:
    """The file is either the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path):
    """`with whole_folder(f) as temporary:` what is written to temporary becomes f at the end; after an error it is gone."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync(folder.parent)


@contextlib.contextmanager
def writing(folder: pathlib.Path):
    """A full disk or a read-only folder is one line: BadInput."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two are how torch.save and safetensors say it
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        place = next(path for path in [folder, *folder.absolute().parents] if path.exists())
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        raise BadInput(f"{folder}: cannot write there ({reason}; {shutil.disk_usage(place).free >> 20} MiB free); what lies "
                       "there already is whole, and --resume goes on from its last checkpoint") from error


def label(checkpoint: pathlib.Path, script: str, step: int) -> None:
    """Writes checkpoint.json: whose it is, and every file beside it with its size in bytes."""
    files = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    text = json.dumps({"format": FORMAT, "script": script, "step": step, "files": files}, indent=1)
    (checkpoint / "checkpoint.json").write_text(text)


def fault_of(checkpoint: pathlib.Path, script: str) -> str | None:
    """Why a run of `script` cannot go on from a checkpoint, None if it can. Raises BadInput for one of newer code."""
    try:
        found = json.loads((checkpoint / "checkpoint.json").read_text())
        version, owner, files = int(found["format"]), (found["script"], found["step"]), dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return "checkpoint.json is missing or broken"
    if version > FORMAT:
        raise BadInput(f"{checkpoint}: written by a newer version of this code (format {version}; this one reads {FORMAT})")
    if owner != (script, int(checkpoint.name[5:])):
        return f"it is step {owner[1]} of {owner[0]}.py"
    sizes = {name: (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else -1 for name in files}
    return next((f"{name} is missing or cut short" for name, size in files.items() if sizes[name] != size), None)


def newest(folder: pathlib.Path, script: str) -> tuple[pathlib.Path | None, int]:
    """The last checkpoint of a run's folder that can be gone on from, and its step; (None, 0) before the first one.

    Says which it passed over. Raises BadInput if there are some and none can be used.
    """
    said = []
    for checkpoint in sorted((folder / "checkpoints").glob("step-??????"), reverse=True):
        fault = fault_of(checkpoint, script)
        if not fault:
            print(*said, sep="\n", end="\n" * bool(said))
            return checkpoint, int(checkpoint.name[5:])
        said.append(f"{checkpoint} is passed over: {fault}")
    if said:
        raise BadInput(f"--resume {folder}: no checkpoint can be used; {said[0]}")
    return None, 0


def write_checkpoint(folder: pathlib.Path, model, tokenizer, weights: dict | None, states: dict, script: str, step: int) -> None:
    """A checkpoint of a script's run after `step` steps: model/, a <name>.pt for each of states, its label. The last two stay."""
    with whole_folder(folder) as temporary:
        save_model(model, tokenizer, temporary / "model", weights)
        for name, state in states.items():
            torch.save(state, temporary / f"{name}.pt")
        label(temporary, script, step)
    prune(folder)


def prune(checkpoint: pathlib.Path) -> None:
    """Keeps a checkpoint and the one before it; later ones, which were passed over, stay until their step is reached again."""
    for old in sorted(path for path in checkpoint.parent.glob("step-??????") if path <= checkpoint)[:-2]:
        shutil.rmtree(old)


def tell_small_disk(folder: pathlib.Path, one: float) -> None:
    """A note if the checkpoints to come, of `one` bytes, do not fit on the disk of a run's folder, which may not be there yet."""
    coming = 3 - min(2, len(list(folder.glob("checkpoints/step-??????"))))  # two stay, a third is written before one goes
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    room = shutil.disk_usage(disk).free
    if room < coming * one:
        print(f"note: a checkpoint takes {one / 2**20:.1f} MiB, {coming} more must fit on the disk of {disk}, which has "
              f"{room / 2**20:.1f} MiB free; another disk: --output")


def clean(folder: pathlib.Path) -> None:
    """Removes what a run that was killed while writing has left half-written."""
    for leftover in [*folder.glob("*.tmp"), *folder.glob("checkpoints/*.tmp")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def whole_weights(model) -> dict | None:
    """What save_model writes if the weights are split over ranks, on the first one's CPU. Every rank must call it."""
    if size() == 1:
        return None
    lm, adapters = causal_lm(model), hasattr(model, "peft_config")
    kept = {name: weight for name, weight in model.state_dict().items()
            if ("lora_" in name if adapters else name != "lm_head.weight" or not lm.config.tie_word_embeddings)}
    weights = {name: whole(weight) for name, weight in kept.items()}
    return weights if rank() > 0 else {name: weight.to(lm.narrow) for name, weight in weights.items()}


def save_model(model, tokenizer, folder: pathlib.Path, weights: dict | None = None) -> None:
    """An ordinary save_pretrained folder (safetensors); adapters alone in peft's format when the model has them."""
    model.save_pretrained(folder, state_dict=weights)
    if weights and not hasattr(model, "peft_config"):  # split weights are float32, and transformers has written that
        model.config.dtype = model.narrow
        model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
