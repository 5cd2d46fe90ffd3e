"""ATR-GRPO: GRPO whose clip is set by a measure of policy divergence, KL3, instead of by the ratio.
Only this paper's abstract and others' summaries could be read, not its body, tables or code.

Paper: A Unified Framework for Rethinking Policy Divergence Measures in GRPO (arXiv 2602.05494).
Run:   python kl3_grpo.py                        the embedded model learns arithmetic, a minute
       python kl3_grpo.py --measure ratio        the usual clip, of the same width
See:   reward as in grpo.py; clip_up and clip_down, the shares of tokens that are cut for a good and
       for a bad advantage; kl3, how far its updates took the policy from a rollout's tokens.

All clips are one gate: with w = p / p_old of a sampled token and a measure that is at most delta
in the window [low, high] around 1, a token loses its gradient if w is outside and the update
would push it further out: w > high with A > 0, w < low with A < 0. KL3(w) = w - 1 - log w is
convex with its minimum 0 at w = 1, so its window is an interval whose ends solve w - log w =
1 + delta: about 1 +- sqrt(2 delta) + 2 delta / 3, [0.813, 1.214] at delta 0.02. So a threshold on
KL3 is a choice of two clip bounds by one number; that KL3 averages to a KL plays no part in it.
This file is grpo.py with another gate: diff grpo.py kl3_grpo.py.

What is not known of the paper, and what stands here:
1. Its delta. 0.02, which gives the ratio the usual 1 +- 0.2.
2. Its aggregation. The mean over all tokens of an update, so that micro-batches change nothing.
3. Its updates per rollout. 4, each on its share of the prompts; with 1 no gate ever acts.
4. Its learning rate. The best of three for four updates on the embedded model.
5. Its truncated answers. One cut off at --max-new-tokens is wrong, whatever it says: its reward is
   0, and its tokens stay in the loss.

Axes: B answers (b in a micro-batch), P problems, G answers per problem, T answer tokens.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common.data import batch_of
from common.distributed import share, total
from common.flags import Shared, exit_on_bad_input, flag, load_reward, parse_args
from common.logprobs import largest_gap, micro_batches, old_logprobs, response_logprobs
from common.run import Run
from common.sampling import sample
from common.verify import verify


def reward(text: str, row: dict) -> float:
    """What an answer is worth. Put your own here: row has every column of the data."""
    return verify(text, row["answer"])


def minus_group_mean(rewards):
    """Reward - group mean, exactly 0 where a group's rewards are all equal. (P, G) -> (P, G)."""
    varied = (rewards != rewards[:, :1]).any(1, keepdim=True)           # (P, 1)
    return (rewards - rewards.mean(1, keepdim=True)) * varied


def group_advantages(rewards, eps=1e-6):
    """GRPO: (reward - group mean) / (group std + eps), ddof 1. (P, G), G > 1 -> (P, G)."""
    return minus_group_mean(rewards) / (rewards.std(1, keepdim=True) + eps)


def kl3(log_ratio):
    """w - 1 - log w where log w = d (nats), as expm1(d) - d, which keeps its digits near w = 1."""
    return torch.expm1(log_ratio) - log_ratio


def clip_range(delta, measure="kl3"):
    """The window (low, high) of w in which the measure is at most delta; floats, 0.0 or math.inf
    for an open end. ValueError for another measure or delta < 0.

    ratio: (w - 1)^2 / 2; kl1: -log w; abs_kl1: |log w|; kl2: (log w)^2 / 2; kl3: w - 1 - log w.
    """
    if not delta >= 0:
        raise ValueError(f"delta {delta}: must be at least 0")
    h = math.sqrt(2 * delta)
    if measure == "ratio":
        return max(0.0, 1 - h), 1 + h
    if measure == "kl1":
        return math.exp(-delta), math.inf
    if measure == "abs_kl1":
        return math.exp(-delta), math.exp(min(delta, 700))  # a float ends at exp(709)
    if measure == "kl2":
        return math.exp(-h), math.exp(min(h, 700))
    if measure == "kl3":
        above = min(h, math.log1p(delta + h))
        return math.exp(kl3_root(delta, -1 - delta)), math.exp(kl3_root(delta, above))
    raise ValueError(f"measure {measure!r}: one of ratio, kl1, abs_kl1, kl2, kl3")


def kl3_root(delta, start):
    """The root y = log w of exp(y) - 1 - y = delta on the side of `start`, which lies outside the
    window, by Newton: the function is convex, so a step never passes the root."""
    y = start
    for _ in range(100):
        excess = math.expm1(y) - y - delta
        if excess <= 0 or y == 0:  # only by rounding
            break
        y -= excess / math.expm1(y)
    return y


def atr_grpo_loss(logp, old_logp, advantages, mask, delta=0.02, measure="kl3", denominator=None):
    """The gated surrogate, negated. (B, T), (B, T), (B,), (B, T) -> (scalar, metrics).

        -mean over tokens of min(w A, clip(w, low, high) A),  w = p / p_old

    Log-probs in nats. (low, high): clip_range(delta, measure). denominator: what the sum over
    tokens is divided by; default: the tokens in mask. Count it over the whole update when that is
    split into micro-batches. clip_up, clip_down: shares of tokens that get no gradient.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    low, high = clip_range(delta, measure)
    A = advantages[:, None]                                             # (B, 1)
    log_ratio = (logp - old_logp).clamp(-20, 20)                        # (B, T)
    ratio = log_ratio.exp()                                             # (B, T), w
    surrogate = torch.minimum(ratio * A, ratio.clamp(low, high) * A)    # (B, T)
    loss = -(surrogate * mask / denominator).sum()
    up = (A > 0) & (ratio > high)                                       # (B, T), cut upwards
    down = (A < 0) & (ratio < low)                                      # (B, T), cut downwards
    clip_up = (up * mask / denominator).sum().item()
    clip_down = (down * mask / denominator).sum().item()
    return loss, {"clip_up": clip_up, "clip_down": clip_down}


@dataclass
class Args(Shared):
    reward: str = flag(None, "my_rewards.py:mine, a reward(text, row) of your own")
    steps: int = flag(32, "rollouts; BuPO: 300", low=1)
    prompts_per_step: int = flag(8, "problems per rollout; BuPO: 128", low=1)
    group_size: int = flag(16, "answers to each; BuPO: 8, small models need more", low=2)
    max_new_tokens: int = flag(80, "longest answer in tokens; BuPO: 8192", low=1)
    temperature: float = flag(1.0, "divides the logits in sampling and training", low=0.01)
    lr: float = flag(1e-4, "AdamW, constant; ten times that with --lora-rank; BuPO: 1e-6", low=0)
    updates_per_rollout: int = flag(4, "each on its share of the prompts; 1: no gate acts", low=1)
    measure: str = flag("kl3", "of the divergence of a token",
                        choices=("ratio", "kl1", "abs_kl1", "kl2", "kl3"))
    delta: float = flag(0.02, "its threshold; very large: no gate", low=0)


REAL = {"steps": 300, "prompts_per_step": 128, "group_size": 8, "max_new_tokens": 2048, "lr": 1e-6}


@exit_on_bad_input()
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    reward_of = load_reward(args.reward) if args.reward else reward
    run = Run("kl3_grpo", args, reward_of)
    model = run.model
    # foreach=False: one weight after another, without temporary copies of all of them.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, foreach=False)

    for step in range(run.begin(optimizer), args.steps):
        # 1. Sample a group of answers to each problem.
        problems = share(batch_of(run.train, step, args.prompts_per_step, args.seed))  # P rows
        prompts = run.encode(problems)
        rollout = sample(model, run.tokenizer, prompts, args.group_size, args.max_new_tokens,
                         args.temperature, seed=args.seed * 100_000 + step)            # B answers
        mask = rollout.mask  # 1 on an answer's tokens, by length, stop token included # (B, T)

        # 2. Reward them. An answer that was cut off is wrong: 0, here and in evaluation.
        rewards = torch.zeros(len(problems), args.group_size, device=model.device)     # (P, G)
        for i, finished in enumerate(rollout.finished.tolist()):
            p, g = divmod(i, args.group_size)
            if finished:
                rewards[p, g] = reward_of(rollout.texts[i], problems[p])

        # 3. Compare each answer with its group.
        advantages = group_advantages(rewards).flatten()                               # (B,)

        # 4. A row whose advantage is 0 has no gradient and is not run. With several updates keep
        #    what the trained policy says before the first: the sampler differs by rounding.
        rows = torch.arange(len(advantages), device=model.device)                      # (B,)
        useful = advantages != 0                                                       # (B,)
        old_logp = None
        if args.updates_per_rollout > 1:
            old_logp = old_logprobs(model, rollout, rows[useful],
                                    args.micro_batch_tokens, args.temperature)         # (B, T)

        # 5. Update: the gradients of all micro-batches add up to one step of the optimiser.
        parts = []
        grad_norms = []
        for update in rows.chunk(args.updates_per_rollout):                            # row numbers
            num_tokens = total(rollout.lengths[update])
            for part in micro_batches(rollout, update[useful[update]], args.micro_batch_tokens):
                batch = rollout[part]                                                  # b answers
                logp = response_logprobs(model, batch, args.temperature)               # (b, T)
                old = logp.detach() if old_logp is None else old_logp[part]            # (b, T)
                loss, metrics = atr_grpo_loss(
                    logp, old, advantages[part], mask[part],
                    args.delta, args.measure, num_tokens)
                loss.backward()
                metrics["loss"] = loss.item()
                metrics["gap_max"] = largest_gap(old, batch)
                parts.append(metrics)
            grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
            if math.isfinite(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            grad_norms.append(grad_norm)

        # 6. How far the updates have moved the policy: KL3 of all tokens of the rollout.
        logp = old_logprobs(model, rollout, rows, args.micro_batch_tokens,
                            args.temperature)                                          # (B, T)
        divergence = kl3(logp - rollout.logp) * mask                                   # (B, T)
        moved = total(divergence) / total(mask)

        # 7. Book-keeping.
        run.log(step, problems, rollout, rewards, parts, grad_norms, kl3=moved)
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    main()
