r"""The grammar behind verify.py: one spelling per symbol, values of expressions, lists and sets.

`normalize` gives LaTeX, Unicode and plain text one spelling. `parse` reads an expression into a
tree with a small operator-precedence grammar. `value` computes the tree at a point with mpmath to
110 digits; a variable gets fixed pseudo-random values. Nothing is executed, simplified or solved,
and every size is bounded (see MAX_). What the grammar does not know (\sum, \int, f(x), |x|, floors)
and what is over a limit has no value and only matches as a string.
"""
import hashlib
import operator
import re
import unicodedata
from functools import lru_cache, reduce
from itertools import accumulate

import mpmath

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 1_500, 400, 30, 30  # of an answer
MAX_DIGITS = 60  # of a number
MAX_LOG, MAX_FACTORIAL = 10**5, 5_000  # |log| of a power, argument of n!

mp = mpmath.mp.clone()  # a context of its own: the caller's precision stays as it is
mp.dps = 110
Number = mpmath.mpf | mpmath.mpc
TOLERANCE = mp.mpf("1e-70")  # relative difference of equal values
SWALLOWED = mp.mpf("1e-68")  # a term this small beside another is not visible in their sum

# ------------------------------------------------------------------------------------ spelling
GREEK = dict(zip("αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ", (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
).split(), strict=True))
UNICODE = str.maketrans({letter: f"\\{name} " for letter, name in GREEK.items()} | {
    "√": r"\sqrt ", "∞": r"\infty ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "…": "...", '"': ""})
UNICODE |= str.maketrans("×·⋅÷⁄−–’′~⟨⟩、;", "***//--'' (),,")
FUNCTIONS = "sin cos tan cot sec csc sinh cosh exp ln log lg arcsin arccos arctan arcsinh".split()
WORDS = {*FUNCTIONS, "pi", "sqrt", "infty"}
SYNONYMS = {name: symbol for symbol, *names in map(str.split, (
    r"* cdot times ast; / div; ≤ le leq leqslant; ≥ ge geq geqslant; < lt; > gt; ≠ ne neq;"
    r"≈ approx; ∈ in; ∪ cup; ± pm; ° degree degrees circ; ' prime; ( langle; ) rangle;"
    r"⦃ lbrace; ⦄ rbrace; | vert lvert rvert; ... ldots dots cdots; \emptyset varnothing;"
    r"\binom dbinom tbinom; \frac dfrac tfrac cfrac; \phi varphi").split(";")) for name in names}
SYNONYMS |= dict.fromkeys("left right big Big displaystyle textstyle quad qquad".split(), " ")
FONT = r"\\(?:text(?!color)\w*|mbox|math(?:rm|bf|it|sf|tt)|operatorname|boldsymbol|rm|bf)"
NOTHING = r"(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?)|(?:the )?empty set"
LEADING = "the|points?|is|are|either|about|approximately|exactly|answers?|option|choice"


def improper(m: re.Match) -> str:
    """A mixed number as a fraction: 1 4/5 is (9/5)."""
    whole, top, bottom = (int(group) for group in m.groups() if group)
    return f"({whole * bottom + top}/{bottom})" if top < bottom else m[0]


def quote(m: re.Match) -> str:
    text = re.sub(r"[{}]", "", m[1])
    name = text.strip()
    if name in WORDS:
        return f" \\{name} "
    return f" {name} " if name in ("e", "i", "d") else f'"{text}"'


SPELLINGS = r"\\¦ \cr¦ \{⦃ \}⦄ \&, <=≤ >=≥ !=≠ **^ ⇒⟹".split()
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\\\$\s*(\d[\d.,]*)", r'\1 "dollars"'),
    (r"€\s*(\d[\d.,]*)", r'\1 "euros"'),
    (r"(?:₹|\bRs\.?)\s*(\d[\d.,]*)", r'\1 "rupees"'),
    (r"(?s)^.*(?:\\implies|\\Rightarrow|⟹)", ""),
    (r",?\s*\b(?:because|since)\b.*$", ""),
    (r"\\begin\s*\{(?:[pb]?matrix|array|cases)\}(?:\s*\{[clr| ]*\})?", "⟦"),
    (r"¦?\s*\\end\s*\{\w*\}", "⟧"),
    (r"\\textcolor\s*\{\w*\}", ""),
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ |\\;)\s*(?=\d{3}(?!\d))", ""),  # 10{,}000  10,\!000  10\,000
    (r"\\[;:> ,]", " "),
    (r"\\[!()\[\]$%]|[$%`]", ""),
    (FONT + r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}", quote),
    (r"\{\s*\\(?:bf|rm)\b\s*([^{}]*)\}", quote),
    (r"\{([^{}]*)\\over\b([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\([A-Za-z]+)", lambda m: SYNONYMS.get(m[1], m[0])),
    (r"\\(frac|binom)\s*(\d)", r"\\\1{\2}"),
    (r"\\(frac|binom)\s*(\{[^{}]*\})\s*(\d)", r"\\\1\2{\3}"),
    (rf"(?<![\\A-Za-z])({'|'.join(WORDS)})(?![A-Za-z])", r"\\\1 "),
    (r"\^ ?-(\w+)", r"^{-\1}"),
    (r"\^\s*\{?\s*°\s*\}?", "°"),
    (r',?\s*(?:"[\s,]*or\s*"|\bor\b)', "∨"),
    (r',?\s*(?:"[\s,]*and\s*"|\band\b)', "∧"),
    (rf'(?i)"?\b(?:{NOTHING})\b"?', r"\\emptyset "),
    (r'(?i)"?\binfinity\b"?', r"\\infty "),
    (r'(?i)"?\ball real numbers\b"?|\\mathbb\s*\{?\s*R\s*\}?(?!\s*[_^])', r"(-\\infty ,\\infty )"),
    (r'"([^"A-Za-z]*)"', r" \1 "),
    (r'^\s*"([^"]*[\d=,∨∧][^"]*)"\s*$', r"\1"),
    (rf'(?i)^[\s"]*(?:(?:{LEADING})\b[\s":]*)+(?=[\W\dA-Z])', ""),
    (r'(?<=\d) ?"?\s*million\b\s*"?', "*10^6"),
    (r", ?&", "&"),
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"),
    (r"\s+", " "),
    (r"(?<![\w.^}])(\d+) ?(?:\\frac ?\{(\d+)\} ?\{(\d+)\}|(?<= )(\d+) ?/ ?(\d+))", improper),
    (r"^[\s=≈,:]+|[\s,:]*(?<!\.)[\s,:.]$", ""),
]]


@lru_cache(maxsize=4096)
def normalize(s: str) -> str:
    """One spelling for each symbol; no layout, no percent signs, no thousands separators."""
    s = re.sub(r"([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", r"^{\1}", " ".join(s.split()))
    s = re.sub(r"([₀-₉]+)", r"_{\1}", s)
    s = re.sub(r"([¼½¾⅓⅔])", r" \1 ", s).translate(UNICODE)
    s = unicodedata.normalize("NFKC", s).translate(UNICODE)
    if len(re.findall(r"(?<!\\)\$", s)) == 1:  # no pair of them that opens and closes formulas
        s = s.replace("$", r"\$")
    for spelling in SPELLINGS:
        s = s.replace(spelling[:-1], spelling[-1])
    for pattern, new in REWRITES:
        s = pattern.sub(new, s)
    separators = "[ ]" if re.search(r"[(\[⦃]", s) else "[ ,]"
    thousands = rf"(?<![\d.,])\d{{1,3}}(?:{separators}\d{{3}})+(?![\d,])"
    return re.sub(thousands, lambda m: re.sub("[ ,]", "", m[0]), s)


# -------------------------------------------------------------------------------------- values
def plus(x: Number, y: Number) -> Number:
    large, little = max(abs(x), abs(y)), min(abs(x), abs(y))
    if 0 < little < SWALLOWED * large < mp.inf:
        raise ValueError
    return x + y


def power(x: Number, y: Number) -> Number:
    if x != 0 and abs(y * mp.ln(x)) > MAX_LOG:
        raise ValueError
    return mp.power(x, y)


def factorial(x: Number) -> Number:
    if not -100 < mp.re(x) < MAX_FACTORIAL or abs(mp.im(x)) > 100:
        raise ValueError
    return mp.gamma(x + 1)


CONSTANTS = {"e": +mp.e, "i": mp.mpc(0, 1), r"\pi": +mp.pi, r"\infty": mp.inf}
MPMATH = dict(zip("log lg arcsin arccos arctan arcsinh".split(),
                  "ln log10 asin acos atan asinh".split(), strict=True))
OPERATIONS = {name: getattr(mp, MPMATH.get(name, name)) for name in FUNCTIONS} | {
    "^": power, "!": factorial, "neg": operator.neg, "+": plus, "*": operator.mul,
    "/": lambda x: 1 / x, "°": lambda x: x * mp.pi / 180,
    "root": lambda x, degree: power(x, 1 / degree),
    "binom": lambda n, k: factorial(n) / factorial(k) / factorial(n - k)}
SCALES = (1, 1, 16, 1e-3, 1e-7)  # of the points; see symbol


def symbol(name: str, point: int) -> Number:
    """A variable at a point: ordinary, large and tiny positive numbers."""
    digest = hashlib.blake2b(f"{name}@{point}".encode("ascii", "backslashreplace")).digest()
    return mp.mpf(int.from_bytes(digest[:3], "big") + 2**22) / 2**23 * SCALES[point]


def evaluate(tree: tuple, point: int) -> Number:
    """The value of a tree. Raises ValueError or an ArithmeticError where it has none."""
    kind, *parts = tree
    if kind == "number":
        return parts[0]
    if kind == "constant":
        return CONSTANTS[parts[0]]
    if kind == "name":
        return symbol(parts[0], point)
    values = [evaluate(part, point) for part in parts]
    if kind in "+*":
        return reduce(OPERATIONS[kind], values)
    if kind in FUNCTIONS and abs(values[0]) > MAX_LOG:
        raise ValueError
    return OPERATIONS[kind](*values)


def close(x: Number, y: Number) -> bool:
    return x == y or bool(abs(x - y) < TOLERANCE * max(abs(x), abs(y)))


# ------------------------------------------------------------------------------------- grammar
NAMES = {"\\" + name for name in GREEK.values()} - {r"\pi"} | {r"\ell", r"\hbar"}
OPENING, CLOSING = "([{⦃⟦", ")]}⦄⟧"
TOKEN = re.compile(
    r"(?:\d+\.?\d*|\.\d+)(?:[eE](?:-?\d{1,4}(?!\d)|\+\d{2,4}))?(?!_)"
    r"|(?:\\[A-Za-z]+|[A-Za-z]|\d+)(?: ?_ ?(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|\d+|\w))?'*"
    r"""|"\s*[A-Za-z]\s*"|\S""", re.ASCII)
END = " "
CALL = re.compile(  # f(x+1), I(0), u(x, t): a function without a value
    r"(?<![A-Za-z\\_])(?:[fg]'*|[A-Za-z](?:_\w)?'+|[A-Za-z](?:_\w)?(?=\( ?[\w\\., ]+\))) ?\(")
SUM, PRODUCT, POWER = 1, 2, 3  # how tightly operators bind
BINDING = dict(zip("+-*/^!°", (SUM, SUM, PRODUCT, PRODUCT, POWER, POWER, POWER), strict=True))
NUMBER = re.compile(r"\.?\d[^_]*$")
CLOSERS = {"(": ")", "[": "]", "{": "}"}


class Parser:
    """Reads the tree of an expression: (kind, parts...); raises ValueError where there is none."""

    def __init__(self, s: str):
        self.tokens, self.i = [t.strip('" ') or t for t in TOKEN.findall(s)] + [END], 0
        if len(self.tokens) > MAX_TOKENS:
            raise ValueError

    @property
    def next(self) -> str:
        return self.tokens[self.i]

    def take(self) -> str:
        self.i += 1
        return self.tokens[self.i - 1]

    def whole(self, closing: str = END) -> tuple:
        """An expression up to the token that closes it."""
        x = self.expression()
        if self.take() != closing:
            raise ValueError
        return x

    def expression(self, floor: int = 0) -> tuple:
        """An operand and all that follows with operators that bind tighter than floor."""
        if self.next in "+-":
            sign = self.take()
            x = self.expression(max(floor, SUM))
            x = ("neg", x) if sign == "-" else x
        else:
            x = self.operand()
        while True:
            implied = self.starts_operand()
            op = "*" if implied else self.next
            if BINDING.get(op, 0) <= floor:
                return x
            self.i += not implied
            x = self.operation(op, x)

    def operation(self, op: str, x: tuple) -> tuple:
        if op in "!^°":
            x = ("^", x, self.operand()) if op == "^" else (op, x)
            if self.next == op:
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
        if NUMBER.match(token) and NUMBER.match(self.tokens[self.i - 1]):  # "3 4" is not a product
            raise ValueError
        named = token[0] in ".\\" and len(token) > 1
        return token[0].isalnum() or named or token in "([{"

    def operand(self) -> tuple:
        token = self.take()
        base, _, subscript = token.partition("_")
        if NUMBER.match(token):
            if len(token) > MAX_DIGITS:
                raise ValueError
            return ("number", mp.mpf(token))
        if token in CLOSERS:
            return self.whole(CLOSERS[token])
        if token in CONSTANTS:
            return ("constant", token)
        if base[1:] in FUNCTIONS:
            return self.function(base[1:], subscript)
        if token[0].isalnum() or base.rstrip("'") in NAMES:  # 52_8 is a name as well
            return ("name", re.sub(r"[{} ]", "", token))
        if token in (r"\frac", r"\binom"):
            first, second = self.operand(), self.operand()
            return ("*", first, ("/", second)) if token == r"\frac" else ("binom", first, second)
        if token == r"\sqrt":
            degree = self.operand() if self.next == "[" else ("number", mp.mpf(2))
            return ("root", self.operand(), degree)
        raise ValueError

    def function(self, name: str, base: str) -> tuple:
        r"""\sin x, \sin(x), \sin^2 x, \sin^{-1} x, \log_2 x: the argument ends at an operator."""
        exponent = None
        if self.next == "^":
            self.take()
            exponent = self.operand()
        if exponent == ("neg", ("number", 1)):  # arcsin or 1/sin
            raise ValueError
        bracketed = self.next in "([{"
        x = self.operand() if bracketed else self.expression(PRODUCT)
        while not bracketed and self.starts_operand() and self.next[1:] not in FUNCTIONS:
            x = ("*", x, self.expression(PRODUCT))
        x = (name, x)
        if base:
            x = ("*", x, ("/", ("ln", Parser(base).whole())))
        return ("^", x, exponent) if exponent else x


@lru_cache(maxsize=8192)
def parse(s: str) -> tuple | None:
    """The tree of an expression; None if s is none."""
    try:
        return None if CALL.search(s) else Parser(s).whole()
    except (ValueError, ArithmeticError, RecursionError):
        return None


def value(tree: tuple, point: int) -> Number | None:
    try:
        x = evaluate(tree, point)
        return None if mp.isnan(x) else x
    except (ValueError, ArithmeticError, RecursionError, TypeError):  # a pole, a size over a limit
        return None


def walk(tree: tuple):
    yield tree
    for part in tree[1:]:
        if isinstance(part, tuple):
            yield from walk(part)


def has(tree: tuple, *kinds: str) -> bool:
    return any(part[0] in kinds for part in walk(tree))


SAME_UNITS = {name: unit for unit, *names in map(str.split, (
    "meter m|centimeter cm|millimeter mm|kilometer km|inch in inche|foot ft feet|mile mi|gram g|"
    "kilogram kg|pound lb|second s sec|minute min|hour h hr|day|week|month|year|cent|dollar usd|"
    "euro|rupee|degree|radian rad").split("|")) for name in (unit, *names)}
NO_UNITS = set(
    "not no or if unless except maybe is are was but else otherwise wrong plus minus times and to "
    "either neither than less more when where for all a p am pm thousand billion dozen".split())
UNIT = re.compile(
    r'("[^"]*"|°(?: ?"?[CF]"?)?'
    r"|(?:(?<=\d)|(?<= ))(?:cm|mm|ft|mph|lbs|hrs)(?![\w(])"
    r"|(?<= )(?:km|kg|mg|in|lb|mi|hr|min|sec|day|per)(?![\w(])"
    r"|(?<=\d )[mshg](?= ?/|$)|(?<= )(?!sin|cos|tan)[A-Za-z]{4,})"
    r'(?: ?"[^"]*"| [A-Za-z]{2,}(?![A-Za-z])| ?/ ?[A-Za-z]+(?![A-Za-z])|\^\{?-?\d\}?|[*/ ])*$')


def measured(s: str) -> tuple[str, frozenset]:
    """s without a trailing unit, and the units that have a name here."""
    m = UNIT.search(s) or re.search("$", s)
    words = re.findall("[a-z]+", m[0].lower())
    if NO_UNITS & set(words) or re.search(r"(?<![\^{-])\d", m[0]):
        return s, frozenset()
    singular = [word if word in SAME_UNITS else word.removesuffix("s") for word in words]
    names = frozenset(SAME_UNITS[word] for word in singular if word in SAME_UNITS)
    return s[:m.start()].strip(), names


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


def items(s: str) -> list[str]:
    """The members of a list, set or union; any other answer is a list of one. ± gives two."""
    content = inside(s, "⦃")
    if content is not None or s == r"\emptyset":
        return items(content) if content else []
    parts = split(s, ",∪∨∧")[0]
    if len(parts) > 1:
        sides, equals = split(parts[0], "=")
        if equals == "=" and not any("=" in part for part in parts[1:]):
            parts[0] = sides[1]  # x = 1, 2
        return [item for part in parts for item in items(part)]
    content = inside(s, "([{")
    if content is not None and (s[-1] in ")}" or content[:1] == "⟦") and "," not in content:
        return items(content)
    return [s.replace("±", sign) for sign in "+-"] if s.count("±") == 1 else [s]


def parts(s: str) -> tuple[str, list[str]]:
    """What separates the rows of a matrix, a ratio, a tuple or an interval, and its parts."""
    rows = inside(s, "⟦") or s
    for separator in "¦&:":
        cells, found = split(rows, separator)
        if found:
            return separator, cells
    members, found = split(inside(s, "([") or "", ",")
    return (s[0] + s[-1], members) if found else ("", [])


def as_tuple(s: str) -> str:
    """x = 3, y = 4 as (3,4); anything else as it is."""
    sides = [split(part, "=") for part in split(s, ",∧")[0]]
    labels = {parts[0] for parts, _ in sides}
    if len(labels) < len(sides) or len(sides) < 2 or any(found != "=" for _, found in sides):
        return s
    return "(" + ",".join(parts[1] for parts, _ in sorted(sides)) + ")"


TEN = ("number", 10)


def is_rational(tree: tuple) -> bool:
    if tree[0] == "^" and has(tree[2], "/"):
        return False
    known = tree[0] in ("+", "*", "/", "neg", "^", "!", "binom")
    return tree[0] == "number" or (known and all(map(is_rational, tree[1:])))


def left_to_do(tree: tuple) -> bool:
    """Whether some sum, product or whole quotient of rational numbers is not worked out."""
    for node in walk(tree):
        scientific = len(node) == 3 and node[0] == "*" and node[2][:2] == ("^", TEN)
        if node[0] not in ("+", "*") or scientific:
            continue
        rational = [part for part in node[1:] if is_rational(part)]
        over = sum(part[0] == "/" for part in rational)
        if over > 1 or len(rational) - over > 1:
            return True
        if len(rational) == len(node) - 1 and mp.isint(value(node, 0) or 0.5):
            return True
    return False


def worked(answer: tuple, gold: tuple) -> bool:
    """Whether an answer is worked out as far as the gold is (policy 2)."""
    if has(gold, "name") or left_to_do(gold):
        return True
    adds = has(answer, "+") and not has(answer, "name")
    return not left_to_do(answer) and (has(gold, "+", *FUNCTIONS) or not adds)


RELATIONS = "=≈<>≤≥≠∈"
INEQUALITY = re.compile("[<>≤≥≠]")
FLIP = str.maketrans("<≤>≥", ">≥<≤")
VARIABLE = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?:_\w|_\{[^{}]*\})?'*(?: ?\([^()]*\))?")
LABEL = re.compile(  # Total area, AB, (x, y), |AB|, m∠A, P(A|B), f'(x), sin A, M ∩ N, dy/dx
    r"""(?!.*\\(?:sqrt|frac)|-)(?:[A-Za-z\\" ,()|'∪]|_\w|_\{[^{}]*\})*|\\frac ?\{d.*"""
    rf"|{VARIABLE.pattern}")


def relation(s: str) -> tuple[list[str], str]:
    parts, ops = split(s, RELATIONS)
    if ops and set(ops) <= set(">≥"):
        return parts[::-1], ops[::-1].translate(FLIP)
    return parts, ops


def constant_value(s: str) -> Number | None:
    return value(parse(s), 0) if parse(s) and not has(parse(s), "name") else None


def stated(s: str) -> str:
    """What a relation says: x = 5 says 5, x ∈ A says A, 2 < x ≤ 3 says (2, 3]; "" if nothing."""
    parts, ops = relation(s)
    first, last = parts[0], parts[-1]
    labelled = bool(LABEL.fullmatch(first))
    if labelled and len(ops) == 1 and ops in "=∈≈":
        return last
    if ops in ("<", "≤") and VARIABLE.fullmatch(first):  # one end is infinite
        parts, ops = [r"-\infty", *parts], "<" + ops
    elif ops in ("<", "≤"):
        parts, ops = [*parts, r"\infty"], ops + "<"
    if len(ops) == 2 and set(ops) <= set("<≤") and VARIABLE.fullmatch(parts[1]):
        return "([" [ops[0] == "≤"] + f"{parts[0]},{parts[2]}" + ")]"[ops[1] == "≤"]
    if not ops or set(ops) - set("=≈"):
        return ""
    if ops == "=" and VARIABLE.fullmatch(last) and constant_value(first) is not None:
        return first  # 5 = x
    claims = parts[labelled:]
    values = [constant_value(claim) for claim in claims]
    if "≈" in ops[labelled:]:  # \sqrt2 ≈ 1.41 says \sqrt2
        return claims[0]
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


def same_value(a: str, g: str) -> bool:
    """Whether two expressions have one value, the same unit, and no work left.

    A trailing unit is read as variables first, unless both sides have one.
    """
    (a_bare, a_units), (g_bare, g_units) = measured(a), measured(g)
    if (a == a_bare or g == g_bare) and same_trees(parse(a), parse(g)):
        return True
    differ = a_units and g_units and a_units != g_units
    return not differ and same_trees(parse(a_bare), parse(g_bare))


def same_trees(answer: tuple | None, gold: tuple | None) -> bool:
    """Whether two trees have one value at every point, and no work left in the answer."""
    if answer is None or gold is None or not worked(answer, gold):
        return False
    both = ("+", answer, gold)
    points = range(5 if has(both, "name") else 1)
    pairs = [(value(answer, p), value(gold, p)) for p in points]
    seen = [close(x, y) for x, y in pairs if x is not None and y is not None]
    return len(seen) >= min(2, len(points)) and all(seen)


def squeezed(s: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", s)  # "1 1/2" is not "11/2"


def too_large(s: str) -> bool:
    """Whether brackets are nested too deep or a list is too long."""
    depth = max(accumulate((c in OPENING) - (c in CLOSING) for c in s))
    return depth > MAX_DEPTH or len(items(s)) > MAX_ITEMS


def plain(s: str) -> str:
    """An answer as text: no quotes, articles, punctuation or case."""
    words = re.sub(r'["(),!.]', " ", s).casefold().split()
    return "".join(word for word in words if word not in ("a", "an", "the"))


def is_text(s: str) -> bool:
    """Whether an answer consists of words: yes, Navin, an ellipse, (iv), HHT. Not xy or sin x."""
    words = re.findall(r"[^\W\d_]+", s)
    if re.search(r"[\\\d=+*/^_|<>∨≈≠≤≥]|-\s", s):
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
