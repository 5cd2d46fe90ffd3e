"""The embedded task: two- and three-step whole-number arithmetic, "Compute 17+4*6-9." -> "32".

Problems are made from a seed; nothing is stored. A hash of a problem's text decides whether it is
for training or for evaluation, so the two never overlap. The embedded model was trained on the
training part alone.
"""
import hashlib
import random

LARGEST = 150  # no number in a solution is larger, none is negative


def solve(numbers: list[int], operators: list[str]) -> list[tuple[int, str, int, int]]:
    """The steps (a, operator, b, result) that reduce an expression: products first, from the left.

    numbers: k + 1 integers, operators: k of "+-*". The last step's result is the value.
    """
    numbers, operators = list(numbers), list(operators)
    steps = []
    for precedence in ("*", "+-"):
        i = 0
        while i < len(operators):
            if operators[i] not in precedence:
                i += 1
                continue
            a, b = numbers[i:i + 2]
            operator = operators.pop(i)
            results = {"+": a + b, "-": a - b, "*": a * b}
            result = results[operator]
            numbers[i:i + 2] = [result]
            steps.append((a, operator, b, result))
    return steps


def is_held_out(problem: str) -> bool:
    """Whether a problem is for evaluation: one in eight, by a hash of its text."""
    return hashlib.sha256(problem.encode()).digest()[0] < 32


def make_problem(rng: random.Random, held_out: bool) -> tuple[str, list[int], list[str]]:
    """One problem of the wanted part -> text, numbers, operators. At most one product."""
    while True:
        count = rng.choice((2, 3))
        operators = [rng.choice("+-") for _ in range(count)]
        if rng.random() < 0.6:
            place = rng.randrange(len(operators))
            operators[place] = "*"
        numbers = [rng.randint(2, 49) for _ in range(len(operators) + 1)]
        for i, operator in enumerate(operators):
            if operator == "*":
                numbers[i] = rng.randint(2, 9)
                numbers[i + 1] = rng.randint(2, 12)
        expression = str(numbers[0])
        for operator, number in zip(operators, numbers[1:], strict=True):
            expression += f"{operator}{number}"
        problem = f"Compute {expression}."
        results = [step[3] for step in solve(numbers, operators)]
        in_range = min(results) >= 0 and max(results) <= LARGEST
        if in_range and is_held_out(problem) == held_out:
            return problem, numbers, operators


def arithmetic_problems(count: int, held_out: bool, seed: int = 0) -> list[dict]:
    """`count` different problems of one part as {"problem", "answer"} rows, by the seed."""
    rng = random.Random(f"arithmetic {held_out} {seed}")
    answers = {}
    while len(answers) < count:
        problem, numbers, operators = make_problem(rng, held_out)
        answers[problem] = str(solve(numbers, operators)[-1][3])
    return [{"problem": text, "answer": answer} for text, answer in answers.items()]
