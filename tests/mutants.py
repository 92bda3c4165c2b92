"""`make mutants`: small faults planted one at a time, to see whether the tests of a file notice. Not in CI; it takes hours.

    python -m tests.mutants --only fps_convert/formats/pth.py --most 20

Each mutant changes one comparison, operator, constant, `and`, `or`, `not` or `if` of a file, in a copy of the tree, and the tests
that mirror the file are run until one fails. Those that survive are listed with their lines.
"""

import argparse
import ast
import copy
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
# File -> the tests that mirror it.
TARGETS = {
    "convert/fps_convert/formats/pth.py": "tests/fps_convert/test_pth.py",
    "convert/fps_convert/formats/readers.py": "tests/fps_convert/test_bad_input.py tests/fps_convert/test_fuzz.py",
    "fps_jax/attention/windows.py": "tests/fps_jax/attention/test_windows.py tests/fps_jax/attention/test_cache.py "
    "tests/fps_jax/attention/test_block_causal.py",
    "fps_jax/attention/schedule.py": "tests/fps_jax/attention/test_schedule.py",
    "fps_jax/sampling/solvers.py": "tests/fps_jax/sampling/test_solvers.py tests/fps_jax/sampling/test_denoise.py",
    "fps_jax/sampling/flow.py": "tests/fps_jax/sampling/test_solvers.py tests/fps_jax/sampling/test_request.py "
    "tests/fps_jax/sampling/test_few_step.py",
    "fps_jax/sampling/request.py": "tests/fps_jax/sampling/test_request.py",
    "fps_jax/sampling/request_fields.py": "tests/fps_jax/sampling/test_request.py",
    "fps_jax/config.py": "tests/fps_jax/test_config.py",
    "fps_jax/sizes.py": "tests/fps_jax/test_sizes.py tests/fps_jax/sampling/test_request.py",
}
_COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
}
_MEMBERS = {ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
_TIMEOUT = 900  # seconds a mutant: one that never ends is noticed, too


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """The node with one small fault, for each that there is."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            other = (_COMPARED | _MEMBERS).get(type(op))
            if other is not None:
                new = copy.deepcopy(node)
                new.ops[i] = other()
                yield new
    elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        new = copy.deepcopy(node)
        new.op = _COMPUTED[type(node.op)]()
        yield new
    elif isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.copy_location(ast.Constant(node.value + 1), node)
    elif isinstance(node, ast.If):
        for value in (True, False):
            new = copy.deepcopy(node)
            new.test = ast.copy_location(ast.Constant(value), node.test)
            yield new


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what was, the whole file with one fault), for every fault; annotations and f-strings are left alone."""
    tree = ast.parse(source)
    parents = {child: (node, name) for node in ast.walk(tree) for name, value in ast.iter_fields(node)
               for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)}  # fmt: skip
    for node in list(ast.walk(tree)):
        above, names = node, []
        while above in parents:
            above, name = parents[above]
            names.append((type(above), name))
        quiet = {"annotation", "returns"} & {name for _, name in names} or any(
            kind is ast.JoinedStr for kind, _ in names
        )
        if quiet or node not in parents:
            continue
        parent, field = parents[node]
        for new in _changed(node):
            value = getattr(parent, field)
            old = list(value) if isinstance(value, list) else value
            setattr(
                parent, field, [new if item is node else item for item in value] if isinstance(value, list) else new
            )
            yield node.lineno, ast.unparse(node).splitlines()[0][:90], ast.unparse(ast.fix_missing_locations(tree))  # pyright: ignore[reportAttributeAccessIssue]
            setattr(parent, field, old)


def _survives(tree: pathlib.Path, file: str, text: str, tests: str) -> bool:
    whole = (tree / file).read_text()
    (tree / file).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    try:
        ended = subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
                               capture_output=True, timeout=_TIMEOUT)  # fmt: skip
        return ended.returncode == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        (tree / file).write_text(whole)


def main() -> None:
    """Prints a line a file and its survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, help="one file")
    parser.add_argument("--most", type=int, help="mutants a file, drawn by a fixed seed; all if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "outputs", "*.egg-info", "results"))
        for file in [options.only] if options.only else TARGETS:
            found = list(mutants((ROOT / file).read_text()))
            if options.most is not None:
                found = random.Random(0).sample(found, min(options.most, len(found)))
            survivors = []
            for line, what, text in found:
                if _survives(tree, file, text, TARGETS[file]):
                    survivors.append(f"  line {line}: {what}")
                    print(f"{file}{survivors[-1]}", flush=True)
            print(f"{file}: {len(found) - len(survivors)} of {len(found)} found", flush=True)


if __name__ == "__main__":
    main()
