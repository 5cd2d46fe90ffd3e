r"""Answer verifier: does the final answer of a response equal the gold answer?

verify(text, gold) -> 0.0 or 1.0; extract_answer and equivalent are its two halves. Policy:
1. Values count, not spellings: 0.5 = \frac12 = 1/2, 0.\overline{3} = 1/3. A rounded decimal of a
   value that does not end is wrong. A percent sign is ignored: 28\% is 28 and not 0.28.
2. A number (or x = number) as gold wants the work done: one root, power, fraction or function
   value, but no sum or product of numbers except 3 \times 10^8, no 84/2 for 42, no e^{\ln 5}.
   Where the gold keeps such a form (1+\sqrt2, 2^{10}-1), so may the answer. 2x = 4 is not x = 2.
3. Units and currencies are ignored where one side has none; two known and different ones differ.
   "5 million" is 5000000.
4. Tuples keep their order, intervals their ends, numerals their base; lists and sets have no order.
   \pm is two values. x < 1 or x > 2 is (-\infty,1) \cup (2,\infty), a column vector a tuple.
5. A leading `x =` is ignored; other equations are equal side by side, in either order.
6. Text ignores case and articles; letters of a text do not commute. A choice is its letter.
7. The last box is the answer, boxes side by side are one list, text up to </think> does not count.
   Without a box the last "answer is" or the like counts; without that, nothing does: 0.

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
    r"(?:(?!\n\n)[\s$,;&]|\\[()]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|and|or|[A-Za-z]\s*=)*+")
DRAFT = re.compile(r"(?s)^.*</think>|<think>.*|<\|\w+\|>|</s>")
PHRASE = re.compile(
    r"(?i)####|<answer>|\b(?:answers?|ans|correct (?:option|choice))\b[^\n.?]{0,40}?"
    r"(?:\b(?:is|are|be|equals)\b|:|=)(?!\s*(?:clear|correct|right|wrong|helpful|useful|not\b))"
    r"|^[#*_ ]*(?:final )?answers?[*_ ]*:?[*_ ]*\n", re.MULTILINE)
CONTENT = re.compile(r"(?s:\\\[(.+?)\\\]|\$\$(.+?)\$\$)|(.+?)(?:</answer>|[.!]\**\s|\n|$)")

LIST = re.compile(r"\d{3}(?:, ?\d{3})+")  # 100,200 may be a list


def extract_answer(text: str) -> str | None:
    """The last group of boxes, else what a phrase announces; None without it. Never raises."""
    tail = DRAFT.sub("", text[-MAX_TAIL:]) if isinstance(text, str) else ""
    boxes = boxed(tail)
    if boxes:
        return ", ".join(dict.fromkeys(boxes)) if all(boxes) else None
    answer = None
    for phrase in list(PHRASE.finditer(tail))[-10:]:
        found = CONTENT.match(tail[phrase.end():][:math.MAX_CHARS].lstrip(" \t\r\n:*_`"))
        if found:
            answer = found[found.lastindex].strip(" *_`\t\r\n").rstrip(" *_`.")
    return re.sub(r"^(?:therefore|thus|hence|simply|just)\b\s*", "", answer or "") or None


def boxed(text):
    """The contents of the last boxes that stand side by side; "" for one that is never closed."""
    found, end = [], 0
    for box in BOX.finditer(text):
        if not GLUE.fullmatch(text, end, box.start()):
            found = []
        content, end = (box[1] or box[2] or "").strip(), box.end()
        inner = BOX.fullmatch(content)
        found.append(inner[1] or "" if inner else content)
    return found


def equivalent(answer: str, gold: str) -> bool:
    """Whether two answers (without the box) are equal under the policy. Never raises."""
    answer, gold = str(answer), str(gold)
    if max(len(answer), len(gold)) > math.MAX_CHARS:
        return answer.strip() == gold.strip()
    if LIST.fullmatch(answer) and answer.replace(" ", "") == gold.replace(" ", ""):
        return True
    a, g = math.normalize(answer), math.normalize(gold)
    if math.too_large(a) or math.too_large(g):
        return math.squeezed(a) == math.squeezed(g)
    letter, rest = math.choice(a)
    gold_letter, gold_rest = math.choice(g)
    if letter and gold_letter and (letter != gold_letter or not rest or not gold_rest):
        return letter == gold_letter
    return same(rest or a, gold_rest or g)


def same(a, g):
    """Whether normalized answers are equal: as strings, as text, by structure, then by value."""
    if not a or not g or math.squeezed(a) == math.squeezed(g):
        return bool(a and g)
    if math.is_text(a) or math.is_text(g):
        return math.plain(a) == math.plain(g)
    if re.search(r'"|[A-Za-z]{4}|(?i:[ap]\.?m)', a) and math.words(a) == math.words(g):
        return True
    if "(" in (a[0], g[0]) and not re.search(r"\( ?⟦", a + g):
        a, g = math.as_tuple(a), math.as_tuple(g)
    if bool(re.search("[∨∧]", a)) != bool(re.search("[∨∧]", g)):
        a, g = math.stated(a) or a, math.stated(g) or g
    left, right = math.items(a), math.items(g)
    if len(left) == len(right) == 1:
        return same_single(left[0], right[0])
    if len(left) == 1:
        return same(math.stated(a), g)
    if len(right) == 1:
        return same(a, math.stated(g))
    a_signs, g_signs = [math.split(x, ",∪∨∧")[1] for x in (a, g)]
    if math.INEQUALITY.search(a + g) and a_signs != g_signs:
        return False
    for x in left:  # the members of two lists, in any order
        match = next((y for y in right if same(x, y)), None)
        if match is None:
            return False
        right.remove(match)
    return not right


def same_single(a, g):
    """Whether two relations, matrices, ratios, tuples, intervals or values are equal."""
    equal = math.same_relation(a, g, same)
    if equal is not None:
        return equal
    a_kind, a_parts = math.parts(a)
    g_kind, g_parts = math.parts(g)
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
