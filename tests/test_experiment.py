"""The statistics of the claims' tables, worked out by hand."""
import pytest

from analysis import em_results
from analysis import experiment as ex


def run(right: str) -> dict:
    return {"summary": {"right_after": right}}


def test_error_when_seeds_and_problems_are_drawn_anew():
    """Differences by seed and problem (1, 0), (0, 0). Row means 0.5 and 0, so the error over seeds
    is 0.25, and so is that over problems. The cells have mean 0.25 and variance
    (0.5625 + 3 * 0.0625) / 3 = 0.25, so their mean has 0.25 / 4. In all 0.0625 + 0.0625 - 0.0625,
    whose root is 0.25."""
    assert ex.crossed([run("80"), run("00")], [run("00"), run("00")]) == pytest.approx(0.25)


def test_the_same_difference_everywhere_has_no_error():
    """Each cell is 0.5: nothing varies."""
    assert ex.crossed([run("44"), run("44")], [run("00"), run("00")]) == 0


def test_gap_of_wrong_and_right_answers_by_problem():
    """Wrong 2 and 4, mean 3; right 1. Problem 0 has the parts (2 - 3) / 2 and (1 - 1) / 1, problem
    1 has (4 - 3) / 2: the error is the root of 0.25 + 0.25."""
    groups = {True: [(0, 1.0)], False: [(0, 2.0), (1, 4.0)]}
    assert em_results.gap(groups, 2) == "+2.000 ± 0.707"


def test_styles_of_answers_and_the_mix_alone():
    """Two direct answers, one of them right, a short one that is right, a long one that is not. In
    another model's mix, all of it direct, half of the answers would be right."""
    texts = ["\\boxed{3}", "\\boxed{4}", "1+2=3. \\boxed{3}", "1+2=4 check 4-2=2. \\boxed{4}"]
    found = em_results.by_style([{"responses": texts, "rewards": [1.0, 0.0, 1.0, 0.0]}])
    assert found["direct"] == {"share": 0.5, "accuracy": 0.5}
    assert found["short"] == {"share": 0.25, "accuracy": 1.0}
    assert found["long"] == {"share": 0.25, "accuracy": 0.0}
    only = {"direct": {"share": 1.0}, "short": {"share": 0.0}, "long": {"share": 0.0}}
    assert em_results.mixed(only, found) == 0.5
