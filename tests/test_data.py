"""The arithmetic tasks and what the embedded policy is taught:
right answers, even cells, nothing held out is shown."""

import ast
import json
import operator
import random
import re
import sys
from collections import Counter
from fractions import Fraction

import pytest
import torch
from helpers import ROOT, embedded_tokenizer, load_experiment
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = ROOT / "data"
sys.path.insert(0, str(DATA))
import make_math_tasks as tasks  # noqa: E402
import make_tiny_model as tiny  # noqa: E402

FILES = ("math_tasks.jsonl", "math_tasks_eval.jsonl", "math_tasks_hard_eval.jsonl")
LONG_FILES = ("math_tasks_long.jsonl", "math_tasks_long_eval.jsonl")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
train = load_experiment().train
tool = load_experiment("experiment_multiturn_tool_calling")


def value(node):
    """The value of an expression by Python's own grammar:
    a second opinion on precedence and signs."""
    if isinstance(node, str):
        return value(ast.parse(node, mode="eval").body)
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    assert isinstance(node, ast.Constant) and type(node.value) is int
    return Fraction(node.value)


def cell_of(row):
    return row["num_terms"], row["num_digits"], row["operators"]


@pytest.fixture(scope="module")
def files():
    return {
        name: [json.loads(line) for line in (DATA / name).read_text().splitlines()]
        for name in FILES + LONG_FILES
    }


# ---------------------------------------------------------------- the files
def test_counts(files):
    assert len(files[FILES[0]]) >= 8192 and [len(files[name]) for name in FILES[1:]] == [512, 512]


@pytest.mark.parametrize("name", FILES + LONG_FILES)
def test_rows_say_what_they_are(files, name):
    """Fields that lie about the expression would let --max-terms and --operators select the
    wrong rows."""
    for row in files[name]:
        assert list(row) == [
            "question",
            "answer",
            "expression",
            "num_terms",
            "num_digits",
            "operators",
        ]
        terms, used = row["expression"].split()[::2], row["expression"].split()[1::2]
        assert all(term == str(int(term)) and int(term) > 0 for term in terms)
        assert row["num_terms"] == len(terms) == len(used) + 1
        assert row["num_digits"] == max(map(len, terms))
        assert row["operators"] == "".join(o for o in "+-*" if o in used)
        assert row["question"] in [
            phrasing.format(row["expression"]) for phrasing in tasks.PHRASINGS
        ]


@pytest.mark.parametrize("name", FILES + LONG_FILES)
def test_answers_are_right(files, name):
    for row in files[name]:
        assert type(row["answer"]) is int and value(row["expression"]) == row["answer"], row


def test_no_expression_stands_twice(files):
    """Held-out accuracy means nothing where the training file has the same expression."""
    expressions = [row["expression"] for name in FILES for row in files[name]]
    assert len(set(expressions)) == len(expressions)
    training, held_out = ([row["expression"] for row in files[name]] for name in LONG_FILES)
    assert len(set(training)) == len(training) and len(set(held_out)) == len(held_out)
    assert not set(training) & tasks.held_out_expressions() and not set(held_out) & {
        r["expression"] for r in files[FILES[0]]
    }


def test_long_files_are_easy_and_hard_mixed(files):
    """Two to six terms. What is held out of two and three was held out of the policy that
    the long one begins as."""
    training, held_out = (files[name] for name in LONG_FILES)
    assert len(training) >= 2048 and len(held_out) == 512
    for rows in (training, held_out):
        assert {cell_of(row) for row in rows} == set(tasks.LONG_CELLS)
    short = {row["expression"] for row in held_out if row["num_terms"] <= 3}
    assert len(short) > 100 and short <= {
        row["expression"] for row in files["math_tasks_eval.jsonl"]
    }


def test_every_phrasing_is_used_about_as_often(files):
    for rows in files.values():
        counts = Counter(row["question"].replace(row["expression"], "{}") for row in rows)
        assert set(counts) == set(tasks.PHRASINGS) and min(counts.values()) > len(rows) / 6 * 0.75


# ---------------------------------------------------------------- cells
def test_cell_sizes_match_counting_them():
    """All expressions of the small cells, written out."""
    for cell in [(2, 1, "+"), (3, 1, "-"), (3, 1, "+-"), (4, 1, "+*"), (2, 2, "*")]:
        terms = [str(n) for n in range(1, 10 ** cell[1])]
        texts = list(terms)
        for _ in range(cell[0] - 1):
            texts = [
                f"{text} {used} {term}" for text in texts for used in cell[2] for term in terms
            ]
        is_in_cell = [
            set(t.split()[1::2]) == set(cell[2]) and max(map(len, t.split()[::2])) == cell[1]
            for t in texts
        ]
        assert tasks.cell_size(cell) == sum(is_in_cell), cell


def test_random_expressions_belong_to_their_cell():
    rng = random.Random(0)
    for cell in tasks.cells():
        row = tasks.make_row(rng, cell, tasks.random_expression(rng, cell))
        parts = row["expression"].split()
        assert (len(parts[::2]), max(map(len, parts[::2])), set(parts[1::2])) == (
            cell[0],
            cell[1],
            set(cell[2]),
        )


def test_training_rows_are_spread_evenly(files):
    counts = Counter(map(cell_of, files[FILES[0]]))
    held_out = Counter(cell_of(row) for name in FILES[1:] for row in files[name])
    assert counts.keys() == set(tasks.cells()) and len(counts) == 64
    # the smallest cells have fewer expressions than a cell's share
    for cell, count in counts.items():
        assert count == min(160, tasks.cell_size(cell) - held_out[cell]), cell


@pytest.mark.parametrize("name, cells", list(zip(FILES[1:], (tasks.BASE_CELLS, tasks.HARD_CELLS))))
def test_held_out_rows_are_spread_evenly_and_a_tenth_of_a_cell_at_most(files, name, cells):
    counts = Counter(map(cell_of, files[name]))
    assert counts.keys() == set(cells)
    for cell, count in counts.items():
        limit = tasks.cell_size(cell) // 10
        assert count <= limit and (count == limit or count >= max(counts.values()) - 1), cell


def test_base_cells_are_what_the_base_experiment_selects():
    """Held-out questions of a kind that is never trained on would measure something else."""
    config = train.Config()
    rows = [dict(zip(("num_terms", "num_digits", "operators"), cell)) for cell in tasks.cells()]
    assert [
        cell_of(row) for row in rows if not train.left_out_by("", row, config)
    ] == tasks.BASE_CELLS


def test_even_counts_by_hand():
    assert tasks.even_counts(10, {"a": 1, "b": 100, "c": 100}) == {"a": 1, "b": 4, "c": 5}
    assert tasks.even_counts(10, {"a": 2, "b": 3}) == {"a": 2, "b": 3}  # no more than there is


@pytest.mark.parametrize(
    "expression, answer",
    [("2 + 3 * 4", 14), ("2 - 3 * 4 - 5", -15), ("2 * 3 - 4 * 5", -14), ("7 - 8 + 9", 8)],
)
def test_products_come_first(expression, answer):
    assert tasks.evaluate(expression) == answer


def test_the_files_can_be_made_again(tmp_path, capsys):
    tasks.main(tasks.Config(output=tmp_path))
    for name in FILES + LONG_FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


# --------------------------------------------------------------- what the embedded policy is taught
def expression_of(question):
    return re.search(r"\d+(?: [+*-] \d+)+", question)[0]


@pytest.mark.parametrize("policy", [name for name in tiny.POLICIES if name != "qa"])
def test_demonstrations_never_show_a_held_out_expression(policy, monkeypatch):
    def shown():
        rng = random.Random(1)
        return {expression_of(tiny.POLICIES[policy].demonstration(rng)[0]) for _ in range(4000)}

    held_out = tasks.held_out_expressions()
    assert len(held_out) > 1024 and not shown() & held_out
    monkeypatch.setattr(tiny, "HELD_OUT", set())
    if policy != "calculator":  # it draws from millions of expressions
        # so the draw above would have met them, had they not been refused
        assert len(shown() & held_out) > 30
    first = expression_of(tiny.POLICIES[policy].demonstration(random.Random(1))[0])
    monkeypatch.setattr(tiny, "HELD_OUT", {first})
    assert expression_of(tiny.POLICIES[policy].demonstration(random.Random(1))[0]) != first


def test_demonstrations_in_the_good_form_earn_the_full_reward():
    """What the policy is taught as good must be what train.py pays, else GRPO would unlearn it."""
    rng, habits = random.Random(2), []
    for _ in range(500):
        question, good, habit = tiny.math_demonstration(rng)
        answer = str(value(expression_of(question)))
        assert train.accuracy_reward(good, answer) == train.format_reward(good) == 1, good
        for line in good.partition("<think>")[2].partition("</think>")[0].splitlines():
            left, result = line.split("=")
            assert value(left) == int(result), good
        habits.append(train.accuracy_reward(habit, answer) * train.format_reward(habit))
    assert 0.2 < sum(habits) / len(habits) < 0.6  # the mixture must leave something to learn


def test_long_demonstrations_leave_length_free():
    """The number of checks says nothing about the answer, else a change in length could be the
    reward's doing. All are in form; good ones are right in every line, habitual ones forget or
    slip, and a check repeats what it checks."""
    rng, checks = random.Random(3), {0.0: [], 1.0: []}
    for _ in range(4000):
        question, good, habit = tiny.long_demonstration(rng)
        answer = str(value(expression_of(question)))
        assert (
            train.accuracy_reward(good, answer)
            == train.format_reward(good)
            == train.format_reward(habit)
            == 1
        )
        chains = habit.removeprefix("<think>").partition("</think>")[0].split("\nCheck: ")
        assert len(set(chains)) == 1
        assert all(value(line.split("=")[0]) == int(line.split("=")[1]) for line in chain_of(good))
        checks[train.accuracy_reward(habit, answer)].append(len(chains) - 1)
    wrong, right = checks[0.0], checks[1.0]
    assert 0.2 < len(right) / 4000 < 0.5 and max(right) == max(wrong) == 3
    # 0.73 on average, standard error 0.03
    assert abs(sum(right) / len(right) - sum(wrong) / len(wrong)) < 0.08


def chain_of(completion):
    return (
        completion.removeprefix("<think>")
        .partition("</think>")[0]
        .replace("Check: ", "")
        .splitlines()
    )


def test_calculator_demonstrations_are_what_the_experiment_makes_of_them():
    """Every result is the environment's own; good dialogues earn the full reward, but for those
    that recover from a malformed call; habitual ones call in a third of the cases, and do not know
    the answer where they do not."""
    rng, called, slipped, known = random.Random(2), [], 0, 0
    for _ in range(2000):
        question, good, habit = tiny.calculator_demonstration(rng)
        answer = str(value(expression_of(question)))
        for dialogue in (good, habit):
            for turn, reply in zip(dialogue[::2], dialogue[1::2]):
                result = tool.calculator.run_call(tool.calculator.parse_call(turn))[1]
                assert reply == result or (reply == tool.calculator.BROKEN and dialogue is habit)
            assert tool.calculator.parse_call(dialogue[-1]) is None
        assert (
            tool.train.accuracy_reward(good[-1], answer) == tool.train.format_reward(good[-1]) == 1
        )
        assert good[-3] == tiny.calculator_call(expression_of(question)) and good[-2] == answer
        slipped += len(good) > 3
        called.append(len(habit) > 1)
        known += not called[-1] and train.is_lenient_match(habit[0], answer)
    assert known < 20 and 0.25 < sum(called) / 2000 < 0.4 and 0.05 < slipped / 2000 < 0.15


def test_calculator_dialogues_are_tokenised_as_the_rollout_does_it():
    """The policy learns its own turns, each with its end token, and stands behind what the
    environment would write."""
    policy = tiny.POLICIES["calculator"]
    tokenizer = AutoTokenizer.from_pretrained(DATA / "policy_calculator")
    dialogue = tiny.dialogue(tiny.calculator_call("12 * 345"), "<answer>4140</answer>")
    ids, labels = tiny.tokenize_completion(tokenizer, dialogue)
    environment = tool.train.Environment(tokenizer)
    end = tokenizer.eos_token_id
    first, last = ([*tokenizer(dialogue[i]).input_ids, end] for i in (0, 2))
    response = environment.ids("4140", "", end, 1000)
    assert ids == first + response + last and labels == first + [-100] * len(response) + last
    prompt = tool.train.make_prompt(
        "row", {"question": "What is 1 * 2?", "answer": 2}, tool.train.Config(), tokenizer
    )
    assert tokenizer.decode(prompt.ids) == tiny.chat(tokenizer, policy, "What is 1 * 2?")


def test_the_shared_beginning_is_forwarded_once_without_changing_the_loss():
    policy, rng = tiny.POLICIES["math"], random.Random(0)
    tokenizer = tiny.make_tokenizer(policy, 400, random.Random(0))
    torch.manual_seed(0)
    model = tiny.make_model(
        tokenizer, tiny.Config(hidden_size=96, num_layers=2, device="cpu")
    ).train()
    input_ids, labels = next(tiny.batches(policy, tokenizer, rng, "mixture", 1, 8, "cpu"))
    hidden, expected = tiny.hidden_states(model, input_ids, labels)
    assert hidden.shape[1] < input_ids.shape[1] - 20
    logits = model.lm_head(hidden[expected != -100])
    whole = model(input_ids).logits[:, :-1][labels[:, 1:] != -100]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-4)
    assert expected[expected != -100].equal(labels[:, 1:][labels[:, 1:] != -100])


def test_a_policy_takes_over_the_embeddings_of_the_tokens_that_it_shares():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "policy_calculator")
    start = AutoTokenizer.from_pretrained(DATA / "policy_math")
    model = tiny.make_model(tokenizer, tiny.Config(device="cpu"))
    tiny.load_start(model, tokenizer, DATA / "policy_math")
    old = (
        AutoModelForCausalLM.from_pretrained(DATA / "policy_math", dtype=torch.float32)
        .get_input_embeddings()
        .weight
    )
    new = model.get_input_embeddings().weight
    for token in ("7", "<answer>", "<|im_end|>"):
        assert new[tokenizer.convert_tokens_to_ids(token)].equal(
            old[start.convert_tokens_to_ids(token)]
        )
    assert model.lm_head.weight is new  # tied still


def test_system_prompts_agree():
    """An embedded policy answers only the system prompt that it was taught with."""
    prompts = {name: policy.system_prompt for name, policy in tiny.POLICIES.items()}
    assert (
        prompts.pop("calculator") == tool.train.Config().system_prompt + tool.calculator.TOOL_PROMPT
    )
    assert prompts.pop("qa").endswith("</tool_call>")  # see test_qa.py
    assert set(prompts.values()) == {train.Config().system_prompt}


def test_embedded_chat_template_renders_what_train_py_tokenises():
    tokenizer = tiny.make_tokenizer(tiny.POLICIES["math"], 400, random.Random(0))
    prompt = train.make_prompt(
        "row", {"question": "What is 2 + 3?", "answer": 5}, train.Config(), tokenizer
    )
    assert tokenizer.decode(prompt.ids) == tiny.chat(
        tokenizer, tiny.POLICIES["math"], "What is 2 + 3?"
    )
    # special tokens, not their letters
    assert tokenizer.convert_ids_to_tokens(prompt.ids)[0] == "<|im_start|>"
    tags = tokenizer("<think>1</think>\n<answer>23</answer>").input_ids
    assert (
        tokenizer.decode(tags, skip_special_tokens=True) == "<think>1</think>\n<answer>23</answer>"
    )


# ---------------------------------------------------------------- a data set of the hub
GSM8K_CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
---
"""


def write_gsm8k(folder) -> None:
    """A directory with the files that openai/gsm8k has on the hub."""
    import pyarrow
    import pyarrow.parquet

    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(GSM8K_CARD)
    for split, count in (("train", 12), ("test", 3)):
        rows = {
            "question": [
                f"{split}: Ann has {i} apples and buys 1,000. How many?" for i in range(count)
            ],
            "answer": [
                f"{i} + 1000 = <<{i}+1000={1000 + i}>>\n#### 1,{i:03d}" for i in range(count)
            ],
        }
        path = folder / "main" / f"{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.table(rows), path)


def test_gsm8k_is_read_as_the_hub_has_it(tmp_path, monkeypatch, model):
    """`--data-path openai/gsm8k:main`: its train split, its test split, the number behind ####."""
    from test_run import tiny_settings

    write_gsm8k(tmp_path / "openai" / "gsm8k")
    monkeypatch.chdir(tmp_path)
    train = load_experiment().train
    settings = tiny_settings(tmp_path, model, data_path="openai/gsm8k:main", max_prompts=7473)
    prompts, eval_prompts = train.read_prompts(train.Config(**settings), embedded_tokenizer())
    assert [prompt.answer for prompt in prompts] == [f"1,{i:03d}" for i in range(12)]
    assert len(eval_prompts) == 3
    assert train.accuracy_reward("<answer>1002</answer>", eval_prompts[2].answer) == 1
    text = embedded_tokenizer().decode(eval_prompts[0].ids)
    assert "test: Ann has 0 apples" in text


def test_a_held_out_data_set_without_a_test_split(tmp_path):
    """google/IFEval, a benchmark, has its rows in "train"."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": 2}\n')
    data = load_experiment().data
    rows = data.read_rows(str(tmp_path / "set"), "test", "train")
    assert [row["answer"] for _, row in rows] == [2] and "train row 1" in rows[0][0]
