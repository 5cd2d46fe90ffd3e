"""BuPO: first train what an early block would say, then the whole model.

Paper: Bottom-up Policy Optimization (arXiv 2512.19673; equation numbers of v3).
Run:   python bupo.py                            the embedded model learns arithmetic, a minute
       python bupo.py --model Qwen/Qwen3-4B --data openai/gsm8k:main --layer 6
See:   what each block does to the entropy, the layer chosen, then reward rising as in grpo.py.
       Too long a first phase ruins a model (paper: 30 of 300 steps 58.5, 70 steps 9.9).

Block l has a policy of its own, softmax(H^l E^T): the residual stream after the block, read by the
unembedding E without the final norm (eq. 5). For the first --internal-steps rollouts GRPO's loss
is taken of that policy (eq. 9), then of the model (eq. 10). Answers always come from the whole
model. This file is grpo.py with a layer: diff grpo.py bupo.py.

Deviations from the paper, and why:
1. The paper names its layers by hand (Qwen3-4B: 6 of 36). --layer auto measures: it takes the end
   of the first run of blocks whose FFN raises entropy. That is at most L - 1, since block L's
   policy is the model's. Where no block does, it takes the paper's choice for the family.
2. In the first phase the blocks above l are not run, which gives the same gradient in less time;
   the authors run them for their logs.
3. The loss is a mean over all tokens of an update (paper: per answer first; its code: per
   micro-batch), so that micro-batches change nothing.
4. One update per rollout (paper's table: 16, its code: 4); --updates-per-rollout.
5. An answer that was cut off at --max-new-tokens is wrong, whatever it says: its reward is 0, and
   its tokens stay in the loss.
6. No dual clip (its code: at 10), which with few updates never acts; no KL, as in the paper.

Axes: B answers (b in a micro-batch), P problems, G answers per problem, T answer tokens, L blocks.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from common.data import batch_of
from common.distributed import everyone, share, total
from common.flags import BadInput, Shared, exit_on_bad_input, flag, load_reward, parse_args
from common.internal_policy import (
    boundary_layer,
    entropy_changes,
    first_blocks,
    internal_entropies,
)
from common.logprobs import largest_gap, micro_batches, old_logprobs, response_logprobs
from common.run import Run
from common.sampling import join, sample
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


def grpo_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2, denominator=None):
    """The clipped surrogate (eq. 9), negated. (B, T), (B, T), (B,), (B, T) -> (scalar, metrics).

        -mean over tokens of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),  r = p / p_old

    Log-probs in nats, of the layer or of the model. denominator: what the sum over tokens is
    divided by; default: the tokens in mask. Count it over the whole update when that is split into
    micro-batches. clip_fraction: the share of tokens that get no gradient because of the clip.
    """
    if denominator is None:
        denominator = mask.sum().clamp(min=1)
    A = advantages[:, None]                                             # (B, 1)
    ratio = (logp - old_logp).clamp(-20, 20).exp()                      # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)                  # (B, T)
    surrogate = torch.minimum(ratio * A, clipped * A)                   # (B, T), eq. 9
    cut = surrogate != ratio * A                                        # (B, T), no gradient
    loss = -(surrogate * mask / denominator).sum()
    return loss, {"clip_fraction": (cut * mask / denominator).sum().item()}


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
    layer: str = flag("auto", "block whose policy is trained first, 1 is the lowest; auto: the end "
                      "of the exploration region, without one the paper's choice for the family")
    internal_steps: int = flag(3, "rollouts of the first phase; BuPO: 30 of 300", low=0)
    final_norm: bool = flag(False, "read the layer through the last norm: worse in the paper")
    clip_low: float = flag(0.2, "A < 0 has no gradient below ratio 1 - this", low=0, high=1)
    clip_high: float = flag(0.2, "A > 0 has none above ratio 1 + this; DAPO: 0.28", low=0)


REAL = {"steps": 300, "prompts_per_step": 128, "group_size": 8, "max_new_tokens": 2048, "lr": 1e-6,
        "internal_steps": 30}


def paper_layer(config):
    """The paper's own choice by family: 6 of 36 blocks of Qwen3, 27 of 28 of a Llama; 1-based."""
    L = config.num_hidden_layers
    layer = round(L / 6) if config.model_type.startswith("qwen") else L - 1
    return max(1, layer)


def choose_layer(run):
    """--layer: the number given, or the end of the exploration region, with the table it is read
    from, measured on 64 answers of the model; where no FFN explores, the paper's choice for the
    family. BadInput outside 1..L."""
    args = run.args
    L = run.model.config.num_hidden_layers
    if args.layer != "auto":
        if not (args.layer.isdecimal() and 1 <= int(args.layer) <= L):
            raise BadInput(f"--layer {args.layer}: auto, or a block, 1 (the lowest) to {L}")
        return int(args.layer)
    rollout = sample(run.model, run.tokenizer, run.encode(run.train[:16]), 4,
                     min(args.max_new_tokens, 512), args.temperature, seed=args.seed, alone=True)
    ids, predicts = join(rollout)
    places = predicts.nonzero()                                         # (N, 2)
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(args.seed))
    row, column = places[order[1500:].to(places.device)].T
    predicts[row, column] = False                                       # 1500 tokens are enough
    entropies = internal_entropies(run.model, ids, None, predicts)
    change = entropy_changes(entropies)["ffn"]                          # (L,), eq. 13
    try:
        layer = min(boundary_layer(change), L - 1)
        why = "exploration ends"
    except ValueError:  # no FFN raises the entropy
        layer = paper_layer(run.model.config)
        why = "no FFN explores: the paper's choice for the family"
    print("block   entropy of its policy   change by its FFN   (nats)")
    for block in range(1, L + 1):
        mark = f"   <- {why}" if block == layer else ""
        policy = entropies["layer_out"][block - 1]
        print(f"{block:5} {policy:23.3f} {change[block - 1]:+19.3f}{mark}")
    return layer


@exit_on_bad_input()
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    reward_of = load_reward(args.reward) if args.reward else reward
    run = Run("bupo", args, reward_of)
    model = run.model
    # foreach=False: one weight after another, without temporary copies of all of them.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, foreach=False)
    if args.internal_steps and "layer" not in run.summary:  # a resumed run keeps its layer
        run.summary["layer"] = everyone(choose_layer(run))[0]

    for step in range(run.begin(optimizer), args.steps):
        # 0. The policy that is trained: block l's at first, then the model's (eq. 10).
        layer = model.config.num_hidden_layers
        trunk = None
        if step < args.internal_steps:
            layer = run.summary["layer"]
            trunk = first_blocks(model, layer, args.final_norm)         # H^l, read by E: eq. 5
        elif step == args.internal_steps:
            tqdm.write(f"step {step + 1}: from here on the whole model is trained")

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
                                    args.micro_batch_tokens, args.temperature, trunk)  # (B, T)

        # 5. Update: the gradients of all micro-batches add up to one step of the optimiser.
        parts = []
        grad_norms = []
        for update in rows.chunk(args.updates_per_rollout):                            # row numbers
            num_tokens = total(rollout.lengths[update])
            for part in micro_batches(rollout, update[useful[update]], args.micro_batch_tokens):
                batch = rollout[part]                                                  # b answers
                logp = response_logprobs(model, batch, args.temperature, trunk)        # (b, T)
                old = logp.detach() if old_logp is None else old_logp[part]            # (b, T)
                loss, metrics = grpo_loss(
                    logp, old, advantages[part], mask[part],
                    args.clip_low, args.clip_high, num_tokens)
                loss.backward()
                metrics["loss"] = loss.item()
                metrics["gap_max"] = largest_gap(old, batch) if trunk is None else 0.0
                parts.append(metrics)
            grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
            if math.isfinite(grad_norm):
                optimizer.step()
            optimizer.zero_grad()
            grad_norms.append(grad_norm)

        # 6. Book-keeping.
        run.log(step, problems, rollout, rewards, parts, grad_norms, layer=layer)
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    main()
