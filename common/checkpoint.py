"""Checkpoints in one file, and trained models as ordinary folders; split over ranks or not.

    save_checkpoint(place, step, model, {"optimizer": optimizer})
    step = load_checkpoint(place, model, {"optimizer": optimizer})    # the very bits, on a CPU
    save_model(folder, model, tokenizer)

A file is written beside its place and renamed into it, so that what has its name is whole.
"""
import pathlib

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from common.distributed import rank
from common.flags import BadInput
from common.models import causal_lm


def save_checkpoint(place: pathlib.Path, step: int, model, parts: dict) -> None:
    """Trained weights and the state dicts of parts, name -> an optimiser, a critic. Every rank
    must call it, the first one writes. OSError if it cannot be written."""
    weights = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    states = {name: part.state_dict() for name, part in parts.items()}
    state = whole({"step": step, "weights": weights, "parts": states})
    if rank() > 0:
        return
    temporary = place.with_suffix(".tmp")
    try:
        torch.save(state, temporary)
    except RuntimeError as error:  # what torch raises where the disk is full
        raise OSError(f"{place} cannot be written: is the disk full?") from error
    temporary.replace(place)


def load_checkpoint(place: pathlib.Path, model, parts: dict) -> int:
    """Puts weights and states back -> the step. BadInput if the file is damaged or another's."""
    try:
        state = torch.load(place, "cpu", weights_only=True, mmap=True)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(split_like(state["weights"][name], weight))
        for name, part in parts.items():
            load_part(part, state["parts"][name])
        return state["step"]
    except Exception as error:  # a damaged file fails in any way it likes
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise BadInput(f"{place}: cannot be gone on with, {reason}") from error


def load_part(part, state: dict) -> None:
    """load_state_dict where tensors may be split over ranks; learning rates stay as they are."""
    now = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        weights = [p for group in part.param_groups for p in group["params"]]
        for i, moments in state["state"].items():
            state["state"][i] = {k: split_like(v, weights[i]) for k, v in moments.items()}
        state["param_groups"] = now["param_groups"]
    else:
        state = {name: split_like(value, now[name]) for name, value in state.items()}
    part.load_state_dict(state)


def whole(state):
    """A state dict, list or tensor with its split tensors whole, on the CPU of the first rank.

    Every rank must call it; the others get None for each split tensor.
    """
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [whole(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if rank() == 0 else None


def split_like(value, like):
    """A whole tensor, the same on every rank, split as `like` is; other values as they are."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def save_model(folder: pathlib.Path, model, tokenizer, base=None) -> None:
    """folder/model, an ordinary save_pretrained folder, or the adapters in peft's format.

    base: a function that loads the frozen model; adapters merged into it go to folder/merged.
    Every rank must call it, the first one writes.
    """
    adapters = hasattr(model, "peft_config")
    dtype = causal_lm(model).compute_dtype
    tied = model.config.tie_word_embeddings
    state = {}
    for name, weight in model.state_dict().items():
        copied = name == "lm_head.weight" and tied
        if "lora_" in name or not adapters and not copied:
            state[name] = weight.to(dtype)
    state = whole(state)
    if rank() > 0:
        return
    model.config.dtype = dtype
    model.save_pretrained(folder / "model", state_dict=state)
    tokenizer.save_pretrained(folder / "model")
    if adapters and base is not None:
        from peft import PeftModel
        merged = PeftModel.from_pretrained(base(), folder / "model").merge_and_unload()
        merged.save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
