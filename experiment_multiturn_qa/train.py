"""Multi-turn GRPO with search, in one file: the policy gets a question whose answer it cannot know.

It may search a corpus several times, reads passages, and answers.

    python experiment_multiturn_qa/train.py    # the embedded policy and corpus, a laptop, 8 minutes

Against experiment_multiturn_tool_calling the tool is a full-text index of a corpus (search.py), an
answer is a text that is compared with one or more golds (answers.py), and the figures tell one
search from two. The rest is the same.

The words, with the numbers of the default:

    group          the trajectories of one prompt: 8
    step           16 prompts x 8 trajectories = 128 trajectories, sampled, trained on, thrown away
    update         one optimizer step, on 64 trajectories; so a step has 2
    micro-batch    what is forwarded and backpropagated at once: at most 1,024 tokens
    row            one sequence of a micro-batch: a prompt and as many of its group's trajectories
                   as fit, packed (picture in replay_buffer.py; one trajectory where the model
                   cannot pack)
    turn           what the policy samples until it ends its turn; a trajectory has at most 4
"""

import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from answers import exact_match, f1_score, given_answer, holds_gold, search_metrics
from calls import Environment, show_trajectory, trajectory_metrics
from completions import CompletionLog
from data import choose_rows, read_train_and_eval_rows, text_of
from loss import GRPOLoss, loss_metrics
from model import (
    as_reference,
    autocast,
    can_pack,
    find_eos_ids,
    load_model,
    load_tokenizer,
    make_optimizer,
    make_scaler,
    optimizer_step,
    out_of_memory_names,
    peak_memory,
    render_prompt,
    resolve,
    unwrap,
)
from replay_buffer import Experience, MicroBatch, ReplayBuffer
from run import (
    NonNegativeFloat,
    NonNegativeInt,
    OptionalInt,
    PositiveInt,
    Run,
    Seed,
    Share,
    Temperature,
    check_config,
    fail,
    is_due,
    rollout_metrics,
    show_changed,
    speed_metrics,
)
from sampling import sample
from search import TOOL_PROMPT, Search, broken, open_search, parse_call, run_call, warn_of_cuts
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

EXPERIMENT = Path(__file__).resolve().parent.name
DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass
class Config:
    # ---- the run

    # Name of the run's directories. Default: the experiment and the time.
    run_name: str | None = None
    # Holds <run-name>/metrics.jsonl and the TensorBoard log.
    log_dir: str = "runs"
    # Log to Weights & Biases too (pip install wandb).
    wandb: bool = False
    # The project at Weights & Biases.
    wandb_project: str = "grpo"
    # Decides the prompts' order, the samples and LoRA's first weights.
    seed: Seed = 42
    # Which CUDA device. Default: the first, else Apple's, else the CPU.
    device_index: OptionalInt = None
    # Holds <experiment>/<run-name>/step_000020.
    checkpoint_path: str = "./output"
    # Steps between checkpoints. Higher: fewer writes, more to lose. 0: only the last step has one.
    checkpoint_interval: NonNegativeInt = 20
    # Continue the named run, else the one of this experiment that was started last.
    resume: bool = False
    # Steps between evaluations. Higher: faster. 0: only before the first step and after the last.
    eval_interval: NonNegativeInt = 10
    # Step 1 and every so many steps print a completion, and write whole groups to
    # completions.jsonl, which tools/view.py shows. 0: never.
    log_completions_interval: NonNegativeInt = 10
    # Groups that each of these steps writes. Higher: more to look at, larger files.
    log_groups: NonNegativeInt = 2
    # How many of the likeliest tokens are written at each place of these completions, such as 5.
    # Costs two more forwards of each completion.
    log_alternatives: NonNegativeInt = 0
    # A small run to see that all works: at most 100 prompts and 100 steps, a checkpoint every 50.
    test: bool = False

    # ---- the model

    # A directory (of a model or an adapter), or a name on the hub.
    model_name: str = str(DATA / "policy_qa")
    # Precision of matrix products. Weights that are trained are float32.
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # flex_attention trains faster on rows of thousands of tokens, and compiles for 20 s first.
    # flash_attention_2 takes no (tokens, tokens) mask, so rows hold one completion with it.
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "auto"
    # Rank of adapters on all linear layers. Higher: can learn more, takes more memory. 0 trains
    # every weight of the model instead.
    lora_rank: NonNegativeInt = 0
    # Frozen weights in nf4 (needs LoRA): a quarter of their memory, a little slower.
    load_in_4bit: bool = False
    # Much less memory in training, for a third more time.
    gradient_checkpointing: bool = False

    # ---- the data

    # .jsonl, .json, .parquet, or a hub data set: name or name:config.
    data_path: str = str(DATA / "qa" / "questions.json")
    # Default: <data>_eval beside it, the hub's test split, or the last 10 %.
    eval_data_path: str | None = None
    # Index of the corpus. Default: beside its corpus.jsonl, or beside the data.
    index_path: str | None = None
    # The field of a row that holds the question.
    question_field: str = "question"
    # The field that holds a text, or a list of texts of which any is right.
    answer_field: str = "answer"
    # The embedded policy knows this one only. The description of the tool follows it.
    system_prompt: str = (
        "Answer the question. You may search several times. "
        "Give the answer inside <answer> </answer>."
    )
    # Training prompts, from the start of the file.
    max_prompts: PositiveInt = 1024
    # Held-out prompts. Higher: a steadier figure, and slower evaluations.
    max_eval_prompts: PositiveInt = 512

    # ---- sampling

    # Trajectories of a prompt, at least 2. Higher: a better baseline, and more sampling.
    group_size: PositiveInt = 8
    # Prompts of a step. Higher: a less noisy gradient, and longer steps.
    rollouts_per_step: PositiveInt = 16
    # Higher: more varied completions. Every log-prob of the loss is taken at this temperature.
    temperature: Temperature = 1.0
    # Turns of the policy. Higher: more calls are possible. A call in the last turn is not run.
    max_turns: PositiveInt = 4
    # Tokens of a whole row: the prompt, what is sampled, and the results.
    max_length: PositiveInt = 768
    # Tokens of a turn. Higher: fewer are cut off, and sampling takes longer.
    max_new_tokens: PositiveInt = 48
    # Passages in a result. Higher: more is found, and rows are longer.
    top_k: PositiveInt = 2
    # Tokens of a result and what stands around it. What is too long is cut at its end.
    max_result_tokens: PositiveInt = 112
    # Completions sampled at once. Higher: faster, more memory. Draws other random numbers.
    sample_rows: PositiveInt = 256

    # ---- the update

    # Stop after this many; 0 only evaluates.
    max_steps: OptionalInt = None
    # Passes over the prompts.
    epochs: PositiveInt = 1
    # Passes over a step's completions. Higher: more updates from the same samples, further
    # off-policy.
    epochs_per_step: PositiveInt = 1
    # Completions of an update. Lower: more updates a step; all but the first are off-policy, and
    # there the clip matters.
    train_batch_size: PositiveInt = 64
    # Tokens forwarded at once, padding included; a longer row goes alone. Higher: more memory, and
    # faster on a GPU, where real models take 4096. Changes the gradient by rounding only.
    micro_batch_tokens: PositiveInt = 1024
    # adamw8bit keeps its state in 8 bits (bitsandbytes).
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    # Learning rate of the embedded policy. Real models: 1e-6 for all weights, 1e-5 with LoRA.
    lr: NonNegativeFloat = 5e-5
    # A longer gradient is scaled down to this norm. Higher: that happens less often. 0: never.
    max_norm: NonNegativeFloat = 1.0
    # A token with a negative advantage is pushed down no further once its probability is below
    # its old one times 1 - clip_eps_low. Higher: larger moves within a step.
    clip_eps_low: Share = 0.2
    # One with a positive advantage is pushed up no further once above 1 + clip_eps_high times it.
    clip_eps_high: NonNegativeFloat = 0.2
    # Weight of the KL to the policy that training began with. Higher: stays closer. 0 needs no
    # reference.
    kl_weight: NonNegativeFloat = 0.01
    # How tokens are averaged, see token_weights in loss.py. There is no critic, only this name.
    critic_type: Literal["grpo", "drgrpo", "dapo"] = "grpo"
    # Reward of the right form. A right answer earns 1.
    format_weight: NonNegativeFloat = 0.1

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
    """(training prompts, held-out prompts, search). Prompts are checked, rendered, tokenised."""
    rows, eval_rows = read_train_and_eval_rows(config.data_path, config.eval_data_path)
    all_rows = rows + eval_rows
    rows, eval_rows = choose_rows(rows, eval_rows, config)
    prompts = [make_prompt(where, row, config, tokenizer) for where, row in rows]
    eval_prompts = [make_prompt(where, row, config, tokenizer) for where, row in eval_rows]
    warn_of_cuts(prompts + eval_prompts, config)
    return prompts, eval_prompts, open_search(config, all_rows)


def make_prompt(where: str, row: dict, config: Config, tokenizer) -> Prompt:
    """The prompt of a row. `where` is its file and line, for error texts."""
    question = text_of(where, row, "--question-field", config.question_field)
    golds = row.get(config.answer_field)
    if not isinstance(golds, list) or not golds:
        golds = [golds]
    name = config.answer_field
    golds = [text_of(where, {name: gold}, "--answer-field", name) for gold in golds]

    text = render_prompt(tokenizer, config.system_prompt + TOOL_PROMPT, question)
    # The template has written BOS already, where the model has one.
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) + config.max_new_tokens > config.max_length:
        budget = f"--max-length {config.max_length} - --max-new-tokens {config.max_new_tokens}"
        advice = "raise --max-length or shorten the prompt"
        fail(f"{where}: the prompt has {len(ids)} tokens, more than {budget}; {advice}")
    difficulty = str(row.get("difficulty") or "").lower()
    return Prompt(ids, golds, difficulty)


def prompts_of_step(prompts: list[Prompt], step: int, config: Config) -> list[Prompt]:
    """The prompts of a step (the first is 1). An epoch's order depends on (seed, epoch) alone."""
    steps_per_epoch = len(prompts) // config.rollouts_per_step
    epoch, position = divmod(step - 1, steps_per_epoch)
    generator = make_generator("cpu", config.seed, "epoch", epoch)
    order = torch.randperm(len(prompts), generator=generator)
    first = position * config.rollouts_per_step
    return [prompts[i] for i in order[first : first + config.rollouts_per_step]]


def make_generator(device, *key) -> torch.Generator:
    """Random numbers that depend on the key alone: a resumed run draws the same ones."""
    seed = random.Random(repr(key)).getrandbits(63)
    return torch.Generator(device).manual_seed(seed)


# ---------------------------------------------------------------- reward
FORM = r"\s*(?:<think>.*</think>)?\s*<answer>.*</answer>\s*"


def format_reward(completion: str) -> float:
    """1 where the completion is <answer> ... </answer>, after a <think> block or without."""
    for tag in ("<answer>", "</answer>"):
        if completion.count(tag) != 1:
            return 0.0
    if completion.count("<think>") > 1:
        return 0.0
    return 1.0 if re.fullmatch(FORM, completion, re.DOTALL) else 0.0


def reward(experience: "Trajectories", config: Config) -> dict[str, torch.Tensor]:
    """The parts of the reward, (group_size,) each; the reward is their sum.

    Only the policy's last turn is looked at, so what the environment wrote never pays. Calling the
    tool earns nothing in itself; a malformed call costs the form. A trajectory that was cut off
    earns nothing.
    """
    f1 = torch.zeros(len(experience.trajectories))
    form = torch.zeros(len(experience.trajectories))
    for i, trajectory in enumerate(experience.trajectories):
        f1[i] = f1_score(given_answer(trajectory), experience.answer)
        if trajectory.status == "answered" and "malformed" not in trajectory.outcomes:
            form[i] = format_reward(trajectory.turns[-1])
    return {"reward_f1": f1, "reward_format": config.format_weight * form}


# ---------------------------------------------------------------- sampling
ANSWER_NOW = "\nThat was the last call: answer now."


@dataclass
class Trajectory:
    """A prompt and all that followed it.

    Its ids are only ever appended to, and with them the mask. For example one call:

        ids     call the calculator .    its result .    the answer .
        mask    1    1   1          1    0   0      0    1   1      1
    """

    prompt: Prompt
    ids: list[int] = field(default_factory=list)  # behind the prompt
    mask: list[int] = field(default_factory=list)  # 1 = sampled, 0 = written by the environment
    log_probs: list[float] = field(default_factory=list)  # 0 for the environment's
    turns: list[str] = field(default_factory=list)  # the policy's
    outcomes: list[str] = field(default_factory=list)  # of calls: "ok", "failed", "malformed"
    results: list[str] = field(default_factory=list)  # of these calls, as the policy read them
    status: str = "active"  # in the end "answered", "max_turns" or "truncated"

    def append_sampled(self, ids: list[int], log_probs: list[float]) -> None:
        self.ids += ids
        self.mask += [1] * len(ids)
        self.log_probs += log_probs

    def append_given(self, ids: list[int]) -> None:
        self.ids += ids
        self.mask += [0] * len(ids)
        self.log_probs += [0.0] * len(ids)


@dataclass
class Trajectories(Experience):
    """An Experience whose completions are trajectories; `completions` holds their last turns."""

    trajectories: list[Trajectory] = field(default_factory=list)


@out_of_memory_names("sample_rows")
def rollout(
    policy,
    tokenizer,
    prompts: list[Prompt],
    group_size: int,
    config: Config,
    generator=None,
    *,
    tool,
) -> list[Trajectories]:
    """A group of `group_size` trajectories for every prompt; greedy without a generator.

    In each turn all that are still active are sampled together. `tool` is what calls are run by.
    """
    policy.eval()
    environment = Environment(tokenizer)
    eos_ids = environment.end_of_turn | find_eos_ids(policy, tokenizer)
    # The KV cache between turns has gaps, which a sliding window would count.
    keeps_cache = can_pack(unwrap(policy).config, 2 * config.max_length)
    trajectories = [Trajectory(prompt) for prompt in prompts for _ in range(group_size)]
    for start in range(0, len(trajectories), config.sample_rows):
        active = trajectories[start : start + config.sample_rows]
        memory = {} if keeps_cache else None
        for turn in range(1, config.max_turns + 1):
            histories = [trajectory.prompt.ids + trajectory.ids for trajectory in active]
            ids, log_probs = sample(policy, histories, eos_ids, config, generator, memory)
            for i, trajectory in enumerate(active):
                trajectory.append_sampled(ids[i].tolist(), log_probs[i].tolist())
                trajectory.turns.append(tokenizer.decode(ids[i], skip_special_tokens=True))
                turns_left = config.max_turns - turn
                respond(trajectory, environment, eos_ids, turns_left, config, tool)
            active = [trajectory for trajectory in active if trajectory.status == "active"]
            if not active:
                break
    groups = []
    for start in range(0, len(trajectories), group_size):
        groups.append(make_experience(trajectories[start : start + group_size]))
    return groups


def respond(
    trajectory: Trajectory, environment, eos_ids: set[int], turns_left: int, config: Config, tool
) -> None:
    """Run the call in the last turn and append its result, or end the trajectory."""
    call = parse_call(trajectory.turns[-1])
    if trajectory.ids[-1] not in eos_ids:
        trajectory.status = "truncated"
    elif call is None:
        trajectory.status = "answered"
    elif turns_left == 0:
        trajectory.status = "max_turns"
    else:
        outcome, result = run_call(call, tool)
        trajectory.outcomes.append(outcome)
        used = len(trajectory.prompt.ids) + len(trajectory.ids)
        room = config.max_length - used - config.max_new_tokens  # leaves a whole turn
        room = min(room, config.max_result_tokens)
        note = ANSWER_NOW if turns_left == 1 else ""
        ids = environment.ids(result, note, trajectory.ids[-1], room)
        if ids is None:
            trajectory.status = "truncated"
        else:
            trajectory.append_given(ids)
            trajectory.results.append(environment.tokenizer.decode(ids))


def make_experience(group: list[Trajectory]) -> Trajectories:
    """The tensors of a group of trajectories."""
    truncated = [float(trajectory.status == "truncated") for trajectory in group]
    return Trajectories(
        prompt_ids=torch.tensor(group[0].prompt.ids),
        completion_ids=[torch.tensor(trajectory.ids) for trajectory in group],
        completion_masks=[torch.tensor(trajectory.mask) for trajectory in group],
        sampled_log_probs=[torch.tensor(trajectory.log_probs) for trajectory in group],
        truncated=torch.tensor(truncated),
        completions=[trajectory.turns[-1] for trajectory in group],
        answer=group[0].prompt.answer,
        trajectories=group,
    )


# ---------------------------------------------------------------- advantages
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / std over a group (2402.03300, section 4.1.2). (group_size,) in and out.

    Ours: std divides by n - 1, and + 1e-4. Exactly 0 where all rewards are equal: their mean can
    be off by rounding, and dividing that by 1e-4 would make it an advantage.
    """
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


# ---------------------------------------------------------------- log-probs
def sequences_log_probs(model, micro_batch: MicroBatch, config: Config) -> torch.Tensor:
    """Log-probs of a micro-batch's sampled tokens under `model`, (sampled,), at least float32.

    It equals these lines, for every completion alone, with less work and less memory:

        logits = model(prompt_ids + completion_ids) / temperature    # (tokens, vocabulary)
        logits = logits[len(prompt_ids) - 1 : -1]                    # logits[t] predicts t + 1
        log_probs = log_softmax(logits)                              # (completion, vocabulary)
        return log_probs.gather(completion_ids)                      # (completion,)

    Less work: a row holds a group, packed. Less memory: only hidden states that predict a sampled
    token go through the output head, and where they are many, in chunks that the backward pass
    computes again.
    """
    base = unwrap(model)
    with autocast(config, model.device):
        mask_dtype = base.dtype  # the mask is added to attention scores, so it has their precision
        if config.precision != "float32":
            mask_dtype = getattr(torch, config.precision)
        decoder = base.get_decoder()  # the model without its output head, which follows below
        output = decoder(
            micro_batch.input_ids,  # (rows, tokens)
            attention_mask=micro_batch.attention_mask(mask_dtype),
            position_ids=micro_batch.position_ids,
            use_cache=False,
        )
        hidden = output.last_hidden_state.flatten(0, 1)  # (rows * tokens, hidden size)
        # index_select: its gradient repeats bit for bit on many threads, that of hidden[...] not.
        hidden = hidden.index_select(0, micro_batch.predicted_from)  # (sampled, hidden size)
        vocabulary = base.config.get_text_config().vocab_size
        chunk = max(1, 2**26 // vocabulary)  # tokens at once: 256 MB of float32 logits
        if len(hidden) <= chunk:  # a single one keeps its logits: the backward pass begins with it
            return token_log_probs(base, hidden, micro_batch.targets, config.temperature)
        log_probs = []
        for states, targets in zip(hidden.split(chunk), micro_batch.targets.split(chunk)):
            arguments = (base, states, targets, config.temperature)
            log_probs.append(checkpoint(token_log_probs, *arguments, use_reentrant=False))
    return torch.cat(log_probs)


def token_log_probs(base, hidden, targets, temperature: float) -> torch.Tensor:
    """log_softmax(logits / temperature) at the targets, which is minus the cross-entropy.

    hidden: (tokens, hidden size). Returns (tokens,).
    """
    logits = base.get_output_embeddings()(hidden)  # (tokens, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)  # Gemma
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if temperature != 1:  # a pass over all logits
        logits = logits / temperature
    return -cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def add_old_and_reference_log_probs(
    policy, reference, batches: list[list[MicroBatch]], config: Config
) -> None:
    """Fill in what the loss compares the policy with: log pi_old and log pi_ref.

    log pi_old is of the policy that sampled. Where it comes from differs by rounding and cost:

        first batch                no update came before it: its own training forward, detached
                                   (GRPOLoss does it). Free, and the first ratio is exactly 1
        later, float32             noted while sampling. Free, and off by rounding alone
        later, half precision      computed again, here: sampling rounds too differently
    """
    policy.eval()
    for batch in batches[1:]:
        for micro_batch in batch:
            if config.precision == "float32":
                micro_batch.old_log_probs = micro_batch.sampled_log_probs
            else:
                micro_batch.old_log_probs = sequences_log_probs(policy, micro_batch, config)
    if config.kl_weight:
        with as_reference(policy, reference) as model:
            for batch in batches:
                for micro_batch in batch:
                    log_probs = sequences_log_probs(model, micro_batch, config)
                    micro_batch.reference_log_probs = log_probs


# ---------------------------------------------------------------- evaluation
def evaluate(
    policy, tokenizer, prompts: list[Prompt], config: Config, search: Search
) -> dict[str, float]:
    """Greedy figures on the held-out prompts: exact match as it is rewarded, by any gold in the
    last turn, and without the tool (each call comes back with an error); then what concerns
    searching, in all and by difficulty."""
    experiences = rollout(policy, tokenizer, prompts, 1, config, tool=search)
    without_tool = rollout(policy, tokenizer, prompts, 1, config, tool=broken)
    trajectories = [e.trajectories[0] for e in experiences]
    lenient = [holds_gold(t.turns[-1], t.prompt.answer) for t in trajectories]
    figures = search_metrics(trajectories)
    evaluation = {
        "eval_accuracy": figures["em"],
        "eval_accuracy_lenient": sum(lenient) / len(prompts),
        "eval_accuracy_no_tool": search_metrics([e.trajectories[0] for e in without_tool])["em"],
        "eval_tool_use_rate": trajectory_metrics(trajectories)["tool_use_rate"],
        "eval_count": len(prompts),
    }
    evaluation |= {f"eval_{name}": value for name, value in figures.items()}
    for difficulty in sorted({prompt.difficulty for prompt in prompts} - {""}):
        suffix = re.sub(r"\W+", "_", f"_{difficulty}")
        part = [t for t in trajectories if t.prompt.difficulty == difficulty]
        for name, value in search_metrics(part).items():
            evaluation[f"eval_{name}{suffix}"] = value
    return evaluation


# ---------------------------------------------------------------- main
def main(config: Config) -> None:
    check_config(config)
    config, device = resolve(config)
    show_changed(config)
    tokenizer = load_tokenizer(config)
    prompts, eval_prompts, search = read_prompts(config, tokenizer)
    run = Run(config, EXPERIMENT, prompts)
    policy, reference = load_model(config, device, run.last_checkpoint)
    run.open()  # from here on it can be resumed
    evaluation = evaluate(policy, tokenizer, eval_prompts, config, search)
    print("held out:", evaluation)
    if config.max_steps == 0:
        return

    run.start(evaluation)
    optimizer = make_optimizer(policy, config, run.state.get("optimizer"))
    scaler = make_scaler(config, device, run.state.get("scaler"))
    objective = GRPOLoss(config.clip_eps_low, config.clip_eps_high, config.kl_weight)
    replay_buffer = ReplayBuffer(packed=can_pack(unwrap(policy).config, config.max_length))
    completion_log = CompletionLog(run, policy, sequences_log_probs, replay_buffer, tokenizer)
    steps_per_epoch = len(prompts) // config.rollouts_per_step
    last_step = config.epochs * steps_per_epoch
    if config.max_steps is not None:
        last_step = min(last_step, config.max_steps)

    for step in run.steps(last_step):
        # 1. Sample a group of trajectories for every prompt.
        step_start = time.time()
        step_prompts = prompts_of_step(prompts, step, config)
        generator = make_generator(device, config.seed, "sample", step)
        experiences = rollout(
            policy, tokenizer, step_prompts, config.group_size, config, generator, tool=search
        )
        sampling_end = time.time()

        # 2. Reward each trajectory, and compare it with its group.
        for experience in experiences:
            experience.reward_parts = reward(experience, config)
            experience.rewards = sum(experience.reward_parts.values())  # (group_size,)
            experience.advantages = group_advantages(experience.rewards)  # (group_size,)
        run.watch(step, experiences, tokenizer)  # warns where no group has spread

        # 3. Cut the groups into batches; add the old policy's and the reference's log-probs.
        replay_buffer.extend(experiences)
        completion_log.choose(step)  # which groups go to completions.jsonl
        generator = make_generator("cpu", config.seed, "batches", step)
        batches = []
        for batch in replay_buffer.batches(config, generator):
            batches.append([micro_batch.to(device) for micro_batch in batch])
        with out_of_memory_names("micro_batch_tokens"):  # if memory runs out, names it
            add_old_and_reference_log_probs(policy, reference, batches, config)

            # 4. Update the policy, once for every batch.
            policy.train()  # for gradient checkpointing; dropout is 0 (model.py)
            grad_norms = []
            for batch in batches * config.epochs_per_step:
                if not batch:
                    continue  # kl_weight is 0, and so is every advantage: no gradient
                for micro_batch in batch:
                    log_probs = sequences_log_probs(policy, micro_batch, config)  # (sampled,)
                    loss = objective(log_probs, micro_batch)
                    scaler.scale(loss).backward()  # scale: for float16, else it does nothing
                grad_norms.append(optimizer_step(policy, optimizer, scaler, config))
        run.check_updates(grad_norms)  # ends the run where none is finite any more
        replay_buffer.clear()

        # 5. Log, evaluate, save.
        trajectories = [t for e in experiences for t in e.trajectories]
        correct = torch.tensor(
            [exact_match(given_answer(t), t.prompt.answer) for t in trajectories]
        )
        metrics = {
            "elapsed_seconds": run.elapsed_seconds(),
            **rollout_metrics(experiences, correct),
            **trajectory_metrics(trajectories),
            **search_metrics(trajectories),
            **loss_metrics(objective.token_sums, grad_norms, config.max_norm),
            **speed_metrics(experiences, objective.token_sums, step_start, sampling_end),
            "lr": config.lr,
            "peak_memory": peak_memory(device),
        }
        objective.token_sums.clear()
        is_last = step == last_step
        if is_last or is_due(step, config.eval_interval):
            metrics |= evaluate(policy, tokenizer, eval_prompts, config, search)
        shown = None
        if completion_log.is_due(step):
            shown = show_trajectory(experiences[0], tokenizer)
            completion_log.write(step, batches)
        run.log(step, metrics, shown)
        if is_last or run.stop_requested or is_due(step, config.checkpoint_interval):
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            run.save(step, policy, tokenizer, state)
        if is_last:
            break
    run.close()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
