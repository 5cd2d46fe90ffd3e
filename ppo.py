"""PPO with a critic: right answers of the right length are rewarded, repetition is penalised.

Paper: Demystifying Long Chain-of-Thought (arXiv 2502.03373, "§"); PPO itself is arXiv 1707.06347.
Run:   python ppo.py                            the embedded model learns arithmetic, two minutes
       python ppo.py --model Qwen/Qwen2.5-Math-7B --data zwhe99/DeepMath-103K
See:   reward, the share of right answers, rises as in grpo.py, and with it score, the shaped reward
       per answer that is trained on; exceeded stays low. explained_variance (1: the critic knows
       every return, 0: only their mean) stays near 0 in a run this short.

There are two rewards with a discount each (§4.6): one for the answer, on its last token, and a
penalty on every token of a repeated N-gram. A token's advantage is the sum of what follows it less
V(s_t), what the critic expected before it was drawn.

Deviations from the paper, and why:
1. An answer that was cut off at --max-new-tokens is wrong: its reward is 0 before length shapes it.
   Too long is within --margin tokens of the limit, as in the authors' code (paper: at it).
2. A reward between 0 and 1 lies between the curves of wrong and right answers (authors: is wrong).
3. The critic's head starts at 0 and adds the first rollout's mean return (authors: random head).
   After four rollouts it explains 0.11 of the embedded model's variance, without that 0.001.
4. Four updates per rollout, each on its share of the problems (authors: 512 shuffled answers each),
   with AdamW at a constant rate (authors: warm-up, then a cosine to 10 %).
5. For the embedded model, whose tokens are characters, N is 12 (paper: 40); its values move by up
   to 2 per rollout (paper: 0.2), as its few rollouts cover rewards from -10 to 2.
6. The KL is split over both rewards and not clipped with them, as in the authors' code.

Axes: B answers (b in a micro-batch), P problems, T tokens, N of all rows, M rewards, D width.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from common.data import batch_of
from common.distributed import shard, share, size, total
from common.flags import Shared, exit_on_bad_input, flag, load_reward, parse_args
from common.logprobs import (
    largest_gap,
    micro_batches,
    old_logprobs,
    response_logprobs,
    states_before_answers,
)
from common.models import adapters_off, autocast, load_model, reference_model
from common.run import Run
from common.sampling import sample
from common.verify import verify

LENGTH_REWARDS = {  # right answers at length 0 and at the limit, wrong ones; too long: §4.2, §4.3
    "none": ((1.0, 1.0), (0.0, 0.0), None),
    "cosine": ((2.0, 1.0), (-10.0, 0.0), -10.0),
    "A": ((0.0, 10.0), (0.0, 0.0), -10.0),
    "B": ((6.0, 5.0), (-10.0, 0.0), -10.0),
    "C": ((10.0, 9.0), (-10.0, 0.0), -10.0),
}


def reward(text: str, row: dict) -> float:
    """What an answer is worth. Put your own here: row has every column of the data."""
    return verify(text, row["answer"])


def cosine_reward(correct, length, max_length, correct_range=(2.0, 1.0), wrong_range=(-10.0, 0.0),
                  exceed=-10.0, margin=16):
    """§4.2: half a cosine from range[0] at length 0 to range[1] at max_length, in tokens.

        CosFn(L) = r_L + (r_0 - r_L) (1 + cos(pi L / max_length)) / 2

    correct: 1.0 takes correct_range, 0.0 wrong_range, what lies between them is interpolated.
    `exceed` if length + margin >= max_length, right or wrong; None: no such check. The stop token
    counts.
    """
    if exceed is not None and length + margin >= max_length:
        return exceed
    share_of_limit = min(length / max_length, 1.0)
    weight = (1 + math.cos(math.pi * share_of_limit)) / 2                       # 1 to 0
    start, end = correct_range
    right = end + weight * (start - end)                                        # CosFn(L)
    start, end = wrong_range
    wrong = end + weight * (start - end)
    return correct * right + (1 - correct) * wrong


def repetition_penalty(token_ids, ngram=40, penalty=-0.05):
    """Algorithm 1: `penalty` on every token of an N-gram that occurred before, 0 elsewhere.

    -> one float per token. It is set, not added up, and a repeat may overlap what it repeats.
    """
    seen = set()
    penalties = [0.0] * len(token_ids)
    for j in range(len(token_ids) - ngram + 1):
        gram = tuple(token_ids[j:j + ngram])
        if gram in seen:
            penalties[j:j + ngram] = [penalty] * ngram
        seen.add(gram)
    return penalties


def token_rewards(args, rollout, correct):
    """Each answer's --length-reward on its last token, and 1.0 on tokens of repeated N-grams.

    correct: B rewards, 1.0 for right -> (B, T), (B, T)
    """
    outcome = torch.zeros_like(rollout.mask)                            # (B, T)
    repeated = torch.zeros_like(rollout.mask)                           # (B, T)
    ranges = LENGTH_REWARDS[args.length_reward]
    for i, length in enumerate(rollout.lengths.tolist()):
        outcome[i, length - 1] = cosine_reward(
            correct[i], length, args.max_new_tokens, *ranges, args.margin)
        token_ids = rollout.tokens[i, :length].tolist()
        marks = repetition_penalty(token_ids, args.ngram, 1.0)
        repeated[i, :length] = torch.tensor(marks)
    return outcome, repeated


def discounted_returns(rewards, gammas, mask):
    """§4.6: the sum over m and l of gamma_m^l r_{m,t+l}. (M, B, T), (M,), (B, T) -> (B, T)."""
    returns = torch.zeros_like(rewards)                                 # (M, B, T)
    following = torch.zeros_like(rewards[..., 0])                       # (M, B)
    for t in reversed(range(rewards.shape[-1])):
        following = rewards[..., t] + gammas[:, None] * following
        following = following * mask[:, t]
        returns[..., t] = following
    return returns.sum(0)


def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16). (B, T) x3 -> (B, T), (B, T).

        A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

    -> advantages A, returns A + V; 0 where mask is 0. main() does not call this: with
    lam 1 and two discounts it computes the returns directly.
    """
    values = values * mask                                              # (B, T)
    next_values = nn.functional.pad(values, (0, 1))[:, 1:]              # (B, T), 0 after the end
    delta = rewards + gamma * next_values - values                      # (B, T)
    gammas = mask.new_tensor([gamma * lam])                             # (1,)
    advantages = discounted_returns(delta[None], gammas, mask)          # (B, T)
    return advantages, advantages + values


def mean_and_variance(x, mask):
    """Over the tokens in mask, of all ranks; the population's. (B, T) x2 -> two numbers."""
    count = total(mask)
    mean = total(x * mask) / count
    return mean, total((x - mean).square() * mask) / count


def ppo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, denominator=None):
    """The clipped surrogate (PPO, eq. 7), negated. (B, T) x4 -> (scalar, metrics).

        -mean over tokens of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  r = p / p_old

    Log-probs in nats. denominator: what the sum over tokens is divided by, a number or (B, 1);
    default: the tokens in mask. clip_fraction: the share of tokens without gradient, by the clip.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    A = advantages                                                      # (B, T)
    ratio = (logp - old_logp).clamp(-20, 20).exp()                      # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)                  # (B, T)
    surrogate = torch.minimum(ratio * A, clipped * A)                   # (B, T), eq. 7
    cut = surrogate != ratio * A                                        # (B, T), no gradient
    loss = -(surrogate * mask / denominator).sum()
    clip_fraction = (cut * mask / denominator).sum()
    return loss, {"clip_fraction": clip_fraction.item()}


def value_loss(values, old_values, returns, mask, clip=0.2, denominator=None):
    """Half the mean of the larger square: of the value, or of it held within `clip` of the old one.

    (B, T) x4 -> scalar; denominator as in ppo_loss.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    held = old_values + (values - old_values).clamp(-clip, clip)        # (B, T)
    error = (values - returns).square()                                 # (B, T)
    held_error = (held - returns).square()                              # (B, T)
    larger = torch.maximum(error, held_error)                           # (B, T)
    return 0.5 * (larger * mask / denominator).sum()


def build_critic(args, device):
    """--model once more, with a head V(s) = w . state + b + offset in place of the unembedding."""
    critic = load_model(args, split=False).train()
    critic.lm_head = nn.Linear(critic.config.hidden_size, 1)  # float32
    nn.init.zeros_(critic.lm_head.weight)
    nn.init.zeros_(critic.lm_head.bias)
    critic.register_buffer("offset", torch.zeros(()))
    if size() > 1:
        shard(critic.model, critic.model.layers, device, critic.compute_dtype)
        shard(critic.lm_head, (), device, torch.float32)
    return critic.to(device)


def token_values(critic, rollout):
    """V of the state before each answer token, 0 outside the answers. -> (B, T), float32."""
    with autocast(critic):
        states = states_before_answers(critic, rollout)                 # (N, D)
    values = critic.lm_head(states.float())                             # (N, 1)
    values = values[:, 0] + critic.offset                               # (N,)
    inside = rollout.mask.bool()                                        # (B, T), N True
    zeros = torch.zeros_like(rollout.mask)                              # (B, T)
    return zeros.masked_scatter(inside, values)


@dataclass
class Args(Shared):
    reward: str = flag(None, "my_rewards.py:mine, a reward(text, row) of your own")
    steps: int = flag(32, "rollouts; the paper: 56 or 112", low=1)
    prompts_per_step: int = flag(8, "problems per rollout; the paper: 512", low=1)
    group_size: int = flag(16, "answers to each, 1 will do; the paper: 4 to 16", low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens; the paper: 14336", low=1)
    temperature: float = flag(1.0, "divides the logits in sampling and training", low=0.01)
    lr: float = flag(1e-4, "AdamW; ten times that with --lora-rank; the paper: 5e-7", low=0)
    updates_per_rollout: int = flag(4, "each on its share of the prompts; the paper: 4-16", low=1)
    kl_coef: float = flag(0.01, "reward a nat of KL to the initial model costs", low=0)
    critic_lr: float = flag(1e-3, "of the critic, trunk and head; the paper: 9e-6", low=0)
    value_clip: float = flag(2.0, "how far a value moves per rollout; the paper: 0.2", low=0)
    length_reward: str = flag("cosine", "§4.2; A, B, C: §4.3; none: the reward as it is",
                              choices=tuple(LENGTH_REWARDS))
    margin: int = flag(2, "too long: this near to --max-new-tokens; the authors: 16", low=0)
    penalty: float = flag(-0.05, "on every token of a repeated N-gram; 0: none", high=0)
    ngram: int = flag(12, "N; the paper: 40", low=1)
    gamma: float = flag(1.0, "discount per token of the reward for the answer", low=0, high=1)
    penalty_gamma: float = flag(0.99, "of the penalty; the paper: 0.99", low=0, high=1)


REAL = {"steps": 112, "prompts_per_step": 128, "group_size": 8, "max_new_tokens": 2048,
        "lr": 5e-7, "critic_lr": 9e-6, "value_clip": 0.2, "margin": 16, "ngram": 40}


@exit_on_bad_input()
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    reward_of = load_reward(args.reward) if args.reward else reward
    run = Run("ppo", args, reward_of)
    model = run.model
    reference = reference_model(args, model) if args.kl_coef else None
    critic = build_critic(args, model.device)
    penalty_gamma = args.penalty_gamma if args.penalty else args.gamma
    gammas = torch.tensor([args.gamma, penalty_gamma], device=model.device)            # (M,)
    weights = [
        {"params": model.parameters(), "lr": args.lr},
        {"params": critic.parameters(), "lr": args.critic_lr}]
    # foreach=False: one weight after another, without temporary copies of all of them.
    optimizer = torch.optim.AdamW(weights, weight_decay=0.01, foreach=False)

    for step in range(run.begin(optimizer, critic.offset), args.steps):
        # 1. Sample a group of answers to each problem.
        problems = share(batch_of(run.train, step, args.prompts_per_step, args.seed))  # P rows
        prompts = run.encode(problems)
        rollout = sample(
            model, run.tokenizer, prompts,
            n=args.group_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed * 100_000 + step)                                           # B answers
        rows = torch.arange(len(rollout.mask), device=model.device)                    # (B,)

        # 2. Rate them. An answer that was cut off is wrong, here and in evaluation: it gets 0, and
        #    stays in the loss.
        correct = []                                                                   # B rewards
        for i, text in enumerate(rollout.texts):
            row = problems[i // args.group_size]
            ended = rollout.finished[i]
            correct.append(float(reward_of(text, row)) if ended else 0.0)

        # 3. Tokens get rewards: the last one the answer's, shaped by length, repeated ones another.
        mask = rollout.mask                          # (B, T), by length, cut off or not
        outcome, repeated = token_rewards(args, rollout, correct)                      # (B, T) x2
        rewards = torch.stack([outcome, args.penalty * repeated])                      # (M, B, T)
        rewards = rewards.clamp(-10, 10)
        exceeded = rollout.lengths + args.margin >= args.max_new_tokens                # (B,)
        num_drawn = total(len(mask))
        share_repeated, _ = mean_and_variance(repeated, mask)
        metrics = {
            "score": total(rewards) / num_drawn,
            "exceeded": total(exceeded) / num_drawn,
            "repeated": share_repeated}
        if step == 0:  # otherwise the critic spends its first updates on learning this mean
            returns = discounted_returns(rewards, gammas, mask)                        # (B, T)
            mean, _ = mean_and_variance(returns, mask)
            critic.offset.fill_(mean)

        # 4. What policy and critic say before the update. The KL (k1) to the initial model is a
        #    negative reward of each token, an equal part of it in each of the M rewards.
        old_logp = old_logprobs(
            model, rollout, rows, args.micro_batch_tokens, args.temperature)    # (B, T)
        old_values = torch.zeros_like(mask)                                            # (B, T)
        with torch.no_grad():
            for part in micro_batches(rollout, rows, args.micro_batch_tokens):
                old_values[part] = token_values(critic, rollout[part])
        if reference is not None:
            with adapters_off(reference):
                ref_logp = old_logprobs(
                    reference, rollout, rows, args.micro_batch_tokens, args.temperature)  # (B, T)
            log_ratio = old_logp - ref_logp                                            # (B, T)
            cost = args.kl_coef * log_ratio / len(rewards)                             # (B, T)
            rewards = rewards - cost                                                   # (M, B, T)
            metrics["kl"] = total(log_ratio) / num_drawn

        # 5. Returns and advantages, §4.6, which are whitened: mean 0, variance 1.
        returns = discounted_returns(rewards, gammas, mask)                            # (B, T)
        advantages = returns - old_values                                              # (B, T)
        mean, unexplained = mean_and_variance(advantages, mask)
        _, variance = mean_and_variance(returns, mask)
        metrics["explained_variance"] = (variance - unexplained) / max(variance, 1e-8)
        scale = torch.tensor(max(unexplained, 1e-8)).rsqrt()                           # scalar
        advantages = (advantages - mean) * scale * mask                                # (B, T)

        # 6. Update: the gradients of all micro-batches add up to one step of the optimiser. Means
        #    are per answer first, then over the answers of the update.
        parts = []
        grad_norms = []
        for update in rows.chunk(args.updates_per_rollout):                            # row numbers
            num_answers = total(len(update))
            for part in micro_batches(rollout, update, args.micro_batch_tokens):
                batch = rollout[part]                                                  # b answers
                divisor = num_answers * batch.lengths[:, None]                         # (b, 1)
                logp = response_logprobs(model, batch, args.temperature)               # (b, T)
                loss, found = ppo_loss(
                    logp, old_logp[part], advantages[part], batch.mask,
                    denominator=divisor)
                loss.backward()
                values = token_values(critic, batch)                            # (b, T)
                error = value_loss(
                    values, old_values[part], returns[part], batch.mask,
                    args.value_clip, divisor)
                error.backward()
                found["loss"] = loss.item()
                found["value_loss"] = error.item()
                found["gap_max"] = largest_gap(old_logp[part], batch)
                parts.append(found)
            grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
            critic_norm = clip_grad_norm_(critic.parameters(), 1.0).item()
            if math.isfinite(grad_norm + critic_norm):
                optimizer.step()
            else:
                grad_norm = math.nan  # counted as skipped
            optimizer.zero_grad()
            grad_norms.append(grad_norm)

        # 7. Book-keeping.
        as_one_group = torch.tensor([correct])                                         # (1, B)
        run.log(step, problems, rollout, as_one_group, parts, grad_norms, **metrics)
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    main()
