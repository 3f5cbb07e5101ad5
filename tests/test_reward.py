"""Rewards, advantages and the figures made of them, against tables and hand-computed numbers."""

import math
import re
import time
from decimal import Decimal

import pytest
import torch
from helpers import ROOT, load_experiment
from hypothesis import given, settings
from hypothesis import strategies as st

experiment = load_experiment()
train = experiment.train
Experience = experiment.replay_buffer.Experience

GOOD = "<think>40+2=42</think>\n<answer>42</answer>"


def close(text):
    return f"<think>hm</think>\n<answer>{text}</answer>"


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    "text, number",
    [
        ("42", "42"),
        (" \n42\t ", "42"),
        ("42.0", "42"),
        ("42.50", "42.5"),
        ("42.", "42"),
        ("$42", "42"),
        ("$ 42", "42"),
        ("-$42", "-42"),
        ("-42", "-42"),
        ("- 42", "-42"),
        ("\N{MINUS SIGN}42", "-42"),  # what a model may print for a minus
        ("-0", "0"),
        ("007", "7"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("72\N{NO-BREAK SPACE}km", "72"),
        ("72 \N{DEGREE SIGN}C", "72"),
        ("1,234", "1234"),
        ("$1,234,567.50.", "1234567.5"),
        ("9" * 50, "9" * 50),
        ("-" + "9" * 40, "-" + "9" * 40),  # -Decimal(...) would round to 28 digits
    ],
)
def test_numbers_that_are_read(text, number):
    """Pitfall 24: a parser that misses `42.0`,
    `$42` or a trailing period pays nothing for a right answer."""
    assert train.parse_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "-",
        "$",
        "--4",
        "4-",
        "42..",
        "1,23",
        "12,34",
        "1,2345",
        "1,,234",
        ",123",
        "4 2",
    ]
    + [
        "x=12",
        "1/2",
        "1e3",
        "0x10",
        "1_000",
        "nan",
        "inf",
        "4\n2",
        "4.2.1",
        "(4)",
        "9" * 51,
    ]
    + [
        "\N{ARABIC-INDIC DIGIT FOUR}",
        "\N{SUPERSCRIPT TWO}",
        "\N{FULLWIDTH DIGIT FOUR}",
        "4\0",
        "<answer>4",
    ],
)
def test_texts_that_are_no_number(text):
    """Pitfall 24 and 25: a text from the model is never evaluated,
    and int() or float() would take some of these."""
    assert train.parse_number(text) is None


# How a model may write 72, and whether it is paid inside <answer>. The README has this table too.
SPELLINGS = [
    ("72", True, "the number"),
    ("72.0", True, "as a decimal"),
    ("+72", True, "a sign"),
    ("72.", True, "a full stop"),
    ("$72", True, "a currency before it"),
    ("72$", True, "a currency behind it"),
    ("72 €", True, "a currency behind a space"),
    ("$72$", True, "as LaTeX"),
    ("\\$72", True, "an escaped currency"),
    ("72%", True, "per cent"),
    ("72 dollars", True, "one unit word"),
    ("72 km.", True, "one unit word"),
    ("**72**", True, "bold"),
    ("**$72.00**", True, "bold"),
    ("\\boxed{72}", True, "boxed"),
    ("$\\boxed{72}$", True, "boxed"),
    ("\\(72\\)", True, "as LaTeX"),
    ("\\[72\\]", True, "as LaTeX"),
    ("72 thousand", False, "another number"),
    ("72 dozen", False, "another number"),
    ("72 millions", False, "another number"),
    ("72 bn", False, "another number"),
    ("72 square meters", False, "two words"),
    ("72km", False, "a unit without a space"),
    ("x = 72", False, "an equation"),
    ("70 + 2 = 72", False, "an equation"),
    ("It is 72", False, "a sentence"),
    ("72 or 73", False, "two numbers"),
    ("**72", False, "half a pair"),
    ("144/2", False, "a fraction"),
    ("7.2e1", False, "an exponent"),
]


@pytest.mark.parametrize("text, is_paid, _", SPELLINGS)
def test_spellings_of_a_number(text, is_paid, _):
    """Bug: an answer of an abler model is right, in bold or with its unit, and earns nothing."""
    for name in ("experiment_base", "experiment_multiturn_tool_calling"):
        train = load_experiment(name).train
        assert train.accuracy_reward(close(text), "72") == is_paid
        assert train.accuracy_reward(close(text), "73") == 0


def test_the_readme_has_the_same_spellings():
    readme = (ROOT / "experiment_base" / "README.md").read_text()
    table = readme.split("## What counts as the number")[1].split("\n## ")[0]
    paid, unpaid = re.findall(r"^\| (?:paid|not paid) \| (.*) \|$", table, re.MULTILINE)
    for text, is_paid, _ in SPELLINGS:
        shown = f"`{text}`"
        assert (shown in paid, shown in unpaid) == (is_paid, not is_paid), text


@pytest.mark.parametrize(
    "text, number",
    [
        ("$-7", -7),
        ("-$7", -7),
        ("- 7", -7),
        ("**-7**", -7),
        ("\N{MINUS SIGN}$7", -7),
        ("-$-7", None),
    ],
)
def test_signs_and_currencies(text, number):
    assert train.parse_number(text) == number


@pytest.mark.parametrize(
    "given, right, tolerance, is_same",
    [
        ("0.333333", "0.3333333333333333", 0.0, True),  # 1e-6 where the right one is no integer
        ("0.33333", "0.3333333333333333", 0.0, False),
        ("0.33333", "0.3333333333333333", 1e-4, True),
        ("0.30000000000000004", "0.3", 0.0, True),
        ("100", "100.00000001", 0.0, True),
        ("100.00000001", "100", 0.0, False),  # the right one is an integer
        ("101", "100", 0.01, True),
        ("101.1", "100", 0.01, False),
        ("-99", "-100", 0.01, True),
        ("0.001", "0", 0.01, False),  # relative: nothing is near 0
        ("9007199254740993", "9007199254740992", 0.0, False),
    ],
)
def test_tolerance(given, right, tolerance, is_same):
    """Bug: an answer in JSON that is a float has seventeen digits, which no model writes."""
    assert train.is_same_number(given, right, tolerance) is is_same
    assert train.accuracy_reward(close(given), right, tolerance) == is_same
    completions = [close(given)]
    parts = train.reward(experience(completions, right), train.Config(answer_tolerance=tolerance))
    assert parts["reward_accuracy"].tolist() == [is_same]


@settings(max_examples=300, deadline=None)
@given(
    st.text("0123456789.,-+$%*\\\\{}boxed= km", max_size=20), st.sampled_from(["72", "-7", "0.5"])
)
def test_the_lenient_figure_is_never_below_the_reward(text, right):
    """Bug: eval_accuracy_lenient below eval_accuracy, where the last number is not the answer."""
    for completion in (close(text), close(right) + text, text):
        paid = train.accuracy_reward(completion, right)
        assert train.is_lenient_match(completion, right) >= paid


def test_numbers_are_compared_exactly():
    """As floats these two would be equal, and 0.1 + 0.2 would not be 0.3."""
    assert train.accuracy_reward(close("9007199254740993"), "9007199254740992") == 0
    assert train.accuracy_reward(close("0.30"), "0.3") == 1


# ---------------------------------------------------------------- accuracy
@pytest.mark.parametrize(
    "completion, answer, reward",
    [
        (GOOD, "42", 1),
        (close(" 42 "), "42", 1),
        (close("\n42.0\n"), "42", 1),
        (close("$4,200."), "4200", 1),
        (close("4200"), "4,200", 1),  # answers of a data set are read by the same parser
        (close("-7"), "-7", 1),
        (close("7"), "-7", 0),
        (close("-7"), "7", 0),
        (close("4120"), "12", 0),  # `answer in text` would pay these two
        (close("12"), "4120", 0),
        (close("It is 42"), "42", 0),
        (close(""), "0", 0),
        ("42", "42", 0),  # the number must stand in the tags
        ("", "42", 0),
        ("<answer>42</answer>", "42", 1),  # the form is another reward's business
        ("<answer>42</answer> and so on", "42", 1),
        ("<answer>1</answer> no: <answer>42</answer>", "42", 1),  # the last one counts
        ("<answer>42</answer> no: <answer>1</answer>", "42", 0),
        ("<answer>42</answer> no: <answer>1", "42", 0),  # cut off by the token budget
        ("<answer>42", "42", 0),
        ("42</answer>", "42", 0),
        ("</answer>42<answer>", "42", 0),
        ("<answer><answer>42</answer>", "42", 1),
        ("<answer>42</answer></answer>", "42", 1),
        ("<ANSWER>42</ANSWER>", "42", 0),
        ("< answer>42</ answer>", "42", 0),
    ],
)
def test_accuracy_reward(completion, answer, reward):
    """Pitfall 24: too strict or too loose."""
    assert train.accuracy_reward(completion, answer) == reward


def experience(completions, answer="42", prompt_ids=(1, 2)):
    ids = [torch.tensor([3, 4])] * len(completions)
    masks = [torch.ones(2, dtype=torch.long)] * len(completions)
    log_probs = [torch.tensor([-0.5, -1.5])] * len(completions)
    truncated = torch.zeros(len(completions))
    return Experience(
        torch.tensor(prompt_ids), ids, masks, log_probs, truncated, completions, answer
    )


def test_an_answer_in_the_prompt_never_pays():
    """Pitfall 24: a reward that parses prompt and completion together pays for an example
    in the prompt."""
    parts = train.reward(experience(["I do not know.", ""]), train.Config(system_prompt=GOOD))
    assert parts["reward_accuracy"].tolist() == [0, 0] and parts["reward_format"].tolist() == [0, 0]


# ---------------------------------------------------------------- form
@pytest.mark.parametrize(
    "completion, reward",
    [
        (GOOD, 1),
        ("<think>a\nb</think><answer>x</answer>", 1),
        ("  <think></think>\n\n<answer></answer>\n", 1),  # what is inside does not matter
        ("", 0),
        ("<answer>42</answer>", 0),
        ("<think>a</think>", 0),
        ("<think>a</think>\n42", 0),
        ("So: " + GOOD, 0),
        (GOOD + " Done.", 0),
        ("<think>a</think> so <answer>42</answer>", 0),
        ("<answer>42</answer><think>a</think>", 0),
        ("<think>a<answer>42</answer></think>", 0),
        ("<think><think>a</think><answer>42</answer>", 0),  # a tag twice
        ("<think>a</think><answer>42</answer><answer>42</answer>", 0),
        ("<think>a</think><answer>42", 0),
        ("think>a</think><answer>42</answer>", 0),
    ],
)
def test_format_reward(completion, reward):
    assert train.format_reward(completion) == reward


def test_reward_is_accuracy_plus_a_weighted_form():
    completions = [GOOD, "<answer>42</answer>", close("41"), "41"]
    parts = train.reward(experience(completions), train.Config(format_weight=0.25))
    assert parts["reward_accuracy"].tolist() == [1, 1, 0, 0]
    assert parts["reward_format"].tolist() == [0.25, 0, 0.25, 0]


# ---------------------------------------------------------------- the lenient figure
@pytest.mark.parametrize(
    "completion, answer, match",
    [
        (GOOD, "42", True),
        ("The answer is 42.", "42", True),
        ("40+2=42", "42", True),
        ("It is .42", "42", False),
        ("It is -$42", "-42", True),
        ("It is $-42", "-42", True),
        ("44\N{MINUS SIGN}2", "2", True),
        ("so \N{MINUS SIGN}2", "-2", True),
        ("2-44=-42", "-42", True),
        ("44-2", "2", True),  # a minus after a digit is an operator, not a sign
        ("44-2", "-2", False),
        ("It costs $1,234.50 in all", "1234.5", True),
        ("42 or 43", "42", False),
        ("4120", "12", False),
        ("4120", "20", False),
        ("no number", "42", False),
        ("", "42", False),
        ("\N{ARABIC-INDIC DIGIT FOUR}", "4", False),
    ],
)
def test_lenient_match_takes_the_last_number(completion, answer, match):
    assert train.is_lenient_match(completion, answer) is match


# ---------------------------------------------------------------- whatever a model may say
PIECES = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "42",
    "-",
    "$",
    ",",
    ".",
    "\n",
    " ",
    "\0",
    "9" * 60,
    "\ud7ff",
]


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3))).map("".join)
    )
)
def test_any_text_gets_a_reward(text):
    assert train.accuracy_reward(text, "42") in (0.0, 1.0)
    assert train.format_reward(text) in (0.0, 1.0)
    assert train.is_lenient_match(text, "42") in (True, False)
    assert train.accuracy_reward(close(text), "42") in (0.0, 1.0)
    assert train.parse_number(text) is None or train.parse_number(text).is_finite()


@settings(max_examples=100, deadline=None)
@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9, places=2
    )
)
def test_every_number_is_read_back(number):
    assert train.parse_number(f"{number}") == train.parse_number(f" {number:,}.") == number
    assert train.accuracy_reward(close(f"{number:,}"), f"{number}") == 1


@pytest.mark.parametrize(
    "text",
    ["9" * 10**5, "1," * 10**5, "1,234" * 10**4 + "x", "<think>" * 10**4, " " * 10**5, "-" * 10**5]
    + [
        "<think>" + " " * 10**5 + "</think>" + " " * 10**5 + "x",
        "<answer>" * 10**4 + "</answer>" * 10**4,
    ]
    + [
        close("9" * 10**5),
        close("1" + ",234" * 10**5),
        close(" " * 10**5 + "x"),
        "\n" * 10**5 + GOOD,
    ],
    ids=range(12),
)
def test_long_texts_are_fast(text):
    """Pitfall 25: a regular expression that backtracks over what the model wrote hangs the run."""
    start = time.perf_counter()
    train.accuracy_reward(text, "42"), train.format_reward(text), train.is_lenient_match(text, "42")
    assert time.perf_counter() - start < 0.5


# ---------------------------------------------------------------- advantages
@pytest.mark.parametrize(
    "value", [0.0, 0.1, 0.2, 0.3, 0.7, 1.0, 1.1, -0.1, 1 / 3, 1e-8, 1e8, math.pi]
)
@pytest.mark.parametrize("size", [2, 3, 7, 8, 12, 64])
def test_equal_rewards_have_no_advantage(value, size):
    """Pitfall 10: twelve rewards of 0.1 have a mean that is not 0.1,
    and over a tiny std that becomes -0.58."""
    rewards = torch.full((size,), value)
    assert train.group_advantages(rewards).tolist() == [0.0] * size
    assert train.group_advantages(rewards.double()).tolist() == [0.0] * size


def test_equal_sums_of_parts_have_no_advantage():
    """Pitfall 10, as the loop has it: rewards are sums of parts."""
    parts = train.reward(experience([GOOD] * 12), train.Config(format_weight=0.1))
    assert train.group_advantages(sum(parts.values())).tolist() == [0.0] * 12


def test_advantages_by_hand():
    """(r - mean) / (std + 1e-4), std with n - 1: for 1, 0, 0, 0 the mean is 1/4 and the std 1/2."""
    advantages = train.group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert advantages.tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3, rel=1e-12)
    advantages = train.group_advantages(torch.tensor([1.1, 0.1], dtype=torch.float64))
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert advantages.tolist() == pytest.approx([expected, -expected], rel=1e-12)


def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift():
    rewards = torch.tensor([1.1, 0.1, 0.0, 1.0, 0.1, 0.0, 0.0, 1.1], dtype=torch.float64)
    advantages = train.group_advantages(rewards)
    assert advantages.sum().abs() < 1e-12
    torch.testing.assert_close(train.group_advantages(rewards + 5), advantages)
    assert advantages.argsort(stable=True).tolist() == rewards.argsort(stable=True).tolist()


def test_a_group_of_one_is_refused_before_anything_is_loaded():
    """Pitfall 11: the std of one reward is NaN, and so is everything after it."""
    config = train.Config(
        group_size=1, train_batch_size=8, model_name="/nowhere", data_path="/nowhere.jsonl"
    )
    with pytest.raises(SystemExit, match="--group-size 1"):
        train.main(config)


# ---------------------------------------------------------------- figures
def test_rollout_metrics_by_hand():
    """Pitfalls 13 and 14: the fraction of groups that teach nothing,
    and means that count sampled tokens alone."""
    first, second = experience([GOOD, "41"]), experience(["41", "41"])
    first.completion_masks = [torch.tensor([1, 1, 1, 1]), torch.tensor([1, 0, 0, 1])]
    first.sampled_log_probs = [torch.full((4,), -1.0), torch.tensor([-1.0, 0.0, 0.0, -1.0])]
    for e in (first, second):
        e.reward_parts = train.reward(e, train.Config(format_weight=0.5))
        e.rewards = sum(e.reward_parts.values())
    second.truncated[1] = 1
    metrics = train.rollout_metrics([first, second])
    assert (
        metrics["reward"] == 1.5 / 4
        and metrics["reward_accuracy"] == 0.25
        and metrics["reward_format"] == 0.125
    )
    assert metrics["zero_std_fraction"] == 0.5
    assert metrics["reward_std"] == pytest.approx(1.5 / math.sqrt(2) / 2)  # of 1.5, 0 and of 0, 0
    assert metrics["completion_length"] == (4 + 2 + 2 + 2) / 4
    assert metrics["completion_length_correct"] == 4 and metrics["completion_length_wrong"] == 2
    assert metrics["truncated_fraction"] == 0.25 and metrics["entropy"] == 1.0
    metrics = train.rollout_metrics([second])
    assert metrics["completion_length_correct"] is None and metrics["completion_length_wrong"] == 2
