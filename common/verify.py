r"""Answer verifier: does the final answer of a response equal the gold answer?

verify(text, gold) -> 0.0 or 1.0; extract_answer and equivalent are its two halves. Policy:
1. Values count, not spellings: 0.5 = \frac12. A rounded decimal of a value that does not end is
   wrong. A percent sign is ignored: 28\% is 28 and not 0.28.
2. Where gold is a number, no work may be left: no sum, product or whole quotient of numbers, no
   rational root, factorial or binomial, no e^{\ln 5}; but 3 \times 10^8, 2^{10} (not 4^5) and one
   logarithm or sine. Where gold leaves work (2^{10}-1, 5!), so may the answer. 2x=4 is not x=2.
3. Units and currencies are ignored where one side has none; two different ones differ.
4. Tuples keep their order, intervals their ends, numerals their base; lists and sets have no order.
   \pm is two values. x < 1 or x > 2 is (-\infty,1) \cup (2,\infty), a column vector a tuple.
5. A leading `x =` is ignored. Other equations are equal side by side, in either order; those in
   several variables also if one is a multiple of the other.
6. Text ignores case and articles; letters of a text do not commute. A choice is its letter.
7. The last box is the answer, boxes side by side are one list, text up to </think> does not count.
   Without a box the last "answer is", #### or bold last word counts; without that, nothing: 0.

The text comes from a model that is trained to please this function, so nothing is executed, every
size is bounded, and what cannot be computed only matches as a string.
"""
import re

from common import mathequal as math

MAX_TAIL = 20_000  # characters of a response that are searched
GROUP = ""
for _ in range(12):  # braces nested this deep; an escaped one does not count
    GROUP = rf"(?:[^{{}}\\]|\\.|\{{{GROUP}\}})*+"
BOX = re.compile(
    rf"(?s)\\(?:boxed|fbox|framebox)\s*(?:\{{({GROUP})\}}|\{{|([-+]?\d[\d.,]*\b|[A-Za-z]\b))")
GLUE = re.compile(  # between boxes that are one list: x=\boxed{1}$ or $x=\boxed{2}
    r"(?:(?!\n\n)[\s$,;&]|\\[()]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|and|or"
    r"|[A-Za-z](?:_\{?\w\}?)?\s*=)*+")
DRAFT = re.compile(r"(?s)^.*</think>|<think>.*|<\|\w+\|>|</s>")
PHRASE = re.compile(
    r"(?i)####|<answer>|(?<![a-z])(?:answers?|ans|correct (?:option|choice))\b"
    r"(?:(?!not\b|n't)[^\n.?]){0,40}?(?:\b(?:is|are|be|equals)\b|:|=)"
    r"(?!\s*(?:clear|correct|right|wrong|helpful|useful|not\b))"
    r"(?:\s+(?:therefore|thus|hence|indeed|simply|just)\b)?"
    r"|^[#*_ ]*(?:final )?answers?[*_ ]*:?[*_ ]*\n|^ *\*{2,3}(?=[^\s*]+\*+\s*\Z)", re.MULTILINE)
CONTENT = re.compile(r"(?s:\\\[(.+?)\\\]|\$\$(.+?)\$\$)|(.+?)(?:</answer>|[.!]\**\s|\n|$)")


def extract_answer(text: str) -> str | None:
    """The last group of boxes, else what a phrase announces; None without it. Never raises."""
    tail = DRAFT.sub("", text[-MAX_TAIL:]) if isinstance(text, str) else ""
    boxes, end = [], 0
    for box in BOX.finditer(tail):  # "" for one that is never closed
        if not GLUE.fullmatch(tail, end, box.start()):
            boxes = []
        boxes.append((box[1] or box[2] or "").strip())
        end = box.end()
    if boxes:
        return ", ".join(dict.fromkeys(boxes)) if all(boxes) else None
    answer = ""
    for phrase in list(PHRASE.finditer(tail))[-10:]:
        found = CONTENT.match(tail[phrase.end():][:math.MAX_CHARS].lstrip(" \t\r\n:*_`"))
        if found:
            answer = found[found.lastindex].strip(" *_`\t\r\n").rstrip(" *_`.")
    return answer or None


def equivalent(answer: str, gold: str) -> bool:
    """Whether two answers (without the box) are equal under the policy. Never raises."""
    answer, gold = str(answer), str(gold)
    if max(len(answer), len(gold)) > math.MAX_CHARS:
        return answer.strip() == gold.strip()
    a, g = math.normalize(answer), math.normalize(gold)
    letter, rest = math.choice(a)
    gold_letter, gold_rest = math.choice(g)
    if letter and gold_letter and (letter != gold_letter or not rest or not gold_rest):
        return letter == gold_letter
    return same(rest or a, gold_rest or g)


def same(a, g):
    """Whether normalized answers are equal: as strings, as text, as lists, then one by one."""
    equal = math.same_text(a, g) if a and g else False
    if equal is not None:
        return equal
    left, right = math.items(a), math.items(g)
    if len(left) == len(right) == 1:
        return same_single(left[0], right[0])
    if math.same_lists(a, g, same):
        return True
    said = math.stated(a) or a, math.stated(g) or g  # x \in \{1, 2\}, x < 1 or x > 2
    return said != (a, g) and same(*said)


def same_single(a, g):
    """Whether two relations, matrices, ratios, tuples, intervals or values are equal."""
    equal = math.same_relation(a, g, same)
    if equal is not None:
        return equal
    (a_kind, a_parts), (g_kind, g_parts) = math.parts(a), math.parts(g)
    if a_kind != g_kind or len(a_parts) != len(g_parts):
        return False
    return all(map(same, a_parts, g_parts)) if a_kind else math.same_value(a, g)


def verify(text: str, gold: str) -> float:
    """1.0 if the final answer of a response equals the gold answer, else 0.0. Never raises."""
    answer = extract_answer(text)
    known = answer is not None and isinstance(gold, str | int | float)
    return float(known and equivalent(answer, gold))


reward = verify


def parses(gold: str) -> bool:
    """Whether a gold answer can be compared at all: not empty, not too long. Never raises."""
    return len(str(gold)) <= math.MAX_CHARS and bool(math.normalize(str(gold)))
