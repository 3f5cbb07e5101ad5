"""Speed, memory and exactness at real model sizes, on a GPU:
experiment_base/train.py against trl's GRPOTrainer.

    python benchmarks/gpu.py    # Qwen2.5-1.5B's shape, less than 10 minutes
    python benchmarks/gpu.py --model 0.5b --max-new-tokens 256
    # only shows that all of it runs
    python benchmarks/gpu.py --model toy --device cpu --max-new-tokens 16

No network: the model has the shape of the real one, random weights and the embedded policy's
tokenizer. A step is that of benchmarks/vs_trl.py, 16 prompts x 8 completions, two updates, KL 0.01,
with LoRA of rank 16 and in full training. Each side runs alone, in a process of its own; TRL has
the fastest micro-batch and generation backend that the time allows to search. Prints, and writes
into results/gpu.json, for each way of training

    step_time_ratio          TRL's seconds a step over ours
    decode_bandwidth         the seconds that reading the weights (in the dtype of the products) and
                             the KV cache once a token takes at the measured copy bandwidth, over
                             the seconds that our sampling took
    peak_memory_ratio        our peak over TRL's, weights and optimizer included
    max_log_prob_gap         sampled against recomputed log-probs, before and after an update, in
                             float32 and bfloat16
    training_seconds         forward and backward of a packed group, and of its completions in rows
                             of their own, for ratios of prompt to completion of 4:1, 1:1, 1:4 and
                             1:16
"""

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
from vs_trl import ROOT, SIDES, now

VOCABULARY = 151_936
# hidden size, intermediate size, layers, heads, key-value heads, vocabulary: Qwen2.5's,
# embeddings tied
SHAPES = {
    "toy": (64, 128, 2, 4, 2, 512),
    "0.5b": (896, 4864, 24, 14, 2, VOCABULARY),
    "1.5b": (1536, 8960, 28, 12, 2, VOCABULARY),
    "3b": (2048, 11008, 36, 16, 2, VOCABULARY),
}
MODES = {"lora": {"lora_rank": 16}, "full": {}}
BARS = {
    "step_time_ratio": (4.0, None),
    "decode_bandwidth": (0.4, None),
    "peak_memory_ratio": (None, 0.6),
}
BARS["max_log_prob_gap_float32"] = (None, 1e-4)
# micro-batch, continuous batching
TRL_CANDIDATES = [(16, False), (16, True), (32, False), (8, False)]


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
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SHAPES[shape]
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "policy_math")
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
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


# ---------------------------------------------------------------- against TRL
def run_side(
    side: str, folder: str, options: Options, changes: dict, settings: dict, steps: int
) -> dict:
    """Medians over `steps` steps after one to warm up."""
    changes = changes | {"model_name": folder}
    with vs_trl.Worker(
        side, 42, steps + 1, settings, changes, eval_interval=None, device=options.device
    ) as worker:
        worker.answer()
        return vs_trl.figures_of_side([worker.step() for _ in range(steps + 1)][1:])


def fastest_trl(
    folder: str, options: Options, changes: dict, deadline: float
) -> tuple[dict, list[dict]]:
    """(settings, trials of one step each), as many trials as there is time for."""
    trials = []
    for micro_batch, continuous in TRL_CANDIDATES:
        if trials and time.time() > deadline:
            break
        settings = {
            "per_device_train_batch_size": micro_batch,
            "use_transformers_continuous_batching": continuous,
        }
        settings |= {"bf16": options.device == "cuda", "attn_implementation": "sdpa"}
        try:
            trials.append(
                {"settings": settings, **run_side("trl", folder, options, changes, settings, 1)}
            )
        except RuntimeError as error:
            trials.append({"settings": settings, "error": str(error)})
        print(f"search: {trials[-1]}", flush=True)
    return vs_trl.fastest(trials)["settings"], trials


def decode_bandwidth(options: Options, ours: dict, copy_bandwidth: float, rows: int) -> float:
    """Seconds that the memory needs at least for a rollout,
    over the seconds that it took (prompts left out)."""
    hidden, intermediate, layers, heads, key_value_heads, vocabulary = SHAPES[options.model]
    size = 2 if options.device == "cuda" else 4  # bytes: bfloat16 and float32
    kv_width = key_value_heads * hidden // heads
    weights = (
        layers * (2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * intermediate)
        + vocabulary * hidden
    )
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
    ours = {"micro_batch_tokens": max(length, options.micro_batch_tokens)}
    settings, trials = fastest_trl(folder, options, changes, deadline)
    ours, trl = (
        run_side(side, folder, options, changes, side_settings, options.steps)
        for side, side_settings in zip(SIDES, (ours, settings))
    )
    return {
        "step_time_ratio": trl["seconds"] / ours["seconds"],
        "decode_bandwidth": decode_bandwidth(options, ours, copy_bandwidth, rows=128),
        "peak_memory_ratio": ours["whole_peak_bytes"] / trl["whole_peak_bytes"],
        "ours": ours,
        "trl": trl,
        "trl_settings": settings,
        "search": trials,
    }


# ----------------------------------------------- exactness and the training forward, in one process
def check(folder: str, options: Options) -> dict:
    """What experiment_base computes on this device, apart from TRL."""
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
            results[f"max_log_prob_gap_{precision}_{mode}"] = gap
    config = train.Config(
        model_name=folder, precision="bfloat16" if options.device == "cuda" else "float32"
    )
    policy, _ = train.load_model(config, torch.device(options.device))
    unit = 64 if options.device == "cuda" else 4
    for prompt, completion in ((16, 4), (4, 4), (4, 16), (4, 64)):
        for name, packed in (("packed", True), ("rows of their own", False)):
            seconds = training_seconds(
                train, policy, config, prompt * unit, completion * unit, packed
            )
            results["training_seconds"][f"{prompt * unit}:{completion * unit}, {name}"] = seconds
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
    tokenizer = train.load_tokenizer(folder)
    prompts, _ = train.read_prompts(config, tokenizer)
    gaps, objective = [], train.GRPOLoss(0.2, 0.2, config.kl_weight)
    for step in (1, 2):
        generator = train.make_generator(options.device, 42, step)
        experiences = train.rollout(
            policy, tokenizer, prompts[:4], config.group_size, config, generator
        )
        for experience in experiences:
            experience.advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
        replay_buffer = train.ReplayBuffer()
        replay_buffer.extend(experiences)
        batches = replay_buffer.batches(config, True, train.make_generator("cpu", 42, step))
        batches = [[micro_batch.to(options.device) for micro_batch in batch] for batch in batches]
        train.remember_log_probs(policy, reference, batches, config)
        policy.train()
        for micro_batch in batches[0]:
            log_probs = train.sequences_log_probs(policy, micro_batch, config)
            micro_batch.old_log_probs = log_probs.detach()
            loss, sums = objective(log_probs, micro_batch)
            loss.backward()
            gaps.append(sums["gap"].item())
        optimizer.step()
        optimizer.zero_grad()
    return max(gaps)


def training_seconds(
    train, policy, config, prompt: int, completion: int, packed: bool
) -> float | None:
    """Median of five of a group's forward and backward; None where the memory does not hold it."""
    ids = torch.randint(3, 300, (8, completion), generator=torch.Generator().manual_seed(0))
    experience = train.Experience(
        prompt_ids=torch.arange(prompt) % 300,
        completion_ids=list(ids),
        masks=[torch.ones(completion)] * 8,
        sampled_log_probs=[torch.zeros(completion)] * 8,
        truncated=torch.zeros(8),
        completions=[""] * 8,
        answer="",
        advantages=torch.ones(8),
    )
    replay_buffer = train.ReplayBuffer()
    replay_buffer.extend([experience])
    config.train_batch_size, config.micro_batch_tokens = 8, 8 * (prompt + completion)
    (batch,) = replay_buffer.batches(config, packed, torch.Generator())
    times = []
    policy.train()
    try:
        for _ in range(6):
            start = now(policy.device.type)
            for micro_batch in batch:
                train.sequences_log_probs(
                    policy, micro_batch.to(policy.device), config
                ).sum().backward()
            policy.zero_grad()
            times.append(now(policy.device.type) - start)
    except torch.OutOfMemoryError:
        return None
    return median(times[1:])


# ---------------------------------------------------------------- driver
def main(options: Options) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --device cpu --model toy shows that the script runs")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(options.model, folder)
        command = [
            sys.executable,
            __file__,
            "--check",
            folder,
            options.model,
            options.device,
            *options.modes,
        ]
        checks = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
        )
        copy_bandwidth = measure_copy_bandwidth(options.device)
        results = {"copy_bandwidth_bytes_per_second": copy_bandwidth, **checks}
        for i, mode in enumerate(options.modes):
            # of the time, spent when the search of this mode ends
            share = (i + 0.6) / len(options.modes)
            results[mode] = compare(
                mode, folder, options, copy_bandwidth, start + share * options.seconds
            )
    device = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else vs_trl.describe_machine()["cpu"]
    )
    about = {"device": device, "options": asdict(options), "seconds_in_all": time.time() - start}
    about["versions"] = vs_trl.describe_machine()["versions"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(vs_trl.to_json(about | results, indent=1) + "\n")
    shown = {name: value for name, value in results.items() if name not in options.modes}
    shown |= {f"{mode}, {side}": results[mode][side] for mode in options.modes for side in SIDES}
    print("\n".join(f"{name}: {vs_trl.to_json(value)}" for name, value in shown.items()))
    print("the bars are those of the 1.5b shape on a CUDA device:")
    for mode in options.modes:
        found = results[mode] | {
            "max_log_prob_gap_float32": results[f"max_log_prob_gap_float32_{mode}"]
        }
        for name, (least, most) in BARS.items():
            bar = f"bar at least {least}" if most is None else f"bar at most {most}"
            if found[name] is None:
                print(f"{mode}: {name}, {bar}: out of memory")
                continue
            met = (least is None or found[name] >= least) and (most is None or found[name] <= most)
            print(f"{mode}: {name} {found[name]:.3g}, {bar}: {'met' if met else 'MISSED'}")
    print(f"written: {options.output}, {about['seconds_in_all']:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        checked = Options(model=sys.argv[3], device=sys.argv[4], modes=tuple(sys.argv[5:]))
        print(json.dumps(check(sys.argv[2], checked)))
    else:
        try:
            main(tyro.cli(Options, description=__doc__))
        except (RuntimeError, KeyboardInterrupt) as error:
            sys.exit(f"error: {str(error) or 'interrupted'}")
