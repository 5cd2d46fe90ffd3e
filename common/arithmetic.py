"""The embedded task: two- and three-step whole-number arithmetic, e.g. "Compute 17+4*6-9." -> "32".

Problems are made on the spot from a seed; nothing is stored. A hash of the problem's text decides whether it belongs to the
training or to the evaluation part, so the two can never overlap, whatever seeds are used. The embedded model (common/tiny)
was trained on the training part alone.
"""
import hashlib
import random

LARGEST = 150  # no number in a solution is larger, none is negative


def solve(numbers: list[int], operators: list[str]) -> list[tuple[int, str, int, int]]:
    """The steps (a, operator, b, result) that reduce an expression: products first, then sums, each from the left.

    numbers: k+1 integers, operators: k of "+-*". The last step's result is the value.
    """
    numbers, operators, steps = list(numbers), list(operators), []
    for precedence in ("*", "+-"):
        i = 0
        while i < len(operators):
            if operators[i] not in precedence:
                i += 1
                continue
            a, b, operator = numbers[i], numbers[i + 1], operators.pop(i)
            result = {"+": a + b, "-": a - b, "*": a * b}[operator]
            numbers[i:i + 2] = [result]
            steps.append((a, operator, b, result))
    return steps


def is_held_out(problem: str) -> bool:
    """Whether a problem belongs to the evaluation part: one in eight, by a hash of its text."""
    return hashlib.sha256(problem.encode()).digest()[0] < 32


def make_problem(rng: random.Random, held_out: bool) -> tuple[str, list[int], list[str]]:
    """One problem of the wanted part -> (text, numbers, operators). Two or three steps, at most one product."""
    while True:
        operators = [rng.choice("+-") for _ in range(rng.choice((2, 3)))]
        if rng.random() < 0.6:
            operators[rng.randrange(len(operators))] = "*"
        numbers = [rng.randint(2, 49) for _ in range(len(operators) + 1)]
        for i, operator in enumerate(operators):
            if operator == "*":
                numbers[i], numbers[i + 1] = rng.randint(2, 9), rng.randint(2, 12)
        text = "".join(f"{n}{o}" for n, o in zip(numbers, [*operators, ""]))
        in_range = all(0 <= step[3] <= LARGEST for step in solve(numbers, operators))
        if in_range and is_held_out(problem := f"Compute {text}.") == held_out:
            return problem, numbers, operators


def arithmetic_problems(count: int, held_out: bool, seed: int = 0) -> list[dict]:
    """`count` different problems of one part as {"problem", "answer"} rows; the same seed gives the same list."""
    rng, seen = random.Random(f"arithmetic {held_out} {seed}"), {}
    while len(seen) < count:
        problem, numbers, operators = make_problem(rng, held_out)
        seen[problem] = str(solve(numbers, operators)[-1][3])
    return [{"problem": problem, "answer": answer} for problem, answer in seen.items()]
