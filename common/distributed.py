"""Several processes as one run: torchrun starts them, torch's FSDP2 splits the model over them.

    torchrun --nproc-per-node 8 grpo.py --model Qwen/Qwen3-8B --data zwhe99/DeepMath-103K

Each process (a "rank") takes every N-th problem of a step with its whole group of answers,
samples, verifies, and trains on it. Token counts and gradients are summed over all ranks, so N
processes make the step that one would make. Each reads the whole model into the host's memory
before it keeps its part.
"""
import contextlib
import io
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@contextlib.contextmanager
def process_group():
    """Joins the processes that torchrun has started, if any; only the first of them prints."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    heard = sys.stdout if rank() == 0 else io.StringIO()
    try:
        with contextlib.redirect_stdout(heard):
            yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items):
    """This rank's part: every N-th, from its own number on."""
    return items[rank()::size()]


def everyone(x):
    """What each rank has for x, in the order of ranks; anything that can be pickled."""
    found = [x] * size()
    if size() > 1:
        dist.all_gather_object(found, x)
    return found


def total(x):
    """The sum over all ranks of a number, or of a tensor's elements -> a number."""
    return sum(everyone(x.sum().item() if torch.is_tensor(x) else x))


def shard(root, blocks, device, dtype):
    """Splits a module's weights over the ranks; it computes in dtype, gradients are float32.

    blocks: submodules that are gathered one by one when they run; the rest is gathered together.
    Gradients are summed, not averaged.
    """
    mesh = init_device_mesh(device.type, (size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*blocks, root]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(tensor):
    """A split tensor put together on the CPU of the first rank; None on the others, which must
    call it as well. Any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if rank() == 0 else None


def split_like(tensor, like):
    """A whole tensor, the same on every rank, where `like` is and split as that is; a tensor of
    another shape, such as AdamW's count of steps, as it is."""
    if tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def gather_rest(module):
    """Gathers what lies in no block (embedding, norm, unembedding), for use outside forward()."""
    if isinstance(module, FSDPModule):
        module.unshard()


@contextlib.contextmanager
def gathered(module):
    """All weights stay gathered inside: nothing is sent, so ranks may run the model a different
    number of times."""
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
