"""A pretended GPU: a device named "card", whose tensors lie in the CPU's memory and obey a GPU's rules.

    with Card() as card:                  # what runs in here may name the device "card"
        model.to("card")
    card.peak, card.waits                 # bytes at the peak; which operation waited for the device how often

- An operation on tensors of both devices fails, as on a GPU, unless the CPU's have no dimension.
- What brings data or sizes to the CPU is counted in `waits`: there a GPU's queue runs empty.
- More than its `size` in bytes is out of memory.
- `held` and `peak` count the bytes of all tensors that are alive, in blocks of 512: what torch.cuda.max_memory_allocated() says, but for
  what a kernel takes for itself (of the order of 10 MiB).
- Card(float64=False) has none, like Apple's.
- Card(shapes=True) keeps no floats at all, only their shapes, so that a model of any size runs here: every float that is asked
  for is 1, every drawn token is 0.

Made of torch's own parts: a tensor subclass for the values, a dispatch mode for what makes tensors, its empty backend for Python.
For a process of its own: what is registered here stays.
"""
import collections
import contextlib
import sys
import weakref

import torch
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "is_nonzero"}


def over(f, x):
    """f(x) of every tensor in nested lists, tuples and dicts (torch's own, for Python's every type, takes longer than the work)."""
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, (list, tuple)):
        return type(x)([over(f, y) for y in x])
    return {key: over(f, y) for key, y in x.items()} if isinstance(x, dict) else x


def tensors_in(*x) -> list[torch.Tensor]:
    found = []
    over(found.append, x)
    return found


class OnCard(torch.Tensor):
    """A tensor of the card. `inner` holds its values, or their shape."""

    @staticmethod
    def __new__(cls, inner, card):
        if inner.dtype == torch.float64 and not card.float64:
            raise TypeError("this card has no float64")
        with torch.inference_mode(False):
            self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                       storage_offset=inner.storage_offset(), device=torch.device("card:0"))
        self.inner, self.card = inner, card
        card.hold(inner.untyped_storage())
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return next(x.card for x in tensors_in(args, kwargs) if isinstance(x, OnCard)).run(function, args, kwargs or {})

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

    def __repr__(self):
        return f"OnCard({self.inner})"


class Backend(_DummyBackendModule):
    """What torch.utils.checkpoint and common/models.py ask of torch.cuda, here of the card that is open."""
    card = None
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    get_rng_state = staticmethod(lambda *device: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *device: None)
    device = staticmethod(lambda index: contextlib.nullcontext())
    mem_get_info = staticmethod(lambda *device: (Backend.card.size - Backend.card.held, Backend.card.size))
    memory_reserved = memory_allocated = staticmethod(lambda *device: Backend.card.held)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Flash attention, which keeps no scores. torch has one for the CPU, but would not choose it for a device it does not know."""
    if not isinstance(query, OnCard):
        return plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa and not query.card.shapes:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


_setup_privateuseone_for_python_backend("card", backend_module=Backend())
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="card") makes its values on the CPU first
plain_attention, torch.nn.functional.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention, attention
_foreach_utils._foreach_supported_types.append(OnCard)  # an optimiser that is not told otherwise takes all weights at once
sys.modules["torch.optim.optimizer"]._get_fused_kernels_supported_devices = lambda: ["card", "cpu", "meta"]


class Card(TorchDispatchMode):
    def __init__(self, size: int = 80 * 10**9, shapes: bool = False, float64: bool = True):
        super().__init__()
        self.size, self.shapes, self.float64 = size, shapes, float64
        self.held, self.peak, self.alive, self.waits = 0, 0, set(), collections.Counter()

    def __enter__(self):
        Backend.card = self
        return super().__enter__()

    def hold(self, storage) -> None:
        key, taken = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key not in self.alive:
            if self.held + taken > self.size:
                raise torch.OutOfMemoryError(f"the card has {self.size} bytes, {self.held} are held, {taken} are asked for")
            self.alive.add(key)
            self.held += taken
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.release, key, taken).atexit = False

    def release(self, key, taken) -> None:
        self.alive.remove(key)
        self.held -= taken

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):  # met in inference mode
            with self:
                return function.decompose(*args, **kwargs)
        name, device = function.overloadpacket.__name__, kwargs.get("device")
        tensors = tensors_in(args, kwargs)
        here = [x for x in tensors if isinstance(x, OnCard)]
        on_card = bool(here) if device is None else torch.device(device).type == "card"
        if here and name not in ("copy_", "_to_copy"):
            for x in tensors:
                if not isinstance(x, OnCard) and x.dim() > 0:
                    raise RuntimeError(f"{function}: on the card, but for a tensor of shape {tuple(x.shape)} on the CPU")
        mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if here and (name in WAITS or mask or not on_card or name == "copy_" and not isinstance(args[0], OnCard)):
            self.waits[name] += 1
        known = {id(x.inner): x for x in here}
        args, kwargs = over(lambda x: x.inner if isinstance(x, OnCard) else x, (args, kwargs))
        if on_card and device is not None:
            kwargs["device"] = torch.device("cpu")
        out = self.run_shapes(function, args, kwargs, on_card) if self.shapes else function(*args, **kwargs)
        if not on_card or name == "copy_" and id(out) not in known:
            return out
        return over(lambda x: known[id(x)] if id(x) in known else OnCard(x, self), out)

    def run_shapes(self, function, args, kwargs, on_card):
        """Whole numbers and booleans are real; floats are shapes on torch's device "meta", also those that go to the CPU."""
        floats = any(x.is_meta for x in tensors_in(args, kwargs))
        if not floats and not on_card:
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if floats and name == "_local_scalar_dense":
            return 1.0
        if floats and name == "index":  # how much a mask picks is in the mask
            bools = lambda i: i is not None and i.dtype == torch.bool
            args = (args[0], [j for i in args[1] for j in (i.nonzero(as_tuple=True) if bools(i) else [i])])
        if floats or "device" in kwargs:
            device = {"device": torch.device("meta")} if "device" in kwargs else {}
            out = function(*over(lambda x: x.to("meta"), args), **over(lambda x: x.to("meta"), kwargs) | device)
            if floats or out.is_floating_point():
                make = torch.ones if name == "_to_copy" else torch.zeros
                return over(lambda x: x if x.is_floating_point() else make(x.shape, dtype=x.dtype), out)
        return over(lambda x: x.to("meta") if x.is_floating_point() else x, function(*args, **kwargs))
