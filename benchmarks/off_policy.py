"""What each objective does with many updates from the same samples.

    python benchmarks/off_policy.py     # 95 minutes; stop it and start it again as you like

GRPO, Dr. GRPO, DAPO, GSPO and CISPO as published, each with its own weights of tokens, and GRPO
without any clip to compare with. Each takes the 128 completions of a step in 1, 4 or 16 updates.
With 16, an update sees one group, and the last one is 15 updates away from the policy that sampled.
(Groups without spread have no update. DAPO replaces them.) The task leaves room: sums of two to six
terms, and a policy that checks its reasoning up to three times (data/README.md). No run has a KL
term: what holds the policy back is the objective, the learning rate and max_norm.

With one update every ratio is 1. Then GRPO without clip is GRPO, and so is GSPO but for rounding:
GRPO's runs stand for theirs.

1. The search: the same learning rates for every objective and number of updates, one seed. The
   score is the sampled accuracy, as a mean over the steps; held-out prompts have no part in the
   choice. One seed is noisy, so the lowest rate is taken that is within 0.02 of the best.
2. With that learning rate, the same run on three other seeds.

Sampled accuracy is that of a step's completions before the step trains on them. No prompt comes
twice, so these prompts are new to the policy.

All are runs of tools/sweep.py, which prints its own tables. Writes results/off_policy.json,
results/off_policy.png (the runs) and results/off_policy_search.png (the search).
"""

import datetime
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
from plot import read_metrics  # noqa: E402
from runner import TIED, fail, flag_of, write_aside  # noqa: E402
from sweep import draw_range, range_of  # noqa: E402
from variants import SETTING, log_ratios, sample  # noqa: E402
from vs_trl import describe_machine  # noqa: E402

OBJECTIVES = {  # name -> experiment, its own flags
    "GRPO": ("experiment_base", []),
    "GRPO without clip": ("experiment_base", ["--clip-eps-low", "1", "--clip-eps-high", "1e9"]),
    "Dr. GRPO": ("experiment_drgrpo", []),
    "DAPO": ("experiment_dapo", []),
    "GSPO": ("experiment_gspo", []),
    "CISPO": ("experiment_cispo", []),
}
GRPO_WITH_ONE_UPDATE = ("GRPO without clip", "GSPO")
COMPLETIONS = 128  # of a step
GROUP_SIZE = 8
EVAL_INTERVAL = 4
TASK = SETTING | {
    "epochs": 1,  # no prompt comes twice
    "max_eval_prompts": 256,
    "kl_weight": 0.0,
    "eval_interval": EVAL_INTERVAL,
    "checkpoint_interval": 0,
    "log_completions_interval": 0,
}


@dataclass
class Config:
    updates: tuple[int, ...] = (1, 4, 16)
    lrs: tuple[float, ...] = (1.5e-5, 5e-5, 1.5e-4, 5e-4)
    search_seed: int = 0
    search_margin: float = 0.02  # what one seed cannot tell
    seeds: tuple[int, ...] = (42, 1, 2)
    steps: int = 16
    jobs: int = 3  # at a time, of one thread each
    log_dir: Path = Path("runs")
    checkpoint_path: Path = Path("output")
    output: Path = ROOT / "results"


# ---------------------------------------------------------------- runs
def sweep(config: Config, objective: str, name: str, flags: dict) -> dict:
    """The JSON table of a sweep of an objective, which is finished where it is not."""
    experiment, own = OBJECTIVES[objective]
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), str(ROOT / experiment), *own]
    for flag, values in (TASK | flags).items():
        values = values if isinstance(values, tuple) else (values,)
        command += [flag_of(flag), *[str(value) for value in values]]
    command += ["--sweep-name", name, "--jobs", str(config.jobs), "--threads", "1"]
    command += ["--figure", "reward_accuracy"]
    command += ["--log-dir", str(config.log_dir), "--checkpoint-path", str(config.checkpoint_path)]
    code = finish_process(command)
    if code:
        sys.exit(code)
    return json.loads((config.log_dir / name / "table.json").read_text())


def finish_process(command: list[str]) -> int:
    """Run a sweep and wait for it. It is passed the signals to stop, stops its runs and ends."""
    if sys.platform == "linux":
        command = [sys.executable, "-c", TIED, str(os.getpid()), *command]
    process = subprocess.Popen(command, start_new_session=True)
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.signal(number, lambda number, _: process.send_signal(number))
        handlers[number] = handler
    code = process.wait()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return code


def name_of(objective: str) -> str:
    return f"off_policy_{objective.lower().replace('. ', '').replace(' ', '_')}"


def search(config: Config, objective: str) -> dict[int, dict[float, float]]:
    """updates -> learning rate -> sampled accuracy, the mean over steps."""
    flags = {
        "train_batch_size": tuple(COMPLETIONS // updates for updates in config.updates),
        "lr": config.lrs,
        "seed": config.search_seed,
        "max_steps": config.steps,
        "eval_interval": 0,
    }
    table = sweep(config, objective, f"{name_of(objective)}_search", flags)
    found = {updates: {} for updates in config.updates}
    for row in table["settings"]:
        values = table["fixed"] | row["values"]
        updates = COMPLETIONS // values["train_batch_size"]
        found[updates][values["lr"]] = mean(row["curve"]["mean"])
    return {updates: dict(sorted(scores.items())) for updates, scores in found.items()}


def choose(scores: dict[float, float], margin: float) -> float:
    """The lowest learning rate whose score is within the margin of the best one's."""
    best = max(scores.values())
    return min(lr for lr, score in scores.items() if score >= best - margin)


def finish(config: Config, objective: str, updates: int, lr: float) -> dict[int, dict]:
    """seed -> what `summarise` tells of its run."""
    flags = {
        "train_batch_size": COMPLETIONS // updates,
        "lr": lr,
        "seed": config.seeds,
        "max_steps": config.steps,
    }
    name = f"{name_of(objective)}_{updates}_updates"
    table = sweep(config, objective, name, flags)
    experiment, _ = OBJECTIVES[objective]
    found = {}
    for run in table["settings"][0]["runs"]:
        log_dir = config.log_dir / name / run["name"]
        lines = read_metrics(log_dir)
        checkpoints = config.checkpoint_path / name / experiment / run["name"]
        checkpoint = checkpoints / f"step_{lines[-1]['step']:06d}"
        measured = log_dir / "kl.json"  # kept, as it takes longer than a step
        if not measured.is_file():
            write_aside(measured, json.dumps(kl_to_the_first_policy(checkpoint)))
        found[run["seed"]] = summarise(lines) | {"kl": json.loads(measured.read_text())}
    return found


# ---------------------------------------------------------------- what a run came to
def completions_of(line: dict) -> int:
    """How many completions a step sampled. DAPO samples more than it trains on."""
    if "groups" not in line:
        return COMPLETIONS
    if not line["groups"]:  # every one of the rounds found nothing
        return COMPLETIONS * 10
    return round(GROUP_SIZE * line["groups"] / (1 - line["wasted_fraction"]))


def seconds_at_evaluations(lines: list[dict]) -> list[float]:
    """Of training alone, up to each evaluation. The first step after one includes its time, so it
    counts as the mean of the others up to the next."""
    elapsed = {line["step"]: line["elapsed_seconds"] for line in lines[1:]}
    evaluated = [line["step"] for line in lines if "eval_accuracy" in line]
    seconds = [0.0]
    for before, step in zip(evaluated, evaluated[1:]):
        count = step - before
        others = elapsed[step] - elapsed[before + 1]
        mean_step = others / (count - 1) if count > 1 else 0.0
        seconds.append(seconds[-1] + mean_step * count)
    return seconds


def summarise(lines: list[dict]) -> dict:
    """The curves of a run: of the evaluations, and of the steps."""
    sampled = [0]
    for line in lines[1:]:
        sampled.append(sampled[-1] + completions_of(line))
    evaluated = [line for line in lines if "eval_accuracy" in line]
    return {
        "accuracy": [line["eval_accuracy"] for line in evaluated],
        "samples": [sampled[line["step"]] for line in evaluated],
        "seconds": [round(value, 2) for value in seconds_at_evaluations(lines)],
        "sampled_accuracy": [line["reward_accuracy"] for line in lines[1:]],
        "clip_fraction": [line["clip_fraction"] for line in lines[1:]],
        "ess": [line["ess"] for line in lines[1:]],
        "grad_clip_fraction": [line["grad_clip_fraction"] for line in lines[1:]],
        "entropy": [line["entropy"] for line in lines[1:]],
    }


@cache
def first_policy() -> tuple:
    """(train.py of experiment_base, its Config, tokenizer, held-out prompts, the policy)."""
    sys.path.insert(0, str(ROOT / "experiment_base"))
    import train
    from model import load_model, load_tokenizer, resolve

    settings, device = resolve(train.Config(**TASK))
    tokenizer = load_tokenizer(settings)
    prompts = train.read_prompts(settings, tokenizer)[1]
    return train, settings, tokenizer, prompts, load_model(settings, device)[0]


def kl_to_the_first_policy(checkpoint: Path) -> float:
    """Mean log-ratio, in nats a token, over 8 samples of each of 64 held-out prompts.

    Not k3, whose tail is heavy: a single token may be most of it.
    """
    train, settings, tokenizer, prompts, reference = first_policy()
    from model import load_model

    policy, _ = load_model(replace(settings, model_name=str(checkpoint)), reference.device)
    groups = sample(train, policy, tokenizer, prompts, settings)
    log_probs, of_reference = log_ratios(train, reference, groups, settings)
    return (log_probs - of_reference).mean().item()


def at_equal(runs: dict[int, dict], measure: str, count: int = 49) -> dict:
    """Accuracy over samples or seconds that all seeds have reached, as `draw_range` takes it."""
    end = min(run[measure][-1] for run in runs.values())
    grid = numpy.linspace(0, end, count)
    curves = [numpy.interp(grid, run[measure], run["accuracy"]) for run in runs.values()]
    return range_of(list(grid), list(zip(*curves)))


def over_steps(runs: dict[int, dict], measure: str) -> dict:
    curves = [[value or 0.0 for value in run[measure]] for run in runs.values()]
    columns = list(zip(*curves))  # as many as the shortest has steps
    return range_of(list(range(1, 1 + len(columns))), columns)


# ---------------------------------------------------------------- pictures and the table
def draw_runs(config: Config, runs: dict, path: Path) -> None:
    """A column for each number of updates, a row for each measure."""
    rows = {
        "samples": ("held-out accuracy", "sampled completions"),
        "seconds": ("held-out accuracy", "seconds of training"),
        "sampled_accuracy": ("accuracy of a step's samples", "step"),
        "clip_fraction": ("share of tokens clipped", "step"),
        "entropy": ("entropy, nats a token", "step"),
    }
    shape = (len(rows), len(config.updates))
    size = (4.2 * shape[1], 3 * shape[0])
    figure, panels = plt.subplots(*shape, figsize=size, sharey="row", squeeze=False)
    for line, (measure, (label, place)) in zip(panels, rows.items()):
        for panel, updates in zip(line, config.updates):
            for objective in OBJECTIVES:
                if updates == 1 and objective in GRPO_WITH_ONE_UPDATE:
                    continue
                found = runs[objective][updates]["seeds"]
                is_accuracy = measure in ("samples", "seconds")
                curve = (at_equal if is_accuracy else over_steps)(found, measure)
                colour = f"C{list(OBJECTIVES).index(objective)}"
                draw_range(panel, curve, 0.12, label=objective, color=colour)
            panel.set(xlabel=place)
            panel.grid(alpha=0.3)
            if measure == "samples":
                panel.set(title=f"{updates} update{'s' * (updates > 1)} a step")
                panel.set_xlim(0, COMPLETIONS * config.steps)  # DAPO's go on
            if measure == "clip_fraction":
                panel.set_yscale("symlog", linthresh=1e-4)
                panel.set_ylim(0, 1)
        line[0].set(ylabel=label)
    panels[0, -1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_search(config: Config, found: dict, path: Path) -> None:
    shape = (1, len(config.updates))
    figure, panels = plt.subplots(*shape, figsize=(4.2 * shape[1], 3.4), sharey=True, squeeze=False)
    for panel, updates in zip(panels[0], config.updates):
        for objective in OBJECTIVES:
            scores = found[objective][updates]
            panel.plot(list(scores), list(scores.values()), marker="o", label=objective)
        panel.set(xscale="log", xlabel="learning rate")
        panel.set_xticks(list(scores), [f"{lr:g}" for lr in scores])
        panel.minorticks_off()
        panel.set_title(f"{updates} update{'s' * (updates > 1)} a step")
        panel.grid(alpha=0.3)
    panels[0, 0].set(ylabel="accuracy of all samples")
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def row_of(found: dict, config: Config) -> dict:
    """The figures of an objective with a number of updates: means over seeds, and a range."""
    runs = list(found["seeds"].values())
    samples = COMPLETIONS * config.steps
    ends = [float(numpy.interp(samples, run["samples"], run["accuracy"])) for run in runs]
    third = COMPLETIONS * config.steps // 3
    early = [float(numpy.interp(third, run["samples"], run["accuracy"])) for run in runs]
    return {
        "lr": found["lr"],
        "samples": mean(run["samples"][-1] for run in runs),
        "accuracy_at_a_third": mean(early),
        "accuracy": mean(ends),
        "least": min(ends),
        "most": max(ends),
        "sampled_accuracy": mean(mean(run["sampled_accuracy"][-4:]) for run in runs),
        "seconds_per_step": mean(run["seconds"][-1] for run in runs) / config.steps,
        "clip_fraction": mean(mean(v or 0.0 for v in run["clip_fraction"]) for run in runs),
        "grad_clip_fraction": mean(mean(run["grad_clip_fraction"]) for run in runs),
        "ess": mean(mean(1.0 if v is None else v for v in run["ess"]) for run in runs),
        "lowest_ess": min(min(1.0 if v is None else v for v in run["ess"]) for run in runs),
        "kl": mean(run["kl"] for run in runs),
        "entropy": mean(run["entropy"][-1] for run in runs),
    }


def to_markdown(config: Config, runs: dict) -> str:
    """A line an objective and number of updates. * marks a learning rate at the search's edge."""
    samples = f"{COMPLETIONS * config.steps:,} samples"
    heads = ["updates", "objective", "lr", f"held out after {samples} [seeds]", "after a third"]
    heads += ["sampled, last 4 steps", "samples in all", "s a step", "clipped", "max_norm"]
    heads += ["ESS, lowest", "KL", "entropy"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for updates in config.updates:
        for objective in OBJECTIVES:
            row = runs[objective][updates]["row"]
            is_edge = row["lr"] in (min(config.lrs), max(config.lrs))
            cells = [f"{updates}", objective, f"{row['lr']:g}{'*' * is_edge}"]
            cells += [f"{row['accuracy']:.3f} [{row['least']:.3f}, {row['most']:.3f}]"]
            cells += [f"{row['accuracy_at_a_third']:.3f}", f"{row['sampled_accuracy']:.3f}"]
            cells += [f"{row['samples']:,.0f}", f"{row['seconds_per_step']:.2f}"]
            cells += [f"{row['clip_fraction']:.2g}", f"{row['grad_clip_fraction']:.2g}"]
            cells += [f"{row['ess']:.3f}, {row['lowest_ess']:.2f}"]
            cells += [f"{row['kl']:.3f}", f"{row['entropy']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def check(config: Config) -> None:
    """Refuse, before the first run, what would fail after the search."""
    possible = {1, 2, 4, 8, 16}  # 16 groups, cut evenly
    if set(config.updates) - possible:
        fail(f"--updates: must be some of {', '.join(map(str, sorted(possible)))}")
    if config.steps < 1 or config.steps % EVAL_INTERVAL:
        fail(f"--steps: must be a multiple of {EVAL_INTERVAL}")
    for name in ("seeds", "lrs", "updates"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            fail(f"--{name}: needs one value or several, each once")
    if min(*config.seeds, config.search_seed) < 0:
        fail("--seeds and --search-seed: must be 0 or more")
    if not all(0 < lr < math.inf for lr in config.lrs) or not 0 <= config.search_margin < math.inf:
        fail("--lrs: must be above 0, and --search-margin at least 0")
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output {config.output}: cannot be made ({error.strerror})")
    if not os.access(config.output, os.W_OK):
        fail(f"--output {config.output}: cannot be written to")


def main(config: Config) -> None:
    check(config)
    found = {objective: search(config, objective) for objective in OBJECTIVES}
    runs = {objective: {} for objective in OBJECTIVES}
    for updates in config.updates:
        for objective in OBJECTIVES:
            if updates == 1 and objective in GRPO_WITH_ONE_UPDATE:
                runs[objective][updates] = runs["GRPO"][updates]
                continue
            lr = choose(found[objective][updates], config.search_margin)
            seeds = finish(config, objective, updates, lr)
            runs[objective][updates] = {"lr": lr, "seeds": seeds}
            runs[objective][updates]["row"] = row_of(runs[objective][updates], config)
    text = to_markdown(config, runs)
    report = {
        "command": " ".join(["python benchmarks/off_policy.py", *sys.argv[1:]]),
        "config": {
            name: str(value).removeprefix(f"{ROOT}/") for name, value in asdict(config).items()
        },
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "task": {name: str(value).removeprefix(f"{ROOT}/") for name, value in TASK.items()},
        "search": found,
        "runs": runs,
        "table": text.splitlines(),
    }
    write_aside(config.output / "off_policy.json", json.dumps(report, indent=1) + "\n")
    draw_runs(config, runs, config.output / "off_policy.png")
    draw_search(config, found, config.output / "off_policy_search.png")
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
