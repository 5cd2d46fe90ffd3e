"""Every command in the README runs: small, and with local files under the names that are on the hub; links lead somewhere."""
import ast
import hashlib
import importlib
import json
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
QUOTED = re.findall(r"(?<!`)`((?:python|torchrun|diff) [^`]+)`(?!`)", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
COMMANDS = list(dict.fromkeys(" ".join(part.split()) for line in [*"".join(BLOCKS).splitlines(), *QUOTED]
                              for part in line.split("&&") if part.strip() and not part.strip().startswith("pip install")))
LOOP = "--steps 1 --prompts-per-step 2 --group-size 4 --max-new-tokens 16 --eval-problems 2 --eval-k 1 --micro-batch-tokens 999"
SMALL = {"entropy_min": "--steps 1 --group-size 4 --max-new-tokens 16 --eval-problems 2 --eval-k 1",
         "long_cot_sft": "--teacher-problems 12 --samples 2 --batch-size 64 --epochs 1 --max-new-tokens 16 --eval-problems 2 --eval-k 1",
         "ppo": f"{LOOP} --updates-per-rollout 1", "kl3_grpo": f"{LOOP} --updates-per-rollout 1", "grpo": LOOP, "bupo": LOOP,
         "common.evaluate": "--problems 2 --k 1 --max-new-tokens 8", "common.internal_policy": "--samples 2 --max-new-tokens 8"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands name: problems, traces, a text, two runs."""
    monkeypatch.chdir(tmp_path)
    problems = [{"problem": f"Compute {a}+{a + 1}.", "answer": str(2 * a + 1)} for a in range(10, 40)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps({"prompt": row["problem"], "completion": rf"\boxed{{{row['answer']}}}"})
                                                   + "\n" for row in problems))
    (tmp_path / "sail.txt").write_text("Compute 1+2.")
    return tmp_path


def local(word: str) -> str:
    """A hub id -> what stands for it here."""
    if word.startswith("Qwen/"):
        return "tiny"
    return {"demystify-long-cot/math-train-qwq-rs-n32": "traces.jsonl"}.get(
        word, "problems.jsonl" if re.fullmatch(r"[\w-]+/[\w.:-]+", word) and not word.startswith("runs/") else word)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, place):
    program, *words = shlex.split(command)
    if program == "pytest":
        return
    if program == "diff":
        assert all((ROOT / word).is_file() for word in words)
        return
    if program == "torchrun":
        words = words[2:]  # --nproc-per-node 8: two processes are test_distributed.py's
    script = words.pop(0) if words[0] != "-m" else words.pop(1)
    words = [word for word in words if word != "-m"]
    if "/" in script:  # hours of work, or a benchmark: that it is there and reads
        ast.parse((ROOT / script).read_text())
        return
    name = script.removesuffix(".py")
    for run in [word for word in words if word.startswith("runs/")]:
        importlib.import_module("grpo").main([*LOOP.split(), "--output", run])
    arguments = [*map(local, words), *SMALL.get(name, "").split()]
    try:
        importlib.import_module(name).main(arguments)
    except SystemExit as end:
        assert "--help" in words and not end.code


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_pages_are_those_of_the_files():
    """docs/html is made from the files, and by docs/pages.py, as they are; no page is missing, none is left over."""
    maker, made = (ROOT / "docs/pages.py").read_bytes(), set()
    for page in (ROOT / "docs/html").glob("*.html"):
        name, digest = re.search(r"<!-- (\S+) sha256 (\w+) -->", page.read_text()).groups()
        assert digest == hashlib.sha256((ROOT / name).read_bytes() + maker).hexdigest(), f"{page.name} is old: python docs/pages.py"
        made.add(name)
    assert made == set(ast.literal_eval(re.search(r"^FILES = (\[.*?\])", maker.decode(), re.M | re.S)[1]))


def test_lines_of_the_table():
    for name, lines in re.findall(r"\[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name
