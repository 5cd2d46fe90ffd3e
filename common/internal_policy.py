"""BuPO's internal policies (arXiv 2512.19673): what each block of a model would say by itself.

Block l = 1..L has the policy softmax(H^l E^T): the residual stream after the block, read by the
unembedding E without the final norm (eq. 5). Attention and FFN are read in the same way, from what
they add to the stream (eq. 6).

Axes: B rows, S tokens, N tokens of all rows, D width, V vocabulary, L blocks.
"""
import copy

import torch
from torch import nn

from common.distributed import gather_rest, gathered
from common.flags import BadInput
from common.models import autocast


def first_blocks(model, layer, final_norm=False):
    """The model's trunk cut off after block `layer` (1-based): a view that shares every weight.

    Its output is H^layer, or norm(H^layer) with final_norm, or the model's own for layer L. Blocks
    above it are not run and get no gradient. ValueError outside 1..L.
    """
    trunk = model.model
    if not 1 <= layer <= len(trunk.layers):
        raise ValueError(f"layer {layer} is not one of the model's 1..{len(trunk.layers)}")
    if layer == len(trunk.layers):
        return trunk
    view = copy.copy(trunk)
    norm = trunk.norm if final_norm else nn.Identity()
    view._modules = {
        **trunk._modules,
        "layers": trunk.layers[:layer],
        "norm": norm}
    return view


def layer_logits(model, input_ids, attention_mask=None, layer=None,
                 final_norm=False):
    """Logits (B, T, V) of block `layer`'s policy (1-based, eq. 5); None or L is the model's own.

    Builds the whole (B, T, V): for looking and for tests; training goes through logprobs.py.
    """
    gather_rest(model)
    if layer is None:
        layer = len(model.model.layers)
    trunk = first_blocks(model, layer, final_norm)
    states = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return model.lm_head(states.last_hidden_state)


def entropy(logits):
    """Entropy in nats of softmax(logits) over the last axis, in float32 (eq. 7)."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@torch.no_grad()
def block_streams(model, input_ids, attention_mask, mask, visit):
    """Runs the model once and calls visit(streams) after every block, the lowest first.

    streams: name -> (N, D) at the positions where mask (B, S) is 1.
        "layer_in", "layer_out"   H^{l-1} and H^l, the residual stream
        "attn_in", "ffn_in"       what attention and FFN read: normed
        "attn_out", "ffn_out"     A^l and F^l, what they add to the stream (eqs. 11-13)
    BadInput for blocks that do not just add what attention and FFN put out.
    """
    keep = mask.bool()
    caught = {}
    handles = []

    def catch(label):
        def hook(module, args, kwargs, output):
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = output[0] if isinstance(output, tuple) else output
            caught[f"{label}_in"] = entering[keep]
            caught[f"{label}_out"] = leaving[keep]
        return hook

    def leave(block, args, output):
        added = caught["layer_in"] + caught["attn_out"] + caught["ffn_out"]
        error = (added - caught["layer_out"]).norm()
        if error > 0.01 * caught["layer_out"].norm():
            raise BadInput(f"{type(model).__name__}: its blocks do not just add what attention and "
                           "FFN put out, so they have no such policies")
        visit(dict(caught))

    for block in model.model.layers:
        for name, label in (("self_attn", "attn"), ("mlp", "ffn")):
            if not hasattr(block, name):
                raise BadInput(f"{type(model).__name__}: not every block has {name}")
            part = getattr(block, name)
            handles.append(part.register_forward_hook(catch(label), with_kwargs=True))
        handles.append(block.register_forward_hook(catch("layer"), with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    try:
        with gathered(model), autocast(model):
            model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def internal_entropies(model, input_ids, attention_mask, mask):
    """Mean entropy (nats, eq. 7) of softmax(x E^T) for every stream x of every block.

    Means over positions where mask (B, S) is 1 -> {"layer_in", "layer_out", "attn_in", "attn_out",
    "ffn_in", "ffn_out"}, (L,) each. One forward pass, 2^24 logits at a time.
    """
    head = model.lm_head
    chunk = max(1, (1 << 24) // head.weight.shape[0])
    blocks = []

    def visit(streams):
        means = {}
        for name, x in streams.items():
            sums = [entropy(head(piece)).sum().item() for piece in x.split(chunk)]
            means[name] = sum(sums) / len(x)
        blocks.append(means)

    block_streams(model, input_ids, attention_mask, mask, visit)
    return {name: torch.tensor([block[name] for block in blocks]) for name in blocks[0]}


def entropy_changes(entropies):
    """What leaves minus what enters, per block (eqs. 8, 11-13) -> "attn", "ffn", "layer": (L,)."""
    changes = {}
    for name in ("attn", "ffn", "layer"):
        changes[name] = entropies[f"{name}_out"] - entropies[f"{name}_in"]
    return changes


def boundary_layer(ffn_change, tolerance=0.05):
    """The 1-based block where exploration ends: the last of the first run of blocks whose FFN
    raises entropy.

    ffn_change: (L,) nats. At most tolerance * max|change| counts as zero (the paper names no
    threshold). Leading blocks that do not raise it are skipped. ValueError if none does.
    """
    change = torch.as_tensor(ffn_change).cpu().double()
    rises = (change > tolerance * change.abs().max()).tolist()
    if True not in rises:
        raise ValueError("no block's FFN raises the entropy, so there is no exploration region: "
                         "name a layer yourself")
    first = rises.index(True)
    behind = [*rises[first:], False]
    return first + behind.index(False)
