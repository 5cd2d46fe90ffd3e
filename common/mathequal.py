r"""The grammar behind verify.py: one spelling per symbol, values of expressions, lists and sets.

`normalize` gives LaTeX, Unicode and plain text one spelling, `parse` reads a tree, `value` computes
it at a point with mpmath to 110 digits, where a variable has a fixed pseudo-random value. Nothing
is executed, simplified or solved, every size is bounded (MAX_). What the grammar does not know
(\sum, f(x)) has no value and matches as a string.
"""
import random
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import combinations

import mpmath

MAX_CHARS, MAX_EXPRESSION, MAX_BRACKETS, MAX_ITEMS = 1_500, 600, 100, 50  # of an answer
LOWEST = "2 3 5 6 7 10 11 12 13 14 15 17 19 20".split()  # bases of powers that count as worked
MAX_DIGITS, MAX_LOG = 60, 10**5  # of a number, of |log x^y|

mp = mpmath.mp.clone()  # a context of its own: the caller's precision stays as it is
mp.dps = 110
TOLERANCE = mp.mpf("1e-70")  # relative difference of equal values

# ------------------------------------------------------------------------------------ spelling
GREEK = (
    r"α\alpha β\beta γ\gamma δ\delta ε\epsilon ζ\zeta η\eta θ\theta ι\iota κ\kappa λ\lambda μ\mu "
    r"ν\nu ξ\xi ρ\rho σ\sigma τ\tau υ\upsilon φ\phi χ\chi ψ\psi ω\omega Γ\Gamma Δ\Delta Θ\Theta "
    r"Λ\Lambda Ξ\Xi Π\Pi Σ\Sigma Φ\Phi Ψ\Psi Ω\Omega")
SIGNS = (r"π\pi √\sqrt ∞\infty ∅\emptyset ℝ\mathbb{R} €\text{euros} £\text{pounds} ¥\text{yen} "
         r"₹\text{rupees} ¢\text{cents}")
UNICODE = str.maketrans({sign[0]: sign[1:] + " " for sign in f"{GREEK} {SIGNS}".split()})
UNICODE |= str.maketrans("×·⋅÷⁄∕−–’′~⟨⟩、;º⩽⩾", "***///--'' (),,°≤≥", '"')
FUNCTIONS = (
    "sin cos tan cot sec csc sinh cosh tanh coth exp ln log lg "
    "arcsin arccos arctan arcsinh arccosh arctanh abs lfloor lceil").split()
WORDS = {*FUNCTIONS, "pi", "sqrt", "infty"}
SYNONYMS = {name: symbol for symbol, *names in map(str.split, (
    r"* cdot times ast; / div; : colon; ≤ le leq leqslant; ≥ ge geq geqslant; < lt; > gt; ≠ ne neq;"
    r"≈ approx; ∈ in; ∪ cup; ± pm; ° degree degrees circ; ' prime; ( langle; ) rangle;"
    r"⦃ lbrace; ⦄ rbrace; | vert lvert rvert mid; ... ldots dots cdots; \emptyset varnothing;"
    r"∨ lor vee; ∧ land wedge; ∖ setminus backslash; \phi varphi; \binom dbinom tbinom choose;"
    r"\frac dfrac tfrac cfrac sfrac nicefrac over").split(";")) for name in names}
SYNONYMS |= dict.fromkeys(
    "therefore left right big Big displaystyle textstyle quad qquad large Large".split(), " ")
FONT = (r"\\(?:text(?!color)\w*|[mf]?box(?:ed)?|emph|underline|math(?:rm|bf|it|sf|tt)|operatorname"
        r"|boldsymbol|bm|rm|bf|it)\b")
LETTER = r"(?:\\[A-Za-z]+|[A-Za-z])(?:_\w|_\{[^{}]*\})?"
LEADING = "the|points?|is|are|either|about|approximately|exactly|answers?|option|choice"


def improper(m):  # 1 4/5 is (9/5)
    whole, top, bottom = (int(group) for group in m.groups() if group)
    return f"({whole + Fraction(top, bottom)})" if top < bottom else m[0]


def repeating(m):  # 0.1\overline{6} is (1/6)
    head, tail = m[1] + m[2], m[m.lastindex]
    nines = (10 ** len(tail) - 1) * 10 ** len(m[2])
    return f"({Fraction(int(head + tail) - int(head or 0), nines)})"


def scaled(m):  # \frac12 ⟦2&4⟧ is ⟦1&2⟧
    k = Fraction(int(m[1] + (m[2] or m[4] or "1")), int(m[3] or "1"))
    return "⟦" + re.sub(r"-?\d+", lambda n: f"{k * int(n[0])}", m[5]) + "⟧"


def quote(m):
    text = re.sub(rf"[{{}}]|{FONT}", "", m[1])
    name = text.strip()
    return f" {name} " if name in (*WORDS, "e", "i", "d", "x") else f'"{text}"'


POWERS = {"k": "*10^{3} ", "thousand": "*10^{3} ", "million": "*10^{6} ", "billion": "*10^{9} "}
SPELLINGS = r"\\¦ \cr¦ \{⦃ \}⦄ \&, \not=≠ <=≤ >=≥ !=≠ **^ ⇒⟹ EUR€ GBP£ \pounds£".split()
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"^([^$]*)(?<!\\)\$([^$]*)$", r"\1\\$\2"), (r"\\(?:text)?color\s*\{\w*\}", ""),
    (r"\\\$(?= ?(?:[\d.]|\\f))|USD\b", r"\\text{dollars}"), (r"¦?\s*\\end\s*\{\w*\}", "⟧"),
    (r"\bRs\.?(?=[ }]*\d)", r"\\text{rupees}"), (r"(?s)^.*(?:\\implies|\\Rightarrow|⟹)", ""),
    (r"\\begin\s*\{(?:(?:[pb]|small)?matrix|array|cases|aligned)\}(?:\s*\{[clr| ]*\})?", "⟦"),
    (r"(?<=\d)(?:\{,\}|\\!|,\\!|\\,|\\ |\\;)\s*(?=\d{3}(?!\d))", ""),  # 10{,}000  10,\!000  10\,000
    (r"\\[;:> ,]", " "), (r"\\[!()\[\]$%]|[$%`]", ""),
    (FONT + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}", quote), (r"\{\s*\\(?:bf|rm)\b\s*([^{}]*)\}", quote),
    (r"\\(?:bf|rm|it)\b", ""), (r"\\([A-Za-z]+)", lambda m: SYNONYMS.get(m[1], m[0])),
    (r"\{([^{}]*)(\\frac|\\binom)\b *([^{} ][^{}]*)\}(?!\{)", r"\2{\1}{\3}"),  # {n \choose 2}
    (r"\\(frac|binom)\s*(\d)", r"\\\1{\2}"), (r'\\frac ?\{("[^"]*")\} ?\{("[^"]*")', r"\1/{\2"),
    (r"\\(frac|binom)\s*(\{[^{}]*\})\s*(\d)", r"\\\1\2{\3}"),
    (r'\^\s*\{?\s*(?:°|"?o\b"?)\s*\}?', "°"), (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"),
    (rf"(?<![\\A-Za-z])({'|'.join(WORDS)})(?![A-Za-z])", r"\\\1 "), (r"\^ ?-(\w+)", r"^{-\1}"),
    (r"(?<![\d.])(\d{0,20})\.(\d{0,12}?)(?:\\(?:overline|bar|dot) ?\{?(\d{1,12})\}?|\((\d{1,12})\)"
     r"|(?:(\d)\5\5+|(\d{2,9})\6+)\.\.\.)(?![\d.])", repeating),
    (r"\\(sin|cos|tan)(h?) ?\^ ?\{-1\}", r"\\arc\1\2 "), (r"\((\d+)\) ?_", r"\1_"),
    (r',?\s*(?:"[\s,]*or\s*"|\bor\b)', "∨"), (r',?\s*(?:"[\s,]*and\s*"|\band\b)', "∧"),
    (r'(?i)"?\b(?:(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?)(?: exists?)?'
     r'|(?:the )?empty set)\b"?', r"\\emptyset "), (r'(?i)"?\bdoes not exist\b"?', '"DNE"'),
    (r'(?i)"?\binfinity\b"?', r"\\infty "), (r'^([^"]*)"([^"]*)$', r"\1\2"),
    (r'(?i)"?\ball real(?: number)?s\b"?|\\mathbb ?\{? ?R ?\}?(?! ?[_^])', r"(-\\infty ,\\infty )"),
    (r'[\s,("]*\b(?:because|since)\b.*$|[\s"]*[,(] ?"?(?:which|as|where)\b.*$', ""),
    (r'"([^"]*)"', lambda m: m[0] if re.search("[A-Za-z]", m[1]) else f" {m[1]} "),
    (r'^\s*"([^"]*[\d=,∨∧][^"]*)"\s*$', r"\1"),
    (r'(?i)^"(?!.*\bnot?\b)[^"]*[a-z]{2}(?::| is| are) *" ?(?=.)', ""),
    (rf'(?i)^[\s"]*(?:(?:{LEADING})\b[\s":]*)+(?=[\W\dA-Z])', ""),
    (r'(?<=\d) ?"?\s*(thousand|million|billion|k(?="(?! ?\\)))\b\s*"?', lambda m: POWERS[m[1]]),
    (r'("(?:dollars|euros|pounds|yen|rupees) *") *([\d.,]+(?:\*10\^\{\d+\})?)', r"\2 \1"),
    (r"\\(max|min|gcd) ?⦃([^⦃⦄]*)⦄", r"\\\1(\2)"), (r"[(\[] ?(⟦[^⟦⟧]*⟧) ?[)\]]", r"\1"),
    (r"^⦃ ?\w(?: ?∈ ?\(-\\infty ,\\infty \))? ?[|:] ?([^⦃⦄]*)⦄$", r"\1"),  # {x | 1 < x < 5}
    (r"\|([^|]+)\|", r"\\abs(\1)"), (r"\\l(floor|ceil)\b(.*?)\\r\1\b", r"\\l\1(\2)"),
    (r"\(-\\infty ,\\infty \) ?[-∖] ?⦃([^⦃⦄,]*)⦄", r"(-\\infty ,\1)∪(\1,\\infty )"),
    (r'(?:, ?)?& ?(?:"(?:if|for|when) ?")?', "&"), (r"^0 ?(?:\+ ?)?(?=-?[\d.]* ?i$)", ""),
    (r"^(-?) ?(?:\\frac ?\{(\d+)\} ?\{(\d*[1-9])\}|(\d*)) ?⟦([-\d&¦ ]*)⟧$", scaled),
    (r'(?i)^"?(yes|no), (?!.*\b(?:yes|no|but|or|maybe|unless|if)\b).*$', r"\1"), (r"& ?=", "="),
    (r"\s+", " "),
    (r"(?<![\w.^}])(\d+) ?(?:\\frac ?\{(\d+)\} ?\{(\d+)\}|(?<= )(\d+) ?/ ?(\d+))", improper),
    (r"^[\s=≈,:]+|[\s,:]*(?<!\.)[\s,:.\\]\s*$", ""),
    (r"^(\w ?)([<≤][^∧]+)∧ ?(\1[>≥][^∧]+)$", r"\3∧\1\2"),  # x < 5 ∧ x > 1 is 1 < x < 5
    (r"^(\w) ?> ?([^∧]+)∧ ?\1 ?([<≤][^∧]+)$", r"\2<\1\3"),
    (r"^(\w) ?≥ ?([^∧]+)∧ ?\1 ?([<≤][^∧]+)$", r"\2≤\1\3"),
    (rf"^(?:[A-Z] ?∪ ?)?{LETTER} ?= ?(?=[^=]*[,∨∧][^=]*$)", ""),  # x = 1, 2
    (r"^⦃? ?⟦([^&⟦⟧]*=[^&⟦⟧]*)⟧$", lambda m: m[1].replace("¦", ",")),  # the rows of a system
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])", lambda m: m[0].replace(" ", "")),
]]


@lru_cache(maxsize=4096)
def normalize(s: str) -> str:
    """One spelling for each symbol; no layout, no percent signs, no thousands separators."""
    s = re.sub(r"([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", r"^{\1}", " ".join(s.split()))
    s = re.sub(r"([₀-₉]+)", r"_{\1}", s)
    s = re.sub(r"([¼½¾⅓⅔])", r" \1 ", s).translate(UNICODE)
    s = unicodedata.normalize("NFKC", s)
    for spelling in SPELLINGS:
        s = s.replace(spelling[:-1], spelling[-1])
    s = s.translate(UNICODE)
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    if re.search(r"[(\[⦃]|^\d{3}(?:,\d{3})+$", s):
        return s  # (100,200) may be a tuple, 100,200 a list
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda m: m[0].replace(",", ""), s)


# -------------------------------------------------------------------------------------- values
CONSTANTS = {"e": +mp.e, "i": mp.mpc(0, 1), r"\pi": +mp.pi, r"\infty": mp.inf}
OPERATIONS = {name: getattr(mp, name.replace("arc", "a"), None) for name in FUNCTIONS} | {
    "lg": mp.log10, "abs": abs, "^": mp.power, "!": mp.factorial, "binom": mp.binomial,
    "lfloor": mp.digamma, "lceil": mp.lambertw,  # anything that nothing else is equal to
    "neg": mp.fneg, "+": mp.fadd, "*": mp.fmul, "/": lambda x: 1 / x, "°": mp.radians}
LIMITS = {f: 75 if f[-1] == "h" else MAX_LOG for f in FUNCTIONS} | {"!": 5_000, "binom": 5_000}
SCALES = (1, 16, 1e-3, 1e-7, -1, -1, -1)  # of the points: ordinary, large, tiny, negative ones


def over_limit(kind, values):
    sizes = [abs(x) for x in values if x != 0]
    if kind == "+" and sizes and min(sizes) <= 100 * TOLERANCE * max(sizes):
        return True  # a term that is not visible in the sum
    if kind == "^" and values[0] != 0 and abs(values[1] * mp.ln(values[0])) > MAX_LOG:
        return True
    return kind != "neg" and any(size >= LIMITS.get(kind, mp.inf) for size in sizes)


@lru_cache(maxsize=8192)
def value(tree, point=0):  # None where there is none: a pole, a size over a limit
    try:
        kind, *parts = tree
        if kind == "number":
            return mp.mpf(parts[0])
        if kind == "name":  # at the last two points some are negative
            sign = -1 if point > 4 and ord(parts[0][-1]) & point - 4 else 1
            x = random.Random(f"{parts[0]} {point}").random() + 0.5
            return mp.mpf(x * sign * SCALES[point])
        if kind in CONSTANTS:
            return CONSTANTS[kind]
        values = [value(part, point) for part in parts]
        if None in values or over_limit(kind, values):
            return None
        x = reduce(OPERATIONS[kind], values) if kind in "+*" else OPERATIONS[kind](*values)
        return None if mp.isnan(x) or (SCALES[point] < 0 and mp.im(x)) else x  # \sqrt{-1}
    except (ValueError, ArithmeticError, RecursionError, TypeError):
        return None


def close(x, y):
    return x == y or mp.almosteq(x, y, TOLERANCE, 0)


# ------------------------------------------------------------------------------------- grammar
NAMES = {*re.findall(r"\\\w+", GREEK), r"\ell", r"\hbar"}
OPENING, CLOSING = "([{⦃⟦", ")]}⦄⟧"
TOKEN = re.compile(
    r"(?:\d+\.?\d*|\.\d+)(?:[eE](?:-?\d{1,4}(?!\d)|\+\d{2,4}))?(?! ?_)"
    r"|(?:\\[A-Za-z]+|[A-Za-z]|\d+)(?: ?_ ?(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|\d+|\w))?'*"
    r"""|"\s*[A-Za-z]\s*"|\S""", re.ASCII)
CALL = re.compile(  # f(x+1), I(0), u(x, t), dy/dx: a function without a value
    r"\\frac ?\{ ?(?:d|\\partial)(?![a-z]{2}).*?\{ ?(?:d|\\partial) ?[a-z]|\bd\w ?/ ?d\w|"
    r"(?<![\\A-Za-z])[A-Za-z]{4}|(?<![_\d])\d[\d.]* +[\d.]|"  # a word, "3 4": no products
    r"(?<![A-Za-z\\_])(?:[fg]'*|[A-Za-z](?:_\w)?'+|[A-Za-z](?:_\w)?(?=\( ?[\w\\., ]+\))) ?\(")
SUM, PRODUCT, POWER = 1, 2, 3  # how tightly operators bind
BINDING = dict.fromkeys("+-", SUM) | dict.fromkeys("*/", PRODUCT) | dict.fromkeys("^!°", POWER)
NUMBER = re.compile(r"\.?\d[^_]*$")


class Parser:
    """Reads the tree of an expression: (kind, parts...); raises ValueError where there is none."""

    def __init__(self, s):
        tokens = [token.replace(" ", "").strip('"') or token for token in TOKEN.findall(s)]
        self.tokens = [" ", *reversed(tokens)]  # the next one is the last

    def whole(self, closing=" "):  # up to the token that closes it
        x = self.expression()
        if self.tokens.pop() != closing:
            raise ValueError
        return x

    def expression(self, floor=0):
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

    def operation(self, op, x):
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

    def starts_operand(self):  # 2x, 3(x+1), x\sqrt2: a product without an operator
        token = self.tokens[-1]
        return token[0].isalnum() or token[1:2].isalnum() or token in "([{"

    def operand(self):
        token = self.tokens.pop()
        base, _, subscript = token.partition("_")
        if NUMBER.match(token):
            if len(token) > MAX_DIGITS:
                raise ValueError
            return ("number", token)
        if token in "([{":
            return self.whole(CLOSING[OPENING.index(token)])
        if token in CONSTANTS:
            return (token,)
        if base[1:] in FUNCTIONS:
            return self.function(base[1:], subscript)
        if token[0].isalnum() or base.rstrip("'") in NAMES:  # 52_8 is a name as well
            return ("name", re.sub(r"[{}]", "", token))
        if token in (r"\frac", r"\binom"):
            first, second = self.operand(), self.operand()
            return ("*", first, ("/", second)) if token == r"\frac" else ("binom", first, second)
        if token == r"\sqrt":
            degree = self.operand() if self.tokens[-1] == "[" else ("number", "2")
            return ("^", self.operand(), ("/", degree))
        raise ValueError

    def function(self, name, base):
        r"""\sin x, \sin(x), \sin^2 x, \sin^{-1} x, \log_2 x: the argument ends at an operator."""
        exponent = None
        if self.tokens[-1] == "^":
            self.tokens.pop()
            exponent = self.operand()
        bracketed = self.tokens[-1] in "([{"
        x = self.operand() if bracketed else self.expression(PRODUCT)
        while not bracketed and self.starts_operand() and self.tokens[-1][1:] not in FUNCTIONS:
            x = ("*", x, self.expression(PRODUCT))
        x = (name, x)
        if base:
            x = ("*", x, ("/", ("ln", Parser(base).whole())))
        return ("^", x, exponent) if exponent else x


@lru_cache(maxsize=8192)
def parse(s):  # None: it is no expression
    try:
        return None if len(s) > MAX_EXPRESSION or CALL.search(s) else Parser(s).whole()
    except (ValueError, ArithmeticError, RecursionError):
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
    "euro|rupee|degree ° deg|radian rad|celsiu c|fahrenheit f|2 square sq|3 cubic"
    ).split("|")) for name in (unit, *names)}
NO_UNITS = set(
    "not no or if unless except maybe is are was but else otherwise wrong incorrect false plus "
    "minus times and to either neither than less more when where for all a p am pm dozen hundred "
    "factorial below pair pairs".split())
UNIT = re.compile(
    r'("[^"]*"|°(?: ?"?[CF]"?)?|(?<=\d) ?[\u4e00-\u9fff]+'
    r"|(?:(?<=\d)|(?<= ))(?:cm|mm|km|kg|ft|lbs|hrs|Hz|ml|mL)(?![\w(])"
    r"|(?<= )(?:mg|in|lb|mi|hr|min|day|mph|per|sq|eV|kJ|mol)(?![\w(])"
    r"|(?<=\d )(?:[mshgNJLVWKC](?= ?[/^]|$)|\\Omega|\\mu)|(?<= )(?!sin|cos|tan)[A-Za-z]{4,})"
    r'(?: ?"[^"]*"| [A-Za-z]{2,}(?![A-Za-z])| ?/ ?[A-Za-z]+(?![A-Za-z])|\^\{?-?\d\}?| m$|\\Omega'
    r"|[*/{} .])*$")


def measured(s):  # without a trailing unit; its known units
    m = UNIT.search(s)
    words = set(re.findall("[a-z]+|[23°]", m[0].lower())) if m else NO_UNITS
    if NO_UNITS & words or re.search(r"(?<![\^{-])\d", m[0]):
        return s, set()
    names = {word.removesuffix("s") or word for word in words} - {"per", "of", "old", "the"}
    return s[:m.start()].strip(), {SAME_UNITS.get(name, name) for name in names}


def split(s, separators):  # at those outside all brackets
    parts, found, depth, start = [], "", 0, 0
    for k, c in enumerate(s):
        depth += (c in OPENING) - (c in CLOSING)
        if depth == 0 and c in separators:
            parts.append(s[start:k].strip())
            found, start = found + c, k + 1
    return [*parts, s[start:].strip()], found


def inside(s, brackets):  # of the brackets, if one pair encloses s
    whole = s and s[0] in brackets and split(s, CLOSING)[1] == s[-1]
    return s[1:-1].strip() if whole else None


def items(s):  # members of a list, set or union; ± gives two
    content = inside(s, "⦃{")
    if s in ("", r"\emptyset") or content == "":
        return []
    members, found = split(s if content is None else content, ",∪∨∧")
    if found or content is not None:
        nested = () if "∪" in found else ("⦃", r"\emptyset")  # such a member stays whole
        return [item for member in members
                for item in ([member] if member.startswith(nested) else items(member))]
    if 0 < s.count("±") < 4:
        return items(s.replace("±", "+", 1)) + items(s.replace("±", "-", 1))
    return [s]


def same_lists(a, g, same):  # one member for one, in any order
    signs, others = split(a, ",∪∨∧")[1], split(g, ",∪∨∧")[1]
    if signs != others and (INEQUALITY.search(a + g) or {",", "∪"} <= {*signs, *others}):
        return False
    right = items(g)
    for x in items(a):
        match = [y for y in right if (x[0] == "⦃") == (y[0] == "⦃") and same(x, y)]
        if not match:
            return False
        right.remove(match[0])
    return not right


def parts(s):  # separator and parts of a matrix, ratio, tuple, ...
    rows = inside(s, "⟦") or s
    for separator in "¦&:∖":
        cells, found = split(rows, separator)
        if found:
            return "()" if separator == "¦" and "&" not in rows else separator, cells
    members, found = split(inside(s, "([") or "", ",")
    return (s[0] + s[-1], members) if found else ("", [])


def rational(tree):  # its value as "5" or "3/4"; "" if that is irrational or unknown
    x = value(tree)
    if x is None or not close(x, mp.re(x)) or abs(x) > 10**60:
        return ""
    fraction = Fraction(int(mp.re(x) * 10**100), 10**100).limit_denominator(10**20)
    return str(fraction) if close(x, mp.mpf(fraction.numerator) / fraction.denominator) else ""


def unworked(node):  # leaves numbers to be added, multiplied, divided or drawn a root of
    kind, *parts = node
    if kind == "+":
        ratios = [("*", x, ("/", y)) for x, y in combinations(parts[:7], 2)]  # 3 + 5, 3i + 5i
        return len(parts) > 7 or any(map(rational, ratios))
    if kind == "*":
        others = [part for part in parts if part[:2] != ("^", ("number", "10"))]
        numbers = [part for part in others if rational(part)]
        if sorted(part[0] == "/" for part in numbers) == [False, True]:  # 84/5, not 84/2
            return has(("", *numbers), "*") or len(parts) == 2 and "/" not in rational(node)
        twice = len(numbers) > 1 or sum(has(part, "i") for part in parts) > 1
        if twice or not others or has(("", *numbers), "^"):  # 10^3 10^5, 6^2 \pi
            return True
        return others != numbers and (numbers or has(node, "^")) and rational(node)
    if kind == "/":
        return has(parts[0], "i")
    if kind == "^":
        base, exponent = parts
        if has(base, "i") or (has(base, "+") and exponent[0] == "number"):  # (1 + \sqrt2)^2
            return True
        if base[-1] in LOWEST and re.fullmatch(r"(?!0|1$)-?\d+", rational(exponent)):
            return False  # 2^{10}, but 4^5 and 9^{1/2} are unworked
    composed = kind in FUNCTIONS and has(parts[0], "^", *FUNCTIONS)  # \ln e^{55}
    exact = kind in ("^", "!", "binom", "abs", "lfloor", "lceil")
    return (exact or composed) and rational(node)


def worked(answer, gold):  # as far as the gold: policy 2
    if has(gold, "name") or any(map(unworked, walk(gold))):
        return True
    adds = has(answer, "+") and not has(answer, "name") and not has(gold, "+", "i", *FUNCTIONS)
    return not adds and not any(map(unworked, walk(answer)))


RELATIONS = "=≈<>≤≥≠∈"
INEQUALITY = re.compile("[<>≤≥≠]")
FLIP = str.maketrans("<≤>≥", ">≥<≤")
VARIABLE = re.compile(LETTER + r"'*(?: ?\([^()]*\))?")
LABEL = re.compile(  # Total area, AB, (x, y), |AB|, P(A|B), f'(x), sin A, M ∩ N, dy/dx, a + b
    r"""(?!.*(?:\\sqrt|\\frac|not)|-)(?:[A-Za-z\\" ,()|'∪{}[\]]|_\w|_\{[^{}]*\})*"""
    r"|\\frac ?\{ ?(?:d|\\partial).*|\\(?:int|sum|prod|lim)(?![A-Za-z]).*|[a-z](?: ?\+ ?[a-z])+"
    rf"|\\sigma ?\^ ?\{{?2\}}?|{VARIABLE.pattern}")


def relation(s):
    parts, ops = split(s, RELATIONS)
    if ops and not ops.strip(">≥"):
        return parts[::-1], ops[::-1].translate(FLIP)
    return parts, ops


def stated(s):
    r"""What a relation says: x = 5 says 5, x = 3, y = 4 says (3, 4), 2 < x ≤ 3 says (2, 3],
    x < 1 ∨ x > 2 says (-\infty, 1) ∪ (2, \infty), 100,200 says 100200; "" if nothing."""
    if re.fullmatch(r"\d{3}(?:,\d{3})+", s):
        return s.replace(",", "")
    pairs = dict(re.findall(r"\\?([^=,∧ ]+) ?= ?([^=,∧]+)", s))
    if len(re.split("[=,∧]", s)) == 2 * len(pairs) > 2:
        return f"({','.join(pairs[name] for name in sorted(pairs))})"
    conditions, found = split(s, "∨∧")
    if found:
        said = [stated(condition) for condition in conditions]
        return "∪".join(said) if "∧" not in found and all("," in x for x in said) else ""
    parts, ops = relation(s)
    first, last = parts[0], parts[-1]
    labelled = bool(LABEL.fullmatch(first))
    if labelled and len(ops) == 1 and ops in "=∈≈":
        return last
    if ops == "≠" and VARIABLE.fullmatch(first):
        return rf"(-\infty,{last})∪({last},\infty)"
    if ops in ("<", "≤"):  # one end is infinite
        if VARIABLE.fullmatch(first):
            parts, ops = [r"-\infty", *parts], "<" + ops
        else:
            parts, ops = [*parts, r"\infty"], ops + "<"
    if len(ops) == 2 and not ops.strip("<≤") and VARIABLE.fullmatch(parts[1]):
        return f"{'(['[ops[0] == '≤']}{parts[0]},{parts[2]}{')]'[ops[1] == '≤']}"
    if not ops or ops.strip("=≈"):
        return ""
    if ops == "=" and VARIABLE.fullmatch(last):
        return first  # 5 = x
    values = [value(parse(claim)) for claim in parts[labelled:]]
    error = 0.01 if "≈" in ops else TOLERANCE
    if None in values or any(abs(x - values[0]) > error * abs(x) for x in values):
        return ""  # 15 + 12 = 28 says nothing
    if "≈" in ops:  # \sqrt2 ≈ 1.41 says \sqrt2
        return parts[labelled]
    return last if labelled or parse(first)[0] not in ("number", "neg") else ""


def multiples(*equations):  # of each other, in several variables
    f, g = [parse(f"{left}-({right})") for left, right in equations]
    p, q = [value(("*", f, ("/", g)), point) for point in (0, 1)]
    several = len({node for node in walk(g) if node[0] == "name"}) > 1
    return bool(several and p and q and close(p, q) and not close(value(g, 0), value(g, 1)))


def same_relation(a, g, same):
    """Equations and inequalities; one against a value: what it states. None: neither is one."""
    (left, a_ops), (right, g_ops) = relation(a), relation(g)
    if not a_ops and not g_ops:
        return None
    if not a_ops and re.search(r"[a-z] ?\+ ?[a-z]", right[0]):
        return False  # 2 is not x + y = 2
    if a_ops != g_ops:
        a, g = stated(a) if a_ops else a, stated(g) if g_ops else g
        return bool(a and g) and same(a, g)
    turned = right[::-1] if a_ops in "=≠" else right
    if all(map(same, left, right)) or all(map(same, left, turned)):
        return True
    return a_ops == "=" and multiples(left, right)


def same_value(a, g):  # a unit is read as variables first, unless both have one
    (a_bare, a_units), (g_bare, g_units) = measured(a), measured(g)
    if (a == a_bare or g == g_bare) and same_trees(parse(a), parse(g)):
        return True
    differ = a_units and g_units and a_units != g_units
    return not differ and same_trees(parse(a_bare), parse(g_bare))


def same_trees(answer, gold):
    """Whether two trees have one value at every point, and no work left in the answer."""
    if answer is None or gold is None or not worked(answer, gold):
        return False
    points = range(len(SCALES) if has(("", answer, gold), "name") else 1)
    pairs = [(value(answer, point), value(gold, point)) for point in points]
    known = [pair for pair in pairs if None not in pair]
    return len(known) >= min(2, len(pairs)) and all(close(*pair) for pair in known)


FORMULA = re.compile(r"[\\\d=+*/^_|<>∨≈≠≤≥]|-\s")
TEXT = re.compile(  # yes, Navin, an ellipse, (iv), HHT; not xy
    r'^"[^"]{2,}"$|[^\W\d_]{4}|\b(?:[ivx]{2,}|[A-Z]{2,}|[A-Z][a-z]+|(?i:yes|no))\b')


def words(s, text):  # 12:30 PM is 12:30 p.m.
    s = s.casefold() if text else re.sub("[A-Za-z]{3,}|[AP]M", lambda m: m[0].lower(), s)
    s = re.sub(r'"|(?<=[A-Za-z])\.(?!\d)|(?<=[A-Za-z]{2})[,!]', "", s)
    found = re.findall(r"[^\W\d_]+|[\d.,:]+|[^\s\w]", s)
    return [word for word in found if not text or word not in ("a", "an", "the", "(", ")")]


def same_text(a, g):
    """Texts without case, articles and dots, formulas without spaces; None: to be computed."""
    text = any(TEXT.search(s) and not FORMULA.search(s) for s in (a, g))
    if text or re.search(r'"|(?<![\\A-Za-z])[A-Za-z]{4}|(?i:[ap]\.?m)', a + g):
        equal = words(a, text) == words(g, text)
    else:  # "1 1/2" is not "11/2"
        equal = len({re.sub(r"(?<!\d) | (?!\d)", "", s) for s in (a, g)}) == 1
    large = len(re.findall(r"[(\[{⦃⟦]", a + g)) > MAX_BRACKETS
    return equal if equal or text or large or len(items(a) + items(g)) > MAX_ITEMS else None


def choice(s):  # letter and rest: C, (C), C. 12; or two ""
    m = re.fullmatch(r"\(?([A-J])((?:[).:].*)?)", s.replace('"', ""))
    if not m or re.search(r"\b[A-J](?:[).:]|$)|∨|∧", m[2]):
        return "", ""
    return m[1], m[2][1:].strip()
