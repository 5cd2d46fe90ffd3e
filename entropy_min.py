"""Entropy minimization: ten updates that make a model surer of its own answers to one problem.

Paper: One-shot Entropy Minimization (arXiv 2505.20282), of which we had the abstract, summaries
       and the released code: there are no equation numbers.
Run:   python entropy_min.py                            a quarter of a minute on a laptop
       python entropy_min.py --model Qwen/Qwen2.5-Math-7B --data problems.jsonl --select 100
See:   entropy falls at once; accuracy at temperature 1 rises for ten to fifteen updates, except
       in one seed of eight, which is ruined: nothing in the loss knows right from wrong. Then:
       python grpo.py --model runs/entropy_min, python -m analysis.logits --model runs/entropy_min

Each step samples answers and lowers the mean entropy L of their tokens, T the loss temperature:

    H_t = -sum over v of p(v | y_<t) log p(v | y_<t),   p = softmax(logits / T),   L = mean of H_t

Deviations from the paper, and why:
1. T is 0.5, as in the released code; the paper's formula has none: --loss-temperature 1.
2. All tokens of an answer count, as in the paper, also of one that was cut off. The code reads the
   logits one position late, so without the first token: --authors-mask.
3. L is a mean over all tokens of an update and --steps counts updates; the code averages means of
   two answers, and its 10 steps are 0 to 10 updates, depending on the number of GPUs.
4. Sampling has --temperature and --top-p; the code adds top-k 50 and a repetition penalty, 1.15.
5. The problem is drawn from --data; the paper takes the one of most varying correctness: --select.
6. Accuracy is at temperature 1; the code's is greedy: common.evaluate --temperature 0.

Axes: B answers (b in a micro-batch), P problems, K each, T tokens, N of all, D width, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_

from common.data import batch_of, drop_long_prompts
from common.distributed import size, total
from common.evaluate import evaluate
from common.flags import BadInput, Shared, exit_on_bad_input, flag, parse_args
from common.logprobs import micro_batches, states_before_answers, token_logprobs
from common.models import autocast
from common.run import Run
from common.sampling import sample
from common.verify import verify


def reward(text: str, row: dict) -> float:
    """What an answer is worth, in evaluation and --select only: training does not see it."""
    return verify(text, row["answer"])


def entropy_loss(logits, mask, temperature=0.5):
    """Mean entropy (nats) of softmax(logits / temperature) over the tokens in mask, 0 without any.

    (B, T, V), (B, T) -> scalar; logits[:, t] predicts token t. The method, for reading and reuse:
    main() computes the same from hidden states and never builds a (B, T, V).
    """
    logp = (logits.float() / temperature).log_softmax(-1)               # (B, T, V)
    entropy = -(logp.exp() * logp).sum(-1)                              # (B, T), H_t
    return (entropy * mask).sum() / mask.sum().clamp(min=1)             # L


def accuracy_variance(correct):
    """Population variance m (1 - m) of 0/1 correctness, m its mean. (P, K) -> (P,)."""
    mean = correct.float().mean(1)                                      # (P,)
    return mean * (1 - mean)


@dataclass
class Args(Shared):
    steps: int = flag(10, "updates; the paper: 10", low=1)
    shots: int = flag(1, "problems to train on; the paper finds more to be worse", low=1)
    group_size: int = flag(64, "answers per update, over all problems; the paper: 64", low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens; the paper: 2048, code: 512", low=1)
    temperature: float = flag(0.5, "divides the logits in sampling; the code: 0.5", low=0.01)
    top_p: float = flag(1.0, "probability kept in sampling; the code: 0.95", low=0.01, high=1)
    loss_temperature: float = flag(0.5, "T in the loss; the code: 0.5, the paper: 1", low=0.01)
    authors_mask: bool = flag(False, "leave out each answer's first token, as the code does")
    lr: float = flag(3e-4, "AdamW, constant; 10 x with --lora-rank; the paper: 2e-5", low=0)
    select: int = flag(0, "choose by variance of correctness among so many; 0: at random", low=0)
    select_k: int = flag(8, "answers to each of those; their labels choose, never train", low=2)
    problem: str = flag(None, "train on this text instead")


REAL = {"max_new_tokens": 512, "lr": 2e-5}


def choose_problems(run):
    """What to train on: the given text, the most uncertain of --select, or the first problems.
    BadInput if there are too few."""
    args = run.args
    if args.shots > len(run.train):
        raise BadInput(f"--shots {args.shots}: --data has {len(run.train)} problems to train on")
    count = min(max(args.select, args.shots), len(run.train))  # each problem once
    rows = batch_of(run.train, 0, count, args.seed)
    if args.problem:
        longest = run.model.config.max_position_embeddings - args.max_new_tokens
        rows = [{"problem": args.problem}]
        rows = drop_long_prompts(run.tokenizer, rows, args.system, longest)
    if len(rows) > args.shots:
        result = evaluate(
            run.model, run.tokenizer, rows, reward,
            k=args.select_k,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
            system=args.system)
        rewards = torch.tensor([row["rewards"] for row in result["answers"]])           # (P, K)
        variance = accuracy_variance(rewards)                                           # (P,)
        order = variance.argsort(descending=True, stable=True)                          # (P,)
        rows = [rows[i] for i in order.tolist()]
    return [row["problem"] for row in rows[:args.shots]]


@exit_on_bad_input()
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    if args.group_size % (args.shots * size()):
        raise BadInput(f"--group-size {args.group_size}: must be divisible by --shots x processes")
    if args.problem and args.shots > 1:
        raise BadInput(f"--shots {args.shots}: must be 1 with --problem")
    run = Run("entropy_min", args, reward)
    model = run.model
    # foreach=False: one weight after another, without temporary copies of all of them.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, foreach=False)
    if "problems" not in run.summary:  # a resumed run keeps its problems
        run.summary["problems"] = choose_problems(run)
    print("training on:", *run.summary["problems"], sep="\n  ")
    problems = [{"problem": problem} for problem in run.summary["problems"]]
    prompts = run.encode(problems)
    n = args.group_size // (len(prompts) * size())  # answers to a problem, of each process

    for step in range(run.begin(optimizer), args.steps):
        # 1. Sample answers to the same problems in every step, without gradient.
        rollout = sample(
            model, run.tokenizer, prompts, n,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed * 100_000 + step)                                           # B answers

        # 2. All their tokens count, stop tokens and those of cut-off answers included.
        mask = rollout.mask                                                            # (B, T)
        if args.authors_mask:
            mask[:, 0] = 0
        num_tokens = max(1, total(mask))

        # 3. Update: the gradients of all micro-batches add up to one step of the optimiser.
        parts = []
        rows = torch.arange(len(mask), device=model.device)                            # (B,)
        for part in micro_batches(rollout, rows, args.micro_batch_tokens):
            batch = rollout[part]                                                      # b answers
            inside = batch.mask.bool()                                                 # (b, T)
            with autocast(model):
                hidden = states_before_answers(model, batch)                           # (N, D)
                weight = model.lm_head.weight                                          # (V, D)
                tokens = batch.tokens[inside]                                          # (N,)
                _, entropy = token_logprobs(
                    hidden, weight, tokens, args.loss_temperature)                     # (N,), H_t
            counts = mask[part][inside]                                                # (N,)
            loss = (entropy * counts).sum() / num_tokens                               # L
            loss.backward()
            parts.append({"loss": loss.item()})
        grad_norm = clip_grad_norm_(model.parameters(), 1.0).item()
        if math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad()

        # 4. Book-keeping.
        run.log(step, problems, rollout, None, parts, [grad_norm])
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    main()
