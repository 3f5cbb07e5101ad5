"""What staleness does to learning, with the importance weights and without.

    python benchmarks/staleness.py      # 25 minutes; it can be stopped and started again

experiment_async with one update a step, so that a step more is an update more: held-out accuracy
over equal samples, for max_staleness 0, 1, 4, 16. Writes into results/staleness.json.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    seeds: tuple[int, ...] = (42, 1, 2)
    staleness: tuple[int, ...] = (0, 1, 4, 16)
    folder: Path = ROOT / "runs" / "staleness"
    output: Path = ROOT / "results" / "staleness.json"


def run(options: Options, seed: int, staleness: int, cap: float) -> dict[str, float]:
    """step -> held-out accuracy."""
    name = f"{seed}_{staleness}_{cap:g}"
    metrics = options.folder / name / "metrics.jsonl"
    done = metrics.exists() and '\n{"step": 64' in metrics.read_text()
    if not done:
        command = [sys.executable, str(ROOT / "experiment_async" / "train.py"), "--run-name", name]
        command += ["--seed", str(seed), "--max-staleness", str(staleness)]
        command += ["--importance-cap", str(cap), "--train-batch-size", "128"]
        command += ["--log-dir", str(options.folder), "--eval-interval", "4"]
        command += ["--checkpoint-path", str(options.folder / "out"), "--checkpoint-interval", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        if found.returncode:
            sys.exit(f"error: {' '.join(command)}\n{found.stderr[-2000:]}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}


def main(options: Options) -> None:
    report = {}
    for seed in options.seeds:
        for staleness in options.staleness:
            for cap in (2.0, 0.0):
                found = run(options, seed, staleness, cap)
                report[f"seed {seed}, staleness {staleness}, cap {cap:g}"] = found
                print(seed, staleness, cap, [f"{100 * a:.0f}" for a in found.values()], flush=True)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
