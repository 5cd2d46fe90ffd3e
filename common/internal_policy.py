"""What each block of a language model would say: internal layer policies, their entropy, and how blocks change it.

BuPO (arXiv 2512.19673) reads a policy off every block l = 1..L: softmax(H^l E^T), where H^l is the residual stream after block
l and E the unembedding, *without* the final norm (eq. 5). The functions work on any causal model of transformers with
.model.layers, .model.norm and .lm_head, whose blocks have self_attn, mlp, input_layernorm and post_attention_layernorm.
"""
import copy

import torch
from torch import nn

from common.errors import BadInput
from common.models import causal_lm
from common.sampling import join


def first_blocks(model, layer: int, final_norm: bool = False) -> nn.Module:
    """The model's trunk cut off after block `layer` (1-based): a view that shares every weight and runs nothing above it.

    Its output is H^layer, or norm(H^layer) with final_norm. The model itself is left as it is. ValueError outside 1..L.
    """
    trunk = causal_lm(model).model
    if not 1 <= layer <= len(trunk.layers):
        raise ValueError(f"layer {layer} is not one of the model's 1..{len(trunk.layers)}")
    view = copy.copy(trunk)
    view._modules = {**trunk._modules, "layers": trunk.layers[:layer], "norm": trunk.norm if final_norm else nn.Identity()}
    return view


def hidden_states(model, input_ids, attention_mask=None, layer: int | None = None, final_norm: bool = False) -> torch.Tensor:
    """(B, T) ids -> (B, T, D), what the unembedding reads: norm(H^L) for layer None or L, else H^layer as in eq. 5."""
    trunk = causal_lm(model).model
    if layer is not None and layer != len(trunk.layers):
        trunk = first_blocks(model, layer, final_norm)
    return trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def layer_logits(model, input_ids, attention_mask=None, layer: int | None = None, final_norm: bool = False) -> torch.Tensor:
    """Logits (B, T, V) of the policy of block `layer` (1-based, eq. 5); None or L is the model's own policy.

    Blocks above `layer` are not run and receive no gradient. final_norm applies the model's last norm first (the logit lens).
    Builds the whole (B, T, V): for looking and for tests; training goes through common/logprobs.py.
    """
    return causal_lm(model).lm_head(hidden_states(model, input_ids, attention_mask, layer, final_norm))


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits) over the last axis, in float32 (eq. 7)."""
    logp = torch.log_softmax(logits.float(), -1)
    return -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def internal_entropies(model, input_ids, attention_mask, mask, chunk: int | None = None) -> dict[str, torch.Tensor]:
    """Mean entropy (nats) of softmax(x E^T) over the positions where mask (B, T) is 1, for the streams x of every block (section 2).

    -> {"layer_in", "layer_out", "attn_in", "attn_out", "ffn_in", "ffn_out"}, each (L,). layer_* is the raw residual stream,
    attn_in and ffn_in are the *normed* inputs of the two modules, attn_out and ffn_out their outputs before the residual add.
    One forward; each stream is reduced to a number on the spot, `chunk` tokens at a time, so nothing grows with L or V.
    """
    lm, keep = causal_lm(model), mask.bool()
    chunk, totals, handles = chunk or max(1, (1 << 26) // lm.config.vocab_size), {}, []

    def record(name):
        def hook(_module, args, output):
            x = args[0] if name == "layer_in" else output
            x = (x[0] if isinstance(x, tuple) else x)[keep]                                       # (N, D)
            total = sum(entropy(lm.lm_head(piece)).sum().item() for piece in x.split(chunk))
            totals.setdefault(name, []).append(total / len(x))
        return hook

    for block in lm.model.layers:
        streams = {"layer_in": block, "layer_out": block, "attn_in": block.input_layernorm, "attn_out": block.self_attn,
                   "ffn_in": block.post_attention_layernorm, "ffn_out": block.mlp}
        handles += [module.register_forward_hook(record(name)) for name, module in streams.items()]
    try:
        lm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.tensor(values) for name, values in totals.items()}


def rollout_entropies(model, rollout, budget: int) -> dict[str, torch.Tensor]:
    """internal_entropies pooled over all answer tokens of a rollout, about `budget` tokens in one forward pass."""
    sizes, totals, start = [len(p) + int(k) for p, k in zip(rollout.prompts, rollout.lengths)], {}, 0
    while start < len(sizes):
        rows = slice(start, start + max(1, budget // max(sizes)))
        ids, predicts = join(rollout.prompts[rows], rollout.tokens[rows], rollout.lengths[rows])
        for name, mean in internal_entropies(model, ids, None, predicts).items():
            totals[name] = totals.get(name, 0) + mean * predicts.sum().item()
        start = rows.stop
    return {name: total / rollout.lengths.sum().item() for name, total in totals.items()}


def entropy_changes(entropies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entropy of what leaves minus entropy of what enters, per block (eqs. 8, 11-13) -> {"attn", "ffn", "layer"}, each (L,)."""
    return {name: entropies[f"{name}_out"] - entropies[f"{name}_in"] for name in ("attn", "ffn", "layer")}


def boundary_layer(ffn_change, tolerance: float = 0.05) -> int:
    """The 1-based block where exploration ends: the last of the first run of blocks whose FFN raises entropy.

    ffn_change: (L,) nats. A change of at most tolerance * max|change| counts as zero (the paper names no threshold; its
    Qwen3-4B hovers about zero from block 7 to 26). Leading blocks that do not raise it are skipped. ValueError if none does.
    """
    change = torch.as_tensor(ffn_change, dtype=torch.float64)
    rises = (change > tolerance * change.abs().max()).tolist()
    if True not in rises:
        raise ValueError("no block's FFN raises the entropy, so there is no exploration region: name a layer yourself")
    first = rises.index(True)
    return first + (rises[first:] + [False]).index(False)
