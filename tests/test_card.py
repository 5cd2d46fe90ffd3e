"""The scripts on a pretended GPU (card.py): no tensor is left on the CPU, nothing waits that need not, memory is what was planned.

The card is registered for good, so whatever runs on it is run by this file's own command, in a process of its own.
"""
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from test_distributed import JOBS, LOOP, assert_alike, command, weights

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ["whitened", "bupo", "kl", "entropy", "sft", "ppo"]
FLOAT32 = "--dtype float32"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """<name>-1 and <name>-2: every job on the CPU and on the card; facts.json: what the card counted."""
    folder = tmp_path_factory.mktemp("card")
    for name in NAMES:
        script, flags = JOBS[name]
        assert command(script, f"{flags} {FLOAT32}", folder, f"{name}-1") == 0, name
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_card_makes_the_run_of_the_cpu(name, folder):
    assert_alike(folder / f"{name}-1", folder / f"{name}-2")


def test_no_float64_is_needed(folder):
    """A device without it draws with random numbers and running sums in float32: here the same answers, so the same weights."""
    one, two = weights(folder / "bupo-1"), weights(folder / "narrow")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_bfloat16_masters_and_resume(folder):
    """Adapters in bfloat16 with float32 masters: stopped after a step and resumed, or with the masters on the CPU, the same weights."""
    whole, resumed, offloaded = (weights(folder / name) for name in ("masters", "resumed", "offloaded"))
    assert all(torch.equal(w, resumed[key]) and torch.equal(w, offloaded[key]) for key, w in whole.items())
    assert all(json.loads(row)["grad_norm"] > 0 for row in (folder / "masters/metrics.jsonl").read_text().splitlines())


def test_a_small_card_halves_the_micro_batch(folder):
    """A card between the peaks of 300 and of 150 tokens at once: memory runs out in the first step, what was held is let go, or the
    second attempt would run out as well, and the run is that of 150 tokens."""
    assert json.loads((folder / "small/config.json").read_text())["flags"]["micro_batch_tokens"] == 150
    wanted, found = weights(folder / "half"), weights(folder / "small")
    assert all(torch.equal(w, found[key]) for key, w in wanted.items())
    assert any(json.loads(row)["grad_norm"] > 0 for row in (folder / "half/metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def facts(folder):
    return json.loads((folder / "facts.json").read_text())


def test_the_card_counts(facts):
    """100 floats are 400 bytes, one block of 512; a view of them is nothing; 1,000 more are 4,000 bytes, 8 blocks; at the peak 9."""
    assert facts["held"] == [512, 512, 4608, 512, 0] and facts["peak"] == 4608
    assert "on the card, but for a tensor of shape (3,) on the CPU" in facts["mixed"]


def test_sampling_waits_once_a_token(facts):
    """70 tokens: a look at who has ended before each but the first; recorded, before every sixteenth: 69 / 16, so 5."""
    assert facts["waits"] == {"plain": 69, "recorded": 5}


def test_sampling_takes_fewer_answers_where_memory_runs_out(facts):
    """48 answers at once on a card that holds less, but 24: they come in parts, and are the same."""
    assert facts["in parts"] == [True, True]


def test_backward_keeps_one_chunk(facts):
    """64 tokens in chunks of 4, V = 4,096: a chunk's logits are 64 KiB in float32, all of them 1 MiB. A gradient of them and what
    softmax and logsumexp need are a few chunks; a graph that keeps its recomputed logits would take 16. For a loss of the log-probs
    and for one of the entropy alone."""
    assert len(facts["chunks"]) == 2 and max(facts["chunks"]) < 10 * 65536


def test_the_plan_is_within_ten_percent(facts):
    """Qwen3-0.6B's width and vocabulary with six blocks, all or adapters trained; and the update takes nothing besides what is there:
    weights, and of trained ones masters, gradients and moments."""
    for planned, there, sampling, training, update in facts["plans"]:
        assert planned == pytest.approx(max(sampling, training), rel=0.1) and update == pytest.approx(there, abs=0.05)  # GiB


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/benchmarks")]
    import card_memory
    from card import Card

    import common.sampling
    from common.logprobs import token_logprobs
    from common.models import load_model, load_tokenizer
    torch.set_num_threads(1)
    place, facts_ = pathlib.Path(sys.argv[1]), {}
    with Card():
        for job in NAMES:
            script_, flags_ = JOBS[job]
            assert command(script_, f"{flags_} {FLOAT32} --device card", place, f"{job}-2") == 0, job
        adapters = f"{LOOP} --advantage reinforce++ --lora-rank 2 --device card"
        for job, flag in (("masters", ""), ("resumed", "--steps 1"), ("offloaded", "--offload-optimizer")):
            assert command("grpo", f"{adapters} {flag}", place, job) == 0
        assert command("grpo", f"--resume {place / 'resumed'} --steps 2", place, "resumed") == 0
    signal, peaks = f"{LOOP} --advantage reinforce++ --device card {FLOAT32}", []
    for job, flag in (("full", ""), ("half", "--micro-batch-tokens 150")):
        with Card() as card:
            assert command("grpo", f"{signal} {flag}", place, job) == 0
            peaks.append(card.peak)
    with Card(sum(peaks) // 2):
        assert command("grpo", signal, place, "small") == 0
    with Card(float64=False):
        assert command("bupo", f"{JOBS['bupo'][1]} {FLOAT32} --device card", place, "narrow") == 0
        assert command("entropy_min", f"--analyze --model tiny {place / 'narrow'} --problems 3 --dtype float32 --device card", place, "looked") == 0
    with Card() as card:
        held, x = [], torch.zeros(100, device="card")
        held.append(card.held)
        view = x[10:]
        held.append(card.held)
        y = torch.zeros(1000, device="card")
        held.append(card.held)
        del y
        held.append(card.held)
        try:
            x[:3] + torch.zeros(3)
        except RuntimeError as error:
            facts_["mixed"] = str(error)
        del x, view
        facts_ |= {"held": held + [card.held], "peak": card.peak}
        model, tokenizer = load_model("tiny", "card", "float32"), load_tokenizer("tiny")
        model.generation_config.eos_token_id, common.sampling.stop_ids = None, lambda *_: [999]
        common.sampling.record, facts_["waits"] = lambda step: step, {}
        for name_, graphs in (("plain", False), ("recorded", True)):
            card.waits.clear()
            common.sampling.sample(model, tokenizer, [[5, 6, 7], [8, 9]], 2, 70, graphs=graphs)
            facts_["waits"][name_] = card.waits["nonzero"]
        whole = common.sampling.sample(model, tokenizer, [[5, 6, 7], [8, 9]], 24, 70, max_rows=48)
        answers, needs = whole.tokens.cpu(), []
        for rows in (48, 24):
            card.peak = card.held
            common.sampling.sample(model, tokenizer, [[5, 6, 7], [8, 9]], 24, 70, max_rows=rows)
            needs.append(card.peak)
        room, card.size, tried = card.size, sum(needs) // 2, []
        decode, common.sampling.decode = common.sampling.decode, lambda *args: (tried.append(len(args[2])), decode(*args))[1]
        again = common.sampling.sample(model, tokenizer, [[5, 6, 7], [8, 9]], 24, 70, max_rows=48).tokens.cpu()
        facts_["in parts"] = [tried == [48, 24, 24], torch.equal(again, answers)]
        card.size, common.sampling.decode = room, decode
        hidden, weight = (torch.randn(n, 2, device="card", requires_grad=True) for n in (64, 4096))
        facts_["chunks"] = []
        for of_entropy in (False, True):
            before = card.peak = card.held
            targets = torch.zeros(64, dtype=torch.long, device="card")
            found = token_logprobs(hidden, weight, targets, chunk=4, entropy_grad=of_entropy)  # the other one stays alive
            found[of_entropy].sum().backward()
            facts_["chunks"].append(card.peak - before)
            hidden.grad = weight.grad = found = None
    card_memory.SHAPES["small"] = (1024, 3072, 6, 8, True)  # as many heads as of keys: older transformers repeat those
    facts_["plans"] = []
    for rank_ in (0, 8):
        plan, peaks, _ = card_memory.measure("small", 24, rank_, False, 4096)
        there = sum(plan[part] for part in ("weights", "float32 masters", "gradients", "Adam moments"))
        facts_["plans"].append([plan["peak"], there, *peaks])
    (place / "facts.json").write_text(json.dumps(facts_))
