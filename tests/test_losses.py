"""The losses of grpo.py and bupo.py against values worked out by hand, in the docstrings."""
import math

import pytest
import torch

import bupo
import grpo
import kl3_grpo

both = pytest.mark.parametrize("module", [grpo, bupo], ids=["grpo", "bupo"])


def loss_and_gradient(module, ratio, advantage, **kwargs):
    """Of one token with this ratio (old log-prob -1): loss, its derivative by the token's log-prob,
    clip_fraction."""
    logp = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    loss, metrics = module.grpo_loss(logp, -torch.ones(1, 1), torch.tensor([advantage]),
                                     torch.ones(1, 1), **kwargs)
    loss.backward()
    assert metrics.keys() == {"clip_fraction"}
    return loss.item(), logp.grad.item(), metrics["clip_fraction"]


@both
@pytest.mark.parametrize("ratio, advantage, kwargs, loss, gradient, cut", [
    # inside the window min(rA, clip(r)A) = rA; loss -rA; d r / d logp = r, so the gradient is -rA
    (1.0, 2.0, {}, -2.0, -2.0, 0),
    (1.1, 2.0, {}, -2.2, -2.2, 0),
    (0.9, -2.0, {}, 1.8, 1.8, 0),
    # A > 0, r = 1.5 > 1.2: min(3, 2.4) = 2.4, constant, no gradient
    (1.5, 2.0, {}, -2.4, 0.0, 1),
    # A > 0, r = 0.5 < 0.8: min(1, 1.6) = 1 = rA: the gradient lives
    (0.5, 2.0, {}, -1.0, -1.0, 0),
    # A < 0, r = 0.5 < 0.8: min(-1, -1.6) = -1.6, constant
    (0.5, -2.0, {}, 1.6, 0.0, 1),
    # A < 0, r = 1.5 > 1.2: min(-3, -2.4) = -3 = rA: lives
    (1.5, -2.0, {}, 3.0, 3.0, 0),
    # separate bounds: 1.25 is inside 1 + 0.28, outside 1 + 0.2; 0.85 is outside 1 - 0.1
    (1.25, 2.0, {"clip_high": 0.28}, -2.5, -2.5, 0),
    (1.25, 2.0, {}, -2.4, 0.0, 1),
    (0.85, -2.0, {"clip_low": 0.1}, 1.8, 0.0, 1),
    # a clip of one side leaves the other: 0.75 is outside 1 - 0.2, not outside 1 - 0.3
    (0.75, -2.0, {"clip_high": 0.3}, 1.6, 0.0, 1),
    (0.75, -2.0, {"clip_low": 0.3}, 1.5, 1.5, 0),
    # a small advantage: 1.5 * 0.5 = 0.75 against 1.2 * 0.5
    (1.5, 0.5, {}, -0.6, 0.0, 1),
    # the advantage is 0: nothing
    (1.5, 0.0, {}, 0.0, 0.0, 0),
])
def test_every_branch_of_the_clip(module, ratio, advantage, kwargs, loss, gradient, cut):
    got = loss_and_gradient(module, ratio, advantage, **kwargs)
    assert got == pytest.approx((loss, gradient, cut), abs=1e-6)


@pytest.mark.parametrize("ratio, advantage, loss, gradient, cut", [
    # A < 0, r = 5: max(min(-10, -2.4), -6) = -6, constant: no gradient, so it is clipped
    (5.0, -2.0, 6.0, 0.0, 1),
    # r = 2 is below c: max(min(-4, -2.4), -6) = -4 = rA
    (2.0, -2.0, 4.0, 4.0, 0),
    # just inside and just outside of c = 3
    (2.9, -2.0, 5.8, 5.8, 0),
    (3.1, -2.0, 6.0, 0.0, 1),
    # the lower clip goes on: max(min(-1, -1.6), -6) = -1.6
    (0.5, -2.0, 1.6, 0.0, 1),
    # A > 0 is left alone: r = 5 is cut by the upper clip at 1.2, r = 0.5 lives
    (5.0, 2.0, -2.4, 0.0, 1),
    (0.5, 2.0, -1.0, -1.0, 0),
    (0.5, 0.5, -0.25, -0.25, 0),
    (5.0, 0.0, 0.0, 0.0, 0),
])
def test_dual_clip(ratio, advantage, loss, gradient, cut):
    """c = 3: a bad token's surrogate is at least 3 A, and what that bounds counts as clipped."""
    got = loss_and_gradient(grpo, ratio, advantage, dual_clip=3.0)
    assert got == pytest.approx((loss, gradient, cut), abs=1e-6)


def test_clip_fraction_is_the_share_of_tokens_without_gradient():
    """Random tokens: a token in the mask with A != 0 is counted exactly if its gradient is 0."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(6, 40, generator=generator).requires_grad_()
    advantages = torch.randn(6, generator=generator)
    mask = (torch.rand(6, 40, generator=generator) < 0.8).float()
    loss, metrics = grpo.grpo_loss(logp, torch.zeros(6, 40), advantages, mask, dual_clip=2.0)
    loss.backward()
    without = ((logp.grad == 0) & (mask > 0)).sum().item()
    assert 0.2 * mask.sum() < without < 0.8 * mask.sum()
    assert metrics["clip_fraction"] == pytest.approx(without / mask.sum().item())


@both
def test_log_ratio_is_held_within_20(module):
    """logp - old = 1000 would be e^1000 = inf; with A < 0 the loss is -A e^20 = 485,165,195.4 and
    there is no gradient."""
    logp = torch.tensor([[1000.0]], requires_grad=True)
    loss, _ = module.grpo_loss(logp, torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(485165195.4, rel=1e-6)
    assert logp.grad.item() == 0


def test_aggregation():
    """Two answers of 4 and 1 tokens with losses 1 and 5 (advantages -1 and -5, ratio 1), longest
    answer allowed 4.

    Token mean: (4*1 + 1*5) / 5 = 1.8. Per answer: (1 + 5) / 2 = 3. Constant: (4 + 5) / (2 * 4).
    The shares that are clipped follow the same weights: none here.
    """
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    logp, advantages = torch.zeros(2, 4), torch.tensor([-1.0, -5.0])
    lengths = torch.tensor([4, 1])
    for how, value in (("token", 1.8), ("sequence", 3.0), ("constant", 1.125)):
        denominator = grpo.token_denominator(how, lengths, 2, 5, 4)
        loss, _ = grpo.grpo_loss(logp, logp, advantages, mask, denominator=denominator)
        assert loss.item() == pytest.approx(value)
    for module in (grpo, bupo):
        loss, _ = module.grpo_loss(logp, logp, advantages, mask)
        assert loss.item() == pytest.approx(1.8)
        assert module.grpo_loss(logp, logp, advantages, mask, denominator=9)[0].item() == 1.0


def test_token_denominator():
    """Two answers, of 4 and 1 tokens, in an update of 3 answers and 12 tokens, of which the longest
    may have 10. token: 12; sequence: 3 x 4 and 3 x 1; constant: 3 x 10."""
    lengths = torch.tensor([4, 1])
    assert grpo.token_denominator("token", lengths, 3, 12, 10) == 12
    assert grpo.token_denominator("sequence", lengths, 3, 12, 10).tolist() == [[12], [3]]
    assert grpo.token_denominator("constant", lengths, 3, 12, 10) == 30


@both
def test_loss_of_nothing_is_zero(module):
    """No token in the mask: 0, not 0 / 0."""
    nothing = torch.zeros(1, 3)
    loss, metrics = module.grpo_loss(nothing, nothing, torch.ones(1), nothing)
    assert loss.item() == 0 and metrics["clip_fraction"] == 0


@both
def test_masked_positions_do_not_matter(module):
    """What stands outside the mask changes neither loss nor gradient nor metrics."""
    generator = torch.Generator().manual_seed(0)
    logp, old = -torch.rand(2, 3, 5, generator=generator)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    results = []
    for noise in (0.0, 7.0):
        x = (logp + noise * (1 - mask)).requires_grad_()
        loss, metrics = module.grpo_loss(x, old, torch.tensor([1.0, -1, 2]), mask)
        loss.backward()
        assert (x.grad[mask == 0] == 0).all()
        results.append((loss.item(), metrics))
    assert results[0] == results[1]


@pytest.mark.parametrize("module", [grpo, bupo, kl3_grpo], ids=["grpo", "bupo", "kl3"])
def test_group_advantages(module):
    """Rewards 1,0,0,0: mean 1/4, deviations 3/4 and -1/4, variance (9/16 + 3/16) / 3 = 1/4, std 1/2
    -> 1.5, -0.5 x 3; with ddof 0 it would be 1.732. A group of equal rewards gets 0, not NaN."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    advantages = module.group_advantages(rewards)
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert (advantages[1:] == 0).all()
    # eps = 1/2: std + eps = 1
    assert module.group_advantages(rewards, 0.5)[0].tolist() == [0.75, -0.25, -0.25, -0.25]


def test_rloo_and_dr_grpo_advantages():
    """Rewards 1,0,0,0. RLOO: 1 - 0 = 1, and 0 - 1/3 for the others. Dr. GRPO: 1 - 1/4 and -1/4."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    rloo, dr_grpo = grpo.rloo_advantages(rewards), grpo.minus_group_mean(rewards)
    assert rloo[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert dr_grpo[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert (rloo[1] == 0).all() and (dr_grpo[1] == 0).all()


def test_reinforce_pp_advantages():
    """Rewards 1 (3 tokens) and 0 (1 token): per token 1,1,1,0; mean 3/4; variance
    (3/16 + 9/16) / 3 = 1/4; std 1/2 -> 0.5, -1.5."""
    rewards, lengths = torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 1]])
    advantages = grpo.reinforce_pp_advantages(rewards, lengths)
    assert advantages[0].tolist() == pytest.approx([0.5, -1.5], abs=1e-5)
    equal = grpo.reinforce_pp_advantages(torch.ones(1, 2), lengths)  # variance 0: 0 / 1e-4
    assert equal.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_loss_has_the_gradient_of_the_kl(on_policy):
    """Enumerates a vocabulary of five tokens: the expectation over tokens of the sampling policy of
    kl_loss's gradient is the gradient of sum_a p(a) (log p(a) - log ref(a)) by the logits, also
    when the sampling policy is not p. The k1 and k3 losses on the same tokens fail, shown beside.
    """
    generator = torch.Generator().manual_seed(1)
    three = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    p_logits, ref_logits, old_logits = three
    if on_policy:
        old_logits = p_logits
    ref, old = ref_logits.log_softmax(0), old_logits.log_softmax(0)
    one = torch.ones(1, 1, dtype=torch.float64)

    def gradient(loss_of):
        logits = p_logits.clone().requires_grad_()
        loss_of(logits.log_softmax(0)).backward()
        return logits.grad

    def expected_loss(p):
        loss = 0.0
        for a in range(5):
            token = [x[a].view(1, 1) for x in (p, ref, old)]
            loss = loss + old[a].exp() * grpo.kl_loss(*token, one, 1.0)
        return loss

    def k1(p):
        return (p.detach().exp() * (p - ref)).sum()

    def k3(p):
        return (p.detach().exp() * ((ref - p).exp() - 1 - (ref - p))).sum()

    def kl(p):
        return (p.exp() * (p - ref)).sum()

    exact = gradient(kl)
    assert torch.allclose(gradient(expected_loss), exact, atol=1e-12)
    if on_policy:
        assert gradient(k1).abs().max() < 1e-12
        assert (gradient(k3) - exact).abs().max() > 0.01


def test_kl_loss_by_hand():
    """Two tokens in the mask, one outside. r = e^(-1+1) = 1, k2 = (-1+3)^2 / 2 = 2; r = e^(-1+2),
    k2 = (-1-1)^2 / 2 = 2: (2 + 2e) / 2. The gradient is r (log p - log ref) / 2: 1 and -e."""
    logp = torch.tensor([[-1.0, -1.0, -9.0]], requires_grad=True)
    ref = torch.tensor([[-3.0, 1.0, 0.0]])
    old = torch.tensor([[-1.0, -2.0, 0.0]])
    loss = grpo.kl_loss(logp, ref, old, torch.tensor([[1.0, 1, 0]]), 2)
    loss.backward()
    assert loss.item() == pytest.approx(1 + math.e)
    assert logp.grad[0].tolist() == pytest.approx([1, -math.e, 0])


@pytest.mark.parametrize("kwargs", [{}, {"clip_low": 0.1, "clip_high": 0.4}, {"denominator": 77}])
def test_bupo_restates_the_loss_of_grpo(kwargs):
    """On random tokens the two files' losses, gradients and metrics are the same."""
    generator = torch.Generator().manual_seed(3)
    logp, old = -torch.rand(2, 8, 30, generator=generator)
    rewards = (torch.rand(2, 4, generator=generator) < 0.5).float()
    mask = (torch.rand(8, 30, generator=generator) < 0.7).float()
    results = []
    for module in (grpo, bupo):
        x = logp.clone().requires_grad_()
        advantages = module.group_advantages(rewards).flatten()
        loss, metrics = module.grpo_loss(x, old, advantages, mask, **kwargs)
        loss.backward()
        results.append((loss.item(), x.grad.tolist(), metrics))
    assert results[0] == results[1]
    assert 0 < results[0][2]["clip_fraction"] < 1


@pytest.mark.parametrize("value", [0.1, 0.7, -9.3, 1000.3])
@pytest.mark.parametrize("advantages", [
    grpo.group_advantages, bupo.group_advantages, kl3_grpo.group_advantages,
    grpo.rloo_advantages, grpo.minus_group_mean])
@pytest.mark.parametrize("G", [2, 7, 16])
def test_a_group_of_equal_rewards_gets_exactly_0(advantages, value, G):
    """The mean of sixteen times 0.7 is not 0.7 in float32: rounding must not be trained on."""
    rewards = torch.full((3, G), value)
    rewards[2, 0] += 1  # a group with signal beside them
    found = advantages(rewards)
    assert (found[:2] == 0).all() and found[2].all()
