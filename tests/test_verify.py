"""The answer verifier: policy as pairs, extraction, hostile inputs, labelled data if present."""

import json
import math
import random
import time
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.verify import equivalent, extract_answer, parses, reward, verify

EQUAL = [
    # one number, many spellings
    ("0.5", r"\frac{1}{2}"),
    ("1/2", r"\dfrac12"),
    ("84/2", r"\frac{84}{2}"),
    (r"\tfrac{3}{6}", "0.5"),
    (r"\frac 3 4", "3/4"),
    (r"\frac{270}7", "270/7"),
    (".05", "0.05"),
    ("045", "45"),
    ("8.0", "8"),
    ("6.", "6"),
    ("+3", "3"),
    ("−2", "-2"),
    ("--2", "2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{-2}", "-0.5"),
    (r"1\frac{4}{5}", "9/5"),
    (r"-1\frac{4}{5}", "-1.8"),
    ("1 4/5", "1.8"),
    ("1½", "1.5"),
    (r"2^{10}", "1024"),
    ("2**10", "1024"),
    (r"\text{104}", "104"),
    (r"\textbf{-1}", "-1"),
    (r"\displaystyle \frac{2}{21}", "2/21"),
    (r"\, 3", "3"),
    # thousands separators and powers of ten
    ("1,440", "1440"),
    (r"10{,}000", "10000"),
    (r"11,\! 111,\! 100", "11111100"),
    (r"1\,000\,000", "1000000"),
    ("12 345", "12345"),
    ("3e8", r"3 \times 10^{8}"),
    (r"6 \cdot 10^{13}", "6e13"),
    ("1.7e4", "17,000"),
    ("1e-3", "0.001"),
    ("3.0E2", "300"),
    # roots, constants, complex numbers
    (r"6\sqrt2", r"6 \sqrt{2}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt3}3"),
    ("√53", r"\sqrt{53}"),
    ("7π", r"7\pi"),
    (r"2(9+\pi)", r"18+2\pi"),
    ("2*pi", r"2\pi"),
    (r"\cos 60^\circ", r"\frac12"),
    (r"\log_2 8", "3"),
    ("9i+6", "6+9i"),
    (r"\mathrm{e}^{2}", "e^2"),
    # formulas
    ("-q+p", "p - q"),
    (r"\frac{9a+11}{20}", r"\frac{11+9a}{20}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{ab}", r"\sqrt a\sqrt b"),
    (r"\cos(2t)+\sin(2t)", r"\sqrt{2}\cos(2t-\pi/4)"),
    (r"\sin^2\theta", r"1-\cos^2\theta"),
    (r"100\sqrt{p}", r"100 p^{0.5}"),
    (r"\frac{a}{bc}", "a/(b c)"),
    (r"x_{1}+x_2", "x_2 + x_1"),
    (r"\frac{n!}{n}", "(n-1)!"),
    (r"n(n+1)", "n^2+n"),
    (r"4^{n-1}", r"\frac{4^n}{4}"),
    ("x_1y_2", "y_{2} x_1"),
    # units, degrees, percent, currency
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \text{ square inches}", r"864 \mbox{ inches}^2"),
    ("27 miles", "27"),
    ("5 cm", "5"),
    (r"9\,\mathrm{m/s}", "9"),
    (r"2\sqrt{113} \text{ feet}", r"2\sqrt{113}"),
    (r"30^\circ", "30"),
    ("120°", r"120^{\circ}"),
    (r"25\%", "25"),
    ("40%", "40"),
    (r"50\text{ percent}", "50"),
    (r"\$18.90", "18.9"),
    (r"10 \text{ dollars}", r"\$10"),
    # labels and relations
    ("x = 5", "5"),
    (r"f(x) = x^2 + 1", "x^2+1"),
    ("(x, y) = (1, 2)", "(1,2)"),
    ("15 + 12 = 27", "27"),
    (r"\text{Area} = 12", "12"),
    (r"\sqrt{2} \approx 1.414", r"\sqrt{2}"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("x + 1 = y", "y = x + 1"),
    ("5 < x", "x > 5"),
    (r"y \le 0", r"(-\infty, 0]"),
    (r"-2 \leq x < 7", "[-2,7)"),
    # lists and sets have no order; \pm is two values
    ("1, -2", "-2,1"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    (r"1 \text{ and } 2", "2, 1"),
    ("x=1 or x=2", "1,2"),
    (r"\{5\}", "5"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\pm 2", "-2, 2"),
    (r"\{1\pm\sqrt{5},-2\}", r"\{-2, 1+\sqrt5, 1-\sqrt5\}"),
    (r"\emptyset", r"\{\}"),
    (r"(12,102) \cup (2,12)", r"(2,12)\cup(12,102)"),
    # tuples, intervals, matrices, bases
    (r"\left(\tfrac32,-13\right)", "(1.5, -13)"),
    (r"\left(3,4\right]", "(3, 4]"),
    (r"(\sqrt{3}, \infty)", r"(3^{1/2},+\infty)"),
    ("52_{8}", "52_8"),
    (r"\begin{bmatrix} 0.2 \\ -1 \end{bmatrix}", r"\begin{pmatrix}1/5\\-1\end{pmatrix}"),
    (r"\mathbb{R}", r"(-\infty,\infty)"),
    (
        r"\left(\begin{array}{cc}1&2\\3&4\end{array}\right)",
        r"\begin{pmatrix}1&2\\3&4\\\end{pmatrix}",
    ),
    # text and multiple choice
    ("Ellipse", r"\text{ellipse}"),
    (r"\text{an ellipse}", "ellipse"),
    (r"\textbf{Evelyn}", r"\text{Evelyn}"),
    ("yes", r"\text{Yes}"),
    ("ODD", "odd"),
    ("True.", "true"),
    ("C", r"\text{(C)}"),
    (r"\textbf{(C)}", "C"),
    (r"\text{(C) Plane}", r"\text{(C)}"),
    ("C. 12", "(C)"),
]

DIFFERENT = [
    # near misses: rounding, scale, sign, one digit
    ("0.33", r"\frac13"),
    ("3.14", r"\pi"),
    ("3.14159265358979", r"\pi"),
    ("1.4142135623730951", r"\sqrt2"),
    ("4000.1", "4000"),
    ("0.0000672", "0.0000671"),
    ("0.25", r"25\%"),
    ("1", r"100\%"),
    ("450", "45"),
    ("-5", "5"),
    ("120", "210"),
    (r"\frac{2}{3}", r"\frac{3}{2}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("10^{100}", "10^{100}+1"),
    ("1 1/2", "11/2"),
    (r"1\frac12", r"\frac12"),
    (r"\sqrt{35}", r"\sqrt{53}"),
    ("3e8", "3e9"),
    ("1e-10", "0"),
    (r"10^{-30}", r"2 \cdot 10^{-30}"),
    # a symbol or a term is missing or differs
    ("3c", "3"),
    ("5t", "5"),
    ("2s", "2t"),
    ("7", r"7\pi"),
    ("6", r"6\sqrt2"),
    ("x", "X"),
    (r"\cot x", r"\csc x"),
    (r"x_1", "x_2"),
    (r"1 - \frac1e", r"1 + \frac1e"),
    ("a+b", "a+b+c"),
    ("|x|", "x"),
    ("|x y|", "xy"),
    ("f(0)", "0"),
    ("2f(0)", "f(0)/2"),
    ("f(x)", "f(y)"),
    (r"\frac12 X^{1/2}", r"-\frac12 X^{-1/2}"),
    ("9+6i", "6+9i"),
    (r"\ln 2", r"\ln 3"),
    ("y'", "y"),
    (r"\hat{y}", "y"),
    ("x^2", "x2"),
    # order, ends, size, base
    ("(2,1)", "(1,2)"),
    ("(3,4)", "(3,4]"),
    ("[3,4)", "(3,4]"),
    ("(9,256)", r"\frac{9}{256}"),
    ("1,2", "(1,2)"),
    ("5, 10", "10"),
    ("1", "1,2"),
    ("1,2", "1,2,3"),
    ("1,1,2", "1,2,2"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"1+\sqrt2", r"1\pm\sqrt2"),
    ("52_9", "52_8"),
    ("52", "52_8"),
    (r"(2,12)", r"(2,12)\cup(12,102)"),
    (r"-2 < x < 7", "[-2,7]"),
    ("y < 0", r"(-\infty,0]"),
    (r"(0,\infty)", r"(-\infty,0)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    # relations: what is stated counts, and only that
    ("81 + 28 = 109", "81"),
    ("0 = 0", "x = 0"),
    ("x + y = 0", "x - y = 0"),
    ("x^2 = 0", "2y = 0"),
    ("0", "x^2 - 5x = 0"),
    ("x = 5", "x = 6"),
    ("x > 3", "x < 3"),
    ("-x > 3", "x > 3"),
    (r"x \ge 3", "x > 3"),
    ("2x = 10", "10"),
    ("x = 0", "y = 0"),
    ("15 + 12 = 28", "27"),
    (r"x = \infty", "y = 2x"),
    ("y' + y = 0", "0"),
    (r"xy \ge 0", r"[0,\infty)"),
    ("x = 1/0", "x = 2/0"),
    # text, choice, and attempts to hide a second answer
    ("west", r"\text{east}"),
    ("neither", r"\text{even}"),
    ("No", "Yes"),
    ("HTH", "HHT"),
    ("B", r"\text{(C)}"),
    (r"\text{(D) Sphere}", r"\text{(C)}"),
    ("on", "no"),
    (r"5 \text{ or } 6", "5"),
    (r"5 \text{ or maybe 6}", "5"),
    ("5 6", "5"),
    (r"5\text{ cm} 6", "5"),
    ("5; 6", "5"),
    # nothing equals nothing
    ("", ""),
    (" ", "5"),
    ("5", ""),
    (r"\text{}", r"\text{}"),
    ("$", "$"),
]


@pytest.mark.parametrize("answer, gold", EQUAL)
def test_equal(answer, gold):
    assert equivalent(answer, gold)


@pytest.mark.parametrize("answer, gold", DIFFERENT)
def test_different(answer, gold):
    assert not equivalent(answer, gold)


def test_symmetric_and_reflexive():
    """Swapping changes nothing."""
    for a, b in EQUAL:
        assert equivalent(a, a) and equivalent(b, b)
        assert equivalent(b, a)
    for a, b in DIFFERENT:
        assert not equivalent(b, a)


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\frac{1}{2}} units", r"\frac{1}{2}"),
        (r"first \boxed{4}, no: \boxed{5}", "5"),
        (r"fill in \boxed{}: \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"The answer is 4. \boxed{5} is it", "5"),
        (r"\boxed{5", None),
        (r"\boxed{5} or \boxed{", None),
        (r"\boxed{5} or \boxed{ }", None),
        (r"The answer is 5. \boxed{}", None),
        ("The answer is 5.", "5"),
        ("the final answer is $\\frac12$. I hope it is correct.", "$\\frac12$"),
        ("work\n#### 1,200", "1,200"),
        ("**Answer:** $x$", "$x$"),
        ("Answer: -2.5", "-2.5"),
        ("<answer>7</answer>", "7"),
        ("The answer is:\n\\[\n x+1 \n\\]\n", "x+1"),
        ("Final Answer: The final answer is 3", "3"),
        ("Answer: 4\nno wait\nAnswer: 5", "5"),
        ("so x = 5 and we stop", None),
        ("", None),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_reward():
    assert reward(r"Hence $x = \boxed{\frac{2}{4}}$.", "0.5") == 1.0
    assert reward("The answer is $18.90.", r"\$18.90") == 1.0
    assert reward(r"\boxed{4} and \boxed{5}", "4") == 0.0
    assert reward("I think it is 5", "5") == 0.0
    assert reward(r"\boxed{5} " + "x" * 30_000, "5") == 0.0  # out of the window


def test_parses():
    assert parses("5") and parses(r"\text{east}") and parses(r"\sum_{n=0}^\infty \frac{1}{n!}")
    assert not parses("") and not parses("  $ ") and not parses("x" * 10_000)


HOSTILE = [
    "5 \"" + "a" * 1_400,
    "5 " + "abcd " * 290,
    "0." + "12" * 700 + "...",
    "<think>" * 100_000,
    r"\boxed{1} " * 2_000,
    "+".join([r"\binom{x}{20}"] * 30),
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "(9^9)^{9^9}",
    "99999999!",
    "5000!!!",
    "10^{99999}",
    "1e999999999",
    "2e-99999999",
    r"\binom{99999}{49999}",
    r"\sin(10^{5000})",
    r"e^{e^{e^{e^{e}}}}",
    "0^0^0",
    "1/0",
    r"\ln 0",
    r"\frac{0}{0}",
    "(-1)!",
    r"0^{-1}",
    "i^{i^{i}}",
    r"\infty-\infty",
    r"\infty!",
    r"\infty^\infty",
    r"|\infty|",
    r"\sqrt[0]{2}",
    r"\log_1 2",
    r"\tan(\pi/2)",
    "x" * 1_000_000,
    "1" * 1_000_000,
    "9" * 1_400,
    "(" * 700 + ")" * 700,
    "{" * 1_400,
    "[" * 1_000_000,
    "-" * 1_400 + "1",
    "^" * 1_000,
    "x^" * 600 + "x",
    r"\frac" * 280,
    r"\sqrt" * 280 + "2",
    r"\sin" * 300 + "x",
    r"\frac{" * 200,
    "|" * 1_400,
    "1,000" * 280,
    "1," * 700,
    "a(" * 700,
    "f(" * 30 + "x" + ")" * 30,
    "!" * 1_400,
    r"\{" * 20 + "1" + r"\}" * 20,
    ",".join(["1"] * 30),
    ",".join(rf"\{{{k},\sqrt{k},x^{k}\}}" for k in range(10)),
    r"\pm" * 400 + "1",
    ",".join([r"1\pm x"] * 30),
    "+".join(f"1/{k}" for k in range(1, 350)),
    "*".join(["9^{5000}"] * 50),
    "+".join(["1000!"] * 100),
    "+".join(rf"\sqrt{{{k}!}}" for k in range(900, 1000)),
    "+".join(["|x|!"] * 100),
    "+".join(["1/9^{3000}", "1/7^{3000}"] * 25),
    "+".join([rf"\sin {c}" for c in "abcdfgh" * 14]),
    "=".join(["x"] * 200),
    "<".join(["x"] * 200),
    r"\text{" * 200,
    r"\text{a}" * 200,
    r"\begin{pmatrix}" * 90,
    r"\begin{pmatrix}" + "1&" * 400,
    r"\overline" * 100,
    r"0.\overline{" + "3" * 1_400 + "}",
    "_" * 1_400,
    "x_{" * 400,
    "\0" * 1_400,
    "5\0",
    "\ud800",
    "\u202e5",
    "𝟓",
    "٣",
    "中文" * 700,
    "½" * 500,
    "⁰" * 1_400,
    "ﷺ" * 1_400,
    "\\" * 1_400,
    "$" * 1_400,
    "\n" * 100_000,
    " " * 1_000_000 + "5",
    "answer is " * 100_000,
    r"\boxed{" * 100_000,
    r"\boxed{" + "{" * 100_000,
    "#### " * 100_000,
    "1 " * 700,
    "1 234" * 280,
    "__import__('os').system('touch hacked')",
    "exec(\"open('hacked','w')\")",
    r"\pi.__class__",
    "().__class__.__bases__[0].__subclasses__()",
    "lambda: open('hacked', 'w')",
    r"\input{/etc/passwd}",
    "%s%s%n",
    "0x10",
    "1_000",
    "nan",
    "inf",
    "-0",
    "None",
    "True",
    "[[1,2],[3,4]]",
]


@pytest.mark.parametrize("k", range(len(HOSTILE)))
def test_hostile_input_is_fast_and_harmless(k, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = HOSTILE[k]
    start = time.process_time()
    for gold in ("5", r"\sqrt{2}x", "1,2", "(1,2]", "x = 5", s[:1_500]):
        for answer in (s, s + "+1"):
            assert equivalent(answer, gold) in (True, False)
            assert equivalent(gold, answer) in (True, False)
    assert (
        reward(s, "5") in (0.0, 1.0)
        and reward(rf"\boxed{{{s}}}", s) in (0.0, 1.0)
        and parses(s) in (True, False)
    )
    assert time.process_time() - start < 1.0
    assert not list(tmp_path.iterdir())


PIECES = [
    *"{}()[]|.,!_^+-*/=<&$:'\\ \n\0xfei0123456789%°½²",
    r"\frac",
    r"\sqrt",
    r"\{",
    r"\}",
    r"\le",
    r"\in",
    r"\cup",
    r"\pm",
    r"\sin",
    r"\log",
    r"\pi",
    r"\infty",
    r"\text{",
    r"\text{cm}",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\\",
    r"\binom",
    r"\overline",
    r"\boxed{",
    "9^{9^{9}}",
    "99999999!",
    "yes",
    "answer is",
]
LATEX_LIKE = st.lists(st.one_of(st.sampled_from(PIECES), st.characters()), max_size=40).map("".join)


@settings(max_examples=1_000, deadline=timedelta(seconds=1), derandomize=True, database=None)
@given(LATEX_LIKE, LATEX_LIKE)
def test_random_latex_never_raises_and_is_quick(a, b):
    assert reward(rf"\boxed{{{a}}}", b) in (0.0, 1.0) and reward(a, b) in (0.0, 1.0)
    assert equivalent(a, a) == parses(a)


def test_random_values():
    """Expressions built together with their values; none equals a neighbour."""
    rng = random.Random(1)

    def build(depth: int) -> tuple[str, complex]:
        if depth == 0:
            n = rng.randint(1, 9)
            return rng.choice(
                [
                    (f"{n}", n),
                    (f"{n}.5", n + 0.5),
                    (rf"\frac{{{n}}}{{7}}", n / 7),
                    (rf"{n}\pi", n * math.pi),
                ]
            )
        (a, x), (b, y) = build(depth - 1), build(depth - 1)
        return rng.choice(
            [
                (f"{a}+{b}", x + y),
                (f"({a})({b})", x * y),
                (rf"\frac{{{a}}}{{1+({b})^2}}", x / (1 + y * y)),
                (rf"\sqrt{{{a}}}", x**0.5),
                (rf"{a} - \left({b}\right)", x - y),
                (rf"{{({a})}}^2 \cdot {{{b}}}", x * x * y),
            ]
        )

    for _ in range(150):
        (a, x), (b, y) = build(2), build(2)
        assert equivalent(f"{a}+({b})", rf"\left({b}\right) + {a}")
        assert not equivalent(a, f"{a}+0.001")
        assert abs(x - y) < 1e-9 * abs(x) or not equivalent(a, b)


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
PAIRS = DATA / "verifier_pairs_dev.jsonl"


@pytest.mark.skipif(not PAIRS.exists(), reason="no labelled pairs")
def test_accuracy_on_labelled_pairs():
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    start = time.process_time()
    rewards = [reward(row["pred"], row["gold"]) for row in rows]
    seconds = time.process_time() - start
    positives = sum(row["expect"] for row in rows)
    accepted = sum(r == 1 and not row["expect"] for r, row in zip(rewards, rows, strict=True))
    rejected = sum(r == 0 and row["expect"] for r, row in zip(rewards, rows, strict=True))
    assert accepted + rejected <= 0.01 * len(rows)
    assert accepted <= 0.003 * (len(rows) - positives) and rejected <= 0.015 * positives
    assert len(rows) / seconds > 1_000


@pytest.mark.skipif(not PAIRS.exists(), reason="no gold answers")
@pytest.mark.parametrize(
    "name",
    ["math500", "aime24", "aime25", "amc23", "minerva", "deepmath_5k", "gsm8k_test", "dapo_sample"],
)
def test_every_gold_answer_equals_itself(name):
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    for gold in {json.loads(line)["answer"] for line in lines}:
        assert parses(gold) and equivalent(gold, gold) and equivalent(f"$ {gold} $.", gold), gold
        assert (
            equivalent(rf"\displaystyle {gold}", gold)
            and reward(rf"Thus \boxed{{ {gold} }}.", gold) == 1.0
        ), gold
        if gold.isalnum():
            assert equivalent(rf"\text{{{gold}}}", gold) and equivalent(
                rf"\mathbf{{{gold}}}", gold
            ), gold


# Wrong answers that are near the right one: unworked, false, or swallowed by a magnitude.
REFUSED = [
    ("40-3*5+30", "55"),
    (r"17 \times 23", "391"),
    ("3x+6=0", "x=-2"),
    ("2x=4", "x=2"),
    ("f(0)=1", "f(0)=2"),
    ("e=6", "e=5"),
    (r"\ln 2\approx0.1", r"\ln 2\approx0.693"),
    ("f(0.52)>0.51", "f(0.51)>0.51"),
    ("10", "10(1-e^{-100t})"),
    ("2023^{2023}", "2023^{2023}-1"),
    ("1-e^{-50}", "1"),
    (r"\log_{a^2} b", r"\log_a b"),
    (r"\tanh^{-1}(1/2)", r"1/\tanh(1/2)"),
    ("3mg", "3"),
    ("(A) (B) (C) (D)", "A"),
    ("A: 3, B: 4", "A: 5, B: 6"),
    ("1⅓", "11/3"),
    ("x₂", "2x"),
    ("x>1 or x<5", "x>1 and x<5"),
    ("IV", "VI"),
    (r"\text{BA}", "AB"),
    ("0.(3)", "0"),
    ("2 minutes", "2 hours"),
    ("5 cents", "$5"),
    ("5 cents", r"\$5"),
    (r"\pm 1 \pm \sqrt 2", r"1+\sqrt2, -1-\sqrt2"),
    ("-x=5", "5"),
    ("(3*17)", "51"),
    ("17·23", "391"),
    ("(17)(23)", "391"),
    (r"17\cdot 23", "391"),
    (r"\frac{17\cdot23}{1}", "391"),
    ("2^3*5", "40"),
    (r"\sqrt{9+16}", "5"),
    ("50%+5", "55"),
    ("x=40+15", "x=55"),
    ("x=40+15", "55"),
    ("55=40+15", "55"),
    ("40+15=55", "40"),
    (r"\text{40+15}", "55"),
    ("100-45", "55"),
    ("5+5+5", "15"),
    ("15=5+5+5", "15"),
    ("|-5-50|", "55"),
    (r"\max(55,3)", "55"),
    ("(1+1,3)", "(2,3)"),
    (r"\sqrt{50}+\sqrt8", r"7\sqrt2"),
    ("5-3i+2", "7-3i"),
    (r"\lfloor n/2\rfloor", "0"),
    ("3 m g", "3"),
    ("5 abc", "5"),
    ("$5$ or $6$", "5"),
    ("1e400+1", "1e400"),
    ("3/0", "3"),
    ("5 - x", "5"),
    ("5 wrong", "5"),
    ("5 or less", "5"),
    ("11 hours", "1"),
    ("x=5, y=6", "5"),
    ("5 cm - 3 cm", "2"),
    ("2*3 cm", "6"),
    ("5 cm", "5 m/s"),
    ("-5 apples", "5"),
    ("42?", "42"),
    ("42+C", "42"),
    ("6/2*3", "9"),
    ("3(3)", "9"),
    ("5 ! 3", "5"),
    ("y=5", "x=5"),
    ("1:2", "0.5"),
    ("2x > 6", "x > 3"),
]

REFUSED += [
    # a root, power, factorial or binomial that has a rational value
    (r"\sqrt{3025}", "55"),
    (r"\sqrt[3]{8}", "2"),
    (r"8^{1/3}", "2"),
    (r"16^{0.5}", "4"),
    ("4^5", "1024"),
    ("55^1", "55"),
    ("55^0", "1"),
    ("5!", "120"),
    (r"\binom{11}{2}", "55"),
    (r"\frac{10!}{7!}", "720"),
    (r"(\sqrt{4}, 3)", "(2,3)"),
    (r"\log_2 2^{55}", "55"),
    (r"2\log_2 8", "6"),
    (r"\frac{1/2}{2/3}", r"\frac34"),
    (r"\pi\cdot 6^2", r"36\pi"),
    (r"(1+\sqrt2)^2", r"3+2\sqrt2"),
    (r"i\cdot i", "-1"),
    ("i^2", "-1"),
    (r"e^{i\pi}", "-1"),
    ("(1+2i)(3+4i)", "-5+10i"),
    ("1/i", "-i"),
    # infinity is no number
    (r"\frac1\infty", "0"),
    (r"e^{-\infty}", "0"),
    (r"2\infty", r"\infty"),
    # sets in sets, a union and a list
    (r"\{\{1\},2\}", r"\{1,\{2\}\}"),
    (r"\{1,2\}", r"\{1,\{2\}\}"),
    (r"\{\{1,2\},3\}", r"\{1,2,3\}"),
    (r"\{\}", r"\{\emptyset\}"),
    ("(0,1),(2,3)", r"(0,1)\cup(2,3)"),
    # letters of a text
    ("TH", "HT"),
    ("BA", "AB"),
    ("LX", "XL"),
    ("CR", "R C"),
    ("C. D.", "C"),
    # units
    ("5 kHz", "5 Hz"),
    (r"5 \text{ J}", r"5 \text{ N}"),
    (r"5 \text{ oranges}", r"5 \text{ apples}"),
    (r"30 \text{ radians}", r"30^\circ"),
    (r"5 \text{ hundred}", "5"),
    (r"5\text{k}", "5"),
    ("5! \\text{ ways}", "5 \\text{ ways}"),
    (r"\alpha\beta", r"\alpha, \beta"),
    ("2\\Omega", "2"),
    # relations
    (r"42 \approx 43", "42"),
    ("2", "x+y=2"),
    ("x+y=x+y", "x+y=2"),
    ("2x+2y=2", "x+y=2"),
    ("x-y=2", "x+y=2"),
    (r"(x+y)^2=0", "x+y=0"),
    (r"2\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
    (r"1\begin{pmatrix}1+1\\4\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
    # work that is left
    ("110/2", "55"),
    ("84/2", "42"),
    (r"\frac{84}{2}", "42"),
    ("x = 84/2", "x = 42"),
    ("(84/2, 1)", "(42, 1)"),
    ("2=2", "2"),
    (r"\tanh(90)", "1"),
    (r"\lfloor 55.5\rfloor", "55"),
    (r"\sin^{-1} 1", r"\frac{1}{\sin 1}"),
    (r"e^{\ln 55}", "55"),
    (r"\ln e^{55}", "55"),
    (r"\sqrt{55^2}", "55"),
    (r"55\cos 0", "55"),
    (r"\sqrt{17}\sqrt{17}", "17"),
    (r"(1+2i)+(3+4i)", "4+6i"),
    (r"3\sqrt2+4\sqrt2", r"7\sqrt2"),
    # negative points
    ("|x|", "x"),
    ("|a-b|", "a-b"),
    ("|ac|", "ac"),
    (r"\sqrt{x^2}", "x+0"),
    # unknown functions
    (r"\lfloor n/2\rfloor", "n/2"),
    (r"\lfloor x\rfloor", r"\lceil x\rceil"),
    (r"\lfloor x\rfloor+\lfloor y\rfloor", r"\lfloor x+y\rfloor"),
    (r"\frac{dy}{dx}", r"\frac{y}{x}"),
    # sets of numbers, conditions
    (r"x < 1 \text{ or } x > 2", r"(-\infty,1]\cup[2,\infty)"),
    (r"x > 1 \text{ and } x > 2", r"(1,\infty)"),
    (r"\mathbb{R}\setminus\{1,2\}", r"\mathbb{R}\setminus\{1,3\}"),
    (r"\{x \in \mathbb{Z} : x > 3\}", r"(3,\infty)"),
    # units
    ("60 km/h", "60 mph"),
    ("5 cm^2", "5 cm"),
    ("25 °C", "25 °F"),
    ("5 a.m.", "5 p.m."),
    ("3 billion", "3 million"),
    (r"5 \text{ apples and } 6 \text{ oranges}", "5"),
    (r"42 \text{ (wrong)}", "42"),
    # forms that the grammar does not know: equal to nothing but their own spelling
    (r"0.\overline{3}", "0"),
    (r"0.\overline{3}", "0.3"),
    ("0.333...", "0.333"),
    ("|-5|", "5"),
    ("f(2x)", "2f(x)"),
    (r"\dot{x}y", r"x\dot{y}"),
    ("x > 1 and x < 5", r"(1,\infty),(-\infty,5)"),
    ("x > 1 and x < 5", "x > 1 or x < 5"),
    (r"\mathbb{R} - \{2\}", r"\mathbb{R}"),
    (r"x \ne 2", "2"),
    (r"\max(3,3)", "3"),
    (r"\pm 1 \pm \sqrt2", r"1+\sqrt2"),
    (r"\frac12\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
    ("11:30 AM", "11:30 PM"),
    ("3 thousand", "3"),
    ("9" * 70, "9" * 69 + "8"),
    ("y = 2x + 3", "2x - y + 4 = 0"),
]

# Right answers as models write them.
WRITTEN = [
    (r"\frac{10!}{7!}", r"\frac{10!}{7!}"),
    ("720", r"\frac{10!}{7!}"),
    (r"\binom{10}{2}", r"\binom{10}{8}"),
    (r"\frac{1}{2^{10}}", r"\frac{1}{1024}"),
    (r"\sqrt{-4}", "2i"),
    (r"\sqrt{2}e^{\frac{\pi}{4} i}", "1+i"),
    ("0+3i", "3i"),
    ("0 - i", "-i"),
    ("2x+2y=4", "x+y=2"),
    ("-x-y+2=0", "x+y=2"),
    ("9x^2+4y^2=36", r"\frac{x^2}{4}+\frac{y^2}{9}=1"),
    ("2x-y+1=0", "y=2x+1"),
    (r"\frac12\begin{pmatrix}2&4\\6&8\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"-\begin{pmatrix}1\\2\end{pmatrix}", "(-1,-2)"),
    (r"42 \Omega", "42"),
    (r"42\,\text{k}\Omega", "42"),
    (r"5\,\mu\text{m}", "5"),
    ("42 EUR", "42"),
    ("EUR 42", "42"),
    (r"\pounds 42", "42"),
    ("42¢", "42"),
    (r"\text{Rs. } 42", "42"),
    ("30^o", "30"),
    ("30º", "30"),
    ("log_2(8)", "3"),
    ("5 kilometers per hour", r"5 \text{ km/h}"),
    ("1,000, 2,000", "1000, 2000"),
    ("100, 200", "100,200"),
    (r"\{1\}\cup\{2\}", r"\{1,2\}"),
    (r"\{\{2\},1\}", r"\{1,\{2\}\}"),
    (r"A \cup B = \{1,2\}", r"\{1,2\}"),
    (r"x \ne 0", r"\mathbb{R}\setminus\{0\}"),
    (r"\text{The value is } 5", "5"),
    (r"\text{Range: }[1,5]", "[1,5]"),
    (r"\large 42", "42"),
    ("Yes, it is.", "Yes"),
    (r"\text{No solutions exist}", r"\text{no solution}"),
    (r"\begin{cases} x & \text{if } x>0 \\ 1 & \text{if } x\le 0\end{cases}",
     r"\begin{cases} x, & x>0 \\ 1, & x\le 0\end{cases}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", "1/6"),
    ("0.(27)", "3/11"),
    ("0.333…", "1/3"),
    ("1.8333...", "11/6"),
    (r"{n \choose 2}", "n(n-1)/2"),
    ("(1010)_2", "1010_2"),
    (r"\int_0^1 x\,dx=\frac12", "1/2"),
    (r"\sum_{k=1}^{10} k = 55", "55"),
    ("x=3, y=4", "(3,4)"),
    ("y=4, x=3", "(3,4)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\begin{cases} x=1 \\ y=2 \end{cases}", "x=1, y=2"),
    (r"\mathbb R\setminus\{2\}", r"\mathbb{R} - \{2\}"),
    (r"x \ne 2", r"(-\infty,2)\cup(2,\infty)"),
    (r"x < 1 \text{ or } x > 2", r"(-\infty,1)\cup(2,\infty)"),
    (r"x > 1 \text{ and } x \le 2", "(1,2]"),
    (r"\{x \mid 1 < x < 5\}", "(1,5)"),
    (r"5 \mathrm{~m}", "5"),
    (r"9.8 \frac{\text{m}}{\text{s}^2}", "9.8"),
    (r"\$3 million", "3000000"),
    ("£12", "12"),
    ("42个", "42"),
    (r"\textcolor{red}{42}", "42"),
    (r"\color{red} 42", "42"),
    (r"\bf 42", "42"),
    (r"\sfrac{3}{4}", "3/4"),
    (r"\tan^{-1} 2", r"\arctan 2"),
    ("|x-2|", "|2-x|"),
    (r"\lfloor n/2 \rfloor", r"\left\lfloor \frac{n}{2} \right\rfloor"),
    (r"\pm 1 \pm \sqrt2", r"1+\sqrt2, 1-\sqrt2, -1+\sqrt2, -1-\sqrt2"),
    ("{1, 2}", r"\{2, 1\}"),
    ("m+n = 17", "17"),
    (r"\sigma^2 = 2", "2"),
    ("12:30 p.m.", "12:30 PM"),
    (r"\text{5 hours 30 minutes}", r"5 \text{ hours } 30 \text{ minutes}"),
    (r"\text{Yes, because } 3 \text{ is odd}", "Yes"),
    ("42", "84/2"),
    ("x=1,x=2", "1,2"),
    ("5", "5"),
    (r"{\bf 42}", "42"),
    (r"\approx 42", "42"),
    ("km/h 3", "km/h 3"),
    ("60 km/h", "60"),
    ("9.8 m/s^2", "9.8"),
    ("25 °C", "25"),
    ("5 million", "5000000"),
    (r"S=\{1,2\}", r"\{1,2\}"),
    (r"x \in \{1,2\}", "1,2"),
    (r"-2 \le x \le 7", "[-2,7]"),
    (r"\binom n2", "n(n-1)/2"),
    ("(C) 12", "12"),
    ("Option C", "C"),
    ("Yes, because 3 is odd", "Yes"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"\text{infinity}", r"\infty"),
    ("no solutions", r"\text{no solution}"),
    ("2+3i", "3i+2"),
    (r"3\times10^{8}", "300000000"),
    (r"6\sqrt2", r"\sqrt{72}"),
    (r"-\frac{1}{2}", "-0.5"),
    (r"\frac{\sqrt3}{2}", r"\sqrt{3}/2"),
    ("15+12=27", "27"),
    (r"1+\sqrt2", r"\sqrt2+1"),
    ("2^{10}-1", "2^{10}-1"),
    ("1023", "2^{10}-1"),
    ("x=-2", "-2"),
    ("5 kilometers", "5 km"),
    ("5 cm^2", "5"),
    ("5cm", "5"),
    (r"100 \text{ meters per second}", "100"),
    ("20%", "20"),
    (r"\$1,234.50", "1234.5"),
    ("approximately 42", "42"),
    ("a = 1, b = 2", "(1,2)"),
    (r"\dfrac{17}{4}\pi", r"\frac{17\pi}{4}"),
    (r"2\pi r", r"2r\pi"),
    ("$42$", "42"),
    (r"\(42\)", "42"),
    ("x = 3 or x = -3", r"\pm 3"),
    ("x_1=1, x_2=2", "1,2"),
    ("(2, 3) and (4, 5)", "(4,5),(2,3)"),
    ("forty-two", "forty-two"),
    ("Monday.", "monday"),
    (r"\text{Yes}.", "yes"),
    (r"\log_{10}(100)", "2"),
    ("all real numbers", r"\mathbb{R}"),
    ("DNE", "dne"),
    (r"\frac{1}{2}, \frac{3}{2}", "0.5, 1.5"),
    (r"\left[\frac{1}{2}, 3\right)", "[0.5,3)"),
    ("f(x)=x^2", "x^2"),
    (r"\frac{-1+\sqrt{5}}{2}", r"\frac{\sqrt5-1}{2}"),
    (r"\frac{e^{2}-1}{2}", r"\frac12(e^2-1)"),
    ("7 apples", "7"),
    ("12:30", "12:30"),
    (r"1\;000", "1000"),
    (r"\text{(B)}", "B"),
    ("(B)", "B"),
    ("B)", "B"),
]

# Whole responses, the gold answer, the reward.
RESPONSES = [
    (r"$x=\boxed{1}$ or $x=\boxed{2}$", "1,2", 1),
    (r"x = \boxed{1}, so twice that is \boxed{2}", "2", 1),
    (r"\boxed{5}, \boxed{6}", "6", 0),
    (r"\boxed{5 \boxed{6}}", "6", 0),
    ("The answer is 42. Is this answer right? Yes: 42/6 = 7", "42", 1),
    ("The correct option is B.", "B", 1),
    ("The answer should be 42.", "42", 1),
    ("The answer is not 5", "5", 0),
    (b"\\boxed{5}", "5", 0),
    (r"\boxed{None}", None, 0),
    (r"\boxed{1/2}", 0.5, 1),
    (r"x=\boxed{1}$ or $\boxed{2}", "1,2", 1),
    ("The answer is **42**.", "42", 1),
    ("***42***", "42", 1),
    ("So we get\n\n**42**", "42", 1),
    ("**Step 42** then we go on", "42", 0),
    ("__Answer:__ 42", "42", 1),
    ("The answer is indeed 42.", "42", 1),
    ("The answer is $42$, as we claimed.", "42", 1),
    ("The answer is 42 (see 43).", "42", 0),
    ("The answer cannot be 42.", "42", 0),
    ("The answer isn't equal to 42, it is unknown: 43", "42", 0),
    (r"$x_1=\boxed{1}$, $x_2=\boxed{2}$", "1,2", 1),
    (r"\boxed{5}", r"\boxed{5}", 1),
    (r"\boxed{\boxed{5}}", "5", 1),
    ("**Final Answer**\n\n42", "42", 1),
    ("## Final Answer\n42", "42", 1),
    ("The answer is 42. I hope this answer is helpful.", "42", 1),
    ("12<|im_end|>", "12", 0),
    ("#### 12<|im_end|>", "12", 1),
    (r"\boxed{12}<|im_end|>", "12", 1),
    (r"<think>\boxed{5}</think> The answer is 7.", "7", 1),
    (r"<think>\boxed{5}</think> The answer is 7.", "5", 0),
    ("\\boxed{4}\n\n\\boxed{4}", "4", 1),
    (r"\boxed{x = 40+15 = 55}", "55", 1),
    (None, "5", 0),
    (5, 5, 0),
    (r"\boxed{5}", 5, 1),
    (r"\boxed{5}", None, 0),
    (r"\boxed{42", "42", 0),
    ("Answer: 42\n", "42", 1),
    (r"The final answer is $\boxed{42}$. The word answer is here.", "42", 1),
    ("Thus the answer is\n\n$$42$$", "42", 1),
    ("the answer is x = 5.", "5", 1),
    ("The answer is: 3.5", "3.5", 1),
    ("The answer is 3.5.", "3.5", 1),
    ("Hence, the correct answer is (B).", "B", 1),
    ("The answer is B, since 2<3.", "B", 1),
]


@pytest.mark.parametrize("answer, gold", REFUSED)
def test_refused(answer, gold):
    assert not equivalent(answer, gold)


@pytest.mark.parametrize("answer, gold", WRITTEN)
def test_written(answer, gold):
    assert equivalent(answer, gold)


@pytest.mark.parametrize("text, gold, expected", RESPONSES)
def test_responses(text, gold, expected):
    assert verify(text, gold) == expected


@pytest.mark.parametrize("gold", ["55", "x = 55", "55 cm", "(55, 2)"])
@pytest.mark.parametrize("work", ["40-3*5+30", "5*11", "50+5", "(60-5)", "5(11)", r"5 \times 11"])
def test_copying_the_question_earns_nothing(work, gold):
    assert equivalent(gold, gold)
    assert not equivalent(gold.replace("55", work), gold)


def test_numbers_and_none_never_raise():
    for x in (5, 5.0, None, True, ["5"], {"5": 5}):
        for y in (5, None, "5"):
            assert verify(x, y) in (0.0, 1.0) and equivalent(x, y) in (True, False)
            assert parses(x) in (True, False)
    assert verify(r"\boxed{5}", 5) == 1.0


@pytest.mark.parametrize("name", ["math500", "minerva", "gsm8k_test"])
def test_solutions_earn_one(name):
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("no data")
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        gold = row["answer"]
        text = (
            f"{row['solution']}\n#### {gold}" if "solution" in row else rf"so $\boxed{{{gold}}}$."
        )
        assert verify(text, gold) == 1.0, gold


CASES = DATA / "verifier_cases_dev.jsonl"


@pytest.mark.skipif(not CASES.exists(), reason="no labelled cases")
def test_accuracy_on_hard_cases():
    rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    right = [row for row in rows if row["right"] == 1]
    wrong = [row for row in rows if row["right"] == 0]
    assert sum(verify(row["text"], row["gold"]) for row in wrong) == 0
    assert sum(verify(row["text"], row["gold"]) for row in right) >= 11 / 12 * len(right)
