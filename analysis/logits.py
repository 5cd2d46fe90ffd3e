"""What training does to a model's logits: several models on the same answers, those of the first.

    python -m analysis.logits --model tiny runs/entropy_min       # a table, logits.json, logits.png
    python -m analysis.logits --model tiny runs/entropy_min runs/grpo

One-shot Entropy Minimization (arXiv 2505.20282) says that its training moves the logits to the
right and raises their skewness, and that reinforcement learning lowers it. Its code takes each
model's own answers and the 50 largest logits over temperature 0.6; here all models read the same
answers, and all logits are counted, too.

Axes: B answers, N of all rows, n a chunk of them, D width, V vocabulary, k kept logits.
"""
import json
import pathlib
import sys
from dataclasses import dataclass

import torch

from analysis.internal import several_models
from analysis.plot import COLOURS, DASHES, pyplot
from common.data import drop_long_prompts, encode_prompt, load_problems, write_whole
from common.distributed import rank
from common.flags import BadInput, exit_on_bad_input, flag, parse_args
from common.logprobs import micro_batches, states_before_answers
from common.models import autocast, load_model, load_tokenizer
from common.sampling import sample

EDGE, BINS = 60, 200  # of the histogram: from -60 to 60 in bins of 0.6


class Moments:
    """Collects values -> mean, std, skewness (m3 / m2^1.5, population moments), histogram."""

    def __init__(self):
        self.powers = torch.zeros(4, dtype=torch.float64)       # sums of 1, x, x^2, x^3
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: torch.Tensor) -> None:
        """x (n, any), float32. Values beyond an edge go into the outermost bin."""
        for i in range(4):
            sums = x.pow(i).sum(-1)                             # (n,)
            self.powers[i] += sums.cpu().double().sum()
        inside = x.clamp(-EDGE, EDGE)
        self.counts += torch.histc(inside, BINS, -EDGE, EDGE).cpu()

    def found(self) -> dict:
        """The statistics as numbers; "histogram" are the shares of the bins."""
        n = self.powers[0]
        mean, second, third = self.powers[1:] / n
        variance = second - mean**2
        m3 = third - 3 * mean * second + 2 * mean**3
        skewness = m3 / variance**1.5
        shares = self.counts / n                                # (BINS,)
        return {
            "mean": mean.item(),
            "std": variance.sqrt().item(),
            "skewness": skewness.item(),
            "histogram": shares.tolist(),
        }


@torch.no_grad()
def logit_statistics(model, rollout, budget, temperature=0.6, top_k=50) -> dict[str, dict]:
    """The shape of a model's logits where it predicts a rollout's answer tokens.

    -> {"raw": ..., "top_k": ...}, each as Moments.found has it. raw: all V logits of a position;
    top_k: the k largest over temperature, what a sampler keeps and the authors took. `budget`
    tokens, prompt and answer, in one forward pass.
    """
    V = model.config.vocab_size
    raw, largest = Moments(), Moments()
    rows = torch.arange(len(rollout.mask), device=rollout.mask.device)          # (B,)
    for part in micro_batches(rollout, rows, budget):
        with autocast(model):
            hidden = states_before_answers(model, rollout[part])                # (N, D)
            for states in hidden.split(max(1, 2**24 // V)):                     # (n, D)
                logits = model.lm_head(states).float()                          # (n, V)
                raw.add(logits)
                largest.add(logits.topk(min(top_k, V)).values / temperature)    # (n, k)
    return {"raw": raw.found(), "top_k": largest.found()}


def draw(found: dict[str, dict], path: pathlib.Path) -> None:
    """Histograms of all models: every logit on the left, the authors' statistic on the right."""
    plt = pyplot()
    colours = list(COLOURS.values())
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    width = 2 * EDGE / BINS
    centres = [(i + 0.5) * width - EDGE for i in range(BINS)]
    for axis, kind in zip(axes, ("raw", "top_k"), strict=True):
        for number, name in enumerate(found):
            values = found[name][kind]
            look = {"color": colours[number % 6], "linestyle": DASHES[number % 4]}
            label = f"{name}: skewness {values['skewness']:.2f}"
            axis.plot(centres, values["histogram"], label=label, **look)
            axis.axvline(values["mean"], linewidth=1, **look)
        title = "all logits" if kind == "raw" else "the largest, over the temperature"
        axis.set_title(title, fontsize=13)
        axis.set_xlabel("logit (thin vertical line: mean)", fontsize=12)
        axis.set_ylabel(f"share in a bin of {width:g}", fontsize=12)
        axis.set_xlim(-40, 40)
        axis.grid(alpha=0.25)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclass
class Args:
    model: str = flag("tiny", "tiny, folders or hub ids, one or several")
    data: str = flag("arithmetic", "as in common.evaluate")
    system: str = flag("", "system message before each problem; larger models: asks for a box")
    problems: int = flag(20, "problems, one answer to each; the authors: 20", low=1)
    max_new_tokens: int = flag(80, "longest answer in tokens; the authors: 500", low=1)
    temperature: float = flag(0.6, "of sampling and of the k largest; authors: 0.6", low=0.01)
    top_k: int = flag(50, "logits of a position in the authors' statistic", low=1)
    micro_batch_tokens: int = flag(4096, "tokens in one forward pass", low=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "bfloat16 on a GPU, float32 on a CPU",
                      choices=("auto", "float32", "bfloat16"))
    seed: int = flag(0, "draws problems and answers", low=0)
    output: str = flag("runs/logits", "folder for logits.json and logits.png, new or empty")


REAL = {"max_new_tokens": 500}


@exit_on_bad_input()
def main(argv=None):
    names, rest = several_models(sys.argv[1:] if argv is None else argv)
    args = parse_args(Args, REAL, __doc__, rest)
    folder = pathlib.Path(args.output)
    if folder.is_file() or any(folder.glob("*")):
        raise BadInput(f"--output {folder}: holds something already; choose another folder")

    models, sizes = {}, {}
    for name in names:
        models[name] = load_model(args, trained=False, name=name)
        sizes[name] = models[name].config.vocab_size
    if len(set(sizes.values())) > 1:
        raise BadInput(f"--model: the same answers need the same vocabulary, these have {sizes}")

    # 1. One answer of the first model to each problem.
    first, tokenizer = models[names[0]], load_tokenizer(names[0])
    longest = first.config.max_position_embeddings - args.max_new_tokens
    rows = load_problems(args.data, "test", args.seed, args.problems)
    rows = drop_long_prompts(tokenizer, rows, args.system, longest)
    prompts = [encode_prompt(tokenizer, row["problem"], args.system) for row in rows]
    rollout = sample(first, tokenizer, prompts, 1, args.max_new_tokens, args.temperature,
                     seed=args.seed, alone=True)
    print(f"{len(prompts)} answers of {names[0]}, {int(rollout.lengths.sum())} tokens, "
          f"{sizes[names[0]]} logits at each")

    # 2. Every model's logits on them.
    found = {}
    print(f"{'all logits':25}{args.top_k} largest / {args.temperature:g}")
    print("   mean    std  skewness " * 2 + "  model")
    for name, model in models.items():
        found[name] = logit_statistics(model, rollout, args.micro_batch_tokens, args.temperature,
                                       args.top_k)
        cells = [f"{x['mean']:7.2f}{x['std']:7.2f}{x['skewness']:10.3f} "
                 for x in found[name].values()]
        print("".join(cells) + f"  {name}")
    if rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"flags": {**vars(args), "model": names}, "models": found}
    write_whole(folder / "logits.json", json.dumps(saved, indent=1))
    draw(found, folder / "logits.png")
    print(f"written: {folder}/logits.json, logits.png")


if __name__ == "__main__":
    main()
