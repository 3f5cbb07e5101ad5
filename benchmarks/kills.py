"""Kill runs with SIGKILL at random moments, resume them, and compare with the uninterrupted run.

    python benchmarks/kills.py                 # 50 kills, about half an hour on two cores

Each trial starts a run, kills it while it samples, trains, evaluates or saves, resumes it with
--resume, and compares what it comes to with the run that nobody killed: the weights, the
optimizer's state and every logged figure but times, bit for bit. Trials take turns over the seeds,
the sizes and the four phases. Writes results/kills.json. Exits with 1 where a trial differs.
"""

import datetime
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file
from vs_trl import describe_machine

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("sampling", "training", "evaluation", "saving")
SIZES = {
    "default": {
        "max-steps": 12,
        "checkpoint-interval": 4,
        "eval-interval": 4,
        "max-eval-prompts": 128,
    },
    "small": {
        "rollouts-per-step": 4,
        "group-size": 4,
        "train-batch-size": 8,
        "eval-interval": 4,
        "checkpoint-interval": 3,
        "max-steps": 12,
        "max-eval-prompts": 128,
    },
}
TIMES = {"elapsed_seconds", "sample_tokens_per_second", "train_tokens_per_second", "peak_memory"}
# Runs train.py, and prints a line when a phase begins and when it ends.
WATCHED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import run, train, tyro

within = []  # an evaluation samples, which is no phase of its own

def watch(holder, name, phase):
    function = getattr(holder, name)
    def watched(*args, **kwargs):
        within.append(phase)
        if len(within) == 1:
            print(f"PHASE {phase} begins", flush=True)
        result = function(*args, **kwargs)
        if len(within) == 1:
            print(f"PHASE {phase} ends", flush=True)
        within.pop()
        return result
    setattr(holder, name, watched)

watch(train, "rollout", "sampling")
watch(train, "add_old_and_reference_log_probs", "training")
watch(train, "optimizer_step", "training")
watch(train, "evaluate", "evaluation")
watch(run.Run, "save", "saving")
train.main(tyro.cli(train.Config))
"""


@dataclass
class Config:
    kills: int = 50
    seeds: tuple[int, ...] = (42, 1)
    sizes: tuple[str, ...] = ("default", "small")
    # An experiment's directory. Another version of the repository may be measured too.
    experiment: Path = ROOT / "experiment_base"
    # Decides when runs are killed.
    random_seed: int = 0
    results: Path = ROOT / "results" / "kills.json"


def start(folder: Path, size: str, seed: int, experiment: Path, *more: str):
    """A process of a run that lies in `folder`."""
    flags = SIZES[size] | {"seed": seed, "run-name": "run"}
    flags |= {"log-dir": folder / "runs", "checkpoint-path": folder / "output"}
    command = [sys.executable, "-c", WATCHED, str(experiment)]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with open(f"{folder}.stderr", "w") as errors:  # apart: the progress bar's lines do not end
        return subprocess.Popen(
            command + list(more), stdout=subprocess.PIPE, stderr=errors, text=True
        )


def phases_of(process):
    """(phase, "begins" or "ends", time) as the process prints them; its output in the end."""
    for line in process.stdout:
        if line.startswith("PHASE "):
            _, phase, event = line.split()
            yield phase, event, time.time()


def finish(process, folder: Path) -> list[tuple]:
    """The phases of a run that is let alone."""
    events = list(phases_of(process))
    if process.wait():
        print(Path(f"{folder}.stderr").read_text()[-2000:])
        sys.exit(f"error: a run ended with {process.returncode}")
    return events


def kill_in(process, begin: int, delay: float) -> str:
    """Kill it `delay` seconds after the phase that begins as number `begin`. Returns the phase in
    which it really was."""
    seen = ("", "ends")
    begun = -1
    for phase, event, _ in phases_of(process):
        seen = (phase, event)
        begun += event == "begins"
        if begun == begin:
            time.sleep(delay)
            break
    process.send_signal(signal.SIGKILL)
    for phase, event, _ in phases_of(process):  # what it printed before it died
        seen = (phase, event)
    process.wait()
    return seen[0] if seen[1] == "begins" else f"after {seen[0]}"


def outcome(folder: Path, experiment: Path):
    """(weights, the optimizer's state, logged figures) of a finished run."""
    (newest,) = sorted((folder / "output" / experiment.name / "run").glob("step_*"))[-1:]
    weights = load_file(newest / "model.safetensors")
    state = torch.load(newest / "trainer.pt", weights_only=True)["optimizer"]["state"]
    lines = []
    for line in (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines():
        lines.append({k: v for k, v in json.loads(line).items() if k not in TIMES})
    return weights, state, lines


def differences(one, other) -> list[str]:
    """What differs between two outcomes; empty where they are the same bit for bit."""
    weights = sum(not torch.equal(value, other[0][name]) for name, value in one[0].items())
    moments = 0
    for number, state in one[1].items():
        for name, value in state.items():
            moments += not torch.equal(value, other[1][number][name])
    found = [f"{weights} weights"] if weights else []
    found += [f"{moments} moments"] if moments else []
    return found + (["the log"] if one[2] != other[2] else [])


def trial(size: str, seed: int, phase: str, reference, folder: Path, config: Config, rng) -> dict:
    """Kill a run in a phase, resume it, compare it with the reference: (events, outcome)."""
    events, expected = reference
    begins = [event for event in events if event[1] == "begins"]
    chosen = rng.choice([i for i, event in enumerate(begins) if event[0] == phase])
    at = events.index(begins[chosen])
    delay = rng.random() * (events[at + 1][2] - events[at][2])
    killed_in = kill_in(start(folder, size, seed, config.experiment), chosen, delay)
    has_checkpoint = any((folder / "output").rglob("trainer.pt"))
    finish(start(folder, size, seed, config.experiment, "--resume"), folder)
    differing = differences(expected, outcome(folder, config.experiment))
    shutil.rmtree(folder)
    row = {"size": size, "seed": seed, "aimed_at": phase, "killed_in": killed_in}
    return row | {"had_a_checkpoint": has_checkpoint, "differing": differing}


def main(config: Config) -> None:
    rng = random.Random(config.random_seed)
    rows = []
    kinds = list(itertools.product(config.sizes, config.seeds, PHASES))
    rng.shuffle(kinds)
    with tempfile.TemporaryDirectory() as temporary:
        references = {}
        for number in range(config.kills):
            size, seed, phase = kinds[number % len(kinds)]
            if (size, seed) not in references:
                whole = Path(temporary) / f"whole_{size}_{seed}"
                events = finish(start(whole, size, seed, config.experiment), whole)
                references[size, seed] = events, outcome(whole, config.experiment)
            place = Path(temporary) / f"kill_{number}"
            rows.append(trial(size, seed, phase, references[size, seed], place, config, rng))
            print(f"{number + 1}/{config.kills}: {rows[-1]}", flush=True)
    same = sum(not row["differing"] for row in rows)
    summary = {
        "date": str(datetime.date.today()),
        "processor": describe_machine()["cpu"],
        "kills": rows,
    }
    config.results.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"{same} of {len(rows)} resumed runs equal the uninterrupted one bit for bit")
    if same < len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
