"""What surrounds training: refusals, data files, logs, checkpoints, resuming,
interrupts, full disks."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from helpers import ROOT, embedded_tokenizer, load_experiment, make_model
from peft import PeftModel

sys.path.insert(0, str(ROOT / "tools"))
from readings import reading_of  # noqa: E402

EXPERIMENTS = sorted(path.parent.name for path in ROOT.glob("experiment_*/run.py"))
# Where samplers are other processes, test_async.py has the tests of whole runs.
IN_ONE_PROCESS = [name for name in EXPERIMENTS if not (ROOT / name / "samplers.py").exists()]
WITH_TOOLS = [name for name in EXPERIMENTS if (ROOT / name / "calls.py").exists()]
# of TINY: the tools' descriptions are long
CHANGES = {name: dict(max_length=1200) for name in WITH_TOOLS}
TIMINGS = {"elapsed_seconds", "sample_tokens_per_second", "train_tokens_per_second", "peak_memory"}
TINY = dict(
    run_name="run",
    precision="float32",
    group_size=4,
    rollouts_per_step=4,
    train_batch_size=8,
    max_new_tokens=8,
    max_length=128,
    micro_batch_tokens=256,
    epochs=2,  # of 4 steps
    max_steps=2,
    eval_interval=2,
    checkpoint_interval=2,
    lr=1e-3,
)


# --------------------------------------------------------- what both files of run-level tests share
def save_model(folder: Path, architecture: str = "qwen2", **changes) -> str:
    """A directory with a tiny model that ends a completion at every seventh id,
    so that lengths differ."""
    model = make_model(architecture)
    model.generation_config.eos_token_id = [2, *range(7, 351, 7)]
    model.config.update(changes)
    model.save_pretrained(folder)
    embedded_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, first: int, count: int, **fields) -> Path:
    rows = [
        {
            "question": f"What is {i} + 1?",
            "answer": i + 1,
            "context": f"{i} + 1 is {i + 1}.",
            "prompt": f"What is {i} + 1?",  # and these for experiment_ifeval
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
            **fields,
        }
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_settings(folder: Path, model: str, **overrides) -> dict:
    """Settings of a run of 16 training and 8 held-out prompts that lies in `folder`."""
    data = folder / "tasks.jsonl"
    if not data.exists():
        write_rows(data, 0, 16)
        write_rows(folder / "tasks_eval.jsonl", 50, 8)
    places = dict(
        model_name=model,
        data_path=str(data),
        log_dir=str(folder / "runs"),
        checkpoint_path=str(folder / "o"),
    )
    return {**TINY, **places, **overrides}


def run_main(folder: Path, model: str, experiment: str = "experiment_base", **overrides) -> None:
    train = load_experiment(experiment).train
    train.main(
        train.Config(**tiny_settings(folder, model, **CHANGES.get(experiment, {}) | overrides))
    )


def metrics(folder: Path, run: str = "run") -> list[dict]:
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    lines = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def checkpoints(
    folder: Path, run: str = "run", experiment: str = "experiment_base"
) -> dict[int, Path]:
    return {
        int(path.name[5:]): path
        for path in sorted((folder / "o" / experiment / run).glob("step_0*"))
    }


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


def fingerprint(completion: str, answer: str, *_) -> float:
    """In place of the accuracy: differs between any two texts, so every group has spread, and equal
    means over the held-out prompts mean equal completions."""
    return zlib.crc32(completion.encode()) / 2**32


def reward_by(score, train, monkeypatch) -> None:
    """score(completion, right answer) in place of the accuracy, of F1 and of exact match, and of
    the share of instructions that is followed."""
    spaces = [vars(train)]
    if hasattr(train, "judge_group"):

        def judge(completion, *_):
            return train.Judgement([score(completion, "")], on_topic=True)

        monkeypatch.setattr(train, "judge", judge)
    if hasattr(train, "search_metrics"):  # of answers.py, which has these names too
        spaces.append(train.search_metrics.__globals__)
    for space in spaces:
        for name in ("accuracy_reward", "exact_match", "f1_score"):
            if name in space:
                monkeypatch.setitem(space, name, score)
        if "given_answer" in space:
            monkeypatch.setitem(space, "given_answer", lambda trajectory: trajectory.turns[-1])


def make_adapter(folder: Path, model: str) -> str:
    """The checkpoint of a LoRA run: an adapter directory whose B matrices are not zero."""
    with tidy() as patch:
        patch.setattr(load_experiment().train, "accuracy_reward", fingerprint)
        run_main(folder, model, lora_rank=4, lr=1e-2, max_steps=1)
    return str(checkpoints(folder)[1])


@contextmanager
def tidy(on_cpu: bool = True):
    """The CPU, without network, one thread (small matrices; the same sums in every process),
    and signals as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        if on_cpu:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield patch
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def base(monkeypatch):
    """The base experiment, with every completion rewarded differently."""
    experiment = load_experiment()
    monkeypatch.setattr(experiment.train, "accuracy_reward", fingerprint)
    return experiment


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, model):
    return make_adapter(tmp_path_factory.mktemp("adapter"), model)


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def refusal(folder: Path, model: str, monkeypatch, **overrides) -> str:
    """The one line that refuses these settings before a model is loaded and with nothing
    written."""

    def load_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load_experiment().train, "load_model", load_model)
    settings = tiny_settings(folder, model, **overrides)
    before = everything_in(folder)
    with pytest.raises(SystemExit) as exit:
        run_main(folder, model, **settings)
    assert everything_in(folder) == before
    message = exit.value.code
    assert message.startswith("error: ") and "\n" not in message and len(message) < 600, message
    return message


# ---------------------------------------------------------------- refusals
REFUSED = {
    "group of one": (dict(group_size=1), "--group-size 1"),
    "batch that cuts a group": (dict(train_batch_size=6), "--train-batch-size 6"),
    "batch that does not divide a step": (dict(train_batch_size=12), "--train-batch-size 12"),
    "batch larger than a step": (dict(train_batch_size=32), "--train-batch-size 32"),
    "batch of nothing": (dict(train_batch_size=0), "--train-batch-size 0"),
    "4-bit without LoRA": (dict(load_in_4bit=True), "--load-in-4bit: .* --lora-rank"),
    "temperature 0": (dict(temperature=0.0), "--temperature 0.0"),
    "no prompts in a step": (
        dict(rollouts_per_step=0, train_batch_size=8),
        "--rollouts-per-step 0",
    ),
    "more prompts a step than there are": (
        dict(rollouts_per_step=32),
        "16 of 16 prompts .*--rollouts-per-step is 32",
    ),
    "prompt beyond its budget": (
        dict(max_length=40),
        "tasks.jsonl, line 1: .* --max-length 40 - --max-new-tokens 8",
    ),
    "missing file": (
        dict(data_path="/nowhere/tasks.jsonl"),
        "/nowhere/tasks.jsonl: .*[Nn]o such file",
    ),
    "missing held-out file": (
        dict(eval_data_path="/nowhere/e.jsonl"),
        "/nowhere/e.jsonl: .*[Nn]o such file",
    ),
    "file of an unknown kind": (
        dict(data_path="/nowhere/tasks.csv"),
        r"tasks.csv: .*\.jsonl, \.json or \.parquet",
    ),
    "nothing to resume": (
        dict(resume=True),
        "--resume: no run under .*/run; start one without --resume",
    ),
    "nothing to resume at all": (dict(resume=True, run_name=None), "--resume: no run under"),
    "model that is no directory": (
        dict(model_name="/nowhere/model"),
        "--model-name /nowhere/model: .* directory",
    ),
    "model that is not on disk": (
        dict(model_name="no-such/model"),
        "--model-name no-such/model: .* directory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_settings(name, tmp_path, model, monkeypatch):
    """Bug: minutes of loading or a traceback of thirty lines before the user learns of a wrong
    flag; a group of one trains on NaN."""
    overrides, pattern = REFUSED[name]
    assert re.search(pattern, refusal(tmp_path, model, monkeypatch, **overrides))


ROW = '{"question": "What is 1 + 1?", "answer": 2}\n'
BAD_FILES = {
    "malformed line": (ROW * 16 + '{"question": \n', ("tasks.jsonl, line 17", "cannot be read")),
    "no object": (ROW * 16 + "3\n", ("tasks.jsonl, line 17", "object")),
    "missing field": (
        ROW * 16 + '{"question": "?"}\n',
        ("tasks.jsonl, line 17", "'answer'", "--answer-field"),
    ),
    "null field": (
        ROW * 16 + '{"question": null, "answer": 1}\n',
        ("tasks.jsonl, line 17", "'question'"),
    ),
    "empty field": (
        ROW * 16 + '{"question": " ", "answer": 1}\n',
        ("tasks.jsonl, line 17", "'question'"),
    ),
    "no number": (
        ROW * 16 + '{"question": "?", "answer": "ten"}\n',
        ("tasks.jsonl, line 17", "'answer'", "'ten'"),
    ),
    "blank lines count": ("\n" + ROW * 16 + "\n{}\n", ("tasks.jsonl, line 19",)),
    "no rows": ("", ("tasks.jsonl", "0 of 0 prompts", "--rollouts-per-step")),
    "nothing selected": (
        ROW.replace("}", ', "num_terms": 9}') * 16,
        ("tasks.jsonl", "0 of 16 prompts selected (16 left out by --max-terms 3)"),
    ),
    "not UTF-8": (
        ROW.encode() * 16 + b'{"question": "\xff\xfe"}\n',
        ("tasks.jsonl", "cannot be read"),
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_refuses_data(name, tmp_path, model, monkeypatch):
    """Bug: a row without an answer trains on reward 0,
    or fails in step 700 when the row's turn comes."""
    text, parts = BAD_FILES[name]
    tiny_settings(tmp_path, model)
    (tmp_path / "tasks.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(tmp_path, model, monkeypatch)
    assert all(part in message for part in parts), message


def test_refuses_an_empty_held_out_file(tmp_path, model, monkeypatch):
    """Bug: a division by zero, or a text that blames the training prompts."""
    tiny_settings(tmp_path, model)
    (tmp_path / "tasks_eval.jsonl").write_text("")
    message = refusal(tmp_path, model, monkeypatch)
    assert "0 of 0 held out; --eval-data-path names held-out rows" in message, message


def test_refuses_a_tokenizer_without_chat_template(tmp_path, model, monkeypatch):
    """Bug: a base model trains on prompts in a form that it has never seen,
    or fails with jinja's traceback."""
    folder = shutil.copytree(model, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    assert "chat template" in refusal(tmp_path, str(folder), monkeypatch)


def test_gated_model_says_what_to_do(tmp_path, model, monkeypatch):
    """Bug: Llama's licence page hidden in a traceback of five libraries."""

    def from_pretrained(name, *_, **__):
        raise OSError(
            "You are trying to access a gated repo.\n"
            f"Make sure to have access to it at {name}.\n401 Client"
        )

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    message = refusal(tmp_path, "meta-llama/Llama-3.2-1B-Instruct", monkeypatch)
    assert all(
        part in message
        for part in ("meta-llama/Llama-3.2-1B-Instruct", "gated", "licence", "hf auth login")
    )


def test_damaged_weights_say_which_model(tmp_path, model):
    """Bug: the safetensors traceback of a half downloaded file names neither the model nor the
    flag."""
    folder = shutil.copytree(model, tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(SystemExit, match=f"^error: --model-name {folder}: cannot be loaded"):
        run_main(tmp_path, str(folder))


def test_unknown_flag_is_named(monkeypatch, capsys):
    """Bug: a misspelt flag is ignored and the run trains with the default."""
    import tyro

    monkeypatch.setitem(sys.modules, "train", load_experiment().train)  # tyro reads its source
    with pytest.raises(SystemExit):
        tyro.cli(load_experiment().train.Config, args=["--learning-rte", "1"])
    assert "--learning-rte" in "".join(capsys.readouterr())


def test_run_that_exists_is_kept(tmp_path, model, monkeypatch):
    """Bug: a second start with the same name appends to the first one's log and prunes its
    checkpoints."""
    run_main(tmp_path, model, max_steps=1)
    message = refusal(tmp_path, model, monkeypatch)
    assert "run exists" in message and "--resume" in message and "--run-name" in message


def test_unwritable_log_dir(tmp_path, model, monkeypatch):
    """Bug: found out after the model has been loaded and evaluated."""
    (tmp_path / "file").write_text("")
    assert "--log-dir" in refusal(tmp_path, model, monkeypatch, log_dir=str(tmp_path / "file"))


def test_unwritable_checkpoint_path(tmp_path, model, capsys):
    """It costs the checkpoints, not the run.
    Bug: one learns of it after the first interval only."""
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: the last policy is not saved"):
        run_main(tmp_path, model, checkpoint_path=str(tmp_path / "file"))
    output = capsys.readouterr().out
    assert (
        "warning: --checkpoint-path" in output.split("held out:")[0]
        and "training goes on" in output
    )
    assert len(metrics(tmp_path)) == 3


def test_resume_with_another_model(tmp_path, model, monkeypatch):
    """Bug: one model's optimizer moments on the weights of another,
    and a KL to the wrong reference."""
    other = str(shutil.copytree(model, tmp_path / "other"))
    run_main(tmp_path, model, max_steps=1)
    message = refusal(tmp_path, other, monkeypatch, resume=True)
    assert model in message and other in message and "--model-name" in message


@pytest.mark.parametrize(
    "change", [dict(lora_rank=4), dict(train_batch_size=16), dict(seed=1), dict(group_size=8)]
)
def test_resume_with_what_a_run_cannot_change(change, tmp_path, model, monkeypatch):
    """Bug: the prompt order or the weights' shapes silently differ from those of the run that is
    continued."""
    run_main(tmp_path, model, max_steps=1)
    name = next(iter(change))
    assert f"--{name.replace('_', '-')}" in refusal(
        tmp_path, model, monkeypatch, resume=True, **change
    )


@pytest.mark.parametrize(
    "what", ["max_prompts", "system_prompt", "a row", "an answer", "the order"]
)
def test_resume_with_other_prompts(what, tmp_path, model, monkeypatch):
    """Bug: the order of prompts goes on in other prompts, without a word."""
    run_main(tmp_path, model, max_steps=1)
    changes = {"max_prompts": dict(max_prompts=12), "system_prompt": dict(system_prompt="Think.")}
    path = tmp_path / "tasks.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if what == "a row":
        path.write_text("".join(lines).replace("What is 3", "What is 33"))
    if what == "an answer":
        path.write_text("".join(lines).replace('"answer": 3', '"answer": 33'))
    if what == "the order":
        path.write_text("".join(reversed(lines)))
    message = refusal(tmp_path, model, monkeypatch, resume=True, **changes.get(what, {}))
    assert "--resume: run run had other training prompts" in message


def test_a_data_file_that_was_moved_is_the_same(tmp_path, model, capsys):
    run_main(tmp_path, model, max_steps=1)
    (tmp_path / "moved").mkdir()
    for name in ("tasks.jsonl", "tasks_eval.jsonl"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    run_main(tmp_path, model, resume=True, data_path=str(tmp_path / "moved" / "tasks.jsonl"))
    assert "data_path is now" in capsys.readouterr().out and list(checkpoints(tmp_path)) == [1, 2]


# ---------------------------------------------------------------- data files
def questions(prompts, tokenizer) -> list[str]:
    return [
        tokenizer.decode(prompt.ids).split("user\n")[1].split("<|im_end|>")[0] for prompt in prompts
    ]


def read(folder: Path, model: str, data_path, **overrides):
    """(training questions, held-out questions, answers of both)."""
    base, tokenizer = load_experiment(), embedded_tokenizer()
    config = base.train.Config(
        **tiny_settings(folder, model, data_path=str(data_path), **overrides)
    )
    prompts, held_out = base.train.read_prompts(config, tokenizer)
    return (
        questions(prompts, tokenizer),
        questions(held_out, tokenizer),
        [p.answer for p in prompts + held_out],
    )


def write_as(suffix: str, path: Path, rows: list[dict]) -> Path:
    path = path.with_suffix(suffix)
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_file_with_its_held_out_file(suffix, tmp_path, model):
    """Each format, the fields that flags name,
    and <name>_eval.<suffix> of the same format beside it."""
    rows = [
        {"q": f"What is {i} + 1?", "a": f"{i} + 1 is a sum.\n#### {i + 1:,}"}
        for i in range(1000, 1020)
    ]
    path = write_as(suffix, tmp_path / "sums", rows[:16])
    write_as(suffix, tmp_path / "sums_eval", rows[16:])
    train, held_out, answers = read(tmp_path, model, path, question_field="q", answer_field="a")
    assert train == [row["q"] for row in rows[:16]] and held_out == [row["q"] for row in rows[16:]]
    assert answers[0] == "1,001" and load_experiment().train.parse_number(answers[0]) == 1001


@pytest.mark.parametrize("has_test_split", [True, False])
def test_hub_data_set_with_configuration(has_test_split, tmp_path, model, monkeypatch):
    """`name:config`, held out its test split where there is one.
    Bug: the default configuration is read instead."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    hub.mkdir()
    write_rows(hub / "train.jsonl", 0, 20)
    write_rows(hub / "test.jsonl", 50, 3)
    write_rows(hub / "other.jsonl", 90, 9)
    test = "\n  - split: test\n    path: test.jsonl" if has_test_split else ""
    main = f"- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl{test}\n"
    other = (
        "- config_name: other\n  default: true\n"
        "  data_files:\n  - split: train\n    path: other.jsonl\n"
    )
    (hub / "README.md").write_text(f"---\nconfigs:\n{other}{main}---\n")
    train, held_out, _ = read(tmp_path, model, f"{hub}:main")
    assert train == [f"What is {i} + 1?" for i in range(20 if has_test_split else 18)]
    assert held_out == [f"What is {i} + 1?" for i in ((50, 51, 52) if has_test_split else (18, 19))]


def test_rows_are_held_out_where_there_are_no_others(tmp_path, model):
    """The last tenth, and none of it is trained on.
    Bug: the held-out accuracy measures what was learnt by heart."""
    train, held_out, _ = read(tmp_path, model, write_rows(tmp_path / "alone.jsonl", 0, 40))
    assert train == [f"What is {i} + 1?" for i in range(36)]
    assert held_out == [f"What is {i} + 1?" for i in range(36, 40)]


def test_at_most_512_rows_are_held_out(tmp_path):
    path = write_rows(tmp_path / "long.jsonl", 0, 6000)
    rows, held_out = load_experiment().data.read_train_and_eval_rows(str(path), None)
    assert (len(rows), len(held_out)) == (6000 - 512, 512)
    assert not {where for where, _ in rows} & {where for where, _ in held_out}


def test_eval_data_path_comes_first(tmp_path, model):
    write_rows(tmp_path / "sums_eval.jsonl", 50, 4)
    other = write_rows(tmp_path / "other.jsonl", 70, 3)
    path = write_rows(tmp_path / "sums.jsonl", 0, 16)
    assert len(read(tmp_path, model, path)[1]) == 4
    train, held_out, _ = read(tmp_path, model, path, eval_data_path=str(other))
    assert len(train) == 16 and held_out == [
        "What is 70 + 1?",
        "What is 71 + 1?",
        "What is 72 + 1?",
    ]


# ---------------------------------------------------------------- logs
FIELDS = """step elapsed_seconds reward reward_accuracy reward_format reward_std zero_std_fraction
kl loss grad_norm grad_clip_fraction clip_fraction ess entropy completion_length
completion_length_correct completion_length_wrong truncated_fraction lr sample_tokens_per_second
train_tokens_per_second peak_memory max_log_prob_gap skipped_updates""".split()


@pytest.mark.parametrize("experiment", IN_ONE_PROCESS)
def test_metrics_of_a_run(experiment, tmp_path, model, monkeypatch, capsys):
    """A line a step with every field, and the evaluation before the first step,
    at the interval and after the last."""
    train = load_experiment(experiment).train
    reward_by(lambda *pair: float(fingerprint(*pair) > 0.5), train, monkeypatch)
    run_main(tmp_path, model, experiment, max_steps=3, log_completions_interval=2)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [step for step, line in enumerate(lines) if "eval_accuracy" in line] == [0, 2, 3]
    has_instructions = hasattr(train, "judge_group")
    evaluated = {"eval_accuracy", "eval_count"}
    evaluated.add("eval_prompt_loose" if has_instructions else "eval_accuracy_lenient")
    assert all(evaluated <= set(lines[i]) for i in (0, 2, 3))
    assert lines[0]["eval_count"] == 8
    for line in lines[1:]:
        fields = {
            "reward_f1" if name == "reward_accuracy" and "reward_f1" in line else name
            for name in FIELDS
        }
        if "reward_learned" in line:  # no rule is rewarded, but accuracy is measured
            fields = fields - {"reward_accuracy", "reward_format"} | {"accuracy_mean", "score"}
        if has_instructions:
            fields = fields - {"reward_accuracy", "reward_format"} | {"reward_instructions"}
        missing = fields - set(line)
        numbers = fields - ({"kl"} if train.Config().kl_weight == 0 else set())
        assert not missing and all(isinstance(line[name], (int, float)) for name in numbers), (
            missing,
            line,
        )
        parts = [line[name] for name in line if name.startswith("reward_") and name != "reward_std"]
        assert math.isclose(line["reward"], sum(parts), abs_tol=1e-5)
        assert (
            line["max_log_prob_gap"] < 1e-4
            and line["grad_norm"] > 0
            and line["skipped_updates"] == 0
        )
    output = capsys.readouterr().out
    # whole trajectories, at steps 1 and 2
    assert output.count("<|im_start|>system") == 2 and "<|im_start|>assistant" in output
    assert 2 <= output.count("advantage ") <= 4  # of the best, and of the worst where they differ
    names = {name for line in lines for name in line} - {"step"}
    assert [name for name in names if not reading_of(name)] == []  # tools/view.py explains each
    gain = f"eval_accuracy {lines[0]['eval_accuracy']:.4f} -> {lines[3]['eval_accuracy']:.4f}"
    checkpoint = checkpoints(tmp_path, experiment=experiment)[3]
    assert gain in output and str(tmp_path / "runs" / "run") in output and str(checkpoint) in output


def test_run_without_a_name_is_called_after_experiment_and_time(tmp_path, model):
    run_main(tmp_path, model, max_steps=1, run_name=None)
    (log,) = (tmp_path / "runs").iterdir()
    (saved,) = (tmp_path / "o" / "experiment_base").iterdir()
    assert log.name == saved.name and log.name.startswith("experiment_base_2")


# ---------------------------------------------------------------- checkpoints
KINDS = ["full", "lora", "from adapter"]


def settings_of(kind: str, model: str, adapter: str) -> dict:
    """Overrides for training in full, fresh LoRA, and from an adapter directory;
    lr large enough to see."""
    return {
        "full": dict(model=model, lr=1e-3),
        "lora": dict(model=model, lora_rank=4, lr=1e-2),
        "from adapter": dict(model=adapter, lr=1e-2),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_is_a_plain_directory(kind, tmp_path, model, adapter, base):
    """Hugging Face loads it, torch.load needs no pickle, and --max-steps 0 on it, or with --resume,
    repeats the last logged figures exactly and writes nothing."""
    settings = settings_of(kind, model, adapter)
    run_main(tmp_path, **settings)
    logged, before = metrics(tmp_path), everything_in(tmp_path)
    checkpoint = checkpoints(tmp_path)[2]
    # else the figures below would say nothing
    assert logged[2]["eval_accuracy"] != logged[0]["eval_accuracy"]

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model if kind != "full" else checkpoint
    )
    if kind != "full":
        loaded = PeftModel.from_pretrained(loaded, checkpoint)
    weights = {name.replace(".default", ""): value for name, value in loaded.state_dict().items()}
    saved = read_weights(checkpoint)
    assert saved and all(torch.equal(weights[name], value) for name, value in saved.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.chat_template == embedded_tokenizer().chat_template
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    assert state["step"] == 2 and state["config"]["model_name"] == settings["model"]

    figures = []
    evaluate = base.train.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            base.train, "evaluate", lambda *args: figures.append(evaluate(*args)) or figures[-1]
        )
        run_main(tmp_path, **settings, resume=True, max_steps=0)
        run_main(tmp_path, str(checkpoint), max_steps=0)
    expected = {
        name: logged[2][name] for name in ("eval_accuracy", "eval_accuracy_lenient", "eval_count")
    }
    assert figures == [expected, expected]
    assert everything_in(tmp_path) == before


def test_newest_two_are_kept_and_nothing_else_is_touched(tmp_path, model):
    """Bug: pruning by a pattern that also matches a neighbour run, or the user's own files."""
    neighbour = tmp_path / "o" / "experiment_base" / "run2" / "step_000001"
    for path in (neighbour, tmp_path / "o" / "experiment_other" / "run" / "step_000001"):
        path.mkdir(parents=True)
        (path / "trainer.pt").write_text("")
    run_main(tmp_path, model, max_steps=4, checkpoint_interval=1, eval_interval=9)
    assert list(checkpoints(tmp_path)) == [3, 4]
    assert (neighbour / "trainer.pt").exists() and len(
        list((tmp_path / "o").rglob("step_000001"))
    ) == 2


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["torch.save", "save_pretrained", "os.replace"])
def test_failed_save_costs_one_checkpoint(what, tmp_path, model, monkeypatch, capsys):
    """Bug: a full disk ends a run of days, or leaves half a checkpoint as the newest one."""
    base, patch = load_experiment(), pytest.MonkeyPatch()
    save = base.run.Run.save

    def fail_at_step_2(self, step, *args):
        target = {"torch.save": (torch, "save"), "os.replace": (os, "replace")}.get(
            what, (args[0], what)
        )
        if step == 2:
            patch.setattr(*target, full_disk)
        save(self, step, *args)
        patch.undo()

    monkeypatch.setattr(base.run.Run, "save", fail_at_step_2)
    run_main(tmp_path, model, max_steps=3, checkpoint_interval=1)
    output = capsys.readouterr().out
    assert output.count("warning:") == 1 and "step_000002" in output and "No space left" in output
    assert list(checkpoints(tmp_path)) == [1, 3] and [
        line["step"] for line in metrics(tmp_path)
    ] == [0, 1, 2, 3]
    assert {p.name for p in (tmp_path / "o" / "experiment_base" / "run").iterdir()} == {
        "lock",
        "run.json",
        "step_000001",
        "step_000003",
    }
    run_main(tmp_path, model, max_steps=4, resume=True)  # a checkpoint that was kept is whole


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 700 KB; a checkpoint of the tiny model takes about 450."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(disk)]
    if (
        sys.platform != "linux"
        or os.geteuid()
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("needs root and tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_really_full_disk(tmp_path, model, small_disk, capsys):
    """The libraries' own errors: safetensors and torch do not report a full disk as OSError."""
    with pytest.raises(SystemExit, match="error: the last policy is not saved"):
        run_main(
            tmp_path, model, max_steps=3, checkpoint_interval=1, checkpoint_path=str(small_disk)
        )
    assert capsys.readouterr().out.count("cannot be written") == 2  # steps 2 and 3
    run = small_disk / "experiment_base" / "run"
    assert sorted(path.name for path in run.iterdir()) == ["lock", "run.json", "step_000001"]
    run_main(tmp_path, str(run / "step_000001"), max_steps=0)


def test_full_disk_under_the_logs(tmp_path, model, small_disk, capsys):
    """Bug: the TensorBoard writer's thread raises at the end,
    before the checkpoint's place is printed."""
    base, log = load_experiment(), load_experiment().run.Run.log

    def fill_then_log(self, step, *args):
        if step == 1:
            filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
            with pytest.raises(OSError):
                while True:
                    os.write(filler, bytes(512))
            os.close(filler)
        log(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base.run.Run, "log", fill_then_log)
        run_main(tmp_path, model, max_steps=3, log_dir=str(small_disk / "runs"))
    output = capsys.readouterr().out
    assert "warning: " in output and f"checkpoint: {checkpoints(tmp_path)[3]}" in output


# ---------------------------------------------------------------- resuming
class Killed(Exception):
    pass


def die_in_step(step: int, patch, experiment: str = "experiment_base") -> None:
    """End the run while step `step` is sampled."""
    train = load_experiment(experiment).train
    make_generator = train.make_generator

    def die(device, *key):
        if key[1:] == ("sample", step):
            raise Killed
        return make_generator(device, *key)

    patch.setattr(train, "make_generator", die)


def flat(tree: dict, path: tuple = ()) -> dict:
    """The leaves of a tree of dictionaries by their paths."""
    return {
        key: leaf
        for name, value in tree.items()
        for key, leaf in (
            flat(value, (*path, name)) if isinstance(value, dict) else {(*path, name): value}
        ).items()
        if leaf is not None and not isinstance(leaf, str)
    }


def assert_same_run(one: Path, other: Path, step: int, experiment: str = "experiment_base") -> None:
    """Bit for bit: the weights, the optimizer and everything logged but times."""
    first, second = (checkpoints(folder, experiment=experiment)[step] for folder in (one, other))
    weights = read_weights(second)
    assert weights and all(
        torch.equal(value, weights[name]) for name, value in read_weights(first).items()
    )
    states = [
        torch.load(path / "trainer.pt", weights_only=True)["optimizer"]["state"]
        for path in (first, second)
    ]
    states = [flat(state) for state in states]
    assert states[0] and states[0].keys() == states[1].keys()
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][k]))
        for k, value in states[0].items()
    )
    lines = [
        [{k: v for k, v in line.items() if k not in TIMINGS} for line in metrics(f)]
        for f in (one, other)
    ]
    assert lines[0] == lines[1]


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, model, adapter):
    """The folder of a run of 6 steps (an epoch has 4) of each kind."""
    folders = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("uninterrupted")
            run_main(folders[kind], **settings_of(kind, model, adapter), max_steps=6)
        return folders[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_equals_the_uninterrupted_one(
    kind, tmp_path, model, adapter, base, uninterrupted, capsys
):
    """Bug: resuming loses the optimizer's moments, the prompts' order, the random numbers or the
    reference. The run dies in step 4, goes on after step 2 and crosses the end of the epoch."""
    settings, whole = settings_of(kind, model, adapter), uninterrupted(kind)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_in_step(4, patch)
        run_main(tmp_path, **settings, max_steps=6)
    with open(tmp_path / "runs" / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # what a kill leaves
    capsys.readouterr()
    run_main(tmp_path, **settings, max_steps=6, resume=True)
    assert_same_run(whole, tmp_path, 6)
    logged = metrics(tmp_path)
    assert all(line["kl"] > 0 for line in logged[1:])
    assert all(
        later["elapsed_seconds"] > line["elapsed_seconds"]
        for line, later in zip(logged[1:], logged[2:])
    )
    gain = f"eval_accuracy {logged[0]['eval_accuracy']:.4f} -> {logged[6]['eval_accuracy']:.4f}"
    # from before the first step, not from before the resumed one
    assert gain in capsys.readouterr().out


def assert_resumes(folder: Path, model: str, experiment: str, max_steps: int, **settings) -> Path:
    """A run that dies in step 4 and is resumed equals the uninterrupted one,
    whose folder is returned."""
    whole, parts = folder / "whole", folder / "parts"
    whole.mkdir()
    parts.mkdir()
    run_main(whole, model, experiment, max_steps=max_steps, **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_in_step(4, patch, experiment)
        run_main(parts, model, experiment, max_steps=max_steps, **settings)
    run_main(parts, model, experiment, max_steps=max_steps, resume=True, **settings)
    assert_same_run(whole, parts, max_steps, experiment)
    return whole


@pytest.mark.parametrize("experiment", IN_ONE_PROCESS)
def test_every_experiment_resumes(experiment, tmp_path, model, monkeypatch):
    """As above, in full training, for the parts of a resume that are in each train.py."""
    reward_by(fingerprint, load_experiment(experiment).train, monkeypatch)
    assert_resumes(tmp_path, model, experiment, max_steps=4)


KILLED_IN_SAVE = """
import json, os, signal, sys, zlib
sys.path.insert(0, sys.argv[1])
import torch, train
torch.set_num_threads(1)
train.accuracy_reward = lambda completion, *_: zlib.crc32(completion.encode()) / 2**32
save, saves = torch.save, []

def kill_in_the_second(state, path):
    saves.append(path)
    save(state, path)
    if len(saves) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = kill_in_the_second
train.main(train.Config(**json.loads(sys.argv[2])))
"""


def test_kill_in_the_middle_of_a_save(tmp_path, model, base, uninterrupted):
    """kill -9 while step 4's checkpoint is written: step 2's is the newest, and resuming equals
    never having been killed. Bug: half a checkpoint under its final name."""
    settings = tiny_settings(tmp_path, **settings_of("full", model, ""), max_steps=6)
    command = [
        sys.executable,
        "-c",
        KILLED_IN_SAVE,
        str(ROOT / "experiment_base"),
        json.dumps(settings),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert list(checkpoints(tmp_path)) == [2] and [line["step"] for line in metrics(tmp_path)] == [
        0,
        1,
        2,
        3,
        4,
    ]
    run_main(tmp_path, **settings_of("full", model, ""), max_steps=6, resume=True)
    assert_same_run(uninterrupted("full"), tmp_path, 6)
    assert {p.name for p in (tmp_path / "o" / "experiment_base" / "run").iterdir()} == {
        "lock",
        "run.json",
        "step_000004",
        "step_000006",
    }


def test_learning_rate_may_change_on_resume(tmp_path, model, base, capsys):
    """It is printed, logged, and used: the optimizer's state in the checkpoint holds the old
    one."""
    run_main(tmp_path, model)
    before = read_weights(checkpoints(tmp_path)[2])
    run_main(tmp_path, model, resume=True, max_steps=3, lr=0.0)
    assert (
        "lr is now 0.0, was 0.001" in capsys.readouterr().out and metrics(tmp_path)[3]["lr"] == 0.0
    )
    assert all(
        torch.equal(value, before[name])
        for name, value in read_weights(checkpoints(tmp_path)[3]).items()
    )


def test_resume_takes_the_named_run_else_the_newest(tmp_path, model, capsys):
    for name in ("older", "newer"):
        run_main(tmp_path, model, max_steps=1, run_name=name)
    capsys.readouterr()
    run_main(tmp_path, model, resume=True, run_name=None)
    assert "resuming run newer from" in capsys.readouterr().out
    assert len(metrics(tmp_path, "newer")) == 3 and len(metrics(tmp_path, "older")) == 2
    run_main(tmp_path, model, resume=True, run_name="older", max_steps=3)
    assert (
        "resuming run older from" in capsys.readouterr().out
        and len(metrics(tmp_path, "older")) == 4
    )


def test_resume_ignores_what_is_no_checkpoint(tmp_path, model):
    """Bug: a directory without optimizer state, or one called step_old,
    taken for the newest checkpoint."""
    run_main(tmp_path, model, max_steps=1)
    run = tmp_path / "o" / "experiment_base" / "run"
    for name in ("step_000009", "step_old", "writing"):
        shutil.copytree(checkpoints(tmp_path)[1], run / name)
    (run / "step_000009" / "trainer.pt").unlink()
    run_main(tmp_path, model, resume=True)
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2]


def test_tensorboard_is_cut_back_on_resume(tmp_path, model):
    """Bug: after a resume each figure has two curves over the repeated steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_in_step(4, patch)
        run_main(tmp_path, model, max_steps=4)
    time.sleep(1)  # TensorBoard reads its files by name: by second, then by a count whose 10 is < 9
    run_main(tmp_path, model, max_steps=4, resume=True)
    events = EventAccumulator(str(tmp_path / "runs" / "run")).Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval_accuracy")] == [0, 2, 4]


# Sizes and a model at which weights in the file's own mapping made a resumed run differ.
AS_SHIPPED = dict(
    rollouts_per_step=4,
    group_size=4,
    train_batch_size=8,
    eval_interval=4,
    checkpoint_interval=3,
    max_steps=12,
    max_eval_prompts=16,
    seed=1,
    run_name="run",
)


RESUMED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train
for settings in json.loads(sys.argv[2]):
    train.main(train.Config(**settings))
"""


def test_a_resumed_run_of_the_shipped_policy_is_the_same_bit_for_bit(tmp_path):
    """Bug: the shipped weights are bfloat16, so loading them makes float32 ones at addresses that
    an allocator chose. Those of a float32 checkpoint stayed in the mapped file, at addresses that
    are no multiples of 64. There matrix products round otherwise: on AMD's processors, and on
    Intel's with the instructions that the environment asks for here."""
    settings = []
    for folder, last, resume in (("whole", 12, False), ("parts", 7, False), ("parts", 12, True)):
        places = dict(log_dir=str(tmp_path / folder / "runs"))
        places["checkpoint_path"] = str(tmp_path / folder / "o")
        settings.append(AS_SHIPPED | places | dict(max_steps=last, resume=resume))
    command = [sys.executable, "-c", RESUMED, str(ROOT / "experiment_base"), json.dumps(settings)]
    environment = os.environ | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "2"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    first, second = (checkpoints(tmp_path / folder)[12] for folder in ("whole", "parts"))
    weights = read_weights(second)
    differing = [
        k for k, value in read_weights(first).items() if not torch.equal(value, weights[k])
    ]
    assert weights and not differing


def test_weights_that_are_loaded_have_memory_of_their_own(tmp_path, model):
    """At addresses that allocators choose, wherever the weights lie in their file."""
    from safetensors.torch import save_file

    experiment = load_experiment()
    weights = read_weights(Path(model))
    folder = shutil.copytree(model, tmp_path / "shifted")
    for length in range(0, 64, 8):  # of a header's text, which the weights follow
        metadata = {"format": "pt", "text": "x" * length}
        save_file(weights, folder / "model.safetensors", metadata=metadata)
        config = experiment.train.Config(**tiny_settings(tmp_path, str(folder)))
        for loaded in experiment.model.load_model(config, torch.device("cpu")):
            assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())


def die_in_the_first_evaluation(patch) -> None:
    def die(*_):
        raise Killed

    patch.setattr(load_experiment().train, "evaluate", die)


@pytest.mark.parametrize("when", ["step 1", "step 2", "the first evaluation"])
def test_a_run_is_resumable_from_its_start(when, tmp_path, model, base, uninterrupted, capsys):
    """Bug: killed before its first checkpoint, a run cannot be resumed, and cannot be started
    either, since it exists."""
    settings = settings_of("full", model, "")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if when.startswith("step"):
            die_in_step(int(when[5:]), patch)
        else:
            die_in_the_first_evaluation(patch)
        run_main(tmp_path, **settings, max_steps=6)
    assert not checkpoints(tmp_path)
    with pytest.raises(SystemExit, match="run run exists .*: continue it with --resume, or"):
        run_main(tmp_path, **settings, max_steps=6)
    capsys.readouterr()
    run_main(tmp_path, **settings, max_steps=6, resume=True)
    assert "from its beginning: it was stopped before its first" in capsys.readouterr().out
    assert_same_run(uninterrupted("full"), tmp_path, 6)


def test_logs_without_a_run_are_not_said_to_be_resumable(tmp_path, model, monkeypatch):
    """Bug: --resume says to start without it, and without it the log's name exists."""
    (tmp_path / "runs" / "run").mkdir(parents=True)
    message = refusal(tmp_path, model, monkeypatch)
    assert "runs/run" in message and "--run-name" in message and "--resume" not in message


def test_resume_never_takes_an_older_run_for_the_last_one(tmp_path, model, capsys):
    """Bug: the newest run *with a checkpoint* is trained on, at another learning rate, though the
    last one was started later, and its checkpoints are deleted."""
    run_main(tmp_path, model, run_name="finished", max_steps=4, checkpoint_interval=1)
    before = everything_in(tmp_path / "o" / "experiment_base" / "finished")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_in_step(1, patch)
        run_main(tmp_path, model, run_name="killed", max_steps=4, lr=0.5)
    capsys.readouterr()
    run_main(tmp_path, model, run_name=None, max_steps=2, lr=0.5, resume=True)
    output = capsys.readouterr().out
    assert "resuming run killed from its beginning: it was stopped before its first" in output
    assert "; --run-name resumes another one" in output
    assert everything_in(tmp_path / "o" / "experiment_base" / "finished") == before
    assert list(checkpoints(tmp_path, "killed")) == [2]


def test_a_resumed_run_counts_as_started(tmp_path, model, capsys):
    """One goes on with what one worked on last, also where its checkpoint is older."""
    for name in ("older", "newer"):
        run_main(tmp_path, model, run_name=name, max_steps=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_in_step(2, patch)
        run_main(tmp_path, model, run_name="older", resume=True)
    capsys.readouterr()
    run_main(tmp_path, model, run_name=None, resume=True)
    assert "resuming run older from" in capsys.readouterr().out


def test_the_last_checkpoint_of_another_training_is_kept(tmp_path, model, capsys):
    """Bug: a run is resumed by mistake with a ruinous learning rate, and two intervals later what
    it had come to is deleted."""
    run_main(tmp_path, model, max_steps=2, checkpoint_interval=1)
    before = read_weights(checkpoints(tmp_path)[2])
    capsys.readouterr()
    changes = dict(lr=0.5, kl_weight=0.0, clip_eps_low=0.3)
    run_main(tmp_path, model, max_steps=6, checkpoint_interval=1, resume=True, **changes)
    output = capsys.readouterr().out
    for line in (
        "lr is now 0.5, was 0.001",
        "kl_weight is now 0.0, was 0.01",
        "clip_eps_low is now 0.3, was 0.2",
        "max_steps is now 6, was 2",
    ):
        assert f"\n  {line}\n" in output
    assert list(checkpoints(tmp_path)) == [2, 5, 6]
    kept = read_weights(checkpoints(tmp_path)[2])
    assert all(torch.equal(value, kept[name]) for name, value in before.items())
    # A second stretch with the same settings keeps nothing more.
    run_main(tmp_path, model, max_steps=6, checkpoint_interval=1, resume=True, **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_in_step(8, patch)
        run_main(tmp_path, model, max_steps=8, checkpoint_interval=1, resume=True, **changes)
    run_main(tmp_path, model, max_steps=8, checkpoint_interval=1, resume=True, **changes)
    assert list(checkpoints(tmp_path)) == [2, 6, 7, 8]


def test_what_does_not_change_training_keeps_no_checkpoint(tmp_path, model):
    """Bug: a run on a machine that is stopped every hour fills the disk."""
    for last in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            die_in_step(last + 1, patch)
            settings = dict(max_steps=9, epochs=3, checkpoint_interval=1, eval_interval=last)
            run_main(tmp_path, model, resume=last > 1, **settings)
    assert list(checkpoints(tmp_path)) == [2, 3]


def test_a_finished_run_says_that_nothing_is_left(tmp_path, model, capsys):
    run_main(tmp_path, model)
    before = read_weights(checkpoints(tmp_path)[2])
    capsys.readouterr()
    run_main(tmp_path, model, resume=True)
    output = capsys.readouterr().out
    assert "nothing is left: 2 of 2 steps are done; a higher --max-steps or --epochs" in output
    after = read_weights(checkpoints(tmp_path)[2])
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert len(metrics(tmp_path)) == 3


def test_lines_that_a_full_disk_cut_in_two_are_dropped(tmp_path, model):
    """Bug: half a line, the next one behind it, and --resume ends in a JSONDecodeError."""
    run_main(tmp_path, model)
    path = tmp_path / "runs" / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    damaged = [lines[0], lines[1][:20] + lines[1], "3\n", "{}\n", '{"step": "x"}\n', *lines[2:]]
    path.write_text("".join(damaged) + '{"step": 2, "rew')
    run_main(tmp_path, model, resume=True, max_steps=3)
    assert [line["step"] for line in metrics(tmp_path)] == [0, 2, 3]


def test_what_is_left_of_a_checkpoint_is_in_nobodys_way(tmp_path, model, capsys):
    """Bug: a directory without trainer.pt keeps the new checkpoint of its step from being saved; a
    deletion that is killed leaves weights without trainer.pt, or the reverse."""
    run_main(tmp_path, model, max_steps=2, checkpoint_interval=1)
    run = tmp_path / "o" / "experiment_base" / "run"
    (run / "step_000002" / "trainer.pt").unlink()
    (run / "deleting").mkdir()
    (run / "deleting" / "trainer.pt").write_text("")
    capsys.readouterr()
    run_main(tmp_path, model, max_steps=4, checkpoint_interval=1, resume=True)
    assert "warning" not in capsys.readouterr().out
    assert sorted(path.name for path in run.iterdir()) == [
        "lock",
        "run.json",
        "step_000001",  # max_steps has changed
        "step_000003",
        "step_000004",
    ]


def test_a_run_without_run_json_is_as_old_as_its_checkpoint(tmp_path, model, capsys):
    """Of an earlier version. Bug: the first of them is resumed, by the order of the directory."""
    for name in ("b", "a"):
        run_main(tmp_path, model, max_steps=1, run_name=name)
        (tmp_path / "o" / "experiment_base" / name / "run.json").unlink()
    for number, name in enumerate(("a", "b")):
        state = checkpoints(tmp_path, name)[1] / "trainer.pt"
        os.utime(state, (1000 + number, 1000 + number))
    capsys.readouterr()
    run_main(tmp_path, model, run_name=None, resume=True)
    assert "resuming run b from" in capsys.readouterr().out


def test_lines_of_the_log_that_are_missing_are_counted(tmp_path, model, capsys):
    run_main(tmp_path, model)
    path = tmp_path / "runs" / "run" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    run_main(tmp_path, model, resume=True, max_steps=3)
    assert f"warning: {path} lacks 2 of the lines up to step 2" in capsys.readouterr().out


LOCKED = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_trains_is_not_resumed(tmp_path, model):
    """Bug: two processes write the same log, and delete each other's checkpoints."""
    run_main(tmp_path, model)
    before = everything_in(tmp_path)
    lock = tmp_path / "o" / "experiment_base" / "run" / "lock"
    other = subprocess.Popen([sys.executable, "-c", LOCKED, str(lock)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(SystemExit, match="run run is being trained by another process"):
            run_main(tmp_path, model, resume=True, max_steps=3)
        assert everything_in(tmp_path) == before
    finally:
        other.kill()
        other.wait()
    run_main(tmp_path, model, resume=True, max_steps=3)


def test_two_runs_that_begin_at_once_do_not_share_a_directory(tmp_path, model, monkeypatch):
    """Bug: both looked before either wrote. Here the directory appears while the model loads."""
    load_model = load_experiment().train.load_model
    folder = tmp_path / "o" / "experiment_base" / "run"
    monkeypatch.setattr(
        load_experiment().train,
        "load_model",
        lambda *args: folder.mkdir(parents=True) or load_model(*args),
    )
    with pytest.raises(SystemExit, match="run run exists .*: choose another --run-name"):
        run_main(tmp_path, model)
    assert not (tmp_path / "runs").exists()


def test_damaged_run_file_is_named(tmp_path, model, monkeypatch):
    run_main(tmp_path, model)
    path = tmp_path / "o" / "experiment_base" / "run" / "run.json"
    for text in ("", "{", "[]", '{"started": "x", "config": 3}'):
        path.write_text(text)
        message = refusal(tmp_path, model, monkeypatch, resume=True)
        assert str(path) in message and "delete it" in message
    path.unlink()
    monkeypatch.undo()
    run_main(tmp_path, model, resume=True, max_steps=3)
    assert len(metrics(tmp_path)) == 4


def test_counts_in_a_row_survive_a_resume(tmp_path, model, capsys):
    """Bug: a run that is stopped and resumed every few steps never says that nothing is learnt."""
    settings = dict(epochs=3, checkpoint_interval=1, eval_interval=0, log_completions_interval=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_experiment().train, "accuracy_reward", lambda *_: 0.0)
        patch.setattr(load_experiment().train, "format_reward", lambda *_: 0.0)
        run_main(tmp_path, model, max_steps=3, **settings)
        assert "warning" not in capsys.readouterr().out
        run_main(tmp_path, model, max_steps=5, resume=True, **settings)
    assert "warning: in 5 steps in a row, the last of them 5" in capsys.readouterr().out


# ---------------------------------------------------------------- Ctrl-C and SIGTERM
def signal_in_step(step: int, times: int, patch, number=signal.SIGINT) -> None:
    train = load_experiment().train
    prompts_of_step = train.prompts_of_step

    def interrupt(prompts, now, config):
        for _ in range(times if now == step else 0):
            os.kill(os.getpid(), number)
        return prompts_of_step(prompts, now, config)

    # else a run without a handler of its own would end pytest
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    patch.setattr(train, "prompts_of_step", interrupt)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    number, tmp_path, model, base, uninterrupted, monkeypatch, capsys
):
    """Bug: Ctrl-C, or the SIGTERM of Slurm, `docker stop` and spot machines, loses all steps since
    the last checkpoint, or cuts a write in two. It evaluates nothing first, which could take longer
    than the machine waits, and so the resumed run's log is the uninterrupted one's."""
    settings = settings_of("full", model, "")
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(3, 1, patch, number)
        run_main(tmp_path, **settings, max_steps=6)
    assert list(checkpoints(tmp_path)) == [2, 3]
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]
    assert "eval_accuracy" not in metrics(tmp_path)[3]
    output = capsys.readouterr().out
    assert f"{number.name}: finishing this step, then saving" in output
    assert f"checkpoint: {checkpoints(tmp_path)[3]}" in output
    run_main(tmp_path, **settings, max_steps=6, resume=True)
    assert_same_run(uninterrupted("full"), tmp_path, 6)


def test_a_signal_while_a_checkpoint_is_written_stops_behind_it(tmp_path, model, monkeypatch):
    """Bug: the wish was read before, and a whole step more is sampled and trained on."""
    save = load_experiment().run.Run.save

    def signal_then_save(self, step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        save(self, step, *args)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(load_experiment().run.Run, "save", signal_then_save)
    run_main(tmp_path, model, max_steps=6)
    assert list(checkpoints(tmp_path)) == [2] and len(metrics(tmp_path)) == 3


def test_second_signal_ends_at_once_with_a_line(tmp_path, model, monkeypatch):
    signal_in_step(3, 2, monkeypatch)
    with pytest.raises(SystemExit, match="stopped; last checkpoint: .*step_000002"):
        run_main(tmp_path, model, max_steps=8, epochs=2)
    assert list(checkpoints(tmp_path)) == [2]


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, model, monkeypatch):
    """Bug: a step is sampled and trained on before the program obeys."""
    evaluate = load_experiment().train.evaluate

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(load_experiment().train, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="stopped; last checkpoint: none; --resume begins"):
        run_main(tmp_path, model)


# ---------------------------------------------------------------- intervals
def test_an_interval_of_0_is_off(tmp_path, model, capsys):
    """Bug: a division by zero in the first step."""
    off = dict(eval_interval=0, checkpoint_interval=0, log_completions_interval=0)
    run_main(tmp_path, model, max_steps=3, **off)
    assert list(checkpoints(tmp_path)) == [3]
    assert ["eval_accuracy" in line for line in metrics(tmp_path)] == [True, False, False, True]
    assert "advantage " not in capsys.readouterr().out
