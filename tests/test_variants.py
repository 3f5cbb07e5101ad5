"""What sets the variants apart from their parents: their lines, their advantages, their weights."""

import ast
import difflib
import re

import pytest
import torch
from helpers import ROOT, load_experiment

drgrpo = load_experiment("experiment_drgrpo")
LESSON = ("train.py", "loss.py", "replay_buffer.py")
MOST_CHANGED_LINES = {
    "experiment_accelerate": 120,
    "experiment_async": 115,
    "experiment_cispo": 25,
    "experiment_drgrpo": 20,
    "experiment_dapo": 105,
    "experiment_gspo": 40,
    "experiment_ifeval": 330,
    "experiment_reward_model": 235,
    "experiment_multiturn_tool_calling": 300,
    "experiment_multiturn_qa": 170,
}


def parent_of(experiment: str) -> str:
    """The experiment that its README names, near the top, as the one to compare it with."""
    first_lines = (ROOT / experiment / "README.md").read_text().splitlines()[:12]
    (parent,) = re.findall(r"^Parent: `(experiment_\w+)`", "\n".join(first_lines), re.MULTILINE)
    assert parent != experiment and (ROOT / parent / "run.py").is_file()
    return parent


def lines_without_docstring(path) -> list[str]:
    text = path.read_text()
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def changed_lines(experiment: str, name: str, parent: str | None = None) -> list[str]:
    """Removed and added lines of a file against the parent's, header docstring apart."""
    paths = [ROOT / folder / name for folder in (parent or parent_of(experiment), experiment)]
    diff = difflib.unified_diff(*map(lines_without_docstring, paths), n=0, lineterm="")
    return [line for line in diff if line[0] in "+-" and not line.startswith(("+++", "---"))]


def test_every_experiment_but_the_base_has_a_bound():
    experiments = {path.parent.name for path in ROOT.glob("experiment_*/run.py")}
    assert experiments - {"experiment_base"} == set(MOST_CHANGED_LINES)


@pytest.mark.parametrize("experiment", MOST_CHANGED_LINES)
def test_the_diff_to_the_parent_is_the_lesson(experiment):
    """Of all lesson files together."""
    counts = {name: len(changed_lines(experiment, name)) for name in LESSON}
    assert 0 < sum(counts.values()) <= MOST_CHANGED_LINES[experiment], counts


@pytest.mark.parametrize("experiment", sorted(set(MOST_CHANGED_LINES) - {"experiment_drgrpo"}))
def test_its_readme_says_how_long_the_diff_is(experiment):
    readme = (ROOT / experiment / "README.md").read_text()
    (said,) = re.findall(r"The diff removes (\d+) lines and\s+adds (\d+)", readme)
    lines = changed_lines(experiment, "train.py")
    assert said == tuple(str(sum(line[0] == sign for line in lines)) for sign in "-+")


def test_the_table_of_all_objectives_has_the_lines_of_each():
    section = (ROOT / "benchmarks" / "README.md").read_text().split("## All objectives")[1]
    rows = re.findall(r"^\| .*\(`(experiment_\w+)`\) (.*)$", section, re.MULTILINE)
    assert len(rows) == 5
    for experiment, cells in rows:
        counts = [len(changed_lines(experiment, name, "experiment_base")) for name in LESSON]
        assert f"| {sum(counts)} |" in cells, experiment


@pytest.mark.parametrize("experiment", ["experiment_drgrpo"])
def test_its_readme_opens_with_the_diff(experiment):
    """Every changed line of train.py, header docstring apart, and no other."""
    readme = (ROOT / experiment / "README.md").read_text()
    shown = readme.split("```diff\n")[1].split("```")[0].splitlines()
    assert sorted(filter(None, shown)) == sorted(changed_lines(experiment, "train.py"))


def test_drgrpo_advantages_by_hand():
    """One success in eight: 1 - 1/8 and -1/8, where GRPO has 2.474 and -0.353."""
    rewards = torch.tensor([1.0] + [0.0] * 7)
    assert drgrpo.train.group_advantages(rewards).tolist() == [0.875] + [-0.125] * 7
    grpo = load_experiment().train.group_advantages(rewards)
    assert grpo.tolist() == pytest.approx([2.4742] + [-0.3535] * 7, abs=1e-4)


@pytest.mark.parametrize("reward", [0.1, 0.3, 1.1, 1e-3, -0.7])
def test_drgrpo_equal_rewards_have_no_advantage(reward):
    """Pitfall 10: by rounding alone the mean of equal numbers may differ from them."""
    for size in range(2, 17):
        assert drgrpo.train.group_advantages(torch.full((size,), reward)).tolist() == [0.0] * size


def test_drgrpo_is_the_default_of_its_experiment():
    assert (
        drgrpo.train.Config().critic_type == "drgrpo"
        and load_experiment().train.Config().critic_type == "grpo"
    )


def first_weights(lengths: list[int], critic: str) -> list[float]:
    masks = [torch.ones(length) for length in lengths]
    return [
        row[0].item() for row in drgrpo.loss.token_weights(masks, critic, generate_max_length=64)
    ]


def test_the_weight_of_a_token_in_completions_of_10_and_40():
    """GRPO's is 4 times larger in the shorter one, Dr. GRPO's and DAPO's the same in both."""
    assert first_weights([10, 40], "grpo") == pytest.approx([1 / 20, 1 / 80])
    assert first_weights([10, 40], "drgrpo") == pytest.approx([1 / 128, 1 / 128])
    assert first_weights([10, 40], "dapo") == pytest.approx([1 / 50, 1 / 50])


def test_only_dapos_weight_changes_when_another_completion_grows():
    for critic, changes in (("grpo", False), ("drgrpo", False), ("dapo", True)):
        before, after = (first_weights([10, other], critic)[0] for other in (40, 60))
        assert (before != after) == changes
