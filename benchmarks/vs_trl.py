"""experiment_base/train.py against trl's GRPOTrainer on the same work, on the CPU,
each at its best.

    # about 12 minutes on 2 cores; writes results/vs_trl.json and vs_trl.png
    python benchmarks/vs_trl.py
    # the ratios alone, within 2 minutes; writes results/vs_trl_quick.json
    python benchmarks/vs_trl.py --quick
    # a real language model, 20 minutes; writes results/vs_trl_smollm2_quick.json
    python benchmarks/vs_trl.py --quick --model-name data/smollm2 --pairs 2 --eval-prompts 32 \\
        --trl-micro-batch 32 --patience 1800

Each side is a process of its own that takes a step when this one says so, in turns, so that both
see the same machine. A step is 16 prompts x 8 completions and the two updates of 64 completions
that follow, with the same model, prompts in the same order, rewards, KL weight, clipping and AdamW.
What is timed is the code that people run:

    ours    train.main itself; what yields the numbers of its steps waits for the driver before
            each. Its logging counts as part of the step.
    trl     GRPOTrainer.train, which waits in a callback. Its logging and saving are off, gradient
            checkpointing too.

Progress bars are off on both sides, and so is cuDNN's attention.

A search finds the fastest settings of each first: precision and attention for both, for TRL its
micro-batch and generation backend as well. Evaluations (our `evaluate` in float32 for both) count
neither as time nor as memory. Memory is the most that a process holds in a step, above what it held
when it was ready for the first one, as Linux counts it: resident, without mapped files, whose pages
the kernel drops and reads again as it likes. In the JSON:

    step_time_ratio       median over pairs of steps of TRL's seconds over ours
    peak_memory_ratio     median over pairs of our peak above the level after loading over TRL's
    accuracy_difference   held-out accuracy, ours minus TRL's, mean over the evaluations after step
                          0 and over the seeds
"""

import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from ctypes import CDLL
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

import tyro

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = "experiment_base"
SIDES = ("ours", "trl")
PACKAGES = ("torch", "transformers", "trl", "accelerate")
# what the speed of float32 and bfloat16 hangs on
CPU_FLAGS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
MODEL = str(ROOT / "data" / "policy_math")
# the search starts with the first of each,
# and so does --quick where no results of this CPU are at hand
CANDIDATES = {
    "ours": {"precision": ("float32", "bfloat16"), "attention": ("sdpa", "eager")},
    "trl": {
        "per_device_train_batch_size": (64, 32, 16, 8),
        "bf16": (False, True),
        "attn_implementation": ("sdpa", "eager"),
        "use_transformers_continuous_batching": (False, True),
    },
}
HOPELESS = 3  # a candidate whose first step takes so many times the best one's is not tried further


@dataclass
class Work:
    """What both sides do, and how long the driver waits for it."""

    # a model's directory, or its name on the hub; the results of another model than the default
    # lie in files with its name
    model_name: str = MODEL
    prompts: int = 16  # of a step, with 8 completions each
    updates: int = 2  # of a step
    max_new_tokens: int = 64  # of a completion
    eval_prompts: int = 512  # held-out prompts of an evaluation; both sides begin with one
    patience: int = 600  # seconds without an answer after which a worker counts as stuck


@dataclass
class Options(Work):
    quick: bool = False  # the ratios alone, with the settings of the last full run on such a CPU
    # completions that TRL forwards at once; --quick has no search that finds the fastest number
    trl_micro_batch: int | None = None
    pairs: int = 16  # timed pairs of steps; --quick takes 6
    warmup: int = 2  # pairs of steps before them
    search_steps: int = 3  # timed steps of each candidate in the search, after one to warm up
    steps: int = 20  # steps of a learning curve
    eval_interval: int = 4  # steps between two points of it
    # a curve of each side for every seed; the first is the one of the pairs
    seeds: tuple[int, ...] = (42, 1, 2)

    output_dir: Path = ROOT / "results"


# ---------------------------------------------------------------- worker: clock and memory
def now(device: str) -> float:
    """Seconds, when all work that was given to the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def memory_in_use() -> int:
    """Bytes that this process holds: resident without mapped files."""
    _, resident, mapped, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(mapped)) * os.sysconf("SC_PAGE_SIZE")


def give_back_memory() -> None:
    """Return what is free to the system, so that a level is what is in use."""
    gc.collect()
    CDLL("libc.so.6").malloc_trim(0)


class Clock:
    """Waits for the driver between steps and measures each.
    Standard output carries one line of JSON a step."""

    def __init__(self, device: str) -> None:
        import torch

        self.device, self.cuda = device, torch.cuda if device == "cuda" else None
        self.pipe = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what else is printed
        self.info, self.level, self.reward, self.start = {}, 0, None, None
        self.running = threading.Event()  # a step is under way, and no evaluation within it
        self.reset()
        threading.Thread(target=self.watch_memory, daemon=True).start()

    def reset(self) -> None:
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        self.excluded, self.sampling = 0.0, 0.0
        self.tokens, self.peak = 0, 0
        self.accuracy, self.more = None, {}

    def watch_memory(self) -> None:
        while self.running.wait():
            self.peak = max(self.peak, memory_in_use())
            time.sleep(0.005)

    def next_step(self) -> None:
        """Report the step that has ended, or that all is loaded; wait for the driver;
        begin the next step."""
        self.running.clear()
        report = {"accuracy": self.accuracy}
        if self.start is None:
            give_back_memory()
            self.level = self.cuda.memory_allocated() if self.cuda else memory_in_use()
            report |= {"loaded_bytes": self.level, **self.info}
        else:
            seconds = now(self.device) - self.start - self.excluded
            if self.cuda:
                # it counts itself, and needs no watching
                self.peak = self.cuda.max_memory_allocated()
            report |= {"seconds": seconds, "sampling_seconds": self.sampling}
            report |= {
                "training_seconds": seconds - self.sampling,
                "tokens": self.tokens,
                "reward": self.reward,
            }
            report |= {
                "peak_bytes": self.peak - self.level,
                "whole_peak_bytes": self.peak,
                **self.more,
            }
        self.tell(report)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)  # the driver has all it wants, or is gone
        self.reset()
        self.running.set()
        self.start = now(self.device)

    def tell(self, report: dict) -> None:
        print(json.dumps(report), file=self.pipe, flush=True)

    def evaluating(self, evaluate):
        """`evaluate`, with neither its time nor its memory counted."""

        def wrapped(*args):
            begin = time.perf_counter()
            self.running.clear()
            result = evaluate(*args)
            self.accuracy = result["eval_accuracy"]
            give_back_memory()
            self.excluded += time.perf_counter() - begin
            return result

        return wrapped

    def sampling_in(self, generate, count_tokens):
        """`generate`, with its time counted as sampling."""

        def wrapped(*args, **kwargs):
            begin = now(self.device)
            result = generate(*args, **kwargs)
            if self.running.is_set():
                self.sampling += now(self.device) - begin
                self.tokens += count_tokens(result)
            return result

        return wrapped


# ---------------------------------------------------------------- worker: the two sides
class OutOfMemory(RuntimeError):
    """A side had not enough memory; the message is that side's own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the line with which train.py ends, is about memory."""
    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def work(
    side: str,
    seed: int,
    steps: int,
    settings: dict,
    eval_interval: int,
    changes: dict,
    device: str,
    folder: str,
):
    """One side, until the driver wants no more. One step more than it may ask for, so that no step
    is the last. Where `eval_interval` is None nothing is evaluated."""
    import torch

    # Off for both sides before anything runs. It gives NaN gradients for some masks, and makes a
    # new plan for every length of the KV cache. Our model.py turns it off, nothing in TRL does.
    torch.backends.cuda.enable_cudnn_sdp(False)
    sys.path.insert(0, str(ROOT / EXPERIMENT))
    import train

    clock = Clock(device)
    if eval_interval is None:
        train.evaluate = lambda *_: {
            "eval_accuracy": 0.0,
            "eval_accuracy_lenient": 0.0,
            "eval_count": 0,
        }
    train.evaluate = clock.evaluating(train.evaluate)
    config = train.Config(seed=seed, max_steps=steps + 1, epochs=steps + 1, **changes)
    config.log_dir, config.checkpoint_path = f"{folder}/runs", f"{folder}/output"
    config.checkpoint_interval = 10**9
    config.eval_interval = eval_interval or 10**9
    try:
        if side == "ours":
            run_ours(train, replace(config, **settings), clock)
        else:
            config, _ = train.resolve(config)
            run_trl(train, config, clock, settings, eval_interval is not None, device, folder)
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            clock.tell({"out_of_memory": str(error)})
        raise


def run_ours(train, config, clock: Clock) -> None:
    log = train.Run.log
    steps = train.Run.steps

    def log_and_tell(run, step, metrics, text=None):
        clock.reward = metrics.get("reward")
        log(run, step, metrics, text)

    def steps_when_told(run, last_step):
        """The generator in which main passes from one step to the next."""
        for step in steps(run, last_step):
            clock.next_step()
            yield step

    def count(experiences):
        masks = [mask for experience in experiences for mask in experience.completion_masks]
        return int(sum(mask.sum() for mask in masks))

    clock.info = {"settings": {name: str(value) for name, value in asdict(config).items()}}
    train.Run.log = log_and_tell
    train.Run.steps = steps_when_told
    train.rollout = clock.sampling_in(train.rollout, count)
    train.main(config)


def trl_arguments(config, settings: dict, device: str, folder: str) -> dict:
    """GRPOConfig's arguments for the work that `config` describes."""
    rows = config.rollouts_per_step * config.group_size
    micro_batch = settings["per_device_train_batch_size"]
    updates = rows // config.train_batch_size * config.epochs_per_step
    arguments = {
        "num_generations": config.group_size,
        "max_completion_length": config.max_new_tokens,
    }
    arguments |= {
        "per_device_train_batch_size": micro_batch,
        "steps_per_generation": rows // micro_batch,
    }
    arguments |= {"gradient_accumulation_steps": config.train_batch_size // micro_batch}
    arguments |= {"num_iterations": config.epochs_per_step, "max_steps": config.max_steps * updates}
    arguments |= {"temperature": config.temperature, "top_p": 1.0, "top_k": 0, "seed": config.seed}
    arguments |= {"shuffle_dataset": False}  # the rows are in order already
    arguments |= {
        "loss_type": "grpo",
        "scale_rewards": "group",
        "reward_weights": [1.0, config.format_weight],
    }
    arguments |= {
        "epsilon": config.clip_eps_low,
        "epsilon_high": config.clip_eps_high,
        "beta": config.kl_weight,
    }
    # the paper's KL, as ours
    arguments |= {"use_bias_correction_kl": False, "mask_truncated_completions": False}
    arguments |= {
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": config.max_norm,
    }
    arguments |= {"optim": "adamw_torch_fused", "weight_decay": 0.0}
    # What makes it fast.
    arguments |= {
        "use_cpu": device == "cpu",
        "bf16": settings["bf16"],
        "gradient_checkpointing": False,
    }
    arguments |= {
        "use_transformers_continuous_batching": settings["use_transformers_continuous_batching"]
    }
    # frozen weights in half precision
    dtype = "bfloat16" if config.lora_rank and settings["bf16"] else "float32"
    arguments |= {
        "model_init_kwargs": {
            "dtype": dtype,
            "attn_implementation": settings["attn_implementation"],
        }
    }
    arguments |= {
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return arguments | {"output_dir": f"{folder}/trl"}


def trl_task(train, tokenizer, prompts: list) -> dict:
    """GRPOTrainer's data and rewards, for the same prompts and the same rule."""
    from datasets import Dataset

    texts = [tokenizer.decode(prompt.ids) for prompt in prompts]
    if tokenizer(text=texts)["input_ids"] != [prompt.ids for prompt in prompts]:
        sys.exit("error: TRL would tokenise the prompts to other ids than ours")

    def accuracy_reward(completions, answer, **_):
        return [train.accuracy_reward(*pair) for pair in zip(completions, answer)]

    def format_reward(completions, **_):
        return [train.format_reward(completion) for completion in completions]

    rows = Dataset.from_dict({"prompt": texts, "answer": [prompt.answer for prompt in prompts]})
    return {"train_dataset": rows, "reward_funcs": [accuracy_reward, format_reward]}


def trl_tokens(result: tuple, clock: Clock) -> int:
    """The sampled tokens of what GRPOTrainer._generate returned."""
    return sum(map(len, result[1]))


def run_trl(
    train, config, clock: Clock, settings: dict, evaluates: bool, device: str, folder: str
) -> None:
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = train.load_tokenizer(config)
    prompts, eval_prompts = train.read_prompts(config, tokenizer)
    prompts = [
        prompt
        for step in range(config.max_steps)
        for prompt in train.prompts_of_step(prompts, step + 1, config)
    ]
    arguments = trl_arguments(config, settings, device, folder)
    updates = arguments["max_steps"] // config.max_steps
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"
    )
    if evaluates:  # a copy, outside of accelerate's autocast
        evaluated, _ = train.load_model(replace(config, kl_weight=0.0), train.torch.device(device))

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            step, update = divmod(state.global_step, updates)
            if update:
                return
            clock.reward = (trainer._metrics["train"]["reward"] or [None])[-1]
            if evaluates and step % config.eval_interval == 0:
                evaluated.load_state_dict(model.state_dict())
                train.evaluate(evaluated, tokenizer, eval_prompts, config)
            clock.next_step()

    trainer = GRPOTrainer(
        model=config.model_name,
        args=GRPOConfig(**arguments),
        processing_class=tokenizer,
        peft_config=lora if config.lora_rank else None,
        callbacks=[Turns()],
        **trl_task(train, tokenizer, prompts),
    )
    trainer._generate = clock.sampling_in(
        trainer._generate, lambda result: trl_tokens(result, clock)
    )
    clock.info = {"settings": arguments}
    trainer.train()


# ---------------------------------------------------------------- driver
class Worker:
    """A side in a process of its own."""

    script = str(Path(__file__).resolve())

    def __init__(
        self,
        side: str,
        seed: int,
        steps: int,
        settings: dict,
        changes: dict,
        eval_interval=0,
        device="cpu",
        patience: int = 600,
    ):
        """`changes` are those of our Config's defaults that both sides follow,
        `settings` the side's own."""
        self.folder = tempfile.TemporaryDirectory()
        job = (side, seed, steps, settings, eval_interval, changes, device, self.folder.name)
        environment = os.environ | {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        command = [sys.executable, self.script, "--worker", json.dumps(job)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.patience = patience
        self.side = side  # in a session of its own: Ctrl-C reaches the driver alone, which ends it
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def answer(self) -> dict:
        """The next report; it holds no second line,
        because a worker speaks once when it is asked."""
        ready, _, _ = select.select([self.process.stdout], [], [], self.patience)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(
                f"the {self.side} worker {'ended' if ready else 'is stuck'}; its messages are above"
            )
        report = json.loads(line)
        if "out_of_memory" in report:
            raise OutOfMemory(f"the {self.side} worker: {report['out_of_memory']}")
        return report

    def step(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def changes_of(options: Work) -> dict:
    """Those of our Config's defaults that both sides follow."""
    return {
        "model_name": options.model_name,
        "rollouts_per_step": options.prompts,
        "train_batch_size": options.prompts * 8 // options.updates,
        "max_new_tokens": options.max_new_tokens,
        "max_eval_prompts": options.eval_prompts,
    }


def in_turns(options: Options, settings: dict, seed: int, steps: int, eval_interval: int = 0):
    """(what each side says when it is loaded, a pair of reports for every step),
    the steps taken in turns."""
    job = dict(changes=changes_of(options), eval_interval=eval_interval, patience=options.patience)
    with (
        Worker("ours", seed, steps, settings["ours"], **job) as ours,
        Worker("trl", seed, steps, settings["trl"], **job) as trl,
    ):
        workers = (ours, trl)
        loaded = {worker.side: worker.answer() for worker in workers}
        before = [loaded[side]["accuracy"] for side in SIDES]
        if abs(before[0] - before[1]) > 0.01:
            raise RuntimeError(f"not the same model: held-out accuracy before training {before}")
        pairs = []
        for step in range(1, steps + 1):
            pairs.append({worker.side: worker.step() for worker in workers})
            seconds = ", ".join(f"{side} {pairs[-1][side]['seconds']:.2f} s" for side in SIDES)
            print(f"seed {seed}, step {step:2d}/{steps}: {seconds}", flush=True)
    return loaded, pairs


def search(options: Options, side: str) -> tuple[dict, list[dict]]:
    """(the side's fastest settings, every trial). What cannot run is kept with its error."""
    best, trials = {name: values[0] for name, values in CANDIDATES[side].items()}, []
    seconds = float("inf")
    for name, values in CANDIDATES[side].items():
        for value in values[1:] if trials else values:
            settings = best | {name: value}
            trials.append({"settings": settings, **try_settings(options, side, settings, seconds)})
            print(f"search, {side}: {trials[-1]}", flush=True)
        best, seconds = (fastest(trials)[name] for name in ("settings", "seconds"))
    return best, trials


def fastest(trials: list[dict]) -> dict:
    ran = [trial for trial in trials if "seconds" in trial]
    if not ran:
        raise RuntimeError(f"no setting runs; the first one's error: {trials[0]['error']}")
    return min(ran, key=lambda trial: trial["seconds"])


def try_settings(options: Options, side: str, settings: dict, best_seconds: float) -> dict:
    job = dict(changes=changes_of(options), patience=options.patience)
    with Worker(side, options.seeds[0], options.search_steps + 1, settings, **job) as worker:
        try:
            worker.answer()
            steps = [worker.step()]  # to warm up
            if steps[0]["seconds"] < HOPELESS * best_seconds:
                steps = [worker.step() for _ in range(options.search_steps)]
        except RuntimeError as error:
            return {"error": str(error)}
    return {
        name: median(step[name] for step in steps)
        for name in ("seconds", "sampling_seconds", "peak_bytes")
    }


def figures_of_side(steps: list[dict]) -> dict:
    """Medians over steps; tokens are the sampled ones."""
    figures = (
        "seconds",
        "sampling_seconds",
        "training_seconds",
        "tokens",
        "peak_bytes",
        "whole_peak_bytes",
    )
    per_second = {"tokens_per_second": "seconds", "sampling_tokens_per_second": "sampling_seconds"}
    return {name: median(step[name] for step in steps) for name in figures} | {
        name: median(step["tokens"] / step[seconds] for step in steps)
        for name, seconds in per_second.items()
    }


def measure_pairs(options: Options, settings: dict) -> dict:
    loaded, pairs = in_turns(options, settings, options.seeds[0], options.warmup + options.pairs)
    pairs = pairs[options.warmup :]
    return {
        "step_time_ratio": median(
            pair["trl"]["seconds"] / pair["ours"]["seconds"] for pair in pairs
        ),
        "peak_memory_ratio": median(
            pair["ours"]["peak_bytes"] / pair["trl"]["peak_bytes"] for pair in pairs
        ),
        **{side: figures_of_side([pair[side] for pair in pairs]) for side in SIDES},
        "loaded": loaded,
        "pairs": pairs,
    }


def measure_curves(options: Options, settings: dict) -> dict:
    """Held-out accuracy of both sides at equal steps, for every seed."""
    curves, times = [], []
    for seed in options.seeds:
        loaded, pairs = in_turns(options, settings, seed, options.steps, options.eval_interval)
        curve = {"seed": seed, "steps": list(range(0, options.steps + 1, options.eval_interval))}
        for side in SIDES:
            accuracy = [loaded[side]["accuracy"]] + [pair[side]["accuracy"] for pair in pairs]
            seconds = [
                sum(pair[side]["seconds"] for pair in pairs[:step]) for step in curve["steps"]
            ]
            curve[side] = {
                "accuracy": [accuracy[step] for step in curve["steps"]],
                "seconds": seconds,
            }
            curve[side]["reward"] = [pair[side]["reward"] for pair in pairs]
        times += [pair["trl"]["seconds"] / pair["ours"]["seconds"] for pair in pairs]
        curves.append(curve)
    differences = [  # (seeds, evaluations after step 0)
        [a - b for a, b in zip(curve["ours"]["accuracy"][1:], curve["trl"]["accuracy"][1:])]
        for curve in curves
    ]
    return {
        "accuracy_difference": mean(map(mean, differences)),
        "accuracy_difference_last_step": mean(row[-1] for row in differences),
        "last_accuracy": {
            side: mean(curve[side]["accuracy"][-1] for curve in curves) for side in SIDES
        },
        "step_time_ratio_over_curves": median(times),
        "curves": curves,
    }


def describe_machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": " ".join([names[0] if names else os.uname().machine, *sorted(flags & CPU_FLAGS)]),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": {"python": sys.version.split()[0]}
        | {package: version(package) for package in PACKAGES},
    }


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4))
    labels = ("experiment_base/train.py", f"GRPOTrainer of trl {version('trl')}")
    for side, label, color in zip(SIDES, labels, ("tab:blue", "tab:orange")):
        curves = [curve[side] | {"steps": curve["steps"]} for curve in results["curves"]]
        for curve in curves:
            curve["sampled"] = list(range(1, len(curve["reward"]) + 1))
        for panel, x, y in zip(
            panels, ("steps", "seconds", "sampled"), ("accuracy", "accuracy", "reward")
        ):
            for curve in curves:
                panel.plot(curve[x], curve[y], color=color, linewidth=0.8, alpha=0.5)
            means = [
                [mean(values) for values in zip(*(curve[name] for curve in curves))]
                for name in (x, y)
            ]
            panel.plot(*means, color=color, linewidth=2.5, label=label)
    panels[0].set(xlabel="step", ylabel="held-out accuracy (greedy)", title="at equal steps")
    title = f"against wall time (TRL's step takes {results['step_time_ratio']:.1f} times as long)"
    panels[1].set(
        xlabel="seconds, without the evaluations", ylabel="held-out accuracy (greedy)", title=title
    )
    panels[2].set(
        xlabel="step",
        ylabel="reward of the sampled completions",
        title="what is trained on, at equal steps",
    )
    panels[0].legend(title=f"mean of {len(results['curves'])} seeds; thin: each seed")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def to_json(value, **options) -> str:
    """With 5 decimals, and paths in this checkout made relative."""
    text = json.dumps(value, default=str).replace(f"{ROOT}/", "")
    return json.dumps(
        json.loads(text, parse_float=lambda digits: round(float(digits), 5)), **options
    )


def main(options: Options) -> None:
    start, path, machine = time.time(), options.output_dir / "vs_trl.json", describe_machine()
    if options.model_name != MODEL:
        path = path.with_stem(f"vs_trl_{Path(options.model_name).name}")
    if options.quick:
        options.pairs, options.warmup, trials = min(options.pairs, 6), 1, None
        known = json.loads(path.read_text()) if path.is_file() else None
        if known and known["machine"]["cpu"] == machine["cpu"]:
            settings = known["settings"]
        else:
            settings = {
                side: {name: values[0] for name, values in CANDIDATES[side].items()}
                for side in SIDES
            }
            print(f"no results of a {machine['cpu']} at hand: settings that nobody searched for")
        if options.trl_micro_batch:
            settings["trl"]["per_device_train_batch_size"] = options.trl_micro_batch
        print(f"settings: {settings}")
        path = path.with_stem(f"{path.stem}_quick")
    else:
        found = {side: search(options, side) for side in SIDES}
        settings, trials = ({side: found[side][i] for side in SIDES} for i in (0, 1))
    results = measure_pairs(options, settings)
    if not options.quick:
        results |= measure_curves(options, settings)
    head = {name: value for name, value in results.items() if isinstance(value, float)}
    about = {"machine": machine, "options": asdict(options), "settings": settings, "search": trials}
    about["seconds_in_all"] = time.time() - start
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(head | about | results, indent=1) + "\n")
    if not options.quick:
        plot(results, path.with_suffix(".png"))
    for side in SIDES:
        print(
            f"{side}: " + ", ".join(f"{name} {value:,.4g}" for name, value in results[side].items())
        )
    print(to_json(head))
    print(f"written: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*json.loads(sys.argv[2]))
    else:
        # so that the workers are ended too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: terminated"))
        try:
            main(tyro.cli(Options, description=__doc__))
        except (RuntimeError, KeyboardInterrupt) as error:
            sys.exit(f"error: {str(error) or 'interrupted'}")
