"""Run the README's first command for several seeds and draw what came out.

    python benchmarks/base_curve.py                 # seeds 42, 1 and 2, one after the other

Writes results/base_curve.json (every seed's figures, what is drawn, and greedy answers to ten
held-out questions before and after) and results/base_curve.png, with the mean over the seeds and
their range. Runs that are complete under --log-dir are not repeated.
"""

import datetime
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
from runner import Job, finish_run, train_job  # noqa: E402
from sweep import curves_of, draw_range  # noqa: E402

EXPERIMENT = ROOT / "experiment_base"
ACCURACIES = {  # metric -> (label, style)
    "eval_accuracy": ("held out, greedy: as it is rewarded", {"color": "C0"}),
    "eval_accuracy_lenient": (
        "held out, greedy: tags ignored",
        {"color": "C1", "linestyle": (0, (1, 1.5)), "linewidth": 2.5},
    ),
    "reward_accuracy": ("sampled: what is trained on", {"color": "C2"}),
}
LENGTH = "completion_length"


@dataclass
class Config:
    seeds: tuple[int, ...] = (42, 1, 2)
    log_dir: Path = Path("runs/base_curve")
    checkpoint_path: Path = Path("output/base_curve")
    results: Path = ROOT / "results"


def run_seed(
    seed: int, config: Config, experiment: Path = EXPERIMENT, eval_interval: int = 2
) -> list[dict]:
    """Lines of metrics.jsonl of one run of an experiment's default command."""
    flags = ["--seed", str(seed), "--eval-interval", str(eval_interval)]
    return run_once(f"seed_{seed}", flags, config, experiment)


def run_once(
    name: str, flags: list[str], config, experiment: Path, threads: int | None = None
) -> list[dict]:
    """Lines of metrics.jsonl of a run, which is made, or gone on with, where it is not complete.

    threads: of each of its processes; None: PyTorch's choice.
    """
    return finish_run(job_of(name, flags, config, experiment), threads)


def job_of(name: str, flags: list[str], config, experiment: Path) -> Job:
    """The run for tools/sweep.py, which refuses one of that name with other flags."""
    settings = {"experiment": experiment.name, "flags": " ".join(flags)}
    return train_job(name, experiment, flags, config.log_dir, config.checkpoint_path, settings)


def summarise(seed: int, lines: list[dict]) -> dict:
    evaluated = [line for line in lines if "eval_accuracy" in line]
    passed = [line["elapsed_seconds"] for line in evaluated[1:] if line["eval_accuracy"] >= 0.95]
    return {
        "seed": seed,
        "eval_accuracy": [evaluated[0]["eval_accuracy"], evaluated[-1]["eval_accuracy"]],
        "eval_accuracy_lenient": [
            evaluated[0]["eval_accuracy_lenient"],
            evaluated[-1]["eval_accuracy_lenient"],
        ],
        "sampled_accuracy_step_1": lines[1]["reward_accuracy"],
        "seconds_to_95_percent": passed[0] if passed else None,  # evaluations included
        "training_seconds": lines[-1]["elapsed_seconds"],
        "steps": lines[-1]["step"],
        "peak_memory_gib": lines[-1]["peak_memory"],
        "max_log_prob_gap": max(line["max_log_prob_gap"] for line in lines[1:]),
    }


def greedy_answers(model_name: str, count: int = 10, experiment: Path = EXPERIMENT) -> list[dict]:
    """The policy's greedy completions of the first held-out questions."""
    sys.path.insert(0, str(experiment))
    import train
    from model import load_model, load_tokenizer

    config = train.Config(model_name=model_name, precision="float32", kl_weight=0)
    tokenizer = load_tokenizer(config)
    _, prompts = train.read_prompts(config, tokenizer)
    policy, _ = load_model(config, torch.device("cpu"))
    answers = train.rollout(policy, tokenizer, prompts[:count], 1, config)
    return [
        {
            "prompt": tokenizer.decode(a.prompt_ids),
            "completion": a.completions[0],
            "answer": a.answer,
        }
        for a in answers
    ]


def draw(curves: dict[str, dict], seeds: tuple[int, ...], path: Path) -> None:
    """curves: what `curves_of` gives for each metric, as in results/base_curve.json."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    for name, (label, style) in ACCURACIES.items():
        draw_range(left, curves[name], label=label, **style)
    left.axhline(0.95, color="grey", linewidth=0.7)
    left.set(title="right answers", xlabel="step", ylabel="fraction", ylim=(0, 1.02))
    left.legend(loc="lower right", title=f"mean and range of seeds {', '.join(map(str, seeds))}")
    draw_range(right, curves[LENGTH], color="C2")
    right.set(
        title="length of the sampled completions", xlabel="step", ylabel="tokens", ylim=(0, None)
    )
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    runs = {seed: run_seed(seed, config) for seed in config.seeds}
    curves = {name: curves_of(runs, name) for name in (*ACCURACIES, LENGTH)}
    first = config.seeds[0]
    last = (
        config.checkpoint_path
        / "experiment_base"
        / f"seed_{first}"
        / f"step_{runs[first][-1]['step']:06d}"
    )
    before, after = greedy_answers(str(ROOT / "data" / "policy_math")), greedy_answers(str(last))
    report = {
        "command": "python experiment_base/train.py --seed SEED --eval-interval 2",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "seeds": [summarise(seed, lines) for seed, lines in runs.items()],
        "curves": curves,
        "answers": [
            {
                "prompt": b["prompt"],
                "answer": b["answer"],
                "before": b["completion"],
                "after": a["completion"],
            }
            for b, a in zip(before, after)
        ],
    }
    (config.results / "base_curve.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(curves, config.seeds, config.results / "base_curve.png")
    print(json.dumps(report["seeds"], indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
