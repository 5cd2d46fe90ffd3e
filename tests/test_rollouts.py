"""analysis/rollouts.py: what stands where on the screen, and files that are no rollouts."""
import json

import pytest

from analysis import rollouts


def answer(**changes):
    row = {"step": 1, "problem": "1+1?", "answer": "2", "reward": 1.0, "length": 4,
           "finished": True, "text": "two"}
    return {**row, **changes}


def write(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rollouts.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder)


def show(monkeypatch, capsys, folder, *args, columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    rollouts.main([folder, *args])
    return capsys.readouterr().out


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        rollouts.main(list(args))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1
    return err


def test_two_columns_best_first(tmp_path, monkeypatch, capsys):
    """80 characters: two columns of (80 + 3) // 2 - 3 = 38; the third answer begins a new row."""
    folder = write(
        tmp_path,
        answer(reward=0.0, text="three", length=6, finished=False),
        answer(text="It is two."),
        answer(reward=None, text="?"))
    lines = show(monkeypatch, capsys, folder).splitlines()
    assert lines == [
        "== step 1   gold 2",
        "1+1?",
        "",
        f"{'reward 1, 4 tokens':38} | reward 0, 6 tokens, cut off",
        f"{'It is two.':38} | three",
        "",
        "reward none, 4 tokens",
        "?",
        ""]


def test_a_narrow_terminal_has_one_column(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path, answer(text="a" * 45), answer(text="b", reward=0.0))
    lines = show(monkeypatch, capsys, folder, columns=40).splitlines()
    assert lines[3:] == ["reward 1, 4 tokens", "a" * 40, "a" * 5, "", "reward 0, 4 tokens", "b", ""]


def test_control_characters_are_shown_and_not_sent(tmp_path, monkeypatch, capsys):
    """A colour, a bell, a carriage return, a reversal of the writing direction, half a pair."""
    text = "\x1b[31mred\x07\r\nnext\t\u202eback \udc80"
    folder = write(tmp_path, answer(text=text, problem="\x1b]0;title\x07", answer="\x9b1m\n"))
    out = show(monkeypatch, capsys, folder)
    assert set(out) & set("\x1b\x07\r\t\u202e\x9b\udc80") == set()
    assert "\\x1b[31mred\\x07\\r\n" in out
    assert "next\\t\\u202eback \\udc80" in out
    assert "\\x1b]0;title\\x07" in out
    assert "gold \\x9b1m" in out


def test_step_problem_and_lines(tmp_path, monkeypatch, capsys):
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}]
    folder = write(tmp_path, answer(), answer(problem=chat, text="a\nb\nc"),
                   answer(step=2, problem=chat, text="d"))
    assert show(monkeypatch, capsys, folder).count("== step") == 3
    out = show(monkeypatch, capsys, folder, "--step", "1", "--problem", "2+2", "--lines", "2")
    assert out.splitlines() == ["== step 1   gold 2", "Think. 2+2?", "", "reward 1, 4 tokens", "a",
                                "b", "... 1 more", ""]
    assert "c\n" in show(monkeypatch, capsys, folder, "--lines", "0")
    assert "steps 1 to 2" in refused(capsys, folder, "--step", "3")
    assert "'5+5'" in refused(capsys, folder, "--problem", "5+5")


def test_an_unfinished_last_line_is_left_out(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path, answer())
    with open(tmp_path / "rollouts.jsonl", "a") as file:
        file.write('{"step": 2, "pro')
    assert show(monkeypatch, capsys, folder).count("== step") == 1


@pytest.mark.parametrize("row", [
    "nothing", "[]", "3", "null", "{}", '{"step": 1}', "[" * 100_000,
    answer(reward="1"), answer(text=None), answer(step="1"), answer(length=1.5),
    answer(problem=["x"]), answer(problem=[{}])])
def test_lines_that_are_no_answers(tmp_path, capsys, row):
    assert "line 2" in refused(capsys, write(tmp_path, answer(), row))


def test_no_file_and_nothing_in_it(tmp_path, capsys):
    assert "cannot be read" in refused(capsys, str(tmp_path))
    assert "no answers yet" in refused(capsys, write(tmp_path))
    (tmp_path / "rollouts.jsonl").write_bytes(b"\xff\xfe\n")
    assert "line 1" in refused(capsys, str(tmp_path))
    assert "usage" not in refused(capsys, str(tmp_path), "--step", "x")
