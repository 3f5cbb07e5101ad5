"""Compare models on the held-out prompts of an experiment: accuracy, pass@k, and where they part.

    python tools/compare.py experiment_base data/policy_math \\
        output/experiment_base/<run-name>/step_000064 --samples 16

A model is a directory (a model, a checkpoint or an adapter) or a name on the hub. Other flags are
the experiment's own, such as --eval-data-path, --max-eval-prompts, --temperature, --max-new-tokens.
What counts as right is what the experiment's `evaluate` calls accuracy, of one completion.

    accuracy    of greedy answers, with Wilson's 95 % interval
    p           McNemar's exact test of a model against the first one. It looks at the prompts that
                exactly one of the two answers rightly. Were they equally good, each of these would
                be the toss of a coin; p is the chance of a split at least as uneven
    pass@k      the chance that of k sampled answers one is right, by the unbiased estimator of
                arXiv 2107.03374, averaged over prompts. A trained model that is better at k = 1,
                and no better at the largest k, has become surer of what the first one could do too

Writes <output>.md, <output>.json and <output>.png.
"""

import contextlib
import gc
import importlib
import inspect
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
WHOLE = ("prompt_ids", "answer")  # fields of an Experience that concern the group, not each of it


@dataclass
class Options:
    experiment: tyro.conf.Positional[str]  # a directory, such as experiment_base
    models: tyro.conf.Positional[tuple[str, ...]]  # directories, or names on the hub
    samples: int = 0  # sampled answers of each prompt, for pass@k; 0: greedy answers alone
    shown: int = 10  # prompts on which a model parts from the first one, that are printed
    output: Path = Path("compare")  # of the .md, .json and .png


def fail(message: str):
    sys.exit(f"error: {message}")


# ---------------------------------------------------------------- statistics
def wilson_interval(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's interval of a share right / n, of 95 % (Wilson 1927)."""
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value: each prompt that only one answers rightly is a fair coin."""
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(right: int, n: int, k: int) -> float:
    """1 - C(n - right, k) / C(n, k): the chance that k of the n samples hold a right one."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ---------------------------------------------------------------- one model
def load_train(experiment: str, kind: str = "that can be compared"):
    """The module train.py of an experiment. One program can load one. kind: for the refusal."""
    folder = (ROOT / experiment).resolve()
    if not (folder / "run.py").is_file() or not (folder / "train.py").is_file():
        names = sorted(path.parent.name for path in ROOT.glob("experiment_*/run.py"))
        fail(f"{experiment} is no experiment {kind}; there are {', '.join(names)}")
    sys.path.insert(0, str(folder))
    train = importlib.import_module("train")
    loaded = Path(train.__file__).resolve().parent
    if loaded != folder:
        fail(f"{loaded.name} is loaded already: start Python anew")
    return train


def split_group(experience) -> list:
    """An Experience for each completion of a group."""
    singles = []
    for i in range(len(experience.completions)):
        changes = {}
        for field in fields(experience):
            value = getattr(experience, field.name)
            is_whole = field.name in WHOLE or value is None or isinstance(value, int)
            if not is_whole:
                changes[field.name] = value[i : i + 1]
        singles.append(replace(experience, **changes))
    return singles


def judge_model(train, config, samples: int) -> dict:
    """The figures of a model, and every completion with its verdict.

    The experiment's own `main` loads all that it needs and calls `evaluate`, which calls `rollout`.
    Both are replaced here: `rollout` to keep what it samples, and to hand `evaluate` one completion
    at a time, whose accuracy is then 0 or 1.
    """
    rollout = train.rollout
    evaluate = train.evaluate
    found = {}

    def evaluate_and_keep(*given):
        arguments = inspect.signature(evaluate).bind(*given).arguments  # name -> value
        prompts = arguments["prompts"]
        tokenizer = arguments["tokenizer"]

        def experiences_of(group_size: int) -> tuple[list, dict]:
            """(those of the first call of rollout, what evaluate returns)."""
            calls = []

            def keep(policy, tokenizer, prompts, _, config, **more):
                generator = None
                if group_size > 1:
                    key = ("compare", config.seed)
                    generator = train.make_generator(policy.device, *key)
                if group_size > 1 and calls:
                    return calls[0]  # sampled once, whatever evaluate asks for
                sampled = (policy, tokenizer, prompts, group_size, config, generator)
                calls.append(rollout(*sampled, **more))
                return calls[-1]

            train.rollout = keep
            evaluation = evaluate(**arguments)
            return calls[0], evaluation

        def is_right(prompt, experience) -> bool:
            train.rollout = lambda *_, **__: [experience]
            return evaluate(**{**arguments, "prompts": [prompt]})["eval_accuracy"] == 1

        greedy, evaluation = experiences_of(1)
        found["evaluation"] = evaluation
        found["greedy"] = []
        for prompt, experience in zip(prompts, greedy):
            entry = describe(experience, tokenizer)
            found["greedy"].append(entry | {"right": is_right(prompt, experience)})
        if samples:
            groups, _ = experiences_of(samples)
            found["right_samples"] = []
            for prompt, group in zip(prompts, groups):
                verdicts = [is_right(prompt, single) for single in split_group(group)]
                found["right_samples"].append(sum(verdicts))
        return evaluation

    train.evaluate = evaluate_and_keep
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.main(config)
    finally:
        train.rollout = rollout
        train.evaluate = evaluate
        gc.collect()
    for line in said.getvalue().splitlines():
        if line.startswith("warning") or "cannot be judged" in line:
            print(line)
    return found


def describe(experience, tokenizer) -> dict:
    """What is kept of a greedy answer. Its length is that of what the policy sampled."""
    mask = experience.completion_masks[0]
    return {
        "prompt": tokenizer.decode(experience.prompt_ids, skip_special_tokens=True),
        "completion": tokenizer.decode(experience.completion_ids[0], skip_special_tokens=True),
        "length": int(mask.sum()),
        "truncated": bool(experience.truncated[0]),
    }


# ---------------------------------------------------------------- all models
def compare(options: Options, flags: list[str]) -> dict:
    """The results, as they are written to the JSON file. flags: of the experiment's Config."""
    if not options.models:
        fail("name at least one model, behind the experiment and before its flags")
    if len(set(options.models)) < len(options.models):
        fail("a model is named twice")
    if options.samples < 0 or options.samples == 1:
        fail(f"--samples {options.samples}: must be 0, or 2 and more")
    train = load_train(options.experiment)
    config = tyro.cli(train.Config, args=flags)
    config = replace(config, max_steps=0, kl_weight=0.0)  # no reference is needed
    if not config.load_in_4bit:
        config = replace(config, lora_rank=0)  # 4-bit weights need an adapter, here a fresh one
    if options.samples > config.sample_rows:
        most = f"the {config.sample_rows} of --sample-rows, which are sampled at once"
        fail(f"--samples {options.samples}: is more than {most}; lower it, or raise --sample-rows")
    for name in options.models:  # a wrong name is noticed before anything is sampled
        with contextlib.redirect_stdout(io.StringIO()):  # what is said is said again below
            train.load_tokenizer(replace(config, model_name=name))
    ks = [2**i for i in range(options.samples.bit_length())]
    if options.samples and ks[-1] != options.samples:
        ks.append(options.samples)
    models = {}
    for name in options.models:
        print(f"{name} ...", flush=True)
        found = judge_model(train, replace(config, model_name=name), options.samples)
        models[name] = figures(found, ks, options.samples) | found
        first = models[options.models[0]]
        verdicts = list(zip(right(first), right(models[name])))
        only_first = verdicts.count((True, False))
        only_this = verdicts.count((False, True))
        models[name] |= {"only_first": only_first, "only_this": only_this}
        models[name]["p_value"] = mcnemar(only_first, only_this)
    settings = {field.name: str(getattr(config, field.name)) for field in fields(config)}
    del settings["model_name"]
    return {
        "experiment": options.experiment,
        "date": time.strftime("%Y-%m-%d"),
        "samples": options.samples,
        "settings": settings,
        "models": models,
    }


def right(model: dict) -> list[bool]:
    return [answer["right"] for answer in model["greedy"]]


def figures(found: dict, ks: list[int], samples: int) -> dict:
    answers = found["greedy"]
    n = len(answers)
    count = sum(right(found))
    at_k = {}
    for k in ks:
        chances = [pass_at_k(c, samples, k) for c in found["right_samples"]]
        at_k[str(k)] = sum(chances) / n
    return {
        "prompts": n,
        "accuracy": count / n,
        "interval": wilson_interval(count, n),
        "length": sum(answer["length"] for answer in answers) / n,
        "truncated": sum(answer["truncated"] for answer in answers) / n,
        "pass_at_k": at_k,
    }


# ---------------------------------------------------------------- output
def fenced(text: str) -> str:
    """A text as a code block of Markdown, whatever it holds."""
    longest = max([2, *map(len, re.findall("`+", text))])
    fence = "`" * (longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def labels_of(names: list[str]) -> dict[str, str]:
    """Short names: the last two parts of each path, or as many as make them differ."""
    count = 2
    parts = [name.strip("/").split("/") for name in names]
    while len({tuple(part[-count:]) for part in parts}) < len(names):
        if count >= max(len(part) for part in parts):
            return {name: name for name in names}
        count += 1
    return {name: "/".join(part[-count:]) for name, part in zip(names, parts)}


def to_markdown(results: dict, shown: int) -> str:
    models = results["models"]
    labels = labels_of(list(models))
    first = list(models.values())[0]
    lines = [f"# {results['experiment']}, {first['prompts']} held-out prompts", ""]
    heads = "accuracy | 95 % | only this right | only the first right | p | length | cut off"
    lines += [f"| model | {heads} |", "|---" * 8 + "|"]
    for name, model in models.items():
        low, high = model["interval"]
        paired = f"{model['only_this']} | {model['only_first']} | {model['p_value']:.2g}"
        if model is first:
            paired = "- | - | -"
        lines.append(
            f"| {labels[name]} | {model['accuracy']:.4f} | {low:.3f} to {high:.3f} | {paired} "
            f"| {model['length']:.1f} | {model['truncated']:.3f} |"
        )
    if results["samples"]:
        ks = list(first["pass_at_k"])
        lines += ["", f"pass@k of {results['samples']} samples a prompt:", ""]
        lines += [f"| model | {' | '.join(ks)} |", "|---" * (len(ks) + 1) + "|"]
        for name, model in models.items():
            values = " | ".join(f"{model['pass_at_k'][k]:.3f}" for k in ks)
            lines.append(f"| {labels[name]} | {values} |")
    for name, model in list(models.items())[1:]:
        lines += ["", f"## Where {labels[name]} parts from the first", ""]
        lines += side_by_side(first, model, shown)
    return "\n".join(lines) + "\n"


def side_by_side(first: dict, other: dict, shown: int) -> list[str]:
    """Prompts that only one of two models answers rightly, with both answers."""
    prompts = [answer["prompt"] for answer in first["greedy"]]
    before = 0
    behind = ""
    if len(set(prompts)) > 1:
        before = len(os.path.commonprefix(prompts))
        behind = os.path.commonprefix([prompt[::-1] for prompt in prompts])[::-1]
    _, line_end, behind = behind.partition("\n")  # such as "assistant", which the template writes
    parting = []
    for prompt, a, b in zip(prompts, first["greedy"], other["greedy"]):
        if a["right"] != b["right"]:
            parting.append((prompt, a, b))
    lines = [f"On {len(parting)} prompts.", ""] if parting else ["Nowhere."]
    for prompt, a, b in parting[: max(shown, 0)]:
        marks = ("right", "wrong") if a["right"] else ("wrong", "right")
        lines += [fenced(prompt[before:].removesuffix(line_end + behind).strip()), ""]
        lines += [f"the first, {marks[0]}:", "", fenced(a["completion"]), ""]
        lines += [f"this one, {marks[1]}:", "", fenced(b["completion"]), "", "---", ""]
    return lines


def plot(results: dict, path: Path) -> None:
    """Accuracy with intervals; and pass@k where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = results["models"]
    # matplotlib takes $ for a formula, and leaves out a label that begins with _.
    labels = {name: " " + label.replace("$", r"\$") for name, label in labels_of([*models]).items()}
    columns = 2 if results["samples"] else 1
    figure, panels = pyplot.subplots(1, columns, figsize=(6 * columns, 4), squeeze=False)
    for i, (name, model) in enumerate(models.items()):
        low, high = model["interval"]
        accuracy = model["accuracy"]
        error = [[accuracy - low], [high - accuracy]]
        bar = {"color": f"C{i}", "alpha": 0.7, "label": labels[name]}
        panels[0, 0].bar(i, accuracy, yerr=error, capsize=5, **bar)
        if results["samples"]:
            ks = [int(k) for k in model["pass_at_k"]]
            values = list(model["pass_at_k"].values())
            panels[0, 1].plot(ks, values, marker="o", color=f"C{i}")
    panels[0, 0].set(title="greedy accuracy, with its 95 % interval", ylim=(0, 1.03))
    panels[0, 0].set_xticks([])
    if results["samples"]:
        panel = panels[0, 1]
        panel.set(title="pass@k", xlabel="k samples", ylim=(0, 1.03))
        panel.set_xscale("log", base=2)
        panel.set_xticks(ks, [str(k) for k in ks])
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0))  # below the panels
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def paths_of(output: Path) -> list[Path]:
    """The three files: "a/step.64" and "a/step.64.md" are both a/step.64.md, .json and .png."""
    suffixes = (".md", ".json", ".png")
    if output.suffix in suffixes:
        output = output.with_suffix("")
    if not output.name:
        fail(f"--output {output}: names no file")
    return [output.with_name(output.name + suffix) for suffix in suffixes]


def check_paths(output: Path, paths: list[Path]) -> None:
    """End the program where the files cannot be written, or would replace a user's."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fail("the package matplotlib is missing; pip install -r requirements.txt")
    try:
        existing = [path for path in paths if path.exists()]
        if existing and len(existing) < len(paths):
            fail(f"--output {output}: {existing[0]} exists, and is not of an earlier comparison")
        output.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            path.open("a").close()
            if path not in existing:
                path.unlink()
    except OSError as error:
        fail(f"--output {output}: cannot be written ({error.strerror})")


def main(options: Options, flags: list[str]) -> None:
    paths = paths_of(options.output)
    check_paths(options.output, paths)
    results = compare(options, flags)
    markdown, figures, picture = paths
    text = to_markdown(results, options.shown)
    markdown.write_text(text, encoding="utf-8")
    figures.write_text(json.dumps(results, indent=1), encoding="utf-8")
    plot(results, picture)
    print(text.split("\n## ")[0])
    print(f"written: {markdown}, .json and .png")


if __name__ == "__main__":
    main(*tyro.cli(Options, description=__doc__, return_unknown_args=True))
