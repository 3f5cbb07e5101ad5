"""benchmarks/memory.py: what it counts, and its estimates against what a card has shown."""

import json

import pytest
import torch
from helpers import ROOT, load_benchmark
from torch._subclasses.fake_tensor import FakeTensorMode

memory = load_benchmark("memory")
MEASURED = json.loads((ROOT / "results" / "memory_h100.json").read_text())["rows"]
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
    case = memory.Case("small", max_new_tokens=16, micro_batch_tokens=512)
    plain = memory.estimate(case)
    replace = memory.replace
    assert memory.estimate(replace(case, micro_batch_tokens=1024))["training"] > plain["training"]
    assert memory.estimate(replace(case, sample_rows=128))["sampling"] > plain["sampling"]
    assert memory.estimate(replace(case, kl_weight=0.0))["training"] < plain["training"]
    assert memory.estimate(replace(case, lora_rank=2))["training"] < plain["training"]
    small_state = memory.estimate(replace(case, optimizer="adamw8bit"))
    assert small_state["training"] < plain["training"]


MORE = [pytest.param(MEASURED[i], marks=pytest.mark.long) for i in (6, -1)]


@pytest.mark.parametrize("row", [MEASURED[0], MEASURED[-2], *MORE])
def test_estimates_are_within_a_tenth_of_the_card(row):
    peaks = memory.estimate(memory.Case(**row["case"]))
    for phase, measured in row["bytes"].items():
        assert peaks[phase] == pytest.approx(measured, rel=0.1), phase


def test_the_largest_that_fits(monkeypatch):
    def estimate(case, phases):
        training = case.micro_batch_tokens * memory.GIB / 1024
        peaks = {"training": training, "evaluation": case.sample_rows * memory.GIB / 8}
        return {phase: peaks[phase] for phase in phases}

    monkeypatch.setattr(memory, "estimate", estimate)
    case = memory.Case(max_new_tokens=512)
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
    assert tokens(1) is None and tokens(None) is None
    assert tokens(80) == 16_384
    assert rows(16) == 64 and rows(5) == 16


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
    case = memory.Case("small", max_new_tokens=128, micro_batch_tokens=1024)
    case = memory.replace(case, **changes)
    whole = memory.simulate(case, memory.PHASES, 12)
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
    case = memory.Case(lora_rank=16, load_in_4bit=True, max_new_tokens=24)
    both = memory.estimate(case)
    for phase in ("sampling", "evaluation"):
        assert memory.estimate(case, (phase,))[phase] == pytest.approx(both[phase], rel=0.01)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0: must be a number from 1"),
        ({"load_in_4bit": True}, "add --lora-rank 16"),
        ({"sample_rows": 4}, "--sample-rows 4: must hold one group, --group-size 8"),
        ({"card": 0.0}, "--card 0.0: must be"),
        ({"card": float("nan")}, "--card nan: must be"),
        ({"card": 16.0, "model_name": None}, "--card: needs --model-name"),
        ({"kl_weight": float("nan")}, "--kl-weight nan: must be a number from 0"),
        ({"group_size": 1}, "--group-size 1: a completion is compared with its group"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0: must be at least 1"),
        ({"model_name": "data"}, "--model-name data: no such model"),
    ],
)
def test_wrong_values_end_in_one_line(changes, words):
    options = memory.Options(**({"model_name": "Qwen/Qwen2.5-0.5B-Instruct"} | changes))
    with pytest.raises(SystemExit) as error:
        memory.main(options)
    assert words in str(error.value) and "\n" not in str(error.value)
