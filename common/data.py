"""Problems with answers: the embedded arithmetic, a local .jsonl/.json/.parquet, or a hub dataset -> rows {"problem", "answer"}.

Columns are recognised by name; what was taken is printed with the first pair, what had to be dropped is counted. Recognised as
well are the four benchmarks of the long chain-of-thought paper, from the hub or a file with their columns:
  MATH-500   HuggingFaceH4/MATH-500                                problem, answer
  AIME 2024  HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024        problem, answer or Problem, Answer; --split train
  TheoremQA  TIGER-Lab/TheoremQA                                   Question, Answer, Answer_type
  MMLU-Pro   TIGER-Lab/MMLU-Pro                                    question, options, answer, answer_index; the paper takes 1,000
"""
import json
import pathlib
import random
import re

import jinja2
from tqdm import tqdm

from common import verify
from common.arithmetic import arithmetic_problems
from common.errors import BadInput

PROBLEM_COLUMNS = ("problem", "question", "prompt", "query")
ANSWER_COLUMNS = ("answer", "final_answer", "reward_model", "ground_truth", "expected_answer", "solution")
LETTERS = "ABCDEFGHIJ"
ASK_FOR = {  # TheoremQA: what an answer of this type must look like to be compared; numbers need no such line
    "bool": "Answer True or False.",
    "option": "Answer with the letter of the option, such as (a).",
    "list of integer": "Answer with a list in square brackets, such as [1, 2].",
    "list of float": "Answer with a list in square brackets, such as [0.5, 2].",
}


def is_text(x) -> bool:
    """A string that has an encoding: JSON can spell half of a surrogate pair."""
    return isinstance(x, str) and not re.search("[\ud800-\udfff]", x)


def is_chat(x) -> bool:
    """A list of messages, role and content of each a text."""
    return isinstance(x, list) and bool(x) and all(
        isinstance(m, dict) and is_text(m.get("role")) and is_text(m.get("content")) for m in x)


def is_problem(x) -> bool:
    """A text that is not blank, or a chat."""
    return is_chat(x) or is_text(x) and bool(x.strip())


def read_rows(name: str, split: str, flag: str = "--data"):
    """A local file's or a hub dataset's rows as they are, a list or a Dataset of dicts. `owner/set:config` names a hub
    configuration. Raises BadInput, which names the flag."""
    path = pathlib.Path(name)
    if path.suffix in (".jsonl", ".json", ".parquet"):
        if not path.is_file():
            raise BadInput(f"{flag} {name}: no such file")
        if path.suffix == ".parquet":
            from datasets import Dataset  # slow to import and only needed here and for the hub
            try:
                return Dataset.from_parquet(str(path), keep_in_memory=True)
            except Exception as error:  # pyarrow and datasets raise their own
                raise BadInput(f"{flag} {name}: not parquet, {str(error).splitlines()[0][:200]}") from error
        try:
            text = path.read_text(encoding="utf-8")
            rows = json.loads(text) if path.suffix == ".json" and text.lstrip()[:1] == "[" else [
                json.loads(line) for line in text.split("\n") if line.strip()]  # splitlines would cut at U+2028 too
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
            raise BadInput(f"{flag} {name}: not JSON, {error}") from error
        if not all(isinstance(row, dict) for row in rows):
            raise BadInput(f"{flag} {name}: every row must be an object with named columns")
        return rows
    if path.exists() or name.count("/") != 1:
        raise BadInput(f"{flag} {name}: give {'arithmetic, ' * (flag == '--data')}a .jsonl/.json/.parquet file, or a hub id "
                       "such as openai/gsm8k:main")
    from datasets import load_dataset
    hub_id, _, config = name.partition(":")
    try:
        return load_dataset(hub_id, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # datasets' own errors for a missing set, config or split, or no network
        raise BadInput(f"{flag} {name} (split {split}): {str(error).splitlines()[0][:300]}") from error


def pick_column(row: dict, wanted: str | None, known: tuple[str, ...], flag: str) -> str:
    """The column to use: the one asked for, else the first known one, whatever its capitals."""
    by_lower = {name.lower(): name for name in row}
    for name in [wanted.lower()] if wanted else known:
        if name in by_lower:
            return by_lower[name]
    raise BadInput(f"no {wanted or ' / '.join(known)} column, the data has: {', '.join(row)} (choose one with {flag})")


def gold_answer(value) -> str:
    """The final answer in an answer or solution cell: after ####, in the last box, reward_model's ground_truth, or all of it."""
    if isinstance(value, dict):
        value = value.get("ground_truth", "")
    if isinstance(value, (list, tuple)):
        value = value[0] if len(value) == 1 else ""
    text = "" if value is None else str(value)
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    boxed = verify.extract_answer(text) if "\\boxed" in text or "\\fbox" in text else None
    return boxed if boxed is not None else text.strip()


def written_out(row: dict, problem, answer) -> tuple:
    """Puts into the problem what MMLU-Pro and TheoremQA keep in other columns: the lettered options, the form of the answer.

    row: its columns in lower case. -> (problem, answer), as they were for other data. MMLU-Pro's gold is the letter. TheoremQA's
    floats are compared as exactly as all others here (its own scorer allows a margin), lists with their order.
    """
    options, place, kind = row.get("options"), row.get("answer_index"), row.get("answer_type")
    if isinstance(options, list) and len(options) <= len(LETTERS):
        gold = LETTERS[place] if isinstance(place, int) and 0 <= place < len(options) else answer
        if gold in list(LETTERS[:len(options)]):
            lettered = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options) if option != "N/A")
            return f"{problem}\n\n{lettered}\n\nAnswer with the letter of the right option.", gold
    if kind is not None:
        return "\n".join(filter(None, (problem, ASK_FOR.get(kind)))), str(answer)
    return problem, answer


def load_problems(name: str, split: str = "train", prompt_column: str | None = None, answer_column: str | None = None,
                  held_out: bool = False, seed: int = 0, count: int | None = None) -> list[dict]:
    """-> rows {"problem": text or chat messages, "answer": text}, each problem once; `count` of them, drawn by the seed.

    held_out takes the evaluation part of `arithmetic`; other data has none. Raises BadInput when nothing usable is left.
    """
    if name == "arithmetic":
        return arithmetic_problems(2048 if count is None else count, held_out, seed)
    rows = read_rows(name, split)
    if not len(rows):
        raise BadInput(f"--data {name}: no rows")
    problem_key = pick_column(rows[0], prompt_column, PROBLEM_COLUMNS, "--prompt-column")
    answer_key = pick_column(rows[0], answer_column, ANSWER_COLUMNS, "--answer-column")
    if hasattr(rows, "select_columns"):  # a hub set may carry whole solutions along
        rows = rows.select_columns([column for column in rows.column_names if column in (problem_key, answer_key)
                                    or column.lower() in ("options", "answer_index", "answer_type")])
    kept, dropped = {}, 0
    for row in rows:
        problem, answer = row.get(problem_key), row.get(answer_key)
        if isinstance(problem, str):
            problem, answer = written_out({name.lower(): value for name, value in row.items()}, problem, answer)
        answer = gold_answer(answer)
        if is_problem(problem) and verify.parses(answer):
            kept.setdefault(json.dumps(problem), {"problem": problem, "answer": answer})
        else:
            dropped += 1
    print(f"data: {name}: problem from {problem_key!r}, answer from {answer_key!r}; {len(rows)} rows, {dropped} dropped "
          f"(no problem, or an answer that cannot be compared), {len(rows) - dropped - len(kept)} repeated")
    if not kept:
        raise BadInput(f"--data {name}: no row has both a problem in {problem_key!r} and a usable answer in {answer_key!r}")
    kept = list(kept.values())
    random.Random(f"order {seed}").shuffle(kept)
    print(f"      first pair: {str(kept[0]['problem'])[:160]!r} -> {kept[0]['answer']!r}")
    return kept[:count]


def load_train_and_eval(cfg) -> tuple[list[dict], list[dict]]:
    """The training and the evaluation problems of a run (cfg: its flags); no problem is in both.

    Without --eval-data, `arithmetic` has a part of its own for evaluation, and from other data --eval-problems rows, at most
    a fifth, are set aside before training.
    """
    columns = dict(prompt_column=cfg.prompt_column, answer_column=cfg.answer_column)
    train = load_problems(cfg.data, cfg.split, seed=cfg.seed, **columns)
    if cfg.eval_data or cfg.data == "arithmetic":
        eval_data = cfg.eval_data or "arithmetic"
        held_out = load_problems(eval_data, cfg.eval_split, held_out=True, count=cfg.eval_problems, **columns)
        seen = {json.dumps(row["problem"]) for row in held_out}
        train = [row for row in train if json.dumps(row["problem"]) not in seen]
    else:
        size = min(cfg.eval_problems, len(train) // 5)
        held_out, train = train[:size], train[size:]
    if not train:
        raise BadInput(f"--data {cfg.data}: nothing left to train on after the evaluation problems were set aside")
    return train, held_out


def batch_of(rows: list, step: int, size: int, seed: int) -> list:
    """The `size` rows of step 0, 1, 2, ...: consecutive pieces of one shuffled pass over the data after another.

    Depends on its arguments alone, so a resumed run goes on where the data stood.
    """
    batch, orders = [], {}
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(rows))
        if epoch not in orders:
            orders[epoch] = random.Random(f"pass {seed} {epoch}").sample(range(len(rows)), len(rows))
        batch.append(rows[orders[epoch][place]])
    return batch


def encode_prompt(tokenizer, problem: str | list[dict], system: str = "", thinking: bool = False) -> list[int]:
    """A problem (text, or a list of chat messages, then used as it is) -> token ids up to where the assistant begins to write.

    The chat template decides about special tokens, once: no second start token. Templates that know `enable_thinking`
    (Qwen3's) are told; without thinking they open the answer with an empty think block. A tokenizer without a template gets
    the plain text.
    """
    messages = problem if isinstance(problem, list) else [{"role": "user", "content": str(problem)}]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(m["content"] for m in messages) + "\n")["input_ids"]
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                                enable_thinking=thinking)
    except jinja2.TemplateError as error:  # an unknown role, two turns of one speaker, a system message where there is none
        raise BadInput(f"the tokenizer's chat template refuses {str(messages)[:200]}: {str(error)[:200]}") from error
    return list(encoded["input_ids"])


def encode_prompts(tokenizer, rows: list[dict], system: str, thinking: bool, longest: int) -> list[dict]:
    """Adds "prompt", the token ids, to every row; drops rows whose prompt is longer than `longest` tokens, with a count."""
    if longest < 1:
        raise BadInput(f"--max-new-tokens: lower it by {1 - longest} or more, it leaves the model's context no room for a prompt")
    encoded = [{**row, "prompt": encode_prompt(tokenizer, row["problem"], system, thinking)}
               for row in tqdm(rows, desc="encoding prompts", leave=False, disable=len(rows) < 10_000)]
    kept = [row for row in encoded if len(row["prompt"]) <= longest]
    if len(kept) < len(encoded):
        print(f"data: {len(encoded) - len(kept)} of {len(encoded)} prompts are longer than {longest} tokens and were dropped")
    if encoded and not kept:
        raise BadInput(f"every prompt is longer than {longest} tokens, what the model's context leaves beside --max-new-tokens")
    return kept
