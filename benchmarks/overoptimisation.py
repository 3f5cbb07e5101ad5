"""What a learned reward does to a policy that is let loose on it.

    python benchmarks/overoptimisation.py      # 50 minutes; it can be stopped and started again

experiment_reward_model is trained on the reward model's score alone, for 192 steps: with reward
models that learned from 100, 1,000 and 8,000 pairs, with KL weights 0, 0.01 and 0.1, three seeds
each. The learned score (proxy) and the true accuracy (gold), both of greedy answers to held-out
questions, are drawn against the distance from the first policy, as Gao et al. do (arXiv
2210.10760). The distance is the square root of the KL of a whole completion, in nats: the mean over
tokens times the mean length, over the eight steps before each evaluation.

Where the KL weight is 0, no KL would be measured. There it is 1e-9.

Writes results/overoptimisation.json and results/overoptimisation.png.
"""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from base_curve import ROOT, greedy_answers, job_of, plt
from runner import Job, finish_all
from vs_trl import describe_machine

EXPERIMENT = ROOT / "experiment_reward_model"
SHIPPED_PAIRS = 8000
COLOURS = {0.0: "tab:red", 0.01: "tab:orange", 0.1: "tab:blue"}
EVAL_INTERVAL = 8


@dataclass
class Config:
    seeds: tuple[int, ...] = (42, 1, 2)
    pairs: tuple[int, ...] = (100, 1000, SHIPPED_PAIRS)
    kl_weights: tuple[float, ...] = (0.0, 0.01, 0.1)
    epochs: int = 3  # of 64 steps
    at_once: int = 2  # runs, of one thread each
    log_dir: Path = ROOT / "runs" / "overoptimisation"
    checkpoint_path: Path = ROOT / "output" / "overoptimisation"
    output: Path = ROOT / "results"


def reward_model(pairs: int, config: Config) -> Path:
    """The directory of a reward model that learned from so many pairs."""
    if pairs == SHIPPED_PAIRS:
        return ROOT / "data" / "reward_math"
    folder = config.log_dir / f"reward_{pairs}"
    if not folder.exists():
        config.log_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "data" / "make_reward_model.py")]
        command += ["--max-pairs", str(pairs), "--output", str(folder)]
        command += ["--epochs", "10"] if pairs < 1000 else []
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if made.returncode:
            sys.exit("error: no reward model was made, see above")
        (config.log_dir / f"reward_{pairs}.log").write_text(made.stdout)
    return folder


def name_of(pairs: int, kl_weight: float, seed: int) -> str:
    return f"{pairs}_kl{kl_weight:g}_{seed}"


def last_answers(found: dict, config: Config) -> dict[str, list[dict]]:
    """Ten greedy answers at the end, for each size, without a KL penalty, by the first seed."""
    answers = {}
    for pairs in config.pairs:
        key = (pairs, config.kl_weights[0], config.seeds[0])
        folder = config.checkpoint_path / EXPERIMENT.name / name_of(*key)
        step = f"step_{found[key][-1]['step']:06d}"
        answers[name_of(*key)] = greedy_answers(str(folder / step), experiment=EXPERIMENT)
    return answers


def job(pairs: int, kl_weight: float, seed: int, config: Config) -> Job:
    name = name_of(pairs, kl_weight, seed)
    flags = ["--reward-model", str(reward_model(pairs, config)), "--seed", str(seed)]
    flags += ["--kl-weight", str(kl_weight or 1e-9), "--epochs", str(config.epochs)]
    flags += ["--eval-interval", str(EVAL_INTERVAL), "--max-eval-prompts", "256"]
    flags += ["--checkpoint-interval", "64", "--log-completions-interval", "0"]
    return job_of(name, flags, config, EXPERIMENT)


def figures_of(lines: list[dict]) -> list[dict]:
    """Figures at each evaluation: step, gold, proxy, distance. lines: of metrics.jsonl."""
    figures = []
    kls = [0.0]  # of whole completions, since the last evaluation
    for line in lines:
        if "kl" in line:
            kls.append(line["kl"] * line["completion_length"])
        if "eval_score" in line:
            point = {
                "step": line["step"],
                "gold": round(line["eval_accuracy"], 4),
                "proxy": round(line["eval_score"], 4),
                "distance": round((sum(kls) / len(kls)) ** 0.5, 3),
            }
            figures.append(point)
            kls = []
    return figures


def main(config: Config) -> None:
    keys = list(itertools.product(config.pairs, config.kl_weights, config.seeds))
    logs = finish_all([job(*key, config) for key in keys], config.at_once, threads=1)
    found = {key: figures_of(logs[name_of(*key)]) for key in keys}
    report = {"machine": describe_machine(), "runs": []}
    for (pairs, kl_weight, seed), figures in found.items():
        peak = max(figures, key=lambda point: point["gold"])
        summary = {
            "pairs": pairs,
            "kl_weight": kl_weight,
            "seed": seed,
            "peak": peak,
            "end": figures[-1],
            "proxy_rises_and_gold_falls": rises_and_falls(peak, figures[-1]),
        }
        print(json.dumps(summary), flush=True)
        report["runs"].append({**summary, "figures": figures})
    report["answers"] = last_answers(found, config)
    (config.output / "overoptimisation.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(found, config, config.output / "overoptimisation.png")


def rises_and_falls(peak: dict, end: dict) -> bool:
    """Whether, from the gold's peak on, the proxy rose and the gold fell by 0.02 or more."""
    return end["proxy"] > peak["proxy"] and end["gold"] <= peak["gold"] - 0.02


def draw(found: dict, config: Config, path: Path) -> None:
    """A column for each size of preference data; gold above, proxy below, a line for each run.

    The proxy is drawn from the second evaluation on: until there it rises much further.
    """
    shape = (2, len(config.pairs))
    size = (4 * shape[1], 5.6)
    figure, rows = plt.subplots(*shape, figsize=size, sharex="col", squeeze=False)
    for row, name in zip(rows, ("gold", "proxy")):
        for axes, pairs in zip(row, config.pairs):
            for kl_weight in config.kl_weights:
                for number, seed in enumerate(config.seeds):
                    figures = found[pairs, kl_weight, seed]
                    if name == "proxy":
                        figures = figures[1:]
                    axes.plot(
                        [point["distance"] for point in figures],
                        [point[name] for point in figures],
                        color=COLOURS.get(kl_weight, "grey"),
                        marker=".",
                        markersize=4,
                        linewidth=1,
                        alpha=0.7,
                        label=f"KL weight {kl_weight:g}" if number == 0 else None,
                    )
            axes.grid(alpha=0.3)
            if name == "gold":
                axes.set_ylim(0, 1.02)
                axes.set_title(f"{pairs:,} pairs", fontsize=10)
    rows[0][0].set_ylabel("true accuracy (gold)")
    rows[1][0].set_ylabel(f"learned score (proxy), from step {EVAL_INTERVAL} on")
    for axes in rows[1]:
        axes.set_xlabel("distance from the first policy, √KL")
    rows[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
