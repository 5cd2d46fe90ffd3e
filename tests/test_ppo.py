"""PPO: every expected value is worked out by hand here, or enumerated by other means."""
import copy
import json
import math
import os
import pathlib
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, rollout_of
from safetensors.torch import load_file

import ppo
from common.models import causal_lm
from common.optim import MasterAdamW
from common.sampling import Rollout
from ppo import (
    RANGES,
    Critic,
    advantages_and_returns,
    charge_kl,
    classic_reward,
    cosine_reward,
    discounted_returns,
    explained_variance,
    gae,
    logp_and_values,
    ppo_loss,
    repeated_tokens,
    repetition_penalty,
    score_with_values,
    token_denominator,
    token_rewards,
    value_loss,
    whiten,
)

SMALL = "--steps 2 --prompts-per-step 2 --group-size 2 --max-new-tokens 20 --updates-per-rollout 2 --eval-problems 0".split()
ROOT = pathlib.Path(__file__).parent.parent
ROOT2 = math.sqrt(2)


def row(*values):
    return torch.tensor([[float(v) for v in values]])


def near(tensor, *values):
    return torch.allclose(tensor.double(), torch.tensor(values, dtype=torch.float64).view_as(tensor), atol=1e-6)


# the rewards

@pytest.mark.parametrize("length, right, wrong", [
    (0, 2, -10),                                            # cos 0 = 1: r_0
    (20, 1.5 + ROOT2 / 4, -5 - 5 * ROOT2 / 2),              # cos 45° = √2/2: r_L + (r_0 - r_L)(1 + √2/2)/2
    (40, 1.5, -5),                                          # cos 90° = 0: halfway
    (60, 1.5 - ROOT2 / 4, -5 + 5 * ROOT2 / 2),
])
def test_cosine(length, right, wrong):
    assert cosine_reward(True, length, 80) == pytest.approx(right)
    assert cosine_reward(False, length, 80) == pytest.approx(wrong)


def test_cosine_at_the_limit():
    """63 + 16 = 79 < 80 is not too long, 64 + 16 = 80 is, right or wrong. Unchecked, the end of the range, and no turning back beyond."""
    assert 1 < cosine_reward(True, 63, 80) < 1.5 and -2 < cosine_reward(False, 63, 80) < 0
    assert cosine_reward(True, 64, 80) == cosine_reward(False, 64, 80) == cosine_reward(True, 80, 80) == -10
    assert cosine_reward(True, 64, 80, exceed=-3.0) == -3 and cosine_reward(True, 64, 80, margin=15) > 1
    assert cosine_reward(True, 80, 80, exceed=None) == cosine_reward(True, 99, 80, exceed=None) == 1
    assert cosine_reward(False, 80, 80, exceed=None) == 0


def test_rewards_a_b_c():
    """Right, wrong at length 0 and at half the limit. A pays a right answer more the longer it is, which is legal."""
    expected = {"A": (0, 0, 5, 0), "B": (6, -10, 5.5, -5), "C": (10, -10, 9.5, -5), "cosine": (2, -10, 1.5, -5)}
    for name, values in expected.items():
        found = [cosine_reward(right, length, 80, *RANGES[name]) for length in (0, 40) for right in (True, False)]
        assert found == pytest.approx(values, abs=1e-12), name
    with pytest.raises(ValueError, match="wrong answer"):
        cosine_reward(True, 10, 80, wrong_range=(-1.0, 0.5))


def test_classic():
    """1 and 0; with `exceed` too long comes first: 64 + 16 = 80."""
    assert [classic_reward(right, 80, 80) for right in (True, False)] == [1, 0]
    assert [classic_reward(True, length, 80, exceed=0.0) for length in (63, 64)] == [1, 0]
    assert [classic_reward(False, length, 80, exceed=-1.0) for length in (63, 64)] == [0, -1]


@pytest.mark.parametrize("tokens, ngram, repeated", [
    ("abxab", 2, "...11"),         # ab again
    ("abab", 2, "..11"),           # ab, ba, ab: ba is new
    ("ababa", 2, "..111"),         # and here ba is not: 3 and 4 by it, 2 and 3 by ab
    ("aaaa", 2, ".111"),           # the second aa overlaps the first: looked up before it is remembered
    ("aaaa", 3, ".111"),
    ("aaa", 3, "..."),             # one 3-gram
    ("abcabcabc", 3, "...111111"), # abc, bca, cab, then every start is a repeat
    ("abcxabcd", 3, "....111."),
    ("aba", 1, "..1"),
    ("ab", 3, ".."), ("", 2, ""),
])
def test_repetition_penalty(tokens, ngram, repeated):
    assert repetition_penalty([ord(c) for c in tokens], ngram, -0.5) == [-0.5 * (c == "1") for c in repeated]


def test_token_rewards():
    """Answers of 3, 4 and 1 tokens, limit 8, margin 4: the second is too long. The outcome is on the last token, padding has nothing,
    the penalty is a row of its own; both are held within ±10. -20 a token and -12 in a range do not come through."""
    tokens = torch.tensor([[5, 5, 1, 0], [7, 8, 7, 8], [1, 0, 0, 0]])
    lengths = torch.tensor([3, 4, 1])
    mask = (torch.arange(4) < lengths[:, None]).float()
    rollout = Rollout([[3]] * 3, tokens, lengths, mask, mask, mask, lengths > 0, [""] * 3)
    cfg = SimpleNamespace(reward="cosine", exceed=None, max_new_tokens=8, margin=4, penalty=-20.0, ngram=1)
    correct, repeated = torch.tensor([1.0, 1.0, 0.0]), repeated_tokens(rollout, 1)
    assert near(repeated, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0)
    first, second = token_rewards(cfg, rollout, correct, repeated)
    at3 = 1.5 + 0.5 * math.cos(math.pi * 3 / 8)
    at1 = -5 - 5 * math.cos(math.pi / 8)
    assert near(first, 0, 0, at3, 0, 0, 0, 0, -10, at1, 0, 0, 0)
    assert near(second, 0, -10, 0, 0, 0, 0, -10, -10, 0, 0, 0, 0)
    cfg = SimpleNamespace(reward="classic", exceed=None, max_new_tokens=8, margin=4, penalty=0.0, ngram=1)
    assert near(token_rewards(cfg, rollout, correct, repeated)[0], 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0)
    cfg.exceed = 0.0
    assert near(token_rewards(cfg, rollout, correct, repeated)[0], 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def test_kl_is_shared_out():
    """0.1 x (log p - log ref) = 0.1 x (0.4, -0.2) = (0.04, -0.02): all of it from one reward, half of it from each of two."""
    logp, ref = row(-1, -2), row(-1.4, -1.8)
    assert near(charge_kl(torch.ones(1, 1, 2), logp, ref, 0.1), 0.96, 1.02)
    assert near(charge_kl(torch.ones(2, 1, 2), logp, ref, 0.1), 0.98, 1.01, 0.98, 1.01)


# returns and advantages

TWO = torch.tensor([[[0., 0, 1], [0, 2, 100]], [[-1., 0, -2], [1, 1, 100]]])  # (M, B, T), the second answer has two tokens
MASK = torch.tensor([[1., 1, 1], [1, 1, 0]])


def test_returns_with_two_discounts():
    """First answer: γ = 1/2 gives (1/4, 1/2, 1), γ = 1 gives (-3, -2, -2). Second: (1, 2) and (2, 1); its padding holds 100."""
    assert near(discounted_returns(TWO, torch.tensor([0.5, 1.0]), MASK), -2.75, -1.5, -1, 3, 3, 0)


def test_gae():
    """r = (1, 0, 2), V = (1/2, 1, -1), γ = 1/2: δ = (1 + 1/2 - 1/2, 0 - 1/2 - 1, 2 + 1) = (1, -1.5, 3).
    λ = 1/2: A = (1 - 0.75/4, -1.5 + 3/4, 3). γ = λ = 1: returns (3, 2, 2) less the values."""
    r, v, mask = row(1, 0, 2), row(0.5, 1, -1), row(1, 1, 1)
    advantages, returns = gae(r, v, mask, 0.5, 0.5)
    assert near(advantages, 0.8125, -0.75, 3) and near(returns, 1.3125, 0.25, 2)
    assert near(gae(r, v, mask, 0.5, 0.0)[0], 1, -1.5, 3)
    advantages, returns = gae(r, v, mask)
    assert near(advantages, 2.5, 1, 3) and near(returns, 3, 2, 2)


def test_gae_stops_at_the_end():
    """Two tokens, then padding with V = 99 and r = 50. γ = λ = 1/2: δ = (1 + 1/2 - 1/2, 0 + 0 - 1), A = (1 - 1/4, -1)."""
    advantages, returns = gae(row(1, 0, 50), row(0.5, 1, 99), row(1, 1, 0), 0.5, 0.5)
    assert near(advantages, 0.75, -1, 0) and near(returns, 1.25, 0, 0)


def test_advantages_and_returns():
    """Two discounts: the returns above less the values. One for both: the rewards add up to (-1, 0, -1) and (1, 3); γ = 1, λ = 0 and
    V = (1, 2, 3 | 1, 2) give δ = (-1 + 2 - 1, 3 - 2, -1 - 3 | 1 + 2 - 1, 3 - 2); λ = 1: what follows, (-2, -1, -1 | 4, 3), less V."""
    values = torch.tensor([[1., 2, 3], [1, 2, 99]])
    advantages, returns = advantages_and_returns(TWO, torch.tensor([0.5, 1.0]), values, MASK)
    assert near(returns, -2.75, -1.5, -1, 3, 3, 0) and near(advantages, -3.75, -3.5, -4, 2, 1, 0)
    assert near(advantages_and_returns(TWO, torch.tensor([1.0, 1.0]), values, MASK, lam=0.0)[0], 0, 1, -4, 2, 1, 0)
    assert near(advantages_and_returns(TWO, torch.tensor([1.0, 1.0]), values, MASK)[0], -3, -3, -4, 3, 1, 0)


def test_whiten():
    """(1, 3, 5 | 7): mean 4, variance (9 + 1 + 1 + 9) / 4 = 5. The masked 100s count for nothing; equal advantages become 0."""
    found = whiten(torch.tensor([[1., 3, 5], [7, 100, 100]]), torch.tensor([[1., 1, 1], [1, 0, 0]]))
    assert near(found, -3 / 5 ** 0.5, -1 / 5 ** 0.5, 1 / 5 ** 0.5, 3 / 5 ** 0.5, 0, 0)
    assert near(whiten(row(4, 4, 9), row(1, 1, 0)), 0, 0, 0)


def test_nothing_in_the_mask_is_nothing():
    """No token at all on any rank: 0, not 0 / 0."""
    x, none = row(1, 2), row(0, 0)
    assert near(whiten(x, none), 0, 0) and value_loss(x, x * 0, x * 3, none) == 0 and explained_variance(x, x * 2, none) == 0


# losses

def test_policy_loss():
    """r = (1.5, 0.5, 1.5, 0.5), A = (1, -1, -2, 2), clip 0.2: the surrogates are min(1.5, 1.2), min(-0.5, -0.8), min(-3, -2.4),
    min(1, 1.6): 1.2 - 0.8 - 3 + 1 = -1.6. The first two are cut: no gradient; the others have -A r / 4 = 3/4 and -1/4."""
    logp = row(1.5, 0.5, 1.5, 0.5, 9).log().requires_grad_()
    A, mask = row(1, -1, -2, 2, 50), row(1, 1, 1, 1, 0)
    loss, metrics = ppo_loss(logp, torch.zeros(1, 5), A, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.4) and near(logp.grad, 0, 0, 0.75, -0.25, 0)
    assert metrics["clip_fraction"] == 0.5 and metrics["ratio_max"] == pytest.approx(1.5)
    # dual clip 1.2: the third may not fall below 1.2 x -2 = -2.4; 1.2 - 0.8 - 2.4 + 1 = -1
    assert ppo_loss(logp, torch.zeros(1, 5), A, mask, dual_clip=1.2)[0].item() == pytest.approx(0.25)


def test_policy_loss_per_answer_first():
    """At ratio 1 the loss is minus the mean advantage. Answers (3) and (1, 1, 4): over answers (3 + 2) / 2, over tokens 9 / 4."""
    A, mask = torch.tensor([[3., 0, 0], [1, 1, 4]]), torch.tensor([[1., 0, 0], [1, 1, 1]])
    for how, mean in (("sequence", 2.5), ("token", 2.25), ("constant", 9 / 20)):
        denominator = token_denominator(how, torch.tensor([1, 3]), 10)
        assert ppo_loss(A * 0, A * 0, A, mask, denominator=denominator)[0].item() == pytest.approx(-mean), how


def test_value_loss():
    """Old values 0, clip 0.2. Towards the return and beyond the clip: the held 0.2 is worse, (0.2 - 2)² = 3.24, no gradient. Within:
    (0.1 - 2)² = 3.61. Away from it: (-1 - 2)² = 9 > (-0.2 - 2)². Too far past a return of 0.3: (1 - 0.3)² = 0.49 > (0.2 - 0.3)²."""
    values = row(1, 0.1, -1, 1, 7).requires_grad_()
    returns, mask = row(2, 2, 2, 0.3, 0), row(1, 1, 1, 1, 0)
    loss = value_loss(values, torch.zeros(1, 5), returns, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (3.24 + 3.61 + 9 + 0.49) / 4)
    assert near(values.grad, 0, -1.9 / 4, -3 / 4, 0.7 / 4, 0)
    # below the old value: -1 held at -0.2, return -2: (-0.2 + 2)² = 3.24 > 1; unclipped 1
    assert value_loss(row(-1), row(0), row(-2), row(1)).item() == pytest.approx(1.62)
    assert value_loss(row(-1), row(0), row(-2), row(1), clip=5, denominator=10).item() == pytest.approx(0.05)


def test_explained_variance():
    """Returns (0, 2, 4), variance 8/3; values (0, 2, 1) leave (0, 0, 3), variance 2: 1 - 3/4. A constant explains nothing."""
    returns, mask = row(0, 2, 4, 99), row(1, 1, 1, 0)
    assert explained_variance(row(0, 2, 1, 5), returns, mask) == pytest.approx(0.25)
    assert explained_variance(row(3, 3, 3, 5), returns, mask) == pytest.approx(0, abs=1e-6)
    assert explained_variance(row(1, 2, 3, 5), returns * 0, mask) == 0


# the critic

def random_critic(model, kind):
    critic = Critic(32, None if kind == "shared" else random_model("qwen3", seed=5).model)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.head.bias.fill_(0.7)
        critic.offset.fill_(-2)
    return critic


@pytest.mark.parametrize("kind", ["copy", "shared"])
def test_values_are_of_the_state_before_each_token(kind):
    """Enumerated: V of token t is the head on the last state of prompt + answer[:t], run alone, plus the offset. So the last token
    changes no value, the one before it only the last; and the log-probs are the model's. A new critic says 0."""
    model = random_model("qwen3")
    critic = random_critic(model, kind)
    trunk = critic.trunk if kind == "copy" else model.model
    rollout = rollout_of([[5, 6, 7], [9], [8, 4]], torch.tensor([4, 2, 6]))
    with torch.no_grad():
        logp, values = logp_and_values(model, critic, rollout)
        for b, prompt in enumerate(rollout.prompts):
            said = rollout.tokens[b].tolist()
            for t in range(6):
                ids = torch.tensor([prompt + said[:t]])
                inside = t < rollout.lengths[b]
                value = critic.head(trunk(ids).last_hidden_state[0, -1]).item() - 2 if inside else 0
                own = model(ids).logits[0, -1].log_softmax(-1)[said[t]].item() if inside else 0
                assert values[b, t].item() == pytest.approx(value, abs=1e-4) and logp[b, t].item() == pytest.approx(own, abs=1e-4)
        for place, changed in ((3, []), (2, [3])):
            other = copy.deepcopy(rollout)
            other.tokens[0, place] += 1
            moved = (logp_and_values(model, critic, other)[1] - values).abs()[0] > 1e-6
            assert moved.nonzero()[:, 0].tolist() == changed
        assert (logp_and_values(model, Critic(32, critic.trunk), rollout)[1] == 0).all()


def test_whose_weights_the_value_loss_trains():
    """The states come from a trunk of its own, and the policy gets nothing; or from the policy's, all but the unembedding."""
    model, rollout = random_model("qwen3"), rollout_of([[5, 6]], torch.tensor([3]))
    own, shared = random_critic(model, "copy"), random_critic(model, "shared")
    logp_and_values(model, own, rollout)[1].sum().backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad.abs().sum() > 0 for p in own.trunk.layers.parameters())
    logp_and_values(model, shared, rollout)[1].sum().backward()
    assert model.lm_head.weight.grad is None and all(p.grad.abs().sum() > 0 for p in model.model.layers.parameters())
    assert set(shared.state_dict()) == {"head.weight", "head.bias", "offset"}


def test_scoring_in_parts_is_scoring_at_once():
    model = random_model("qwen3")
    critic = random_critic(model, "copy")
    rollout = rollout_of([[5, 6, 7], [9], [8, 4], [3] * 9], torch.tensor([4, 2, 6, 1]))
    together = logp_and_values(model, critic, rollout)
    for budget in (1, 12, 1000):
        for found, expected in zip(score_with_values(model, critic, rollout, budget, 1.0), together):
            assert torch.allclose(found, expected, atol=1e-5) and not found.requires_grad


# the script

@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr("common.run.plot_run", lambda folder: None)


def run(*flags, output):
    ppo.main([*SMALL, "--output", str(output), *map(str, flags)])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [
    "--critic shared --group-size 1", "--reward classic --exceed -1 --margin 12 --penalty 0 --lam 0.9 --aggregation token --kl-coef 0 --dual-clip 10", "--reward A --ppo-epochs 2 --exceed -1",
    "--lora-rank 2 --penalty-gamma 1 --lam 0.5", "--dtype bfloat16"])
def test_two_steps(flags, tmp_path, capsys):
    rows = run(*flags.split(), output=tmp_path / "run")
    assert "critic: " in capsys.readouterr().out and len(rows) == 2
    names = {"reward", "score", "length", "value_loss", "clip_fraction", "value_clip_fraction", "explained_variance", "exceeded", "repeated",
             "grad_norm", "critic_grad_norm", "gap_max"} | ({"kl"} if "--kl-coef 0" not in flags else set())
    for at in rows:
        assert names <= set(at) and all(math.isfinite(at[name]) for name in names), at
    assert rows[0].get("kl", 0) == pytest.approx(0, abs=1e-4) and rows[0]["explained_variance"] == pytest.approx(0, abs=1e-3) or "--lam" in flags
    before = load_file(ROOT / "common" / "tiny" / "model.safetensors") if "lora" not in flags else {}
    after = load_file(tmp_path / "run" / "model" / "model.safetensors") if before else {}
    assert all(not torch.equal(before[name].to(x.dtype), x) for name, x in after.items() if "proj" in name)


def test_an_optimizer_on_the_cpu_changes_nothing(tmp_path):
    """Nor does the mean return that the critic begins with get lost in the masters: every metric is the same."""
    plain, offloaded = (run(*flags, output=tmp_path / name) for name, flags in (("plain", []), ("offloaded", ["--offload-optimizer"])))
    steady = ("value_loss", "explained_variance", "grad_norm", "critic_grad_norm", "reward")
    assert [[row[k] for k in steady] for row in plain] == [[row[k] for k in steady] for row in offloaded]


@pytest.mark.parametrize("critic", ["copy", "shared"])
def test_micro_batches_change_nothing(critic, tmp_path, monkeypatch):
    """The gradients of the first update, of policy and critic, whether an answer at a time or all at once."""
    found, step = [], MasterAdamW.step

    def noting(self, max_norm):
        found.append([weight.grad.clone() for weight in self.weights if weight.grad is not None])
        return step(self, max_norm)
    monkeypatch.setattr(MasterAdamW, "step", noting)
    for name, budget in (("one", 1), ("all", 10_000)):
        run("--steps", 1, "--critic", critic, "--micro-batch-tokens", budget, output=tmp_path / name)
    assert len(found) == 8
    for i in (0, 1):
        assert len(found[i]) == len(found[i + 4]) > 0
        for one, together in zip(found[i], found[i + 4]):
            assert torch.allclose(one, together, rtol=1e-4, atol=1e-5 * max(1, together.abs().max().item()))


@pytest.mark.parametrize("flags", ["--critic copy", "--critic shared --dtype bfloat16", "--critic copy --lora-rank 2"])
def test_resume_gives_the_very_weights(flags, tmp_path, monkeypatch):
    """Two steps at once, and two with Ctrl-C after the first: policy and critic alike to the bit, and every row of metrics."""
    flags = [*flags.split(), "--save-every", 100]
    whole = run(*flags, output=tmp_path / "whole")
    start = ppo.start

    def stopping_start(cfg, name):
        started = start(cfg, name)
        log = started.log

        def log_and_stop(*args, **kwargs):
            log(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGINT)
        started.log = log_and_stop
        return started
    monkeypatch.setattr(ppo, "start", stopping_start)
    with pytest.raises(SystemExit) as stop:
        run(*flags, output=tmp_path / "cut")
    assert stop.value.code == 130
    monkeypatch.setattr(ppo, "start", start)
    ppo.main(["--resume", str(tmp_path / "cut")])
    name = "adapter_model.safetensors" if "--lora-rank" in flags else "model.safetensors"
    first, second = (load_file(tmp_path / folder / "model" / name) for folder in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    critics = [torch.load(tmp_path / folder / "checkpoints" / "step-000002" / "critic.pt") for folder in ("whole", "cut")]
    assert critics[0].keys() == critics[1].keys() and all(torch.equal(critics[0][k], critics[1][k]) for k in critics[0])
    assert any("head" in k and x.abs().sum() > 0 for k, x in critics[0].items())
    assert all("lora_" in k or "head" in k or k == "offset" for k in critics[0]) == ("--lora-rank" in flags or "shared" in flags)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in at.items() if not k.startswith(("seconds", "tokens_per", "peak"))} for at in rows] == [
        {k: v for k, v in at.items() if not k.startswith(("seconds", "tokens_per", "peak"))} for at in whole]


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, message in {
        "--kl-coef -1": "at least 0", "--gamma 1.1": "at most 1", "--penalty-gamma -0.1": "at least 0", "--lam 2": "at most 1",
        "--lam 0.9": "two discounts", "--margin 80": "every answer would be too long", "--margin 79": "too long", "--ngram 0": "at least 1",
        "--penalty 0.1": "at most 0", "--critic none": "invalid choice", "--critic-lr 0": "above 0", "--reward D": "invalid choice",
        "--value-clip 0": "above 0", "--value-coef -1": "at least 0", "--exceed -11": "at least -10", "--exceed 11": "at most 10",
        "--updates-per-rollout 3": "must divide", "--group-size 0": "at least 1", "--model no/such/model": "no model in"}.items():
        with pytest.raises(SystemExit) as stop:
            ppo.main(flags.split())
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and message in error[0], (flags, error)
        assert not list(tmp_path.iterdir()), flags


def test_resume_with_another_critic_is_refused(tmp_path, capsys):
    run("--steps", 1, output=tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        ppo.main(["--resume", str(tmp_path / "run"), "--steps", "2", "--critic", "shared"])
    assert stop.value.code == 2 and "does not fit this run" in capsys.readouterr().err


def test_critic_of_a_large_model_saves_its_activations(tmp_path):
    """Wider than 256 the trunk keeps one input a block and computes again, as the policy does; the critic is no exception."""
    wide = random_model("qwen3").config
    wide.hidden_size = 264
    model = type(random_model("qwen3"))(wide)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    cfg = SimpleNamespace(model=str(tmp_path), device="cpu", dtype="float32", lora_rank=0, critic="copy")
    critic = ppo.build_critic(cfg, causal_lm(model))
    assert critic.training and all(block.gradient_checkpointing for block in critic.trunk.layers)
