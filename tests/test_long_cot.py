"""Long chain-of-thought SFT: loss, schedule, stop token, traces that survive a kill, the script."""
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_level_tokenizer, random_model
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common.evaluate
import long_cot_sft
from common.data import load_problems, read_rows
from common.flags import BadInput
from common.logprobs import micro_batches, response_logprobs
from common.models import load_tokenizer
from common.sampling import join
from long_cot_sft import (
    as_rollout,
    encode_traces,
    lr_at,
    pairs_of,
    reflection_rates,
    reward,
    sft_loss,
    use_stop_token,
)

SMALL = ("--teacher-problems 6 --samples 4 --teacher-max-new-tokens 90 --batch-size 4 --epochs 1 "
         "--max-new-tokens 40 --eval-problems 2").split()


def main(*flags, output):
    long_cot_sft.main([*SMALL, "--output", str(output), *map(str, flags)])
    return lines_of(output / "metrics.jsonl")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# the maths

def test_sft_loss_by_hand():
    """p = (1/2, 1/4, 1/4) everywhere, labels 0, 1, none: (ln 2 + ln 4) / 2. The gradient of a
    token is (p - onehot) / 2, elsewhere 0. One label in bfloat16: ln(1 + e^5) = 5.00672, not 5."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(1, 3, 1).requires_grad_()
    loss = sft_loss(logits, torch.tensor([[0, 1, -100]]))
    assert loss.item() == pytest.approx(1.5 * math.log(2))
    loss.backward()
    wanted = torch.tensor([[[-0.25, 0.125, 0.125], [0.25, -0.375, 0.125], [0.0, 0.0, 0.0]]])
    assert torch.allclose(logits.grad, wanted)
    assert sft_loss(torch.zeros(1, 2, 3), torch.full((1, 2), -100)).item() == 0
    low = sft_loss(torch.tensor([[[0.0, 5.0]]]).bfloat16(), torch.tensor([[0]]))
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(math.log(1 + math.exp(5)), abs=1e-5)


def test_schedule_by_hand():
    """100 updates to a peak of 1: 1/3, 2/3, 1, then from 1 to 0.1 by half a cosine, whose middle
    is 0.55; a single update is made at the peak."""
    assert [lr_at(step, 100, 1.0) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert lr_at(3 + 97 // 2, 100, 1.0) == pytest.approx(0.55, abs=0.01)
    assert lr_at(99, 100, 1.0) == pytest.approx(0.1, abs=1e-3)
    assert lr_at(0, 1, 2.0) == 2.0


def test_reflection_rates_by_hand():
    """Whole words in any case, each text once."""
    texts = ["Wait, no. However, so.", "The waiter waited.", "wait wait", "RECHECK: retry"]
    assert reflection_rates(texts) == {"wait": 0.5, "recheck": 0.25, "alternatively": 0.0,
                                       "retry": 0.25, "however": 0.25}


def encoded(n=7, seed=0):
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(2, 97) for _ in range(rng.randrange(low, high)))

    return [(ids(1, 9), (*ids(1, 30), 1)) for _ in range(n)]


def labels_of(rollout):
    """Prompt out, stop token in, shifted: labels[:, t] is what position t must predict."""
    ids, predicts = join(rollout)
    return ids, torch.where(predicts, ids.roll(-1, 1), -100)


def test_mask_leaves_the_prompt_out_and_the_stop_token_in():
    """Prompt 5 6 7, response 8 9 and the stop token 1: positions 2, 3, 4 predict 8, 9, 1. A row
    that fills a rank up has no label."""
    rows = [((5, 6, 7), (8, 9, 1)), ((5,), (1,)), ((5, 6), ())]
    rollout = as_rollout(rows, "cpu")
    ids, labels = labels_of(rollout)
    assert ids.tolist() == [[5, 6, 7, 8, 9, 1], [5, 1, 0, 0, 0, 0], [5, 6, 0, 0, 0, 0]]
    none = [-100] * 6
    assert labels.tolist() == [[-100, -100, 8, 9, 1, -100], [1, *none[1:]], none]
    assert rollout.mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert rollout.tokens.tolist() == [[8, 9, 1], [1, 0, 0], [0, 0, 0]]
    assert rollout.lengths.tolist() == [3, 1, 0]


@pytest.mark.parametrize("budget", [1, 30, 60, 10_000])
def test_micro_batches_make_sft_loss(budget):
    """Value and gradients of sft_loss on full logits, whether one trace runs at a time or all; a
    trace without a label changes nothing."""
    model = random_model("qwen3")
    rollout = as_rollout([*encoded(), ((5, 6), ())], "cpu")
    ids, labels = labels_of(rollout)
    wanted = sft_loss(model(input_ids=ids).logits, labels)
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = 0.0
    for part in micro_batches(rollout, torch.arange(8), budget):
        of_part = -response_logprobs(model, rollout[part]).sum() / rollout.lengths.sum()
        of_part.backward()
        loss += of_part.item()
    assert loss == pytest.approx(wanted.item(), abs=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-5), name


# the stop token

QWEN = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
BARE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
THINKING = QWEN.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSED = QWEN.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")


def tokenizer_with(template, eos="<|im_end|>"):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    tokenizer.eos_token = eos
    return tokenizer


def stop_of(tokenizer):
    """-> the eos token and all stop tokens after use_stop_token, which the model keeps too."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=0))
    stops = use_stop_token(tokenizer, model)
    assert model.generation_config.eos_token_id == stops
    return tokenizer.eos_token, tokenizer.convert_ids_to_tokens(stops)


@pytest.mark.parametrize("template, eos", [
    (QWEN, "<|im_end|>"),
    (QWEN, "<|endoftext|>"),     # Qwen's base models
    (QWEN, None),
    (BARE, "<|im_end|>"),        # nothing special ends a turn there
    (None, "<|im_end|>")])
def test_the_stop_token_is_what_ends_a_turn(template, eos):
    """Token 0, <|endoftext|>, stays one of those that end an answer when it is sampled."""
    stops = ["<|endoftext|>", "<|im_end|>"]
    assert stop_of(tokenizer_with(template, eos)) == ("<|im_end|>", stops)


@pytest.mark.parametrize("template", [BARE, None])
def test_no_stop_token_at_all_is_refused(template):
    with pytest.raises(BadInput, match="no eos token"):
        stop_of(tokenizer_with(template, None))


def encode(pairs, template=QWEN, context=512, system="", held_out=()):
    """-> rows, their responses as text; stop tokens are <|endoftext|> and <|im_end|>, 0 and 1."""
    tokenizer = tokenizer_with(template)
    rows = encode_traces(tokenizer, pairs, context, [0, 1], system, held_out)
    return rows, [tokenizer.decode(response) for _, response in rows]


@pytest.mark.parametrize("answer", [
    "a", "a<|im_end|>", "a<|im_end|>\n", "a \n", "a<|endoftext|>", "a<|im_end|><|endoftext|>"])
def test_an_answer_ends_with_exactly_one_stop_token(answer):
    assert encode([("q", answer)])[1] == ["a<|im_end|>"]


@pytest.mark.parametrize("template, answer, refused", [
    (THINKING, "<think>\nhm</think>a", True), (CLOSED, "<think>\nhm</think>a", True),
    (QWEN, "<think>\nhm</think>a", False), (THINKING, "hm</think>a", False)])
def test_a_think_block_is_not_opened_twice(template, answer, refused):
    if refused:
        with pytest.raises(BadInput, match="begin with <think>"):
            encode([("q", answer)], template)
    else:
        assert encode([("q", answer)], template)[1] == [answer + "<|im_end|>"]


def test_pairs_are_dropped_whole_and_counted(capsys):
    """One twice, two of a held-out question, as a text and as a chat, one with a stop token
    inside, one that is nothing else, one longer than the context, four without a text; what
    stays is not cut."""
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "held"}]
    pairs = [("q", "a"), ("q", "a"), ("held", "b"), (chat, "b"), ("q", "x" * 600),
             ("q", "y" * 300), ("q", "a<|im_end|>b"), ("q", "<|im_end|>"), ("q", " "),
             ("q", None), ("q", 3),
             (None, "a")]
    _, texts = encode(pairs, held_out=[{"problem": "held"}])
    assert texts == ["a<|im_end|>", "y" * 300 + "<|im_end|>"]
    said = capsys.readouterr().out
    for part in ("2 to train on", "1 repeated", "2 of held-out problems",
                 "2 empty or with a stop token inside", "1 longer than the context of 512 tokens",
                 "4 without messages, or a prompt and a completion"):
        assert part in said
    with pytest.raises(BadInput, match="none of the 1 traces is left"):
        encode(pairs[4:5])


def test_a_system_message_stands_before_the_problem():
    [(prompt, _)], _ = encode([("q", "a")], system="be brief")
    assert tokenizer_with(QWEN).decode(prompt).startswith("<|im_start|>system\nbe brief<|im_end|>")


def test_context_to_the_token():
    [(prompt, response)], _ = encode([("q", "answer")])
    tokens = len(prompt) + len(response)
    assert len(encode([("q", "answer")], context=tokens)[0]) == 1
    with pytest.raises(BadInput):
        encode([("q", "answer")], context=tokens - 1)


# files of traces

ASKED = [{"role": "user", "content": "q"}]
SAID = [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("row, pairs", [
    ({"messages": ASKED + SAID}, [(ASKED, "a")]),
    ({"prompt": "q", "completion": "a", "other": 1}, [("q", "a")]),
    ({"prompt": ASKED, "completion": "a"}, [(ASKED, "a")]),
    ({"problem": "q", "completions": ["a", "b"], "answer": "1"}, [("q", "a"), ("q", "b")])])
def test_trace_files(row, pairs, kind, tmp_path):
    path = tmp_path / f"traces.{kind}"
    if kind == "parquet":
        Dataset.from_list([row]).to_parquet(path)
    else:
        path.write_text(json.dumps(row))
    assert pairs_of(read_rows(str(path), "train")) == pairs


@pytest.mark.parametrize("row", [
    {"text": "a"}, {"prompt": "q", "completion": ""}, {"messages": ASKED}, {"messages": SAID},
    {"messages": ASKED + SAID + ASKED}, {"prompt": "q", "completion": SAID}])
def test_rows_without_an_answer_to_learn(row):
    """Nothing, or not the assistant's last: counted, and refused if there is no other."""
    with pytest.raises(BadInput, match="none of the 1 traces .* 1 without messages, or a prompt"):
        encode(pairs_of([row]))


# sampling

@pytest.mark.parametrize("keep, kept", [
    ("verified", ["\\boxed{1}", "\\boxed{1}"]), ("all", ["x", "\\boxed{1}", "\\boxed{1}"])])
def test_what_is_kept_of_four_answers(keep, kept, monkeypatch):
    """A wrong one, a right one that was cut off, and a right one twice: 3 ended, 2 are right."""
    texts = ["x", "\\boxed{1}", "\\boxed{1}", "\\boxed{1}"]
    rollout = SimpleNamespace(texts=texts, finished=torch.tensor([True, False, True, True]),
                              lengths=torch.tensor([1, 9, 9, 9]))
    monkeypatch.setattr(common.evaluate, "sample", lambda *args, **kwargs: rollout)
    args = SimpleNamespace(samples=4, keep=keep, teacher_max_new_tokens=9, teacher_temperature=1.0)
    asked = [{"problem": "p", "answer": "1", "level": 3}]
    assert long_cot_sft.ask_teacher(None, load_tokenizer("tiny"), asked, "", 0, args) == [
        {"problem": "p", "answer": "1", "completions": kept, "ended": 3, "right": 2}]


# the paper's benchmarks

BENCHMARKS = {
    "MATH-500": ({"problem": "1+1?", "solution": "It is $\\boxed{2}$.", "answer": "2",
                  "subject": "Algebra", "level": 1}, "1+1?", "2", ["2"], ["3"]),
    "AIME, HF": ({"id": 60, "problem": "1+1?", "solution": "...", "answer": "025",
                  "year": "2024"}, "1+1?", "025", ["25", "025"], ["26"]),
    "AIME, MJ": ({"ID": "2024-I-1", "Problem": "1+1?", "Solution": "...", "Answer": 25},
                 "1+1?", "25", ["25"], ["26"]),
    "TheoremQA integer": ({"Question": "q?", "Answer": "4", "Answer_type": "integer",
                           "Picture": None}, "q?", "4", ["4", "4.0"], ["5"]),
    "TheoremQA float": ({"Question": "q?", "Answer": "-0.5", "Answer_type": "float"},
                        "q?", "-0.5", ["-1/2"], ["0.5"])}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_by_their_columns(name, tmp_path):
    """What is asked, the gold, and what the reward of right and wrong answers is."""
    row, asked, gold, right, wrong = BENCHMARKS[name]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row))
    [loaded] = load_problems(str(path))
    assert loaded["answer"] == gold and asked in loaded["problem"]
    assert all(reward(f"So \\boxed{{{answer}}}.", loaded) == 1 for answer in right)
    assert not any(reward(f"\\boxed{{{answer}}}", loaded) for answer in wrong)


# the script

@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Three batches of two problems each."""
    folder = tmp_path_factory.mktemp("sft") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_cot_sft, "ROWS", 8)
        return folder, main(output=folder)


def test_end_to_end(uninterrupted, tmp_path):
    """Traces, statistics, rows and summary say the same; a second run learns the same from the
    file, and the file serves as --data. The first rate of 4 updates and fewer is the peak."""
    folder, rows = uninterrupted
    lines = lines_of(folder / "traces.jsonl")
    assert len(lines) == 6
    texts = {}
    for line in lines:
        assert 4 >= line["ended"] >= line["right"] == len(line["completions"])
        assert all(reward(text, line) == 1 and "check" in text for text in line["completions"])
        texts.update({(line["problem"], text): text for text in line["completions"]})
    texts = list(texts.values())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["traces"]["traces"] == len(texts)
    assert {"reflection_before", "reflection_after", "avg_at_k_after"} <= summary.keys()
    tokenizer = load_tokenizer("tiny")
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert summary["traces"]["tokens"] == tokens
    assert len(rows) == math.ceil(len(texts) / 4) and rows[0]["lr"] == 1e-3
    assert len(load_problems(str(folder / "traces.jsonl"))) == 6

    again = main("--traces", folder / "traces.jsonl", "--eval-problems", 0, output=tmp_path / "2")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    assert not (tmp_path / "2" / "traces.jsonl").exists()


def test_short_chains(tmp_path):
    """Short chains check nothing; --keep all keeps a wrong answer too; adapters are trained."""
    flags = ["--teacher-style", "short", "--keep", "all", "--lora-rank", 2, "--eval-problems", 0]
    rows = main(*flags, output=tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["flags"]["teacher_temperature"] == 0.7 and rows[0]["lr"] == 1e-2
    lines = lines_of(tmp_path / "run" / "traces.jsonl")
    texts = [(text, line) for line in lines for text in line["completions"]]
    assert not any("check" in text for text, _ in texts)
    assert {reward(text, line) for text, line in texts} == {0.0, 1.0}


def interrupt_at(monkeypatch, name, call):
    """The given call of a function of the script is a Ctrl-C."""
    function, calls = getattr(long_cot_sft, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(long_cot_sft, name, stopping)


@pytest.mark.parametrize("name, call, left", [("ask_teacher", 2, 2), ("as_rollout", 3, 6)],
                         ids=["sampling", "training"])
def test_resume_gives_the_very_weights(name, call, left, uninterrupted, tmp_path, monkeypatch):
    """Stopped in the second batch of traces, as it was being written, or in the third step. The
    traces that are there are not sampled again."""
    folder, whole = uninterrupted
    monkeypatch.setattr(long_cot_sft, "ROWS", 8)
    with monkeypatch.context() as patch:
        interrupt_at(patch, name, call)
        with pytest.raises(SystemExit) as stop:
            main(output=tmp_path / "cut")
    assert stop.value.code == 130 and len(whole) >= 3
    traces, complete = (tmp_path / "cut" / "traces.jsonl", (folder / "traces.jsonl").read_bytes())
    assert len(lines_of(traces)) == left
    (tmp_path / "cut" / "traces.jsonl.tmp").write_bytes(complete[:-30])
    asked, ask = [], long_cot_sft.ask_teacher

    def asking(teacher, tokenizer, problems, *args):
        asked.extend(problems)
        return ask(teacher, tokenizer, problems, *args)

    monkeypatch.setattr(long_cot_sft, "ask_teacher", asking)
    long_cot_sft.main(["--resume", str(tmp_path / "cut")])
    assert len(asked) == 6 - left and traces.read_bytes() == complete
    one, two = (load_file(run / "model" / "model.safetensors") for run in (folder, traces.parent))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for row, other in zip(whole, lines_of(tmp_path / "cut" / "metrics.jsonl"), strict=True):
        assert all(row[name] == other[name] for name in ("step", "loss", "lr"))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (folder, traces.parent)]
    assert all({**summary, "seconds": 0} == {**summaries[0], "seconds": 0} for summary in summaries)


def refused(flags, capsys):
    """-> the one line of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        long_cot_sft.main([*map(str, flags)])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "error: " in said
    return said


def test_resume_with_other_traces_is_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / "traces.jsonl"
    path.write_text('{"prompt": "Compute 1+1.", "completion": "2"}\n' * 2)
    flags = ["--traces", path, "--eval-problems", 0, "--batch-size", 1, "--epochs", 2]
    long_cot_sft.main([*map(str, flags), "--output", str(tmp_path / "run")])
    path.write_text('{"prompt": "Compute 1+1.", "completion": "22"}\n')
    assert "traces have changed" in refused(["--resume", tmp_path / "run"], capsys)


def test_resume_with_damaged_traces_is_refused(uninterrupted, tmp_path, capsys):
    """Nothing is overwritten."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted[0], folder)
    lines = (folder / "traces.jsonl").read_text().splitlines()
    (folder / "traces.jsonl").write_text("\n".join([lines[0], "half", *lines[1:]]) + "\n")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "line 2 is not JSON" in refused(["--resume", folder], capsys)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_teacher_that_never_verifies(tmp_path, capsys):
    """Two tokens are too few for an answer: the counts, and one line."""
    flags = ["--teacher-problems", 5, "--samples", 4, "--teacher-max-new-tokens", 2]
    with pytest.raises(SystemExit) as stop:
        long_cot_sft.main([*map(str, flags), "--output", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert stop.value.code == 2 and "none of the 0 traces is left" in said.err
    assert "5 x 4 answers: " in said.out and "0 right" in said.out


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "foreign.jsonl").write_text('{"text": "a"}')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "p", "completion": "x" * 600}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    for flags, message in {
            "--traces missing.jsonl": "missing.jsonl: cannot be read",
            "--traces empty.jsonl": "no rows", "--traces foreign.jsonl": "none of the 1 traces",
            "--traces long.jsonl": "none of the 1 traces",
            "--teacher no/such/model": "no/such/model",
            "--teacher-max-new-tokens 512": "longer than the 0 tokens", "--samples 0": "at least 1",
            "--teacher-style medium": "invalid choice"}.items():
        assert message in refused(flags.split(), capsys), flags
        assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before, flags


def test_a_model_of_ones_own(tmp_path, capsys, monkeypatch):
    """Another eos token than the template's: answers are trained to end as in the template, which
    is saved for those who sample next. Without any, it is refused before the teacher samples."""
    tokenizer = tokenizer_with(QWEN, "<|endoftext|>")
    for name in ("base", "endless"):
        random_model("qwen3", len(tokenizer)).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "base")
    tokenizer_with(BARE, None).save_pretrained(tmp_path / "endless")
    main("--model", tmp_path / "base", output=tmp_path / "run")
    place = tmp_path / "run" / "model"
    assert AutoTokenizer.from_pretrained(place).eos_token == "<|im_end|>"
    saved = AutoModelForCausalLM.from_pretrained(place)
    assert 1 in saved.generation_config.eos_token_id
    monkeypatch.setattr(long_cot_sft, "sample_traces", None)
    said = refused(["--model", tmp_path / "endless", "--output", tmp_path / "no"], capsys)
    assert "no eos token" in said and not (tmp_path / "no").exists()


def test_the_longest_answer_fits_a_small_context(tmp_path):
    """A large model of 600 positions answers in 300 tokens, and not in 4,096; the embedded one, of
    512, in 160."""
    tokenizer = tokenizer_with(QWEN)
    model = random_model("qwen3", len(tokenizer), hidden_size=264, max_position_embeddings=600)
    model.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps({"prompt": "q", "completion": "a"}))
    for model, longest in ((tmp_path / "large", 300), ("tiny", 160)):
        run = tmp_path / f"run {longest}"
        flags = ["--model", model, "--traces", traces, "--eval-problems", 0, "--output", run]
        long_cot_sft.main([*map(str, flags)])
        config = json.loads((run / "config.json").read_text())
        assert config["flags"]["max_new_tokens"] == longest
