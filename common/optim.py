"""AdamW that keeps a float32 copy of low-precision weights: at lr 1e-6 only one bfloat16 weight in fifty would move at all."""
import math

import torch
from torch.distributed.tensor import DTensor

from common.distributed import size, split_like, total


class MasterAdamW:
    """AdamW over float32 masters of a model's trainable weights; float32 weights are their own masters.

    Gradients of bfloat16 weights are added up in float32 as each backward pass delivers them, so the number of micro-batches
    changes nothing but the last bits. A weight that got no gradient is left alone altogether: no decay, no step count. Weights
    that are split over ranks (common/distributed.py) are float32 already. With offload all masters, their gradients and moments
    lie in the CPU's memory, and the update is made there: 16 bytes a weight less on the device, for time on the bus.
    .updates counts the updates made since the program began.
    """

    def __init__(self, model, lr: float, weight_decay: float = 0.01, offload: bool = False):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        own = lambda p: p.dtype == torch.float32 and not offload  # is its own master
        place = lambda p: "cpu" if offload else p.device
        self.masters = [p if own(p) else p.detach().to(place(p), torch.float32, copy=True) for p in self.weights]
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                weight.register_post_accumulate_grad_hook(self._collector(master))
        fused = any(p.device.type != "cpu" for p in self.weights) or None  # on a GPU: else the update takes 4 more bytes a weight
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=weight_decay, fused=fused)
        self.given, self.updates, self.loss_is_finite = {"lr": lr, "weight_decay": weight_decay, "fused": fused}, 0, True

    @staticmethod
    def _collector(master):
        def collect(weight):
            grad = weight.grad.to(master.device, torch.float32)
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            weight.grad = None
        return collect

    def zero_grad(self) -> None:
        """Forgets all gradients (None, not zero)."""
        self.adamw.zero_grad(set_to_none=True)
        self.loss_is_finite = True

    def backward(self, loss: torch.Tensor) -> None:
        """loss.backward(), the gradients summed over ranks; and if the loss is NaN or infinite, the next step() updates nothing,
        whatever the gradient is."""
        (loss * size()).backward()  # FSDP takes the mean
        self.loss_is_finite &= math.isfinite(loss.item())

    @torch.no_grad()
    def step(self, max_norm: float = 1.0) -> float:
        """Clips the gradient to a global norm, updates, forgets the gradient -> the norm before clipping.

        If the norm is 0, as where no group had a signal, nothing is updated, not even moments or decay; nor if it or a loss given
        to backward() is not finite, and then NaN or infinity is returned. Gradients take no memory while answers are sampled.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        norm = math.nan if total(int(not self.loss_is_finite)) else norm
        if math.isfinite(norm) and norm > 0:
            self.updates += 1
            self.adamw.step()
            for weight, master in zip(self.weights, self.masters):
                if master is not weight and master.grad is not None:
                    weight.copy_(master)
        self.zero_grad()
        return norm

    def state_dict(self) -> dict:
        """"masters" has None where a weight of one process is its own."""
        masters = [None if master is weight and not isinstance(weight, DTensor) else master
                   for weight, master in zip(self.weights, self.masters)]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Takes whole tensors, also where the weights are split. Learning rate and decay stay what they are."""
        moments = {i: {name: split_like(value, self.masters[i]) for name, value in of.items()}
                   for i, of in state["adamw"]["state"].items()}
        groups = [{**group, **self.given} for group in state["adamw"]["param_groups"]]
        self.adamw.load_state_dict({"state": moments, "param_groups": groups})
        for weight, master, saved in zip(self.weights, self.masters, state["masters"], strict=True):
            if saved is None and weight.dtype != torch.float32:
                raise ValueError("it was trained in float32")  # adapters of older code
            if saved is not None:
                master.copy_(split_like(saved, master))
