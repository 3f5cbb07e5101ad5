"""What a run needs and what teaches nothing about GRPO: checks, data files, logs, checkpoints, signals, error texts.

No tensor of tokens enters this file. It is the same in every experiment.
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

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses an optional kernel at every start
KEPT_CHECKPOINTS = 2  # the newest of a run; older ones are deleted
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
# What a resumed run shares with the run that it continues, so that its weights fit and its prompts go on in order.
FIXED = ("model_name", "lora_rank", "load_in_4bit", "optimizer", "seed", "data_path", "eval_data_path", "max_prompts")
FIXED += ("group_size", "rollouts_per_step", "train_batch_size", "epochs_per_step")
POSITIVE = ("rollouts_per_step", "temperature", "max_new_tokens", "epochs_per_step")
POSITIVE += ("eval_interval", "checkpoint_interval", "max_sampling_rounds", "max_turns", "top_k", "max_result_tokens")
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # of a full disk, as Python, torch and safetensors report it


def fail(message: str):
    """End the program with one line that says what is wrong and how to mend it."""
    sys.exit(f"error: {message}")


def check_config(config) -> None:
    """Refuse what cannot work before anything is loaded."""
    completions = config.rollouts_per_step * config.group_size
    if config.group_size < 2:
        fail(f"--group-size {config.group_size}: a completion is compared with its group; take at least 2")
    batch = config.train_batch_size
    if batch < 1 or batch % config.group_size or completions % batch:
        wanted = f"a multiple of --group-size {config.group_size} that divides --rollouts-per-step x --group-size"
        fail(f"--train-batch-size {batch}: must be {wanted} = {completions}")
    if config.load_in_4bit and not config.lora_rank:
        fail("--load-in-4bit: 4-bit weights cannot be trained; add --lora-rank 16")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        fail("--wandb: the package is missing; pip install wandb")
    if config.sample_rows < config.group_size:
        fail(f"--sample-rows {config.sample_rows}: must hold one group, --group-size {config.group_size}")
    for name in POSITIVE:
        if getattr(config, name, 1) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0")


# ---------------------------------------------------------------- data
def read_rows(path: str, split: str) -> list[tuple[str, dict]]:
    """(where, row), as ("tasks.jsonl, line 3", {...}), of a .jsonl, .json or .parquet file or of a hub data set."""
    (name, _, subset), where = path.partition(":"), path
    try:
        if not path.endswith(DATA_SUFFIXES):
            import datasets

            loaded = datasets.load_dataset(name, subset or None, split=split)
            rows = [(f"{path}, {split} row {i}", row) for i, row in enumerate(loaded, 1)]
        elif path.endswith(".parquet"):
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)]
        elif path.endswith(".json"):
            rows = list(read_json_list(path, Path(path).read_text("utf-8")))
        else:
            lines = enumerate(Path(path).read_text("utf-8").split("\n"), 1)
            rows = [(where := f"{path}, line {i}", json.loads(line)) for i, line in lines if line.strip()]
    except Exception as error:  # json's, Arrow's and the hub's errors share no base class
        hint = "" if path.endswith(DATA_SUFFIXES) else "; files end in .jsonl, .json or .parquet, else it is a hub id"
        fail(f"{where}: cannot be read{hint}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    for where, row in rows:
        if not isinstance(row, dict):
            fail(f"{where}: expected an object with fields, found {type(row).__name__}")
    return rows


def read_json_list(path: str, text: str):
    """(where, element) for each element of a list in JSON."""
    elements, line, start, end = json.loads(text), 1, 0, text.find("[") + 1
    for element in elements if isinstance(elements, list) else fail(f"{path}: expected a list of objects"):
        before, start = start, re.compile(r"[\s,]*").match(text, end).end()
        line += text.count("\n", before, start)
        yield f"{path}, line {line}", element
        end = json.JSONDecoder().raw_decode(text, start)[1]


def read_train_and_eval_rows(data_path: str, eval_data_path: str | None):
    """(training rows, held-out rows) as `read_rows` gives them. Held out is, in this order: `eval_data_path`; the file
    <name>_eval.<suffix> beside a local file; a hub data set's `test` split; the last 10 % of the rows, at most 512."""
    rows = read_rows(data_path, "train")
    stem, suffix = os.path.splitext(data_path)
    if eval_data_path or os.path.isfile(f"{stem}_eval{suffix}"):
        return rows, read_rows(eval_data_path or f"{stem}_eval{suffix}", "test")
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
    found = [path for path in run.glob("step_*") if path.name[5:].isdigit() and (path / "trainer.pt").is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def find_checkpoint(config, experiment: str) -> tuple[Path, dict]:
    """The newest checkpoint of the named run, else of the experiment's newest run, and what training needs of it beside
    the weights. Refuses one that this config does not continue."""
    folder = Path(config.checkpoint_path) / experiment
    runs = [folder / config.run_name] if config.run_name else folder.glob("*")
    found = [checkpoints_of(run)[-1] for run in runs if checkpoints_of(run)]
    if not found:
        fail(f"--resume: no checkpoint under {folder / (config.run_name or '*')}; start a run without --resume")
    checkpoint = max(found, key=lambda path: (path / "trainer.pt").stat().st_mtime_ns)
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        fail(f"{checkpoint}: cannot be read ({error}); delete this directory to resume from the one before it")
    now = {name: str(value) for name, value in asdict(config).items()}
    changed = {name: value for name, value in state["config"].items() if name in now and now[name] != value}
    for name in [name for name in FIXED if name in changed]:
        flag = f"--{name.replace('_', '-')} {changed[name]}"
        fail(f"--resume: {checkpoint.parent} was made with {flag}, not {now[name]}; pass that, or start a new run")
    print(f"resuming run {checkpoint.parent.name} from {checkpoint}")
    for name in sorted(changed.keys() - {"resume", "run_name"}):
        print(f"  {name} is now {now[name]}, was {changed[name]}")
    return checkpoint, state


# ---------------------------------------------------------------- a run
class Run:
    """The directories, logs and checkpoints of one run, and the wish to stop it."""

    def __init__(self, config, experiment: str, checkpoint: Path | None = None) -> None:
        """Continue at `checkpoint`, or begin a run whose directories must not exist yet."""
        new_name = config.run_name or time.strftime(f"{experiment}_%Y%m%d-%H%M%S")
        self.name = checkpoint.parent.name if checkpoint else new_name
        self.log_dir = Path(config.log_dir) / self.name
        self.checkpoint_dir = Path(config.checkpoint_path) / experiment / self.name
        self.config = {name: str(value) for name, value in asdict(config).items()}
        self.last_checkpoint, self.stop_requested, self.reported = checkpoint, False, set()
        if config.max_steps != 0 and not checkpoint and (self.log_dir.exists() or self.checkpoint_dir.exists()):
            fail(f"run {self.name} exists: continue it with --resume, or choose another --run-name")
        for flag, path in (("--log-dir", Path(config.log_dir)), ("--checkpoint-path", Path(config.checkpoint_path))):
            folder = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
            if not (folder.is_dir() and os.access(folder, os.W_OK)):
                if flag == "--log-dir":
                    fail(f"{flag} {path}: {folder} cannot be written to")
                print(f"warning: {flag} {path}: {folder} cannot be written to; nothing will be saved", flush=True)

    def open(self, config) -> None:
        """Begin to write; all that could be refused has been."""
        from torch.utils.tensorboard import SummaryWriter

        first_step = int(self.last_checkpoint.name[5:]) + 1 if self.last_checkpoint else 0
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self.cut_metrics(first_step)
        self.tensorboard = SummaryWriter(str(self.log_dir), purge_step=first_step)
        self.tensorboard.add_text("config", "\n\n".join(f"{k}: {v}" for k, v in self.config.items()), first_step)
        self.wandb = None
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project=config.wandb_project, name=self.name, config=self.config)
        signal.signal(signal.SIGINT, self.on_interrupt)

    def on_interrupt(self, *_) -> None:
        """Ctrl-C: finish the step and save. A second one ends the program at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.stop_requested = True
        print("\nstopping after this step; Ctrl-C again stops at once", flush=True)

    def cut_metrics(self, first_step: int) -> None:
        """Drop the lines from `first_step` on, and a last line that a kill cut off."""
        path = self.log_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < first_step]
        path.with_suffix(".tmp").write_text("".join(lines))
        os.replace(path.with_suffix(".tmp"), path)

    @contextmanager
    def writing(self, what: str):
        """An error in writing is reported once, and training goes on."""
        try:
            yield
        except OSError as error:
            if what not in self.reported:
                print(f"\nwarning: {what} cannot be written ({error}); training goes on", flush=True)
            self.reported.add(what)

    def log(self, step: int, metrics: dict, text: str | None = None) -> None:
        """One line of metrics.jsonl, the same figures in TensorBoard, and a trajectory where one is given."""
        metrics = {name: value if math.isfinite(value or 0) else None for name, value in metrics.items()}
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

    def save(self, step: int, policy, tokenizer, state: dict) -> None:
        """Write weights, tokenizer and `state` aside and rename them to step_<step>, so that a checkpoint is whole or
        absent; delete old ones. An error costs this checkpoint, not the run."""
        final, aside = self.checkpoint_dir / f"step_{step:06d}", self.checkpoint_dir / "writing"
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
            print(f"\nwarning: checkpoint {final} cannot be written ({error}); training goes on", flush=True)
            return
        self.last_checkpoint = final
        for old in checkpoints_of(self.checkpoint_dir)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)

    def close(self, before: dict, after: dict, seconds: float) -> None:
        """End the logs and say what came out of the run and where it lies."""
        with self.writing("the TensorBoard log"):
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        gains = ", ".join(f"{name} {before[name]:.4f} -> {after[name]:.4f}" for name in before if name != "eval_count")
        print(f"\nheld out ({after['eval_count']} prompts): {gains}, in {seconds:.0f} s")
        print(f"logs: {self.log_dir} (tensorboard --logdir {self.log_dir.parent}); checkpoint: {self.last_checkpoint}")
