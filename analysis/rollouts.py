"""What a model wrote while it was trained: a run's rollouts.jsonl, step by step.

    python -m analysis.rollouts runs/grpo
    python -m analysis.rollouts runs/grpo --step 8 --problem 17+37 --lines 0

Answers to one problem stand side by side, the best first, each below its reward and its length; as
many as the terminal is wide. Control characters are shown as \\x1b and never reach the terminal.
"""
import itertools
import json
import os
import pathlib
import shutil
import sys
import textwrap

from common.flags import BadInput, exit_on_bad_input, new_parser

KINDS = {"step": int, "problem": (str, list), "reward": (int, float, type(None)),
         "length": int, "finished": bool, "text": str}
NARROWEST = 36  # characters of a column


def visible(text: str) -> str:
    """What a terminal would act on becomes an escape; line breaks stay."""
    shown = []
    for character in text:
        harmless = character.isprintable() or character == "\n"
        shown.append(character if harmless else ascii(character)[1:-1])
    return "".join(shown)


def read_rollouts(folder: str) -> list[dict]:
    """The rows of rollouts.jsonl, chats as text; an unfinished last line is left out. BadInput."""
    path = pathlib.Path(folder) / "rollouts.jsonl"
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            for name, kind in KINDS.items():
                if not isinstance(row[name], kind):
                    raise TypeError(f"{name!r} is a {type(row[name]).__name__}")
            if isinstance(row["problem"], list):
                row["problem"] = "\n".join(str(message["content"]) for message in row["problem"])
            rows.append(row)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        place = f"{path}, line {len(rows) + 1}"
        raise BadInput(f"{place}: no answer of a run, {type(error).__name__}: {error}") from error
    if not rows:
        raise BadInput(f"{path}: no answers yet")
    return rows


def cell(row: dict, width: int, lines: int) -> list[str]:
    """An answer as lines of at most `width` characters; at most `lines` of its text, 0: all."""
    reward = "none" if row["reward"] is None else f"{row['reward']:.4g}"
    head = f"reward {reward}, {row['length']} tokens{'' if row['finished'] else ', cut off'}"
    wrapped = []
    for line in visible(row["text"]).split("\n"):
        wrapped += textwrap.wrap(line, width, drop_whitespace=False) or [""]
    if 0 < lines < len(wrapped):
        wrapped[lines:] = [f"... {len(wrapped) - lines} more"]
    return [head, *wrapped]


def side_by_side(rows: list[dict], width: int, lines: int) -> list[str]:
    count = max(1, min(len(rows), (width + 3) // (NARROWEST + 3)))
    each = max(8, (width + 3) // count - 3)
    cells = [cell(row, each, lines) for row in rows]
    shown = []
    for start in range(0, len(cells), count):
        for parts in itertools.zip_longest(*cells[start:start + count], fillvalue=""):
            shown.append(" | ".join(f"{part:{each}}" for part in parts).rstrip())
        shown.append("")
    return shown


def report(rows: list[dict], width: int, lines: int) -> str:
    groups = {}
    for row in rows:
        groups.setdefault((row["step"], row["problem"]), []).append(row)
    shown = []
    for (step, problem), answers in groups.items():
        gold = visible(str(answers[0].get("answer"))).replace("\n", " ")
        shown.append(f"== step {step}   gold {gold}")
        shown += textwrap.wrap(visible(problem), width)
        answers.sort(key=lambda row: -(row["reward"] or 0))
        shown += ["", *side_by_side(answers, width, lines)]
    return "\n".join(shown)


@exit_on_bad_input()
def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--step", type=int, help="this step alone")
    parser.add_argument("--problem", default="", help="problems that contain this text")
    parser.add_argument("--lines", type=int, default=12, help="of an answer; 0: all [12]")
    args = parser.parse_args(argv)
    rows = read_rollouts(args.run)
    if args.step is not None:
        steps = sorted({row["step"] for row in rows})
        rows = [row for row in rows if row["step"] == args.step]
        if not rows:
            raise BadInput(f"--step {args.step}: answers are of steps {steps[0]} to {steps[-1]}")
    rows = [row for row in rows if args.problem in row["problem"]]
    if not rows:
        raise BadInput(f"--problem {args.problem!r}: in none of the problems")
    try:
        print(report(rows, shutil.get_terminal_size((100, 24)).columns, args.lines), flush=True)
    except BrokenPipeError:  # of a pager that was left, or head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
