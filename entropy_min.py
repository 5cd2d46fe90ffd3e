"""One-shot entropy minimization: ten updates that make a model surer of its own answers to one problem. No label, no reward.

Paper: One-shot Entropy Minimization (arXiv 2505.20282). Each step samples 64 answers to the same problem from the model as it is
and lowers the mean entropy of the next-token distribution over the answers' tokens I:
  H_t = -sum_v p_T(v | y_<t, x) log p_T(v | y_<t, x),   L = mean of H_t over t in I,   p_T = softmax(logits / T)
There is no gradient through the sampling, and the gradient of H_t by logit v is -p_v (log p_v + H_t) / T.
Run:   python entropy_min.py                           half a minute on a laptop
       python entropy_min.py --model Qwen/Qwen2.5-Math-7B --data problems.jsonl --select 100
       python grpo.py --model runs/entropy_min         reinforcement learning after it
See:   entropy falls at once; accuracy on held-out problems rises, for about ten updates. Keep going, or double the learning
       rate, and the model is sure of wrong answers: try --lr 6e-4. Nothing in the loss knows right from wrong.

This file is grpo.py without rewards: diff grpo.py entropy_min.py.

Deviations ledger: paper | the authors' code | here, and why
  T in the loss    | none in the formula | 0.5 | --loss-temperature, 0.5; 1 is the formula
  which tokens I   | all generated ones | logits are not shifted: the first is left out, the one after the last comes in (not
      after an end token that is also the padding) | all generated, the stop token included; --authors-mask for the code's
  several prompts  | not said | padding is counted as prompt, so that prompt tokens enter | masks from lengths
  sampling         | not said | T 0.5, top-p 0.95, top-k 50, repetition penalty 1.15, which the authors call needed | T 0.5 and
      the rest off; --temperature, --top-p, --repetition-penalty
  "10 steps"       | 10 updates | 10 *micro-batches*: 0 to 10 updates, by the number of GPUs | --steps counts updates
  mean             | over tokens | over the tokens of two answers at a time, then over those | over all tokens of an update
  entropy in       | not said | bfloat16 or float32, by library version | float32, a chunk of the vocabulary projection at a time
  the problem      | the largest variance of correctness in a pool | one text; its label, never used, should be 12.699, not 12.8 |
      one of --data at random; --select N by variance (reads labels to choose, never to train); --problem, --problem-file
  longest answer   | 2048 tokens | 512 | --max-new-tokens
"""
import pathlib
from dataclasses import dataclass

import torch

from common.data import batch_of, encode_prompts
from common.errors import BadInput
from common.evaluate import evaluate
from common.flags import Shared, exit_on_bad_input, flag, parse_flags
from common.internal_policy import hidden_states
from common.logprobs import micro_batches, token_logprobs
from common.models import causal_lm
from common.run import start
from common.sampling import join, sample


def entropy_loss(logits: torch.Tensor, mask: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """Mean entropy (nats) of softmax(logits / temperature) where mask is 1. (B, T, V), (B, T) -> scalar.

    logits[:, t] predicts token t. The method in three lines, for reading and testing: main() computes the same from hidden
    states, without a (B, T, V).
    """
    logp = (logits.float() / temperature).log_softmax(-1)                               # (B, T, V)
    entropy = -(logp.exp() * logp).sum(-1)                                              # (B, T), H_t
    return (entropy * mask).sum() / mask.sum().clamp(min=1)


def accuracy_variance(correct: torch.Tensor) -> torch.Tensor:
    """Population variance m (1 - m) of 0/1 correctness over K answers, m their mean. (N, K) -> (N,)."""
    mean = correct.float().mean(1)
    return mean * (1 - mean)


def answer_entropies(model, rollout, temperature: float, offset: int = 0) -> torch.Tensor:
    """H_t at every answer token of a rollout, nats, 0 outside -> (B, T). offset 1 reads the logits one position too late."""
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)              # (B, S) each
    hidden = hidden_states(model, ids)[predicts.roll(offset, 1)]                        # (N, D); the last position is never True
    weight, inside = causal_lm(model).lm_head.weight, rollout.mask.bool()               # (V, D), (B, T)
    _, entropy = token_logprobs(hidden, weight, rollout.tokens[inside], temperature)    # (N,)
    return torch.zeros_like(rollout.mask).masked_scatter(inside, entropy)


def choose_problems(run) -> list[dict]:
    """The --shots problems to train on: a given text, the most uncertain of --select, or the first of the shuffled data."""
    cfg = run.cfg
    if cfg.problem or cfg.problem_file:
        text = cfg.problem or pathlib.Path(cfg.problem_file).read_text(encoding="utf-8").strip()
        context = causal_lm(run.model).config.max_position_embeddings - cfg.max_new_tokens
        return encode_prompts(run.tokenizer, [{"problem": text, "answer": ""}], cfg.system, cfg.thinking, context)
    pool = batch_of(run.train, 0, max(cfg.select, cfg.shots), cfg.seed)
    if not cfg.select:
        return pool
    result = evaluate(run.model, run.tokenizer, pool, cfg.select_k, cfg.max_new_tokens, seed=cfg.seed, label="selecting")
    variance = accuracy_variance(torch.tensor([row["correct"] for row in result["answers"]]))       # (N,)
    order = variance.argsort(descending=True, stable=True).tolist()                     # ties stay in the seed's order
    run.summary["selection"] = [{"problem": pool[i]["problem"], "variance": variance[i].item()} for i in order]
    return [pool[i] for i in order[:cfg.shots]]


@dataclass
class Config:
    steps: int = flag(10, "optimiser updates; the paper: 10, then accuracy falls", low=1)
    shots: int = flag(1, "problems to train on; the paper finds more to be worse", low=1)
    group_size: int = flag(64, "answers an update, over all problems; the paper: 64", low=2)
    max_new_tokens: int = flag(80, "longest answer in tokens; the script: 512, the paper: 2048", real=512, low=1)
    temperature: float = flag(0.5, "for sampling; the authors' script: 0.5", above=0)
    top_p: float = flag(1.0, "sample from the smallest set of tokens with this probability; the script: 0.95", above=0, high=1)
    repetition_penalty: float = flag(1.0, "weakens the tokens seen before, in sampling only; the script: 1.15", low=1)
    loss_temperature: float = flag(0.5, "T in the loss; the authors' script: 0.5, the formula: 1", above=0)
    lr: float = flag(3e-4, "AdamW, constant; the paper: 2e-5 for 7B", real=2e-5, above=0)
    select: int = flag(0, "choose the problem among so many by the variance of correctness (reads labels); 0: at random", low=0)
    select_k: int = flag(8, "answers to each of them", low=2)
    problem: str = flag(None, "train on this text instead", type=str)
    problem_file: str = flag(None, "or on the text of this file", type=str)
    early_stop: float = flag(0.0, "stop when the sampled entropy is below this share of its start; 0: never", low=0, high=1)
    authors_mask: bool = flag(False, "take the entropy one position late, as the released code does")


@exit_on_bad_input
def main(argv=None):
    cfg = parse_flags(Config, Shared, description=__doc__, argv=argv)
    if cfg.group_size % cfg.shots or (cfg.problem or cfg.problem_file) and cfg.shots > 1:
        raise BadInput(f"--shots {cfg.shots} must divide --group-size {cfg.group_size}, and be 1 with --problem")
    if cfg.problem_file and not pathlib.Path(cfg.problem_file).is_file():
        raise BadInput(f"--problem-file {cfg.problem_file}: no such file")
    if cfg.select and cfg.select < cfg.shots:
        raise BadInput(f"--select {cfg.select}: fewer than --shots {cfg.shots}")
    cfg.prompts_per_step = 1  # for the memory plan: group_size counts all answers here
    run = start(cfg, "entropy_min")
    model, optimizer = run.model, run.optimizer
    if "problems" not in run.summary:  # a resumed run keeps its problems
        run.summary["problems"] = choose_problems(run)
    problems = run.summary["problems"]
    for problem in problems:
        print(f"training on: {problem['problem']!r}")

    for step in run.steps():
        with run.clock("sampling"):
            rollout = sample(model, run.tokenizer, [p["prompt"] for p in problems], cfg.group_size // cfg.shots,
                             cfg.max_new_tokens, cfg.temperature, cfg.top_p, seed=cfg.seed * 100_000 + step,
                             repetition_penalty=cfg.repetition_penalty)
        mask = rollout.mask.clone()                                                             # (B, T)
        if cfg.authors_mask:  # what follows an end token is masked there, as the end token is the padding token
            mask[torch.arange(len(mask)), rollout.lengths - 1] -= rollout.finished.float()
        parts = []
        with run.clock("training"):
            rows = torch.arange(len(mask), device=mask.device)                                  # (B,)
            for m in micro_batches(rows, rollout, cfg.micro_batch_tokens):                      # (b,) row numbers
                entropy = answer_entropies(model, rollout[m], cfg.loss_temperature, int(cfg.authors_mask))  # (b, T)
                loss = (entropy * mask[m]).sum() / mask.sum().clamp(min=1)
                loss.backward()
                parts.append({"loss": loss.item()})
            parts.append({"grad_norm": optimizer.step(max_norm=1.0)})
        run.log(rollout, parts=parts)
        if run.rows[-1]["entropy"] < cfg.early_stop * run.rows[0]["entropy"]:
            print(f"\nstopped after step {step + 1}: the entropy is below {cfg.early_stop} of its start")
            break
    run.finish()


if __name__ == "__main__":
    main()
