"""Two gloo processes against one: the same weights to 1e-5, the same metrics and files.

One torchrun makes all runs of two processes, as this file's own command; the tests compare.
"""
import importlib
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).parent.parent
COMMON = "--eval-problems 3 --max-new-tokens 32 --lr 1e-4"
LOOP = f"{COMMON} --steps 2 --prompts-per-step 4 --group-size 6 --micro-batch-tokens 300"
JOBS = {  # 300 tokens: the ranks have different numbers of micro-batches, and add empty ones
    "grpo": f"grpo {LOOP} --updates-per-rollout 2",
    "whitened": f"grpo {LOOP} --advantage reinforce++ --aggregation sequence --kl-coef 0.1",
    "adapters": f"grpo {LOOP} --lora-rank 2 --advantage reinforce++",
    "bupo": f"bupo {LOOP} --internal-steps 1 --group-size 12",
    "kl3": f"kl3_grpo {LOOP} --updates-per-rollout 2",
    "entropy": f"entropy_min {COMMON} --lr 3e-5 --steps 2 --group-size 16 --shots 2 --select 3 "
               "--select-k 2 --micro-batch-tokens 300",
    "sft": f"long_cot_sft {COMMON} --teacher-problems 6 --samples 4 --batch-size 5 --epochs 1",
    "ppo": f"ppo {LOOP} --updates-per-rollout 2",
    "ppo-adapters": f"ppo {LOOP} --updates-per-rollout 1 --lora-rank 2",
}
HALF = f"grpo {LOOP} --advantage reinforce++ --group-size 12"
CLOCKS = ("tokens_per_second",)


def command(words: str, output: pathlib.Path) -> int:
    """Runs a script's main, named by the first word -> its exit code."""
    script, *flags = words.split()
    try:
        importlib.import_module(script).main([*flags, "--output", str(output)])
    except SystemExit as end:
        return end.code
    return 0


def two_processes(folder: pathlib.Path) -> str:
    """Starts this file by torchrun -> what it printed. A rendezvous that fails is tried again."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", __file__, str(folder)]
    for _ in range(3):
        done = subprocess.run(torchrun, capture_output=True, text=True, timeout=3600)
        if (folder / "met").exists():
            break
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<name>-1 and <name>-2: each job by one process and by two; whole, and half-1 and half-2, of
    which the one was begun by one process and ended by two, the other the other way round."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, words in JOBS.items():
        assert command(words, folder / f"{name}-1") == 0, name
    assert command(HALF, folder / "whole") == 0
    assert command(f"{HALF} --steps 1", folder / "half-1") == 0
    (folder / "said").write_text(two_processes(folder))
    return folder


def weights(folder: pathlib.Path) -> dict:
    return load_file(next((folder / "model").glob("*.safetensors")))


def assert_close_weights(a: pathlib.Path, b: pathlib.Path):
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def measured(folder: pathlib.Path) -> list[dict]:
    """The rows of metrics, without what a clock or a meter gave."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: value for name, value in row.items()
                     if not name.startswith("seconds") and name not in CLOCKS})
    return rows


def assert_alike(a: pathlib.Path, b: pathlib.Path):
    assert_close_weights(a, b)
    one, two = measured(a), measured(b)
    assert len(one) == len(two) and any(row["grad_norm"] > 0 for row in one)
    for x, y in zip(one, two, strict=True):
        assert x.keys() == y.keys() and x["skipped"] == 0 and x.pop("layer", 0) == y.pop("layer", 0)
        assert list(x.values()) == pytest.approx(list(y.values()), rel=1e-3, abs=2e-5), x["step"]
    one, two = (json.loads((x / "summary.json").read_text()) for x in (a, b))
    one["seconds"] = two["seconds"]
    assert one == two
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_make_the_run_of_one(name, folder):
    assert_alike(folder / f"{name}-1", folder / f"{name}-2")


def test_a_run_goes_on_with_another_number_of_processes(folder):
    assert command("grpo --steps 2 --resume " + str(folder / "half-2"), folder / "half-2") == 0
    assert all(row["grad_norm"] > 0 for row in measured(folder / "whole"))
    for resumed in ("half-1", "half-2"):
        assert_close_weights(folder / "whole", folder / resumed)
        assert len(measured(folder / resumed)) == 2


def test_checkpoints_hold_what_is_trained(folder):
    """Float32, also where compute is in bfloat16 and the last thing a step does is a forward pass,
    after which the gathered copies would still lie in the weights' place."""
    *_, tensors = torch.load(folder / "rounded" / "checkpoint.pt", weights_only=True)
    assert {saved["value"].dtype for saved in tensors} == {torch.float32}


def test_evaluation_is_that_of_one_process(folder):
    """The same answers to the same problems in the same order, written once."""
    words = "common.evaluate --problems 5 --k 3 --max-new-tokens 32"
    assert command(words, folder / "answers-1.jsonl") == 0
    one, two = [(folder / f"answers-{n}.jsonl").read_text().splitlines()[:-1] for n in (1, 2)]
    assert one == two and len(one) == 5


def test_files_and_speech_are_those_of_one_process(folder):
    traces = [(folder / f"sft-{n}" / "traces.jsonl").read_text() for n in (1, 2)]
    assert traces[0] == traces[1] and traces[0].count("\n") == 6
    said = (folder / "said").read_text()
    assert said.count("first prompt") == len(JOBS) + 4  # two halves, rounded and the evaluation
    AutoModelForCausalLM.from_pretrained(folder / "grpo-2" / "model")


def test_what_cannot_be_split_is_refused(folder):
    assert json.loads((folder / "codes.json").read_text()) == [2, 2]


def jobs_of_two(folder: pathlib.Path):
    """What torchrun's processes do."""
    from common.distributed import everyone, process_group, rank
    with process_group():
        everyone(0)
        (folder / "met").touch()
        for name, words in JOBS.items():
            assert command(words, folder / f"{name}-2") == 0, name
        words = "common.evaluate --problems 5 --k 3 --max-new-tokens 32"
        assert command(words, folder / "answers-2.jsonl") == 0
        assert command(f"{HALF} --steps 1", folder / "half-2") == 0
        rounded = JOBS["kl3"] + " --dtype bfloat16"
        assert command(rounded, folder / "rounded") == 0
        resume = "grpo --steps 2 --resume " + str(folder / "half-1")
        assert command(resume, folder / "half-1") == 0
        codes = [command("grpo --prompts-per-step 3", folder / "odd"),
                 command("entropy_min --group-size 9", folder / "odd")]
        if rank() == 0:
            (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    jobs_of_two(pathlib.Path(sys.argv[1]))
