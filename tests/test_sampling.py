"""Sampling: the distribution that the loss assumes, ids that survive,
ends that are trained on; and prompts."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, chat_template, load_experiment, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

experiment = load_experiment()
train = experiment.train
rollout = train.rollout
PAD, END, OTHER_END = 0, 2, 3


def config_of(**changes):
    return train.Config(
        **{"precision": "float32", "max_new_tokens": 12, "sample_rows": 256, **changes}
    )


def generator_of(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(policy, tokenizer, prompts, copies, config, generator=None):
    """(ids, log_probs) of `copies` completions for every prompt, ended as `rollout` ends them."""
    histories = [prompt for prompt in prompts for _ in range(copies)]
    eos_ids = experiment.model.find_eos_ids(policy, tokenizer)
    return experiment.sampling.sample(policy, histories, eos_ids, config, generator)


def make_tokenizer(template=None, special=("<pad>", "<start>", "<end>", "<end2>"), bos=None):
    """Bytes and the merges 4 2 and 4 2 0, so that "42" has two splits. Tokenising with special
    tokens puts `bos` in front, as Llama's and Gemma's tokenizers do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters, "42", "420"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("4", "2"), ("42", "0")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=special[2],
        pad_token=special[0],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


TOKENIZER = make_tokenizer()
# of different lengths
PROMPTS = [[11, 12, 13, 14, 15], [20, 21], [30, END, 31, PAD, 32, 33, END, 34, 35]]


class ScriptedPolicy:
    """Stands in for a model: `next_logits` of (ids of a row so far) -> (vocabulary,). Its cache is
    the ids themselves, so a row that is mixed up, or forwarded twice, shows in what comes next."""

    device = torch.device("cpu")

    def __init__(self, next_logits):
        self.next_logits, self.rows_seen = next_logits, []
        self.generation_config = SimpleNamespace(eos_token_id=None)

    def eval(self):
        return self

    def __call__(self, input_ids, attention_mask, position_ids, past_key_values=None, **_):
        if past_key_values is None:
            self.rows_seen.append(0)
            past_key_values = ScriptedCache([[] for _ in input_ids])
        rows = past_key_values.rows
        self.rows_seen[-1] = max(self.rows_seen[-1], len(rows))
        for row, ids, positions, mask in zip(rows, input_ids, position_ids, attention_mask):
            new = [i for i, m in zip(ids.tolist(), mask[-len(ids) :].tolist()) if m]
            assert positions.tolist()[-len(new) :] == list(range(len(row), len(row) + len(new)))
            row += new
            assert mask.sum().item() == len(row)
        logits = torch.stack([self.next_logits(row) for row in rows])[:, None]
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)


class ScriptedCache:
    def __init__(self, rows):
        self.rows = rows

    def reorder_cache(self, order):
        self.rows = [list(self.rows[i]) for i in order.tolist()]


def only(token, size=300):
    return torch.full((size,), -1e9).index_fill(0, torch.tensor(token), 0.0)


def says(*texts_ids, prompts=PROMPTS):
    """A policy that answers prompt i with the i-th ids."""

    def next_logits(row):
        prompt, answer = max(
            ((p, a) for p, a in zip(prompts, texts_ids) if row[: len(p)] == p),
            key=lambda x: len(x[0]),
        )
        return only(answer[len(row) - len(prompt)])

    return ScriptedPolicy(next_logits)


def as_prompts(prompts=PROMPTS):
    return [train.Prompt(ids, "42") for ids in prompts]


def many_ends(model):
    """About one id in ten ends a completion, so that rows end at different times."""
    model.generation_config.eos_token_id = [END, *range(10, 400, 10)]
    return model


# ---------------------------------------------------------------- the distribution
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_log_probs_are_those_of_a_plain_forward(architecture, temperature):
    """Pitfalls 2, 4, 5, 16: left padding, a repeated cache, leaving rows,
    end tokens in a prompt change nothing."""
    model, config = many_ends(make_model(architecture)), config_of(temperature=temperature)
    prompts = [*PROMPTS, list(range(40, 65))]  # the last is longer than the short window
    ids, log_probs = sample(model, TOKENIZER, prompts, 4, config, generator_of())
    assert len(ids) == len(log_probs) == 16 and len({len(row) for row in ids}) > 3
    for number, (row, found) in enumerate(zip(ids, log_probs)):
        prompt = prompts[number // 4]
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), row])[None]).logits[
                0, len(prompt) - 1 : -1
            ]
        expected = (logits / temperature).log_softmax(-1).gather(1, row[:, None])[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_log_probs_equal_the_recomputed_ones(attention, temperature):
    """Pitfalls 5 and 16: the whole way from `rollout` over packing to `sequences_log_probs`."""
    model = many_ends(make_model(attention=attention))
    config = config_of(
        temperature=temperature, group_size=4, rollouts_per_step=3, train_batch_size=12
    )
    experiences = rollout(model, TOKENIZER, as_prompts(), 4, config, generator_of())
    for experience in experiences:
        experience.advantages = torch.ones(4)
    replay_buffer = experiment.replay_buffer.ReplayBuffer(packed=True)
    replay_buffer.extend(experiences)
    ((micro_batch,),) = replay_buffer.batches(config, generator_of())
    recomputed = train.sequences_log_probs(model, micro_batch, config)
    torch.testing.assert_close(
        recomputed.detach(), micro_batch.sampled_log_probs, atol=1e-4, rtol=0
    )


def test_every_rank_can_be_sampled():
    """Pitfall 4: an unset top_k becomes 50 in transformers.
    Here token i has rank i of a nearly flat distribution."""
    policy = ScriptedPolicy(lambda row: -1e-4 * torch.arange(300.0))
    ids, _ = sample(policy, TOKENIZER, PROMPTS, 20, config_of(), generator_of())
    ranks = torch.cat(ids)
    assert ranks.max() > 250 and 0.75 < (ranks > 50).float().mean() < 0.9  # 249 of 300


def test_sampling_follows_the_distribution_at_its_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1e9]).repeat_interleave(torch.tensor([1, 1, 1, 297]))
    policy = ScriptedPolicy(lambda row: logits)
    config = config_of(max_new_tokens=20, temperature=0.5)
    tokenizer = SimpleNamespace(eos_token_id=299)
    ids, log_probs = sample(policy, tokenizer, [[9]], 200, config, generator_of())
    found = torch.cat(ids).bincount(minlength=3)[:3] / 4000
    expected = (logits[:3] / 0.5).softmax(0)
    assert (found - expected).abs().max() < 0.02
    torch.testing.assert_close(
        torch.cat(log_probs), expected.log()[torch.cat(ids)], atol=1e-5, rtol=0
    )


def test_the_checkpoints_generation_config_changes_nothing():
    """Pitfall 4: hidden warpers make the sampled distribution another one than the loss assumes."""
    model, config = make_model(), config_of()
    plain = sample(model, TOKENIZER, PROMPTS, 4, config, generator_of())
    for name, value in dict(
        top_k=1, top_p=0.01, min_p=0.9, repetition_penalty=9.0, temperature=0.01
    ).items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample, model.generation_config.max_new_tokens = True, 3
    warped = sample(model, TOKENIZER, PROMPTS, 4, config, generator_of())
    assert all(a.equal(b) for rows in zip(plain, warped) for a, b in zip(*rows))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers_own(architecture):
    model, config = make_model(architecture), config_of(max_new_tokens=20)
    model.generation_config.eos_token_id = [END, *range(10, 400, 10)]
    ids, _ = sample(model, TOKENIZER, PROMPTS, 1, config)
    for prompt, row in zip(PROMPTS, ids):
        prompt = torch.tensor(prompt)[None]
        expected = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=20,
            pad_token_id=PAD,
        )
        assert row.tolist() == expected[0, prompt.shape[1] :].tolist()


def test_equal_seeds_give_equal_ids():
    """Pitfall 33: a resumed run must draw what the uninterrupted one would."""
    model, config = make_model(), config_of()
    torch.manual_seed(1)
    first, _ = sample(model, TOKENIZER, PROMPTS, 4, config, generator_of(7))
    torch.manual_seed(2)  # the global state plays no part
    again, _ = sample(model, TOKENIZER, PROMPTS, 4, config, generator_of(7))
    other, _ = sample(model, TOKENIZER, PROMPTS, 4, config, generator_of(8))
    assert all(a.equal(b) for a, b in zip(first, again)) and not all(
        a.equal(b) for a, b in zip(first, other)
    )
    assert len({tuple(row.tolist()) for row in first}) == 12  # the completions of a group differ


# ---------------------------------------------------------------- ends
def test_rows_that_end_leave_and_the_others_go_on():
    """Each row keeps its own ids through the reordering, whichever leaves first."""
    answers = [[50, END], [60, 61, 62, END], [70, 71, END]]
    ids, log_probs = sample(says(*answers), TOKENIZER, PROMPTS, 3, config_of(), generator_of())
    assert [row.tolist() for row in ids] == [answer for answer in answers for _ in range(3)]
    assert all(row.equal(torch.zeros(len(row))) for row in log_probs)  # each was certain


def test_the_end_token_is_trained_on_and_nothing_comes_after_it():
    """Pitfall 1: masked out where pad == eos, the end token is never learnt.
    Row [a, b, eos, eos] has mask 1 1 1 0."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    answers = [[50, 51, END, END], [60, END], [70] * 12]
    experiences = rollout(says(*answers), tokenizer, as_prompts(), 2, config_of(), generator_of())
    assert [e.completion_ids[0].tolist() for e in experiences] == [
        [50, 51, END],
        [60, END],
        [70] * 12,
    ]
    assert [e.completion_masks[1].tolist() for e in experiences] == [[1, 1, 1], [1, 1], [1] * 12]
    assert [e.truncated.tolist() for e in experiences] == [[0, 0], [0, 0], [1, 1]]
    assert [len(e.sampled_log_probs[0]) for e in experiences] == [3, 2, 12]


def test_an_end_token_as_the_last_of_the_budget_is_not_truncated():
    experiences = rollout(
        says([50, END], [60, 61], [END, 70]),
        TOKENIZER,
        as_prompts(),
        1,
        config_of(max_new_tokens=2),
    )
    assert [e.truncated.item() for e in experiences] == [0, 1, 0]
    assert [len(e.completion_ids[0]) for e in experiences] == [2, 2, 1]


@pytest.mark.parametrize(
    "of_generation_config, ends",
    [
        (None, {END}),
        (END, {END}),
        (OTHER_END, {END, OTHER_END}),
        ([OTHER_END, 77], {END, OTHER_END, 77}),
    ],
)
def test_every_end_token_ends(of_generation_config, ends):
    """Pitfall 3: a chat model often has more end tokens than its tokenizer knows;
    beyond them it babbles."""
    policy = says([50, OTHER_END, 51, 77, 52, END], [60, 77, END], [END])
    policy.generation_config.eos_token_id = of_generation_config
    experiences = rollout(policy, TOKENIZER, as_prompts(), 1, config_of())
    for experience, answer in zip(
        experiences, ([50, OTHER_END, 51, 77, 52, END], [60, 77, END], [END])
    ):
        through = min(answer.index(end) for end in ends if end in answer) + 1
        assert (
            experience.completion_ids[0].tolist() == answer[:through]
            and experience.truncated.item() == 0
        )


# ---------------------------------------------------------------- groups
def test_ids_survive_a_split_that_the_tokenizer_would_not_make():
    """Pitfall 6: decoding and encoding again trains on other tokens than were sampled."""
    four, two, both = TOKENIZER.convert_tokens_to_ids(["4", "2", "42"])
    assert TOKENIZER("42").input_ids == [both]
    answers = [[four, two, END], [both, END], [two, four, two, END]]
    experiences = rollout(says(*answers), TOKENIZER, as_prompts(), 2, config_of(), generator_of())
    assert [e.completion_ids[1].tolist() for e in experiences] == answers
    # without the end token
    assert [e.completions for e in experiences] == [["42"] * 2, ["42"] * 2, ["242"] * 2]


def test_a_broken_byte_sequence_is_decoded_without_an_error():
    experiences = rollout(
        says([200, END], [210, 220, END], [END]), TOKENIZER, as_prompts(), 1, config_of()
    )
    assert [type(e.completions[0]) for e in experiences] == [str] * 3 and experiences[
        2
    ].completions == [""]


def test_experiences_keep_prompt_and_answer():
    policy = says([50, END], [60, END], [70, END])
    prompts = [train.Prompt(ids, str(number)) for number, ids in enumerate(PROMPTS)]
    for number, experience in enumerate(
        rollout(policy, TOKENIZER, prompts, 2, config_of(), generator_of())
    ):
        assert experience.prompt_ids.tolist() == PROMPTS[number] and experience.answer == str(
            number
        )
        assert [row.tolist() for row in experience.completion_ids] == [[50 + 10 * number, END]] * 2


def test_the_same_prompt_twice_gives_two_groups():
    """Pitfall 12: groups keyed by the prompt's text merge duplicates."""
    experiences = rollout(
        make_model(), TOKENIZER, as_prompts([PROMPTS[0]] * 2), 3, config_of(), generator_of()
    )
    assert [len(e.completion_ids) for e in experiences] == [3, 3]
    assert not all(a.equal(b) for a, b in zip(*(e.completion_ids for e in experiences)))


@pytest.mark.parametrize(
    "sample_rows, at_once", [(2, [1] * 5), (5, [2, 2, 1]), (6, [3, 2]), (256, [5])]
)
def test_sample_rows_bounds_the_rows_and_leaves_no_prompt_out(sample_rows, at_once):
    """Both completions of a prompt agree, so there is one row a prompt."""
    prompts = [[10 + i] * (i + 1) for i in range(5)]
    policy = says(*([100 + i, END] for i in range(5)), prompts=prompts)
    experiences = rollout(
        policy,
        TOKENIZER,
        as_prompts(prompts),
        2,
        config_of(sample_rows=sample_rows),
        generator_of(),
    )
    assert [e.completion_ids[1].tolist() for e in experiences] == [[100 + i, END] for i in range(5)]
    assert policy.rows_seen == at_once


def test_completions_that_agree_are_forwarded_as_one(monkeypatch):
    model, rows_seen = many_ends(make_model()), []
    forward = model.forward

    def forward_and_count(input_ids, **arguments):
        rows_seen.append(len(input_ids))
        return forward(input_ids, **arguments)

    monkeypatch.setattr(model, "forward", forward_and_count)
    config = config_of(temperature=0.2, max_new_tokens=8)  # so cold that many agree for long
    experiences = rollout(model, TOKENIZER, as_prompts(), 16, config, generator_of())
    for t, count in enumerate(rows_seen[1:], start=1):
        prefixes = {
            (number, tuple(ids[:t].tolist()))
            for number, experience in enumerate(experiences)
            for ids in experience.completion_ids
            if len(ids) > t
        }
        assert count == len(prefixes)
    assert rows_seen[0] == 3 and max(rows_seen) < 48


def test_evaluation_is_greedy_and_does_not_depend_on_its_chunks():
    """`--max-steps 0` repeats the last logged figure, whatever else was sampled meanwhile."""
    model, prompts = many_ends(make_model()), as_prompts()
    figures = [
        train.evaluate(
            model, TOKENIZER, prompts, config_of(sample_rows=rows, temperature=temperature)
        )
        for rows, temperature in [(256, 1.0), (1, 1.0), (2, 0.3)]
    ]
    assert figures[0] == figures[1] == figures[2] and figures[0]["eval_count"] == 3
    right, wrong = TOKENIZER("<answer>42</answer>").input_ids, TOKENIZER("It is 42").input_ids
    policy = says([*right, END], [*wrong, END], [*TOKENIZER("<answer>41</answer>").input_ids, END])
    figures = train.evaluate(policy, TOKENIZER, prompts, config_of(max_new_tokens=64))
    assert figures == pytest.approx(
        {"eval_accuracy": 1 / 3, "eval_accuracy_lenient": 2 / 3, "eval_count": 3}
    )


def test_sampling_runs_without_dropout_and_without_gradients():
    """Pitfall 16: a policy left in training mode samples from another distribution than is
    recomputed."""
    model = make_model().train()
    (experience,) = rollout(
        model, TOKENIZER, as_prompts([PROMPTS[0]]), 2, config_of(), generator_of()
    )
    assert not model.training and not experience.sampled_log_probs[0].requires_grad


# ---------------------------------------------------------------- prompts
CHATML = ("<pad>", "<|im_start|>", "<|im_end|>")
# template: special tokens (the third ends a turn), the bos token, the assistant's header
TEMPLATES = {
    "qwen2_5": (CHATML, None, "<|im_start|>assistant\n"),
    "qwen3": (CHATML, None, "<|im_start|>assistant\n"),
    "llama3": (
        ("<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama3_2": (
        ("<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "phi3_5": (
        ("<pad>", "<|system|>", "<|end|>", "<|user|>", "<|assistant|>"),
        None,
        "<|assistant|>\n",
    ),
    "gemma3": (
        ("<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>"),
        "<bos>",
        "<start_of_turn>model\n",
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_of_real_chat_templates(template):
    """Pitfall 8: a rendered template that is tokenised with special tokens on begins with two
    BOS."""
    special, bos, header = TEMPLATES[template]
    tokenizer = make_tokenizer(chat_template(template), special, bos)
    if bos:
        assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id  # so the mistake would show
    config = train.Config(max_length=2000)
    prompt = train.make_prompt(
        "row 1", {"question": "What is 40 + 2?", "answer": 42}, config, tokenizer
    )
    text = tokenizer.decode(prompt.ids)
    assert text.endswith(header) and prompt.answer == "42"
    assert text.count("What is 40 + 2?") == 1 and text.count(config.system_prompt) == 1
    assert prompt.ids.count(tokenizer.bos_token_id) == (1 if bos else 0)
    assert not bos or prompt.ids[0] == tokenizer.bos_token_id
    header_ids = tokenizer(header, add_special_tokens=False).input_ids
    # one token, not its letters
    assert prompt.ids[-len(header_ids) :] == header_ids and header_ids[0] < len(special)


PROMPT_TOKENIZER = make_tokenizer(chat_template("qwen2_5"), CHATML)


@pytest.mark.parametrize(
    "answer, expected",
    [(42, "42"), ("  42 ", "42"), ("So 40 + 2 = 42.\n#### 42", "42"), ("#### 1,234", "1,234")],
)
def test_answers_of_a_row(answer, expected):
    row = {"question": "?", "answer": answer}
    assert (
        train.make_prompt("row 1", row, train.Config(max_length=2000), PROMPT_TOKENIZER).answer
        == expected
    )


def test_a_prompt_that_leaves_no_room_is_refused_with_its_place():
    """A cut prompt would lose the assistant's header,
    and a completion the room that max_new_tokens promises."""
    row = {"question": "What is 1 + 1?", "answer": 2}
    config = train.Config(max_length=2000, max_new_tokens=64)
    length = len(train.make_prompt("", row, config, PROMPT_TOKENIZER).ids)
    config.max_length = length + 64
    assert len(train.make_prompt("", row, config, PROMPT_TOKENIZER).ids) == length
    config.max_length -= 1
    with pytest.raises(SystemExit, match=f"tasks.jsonl, line 3: the prompt has {length} tokens"):
        train.make_prompt("tasks.jsonl, line 3", row, config, PROMPT_TOKENIZER)
