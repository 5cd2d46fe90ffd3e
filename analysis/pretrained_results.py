"""The methods on two pretrained models -> results/pretrained.{json,md}, pretrained*.png.

    python -m analysis.pretrained_results                     # hub ids; hours on two CPU cores
    python -m analysis.pretrained_results --models FOLDER --gsm8k TRAIN.jsonl TEST.jsonl --parts em

A part that is finished is read and not repeated. FOLDER holds the models by name, without owner.
"""
import argparse
import json
import math
import pathlib
from types import SimpleNamespace

import torch

from analysis import experiment as ex
from analysis.experiment import BLUE, GREEN, GREY, ORANGE, SKY, Arm
from common.data import batch_of, encode_prompt, load_problems, read_rows
from common.evaluate import evaluate
from common.flags import BOXED
from common.internal_policy import block_streams, boundary_layer, entropy
from common.models import autocast, causal_lm, load_model, load_tokenizer
from common.sampling import join, sample
from common.verify import extract_answer
from entropy_min import accuracy_variance
from long_cot_sft import ask_teacher, reward

QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE = ex.ROOT / "runs" / "analysis" / "pretrained"
STYLES = {
    "long": ("Please reason step by step in words. When you are done, check the result by "
             "computing it again, and put your final answer within \\boxed{}.", 2),
    "short": ("Multiply first, then add and subtract from the left. Write one line per step and "
              "no other words, then the result in a box. Example: Compute 12+3*4-5.\n3*4=12\n"
              "12+12=24\n24-5=19\n\\boxed{19}", 8),
}
PROBLEMS = {"SFT long": 96, "SFT short": 96, "SFT short, 192 problems": 192}
TIMES = ("before", "after")
HELD_OUT = 64
LENGTH = 224  # longest answer to GSM8K
TOKENS = 256  # pooled in a look inside


def frozen(name: str, dtype: str = "bfloat16"):
    """A model for looking at and asking."""
    args = SimpleNamespace(model=name, device="cpu", dtype=dtype, lora_rank=0)
    return load_model(args, trained=False)


@torch.no_grad()
def inside(name: str, problems: list[dict]) -> dict:
    """What every block says over answer tokens of the model's own: means, lists of L.

    -> "policy" H^l E^T as in the paper, "normed" through the final norm, "one size" with every
    state scaled to the size of a final one; "change" by the FFN, "change x 4", "change / 4" with
    the whole stream scaled, which no reader in the model would see; "rms" of H^l; "repeats", the
    share of tokens at which the block's first choice is the token it has just read.
    """
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(name)
    prompts = [encode_prompt(tokenizer, row["problem"], BOXED) for row in problems]
    rollout = sample(frozen(name), tokenizer, prompts, 1, 160, seed=0)
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)      # (B, S) each
    seeded = torch.Generator().manual_seed(0)
    order = torch.randperm(int(predicts.sum()), generator=seeded)
    predicts[predicts.clone()] = order < TOKENS
    model = frozen(name, "float32")
    lm = causal_lm(model)
    final = lm.model(ids, use_cache=False).last_hidden_state[predicts]          # (N, D)
    size = final.pow(2).mean().sqrt()
    blocks = []

    def nats(x):
        pieces = [entropy(lm.lm_head(piece)) for piece in x.split(64)]
        return torch.cat(pieces).mean().item()

    def repeats(x):
        first = [lm.lm_head(piece).argmax(-1) for piece in x.split(64)]
        same = torch.cat(first) == ids[predicts]
        return same.float().mean().item()

    def visit(streams):
        H, F = streams["layer_out"], streams["ffn_out"]                         # (N, D) each
        rms = H.pow(2).mean(-1, keepdim=True).sqrt()                            # (N, 1)
        read = nats(streams["ffn_in"])
        blocks.append({
            "policy": nats(H),
            "normed": nats(lm.model.norm(H)),
            "one size": nats(H / rms * size),
            "change": nats(F) - read,
            "change x 4": nats(4 * F) - read,
            "change / 4": nats(F / 4) - read,
            "rms": rms.mean().item(),
            "repeats": repeats(H),
        })

    block_streams(model, ids, None, predicts, visit)
    found = {key: [block[key] for block in blocks] for key in blocks[0]}
    return {
        **found,
        "model": nats(final),
        "tokens": len(final),
        "answers": len(prompts),
        "final rms": size.item(),
        "ln V": math.log(len(lm.lm_head.weight)),
    }


def look(model, tokenizer, problems: list[dict], system: str, length: int) -> dict:
    """Greedy and at the paper's temperature: accuracy, share ended and boxed, accuracy given a
    box, tokens."""
    found = {}
    for temperature, k in ((0.0, 1), (0.5, 2)):
        result = evaluate(model, tokenizer, problems, reward, k, length, temperature, seed=7,
                          system=system)
        texts = [text for row in result["answers"] for text in row["responses"]]
        rewards = [value for row in result["answers"] for value in row["rewards"]]
        boxed = [extract_answer(text) is not None for text in texts]
        found[str(temperature)] = {
            "accuracy": result["avg_at_k"],
            "error": result["standard_error"],
            "ended": 1 - result["truncated"],
            "length": result["length"],
            "boxed": ex.mean(boxed),
            "given a box": sum(rewards) / max(1, sum(boxed)),
        }
    rollout = sample(model, tokenizer, [encode_prompt(tokenizer, row["problem"], system)
                                        for row in problems[:8]], 1, length, 0.0, seed=7)
    found["skewness"] = skewness(model, rollout)
    return found


@torch.no_grad()
def skewness(model, rollout) -> float:
    """Of all logits at a token, mean over answer tokens: m3 / m2^1.5."""
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)      # (B, S) each
    lm = causal_lm(model)
    values = []
    with autocast(model):
        for row, inside in zip(ids, predicts, strict=True):
            hidden = lm.model(row[None], use_cache=False).last_hidden_state[0, inside]  # (T, D)
            logits = lm.lm_head(hidden).float()                                         # (T, V)
            centred = logits - logits.mean(-1, keepdim=True)
            values.append((centred**3).mean(-1) / centred.square().mean(-1) ** 1.5)     # (T,)
    return torch.cat(values).mean().item()


def easy(name: str, split: str) -> list[dict]:
    """GSM8K problems whose solution takes two steps or fewer, by the seed 0."""
    steps = {}
    for row in read_rows(name, split):
        text = row.get("solution") or row["answer"]
        steps[row.get("question") or row["problem"]] = text.count("<<")
    return [row for row in load_problems(name, split) if steps[row["problem"]] <= 2]


def after_em(run) -> dict:
    """On held-out GSM8K problems, all easy ones."""
    problems = easy(run.args.eval_data, "test")[:HELD_OUT]
    return look(run.model, run.tokenizer, problems, BOXED, run.args.max_new_tokens)


def untrained(name: str, problems: list[dict]) -> dict:
    return look(frozen(name), load_tokenizer(name), problems, BOXED, LENGTH)


def no_checkpoints(run, _optimizer) -> None:
    """Ten times eight GB are spared."""
    run.save = print


def ascend(run, optimizer) -> None:
    """The control: the same updates uphill."""
    no_checkpoints(run, optimizer)
    optimizer.param_groups[0]["maximize"] = True


def ask(teacher: str, style: str, count: int) -> pathlib.Path:
    """The teacher's verified answers to the arithmetic problems, 32 problems at a time."""
    path = BASE / f"traces-{style}-{count}.jsonl"
    rows = ex.read_lines(path)
    problems = load_problems("arithmetic")[len(rows):count]
    if not problems:
        return path
    torch.set_num_threads(1)
    model, tokenizer = frozen(teacher), load_tokenizer(teacher)
    system, samples = STYLES[style]
    how = SimpleNamespace(samples=samples, teacher_max_new_tokens=192, teacher_temperature=0.7,
                          keep="verified")
    path.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(problems), 32):
        batch = problems[start:start + 32]
        found = ask_teacher(model, tokenizer, batch, system, len(rows), how)
        rows += found
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    return path


def distil(args) -> dict:
    """The student learns from both styles, and from four times as many problems of one."""
    arms = {}
    for name, count in PROBLEMS.items():
        style = "long" if name == "SFT long" else "short"
        traces = ask(args.at(QWEN), style, count)
        arms[name] = Arm(
            "long_cot_sft.py", f"--model {args.at(SMOL)} --traces {traces} "
            "--dtype bfloat16 --epochs 3 --batch-size 16 --lr 1e-4 --max-new-tokens 160 "
            "--eval-problems 48 --micro-batch-tokens 2048")
    return ex.runs("pretrained/distil", arms, args)


def reinforce(args) -> dict:
    """From the better student of the short style: four methods, equally many rollouts."""
    student = BASE / "distil" / "SFT_short,_192_problems-0" / "model"
    flags = (f"--model {student} --dtype bfloat16 --steps 10 --prompts-per-step 8 --group-size 8 "
             "--max-new-tokens 64 --eval-problems 96 --micro-batch-tokens 2048 ")
    arms = {
        "GRPO": Arm("grpo.py", flags + "--lr 3e-5"),
        "BuPO": Arm("bupo.py", flags + "--lr 3e-5 --layer auto --internal-steps 2"),
        "ATR-GRPO": Arm("kl3_grpo.py", flags + "--lr 2e-5 --updates-per-rollout 2"),
        "PPO": Arm("ppo.py", flags + "--lr 2e-5 --updates-per-rollout 2 --critic-lr 1e-4"),
    }
    return ex.runs("pretrained/reinforce", arms, args)


def most_uncertain(name: str, train: str) -> str:
    """Of eight problems the one whose eight answers at temperature 1 vary most in correctness."""
    rows = batch_of(load_problems(train), 0, 8, seed=0)
    result = evaluate(frozen(name), load_tokenizer(name), rows, reward, 8, LENGTH, system=BOXED)
    rewards = torch.tensor([row["rewards"] for row in result["answers"]])       # (8, 8)
    return rows[accuracy_variance(rewards).argmax()]["problem"]


def one_shot(args) -> dict:
    """Ten updates on one problem, two of it and of its controls, and the model before."""
    name = args.at(QWEN)
    held_out = easy(args.gsm8k[1], "test")[:HELD_OUT]
    before = cached("before-em", untrained, name, held_out)
    train = BASE / "gsm8k-easy.jsonl"
    rows = easy(args.gsm8k[0], "train")
    lines = [json.dumps(row) + "\n" for row in rows]
    train.write_text("".join(lines))
    problems = {"chosen": cached("problem", most_uncertain, name, str(train)),
                "random": batch_of(load_problems(str(train)), 0, 1, seed=1)[0]["problem"]}
    for which, problem in problems.items():  # no label is read
        row = {"problem": problem, "answer": "0"}
        (BASE / f"{which}.jsonl").write_text(json.dumps(row))

    def arm(flags, which="chosen", prepare=no_checkpoints):
        return Arm(
            "entropy_min.py", f"--model {name} --data {BASE}/{which}.jsonl --dtype bfloat16 "
            f"--eval-data {args.gsm8k[1]} --eval-problems 0 --group-size 8 "
            f"--max-new-tokens {LENGTH} --micro-batch-tokens 2048 {flags}",
            prepare=prepare, after=after_em)

    arms = {
        "EM": arm("--steps 10"),
        "EM, 2 updates": arm("--steps 2"),
        "random problem, 2 updates": arm("--steps 2", "random"),
        "entropy ascent, 2 updates": arm("--steps 2", prepare=ascend),
        "loss temperature 1, 2 updates": arm("--steps 2 --loss-temperature 1"),
    }
    return {"before": before, **ex.runs("pretrained/em", arms, args)}


def cached(name: str, make, *given):
    """What make(*given) gives, kept in runs/analysis/pretrained/<name>.json."""
    path = BASE / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(*given)))
    return json.loads(path.read_text())


def look_inside(args) -> dict:
    problems = load_problems(args.gsm8k[1], "test", count=16)
    return {name: cached(f"inside-{name.split('/')[1]}", inside, args.at(name), problems)
            for name in (SMOL, QWEN)}


def rule(change) -> str:
    """The end of the exploration region, and the last block whose FFN raises the entropy."""
    rises = [block for block, nats in enumerate(change, 1) if nats > 0]
    last = rises[-1] if rises else "none"
    try:
        return f"{boundary_layer(change)} / {last}"
    except ValueError:
        return f"none / {last}"


def inside_table(found: dict) -> str:
    heads = ["", *[name.split("/")[1] for name in found]]
    rows = []

    def row(title, reading):
        rows.append([title, *[reading(view) for view in found.values()]])

    def at(view, key):
        L = len(view[key])
        blocks = (1, L // 4, L // 2, 3 * L // 4, L - 1, L)
        return ", ".join(f"{view[key][block - 1]:.2f}" for block in blocks)

    row("blocks, ln V", lambda view: f"{len(view['policy'])}, {view['ln V']:.2f}")
    row("entropy of the model, nats", lambda view: f"{view['model']:.2f}")
    row("policy of blocks 1, L/4, L/2, 3L/4, L-1, L", lambda view: at(view, "policy"))
    row("through the final norm", lambda view: at(view, "normed"))
    row("at the final size, no gain", lambda view: at(view, "one size"))
    row("rms of the stream", lambda view: at(view, "rms"))
    row("rms behind the final norm", lambda view: f"{view['final rms']:.2f}")
    row("rule / last FFN that raises", lambda view: rule(view["change"]))
    row("the same, stream x 4", lambda view: rule(view["change x 4"]))
    row("the same, stream / 4", lambda view: rule(view["change / 4"]))
    row("first choice is the token just read, block 1", lambda view: f"{view['repeats'][0]:.3f}")
    return ex.table(heads, rows)


def draw_inside(found: dict) -> None:
    """A row per model: entropies, what the FFN changes, the stream's size."""
    figure, axes = ex.plt.subplots(len(found), 3, figsize=(14, 7.6), constrained_layout=True)
    entropies = (("policy", "as in the paper", ORANGE, "-"),
                 ("normed", "through the final norm", BLUE, "-"),
                 ("one size", "at the final size, no gain", SKY, "--"))
    changes = (("change", "as it is", ORANGE, "-"),
               ("change x 4", "stream x 4", GREY, "--"),
               ("change / 4", "stream / 4", GREY, ":"))
    for (name, view), (left, middle, right) in zip(found.items(), axes, strict=True):
        blocks = range(1, len(view["rms"]) + 1)
        for axis, lines in ((left, entropies), (middle, changes)):
            for key, label, color, style in lines:
                axis.plot(blocks, view[key], style, color=color, label=label, linewidth=2)
        right.plot(blocks, view["rms"], color=GREEN, linewidth=2)
        left.axhline(view["ln V"], color=GREY, linewidth=1, linestyle=":")
        middle.axhline(0, color="black", linewidth=0.8)
        right.set_yscale("log")
        short = name.split("/")[1].removesuffix("-Instruct")
        ex.tidy(left, f"{short}: entropy by block, nats", "block", legend=True)
        ex.tidy(middle, "its change by the FFN, nats", "block", legend=name == QWEN)
        ex.tidy(right, "size (rms) of the stream", "block")
    ex.save(figure, "pretrained.png")


def em_table(found: dict) -> str:
    heads = ["", "temperature", "accuracy", "ended", "boxed", "accuracy given a box", "tokens",
             "skewness of logits"]
    rows = []
    views = {"before": found["before"]}
    for name in list(found)[1:]:
        views[name] = found[name][0]["after"]
    for temperature in ("0.0", "0.5"):
        for name, view in views.items():
            row = view[temperature]
            rows.append([name, temperature, f"{row['accuracy']:.3f} ± {row['error']:.3f}",
                         f"{row['ended']:.2f}", f"{row['boxed']:.2f}", f"{row['given a box']:.2f}",
                         f"{row['length']:.0f}",
                         f"{view['skewness']:.3f}" if temperature == "0.0" else ""])
    return ex.table(heads, rows)


def trained_table(found: dict) -> str:
    """Of every run; differences and their errors are paired by problem."""
    first = list(found)[0]
    heads = ["run", "Avg@8 before", "after", "change", f"minus {first}", "Pass@8 before", "after",
             "tokens before", "after", "\"however\" before", "after", "largest gap, nats", "s"]
    rows = []
    for name, results in found.items():
        for result, other in zip(results, found[first], strict=True):
            about = result["summary"]
            before, after = about["by_problem_before"], about["by_problem_after"]
            words = [about.get(f"reflection_{when}", {}) for when in TIMES]
            gaps = [row["gap_max"] for row in result["rows"] if "gap_max" in row]
            title = f"{name}, seed {result['seed']}" if len(results) > 1 else name
            rows.append([
                title, *[f"{about[f'avg_at_k_{when}']:.3f}" for when in TIMES],
                ex.paired(after, before),
                "" if name == first else ex.paired(after, other["summary"]["by_problem_after"]),
                *[f"{about[f'pass_at_{when}']['8']:.2f}" for when in TIMES],
                *[f"{about[f'length_{when}']:.0f}" for when in TIMES],
                *[f"{rates['however']:.3f}" if rates else "" for rates in words],
                f"{max(gaps):.2f}" if gaps else "", f"{about['seconds']:.0f}"])
    return ex.table(heads, rows)


PARTS = {"inside": (look_inside, inside_table), "em": (one_shot, em_table),
         "distil": (distil, trained_table), "reinforce": (reinforce, trained_table)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="folder that holds both models by name; default: the hub")
    parser.add_argument("--gsm8k", nargs=2, default=["openai/gsm8k:main"] * 2,
                        metavar=("TRAIN", "TEST"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    args.workers, args.more = 1, ""

    def at(name):
        if args.models is None:
            return name
        return str(pathlib.Path(args.models) / name.split("/")[1])

    args.at = at
    torch.set_num_threads(1)
    tables, results = {}, {}
    for part in args.parts:
        make, as_table = PARTS[part]
        found = make(args)
        tables[part] = as_table(found)
        if part == "inside":
            draw_inside(found)
            (ex.PAGES / "pretrained_inside.json").write_text(json.dumps(found) + "\n")
        else:
            results.update({arm: of for arm, of in found.items() if arm != "before"})
    ex.write("pretrained", results, tables)


if __name__ == "__main__":
    main()
