"""PPO: every expected value is worked out by hand here, or enumerated by other means."""
import copy
import json
import math
import os
import pathlib
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, rollout_of
from safetensors.torch import load_file

import ppo
from common.sampling import Rollout
from ppo import (
    LENGTH_REWARDS,
    build_critic,
    cosine_reward,
    discounted_returns,
    gae,
    mean_and_variance,
    ppo_loss,
    repetition_penalty,
    token_rewards,
    token_values,
    value_loss,
)

SMALL = ("--steps 2 --prompts-per-step 2 --group-size 2 --max-new-tokens 20 "
         "--updates-per-rollout 2 --eval-problems 0").split()
ROOT = pathlib.Path(__file__).parent.parent
ROOT2 = math.sqrt(2)


def row(*values):
    return torch.tensor([[float(v) for v in values]])


def near(tensor, *values):
    expected = torch.tensor(values, dtype=torch.float64)
    return torch.allclose(tensor.double(), expected.view_as(tensor), atol=1e-6)


# the rewards

@pytest.mark.parametrize("length, right, wrong", [
    (0, 2, -10),                                            # cos 0 = 1: r_0
    (20, 1.5 + ROOT2 / 4, -5 - 5 * ROOT2 / 2),              # cos 45 degrees = sqrt(2) / 2
    (40, 1.5, -5),                                          # cos 90 degrees = 0: halfway
    (60, 1.5 - ROOT2 / 4, -5 + 5 * ROOT2 / 2),
])
def test_cosine(length, right, wrong):
    """r_L + (r_0 - r_L) (1 + cos) / 2 with r 2 to 1 and -10 to 0."""
    assert cosine_reward(1.0, length, 80) == pytest.approx(right)
    assert cosine_reward(0.0, length, 80) == pytest.approx(wrong)


def test_a_reward_between_right_and_wrong_is_interpolated():
    """Length 40 of 80: right 1.5, wrong -5. Half of each is -1.75; a quarter right -3.375; length
    0: half of 2 and half of -10 is -4. It is not taken for true, nor for false."""
    assert cosine_reward(0.5, 40, 80) == pytest.approx(-1.75)
    assert cosine_reward(0.25, 40, 80) == pytest.approx(-3.375)
    assert cosine_reward(0.5, 0, 80) == pytest.approx(-4)
    assert cosine_reward(0.5, 40, 80, *LENGTH_REWARDS["A"]) == pytest.approx(2.5)
    for length in (1, 40, 80):
        assert cosine_reward(0.5, length, 80, *LENGTH_REWARDS["none"]) == 0.5


def test_cosine_at_the_limit():
    """63 + 16 = 79 < 80 is not too long, 64 + 16 = 80 is, right or wrong. Without the check: the
    end of the range, and no turning back beyond."""
    assert 1 < cosine_reward(1.0, 63, 80) < 1.5
    assert -2 < cosine_reward(0.0, 63, 80) < 0
    for correct, length in ((1.0, 64), (0.5, 64), (0.0, 64), (1.0, 80)):
        assert cosine_reward(correct, length, 80) == -10
    assert cosine_reward(1.0, 64, 80, exceed=-3.0) == -3
    assert cosine_reward(1.0, 64, 80, margin=15) > 1
    assert cosine_reward(1.0, 80, 80, exceed=None) == cosine_reward(1.0, 99, 80, exceed=None) == 1
    assert cosine_reward(0.0, 80, 80, exceed=None) == 0


@pytest.mark.parametrize("name, values", [
    ("A", (0, 0, 5, 0, -10)), ("B", (6, -10, 5.5, -5, -10)), ("C", (10, -10, 9.5, -5, -10)),
    ("cosine", (2, -10, 1.5, -5, -10)), ("none", (1, 0, 1, 0, 1)),
])
def test_length_rewards(name, values):
    """Right, wrong at length 0, at half the limit; right at it. A pays a right answer more the
    longer it is; none is the reward itself."""
    places = ((1.0, 0), (0.0, 0), (1.0, 40), (0.0, 40), (1.0, 80))
    found = [cosine_reward(x, length, 80, *LENGTH_REWARDS[name]) for x, length in places]
    assert found == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("tokens, ngram, repeated", [
    ("abxab", 2, "...11"),          # ab again
    ("abab", 2, "..11"),            # ab, ba, ab: ba occurs once
    ("ababa", 2, "..111"),          # and here twice: 3 and 4 by it, 2 and 3 by ab
    ("aaaa", 2, ".111"),            # the second aa overlaps the first: looked up, then remembered
    ("aaaa", 3, ".111"),
    ("aaa", 3, "..."),              # one 3-gram
    ("abcabcabc", 3, "...111111"),  # abc, bca, cab, then every start is a repeat
    ("abcxabcd", 3, "....111."),
    ("aba", 1, "..1"),
    ("ab", 3, ".."), ("", 2, ""),
])
def test_repetition_penalty(tokens, ngram, repeated):
    expected = [-0.5 * (c == "1") for c in repeated]
    assert repetition_penalty([ord(c) for c in tokens], ngram, -0.5) == expected


def test_token_rewards():
    """Answers of 3, 4 and 1 tokens, limit 8, margin 4: the second is too long. The outcome lies on
    the last token, padding has nothing; 1-grams that occur again are repeated. In 3 tokens cos is
    that of 67.5 degrees; half a reward at length 1 is half of right and of wrong."""
    tokens = torch.tensor([[5, 5, 1, 0], [7, 8, 7, 8], [1, 0, 0, 0]])
    lengths = torch.tensor([3, 4, 1])
    mask = (torch.arange(4) < lengths[:, None]).float()
    rollout = Rollout([[3]] * 3, tokens, lengths, mask, mask, lengths > 0, [""] * 3)
    args = SimpleNamespace(length_reward="cosine", max_new_tokens=8, margin=4, ngram=1)
    outcome, repeated = token_rewards(args, rollout, [1.0, 1.0, 0.5])
    at3 = 1.5 + 0.5 * math.cos(math.pi * 3 / 8)
    at1 = (1.5 + 0.5 * math.cos(math.pi / 8) - 5 - 5 * math.cos(math.pi / 8)) / 2
    assert near(outcome, 0, 0, at3, 0, 0, 0, 0, -10, at1, 0, 0, 0)
    assert near(repeated, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0)
    args.length_reward = "none"
    outcome, _ = token_rewards(args, rollout, [1.0, 1.0, 0.5])
    assert near(outcome, 0, 0, 1, 0, 0, 0, 0, 1, 0.5, 0, 0, 0)


# returns and advantages

TWO = torch.tensor([[[0., 0, 1], [0, 2, 100]], [[-1., 0, -2], [1, 1, 100]]])  # (M, B, T)
MASK = torch.tensor([[1., 1, 1], [1, 1, 0]])                                  # of 3 and 2 tokens


def test_returns_with_two_discounts():
    """First answer: gamma 1/2 gives (1/4, 1/2, 1), gamma 1 gives (-3, -2, -2). Second: (1, 2) and
    (2, 1); its padding holds 100."""
    returns = discounted_returns(TWO, torch.tensor([0.5, 1.0]), MASK)
    assert near(returns, -2.75, -1.5, -1, 3, 3, 0)


def test_gae():
    """r = (1, 0, 2), V = (1/2, 1, -1), gamma 1/2: delta = (1 + 1/2 - 1/2, 0 - 1/2 - 1, 2 + 1) =
    (1, -1.5, 3). lambda 1/2: A = (1 - 0.75 / 4, -1.5 + 3 / 4, 3). gamma = lambda = 1: returns
    (3, 2, 2) less the values."""
    rewards, values, mask = row(1, 0, 2), row(0.5, 1, -1), row(1, 1, 1)
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert near(advantages, 0.8125, -0.75, 3) and near(returns, 1.3125, 0.25, 2)
    assert near(gae(rewards, values, mask, 0.5, 0.0)[0], 1, -1.5, 3)
    advantages, returns = gae(rewards, values, mask)
    assert near(advantages, 2.5, 1, 3) and near(returns, 3, 2, 2)


def test_gae_stops_at_the_end():
    """Two tokens, then padding with V = 99 and r = 50. gamma = lambda = 1/2: delta =
    (1 + 1/2 - 1/2, 0 + 0 - 1), A = (1 - 1/4, -1)."""
    advantages, returns = gae(row(1, 0, 50), row(0.5, 1, 99), row(1, 1, 0), 0.5, 0.5)
    assert near(advantages, 0.75, -1, 0) and near(returns, 1.25, 0, 0)


def test_gae_of_summed_rewards():
    """The rewards add up to (-1, 0, -1) and (1, 3); V = (1, 2, 3 | 1, 2). gamma 1, lambda 0: delta
    = (-1 + 2 - 1, 3 - 2, -1 - 3 | 1 + 2 - 1, 3 - 2). lambda 1: what follows, (-2, -1, -1 | 4, 3),
    less V, which is also what discounted_returns of one discount gives."""
    values = torch.tensor([[1., 2, 3], [1, 2, 99]])
    assert near(gae(TWO.sum(0), values, MASK, 1.0, 0.0)[0], 0, 1, -4, 2, 1, 0)
    advantages, returns = gae(TWO.sum(0), values, MASK)
    assert near(advantages, -3, -3, -4, 3, 1, 0) and near(returns, -2, -1, -1, 4, 3, 0)
    assert near(discounted_returns(TWO, torch.ones(2), MASK), -2, -1, -1, 4, 3, 0)


def test_mean_and_variance():
    """(1, 3, 5 | 7): mean 4, variance (9 + 1 + 1 + 9) / 4 = 5; the masked 100s do not count."""
    x = torch.tensor([[1., 3, 5], [7, 100, 100]])
    mask = torch.tensor([[1., 1, 1], [1, 0, 0]])
    mean, variance = mean_and_variance(x, mask)
    assert (mean, variance) == (4, 5)


def test_nothing_in_the_mask_is_nothing():
    """No token at all: 0, not 0 / 0."""
    x, none = row(1, 2), row(0, 0)
    assert value_loss(x, x * 0, x * 3, none) == 0
    loss, metrics = ppo_loss(x, x, x, none)
    assert loss == 0 and metrics["clip_fraction"] == 0


# losses

def test_policy_loss():
    """r = (1.5, 0.5, 1.5, 0.5), A = (1, -1, -2, 2), clip 0.2: the surrogates are min(1.5, 1.2),
    min(-0.5, -0.8), min(-3, -2.4), min(1, 1.6): 1.2 - 0.8 - 3 + 1 = -1.6. The first two are cut: no
    gradient; the others have -A r / 4 = 3/4 and -1/4."""
    logp = row(1.5, 0.5, 1.5, 0.5, 9).log().requires_grad_()
    A, mask = row(1, -1, -2, 2, 50), row(1, 1, 1, 1, 0)
    loss, metrics = ppo_loss(logp, torch.zeros(1, 5), A, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.4) and near(logp.grad, 0, 0, 0.75, -0.25, 0)
    assert metrics["clip_fraction"] == 0.5


@pytest.mark.parametrize("ratio, A, loss, gradient, cut", [
    (5.0, -2.0, 10.0, 10.0, 0.0),   # the loss is -r A, its derivative by logp as well: no bound
    (5.0, 2.0, -2.4, 0.0, 1.0),     # the upper clip, 1.2 x 2
    (0.5, -2.0, 1.6, 0.0, 1.0),     # the lower clip, 0.8 x -2
    (0.5, 2.0, -1.0, -1.0, 0.0),
    (1.0, 0.0, 0.0, 0.0, 0.0),
    (5.0, 0.0, 0.0, 0.0, 0.0),      # no advantage: no gradient, but no clip is the reason
])
def test_loss_gradient_and_clip_of_one_token(ratio, A, loss, gradient, cut):
    logp = row(math.log(ratio)).requires_grad_()
    found, metrics = ppo_loss(logp, row(0), row(A), row(1))
    found.backward()
    assert found.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(gradient)
    assert metrics["clip_fraction"] == cut


def test_policy_loss_per_answer_first():
    """At ratio 1 the loss is minus the mean advantage. Answers (3) and (1, 1, 4): over answers
    (3 + 2) / 2, with answers x length as the denominator; over tokens 9 / 4."""
    A, mask = torch.tensor([[3., 0, 0], [1, 1, 4]]), torch.tensor([[1., 0, 0], [1, 1, 1]])
    per_answer = 2 * torch.tensor([[1], [3]])
    loss, _ = ppo_loss(A * 0, A * 0, A, mask, denominator=per_answer)
    assert loss.item() == pytest.approx(-2.5)
    assert ppo_loss(A * 0, A * 0, A, mask)[0].item() == pytest.approx(-2.25)


def test_value_loss():
    """Old values 0, clip 0.2. Towards the return and beyond the clip: the held 0.2 is worse,
    (0.2 - 2)^2 = 3.24, no gradient. Within: (0.1 - 2)^2 = 3.61. Away from it: (-1 - 2)^2 = 9 >
    (-0.2 - 2)^2. Too far past a return of 0.3: (1 - 0.3)^2 = 0.49 > (0.2 - 0.3)^2."""
    values = row(1, 0.1, -1, 1, 7).requires_grad_()
    returns, mask = row(2, 2, 2, 0.3, 0), row(1, 1, 1, 1, 0)
    loss = value_loss(values, torch.zeros(1, 5), returns, mask)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (3.24 + 3.61 + 9 + 0.49) / 4)
    assert near(values.grad, 0, -1.9 / 4, -3 / 4, 0.7 / 4, 0)
    # below the old value: -1 held at -0.2, return -2: (-0.2 + 2)^2 = 3.24 > 1; not clipped: 1
    assert value_loss(row(-1), row(0), row(-2), row(1)).item() == pytest.approx(1.62)
    loss = value_loss(row(-1), row(0), row(-2), row(1), clip=5, denominator=10)
    assert loss.item() == pytest.approx(0.05)


# the critic

def critic_of(model, folder):
    """build_critic on a model's folder."""
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    args = SimpleNamespace(model=str(folder), device="cpu", dtype="float32", lora_rank=0)
    return build_critic(args, torch.device("cpu"))


def test_values_are_of_the_state_before_each_token(tmp_path):
    """Enumerated: V of token t is the head on the last state of prompt + answer[:t], run alone,
    plus the offset. So the last token changes no value, the one before it only the last. A critic
    at its start says 0; the gradient reaches the head and all blocks."""
    model = random_model("qwen3")
    critic = critic_of(model, tmp_path)
    rollout = rollout_of([[5, 6, 7], [9], [8, 4]], torch.tensor([4, 2, 6]))
    assert (token_values(critic, rollout) == 0).all()
    with torch.no_grad():
        critic.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        critic.lm_head.bias.fill_(0.7)
        critic.offset.fill_(-2)
        values = token_values(critic, rollout)
        for b, prompt in enumerate(rollout.prompts):
            said = rollout.tokens[b].tolist()
            length = int(rollout.lengths[b])
            assert (values[b, length:] == 0).all()
            for t in range(length):
                ids = torch.tensor([prompt + said[:t]])
                state = model.model(ids).last_hidden_state[0, -1]
                value = (critic.lm_head.weight[0] @ state).item() + 0.7 - 2
                assert values[b, t].item() == pytest.approx(value, abs=1e-4)
        for place, changed in ((3, []), (2, [3])):
            other = copy.deepcopy(rollout)
            other.tokens[0, place] += 1
            moved = (token_values(critic, other) - values).abs()[0] > 1e-6
            assert moved.nonzero()[:, 0].tolist() == changed
    token_values(critic, rollout).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in critic.model.layers.parameters())
    assert critic.lm_head.bias.grad == 12


def test_values_are_float32_where_matrix_products_are_not(tmp_path):
    """Under bfloat16 autocast a value of 257 would become 256 or 258."""
    critic = critic_of(random_model("qwen3"), tmp_path)
    critic.compute_dtype = torch.bfloat16
    critic.offset.fill_(257)
    with torch.no_grad():
        values = token_values(critic, rollout_of([[5, 6]], torch.tensor([3])))
    assert values.dtype == torch.float32 and (values[0, :3] == 257).all()


# the script

def run(*flags, output):
    ppo.main([*SMALL, "--output", str(output), *map(str, flags)])
    return read(output)


def read(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_times(rows):
    times = ("seconds", "tokens_per")
    return [{k: v for k, v in at.items() if not k.startswith(times)} for at in rows]


NAMES = {"reward", "score", "length", "loss", "value_loss", "clip_fraction", "grad_norm",
         "explained_variance", "exceeded", "repeated", "gap_max"}


@pytest.mark.parametrize("flags", [
    "--group-size 1", "--length-reward none --penalty 0 --kl-coef 0",
    "--length-reward A --margin 12", "--lora-rank 2 --penalty-gamma 1", "--dtype bfloat16"])
def test_two_steps(flags, tmp_path):
    rows = run(*flags.split(), output=tmp_path / "run")
    names = NAMES if "--kl-coef 0" in flags else NAMES | {"kl"}
    assert len(rows) == 2
    for at in rows:
        assert names <= set(at) and all(math.isfinite(at[name]) for name in names), at
    noise = 0.02 if "bfloat16" in flags else 1e-4  # a reference has no float32 weights there
    assert rows[0].get("kl", 0) == pytest.approx(0, abs=noise)
    assert rows[0]["explained_variance"] == pytest.approx(0, abs=1e-3)  # a new critic is constant
    if "--lora-rank" not in flags:
        before = load_file(ROOT / "common" / "tiny" / "model.safetensors")
        after = load_file(tmp_path / "run" / "model" / "model.safetensors")
        for name, weight in after.items():
            assert "proj" not in name or not torch.equal(before[name].to(weight.dtype), weight)


def test_advantages_are_whitened_and_variance_is_explained(tmp_path, monkeypatch):
    """Over all answer tokens of a rollout: advantages are returns less values, of mean 0 and
    variance 1; explained is 1 - Var(returns - values) / Var(returns)."""
    seen = []
    policy, critic = ppo.ppo_loss, ppo.value_loss

    def noting_policy(logp, old_logp, advantages, mask, **kwargs):
        seen.append([advantages[mask > 0]])
        assert (advantages[mask == 0] == 0).all()
        return policy(logp, old_logp, advantages, mask, **kwargs)

    def noting_critic(values, old_values, returns, mask, *args):
        seen[-1] += [old_values[mask > 0], returns[mask > 0]]
        return critic(values, old_values, returns, mask, *args)
    monkeypatch.setattr(ppo, "ppo_loss", noting_policy)
    monkeypatch.setattr(ppo, "value_loss", noting_critic)
    flags = ["--updates-per-rollout", 1, "--micro-batch-tokens", 10_000]
    rows = run(*flags, output=tmp_path / "run")
    assert len(seen) == 2
    for at, (advantages, old_values, returns) in zip(rows, seen, strict=True):
        left = returns - old_values
        assert near(advantages.mean(), 0) and advantages.std(correction=0) == pytest.approx(1)
        whitened = (left - left.mean()) / left.std(correction=0)
        assert torch.allclose(advantages, whitened, atol=1e-5)
        explained = 1 - (left.var(correction=0) / returns.var(correction=0)).item()
        assert at["explained_variance"] == pytest.approx(explained, rel=1e-3, abs=1e-5)


def test_equal_returns_teach_nothing(tmp_path, monkeypatch):
    """All rewards 0: no variance to explain, advantages 0, and no NaN."""
    (tmp_path / "mine.py").write_text("def zero(text, row):\n    return 0\n")
    flags = ["--reward", f"{tmp_path}/mine.py:zero", "--length-reward", "none", "--penalty", 0]
    for at in run(*flags, "--kl-coef", 0, output=tmp_path / "run"):
        assert at["explained_variance"] == at["grad_norm"] == at["loss"] == at["skipped"] == 0


def test_rewards_of_ones_own_stay_what_they_are(tmp_path):
    """0.5 for every answer, cut off ones 0: the mean reward is half the share that ended, and with
    --length-reward none and no penalty so is the score."""
    (tmp_path / "mine.py").write_text("def half(text, row):\n    return 0.5\n")
    flags = ["--reward", f"{tmp_path}/mine.py:half", "--length-reward", "none", "--penalty", 0]
    for at in run(*flags, "--max-new-tokens", 24, output=tmp_path / "run"):
        assert at["reward"] == pytest.approx(0.5 * (1 - at["truncated"]), abs=1e-4)
        assert at["score"] == pytest.approx(at["reward"], abs=1e-4)


def test_the_kl_is_split_over_both_rewards(tmp_path, monkeypatch):
    """What reaches discounted_returns in the second step less what the answers are worth: each
    reward bears coef / 2 x (log p - log ref) of every token, so both bear the same, and together
    coef x the KL that is logged."""
    seen, original = [], ppo.discounted_returns

    def noting(rewards, gammas, mask):
        seen.append((rewards.clone(), gammas.tolist()))
        return original(rewards, gammas, mask)
    monkeypatch.setattr(ppo, "discounted_returns", noting)
    flags = ["--kl-coef", 0.5, "--ngram", 1000, "--lr", 1e-3]
    rows = run(*flags, output=tmp_path / "run")
    rewards, gammas = seen[-1]
    assert gammas == pytest.approx([1.0, 0.99])
    kl = -rewards[1]              # no N-gram is repeated, so the second reward is the KL's share
    assert 2 * kl.sum().item() / 4 == pytest.approx(0.5 * rows[1]["kl"], rel=1e-3)
    assert (rewards[0] + kl).sum().item() / 4 == pytest.approx(rows[1]["score"], rel=1e-3)


def test_micro_batches_change_nothing(tmp_path, monkeypatch):
    """The gradients of the first update, of policy and critic, whether an answer at a time or all
    at once."""
    found, clip = [], ppo.clip_grad_norm_

    def noting(weights, max_norm):
        weights = list(weights)
        found.append([w.grad.clone() for w in weights if w.grad is not None])
        return clip(weights, max_norm)
    monkeypatch.setattr(ppo, "clip_grad_norm_", noting)
    for name, budget in (("one", 1), ("all", 10_000)):
        run("--steps", 1, "--micro-batch-tokens", budget, output=tmp_path / name)
    assert len(found) == 8
    for i in (0, 1):
        assert len(found[i]) == len(found[i + 4]) > 0
        for one, together in zip(found[i], found[i + 4], strict=True):
            size = max(1, together.abs().max().item())
            assert torch.allclose(one, together, rtol=1e-4, atol=1e-5 * size)


def test_an_update_that_is_not_finite_is_left_out(tmp_path, monkeypatch):
    """The critic's norm is infinite in the first of two updates: nothing moves, and it is counted;
    with both so, the weights are the old ones."""
    clip, calls = ppo.clip_grad_norm_, []

    def broken(weights, max_norm):
        calls.append(1)
        norm = clip(weights, max_norm)
        return norm * math.inf if len(calls) % 2 == 0 else norm
    monkeypatch.setattr(ppo, "clip_grad_norm_", broken)
    rows = run("--steps", 1, output=tmp_path / "run")
    assert rows[0]["skipped"] == 2
    before = load_file(ROOT / "common" / "tiny" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(before[name].to(x.dtype), x) for name, x in after.items())


@pytest.mark.parametrize("flags", ["", "--lora-rank 2"])
def test_resume_gives_the_very_weights(flags, tmp_path, monkeypatch):
    """Two steps at once, and two that break off after the first: policy, critic and optimiser
    alike to the bit, and every row of metrics."""
    whole = run(*flags.split(), output=tmp_path / "whole")
    log = ppo.Run.log

    def breaking_log(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if step == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(ppo.Run, "log", breaking_log)
    with pytest.raises(SystemExit) as stop:
        run(*flags.split(), output=tmp_path / "cut")
    assert stop.value.code == 130
    monkeypatch.setattr(ppo.Run, "log", log)
    ppo.main(["--resume", str(tmp_path / "cut")])
    first, second = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    (*_, rows, _, first), (*_, second) = first, second
    offset, *_, head_weight, head_bias = [saved["value"] for saved in first]
    assert len(rows) == 2 and offset != 0
    assert head_weight.shape[0] == 1 and head_weight.abs().sum() > 0 and head_bias.shape == (1,)
    assert_same(first, second)
    name = "adapter_model.safetensors" if "--lora-rank" in flags else "model.safetensors"
    first, second = (load_file(tmp_path / folder / "model" / name) for folder in ("whole", "cut"))
    assert_same(first, second)
    assert without_times(read(tmp_path / "cut")) == without_times(whole)


def assert_same(a, b):
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("flags, message", [
    ("--kl-coef -1", "at least 0"), ("--gamma 1.1", "at most 1"), ("--penalty 0.1", "at most 0"),
    ("--penalty-gamma -0.1", "at least 0"), ("--ngram 0", "at least 1"),
    ("--critic-lr -1", "at least 0"), ("--margin -1", "at least 0"),
    ("--length-reward D", "invalid choice"), ("--value-clip -1", "at least 0"),
    ("--updates-per-rollout 3", "divisible by"),
    ("--group-size 0", "at least 1"), ("--reward cosine", "--reward"),
])
def test_bad_input_is_one_line_and_code_2(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ppo.main(flags.split())
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1
    assert "error: " in error[0] and message in error[0]
    assert not os.listdir(tmp_path)
