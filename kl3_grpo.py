"""ATR-GRPO: GRPO whose clip is set by a measure of policy divergence, KL3 by default, instead of by the ratio.

Paper: A Unified Framework for Rethinking Policy Divergence Measures in GRPO (arXiv 2602.05494).
Run:   python kl3_grpo.py                              a minute on a laptop; 4 updates a rollout, with 1 every gate is the same
       python kl3_grpo.py --measure ratio --delta 0.02 symmetric clip of the same width; --clip-low 0.2 --clip-high 0.28 is DAPO's
See:   reward as in grpo.py; clip_up and clip_down, the shares of tokens cut for A > 0 and A < 0, and the mean of KL3.

All clips are one gate: with w = p / p_old of a sampled token and C(w) "the measure is at most delta", its gradient is cut if and
only if C is false *and* the update would push w further out, (w - 1) A > 0: hard, one-sided, sign-aware. ATR-GRPO takes
KL3(w) = w - 1 - log w. Its window, in five lines:

    KL3 is convex with its minimum 0 at w = 1, so {KL3 <= delta} is an interval [l, u] around 1;
    its ends solve w - log w = 1 + delta, that is (-w) exp(-w) = -exp(-(1 + delta)),
    so l = -W_0(-exp(-(1 + delta))) and u = -W_-1(-exp(-(1 + delta))), the two branches of Lambert's W;
    with h = sqrt(2 delta): u = 1 + h + h^2/3 + h^3/36 - ..., and l is the same with -h;
    so next to 1 +- h both ends move up by about 2 delta / 3: at delta = 0.02 [0.813, 1.214] instead of [0.8, 1.2].

Said plainly: a threshold on KL3 per token is a one-parameter choice of the two clip bounds. That KL3 averages to KL(old || new)
plays no part in a gate, and a gate on sampled tokens does not bound that KL. This file is grpo.py with another gate: diff grpo.py
kl3_grpo.py.

Deviations ledger: what we know of the paper | here, and why. We had its abstract and others' summaries, not its body, its tables
or its code (none was found); nothing below that is marked unknown should be taken for the paper's.
  gate             | min(w A, clip_C(w) A) | the same, as a clamp to [l, u]; --measure kl has no such window: a predicate, value 1
      outside; the gradients are alike
  delta            | unknown | 0.02, the KL3 window of the usual width (0.02 = 0.2^2 / 2)
  measures         | KL3 is the method; ratio and exact KL are named | those, and kl1, |kl1|, kl2, none to compare
  aggregation      | unknown | as grpo.py, as are KL to a reference (off), std and advantages, unknown too
  updates a rollout| unknown | 4, each with its share of the prompts
  fine-tuning      | LoRA of Qwen3-1.7B and 8B on DAPO-Math-17k (others' summaries) | all weights; --lora-rank for adapters
"""
import math
from dataclasses import dataclass

import torch

from common.data import batch_of
from common.distributed import share, size, total
from common.errors import BadInput
from common.flags import Shared, exit_on_bad_input, flag, parse_flags
from common.logprobs import answer_states, exact_kl, micro_batches, response_logprobs, score
from common.models import causal_lm, initial_model
from common.run import start
from common.sampling import sample
from common.verify import reward


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """GRPO: (reward - group mean) / (group std + eps), ddof 1. (P, G), G > 1 -> (P, G); 0 where a group's rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps)


def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): reward - mean of the *other* answers' rewards. (P, G), G > 1 -> (P, G)."""
    G = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * G / (G - 1)


def dr_grpo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO (arXiv 2503.20783): reward - group mean, no std; meant for --aggregation constant. (P, G) -> (P, G)."""
    return rewards - rewards.mean(1, keepdim=True)


def reinforce_pp_advantages(rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """REINFORCE++ (arXiv 2501.03262): rewards whitened over all tokens, no groups. rewards, lengths (P, G) -> (P, G)."""
    n = total(lengths.sum())
    mean = total((rewards * lengths).sum()) / n
    variance = total(((rewards - mean).square() * lengths).sum()) / (n - 1)
    return (rewards - mean) * torch.rsqrt(variance + 1e-8)


def advantages_of(how: str, rewards: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """--advantage, of rewards (P, G) to answers of lengths (P, G) in tokens -> (P, G)."""
    if how == "reinforce++":
        return reinforce_pp_advantages(rewards, lengths)
    return {"grpo": group_advantages, "rloo": rloo_advantages, "dr_grpo": dr_grpo_advantages}[how](rewards)


def kl3(log_ratio: torch.Tensor) -> torch.Tensor:
    """w - 1 - log w with log w = d = log_ratio (nats), as expm1(d) - d, which keeps its digits near w = 1."""
    return torch.expm1(log_ratio) - log_ratio


def clip_range(delta: float, measure: str = "kl3") -> tuple[float, float]:
    """The window [low, high] of the ratio w in which the measure is at most delta, in float64. An open end is 0.0 or math.inf.

    ratio: (w - 1)^2 / 2, so 1 +- sqrt(2 delta); kl1: -log w; abs_kl1: |log w|; kl2: (log w)^2 / 2; kl3: w - 1 - log w; none: no
    bound. ValueError for another measure or delta < 0.
    """
    if not delta >= 0:
        raise ValueError(f"delta {delta}: must be at least 0")
    h = math.sqrt(2 * delta)
    if measure == "kl3":
        return math.exp(kl3_root(delta, -1 - delta)), math.exp(kl3_root(delta, h))
    windows = {"ratio": (max(0.0, 1 - h), 1 + h), "kl2": (math.exp(-h), math.exp(h)), "kl1": (math.exp(-delta), math.inf),
               "abs_kl1": (math.exp(-delta), math.exp(delta)), "none": (0.0, math.inf)}
    if measure not in windows:
        raise ValueError(f"measure {measure!r} has no window: one of kl3, {', '.join(windows)}")
    return windows[measure]


def kl3_root(delta: float, y: float) -> float:
    """The root y = log w of exp(y) - 1 - y = delta on the side of the start y, by Newton from outside the window."""
    if delta == 0:
        return 0.0
    for _ in range(100):
        excess = math.expm1(y) - y - delta
        if excess <= 0:  # the function is convex: a step passes the root only by rounding
            break
        y -= excess / math.expm1(y)
    return y


def atr_grpo_loss(logp, old_logp, advantages, mask, delta=0.02, measure="kl3", denominator=None, window=None, divergence=None):
    """The gated surrogate, negated. logp, old_logp (B, T) nats; advantages (B,); mask (B, T) -> (scalar, metrics).

        loss = -mean over tokens of min(w A, clip(w, low, high) A),   w = exp(logp - old_logp)

    measure and delta give the window of the ratio; window (low, high) overrides them. divergence (B, T), one number a token,
    gates by the predicate divergence <= delta instead; measure "kl" needs it, else ValueError. denominator as in grpo.py.
    metrics: clip_up and clip_down, the tokens cut with A > 0 and A < 0, and kl3, weighed as in the loss; the largest ratio.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    A = advantages[:, None]                                                             # (B, 1)
    log_ratio = (logp - old_logp).clamp(-20, 20)                                        # (B, T), d
    ratio = log_ratio.exp()                                                             # (B, T), w
    if divergence is None:
        low, high = window or clip_range(delta, measure)
        outward = ((A > 0) & (ratio > high)) | ((A < 0) & (ratio < low))                # (B, T), not C and (w - 1) A > 0
        surrogate = torch.minimum(ratio * A, ratio.clamp(low, high) * A)                # (B, T), clip_C as a projection
    else:
        outward = (divergence > delta) & ((ratio - 1) * A > 0)
        surrogate = torch.where(outward, A.expand_as(ratio), ratio * A)                 # clip_C(w) = 1 outside C
    mean = lambda x: (x * mask / denominator).sum()
    return -mean(surrogate), {"clip_up": mean((outward & (A > 0)).float()).item(),
                              "clip_down": mean((outward & (A < 0)).float()).item(),
                              "kl3": mean(kl3(log_ratio.detach())).item(), "ratio_max": (ratio * mask).max().item()}


def kl_loss(logp, ref_logp, old_logp, mask, denominator):
    """KL(policy || reference) as a loss, k2: r (log p - log ref)^2 / 2 with r = p / old held fixed. (B, T) x4 -> scalar.

    Its gradient has the mean E_p[(log p - log ref) grad log p], which is the KL's own; k1's has mean 0, k3's is biased.
    """
    ratio = (logp.detach() - old_logp).clamp(-20, 20).exp()
    return (ratio * (logp - ref_logp).square() / 2 * mask / denominator).sum()


def token_denominator(how: str, lengths: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """--aggregation: what to divide token sums by, for answers of (B,) tokens, counted over all ranks -> (B, 1)."""
    B, one = total(len(lengths)), torch.ones_like(lengths)
    divisor = {"token": total(lengths.sum()) * one, "sequence": B * lengths, "constant": B * max_new_tokens * one}[how]
    return divisor[:, None].clamp(min=1)


@dataclass
class Config:
    steps: int = flag(32, "rollouts; BuPO: 300", real=300, low=1)
    prompts_per_step: int = flag(8, "problems a rollout; BuPO: 128", real=128, low=1)
    group_size: int = flag(16, "answers to each problem; BuPO: 8. Small models need more for a mixed group", real=8, low=2)
    max_new_tokens: int = flag(80, "longest answer in tokens; BuPO's script: 8192", real=2048, low=1)
    temperature: float = flag(1.0, "for sampling and in training alike", above=0)
    lr: float = flag(1e-4, "AdamW, constant, for four updates a rollout; BuPO: 1e-6", real=1e-6, above=0)
    updates_per_rollout: int = flag(4, "optimiser steps a rollout, each on its share of the prompts; with 1 no gate acts", low=1)
    ppo_epochs: int = flag(1, "passes over a rollout, each with all its updates; BuPO: 1", low=1)
    advantage: str = flag("grpo", "how rewards become advantages", choices=("grpo", "rloo", "reinforce++", "dr_grpo"))
    aggregation: str = flag("token", "mean over all tokens, per answer first, or over a constant length",
                            choices=("token", "sequence", "constant"))
    measure: str = flag("kl3", "what delta bounds at each token; kl: over the whole vocabulary, one more forward pass",
                        choices=("kl3", "ratio", "kl1", "abs_kl1", "kl2", "kl", "none"))
    delta: float = flag(None, "its threshold; 0.02 unless given, which is the usual 1 +- 0.2 for the ratio", type=float, above=0)
    clip_low: float = flag(None, "instead of --delta: ratios below 1 - this are cut when A < 0", type=float, low=0, high=1)
    clip_high: float = flag(None, "likewise above 1 + this when A > 0; DAPO: 0.2 and 0.28", type=float, low=0)
    kl_coef: float = flag(0.0, "weight of the KL to the initial model; unknown in the paper", low=0)
    truncated: str = flag("zero", "answers cut at --max-new-tokens: reward 0, or left out of the loss", choices=("zero", "mask"))


@exit_on_bad_input
def main(argv=None):
    cfg = parse_flags(Config, Shared, description=__doc__, argv=argv)
    if cfg.prompts_per_step % (cfg.updates_per_rollout * size()):
        raise BadInput(f"--updates-per-rollout {cfg.updates_per_rollout}{f' x {size()} processes' * (size() > 1)} must divide "
                       f"--prompts-per-step {cfg.prompts_per_step}")
    bounds, chosen = [b for b in (cfg.clip_low, cfg.clip_high) if b is not None], cfg.delta is not None or cfg.measure != "kl3"
    if len(bounds) == 1 or bounds and chosen:
        raise BadInput("--clip-low and --clip-high go together, and without --delta and --measure")
    delta, window = cfg.delta or 0.02, (1 - cfg.clip_low, 1 + cfg.clip_high) if bounds else None
    run = start(cfg, "kl3_grpo")
    model, optimizer = run.model, run.optimizer
    reference = initial_model(cfg, model) if cfg.kl_coef else None
    if cfg.measure == "kl":
        (V, D), item = causal_lm(model).lm_head.weight.shape, next(model.parameters()).element_size()
        tokens = cfg.prompts_per_step * cfg.group_size // size() * cfg.max_new_tokens
        print(f"--measure kl: the old policy's states and unembedding: {(tokens + V) * D * item / 2**20:.1f} MiB more")

    for step in run.steps():
        problems = share(batch_of(run.train, step, cfg.prompts_per_step, cfg.seed))
        with run.clock("sampling"):
            rollout = sample(model, run.tokenizer, [p["prompt"] for p in problems], cfg.group_size, cfg.max_new_tokens,
                             cfg.temperature, seed=cfg.seed * 100_000 + step)
        with run.clock("verifying"):
            golds = [p["answer"] for p in problems for _ in range(cfg.group_size)]
            rewards = torch.tensor([reward(text, gold) for text, gold in zip(rollout.texts, golds)], device=rollout.tokens.device)
            rewards *= rollout.finished | (cfg.truncated == "mask")                             # (B,)
        rewards = rewards.view(len(problems), cfg.group_size)                                   # (P, G)
        advantages = advantages_of(cfg.advantage, rewards, rollout.lengths.view_as(rewards)).flatten()  # (B,)
        mask = rollout.mask * (rollout.finished | (cfg.truncated == "zero"))[:, None]           # (B, T)

        useful = (mask.sum(1) > 0) & ((advantages != 0) | (cfg.kl_coef > 0))                    # (B,) rows with a gradient
        updates = torch.arange(len(mask), device=mask.device).chunk(cfg.updates_per_rollout)    # each its share of the prompts
        denominator = torch.cat([token_denominator(cfg.aggregation, mask[rows].sum(1), cfg.max_new_tokens)
                                 for rows in updates])                                          # (B, 1)
        mask = mask * useful[:, None]                                                           # others count, and are not run
        parts, gaps = [], []
        with run.clock("training"):
            old_logp = None if cfg.updates_per_rollout * cfg.ppo_epochs == 1 else score(        # (B, T)
                model, rollout, useful, cfg.micro_batch_tokens, cfg.temperature)
            kept = answer_states(model, rollout, useful, cfg.micro_batch_tokens) if cfg.measure == "kl" else None
            for update, rows in enumerate(updates * cfg.ppo_epochs):
                for m in micro_batches(rows, rollout, cfg.micro_batch_tokens, useful):          # (b,) row numbers
                    part = rollout[m]
                    logp, _ = response_logprobs(model, part, cfg.temperature)                   # (b, T)
                    old = logp.detach() if old_logp is None else old_logp[m]                    # (b, T)
                    divergence = None if kept is None else exact_kl(model, kept[0][m], kept[1], part, cfg.temperature)  # (b, T)
                    loss, metrics = atr_grpo_loss(logp, old, advantages[m], mask[m], delta, cfg.measure, denominator[m],
                                                  window, divergence)
                    if reference is not None:
                        with torch.no_grad(), reference() as initial:
                            ref_logp, _ = response_logprobs(initial, part, cfg.temperature)     # (b, T)
                        loss = loss + cfg.kl_coef * kl_loss(logp, ref_logp, old, mask[m], denominator[m])
                    optimizer.backward(loss)
                    parts.append({"loss": loss.item(), **metrics})
                    if update == 0:
                        gaps.append((logp.detach() - part.logp)[mask[m] > 0])
                parts.append({"grad_norm": optimizer.step(max_norm=1.0)})
        run.log(rollout, rewards, parts, gaps)
    run.finish()


if __name__ == "__main__":
    main()
