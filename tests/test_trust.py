"""Nothing is lost, nothing is executed, nothing hangs: kills, broken checkpoints, full disks, NaN, memory that runs out."""
import collections
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

import bupo
import common.run
import entropy_min
import grpo
import kl3_grpo
from common import checkpoints
from common.logprobs import micro_batches, response_logprobs
from common.models import load_model
from common.optim import MasterAdamW

ROOT = pathlib.Path(__file__).parent.parent
TINY = ROOT / "common" / "tiny" / "model.safetensors"
SMALL = "--steps 3 --save-every 1 --prompts-per-step 4 --group-size 8 --max-new-tokens 32 --eval-problems 0".split()


def run(script, *flags, output):
    small = [f for i, f in enumerate(SMALL) if script is not entropy_min or i not in (4, 5)]
    script.main([*small, "--output", str(output), *map(str, flags)])
    return rows_of(output)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(folder, other):
    """Final weights to the bit, and the rows but for what a clock or a meter gave."""
    steady = lambda row: {k: repr(v) for k, v in row.items() if not k.startswith("seconds") and k not in ("tokens_per_second", "peak_gb")}
    assert list(map(steady, rows_of(folder))) == list(map(steady, rows_of(other)))
    a, b = (load_file(f / "model" / "model.safetensors") for f in (folder, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fails(capsys, call, *expected):
    """One line on stderr that starts with `error: `, exit code 2 -> all that was said."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    said = capsys.readouterr()
    lines = [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in said.err, said.err
    assert all(part in lines[0] for part in expected), lines[0]
    return said.out + said.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three steps at once; the checkpoints of steps 2 and 3 are there."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(grpo, output=folder)
    return folder


@pytest.fixture
def cut(whole, tmp_path):
    """The same, killed after its last checkpoint."""
    shutil.copytree(whole, tmp_path / "cut", ignore=shutil.ignore_patterns("curve.png"))
    shutil.rmtree(tmp_path / "cut" / "model")
    return tmp_path / "cut"


# kills

def test_three_kills():
    """The measurement in tests/benchmarks/kills.py, in small: real processes, SIGKILL, final weights and rows to the bit."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "benchmarks" / "kills.py", "--scripts", "grpo", "--kills", "3"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "3 of 3 kills survived" in done.stdout, done.stdout + done.stderr


def die_at_file_operation(moment):
    """This process ends at the moment-th call of what lies below pathlib and shutil."""
    left = [moment]

    def dying(operation):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return operation(*args, **kwargs)
        return wrapped
    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, dying(getattr(os, name)))


def test_a_kill_between_any_two_writes_of_a_save(tmp_path):
    """Processes that die at the 1st, 2nd, ... file operation of the third save: a whole checkpoint, the second at least, is always
    found, what lies in it is its own, and the save then made again leaves the last two and nothing else."""
    def save(folder, step):
        with checkpoints.whole_folder(folder / "checkpoints" / f"step-{step:06}") as temporary:
            (temporary / "model").mkdir()
            (temporary / "model" / "weights").write_text(f"weights {step}" * step)
            checkpoints.label(temporary, "grpo", step)
        checkpoints.prune(folder / "checkpoints" / f"step-{step:06}")

    for moment in range(1, 40):
        folder = tmp_path / str(moment)
        save(folder, 1)
        save(folder, 2)
        child = os.fork()
        if child == 0:
            die_at_file_operation(moment)
            save(folder, 3)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        found, step = checkpoints.newest(folder, "grpo")
        assert step in (2, 3) and (found / "model" / "weights").read_text() == f"weights {step}" * step
        checkpoints.clean(folder)
        save(folder, 3)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
        if not died:
            break
    assert not died and moment > 12


def test_before_the_first_checkpoint(whole, cut, capsys):
    """Killed before anything was saved, and while it wrote: --resume begins again, half lines and half files are gone."""
    shutil.rmtree(cut / "checkpoints")
    (cut / "checkpoints" / "step-000001.tmp").mkdir(parents=True)
    (cut / "summary.json.tmp").write_text("{")
    with open(cut / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    grpo.main(["--resume", str(cut)])
    assert "no checkpoint yet" in capsys.readouterr().out
    same(whole, cut)
    assert not list(cut.rglob("*.tmp"))


def test_a_folder_killed_before_its_config_can_be_used(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text("{")
    assert len(run(grpo, "--steps", 1, output=tmp_path / "run")) == 1


def test_sigterm_saves(whole, tmp_path, monkeypatch):
    """--save-every 100, and the checkpoint is there all the same: at the step in which the signal came."""
    real = grpo.sample

    def sample(*args, seed, **kwargs):
        if seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, seed=seed, **kwargs)
    monkeypatch.setattr(grpo, "sample", sample)
    with pytest.raises(SystemExit) as stop:
        run(grpo, "--save-every", 100, output=tmp_path / "run")
    assert stop.value.code == 130 and [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    grpo.main(["--resume", str(tmp_path / "run")])
    same(whole, tmp_path / "run")


def test_what_was_chosen_before_the_first_step_is_kept(tmp_path, monkeypatch):
    """Also without an evaluation, after which it would be written anyway: --select and --layer auto ask the initial model."""
    for script, name in ((entropy_min, "problems"), (bupo, "layer")):
        flags = ["--select", 3, "--select-k", 2] if script is entropy_min else []
        run(script, "--steps", 1, *flags, output=tmp_path / script.__name__)
        kept = json.loads((tmp_path / script.__name__ / "summary.json").read_text())[name]
        monkeypatch.setattr(script, "choose_problems" if script is entropy_min else "choose_layer", None)  # must not be asked again
        script.main(["--resume", str(tmp_path / script.__name__), "--steps", "2"])
        assert json.loads((tmp_path / script.__name__ / "summary.json").read_text())[name] == kept


# checkpoints that cannot be used

def newest(folder):
    return folder / "checkpoints" / "step-000003"


def relabel(folder, **values):
    path = newest(folder) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = {
    "weights cut short": (lambda f: os.truncate(newest(f) / "model" / "model.safetensors", 1000), "model/model.safetensors is missing or cut short"),
    "optimiser missing": (lambda f: (newest(f) / "optimizer.pt").unlink(), "optimizer.pt is missing or cut short"),
    "no label": (lambda f: (newest(f) / "checkpoint.json").unlink(), "checkpoint.json is missing or broken"),
    "half a label": (lambda f: os.truncate(newest(f) / "checkpoint.json", 30), "checkpoint.json is missing or broken"),
    "a label that is a list": (lambda f: (newest(f) / "checkpoint.json").write_text("[1]"), "checkpoint.json is missing or broken"),
    "another script's": (lambda f: relabel(f, script="bupo"), "it is step 3 of bupo.py"),
    "another step's": (lambda f: relabel(f, step=7), "it is step 7 of grpo.py"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_earlier_checkpoint_is_taken(case, cut, whole, capsys):
    """One line says why; the earlier one is loaded and stays as it was; the unusable one stays until its step is reached again."""
    damage, line = BROKEN[case]
    damage(cut)
    before = {path: path.read_bytes() for path in (cut / "checkpoints" / "step-000002").rglob("*") if path.is_file()}
    grpo.main(["--resume", str(cut)])
    said = capsys.readouterr().out
    assert f"step-000003 is passed over: {line}" in said and "going on from step 2 of 3" in said
    assert all(path.read_bytes() == content for path, content in before.items())
    assert checkpoints.fault_of(newest(cut), "grpo") is None
    same(whole, cut)


def test_no_checkpoint_left(cut, capsys):
    for number in (2, 3):
        (cut / "checkpoints" / f"step-00000{number}" / "optimizer.pt").unlink()
    fails(capsys, lambda: grpo.main(["--resume", str(cut)]), "no checkpoint can be used", "step-000003", "optimizer.pt")


def test_newer_checkpoint(cut, capsys):
    """Not passed over: going back and writing over the work of newer code is not for this one to decide."""
    relabel(cut, format=checkpoints.FORMAT + 1)
    before = sorted((path, path.stat().st_mtime_ns) for path in cut.rglob("*"))
    fails(capsys, lambda: grpo.main(["--resume", str(cut)]), "newer version of this code (format 3; this one reads 2)")
    assert sorted((path, path.stat().st_mtime_ns) for path in cut.rglob("*")) == before


class Attack:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("content", ["attack", "zeros"])
def test_a_strangers_optimizer(content, cut, capsys, monkeypatch):
    """Right in size, wrong inside: one line, and a pickle that would run a command does not."""
    monkeypatch.chdir(cut.parent)
    path = newest(cut) / "optimizer.pt"
    if content == "attack":
        torch.save(Attack(), path)
        relabel(cut, files={"optimizer.pt": path.stat().st_size})
    else:
        path.write_bytes(bytes(path.stat().st_size))
    fails(capsys, lambda: grpo.main(["--resume", str(cut)]), "optimizer.pt does not fit this run")
    assert not (cut.parent / "executed").exists()


@pytest.mark.parametrize("flags, line", [
    ("--lora-rank 2", "--lora-rank 2: the run in"), ("--dtype bfloat16", "--dtype bfloat16: the run in"), ("--steps 2", "has done 3 already")])
def test_what_cannot_change(flags, line, cut, capsys):
    fails(capsys, lambda: grpo.main(["--resume", str(cut), *flags.split()]), line)


def test_the_learning_rate_can(cut):
    """The optimiser's state brings its old learning rate along; the flag wins."""
    started = grpo.start(grpo.parse_flags(grpo.Config, grpo.Shared, description="", argv=["--resume", str(cut), "--lr", "1e-5"]), "grpo")
    assert started.first == 3 and [group["lr"] for group in started.optimizer.adamw.param_groups] == [1e-5]
    assert started.optimizer.adamw.state and started.folder == cut


# disks

@pytest.fixture
def disk(tmp_path):
    """A disk of its own that can be remounted, smaller, larger, read-only; skips where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", place], capture_output=True).returncode
    if not mounted:
        pytest.skip("cannot mount a disk here")
    yield place, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)
    subprocess.run(["umount", "-l", place], check=True)


def test_full_disk(disk, whole, capsys):
    """18 MiB hold one checkpoint of 10 and not two. The run ends with one line, the first checkpoint stays to the byte; with more
    room it goes on to the very weights."""
    place, remount = disk
    fails(capsys, lambda: run(grpo, output=place / "run"), "cannot write there", "MiB free", "--resume")
    assert [path.name for path in (place / "run" / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoints.newest(place / "run", "grpo")[1] == 1
    remount("size=64m")
    grpo.main(["--resume", str(place / "run")])
    same(whole, place / "run")


def test_full_disk_without_mounting(cut, whole, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    shutil.rmtree(newest(cut))
    monkeypatch.setattr(torch, "save", full)
    fails(capsys, lambda: grpo.main(["--resume", str(cut)]), "No space left on device", "--resume")
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["step-000002"]
    monkeypatch.undo()
    grpo.main(["--resume", str(cut)])
    same(whole, cut)


def test_read_only_disk(disk, cut, capsys):
    place, remount = disk
    remount("size=64m")
    shutil.copytree(cut, place / "cut")
    remount("ro")
    fails(capsys, lambda: run(grpo, output=place / "new"), "cannot write there (Read-only file system")
    fails(capsys, lambda: grpo.main(["--resume", str(place / "cut")]), "cannot write there (Read-only file system")
    remount("rw")


# numbers

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_is_not_finite_is_left_out(dtype):
    """A NaN gradient, an infinite gradient, and an infinite loss with a finite gradient (0 w + inf: by hand, gradient 0 + 1)."""
    layer = torch.nn.Linear(2, 1, bias=False, dtype=dtype)
    optimizer, before = MasterAdamW(layer, lr=0.1), layer.weight.clone()
    for loss in (lambda: layer.weight.sum() * torch.nan, lambda: layer.weight.sum() * torch.inf, lambda: layer.weight.sum() + torch.inf):
        optimizer.backward(loss())
        assert not torch.tensor(optimizer.step()).isfinite() and optimizer.updates == 0
        assert torch.equal(layer.weight, before) and layer.weight.grad is None
    optimizer.backward(layer.weight.sum())
    assert optimizer.step() == pytest.approx(2 ** 0.5) and optimizer.updates == 1 and not torch.equal(layer.weight, before)


def poison(monkeypatch, script, bad_steps):
    """NaN instead of the loss in the steps of these numbers, from 0; every other answer is called right, so that there is one."""
    verdicts = itertools.cycle([0.0, 1.0])
    monkeypatch.setattr(script, "reward", lambda text, gold: next(verdicts))
    real, log = script.grpo_loss, script.start
    runs = []

    def start(*args):
        runs.append(log(*args))
        return runs[-1]

    def loss(*args, **kwargs):
        value, metrics = real(*args, **kwargs)
        return value * (torch.nan if runs[-1].step in bad_steps else 1), metrics
    monkeypatch.setattr(script, "start", start)
    monkeypatch.setattr(script, "grpo_loss", loss)


def test_one_bad_step_is_left_out_and_counted(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, grpo, {1})
    rows = run(grpo, output=tmp_path / "run")
    said = capsys.readouterr()
    assert [row["skipped"] for row in rows] == [0, 1, 0] and "note: step 2: the loss or its gradient is not finite" in said.out + said.err


def test_five_bad_steps_end_the_run(tmp_path, monkeypatch, capsys):
    """Steps 1 to 5 of 9: nothing moved, a checkpoint is there, one line says what is not finite; and a sane run goes on from it."""
    poison(monkeypatch, grpo, range(5))
    fails(capsys, lambda: run(grpo, "--steps", 9, "--save-every", 100, output=tmp_path / "run"), "step 5 is the fifth in a row", "the weights are finite, the loss and", "--lr")
    assert [row["skipped"] for row in rows_of(tmp_path / "run")] == [1] * 5
    saved, initial = load_file(tmp_path / "run" / "checkpoints" / "step-000005" / "model" / "model.safetensors"), load_file(TINY)
    assert all(torch.equal(saved[k], initial[k]) for k in initial)
    monkeypatch.undo()
    grpo.main(["--resume", str(tmp_path / "run"), "--steps", "6", "--lr", "1e-4"])
    assert len(rows_of(tmp_path / "run")) == 6


def test_broken_weights_are_told(tmp_path, capsys):
    """A model with a NaN in it answers nonsense and gets no gradient: entropy is NaN, five steps, and the line names the weight."""
    model, folder = load_model("tiny"), tmp_path / "model"
    model.lm_head.weight.data[5, 5] = torch.nan
    shutil.copytree(TINY.parent, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    model.save_pretrained(folder)
    fails(capsys, lambda: run(grpo, "--model", folder, "--steps", 9, output=tmp_path / "run"), "not finite (lm_head.weight)", "--model")


@pytest.mark.parametrize("loss", [grpo.grpo_loss, bupo.grpo_loss, kl3_grpo.atr_grpo_loss])
def test_log_ratio_is_held_before_exp(loss):
    """exp(1000) would be infinite; held within 20 the loss and its gradient are numbers."""
    logp = torch.tensor([[0.0, 0.0, -1.0]], requires_grad=True)
    value, metrics = loss(logp, torch.tensor([[-1000.0, 1000.0, -1.0]]), torch.tensor([-1.0]), torch.ones(1, 3))
    value.backward()
    assert value.isfinite() and logp.grad.isfinite().all() and all(torch.tensor(m).isfinite() for m in metrics.values())


@pytest.mark.parametrize("script", [grpo, bupo, kl3_grpo, entropy_min], ids=lambda script: script.__name__)
def test_one_token_answers(script, tmp_path, capsys):
    """Nearly all are truncated and wrong: the rows say so, a note says what to raise, and the weights stay numbers."""
    rows = run(script, "--max-new-tokens", 1, output=tmp_path / "run")
    said = capsys.readouterr()
    assert all(row["length"] == 1 and row["truncated"] > 0.9 for row in rows) and "raise it" in said.out + said.err
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "run" / "model" / "model.safetensors").values())


@pytest.mark.parametrize("script", [grpo, bupo, kl3_grpo], ids=lambda script: script.__name__)
@pytest.mark.parametrize("flags, verdicts, note", [("", [1.0], "nothing to learn"), ("--max-new-tokens 1", [0.0, 1.0], "raise it")],
                         ids=["no signal", "all truncated and left out"])
def test_nothing_to_learn_changes_nothing(script, flags, verdicts, note, tmp_path, monkeypatch, capsys):
    """All answers right; or some right, but all cut off and left out. No update, no decay, and a note says why."""
    verdict = itertools.cycle(verdicts)
    monkeypatch.setattr(script, "reward", lambda text, gold: next(verdict))
    rows = run(script, "--steps", 2, "--truncated", "mask", *flags.split(), output=tmp_path / "run")
    said = capsys.readouterr()
    assert all(row["grad_norm"] == 0 == row["skipped"] and "loss" not in row for row in rows) and note in said.out + said.err
    after, initial = load_file(tmp_path / "run" / "model" / "model.safetensors"), load_file(TINY)
    assert all(torch.equal(after[k], initial[k]) for k in initial)


@pytest.mark.parametrize("script", [grpo, bupo, kl3_grpo, entropy_min], ids=lambda script: script.__name__)
def test_empty_answers(script, tmp_path, monkeypatch):
    """The sampler gives none, but a row of no tokens is defined: no text, no reward, no gradient; all rows empty is a row of zeros."""
    real = script.sample

    def sample(*args, **kwargs):
        rollout = real(*args, **kwargs)
        empty = slice(None) if kwargs["seed"] == 1 else slice(0, 3)
        for values in (rollout.lengths, rollout.mask, rollout.logp, rollout.entropy, rollout.tokens):
            values[empty] = 0
        rollout.texts[empty] = [""] * len(rollout.texts[empty])
        return rollout
    monkeypatch.setattr(script, "sample", sample)
    rows = run(script, *(["--layer", 3] if script is bupo else []), output=tmp_path / "run")
    assert rows[1]["length"] == 0 == rows[1]["entropy"] == rows[1].get("reward", 0) and all(row["skipped"] == 0 for row in rows)


def test_log_probs_of_empty_answers():
    """Rows of 0, 1 and 4 tokens: the empty one is zero, the others are what they are alone."""
    from conftest import random_model, rollout_of
    model, prompts = random_model("qwen3"), [[5, 6, 7], [8, 9], [4]]
    rollout = rollout_of(prompts, torch.tensor([0, 1, 4]))
    logp, _ = response_logprobs(model, rollout)
    assert (logp[0] == 0).all() and (logp[1, 1:] == 0).all() and logp[1, 0] < 0
    for i in (1, 2):
        alone, _ = response_logprobs(model, rollout[torch.tensor([i])])
        assert torch.allclose(alone[0], logp[i], atol=1e-5)
    assert sorted(i for part in micro_batches(torch.arange(3), rollout, 1) for i in part.tolist()) == [0, 1, 2]


# memory

OUT = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


def small_memory(monkeypatch, runs, when, budget, error):
    """In training, memory runs out where `when(run, calls so far in this step)` says so, if --micro-batch-tokens is above budget."""
    real, start, calls = grpo.response_logprobs, grpo.start, collections.Counter()

    def log_start(*args):
        runs.append(start(*args))
        return runs[-1]

    def logprobs(*args, **kwargs):
        now = runs[-1]
        calls[len(runs), now.step] += torch.is_grad_enabled()
        if torch.is_grad_enabled() and when(now, calls[len(runs), now.step]) and now.cfg.micro_batch_tokens > budget:
            raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(grpo, "start", log_start)
    monkeypatch.setattr(grpo, "response_logprobs", logprobs)


MEMORY = ["--micro-batch-tokens", 200, "--save-every", 100, "--max-new-tokens", 24]


@pytest.mark.parametrize("updates, when, error", [
    (1, lambda run, call: run.step == 2 and call == 2, RuntimeError(OUT)),
    (2, lambda run, call: run.count_updates() != run.updates, torch.OutOfMemoryError("CUDA out of memory")),
], ids=["before an update", "after an update"])
def test_out_of_memory_is_tried_once_more(updates, when, error, tmp_path, monkeypatch, capsys):
    """Step 3 fails in its second micro-batch, the first one's gradient made: the result is, to the bit, that of a run stopped after
    step 2 and resumed with half the micro-batch. Or a step fails after its first update: then the last checkpoint is gone back
    to, here step 0, and the result is that of a run with half the micro-batch."""
    monkeypatch.setattr(grpo, "reward", lambda text, gold: float(len(text) % 2))  # a signal in every group
    flags, runs = [*MEMORY, "--updates-per-rollout", updates], []
    with monkeypatch.context() as patch:
        small_memory(patch, runs, when, 100, error)
        run(grpo, *flags, output=tmp_path / "short")
    said = capsys.readouterr()
    assert "out of memory while training" in said.err and "--micro-batch-tokens 100" in said.err and "Traceback" not in said.err
    assert [r.first for r in runs] == [0, 2 if updates == 1 else 0] and all("loss" in row for row in rows_of(tmp_path / "short"))
    if updates == 1:
        run(grpo, *flags, "--steps", 2, output=tmp_path / "by hand")
        grpo.main(["--resume", str(tmp_path / "by hand"), "--steps", "3", "--micro-batch-tokens", "100"])
    else:
        run(grpo, *flags, "--micro-batch-tokens", 100, output=tmp_path / "by hand")
    same(tmp_path / "short", tmp_path / "by hand")


def test_out_of_memory_twice_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grpo, "reward", lambda text, gold: float(len(text) % 2))
    small_memory(monkeypatch, [], lambda run, call: run.step == 1, 0, RuntimeError(OUT))
    said = fails(capsys, lambda: run(grpo, *MEMORY, output=tmp_path / "run"), "lower --micro-batch-tokens 100")
    assert said.count("once more") == 1


def test_out_of_memory_anywhere_else_is_one_line(tmp_path, monkeypatch, capsys):
    def start(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")
    monkeypatch.setattr(grpo, "start", start)
    fails(capsys, lambda: run(grpo, output=tmp_path / "run"), "out of memory: CUDA out of memory. Tried to allocate 2 GiB.")


def test_a_file_named_stop_stops(tmp_path, monkeypatch, capsys):
    """As Ctrl-C would after the first step, also where torchrun would not wait for it; gone on from, the same result."""
    write = common.run.Run.log

    def log(self, *args, **kwargs):
        write(self, *args, **kwargs)
        (self.folder / "stop").touch()
    run(grpo, output=tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common.run.Run, "log", log)
        run(grpo, "--save-every", 100, output=tmp_path / "cut")
    assert stop.value.code == 130 and len(rows_of(tmp_path / "cut")) == 1 and "nothing is lost" in capsys.readouterr().out
    assert not (tmp_path / "cut" / "stop").exists()
    grpo.main(["--resume", str(tmp_path / "cut")])
    same(tmp_path / "whole", tmp_path / "cut")


def test_a_small_disk_is_told_before_it_is_full(tmp_path, monkeypatch, capsys):
    """834,912 weights and two moments each, in float32: 9.55 MiB, three times; offloaded with masters, a third more: 12.74.
    Of adapters only they are written. Where two checkpoints are, one more must fit. Enough room: nothing is said."""
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    said = lambda: next((line for line in capsys.readouterr().out.splitlines() if line.startswith("note: a checkpoint")), "")
    run(grpo, "--steps", 2, output=tmp_path / "run")
    assert said().startswith("note: a checkpoint takes 9.6 MiB, 3 more must fit on the disk of")
    grpo.main(["--resume", str(tmp_path / "run"), "--steps", "3"])
    assert said().startswith("note: a checkpoint takes 9.6 MiB, 1 more")
    run(grpo, "--steps", 1, "--offload-optimizer", output=tmp_path / "offloaded")
    assert said().startswith("note: a checkpoint takes 12.7 MiB")
    run(grpo, "--steps", 1, "--lora-rank", 2, output=tmp_path / "adapters")
    assert float(said().split()[4]) < 1
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30))
    run(grpo, "--steps", 1, output=tmp_path / "roomy")
    assert not said()


def test_out_of_memory_while_sampling(tmp_path, monkeypatch, capsys):
    def sample(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(grpo, "sample", sample)
    fails(capsys, lambda: run(grpo, output=tmp_path / "run"), "out of memory while sampling: lower --group-size or --max-new-tokens")


# supply

def test_no_network(tmp_path, monkeypatch):
    """Nothing connects anywhere when neither model nor data is a hub id."""
    def connect(*args):
        raise AssertionError(f"connects to {args}")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    run(grpo, "--steps", 1, "--lora-rank", 2, output=tmp_path / "run")


def test_nothing_is_unpickled_or_run():
    """Every torch.load says weights_only=True, and nothing asks for a model's own code or for pickled weights."""
    code = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("common/**/*.py")])
    assert code.count("torch.load(") == len(re.findall(r"torch\.load\([^\n]*weights_only=True", code))
    assert "trust_remote_code=True" not in code and "import pickle" not in code and "safe_serialization=False" not in code
