"""The scripts in small: what a run prints and leaves, switches, rewards of one's own, adapters."""
import json
import pathlib
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bupo
import common.run
import entropy_min
import grpo
import kl3_grpo
import long_cot_sft
import ppo
from common import evaluate
from common.flags import BadInput
from common.models import adapters_off, load_model, reference_model

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "common" / "tiny"
ANSWERS = "--max-new-tokens 32 --eval-problems 2"
LOOP = f"--steps 3 --prompts-per-step 4 --group-size 8 {ANSWERS}"
SMALL = {
    grpo: LOOP,
    bupo: f"{LOOP} --internal-steps 1",
    kl3_grpo: f"{LOOP} --updates-per-rollout 2",
    entropy_min: f"--steps 3 --group-size 8 {ANSWERS}",
    long_cot_sft: f"--teacher-problems 12 --samples 2 --batch-size 5 --epochs 1 {ANSWERS}",
    ppo: f"{LOOP} --updates-per-rollout 2",
}
CLOCKS = ("tokens_per_second",)  # and seconds: what differs between two equal runs
every_script = pytest.mark.parametrize("script", SMALL, ids=[m.__name__ for m in SMALL])
groups = pytest.mark.parametrize("script", [grpo, bupo, kl3_grpo], ids=["grpo", "bupo", "kl3"])


def run(script, *flags, output):
    """Runs a script in small -> its rows of metrics."""
    script.main([*SMALL[script].split(), "--output", str(output), *map(str, flags)])
    return rows_of(output)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def weights_of(folder):
    return load_file(next((folder / "model").glob("*.safetensors")))


def assert_same_run(folder, other):
    """Final weights to the bit, rows and summary but for what a clock or a meter gave."""
    kept = []
    for place in (folder, other):
        rows = []
        answers = place / "rollouts.jsonl"
        if answers.exists():  # long_cot_sft.py samples none
            kept.append(answers.read_text())
        for row in [*rows_of(place), summary_of(place)]:
            rows.append({name: repr(value) for name, value in row.items()
                         if name not in CLOCKS and not name.startswith("seconds")})
        kept.append(rows)
    half = len(kept) // 2
    assert kept[:half] == kept[half:]
    one, two = weights_of(folder), weights_of(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@every_script
def test_what_a_run_prints_and_leaves(script, tmp_path, capsys):
    rows = run(script, output=tmp_path / "run")
    said = capsys.readouterr().out
    assert "<|im_start|>user\\nCompute" in said and "memory, GiB" in said
    assert "before:" in said and "after:" in said and "change:" in said
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["skipped"] == 0 for row in rows) and any(row["grad_norm"] > 0 for row in rows)
    assert all(row.get("gap_max", 0) < 1e-4 for row in rows)
    assert {"seconds", "k", "avg_at_k_before", "avg_at_k_after", "standard_error_before",
            "standard_error_after"} <= summary_of(tmp_path / "run").keys()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["script"] == script.__name__ and config["flags"]["max_new_tokens"] == 32
    assert config["device"] == "cpu" and len(config["data_hash"]) == 16
    assert len(config["commit"]) == 40 or "git" in config["commit"]  # or why there is none
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "base_model: tiny" in card and f"trained by {script.__name__}.py" in card
    assert "Avg@8 before, 2 held-out" in card and "Avg@8 after, 2 held-out" in card
    assert not list(tmp_path.rglob("*.tmp"))
    before = load_file(TINY / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    after = model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").eos_token == "<|im_end|>"


def test_the_config_names_the_dtype_of_the_weights(tmp_path):
    """Both bfloat16, that of matrix products, while float32 weights were trained."""
    run(grpo, "--steps", 1, "--dtype", "bfloat16", "--eval-problems", 0, output=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    dtypes = {weight.dtype for weight in weights_of(tmp_path / "run").values()}
    assert config["dtype"] == "bfloat16" and dtypes == {torch.bfloat16}


@groups
def test_some_answers_of_every_step_are_kept(script, tmp_path, monkeypatch):
    """Four answers to the first problem per step; an answer's reward is its length in characters, 0
    if it was cut off."""
    monkeypatch.setattr(script, "reward", lambda text, row: len(text))
    run(script, output=tmp_path / "run")
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    for row in rows:
        assert row["reward"] == (len(row["text"]) if row["finished"] else 0)
        assert 1 <= row["length"] <= 32 and (row["finished"] or row["length"] == 32)
    assert len({row["problem"] for row in rows[:4]}) == 1
    assert rows[3]["problem"] != rows[4]["problem"]


def test_evaluation_on_the_way_changes_nothing_else(tmp_path):
    """At a learning rate of 1e-12 accuracy stays what it was before;
    step 3, the last, is evaluated by the end of the run."""
    flags = ("--lr", "1e-12")
    rows = run(grpo, *flags, "--eval-every", 1, output=tmp_path / "run")
    before = summary_of(tmp_path / "run")["avg_at_k_before"]
    assert [row.get("avg_at_k") for row in rows] == [pytest.approx(before, abs=1e-5)] * 2 + [None]
    plain = run(grpo, *flags, output=tmp_path / "plain")
    for name in ("reward", "loss", "entropy", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in plain]


def test_rows_go_to_a_tracker_and_a_missing_one_is_told_first(tmp_path, monkeypatch, capsys):
    given = []
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **options: SimpleNamespace(
        log=lambda numbers, step: given.append((step, numbers["reward"])))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    rows = run(grpo, "--track", "wandb", output=tmp_path / "run")
    assert given == [(row["step"], row["reward"]) for row in rows]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        run(grpo, "--track", "wandb", output=tmp_path / "none")
    assert stop.value.code == 2 and "wandb" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none").exists()


def test_the_largest_gap_is_of_all_ranks(tmp_path, monkeypatch):
    """Another rank's micro-batches have the gaps 0 and 2: 2, though its first is the smaller."""
    monkeypatch.setattr(common.run, "everyone",
                        lambda x: [x, [0.0, 2.0]] if isinstance(x, list) else [x])
    rows = run(grpo, "--steps", 1, "--eval-problems", 0, output=tmp_path / "run")
    assert rows[0]["gap_max"] == 2.0


@groups
def test_rows_of_a_loop_with_rewards(script, tmp_path):
    row, *_ = run(script, output=tmp_path / "run")
    assert {"reward", "length", "entropy", "truncated", "no_signal", "tokens_per_second", "loss",
            "seconds"} <= row.keys()


@every_script
def test_help_gives_a_reason_for_each_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    said = capsys.readouterr().out
    assert not stop.value.code and "--micro-batch-tokens" in said and "[larger models:" in said
    assert all(f"\n{number}. " in said for number in (1, 2, 3, 4))


@pytest.mark.parametrize("flags", [
    "--advantage rloo", "--advantage reinforce++ --aggregation sequence --kl-coef 0.1",
    "--advantage dr_grpo --aggregation constant", "--updates-per-rollout 2 --dual-clip 3",
    "--dtype bfloat16", "--max_new_tokens 1"])
def test_switches(flags, tmp_path):
    rows = run(grpo, "--steps", 1, "--eval-problems", 0, *flags.split(), output=tmp_path / "run")
    assert len(rows) == 1 and rows[0]["skipped"] == 0
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "run").values())


# BuPO's phases

def test_first_phase_trains_the_lower_blocks_only(tmp_path):
    """Internal steps at block 3 of 8: blocks 1 to 3, embedding and unembedding move; blocks 4 to 8
    and the final norm stay to the bit."""
    run(bupo, "--layer", 3, "--internal-steps", 3, "--group-size", 16, output=tmp_path / "run")
    before, after = load_file(TINY / "model.safetensors"), weights_of(tmp_path / "run")
    above = tuple(f"model.layers.{i}." for i in range(3, 8)) + ("model.norm",)
    for name, old in before.items():
        assert torch.equal(old, after[name]) == name.startswith(above), name


def test_phases_are_counted_exactly(tmp_path, capsys):
    """--internal-steps 2 of 3: rows 1 and 2 are the layer's, row 3 the model's."""
    rows = run(bupo, "--internal-steps", 2, "--layer", 5, output=tmp_path / "run")
    said = capsys.readouterr()
    assert [row["layer"] for row in rows] == [5, 5, 8]
    assert "step 3: from here on the whole model" in said.out + said.err


@pytest.mark.parametrize("layer, changes, chosen", [
    ("1", None, 1), ("8", None, 8), ("0", None, "1 (the lowest) to 8"),
    ("9", None, "1 (the lowest) to 8"), ("auto", [1, 0.5, -1, 0, 0, 0, 0, 0], 2),
    ("auto", [0, 1, 1, 0.04, 1, 0, 0, 0], 3),    # 0.04 is below 5 % of 1: it ends the run of rises
    ("auto", [1] * 8, 7),                        # block 8's policy is the model's own
    ("auto", [-1] + [0] * 7, 1)])                # no FFN explores: 6 of 36 of a Qwen, 1.33 of 8
def test_which_layer_is_chosen(layer, changes, chosen, monkeypatch, capsys):
    """Eight blocks whose FFNs change the entropy by these; a block that is named is taken."""
    zero = torch.zeros(8)
    entropies = {f"{name}_{side}": zero for name in ("attn", "ffn", "layer")
                 for side in ("in", "out")}
    entropies["ffn_out"] = torch.tensor(changes or [0.0], dtype=torch.float32)
    asked = []
    rollout = SimpleNamespace(prompts=None, tokens=None, lengths=None)
    monkeypatch.setattr(bupo, "sample", lambda *args, **kwargs: asked.append(1) or rollout)
    monkeypatch.setattr(bupo, "join", lambda *args: (None, torch.ones(1, 4, dtype=torch.bool)))
    monkeypatch.setattr(bupo, "internal_entropies", lambda *args: entropies)
    args = SimpleNamespace(model="tiny", layer=layer, max_new_tokens=8, temperature=1.0, seed=0)
    of = SimpleNamespace(args=args, model=AutoModelForCausalLM.from_pretrained(TINY),
                         tokenizer=None, train=[], encode=list)
    if isinstance(chosen, str):
        with pytest.raises(BadInput) as error:
            bupo.choose_layer(of)
        assert chosen in str(error.value)
        return
    assert bupo.choose_layer(of) == chosen
    assert len(asked) == capsys.readouterr().out.count("<- ") == (layer == "auto")


def test_layers_of_the_paper():
    """Qwen3-4B's 36 blocks: 6; a Llama's 28: 27; a sixth of 24, 8 and 2: 4, 1, 1."""
    for kind, blocks, layer in (("qwen3", 36, 6), ("llama", 28, 27), ("qwen2", 24, 4),
                                ("qwen3", 8, 1), ("qwen2", 2, 1)):
        config = SimpleNamespace(model_type=kind, num_hidden_layers=blocks)
        assert bupo.paper_layer(config) == layer


# models and data of one's own

@pytest.mark.parametrize("script", [grpo, bupo], ids=["grpo", "bupo"])
def test_real_model_folders(script, model_folder, tmp_path, capsys):
    """A Qwen3, a Qwen2 with tied weights and a Llama, with a byte-level tokenizer, a chat template
    and a file like GSM8K's."""
    data = tmp_path / "gsm.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": f"Twice.\n#### {2 * i}"}
            for i in range(10)]
    data.write_text("\n".join(map(json.dumps, rows)))
    layer = ["--layer", 2] if script is bupo else []
    run(script, "--model", model_folder, "--data", data, *layer, output=tmp_path / "run")
    said = capsys.readouterr().out
    assert "problem from 'question', answer from 'answer'" in said
    assert "<think>\\n\\n</think>" in said
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert again.config.model_type in model_folder.name
    assert again.config.tie_word_embeddings == ("qwen2" in model_folder.name)


# rewards

REWARDS = '''
def half(text, row):
    assert row["level"] == 3 and row["question"] == row["problem"] and row["answer"] == "7"
    return 0.5

def one(text, row):
    return 1.0

def broken(text, row):
    return row["no such column"]
'''


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """my_rewards.py, and problems.jsonl, whose rows have a column of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    rows = [{"question": f"Compute {i}-{i}+7.", "answer": "7", "level": 3} for i in range(20)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@groups
def test_a_reward_from_a_file(script, rewards):
    """Half a point stays half a point, in training and in evaluation, where Pass@k, which counts
    rewards of 1 and more, stays 0. What was cut off gets nothing: so 0.5 x the share that ended."""
    rows = run(script, "--reward", "my_rewards.py:half", "--data", "problems.jsonl",
               output=rewards / "run")
    for row in rows:
        assert row["reward"] == pytest.approx(0.5 * (1 - row["truncated"]), abs=1e-4)
        assert row["reward"] > 0
    summary = summary_of(rewards / "run")
    assert 0 < summary["avg_at_k_before"] <= 0.5 and set(summary["pass_at_before"].values()) == {0}


@groups
def test_a_reward_file_that_cannot_be_used_is_one_line(script, rewards, capsys):
    for place, line in (("missing.py:half", "missing.py:half: give a file"),
                        ("my_rewards.py:third", "KeyError"), ("my_rewards.py", "give a file"),
                        ("problems.jsonl:half", "give a file")):
        with pytest.raises(SystemExit) as stop:
            run(script, "--reward", place, output=rewards / "run")
        said = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(said) == 1 and line in said[0]
    assert not (rewards / "run").exists()


def test_cut_off_answers_are_wrong_in_training(rewards):
    """A reward that is always 1: what is left is the share of answers that ended."""
    row, *_ = run(grpo, "--max-new-tokens", 12, "--reward", "my_rewards.py:one",
                  output=rewards / "run")
    assert 0 < row["truncated"] < 1
    assert row["reward"] == pytest.approx(1 - row["truncated"], abs=1e-4)


def test_cut_off_answers_are_wrong_in_evaluation(rewards, capsys):
    """The same of every single answer, and of Avg@k, which is their mean."""
    evaluate.main("--problems 6 --k 4 --max-new-tokens 12 --reward my_rewards.py:one "
                  "--output answers.jsonl".split())
    *rows, last = [json.loads(line) for line in (rewards / "answers.jsonl").open()]
    ended = [end for row in rows for end in row["finished"]]
    assert [reward for row in rows for reward in row["rewards"]] == [float(x) for x in ended]
    assert len(ended) == 24 and 0 < sum(ended) < 24
    assert last["summary"]["avg_at_k"] == pytest.approx(sum(ended) / 24)
    assert f"Avg@4 {sum(ended) / 24:.3f} ±" in capsys.readouterr().out


# adapters

def test_lora(tmp_path):
    """Fresh adapters change nothing; only they train; peft alone loads what is saved; merged it is
    the same function; the reference of a KL is the model without them."""
    ids = torch.arange(20, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(TINY)
    args = SimpleNamespace(model="tiny", device="cpu", dtype="auto", lora_rank=4)
    fresh = load_model(args)
    assert torch.allclose(fresh(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-6)
    assert {p.dtype for p in fresh.parameters() if p.requires_grad} == {torch.float32}
    assert all("lora_" in name for name, p in fresh.named_parameters() if p.requires_grad)
    run(grpo, "--lora-rank", 4, "--merge", "--kl-coef", 0.01, "--lr", 1e-2, "--group-size", 16,
        output=tmp_path / "run")
    folder = tmp_path / "run" / "model"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY), folder)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    found = merged(input_ids=ids).logits
    assert torch.allclose(adapted(input_ids=ids).logits, found, atol=1e-3)
    assert not torch.allclose(found, base(input_ids=ids).logits, atol=0.05)
    for name, weight in fresh.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    reference = reference_model(args, fresh)
    with adapters_off(reference):
        found = reference(input_ids=ids).logits
    assert torch.allclose(found, base(input_ids=ids).logits, atol=1e-6)
    assert not torch.allclose(fresh(input_ids=ids).logits, found, atol=0.05)


@every_script
def test_every_script_trains_adapters(script, tmp_path):
    run(script, "--lora-rank", 2, "--eval-problems", 0, output=tmp_path / "run")
    names = weights_of(tmp_path / "run")
    assert names and all("lora_" in name for name in names)
    assert any(weight.abs().max() > 0 for name, weight in names.items() if "lora_B" in name)


def test_from_the_shell(tmp_path):
    """The real process: one line, exit code 2, nothing is written."""
    done = subprocess.run([sys.executable, ROOT / "bupo.py", "--layer", "99"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == ["error: --layer 99: auto, or a block, 1 (the lowest) to 8"]
