"""Internal layer policies against a hook on the raw block; who gets a gradient; entropies and the boundary by hand."""
import math

import pytest
import torch
from conftest import random_model, rollout_of

from common import internal_policy as ip
from common.logprobs import response_logprobs

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_layer_logits_are_the_unembedded_raw_block_output(kind, layer):
    """A hook on block `layer` catches H^layer in a full forward; layer_logits is E H^layer, with the norm in between if asked."""
    model, caught = random_model(kind), {}
    handle = model.model.layers[layer - 1].register_forward_hook(lambda _m, _a, out: caught.update(h=out[0] if isinstance(out, tuple) else out))
    model(IDS)
    handle.remove()
    raw = caught["h"] @ model.lm_head.weight.T
    assert torch.allclose(ip.layer_logits(model, IDS, layer=layer), raw, atol=1e-5)
    normed = model.model.norm(caught["h"]) @ model.lm_head.weight.T
    assert torch.allclose(ip.layer_logits(model, IDS, layer=layer, final_norm=True), normed, atol=1e-5)
    assert (raw - normed).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_last_layer_is_the_model(kind):
    model = random_model(kind)
    for layer in (None, 4):
        assert torch.allclose(ip.layer_logits(model, IDS, layer=layer), model(IDS).logits, atol=1e-6)


def test_attention_mask_is_passed_on():
    """Left-padded rows: the visible part's logits are those of the row alone."""
    model = random_model("llama")
    padded = torch.tensor([[0, 0, 5, 6, 7]])
    seen = torch.tensor([[0, 0, 1, 1, 1]])
    got = ip.layer_logits(model, padded, seen, layer=2)[0, 2:]
    # rotary positions are relative, so starting at 2 instead of 0 changes nothing
    assert torch.allclose(got, ip.layer_logits(model, padded[:, 2:], layer=2)[0], atol=1e-4)


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_layer_out_of_range(layer):
    with pytest.raises(ValueError, match="1..4"):
        ip.layer_logits(random_model("qwen3"), IDS, layer=layer)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_who_gets_a_gradient(kind, tie):
    """Blocks 1..l, the token embedding and the unembedding do; blocks above l and the final norm have grad None, not zero."""
    model, ran = random_model(kind, tie=tie), []
    for number, block in enumerate(model.model.layers, 1):
        block.register_forward_hook(lambda _m, _a, _o, number=number: ran.append(number))
    logp, _ = response_logprobs(model, rollout_of([[5, 6], [7]], torch.tensor([2, 1]), T=2), layer=2)
    logp.sum().backward()
    assert ran == [1, 2]
    for name, p in model.named_parameters():
        above = name.startswith(("model.layers.2.", "model.layers.3.", "model.norm."))
        assert (p.grad is None) if above else (p.grad is not None and p.grad.abs().max() > 0), name
    assert len(model.model.layers) == 4 and ip.layer_logits(model, IDS).shape == (2, 5, 97)  # the model is left as it was


def test_entropy_by_hand():
    """Uniform over 4: ln 4. Probabilities 1/2, 1/4, 1/4: (ln 2)/2 + (ln 4)/2 = 1.5 ln 2. One sure token: 0."""
    logits = torch.tensor([[0.0, 0, 0, 0], [math.log(2), 0, 0, -1e9], [1000, 0, 0, 0]])
    assert ip.entropy(logits).tolist() == pytest.approx([math.log(4), 1.5 * math.log(2), 0.0], abs=1e-6)


def test_entropy_is_taken_in_float32():
    """ln 97 = 4.57471 for constant bfloat16 logits; bfloat16 itself could only say 4.5625 or 4.59375."""
    assert ip.entropy(torch.full((1, 97), 3.0, dtype=torch.bfloat16)).item() == pytest.approx(math.log(97), abs=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_internal_entropies(kind):
    """Every stream recomputed step by step from the blocks' own modules, as bupo's section 2 defines it, one row without padding."""
    model, mask = random_model(kind), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    got = ip.internal_entropies(model, IDS, None, mask, chunk=2)
    layers, streams = model.model.layers, {name: [] for name in got}
    h = model.model.embed_tokens(IDS)
    rotary = model.model.rotary_emb(h, torch.arange(5)[None])
    for block in layers:
        streams["layer_in"].append(h)
        streams["attn_in"].append(block.input_layernorm(h))
        causal = torch.full((5, 5), -torch.inf).triu(1)[None, None]
        streams["attn_out"].append(block.self_attn(streams["attn_in"][-1], position_embeddings=rotary, attention_mask=causal)[0])
        h = h + streams["attn_out"][-1]
        streams["ffn_in"].append(block.post_attention_layernorm(h))
        streams["ffn_out"].append(block.mlp(streams["ffn_in"][-1]))
        h = h + streams["ffn_out"][-1]
        streams["layer_out"].append(h)
    for name, xs in streams.items():
        expected = [ip.entropy(x @ model.lm_head.weight.T)[mask.bool()].mean().item() for x in xs]
        assert got[name].tolist() == pytest.approx(expected, abs=1e-4), name
    assert not any(m._forward_hooks for m in model.modules())


def test_entropy_changes_by_hand():
    """What leaves minus what enters."""
    entropies = {"attn_in": [4, 3], "attn_out": [5, 1], "ffn_in": [2, 2], "ffn_out": [2.5, 1], "layer_in": [4.5, 4], "layer_out": [4, 1]}
    changes = ip.entropy_changes({name: torch.tensor(v) for name, v in entropies.items()})
    assert {name: change.tolist() for name, change in changes.items()} == {"attn": [1, -2], "ffn": [0.5, -1], "layer": [-0.5, -3]}


@pytest.mark.parametrize("change, layer", [
    ([1, 1, 1, 0.01, -0.01, -1], 3),        # falls to about zero after 3
    ([-1, 1, 2, -1, 1], 3),                 # a leading fall is skipped; only the first run counts
    ([0.04, 1, 0.04, 1], 2),                # 0.04 < 5 % of 1 counts as zero, before and after
    ([0.06, 1, 0.06, -1], 3),               # 0.06 does not
    ([0.2, 0.2, 0.2, 0.2], 4),              # rises to the end: the last block
    ([1, -20], 1),                          # exactly 5 % of the largest would be zero ...
    ([1.1, -20], 1),
])
def test_boundary_layer(change, layer):
    if change == [1, -20]:
        with pytest.raises(ValueError):
            ip.boundary_layer(change)
    else:
        assert ip.boundary_layer(change) == layer


def test_boundary_layer_tolerance_and_none():
    """With tolerance 0.2 the 0.15s count as zero. No rise at all: ValueError."""
    assert ip.boundary_layer([0.15, 1, 0.15, 1], 0.05) == 4 and ip.boundary_layer([0.15, 1, 0.15, 1], 0.2) == 2
    for change in ([-1, -2], [0, 0]):
        with pytest.raises(ValueError, match="no exploration region"):
            ip.boundary_layer(change)
