"""entropy_min.py: the entropy and its gradient by hand, the step against plain autograd, choosing a
problem, and that no label is read; analysis/logits.py: the statistics by hand."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model, rollout_of
from safetensors.torch import load_file

import entropy_min
from analysis import logits as analysis_logits
from analysis.logits import logit_statistics
from common.models import load_model, load_tokenizer
from common.sampling import sample
from entropy_min import accuracy_variance, entropy_loss

SMALL = "--group-size 8 --max-new-tokens 40 --eval-problems 0".split()
TEXT = "Compute 17+4*6-9."


def run(*flags, output, steps=2):
    entropy_min.main([*SMALL, "--steps", str(steps), "--output", str(output), *map(str, flags)])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_entropy_by_hand():
    """Logits (ln 1, ln 4) at T = 1/2 are (ln 1, ln 16): p = 1/17, 16/17, so
    H = ln 17 - (16/17) ln 16. Uniform over two: ln 2. The loss is the mean of both; a masked
    position does not count, and no token at all gives 0. At T = 1: H = ln 5 - 0.8 ln 4."""
    logits = torch.tensor([[[0.0, math.log(4)], [3.0, 3.0], [9.0, -9.0]]])
    sharp = math.log(17) - 16 / 17 * math.log(16)
    plain = math.log(5) - 0.8 * math.log(4)
    both = entropy_loss(logits, torch.tensor([[1.0, 1, 0]]))
    first = entropy_loss(logits, torch.tensor([[1.0, 0, 0]]), temperature=1.0)
    assert both.item() == pytest.approx((sharp + math.log(2)) / 2, abs=1e-6)
    assert first.item() == pytest.approx(plain, abs=1e-6)
    assert entropy_loss(logits, torch.zeros(1, 3)).item() == 0


def test_float32_of_bfloat16_logits():
    """Logits (0, 5): p = (1, e^5) / (1 + e^5), H = ln(1 + e^5) - 5 e^5 / (1 + e^5)."""
    logits = torch.tensor([[[0.0, 5.0]]], dtype=torch.bfloat16)
    loss = entropy_loss(logits, torch.ones(1, 1), 1.0)
    assert loss.dtype == torch.float32
    expected = math.log(1 + math.exp(5)) - 5 / (1 + math.exp(-5))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("T", [0.5, 1.0, 2.0])
def test_gradient_is_the_closed_form(T):
    """d H / d z_v = -p_v (log p_v + H) / T, at random logits, over the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, generator=generator).requires_grad_()
    entropy_loss(logits, torch.ones(2, 3), T).backward()
    p = (logits.detach() / T).softmax(-1)
    H = -(p * p.log()).sum(-1, keepdim=True)
    assert torch.allclose(logits.grad, -p * (p.log() + H) / T / 6, atol=1e-6)


def test_saturated_and_uniform_logits():
    """A sure token has entropy 0 and uniform logits ln V, both with gradient 0 and without NaN,
    also at logits of +-1e4."""
    logits = torch.tensor([[[1e4, -1e4, 0.0], [5.0, 5.0, 5.0]]], requires_grad=True)
    loss = entropy_loss(logits, torch.ones(1, 2))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3) / 2)
    assert logits.grad.abs().max() < 1e-6


def test_variance_by_hand():
    """0 of 8: 0; 2 of 8: 0.1875; 4 of 8: 0.25; 8 of 8: 0; 3 of 7: 12/49."""
    rows = [[1] * c + [0] * (8 - c) for c in (0, 2, 4, 8)]
    assert accuracy_variance(torch.tensor(rows)).tolist() == [0, 0.1875, 0.25, 0]
    three = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    assert accuracy_variance(three).item() == pytest.approx(12 / 49)


@pytest.mark.parametrize("flags, skip", [([], 0), (["--authors-mask"], 1)])
def test_the_step_is_the_gradient_of_the_formula(flags, skip, tmp_path):
    """The first step's loss and gradient norm (5 digits are logged), in micro-batches of an answer
    or two, against autograd through all logits, each answer by itself: the distribution that
    predicts token t of an answer to a prompt of S tokens stands at position S - 1 + t. T = 0.7 in
    the loss; with the authors' mask each answer's first token is left out. 12 tokens at most, so
    that some answers are cut off and count all the same."""
    common = ["--shots", 2, "--loss-temperature", 0.7, "--max-new-tokens", 12]
    [row] = run(*flags, *common, "--micro-batch-tokens", 60, output=tmp_path / "run", steps=1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    args = SimpleNamespace(model="tiny", device="cpu", dtype="float32", lora_rank=0)
    model, tokenizer = load_model(args), load_tokenizer("tiny")
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}],
                                             add_generation_prompt=True)["input_ids"]
               for text in summary["problems"]]
    rollout = sample(model, tokenizer, prompts, 4, 12, 0.5, seed=0)
    assert 0 < rollout.finished.sum() < 8
    entropy_sum, tokens = 0.0, 0
    for prompt, answer, k in zip(rollout.prompts, rollout.tokens.tolist(),
                                 rollout.lengths.tolist(), strict=True):
        ids = torch.tensor([prompt + answer[:k]])
        predicting = model(ids).logits[0, len(prompt) - 1 + skip:-1]            # (k - skip, V)
        logp = (predicting / 0.7).log_softmax(-1)
        entropy_sum = entropy_sum - (logp.exp() * logp).sum()
        tokens += k - skip
    (entropy_sum / tokens).backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    assert row["loss"] == pytest.approx(entropy_sum.item() / tokens, rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_selection_takes_the_most_uncertain(monkeypatch):
    """Right answers of 4: 0, 2, 4, 1, 2, 3, so variances 0, 1/4, 0, 3/16, 1/4, 3/16: the order is
    1, 4, 3, 5, 0, 2 with ties as they stood, and two shots take problems 1 and 4."""
    pool = [{"problem": str(i)} for i in range(6)]
    asked = []

    def evaluated(model, tokenizer, rows, reward, k, **_):
        asked.append((len(rows), k))
        answers = []
        for row in rows:
            right = (0, 2, 4, 1, 2, 3)[int(row["problem"])]
            answers.append({"rewards": [1.0] * right + [0.0] * (4 - right)})
        return {"answers": answers}

    monkeypatch.setattr(entropy_min, "evaluate", evaluated)
    monkeypatch.setattr(entropy_min, "batch_of",  # which begins anew behind the last row
                        lambda rows, step, size, seed: [rows[i % 6] for i in range(size)])
    args = SimpleNamespace(problem=None, select=6, select_k=4, shots=2, max_new_tokens=8, seed=0,
                           system="")
    fake = SimpleNamespace(args=args, train=pool, model=None, tokenizer=None)
    assert entropy_min.choose_problems(fake) == ["1", "4"]
    args.select = 99  # more than there are: each is rated once
    assert entropy_min.choose_problems(fake) == ["1", "4"]
    args.shots = 6
    args.select = 0
    assert entropy_min.choose_problems(fake) == ["0", "1", "2", "3", "4", "5"]
    assert asked == [(6, 4), (6, 4)]


def test_resume_keeps_problems_and_weights(tmp_path, monkeypatch):
    """A run that dies in its third step of four and goes on ends with the same weights as one that
    is not interrupted, and does not choose its problems again."""
    flags = ["--select", 4, "--select-k", 2, "--shots", 2]
    run(*flags, output=tmp_path / "whole", steps=4)

    def dies(*args, seed, **kwargs):
        if seed == 2:
            raise KeyboardInterrupt
        return sample(*args, seed=seed, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(entropy_min, "sample", dies)
        with pytest.raises(SystemExit) as stop:
            run(*flags, output=tmp_path / "cut", steps=4)
    assert stop.value.code == 130
    monkeypatch.setattr(entropy_min, "choose_problems", None)
    entropy_min.main(["--resume", str(tmp_path / "cut")])
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    found = [json.loads((tmp_path / name / "summary.json").read_text())["problems"]
             for name in ("whole", "cut")]
    assert found[0] == found[1] and len(found[0]) == 2


def test_no_label_is_read(tmp_path):
    """The same problems with every answer replaced: the same weights to the bit."""
    found = []
    for i, answer in enumerate(("7", "1000")):
        rows = [{"problem": f"Compute {n}+3.", "answer": answer} for n in range(8)]
        data = tmp_path / f"{i}.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows))
        run("--data", data, output=tmp_path / f"run{i}")
        found.append(weights(tmp_path / f"run{i}"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_it_lowers_the_entropy_on_a_given_problem(tmp_path):
    """--problem and a file with that problem alone are the same run; entropy falls."""
    given = run("--problem", TEXT, "--lr", 1e-3, output=tmp_path / "a", steps=4)
    assert given[-1]["entropy"] < 0.5 * given[0]["entropy"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"problem": TEXT, "answer": "32"}))
    rows = run("--data", tmp_path / "p.jsonl", "--lr", 1e-3, output=tmp_path / "b", steps=2)
    assert [row["loss"] for row in rows] == [row["loss"] for row in given[:2]]


def shares_of(statistics):
    return {place: share for place, share in enumerate(statistics["histogram"]) if share}


def test_logit_statistics_by_hand():
    """A head of zeros but for one row and states of 32 ones make logits (c, 0, 0, 0) everywhere,
    c = 32 x that row's weight = 3.2. Mean c/4, variance 3c^2/16, m3 = (27 - 3) c^3 / 256 =
    6 c^3 / 64, so the skewness is (6/64) / (3/16)^1.5 = 2/sqrt(3). The 2 largest over T = 0.5 are
    (2c, 0): skewness 0, mean = std = c. Bins of 0.6 from -60: 0 is in 100, 3.2 in 105.3, 6.4 in
    110.7; 320 goes into the last, 199."""
    model = random_model("llama", vocab_size=4)
    rollout = rollout_of([[1, 2]], torch.tensor([3]), T=3)
    ones = torch.ones(1, 1, model.config.hidden_size)

    def forward(input_ids, **_):
        return SimpleNamespace(last_hidden_state=ones.expand(*input_ids.shape, -1))

    model.model.forward = forward
    with torch.no_grad():
        model.lm_head.weight.zero_()[0] = 3.2 / 32
    found = logit_statistics(model, rollout, 100, temperature=0.5, top_k=2)
    assert found["raw"]["skewness"] == pytest.approx(2 / 3**0.5, abs=1e-5)
    assert found["raw"]["mean"] == pytest.approx(0.8)
    assert found["raw"]["std"] == pytest.approx(3.2 * 3**0.5 / 4)
    assert found["top_k"]["skewness"] == pytest.approx(0, abs=1e-5)
    assert found["top_k"]["mean"] == pytest.approx(3.2)
    assert found["top_k"]["std"] == pytest.approx(3.2)
    assert shares_of(found["raw"]) == {100: 0.75, 105: 0.25}
    assert shares_of(found["top_k"]) == {100: 0.5, 110: 0.5}
    with torch.no_grad():
        model.lm_head.weight[0] = 320 / 32
    far = logit_statistics(model, rollout, 100)  # all there are of the 50 largest, over T = 0.6
    assert shares_of(far["raw"]) == shares_of(far["top_k"]) == {100: 0.75, 199: 0.25}
    assert far["top_k"]["mean"] == pytest.approx(320 / 0.6 / 4)
    assert len(far["raw"]["histogram"]) == 200


@pytest.mark.parametrize("model_folder", ["qwen3"], indirect=True)
def test_logits_of_several_models(tmp_path, capsys, model_folder):
    """The same model twice under two names gives the same row; files are written; a folder in use
    or another vocabulary is one line and exit code 2, and nothing is written."""
    place = tmp_path / "a"
    analysis_logits.main(["--model", "tiny", "common/tiny", "--problems", "3", "--output",
                          str(place)])
    found = json.loads((place / "logits.json").read_text())["models"]
    assert found["tiny"] == found["common/tiny"]
    assert (place / "logits.png").stat().st_size > 10_000
    other = tmp_path / "b"
    for folder, message in ((place, "holds something"), (other, "same vocabulary")):
        with pytest.raises(SystemExit) as stop:
            analysis_logits.main(["--model", "tiny", str(model_folder), "--output", str(folder)])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not other.exists()


@pytest.mark.parametrize("flags, message", [
    ("--shots 3", "divisible"),
    ("--max-new-tokens 500 --problem Compute_1+1.", "every prompt is longer"),
    ("--loss-temperature 0", "at least 0.01")])
def test_bad_input(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        entropy_min.main([*flags.split(), "--output", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1
    assert message in error[0] and not (tmp_path / "run").exists()
