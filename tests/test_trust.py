"""Nothing is lost, executed or wrong in silence: kills, damaged files, full disks, NaN, memory."""
import io
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scripts import (
    ROOT,
    TINY,
    assert_same_run,
    every_script,
    groups,
    rows_of,
    run,
    weights_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import common.run
import grpo
import long_cot_sft
import ppo
from common import evaluate
from common.flags import parse_args
from common.run import Run, new_folder


def fails(capsys, call, *expected):
    """One line on stderr that starts with `error: `, exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    said = re.sub("\r|\x1b\\[A", "\n", capsys.readouterr().err)  # bars of runs that died move up
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert all(part in lines[0] for part in expected), lines[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three steps of grpo.py at once; its checkpoint is of step 3."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(grpo, output=folder)
    return folder


@pytest.fixture
def cut(whole, tmp_path):
    """The same run after a kill in its third step: a checkpoint of step 2, a row too many."""
    save = Run.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", lambda self, step: step < 3 and save(self, step))
        patch.setattr(Run, "finish", lambda self: None)
        run(grpo, output=tmp_path / "cut")
    return tmp_path / "cut"


# kills

def die_at(owner, name, call):
    """This process is killed at the call-th call of owner.name; in torch.save half the file lies
    on the disk by then."""
    real = getattr(owner, name)
    calls = iter(range(1, 10**6))

    def dying(*args, **kwargs):
        if next(calls) == call:
            if name == "save":
                real(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, dying)


def run_and_kill(script, folder, owner, name, call):
    """A process of its own, forked from this one: starts the run or goes on with it, and dies."""
    child = os.fork()
    if child == 0:
        try:
            die_at(owner, name, call)
            start_or_resume(script, folder)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def start_or_resume(script, folder):
    if (folder / "config.json").exists():
        script.main(["--resume", str(folder)])
    else:
        run(script, output=folder)


@every_script
def test_a_kill_at_any_moment_changes_nothing(script, tmp_path):
    """Killed while it evaluates, before its first checkpoint, as it writes a checkpoint, within an
    update, and as it saves the model: it ends as the very run that nothing happened to."""
    cut = tmp_path / "cut"
    run_and_kill(script, cut, common.run, "evaluate", 1)
    assert not (cut / "checkpoint.pt").exists()
    called_once_per_step = "as_rollout" if script is long_cot_sft else "sample"
    run_and_kill(script, cut, script, called_once_per_step, 2)
    run_and_kill(script, cut, torch, "save", 2)
    assert (cut / "checkpoint.tmp").exists() and (cut / "checkpoint.pt").exists()
    run_and_kill(script, cut, torch.optim.AdamW, "step", 1)
    run_and_kill(script, cut, common.run, "save_model", 1)
    start_or_resume(script, cut)
    run(script, output=tmp_path / "whole")
    assert_same_run(tmp_path / "whole", cut)
    assert not list(cut.rglob("*.tmp"))


def test_leftovers_of_a_kill_are_gone(cut, whole):
    """Half a row, half a file."""
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    (cut / "summary.json.tmp").write_text("{")
    (cut / "checkpoint.tmp").write_text("half")
    grpo.main(["--resume", str(cut)])
    assert_same_run(whole, cut)
    assert not list(cut.rglob("*.tmp"))


@pytest.mark.parametrize("flags", ["--lora-rank 2", "--dtype bfloat16 --kl-coef 0.1"])
def test_adapters_and_bfloat16_resume_to_the_bit(flags, tmp_path, monkeypatch):
    run(grpo, *flags.split(), output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda self: None)
        run(grpo, *flags.split(), output=tmp_path / "cut")
    grpo.main(["--resume", str(tmp_path / "cut")])
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(grpo, "sample", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(grpo, output=tmp_path / "run")
    said = capsys.readouterr().err
    assert stop.value.code == 130 and "--resume" in said and "Traceback" not in said


def test_runs_that_start_at_once_take_folders_of_their_own(tmp_path):
    """Eight at the same place: eight folders, none of them another's."""
    found = []
    together = threading.Barrier(8)

    def start():
        together.wait()
        found.append(new_folder(tmp_path / "runs" / "grpo"))
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = ["grpo"] + [f"grpo-{n}" for n in range(2, 9)]
    assert sorted(path.name for path in found) == sorted(names)


# damage, and what cannot be gone on with

class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def attack(folder):
    torch.save(Attack(), folder / "checkpoint.pt")


def half_of(name):
    def damage(folder):
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
    return damage


def text_in(name, text):
    def damage(folder):
        (folder / name).write_text(text)
    return damage


DAMAGE = {
    "half a checkpoint": (half_of("checkpoint.pt"), "cannot be resumed from"),
    "no checkpoint but text": (text_in("checkpoint.pt", "hello"), "cannot be resumed from"),
    "a pickle that runs code": (attack, "cannot be resumed from"),
    "half a config": (half_of("config.json"), "config.json"),
    "a config that is a list": (text_in("config.json", "[]"), "config.json"),
}


def listing(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case, cut, capsys, monkeypatch):
    """One line; nothing is executed, written over or deleted."""
    monkeypatch.chdir(cut.parent)
    damage, line = DAMAGE[case]
    damage(cut)
    before = listing(cut.parent)
    fails(capsys, lambda: grpo.main(["--resume", str(cut)]), str(cut), line)
    assert listing(cut.parent) == before


@pytest.mark.parametrize("flags", ["--seed 1", "--lora-rank 2", "--model other"])
def test_what_a_run_keeps(flags, cut, capsys):
    """Another seed or other data would make another run of it."""
    fails(capsys, lambda: grpo.main(["--resume", str(cut), *flags.split()]),
          f"{cut}: {flags.split()[0].strip('-').replace('-', '_')} is", "must be the same")


@pytest.mark.parametrize("flags", ["--eval-problems 3", "--data other.jsonl"])
def test_other_problems(flags, cut, capsys, monkeypatch):
    """What makes other problems is seen by the hash of all of them."""
    monkeypatch.chdir(cut.parent)
    rows = [{"problem": f"Compute {i}+1.", "answer": str(i + 1)} for i in range(20)]
    (cut.parent / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fails(capsys, lambda: grpo.main(["--resume", str(cut), *flags.split()]),
          f"{cut}: data_hash")


def test_other_flags_are_recorded(cut):
    """A run that goes on with more steps, and is killed again, knows of them."""
    grpo.main(["--resume", str(cut), "--steps", "4"])
    (cut / "model").rename(cut / "old")
    config = json.loads((cut / "config.json").read_text())
    assert config["flags"]["steps"] == 4
    grpo.main(["--resume", str(cut)])
    assert (cut / "model").is_dir()


def test_fewer_steps_than_are_done(cut, capsys):
    before = listing(cut)
    fails(capsys, lambda: grpo.main(["--resume", str(cut), "--steps", "1"]), "--steps 1: 2 are")
    assert listing(cut) == before


@pytest.mark.parametrize("change", [lambda tensors: tensors[1:],
                                    lambda tensors: [{"value": torch.zeros(7)} for _ in tensors]])
def test_a_checkpoint_of_another_model(change, cut, capsys):
    """A tensor fewer, or other shapes: one line, nothing is written."""
    *logged, tensors = torch.load(cut / "checkpoint.pt", weights_only=True)
    torch.save((*logged, change(tensors)), cut / "checkpoint.pt")
    before = listing(cut)
    fails(capsys, lambda: grpo.main(["--resume", str(cut)]), f"{cut}: its checkpoint is another")
    assert listing(cut) == before


def test_all_that_was_logged_is_in_the_checkpoint(cut, whole):
    """Rows and answers that are damaged or lost come back."""
    (cut / "metrics.jsonl").write_text("a\nb\n")
    (cut / "rollouts.jsonl").unlink()
    grpo.main(["--resume", str(cut)])
    assert_same_run(whole, cut)


def test_logs_come_back_where_no_step_follows(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "rollouts.jsonl").write_text("half a li")
    grpo.main(["--resume", str(tmp_path / "run")])
    assert_same_run(whole, tmp_path / "run")


def test_the_first_command_stays(cut):
    """What began a run stands in config.json, with the flags in force."""
    began = json.loads((cut / "config.json").read_text())
    grpo.main(["--resume", str(cut), "--steps", "4"])
    config = json.loads((cut / "config.json").read_text())
    assert config["command"] == began["command"] and config["commit"] == began["commit"]
    assert config["flags"]["steps"] == 4


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    fails(capsys, lambda: grpo.main(["--output", str(tmp_path / "file"), "--steps", "1"]), "file")
    assert (tmp_path / "file").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_data_that_has_changed(tmp_path, capsys, monkeypatch):
    """The same name, other rows."""
    data = tmp_path / "data.jsonl"
    rows = [{"problem": f"Compute {i}+1.", "answer": str(i + 1)} for i in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)))
    run(grpo, "--data", data, output=tmp_path / "run")
    rows[3]["answer"] = "9"
    data.write_text("\n".join(map(json.dumps, rows)))
    fails(capsys, lambda: grpo.main(["--resume", str(tmp_path / "run")]), "data_hash")


def test_the_learning_rate_can_change(cut):
    """The optimiser's state brings its old learning rate along; the flag wins: at 1e-12 the weights
    stay those of the checkpoint, to rounding."""
    *_, tensors = torch.load(cut / "checkpoint.pt", weights_only=True)
    grpo.main(["--resume", str(cut), "--lr", "1e-12"])
    after = AutoModelForCausalLM.from_pretrained(cut / "model").parameters()
    for saved, weight in zip(tensors, after, strict=True):
        assert (saved["value"] - weight).abs().max() < 1e-8
    assert rows_of(cut)[2]["grad_norm"] > 0


# disks

@pytest.fixture
def small_files():
    """No file may grow beyond 2 MiB; a checkpoint has 10, the model 3."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_cannot_be_written(whole, tmp_path, capsys, small_files):
    """As on a full disk: one line, and with room the run goes on to the very weights."""
    fails(capsys, lambda: run(grpo, output=tmp_path / "run"), "checkpoint.tmp cannot be written")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    grpo.main(["--resume", str(tmp_path / "run")])
    assert_same_run(whole, tmp_path / "run")


def test_a_model_that_cannot_be_written(tmp_path, capsys, monkeypatch, small_files):
    monkeypatch.setattr(Run, "save", lambda *args: None)
    fails(capsys, lambda: run(grpo, "--steps", 1, output=tmp_path / "run"))


def test_a_score_is_printed_before_a_full_disk_is_met(tmp_path, capsys, monkeypatch):
    """16 answers of 4 problems in a file that may not grow beyond 100 bytes: the score stands on
    the screen, and no half file has the name that was asked for."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    flags = ["--problems", "4", "--k", "4", "--output", str(tmp_path / "answers.jsonl")]
    try:
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "Avg@4" in said.out and "Traceback" not in said.err
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_generation_config_that_could_not_be_saved(tmp_path):
    """A temperature without do_sample, and a stop token that the script adds: saved with do_sample,
    so that the temperature means what it says."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((base / "generation_config.json").read_text())
    config.update(temperature=0.6, top_p=0.95, do_sample=False)
    (base / "generation_config.json").write_text(json.dumps(config))
    run(long_cot_sft, "--model", base, "--eval-problems", 0, output=tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["top_p"] == 0.95 and saved["do_sample"] is True


def test_places_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (pathlib.Path("/dev/null"), pathlib.Path("/proc"), tmp_path / "file"):
        fails(capsys, lambda place=folder / "run": run(grpo, output=place), str(folder))


# numbers

def poison(monkeypatch, value, bad_calls):
    """The loss is multiplied by `value` in these calls; every other answer is called right."""
    real = grpo.grpo_loss
    calls = iter(range(10**6))
    verdicts = iter([0.0, 1.0] * 10**4)

    def loss(*args, **kwargs):
        found, metrics = real(*args, **kwargs)
        return found * (value if next(calls) in bad_calls else 1), metrics
    monkeypatch.setattr(grpo, "grpo_loss", loss)
    monkeypatch.setattr(grpo, "reward", lambda text, row: next(verdicts))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_left_out_and_counted(value, tmp_path, monkeypatch, capsys):
    """Of three steps of one micro-batch each the second is spoilt: two updates are made."""
    poison(monkeypatch, value, {1})
    rows = run(grpo, "--micro-batch-tokens", 10**6, output=tmp_path / "run")
    said = capsys.readouterr()
    assert [row["skipped"] for row in rows] == [0, 1, 0]
    assert (said.out + said.err).count("note: step 2: a gradient was not finite") == 1
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "run").values())


def test_if_none_is_finite_nothing_moves(tmp_path, monkeypatch):
    poison(monkeypatch, math.nan, range(100))
    rows = run(grpo, output=tmp_path / "run")
    assert [row["skipped"] for row in rows] == [1, 1, 1]
    before, after = load_file(TINY / "model.safetensors"), weights_of(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@groups
def test_nothing_to_learn_changes_nothing(script, tmp_path, monkeypatch, capsys):
    """All answers are equally good: no update, no decay, and one note says why."""
    monkeypatch.setattr(script, "reward", lambda text, row: 0.0)
    rows = run(script, output=tmp_path / "run")
    said = capsys.readouterr()
    assert (said.out + said.err).count("nothing to learn from") == 1
    assert all(row["grad_norm"] == row["skipped"] == 0 for row in rows)
    before, after = load_file(TINY / "model.safetensors"), weights_of(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_script
def test_one_token_answers(script, tmp_path, capsys):
    """Nearly all are cut off: one note says what to raise, and the weights stay numbers."""
    if script is long_cot_sft:
        return  # its answers are the teacher's
    rows = run(script, "--max-new-tokens", 1, output=tmp_path / "run")
    said = capsys.readouterr()
    assert all(row["length"] == 1 and row["truncated"] > 0.9 for row in rows)
    assert (said.out + said.err).count("cut off at --max-new-tokens") == 1
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "run").values())


def test_a_sampler_that_differs_from_the_trainer_is_told_once(tmp_path, monkeypatch, capsys):
    """Log-probs that are 0.2 nats off in every token of every step."""
    real = grpo.sample

    def sample(*args, **kwargs):
        rollout = real(*args, **kwargs)
        rollout.logp -= 0.2
        return rollout
    monkeypatch.setattr(grpo, "sample", sample)
    rows = run(grpo, output=tmp_path / "run")
    said = capsys.readouterr()
    assert all(row["gap_max"] == pytest.approx(0.2, abs=1e-3) for row in rows if "gap_max" in row)
    assert (said.out + said.err).count("sampler and trainer differ by over 0.1 nats") == 1


OUT = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nSee the manual"),
                                   RuntimeError(OUT)], ids=["GPU", "CPU"])
def test_memory_that_runs_out_is_one_line(error, tmp_path, monkeypatch, capsys):
    def sample(*args, **kwargs):
        raise error
    monkeypatch.setattr(grpo, "sample", sample)
    fails(capsys, lambda: run(grpo, output=tmp_path / "run"), "emory")


# models

def test_dropout_is_off_while_training(model_folder, tmp_path):
    """A model published with a dropout of 0.5: sampler and trainer agree in the first update."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    row, *_ = run(ppo, "--model", base, "--steps", 1, "--eval-problems", 0, output=tmp_path / "run")
    assert row["gap_max"] < 1e-3 and abs(row["kl"]) < 1e-3


@pytest.mark.parametrize("rename", [
    lambda name: None if name == "lm_head.weight" else name, lambda name: f"other.{name}"])
def test_missing_weights_are_refused(rename, tmp_path, capsys):
    """Not trained from random numbers."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = {rename(name): weight for name, weight in weights_in(base).items()}
    weights.pop(None, None)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    fails(capsys, lambda: run(grpo, "--model", base, output=tmp_path / "run"),
          "weights are not in its files, lm_head.weight")


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def test_another_stop_token_of_the_template_is_said(model_folder, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    run(grpo, "--model", base, "--steps", 1, "--eval-problems", 0, output=tmp_path / "run")
    assert "answers also end at '<|im_end|>'" in capsys.readouterr().out


def test_adapters_learn_ten_times_as_fast():
    """3e-4 becomes 3e-3; a rate that is given stays."""
    for flags, lr in (([], 3e-4), (["--lora-rank", "4"], 3e-3),
                      (["--lora-rank", "4", "--lr", "1e-5"], 1e-5)):
        assert parse_args(grpo.Args, grpo.REAL, "", flags).lr == pytest.approx(lr)


def test_the_change_is_paired_by_problem(tmp_path, capsys):
    """Its error is that of the problems' own changes, from the summary's rewards by problem."""
    run(grpo, "--steps", 1, "--eval-problems", 6, output=tmp_path / "run")
    said = re.search(r"change: (\S+) ± (\S+),", capsys.readouterr().out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    pairs = zip(summary["by_problem_before"], summary["by_problem_after"], strict=True)
    changes = torch.tensor([after - before for before, after in pairs], dtype=torch.float64)
    assert float(said[1]) == pytest.approx(changes.mean().item(), abs=6e-4)
    assert float(said[2]) == pytest.approx(changes.std().item() / 6 ** 0.5, abs=6e-4)


# processes

def test_a_console_that_is_not_utf_8(tmp_path, monkeypatch):
    """The line with the plus-minus sign is printed with a question mark, the run ends well."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    run(grpo, "--steps", 1, output=tmp_path / "run")
    console.flush()
    said = console.buffer.getvalue().decode("ascii")
    assert re.search(r"change: \S+ \? ", said) and (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("processes", ["2", ""])
def test_processes_that_torchrun_did_not_start(processes, tmp_path, monkeypatch):
    """A WORLD_SIZE that something else has set makes no run wait for others."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    run(grpo, "--steps", 1, output=tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()


# supply

def test_no_network(tmp_path, monkeypatch):
    """Nothing connects anywhere when neither model nor data is a hub id."""
    def connect(*args):
        raise AssertionError(f"connects to {args}")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    run(grpo, "--steps", 1, "--lora-rank", 2, output=tmp_path / "run")


def test_nothing_is_unpickled_or_run():
    """Every torch.load says weights_only=True, and no model's own code or pickle is asked for."""
    code = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")])
    safe = re.findall(r"torch\.load\([^\n]*weights_only=True", code)
    assert code.count("torch.load(") == len(safe)
    assert "trust_remote_code=True" not in code and "import pickle" not in code
