"""The losses of grpo.py, bupo.py and ppo.py against values worked out by hand, in the docstrings."""
import math
from types import SimpleNamespace

import pytest
import torch

import bupo
import grpo
import ppo

per_token = SimpleNamespace(token_denominator=ppo.token_denominator, grpo_loss=lambda logp, old_logp, advantages, *args, **kwargs: (
    ppo.ppo_loss(logp, old_logp, advantages[:, None].expand_as(logp), *args, **kwargs)))  # one advantage for all tokens of an answer
clipped = pytest.mark.parametrize("module", [grpo, bupo, per_token], ids=["grpo", "bupo", "ppo"])
both = pytest.mark.parametrize("module", [grpo, bupo], ids=["grpo", "bupo"])


def loss_and_gradient(module, ratio, advantage, **kwargs):
    """The loss of one token with the given ratio (old log-prob -1), and its derivative by the token's log-prob."""
    logp = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    loss, metrics = module.grpo_loss(logp, -torch.ones(1, 1), torch.tensor([advantage]), torch.ones(1, 1), **kwargs)
    loss.backward()
    return loss.item(), logp.grad.item(), metrics["clip_fraction"]


@clipped
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
    # dual clip c = 3: A < 0, r = 5: max(min(-10, -2.4), -6) = -6, constant; r = 2 is below it: max(-4, -6) = -4
    (5.0, -2.0, {"dual_clip": 3.0}, 6.0, 0.0, 0),
    (2.0, -2.0, {"dual_clip": 3.0}, 4.0, 4.0, 0),
    # dual clip leaves A > 0 alone
    (0.5, 2.0, {"dual_clip": 3.0}, -1.0, -1.0, 0),
    (0.5, 0.5, {"dual_clip": 3.0}, -0.25, -0.25, 0),
    # the advantage is 0: nothing
    (1.5, 0.0, {}, 0.0, 0.0, 0),
])
def test_every_branch_of_the_clip(module, ratio, advantage, kwargs, loss, gradient, cut):
    got = loss_and_gradient(module, ratio, advantage, **kwargs)
    assert got == pytest.approx((loss, gradient, cut), abs=1e-6)


@clipped
def test_log_ratio_is_held_within_20(module):
    """logp - old = 1000 would be e^1000 = inf; with A < 0 the loss is -A e^20 = 485,165,195.4 and there is no gradient."""
    logp = torch.tensor([[1000.0]], requires_grad=True)
    loss, _ = module.grpo_loss(logp, torch.zeros(1, 1), torch.tensor([-1.0]), torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(485165195.4, rel=1e-6) and logp.grad.item() == 0


@clipped
def test_aggregation(module):
    """Two answers of 4 and 1 tokens with losses 1 and 5 (advantages -1 and -5, ratio 1), longest answer 4.

    Token mean: (4*1 + 1*5) / 5 = 1.8. Per answer: (1 + 5) / 2 = 3. Constant length: (4 + 5) / (2 * 4) = 1.125.
    """
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    logp, advantages = torch.zeros(2, 4), torch.tensor([-1.0, -5.0])
    for how, value in (("token", 1.8), ("sequence", 3.0), ("constant", 1.125)):
        denominator = module.token_denominator(how, mask.sum(1), 4)
        assert module.grpo_loss(logp, logp, advantages, mask, denominator=denominator)[0].item() == pytest.approx(value)
    assert module.grpo_loss(logp, logp, advantages, mask)[0].item() == pytest.approx(1.8)


@clipped
def test_loss_of_nothing_is_zero(module):
    """No token in the mask: 0, not 0 / 0."""
    assert module.grpo_loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.ones(1), torch.zeros(1, 3))[0].item() == 0


@clipped
def test_masked_positions_do_not_matter(module):
    """What stands outside the mask changes neither loss nor gradient."""
    generator = torch.Generator().manual_seed(0)
    logp, old = -torch.rand(2, 3, 5, generator=generator)
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    losses = []
    for noise in (0.0, 7.0):
        x = (logp + noise * (1 - mask)).requires_grad_()
        loss, _ = module.grpo_loss(x, old, torch.tensor([1.0, -1, 2]), mask)
        loss.backward()
        assert (x.grad[mask == 0] == 0).all()
        losses.append(loss.item())
    assert losses[0] == losses[1]


@both
def test_group_advantages(module):
    """Rewards 1,0,0,0: mean 1/4, deviations 3/4 and -1/4, variance (9/16 + 3/16) / 3 = 1/4, std 1/2 -> 1.5, -0.5 x 3.

    With ddof 0 it would be 1.732. A group of equal rewards gets 0, not NaN.
    """
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    advantages = module.group_advantages(rewards)
    assert advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert (advantages[1:] == 0).all()


@both
def test_rloo_and_dr_grpo_advantages(module):
    """Rewards 1,0,0,0. RLOO: 1 - 0 = 1, and 0 - 1/3 for the others. Dr. GRPO: 1 - 1/4 and 0 - 1/4."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    assert module.rloo_advantages(rewards)[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert module.dr_grpo_advantages(rewards)[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert (module.rloo_advantages(rewards)[1] == 0).all() and (module.dr_grpo_advantages(rewards)[1] == 0).all()


@both
def test_reinforce_pp_advantages(module):
    """Rewards 1 (3 tokens) and 0 (1 token): per token 1,1,1,0; mean 3/4; variance (3/16 + 9/16) / 3 = 1/4; std 1/2 -> 0.5, -1.5."""
    advantages = module.reinforce_pp_advantages(torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 1]]))
    assert advantages[0].tolist() == pytest.approx([0.5, -1.5], abs=1e-5)


@both
@pytest.mark.parametrize("on_policy", [True, False])
def test_kl_loss_has_the_gradient_of_the_kl(module, on_policy):
    """Enumerates a vocabulary of five tokens: the expectation over tokens from the sampling policy of the gradient of kl_loss equals

    the gradient of sum_a p(a) (log p(a) - log ref(a)), taken by the logits, also when the sampling policy is not p. The k3 and k1
    losses on the same tokens do not: they are shown beside it.
    """
    generator = torch.Generator().manual_seed(1)
    p_logits, ref_logits, old_logits = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    if on_policy:
        old_logits = p_logits
    ref, old = ref_logits.log_softmax(0), old_logits.log_softmax(0)

    def gradient(loss_of):
        logits = p_logits.clone().requires_grad_()
        loss_of(logits.log_softmax(0)).backward()
        return logits.grad

    exact = gradient(lambda p: (p.exp() * (p - ref)).sum())
    one = torch.ones(1, 1, dtype=torch.float64)
    expected = gradient(lambda p: sum(old[a].exp() * module.kl_loss(p[a].view(1, 1), ref[a].view(1, 1), old[a].view(1, 1), one, 1.0)
                                      for a in range(5)))
    assert torch.allclose(expected, exact, atol=1e-12)
    if on_policy:
        k1 = gradient(lambda p: (p.detach().exp() * (p - ref)).sum())
        k3 = gradient(lambda p: (p.detach().exp() * ((ref - p).exp() - 1 - (ref - p))).sum())
        assert k1.abs().max() < 1e-12 and (k3 - exact).abs().max() > 0.01


def test_the_two_files_restate_the_same_functions():
    """bupo.py is grpo.py with a layer: what both define is the same source, so a mended loss cannot be mended in one of them only."""
    import inspect
    for name in ("group_advantages", "rloo_advantages", "dr_grpo_advantages", "reinforce_pp_advantages", "advantages_of", "grpo_loss",
                 "kl_loss", "token_denominator"):
        assert inspect.getsource(getattr(grpo, name)) == inspect.getsource(getattr(bupo, name))
