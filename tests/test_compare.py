"""tools/compare.py: its statistics, its figures against the experiments' own, its files."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
from helpers import POLICY, ROOT, load_experiment
from scipy.stats import binomtest
from test_run import CHANGES, EXPERIMENTS, make_adapter, tiny_settings

spec = importlib.util.spec_from_file_location("compare", ROOT / "tools" / "compare.py")
compare = importlib.util.module_from_spec(spec)
sys.modules["compare"] = compare
spec.loader.exec_module(compare)


# ---------------------------------------------------------------- statistics
@pytest.mark.parametrize("right, n", [(0, 1), (1, 1), (0, 512), (512, 512), (192, 512), (7, 9)])
def test_wilson_interval_equals_scipys(right, n):
    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert compare.wilson_interval(right, n) == pytest.approx(
        (interval.low, interval.high), abs=1e-9
    )


@pytest.mark.parametrize("one, other", [(0, 0), (1, 0), (0, 9), (5, 5), (12, 30), (318, 1), (3, 4)])
def test_mcnemar_equals_scipys_exact_binomial_test(one, other):
    p = binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
    assert compare.mcnemar(one, other) == pytest.approx(p, rel=1e-9)


def test_pass_at_k_equals_brute_force():
    """The share of all sets of k samples that hold a right one."""
    for n in range(2, 8):
        for right in range(n + 1):
            samples = [i < right for i in range(n)]
            for k in range(1, n + 1):
                sets = list(itertools.combinations(samples, k))
                share = sum(map(any, sets)) / len(sets)
                assert compare.pass_at_k(right, n, k) == pytest.approx(share)


# ---------------------------------------------------------------- figures
def load_train(experiment: str):
    """In place of compare's own, which would leave the experiment's modules behind."""
    return load_experiment(experiment).train


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    monkeypatch.setattr(compare, "load_train", load_train)
    monkeypatch.setitem(sys.modules, "train", None)


def flags_of(settings: dict) -> list[str]:
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def run_compare(tmp_path, experiment, models, samples=0, **changes):
    settings = tiny_settings(tmp_path, "", **CHANGES.get(experiment, {}) | changes)
    for name in ("model_name", "max_steps", "run_name"):
        del settings[name]
    sys.modules["train"] = load_train(experiment)  # tyro reads its source
    options = compare.Options(experiment, tuple(models), samples, output=tmp_path / "out" / "c")
    compare.main(options, flags_of(settings))
    return json.loads((tmp_path / "out" / "c.json").read_text())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_figures_equal_the_experiments_own(experiment, tmp_path, model, monkeypatch, capsys):
    """Accuracy and all else that --max-steps 0 prints, from one completion at a time."""
    train = load_train(experiment)
    results = run_compare(tmp_path, experiment, [model], samples=4)
    (found,) = results["models"].values()
    changes = CHANGES.get(experiment, {}) | dict(max_steps=0, kl_weight=0.0)
    config = train.Config(**tiny_settings(tmp_path, model, **changes))
    evaluations = []
    original = train.evaluate

    def keep(*arguments):
        evaluations.append(original(*arguments))
        return evaluations[-1]

    monkeypatch.setattr(train, "evaluate", keep)
    train.main(config)
    assert found["evaluation"] == evaluations[0]
    assert found["accuracy"] == evaluations[0]["eval_accuracy"]
    assert len(found["greedy"]) == found["prompts"] == 8
    assert list(found["pass_at_k"]) == ["1", "2", "4"]
    values = list(found["pass_at_k"].values())
    assert values == sorted(values)
    mean_right = sum(found["right_samples"]) / 8 / 4
    assert values[0] == pytest.approx(mean_right)


def test_each_sample_is_judged_by_itself(tmp_path, model, monkeypatch):
    """A group's verdicts, in its order: a completion is right where its text ends in an even
    letter, and as many are counted as a loop over the texts counts."""
    train = load_train("experiment_base")
    texts = []

    def judge(completion, *_):
        return float(len(completion) % 2 == 0)

    rollout = train.rollout

    def keep(*arguments, **more):
        experiences = rollout(*arguments, **more)
        if len(experiences[0].completions) > 1:
            texts.extend(e.completions for e in experiences)
        return experiences

    monkeypatch.setattr(train, "accuracy_reward", judge)
    monkeypatch.setattr(train, "rollout", keep)
    results = run_compare(tmp_path, "experiment_base", [model], samples=5)
    (found,) = results["models"].values()
    assert len(texts) == 8 and len({text for group in texts for text in group}) > 8
    assert found["right_samples"] == [sum(len(text) % 2 == 0 for text in group) for group in texts]
    assert list(found["pass_at_k"]) == ["1", "2", "4", "5"]


def test_a_model_an_adapter_and_what_is_written(tmp_path, model, capsys):
    adapter = make_adapter(tmp_path, model)
    results = run_compare(tmp_path, "experiment_base", [model, adapter], samples=2)
    first, second = results["models"].values()
    assert first["only_first"] == first["only_this"] == 0 and first["p_value"] == 1
    pairs = list(zip(compare.right(first), compare.right(second)))
    assert second["only_this"] == pairs.count((False, True))
    text = (tmp_path / "out" / "c.md").read_text()
    assert "| model | accuracy |" in text and "pass@k of 2 samples" in text
    assert (tmp_path / "out" / "c.png").stat().st_size > 10_000
    assert "written" in capsys.readouterr().out


def test_where_two_models_part():
    """Both answers of each such prompt, without what all prompts begin with."""

    def answer(prompt, completion, right):
        return {"prompt": f"system: sum. {prompt}", "completion": completion, "right": right}

    first = {"greedy": [answer("1 + 1", "2", True), answer("2 + 2", "5", False)]}
    other = {"greedy": [answer("1 + 1", "2", True), answer("2 + 2", "4 ``` <b>", True)]}
    text = "\n".join(compare.side_by_side(first, other, 5))
    assert "2 + 2" in text and "system" not in text and "1 + 1" not in text
    assert "the first, wrong" in text and "this one, right" in text
    assert "````text\n4 ``` <b>\n````" in text  # whatever a model writes stays in its block
    assert compare.side_by_side(first, first, 5) == ["Nowhere."]
    assert compare.side_by_side(first, other, 0) == ["On 1 prompts.", ""]
    for model in (first, other):  # what the template writes behind each question is left out
        for entry in model["greedy"]:
            entry["prompt"] += "?\nassistant\n"
    text = "\n".join(compare.side_by_side(first, other, 5))
    assert "2 + 2?" in text and "assistant" not in text


def test_labels_are_short_and_differ():
    names = ["output/experiment_base/a/step_000010", "output/experiment_base/b/step_000010"]
    assert list(compare.labels_of(names).values()) == ["a/step_000010", "b/step_000010"]
    assert list(compare.labels_of(["data/policy_math"]).values()) == ["data/policy_math"]
    names = ["data/policy_math", "output/experiment_base/a_very_long_name/step_000064"]
    labels = ["data/policy_math", "a_very_long_name/step_000064"]
    assert list(compare.labels_of(names).values()) == labels
    names = ["one/run/step_000010", "two/run/step_000010"]
    assert list(compare.labels_of(names).values()) == names


@pytest.mark.parametrize(
    "experiment, models, samples, said",
    [
        ("experiment_none", ("a",), 0, "is no experiment"),
        ("experiment_base", ("a", "a"), 0, "named twice"),
        ("experiment_base", ("a",), 1, "--samples 1"),
        ("experiment_base", ("a",), -3, "--samples -3"),
        ("experiment_base", (), 0, "name at least one model"),
    ],
)
def test_what_cannot_be_compared(experiment, models, samples, said, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(SystemExit) as exit:
        compare.compare(compare.Options(experiment, models, samples), [])
    assert said in exit.value.code and exit.value.code.startswith("error: ")


def test_the_command_on_the_embedded_policy(tmp_path):
    import subprocess

    command = [sys.executable, str(ROOT / "tools" / "compare.py"), "experiment_base", str(POLICY)]
    command += ["--output", str(tmp_path / "c"), "--max-eval-prompts", "16"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "16 held-out prompts" in done.stdout and "policy_math" in done.stdout


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a directory of its own, which has the repository's files. With one thread: two of them
    wait for each other ten times as long, when another test has a core."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import nbformat
    from nbclient import NotebookClient

    for name in ("data", "experiment_base", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "compare_models.ipynb", as_version=4)
    place = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = json.dumps(outputs)
    assert "pass@16" in text and "never right in 16 samples" in text


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads((ROOT / "notebooks" / "compare_models.ipynb").read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize(
    "output, said",
    [
        ("file/c", "cannot be written"),
        ("x" * 260, "cannot be written"),
        (".", "names no file"),
        ("notes", "is not of an earlier comparison"),
    ],
)
def test_an_output_that_cannot_be_written_or_is_a_users(tmp_path, output, said, monkeypatch):
    """Bug: it was noticed after all models had been evaluated, or not at all."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("notes.md").write_text("my notes")
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(SystemExit) as exit:
        compare.main(compare.Options("experiment_base", ("a",), output=Path(output)), [])
    assert said in exit.value.code
    assert Path("notes.md").read_text() == "my notes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes.md"]


def test_a_wrong_name_is_noticed_before_a_model_is_evaluated(tmp_path, model, monkeypatch):
    monkeypatch.setattr(compare, "judge_model", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(SystemExit) as exit:
        run_compare(tmp_path, "experiment_base", [model, str(tmp_path / "none")])
    assert "none: cannot be loaded" in exit.value.code


def test_more_samples_than_are_sampled_at_once(tmp_path, model, monkeypatch):
    monkeypatch.setattr(compare, "judge_model", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(SystemExit) as exit:
        run_compare(tmp_path, "experiment_base", [model], samples=512)
    assert "--sample-rows" in exit.value.code


@pytest.mark.parametrize("output", ["a/step.64", "a/step.64.md", "a/step.64.png"])
def test_a_dot_in_the_name_of_the_output_stays(output):
    """Bug: step.64 and step.32 are both written into step.md."""
    names = [path.as_posix() for path in compare.paths_of(Path(output))]
    assert names == ["a/step.64.md", "a/step.64.json", "a/step.64.png"]
