"""Run experiment_ifeval for several seeds, with its honest part switched off, and with three kinds
of instruction left out of training; draw what came out.

    python data/get_smollm2.py
    python benchmarks/ifeval_curve.py

Writes results/ifeval_curve.json (every run's figures before and after, by kind of instruction too,
what is drawn, and greedy answers to held-out prompts before and after) and
results/ifeval_curve.png. Runs that are complete under --log-dir are not repeated.
"""

import datetime
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import tyro
from vs_trl import describe_machine

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = ROOT / "experiment_ifeval"
UNSEEN = ("detectable_format:title", "change_case:english_lowercase", "startend:quotation")
ALWAYS = ("eval_accuracy", "eval_on_topic", "eval_prompt_strict", "eval_instruction_strict")
STEP = ("reward", "accuracy", "instructions", "on_topic", "completion_length", "distinct_fraction")


@dataclass
class Config:
    seeds: tuple[int, ...] = (42, 1, 2)
    answers: int = 20  # held-out prompts of which both answers are kept
    smooth: int = 5  # steps whose mean is drawn
    log_dir: Path = Path("runs/ifeval_curve")
    checkpoint_path: Path = Path("output/ifeval_curve")
    results: Path = ROOT / "results"


def run(name: str, flags: dict, config: Config) -> list[dict]:
    """Lines of metrics.jsonl of a run."""
    path = config.log_dir / name / "metrics.jsonl"
    if not (path.is_file() and "eval_accuracy" in path.read_text().splitlines()[-1]):
        flags = flags | {"run-name": name, "log-dir": config.log_dir}
        flags |= {"checkpoint-path": config.checkpoint_path}
        command = [sys.executable, str(EXPERIMENT / "train.py")]
        for flag, value in flags.items():
            command += [f"--{flag}", str(value)] if value != "" else [f"--{flag}"]
        subprocess.run(command, check=True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarise(lines: list[dict]) -> dict:
    """What the held-out figures were and became, and what the training took."""
    before = lines[0]
    after = lines[-1]
    figures = {}
    for name in before:
        if name.startswith("eval_") and name != "eval_count":
            figures[name] = [before[name], after[name]]
    in_training = {}
    for name in STEP:
        in_training[name] = [line[name] for line in lines[1:]]
    return {
        "steps": after["step"],
        "seconds": after["elapsed_seconds"],
        "peak_memory_gib": after["peak_memory"],
        "max_log_prob_gap": max(line["max_log_prob_gap"] or 0 for line in lines[1:]),
        **figures,
        "in_training": in_training,
    }


def greedy_answers(model_name: str, count: int) -> list[dict]:
    """Greedy answers to the first held-out prompts, and what they are worth."""
    sys.path.insert(0, str(EXPERIMENT))
    import train
    from model import load_model, load_tokenizer

    config = train.Config(model_name=model_name, precision="float32", kl_weight=0, lora_rank=0)
    tokenizer = load_tokenizer(config)
    _, prompts = train.read_prompts(config, tokenizer)
    policy, _ = load_model(config, torch.device("cpu"))
    answers = []
    for experience in train.rollout(policy, tokenizer, prompts[:count], 1, config):
        judgement = train.judge_group(experience, config)[0]
        answers.append(
            {
                "prompt": tokenizer.decode(experience.prompt_ids),
                "answer": experience.completions[0],
                "followed": judgement.strict,
                "on_topic": judgement.on_topic,
            }
        )
    return answers


def smoothed(values: list[float], count: int) -> list[float]:
    """The mean of each value and up to `count` - 1 before it."""
    windows = [values[max(0, i + 1 - count) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(runs: dict[str, dict], config: Config, path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), sharey=True)
    for i, seed in enumerate(config.seeds):
        steps = runs[f"seed_{seed}"]["in_training"]
        for name, style in (("accuracy", "-"), ("on_topic", "--")):
            values = smoothed(steps[name], config.smooth)
            label = f"{name.replace('_', ' ')}, seed {seed}"
            panels[0].plot(range(1, len(values) + 1), values, style, color=f"C{i}", label=label)
    panels[0].set(title="the default", xlabel="step", ylabel="share of the sampled answers")
    for panel, name, title in (
        (panels[1], f"seed_{config.seeds[0]}", "the default: what is followed, and what is said"),
        (panels[2], "gamed", "--no-honest: a reward that can be gamed"),
    ):
        steps = runs[name]["in_training"]
        for figure_name in ("instructions", "on_topic"):
            values = smoothed(steps[figure_name], config.smooth)
            label = {"instructions": "instructions followed", "on_topic": "on topic"}[figure_name]
            panel.plot(range(1, len(values) + 1), values, label=label)
        panel.set(title=title, xlabel="step")
    for panel in panels:
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    first = config.seeds[0]
    plan = {f"seed_{seed}": {"seed": seed} for seed in config.seeds}
    plan["gamed"] = {"seed": first, "no-honest": ""}
    plan["unseen_kinds"] = {"seed": first, "left-out-kinds": ",".join(UNSEEN)}
    runs = {}
    for name, flags in plan.items():
        runs[name] = summarise(run(name, flags, config))
        gains = [f"{key} {runs[name][key][0]:.3f} -> {runs[name][key][1]:.3f}" for key in ALWAYS]
        print(f"{name}: {', '.join(gains)}", flush=True)
    answers = {"start": greedy_answers(str(ROOT / "data" / "smollm2"), config.answers)}
    for name in (f"seed_{first}", "gamed"):
        step = f"step_{runs[name]['steps']:06d}"
        checkpoint = config.checkpoint_path / "experiment_ifeval" / name / step
        answers[name] = greedy_answers(str(checkpoint), config.answers)
    report = {
        "command": "python experiment_ifeval/train.py --seed SEED",
        "gamed": "--no-honest",
        "unseen_kinds": f"--left-out-kinds {','.join(UNSEEN)}",
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "cores": os.cpu_count(),
        "runs": runs,
        "answers": answers,
    }
    (config.results / "ifeval_curve.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(runs, config, config.results / "ifeval_curve.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
