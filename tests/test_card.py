"""Every script on a pretended GPU (card.py): no tensor stays on the CPU, the run is the CPU's.

The card is registered for good, so it is run by this file's own command, in a process of its own.
"""
import pathlib
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from test_distributed import ROOT, assert_alike, command, measured

MODEL = {"model": "tiny", "dtype": "float32", "lora_rank": 0}
COMMON = "--eval-problems 0 --lr 3e-5 --max-new-tokens 12"
LOOP = f"{COMMON} --steps 1 --prompts-per-step 2 --group-size 4"
CASES = {  # reinforce++ has a gradient where groups of so few answers have none
    "grpo": f"grpo {LOOP} --advantage reinforce++ --kl-coef 0.1 --updates-per-rollout 2",
    "bupo": f"bupo {LOOP} --internal-steps 1 --group-size 16 --layer 4",
    "kl3": f"kl3_grpo {LOOP} --group-size 16 --updates-per-rollout 1",
    "entropy": f"entropy_min {COMMON} --steps 1 --group-size 4",
    "sft": f"long_cot_sft {COMMON} --teacher-problems 4 --samples 2 --batch-size 4 --epochs 1",
    "ppo": f"ppo {LOOP} --updates-per-rollout 1",
}
ADAPTERS = f"grpo {LOOP} --advantage reinforce++ --lora-rank 2 --dtype float32 --device card"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<name>-1 and <name>-2: every case on the CPU and on the card."""
    folder = tmp_path_factory.mktemp("card")
    for name, words in CASES.items():
        assert command(words, folder / f"{name}-1") == 0, name
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_card_makes_the_run_of_the_cpu(name, folder):
    assert_alike(folder / f"{name}-1", folder / f"{name}-2")


def test_adapters_train_on_the_card(folder):
    """New ones are drawn on the device, so they are others than the CPU's."""
    assert measured(folder / "adapters")[0]["grad_norm"] > 0


def test_evaluation_on_the_card(folder):
    words = "common.evaluate --problems 2 --k 2 --max-new-tokens 16"
    assert command(words, folder / "answers-1.jsonl") == 0
    one, two = [(folder / f"answers-{n}.jsonl").read_text().splitlines()[:-1] for n in (1, 2)]
    assert one == two and len(one) == 2


def test_blocks_are_computed_again_on_the_card_alone(folder):
    """A CPU has the memory to keep what they made, and saves the time."""
    from common.models import load_model
    on_cpu = load_model(Namespace(**MODEL, device="cpu"))
    assert not on_cpu.is_activation_checkpointing
    assert (folder / "again").read_text() == "True"


def test_a_tensor_on_the_wrong_device_is_seen(folder):
    assert "tensor of shape (3,) on the CPU" in (folder / "mixed").read_text()


def on_the_card(folder: pathlib.Path):
    from card import Card

    from common.models import load_model
    with Card():
        try:
            torch.zeros(3, device="card") + torch.zeros(3)
        except RuntimeError as error:
            (folder / "mixed").write_text(str(error))
        model = load_model(Namespace(**MODEL, device="card"))
        (folder / "again").write_text(str(model.is_activation_checkpointing))
        for name, words in CASES.items():
            words = f"{words} --dtype float32 --device card"
            assert command(words, folder / f"{name}-2") == 0, name
        assert command(ADAPTERS, folder / "adapters") == 0
        words = "common.evaluate --problems 2 --k 2 --max-new-tokens 16"
        place = folder / "answers-2.jsonl"
        assert command(f"{words} --dtype float32 --device card", place) == 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    on_the_card(pathlib.Path(sys.argv[1]))
