"""completions.jsonl: its numbers, which groups it holds, resuming, rotation, full disks."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import load_experiment
from test_run import (
    IN_ONE_PROCESS,
    WITH_TOOLS,
    checkpoints,
    fingerprint,
    metrics,
    reward_by,
    run_main,
    save_model,
)

base = load_experiment()
OFF = dict(eval_interval=0, checkpoint_interval=1, log_completions_interval=1)
TEMPERATURE = 0.8
# The log's code is the same everywhere. These differ in what they hand to it.
SHORT = ["experiment_base", "experiment_dapo", "experiment_multiturn_tool_calling"]
LONG = [pytest.param(name, marks=pytest.mark.long) for name in IN_ONE_PROCESS if name not in SHORT]
TRAINED = ("old_log_probs", "weight", "ratio", "clipped", "push")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def rows_of(folder: Path) -> list[dict]:
    lines = []
    for path in base.completions.completion_files(folder / "runs" / "run"):
        lines += path.read_text().splitlines()
    return [json.loads(line) for line in lines]


def groups_of(folder: Path) -> list[dict]:
    return [row for row in rows_of(folder) if "completions" in row]


def run_with_spread(folder, model, monkeypatch, experiment="experiment_base", **settings) -> None:
    """Where every group has spread, and so a gradient."""
    folder.mkdir(exist_ok=True)
    reward_by(fingerprint, load_experiment(experiment).train, monkeypatch)
    run_main(folder, model, experiment, **{**OFF, **settings})


def naive_log_probs(
    checkpoint: Path, prompt_ids: list[int], ids: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """Of every token of the vocabulary at each place of a completion, forwarded alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0]
    return (logits[len(prompt_ids) - 1 : -1] / temperature).log_softmax(-1)


def gathered(log_probs: torch.Tensor, ids: list[int], mask: list[int]) -> list:
    """The log-probs of a completion's own tokens, None where they were given to it."""
    found = log_probs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
    return [value if is_sampled else None for value, is_sampled in zip(found, mask)]


def close(values: list, expected: list) -> bool:
    """Five digits, and float32."""
    holes = [value is None for value in values] == [value is None for value in expected]
    pairs = [(a, b) for a, b in zip(values, expected) if a is not None and b is not None]
    return holes and all(a == pytest.approx(b, rel=1e-4, abs=2e-4) for a, b in pairs)


# ---------------------------------------------------------------- the numbers
@pytest.mark.parametrize("experiment", SHORT + LONG)
def test_the_log_probs_are_those_of_completions_forwarded_alone(
    experiment, tmp_path, model, monkeypatch
):
    """When sampled, before and after the step's updates, of the reference and the alternatives."""
    settings = dict(log_alternatives=3, temperature=TEMPERATURE, kl_weight=0.01)
    run_with_spread(tmp_path, model, monkeypatch, experiment, **settings)
    kept = checkpoints(tmp_path, experiment=experiment)
    groups = groups_of(tmp_path)
    assert [row["step"] for row in groups] == [1, 1, 2, 2]
    for row in groups:
        before = model if row["step"] == 1 else kept[1]
        for completion in row["completions"]:
            ids, mask = completion["ids"], completion["mask"]
            assert len(completion["tokens"]) == len(ids) == len(mask)
            place = (row["prompt_ids"], ids, TEMPERATURE)
            then = naive_log_probs(before, *place)
            now = naive_log_probs(kept[row["step"]], *place)
            first = gathered(naive_log_probs(model, *place), ids, mask)
            assert close(completion["sampled_log_probs"], gathered(then, ids, mask))
            assert close(completion["new_log_probs"], gathered(now, ids, mask))
            if "old_log_probs" in completion:
                assert close(completion["old_log_probs"], gathered(then, ids, mask))
                assert close(completion["reference_log_probs"], first)
            for i, alternatives in enumerate(completion["alternatives"]):
                if not mask[i]:
                    assert alternatives is None
                    continue
                likeliest = then[i].topk(3)
                assert [a[0] for a in alternatives] == likeliest.indices.tolist()
                assert close([a[2] for a in alternatives], likeliest.values.tolist())
                assert close([a[3] for a in alternatives], now[i][likeliest.indices].tolist())


@pytest.mark.parametrize("experiment", SHORT[:3])
def test_what_the_loss_saw(experiment, tmp_path, model, monkeypatch):
    """A ratio of 1 in the step's first batch, other ones in its second; null at given tokens."""
    settings = dict(log_groups=4, lr=1e-2, kl_weight=0.01)
    if experiment == "experiment_dapo":
        settings |= dict(overlong_filter=False)
    run_with_spread(tmp_path, model, monkeypatch, experiment, **settings)
    groups = [row for row in groups_of(tmp_path) if row["step"] == 2]
    assert len(groups) == 4
    on_policy = []
    for row in groups:
        assert len(row["advantages"]) == len(row["completions"]) == 4
        assert row["rewards"] == pytest.approx(
            [sum(parts) for parts in zip(*row["reward_parts"].values())], abs=1e-4
        )
        ratios = []
        for completion, advantage in zip(row["completions"], row["advantages"]):
            columns = zip(*(completion[name] for name in ("mask", "kl", *TRAINED)))
            for is_sampled, kl, old, weight, ratio, clipped, push in columns:
                if not is_sampled:
                    assert old is weight is ratio is clipped is push is kl is None
                    continue
                ratios.append(ratio)
                assert clipped in (0, 1) and kl >= 0
                assert push == pytest.approx(
                    0 if clipped else weight * ratio * advantage, rel=1e-3, abs=1e-9
                )
        on_policy.append(set(ratios) == {1.0})
    assert sorted(on_policy) == [False, False, True, True]
    if experiment in WITH_TOOLS:
        masks = [c["mask"] for row in rows_of(tmp_path) for c in row.get("completions", [])]
        assert any(masks)


def test_the_first_groups_are_scored_again(tmp_path, model, monkeypatch):
    run_with_spread(tmp_path, model, monkeypatch, max_steps=3)
    rows = rows_of(tmp_path)
    again = [row for row in rows if "sampled_step" in row]
    assert [(row["step"], row["sampled_step"], row["group"]) for row in again] == [
        (2, 1, 0),
        (2, 1, 1),
        (3, 1, 0),
        (3, 1, 1),
    ]
    first = groups_of(tmp_path)[0]
    for row in again:
        if row["group"] != first["group"]:
            continue
        for completion, log_probs in zip(first["completions"], row["log_probs"]):
            place = (first["prompt_ids"], completion["ids"])
            now = naive_log_probs(checkpoints(tmp_path)[row["step"]], *place)
            assert close(log_probs, gathered(now, completion["ids"], completion["mask"]))


EVERY_LOSS = sorted({*IN_ONE_PROCESS, "experiment_accelerate", "experiment_async"})


@pytest.mark.parametrize("experiment", EVERY_LOSS)
def test_push_is_the_gradient_that_autograd_finds(experiment):
    """Of the loss without its KL term, sign turned; clipped and unclipped on both sides."""
    loss = load_experiment(experiment).loss
    torch.manual_seed(0)
    tokens = 40
    log_probs = -torch.rand(tokens)
    log_probs.requires_grad_()
    batch = SimpleNamespace(
        old_log_probs=log_probs.detach() + 0.5 * torch.randn(tokens),
        sampled_log_probs=log_probs.detach() + 0.5 * torch.randn(tokens),
        advantages=torch.randn(tokens),
        weights=torch.rand(tokens),
        completion=torch.arange(tokens) // 2,  # for GSPO: twenty of two tokens
        origins=[None] * 20,
    )
    cap = (2.0,) if experiment == "experiment_async" else ()
    loss.GRPOLoss(0.2, 0.2, 0.0, *cap)(log_probs, batch).backward()
    assert 0 < batch.seen["clipped"].sum() < tokens
    torch.testing.assert_close(batch.seen["push"], -log_probs.grad)
    assert batch.seen["kl"] is None


@pytest.mark.parametrize("setting", ["single rows", "lora", "bfloat16"])
def test_other_ways_to_forward(setting, tmp_path, monkeypatch):
    """Rows of one completion, capped logits, adapters, half precision: the log-probs agree with
    the sampler's."""
    model = save_model(tmp_path / "model")
    if setting == "single rows":
        capped = {"final_logit_softcapping": 3.0}
        model = save_model(tmp_path / "gemma", "gemma3-short-window", **capped)
    changes = {
        "single rows": {},
        "lora": dict(lora_rank=4),
        "bfloat16": dict(precision="bfloat16"),
    }[setting]
    run_with_spread(tmp_path, model, monkeypatch, lr=0.0, log_alternatives=2, **changes)
    tolerance = 0.3 if setting == "bfloat16" else 2e-3
    compared = 0
    for row in groups_of(tmp_path):
        for completion in row["completions"]:
            sampled = completion["sampled_log_probs"]
            assert completion["new_log_probs"] == pytest.approx(sampled, abs=tolerance)
            columns = zip(completion["ids"], completion["alternatives"], sampled)
            for id_, (best, second), own in columns:
                assert best[2] >= second[2] and own <= best[2] + tolerance
                assert best[2] == pytest.approx(best[3], abs=1e-6)
                for other, _, then, _ in (best, second):
                    if other == id_:
                        compared += 1
                        assert then == pytest.approx(own, abs=tolerance)
    assert compared


def test_logging_changes_nothing_in_training(tmp_path, model, monkeypatch):
    quiet = dict(OFF, log_completions_interval=0)
    run_with_spread(tmp_path / "a", model, monkeypatch, **quiet)
    run_with_spread(tmp_path / "b", model, monkeypatch, log_alternatives=2, log_groups=4)
    names = ("loss", "grad_norm", "kl", "reward", "entropy", "max_log_prob_gap", "clip_fraction")
    for one, other in zip(metrics(tmp_path / "a")[1:], metrics(tmp_path / "b")[1:]):
        assert [one[name] for name in names] == [other[name] for name in names]
    assert rows_of(tmp_path / "a") == []


# ---------------------------------------------------------------- which groups
@pytest.mark.parametrize(
    "interval, due", [(10, [1, 10, 20]), (1, [*range(1, 21)]), (7, [1, 7, 14]), (0, [])]
)
def test_which_steps(interval, due):
    log = object.__new__(base.completions.CompletionLog)
    log.config = SimpleNamespace(log_completions_interval=interval)
    assert [step for step in range(1, 21) if log.is_due(step)] == due


def test_groups_with_spread_come_first(tmp_path, model, monkeypatch):
    """A group without spread has no push, and without a KL term it is not forwarded either."""
    train = base.train
    reward_by(fingerprint, train, monkeypatch)
    advantages = train.group_advantages
    calls = []

    def without_spread(rewards):
        calls.append(rewards)
        return 0 * rewards if len(calls) % 4 != 3 else advantages(rewards)  # all but the third

    monkeypatch.setattr(train, "group_advantages", without_spread)
    run_main(tmp_path, model, **OFF, log_groups=3, kl_weight=0.0)
    groups = groups_of(tmp_path)
    assert [row["group"] for row in groups] == [2, 0, 1] * 2
    assert all(set(TRAINED) <= set(completion) for completion in groups[0]["completions"])
    for completion in groups[0]["completions"]:
        assert "kl" not in completion and "reference_log_probs" not in completion
    for row in groups[1:3]:
        for completion in row["completions"]:
            assert "push" not in completion and "new_log_probs" in completion


def test_no_groups(tmp_path, model):
    run_main(tmp_path, model, **OFF, log_groups=0)
    assert rows_of(tmp_path) == []


def test_a_completion_that_dapo_leaves_out_has_no_push(tmp_path, model, monkeypatch):
    run_with_spread(tmp_path, model, monkeypatch, "experiment_dapo", overlong_filter=True)
    completions = [
        (cut, completion)
        for row in groups_of(tmp_path)
        for cut, completion in zip(row["truncated"], row["completions"])
    ]
    assert {cut for cut, _ in completions} == {0, 1}
    for cut, completion in completions:
        assert ("push" in completion) == (not cut)
        assert (set(completion["new_log_probs"]) == {None}) == bool(cut)


def test_texts_that_are_no_unicode(tmp_path, model, monkeypatch):
    """Bug: a lone surrogate in a text, or NaN in a number, ends the run or the file's reader."""
    describe = base.completions.CompletionLog.describe

    def hostile(self, experience):
        experience.completions[0] = "</script>\ud800\u202e\x00"
        experience.sampled_log_probs[0][0] = float("nan")
        return describe(self, experience)

    monkeypatch.setattr(base.completions.CompletionLog, "describe", hostile)
    run_with_spread(tmp_path, model, monkeypatch)
    completion = groups_of(tmp_path)[0]["completions"][0]
    assert completion["text"] == "</script>\ud800\u202e\x00"
    assert completion["sampled_log_probs"][0] is None


# ---------------------------------------------------------------- files
def content_of(folder: Path) -> str:
    files = base.completions.completion_files(folder / "runs" / "run")
    return "".join(path.read_text() for path in files)


@pytest.mark.parametrize("rotate_bytes", [2**30, 10_000, 1])
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(
    rotate_bytes, tmp_path, model, monkeypatch
):
    """Lines of steps that are done again are dropped, from rotated files too, and half a line."""
    monkeypatch.setattr(base.completions, "ROTATE_BYTES", rotate_bytes)
    run_with_spread(tmp_path / "a", model, monkeypatch, max_steps=5)
    sparse = dict(checkpoint_interval=2)
    run_with_spread(tmp_path / "b", model, monkeypatch, max_steps=3, **sparse)
    last = checkpoints(tmp_path / "b")[3]
    for path in [*last.iterdir()]:
        path.unlink()
    last.rmdir()
    with open(tmp_path / "b" / "runs" / "run" / "completions.jsonl", "a") as file:
        file.write('{"step": 4, "gro')
    run_with_spread(tmp_path / "b", model, monkeypatch, max_steps=5, resume=True, **sparse)
    assert content_of(tmp_path / "b") == content_of(tmp_path / "a")
    assert len(rows_of(tmp_path / "a")) == 5 * 2 + 4 * 2
    files = base.completions.completion_files(tmp_path / "a" / "runs" / "run")
    assert len(files) == (1 if rotate_bytes == 2**30 else 5 if rotate_bytes == 1 else len(files))


def test_files_are_read_in_order(tmp_path):
    for number in ("1", "10", "2", "x", "1.backup", "0"):
        (tmp_path / f"completions.{number}.jsonl").touch()
    (tmp_path / "completions.jsonl").touch()
    names = [path.name.split(".")[1] for path in base.completions.completion_files(tmp_path)]
    assert names == ["1", "2", "10", "jsonl"]


def test_files_of_others_stay(tmp_path):
    """Bug: a user's copy of the log counts as a part of it, and is cut and deleted."""
    names = ["completions.1.backup.jsonl", "completions.jsonl.tmp", "completions.old.jsonl"]
    for name in names:
        (tmp_path / name).write_text('{"step": 9}\n')
    (tmp_path / "completions.jsonl").write_text('{"step": 9}\n{"step": 1e999}\n' + "[" * 10**5)
    base.completions.cut_completions(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


EDITS = [
    {"completions": 3},
    {"completions": [{"ids": [10**6], "mask": [1]}]},
    {"completions": [{"ids": [-1], "mask": [1]}]},
    {"completions": [{"ids": [1.5], "mask": [1]}]},
    {"completions": [{"ids": None, "mask": [1]}]},
    {"completions": [{"ids": [1, 2], "mask": [1]}]},
    {"completions": [{"ids": [], "mask": []}]},
    {"prompt_ids": []},
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_a_log_that_somebody_has_edited_is_not_followed(edit, tmp_path, capsys):
    """Bug: an id outside the vocabulary ends the run in its next logged step, again and again."""
    row = {"step": 1, "group": 0, "prompt_ids": [1], "completions": [{"ids": [1], "mask": [1]}]}
    path = tmp_path / "completions.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert len(base.completions.first_groups(tmp_path, 400)) == 1
    path.write_text(json.dumps(row | edit) + "\n")
    assert base.completions.first_groups(tmp_path, 400) == []
    assert "its first groups are not followed" in capsys.readouterr().out


def test_a_run_whose_log_was_edited_goes_on(tmp_path, model, monkeypatch):
    run_with_spread(tmp_path, model, monkeypatch, max_steps=2)
    path = tmp_path / "runs" / "run" / "completions.jsonl"
    path.write_text(path.read_text().replace('"ids": [', '"ids": [1000000, '))
    run_with_spread(tmp_path, model, monkeypatch, max_steps=3, resume=True)
    assert [row["step"] for row in rows_of(tmp_path)][-2:] == [3, 3]


def test_a_file_that_cannot_be_written_is_said_once(tmp_path, model, monkeypatch, capsys):
    open_run = base.run.Run.open

    def and_block(self):
        open_run(self)
        (self.log_dir / "completions.jsonl").mkdir()

    monkeypatch.setattr(base.run.Run, "open", and_block)
    run_with_spread(tmp_path, model, monkeypatch, max_steps=3)
    assert capsys.readouterr().out.count("completions.jsonl cannot be written") == 1
    assert len(metrics(tmp_path)) == 4
