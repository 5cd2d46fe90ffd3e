"""Long chain-of-thought SFT by hand: loss, mask, schedule, traces that survive a kill, constructed chains, noisy labels, benchmarks."""
import argparse
import json
import math
import os
import random
import re
import signal

import pytest
import torch
from conftest import byte_level_tokenizer, random_model
from datasets import Dataset
from safetensors.torch import load_file

import long_cot_sft
from common import traces as traces_module
from common.arithmetic import arithmetic_problems
from common.data import load_problems
from common.errors import BadInput
from common.evaluate import evaluate
from common.logprobs import micro_batches, response_logprobs
from common.models import load_model, load_tokenizer
from common.sampling import join
from common.traces import as_rollout, collect, encode_traces, histogram, judge, load_traces, noisy_labels, read_sampled
from common.verify import reward
from long_cot_sft import ACTIONS, construct_chain, lr_at, reflection_rates, scripted_actor, sft_loss

SMALL = ("--teacher-problems 6 --samples 4 --teacher-max-new-tokens 90 --batch-size 4 --epochs 1 --max-new-tokens 40 --eval-problems 2 "
         "--eval-k 2").split()


def main(*flags, output):
    long_cot_sft.main([*SMALL, "--output", str(output), *map(str, flags)])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------------ loss
def test_sft_loss_by_hand():
    """p = (1/2, 1/4, 1/4) everywhere, labels 0, 1, none: (ln 2 + ln 4) / 2; the gradient of a token is (p - onehot) / 2, elsewhere 0."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(1, 3, 1).requires_grad_()
    loss = sft_loss(logits, torch.tensor([[0, 1, -100]]))
    assert loss.item() == pytest.approx(1.5 * math.log(2))
    loss.backward()
    assert torch.allclose(logits.grad, torch.tensor([[[-0.25, 0.125, 0.125], [0.25, -0.375, 0.125], [0.0, 0.0, 0.0]]]))
    assert sft_loss(torch.zeros(1, 2, 3), torch.full((1, 2), -100)).item() == 0
    low = sft_loss(torch.tensor([[[0.0, 5.0]]]).bfloat16(), torch.tensor([[0]]))  # one label, ln(1 + e^5) = 5.00672, not bfloat16's 5
    assert low.dtype == torch.float32 and low.item() == pytest.approx(math.log(1 + math.exp(5)), abs=1e-5)


def encoded(n=7, seed=0):
    rng = random.Random(seed)
    return [{"prompt": [rng.randrange(2, 97) for _ in range(rng.randrange(1, 9))],
             "response": [rng.randrange(2, 97) for _ in range(rng.randrange(1, 30))] + [1]} for _ in range(n)]


def labels_of(rollout):
    """Prompt out, stop token in, shifted: labels[:, t] is what position t must predict."""
    ids, predicts = join(rollout.prompts, rollout.tokens, rollout.lengths)
    return ids, torch.where(predicts, ids.roll(-1, 1), -100)


def test_mask_leaves_the_prompt_out_and_the_stop_token_in():
    """Prompt 5 6 7, response 8 9 and the stop token 1: positions 2, 3, 4 predict 8, 9, 1."""
    ids, labels = labels_of(as_rollout([{"prompt": [5, 6, 7], "response": [8, 9, 1]}, {"prompt": [5], "response": [1]}], "cpu"))
    assert ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 1, 0, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, 8, 9, 1, -100], [1, -100, -100, -100, -100, -100]]


def test_chunked_path_is_sft_loss_however_it_is_split():
    """Micro-batches of 30, 60 or all tokens: value and gradients of sft_loss on full logits; one trace at a time without padding too."""
    model, rollout = random_model("qwen3"), as_rollout(encoded(), "cpu")
    ids, labels = labels_of(rollout)
    wanted = sft_loss(model(input_ids=ids).logits, labels)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for budget in (1, 30, 60, 10_000):
        model.zero_grad()
        total = 0.0
        for m in micro_batches(torch.arange(7), rollout, budget):
            logp, _ = response_logprobs(model, rollout[m])
            loss = -logp.sum() / rollout.lengths.sum()
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(wanted.item(), abs=1e-5)
        for name, p in model.named_parameters():
            assert torch.allclose(p.grad, gradients[name], atol=1e-5), (budget, name)


def test_schedule_by_hand():
    """100 updates to a peak of 1: 1/3, 2/3, 1, then from 1 to 0.1 by half a cosine; its middle is 0.55."""
    assert [lr_at(step, 100, 1.0) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert lr_at(3 + 97 // 2, 100, 1.0) == pytest.approx(0.55, abs=0.01) and lr_at(99, 100, 1.0) == pytest.approx(0.1, abs=1e-3)
    assert lr_at(0, 1, 2.0) == 2.0 and lr_at(2, 4, 1.0, warmup=0.5, floor=0.2) == 1.0 and lr_at(3, 4, 1.0, 0.5, 0.2) == pytest.approx(0.6)


def test_reflection_rates_by_hand():
    rates = reflection_rates(["Wait, no. However, so.", "The waiter waited.", "wait wait", "RECHECK: retry"])
    assert rates == {"wait": 0.5, "recheck": 0.25, "alternatively": 0.0, "retry": 0.25, "however": 0.25}
    assert all(math.isnan(rate) for rate in reflection_rates([]).values())


# ------------------------------------------------------------------------------------------------------------------ sampling traces
PROBLEMS = [{"problem": f"p{i}", "answer": str(i)} for i in range(7)]


def draw_until(limit, drawn):
    """Answers that follow from (first, place) alone; an error once `limit` problems were drawn."""
    def draw(first, rows):
        if len(drawn) >= limit:
            raise KeyboardInterrupt
        drawn.extend(row["problem"] for row in rows)
        texts = [[f"\\boxed{{{(first + i) % 3}}} {random.Random(f'{first} {i} {j}').random()}" for j in range(2)] for i in range(len(rows))]
        return [judge(row, t, [reward(x, row["answer"]) == 1 for x in t], "verified", False, "s") for row, t in zip(rows, texts)]
    return draw


@pytest.mark.parametrize("cut", [0, 1, 5, 40])
def test_a_killed_sampling_run_goes_on_without_a_duplicate(cut, tmp_path):
    """Killed after 4 of 7 problems and with the last bytes lost: the file becomes that of an uninterrupted run, to the byte."""
    whole, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    rows = list(collect(whole, [], PROBLEMS, 2, draw_until(99, [])))
    assert [row["problem"] for row in rows] == [f"p{i}" for i in range(7)] and [len(row["completions"]) for row in rows] == [2] * 3 + [0] * 4
    with pytest.raises(KeyboardInterrupt):
        list(collect(path, [], PROBLEMS, 2, draw_until(4, [])))
    os.truncate(path, path.stat().st_size - cut)
    again = []
    assert list(collect(path, read_sampled(path, PROBLEMS, "s"), PROBLEMS, 2, draw_until(99, again))) == rows
    assert path.read_bytes() == whole.read_bytes() and again == [f"p{i}" for i in range(4 if cut == 0 else 2, 7)]
    assert list(collect(path, read_sampled(path, PROBLEMS, "s"), PROBLEMS, 2, None)) == rows      # all there: nothing is drawn
    for problems, settings in ((PROBLEMS, "other"), (PROBLEMS[1:], "s")):
        with pytest.raises(BadInput, match="other --traces-out|another --traces-out"):
            read_sampled(path, problems, settings)


def test_judge():
    """Right ones once; with keep all every one that ended; with agree nothing when neither of the first two is right."""
    row, texts = {"problem": "p", "answer": "1"}, ["x", None, "\\boxed{1}", "\\boxed{1}"]
    right = [False, False, True, True]
    line = judge(row, texts, right, "verified", False, "s")
    assert line["completions"] == ["\\boxed{1}"] and (line["sampled"], line["finished"], line["right"], line["agrees"]) == (4, 3, 2, False)
    assert judge(row, texts, right, "all", False, "s")["completions"] == ["x", "\\boxed{1}"]
    assert judge(row, texts, right, "all", True, "s")["completions"] == []
    assert judge(row, texts, [False, True, True, True], "verified", True, "s")["agrees"]


def test_label_noise():
    """About three in ten are off by 1, 2 or 10, always the same ones; 0 changes nothing, 1 changes all."""
    rows = arithmetic_problems(400, held_out=False)
    noisy = noisy_labels(rows, 0.3, seed=1)
    off = [abs(int(a["answer"]) - int(b["answer"])) for a, b in zip(rows, noisy)]
    assert set(off) == {0, 1, 2, 10} and 0.23 < sum(map(bool, off)) / 400 < 0.37
    assert noisy == noisy_labels(rows, 0.3, seed=1) != noisy_labels(rows, 0.3, seed=2) and noisy_labels(rows, 0, 1) == rows
    assert noisy[200:] == noisy_labels(rows[200:], 0.3, seed=1) and all(a != b for a, b in zip(rows, noisy_labels(rows, 1, 1)))


# ------------------------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("row, problem", [
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, [{"role": "user", "content": "q"}]),
    ({"prompt": "q", "completion": "a", "other": 1}, "q"),
    ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, [{"role": "user", "content": "q"}]),
    ({"problem": "q", "completions": ["a"], "answer": "1"}, "q"),
])
def test_trace_files(row, problem, kind, tmp_path):
    path = tmp_path / f"traces.{kind}"
    Dataset.from_list([row]).to_parquet(path) if kind == "parquet" else path.write_text(json.dumps(row))
    assert load_traces(str(path), "train") == [{"problem": problem, "completion": "a"}]


@pytest.mark.parametrize("content, message", [
    ("", "no rows"), ('{"text": "a"}', "needs a column messages, or prompt and completion; it has: text"), ('{"prompt": "q", "completion": ""}', "no row has both"),
    ('{"messages": [{"role": "user", "content": "q"}]}', "no row has both"), ("{", "--traces .* not JSON")])
def test_bad_trace_files(content, message, tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text(content)
    with pytest.raises(BadInput, match=message):
        load_traces(str(path), "train")


def test_traces_are_dropped_whole_and_counted(capsys):
    """One twice, one of a held-out question, one longer than the context; what stays ends with the stop token and is not cut."""
    tokenizer = byte_level_tokenizer()
    rows = [{"problem": p, "completion": c} for p, c in (("q", "a"), ("q", "a"), ("held", "b"), ("q", "x" * 600), ("q", "y" * 300))]
    kept = encode_traces(tokenizer, rows, "", False, 512, {"held"})
    assert [tokenizer.decode(row["response"]) for row in kept] == ["a<|im_end|>", "y" * 300 + "<|im_end|>"]
    assert tokenizer.decode(kept[0]["prompt"]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "2 to train on; dropped: 1 repeated, 1 of held-out problems, 1 longer than the context of 512" in capsys.readouterr().out
    with pytest.raises(BadInput, match="none of the 1 traces is left"):
        encode_traces(tokenizer, rows[3:4], "", False, 512, set())
    fits = len(kept[0]["prompt"]) + len(kept[0]["response"])                                                # to the token
    assert encode_traces(tokenizer, rows[:1], "", False, fits, set()) and pytest.raises(BadInput, encode_traces, tokenizer, rows[:1], "", False, fits - 1, set())


def test_histogram():
    assert histogram([10, 10, 12, 19], bins=2) == {"10-14": 3, "15-19": 1} and sum(histogram([3]).values()) == 1
    lengths = [random.Random(0).randrange(5, 500) for _ in range(50)]
    assert sum(histogram(lengths).values()) == 50


# ------------------------------------------------------------------------------------------------------------------ constructed chains
def scripted_model(replies, seen):
    def ask(messages):
        action = next(name for name, text in ACTIONS.items() if text == messages[0]["content"])
        seen.append((action, messages[1]["content"].split("Current goal: ")[1]))
        return replies[len(seen) - 1]
    return ask


def test_construct_chain_with_a_scripted_model():
    """A wrong step, 'Alternatively' back to solve, a goal reached but not the problem, then the answer, which gets its box."""
    replies = ["Sum 1+2+3.", "First 1+2.\nNEXT: add 1 and 2", "1+2=4", "3-1 is not 3.\nGOAL: no\nPROBLEM: no\nNEXT: Alternatively, count up",
               "1+2=3", "Fine.\nGOAL: yes\nPROBLEM: no", "Then 3+3.\nNEXT: add 3", "3+3=6", "6-3=3.\nGoal reached\nGOAL: yes\nPROBLEM: yes", "6"]
    seen = []
    chain = construct_chain(scripted_model(replies, seen), "1+2+3?", 20)
    assert [action for action, _ in seen] == ["clarify", "decompose", "solve", "reflect", "solve", "reflect", "decompose", "solve", "reflect", "answer"]
    assert [goal for _, goal in seen[2:8:2]] == ["add 1 and 2", "Alternatively, count up", "Alternatively, count up"] and seen[7][1] == "add 3"
    assert chain == ("Sum 1+2+3.\nFirst 1+2.\n1+2=4\n3-1 is not 3.\nAlternatively, count up\n1+2=3\nFine.\nThen 3+3.\n3+3=6\n6-3=3.\nGoal reached\n"
                     "\\boxed{6}")
    assert reward(chain, "6") == 1 and "GOAL" not in chain and "NEXT" not in chain
    assert construct_chain(scripted_model(replies, []), "1+2+3?", 10) == chain                              # ten turns are just enough
    assert construct_chain(scripted_model(replies, []), "1+2+3?", 9) is None
    assert construct_chain(lambda messages: None, "1+2+3?", 9) is None                                      # a reply that was cut off


def test_a_model_that_never_stops_reflecting_is_bounded():
    asked = []
    assert construct_chain(lambda messages: asked.append(1) or "GOAL: no", "1+1?", 12) is None and len(asked) == 12


def test_scripted_actor():
    """Without slips right and without 'wait'; with slips and honest checks always right; with missed checks sometimes wrong."""
    rows, tokenizer = arithmetic_problems(60, held_out=False), load_tokenizer("tiny")
    chains = lambda slip, missed: [construct_chain(scripted_actor(row["problem"], random.Random(i), slip, missed), row["problem"], 100) for i, row in enumerate(rows)]
    share = lambda texts: sum(reward(text, row["answer"]) for text, row in zip(texts, rows)) / 60
    clean, mended, missed = chains(0, 0), chains(0.4, 0), chains(0.4, 0.5)
    assert share(clean) == share(mended) == 1 and share(missed) < 0.9
    assert reflection_rates(clean)["wait"] == 0 and reflection_rates(mended)["wait"] > 0.3
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in mended)
    checks = re.findall(r"check (\d+)([-+/])(\d+)=(-?\d+)", " ".join(mended))  # true also where what they check is not
    of = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "/": lambda x, y: x // max(y, 1)}
    assert {sign for _, sign, _, _ in checks} == set(of) and all(of[sign](int(x), int(y)) == int(z) for x, sign, y, z in checks)
    for seed in range(30):  # a product that slipped to 0 is a number like any other
        assert construct_chain(scripted_actor("Compute 40-2*5.", random.Random(seed), 1, 1), "Compute 40-2*5.", 20)


# ------------------------------------------------------------------------------------------------------------------ benchmarks
OPTIONS = [f"choice {i}" for i in range(10)]
BENCHMARKS = {
    "MATH-500": ({"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "x"}, "1+1?", "2", ["2"], ["3"]),
    "AIME, HF": ({"id": 60, "problem": "1+1?", "solution": "...", "answer": "025", "url": "u", "year": "2024"}, "1+1?", "025", ["25", "025"], ["26"]),
    "AIME, MJ": ({"ID": "2024-I-1", "Problem": "1+1?", "Solution": "...", "Answer": 25}, "1+1?", "25", ["25"], ["26"]),
    "TheoremQA integer": ({"Question": "q?", "Answer": "4", "Answer_type": "integer", "Picture": None}, "q?", "4", ["4", "4.0"], ["5"]),
    "TheoremQA float": ({"Question": "q?", "Answer": "-0.5", "Answer_type": "float"}, "q?", "-0.5", ["-1/2"], ["0.5"]),
    "TheoremQA bool": ({"Question": "q?", "Answer": "True", "Answer_type": "bool"}, "True or False", "True", ["True", "true", "\\text{True}"], ["False"]),
    "TheoremQA list of integer": ({"Question": "q?", "Answer": "[1, 2]", "Answer_type": "list of integer"}, "[1, 2]", "[1, 2]", ["[1,2]"], ["[2, 1]", "[1]"]),
    "TheoremQA list of float": ({"Question": "q?", "Answer": "[0.5, -2.0]", "Answer_type": "list of float"}, "a list", "[0.5, -2.0]", ["[1/2, -2]"], ["[0.5, 2]"]),
    "TheoremQA option": ({"Question": "q? (a) x (b) y", "Answer": "(b)", "Answer_type": "option"}, "letter", "(b)", ["(b)", "b"], ["(a)"]),
    "MMLU-Pro": ({"question_id": 7, "question": "q?", "options": OPTIONS, "answer": "J", "answer_index": 9, "cot_content": "", "category": "law"},
                 "(A) choice 0\n(B) choice 1\n(C) choice 2\n(D) choice 3\n(E) choice 4\n(F) choice 5\n(G) choice 6\n(H) choice 7\n(I) choice 8\n(J) choice 9",
                 "J", ["J", "(J)", "\\text{J}"], ["A", "9"]),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_by_their_columns(name, kind, tmp_path):
    """Files with the columns of the four benchmarks: what is asked, the gold, and what the verifier says to right and wrong answers."""
    row, asked, gold, right, wrong = BENCHMARKS[name]
    path = tmp_path / f"data.{kind}"
    Dataset.from_list([row]).to_parquet(path) if kind == "parquet" else path.write_text(json.dumps(row))
    (loaded,) = load_problems(str(path), held_out=True)
    assert loaded["answer"] == gold and asked in loaded["problem"] and loaded["problem"].startswith(next(iter(v for k, v in row.items() if k.lower() in ("problem", "question"))))
    assert all(reward(f"So \\boxed{{{answer}}}.", gold) == 1 for answer in right) and not any(reward(f"\\boxed{{{answer}}}", gold) for answer in wrong)


def test_options_by_letter(tmp_path):
    """Every letter verifies itself and no other; padding options are left out; the index alone is enough; Python's own lists and True too."""
    letters = "ABCDEFGHIJ"
    assert all((reward(f"\\boxed{{{a}}}", b) == 1) == (a == b) for a in letters for b in letters)
    rows = [{"question": "a?", "options": ["x", "y", "N/A"], "answer_index": 1, "answer": "y"}, {"question": "b?", "options": "no list", "answer": "A"},
            {"question": "c?", "answer_type": "bool", "answer": True}, {"question": "d?", "answer_type": "list of integer", "answer": [3, 4]}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = {row["problem"][0]: row for row in load_problems(str(path))}
    assert found["a"]["answer"] == "B" and "(B) y" in found["a"]["problem"] and "(C)" not in found["a"]["problem"]
    assert found["b"] == {"problem": "b?", "answer": "A"} and found["c"]["answer"] == "True" and found["d"]["answer"] == "[3, 4]"


def test_evaluate_counts_reflections():
    """The shares in the result are those of the answers in it."""
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny")
    ids = tokenizer("<|im_start|>system\nstyle: long<|im_end|>\n<|im_start|>user\nCompute 17+4*6-9.<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    result = evaluate(model, tokenizer, [{"prompt": ids, "problem": "x", "answer": "32"}], 16, 120, 0.7, 0.95)
    assert result["reflection"] == reflection_rates(result["answers"][0]["responses"]) and math.isnan(result["standard_error"])


# ------------------------------------------------------------------------------------------------------------------ the script
def test_end_to_end(tmp_path, capsys):
    """Traces, labels, statistics, rows and summary say the same; a second run learns the same from the file."""
    rows = main(output=tmp_path / "run")
    said = capsys.readouterr().out
    assert "style: long" not in said.split("first prompt")[1].splitlines()[0] and "#" in said and "reflection words" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "traces.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and all(line["sampled"] == 4 and line["right"] >= len(line["completions"]) for line in lines)
    assert all(reward(text, line["answer"]) == 1 and "check" in text for line in lines for text in line["completions"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    kept = sum(len(line["completions"]) for line in lines)
    assert summary["traces"]["traces"] == summary["sampling"]["kept"] == kept and sum(summary["traces"]["histogram"].values()) == kept
    assert {"reflection_before", "reflection_after", "avg_at_k_before", "avg_at_k_after"} <= set(summary)
    assert len(rows) == math.ceil(kept / 4) and rows[-1]["tokens_seen"] == summary["traces"]["tokens"] and rows[0]["lr"] == 1e-3
    problems = load_problems(str(tmp_path / "run" / "problems.jsonl"))
    assert {row["problem"]: row["answer"] for row in problems} == {line["problem"]: line["answer"] for line in lines}
    again = main("--traces", tmp_path / "run" / "traces.jsonl", "--eval-problems", 0, output=tmp_path / "again")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows] and not (tmp_path / "again" / "problems.jsonl").exists()


@pytest.mark.parametrize("flags", ["--teacher-style short --eval-problems 0", "--source construct --eval-problems 0", "--lora-rank 2 --eval-problems 0",
                                   "--label-noise 0.5 --filter agree --keep all --eval-problems 0"])
def test_switches(flags, tmp_path):
    rows = main(*flags.split(), output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "traces.jsonl").read_text().splitlines()]
    texts = [text for line in lines for text in line["completions"]]
    assert rows and texts and all(math.isfinite(row["grad_norm"]) for row in rows)
    if "short" in flags:
        assert not any("check" in text for text in texts)
    if "construct" in flags:
        assert all("\n" not in text and text.count(" check ") >= 2 for text in texts)
    if "agree" in flags:
        labels = [json.loads(line)["problem"] for line in (tmp_path / "run" / "problems.jsonl").read_text().splitlines()]
        assert labels == [line["problem"] for line in lines if line["agrees"]] and all(line["agrees"] for line in lines if line["completions"])
        assert any(reward(text, line["answer"]) == 0 for line in lines for text in line["completions"])  # --keep all verifies nothing


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_cot_sft, "ROWS", 8)
        return folder, main("--eval-problems", 0, "--save-every", 100, output=folder)


@pytest.mark.parametrize("kill", ["while sampling", "while training"])
def test_resume_gives_the_very_weights(kill, uninterrupted, tmp_path, monkeypatch):
    flags, (folder, whole) = ["--eval-problems", 0, "--save-every", 100], uninterrupted
    monkeypatch.setattr(long_cot_sft, "ROWS", 8)
    assert len(whole) >= 3
    if kill == "while sampling":
        judge_, count = traces_module.judge, []

        def stopping(*args):
            count.append(1)
            if len(count) == 4:
                raise KeyboardInterrupt
            return judge_(*args)
        monkeypatch.setattr(long_cot_sft, "judge", stopping)
    else:
        log = long_cot_sft.start

        def stopping_start(cfg, name):
            run = log(cfg, name)
            write = run.log
            run.log = lambda *args, **kwargs: (write(*args, **kwargs), run.step == 1 and os.kill(os.getpid(), signal.SIGINT))
            return run
        monkeypatch.setattr(long_cot_sft, "start", stopping_start)
    with pytest.raises(SystemExit) as stop:
        main(*flags, output=tmp_path / "cut")
    assert stop.value.code == 130
    monkeypatch.undo()
    monkeypatch.setattr(long_cot_sft, "ROWS", 8)
    if kill == "while sampling":
        assert len((tmp_path / "cut" / "traces.jsonl").read_text().splitlines()) == 2                  # one piece of 8 // 4 problems
    long_cot_sft.main(["--resume", str(tmp_path / "cut")])
    assert (tmp_path / "cut" / "traces.jsonl").read_bytes() == (folder / "traces.jsonl").read_bytes()
    first, second = (load_file(run / "model" / "model.safetensors") for run in (folder, tmp_path / "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"], row["tokens_seen"], row["lr"]) for row in rows] == [(row["step"], row["loss"], row["tokens_seen"], row["lr"]) for row in whole]


def test_a_teacher_that_never_verifies(tmp_path, capsys):
    """Two tokens are too few for an answer: one line with the shares and what to do, after 64 problems at the latest."""
    with pytest.raises(SystemExit) as stop:
        main("--teacher-problems", 200, "--samples", 4, "--teacher-max-new-tokens", 2, output=tmp_path / "run")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "none of 256 answers to 64 problems was kept, 0 (0.0%) were right" in error and "--teacher-max-new-tokens" in error


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    empty, foreign, long = tmp_path / "empty.jsonl", tmp_path / "foreign.jsonl", tmp_path / "long.jsonl"
    empty.write_text("")
    foreign.write_text('{"text": "a"}\n')
    long.write_text(json.dumps({"prompt": "p", "completion": "x" * 600}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    for flags, message in {
            "--traces missing.jsonl": "--traces missing.jsonl: no such file", f"--traces {empty}": "no rows", f"--traces {foreign}": "needs a column",
            f"--traces {long}": "none of the 1 traces", f"--traces-out {foreign}": "another --traces-out", f"--traces-out {tmp_path}": "a folder",
            "--teacher no/such/model": "no model in", "--filter agree --samples 1": "at least 2", "--label-noise 2": "at most 1", "--samples 0": "at least 1",
            f"--label-noise 0.1 --traces {long}": "only for traces", "--teacher-max-new-tokens 512": "no room", "--teacher-style medium": "invalid choice"}.items():
        with pytest.raises(SystemExit) as stop:
            long_cot_sft.main(flags.split())
        error = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: ") and message in error[0], (flags, error)
        assert sorted(tmp_path.rglob("*")) == before, flags


def test_construct_needs_a_chat_model(tmp_path):
    cfg = argparse.Namespace(source="construct", teacher="tiny", data="problems.jsonl")
    with pytest.raises(BadInput, match="cannot follow instructions"):
        long_cot_sft.make_teacher(cfg)


def test_construct_asks_a_real_model(model_folder):
    """A random model writes no verdicts: the machine asks it up to --max-turns times and gives up; every reply that is cut off ends a chain."""
    cfg = argparse.Namespace(source="construct", teacher=str(model_folder), data="x", device="cpu", dtype="auto", cuda_graphs=False, teacher_system="", thinking=False,
                             teacher_max_new_tokens=4, teacher_temperature=1.0, teacher_top_p=1.0, samples=2, seed=0, max_turns=6)
    real, long_cot_sft.is_small = long_cot_sft.is_small, lambda name: False
    try:
        assert long_cot_sft.make_teacher(cfg)(0, [{"problem": "1+1?", "answer": "2"}] * 2) == [[None, None]] * 2
    finally:
        long_cot_sft.is_small = real
