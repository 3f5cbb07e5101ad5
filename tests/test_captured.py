"""Sampling on a CUDA device: captured.py gives what the loop in sampling.py gives. Where there is
no such device, everything but the recording itself is tested."""

import pytest
import torch
from helpers import ARCHITECTURES, load_experiment, make_model

experiment = load_experiment()
train, captured, sampling = experiment.train, experiment.captured, experiment.sampling
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,  # see conftest.py
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
HISTORIES = [[11, 12, 13, 14, 15]] * 4 + [[20, 21]] * 4 + [[30, 2, 31, 0, 32, 33]] * 2
EOS_IDS = {2, 3, *range(40, 60)}  # so many that completions end at different lengths


def config_of(**changes):
    return train.Config(**{"precision": "float32", "max_new_tokens": 20, **changes})


def plain(policy, config, generator, monkeypatch):
    monkeypatch.setattr(sampling, "can_capture", lambda *_: False)
    return sampling.sample(policy, HISTORIES, EOS_IDS, config, generator)


def recorded(policy, config, generator):
    ids, log_probs, lengths = captured.sample_captured(
        policy, HISTORIES, EOS_IDS, config, generator
    )
    return sampling.cut(ids, lengths), sampling.cut(log_probs, lengths)


def assert_equal(found, expected):
    for ids, expected_ids in zip(found[0], expected[0], strict=True):
        assert ids.tolist() == expected_ids.tolist()
    for log_probs, expected_log_probs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [3, 128])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_equal_seeds_give_the_plain_loops_tokens(device, block, temperature, monkeypatch):
    """Temperature 0 stands for greedy."""
    monkeypatch.setattr(captured, "BLOCK", block)
    policy = make_model().to(device)
    config = config_of(temperature=temperature or 1.0)
    generators = [None, None]
    if temperature:
        generators = [torch.Generator(device).manual_seed(7) for _ in range(2)]
    found = recorded(policy, config, generators[0])
    if temperature:
        assert len({len(ids) for ids in found[0]}) > 3  # rows leave at several moments
    assert_equal(found, plain(policy, config, generators[1], monkeypatch))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if "short" not in name])
def test_architectures(device, architecture, attention, monkeypatch):
    policy = make_model(architecture, attention).to(device)
    config = config_of(max_length=64)  # less than the window of gemma3
    assert captured.can_capture(policy, config) == (device == "cuda")
    generators = [torch.Generator(device).manual_seed(3) for _ in range(2)]
    found = recorded(policy, config, generators[0])
    assert_equal(found, plain(policy, config, generators[1], monkeypatch))


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_is_merged_and_left_as_it_was(device, monkeypatch):
    config = config_of(lora_rank=4)
    policy, _ = train.load_model(config, torch.device(device))
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    generators = [torch.Generator(device).manual_seed(3) for _ in range(2)]
    found = recorded(policy, config, generators[0])
    assert_equal(found, plain(policy, config, generators[1], monkeypatch))
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())
    assert any(weight.requires_grad for weight in policy.parameters())
    with policy.disable_adapter():
        without = recorded(policy, config, torch.Generator(device).manual_seed(3))
    assert [ids.tolist() for ids in without[0]] != [ids.tolist() for ids in found[0]]


@pytest.mark.parametrize("device", DEVICES)
def test_log_probs_that_are_not_finite_end_the_run(device, capsys):
    policy = make_model().to(device)
    policy.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(SystemExit):
        recorded(policy, config_of(), torch.Generator(device).manual_seed(0))


def test_what_the_graph_cannot_do_goes_through_the_plain_loop():
    """A short window, 4-bit weights, another device. (Dialogues: see `sample`.)"""

    def policy(architecture="qwen2", device="cuda"):
        found = make_model(architecture)
        fields = {"device": torch.device(device), "config": found.config}
        return type("Policy", (torch.nn.Module,), fields)()

    assert captured.can_capture(policy(), config_of())
    assert not captured.can_capture(policy("gemma3-short-window"), config_of(max_length=64))
    assert not captured.can_capture(policy(), config_of(load_in_4bit=True))
    assert not captured.can_capture(policy(device="cpu"), config_of())
