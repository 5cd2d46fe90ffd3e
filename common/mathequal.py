r"""The grammar behind verify.py: one spelling per symbol, values of expressions, lists and sets.

`normalize` gives LaTeX, Unicode and plain text one spelling. `parse` reads an expression into a
tree with a small operator-precedence grammar. `value` computes the tree at a point with mpmath to
110 digits; a variable gets fixed pseudo-random values. Nothing is executed, simplified or solved,
and every size is bounded (MAX_). What the grammar does not know (\sum, f(x)) and what is over a
limit has no value and only matches as a string.
"""
import operator
import random
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import accumulate, pairwise

import mpmath

MAX_CHARS, MAX_TOKENS, MAX_BRACKETS, MAX_ITEMS = 1_500, 400, 100, 30  # of an answer
MAX_DIGITS, MAX_LOG, MAX_FACTORIAL = 60, 10**5, 5_000  # of a number, of |log x^y|, of n in n!

mp = mpmath.mp.clone()  # a context of its own: the caller's precision stays as it is
mp.dps = 110
TOLERANCE = mp.mpf("1e-70")  # relative difference of equal values
SWALLOWED = mp.mpf("1e-68")  # a term this small beside another is not visible in their sum

# ------------------------------------------------------------------------------------ spelling
GREEK = (
    r"α\alpha β\beta γ\gamma δ\delta ε\epsilon ζ\zeta η\eta θ\theta ι\iota κ\kappa λ\lambda μ\mu "
    r"ν\nu ξ\xi ρ\rho σ\sigma τ\tau υ\upsilon φ\phi χ\chi ψ\psi ω\omega Γ\Gamma Δ\Delta Θ\Theta "
    r"Λ\Lambda Ξ\Xi Π\Pi Σ\Sigma Φ\Phi Ψ\Psi Ω\Omega")
SIGNS = (r"π\pi √\sqrt ∞\infty ∅\emptyset ℝ\mathbb{R} €\text{euros} £\text{pounds} ¥\text{yen} "
         r"₹\text{rupees}")
UNICODE = str.maketrans({sign[0]: sign[1:] + " " for sign in f"{GREEK} {SIGNS}".split()})
UNICODE |= str.maketrans("×·⋅÷⁄−–’′~⟨⟩、;", "***//--'' (),,", '"')
FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh coth exp ln log lg "
    "arcsin arccos arctan arcsinh arccosh arctanh abs lfloor lceil").split()
WORDS = {*FUNCTIONS, "pi", "sqrt", "infty"}
SYNONYMS = {name: symbol for symbol, *names in map(str.split, (
    r"* cdot times ast; / div; ≤ le leq leqslant; ≥ ge geq geqslant; < lt; > gt; ≠ ne neq;"
    r"≈ approx; ∈ in; ∪ cup; ± pm; ° degree degrees circ; ' prime; ( langle; ) rangle;"
    r"⦃ lbrace; ⦄ rbrace; | vert lvert rvert mid; ... ldots dots cdots; \emptyset varnothing;"
    r"∨ lor vee; ∧ land wedge; ∖ setminus backslash; \phi varphi; \binom dbinom tbinom choose;"
    r"\frac dfrac tfrac cfrac sfrac nicefrac over").split(";")) for name in names}
SYNONYMS |= dict.fromkeys("left right big Big displaystyle textstyle quad qquad".split(), " ")
FONT = (r"\\(?:text(?!color)\w*|mbox|emph|underline|math(?:rm|bf|it|sf|tt)|operatorname"
        r"|boldsymbol|bm|rm|bf|it)\b")
LETTER = r"(?:\\[A-Za-z]+|[A-Za-z])(?:_\w|_\{[^{}]*\})?"
NOTHING = r"(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?)|(?:the )?empty set"
LEADING = "the|points?|is|are|either|about|approximately|exactly|answers?|option|choice"


def improper(m: re.Match) -> str:  # 1 4/5 is (9/5)
    whole, top, bottom = (int(group) for group in m.groups() if group)
    return f"({whole + Fraction(top, bottom)})" if top < bottom else m[0]


def repeating(m: re.Match) -> str:  # 0.1\overline{6} is (1/6)
    head, tail = m[1] + m[2], m[3] or m[4] or m[5] or m[6]
    nines = (10 ** len(tail) - 1) * 10 ** len(m[2])
    return f"({Fraction(int(head + tail) - int(head or 0), nines)})"


def quote(m: re.Match) -> str:
    text = re.sub(rf"[{{}}]|{FONT}", "", m[1])
    name = text.strip()
    if name in WORDS:
        return f" \\{name} "
    return f" {name} " if name in ("e", "i", "d", "x") else f'"{text}"'


SPELLINGS = r"\\¦ \cr¦ \{⦃ \}⦄ \&, \not=≠ <=≤ >=≥ !=≠ **^ ⇒⟹".split()
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"^([^$]*)(?<!\\)\$([^$]*)$", r"\1\\$\2"), (r"\\(?:text)?color\s*\{\w*\}", ""),
    (r"\\\$(?= ?(?:[\d.]|\\f))|USD\b", r"\\text{dollars}"), (r"\bRs\.?(?= ?\d)", r"\\text{rupees}"),
    (r"(?s)^.*(?:\\implies|\\Rightarrow|⟹)", ""), (r"¦?\s*\\end\s*\{\w*\}", "⟧"),
    (r"\\begin\s*\{(?:(?:[pb]|small)?matrix|array|cases|aligned)\}(?:\s*\{[clr| ]*\})?", "⟦"),
    (r"(?<=\d)(?:\{,\}|\\!|,\\!|\\,|\\ |\\;)\s*(?=\d{3}(?!\d))", ""),  # 10{,}000  10,\!000  10\,000
    (r"\\[;:> ,]", " "), (r"\\[!()\[\]$%]|[$%`]", ""),
    (FONT + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}", quote), (r"\{\s*\\(?:bf|rm)\b\s*([^{}]*)\}", quote),
    (r"\\(?:bf|rm|it)\b", ""), (r"\\([A-Za-z]+)", lambda m: SYNONYMS.get(m[1], m[0])),
    (r"\{([^{}]*)(\\frac|\\binom)\b *([^{} ][^{}]*)\}(?!\{)", r"\2{\1}{\3}"),  # {n \choose 2}
    (r"\\(frac|binom)\s*(\d)", r"\\\1{\2}"), (r'\\frac ?\{("[^"]*")\} ?\{("[^"]*")', r"\1/{\2"),
    (r"\\(frac|binom)\s*(\{[^{}]*\})\s*(\d)", r"\\\1\2{\3}"),
    (r"\bmph\b", "mi/h"), (r"(?<=\d) sec\b", ' "seconds"'), (r"\^\s*\{?\s*°\s*\}?", "°"),
    (rf"(?<![\\A-Za-z])({'|'.join(WORDS)})(?![A-Za-z])", r"\\\1 "), (r"\^ ?-(\w+)", r"^{-\1}"),
    (r"(?<![\d.])(\d{0,20})\.(\d{0,12}?)(?:\\(?:overline|bar|dot) ?\{?(\d{1,12})\}?|\((\d{1,12})\)"
     r"|(?:(\d)\5\5+|(\d{2,9})\6+)\.\.\.)(?![\d.])", repeating),
    (r"\((\d+)\) ?_", r"\1_"), (r',?\s*(?:"[\s,]*or\s*"|\bor\b)', "∨"),
    (r',?\s*(?:"[\s,]*and\s*"|\band\b)', "∧"), (rf'(?i)"?\b(?:{NOTHING})\b"?', r"\\emptyset "),
    (r'(?i)"?\bdoes not exist\b"?', '"DNE"'), (r'(?i)"?\binfinity\b"?', r"\\infty "),
    (r'(?i)"?\ball real numbers\b"?|\\mathbb\s*\{?\s*R\s*\}?(?!\s*[_^])', r"(-\\infty ,\\infty )"),
    (r'[\s,("]*\b(?:because|since)\b.*$', ""), (r'^([^"]*)"([^"]*)$', r"\1\2"),
    (r'"([^"]*)"', lambda m: m[0] if re.search("[A-Za-z]", m[1]) else f" {m[1]} "),
    (r'^\s*"([^"]*[\d=,∨∧][^"]*)"\s*$', r"\1"),
    (rf'(?i)^[\s"]*(?:(?:{LEADING})\b[\s":]*)+(?=[\W\dA-Z])', ""),
    (r'(?<=\d) ?"?\s*thousand\b\s*"?', "*10^{3} "), (r'(?<=\d) ?"?\s*million\b\s*"?', "*10^{6} "),
    (r'(?<=\d) ?"?\s*billion\b\s*"?', "*10^{9} "),
    (r'("(?:dollars|euros|pounds|yen|rupees)") *([\d.,]+(?:\*10\^\{\d+\})?)', r"\2 \1"),
    (r"\\(max|min|gcd) ?⦃([^⦃⦄]*)⦄", r"\\\1(\2)"),
    (r"^⦃ ?\w(?: ?∈ ?\(-\\infty ,\\infty \))? ?[|:] ?([^⦃⦄]*)⦄$", r"\1"),  # {x | 1 < x < 5}
    (r"\|([^|]+)\|", r"\\abs(\1)"), (r"\\l(floor|ceil)\b(.*?)\\r\1\b", r"\\l\1(\2)"),
    (r"\(-\\infty ,\\infty \) ?- ?⦃", r"(-\\infty ,\\infty )∖⦃"), (r", ?&", "&"),
    (r"& ?=", "="), (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"), (r"\s+", " "),
    (r"(?<![\w.^}])(\d+) ?(?:\\frac ?\{(\d+)\} ?\{(\d+)\}|(?<= )(\d+) ?/ ?(\d+))", improper),
    (r"^[\s=≈,:]+|[\s,:]*(?<!\.)[\s,:.]$", ""),
    (rf"^{LETTER} ?= ?(?=[^=]*[,∨∧][^=]*$)", ""),  # x = 1, 2
    (r"^⦃? ?⟦([^&⟦⟧]*=[^&⟦⟧]*)⟧$", lambda m: m[1].replace("¦", ",")),  # the rows of a system
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])", lambda m: m[0].replace(" ", "")),
]]


@lru_cache(maxsize=4096)
def normalize(s: str) -> str:
    """One spelling for each symbol; no layout, no percent signs, no thousands separators."""
    s = re.sub(r"([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", r"^{\1}", " ".join(s.split()))
    s = re.sub(r"([₀-₉]+)", r"_{\1}", s)
    s = re.sub(r"([¼½¾⅓⅔])", r" \1 ", s).translate(UNICODE)
    s = unicodedata.normalize("NFKC", s).translate(UNICODE)
    for spelling in SPELLINGS:
        s = s.replace(spelling[:-1], spelling[-1])
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    if re.search(r"[(\[⦃]", s):
        return s  # (100,200) may be a tuple
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), s)


# -------------------------------------------------------------------------------------- values
def plus(x, y):  # all numbers are mpf or mpc
    if 0 < min(abs(x), abs(y)) < SWALLOWED * max(abs(x), abs(y)) < mp.inf:
        raise ValueError
    return x + y


def power(x, y):
    if x != 0 and abs(y * mp.ln(x)) > MAX_LOG:
        raise ValueError
    return mp.power(x, y)


def factorial(x):
    if mp.im(x) or not -100 < x < MAX_FACTORIAL:
        raise ValueError
    return mp.gamma(x + 1)


CONSTANTS = {"e": +mp.e, "i": mp.mpc(0, 1), r"\pi": +mp.pi, r"\infty": mp.inf}
OPERATIONS = {name: getattr(mp, name.replace("arc", "a"), None) for name in FUNCTIONS} | {
    "lg": mp.log10, "abs": abs,
    "lfloor": mp.digamma, "lceil": mp.lambertw,  # anything that nothing else is equal to
    "^": power, "!": factorial, "neg": operator.neg, "+": plus, "*": operator.mul,
    "/": lambda x: 1 / x, "°": lambda x: x * mp.pi / 180,
    "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k)}
SCALES = (1, 16, 1e-3, 1e-7, -1, -1, -1)  # of the points: ordinary, large, tiny, negative ones


@lru_cache(maxsize=4096)
def symbol(name, point):  # at the last two points some are negative
    x = (random.Random(f"{name} {point}").random() + 0.5) * SCALES[point]
    return mp.mpf(-x if point > 4 and ord(name[-1]) & point - 4 else x)


def evaluate(tree, point):  # raises where there is none
    kind, *parts = tree
    if kind in ("number", "constant"):
        return parts[0]
    if kind == "name":
        return symbol(parts[0], point)
    values = [evaluate(part, point) for part in parts]
    if kind in FUNCTIONS and abs(values[0]) > (75 if kind[-1] == "h" else MAX_LOG):
        raise ValueError
    x = reduce(OPERATIONS[kind], values) if kind in "+*" else OPERATIONS[kind](*values)
    if SCALES[point] < 0 and mp.im(x):  # the root of a negative number
        raise ValueError
    return x


def close(x, y):
    return x == y or bool(abs(x - y) < TOLERANCE * max(abs(x), abs(y)))


# ------------------------------------------------------------------------------------- grammar
NAMES = {*re.findall(r"\\\w+", GREEK), r"\ell", r"\hbar"}
OPENING, CLOSING = "([{⦃⟦", ")]}⦄⟧"
TOKEN = re.compile(
    r"(?:\d+\.?\d*|\.\d+)(?:[eE](?:-?\d{1,4}(?!\d)|\+\d{2,4}))?(?! ?_)"
    r"|(?:\\[A-Za-z]+|[A-Za-z]|\d+)(?: ?_ ?(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|\d+|\w))?'*"
    r"""|"\s*[A-Za-z]\s*"|\S""", re.ASCII)
END = " "
CALL = re.compile(  # f(x+1), I(0), u(x, t), dy/dx: a function without a value
    r"\\frac ?\{ ?(?:d|\\partial)(?![a-z]{2}).*?\{ ?(?:d|\\partial) ?[a-z]|\bd\w ?/ ?d\w|"
    r"(?<![\\A-Za-z])[A-Za-z]{4}|"  # a word is no product
    r"(?<![A-Za-z\\_])(?:[fg]'*|[A-Za-z](?:_\w)?'+|[A-Za-z](?:_\w)?(?=\( ?[\w\\., ]+\))) ?\(")
SUM, PRODUCT, POWER = 1, 2, 3  # how tightly operators bind
BINDING = dict.fromkeys("+-", SUM) | dict.fromkeys("*/", PRODUCT) | dict.fromkeys("^!°", POWER)
NUMBER = re.compile(r"\.?\d[^_]*$")
CLOSERS = {"(": ")", "[": "]", "{": "}"}


class Parser:
    """Reads the tree of an expression: (kind, parts...); raises ValueError where there is none."""

    def __init__(self, s: str):
        tokens = [token.strip('" ') or token for token in TOKEN.findall(s)]
        numbers = [NUMBER.match(token) for token in tokens]
        if len(tokens) > MAX_TOKENS or any(map(all, pairwise(numbers))):
            raise ValueError  # "3 4" is not a product
        self.tokens = [END, *reversed(tokens)]  # the next one is the last

    def whole(self, closing: str = END) -> tuple:  # up to the token that closes it
        x = self.expression()
        if self.tokens.pop() != closing:
            raise ValueError
        return x

    def expression(self, floor: int = 0) -> tuple:
        """An operand and all that follows with operators that bind tighter than floor."""
        if self.tokens[-1] in "+-":
            sign = self.tokens.pop()
            x = self.expression(max(floor, SUM))
            x = ("neg", x) if sign == "-" else x
        else:
            x = self.operand()
        while True:
            op = "*" if self.starts_operand() else self.tokens[-1]
            if BINDING.get(op, 0) <= floor:
                return x
            if op == self.tokens[-1]:
                self.tokens.pop()
            x = self.operation(op, x)

    def operation(self, op: str, x: tuple) -> tuple:
        if op in "!^°":
            x = ("^", x, self.operand()) if op == "^" else (op, x)
            if self.tokens[-1] == op:
                raise ValueError
            return x
        y = self.expression(BINDING[op])
        kind = "+" if op in "+-" else "*"
        if op in "-/":
            y = ("neg" if op == "-" else "/", y)
        x, y = [z[1:] if z[0] == kind else (z,) for z in (x, y)]
        return (kind, *x, *y)

    def starts_operand(self) -> bool:  # 2x, 3(x+1), x\sqrt2: a product without an operator
        token = self.tokens[-1]
        named = token[0] in ".\\" and len(token) > 1
        return token[0].isalnum() or named or token in "([{"

    def operand(self) -> tuple:
        token = self.tokens.pop()
        base, _, subscript = token.partition("_")
        if NUMBER.match(token):
            if len(token) > MAX_DIGITS:
                raise ValueError
            return ("number", mp.mpf(token))
        if token in CLOSERS:
            return self.whole(CLOSERS[token])
        if token in CONSTANTS:
            return ("constant", CONSTANTS[token])
        if base[1:] in FUNCTIONS:
            return self.function(base[1:], subscript)
        if token[0].isalnum() or base.rstrip("'") in NAMES:  # 52_8 is a name as well
            return ("name", re.sub(r"[{} ]", "", token))
        if token in (r"\frac", r"\binom"):
            first, second = self.operand(), self.operand()
            return ("*", first, ("/", second)) if token == r"\frac" else ("binom", first, second)
        if token == r"\sqrt":
            degree = self.operand() if self.tokens[-1] == "[" else ("number", mp.mpf(2))
            return ("^", self.operand(), ("/", degree))
        raise ValueError

    def function(self, name: str, base: str) -> tuple:
        r"""\sin x, \sin(x), \sin^2 x, \sin^{-1} x, \log_2 x: the argument ends at an operator."""
        exponent = None
        if self.tokens[-1] == "^":
            self.tokens.pop()
            exponent = self.operand()
        if exponent == ("neg", ("number", 1)) and "arc" + name in FUNCTIONS:
            name, exponent = "arc" + name, None
        bracketed = self.tokens[-1] in "([{"
        x = self.operand() if bracketed else self.expression(PRODUCT)
        while not bracketed and self.starts_operand() and self.tokens[-1][1:] not in FUNCTIONS:
            x = ("*", x, self.expression(PRODUCT))
        x = (name, x)
        if base:
            x = ("*", x, ("/", ("ln", Parser(base).whole())))
        return ("^", x, exponent) if exponent else x


@lru_cache(maxsize=8192)
def parse(s: str) -> tuple | None:  # None: it is no expression
    try:
        return None if CALL.search(s) else Parser(s).whole()
    except (ValueError, ArithmeticError, RecursionError):
        return None


def value(tree, point):
    try:
        x = evaluate(tree, point)
        return None if mp.isnan(x) else x
    except (ValueError, ArithmeticError, RecursionError, TypeError):  # a pole, a size over a limit
        return None


def walk(tree):  # all nodes
    if isinstance(tree, tuple):
        yield tree
        for part in tree[1:]:
            yield from walk(part)


def has(tree, *kinds):
    return any(part[0] in kinds for part in walk(tree))


SAME_UNITS = {name: unit for unit, *names in map(str.split, (
    "meter m|centimeter cm|millimeter mm|kilometer km|inch in inche|foot ft feet|mile mi|gram g|"
    "kilogram kg|pound lb|second s sec|minute min|hour h hr|day|week|month|year|cent|dollar|yen|"
    "euro|rupee|degree|radian rad|celsius c|fahrenheit f|2 square sq|3 cubic").split("|"))
    for name in (unit, *names)}
NO_UNITS = set(
    "not no or if unless except maybe is are was but else otherwise wrong incorrect false plus "
    "minus times and to either neither than less more when where for all a p am pm dozen".split())
UNIT = re.compile(
    r'("[^"]*"|°(?: ?"?[CF]"?)?|(?<=\d) ?[\u4e00-\u9fff]+'
    r"|(?:(?<=\d)|(?<= ))(?:cm|mm|km|kg|ft|lbs|hrs|Hz|ml|mL)(?![\w(])"
    r"|(?<= )(?:mg|in|lb|mi|hr|min|day|per|sq|eV|kJ|mol)(?![\w(])"
    r"|(?<=\d )[mshgNJLVWKC](?= ?[/^]|$)|(?<= )(?!sin|cos|tan)[A-Za-z]{4,})"
    r'(?: ?"[^"]*"| [A-Za-z]{2,}(?![A-Za-z])| ?/ ?[A-Za-z]+(?![A-Za-z])|\^\{?-?\d\}?|[*/{} .])*$')


def measured(s: str) -> tuple[str, set]:  # without a trailing unit; its known units
    m = UNIT.search(s)
    words = re.findall("[a-z]+|[23]", m[0].lower()) if m else []
    if not m or NO_UNITS & set(words) or re.search(r"(?<![\^{-])\d", m[0]):
        return s, set()
    names = {SAME_UNITS.get(word, SAME_UNITS.get(word.removesuffix("s"))) for word in words}
    return s[:m.start()].strip(), names - {None}


def split(s: str, separators: str) -> tuple[list[str], str]:  # at those outside all brackets
    parts, found, depth, start = [], "", 0, 0
    for k, c in enumerate(s):
        depth += (c in OPENING) - (c in CLOSING)
        if depth == 0 and c in separators:
            parts.append(s[start:k].strip())
            found, start = found + c, k + 1
    return [*parts, s[start:].strip()], found


def inside(s: str, brackets: str) -> str | None:  # of the brackets, if one pair encloses s
    if len(s) < 2 or s[0] not in brackets or s[-1] not in CLOSING:
        return None
    depths = list(accumulate((c in OPENING) - (c in CLOSING) for c in s))
    return s[1:-1].strip() if depths[-1] == 0 and min(depths[:-1]) > 0 else None


def items(s: str) -> list[str]:  # members of a list, set or union; ± gives two
    content = inside(s, "⦃{")
    if content is not None or s == r"\emptyset":
        return items(content) if content else []
    parts = split(s, ",∪∨∧")[0]
    if len(parts) > 1:
        return [item for part in parts for item in items(part)]
    content = inside(s, "([")
    if content is not None and "," not in content:
        return items(content)
    if 0 < s.count("±") < 4:
        return items(s.replace("±", "+", 1)) + items(s.replace("±", "-", 1))
    return [s]


def parts(s: str) -> tuple[str, list[str]]:  # separator and parts of a matrix, ratio, tuple, ...
    rows = inside(s, "⟦") or s
    for separator in "¦&:∖":
        cells, found = split(rows, separator)
        if found:
            return separator, cells
    members, found = split(inside(s, "([") or "", ",")
    return (s[0] + s[-1], members) if found else ("", [])


def as_tuple(s: str) -> str:  # x = 3, y = 4 and a column: (3,4)
    column, found = split(inside(s, "⟦") or "", "¦")
    if found and "&" not in s:
        return f"({','.join(column)})"
    pairs = dict(re.findall(r"\\?([^=,∧ ]+) ?= ?([^=,∧]+)", s))
    whole = len(re.split("[=,∧]", s)) == 2 * len(pairs) > 2
    return f"({','.join(pairs[name] for name in sorted(pairs))})" if whole else s


COMPUTED = ("^", "!", "binom", *FUNCTIONS)
TEN = ("number", 10)


def is_rational(tree):
    if tree[0] == "^" and has(tree[2], "/"):
        return False
    known = tree[0] in ("+", "*", "/", "neg", "^", "!", "binom")
    return tree[0] == "number" or (known and all(map(is_rational, tree[1:])))


def left_to_do(tree: tuple, plain: bool = False) -> bool:
    """Sums, products, whole quotients of numbers. plain: also powers of powers and the like."""
    for node in walk(tree):
        kind, inner = node[0], [part for part in node[1:] if has(part, *COMPUTED)]
        if plain and (kind in ("+", "abs") or (inner and kind in COMPUTED)):
            return True  # e^{\ln 55}
        if kind not in ("+", "*") or node[2][:2] == ("^", TEN):
            continue
        rational = [part for part in node[1:] if is_rational(part)]
        over = sum(part[0] == "/" for part in rational)
        if over > 1 or len(rational) - over > 1:
            return True
        if plain and inner and sum(part[0] != "/" for part in node[1:]) > 1:
            return True
        x = value(node, 0) if len(rational) == len(node) - 1 else None
        if x is not None and close(x, mp.nint(x)):
            return True
    return False


def worked(answer: tuple, gold: tuple) -> bool:  # as far as the gold: policy 2
    if has(gold, "name") or left_to_do(gold):
        return True
    named = has(answer, "name")
    adds = has(answer, "+") and not named and not has(gold, "+", *FUNCTIONS)
    return not adds and not left_to_do(answer, is_rational(gold) and not named)


RELATIONS = "=≈<>≤≥≠∈"
INEQUALITY = re.compile("[<>≤≥≠]")
FLIP = str.maketrans("<≤>≥", ">≥<≤")
VARIABLE = re.compile(LETTER + r"'*(?: ?\([^()]*\))?")
LABEL = re.compile(  # Total area, AB, (x, y), |AB|, P(A|B), f'(x), sin A, M ∩ N, dy/dx, a + b
    r"""(?!.*(?:\\sqrt|\\frac|not)|-)(?:[A-Za-z\\" ,()|'∪{}[\]]|_\w|_\{[^{}]*\})*"""
    r"|\\frac ?\{ ?(?:d|\\partial).*|\\(?:int|sum|prod|lim)(?![A-Za-z]).*|[a-z](?: ?\+ ?[a-z])+"
    rf"|\\sigma ?\^ ?\{{?2\}}?|\w\^\{{-1\}} ?\(\w\)|{VARIABLE.pattern}")


def relation(s: str) -> tuple[list[str], str]:
    parts, ops = split(s, RELATIONS)
    if ops and not ops.strip(">≥"):
        return parts[::-1], ops[::-1].translate(FLIP)
    return parts, ops


def stated(s: str) -> str:
    r"""What a relation says: x = 5 says 5, x ∈ A says A, 2 < x ≤ 3 says (2, 3], x < 1 ∨ x > 2 says
    (-\infty, 1) ∪ (2, \infty); "" if nothing."""
    conditions, found = split(s, "∨∧")
    if found:
        said = [stated(condition) for condition in conditions]
        if not found.strip("∨"):
            return "∪".join(said) if all("," in x for x in said) else ""
        both = r"^(.*),\\infty\)∧\(-\\infty,(.*)$"  # x > 1 ∧ x < 2, or x < 2 ∧ x > 1
        m = re.search(both, "∧".join(said)) or re.search(both, "∧".join(said[::-1]))
        return f"{m[1]},{m[2]}" if m else ""
    parts, ops = relation(s)
    first, last = parts[0], parts[-1]
    labelled = bool(LABEL.fullmatch(first))
    if labelled and len(ops) == 1 and ops in "=∈≈":
        return last
    if ops == "≠" and VARIABLE.fullmatch(first):
        return rf"(-\infty,{last})∪({last},\infty)"
    if ops in ("<", "≤"):  # one end is infinite
        low = VARIABLE.fullmatch(first)
        parts, ops = ([r"-\infty", *parts], "<" + ops) if low else ([*parts, r"\infty"], ops + "<")
    if len(ops) == 2 and not ops.strip("<≤") and VARIABLE.fullmatch(parts[1]):
        return f"{'(['[ops[0] == '≤']}{parts[0]},{parts[2]}{')]'[ops[1] == '≤']}"
    if not ops or ops.strip("=≈"):
        return ""
    if ops == "=" and VARIABLE.fullmatch(last):
        return first  # 5 = x
    if "≈" in ops[labelled:]:  # \sqrt2 ≈ 1.41 says \sqrt2
        return parts[labelled]
    values = [value(parse(claim), 0) for claim in parts[labelled:]]
    if None in values or not all(close(x, values[0]) for x in values):
        return ""  # 15 + 12 = 28 says nothing
    return last if labelled or parse(first)[0] not in ("number", "neg") else ""


def same_relation(a: str, g: str, same) -> bool | None:
    """Equations and inequalities; one against a value: what it states. None: neither is one."""
    (left, a_ops), (right, g_ops) = relation(a), relation(g)
    if not a_ops and not g_ops:
        return None
    if a_ops != g_ops:
        a, g = stated(a) if a_ops else a, stated(g) if g_ops else g
        return bool(a and g) and same(a, g)
    if all(map(same, left, right)):
        return True
    return a_ops in "=≠" and same(left[0], right[1]) and same(left[1], right[0])


def same_value(a: str, g: str) -> bool:  # a unit is read as variables first, unless both have one
    (a_bare, a_units), (g_bare, g_units) = measured(a), measured(g)
    if (a == a_bare or g == g_bare) and same_trees(parse(a), parse(g)):
        return True
    differ = a_units and g_units and a_units != g_units
    return not differ and same_trees(parse(a_bare), parse(g_bare))


def same_trees(answer: tuple | None, gold: tuple | None) -> bool:
    """Whether two trees have one value at every point, and no work left in the answer."""
    if answer is None or gold is None or not worked(answer, gold):
        return False
    points = range(len(SCALES) if has(("+", answer, gold), "name") else 1)
    seen = 0
    for point in points:
        x, y = value(answer, point), value(gold, point)
        if None not in (x, y) and not close(x, y):
            return False
        seen += None not in (x, y)
    return seen >= min(2, len(points))


def squeezed(s: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", s)  # "1 1/2" is not "11/2"


def too_large(s: str) -> bool:  # many brackets, a long list
    return len(re.findall(r"[(\[{⦃⟦]", s)) > MAX_BRACKETS or len(items(s)) > MAX_ITEMS


def words(s: str) -> list[str]:  # 12:30 PM is 12:30 p.m.
    s = re.sub(r'"|[.,!](?!\d)', "", re.sub(r"[A-Za-z]{3,}|[AP]M", lambda m: m[0].lower(), s))
    return re.findall(r"[^\W\d_]+|[\d.,:]+|[^\s\w]", s)


def plain(s: str) -> list[str]:  # of a text, without articles and brackets
    return [word for word in words(s.casefold()) if word not in ("a", "an", "the", "(", ")")]


def is_text(s: str) -> bool:  # yes, Navin, an ellipse, (iv), HHT; not xy or sin x
    if re.search(r"[\\\d=+*/^_|<>∨≈≠≤≥]|-\s", s):
        return False
    word = r"\b(?:[ivx]{2,}|[IVX]{2,}|[A-Z]{3}|[A-Z][a-z]+|(?i:yes|no))\b"
    return bool(re.search(rf'^"[^"]{{2,}}"$|[^\W\d_]{{4}}|{word}', s))


def choice(s: str) -> tuple[str, str]:  # letter and rest: C, (C), C. 12; or two ""
    m = re.fullmatch(r"\(?([A-J])(?:[).:] ?(.*))?", s.replace('"', ""))
    if not m or re.search(r"\b[A-J][).:]|∨|∧", m[2] or ""):
        return "", ""
    return m[1], (m[2] or "").strip()
