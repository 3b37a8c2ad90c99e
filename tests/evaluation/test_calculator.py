"""The calculator: what it evaluates, and what it must refuse."""

import pytest

from hfsft.evaluation.calculator import calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("1,234*2", "2468"),
        ("10/4", "2.5"),
        ("1/3", "0.3333333333"),
        ("0.1+0.2", "0.3"),
        (" 2*(3 + 4) ", "14"),
        ("-5//2", "-3"),
        ("'strawberry'.count('r')", "3"),
        ('"a,b,c".count(",")', "2"),
        ("99999999999*99999999999", "9999999999800000000001"),
    ],
)
def test_results(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "1/0",
        "1e308*10",
        "",
        "x + 1",
        "1 +",
        "True + 1",
        "'a' * 9",
        "'a'.upper()",
        "'a'.count",
        "'a'.count('a', 0)",
        "[].count(1)",
        "__import__('os')",
        "1+" * 150 + "1",
        "1 if 1 else 2",
        "5j",
        "(lambda: 1)()",
        "\ud800",
        "1\x00",
    ],
)
def test_refused(expression):
    assert calculate(expression) is None
