"""Every command in the README runs: small, with local files under the names that are on the hub."""
import ast
import importlib
import json
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
QUOTED = re.findall(r"(?<!`)`((?:python|torchrun|diff) [^`]+)`(?!`)", PROSE)
LOOP = ("--steps 1 --prompts-per-step 2 --group-size 4 --max-new-tokens 16 --eval-problems 2 "
        "--micro-batch-tokens 999")
SMALL = {
    "grpo": LOOP,
    "bupo": LOOP,
    "kl3_grpo": f"{LOOP} --updates-per-rollout 1",
    "ppo": f"{LOOP} --updates-per-rollout 1",
    "entropy_min": "--steps 1 --group-size 4 --max-new-tokens 16 --eval-problems 2",
    "long_cot_sft": "--teacher-problems 12 --samples 2 --batch-size 64 --epochs 1 "
                    "--max-new-tokens 16 --eval-problems 2",
    "common.evaluate": "--problems 2 --k 1 --max-new-tokens 8",
    "analysis.internal": "--samples 2 --max-new-tokens 8",
    "analysis.logits": "--problems 2 --max-new-tokens 8",
}


def commands() -> list[str]:
    """All commands of the README, each once, but for pip's."""
    found = {}
    for line in [*BLOCKS.splitlines(), *QUOTED]:
        for part in line.split("&&"):
            command = " ".join(part.split())
            if command and not command.startswith(("pip install", "pytest")):
                found[command] = None
    return list(found)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands name: problems, traces, a reward, two runs."""
    monkeypatch.chdir(tmp_path)
    problems = []
    traces = []
    for a in range(10, 40):
        problem, answer = f"Compute {a}+{a + 1}.", str(2 * a + 1)
        problems.append({"problem": problem, "answer": answer})
        traces.append({"prompt": problem, "completion": rf"\boxed{{{answer}}}"})
    for name, rows in (("problems", problems), ("traces", traces)):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    rewards = re.search(r"```python\n(# my_rewards.py.*?)```", README, re.DOTALL)[1]
    (tmp_path / "my_rewards.py").write_text(rewards)
    return tmp_path


def local(word: str) -> str:
    """A hub id -> what stands for it here."""
    if word.startswith("Qwen/"):
        return "tiny"
    if word.startswith("demystify-long-cot/"):
        return "traces.jsonl"
    is_hub_id = re.fullmatch(r"[\w-]+/[\w.:-]+", word) and not word.startswith("runs/")
    return "problems.jsonl" if is_hub_id else word


@pytest.mark.parametrize("command", commands())
def test_command(command, place):
    program, *words = shlex.split(command)
    if program == "diff":
        assert all((ROOT / word).is_file() for word in words)
        return
    if program == "torchrun":
        words = words[2:]  # two processes are test_distributed.py's
    if words[0] == "-m":
        words.pop(0)
    name = words.pop(0).removesuffix(".py")
    hours = name == "analysis.reproduce" or name.endswith("_results")
    if name.startswith("tests/") or hours:  # that it reads
        path = name.replace(".", "/") + ".py"
        ast.parse((ROOT / path).read_text(encoding="utf-8"))
        return
    for run in [word for word in words if word.startswith("runs/")]:
        importlib.import_module("grpo").main([*LOOP.split(), "--output", run])
    small = SMALL.get(name, "").split()
    try:
        importlib.import_module(name).main([*map(local, words), *small])
    except SystemExit as end:
        assert "--help" in words and not end.code


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
