"""entropy_min.py: the entropy and its gradient by hand, the two masks, choosing a problem, and that no label is read."""
import json
import math

import pytest
import torch
from conftest import random_model, rollout_of
from safetensors.torch import load_file

import entropy_min
from common.internal_policy import layer_logits
from common.sampling import join
from entropy_min import accuracy_variance, answer_entropies, entropy_loss

SMALL = "--group-size 8 --max-new-tokens 40 --eval-problems 0".split()


def run(*flags, output, steps=2):
    entropy_min.main([*SMALL, "--steps", str(steps), "--output", str(output), *map(str, flags)])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_entropy_by_hand():
    """Logits (ln 1, ln 4) at T = 1/2 are (ln 1, ln 16): p = 1/17, 16/17, H = ln 17 - (16/17) ln 16. Uniform over two: ln 2. Mean of both;
    a masked position does not count, and no token at all gives 0."""
    logits = torch.tensor([[[0.0, math.log(4)], [3.0, 3.0], [9.0, -9.0]]])
    sharp = math.log(17) - 16 / 17 * math.log(16)
    assert entropy_loss(logits, torch.tensor([[1.0, 1, 0]])).item() == pytest.approx((sharp + math.log(2)) / 2, abs=1e-6)
    assert entropy_loss(logits, torch.tensor([[1.0, 0, 0]]), temperature=1.0).item() == pytest.approx(math.log(5) - 0.8 * math.log(4), abs=1e-6)
    assert entropy_loss(logits, torch.zeros(1, 3)).item() == 0
    low = entropy_loss(torch.tensor([[[0.0, 5.0]]]).bfloat16(), torch.ones(1, 1), 1.0)  # ln(1 + e^5) - 5 e^5 / (1 + e^5), in float32
    assert low.dtype == torch.float32 and low.item() == pytest.approx(math.log(1 + math.exp(5)) - 5 / (1 + math.exp(-5)), abs=1e-6)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
def test_gradient_is_the_closed_form(T):
    """d H / d z_v = -p_v (log p_v + H) / T, at random logits, over the number of tokens."""
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    entropy_loss(logits, torch.ones(2, 3), T).backward()
    p = (logits.detach() / T).softmax(-1)
    H = -(p * p.log()).sum(-1, keepdim=True)
    assert torch.allclose(logits.grad, -p * (p.log() + H) / T / 6, atol=1e-6)


def test_saturated_and_uniform_logits():
    """A sure token has entropy 0 and uniform logits ln V, both with gradient 0 and without NaN, also at logits of +-1e4."""
    logits = torch.tensor([[[1e4, -1e4, 0.0], [5.0, 5.0, 5.0]]], requires_grad=True)
    loss = entropy_loss(logits, torch.ones(1, 2))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3) / 2) and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("offset", [0, 1])
def test_which_positions_are_read(offset):
    """Prompt p1 p2, answer a b: the right mask reads the logits at p2 and a (which predict a and b); one late, those at a and b. Rows of
    different prompts and lengths, against plain full logits."""
    model, rollout = random_model("qwen3"), rollout_of([[5, 6], [7, 8, 9, 10]], torch.tensor([2, 3]), T=3)
    got = answer_entropies(model, rollout, 0.5, offset)
    ids, _ = join(rollout.prompts, rollout.tokens, rollout.lengths)
    logits = layer_logits(model, ids)
    for b, (prompt, k) in enumerate(zip(rollout.prompts, rollout.lengths.tolist())):
        for t in range(k):
            place = torch.zeros(ids.shape)
            place[b, len(prompt) - 1 + t + offset] = 1
            assert got[b, t].item() == pytest.approx(entropy_loss(logits, place).item(), abs=1e-5)
        assert (got[b, k:] == 0).all()


def test_variance_by_hand():
    """0 of 8: 0; 2 of 8: 0.1875; 4 of 8: 0.25; 8 of 8: 0; 3 of 7: 12/49."""
    rows = [[1] * c + [0] * (8 - c) for c in (0, 2, 4, 8)]
    assert accuracy_variance(torch.tensor(rows)).tolist() == [0, 0.1875, 0.25, 0]
    assert accuracy_variance(torch.tensor([[1, 1, 1, 0, 0, 0, 0]])).item() == pytest.approx(12 / 49)


def test_selection_takes_the_most_uncertain(tmp_path):
    run("--select", 6, "--select-k", 4, "--shots", 2, output=tmp_path / "run", steps=1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    ranking = [row["variance"] for row in summary["selection"]]
    assert len(ranking) == 6 and ranking == sorted(ranking, reverse=True)
    assert [p["problem"] for p in summary["problems"]] == [row["problem"] for row in summary["selection"][:2]]


def test_no_label_is_read(tmp_path):
    """The same problems with every answer replaced: the same weights to the bit."""
    weights = []
    for i, answer in enumerate(("7", "1000")):
        data = tmp_path / f"{i}.jsonl"
        data.write_text("\n".join(json.dumps({"problem": f"Compute {n}+3.", "answer": answer}) for n in range(8)))
        run("--data", data, output=tmp_path / f"run{i}")
        weights.append(load_file(tmp_path / f"run{i}" / "model" / "model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_it_lowers_the_entropy_on_a_given_problem(tmp_path, capsys):
    """--problem and --problem-file are the same run; entropy falls; --authors-mask is another one; --early-stop ends early."""
    (tmp_path / "p.txt").write_text("Compute 17+4*6-9.\n")
    given = run("--problem", "Compute 17+4*6-9.", "--lr", 1e-3, output=tmp_path / "a", steps=4)
    from_file = run("--problem-file", tmp_path / "p.txt", "--lr", 1e-3, output=tmp_path / "b", steps=4)
    assert [row["loss"] for row in given] == [row["loss"] for row in from_file] and given[-1]["entropy"] < 0.5 * given[0]["entropy"]
    late = run("--problem", "Compute 17+4*6-9.", "--lr", 1e-3, "--authors-mask", output=tmp_path / "c", steps=1)
    assert late[0]["loss"] != given[0]["loss"]
    stopped = run("--problem", "Compute 17+4*6-9.", "--lr", 1e-3, "--early-stop", 0.9, output=tmp_path / "d", steps=8)
    assert len(stopped) < 8 and "stopped after step" in capsys.readouterr().out


def test_logit_statistics_by_hand():
    """A head of zeros but for one row and hidden states of 32 ones make logits (c, 0, 0, 0) everywhere, c = 32 x that row's weight = 3.3.
    Mean c/4, variance 3c^2/16, m3 = (27 - 3) c^3 / 256 = 6 c^3 / 64, so the skewness is (6/64) / (3/16)^1.5 = 2/sqrt(3). The 2 largest
    over T = 0.5 are (2c, 0): skewness 0, mean = std = c. Bins: (0 + 60) / 0.2 = 300, 3.3: 316.5, 6.6: 333; 330 goes into the last, 599."""
    model = random_model("llama", vocab_size=4)
    rollout = rollout_of([[1, 2]], torch.tensor([3]), T=3)
    constant = torch.ones(1, 1, model.config.hidden_size)
    model.model.forward = lambda input_ids, **_: type("O", (), {"last_hidden_state": constant.expand(*input_ids.shape, -1)})()
    with torch.no_grad():
        model.lm_head.weight.zero_()[0] = 3.3 / 32
    of = entropy_min.logit_statistics(model, rollout, 100, temperature=0.5, top_k=2)
    assert of["raw"]["skewness"] == pytest.approx(2 / 3 ** 0.5, abs=1e-5) and of["top_k"]["skewness"] == pytest.approx(0, abs=1e-5)
    assert of["raw"]["mean"] == pytest.approx(3.3 / 4) and of["raw"]["std"] == pytest.approx(3.3 * 3 ** 0.5 / 4)
    assert of["top_k"]["mean"] == pytest.approx(3.3) == of["top_k"]["std"]
    filled = lambda of, name: {place: share for place, share in enumerate(of[name]["histogram"]) if share}
    assert filled(of, "raw") == {300: 0.75, 316: 0.25} and filled(of, "top_k") == {300: 0.5, 333: 0.5}
    with torch.no_grad():
        model.lm_head.weight[0] = 330 / 32
    far = entropy_min.logit_statistics(model, rollout, 100)  # as many as there are of the 50 largest, over T = 0.6
    assert filled(far, "raw") == filled(far, "top_k") == {300: 0.75, 599: 0.25}
    assert far["top_k"]["mean"] == pytest.approx(330 / 0.6 / 4) and len(far["raw"]["histogram"]) == 600


def test_analyze(tmp_path, capsys, model_folder):
    """Two models on the same answers: the same model twice under two names gives the same row; files are written; another vocabulary or a
    folder in use is one line and exit code 2."""
    entropy_min.main(["--analyze", "--model", "tiny", "common/tiny", "--problems", "3", "--output", str(tmp_path / "a")])
    found = json.loads((tmp_path / "a" / "logits.json").read_text())["models"]
    assert found["tiny"] == found["common/tiny"] and (tmp_path / "a" / "logits.png").stat().st_size > 10_000
    for flags, message in (([], "holds something"), (["--output", str(tmp_path / "b")], "same vocabulary")):
        with pytest.raises(SystemExit) as stop:
            entropy_min.main(["--analyze", "--model", "tiny", str(model_folder), "--output", str(tmp_path / "a"), *flags])
        assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.parametrize("flags, message", [
    ("--shots 3", "divide"), ("--problem x --shots 2", "be 1 with --problem"), ("--problem-file nowhere.txt", "no such file"),
    ("--select 1 --shots 2", "fewer"), ("--loss-temperature 0", "above 0"), ("--repetition-penalty 0.5", "at least 1")])
def test_bad_input(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        entropy_min.main([*flags.split(), "--output", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and message in error[0] and not (tmp_path / "run").exists()
