"""BuPO: first train what an early block would say, then the whole model.

Paper: Bottom-up Policy Optimization (arXiv 2512.19673; equation numbers of v3).
Run:   python bupo.py                                  the embedded model learns arithmetic, a minute on a laptop
       python bupo.py --model Qwen/Qwen3-4B --data zwhe99/DeepMath-103K --layer 6 --internal-steps 30
See:   a table of what each block does to the entropy, the layer chosen, then reward rising as in grpo.py. Watch entropy and
       length in the first phase: too long a one ruins the model (paper: 30 of 300 steps 58.5, 50 steps 42.1, 70 steps 9.9).

Block l of a transformer has a policy of its own, softmax(H^l E^T): the residual stream after the block, read by the unembedding
E without the final norm (eq. 5). For the first --internal-steps rollouts GRPO's loss is taken of that policy (eq. 9, "IPA"; v1
called it InterGRPO), then of the model itself (eq. 10). Answers always come from the whole model. In the first phase the blocks
above l are not run in training and get no gradient, not even a zero one. This file is grpo.py with a layer: diff grpo.py bupo.py.

Deviations ledger: paper | the authors' code (a fork of verl) | here, and why
  which layer      | end of the exploration region: the last block whose FFN raises entropy; Qwen3-4B 6, OctoThinker-3B 27 |
      given by hand, counted from 0 | --layer auto measures it: end of the first run of rises, below 5 % of the largest counts as
      zero (the paper names no threshold), at most L - 1, as block L's policy is the model's; counted from 1 as in the paper
  first phase      | Algorithm 1: one step more than s_inter; text: s_inter | exactly s_inter | exactly --internal-steps
  final norm       | left out on purpose; with it 56.8, not 58.5 | left out, but applied for block L | as the code; --final-norm
  old log-probs    | of the layer | of the layer, from the trainer | as the code
  blocks above l   | no gradient | run for logging, no gradient | not run: the same loss, less time; so the sampler-trainer gap is
      measured in the second phase only
  optimiser        | goes on at the switch | goes on | goes on; blocks above l have no Adam state before
  which std        | not said | ddof 1, 1e-6 added | as the code
  mean over tokens | per answer, then over answers | over the tokens of a micro-batch, micro-batches averaged | over all tokens of
      an update, so that micro-batching changes nothing; --aggregation sequence is the paper's
  clip             | 0.2 both sides | and dual clip at 10, log-ratio held within 20 | as grpo.py: --dual-clip only if asked for
  updates a rollout| 16 | 4, each with its share of the prompts | --updates-per-rollout, 1: then ratio = 1 and nothing clips
  longest answer   | 7168 (table) or 8192 (text) | 8192 | --max-new-tokens, 2048 for larger models
  KL to reference  | none | none | --kl-coef, off; in the first phase that of block l's policy to the initial model's block l
  also trained     | blocks 1..l and E | and the token embedding, the same tensor in tied models | as the code
  rows of grpo.py that hold here too: group without signal, truncated answers, verifier
"""
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.data import batch_of
from common.distributed import everyone, share, size, total
from common.errors import BadInput
from common.flags import Shared, exit_on_bad_input, flag, parse_flags
from common.internal_policy import boundaries, entropy_changes, rollout_entropies
from common.logprobs import micro_batches, response_logprobs, score
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
    layer: str = flag("auto", "block whose policy the first phase trains, 1 = lowest; auto: end of the exploration region")
    internal_steps: int = flag(3, "rollouts of the first phase, a tenth of the run as in the paper; many more ruin the model",
                               real=30, low=0)
    final_norm: bool = flag(False, "apply the model's last norm to the layer: the paper's ablation, worse there")
    truncated: str = flag("zero", "answers cut at --max-new-tokens: reward 0, or left out of the loss", choices=("zero", "mask"))


def choose_layer(run) -> int:
    """--layer: the number given, or `auto`: the end of the exploration region, measured on 64 answers of the model itself.

    At most L - 1, since block L's policy is the model's own. Prints the table it was chosen from. BadInput outside 1..L, or when
    no FFN raises the entropy.
    """
    cfg, L = run.cfg, causal_lm(run.model).config.num_hidden_layers
    if cfg.layer != "auto":
        if not (cfg.layer.isdecimal() and 1 <= int(cfg.layer) <= L):
            raise BadInput(f"--layer {cfg.layer}: give auto or a block of the model, 1 (lowest) to {L}")
        return int(cfg.layer)
    rollout = sample(run.model, run.tokenizer, [row["prompt"] for row in run.train[:16]], 4, min(cfg.max_new_tokens, 512),
                     cfg.temperature, seed=cfg.seed, alone=True)
    entropies = rollout_entropies(run.model, rollout, cfg.micro_batch_tokens)
    change, found = entropy_changes(entropies)["ffn"], boundaries(entropies)                    # (L,), eq. 13; {tolerance: block}
    if found[0.05] is None:
        raise BadInput("--layer auto: no block's FFN raises the entropy, so there is no exploration region: take --layer N")
    layer = min(found[0.05], L - 1)
    print("block   entropy of its policy   change by its FFN   (nats; while FFNs raise it the model explores)")
    for l in range(1, L + 1):
        print(f"{l:5} {entropies['layer_out'][l - 1]:23.3f} {change[l - 1]:+19.3f}{'   <- boundary' if l == layer else ''}")
    if found[0.05] == L:
        print(f"every block up to the last raises it; block {L}'s policy is the model's own, so block {L - 1} is taken")
    taken = {tolerance: l and min(l, L - 1) for tolerance, l in found.items()}
    if len(set(taken.values())) > 1:
        print("fragile choice, it moves with the tolerance: " + ", ".join(f"{t} gives {l or 'none'}" for t, l in taken.items()))
    return layer


@exit_on_bad_input
def main(argv=None):
    cfg = parse_flags(Config, Shared, description=__doc__, argv=argv)
    if cfg.prompts_per_step % (cfg.updates_per_rollout * size()):
        raise BadInput(f"--updates-per-rollout {cfg.updates_per_rollout}{f' x {size()} processes' * (size() > 1)} must divide "
                       f"--prompts-per-step {cfg.prompts_per_step}")
    run = start(cfg, "bupo")
    model, optimizer = run.model, run.optimizer
    reference = initial_model(cfg, model) if cfg.kl_coef else None

    if cfg.internal_steps and "layer" not in run.summary:  # a resumed run keeps its layer
        run.summary["layer"] = everyone(choose_layer(run))[0]
    if cfg.internal_steps:
        print(f"phase 1: steps 1 to {min(cfg.internal_steps, cfg.steps)} train the policy of block {run.summary['layer']}; "
              "phase 2: the whole model")

    for step in run.steps():
        layer = run.summary["layer"] if step < cfg.internal_steps else None                     # eq. 10
        if step == cfg.internal_steps and step > 0:
            tqdm.write(f"step {step + 1}: phase 2, the objective is now the whole model's")
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
                model, rollout, useful, cfg.micro_batch_tokens, cfg.temperature, layer, cfg.final_norm)
            for update, rows in enumerate(updates * cfg.ppo_epochs):
                for m in micro_batches(rows, rollout, cfg.micro_batch_tokens, useful):          # (b,) row numbers
                    part = rollout[m]
                    logp, _ = response_logprobs(model, part, cfg.temperature, layer, cfg.final_norm)  # (b, T), eq. 5
                    old = logp.detach() if old_logp is None else old_logp[m]                    # (b, T)
                    loss, metrics = grpo_loss(logp, old, advantages[m], mask[m], cfg.clip_low, cfg.clip_high, cfg.dual_clip,
                                              denominator[m])
                    if reference is not None:
                        with torch.no_grad(), reference() as initial:
                            ref_logp, _ = response_logprobs(initial, part, cfg.temperature, layer, cfg.final_norm)  # (b, T)
                        loss = loss + cfg.kl_coef * kl_loss(logp, ref_logp, old, mask[m], denominator[m])
                    optimizer.backward(loss)
                    parts.append({"loss": loss.item(), **metrics})
                    if update == 0 and layer is None:
                        gaps.append((logp.detach() - part.logp)[mask[m] > 0])
                parts.append({"grad_norm": optimizer.step(max_norm=1.0)})
        run.log(rollout, rewards, parts, gaps, layer=layer)
    run.finish()


if __name__ == "__main__":
    main()
