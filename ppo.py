"""PPO with a critic: a reward for right answers of the right length, a penalty for saying things twice, a discount for each.

Paper: Demystifying Long Chain-of-Thought (arXiv 2502.03373, "§"), whose RL this is; PPO is arXiv 1707.06347.
Run:   python ppo.py                                   the embedded model learns arithmetic, two minutes on a laptop
       python ppo.py --model Qwen/Qwen2.5-Math-7B --data zwhe99/DeepMath-103K --reward cosine
       python ppo.py --reward classic --penalty 0 --kl-coef 0 --aggregation token --value-clip 0.5 --dual-clip 10    as BuPO's PPO
See:   reward (share of right answers) rises as in grpo.py, score (what is trained on) with it; explained_variance (1: the critic
       knows every return, 0: only their mean) stays near 0 in a run as short as the embedded model's; exceeded stays low.

Every token has its own advantage: what followed it, discounted, minus V(s_t), what the critic had expected before it was drawn.
This file is grpo.py with a critic in place of the group: diff grpo.py ppo.py. Longest of all: rewards, returns, values by token.

Deviations ledger: paper | the authors' code (a fork of OpenRLHF) | here, and why
  cosine           | r_0 and r_L stand where they would land at the wrong ends | r_0 at length 0, r_L at the limit | as the code
  length, limit    | "16K" context | new tokens with the stop token, added if missing; 14336 | as sampled, with the stop token if
      there is one; --max-new-tokens, and a length beyond counts as the limit (the code's cosine would turn back)
  too long         | L = L_max | L + 16 >= L_max, asked before right or wrong | as the code; --margin 2 for the embedded model,
      as 16 would be a fifth of its 80 tokens
  exceed penalty   | cosine -10; not given for A, B, C | classic: no check unless given (§4.1 gave 0) | the same; -10 for A, B, C;
      an answer without an end is wrong even where nothing checks its length
  verifier         | SymEval | string match after normalising prompt + answer, in most scripts | common/verify.py, answer alone
  repetition       | Algorithm 1, 40-grams, -0.05 | the same; one constant assigned, overlaps count once | the same; --ngram 12
      for the embedded model, whose tokens are characters: a step of its chains has about 10, so 12 in a row are one and more
  two discounts    | γ_c 1, γ_p 0.99 in places; Table 5's best γ_p is 0.999; Tables 7 and 15 list one γ of 1 | one a reward,
      default 0.99 | --gamma, --penalty-gamma: 1 and 0.99
  λ with those     | 1 | anything else raises | BadInput; with equal discounts the rewards are summed and --lam is free (GAE)
  KL               | in the reward, 0.01 | k1, per token, split equally over the rewards, so half of it is discounted by γ_p;
      added after the rewards were clipped to ±10 | as the code; --kl-coef 0 loads no reference
  critic           | - | the policy's weights, new head drawn with std 1/(D+1), no bias, no warm-up | --critic copy: the same, but
      the head is float32, starts at 0, and adds the first rollout's mean return. Without it a critic of the embedded model,
      policy held still, explained 0.001 of the variance after four rollouts, with it 0.11 (one seed). With --lora-rank: a second
      base model, adapters of its own. --critic shared: the head reads the policy's last states, and trains them too
  value loss       | clip 0.2 | the larger square, halved (BuPO's: clip 0.5, mean over tokens) | the same, but clip 2 for the
      embedded model, whose few rollouts would not cover rewards from -10 to 2; --value-coef weighs it in a shared trunk
  whitening        | yes | over the rollout's tokens, population variance at least 1e-8 | as the code (BuPO's: ddof 1)
  mean over tokens | - | micro-batches of one answer: per answer, then over answers | --aggregation sequence; BuPO's PPO: token
  updates a rollout| 1 or 2 epochs | 512 samples each, of 512 problems x 4 to 16, shuffled | --updates-per-rollout 4, by problems
  optimiser        | lr 5e-7, critic 9e-6 (some 4.5e-6) | Adam (0.9, 0.95), warm-up 3 %, cosine to 10 % | AdamW (0.9, 0.999),
      decay 0.01, lr constant, as grpo.py
  also there       | - | --normalize_reward, without effect; a text repetition score and a linear length reward, unused | left out
"""
import math
from dataclasses import dataclass

import torch
from torch import nn

from common.data import batch_of
from common.distributed import shard, share, size, total
from common.errors import BadInput
from common.flags import Shared, exit_on_bad_input, flag, parse_flags
from common.internal_policy import hidden_states
from common.logprobs import micro_batches, score, token_logprobs
from common.models import causal_lm, initial_model, load_model
from common.optim import MasterAdamW
from common.run import start
from common.sampling import join, sample
from common.verify import reward

RANGES = {  # --reward -> (at length 0, at the limit) for right and for wrong answers, §4.2 and §4.3
    "cosine": ((2.0, 1.0), (-10.0, 0.0)), "A": ((0.0, 10.0), (0.0, 0.0)),
    "B": ((6.0, 5.0), (-10.0, 0.0)), "C": ((10.0, 9.0), (-10.0, 0.0))}


def too_long(length, max_length: int, margin: int = 16):
    """The exceed test of a length (int or tensor; tokens, stop token included), made before anyone asks for right or wrong."""
    return length + margin >= max_length


def classic_reward(correct: bool, length: int, max_length: int, exceed: float | None = None, margin: int = 16) -> float:
    """1 if right, else 0; `exceed` if the answer is too long, unless that is None."""
    return float(correct) if exceed is None or not too_long(length, max_length, margin) else exceed


def cosine_reward(correct: bool, length: int, max_length: int, correct_range=(2.0, 1.0), wrong_range=(-10.0, 0.0),
                  exceed: float | None = -10.0, margin: int = 16) -> float:
    """§4.2: half a cosine from range[0] at length 0 to range[1] at max_length (tokens, with the stop token).

        r = r_L + (r_0 - r_L) (1 + cos(pi length / max_length)) / 2

    `exceed` if length + margin >= max_length, right or wrong; None: no such check. ValueError for a positive wrong value.
    """
    if max(wrong_range) > 0:
        raise ValueError(f"a wrong answer must not be rewarded: {wrong_range=}")
    if exceed is not None and too_long(length, max_length, margin):
        return exceed
    first, last = correct_range if correct else wrong_range                             # r_0, r_L
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * min(length / max_length, 1.0)))


def repetition_penalty(token_ids: list[int], ngram: int = 40, penalty: float = -0.05) -> list[float]:
    """Algorithm 1: `penalty` on every token of an N-gram that was there before, 0 elsewhere -> one float per token.

    Set and not added up, and looked up before it is remembered, so a repeat may overlap what it repeats.
    """
    seen, penalties = set(), [0.0] * len(token_ids)
    for j in range(len(token_ids) - ngram + 1):
        gram = tuple(token_ids[j:j + ngram])
        if gram in seen:
            penalties[j:j + ngram] = [penalty] * ngram
        seen.add(gram)
    return penalties


def discounted_returns(rewards: torch.Tensor, gammas: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """§4.6: sum over m and l of gamma_m^l r_{m,t+l}. (M, B, T), (M,), (B, T) -> (B, T), 0 where mask is 0."""
    returns, following = torch.zeros_like(rewards), torch.zeros_like(rewards[..., 0])   # (M, B, T), (M, B)
    for t in reversed(range(rewards.shape[-1])):
        following = (rewards[..., t] + gammas[:, None] * following) * mask[:, t]
        returns[..., t] = following
    return returns.sum(0)


def gae(rewards, values, mask, gamma: float = 1.0, lam: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16). (B, T) x3 -> advantages, returns (B, T), 0 where mask is 0.

        A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t),   return_t = A_t + V(s_t)
    """
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])  # (B, T), (B,)
    values = values * mask                                                              # (B, T), V(s_t)
    for t in reversed(range(rewards.shape[1])):
        after = values[:, t + 1] if t + 1 < rewards.shape[1] else 0                     # (B,), 0 after the stop token
        following = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def charge_kl(rewards, logp, ref_logp, kl_coef: float) -> torch.Tensor:
    """rewards (M, B, T) less kl_coef (log p - log ref), k1, per token; each of the M bears an equal share. -> (M, B, T)."""
    return rewards - kl_coef * (logp - ref_logp) / len(rewards)


def advantages_and_returns(rewards, gammas, values, mask, lam: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, B, T), (M,), (B, T) x2 -> advantages, returns (B, T). With one discount for all the rewards add up, and lam is free."""
    if (gammas == gammas[0]).all():
        return gae(rewards.sum(0), values, mask, gammas[0], lam)
    returns = discounted_returns(rewards, gammas, mask)                                 # (B, T), §4.6
    return (returns - values) * mask, returns


def whiten(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 (of the population) over the tokens in mask, of all ranks; 0 outside. (B, T) x2 -> (B, T)."""
    n = total(mask.sum()).clamp(min=1)
    mean = total((advantages * mask).sum()) / n
    variance = total(((advantages - mean).square() * mask).sum()) / n
    return (advantages - mean) * torch.rsqrt(variance.clamp(min=1e-8)) * mask


def ppo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None, denominator=None):
    """The clipped surrogate (PPO, eq. 7), negated. All (B, T), log-probs in nats -> (scalar, metrics).

        loss = -mean over tokens of min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),   r_t = exp(logp_t - old_logp_t)

    denominator: what the sum over tokens is divided by, a number or (B, 1); default: the tokens in mask. Take it over the
    whole update when that is split into micro-batches. dual_clip c > 1 bounds the loss of a bad token by c |A|.
    metrics: clip_fraction, the tokens that got no gradient, weighed as in the loss, and the largest ratio.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    A = advantages                                                                      # (B, T)
    ratio = (logp - old_logp).clamp(-20, 20).exp()                                      # (B, T), r_t
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # (B, T), eq. 7
    if dual_clip is not None:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, dual_clip * A), surrogate)
    cut = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))      # (B, T), no gradient there
    mean = lambda x: (x * mask / denominator).sum()
    return -mean(surrogate), {"clip_fraction": mean(cut.float()).item(), "ratio_max": (ratio * mask).max().item()}


def value_loss(values, old_values, returns, mask, clip: float = 0.2, denominator=None) -> torch.Tensor:
    """Half the mean of the larger square: of the value, or of it held within `clip` of the old one. (B, T) x4 -> scalar."""
    denominator = mask.sum().clamp(min=1) if denominator is None else denominator
    held = old_values + (values - old_values).clamp(-clip, clip)                        # (B, T)
    larger = torch.maximum((values - returns).square(), (held - returns).square())      # (B, T)
    return 0.5 * (larger * mask / denominator).sum()


def explained_variance(values, returns, mask) -> float:
    """1 - Var(returns - values) / Var(returns) over the tokens in mask. (B, T) x3 -> at most 1; 0 if all returns are equal."""
    n = total(mask.sum()).clamp(min=1)
    mean = lambda x: total((x * mask).sum()) / n
    left, whole = (mean((x - mean(x)).square()).item() for x in (returns - values, returns))
    return 1 - left / whole if whole else 0.0


def token_denominator(how: str, lengths: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """--aggregation: what to divide token sums by, for answers of (B,) tokens, counted over all ranks -> (B, 1)."""
    B, one = total(len(lengths)), torch.ones_like(lengths)
    divisor = {"token": total(lengths.sum()) * one, "sequence": B * lengths, "constant": B * max_new_tokens * one}[how]
    return divisor[:, None].clamp(min=1)


class Critic(nn.Module):
    """V(s) = w . state + b + offset, in float32; states of a trunk of its own or, without one, the policy's (shared)."""
    def __init__(self, width: int, trunk: nn.Module | None = None):
        super().__init__()
        self.trunk, self.head = trunk, nn.Linear(width, 1, dtype=torch.float32)
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
        for weight in self.head.parameters():
            nn.init.zeros_(weight)

    def forward(self, ids, predicts, states):
        """ids, predicts (B, S) as from join(); states (N, D), the policy's -> (N,)."""
        if self.trunk is not None:
            states = self.trunk(input_ids=ids, use_cache=False).last_hidden_state[predicts]
        return self.head(states.float())[:, 0] + self.offset

    def state_dict(self, *args, **kwargs):
        """What is trained: of a trunk with adapters, the adapters."""
        frozen = {name for name, weight in self.named_parameters() if not weight.requires_grad}
        return {name: x for name, x in super().state_dict(*args, **kwargs).items() if name not in frozen}

    def load_state_dict(self, state, *args, **kwargs):
        return super().load_state_dict({**super().state_dict(), **state}, *args, **kwargs)


def build_critic(cfg, model) -> Critic:
    """--critic. A copy is --model loaded once more, not the weights as they are now, so adapters and --resume need nothing."""
    weight = causal_lm(model).lm_head.weight                                            # (V, D)
    load = lambda: load_model(cfg.model, cfg.device, cfg.dtype, cfg.lora_rank, split=False)
    trunk = None if cfg.critic == "shared" else causal_lm(load()).model
    critic = Critic(weight.shape[1], trunk).train()
    if size() > 1:
        shard(critic, trunk.layers if trunk else (), weight.device, trunk.dtype if trunk else torch.float32, (critic.head,))
    critic.to(weight.device)
    trained = sum(p.numel() for p in critic.parameters() if p.requires_grad)
    print(f"critic: {cfg.critic}, {trained / 1e6:.2f} M trained")
    return critic


def logp_and_values(model, critic, rollout, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (nats) of a rollout's tokens, and V of the state before each, in which it is drawn. (B, T) each."""
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)              # (B, S) each
    states, inside = hidden_states(model, ids)[predicts], rollout.mask.bool()           # (N, D), (B, T), N of them True
    logp, _ = token_logprobs(states, causal_lm(model).lm_head.weight, rollout.tokens[inside], temperature)  # (N,)
    values = critic(ids, predicts, states)                                              # (N,)
    return tuple(torch.zeros_like(rollout.mask).masked_scatter(inside, x) for x in (logp, values))


@torch.no_grad()
def score_with_values(model, critic, rollout, budget: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """logp_and_values of a whole rollout under policy and critic as they are now, `budget` tokens at a time. No gradient."""
    logp, values = torch.zeros_like(rollout.logp), torch.zeros_like(rollout.logp)       # (B, T) each
    for m in micro_batches(torch.arange(len(logp), device=logp.device), rollout, budget):
        logp[m], values[m] = logp_and_values(model, critic, rollout[m], temperature)
    return logp, values


def repeated_tokens(rollout, ngram: int) -> torch.Tensor:
    """1.0 on every token of a rollout that lies in a repeated N-gram of its answer. -> (B, T)"""
    repeated = torch.zeros_like(rollout.mask)
    for i, L in enumerate(rollout.lengths.tolist()):
        repeated[i, :L] = torch.tensor(repetition_penalty(rollout.tokens[i, :L].tolist(), ngram, 1.0))
    return repeated


def token_rewards(cfg, rollout, correct: torch.Tensor, repeated: torch.Tensor) -> torch.Tensor:
    """--reward on each answer's last token and, unless --penalty is 0, the repetition penalty as a second row -> (M, B, T)."""
    answer, exceed = torch.zeros_like(rollout.mask), cfg.exceed                         # (B, T)
    for i, (right, L) in enumerate(zip(correct.tolist(), rollout.lengths.tolist())):
        if cfg.reward == "classic":
            answer[i, L - 1] = classic_reward(right, L, cfg.max_new_tokens, exceed, cfg.margin)
        else:
            answer[i, L - 1] = cosine_reward(right, L, cfg.max_new_tokens, *RANGES[cfg.reward],
                                             -10.0 if exceed is None else exceed, cfg.margin)
    return torch.stack([answer, cfg.penalty * repeated] if cfg.penalty else [answer]).clamp(-10, 10)


@dataclass
class Config:
    steps: int = flag(32, "rollouts; the paper: 56 or 112", real=112, low=1)
    prompts_per_step: int = flag(8, "problems a rollout; the paper: 512", real=128, low=1)
    group_size: int = flag(16, "answers to each problem, 1 will do (the critic is the baseline); the paper: 4-16", real=8, low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens, L_max of the length rewards; the paper: 14336", real=2048, low=1)
    temperature: float = flag(1.0, "for sampling and in training alike", above=0)
    lr: float = flag(1e-4, "AdamW, constant; the paper: 5e-7", real=5e-7, above=0)
    updates_per_rollout: int = flag(4, "optimiser steps a rollout, each on its share of the prompts; the paper: 4-16", low=1)
    ppo_epochs: int = flag(1, "passes over a rollout, each with all its updates; the paper: 1, or 2", low=1)
    aggregation: str = flag("sequence", "mean per answer first, as the paper's runs; over all tokens; or over a constant length",
                            choices=("token", "sequence", "constant"))
    clip_low: float = flag(0.2, "ratios below 1 - this get no gradient when the advantage is negative", low=0, high=1)
    clip_high: float = flag(0.2, "ratios above 1 + this get none when it is positive", low=0)
    dual_clip: float = flag(None, "bound on the loss of bad tokens, in advantages; BuPO's baseline: 10", type=float, above=1)
    kl_coef: float = flag(0.01, "price of a nat of KL to the initial model, in reward; the paper: 0.01", low=0)
    critic: str = flag("copy", "the value head reads a model of its own, or the policy's states", choices=("copy", "shared"))
    critic_lr: float = flag(1e-3, "of the critic, with shared of its head; the paper: 9e-6", real=9e-6, above=0)
    value_coef: float = flag(None, "weight of the value loss; default 1, in a shared trunk 0.01: 1 ruins it", type=float, low=0)
    value_clip: float = flag(2.0, "how far a value may move in a rollout, in reward; paper: 0.2, BuPO: 0.5", real=0.2, above=0)
    reward: str = flag("cosine", "1 for right answers, or by length as well (§4.2; A, B, C: §4.3)",
                       choices=("classic", "cosine", "A", "B", "C"))
    exceed: float = flag(None, "reward if too long; default: -10, with classic no such check", type=float, low=-10, high=10)
    margin: int = flag(2, "too long is within so many tokens of --max-new-tokens; the authors: 16", real=16, low=0)
    penalty: float = flag(-0.05, "on every token of a repeated N-gram; 0: none, and one discount for all", high=0)
    ngram: int = flag(12, "N; the paper: 40. The embedded model's tokens are characters", real=40, low=1)
    gamma: float = flag(1.0, "discount per token of the reward for the answer", low=0, high=1)
    penalty_gamma: float = flag(0.99, "of the penalty; the paper: 0.99", low=0, high=1)
    lam: float = flag(1.0, "λ of GAE; other than 1 only where all rewards have one discount", low=0, high=1)


def check(cfg) -> None:
    """BadInput for flags that do not go together; --value-coef by --critic."""
    if cfg.prompts_per_step % (cfg.updates_per_rollout * size()):
        raise BadInput(f"--updates-per-rollout {cfg.updates_per_rollout}{f' x {size()} processes' * (size() > 1)} must divide "
                       f"--prompts-per-step {cfg.prompts_per_step}")
    if (cfg.reward != "classic" or cfg.exceed is not None) and too_long(1, cfg.max_new_tokens, cfg.margin):
        raise BadInput(f"--margin {cfg.margin}: with --max-new-tokens {cfg.max_new_tokens} every answer would be too long")
    if cfg.lam != 1 and cfg.penalty and cfg.penalty_gamma != cfg.gamma:
        raise BadInput(f"--lam {cfg.lam}: with two discounts it must be 1 (one: --penalty 0 or --penalty-gamma {cfg.gamma})")
    if cfg.value_coef is None:
        cfg.value_coef = {"copy": 1.0, "shared": 0.01}[cfg.critic]


@exit_on_bad_input
def main(argv=None):
    cfg = parse_flags(Config, Shared, description=__doc__, argv=argv)
    check(cfg)
    run = start(cfg, "ppo")
    model, optimizer = run.model, run.optimizer
    critic = run.attach("critic", build_critic(cfg, model))
    critic_optimizer = run.attach("critic_optimizer", MasterAdamW(critic, cfg.critic_lr, offload=cfg.offload_optimizer))
    reference = initial_model(cfg, model) if cfg.kl_coef else None

    for step in run.steps():
        problems = share(batch_of(run.train, step, cfg.prompts_per_step, cfg.seed))
        with run.clock("sampling"):
            rollout = sample(model, run.tokenizer, [p["prompt"] for p in problems], cfg.group_size, cfg.max_new_tokens,
                             cfg.temperature, seed=cfg.seed * 100_000 + step)
        with run.clock("verifying"):
            golds = [p["answer"] for p in problems for _ in range(cfg.group_size)]
            correct = torch.tensor([reward(text, gold) for text, gold in zip(rollout.texts, golds)], device=rollout.tokens.device)
            correct *= rollout.finished                                                         # (B,) 0 or 1
            repeated = repeated_tokens(rollout, cfg.ngram)                                      # (B, T)
            rewards = token_rewards(cfg, rollout, correct, repeated)                            # (M, B, T)
        mask = rollout.mask                                                                     # (B, T)
        outcomes = {"score": rewards.sum().item() / len(mask),
                    "exceeded": too_long(rollout.lengths, cfg.max_new_tokens, cfg.margin).float().mean().item(),
                    "repeated": (total(repeated.sum()) / total(mask.sum())).item()}

        gammas = torch.tensor([cfg.gamma, cfg.penalty_gamma][:len(rewards)], device=mask.device)    # (M,)
        if step == 0:  # else the trunk spends its first updates on learning this one number, and its features go with it
            critic.offset.copy_(total(discounted_returns(rewards, gammas, mask).sum()) / total(mask.sum()))

        updates = torch.arange(len(mask), device=mask.device).chunk(cfg.updates_per_rollout)    # each its share of the prompts
        denominator = torch.cat([token_denominator(cfg.aggregation, mask[rows].sum(1), cfg.max_new_tokens)
                                 for rows in updates])                                          # (B, 1)
        parts, gaps = [], []
        with run.clock("training"):
            old_logp, old_values = score_with_values(                                           # (B, T) each
                model, critic, rollout, cfg.micro_batch_tokens, cfg.temperature)
            if reference is not None:
                with reference() as initial:
                    ref_logp = score(initial, rollout, None, cfg.micro_batch_tokens, cfg.temperature)   # (B, T)
                rewards = charge_kl(rewards, old_logp, ref_logp, cfg.kl_coef)                   # (M, B, T)
                outcomes["kl"] = (old_logp - ref_logp).sum().item() / len(mask)                 # nats an answer
            advantages, returns = advantages_and_returns(rewards, gammas, old_values, mask, cfg.lam)  # (B, T) each
            advantages = whiten(advantages, mask)                                               # (B, T)
            outcomes["explained_variance"] = explained_variance(old_values, returns, mask)
            for update, rows in enumerate(updates * cfg.ppo_epochs):
                for m in micro_batches(rows, rollout, cfg.micro_batch_tokens):                  # (b,) row numbers
                    part = rollout[m]
                    logp, values = logp_and_values(model, critic, part, cfg.temperature)        # (b, T) each
                    loss, metrics = ppo_loss(logp, old_logp[m], advantages[m], mask[m], cfg.clip_low, cfg.clip_high,
                                             cfg.dual_clip, denominator[m])
                    critic_loss = value_loss(values, old_values[m], returns[m], mask[m], cfg.value_clip, denominator[m])
                    optimizer.backward(loss + cfg.value_coef * critic_loss)
                    held = (values - old_values[m]).abs() > cfg.value_clip                      # (b, T)
                    parts.append({"loss": loss.item(), "value_loss": critic_loss.item(), **metrics,
                                  "value_clip_fraction": (held * mask[m] / denominator[m]).sum().item()})
                    if update == 0:
                        gaps.append((logp.detach() - part.logp)[mask[m] > 0])
                parts.append({"grad_norm": optimizer.step(max_norm=1.0), "critic_grad_norm": critic_optimizer.step(max_norm=1.0)})
        run.log(rollout, correct.view(len(problems), cfg.group_size), parts, gaps, **outcomes)
    run.finish()


if __name__ == "__main__":
    main()
