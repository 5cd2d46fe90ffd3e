"""Two gloo processes against one: weights to 1e-5, the same metrics and files, from the same start and across a resume.

All jobs of two processes are run by one torchrun, as this file's own command; the tests compare what they leave.
"""
import importlib
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = pathlib.Path(__file__).parent.parent
COMMON = "--eval-problems 3 --eval-k 1 --max-new-tokens 20"
LOOP = f"{COMMON} --lr 1e-4 --steps 2 --prompts-per-step 4 --group-size 6 --micro-batch-tokens 300"
JOBS = {  # name -> script, flags. 300 tokens: the ranks have different numbers of micro-batches, some have none of their own
    "grpo": ("grpo", f"{LOOP} --updates-per-rollout 2"),
    "whitened": ("grpo", f"{LOOP} --advantage reinforce++ --aggregation sequence --kl-coef 0.1 --truncated mask"),
    "adapters": ("grpo", f"{LOOP} --lora-rank 2 --advantage reinforce++"),
    "bupo": ("bupo", f"{LOOP} --internal-steps 1 --advantage reinforce++"),
    "kl3": ("kl3_grpo", f"{LOOP} --updates-per-rollout 2 --ppo-epochs 2"),
    "kl": ("kl3_grpo", f"{LOOP} --updates-per-rollout 2 --ppo-epochs 2 --measure kl --delta 1e-4"),
    "entropy": ("entropy_min", f"{COMMON} --steps 2 --group-size 16 --shots 2 --select 3 --select-k 2 --lr 1e-4 --micro-batch-tokens 300"),
    "sft": ("long_cot_sft", f"{COMMON} --teacher-problems 6 --samples 4 --teacher-max-new-tokens 100 --batch-size 5 --epochs 1 --lr 3e-4"),
    "ppo": ("ppo", f"{LOOP} --updates-per-rollout 2"),
    "trunk": ("ppo", f"{LOOP} --updates-per-rollout 1 --critic shared --lora-rank 2"),
    "tied": ("ppo", f"{LOOP} --updates-per-rollout 1 --model {{folder}}/tied_model"),  # and blocks recomputed in backward
}
READERS = [("common.internal_policy", "--samples 5 --max-new-tokens 40 --micro-batch-tokens 150 --seed 1", "entropies.json"),
           ("entropy_min", "--analyze --problems 5 --max-new-tokens 40 --micro-batch-tokens 150", "logits.json")]
HALF = f"{LOOP} --advantage reinforce++ --steps 1 --max-new-tokens 40 --group-size 12"


def command(script: str, flags: str, folder: pathlib.Path, output: str) -> int:
    """Runs a script's main -> its exit code."""
    sys.path.insert(0, str(ROOT))
    try:
        importlib.import_module(script).main([*flags.format(folder=folder).split(), "--output", str(folder / output)])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<name>-1 and <name>-2: every job by one process and by two; stopped-1 and stopped-2: one step, to be resumed by the other."""
    folder = tmp_path_factory.mktemp("ranks")
    tied = Qwen3Config(hidden_size=272, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                       head_dim=8, tie_word_embeddings=True, max_position_embeddings=256, eos_token_id=1, pad_token_id=0,
                       bos_token_id=None, vocab_size=AutoModelForCausalLM.from_pretrained(ROOT / "common/tiny").config.vocab_size)
    torch.manual_seed(0)
    Qwen3ForCausalLM(tied).save_pretrained(folder / "tied_model")
    for path in (ROOT / "common/tiny").glob("*"):
        if "token" in path.name or path.suffix == ".jinja":
            (folder / "tied_model" / path.name).write_bytes(path.read_bytes())
    for name, (script, flags) in JOBS.items():
        assert command(script, flags, folder, f"{name}-1") == 0, name
    assert command("grpo", HALF, folder, "stopped-1") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    (folder / "said").write_text(done.stdout)
    return folder


def weights(folder: pathlib.Path) -> dict:
    return load_file(next((folder / "model").glob("*.safetensors")))


def assert_alike(a: pathlib.Path, b: pathlib.Path):
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    rows = [[json.loads(line) for line in (x / "metrics.jsonl").read_text().splitlines()] for x in (a, b)]
    assert len(rows[0]) == len(rows[1]) and any(row["grad_norm"] > 0 for row in rows[0])  # else nothing would be compared
    for x, y in zip(*rows):
        assert x.keys() == y.keys() and x["skipped"] == 0 and x.get("layer") == y.get("layer")
        same = [name for name in x if not name.startswith("seconds") and name not in ("tokens_per_second", "peak_gb", "layer")]
        assert [x[name] for name in same] == pytest.approx([y[name] for name in same], rel=1e-3, abs=2e-5), x["step"]
    one, two = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_make_the_run_of_one(name, folder):
    assert_alike(folder / f"{name}-1", folder / f"{name}-2")


def test_the_gate_of_exact_kl_acts(folder):
    """Else its job would compare nothing."""
    rows = [json.loads(line) for line in (folder / "kl-2" / "metrics.jsonl").read_text().splitlines()]
    assert any(row["clip_up"] + row["clip_down"] > 0 for row in rows)


def test_a_run_goes_on_with_another_number_of_processes(folder):
    whole = folder / "whole"
    assert command("grpo", f"{HALF} --steps 2", folder, "whole") == 0
    assert all(json.loads(row)["grad_norm"] > 0 for row in (whole / "metrics.jsonl").read_text().splitlines())
    assert command("grpo", f"--resume {folder / 'stopped-2'} --steps 2", folder, "stopped-2") == 0
    for resumed in ("stopped-1", "stopped-2"):  # the first by two processes, in torchrun's jobs
        one, two = weights(whole), weights(folder / resumed)
        assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
        assert len((folder / resumed / "metrics.jsonl").read_text().splitlines()) == 2


def test_files_are_those_of_one_process(folder):
    """One line a step, traces in the order of the problems, no leftovers; and the first process alone speaks."""
    assert (folder / "sft-1" / "traces.jsonl").read_text() == (folder / "sft-2" / "traces.jsonl").read_text()
    assert sorted(p.name for p in (folder / "grpo-1").iterdir()) == sorted(p.name for p in (folder / "grpo-2").iterdir())
    assert (folder / "said").read_text().count("first prompt") == len(JOBS) + 3  # two runs of HALF, and the view inside
    AutoModelForCausalLM.from_pretrained(folder / "tied-2" / "model")


@pytest.mark.parametrize("script, flags, name", READERS)
def test_readers_see_what_one_process_sees(script, flags, name, folder):
    """common.internal_policy and --analyze: the same answers, the same numbers, written once."""
    assert command(script, flags, folder, f"{script}-1") == 0
    one, two = (json.loads((folder / f"{script}-{n}" / name).read_text())["models"]["tiny"] for n in (1, 2))
    numbers = lambda x: [y for part in (x.values() if isinstance(x, dict) else x) for y in numbers(part)] if isinstance(
        x, (dict, list)) else [x]
    assert one.keys() == two.keys() and numbers(two) == pytest.approx(numbers(one), rel=1e-4, abs=1e-5)


def test_what_cannot_be_split(folder):
    assert json.loads((folder / "codes.json").read_text()) == [2, 2, 2]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from common.distributed import everyone, process_group, rank
    torch.set_num_threads(1)
    place = pathlib.Path(sys.argv[1])
    with process_group():
        for job, (script_, flags_) in JOBS.items():
            assert command(script_, flags_, place, f"{job}-2") == 0, job
        for script_, flags_, _ in READERS:
            assert command(script_, flags_, place, f"{script_}-2") == 0, script_
        assert command("grpo", HALF, place, "stopped-2") == 0
        assert command("grpo", f"--resume {place / 'stopped-1'} --steps 2", place, "stopped-1") == 0
        codes = [command("grpo", "--prompts-per-step 3 --steps 1", place, "odd"),
                 command("entropy_min", "--group-size 9 --steps 1", place, "odd"),
                 command("grpo", "--offload-optimizer --steps 1", place, "odd")]
        if rank() == 0:
            (place / "codes.json").write_text(json.dumps(codes))
        everyone(0)
