r"""Answer verifier: does the final answer of a response equal the gold answer?

verify(text, gold) -> 0.0 or 1.0; extract_answer and equivalent are its two halves.

Policy.
1. Values are equal, not spellings: 0.5 = \frac12 = 1/2. A rounded decimal of a value that does not
   end is wrong. A percent sign is ignored: 28\% is 28 and not 0.28.
2. A plain number (or x = number) as gold wants the work done: a number, a fraction, one root, power
   or function value; no sum, difference or product of numbers, except 3 \times 10^8. Where the gold
   keeps such a form (1+\sqrt2, 2^{10}-1), so may the answer. x = 2 is not 2x = 4.
3. Units and currencies are ignored where one side has none; two known and different ones differ.
   "5 million" is 5000000.
4. Tuples keep their order, intervals their ends, numerals their base; lists and sets have no order.
   \pm is two values, two of them are four. "or" is a union, "and" a condition more.
5. A leading `x =` is ignored; other equations are equal when one is a multiple of the other.
6. Text ignores case and articles; letters of a text do not commute. A choice is its letter.
7. The last box is the answer, boxes side by side are one list, text up to </think> does not count.
   Without a box the last "answer is" or the like counts; without that, nothing does: 0.

The text comes from a model that is trained to please this function, so nothing is executed, every
size is bounded, and what cannot be computed only matches as a string.

    python -m common.verify pairs.jsonl   # rows text (pred), gold, right (expect): accuracy, speed
"""
import json
import re
import sys
import time
from collections import Counter

from common.mathequal import (
    MAX_CHARS,
    MAX_DEPTH,
    MAX_ITEMS,
    as_tuple,
    brackets_of,
    choice,
    close,
    inside,
    is_text,
    items,
    normalize,
    parse,
    plain,
    points,
    region,
    same_relation,
    says,
    scaled,
    split,
    squeezed,
    value,
    worked,
)

MAX_TAIL = 20_000  # characters of a response that are searched
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|([-+]?\d[\d.,]*\b|[A-Za-z]\b))")
GLUE = re.compile(
    r"(?:[\s$,;&]|\\[()]|\\\\|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|and|or|[a-z]\s*=)*")
DRAFT = re.compile(r"(?s)^.*</think>|<think>.*|<\|\w+\|>|</s>")
PHRASE = re.compile(
    r"(?i)####|<answer>|\banswers?\b[^\n.]{0,40}?(?:\bis\b|\bare\b|:|=)(?!\s*(?:clear|correct|right"
    r"|wrong|helpful|useful|not\b))|^[#*_ ]*(?:final )?answers?[*_ ]*:?[*_ ]*\n", re.MULTILINE)
LIST = re.compile(r"\d{3}(?:, ?\d{3})+")
CONTENT = re.compile(r"(?s:\\\[(.+?)\\\]|\$\$(.+?)\$\$)|(.+?)(?:</answer>|[.!]\**\s|\n|$)")


def extract_answer(text: str) -> str | None:
    """The final answer in a response: its last box, or the last group of boxes, else a phrase.

    None if there is no answer, or if the last box is empty or never closed. Never raises.
    """
    tail = DRAFT.sub("", str(text)[-MAX_TAIL:])
    boxes = boxed(tail)
    if boxes:
        return ", ".join(dict.fromkeys(boxes)) if all(boxes) else None
    answer = None
    for phrase in list(PHRASE.finditer(tail))[-10:]:
        found = CONTENT.match(tail[phrase.end():][:MAX_CHARS].lstrip(" \t\r\n:*_`"))
        if found:
            answer = found[found.lastindex].strip(" *_`\t\r\n").rstrip(" *_`.")
            answer = re.sub(r"^(?:therefore|thus|hence|simply|just)\b\s*", "", answer) or None
    return answer


def boxed(text: str) -> list[str]:
    """The contents of the last boxes that stand side by side; "" for one that is never closed."""
    found, last = [], None
    for box in BOX.finditer(text):
        if last is not None and box.start() < last:  # a box within a box
            continue
        if last is None or "\n\n" in text[last:box.start()] or not glued(text[last:box.start()]):
            found = []
        last, content = box.end(), box[2] or ""
        if box[1]:
            depth = 1
            for m in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, last):
                depth += {"{": 1, "}": -1}.get(m[0], 0)  # "\\." steps over \{ and \}
                if depth == 0:
                    content, last = text[last:m.start()], m.end()
                    break
            else:
                last = len(text)
        inner = re.fullmatch(r"\s*\\boxed\s*\{(.*)\}\s*", content, re.DOTALL)
        found.append((inner[1] if inner else content).strip())
    return found


def glued(text: str) -> bool:
    return len(text) < 60 and bool(GLUE.fullmatch(text))


def equivalent(answer: str, gold: str) -> bool:
    """Whether two answers (without the box) are equal under the policy. Never raises."""
    answer, gold = str(answer), str(gold)
    if max(len(answer), len(gold)) > MAX_CHARS:
        return answer.strip() == gold.strip()
    if LIST.fullmatch(answer) and answer.replace(" ", "") == gold.replace(" ", ""):
        return True  # 100,200 may be a list
    a, g = normalize(answer), normalize(gold)
    if not a or not g or squeezed(a) == squeezed(g):
        return bool(a and g)
    if max(map(brackets_of, (a, g))) > MAX_DEPTH or max(map(len, map(items, (a, g)))) > MAX_ITEMS:
        return False
    (letter, rest), (gold_letter, gold_rest) = choice(a), choice(g)
    if letter and gold_letter:
        return letter == gold_letter and (not rest or not gold_rest or same(rest, gold_rest))
    if (rest and same(rest, g)) or (gold_rest and same(a, gold_rest)):
        return True
    return same(a, g)


def same(a: str, g: str) -> bool:
    """Whether normalized answers are equal: as strings, as text, by structure, then by value."""
    if squeezed(a) == squeezed(g):
        return True
    if is_text(a) or is_text(g):
        return plain(a) == plain(g)
    if not a or not g:
        return False
    a, g = region(scaled(a)), region(scaled(g))
    if as_pairs(a, g):
        return True
    left, right = items(a), items(g)
    if len(left) > 1 and len(right) == 1:
        return says(g) not in ("", g) and same(a, says(g))
    if len(right) > 1 and len(left) == 1:
        return says(a) not in ("", a) and same(says(a), g)
    if len(left) != 1 or len(right) != 1:
        return same_members(left, right)
    (a,), (g,) = left, right
    relation = same_relation(a, g, same)
    if relation is not None:
        return relation
    a, g = inside(a, "⟦") or a, inside(g, "⟦") or g  # the rows of a matrix
    for brackets, separator in (("", "¦"), ("", "&"), ("", ":"), ("([", ",")):
        contents = [inside(s, brackets) or "" if brackets else s for s in (a, g)]
        (a_parts, found), (g_parts, g_found) = (split(s, separator) for s in contents)
        if found or g_found:
            ends = not brackets or a[0] + a[-1] == g[0] + g[-1]
            return ends and found == g_found and all(map(same, a_parts, g_parts))
    return same_value(a, g)


def as_pairs(a: str, g: str) -> bool:
    """x = 3, y = 4, or a column vector, against (3,4)."""
    pair = as_tuple(a), as_tuple(g)
    return pair != (a, g) and all(inside(s, "(") for s in pair) and same(*pair)


def same_members(left: list[str], right: list[str]) -> bool:
    """Whether two lists have the same members in any order."""
    right = list(right)
    if len(left) != len(right):
        return False
    for x in left:
        match = next((k for k, y in enumerate(right) if same(x, y)), None)
        if match is None:
            return False
        del right[match]
    return True


def same_value(a: str, g: str) -> bool:
    """Whether two expressions have one value at every point, the same unit, and no work left.

    Letters after a space are read as variables first, then as a unit.
    """
    as_units = parse(a, True), parse(g, True)
    if all(as_units) and not worked(as_units[0][0], as_units[1][0]):
        return False  # 5*11 cm for 55 cm, which is worked out as a product of variables
    for units in (False, True):
        answer, gold = parse(a, units), parse(g, units)
        if answer is None or gold is None or not worked(answer[0], gold[0]):
            continue
        if answer[1] and gold[1] and answer[1] != gold[1]:
            continue
        pairs = [(value(answer[0], p), value(gold[0], p)) for p in points(answer[0], gold[0])]
        seen = [close(x, y) for x, y in pairs if x is not None and y is not None]
        if len(seen) >= min(2, len(pairs)) and all(seen):
            return True
    return False


def verify(text: str, gold: str) -> float:
    """1.0 if the final answer of a response equals the gold answer, else 0.0. Never raises."""
    answer = extract_answer(text)
    return float(answer is not None and equivalent(answer, gold))


reward = verify


def parses(gold: str) -> bool:
    """Whether a gold answer can be compared at all: not empty, not too long. Never raises."""
    return len(str(gold)) <= MAX_CHARS and bool(normalize(str(gold)))


def main(path: str = "") -> None:
    """Print accuracy and speed on labelled rows; a row whose label is null is left out."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for row in rows:
            row["text"] = row["text"] if "text" in row else row["pred"]
            row["right"] = row["right"] if "right" in row else row["expect"]
        rows = [row for row in rows if row["right"] is not None]
        wanted = [(row["text"], row["gold"], bool(row["right"])) for row in rows]
        if not rows:
            raise ValueError("no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"error: {path or 'pairs.jsonl'}: give a file of rows text, gold, right ({error})"
        print(message, file=sys.stderr)
        raise SystemExit(2) from None
    start = time.perf_counter()
    found = [verify(text, gold) == 1 for text, gold, _ in wanted]
    rate = len(rows) / (time.perf_counter() - start)
    kinds = [row.get("kind", "") for row in rows]
    outcomes = list(zip(kinds, found, [right for *_, right in wanted], strict=True))
    accepted = Counter(kind for kind, yes, right in outcomes if yes and not right)
    refused = Counter(kind for kind, yes, right in outcomes if right and not yes)
    share = 1 - (accepted.total() + refused.total()) / len(rows)
    print(f"{len(rows)} pairs, {rate:.0f} per second, {share:.2%} right; "
          f"wrongly accepted {accepted.total()}, wrongly refused {refused.total()}")
    for kind in sorted({*accepted, *refused}):
        print(f"  {kind or 'all'}: of {kinds.count(kind)}, wrongly accepted {accepted[kind]}, "
              f"wrongly refused {refused[kind]}")


if __name__ == "__main__":
    main(*sys.argv[1:2])


verify = reward
