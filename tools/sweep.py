"""Train an experiment with every combination of some values, and tell which is best.

    python tools/sweep.py experiment_base --lr 1e-5 5e-5 --kl-weight 0 0.01 --seed 42 1 2

That is 2 x 2 x 3 = 12 runs, each a process of its own. Every flag of the experiment may have one
value or several; a boolean is swept as --flag True False, and a value that begins with -- is given
as --flag=value. All are checked before the first run starts. Runs are named by what varies, such as
lr=1e-05,kl_weight=0.01,seed=42, and lie under runs/<sweep-name>/, where <name>.log has what they
print. A flag that had one value has no part in the names: with a second one, all are trained anew.

Stop it (Ctrl-C, or worse) and start it again as you like: what is finished is skipped, what was
interrupted is resumed, what failed is tried again.

In the end a table, sorted by the final figure, as <output>.md and .json, and a picture. A row is a
setting: all values but the seed. It has the mean over seeds and [the least, the most] of the last
evaluation and of the best one, where higher is better, and the mean seconds of training.

With --ray ADDRESS the runs are tasks of a Ray cluster (requirements-async.txt), as many at a time
as it has place for. All its machines must share the file system and have this repository in the
same place.
"""

import contextlib
import io
import itertools
import json
import os
import re
import sys
import zlib
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from statistics import mean

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import compare  # noqa: E402
from plot import read_metrics  # noqa: E402
from runner import (  # noqa: E402
    Job,
    default_figure,
    fail,
    finish_runs,
    flag_of,
    join_ray,
    seconds_of,
    train_job,
    write_aside,
)

SET_BY_SWEEP = ("run_name", "resume")
PLACES = (*SET_BY_SWEEP, "log_dir", "checkpoint_path")
# Flags that a run which exists may have had otherwise: no figure depends on them.
HARMLESS = (
    "wandb",
    "wandb_project",
    "device_index",
    "checkpoint_interval",
    "log_completions_interval",
    "log_groups",
    "log_alternatives",
)
NAME_BYTES = 100  # as run.py allows
load_train = partial(compare.load_train, kind="with flags")


@dataclass
class Options:
    experiment: tyro.conf.Positional[str]  # a directory, such as experiment_base
    sweep_name: str | None = None  # of the runs' directories; default: the experiment's name
    jobs: int = 1  # runs at a time, on this machine
    threads: int | None = None  # of each run; default: the cores shared among --jobs
    figure: str | None = None  # a field of metrics.jsonl; default: the first of the evaluation
    log_dir: Path = Path("runs")  # holds <sweep-name>/<run>/metrics.jsonl
    checkpoint_path: Path = Path("./output")  # holds <sweep-name>/<experiment>/<run>/step_000020
    output: Path | None = None  # of .md, .json, .png; default: <log-dir>/<sweep-name>/table
    ray: str | None = None  # a Ray cluster: host:port, or auto for the one of this machine
    ray_cpus: float = 1  # CPUs that Ray keeps for a run, which has as many threads
    ray_gpus: float = 0  # GPUs that Ray keeps for a run


# ---------------------------------------------------------------- flags
def check_own_flags(arguments: list[str]) -> None:
    """Refuse a flag of the sweep itself that is given twice, or with several values."""
    own = {flag_of(field.name) for field in fields(Options)}
    last = ""
    seen = {}  # flag -> how many values
    for argument in arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if argument.startswith("--"):
            last = flag
            if flag in own and flag in seen:
                fail(f"{flag}: is given twice")
            seen[flag] = int("=" in argument)
        elif last in own:
            seen[last] += 1
            if seen[last] > 1:
                fail(f"{argument}: stands behind {last}, which takes one value")


def split_flags(arguments: list[str]) -> dict[str, list[str]]:
    """name -> what stands behind the flag, such as {"lr": ["1e-5", "5e-5"], "wandb": []}."""
    flags = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name in flags:
                fail(f"{flag_of(name)}: is given twice; name all its values behind one")
            flags[name] = [value] if equals else []
        elif not flags:
            fail(f"{argument}: is no flag; flags begin with --")
        else:
            flags[list(flags)[-1]].append(argument)
    return flags


def read_values(Config, arguments: list[str]) -> dict[str, list[tuple]]:
    """field -> [(value, the argument that sets it), ...], of all flags of the command line."""
    kinds = {field.name: type(field.default) for field in fields(Config)}
    found = {}
    for name, texts in split_flags(arguments).items():
        if name.startswith("no_") and kinds.get(name[3:]) is bool and not texts:
            name, texts = name[3:], ["False"]
        if name not in kinds:
            fail(f"{flag_of(name)}: the experiment has no such flag; its train.py --help has all")
        if name in SET_BY_SWEEP:
            fail(f"{flag_of(name)}: is set by the sweep, for each run")
        texts = texts or (["True"] if kinds[name] is bool else [])
        if not texts or name in found:
            hint = ", such as True False" if kinds[name] is bool else ""
            fail(f"{flag_of(name)}: needs one value or several, behind one flag{hint}")
        found[name] = []
        for text in texts:
            value, argument = read_value(Config, name, text, kinds[name] is bool)
            if value in [other for other, _ in found[name]]:
                fail(f"{flag_of(name)} {text}: this value is given twice")
            found[name].append((value, argument))
    return found


def read_value(Config, name: str, text: str, is_bool: bool) -> tuple:
    """(the value, the argument that sets it)."""
    argument = f"{flag_of(name)}={text}"
    if is_bool:
        arguments = {"True": flag_of(name), "False": f"--no-{flag_of(name)[2:]}"}
        argument = arguments.get(text.capitalize(), argument)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return getattr(tyro.cli(Config, args=[argument]), name), argument
    except SystemExit:
        wanted = "must be True or False" if is_bool else "is no such value; see train.py --help"
        fail(f"{flag_of(name)} {text!r}: {wanted}")


# ---------------------------------------------------------------- settings and names
def told(value) -> str:
    """A value as it is shown: the shortest text of a number."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def names_of(settings: list[dict]) -> list[str]:
    """A name for each setting {field: value}, such as lr=1e-05,seed=42.

    A path is told by its last part. A name that is too long, or another setting's too, ends in a
    checksum of all values.
    """
    names = []
    for setting in settings:
        parts = []
        for field, value in setting.items():
            last_part = told(value).rstrip("/").rpartition("/")[2]
            text = re.sub(r"[^A-Za-z0-9_.+-]+|[.]{2,}", "_", last_part)
            parts.append(f"{field}={text}")
        names.append(",".join(parts) or "run")
    unique = []
    for name, setting in zip(names, settings):
        if len(name) > NAME_BYTES or names.count(name) > 1:
            checksum = f"{zlib.crc32(repr(sorted(setting.items())).encode()):08x}"
            name = f"{name[: NAME_BYTES - 9]},{checksum}"
        unique.append(name)
    if len(set(unique)) < len(unique):
        fail("two settings have the same checksum; leave one out, or start it by itself")
    return unique


def check_configs(train, combinations: list[dict], names: list[str]) -> list:
    """The Config of each run, which the experiment's own check accepts."""
    default = train.Config()
    configs = []
    for name, values in zip(names, combinations):
        config = replace(default, **values, run_name=name)
        if config.max_steps == 0:
            fail("--max-steps 0: trains nothing, so there is nothing to sweep")
        try:
            train.check_config(config)
        except SystemExit as error:
            fail(f"{str(error).removeprefix('error: ')} (run {name})")
        configs.append(config)
    return configs


def settings_of(config, experiment: str) -> dict[str, str]:
    """What must be the same where a run exists: all constants of a Config that decide figures."""
    texts = {name: str(value) for name, value in asdict(config).items()}
    kept = {name: text for name, text in texts.items() if name not in (*PLACES, *HARMLESS)}
    return {"experiment": experiment, **kept}


# ---------------------------------------------------------------- figures
def spread(values: list) -> dict | None:
    """{"mean", "least", "most"}; None of no values, and where one is None, such as a NaN was."""
    if not values or None in values:
        return None
    return {"mean": mean(values), "least": min(values), "most": max(values)}


def curves_of(runs: dict, measure: str) -> dict:
    """{"steps", "mean", "least", "most"}: over seeds, at each evaluation; None without a value.

    runs: seed -> lines of metrics.jsonl.
    """
    evaluated = [[line for line in lines if measure in line] for lines in runs.values()]
    columns = [
        [line[measure] for line in column if line[measure] is not None]
        for column in zip(*evaluated)
    ]
    return range_of([line["step"] for line in evaluated[0]], columns)


def range_of(steps: list, columns: list) -> dict:
    """What `draw_range` draws. columns: at each step, the values of the seeds that have one."""
    return {
        "steps": steps,
        "mean": [mean(column) if column else None for column in columns],
        "least": [min(column) if column else None for column in columns],
        "most": [max(column) if column else None for column in columns],
    }


def order_of(value) -> tuple:
    """Numbers by size, then texts."""
    is_number = isinstance(value, (int, float))
    return (0, value, "") if is_number else (1, 0, str(value))


def summarise(experiment: str, combinations: list[dict], jobs: list[Job], outcomes, figure) -> dict:
    """What the table, the picture and the JSON file tell.

    combinations: {field: value} of each job. Times stand under "seconds" alone.
    """
    logs = {}
    for job in jobs:
        if outcomes[job.name] == "done":
            logs[job.name] = read_metrics(job.log_dir / job.name)
    if figure is None and logs:
        figure = default_figure(list(logs.values())[0])
    known = {name for lines in logs.values() for line in lines for name in line}
    if logs and figure not in known:
        names = ", ".join(sorted(known))
        fail(f"--figure {figure}: in none of the runs, which are kept; they have {names}")
    several = {}
    for field in combinations[0]:
        several[field] = len({repr(values[field]) for values in combinations}) > 1
    fixed = {f: v for f, v in combinations[0].items() if not several[f] and f != "seed"}
    settings = {}
    for values, job in zip(combinations, jobs):
        setting = {f: v for f, v in values.items() if several[f] and f != "seed"}
        row = settings.setdefault(repr(setting), {"values": setting, "runs": []})
        run = {"name": job.name, "seed": values.get("seed"), "outcome": outcomes[job.name]}
        row["runs"].append(run | figures_of(logs.get(job.name), figure))
    rows = [summarise_setting(row, logs, figure) for row in settings.values()]
    rows.sort(key=rank)
    seconds = {name: seconds_of(lines) for name, lines in logs.items()}
    head = {"experiment": experiment, "figure": figure, "fixed": fixed}
    return {**head, "settings": rows, "seconds": seconds}


def figures_of(lines: list[dict] | None, figure: str) -> dict:
    """Of a run: its last and its best figure, and the curve; {} where it failed."""
    if lines is None:
        return {}
    points = [line for line in lines if figure in line]
    values = [line[figure] for line in points]
    best = max((value for value in values if value is not None), default=None)
    figures = {"final": values[-1] if values else None, "best": best}
    return {**figures, "steps": [line["step"] for line in points], "values": values}


def summarise_setting(row: dict, logs: dict, figure: str) -> dict:
    finished = [run for run in row["runs"] if run["outcome"] == "done"]
    for name in ("final", "best"):
        row[name] = spread([run[name] for run in finished])
    row["curve"] = None
    if finished:
        row["curve"] = curves_of({run["name"]: logs[run["name"]] for run in finished}, figure)
    return row


def rank(row: dict) -> tuple:
    """The higher final mean first, then the higher best one, then the values; failed ones last."""
    means = [row[name]["mean"] if row[name] else float("-inf") for name in ("final", "best")]
    return [-value for value in means], [order_of(value) for value in row["values"].values()]


# ---------------------------------------------------------------- the table and the picture
def cell(value) -> str:
    """A value as text of a Markdown table."""
    return re.sub(r"\s+", " ", told(value)).replace("|", r"\|")


def to_markdown(results: dict) -> str:
    what = results["figure"] or "no run has finished"
    lines = [f"# Sweep of {results['experiment']}: {what}", ""]
    seeds = {str(run["seed"]): None for row in results["settings"] for run in row["runs"]}
    if list(seeds) != ["None"]:
        lines += [f"Seeds: {', '.join(seeds)}.", ""]
    if results["fixed"]:
        flags = [f"{flag_of(name)} {told(value)}" for name, value in results["fixed"].items()]
        lines += [re.sub(r"\s+", " ", f"All with {', '.join(flags)}."), ""]
    heads = [*results["settings"][0]["values"], "seeds", "final", "best", "seconds"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    failed = []
    for row in results["settings"]:
        bad = [run["name"] for run in row["runs"] if run["outcome"] == "failed"]
        failed += bad
        count = str(len(row["runs"]) - len(bad)) + (f" ({len(bad)} failed)" if bad else "")
        cells = [cell(value) for value in row["values"].values()] + [count]
        for name in ("final", "best"):
            of = row[name]
            text = f"{of['mean']:.4f} [{of['least']:.4f}, {of['most']:.4f}]" if of else "-"
            cells.append(text)
        known = [results["seconds"].get(run["name"]) for run in row["runs"]]
        known = [seconds for seconds in known if seconds is not None]
        cells.append(f"{mean(known):.0f}" if known else "-")
        lines.append(f"| {' | '.join(cells)} |")
    if failed:
        lines += ["", f"Failed: {'; '.join(failed)}."]
    return "\n".join(lines) + "\n"


def draw_range(panel, curve: dict, shade: float = 0.2, **style) -> None:
    """The mean over seeds as a line, and from the least to the most as a shade."""
    points = zip(curve["steps"], curve["mean"], curve["least"], curve["most"])
    points = [point for point in points if point[1] is not None]
    if not points:
        return
    steps, means, least, most = zip(*points)
    (line,) = panel.plot(steps, means, **style)
    panel.fill_between(steps, least, most, color=line.get_color(), alpha=shade, linewidth=0)


def label_of(values: dict) -> str:
    """Of a setting."""
    return ", ".join(f"{name} {short(value)}" for name, value in values.items()) or "all seeds"


def short(value) -> str:
    """A value's end, for a picture. matplotlib takes $ for a formula."""
    return told(value)[-30:].replace("$", r"\$")


def draw(results: dict, path: Path) -> None:
    """A curve a setting; where two flags vary, a heat map of the final figure beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["settings"]
    has_map = len(rows[0]["values"]) == 2
    size = (12 if has_map else 7, 4.6)
    figure, panels = pyplot.subplots(1, 2 if has_map else 1, figsize=size, squeeze=False)
    panel = panels[0, 0]
    for i, row in enumerate(row for row in rows if row["curve"]):
        style = {"color": f"C{i}", "label": label_of(row["values"])}
        if i >= 10:  # as many colours as can be told apart, for the best
            style = {"color": "grey", "linewidth": 0.5}
            style |= {"label": f"the {len(rows) - 10} others"} if i == 10 else {}
        draw_range(panel, row["curve"], 0.2 if len(rows) < 6 else 0.1, **style)
    panel.set(title="mean and range of the seeds", xlabel="step", ylabel=results["figure"])
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    if has_map:
        draw_map(panels[0, 1], rows)
        panels[0, 1].set_title(f"final {results['figure']}, mean of the seeds")
    figure.tight_layout()
    handles, labels = panel.get_legend_handles_labels()
    columns = 3 if has_map else 2
    if handles:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}  # below the panels
        figure.legend(handles, labels, ncols=columns, fontsize=8, title="best first", **place)
    aside = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(aside, dpi=120, bbox_inches="tight")
    os.replace(aside, path)
    pyplot.close(figure)


def draw_map(panel, rows: list[dict]) -> None:
    """The final mean of each setting of two flags, as a colour and a number."""
    across, down = list(rows[0]["values"])[::-1]
    columns = sorted({row["values"][across] for row in rows}, key=order_of)
    lines = sorted({row["values"][down] for row in rows}, key=order_of)
    grid = [[float("nan")] * len(columns) for _ in lines]
    for row in rows:
        if row["final"]:
            value = row["final"]["mean"]
            grid[lines.index(row["values"][down])][columns.index(row["values"][across])] = value
    image = panel.imshow(grid, aspect="auto", cmap="viridis")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            text = "failed" if value != value else f"{value:.3f}"
            if len(columns) > 10:
                break  # there is no room; the table has the numbers
            is_dark = value == value and image.norm(value) < 0.6
            panel.text(x, y, text, ha="center", va="center", color="w" if is_dark else "k")
    labels = [short(value) for value in columns]
    is_wide = sum(len(label) + 2 for label in labels) > 50
    turned = {"rotation": 30, "ha": "right"} if is_wide else {}
    panel.set_xticks(range(len(columns)), labels, **turned)
    panel.set_yticks(range(len(lines)), [short(value) for value in lines])
    panel.set(xlabel=across, ylabel=down)


# ---------------------------------------------------------------- main
def check_output(output: Path) -> list[Path]:
    """The three files. Ends the program where they cannot be written or are a user's."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        fail("the package matplotlib is missing; pip install -r requirements.txt")
    paths = compare.paths_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        markdown = paths[0]
        for path in paths:
            if path.is_dir():
                fail(f"--output {output}: {path} is a directory")
        is_ours = markdown.exists() and markdown.read_text(errors="replace").startswith(
            "# Sweep of"
        )
        for path in paths:
            if path.exists() and not is_ours:
                fail(f"--output {output}: {path} exists, and is not of a sweep")
        if not os.access(output.parent, os.W_OK):
            fail(f"--output {output}: {output.parent} cannot be written to")
    except OSError as error:
        fail(f"--output {output}: cannot be written ({error.strerror})")
    return paths


def plan(options: Options, arguments: list[str]) -> tuple[list[Job], list[dict]]:
    """(a job for each run, their values {field: value}), checked."""
    train = load_train(options.experiment)
    folder = Path(train.__file__).resolve().parent
    values = read_values(train.Config, arguments)
    combinations = [dict(zip(values, of)) for of in itertools.product(*values.values())]
    plain = [{f: value for f, (value, _) in of.items()} for of in combinations]
    named_by = [f for f, several in values.items() if len(several) > 1 or f == "seed"]
    names = names_of([{f: of[f] for f in named_by} for of in plain])
    configs = check_configs(train, plain, names)
    sweep_name = options.sweep_name or folder.name
    log_dir = options.log_dir / sweep_name
    checkpoint_path = options.checkpoint_path / sweep_name
    jobs = []
    for name, combination, config in zip(names, combinations, configs):
        flags = [argument for _, argument in combination.values()]
        settings = settings_of(config, folder.name)
        jobs.append(train_job(name, folder, flags, log_dir, checkpoint_path, settings))
    return jobs, plain


def main(options: Options, arguments: list[str]) -> None:
    for name, least in {"jobs": 1, "threads": 1, "ray_cpus": 0, "ray_gpus": 0}.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            fail(f"{flag_of(name)} {value}: must be at least {least}")
    jobs, combinations = plan(options, arguments)
    paths = check_output(options.output or jobs[0].log_dir / "table")
    threads = options.threads
    if threads is None and options.jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // options.jobs)
    if options.ray is None:
        outcomes = finish_runs(jobs, options.jobs, threads)
    else:
        outcomes = finish_runs(jobs, len(jobs), options.threads, join_ray(options))
    experiment = Path(options.experiment).name
    results = summarise(experiment, combinations, jobs, outcomes, options.figure)
    markdown, figures, picture = paths
    text = to_markdown(results)
    write_aside(figures, json.dumps(results, indent=1) + "\n")
    write_aside(markdown, text)
    print(f"\n{text}", flush=True)
    draw(results, picture)
    print(f"written: {markdown}, .json and .png")
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        again = "once that is mended, the same command tries them again"
        fail(f"{len(failed)} of {len(jobs)} runs failed; {again}")


if __name__ == "__main__":
    try:
        check_own_flags(sys.argv[1:])
        main(*tyro.cli(Options, description=__doc__, return_unknown_args=True))
    except KeyboardInterrupt:  # while no run is under way
        sys.exit("stopped; the same command goes on with what is left")
