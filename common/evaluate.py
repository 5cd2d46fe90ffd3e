"""How good is a model: Avg@k with its standard error, and unbiased Pass@1..k, on problems with answers.

    python -m common.evaluate --model tiny                                          # the embedded model on held-out arithmetic
    python -m common.evaluate --model runs/bupo --data problems.jsonl --k 16 --output answers.jsonl
    python -m common.evaluate --model runs/long_cot_sft --data TIGER-Lab/MMLU-Pro --problems 1000 --temperature 0.7 --top-p 0.95

The last line is the long chain-of-thought paper's way, with --k at least 4, 16 on AIME; its four benchmarks: common/data.py.

Avg@k is the mean over problems of the share of k sampled answers that are right; its standard error is over problems.
Pass@j estimates the chance that at least one of j answers is right. To --output goes a row a problem, answers and all, and a last
row {"summary": ...} with what was printed, the share of answers with a reflection word among it.
"""
import json
import math
import pathlib
import re
import statistics
from dataclasses import dataclass

from tqdm import tqdm

from common.data import encode_prompts, load_problems
from common.distributed import rank
from common.errors import BadInput
from common.flags import Reading, exit_on_bad_input, flag, parse_flags
from common.models import causal_lm, load_model, load_tokenizer
from common.sampling import sample_texts
from common.verify import reward

REFLECTION_WORDS = ("wait", "recheck", "alternatively", "retry", "however")


def reflection_rates(texts: list[str]) -> dict[str, float]:
    """Share of texts that hold each of the five reflection words, as whole words in any case; NaN without texts.

    The words are those of arXiv 2502.03373; its counter is unpublished, so compare rates from here with one another only.
    """
    found = {word: sum(bool(re.search(rf"\b{word}\b", text, re.IGNORECASE)) for text in texts) for word in REFLECTION_WORDS}
    return {word: count / len(texts) if texts else math.nan for word, count in found.items()}


def describe_reflection(rates: dict[str, float]) -> str:
    """One line of the five shares."""
    return "reflection words, share of answers: " + ", ".join(f"{word} {rate:.1%}" for word, rate in rates.items())


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k answers drawn without replacement from n, of which c are right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for Pass@k (Chen et al. 2021). ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: need 0 <= c <= n and 1 <= k <= n, got {n=}, {c=}, {k=}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(model, tokenizer, rows: list[dict], k: int, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
             seed: int = 0, label: str = "evaluate") -> dict:
    """rows: {"prompt": ids, "problem", "answer"}. -> avg_at_k, standard_error, pass_at ({1: .., k: ..}), length (tokens),
    truncated (share), reflection (reflection_rates of the answers), answers (a row a problem: problem, answer, responses,
    correct)."""
    answers, lengths, finished = [], [], []
    for start in tqdm(range(0, len(rows), 64), desc=label, unit="batch", leave=False, disable=rank() > 0):
        batch = rows[start:start + 64]
        sampled = sample_texts(model, tokenizer, [row["prompt"] for row in batch], k, max_new_tokens, temperature, top_p,
                               seed=seed + start)
        lengths += [length for _, length, _ in sampled]
        finished += [ended for _, _, ended in sampled]
        for i, row in enumerate(batch):
            texts = [text for text, _, _ in sampled[i * k:(i + 1) * k]]
            answers.append({"problem": row["problem"], "answer": row["answer"], "responses": texts,
                            "correct": [int(reward(text, row["answer"])) for text in texts]})
    means = [sum(row["correct"]) / k for row in answers]
    return {"avg_at_k": statistics.fmean(means), "k": k, "problems": len(rows),
            "standard_error": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else float("nan"),
            "pass_at": {j: statistics.fmean(pass_at_k(k, sum(row["correct"]), j) for row in answers) for j in range(1, k + 1)},
            "length": statistics.fmean(lengths), "truncated": 1 - statistics.fmean(finished),
            "reflection": reflection_rates([text for row in answers for text in row["responses"]]), "answers": answers}


def describe(result: dict) -> str:
    """One line: Avg@k ± standard error, Pass@k, length."""
    k = result["k"]
    return (f"Avg@{k} {result['avg_at_k']:.3f} ± {result['standard_error']:.3f}   Pass@{k} {result['pass_at'][k]:.3f}   "
            f"{result['length']:.0f} tokens, {result['truncated']:.0%} truncated   ({result['problems']} problems)")


@dataclass
class Config:
    model: str = flag("tiny", "tiny, a local model or run folder, or a hub id")
    problems: int = flag(256, "how many problems, drawn by the seed", low=1)
    k: int = flag(8, "answers to each problem", low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens", real=4096, low=1)
    temperature: float = flag(1.0, "0 is greedy; the long chain-of-thought paper: 0.7 with top-p 0.95", low=0)
    top_p: float = flag(1.0, "sample from the smallest set of tokens that holds this probability", above=0, high=1)
    seed: int = flag(0, "draws problems and answers", low=0)
    output: str = flag(None, "JSONL file for the answers; default: <run folder>/answers.jsonl or answers.jsonl", type=str)


@exit_on_bad_input
def main(argv=None):
    cfg = parse_flags(Config, Reading, description=__doc__, argv=argv)
    folder = cfg.model if pathlib.Path(cfg.model).is_dir() else "."
    output = pathlib.Path(cfg.output or pathlib.Path(folder) / "answers.jsonl")
    if output.exists():
        raise BadInput(f"--output {output}: exists already")
    tokenizer = load_tokenizer(cfg.model)
    model = load_model(cfg.model, cfg.device, cfg.dtype, cuda_graphs=cfg.cuda_graphs, frozen=True)
    rows = load_problems(cfg.data, cfg.split, cfg.prompt_column, cfg.answer_column, True, cfg.seed, cfg.problems)
    longest = causal_lm(model).config.max_position_embeddings - cfg.max_new_tokens
    rows = encode_prompts(tokenizer, rows, cfg.system, cfg.thinking, longest)
    print(f"first prompt: {tokenizer.decode(rows[0]['prompt'])!r}")
    try:  # now, not after the last answer
        output.parent.mkdir(parents=True, exist_ok=True)
        trial = output.with_name(f"{output.name}.{rank()}.tmp")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise BadInput(f"--output {output}: cannot write there ({error.strerror})") from error
    result = evaluate(model, tokenizer, rows, cfg.k, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed)
    rows = [*result.pop("answers"), {"summary": {**result, "flags": vars(cfg)}}]
    if rank() == 0:
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(describe(result))
    print("   ".join(f"Pass@{j} {value:.3f}" for j, value in result["pass_at"].items()))
    print(describe_reflection(result["reflection"]))
    print(f"answers: {output}")


if __name__ == "__main__":
    main()
