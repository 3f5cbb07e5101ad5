"""benchmarks/memory.py: what it counts, and its estimates against what a card has shown."""

import json

import pytest
import torch
from helpers import ROOT, load_benchmark
from torch._subclasses.fake_tensor import FakeTensorMode

memory = load_benchmark("memory")
MEASURED = json.loads((ROOT / "results" / "memory_h100.json").read_text())["rows"]
SETTING = memory.SETTING
SMALL = ("qwen2", 64, 128, 6, 4, 2, 16, 512, True)


def test_the_counter_counts_what_is_alive():
    with FakeTensorMode(), memory.Counter() as counter:
        first = torch.empty(1000)
        view = first[10:]
        assert counter.now == 4096  # a multiple of 512
        second = first + 1
        assert counter.now == 2 * 4096
        del second
        first.add_(1)
        assert counter.now == 4096
        del first
        assert counter.now == 4096  # the view holds it
        del view
        assert counter.now == 0
        assert counter.take_peak() == 2 * 4096
        assert counter.take_peak() == 0


def test_what_takes_memory(monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "small", SMALL)
    case = memory.Case(**SETTING | {"model_name": "small", "max_new_tokens": 16})
    case = memory.replace(case, micro_batch_tokens=512)

    def peak(phase, **changes):
        return memory.estimate(memory.replace(case, **changes), (phase,))[phase]

    plain = peak("training")
    assert peak("training", micro_batch_tokens=1024) > plain
    assert peak("sampling", sample_rows=128) > peak("sampling")
    assert peak("training", kl_weight=0.0) < plain
    assert peak("training", lora_rank=2) < plain
    assert peak("training", optimizer="adamw8bit") < plain


MORE = [pytest.param(MEASURED[i], marks=pytest.mark.long) for i in (6, -1)]


@pytest.mark.parametrize("row", [MEASURED[0], MEASURED[-2], *MORE])
def test_estimates_are_within_a_tenth_of_the_card(row):
    case = memory.Case(**SETTING | row["case"])  # the card had completions of full length
    micro_batch = memory.largest_micro_batch(case, case.max_new_tokens)
    peaks = memory.estimate(case, micro_batches=[micro_batch])
    for phase, measured in row["bytes"].items():
        assert peaks[phase] == pytest.approx(measured, rel=0.1), phase


def test_the_largest_that_fits(monkeypatch):
    def estimate(case, phases):
        training = case.micro_batch_tokens * memory.GIB / 1024
        peaks = {"training": training, "evaluation": case.sample_rows * memory.GIB / 8}
        return {phase: peaks[phase] for phase in phases}

    monkeypatch.setattr(memory, "estimate", estimate)
    case = memory.Case(**SETTING)
    sizes, counts = memory.micro_batch_sizes(case), memory.row_counts(case)
    assert sizes == [1024, 2048, 4096, 8192, 16_384]
    assert counts == [8, 16, 32, 64, 128, 256, 512]

    def tokens(card):
        peaks, largest = memory.peaks_and_largest(
            case, ("training",), "micro_batch_tokens", sizes, card
        )
        assert peaks == {"training": 4 * memory.GIB}
        return largest

    def rows(card):
        return memory.peaks_and_largest(case, ("evaluation",), "sample_rows", counts, card)[1]

    assert tokens(16) == 8192  # 1.1 x 8 + 1 GiB
    assert tokens(5.5) == 4096  # its own
    assert tokens(5) == 2048
    assert tokens(1) is None and tokens(0) is None
    assert tokens(80) == 16_384
    assert rows(16) == 64 and rows(5) == 16

    def flag(name, largest, tried, **changes):
        return memory.largest_flag(name, largest, tried, memory.replace(case, **changes))

    assert flag("sample_rows", 64, counts) == "--sample-rows 64"
    assert flag("sample_rows", 512, counts) == "--sample-rows 512 or more"
    assert flag("sample_rows", None, counts, lora_rank=16) == (
        "no --sample-rows. Less is needed with: --load-in-4bit, fewer --max-new-tokens, a smaller "
        "model"
    )
    assert flag("micro_batch_tokens", None, sizes) == (
        "no --micro-batch-tokens. Less is needed with: --gradient-checkpointing, --lora-rank 16, "
        "--optimizer adamw8bit, fewer --max-new-tokens, a smaller model"
    )


def test_rows_fit_in_sampling_and_in_evaluation(monkeypatch):
    """Bug: only evaluation was looked at, which has few prompts where max_eval_prompts is small."""

    def estimate(case, phases):
        return {"sampling": case.sample_rows * memory.GIB / 8, "evaluation": memory.GIB}

    monkeypatch.setattr(memory, "estimate", estimate)
    arguments = (memory.Case(**SETTING), ("sampling", "evaluation"), "sample_rows")
    assert memory.peaks_and_largest(*arguments, [8, 16, 32, 64], 6)[1] == 32


def test_more_tokens_never_need_less(monkeypatch):
    """Bug: completions of full length left half of a micro-batch empty, which real ones fill."""
    monkeypatch.setitem(memory.SHAPES, "small", SMALL)
    case = memory.Case(**SETTING | {"model_name": "small", "micro_batch_tokens": 2048})
    peaks = []
    for length in (100, 230, 240, 800):
        longer = memory.replace(case, max_new_tokens=length)
        peaks.append(memory.estimate(longer, ("training",))["training"])
    assert all(more > 0.98 * less for less, more in zip(peaks, peaks[1:])), peaks
    full = [memory.largest_micro_batch(case, length) for length in (230, 240)]
    assert [tuple(batch.input_ids.shape) for batch in full] == [(1, 1982), (1, 1823)]
    batches = memory.largest_micro_batches(memory.replace(case, max_new_tokens=240))
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(1, 2038)]


def test_values_tried_where_one_completion_or_group_is_longer_than_all():
    case = memory.Case(prompt_tokens=20_000, group_size=1024)
    assert memory.micro_batch_sizes(case) == [20_064]
    assert memory.row_counts(case) == [1024]


def test_no_more_is_counted_than_a_step_has(monkeypatch):
    """A step samples rollouts_per_step groups, whatever sample_rows is, and rows are whole groups;
    an update has train_batch_size completions, whatever micro_batch_tokens is."""
    monkeypatch.setitem(memory.SHAPES, "small", SMALL)
    case = memory.Case(model_name="small", max_new_tokens=16, prompt_tokens=16)
    most = {"rollouts_per_step": 4, "max_eval_prompts": 32, "train_batch_size": 16}
    few = memory.replace(case, **most, sample_rows=32, micro_batch_tokens=512)
    many = memory.replace(case, **most, sample_rows=39, micro_batch_tokens=100_000)
    more = memory.replace(few, sample_rows=40, rollouts_per_step=5)
    assert memory.estimate(few, ("training",)) == memory.estimate(many, ("training",))
    assert memory.estimate(few, ("sampling",)) == memory.estimate(many, ("sampling",))
    assert memory.estimate(few, ("sampling",)) != memory.estimate(more, ("sampling",))


CHANGES = [
    {"lora_rank": 16},
    {"lora_rank": 16, "load_in_4bit": True, "gradient_checkpointing": True},
    {"optimizer": "adamw8bit", "gradient_checkpointing": True, "kl_weight": 0.0},
    {"precision": "float32", "max_new_tokens": 64},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_all_layers_are_on_a_line_through_few(changes, monkeypatch):
    """A model of twelve layers, estimated from two and three, beside itself."""
    monkeypatch.setitem(memory.SHAPES, "small", ("llama", 256, 1024, 12, 4, 2, 64, 4096, True))
    case = memory.Case(**SETTING | {"model_name": "small", "max_new_tokens": 128})
    case = memory.replace(case, **{"micro_batch_tokens": 1024} | changes)
    whole = memory.simulate(case, memory.PHASES, 12, memory.largest_micro_batches(case))
    for phase, peak in memory.estimate(case).items():
        assert peak == pytest.approx(max(whole[phase]), rel=0.005), phase


def test_readme_has_what_fits():
    report = json.loads((ROOT / "results" / "memory.json").read_text())
    assert report["needed"] == memory.needed_of_all(report["rows"])
    assert "\n".join(report["needed"]) in (ROOT / "README.md").read_text()
    assert report["peaks"] == memory.peaks_of_all(report["rows"])
    assert {row["model"] for row in report["rows"]} == set(memory.SHAPES)


def test_loading_is_no_part_of_sampling():
    """Bug: asked for sampling alone, 4-bit weights were counted as they were before."""
    (case,) = [row["case"] for row in MEASURED[:6] if row["case"]["max_new_tokens"] == 24]
    case = memory.Case(**SETTING | case)
    both = memory.estimate(case)
    for phase in ("sampling", "evaluation"):
        assert memory.estimate(case, (phase,))[phase] == pytest.approx(both[phase], rel=0.01)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be a number from 1"),
        ({"load_in_4bit": True}, "add --lora-rank 16"),
        ({"sample_rows": 4}, "--sample-rows 4: must hold one group, --group-size 8"),
        ({"card": 1.0}, "--card 1.0: CUDA alone takes 1 GiB"),
        ({"card": float("nan")}, "--card nan: must be"),
        ({"table": True, "lora_rank": 16}, "--table: takes no other flag"),
        ({"measured": True, "resident": True}, "--measured: takes no other flag"),
        ({"kl_weight": float("nan")}, "--kl-weight nan: must be a number from 0"),
        ({"group_size": 1}, "--group-size 1: a completion is compared with its group"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0: must be from 1 to the 448 that"),
        ({"prompt_tokens": 449}, "to the 448 that --max-length 512 leaves"),
        ({"max_new_tokens": 600}, "--max-new-tokens 600: leaves no room for a prompt"),
        ({"sample_rows": 2**31 - 1}, "--sample-rows 2147483647: more than 65,536"),
        ({"max_length": 10**6}, "has 1024 positions; take fewer"),
        ({"attention": "eager"}, "--attention eager: cannot be estimated"),
        ({"model_name": "data"}, "--model-name data: cannot be loaded"),
        ({"model_name": str(ROOT / "data" / "reward_math")}, "is no causal language model"),
    ],
)
def test_wrong_values_end_in_one_line(changes, words):
    options = memory.Options(**changes)
    with pytest.raises(SystemExit) as error:
        memory.main(options)
    assert words in str(error.value) and "\n" not in str(error.value)
