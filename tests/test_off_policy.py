"""benchmarks/off_policy.py: what it makes of its runs' logs. The runs take too long for a test."""

import json
import os
import signal
import sys
import threading
import time

import pytest
from helpers import ROOT, load_benchmark

off_policy = load_benchmark("off_policy")


def lines_of(accuracies, seconds, **more):
    """Steps with an evaluation each second one. seconds: elapsed at each step."""
    lines = [{"step": 0, "eval_accuracy": accuracies[0]}]
    for i, elapsed in enumerate(seconds):
        step = {"step": i + 1, "elapsed_seconds": elapsed, "reward_accuracy": 0.5, "entropy": 0.1}
        step |= {"clip_fraction": 0.0, "ess": 1.0, "grad_clip_fraction": 0.0}
        step |= {name: of[i] for name, of in more.items()}
        if (i + 1) % 2 == 0:
            step["eval_accuracy"] = accuracies[(i + 1) // 2]
        lines.append(step)
    return lines


def test_evaluations_are_left_out_of_the_seconds():
    """Steps 1 and 2 take 2 s each. Then an evaluation of 10 s lies before step 3's end."""
    lines = lines_of([0.1, 0.2, 0.3], [2.0, 4.0, 17.0, 20.0])
    assert off_policy.seconds_at_evaluations(lines) == [0, 4, 10]


def test_dapo_counts_all_that_it_sampled():
    """16 groups are kept and half as many thrown away: 24 groups of 8."""
    assert off_policy.completions_of({"groups": 16, "wasted_fraction": 1 / 3}) == 24 * 8
    assert off_policy.completions_of({"groups": 0, "wasted_fraction": 1.0}) == 10 * 128
    assert off_policy.completions_of({}) == 128
    lines = lines_of([0.1, 0.2], [1.0, 2.0], groups=[16, 8], wasted_fraction=[0.0, 0.5])
    assert off_policy.summarise(lines)["samples"] == [0, 256]


def test_the_lowest_of_the_rates_that_one_seed_cannot_tell_apart():
    scores = {1e-5: 0.3, 5e-5: 0.495, 1e-4: 0.51, 5e-4: 0.4}
    assert off_policy.choose(scores, 0.02) == 5e-5
    assert off_policy.choose(scores, 0.0) == 1e-4


def test_curves_are_compared_at_equal_samples():
    runs = {
        1: {"samples": [0, 100, 200], "accuracy": [0.0, 0.5, 0.6]},
        2: {"samples": [0, 200], "accuracy": [0.0, 1.0]},
    }
    curve = off_policy.at_equal(runs, "samples", count=3)
    assert curve["steps"] == [0, 100, 200] and curve["mean"] == pytest.approx([0, 0.5, 0.8])
    assert curve["least"] == pytest.approx([0, 0.5, 0.6]) and curve["most"][-1] == 1


def test_a_step_without_an_update_clips_nothing():
    runs = {1: {"clip_fraction": [0.25, None]}, 2: {"clip_fraction": [0.75, 0.5]}}
    assert off_policy.over_steps(runs, "clip_fraction")["mean"] == [0.5, 0.25]


def test_report_is_of_the_command_that_the_readme_names():
    """All objectives, all numbers of updates, three seeds, and a search before them."""
    report = json.loads((ROOT / "results" / "off_policy.json").read_text())
    config = off_policy.Config()
    assert list(report["runs"]) == list(report["search"]) == list(off_policy.OBJECTIVES)
    for objective, found in report["runs"].items():
        assert list(found) == [str(updates) for updates in config.updates]
        for updates, of in found.items():
            scores = report["search"][objective][updates]
            assert [float(lr) for lr in scores] == sorted(config.lrs)
            scores = {float(lr): score for lr, score in scores.items()}
            if updates == "1" and objective in off_policy.GRPO_WITH_ONE_UPDATE:
                assert of == report["runs"]["GRPO"]["1"]
            else:
                assert of["lr"] == off_policy.choose(scores, config.search_margin)
            assert list(of["seeds"]) == [str(seed) for seed in config.seeds]
            for run in of["seeds"].values():
                assert len(run["ess"]) == config.steps


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"updates": (1, 3)}, "--updates: must be some of 1, 2, 4, 8, 16"),
        ({"updates": ()}, "--updates: needs one value or several"),
        ({"seeds": (1, 1)}, "--seeds: needs one value or several, each once"),
        ({"seeds": (-1,)}, "must be 0 or more"),
        ({"steps": 0}, "--steps: must be a multiple of 4"),
        ({"steps": 6}, "--steps: must be a multiple of 4"),
        ({"lrs": (1e-5, float("nan"))}, "--lrs: must be above 0"),
        ({"search_margin": float("nan")}, "--search-margin at least 0"),
        ({"output": ROOT / "README.md"}, "--output"),
    ],
)
def test_wrong_values_end_in_one_line_before_the_first_run(changes, words):
    with pytest.raises(SystemExit) as error:
        off_policy.main(off_policy.Config(**changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_signal_is_passed_on_and_waited_for(tmp_path):
    """Bug: Ctrl-C killed the sweep, whose runs lost their steps; SIGTERM left it running."""
    child = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )

    def stop():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert off_policy.finish_process([sys.executable, "-c", child]) == 7
    thread.join()
