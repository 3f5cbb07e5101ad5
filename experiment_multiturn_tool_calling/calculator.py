"""The tool: a calculator that is safe to run on what a language model writes,
and what the model is told of it.

Arithmetic through a whitelist of syntax nodes. It is exact, in fractions, while the numbers are
short. Where they grow too long, as in compound interest, it goes on with 400 significant digits,
and says that the result is rounded. Whatever could take long or much memory is refused before it is
computed, and every failure is a short text that begins with "Error:", never an exception.
"""

import ast
import decimal
import operator
import re
from decimal import Context, Decimal
from fractions import Fraction

from calls import describe_tool, parse_tool_call

MAX_CHARACTERS = 200  # of an expression
MAX_DEPTH = 20  # of parentheses
# Of the numerator and the denominator of an exact number, and of a rounded one before its point or
# behind it; on the way and in the end.
MAX_DIGITS = 100
ROUNDED = Context(prec=12)  # significant digits of a result that is not exact
# On the way to such a result. Each operation loses a few, and an expression is short.
LONG = Context(prec=400, Emin=-999, Emax=999, traps=[decimal.Overflow, decimal.Underflow])
CANCELLED = Decimal("1e-10")  # a sum that is smaller, beside its terms, has lost its digits
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
        with decimal.localcontext(LONG):
            return format_number(compute(ast.parse(source, mode="eval").body, source))
    except ZeroDivisionError:
        return "Error: division by zero"
    except (decimal.Overflow, decimal.Underflow):
        return f"Error: {TooLong()}"
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


def compute(node: ast.expr, source: str) -> Fraction | Decimal:
    """The value of a syntax node of `source`: exact as a Fraction, else rounded as a Decimal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        text = source[node.col_offset : node.end_col_offset]  # from the text: 0.1 is 1/10
        return Fraction(text) if is_short(Fraction(text)) else check_size(+Decimal(text))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = compute(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return apply(type(node.op), compute(node.left, source), compute(node.right, source))
    raise Refused(NOT_ARITHMETIC)


def apply(operation: type, left, right) -> Fraction | Decimal:
    """An operation on two values: exact where both are and the result is short, else rounded."""
    if operation is ast.Pow and right % 1:
        raise Refused("exponents must be integers")
    if operation is ast.Pow and not right:
        return Fraction(1)  # also of 0, as in Python
    if not right and operation in (ast.Div, ast.FloorDiv, ast.Mod):
        raise ZeroDivisionError
    if not left and operation is ast.Pow and right < 0:
        raise ZeroDivisionError
    both_exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    if both_exact and not (operation is ast.Pow and is_long_power(left, right)):
        value = Fraction(OPERATORS[operation](left, right))
        if is_short(value):
            return value
    if operation in (ast.FloorDiv, ast.Mod):
        raise TooLong  # a remainder of a rounded number means nothing
    left, right = round_to_decimal(left), round_to_decimal(right)
    value = check_size(OPERATORS[operation](left, right))
    if operation in (ast.Add, ast.Sub) and abs(value) < CANCELLED * max(abs(left), abs(right)):
        raise Refused("the digits of the result cancel each other")
    return value


def is_short(value: Fraction) -> bool:
    return max(abs(value.numerator), value.denominator) < 10**MAX_DIGITS


def is_long_power(base: Fraction, exponent: Fraction) -> bool:
    """Whether a power is too long, without computing it.
    It has at least |exponent| x (bits of base - 1) bits."""
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    return abs(exponent) * bits > (10**MAX_DIGITS).bit_length()


def round_to_decimal(value: Fraction | Decimal) -> Decimal:
    if isinstance(value, Decimal):
        return value
    return Decimal(value.numerator) / Decimal(value.denominator)


def check_size(value: Decimal) -> Decimal:
    if value and abs(value.adjusted()) >= MAX_DIGITS:
        raise TooLong
    return value


def format_number(value: Fraction | Decimal) -> str:
    """An integer in full, and what else has at most 12 significant digits; else rounded to 12, with
    "about" before it. Without an exponent."""
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    text = f"{ROUNDED.plus(round_to_decimal(value)).normalize(ROUNDED):f}"
    return text if Fraction(text) == value and isinstance(value, Fraction) else f"about {text}"


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
