"""Run a multi-turn experiment's default command for several seeds and draw what came out.

    # seeds 42, 1 and 2, one after the other, about 16 minutes
    python benchmarks/multiturn_curve.py
    # about 25 minutes
    python benchmarks/multiturn_curve.py --experiment experiment_multiturn_qa --eval-interval 8

Writes results/multiturn_tool_calling_curve.json or results/multiturn_qa_curve.json (every seed's
figures, and greedy trajectories of ten held-out questions before and after) and a picture beside
it. Runs that are complete under --log-dir are not repeated.
"""

import datetime
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from base_curve import ROOT, plt, run_seed

SAMPLED = """reward_accuracy reward_f1 em searches recall_at_k tool_use_rate calls malformed_calls
failed_calls completion_length""".split()
PANELS = {  # experiment -> title: metrics; the first one is what has to pass the bar
    "experiment_multiturn_tool_calling": {
        "held out, greedy": ("eval_accuracy", "eval_tool_use_rate", "eval_accuracy_no_tool"),
        "sampled: what is trained on": ("reward_accuracy", "tool_use_rate"),
        "sampled: calls of a trajectory": ("calls", "malformed_calls", "failed_calls"),
    },
    "experiment_multiturn_qa": {
        "held out, greedy": ("eval_em", "eval_em_two_hop", "eval_accuracy_no_tool"),
        "sampled: what is trained on": ("em", "recall_at_k"),
        "searches of a trajectory": ("eval_searches_one_hop", "eval_searches_two_hop", "searches"),
    },
}
BARS = {"experiment_multiturn_tool_calling": 0.95, "experiment_multiturn_qa": 0.9}


@dataclass
class Config:
    experiment: str = "experiment_multiturn_tool_calling"
    seeds: tuple[int, ...] = (42, 1, 2)
    eval_interval: int = 5
    log_dir: Path = Path("runs/multiturn_curve")
    checkpoint_path: Path = Path("output/multiturn_curve")
    results: Path = ROOT / "results"


def summarise(seed: int, lines: list[dict], bar: float) -> dict:
    evaluated = [line for line in lines if "eval_accuracy" in line]
    passed = [line["elapsed_seconds"] for line in evaluated[1:] if line["eval_accuracy"] >= bar]
    names = sorted(
        name for name in evaluated[0] if name.startswith("eval_") and name != "eval_count"
    )
    return {
        "seed": seed,
        **{name: [evaluated[0][name], evaluated[-1][name]] for name in names},  # before and after
        # in the first and the last step
        **{
            f"sampled_{name}": [lines[1][name], lines[-1][name]]
            for name in SAMPLED
            if name in lines[1]
        },
        # evaluations included
        f"seconds_to_{bar:.0%}".replace("%", "_percent"): passed[0] if passed else None,
        "training_seconds": lines[-1]["elapsed_seconds"],
        "steps": lines[-1]["step"],
        "peak_memory_gib": lines[-1]["peak_memory"],
        "max_log_prob_gap": max(line["max_log_prob_gap"] for line in lines[1:]),
    }


def greedy_trajectories(train, model_name: str, count: int = 10) -> list[dict]:
    """The policy's greedy trajectories of the first held-out questions, behind their prompts."""
    config, device = train.resolve(train.Config(model_name=model_name, kl_weight=0))
    tokenizer = train.load_tokenizer(config)
    _, prompts, *search = train.read_prompts(config, tokenizer)
    policy, _ = train.load_model(config, device)
    tool = search[0] if search else train.calculator
    trajectories = [
        e.trajectories[0]
        for e in train.rollout(policy, tokenizer, prompts[:count], 1, config, tool=tool)
    ]
    return [
        {
            "prompt": tokenizer.decode(t.prompt.ids),
            "text": tokenizer.decode(t.ids),
            "answer": t.prompt.answer,
        }
        for t in trajectories
    ]


def draw(curves: dict[int, list[dict]], experiment: str, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(15, 4))
    for panel, (title, names) in zip(panels, PANELS[experiment].items()):
        for i, name in enumerate(names):
            for j, lines in enumerate(curves.values()):
                points = [
                    (line["step"], line[name]) for line in lines if line.get(name) is not None
                ]
                style = dict(color=f"C{i}", linestyle=("-", "--", ":")[j % 3], linewidth=1.4)
                panel.plot(*zip(*points), **style, label=name if j == 0 else None)
        panel.set(xlabel="step", title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].axhline(BARS[experiment], color="grey", linewidth=0.5)
    figure.text(
        0.01, 0.01, f"seeds {', '.join(map(str, curves))}: solid, dashed, dotted", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    experiment = ROOT / config.experiment
    config.log_dir /= config.experiment
    curves = {
        seed: run_seed(seed, config, experiment, config.eval_interval) for seed in config.seeds
    }
    sys.path.insert(0, str(experiment))
    import train

    first = config.seeds[0]
    last = (
        config.checkpoint_path
        / config.experiment
        / f"seed_{first}"
        / f"step_{curves[first][-1]['step']:06d}"
    )
    before, after = (
        greedy_trajectories(train, name) for name in (train.Config.model_name, str(last))
    )
    report = {
        "command": f"python {config.experiment}/train.py --seed SEED "
        f"--eval-interval {config.eval_interval}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "seeds": [
            summarise(seed, lines, BARS[config.experiment]) for seed, lines in curves.items()
        ],
        "trajectories": [
            {"prompt": b["prompt"], "answer": b["answer"], "before": b["text"], "after": a["text"]}
            for b, a in zip(before, after)
        ],
    }
    stem = f"{config.experiment.removeprefix('experiment_')}_curve"
    (config.results / f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(curves, config.experiment, config.results / f"{stem}.png")
    print(json.dumps(report["seeds"], indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
