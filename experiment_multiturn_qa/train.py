"""Multi-turn GRPO with search, in one file: the policy gets a question whose answer it cannot know, may search a corpus
several times, reads passages, and answers.

    python experiment_multiturn_qa/train.py    # the embedded policy and corpus, on a laptop, in minutes; see --help

Against experiment_multiturn_tool_calling the tool is a full-text index of a corpus (search.py), an answer is a text
that is compared with one or more golds (answers.py), and the figures tell one search from two. The rest is the same.
"""

import itertools
import math
import random
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from answers import exact_match, f1_score, holds_gold
from kv_cache import keys_and_values, prefill
from loss import GRPOLoss, loss_metrics, masked_mean
from model import as_reference, autocast, can_pack, end_token_ids, load_model, load_tokenizer, make_optimizer
from model import out_of_memory_names, peak_memory, resolve, unwrap
from replay_buffer import Experience, MicroBatch, ReplayBuffer
from run import Run, check_config, fail, find_checkpoint, read_train_and_eval_rows
from search import TOOL_PROMPT, Search, broken, open_search, parse_call, run_call
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

EXPERIMENT = Path(__file__).resolve().parent.name
DATA = Path(__file__).resolve().parents[1] / "data"
DATE = {"date_string": "26 Jul 2024"}  # Llama's template prints today's otherwise, and a run could not be repeated
MAX_SKIPPED = 10  # updates in a row without a finite gradient that end the run


@dataclass
class Config:
    # the run
    run_name: str | None = None  # name of its directories; default: the experiment and the time
    log_dir: str = "runs"  # holds <run-name>/metrics.jsonl and the TensorBoard log
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "grpo"  # the project there
    seed: int = 42  # of prompt order, sampling and LoRA's first weights
    device_index: int | None = None  # which CUDA device; default: the first, else Apple's, else the CPU
    checkpoint_path: str = "./output"  # holds <experiment>/<run-name>/step_000020
    checkpoint_interval: int = 20  # steps between checkpoints; the last step has one too
    resume: bool = False  # continue the named run, else this experiment's newest
    eval_interval: int = 10  # steps between evaluations; there is one before the first step and after the last too
    log_completions_interval: int = 10  # steps between completions shown in full
    # the model
    model_name: str = str(DATA / "policy_qa")  # a directory (of a model or an adapter), or a name on the hub
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights: float32
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"  # flash cannot take packed rows
    lora_rank: int = 0  # of adapters on all linear layers; 0 trains every weight
    load_in_4bit: bool = False  # frozen weights in nf4, with LoRA
    gradient_checkpointing: bool = False  # much less memory for a third more time in training
    # the data
    data_path: str = str(DATA / "qa" / "questions.json")  # .json, .jsonl, .parquet, or a hub data set: name[:config]
    eval_data_path: str | None = None  # default: <name>_eval beside the data, the hub's test split, the last 10 %
    index_path: str | None = None  # of the corpus; default: beside its corpus.jsonl, or beside the data
    question_field: str = "question"
    answer_field: str = "answer"  # a text, or a list of texts of which any is right
    system_prompt: str = (  # the embedded policy knows this one only; the description of the tool follows it
        "Answer the question. You may search several times. Give the answer inside <answer> </answer>."
    )
    max_prompts: int = 1024  # training prompts, from the start of the file
    # the rollout
    group_size: int = 8  # trajectories per prompt
    rollouts_per_step: int = 16  # prompts per step
    temperature: float = 1.0  # of sampling, and therefore of every log-prob
    max_turns: int = 4  # of the policy; a call in the last one is not run
    max_length: int = 768  # tokens of a whole row: the prompt, what is sampled, and the results
    max_new_tokens: int = 48  # tokens of a turn
    top_k: int = 2  # passages in a result
    max_result_tokens: int = 112  # of a result and what stands around it; what is too long is cut at its end
    sample_rows: int = 256  # trajectories sampled at once; lower it when sampling runs out of memory
    # the update
    max_steps: int | None = None  # stop after this many; 0 only evaluates
    epochs: int = 1  # passes over the prompts
    epochs_per_step: int = 1  # passes over a step's trajectories
    train_batch_size: int = 64  # trajectories per optimizer step: half a step's, so that the second update has to clip
    micro_batch_tokens: int = 1024  # tokens forwarded at once: 4096 and more for real models; lower it to save memory
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # adamw8bit keeps its state in 8 bits (bitsandbytes)
    lr: float = 5e-5  # for the embedded policy; real models: 1e-6 in full, 1e-5 with LoRA
    max_norm: float = 1.0  # the gradient is scaled down to this norm
    clip_eps_low: float = 0.2  # the ratio is clipped to 1 - clip_eps_low ...
    clip_eps_high: float = 0.2  # ... 1 + clip_eps_high
    kl_weight: float = 0.01  # of the KL to the policy that training began with; 0 needs no reference
    critic_type: Literal["grpo", "drgrpo", "dapo"] = "grpo"  # the weight of a token, see loss.py
    format_weight: float = 0.1  # reward of the form, where a right answer is worth 1

    @property
    def generate_max_length(self) -> int:
        """The most tokens that a trajectory may sample."""
        return self.max_turns * self.max_new_tokens


# ---------------------------------------------------------------- prompts
@dataclass
class Prompt:
    ids: list[int]
    answer: list[str]  # the golds, of which any is right
    difficulty: str = ""


def read_prompts(config: Config, tokenizer) -> tuple[list[Prompt], list[Prompt], Search]:
    """(training prompts, held-out prompts, search); prompts checked, rendered by the chat template and tokenised."""
    rows, eval_rows = read_train_and_eval_rows(config.data_path, config.eval_data_path)
    if len(rows) < config.rollouts_per_step or not eval_rows:
        counts = f"{len(rows)} prompts, {len(eval_rows)} held out (--eval-data-path)"
        fail(f"{config.data_path}: {counts}; --rollouts-per-step is {config.rollouts_per_step}")
    chosen = rows[: config.max_prompts], eval_rows[:512]
    parts = [[make_prompt(*row, config, tokenizer) for row in part] for part in chosen]
    longest = max(len(prompt.ids) for prompt in sum(parts, []))
    needed = longest + config.generate_max_length + (config.max_turns - 1) * config.max_result_tokens
    if needed > config.max_length:
        sizes = f"a prompt of {longest}, {config.max_turns} turns and {config.max_turns - 1} results"
        print(f"warning: --max-length {config.max_length}: {sizes} may take {needed} tokens; later results will be cut")
    return *parts, open_search(config, rows + eval_rows)


def make_prompt(where: str, row: dict, config: Config, tokenizer) -> Prompt:
    golds = row.get(config.answer_field)
    golds = golds if isinstance(golds, list) else [golds]
    for name, values in ((config.question_field, [row.get(config.question_field)]), (config.answer_field, golds)):
        if not values or not all(isinstance(value, (str, int, float)) and str(value).strip() for value in values):
            fail(f"{where}: field {name!r} is missing or empty; --question-field and --answer-field name the fields")
    texts = {"system": config.system_prompt + TOOL_PROMPT, "user": str(row[config.question_field])}
    messages = [{"role": role, "content": text} for role, text in texts.items()]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **DATE)
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written BOS, where the model has one
    if len(ids) + config.max_new_tokens > config.max_length:
        budget = f"--max-length {config.max_length} - --max-new-tokens {config.max_new_tokens}"
        fail(f"{where}: the prompt has {len(ids)} tokens, more than {budget}; raise --max-length or shorten the prompt")
    return Prompt(ids, [str(gold) for gold in golds], str(row.get("difficulty") or "").lower())


def prompts_of_step(prompts: list[Prompt], step: int, config: Config) -> list[Prompt]:
    """The prompts of a step (the first is 1). An epoch's order depends on (seed, epoch) alone."""
    epoch, position = divmod(step - 1, len(prompts) // config.rollouts_per_step)
    order = torch.randperm(len(prompts), generator=make_generator("cpu", config.seed, "epoch", epoch))
    return [prompts[i] for i in order.split(config.rollouts_per_step)[position]]


def make_generator(device, *key) -> torch.Generator:
    """Random numbers that depend on the key alone, so that a resumed run draws what the uninterrupted one would."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


# ---------------------------------------------------------------- reward
FORM = r"\s*(?:<think>.*</think>)?\s*<answer>.*</answer>\s*"


def format_reward(completion: str) -> float:
    """1 where the completion is <answer> ... </answer>, after a <think> ... </think> or without, and nothing else."""
    once = all(completion.count(tag) == 1 for tag in ("<answer>", "</answer>"))
    return float(once and completion.count("<think>") <= 1 and re.fullmatch(FORM, completion, re.DOTALL) is not None)


def given_answer(trajectory: "Trajectory") -> str | None:
    """The text of the last <answer> ... </answer> in its last turn; None where there is none, or it was cut off."""
    given, closed, _ = trajectory.turns[-1].rpartition("<answer>")[2].partition("</answer>")
    return given if "<answer>" in trajectory.turns[-1] and closed and trajectory.status != "truncated" else None


def reward(experience: "Trajectories", config: Config) -> dict[str, torch.Tensor]:
    """The parts of the reward, (group_size,) each; it is their sum.

    Only the policy's last turn is looked at, so what the environment wrote never pays. Searching earns nothing in
    itself; a malformed call costs the form. A trajectory that was cut off earns nothing.
    """
    f1, form = torch.zeros(2, len(experience.trajectories))
    for i, trajectory in enumerate(experience.trajectories):
        f1[i] = f1_score(given_answer(trajectory), experience.answer)
        if trajectory.status == "answered" and "malformed" not in trajectory.outcomes:
            form[i] = format_reward(trajectory.turns[-1])
    return {"reward_f1": f1, "reward_format": config.format_weight * form}


# ---------------------------------------------------------------- environment
ANSWER_NOW = "\nThat was the last call: answer now."


class Environment:
    """What stands between two turns of the policy: the end of its turn, the result as a user's turn, the next header.

    The chat template writes it, whatever it is: a dummy chat is rendered, and what follows the policy's turn is taken.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        result = {"role": "user", "content": "<tool_response>\nRESULT\n</tool_response>"}
        chat = [{"role": "user", "content": "."}, {"role": "assistant", "content": "TURN"}, result]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **DATE)
        self.before, self.after = text.rpartition("TURN")[2].split("RESULT")
        first, known = self.encode("")[0], tokenizer.added_tokens_decoder
        self.end_of_turn = {first} & {*known}  # none where the template ends a turn by plain text
        added = [token.content for token in known.values() if token.content.strip()]
        tags = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
        self.special = re.compile("|".join(map(re.escape, sorted({*added, *tags}, key=len, reverse=True))))

    def encode(self, result: str) -> list[int]:
        return self.tokenizer(self.before + result + self.after, add_special_tokens=False).input_ids

    def ids(self, result: str, note: str, last_id: int, room: int) -> list[int] | None:
        """Tokens of at most `room`, behind a row that ends with `last_id`; None where not even the note fits.

        Special tokens in the result would end its turn; they are taken out. One that is too long is cut at its end.
        """
        while self.special.search(result):  # again: what is left may form another one
            result = self.special.sub("", result)
        while True:
            ids = self.encode(result + note)
            ids = ids[1:] if ids[0] == last_id else ids  # the policy has ended its turn itself
            if len(ids) <= room or not result:
                return ids if len(ids) <= room else None
            offsets = self.tokenizer(result, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            start = offsets[max(0, len(offsets) + room - len(ids))][0] if offsets else 0  # of the first token to go
            result = result[: min(start, len(result) - 1)]


# ---------------------------------------------------------------- sampling
@torch.inference_mode()
def sample(policy, histories: list[list[int]], ends: set[int], memory: dict | None, config: Config, generator=None):
    """Sample the next turn of every history, or take the likeliest tokens where there is no generator.

    A plain softmax at `temperature`, whatever top_k, top_p or penalty the checkpoint's generation config asks for: the
    loss takes the log-probs of this distribution. Histories that agree are one row of the KV cache as long as they do.
    Finished turns leave. Returns ids (through the end token) and log-probs, a list of (tokens,) each.
    """
    device, ends = policy.device, torch.tensor(sorted(ends), device=policy.device)
    rows = {history: row for row, history in enumerate(dict.fromkeys(map(tuple, histories)))}
    prefix = torch.tensor([rows[tuple(history)] for history in histories], device=device)  # (turns,) row in the cache
    ids = torch.zeros(len(prefix), config.max_new_tokens, dtype=torch.long, device=device)  # (turns, new tokens)
    log_probs = torch.zeros(ids.shape, device=device)  # (turns, new tokens)
    counts = torch.zeros_like(prefix)  # (turns,) tokens so far
    alive = torch.arange(len(prefix), device=device)  # the turns that still grow; `prefix` is kept for them
    with autocast(config, device, sampling=True):
        cache, mask, logits = prefill(policy, [*rows], memory)
        lengths, vocabulary = mask.sum(-1), logits.shape[-1]  # (rows,)
        for t in range(config.max_new_tokens):
            next_log_probs = (logits[:, -1].float() / config.temperature).log_softmax(-1)[prefix]  # (alive, vocabulary)
            if generator is None:
                tokens = next_log_probs.argmax(-1)  # (alive,)
            else:
                tokens = torch.multinomial(next_log_probs.exp(), 1, generator=generator)[:, 0]  # (alive,)
            ids[alive, t], log_probs[alive, t] = tokens, next_log_probs.gather(1, tokens[:, None])[:, 0]
            counts[alive] += 1
            going = ~torch.isin(tokens, ends)
            if memory is not None:
                for i, row in zip(alive[~going].tolist(), prefix[~going].tolist()):
                    memory[(*histories[i], *ids[i, :t].tolist())] = keys_and_values(cache, row, mask[row].bool())
            alive, tokens, prefix = alive[going], tokens[going], prefix[going]
            if len(alive) == 0 or t + 1 == config.max_new_tokens:
                break
            longer, prefix = torch.unique(prefix * vocabulary + tokens, return_inverse=True)  # (rows,), (alive,)
            parents, tokens = longer // vocabulary, longer % vocabulary  # (rows,) the old row, and what it goes on with
            if not torch.equal(parents, torch.arange(len(mask), device=device)):
                mask, lengths = mask[parents], lengths[parents]
                cache.reorder_cache(parents)
            mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), lengths[:, None] + t
            logits = policy(tokens[:, None], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return tuple([row[:n] for row, n in zip(rows.cpu(), counts.tolist())] for rows in (ids, log_probs))


@dataclass
class Trajectory:
    """A prompt and all that followed it. Its ids are only ever appended to, and with them the mask."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)  # behind the prompt
    mask: list[int] = field(default_factory=list)  # 1 = sampled by the policy, 0 = written by the environment
    log_probs: list[float] = field(default_factory=list)  # when it was sampled; 0 for the environment's
    turns: list[str] = field(default_factory=list)  # the policy's
    outcomes: list[str] = field(default_factory=list)  # of the calls that were run: "ok", "failed" or "malformed"
    results: list[str] = field(default_factory=list)  # of these, as the policy read them
    status: str = "active"  # in the end "answered", "max_turns" or "truncated"

    def append(self, ids: list[int], log_probs: list[float] | None = None) -> None:
        """What the policy sampled, with its log-probs, or what the environment wrote."""
        self.ids += ids
        self.mask += [int(log_probs is not None)] * len(ids)
        self.log_probs += log_probs or [0.0] * len(ids)


@dataclass
class Trajectories(Experience):
    """An Experience whose completions are trajectories; `completions` holds their last turns."""

    trajectories: list[Trajectory] = field(default_factory=list)


@out_of_memory_names("sample_rows")
def rollout(policy, tokenizer, prompts, group_size: int, config: Config, generator=None, *, tool):
    """Trajectories, `group_size` for every prompt; greedy without a generator. In each turn all that are still active
    are sampled together, behind the KV cache of the turns before. `tool` is what calls are run by."""
    policy.eval()
    environment = Environment(tokenizer)
    ends = environment.end_of_turn | {*end_token_ids(policy, tokenizer)}
    has_memory = can_pack(unwrap(policy).config, 2 * config.max_length)  # the cache has gaps, which no window may count
    trajectories = [Trajectory(prompt) for prompt in prompts for _ in range(group_size)]
    for chunk in (trajectories[i : i + config.sample_rows] for i in range(0, len(trajectories), config.sample_rows)):
        active, memory = chunk, {} if has_memory else None
        for turns_left in reversed(range(config.max_turns)):
            histories = [trajectory.prompt.ids + trajectory.ids for trajectory in active]
            turns = sample(policy, histories, ends, memory, config, generator)
            for trajectory, ids, log_probs in zip(active, *turns):
                trajectory.append(ids.tolist(), log_probs.tolist())
                trajectory.turns.append(tokenizer.decode(ids, skip_special_tokens=True))
                respond(trajectory, environment, ends, turns_left, config, tool)
            active = [trajectory for trajectory in active if trajectory.status == "active"]
            if not active:
                break
    groups = (trajectories[i : i + group_size] for i in range(0, len(trajectories), group_size))
    return [make_experience(group) for group in groups]


def respond(trajectory: Trajectory, environment, ends: set[int], turns_left: int, config: Config, tool) -> None:
    """Run the call in the last turn and append its result, or end the trajectory."""
    call = parse_call(trajectory.turns[-1])
    if trajectory.ids[-1] not in ends:
        trajectory.status = "truncated"
    elif call is None or turns_left == 0:
        trajectory.status = "answered" if call is None else "max_turns"
    else:
        outcome, result = run_call(call, tool)
        trajectory.outcomes.append(outcome)
        room = config.max_length - len(trajectory.prompt.ids) - len(trajectory.ids) - config.max_new_tokens
        note = ANSWER_NOW if turns_left == 1 else ""
        ids = environment.ids(result, note, trajectory.ids[-1], min(room, config.max_result_tokens))
        if ids is None:  # no whole turn fits behind it
            trajectory.status = "truncated"
        else:
            trajectory.append(ids)
            trajectory.results.append(environment.tokenizer.decode(ids))


def make_experience(group: list[Trajectory]) -> Trajectories:
    """The tensors of a group of trajectories."""
    return Trajectories(
        prompt_ids=torch.tensor(group[0].prompt.ids),
        completion_ids=[torch.tensor(trajectory.ids) for trajectory in group],
        masks=[torch.tensor(trajectory.mask) for trajectory in group],
        sampled_log_probs=[torch.tensor(trajectory.log_probs) for trajectory in group],
        truncated=torch.tensor([float(trajectory.status == "truncated") for trajectory in group]),
        completions=[trajectory.turns[-1] for trajectory in group],
        answer=group[0].prompt.answer,
        trajectories=group,
    )


# ---------------------------------------------------------------- advantages
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / (std + 1e-4) over a group, (group_size,), std with n - 1 (2402.03300, section 4.1.2).

    Exactly 0 where all rewards are equal: there rounding would make an advantage of its own.
    """
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


# ---------------------------------------------------------------- log-probs
def sequences_log_probs(model, batch: MicroBatch, config: Config) -> torch.Tensor:
    """Log-probs of a micro-batch's sampled tokens under `model`, (sampled tokens,), in at least float32.

    The hidden states that predict them are picked before the output head, and the head runs in chunks that the backward
    pass computes again, so that one chunk of logits is in memory at a time.
    """
    base = unwrap(model)
    with autocast(config, model.device):
        dtype = base.dtype if config.precision == "float32" else getattr(torch, config.precision)
        mask, positions = batch.attention_mask(dtype), batch.position_ids
        output = base.get_decoder()(batch.input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, batch.predicted_from)  # (sampled, hidden size)
        chunk = max(1, 2**26 // base.config.get_text_config().vocab_size)  # 256 MB of float32 logits
        log_probs = [
            checkpoint(token_log_probs, base, states, targets, config.temperature, use_reentrant=False)
            for states, targets in zip(hidden.split(chunk), batch.targets.split(chunk))
        ]
    return torch.cat(log_probs)


def token_log_probs(base, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) at the targets, (tokens,), as gather - logsumexp."""
    logits = base.get_output_embeddings()(hidden)  # (tokens, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    logits = (cap * torch.tanh(logits / cap) if cap else logits) / temperature
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


@torch.no_grad()
def remember_log_probs(policy, reference, batches: list[list[MicroBatch]], config: Config) -> None:
    """Fill in the log-probs of the old policy and of the reference.

    The first batch's old ones are those of its own training forward, which comes before any update. Later batches'
    are the sampler's in float32, where the two differ by rounding alone (`max_log_prob_gap`), else computed again.
    """
    policy.eval()
    for micro_batch in sum(batches[1:], []):
        micro_batch.old_log_probs = micro_batch.sampled_log_probs
        if config.precision != "float32":
            micro_batch.old_log_probs = sequences_log_probs(policy, micro_batch, config)
    if config.kl_weight:
        with as_reference(policy, reference) as model:
            for micro_batch in sum(batches, []):
                micro_batch.reference_log_probs = sequences_log_probs(model, micro_batch, config)


# ---------------------------------------------------------------- evaluation
def evaluate(policy, tokenizer, prompts: list[Prompt], config: Config, search: Search) -> dict[str, float]:
    """Greedy figures on the held-out prompts: exact match as it is rewarded, by any gold in the last turn, and without
    the tool (each call comes back with an error); then what concerns searching, in all and by difficulty."""
    trajectories, without_tool = (
        [e.trajectories[0] for e in rollout(policy, tokenizer, prompts, 1, config, tool=tool)]
        for tool in (search, broken)
    )
    difficulties = ["", *sorted({prompt.difficulty for prompt in prompts} - {""})]  # "" is all
    parts = {name: [t for t in trajectories if name in ("", t.prompt.difficulty)] for name in difficulties}
    figures = {name: trajectory_metrics(part) for name, part in parts.items()}
    evaluation = {
        "eval_accuracy": figures[""]["em"],
        "eval_accuracy_lenient": sum(holds_gold(t.turns[-1], t.prompt.answer) for t in trajectories) / len(prompts),
        "eval_accuracy_no_tool": trajectory_metrics(without_tool)["em"],
        "eval_tool_use_rate": figures[""]["tool_use_rate"],
    }
    for difficulty, part in figures.items():
        suffix = re.sub(r"\W+", "_", f"_{difficulty}" if difficulty else "")
        evaluation |= {f"eval_{name}{suffix}": part[name] for name in ("em", "f1", "searches", "recall_at_k")}
    return evaluation | {"eval_count": len(prompts)}


def rollout_metrics(experiences: list[Trajectories]) -> dict[str, float | None]:
    """What a step's trajectories say about the policy, each a mean over trajectories if not said otherwise."""
    rewards = torch.stack([e.rewards for e in experiences])  # (groups, group_size)
    parts = {name: torch.cat([e.reward_parts[name] for e in experiences]) for name in experiences[0].reward_parts}
    masks = [mask for e in experiences for mask in e.masks]
    log_probs = torch.cat([row for e in experiences for row in e.sampled_log_probs])
    lengths = torch.tensor([float(mask.sum()) for mask in masks])  # (trajectories,) sampled tokens
    correct = torch.tensor([exact_match(given_answer(t), e.answer) for e in experiences for t in e.trajectories])
    return {
        "reward": rewards.mean().item(),
        **{name: part.mean().item() for name, part in parts.items()},
        "reward_std": rewards.std(dim=1).mean().item(),  # within groups
        "zero_std_fraction": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),  # of groups
        "entropy": -masked_mean(log_probs, torch.cat(masks)).item(),  # over sampled tokens
        "completion_length": lengths.mean().item(),
        "completion_length_correct": masked_mean(lengths, correct).item() if correct.any() else None,
        "completion_length_wrong": masked_mean(lengths, 1 - correct).item() if not correct.all() else None,
        "environment_fraction": 1 - torch.cat(masks).float().mean().item(),  # of the tokens behind the prompts
        **trajectory_metrics([trajectory for e in experiences for trajectory in e.trajectories]),
    }


def trajectory_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """Means over trajectories: how they answer, how they use the tool, and how they end."""
    answers = [(given_answer(t), t.prompt.answer) for t in trajectories]
    outcomes = [trajectory.outcomes for trajectory in trajectories]
    figures = {
        "em": [exact_match(*pair) for pair in answers],
        "f1": [f1_score(*pair) for pair in answers],
        "searches": [calls.count("ok") for calls in outcomes],  # that found something
        "recall_at_k": [holds_gold(" ".join(t.results), t.prompt.answer) for t in trajectories],
        "tool_use_rate": ["ok" in calls for calls in outcomes],  # at least one call that worked
        "calls": [len(calls) for calls in outcomes],
        "malformed_calls": [calls.count("malformed") for calls in outcomes],
        "failed_calls": [calls.count("failed") for calls in outcomes],
        "turns": [len(trajectory.turns) for trajectory in trajectories],
    }
    for status in ("answered", "max_turns", "truncated"):
        figures[f"{status}_fraction"] = [trajectory.status == status for trajectory in trajectories]
    return {name: sum(values) / len(values) for name, values in figures.items()}


def show_trajectory(experience: Trajectories, tokenizer) -> str:
    """The first trajectory of a group turn by turn, with its prompt and all special tokens, and what it earned."""
    trajectory = experience.trajectories[0]
    text = f"--- prompt\n{tokenizer.decode(trajectory.prompt.ids)}"
    for sampled, tokens in itertools.groupby(zip(trajectory.mask, trajectory.ids), key=lambda pair: pair[0]):
        text += f"\n--- {'policy' if sampled else 'environment'}\n{tokenizer.decode([token for _, token in tokens])}"
    earned = f"reward {experience.rewards[0]:.2f}, advantage {experience.advantages[0]:+.2f}"
    return f"{text}\n--- {trajectory.status}; right answer: {' or '.join(experience.answer)}, {earned}"


# ---------------------------------------------------------------- main
def main(config: Config) -> None:
    check_config(config)
    config, device = resolve(config)
    print("\n".join(f"{name}: {value}" for name, value in asdict(config).items()))
    tokenizer = load_tokenizer(config.model_name)
    prompts, eval_prompts, search = read_prompts(config, tokenizer)
    checkpoint_dir, state = find_checkpoint(config, EXPERIMENT) if config.resume else (None, {"step": 0})
    run = Run(config, EXPERIMENT, checkpoint_dir)
    policy, reference = load_model(config, device, checkpoint_dir)
    evaluation = evaluate(policy, tokenizer, eval_prompts, config, search)
    print("held out:", evaluation)
    if config.max_steps == 0:
        return

    run.open(config)
    optimizer = make_optimizer(policy, config, state.get("optimizer"))
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    if config.resume:
        scaler.load_state_dict(state["scaler"])
    else:
        run.log(0, evaluation)
    before = state.get("before", evaluation)
    objective = GRPOLoss(config.clip_eps_low, config.clip_eps_high, config.kl_weight)
    replay_buffer = ReplayBuffer()
    packed = can_pack(unwrap(policy).config, config.max_length)
    steps_per_epoch = len(prompts) // config.rollouts_per_step
    last_step = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    start, skipped_in_a_row = time.time() - state.get("elapsed_seconds", 0), 0
    bar = tqdm(range(state["step"] + 1, last_step + 1), initial=state["step"], total=last_step)
    for step in bar:
        # 1. Sample a group of trajectories for every prompt.
        step_start, step_prompts = time.time(), prompts_of_step(prompts, step, config)
        generator = make_generator(device, config.seed, "sample", step)
        experiences = rollout(policy, tokenizer, step_prompts, config.group_size, config, generator, tool=search)
        sampling_end = time.time()

        # 2. Reward each trajectory, and compare it with its group.
        for experience in experiences:
            experience.reward_parts = reward(experience, config)
            experience.rewards = sum(experience.reward_parts.values())  # (group_size,)
            experience.advantages = group_advantages(experience.rewards)  # (group_size,)

        # 3. Cut the groups into batches; take the old policy's and the reference's log-probs of them.
        replay_buffer.extend(experiences)
        batches = replay_buffer.batches(config, packed, make_generator("cpu", config.seed, "batches", step))
        batches = [[micro_batch.to(device) for micro_batch in batch] for batch in batches]
        sums, grad_norms = [], []
        with out_of_memory_names("micro_batch_tokens"):
            remember_log_probs(policy, reference, batches, config)

            # 4. Update the policy, once for every batch. A batch is empty where no group of it needs a forward.
            policy.train()
            for batch in filter(None, batches * config.epochs_per_step):
                for micro_batch in batch:
                    log_probs = sequences_log_probs(policy, micro_batch, config)  # (sampled tokens,)
                    if micro_batch.old_log_probs is None:
                        micro_batch.old_log_probs = log_probs.detach()
                    loss, token_sums = objective(log_probs, micro_batch)
                    scaler.scale(loss).backward()
                    sums.append(token_sums)
                scaler.unscale_(optimizer)
                grad_norms.append(clip_grad_norm_(policy.parameters(), config.max_norm).item())
                skipped_in_a_row = 0 if math.isfinite(grad_norms[-1]) else skipped_in_a_row + 1
                if skipped_in_a_row == 0:
                    scaler.step(optimizer)
                elif skipped_in_a_row == MAX_SKIPPED:
                    fail(f"no finite gradient in {MAX_SKIPPED} updates; last good policy: {run.last_checkpoint}")
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
        replay_buffer.clear()

        # 5. Log, evaluate, save.
        elapsed, num_sampled = time.time() - start, sum(mask.sum().item() for e in experiences for mask in e.masks)
        metrics = {
            "elapsed_seconds": elapsed,
            **rollout_metrics(experiences),
            **loss_metrics(sums, grad_norms),
            "grad_clip_fraction": sum(norm > config.max_norm for norm in grad_norms) / max(len(grad_norms), 1),
            "lr": config.lr,
            "sample_tokens_per_second": num_sampled / (sampling_end - step_start),
            "train_tokens_per_second": sum(part["tokens"].item() for part in sums) / (time.time() - sampling_end),
            "peak_memory": peak_memory(device),
        }
        last = step == last_step or run.stop_requested
        if last or step % config.eval_interval == 0:
            evaluation = evaluate(policy, tokenizer, eval_prompts, config, search)
            metrics |= evaluation
        bar.set_postfix(reward=metrics["reward"], length=metrics["completion_length"], eval=evaluation["eval_accuracy"])
        shown = show_trajectory(experiences[0], tokenizer) if step % config.log_completions_interval == 0 else None
        run.log(step, metrics, shown)
        if last or step % config.checkpoint_interval == 0:
            trainer = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "before": before}
            cursor = step % steps_per_epoch * config.rollouts_per_step
            run.save(step, policy, tokenizer, trainer | {"elapsed_seconds": elapsed, "prompt_cursor": cursor})
        if last:
            break
    run.close(before, evaluation, time.time() - start)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
