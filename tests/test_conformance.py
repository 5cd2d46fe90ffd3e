"""tests/conformance.py: our losses pass, and each kind of broken loss fails the cases it should."""
import sys

import conformance
import pytest
import torch

import grpo

CLIPS = {"good token, r above the window", "bad token, r below the window"}
BACK = {"good token, r below the window", "bad token, r above the window"}
BOUNDS = {"clip_high alone", "clip_low alone"}
HUGE = "r = e^100, too large for float32"
TOKEN_MEAN = "token mean"
STOP = "stop token, the mask's last"


def surrogate(logp, old_logp, advantages):
    A = advantages[:, None]
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    return torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)


def no_clip(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, denominator=None):
    ratio = (logp - old_logp).clamp(-20, 20).exp()
    return -(ratio * advantages[:, None] * mask).sum() / (denominator or mask.sum().clamp(min=1))


def clamp_without_minimum(logp, old_logp, advantages, mask):
    ratio = (logp - old_logp).exp().clamp(0.8, 1.2)
    return -(ratio * advantages[:, None] * mask).sum() / mask.sum().clamp(min=1)


def no_mask(logp, old_logp, advantages, mask):
    return -surrogate(logp, old_logp, advantages).mean()


def no_stop_token(logp, old_logp, advantages, mask):
    shifted = torch.nn.functional.pad(mask, (0, 1))[:, 1:]  # the last of each answer goes
    return grpo.grpo_loss(logp, old_logp, advantages, shifted)


def answer_first(logp, old_logp, advantages, mask):
    sums = (surrogate(logp, old_logp, advantages) * mask).sum(1)
    return -(sums / mask.sum(1).clamp(min=1)).mean()


def own_count(logp, old_logp, advantages, mask, denominator=None):
    return grpo.grpo_loss(logp, old_logp, advantages, mask)


def unbounded(logp, old_logp, advantages, mask):
    A = advantages[:, None]
    ratio = (logp - old_logp).exp()
    return -(torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * mask).sum() / mask.sum()


def wrong_sign(logp, old_logp, advantages, mask):
    return -grpo.grpo_loss(logp, old_logp, advantages, mask)[0]


def constant(logp, old_logp, advantages, mask):
    return torch.tensor(1.0)


def population_std(rewards):
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True, correction=0) + 1e-4)


def std_of_batch(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)


def no_eps(rewards):
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)


def k1(logp, ref_logp):
    return logp - ref_logp


def k2(logp, ref_logp):
    return (logp - ref_logp).square() / 2


def k3(logp, ref_logp):
    return (ref_logp - logp).exp() - 1 - (ref_logp - logp)


def temperature_outside(logits, tokens, temperature):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] / temperature


def failed(capsys, *args) -> set[str]:
    """The names of the cases that fail; the exit code says whether there are any."""
    code = conformance.main(list(args))
    lines = capsys.readouterr().out.splitlines()
    names = {line[:36].strip() for line in lines if "FAIL" in line}
    assert code == (1 if names else 0)
    return names


@pytest.mark.parametrize("loss, lacks", [
    ("grpo:grpo_loss", 0),
    ("bupo:grpo_loss", 1),
    ("adapters:kl3_ratio_loss", 3),
    ("adapters:ppo_loss", 1)])
def test_our_losses_pass(capsys, loss, lacks):
    assert conformance.main([loss]) == 0
    out = capsys.readouterr().out
    assert out.count("not offered") == lacks
    assert out.endswith(f"{15 - lacks} of {15 - lacks} pass\n")


@pytest.mark.parametrize("module", ["grpo", "bupo", "kl3_grpo"])
def test_our_advantages_pass(capsys, module):
    """Also sixteen times 0.7, whose mean is 0.69999993 in float32, which eps 1e-6 makes 0.056."""
    found = failed(capsys, "grpo:grpo_loss", "--advantages", f"{module}:group_advantages")
    assert found == set()


def test_our_kl_and_logprobs_pass(capsys):
    assert not failed(capsys, "grpo:grpo_loss", "--kl-loss", "adapters:kl_loss", "--logprobs",
                      "adapters:logprobs")


@pytest.mark.parametrize("loss, names", [
    ("no_clip", CLIPS | BOUNDS),
    ("clamp_without_minimum", BACK | {HUGE}),
    ("no_mask", {STOP, "padding", TOKEN_MEAN, "nothing in the mask"}),
    ("no_stop_token", CLIPS | BACK | {"first update, r = 1", STOP, TOKEN_MEAN}),
    ("answer_first", {TOKEN_MEAN}),
    ("own_count", {"token mean over micro-batches"}),
    ("unbounded", {HUGE, "nothing in the mask"})])
def test_a_broken_loss_fails_its_cases(capsys, loss, names):
    assert failed(capsys, f"test_conformance:{loss}") == names


@pytest.mark.parametrize("loss, count", [("wrong_sign", 7), ("constant", 11)])
def test_hardly_a_case_passes(capsys, loss, count):
    """Eleven cases need no argument that these lack; four of them expect 0, whatever the sign."""
    assert len(failed(capsys, f"test_conformance:{loss}")) == count


@pytest.mark.parametrize("flag, function, names", [
    ("--advantages", "population_std", {"std with ddof 1", "each group by itself"}),
    ("--advantages", "std_of_batch", {"each group by itself"}),
    ("--advantages", "no_eps", {"all-equal groups", "all-equal group, 0.7 sixteen times"}),
    ("--kl-loss", "k1", {"KL as a loss"}),
    ("--kl-loss", "k2", set()),
    ("--kl-loss", "k3", {"KL as a loss"}),
    ("--kl-value", "k1", set()),
    ("--kl-value", "k2", {"KL as a number"}),
    ("--kl-value", "k3", set()),
    ("--logprobs", "temperature_outside", {"temperature 2"})])
def test_the_other_callables(capsys, flag, function, names):
    """By two equally likely tokens: E k1 = E k3 = KL, E k2 is not; only k2's mean gradient is the
    KL's."""
    assert failed(capsys, "grpo:grpo_loss", flag, f"test_conformance:{function}") == names


def test_a_library_that_is_not_installed_is_one_line(capsys, monkeypatch):
    """None in sys.modules makes an import fail."""
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit) as stopped:
        conformance.main(["adapters:trl_loss"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: not installed: ")


@pytest.mark.parametrize("place", ["grpo", "no_such_module:f", "grpo:no_such_name", "grpo:REAL",
                                   "", ":", "test_conformance:HUGE"])
def test_a_callable_that_cannot_be_loaded_is_one_line(capsys, place):
    with pytest.raises(SystemExit) as stopped:
        conformance.main([place])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
