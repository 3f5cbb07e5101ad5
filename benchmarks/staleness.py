"""What staleness does to learning, with the importance weights and without.

    python benchmarks/staleness.py      # 50 minutes; it can be stopped and started again

Two parts, three seeds each:

    default     the default's learning rate, where staleness hardly matters: held-out accuracy after
                64 steps, of experiment_base and of experiment_async
    fast        a learning rate so high that learning is unsteady, one update a step, samples
                up to 0, 1, 4 and 16 updates old, with the default's KL penalty and without:
                held-out accuracy over equal samples

Writes results/staleness.json and results/staleness.png.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from base_curve import ROOT, plt, run_once
from vs_trl import describe_machine

ONE_UPDATE = "--train-batch-size 128"
DEFAULT = {  # name -> experiment, flags
    "base, one update a step": ("experiment_base", ONE_UPDATE),
    "staleness 1, one update a step": ("experiment_async", f"{ONE_UPDATE} --max-staleness 1"),
    "staleness 16, one update a step": ("experiment_async", f"{ONE_UPDATE} --max-staleness 16"),
    "staleness 2, two updates a step": ("experiment_async", ""),
}


@dataclass
class Config:
    seeds: tuple[int, ...] = (42, 1, 2)
    staleness: tuple[int, ...] = (0, 1, 4, 16)
    kl_weights: tuple[float, ...] = (0.01, 0.0)
    fast_lr: float = 5e-4
    steps: int = 40
    log_dir: Path = ROOT / "runs" / "staleness"
    checkpoint_path: Path = ROOT / "output" / "staleness"
    output: Path = ROOT / "results"


def run(config: Config, name: str, experiment: str, seed: int, flags: str) -> dict[int, float]:
    """step -> held-out accuracy."""
    more = ["--seed", str(seed), "--checkpoint-interval", "0", *flags.split()]
    lines = run_once(f"{name}_{seed}", more, config, ROOT / experiment, threads=1)
    return {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}


def main(config: Config) -> None:
    report = {"machine": describe_machine(), "default": {}, "fast": {}}
    for name, (experiment, flags) in DEFAULT.items():
        label = name.replace(" ", "_").replace(",", "")
        last = [max(run(config, label, experiment, s, flags).items())[1] for s in config.seeds]
        report["default"][name] = [round(accuracy, 4) for accuracy in last]
        print(name, report["default"][name], flush=True)

    for kl_weight in config.kl_weights:
        for staleness in config.staleness:
            for cap in (2.0, 0.0):
                if cap or staleness:  # where nothing is old, every weight is 1
                    run_fast(config, report["fast"], kl_weight, staleness, cap)
    config.output.mkdir(exist_ok=True)
    (config.output / "staleness.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(config, report["fast"], config.output / "staleness.png")


def label_of(kl_weight: float, staleness: int, cap: float) -> str:
    kind = "corrected" if cap else "not corrected"
    return f"KL {kl_weight:g}, staleness {staleness}, {kind}"


def run_fast(config: Config, found: dict, kl_weight: float, staleness: int, cap: float) -> None:
    flags = f"{ONE_UPDATE} --max-staleness {staleness} --importance-cap {cap:g}"
    flags += f" --kl-weight {kl_weight} --lr {config.fast_lr} --max-steps {config.steps}"
    flags += " --eval-interval 4 --max-eval-prompts 256"
    label = label_of(kl_weight, staleness, cap)
    found[label] = {}
    for seed in config.seeds:
        name = f"fast_{config.fast_lr:g}_kl{kl_weight:g}_{staleness}_{cap:g}"
        found[label][seed] = run(config, name, "experiment_async", seed, flags)
        print(label, seed, [f"{100 * a:.0f}" for a in found[label][seed].values()], flush=True)


def draw(config: Config, found: dict, path: Path) -> None:
    """A picture for each KL weight and staleness: the mean of the seeds, and a line for each."""
    shape = (len(config.kl_weights), len(config.staleness))
    size = (3 * shape[1], 2.6 * shape[0])
    figure, rows = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False)
    for row, kl_weight in zip(rows, config.kl_weights):
        for axes, staleness in zip(row, config.staleness):
            for cap, colour in ((2.0, "tab:blue"), (0.0, "tab:orange")):
                curves = list(found.get(label_of(kl_weight, staleness, cap), {}).values())
                if not curves:
                    continue
                steps = list(curves[0])
                for curve in curves:
                    axes.plot(steps, list(curve.values()), color=colour, alpha=0.3, linewidth=1)
                mean = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
                axes.plot(steps, mean, color=colour, label="corrected" if cap else "not corrected")
            axes.set_title(f"KL {kl_weight:g}, at most {staleness} updates old", fontsize=9)
            axes.grid(alpha=0.3)
        row[0].set_ylabel("held-out accuracy")
    for axes in rows[-1]:
        axes.set_xlabel("steps of 128 completions")
    rows[0][-1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
