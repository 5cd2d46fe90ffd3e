"""PPO with a critic: right answers of the right length are rewarded, repetition is penalised.

Paper: Demystifying Long Chain-of-Thought (arXiv 2502.03373, "§"); PPO itself is arXiv 1707.06347.
Run:   python ppo.py                            the embedded model learns arithmetic, two minutes
       python ppo.py --model Qwen/Qwen2.5-Math-7B --data zwhe99/DeepMath-103K
See:   reward, the share of right answers, rises as in grpo.py, and with it score, the shaped reward
       per answer that is trained on; exceeded stays low. explained_variance (1: the critic knows
       every return, 0: only their mean) stays near 0 in a run this short.

A token's advantage is the sum of the rewards that follow it less V(s_t), what the critic expected.
There are two rewards with a discount each (§4.6): one for the answer, on its last token, and a
penalty on every token of a repeated N-gram.

Deviations from the paper, and why:
1. An answer that was cut off at --max-new-tokens is wrong: reward 0 before length shapes it; its
   tokens stay in the loss. Too long is within --margin tokens of the limit, 16 as in the authors'
   code (paper: at the limit), 2 for the embedded model, whose limit is 80.
2. A reward between 0 and 1 is interpolated between the curves of right and wrong answers, so that
   0.5 stays half (authors' code: below 1 is wrong).
3. The critic's head starts at 0 and adds the first rollout's mean return (authors: random). It then
   explains 0.11 of the variance after four rollouts of the embedded model, without it 0.001.
4. Four updates per rollout, each on its share of the problems (authors: 512 shuffled answers each),
   with AdamW at a constant rate (authors: warm-up, then a cosine to 10 %).
5. N is 12 for the embedded model (paper: 40), whose tokens are characters, and its values move by
   up to 2 per rollout (paper: 0.2), as its few rollouts have to cover rewards from -10 to 2.
6. The KL is split over both rewards and not clipped with them, as in the authors' code.

Axes: B answers, P problems, G answers per problem, T answer tokens, S prompt and answer tokens,
M rewards, N answer tokens in a row, D width, V vocabulary; b a micro-batch's share of B.
"""
import math
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from common.data import batch_of
from common.distributed import shard, share, size, total
from common.flags import BadInput, Shared, exit_on_bad_input, flag, load_reward, parse_args
from common.logprobs import (
    largest_gap,
    micro_batches,
    old_logprobs,
    states_before_answers,
    token_logprobs,
)
from common.models import autocast, causal_lm, load_model, reference_model
from common.run import Run
from common.sampling import join, sample
from common.verify import verify

RANGES = {  # --length-reward: (at length 0, at the limit) of right and of wrong answers, §4.2, §4.3
    "cosine": ((2.0, 1.0), (-10.0, 0.0)),
    "A": ((0.0, 10.0), (0.0, 0.0)),
    "B": ((6.0, 5.0), (-10.0, 0.0)),
    "C": ((10.0, 9.0), (-10.0, 0.0)),
}


def reward(text: str, row: dict) -> float:
    """What an answer is worth. Put your own here: row has every column of the data."""
    return verify(text, row["answer"])


def cosine_reward(correct, length, max_length, correct_range=(2.0, 1.0), wrong_range=(-10.0, 0.0),
                  exceed=-10.0, margin=16) -> float:
    """§4.2: half a cosine from range[0] at length 0 to range[1] at max_length, in tokens.

        CosFn(L) = r_L + (r_0 - r_L) (1 + cos(pi L / max_length)) / 2

    correct: 1.0 takes correct_range, 0.0 wrong_range, what lies between them is interpolated.
    `exceed` if length + margin >= max_length, right or wrong; None: no such check. The stop token
    counts. ValueError if a wrong answer would get more than 0.
    """
    if max(wrong_range) > 0:
        raise ValueError(f"a wrong answer must not be rewarded: {wrong_range=}")
    if exceed is not None and length + margin >= max_length:
        return exceed
    fallen = (1 - math.cos(math.pi * min(length / max_length, 1.0))) / 2      # 0 at r_0, 1 at r_L
    if_right = correct_range[0] + fallen * (correct_range[1] - correct_range[0])
    if_wrong = wrong_range[0] + fallen * (wrong_range[1] - wrong_range[0])
    return correct * if_right + (1 - correct) * if_wrong


def repetition_penalty(token_ids: list[int], ngram=40, penalty=-0.05) -> list[float]:
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


def discounted_returns(rewards, gammas, mask):
    """§4.6: the sum over m and l of gamma_m^l r_{m,t+l}; 0 where mask is 0.

    (M, B, T), (M,), (B, T) -> (B, T)
    """
    returns = torch.zeros_like(rewards)                                 # (M, B, T)
    following = torch.zeros_like(rewards[..., 0])                       # (M, B)
    for t in reversed(range(rewards.shape[-1])):
        following = (rewards[..., t] + gammas[:, None] * following) * mask[:, t]
        returns[..., t] = following
    return returns.sum(0)


def gae(rewards, values, mask, gamma=1.0, lam=1.0):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16); 0 where mask is 0.

        A_t = delta_t + gamma lam A_{t+1},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

    (B, T) x3 -> advantages A, returns A + V, (B, T) each.
    """
    values = values * mask                                              # (B, T)
    advantages = torch.zeros_like(rewards)                              # (B, T)
    following = torch.zeros_like(rewards[:, 0])                         # (B,), A_{t+1}
    next_value = torch.zeros_like(rewards[:, 0])                        # (B,), V(s_{t+1})
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]       # (B,)
        following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def mean_and_variance(x, mask):
    """Over the tokens in mask, of all ranks; the population's. (B, T) x2 -> two scalars."""
    count = total(mask.sum()).clamp(min=1)
    mean = total((x * mask).sum()) / count
    return mean, total(((x - mean).square() * mask).sum()) / count


def whiten(advantages, mask):
    """Mean 0 and variance 1 over the tokens of all ranks; 0 where mask is 0. (B, T) x2 -> (B, T)."""
    mean, variance = mean_and_variance(advantages, mask)
    return (advantages - mean) * torch.rsqrt(variance.clamp(min=1e-8)) * mask


def explained_variance(values, returns, mask) -> float:
    """1 - Var(returns - values) / Var(returns); 0 if all returns are equal. (B, T) x3."""
    _, left = mean_and_variance(returns - values, mask)
    _, whole = mean_and_variance(returns, mask)
    return 1 - (left / whole).item() if whole > 0 else 0.0


def ppo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=None,
             denominator=None):
    """The clipped surrogate (PPO, eq. 7), negated. (B, T) x4 -> (scalar, metrics).

        -mean over tokens of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  r = p / p_old

    Log-probs in nats. denominator: what the sum over tokens is divided by, a number or (B, 1);
    default: the tokens in mask. Count it over the whole update when that is split into
    micro-batches. dual_clip c > 1 bounds the loss of a bad token by c |A|.
    clip_fraction: the share of tokens that get no gradient because of a clip.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    A = advantages                                                      # (B, T)
    ratio = (logp - old_logp).clamp(-20, 20).exp()                      # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)                  # (B, T)
    surrogate = torch.minimum(ratio * A, clipped * A)                   # (B, T), eq. 7
    cut = ((A > 0) & (ratio > 1 + clip_high)) | ((A < 0) & (ratio < 1 - clip_low))
    if dual_clip is not None:
        surrogate = torch.where(A < 0, torch.maximum(surrogate, dual_clip * A), surrogate)
        cut = cut | ((A < 0) & (ratio > dual_clip))
    loss = -(surrogate * mask / denominator).sum()
    return loss, {"clip_fraction": (cut * mask / denominator).sum().item()}


def value_loss(values, old_values, returns, mask, clip=0.2, denominator=None):
    """Half the mean of the larger square: of the value, or of it held within `clip` of the old one.

    (B, T) x4 -> scalar; denominator as in ppo_loss.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    held = old_values + (values - old_values).clamp(-clip, clip)        # (B, T)
    larger = torch.maximum((values - returns).square(), (held - returns).square())
    return 0.5 * (larger * mask / denominator).sum()


class Critic(nn.Module):
    """V(s) = w . state + b + offset in float32; the state is its own trunk's, or the policy's."""

    def __init__(self, width: int, trunk=None):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, 1, dtype=torch.float32)
        self.register_buffer("offset", torch.zeros(()))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids, predicts, states):
        """ids, predicts (B, S) as from join(); states (N, D) of the policy -> values (N,)."""
        if self.trunk is not None:
            states = self.trunk(input_ids=ids, use_cache=False).last_hidden_state[predicts]
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round the values
            return self.head(states.float())[:, 0] + self.offset


def build_critic(args, model) -> Critic:
    """--critic copy: the trunk is --model's, loaded once more; shared: there is none."""
    lm = causal_lm(model)
    trunk = causal_lm(load_model(args, split=False)).model if args.critic == "copy" else None
    critic = Critic(lm.config.hidden_size, trunk).train()
    if size() > 1:
        blocks = trunk.layers if args.critic == "copy" else ()
        shard(critic, blocks, lm.device, lm.compute_dtype, [critic.head])
    return critic.to(lm.device)


def logp_and_values(model, critic, rollout, temperature=1.0):
    """Log-probs of a rollout's tokens, nats, and V of the state before each. -> (B, T) each."""
    inside = rollout.mask.bool()                                        # (B, T), N True
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)     # (B, S) each
    with autocast(model):
        states = states_before_answers(model, rollout)                  # (N, D)
        weight = causal_lm(model).lm_head.weight                        # (V, D)
        logp, _ = token_logprobs(states, weight, rollout.tokens[inside], temperature)  # (N,)
        values = critic(ids, predicts, states)                          # (N,)
    zeros = torch.zeros_like(rollout.mask)                              # (B, T)
    return zeros.masked_scatter(inside, logp), zeros.masked_scatter(inside, values)


@dataclass
class Args(Shared):
    reward: str = flag(None, "my_rewards.py:mine, a reward(text, row) of your own")
    steps: int = flag(32, "rollouts; the paper: 56 or 112", low=1)
    prompts_per_step: int = flag(8, "problems per rollout; the paper: 512", low=1)
    group_size: int = flag(16, "answers to each, 1 will do; the paper: 4 to 16", low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens; the paper: 14336", low=1)
    temperature: float = flag(1.0, "divides the logits in sampling and training", above=0)
    lr: float = flag(1e-4, "AdamW, constant; ten times that with --lora-rank; the paper: 5e-7",
                     above=0)
    updates_per_rollout: int = flag(4, "each on its share of the prompts; the paper: 4-16", low=1)
    clip_low: float = flag(0.2, "bad tokens below ratio 1 - this get no gradient", low=0, high=1)
    clip_high: float = flag(0.2, "good ones above 1 + this get none", low=0)
    dual_clip: float = flag(None, "bad ones above this get none; BuPO: 10", above=1, kind=float)
    kl_coef: float = flag(0.01, "reward a nat of KL to the initial model costs", low=0)
    critic: str = flag("copy", "reads a model of its own, or the policy's states, which it trains",
                       choices=("copy", "shared"))
    critic_lr: float = flag(1e-3, "of all that only the critic has; the paper: 9e-6", above=0)
    value_coef: float = flag(0.01, "weight of a shared critic's loss: 1 ruins the policy", low=0)
    value_clip: float = flag(2.0, "how far a value moves per rollout; the paper: 0.2", above=0)
    length_reward: str = flag("cosine", "§4.2; A, B, C: §4.3; none: the reward as it is",
                              choices=("none", *RANGES))
    margin: int = flag(2, "too long: this near to --max-new-tokens; the authors: 16", low=0)
    penalty: float = flag(-0.05, "on every token of a repeated N-gram; 0: none", high=0)
    ngram: int = flag(12, "N; the paper: 40", low=1)
    gamma: float = flag(1.0, "discount per token of the reward for the answer", low=0, high=1)
    penalty_gamma: float = flag(0.99, "of the penalty; the paper: 0.99", low=0, high=1)
    lam: float = flag(1.0, "lambda of GAE; below 1 only with one discount", low=0, high=1)


REAL = {"steps": 112, "prompts_per_step": 128, "group_size": 8, "max_new_tokens": 2048, "lr": 5e-7,
        "critic_lr": 9e-6, "value_clip": 0.2, "margin": 16, "ngram": 40}


@exit_on_bad_input
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    if args.length_reward != "none" and 1 + args.margin >= args.max_new_tokens:
        raise BadInput(f"--margin {args.margin}: every answer of at most {args.max_new_tokens} "
                       "tokens would be too long")
    gammas = [args.gamma, args.penalty_gamma if args.penalty else args.gamma]
    if args.lam < 1 and gammas[0] != gammas[1]:
        raise BadInput(f"--lam {args.lam}: needs one discount, --penalty-gamma {args.gamma}")
    reward_of = load_reward(args.reward) if args.reward else reward
    run = Run("ppo", args, reward_of)
    model = run.model
    reference = reference_model(args, model) if args.kl_coef else None
    critic = build_critic(args, model)
    value_coef = args.value_coef if args.critic == "shared" else 1.0
    gammas = torch.tensor(gammas, device=model.device)                                 # (M,)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.critic_lr, weight_decay=0.01)

    first = run.begin(optimizer=optimizer, critic=critic, critic_optimizer=critic_optimizer)
    for step in range(first, args.steps):
        # 1. Sample a group of answers to each problem.
        problems = share(batch_of(run.train, step, args.prompts_per_step, args.seed))  # P rows
        rollout = sample(model, run.tokenizer, run.encode(problems), args.group_size,
                         args.max_new_tokens, args.temperature, seed=args.seed * 100_000 + step)
        mask, lengths = rollout.mask, rollout.lengths                                  # (B, T), (B,)
        all_rows = torch.arange(len(lengths), device=model.device)                     # (B,)
        run.lap("sampling")

        # 2. Rate them. An answer that was cut off is wrong, here and in evaluation.
        correct = [reward_of(text, problems[i // args.group_size])
                   for i, text in enumerate(rollout.texts)]                            # B floats
        correct = torch.tensor(correct, device=model.device) * rollout.finished        # (B,)

        # 3. Give tokens their rewards: the last one the answer's, repeated ones the penalty.
        shaped = correct.tolist()                                                      # B floats
        if args.length_reward != "none":
            shaped = [cosine_reward(x, k, args.max_new_tokens, *RANGES[args.length_reward],
                                    margin=args.margin)
                      for x, k in zip(shaped, lengths.tolist(), strict=True)]
        outcome = torch.zeros_like(mask)                                               # (B, T)
        outcome[all_rows, lengths - 1] = torch.tensor(shaped, device=model.device)
        repeated = torch.zeros_like(mask)                                              # (B, T)
        for i, k in enumerate(lengths.tolist()):
            found = repetition_penalty(rollout.tokens[i, :k].tolist(), args.ngram, 1.0)
            repeated[i, :k] = torch.tensor(found)
        rewards = torch.stack([outcome, args.penalty * repeated]).clamp(-10, 10)       # (M, B, T)
        exceeded = lengths + args.margin >= args.max_new_tokens                        # (B,)
        metrics = {
            "score": total(rewards.sum().item()) / total(len(mask)),
            "exceeded": total(exceeded.sum().item()) / total(len(mask)),
            "repeated": mean_and_variance(repeated, mask)[0].item(),
        }
        if step == 0:  # else the trunk's first updates all go into this one number
            mean, _ = mean_and_variance(discounted_returns(rewards, gammas, mask), mask)
            critic.offset.copy_(mean)
        run.lap("verifying")

        # 4. What policy and critic say before the update; the KL (k1) is a reward of each token.
        old_logp = torch.zeros_like(mask)                                              # (B, T)
        old_values = torch.zeros_like(mask)                                            # (B, T)
        with torch.no_grad():
            for part in micro_batches(rollout, all_rows, args.micro_batch_tokens):
                old_logp[part], old_values[part] = logp_and_values(
                    model, critic, rollout[part], args.temperature)
        if reference is not None:
            with reference() as initial:
                ref_logp = old_logprobs(initial, rollout, all_rows, args.micro_batch_tokens,
                                        args.temperature)                              # (B, T)
            log_ratio = old_logp - ref_logp                                            # (B, T)
            rewards = rewards - args.kl_coef * log_ratio / len(rewards)                # (M, B, T)
            metrics["kl"] = total(log_ratio.sum().item()) / total(len(mask))

        # 5. Returns and advantages, §4.6.
        if args.lam < 1:
            advantages, returns = gae(rewards.sum(0), old_values, mask, args.gamma, args.lam)
        else:
            returns = discounted_returns(rewards, gammas, mask)                        # (B, T)
            advantages = (returns - old_values) * mask                                 # (B, T)
        metrics["explained_variance"] = explained_variance(old_values, returns, mask)
        advantages = whiten(advantages, mask)                                          # (B, T)

        # 6. Update: the gradients of all micro-batches add up to one step of the optimisers. Means
        #    are per answer first, then over the answers of the update.
        parts, grad_norms, critic_norms = [], [], []
        for rows in all_rows.chunk(args.updates_per_rollout):
            num_answers = total(len(rows))
            for part in micro_batches(rollout, rows, args.micro_batch_tokens):
                batch, old, before = rollout[part], old_logp[part], old_values[part]
                logp, values = logp_and_values(model, critic, batch, args.temperature)  # (b, T)
                divisor = num_answers * batch.lengths[:, None]                         # (b, 1)
                loss, clipped = ppo_loss(logp, old, advantages[part], batch.mask, args.clip_low,
                                         args.clip_high, args.dual_clip, divisor)
                error = value_loss(values, before, returns[part], batch.mask, args.value_clip,
                                   divisor)
                (loss + value_coef * error).backward()
                moved = (values - before).abs() > args.value_clip                      # (b, T)
                parts.append({"loss": loss.item(), "value_loss": error.item(), **clipped,
                              "value_clip_fraction": (moved * batch.mask / divisor).sum().item(),
                              "gap_max": largest_gap(old, batch)})
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            critic_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0).item()
            if math.isfinite(grad_norm + critic_norm):
                optimizer.step()
                critic_optimizer.step()
            optimizer.zero_grad()
            critic_optimizer.zero_grad()
            grad_norms.append(grad_norm)
            critic_norms.append(critic_norm)
        run.lap("training")

        # 7. Book-keeping.
        metrics["critic_grad_norm"] = statistics.fmean(critic_norms)
        run.log(step, rollout, correct[None], parts, grad_norms, **metrics)
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    main()
