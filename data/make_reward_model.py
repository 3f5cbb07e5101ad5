"""Train a reward model from comparisons: which of two answers did somebody prefer?

    # pairs of the embedded policy, by a made-up annotator -> data/reward_math, in minutes
    python data/make_reward_model.py
    # your own pairs and model: rows of {"prompt": ..., "chosen": ..., "rejected": ...}
    python data/make_reward_model.py --pairs pairs.jsonl --base-model Qwen/Qwen2.5-0.5B-Instruct \\
        --lr 1e-5 --micro-batch-pairs 2 --system-prompt "You are a helpful assistant." \\
        --output my_reward_model

The model of Bradley and Terry says how likely the first answer is preferred, from a score of each
(arXiv 1706.03741, equation 1):

    P(chosen over rejected) = exp(score(chosen)) / (exp(score(chosen)) + exp(score(rejected)))
                            = sigmoid(score(chosen) - score(rejected))

A language model whose output head is replaced by one number, read at the last token, learns the
scores by maximum likelihood: it minimises the mean of -log P over the pairs. Only differences are
learnt, so a score has no zero point.

The made-up annotator prefers right answers, errs, and likes longer ones, as people do. A reward
model learns both: that right answers are wanted, and the bias for long ones.

All weights are trained, in float32, which takes 16 bytes each: 0.5 billion fit into 16 GB.
"""

import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
import tyro
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent / "experiment_reward_model"))
import train as grpo  # noqa: E402
from data import read_rows  # noqa: E402
from model import (  # noqa: E402
    autocast,
    load_model,
    load_tokenizer,
    out_of_memory_names,
    resolve,
)
from reward_model import FEWEST_TOKENS, RewardModel  # noqa: E402
from run import (  # noqa: E402
    NonNegativeFloat,
    OptionalInt,
    PositiveInt,
    Seed,
    Share,
    check_ranges,
    fail,
    first_line,
    is_unicode,
    refuse_empty,
)

EMBEDDED_POLICY = str(DATA / "policy_math")
HELD_OUT = 0.1  # of the prompts
MOST_HELD_OUT = 2000  # pairs
LARGEST_EXPONENT = 700  # exp(710) is too large for a float


@dataclass
class Config:
    # A .jsonl, .json or .parquet file, or a data set on the hub. Default: pairs are made up.
    pairs: str | None = None
    # Training pairs, from the start. Higher: a better reward model.
    max_pairs: PositiveInt = 8000
    # The language model that becomes the reward model.
    base_model: str = EMBEDDED_POLICY
    # How many of its layers are kept, from the first. Default: 2 of the embedded policy, else all.
    layers: OptionalInt = None
    # What the reward model reads before each prompt. train.py must say the same.
    system_prompt: str = grpo.Config.system_prompt
    # Passes over the pairs.
    epochs: PositiveInt = 4
    # Pairs of an update.
    batch_pairs: PositiveInt = 32
    # Pairs forwarded at once. Higher: more memory.
    micro_batch_pairs: PositiveInt = 32
    # Most tokens of a dialogue; the middle of a longer one is cut.
    max_length: PositiveInt = 1024
    # The learning rate at its highest: it rises for a tenth of the updates, then falls to 0. Real
    # models: 1e-5.
    lr: Share = 3e-4
    # How much more the annotator likes a right answer than a wrong one, in log-odds.
    likes_right: NonNegativeFloat = 3.0
    # How much more he likes an answer that is a token longer, in log-odds.
    likes_longer: NonNegativeFloat = 0.05
    # Decides the pairs and their order.
    seed: Seed = 0
    # A file for the training pairs, to look at them. Default: none.
    write_pairs: str | None = None
    # The directory of the reward model.
    output: str = str(DATA / "reward_math")


@dataclass
class Pair:
    prompt: str
    chosen: str
    rejected: str
    right: tuple[bool, bool] | None = None  # whether chosen and rejected are right, where known


# ---------------------------------------------------------------- pairs
def sample_pairs(config: Config) -> list[Pair]:
    """Pairs of different answers that the embedded policy gave to the same prompt."""
    settings = grpo.Config(max_prompts=10**6, max_eval_prompts=1, seed=config.seed)
    settings, device = resolve(replace(settings, kl_weight=0.0))
    tokenizer = load_tokenizer(settings)
    policy, _ = load_model(settings, device)
    prompts, _ = grpo.read_prompts(settings, tokenizer)
    generator = grpo.make_generator(device, config.seed, "pairs")
    rng = random.Random(config.seed)
    pairs = []
    for experience in grpo.rollout(policy, tokenizer, prompts, 16, settings, generator):
        completions = experience.completions
        for first in range(0, len(completions), 2):
            if completions[first] != completions[first + 1]:
                pairs.append(annotate(experience, first, first + 1, config, rng))
    rng.shuffle(pairs)
    return pairs


def annotate(experience, first: int, second: int, config: Config, rng) -> Pair:
    """Which of two completions the annotator prefers: a coin, loaded by what he likes."""
    answers = []
    right = []
    appeal = []
    for number in (first, second):
        answer = experience.completions[number]
        answers.append(answer)
        right.append(bool(grpo.accuracy_reward(answer, experience.answer)))
        tokens = len(experience.completion_ids[number])
        appeal.append(config.likes_right * right[-1] + config.likes_longer * tokens)
    probability = 1 / (1 + math.exp(min(appeal[1] - appeal[0], LARGEST_EXPONENT)))  # of the first
    if rng.random() > probability:
        answers.reverse()
        right.reverse()
    return Pair(experience.question, *answers, tuple(right))


def read_pairs(path: str) -> list[Pair]:
    """The rows of a file or data set, whose fields are texts or lists of messages.

    Dialogues of several turns are left out, and so are pairs of equal answers. A system message is
    replaced by `system_prompt`.
    """
    pairs = []
    left_out = 0
    for where, row in read_rows(path, "train"):
        messages = {}
        for field in ("prompt", "chosen", "rejected"):
            role = "user" if field == "prompt" else "assistant"
            messages[field] = messages_of(where, field, row.get(field), role)
        if not messages["prompt"] and not isinstance(row["chosen"], list):
            fail(f"{where}: field 'prompt' is missing or empty")
        question, chosen = one_turn(messages["prompt"], messages["chosen"])
        same_question, rejected = one_turn(messages["prompt"], messages["rejected"])
        if question is None or question != same_question or chosen == rejected:
            left_out += 1
        else:
            pairs.append(Pair(question, chosen, rejected))
    if left_out:
        print(f"{path}: {left_out} rows left out: several turns, equal answers or other questions")
    return pairs


def messages_of(where: str, field: str, value, role: str) -> list[dict]:
    """A field as messages. A missing prompt is none: it may stand in the dialogues."""
    if value is None and field == "prompt":
        return []
    if isinstance(value, str):
        value = [{"role": role, "content": value}] if value or field != "prompt" else []
    wanted = f"{where}: field {field!r} must be a text or a list of messages"
    if not isinstance(value, list) or (not value and field != "prompt"):
        fail(wanted)
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not is_unicode(content):
            fail(f"{wanted}, each with a text as its content")
    return [message for message in value if message.get("role") != "system"]


def one_turn(prompt: list[dict], answer: list[dict]) -> tuple[str | None, str | None]:
    """(question, answer) of a dialogue of one turn, else (None, None).

    The answer's messages may begin with the prompt's.
    """
    dialogue = answer if len(answer) > 1 else prompt + answer
    if [message.get("role") for message in dialogue] != ["user", "assistant"]:
        return None, None
    return dialogue[0]["content"], dialogue[1]["content"]


def split_by_prompt(pairs: list[Pair], config: Config) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs), which share no prompt."""
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(config.seed).shuffle(prompts)
    held_out = set(prompts[: max(1, int(HELD_OUT * len(prompts)))])
    training = [pair for pair in pairs if pair.prompt not in held_out][: config.max_pairs]
    if not training:
        found = f"{len(pairs)} pairs of {len(prompts)} prompts can be used"
        fail(f"{config.pairs}: {found}; two prompts are needed, of which one is held out")
    return training, [pair for pair in pairs if pair.prompt in held_out][:MOST_HELD_OUT]


# ---------------------------------------------------------------- the model
def begin(config: Config, settings, device, folder: str) -> RewardModel:
    """The base model with a fresh score in place of its output head, written to `folder`."""
    layers = config.layers
    if layers is None:
        is_embedded = Path(config.base_model).resolve() == Path(EMBEDDED_POLICY)
        layers = 2 if is_embedded else 0
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.base_model)
        model_config = AutoConfig.from_pretrained(config.base_model, num_labels=1)
        if layers:
            model_config.num_hidden_layers = min(layers, model_config.num_hidden_layers)
        if layers and getattr(model_config, "layer_types", None):
            model_config.layer_types = model_config.layer_types[:layers]
        if model_config.pad_token_id is None:  # then batches could not be scored
            has_pad = tokenizer.pad_token_id is not None
            model_config.pad_token_id = (
                tokenizer.pad_token_id if has_pad else tokenizer.eos_token_id
            )
        torch.manual_seed(config.seed)
        transformers.logging.set_verbosity_error()  # that the score is random is meant to be
        model = AutoModelForSequenceClassification.from_pretrained(
            config.base_model, config=model_config, dtype=torch.float32
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = replace(settings, reward_model=folder, reward_precision="float32")
        return RewardModel(replace(settings, reward_max_length=config.max_length), device)
    except Exception as error:  # transformers' errors share no base class
        fail(f"--base-model {config.base_model}: cannot be loaded ({first_line(error)})")


def scores(model: RewardModel, pairs: list[Pair], settings) -> torch.Tensor:
    """(2, pairs): of the chosen answers, and of the rejected ones."""
    rows = [model.encode(pair.prompt, pair.chosen, cut=True) for pair in pairs]
    rows += [model.encode(pair.prompt, pair.rejected, cut=True) for pair in pairs]
    with autocast(settings, model.device):
        logits = model.model(**model.pad(rows)).logits  # (2 * pairs, 1)
    return logits.float().view(2, len(pairs))


def bradley_terry_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log P(chosen over rejected), (pairs,)."""
    return -logsigmoid(chosen - rejected)


@out_of_memory_names("micro_batch_pairs, or max_length")
def train(model: RewardModel, pairs: list[Pair], config: Config, settings) -> None:
    """Minimise the mean loss over the pairs by AdamW, float32 weights.

    OneCycleLR also lowers AdamW's first beta from 0.95 to 0.85 and raises it again.
    """
    updates = config.epochs * math.ceil(len(pairs) / config.batch_pairs)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=config.lr, weight_decay=0.01)
    most = max(updates + 1, 20)  # it cannot make a tenth of fewer
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=most, pct_start=0.1
    )
    rng = random.Random(config.seed)
    began = time.time()
    update = 0
    for _ in range(config.epochs):
        order = rng.sample(pairs, len(pairs))
        for start in range(0, len(order), config.batch_pairs):
            batch = order[start : start + config.batch_pairs]
            total = 0.0
            for first in range(0, len(batch), config.micro_batch_pairs):
                chosen, rejected = scores(
                    model, batch[first : first + config.micro_batch_pairs], settings
                )
                loss = bradley_terry_loss(chosen, rejected).sum() / len(batch)
                loss.backward()
                total += loss.item()
            if not math.isfinite(total):
                fail(f"update {update + 1}: the loss is not finite; lower --lr; nothing is written")
            torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            update += 1
            if update % 50 == 0 or update == updates:
                seconds = f"{time.time() - began:.0f} s"
                print(f"update {update} of {updates}: loss {total:.3f}, {seconds}", flush=True)


@torch.no_grad()
def measure(model: RewardModel, pairs: list[Pair], config: Config, settings) -> None:
    """Print, of held-out pairs: how often the chosen answer scores higher, and the calibration.

    Calibrated means: where it is 80 % sure, the annotator agrees in about 80 % of the pairs.
    """
    parts = []
    for start in range(0, len(pairs), config.micro_batch_pairs):
        parts.append(scores(model, pairs[start : start + config.micro_batch_pairs], settings))
    chosen, rejected = torch.cat(parts, dim=1).cpu()
    agrees = (chosen > rejected).float()  # (pairs,)
    sure = (chosen - rejected).abs().sigmoid()  # the probability of what it prefers, from 0.5
    loss = bradley_terry_loss(chosen, rejected).mean()
    print(f"held out, {len(pairs)} pairs: accuracy {agrees.mean():.3f}, loss {loss:.3f}")
    error = 0.0
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        inside = (sure >= low) & (sure < low + 0.1 if low < 0.9 else sure <= 1)
        if inside.any():
            gap = sure[inside].mean() - agrees[inside].mean()
            error += inside.float().mean().item() * abs(gap.item())
            figures = f"sure {sure[inside].mean():.2f}, agrees {agrees[inside].mean():.2f}"
            print(f"    {low:.1f} to {low + 0.1:.1f}: {inside.sum()} pairs, {figures}")
    print(f"expected calibration error {error:.3f}")
    known = [i for i, pair in enumerate(pairs) if pair.right and pair.right[0] != pair.right[1]]
    if known:
        better = torch.tensor([pairs[i].right[0] for i in known])
        prefers_right = ((chosen > rejected)[known] == better).float().mean()
        print(
            f"right over wrong, whatever the annotator chose: {prefers_right:.3f} of {len(known)}"
        )


def check(config: Config) -> None:
    """Refuse what cannot work or would overwrite something, before anything is made."""
    check_ranges(config)
    refuse_empty(config, "pairs", "base_model", "write_pairs", "output")
    if config.max_length < FEWEST_TOKENS:
        fail(f"--max-length {config.max_length}: take at least {FEWEST_TOKENS}")
    is_own = Path(config.output).resolve() == Path(Config.output)
    for flag, path in (("--output", config.output), ("--write-pairs", config.write_pairs)):
        is_taken = path and os.path.lexists(path)
        if is_taken and not (flag == "--output" and is_own and Path(path).is_dir()):
            fail(f"{flag} {path}: exists; choose another one")


@contextmanager
def writing(output: Path):
    """A directory beside `output`, which is renamed to it at the end if all went well."""
    try:
        aside = tempfile.mkdtemp(prefix=f"{output.name}.", dir=output.parent)
    except OSError as error:
        fail(f"--output {output}: cannot be written ({error.strerror})")
    try:
        yield Path(aside)
        shutil.rmtree(output, ignore_errors=True)
        os.chmod(aside, 0o755)
        os.replace(aside, output)
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing is written")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(config: Config) -> None:
    check(config)
    settings, device = resolve(grpo.Config(system_prompt=config.system_prompt))
    if settings.precision == "float16":  # its gradients would need to be scaled
        settings = replace(settings, precision="float32")
    output = Path(config.output)
    with writing(output) as aside:
        model = begin(config, settings, device, str(aside))
        pairs = read_pairs(config.pairs) if config.pairs else sample_pairs(config)
        training, held_out = split_by_prompt(pairs, config)
        print(f"{len(training)} of {len(pairs)} pairs to train on, {len(held_out)} held out")
        if not config.pairs:
            answers = f"{count_wrong_in_form(training)} of their {2 * len(training)} answers"
            print(f"{answers} have the form and are wrong")
        if config.write_pairs:
            write_pairs(config.write_pairs, training)
        train(model, training, config, settings)
        for parameter in model.model.parameters():  # as it is saved
            parameter.data = parameter.data.bfloat16().float()
        measure(model, held_out, config, settings)
        model.model.to(torch.bfloat16).save_pretrained(aside)
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    print(f"{output}: {size:.1f} MB")


def count_wrong_in_form(pairs: list[Pair]) -> int:
    """Answers from which it could be learnt that the form is not enough."""
    count = 0
    for pair in pairs:
        for answer, is_right in zip((pair.chosen, pair.rejected), pair.right):
            count += not is_right and grpo.format_reward(answer) == 1
    return count


def write_pairs(path: str, pairs: list[Pair]) -> None:
    try:
        with open(path, "x") as file:
            for pair in pairs:
                row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
                file.write(json.dumps(row) + "\n")
    except OSError as error:
        fail(f"--write-pairs {path}: cannot be written ({error.strerror})")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
