"""GRPO: sample a group of answers to each problem, make the better ones likelier, the worse less.

Paper: DeepSeekMath (arXiv 2402.03300); equation numbers are BuPO's (arXiv 2512.19673 v3), whose
       baseline it is.
Run:   python grpo.py                            the embedded model learns arithmetic, a minute
       python grpo.py --model Qwen/Qwen3-4B --data openai/gsm8k:main
See:   reward, the share of right answers, rises from about 0.3 to 0.7, answers grow longer, entropy
       falls. Ignore the loss: with one update per rollout its value is minus the mean advantage
       per token; only its gradient matters.

Deviations from the paper, and why:
1. The loss is a mean over all tokens of an update, not per answer first, so that micro-batches
   change nothing; --aggregation sequence is the paper's, constant is Dr. GRPO's.
2. Each rollout makes one update (the paper's authors: several), so every ratio is 1 and nothing is
   clipped; with --updates-per-rollout N each of N updates takes its own N-th of the problems.
3. No KL to a reference unless --kl-coef; it is estimated by k2, whose gradient is unbiased, while
   that of the paper's k3 is not.
4. An answer that was cut off at --max-new-tokens is wrong, whatever it says: its reward is 0, and
   its tokens stay in the loss.
5. A group that is all right or all wrong has no gradient: its tokens count in the mean, but it
   does not go through the model.

RLOO, REINFORCE++ and Dr. GRPO differ in the advantage alone (--advantage).
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
from common.models import adapters_off, reference_model
from common.run import Run
from common.sampling import sample
from common.verify import verify


def reward(text: str, row: dict) -> float:
    """What an answer is worth. Put your own here: row has every column of the data."""
    return verify(text, row["answer"])


def minus_group_mean(rewards):
    """Reward - group mean, exactly 0 where a group's rewards are all equal. (P, G) -> (P, G).

    By itself Dr. GRPO's advantage (arXiv 2503.20783), with --aggregation constant.
    """
    varied = (rewards != rewards[:, :1]).any(1, keepdim=True)           # (P, 1)
    return (rewards - rewards.mean(1, keepdim=True)) * varied


def group_advantages(rewards, eps=1e-6):
    """GRPO: (reward - group mean) / (group std + eps), ddof 1. (P, G), G > 1 -> (P, G)."""
    return minus_group_mean(rewards) / (rewards.std(1, keepdim=True) + eps)


def rloo_advantages(rewards):
    """RLOO (arXiv 2402.14740): reward - mean of the other answers' rewards. (P, G) -> (P, G)."""
    G = rewards.shape[1]
    return minus_group_mean(rewards) * G / (G - 1)


def reinforce_pp_advantages(rewards, lengths):
    """REINFORCE++ (arXiv 2501.03262): whitened over all tokens, no groups. (P, G) x2 -> (P, G)."""
    tokens = total(lengths)
    mean = total(rewards * lengths) / tokens
    variance = total((rewards - mean).square() * lengths) / (tokens - 1)
    return (rewards - mean) / math.sqrt(variance + 1e-8)


def grpo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None,
              denominator=None):
    """The clipped surrogate (eq. 9), negated. (B, T), (B, T), (B,), (B, T) -> (scalar, metrics).

        -mean over tokens of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  r = p / p_old

    Log-probs in nats. denominator: what the sum over tokens is divided by, a number or (B, 1);
    default: the tokens in mask. Count it over the whole update when that is split into
    micro-batches. dual_clip c > 1 bounds the loss of a bad token by c |A|.
    clip_fraction: the share of tokens that get no gradient because of a clip, weighted as in the
    loss.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    A = advantages[:, None]                                             # (B, 1)
    ratio = (logp - old_logp).clamp(-20, 20).exp()                      # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)                  # (B, T)
    surrogate = torch.minimum(ratio * A, clipped * A)                   # (B, T), eq. 9
    if dual_clip is not None:
        bounded = torch.maximum(surrogate, dual_clip * A)               # (B, T)
        surrogate = torch.where(A < 0, bounded, surrogate)
    cut = surrogate != ratio * A                                        # (B, T), no gradient
    loss = -(surrogate * mask / denominator).sum()
    return loss, {"clip_fraction": (cut * mask / denominator).sum().item()}


def kl_loss(logp, ref_logp, old_logp, mask, denominator):
    """KL(policy || reference) as a loss: k2 = r (log p - log ref)^2 / 2, r = p / p_old held fixed.

    (B, T) x4 -> scalar. In expectation its gradient is E_p[(log p - log ref) grad log p]: that of
    each token's KL, its prefix held fixed.
    """
    ratio = (logp.detach() - old_logp).clamp(-20, 20).exp()             # (B, T)
    k2 = (logp - ref_logp).square() / 2                                 # (B, T)
    return (ratio * k2 * mask / denominator).sum()


def token_denominator(how, lengths, num_answers, num_tokens, max_new_tokens):
    """--aggregation: what an update's sums over tokens are divided by. lengths (b,) in tokens.

    -> a number, or (b, 1) where each answer has its own. num_*: of the whole update, all ranks.
    """
    if how == "sequence":
        return num_answers * lengths[:, None]
    if how == "constant":
        return num_answers * max_new_tokens
    return num_tokens


@dataclass
class Args(Shared):
    reward: str = flag(None, "my_rewards.py:mine, a reward(text, row) of your own")
    steps: int = flag(32, "rollouts; BuPO: 300", low=1)
    prompts_per_step: int = flag(8, "problems per rollout; BuPO: 128", low=1)
    group_size: int = flag(16, "answers to each; BuPO: 8, small models need more", low=2)
    max_new_tokens: int = flag(80, "longest answer in tokens; BuPO: 8192", low=1)
    temperature: float = flag(1.0, "divides the logits in sampling and training", low=0.01)
    lr: float = flag(3e-4, "AdamW, constant; ten times that with --lora-rank; BuPO: 1e-6", low=0)
    updates_per_rollout: int = flag(1, "each on its share of the prompts; BuPO: 4", low=1)
    advantage: str = flag("grpo", "how rewards become advantages",
                          choices=("grpo", "rloo", "reinforce++", "dr_grpo"))
    aggregation: str = flag("token", "mean over all tokens, per answer first, or over a constant",
                            choices=("token", "sequence", "constant"))
    clip_low: float = flag(0.2, "A < 0 has no gradient below ratio 1 - this", low=0, high=1)
    clip_high: float = flag(0.2, "A > 0 has none above ratio 1 + this; DAPO: 0.28", low=0)
    dual_clip: float = flag(None, "A < 0 has none above this ratio; BuPO: 10", low=1)
    kl_coef: float = flag(0.0, "weight of the KL to the initial model; BuPO: 0", low=0)


REAL = {"steps": 300, "prompts_per_step": 128, "group_size": 8, "max_new_tokens": 2048, "lr": 1e-6}


@exit_on_bad_input()
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    reward_of = load_reward(args.reward) if args.reward else reward
    run = Run("grpo", args, reward_of)
    model = run.model
    reference = reference_model(args, model) if args.kl_coef else None
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
        if args.advantage == "reinforce++":
            advantages = reinforce_pp_advantages(rewards, rollout.lengths.view_as(rewards))
        elif args.advantage == "rloo":
            advantages = rloo_advantages(rewards)
        elif args.advantage == "dr_grpo":
            advantages = minus_group_mean(rewards)
        else:
            advantages = group_advantages(rewards)
        advantages = advantages.flatten()                                              # (B,)

        # 4. A row whose advantage is 0 has no gradient and is not run, unless a KL gives it one.
        #    With several updates keep what the trained policy says before the first: the sampler
        #    differs by rounding.
        rows = torch.arange(len(advantages), device=model.device)                      # (B,)
        useful = advantages != 0                                                       # (B,)
        if args.kl_coef:
            useful[:] = True
            with adapters_off(reference):
                ref_logp = old_logprobs(reference, rollout, rows,
                                        args.micro_batch_tokens, args.temperature)     # (B, T)
        old_logp = None
        if args.updates_per_rollout > 1:
            old_logp = old_logprobs(model, rollout, rows[useful],
                                    args.micro_batch_tokens, args.temperature)         # (B, T)

        # 5. Update: the gradients of all micro-batches add up to one step of the optimiser.
        parts = []
        grad_norms = []
        for update in rows.chunk(args.updates_per_rollout):                            # row numbers
            num_answers = total(len(update))
            num_tokens = total(rollout.lengths[update])
            for part in micro_batches(rollout, update[useful[update]], args.micro_batch_tokens):
                batch = rollout[part]                                                  # b answers
                logp = response_logprobs(model, batch, args.temperature)               # (b, T)
                old = logp.detach() if old_logp is None else old_logp[part]            # (b, T)
                divisor = token_denominator(
                    args.aggregation, batch.lengths, num_answers, num_tokens,
                    args.max_new_tokens)                                # a number or (b, 1)
                loss, metrics = grpo_loss(
                    logp, old, advantages[part], mask[part],
                    args.clip_low, args.clip_high, args.dual_clip, divisor)
                if args.kl_coef:
                    loss += args.kl_coef * kl_loss(
                        logp, ref_logp[part], old, mask[part], divisor)
                loss.backward()
                metrics["loss"] = loss.item()
                metrics["gap_max"] = largest_gap(old, batch)
                parts.append(metrics)
            grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
            if math.isfinite(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            grad_norms.append(grad_norm)

        # 6. Book-keeping.
        run.log(step, problems, rollout, rewards, parts, grad_norms)
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    main()
