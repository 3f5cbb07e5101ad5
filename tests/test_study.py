"""benchmarks/variants.py: what it makes of its runs' logs.
The runs themselves take too long for a test."""

import importlib.util
import json

import pytest
from helpers import ROOT

spec = importlib.util.spec_from_file_location("variants", ROOT / "benchmarks" / "variants.py")
variants = importlib.util.module_from_spec(spec)
spec.loader.exec_module(variants)


def line(step: int, **values) -> dict:
    return {"step": step, "elapsed_seconds": 1.0, **values}


def test_curves_are_mean_and_range_over_seeds():
    runs = {
        1: [line(0, eval_kl=0.0), line(5), line(10, eval_kl=1.0)],
        2: [line(0, eval_kl=0.0), line(5), line(10, eval_kl=4.0)],
        # as where no completion is wrong
        3: [line(0, eval_kl=0.0), line(5), line(10, eval_kl=None)],
    }
    expected = {"steps": [0, 10], "mean": [0.0, 2.5], "least": [0.0, 1.0], "most": [0.0, 4.0]}
    assert variants.curves_of(runs, "eval_kl") == expected


def test_only_a_run_that_reached_the_last_step_is_complete(tmp_path):
    """Bug: a run that was stopped counts as done, and its curve ends early."""
    config = variants.Config(steps=20, log_dir=tmp_path)
    assert not variants.is_complete(variants.metrics_of("experiment_dapo", 1, config), config)
    path = tmp_path / "experiment_dapo_seed_1" / "metrics.jsonl"
    path.parent.mkdir()
    lines = [json.dumps(line(step, eval_kl=0.0)) + "\n" for step in (0, 10, 20)]
    for text, complete in (
        ("".join(lines[:2]), False),
        ("".join(lines), True),
        ("".join(lines)[:-3], False),
    ):
        path.write_text(text)
        assert (
            variants.is_complete(variants.metrics_of("experiment_dapo", 1, config), config)
            == complete
        )


def test_report_is_of_the_command_that_the_readme_names():
    """The committed figures come from all variants and at least three seeds, in this setting."""
    report = json.loads((ROOT / "results" / "variants.json").read_text())
    assert list(report["ends"]) == list(report["curves"]) == list(variants.VARIANTS.values())
    assert all(
        list(of) == [str(seed) for seed in variants.Config().seeds]
        for of in report["ends"].values()
    )
    assert (
        report["setting"]["lr"] == variants.Config().lr
        and report["setting"]["max_steps"] == variants.Config().steps
    )
    for name, value in variants.SETTING.items():
        assert report["setting"][name] == value or str(value).endswith(str(report["setting"][name]))
    for of in report["curves"].values():
        for name in variants.MEASURES:
            curve = of[name]
            assert curve["least"][-1] <= curve["mean"][-1] <= curve["most"][-1]
            assert curve["steps"][-1] == variants.Config().steps


@pytest.mark.parametrize("name", ["variants_learning", "variants_length"])
def test_figures_exist(name):
    assert name in variants.FIGURES and (ROOT / "results" / f"{name}.png").stat().st_size > 10_000
