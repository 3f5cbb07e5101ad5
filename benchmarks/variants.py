"""Train GRPO, Dr. GRPO and DAPO from the same policy, and draw what sets them apart.

    # 3 variants x 3 seeds; stop it and start it again as you like
    python benchmarks/variants.py

The task leaves length free: sums of two to six terms, easy and hard mixed, and a policy that likes
to check its reasoning up to three times, whether that is right or wrong (data/README.md). All is
measured alike for the three, on the same held-out prompts every tenth step: greedy accuracy on 512
of them, and 8 samples for each of 64.

Writes results/variants.json, results/variants_learning.png and results/variants_length.png. A run
that is complete under --log-dir is not repeated, one that was stopped goes on at its last
checkpoint.
"""

import datetime
import json
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
from plot import read_metrics  # noqa: E402
from runner import Job, finish_all  # noqa: E402
from sweep import curves_of, draw_range  # noqa: E402

VARIANTS = {"experiment_base": "GRPO", "experiment_drgrpo": "Dr. GRPO", "experiment_dapo": "DAPO"}
SETTING = dict(
    model_name=str(ROOT / "data" / "policy_math_long"),
    data_path=str(ROOT / "data" / "math_tasks_long.jsonl"),
    max_terms=6,
    max_prompts=4096,
    epochs=100,  # max_steps ends the run
    max_new_tokens=256,
    max_length=384,
    precision="float32",
    eval_interval=10,
    checkpoint_interval=10,
    log_completions_interval=1000,
)
SAMPLED_PROMPTS, SAMPLES = 64, 8
MEASURES = {
    "eval_accuracy": "held-out accuracy, greedy",
    "eval_reward": "reward, sampled",
    "eval_kl": "KL to the reference, nats a token",
    "eval_zero_std_fraction": "groups without spread",
    "eval_length_correct": "tokens of right completions",
    "eval_length_wrong": "tokens of wrong completions",
    "eval_checks_correct": "checks in right completions",
    "eval_checks_wrong": "checks in wrong completions",
}
FIGURES = {"variants_learning": list(MEASURES)[:4], "variants_length": list(MEASURES)[4:]}


@dataclass
class Config:
    seeds: tuple[int, ...] = (42, 1, 2)
    steps: int = 60
    lr: float = 5e-5
    log_dir: Path = Path("runs/variants")
    checkpoint_path: Path = Path("output/variants")
    results: Path = ROOT / "results"
    # (experiment, seed): this one run and no figures; how the command starts each
    only: tuple[str, int] | None = None
    resume: bool = False  # that run goes on


# ---------------------------------------------------------------- one run
def sample(train, policy, tokenizer, prompts, config) -> list:
    """Groups of completions of the first held-out prompts,
    drawn with the same random numbers for everyone."""
    generator = train.make_generator(policy.device, "study")
    return train.rollout(policy, tokenizer, prompts[:SAMPLED_PROMPTS], SAMPLES, config, generator)


def log_ratios(train, reference, groups, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all sampled tokens under the policy that sampled them and under the reference,
    (tokens,) each."""
    from model import can_pack
    from replay_buffer import ReplayBuffer

    # Without a KL term, groups without an advantage would not be forwarded.
    config = replace(config, group_size=SAMPLES, train_batch_size=SAMPLES, kl_weight=1.0)
    for group in groups:
        group.advantages = torch.zeros(SAMPLES)
    replay_buffer = ReplayBuffer(packed=can_pack(reference.config, config.max_length))
    replay_buffer.extend(groups)
    sampled = []
    of_reference = []
    for batch in replay_buffer.batches(config, torch.Generator().manual_seed(0)):
        for micro_batch in batch:
            sampled.append(micro_batch.sampled_log_probs)
            with torch.no_grad():
                of_reference.append(train.sequences_log_probs(reference, micro_batch, config))
    return torch.cat(sampled), torch.cat(of_reference)


def measure(train, policy, reference, tokenizer, prompts, config) -> dict[str, float | None]:
    """What a policy samples on held-out prompts, by the base's reward."""
    from loss import approx_kl_divergence

    groups = sample(train, policy, tokenizer, prompts, config)
    accuracy = torch.tensor(
        [[train.accuracy_reward(text, e.answer) for text in e.completions] for e in groups]
    )
    form = torch.tensor([[train.format_reward(text) for text in e.completions] for e in groups])
    lengths = torch.tensor([[float(len(ids)) for ids in e.completion_ids] for e in groups])
    checks = torch.tensor([[float(text.count("Check:")) for text in e.completions] for e in groups])
    rewards = accuracy + config.format_weight * form  # (prompts, samples)

    def mean_where(values, is_right):
        return values[accuracy == is_right].mean().item() if (accuracy == is_right).any() else None

    return {
        "eval_sampled_accuracy": accuracy.mean().item(),
        "eval_reward": rewards.mean().item(),
        "eval_kl": approx_kl_divergence(*log_ratios(train, reference, groups, config))
        .mean()
        .item(),
        "eval_length_correct": mean_where(lengths, 1),
        "eval_length_wrong": mean_where(lengths, 0),
        "eval_checks_correct": mean_where(checks, 1),
        "eval_checks_wrong": mean_where(checks, 0),
        "eval_zero_std_fraction": (rewards == rewards[:, :1]).all(1).float().mean().item(),
        "eval_truncated_fraction": torch.cat([e.truncated for e in groups]).mean().item(),
    }


def run_one(experiment: str, seed: int, config: Config) -> None:
    """Train in this process, with `measure` beside the experiment's own evaluation."""
    sys.path.insert(0, str(ROOT / experiment))
    import train
    from model import load_model, resolve

    settings = settings_of(train, experiment, seed, config)
    reference, _ = load_model(*resolve(replace(settings, kl_weight=0.0)))
    evaluate = train.evaluate

    def evaluate_and_measure(policy, tokenizer, prompts, now):
        return evaluate(policy, tokenizer, prompts, now) | measure(
            train, policy, reference, tokenizer, prompts, now
        )

    train.evaluate = evaluate_and_measure
    train.main(replace(settings, resume=config.resume))


def settings_of(train, experiment: str, seed: int, config: Config):
    places = dict(log_dir=str(config.log_dir), checkpoint_path=str(config.checkpoint_path))
    name = f"{experiment}_seed_{seed}"
    return train.Config(
        **SETTING, **places, run_name=name, seed=seed, max_steps=config.steps, lr=config.lr
    )


def kl_of_last_checkpoint(experiment: str, seed: int, config: Config) -> dict[str, float]:
    """The KL to the reference by two estimates, over the same tokens. k3, which `eval_kl` is, has a
    heavy tail: a single token that the reference finds far likelier than the policy may be most of
    it. The log-ratio has none."""
    import train
    from loss import approx_kl_divergence
    from model import load_model, load_tokenizer, resolve

    settings, device = resolve(replace(settings_of(train, experiment, seed, config), kl_weight=0.0))
    checkpoint = (
        config.checkpoint_path / experiment / settings.run_name / f"step_{config.steps:06d}"
    )
    reference, _ = load_model(settings, device)
    policy, _ = load_model(replace(settings, model_name=str(checkpoint)), device)
    tokenizer = load_tokenizer(settings)
    groups = sample(train, policy, tokenizer, train.read_prompts(settings, tokenizer)[1], settings)
    log_probs, of_reference = log_ratios(train, reference, groups, settings)
    k3 = approx_kl_divergence(log_probs, of_reference)
    return {
        "kl_k3": k3.mean().item(),
        "kl_k3_without_largest_token": (k3.sum() - k3.max()).item() / len(k3),
        "kl_mean_log_ratio": (log_probs - of_reference).mean().item(),
    }


def metrics_of(experiment: str, seed: int, config: Config) -> list[dict]:
    run = config.log_dir / f"{experiment}_seed_{seed}"
    return read_metrics(run) if (run / "metrics.jsonl").is_file() else []


def is_complete(lines: list[dict], config: Config) -> bool:
    return bool(lines) and lines[-1]["step"] == config.steps and "eval_kl" in lines[-1]


# ---------------------------------------------------------------- all runs
def job_of(experiment: str, seed: int, config: Config) -> Job:
    """The run for tools/sweep.py: a process of this script, which measures more than train.py."""
    name = f"{experiment}_seed_{seed}"
    flags = {"steps": config.steps, "lr": config.lr, "log-dir": config.log_dir}
    flags |= {"checkpoint-path": config.checkpoint_path}
    command = [sys.executable, __file__, "--only", experiment, str(seed)]
    command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    settings = {"experiment": experiment, "lr": str(config.lr)}
    checkpoints = config.checkpoint_path / experiment / name
    return Job(name, command, config.log_dir, checkpoints, settings)


def finish_all_seeds(config: Config) -> dict[str, dict[int, list[dict]]]:
    """experiment -> seed -> lines of metrics.jsonl."""
    jobs = []
    for seed in config.seeds:
        for experiment in VARIANTS:
            if not is_complete(metrics_of(experiment, seed, config), config):
                jobs.append(job_of(experiment, seed, config))
                jobs[-1].done.unlink(missing_ok=True)  # it was finished with fewer --steps
    finish_all(jobs)
    runs = {}
    for experiment in VARIANTS:
        runs[experiment] = {seed: metrics_of(experiment, seed, config) for seed in config.seeds}
    return runs


def ends_of(experiment: str, runs: dict[int, list[dict]], config: Config) -> dict:
    """What the runs of a variant ended with, seed by seed."""
    names = [*MEASURES, "eval_sampled_accuracy", "eval_truncated_fraction"]
    ends = {seed: {name: lines[-1][name] for name in names} for seed, lines in runs.items()}
    for seed, lines in runs.items():
        ends[seed] |= kl_of_last_checkpoint(experiment, seed, config)
        ends[seed]["seconds"] = lines[-1]["elapsed_seconds"]
        for name in ("grad_clip_fraction", "clip_fraction", "wasted_fraction"):
            values = [line[name] for line in lines[1:] if line.get(name) is not None]
            ends[seed][f"mean_{name}"] = mean(values) if values else None
    return ends


def draw(curves: dict[str, dict], measures: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(10, 7))
    for panel, name in zip(panels.flat, measures):
        for variant, of in curves.items():
            draw_range(panel, of[name], label=variant)
        panel.set(xlabel="step", title=MEASURES[name])
        panel.grid(alpha=0.3)
    panels[0, 0].legend(title="mean and range of the seeds", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    if config.only:
        run_one(*config.only, config)
        return
    runs = finish_all_seeds(config)
    sys.path.insert(0, str(ROOT / "experiment_base"))
    curves = {
        VARIANTS[experiment]: {name: curves_of(runs[experiment], name) for name in MEASURES}
        for experiment in VARIANTS
    }
    setting = {
        k: str(Path(v).relative_to(ROOT)) if str(v).startswith(str(ROOT)) else v
        for k, v in SETTING.items()
    }
    report = {
        "command": "python benchmarks/variants.py",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "setting": setting | {"lr": config.lr, "max_steps": config.steps},
        "ends": {
            VARIANTS[experiment]: ends_of(experiment, runs[experiment], config)
            for experiment in VARIANTS
        },
        "curves": curves,
    }
    (config.results / "variants.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, measures in FIGURES.items():
        draw(curves, measures, config.results / f"{name}.png")
    for variant, of in report["ends"].items():
        for seed, end in of.items():
            print(variant, seed, {name: value and round(value, 3) for name, value in end.items()})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
