"""Traces, problems with a worked answer to learn from: sampled into a file that survives a kill, read, counted, encoded.

A file of sampled traces has a row a problem, also when none of its answers was kept:
    {"problem", "answer", "completions": [kept, ...], "sampled", "finished", "right", "agrees", "settings"}
"""
import hashlib
import json
import os
import pathlib
import random
import statistics

import torch

from common.checkpoints import writing
from common.data import encode_prompt, is_chat, is_problem, is_text, read_rows
from common.distributed import rank
from common.errors import BadInput
from common.sampling import Rollout

SCHEMAS = (("messages",), ("prompt", "completion"), ("problem", "completions"))


def noisy_labels(problems: list[dict], share: float, seed: int) -> list[dict]:
    """The rows with "answer", a whole number, off by 1, 2 or 10 in about `share` of them, which by seed and problem."""
    noisy = []
    for row in problems:
        rng = random.Random(f"label {seed} {row['problem']}")
        wrong = rng.random() < share
        noisy.append({**row, "answer": str(int(row["answer"]) + rng.choice((-10, -2, -1, 1, 2, 10)))} if wrong else row)
    return noisy


def judge(row: dict, texts: list[str | None], right: list[bool], keep: str, agree: bool, settings: str) -> dict:
    """A problem's line in the file of traces. texts: its answers, None where one did not end; right: which match the label.

    keep "verified" takes the right ones, "all" every one that ended; with agree, none if neither of the first two is right.
    """
    agrees = any(right[:2])
    kept = [text for text, ok in zip(texts, right) if text is not None and (ok or keep == "all") and (agrees or not agree)]
    return {"problem": row["problem"], "answer": row["answer"], "completions": list(dict.fromkeys(kept)), "sampled": len(texts),
            "finished": sum(text is not None for text in texts), "right": sum(right), "agrees": agrees, "settings": settings}


def fingerprint(settings: dict) -> str:
    """What the traces in a file depend on, in eight characters."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def read_sampled(path: pathlib.Path, problems: list[dict], settings: str) -> list[bytes]:
    """The whole lines of a file that sampling has left, [] if there is none; one that was cut short has no end and is dropped.

    BadInput if they are not of these problems, in this order and with these settings.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
        same = all(row["settings"] == settings and row["problem"] == problem["problem"] for row, problem in zip(rows, problems))
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise BadInput(f"{path}: not traces of these problems sampled with these flags (teacher, style, samples, seed, ...); "
                       "take another --traces-out, or train on it with --traces")
    return lines[:len(problems)]


def collect(path: pathlib.Path, lines: list[bytes], problems: list[dict], size: int, draw):
    """Yields a row a problem: those of `lines`, then new ones, appended `size` problems at a time.

    draw(first, problems) -> their rows. A piece that was cut short is drawn again as a whole, with the same random numbers, so
    that the file is to the byte that of an uninterrupted run.
    """
    if len(lines) < len(problems):
        lines = lines[:len(lines) - len(lines) % size]
    yield from map(json.loads, lines)
    if len(lines) == len(problems):
        return
    if rank() == 0:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, sum(len(line) + 1 for line in lines))
    for first in range(len(lines), len(problems), size):
        rows = draw(first, problems[first:first + size])
        if rank() == 0:
            with writing(path.parent), open(path, "ab") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
                file.flush()
                os.fsync(file.fileno())
        yield from rows


def load_traces(name: str, split: str) -> list[dict]:
    """A file or hub dataset with `messages`, with `prompt` + `completion`, or sampled here -> rows {"problem", "completion"}.

    Prompts and completions are texts or lists of chat messages; of `messages` the last must be the assistant's, and it alone is
    learnt. Rows without text are dropped, with a count. Raises BadInput for no rows, other columns, or nothing usable.
    """
    rows = read_rows(name, split, "--traces")
    if not len(rows):
        raise BadInput(f"--traces {name}: no rows")
    columns = next((columns for columns in SCHEMAS if set(columns) <= set(rows[0])), None)
    if columns is None:
        raise BadInput(f"--traces {name}: needs a column messages, or prompt and completion; it has: {', '.join(rows[0])}")
    traces = []
    for row in rows:
        if columns == ("messages",):
            *asked, said = row["messages"] if is_chat(row.get("messages")) else [{}]
            pairs = [(asked, said["content"] if said.get("role") == "assistant" else None)]
        else:
            problem, found = row.get(columns[0]), row.get(columns[1])
            pairs = [(problem, text) for text in (found if columns[1] == "completions" and isinstance(found, list) else [found])]
        traces += [{"problem": problem, "completion": text[-1]["content"] if is_chat(text) else text} for problem, text in pairs]
    good = [t for t in traces if is_problem(t["problem"]) and is_text(t["completion"]) and t["completion"].strip()]
    print(f"traces: {name}: {len(rows)} rows, {' + '.join(columns)}; dropped: {len(traces) - len(good)} without prompt or answer")
    if not good:
        raise BadInput(f"--traces {name}: no row has both a prompt and an answer of the assistant")
    return good


def question(problem: str | list[dict]) -> str:
    """The text of a problem, or of the last message if it is a chat."""
    return problem if isinstance(problem, str) else problem[-1]["content"]


def encode_traces(tokenizer, traces: list[dict], system: str, thinking: bool, context: int, held_out: set[str]) -> list[dict]:
    """-> rows {"prompt", "response"} of token ids, the stop token at the end; each pair of problem and completion once.

    Dropped, with a count: repeated ones, those of a held-out question, and those longer than the context, which are never cut.
    """
    unique = {json.dumps([trace["problem"], trace["completion"]]): trace for trace in traces}.values()
    allowed = [trace for trace in unique if question(trace["problem"]) not in held_out]
    rows = [{"prompt": encode_prompt(tokenizer, trace["problem"], system, thinking),
             "response": tokenizer(trace["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]}
            for trace in allowed]
    kept = [row for row in rows if len(row["prompt"]) + len(row["response"]) <= context]
    print(f"traces: {len(kept)} to train on; dropped: {len(traces) - len(unique)} repeated, {len(unique) - len(allowed)} of "
          f"held-out problems, {len(rows) - len(kept)} longer than the context of {context} tokens")
    if not kept:
        raise BadInput(f"none of the {len(traces)} traces is left to train on: see the counts above")
    return kept


def as_rollout(rows: list[dict], device) -> Rollout:
    """Encoded traces -> what the sampler hands over, so that the same functions serve. Log-probs and entropies are zero."""
    lengths = torch.tensor([len(row["response"]) for row in rows], device=device)                           # (B,)
    T = max(1, int(lengths.max()))
    tokens = torch.tensor([row["response"] + [0] * (T - len(row["response"])) for row in rows], device=device)  # (B, T)
    mask = (torch.arange(T, device=device) < lengths[:, None]).float()                                      # (B, T)
    return Rollout([row["prompt"] for row in rows], tokens, lengths, mask, mask * 0, mask * 0, lengths > 0, [""] * len(rows))


def histogram(lengths: list[int], bins: int = 8) -> dict[str, int]:
    """{"from-to": how many}, in `bins` equal steps from the shortest to the longest (tokens)."""
    low, width = min(lengths), (max(lengths) - min(lengths)) // bins + 1
    counts = [sum(low + i * width <= length < low + (i + 1) * width for length in lengths) for i in range(bins)]
    return {f"{low + i * width}-{low + (i + 1) * width - 1}": count for i, count in enumerate(counts)}


def describe_lengths(rows: list[dict]) -> dict:
    """Statistics of encoded traces: how many, their tokens (stop token included), the histogram of lengths."""
    lengths = [len(row["response"]) for row in rows]
    return {"traces": len(rows), "tokens": sum(lengths), "mean_length": statistics.fmean(lengths),
            "median_length": statistics.median(lengths), "longest": max(lengths), "histogram": histogram(lengths)}
