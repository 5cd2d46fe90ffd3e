"""The scripts as a user starts them: two steps each, every kind of model folder, resume, Ctrl-C, and one clear line for bad input."""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bupo
import grpo
from common import evaluate
from common.errors import BadInput
from common.models import initial_model, load_model
from common.optim import MasterAdamW

ROOT = pathlib.Path(__file__).parent.parent
SMALL = "--steps 2 --prompts-per-step 2 --group-size 4 --max-new-tokens 24 --eval-problems 2 --eval-k 2".split()
scripts = pytest.mark.parametrize("script", [grpo, bupo], ids=["grpo", "bupo"])


def run(script, *flags, output):
    script.main([*SMALL, "--output", str(output), *map(str, flags)])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@scripts
def test_two_steps(script, tmp_path, capsys):
    rows = run(script, output=tmp_path / "run")
    said = capsys.readouterr().out
    assert "<|im_start|>user\\nCompute" in said and "memory plan" in said and "before:" in said and "after:" in said and "curve.png" in said
    assert [row["step"] for row in rows] == [1, 2]
    assert {"reward", "length", "entropy", "truncated", "no_signal", "tokens_per_second", "seconds_sampling", "seconds_verifying",
            "seconds_training", "peak_gb", "grad_norm"} <= set(rows[0])
    assert all(row.get("gap_max", 0) < 1e-4 for row in rows)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"avg_at_k_before", "avg_at_k_after", "standard_error_before", "standard_error_after", "k", "seconds"} <= set(summary)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["flags"]["group_size"] == 4
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("flags", [
    "--advantage rloo", "--advantage reinforce++", "--advantage dr_grpo --aggregation constant", "--aggregation sequence --dual-clip 10",
    "--updates-per-rollout 2 --clip-high 0.28", "--kl-coef 0.1", "--truncated mask", "--lora-rank 2", "--dtype bfloat16", "--max_new_tokens 1"])
def test_switches(flags, tmp_path):
    rows = run(grpo, *flags.split(), "--eval-problems", 0, output=tmp_path / "run")
    assert len(rows) == 2 and all(torch.tensor(row.get("grad_norm", 0.0)).isfinite() for row in rows)


def test_second_pass_over_a_rollout_is_off_policy(tmp_path):
    """One pass: every ratio is 1. Two passes: the second starts from other weights, so some ratio is not 1, and the averages are over two
    updates: the first adds clip fraction 0."""
    flags = ("--steps", 1, "--group-size", 16, "--eval-problems", 0)
    one, = run(grpo, *flags, output=tmp_path / "one")
    two, = run(grpo, *flags, "--ppo-epochs", 2, output=tmp_path / "two")
    assert one["ratio_max"] == 1 and two["ratio_max"] > 1 and one["reward"] == two["reward"] and 0 <= two["clip_fraction"] <= 0.5


def test_first_phase_trains_the_lower_blocks_only(tmp_path):
    """Two internal steps at block 3: blocks 1-3, embedding and unembedding move, blocks 4-8 and the final norm stay to the bit."""
    bupo.main([*SMALL, "--layer", "3", "--internal-steps", "2", "--prompts-per-step", "8", "--group-size", "16", "--max-new-tokens", "60",
               "--eval-problems", "0", "--output", str(tmp_path / "run")])
    before, after = load_file(ROOT / "common" / "tiny" / "model.safetensors"), weights(tmp_path / "run")
    for name, old in before.items():
        moved = not torch.equal(old, after[name])
        above = name.startswith(tuple(f"model.layers.{i}." for i in range(3, 8)) + ("model.norm",))
        assert moved != above, name


def test_phases_are_counted_exactly(tmp_path, capsys):
    """--internal-steps 2 of 3: rows 1 and 2 are of the layer, row 3 of the model, and the switch is announced at step 3."""
    rows = run(bupo, "--steps", 3, "--internal-steps", 2, "--layer", 5, "--eval-problems", 0, output=tmp_path / "run")
    assert [row["layer"] for row in rows] == [5, 5, None]
    assert "step 3: phase 2" in capsys.readouterr().out


def test_layer_auto_prints_its_table(tmp_path, capsys):
    run(bupo, "--steps", 1, "--eval-problems", 0, output=tmp_path / "run")
    said = capsys.readouterr().out
    assert "<- boundary" in said and "phase 1: steps 1 to 1 train the policy of block" in said


@pytest.mark.parametrize("layer, changes, taken, says", [
    ("1", None, 1, ""), ("4", None, 4, ""), ("0", None, None, "1 (lowest) to 4"), ("5", None, None, "1 (lowest) to 4"),
    ("auto", (1, 0.5, -1, 0), 2, "\n    2                   0.000              +0.500   <- boundary\n"),
    ("auto", (1, 0.5, 0.07, -1), 3, "fragile choice, it moves with the tolerance: 0.01 gives 3, 0.02 gives 3, 0.05 gives 3, 0.1 gives 2, 0.2 gives 2"),
    ("auto", (1, 1, 1, 1), 3, "block 4's policy is the model's own, so block 3 is taken"),  # min(4, L - 1) at every tolerance: not fragile
    ("auto", (-1, -1, 0, 0), None, "no block's FFN raises the entropy")])
def test_which_layer_is_taken(layer, changes, taken, says, monkeypatch, capsys):
    """Four blocks whose FFNs change the entropy by these; where one is named, nothing is sampled."""
    zero = torch.zeros(4)
    entropies = {f"{name}_{side}": zero for name in ("attn", "ffn", "layer") for side in ("in", "out")}
    monkeypatch.setattr(bupo, "sample", lambda *args, **kwargs: None)
    monkeypatch.setattr(bupo, "rollout_entropies", lambda *args: entropies | {"ffn_out": torch.tensor(changes, dtype=torch.float32)})
    cfg = SimpleNamespace(layer=layer, max_new_tokens=8, temperature=1.0, seed=0, micro_batch_tokens=99)
    of = SimpleNamespace(cfg=cfg, model=random_model("qwen3"), tokenizer=None, train=[{"prompt": [5]}])
    if taken is None:
        with pytest.raises(BadInput, match=re.escape(says)):
            bupo.choose_layer(of)
        return
    assert bupo.choose_layer(of) == taken
    said = capsys.readouterr().out
    assert says in said and ("fragile" in said) == ("fragile" in says) and said.count("<- boundary") == (layer == "auto")


@scripts
def test_real_model_folders(script, model_folder, tmp_path, capsys):
    """A Qwen3, a Qwen2 with tied weights and a Llama, with a byte-level tokenizer, a chat template and a data file like GSM8K."""
    data = tmp_path / "gsm.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"What is {i} + {i}?", "answer": f"Twice.\n#### {2 * i}"}) for i in range(10)))
    layer = ["--layer", 2, "--internal-steps", 1] if script is bupo else []
    rows = run(script, "--model", model_folder, "--data", data, "--system", "Put your final answer within \\boxed{}.", *layer, output=tmp_path / "run")
    said = capsys.readouterr().out
    assert "problem from 'question', answer from 'answer'" in said and "<think>\\n\\n</think>" in said and len(rows) == 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert again.config.model_type in str(model_folder) and again.config.tie_word_embeddings == ("qwen2" in str(model_folder))


@scripts
@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16", "--kl-coef", 0.1], ["--lora-rank", 2]], ids=["float32", "bfloat16-kl", "lora"])
def test_resume_gives_the_very_weights(script, flags, tmp_path, monkeypatch):
    """Four steps at once, and four steps of which the third was stopped after two by Ctrl-C, with the same weights to the bit."""
    flags = [*flags, "--steps", 4, "--internal-steps", 1] if script is bupo else [*flags, "--steps", 4]
    whole = run(script, *flags, "--group-size", 16, "--eval-problems", 1, "--save-every", 100, output=tmp_path / "whole")
    taken, log = [], script.start

    def stopping_start(cfg, name):
        started = log(cfg, name)
        write = started.log

        def write_and_stop(*args, **kwargs):
            write(*args, **kwargs)
            if started.step == 1 and not taken:
                taken.append(1)
                os.kill(os.getpid(), signal.SIGINT)
        started.log = write_and_stop
        return started
    monkeypatch.setattr(script, "start", stopping_start)
    with pytest.raises(SystemExit) as stop:
        run(script, *flags, "--group-size", 16, "--eval-problems", 1, "--save-every", 100, output=tmp_path / "cut")
    assert stop.value.code == 130
    script.main(["--resume", str(tmp_path / "cut")])
    name = "adapter_model.safetensors" if "--lora-rank" in flags else "model.safetensors"
    first, second = (load_file(tmp_path / folder / "model" / name) for folder in ("whole", "cut"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    steady = ("step", "reward", "length", "entropy", "loss", "grad_norm", "layer")
    assert [[row.get(k) for k in steady] for row in rows] == [[row.get(k) for k in steady] for row in whole]


def test_an_optimizer_on_the_cpu_changes_nothing(tmp_path):
    """On a CPU only the bookkeeping differs, so weights are equal to the bit; and a run goes on without it from the same checkpoint."""
    flags = ["--advantage", "reinforce++", "--eval-problems", 0, "--group-size", 8]
    rows = run(grpo, *flags, output=tmp_path / "plain")
    assert any(row.get("grad_norm") for row in rows)
    run(grpo, *flags, "--offload-optimizer", output=tmp_path / "offloaded")
    run(grpo, *flags, "--offload-optimizer", "--steps", 1, output=tmp_path / "resumed")
    grpo.main(["--resume", str(tmp_path / "resumed"), "--no-offload-optimizer", "--steps", "2"])
    for other in ("offloaded", "resumed"):
        a, b = weights(tmp_path / "plain"), weights(tmp_path / other)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_adapters_have_the_models_dtype():
    """Else every product with them would be one in float32; their masters are."""
    model = load_model("tiny", dtype="bfloat16", lora_rank=2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in MasterAdamW(model, 1e-3).masters} == {torch.float32}


def test_lora(tmp_path):
    """Fresh adapters change nothing; only they train; peft alone loads what is saved; merged it is the same model; the reference of
    the KL is the base: after training its log-probs are those of the embedded model."""
    from peft import PeftModel
    ids = torch.arange(20, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(ROOT / "common" / "tiny")
    fresh = load_model("tiny", lora_rank=4)
    assert torch.allclose(fresh(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-6)
    assert all("lora_" in name for name, p in fresh.named_parameters() if p.requires_grad)
    run(grpo, "--lora-rank", 4, "--merge", "--kl-coef", 0.01, "--lr", 1e-2, "--group-size", 16, "--max-new-tokens", 60,
        "--eval-problems", 0, output=tmp_path / "run")
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / "common" / "tiny"), tmp_path / "run" / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    assert torch.allclose(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-3)
    assert not torch.allclose(merged(input_ids=ids).logits, base(input_ids=ids).logits, atol=0.05)
    with initial_model(None, adapted)() as initial:
        assert torch.allclose(initial(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-6)


def bad_inputs(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    full = tmp_path / "full"
    full.mkdir(exist_ok=True)
    (full / "metrics.jsonl").write_text("{}\n")
    for folder, script in (("foreign", "ppo"),):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"script": script, "flags": {"steps": 3}}))
    return {
        "--model no/such/model": "no model in", f"--model {tmp_path}": "no model in", "--data missing.jsonl": "no such file",
        f"--data {data}": "column", f"--data {empty}": "no rows", "--group-size 1": "at least 2", "--lr 0": "above 0", "--lr x": "invalid float",
        "--temperature 0": "above 0", "--steps 0": "at least 1", "--clip-low 2": "at most 1", "--advantage ppo": "invalid choice",
        "--no-such-flag 1": "unrecognized", "--device cuda:7": "--device", f"--output {full}": "holds something already",
        f"--resume {tmp_path}": "no run there", f"--resume {tmp_path / 'foreign'}": "a run of ppo.py", "--updates-per-rollout 3": "must divide", "--max-new-tokens 512": "context", "--kl-coef -1": "at least 0"}


@scripts
def test_bad_input_is_one_line_and_code_2(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = bad_inputs(tmp_path)
    if script is bupo:
        table |= {"--layer 0": "1 (lowest) to 8", "--layer 9": "1 (lowest) to 8", "--layer x": "1 (lowest) to 8", "--internal-steps -1": "at least 0"}
    before = sorted(tmp_path.rglob("*"))
    for flags, message in table.items():
        with pytest.raises(SystemExit) as stop:
            script.main(flags.split())
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and message in error[0], (flags, error)
        assert sorted(tmp_path.rglob("*")) == before, flags


def test_from_the_shell(tmp_path):
    """The real process: bad input leaves with 2, one line and no folder; --help with 0 and the reason for each default."""
    bad = subprocess.run([sys.executable, ROOT / "bupo.py", "--layer", "99"], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.strip().splitlines()[-1].startswith("error: --layer 99") and not list(tmp_path.iterdir())
    assert "Traceback" not in bad.stderr
    helped = subprocess.run([sys.executable, ROOT / "bupo.py", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--internal-steps" in helped.stdout and "Deviations ledger" in helped.stdout


def test_evaluate(tmp_path, capsys, monkeypatch):
    """One row a problem, its answers and which were right; Avg@k is their mean."""
    monkeypatch.chdir(tmp_path)
    evaluate.main("--problems 6 --k 4 --output answers.jsonl".split())
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    summary = rows.pop()["summary"]
    assert len(rows) == 6 and all(len(row["responses"]) == len(row["correct"]) == 4 for row in rows)
    average = sum(sum(row["correct"]) for row in rows) / 24
    assert f"Avg@4 {average:.3f} ±" in said and all(f"Pass@{j} {value:.3f}" in said for j, value in summary["pass_at"].items())
    assert summary["avg_at_k"] == pytest.approx(average) and list(summary["pass_at"]) == ["1", "2", "3", "4"]
    for flags, message in (("--k 0", "at least 1"), ("--output answers.jsonl", "exists"), ("--model nowhere/x/y", "no model"), ("--temperature -1", "at least 0")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags.split())
        assert stop.value.code == 2 and message in capsys.readouterr().err
