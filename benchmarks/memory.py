"""Does it fit? The peak memory of experiment_base on a GPU, computed without one.

    python benchmarks/memory.py --model-name Qwen/Qwen2.5-1.5B-Instruct --lora-rank 16 --card 24 \\
        --max-length 1024 --max-new-tokens 512 --micro-batch-tokens 4096 --prompt-tokens 300
    python benchmarks/memory.py --table               # of many models, in 6 minutes
    python benchmarks/memory.py --measured            # held against what a card has shown
    python benchmarks/memory.py --resident            # and against what this CPU shows

Give it the flags of your training command: it takes all of train.py's, with the same defaults. The
models of shapes.py need no download; of any other one the config is read.

The real code runs (load_model, sequences_log_probs, GRPOLoss, sample_captured) on fake tensors,
which have shapes but no memory, and every allocation is counted for as long as it lives. What a
GPU does otherwise than a CPU is put in its place: memory-efficient attention, 4-bit weights, the
optimizer's state.

The figures are PyTorch's own (`torch.cuda.max_memory_allocated`), when all completions part at once
and reach their full length. CUDA itself takes about 1 GiB more, and about a tenth is lost between
allocations: "card" counts both.
"""

import datetime
import gc
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
import tyro
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiment_base"))
sys.path.append(str(ROOT / "tools"))
import captured  # noqa: E402
import kv_cache  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from run import NonNegativeFloat, OptionalInt  # noqa: E402
from runner import fail, flag_of, write_aside  # noqa: E402
from shapes import SHAPES, model_config_of  # noqa: E402

GIB = 2**30
LENGTHS = (512, 2048)  # new tokens, in the table
GRANULE = 512  # bytes; PyTorch's allocator rounds up to them
PHASES = ("training", "sampling", "evaluation")
FEW_LAYERS = (2, 3)  # that are simulated
CUDA_GIB = 1  # what CUDA itself takes of a card
LOST = 0.1  # of what PyTorch allocates, between its allocations
# What the table assumes, and what was measured on a card.
SETTING = {
    "prompt_tokens": 150,
    "max_new_tokens": 512,
    "micro_batch_tokens": 4096,
    "sample_rows": 64,
}
# The most that is estimated in reasonable time.
MOST = {
    "group_size": 1024,
    "lora_rank": 65_536,
    "micro_batch_tokens": 65_536,
    "sample_rows": 65_536,
}


@dataclass
class Case(train.Config):
    """All constants of experiment_base/train.py, on a GPU, and how long its prompts are."""

    # Tokens of the longest prompt. Default: what max_length leaves beside max_new_tokens.
    prompt_tokens: OptionalInt = None

    def __post_init__(self) -> None:
        if self.precision == "auto":
            self.precision = "bfloat16"  # float16, on older cards, is as large
        if self.prompt_tokens is None:
            self.prompt_tokens = self.max_length - self.max_new_tokens


@dataclass
class Options(Case):
    # GiB of your card, nvidia-smi's MiB / 1024, such as 22.5 for an L4. Adds the largest
    # micro_batch_tokens and sample_rows that fit.
    card: NonNegativeFloat = 0.0
    # Only write results/memory.json, the table of all models of shapes.py.
    table: bool = False
    # Only hold the estimates against results/memory_h100.json.
    measured: bool = False
    # Only hold the method against the resident memory of small models on this CPU.
    resident: bool = False


# ---------------------------------------------------------------- counting
class Counter(TorchDispatchMode):
    """The bytes of all storages that are alive, and the most that were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, FakeTensor):
                self.see(tensor.untyped_storage())
        return output

    def see(self, storage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = -(-storage.nbytes() // GRANULE) * GRANULE
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def take_peak(self) -> int:
        gc.collect()
        peak = self.peak
        self.peak = self.now
        return peak


# ---------------------------------------------------------------- what a GPU does otherwise
class EfficientAttention(torch.autograd.Function):
    """What torch's memory-efficient attention allocates and keeps for the backward pass."""

    @staticmethod
    def forward(context, query, key, value, mask):
        rows, heads, tokens, _ = query.shape
        if mask is not None and mask.shape[-1] % 8:  # the kernel wants rows of 16 bytes: a copy
            mask = torch.nn.functional.pad(mask, (0, 8 - mask.shape[-1] % 8))
        output = torch.empty_like(query)
        sums = query.new_empty(rows, heads, -(-tokens // 32) * 32, dtype=torch.float32)
        context.save_for_backward(query, key, value, mask, output, sums)
        return output

    @staticmethod
    def backward(context, gradient):
        query, key, value, mask, output, sums = context.saved_tensors
        gradient = gradient.contiguous()
        delta = sums.new_empty(sums.shape)
        result = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None)
        del delta
        return result


def efficient_attention(query, key, value, attn_mask=None, **_):
    return EfficientAttention.apply(query, key, value, attn_mask)


class Linear4bit(torch.nn.Linear):
    """The memory of bitsandbytes' nf4 layer with doubly quantised scales."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        count = linear.weight.numel()
        self.half = torch.bfloat16
        packed = torch.empty(count // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.scales = torch.empty(count // 64, dtype=torch.uint8)  # of blocks of 64
        self.bias = linear.bias

    def forward(self, hidden):
        return Product4bit.apply(hidden.to(self.half), self)


class Product4bit(torch.autograd.Function):
    """The weights are unpacked for the product, and once more for its backward pass."""

    @staticmethod
    def forward(context, hidden, layer):
        context.layer = layer
        weight = torch.empty(layer.out_features, layer.in_features, dtype=hidden.dtype)
        output = torch.nn.functional.linear(hidden, weight)
        return output if layer.bias is None else output + layer.bias.to(hidden.dtype)

    @staticmethod
    def backward(context, gradient):
        layer = context.layer
        weight = torch.empty(layer.out_features, layer.in_features, dtype=gradient.dtype)
        return gradient @ weight, None


def make_model(name: str, config, device, trainable: bool, layers: int | None = None):
    """Instead of load_pretrained: a model of that shape, with random weights or fake ones."""
    dtype = torch.float32 if trainable else getattr(torch, config.precision)
    shape = model_config_of(name)
    if layers:
        shape.num_hidden_layers = layers
        if hasattr(shape, "layer_types"):
            shape.layer_types = shape.layer_types[:1] * layers
    made = transformers.AutoModelForCausalLM.from_config(
        shape, dtype=dtype, attn_implementation="sdpa"
    )
    if config.load_in_4bit:
        head = made.get_output_embeddings()
        for module in list(made.modules()):
            for key, child in module.named_children():
                if type(child) is torch.nn.Linear and child is not head:
                    setattr(module, key, Linear4bit(child))
    return made


def halve(reference, config) -> None:
    """Instead of halve_linear_layers: fake weights cannot be replaced in place."""
    for module in reference.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            for name, parameter in list(module.named_parameters()):
                half = parameter.detach().to(getattr(torch, config.precision))
                setattr(module, name, torch.nn.Parameter(half, requires_grad=False))


def optimizer_state(policy, config) -> list:
    """Two moments of every trained weight. adamw8bit keeps those of at least 4,096 weights in 8
    bits, with a float32 scale for every 256."""
    state = []
    for parameter in policy.parameters():
        if not parameter.requires_grad:
            continue
        for _ in range(2):
            if config.optimizer == "adamw8bit" and parameter.numel() >= 4096:
                state.append(torch.empty(parameter.shape, dtype=torch.uint8))
                state.append(torch.empty(-(-parameter.numel() // 256)))
            else:
                state.append(torch.empty_like(parameter))
    return state


@contextmanager
def fake_gpu(layers: int):
    """Fake tensors, counted, and models of so many layers; yields (counter, fake mode)."""
    attention = "torch.nn.functional.scaled_dot_product_attention"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        mock.patch(attention, efficient_attention),
        mock.patch.object(model, "load_pretrained", partial(make_model, layers=layers)),
        mock.patch.object(model, "base_model_of", lambda name: name),
        mock.patch.object(model, "halve_linear_layers", halve),
        mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module),
        mode,
        Counter() as counter,
    ):
        yield counter, mode


# ---------------------------------------------------------------- the simulation
def largest_micro_batches(case: Case) -> list:
    """Those that may need most: of the most tokens, and of the largest attention mask.

    Completions of full length may leave room in a micro-batch, as real ones of all lengths do not.
    """
    group_tokens = case.prompt_tokens + case.group_size * case.max_new_tokens
    rows = -(-case.micro_batch_tokens // group_tokens)
    filling = (case.micro_batch_tokens // rows - case.prompt_tokens) // case.group_size
    lengths = {case.max_new_tokens, max(1, min(filling, case.max_new_tokens))}
    found = [largest_micro_batch(case, length) for length in sorted(lengths)]
    most_tokens = max(found, key=lambda batch: batch.input_ids.numel())
    largest_mask = max(found, key=lambda batch: batch.input_ids.numel() * batch.input_ids.shape[1])
    return [most_tokens] if largest_mask is most_tokens else [most_tokens, largest_mask]


def largest_micro_batch(case: Case, length: int):
    """Of an update with random completions of this length, which share nothing but the prompt."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model_config_of(case.model_name).vocab_size

    def random_ids(count: int) -> torch.Tensor:
        return torch.randint(vocabulary, (count,), generator=generator)

    enough = 1 + case.micro_batch_tokens // (case.prompt_tokens + case.group_size * length)
    groups = min(enough, case.train_batch_size // case.group_size)
    buffer = train.ReplayBuffer(packed=True)
    for _ in range(groups):
        ids = [random_ids(length) for _ in range(case.group_size)]
        experience = train.Experience(
            prompt_ids=random_ids(case.prompt_tokens),
            completion_ids=ids,
            completion_masks=[torch.ones_like(row) for row in ids],
            sampled_log_probs=[torch.zeros(len(row)) for row in ids],
            truncated=torch.zeros(case.group_size),
            completions=[""] * case.group_size,
            answer="",
            advantages=torch.arange(float(case.group_size)),
        )
        buffer.extend([experience])
    config = replace(case, train_batch_size=groups * case.group_size)
    (micro_batches,) = buffer.batches(config, generator)
    micro_batch = max(micro_batches, key=lambda micro_batch: micro_batch.input_ids.numel())
    micro_batch.old_log_probs = micro_batch.sampled_log_probs
    micro_batch.reference_log_probs = micro_batch.sampled_log_probs if case.kl_weight else None
    return micro_batch


def estimate(case: Case, phases: tuple[str, ...] = PHASES, micro_batches=None) -> dict[str, int]:
    """Bytes at the peak of each phase.

    All layers are alike, so at any moment memory is a straight line in their number: few are
    simulated, and the line through them goes on. A phase's peak is that of its moments.
    """
    if micro_batches is None and "training" in phases:
        micro_batches = largest_micro_batches(case)
    few, more = FEW_LAYERS
    first = simulate(case, phases, few, micro_batches)
    second = simulate(case, phases, more, micro_batches)
    beyond = (model_config_of(case.model_name).num_hidden_layers - few) / (more - few)
    peaks = {}
    for phase in phases:
        moments = zip(first[phase], second[phase])
        peaks[phase] = round(max(low + beyond * (high - low) for low, high in moments))
    return peaks


def simulate(
    case: Case, phases: tuple[str, ...], layers: int, micro_batches
) -> dict[str, list[int]]:
    """Bytes at the peak of each moment of the phases, with so many layers."""
    if case.lora_rank:
        import peft  # noqa: F401  # now, because a library's own tensors must not be fake
    gc.freeze()  # what libraries have made: take_peak's collections pass over it
    with fake_gpu(layers) as (counter, mode):
        policy, reference = train.load_model(case, torch.device("cpu"))
        model.let_autocast_cast(policy)
        state = optimizer_state(policy, case)
        moments = {}
        if "training" in phases:
            moments["training"] = []
            for micro_batch in micro_batches:
                fake = micro_batch_of_fakes(micro_batch, mode)
                moments["training"] += train_once(policy, fake, case, counter)
        if "sampling" in phases:
            prompts, group_size = case.rollouts_per_step, case.group_size
            moments["sampling"] = sample_once(policy, prompts, group_size, case, counter)
        if "evaluation" in phases:
            moments["evaluation"] = sample_once(policy, case.max_eval_prompts, 1, case, counter)
        del state, reference  # alive until here
    return moments


def micro_batch_of_fakes(micro_batch, mode: FakeTensorMode):
    tensors = {k: v for k, v in vars(micro_batch).items() if isinstance(v, torch.Tensor)}
    return replace(micro_batch, **{name: mode.from_tensor(v) for name, v in tensors.items()})


def train_once(policy, micro_batch, config, counter: Counter) -> list[int]:
    """A micro-batch that is not the update's first: gradients are there already."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    counter.take_peak()
    objective = train.GRPOLoss(config.clip_eps_low, config.clip_eps_high, config.kl_weight)
    policy.train()
    loss = objective(train.sequences_log_probs(policy, micro_batch, config), micro_batch)
    forward = counter.take_peak()
    loss.backward()
    backward = counter.take_peak()
    objective.token_sums.clear()
    policy.zero_grad()
    return [forward, backward]


@torch.no_grad()
def sample_once(policy, prompts: int, group_size: int, config, counter: Counter) -> list[int]:
    """The forward of all prompts, and that of the last token of all completions.

    last_token and last_token_captured yield where a moment ends.
    """
    policy.eval()
    prompts = min(prompts, config.sample_rows // group_size)  # at once
    rows = [tuple(range(config.prompt_tokens))] * prompts
    row_of = torch.arange(prompts * group_size) // group_size
    if config.load_in_4bit or config.precision == "float32":
        moments = last_token(policy, rows, row_of, config)
    else:
        moments = last_token_captured(policy, rows, row_of, config)
    counter.take_peak()  # that of what came before, such as loading
    return [counter.take_peak() for _ in moments]


def last_token_captured(policy, rows, row_of, config):
    """As sample_captured, when no completion has ended."""
    with captured.PlainModel(policy, config) as plain:
        yield
        cache, mask, logits = kv_cache.prefill(plain, rows, None)
        yield
        decoder = captured.Decoder(plain, cache, mask, config)
        del cache, mask
        row_log_probs = model.next_log_probs(logits, config)
        captured.draw_tokens(row_log_probs, row_of, None)
        torch.empty_like(row_log_probs[row_of])  # the random numbers
        del logits, row_log_probs
        with mock.patch.object(captured, "BLOCK", config.max_new_tokens):  # all columns
            decoder.begin_block(row_of)
        yield
        decoder.one_token()
        torch.empty_like(decoder.log_probs), torch.empty_like(decoder.log_probs)  # noise, scores
        yield


def last_token(policy, rows, row_of, config):
    """As sample_plainly, when all completions have parted and none has ended."""
    past = len(rows[0]) + config.max_new_tokens - 1
    half = config.precision != "float32"
    with torch.autocast("cpu", getattr(torch, config.precision), enabled=half):
        cache, mask, logits = kv_cache.prefill(policy, rows, None)
        yield
        cache.reorder_cache(row_of)
        for layer in cache.layers:
            shape = list(layer.room.shape)
            shape[-2] = past
            layer.make_room(layer.room.new_empty(shape))
        yield
        output = policy(
            row_of[:, None],
            attention_mask=torch.ones(len(row_of), past + 1, dtype=torch.long),
            position_ids=row_of[:, None],
            past_key_values=cache,
        )
        log_probs = model.next_log_probs(output.logits, config)[row_of]
        probs = log_probs.exp()
        torch.empty_like(probs)  # multinomial's random numbers
        yield


# ---------------------------------------------------------------- answers
MODES = {
    "LoRA": {"lora_rank": 16},
    "LoRA, 4 bits": {"lora_rank": 16, "load_in_4bit": True},
    "full, adamw8bit": {"optimizer": "adamw8bit"},
    "full, adamw": {},
}


def needed(peak: float) -> float:
    """GiB of a card, of which PyTorch allocates `peak` bytes."""
    return (1 + LOST) * peak / GIB + CUDA_GIB


def answer(case: Case, card: float) -> None:
    sizes, counts = micro_batch_sizes(case), row_counts(case)
    parts = [
        (case, ("training",), "micro_batch_tokens", sizes, card),
        (case, ("sampling", "evaluation"), "sample_rows", counts, card),
    ]
    quietly = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's affair
    with multiprocessing.Pool(2, signal.signal, quietly) as pool:
        (training, most_tokens), (sampling, most_rows) = pool.starmap(peaks_and_largest, parts)
    peaks = training | sampling
    print(described(case))
    print(f"{'GiB':10} {'PyTorch':>8} {'card':>8}")
    for phase, peak in peaks.items():
        print(f"{phase:10} {peak / GIB:8.1f} {needed(peak):8.1f}")
    print(f"An estimate: of a card we assume {LOST:.0%} more than PyTorch allocates, and 1 GiB.")
    if card:
        too_large = [phase for phase, peak in peaks.items() if needed(peak) > card]
        if too_large:
            print(f"Does not fit into {card:g} GiB: {' and '.join(too_large)}. What fits:")
        else:
            print(f"Fits into {card:g} GiB. What fits at most:")
        print(f"    {largest_flag('micro_batch_tokens', most_tokens, sizes, case)}")
        print(f"    {largest_flag('sample_rows', most_rows, counts, case)}")


def described(case: Case) -> str:
    """The model, the flags that its memory depends on, and the length of prompts."""
    always = ("max_new_tokens", "micro_batch_tokens", "sample_rows")
    names = ("lora_rank", "load_in_4bit", "optimizer", "gradient_checkpointing", "kl_weight")
    parts = [case.model_name]
    for name in (*names, "group_size", *always):
        value = getattr(case, name)
        if value is True:
            parts.append(flag_of(name))
        elif name in always or value != getattr(Case, name):
            parts.append(f"{flag_of(name)} {value}")
    prompts = f"with prompts of {case.prompt_tokens} tokens"
    if case.prompt_tokens == case.max_length - case.max_new_tokens:
        prompts += ", all that --max-length leaves (--prompt-tokens: your longest)"
    return f"{' '.join(parts)}\n{prompts}"


def largest_flag(constant: str, largest: int | None, tried: list[int], case: Case) -> str:
    """The flag with the largest value that fits, or what needs less where none does."""
    if largest is not None:
        return f"{flag_of(constant)} {largest}{' or more' if largest >= tried[-1] else ''}"
    trains = constant == "micro_batch_tokens"
    less = {
        "--gradient-checkpointing": trains and not case.gradient_checkpointing,
        "--lora-rank 16": not case.lora_rank,
        "--optimizer adamw8bit": not case.lora_rank and case.optimizer == "adamw",
        "--load-in-4bit": case.lora_rank and not case.load_in_4bit,
        "fewer --max-new-tokens": True,
        "a smaller model": True,
    }
    changes = ", ".join(change for change, is_left in less.items() if is_left)
    return f"no {flag_of(constant)}. Less is needed with: {changes}"


def peaks_and_largest(
    case: Case, phases: tuple[str, ...], constant: str, values: list[int], card: float
) -> tuple[dict[str, int], int | None]:
    """The peaks of the phases, and the largest value of the constant with which they fit.

    Where the case itself fits, larger values are tried one after the other, otherwise smaller.
    """
    peaks = estimate(case, phases)
    if not card:
        return peaks, None

    def fits(peaks: dict[str, int]) -> bool:
        return needed(max(peaks.values())) <= card

    own = getattr(case, constant)
    if not fits(peaks):
        for value in reversed(values):
            if value < own and fits(estimate(replace(case, **{constant: value}), phases)):
                return peaks, value
        return peaks, None
    largest = own
    for value in values:
        if value > own:
            if not fits(estimate(replace(case, **{constant: value}), phases)):
                break
            largest = value
    return peaks, largest


def micro_batch_sizes(case: Case) -> list[int]:
    """Powers of two that hold a whole completion, up to 16,384."""
    length = case.prompt_tokens + case.max_new_tokens
    sizes = [2**power for power in range(8, 15) if 2**power >= length]
    return sizes or [length]


def row_counts(case: Case) -> list[int]:
    """From one group on, doubled up to 512."""
    counts = [case.group_size * 2**power for power in range(9)]
    return [count for count in counts if count <= 512] or [case.group_size]


def table() -> None:
    """All models of shapes.py: what a card needs, and the peaks behind it."""
    rows = []
    for model_name in SHAPES:
        for mode, changes in MODES.items():
            for new in LENGTHS:
                names = {"model_name": model_name, "max_new_tokens": new}
                case = Case(**(SETTING | names | changes))
                saving = replace(case, gradient_checkpointing=True)
                peaks = estimate(case)
                peaks["training with checkpointing"] = estimate(saving, ("training",))["training"]
                rows.append({"model": model_name, "mode": mode, "new": new, "bytes": peaks})
                print(model_name, mode, new, file=sys.stderr, flush=True)
    report = {
        "command": "python benchmarks/memory.py --table",
        "date": datetime.date.today().isoformat(),
        "needed": needed_of_all(rows),
        "peaks": peaks_of_all(rows),
        "rows": rows,
    }
    write_aside(ROOT / "results" / "memory.json", json.dumps(report, indent=1) + "\n")
    print("\n".join([*report["needed"], "", *report["peaks"]]))


def needed_of_all(rows: list[dict]) -> list[str]:
    """Markdown: GiB of a card in all phases, with checkpointing, for each length."""
    cards = {}
    for row in rows:
        peak = max(size for phase, size in row["bytes"].items() if phase != "training")
        cards[row["model"], row["mode"], row["new"]] = str(math.ceil(needed(peak)))
    lines = [f"| | {' | '.join(MODES)} |", "|---" * (1 + len(MODES)) + "|"]
    for name in SHAPES:
        cells = [name]
        cells += [" / ".join(cards[name, mode, new] for new in LENGTHS) for mode in MODES]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def peaks_of_all(rows: list[dict]) -> list[str]:
    """Markdown: the peak of every phase, as PyTorch counts, in GiB."""
    phases = list(rows[0]["bytes"])
    lines = [f"| model | | new tokens | {' | '.join(phases)} |"]
    lines.append("|---" * (3 + len(phases)) + "|")
    for row in rows:
        cells = [row["model"], row["mode"], f"{row['new']:,}"]
        cells += [f"{row['bytes'][phase] / GIB:.1f}" for phase in phases]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def compare_with_measured() -> None:
    report = json.loads((ROOT / "results" / "memory_h100.json").read_text())
    print(report["machine"])
    for row in report["rows"]:
        case = Case(**(SETTING | row["case"]))  # the card had completions of full length
        peaks = estimate(case, micro_batches=[largest_micro_batch(case, case.max_new_tokens)])
        print(json.dumps(row["case"]))
        for phase, measured in row["bytes"].items():
            ratio = peaks[phase] / measured
            figures = f"measured {measured / GIB:.2f}, estimated {peaks[phase] / GIB:.2f} GiB"
            print(f"    {phase:10} {figures}, ratio {ratio:.3f}", flush=True)


def compare_with_resident() -> None:
    """One update in a process of its own, whose memory Linux counts.

    glibc keeps freed blocks for later. With these thresholds it gives each back at once.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for model_name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"):
        for changes in ({"lora_rank": 16}, {}, {"gradient_checkpointing": True}):
            case = Case(model_name=model_name, precision="float32", prompt_tokens=150, **changes)
            case = replace(case, micro_batch_tokens=1024, max_new_tokens=64, kl_weight=0.0)
            command = [sys.executable, __file__, "resident", json.dumps(vars(case))]
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            measured = int(done.stdout.splitlines()[-1])
            micro_batch = largest_micro_batch(case, case.max_new_tokens)
            estimated = estimate(case, ("training",), [micro_batch])["training"]
            figures = f"measured {measured / GIB:.2f}, estimated {estimated / GIB:.2f} GiB"
            print(
                f"{model_name} {changes}: {figures}, ratio {estimated / measured:.3f}", flush=True
            )


def resident_bytes(case: Case) -> int:
    """The most memory that the second of two updates takes on this CPU, above that of an idle
    process with the same libraries."""
    import peft  # noqa: F401  # before what is measured

    micro_batch = largest_micro_batch(case, case.max_new_tokens)
    torch.ones(512, 512) @ torch.ones(512, 512)  # the matrix library's own
    before = resident("VmRSS")
    with mock.patch.object(model, "load_pretrained", make_model):
        policy, reference = train.load_model(case, torch.device("cpu"))
    optimizer = train.make_optimizer(policy, case)
    objective = train.GRPOLoss(case.clip_eps_low, case.clip_eps_high, case.kl_weight)
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        policy.train()
        for _ in range(2):
            log_probs = train.sequences_log_probs(policy, micro_batch, case)
            objective(log_probs, micro_batch).backward()
            del log_probs
        peak = resident("VmHWM")
        optimizer.step()
        optimizer.zero_grad()
    return peak - before


def resident(name: str) -> int:
    """VmRSS: the bytes of this process that are in memory; VmHWM: the most that were."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def check(options: Options) -> None:
    """Refuse what train.py refuses, and what cannot be estimated."""
    if options.max_new_tokens >= options.max_length:
        advice = f"leaves no room for a prompt; raise --max-length {options.max_length}"
        fail(f"--max-new-tokens {options.max_new_tokens}: {advice}")
    train.check_config(options)
    room = options.max_length - options.max_new_tokens
    if not 1 <= options.prompt_tokens <= room:
        most = f"the {room} that --max-length {options.max_length} leaves"
        fail(f"--prompt-tokens {options.prompt_tokens}: must be from 1 to {most}")
    if options.attention not in ("auto", "sdpa"):
        fail(f"--attention {options.attention}: cannot be estimated; leave it out")
    for name, most in MOST.items():
        if getattr(options, name) > most:
            fail(f"{flag_of(name)} {getattr(options, name)}: more than {most:,} is not estimated")
    if 0 < options.card <= CUDA_GIB:
        fail(f"--card {options.card}: CUDA alone takes {CUDA_GIB} GiB; name all that the card has")
    name = options.model_name
    if model.base_model_of(name) != name:
        fail(f"--model-name {name}: is an adapter; name its base model")
    model_config = model_config_of(name) if name in SHAPES else model.load_model_config(name)
    kinds = sorted({kind for kind, *_ in SHAPES.values()})
    if model_config.model_type not in kinds:
        known = f"only {', '.join(kinds)} can be estimated"
        fail(f"--model-name {name}: is of type {model_config.model_type}; {known}")
    if not model.can_pack(model_config, options.max_length):
        fail(f"--model-name {name}: has a sliding window, which cannot be estimated")
    positions = model_config.max_position_embeddings
    if options.max_length > positions:
        fail(f"--max-length {options.max_length}: {name} has {positions} positions; take fewer")


def main(options: Options) -> None:
    tasks = {"table": table, "measured": compare_with_measured, "resident": compare_with_resident}
    defaults = vars(Options())
    given = [name for name, value in vars(options).items() if value != defaults[name]]
    for name, task in tasks.items():
        if name in given:
            if len(given) > 1:
                fail(f"{flag_of(name)}: takes no other flag")
            return task()
    check(options)
    answer(options, options.card)


if __name__ == "__main__":
    if sys.argv[1:2] == ["resident"]:  # a process of compare_with_resident
        print(resident_bytes(Case(**json.loads(sys.argv[2]))))
        sys.exit()
    sys.modules["bitsandbytes"] = None  # PEFT would import it for seconds, and nothing uses it
    try:
        main(tyro.cli(Options, description=__doc__))
    except KeyboardInterrupt:
        sys.exit(130)
