"""experiment_minimal on several seeds, and its step time beside experiment_base's.

    python benchmarks/minimal.py                # 10 minutes on two cores; results/minimal.json
    python benchmarks/minimal.py --seeds 42     # one seed

Each seed is a run of the file as a user runs it. Step times are taken in pairs of processes, one
of each experiment in turn, on the same work: 16 prompts x 8 completions, two updates, KL.
"""

import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    seeds: tuple[int, ...] = (42, 1, 2)  # runs of experiment_minimal/train.py
    pairs: int = 3  # processes of each experiment whose steps are timed
    steps: int = 6  # timed steps of a process, after one that is not counted
    output: str = str(ROOT / "results" / "minimal.json")
    side: Literal["", "minimal", "base"] = ""  # a process of a pair: prints its seconds a step


def run_seed(seed: int) -> dict:
    """Held-out accuracy before and after, and the seconds of the whole process."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "experiment_minimal" / "train.py"), str(seed)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    before, after = re.search(r"held out.*: ([\d.]+) -> ([\d.]+)", output).groups()
    return {"seed": seed, "before": float(before), "after": float(after), "seconds": seconds}


def time_minimal(steps: int) -> list[float]:
    """Seconds from one step's line to the next one's."""
    path = ROOT / "experiment_minimal" / "train.py"
    spec = importlib.util.spec_from_file_location("minimal", path)
    minimal = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(minimal)
    times = []
    minimal.STEPS = steps + 2
    minimal.evaluate = lambda *_: 0.0
    minimal.print = lambda *_, **__: times.append(time.perf_counter())
    minimal.main()
    times = times[1 : steps + 2]
    return [later - earlier for earlier, later in zip(times, times[1:])]


def time_base(steps: int) -> list[float]:
    """Seconds from the start of one step to that of the next one."""
    sys.path.insert(0, str(ROOT / "experiment_base"))
    import train

    times = []

    def steps_with_times(run, last_step):
        for step in range(1, last_step + 1):
            times.append(time.perf_counter())
            yield step

    train.evaluate = lambda *_: {"eval_accuracy": 0.0, "eval_count": 0}
    train.Run.steps = steps_with_times
    with tempfile.TemporaryDirectory() as folder:
        train.main(
            train.Config(
                max_steps=steps + 2,
                log_dir=f"{folder}/runs",
                checkpoint_path=f"{folder}/output",
                checkpoint_interval=10**9,
            )
        )
    times = times[1 : steps + 2]
    return [later - earlier for earlier, later in zip(times, times[1:])]


def seconds_a_step(side: str, config: Config) -> float:
    """The median of a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--steps", str(config.steps)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def main(config: Config) -> None:
    if config.side:
        times = time_minimal(config.steps) if config.side == "minimal" else time_base(config.steps)
        print(statistics.median(times))
        return
    pairs = []
    for _ in range(config.pairs):
        minimal = seconds_a_step("minimal", config)
        base = seconds_a_step("base", config)
        pairs.append({"minimal": minimal, "base": base})
        print(f"seconds a step: minimal {minimal:.2f}, base {base:.2f}", flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.platform(),
        "pairs": pairs,
        "minimal_seconds": statistics.median(pair["minimal"] for pair in pairs),
        "base_seconds": statistics.median(pair["base"] for pair in pairs),
        "ratio": statistics.median(pair["minimal"] / pair["base"] for pair in pairs),
        "runs": [],
    }
    for seed in config.seeds:
        report["runs"].append(run_seed(seed))
        print(report["runs"][-1], flush=True)
    Path(config.output).write_text(json.dumps(report, indent=1) + "\n")
    print(f"minimal / base {report['ratio']:.2f}; written: {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
