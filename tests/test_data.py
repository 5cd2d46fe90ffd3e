"""Data: schemas of the usual sets, the split of the embedded task, order, prompts; and how accuracy is estimated."""
import itertools
import json
import random

import pytest
from conftest import byte_level_tokenizer
from datasets import Dataset

from common.arithmetic import LARGEST, arithmetic_problems, is_held_out, make_problem, solve
from common.data import batch_of, encode_prompt, encode_prompts, gold_answer, load_problems, load_train_and_eval
from common.errors import BadInput
from common.evaluate import pass_at_k
from common.models import load_tokenizer
from common.traces import encode_traces, load_traces


@pytest.mark.parametrize("row, problem, answer", [
    ({"problem": "1+1?", "answer": "2"}, "1+1?", "2"),                                                # MATH-500, AIME, DAPO
    ({"question": "1+1?", "answer": "One and one.\n#### 2"}, "1+1?", "2"),                            # GSM8K
    ({"question": "1+1?", "answer": "So\n#### 1,234"}, "1+1?", "1,234"),
    ({"question": "1+1?", "final_answer": "2", "difficulty": 1.0, "r1_solution_1": "..."}, "1+1?", "2"),  # DeepMath-103K
    ({"problem": "1+1?", "level": "1", "solution": "It is $\\boxed{\\frac{4}{2}}$."}, "1+1?", "\\frac{4}{2}"),  # MATH
    ({"Problem": "1+1?", "Answer": 2}, "1+1?", "2"),                                                  # capitals, numbers
    ({"data_source": "x", "prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2", "style": "rule"}},
     [{"role": "user", "content": "1+1?"}], "2"),                                                     # DAPO-Math-17k
])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_schemas(row, problem, answer, kind, tmp_path, capsys):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        Dataset.from_list([row]).to_parquet(path)
    else:
        path.write_text(json.dumps([row]) if kind == "json" else json.dumps(row) + "\n\n")
    assert load_problems(str(path)) == [{"problem": problem, "answer": answer}]
    said = capsys.readouterr().out
    assert "problem from" in said and repr(answer) in said


def test_columns_can_be_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"problem": "no", "answer": "no", "ask": "1+1?", "gold": "2"}))
    assert load_problems(str(path), prompt_column="ask", answer_column="gold") == [{"problem": "1+1?", "answer": "2"}]


def test_useless_rows_are_dropped_and_counted(tmp_path, capsys):
    """Of five rows: no gold, no problem, one twice."""
    rows = [{"problem": "a", "answer": "1"}, {"problem": "a", "answer": "1"}, {"problem": "b", "answer": ""}, {"problem": "", "answer": "1"},
            {"problem": "c", "answer": "3"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert sorted(row["problem"] for row in load_problems(str(path))) == ["a", "c"]
    assert "5 rows, 2 dropped" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, message", [
    ("missing.jsonl", None, "no such file"),
    ("empty.jsonl", "", "no rows"),
    ("broken.jsonl", '{"problem": "a"', "not JSON"),
    ("list.jsonl", "[1, 2]\n", "object"),
    ("columns.jsonl", '{"text": "a", "label": "b"}', "no problem / question / prompt / query column, the data has: text, label"),
    ("answer.jsonl", '{"problem": "a", "label": "b"}', "--answer-column"),
    ("gold.jsonl", '{"problem": "a", "answer": ""}', "usable answer"),
    ("nonsense", None, "hub id"),
])
def test_bad_data(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=message):
        load_problems(str(path))


@pytest.mark.parametrize("cell, answer", [
    ("a\n#### 5", "5"), ("so \\boxed{3} and \\boxed{4}", "4"), ({"ground_truth": "7"}, "7"), (["8"], "8"), (9, "9"), (None, ""), (" 1 ", "1")])
def test_gold_answer(cell, answer):
    assert gold_answer(cell) == answer


def test_solve_by_hand():
    """17+4*6-9: 4*6=24, 17+24=41, 41-9=32. 20-5+3: from the left, 15 then 18."""
    assert solve([17, 4, 6, 9], list("+*-")) == [(4, "*", 6, 24), (17, "+", 24, 41), (41, "-", 9, 32)]
    assert solve([20, 5, 3], list("-+")) == [(20, "-", 5, 15), (15, "+", 3, 18)]


def test_arithmetic_halves_are_disjoint():
    """Whatever the seeds; every answer is right and in range."""
    train, held_out = ({row["problem"] for seed in range(3) for row in arithmetic_problems(800, half, seed)} for half in (False, True))
    assert not train & held_out and all(map(is_held_out, held_out)) and not any(map(is_held_out, train))
    rng = random.Random(0)
    for _ in range(200):
        problem, numbers, operators = make_problem(rng, held_out=False)
        expression = problem.removeprefix("Compute ").removesuffix(".")
        assert "".join(f"{n}{o}" for n, o in zip(numbers, [*operators, ""])) == expression
        value = solve(numbers, operators)[-1][3]
        terms = [t for t in expression.replace("-", "+-").split("+")]                   # an independent way to the value
        assert value == sum((-1 if t[0] == "-" else 1) * eval_product(t.lstrip("-")) for t in terms) and 0 <= value <= LARGEST


def eval_product(term: str) -> int:
    result = 1
    for factor in term.split("*"):
        result *= int(factor)
    return result


def test_evaluation_problems_are_set_aside(tmp_path):
    """Without --eval-data a fifth at most goes to evaluation, and none of it is trained on."""
    from argparse import Namespace
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"p{i}", "answer": str(i)}) for i in range(20)))
    cfg = Namespace(data=str(path), eval_data=None, split="train", eval_split="test", prompt_column=None, answer_column=None, seed=0, eval_problems=128)
    train, held_out = load_train_and_eval(cfg)
    assert len(train) == 16 and len(held_out) == 4 and not {r["problem"] for r in train} & {r["problem"] for r in held_out}


def test_batches_cover_every_pass_once():
    """10 rows in batches of 4: five batches are two passes, each row twice; the same step gives the same batch."""
    rows = list(range(10))
    seen = [row for step in range(5) for row in batch_of(rows, step, 4, seed=1)]
    assert sorted(seen[:10]) == rows and sorted(seen[10:]) == rows and seen[:10] != seen[10:]
    assert batch_of(rows, 3, 4, seed=1) == seen[12:16] and batch_of(rows, 0, 4, seed=2) != seen[:4]
    assert len(batch_of(rows, 0, 25, seed=1)) == 25


def test_prompts():
    """System message, user, then the assistant's turn is open; thinking off closes a think block; chat lists are used as they are."""
    tokenizer = byte_level_tokenizer()
    text = lambda *args, **kwargs: tokenizer.decode(encode_prompt(tokenizer, *args, **kwargs))
    assert text("2+2?", "Be brief.") == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
                                         "<think>\n\n</think>\n\n")
    assert text("2+2?", thinking=True) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert "Be brief" not in text([{"role": "system", "content": "Mine."}, {"role": "user", "content": "2+2?"}], "Be brief.")
    tokenizer.chat_template = None
    assert text("2+2?", "Be brief.") == "Be brief.\n2+2?\n"


def test_long_prompts_are_dropped_not_cut(capsys):
    tokenizer, rows = byte_level_tokenizer(), [{"problem": "1", "answer": "1"}, {"problem": "x" * 400, "answer": "1"}]
    assert [row["problem"] for row in encode_prompts(tokenizer, rows, "", False, 100)] == ["1"]
    assert "1 of 2 prompts" in capsys.readouterr().out
    with pytest.raises(BadInput, match="longer than 3 tokens"):
        encode_prompts(tokenizer, rows, "", False, 3)


def test_the_embedded_tokenizer_gives_text_back():
    tokenizer = load_tokenizer("tiny")
    text = "17+24=41 check 41-24=17 ok, wait, \\boxed{32}. Compute (a_b)!\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2


@pytest.mark.parametrize("n, c, k", [(4, 1, 1), (4, 1, 2), (5, 2, 3), (6, 0, 3), (6, 6, 2), (4, 3, 4)])
def test_pass_at_k_by_enumeration(n, c, k):
    """The share of all k-subsets of n answers, c of them right, that hold a right one."""
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_by_hand():
    """n = 300, c = 1: Pass@1 is 1/300, not 1."""
    assert pass_at_k(300, 1, 1) == pytest.approx(1 / 300)
    for bad in ((4, 5, 1), (4, 1, 5), (4, -1, 1), (4, 1, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


ODD = [5, True, None, "", " ", [], [1, 2], ["a"], [[1]], {"a": 1}, [{"role": "user"}], [{"content": "x"}], "\ud800", "x\u2028y",
       [{"role": "user", "content": 5}], [{"role": "zzz", "content": "x"}], [{"role": "user", "content": [{"text": "hi"}]}]]


@pytest.mark.parametrize("columns", [("problem", "answer"), ("prompt", "completion"), ("problem", "completions"), ("messages",)])
def test_cells_of_any_type(columns, tmp_path):
    """Whatever JSON can hold in a cell is used, dropped with a count, or refused in one line."""
    tokenizer, path = load_tokenizer("tiny"), tmp_path / "rows.jsonl"
    for problem in ODD:
        for answer in [*ODD, "7", "\\boxed{" * 500, {"ground_truth": {"x": 1}}, {"ground_truth": "4"}]:
            chat = [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
            for row in [dict(zip(columns, (problem, answer)))] if len(columns) > 1 else [{"messages": problem}, {"messages": chat}]:
                path.write_text(json.dumps(row) + "\n")
                try:
                    if columns[-1] == "answer":
                        encode_prompts(tokenizer, load_problems(str(path)), "be brief", False, 400)
                    else:
                        encode_traces(tokenizer, load_traces(str(path), "train"), "be brief", False, 400, {"x"})
                except BadInput as error:
                    assert "\n" not in str(error)
