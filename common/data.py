"""Problems with answers: the embedded arithmetic, a local file or a hub dataset -> rows.

A row is a dict with every column of the data, and "problem" and "answer" (the gold) among them.
Which columns those come from is recognised by name and printed; rows that cannot be used are
dropped and counted.
"""
import hashlib
import json
import pathlib
import random
import re

from common import verify
from common.flags import BadInput
from common.tiny.arithmetic import arithmetic_problems

PROBLEM_COLUMNS = ("problem", "question", "prompt", "query")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model", "ground_truth", "expected_answer",
                  "target", "solution")
LETTERS = "ABCDEFGHIJ"


def read_rows(name: str, split: str, flag: str = "--data"):
    """A local file's or a hub dataset's rows as they are: a list or a Dataset of dicts.

    name: a file, or owner/set[:config[:split]]. Raises BadInput, which names the flag.
    """
    path = pathlib.Path(name)
    kind = path.suffix.lower()
    if kind in (".jsonl", ".json", ".parquet"):
        if not path.is_file():
            raise BadInput(f"{flag} {name}: no such file")
        rows = read_dataset(name, split, flag) if kind == ".parquet" else read_json(path, flag)
    elif path.exists() or name.count("/") != 1:
        raise BadInput(f"{flag} {name}: give arithmetic, a .jsonl/.json/.parquet file, or a hub id "
                       "such as openai/gsm8k:main")
    else:
        rows = read_dataset(name, split, flag)
    if len(rows) == 0:
        raise BadInput(f"{flag} {name}: no rows")
    return rows


def read_json(path: pathlib.Path, flag: str) -> list[dict]:
    """A JSON list of objects, one such list under a "data" key, or an object per line."""
    line = 0
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        pieces = text.split("\n")  # splitlines cuts at U+2028 too
        if path.suffix.lower() == ".json" and json_inside(text.strip().split("\n")[0]) is None:
            pieces = [text]  # one value over many lines
        for piece in pieces:
            line += 1
            if piece.strip():
                rows.append(json.loads(piece))
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise BadInput(f"{flag} {path}: not JSON, line {line}: {error.msg}") from error
    except (ValueError, RecursionError, OSError) as error:
        raise BadInput(f"{flag} {path}: cannot be read as UTF-8 JSON, {error}") from error
    if len(rows) == 1 and isinstance(rows[0], dict):
        under_data = rows[0].get("data")
        rows = under_data if isinstance(under_data, list) else rows
    elif len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    if not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{flag} {path}: every row must be an object with named columns")
    return rows


def read_dataset(name: str, split: str, flag: str):
    """A parquet file or a hub dataset -> a Dataset, which reads a row when it is asked for."""
    from datasets import Dataset, load_dataset  # slow to import
    from pyarrow import parquet
    hub_id, config, own_split = (name.split(":") + ["", ""])[:3]
    try:
        if pathlib.Path(name).is_file():
            return Dataset(parquet.read_table(name))
        return load_dataset(hub_id, config or None, split=own_split or split)
    except Exception as error:  # no network, no such set or split, a damaged file
        reason = str(error).splitlines()[0][:300]
        raise BadInput(f"{flag} {name}: cannot be read, {reason}") from error


def write_whole(path: pathlib.Path, text: str) -> None:
    """The file is the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def find_column(rows, known: tuple[str, ...], what: str, place: str) -> str:
    """The first known column that any of the first rows has, whatever its capitals. BadInput."""
    columns = {}
    for row in list(rows[:100] if isinstance(rows, list) else rows.take(min(100, len(rows)))):
        columns.update({name.lower(): name for name in row})
    for name in known:
        if name in columns:
            return columns[name]
    raise BadInput(f"{place}: no column with the {what}; the data has {', '.join(columns.values())}"
                   f"; rename one to {' or '.join(known[:2])}")


def has_encoding(x) -> bool:
    """A string, and none with half of a surrogate pair, which JSON can spell."""
    return isinstance(x, str) and not re.search("[\ud800-\udfff]", x)


def is_text(x) -> bool:
    """A string that is not blank."""
    return has_encoding(x) and bool(x.strip())


def is_chat(x) -> bool:
    """A list of messages whose role and content are strings."""
    return isinstance(x, list) and bool(x) and all(
        isinstance(m, dict) and is_text(m.get("role")) and has_encoding(m.get("content"))
        for m in x)


def json_inside(text: str):
    """What a text spells if it is a JSON object or list, else None: [0, 1) and {1, 2} are not."""
    if text.strip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def gold_answer(value) -> str | None:
    """The final answer in a cell: after ####, in the last box, a reward_model's ground_truth, the
    one element of a list, or the whole text. None if there is nothing to compare with."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    inner = json_inside(value) if isinstance(value, str) else value
    if isinstance(inner, dict) and "ground_truth" in inner:
        return gold_answer(inner["ground_truth"])
    if isinstance(inner, (list, tuple)) and len(inner) == 1:
        return gold_answer(inner[0])
    if isinstance(value, (dict, list, tuple)):
        return None
    if value is None or value != value:  # NaN
        return None
    text = str(value).strip()
    if "####" in text:
        text = text.rsplit("####", 1)[1].strip()
    elif "\\boxed" in text or "\\fbox" in text:
        text = verify.extract_answer(text) or ""
    return text if verify.parses(text) else None


def with_options(row: dict, problem: str, answer):
    """Multiple choice (MMLU, MMLU-Pro): lettered options go into the problem, the gold is a letter.

    -> problem, answer; both as they were for other data.
    """
    options = row.get("options") or row.get("choices")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        return problem, answer
    place = row.get("answer_index", answer)
    if isinstance(place, int) and 0 <= place < len(options):
        answer = LETTERS[place]
    if answer not in list(LETTERS[:len(options)]):
        return problem, answer
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    lettered = "\n".join(lines)
    return f"{problem}\n\n{lettered}\n\nAnswer with the letter of the right option.", answer


def load_problems(name: str, split: str = "train", held_out: bool = False, seed: int = 0,
                  count: int | None = None, flag: str = "--data") -> list[dict]:
    """-> rows with every column of the data, each problem once, `count` of them by the seed.

    "problem" is a text or a list of chat messages, "answer" the gold as text. held_out takes the
    evaluation part of `arithmetic`; other data has none. Raises BadInput, which names the flag, if
    no row is usable.
    """
    if name == "arithmetic":
        return arithmetic_problems(2048 if count is None else count, held_out, seed)
    rows = read_rows(name, split, flag)
    problem_column = find_column(rows, PROBLEM_COLUMNS, "problem", f"{flag} {name}")
    answer_column = find_column(rows, ANSWER_COLUMNS, "gold answer", f"{flag} {name}")
    kept = {}
    dropped = 0
    for row in rows:
        problem, answer = row.get(problem_column), row.get(answer_column)
        if isinstance(problem, str):
            problem, answer = with_options(row, problem, answer)
        answer = gold_answer(answer)
        if answer is None or not (is_text(problem) or is_chat(problem)):
            dropped += 1
        else:
            kept.setdefault(json.dumps(problem), {**row, "problem": problem, "answer": answer})
    print(f"data: {name}: problem from {problem_column!r}, answer from {answer_column!r}; "
          f"{len(rows)} rows, {dropped} dropped (no problem, or a gold that cannot be compared), "
          f"{len(rows) - dropped - len(kept)} repeated")
    if not kept:
        raise BadInput(f"{flag} {name}: no row has both a problem and a usable answer")
    kept = list(kept.values())
    random.Random(f"order {seed}").shuffle(kept)
    return kept[:count]


def load_train_and_eval(args) -> tuple[list[dict], list[dict]]:
    """The training and the evaluation rows of a run; no problem is in both.

    Without --eval-data, `arithmetic` has a part of its own for evaluation, and of other data
    --eval-problems rows, at most a fifth, are set aside.
    """
    train = load_problems(args.data, seed=args.seed)
    if args.eval_data or args.data == "arithmetic":
        held_out = load_problems(args.eval_data or "arithmetic", "test", held_out=True,
                                 count=args.eval_problems, flag="--eval-data")
        seen = {json.dumps(row["problem"]) for row in held_out}
        train = [row for row in train if json.dumps(row["problem"]) not in seen]
    else:
        aside = min(args.eval_problems, len(train) // 5)
        held_out, train = train[:aside], train[aside:]
    if not train:
        raise BadInput(f"--data {args.data}: nothing is left to train on")
    return train, held_out


def fingerprint(train: list[dict], held_out: list[dict]) -> str:
    """A hash of all problems and golds, in their order."""
    rows = [[row["problem"], row["answer"]] for row in [*train, *held_out]]
    text = json.dumps([len(train), rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def batch_of(rows: list, step: int, size: int, seed: int) -> list:
    """The `size` rows of step 0, 1, 2, ...: pieces of one shuffled pass after another.

    Depends on its arguments alone, so a resumed run goes on where the data stood.
    """
    batch = []
    orders = {}
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(rows))
        if epoch not in orders:
            rng = random.Random(f"pass {seed} {epoch}")
            orders[epoch] = rng.sample(range(len(rows)), len(rows))
        batch.append(rows[orders[epoch][place]])
    return batch


def encode_prompt(tokenizer, problem: str | list[dict], system: str = "") -> list[int]:
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
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            enable_thinking=False)
    except Exception as error:  # a template is a program: it fails in any way it likes
        hint = '; --system "" leaves the system message out' if system else ""
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise BadInput(f"the tokenizer's chat template refuses {str(messages)[:200]}: "
                       f"{reason}{hint}") from error
    return list(encoded["input_ids"])


def drop_long_prompts(tokenizer, rows: list[dict], system: str, longest: int) -> list[dict]:
    """The rows whose prompt has at most `longest` tokens; the others are counted in a line.

    A token has a byte or more, so only texts of many bytes are encoded to find out.
    """
    if longest < 1:
        raise BadInput("--max-new-tokens leaves the model's context no room for a prompt: lower it "
                       f"by {1 - longest} or more")
    kept = []
    for row in rows:
        short = 2 * len(json.dumps(row["problem"])) + 2 * len(system) + 200 < longest
        if short or len(encode_prompt(tokenizer, row["problem"], system)) <= longest:
            kept.append(row)
    if len(kept) < len(rows):
        print(f"data: {len(rows) - len(kept)} of {len(rows)} prompts are longer than {longest} "
              "tokens and were dropped")
    if rows and not kept:
        raise BadInput(f"every prompt is longer than {longest} tokens, what the context leaves "
                       "beside --max-new-tokens")
    return kept
