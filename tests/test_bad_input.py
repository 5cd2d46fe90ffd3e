"""The bad-input table: each row starts the command it names, with the flags it names, and must end with one line, exit code 2, and not
a file written or changed.

Every row is a process of its own with the real command line. The processes are forked from one that has done nothing but import
(a fresh Python with torch takes seconds to start, a fork milliseconds); they run without network (HF_HUB_OFFLINE).
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = [name for name in ("grpo", "bupo", "kl3_grpo", "entropy_min", "long_cot_sft", "ppo") if (ROOT / f"{name}.py").exists()]
LOOP = [name for name in SCRIPTS if name != "long_cot_sft"]
MODULES = ["common.evaluate", "common.internal_policy"]

# Commands, flags, what the line must say. "a script" is each of them in turn: where all run the same lines of common/.
TABLE = [
    (SCRIPTS + MODULES, "--no-such-flag 1", "unrecognized arguments: --no-such-flag"),
    (SCRIPTS + MODULES, "--seed", "expected one argument"),
    (SCRIPTS + MODULES, "--seed -1", "--seed -1: must be at least 0"),
    (SCRIPTS + MODULES, "--seed 1.5", "invalid int value"),
    (SCRIPTS + MODULES, "--max-new-tokens 0", "--max-new-tokens 0: must be at least 1"),
    (SCRIPTS + MODULES, "--max-new-tokens 512", "--max-new-tokens: lower it by 1 or more"),
    (SCRIPTS + MODULES, "--device nonsense", "--device nonsense"),
    (SCRIPTS + MODULES, "--device cuda:99", "--device cuda:99"),
    (SCRIPTS + MODULES, "--device cpu --cuda-graphs", "--cuda-graphs: the device is cpu"),
    (SCRIPTS + MODULES, "--dtype int8", "invalid choice"),
    (["a script", *MODULES], "--model ./missing", "no model in './missing'"),
    (["a script", *MODULES], "--model empty", "no model in 'empty'"),                    # a folder without a model
    (["a script", *MODULES], "--model nobody/nothing", "cannot load model 'nobody/nothing'"),  # a hub id, offline
    (["a script", *MODULES], "--model notjson", "cannot load model 'notjson'"),          # config.json is not JSON
    (["a script", *MODULES], "--model cut", "cannot load model 'cut'"),                  # half of model.safetensors
    (["a script", *MODULES], "--model notokens", "cannot load model 'notokens'"),        # tokenizer.json is not one
    (["a script", *MODULES], "--model pickled", "cannot load model 'pickled'"),          # pytorch_model.bin, a pickle
    (["a script", *MODULES], "--model owncode", "cannot load model 'owncode'"),          # needs code of its own
    (["a script", *MODULES], "--data missing.jsonl", "--data missing.jsonl: no such file"),
    (["a script", *MODULES], "--data folder.jsonl", "--data folder.jsonl"),
    (["a script", *MODULES], "--data empty.jsonl", "--data empty.jsonl: no rows"),
    (["a script", *MODULES], "--data notes.txt", "--data notes.txt"),
    (["a script", *MODULES], "--data binary.jsonl", "--data binary.jsonl: not JSON"),
    (["a script", *MODULES], "--data nested.jsonl", "--data nested.jsonl: not JSON"),    # brackets without end
    (["a script", *MODULES], "--data binary.parquet", "--data binary.parquet: not parquet"),
    (["a script", *MODULES], "--data nobody/nothing", "--data nobody/nothing"),
    (["a script", *MODULES], "--data columns.jsonl", "no problem / question / prompt / query column, the data has: text"),
    (["a script", *MODULES], "--data good.jsonl --answer-column nope", "no nope column"),
    (["a script", *MODULES], "--data nogold.jsonl", "no row has both a problem"),
    (["a script", *MODULES], "--data long.jsonl", "longer than"),                        # every prompt beyond the context
    (["a script", "common.internal_policy"], "--output full", "full: holds something already"),
    (["a script", "common.internal_policy"], "--output notes.txt", "notes.txt: holds something already"),
    (["common.evaluate"], "--output notes.txt", "notes.txt: exists already"),
    (["common.evaluate"], "--output notes.txt/answers.jsonl", "notes.txt/answers.jsonl: cannot write there"),
    (["a script", "common.internal_policy"], "--output notes.txt/run", "notes.txt/run: cannot write there"),
    (SCRIPTS, "--resume missing", "--resume missing: no run there"),
    (SCRIPTS, "--resume empty", "--resume empty: no run there"),
    (SCRIPTS, "--resume notjson", "--resume notjson: its config.json is not a run's"),
    (SCRIPTS, "--resume foreign", "--resume foreign: a run of other.py"),
    (LOOP, "--steps 0", "--steps 0: must be at least 1"),
    (SCRIPTS, "--lr 0", "--lr 0.0: must be above 0"),
    (SCRIPTS, "--lr nan", "--lr nan: must be a finite number"),
    (SCRIPTS, "--lr inf", "--lr inf: must be a finite number"),
    (SCRIPTS, "--save-every 0", "--save-every 0: must be at least 1"),
    (SCRIPTS, "--eval-problems -1", "--eval-problems -1: must be at least 0"),
    (SCRIPTS, "--eval-k 0", "--eval-k 0: must be at least 1"),
    (SCRIPTS, "--lora-rank -1", "--lora-rank -1: must be at least 0"),
    (SCRIPTS, "--micro-batch-tokens 0", "--micro-batch-tokens 0: must be at least 1"),
    (LOOP, "--temperature 0", "--temperature 0.0: must be above 0"),
    (["grpo", "bupo", "kl3_grpo", "entropy_min"], "--group-size 1", "--group-size 1: must be at least 2"),
    (["grpo", "bupo", "kl3_grpo"], "--updates-per-rollout 3", "must divide --prompts-per-step"),
    (["bupo"], "--layer 9", "1 (lowest) to 8"),
    (["bupo"], "--layer first", "1 (lowest) to 8"),
    (["kl3_grpo"], "--delta 0", "--delta 0.0: must be above 0"),
    (["kl3_grpo"], "--clip-low 0.2", "go together"),
    (["entropy_min"], "--shots 3", "--shots 3 must divide"),
    (["entropy_min"], "--problem-file missing.txt", "no such file"),
    (["entropy_min"], "--problem-file empty.jsonl", "--problem-file empty.jsonl: is empty"),
    (["entropy_min"], "--problem-file binary.jsonl", "--problem-file binary.jsonl: not utf-8"),
    (["common.evaluate"], "--k 0", "--k 0: must be at least 1"),
    (["common.internal_policy"], "--sample-layer 9", "has blocks 1 (lowest) to 8"),
    (["common.verify"], "", "pairs.jsonl"),
    (["common.verify"], "missing.jsonl", "missing.jsonl"),
    (["common.verify"], "notes.txt", "notes.txt"),
    (["common.verify"], "columns.jsonl", "columns.jsonl"),
]
THERE = [*SCRIPTS, *MODULES, "common.verify"]
ROWS = [(SCRIPTS[i % len(SCRIPTS)] if command == "a script" else command, flags, line)
        for i, (commands, flags, line) in enumerate(TABLE) for command in commands if command in [*THERE, "a script"]]

# Imports, then forks one process for each [command, flags] read from stdin -> [exit code, stderr, what changed in the folder] each
FORKS = r"""
import json, os, pathlib, runpy, sys, warnings
root, rows = sys.argv[1], json.load(sys.stdin)
sys.path.insert(0, root)
import datasets, matplotlib.pyplot, torch
import common.evaluate, common.internal_policy, common.run
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
for name in ("evaluate", "internal_policy", "verify"):  # so that runpy does not warn of a module that is there already
    sys.modules.pop("common." + name)
look = lambda: {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in pathlib.Path(".").rglob("*")}
results = []
for command, flags in rows:
    before = look()
    child = os.fork()
    if child == 0:
        code = 0
        try:
            for number, name in ((1, os.devnull), (2, "../stderr")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = [command, *flags.split()]
            if "." in command:
                runpy.run_module(command, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(f"{root}/{command}.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:
            code = 1
            print("Traceback", repr(error)[:300], file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    code, after = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), look()
    results.append([code, pathlib.Path("../stderr").read_text(), sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))])
json.dump(results, sys.stdout)
"""


class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def model_like(folder, leave_out=()):
    shutil.copytree(ROOT / "common" / "tiny", folder, ignore=shutil.ignore_patterns("*.py", "__pycache__", *leave_out))
    return folder


def make_workspace(here):
    """What the table names: models, data and runs that cannot be used."""
    (here / "empty").mkdir()
    (here / "full").mkdir()
    (here / "full" / "metrics.jsonl").write_text("{}\n")
    (here / "folder.jsonl").mkdir()
    (here / "foreign").mkdir()
    (here / "foreign" / "config.json").write_text(json.dumps({"script": "other", "flags": {}}))
    (model_like(here / "notjson") / "config.json").write_text('{"model_type": ')
    os.truncate(model_like(here / "cut") / "model.safetensors", 100_000)
    (model_like(here / "notokens") / "tokenizer.json").write_text("[]")
    torch.save(Attack(), model_like(here / "pickled", ["*.safetensors"]) / "pytorch_model.bin")
    config = json.loads((model_like(here / "owncode") / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (here / "owncode" / "config.json").write_text(json.dumps(config))
    (here / "owncode" / "code.py").write_text("import os\nos.mkdir('executed')\n")
    (here / "notes.txt").write_text("not a row\n")
    for name, row in (("columns", {"text": "a"}), ("good", {"problem": "1+1?", "answer": "2"}), ("nogold", {"problem": "1+1?", "answer": ""}),
                      ("long", {"problem": "9+" * 600 + "1", "answer": "2"})):
        (here / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (here / "empty.jsonl").write_text("")
    (here / "nested.jsonl").write_text("[" * 200_000)
    for name in ("binary.jsonl", "binary.parquet"):
        (here / name).write_bytes(bytes(range(255, 0, -1)))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    here = tmp_path_factory.mktemp("bad") / "workspace"
    here.mkdir()
    make_workspace(here)
    done = subprocess.run([sys.executable, "-c", FORKS, ROOT], cwd=here, input=json.dumps([row[:2] for row in ROWS]), capture_output=True, text=True,
                          timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    return dict(zip(((command, flags) for command, flags, _ in ROWS), json.loads(done.stdout)))


@pytest.mark.parametrize("command, flags, line", ROWS, ids=[f"{command} {flags}" for command, flags, _ in ROWS])
def test_bad_input(command, flags, line, results):
    code, said, changed = results[command, flags]
    errors = [text for text in said.replace("\r", "\n").splitlines() if text.startswith("error: ")]
    assert "Traceback" not in said and len(errors) == 1 and line in errors[0], said[-1500:]
    assert code == 2 and not changed, (code, changed)


@pytest.mark.parametrize("command", [["grpo.py", "--lr", "0"], ["-m", "common.evaluate", "--k", "0"], ["-m", "common.internal_policy", "--samples", "0"],
                                     ["-m", "common.verify", "missing.jsonl"]], ids=lambda command: " ".join(command))
def test_from_a_fresh_python(command, tmp_path):
    """The same without the fork."""
    command = [str(ROOT / command[0]), *command[1:]] if command[0].endswith(".py") else command
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
