"""GRPO for a real language model, on a laptop: instructions that a program can verify.

Trains SmolLM2-135M-Instruct to follow instructions as in IFEval (arXiv 2311.07911), such as "use no
commas" or "end with these words".

    pip install -r requirements-ifeval.txt
    python data/get_smollm2.py                  # the model, once; half a minute
    python experiment_ifeval/train.py

Parent: experiment_base. What differs is the reward: the share of a prompt's instructions that an
answer follows, where it is about what was asked, and 0 where it is not. Without that condition the
policy learns to evade the request (README.md); --no-honest shows that.
"""

import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from completions import CompletionLog
from data import choose_rows, read_train_and_eval_rows, text_of
from instructions import (
    Judgement,
    Task,
    is_undecided,
    judge,
    judge_loosely,
    kinds_of,
    make_task,
)
from loss import GRPOLoss, loss_metrics
from model import (
    as_reference,
    autocast,
    base_model_of,
    can_pack,
    find_eos_ids,
    load_model,
    load_pretrained,
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
from replay_buffer import (
    Experience,
    MicroBatch,
    ReplayBuffer,
    cut_into_micro_batches,
    single_rows,
)
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
    show_group,
    speed_metrics,
)
from sampling import sample
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
    eval_interval: NonNegativeInt = 0
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

    # A directory (of a model or an adapter), or a name on the hub. data/get_smollm2.py makes this
    # one; the hub has it as HuggingFaceTB/SmolLM2-135M-Instruct.
    model_name: str = str(DATA / "smollm2")
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

    # Rows of google/IFEval's fields: .jsonl, .json, .parquet, or a hub data set.
    data_path: str = str(DATA / "ifeval.jsonl")
    # Default: <data>_eval.jsonl beside it, the hub's test split, or the last 10 %. google/IFEval
    # is the benchmark itself; its answers are longer.
    eval_data_path: str | None = None
    # The untrained model earns more with this prompt than with its template's own ("You are a
    # helpful AI assistant ...").
    system_prompt: str = "Answer briefly, and follow every instruction."
    # Training prompts, from the start of the file.
    max_prompts: PositiveInt = 2048
    # Held-out prompts. Higher: a steadier figure, and slower evaluations.
    max_eval_prompts: PositiveInt = 256
    # Kinds of instruction that are not trained on, with commas between: rows with one are left out.
    # The untrained model follows next to none of these four, so their groups have no spread.
    left_out_kinds: str = (
        "change_case:english_capital,change_case:english_lowercase,"
        "combination:repeat_prompt,length_constraints:nth_paragraph_first_word"
    )

    # ---- sampling

    # Completions of a prompt, at least 2. Higher: a better baseline, and more sampling.
    group_size: PositiveInt = 8
    # Prompts of a step. Higher: a less noisy gradient, and longer steps.
    rollouts_per_step: PositiveInt = 16
    # Every log-prob of the loss is taken at this temperature. At 1 nearly all answers of this small
    # model are nonsense and earn 0, so most groups have no spread.
    temperature: Temperature = 0.5
    # Tokens of prompt and completion together.
    max_length: PositiveInt = 512
    # Tokens of a completion. Higher: fewer are cut off, and sampling takes longer.
    max_new_tokens: PositiveInt = 80
    # Completions sampled at once. Higher: faster, more memory. Draws other random numbers.
    sample_rows: PositiveInt = 256

    # ---- the update

    # Stop after this many; 0 only evaluates. This many take 25 minutes on two cores, and answers
    # still become better then.
    max_steps: OptionalInt = 32
    # Passes over the prompts.
    epochs: PositiveInt = 1
    # Passes over a step's completions. Higher: more updates from the same samples, further
    # off-policy.
    epochs_per_step: PositiveInt = 1
    # Completions of an update. Lower: more updates a step; all but the first are off-policy, and
    # there the clip matters.
    train_batch_size: PositiveInt = 32
    # Tokens forwarded at once, padding included; a longer row goes alone. Higher: more memory, and
    # faster on a GPU, where real models take 4096. Changes the gradient by rounding only.
    micro_batch_tokens: PositiveInt = 1024
    # adamw8bit keeps its state in 8 bits (bitsandbytes).
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    # High for a real model. Larger ones: 1e-6 for all weights, 1e-5 with LoRA.
    lr: NonNegativeFloat = 5e-5
    # A longer gradient is scaled down to this norm. Higher: that happens less often. 0: never.
    max_norm: NonNegativeFloat = 1.0
    # A token with a negative advantage is pushed down no further once its probability is below
    # its old one times 1 - clip_eps_low. Higher: larger moves within a step.
    clip_eps_low: Share = 0.2
    # One with a positive advantage is pushed up no further once above 1 + clip_eps_high times it.
    clip_eps_high: NonNegativeFloat = 0.28
    # Weight of the KL to the policy that training began with. Higher: stays closer. 0 needs no
    # reference.
    kl_weight: NonNegativeFloat = 0.0
    # How tokens are averaged, see token_weights in loss.py. There is no critic, only this name.
    critic_type: Literal["grpo", "drgrpo", "dapo"] = "dapo"
    # Answers that are off topic or cut off earn nothing. Off: they earn whatever they say, and the
    # policy learns to evade the request.
    honest: bool = True

    @property
    def generate_max_length(self) -> int:
        """The most tokens that a completion may sample."""
        return self.max_new_tokens


# ---------------------------------------------------------------- prompts
@dataclass
class Prompt:
    ids: list[int]
    task: Task


def read_prompts(config: Config, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), checked, rendered by the chat template, tokenised."""
    rows, eval_rows = read_train_and_eval_rows(config.data_path, config.eval_data_path)
    rows = without_undecided(rows, "training")
    eval_rows = without_undecided(eval_rows, "held-out")
    rows, eval_rows = choose_rows(rows, eval_rows, config, left_out_by)
    prompts = [make_prompt(where, row, config, tokenizer) for where, row in rows]
    eval_prompts = [make_prompt(where, row, config, tokenizer) for where, row in eval_rows]
    return prompts, eval_prompts


def without_undecided(rows: list[tuple[str, dict]], what: str) -> list[tuple[str, dict]]:
    """The rows that can be judged here; says how many cannot."""
    decided = [(where, row) for where, row in rows if not is_undecided(where, row)]
    if len(decided) < len(rows):
        print(f"{len(rows) - len(decided)} {what} prompts cannot be judged (README.md)")
    return decided


def kinds_left_out(config: Config) -> list[str]:
    """The kinds that left_out_kinds names, each of which must be known."""
    kinds = [kind.strip() for kind in config.left_out_kinds.split(",") if kind.strip()]
    return kinds_of("--left-out-kinds", {"instruction_id_list": kinds}) if kinds else []


def left_out_by(where: str, row: dict, config: Config) -> str:
    """The constant that leaves a row out; "" where it is selected."""
    is_left_out = set(kinds_left_out(config)) & set(kinds_of(where, row))
    return "left_out_kinds" if is_left_out else ""


def make_prompt(where: str, row: dict, config: Config, tokenizer) -> Prompt:
    """The prompt of a row. `where` is its file and line, for error texts."""
    task = make_task(where, row)
    text = text_of(where, row, "the format of google/IFEval", "prompt")
    text = render_prompt(tokenizer, config.system_prompt, text)
    # The template has written BOS already, where the model has one.
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) + config.max_new_tokens > config.max_length:
        budget = f"--max-length {config.max_length} - --max-new-tokens {config.max_new_tokens}"
        advice = "raise --max-length or shorten the prompt"
        fail(f"{where}: the prompt has {len(ids)} tokens, more than {budget}; {advice}")
    return Prompt(ids, task)


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
def judge_group(experience: Experience) -> list[Judgement]:
    """What each completion of a group is worth."""
    return [judge(completion, experience.answer) for completion in experience.completions]


def reward(
    experience: Experience, judgements: list[Judgement], config: Config
) -> dict[str, torch.Tensor]:
    """The parts of the reward, (group_size,) each; the reward is their sum.

    The share of its instructions that a completion follows. The honest reward is 0 where it is
    about something else, or where the token budget cut it off.
    """
    earned = torch.tensor([judgement.share for judgement in judgements])
    if config.honest:
        earned *= torch.tensor([judgement.on_topic for judgement in judgements])
        earned *= 1 - experience.truncated
    return {"reward_instructions": earned}


def is_right(judgements: list[Judgement]) -> torch.Tensor:
    """(completions,), 1 where every instruction is followed and the answer is on topic."""
    return torch.tensor([judgement.is_right for judgement in judgements]).float()


def instruction_metrics(
    experiences: list[Experience], judgements: list[Judgement]
) -> dict[str, float]:
    """What a step's completions say beside their reward."""
    distinct = [len(set(e.completions)) / len(e.completions) for e in experiences]
    return {
        "accuracy": is_right(judgements).mean().item(),
        "instructions": sum(judgement.share for judgement in judgements) / len(judgements),
        "on_topic": share([judgement.on_topic for judgement in judgements]),
        "distinct_fraction": sum(distinct) / len(distinct),  # of a group's completions
    }


# ---------------------------------------------------------------- sampling
@out_of_memory_names("sample_rows")
def rollout(
    policy, tokenizer, prompts: list[Prompt], group_size: int, config: Config, generator=None
) -> list[Experience]:
    """A group of `group_size` completions for every prompt; greedy without a generator."""
    policy.eval()
    eos_ids = find_eos_ids(policy, tokenizer)
    prompts_at_once = max(1, config.sample_rows // group_size)
    experiences = []
    for start in range(0, len(prompts), prompts_at_once):
        chunk = prompts[start : start + prompts_at_once]
        histories = [prompt.ids for prompt in chunk for _ in range(group_size)]
        ids, log_probs = sample(policy, histories, eos_ids, config, generator)
        for i, prompt in enumerate(chunk):
            group = slice(i * group_size, (i + 1) * group_size)
            truncated = [float(row[-1].item() not in eos_ids) for row in ids[group]]
            experience = Experience(
                prompt_ids=torch.tensor(prompt.ids),
                completion_ids=ids[group],
                completion_masks=[torch.ones_like(row) for row in ids[group]],  # all sampled
                sampled_log_probs=log_probs[group],
                truncated=torch.tensor(truncated),
                completions=tokenizer.batch_decode(ids[group], skip_special_tokens=True),
                answer=prompt.task,  # what the completions are judged by
            )
            experiences.append(experience)
    return experiences


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
def share(values: list[bool]) -> float:
    """The share that is true; 0 of an empty list."""
    return sum(values) / max(len(values), 1)


def evaluate(
    policy, reference, tokenizer, prompts: list[Prompt], config: Config
) -> dict[str, float]:
    """Greedy answers: IFEval's four metrics, of all answers and of those on topic; each kind's
    share; how many are on topic; lengths, and how likely the starting model finds them.

    eval_accuracy: every instruction is followed, strictly, and the answer is on topic. As in
    IFEval, an answer that the token budget cut off counts like any other.
    """
    experiences = rollout(policy, tokenizer, prompts, 1, config)
    judgements = [judge_group(experience)[0] for experience in experiences]
    strict = [judgement.strict for judgement in judgements]
    loose = [judge_loosely(e.completions[0], e.answer) for e in experiences]
    on_topic = [judgement.on_topic for judgement in judgements]
    metrics = {"eval_accuracy": share([judgement.is_right for judgement in judgements])}
    metrics["eval_on_topic"] = share(on_topic)
    for mode, verdicts in (("strict", strict), ("loose", loose)):  # instructions, of each answer
        chosen = [verdict for verdict, is_chosen in zip(verdicts, on_topic) if is_chosen]
        for suffix, part in (("", verdicts), ("_on_topic", chosen)):
            metrics[f"eval_prompt_{mode}{suffix}"] = share([all(v) for v in part])
            metrics[f"eval_instruction_{mode}{suffix}"] = share([x for v in part for x in v])
    lengths = [float(len(experience.completion_ids[0])) for experience in experiences]
    metrics["eval_length"] = sum(lengths) / len(lengths)
    metrics["eval_truncated"] = torch.cat([e.truncated for e in experiences]).mean().item()
    metrics |= start_perplexity(policy, reference, experiences, config)
    metrics["eval_count"] = len(prompts)
    return metrics | by_kind(prompts, judgements)


def by_kind(prompts: list[Prompt], judgements: list[Judgement]) -> dict[str, float]:
    """Of the instructions of each kind, the share that is followed."""
    followed = defaultdict(list)
    for prompt, judgement in zip(prompts, judgements):
        for kind, verdict in zip(prompt.task.kinds, judgement.strict):
            followed[kind].append(verdict)
    return {f"eval_kind/{kind}": share(followed[kind]) for kind in sorted(followed)}


@torch.no_grad()
def start_perplexity(policy, reference, experiences: list[Experience], config: Config) -> dict:
    """exp(-mean log-prob of a token) of the answers under the policy that training began with.

    Text that a language model would not write has a high one, and endless repetition a low one.
    Where no reference is in memory, it is read for this. {} with --max-steps 0.
    """
    if config.max_steps == 0:
        return {}
    config = replace(config, temperature=1.0)
    if reference is None and not hasattr(policy, "peft_config"):
        name = base_model_of(config.model_name)
        reference = load_pretrained(name, config, policy.device, trainable=False).eval()
    rows = []
    for experience in experiences:
        # A row carries advantages and weights for the loss, which is not taken here.
        experience.advantages = torch.zeros(1)
        rows += single_rows(experience, [torch.zeros_like(experience.completion_masks[0])])
    log_probs = []
    with as_reference(policy, reference) as model:
        for micro_batch in cut_into_micro_batches(rows, config.micro_batch_tokens, packed=False):
            micro_batch = micro_batch.to(model.device)
            log_probs.append(sequences_log_probs(model, micro_batch, config))
    return {"eval_start_perplexity": math.exp(-torch.cat(log_probs).mean().item())}


# ---------------------------------------------------------------- main
def main(config: Config) -> None:
    check_config(config)
    if config.model_name == Config.model_name and not Path(config.model_name).is_dir():
        hub = "with a model hub, --model-name HuggingFaceTB/SmolLM2-135M-Instruct"
        fail(f"{config.model_name} is missing: run `python data/get_smollm2.py`, or, {hub}")
    config, device = resolve(config)
    show_changed(config)
    tokenizer = load_tokenizer(config)
    prompts, eval_prompts = read_prompts(config, tokenizer)
    run = Run(config, EXPERIMENT, prompts)
    policy, reference = load_model(config, device, run.last_checkpoint)
    run.open()  # from here on it can be resumed
    evaluation = evaluate(policy, reference, tokenizer, eval_prompts, config)
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
        # 1. Sample a group of completions for every prompt.
        step_start = time.time()
        step_prompts = prompts_of_step(prompts, step, config)
        generator = make_generator(device, config.seed, "sample", step)
        experiences = rollout(policy, tokenizer, step_prompts, config.group_size, config, generator)
        sampling_end = time.time()

        # 2. Reward each completion, and compare it with its group.
        judgements = []
        for experience in experiences:
            group = judge_group(experience)
            judgements += group
            experience.reward_parts = reward(experience, group, config)
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
        metrics = {
            "elapsed_seconds": run.elapsed_seconds(),
            **rollout_metrics(experiences, is_right(judgements)),
            **instruction_metrics(experiences, judgements),
            **loss_metrics(objective.token_sums, grad_norms, config.max_norm),
            **speed_metrics(experiences, objective.token_sums, step_start, sampling_end),
            "lr": config.lr,
            "peak_memory": peak_memory(device),
        }
        objective.token_sums.clear()
        is_last = step == last_step
        if is_last or is_due(step, config.eval_interval):
            metrics |= evaluate(policy, reference, tokenizer, eval_prompts, config)
        shown = None
        if completion_log.is_due(step):
            shown = show_group(experiences, tokenizer)
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
