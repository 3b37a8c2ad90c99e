"""The calculator that a model may call while it answers: sums, and letters counted in a text."""

import ast
import operator

LONGEST = 200  # characters of an expression; with no powers its result stays as short


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
    """The result of an expression, or None where it is none that the calculator takes.

    It takes what karpathy/nanochat's engine.py does: numbers with + - * / // and parentheses, and
    `'text'.count('letter')`. Nothing is handed to `eval`. A whole result has no decimal point, as
    in GSM8K's own marks (10/2 is 5, where nanochat writes 5.0); others have ten digits.
    """
    if len(expression) > LONGEST:
        return None
    try:
        # of 1,234 the comma goes, that of a text stays
        text = expression if ".count" in expression else expression.replace(",", "")
        value = _value(ast.parse(text.strip(), mode="eval").body)
        if isinstance(value, float):
            value = float(f"{value:.10g}")
            if value == int(value):  # which infinity has none of
                value = int(value)
        return str(value)
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int | float:
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
