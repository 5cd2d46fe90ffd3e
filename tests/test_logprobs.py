"""Log-probs of answers: values by hand, and everything that must not change them."""
import math

import pytest
import torch
from conftest import random_model, rollout_of

import grpo
from common import logprobs
from common.logprobs import micro_batches, response_logprobs, score, token_logprobs
from common.optim import MasterAdamW

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
LENGTHS = torch.tensor([4, 6, 1, 3])


def alone_in_batch(rollout, b, k):
    """Row b without the batch and without padding."""
    part = rollout[torch.tensor([b])]
    part.tokens, part.mask = part.tokens[:, :k], part.mask[:, :k]
    return part


def test_token_logprobs_by_hand():
    """hidden (1, 0), E rows (ln 1, 0), (ln 2, 0), (ln 5, 0): probabilities 1/8, 2/8, 5/8; at temperature 1/2 squares: 1, 4, 25 of 30.

    Entropy at T = 1: (ln 8)/8 + (ln 4)/4 + (5/8) ln(8/5).
    """
    weight = torch.tensor([[math.log(1), 0], [math.log(2), 0], [math.log(5), 0]])
    hidden = torch.tensor([[1.0, 0], [1, 0]])
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1, 2]))
    assert logp.tolist() == pytest.approx([math.log(2 / 8), math.log(5 / 8)])
    assert entropy.tolist() == pytest.approx([math.log(8) / 8 + math.log(4) / 4 + 5 / 8 * math.log(8 / 5)] * 2)
    assert token_logprobs(hidden, weight, torch.tensor([1, 2]), temperature=0.5)[0].tolist() == pytest.approx([math.log(4 / 30), math.log(25 / 30)])


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 11, 8, generator=generator), torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (2, 11), generator=generator)
    results = []
    for chunk in (1, 4, 100):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = token_logprobs(h, w, targets, chunk=chunk, entropy_grad=True)
        (logp.sum() + 2 * entropy.sum()).backward()
        results.append((logp.detach(), entropy.detach(), h.grad, w.grad))
    for other in results[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0], other))
    assert not token_logprobs(h, w, targets)[1].requires_grad


def test_float32_inside_a_chunk():
    """Two equal logits of 32 over one of 0, in bfloat16: log-prob -ln 2 = -0.693147, which bfloat16 would round to -0.6914 or worse."""
    hidden, weight = torch.tensor([[32.0]]).bfloat16(), torch.tensor([[1.0], [1.0], [0.0]]).bfloat16()
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1]))
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.item() == pytest.approx(-math.log(2), abs=1e-5) and entropy.item() == pytest.approx(math.log(2), abs=1e-5)


def test_size_of_a_chunk(monkeypatch):
    """At most 2^26 logits at once: with V = 2^24 four tokens, so 11 are 4 + 4 + 3; with V = 2^27 one at a time."""
    sizes = []
    monkeypatch.setattr(logprobs, "_chunk_logprobs", lambda h, w, y, *_: sizes.append(len(y)) or (y.float(), y.float()))
    for V in (1 << 24, 1 << 27):
        token_logprobs(torch.zeros(11, 1), torch.zeros(1, 1).expand(V, 1), torch.arange(11))
    assert sizes == [4, 4, 3] + [1] * 11


@pytest.mark.parametrize("chunk, times", [(4, 1), (2, 4), (3, 4)])
def test_a_single_chunk_is_not_computed_twice(chunk, times, monkeypatch):
    """Four tokens: one chunk of four is computed once, two chunks twice each: forward, and again in the backward pass."""
    original, calls = logprobs._chunk_logprobs, []
    monkeypatch.setattr(logprobs, "_chunk_logprobs", lambda *args: calls.append(1) or original(*args))
    hidden = torch.randn(4, 3, requires_grad=True)
    token_logprobs(hidden, torch.randn(5, 3), torch.arange(4), chunk=chunk)[0].sum().backward()
    assert len(calls) == times


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("layer", [None, 2])
def test_padding_changes_nothing(kind, layer):
    """Each row alone, without a single pad token, gives what it gives in a padded batch; outside the answer all is zero."""
    model, rollout = random_model(kind), rollout_of(PROMPTS, LENGTHS)
    batch, _ = response_logprobs(model, rollout, layer=layer)
    for b, k in enumerate(LENGTHS.tolist()):
        alone, _ = response_logprobs(model, alone_in_batch(rollout, b, k), layer=layer)
        assert torch.allclose(alone[0], batch[b, :k], atol=1e-5) and (batch[b, k:] == 0).all()


def test_against_a_plain_forward():
    """The log-prob of answer token t is log_softmax of the logits one position earlier."""
    model, rollout = random_model("llama"), rollout_of(PROMPTS, LENGTHS)
    logp, _ = response_logprobs(model, rollout, temperature=0.8)
    ids = torch.tensor([PROMPTS[0] + rollout.tokens[0, :4].tolist()])
    plain = (model(ids).logits[0] / 0.8).log_softmax(-1)
    assert logp[0, :4].tolist() == pytest.approx([plain[2 + t, ids[0, 3 + t]].item() for t in range(4)], abs=1e-5)


def gradients(model, rollout, budget, aggregation):
    """Gradients of a whole GRPO update, cut into micro-batches by the budget."""
    advantages, B = torch.tensor([1.0, -0.5, 2.0, -1.5]), len(rollout.prompts)
    denominator = grpo.token_denominator(aggregation, rollout.mask.sum(1), 6)
    model.zero_grad()
    parts = micro_batches(torch.arange(B), rollout, budget)
    for m in parts:
        logp, _ = response_logprobs(model, rollout[m])
        grpo.grpo_loss(logp, logp.detach() + 0.05, advantages[m], rollout.mask[m], denominator=denominator[m])[0].backward()
    return len(parts), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_change_nothing(aggregation):
    model, rollout = random_model("qwen3"), rollout_of(PROMPTS, LENGTHS)
    one, whole = gradients(model, rollout, 10_000, aggregation)
    two, halves = gradients(model, rollout, 14, aggregation)
    four, singles = gradients(model, rollout, 1, aggregation)
    assert (one, two, four) == (1, 2, 4)
    assert torch.allclose(whole, halves, atol=1e-6) and torch.allclose(whole, singles, atol=1e-6) and whole.abs().max() > 1e-3


def test_micro_batches_keep_to_the_budget():
    """Rows of 7, 7, 6, 5 tokens with a budget of 14: two of 7 fill it, then 6 + 5 in two rows of 6."""
    parts = micro_batches(torch.arange(4), rollout_of(PROMPTS, LENGTHS), 14)
    assert sorted(map(sorted, (part.tolist() for part in parts))) == [[0, 1], [2, 3]]
    assert [part.tolist() for part in micro_batches(torch.tensor([], dtype=torch.long), rollout_of(PROMPTS, LENGTHS), 14)] == []


def test_the_longest_row_fills_the_budget_first():
    """Rows of 4, 9, 3, 9 tokens, budget 18: 9 + 9 first, so that memory runs out at once if it does, then 4 + 3; never 3 + 9 + 9."""
    rollout = rollout_of([[5] * 3, [5] * 3, [5] * 2, [5] * 3], torch.tensor([1, 6, 1, 6]))
    assert [part.tolist() for part in micro_batches(torch.arange(4), rollout, 18)] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("useful, elsewhere, parts", [
    ([1, 1, 1, 1], 4, [[0], [2], [1], [3]]),    # two parts of two; another rank has four: each gives up its second row
    ([1, 1, 1, 1], 3, [[0], [2, 3], [1]]),
    ([0, 1, 0, 0], 3, [[1], [3], [2]]),         # nothing to split: rows without a gradient, last first
    ([0, 0, 0, 0], 1, [[3]]),                   # no part at all here, one elsewhere
])
def test_ranks_make_equally_many_micro_batches(useful, elsewhere, parts, monkeypatch):
    """Rows of 7, 7, 6, 5 tokens, budget 14: [0, 1], [2, 3] if all are useful."""
    monkeypatch.setattr(logprobs, "everyone", lambda count: [count, elsewhere])
    got = micro_batches(torch.arange(4), rollout_of(PROMPTS, LENGTHS), 14, torch.tensor(useful).bool())
    assert [part.tolist() for part in got] == parts


def test_the_stop_token_is_trained():
    """Row 0's last token has a gradient on its log-prob, -A / 14 with 14 tokens in all, as every other token of the answer."""
    model, rollout = random_model("qwen3"), rollout_of(PROMPTS, LENGTHS)
    logp, _ = response_logprobs(model, rollout)
    logp.retain_grad()
    grpo.grpo_loss(logp, logp.detach(), torch.tensor([1.0, -0.5, 2.0, -1.5]), rollout.mask)[0].backward()
    assert logp.grad[0].tolist() == pytest.approx([-1 / 14] * 4 + [0, 0])


def test_score_is_response_logprobs_of_the_chosen_rows():
    model, rollout = random_model("llama"), rollout_of(PROMPTS, LENGTHS)
    plain, _ = response_logprobs(model, rollout, layer=1)
    scored = score(model, rollout, torch.tensor([True, False, False, True]), budget=7, layer=1)
    assert torch.allclose(scored[[0, 3]], plain[[0, 3]], atol=1e-5) and (scored[[1, 2]] == 0).all() and not scored.requires_grad


def test_gradient_checkpointing_changes_nothing():
    model, rollout = random_model("qwen3"), rollout_of(PROMPTS, LENGTHS)
    _, plain = gradients(model, rollout, 10_000, "token")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _, checkpointed = gradients(model.train(), rollout, 10_000, "token")
    assert torch.allclose(plain, checkpointed, atol=1e-7)


def test_masters_keep_what_bfloat16_would_lose():
    """A weight of 1 in bfloat16 (steps of 2^-8 below it, 2^-7 above), gradient 1, lr 1e-4: Adam moves it by 1e-4 a step.

    Plain bfloat16 would round each step away; the float32 master falls to 1 - 40e-4 = 0.996 and the weight follows: 0.99609375.
    """
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    holder = torch.nn.Module()
    holder.weight = weight
    optimizer = MasterAdamW(holder, lr=1e-4, weight_decay=0.0)
    for _ in range(40):
        for _ in range(2):  # two micro-batches
            weight.float().mul(0.5).sum().backward()
        assert optimizer.step(max_norm=10.0) == pytest.approx(1.0) and weight.grad is optimizer.masters[0].grad is None
    assert optimizer.masters[0].item() == pytest.approx(0.996, abs=1e-5) and weight.item() == 0.99609375


def test_a_gradient_that_is_not_finite_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(1))
    holder = torch.nn.Module()
    holder.weight = weight
    optimizer = MasterAdamW(holder, lr=0.1)
    (weight * float("nan")).sum().backward()
    assert math.isnan(optimizer.step()) and weight.item() == 1.0


def test_adapters_trained_in_float32_are_not_rounded_silently():
    """Saved by older code: without masters, as they were their own. A bfloat16 weight cannot go on from that."""
    old, new = MasterAdamW(torch.nn.Linear(2, 1), lr=0.1), MasterAdamW(torch.nn.Linear(2, 1).bfloat16(), lr=0.1)
    with pytest.raises(ValueError, match="trained in float32"):
        new.load_state_dict(old.state_dict())


def test_a_resumed_optimizer_keeps_how_it_was_built():
    """Moments and step count come from the checkpoint; learning rate, decay and the kind of update, which follows the device, do not."""
    old, new = (MasterAdamW(torch.nn.Linear(2, 1), lr=lr, weight_decay=decay) for lr, decay in ((0.1, 0.01), (0.2, 0.0)))
    old.backward(old.weights[0].sum())
    old.step()
    saved = old.state_dict()
    saved["adamw"]["param_groups"][0]["fused"] = True
    new.load_state_dict(saved)
    group, moments = new.adamw.param_groups[0], new.adamw.state[new.masters[0]]
    assert (group["lr"], group["weight_decay"], group["fused"]) == (0.2, 0.0, None)
    assert moments["step"] == 1 and torch.equal(moments["exp_avg"], old.adamw.state[old.masters[0]]["exp_avg"])
