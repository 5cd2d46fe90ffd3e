"""Internal layer policies against a hook on the raw block; entropies step by step; the boundary by
hand; who gets a gradient; which models are refused."""
import math

import pytest
import torch
from conftest import random_model, rollout_of
from transformers import (
    Gemma2Config,
    GraniteConfig,
    Lfm2Config,
    MistralConfig,
    Olmo2Config,
    Qwen3Config,
)

from common import internal_policy as ip
from common.flags import BadInput
from common.logprobs import response_logprobs

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
KINDS = pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])


def first(output):
    return output[0] if isinstance(output, tuple) else output


@KINDS
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_layer_logits_are_the_unembedded_raw_block_output(kind, layer):
    """A hook on block `layer` catches H^layer in a full forward; layer_logits is E H^layer, with
    the norm in between if asked."""
    model = random_model(kind)
    caught = []

    def catch(module, args, output):
        caught.append(first(output))

    handle = model.model.layers[layer - 1].register_forward_hook(catch)
    model(IDS)
    handle.remove()
    E = model.lm_head.weight
    raw = caught[0] @ E.T
    normed = model.model.norm(caught[0]) @ E.T
    assert torch.allclose(ip.layer_logits(model, IDS, layer=layer), raw, atol=1e-5)
    got = ip.layer_logits(model, IDS, layer=layer, final_norm=True)
    assert torch.allclose(got, normed, atol=1e-5)
    assert (raw - normed).abs().max() > 0.1


@KINDS
@pytest.mark.parametrize("layer", [None, 4])
@pytest.mark.parametrize("final_norm", [False, True])
def test_the_last_layer_is_the_model(kind, layer, final_norm):
    model = random_model(kind)
    got = ip.layer_logits(model, IDS, layer=layer, final_norm=final_norm)
    assert torch.equal(got, model(IDS).logits)


def test_first_blocks():
    """Of L blocks it is the trunk itself; of fewer a view: the very blocks, the model as it was."""
    model = random_model()
    trunk = model.model
    assert ip.first_blocks(model, 4) is trunk and ip.first_blocks(model, 4, True) is trunk
    view = ip.first_blocks(model, 2)
    assert view is not trunk
    assert [id(block) for block in view.layers] == [id(block) for block in trunk.layers[:2]]
    assert view.embed_tokens is trunk.embed_tokens
    assert isinstance(view.norm, torch.nn.Identity)
    assert ip.first_blocks(model, 2, True).norm is trunk.norm
    assert len(trunk.layers) == 4 and model.model is trunk
    own = {id(weight) for weight in model.parameters()}
    assert {id(weight) for weight in view.parameters()} < own


def test_attention_mask_is_passed_on():
    """Left-padded rows: the visible part's logits are those of the row alone. Rotary positions are
    relative, so starting at 2 instead of 0 changes nothing."""
    model = random_model("llama")
    padded = torch.tensor([[0, 0, 5, 6, 7]])
    visible = torch.tensor([[0, 0, 1, 1, 1]])
    got = ip.layer_logits(model, padded, visible, layer=2)[0, 2:]
    assert torch.allclose(got, ip.layer_logits(model, padded[:, 2:], layer=2)[0], atol=1e-4)


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_layer_out_of_range(layer):
    with pytest.raises(ValueError, match="1..4"):
        ip.first_blocks(random_model(), layer)


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_layer_logits_out_of_range(layer):
    with pytest.raises(ValueError, match="1..4"):
        ip.layer_logits(random_model(), IDS, layer=layer)


@KINDS
@pytest.mark.parametrize("tie", [False, True])
def test_who_gets_a_gradient(kind, tie):
    """Blocks 1..l, the token embedding and the unembedding do, and only they are run; blocks above
    l and the final norm have grad None, not zero."""
    model, ran = random_model(kind, tie=tie), []
    for number, block in enumerate(model.model.layers, 1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    rollout = rollout_of([[5, 6], [7]], torch.tensor([2, 1]), T=2)
    logp = response_logprobs(model, rollout, trunk=ip.first_blocks(model, 2))
    logp.sum().backward()
    assert ran == [1, 2]
    for name, weight in model.named_parameters():
        if name.startswith(("model.layers.2.", "model.layers.3.", "model.norm.")):
            assert weight.grad is None, name
        else:
            assert weight.grad.abs().max() > 0, name
    assert ip.layer_logits(model, IDS).shape == (2, 5, 97)  # the model is left as it was


def test_the_norm_has_a_gradient_if_it_is_read():
    model = random_model()
    trunk = ip.first_blocks(model, 2, final_norm=True)
    rollout = rollout_of([[5, 6], [7]], torch.tensor([2, 1]), T=2)
    response_logprobs(model, rollout, trunk=trunk).sum().backward()
    assert model.model.norm.weight.grad.abs().max() > 0
    assert model.model.layers[2].mlp.up_proj.weight.grad is None


def test_a_short_trunk_recomputes_its_blocks():
    """Gradients of layer 2's policy are the same when blocks are computed again for them."""
    rollout = rollout_of([[5, 6], [7]], torch.tensor([2, 1]), T=2)
    results = []
    for again in (False, True):
        model = random_model()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        logp = response_logprobs(model, rollout, trunk=ip.first_blocks(model, 2))
        logp.sum().backward()
        results.append(model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.allclose(*results, atol=1e-6)


def test_entropy_by_hand():
    """Uniform over 4: ln 4. Probabilities 1/2, 1/4, 1/4: (ln 2)/2 + (ln 4)/2 = 1.5 ln 2. One sure
    token: 0."""
    logits = torch.tensor([[0.0, 0, 0, 0], [math.log(2), 0, 0, -1e9], [1000, 0, 0, 0]])
    by_hand = [math.log(4), 1.5 * math.log(2), 0.0]
    assert ip.entropy(logits).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_entropy_is_taken_in_float32():
    """ln 97 = 4.57471 for constant bfloat16 logits; bfloat16 itself could only say 4.5625 or
    4.59375."""
    flat = torch.full((1, 97), 3.0, dtype=torch.bfloat16)
    assert ip.entropy(flat).item() == pytest.approx(math.log(97), abs=1e-5)


def streams_by_hand(model, ids):
    """name -> L tensors (B, S, D): every stream from the blocks' own modules (eqs. 5, 6, 11-13)."""
    streams = {name: [] for name in ("layer_in", "attn_in", "attn_out", "ffn_in", "ffn_out",
                                     "layer_out")}
    h = model.model.embed_tokens(ids)
    S = ids.shape[1]
    rotary = model.model.rotary_emb(h, torch.arange(S)[None])
    causal = torch.full((S, S), -torch.inf).triu(1)[None, None]
    for block in model.model.layers:
        streams["layer_in"].append(h)
        attn_in = block.input_layernorm(h)
        attn_out = block.self_attn(attn_in, position_embeddings=rotary, attention_mask=causal)[0]
        h = h + attn_out
        ffn_in = block.post_attention_layernorm(h)
        ffn_out = block.mlp(ffn_in)
        h = h + ffn_out
        for name, x in (("attn_in", attn_in), ("attn_out", attn_out), ("ffn_in", ffn_in),
                        ("ffn_out", ffn_out), ("layer_out", h)):
            streams[name].append(x)
    return streams


@KINDS
def test_block_streams(kind):
    """Visited once per block, the lowest first, with every stream where the mask is 1; no hook
    stays."""
    model, mask = random_model(kind), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    visits = []
    ip.block_streams(model, IDS, None, mask, visits.append)
    by_hand = streams_by_hand(model, IDS)
    assert len(visits) == 4
    for block, streams in enumerate(visits):
        assert streams.keys() == by_hand.keys()
        for name, x in streams.items():
            assert torch.allclose(x, by_hand[name][block][mask.bool()], atol=1e-4), name
    assert not any(module._forward_hooks for module in model.modules())


@KINDS
def test_internal_entropies(kind):
    """Means over the mask of the entropy of softmax(x E^T) for every stream of every block."""
    model, mask = random_model(kind), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    got = ip.internal_entropies(model, IDS, None, mask)
    E = model.lm_head.weight
    for name, blocks in streams_by_hand(model, IDS).items():
        expected = []
        for x in blocks:
            p = (x[mask.bool()] @ E.T).double().softmax(-1)             # (N, V)
            expected.append(-(p * p.log()).sum(-1).mean().item())
        assert got[name].shape == (4,)
        assert got[name].tolist() == pytest.approx(expected, abs=1e-4), name


def test_entropies_of_many_tokens():
    """2^24 logits at a time: with V = 2^23 two tokens, so five are 2 + 2 + 1, of the same mean."""
    model, sizes = random_model(), []
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]])
    plain = ip.internal_entropies(model, IDS, None, mask)

    class Wide(torch.nn.Module):
        weight = torch.zeros(1, 32).expand(1 << 23, 32)
        inner = model.lm_head

        def forward(self, x):
            sizes.append(len(x))
            return self.inner(x)

    model.lm_head = Wide()
    again = ip.internal_entropies(model, IDS, None, mask)
    assert sizes == [2, 2, 1] * 6 * 4
    for name, values in plain.items():
        assert torch.allclose(values, again[name], atol=1e-5)


def test_entropy_changes_by_hand():
    """What leaves minus what enters."""
    entropies = {"attn_in": [4, 3], "attn_out": [5, 1], "ffn_in": [2, 2], "ffn_out": [2.5, 1],
                 "layer_in": [4.5, 4], "layer_out": [4, 1]}
    changes = ip.entropy_changes({name: torch.tensor(x) for name, x in entropies.items()})
    by_hand = {"attn": [1, -2], "ffn": [0.5, -1], "layer": [-0.5, -3]}
    assert {name: change.tolist() for name, change in changes.items()} == by_hand


@pytest.mark.parametrize("change, layer", [
    ([1, 1, 1, 0.01, -0.01, -1], 3),        # falls to about zero after 3
    ([-1, 1, 2, -1, 1], 3),                 # a leading fall is skipped; only the first run counts
    ([0.04, 1, 0.04, 1], 2),                # 0.04 < 5 % of 1 counts as zero, before and after
    ([0.06, 1, 0.06, -1], 3),               # 0.06 does not
    ([0.2, 0.2, 0.2, 0.2], 4),              # rises to the end: the last block
    ([1.1, -20], 1),                        # just above 5 % of the largest
])
def test_boundary_layer(change, layer):
    assert ip.boundary_layer(change) == layer
    assert ip.boundary_layer(torch.tensor(change)) == layer


def test_boundary_layer_tolerance():
    """With tolerance 0.2 the 0.15s count as zero."""
    assert ip.boundary_layer([0.15, 1, 0.15, 1], 0.05) == 4
    assert ip.boundary_layer([0.15, 1, 0.15, 1], 0.2) == 2


@pytest.mark.parametrize("change", [[-1, -2], [0, 0], [1, -20]])  # 1 is exactly 5 % of 20
def test_no_exploration_region(change):
    with pytest.raises(ValueError, match="no exploration region"):
        ip.boundary_layer(change)


@pytest.mark.parametrize("config, options", [
    (Gemma2Config, {"head_dim": 8}),                # norms what attention and FFN put out
    (Olmo2Config, {}),                              # the same, with no norm before
    (GraniteConfig, {"residual_multiplier": 0.5}),  # adds half of it
])
def test_blocks_that_do_not_just_add_are_refused(config, options):
    model = random_model(config, layers=2, **options)
    with pytest.raises(BadInput, match="do not just add"):
        ip.internal_entropies(model, IDS, None, torch.ones(2, 5))
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_of_other_kinds_are_refused():
    """LFM 2's blocks of convolutions have no attention."""
    other = random_model(Lfm2Config, layers=2, layer_types=["conv", "full_attention"])
    with pytest.raises(BadInput, match="Lfm2ForCausalLM: not every block has self_attn"):
        ip.internal_entropies(other, IDS, None, torch.ones(2, 5))
    assert not any(module._forward_hooks for module in other.modules())


@pytest.mark.parametrize("config", [MistralConfig, Qwen3Config])
def test_kin_are_not_refused(config):
    model = random_model(config, layers=2, head_dim=8)
    assert ip.internal_entropies(model, IDS, None, torch.ones(2, 5))["ffn_out"].shape == (2,)
