"""A pretended GPU: a device "card", whose tensors lie in the CPU's memory and obey a GPU's rule.

    with Card():                          # what runs in here may name the device "card"
        model.to("card")

An operation on tensors of both devices fails, as on a GPU, unless the CPU's have no dimension. A
tensor subclass holds the values, a dispatch mode sees what makes tensors, torch's empty backend
for Python names the device. It has no autocast: run in float32. For a process of its own: what is
registered here stays.
"""
import contextlib
import sys

import torch
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


def over(f, x):
    """f(x) of every tensor in nested lists, tuples and dicts."""
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, (list, tuple)):
        return type(x)([over(f, y) for y in x])
    if isinstance(x, dict):
        return {key: over(f, y) for key, y in x.items()}
    return x


def values(x):
    return x.inner if isinstance(x, OnCard) else x


class OnCard(torch.Tensor):
    """A tensor of the card; `inner` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                storage_offset=inner.storage_offset(), device=torch.device("card:0"))
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return execute(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.inner = value.inner
        torch.Tensor.data.__set__(self, value)

    def untyped_storage(self):  # who saves a model asks which weights share their memory
        return self.inner.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)


def execute(function, args, kwargs):
    """One operation of torch, on the values of the card's tensors."""
    key = "CompositeImplicitAutograd"  # made of others; met in inference mode
    if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), key):
        with Card():
            return function.decompose(*args, **kwargs)
    name = function.overloadpacket.__name__
    tensors = []
    over(tensors.append, (args, kwargs))
    here = [x for x in tensors if isinstance(x, OnCard)]
    if here and name not in ("copy_", "_to_copy"):
        for x in tensors:
            if not isinstance(x, OnCard) and x.dim() > 0:
                raise RuntimeError(f"{function}: on the card, but for a tensor of shape "
                                   f"{tuple(x.shape)} on the CPU")
    known = {id(x.inner): x for x in here}
    on_card = bool(here)
    args, kwargs = over(values, (args, kwargs))
    if kwargs.get("device") is not None:
        on_card = torch.device(kwargs["device"]).type == "card"
        kwargs["device"] = torch.device("cpu")
    out = function(*args, **kwargs)
    if not on_card or name == "copy_" and id(out) not in known:
        return out
    return over(lambda x: known[id(x)] if id(x) in known else OnCard(x), out)


class Card(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return execute(function, args, kwargs or {})


class Backend(_DummyBackendModule):
    """What torch.utils.checkpoint and torch.autocast ask of a device."""
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_rng_state = staticmethod(lambda *device: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *device: None)
    device = staticmethod(lambda index: contextlib.nullcontext())


_setup_privateuseone_for_python_backend("card", backend_module=Backend())
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="card") begins on the CPU
_foreach_utils._foreach_supported_types.append(OnCard)  # an optimiser takes all weights at once
sys.modules["torch.optim.optimizer"]._get_fused_kernels_supported_devices = lambda: ["card", "cpu"]
