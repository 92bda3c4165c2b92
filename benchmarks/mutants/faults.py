"""Small faults to plant in a file: one comparison, operator, constant, `and`, `or`, `not` or `if` changed in each."""

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

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


class Mutant(NamedTuple):
    """line, shown: of the fault, and its text. change: what was, and what is. text: the whole file with it."""

    line: int
    shown: str
    change: str
    text: str


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
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        yield ast.copy_location(ast.Constant(node.value + 1), node)
    elif isinstance(node, ast.If):
        for value in (True, False):
            new = copy.deepcopy(node)
            new.test = ast.copy_location(ast.Constant(value), node.test)
            yield new


def mutants(source: str) -> Iterator[Mutant]:
    """One for every fault; annotations and f-strings are left alone."""
    tree, lines = ast.parse(source), source.splitlines()
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
            change = " -> ".join(ast.unparse(each).splitlines()[0][:90] for each in (node, new))
            line = node.lineno  # pyright: ignore[reportAttributeAccessIssue]
            yield Mutant(line, lines[line - 1].strip(), change, ast.unparse(ast.fix_missing_locations(tree)))
            setattr(parent, field, old)
