"""Speed, memory and exactness at real model sizes, on a GPU:
experiment_base/train.py against trl's GRPOTrainer.

    python benchmarks/gpu.py    # Qwen2.5-1.5B's shape, less than 10 minutes
    python benchmarks/gpu.py --model 0.5b --max-new-tokens 256
    # only shows that all of it runs
    python benchmarks/gpu.py --model toy --device cpu --max-new-tokens 16

No network: the model has the shape of the real one, random weights and the embedded policy's
tokenizer. A step is that of benchmarks/vs_trl.py, 16 prompts x 8 completions, two updates, KL 0.01,
with LoRA of rank 16 and in full training. Each side runs alone, in a process of its own; TRL has
the fastest micro-batch and generation backend that the time allows to search. Where memory runs
out, ours is tried again with half the tokens of a micro-batch. cuDNN's attention is off for both.

Prints, and writes into results/gpu.json as soon as a way of training is measured, for each of them

    step_time_ratio          TRL's seconds a step over ours
    decode_bandwidth         the seconds that reading the weights (in the dtype of the products) and
                             the KV cache once a token takes at the measured copy bandwidth, over
                             the seconds that our sampling took
    peak_memory_ratio        our peak over TRL's, weights and optimizer included; TRL without its
                             continuous batching
    max_log_prob_gap         sampled against recomputed log-probs, before and after an update, in
                             float32 and bfloat16
    sampling_ms_a_token      milliseconds for a token of all 128 completions, by the plain loop of
                             sampling.py and by captured.py
    training_seconds         forward and backward of a packed group, and of its completions in rows
                             of their own, for ratios of prompt to completion of 4:1, 1:1, 1:4 and
                             1:16, with the largest micro-batch that the memory holds
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import transformers
import tyro
import vs_trl
from shapes import SHAPES, model_config_of
from vs_trl import ROOT, SIDES, now

MODELS = {  # in shapes.py
    "toy": "toy",
    "0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "3b": "Qwen/Qwen2.5-3B-Instruct",
}
SHAPES["toy"] = ("qwen2", 64, 128, 2, 4, 2, 16, 512, True)
MODES = {"lora": {"lora_rank": 16}, "full": {}}
BARS = {
    "step_time_ratio": (4.0, None),
    "decode_bandwidth": (0.4, None),
    "peak_memory_ratio": (None, 0.6),
}
BARS["max_log_prob_gap_float32"] = (None, 1e-4)
CONTINUOUS = "use_transformers_continuous_batching"
# micro-batch, continuous batching
TRL_CANDIDATES = [(16, False), (16, True), (32, False), (8, False), (4, False)]


@dataclass
class Options:
    model: Literal["toy", "0.5b", "1.5b", "3b"] = "1.5b"  # the shape
    device: Literal["cuda", "cpu"] = "cuda"
    modes: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    max_new_tokens: int = 512  # tokens of a completion
    micro_batch_tokens: int = 16384  # ours
    steps: int = 3  # timed steps of each side, after one to warm up
    seconds: float = 540  # no further settings of TRL are tried when a share of this is spent
    output: Path = ROOT / "results" / "gpu.json"


def save_random_model(shape: str, folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "policy_math")
    config = model_config_of(
        MODELS[shape],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def free_memory() -> None:
    """Hand back what this process no longer uses of the device, which other processes then have."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.ipc_collect()


# ---------------------------------------------------------------- against TRL
def run_side(
    side: str, folder: str, options: Options, changes: dict, settings: dict, steps: int
) -> dict:
    """Medians over `steps` steps after one to warm up."""
    changes = changes | {"model_name": folder}
    free_memory()
    with vs_trl.Worker(
        side, 42, steps + 1, settings, changes, eval_interval=None, device=options.device
    ) as worker:
        worker.answer()
        return vs_trl.figures_of_side([worker.step() for _ in range(steps + 1)][1:])


def run_ours(folder: str, options: Options, changes: dict) -> dict:
    """Our figures and settings. After an out-of-memory it is tried again with half of what the
    message names."""
    least = {"micro_batch_tokens": changes["max_length"], "sample_rows": 8}
    settings = {
        "micro_batch_tokens": max(changes["max_length"], options.micro_batch_tokens),
        "sample_rows": 128,
    }
    while True:
        try:
            figures = run_side("ours", folder, options, changes, settings, options.steps)
            return {**figures, "settings": settings}
        except vs_trl.OutOfMemory as error:
            name = "sample_rows" if "lower sample_rows" in str(error) else "micro_batch_tokens"
            if settings[name] == least[name]:
                raise
            settings[name] = max(least[name], settings[name] // 2)
            print(f"ours: out of memory; again with {name} {settings[name]}", flush=True)


def fastest_trl(
    mode: str, folder: str, options: Options, changes: dict, deadline: float
) -> tuple[dict, list[dict]]:
    """(settings, trials of one step each), as many trials as there is time for.

    Continuous batching turns the trainer's weights to bfloat16 for good. In full training these are
    the weights that are trained, so it would be other work than ours, and it is left out there.
    With LoRA the frozen weights are bfloat16 anyway.
    """
    trials = []
    ran = False
    for micro_batch, continuous in TRL_CANDIDATES:
        if ran and time.time() > deadline:
            break
        if mode == "full" and continuous:
            continue
        settings = {"per_device_train_batch_size": micro_batch, CONTINUOUS: continuous}
        settings |= {"bf16": options.device == "cuda", "attn_implementation": "sdpa"}
        try:
            figures = run_side("trl", folder, options, changes, settings, 1)
            trials.append({"settings": settings, **figures})
            ran = True
        except RuntimeError as error:
            trials.append({"settings": settings, "error": str(error)})
        print(f"search: {trials[-1]}", flush=True)
    return vs_trl.fastest(trials)["settings"], trials


def peak_without_continuous_batching(trl: dict, settings: dict, trials: list[dict]) -> float | None:
    """TRL's peak in bytes. Continuous batching turns weights to bfloat16 (adapters with them), so
    its peak is no measure of the same work: the fastest trial without it counts instead."""
    if not settings[CONTINUOUS]:
        return trl["whole_peak_bytes"]
    plain = [t for t in trials if "seconds" in t and not t["settings"][CONTINUOUS]]
    return vs_trl.fastest(plain)["whole_peak_bytes"] if plain else None


def decode_bandwidth(options: Options, ours: dict, copy_bandwidth: float, rows: int) -> float:
    """Seconds that the memory needs at least for a rollout,
    over the seconds that it took (prompts left out)."""
    shape = model_config_of(MODELS[options.model])
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    kv_width = shape.num_key_value_heads * shape.head_dim
    size = 2 if options.device == "cuda" else 4  # bytes: bfloat16 and float32
    weights = layers * (
        2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * shape.intermediate_size
    )
    weights += shape.vocab_size * hidden
    kv_reads = sum(rows * 2 * layers * kv_width * t for t in range(options.max_new_tokens))
    return (
        (options.max_new_tokens * weights + kv_reads)
        * size
        / copy_bandwidth
        / ours["sampling_seconds"]
    )


def measure_copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of the fastest of ten copies of 1 GiB (64 MiB on a CPU)."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(10):
        start = now(device)
        target.copy_(source)
        times.append(now(device) - start)
    return 2 * source.numel() / min(times)


def compare(
    mode: str, folder: str, options: Options, copy_bandwidth: float, deadline: float
) -> dict:
    length = options.max_new_tokens + 128
    changes = {"max_new_tokens": options.max_new_tokens, "max_length": length, **MODES[mode]}
    settings, trials = fastest_trl(mode, folder, options, changes, deadline)
    ours = run_ours(folder, options, changes)
    trl = run_side("trl", folder, options, changes, settings, options.steps)
    trl_peak = peak_without_continuous_batching(trl, settings, trials)
    return {
        "step_time_ratio": trl["seconds"] / ours["seconds"],
        "decode_bandwidth": decode_bandwidth(options, ours, copy_bandwidth, rows=128),
        "peak_memory_ratio": ours["whole_peak_bytes"] / trl_peak if trl_peak else None,
        "ours": ours,
        "trl": trl,
        "trl_settings": settings,
        "search": trials,
    }


# ----------------------------------------------- exactness and the training forward, in one process
def check(folder: str, options: Options) -> dict:
    """What experiment_base computes on this device, apart from TRL."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in vs_trl.py
    sys.path.insert(0, str(ROOT / "experiment_base"))
    import train

    results = {"training_seconds": {}}
    for precision in ("float32", "bfloat16"):
        for mode in options.modes:
            try:
                gap = log_prob_gap(train, folder, options, precision, mode)
            # train.py's own message is on standard error
            except (torch.OutOfMemoryError, SystemExit):
                gap = None
            free_memory()  # here, where no exception holds tensors any more
            results[f"max_log_prob_gap_{precision}_{mode}"] = gap
    config = train.Config(
        model_name=folder, precision="bfloat16" if options.device == "cuda" else "float32"
    )
    policy, _ = train.load_model(config, torch.device(options.device))
    results["sampling_ms_a_token"] = sampling_times(train, policy, config, options)
    unit = 64 if options.device == "cuda" else 4
    for prompt, completion in ((16, 4), (4, 4), (4, 16), (4, 64)):
        for name, packed in (("packed", True), ("rows of their own", False)):
            key = f"{prompt * unit}:{completion * unit}, {name}"
            results["training_seconds"][key] = largest_that_fits(
                train, policy, config, prompt * unit, completion * unit, packed
            )
    return results


def log_prob_gap(train, folder: str, options: Options, precision: str, mode: str) -> float:
    """The largest difference of a sampled log-prob and its recomputation,
    by the policy before and after an update."""
    config = train.Config(
        model_name=folder, precision=precision, group_size=4, rollouts_per_step=4, **MODES[mode]
    )
    config.train_batch_size, config.lr, config.critic_type = 16, 1e-4, "dapo"
    policy, reference = train.load_model(config, torch.device(options.device))
    optimizer = train.make_optimizer(policy, config)
    tokenizer = train.load_tokenizer(config)
    prompts, _ = train.read_prompts(config, tokenizer)
    objective = train.GRPOLoss(0.2, 0.2, config.kl_weight)
    packed = train.can_pack(train.unwrap(policy).config, config.max_length)
    for step in (1, 2):
        generator = train.make_generator(options.device, 42, step)
        experiences = train.rollout(
            policy, tokenizer, prompts[:4], config.group_size, config, generator
        )
        for experience in experiences:
            experience.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
        replay_buffer = train.ReplayBuffer(packed)
        replay_buffer.extend(experiences)
        (batch,) = replay_buffer.batches(config, train.make_generator("cpu", 42, step))
        batch = [micro_batch.to(options.device) for micro_batch in batch]
        train.add_old_and_reference_log_probs(policy, reference, [batch], config)
        policy.train()
        for micro_batch in batch:
            log_probs = train.sequences_log_probs(policy, micro_batch, config)
            objective(log_probs, micro_batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return max(sums["gap"].item() for sums in objective.token_sums)


def sampling_times(train, policy, config, options: Options) -> dict:
    """Milliseconds for a token of 16 x 8 completions, after a few tokens to warm up."""
    import sampling
    from captured import sample_captured

    prompts, _ = train.read_prompts(config, train.load_tokenizer(config))
    histories = [prompt.ids for prompt in prompts[:16] for _ in range(8)]
    ways = {"plain": sampling.sample_plainly, "captured": sample_captured}
    times = {}
    for name, sample in ways.items():
        for tokens in (8, min(64, options.max_new_tokens)):
            config.max_new_tokens = tokens
            generator = train.make_generator(options.device, 42)
            start = now(options.device)
            sample(policy, histories, set(), config, generator)  # no end token ends it
            times[name] = 1000 * (now(options.device) - start) / tokens
    return times


def largest_that_fits(
    train, policy, config, prompt: int, completion: int, packed: bool
) -> dict | None:
    """A group's training seconds, and the tokens of the micro-batches: the whole group's, or after
    an out-of-memory half as many, down to one completion at a time. None where that is too much."""
    tokens = 8 * (prompt + completion)
    while True:
        seconds = training_seconds(train, policy, config, prompt, completion, packed, tokens)
        policy.zero_grad()
        free_memory()
        if seconds is not None:
            return {"seconds": seconds, "micro_batch_tokens": tokens}
        if tokens == prompt + completion:
            return None
        tokens //= 2


def training_seconds(
    train, policy, config, prompt: int, completion: int, packed: bool, micro_batch_tokens: int
) -> float | None:
    """Median of five of a group's forward and backward; None where the memory does not hold it."""
    ids = torch.randint(3, 300, (8, completion), generator=torch.Generator().manual_seed(0))
    experience = train.Experience(
        prompt_ids=torch.arange(prompt) % 300,
        completion_ids=list(ids),
        completion_masks=[torch.ones(completion)] * 8,
        sampled_log_probs=[torch.zeros(completion)] * 8,
        truncated=torch.zeros(8),
        completions=[""] * 8,
        answer="",
        advantages=torch.ones(8),
    )
    replay_buffer = train.ReplayBuffer(packed)
    replay_buffer.extend([experience])
    config.train_batch_size = 8
    config.micro_batch_tokens = micro_batch_tokens
    (batch,) = replay_buffer.batches(config, torch.Generator())
    times = []
    policy.train()
    try:
        for _ in range(6):
            start = now(policy.device.type)
            for micro_batch in batch:
                micro_batch = micro_batch.to(policy.device)
                train.sequences_log_probs(policy, micro_batch, config).sum().backward()
            policy.zero_grad()
            times.append(now(policy.device.type) - start)
    except RuntimeError as error:
        if vs_trl.is_out_of_memory(error):
            return None
        raise
    return median(times[1:])


# ---------------------------------------------------------------- driver
def main(options: Options) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --device cpu --model toy shows that the script runs")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(options.model, folder)
        free_memory()
        results = run_check(folder, options)
        copy_bandwidth = measure_copy_bandwidth(options.device)
        free_memory()
        results["copy_bandwidth_bytes_per_second"] = copy_bandwidth
        for i, mode in enumerate(options.modes):
            # of the time, spent when the search of this mode ends
            share = (i + 0.6) / len(options.modes)
            deadline = start + share * options.seconds
            try:
                results[mode] = compare(mode, folder, options, copy_bandwidth, deadline)
            except RuntimeError as error:  # the other mode may run all the same
                results[mode] = {"error": str(error)}
            free_memory()
            write(options, results, time.time() - start)
    report(options, results)
    print(f"written: {options.output}, {time.time() - start:.0f} s")
    if any("error" in results[mode] for mode in options.modes):
        sys.exit("error: not every mode could be measured; the messages are above")


def run_check(folder: str, options: Options) -> dict:
    """`check` in a process of its own, whose memory is free again when it ends."""
    arguments = ["--check", folder, options.model, options.device, *options.modes]
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return json.loads(output.splitlines()[-1])


def write(options: Options, results: dict, seconds: float) -> None:
    machine = vs_trl.describe_machine()
    about = {"device": machine["cpu"], "options": asdict(options), "seconds_in_all": seconds}
    if options.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    about |= {"date": machine["date"], "versions": machine["versions"]}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(vs_trl.to_json(about | results, indent=1) + "\n")


def report(options: Options, results: dict) -> None:
    """Print all figures, and whether they meet the bars."""
    for name, value in results.items():
        if name not in options.modes:
            print(f"{name}: {vs_trl.to_json(value)}")
    for mode in options.modes:
        for side in SIDES:
            if side in results[mode]:
                print(f"{mode}, {side}: {vs_trl.to_json(results[mode][side])}")
    print("the bars are those of the 1.5b shape on a CUDA device:")
    for mode in options.modes:
        if "error" in results[mode]:
            print(f"{mode}: {results[mode]['error']}")
            continue
        gap = results[f"max_log_prob_gap_float32_{mode}"]
        found = results[mode] | {"max_log_prob_gap_float32": gap}
        for name, (least, most) in BARS.items():
            bar = f"bar at least {least}" if most is None else f"bar at most {most}"
            if found[name] is None:
                print(f"{mode}: {name}, {bar}: not measured, the memory did not hold it")
                continue
            met = (least is None or found[name] >= least) and (most is None or found[name] <= most)
            print(f"{mode}: {name} {found[name]:.3g}, {bar}: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        checked = Options(model=sys.argv[3], device=sys.argv[4], modes=tuple(sys.argv[5:]))
        print(json.dumps(check(sys.argv[2], checked)))
    else:
        try:
            main(tyro.cli(Options, description=__doc__))
        except (RuntimeError, KeyboardInterrupt) as error:
            sys.exit(f"error: {str(error) or 'interrupted'}")
