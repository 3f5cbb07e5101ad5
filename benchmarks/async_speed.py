"""What asynchrony is worth: seconds a step with and without it, and a picture of both.

    python benchmarks/async_speed.py      # 8 minutes

experiment_async with one sampler, in turn (--max-staleness 0) and at the same time (2), on the
default task, one thread each. First as it is, then with a sampler that is made slower by a sleep in
each step. The two modes take turns. Of each run the first steps are left out, while the sampler
still loads. Writes results/async_speed.json, and results/async_timeline.png from the runs' own
timeline.jsonl.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from vs_trl import describe_machine

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
MODES = {"in turn": 0, "at the same time": 2}  # name -> max_staleness
FIRST = 4  # steps that are left out
SHOWN = 5  # steps in the picture


@dataclass
class Config:
    steps: int = 24
    repeats: int = 3
    delays: tuple[float, ...] = (0.0, 0.3)
    folder: Path = ROOT / "results"


def run(folder: Path, name: str, staleness: int, delay: float, steps: int) -> dict:
    """Seconds a step, those that were waited, and the timeline."""
    script = ROOT / "experiment_async" / "train.py"
    command = [sys.executable, str(script), "--log-dir", str(folder), "--run-name", name]
    command += ["--checkpoint-path", str(folder / "out"), "--checkpoint-interval", "0"]
    command += ["--max-steps", str(steps), "--eval-interval", "0", "--max-eval-prompts", "32"]
    command += ["--max-staleness", str(staleness), "--sampler-delay", str(delay)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    timeline = (folder / name / "timeline.jsonl").read_text().splitlines()
    # The last step also evaluates and saves.
    ends = [line["elapsed_seconds"] for line in metrics[FIRST:-1]]
    idle = [line["trainer_idle_seconds"] for line in metrics[FIRST + 1 : -1]]
    return {
        "seconds": (ends[-1] - ends[0]) / (len(ends) - 1),
        "trainer_waits": statistics.mean(idle),
        "timeline": [json.loads(line) for line in timeline],
    }


def draw(timelines: dict[str, list[dict]], path: Path) -> None:
    """A row for the trainer and one for the sampler, for each mode, over the same seconds."""
    figure, rows = plt.subplots(len(timelines), 1, figsize=(9, 3.4), sharex=True)
    colours = plt.get_cmap("tab10").colors
    for axes, (mode, steps) in zip(rows, timelines.items()):
        start = steps[FIRST]["waited"][0]
        for step, following in zip(steps[FIRST:], steps[FIRST + 1 : FIRST + SHOWN + 4]):
            colour = colours[step["step"] % 10]
            trained = (step["waited"][1] - start, following["waited"][0] - step["waited"][1])
            axes.broken_barh([trained], (1.1, 0.8), color=colour)
            sampled = [(began - start, ended - began) for _, began, ended in step["sampled"]]
            axes.broken_barh(sampled, (0.1, 0.8), color=colour)
            for (left, width), height in ((trained, 1.5), (sampled[0], 0.5)):
                axes.text(left + width / 2, height, step["step"], ha="center", va="center")
        axes.set_yticks([0.5, 1.5], ["sampler", "trainer"])
        axes.set_title(mode, loc="left", fontsize=10)
        axes.set_ylim(0, 2)
    last = (
        timelines["in turn"][FIRST + SHOWN]["waited"][0] - timelines["in turn"][FIRST]["waited"][0]
    )
    rows[-1].set_xlim(0, last)
    rows[-1].set_xlabel("seconds; the numbers are steps")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    report = {"date": datetime.date.today().isoformat(), "machine": describe_machine()}
    with tempfile.TemporaryDirectory() as name:
        for delay in config.delays:
            runs = {mode: [] for mode in MODES}
            for repeat in range(config.repeats):
                for mode, staleness in MODES.items():
                    label = f"{staleness}_{delay:g}_{repeat}"
                    found = run(Path(name), label, staleness, delay, config.steps)
                    runs[mode].append(found)
                    print(delay, mode, f"{found['seconds']:.3f} s a step", flush=True)
            figures = {}
            for mode, found in runs.items():
                for key in ("seconds", "trainer_waits"):
                    figures[f"{mode}: {key}"] = [round(one[key], 3) for one in found]
            pairs = zip(*([one["seconds"] for one in found] for found in runs.values()))
            ratios = [same_time / in_turn for in_turn, same_time in pairs]
            figures["ratios"] = [round(ratio, 3) for ratio in ratios]
            report[f"sampler delayed by {delay:g} s"] = figures
            print(f"delay {delay:g}: ratio {statistics.median(ratios):.2f}", flush=True)
            timelines = {mode: found[-1]["timeline"] for mode, found in runs.items()}
            draw(timelines, config.folder / "async_timeline.png")  # the last delay's stays
    text = json.dumps(report, indent=1) + "\n"
    (config.folder / "async_speed.json").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
