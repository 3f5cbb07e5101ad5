"""The tool: a calculator that is safe to run on what a language model writes,
and what the model is told of it.

Arithmetic through a whitelist of syntax nodes. It is exact, in fractions, while the numbers
are short. Where they grow too long, such as in compound interest, it computes with 60 significant
digits, and says that the result is rounded. Whatever could take long or much memory is refused
before it is computed, and every failure is a short text that begins with "Error:", never an
exception.
"""

import ast
import decimal
import operator
import re
from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction

from calls import describe_tool, parse_tool_call

MAX_CHARACTERS = 200  # of an expression
MAX_DEPTH = 20  # of parentheses
# Of the numerator and the denominator of an exact number, and of a rounded one before or behind
# its point; on the way and in the end.
MAX_DIGITS = 100
ROUNDED = Context(prec=12)  # significant digits of a result that is not exact
# A rounded result must be the same in both, or digits have cancelled each other.
PRECISIONS = (60, 90)
SIZES = (decimal.InvalidOperation, decimal.Overflow, decimal.Underflow)  # beyond 10**+-999
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
NOT_ARITHMETIC = "only numbers, + - * / // % ** and parentheses are allowed"


class Refused(Exception):
    """Its text says why an expression has no result."""


class TooLong(Refused):
    """An exact number has more than MAX_DIGITS digits; a rounded one may not."""

    def __init__(self) -> None:
        super().__init__(f"a number with more than {MAX_DIGITS} digits")


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses.
    """
    try:
        check_text(expression)
        source = expression.strip()
        node = ast.parse(source, mode="eval").body
        try:
            return format_number(compute(node, source, exact))
        except TooLong:
            return round_number(node, source)
    except (ZeroDivisionError, decimal.DivisionByZero):
        return "Error: division by zero"
    except Refused as error:
        return f"Error: {error}"
    except (SyntaxError, MemoryError, RecursionError, ValueError):  # of the parser
        return "Error: not an arithmetic expression"


def check_text(expression: str) -> None:
    """Refuse what the parser should not see. No letters: so no names, calls, attributes,
    strings or 1e999999999."""
    if len(expression) > MAX_CHARACTERS:
        raise Refused(f"longer than {MAX_CHARACTERS} characters")
    if not re.fullmatch(r"[0-9.+\-*/%() ]*", expression):
        raise Refused(NOT_ARITHMETIC)
    depth = 0
    for character in expression:
        depth += (character == "(") - (character == ")")
        if not 0 <= depth <= MAX_DEPTH:
            raise Refused("too many parentheses" if depth > 0 else "unbalanced parentheses")
    if depth:
        raise Refused("unbalanced parentheses")


def compute(node: ast.expr, source: str, apply: Callable):
    """The value of a syntax node of `source`. apply(node, *values) is that of one operation."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        # from the text: 0.1 is 1/10
        return apply(node, source[node.col_offset : node.end_col_offset])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = compute(node.operand, source, apply)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = compute(node.left, source, apply), compute(node.right, source, apply)
        return apply(node, left, right)
    raise Refused(NOT_ARITHMETIC)


def exact(node: ast.expr, *values) -> Fraction:
    """A number's text or an operation on two Fractions as a Fraction."""
    if isinstance(node, ast.Constant):
        value = Fraction(*values)
    else:
        if isinstance(node.op, ast.Pow):
            check_power(*values)
        value = Fraction(OPERATORS[type(node.op)](*values))
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise TooLong
    return value


def check_power(base: Fraction, exponent: Fraction) -> None:
    """Refuse a power before it is computed.
    It has at least |exponent| x (bits of base - 1) bits."""
    if exponent.denominator != 1:
        raise Refused("exponents must be integers")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if abs(exponent) * bits > (10**MAX_DIGITS).bit_length():
        raise TooLong


def rounded(node: ast.expr, *values) -> Decimal:
    """The same with Decimals, in the precision of the current context."""
    if isinstance(node, ast.Constant):
        value = +Decimal(*values)
    elif isinstance(node.op, (ast.FloorDiv, ast.Mod)):
        raise TooLong  # a remainder of a rounded number means nothing
    elif isinstance(node.op, ast.Pow) and values[1] != values[1].to_integral_value():
        raise Refused("exponents must be integers")
    else:
        value = OPERATORS[type(node.op)](*values)
    if value and abs(value.adjusted()) >= MAX_DIGITS:
        raise TooLong
    return value


def round_number(node: ast.expr, source: str) -> str:
    """The value of a syntax node to 12 significant digits, in Decimals."""
    results = set()
    for precision in PRECISIONS:
        context = Context(
            prec=precision, Emin=-999, Emax=999, traps=[decimal.DivisionByZero, *SIZES]
        )
        with decimal.localcontext(context):
            try:
                value = compute(node, source, rounded)
            except SIZES as error:
                raise TooLong from error
            results.add(f"about {ROUNDED.plus(value).normalize():f}")
    if len(results) > 1:
        raise Refused("the digits of the result cancel each other")
    return results.pop()


def format_number(value: Fraction) -> str:
    """A number whose decimals end, in full; else rounded to 12 significant digits, which it says.

    Both without an exponent.
    """
    if value.denominator == 1:
        return str(value.numerator)
    quotient = ROUNDED.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize()
    return f"{quotient:f}" if Fraction(quotient) == value else f"about {quotient:f}"


# What the policy is told of the tool, and what comes of its calls
EXPECTED = 'expected {"name": "calculator", "arguments": {"expression": "12 * 3"}}'
# its only result in eval_accuracy_no_tool
BROKEN = "Error: the calculator does not work, answer without it"
TOOL_PROMPT = describe_tool(calculator)


def parse_call(turn: str) -> dict | str | None:
    """{"expression": ...} of the call in a turn; None where it has none;
    a text that says what is wrong with it."""
    return parse_tool_call(turn, "calculator", "expression", EXPECTED)


def broken(expression: str) -> str:
    return BROKEN


def run_call(call: dict | str, tool=calculator) -> tuple[str, str]:
    """(outcome, result) of what `parse_call` found; the outcome is "ok",
    "failed" or "malformed"."""
    if isinstance(call, str):
        return "malformed", call
    result = tool(call["expression"])
    return "failed" if result.startswith("Error:") else "ok", result
