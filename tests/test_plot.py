"""tools/plot.py: what is read from a run, what is drawn, and what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
from helpers import ROOT

spec = importlib.util.spec_from_file_location("plot", ROOT / "tools" / "plot.py")
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


def write_run(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


ROWS = [{"step": 0, "eval_accuracy": 0.5}] + [
    {"step": i, "reward": float(i), "kl": None} for i in (1, 2, 3)
]


def test_series_leave_out_what_was_not_logged_and_smooth():
    assert plot.series(ROWS, "eval_accuracy", 1) == ([0], [0.5])
    assert plot.series(ROWS, "kl", 1) == ([], [])
    assert plot.series(ROWS, "reward", 2) == ([1, 2, 3], [1.0, 1.5, 2.5])
    assert plot.series([{"step": 1, "loss": float("nan")}], "loss", 1) == ([], [])


def test_a_picture_of_two_runs_one_of_them_killed(tmp_path, capsys):
    runs = (
        write_run(tmp_path / "a", ROWS),
        write_run(tmp_path / "b", ROWS, tail='{"step": 4, "rew'),
    )
    output = tmp_path / "runs.png"
    plot.main(plot.Options(runs, metrics=("eval_accuracy", "reward", "kl", "step"), output=output))
    assert output.read_bytes().startswith(b"\x89PNG") and str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"metrics": ("reward", "rewrad")},
            "rewrad: in none of the runs; they have eval_accuracy, kl, reward, step",
        ),
        ({"runs": (Path("nowhere"),)}, "metrics.jsonl: no such file"),
        ({"runs": ()}, "name at least one run"),
        ({"smooth": 0}, "must be above 0"),
        ({"output": Path("nowhere/plot.png")}, "--output nowhere/plot.png"),
        ({"output": Path("plot.doc")}, "--output plot.doc"),
    ],
)
def test_refusals(changes, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"runs": (write_run(tmp_path / "a", ROWS),), "metrics": ("reward",), **changes}
    with pytest.raises(SystemExit) as refusal:
        plot.main(plot.Options(**options))
    assert said in str(refusal.value)


def test_a_broken_line_is_named(tmp_path):
    run = write_run(tmp_path / "a", ROWS[:1], tail='{"step": \n{"step": 2}\n')
    with pytest.raises(SystemExit, match="metrics.jsonl, line 2: not a line of"):
        plot.read_metrics(run)
