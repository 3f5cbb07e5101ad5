"""Tools: how the policy is told of one, how its calls are read, how a result is written.

Plumbing, the same in every experiment that has a tool.
"""

import itertools
import json

import torch
from model import DATE, pattern_of, take_out
from transformers.utils import get_json_schema

TOOLS = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{schema}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def describe_tool(function) -> str:
    """What follows the system prompt: word for word what Qwen2.5's template makes of a tool."""
    return TOOLS.replace("{schema}", json.dumps(get_json_schema(function)))


def parse_tool_call(turn: str, name: str, argument: str, expected: str) -> dict | str | None:
    """The arguments of the call in a turn, {argument: text}; None where it has none.

    A malformed call gives a text that says what is wrong with it, and what was `expected`. What
    stands inside <think> is no call. A turn may hold one.
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
    if not isinstance(arguments, dict) or [(k, type(v)) for k, v in arguments.items()] != [
        (argument, str)
    ]:
        return f"Error: wrong arguments, {expected}"
    return arguments


class Environment:
    """What stands between two turns of the policy.

    That is the end of its turn, the result as a user's turn, and the header of the next turn. The
    chat template writes it, whatever it is: a dummy chat is rendered, and what follows the
    policy's turn is taken.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        chat = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": "TURN"},
            {"role": "user", "content": "<tool_response>\nRESULT\n</tool_response>"},
        ]
        text = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, **DATE
        )
        self.before, self.after = text.rpartition("TURN")[2].split("RESULT")
        known = tokenizer.added_tokens_decoder  # id -> token
        first = self.encode("")[0]
        # Empty where the template ends a turn by plain text.
        self.end_of_turn = {first} if first in known else set()
        special = {token.content for token in known.values()}
        special |= {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}
        self.special = pattern_of(special)

    def encode(self, result: str) -> list[int]:
        text = self.before + result + self.after
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def ids(self, result: str, note: str, last_id: int, room: int) -> list[int] | None:
        """Tokens of at most `room`, behind a row that ends with `last_id`.

        Special tokens in the result would end its turn; they are taken out. A result that is too
        long is cut at its end. None where not even the note fits.
        """
        result = take_out(self.special, result)
        while True:
            ids = self.encode(result + note)
            if ids[0] == last_id:
                ids = ids[1:]  # the policy has ended its turn itself
            if len(ids) <= room:
                return ids
            if not result:
                return None
            encoded = self.tokenizer(result, add_special_tokens=False, return_offsets_mapping=True)
            offsets = encoded.offset_mapping
            kept = max(0, len(offsets) + room - len(ids))  # tokens of the result
            start = offsets[kept][0] if offsets else 0  # of the first token to go
            result = result[: min(start, len(result) - 1)]


def trajectory_metrics(trajectories) -> dict[str, float]:
    """How trajectories use the tool, and how they end: means over trajectories."""
    outcomes = [trajectory.outcomes for trajectory in trajectories]
    figures = {
        "tool_use_rate": ["ok" in calls for calls in outcomes],  # at least one call that worked
        "calls": [len(calls) for calls in outcomes],
        "malformed_calls": [calls.count("malformed") for calls in outcomes],
        "failed_calls": [calls.count("failed") for calls in outcomes],
        "turns": [len(trajectory.turns) for trajectory in trajectories],
    }
    for status in ("answered", "max_turns", "truncated"):
        ended_so = [trajectory.status == status for trajectory in trajectories]
        figures[f"{status}_fraction"] = ended_so
    means = {name: sum(values) / len(values) for name, values in figures.items()}
    masks = [torch.tensor(trajectory.mask) for trajectory in trajectories]
    sampled = torch.cat(masks).float().mean().item()  # of the tokens behind the prompts
    return {**means, "environment_fraction": 1 - sampled}


def show_trajectory(experience, tokenizer) -> str:
    """A group's first trajectory turn by turn, with all special tokens, and what it earned."""
    trajectory = experience.trajectories[0]
    text = f"--- prompt\n{tokenizer.decode(trajectory.prompt.ids)}"
    tokens = zip(trajectory.mask, trajectory.ids)
    for is_sampled, part in itertools.groupby(tokens, key=lambda pair: pair[0]):
        writer = "policy" if is_sampled else "environment"
        text += f"\n--- {writer}\n{tokenizer.decode([token for _, token in part])}"
    answer = experience.answer
    if isinstance(answer, list):
        answer = " or ".join(answer)
    earned = f"reward {experience.rewards[0]:.2f}, advantage {experience.advantages[0]:+.2f}"
    return f"{text}\n--- {trajectory.status}; right answer: {answer}, {earned}"
