"""The calculator that a model may call while it answers: arithmetic, and counts of a letter."""

import ast
import operator

MAX_CHARACTERS = 200  # of an expression; without powers its result is no longer


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
    parentheses, and `'text'.count('letter')`. `eval` is never called. An integral result has no
    decimal point, as in GSM8K's annotations (10/2 is 5, where nanochat writes 5.0); others are
    rounded to ten significant digits.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    try:
        # 1,234 is a number, but the comma in 'a,b'.count(',') counts
        text = expression if ".count" in expression else expression.replace(",", "")
        value = _value(ast.parse(text.strip(), mode="eval").body)
        if isinstance(value, float):
            value = float(f"{value:.10g}")
            if value == int(value):  # raises OverflowError for infinity
                value = int(value)
        return str(value)
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int | float:
    """The value of a parsed expression; raises ValueError or KeyError for anything unsupported."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return node.value
        case ast.BinOp():
            return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        case ast.UnaryOp():
            return OPERATORS[type(node.op)](_value(node.operand))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(text)), attr="count"),
            args=[ast.Constant(value=str(part))],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError
