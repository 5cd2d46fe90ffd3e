"""Look inside a model: what each block would say, how sure of it, what attention and FFN change.

    python -m analysis.internal --model tiny              # a table, three figures, entropies.json
    python -m analysis.internal --model tiny runs/bupo --sample-layer 3

BuPO (arXiv 2512.19673) reads a policy off every block l: softmax(H^l E^T), where H^l is the
residual stream after block l and E the unembedding, without the final norm (eq. 5); attention and
FFN are read in the same way, from what they add to the stream (eq. 6). A model is run once over
answers of its own and every number is a mean over answer tokens. Un-normed entropy mixes how large
a stream is with what it says, so beside each number stands its control: the same stream through
the final norm (the logit lens), and its size.

A token costs 12 L * 2 D V FLOPs, far more than the blocks themselves: --tokens pools some.
Axes: B answers, S prompt and answer tokens, N tokens of all rows, L blocks, V vocabulary, D width.
"""
import argparse
import copy
import json
import math
import pathlib
import sys
from dataclasses import dataclass

import torch

from analysis.plot import COLOURS, DASHES, pyplot
from common.data import drop_long_prompts, encode_prompt, load_problems, write_whole
from common.distributed import rank
from common.flags import BOXED, BadInput, exit_on_bad_input, flag, parse_args
from common.internal_policy import (
    block_streams,
    boundary_layer,
    entropy,
    entropy_changes,
    first_blocks,
)
from common.logprobs import check_model
from common.models import load_model, load_tokenizer
from common.sampling import join, sample

TOLERANCES = (0.01, 0.02, 0.05, 0.1, 0.2)
TITLES = {"entropy": "as in the paper", "final_norm": "with the final norm"}


def layer_policy(model, layer: int):
    """The model cut off after block `layer` (1-based): a view that common.sampling.sample takes.

    Answers are then drawn from softmax(H^layer E^T), with a cache for these blocks alone. Layer L
    is the model itself. ValueError outside 1..L.
    """
    view = copy.copy(model)
    view._modules = {**model._modules, "model": first_blocks(model, layer)}
    return view


def stream_means(lm, x: torch.Tensor, chunk: int) -> dict[str, float]:
    """A stream (N, D) -> means over its tokens of three quantities, `chunk` tokens at a time."""
    sums = {"entropy": 0.0, "final_norm": 0.0, "l2_norm": 0.0}
    for piece in x.split(chunk):
        own = entropy(lm.lm_head(piece))                                        # (n,), eq. 7
        normed = entropy(lm.lm_head(lm.model.norm(piece)))                      # (n,)
        sums["entropy"] += own.sum().item()
        sums["final_norm"] += normed.sum().item()
        sums["l2_norm"] += piece.float().norm(dim=-1).sum().item()
    return {name: value / len(x) for name, value in sums.items()}


def mean_cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    """(N, D) x2 -> scalar."""
    cosine = torch.cosine_similarity(x.float(), y.float(), dim=-1)              # (N,)
    return cosine.mean().item()


def internal_view(model, input_ids, attention_mask, mask, chunk: int | None = None) -> dict:
    """Means over the positions where mask (B, S) is 1 -> {quantity: {stream: (L,)}}, one forward.

        "entropy"     of softmax(x E^T), nats (eq. 7), for the streams x of common.internal_policy:
                      layer_in, attn_in, attn_out, ffn_in, ffn_out, layer_out
        "final_norm"  of softmax(norm(x) E^T), nats: every stream read at one size
        "l2_norm"     ||x||
        "cosine"      "attn": cos(A^l, H^{l-1}), "ffn": cos(F^l, H^{l-1} + A^l)

    `chunk` tokens meet the vocabulary at a time, default 2^24 logits. BadInput for other blocks.
    """
    if not hasattr(model.model, "norm"):
        raise BadInput(f"{type(model).__name__} is not supported: it has no model.norm")
    V = len(model.lm_head.weight)
    chunk = chunk or max(1, 2**24 // V)
    blocks = []

    def visit(streams):
        attn, before = streams["attn_out"], streams["layer_in"]                 # (N, D) each
        means = {}
        for stream, x in streams.items():
            for quantity, value in stream_means(model, x, chunk).items():
                means[quantity, stream] = value
        means["cosine", "attn"] = mean_cosine(attn, before)
        means["cosine", "ffn"] = mean_cosine(streams["ffn_out"], before + attn)
        blocks.append(means)

    block_streams(model, input_ids, attention_mask, mask, visit)
    view = {}
    for quantity, stream in blocks[0]:
        values = [block[quantity, stream] for block in blocks]
        view.setdefault(quantity, {})[stream] = torch.tensor(values)
    return view


def rollout_view(model, rollout, budget: int, tokens: int = 0, seed: int = 0) -> dict:
    """internal_view pooled over a rollout's answer tokens, about `budget` tokens in a forward pass.

    tokens > 0 pools that many, drawn uniformly by the seed; answers without one are not run.
    """
    total = int(rollout.lengths.sum())
    pooled = min(tokens or total, total)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(total, generator=generator) < pooled                 # (total,)
    inside = rollout.mask.bool()                                                # (B, T)
    chosen = torch.zeros_like(inside)                                           # (B, T)
    chosen[inside] = drawn.to(inside.device)
    rows = chosen.any(1).nonzero()[:, 0]                                        # (R,)
    prompts = torch.tensor([len(prompt) for prompt in rollout.prompts])         # (B,)
    longest = int((prompts + rollout.lengths.cpu()).max())
    view = {}
    for part in rows.split(max(1, budget // longest)):
        batch = rollout[part]
        ids, predicts = join(batch)                                             # (b, S) each
        predicts[predicts.clone()] = chosen[part][inside[part]]
        share = predicts.sum().item() / pooled
        found = internal_view(model, ids, None, predicts)
        for quantity, streams in found.items():
            sums = view.setdefault(quantity, {})
            for name, values in streams.items():
                sums[name] = sums.get(name, 0.0) + share * values
    return view


def boundaries(entropies: dict) -> dict[float, int | None]:
    """boundary_layer by tolerance; None where no FFN raises the entropy."""
    change = entropy_changes(entropies)["ffn"]                                  # (L,)
    found = {}
    for tolerance in TOLERANCES:
        try:
            found[tolerance] = boundary_layer(change, tolerance)
        except ValueError:
            found[tolerance] = None
    return found


def print_view(view: dict) -> None:
    """Per block: entropy of its policy, what FFN and attention change, and the control beside."""
    found = {kind: boundaries(view[kind]) for kind in TITLES}
    changes = {kind: entropy_changes(view[kind]) for kind in TITLES}
    sizes = view["l2_norm"]["layer_out"].tolist()
    print(" " * 16 + "as in the paper (nats)" + " " * 13 + "with the final norm (nats)")
    print("block  size H" + "   entropy   FFN change   attention" * 2)
    for i, size in enumerate(sizes):
        line = f"{i + 1:5}{size:8.4g}"
        for kind in TITLES:
            line += f"{view[kind]['layer_out'][i]:10.3f}"
            line += f"{changes[kind]['ffn'][i]:+13.3f}"
            line += f"{changes[kind]['attn'][i]:+12.3f}"
        if found["entropy"][0.05] == i + 1:
            line += "   <- boundary"
            if i + 1 == len(sizes):
                line += ", but that is the whole model"
        print(line)
    print("boundary: the end of the first run of blocks whose FFN raises entropy by more than\n"
          "          tolerance x the largest change")
    print(f"   {'tolerance':20}" + "".join(f"{tolerance:>6}" for tolerance in TOLERANCES))
    for kind, title in TITLES.items():
        layers = [layer or "none" for layer in found[kind].values()]
        print(f"   {title:20}" + "".join(f"{layer:>6}" for layer in layers))


def panels(view: dict) -> dict[str, dict[str, torch.Tensor]]:
    """A model's view -> figure -> title of a panel -> values by block (L,)."""
    found = {"flow": {}, "changes": {}, "cosines": {}}
    for kind, title in TITLES.items():
        changes = entropy_changes(view[kind])
        for stream, what in (("layer_out", "H"), ("attn_out", "A"), ("ffn_out", "F")):
            found["flow"][f"entropy of {what}, nats, {title}"] = view[kind][stream]
        for module, what in (("attn", "attention"), ("ffn", "FFN")):
            found["changes"][f"{what}: out - in, nats, {title}"] = changes[module]
    sizes = view["l2_norm"]
    for module, what in (("attn", "attention"), ("ffn", "FFN")):
        found["cosines"][f"{what}: cosine with the stream"] = view["cosine"][module]
        share = sizes[f"{module}_out"] / sizes["layer_in"]
        found["cosines"][f"{what}: size / the stream's"] = share
    return found


def draw(views: dict[str, dict], folder: pathlib.Path) -> None:
    """flow.png, changes.png and cosines.png: all models in each, told apart by colour and line."""
    plt = pyplot()
    colours = list(COLOURS.values())
    found = {name: panels(view) for name, view in views.items()}
    for figure_name, titles in next(iter(found.values())).items():
        columns = len(titles) // 2
        size = (6 * columns, 8)
        figure, axes = plt.subplots(2, columns, figsize=size, constrained_layout=True)
        for axis, title in zip(axes.flat, titles, strict=True):
            for number, (name, figures) in enumerate(found.items()):
                values = figures[figure_name][title].tolist()
                look = {"color": colours[number % 6], "linestyle": DASHES[number % 4]}
                blocks = range(1, len(values) + 1)
                axis.plot(blocks, values, marker="o", label=name, **look)
            axis.set_title(title, fontsize=13)
            axis.set_xlabel("block", fontsize=12)
            axis.locator_params(axis="x", integer=True)
            axis.grid(alpha=0.25)
        axes.flat[0].legend(fontsize=12)
        figure.savefig(folder / f"{figure_name}.png", dpi=110)
        plt.close(figure)


@dataclass
class Args:
    model: str = flag("tiny", "tiny, a model's or a run's folder, or a hub id; several are drawn "
                      "into the same figures")
    data: str = flag("arithmetic", "arithmetic, a .jsonl/.json/.parquet file, or a hub id: "
                     "owner/set, owner/set:config, owner/set:config:split [split: test]")
    system: str = flag("", "system message before each problem; larger models: asks for a box")
    samples: int = flag(100, "answers, one to each of so many problems; the authors: 100", low=1)
    max_new_tokens: int = flag(96, "longest answer in tokens; the authors: 3072", low=1)
    tokens: int = flag(0, "answer tokens to pool; 0: all, as in the paper", low=0)
    sample_layer: int = flag(None, "print some answers of this block's policy", low=1)
    micro_batch_tokens: int = flag(4096, "tokens in one forward pass", low=1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = flag("auto", "bfloat16 on a GPU, float32 on a CPU",
                      choices=("auto", "float32", "bfloat16"))
    seed: int = flag(0, "draws problems, answers and tokens", low=0)
    output: str = flag("runs/internal", "folder for the JSON and the figures, new or empty")


REAL = {"system": BOXED, "max_new_tokens": 1024, "tokens": 20000, "micro_batch_tokens": 16384}


def several_models(argv: list[str]) -> tuple[list[str], list[str]]:
    """`--model A B C` -> the names, each once, and the arguments with --model A alone."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="+", action="extend", default=[])
    given, rest = parser.parse_known_args(argv)
    names = list(dict.fromkeys(given.model or ["tiny"]))
    return names, ["--model", names[0], *rest]


def look_at(name: str, model, tokenizer, prompts: list[list[int]], args) -> dict:
    """Samples, reads the blocks, prints -> the view, with counts."""
    print(f"\n{name}: first prompt {tokenizer.decode(prompts[0])!r}")
    if args.sample_layer:
        part = layer_policy(model, args.sample_layer)
        longest = min(args.max_new_tokens, 64)
        said = sample(part, tokenizer, prompts[:3], 2, longest, seed=args.seed, alone=True)
        print(f"block {args.sample_layer} says, to the first {len(prompts[:3])} prompts:")
        for text in said.texts:
            print(f"   {text!r}")
    rollout = sample(model, tokenizer, prompts, 1, args.max_new_tokens, seed=args.seed, alone=True)
    V, D = model.lm_head.weight.shape
    total = int(rollout.lengths.sum())
    pooled = min(args.tokens or total, total)
    L = model.config.num_hidden_layers
    price = 12 * L * 2 * D * V * pooled / 1e12
    print(f"{len(prompts)} answers, {pooled} of their {total} tokens pooled: {price:.3g} TFLOP; "
          f"ln V {math.log(V):.3f} nats")
    view = rollout_view(model, rollout, args.micro_batch_tokens, args.tokens, args.seed)
    print_view(view)
    found = {kind: boundaries(view[kind]) for kind in TITLES}
    counts = {"answers": len(prompts), "tokens": pooled, "vocabulary": V}
    return {**counts, **view, "boundary": found}


def as_lists(x):
    """Tensors in nested dicts -> lists, for JSON."""
    if torch.is_tensor(x):
        return x.tolist()
    if isinstance(x, dict):
        return {name: as_lists(value) for name, value in x.items()}
    return x


@exit_on_bad_input()
def main(argv=None):
    names, rest = several_models(sys.argv[1:] if argv is None else argv)
    args = parse_args(Args, REAL, __doc__, rest)
    folder = pathlib.Path(args.output)
    if folder.is_file() or any(folder.glob("*")):
        raise BadInput(f"--output {folder}: holds something already; choose another folder")
    problems = load_problems(args.data, "test", args.seed, args.samples)
    ready = {}
    for name in names:  # everything is checked before anything is written
        tokenizer = load_tokenizer(name)
        model = load_model(args, trained=False, name=name)
        check_model(model, tokenizer, [0, 1], trained=False)
        L = model.config.num_hidden_layers
        probe = torch.arange(2, device=model.device)[None]                      # (1, 2)
        internal_view(model, probe, None, torch.ones_like(probe))
        if args.sample_layer and args.sample_layer > L:
            raise BadInput(f"--sample-layer {args.sample_layer}: {name} has blocks 1 (lowest) to "
                           f"{L}")
        longest = model.config.max_position_embeddings - args.max_new_tokens
        kept = drop_long_prompts(tokenizer, problems, args.system, longest)
        prompts = [encode_prompt(tokenizer, row["problem"], args.system) for row in kept]
        ready[name] = (model, tokenizer, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    views = {name: look_at(name, *parts, args) for name, parts in ready.items()}
    if rank() > 0:
        return
    flags = {**vars(args), "model": names}
    saved = as_lists({"flags": flags, "models": views})
    write_whole(folder / "entropies.json", json.dumps(saved, indent=1))
    draw(views, folder)
    print(f"\nwritten: {folder}/entropies.json, flow.png, changes.png, cosines.png")


if __name__ == "__main__":
    main()
