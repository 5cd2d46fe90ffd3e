r"""Answer verifier: does the final answer of a response equal the gold answer?  reward(text, gold) -> 0.0 or 1.0

Policy. Answers are equal when their values are: 0.5 = \frac12 = 1/2, but a rounded decimal of a non-terminating value is wrong,
and so is a number off by a factor of 100. Tuple order, interval ends and a base subscript matter; lists and sets have no order;
\pm stands for two values; a trailing unit, degree, percent or currency sign and a leading `x =` are ignored; equations are equal
when one is a multiple of the other; text ignores case. The last \boxed{} is the answer; a response without an answer earns 0.

Design, in the order of this file. Extraction: response -> answer. Normalization: one spelling for each symbol. Values: a small
operator-precedence grammar computes an expression, exactly as a Fraction or else with mpmath to 50 digits; a variable gets fixed
pseudo-random values. Equality: as strings, as text, by structure (list, tuple, matrix, relation), then by relative difference.

What it refuses. No eval, and none of sympy's string parsers, which call eval: the text comes from a model that is trained to
please this function. No simplify, signals, threads or timeouts either: every size is bounded (see MAX_), so nothing is slow.
What the grammar does not know (\sum, \int, set builders, a^b^c) and what is over a limit can only match as a string.

    python -m common.verify pairs.jsonl        # rows {"pred": ..., "gold": ..., "expect": ...} -> accuracy and speed
"""
from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import mpmath

MAX_TAIL, MAX_CHARS = 20_000, 1_500                       # characters of a response that are searched, of an answer
MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 400, 30, 30            # of an answer; list items are compared pair by pair
MAX_BITS, MAX_LOG, MAX_FACTORIAL = 20_000, 10**5, 5_000   # of exact numbers; |log| of a power and |argument| of a function

mp = mpmath.mp.clone()        # our own context: the caller's precision stays as it is
mp.dps = 50
TOLERANCE = mp.mpf("1e-20")   # relative difference of equal values
ROUNDING = mp.mpf("1e-35")    # a result this small next to its terms is a zero that rounding hides

# ---------------------------------------------------------------------------------------------------------------- extraction
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
PHRASE = re.compile(r"####|<answer>|\banswers?\b[^\n.]{0,40}?(?:\bis\b|\bare\b|:|=)", re.IGNORECASE)
AFTER_PHRASE = re.compile(r"(?s:\\\[(.+?)\\\]|\$\$(.+?)\$\$)|(.+?)(?:</answer>|\.\s|\n|$)")


def extract_answer(text: str) -> str | None:
    """The final answer in a response: the content of the last box, else what follows the last "answer is" or the like.

    None if there is no answer, or if the last box is empty or never closed. Never raises.
    """
    tail = text[-MAX_TAIL:]
    if boxes := list(BOX.finditer(tail)):
        start, depth = boxes[-1].end(), 1
        for m in re.finditer(r"\\.|[{}]", tail[start:], re.DOTALL):   # "\\." steps over \{ and \}
            depth += {"{": 1, "}": -1}.get(m[0], 0)
            if depth == 0:
                return tail[start:start + m.start()].strip() or None
    elif phrases := list(PHRASE.finditer(tail)):
        if found := AFTER_PHRASE.match(tail[phrases[-1].end():].lstrip(" \t\r\n:*")):
            return found[found.lastindex].strip(" *\t\r\n").removesuffix(".") or None
    return None


# ------------------------------------------------------------------------------------------------------------- normalization
GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega").split()))
UNICODE = str.maketrans({letter: f"\\{name} " for letter, name in GREEK.items()} | {
    "√": r"\sqrt ", "∞": r"\infty ", "∅": r"\emptyset ", "½": r"\frac12 ", "¼": r"\frac14 ", "¾": r"\frac34 ",
    "ℝ": r"\mathbb{R}", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "−": "-", "–": "-", "’": "'", "′": "'",
    "€": "", "£": "", '"': "", "~": " "})
SYNONYMS = {old: new for new, olds in {
    "*": "cdot times ast", "/": "div", "≤": "le leq leqslant", "≥": "ge geq geqslant", "<": "lt", ">": "gt", "≠": "ne neq",
    "≈": "approx", "∈": "in", "∪": "cup", "±": "pm", "∓": "mp", "°": "degree degrees circ", "|": "vert lvert rvert", "'": "prime",
    "⦃": "lbrace", "⦄": "rbrace", r"\emptyset ": "varnothing", r"\frac": "dfrac tfrac cfrac", r"\binom": "dbinom tbinom",
    r"\epsilon ": "varepsilon", r"\phi ": "varphi", r"\theta ": "vartheta",
    r"\text": "mbox textbf textit textrm textsf textnormal mathrm mathbf mathit mathsf operatorname boldsymbol bm",
    " ": "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits quad qquad space vec",
}.items() for old in olds.split()}


def mixed(m: re.Match) -> str:
    whole, top, bottom = (group for group in m.groups() if group)
    return f"({whole}+{top}/{bottom})" if int(top) < int(bottom) else m[0]


REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\\\\(?:\[[\w. ]*\])?\s*(\\end)?", lambda m: m[1] or "¦"),                # the end of a matrix row
    (r"\\begin\s*\{(?:[pb]?matrix|smallmatrix|array)\}(?:\s*\{[clr| ]*\})?", "⟦"), (r"\\end\s*\{\w*\}", "⟧"),
    (r"\\(?:left|right)\s*\.", ""),
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ |,\\,)\s*(?=\d{3}(?!\d))", ""),              # 10{,}000  10,\!000  10\,000
    (r"\\[,;:> ]", " "), (r"\\[!()\[\]$%]|[$%]", ""), (r"\\\{", "⦃"), (r"\\\}", "⦄"),
    (r"\\(?:math(?:rm|bf|it|sf)|operatorname|boldsymbol|bm|vec)\s*\{\s*(\w|\\[A-Za-z]+)\s*\}", r" \1 "),
    (r"\\([A-Za-z]+)", lambda m: SYNONYMS.get(m[1], m[0])),
    (r"\^\s*\{?\s*°\s*\}?(?:\s*(?:\\text\s*\{\s*)?[CF]\b\}?)?", "°"),
    (r"\^\s*\{?\s*('+)\s*\}?", r"\1"),                                          # y^{\prime} is y'
    (r"\\text\s*\{([^{}]*)\}", r'"\1"'), (r'^\s*"([^"]*)"\s*$', r"\1"),
    (r',?\s*(?:"[\s,]*(?:and|or)\s*"|\b(?:and|or)\b)|;', ","),
    (r"\\mathbb\s*\{R\}(?!\s*[_^])", r"(-\\infty ,\\infty )"),
    (r"\\((?:d?dot|(?:wide)?hat|(?:wide)?tilde|bar|math(?:bb|cal|frak))\b|(?<![\d.]\\)overline)\s*\{", r"\\\1_{"),
    (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"\*\*", "^"), (r"\b(?:np|math)\.(?=[a-z])", ""), (r"\s+", " "),
    (r"(?<!\d)(\d*)\.(\d*) ?\\overline ?\{(\d+)\}",                             # 0.1\overline{6} is 0.1 + 6/90
     lambda m: f"({m[1]}.{m[2]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"(?<![\w.^}])(\d+) ?(?:\\frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))|(?<= )(\d+) ?/ ?(\d+))", mixed),
]]


def normalize(s: str) -> str:
    """One spelling for each symbol; no layout, currency, percent signs or thousands separators."""
    s = re.sub(r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{{{m[0]}}}", " ".join(s.split())).translate(UNICODE)
    folded = unicodedata.normalize("NFKC", s)
    s = folded.translate(UNICODE) if len(folded) <= 2 * MAX_CHARS else s   # one character can become 18
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    s = s.lstrip(" ,:").rstrip(" ,:.")
    separators = "[ ]" if re.search(r"[(\[⦃]", s) else "[ ,]"   # inside brackets 1,234 is two items
    return re.sub(rf"(?<![\d.,])\d{{1,3}}(?:{separators}\d{{3}})+(?![\d,])", lambda m: re.sub("[ ,]", "", m[0]), s)


# -------------------------------------------------------------------------------------------------------------------- values
Number = Fraction | mpmath.mpf | mpmath.mpc
CONSTANTS = {"e": +mp.e, "i": mp.mpc(0, 1), r"\pi": +mp.pi, r"\infty": mp.inf}
FUNCTIONS = {"sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh, "exp": mp.exp,
             "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.ln, "log": mp.ln,
             "cot": lambda x: 1 / mp.tan(x), "sec": lambda x: 1 / mp.cos(x), "csc": lambda x: 1 / mp.sin(x)}
WORDS = {*FUNCTIONS, "pi", "sqrt", "infty"}
NAMES = {"\\" + name for name in [*GREEK.values(), *(
    "ell hbar aleph odot dot ddot hat widehat bar tilde widetilde overline mathbb mathcal mathfrak".split())] if name != "pi"}
UNITS = set("cm mm km kg mg ml mL ft in lb lbs oz mph hr hrs yd sq per deg usd USD".split())
OPENING, CLOSING = "([{⦃⟦", ")]}⦄⟧"
TOKEN = re.compile(r"""(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)? | _\s*(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|\d+|\w)
    | "[^"]*" | \\?[A-Za-z]+ | \\. | \S""", re.VERBOSE | re.ASCII)
SUM, PRODUCT, POWER, END = 1, 2, 3, " "   # how tightly operators bind
BINDING = {"+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER, "!": POWER, "°": POWER}


def tokenize(s: str) -> list[str]:
    r"""Numbers, single letters and \macros with their subscripts and primes, text after an opening quote, other characters."""
    tokens: list[str] = []
    for m in TOKEN.finditer(s):
        word = m[0].strip('"')
        if m[0][0] in "_'" and tokens:
            tokens[-1] += re.sub(r"[{}\s]", "", word)
        elif word in WORDS:
            tokens.append("\\" + word)
        elif word != m[0] or (word.isalpha() and tokens and (word in UNITS or (len(word) > 3 and s[m.start() - 1] == " "))):
            tokens.append('"' + word)
        else:
            tokens += word if word.isalpha() else [word]
    if len(tokens) > MAX_TOKENS:
        raise ValueError
    return tokens


def is_number(token: str) -> bool:
    return bool(re.match(r"\.?\d[^_]*$", token))


def inexact(x: Number) -> mpmath.mpf | mpmath.mpc:
    return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def bits(x: Number) -> float:
    return x.numerator.bit_length() + x.denominator.bit_length() if isinstance(x, Fraction) else math.inf


def plus(x: Number, y: Number) -> Number:
    if bits(x) + bits(y) <= MAX_BITS:
        return x + y
    x, y = inexact(x), inexact(y)
    return x + y if not abs(x + y) < ROUNDING * abs(x) else Fraction(0)


def times(x: Number, y: Number) -> Number:
    return x * y if bits(x) + bits(y) <= MAX_BITS else inexact(x) * inexact(y)


def power(x: Number, y: Number) -> Number:
    if isinstance(y, Fraction) and y.denominator == 1 and bits(x) * abs(y) <= MAX_BITS:
        return x ** int(y)
    if isinstance(y, Fraction) and y.denominator % 2 and y.denominator > 1 and not isinstance(x, mp.mpc) and x < 0:
        return (-1) ** y.numerator * power(-x, y)   # the real cube root of -8 is -2
    x, y = inexact(x), inexact(y)
    if x == 0 and mp.re(y) > 0:
        return Fraction(0)
    if abs(y * mp.ln(x)) > MAX_LOG:
        raise ValueError
    return mp.power(x, y)


def factorial(x: Number) -> Number:
    if isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= 1000:
        return Fraction(math.factorial(int(x)))
    x = inexact(x)
    if not -1 < mp.re(x) < MAX_FACTORIAL or abs(mp.im(x)) > 100:
        raise ValueError
    return mp.gamma(x + 1)


def symbol(name: str, point: int) -> Fraction:
    """The value of a variable at a point: positive at the first three, either sign at the others (which tell |x| from x)."""
    h = hashlib.blake2b(f"{name}@{point}".encode("ascii", "backslashreplace")).digest()
    x = Fraction(int.from_bytes(h[:3], "big") + 2**22, 2**23)
    return -x if point == 3 or (point > 3 and h[3] % 2) else x


class Evaluator:
    """Computes the value of an expression at a point."""

    def __init__(self, s: str, point: int):
        self.tokens, self.i, self.point = [*tokenize(s), END], 0, point
        self.depth = self.bars = self.functions = 0   # how many operands, | and function arguments are open

    @property
    def next(self) -> str:
        return self.tokens[self.i]

    def take(self, expected: str = "") -> str:
        if self.next == END or (expected and self.next != expected):
            raise ValueError
        self.i += 1
        return self.tokens[self.i - 1]

    def skip(self, token: str) -> bool:
        found = self.next == token
        self.i += found
        return found

    def expression(self, floor: int = 0) -> Number:
        """Reads an operand and all that follows with operators that bind tighter than floor."""
        negative, signed = False, self.next in "+-"
        while self.next in "+-":
            negative ^= self.take() == "-"
        x = self.expression(max(floor, SUM)) if signed else self.operand()
        x = -x if negative else x
        while True:
            juxtaposed = self.starts_operand()
            op = "*" if juxtaposed else self.next
            if op[0] == '"':
                self.units()
            elif BINDING.get(op, 0) <= floor:
                return x
            else:
                self.i += not juxtaposed
                x = self.operation(op, x)

    def operation(self, op: str, x: Number) -> Number:
        if op == "!":
            return factorial(x)
        if op == "°":   # 30° is 30, but sin 30° is 1/2
            return times(x, mp.pi / 180) if self.functions else x
        if op == "^":
            x = power(x, self.argument())
            if self.next == "^":
                raise ValueError
            return x
        y = self.expression(BINDING[op])
        return plus(x, -y if op == "-" else y) if op in "+-" else times(x, 1 / y if op == "/" else y)

    def starts_operand(self) -> bool:
        r"""Whether the next token continues a product without an operator: 2x, 3(x+1), x\sqrt2."""
        if is_number(self.next) and is_number(self.tokens[self.i - 1]):   # "3 4" is not a product
            raise ValueError
        return self.next[0].isalnum() or (self.next[0] in ".\\" and len(self.next) > 1) or self.next in "([{" or (
            self.next == "|" and not self.bars)

    def units(self) -> None:
        r"""Skip a trailing unit: \text{ cm}^2, \text{m}/\text{s}, square feet."""
        while self.next[0] == '"':
            if re.search(r"(?<![\^A-Za-z])\d", self.take()):   # "5 \text{ or 6}" holds no unit
                raise ValueError
            if self.skip("^"):
                self.argument()
            self.i += self.next in "*/" and self.tokens[self.i + 1][0] == '"'
        if self.starts_operand() or self.next in "*/^":
            raise ValueError

    def argument(self, digit: bool = False) -> Number:
        r"""What follows ^, \frac or \sqrt: a group or one token; with digit, only the first digit of a number (\frac12)."""
        negative = self.skip("-")
        if digit and is_number(self.next):
            token = self.take()
            if len(token) > 1:
                self.i -= 1
                self.tokens[self.i] = token[1:]
            x = Fraction(token[0])
        else:
            x = self.operand()
        return -x if negative else x

    def operand(self) -> Number:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError
        token = self.take()
        base_name, _, subscript = token.partition("_")
        if is_number(token):
            mantissa, _, exponent = token.lower().partition("e")
            x = times(Fraction(f"0{mantissa.removesuffix('.')}"), power(Fraction(10), Fraction(exponent or 0)))
        elif token in "([{|":
            bars, self.bars = self.bars, token == "|"
            x = self.expression()
            self.take({"(": ")", "[": "]", "{": "}", "|": "|"}[token])
            x, self.bars = abs(x) if token == "|" else x, bars
        elif token in CONSTANTS:
            x = CONSTANTS[token]
        elif base_name[1:] in FUNCTIONS:
            x = self.function(base_name[1:], subscript)
        elif token[0].isalnum() or base_name.rstrip("'") in NAMES:   # 52_8 is a thing of its own as well
            x = self.name(token)
        elif token == r"\frac":
            x = times(self.argument(digit=True), 1 / self.argument(digit=True))
        elif token == r"\binom":
            n, k = self.argument(digit=True), self.argument(digit=True)
            x = times(factorial(n), 1 / times(factorial(k), factorial(plus(n, -k))))
        elif token == r"\sqrt":
            degree = self.operand() if self.next == "[" else Fraction(2)
            x = power(self.argument(), 1 / degree)
        else:
            raise ValueError
        self.depth -= 1
        return x

    def name(self, name: str) -> Number:
        """A variable with subscript and primes, or a call: f(x+1), I(0), u(x, t). But x(x+1) is a product."""
        simple = re.match(r"\( [\\\w.]+ (?:, [\\\w.]+ )*\)", " ".join(self.tokens[self.i:self.i + 12]))
        if self.next != "(" or not (simple or name[0] in "fg" or "'" in name):
            return symbol(name, self.point)
        while name[-1:] != ")":   # an unknown function: a value that depends on its name and arguments only
            name += self.take() + mp.nstr(inexact(self.expression()), 20)
            name += self.take() if self.next == ")" else ""
        return symbol(name, 0)

    def function(self, name: str, base: str) -> Number:
        r"""\sin x, \sin(x), \sin^2 x, \sin^{-1} x, \log_2 x; without brackets the argument is the product up to an operator."""
        exponent = self.argument() if self.skip("^") else Fraction(1)
        if exponent == -1 and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, Fraction(1)
        self.functions += 1
        bracketed = self.next in "([{|"
        x = self.operand() if bracketed else self.expression(PRODUCT)
        while not bracketed and self.starts_operand() and self.next[1:] not in FUNCTIONS:
            x = times(x, self.expression(PRODUCT))
        self.functions -= 1
        if abs(x) > MAX_LOG:
            raise ValueError
        y = FUNCTIONS[name](inexact(x))
        y = Fraction(0) if abs(y) < ROUNDING * abs(inexact(x)) else y   # sin(pi)
        return power(y / mp.ln(inexact(Evaluator(base, self.point).operand())) if base else y, exponent)


@lru_cache(maxsize=4096)
def value(s: str, point: int) -> Number | None:
    """The value of an expression with its variables at a point; None if it has none."""
    try:
        evaluator = Evaluator(s, point)
        x = evaluator.expression()
        return x if evaluator.next == END else None
    except (ValueError, ZeroDivisionError, OverflowError):   # ours, or a pole of an mpmath function
        return None


def close(x: Number | None, y: Number | None) -> bool:
    if x is None or y is None or isinstance(x, Fraction) and isinstance(y, Fraction):
        return x is not None and x == y
    x, y = inexact(x), inexact(y)
    return x == y or bool(abs(x - y) < TOLERANCE * max(abs(x), abs(y)))   # "<": infinity is close to nothing else


# ------------------------------------------------------------------------------------------------------------------ equality
RELATIONS = "=≈<>≤≥≠∈"
SUBSCRIPT = r"(?:_\w|_\{[^{}]*\})?'*"
VARIABLE = re.compile(rf"(?:\\[A-Za-z]+|[A-Za-z]){SUBSCRIPT}")
NAME = rf"""(?:\\?[A-Za-z]+|"[^"]*"){SUBSCRIPT}"""
LABEL = re.compile(rf"{NAME}(?: ?\([^()]*\))?|\( ?{NAME}(?: ?, ?{NAME})* ?\)|[A-Za-z ]+")   # x, f(2), AB, (x, y), Total area
LOOSE_LABEL = re.compile(r"""(?=.*[A-Za-z])(?:[A-Za-z\\+*/|()'" -]|_\w|_\{[^{}]*\})+""")   # m + n: names without numbers


def split(s: str, separators: str) -> tuple[list[str], str]:
    """The parts of s between separators outside all brackets, and these separators."""
    parts, found, depth, start = [], "", 0, 0
    for k, c in enumerate(s):
        depth += (c in OPENING) - (c in CLOSING)
        if depth == 0 and c in separators:
            parts.append(s[start:k].strip())
            found, start = found + c, k + 1
    return [*parts, s[start:].strip()], found


def inside(s: str, brackets: str) -> str | None:
    """The content of s if one pair of brackets encloses all of it."""
    if s[:1] not in brackets or not s or s[-1] not in CLOSING or len(s) < 2:
        return None
    depths = list(accumulate((c in OPENING) - (c in CLOSING) for c in s))
    return s[1:-1].strip() if depths[-1] == 0 and min(depths[:-1]) > 0 else None


def items(s: str) -> list[str]:
    """The members of a list, set or union; any other answer is a list of one. ± gives two."""
    if "±" in s or "∓" in s:
        both = (s.replace("±", "+").replace("∓", "-"), s.replace("±", "-").replace("∓", "+"))
        return list(dict.fromkeys(item for reading in both for item in items(reading)))
    if (content := inside(s, "⦃")) is not None or s == r"\emptyset":
        return items(content) if content else []
    parts = split(s, ",∪")[0]
    content = inside(s, "([{⟦") if len(parts) == 1 else None
    if content is not None and (s[0] + s[-1] in ("()", "[]", "{}", "⟦⟧")) and not split(content, ",")[1]:
        return items(content)
    return parts


def same(a: str, g: str) -> bool:
    """Whether a normalized answer equals the normalized gold answer: as a string, by structure, then by value."""
    if squeezed(a) == squeezed(g):
        return True
    left, right = items(a), items(g)
    if len(left) != 1 or len(right) != 1:
        for x in left:
            match = next((k for k, y in enumerate(right) if same(x, y)), None)
            if match is None:
                return False
            del right[match]
        return not right
    (a,), (g,) = left, right
    (a_parts, a_ops), (g_parts, g_ops) = split(a, RELATIONS), split(g, RELATIONS)
    if a_ops or g_ops:
        return same_relation(a_parts, a_ops, g_parts, g_ops)
    for brackets, separator in (("", "¦"), ("", "&"), ("([", ",")):
        contents = [inside(s, brackets) or "" if brackets else s for s in (a, g)]
        (a_parts, found), (g_parts, g_found) = split(contents[0], separator), split(contents[1], separator)
        if found or g_found:
            return found == g_found and (not brackets or a[0] + a[-1] == g[0] + g[-1]) and all(map(same, a_parts, g_parts))
    return all(close(value(a, p), value(g, p)) for p in range(7 if "|" in a + g else 3))


def same_relation(a: list[str], a_ops: str, g: list[str], g_ops: str) -> bool:
    """Equations and inequalities up to a factor; a relation against a value: what it states. (Parts and operators of both.)"""
    flip = str.maketrans("<≤>≥", ">≥<≤")
    if a_ops and set(a_ops) <= set(">≥"):
        a, a_ops = a[::-1], a_ops[::-1].translate(flip)
    if g_ops and set(g_ops) <= set(">≥"):
        g, g_ops = g[::-1], g_ops[::-1].translate(flip)
    if a_ops != g_ops:
        x, y = stated(a, a_ops, strict=False), stated(g, g_ops, strict=True)
        return x is not None and y is not None and same(x, y)
    if all(map(same, a, g)):
        return True
    if len(a) > 2 or a_ops == "∈" or is_constant("".join(a + g)):
        return False
    if a_ops in "=≠" and same(a[0], g[1]) and same(a[1], g[0]):
        return True
    pairs = [(value(f"({a[0]})-({a[1]})", p), value(f"({g[0]})-({g[1]})", p)) for p in range(3)]
    ratios = [inexact(x) / inexact(y) for x, y in pairs if x and y] or [mp.mpf(0)]
    return all(0 < abs(r) < mp.inf and close(r, ratios[0]) for r in ratios) and (a_ops in "=≠" or mp.re(ratios[0]) > 0)


def is_constant(s: str) -> bool:
    return not re.search("[A-Za-z]", re.sub(r"\\(?:frac|sqrt|pi|binom)", "", s))


def stated(parts: list[str], ops: str, strict: bool) -> str | None:
    """What a relation says: x = 5 says 5, x ∈ A says A, 2 < x ≤ 3 says (2, 3]; None if it does not state a value."""
    loosely = not strict and parts[-1] != "0" and LOOSE_LABEL.fullmatch(parts[0])   # y' + y = 0 states no value
    labelled = bool(loosely or LABEL.fullmatch(parts[0]))
    if set(ops) <= {"=", "≈"}:
        rounded = ops.find("≈", labelled)   # \sqrt2 ≈ 1.41 says \sqrt2
        last = parts[rounded] if rounded >= 0 else parts[-1]
        return last if labelled or not ops or is_constant(parts[0]) else None
    if ops == "∈" and labelled:
        return parts[1]
    if set(ops) <= {"<", "≤"}:
        if len(ops) == 1:   # one end is infinite
            ops, parts = ("<" + ops, [r"-\infty", *parts]) if VARIABLE.fullmatch(parts[0]) else (ops + "<", [*parts, r"\infty"])
        if len(ops) == 2 and VARIABLE.fullmatch(parts[1]):
            return f"{'[' if ops[0] == '≤' else '('}{parts[0]},{parts[2]}{']' if ops[1] == '≤' else ')'}"
    return None


def squeezed(s: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", s)   # "1 1/2" is not "11/2"


def plain(s: str) -> str:
    """An answer as text: no quotes, articles or case."""
    words = s.replace('"', " ").split()
    return " ".join(w.strip(".,!").casefold() for w in words if w.casefold() not in ("a", "an", "the"))


def is_text(s: str) -> bool:
    """Whether an answer consists of words: yes, Navin, east, an ellipse, (iv), HHT. Not xy, AB or sin x."""
    words = re.findall(r"[^\W\d_]+", s)
    return not re.search(r"[\\\d=+*/^_|<>]|-\s", s) and not WORDS & set(words) and any(
        len(w) > 3 or re.fullmatch("[ivx]{2,}|[A-Z]{3}|[A-Z][a-z]+|(?i:yes|no)", w) for w in words)


def choice(s: str) -> str | None:
    """The letter of a multiple-choice answer: C, (C), C., (C) Plane."""
    m = re.fullmatch(r"\(?([A-J])(?:[).:](?:\s.*)?)?", s.replace('"', ""))
    return m[1] if m else None


def equivalent(answer: str, gold: str) -> bool:
    """Whether two answers (without the box) are equal under the policy above. Never raises."""
    if max(len(answer), len(gold)) > MAX_CHARS:
        return answer.strip() == gold.strip()
    a, g = normalize(answer), normalize(gold)
    if not a or not g or squeezed(a) == squeezed(g):
        return bool(a and g)
    if choice(a) and choice(g):
        return choice(a) == choice(g)
    if is_text(a) or is_text(g):
        return plain(a) == plain(g)
    depth = max(max(accumulate((c in OPENING) - (c in CLOSING) for c in s)) for s in (a, g))
    return depth <= MAX_DEPTH and max(a.count(","), g.count(",")) <= MAX_ITEMS and same(a, g)


def reward(text: str, gold: str) -> float:
    """1.0 if the final answer of a response equals the gold answer, else 0.0. Never raises."""
    answer = extract_answer(text)
    return float(answer is not None and equivalent(answer, gold))


def parses(gold: str) -> bool:
    """Whether a gold answer can be compared at all, by value or as a string: not empty, not too long. Never raises."""
    return len(gold) <= MAX_CHARS and bool(normalize(gold))


def main(path: str = "") -> None:
    """Print accuracy and speed on labelled pairs."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [{key: row[key] for key in ("pred", "gold", "expect")} for row in map(json.loads, file)]
        assert rows, "no rows"
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        print(f"error: {path or 'pairs.jsonl'}: give a file of rows pred, gold, expect ({error})", file=sys.stderr)
        raise SystemExit(2) from None
    start = time.perf_counter()
    wrong = [row["expect"] for row in rows if (reward(row["pred"], row["gold"]) == 1) != row["expect"]]
    rate = len(rows) / (time.perf_counter() - start)
    print(f"{len(rows)} pairs, {rate:.0f} per second, {1 - len(wrong) / len(rows):.2%} right; "
          f"wrongly accepted {wrong.count(False)}, wrongly rejected {wrong.count(True)}")


if __name__ == "__main__":
    main(*sys.argv[1:2])


verify = reward
