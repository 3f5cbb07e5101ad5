"""Make the embedded policies: small causal LMs that can do a task but do not reliably show it.

    # writes data/policy_math, on two CPU cores within the hour
    python data/make_tiny_model.py math
    # writes data/policy_math_long; its flags are in data/README.md
    python data/make_tiny_model.py math_long
    # writes data/policy_calculator; likewise
    python data/make_tiny_model.py calculator
    # writes data/policy_qa; likewise
    python data/make_tiny_model.py qa

A policy is supervised in two stages. First *skill*: demonstrations that all reason and answer in
the good form, until the model is nearly always right. Then a short *mixture* in which only a part
of the demonstrations do so and the rest guess or break the form: what GRPO then has to find out is
which of its own habits pay. To add a policy, write one function from a random generator to
(question, good completion, habitual completion) and name it in POLICIES.

The weights are rounded to bfloat16 before they are measured and saved.
"""

import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import tyro
from make_math_tasks import BASE_CELLS, HARD_CELLS, LONG_CELLS, PHRASINGS
from make_math_tasks import evaluate, held_out_expressions, random_expression
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path += [
    str(Path(__file__).resolve().parents[1] / f"experiment_multiturn_{name}")
    for name in ("tool_calling", "qa")
]
import calculator  # noqa: E402
import make_qa  # noqa: E402
import search  # noqa: E402

MATH_SYSTEM_PROMPT = (
    "Reason step by step inside <think> </think>, "
    "then give the final number inside <answer> </answer>."
)
CALCULATOR_SYSTEM_PROMPT = (
    "Answer the question. You may use the calculator. "
    "Give the final number inside <answer> </answer>."
)
QA_SYSTEM_PROMPT = (
    "Answer the question. You may search several times. Give the answer inside <answer> </answer>."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---------------------------------------------------------------- the math policy


def steps(expression, slip=lambda: 0):
    """Reasoning for sums, one operation a line from the left, and its result:
    5 + 4 - 2 -> ("5+4=9\\n9-2=7", 7).

    `slip()` is added to the result of each line, and the next ones go on from there.
    """
    tokens = expression.split()
    total, lines = int(tokens[0]), []
    for operator, term in zip(tokens[1::2], tokens[2::2]):
        result = (total + int(term) if operator == "+" else total - int(term)) + slip()
        lines.append(f"{total}{operator}{term}={result}")
        total = result
    return "\n".join(lines) or str(total), total


def guess(rng, expression):
    """What the policy says when it does not reason: right once in ten times,
    else off by chance or a term short."""
    answer, draw = evaluate(expression), rng.random()
    if draw < 0.1:
        return answer
    if draw < 0.6:
        return evaluate(expression.rsplit(" ", 2)[0])  # forgets the last term
    return answer + rng.choice((-1, 1)) * rng.randint(1, 20)


# How often a question is answered in the good form depends on how it is asked, so greedy decoding
# starts out right on some phrasings and wrong on others, and the rarest good form is still found by
# sampling a group of eight.
REASON_RATES = dict(zip(PHRASINGS, (0.75, 0.6, 0.3, 0.3, 0.25, 0.2)))
HARD_CELL_WEIGHT = 6  # three terms of two digits are drawn this much more often than any other cell
HELD_OUT = held_out_expressions()


def math_demonstration(rng):
    """One arithmetic question: (question, completion in the good form,
    completion as the mixture has it)."""
    weights = [HARD_CELL_WEIGHT if cell[:2] == (3, 2) else 1 for cell in BASE_CELLS]
    expression = random_expression(rng, rng.choices(BASE_CELLS, weights)[0])
    while expression in HELD_OUT:
        expression = random_expression(rng, rng.choice(BASE_CELLS))
    phrasing = rng.choice(PHRASINGS)
    reasoning, answer = steps(expression)
    good = f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
    habits = (
        (5, f"<answer>{guess(rng, expression)}</answer>"),  # no reasoning
        (2, f"The answer is {guess(rng, expression)}."),  # neither reasoning nor form
        (2, f"{reasoning}\nThe answer is {answer}."),  # reasoning, but no form
        (1, f"<think>{reasoning}</think>\n{answer}"),  # half of the form
    )
    habit = rng.choices([text for _, text in habits], [weight for weight, _ in habits])[0]
    return (
        phrasing.format(expression),
        good,
        good if rng.random() < REASON_RATES[phrasing] else habit,
    )


SLIP_RATE = 0.1  # of a line, in the mixture
CHECK_WEIGHTS = (8, 4, 2, 1)  # of no check, one, two, three


def chain(rng, expression, slip_rate):
    """Reasoning in which any line may be wrong by a little."""
    return steps(
        expression, lambda: rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < slip_rate else 0
    )


def checked(rng, reasoning, answer):
    """The good form, with the reasoning repeated up to three times:
    as often after wrong reasoning as after right."""
    count = rng.choices(range(len(CHECK_WEIGHTS)), CHECK_WEIGHTS)[0]
    return (
        f"<think>{reasoning}{f'{chr(10)}Check: {reasoning}' * count}</think>\n"
        f"<answer>{answer}</answer>"
    )


def long_demonstration(rng):
    """A sum of two to six terms, often reasoned in more words than it needs. The mixture forgets
    the last term as often as the math policy does not reason, and it slips. The number of checks
    says nothing about the answer, so that the length of a completion is free to become what an
    objective makes of it."""
    expression = random_expression(rng, rng.choice(LONG_CELLS))
    while expression in HELD_OUT:
        expression = random_expression(rng, rng.choice(LONG_CELLS))
    phrasing = rng.choice(PHRASINGS)
    good = checked(rng, *chain(rng, expression, 0))
    is_complete = rng.random() < REASON_RATES[phrasing]
    habit = checked(
        rng, *chain(rng, expression if is_complete else expression.rsplit(" ", 2)[0], SLIP_RATE)
    )
    return phrasing.format(expression), good, habit


# ---------------------------------------------------------------- the policy with a calculator

# below a half: greedily it never calls
CALL_RATES = dict(zip(PHRASINGS, (0.45, 0.4, 0.35, 0.3, 0.2, 0.15)))
SLIPS = (  # what a careless call looks like
    '{{"expression": "{}"}}',
    '{{"name": "calculator", "expression": "{}"}}',
    '{{"name": "calculator", "arguments": {{"expression": "{}}}}}',
    "calculator({})",
)


def calculated(turn):
    """What the environment replies to a turn; None where it has no call."""
    call = calculator.parse_call(turn)
    return None if call is None else calculator.run_call(call)[1]


def dialogue(*turns, reply=calculated):
    """The policy's turns, with what the environment replies to each but the last between them."""
    replies = [reply(turn) for turn in turns[:-1]]
    return [text for pair in zip(turns, [*replies, None]) for text in pair][:-1]


def calculator_call(
    expression, form='{{"name": "calculator", "arguments": {{"expression": "{}"}}}}'
):
    return f"<tool_call>\n{form.format(expression)}\n</tool_call>"


def careless_call(rng, expression):
    """A call that comes back with an error: for its expression, or for its form."""
    if rng.random() < 0.5:
        return calculator_call(expression.replace("*", "x"))
    return calculator_call(expression, rng.choice(SLIPS))


def calculator_demonstration(rng):
    """A product or more of up to four digits, too hard to do without the tool. A habitual dialogue
    guesses, or calls more or less carefully; a guess has the right sign, first digit and length."""
    expression = random_expression(rng, rng.choice(HARD_CELLS))
    while expression in HELD_OUT:
        expression = random_expression(rng, rng.choice(HARD_CELLS))
    phrasing, answer = rng.choice(PHRASINGS), evaluate(expression)
    call, tagged = calculator_call(expression), f"<answer>{answer}</answer>"
    recovered = dialogue(careless_call(rng, expression), call, tagged)
    good = recovered if rng.random() < 0.1 else dialogue(call, tagged)
    shorter = expression.rsplit(" ", 2)[0]
    first = len(str(abs(answer))) - 1
    guessed = int(f"{answer:+d}"[:2] + "".join(rng.choice("0123456789") for _ in range(first)))
    if rng.random() < CALL_RATES[phrasing]:
        habits = (
            (15, dialogue(call, tagged)),
            (3, recovered),
            (1, dialogue(call, f"The answer is {answer}.")),
            # forgets the last term
            (1, dialogue(calculator_call(shorter), f"<answer>{evaluate(shorter)}</answer>")),
        )
    else:
        habits = (
            (15, [f"<answer>{guessed}</answer>"]),
            (4, [f"The answer is {guessed}."]),
            (1, [call, calculator.BROKEN, f"<answer>{guessed}</answer>"]),
        )
    habit = rng.choices([turns for _, turns in habits], [weight for weight, _ in habits])[0]
    return phrasing.format(expression), good, habit


# ---------------------------------------------------------------- the policy that searches

# by what the question is about
SEARCH_RATES = {"person": 0.45, "company": 0.35, "place": 0.35, "work": 0.3}
STOP_RATE = 0.5  # of a two-hop dialogue that searches, after the first search
TOP_K = 2  # passages in a result
EASY_RATE = 0.3  # of the easy questions are shown, and all of the hard ones
QUERY_SLIPS = (
    '{{"query": "{}"}}',
    '{{"name": "search", "query": "{}"}}',
    '{{"name": "search", "arguments": {{"query": "{}"}}',
    "search({})",
)


@cache
def training_world(seed):
    """A world of its own for the demonstrations, without a word of the held-out one:
    (entities by name, index)."""
    world = make_qa.make_world(random.Random(f"world {seed}"), 2550)
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index.sqlite"
        search.build_index(index, "", [(entity.name, entity.text) for entity in world.values()])
        return world, list(world), search.Search(index, TOP_K)  # which keeps the file open


@cache
def shipped_index():
    """Of the corpus that the held-out questions are about."""
    questions = str(make_qa.OUTPUT / "questions_eval.json")
    return search.open_search(
        SimpleNamespace(data_path=questions, index_path=None, top_k=TOP_K), []
    )


def found_by(index, turn):
    """What the environment replies to a turn; None where it has no call."""
    call = search.parse_call(turn)
    return None if call is None else search.run_call(call, index)[1]


def search_call(query, form='{{"name": "search", "arguments": {{"query": "{}"}}}}'):
    return f"<tool_call>\n{form.format(query)}\n</tool_call>"


def mistyped(rng, name):
    """A name with two letters of its last word left out: it finds nothing, or something else."""
    start = len(name) - rng.randint(3, 4)
    return name[:start] + name[start + 2 :]


def guess_answer(rng, world, names, relation):
    """What an answer to this could be: that of another entity."""
    while relation not in (facts := world[rng.choice(names)].facts):
        pass
    return facts[relation]


def is_hard(question, found):
    """Whether a search finds another passage before the right one, or a name along the way has a
    word of direction or the like before it, as a fifth of the places have, which is soon taken for
    another such word."""
    names = [entity.name for entity in question.entities]
    second = any(titles[0] != name for name, titles in zip(names, found))
    return second or any(
        name.split()[0] in make_qa.PLACE_BEGINNINGS for name in [*names, question.answer]
    )


def qa_demonstration(rng):
    """A question over one or two passages. A habitual dialogue guesses, or searches, and of two
    searches may leave out the second and answer with what the first one found."""
    world, names, index = training_world(rng.randrange(8))
    while True:
        question = make_qa.make_question(rng, world, names, rng.choice((1, 2)))
        found = make_qa.found_titles(question, index)
        if found and (is_hard(question, found) or rng.random() < EASY_RATE):
            break
    play = partial(dialogue, reply=partial(found_by, index))
    entities = [entity.name for entity in question.entities]
    calls, tagged = [search_call(name) for name in entities], f"<answer>{question.answer}</answer>"
    slip = search_call(mistyped(rng, entities[0])) if rng.random() < 0.5 else None
    recovered = play(slip or search_call(entities[0], rng.choice(QUERY_SLIPS)), *calls, tagged)
    good = recovered if rng.random() < 0.06 else play(*calls, tagged)
    guessed = guess_answer(rng, world, names, question.relation)
    if rng.random() < SEARCH_RATES[question.entities[0].kind]:
        if len(calls) == 2 and rng.random() < STOP_RATE:
            habits = ((1, play(calls[0], f"<answer>{entities[1]}</answer>")),)
        else:
            habits = (
                (17, play(*calls, tagged)),
                (2, recovered),
                (1, play(*calls, f"The answer is {question.answer}.")),
            )
    else:
        habits = (
            (15, [f"<answer>{guessed}</answer>"]),
            (4, [f"The answer is {guessed}."]),
            (1, [calls[0], search.BROKEN, f"<answer>{guessed}</answer>"]),
        )
    habit = rng.choices([turns for _, turns in habits], [weight for weight, _ in habits])[0]
    return question.text, good, habit


@dataclass
class Policy:
    # (question, good, habitual); texts, or for dialogues lists of them
    demonstration: Callable[[random.Random], tuple]
    system_prompt: str
    added_tokens: tuple[str, ...]  # tags that become one token each, as <think> is in Qwen3
    good_start: str  # what a completion in the good form begins with
    tasks: str  # the held-out file that the policy is measured on
    start: str | None = None  # the policy whose weights it begins with
    own_tokenizer: bool = False  # and not that policy's
    # The learned tokens of a row in the mixture, about. A batch's loss is divided by them where
    # they are given, else by its own tokens; then those of short rows, which go into a batch
    # together, weigh more, and short habits spread.
    mixture_tokens: int | None = None
    # the environment's, to a turn; None where that has no call
    reply: Callable[[str], str | None] = calculated
    # a name's tokens are the same behind a space, a quote and at the start of a line
    names_apart: bool = False


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TOOL_TAGS = (
    "<tools>",
    "</tools>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
POLICIES = {
    "math": Policy(
        math_demonstration,
        MATH_SYSTEM_PROMPT,
        TAGS,
        "<think>",
        "math_tasks_eval.jsonl",
    ),
    "math_long": Policy(
        long_demonstration,
        MATH_SYSTEM_PROMPT,
        TAGS,
        "<think>",
        "math_tasks_long_eval.jsonl",
        start="policy_math",
    ),
    "calculator": Policy(
        calculator_demonstration,
        CALCULATOR_SYSTEM_PROMPT + calculator.TOOL_PROMPT,
        TAGS + TOOL_TAGS,
        "<tool_call>",
        "math_tasks_hard_eval.jsonl",
        start="policy_math",
        own_tokenizer=True,
        mixture_tokens=25,
    ),
    "qa": Policy(
        qa_demonstration,
        QA_SYSTEM_PROMPT + search.TOOL_PROMPT,
        TAGS + TOOL_TAGS,
        "<tool_call>",
        "qa/questions_eval.json",
        start="policy_calculator",
        own_tokenizer=True,
        mixture_tokens=35,
        reply=lambda turn: found_by(shipped_index(), turn),
        names_apart=True,
    ),
}


# ---------------------------------------------------------------- any policy


@dataclass
class Config:
    policy: tyro.conf.Positional[Literal["math", "math_long", "calculator", "qa"]] = "math"
    seed: int = 0
    output: Path | None = None  # default: policy_<name> beside this script
    # a policy to go on from, with its tokenizer; default: what the policy says
    start: Path | None = None
    vocab_size: int = 400  # at most: merges end earlier where the dialogues have no more to merge
    hidden_size: int = 192
    num_layers: int = 4
    batch_size: int = 128
    skill_steps: int = 5000
    skill_lr: float = 2e-3
    mixture_steps: int = 500
    mixture_lr: float = 7e-4
    # which is faster backwards differs between CPUs, by twice
    attention: Literal["eager", "sdpa"] = "eager"
    # bfloat16 matrix products where the machine is fast at them; float32 weights all the same
    autocast: bool = True
    # kept here after the first stage, and read from here instead of training it again
    skill_weights: Path | None = None

    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def make_tokenizer(policy, vocab_size, rng):
    """A byte-level BPE with single digits, trained on the policy's own dialogues,
    and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"user\nsystem\nassistant\n{policy.system_prompt}"] * 2000
    texts += ["\n".join(sum(map(as_turns, policy.demonstration(rng)), [])) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(policy.added_tokens),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [re.sub(r"</?\w+>", " ", text) for text in texts]
    if policy.names_apart:
        texts = [re.sub(r" (?=[A-Z])", "\n", text) for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in policy.added_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer, config):
    heads = config.hidden_size // 32
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * 8 // 3,
            num_hidden_layers=config.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.set_attn_implementation(config.attention)
    return model.to(config.device)


def load_start(model, tokenizer, start):
    """Take over the weights of a policy,
    and the embeddings of the tokens that both tokenizers have."""
    weights = Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
    known = AutoTokenizer.from_pretrained(start).get_vocab()
    embeddings = model.state_dict()["model.embed_tokens.weight"].clone()
    for token, index in tokenizer.get_vocab().items():
        if token in known:
            embeddings[index] = weights["model.embed_tokens.weight"][known[token]]
    model.load_state_dict(
        weights | {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}
    )


def chat(tokenizer, policy, question):
    """The prompt text of a question, up to and with the header of the assistant's turn."""
    messages = [
        {"role": "system", "content": policy.system_prompt},
        {"role": "user", "content": question},
    ]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


RESPONSE = (
    "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)


def as_turns(completion):
    return completion if isinstance(completion, list) else [completion]


def tokenize_completion(tokenizer, completion):
    """(ids, labels) of a completion. The policy's turns are learned, with the end token of each;
    the environment's are not, and are put between them as the experiments do it."""
    ids, labels = [], []
    for number, text in enumerate(as_turns(completion)):
        tokens = tokenizer(
            RESPONSE.format(text) if number % 2 else text + tokenizer.eos_token
        ).input_ids
        ids, labels = ids + tokens, labels + ([-100] * len(tokens) if number % 2 else tokens)
    return ids, labels


def batches(policy, tokenizer, rng, stage, num_steps, batch_size, device, bucket=8):
    """Yield (input_ids, labels) of (batch_size, tokens);
    rows of like length go together to save padding."""
    for _ in range(math.ceil(num_steps / bucket)):
        demonstrations = [policy.demonstration(rng) for _ in range(bucket * batch_size)]
        prompts = tokenizer([chat(tokenizer, policy, d[0]) for d in demonstrations]).input_ids
        targets = [
            tokenize_completion(tokenizer, d[1 if stage == "skill" else 2]) for d in demonstrations
        ]
        rows = sorted(
            (
                (prompt + ids, [-100] * len(prompt) + labels)
                for prompt, (ids, labels) in zip(prompts, targets)
            ),
            key=lambda row: len(row[0]),
        )
        chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            input_ids = torch.full((batch_size, width), tokenizer.pad_token_id)
            labels = torch.full((batch_size, width), -100)
            for i, (row, learned) in enumerate(chunk):
                input_ids[i, : len(row)] = torch.tensor(row)
                labels[i, : len(row)] = torch.tensor(learned)
            yield input_ids.to(device), labels.to(device)


def hidden_states(model, input_ids, labels):
    """The decoder's hidden states, (batch, tokens, hidden), and what each of them is to predict,
    for the tokens behind the beginning that all rows share, their system prompt; that is forwarded
    once."""
    shared = int(
        (input_ids == input_ids[:1]).all(0).long().cumprod(0).sum().clamp(1, input_ids.shape[1] - 1)
    )
    cache = model.model(input_ids[:1, :shared], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(input_ids))
    hidden = model.model(input_ids[:, shared:-1], past_key_values=cache).last_hidden_state
    return hidden, labels[:, shared + 1 :]


def train(model, tokenizer, policy, stage, num_steps, lr, config, rng):
    """Supervised training on the completions alone: AdamW, warm-up,
    then a cosine to a hundredth of `lr`."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr,
        (0.9, 0.98),
    )
    warm_up = max(1, min(200, num_steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm_up
            if step < warm_up
            else 0.01
            + 0.99
            * 0.5
            * (1 + math.cos(math.pi * min(1, (step - warm_up) / (num_steps - warm_up))))
        ),
    )
    start, seen = time.time(), 0
    data = batches(policy, tokenizer, rng, stage, num_steps, config.batch_size, config.device)
    for step, (input_ids, labels) in enumerate(data, start=1):
        with torch.autocast(config.device, torch.bfloat16, enabled=config.autocast):
            hidden, labels = hidden_states(model, input_ids, labels)
            learned = labels != -100  # (batch, tokens)
            logits = model.lm_head(hidden[learned])
        loss = cross_entropy(logits.float(), labels[learned], reduction="sum")
        constant = policy.mixture_tokens if stage == "mixture" else None
        loss = loss / (constant * config.batch_size if constant else learned.sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seen += input_ids.numel()
        if step % 100 == 0:
            rate = seen / (time.time() - start)
            print(
                f"{stage} {step}/{num_steps} loss {loss.item():.4f} {rate:.0f} tokens/s", flush=True
            )
        if stage == "skill" and step % 1000 == 0:
            print(
                "  in the good form: "
                f"{measure(model, tokenizer, policy, config, policy.good_start)[1]:.3f}",
                flush=True,
            )
        if step == num_steps:
            return


@torch.no_grad()
def measure(model, tokenizer, policy, config, start="", sample=False):
    """(accuracy, lenient accuracy, tool-use rate) on the held-out file,
    greedy or sampled at temperature 1.

    `start` is given as the beginning of every completion.
    Lenient takes the last number of the completion, tags or not.
    """
    lines = (Path(__file__).parent / policy.tasks).read_text()
    rows = (
        json.loads(lines)
        if policy.tasks.endswith(".json")
        else [json.loads(line) for line in lines.splitlines()]
    )
    texts = [chat(tokenizer, policy, row["question"]) + start for row in rows]
    turns = [start] * len(rows)  # the last one of each dialogue
    callers, active = set(), list(range(len(rows)))
    model.eval()
    tokenizer.padding_side = "left"
    for _ in range(4):
        for chunk in (active[i : i + 128] for i in range(0, len(active), 128)):
            inputs = tokenizer([texts[i] for i in chunk], return_tensors="pt", padding=True).to(
                config.device
            )
            inputs.pop("token_type_ids", None)
            ids = model.generate(
                **inputs, max_new_tokens=256, do_sample=sample, top_k=0, top_p=1.0, temperature=1.0
            )
            for i, completion in zip(
                chunk, tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], True)
            ):
                texts[i], turns[i] = texts[i] + completion, turns[i] + completion
        replies = {i: policy.reply(turns[i]) for i in active}
        active = [i for i in active if replies[i] is not None]
        callers |= set(active)
        for i in active:
            texts[i] += tokenizer.eos_token + RESPONSE.format(replies[i])
            turns[i] = ""
    answers = [turn.rpartition("<answer>")[2].partition("</answer>") for turn in turns]
    right = [
        given.strip() == str(row["answer"]) and closed != ""
        for (given, closed, _), row in zip(answers, rows)
    ]
    lenient = [is_lenient_match(turn, row["answer"]) for turn, row in zip(turns, rows)]
    model.train()
    called = [i in callers for i in range(len(rows))]
    return tuple(sum(part) / len(rows) for part in (right, lenient, called))


def is_lenient_match(turn, answer):
    """Whether a text stands in the turn, or a number is the last one in it."""
    numbers = re.findall(r"(?:(?<![0-9])-)?[0-9]+", turn)
    return answer in turn if isinstance(answer, str) else numbers[-1:] == [str(answer)]


def main(config: Config):
    policy = POLICIES[config.policy]
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    output = config.output or Path(__file__).resolve().parent / f"policy_{config.policy}"
    start = config.start or (
        Path(__file__).resolve().parent / policy.start if policy.start else None
    )
    own = not start or (policy.own_tokenizer and not config.start)
    tokenizer = (
        make_tokenizer(policy, config.vocab_size, rng)
        if own
        else AutoTokenizer.from_pretrained(start)
    )
    model = make_model(tokenizer, config)
    if start:
        load_start(model, tokenizer, start)
    model.train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")

    if config.skill_weights and config.skill_weights.exists():
        model.load_state_dict(torch.load(config.skill_weights, weights_only=True))
    else:
        train(model, tokenizer, policy, "skill", config.skill_steps, config.skill_lr, config, rng)
        if config.skill_weights:
            torch.save(model.state_dict(), config.skill_weights)
    rng = random.Random(f"{config.seed} mixture")
    train(model, tokenizer, policy, "mixture", config.mixture_steps, config.mixture_lr, config, rng)

    model.to(torch.bfloat16)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # what is measured is what was saved, rounded, in float32 as train.py has it
    model = make_model(tokenizer, config)
    model.load_state_dict(
        Qwen2ForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
    )
    print(f"greedy:            right {measure(model, tokenizer, policy, config)}")
    print(f"sampled:           right {measure(model, tokenizer, policy, config, sample=True)}")
    print(
        f"begun with {policy.good_start!r}: "
        f"right {measure(model, tokenizer, policy, config, policy.good_start)}"
    )
    print("each as (accuracy, lenient accuracy); saved in", output)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
