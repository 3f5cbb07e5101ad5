"""Run experiment_ifeval as it is for several seeds, with a reward that can be gamed, and with three
more kinds of instruction left out of training. Draw the seeds and the gamed run.

    python data/get_smollm2.py
    python benchmarks/ifeval_curve.py

Writes results/ifeval_curve.json (every run's figures before and after, by kind of instruction too,
what is drawn, and greedy answers to held-out prompts before and after) and
results/ifeval_curve.png. Runs that are complete under --log-dir are not repeated.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from base_curve import ROOT, plt, run_once
from vs_trl import describe_machine

EXPERIMENT = ROOT / "experiment_ifeval"
sys.path.insert(0, str(EXPERIMENT))  # before this directory, which has a kv_cache.py too
sys.path.append(str(ROOT / "tools"))
import train  # noqa: E402
from model import load_model, load_tokenizer  # noqa: E402
from plot import series  # noqa: E402

# Left out of one run, beside the four that the default leaves out.
UNSEEN = (
    "detectable_format:title",
    "detectable_format:number_highlighted_sections",
    "startend:quotation",
)
PRINTED = ("eval_accuracy", "eval_on_topic", "eval_prompt_strict", "eval_instruction_strict")
STEP = (
    "reward",
    "accuracy",
    "instructions",
    "on_topic",
    "completion_length",
    "distinct_fraction",
    "zero_std_fraction",
)


@dataclass
class Config:
    seeds: tuple[int, ...] = (42, 1, 2)
    answers: int = 20  # held-out prompts of which both answers are kept
    smooth: int = 5  # steps whose mean is drawn
    log_dir: Path = Path("runs/ifeval_curve")
    checkpoint_path: Path = Path("output/ifeval_curve")
    results: Path = ROOT / "results"


def count_kinds() -> Counter:
    """How many held-out instructions there are of each kind."""
    counts = Counter()
    for line in (ROOT / "data" / "ifeval_eval.jsonl").read_text().splitlines():
        counts.update(json.loads(line)["instruction_id_list"])
    return counts


def followed(line: dict, kinds: set[str], counts: Counter) -> float:
    """Of the held-out instructions of these kinds, the share that is followed."""
    right = sum(counts[kind] * line[f"eval_kind/{kind}"] for kind in kinds)
    return right / sum(counts[kind] for kind in kinds)


def summarise(lines: list[dict], left_out: set[str]) -> dict:
    """What the held-out figures were and became, and what the training took.

    left_out: the kinds that were not trained on.
    """
    before = lines[0]
    after = lines[-1]
    figures = {}
    for name in before:
        if name.startswith("eval_") and name != "eval_count":
            figures[name] = [before[name], after[name]]
    counts = count_kinds()
    for name, kinds in (("trained_kinds", set(counts) - left_out), ("left_out_kinds", left_out)):
        figures[name] = [followed(before, kinds, counts), followed(after, kinds, counts)]
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
    config = train.Config(model_name=model_name, precision="float32", kl_weight=0, lora_rank=0)
    tokenizer = load_tokenizer(config)
    _, prompts = train.read_prompts(config, tokenizer)
    policy, _ = load_model(config, torch.device("cpu"))
    answers = []
    for experience in train.rollout(policy, tokenizer, prompts[:count], 1, config):
        judgement = train.judge_group(experience)[0]
        answers.append(
            {
                "prompt": tokenizer.decode(experience.prompt_ids),
                "answer": experience.completions[0],
                "followed": judgement.strict,
                "on_topic": judgement.on_topic,
            }
        )
    return answers


def draw(runs: dict[str, list[dict]], config: Config, path: Path) -> None:
    """runs: the lines of metrics.jsonl of each."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.2), sharey=True)
    for i, seed in enumerate(config.seeds):
        for name, style in (("accuracy", "-"), ("on_topic", "--")):
            curve = series(runs[f"seed_{seed}"], name, config.smooth)
            label = f"{name.replace('_', ' ')}, seed {seed}"
            panels[0].plot(*curve, style, color=f"C{i}", label=label)
    panels[0].set(title="the default", xlabel="step", ylabel="share of the sampled answers")
    for panel, name, title in (
        (panels[1], f"seed_{config.seeds[0]}", "the default: what is followed, and what is said"),
        (panels[2], "gamed", "--no-honest: a reward that can be gamed"),
    ):
        for metric, label in (("instructions", "instructions followed"), ("on_topic", "on topic")):
            panel.plot(*series(runs[name], metric, config.smooth), label=label)
        panel.set(title=title, xlabel="step")
    for panel in panels:
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].legend(loc=(0.02, 0.42), ncols=2, fontsize="x-small")  # between its curves
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(config: Config) -> None:
    if not config.seeds:
        sys.exit("error: --seeds: name at least one")
    config.results.mkdir(parents=True, exist_ok=True)
    first = config.seeds[0]
    plan = {f"seed_{seed}": ["--seed", str(seed)] for seed in config.seeds}
    plan["gamed"] = ["--seed", str(first), "--no-honest"]
    default = train.Config.left_out_kinds.split(",")
    plan["unseen_kinds"] = ["--seed", str(first), "--left-out-kinds", ",".join([*default, *UNSEEN])]
    runs = {}
    summaries = {}
    for name, flags in plan.items():
        runs[name] = run_once(name, flags, config, EXPERIMENT)
        left_out = {*default, *UNSEEN} if name == "unseen_kinds" else set(default)
        summaries[name] = summarise(runs[name], left_out)
        figures = {key: summaries[name][key] for key in PRINTED}
        gains = [f"{key} {before:.3f} -> {after:.3f}" for key, (before, after) in figures.items()]
        print(f"{name}: {', '.join(gains)}", flush=True)
    answers = {"start": greedy_answers(str(ROOT / "data" / "smollm2"), config.answers)}
    for name in (f"seed_{first}", "gamed"):
        step = f"step_{summaries[name]['steps']:06d}"
        checkpoint = config.checkpoint_path / "experiment_ifeval" / name / step
        answers[name] = greedy_answers(str(checkpoint), config.answers)
    report = {
        "command": "python experiment_ifeval/train.py --seed SEED",
        "gamed": "--no-honest",
        "unseen_kinds": UNSEEN,
        "machine": describe_machine(),  # with the date
        "runs": summaries,
        "answers": answers,
    }
    (config.results / "ifeval_curve.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(runs, config, config.results / "ifeval_curve.png")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
