"""The embedded model is what its docstring says, and the script beside it makes such a model."""
import math
import random
import sys
from types import SimpleNamespace

import pytest
import torch

from common.data import encode_prompt
from common.evaluate import evaluate, verified
from common.internal_policy import internal_entropies
from common.models import TINY, load_model, load_tokenizer
from common.sampling import join, sample
from common.tiny import train
from common.tiny.arithmetic import arithmetic_problems, make_problem, solve
from common.verify import verify


def load(name="tiny"):
    return load_model(SimpleNamespace(model=name, device="cpu", dtype="auto", lora_rank=0))


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def texts_of(model, tokenizer, rows, n, system=""):
    prompts = [encode_prompt(tokenizer, row["problem"], system) for row in rows]
    return sample(model, tokenizer, prompts, n, 80)


def is_short(text):
    return "=" in text and "check" not in text


def is_long(text):
    return "check" in text


def is_bare(text):
    return text.startswith("\\boxed")


def share(has, texts):
    return sum(map(has, texts)) / len(texts)


def test_samples_badly_what_it_can(model, tokenizer):
    """At temperature 1 a fifth to two fifths right (the claim is 0.2 to 0.35, here within two
    standard errors), greedy over a half, the best of eight at least 0.7; bare answers, short chains
    and long chains with checks all occur."""
    rows = arithmetic_problems(64, held_out=True, seed=5)
    result = evaluate(model, tokenizer, rows, verified, k=8, max_new_tokens=80)
    assert 0.2 < result["avg_at_k"] < 0.4 and result["pass_at"][8] >= 0.7
    greedy = evaluate(model, tokenizer, rows, verified, k=1, max_new_tokens=80, temperature=0)
    assert greedy["avg_at_k"] > 0.5
    texts = [text for row in result["answers"] for text in row["responses"]]
    assert share(is_bare, texts) > 0.2
    assert share(is_short, texts) > 0.2
    assert share(is_long, texts) > 0.05


def test_an_answer_that_is_cut_off_is_wrong(model, tokenizer):
    """12 tokens do for a bare answer of at most three digits and its stop token, not for a chain.
    Under a reward of 1/2 for whatever is said, an answer has it exactly if it ended by itself."""
    rows = arithmetic_problems(16, held_out=True)
    result = evaluate(model, tokenizer, rows, lambda text, row: 0.5, k=4, max_new_tokens=12)
    finished = [x for row in result["answers"] for x in row["finished"]]
    rewards = [x for row in result["answers"] for x in row["rewards"]]
    assert 0 < sum(finished) < 64
    assert rewards == [0.5 * x for x in finished]
    assert result["avg_at_k"] == pytest.approx(sum(finished) / 128)
    assert result["truncated"] == pytest.approx(1 - sum(finished) / 64)
    assert result["pass_at"] == {k: 0 for k in range(1, 5)}  # one half is not right


def test_a_cut_answer_is_wrong_whatever_it_says(model, tokenizer):
    """Greedy answers in the style `direct` end with a stop token; without room for it the box is
    complete and the answer still counts as wrong."""
    [row] = arithmetic_problems(1, held_out=True)
    options = {"k": 1, "temperature": 0, "system": "style: direct"}
    whole = evaluate(model, tokenizer, [row], verified, max_new_tokens=80, **options)
    [answer] = whole["answers"]
    tokens = answer["lengths"][0]
    row = {**row, "answer": answer["responses"][0][len("\\boxed{"):-1]}
    for room, right in ((tokens, 1.0), (tokens - 1, 0.0)):
        again = evaluate(model, tokenizer, [row], verified, max_new_tokens=room, **options)
        assert again["answers"][0]["responses"] == answer["responses"]
        assert again["avg_at_k"] == right


@pytest.mark.parametrize("style, has", [
    ("direct", is_bare), ("short", is_short), ("long", is_long)])
def test_a_system_message_sets_the_style(style, has, model, tokenizer):
    rows = arithmetic_problems(32, held_out=True)
    assert share(has, texts_of(model, tokenizer, rows, 1, f"style: {style}").texts) > 0.8


def test_layer_policies_fall_gradually(model, tokenizer):
    """At least 8 blocks, untied; entropy of the un-normed layer policies from over half of ln V
    after block 1 to under 0.3 nats at the end, at least four blocks on the way between a hundredth
    and nine tenths of ln V."""
    rollout = texts_of(model, tokenizer, arithmetic_problems(16, held_out=True), 4)
    ids, predicts = join(rollout)
    flow = internal_entropies(model, ids, None, predicts)
    ln_v = math.log(model.config.vocab_size)
    out = flow["layer_out"].tolist()
    assert len(out) >= 8 and not model.config.tie_word_embeddings
    assert flow["layer_in"][0] > 0.9 * ln_v and out[0] > 0.5 * ln_v and out[-1] < 0.3
    assert sum(0.01 * ln_v < value < 0.9 * ln_v for value in out) >= 4


def test_it_is_small():
    assert sum(path.stat().st_size for path in TINY.iterdir() if path.is_file()) < 6e6


def test_answers_of_every_style():
    """One step in five is false on purpose: 36 to 49 % of bare answers and short chains of two or
    three steps go wrong (an error may cancel), of long chains, whose checks miss one false result
    in ten, few do. A long chain checks every step."""
    rng = random.Random(0)
    for style in train.STYLES:
        wrong = 0
        for _ in range(100):
            _, numbers, operators = make_problem(rng, held_out=False)
            answer = train.make_answer(rng, numbers, operators, style)
            wrong += not verify(answer, str(solve(numbers, operators)[-1]))
            assert answer.count("check") >= (len(operators) if style == "long" else 0)
        low, high = (0, 15) if style == "long" else (26, 65)
        assert low <= wrong < high


@torch.no_grad()
def test_scaling_the_residual_stream_changes_layer_policies_only():
    """Twice the embedding and all that is written: the logits stay, the state after block 3 is
    twice as large."""
    model, ids = load(), torch.arange(20, 40)[None]
    before = model(ids, output_hidden_states=True)
    train.scale_residual(model, 2.0)
    after = model(ids, output_hidden_states=True)
    assert torch.allclose(before.logits, after.logits, atol=1e-2)
    h_before, h_after = before.hidden_states[3], after.hidden_states[3]
    assert torch.allclose(2 * h_before, h_after, rtol=1e-2, atol=1e-1)


def test_the_script_trains(tmp_path, monkeypatch):
    flags = ["--steps", "2", "--rows", "16", "--blocks", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    train.main()
    load(str(tmp_path))
    assert "<|im_start|>assistant" in (tmp_path / "chat_template.jinja").read_text()
