"""Look inside a language model: what each block would say, how sure of it, and what attention and FFN change about that.

    python -m common.internal_policy --model tiny                                   # three figures, entropies.json, a table
    python -m common.internal_policy --model Qwen/Qwen3-4B runs/bupo --data HuggingFaceH4/MATH-500 --sample-layer 6

BuPO (arXiv 2512.19673) reads a policy off every block l = 1..L: softmax(H^l E^T), where H^l is the residual stream after block
l and E the unembedding, *without* the final norm (eq. 5); and off attention and FFN in the same way, softmax(A^l E^T) and
softmax(F^l E^T), from what they add to the stream (eq. 6). Each model is run once over answers of its own and every number
is a mean over answer tokens. Un-normed entropy mixes how large a stream is with what it says (the same direction, ten times
longer, is surer), so beside each curve stands its control: the same stream through the final norm (logit lens), and its size.

The price is the unembedding. A block has five streams of its own (its input is the output of the block below), each read
twice: (10 L + 2) * 2 D V FLOPs a pooled token, 88 GFLOP at Qwen3-0.6B's shape where the blocks themselves take about 1.
Hence --tokens, which pools only that many, drawn uniformly (tests/benchmarks/internal_view.py measures it).

For any causal model of transformers with .model.layers, .model.norm and .lm_head whose blocks are h = H + self_attn(
input_layernorm(H)), h + mlp(post_attention_layernorm(h)): Qwen2, Qwen3, Llama, Mistral, Phi-3, Gemma. Blocks that norm or scale
what they add, or run both modules side by side, are refused (Gemma 2 and 3, OLMo 2, GLM-4, Granite, Cohere, Phi-2).
"""
import copy
import json
import math
import pathlib
import sys
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from common.data import encode_prompts, load_problems
from common.distributed import gather_rest, gathered, rank
from common.errors import BadInput
from common.flags import Reading, exit_on_bad_input, flag, parse_flags, several_models
from common.models import causal_lm, load_model, load_tokenizer
from common.plot import plot_internal
from common.sampling import join, sample


def first_blocks(model, layer: int, final_norm: bool = False) -> nn.Module:
    """The model's trunk cut off after block `layer` (1-based): a view that shares every weight and runs nothing above it.

    Its output is H^layer, or norm(H^layer) with final_norm. The model itself is left as it is. ValueError outside 1..L.
    """
    trunk = causal_lm(model).model
    if not 1 <= layer <= len(trunk.layers):
        raise ValueError(f"layer {layer} is not one of the model's 1..{len(trunk.layers)}")
    view = copy.copy(trunk)
    view._modules = {**trunk._modules, "layers": trunk.layers[:layer], "norm": trunk.norm if final_norm else nn.Identity()}
    return view


def hidden_states(model, input_ids, attention_mask=None, layer: int | None = None, final_norm: bool = False) -> torch.Tensor:
    """ids (B, S) -> (B, S, D), what the unembedding reads: norm(H^L) for layer None or L, else H^layer as in eq. 5, normed with
    final_norm. ValueError outside 1..L."""
    gather_rest(causal_lm(model))
    trunk = causal_lm(model).model
    if layer is not None and layer != len(trunk.layers):
        trunk = first_blocks(model, layer, final_norm)
    return trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def layer_logits(model, input_ids, attention_mask=None, layer: int | None = None, final_norm: bool = False) -> torch.Tensor:
    """Logits (B, T, V) of the policy of block `layer` (1-based, eq. 5); None or L is the model's own policy.

    Blocks above `layer` are not run and receive no gradient. final_norm applies the model's last norm first (the logit lens).
    Builds the whole (B, T, V): for looking and for tests; training goes through common/logprobs.py.
    """
    return causal_lm(model).lm_head(hidden_states(model, input_ids, attention_mask, layer, final_norm))


def layer_policy(model, layer: int):
    """The model cut off after block `layer` (1-based), as a view that common.sampling.sample takes as it is.

    Answers are then drawn from softmax(layer_logits(model, ..., layer)), with a cache for these blocks alone. Layer L is the
    model itself, final norm and all. ValueError outside 1..L.
    """
    lm = causal_lm(model)
    if layer == len(lm.model.layers):
        return model
    view = copy.copy(lm)
    view._modules = {**lm._modules, "model": first_blocks(model, layer)}
    return view


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits) over the last axis, in float32 (eq. 7)."""
    logp = torch.log_softmax(logits.float(), -1)
    return -(logp.exp() * logp).sum(-1)


QUANTITIES = {  # of a stream (n, D) -> (n,)
    "entropy": lambda lm, x: entropy(lm.lm_head(x)),
    "final_norm": lambda lm, x: entropy(lm.lm_head(lm.model.norm(x))),
    "l2_norm": lambda lm, x: x.float().norm(dim=-1),
}


@torch.no_grad()
def internal_view(model, input_ids, attention_mask, mask, chunk: int | None = None, controls: bool = True,
                  tick=lambda: None) -> dict[str, dict[str, torch.Tensor]]:
    """What flows through every block: means over the positions where mask (B, T) is 1. -> {quantity: {stream: (L,)}}

        "entropy"     of softmax(x E^T), nats (eq. 7), for the streams x
                          "layer_in", "layer_out"   H^{l-1}, H^l: the residual stream, un-normed
                          "attn_in", "ffn_in"       what the two modules read: *normed*
                          "attn_out", "ffn_out"     A^l, F^l: what they add to the stream, un-normed (eqs. 11-13)
        "final_norm"  of softmax(norm(x) E^T), nats: every stream read at one size, the control
        "l2_norm"     ||x||
        "cosine"      "attn": cos(A^l, H^{l-1}), "ffn": cos(F^l, H^{l-1} + A^l): about 0 adds something new, below takes
                      away, above amplifies

    One forward. A stream becomes numbers on the spot, `chunk` tokens at a time (default: 2^24 logits), so memory grows with
    neither L nor V. Without controls only "entropy", at half the price. tick() is called after every block. BadInput for
    blocks of another kind; which kind they are is seen from the tensors, not from the name.
    """
    lm, keep = causal_lm(model), mask.bool()
    chunk, caught, blocks, cosines, handles = chunk or max(1, (1 << 24) // lm.config.vocab_size), {}, [], [], []
    quantities = [name for name in QUANTITIES if controls or name == "entropy"]
    tensor = lambda output: output[0] if isinstance(output, tuple) else output
    differ = lambda x, y: (x - y).norm() > 0.01 * y.norm()

    def refuse(why):
        raise BadInput(f"{type(lm).__name__} is not supported: {why}; need blocks h = H + self_attn(input_layernorm(H)), "
                       "h + mlp(post_attention_layernorm(h)) (Qwen2, Qwen3, Llama, Mistral and their kin)")

    def measure(x):                                                                     # (N, D) -> {quantity: mean}
        return {name: sum(QUANTITIES[name](lm, piece).sum().item() for piece in x.split(chunk)) / len(x) for name in quantities}

    def leave(block, args, output):
        attn, fed, ffn = (caught.pop(name)[keep] for name in ("attn_out", "ffn_in", "ffn_out"))  # (N, D) each
        before, after = args[0][keep], tensor(output)[keep]                             # (N, D) each, H^{l-1} and H^l
        middle = before + attn                                                          # (N, D), what the FFN adds to
        streams = {"attn_in": block.input_layernorm(before), "attn_out": attn,
                   "ffn_in": block.post_attention_layernorm(middle), "ffn_out": ffn, "layer_out": after}
        if differ(fed, streams["ffn_in"]) or differ(middle + ffn, after):
            refuse("its blocks do not just add what attention and FFN put out")
        entering = {"layer_in": blocks[-1]["layer_out"] if blocks else measure(before)}  # the same tensor: not read twice
        blocks.append(entering | {name: measure(x) for name, x in streams.items()})
        cosines.append([torch.cosine_similarity(x.float(), stream.float(), dim=-1).mean().item()
                        for x, stream in ((attn, before), (ffn, middle))])
        tick()

    for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        if any(getattr(block, name, None) is None for block in lm.model.layers):
            refuse(f"not every block has {name}")
    for block in lm.model.layers:
        handles += [
            block.self_attn.register_forward_hook(lambda _m, _args, output: caught.update(attn_out=tensor(output))),
            block.mlp.register_forward_hook(lambda _m, args, output: caught.update(ffn_in=args[0], ffn_out=tensor(output))),
            block.register_forward_hook(leave)]
    try:
        with gathered(lm):
            lm.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    view = {name: {stream: torch.tensor([of[stream][name] for of in blocks]) for stream in blocks[0]} for name in quantities}
    return view | ({"cosine": dict(zip(("attn", "ffn"), torch.tensor(cosines).T))} if controls else {})


def internal_entropies(model, input_ids, attention_mask, mask, chunk: int | None = None) -> dict[str, torch.Tensor]:
    """internal_view's "entropy" alone: {"layer_in", "layer_out", "attn_in", "attn_out", "ffn_in", "ffn_out"}, (L,) nats each."""
    return internal_view(model, input_ids, attention_mask, mask, chunk, controls=False)["entropy"]


def rollout_view(model, rollout, budget: int, tokens: int = 0, seed: int = 0, controls: bool = True,
                 progress: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """internal_view pooled over answer tokens of a rollout, about `budget` tokens, prompts and all, in one forward pass.

    tokens > 0 pools that many of them, drawn uniformly by the seed; answers without a drawn token are not run.
    """
    total, generator = int(rollout.lengths.sum()), torch.Generator().manual_seed(seed)
    drawn = torch.randperm(total, generator=generator) < (tokens or total)              # (N,), answer after answer
    drawn = drawn.split(rollout.lengths.tolist())                                       # B of (T_i,)
    rows = torch.tensor([row for row, picked in enumerate(drawn) if picked.any()])      # (R,)
    longest = max(len(prompt) + int(k) for prompt, k in zip(rollout.prompts, rollout.lengths))
    parts, views, L = rows.split(max(1, budget // longest)), [], len(causal_lm(model).model.layers)
    with tqdm(total=len(parts) * L, desc="reading blocks", unit="block", disable=not progress) as bar:
        for part in parts:
            here = part.to(rollout.tokens.device)                                       # (b,)
            ids, predicts = join([rollout.prompts[i] for i in part], rollout.tokens[here], rollout.lengths[here])  # (b, S) each
            predicts[predicts.clone()] = torch.cat([drawn[i] for i in part]).to(predicts.device)
            share = predicts.sum().item() / min(tokens or total, total)
            views.append((share, internal_view(model, ids, None, predicts, None, controls, bar.update)))
    return {quantity: {stream: sum(share * view[quantity][stream] for share, view in views) for stream in streams}
            for quantity, streams in views[0][1].items()}


def rollout_entropies(model, rollout, budget: int) -> dict[str, torch.Tensor]:
    """internal_entropies pooled over all answer tokens of a rollout, about `budget` tokens in one forward pass."""
    return rollout_view(model, rollout, budget, controls=False)["entropy"]


def entropy_changes(entropies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entropy of what leaves minus entropy of what enters, per block (eqs. 8, 11-13) -> {"attn", "ffn", "layer"}, each (L,)."""
    return {name: entropies[f"{name}_out"] - entropies[f"{name}_in"] for name in ("attn", "ffn", "layer")}


def boundary_layer(ffn_change, tolerance: float = 0.05) -> int:
    """The 1-based block where exploration ends: the last of the first run of blocks whose FFN raises entropy.

    ffn_change: (L,) nats. A change of at most tolerance * max|change| counts as zero (the paper names no threshold; its
    Qwen3-4B hovers about zero from block 7 to 26). Leading blocks that do not raise it are skipped. ValueError if none does.
    """
    change = torch.as_tensor(ffn_change).cpu().double()
    rises = (change > tolerance * change.abs().max()).tolist()
    if True not in rises:
        raise ValueError("no block's FFN raises the entropy, so there is no exploration region: name a layer yourself")
    first = rises.index(True)
    return first + (rises[first:] + [False]).index(False)


def boundaries(entropies: dict[str, torch.Tensor], tolerances=(0.01, 0.02, 0.05, 0.1, 0.2)) -> dict[float, int | None]:
    """boundary_layer at several tolerances: does the choice hang on it? None where no FFN raises the entropy."""
    change = entropy_changes(entropies)["ffn"].cpu().double()                           # (L,)
    return {t: boundary_layer(change, t) if (change > t * change.abs().max()).any() else None for t in tolerances}


def print_view(view: dict[str, dict[str, torch.Tensor]]) -> None:
    """A model's table: the entropy of each block's policy and what its modules change, un-normed and with the final norm."""
    kinds = {"entropy": "as in the paper", "final_norm": "with the final norm"}
    found, change = ({kind: of(view[kind]) for kind in kinds} for of in (boundaries, entropy_changes))
    columns = [x for kind in kinds for x in (view[kind]["layer_out"], change[kind]["ffn"], change[kind]["attn"])]  # 6 of (L,)
    print("        as in the paper (nats)                          with the final norm (nats)\n"
          "block   entropy   FFN change   attention change  ||H||   entropy   FFN change   attention change")
    for l, (*paper, h, f, a, size) in enumerate(zip(*columns, view["l2_norm"]["layer_out"]), 1):
        mark = "   <- boundary" + ", but that is the whole model" * (l == len(columns[0])) if l == found["entropy"][0.05] else ""
        print("{:5} {:9.3f} {:+12.3f} {:+18.3f} {:6.4g} {:9.3f} {:+12.3f} {:+18.3f}".format(l, *paper, size, h, f, a) + mark)
    print("boundary: the end of the first run of blocks whose FFN raises entropy by more than tolerance x the largest change\n"
          f"   {'tolerance':20}" + "".join(f"{tolerance:>6}" for tolerance in found["entropy"]))
    for kind, title in kinds.items():
        print(f"   {title:20}" + "".join(f"{layer or 'none':>6}" for layer in found[kind].values()))


@dataclass
class Config:
    model: str = flag("tiny", "tiny, a local model or run folder, or a hub id; several are drawn into the same figures")
    samples: int = flag(100, "answers, one to each of so many problems; the authors' default", low=1)
    max_new_tokens: int = flag(96, "longest answer in tokens; the authors' script: 3072", real=1024, low=1)
    tokens: int = flag(0, "answer tokens to pool, drawn uniformly; 0 takes all as the paper does", real=20000, low=0)
    sample_layer: int = flag(None, "print a few answers of this block's own policy, 1 = lowest", type=int, low=1)
    micro_batch_tokens: int = flag(4096, "prompt and answer tokens in one forward pass", real=16384, low=1)
    seed: int = flag(0, "draws problems, answers and tokens", low=0)
    output: str = flag("runs/internal_policy", "new or empty folder for entropies.json, flow.png, changes.png, cosines.png")


@exit_on_bad_input
def main(argv=None):
    names, rest = several_models(sys.argv[1:] if argv is None else argv)
    cfg = parse_flags(Config, Reading, description=__doc__, argv=rest)
    folder = pathlib.Path(cfg.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"--output {folder}: holds something already; choose another folder")
    problems = load_problems(cfg.data, cfg.split, cfg.prompt_column, cfg.answer_column, True, cfg.seed, cfg.samples)
    ready = {}
    for name in names:  # everything is checked before anything is written
        tokenizer, model = load_tokenizer(name), load_model(name, cfg.device, cfg.dtype, cuda_graphs=cfg.cuda_graphs, frozen=True)
        config, probe = causal_lm(model).config, torch.arange(2, device=next(model.parameters()).device)[None]  # (1, 2)
        internal_view(model, probe, None, probe >= 0, controls=False)  # two tokens, since the embedding of a padding token is 0
        if cfg.sample_layer and cfg.sample_layer > config.num_hidden_layers:
            raise BadInput(f"--sample-layer {cfg.sample_layer}: {name} has blocks 1 (lowest) to {config.num_hidden_layers}")
        rows = encode_prompts(tokenizer, problems, cfg.system, cfg.thinking, config.max_position_embeddings - cfg.max_new_tokens)
        ready[name] = tokenizer, model, [row["prompt"] for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output {folder}: cannot write there ({error.strerror})") from error
    views = {}
    for name, (tokenizer, model, prompts) in ready.items():
        print(f"\n{name}: first prompt {tokenizer.decode(prompts[0])!r}")
        if cfg.sample_layer:
            part, longest = layer_policy(model, cfg.sample_layer), min(cfg.max_new_tokens, 64)
            said = sample(part, tokenizer, prompts[:3], 2, longest, seed=cfg.seed, alone=True)
            print(f"block {cfg.sample_layer} says, to the first {len(prompts[:3])} prompts:", *map(repr, said.texts), sep="\n   ")
        rollout = sample(model, tokenizer, prompts, 1, cfg.max_new_tokens, seed=cfg.seed, alone=True)
        (V, D), total = causal_lm(model).lm_head.weight.shape, int(rollout.lengths.sum())
        pooled = min(cfg.tokens or total, total)
        price = (10 * model.config.num_hidden_layers + 2) * 2 * D * V * pooled / 1e12
        print(f"{len(prompts)} answers, {pooled} of their {total} tokens pooled: {price:.3g} TFLOP; ln V {math.log(V):.3f} nats")
        view = rollout_view(model, rollout, cfg.micro_batch_tokens, cfg.tokens, cfg.seed, progress=True)
        print_view(view)
        views[name] = {"answers": len(prompts), "tokens": pooled, "vocabulary": V}
        views[name] |= {quantity: {stream: x.tolist() for stream, x in streams.items()} for quantity, streams in view.items()}
        views[name]["boundary"] = {kind: boundaries(view[kind]) for kind in ("entropy", "final_norm")}
    if rank() > 0:
        return
    (folder / "entropies.json").write_text(json.dumps({"flags": {**vars(cfg), "model": names}, "models": views}, indent=1))
    plot_internal(views, folder)
    print(f"\nwritten: {folder}/entropies.json, flow.png, changes.png, cosines.png")


if __name__ == "__main__":
    main()
