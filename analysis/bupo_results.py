"""BuPO's claims on the embedded model -> results/bupo.{json,md} and its figures.

    python -m analysis.bupo_results                    # all of it, an hour and a half on two cores
    python -m analysis.bupo_results --parts again      # seeds 10 to 14
    python -m analysis.bupo_results --parts layers updates --seeds 3
    python -m analysis.bupo_results --parts scaled --seeds 2

Accuracy: 8 answers to each of 1,024 held-out problems. Seeds 0 to 4 are those of
analysis.main_results, 5 to 9 of the part "arms" and from 10 on of the others, so that they add up.
"""
import json
import math
from dataclasses import replace
from functools import partial

import torch

import bupo as script
import grpo
from analysis import experiment as ex
from analysis import internal
from analysis.experiment import BLUE, GREY, ORANGE, Arm, mean
from common.data import encode_prompt, load_problems
from common.internal_policy import (
    block_streams,
    boundary_layer,
    entropy_changes,
    internal_entropies,
)
from common.logprobs import response_logprobs
from common.models import load_model, load_tokenizer
from common.sampling import join, sample
from common.tiny.train import scale_residual
from common.verify import verify

BOUNDARY = 5  # what --layer auto chooses for the embedded model
EVAL = "--eval-problems 1024"
PASSES = (1, 2, 4, 8)
TITLES = {
    "reward": "share of sampled answers that are right",
    "length": "tokens per answer",
    "entropy": "entropy, nats per token",
}


def right_answers(rollout, rows: list[dict]):
    """The answers of a rollout that are right, four to each row."""
    right = []
    for i, text in enumerate(rollout.texts):
        if verify(text, rows[i // 4]["answer"]) == 1:
            right.append(i)
    return rollout[torch.tensor(right)]


def block_outputs(model, ids, predicts) -> list[torch.Tensor]:
    """H^1 .. H^L at the answers' tokens, (N, D) each."""
    outputs = []

    def visit(streams):
        outputs.append(streams["layer_out"])

    block_streams(model, ids, None, predicts, visit)
    return outputs


def rounded(values) -> list[float]:
    return [round(float(value), 4) for value in values]


@torch.no_grad()
def probe(run) -> dict:
    """Figures 4 and 5 of the paper: perplexity of the model on its own answers and on right answers
    of the initial model; over the latter's tokens the entropy change of every block (eq. 8) and the
    cosine of H^l with H^j."""
    rows = run.held_out[:16]
    own = sample(run.model, run.tokenizer, run.encode(rows), 4, run.args.max_new_tokens, seed=5)
    if not hasattr(run, "fixed"):
        run.fixed = right_answers(own, rows)
    fixed = run.fixed
    logp = response_logprobs(run.model, fixed)                                  # (b, T)
    ids, predicts = join(fixed)                                                 # (b, S) each
    streams = block_outputs(run.model, ids, predicts)
    cosine = []
    for x in streams:
        means = [torch.cosine_similarity(x, y, dim=-1).mean() for y in streams]
        cosine.append(rounded(means))
    entropies = internal_entropies(run.model, ids, None, predicts)
    return {
        "ppl_own": math.exp(-own.logp.sum().item() / own.lengths.sum().item()),
        "ppl_fixed": math.exp(-logp.sum().item() / fixed.lengths.sum().item()),
        "layer_change": rounded(entropy_changes(entropies)["layer"]),
        "cosine": cosine,
    }


def slow_above(run, optimizer) -> None:
    """Plain GRPO with a tenth of the learning rate in the blocks above the boundary."""
    above = run.model.model.layers[BOUNDARY:]
    slow = list(above.parameters())
    ids = {id(weight) for weight in slow}
    group = optimizer.param_groups[0]
    group["params"] = [weight for weight in group["params"] if id(weight) not in ids]
    optimizer.add_param_group({"params": slow, "lr": 0.1 * run.args.lr})


def frozen_below(run, _optimizer) -> None:
    """Plain GRPO with the embedding and the blocks up to the boundary frozen."""
    trunk = run.model.model
    trunk.embed_tokens.requires_grad_(False)
    for block in trunk.layers[:BOUNDARY]:
        block.requires_grad_(False)


def bupo(flags: str, **kwargs) -> Arm:
    return Arm("bupo.py", f"{EVAL} {flags}", **kwargs)


ARMS = {
    "GRPO": Arm("grpo.py", EVAL, BLUE, probe=probe),
    "RLOO": Arm("grpo.py", f"{EVAL} --advantage rloo", BLUE, "--"),
    "REINFORCE++": Arm("grpo.py", f"{EVAL} --advantage reinforce++", BLUE, ":"),
    "BuPO": bupo("", color=ORANGE, probe=probe),  # 3 of 32 steps: 9 %
    "BuPO 5 steps": bupo("--internal-steps 5", color=ORANGE, style="--"),
    "BuPO 7 steps": bupo("--internal-steps 7", color=ORANGE, style=":", probe=probe),
    "BuPO final norm": bupo(f"--layer {BOUNDARY} --final-norm", color=ORANGE, style="--"),
    "GRPO slow above": Arm("grpo.py", EVAL, GREY, "--", prepare=slow_above),
    "GRPO frozen below": Arm("grpo.py", EVAL, GREY, prepare=frozen_below),
}
for block, line_style in ((2, ":"), (5, "--"), (7, "-")):
    ARMS[f"block {block} only"] = bupo(f"--layer {block} --internal-steps 32", color=ORANGE,
                                       style=line_style, probe=probe)
NAMES = list(ARMS)
SIDES = NAMES[:6], ["GRPO", *NAMES[6:9], "BuPO"]  # what is drawn together
AGAIN = {}
for name in ("GRPO", "BuPO", "GRPO frozen below"):
    AGAIN[name] = replace(ARMS[name], probe=None)
SCALES = (1, 2, 4)  # of the stream: 1 as it was trained, 2 the embedded model


def one_block(number: int, run, _optimizer) -> None:
    """Plain GRPO with everything but one block frozen."""
    run.model.requires_grad_(False)
    run.model.model.layers[number - 1].requires_grad_(True)


LAYERS = {"GRPO": AGAIN["GRPO"]}
for block in range(1, 8):
    if block == BOUNDARY:
        LAYERS["BuPO"] = AGAIN["BuPO"]
    else:
        LAYERS[f"BuPO, block {block}"] = bupo(f"--layer {block}")
for block in (4, 6):
    LAYERS[f"GRPO, block {block} alone"] = Arm("grpo.py", EVAL, prepare=partial(one_block, block))


def dual_clip(_run, _optimizer) -> None:
    """The authors' dual clip at 10, which bupo.py leaves out, in BuPO's loss."""
    def loss(logp, old_logp, advantages, mask, clip_low, clip_high, denominator):
        return grpo.grpo_loss(logp, old_logp, advantages, mask, clip_low, clip_high, 10,
                              denominator)

    script.grpo_loss = loss


FOUR = "--updates-per-rollout 4 --lr 1e-4"
UPDATES = {
    "GRPO, 4 updates": Arm("grpo.py", f"{EVAL} {FOUR} --dual-clip 10"),
    "BuPO, 4 updates": bupo(FOUR, prepare=dual_clip),
}
SCALED = {"GRPO": AGAIN["GRPO"], "BuPO": AGAIN["BuPO"]}
for scale in (1, 4):
    place = f"--model {{runs}}/scale_{scale}"
    SCALED[f"GRPO, scale {scale}"] = Arm("grpo.py", f"{EVAL} {place}")
    SCALED[f"BuPO, scale {scale}"] = bupo(place)


def depth_table() -> str:
    """What the blocks of the model say before training."""
    args = internal.Args(device="cpu")
    model = load_model(args, trained=False)
    tokenizer = load_tokenizer("tiny")
    problems = load_problems("arithmetic", "test", count=100)
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in problems]
    view = internal.rollout_view(model, sample(model, tokenizer, prompts, 1, 96), 4096)
    change = entropy_changes(view["entropy"])
    normed = entropy_changes(view["final_norm"])
    rows = []
    for i in range(model.config.num_hidden_layers):
        rows.append([
            i + 1,
            f"{view['entropy']['layer_out'][i]:.3f}",
            f"{change['ffn'][i]:+.3f}",
            f"{change['attn'][i]:+.3f}",
            f"{view['l2_norm']['layer_out'][i]:.1f}",
            f"{view['final_norm']['layer_out'][i]:.3f}",
            f"{normed['ffn'][i]:+.3f}",
        ])
    found = {}
    for kind in internal.TITLES:
        layers = internal.boundaries(view[kind]).items()
        found[kind] = ", ".join(f"{tolerance} gives {layer}" for tolerance, layer in layers)
    last = 1 + int(change["ffn"].gt(0).nonzero().max())
    heads = ["block", "entropy of its policy, nats", "FFN change", "attention change",
             "size of its output", "with the final norm: entropy", "FFN change"]
    return ex.table(heads, rows) + (
        f"\nln V is {math.log(model.config.vocab_size):.3f}; the stream that enters block 1 has "
        f"{view['entropy']['layer_in'][0]:.3f} nats. The boundary (end of the first run of rises) "
        f"by tolerance: without the final norm, as in the paper, {found['entropy']}; with it "
        f"{found['final_norm']}. The last block whose FFN raises entropy, the paper's words, is "
        f"{last}.\n")


def arms_table(results) -> str:
    heads = ["arm", "Avg@8", "minus GRPO, paired seeds", "BuPO minus it", "Pass@8", "tokens",
             "entropy, last 4 steps", "most truncated in a step"]
    rows = []
    for name in NAMES:
        values = results.accuracy(name)
        grpo, best = results.accuracy("GRPO"), results.accuracy("BuPO")
        cut = [row["truncated"] for result in results[name] for row in result["rows"]]
        rows.append([
            name,
            ex.spread(values),
            "" if name == "GRPO" else ex.paired(values, grpo),
            "" if name == "BuPO" else ex.paired(best, values),
            ex.spread(results.pass_at(name, 8)),
            f"{mean(results.summary(name, 'length_after')):.0f}",
            ex.spread(results.metric(name, "entropy", last=4)),
            f"{max(cut):.0%}",
        ])
    return ex.table(heads, rows)


def minus(results, name: str, other: str) -> str:
    """Paired difference, its error over seeds, and (with other problems, too)."""
    values = ex.paired(results.accuracy(name), results.accuracy(other))
    return f"{values} ({ex.crossed(results[name], results[other]):.3f})"


def again_table(results) -> str:
    rows = []
    for name in AGAIN:
        values = results.accuracy(name)
        rows.append([
            name,
            ex.spread(values),
            "" if name == "GRPO" else minus(results, name, "GRPO"),
            "" if name == "BuPO" else minus(results, "BuPO", name),
            ex.spread(results.pass_at(name, 8)),
            f"{mean(results.summary(name, 'length_after')):.0f}",
            ex.spread(results.metric(name, "entropy", last=4)),
        ])
    before = results["GRPO"][0]["summary"]
    heads = ["arm", "Avg@8", "minus GRPO", "BuPO minus it", "Pass@8", "tokens",
             "entropy, last 4 steps"]
    return ex.table(heads, rows) + (
        f"\nBefore: {before['avg_at_k_before']:.3f} ± {before['standard_error_before']:.3f} over "
        "problems. Differences are paired by seed, ± their standard error over seeds (in "
        "brackets: with the problems drawn anew as well).\n")


def stored(page: str, name: str) -> list[float]:
    """The accuracies of an arm of another JSON file."""
    found = json.loads((ex.PAGES / f"{page}.json").read_text())
    return [result["avg_at_k_after"] for result in found[name]]


def together_table(results) -> str:
    """Seeds 0 to 4, 5 to 9 and these; each seed once."""
    rows = []
    for name, other in (("BuPO", "GRPO"), ("GRPO frozen below", "GRPO"),
                        ("BuPO", "GRPO frozen below")):
        sets = [[], ex.differences(stored("bupo", name), stored("bupo", other)),
                ex.differences(results.accuracy(name), results.accuracy(other))]
        if "GRPO frozen below" not in (name, other):
            sets[0] = ex.differences(stored("main", name), stored("main", other))
        together = sum(sets, [])
        cells = []
        for found in (*sets, together):
            error = ex.standard_error(found)
            cells.append(f"{mean(found):+.3f} ± {error:.3f}" if found else "not run")
        positive = sum(difference > 0 for difference in together)
        rows.append([f"{name} minus {other}", *cells, f"{positive} of {len(together)}"])
    these = f"10 to {9 + len(results['BuPO'])}"
    heads = ["difference, paired by seed", "seeds 0 to 4", "5 to 9", these, "all", "positive"]
    return ex.table(heads, rows)


def layers_table(results) -> str:
    rows = []
    for name in LAYERS:
        row = [name, ex.spread(results.accuracy(name))]
        for other in ("GRPO", "BuPO"):
            row.append("" if name == other else minus(results, name, other))
        rows.append([
            *row,
            f"{mean(results.pass_at(name, 8)):.3f}",
            f"{mean(results.summary(name, 'length_after')):.0f}",
            ex.spread(results.metric(name, "entropy", last=4)),
        ])
    heads = ["arm", "Avg@8", "minus GRPO", "minus BuPO (block 5)", "Pass@8", "tokens",
             "entropy, last 4 steps"]
    return ex.table(heads, rows)


def against_grpo_table(results) -> str:
    """Every arm of BuPO against the arm of GRPO that differs in the method alone."""
    rows = []
    for name in results:
        other = name.replace("BuPO", "GRPO")
        layers = set(results.summary(name, "layer")) if name != other else ()
        rows.append([
            name,
            ", ".join(map(str, sorted(layers))),
            ex.spread(results.accuracy(name)),
            "" if name == other else minus(results, name, other),
            f"{mean(results.pass_at(name, 8)):.3f}",
            f"{mean(results.summary(name, 'length_after')):.0f}",
            ex.spread(results.metric(name, "entropy", last=4)),
            f"{mean(results.metric(name, 'clip_fraction')):.2%}",
        ])
    heads = ["arm", "block first", "Avg@8", "minus its GRPO", "Pass@8", "tokens",
             "entropy, last 4 steps", "tokens clipped"]
    return ex.table(heads, rows)


def scaled_model(scale: int):
    """The embedded model, its stream `scale` times as large as it was trained."""
    model = load_model(internal.Args(device="cpu"), trained=False)
    scale_residual(model, scale / 2)
    return model


def write_scaled() -> None:
    for scale in (1, 4):
        place = ex.ROOT / "runs" / "analysis" / "bupo" / f"scale_{scale}"
        scaled_model(scale).save_pretrained(place)
        load_tokenizer("tiny").save_pretrained(place)


def scales_table() -> str:
    """Where the boundary lies when the stream has another scale, which changes no answer."""
    tokenizer = load_tokenizer("tiny")
    problems = load_problems("arithmetic", "test", count=100)
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in problems]
    rows = []
    texts = []
    for scale in SCALES:
        model = scaled_model(scale)
        answers = sample(model, tokenizer, prompts, 1, 96)
        texts.append(answers.texts)
        view = internal.rollout_view(model, answers, 4096)["entropy"]
        change = entropy_changes(view)["ffn"]
        last = 1 + int(change.gt(0).nonzero().max())
        found = ", ".join(f"{value:+.2f}" for value in change.tolist())
        rows.append([scale, boundary_layer(change), last, found])
    equal = sum(text == texts[0] for text in texts)
    heads = ["scale", "boundary: end of the first rises", "last block whose FFN raises entropy",
             "FFN change of blocks 1 to 8, nats"]
    return ex.table(heads, rows) + (
        f"\nScales with the same {len(prompts)} answers, letter by letter: {equal} of "
        f"{len(SCALES)}.\n")


def inside_readings() -> dict:
    """Head of a column -> what it reads from a probe."""
    readings = {
        "perplexity of its own answers": lambda probe: probe["ppl_own"],
        "of fixed right answers": lambda probe: probe["ppl_fixed"],
        "cosine of the outputs of blocks 5 and 8": lambda probe: probe["cosine"][4][7],
        "of blocks 2 and 8": lambda probe: probe["cosine"][1][7],
    }
    for block, head in ((2, "entropy change of block 2"), (5, "of block 5"), (7, "of block 7")):
        readings[head] = lambda probe, block=block: probe["layer_change"][block - 1]
    return readings


def inside_table(results) -> str:
    readings = inside_readings()
    rows = []
    for name in NAMES:
        if not results[name][0]["probe"]:
            continue
        row = [name]
        for reading in readings.values():
            curves = results.probes(name, reading)
            first = mean([curve[0] for curve in curves])
            last = mean([curve[-1] for curve in curves])
            row.append(f"{first:.3f} to {last:.3f}")
        rows.append(row)
    return ex.table(["arm", *readings], rows)


def passes_table(results) -> str:
    rows = []
    for name in NAMES:
        means = [mean(results.pass_at(name, k)) for k in PASSES]
        rows.append([name, *(f"{value:.3f}" for value in means)])
    return ex.table(["arm", *(f"Pass@{k}" for k in PASSES)], rows)


def draw_curves(results) -> None:
    figure, rows = ex.plt.subplots(2, 3, figsize=(13, 7.6), constrained_layout=True)
    for axes, names in zip(rows, SIDES, strict=True):
        for axis, (key, title) in zip(axes, TITLES.items(), strict=True):
            for name in names:
                arm = ARMS[name]
                curves = results.curves(name, key)
                ex.band(axis, curves, name, arm.color, arm.style, fill=arm.style == "-")
            ex.tidy(axis, title, legend=key == "reward")
    ex.save(figure, "bupo.png")


def draw_block(rows, results, name: str, block: int) -> None:
    """GRPO or one block trained alone: three metrics above, three probes below."""
    arm = ARMS[name]
    look = {"label": name, "color": arm.color, "style": arm.style}
    for axis, key in zip(rows[0], TITLES, strict=True):
        ex.band(axis, results.curves(name, key), **look)
    steps = [probe["step"] for probe in results[name][0]["probe"]]
    readings = (
        lambda probe: probe["ppl_own"],
        lambda probe: mean(probe["cosine"][block - 1][block:]),
        lambda probe: probe["layer_change"][block - 1],
    )
    for axis, reading in zip(rows[1], readings, strict=True):
        ex.band(axis, results.probes(name, reading), x=steps, **look)


def draw_blocks(results) -> None:
    figure, rows = ex.plt.subplots(2, 3, figsize=(13, 7.6), constrained_layout=True)
    draw_block(rows, results, "GRPO", BOUNDARY)
    for block in (2, 5, 7):
        draw_block(rows, results, f"block {block} only", block)
    titles = [*TITLES.values(), "perplexity of its own answers",
              "cosine with the states of later blocks", "entropy change of the block, nats"]
    for axis, title in zip(rows.flat, titles, strict=True):
        ex.tidy(axis, title, legend=title == titles[0])
    rows[1][0].set_ylim(1, 2)
    ex.save(figure, "bupo_blocks.png")


def draw_passes(results) -> None:
    figure, axes = ex.plt.subplots(1, 2, figsize=(13, 4.4), constrained_layout=True)
    ks = [int(k) for k in results["GRPO"][0]["summary"]["pass_at_after"]]
    for axis, names in zip(axes, SIDES, strict=True):
        for name in names:
            arm = ARMS[name]
            by_k = [results.pass_at(name, k) for k in ks]
            curves = list(zip(*by_k, strict=True))
            ex.band(axis, curves, name, arm.color, arm.style, ks, arm.style == "-")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        title = "Pass@k: share of problems with a right one among k answers"
        ex.tidy(axis, title, "k answers", legend=True)
    ex.save(figure, "bupo_pass.png")


def main():
    args = ex.arguments(__doc__, seeds=5, parts=("arms", "again", "layers", "updates", "scaled"))
    if "arms" in args.parts:
        results = ex.Results(ex.runs("bupo", ARMS, args, first=5))
        ex.write("bupo", results, {
            "arms": arms_table(results),
            "inside": inside_table(results),
            "passes": passes_table(results),
            "depth": depth_table(),
        })
        draw_curves(results)
        draw_blocks(results)
        draw_passes(results)
    if "again" in args.parts:
        again = ex.Results(ex.runs("bupo", AGAIN, args, first=10))
        tables = {"again": again_table(again), "together": together_table(again)}
        ex.write("bupo_again", again, tables, page="bupo")
    if "layers" in args.parts:
        layers = ex.Results(ex.runs("bupo", LAYERS, args, first=10))
        tables = {"layers": layers_table(layers), "scales": scales_table()}
        ex.write("bupo_layers", layers, tables, page="bupo")
    if "updates" in args.parts:
        updates = ex.Results(ex.runs("bupo", UPDATES, args, first=10))
        ex.write("bupo_updates", updates, {"updates": against_grpo_table(updates)}, page="bupo")
    if "scaled" in args.parts:
        write_scaled()
        scaled = ex.Results(ex.runs("bupo", SCALED, args, first=10))
        ex.write("bupo_scaled", scaled, {"scaled": against_grpo_table(scaled)}, page="bupo")


if __name__ == "__main__":
    main()
