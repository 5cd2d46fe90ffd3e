"""kl3_grpo.py: the window of each measure, the gate by hand, the KL estimators by enumeration."""
import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import grpo
import kl3_grpo
from common.data import batch_of, encode_prompt, load_problems
from common.models import TINY, load_tokenizer
from common.sampling import sample
from kl3_grpo import atr_grpo_loss, clip_range, kl3

MEASURES = ("ratio", "kl1", "abs_kl1", "kl2", "kl3")
DELTAS = [1e-8, 1e-4, 0.001, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0]


@pytest.mark.parametrize("delta, low, high", [  # from 50-digit arithmetic
    (0.001, 0.9559428077409519, 1.045390495963693),
    (0.02, 0.8131051152131157, 1.213549707151730),
    (0.1, 0.6168168317917052, 1.516221161425022),
    (0.5, 0.3017095626843360, 2.357676673945899),
    (1.0, 0.1585943395630394, 3.146193220620583)])
def test_kl3_window(delta, low, high):
    assert clip_range(delta) == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("delta", DELTAS)
def test_kl3_window_identities(delta):
    """w - 1 - log w = delta at both ends, so log w = w - 1 - delta, and
    low high = exp(low + high - 2 - 2 delta); both to 1e-12."""
    low, high = clip_range(delta)
    assert 0 < low < 1 < high
    for w in (low, high):
        assert math.log(w) == pytest.approx(w - 1 - delta, abs=1e-12)
    assert low * high == pytest.approx(math.exp(low + high - 2 - 2 * delta), rel=1e-12)


def test_kl3_window_series_and_growth():
    """high = 1 + h + h^2/3 + h^3/36 - h^4/270 + h^5/4320 + h^6/17010 - 139 h^7/5443200 with
    h = sqrt(2 delta), low the same with -h; windows are nested."""
    coefficients = (1, 1, 1 / 3, 1 / 36, -1 / 270, 1 / 4320, 1 / 17010, -139 / 5443200)
    for delta in (1e-4, 0.001, 0.01):
        for sign, end in zip((-1, 1), clip_range(delta), strict=True):
            h = sign * math.sqrt(2 * delta)
            series = sum(c * h**i for i, c in enumerate(coefficients))
            assert end == pytest.approx(series, abs=1e-11)
    windows = [clip_range(delta) for delta in DELTAS]
    for inner, outer in itertools.pairwise(windows):
        assert inner[0] > outer[0] and inner[1] < outer[1]
    assert clip_range(0.0) == (1.0, 1.0)


@pytest.mark.parametrize("measure, delta, window", [
    ("ratio", 0.02, (0.8, 1.2)),
    ("ratio", 0.1, (0.552786404500042, 1.447213595499958)),
    ("ratio", 2.0, (0.0, 3.0)),
    ("kl1", 0.02, (0.980198673306755, math.inf)),
    ("abs_kl1", 0.02, (0.980198673306755, 1.020201340026756)),
    ("kl2", 0.02, (0.818730753077982, 1.221402758160170))])
def test_other_windows(measure, delta, window):
    """ratio 1 -+ sqrt(2 delta), not below 0; kl1 e^-delta and no upper end; |kl1| e^-+delta; kl2
    e^-+sqrt(2 delta)."""
    assert clip_range(delta, measure) == pytest.approx(window, rel=1e-12)


@pytest.mark.parametrize("arguments", [(-0.1,), (math.nan,), (0.1, "none"), (0.1, "kl")])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError):
        clip_range(*arguments)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("delta", [0.02, 0.1, 0.45])
def test_the_window_is_where_the_measure_is_at_most_delta(measure, delta):
    """On a grid of w, for the measures as the docstring of clip_range states them."""
    w = torch.linspace(0.01, 4, 20_000, dtype=torch.float64)
    d = w.log()
    value = {"ratio": (w - 1) ** 2 / 2, "kl1": -d, "abs_kl1": d.abs(), "kl2": d * d / 2,
             "kl3": w - 1 - d}[measure]
    low, high = clip_range(delta, measure)
    assert torch.equal(value <= delta, (w >= low) & (w <= high))


def test_kl3_keeps_its_digits():
    """d = 1e-4 in float32: KL3 is d^2/2 + d^3/6 = 5.00017e-9; exp(d) - 1 - d would give a multiple
    of 6e-8."""
    assert kl3(torch.tensor(1e-4)).item() == pytest.approx(5.00017e-9, rel=0.01)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("A", [2.0, -2.0])
@pytest.mark.parametrize("w", [0.5, 0.99, 1.0, 1.01, 2.0])
def test_gate_by_hand(measure, A, w):
    """delta = 0.02. Derivative of -min(w A, clip(w) A) by log w: 0 where the token is outside *and*
    (w - 1) A > 0, else -w A.

    Outside are, below 1: 0.5 for every measure (its -log is 0.69); above 1: 2.0 for all but kl1.
    0.99 and 1.01 are inside all windows: |kl1| allows 0.9802 to 1.0202.
    """
    logp = torch.tensor([[math.log(w)]], requires_grad=True)
    loss, metrics = atr_grpo_loss(logp, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1),
                                  0.02, measure)
    loss.backward()
    outside = w == 0.5 or (w == 2.0 and measure != "kl1")
    cut = outside and (w - 1) * A > 0
    assert logp.grad.item() == pytest.approx(0 if cut else -w * A, abs=1e-6)
    assert metrics["clip_up"] == (cut and A > 0) and metrics["clip_down"] == (cut and A < 0)


@pytest.mark.parametrize("A, loss, up, down", [
    (1.0, -2.7 / 3, 1 / 3, 0), (0.5, -1.35 / 3, 1 / 3, 0), (0.0, 0, 0, 0),
    (-0.5, 1.65 / 3, 0, 1 / 3), (-1.0, 3.3 / 3, 0, 1 / 3)])
def test_means_over_the_mask_by_hand(A, loss, up, down):
    """Ratios 1.5, 0.5, 1 and, outside the mask, e^50; old log-prob -1; the window is 1 +- 0.2.

    A = 1: min(w A, clip(w) A) = 1.2, 0.5, 1. A = -1: -1.5, -0.8, -1.
    """
    d = torch.tensor([[math.log(1.5), math.log(0.5), 0.0, 50.0]])
    mask = torch.tensor([[1.0, 1, 1, 0]])
    logp = (d - 1).requires_grad_()
    got, metrics = atr_grpo_loss(logp, -torch.ones(1, 4), torch.tensor([A]), mask, 0.02, "ratio")
    got.backward()
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert logp.grad[0, 3] == 0
    expected = {"clip_up": up, "clip_down": down}
    assert metrics == pytest.approx(expected, abs=1e-6)
    # over 6 tokens of a whole update, of which these 3 are a micro-batch: half of it
    half, shares = atr_grpo_loss(logp, -torch.ones(1, 4), torch.tensor([A]), mask, 0.02, "ratio", 6)
    assert half.item() == pytest.approx(loss / 2, abs=1e-6)
    assert shares == pytest.approx({name: x / 2 for name, x in expected.items()}, abs=1e-6)


def test_defaults_and_edges_of_the_loss():
    """delta 0.02: 1.213 is inside [0.8131, 1.2135], 1.214 is not. Nothing in the mask: 0. A
    log-ratio of 1000 counts as 20: e^20 = 485,165,195.4."""
    one = torch.ones(1, 1)
    for w, cut in ((1.213, 0), (1.214, 1)):
        logp = torch.tensor([[math.log(w)]])
        assert atr_grpo_loss(logp, torch.zeros(1, 1), torch.ones(1), one)[1]["clip_up"] == cut
    nothing = atr_grpo_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1), torch.zeros(1, 2))
    assert nothing[0] == 0
    loss, _ = atr_grpo_loss(1000 * one, torch.zeros(1, 1), -torch.ones(1), one)
    assert loss.item() == pytest.approx(485165195.4, rel=1e-6)


def test_the_loss_has_the_gradient_of_the_gate():
    """Random tokens: the gradient is -w A where KL3(w) <= 0.05 or the update would bring w back
    towards 1, and 0 elsewhere, over the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(8, 50, generator=generator) * 0.5
    A = torch.randn(8, 1, generator=generator)
    w = d.exp()
    inside = w - 1 - d <= 0.05
    kept = inside | ((w - 1) * A < 0)
    x = d.clone().requires_grad_()
    loss, metrics = atr_grpo_loss(x, torch.zeros_like(d), A[:, 0], torch.ones_like(d), 0.05)
    loss.backward()
    assert torch.allclose(x.grad, -w * A * kept / 400, atol=1e-7)
    assert metrics["clip_up"] == pytest.approx((~kept & (A > 0)).float().mean().item())
    assert metrics["clip_down"] == pytest.approx((~kept & (A < 0)).float().mean().item())
    assert min(metrics.values()) > 0.02


def test_ratio_gate_is_grpo():
    """--measure ratio at delta 0.02 is grpo_loss with its usual bounds: same loss and gradient."""
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(4, 30, generator=generator) * 0.4
    A, mask, old = torch.randn(4, generator=generator), torch.ones(4, 30), torch.zeros(4, 30)
    results = []
    for loss_of, options in ((atr_grpo_loss, {"delta": 0.02, "measure": "ratio"}),
                             (grpo.grpo_loss, {})):
        x = d.clone().requires_grad_()
        loss, _ = loss_of(x, old, A, mask, **options)
        loss.backward()
        results.append((loss.item(), x.grad))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-7)


@pytest.mark.parametrize("measure", MEASURES)
def test_one_update_makes_all_gates_equal(measure):
    """logp = old_logp: w = 1, inside every window with delta > 0: gradient -A / 6, nothing cut."""
    A = torch.tensor([1.0, -2.0])
    logp = torch.zeros(2, 3).requires_grad_()
    loss, metrics = atr_grpo_loss(logp, logp.detach(), A, torch.ones(2, 3), 0.02, measure)
    loss.backward()
    assert torch.allclose(logp.grad, -A[:, None].expand(2, 3) / 6)
    assert metrics == {"clip_up": 0, "clip_down": 0}


def test_kl_estimators_by_enumeration():
    """Samples of p_old, d = log(p_new / p_old), five tokens: k1 = -d and k3 = e^d - 1 - d have the
    mean KL(old || new) exactly, k2 = d^2/2 does not; k3 varies least of the unbiased two."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    old, new = logits.mul(0.5).softmax(-1)
    d = (new / old).log()
    kl = (old * (old / new).log()).sum()

    def mean(x):
        return (old * x).sum()

    def variance(x):
        return mean(x.square()) - mean(x).square()

    assert torch.allclose(mean(-d), kl) and torch.allclose(mean(kl3(d)), kl)
    assert (mean(d.square() / 2) - kl).abs() > 1e-3
    assert variance(kl3(d)) < 0.2 * variance(-d)


@pytest.mark.parametrize("flags", ["", "--measure kl1 --lora-rank 2"])
def test_two_steps(flags, tmp_path):
    small = ("--steps 2 --prompts-per-step 8 --group-size 8 --max-new-tokens 40 --eval-problems 0 "
             f"--output {tmp_path}/run {flags}")
    kl3_grpo.main(small.split())
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert len(rows) == 2
    assert {"clip_up", "clip_down"} <= rows[-1].keys()
    assert min(row["kl3"] for row in rows) > 0  # the policy moves from the first of four updates on


def test_how_far_a_rollout_s_updates_move_the_policy(tmp_path):
    """The row's kl3: over all tokens of the rollout, also of groups without signal, the mean of
    w - 1 - log w, from two forward passes of transformers: of the model after one rollout's four
    updates and of the one before."""
    flags = "--steps 1 --group-size 4 --eval-problems 0 --max-new-tokens 40"
    kl3_grpo.main([*flags.split(), "--output", str(tmp_path / "run")])
    row = json.loads(open(tmp_path / "run" / "metrics.jsonl").readline())
    tokenizer = load_tokenizer("tiny")
    before = AutoModelForCausalLM.from_pretrained(TINY)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    problems = batch_of(load_problems("arithmetic", seed=0), 0, 8, 0)
    prompts = [encode_prompt(tokenizer, problem["problem"]) for problem in problems]
    rollout = sample(before, tokenizer, prompts, 4, 40, seed=0)
    values = []
    for i, prompt in enumerate(rollout.prompts):
        answer = rollout.tokens[i, :rollout.lengths[i]]
        ids = torch.cat([torch.tensor(prompt), answer])[None]
        with torch.no_grad():
            old, new = [model(ids).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)
                        for model in (before, after)]
        d = (new - old).gather(1, answer[:, None])[:, 0]
        values += (d.exp() - 1 - d).tolist()
    assert row["kl3"] == pytest.approx(sum(values) / len(values), rel=1e-3)


@pytest.mark.parametrize("flags", ["--delta -1", "--measure k3", "--clip-low 1", "--group-size 1"])
def test_bad_input(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        kl3_grpo.main([*flags.split(), "--output", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(error) == 1 and "error: " in error[0]
    assert not (tmp_path / "run").exists()
