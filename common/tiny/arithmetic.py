"""The embedded task: two- and three-step whole-number arithmetic, "Compute 17+4*6-9." -> "32".

    python -m common.tiny.arithmetic         # writes train.jsonl and test.jsonl beside this file

A hash of a problem's text decides whether it is for training or for evaluation, so the two never
overlap. The embedded model was trained on problems of the training part alone.
"""
import hashlib
import json
import pathlib
import random

LARGEST = 150  # no number in a solution is larger, none is negative


def solve(numbers: list[int], operators: list[str]) -> list[int]:
    """The results of the steps that reduce an expression, its value last: a product first, then
    from the left. numbers: k + 1 integers, operators: k of "+-*"."""
    numbers, operators = list(numbers), list(operators)
    results = []
    while operators:
        i = operators.index("*") if "*" in operators else 0
        a, b = numbers[i:i + 2]
        values = {
            "+": a + b,
            "-": a - b,
            "*": a * b,
        }
        results.append(values[operators.pop(i)])
        numbers[i:i + 2] = results[-1:]
    return results


def is_held_out(problem: str) -> bool:
    """Whether a problem is for evaluation: one in eight, by a hash of its text."""
    return hashlib.sha256(problem.encode()).digest()[0] < 32


def make_problem(rng: random.Random, held_out: bool):
    """One problem of the wanted part -> text, numbers, operators. At most one product."""
    while True:
        count = rng.choice((2, 3))
        operators = [rng.choice("+-") for _ in range(count)]
        if rng.random() < 0.6:
            operators[rng.randrange(count)] = "*"
        numbers = [rng.randint(2, 49) for _ in range(count + 1)]
        if "*" in operators:
            i = operators.index("*")
            numbers[i] = rng.randint(2, 9)
            numbers[i + 1] = rng.randint(2, 12)
        problem = "Compute "
        for number, operator in zip(numbers, [*operators, "."], strict=True):
            problem += f"{number}{operator}"
        results = solve(numbers, operators)
        in_range = min(results) >= 0 and max(results) <= LARGEST
        if in_range and is_held_out(problem) == held_out:
            return problem, numbers, operators


def arithmetic_problems(count: int, held_out: bool, seed: int = 0) -> list[dict]:
    """`count` different problems of one part as {"problem", "answer"} rows, by the seed."""
    rng = random.Random(f"arithmetic {held_out} {seed}")
    answers = {}
    while len(answers) < count:
        problem, numbers, operators = make_problem(rng, held_out)
        answers[problem] = str(solve(numbers, operators)[-1])
    return [{"problem": text, "answer": answer} for text, answer in answers.items()]


def main():
    for name, count, held_out in (("train", 2048, False), ("test", 1024, True)):
        rows = arithmetic_problems(count, held_out)
        order = list(range(count))
        random.Random("order 0").shuffle(order)  # as load_problems does, which undoes this
        placed = sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])
        text = "".join(json.dumps(row) + "\n" for _, row in placed)
        pathlib.Path(__file__).with_name(f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
