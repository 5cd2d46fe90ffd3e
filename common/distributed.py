"""Several processes as one run: torchrun starts them, torch's FSDP2 (fully_shard) splits weights, gradients and optimiser.

    torchrun --nproc-per-node 8 grpo.py --model Qwen/Qwen3-8B --data zwhe99/DeepMath-103K

Of a rollout each process ("rank") takes every N-th problem with its whole group, samples, verifies, and trains on it; what a loss
is divided by is counted over all ranks, and gradients are summed. So N processes make the step that one would make. Float32
weights, gradients and moments lie in N parts; a block is gathered in the compute dtype when it runs, all blocks while
sampling. Every function here is the identity, or says so, where there is only one process.
"""
import contextlib
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@contextlib.contextmanager
def process_group():
    """Joins the processes that torchrun has started, if it has; all but the first then print nothing of what they share."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere) if rank() else contextlib.nullcontext():
            yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """This rank's part: every N-th, from its own number on."""
    return items[rank()::size()]


def total(x):
    """The sum over all ranks, of a tensor or a number. Without gradient."""
    if size() == 1:
        return x
    summed = torch.as_tensor(x).detach().clone()
    dist.all_reduce(summed)
    return summed if torch.is_tensor(x) else summed.item()


def everyone(x) -> list:
    """What each rank has for x, by rank; anything that can be pickled."""
    if size() == 1:
        return [x]
    found = [None] * size()
    dist.all_gather_object(found, x)
    return found


def shard(root: torch.nn.Module, blocks, device: torch.device, dtype: torch.dtype, kept_float: tuple = ()) -> None:
    """Splits a module's weights over the ranks, in place: trained ones in float32, computed with in `dtype`.

    blocks: the parts that are gathered one by one; what is left is gathered together. kept_float: modules computed in float32.
    The caller runs the root once before any of its parts, so that FSDP knows which is which.
    """
    mesh = init_device_mesh(device.type, (size(),))
    for module in [*kept_float, *blocks, root]:
        for weight in module.parameters():
            if weight.requires_grad and not isinstance(weight, DTensor):
                weight.data = weight.data.float()
        precise = module in kept_float
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.float32 if precise else dtype, torch.float32))
    root.narrow = dtype


def gather_rest(module) -> None:
    """Gathers what lies in no block (embedding, norm, unembedding), for use outside the module's own forward."""
    if isinstance(module, FSDPModule):
        module.unshard()


@contextlib.contextmanager
def gathered(module):
    """All weights of a module stay gathered inside: nothing is sent, so ranks may run it differently often."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.reshard()
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def whole(state):
    """A state dict, list or tensor with its split tensors put together on the first rank's CPU. Every rank must call it."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value) for value in state)
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if rank() == 0 else None


def split_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, split as `like` is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
