"""What asynchrony is worth: seconds a step with and without it, and a picture of both.

    python benchmarks/async_speed.py      # 8 minutes

experiment_async with one sampler, in turn (--max-staleness 0) and at the same time (2), on the
default task, on two cores, one thread each; and experiment_base with two threads, which has the
same two cores. First as it is. Then the sampler is made slower by a sleep in each step, which takes
no core: the best case of asynchrony. The modes take turns. Of each run the first steps are left
out, while the sampler still loads. Writes results/async_speed.json, and results/async_timeline.png
from the runs' own metrics.jsonl.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import tyro
from base_curve import ROOT, plt, run_once
from vs_trl import describe_machine

ASYNC = "experiment_async"
MODES = {  # name -> experiment, its flags, threads
    "in turn": (ASYNC, "--max-staleness 0", 1),
    "at the same time": (ASYNC, "--max-staleness 2", 1),
    "base, two threads": ("experiment_base", "", 2),
}
FIRST = 4  # steps that are left out
SHOWN = 5  # steps in the picture


@dataclass
class Config:
    steps: int = 24
    repeats: int = 3
    delays: tuple[float, ...] = (0.0, 0.3)
    folder: Path = ROOT / "results"


def run(folder: Path, name: str, mode: str, delay: float, steps: int) -> dict:
    """Seconds a step, those that the trainer waited, and the metrics."""
    experiment, flags, threads = MODES[mode]
    flags = f"{flags} --max-steps {steps} --eval-interval 0 --max-eval-prompts 32".split()
    flags += ["--checkpoint-interval", "0"]
    if experiment == ASYNC:
        flags += ["--sampler-delay", str(delay)]
    places = SimpleNamespace(log_dir=folder, checkpoint_path=folder / "out")
    lines = run_once(name, flags, places, ROOT / experiment, threads)
    metrics = lines[FIRST:-1]  # the last one evaluates and saves too
    ends = [line["elapsed_seconds"] for line in metrics]
    idle = [line.get("trainer_idle_seconds", 0.0) for line in metrics[1:]]
    return {
        "seconds": (ends[-1] - ends[0]) / (len(ends) - 1),
        "trainer_waits": statistics.mean(idle),
        "metrics": metrics,
    }


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """A row for the trainer and one for the sampler, for each mode, over the same seconds."""
    figure, rows = plt.subplots(len(runs), 1, figsize=(9, 3.4), sharex=True)
    colours = plt.get_cmap("Set2").colors
    for axes, (mode, steps) in zip(rows, runs.items()):
        start = steps[0]["trainer_waited_from"]
        for step, following in zip(steps[:-1], steps[1:]):
            colour = colours[step["step"] % len(colours)]
            ready = step["trainer_waited_until"]
            spans = {
                1: (ready - start, following["trainer_waited_from"] - ready),
                0: (
                    step["sampler_0_began"] - start,
                    step["sampler_0_ended"] - step["sampler_0_began"],
                ),
            }
            for row, (left, width) in spans.items():
                axes.broken_barh([(left, width)], (row + 0.1, 0.8), color=colour)
                middle = (left + width / 2, row + 0.5)
                axes.text(*middle, step["step"], ha="center", va="center", clip_on=True)
        axes.set_yticks([0.5, 1.5], ["sampler", "trainer"])
        axes.set_title(mode, loc="left", fontsize=10)
        axes.set_ylim(0, 2)
    in_turn = runs["in turn"]
    seconds = in_turn[SHOWN]["trainer_waited_from"] - in_turn[0]["trainer_waited_from"]
    rows[-1].set_xlim(0, seconds)
    rows[-1].set_xlabel("seconds; the numbers are steps")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    report = {"machine": describe_machine()}
    with tempfile.TemporaryDirectory() as name:
        for delay in config.delays:
            runs = {mode: [] for mode in MODES if not delay or MODES[mode][0] == ASYNC}
            for repeat in range(config.repeats):
                for mode, found in runs.items():
                    label = f"{mode.replace(' ', '_')}_{delay:g}_{repeat}"
                    found.append(run(Path(name), label, mode, delay, config.steps))
                    print(delay, mode, f"{found[-1]['seconds']:.3f} s a step", flush=True)
            figures = {}
            for mode, found in runs.items():
                for key in ("seconds", "trainer_waits"):
                    figures[f"{mode}: {key}"] = [round(one[key], 3) for one in found]
            for mode in list(runs)[1:]:
                pairs = zip(runs[mode], runs["in turn"])
                ratios = [one["seconds"] / in_turn["seconds"] for one, in_turn in pairs]
                figures[f"{mode}: of the time in turn"] = [round(ratio, 3) for ratio in ratios]
                print(f"delay {delay:g}: {mode}: {statistics.median(ratios):.2f}", flush=True)
            report[f"sampler delayed by {delay:g} s"] = figures
        shown = {mode: found[-1]["metrics"] for mode, found in runs.items()}
        draw(shown, config.folder / "async_timeline.png")  # of the last delay
    text = json.dumps(report, indent=1) + "\n"
    (config.folder / "async_speed.json").write_text(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
