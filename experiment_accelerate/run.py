"""What a run needs and what teaches nothing about GRPO. Plumbing, the same in every experiment.

Checks of the config, checkpoints, logs, signals, warnings, figures of a step.
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
import tempfile
import time
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import torch
import tyro
from safetensors import SafetensorError
from tqdm import tqdm

# On a CPU bitsandbytes misses an optional kernel, and says so at every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

try:
    import fcntl  # locks of files
except ImportError:  # Windows
    fcntl = None

MAX_SKIPPED = 10  # updates in a row without a finite gradient that end the run
NO_SPREAD_STEPS = 5  # steps in a row without a group to learn from, until a warning says so
NO_SPREAD_AGAIN = 20  # steps from one such warning to the next
KEPT_CHECKPOINTS = 2  # the newest of a run; older ones are deleted
RUN_NAME_BYTES = 100
# What a resumed run shares with the run that it continues: its weights must fit, and its prompts
# go on in order.
FIXED = (
    "model_name",
    "lora_rank",
    "load_in_4bit",
    "optimizer",
    "seed",
    "group_size",
    "rollouts_per_step",
    "train_batch_size",
    "epochs_per_step",
)
# What a resumed run may change and still train the same policy.
HARMLESS = (
    "run_name",
    "resume",
    "log_dir",
    "checkpoint_path",
    "checkpoint_interval",
    "eval_interval",
    "log_completions_interval",
    "log_groups",
    "log_alternatives",
    "max_eval_prompts",
    "data_path",  # the prompts in it are compared
    "eval_data_path",
    "max_prompts",
    "wandb",
    "wandb_project",
    "device_index",
)
# Of a full disk, as Python, torch and safetensors report it.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


DAMAGED = "delete this directory to resume from the checkpoint before it"


def fail(message: str):
    """End the program with one line that says what is wrong and how to mend it."""
    sys.exit(f"error: {message}")


# ---------------------------------------------------------------- the config
@dataclass(frozen=True)
class Range:
    """What a constant may be: a number from `low` to `high`, or None where that is its default."""

    text: str
    low: float
    high: float

    def holds(self, value) -> bool:
        return value is None or self.low <= value <= self.high

    def __str__(self) -> str:
        return f"from {self.low:.6g} to {self.high:.6g}"


def limited(kind, text: str, low: float, high: float):
    """The type of a constant with a range, which --help shows behind the constant's name."""
    return Annotated[kind, Range(text, low, high), tyro.conf.arg(metavar=text)]


MOST = 2**31 - 1
LARGEST = torch.finfo(torch.float32).max  # so neither inf nor nan
PositiveInt = limited(int, "INT>=1", 1, MOST)
NonNegativeInt = limited(int, "INT>=0", 0, MOST)
OptionalInt = limited(int | None, "INT>=0", 0, MOST)
NonNegativeFloat = limited(float, "FLOAT>=0", 0, LARGEST)
Share = limited(float, "0..1", 0, 1)
Seed = limited(int, "0..2**63-1", 0, 2**63 - 1)
Temperature = limited(float, "0.001..1000", 1e-3, 1e3)


def first_line(error: Exception) -> str:
    """Of an error's text, and its kind where that says little."""
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if " " in text else f"{type(error).__name__}: {text}"


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_ranges(config) -> None:
    """Refuse a number outside its range, and a path that is empty."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for limits in get_args(hint)[1:]:
            if isinstance(limits, Range) and not limits.holds(value):
                fail(f"{flag_of(name)} {value}: must be a number {limits}")
        if name.endswith(("_path", "_dir", "_name")):
            refuse_empty(config, name)
        if isinstance(value, str) and not is_unicode(value):
            fail(f"{flag_of(name)} {value!r}: is not valid UTF-8")


def refuse_empty(config, *names: str) -> None:
    for name in names:
        if getattr(config, name) == "":
            fail(f"{flag_of(name)}: is empty")


def check_config(config) -> None:
    """Refuse what cannot work before anything is loaded."""
    check_ranges(config)
    check_run_name(config.run_name)
    group_size = config.group_size
    batch = config.train_batch_size
    completions = config.rollouts_per_step * group_size
    if group_size < 2:
        fail(f"--group-size {group_size}: a completion is compared with its group; take at least 2")
    if batch % group_size or completions % batch:
        wanted = f"a multiple of --group-size {group_size} that divides"
        wanted += f" --rollouts-per-step x --group-size = {completions}"
        fail(f"--train-batch-size {batch}: must be {wanted}")
    if config.load_in_4bit and not config.lora_rank:
        fail("--load-in-4bit: 4-bit weights cannot be trained; add --lora-rank 16")
    if config.attention == "flash_attention_2" and not is_installed("flash_attn"):
        fail("--attention flash_attention_2: the package is missing; pip install flash-attn")
    if config.wandb and not is_installed("wandb"):
        fail("--wandb: the package is missing; pip install wandb")
    if config.sample_rows < group_size:
        fail(f"--sample-rows {config.sample_rows}: must hold one group, --group-size {group_size}")


def show_changed(config) -> None:
    """Print the constants that are not their defaults. run.json has all."""
    for name, value in asdict(config).items():
        if value != getattr(type(config), name):
            print(f"{name}: {value}")


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_unicode(text: str) -> bool:
    """Whether a text can be written: half of a surrogate pair cannot."""
    return not re.search("[\ud800-\udfff]", text)


def check_run_name(name: str | None) -> None:
    """A run's name is the name of its directories: no path, and not too long for one."""
    if name is None:
        return
    is_plain = re.fullmatch(r"\w[\w .,=+-]*", name) and ".." not in name
    if not is_plain or len(name.encode()) > RUN_NAME_BYTES:
        allowed = "letters, digits, spaces and _ - . , = +, beginning with a letter, digit or _"
        wanted = f"at most {RUN_NAME_BYTES} bytes of {allowed}, without '..'"
        fail(f"--run-name {name[:50]!r}: must be {wanted}")


def is_due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps is done in this one; 0: never."""
    return interval > 0 and step % interval == 0


# ---------------------------------------------------------------- checkpoints
def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in run.glob("step_*"):
        if path.name[5:].isdecimal() and (path / "trainer.pt").is_file():
            found.append(path)
    return sorted(found, key=lambda path: int(path.name[5:]))


def find_run(config, experiment: str) -> Path:
    """The directory of the run to resume: the named one, else the one that was started last."""
    folder = Path(config.checkpoint_path) / experiment
    runs = [folder / config.run_name] if config.run_name else folder.glob("*")
    runs = [run for run in runs if is_run(run)]
    if not runs:
        place = folder / (config.run_name or "*")
        fail(f"--resume: no run under {place}; start one without --resume")
    return max(runs, key=lambda run: read_start(run)[0])


def is_run(folder: Path) -> bool:
    """Whether a run can be resumed from this directory."""
    return (folder / "run.json").is_file() or bool(checkpoints_of(folder))


def read_start(run: Path) -> tuple[float, dict]:
    """(when a run was started or resumed last, with which config), from its run.json.

    A run of an earlier version has none; its newest checkpoint is as old as that.
    """
    path = run / "run.json"
    if not path.is_file():
        return (checkpoints_of(run)[-1] / "trainer.pt").stat().st_mtime, {}
    try:
        content = json.loads(path.read_text())
        return float(content["started"]), dict(content["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path}: cannot be read ({error}); delete it to resume from the newest checkpoint")


def find_checkpoint(run: Path) -> tuple[Path | None, dict]:
    """(the newest checkpoint of a run, what `save` kept in it beside the weights).

    The checkpoint is None where the run was stopped before its first one: it begins again.
    """
    if not checkpoints_of(run):
        return None, {"step": 0, "config": read_start(run)[1]}
    checkpoint = checkpoints_of(run)[-1]
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        return checkpoint, {**state, "step": int(state["step"]), "config": dict(state["config"])}
    except Exception as error:  # torch's, zip's and pickle's errors share no base class
        fail(f"{checkpoint}: cannot be read ({first_line(error)}); {DAMAGED}")


def trains_otherwise(run: Path, before: dict[str, str], now: dict[str, str]) -> bool:
    """Whether a resumed run's settings change what is trained. Says what has changed.

    before: the settings of the checkpoint; now: of this run. What must not change is refused.
    """
    changed = [name for name in before if name in now and now[name] != before[name]]
    for name in FIXED:
        if name in changed:
            made_with = f"was made with {flag_of(name)} {before[name]}, not {now[name]}"
            advice = "pass that, or resume another run by its --run-name, or start a new one"
            fail(f"--resume: run {run.name} {made_with}; {advice}")
    if "prompts" in changed:
        causes = "the data, the rows that are selected, the system prompt or the tokenizer"
        advice = "change them back, or start a new run"
        fail(f"--resume: run {run.name} had other training prompts, by {causes}; {advice}")
    for name in sorted(changed):
        if name not in ("resume", "run_name"):
            print(f"  {name} is now {now[name]}, was {before[name]}")
    return not set(changed) <= set(HARMLESS)


def config_texts(config, prompts) -> dict[str, str]:
    """The config as it is kept with a run, and a checksum of its training prompts."""
    texts = {name: str(value) for name, value in asdict(config).items()}
    return texts | {"prompts": f"{zlib.crc32(repr(prompts).encode()):08x}"}


def free_space(path: Path) -> str:
    """What an error text says of the disk that holds a path; "" where it is unknown."""
    while not path.exists():
        path = path.parent
    try:
        return f", {shutil.disk_usage(path).free // 2**20} MB are free"
    except OSError:
        return ""


def step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; -1 where it is not whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else -1
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return -1


def delete_aside(folder: Path) -> None:
    """Delete a directory under another name, so that it is whole or gone."""
    aside = folder.with_name("deleting")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed here
    if folder.exists():
        os.replace(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def write_aside(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that it is whole or as it was."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text)
    os.replace(aside, path)


# ---------------------------------------------------------------- a run
def default_name(experiment: str) -> str:
    """The name of a run that begins now in this process."""
    return f"{experiment}_{time.strftime('%Y%m%d-%H%M%S')}_{os.getpid()}"


class Run:
    """The directories, logs, checkpoints and warnings of one run, and the wish to stop it."""

    def __init__(self, config, experiment: str, prompts) -> None:
        """Find the run to resume and its checkpoint, or begin a run that must not exist yet.

        prompts: those of training. Writes nothing; `open` does.
        """
        self.settings = config
        self.config = config_texts(config, prompts)
        self.last_checkpoint = None
        self.state = {"step": 0}  # what `save` has kept, for a resumed run
        self.trains_otherwise = False  # than the run that is resumed
        if config.resume:
            run = find_run(config, experiment)
            self.name = run.name
            self.last_checkpoint, self.state = find_checkpoint(run)
            where = f"from {self.last_checkpoint}"
            if not self.last_checkpoint:
                where = "from its beginning: it was stopped before its first checkpoint"
            another = "" if config.run_name else "; --run-name resumes another one"
            print(f"resuming run {run.name} {where}{another}")
            self.trains_otherwise = trains_otherwise(run, self.state["config"], self.config)
        else:
            self.name = config.run_name or default_name(experiment)
        self.log_dir = Path(config.log_dir) / self.name
        self.checkpoint_dir = Path(config.checkpoint_path) / experiment / self.name
        self.bar = None
        self.tensorboard = None
        self.stop_requested = False
        self.saved_step = None  # the last that was to be saved
        self.is_unsaved = False  # whether it could not be
        self.reported = set()  # what could not be written, so that it is said once
        self.skipped_in_a_row = self.state.get("skipped_in_a_row", 0)  # see check_updates
        self.without_spread = self.state.get("without_spread", 0)  # see watch
        self.nothing_learnt = ""  # what was seen in the last step without spread
        if config.max_steps == 0:
            return
        for folder in (self.checkpoint_dir, self.log_dir):
            if folder.exists() and not config.resume:
                self.refuse_name(folder)
        self.check_folder("--log-dir", config.log_dir)
        self.check_folder("--checkpoint-path", config.checkpoint_path)

    def refuse_name(self, folder: Path):
        """Of a new run, where a directory of that name exists."""
        advice = "choose another --run-name"
        if is_run(self.checkpoint_dir):
            advice = f"continue it with --resume, or {advice}"
        fail(f"run {self.name} exists ({folder}): {advice}")

    def check_folder(self, flag: str, path: str) -> None:
        """Refuse a log directory that cannot be written to; warn of such a checkpoint path."""
        folder = Path(path).absolute()
        try:
            while not folder.exists():
                folder = folder.parent
            with tempfile.TemporaryDirectory(dir=folder):
                return
        except OSError as error:
            message = f"{flag} {path}: {folder} cannot be written to ({error.strerror})"
        if flag == "--log-dir":
            fail(message)
        print(f"warning: {message}; nothing will be saved", flush=True)

    def open(self) -> None:
        """Begin to write; from here on the run can be resumed. Does nothing with --max-steps 0."""
        if self.settings.max_steps == 0:
            return
        content = {"started": time.time(), "config": self.config}
        with self.writing("run.json"):
            try:
                self.checkpoint_dir.mkdir(parents=True, exist_ok=self.settings.resume)
            except FileExistsError:  # of a run that has begun since this one looked
                self.refuse_name(self.checkpoint_dir)
            self.lock()
            if self.trains_otherwise and self.last_checkpoint:
                (self.last_checkpoint / "keep").touch()  # it is what the earlier training came to
            write_aside(self.checkpoint_dir / "run.json", json.dumps(content, indent=1))
        with self.writing("metrics.jsonl"):
            self.log_dir.mkdir(parents=True, exist_ok=True)
            self.cut_metrics()
        signal.signal(signal.SIGINT, self.on_signal)
        signal.signal(signal.SIGTERM, self.on_signal)  # of Slurm, docker stop, spot machines

    def lock(self) -> None:
        """Refuse a run that another process is training. The lock goes with this process."""
        self.lock_file = open(self.checkpoint_dir / "lock", "w")
        try:
            if fcntl:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"run {self.name} is being trained by another process; wait for it, or stop it")

    def start(self, evaluation: dict) -> None:
        """Training begins, or goes on. evaluation: of the policy as it is now."""
        from torch.utils.tensorboard import SummaryWriter

        step = self.state["step"]
        self.began = time.time() - self.state.get("elapsed_seconds", 0)
        self.before = self.state.get("before", evaluation)  # training began with this
        self.main_figure = list(evaluation)[0]  # which the progress bar shows
        self.evaluation = evaluation
        first_step = step + 1 if step else 0
        settings = "\n\n".join(f"{name}: {value}" for name, value in self.config.items())
        with self.writing("the TensorBoard log"):
            self.tensorboard = SummaryWriter(str(self.log_dir), purge_step=first_step)
            self.tensorboard.add_text("config", settings, first_step)
        self.wandb = None
        if self.settings.wandb:
            import wandb

            project = self.settings.wandb_project
            self.wandb = wandb.init(project=project, name=self.name, config=self.config)
        if step == 0:
            self.log(0, evaluation)

    def steps(self, last_step: int):
        """The numbers of the steps that are left, until one is saved after a signal to stop."""
        done = self.state["step"]
        if done >= last_step:
            advice = "a higher --max-steps or --epochs goes on"
            print(f"nothing is left: {done} of {last_step} steps are done; {advice}")
        self.bar = tqdm(range(done + 1, last_step + 1), initial=done, total=last_step)
        for step in self.bar:
            yield step
            if self.stop_requested and self.saved_step == step:
                break

    def elapsed_seconds(self) -> float:
        """Since training began, over all its resumed parts."""
        return time.time() - self.began

    def on_signal(self, number: int, _) -> None:
        """Ctrl-C or SIGTERM: finish the step and save. A second one ends the program at once."""
        if self.bar is None or self.stop_requested:
            saved = self.last_checkpoint or "none; --resume begins this run again"
            sys.exit(f"\nstopped; last checkpoint: {saved}")
        self.stop_requested = True
        name = signal.Signals(number).name
        message = "finishing this step, then saving; a second signal stops at once"
        print(f"\n{name}: {message}", flush=True)

    def cut_metrics(self) -> None:
        """Drop the lines of steps that are done again, and what a kill or a full disk cut off."""
        path = self.log_dir / "metrics.jsonl"
        step = self.state["step"]
        kept = []
        if path.exists() and step:
            for line in path.read_text(errors="replace").splitlines(keepends=True):
                if 0 <= step_of(line) <= step:
                    kept.append(line)
        if step and len(kept) <= step:
            missing = f"{step + 1 - len(kept)} of the lines up to step {step}"
            print(f"warning: {path} lacks {missing}; they cannot be made again", flush=True)
        write_aside(path, "".join(kept))

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
        if text:
            tqdm.write(text)
        with self.writing("the TensorBoard log"):
            if self.tensorboard:
                for name, value in figures.items():
                    self.tensorboard.add_scalar(name, value, step)
                if text:
                    self.tensorboard.add_text("completion", text.replace("\n", "  \n"), step)
                self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(figures, step=step)
        if self.main_figure in metrics:
            self.evaluation = metrics
        if self.bar is not None:
            self.bar.set_postfix(
                reward=metrics["reward"],
                length=metrics["completion_length"],
                eval=self.evaluation[self.main_figure],
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
            tqdm.write(show_group(experiences, tokenizer))

    def save(self, step: int, policy, tokenizer, state: dict) -> None:
        """Write weights, tokenizer and `state` to step_<step>, and delete old checkpoints.

        They are written aside and renamed, so that a checkpoint is whole or absent. An error
        costs this checkpoint, not the run.
        """
        self.saved_step = step
        final = self.checkpoint_dir / f"step_{step:06d}"
        aside = self.checkpoint_dir / "writing"
        state = {
            "before": self.before,
            "elapsed_seconds": self.elapsed_seconds(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "without_spread": self.without_spread,
            **state,
        }
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            adapter = {"selected_adapters": ["default"]} if hasattr(policy, "peft_config") else {}
            policy.save_pretrained(aside, **adapter)
            tokenizer.save_pretrained(aside)
            torch.save({**state, "step": step, "config": self.config}, aside / "trainer.pt")
            delete_aside(final)  # left where a checkpoint was deleted in part
            os.replace(aside, final)
        except WRITE_ERRORS as error:
            shutil.rmtree(aside, ignore_errors=True)
            self.is_unsaved = True
            message = f"checkpoint {final} cannot be written ({error}{free_space(aside)})"
            print(f"\nwarning: {message}; training goes on", flush=True)
            return
        self.is_unsaved = False
        self.last_checkpoint = final
        for old in checkpoints_of(self.checkpoint_dir)[:-KEPT_CHECKPOINTS]:
            if not (old / "keep").exists():
                with self.writing(f"{old}, which is to be deleted,"):
                    delete_aside(old)

    def close(self) -> None:
        """End the logs and say what came out of the run and where it lies."""
        if self.bar is not None:
            self.bar.close()
        with self.writing("the TensorBoard log"):
            if self.tensorboard:
                self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        after = self.evaluation
        gains = []
        for name, value in self.before.items():
            # With a slash: one of many. A resumed run may measure less than before.
            if name != "eval_count" and "/" not in name and name in after:
                gains.append(f"{name} {value:.4f} -> {after[name]:.4f}")
        seconds = f"in {self.elapsed_seconds():.0f} s"
        print(f"\nheld out ({after['eval_count']} prompts): {', '.join(gains)}, {seconds}")
        if self.without_spread >= NO_SPREAD_STEPS and self.nothing_learnt:
            print(f"warning: in the last {self.without_spread} steps {self.nothing_learnt}")
        curves = f"tensorboard --logdir {self.log_dir.parent}"
        if (self.log_dir / "completions.jsonl").exists():
            print(f"what it did to tokens: python tools/view.py {self.log_dir}")
        print(f"logs: {self.log_dir} ({curves}); checkpoint: {self.last_checkpoint}")
        if self.is_unsaved:
            fail("the last policy is not saved, see the warning above")


# ---------------------------------------------------------------- figures of a step
def masked_mean(values, mask):
    """The mean of `values` where `mask` is 1; 0 where nothing is marked."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def rollout_metrics(experiences, correct=None) -> dict[str, float | None]:
    """What a step's completions say about the policy: means over completions, if nothing is said.

    correct: (completions,), 1 where the answer is right; default: the part reward_accuracy, where
        there is one.
    """
    rewards = torch.stack([e.rewards for e in experiences])  # (groups, group_size)
    parts = {}  # name -> (completions,)
    for name in experiences[0].reward_parts:
        parts[name] = torch.cat([e.reward_parts[name] for e in experiences])
    masks = [mask for e in experiences for mask in e.completion_masks]
    log_probs = torch.cat([row for e in experiences for row in e.sampled_log_probs])
    lengths = torch.tensor([float(mask.sum()) for mask in masks])  # (completions,)
    if correct is None:
        correct = parts.get("reward_accuracy")
    length_correct = None
    length_wrong = None
    if correct is not None and correct.any():
        length_correct = masked_mean(lengths, correct).item()
    if correct is not None and not correct.all():
        length_wrong = masked_mean(lengths, 1 - correct).item()
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


def show_group(experiences, tokenizer) -> str:
    """The best and the worst completion of a group, with the prompt, all special tokens, and what
    they earned. Of the first group with spread, where there is one."""
    with_spread = [experience for experience in experiences if experience.advantages.any()]
    group = (with_spread or experiences)[0]
    rewards = group.rewards.tolist()
    right = f"right answer: {group.answer}, " if group.answer else ""
    text = tokenizer.decode(group.prompt_ids)
    for number in dict.fromkeys([rewards.index(max(rewards)), rewards.index(min(rewards))]):
        earned = f"reward {rewards[number]:.2f}, advantage {group.advantages[number]:+.2f}"
        text += f"{tokenizer.decode(group.completion_ids[number])}\n[{right}{earned}]\n"
    return text.removesuffix("\n")


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
