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
    def estimate(case):
        training = case.micro_batch_tokens * memory.GIB / 1024
        return {"training": training, "sampling": case.sample_rows * memory.GIB / 8}

    monkeypatch.setattr(memory, "estimate", estimate)
    case = memory.Case(max_new_tokens=512)
    largest = memory.largest_that_fits
    assert largest(case, "micro_batch_tokens", "training", 16) == 8192  # 1.1 x 8 + 1 GiB
    assert largest(case, "sample_rows", "sampling", 16) == 64
    assert largest(case, "micro_batch_tokens", "training", 1) is None
