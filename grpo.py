"""GRPO: sample a group of answers to each problem, make the better ones more likely and the worse ones less.

Paper: DeepSeekMath (arXiv 2402.03300); equation numbers here follow BuPO (arXiv 2512.19673 v3), whose baseline it is.
Run:   python grpo.py                                  the embedded model learns arithmetic, a minute on a laptop
       python grpo.py --model Qwen/Qwen3-4B --data zwhe99/DeepMath-103K
See:   reward (share of right answers) rises from about 0.3 to 0.6 or more, answers grow longer, entropy falls.
       The loss itself says little: with ratio 1 its value is minus the mean advantage over tokens, which is 0 when right and
       wrong answers are equally long, and negative while the right ones are longer.

bupo.py and kl3_grpo.py are this file with a few lines changed, diff grpo.py bupo.py; the others keep the order of its loop.

Deviations ledger: BuPO's paper | its authors' code (a fork of verl) | here, and why
  mean over tokens | per answer, then over answers | over the tokens of a micro-batch, micro-batches averaged | over all tokens of
      an update, so that micro-batching changes nothing; --aggregation sequence is the paper's, constant is Dr. GRPO's
  which std        | not said | ddof 1, 1e-6 added | as the code
  group without signal | in the mean with advantage 0 | the same | the same, but its forward pass is skipped
  clip             | 0.2 both sides | and dual clip at 10, log-ratio held within 20 | --clip-low, --clip-high; --dual-clip is off
      unless asked for; log-ratio held within 20
  KL to reference  | none (DeepSeekMath: in the loss, k3) | none | --kl-coef, off; k2, whose gradient is the KL's (k3's is not)
  updates a rollout| 16 | 4, each with its share of the prompts | --updates-per-rollout, 1: then ratio = 1 and nothing clips
  truncated answers| not said | kept, right if the box came in time | --truncated zero: reward 0; mask: left out of the loss
  verifier         | 0 or 1 | string match of the last box | common/verify.py, by value
"""
from dataclasses import dataclass

import torch

from common.data import batch_of
from common.distributed import share, size, total
from common.errors import BadInput
from common.flags import Shared, exit_on_bad_input, flag, parse_flags
from common.logprobs import micro_batches, response_logprobs, score
from common.models import initial_model
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


def grpo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None, denominator=None):
    """The clipped surrogate (eq. 9), negated. logp, old_logp (B, T) nats; advantages (B,); mask (B, T) -> (scalar, metrics).

        loss = -mean over tokens of min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A),   r_t = exp(logp_t - old_logp_t)

    denominator: what the sum over tokens is divided by, a number or (B, 1); default: the tokens in mask. Take it over the
    whole update when that is split into micro-batches. dual_clip c > 1 bounds the loss of a bad token by c |A|.
    metrics: clip_fraction, the tokens that got no gradient, weighed as in the loss, and the largest ratio.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    A = advantages[:, None]                                                             # (B, 1)
    ratio = (logp - old_logp).clamp(-20, 20).exp()                                      # (B, T), r_t
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)  # (B, T), eq. 9
    if dual_clip is not None:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, dual_clip * A), surrogate)
    cut = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))      # (B, T), no gradient there
    mean = lambda x: (x * mask / denominator).sum()
    return -mean(surrogate), {"clip_fraction": mean(cut.float()).item(), "ratio_max": (ratio * mask).max().item()}


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
    lr: float = flag(3e-4, "AdamW, constant; BuPO: 1e-6", real=1e-6, above=0)
    updates_per_rollout: int = flag(1, "optimiser steps a rollout, each on its share of the prompts; BuPO: 4", low=1)
    ppo_epochs: int = flag(1, "passes over a rollout, each with all its updates; BuPO: 1", low=1)
    advantage: str = flag("grpo", "how rewards become advantages", choices=("grpo", "rloo", "reinforce++", "dr_grpo"))
    aggregation: str = flag("token", "mean over all tokens, per answer first, or over a constant length",
                            choices=("token", "sequence", "constant"))
    clip_low: float = flag(0.2, "ratios below 1 - this get no gradient when the advantage is negative", low=0, high=1)
    clip_high: float = flag(0.2, "ratios above 1 + this get none when it is positive; DAPO: 0.28", low=0)
    dual_clip: float = flag(None, "bound on the loss of bad tokens, in advantages; BuPO's code: 10", type=float, above=1)
    kl_coef: float = flag(0.0, "weight of the KL to the initial model; BuPO: 0", low=0)
    truncated: str = flag("zero", "answers cut at --max-new-tokens: reward 0, or left out of the loss", choices=("zero", "mask"))


@exit_on_bad_input
def main(argv=None):
    cfg = parse_flags(Config, Shared, description=__doc__, argv=argv)
    if cfg.prompts_per_step % (cfg.updates_per_rollout * size()):
        raise BadInput(f"--updates-per-rollout {cfg.updates_per_rollout}{f' x {size()} processes' * (size() > 1)} must divide "
                       f"--prompts-per-step {cfg.prompts_per_step}")
    run = start(cfg, "grpo")
    model, optimizer = run.model, run.optimizer
    reference = initial_model(cfg, model) if cfg.kl_coef else None

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
            for update, rows in enumerate(updates * cfg.ppo_epochs):
                for m in micro_batches(rows, rollout, cfg.micro_batch_tokens, useful):          # (b,) row numbers
                    part = rollout[m]
                    logp, _ = response_logprobs(model, part, cfg.temperature)                   # (b, T)
                    old = logp.detach() if old_logp is None else old_logp[m]                    # (b, T)
                    loss, metrics = grpo_loss(logp, old, advantages[m], mask[m], cfg.clip_low, cfg.clip_high, cfg.dual_clip,
                                              denominator[m])
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
