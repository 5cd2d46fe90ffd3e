"""Do the tests see a wrong sign? The maths is broken on purpose, one change at a time.

    python tests/benchmarks/mutants.py --files grpo.py          # minutes to half an hour per file
    python tests/benchmarks/mutants.py --files ppo.py --only gae --every 2

A mutant is a file with one change: + for -, < for <=, `and` for `or`, a number plus 1 (doubled if
it is a float), an `if` the other way round, an argument or a `.detach()` left out. The file's own
tests (TESTS) run on it until one fails; a mutant that passes them all is printed. It may be one
that no test could tell, such as x >= 0 for x > 0 where x is never 0: whoever reads decides. Each
is a process in a copy of the tree, forked from one that has imported torch; one that takes four
times as long as the tests without it counts as seen.
"""
import argparse
import ast
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
TESTS = {
    "grpo.py": "losses scripts", "bupo.py": "losses scripts", "kl3_grpo.py": "kl3 losses",
    "entropy_min.py": "entropy_min", "long_cot_sft.py": "long_cot", "ppo.py": "ppo losses",
    "common/sampling.py": "sampling", "common/logprobs.py": "logprobs",
    "common/internal_policy.py": "internal_policy", "common/distributed.py": "distributed",
    "common/evaluate.py": "sampling scripts", "common/verify.py": "verify",
}
SWAPS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"), ast.And: ("and", "or"), ast.Or: ("or", "and"), ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}
RENAMED = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum",
           "maximum": "minimum", "sum": "mean"}
DROPPED = {"detach", "float", "clamp", "clone", "exp", "square", "abs", "sqrt", "bool", "cumsum"}
UNSEEN = {"device", "flush", "use_reentrant", "use_cache", "desc", "disable"}  # same on a CPU


class Mutants(ast.NodeVisitor):
    """Collects (start, end, replacement, function), character offsets into the text."""

    def __init__(self, text: str):
        self.text, self.where, self.found = text, "", []
        self.starts = [0]
        for line in text.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.lines = text.splitlines()
        self.visit(ast.parse(text))

    def offset(self, line: int, column: int) -> int:
        before = self.lines[line - 1].encode()[:column].decode()  # ast counts bytes
        return self.starts[line - 1] + len(before)

    def start(self, node) -> int:
        return self.offset(node.lineno, node.col_offset)

    def end(self, node) -> int:
        return self.offset(node.end_lineno, node.end_col_offset)

    def code(self, node) -> str:
        return self.text[self.start(node):self.end(node)]

    def put(self, first: int, last: int, new: str) -> None:
        if self.where:
            self.found.append((first, last, new, self.where))

    def replace(self, node, new: str) -> None:
        self.put(self.start(node), self.end(node), new)

    def swap(self, op, left, right) -> None:
        old, new = SWAPS.get(type(op), (None, None))
        at = self.text.find(old, self.end(left), self.start(right)) if old else -1
        if at >= 0:
            self.put(at, at + len(old), new)

    def visit_FunctionDef(self, node):
        if node.name == "main":
            return
        outer = self.where
        self.where = outer or node.name
        for part in [*node.args.defaults, *node.body]:
            self.visit(part)
        self.where = outer

    def visit_JoinedStr(self, node):
        pass

    visit_Raise = visit_JoinedStr

    def visit_BinOp(self, node):
        self.swap(node.op, node.left, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.swap(node.op, left, right)
        self.generic_visit(node)

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, operands, node.comparators, strict=False):
            self.swap(op, left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if not isinstance(node.operand, ast.Constant):
            self.replace(node, f"({self.code(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.replace(node, repr(not node.value))
        elif isinstance(node.value, int):
            self.replace(node, repr(node.value + 1))
        elif isinstance(node.value, float):
            self.replace(node, repr(2 * node.value or 1.0))

    def visit_If(self, node):
        self.replace(node.test, f"not ({self.code(node.test)})")
        self.generic_visit(node)

    visit_IfExp = visit_While = visit_If

    def visit_Call(self, node):
        name = ast.unparse(node.func).split(".")[-1]
        if name in RENAMED:
            self.put(self.end(node.func) - len(name), self.end(node.func), RENAMED[name])
        if name in DROPPED and isinstance(node.func, ast.Attribute):
            self.replace(node, self.code(node.func.value))
        node.keywords = [k for k in node.keywords if k.arg and k.arg not in UNSEEN]
        for keyword in node.keywords:
            comma = self.text.rfind(",", self.end(node.func), self.start(keyword))
            if comma >= 0:
                self.put(comma, self.end(keyword), "")
        self.generic_visit(node)


def passes(tree: pathlib.Path, tests: list[str], limit: float) -> bool:
    """Whether all tests pass on this tree, in a fork of this process, within `limit` seconds."""
    child = os.fork()
    if child == 0:
        run_tests(tree, tests)
    began = time.time()
    while time.time() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run_tests(tree: pathlib.Path, tests: list[str]) -> None:
    """Becomes a process that says by its exit code whether the tests pass."""
    code = 1
    try:
        os.setsid()
        os.chdir(tree)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        sys.path[:0] = [str(tree), str(tree / "tests")]
        import pytest
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    finally:
        os._exit(int(code))


def judge(name: str, tree: pathlib.Path, only: str | None, every: int) -> tuple[int, int]:
    """Prints the mutants of a file that pass its tests -> how many were seen, how many made."""
    text = (ROOT / name).read_text()
    tests = [f"tests/test_{part}.py" for part in TESTS[name].split()]
    started = time.time()
    if not passes(tree, tests, 3600):
        raise SystemExit(f"{name}: its tests fail as it is")
    limit = 4 * (time.time() - started) + 30
    found = sorted(set(Mutants(text).found))
    chosen = [change for change in found if only in (None, change[3])][::every]
    seen = 0
    for first, last, new, _ in chosen:
        mutant = text[:first] + new + text[last:]
        ast.parse(mutant)  # what does not even parse would count as seen
        (tree / name).write_text(mutant)
        if passes(tree, tests, limit):
            line = text.count("\n", 0, first) + 1
            whole = text.splitlines()[line - 1].strip()
            print(f"{name}:{line}: {text[first:last]!r} -> {new!r}   in   {whole}", flush=True)
        else:
            seen += 1
    (tree / name).write_text(text)
    print(f"{name}: {seen} of {len(chosen)} seen, {time.time() - started:.0f} s", flush=True)
    return seen, len(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--every", type=int, default=1, help="take every n-th change")
    parser.add_argument("--only", help="one function's")
    args = parser.parse_args()
    import torch
    import transformers
    transformers.Qwen3ForCausalLM  # noqa: B018  imported here, it is there in every fork
    torch.set_num_threads(1)
    seen, made = 0, 0
    ignored = shutil.ignore_patterns(".git", "*venv", "runs", "analysis", "__pycache__")
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=ignored)
        for name in args.files:
            more_seen, more_made = judge(name, tree, args.only, args.every)
            seen += more_seen
            made += more_made
    print(f"{time.strftime('%Y-%m-%d')} {seen} of {made} seen")


if __name__ == "__main__":
    main()
