"""--attention flex_attention gives the log-probs and the gradient of torch's usual attention. A CPU
has its forward alone, uncompiled."""

import helpers
import pytest
import torch
from helpers import load_experiment, make_model
from test_packing import batches_of, config_of, group
from torch.nn.attention.flex_attention import flex_attention

experiment = load_experiment()
train = experiment.train
flex = experiment.flex
ROWS = [[40, 3, 90, 25], [60, 60, 1, 70], [30, 140, 2, 9], [5, 5, 5, 5]]


def batches(device):
    """One of four packed rows, padded to the longest, and four of one row each."""
    groups = [group(20 + i, lengths, seed=i) for i, lengths in enumerate(ROWS)]
    config = config_of(group_size=4, train_batch_size=16, rollouts_per_step=4)
    at_once = batches_of(groups, config)[0]
    config.micro_batch_tokens = 1
    alone = batches_of(groups, config)[0]
    return [micro_batch.to(device) for micro_batch in at_once + alone]


def log_probs_and_gradient(model, micro_batches, config):
    model.zero_grad()
    found = [train.sequences_log_probs(model, batch, config) for batch in micro_batches]
    (torch.cat(found) ** 2).sum().backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found).detach(), torch.cat(gradient)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
def test_the_forward_on_a_cpu(architecture, monkeypatch):
    monkeypatch.setattr(flex, "compiled", flex_attention)
    model = make_model(architecture)
    micro_batches = batches("cpu")
    config = config_of()
    with torch.no_grad():
        expected = [train.sequences_log_probs(model, b, config) for b in micro_batches]
        model.config._attn_implementation = flex.register()
        found = [train.sequences_log_probs(model, b, config) for b in micro_batches]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert all(flex.is_of_packed_rows(b.attention_mask(torch.float32)) for b in micro_batches)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_log_probs_and_gradient_on_a_gpu(architecture, monkeypatch):
    monkeypatch.setitem(helpers.SIZES, "hidden_size", 128)  # heads of 32: the kernel wants 16
    model = make_model(architecture).to("cuda")
    micro_batches = batches("cuda")
    config = config_of()
    expected = log_probs_and_gradient(model, micro_batches, config)
    model.config._attn_implementation = flex.register()
    found = log_probs_and_gradient(model, micro_batches, config)
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=1e-4)
    gap = (found[1] - expected[1]).norm() / expected[1].norm()
    assert gap < 1e-3


def test_everything_else_goes_to_the_usual_attention():
    """Sampling, whose masks are boolean or of one token, and no mask at all."""
    assert not flex.is_of_packed_rows(None)
    assert not flex.is_of_packed_rows(torch.ones(2, 1, 5, 5, dtype=torch.bool))
    assert not flex.is_of_packed_rows(torch.zeros(2, 1, 1, 1))
    assert not flex.is_of_packed_rows(torch.zeros(2, 1, 1, 9))
