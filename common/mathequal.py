r"""The grammar behind verify.py: one spelling per symbol, values of expressions, lists and sets.

`normalize` gives LaTeX, Unicode and plain text one spelling. `parse` reads an expression into a
tree with a small operator-precedence grammar. `value` computes the tree at a point, exactly as a
Fraction or with mpmath to 110 digits; a variable gets fixed pseudo-random values. `items` splits
lists, `stated` says what an equation claims, `worked` whether a sum is left to do.

Nothing is executed: no eval, and none of sympy's string parsers, which call it. Nothing is
simplified or solved: every size is bounded (see MAX_), so nothing is slow. What the grammar does
not know (\sum, \int, a^b^c) and what is over a limit has no value and only matches as a string.
"""
import hashlib
import math
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, product

import mpmath

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 1_500, 400, 30, 30  # of an answer
MAX_BITS, MAX_INTEGER_BITS = 20_000, 120_000  # of exact fractions and integers
MAX_LOG, MAX_FACTORIAL = 10**5, 5_000  # |log| of a power, argument of n!

mp = mpmath.mp.clone()  # a context of its own: the caller's precision stays as it is
mp.dps = 110
TOLERANCE = mp.mpf("1e-70")  # relative difference of equal values
SWALLOWED = mp.mpf("1e-68")  # a term this small beside another is not visible in their sum
ROUNDING = mp.mpf("1e-80")  # a sum this small beside its terms is zero

# ------------------------------------------------------------------------------------ spelling
GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
).split(), strict=True))
UNICODE = str.maketrans({letter: f"\\{name} " for letter, name in GREEK.items()} | {
    "√": r"\sqrt ", "∞": r"\infty ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "−": "-", "–": "-",
    "’": "'", "′": "'", "…": "...", '"': "", "~": " ", "∪": "∪", "⟨": "(", "⟩": ")", "、": ","})
FUNCTIONS = "sin cos tan cot sec csc sinh cosh tanh exp ln log lg arcsin arccos arctan".split()
FUNCTIONS += "arcsinh arccosh arctanh".split()
CALLS = "max min gcd lcm".split()
WORDS = {*FUNCTIONS, *CALLS, "pi", "sqrt", "infty"}
SYNONYMS = {old: new for new, olds in {
    "*": "cdot times ast", "/": "div", "≤": "le leq leqslant", "≥": "ge geq geqslant",
    "<": "lt", ">": "gt", "≠": "ne neq", "≈": "approx simeq", "∈": "in", "∪": "cup",
    "∖": "setminus backslash smallsetminus", "±": "pm", "∓": "mp", "°": "degree degrees circ",
    "|": "vert lvert rvert mid", "'": "prime", "⦃": "lbrace", "⦄": "rbrace",
    "...": "ldots dots cdots",
    "⌊": "lfloor", "⌋": "rfloor", "⌈": "lceil", "⌉": "rceil", "(": "langle", ")": "rangle",
    "£": "pounds", "∧": "land wedge", "∨": "lor vee",
    r"\emptyset ": "varnothing", r"\frac": "dfrac tfrac cfrac sfrac nicefrac",
    r"\binom": "dbinom tbinom",
    r"\epsilon ": "varepsilon", r"\phi ": "varphi", r"\theta ": "vartheta",
    " ": "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits quad "
         "qquad space vec mathord hspace",
}.items() for old in olds.split()}
FONT = (r"\\(?:text(?!color)\w*|mbox|math(?:rm|bf|it|sf|tt)|operatorname\*?|boldsymbol|bm"
        r"|rm|bf|it|tt)")
NOTHING = r"(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?)|(?:the )?empty set"
LEADING = ("the points? vertex is are at either both about approximately exactly answers? option"
           " choice value").replace(" ", "|")


def improper(m: re.Match) -> str:
    """A mixed number as a fraction: 1 4/5 is (9/5)."""
    whole, top, bottom = (int(group) for group in m.groups() if group)
    return f"({whole * bottom + top}/{bottom})" if top < bottom else m[0]


def repeating(m: re.Match) -> str:
    """A repeating decimal as a fraction: 0.1 and the period 6 is ((1 + 6/9)/10)."""
    whole, start, period = m[1] or "0", m[2], m[m.lastindex]
    nines = 10 ** len(period) - 1
    top = int(whole + start) * nines + int(period)
    return f"({top}/{nines * 10 ** len(start)})"


def quote(m: re.Match) -> str:
    return '"' + re.sub(r"[{}]", "", m[1]) + '"'


REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"(?s)^.*(?:\\implies|\\(?:Long)?[Rr]ightarrow|\\iff|\\therefore|⟹|⇒|→)", ""),
    (r",?\s*\b(?:because|since)\b.*$", ""),
    (r"\\\\(?:\[[\w. ]*\])?|\\cr\b", "¦"), (r"¦\s*(?=\\end)", ""),
    (r"\\begin\s*\{(?:[pbB]?matrix|smallmatrix|array|cases)\}(?:\s*\{[clr| ]*\})?", "⟦"),
    (r"\\end\s*\{\w*\}", "⟧"), (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:text)?color\s*\{\w*\}", ""),
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ |,\\,)\s*(?=\d{3}(?!\d))", ""),  # 10{,}000  10,\!000  10\,000
    (r"\\[;:> ]|\\,", " "), (r"\\\{", "⦃"), (r"\\\}", "⦄"), (r"\\&", ","),
    (r"\\[!()\[\]$%]|[$%]", ""),
    (FONT + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}", quote),
    (r"\{\s*\\(?:bf|rm|it|tt)\b\s*([^{}]*)\}", quote),
    (rf'"\s*({"|".join([*FUNCTIONS, *CALLS])}|[eid])\s*"', lambda m: (
        f" \\{m[1]} " if len(m[1]) > 1 else f" {m[1]} ")),
    (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\([A-Za-z]+)", lambda m: SYNONYMS.get(m[1], m[0])),
    (r"<=", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"\*\*", "^"), (r"\b(?:np|math)\.(?=[a-z])", ""),
    (r"\^\s*\{?\s*°\s*\}?", "°"), (r'°\s*"?\s*[CF]\b\s*"?', "°"),
    (r"\^\s*\{?\s*('+)\s*\}?", r"\1"),  # y^{\prime} is y'
    (r',?\s*(?:"[\s,]*or\s*"|\bor\b)', "∨"), (r',?\s*(?:"[\s,]*and\s*"|\band\b)', "∧"), (r";", ","),
    (rf'(?i)"?\b(?:{NOTHING})\b"?', r"\\emptyset "),
    (r'(?i)"?\b(?:positive )?infinity\b"?', r"\\infty "),
    (r'(?i)"?\ball real numbers\b"?|\\mathbb\s*\{?\s*R\s*\}?(?!\s*[_^])', r"(-\\infty ,\\infty )"),
    (r'"([^"A-Za-z]*)"', r" \1 "), (r'^\s*"([^"]*[\d=,∨∧][^"]*)"\s*$', r"\1"),
    (rf'(?i)^[\s"]*(?:(?:{LEADING})\b[\s":]*)+(?=[\W\dA-Z])', ""),
    (r"⦃[^|:⦃⦄]*[|:]([^⦃⦄]*)⦄", r"\1"),  # a set builder is its condition
    (r"((?:\\max|\\min|\\gcd|\\lcm)\s*)⦃([^⦃⦄]*)⦄", r"\1(\2)"),
    (r',\s*&|&\s*"(?:if|for|when)\s*"', "&"),
    (r"\\((?:d?dot|(?:wide)?hat|(?:wide)?tilde|bar|math(?:bb|cal|frak))\b|(?<![\d.]\\)overline)\s*\{",
     r"\\\1_{"),
    (r"(?<=[\d)}°⦄])\s*[\u3040-\u9fff]{1,4}$", ""),  # a unit in Chinese or Japanese
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"), (r"\s+", " "),
    (r"\(\s*(\d+)\s*\)\s*_", r"\1_"),
    (r"(?<![\d.])(\d*)\.(\d{0,9}) ?\\overline ?\{(\d+)\}", repeating),
    (r"(?<![\d.])(\d*)\.(\d{0,9}) ?\((\d{1,9})\)", repeating),
    (r"(?<![\d.])(\d*)\.(\d{0,9}) ?\\dot ?_?\{?(\d)\}?", repeating),
    (r"(?<![\d.])(\d*)\.(\d{0,9}?)(?:(\d{1,2}?)\3{2,}|(\d{3,9}?)\4+)\d?\.\.\.", repeating),
    (r"(?<![\w.^}])(\d+) ?(?:\\frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))|(?<= )(\d+) ?/ ?(\d+))",
     improper),
]]
MONEY = re.compile(r"(\\\$|€|\bUSD|\bRs\.?|[£₹¥]|\\pounds)\s*(\d[\d.,]*)(?!\d)")
CURRENCIES = {"\\$": "dollars", "€": "euros", "USD": "dollars", "£": "pounds", "\\pounds": "pounds",
              "¥": "yen"}


@lru_cache(maxsize=4096)
def normalize(s: str) -> str:
    """One spelling for each symbol; no layout, no percent signs, no thousands separators."""
    s = re.sub(r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: f"^{{{m[0]}}}", " ".join(s.split()))
    s = re.sub(r"[₀-₉]+", lambda m: f"_{{{m[0]}}}", s)
    s = re.sub(r"[¼½¾⅐-⅞]", lambda m: f" {unicodedata.normalize('NFKC', m[0])} ", s)
    s = s.translate(UNICODE)
    folded = unicodedata.normalize("NFKC", s)
    if len(folded) <= 2 * MAX_CHARS:  # one character can become 18
        s = folded.translate(UNICODE)
    if len(re.findall(r"(?<!\\)\$", s)) == 1:  # no pair of them that opens and closes formulas
        s = s.replace("$", r"\$")
    s = MONEY.sub(lambda m: f'{m[2]} "{CURRENCIES.get(m[1], "rupees")}"', s)
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    s = s.lstrip(" ,:").rstrip(" ,:.")
    separators = "[ ]" if re.search(r"[(\[⦃]", s) else "[ ,]"
    thousands = rf"(?<![\d.,])\d{{1,3}}(?:{separators}\d{{3}})+(?![\d,])"
    return re.sub(thousands, lambda m: re.sub("[ ,]", "", m[0]), s)


# -------------------------------------------------------------------------------------- values
Number = Fraction | mpmath.mpf | mpmath.mpc


def inexact(x: Number) -> mpmath.mpf | mpmath.mpc:
    return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def is_integer(x: Number) -> bool:
    return isinstance(x, Fraction) and x.denominator == 1


def small(bits: float, *numbers: Number) -> bool:
    """Whether an exact result of this many bits is allowed."""
    if not all(isinstance(x, Fraction) for x in numbers):
        return False
    return bits <= (MAX_INTEGER_BITS if all(map(is_integer, numbers)) else MAX_BITS)


def bits(x: Number) -> float:
    if not isinstance(x, Fraction):
        return math.inf
    return x.numerator.bit_length() + x.denominator.bit_length()


def plus(x: Number, y: Number) -> Number:
    if small(bits(x) + bits(y), x, y):
        return x + y
    x, y = inexact(x), inexact(y)
    large, little = max(abs(x), abs(y)), min(abs(x), abs(y))
    if 0 < little < SWALLOWED * large < mp.inf:
        raise ValueError
    return x + y if not abs(x + y) < ROUNDING * large else Fraction(0)


def times(x: Number, y: Number) -> Number:
    if small(bits(x) + bits(y), x, y):
        return x * y
    return inexact(x) * inexact(y)


def power(x: Number, y: Number) -> Number:
    if is_integer(y) and small(bits(x) * abs(y), x):
        return x ** int(y)
    odd = isinstance(y, Fraction) and y.denominator % 2 == 1 and y.denominator > 1
    if odd and not isinstance(x, mp.mpc) and x < 0:
        return (-1) ** y.numerator * power(-x, y)  # the real cube root of -8 is -2
    x, y = inexact(x), inexact(y)
    if x == 0 and mp.re(y) > 0:
        return Fraction(0)
    if abs(y * mp.ln(x)) > MAX_LOG:
        raise ValueError
    return mp.power(x, y)


def root(x: Number, degree: Number) -> Number:
    """Exact where it can be: \\sqrt{4} is 2."""
    if degree == 2 and isinstance(x, Fraction) and x >= 0:
        top, bottom = math.isqrt(x.numerator), math.isqrt(x.denominator)
        if top * top == x.numerator and bottom * bottom == x.denominator:
            return Fraction(top, bottom)
    return power(x, 1 / degree)


def factorial(x: Number) -> Number:
    if is_integer(x) and 0 <= x <= 1000:
        return Fraction(math.factorial(int(x)))
    x = inexact(x)
    if not -100 < mp.re(x) < MAX_FACTORIAL or abs(mp.im(x)) > 100:
        raise ValueError
    return mp.gamma(x + 1)


def binomial(n: Number, k: Number) -> Number:
    if is_integer(k) and 0 <= k <= 8:
        result = Fraction(1)
        for j in range(int(k)):
            result = times(result, times(plus(n, Fraction(-j)), Fraction(1, j + 1)))
        return result
    return times(factorial(n), 1 / times(factorial(k), factorial(plus(n, -k))))


def rounded(x: Number, function) -> Number:
    x = x if isinstance(x, Fraction) else mp.re(x)
    if not abs(x) < 10**40:
        raise ValueError
    return Fraction(int(function(x)))


def bounded(function):
    """The function of an argument that is not too large; zero where rounding hides it: sin(pi)."""
    def of(x: Number) -> Number:
        x = inexact(x)
        if abs(x) > MAX_LOG:
            raise ValueError
        y = function(x)
        return Fraction(0) if abs(y) < ROUNDING * abs(x) else y
    return of


def negative(x: Number) -> Number:
    return -x


def inverse(x: Number) -> Number:
    return 1 / x


def degrees(x: Number) -> Number:
    return times(x, mp.pi / 180)


CONSTANTS = {"e": +mp.e, "i": mp.mpc(0, 1), r"\pi": +mp.pi, r"\infty": mp.inf}
MPMATH = {"log": "ln", "arcsin": "asin", "arccos": "acos", "arctan": "atan",
          "arcsinh": "asinh", "arccosh": "acosh", "arctanh": "atanh", "lg": "log10"}
OPERATIONS = {name: bounded(getattr(mp, MPMATH.get(name, name))) for name in FUNCTIONS} | {
    "neg": negative, "/": inverse, "^": power, "root": root, "!": factorial, "°": degrees,
    "binom": binomial, "abs": abs,
    "floor": lambda x: rounded(x, math.floor if isinstance(x, Fraction) else mp.floor),
    "ceil": lambda x: rounded(x, math.ceil if isinstance(x, Fraction) else mp.ceil)}
SCALES = (1, 1, 16, Fraction(1, 10**3), Fraction(1, 10**7), 1, 1)  # of the points; see symbol


def symbol(name: str, point: int) -> Fraction:
    """A variable at a point: ordinary, large and tiny positive numbers, then of either sign."""
    digest = hashlib.blake2b(f"{name}@{point}".encode("ascii", "backslashreplace")).digest()
    x = Fraction(int.from_bytes(digest[:3], "big") + 2**22, 2**23) * SCALES[point]
    return -x if point == 5 or (point == 6 and digest[3] % 2) else x


def evaluate(tree: tuple, point: int) -> Number:
    """The value of a tree. Raises ValueError or an ArithmeticError where it has none."""
    kind, *parts = tree
    if kind in ("number", "unit"):
        return parts[0]
    if kind == "constant":
        return CONSTANTS[parts[0]]
    if kind == "name":
        return symbol(parts[0], point)
    if kind == "call":  # an unknown function: its value depends on name and arguments alone
        values = [mp.nstr(inexact(evaluate(part, point)), 20) for part in parts[1:]]
        values = sorted(values) if parts[0][1:] in CALLS else values
        return symbol(f"{parts[0]}({values})", 0)
    values = [evaluate(part, point) for part in parts]
    if kind in "+*":
        result = values[0]
        for x in values[1:]:
            result = plus(result, x) if kind == "+" else times(result, x)
        return result
    return OPERATIONS[kind](*values)


def close(x: Number, y: Number) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = inexact(x), inexact(y)
    return x == y or bool(abs(x - y) < TOLERANCE * max(abs(x), abs(y)))


# ------------------------------------------------------------------------------------- grammar
NAMES = {"\\" + name for name in [*GREEK.values(), *(
    "ell hbar aleph odot dot ddot hat widehat bar tilde widetilde overline mathbb mathcal "
    "mathfrak").split()] if name != "pi"}
# Units that are spelled without \text, after a space; words of four letters are units there, too.
BARE = ("cm mm km kg mg ml mL ft in lb lbs oz mph kph hr hrs min sec day yd mi sq per deg usd USD "
        "men way kW Hz Pa mol eV rad").replace(" ", "|")
SAME_UNITS = {name: unit for unit, names in {
    "meter": "m metre", "centimeter": "cm centimetre", "millimeter": "mm", "kilometer": "km",
    "inch": "in inche", "foot": "ft feet", "mile": "mi", "yard": "yd", "gram": "g",
    "kilogram": "kg", "milligram": "mg", "pound": "lb lbs", "ounce": "oz", "liter": "L litre",
    "milliliter": "ml mL", "second": "s sec", "minute": "min", "hour": "h hr", "day": "",
    "week": "", "month": "", "year": "", "cent": "", "dollar": "usd USD", "euro": "", "rupee": "",
    "degree": "deg", "radian": "rad", "percent": "percentage",
}.items() for name in (unit, *names.split())}
MULTIPLES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
             "trillion": 10**12, "dozen": 12}
NO_UNITS = set("not no or if unless except maybe is are was but else otherwise wrong plus minus "
               "times and either neither than less when where for all infty to".split())
OPENING, CLOSING = "([{⦃⟦⌊⌈", ")]}⦄⟧⌋⌉"
TOKEN = re.compile(
    r"(?:\d+\.?\d*|\.\d+)(?:[eE](?:-?\d+|\+\d\d+))?"
    r"|_\s*(?:\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\[A-Za-z]+|\d+|\w)"
    rf"|(?P<unit>(?<=[ /])(?:(?:{BARE})(?![\w'(])|[mshgLNJWVK](?!\ *[\w'(\\]))"
    r"|(?<=\d)(?:cm|mm|ft|mph|lbs|hrs)\b|(?<=\ )[A-Za-z]{4,})"
    r"""|"[^"]*"|\\?[A-Za-z]+|\\.|\S""", re.ASCII)
SUM, PRODUCT, POWER, END = 1, 2, 3, " "  # how tightly operators bind
BINDING = {"+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER, "!": POWER, "°": POWER}
CLOSERS = {"(": ")", "[": "]", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉"}
MARKS = {"|": "abs", "⌊": "floor", "⌈": "ceil"}


def tokenize(s: str, units: bool) -> list[str]:
    r"""Numbers, single letters and \macros with subscripts and primes, units after a quote."""
    tokens: list[str] = []
    for m in TOKEN.finditer(s):
        token = m[0]
        word = token.strip('"')
        is_unit = units and m["unit"] and (tokens or m.start()) and word not in WORDS - {"min"}
        if token[0] in "_'" and tokens:
            tokens[-1] += token if len(token) == 1 else re.sub(r"\s", "", token)
        elif is_unit or (token[0] == '"' and (units or len(word.strip()) != 1)):
            tokens.append('"' + word)
        elif word in WORDS:
            tokens.append("\\" + word)
        else:
            tokens += word.strip() if word.strip().isalpha() else [word]
    if len(tokens) > MAX_TOKENS:
        raise ValueError
    return tokens


def is_number(token: str) -> bool:
    return bool(re.match(r"\.?\d[^_]*$", token))


class Parser:
    """Reads the tree of an expression: (kind, parts...); raises ValueError where there is none."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.i = [*tokens, END], 0
        self.depth = self.bars = self.functions = 0  # operands, | and functions that are open

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

    def expression(self, floor: int = 0) -> tuple:
        """An operand and all that follows with operators that bind tighter than floor."""
        signed, minus = self.next in "+-", False
        while self.next in "+-":
            minus ^= self.take() == "-"
        x = self.expression(max(floor, SUM)) if signed else self.operand()
        if minus:
            x = ("neg", x)
        while True:
            implied = self.starts_operand()
            op = "*" if implied else self.next
            if BINDING.get(op, 0) <= floor:
                return x
            self.i += not implied
            x = self.operation(op, x)

    def operation(self, op: str, x: tuple) -> tuple:
        if op == "!":
            if self.next == "!":
                raise ValueError
            return ("!", x)
        if op == "°":  # 30° is 30, but sin 30° is 1/2
            return ("°", x) if self.functions else x
        if op == "^":
            x = ("^", x, self.argument())
            if self.next == "^":
                raise ValueError
            return x
        y = self.expression(BINDING[op])
        kind = "+" if op in "+-" else "*"
        if op in "-/":
            y = ("neg" if op == "-" else "/", y)
        return (*x, y) if x[0] == kind else (kind, x, y)

    def starts_operand(self) -> bool:
        r"""Whether the next token continues a product without an operator: 2x, 3(x+1), x\sqrt2."""
        token = self.next
        if is_number(token) and is_number(self.tokens[self.i - 1]):  # "3 4" is not a product
            raise ValueError
        if token == "|":
            return not self.bars
        named = token[0] in ".\\" and len(token) > 1 and token != "..."
        return token[0].isalnum() or named or token in "([{⌊⌈"

    def argument(self, digit: bool = False) -> tuple:
        r"""What follows ^, \frac, \sqrt: a group or a token; with digit, one digit (\frac12)."""
        if self.skip("-"):
            return ("neg", self.argument(digit))
        if not digit or not is_number(self.next):
            return self.operand()
        token = self.take()
        if len(token) > 1:
            self.i -= 1
            self.tokens[self.i] = token[1:]
        return ("number", Fraction(token[0]))

    def operand(self) -> tuple:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError
        x = self.primary(self.take())
        self.depth -= 1
        return x

    def primary(self, token: str) -> tuple:
        base_name, _, subscript = token.partition("_")
        if is_number(token):
            mantissa, _, exponent = token.lower().partition("e")
            scale = power(Fraction(10), Fraction(exponent or 0))
            return ("number", times(Fraction(f"0{mantissa.removesuffix('.')}"), scale))
        if token in CLOSERS:
            return self.group(token)
        if token in CONSTANTS:
            return ("constant", token)
        if base_name[1:] in FUNCTIONS:
            return self.function(base_name[1:], subscript)
        if base_name[1:] in CALLS and self.next == "(":
            return self.call(token)
        if token[0].isalnum() or base_name.rstrip("'") in NAMES:  # 52_8 is a name as well
            return self.name(token)
        if token == r"\frac":
            return ("*", self.argument(digit=True), ("/", self.argument(digit=True)))
        if token == r"\binom":
            return ("binom", self.argument(digit=True), self.argument(digit=True))
        if token == r"\sqrt":
            degree = self.operand() if self.next == "[" else ("number", Fraction(2))
            return ("root", self.argument(), degree)
        raise ValueError

    def group(self, opening: str) -> tuple:
        bars, self.bars = self.bars, opening == "|"
        x = self.expression()
        self.take(CLOSERS[opening])
        self.bars = bars
        return (MARKS[opening], x) if opening in MARKS else x

    def name(self, name: str) -> tuple:
        """A variable with subscript and primes, or a call: f(x+1), I(0), u(x, t)."""
        ahead = " ".join(self.tokens[self.i:self.i + 12])
        simple = re.match(r"\( [\\\w.]+ (?:, [\\\w.]+ )*\)", ahead)
        if self.next == "(" and (simple or name[0] in "fg" or "'" in name):
            return self.call(name)
        return ("name", re.sub(r"[{}]", "", name))

    def call(self, name: str) -> tuple:
        self.take("(")
        arguments = [self.expression()]
        while self.skip(","):
            arguments.append(self.expression())
        self.take(")")
        return ("call", name, *arguments)

    def function(self, name: str, base: str) -> tuple:
        r"""\sin x, \sin(x), \sin^2 x, \sin^{-1} x, \log_2 x: the argument ends at an operator."""
        exponent = self.argument() if self.skip("^") else None
        if exponent == ("neg", ("number", 1)):
            if "arc" + name not in FUNCTIONS:
                raise ValueError
            name, exponent = "arc" + name, None
        self.functions += 1
        bracketed = self.next in "([{|"
        x = self.operand() if bracketed else self.expression(PRODUCT)
        while not bracketed and self.starts_operand() and self.next[1:] not in FUNCTIONS:
            x = ("*", x, self.expression(PRODUCT))
        self.functions -= 1
        x = (name, x)
        if base:
            inner = Parser(tokenize(base, units=False))
            inner.depth = self.depth + 1
            x = ("*", x, ("/", ("ln", inner.whole())))
        return ("^", x, exponent) if exponent else x

    def whole(self) -> tuple:
        x = self.expression()
        if self.next != END:
            raise ValueError
        return x


def read_unit(tokens: list[str]) -> tuple[frozenset, int]:
    """A trailing unit -> the units that have a name here, and its factor (million)."""
    text = " ".join(token[1:] for token in tokens if token[0] == '"')
    others = "".join(token for token in tokens if token[0] != '"')
    words = re.findall("[A-Za-z]+", text)
    exponents = re.fullmatch(r"(?:[*/]|\^(?:\d|\{-?\d\}))*", others)
    digits = re.search(r"(?<![\^A-Za-z-])\d", text)
    if tokens and (tokens[0][0] != '"' or digits or not exponents):
        raise ValueError
    if NO_UNITS & {word.lower() for word in words} or len(words) > 6:
        raise ValueError
    names = [SAME_UNITS.get(word, SAME_UNITS.get(word.lower().removesuffix("s"))) for word in words]
    factors = [MULTIPLES.get(word.lower().removesuffix("s"), 1) for word in words]
    return frozenset(filter(None, names)), math.prod(factors)


@lru_cache(maxsize=8192)
def parse(s: str, units: bool) -> tuple[tuple, frozenset] | None:
    """Tree and unit; None if s is no expression. With units, letters after a space are one."""
    try:
        parser = Parser(tokenize(s, units))
        tree = parser.expression()
        unit, factor = read_unit(parser.tokens[parser.i:-1])
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return (("*", tree, ("unit", Fraction(factor))) if factor > 1 else tree), unit


@lru_cache(maxsize=16384)
def value(tree: tuple, point: int) -> Number | None:
    try:
        x = evaluate(tree, point)
        return None if mp.isnan(inexact(x)) else x
    except (ValueError, ArithmeticError, RecursionError, TypeError):  # a pole, a size over a limit
        return None


def walk(tree: tuple):
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from walk(part)


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
    if len(s) < 2 or s[0] not in brackets or s[-1] not in CLOSING:
        return None
    depths = list(accumulate((c in OPENING) - (c in CLOSING) for c in s))
    return s[1:-1].strip() if depths[-1] == 0 and min(depths[:-1]) > 0 else None


def signs(s: str) -> list[str]:
    r"""The readings of ±: all combinations, or two where ∓ ties them together."""
    count = s.count("±")
    if "∓" in s:
        upper, lower = str.maketrans("±∓", "+-"), str.maketrans("±∓", "-+")
        return [s.translate(upper), s.translate(lower)]
    if not 0 < count <= 3:
        return [s]
    return ["".join(map("".join, zip(s.split("±"), (*chosen, ""), strict=True)))
            for chosen in product("+-", repeat=count)]


def items(s: str) -> list[str]:
    """The members of a list, set or union; any other answer is a list of one. ± gives several."""
    content = inside(s, "⦃")
    if content is not None or s == r"\emptyset":
        return items(content) if content else []
    parts = split(s, ",∪∨∧")[0]
    if len(parts) > 1:
        equations = [split(part, "=") for part in parts]
        if equations[0][1] == "=" and not any(found for _, found in equations[1:]):
            parts[0] = equations[0][0][1]  # x = 1, 2
        return [item for part in parts for item in items(part)]
    content = inside(s, "([{")
    if content is not None and s[0] + s[-1] in ("()", "[]", "{}"):
        if not split(content, ",")[1]:
            return items(content)
    readings = signs(s)
    return readings if len(readings) > 1 else [s]


def scaled(s: str) -> str:
    """A matrix with a coefficient: every entry divided by the coefficient's inverse."""
    factor, opening, rest = s.partition("⟦")
    if not factor.strip(" *([{") or "=" in factor or not rest.endswith("⟧") or "⟦" in rest:
        return s
    rows = [" & ".join(rf"\frac{{{cell}}}{{1/({factor})}}" for cell in row.split("&"))
            for row in rest[:-1].split("¦")]
    return "⟦" + "¦".join(rows) + "⟧"


# --------------------------------------------------------------------------------- work to do
def is_constant(tree: tuple) -> bool:
    return not any(part[0] in ("name", "call") for part in walk(tree))


def is_nameless(tree: tuple) -> bool:
    """Numbers alone: no variable, and not e, i or \\pi."""
    return not any(part[0] in ("name", "call", "constant") for part in walk(tree))


def is_rational(tree: tuple) -> bool:
    if tree[0] == "^" and not is_rational(tree[2]):
        return False
    if tree[0] == "^" and any(part[0] == "/" for part in walk(tree[2])):
        return False
    if tree[0] in ("number", "unit"):
        return True
    known = tree[0] in ("+", "*", "/", "neg", "^", "!", "binom")
    return known and all(map(is_rational, tree[1:]))


def is_scientific(tree: tuple) -> bool:
    """3 × 10^8"""
    ten = ("number", Fraction(10))
    if len(tree) != 3 or tree[2][0] != "^":
        return False
    return tree[2][1] == ten and tree[1][0] in ("number", "neg")


def left_to_do(tree: tuple, kinds: str, test) -> bool:
    """Whether some sum or product (kinds) has two parts that pass the test and could be joined."""
    for node in walk(tree):
        if node[0] in kinds and not is_scientific(node):
            parts = [part for part in node[1:] if part[0] not in ("/", "unit") and test(part)]
            over = [part for part in node[1:] if part[0] == "/" and test(part)]
            if len(parts) > 1 or len(over) > 1:
                return True
    return False


def worked(answer: tuple, gold: tuple) -> bool:
    """Whether an answer is worked out as far as the gold is (policy 2)."""
    if not is_constant(gold) or left_to_do(gold, "+*", is_rational):
        return True
    if left_to_do(answer, "+*", is_rational):
        return False
    irrational = {part[1] for part in walk(gold) if part[0] == "constant"} | {
        part[0] for part in walk(gold) if part[0] in FUNCTIONS}
    if not irrational and is_rational(gold) and left_to_do(answer, "+*", is_nameless):
        return False
    if "i" in irrational or irrational & set(FUNCTIONS) or left_to_do(gold, "+", is_constant):
        return True
    return not left_to_do(answer, "+", is_constant)


def points(answer: tuple, gold: tuple) -> range:
    """The points where two trees are compared."""
    if is_constant(answer) and is_constant(gold):
        return range(1)
    signed = any(part[0] in ("abs", "floor", "ceil") for part in (*walk(answer), *walk(gold)))
    return range(7 if signed else 5)


# ------------------------------------------------------------------------------------ relations
RELATIONS = "=≈<>≤≥≠∈"
SUBSCRIPT = r"(?:_\w|_\{[^{}]*\})?'*"
VARIABLE = re.compile(rf"(?:\\[A-Za-z]+|[A-Za-z]){SUBSCRIPT}")
MIDDLE = re.compile(VARIABLE.pattern + r"(?: ?\([^()]*\))?")
NAME = rf"""(?:\\?[A-Za-z]+|"[^"]*"){SUBSCRIPT}"""
LABEL = re.compile(  # x, f(2), AB, (x, y), Total area, |AB|, ∠A, P(A|B), dy/dx, sin A, ∫..., M ∩ N
    rf"{NAME}(?: ?\([^()]*\))?|\( ?{NAME}(?: ?, ?{NAME})* ?\)|[A-Za-z ]*|\| ?{NAME} ?\|"
    rf"|m? ?\\(?:angle|triangle|overline) ?_?\{{?[A-Z ]+\}}?|\\(?:int|sum|prod|lim)(?![A-Za-z]).*"
    rf"|\\frac ?\{{ ?d[^{{}}]*\}} ?\{{ ?d[^{{}}]*\}}|\\[a-z]+{SUBSCRIPT} ?[A-Za-z]"
    rf"|{NAME} ?\\c[au]p ?{NAME}")
LOOSE_LABEL = re.compile(  # m + n: names without numbers
    r"""(?=.*[A-Za-z])(?!-)(?:[A-Za-z\\+*/|()'" -]|_\w|_\{[^{}]*\})+""")
FLIP = str.maketrans("<≤>≥", ">≥<≤")


def relation(s: str) -> tuple[list[str], str]:
    parts, ops = split(s, RELATIONS)
    if ops and set(ops) <= set(">≥"):
        return parts[::-1], ops[::-1].translate(FLIP)
    return parts, ops


def constant_value(s: str) -> Number | None:
    found = parse(s, False)
    if found is None or not is_constant(found[0]) or VARIABLE.fullmatch(s):
        return None
    return value(found[0], 0)


def stated(parts: list[str], ops: str, strict: bool) -> str | None:
    """What a relation says: x = 5 says 5, x ∈ A says A, 2 < x ≤ 3 says (2, 3]; None if nothing."""
    loose = not strict and parts[-1] != "0" and LOOSE_LABEL.fullmatch(parts[0])
    if ops == "=" and VARIABLE.fullmatch(parts[1]) and constant_value(parts[0]) is not None:
        return parts[0]
    labelled = bool(loose or LABEL.fullmatch(parts[0]))
    if set(ops) <= {"=", "≈"}:
        values = [constant_value(part) for part in split("=".join(parts), "=")[0]]
        values = [x for x in values if x is not None]
        if "≈" not in ops and values and not all(close(x, values[0]) for x in values):
            return None  # 15 + 12 = 28 says nothing
        rounded_at = ops.find("≈", labelled)  # \sqrt2 ≈ 1.41 says \sqrt2
        last = parts[rounded_at] if rounded_at >= 0 else parts[-1]
        return last if labelled or not ops or constant_value(parts[0]) is not None else None
    if ops == "∈" and labelled:
        return parts[1]
    if set(ops) <= {"<", "≤"}:
        if len(ops) == 1 and VARIABLE.fullmatch(parts[0]):  # one end is infinite
            ops, parts = "<" + ops, [r"-\infty", *parts]
        elif len(ops) == 1:
            ops, parts = ops + "<", [*parts, r"\infty"]
        if len(ops) == 2 and MIDDLE.fullmatch(parts[1]):
            opening, closing = "[" if ops[0] == "≤" else "(", "]" if ops[1] == "≤" else ")"
            return f"{opening}{parts[0]},{parts[2]}{closing}"
    return None


def region(s: str) -> str:
    r"""Conditions on one variable as intervals: x>1 and x<5, x<1 or x>2, x≠2, \mathbb{R}\{2}."""
    parts, ops = split(s, "∨∧,")
    without = re.fullmatch(r"\(-\\infty ?, ?\\infty ?\) ?[∖-] ?⦃([^⦃⦄]*)⦄", s)
    sides = [relation(part) for part in parts]
    if without or (all(found == "≠" for _, found in sides) and set(ops) <= {"∧", ","}):
        holes = split(without[1], ",")[0] if without else [side[0][1] for side in sides]
        if all(constant_value(hole) is not None for hole in holes):
            holes.sort(key=lambda hole: mp.re(inexact(constant_value(hole))))
            ends = [r"-\infty", *holes, r"\infty"]
            return "∪".join(f"({x},{y})" for x, y in zip(ends[:-1], ends[1:], strict=True))
    if not ops or not all(set(found) <= set("<≤") and found for _, found in sides):
        return s
    intervals = [stated(*side, strict=True) for side in sides]
    if None in intervals:
        return s
    if "∨" in ops:
        return "∪".join(intervals) if set(ops) == {"∨"} else s
    low = [x for x in intervals if not x.startswith(r"(-\infty")]
    high = [x for x in intervals if not x.endswith(r"\infty)")]
    if len(intervals) == 2 and len(low) == len(high) == 1:
        return split(low[0][1:-1], ",")[0][0].join((low[0][0], ",")) + (
            split(high[0][1:-1], ",")[0][1] + high[0][-1])
    return s


def says(s: str) -> str:
    """What an answer states, "" if nothing."""
    return stated(*relation(s), strict=True) or ""


def as_tuple(s: str) -> str:
    """x = 3, y = 4 and a column vector as (3,4); anything else as it is."""
    content = inside(s, "⟦")
    if content is not None and "&" not in content:
        return f"({content.replace('¦', ',')})"
    sides = [relation(part) for part in split(s, ",∧")[0]]
    labels = [parts[0] for parts, _ in sides]
    if len(set(labels)) < len(sides) or len(sides) < 2 or any(ops != "=" for _, ops in sides):
        return s
    return "(" + ",".join(parts[1] for parts, _ in sorted(sides)) + ")"


def same_relation(a: str, g: str, same) -> bool | None:
    """Equations and inequalities; one against a value: what it states. None: neither is one."""
    (left, a_ops), (right, g_ops) = relation(a), relation(g)
    if not a_ops and not g_ops:
        return None
    if a_ops != g_ops:
        x, y = stated(left, a_ops, strict=False), stated(right, g_ops, strict=True)
        return x is not None and y is not None and same(x, y)
    if all(map(same, left, right)):
        return True
    if a_ops in "=≠" and same(left[0], right[1]) and same(left[1], right[0]):
        return True
    solved = [VARIABLE.fullmatch(x) and constant_value(y) is not None
              for x, y in (right, right[::-1])] if len(right) == 2 else [True]
    if any(solved) or a_ops not in "=≠<≤":
        return False
    trees = [parse(f"({x})-({y})", False) for x, y in (left, right)]
    if None in trees or any(is_constant(tree) for tree, _ in trees):
        return False
    pairs = [[value(tree, p) for tree, _ in trees] for p in range(4)]
    if any(x is None or y is None or x == 0 or y == 0 for x, y in pairs):
        return False
    varies = [any(not close(pair[k], pairs[0][k]) for pair in pairs) for k in (0, 1)]
    ratios = [inexact(x) / inexact(y) for x, y in pairs]
    positive = a_ops in "=≠" or mp.re(ratios[0]) > 0
    return all(varies) and positive and all(close(ratio, ratios[0]) for ratio in ratios)


# ---------------------------------------------------------------------------------------- text
def squeezed(s: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", s)  # "1 1/2" is not "11/2"


def brackets_of(s: str) -> int:
    """How deep brackets are nested."""
    return max(accumulate((c in OPENING) - (c in CLOSING) for c in s))


def plain(s: str) -> str:
    """An answer as text: no quotes, articles, punctuation or case."""
    words = re.sub(r'["(),!]|(?<!\d)\.|\.(?!\d)', " ", s.replace(".m.", "m")).split()
    words = [word.casefold() for word in words]
    return "".join(word for word in words if word not in ("a", "an", "the"))


def is_text(s: str) -> bool:
    """Whether an answer consists of words: yes, Navin, an ellipse, (iv), HHT. Not xy or sin x."""
    words = re.findall(r"[^\W\d_]+", s)
    if WORDS & set(words) or re.search(r"\\(?!text)", s):
        return False
    if re.search(r"\d:\d\d ?\"? ?[AaPp]|\d[^\d\\,∨∧]{0,30}[a-z]{3}[^\d\\,∨∧=^]{0,30}\d", s):
        return True  # a time of day, 5 hours 30 minutes
    if re.search(r"[\d=+*/^_|<>∨≈≠≤≥]|-\s", s):
        return False
    quoted = re.fullmatch(r'"[^"]*"', s) and len(s) > 3
    word = re.compile("[ivx]{2,}|[IVX]{2,}|[A-Z]{3}|[A-Z][a-z]+|(?i:yes|no)")
    return bool(quoted) or any(len(w) > 3 or word.fullmatch(w) for w in words)


def choice(s: str) -> tuple[str, str]:
    """The letter of a multiple-choice answer and what follows it: C, (C), C. 12; or two ""."""
    m = re.fullmatch(r"\(?([A-J])(?:[).:] ?(.*))?", s.replace('"', ""))
    if not m or re.search(r"\b[A-J][).:]|∨|∧", m[2] or ""):
        return "", ""
    return m[1], (m[2] or "").strip()
