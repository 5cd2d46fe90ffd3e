"""How good is a model: Avg@k with its standard error, and unbiased Pass@k.

    python -m common.evaluate --model tiny                        # held-out arithmetic
    python -m common.evaluate --model runs/bupo --data problems.jsonl --k 16 --output answers.jsonl

Avg@k is the mean over problems of the mean reward of k sampled answers; its standard error is over
problems. Pass@k estimates the chance that at least one of k answers is right, of reward 1 or more.
An answer that was cut off is wrong, as in training: its reward is 0.
"""
import json
import math
import pathlib
import statistics
from dataclasses import dataclass

from common.data import drop_long_prompts, encode_prompt, load_problems, write_whole
from common.distributed import everyone, rank, share, size
from common.flags import BOXED, BadInput, exit_on_bad_input, flag, load_reward, parse_args
from common.logprobs import check_model
from common.models import load_model, load_tokenizer
from common.sampling import sample
from common.verify import verify


def pass_at_k(n, c, k) -> float:
    """Chance that k answers, drawn without replacement from n of which c are right, hold a right
    one: 1 - C(n-c, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374).

    ValueError if c > n, ZeroDivisionError if k > n.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values):
    """Numbers -> their mean and its standard error, NaN for a single value."""
    error = math.nan
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), error


def evaluate(model, tokenizer, rows, reward, k, max_new_tokens, temperature=1.0, top_p=1.0, seed=0,
             system=""):
    """Samples k answers to each row's problem and rates them by reward(text, row) -> float.

    -> avg_at_k, standard_error, pass_at {1: .., k: ..}, length (tokens), truncated (share),
    by_problem (mean rewards), and answers: the rows, each with responses, lengths, finished,
    rewards.
    """
    answers = []
    for start in range(0, len(rows), 64):
        batch = rows[start:start + 64]
        mine = share(batch + batch[-1:] * (-len(batch) % size()))  # each rank needs as many
        prompts = [encode_prompt(tokenizer, row["problem"], system) for row in mine]
        rollout = sample(
            model, tokenizer, prompts, k,
            max_new_tokens, temperature, top_p,
            seed=seed + start)
        found = []
        for i, row in enumerate(mine):
            own = slice(i * k, (i + 1) * k)
            texts = rollout.texts[own]
            finished = rollout.finished[own].tolist()
            rewards = [float(reward(text, row)) if ended else 0.0
                       for text, ended in zip(texts, finished)]
            found.append({**row, "responses": texts, "lengths": rollout.lengths[own].tolist(),
                          "finished": finished, "rewards": rewards})
        for of_ranks in zip(*everyone(found)):
            answers += of_ranks
        del answers[start + len(batch):]  # repeats that only filled up the ranks
    by_problem = [statistics.fmean(row["rewards"]) for row in answers]
    average, error = mean_and_error(by_problem)
    right = [sum(reward >= 1 for reward in row["rewards"]) for row in answers]
    pass_at = {j: statistics.fmean(pass_at_k(k, c, j) for c in right) for j in range(1, k + 1)}
    return {
        "avg_at_k": average,
        "standard_error": error,
        "k": k,
        "problems": len(rows),
        "by_problem": by_problem,
        "pass_at": pass_at,
        "length": statistics.fmean(sum(row["lengths"]) / k for row in answers),
        "truncated": 1 - statistics.fmean(sum(row["finished"]) / k for row in answers),
        "answers": answers,
    }


def describe(result):
    """One line: Avg@k ± standard error, Pass@k, length."""
    k = result["k"]
    return (f"Avg@{k} {result['avg_at_k']:.3f} ± {result['standard_error']:.3f}   "
            f"Pass@{k} {result['pass_at'][k]:.3f}   {result['length']:.0f} tokens, "
            f"{result['truncated']:.0%} truncated   ({result['problems']} problems)")


def verified(text: str, row: dict) -> float:
    """1.0 if the answer is the gold, else 0.0."""
    return verify(text, row["answer"])


@dataclass
class Args:
    model: str = flag("tiny", "tiny, a model's or a run's folder, or a hub id")
    data: str = flag("arithmetic", "arithmetic, a .jsonl/.json/.parquet file, or a hub id: "
                     "owner/set, owner/set:config, owner/set:config:split [split: test]")
    reward: str = flag(None, "my_rewards.py:mine, a reward(text, row) of your own")
    system: str = flag("", "system message before each problem; larger models: asks for a box")
    problems: int = flag(256, "how many problems, drawn by the seed", low=1)
    k: int = flag(8, "answers to each problem", low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens", low=1)
    temperature: float = flag(1.0, "0 is greedy; the long-CoT paper: 0.7, with top-p 0.95", low=0)
    top_p: float = flag(1.0, "draw from the smallest set of tokens of this probability",
                        low=0.01, high=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "bfloat16 on a GPU, float32 on a CPU",
                      choices=("auto", "float32", "bfloat16"))
    seed: int = flag(0, "draws problems and answers", low=0)
    output: str = flag(None, "JSONL file for the answers, which must not exist")


REAL = {"system": BOXED, "max_new_tokens": 4096}


@exit_on_bad_input()
def main(argv=None):
    args = parse_args(Args, REAL, __doc__, argv)
    if args.output and pathlib.Path(args.output).exists():
        raise BadInput(f"--output {args.output}: exists already")
    if args.output and not pathlib.Path(args.output).parent.is_dir():
        raise BadInput(f"--output {args.output}: its folder does not exist")
    reward_of = load_reward(args.reward) if args.reward else verified
    tokenizer = load_tokenizer(args.model)
    model = load_model(args, trained=False)
    rows = load_problems(args.data, "test", args.seed, args.problems)
    context = model.config.max_position_embeddings
    rows = drop_long_prompts(tokenizer, rows, args.system, context - args.max_new_tokens)
    first = encode_prompt(tokenizer, rows[0]["problem"], args.system)
    check_model(model, tokenizer, first, trained=False)
    print(f"first prompt: {tokenizer.decode(first)!r}")
    result = evaluate(
        model, tokenizer, rows, reward_of,
        args.k,
        args.max_new_tokens,
        args.temperature,
        args.top_p,
        args.seed,
        args.system)
    print(describe(result))
    print("   ".join(f"Pass@{j} {value:.3f}" for j, value in result["pass_at"].items()))
    if args.output and rank() == 0:
        rows = [*result.pop("answers"), {"summary": {**result, "flags": vars(args)}}]
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows]
        write_whole(pathlib.Path(args.output), "".join(lines))
        print(f"answers: {args.output}")


if __name__ == "__main__":
    main()
