"""What is planted for `make mutants`: each fault once, and nothing else changed."""

import ast

import pytest

from benchmarks.mutants.faults import mutants


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("a = b < 1", ["b <= 1", "b < 2"]),
        ("a = 0 < b <= c", ["0 <= b <= c", "0 < b < c", "1 < b <= c"]),
        ("a = b is None and c not in d", ["b is None or c not in d", "b is not None and c not in d", "b is None and c in d"]),
        ("a = not b + c", ["b + c", "not b - c"]),
        ("a = [b // 2.5, True]", ["[b * 2.5, True]", "[b // 3.5, True]"]),
        ("a: Literal[3] = f'{b + 1}'", []),
    ],
)  # fmt: skip
def test_each_comparison_operator_and_constant_is_a_fault_alone(source, faults):
    planted = [ast.unparse(ast.parse(mutant.text).body[0].value) for mutant in mutants(source)]  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(planted) == sorted(faults)


def test_an_if_is_taken_always_and_never_and_the_line_is_told():
    told = [(mutant.line, mutant.change) for mutant in mutants("a = b\nif a:\n    c()\n")]
    assert told == [(2, "if a: -> if True:"), (2, "if a: -> if False:")]
