"""kl3_grpo.py: the window of each measure, the gate by hand, exact KL and the KL estimators by enumeration."""
import inspect
import json
import math

import pytest
import torch
from conftest import random_model, rollout_of

import grpo
import kl3_grpo
from common.logprobs import answer_states, exact_kl
from kl3_grpo import atr_grpo_loss, clip_range, kl3

DELTAS = [1e-8, 1e-4, 0.001, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0]


@pytest.mark.parametrize("delta, low, high", [  # from 50-digit arithmetic
    (0.001, 0.9559428077409519, 1.045390495963693), (0.02, 0.8131051152131157, 1.213549707151730),
    (0.1, 0.6168168317917052, 1.516221161425022), (0.5, 0.3017095626843360, 2.357676673945899), (1.0, 0.1585943395630394, 3.146193220620583)])
def test_kl3_window(delta, low, high):
    assert clip_range(delta) == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("delta", DELTAS)
def test_kl3_window_identities(delta):
    """w - 1 - log w = delta at both ends, so log w = w - 1 - delta, and l u = exp(l + u - 2 - 2 delta); both to 1e-12."""
    low, high = clip_range(delta)
    assert 0 < low < 1 < high
    for w in (low, high):
        assert math.log(w) == pytest.approx(w - 1 - delta, abs=1e-12)
    assert low * high == pytest.approx(math.exp(low + high - 2 - 2 * delta), rel=1e-12)


def test_kl3_window_series_and_growth():
    """u = 1 + h + h^2/3 + h^3/36 - h^4/270 + h^5/4320 + h^6/17010 - 139 h^7/5443200, l the same with -h; windows are nested."""
    for delta in (1e-4, 0.001, 0.01):
        for sign, end in zip((-1, 1), clip_range(delta)):
            h = sign * math.sqrt(2 * delta)
            assert end == pytest.approx(1 + h + h**2 / 3 + h**3 / 36 - h**4 / 270 + h**5 / 4320 + h**6 / 17010 - 139 * h**7 / 5443200, abs=1e-11)
    windows = [clip_range(delta) for delta in DELTAS]
    assert all(a[0] > b[0] and a[1] < b[1] for a, b in zip(windows, windows[1:])) and clip_range(0.0) == (1.0, 1.0)


@pytest.mark.parametrize("measure, delta, window", [
    ("ratio", 0.02, (0.8, 1.2)), ("ratio", 0.1, (0.552786404500042, 1.447213595499958)), ("ratio", 2.0, (0.0, 3.0)),
    ("kl1", 0.02, (0.980198673306755, math.inf)), ("abs_kl1", 0.02, (0.980198673306755, 1.020201340026756)),
    ("kl2", 0.02, (0.818730753077982, 1.221402758160170)), ("none", 0.02, (0.0, math.inf))])
def test_other_windows(measure, delta, window):
    """ratio 1 -+ sqrt(2 delta); kl1 e^-delta and no upper end; |kl1| e^-+delta; kl2 e^-+sqrt(2 delta)."""
    assert clip_range(delta, measure) == pytest.approx(window, rel=1e-12)


def test_bad_arguments():
    for arguments in ((-0.1,), (float("nan"),), (0.1, "kl"), (0.1, "tv")):
        with pytest.raises(ValueError):
            clip_range(*arguments)


def test_window_is_the_measure():
    """On a grid of w: KL3(w) <= delta exactly inside [l, u]."""
    w = torch.linspace(0.01, 4, 20_000, dtype=torch.float64)
    for delta in (0.02, 0.1, 1.0):
        low, high = clip_range(delta)
        assert torch.equal(kl3(w.log()) <= delta, (w >= low) & (w <= high))


def test_kl3_keeps_its_digits():
    """d = 1e-4 in float32: KL3 is d^2/2 + d^3/6 = 5.00017e-9; exp(d) - 1 - d would give a multiple of 6e-8."""
    assert kl3(torch.tensor(1e-4)).item() == pytest.approx(5.00017e-9, rel=0.01)


@pytest.mark.parametrize("measure", ["ratio", "kl1", "abs_kl1", "kl2", "kl3", "none"])
@pytest.mark.parametrize("A", [2.0, -2.0])
@pytest.mark.parametrize("w", [0.5, 0.99, 1.0, 1.01, 2.0])
def test_gate_by_hand(measure, A, w):
    """delta = 0.02. Derivative of -min(w A, clip(w) A) by log w: 0 where the token is outside *and* (w - 1) A > 0, else -w A.

    Outside are, below 1: 0.5 for every measure but none (its -log is 0.69); above 1: 2.0 for all but kl1 and none.
    0.99 and 1.01 are inside all windows: |kl1| allows 0.9802 to 1.0202.
    """
    logp = torch.tensor([[math.log(w)]], requires_grad=True)
    loss, metrics = atr_grpo_loss(logp, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1), 0.02, measure)
    loss.backward()
    outside = {0.5: measure != "none", 2.0: measure not in ("kl1", "none")}.get(w, False)
    cut = outside and (w - 1) * A > 0
    assert logp.grad.item() == pytest.approx(0 if cut else -w * A, abs=1e-6)
    assert metrics["clip_up"] == (cut and A > 0) and metrics["clip_down"] == (cut and A < 0)
    assert metrics["kl3"] == pytest.approx(w - 1 - math.log(w), abs=1e-6)


@pytest.mark.parametrize("predicate, A, loss, up, down", [
    (False, 1.0, -2.7 / 3, 1 / 3, 0), (False, 0.5, -1.35 / 3, 1 / 3, 0), (False, -0.5, 1.65 / 3, 0, 1 / 3), (False, -1.0, 3.3 / 3, 0, 1 / 3), (False, 0.0, 0, 0, 0),
    (True, 1.0, -2.5 / 3, 1 / 3, 0), (True, -1.0, 3.5 / 3, 0, 1 / 3), (True, 0.0, 0, 0, 0)])
def test_means_over_the_mask_by_hand(predicate, A, loss, up, down):
    """Ratios 1.5, 0.5, 1 and, outside the mask, e^50; old log-prob -1; the window is 1 +- 0.2, or the predicate KL3 <= 0.02.

    A = 1: min(w A, clip(w) A) = 1.2, 0.5, 1, and with value 1 outside 1, 0.5, 1. A = -1: -1.5, -0.8, -1, and -1.5, -1, -1.
    Mean KL3: (0.5 - ln 1.5 + ln 2 - 0.5 + 0) / 3 = ln(4/3) / 3.
    """
    d, mask = torch.tensor([[math.log(1.5), math.log(0.5), 0.0, 50.0]]), torch.tensor([[1.0, 1, 1, 0]])
    logp = (d - 1).requires_grad_()
    got, metrics = atr_grpo_loss(logp, d * 0 - 1, torch.tensor([A]), mask, 0.02, "ratio", divergence=kl3(d) if predicate else None)
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6) and logp.grad[0, 3] == 0
    assert metrics == pytest.approx({"clip_up": up, "clip_down": down, "kl3": math.log(4 / 3) / 3, "ratio_max": 1.5}, abs=1e-6)


def test_defaults_and_edges_of_the_loss():
    """delta 0.02: 1.213 is inside [0.8131, 1.2135], 1.214 is not. Nothing in the mask: 0. A log-ratio of 1000 counts as 20."""
    for w, cut in ((1.213, 0), (1.214, 1)):
        assert atr_grpo_loss(torch.tensor([[math.log(w)]]), torch.zeros(1, 1), torch.ones(1), torch.ones(1, 1))[1]["clip_up"] == cut
    assert atr_grpo_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2))[0] == 0
    loss, metrics = atr_grpo_loss(torch.tensor([[1000.0]]), torch.zeros(1, 1), -torch.ones(1), torch.ones(1, 1))
    assert loss.item() == pytest.approx(485165195.4, rel=1e-6) == metrics["ratio_max"]


def test_projection_and_predicate_have_equal_gradients():
    """Random tokens: the clamp to [l, u] and the gate KL3 <= delta with value 1 outside differ in value, not in gradient."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(8, 50, generator=generator) * 0.5
    A = torch.randn(8, generator=generator)
    gradients, losses = [], []
    for divergence in (None, kl3(d)):
        x = d.clone().requires_grad_()
        loss, metrics = atr_grpo_loss(x, torch.zeros_like(d), A, torch.ones_like(d), 0.05, divergence=divergence)
        loss.backward()
        gradients.append(x.grad)
        losses.append((loss.item(), metrics["clip_up"], metrics["clip_down"]))
    assert torch.equal(*gradients) and losses[0][0] != losses[1][0] and losses[0][1:] == losses[1][1:]
    assert losses[0][1] > 0.02 and losses[0][2] > 0.02


def test_ratio_gate_is_grpo():
    """--measure ratio at delta = 0.02, or the window (0.8, 1.28), is grpo_loss with those bounds: same loss and gradient."""
    generator = torch.Generator().manual_seed(1)
    d, A, mask = torch.randn(4, 30, generator=generator) * 0.4, torch.randn(4, generator=generator), torch.ones(4, 30)
    for ours, bounds in ((dict(delta=0.02, measure="ratio"), (0.2, 0.2)), (dict(window=(0.8, 1.28)), (0.2, 0.28))):
        results = []
        for loss_of in (lambda x, ours=ours: atr_grpo_loss(x, x.detach() * 0, A, mask, **ours), lambda x, bounds=bounds: grpo.grpo_loss(x, x.detach() * 0, A, mask, *bounds)):
            x = d.clone().requires_grad_()
            loss = loss_of(x)[0]
            loss.backward()
            results.append((loss.item(), x.grad))
        assert results[0][0] == pytest.approx(results[1][0], abs=1e-6) and torch.allclose(results[0][1], results[1][1], atol=1e-7)


def test_one_update_makes_all_gates_equal():
    """logp = old_logp: w = 1, inside every window with delta > 0: the same gradient, nothing cut."""
    A, x = torch.tensor([1.0, -2.0]), torch.zeros(2, 3)
    for measure in ("ratio", "kl1", "abs_kl1", "kl2", "kl3", "none"):
        logp = x.clone().requires_grad_()
        loss, metrics = atr_grpo_loss(logp, x, A, torch.ones(2, 3), 0.02, measure)
        loss.backward()
        assert torch.allclose(logp.grad, -A[:, None].expand(2, 3) / 6) and metrics["clip_up"] == metrics["clip_down"] == 0


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_exact_kl(chunk):
    """At each answer token the sum over the vocabulary of p_old (log p_old - log p_new), from plain full logits."""
    new, old = random_model("qwen3", seed=0), random_model("qwen3", seed=1)
    rollout = rollout_of([[5, 6], [7, 8, 9]], torch.tensor([3, 1]), T=3)
    got = exact_kl(new, *answer_states(old, rollout, budget=6), rollout, temperature=0.7, chunk=chunk)
    for b, (prompt, k) in enumerate(zip(rollout.prompts, rollout.lengths.tolist())):
        ids = torch.tensor([prompt + rollout.tokens[b, :k].tolist()])
        q, p = ((m(ids).logits[0, len(prompt) - 1:-1] / 0.7).log_softmax(-1) for m in (new, old))
        assert got[b, :k].tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-5) and (got[b, k:] == 0).all()


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_exact_kl_to_the_weights_as_they_were(dtype, close):
    """The old unembedding is a copy: the model goes on training in place. Doubled, the new logits are twice the old ones."""
    model, rollout = random_model("qwen3").to(dtype), rollout_of([[5, 6], [7, 8, 9]], torch.tensor([3, 1]), T=3)
    old = answer_states(model, rollout)
    ids = torch.tensor([rollout.prompts[0] + rollout.tokens[0].tolist()])
    logits = model(ids).logits[0, 1:-1].float()                                         # (3, V)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    p, q = logits.log_softmax(-1), (2 * logits).log_softmax(-1)
    assert exact_kl(model, *old, rollout)[0].tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=close, abs=1e-5)


def test_kl_estimators_by_enumeration():
    """Samples of p_old, d = log(p_new / p_old), over a vocabulary of five: k1 = -d and k3 = e^d - 1 - d have the mean KL(old || new)
    exactly, k2 = d^2/2 does not; k3's variance is the smallest of the unbiased two. Expected values by full sums."""
    old, new = torch.randn(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul(0.5).softmax(-1)
    d = (new / old).log()
    kl = (old * (old / new).log()).sum()
    mean = lambda x: (old * x).sum()
    variance = lambda x: mean(x.square()) - mean(x).square()
    assert torch.allclose(mean(-d), kl) and torch.allclose(mean(kl3(d)), kl) and (mean(d.square() / 2) - kl).abs() > 1e-3
    assert variance(kl3(d)) < 0.2 * variance(-d)


def test_common_parts_are_those_of_grpo():
    for name in ("group_advantages", "rloo_advantages", "dr_grpo_advantages", "reinforce_pp_advantages", "advantages_of", "kl_loss", "token_denominator"):
        assert inspect.getsource(getattr(grpo, name)) == inspect.getsource(getattr(kl3_grpo, name))


@pytest.mark.parametrize("flags", ["", "--measure kl", "--measure ratio --delta 0.05", "--clip-low 0.2 --clip-high 0.28", "--measure none --lora-rank 2"])
def test_two_steps(flags, tmp_path):
    kl3_grpo.main([*"--steps 2 --prompts-per-step 4 --group-size 4 --max-new-tokens 40 --eval-problems 0".split(), *flags.split(),
                   "--output", str(tmp_path / "run")])
    assert len([json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]) == 2


@pytest.mark.parametrize("flags", ["--clip-low 0.2", "--clip-low 0.2 --clip-high 0.28 --delta 0.1", "--clip-low 0.2 --clip-high 0.3 --measure kl2", "--delta 0",
                                   "--measure k3", "--group-size 1"])
def test_bad_input(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        kl3_grpo.main([*flags.split(), "--output", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and not (tmp_path / "run").exists()
