"""How the policy is told of a tool, and how its calls are read from what it wrote."""

import json

from transformers.utils import get_json_schema


def describe_tool(function) -> str:
    """What follows the system prompt: word for word what the templates of Qwen2.5 and Qwen3 make of a tool."""
    return f"""

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{json.dumps(get_json_schema(function))}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def parse_tool_call(turn: str, name: str, argument: str, expected: str) -> dict | str | None:
    """The arguments of the call in a turn, {argument: text}; None where it has none; a text that says what is wrong
    with it, and what was `expected`.

    What stands inside <think> is no call. A turn may hold one.
    """
    said = turn.rpartition("</think>")[2].partition("<think>")[0]
    _, opened, rest = said.partition("<tool_call>")
    body, closed, rest = rest.partition("</tool_call>")
    if not opened:
        return None
    if not closed or "<tool_call>" in rest:
        return f"Error: {'one call a turn' if closed else 'the call is not closed'}, {expected}"
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return f"Error: not valid JSON, {expected}"
    if not isinstance(call, dict) or call.get("name") != name:
        return f"Error: unknown tool, {expected}"
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(arguments, dict) or [(k, type(v)) for k, v in arguments.items()] != [(argument, str)]:
        return f"Error: wrong arguments, {expected}"
    return arguments
