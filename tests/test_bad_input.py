"""Bad flags, files and models: one line on stderr, exit code 2, no file written or changed."""
import importlib
import json
import os
import shutil

import huggingface_hub.constants
import pytest
import torch
from conftest import random_model
from test_scripts import TINY

SCRIPTS = ["grpo", "bupo", "kl3_grpo", "entropy_min", "long_cot_sft", "ppo"]
RL = ["grpo", "bupo", "kl3_grpo", "ppo"]
EVALUATE = ["common.evaluate"]
SOME = ["a script", *EVALUATE]  # each in turn, where all run the same lines of common/

# Commands, flags, what the line must say.
TABLE = [
    # flags
    (SCRIPTS + EVALUATE, "--no-such-flag 1", "unrecognized arguments: --no-such-flag"),
    (SCRIPTS + EVALUATE, "--max-new-tokens 0", "--max-new-tokens 0: must be at least 1"),
    (SOME, "--seed", "expected one argument"),
    (SOME, "--seed -1", "must be at least 0"),
    (SOME, "--seed 1.5", "--seed: invalid int value: '1.5'"),
    (SOME, "--dtype int8", "invalid choice"),
    (SOME, "--device nonsense", "--device nonsense"),
    (SOME, "--device cuda:99", "--device cuda:99"),
    (SOME, "--max-new-tokens 512", "every prompt is longer than the 0 tokens"),
    (SCRIPTS, "--lr -1", "--lr -1.0: must be at least 0 and at most"),
    (["a script"], "--lr nan", "--lr nan: must be at least 0"),
    (["a script"], "--lr x", "--lr: invalid float value: 'x'"),
    (["a script"], "--eval-problems -1", "must be at least 0"),
    (["a script"], "--lora-rank -1", "must be at least 0"),
    (["a script"], "--micro-batch-tokens 0", "must be at least 1"),
    (RL, "--steps 0", "must be at least 1"),
    (RL, "--temperature 0", "must be at least 0.01"),
    (RL, "--updates-per-rollout 3", "must be divisible by --updates-per-rollout"),
    (["grpo", "bupo", "kl3_grpo"], "--group-size 1", "must be at least 2"),
    (["grpo"], "--advantage ppo", "invalid choice"),
    (["grpo"], "--clip-low 2", "must be at least 0 and at most 1"),
    (["grpo"], "--kl-coef -1", "must be at least 0"),
    (["bupo"], "--layer 0", "1 (the lowest) to 8"),
    (["bupo"], "--layer 9", "1 (the lowest) to 8"),
    (["bupo"], "--layer first", "1 (the lowest) to 8"),
    (["kl3_grpo"], "--delta -1", "must be at least 0"),
    (["kl3_grpo"], "--measure kl", "invalid choice"),
    (["entropy_min"], "--group-size 8 --shots 3", "must be divisible by --shots"),
    (["entropy_min"], "--shots 2 --problem 1+1?", "must be 1 with --problem"),
    (["entropy_min"], "--shots 4096 --group-size 4096", "--shots 4096: --data has 2048 problems"),
    (["ppo"], "--length-reward D", "invalid choice"),
    (["long_cot_sft"], "--traces missing.jsonl", "missing.jsonl"),
    (["long_cot_sft"], "--traces columns.jsonl", "without messages, or a prompt"),
    (EVALUATE, "--k 0", "must be at least 1"),
    (EVALUATE, "--temperature -1", "must be at least 0"),
    (EVALUATE, "--top-p 0", "must be at least 0.01 and at most 1"),
    # models
    (SOME, "--model ./missing", "cannot load model './missing' (no folder of this name"),
    (SOME, "--model nosuch", "no model in 'nosuch'"),
    (SOME, "--model empty", "cannot load model 'empty'"),           # a folder without a model
    (SOME, "--model nobody/nothing", "cannot load model 'nobody/nothing'"),      # a hub id, offline
    (SOME, "--model notjson", "cannot load model 'notjson'"),       # config.json is not JSON
    (SOME, "--model cut", "cannot load model 'cut'"),               # half of model.safetensors
    (SOME, "--model notokens", "cannot load model 'notokens'"),     # tokenizer.json is not one
    (SOME, "--model pickled", "cannot load model 'pickled'"),       # pytorch_model.bin, a pickle
    (SOME, "--model owncode", "cannot load model 'owncode'"),       # needs code of its own
    (SOME, "--model adapters", "adapters alone"),
    (SOME, "--model foreign_tokens", "the tokenizer is another model's"),
    (SOME, "--model templates", "multiple chat templates with no default"),
    (SOME, "--model breaks", "chat template refuses"),              # it raises a TypeError
    (SOME, "--seed 1234567890123456789", "and at most 1e+09"),
    # data
    (SOME, "--data missing.jsonl", "missing.jsonl: cannot be read, [Errno 2] No such file"),
    (SOME, "--data folder.jsonl", "folder.jsonl"),
    (SOME, "--data empty.jsonl", "empty.jsonl: no rows"),
    (SOME, "--data notes.txt", "notes.txt"),
    (SOME, "--data binary.jsonl", "binary.jsonl: cannot be read"),
    (SOME, "--data half.jsonl", "half.jsonl: cannot be read, line 2 is not JSON"),
    (SOME, "--data nested.jsonl", "nested.jsonl: "),         # brackets without end
    (SOME, "--data numbers.jsonl", "every row must be an object"),
    (SOME, "--data binary.parquet", "binary.parquet: cannot be read"),
    (SOME, "--data nobody/nothing", "nobody/nothing"),       # a hub id, offline
    (SOME, "--data columns.jsonl", "no column is named problem or question"),
    (SOME, "--data nogold.jsonl", "no row has both a problem"),
    (SOME, "--data long.jsonl", "every prompt is longer than"),         # prompts beyond the context
    (["a script"], "--eval-data missing.jsonl", "missing.jsonl: cannot be read"),
    (["a script"], "--eval-data columns.jsonl", "columns.jsonl: no column is named"),
    # places
    (SCRIPTS, "--output full", "full: holds something already"),
    (["a script"], "--output notes.txt/run", "notes.txt"),
    (EVALUATE, "--output notes.txt", "notes.txt: exists already"),
    (EVALUATE, "--output missing/answers.jsonl", "its folder does not exist"),
    (SCRIPTS, "--resume missing", "--resume missing: no run there"),
    (["a script"], "--resume empty", "--resume empty: no run there"),
    (["a script"], "--resume notjson", "--resume notjson: no run there"),
    (SCRIPTS, "--resume foreign", "script is other there"),
]
ROWS = [(SCRIPTS[i % len(SCRIPTS)] if command == "a script" else command, flags, line)
        for i, (commands, flags, line) in enumerate(TABLE) for command in commands]


class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def model_like(folder, *left_out):
    ignored = shutil.ignore_patterns("*.py", "__pycache__", *left_out)
    shutil.copytree(TINY, folder, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the table names: models, data and runs that cannot be used."""
    here = tmp_path_factory.mktemp("workspace")
    for name in ("empty", "full", "folder.jsonl", "foreign", "adapters"):
        (here / name).mkdir()
    (here / "full" / "metrics.jsonl").write_text("{}\n")
    (here / "foreign" / "config.json").write_text('{"script": "other", "flags": {}}')
    (here / "adapters" / "adapter_config.json").write_text("{}")
    (model_like(here / "notjson") / "config.json").write_text('{"model_type": ')
    os.truncate(model_like(here / "cut") / "model.safetensors", 100_000)
    (model_like(here / "notokens") / "tokenizer.json").write_text("[]")
    random_model(vocab_size=20).save_pretrained(model_like(here / "foreign_tokens"))
    templates = model_like(here / "templates", "*.jinja")
    (templates / "additional_chat_templates").mkdir()
    (templates / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (model_like(here / "breaks") / "chat_template.jinja").write_text("{{ messages[0] + 1 }}")
    pickled = model_like(here / "pickled", "*.safetensors")
    torch.save(Attack(), pickled / "pytorch_model.bin")
    owncode = model_like(here / "owncode")
    config = json.loads((owncode / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (owncode / "config.json").write_text(json.dumps(config))
    (owncode / "code.py").write_text("import os\nos.mkdir('executed')\n")
    rows = {"columns": {"text": "a"}, "nogold": {"problem": "1+1?", "answer": ""},
            "long": {"problem": "9+" * 600 + "1", "answer": "2"}, "numbers": 5}
    for name, row in rows.items():
        (here / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (here / "half.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "1+')
    (here / "empty.jsonl").write_text("")
    (here / "notes.txt").write_text("not a row\n")
    (here / "nested.jsonl").write_text("[" * 200_000)
    for name in ("binary.jsonl", "binary.parquet"):
        (here / name).write_bytes(bytes(range(255, 0, -1)))
    return here


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("command, flags, line", ROWS)
def test_bad_input(command, flags, line, workspace, capsys, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = listing(workspace)
    module = importlib.import_module(command)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main(flags.split())
    said = capsys.readouterr().err
    lines = [text for text in said.replace("\r", "\n").splitlines() if text.strip()]
    assert stop.value.code == 2 and len(lines) == 1, said
    assert "error: " in lines[0] and line in lines[0], said
    assert listing(workspace) == before
