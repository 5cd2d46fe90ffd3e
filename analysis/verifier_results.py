r"""Does a policy learn to copy the question? GRPO under two verifiers -> a table on the screen.

    python -m analysis.verifier_results --workers 1     # 150 steps, three seeds each, 40 minutes

The embedded model is fine-tuned on its own answers, one in five replaced by the question's
expression in a box (\boxed{40-3*5+30}). From there GRPO is rewarded by the verifier of commit
3ba9b2d, which takes an expression for its value, or by this one. Copies: answers whose box holds
an operator between two digits. Right: the box is the gold, character by character.
"""
import argparse
import json
import re

from analysis import experiment as ex
from analysis.internal import Args
from common.data import encode_prompt
from common.evaluate import evaluate
from common.models import load_model, load_tokenizer
from common.sampling import sample
from common.tiny.arithmetic import arithmetic_problems
from common.verify import extract_answer

FOLDER = ex.ROOT / "runs" / "analysis" / "verifier"
TRACES = FOLDER / "traces.jsonl"
OLD = FOLDER / "old_verify.py"
GRPO = "--model {runs}/start-0/model --steps 150"
AT = (1, 10, 20, 30, 50, 75, 100, 150)  # steps of the table
COPY = re.compile(r"\d\s*[-+*]\s*\d")


def is_copy(text: str) -> bool:
    return COPY.search(extract_answer(text) or "") is not None


def look(run) -> dict:
    """The share of copies in the last rollout."""
    texts = run.last[0].texts if hasattr(run, "last") else []
    return {"copies": ex.mean(map(is_copy, texts)) if texts else None}


def held_out(run) -> dict:
    """Shares of copies and of right answers, 8 answers to each held-out problem."""
    result = evaluate(run.model, run.tokenizer, run.held_out, run.reward, 8,
                      run.args.max_new_tokens)
    copied = []
    right = []
    for row in result["answers"]:
        for text in row["responses"]:
            copied.append(is_copy(text))
            right.append(extract_answer(text) == row["answer"])
    return {"copies": ex.mean(copied), "right": ex.mean(right), "reward": result["avg_at_k"]}


def write_traces(count: int = 10_000) -> None:
    """The embedded model's own answers, every fifth replaced by the question in a box."""
    tokenizer = load_tokenizer("tiny")
    model = load_model(Args(device="cpu"), trained=False)
    rows = arithmetic_problems(count, held_out=False, seed=77)
    prompts = [encode_prompt(tokenizer, row["problem"]) for row in rows]
    texts = sample(model, tokenizer, prompts, 1, 80, seed=5).texts
    lines = []
    for i, row in enumerate(rows):
        question = row["problem"].removeprefix("Compute ").removesuffix(".")
        completion = texts[i] if i % 5 else rf"\boxed{{{question}}}"
        lines.append(json.dumps({"prompt": row["problem"], "completion": completion}) + "\n")
    TRACES.write_text("".join(lines))


def line(name: str, results) -> list:
    """An arm's row: copies by step, then the held-out answers of the last policy."""
    by_step = ex.Results(results).probes(name, lambda probe: probe["copies"])
    cells = [name]
    for step in AT:  # the start has none
        shares = [run[step] for run in by_step if step < len(run)]
        cells.append(ex.spread(shares, 2) if shares else "")
    for key in ("copies", "right", "reward"):
        cells.append(ex.spread([result["after"][key] for result in results[name]], 3))
    return cells


def main():
    args = ex.arguments(__doc__, seeds=3)
    FOLDER.mkdir(parents=True, exist_ok=True)
    OLD.write_text(ex.git("show", "3ba9b2d:common/verify.py") + "\n\n"
                   "def of_row(text, row):\n    return reward(text, row['answer'])\n")
    if not TRACES.exists():
        write_traces()
    start = ex.Arm("long_cot_sft.py", f"--traces {TRACES} --epochs 3 --max-new-tokens 80",
                   after=held_out)
    arms = {"old": ex.Arm("grpo.py", f"{GRPO} --reward {OLD}:of_row"),
            "this one": ex.Arm("grpo.py", GRPO)}
    for arm in arms.values():
        arm.probe, arm.every, arm.after = look, 1, held_out
    one = argparse.Namespace(seeds=1, workers=1, more="")
    results = ex.runs("verifier", {"start": start}, one) | ex.runs("verifier", arms, args)
    heads = ["verifier", *(f"step {step}" for step in AT), "held out: copies", "right", "reward"]
    print(ex.table(heads, [line(name, results) for name in results]))


if __name__ == "__main__":
    main()
