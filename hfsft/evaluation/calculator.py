"""The calculator that a model may call while it answers: arithmetic, and counts of a letter."""

import ast
import operator
import re
from decimal import Context, Decimal, Inexact
from fractions import Fraction

MAX_CHARACTERS = 200  # of an expression; without powers its result is hardly longer

DIGITS = 10  # significant ones of a quotient that has no end

EXACT_DIGITS = 15  # of a quotient that has one

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculate(expression: str) -> str | None:
    """Evaluate an expression; None if the calculator does not support it.

    It supports what the one in karpathy/nanochat's engine.py does: numbers with + - * / // and
    parentheses, and `'text'.count('letter')`. `eval` is never called. The arithmetic is exact; only
    a quotient with more than fifteen significant digits is rounded, once, to ten, but never within
    its integer part and first two decimals. Numbers are written as in GSM8K's annotations: 10/2 is
    5, where nanochat writes 5.0.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    # 1,234 is a number, but the comma in 'a,b'.count(',') counts
    text = (expression if ".count" in expression else expression.replace(",", "")).strip()
    try:
        value = _value(ast.parse(text, mode="eval").body, text)
        return _written(value, is_rounded="/" in text)
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, text: str) -> Fraction:
    """The value of a parsed expression; raises ValueError or KeyError for anything unsupported."""
    match node:
        case ast.Constant(value=int() | float()):
            # its digits, as Python's float would lose some
            digits = ast.get_source_segment(text, node) or ""
            if re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", digits):
                return Fraction(digits)
        case ast.BinOp():
            return Fraction(
                OPERATORS[type(node.op)](_value(node.left, text), _value(node.right, text))
            )
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](_value(node.operand, text))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(counted)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return Fraction(counted.count(part))
    raise ValueError


def _written(value: Fraction, is_rounded: bool) -> str:
    """A number without an exponent and without trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    # the first precision is enough for all sums and products: no operation adds more digits
    for digits in (EXACT_DIGITS if is_rounded else 2 * MAX_CHARACTERS, DIGITS):
        context = Context(prec=max(digits, len(str(abs(int(value)))) + 2))
        number = context.divide(Decimal(value.numerator), Decimal(value.denominator))
        if not context.flags[Inexact]:
            break
    written = f"{number:f}"
    return written.rstrip("0").rstrip(".") if "." in written else written
