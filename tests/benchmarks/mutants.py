"""Do the tests see a wrong sign? Every operator, number, branch and argument of the maths is broken on purpose, one at a time.

    python tests/benchmarks/mutants.py                                  # the maths of all files: minutes to half an hour a file
    python tests/benchmarks/mutants.py --files grpo.py --every 5        # a fifth of grpo.py's
    python tests/benchmarks/mutants.py --files ppo.py --only gae        # one function's, or one line's: --only 107

A mutant is the file with one change: + for -, < for <=, `and` for `or`, a number plus 1 (doubled, if it is a float), an `if` the
other way round, an argument or `.detach()` left out, a statement dropped. The file's own tests (TESTS) are run on it until
one fails; a mutant that passes them all is printed. It may be one that no test could tell, such as x >= 0 for x > 0 where x is
never 0: whoever reads the list decides. Each is a process of its own, in a copy of the tree, forked from one that has imported
torch; one that takes four times as long as the tests without it counts as seen.
"""
import argparse
import ast
import collections
import concurrent.futures
import os
import pathlib
import queue
import shutil
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
TESTS = {"grpo.py": "losses logprobs kl3 scripts", "bupo.py": "losses internal_policy scripts", "kl3_grpo.py": "kl3",
         "entropy_min.py": "entropy_min", "long_cot_sft.py": "long_cot", "ppo.py": "ppo losses", "common/sampling.py": "sampling logprobs",
         "common/logprobs.py": "logprobs kl3", "common/internal_policy.py": "internal_policy internal_view",
         "common/optim.py": "logprobs scripts ppo", "common/distributed.py": "distributed", "common/verify.py": "verify"}
SWAPS = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
         ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.And: ("and", "or"),
         ast.Or: ("or", "and"), ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
         ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
         ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum", "sum": "mean"}
DROPPED = {"detach", "float", "clamp", "clone", "exp", "square", "abs", "sqrt", "bool", "cumsum", "log_softmax"}  # x.f(...) -> x

UNSEEN = {"device", "flush", "use_reentrant", "use_cache", "desc", "unit", "total", "disable", "label"}  # a CPU's results are the same


def changes(tree: ast.Module, text: str, main: bool) -> list[tuple[int, int, str, str]]:
    """-> [(start, end, replacement, function)], character offsets into text, in the order of the file."""
    lines = text.splitlines(keepends=True)
    offset = lambda line, column: sum(map(len, lines[:line - 1])) + len(lines[line - 1].encode()[:column].decode())
    start, end = (lambda node: offset(node.lineno, node.col_offset)), (lambda node: offset(node.end_lineno, node.end_col_offset))
    code = lambda node: text[start(node):end(node)]
    found = []

    def visit(node, where):
        def put(first, last, new):
            found.append((first, last, new, where))

        def swap(op, left, right):
            old, new = SWAPS.get(type(op), (None, None))
            at = text.find(old, end(left), start(right)) if old else -1
            if at >= 0:
                put(at, at + len(old), new)
        if isinstance(node, (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.FunctionDef):
            if node.name in ("main", "analyze") and not main:
                return
            where = where or node.name
            for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)]:
                visit(default, where)
            for child in node.body:
                visit(child, where)
            return
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr)) and where:
            target = node.targets[0] if isinstance(node, ast.Assign) else node
            if isinstance(target, (ast.Subscript, ast.AugAssign)) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                put(start(node), end(node), "pass")
        if isinstance(node, ast.AnnAssign):  # not a flag's default and help
            return node.value and not ast.unparse(node.value).startswith("flag(") and visit(node.value, where)
        if isinstance(node, ast.BinOp):
            swap(node.op, node.left, node.right)
        if isinstance(node, ast.Compare):
            for op, left, right in zip(node.ops, [node.left, *node.comparators], node.comparators):
                swap(op, left, right)
        if isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:]):
                swap(node.op, left, right)
        if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            put(start(node), end(node), f"({code(node.operand)})")
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            value = node.value
            put(start(node), end(node), repr(not value if value in (True, False) and type(value) is bool else
                                             value + 1 if type(value) is int else 2 * value or 1.0))
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            put(start(node.test), end(node.test), f"not ({code(node.test)})")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            if name in NAMES:
                put(end(node.func) - len(name), end(node.func), NAMES[name])
            if isinstance(node.func, ast.Attribute) and name in DROPPED and ast.unparse(node.func.value) != "torch":
                put(start(node), end(node), code(node.func.value))
            for keyword in node.keywords:
                if keyword.arg and keyword.arg not in UNSEEN:
                    comma, after = text.rfind(",", end(node.func), start(keyword)), text.find(",", end(keyword), end(node))
                    first = not node.args and keyword is node.keywords[0]
                    put(start(keyword) if first else comma, after + 1 if first and after > 0 else end(keyword), "")
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.keyword) and child.arg in UNSEEN):
                visit(child, where)
    for node in tree.body:
        visit(node, node.name if isinstance(node, ast.ClassDef) else "")
    return sorted(set(found))


def passes(tree: pathlib.Path, tests: list[str], limit: float) -> bool:
    """Whether all tests pass on this tree, in a fork of this process; no, if they take more than `limit` seconds."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1), os.dup2(nothing, 2)
        sys.path[:0] = [str(tree), str(tree / "tests")]
        code = 1
        try:
            import pytest
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
        finally:
            os._exit(int(code))
    began, status = time.time(), None
    while status is None and time.time() - began < limit:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else time.sleep(0.02)
    try:
        os.killpg(child, signal.SIGKILL)  # and what it started
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(child, 0)
    return status == 0


def judge(name: str, text: str, change: tuple, tests: list[str], limit: float, trees: queue.Queue) -> bool:
    """Whether the tests pass with this change (none: ()) made to the file, in the next tree that is free."""
    tree = trees.get()
    first, last, new, _ = change or (0, 0, "", "")
    (tree / name).write_text(text[:first] + new + text[last:])
    try:
        return passes(tree, tests, limit)
    finally:
        (tree / name).write_text(text)
        trees.put(tree)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--every", type=int, default=1, choices=range(1, 1000), metavar="N", help="take every n-th change")
    parser.add_argument("--only", help="a function's name or a line's number")
    parser.add_argument("--main", action="store_true", help="main(), the loop, and analyze() as well")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    import matplotlib.pyplot  # noqa: F401  imported here, it is there in every fork
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM  # noqa: F401
    torch.set_num_threads(1)
    began, seen, made, trees = time.time(), collections.Counter(), collections.Counter(), queue.Queue()
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for number in range(args.workers):
            shutil.copytree(ROOT, tree := pathlib.Path(folder) / str(number),
                            ignore=shutil.ignore_patterns(".git", ".*venv", "runs", "docs", "__pycache__", ".ruff_cache"))
            trees.put(tree)
        for name in args.files:
            text, tests, started = (ROOT / name).read_text(), [f"tests/test_{part}.py" for part in f"{TESTS[name]} names".split()], time.time()
            if not judge(name, text, (), tests, 1e9, trees):
                raise SystemExit(f"{name}: its tests fail as it is")
            limit, line = 4 * (time.time() - started) + 30, lambda change, text=text: text.count("\n", 0, change[0]) + 1
            todo = [c for c in changes(ast.parse(text), text, args.main) if args.only in (None, c[3], str(line(c)))][::args.every]
            if not todo:
                raise SystemExit(f"{name}: --only {args.only} names no function or line with something to change")
            for first, last, new, _ in todo:
                ast.parse(text[:first] + new + text[last:])  # what does not even parse would count as seen
            many = len(todo)
            for change, survived in zip(todo, pool.map(judge, [name] * many, [text] * many, todo, [tests] * many, [limit] * many,
                                                       [trees] * many)):
                made[name] += 1
                seen[name] += not survived
                if survived:
                    whole = text.splitlines()[line(change) - 1].strip()
                    print(f"{name}:{line(change)}: {text[change[0]:change[1]]!r} -> {change[2]!r}   in   {whole}", flush=True)
            print(f"{name}: {seen[name]} of {made[name]} seen, {time.time() - started:.0f} s", flush=True)
    print(f"{time.strftime('%Y-%m-%d')} {seen.total()} of {made.total()} seen, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
