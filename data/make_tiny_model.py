"""Make the embedded policies: small causal LMs that can do a task but do not reliably show it.

    python data/make_tiny_model.py math              # writes data/policy_math, on two CPU cores within the hour
    python data/make_tiny_model.py math_long         # writes data/policy_math_long; its flags are in data/README.md

A policy is supervised in two stages. First *skill*: demonstrations that all reason and answer in the good form, until
the model is nearly always right. Then a short *mixture* in which only a part of the demonstrations do so and the rest
guess or break the form: what GRPO then has to find out is which of its own habits pay. To add a policy, write one
function from a random generator to (question, good completion, habitual completion) and name it in POLICIES.

The weights are rounded to bfloat16 before they are measured and saved.
"""

import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from make_math_tasks import BASE_CELLS, LONG_CELLS, PHRASINGS, evaluate, held_out_expressions, random_expression
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

MATH_SYSTEM_PROMPT = (
    "Reason step by step inside <think> </think>, then give the final number inside <answer> </answer>."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---------------------------------------------------------------- the math policy


def steps(expression, slip=lambda: 0):
    """Reasoning for sums, one operation a line from the left, and its result: 5 + 4 - 2 -> ("5+4=9\\n9-2=7", 7).

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
    """What the policy says when it does not reason: right once in ten times, else off by chance or a term short."""
    answer, draw = evaluate(expression), rng.random()
    if draw < 0.1:
        return answer
    if draw < 0.6:
        return evaluate(expression.rsplit(" ", 2)[0])  # forgets the last term
    return answer + rng.choice((-1, 1)) * rng.randint(1, 20)


# How often a question is answered in the good form depends on how it is asked, so greedy decoding starts out right
# on some phrasings and wrong on others, and the rarest good form is still found by sampling a group of eight.
REASON_RATES = dict(zip(PHRASINGS, (0.75, 0.6, 0.3, 0.3, 0.25, 0.2)))
HARD_CELL_WEIGHT = 6  # three terms of two digits are drawn this much more often than any other cell
HELD_OUT = held_out_expressions()


def math_demonstration(rng):
    """One arithmetic question: (question, completion in the good form, completion as the mixture has it)."""
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
    return phrasing.format(expression), good, good if rng.random() < REASON_RATES[phrasing] else habit


SLIP_RATE = 0.1  # of a line, in the mixture
CHECK_WEIGHTS = (8, 4, 2, 1)  # of no check, one, two, three


def chain(rng, expression, slip_rate):
    """Reasoning in which any line may be wrong by a little."""
    return steps(expression, lambda: rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < slip_rate else 0)


def checked(rng, reasoning, answer):
    """The good form, with the reasoning repeated up to three times: as often after wrong reasoning as after right."""
    count = rng.choices(range(len(CHECK_WEIGHTS)), CHECK_WEIGHTS)[0]
    return f"<think>{reasoning}{f'{chr(10)}Check: {reasoning}' * count}</think>\n<answer>{answer}</answer>"


def long_demonstration(rng):
    """A sum of two to six terms, often reasoned in more words than it needs. The mixture forgets the last term as often
    as the math policy does not reason, and it slips. The number of checks says nothing about the answer, so that the
    length of a completion is free to become what an objective makes of it."""
    expression = random_expression(rng, rng.choice(LONG_CELLS))
    while expression in HELD_OUT:
        expression = random_expression(rng, rng.choice(LONG_CELLS))
    phrasing = rng.choice(PHRASINGS)
    good = checked(rng, *chain(rng, expression, 0))
    is_complete = rng.random() < REASON_RATES[phrasing]
    habit = checked(rng, *chain(rng, expression if is_complete else expression.rsplit(" ", 2)[0], SLIP_RATE))
    return phrasing.format(expression), good, habit


@dataclass
class Policy:
    demonstration: Callable[[random.Random], tuple[str, str, str]]
    system_prompt: str
    added_tokens: tuple[str, ...]  # tags that become one token each, as <think> is in Qwen3
    good_start: str  # what a completion in the good form begins with
    tasks: str  # the held-out file that the policy is measured on
    start: str | None = None  # the policy whose weights and tokenizer it begins with


POLICIES = {
    "math": Policy(
        math_demonstration,
        MATH_SYSTEM_PROMPT,
        ("<think>", "</think>", "<answer>", "</answer>"),
        "<think>",
        "math_tasks_eval.jsonl",
    ),
    "math_long": Policy(
        long_demonstration,
        MATH_SYSTEM_PROMPT,
        ("<think>", "</think>", "<answer>", "</answer>"),
        "<think>",
        "math_tasks_long_eval.jsonl",
        start="policy_math",
    ),
}


# ---------------------------------------------------------------- any policy


@dataclass
class Config:
    policy: tyro.conf.Positional[Literal["math", "math_long"]] = "math"
    seed: int = 0
    output: Path | None = None  # default: policy_<name> beside this script
    vocab_size: int = 400  # at most: merges end earlier where the dialogues have no more to merge
    hidden_size: int = 192
    num_layers: int = 4
    batch_size: int = 128
    skill_steps: int = 5000
    skill_lr: float = 2e-3
    mixture_steps: int = 500
    mixture_lr: float = 7e-4
    attention: Literal["eager", "sdpa"] = "eager"  # which is faster backwards differs between CPUs, by twice
    autocast: bool = True  # bfloat16 matrix products where the machine is fast at them; float32 weights all the same
    skill_weights: Path | None = (
        None  # kept here after the first stage, and read from here instead of training it again
    )
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def make_tokenizer(policy, vocab_size, rng):
    """A byte-level BPE with single digits, trained on the policy's own dialogues, and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"user\nsystem\nassistant\n{policy.system_prompt}"] * 2000
    texts += ["\n".join(policy.demonstration(rng)) for _ in range(2000)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(policy.added_tokens),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([re.sub(r"</?\w+>", " ", text) for text in texts], trainer)
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


def chat(tokenizer, policy, question):
    """The prompt text of a question, up to and with the header of the assistant's turn."""
    messages = [{"role": "system", "content": policy.system_prompt}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def batches(policy, tokenizer, rng, stage, num_steps, batch_size, device, bucket=8):
    """Yield (input_ids, labels) of (batch_size, tokens); rows of like length go together to save padding."""
    for _ in range(math.ceil(num_steps / bucket)):
        demonstrations = [policy.demonstration(rng) for _ in range(bucket * batch_size)]
        prompts = tokenizer([chat(tokenizer, policy, d[0]) for d in demonstrations]).input_ids
        targets = [d[1 if stage == "skill" else 2] + tokenizer.eos_token for d in demonstrations]
        rows = sorted(zip(prompts, tokenizer(targets).input_ids), key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(prompt) + len(target) for prompt, target in chunk)
            input_ids = torch.full((batch_size, width), tokenizer.pad_token_id)
            labels = torch.full((batch_size, width), -100)
            for i, (prompt, target) in enumerate(chunk):
                input_ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
                labels[i, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
            yield input_ids.to(device), labels.to(device)


def train(model, tokenizer, policy, stage, num_steps, lr, config, rng):
    """Supervised training on the completions alone: AdamW, warm-up, then a cosine to a hundredth of `lr`."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr, (0.9, 0.98)
    )
    warm_up = max(1, min(200, num_steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm_up
            if step < warm_up
            else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1, (step - warm_up) / (num_steps - warm_up))))
        ),
    )
    start, seen = time.time(), 0
    data = batches(policy, tokenizer, rng, stage, num_steps, config.batch_size, config.device)
    for step, (input_ids, labels) in enumerate(data, start=1):
        with torch.autocast(config.device, torch.bfloat16, enabled=config.autocast):
            hidden = model.model(input_ids, use_cache=False).last_hidden_state
            learned = labels[:, 1:] != -100  # (batch, tokens - 1)
            logits = model.lm_head(hidden[:, :-1][learned])
        loss = cross_entropy(logits.float(), labels[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seen += input_ids.numel()
        if step % 100 == 0:
            rate = seen / (time.time() - start)
            print(f"{stage} {step}/{num_steps} loss {loss.item():.4f} {rate:.0f} tokens/s", flush=True)
        if stage == "skill" and step % 1000 == 0:
            print(
                f"  in the good form: {measure(model, tokenizer, policy, config, policy.good_start)[1]:.3f}", flush=True
            )
        if step == num_steps:
            return


@torch.no_grad()
def measure(model, tokenizer, policy, config, start="", sample=False):
    """(accuracy, lenient accuracy) on the held-out file, greedy or sampled at temperature 1.

    `start` is given as the beginning of every completion. Lenient takes the last number of the completion, tags or not.
    """
    rows = [json.loads(line) for line in (Path(__file__).parent / policy.tasks).read_text().splitlines()]
    right = lenient = 0
    model.eval()
    tokenizer.padding_side = "left"
    for i in range(0, len(rows), 128):
        chunk = rows[i : i + 128]
        prompts = [chat(tokenizer, policy, row["question"]) + start for row in chunk]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(config.device)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=256, do_sample=sample, top_k=0, top_p=1.0, temperature=1.0)
        for row, completion in zip(chunk, tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], True)):
            answers = re.findall(r"<answer>(-?[0-9]+)</answer>", start + completion)
            numbers = re.findall(r"(?:(?<![0-9])-)?[0-9]+", completion)
            right += bool(answers) and int(answers[-1]) == row["answer"]
            lenient += bool(numbers) and int(numbers[-1]) == row["answer"]
    model.train()
    return right / len(rows), lenient / len(rows)


def main(config: Config):
    policy = POLICIES[config.policy]
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    output = config.output or Path(__file__).resolve().parent / f"policy_{config.policy}"
    start = Path(__file__).resolve().parent / policy.start if policy.start else None
    tokenizer = AutoTokenizer.from_pretrained(start) if start else make_tokenizer(policy, config.vocab_size, rng)
    model = make_model(tokenizer, config)
    if start:
        model.load_state_dict(Qwen2ForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
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
    model = make_model(tokenizer, config)  # what is measured is what was saved, rounded, in float32 as train.py has it
    model.load_state_dict(Qwen2ForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict())
    print(f"greedy:            right {measure(model, tokenizer, policy, config)}")
    print(f"sampled:           right {measure(model, tokenizer, policy, config, sample=True)}")
    print(f"begun with {policy.good_start!r}: right {measure(model, tokenizer, policy, config, policy.good_start)}")
    print("each as (accuracy, lenient accuracy); saved in", output)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
