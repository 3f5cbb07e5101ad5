"""Kill the processes of asynchronous runs with SIGKILL at random moments.

    python benchmarks/async_kills.py         # 50 kills, about half an hour on two cores

Each trial starts experiment_async and kills, at a random moment, its sampler, its trainer or one of
Ray's own processes. What is asked of it:

    no hang     it ends within 60 s of the time that is left without a kill, or trains on
    sampler     the run ends by itself, with the weights of the run that nobody killed, bit for bit
    otherwise   where the run has ended, --resume brings it to its last step
    always      every step is logged once, as many updates were made as in the run that nobody
                killed, and no process is left 90 s after the last one

Writes results/async_kills.json. Exits with 1 where a trial fails.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import tyro
from safetensors.torch import load_file
from vs_trl import describe_machine

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
SECONDS_OF_RAYS_OWN = 90
FLAGS = {
    "rollouts-per-step": 8,
    "group-size": 4,
    "train-batch-size": 16,
    "max-steps": STEPS,
    "checkpoint-interval": 3,
    "eval-interval": 0,
    "max-eval-prompts": 32,
    "log-completions-interval": 0,
}
TARGETS = ("sampler", "trainer", "ray")


@dataclass
class Config:
    kills: int = 50
    seed: int = 0
    patience: float = 60.0  # seconds
    output: Path = ROOT / "results" / "async_kills.json"


class Run:
    """A run of experiment_async and its processes."""

    def __init__(self, folder: Path, name: str, *more: str) -> None:
        self.folder = folder
        self.name = name
        command = [sys.executable, str(ROOT / "experiment_async" / "train.py"), "--run-name", name]
        command += ["--log-dir", str(folder / "runs"), "--checkpoint-path", str(folder / "out")]
        for flag, value in FLAGS.items():
            command += [f"--{flag}", str(value)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.log = open(folder / f"{name}.log", "a")
        self.started = time.time()
        self.process = subprocess.Popen(
            [*command, *more], stdout=self.log, stderr=subprocess.STDOUT, env=environment
        )
        self.others = {}  # id -> process

    def look(self) -> None:
        """Note which processes there are now."""
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.others[process.pid] = process
        except psutil.NoSuchProcess:
            pass

    def wait(self, seconds: float) -> bool:
        """Whether it ends within that time."""
        until = time.time() + seconds
        while time.time() < until:
            if self.process.poll() is not None:
                return True
            self.look()
            time.sleep(0.1)
        return False

    def targets(self, kind: str) -> dict[psutil.Process, str]:
        """process -> its name, of those that may be killed."""
        if kind == "trainer":
            try:
                return {psutil.Process(self.process.pid): "trainer"}
            except psutil.NoSuchProcess:  # it has ended by itself
                return {}
        self.look()
        names = {}
        for process, name in self.left().items():
            if name.startswith("ray::Sampler") == (kind == "sampler"):
                names[process] = name
        return names

    def steps(self) -> list[int]:
        path = self.folder / "runs" / self.name / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    def result(self) -> tuple[dict, int]:
        """(weights, updates that made them) of the last checkpoint."""
        folder = self.folder / "out" / "experiment_async" / self.name / f"step_{STEPS:06d}"
        state = torch.load(folder / "trainer.pt", weights_only=True)
        return load_file(folder / "model.safetensors"), state["version"]

    def left(self) -> dict[psutil.Process, str]:
        """Ray's processes that are still there, and their names."""
        names = {}
        for process in self.others.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    names[process] = process.name()
            except psutil.NoSuchProcess:
                pass
        return names


def trial(
    folder: Path, number: int, kind: str, moment: float, patience: float, undisturbed, runs: list
):
    """What was done, and what went wrong, as a dict. moment: seconds from the start."""
    run = Run(folder, f"kill_{number}")
    done = {"target": kind, "moment": round(moment, 2), "problems": []}
    run.wait(moment)
    while run.process.poll() is None and not run.targets(kind):
        time.sleep(0.1)  # its sampler has not been started yet, or is being started anew
    targets = run.targets(kind)
    if run.process.poll() is not None or not targets:
        done["target"] = "nothing to kill"
    else:
        chance = random.Random(number)
        done["process"] = chance.choice(sorted(set(targets.values())))  # each name as likely
        chance.choice([at for at, name in targets.items() if name == done["process"]]).kill()
    killed = time.time()
    rest = max(0.0, undisturbed["seconds"] - moment)
    if not run.wait(rest + patience):
        done["problems"].append("hangs")
        run.process.kill()
        run.process.wait()
    done["ended_after"] = round(time.time() - killed, 1)
    done["status"] = run.process.returncode
    if kind == "sampler" and run.process.returncode:
        done["problems"].append("a killed sampler ended the run")
    runs.append(run)
    if run.process.returncode:
        has_begun = (folder / "out" / "experiment_async" / run.name / "run.json").exists()
        again = Run(folder, run.name, *(["--resume"] if has_begun else []))
        if not again.wait(undisturbed["seconds"] + patience) or again.process.returncode:
            done["problems"].append("could not be resumed")
            again.process.kill()
            return done
        runs.append(again)
    if run.steps() != list(range(STEPS + 1)):
        done["problems"].append(f"the log has the steps {run.steps()}")
    weights, version = run.result()
    if version != undisturbed["version"]:
        done["problems"].append(f"{version} updates")
    same = all(torch.equal(weights[name], undisturbed["weights"][name]) for name in weights)
    done["same_weights"] = same
    if not run.process.returncode and not same:
        done["problems"].append("other weights")
    return done


def main(config: Config) -> None:
    trials = []
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run(folder, "undisturbed")
        if not run.wait(300) or run.process.returncode:
            sys.exit((folder / "undisturbed.log").read_text()[-3000:])
        undisturbed = {"seconds": time.time() - run.started}
        undisturbed["weights"], undisturbed["version"] = run.result()
        print(f"a run that nobody kills takes {undisturbed['seconds']:.0f} s", flush=True)
        chance = random.Random(config.seed)
        kills = 0
        while kills < config.kills:
            number = len(trials)
            kind = TARGETS[kills % len(TARGETS)]
            moment = chance.uniform(0.5, 0.9 * undisturbed["seconds"])
            trials.append(trial(folder, number, kind, moment, config.patience, undisturbed, runs))
            kills += "process" in trials[-1]
            print(number, trials[-1], flush=True)
    time.sleep(SECONDS_OF_RAYS_OWN)
    left = [name for run in runs for name in run.left().values()]
    by_name = Counter(trial.get("process") for trial in trials)
    failed = sum(bool(trial["problems"]) for trial in trials)
    report = {
        "machine": describe_machine(),
        "undisturbed_seconds": round(undisturbed["seconds"], 1),
        "kills": kills,
        "failed": failed,
        "killed": {str(name): count for name, count in by_name.items() if name},
        "longest_end": max(trial["ended_after"] for trial in trials),
        "processes_left": left,
        "trials": trials,
    }
    config.output.parent.mkdir(exist_ok=True)
    config.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{kills} kills, {failed} failed; processes left: {left}")
    sys.exit(1 if failed or left else 0)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
