"""The methods on two pretrained models -> results/pretrained.{json,md}, pretrained*.png.

    python -m analysis.pretrained_results                     # hub ids; hours on two CPU cores
    python -m analysis.pretrained_results --models FOLDER --gsm8k TRAIN.jsonl TEST.jsonl --parts em

A part that is finished is read and not repeated. FOLDER holds the models by name, without owner.
"""
import argparse
import json
import math
import multiprocessing
import os
import pathlib
from types import SimpleNamespace

import torch

from analysis import experiment as ex
from analysis.experiment import BLUE, GREEN, GREY, ORANGE, SKY, Arm
from common.data import batch_of, encode_prompt, load_problems, read_rows
from common.evaluate import evaluate
from common.flags import BOXED
from common.internal_policy import block_streams, boundary_layer, entropy
from common.models import autocast, load_model, load_tokenizer
from common.sampling import join, sample
from common.verify import extract_answer
from entropy_min import accuracy_variance
from long_cot_sft import ask_teacher, reward

QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE = ex.ROOT / "runs" / "analysis" / "pretrained"
LONG = ("Please reason step by step in words. When you are done, check the result by computing it "
        "again, and put your final answer within \\boxed{}.")
SHORT = ("Multiply first, then add and subtract from the left. Write one line per step and no "
         "other words, then the result in a box. Example: Compute 12+3*4-5.\n3*4=12\n12+12=24\n"
         "24-5=19\n\\boxed{19}")
STYLES = {  # name -> what the teacher is told, problems, answers to each, tokens
    "long": (LONG, 192, 8, 192),
    "short": (SHORT, 192, 8, 192),
    "easy": (BOXED, 256, 4, 224),  # GSM8K
}
TIMES = ("before", "after")
HELD_OUT = 64
LENGTH = 224  # longest answer to GSM8K
TOKENS = 256  # pooled in a look inside


def frozen(name: str, dtype: str = "auto", device: str = "auto"):
    """A model for looking at and asking."""
    args = SimpleNamespace(model=name, device=device, dtype=dtype, lora_rank=0)
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
    rollout = sample(frozen(name, "bfloat16", "cpu"), tokenizer, prompts, 1, 160, seed=0)
    ids, predicts = join(rollout)                                               # (B, S) each
    seeded = torch.Generator().manual_seed(0)
    order = torch.randperm(int(predicts.sum()), generator=seeded)
    predicts[predicts.clone()] = order < TOKENS
    model = frozen(name, "float32", "cpu")
    final = model.model(ids, use_cache=False).last_hidden_state[predicts]       # (N, D)
    size = final.pow(2).mean().sqrt()
    blocks = []

    def nats(x):
        pieces = [entropy(model.lm_head(piece)) for piece in x.split(64)]
        return torch.cat(pieces).mean().item()

    def repeats(x):
        first = [model.lm_head(piece).argmax(-1) for piece in x.split(64)]
        same = torch.cat(first) == ids[predicts]
        return same.float().mean().item()

    def visit(streams):
        H, F = streams["layer_out"], streams["ffn_out"]                         # (N, D) each
        rms = H.pow(2).mean(-1, keepdim=True).sqrt()                            # (N, 1)
        read = nats(streams["ffn_in"])
        blocks.append({
            "policy": nats(H),
            "normed": nats(model.model.norm(H)),
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
        "ln V": math.log(len(model.lm_head.weight)),
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
                                        for row in problems[:8]], 1, 96, 0.0, seed=7)
    found["skewness"] = skewness(model, rollout)
    return found


@torch.no_grad()
def skewness(model, rollout) -> float:
    """Of all logits at a token, mean over answer tokens: m3 / m2^1.5."""
    ids, predicts = join(rollout)                                               # (B, S) each
    values = []
    with autocast(model):
        for row, inside in zip(ids, predicts, strict=True):
            hidden = model.model(row[None], use_cache=False).last_hidden_state[0, inside]  # (T, D)
            logits = model.lm_head(hidden).float()                              # (T, V)
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


def ends(answers: list[dict]) -> dict:
    """Of an evaluation's answers: the share that end, and how many of those are right."""
    ended = [value for row in answers for value in row["finished"]]
    rewards = [value for row in answers for value in row["rewards"]]
    return {"ended": ex.mean(ended), "right_if_ended": sum(rewards) / max(1, sum(ended))}


def easy_file(args, split: str) -> pathlib.Path:
    """The easy problems of GSM8K as a file of their own."""
    path = BASE / f"gsm8k-easy-{split}.jsonl"
    rows = easy(args.gsm8k[split == "test"], split)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_suffix(f".{os.getpid()}")  # another process may write it as well
    own.write_text("".join(lines))
    own.replace(path)
    return path


def ask(job) -> None:
    """The teacher's verified answers in a style, 512 at a time, in a process of its own."""
    teacher, style, problems = job
    path = BASE / f"traces-{style}.jsonl"
    rows = ex.read_lines(path)
    system, count, samples, tokens = STYLES[style]
    torch.set_num_threads(1)
    model, tokenizer = frozen(teacher), load_tokenizer(teacher)
    how = SimpleNamespace(samples=samples, teacher_max_new_tokens=tokens, teacher_temperature=0.7,
                          keep="verified")
    batch = 512 // samples
    for start in range(len(rows), count, batch):
        found = ask_teacher(model, tokenizer, problems[start:start + batch], system, start, how)
        rows += found
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)


def distil(args) -> dict:
    """Students of the long and the short style in arithmetic, and of GSM8K's easy problems."""
    sources = {"long": "arithmetic", "short": "arithmetic", "easy": str(easy_file(args, "train"))}
    jobs = []
    for style, source in sources.items():
        if len(ex.read_lines(BASE / f"traces-{style}.jsonl")) < STYLES[style][1]:
            jobs.append((args.at(QWEN), style, load_problems(source, count=STYLES[style][1])))
    with multiprocessing.get_context("spawn").Pool(min(3, args.workers)) as pool:
        pool.map(ask, jobs, chunksize=1)
    arms = {}
    for style, source in sources.items():
        flags = "--max-new-tokens 160"
        if style == "easy":
            flags = f"--data {source} --eval-data {easy_file(args, 'test')} " \
                    f"--max-new-tokens {LENGTH}"
        arms[f"SFT {style}"] = Arm(
            "long_cot_sft.py", f"--model {args.at(SMOL)} --traces {BASE}/traces-{style}.jsonl "
            "--dtype bfloat16 --epochs 3 --batch-size 16 --lr 1e-4 --eval-problems 96 "
            f"--micro-batch-tokens 4096 {flags}", prepare=no_checkpoints, count=ends)
    return ex.runs("pretrained/distil", arms, args)


def reinforced(args, name: str, student: str, flags: str, methods: dict[str, tuple]) -> dict:
    """Methods from a student, seed by seed from the student of that seed."""
    model = BASE / "distil" / f"SFT_{student}-{{seed}}" / "model"
    flags = (f"--model {model} --dtype bfloat16 --prompts-per-step 8 --group-size 8 "
             f"--eval-problems 96 --micro-batch-tokens 4096 {flags}")
    arms = {}
    for method, (script, own) in methods.items():
        arms[method] = Arm(script, f"{flags} {own}", prepare=no_checkpoints, count=ends)
    return ex.runs(f"pretrained/{name}", arms, args)


GRPO = {"GRPO": ("grpo.py", "--lr 3e-5")}


def reinforce(args) -> dict:
    """Equally many rollouts of each method from the student of the short style."""
    return reinforced(args, "reinforce", "short", "--steps 16 --max-new-tokens 64", {
        **GRPO,
        "BuPO": ("bupo.py", "--lr 3e-5 --layer auto --internal-steps 2"),
        "ATR-GRPO": ("kl3_grpo.py", "--lr 2e-5 --updates-per-rollout 2"),
        "clip, two updates": ("kl3_grpo.py", "--lr 2e-5 --updates-per-rollout 2 --measure ratio"),
        "PPO": ("ppo.py", "--lr 2e-5 --updates-per-rollout 2 --critic-lr 1e-4"),
    })


def from_long(args) -> dict:
    """GRPO from the student of the long style."""
    return reinforced(args, "from-long", "long", "--steps 10 --max-new-tokens 160", GRPO)


def from_easy(args) -> dict:
    """GRPO from the student of GSM8K's easy problems."""
    files = f"--data {easy_file(args, 'train')} --eval-data {easy_file(args, 'test')}"
    flags = f"--steps 10 --max-new-tokens {LENGTH} {files}"
    return reinforced(args, "from-easy", "easy", flags, GRPO)


def on_qwen(args) -> dict:
    """GRPO on the larger model itself, all weights."""
    flags = (f"--model {args.at(QWEN)} --dtype bfloat16 --steps 20 --prompts-per-step 8 "
             "--group-size 8 --max-new-tokens 128 --lr 1e-5 --eval-problems 96 "
             "--micro-batch-tokens 4096")
    arms = {"GRPO": Arm("grpo.py", flags, prepare=no_checkpoints, count=ends)}
    return ex.runs("pretrained/qwen", arms, args)


def most_uncertain(name: str, train: str) -> str:
    """Of eight problems the one whose eight answers at temperature 1 vary most in correctness."""
    rows = batch_of(load_problems(train), 0, 8, seed=0)
    result = evaluate(frozen(name), load_tokenizer(name), rows, reward, 8, LENGTH, system=BOXED)
    rewards = torch.tensor([row["rewards"] for row in result["answers"]])       # (8, 8)
    return rows[accuracy_variance(rewards).argmax()]["problem"]


def one_shot(args) -> dict:
    """Ten updates on one problem, of it and of its controls, and the model before."""
    name = args.at(QWEN)
    train = easy_file(args, "train")
    before = cached("before-em", untrained, name, easy(args.gsm8k[1], "test")[:HELD_OUT])
    problems = {"chosen": cached("problem", most_uncertain, name, str(train)),
                "random": batch_of(load_problems(str(train)), 0, 1, seed=1)[0]["problem"]}
    for which, problem in problems.items():  # no label is read
        row = {"problem": problem, "answer": "0"}
        (BASE / f"{which}.jsonl").write_text(json.dumps(row))

    def arm(flags="", which="chosen", prepare=no_checkpoints):
        return Arm(
            "entropy_min.py", f"--model {name} --data {BASE}/{which}.jsonl --dtype bfloat16 "
            f"--eval-data {args.gsm8k[1]} --eval-problems 0 --steps 10 --group-size 32 "
            f"--max-new-tokens {LENGTH} --micro-batch-tokens 2048 {flags}",
            prepare=prepare, after=after_em)

    arms = {
        "EM": arm(),
        "random problem": arm(which="random"),
        "entropy ascent": arm(prepare=ascend),
        "loss temperature 1": arm("--loss-temperature 1"),
        "lr 2e-6": arm("--lr 2e-6"),
    }
    return {"before": before, **ex.runs("pretrained/em", arms, args)}


def cached(name: str, make, *given):
    """What make(*given) gives, kept in runs/analysis/pretrained/<name>.json."""
    path = BASE / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(*given)))
        torch.cuda.empty_cache()  # the runs need it
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
    """Means over seeds; the error of an accuracy is over problems, the mean of the seeds'."""
    heads = ["", "temperature", "accuracy, by seed", "error", "ended", "boxed",
             "accuracy given a box", "tokens", "skewness of logits",
             "entropy of the last answers trained on, nats"]
    views = {"before": [found["before"]]}
    entropies = {"before": ex.mean([result["rows"][0]["entropy"] for result in found["EM"]])}
    for name in list(found)[1:]:
        views[name] = [result["after"] for result in found[name]]
        entropies[name] = ex.mean([result["rows"][-1]["entropy"] for result in found[name]])
    rows = []
    for temperature in ("0.0", "0.5"):
        for name, seeds in views.items():
            readings = [view[temperature] for view in seeds]

            def of(key, readings=readings):
                return ex.mean([reading[key] for reading in readings])

            of_the_model = ["", ""]
            if temperature == "0.0":
                skew = ex.mean([view["skewness"] for view in seeds])
                of_the_model = [f"{skew:.3f}", f"{entropies[name]:.4f}"]
            rows.append([
                name, temperature, ", ".join(f"{row['accuracy']:.3f}" for row in readings),
                f"± {of('error'):.3f}", f"{of('ended'):.2f}", f"{of('boxed'):.2f}",
                f"{of('given a box'):.2f}", f"{of('length'):.0f}",
                *of_the_model])
    return ex.table(heads, rows)


def minus(a: list[dict], b: list[dict]) -> str:
    """Mean difference of two arms' Avg@8 after training, seeds paired and averaged ± its standard
    error over problems."""
    by_seed = []
    for x, y in zip(a, b, strict=True):
        after = x["summary"]["by_problem_after"]
        by_seed.append(ex.differences(after, y["summary"]["by_problem_after"]))
    by_problem = [ex.mean(of_seeds) for of_seeds in zip(*by_seed, strict=True)]
    return f"{ex.mean(by_problem):+.3f} ± {ex.standard_error(by_problem):.3f}"


def as_before(result: dict) -> dict:
    """What minus() reads, of the model before training."""
    return {"summary": {"by_problem_after": result["summary"]["by_problem_before"]}}


def trained_table(found: dict) -> str:
    """A row per arm, means over seeds, the changes seed by seed."""
    first = list(found)[0]
    heads = ["run", "seeds", "Avg@8 before", "after", "change", "by seed", f"minus {first}",
             "ended before", "after", "right if ended before", "after", "tokens before", "after",
             "largest gap, nats", "s"]
    rows = []
    for name, results in found.items():
        before = [as_before(result) for result in results]
        columns = []
        for when in TIMES:
            summaries = [result["summary"] for result in results]
            counts = [about[f"count_{when}"] for about in summaries]
            columns.append({
                "avg": ex.mean([about[f"avg_at_k_{when}"] for about in summaries]),
                "ended": ex.mean([count["ended"] for count in counts]),
                "right": ex.mean([count["right_if_ended"] for count in counts]),
                "tokens": ex.mean([about[f"length_{when}"] for about in summaries]),
            })
        start, end = columns
        changes = [about["avg_at_k_after"] - about["avg_at_k_before"] for about in summaries]
        gaps = [row["gap_max"] for result in results for row in result["rows"] if "gap_max" in row]
        rows.append([
            name, len(results), f"{start['avg']:.3f}", f"{end['avg']:.3f}",
            minus(results, before),
            ", ".join(f"{change:+.3f}" for change in changes),
            "" if name == first else minus(results, found[first]),
            f"{start['ended']:.2f}", f"{end['ended']:.2f}",
            f"{start['right']:.3f}", f"{end['right']:.3f}",
            f"{start['tokens']:.0f}", f"{end['tokens']:.0f}",
            f"{max(gaps):.2f}" if gaps else "",
            f"{ex.mean([about['seconds'] for about in summaries]):.0f}"])
    return ex.table(heads, rows)


def distilled_table(found: dict) -> str:
    """Arithmetic, then GSM8K."""
    arithmetic = {name: of for name, of in found.items() if name != "SFT easy"}
    return trained_table(arithmetic) + "\n" + trained_table({"SFT easy": found["SFT easy"]})


def reinforced_table(found: dict) -> str:
    """The table, what each method has over GRPO by seed, and KL3's gate over the clip's."""
    results = ex.Results(found)
    lines = [trained_table(found)]
    for name in list(found)[1:]:
        ours, theirs = results.accuracy(name), results.accuracy("GRPO")
        by_seed = ", ".join(f"{x:+.3f}" for x in ex.differences(ours, theirs))
        lines.append(f"- {name} minus GRPO, over seeds: {ex.paired(ours, theirs)} ({by_seed})")
    gates = minus(found["ATR-GRPO"], found["clip, two updates"])
    lines.append(f"- ATR-GRPO minus clip, two updates, over problems: {gates}\n")
    return "\n".join(lines)


PARTS = {  # name -> what makes it, its table, seeds
    "inside": (look_inside, inside_table, 1),
    "em": (one_shot, em_table, 2),
    "distil": (distil, distilled_table, 3),
    "reinforce": (reinforce, reinforced_table, 3),
    "from-long": (from_long, trained_table, 1),
    "from-easy": (from_easy, trained_table, 3),
    "qwen": (on_qwen, trained_table, 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="folder that holds both models by name; default: the hub")
    parser.add_argument("--gsm8k", nargs=2, default=["openai/gsm8k:main"] * 2,
                        metavar=("TRAIN", "TEST"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--more", default="", help="flags for every run, to try it out")
    args = parser.parse_args()

    def at(name):
        if args.models is None:
            return name
        return str(pathlib.Path(args.models).resolve() / name.split("/")[1])

    args.at = at
    torch.set_num_threads(1)
    tables, results = {}, {}
    for part in args.parts:
        make, as_table, args.seeds = PARTS[part]
        found = make(args)
        tables[part] = as_table(found)
        if part == "inside":
            draw_inside(found)
            (ex.PAGES / "pretrained_inside.json").write_text(json.dumps(found) + "\n")
        else:
            results.update({f"{part}: {arm}": of for arm, of in found.items() if arm != "before"})
    ex.write("pretrained", results, tables)


if __name__ == "__main__":
    main()
