"""Does your GRPO loss pass? Cases worked out by hand, put to any callable.

    python tests/conformance.py mypackage.losses:grpo_loss
    python tests/conformance.py grpo:grpo_loss --advantages grpo:group_advantages

The gradient is what counts: a loss of the right value with a wrong gradient trains wrongly.
What the callables take and give (B answers, T tokens, P problems, G answers to each, V vocabulary):

    loss(logp, old_logp, advantages, mask, clip_low=, clip_high=, dual_clip=, denominator=)
                      (B, T), (B, T), (B,), (B, T) -> a scalar, or a tuple that begins with it;
                      both clips default to 0.2, the denominator to the tokens in mask
    --advantages      (P, G) rewards -> (P, G) or (P G,)
    --kl-loss         (B, T) logp, (B, T) reference's -> (B, T) or its mean; its gradient is tested
    --kl-value        the same; its value is tested
    --logprobs        (B, T, V) logits, (B, T) tokens, temperature -> (B, T)

A part that a loss has no argument for is "not offered", which is no failure. Exit code: 0 if
nothing fails, 1 if something does, 2 for a callable that cannot be loaded. Names are looked up in
this folder, in the repository and where the command is run; adapters.py has other libraries'.
"""
import importlib
import inspect
import itertools
import math
import pathlib
import sys
from dataclasses import dataclass, field
from functools import partial

import torch

sys.path.insert(1, str(pathlib.Path(__file__).parents[1]))
sys.path.append("")
from common.flags import BadInput, exit_on_bad_input, new_parser

ANY = None  # a position whose value another case looks at


@dataclass
class Case:
    """A batch, and what the loss's derivative by each log-prob (and maybe the loss) has to be."""
    name: str
    ratio: list          # B T, answer after answer: p / p_old
    advantages: list     # B
    gradient: list       # B T
    failure: str         # what it does to training
    loss: float = ANY
    mask: list = None    # B T, default 1
    options: dict = field(default_factory=dict)
    row_by_row: bool = False  # one call per answer, their losses added up


# r = p / p_old, and d r / d log p = r. Inside the window a token's loss is -r A, and so is its
# derivative; where the clip holds, the loss is a constant and the derivative is 0. Divided by the
# number of tokens in the mask.
CASES = [
    Case("first update, r = 1", [1.0], [2.0], [-2.0],  # -A
         "the policy gradient itself is wrong: nothing is learnt", loss=-2.0),
    Case("good token, r above the window", [1.5], [2.0], [0.0],  # min(1.5, 1.2) 2 = 2.4
         "good tokens are pushed on without end within a rollout", loss=-2.4),
    Case("good token, r below the window", [0.5], [2.0], [-1.0],  # min(0.5, 0.8) 2 = r A
         "a good token that grew rare is never brought back", loss=-1.0),
    Case("bad token, r below the window", [0.5], [-2.0], [0.0],  # min(-1, -1.6), constant
         "bad tokens are pushed down without end: the entropy collapses", loss=1.6),
    Case("bad token, r above the window", [1.5], [-2.0], [3.0],  # min(-3, -2.4) = r A
         "a bad token that grew likely is never pushed back", loss=3.0),
    Case("clip_high alone", [1.25, 0.75], [2.0, -2.0],
         [-1.25, 0.0],  # 1.25 < 1.28: -2.5 / 2; 0.75 < 0.8: constant
         "DAPO's wider upper bound is not what it says", options={"clip_high": 0.28}),
    Case("clip_low alone", [0.85, 1.15], [-2.0, 2.0],
         [0.0, -1.15],  # 0.85 < 0.9: constant; 1.15 < 1.2: -2.3 / 2
         "the lower bound is not what it says", options={"clip_low": 0.1}),
    Case("dual clip", [5.0, 2.0, 5.0], [-2.0, -2.0, 2.0],
         [0.0, 4 / 3, 0.0],  # max(-10, 3 (-2)); max(-4, -6) = r A, 4 / 3; upper clip
         "one bad token that grew likely rules the update", options={"dual_clip": 3.0}),
    Case("r = e^100, too large for float32", [math.exp(100)], [-1.0], [0.0],
         "one token makes the gradient infinite, and every weight NaN"),
    Case("stop token, the mask's last", [1.0, 1.0, 9.0], [2.0],
         [ANY, -1.0, ANY],  # -2 / 2 tokens
         "the model does not learn to stop: answers grow into the limit", mask=[1, 1, 0]),
    Case("padding", [1.0, 1.0, 9.0], [-2.0], [ANY, ANY, 0.0],
         "what stands behind an answer is trained", mask=[1, 1, 0]),
    Case("token mean", [1.0, 1, 1, 1, 9, 9], [1.0, -5.0],
         [-0.25, -0.25, -0.25, 1.25, 0, 0],  # four tokens: -1 / 4, 5 / 4
         "the mean is not over tokens: those of long answers weigh otherwise",
         loss=0.5, mask=[1, 1, 1, 1, 0, 0]),  # (3 (-1) + 5) / 4
    Case("token mean over micro-batches", [1.0, 1, 1, 1, 9, 9], [1.0, -5.0],
         [-0.25, -0.25, -0.25, 1.25, 0, 0],
         "the gradient depends on how a batch is cut into micro-batches",
         loss=0.5, mask=[1, 1, 1, 1, 0, 0], options={"denominator": 4}, row_by_row=True),
    Case("advantages of an all-equal group", [1.0, 1.5], [0.0], [0.0, 0.0],
         "groups without signal move the weights"),
    Case("nothing in the mask", [1.0, 1.0], [1.0], [0.0, 0.0],
         "0 / 0: one such micro-batch makes every weight NaN", mask=[0, 0]),
]


def gradient_and_loss(loss, case: Case) -> list[float]:
    """The derivative by each of the B T log-probs, then the loss."""
    shape = len(case.advantages), -1
    ratio = torch.tensor(case.ratio, dtype=torch.float64).view(shape)   # (B, T)
    logp = (ratio.log() - 1).float().requires_grad_()                   # (B, T)
    old_logp = -torch.ones_like(logp)                                   # (B, T)
    advantages = torch.tensor(case.advantages)                          # (B,)
    mask = torch.ones_like(old_logp)                                    # (B, T)
    if case.mask:
        mask = torch.tensor(case.mask).float().view(shape)
    total = 0.0
    for rows in torch.arange(len(logp)).split(1 if case.row_by_row else len(logp)):
        result = loss(logp[rows], old_logp[rows], advantages[rows], mask[rows], **case.options)
        total = total + (result[0] if isinstance(result, tuple) else result)
    total.backward()
    return [*logp.grad.flatten().tolist(), total.item()]


def kl_gradient_and_value(kl) -> list[float]:
    """By two logits; the mean over two equally likely tokens is the expectation."""
    logits = torch.zeros(2, requires_grad=True)
    logp = logits.log_softmax(0)[:, None]                               # (2, 1)
    ref_logp = torch.tensor([[1 / 4], [3 / 4]]).log()                   # (2, 1)
    mean = kl(logp, ref_logp).mean()
    mean.backward()
    return [*logits.grad.tolist(), mean.item()]


def at_temperature_two(logprobs) -> list[float]:
    logits = torch.tensor([[[0.0, 2 * math.log(2), 2 * math.log(3)]] * 3])  # (1, 3, 3)
    tokens = torch.tensor([[0, 1, 2]])                                  # (1, 3)
    return logprobs(logits, tokens, 2.0).flatten().tolist()


def of_rewards(rewards: list, advantages) -> list[float]:
    return advantages(torch.tensor(rewards)).flatten().tolist()


# part: (name, expected, what a failure does, callable -> numbers)
# KL: p = (1/2, 1/2), reference (1/4, 3/4), d = log p - log ref = (log 2, log 2/3). KL = E d =
# (log 4/3) / 2; by the first logit p1 (d1 - KL) = (log 3) / 4, as d1 - KL = (log 3) / 2.
OTHERS = {
    "advantages": [  # of 1, 0, 0, 0: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4
        ("std with ddof 1", [1.5, -0.5, -0.5, -0.5],
         "1.732: ddof 0, 15 % larger steps; 0.75: no std, Dr. GRPO; 1.0: RLOO",
         partial(of_rewards, [[1.0, 0, 0, 0]])),
        ("each group by itself", [1.5, -0.5, -0.5, -0.5] * 2,
         "easy problems are rewarded and hard ones punished",
         partial(of_rewards, [[1.0, 0, 0, 0], [8, 4, 4, 4]])),
        ("all-equal groups", [0.0] * 14, "NaN instead of no signal",
         partial(of_rewards, [[1.0] * 7, [0.0] * 7])),
        ("all-equal group, 0.7 sixteen times", [0.0] * 16,
         "groups without signal move the weights: rounding of the mean, 6e-8, over eps",
         partial(of_rewards, [[0.7] * 16]))],
    "kl_loss": [
        ("KL as a loss", [math.log(3) / 4, -math.log(3) / 4, ANY],
         "0: nothing holds the policy (k1); 0.25: k3's, which pulls otherwise",
         kl_gradient_and_value)],
    "kl_value": [
        ("KL as a number", [ANY, ANY, math.log(4 / 3) / 2],
         "what is logged is no KL; 0.161: k2", kl_gradient_and_value)],
    "logprobs": [  # logits / 2 are the logs of 1, 2, 3: p = 1/6, 1/3, 1/2
        ("temperature 2", [-math.log(6), -math.log(3), -math.log(2)],
         "what is trained is not what was sampled", at_temperature_two)],
}


def show(values: list) -> str:
    """0.5 x3, 1, 1 for 0.5, 0.5, 0.5, 1, 1."""
    runs = []
    for text, same in itertools.groupby(f"{x:.4g}" for x in values if x is not ANY):
        same = list(same)
        runs += [f"{text} x{len(same)}"] if len(same) > 2 else same
    return ", ".join(runs)


def judge(name: str, expected: list, failure: str, compute) -> bool:
    """Prints a case's line. compute() -> the numbers; what it raises is a failure too."""
    passed = False
    try:
        got = [x if y is not ANY else ANY for x, y in zip(compute(), expected, strict=True)]
        passed = all(y is ANY or abs(x - y) < 1e-3 for x, y in zip(got, expected, strict=True))
        text = show(got)
    except ImportError as error:
        raise BadInput(f"not installed: {error}") from error
    except Exception as error:  # another's code may raise anything
        text = f"{type(error).__name__}: {error}".splitlines()[0][:80]
    verdict = "pass" if passed else f"FAIL: {failure}"
    print(f"{name:36}{show(expected):31} {text:31} {verdict}")
    return passed


def offered(loss, options: dict) -> bool:
    parameters = inspect.signature(loss).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return anything or options.keys() <= parameters.keys()


def check(part: str, function) -> list[bool]:
    """Every case of a callable -> whether it passed; those that are not offered are left out."""
    passed = []
    for name, expected, failure, compute in OTHERS.get(part, []):
        passed.append(judge(name, expected, failure, partial(compute, function)))
    for case in CASES if part == "loss" else []:
        if offered(function, case.options):
            expected = [*case.gradient, case.loss]
            passed.append(judge(case.name, expected, case.failure,
                                partial(gradient_and_loss, function, case)))
        else:
            print(f"{case.name:36}not offered: {', '.join(case.options)}")
    return passed


def load(place: str):
    """`mypackage.losses:grpo_loss` -> that callable. BadInput."""
    module, _, name = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # another's code may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{place}: give a module and a callable in it, mypackage.losses:grpo_loss "
                       f"({reason})") from error
    if not callable(found):
        raise BadInput(f"{place}: not callable")
    return found


@exit_on_bad_input()
def main(argv=None) -> int:
    parser = new_parser(__doc__)
    parser.add_argument("loss", help="module:callable, as the others")
    for name in ("advantages", "kl-loss", "kl-value", "logprobs"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args(argv)
    functions = {part: load(place) for part, place in vars(args).items()
                 if place is not None}
    print(f"{'case':36}{'expected: gradient, loss':31} {'got':31}")
    passed = []
    for part, function in functions.items():
        passed += check(part, function)
    print(f"{sum(passed)} of {len(passed)} pass")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
