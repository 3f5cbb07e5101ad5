"""Values, files and models that cannot work end in one line, before anything expensive starts."""

import json
import math
import re
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import tyro
from helpers import ROOT, chat_template, embedded_tokenizer, load_experiment
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_run import (
    EXPERIMENTS,
    RESUMED,
    checkpoints,
    everything_in,
    make_adapter,
    read_weights,
    refusal,
    run_main,
    tiny_settings,
    write_as,
    write_rows,
)

base = load_experiment()


# ---------------------------------------------------------------- ranges
def ranges_of(name: str) -> dict:
    """constant -> its range, of every number of an experiment's Config."""
    experiment = load_experiment(name)
    found = {}
    for constant, hint in get_type_hints(experiment.train.Config, include_extras=True).items():
        limits = [note for note in get_args(hint)[1:] if isinstance(note, experiment.run.Range)]
        kind = get_args(hint)[0] if limits else hint
        is_number = kind in (int, float) or kind == int | None
        assert bool(limits) == is_number, f"{constant} has no range"
        if limits:
            found[constant] = limits[0]
    return found


def outside(limits):
    """Values that a range does not hold."""
    is_int = "INT" in limits.text or "**" in limits.text  # the seed's
    below = st.integers(max_value=limits.low - 1) if is_int else st.floats(max_value=0)
    above = st.integers(min_value=limits.high + 1) if is_int else st.floats(min_value=limits.high)
    special = [] if is_int else [math.nan, math.inf, -math.inf]
    values = st.one_of(below, above, st.sampled_from(special) if special else above)
    return values.filter(lambda value: not limits.holds(value))


def ends_in_a_line(name: str, changes: dict) -> str | None:
    """The line that `main` ends with before a tokenizer is loaded; None where it gets there."""
    experiment = load_experiment(name)

    class Reached(Exception):
        pass

    def load_tokenizer(*_):
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment.train, "load_tokenizer", load_tokenizer)
        try:
            experiment.train.main(experiment.train.Config(**changes))
        except Reached:
            return None
        except SystemExit as exit:
            assert exit.code.startswith("error: ") and "\n" not in exit.code, exit.code
            return exit.code
    raise AssertionError("main went on without a tokenizer")


@pytest.mark.parametrize("name", EXPERIMENTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_value_outside_its_range_ends_in_one_line(name, data):
    """Bug: --lr nan trains every weight to NaN, --clip-eps-low -1 skips every token, --max-steps -1
    ends with nothing done, a seed beyond 2**63 fails minutes later."""
    for constant, limits in ranges_of(name).items():
        value = data.draw(outside(limits), label=constant)
        line = ends_in_a_line(name, {constant: value})
        flag = "--" + constant.replace("_", "-")
        assert line and line.startswith(f"error: {flag} "), (constant, value, line)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", math.inf),
        ("lr", math.nan),
        ("lr", -1e-6),
        ("max_norm", -1.0),
        ("max_norm", math.nan),
        ("kl_weight", math.nan),
        ("kl_weight", -0.1),
        ("format_weight", math.nan),
        ("clip_eps_low", -0.1),
        ("clip_eps_low", 1.1),
        ("clip_eps_high", math.nan),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", 0.0),
        ("max_steps", -1),
        ("epochs", 0),
        ("max_prompts", -5),
        ("max_eval_prompts", 0),
        ("lora_rank", -1),
        ("seed", 2**63),
        ("temperature", 1e300),
        ("clip_eps_high", 1e39),
        ("lora_rank", 2**63 - 1),
        ("seed", -1),
        ("group_size", 1),
        ("device_index", -1),
        ("eval_interval", -1),
        ("answer_tolerance", math.nan),
    ],
)
def test_values_that_ruin_a_run(name, value):
    """By hand, with the flag and the value in the line."""
    line = ends_in_a_line("experiment_base", {name: value})
    assert line and line.startswith(f"error: --{name.replace('_', '-')} {value}: "), line


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.0),
        ("max_norm", 0.0),
        ("kl_weight", 0.0),
        ("clip_eps_low", 1.0),
        ("temperature", 1e-3),
        ("max_steps", 0),
        ("seed", 2**63 - 1),
        ("eval_interval", 0),
        ("checkpoint_interval", 0),
        ("log_completions_interval", 0),
    ],
)
def test_values_at_the_edge_of_a_range_are_taken(name, value):
    assert ends_in_a_line("experiment_base", {name: value}) is None


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_shows_the_range_of_every_number(name, monkeypatch, capsys):
    experiment = load_experiment(name)
    monkeypatch.setitem(sys.modules, "train", experiment.train)  # tyro reads its source
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        tyro.cli(experiment.train.Config, args=["--help"])
    shown = capsys.readouterr().out
    for constant, limits in ranges_of(name).items():
        flag = "--" + constant.replace("_", "-")
        assert re.search(rf"{flag} {re.escape(limits.text)}\s", shown), (flag, limits.text)


def test_a_norm_of_0_is_no_clipping():
    """Bug: 0, which means "no clipping" elsewhere, scales every gradient down to nothing."""
    policy = torch.nn.Linear(2, 1, bias=False)
    policy.weight.data.zero_()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    config = base.train.Config(precision="float32", max_norm=0.0)
    scaler = base.model.make_scaler(config, torch.device("cpu"))
    (policy(torch.tensor([[30.0, 40.0]])).sum()).backward()
    assert base.model.optimizer_step(policy, optimizer, scaler, config) == pytest.approx(50)
    assert policy.weight.tolist() == [[-30.0, -40.0]]
    sums = [dict.fromkeys(("loss", "tokens", "clipped", "ratio", "ratio_squared", "gap"))]
    sums = [{name: torch.tensor(1.0) for name in sums[0]}]
    assert base.loss.loss_metrics(sums, [50.0], 0.0)["grad_clip_fraction"] == 0
    assert base.loss.loss_metrics(sums, [50.0], 1.0)["grad_clip_fraction"] == 1


# ---------------------------------------------------------------- names, places, devices
@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../out",
        "..",
        ".",
        "",
        "a..b",
        "x" * 300,
        "\u4e00" * 60,
        "-x",
        "a\nb",
        "a\\b",
        "/tmp/x",
    ],
)
def test_run_names_that_are_no_directory_names(name, tmp_path, model, monkeypatch):
    """Bug: `--run-name ../x` writes outside of the log directory; a long one fails after the first
    evaluation, with "File name too long"."""
    assert "--run-name" in refusal(tmp_path, model, monkeypatch, run_name=name)


@pytest.mark.parametrize("name", ["run 2", "v1.5_lr=1e-5", "Stra\u00dfe", "x" * 100])
def test_run_names_that_are_fine(name):
    base.run.check_run_name(name)


def test_texts_that_are_no_unicode_are_refused():
    """Bug: a byte of the command line that is no UTF-8 fails in the tokenizer."""
    line = ends_in_a_line("experiment_base", {"system_prompt": "a\udcff"})
    assert "--system-prompt" in line and "UTF-8" in line


def test_a_log_directory_in_a_place_that_takes_no_files(tmp_path, model, monkeypatch):
    """As root too, whom access() allows everything. Bug: a traceback after the first evaluation."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    message = refusal(tmp_path, model, monkeypatch, log_dir="/proc/runs")
    assert "--log-dir /proc/runs: /proc cannot be written to" in message


def test_a_gpu_by_its_index_where_there_is_none(tmp_path, model, monkeypatch):
    """Bug: trains on the CPU, without a word."""
    message = refusal(tmp_path, model, monkeypatch, device_index=1)
    assert "--device-index 1: this machine has no CUDA device" in message


def test_flash_attention_without_its_package_or_a_gpu(tmp_path, model, monkeypatch):
    """Bug: transformers' ImportError of twenty lines."""
    message = refusal(tmp_path, model, monkeypatch, attention="flash_attention_2")
    assert "--attention flash_attention_2" in message and "pip install flash-attn" in message
    monkeypatch.setattr(base.run, "is_installed", lambda package: True)
    message = refusal(tmp_path, model, monkeypatch, attention="flash_attention_2")
    assert "needs a CUDA device" in message
    message = refusal(tmp_path, model, monkeypatch, attention="flex_attention")
    assert "--attention flex_attention: needs a CUDA device" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    message = refusal(tmp_path, model, monkeypatch, attention="flash_attention_2")
    assert "needs --precision bfloat16 or float16" in message


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize("name", ["data_path", "log_dir", "model_name", "eval_data_path"])
def test_empty_paths(name):
    """Bug: --eval-data-path "" is ignored, and --data-path "" is a list index out of range."""
    line = ends_in_a_line("experiment_base", {name: ""})
    assert line == f"error: --{name.replace('_', '-')}: is empty"


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    rows = json.dumps([{"a": 1}])
    (tmp_path / "rows.json").write_text("\ufeff" + rows, "utf-8")
    (tmp_path / "rows.jsonl").write_text("\ufeff" + rows[1:-1], "utf-8")
    for suffix in ("json", "jsonl"):
        assert [row for _, row in base.data.read_rows(f"{tmp_path}/rows.{suffix}", "")] == [
            {"a": 1}
        ]


def refused_rows(rows: list[dict], suffix: str, tmp_path, model, monkeypatch, **overrides) -> str:
    path = write_as(suffix, tmp_path / "rows", rows)
    return refusal(tmp_path, model, monkeypatch, data_path=str(path), **overrides)


GOOD = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]
SELECTORS = {"experiment_base": "num_terms", "experiment_multiturn_tool_calling": "num_digits"}


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_field_that_selects_rows_may_be_null_but_not_text(
    name, suffix, tmp_path, model, monkeypatch
):
    """Bug: parquet fills what some rows lack with nulls, and None <= 3 is a TypeError."""
    field = SELECTORS[name]
    experiment = load_experiment(name)
    rows = [row | {field: 3 if i % 2 else None} for i, row in enumerate(GOOD)]
    path = write_as(suffix, tmp_path / "nulls", rows)
    config = experiment.train.Config(
        **tiny_settings(tmp_path, model, data_path=str(path), max_length=1200)
    )
    prompts, _ = experiment.train.read_prompts(config, embedded_tokenizer())
    assert len(prompts) == 18
    path = write_as(suffix, tmp_path / "texts", [row | {field: "three"} for row in GOOD])
    config.data_path = str(path)
    with pytest.raises(SystemExit) as exit:
        experiment.train.read_prompts(config, embedded_tokenizer())
    where = "row 1" if suffix == ".parquet" else "line 1"
    assert f"{path}, {where}: field '{field}' must be a number, is 'three'" in exit.value.code


@pytest.mark.parametrize("value, is_used", [(["+", "-"], True), (["*"], False), (5, None)])
def test_operators_may_be_a_list(value, is_used, tmp_path, model):
    """Bug: a TypeError of a number, or a list whose brackets are operators that are left out."""
    path = write_as(".jsonl", tmp_path / "rows", [row | {"operators": value} for row in GOOD])
    config = base.train.Config(**tiny_settings(tmp_path, model, data_path=str(path)))
    if is_used:
        assert len(base.train.read_prompts(config, embedded_tokenizer())[0]) == 18
        return
    message = "18 left out by --operators" if is_used is False else "line 1: field 'operators' must"
    with pytest.raises(SystemExit, match=message):
        base.train.read_prompts(config, embedded_tokenizer())


def test_nan_is_null(tmp_path):
    """As pandas writes a missing number into parquet."""
    path = write_as(".parquet", tmp_path / "rows", [{"a": math.nan, "b": 1.0}, {"a": 2.0}])
    rows = base.data.read_rows(str(path), "train")
    assert [row for _, row in rows] == [{"b": 1.0}, {"a": 2.0}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "number, text", [(1e-05, "0.00001"), (1e16, "10000000000000000"), (-2.5e-07, "-0.00000025")]
)
def test_floats_of_a_data_file_are_numbers(number, text, suffix, tmp_path, model):
    """Bug: Python writes 0.00001 as 1e-05, which is no number in an answer."""
    rows = [row | {"answer": number} for row in GOOD]
    path = write_as(suffix, tmp_path / "rows", rows)
    config = base.train.Config(**tiny_settings(tmp_path, model, data_path=str(path)))
    prompts, _ = base.train.read_prompts(config, embedded_tokenizer())
    value = base.data.parse_number(prompts[0].answer)
    assert value == base.data.parse_number(text)
    assert base.train.accuracy_reward(f"<answer>{text}</answer>", prompts[0].answer) == 1


def test_decimals_of_parquet_are_numbers(tmp_path, model):
    """Bug: "field 'answer' is missing" of a column of DECIMAL(10, 4)."""
    rows = [row | {"answer": Decimal("72.5000")} for row in GOOD]
    path = write_as(".parquet", tmp_path / "rows", rows)
    config = base.train.Config(**tiny_settings(tmp_path, model, data_path=str(path)))
    prompts, _ = base.train.read_prompts(config, embedded_tokenizer())
    assert base.train.accuracy_reward("<answer>72.5</answer>", prompts[0].answer) == 1


@pytest.mark.parametrize("value", [True, ["1"], {"a": 1}, float("inf")])
def test_an_answer_that_is_no_number_is_named_with_its_line(value, tmp_path, model, monkeypatch):
    rows = [*GOOD[:4], GOOD[4] | {"answer": value}, *GOOD[5:]]
    message = refused_rows(rows, ".jsonl", tmp_path, model, monkeypatch)
    assert "rows.jsonl, line 5: field 'answer' must be" in message


@pytest.mark.parametrize("field", ["question", "answer"])
@pytest.mark.parametrize("name", ["experiment_base", "experiment_multiturn_qa"])
def test_half_of_a_surrogate_pair_is_named_with_its_line(name, field, tmp_path, model):
    """Bug: the tokenizer's TypeError, without the file or the line."""
    experiment = load_experiment(name)
    lines = [json.dumps({**row, "context": "x"}) for row in GOOD]
    lines[2] = lines[2].replace(f'"{field}": "', f'"{field}": "\\ud83d', 1)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    settings = tiny_settings(tmp_path, model, data_path=str(tmp_path / "rows.jsonl"))
    config = experiment.train.Config(**settings | {"max_length": 1200})
    with pytest.raises(SystemExit, match=f"rows.jsonl, line 3: field '{field}' holds half of"):
        experiment.train.read_prompts(config, embedded_tokenizer())


@pytest.mark.parametrize(
    "field, value, selection",
    [
        ("num_terms", 9, "20 left out by --max-terms 3"),
        ("num_digits", 7, "20 left out by --max-digits 2"),
        ("operators", "*", "20 left out by --operators +-"),
    ],
)
def test_no_prompts_names_the_selection_that_emptied_it(
    field, value, selection, tmp_path, model, monkeypatch
):
    """Bug: "0 prompts selected", and one looks for the fault in the file."""
    rows = [row | {field: value} for row in GOOD]
    message = refused_rows(rows, ".jsonl", tmp_path, model, monkeypatch)
    assert f"0 of 18 prompts selected ({selection.replace('20', '18')})" in message


def test_how_many_rows_are_used_of_how_many(tmp_path, model, capsys):
    """Bug: 1,024 of GSM8K's 7,473 prompts are trained on, and nobody says so."""
    write_rows(tmp_path / "sums.jsonl", 0, 40)
    write_rows(tmp_path / "sums_eval.jsonl", 50, 10)
    settings = tiny_settings(tmp_path, model, data_path=str(tmp_path / "sums.jsonl"))
    config = base.train.Config(**settings | dict(max_prompts=30, max_eval_prompts=4))
    base.train.read_prompts(config, embedded_tokenizer())
    assert capsys.readouterr().out == (
        f"{tmp_path}/sums.jsonl: 30 of 40 prompts selected (the first --max-prompts 30), "
        "4 of 10 held out (the first --max-eval-prompts 4)\n"
    )
    base.train.read_prompts(base.train.Config(**settings), embedded_tokenizer())
    assert "40 of 40 prompts selected, 10 of 10 held out\n" in capsys.readouterr().out


# ---------------------------------------------------------------- models
def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change) -> None:
    weights = read_weights(folder)
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_nan(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan


def spoil_missing(weights):
    del weights["model.layers.1.mlp.up_proj.weight"]


MODELS = {
    "shapes that do not fit": (
        lambda folder: change_config(folder, intermediate_size=72),
        "cannot be loaded",
    ),
    "a vocabulary smaller than the tokenizer's": (
        lambda folder: change_config(folder, vocab_size=300),
        "its tokenizer has 351 tokens, its model only 300",
    ),
    "fewer positions than tokens": (
        lambda folder: change_config(folder, max_position_embeddings=100),
        "--max-length 128: .* has 100 positions",
    ),
    "a masked language model": (
        lambda folder: change_config(folder, architectures=["BertForMaskedLM"], model_type="bert"),
        "is no causal language model",
    ),
    "an encoder and decoder": (
        lambda folder: change_config(
            folder, architectures=["T5ForConditionalGeneration"], model_type="t5"
        ),
        "is no causal language model",
    ),
    "a classifier": (
        lambda folder: change_config(folder, architectures=["Qwen2ForSequenceClassification"]),
        "is no causal language model",
    ),
    "an unknown kind": (
        lambda folder: change_config(folder, model_type="nothing"),
        "cannot be loaded",
    ),
    "weights that hold NaN": (
        lambda folder: change_weights(folder, spoil_nan),
        "the weight model.layers.1.mlp.up_proj.weight holds NaN",
    ),
    "weights that are missing": (
        lambda folder: change_weights(folder, spoil_missing),
        "1 weights are missing, such as model.layers.1.mlp.up_proj.weight",
    ),
    "a config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "cannot be loaded",
    ),
    "no weights at all": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "cannot be loaded",
    ),
    "an end token that is a text": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        "eos_token_id must be a number",
    ),
    "a config that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "cannot be loaded",
    ),
    "no heads": (
        lambda folder: change_config(folder, num_attention_heads=0),
        "cannot be loaded",
    ),
    "no vocabulary": (lambda folder: change_config(folder, vocab_size=0), "its tokenizer has 351"),
    "no tokenizer.json": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "its chat template or tokenizer loses the system",
    ),
    "a template that drops the question": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0].content }}"),
        "its chat template or tokenizer loses the question",
    ),
    "a template that fails in Python": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages + 1 }}"),
        "its chat template cannot be used",
    ),
    "a tokenizer that is no JSON": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_trained(name, tmp_path, model):
    """Bug: a traceback; or weights that are random, and NaN that the first evaluation hides."""
    spoil, message = MODELS[name]
    folder = shutil.copytree(model, tmp_path / "spoilt")
    spoil(folder)
    before = everything_in(tmp_path / "spoilt")
    with pytest.raises(SystemExit) as exit:
        run_main(tmp_path, str(folder))
    line = exit.value.code
    assert re.search(message, line), line
    assert line.startswith("error: ") and "\n" not in line and len(line) < 800
    assert everything_in(tmp_path / "spoilt") == before
    assert not (tmp_path / "runs").exists() and not (tmp_path / "o").exists()


ADAPTERS = {
    "missing": (lambda weights: weights.pop(sorted(weights)[0]), "is missing"),
    "NaN": (lambda weights: weights[sorted(weights)[0]].fill_(math.nan), "holds NaN"),
    "shape": (lambda weights: weights.update({k: v[:1] for k, v in weights.items()}), "cannot be"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_damaged(name, tmp_path, model):
    """Bug: --resume goes on with fresh adapters beside the old optimizer's state, and so does
    training from them."""
    spoil, message = ADAPTERS[name]
    run_main(tmp_path, model, lora_rank=4)
    checkpoint = checkpoints(tmp_path)[2]
    weights = read_weights(checkpoint)
    spoil(weights)
    save_file(
        {k: v.contiguous() for k, v in weights.items()}, checkpoint / "adapter_model.safetensors"
    )
    with pytest.raises(SystemExit) as exit:
        run_main(tmp_path, model, lora_rank=4, max_steps=3, resume=True)
    assert f"error: --model-name {checkpoint}: cannot be loaded (delete this" in exit.value.code
    assert message in exit.value.code
    with pytest.raises(SystemExit, match=f"error: --model-name {checkpoint}: cannot be loaded"):
        run_main(tmp_path, str(checkpoint), run_name="other")


def test_an_adapters_own_rank_is_used_and_said(tmp_path, model, capsys):
    (tmp_path / "made").mkdir()
    adapter = make_adapter(tmp_path / "made", model)
    capsys.readouterr()
    run_main(tmp_path, adapter, lora_rank=8, max_steps=1)
    assert "--lora-rank is not used: " in capsys.readouterr().out


def test_an_adapter_without_a_base_model(tmp_path, model):
    (tmp_path / "made").mkdir()
    adapter = Path(make_adapter(tmp_path / "made", model))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="its adapter_config.json names no base model"):
        run_main(tmp_path, str(adapter))


@pytest.mark.parametrize("text", ["", "[]", "{}", "no zip"])
def test_a_damaged_trainer_pt(text, tmp_path, model, monkeypatch):
    run_main(tmp_path, model)
    path = checkpoints(tmp_path)[2] / "trainer.pt"
    path.write_text(text)
    if text in ("[]", "{}"):
        torch.save(json.loads(text), path)
    message = refusal(tmp_path, model, monkeypatch, resume=True)
    assert f"{path.parent}: cannot be read (" in message and "delete this directory" in message


def test_damaged_weights_of_a_checkpoint_say_which_to_delete(tmp_path, model):
    """Bug: advice about licences, for a file of one's own that a crash cut off."""
    run_main(tmp_path, model)
    checkpoint = checkpoints(tmp_path)[2]
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as exit:
        run_main(tmp_path, model, max_steps=3, resume=True)
    assert f"{checkpoint}: cannot be loaded (delete this directory" in exit.value.code
    assert "licence" not in exit.value.code


def test_an_adapter_of_another_size(tmp_path, model):
    (tmp_path / "made").mkdir()
    adapter = Path(make_adapter(tmp_path / "made", model))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    with pytest.raises(SystemExit, match=f"^error: --model-name {adapter}: cannot be loaded"):
        run_main(tmp_path, str(adapter))


def test_out_of_memory_in_loading_has_a_line(tmp_path, model):
    """Bug: --lora-rank 100000 of a large model ends in a traceback."""
    with pytest.raises(
        SystemExit, match="^error: out of memory: lower the size of model_name, or lora_rank"
    ):
        run_main(tmp_path, model, lora_rank=2**31 - 1)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA out of memory",
    ],
)
def test_out_of_memory_in_other_words(text):
    with pytest.raises(SystemExit, match="out of memory: lower micro_batch_tokens"):
        with base.model.out_of_memory_names("micro_batch_tokens"):
            raise RuntimeError(text)


def test_no_library_warns_in_a_run(tmp_path, model):
    """Bug: a FutureWarning at every start with LoRA or checkpointing, which users take for a
    fault. In a process of its own, since pytest has its own filters."""
    settings = tiny_settings(tmp_path, model, max_steps=1, lora_rank=4, gradient_checkpointing=True)
    command = [sys.executable, "-c", RESUMED, str(ROOT / "experiment_base"), json.dumps([settings])]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "Warning" not in process.stdout + process.stderr


# ---------------------------------------------------------------- chat templates
DROPS = (
    "{% for message in messages %}{% if message.role != 'system' %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + DROPS


@pytest.mark.parametrize("template", [DROPS, RAISES])
def test_a_template_without_a_system_message(template, tmp_path, model, capsys):
    """Bug: the model is never told what to do, and every reward is 0."""
    folder = shutil.copytree(model, tmp_path / "dropping")
    (folder / "chat_template.jinja").write_text(template)
    settings = tiny_settings(tmp_path, str(folder), max_length=400)
    config = base.train.Config(**settings | dict(system_prompt="Think."))
    tokenizer = base.model.load_tokenizer(config)
    warning = (
        "its chat template drops a system message; the system prompt is put before the question"
    )
    assert warning in capsys.readouterr().out
    prompts, _ = base.train.read_prompts(config, tokenizer)
    text = tokenizer.decode(prompts[0].ids)
    assert text == ("<|im_start|>user\nThink.\n\nWhat is 0 + 1?<|im_end|>\n<|im_start|>assistant\n")


def test_a_template_that_raises_in_any_case(tmp_path, model, monkeypatch):
    folder = shutil.copytree(model, tmp_path / "raising")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    message = refusal(tmp_path, str(folder), monkeypatch)
    assert "its chat template cannot be used (TemplateError: never)" in message


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "llama3_2", "phi3_5", "gemma3"])
def test_real_templates_take_a_system_message(name):
    tokenizer = embedded_tokenizer()
    tokenizer.bos_token = "<|im_start|>"  # Llama's template begins with it
    tokenizer.chat_template = chat_template(name)
    assert base.model.takes_system_message(tokenizer)
    assert base.model.render_prompt(tokenizer, "Think.", "1 + 1?").count("Think.") == 1
