"""Log-probs of answers: values by hand, and everything that must not change them."""
import math

import pytest
import torch
from conftest import random_model, rollout_of

import grpo
from common import logprobs
from common.internal_policy import first_blocks
from common.logprobs import (
    largest_gap,
    micro_batches,
    old_logprobs,
    response_logprobs,
    states_before_answers,
    token_logprobs,
)
from common.models import autocast

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
LENGTHS = torch.tensor([4, 6, 1, 3])
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5])
ALL = torch.arange(4)
NO_ROW = torch.zeros(0, dtype=torch.long)


def only(rollout, b):
    """Row b without the batch and without padding."""
    part = rollout[torch.tensor([b])]
    k = int(part.lengths)
    part.tokens = part.tokens[:, :k]
    return part


def lists(parts):
    return [part.tolist() for part in parts]


def test_token_logprobs_by_hand():
    """hidden (1, 0), E rows (ln 1, 0), (ln 2, 0), (ln 5, 0): probabilities 1/8, 2/8, 5/8; at
    temperature 1/2 their squares: 1, 4, 25 of 30. Entropy: (ln 8)/8 + (ln 4)/4 + (5/8) ln(8/5),
    and (ln 30)/30 + (4/30) ln(30/4) + (25/30) ln(30/25)."""
    weight = torch.tensor([[math.log(1), 0], [math.log(2), 0], [math.log(5), 0]])
    hidden = torch.tensor([[1.0, 0], [1, 0]])
    targets = torch.tensor([1, 2])
    logp, entropy = token_logprobs(hidden, weight, targets)
    assert logp.tolist() == pytest.approx([math.log(2 / 8), math.log(5 / 8)])
    by_hand = math.log(8) / 8 + math.log(4) / 4 + 5 / 8 * math.log(8 / 5)
    assert entropy.tolist() == pytest.approx([by_hand] * 2)
    logp, entropy = token_logprobs(hidden, weight, targets, temperature=0.5)
    assert logp.tolist() == pytest.approx([math.log(4 / 30), math.log(25 / 30)])
    by_hand = (math.log(30) + 4 * math.log(30 / 4) + 25 * math.log(30 / 25)) / 30
    assert entropy.tolist() == pytest.approx([by_hand] * 2)


def test_gradients_by_hand():
    """One state h = 1, E = (0, ln 3): p = 1/4, 3/4. d log p_1 / d logits = (-1/4, 1/4), so by h:
    ln(3)/4. d entropy / d logit_a = -p_a (log p_a + H), so by h: -(3/4)(ln(3/4) + H) ln 3."""
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1]))
    by_hidden, by_weight = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    assert by_hidden.item() == pytest.approx(math.log(3) / 4)
    assert by_weight[:, 0].tolist() == pytest.approx([-0.25, 0.25])
    H = math.log(4) / 4 + 3 / 4 * math.log(4 / 3)
    [by_hidden] = torch.autograd.grad(entropy.sum(), hidden)
    assert by_hidden.item() == pytest.approx(-0.75 * (math.log(0.75) + H) * math.log(3))


def test_chunks_change_nothing():
    """Values and gradients of log-probs and entropies, 22 tokens in chunks of 1, 4 and all."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(22, 8, generator=generator)
    weight = torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (22,), generator=generator)
    results = []
    for chunk in (100, 4, 1):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = token_logprobs(h, w, targets, 0.8, chunk)
        (logp.sum() + 2 * entropy.sum()).backward()
        results.append((logp.detach(), entropy.detach(), h.grad, w.grad))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.allclose(one, two, atol=1e-5)
    assert results[0][2].abs().max() > 0.1


def test_float32_inside_a_chunk():
    """Two equal logits of 32 over one of 0, in bfloat16: log-prob -ln 2 = -0.693147, which bfloat16
    would round to -0.6914 or worse."""
    hidden = torch.tensor([[32.0]]).bfloat16()
    weight = torch.tensor([[1.0], [1.0], [0.0]]).bfloat16()
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1]))
    assert logp.dtype == entropy.dtype == torch.float32
    assert logp.item() == pytest.approx(-math.log(2), abs=1e-5)
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-5)
    # logits 3 and 0 at temperature 0.7: 3 / 0.7 = 4.28571, in bfloat16 4.28125
    one, weight = torch.ones(1, 1).bfloat16(), torch.tensor([[3.0], [0.0]]).bfloat16()
    logp, _ = token_logprobs(one, weight, torch.tensor([1]), temperature=0.7)
    assert logp.item() == pytest.approx(-math.log(1 + math.exp(3 / 0.7)), abs=1e-5)


def test_size_of_a_chunk(monkeypatch):
    """At most 2^26 logits at once: with V = 2^24 four tokens, so 11 are 4 + 4 + 3; with V = 2^27
    one at a time."""
    sizes = []

    def note(hidden, weight, targets, temperature):
        sizes.append(len(targets))
        return targets.float(), targets.float()

    monkeypatch.setattr(logprobs, "chunk_logprobs", note)
    for V in (1 << 24, 1 << 27):
        token_logprobs(torch.zeros(11, 1), torch.zeros(1, 1).expand(V, 1), torch.arange(11))
    assert sizes == [4, 4, 3] + [1] * 11


@pytest.mark.parametrize("chunk, times", [(4, 1), (2, 4), (3, 4)])
def test_a_single_chunk_is_not_computed_twice(chunk, times, monkeypatch):
    """Four tokens: one chunk of four is computed once, two chunks twice each: forward, and again in
    the backward pass."""
    original = logprobs.chunk_logprobs
    calls = []

    def counted(*arguments):
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(logprobs, "chunk_logprobs", counted)
    hidden = torch.randn(4, 3, requires_grad=True)
    logp, _ = token_logprobs(hidden, torch.randn(5, 3), torch.arange(4), chunk=chunk)
    logp.sum().backward()
    assert len(calls) == times


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("layer", [None, 2])
def test_padding_changes_nothing(kind, layer):
    """Each row alone, without a single pad token, gives what it gives in a padded batch; outside
    the answer all is zero."""
    model, rollout = random_model(kind), rollout_of(PROMPTS, LENGTHS)
    trunk = first_blocks(model, layer) if layer else None
    batch = response_logprobs(model, rollout, trunk=trunk)
    assert batch.shape == (4, 6)
    for b, k in enumerate(LENGTHS.tolist()):
        alone = response_logprobs(model, only(rollout, b), trunk=trunk)
        assert torch.allclose(alone[0], batch[b, :k], atol=1e-5)
        assert (batch[b, k:] == 0).all()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_a_plain_forward(kind, temperature):
    """The log-prob of answer token t is log_softmax of logits / temperature one position before."""
    model, rollout = random_model(kind), rollout_of(PROMPTS, LENGTHS)
    logp = response_logprobs(model, rollout, temperature)
    for b, k in enumerate(LENGTHS.tolist()):
        answer = rollout.tokens[b, :k]
        ids = torch.tensor([PROMPTS[b] + answer.tolist()])
        plain = (model(ids).logits[0] / temperature).log_softmax(-1)[-k - 1:-1]
        assert torch.allclose(logp[b, :k], plain[torch.arange(k), answer], atol=1e-5)


def test_temperature_by_hand():
    """The unembedding is 0 but for token 3, which reads a state of 1: its logit is 2 and the other
    96 are 0. At temperature 1/2 it is 4: log p = 4 - ln(96 + e^4)."""
    model, rollout = random_model(), rollout_of([[5]], torch.tensor([1]), T=1)
    rollout.tokens[0, 0] = 3
    with torch.no_grad():
        model.lm_head.weight.zero_()
        state = states_before_answers(model, rollout)[0]
        model.lm_head.weight[3] = 2 * state / state.square().sum()
    for temperature, logit in ((1.0, 2), (0.5, 4)):
        logp = response_logprobs(model, rollout, temperature)
        assert logp.item() == pytest.approx(logit - math.log(96 + math.exp(logit)), abs=1e-4)


def test_states_before_answers():
    """Row after row, the last state of the prompt and those of all answer tokens but the last."""
    model, rollout = random_model(), rollout_of([[5, 6], [7]], torch.tensor([2, 3]), T=3)
    states = states_before_answers(model, rollout)
    one = model.model(torch.tensor([[5, 6, *rollout.tokens[0, :2]]])).last_hidden_state[0, 1:3]
    two = model.model(torch.tensor([[7, *rollout.tokens[1]]])).last_hidden_state[0, :3]
    assert torch.allclose(states, torch.cat([one, two]), atol=1e-5)


def test_rows_line_up_with_the_rollout():
    """rollout[rows] keeps T and the order asked for: its log-probs are rows of the whole's."""
    model, rollout = random_model(), rollout_of(PROMPTS, LENGTHS)
    part = torch.tensor([2, 0])
    got = response_logprobs(model, rollout[part])
    assert rollout[part].prompts == [PROMPTS[2], PROMPTS[0]]
    assert got.shape == (2, 6)
    assert torch.allclose(got, response_logprobs(model, rollout)[part], atol=1e-5)


def update_gradients(model, rollout, budget, aggregation="token", temperature=1.0):
    """Gradients of a whole GRPO update, cut into micro-batches by the budget."""
    num_tokens = int(rollout.lengths.sum())
    model.zero_grad()
    parts = micro_batches(rollout, ALL, budget)
    for part in parts:
        batch = rollout[part]
        logp = response_logprobs(model, batch, temperature)
        old = logp.detach() + 0.05
        denominator = grpo.token_denominator(aggregation, batch.lengths, 4, num_tokens, 6)
        loss, _ = grpo.grpo_loss(logp, old, ADVANTAGES[part], batch.mask, denominator=denominator)
        loss.backward()
    return len(parts), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches_change_nothing(aggregation):
    model, rollout = random_model(), rollout_of(PROMPTS, LENGTHS)
    one, whole = update_gradients(model, rollout, 10_000, aggregation)
    two, halves = update_gradients(model, rollout, 14, aggregation)
    four, singles = update_gradients(model, rollout, 1, aggregation)
    assert (one, two, four) == (1, 2, 4)
    assert torch.allclose(whole, halves, atol=1e-6) and torch.allclose(whole, singles, atol=1e-6)
    assert whole.abs().max() > 1e-3


def test_more_padding_changes_nothing():
    """An update of the four rows with T = 6 and of the same rows in a rollout with T = 30."""
    model, rollout = random_model(), rollout_of(PROMPTS, LENGTHS)
    _, narrow = update_gradients(model, rollout, 14)
    wide = rollout_of(PROMPTS, LENGTHS, T=30)
    wide.tokens[:, :6] = rollout.tokens
    wide.tokens[:, 6:] = 50  # whatever stands behind an answer
    _, same = update_gradients(model, wide, 14)
    assert torch.allclose(narrow, same, atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    model, rollout = random_model(), rollout_of(PROMPTS, LENGTHS)
    _, plain = update_gradients(model, rollout, 10_000)
    model.activation_checkpointing_enable({"use_reentrant": False})
    _, again = update_gradients(model.train(), rollout, 10_000)
    assert torch.allclose(plain, again, atol=1e-7)


def test_micro_batches_keep_to_the_budget():
    """Rows of 7, 7, 6, 5 tokens with a budget of 14: two of 7 fill it, then 6 + 5 in two rows of 6.
    With 13 each is alone but 6 + 5; a row longer than the budget is a part of its own."""
    rollout = rollout_of(PROMPTS, LENGTHS)
    assert lists(micro_batches(rollout, ALL, 14)) == [[0, 1], [2, 3]]
    assert lists(micro_batches(rollout, ALL, 13)) == [[0], [1], [2, 3]]
    assert lists(micro_batches(rollout, ALL, 1)) == [[0], [1], [2], [3]]
    assert lists(micro_batches(rollout, torch.tensor([3, 2]), 14)) == [[2, 3]]
    assert lists(micro_batches(rollout, NO_ROW, 14)) == []


def test_the_longest_row_fills_the_budget_first():
    """Rows of 4, 9, 3, 9 tokens, budget 18: 9 + 9 first, so that memory runs out at once if it
    does, then 4 + 3; never 3 + 9 + 9."""
    rollout = rollout_of([[5] * 3, [5] * 3, [5] * 2, [5] * 3], torch.tensor([1, 6, 1, 6]))
    assert lists(micro_batches(rollout, ALL, 18)) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("rows, elsewhere, parts", [
    ([0, 1, 2, 3], 4, [[0, 1], [2, 3], [], []]),
    ([0, 1, 2, 3], 1, [[0, 1], [2, 3]]),
    ([1], 3, [[1], [], []]),
    ([], 1, [[]]),
])
def test_ranks_make_equally_many_micro_batches(rows, elsewhere, parts, monkeypatch):
    """Rows of 7, 7, 6, 5 tokens, budget 14; another rank has `elsewhere` parts."""
    monkeypatch.setattr(logprobs, "everyone", lambda count: [count, elsewhere])
    rows = torch.tensor(rows, dtype=torch.long)
    assert lists(micro_batches(rollout_of(PROMPTS, LENGTHS), rows, 14)) == parts


@pytest.mark.parametrize("tie", [False, True])
def test_an_empty_micro_batch_has_zero_gradients(tie):
    """No rows: log-probs (0, T), a loss and metrics of 0, and a gradient of zeros, not None, for
    every weight: ranks that wait for each other's gradients need one."""
    model, rollout = random_model(tie=tie), rollout_of(PROMPTS, LENGTHS)
    batch = rollout[NO_ROW]
    logp = response_logprobs(model, batch)
    assert logp.shape == batch.mask.shape == (0, 6)
    assert largest_gap(logp, batch) == 0.0
    loss, metrics = grpo.grpo_loss(logp, logp.detach(), ADVANTAGES[NO_ROW], batch.mask,
                                   denominator=torch.ones(0, 1))
    loss.backward()
    assert loss.item() == 0 and metrics == {"clip_fraction": 0}
    for name, weight in model.named_parameters():
        assert weight.grad is not None and (weight.grad == 0).all(), name


def test_an_empty_micro_batch_of_a_layer():
    """The blocks above the layer and the norm have no gradient at all, the others zeros."""
    model, rollout = random_model(), rollout_of(PROMPTS, LENGTHS)
    logp = response_logprobs(model, rollout[NO_ROW], trunk=first_blocks(model, 2))
    logp.sum().backward()
    for name, weight in model.named_parameters():
        above = name.startswith(("model.layers.2.", "model.layers.3.", "model.norm."))
        assert (weight.grad is None) == above, name


def test_the_stop_token_is_trained():
    """Row 0's last token has a gradient on its log-prob, -A / 14 with 14 tokens in all, as every
    other token of the answer."""
    model, rollout = random_model(), rollout_of(PROMPTS, LENGTHS)
    logp = response_logprobs(model, rollout)
    logp.retain_grad()
    loss, _ = grpo.grpo_loss(logp, logp.detach(), ADVANTAGES, rollout.mask)
    loss.backward()
    assert logp.grad[0].tolist() == pytest.approx([-1 / 14] * 4 + [0, 0])


@pytest.mark.parametrize("layer", [None, 1])
def test_old_logprobs(layer):
    """Of the chosen rows, in micro-batches, what response_logprobs gives; 0 elsewhere; no
    gradient."""
    model, rollout = random_model("llama"), rollout_of(PROMPTS, LENGTHS)
    trunk = first_blocks(model, layer) if layer else None
    plain = response_logprobs(model, rollout, 0.7, trunk)
    old = old_logprobs(model, rollout, torch.tensor([0, 3]), 7, 0.7, trunk)
    assert torch.allclose(old[[0, 3]], plain[[0, 3]], atol=1e-5)
    assert (old[[1, 2]] == 0).all() and not old.requires_grad
    assert (old_logprobs(model, rollout, NO_ROW, 7) == 0).all()


def test_largest_gap():
    """|-1 + 1.5| = 0.5 and |-2 + 1.75| = 0.25 inside the mask; the 9 outside does not count."""
    rollout = rollout_of([[5]], torch.tensor([2]), T=3)
    rollout.logp = torch.tensor([[-1.5, -1.75, 0.0]])
    assert largest_gap(torch.tensor([[-1.0, -2.0, 9.0]], requires_grad=True), rollout) == 0.5


def test_bfloat16_by_autocast():
    """Log-probs have digits that bfloat16 has not and are the model's own under autocast; gradients
    are float32, as the weights are."""
    model, rollout = random_model(), rollout_of(PROMPTS, LENGTHS)
    exact = response_logprobs(model, rollout)
    model.compute_dtype = torch.bfloat16
    logp = response_logprobs(model, rollout)
    inside = rollout.mask.bool()
    assert logp.dtype == torch.float32
    assert (logp.bfloat16().float() != logp)[inside].float().mean() > 0.9
    assert 1e-4 < (logp - exact).abs().max() < 0.5
    with torch.no_grad(), autocast(model):
        ids = torch.tensor([PROMPTS[0] + rollout.tokens[0, :4].tolist()])
        logits = model(ids).logits[0, 2:-1]
    assert logits.dtype == torch.bfloat16
    plain = logits.float().log_softmax(-1)[torch.arange(4), rollout.tokens[0, :4]]
    assert (plain - logp[0, :4]).abs().max() < 0.1
    logp.sum().backward()
    assert {weight.grad.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tie", [False, True])
def test_bfloat16_micro_batches_change_little(tie):
    """Gradients of one update in bfloat16, in one part and in four, point the same way."""
    model, rollout = random_model(tie=tie), rollout_of(PROMPTS, LENGTHS)
    model.compute_dtype = torch.bfloat16
    _, whole = update_gradients(model, rollout, 10_000)
    _, singles = update_gradients(model, rollout, 1)
    assert torch.cosine_similarity(whole, singles, dim=0) > 0.99
