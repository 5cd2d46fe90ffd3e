"""One-shot entropy minimization: ten updates that make a model surer of its own answers to one problem. No label, no reward.

Paper: One-shot Entropy Minimization (arXiv 2505.20282).
Run:   python entropy_min.py                           a quarter of a minute on a laptop
       python entropy_min.py --model Qwen/Qwen2.5-Math-7B --data problems.jsonl --select 100
       python grpo.py --model runs/entropy_min         reinforcement learning after it
       python entropy_min.py --analyze --model tiny runs/entropy_min runs/grpo     whose logits moved, and which way
See:   entropy falls at once; accuracy at temperature 1 rises for ten to fifteen updates (one seed in eight is ruined), then goes
       down. At double the learning rate it ends below its start: try --lr 6e-4. Nothing in the loss knows right from wrong.

Each step samples 64 answers to the same problem from the model as it is and lowers the mean entropy of the next token over the
answers' tokens I:

    H_t = -sum_v p_T(v | y_<t, x) log p_T(v | y_<t, x),   L = mean of H_t over t in I,   p_T = softmax(logits / T)

There is no gradient through the sampling, and the gradient of H_t by logit v is -p_v (log p_v + H_t) / T.
This file keeps the order of grpo.py, without rewards: diff grpo.py entropy_min.py.

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
  evaluation       | avg@8 | greedy, once; AMC23 eight times | Avg@k at temperature 1; common.evaluate --temperature 0 is greedy
  logit statistics | "logits" | each model on its own answers: the 50 largest, over T 0.6, zeros dropped | --analyze: all models
      on the same answers, all V logits as they are, and the authors' statistic beside them
"""
import json
import pathlib
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.data import batch_of, encode_prompts, load_problems
from common.distributed import rank, size, total
from common.errors import BadInput
from common.evaluate import evaluate
from common.flags import Reading, Shared, exit_on_bad_input, flag, parse_flags, several_models
from common.internal_policy import hidden_states
from common.logprobs import micro_batches, token_logprobs
from common.models import causal_lm, load_model, load_tokenizer, widest
from common.plot import plot_logits
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
    _, entropy = token_logprobs(hidden, weight, rollout.tokens[inside], temperature, entropy_grad=True)  # (N,)
    return torch.zeros_like(rollout.mask).masked_scatter(inside, entropy)


def choose_problems(run) -> list[dict]:
    """The --shots problems to train on: a given text, the most uncertain of --select, or the first of the shuffled data."""
    cfg = run.cfg
    if cfg.problem:
        context = causal_lm(run.model).config.max_position_embeddings - cfg.max_new_tokens
        return encode_prompts(run.tokenizer, [{"problem": cfg.problem, "answer": ""}], cfg.system, cfg.thinking, context)
    pool = batch_of(run.train, 0, max(cfg.select, cfg.shots), cfg.seed)
    if not cfg.select:
        return pool
    result = evaluate(run.model, run.tokenizer, pool, cfg.select_k, cfg.max_new_tokens, seed=cfg.seed, label="selecting")
    variance = accuracy_variance(torch.tensor([row["correct"] for row in result["answers"]]))       # (N,)
    order = variance.argsort(descending=True, stable=True).tolist()                     # ties stay in the seed's order
    run.summary["selection"] = [{"problem": pool[i]["problem"], "variance": variance[i].item()} for i in order]
    return [pool[i] for i in order[:cfg.shots]]


@torch.no_grad()
def logit_statistics(model, rollout, budget: int, temperature: float = 0.6, top_k: int = 50) -> dict[str, dict]:
    """The shape of a model's logits where it predicts a rollout's answers: {"raw": ..., "top_k": ...}, each with "mean", "std",
    "skewness" (m3 / m2^1.5, population moments) and "histogram" (shares of 600 bins of width 0.2 from -60 to 60).

    raw: all V logits of a position. top_k: the top_k largest over temperature, which is what is left in a sampler's scores and
    what the authors took. Summed up about `budget` logits x 1024 at a time, in float64.
    """
    lm, powers, counts = causal_lm(model), {"raw": 0.0, "top_k": 0.0}, {"raw": 0.0, "top_k": 0.0}
    for m in micro_batches(torch.arange(len(rollout.mask), device=rollout.mask.device), rollout, budget):  # (b,) row numbers
        part = rollout[m]
        ids, predicts = join(part.prompts, part.tokens, part.lengths)                   # (b, S) each
        for hidden in hidden_states(model, ids)[predicts].split(max(1, budget * 1024 // lm.config.vocab_size)):  # (n, D)
            logits = lm.lm_head(hidden).float()                                         # (n, V)
            kept = logits.topk(min(top_k, logits.shape[-1])).values / temperature       # (n, top_k)
            for name, x in (("raw", logits), ("top_k", kept)):
                powers[name] += torch.stack([x.to(widest(x.device)).pow(i).sum() for i in range(4)]).cpu().double()  # (4,)
                counts[name] += torch.histc(x.clamp(-60, 60), 600, -60, 60).cpu().double()                # (600,)
    found = {}
    for name, (n, *sums) in powers.items():
        mean, second, third = (total / n for total in sums)
        variance = second - mean ** 2
        skewness = (third - 3 * mean * second + 2 * mean ** 3) / variance ** 1.5
        found[name] = {"mean": mean.item(), "std": variance.sqrt().item(), "skewness": skewness.item(),
                       "histogram": (counts[name] / n).tolist()}
    return found


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


@dataclass
class Analysis:
    model: str = flag("tiny", "tiny, local model or run folders, hub ids: several, compared on the first one's answers")
    problems: int = flag(20, "problems, one answer to each; the authors: 20", low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens; the authors: 500", real=500, low=1)
    temperature: float = flag(0.6, "for sampling, and divides the top-k statistic; the authors: 0.6", above=0)
    top_k: int = flag(50, "logits of a position in the authors' statistic", low=1)
    micro_batch_tokens: int = flag(4096, "prompt and answer tokens in one forward pass", real=16384, low=1)
    seed: int = flag(0, "draws problems and answers", low=0)
    output: str = flag("runs/logits", "new or empty folder for logits.json and logits.png")


def analyze(argv: list[str]) -> None:
    """--analyze: one table and one figure of the logits of several models on the same answers, those of the first model."""
    names, rest = several_models([word for word in argv if word != "--analyze"])
    cfg = parse_flags(Analysis, Reading, description=analyze.__doc__, argv=rest)
    folder = pathlib.Path(cfg.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--output {folder}: holds something already; choose another folder")
    models = {name: load_model(name, cfg.device, cfg.dtype, cuda_graphs=cfg.cuda_graphs, frozen=True) for name in names}
    sizes = {name: causal_lm(model).config.vocab_size for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        raise BadInput(f"--model: the same answers need the same vocabulary, these have {sizes}")
    tokenizer, first = load_tokenizer(names[0]), models[names[0]]
    problems = load_problems(cfg.data, cfg.split, cfg.prompt_column, cfg.answer_column, True, cfg.seed, cfg.problems)
    longest = causal_lm(first).config.max_position_embeddings - cfg.max_new_tokens
    prompts = [row["prompt"] for row in encode_prompts(tokenizer, problems, cfg.system, cfg.thinking, longest)]
    rollout = sample(first, tokenizer, prompts, 1, cfg.max_new_tokens, cfg.temperature, seed=cfg.seed, alone=True)
    found = {name: logit_statistics(m, rollout, cfg.micro_batch_tokens, cfg.temperature, cfg.top_k) for name, m in models.items()}
    print(f"{len(prompts)} answers of {names[0]}, {int(rollout.lengths.sum())} tokens, {sizes[names[0]]} logits at each\n"
          f"all logits{f'the {cfg.top_k} largest / {cfg.temperature}':>38}\n" + "   mean    std  skewness " * 2 + "  model")
    for name, of in found.items():
        print("".join(f"{x['mean']:7.2f}{x['std']:7.2f}{x['skewness']:10.3f} " for x in (of["raw"], of["top_k"])) + f"  {name}")
    if rank() > 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "logits.json").write_text(json.dumps({"flags": {**vars(cfg), "model": names}, "models": found}, indent=1))
    except OSError as error:
        raise BadInput(f"--output {folder}: cannot write there ({error.strerror})") from error
    plot_logits(found, folder / "logits.png")
    print(f"written: {folder}/logits.json, logits.png")


@exit_on_bad_input
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--analyze" in argv:
        return analyze(argv)
    cfg = parse_flags(Config, Shared, description=__doc__, argv=argv)
    if cfg.group_size % (cfg.shots * size()) or (cfg.problem or cfg.problem_file) and cfg.shots > 1:
        raise BadInput(f"--shots {cfg.shots}{f' x {size()} processes' * (size() > 1)} must divide --group-size {cfg.group_size}, "
                       "and --shots be 1 with --problem")
    if cfg.problem_file and not cfg.problem:
        try:
            cfg.problem = pathlib.Path(cfg.problem_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            why = (getattr(error, "strerror", None) or "not UTF-8").lower()
            raise BadInput(f"--problem-file {cfg.problem_file}: {why}") from error
        if not cfg.problem:
            raise BadInput(f"--problem-file {cfg.problem_file}: is empty")
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
            rollout = sample(model, run.tokenizer, [p["prompt"] for p in problems],
                             cfg.group_size // (cfg.shots * size()), cfg.max_new_tokens, cfg.temperature, cfg.top_p,
                             seed=cfg.seed * 100_000 + step, repetition_penalty=cfg.repetition_penalty)
        mask = rollout.mask.clone()                                                             # (B, T)
        if cfg.authors_mask:  # what follows an end token is masked there, as the end token is the padding token
            mask[torch.arange(len(mask)), rollout.lengths - 1] -= rollout.finished.float()
        tokens, parts = total(mask.sum()).clamp(min=1), []
        with run.clock("training"):
            rows = torch.arange(len(mask), device=mask.device)                                  # (B,)
            for m in micro_batches(rows, rollout, cfg.micro_batch_tokens):                      # (b,) row numbers
                entropy = answer_entropies(model, rollout[m], cfg.loss_temperature, int(cfg.authors_mask))  # (b, T)
                loss = (entropy * mask[m]).sum() / tokens
                optimizer.backward(loss)
                parts.append({"loss": loss.item()})
            parts.append({"grad_norm": optimizer.step(max_norm=1.0)})
        run.log(rollout, parts=parts)
        if run.rows[-1]["entropy"] < cfg.early_stop * run.rows[0]["entropy"]:
            tqdm.write(f"stopped after step {step + 1}: the entropy is below {cfg.early_stop} of its start")
            break
    run.finish()


if __name__ == "__main__":
    main()
