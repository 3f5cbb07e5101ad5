"""Draw runs from their metrics.jsonl, one panel a metric, all runs in each.

    python tools/plot.py runs/a runs/b --metrics reward kl completion_length

A run that is still under way is drawn as far as it is.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories that hold a metrics.jsonl
    # fields of metrics.jsonl
    metrics: tuple[str, ...] = ("eval_accuracy", "reward", "kl", "completion_length")
    # mean over so many steps, up to the one drawn; evaluations (eval_*) are drawn as they are
    smooth: int = 1
    output: Path = Path("plot.png")  # the picture; its suffix says the format (.png, .pdf, .svg)


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. A last one that is half written, as a kill leaves it, is
    left out, and so are empty ones."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        sys.exit(
            f"error: {path}: no such file; name the directory of a run, such as runs/<run-name>"
        )
    lines = path.read_text("utf-8-sig", errors="replace").rstrip().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if type(row) is not dict or type(row["step"]) is not int:
                raise ValueError
            rows.append(row)
        except (ValueError, KeyError, RecursionError):
            if number < len(lines):
                sys.exit(f"error: {path}, line {number}: not a line of metrics.jsonl")
    return rows


def series(rows: list[dict], metric: str, smooth: int) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have the metric,
    each value the mean of the last `smooth` ones."""
    found = [
        (row["step"], row[metric])
        for row in rows
        if isinstance(row.get(metric), (int, float)) and math.isfinite(row[metric])
    ]
    values = [value for _, value in found]
    windows = [values[max(0, i + 1 - smooth) : i + 1] for i in range(len(values))]
    return [step for step, _ in found], [sum(window) / len(window) for window in windows]


def main(options: Options) -> None:
    if options.smooth < 1:
        sys.exit(f"error: --smooth {options.smooth}: must be above 0")
    if not options.metrics:
        sys.exit("error: --metrics: name at least one field of metrics.jsonl")
    if not options.runs:
        sys.exit("error: name at least one run: python tools/plot.py runs/<run-name>")
    runs = {run: read_metrics(run) for run in options.runs}
    known = {name for rows in runs.values() for row in rows for name in row}
    if missing := [metric for metric in options.metrics if metric not in known]:
        sys.exit(
            f"error: --metrics {' '.join(missing)}: in none of the runs; "
            f"they have {', '.join(sorted(known))}"
        )

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(options.metrics), 3)
    lines = math.ceil(len(options.metrics) / columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False
    )
    for panel, metric in zip(panels.flat, options.metrics):
        for run, rows in runs.items():
            steps, values = series(
                rows, metric, 1 if metric.startswith("eval_") else options.smooth
            )
            label = run.name if len({run.name for run in runs}) == len(runs) else str(run)
            panel.plot(
                steps, values, label=label, marker="o" if len(steps) < 20 else None, markersize=3
            )
        panel.set(xlabel="step", title=metric)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(options.metrics) :]:
        panel.remove()
    panels.flat[0].legend(fontsize=8)
    figure.tight_layout()
    output = options.output if options.output.suffix else options.output.with_suffix(".png")
    try:
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --output {options.output}: {error}")
    print(f"written: {output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
