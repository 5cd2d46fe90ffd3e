"""Problems with answers: the embedded arithmetic, another file or a hub dataset -> rows.

A row is a dict with every column of the data, and "problem" and "answer" (the gold) among them.
Which columns those come from is recognised by name and printed; rows that cannot be used are
dropped and counted.
"""
import hashlib
import json
import pathlib
import random
import re
from itertools import islice

from common import verify
from common.flags import BadInput
from common.models import TINY

PROBLEM_COLUMNS = ("problem", "question", "prompt", "query")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model", "ground_truth", "expected_answer",
                  "target", "solution")


def read_rows(name, split):
    """A local file's or a hub dataset's rows as they are: a list or a Dataset of dicts.

    name: arithmetic, a .json, .jsonl or .parquet file, or owner/set[:config[:split]]. Raises
    BadInput.
    """
    path = TINY / f"{split}.jsonl" if name == "arithmetic" else pathlib.Path(name)
    kind = path.suffix.lower()
    try:
        if kind in (".jsonl", ".json"):
            rows = read_json(path)
        elif kind == ".parquet":
            from datasets import Dataset  # slow to import
            from pyarrow import parquet
            with path.open("rb") as file:
                rows = Dataset(parquet.read_table(file))
        elif path.exists() or name.count("/") != 1:
            raise ValueError("give arithmetic, a .jsonl, .json or .parquet file, or a hub id such "
                             "as openai/gsm8k:main")
        else:
            from datasets import load_dataset
            hub_id, config, own_split = (name.split(":") + ["", ""])[:3]
            rows = load_dataset(hub_id, config or None, split=own_split or split)
    except Exception as error:  # no such file, no network, damaged: each library has its own
        raise BadInput(f"{name}: cannot be read, {error}") from error
    if len(rows) == 0:
        raise BadInput(f"{name}: no rows")
    return rows


def read_json(path):
    """A list of objects, or an object per line. ValueError says what is wrong and where."""
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    rows = []
    for number, piece in enumerate([text] if is_list else text.split("\n")):
        try:
            if piece.strip():
                found = json.loads(piece)
                rows += found if is_list else [found]
        except json.JSONDecodeError as error:
            line = number + error.lineno
            raise ValueError(f"line {line} is not JSON: {error.msg}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row must be an object with named columns")
    return rows


def write_whole(path, text):
    """The file is the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def find_column(rows, known, name):
    """The first of the known columns that one of the first rows has, in any case. BadInput."""
    columns = {key.lower(): key for row in islice(rows, 100) for key in row}
    for column in known:
        if column in columns:
            return columns[column]
    raise BadInput(f"{name}: no column is named {' or '.join(known)}; the data has "
                   f"{', '.join(columns)}")


def is_text(x):
    """A string that is not blank, without half a surrogate pair, which JSON can spell."""
    return isinstance(x, str) and x.strip() != "" and not re.search("[\ud800-\udfff]", x)


def is_chat(x):
    """A list of messages, each with a role and a content."""
    return isinstance(x, list) and bool(x) and all(
        isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in x)


def gold_answer(cell):
    """The final answer in a cell: after ####, in the last box, a reward_model's ground_truth, the
    one element of a list, or the whole text; also where these are bytes, or JSON in a text. None
    if there is nothing to compare with."""
    if isinstance(cell, bytes):
        cell = cell.decode(errors="replace")
    if isinstance(cell, str) and cell.startswith(('{"', '["')):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    if isinstance(cell, dict):
        cell = cell.get("ground_truth")
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    if not isinstance(cell, str | int | float) or cell != cell:  # NaN
        return None
    text = str(cell).strip()
    if "####" in text or "\\boxed" in text or "\\fbox" in text:
        text = verify.extract_answer(text) or ""
    return text if verify.parses(text) else None


def load_problems(name, split="train", seed=0, count=None):
    """-> rows with every column of the data, each problem once, `count` of them by the seed.

    "problem" is a text or a list of chat messages, "answer" the gold as text. Raises BadInput
    if no row is usable.
    """
    rows = read_rows(name, split)
    problem_column = find_column(rows, PROBLEM_COLUMNS, name)
    answer_column = find_column(rows, ANSWER_COLUMNS, name)
    kept = {}
    dropped = 0
    for row in rows:
        problem = row.get(problem_column)
        answer = gold_answer(row.get(answer_column))
        has_options = row.get("options") or row.get("choices")
        if answer is None or has_options or not (is_text(problem) or is_chat(problem)):
            dropped += 1
        else:
            kept.setdefault(str(problem), {**row, "problem": problem, "answer": answer})
    print(f"data: {name}: {len(rows)} rows, {dropped} dropped (no problem, no gold that can be "
          f"compared, or multiple choice), {len(rows) - dropped - len(kept)} repeated; "
          f"problem from {problem_column!r}, answer from {answer_column!r}")
    if not kept:
        raise BadInput(f"{name}: no row has both a problem and a usable answer")
    kept = list(kept.values())
    random.Random(f"order {seed}").shuffle(kept)
    return kept[:count]


def load_train_and_eval(args):
    """The training and the evaluation rows of a run; no problem is in both.

    Without --eval-data, `arithmetic` has a part of its own for evaluation, and of other data
    --eval-problems rows, at most a fifth, are set aside.
    """
    train = load_problems(args.data, seed=args.seed)
    if args.eval_data or args.data == "arithmetic":
        held_out = load_problems(args.eval_data or "arithmetic", "test", count=args.eval_problems)
        seen = {str(row["problem"]) for row in held_out}
        train = [row for row in train if str(row["problem"]) not in seen]
    else:
        aside = min(args.eval_problems, len(train) // 5)
        held_out, train = train[:aside], train[aside:]
    if not train:
        raise BadInput(f"--data {args.data}: nothing is left to train on")
    return train, held_out


def fingerprint(train, held_out):
    """A hash of all problems and golds, in their order."""
    text = json.dumps([[row["problem"], row["answer"]] for row in train + held_out])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batch_of(rows, step, size, seed):
    """The `size` rows of step 0, 1, 2, ...: pieces of one shuffled pass after another.

    Depends on its arguments alone, so a resumed run goes on where the data stood.
    """
    epoch, place = divmod(step * size, len(rows))
    passes = []
    while len(passes) < place + size:
        passes += random.Random(f"pass {seed} {epoch}").sample(rows, len(rows))
        epoch += 1
    return passes[place:place + size]


def encode_prompt(tokenizer, problem, system=""):
    """A problem (text or chat messages) -> token ids up to where the assistant begins to write.

    The chat template decides about special tokens, once. Templates that know `enable_thinking`
    (Qwen3's) open the answer with an empty think block. Without a template: the plain text.
    """
    messages = problem
    if isinstance(problem, str):
        messages = [{"role": "user", "content": problem}]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(m["content"] for m in messages) + "\n")["input_ids"]
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # a template is a program: it fails in any way it likes
        raise BadInput("the tokenizer's chat template refuses a problem (is it the system message? "
                       f'--system "" leaves that out): {error}') from error
    return encoded["input_ids"]


def drop_long_prompts(tokenizer, rows, system, longest):
    """The rows whose prompt has at most `longest` tokens; the others are counted in a line.

    A token is at least one byte, so a text of far fewer bytes need not be encoded.
    """
    kept = []
    for row in rows:
        short = 4 * len(json.dumps([row["problem"], system])) < longest
        if short or len(encode_prompt(tokenizer, row["problem"], system)) <= longest:
            kept.append(row)
    if rows and not kept:
        raise BadInput(f"every prompt is longer than the {longest} tokens that --max-new-tokens "
                       "leaves of the model's context")
    if len(kept) < len(rows):
        print(f"data: {len(rows) - len(kept)} of {len(rows)} prompts are longer than {longest} "
              "tokens and were dropped")
    return kept
