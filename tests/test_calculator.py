"""The tool: what the calculator computes and refuses,
and how a call is read from what a model wrote."""

import json
import random
import re
import time
import tracemalloc
from decimal import Context, Decimal
from fractions import Fraction
from types import SimpleNamespace

import pytest
from helpers import chat_template, load_experiment
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multiturn import QWEN, config_of, encode, plays, prompt_of, scripted, train
from test_multiturn import call as dialogue_call
from test_sampling import CHATML, END, make_tokenizer

calculator_module = load_experiment("experiment_multiturn_tool_calling").calculator
calculator, parse_call, run_call = (
    getattr(calculator_module, n) for n in ("calculator", "parse_call", "run_call")
)


# ---------------------------------------------------------------- what it computes
@pytest.mark.parametrize(
    "expression, result",
    [
        ("175 * 4911 * 82 * 959", "67583463150"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("2 ** 3 ** 2", "512"),  # from the right
        ("-2 ** 2", "-4"),  # the sign binds less
        ("2 ** -3", "0.125"),
        ("--3 - -+2", "5"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("7.5 % 2", "1.5"),
        ("0.1 + 0.2", "0.3"),  # exact, as floats it is 0.30000000000000004
        ("1 / 3 * 3", "1"),
        ("6 / 4", "1.5"),
        ("6 / 3", "2"),
        ("1 / 3", "about 0.333333333333"),
        ("2 / 3", "about 0.666666666667"),
        ("10 ** 20 + 1", "100000000000000000001"),  # integers in full
        ("9999999999 * 9999999999", "99999999980000000001"),
        ("100000000000.04 * 10", "about 1000000000000"),  # 12 significant digits
        ("1000 * 1.005 ** 60", "about 1348.85015255"),  # ordinary compound interest
        ("(1 + 0.07 / 12) ** 36", "about 1.23292558748"),
        ("1.1 ** -300", "about 0.000000000000382115322196"),
        ("1.0000001 ** 99999999", "about 22026.4525789"),
        ("0 * 1.005 ** 90", "about 0"),
        ("1 / 8", "0.125"),
        ("1.001 ** 500 - 1.001 ** 500", "Error: the digits of the result cancel each other"),
        (
            "(1.1 ** 300 + 10 ** -95 - 1.1 ** 300) * 10 ** 95",
            "Error: the digits of the result cancel each other",
        ),
        ("1.1 ** 300 - 1.1 ** 299", "about 237910090563"),
        ("(0 * 1.1 ** 300) ** -1", "Error: division by zero"),
        ("0 / (0 * 1.1 ** 300)", "Error: division by zero"),
        ("7 // 2 * 1.05 ** 120", "about 1046.735957"),
        ("(-1) ** (1.1 ** 2300)", "Error: exponents must be integers"),
        ("1234567890123.25", "about 1234567890120"),
        ("0.5 ** 400", "Error: a number with more than 100 digits"),
        ("7 ** 200 // 3", "Error: a number with more than 100 digits"),
        ("1.005 ** 90 ** 0.5", "Error: exponents must be integers"),
        ("-1 / 7", "about -0.142857142857"),
        ("1 / 8000000", "0.000000125"),  # no exponents: a reader of numbers would not know them
        (" 1 ", "1"),
        (".5 + 1.", "1.5"),
        ("(-1) ** (10 ** 90)", "1"),
        ("0 ** 0", "1"),
    ],
)
def test_results(expression, result):
    assert calculator(expression) == result


class Random:
    """Random expressions of integers and decimals, with all operators, signs and parentheses."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def expression(self, depth):
        kind = self.rng.random()
        if depth == 0 or kind < 0.2:
            number = str(self.rng.randint(0, 10 ** self.rng.randint(1, 4)))
            return number if self.rng.random() < 0.7 else f"{number}.{self.rng.randint(0, 999)}"
        if kind < 0.3:
            return self.rng.choice("+-") + self.expression(depth - 1)
        if kind < 0.45:
            return f"({self.expression(depth - 1)})"
        if kind < 0.55:
            base = self.expression(depth - 1)
            return f"({base}) ** {self.rng.choice(['0', '1', '2', '3', '-1', '-2'])}"
        operator = self.rng.choice(["+", "-", "*", "/", "//", "%"])
        space = self.rng.choice(["", " "])
        return self.expression(depth - 1) + space + operator + space + self.expression(depth - 1)


def python_says(expression):
    """Python's own value, with every literal a Fraction."""
    exact = re.sub(r"[0-9]+(?:\.[0-9]+)?", lambda number: f"Fraction('{number[0]}')", expression)
    return Fraction(eval(exact, {"Fraction": Fraction}))


def twelve_digits(value: Fraction) -> Decimal:
    return Context(prec=12).divide(Decimal(value.numerator), Decimal(value.denominator))


def test_ten_thousand_random_expressions_against_python():
    source, kinds = (
        Random(0),
        {"integer": 0, "decimal": 0, "rounded": 0, "division by zero": 0, "too large": 0},
    )
    for _ in range(10_000):
        expression = source.expression(4)
        found = calculator(expression)
        if len(expression) > calculator_module.MAX_CHARACTERS:
            assert found.startswith("Error: longer than")
            continue
        try:
            value = python_says(expression)
        except ZeroDivisionError:
            # what Python does not reach, because it divides by zero first, may be refused for
            # its size
            assert found.startswith("Error:"), expression
            kinds["division by zero"] += 1
            continue
        if found.startswith("Error:"):
            assert "digits" in found, (expression, found)
            kinds["too large"] += 1
        elif found.startswith("about "):
            assert Decimal(found.removeprefix("about ")) == twelve_digits(value), expression
            kinds["rounded"] += 1
        elif value.denominator == 1:
            assert found == str(value.numerator), expression
            kinds["integer"] += 1
        else:
            assert Decimal(found) == twelve_digits(value), expression
            kinds["decimal"] += 1
    assert min(kinds["integer"], kinds["rounded"]) > 2000 and kinds["division by zero"] > 100, kinds
    assert kinds["too large"] < 500, kinds


def test_numbers_up_to_the_bound_are_printed_in_full_and_no_further():
    most = 10**calculator_module.MAX_DIGITS - 1
    assert calculator(f"{most}") == str(most) and calculator(f"-{most}") == f"-{most}"
    assert calculator(f"{most} + 1").startswith("Error: a number with more than 100 digits")
    assert calculator("10 ** 99") == "1" + "0" * 99 and calculator("10 ** 100").startswith("Error:")
    assert calculator("1 / 10 ** 100").startswith("Error:")


def test_long_expressions_are_refused_before_they_are_parsed():
    assert (
        calculator("1+" * 99 + "1") == "100"
        and calculator("1+" * 150 + "1") == "Error: longer than 200 characters"
    )


# ---------------------------------------------------------------- what it refuses
ATTACKS = {
    "a tower of powers": "9**9**9",
    "a power of a power": "(9**99)**99",
    "a negative power": "2**-(10**9)",
    "a power of a fraction": "(1/3)**99999999999",
    "a product of powers": "*".join(["9**99"] * 25),
    "attributes": "().__class__",
    "attributes of a number": "(1).__class__.__mro__",
    "a call": "__import__('os').system('true')",
    "a lambda": "(lambda: 1)()",
    "a comprehension": "[1 for _ in range(10**9)]",
    "a string": "'a' * 10**9",
    "a shift": "1 << 10**9",
    "open parentheses": "(" * 10000,
    "nested parentheses": "(" * 90 + "1" + ")" * 90,
    "closing parentheses": ")" * 100,
    "brackets": "[" * 150,
    "braces": "{" * 150,
    "signs": "-" * 199 + "1",
    "signs without a number": "-+" * 100,
    "an exponent": "1e999999999",
    "a complex number": "1j",
    "underscores": "1_000",
    "a hexadecimal number": "0xff",
    "unicode digits": "\N{ARABIC-INDIC DIGIT THREE} + 1",
    "fullwidth digits": "\N{FULLWIDTH DIGIT FOUR}2",
    "superscripts": "2\N{SUPERSCRIPT TWO}",
    "a fractional power": "2 ** 0.5",
    "a huge literal": "9" * 5000,
    "many digits": "1." + "3" * 190,
    "zero to a negative power": "0 ** -1",
    "division by zero": "1 / (3 - 3)",
    "modulo zero": "1 % 0",
    "a leading zero": "007",
    "two numbers": "1 2",
    "a tuple": "1, 2",
    "a thousands separator": "1,234",
    "nothing": "",
    "spaces": " " * 150,
    "empty parentheses": "()",
    "a number that is called": "(1)(2)",
    "a null byte": "1\0",
    "two lines": "1\n+1",
    "a lone surrogate": "\ud800",
    "a comment": "1 # 2",
    "a dot": ".",
    "an ellipsis": "...",
    "two dots": "1.2.3",
    "an assignment": "(a:=1)",
}
FINE = {"signs": "-1", "many digits": "about 1.33333333333"}  # long, but harmless


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name):
    """Pitfall 25: an error text within 10 ms of processor time and 50 MB, never an exception. Found
    in public scripts: `eval`, which hangs on the first and escapes on the fifth."""
    expression, seconds = ATTACKS[name], []
    for _ in range(3):
        start = time.process_time()
        found = calculator(expression)
        seconds.append(time.process_time() - start)
    assert (
        found.startswith("Error: ")
        and len(found) < 100
        and "\n" not in found
        or found == FINE.get(name)
    ), found
    assert min(seconds) < 0.01
    tracemalloc.start()
    calculator(expression)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.text("0123456789.+-*/%() ", max_size=60)))
def test_any_text_gets_a_text(expression):
    assert isinstance(calculator(expression), str) and calculator(expression)


# ---------------------------------------------------------------- calls
def call(expression="12 * 3", name="calculator", key="arguments"):
    return (
        f"<tool_call>\n{json.dumps({'name': name, key: {'expression': expression}})}\n</tool_call>"
    )


ARGUMENTS = {"expression": "12 * 3"}
BODY = json.dumps({"name": "calculator", "arguments": ARGUMENTS})


@pytest.mark.parametrize(
    "turn",
    [
        call(),
        call(key="parameters"),
        f"<tool_call>{BODY}</tool_call>",
        f"<tool_call>\n\n  {BODY}  \n</tool_call>",
        f"Let me compute that.\n{call()}\nThen I know.",
        f"<think>I need {call('1 + 1')} or so</think>\n{call()}",
        f"<think>a</think><think>b</think>{call()}",
        f"no opening tag</think>{call()}",
        f"{call()}<think>{call('1 + 1')}",  # what is being thought is not said
        f"<answer>1</answer>{call()}",
    ],
)
def test_calls_that_are_read(turn):
    assert parse_call(turn) == ARGUMENTS and run_call(parse_call(turn)) == ("ok", "36")


@pytest.mark.parametrize(
    "turn",
    [
        "",
        "<answer>36</answer>",
        "</tool_call>",
        BODY,
        f"<think>{call()}</think>\n<answer>36</answer>",
    ]
    + [
        f"<think>{call()}",
        f"<think>a</think><think>{call()}</think>no",
        f"<think><think>{call()}</think>",
    ],
)
def test_turns_without_a_call(turn):
    """Pitfall 29: a call inside <think> is not executed."""
    assert parse_call(turn) is None


@pytest.mark.parametrize(
    "turn, says",
    [
        (f"<tool_call>\n{BODY}\n", "not closed"),
        ("<tool_call>", "not closed"),
        (call() + call(), "one call a turn"),
        (f"<tool_call>{call()}</tool_call>", "not valid JSON"),
        ("<tool_call>12 * 3</tool_call>", "not valid JSON"),
        ("<tool_call></tool_call>", "not valid JSON"),
        (f"<tool_call>{BODY[:-1]}</tool_call>", "not valid JSON"),
        (f"<tool_call>{BODY} and more</tool_call>", "not valid JSON"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "not valid JSON"),
        (f"<tool_call>{'9' * 100_000}</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "unknown tool"),
        ("<tool_call>null</tool_call>", "unknown tool"),
        (call(name="python"), "unknown tool"),
        (call(name=["calculator"]), "unknown tool"),
        (f"<tool_call>{json.dumps(ARGUMENTS)}</tool_call>", "unknown tool"),
        ('<tool_call>{"name": "calculator"}</tool_call>', "wrong arguments"),
        ('<tool_call>{"name": "calculator", "arguments": "12 * 3"}</tool_call>', "wrong arguments"),
        (
            '<tool_call>{"name": "calculator", "arguments": {"expr": "12 * 3"}}</tool_call>',
            "wrong arguments",
        ),
        ('<tool_call>{"name": "calculator", "arguments": {}}</tool_call>', "wrong arguments"),
        (call(expression=36), "wrong arguments"),
        (call(expression=None), "wrong arguments"),
        (
            (
                '<tool_call>{"name": "calculator", '
                '"arguments": {"expression": "1", "x": "2"}}</tool_call>'
            ),
            "wrong arguments",
        ),
    ],
)
def test_malformed_calls_come_back_with_the_expected_form(turn, says):
    outcome, result = run_call(parse_call(turn))
    assert outcome == "malformed" and result.startswith("Error: ") and says in result
    expected = json.loads(result.partition("expected ")[2])
    assert run_call(parse_call(f"<tool_call>{json.dumps(expected)}</tool_call>")) == ("ok", "36")


def test_outcomes():
    assert run_call(parse_call(call("1 / 0"))) == ("failed", "Error: division by zero")
    assert run_call(parse_call(call()), calculator_module.broken) == (
        "failed",
        calculator_module.BROKEN,
    )
    assert run_call(parse_call(call(name="x")), calculator_module.broken)[0] == "malformed"


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text(), st.sampled_from(["<tool_call>", "<think>", "", "</think><tool_call>"]))
def test_any_turn_is_read(before, body, opening):
    found = parse_call(f"{before}{opening}{body}</tool_call>")
    assert found is None or run_call(found)[0] in ("ok", "failed", "malformed")


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_the_tool_is_described_as_the_templates_describe_it(name):
    """The text by hand is what these models were trained with:
    the template's own rendering of the tool."""
    from transformers.utils import get_json_schema

    tokenizer = make_tokenizer(chat_template(name), CHATML)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 12 * 3?"},
    ]
    native = tokenizer.apply_chat_template(
        messages, tools=[get_json_schema(calculator)], add_generation_prompt=True, tokenize=False
    )
    messages[0]["content"] += calculator_module.TOOL_PROMPT
    assert (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        == native
    )


# ---------------------------------------------------------------- the experiment
def test_evaluation_with_and_without_the_tool():
    """Without it every call comes back with an error: what is left is what the policy can do by
    itself. And the figures of each number of digits."""
    prompts = [prompt_of(f"What is {i} * 3?", 3 * i) for i in (12, 13, 14, 15)]
    for prompt, digits in zip(prompts, (3, 3, 4, 4)):
        prompt.num_digits = digits
    said = [
        ["<answer>36</answer>"],
        [dialogue_call("13 * 3"), None],
        [dialogue_call("14 * 3"), "It is 42"],
        ["<answer>0</answer>"],
    ]
    scripts = [[encode(turn) + [END] if turn else None for turn in turns] for turns in said]
    right, wrong = (encode(f"<answer>{n}</answer>") + [END] for n in (39, 7))

    def next_logits(row):
        text = QWEN.decode(row)
        scripts[1][1] = wrong if calculator_module.BROKEN in text else right
        return plays({tuple(p.ids): turns for p, turns in zip(prompts, scripts)}).next_logits(row)

    figures = train.evaluate(scripted(next_logits), QWEN, prompts, config_of())
    assert figures == pytest.approx(
        {
            "eval_accuracy": 0.5,
            "eval_accuracy_lenient": 0.75,
            "eval_accuracy_no_tool": 0.25,
            "eval_tool_use_rate": 0.5,
            "eval_accuracy_3_digits": 1.0,
            "eval_accuracy_4_digits": 0.0,
            "eval_count": 4,
        }
    )


def test_the_harder_tasks_are_selected():
    class Words:
        def apply_chat_template(self, messages, **_):
            return messages[-1]["content"]

        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=text.split())

    prompts, held_out = train.read_prompts(config_of(), Words())
    assert len(prompts) == 1024 and len(held_out) == 512
    assert (
        {prompt.num_digits for prompt in prompts}
        == {prompt.num_digits for prompt in held_out}
        == {3, 4}
    )
    assert all("*" in prompt.ids for prompt in prompts + held_out)


def test_other_data_brings_its_own_held_out_rows(tmp_path):
    """The hard tasks are held out for the default data alone,
    and rows without num_digits are taken as they are."""
    rows = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(40)]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, held_out = train.read_prompts(config_of(data_path=str(path)), QWEN)
    assert [len(prompts), len(held_out)] == [36, 4] and held_out[0].num_digits is None


def test_the_calculator_is_offered_by_default():
    config = train.Config()
    assert config.generate_max_length == config.max_turns * config.max_new_tokens == 256
    with pytest.raises(SystemExit, match="--max-turns 0: must be a number from 1 to"):
        train.main(train.Config(max_turns=0, model_name="/nowhere"))
