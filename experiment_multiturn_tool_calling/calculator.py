"""The tool: a calculator that is safe to run on what a language model writes,
and what the model is told of it.

Exact arithmetic through a whitelist of syntax nodes. Whatever could take long or much memory is
refused before it is computed, and every failure is a short text that begins with "Error:", never an
exception.
"""

import ast
import operator
import re
from decimal import Context, Decimal
from fractions import Fraction

from calls import describe_tool, parse_tool_call

MAX_CHARACTERS = 200  # of an expression
MAX_DEPTH = 20  # of parentheses
MAX_DIGITS = 100  # of a number's numerator and denominator, on the way and in the end
ROUNDED = Context(prec=12)  # significant digits of a result that is not an integer
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and parentheses.
    """
    try:
        check_text(expression)
        return format_number(
            compute(ast.parse(expression.strip(), mode="eval").body, expression.strip())
        )
    except ZeroDivisionError:
        return "Error: division by zero"
    except (SyntaxError, MemoryError, RecursionError):  # of the parser
        return "Error: not an arithmetic expression"
    except ValueError as error:
        return f"Error: {error}"


def check_text(expression: str) -> None:
    """Refuse what the parser should not see. No letters: so no names, calls, attributes,
    strings or 1e999999999."""
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    if not re.fullmatch(r"[0-9.+\-*/%() ]*", expression):
        raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")
    depth = 0
    for character in expression:
        depth += (character == "(") - (character == ")")
        if not 0 <= depth <= MAX_DEPTH:
            raise ValueError("too many parentheses" if depth > 0 else "unbalanced parentheses")
    if depth:
        raise ValueError("unbalanced parentheses")


def compute(node: ast.expr, source: str) -> Fraction:
    """The exact value of a syntax node of `source`."""
    if isinstance(node, ast.Constant):
        # from the text: 0.1 is 1/10
        value = Fraction(source[node.col_offset : node.end_col_offset])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = compute(node.operand, source) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = compute(node.left, source), compute(node.right, source)
        if isinstance(node.op, ast.Pow):
            check_power(left, right)
        value = Fraction(OPERATORS[type(node.op)](left, right))
    else:
        raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise ValueError(f"a number with more than {MAX_DIGITS} digits")
    return value


def check_power(base: Fraction, exponent: Fraction) -> None:
    """Refuse a power before it is computed.
    It has at least |exponent| x (bits of base - 1) bits."""
    if exponent.denominator != 1:
        raise ValueError("exponents must be integers")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if abs(exponent) * bits > (10**MAX_DIGITS).bit_length():
        raise ValueError(f"a number with more than {MAX_DIGITS} digits")


def format_number(value: Fraction) -> str:
    """An integer in full, anything else rounded to 12 significant digits, without an exponent."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{ROUNDED.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize():f}"


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
