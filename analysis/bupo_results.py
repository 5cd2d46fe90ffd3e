"""BuPO's claims on the embedded model -> docs/results/bupo.{json,md} and its figures.

    python docs/bupo_results.py            # twelve arms, five seeds, two runs at a time: forty minutes; finished runs are kept
"""
import math
import statistics

import experiment as ex
import matplotlib.pyplot as plt
import torch
from experiment import BLUE, GREEN, ORANGE, PURPLE, VERMILION

from common.data import encode_prompts, load_problems
from common.internal_policy import boundaries, entropy_changes, hidden_states, rollout_view
from common.logprobs import response_logprobs
from common.models import causal_lm, load_model, load_tokenizer
from common.optim import MasterAdamW
from common.sampling import join, sample
from common.verify import reward

BOUNDARY = 5  # what --layer auto chooses for the embedded model
EVAL = "--eval-problems 128 --eval-k 64"


@torch.no_grad()
def probe(run) -> dict:
    """Perplexity of the model on its own answers and on right answers of the initial model; over the latter's tokens the entropy
    change of every block (eq. 8) and the cosine of H^l with H^j, as in Figures 4 and 5 of the paper."""
    prompts = [row["prompt"] for row in run.held_out[:16]]
    own = sample(run.model, run.tokenizer, prompts, 4, run.cfg.max_new_tokens, seed=5)
    if not hasattr(run, "fixed"):
        golds = [row["answer"] for row in run.held_out[:16] for _ in range(4)]
        run.fixed = own[torch.tensor([i for i, gold in enumerate(golds) if reward(own.texts[i], gold)])]
    fixed, lm = run.fixed, causal_lm(run.model)
    logp, _ = response_logprobs(run.model, fixed)                                       # (b, T)
    ids, predicts = join(fixed.prompts, fixed.tokens, fixed.lengths)                    # (b, S) each
    streams = [first[predicts] for first in all_streams(lm, ids)]                       # L of (N, D)
    cosine = [[torch.cosine_similarity(x, y, dim=-1).mean().item() for y in streams] for x in streams]
    entropies = rollout_view(run.model, fixed, 4096, controls=False)["entropy"]
    rounded = lambda values: [round(float(v), 4) for v in values]
    return {"ppl_own": math.exp(-own.logp.sum().item() / own.lengths.sum().item()),
            "ppl_fixed": math.exp(-logp.sum().item() / fixed.lengths.sum().item()),
            "layer_change": rounded(entropy_changes(entropies)["layer"]), "cosine": [rounded(row) for row in cosine]}


def all_streams(lm, ids):
    """H^1 .. H^L, raw: the block outputs before the final norm, caught as they pass."""
    caught = []
    handles = [block.register_forward_hook(lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out))
               for block in lm.model.layers]
    hidden_states(lm, ids)
    for handle in handles:
        handle.remove()
    return caught


def slow_above(run, _optimizer):
    """Plain GRPO with a tenth of the learning rate in the blocks above the boundary."""
    optimizer, lr = MasterAdamW(run.model, run.cfg.lr), run.cfg.lr
    high = {id(p) for block in causal_lm(run.model).model.layers[BOUNDARY:] for p in block.parameters()}
    groups = [{"params": [p for p in optimizer.masters if (id(p) in high) == slow], "lr": lr * (0.1 if slow else 1)}
              for slow in (False, True)]
    optimizer.adamw = torch.optim.AdamW(groups, weight_decay=0.01)
    return optimizer


def frozen_below(run, _optimizer):
    """Plain GRPO with the embedding and the blocks up to the boundary frozen."""
    trunk = causal_lm(run.model).model
    for module in (trunk.embed_tokens, *trunk.layers[:BOUNDARY]):
        module.requires_grad_(False)
    return MasterAdamW(run.model, run.cfg.lr)


ARMS = {  # name -> script, flags, colour, line, what is watched
    "GRPO": ("grpo.py", EVAL, BLUE, "-", dict(probe=probe)),
    "RLOO": ("grpo.py", f"{EVAL} --advantage rloo", BLUE, "--"),
    "REINFORCE++": ("grpo.py", f"{EVAL} --advantage reinforce++", BLUE, ":"),
    "BuPO": ("bupo.py", EVAL, VERMILION, "-", dict(probe=probe)),                                       # 3 of 32 steps: 9 %
    "BuPO 5 steps": ("bupo.py", f"{EVAL} --internal-steps 5", VERMILION, "--"),                         # 16 %
    "BuPO 7 steps": ("bupo.py", f"{EVAL} --internal-steps 7", VERMILION, ":", dict(probe=probe)),       # 22 %
    "BuPO final norm": ("bupo.py", f"{EVAL} --layer {BOUNDARY} --final-norm", ORANGE, "-"),
    "GRPO slow above": ("grpo.py", EVAL, PURPLE, "-", dict(prepare=slow_above)),
    "GRPO frozen below": ("grpo.py", EVAL, PURPLE, "--", dict(prepare=frozen_below)),
    "block 2 only": ("bupo.py", f"{EVAL} --layer 2 --internal-steps 32", GREEN, ":", dict(probe=probe)),
    "block 5 only": ("bupo.py", f"{EVAL} --layer 5 --internal-steps 32", GREEN, "--", dict(probe=probe)),
    "block 7 only": ("bupo.py", f"{EVAL} --layer 7 --internal-steps 32", GREEN, "-", dict(probe=probe)),
}


def depth_table() -> str:
    """Entropy of the blocks' policies and what attention and FFN change, of the model before training."""
    model, tokenizer = load_model("tiny", "cpu", "float32"), load_tokenizer("tiny")
    rows = encode_prompts(tokenizer, load_problems("arithmetic", held_out=True, count=100), "", False, 400)
    view = rollout_view(model, sample(model, tokenizer, [row["prompt"] for row in rows], 1, 96, seed=0), 4096)
    change, normed = entropy_changes(view["entropy"]), entropy_changes(view["final_norm"])
    V = model.config.vocab_size
    lines = [[l + 1, f"{view['entropy']['layer_out'][l]:.3f}", f"{change['ffn'][l]:+.3f}", f"{change['attn'][l]:+.3f}",
              f"{view['l2_norm']['layer_out'][l]:.1f}", f"{view['final_norm']['layer_out'][l]:.3f}", f"{normed['ffn'][l]:+.3f}"]
             for l in range(model.config.num_hidden_layers)]
    found = {kind: ", ".join(f"{t} gives {l}" for t, l in boundaries(view[kind]).items()) for kind in ("entropy", "final_norm")}
    last = 1 + max(entropy_changes(view["entropy"])["ffn"].gt(0).nonzero()).item()
    heads = ["block", "entropy of its policy, nats", "FFN change", "attention change", "size of H",
             "with the final norm: entropy", "FFN change"]
    return ex.table(heads, lines) + (
        f"\nln V is {math.log(V):.3f}; the stream that enters block 1 has {view['entropy']['layer_in'][0]:.3f} nats. The "
        f"boundary (end of the first run of rises) by tolerance: without the final norm, as in the paper, {found['entropy']}; "
        f"with it {found['final_norm']}. The last block whose FFN raises entropy, the paper's words, is {last}.\n")


def main():
    args = ex.arguments(__doc__, seeds=5)
    results = ex.runs("bupo", ARMS, args.seeds, args.workers, first=5)  # not docs/main_results.py's: the two are added up
    after = lambda name, key="avg_at_k_after": [r["summary"][key] for r in results[name]]
    at = lambda name, k: [r["summary"]["pass_at_after"][str(k)] for r in results[name]]
    last = lambda name, key: [statistics.fmean(row[key] for row in r["rows"][-4:]) for r in results[name]]
    heads = ["arm", "Avg@64", "minus GRPO, paired seeds", "BuPO minus it", "Pass@8", "Pass@64", "tokens", "entropy, last 4 steps",
             "most truncated in a step"]
    arms = ex.table(heads, [[
        name, ex.spread(after(name)), "" if name == "GRPO" else ex.paired(after(name), after("GRPO")),
        "" if name == "BuPO" else ex.paired(after("BuPO"), after(name)), ex.spread(at(name, 8)), ex.spread(at(name, 64)),
        f"{statistics.fmean(after(name, 'length_after')):.0f}", ex.spread(last(name, "entropy")),
        f"{max(row['truncated'] for r in results[name] for row in r['rows']):.0%}"] for name in ARMS])
    probed = [name for name in ARMS if results[name][0]["probe"]]
    ends = lambda name, read: " to ".join(f"{statistics.fmean(read(r['probe'][i]) for r in results[name]):.3f}" for i in (0, -1))
    inside = ex.table(["arm", "perplexity of its own answers", "of fixed right answers", "cosine(H^5, H^8)", "cosine(H^2, H^8)",
                    "entropy change of block 2", "of block 5", "of block 7"],
                   [[name, *(ends(name, read) for read in (
                       lambda p: p["ppl_own"], lambda p: p["ppl_fixed"], lambda p: p["cosine"][4][7], lambda p: p["cosine"][1][7],
                       *(lambda p, l=l: p["layer_change"][l - 1] for l in (2, 5, 7))))] for name in probed])
    passes = ex.table(["arm", *(f"Pass@{k}" for k in (1, 2, 4, 8, 16, 32, 64))],
                   [[name, *(f"{statistics.fmean(at(name, k)):.3f}" for k in (1, 2, 4, 8, 16, 32, 64))] for name in ARMS])
    ex.write("bupo", results, {"arms": arms, "inside": inside, "passes": passes, "depth": depth_table()})

    out, titles = ex.ROOT / "docs" / "results", {"reward": "share of answers right", "length": "tokens per answer",
                                              "entropy": "entropy, nats per token"}
    figure, rows = plt.subplots(2, 3, figsize=(13, 7.6), constrained_layout=True)
    for axes, names in zip(rows, (list(ARMS)[:6], ["GRPO", *list(ARMS)[6:9], "BuPO"])):
        for axis, (key, title) in zip(axes, titles.items()):
            for name in names:
                ex.band(axis, [ex.smooth(r["rows"], key) for r in results[name]], name, ARMS[name][2], ARMS[name][3],
                     fill=ARMS[name][3] == "-")
            ex.tidy(axis, title, legend=key == "reward")
    figure.savefig(out / "bupo.png", dpi=110)

    figure, rows = plt.subplots(2, 3, figsize=(13, 7.6), constrained_layout=True)
    for name in ["GRPO", *list(ARMS)[9:]]:
        own, of = ARMS[name], results[name]
        style = dict(label=name, color=own[2], style=own[3], fill=own[3] == "-")
        layer = int(name.split()[1]) if name.startswith("block") else BOUNDARY
        for axis, key in zip(rows[0], titles):
            ex.band(axis, [ex.smooth(r["rows"], key) for r in of], **style)
        steps = [p["step"] for p in of[0]["probe"]]
        for axis, read in zip(rows[1], (lambda p: p["ppl_own"], lambda p, l=layer: statistics.fmean(p["cosine"][l - 1][l:]),
                                        lambda p, l=layer: p["layer_change"][l - 1])):
            ex.band(axis, [[read(p) for p in r["probe"]] for r in of], x=steps, **style)
    for axis, title in zip(rows.flat, [*titles.values(), "perplexity of its own answers",
                                       "cosine of H^l with later blocks", "entropy change of block l, nats"]):
        ex.tidy(axis, title, legend=axis is rows[0][0])
    rows[1][0].set_ylim(1, 2)
    figure.savefig(out / "bupo_blocks.png", dpi=110)

    figure, axis = plt.subplots(figsize=(6.5, 4.4), constrained_layout=True)
    for name in list(ARMS)[:6]:
        ex.band(axis, [[r["summary"]["pass_at_after"][str(k)] for k in range(1, 65)] for r in results[name]], name, ARMS[name][2],
             ARMS[name][3], fill=ARMS[name][3] == "-")
    axis.set_xscale("log", base=2)
    ex.tidy(axis, "Pass@k", "k answers", legend=True)
    figure.savefig(out / "bupo_pass.png", dpi=110)


if __name__ == "__main__":
    main()
