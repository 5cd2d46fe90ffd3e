"""Data: files and schemas of the usual sets, what a gold answer is, the split of the embedded task,
order, prompts; and how accuracy is estimated."""
import itertools
import json
import math
import random
from argparse import Namespace

import datasets
import pytest
from conftest import byte_level_tokenizer

from common import data
from common.data import (
    batch_of,
    drop_long_prompts,
    encode_prompt,
    gold_answer,
    load_problems,
    load_train_and_eval,
    read_rows,
)
from common.evaluate import pass_at_k
from common.flags import BadInput
from common.models import load_tokenizer
from common.tiny.arithmetic import LARGEST, arithmetic_problems, is_held_out, make_problem, solve

CHAT = [{"role": "user", "content": "1+1?"}]
TWO_ROWS = [{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "2"}]


def write(path, rows):
    """Rows into a file of the kind that its name says."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row, problem, answer", [
    ({"problem": "1+1?", "answer": "2"}, "1+1?", "2"),                      # MATH-500, AIME, DAPO
    ({"question": "1+1?", "answer": "One and one.\n#### 2"}, "1+1?", "2"),  # GSM8K
    ({"question": "1+1?", "answer": "So\n#### 1,234"}, "1+1?", "1,234"),
    ({"question": "1+1?", "final_answer": "2", "difficulty": 1.0, "r1_solution_1": "..."},
     "1+1?", "2"),                                                          # DeepMath-103K
    ({"problem": "1+1?", "level": "1", "solution": "It is $\\boxed{\\frac{4}{2}}$."},
     "1+1?", "\\frac{4}{2}"),                                               # MATH
    ({"Problem": "1+1?", "Answer": 2}, "1+1?", "2"),                        # capitals, numbers
    ({"data_source": "x", "prompt": CHAT, "reward_model": {"ground_truth": "2", "style": "rule"}},
     CHAT, "2"),                                                            # DAPO-Math-17k
    ({"question": "1+1?", "final_answer": ["2"], "error": None}, "1+1?", "2"),  # OlympiadBench
])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_schemas(row, problem, answer, kind, tmp_path, capsys):
    """Problem and answer are found, and every column of the data stays in the row."""
    got = load_problems(write(tmp_path / f"data.{kind}", [row]))
    assert got == [{**row, "problem": problem, "answer": answer}]
    names = {name.lower() for name in row}
    assert ("'problem'" in capsys.readouterr().out.lower()) == ("problem" in names)


@pytest.mark.parametrize("name, text", [
    ("rows.jsonl", '{"problem": "a", "answer": "1"}\n\n{"problem": "b", "answer": "2"}'),
    ("rows.jsonl", '\ufeff{"problem": "a", "answer": "1"}\r\n{"problem": "b", "answer": "2"}\r\n'),
    ("rows.json", '{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": "2"}\n'),
    ("rows.json", '\n {"problem": "a", "answer": "1"}\n{"problem": "b", "answer": "2"}\n'),
    ("rows.json", json.dumps(TWO_ROWS)),
    ("rows.json", "\ufeff" + json.dumps(TWO_ROWS, indent=2)),
    ("rows.jsonl", "\n" + json.dumps(TWO_ROWS, indent=2)),
])
def test_files(name, text, tmp_path):
    path = tmp_path / name
    path.write_bytes(text.encode())
    assert list(read_rows(str(path), "train")) == TWO_ROWS


def test_other_line_ends_are_text(tmp_path):
    """U+2028 and U+0085 end no line of a .jsonl, unlike for str.splitlines."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "a\u2028b\x85c", "answer": "1"}\n', encoding="utf-8")
    assert read_rows(str(path), "train") == [{"problem": "a\u2028b\x85c", "answer": "1"}]


@pytest.mark.parametrize("name, content, message", [
    ("missing.jsonl", None, "cannot be read, .*No such file"),
    ("missing.parquet", None, "cannot be read, .*No such file"),
    ("empty.jsonl", b"", "no rows"),
    ("blank.json", b" \n\n", "no rows"),
    ("none.json", b"[]", "no rows"),
    ("broken.jsonl", b'{"problem": "a"}\n\n\n{"problem": "b"\n{"problem": "c"}',
     "line 4 is not JSON: "),
    ("broken.json", b'{"problem": "a"}\n{"problem": "b"', "line 2 is not JSON: "),
    ("object.json", b'{\n"problem": "a",\n"answer": "1"\n}', "line 1 is not JSON: "),
    ("broken.json", b'[\n{"problem": "a"},\n{"problem" "b"}\n]', "line 3 is not JSON: "),
    ("latin.jsonl", b'{"problem": "\xe9"}', "cannot be read, 'utf-8'"),
    ("deep.jsonl", b"[" * 100_000, "cannot be read"),
    ("deep.json", b'{"a":' * 100_000, "cannot be read"),
    ("list.jsonl", b"[1, 2]\n", "every row must be an object"),
    ("number.json", b"5", "every row must be an object"),
    ("mixed.jsonl", b'{"problem": "a"}\n5\n', "every row must be an object"),
    ("data.json", b'{"data": [{"problem": "a", "answer": "1"}]}', "no column is named problem"),
    ("broken.parquet", b"PAR1 and no more", "cannot be read"),
    ("columns.jsonl", b'{"text": "a", "label": "b"}',
     "no column is named problem or question or prompt or query; the data has text, label"),
    ("answer.jsonl", b'{"problem": "a", "label": "b"}', "no column is named answer or "),
    ("gold.jsonl", b'{"problem": "a", "answer": ""}', "usable answer"),
    ("nonsense", None, "hub id"),
    ("rows.csv", b"problem,answer\n", "hub id"),
])
def test_bad_data(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        load_problems(str(path))
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("name, asked", [
    ("owner/set", ("owner/set", None, "train")),
    ("owner/set:main", ("owner/set", "main", "train")),
    ("owner/set:main:test", ("owner/set", "main", "test")),
    ("owner/set::test", ("owner/set", None, "test")),
])
def test_hub_ids(name, asked, monkeypatch):
    """owner/set:config:split, the last two optional."""
    calls = []

    def load_dataset(hub_id, config, split):
        calls.append((hub_id, config, split))
        return datasets.Dataset.from_list(TWO_ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows(name, "train")) == TWO_ROWS
    assert calls == [asked]


def test_a_hub_set_that_is_not_there(monkeypatch):
    def load_dataset(*_, **__):
        raise ValueError("no such config\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BadInput, match=r"^a/b:c: cannot be read, no such config"):
        read_rows("a/b:c", "test")


def test_columns_of_any_of_the_first_rows(tmp_path):
    """Named in row 100 for the first time they are found; in row 101 they are not."""
    rows = [{"problem": f"p{i}"} for i in range(101)]
    rows[99]["answer"] = "7"
    got = load_problems(write(tmp_path / "rows.jsonl", rows))
    assert got == [{"problem": "p99", "answer": "7"}]
    rows[100]["answer"] = rows[99].pop("answer")
    with pytest.raises(BadInput, match="no column is named answer .*; the data has problem$"):
        load_problems(write(tmp_path / "rows.jsonl", rows))


def test_the_first_known_column_wins(tmp_path):
    """answer before solution, problem before prompt, whatever their order in the data."""
    row = {"solution": "\\boxed{1}", "prompt": "no", "answer": "2", "problem": "yes"}
    [got] = load_problems(write(tmp_path / "rows.jsonl", [row]))
    assert (got["problem"], got["answer"], got["prompt"]) == ("yes", "2", "no")


def test_useless_rows_are_dropped_and_counted(tmp_path, capsys):
    """Of six rows: no gold, no problem, no columns; one twice, of which the first stays."""
    rows = [{"problem": "a", "answer": "1"}, {"problem": "a", "answer": "9"},
            {"problem": "b", "answer": ""}, {"problem": " ", "answer": "1"}, {"other": 1},
            {"problem": "c", "answer": "3"}]
    got = load_problems(write(tmp_path / "rows.jsonl", rows))
    assert sorted((row["problem"], row["answer"]) for row in got) == [("a", "1"), ("c", "3")]
    assert "6 rows, 3 dropped" in (said := capsys.readouterr().out) and "1 repeated" in said


def test_order_and_count_follow_the_seed(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"problem": f"p{i}", "answer": "1"} for i in range(30)])

    def order(**options):
        return [row["problem"] for row in load_problems(path, **options)]

    assert order() == order(seed=0) != order(seed=1)
    assert sorted(order()) == sorted(order(seed=1)) == sorted(f"p{i}" for i in range(30))
    assert order(count=5) == order()[:5]


@pytest.mark.parametrize("cell, answer", [
    ("a\n#### 5", "5"), ("1 #### 2 #### 3", "3"), ("####", None), ("#### \\boxed{5}", "5"),
    ("so \\boxed{3} and \\boxed{4}", "3, 4"), ("\\fbox{6}", "6"), ("\\boxed{", None),
    ({"ground_truth": "7"}, "7"), ({"ground_truth": ["7"]}, "7"), ({"ground_truth": None}, None),
    ({"ground_truth": 7}, "7"), ({"answer": "7"}, None), ({"ground_truth": {"x": 1}}, None),
    ('{"ground_truth": "7", "style": "rule"}', "7"), ('{"x": 1}', None), ('{"half', None),
    ('["8"]', "8"), (b'["12"]', "12"), ('["' * 100_000, None),
    (["8"], "8"), ([8], "8"), ([["8"]], None), ([], None), ([1, 2], None), ([{"x": 1}], None),
    ("[1, 2]", "[1, 2]"), ("[0, 1)", "[0, 1)"), ("(0, 1]", "(0, 1]"), ("{1, 2}", "{1, 2}"),
    (9, "9"), (0, "0"), (0.5, "0.5"), (True, "True"), (False, "False"),
    (None, None), (math.nan, None), (b"12", "12"), (" 1 ", "1"), ("", None), ("  ", None),
    ("\\frac{1}{2}", "\\frac{1}{2}"),
])
def test_gold_answer(cell, answer):
    assert gold_answer(cell) == answer


def test_null_and_nan_in_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "a", "answer": NaN}\n{"problem": "b", "answer": null}\n'
                    '{"problem": null, "answer": "1"}\n{"problem": "c", "answer": 2.5}\n')
    assert [(row["problem"], row["answer"]) for row in load_problems(str(path))] == [("c", "2.5")]


@pytest.mark.parametrize("name", ["choices", "options"])
def test_multiple_choice_is_dropped(name, tmp_path, capsys):
    """Its question lacks the options, and a gold of 1 means the second of them."""
    rows = [{"question": "Q?", name: ["3", "4"], "answer": 1},
            {"question": "1+1?", name: [], "answer": 2}, {"question": "1+2?", "answer": 3}]
    got = load_problems(write(tmp_path / "rows.jsonl", rows))
    assert sorted(row["answer"] for row in got) == ["2", "3"]
    assert "3 rows, 1 dropped" in capsys.readouterr().out


def test_solve_by_hand():
    """17+4*6-9: 4*6=24, 17+24=41, 41-9=32. 20-5+3: from the left, 15 then 18."""
    assert solve([17, 4, 6, 9], list("+*-")) == [24, 41, 32]
    assert solve([20, 5, 3], list("-+")) == [15, 18]


def value_of(expression: str) -> int:
    """Another way to the value: a sum of signed products."""
    total = 0
    for term in expression.replace("-", "+-").split("+"):
        product = math.prod(int(factor) for factor in term.lstrip("-").split("*"))
        total += -product if term.startswith("-") else product
    return total


def test_arithmetic_problems():
    """Every answer is right and in range; the text is the numbers and operators."""
    rng = random.Random(0)
    for _ in range(200):
        problem, numbers, operators = make_problem(rng, held_out=False)
        expression = problem.removeprefix("Compute ").removesuffix(".")
        pairs = zip(numbers, [*operators, ""], strict=True)
        assert "".join(f"{n}{operator}" for n, operator in pairs) == expression
        assert solve(numbers, operators)[-1] == value_of(expression)
        assert 0 <= value_of(expression) <= LARGEST
    for row in arithmetic_problems(50, False):
        assert row["answer"] == str(value_of(row["problem"][8:-1]))


def test_arithmetic_halves_are_disjoint():
    """Whatever the seeds."""
    halves = []
    for held_out in (False, True):
        rows = [row for seed in range(3) for row in arithmetic_problems(800, held_out, seed)]
        halves.append({row["problem"] for row in rows})
    train, held_out = halves
    assert not train & held_out
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))


def test_arithmetic_is_a_name_of_data():
    """Files beside the embedded model; with seed 0 their rows come in the order they were made."""
    assert load_problems("arithmetic") == arithmetic_problems(2048, False)
    assert load_problems("arithmetic", "test", count=5) == arithmetic_problems(5, True)
    other = load_problems("arithmetic", "test", seed=3)
    assert sorted(map(str, other)) == sorted(map(str, arithmetic_problems(1024, True)))
    assert other != arithmetic_problems(1024, True)


def test_evaluation_problems_are_set_aside(tmp_path):
    """Without --eval-data a fifth at most goes to evaluation, and none of it is trained on."""
    rows = [{"problem": f"p{i}", "answer": str(i)} for i in range(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    for wanted, aside in ((128, 4), (3, 3), (0, 0)):
        args = Namespace(data=path, eval_data=None, seed=0, eval_problems=wanted)
        train, held_out = load_train_and_eval(args)
        assert len(held_out) == aside and len(train) == 20 - aside
        assert sorted(row["problem"] for row in train + held_out) == sorted(
            row["problem"] for row in rows)


def test_evaluation_data_of_its_own(tmp_path):
    """What is in --eval-data is not trained on; --eval-problems rows of it are taken."""
    path = write(tmp_path / "rows.jsonl",
                 [{"problem": f"p{i}", "answer": "1"} for i in range(6)])
    other = write(tmp_path / "eval.jsonl",
                  [{"problem": f"p{i}", "answer": "1"} for i in range(4, 9)])
    args = Namespace(data=path, eval_data=other, seed=0, eval_problems=128)
    train, held_out = load_train_and_eval(args)
    assert {row["problem"] for row in train} == {"p0", "p1", "p2", "p3"}
    assert {row["problem"] for row in held_out} == {"p4", "p5", "p6", "p7", "p8"}
    args.eval_problems = 2
    assert len(load_train_and_eval(args)[1]) == 2
    args.data = other
    args.eval_problems = 128
    with pytest.raises(BadInput, match="nothing is left to train on"):
        load_train_and_eval(args)


def test_batches_cover_every_pass_once():
    """10 rows in batches of 4: five batches are two passes, each row twice; the same step gives the
    same batch, another seed another order."""
    rows = list(range(10))
    seen = [row for step in range(5) for row in batch_of(rows, step, 4, seed=1)]
    assert sorted(seen[:10]) == rows and sorted(seen[10:]) == rows
    assert seen[:10] != seen[10:] and seen[:10] != rows
    assert batch_of(rows, 3, 4, seed=1) == seen[12:16]
    assert batch_of(rows, 0, 4, seed=2) != seen[:4]
    assert len(batch_of(rows, 0, 25, seed=1)) == 25


def decoded(tokenizer, *arguments):
    return tokenizer.decode(encode_prompt(tokenizer, *arguments))


def test_prompts():
    """System message, user, then the assistant's turn is open, behind a closed think block; a chat
    is used as it is and keeps its own system message; without a template the plain text."""
    tokenizer = byte_level_tokenizer()
    user = "<|im_start|>user\n2+2?<|im_end|>\n"
    answer = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    brief = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert decoded(tokenizer, "2+2?") == user + answer
    assert decoded(tokenizer, "2+2?", "Be brief.") == brief + user + answer
    chat = [{"role": "user", "content": "2+2?"}]
    assert decoded(tokenizer, chat, "Be brief.") == brief + user + answer
    own = [{"role": "system", "content": "Mine."}, *chat]
    mine = "<|im_start|>system\nMine.<|im_end|>\n"
    assert decoded(tokenizer, own, "Be brief.") == mine + user + answer
    assert own == [{"role": "system", "content": "Mine."}, *chat]  # left as it was
    tokenizer.chat_template = None
    assert decoded(tokenizer, "2+2?", "Be brief.") == "Be brief.\n2+2?\n"


def test_a_template_that_refuses_is_bad_input():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(BadInput, match="no system role"):
        encode_prompt(tokenizer, "2+2?")
    with pytest.raises(BadInput, match='--system "" leaves that out'):
        encode_prompt(tokenizer, "2+2?", "Be brief.")


def test_long_prompts_are_dropped_not_cut(capsys):
    """A prompt of one digit has 19 tokens or so, 400 letters far more than 100; nothing is dropped
    where all fit. The system message counts."""
    tokenizer = byte_level_tokenizer()
    rows = [{"problem": "1", "answer": "1"}, {"problem": "x" * 400, "answer": "1"}]
    assert drop_long_prompts(tokenizer, rows, "", 100) == rows[:1]
    assert "1 of 2 prompts are longer than 100 tokens" in capsys.readouterr().out
    assert drop_long_prompts(tokenizer, rows, "", 5000) == rows
    assert capsys.readouterr().out == ""
    exact = len(encode_prompt(tokenizer, "1", "y" * 50))
    assert drop_long_prompts(tokenizer, rows[:1], "y" * 50, exact) == rows[:1]
    with pytest.raises(BadInput, match="every prompt is longer"):
        drop_long_prompts(tokenizer, rows[:1], "y" * 50, exact - 1)
    with pytest.raises(BadInput, match="longer than the -5 tokens that --max-new-tokens leaves"):
        drop_long_prompts(tokenizer, rows, "", -5)
    assert drop_long_prompts(tokenizer, [], "", 10) == []


def test_short_texts_are_not_encoded_to_start(monkeypatch):
    """However many rows: with 300 bytes and a template none has 4,000 tokens; 2,000 might."""
    encoded = []
    monkeypatch.setattr(data, "encode_prompt", lambda tokenizer, text, system: encoded.append(text))
    rows = [{"problem": "x" * 300} for _ in range(1000)]
    assert drop_long_prompts(None, rows, "be brief", 4000) == rows and not encoded
    with pytest.raises(TypeError):  # nothing was encoded, so its length is not known
        drop_long_prompts(None, [{"problem": "x" * 2000}], "be brief", 4000)
    assert encoded == ["x" * 2000]


def test_the_embedded_tokenizer_gives_text_back():
    tokenizer = load_tokenizer("tiny")
    text = "17+24=41 check 41-24=17 ok, wait, \\boxed{32}. Compute (a_b)!\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("n, c, k", [
    (4, 1, 1), (4, 1, 2), (5, 2, 3), (6, 0, 3), (6, 6, 2), (4, 3, 4)])
def test_pass_at_k_by_enumeration(n, c, k):
    """The share of all k-subsets of n answers, c of them right, that hold a right one."""
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand():
    """n = 300, c = 1: Pass@1 is 1/300, not 1."""
    assert pass_at_k(300, 1, 1) == pytest.approx(1 / 300)
    for bad in ((4, 5, 1), (4, 1, 5)):
        with pytest.raises((ValueError, ZeroDivisionError)):
            pass_at_k(*bad)


ODD = [5, True, None, "", " ", [], [1, 2], ["a"], [[1]], {"a": 1}, "\ud800", "x\u2028y",
       [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 5}],
       [{"role": "user", "content": "\ud800"}], [{"role": "zzz", "content": "x"}],
       [{"role": "user", "content": [{"text": "hi"}]}]]
ODD_ANSWERS = [*ODD, "7", "\\boxed{" * 500, {"ground_truth": {"x": 1}}, {"ground_truth": "4"}]


@pytest.mark.parametrize("columns", [("problem", "answer"), ("prompt", "reward_model")])
def test_cells_of_any_type(columns, tmp_path, capsys):
    """Whatever JSON can hold in a cell is used, dropped with a count, or refused in one line."""
    tokenizer, path = load_tokenizer("tiny"), tmp_path / "rows.jsonl"
    used = 0
    for cells in itertools.product(ODD, ODD_ANSWERS):
        path.write_text(json.dumps(dict(zip(columns, cells, strict=True))) + "\n")
        try:
            rows = load_problems(str(path))
            used += len(drop_long_prompts(tokenizer, rows, "be brief", 400))
            encode_prompt(tokenizer, rows[0]["problem"], "be brief")
        except BadInput as error:
            assert "\n" not in str(error)
    assert used > 10
