"""What a run needs and what teaches nothing about GRPO. Plumbing, the same in every experiment.

Checks of the config, data files, checkpoints, logs, signals, warnings, figures of a step.
"""

import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet
import torch
from safetensors import SafetensorError
from tqdm import tqdm

# On a CPU bitsandbytes misses an optional kernel, and says so at every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

MAX_SKIPPED = 10  # updates in a row without a finite gradient that end the run
NO_SPREAD_STEPS = 5  # steps in a row without a group to learn from, until a warning says so
NO_SPREAD_AGAIN = 20  # steps from one such warning to the next
KEPT_CHECKPOINTS = 2  # the newest of a run; older ones are deleted
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
# What a resumed run shares with the run that it continues: its weights must fit, and its prompts
# go on in order.
FIXED = (
    "model_name",
    "lora_rank",
    "load_in_4bit",
    "optimizer",
    "seed",
    "data_path",
    "eval_data_path",
    "max_prompts",
    "group_size",
    "rollouts_per_step",
    "train_batch_size",
    "epochs_per_step",
)
POSITIVE = (
    "rollouts_per_step",
    "temperature",
    "max_new_tokens",
    "epochs_per_step",
    "eval_interval",
    "checkpoint_interval",
    "max_eval_prompts",
    "micro_batch_tokens",
    "epochs",
)
# Of a full disk, as Python, torch and safetensors report it.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def fail(message: str):
    """End the program with one line that says what is wrong and how to mend it."""
    sys.exit(f"error: {message}")


def check_config(config, also_positive: tuple[str, ...] = ()) -> None:
    """Refuse what cannot work before anything is loaded.

    also_positive: names of numbers that this experiment alone has, and that must be above 0.
    """
    group_size = config.group_size
    batch = config.train_batch_size
    completions = config.rollouts_per_step * group_size
    if group_size < 2:
        fail(f"--group-size {group_size}: a completion is compared with its group; take at least 2")
    if batch < 1 or batch % group_size or completions % batch:
        wanted = f"a multiple of --group-size {group_size} that divides"
        wanted += f" --rollouts-per-step x --group-size = {completions}"
        fail(f"--train-batch-size {batch}: must be {wanted}")
    if config.load_in_4bit and not config.lora_rank:
        fail("--load-in-4bit: 4-bit weights cannot be trained; add --lora-rank 16")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        fail("--wandb: the package is missing; pip install wandb")
    if config.sample_rows < group_size:
        fail(f"--sample-rows {config.sample_rows}: must hold one group, --group-size {group_size}")
    if config.max_steps is not None and config.max_steps < 0:
        fail(f"--max-steps {config.max_steps}: must be 0 or more")
    for name in POSITIVE + also_positive:
        if getattr(config, name) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0")


# ---------------------------------------------------------------- data
def read_rows(path: str, split: str) -> list[tuple[str, dict]]:
    """(where, row), as ("tasks.jsonl, line 3", {...}), of a data file or of a hub data set."""
    name, _, subset = path.partition(":")
    where = path
    rows = []
    try:
        if not path.endswith(DATA_SUFFIXES):
            import datasets

            loaded = datasets.load_dataset(name, subset or None, split=split)
            rows = [(f"{path}, {split} row {i}", row) for i, row in enumerate(loaded, 1)]
        elif path.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path).to_pylist()
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(table, 1)]
        elif path.endswith(".json"):
            rows = list(read_json_list(path, Path(path).read_text("utf-8")))
        else:
            for i, line in enumerate(Path(path).read_text("utf-8").split("\n"), 1):
                where = f"{path}, line {i}"
                if line.strip():
                    rows.append((where, json.loads(line)))
    except Exception as error:  # json's, Arrow's and the hub's errors share no base class
        hint = "; files end in .jsonl, .json or .parquet, else it is a hub id"
        if path.endswith(DATA_SUFFIXES):
            hint = ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(f"{where}: cannot be read{hint}: {reason}")
    for where, row in rows:
        if not isinstance(row, dict):
            fail(f"{where}: expected an object with fields, found {type(row).__name__}")
    return rows


def read_json_list(path: str, text: str):
    """(where, element) for each element of a list in JSON."""
    elements = json.loads(text)
    if not isinstance(elements, list):
        fail(f"{path}: expected a list of objects")
    decoder = json.JSONDecoder()
    line = 1
    start = 0
    end = text.find("[") + 1
    for element in elements:
        before = start
        start = re.compile(r"[\s,]*").match(text, end).end()
        line += text.count("\n", before, start)
        yield f"{path}, line {line}", element
        end = decoder.raw_decode(text, start)[1]


def read_train_and_eval_rows(data_path: str, eval_data_path: str | None):
    """(training rows, held-out rows) as `read_rows` gives them.

    Held out is, in this order: `eval_data_path`; the file <name>_eval.<suffix> beside a local
    file; a hub data set's `test` split; the last 10 % of the rows, at most 512.
    """
    rows = read_rows(data_path, "train")
    stem, suffix = os.path.splitext(data_path)
    beside = f"{stem}_eval{suffix}"
    if eval_data_path or os.path.isfile(beside):
        return rows, read_rows(eval_data_path or beside, "test")
    if suffix not in DATA_SUFFIXES:
        import datasets

        name, _, subset = data_path.partition(":")
        if "test" in datasets.get_dataset_split_names(name, subset or None):
            return rows, read_rows(data_path, "test")
    held_out = min(512, max(1, len(rows) // 10))
    return rows[:-held_out], rows[-held_out:]


# ---------------------------------------------------------------- checkpoints
def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in run.glob("step_*"):
        if path.name[5:].isdigit() and (path / "trainer.pt").is_file():
            found.append(path)
    return sorted(found, key=lambda path: int(path.name[5:]))


def find_checkpoint(config, experiment: str) -> tuple[Path, dict]:
    """(the newest checkpoint, what training needs of it beside the weights).

    Of the named run, else of the experiment's newest run. Refuses one that this config does not
    continue.
    """
    folder = Path(config.checkpoint_path) / experiment
    runs = [folder / config.run_name] if config.run_name else folder.glob("*")
    found = [checkpoints_of(run)[-1] for run in runs if checkpoints_of(run)]
    if not found:
        place = folder / (config.run_name or "*")
        fail(f"--resume: no checkpoint under {place}; start a run without --resume")
    checkpoint = max(found, key=lambda path: (path / "trainer.pt").stat().st_mtime_ns)
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        advice = "delete this directory to resume from the one before it"
        fail(f"{checkpoint}: cannot be read ({error}); {advice}")
    now = {name: str(value) for name, value in asdict(config).items()}
    before = state["config"]
    changed = [name for name in before if name in now and now[name] != before[name]]
    for name in FIXED:
        if name in changed:
            flag = f"--{name.replace('_', '-')} {before[name]}"
            advice = "pass that, or start a new run"
            fail(f"--resume: {checkpoint.parent} was made with {flag}, not {now[name]}; {advice}")
    print(f"resuming run {checkpoint.parent.name} from {checkpoint}")
    for name in sorted(changed):
        if name not in ("resume", "run_name"):
            print(f"  {name} is now {now[name]}, was {before[name]}")
    return checkpoint, state


# ---------------------------------------------------------------- a run
class Run:
    """The directories, logs, checkpoints and warnings of one run, and the wish to stop it."""

    def __init__(self, config, experiment: str) -> None:
        """Find the checkpoint to resume from, or begin a run that must not exist yet.

        Writes nothing; `open` does.
        """
        self.last_checkpoint = None
        self.state = {"step": 0}  # what `save` has kept, for a resumed run
        if config.resume:
            self.last_checkpoint, self.state = find_checkpoint(config, experiment)
            self.name = self.last_checkpoint.parent.name
        else:
            self.name = config.run_name or time.strftime(f"{experiment}_%Y%m%d-%H%M%S")
        self.log_dir = Path(config.log_dir) / self.name
        self.checkpoint_dir = Path(config.checkpoint_path) / experiment / self.name
        self.config = {name: str(value) for name, value in asdict(config).items()}
        self.stop_requested = False
        self.reported = set()  # what could not be written, so that it is said once
        self.skipped_in_a_row = 0  # updates without a finite gradient
        self.without_spread = 0  # steps in a row in which no group had spread
        self.nothing_learnt = ""  # what was seen in the last of them
        if config.max_steps != 0 and not config.resume:
            if self.log_dir.exists() or self.checkpoint_dir.exists():
                advice = "continue it with --resume, or choose another --run-name"
                fail(f"run {self.name} exists: {advice}")
        self.check_folder("--log-dir", config.log_dir)
        self.check_folder("--checkpoint-path", config.checkpoint_path)

    def check_folder(self, flag: str, path: str) -> None:
        """Refuse a log directory that cannot be written to; warn of such a checkpoint path."""
        folder = Path(path).absolute()
        while not folder.exists():
            folder = folder.parent
        if folder.is_dir() and os.access(folder, os.W_OK):
            return
        message = f"{flag} {path}: {folder} cannot be written to"
        if flag == "--log-dir":
            fail(message)
        print(f"warning: {message}; nothing will be saved", flush=True)

    def open(self, config, evaluation: dict) -> None:
        """Begin to write; all that could be refused has been. evaluation: before the first step."""
        from torch.utils.tensorboard import SummaryWriter

        first_step = self.state["step"] + 1 if config.resume else 0
        self.start = time.time() - self.state.get("elapsed_seconds", 0)
        self.before = self.state.get("before", evaluation)
        self.evaluation = evaluation
        self.bar = None
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.cut_metrics(first_step)
        self.tensorboard = SummaryWriter(str(self.log_dir), purge_step=first_step)
        settings = "\n\n".join(f"{name}: {value}" for name, value in self.config.items())
        self.tensorboard.add_text("config", settings, first_step)
        self.wandb = None
        if config.wandb:
            import wandb

            project = config.wandb_project
            self.wandb = wandb.init(project=project, name=self.name, config=self.config)
        signal.signal(signal.SIGINT, self.on_interrupt)
        if not config.resume:
            self.log(0, evaluation)

    def steps(self, last_step: int):
        """The numbers of the steps that are left, with a progress bar."""
        done = self.state["step"]
        self.bar = tqdm(range(done + 1, last_step + 1), initial=done, total=last_step)
        yield from self.bar

    def elapsed_seconds(self) -> float:
        """Since training began, over all its resumed parts."""
        return time.time() - self.start

    def on_interrupt(self, *_) -> None:
        """Ctrl-C: finish the step and save. A second one ends the program at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.stop_requested = True
        print("\nstopping after this step; Ctrl-C again stops at once", flush=True)

    def cut_metrics(self, first_step: int) -> None:
        """Drop the lines from `first_step` on, and a last line that a kill cut off."""
        path = self.log_dir / "metrics.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text().splitlines(keepends=True):
                if line.endswith("}\n") and json.loads(line)["step"] < first_step:
                    kept.append(line)
        path.with_suffix(".tmp").write_text("".join(kept))
        os.replace(path.with_suffix(".tmp"), path)

    @contextmanager
    def writing(self, what: str):
        """An error in writing is reported once, and training goes on."""
        try:
            yield
        except OSError as error:
            if what not in self.reported:
                message = f"{what} cannot be written ({error}); training goes on"
                print(f"\nwarning: {message}", flush=True)
            self.reported.add(what)

    def log(self, step: int, metrics: dict, text: str | None = None) -> None:
        """One line of metrics.jsonl, the same in TensorBoard, and a completion where given."""
        metrics = {k: v if math.isfinite(v or 0) else None for k, v in metrics.items()}
        with self.writing("metrics.jsonl"), open(self.log_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        figures = {name: value for name, value in metrics.items() if value is not None}
        with self.writing("the TensorBoard log"):
            for name, value in figures.items():
                self.tensorboard.add_scalar(name, value, step)
            if text:
                tqdm.write(text)
                self.tensorboard.add_text("completion", text.replace("\n", "  \n"), step)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(figures, step=step)
        if "eval_accuracy" in metrics:
            self.evaluation = metrics
        if self.bar is not None:
            self.bar.set_postfix(
                reward=metrics["reward"],
                length=metrics["completion_length"],
                eval=self.evaluation["eval_accuracy"],
            )

    def check_updates(self, grad_norms: list[float]) -> None:
        """End the run after MAX_SKIPPED updates in a row without a finite gradient."""
        for norm in grad_norms:
            self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED:
            good = f"last good policy: {self.last_checkpoint}"
            fail(f"no finite gradient in {MAX_SKIPPED} updates; {good}")

    def watch(self, step: int, experiences, tokenizer, trained_on=None) -> None:
        """Say so where nothing is learnt: a few steps in a row in which no group had spread.

        trained_on: the groups that are trained on, where these are not all of `experiences`.
        """
        groups = experiences if trained_on is None else trained_on
        if any(group.advantages.any() for group in groups):
            self.without_spread = 0
            return
        self.without_spread += 1
        seen = why_nothing_is_learnt(experiences)
        what = "no group had spread" if trained_on is None else "no group was left to train on"
        self.nothing_learnt = f"{what}, so nothing is learnt: {seen}"
        steps_since_first_warning = self.without_spread - NO_SPREAD_STEPS
        if steps_since_first_warning >= 0 and steps_since_first_warning % NO_SPREAD_AGAIN == 0:
            steps = f"{self.without_spread} steps in a row, the last of them {step}"
            tqdm.write(f"\nwarning: in {steps}, {self.nothing_learnt}. One completion:")
            tqdm.write(show_completion(experiences[0], tokenizer))

    def save(self, step: int, policy, tokenizer, state: dict) -> None:
        """Write weights, tokenizer and `state` to step_<step>, and delete old checkpoints.

        They are written aside and renamed, so that a checkpoint is whole or absent. An error
        costs this checkpoint, not the run.
        """
        final = self.checkpoint_dir / f"step_{step:06d}"
        aside = self.checkpoint_dir / "writing"
        state = {"before": self.before, "elapsed_seconds": self.elapsed_seconds(), **state}
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            adapter = {"selected_adapters": ["default"]} if hasattr(policy, "peft_config") else {}
            policy.save_pretrained(aside, **adapter)
            tokenizer.save_pretrained(aside)
            torch.save({**state, "step": step, "config": self.config}, aside / "trainer.pt")
            os.replace(aside, final)
        except WRITE_ERRORS as error:
            shutil.rmtree(aside, ignore_errors=True)
            message = f"checkpoint {final} cannot be written ({error}); training goes on"
            print(f"\nwarning: {message}", flush=True)
            return
        self.last_checkpoint = final
        for old in checkpoints_of(self.checkpoint_dir)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        """End the logs and say what came out of the run and where it lies."""
        if self.bar is not None:
            self.bar.close()
        with self.writing("the TensorBoard log"):
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        after = self.evaluation
        gains = []
        for name, value in self.before.items():
            if name != "eval_count":
                gains.append(f"{name} {value:.4f} -> {after[name]:.4f}")
        seconds = f"in {self.elapsed_seconds():.0f} s"
        print(f"\nheld out ({after['eval_count']} prompts): {', '.join(gains)}, {seconds}")
        if self.without_spread >= NO_SPREAD_STEPS:
            print(f"warning: in the last {self.without_spread} steps {self.nothing_learnt}")
        curves = f"tensorboard --logdir {self.log_dir.parent}"
        print(f"logs: {self.log_dir} ({curves}); checkpoint: {self.last_checkpoint}")


# ---------------------------------------------------------------- figures of a step
def masked_mean(values, mask):
    """The mean of `values` where `mask` is 1; 0 where nothing is marked."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def rollout_metrics(experiences, correct=None) -> dict[str, float | None]:
    """What a step's completions say about the policy: means over completions, if nothing is said.

    correct: (completions,), 1 where the answer is right; default: the part reward_accuracy.
    """
    rewards = torch.stack([e.rewards for e in experiences])  # (groups, group_size)
    parts = {}  # name -> (completions,)
    for name in experiences[0].reward_parts:
        parts[name] = torch.cat([e.reward_parts[name] for e in experiences])
    masks = [mask for e in experiences for mask in e.completion_masks]
    log_probs = torch.cat([row for e in experiences for row in e.sampled_log_probs])
    lengths = torch.tensor([float(mask.sum()) for mask in masks])  # (completions,)
    if correct is None:
        correct = parts["reward_accuracy"]
    length_correct = masked_mean(lengths, correct).item() if correct.any() else None
    length_wrong = masked_mean(lengths, 1 - correct).item() if not correct.all() else None
    no_spread = (rewards == rewards[:, :1]).all(dim=1)  # (groups,)
    return {
        "reward": rewards.mean().item(),
        **{name: part.mean().item() for name, part in parts.items()},
        "reward_std": rewards.std(dim=1).mean().item(),  # within groups
        "zero_std_fraction": no_spread.float().mean().item(),  # of groups
        "entropy": -masked_mean(log_probs, torch.cat(masks)).item(),  # over sampled tokens
        "completion_length": lengths.mean().item(),
        "completion_length_correct": length_correct,
        "completion_length_wrong": length_wrong,
        "truncated_fraction": torch.cat([e.truncated for e in experiences]).mean().item(),
    }


def speed_metrics(experiences, token_sums, step_start: float, sampling_end: float) -> dict:
    """Tokens a second. token_sums: those of GRPOLoss, of what was trained on."""
    sampled = sum(mask.sum().item() for e in experiences for mask in e.completion_masks)
    trained = sum(sums["tokens"].item() for sums in token_sums)
    return {
        "sample_tokens_per_second": sampled / (sampling_end - step_start),
        "train_tokens_per_second": trained / (time.time() - sampling_end),
    }


def show_completion(experience, tokenizer) -> str:
    """A group's first completion with its prompt and all special tokens, and what it earned."""
    ids = torch.cat([experience.prompt_ids, experience.completion_ids[0]])
    reward = f"reward {experience.rewards[0]:.2f}"
    advantage = f"advantage {experience.advantages[0]:+.2f}"
    earned = f"[right answer: {experience.answer}, {reward}, {advantage}]"
    return f"{tokenizer.decode(ids)}\n{earned}"


def why_nothing_is_learnt(experiences) -> str:
    """What all completions of groups without spread have in common, and what to change."""
    seen = []
    advice = []
    main_part = list(experiences[0].reward_parts)[0]  # whether the answer is right
    for name in experiences[0].reward_parts:
        part = torch.cat([e.reward_parts[name] for e in experiences])  # (completions,)
        value = part[0].item()
        if (part != value).any():
            seen.append(f"{name} differs, but within no group that is trained on")
            continue
        seen.append(f"every {name} is {value:g}")
        if name == main_part and value <= 0:
            advice.append("take easier prompts, or a model that is right now and then")
        elif name == main_part:
            advice.append("take harder prompts")
        elif name == "reward_format" and value <= 0:
            advice.append("show the form in --system-prompt, or take a model that knows it")
    truncated = torch.cat([e.truncated for e in experiences]).mean().item()
    if truncated > 0:
        seen.append(f"the token budget cut off {truncated:.0%} of the completions")
    if truncated > 0.2:
        advice.append("raise --max-new-tokens (and --max-length)")
    all_same = all(len(set(e.completions)) == 1 for e in experiences)
    if all_same:
        seen.append("the completions of a group are all the same")
    if all_same or not advice:
        advice.append("raise --temperature or --group-size, so that completions differ")
    return f"{', '.join(seen)}. What to change: {'; '.join(advice)}"
