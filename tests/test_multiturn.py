"""Trajectories of several turns: exact log-probs, masks, real chat templates, budgets, rewards,
figures.

Every test runs in both multi-turn experiments, with the calculator as the tool; what they do not
share is tested in test_calculator.py, test_search.py and test_qa.py."""

import ast
import itertools
import json
import sys

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, ROOT, chat_template, load_experiment, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_run import checkpoints, fingerprint, metrics, read_weights, reward_by, run_main
from test_sampling import (
    END,
    TEMPLATES,
    ScriptedPolicy,
    generator_of,
    make_tokenizer,
    many_ends,
    only,
)

EXPERIMENTS = ["experiment_multiturn_tool_calling", "experiment_multiturn_qa"]
experiment = load_experiment(EXPERIMENTS[0])
train, calculator = experiment.train, experiment.calculator.calculator
HEADER = TEMPLATES["qwen2_5"][2]
QWEN = make_tokenizer(chat_template("qwen2_5"), TEMPLATES["qwen2_5"][0])


@pytest.fixture(autouse=True, params=EXPERIMENTS)
def in_both_experiments(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "experiment", load_experiment(request.param))
    monkeypatch.setattr(sys.modules[__name__], "train", experiment.train)


def is_qa():
    return hasattr(experiment, "search")


def tool(text):
    """The calculator; where the tool is a search,
    an expression that cannot be computed is one that finds nothing."""
    result = calculator(text)
    return experiment.search.NOTHING if is_qa() and result.startswith("Error") else result


def config_of(**changes):
    whole_results = {"max_result_tokens": 4000} if is_qa() else {}
    settings = {"precision": "float32", "max_new_tokens": 200, "max_length": 4000, **whole_results}
    return train.Config(**settings | changes)


def as_answer(text):
    return [text] if is_qa() else text


def function(text):
    return (
        {"name": "search", "arguments": {"query": text}}
        if is_qa()
        else call_of_the_calculator(text)
    )


def call_of_the_calculator(text):
    return {"name": "calculator", "arguments": {"expression": text}}


def call(text):
    return f"<tool_call>\n{json.dumps(function(text))}\n</tool_call>"


def prompt_of(question, answer, tokenizer=QWEN):
    return train.make_prompt(
        "row", {"question": question, "answer": answer}, config_of(), tokenizer
    )


def encode(text, tokenizer=QWEN):
    return tokenizer(text, add_special_tokens=False).input_ids


def scripted(next_logits):
    """A ScriptedPolicy, whose cache cannot be kept from turn to turn."""
    policy = ScriptedPolicy(next_logits)
    policy.config = transformers.Gemma3TextConfig(sliding_window=1)
    return policy


def plays(scripts: dict, header=HEADER, tokenizer=QWEN):
    """A policy that says, turn by turn, what the script of its prompt says:
    {tuple of prompt ids: [ids of a turn]}."""
    header = encode(header, tokenizer)

    def next_logits(row):
        prompt = next(prompt for prompt in scripts if tuple(row[: len(prompt)]) == prompt)
        rest = row[len(prompt) :]
        for turn in scripts[prompt]:
            if len(rest) < len(turn):
                assert rest == turn[: len(rest)]
                return only(turn[len(rest)])
            rest = rest[len(turn) :]
            begin = next(i for i in range(len(rest)) if rest[i : i + len(header)] == header)
            rest = rest[begin + len(header) :]
        raise AssertionError("the script has no further turn")

    return scripted(next_logits)


def play(*dialogues, tokenizer=QWEN, header=HEADER, **changes):
    """The trajectories of dialogues, each (question, answer, turns): texts that end with the end
    token, or lists of ids that say themselves where they end."""
    prompts = [prompt_of(question, answer, tokenizer) for question, answer, _ in dialogues]
    scripts = {
        tuple(prompt.ids): [
            encode(turn, tokenizer) + [tokenizer.eos_token_id] if isinstance(turn, str) else turn
            for turn in turns
        ]
        for prompt, (_, _, turns) in zip(prompts, dialogues)
    }
    policy = plays(scripts, header, tokenizer)
    experiences = train.rollout(policy, tokenizer, prompts, 1, config_of(**changes), tool=tool)
    return [experience.trajectories[0] for experience in experiences]


def whole(trajectory, tokenizer=QWEN):
    return tokenizer.decode(trajectory.prompt.ids + trajectory.ids)


# ---------------------------------------------------------------- exactness
def random_tool(monkeypatch, longest_result=8):
    """Three turns in four, by their text, call a tool whose results differ in length."""
    monkeypatch.setattr(
        train, "parse_call", lambda turn: {"text": turn} if len(turn.encode()) % 4 else None
    )
    reply = lambda call, tool: (  # noqa: E731
        "ok",
        "result " * (hash_of(call["text"]) % longest_result),
    )
    monkeypatch.setattr(train, "run_call", reply)


def hash_of(text):
    return int(fingerprint(text, "") * 2**32)


def random_trajectories(model, monkeypatch, tokenizer=None, group_size=8, **changes):
    """Trajectories of a model with random weights, 1 to 4 turns,
    and all three statuses among them."""
    random_tool(monkeypatch)
    tokenizer = tokenizer or make_tokenizer(chat_template("qwen2_5"), TEMPLATES["qwen2_5"][0])
    prompts = [
        train.Prompt(list(range(40, 40 + length)), as_answer("42")) for length in (5, 17, 30)
    ]
    settings = dict(
        max_new_tokens=24,
        max_length=600,
        temperature=0.7,
        group_size=group_size,
        rollouts_per_step=3,
    )
    config = config_of(**{**settings, **changes}, train_batch_size=3 * group_size)
    return train.rollout(
        many_ends(model), tokenizer, prompts, group_size, config, generator_of(), tool=tool
    ), config


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_training_forward_gives_the_sampled_log_probs(architecture, attention, monkeypatch):
    """Three tool turns, rows of mixed length and status, temperature 0.7: 1e-4 on every sampled
    token. Bugs: the turns trained on without the tool's messages between them (re-grpo), positions
    or masks that a turn shifts, a cache that keeps rows of others."""
    model = make_model(architecture, attention)
    experiences, config = random_trajectories(model, monkeypatch)
    trajectories = [t for e in experiences for t in e.trajectories]
    assert {t.status for t in trajectories} == {"answered", "max_turns", "truncated"}
    assert {len(t.turns) for t in trajectories} >= {1, 2, 4} and len(
        {len(t.ids) for t in trajectories}
    ) > 9
    for e in experiences:
        e.advantages = torch.ones(config.group_size)
    packed = experiment.model.can_pack(model.config, config.max_length)
    replay_buffer = experiment.replay_buffer.ReplayBuffer(packed)
    replay_buffer.extend(experiences)
    assert packed == (architecture not in ("gemma3", "gemma3-short-window"))
    (micro_batches,) = replay_buffer.batches(config, generator_of())
    count = 0
    for micro_batch in micro_batches:
        recomputed = train.sequences_log_probs(model, micro_batch, config).detach()
        torch.testing.assert_close(recomputed, micro_batch.sampled_log_probs, atol=1e-4, rtol=0)
        count += len(recomputed)
    assert count == sum(sum(t.mask) for t in trajectories)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_log_probs_are_those_of_a_plain_forward(architecture, monkeypatch):
    """The same against one unpadded forward of each whole trajectory,
    at every token that was sampled."""
    model = make_model(architecture)
    experiences, config = random_trajectories(model, monkeypatch)
    for trajectory in (t for e in experiences for t in e.trajectories):
        ids = torch.tensor(trajectory.prompt.ids + trajectory.ids)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1] / config.temperature
        expected = logits.log_softmax(-1).gather(1, ids[1:, None])[
            len(trajectory.prompt.ids) - 1 :, 0
        ]
        sampled = torch.tensor(trajectory.mask).bool()
        torch.testing.assert_close(
            torch.tensor(trajectory.log_probs)[sampled], expected[sampled], atol=1e-4, rtol=0
        )


def test_the_mask_counts_what_was_sampled_and_nothing_else(monkeypatch):
    """Pitfall 26. Bug: the last rollout's masks applied to the whole group (re-grpo)."""
    sampled, sample = [], train.sample
    monkeypatch.setattr(train, "sample", lambda *args: sampled.append(sample(*args)) or sampled[-1])
    experiences, _ = random_trajectories(make_model(), monkeypatch)
    assert len(sampled) == 4
    tokens = sum(len(ids) for turn_ids, _ in sampled for ids in turn_ids)
    assert sum(mask.sum().item() for e in experiences for mask in e.completion_masks) == tokens
    # of the first turn: the beginnings of the trajectories
    in_order = [ids.tolist() for ids in sampled[0][0]]
    trajectories = [t for e in experiences for t in e.trajectories]
    for first, trajectory in zip(in_order, trajectories):
        assert trajectory.ids[: len(first)] == first and trajectory.mask[: len(first)] == [1] * len(
            first
        )
    assert all(
        len(t.ids) == len(t.mask) == len(t.log_probs) and t.mask[-1] == 1 for t in trajectories
    )
    assert all((p != 0) == bool(m) for t in trajectories for p, m in zip(t.log_probs, t.mask))


def test_every_turn_begins_with_the_whole_history(monkeypatch):
    """Pitfall 27: turn n's ids are a prefix of turn n + 1's; history is never rendered again."""
    histories, sample = [], train.sample
    monkeypatch.setattr(
        train,
        "sample",
        lambda policy, rows, *rest: histories.append(rows) or sample(policy, rows, *rest),
    )
    experiences, _ = random_trajectories(make_model(), monkeypatch)
    rows = [t.prompt.ids + t.ids for e in experiences for t in e.trajectories]
    for turn_rows in histories:
        assert all(any(row[: len(history)] == history for row in rows) for history in turn_rows)
    assert [len(turn_rows) for turn_rows in histories] == sorted(
        [len(h) for h in histories], reverse=True
    )
    # all that are still active, sampled together
    assert len(histories[0]) == 24 > len(histories[3]) > 0


def test_environment_tokens_are_in_no_loss_no_kl_and_no_denominator(monkeypatch):
    """Pitfall 26: whatever the log-probs on them, and however many there are."""
    experiences, config = random_trajectories(make_model(), monkeypatch)

    def figures(change):
        for e in experiences:
            e.advantages = torch.linspace(-1, 1, config.group_size)
            e.sampled_log_probs = [
                torch.where(mask.bool(), log_probs, change)
                for mask, log_probs in zip(e.completion_masks, e.sampled_log_probs)
            ]
        replay_buffer = experiment.replay_buffer.ReplayBuffer(packed=True)
        replay_buffer.extend(experiences)
        ((*micro_batches,),) = replay_buffer.batches(config, generator_of())
        losses = []
        for micro_batch in micro_batches:
            micro_batch.old_log_probs = micro_batch.sampled_log_probs
            micro_batch.reference_log_probs = micro_batch.sampled_log_probs - 0.1
            objective = experiment.loss.GRPOLoss(0.2, 0.2, 0.01)
            log_probs = (micro_batch.sampled_log_probs + 0.05).requires_grad_()
            losses.append(objective(log_probs, micro_batch))
        weights = torch.cat([micro_batch.weights for micro_batch in micro_batches])
        return sum(losses).item(), weights.sum().item()

    (loss, weights), changed = figures(0.0), figures(-7.0)
    assert (loss, weights) == changed
    # 1 / (sampled tokens x trajectories) each: they sum to 1
    assert weights == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sample_rows", [6, 7, 256])
def test_sample_rows_bounds_each_turn(sample_rows, monkeypatch):
    sizes, sample = [], train.sample
    monkeypatch.setattr(
        train,
        "sample",
        lambda policy, rows, *rest: sizes.append(len(rows)) or sample(policy, rows, *rest),
    )
    experiences, _ = random_trajectories(make_model(), monkeypatch, sample_rows=sample_rows)
    assert max(sizes) == min(sample_rows, 24) and len(experiences) == 3
    assert all(t.status != "active" for e in experiences for t in e.trajectories)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_remembered_turns_and_turns_that_are_prefilled_anew_agree(architecture, monkeypatch):
    """The same ids from the same random numbers. Bugs: a gap in the cache that is seen, positions
    that count it, the cache of another row."""
    model = make_model(architecture)
    remembered, _ = random_trajectories(model, monkeypatch)
    monkeypatch.setattr(train, "can_pack", lambda *_: False)
    anew, _ = random_trajectories(model, monkeypatch)
    for one, other in zip(remembered, anew):
        assert [t.ids for t in one.trajectories] == [t.ids for t in other.trajectories]
        for a, b in zip(one.sampled_log_probs, other.sampled_log_probs):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_turn_forwards_what_is_new_and_nothing_else(monkeypatch):
    model, shapes = make_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda ids, **arguments: shapes.append(tuple(ids.shape)) or forward(ids, **arguments),
    )
    experiences, _ = random_trajectories(model, monkeypatch)
    # tokens of the first, second and third result of every trajectory, and one more:
    # the end of the turn, sampled, not forwarded
    replies = [[] for _ in range(3)]
    for trajectory in (t for e in experiences for t in e.trajectories):
        runs = [len([*run]) for sampled, run in itertools.groupby(trajectory.mask) if not sampled]
        for turn, length in enumerate(runs):
            replies[turn].append(length + 1)
    prefills = [shape for shape in shapes if shape[1] > 1]
    # what the prompts of 5, 17 and 30 tokens begin with, and the rest
    assert prefills[:2] == [(1, 4), (3, 26)]
    assert [width for _, width in prefills[2:]] == [max(lengths) for lengths in replies]
    assert all(rows <= len(lengths) for (rows, _), lengths in zip(prefills[2:], replies))


def test_equal_histories_are_prefilled_once():
    """Eight trajectories that agree are one row, also when the second turn is prefilled."""
    prompt = prompt_of("What is 12 * 3?", 36)
    turns = [encode(text) + [END] for text in (call("12 * 3"), "<answer>36</answer>")]
    policy = plays({tuple(prompt.ids): turns})
    (experience,) = train.rollout(policy, QWEN, [prompt], 8, config_of(), generator_of(), tool=tool)
    assert (
        policy.rows_seen == [1, 1]
        and [t.status for t in experience.trajectories] == ["answered"] * 8
    )


# ---------------------------------------------------------------- chat templates
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_canonical_trajectory_is_the_templates_own_rendering(name):
    """Pitfalls 8 and 28: no lost newline, no doubled end of turn, one BOS.
    Token for token, not only as text."""
    special, bos, header = TEMPLATES[name]
    tokenizer = make_tokenizer(chat_template(name), special, bos)
    turns = [call("12 * 3"), f"Once more.\n{call('36 * 2')}", "<answer>72</answer>"]
    (trajectory,) = play(("What is 12 * 3 * 2?", 72, turns), tokenizer=tokenizer, header=header)
    assert trajectory.status == "answered" and trajectory.outcomes == ["ok", "ok"]
    system = train.Config().system_prompt + train.TOOL_PROMPT
    chat = [
        {"role": "system", "content": system},
        {"role": "user", "content": "What is 12 * 3 * 2?"},
    ]
    for turn, result in zip(turns, ("36", "72", None)):
        chat.append({"role": "assistant", "content": turn})
        chat.append({"role": "user", "content": f"<tool_response>\n{result}\n</tool_response>"})
    text = tokenizer.apply_chat_template(chat[:-1], tokenize=False, **experiment.model.DATE)
    if name == "qwen3":  # its template puts an empty block into the last assistant turn
        assert text.count("<think>\n\n</think>\n\n") == 1
        text = text.replace("<think>\n\n</think>\n\n", "")
    ids = trajectory.prompt.ids + trajectory.ids
    expected = encode(text, tokenizer)
    assert (
        ids == expected[: len(ids)]
        and len(encode(text[len(tokenizer.decode(ids)) :].strip(), tokenizer)) <= 1
    )
    assert ids.count(tokenizer.bos_token_id) == (1 if bos else 0)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_on_qwen_it_is_the_native_rendering_of_tools(name):
    """With tool calls and the role `tool`: what these models were trained with."""
    tokenizer = make_tokenizer(chat_template(name), TEMPLATES[name][0])
    turns = [call("12 * 3"), "<answer>36</answer>"]
    (trajectory,) = play(("What is 12 * 3?", 36, turns), tokenizer=tokenizer)
    chat = [
        {"role": "system", "content": train.Config().system_prompt},
        {"role": "user", "content": "What is 12 * 3?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function("12 * 3")}],
        },
        {"role": "tool", "name": function("")["name"], "content": "36"},
        {"role": "assistant", "content": "<answer>36</answer>"},
    ]
    tools = [
        transformers.utils.get_json_schema(experiment.search.search if is_qa() else calculator)
    ]
    text = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False).replace(
        "<think>\n\n</think>\n\n", ""
    )
    assert text == whole(trajectory, tokenizer) + "\n"


def test_qwen3s_thinking_survives_in_history():
    """Pitfall 27: its template strips <think> from all turns but the last when history is rendered
    again."""
    tokenizer = make_tokenizer(chat_template("qwen3"), TEMPLATES["qwen3"][0])
    turns = [
        f"<think>\nA product.\n</think>\n\n{call('12 * 3')}",
        "<think>\nGot it.\n</think>\n\n<answer>36</answer>",
    ]
    (trajectory,) = play(("What is 12 * 3?", 36, turns), tokenizer=tokenizer)
    assert whole(trajectory, tokenizer).count("A product.") == 1 and trajectory.status == "answered"
    assert trajectory.turns == turns


def test_a_split_that_the_tokenizer_would_not_make_survives():
    """Pitfall 6, in the first turn, which the second one is sampled behind."""
    four, two, both = QWEN.convert_tokens_to_ids(["4", "2", "42"])
    before, after = call("42 * 3").split("42")
    odd = [*encode(before), four, two, *encode(after), END]
    assert both in encode(call("42 * 3")) and both not in odd
    (trajectory,) = play(("What is 42 * 3?", 126, [odd, "<answer>126</answer>"]))
    assert (
        trajectory.ids[: len(odd)] == odd
        and trajectory.outcomes == ["ok"]
        and trajectory.status == "answered"
    )


def test_the_end_of_a_turn_is_written_once():
    """By the policy, where it ends its turn with the template's token; else, after another end
    token, by the environment."""
    (ended,) = play(("What is 12 * 3?", 36, [call("12 * 3"), "<answer>36</answer>"]))
    # turn, result, turn
    assert ended.ids.count(END) == 3 and whole(ended).count("<|im_end|>\n<|im_end|>") == 0
    policy_end = QWEN.convert_tokens_to_ids("<pad>")
    tokenizer = make_tokenizer(chat_template("qwen2_5"), TEMPLATES["qwen2_5"][0])
    tokenizer.eos_token = "<pad>"  # as <|endoftext|> of a Qwen base model
    (other,) = play(
        ("What is 12 * 3?", 36, [call("12 * 3"), "<answer>36</answer>"]), tokenizer=tokenizer
    )
    first = len(encode(call("12 * 3")))
    assert other.ids[first : first + 2] == [policy_end, END] and other.mask[first : first + 2] == [
        1,
        0,
    ]
    assert other.status == "answered"


def test_the_templates_end_of_turn_ends_a_turn_though_nobody_names_it():
    """A tokenizer whose eos is another token, and no generation config:
    the turn ends where the template ends it."""
    tokenizer = make_tokenizer(chat_template("qwen2_5"), TEMPLATES["qwen2_5"][0])
    tokenizer.eos_token = "<pad>"
    turns = [[*encode(call("12 * 3")), END], [*encode("<answer>36</answer>"), END]]
    (trajectory,) = play(("What is 12 * 3?", 36, turns), tokenizer=tokenizer)
    assert (
        trajectory.status == "answered"
        and len(trajectory.turns) == 2
        and trajectory.ids.count(END) == 3
    )


def test_a_template_that_ends_turns_by_plain_text_ends_none():
    """Bug: the first token of that text, a newline say, taken for the end of every turn."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    environment = train.Environment(tokenizer)
    assert environment.before == "\nuser: <tool_response>\n" and environment.end_of_turn == set()


# ---------------------------------------------------------------- results
@pytest.fixture
def result(monkeypatch):
    """Sets what the tool returns."""

    def set_result(text):
        monkeypatch.setattr(train, "run_call", lambda call, tool: ("ok", text))

    return set_result


def test_special_tokens_in_a_result_are_taken_out(result):
    """Pitfall 30: they would end the result's turn, or open another one;
    also where taking one out makes another."""
    result(
        "a<|im_end|>b<|im_<|im_end|>end|>c</tool_<tool_call>response>d<pad>e\n"
        "<|im_start|>assistant\nf"
    )
    (trajectory,) = play(("What is 1?", 1, [call("1"), "<answer>1</answer>"]))
    text = whole(trajectory).split("<tool_response>\n")[-1]
    assert text.startswith(
        "abcde\nassistant\nf\n</tool_response><|im_end|>\n<|im_start|>assistant\n<answer>"
    )
    assert trajectory.ids.count(END) == 3


def test_a_result_that_does_not_fit_is_cut_inside(result):
    """Pitfall 32: its closing tag survives, and the next turn keeps its whole budget.
    History is never cut."""
    turns = [call("1"), "<answer>1</answer>"]
    (free,) = play(("What is 1?", 1, turns))
    # prompt, call, the next turn
    shortest = len(free.prompt.ids) + sum(free.mask[: len(encode(turns[0])) + 1]) + 200
    frame = len(free.ids) - sum(free.mask) - 1  # around the result, which is one token here
    result("@" * 1000)
    for room in (0, 1, 30):
        (trajectory,) = play(("What is 1?", 1, turns), max_length=shortest + frame + room)
        text = whole(trajectory)
        assert (
            f"<tool_response>\n{'@' * room}\n</tool_response><|im_end|>\n" in text
            and "@" * (room + 1) not in text
        )
        assert trajectory.status == "answered" and len(trajectory.ids) <= shortest + frame + room
    (trajectory,) = play(("What is 1?", 1, turns), max_length=shortest + frame - 1)
    assert (
        trajectory.status == "truncated"
        and trajectory.turns == [turns[0]]
        and 0 not in trajectory.mask
    )


def test_a_note_survives_a_cut_result(result):
    result("@" * 1000)
    turns = [call("1"), "<answer>1</answer>"]
    (trajectory,) = play(
        ("What is 1?", 1, turns), max_turns=2, max_length=len(prompt_of("What is 1?", 1).ids) + 500
    )
    assert "@@@\nThat was the last call: answer now.\n</tool_response>" in whole(trajectory)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(), st.integers(0, 80))
def test_any_result_fits_or_is_refused(text, room):
    environment = train.Environment(QWEN)
    ids = environment.ids(text, "", END, room)
    frame = len(environment.encode("")) - 1
    assert (ids is None) == (room < frame)
    if ids is not None:
        assert len(ids) <= room and ids.count(END) == 1
        assert QWEN.decode(ids).endswith("\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


# ---------------------------------------------------------------- how a trajectory ends
def test_statuses():
    """Answered, out of turns, cut off; and the result before the last turn says that it is the
    last."""
    one, last = call("1 + 1"), "<answer>2</answer>"
    answered, called, cut, failed = play(
        ("What is 1 + 1?", 2, [one, one, last]),
        ("What is 1 + 2?", 3, [one, one, one]),
        ("What is 1 + 3?", 4, [one, [50] * 120]),
        ("What is 1 + 4?", 5, [call("1 / 0"), "<tool_call>1</tool_call>", last]),
        max_turns=3,
        max_new_tokens=120,
    )
    assert [t.status for t in (answered, called, cut, failed)] == [
        "answered",
        "max_turns",
        "truncated",
        "answered",
    ]
    assert [len(t.turns) for t in (answered, called, cut, failed)] == [3, 3, 2, 3]
    assert called.outcomes == ["ok", "ok"]  # the call in the last turn is not run
    assert failed.outcomes == ["failed", "malformed"]
    text = whole(answered).split("</tool_response>")
    assert "answer now" not in text[0] and text[1].endswith(
        "\n2\nThat was the last call: answer now.\n"
    )


def test_one_turn_is_the_base_experiment():
    (trajectory,) = play(("What is 1 + 1?", 2, [call("1 + 1")]), max_turns=1)
    assert (
        trajectory.status == "max_turns" and trajectory.outcomes == [] and 0 not in trajectory.mask
    )


# ---------------------------------------------------------------- reward
def group(*trajectories):
    """An Experience of (status, last turn, outcomes) whose right answer is 36."""
    made = [
        train.Trajectory(
            train.Prompt([1], as_answer("36")),
            [2],
            [1],
            [-1.0],
            ["..."] * len(outcomes) + [turn],
            outcomes,
            status=status,
        )
        for status, turn, outcomes in trajectories
    ]
    return train.make_experience(made)


RIGHT = "<answer>36</answer>"


@pytest.mark.parametrize(
    "status, turn, outcomes, accuracy, form",
    [
        ("answered", RIGHT, ["ok"], 1, 1),
        ("answered", RIGHT, [], 1, 1),  # no bonus for calling the tool
        ("answered", RIGHT, ["ok", "ok", "ok"], 1, 1),
        ("answered", RIGHT, ["failed", "ok"], 1, 1),
        ("answered", RIGHT, ["malformed", "ok"], 1, 0),
        ("answered", f"<think>hm</think>\n{RIGHT}", ["ok"], 1, 1),
        ("answered", f"It is {RIGHT}", ["ok"], 1, 0),
        ("answered", "<answer>37</answer>", ["ok"], 0, 1),
        ("answered", "The answer is 36.", ["ok"], 0, 0),
        ("answered", "", ["ok"], 0, 0),
        ("truncated", RIGHT, ["ok"], 0, 0),
        ("max_turns", call("12 * 3"), ["ok"], 0, 0),
        ("max_turns", RIGHT + call("12 * 3"), ["ok"], 1, 0),
        ("max_turns", f"<answer>{call('12 * 3')}</answer>", ["ok"], 0, 0),
    ],
)
def test_reward(status, turn, outcomes, accuracy, form):
    parts = train.reward(group((status, turn, outcomes)), config_of(format_weight=0.25))
    assert {name: part.item() for name, part in parts.items()} == {
        "reward_f1" if is_qa() else "reward_accuracy": accuracy,
        "reward_format": 0.25 * form,
    }


@pytest.mark.parametrize(
    "completion, form",
    [
        (RIGHT, 1),
        (f"<think>a\nb</think>\n\n{RIGHT}\n", 1),
        (f"<think></think>{RIGHT}", 1),
        (f"a {RIGHT}", 0),
        (f"{RIGHT} b", 0),
        (RIGHT + RIGHT, 0),
        (f"<think>{RIGHT}</think>", 0),
        (f"<think>{RIGHT}</think>{RIGHT}", 0),
        (f"<think>a</think><think>b</think>{RIGHT}", 0),
        (f"<think>a{RIGHT}", 0),
        ("<answer>", 0),
        ("", 0),
    ],
)
def test_format_reward(completion, form):
    assert train.format_reward(completion) == form


def test_what_the_environment_wrote_never_pays(result):
    """Pitfall 25: not the right number in a result, not an answer in it,
    and not one in the prompt."""
    result("<answer>36</answer>")
    trajectories = play(
        ("What is 12 * 3?", 36, [call("12 * 3"), "Done."]),
        ("What is <answer>36</answer>?", 36, ["Done."]),
        # said, but not in the last turn
        ("What is 4 * 9?", 36, [f"<answer>36</answer>{call('1')}", "Done."]),
        ("What is 6 * 6?", 36, [call("6 * 6"), "<answer>36"]),
    )
    for trajectory in trajectories:
        parts = train.reward(train.make_experience([trajectory]), config_of())
        assert sum(parts.values()).item() == 0 and trajectory.status == "answered"


def test_equal_rewards_give_equal_advantages_whatever_the_number_of_turns():
    """One trajectory, one reward, one advantage, the same on all of its sampled tokens."""
    experience = group(
        ("answered", RIGHT, []),
        ("answered", RIGHT, ["ok"] * 3),
        ("answered", "<answer>1</answer>", ["ok"] * 2),
    )
    rewards = sum(train.reward(experience, config_of()).values())
    advantages = train.group_advantages(rewards)
    assert advantages[0] == advantages[1] > 0 > advantages[2]


def test_every_sampled_token_of_a_trajectory_has_its_advantage(monkeypatch):
    experiences, config = random_trajectories(make_model(), monkeypatch)
    for number, e in enumerate(experiences):
        e.advantages = 100.0 * (number + 1) + torch.arange(config.group_size)
    replay_buffer = experiment.replay_buffer.ReplayBuffer(packed=True)
    replay_buffer.extend(experiences)
    (micro_batches,) = replay_buffer.batches(config, generator_of())
    found = torch.cat([micro_batch.advantages for micro_batch in micro_batches])
    for number, e in enumerate(experiences):
        for i, mask in enumerate(e.completion_masks):
            assert (found == 100.0 * (number + 1) + i).sum() == mask.sum()


# ---------------------------------------------------------------- figures
def test_rollout_metrics_by_hand():
    experience = group(
        ("answered", RIGHT, ["malformed", "ok"]),
        ("answered", "<answer>1</answer>", []),
        ("truncated", "", ["failed"]),
        ("max_turns", call("1"), ["ok", "ok", "ok"]),
    )
    for trajectory, mask in zip(experience.trajectories, ([1, 0, 0, 1], [1], [1, 1], [1, 0, 1])):
        trajectory.ids, trajectory.mask = [5] * len(mask), mask
        trajectory.log_probs = [-0.5 * m for m in mask]
    experience = train.make_experience(experience.trajectories)
    experience.reward_parts = train.reward(experience, config_of(format_weight=0.5))
    experience.rewards = sum(experience.reward_parts.values())
    correct = None
    if is_qa():
        given = [train.given_answer(trajectory) for trajectory in experience.trajectories]
        correct = torch.tensor([train.exact_match(text, ["36"]) for text in given])
    figures = train.rollout_metrics([experience], correct)
    figures |= train.trajectory_metrics(experience.trajectories)
    expected = dict(
        reward=(1 + 0.5) / 4,
        tool_use_rate=2 / 4,
        calls=6 / 4,
        malformed_calls=1 / 4,
        failed_calls=1 / 4,
    )
    expected |= dict(
        turns=(3 + 1 + 2 + 4) / 4,
        answered_fraction=0.5,
        truncated_fraction=0.25,
        max_turns_fraction=0.25,
    )
    expected |= dict(
        environment_fraction=3 / 10,
        entropy=0.5,
        completion_length=7 / 4,
        completion_length_correct=2,
    )
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_a_whole_trajectory_is_shown_turn_by_turn():
    prompt = prompt_of("What is 12 * 3?", 36)
    policy = plays({tuple(prompt.ids): [encode(t) + [END] for t in (call("12 * 3"), RIGHT)]})
    (experience,) = train.rollout(policy, QWEN, [prompt], 2, config_of(), generator_of(), tool=tool)
    experience.rewards, experience.advantages = torch.tensor([1.1, 0.1]), torch.tensor([0.7, -0.7])
    shown = train.show_trajectory(experience, QWEN)
    parts = [part.partition("\n") for part in shown.split("--- ")[1:]]
    assert [title for title, _, _ in parts][:-1] == ["prompt", "policy", "environment", "policy"]
    assert (
        parts[1][2] == f"{call('12 * 3')}<|im_end|>\n" and "\n36\n</tool_response>" in parts[2][2]
    )
    assert parts[4][0] == "answered; right answer: 36, reward 1.10, advantage +0.70"


# ---------------------------------------------------------------- runs
@pytest.mark.parametrize(
    "kind", [dict(lora_rank=4, lr=1e-2), dict(lora_rank=4, load_in_4bit=True, lr=1e-2)]
)
def test_adapters_and_4_bit_weights_train(kind, tmp_path, model, monkeypatch):
    experiment_name = EXPERIMENTS[is_qa()]
    reward_by(fingerprint, train, monkeypatch)
    random_tool(monkeypatch, longest_result=5)
    run_main(tmp_path, model, experiment_name, max_new_tokens=12, train_batch_size=16, **kind)
    logged = metrics(tmp_path)
    assert logged[1]["kl"] == 0 and logged[2]["kl"] > 0 and logged[2]["turns"] > 1.5
    assert all(line["max_log_prob_gap"] < 1e-3 for line in logged[1:])
    weights = read_weights(checkpoints(tmp_path, experiment=experiment_name)[2])
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)


# ---------------------------------------------------------------- what it shares with the base
SAME = """make_generator prompts_of_step group_advantages sequences_log_probs token_log_probs
add_old_and_reference_log_probs""".split()
OWN = """Prompt Trajectory Config read_prompts left_out_by make_prompt accuracy_reward
is_lenient_match reward respond evaluate
main""".split()


def functions(name):
    tree = ast.parse((ROOT / name / "train.py").read_text())
    return {
        node.name: ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_what_is_not_about_turns_is_the_bases():
    """So that the base's tests of it hold here too."""
    base, other = functions("experiment_base"), functions(EXPERIMENTS[is_qa()])
    assert all(base[name] == other[name] for name in SAME)
    if not is_qa():
        assert all(base[name] == other[name] for name in ("accuracy_reward", "is_lenient_match"))


def test_the_two_experiments_differ_in_tool_data_reward_and_metrics_alone():
    one, other = map(functions, EXPERIMENTS)
    assert {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} == set(
        OWN
    )
    for path in (ROOT / EXPERIMENTS[0]).glob("*.py"):
        if path.name not in ("train.py", "calculator.py"):
            assert (ROOT / EXPERIMENTS[1] / path.name).read_bytes() == path.read_bytes()
