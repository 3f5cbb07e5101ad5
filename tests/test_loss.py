"""The objective: hand-computed weights, losses and gradients,
and the same figures as TRL's own loss."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers import load_experiment, make_model
from trl import GRPOTrainer

experiment = load_experiment()
loss_module = experiment.loss
GRPOLoss = loss_module.GRPOLoss
token_weights = loss_module.token_weights
masked_mean = experiment.run.masked_mean
approx_kl_divergence, log_ratio = loss_module.approx_kl_divergence, loss_module.log_ratio
CRITICS = ("grpo", "drgrpo", "dapo")


def loss_of(objective, log_probs, batch):
    """(the loss, the sums over tokens that `loss_metrics` reads)."""
    loss = objective(log_probs, batch)
    return loss, objective.token_sums[-1]


def batch_of(old, advantages, weights, reference=None):
    """What GRPOLoss reads of a MicroBatch."""
    return SimpleNamespace(
        sampled_log_probs=old.detach(),
        old_log_probs=old,
        advantages=advantages,
        weights=weights,
        reference_log_probs=reference,
    )


# ---------------------------------------------------------------- means and weights
def test_masked_mean():
    """Pitfall 14: a mean over masked positions too depends on how much padding there is."""
    values = torch.tensor([[1.0, 2.0, 100.0], [3.0, 100.0, 100.0], [100.0, 100.0, 100.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert masked_mean(values, mask).item() == 2
    # a fully masked row is 0, not NaN
    assert [masked_mean(*row).item() for row in zip(values, mask)] == [1.5, 3, 0]
    assert masked_mean(values, torch.zeros(3, 3)).item() == 0


# 3, 2 and 0 sampled tokens
MASKS = [torch.tensor([1, 1, 1]), torch.tensor([1, 0, 0, 1]), torch.tensor([0, 0])]


@pytest.mark.parametrize(
    "critic, expected",
    [
        ("grpo", [[1 / 9] * 3, [1 / 6, 0, 0, 1 / 6], [0, 0]]),  # 1 / (length * 3 completions)
        ("drgrpo", [[1 / 30] * 3, [1 / 30, 0, 0, 1 / 30], [0, 0]]),  # 1 / (10 * 3 completions)
        ("dapo", [[1 / 5] * 3, [1 / 5, 0, 0, 1 / 5], [0, 0]]),  # 1 / 5 sampled tokens
    ],
)
def test_token_weights_by_hand(critic, expected):
    """Pitfalls 14, 15, 26: tokens that were not sampled have no weight and are in no
    denominator."""
    weights = token_weights(MASKS, critic, generate_max_length=10)
    assert [row.tolist() for row in weights] == [pytest.approx(row) for row in expected]


def test_weights_of_a_batch_without_a_sampled_token_are_zero():
    for critic in CRITICS:
        assert [row.tolist() for row in token_weights([torch.zeros(2)] * 2, critic, 10)] == [
            [0, 0],
            [0, 0],
        ]


# ---------------------------------------------------------------- the objective by hand
RATIOS = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def test_loss_by_hand():
    """With bounds 0.8 and 1.3: -min(1.5, 1.3), -min(-1.5, -1.3),
    -min(0.5, 0.8), -min(-0.5, -0.8)."""
    old = torch.full((4,), -2.0, dtype=torch.float64)
    log_probs = (old + RATIOS.log()).requires_grad_()
    reference = (log_probs + torch.tensor([2.0, 1.0, 1.0, 0.5]).double().log()).detach()
    k3 = [2 - math.log(2) - 1, 0, 0, 0.5 + math.log(2) - 1]

    batch = batch_of(old, ADVANTAGES, WEIGHTS)
    loss, sums = loss_of(GRPOLoss(0.2, 0.3, kl_weight=0.0), log_probs, batch)
    policy_loss = 0.1 * -1.3 + 0.2 * 1.5 + 0.3 * -0.5 + 0.4 * 0.8
    assert loss.item() == pytest.approx(policy_loss, rel=1e-12)
    assert [sums[name].item() for name in ("clipped", "ratio", "tokens")] == pytest.approx(
        [2, 4, 4]
    )
    assert sums["ratio_squared"].item() == pytest.approx(2 * 1.5**2 + 2 * 0.5**2)
    # The gradient is -w * r * A, and 0 where the clip holds: going on in the same direction earns
    # nothing.
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.tolist() == pytest.approx([0, 0.2 * 1.5, -0.3 * 0.5, 0])

    batch = batch_of(old, ADVANTAGES, WEIGHTS, reference)
    loss, sums = loss_of(GRPOLoss(0.2, 0.3, kl_weight=0.5), log_probs, batch)
    assert loss.item() == pytest.approx(policy_loss + 0.5 * (0.1 * k3[0] + 0.4 * k3[3]), rel=1e-12)
    assert sums["kl"].item() == pytest.approx(sum(k3))
    # d k3 / d log_prob = 1 - reference / policy
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.tolist() == pytest.approx(
        [0.5 * 0.1 * (1 - 2), 0.3, -0.15, 0.5 * 0.4 * (1 - 0.5)]
    )


def test_loss_metrics_by_hand():
    """Losses of micro-batches add up within an update;
    kl, clip fraction and ESS are over all tokens of a step."""
    names = ("loss", "kl", "clipped", "ratio", "ratio_squared", "tokens", "gap")
    parts = [(0.5, 2.0, 1, 3.0, 5.0, 2, 0.1), (0.1, 1.0, 0, 4.0, 4.0, 4, 0.3)]
    sums = [
        {name: torch.tensor(float(value)) for name, value in zip(names, part)} for part in parts
    ]
    metrics = loss_module.loss_metrics(sums, grad_norms=[3.0])
    expected = {
        "loss": 0.6,
        "kl": 0.5,
        "clip_fraction": 1 / 6,
        "ess": 49 / (6 * 9),
        "max_log_prob_gap": 0.3,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["grad_norm"] == 3 and metrics["skipped_updates"] == 0
    # a mean over updates
    assert loss_module.loss_metrics(sums, grad_norms=[3.0, 1.0])["loss"] == pytest.approx(0.3)


# ---------------------------------------------------------------- extremes
@pytest.mark.parametrize(
    "difference", [-math.inf, -1e4, -100.0, -20.5, -19.0, -1.0, 1.0, 19.0, 20.5, 90.0, 1e4]
)
def test_k3_at_extreme_log_ratios(difference):
    """Pitfall 17: exp overflows from 89 on,
    and a bound in the exponent alone turns the sign of the gradient."""
    reference = torch.tensor([-1.0])
    log_probs = (reference + difference).requires_grad_()
    kl = approx_kl_divergence(log_probs, reference)
    (gradient,) = torch.autograd.grad(kl.sum(), log_probs)
    assert kl.isfinite().all() and kl.item() >= 0 and gradient.isfinite().all()
    # descending never leads away from the reference
    assert gradient.item() * (1 if difference > 0 else -1) >= 0
    assert (gradient.item() != 0) == (abs(difference) < 20)


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("difference", [-1e4, -100.0, -5.0, 5.0, 100.0, 1e4])
def test_loss_at_extreme_log_ratios(difference, advantage):
    """Pitfall 17: the ratio itself overflows too, and inf * 0 is NaN."""
    old = torch.tensor([-1.0])
    log_probs = (old + difference).requires_grad_()
    batch = batch_of(old, torch.tensor([advantage]), torch.ones(1), old)
    loss, sums = loss_of(GRPOLoss(0.2, 0.2, 0.0), log_probs, batch)
    loss.backward()
    assert loss.isfinite() and all(value.isfinite().all() for value in sums.values())
    assert log_probs.grad.isfinite().all() and log_probs.grad.item() * advantage <= 0


def test_no_advantage_and_an_extreme_ratio_is_zero():
    batch = batch_of(torch.tensor([-1e4]), torch.zeros(1), torch.ones(1))
    log_probs = torch.tensor([0.0], requires_grad=True)
    loss = GRPOLoss(0.2, 0.2, 0.0)(log_probs, batch)
    loss.backward()
    assert loss.item() == 0 and log_probs.grad.item() == 0


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    + [(d, d) for d in (torch.float32, torch.float64)],
)
def test_ratios_are_at_least_float32(dtype, expected):
    """Pitfall 17: half precision has no digits for a ratio near 1, and float64 is left alone."""
    log_probs = torch.tensor([-1.0], dtype=dtype)
    assert (
        log_ratio(log_probs, log_probs).dtype
        == approx_kl_divergence(log_probs, log_probs).dtype
        == expected
    )


def test_a_ratio_near_one_survives_half_precision():
    log_probs, old = torch.tensor([-1.0], dtype=torch.bfloat16), torch.tensor([-1.0001])
    assert log_ratio(log_probs, old).exp().item() == pytest.approx(1.0001, abs=1e-6)


# ---------------------------------------------------------------- the first update
LENGTHS = [5, 1, 3, 8, 2, 2, 7, 4]  # of eight ragged completions, two groups of four
REWARDS = torch.tensor([[1.1, 0.1, 0.0, 0.0], [0.0, 1.1, 1.1, 0.1]], dtype=torch.float64)


def ragged(dtype=torch.float64, seed=0):
    """Per completion: a context and a target for each token, advantages,
    the old log-probs and the reference's."""
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.cat([experiment.train.group_advantages(rewards) for rewards in REWARDS])
    rows = []
    for length, advantage in zip(LENGTHS, advantages):
        context, target = torch.randint(0, 11, (2, length), generator=generator)
        old, reference = -2.4 + 0.3 * torch.randn(
            2, length, generator=generator, dtype=torch.float64
        )
        rows.append(
            (
                context,
                target,
                advantage.expand(length).to(dtype),
                old.to(dtype),
                reference.to(dtype),
            )
        )
    return rows


def bigram(dtype=torch.float64):
    """The smallest policy there is: a table of logits, (previous token, next token)."""
    return (
        torch.randn(11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


@pytest.mark.parametrize("critic", CRITICS)
def test_loss_and_kl_of_the_first_update(critic):
    """Pitfall 18: "my loss is 0" is right for GRPO, whose gradient is not 0 all the same.

    Ratios are 1, so the loss is minus the weighted sum of the advantages: 0 where completions weigh
    the same, else minus their length-weighted mean."""
    table, rows = bigram(), ragged()
    context, target, advantages, _, _ = map(torch.cat, zip(*rows))
    log_probs = table.log_softmax(-1)[context, target]
    masks = [torch.ones(length, dtype=torch.float64) for length in LENGTHS]
    weights = torch.cat(token_weights(masks, critic, generate_max_length=10))
    batch = batch_of(log_probs.detach(), advantages, weights, log_probs.detach())
    loss, sums = loss_of(GRPOLoss(0.2, 0.2, kl_weight=0.5), log_probs, batch)
    weighted = sum(length * row[2][0].item() for length, row in zip(LENGTHS, rows))
    expected = {"grpo": 0, "drgrpo": -weighted / (10 * 8), "dapo": -weighted / sum(LENGTHS)}
    assert loss.item() == pytest.approx(expected[critic], abs=1e-12) and abs(weighted) > 1
    (gradient,) = torch.autograd.grad(loss, table)
    assert gradient.abs().max() > 1e-3
    metrics = loss_module.loss_metrics([sums], [1.0])
    # pitfall 16: ratio exactly 1
    assert metrics["kl"] == 0 and metrics["clip_fraction"] == 0 and metrics["ess"] == 1


# ---------------------------------------------------------------- accumulation
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("critic", CRITICS)
def test_micro_batches_add_up(critic, dtype, tolerance):
    """Pitfall 15: 1 x 8 equals 4 x 2 and 8 x 1 on ragged lengths;
    a mean per micro-batch would not."""
    rows, masks = ragged(dtype), [torch.ones(length, dtype=dtype) for length in LENGTHS]
    weights = token_weights(masks, critic, generate_max_length=10)

    def update(size):
        table, total = bigram(dtype), 0
        for i in range(0, 8, size):
            context, target, advantages, old, reference = map(torch.cat, zip(*rows[i : i + size]))
            batch = batch_of(old, advantages, torch.cat(weights[i : i + size]), reference)
            loss = GRPOLoss(0.2, 0.28, kl_weight=0.1)(table.log_softmax(-1)[context, target], batch)
            loss.backward()
            total += loss.item()
        return table.grad, total

    gradient, total = update(8)
    for size in (1, 2, 4):
        other, other_total = update(size)
        assert (other - gradient).norm() <= tolerance * gradient.norm()
        assert other_total == pytest.approx(total, rel=tolerance)


# ---------------------------------------------------------------- TRL
def trl_loss(
    loss_type,
    eps_low,
    eps_high,
    kl_weight,
    log_probs,
    mask,
    old,
    reference,
    advantages,
    level="token",
):
    """(loss, metrics) of TRL's own GRPOTrainer._compute_loss for padded (completions, tokens)
    log-probs: one update of one micro-batch. level: "sequence" for GSPO."""
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__.update(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            log_probs,
            torch.zeros_like(log_probs),
            None,
        ),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(
            gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
        ),
        _metrics={"train": defaultdict(list)},
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=10,
        loss_type=loss_type,
        beta=kl_weight,
        epsilon_low=eps_low,
        epsilon_high=eps_high,
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(mask),
        "tool_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("eps_low, eps_high", [(0.2, 0.2), (0.2, 0.28)])
@pytest.mark.parametrize(
    "critic, loss_type", [*zip(CRITICS, ("grpo", "dr_grpo", "dapo")), ("dapo", "bnpo")]
)
def test_same_loss_and_gradient_as_trl(critic, loss_type, eps_low, eps_high, kl_weight):
    generator = torch.Generator().manual_seed(3)
    log_probs = -3 * torch.rand(8, 8, generator=generator, dtype=torch.float64)
    old, reference = log_probs + 0.3 * torch.randn(
        2, 8, 8, generator=generator, dtype=torch.float64
    )
    mask = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).double()
    mask[3, 2:4] = 0  # tokens that were given to the policy
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)

    theirs = log_probs.clone().requires_grad_()
    arguments = (loss_type, eps_low, eps_high, kl_weight, theirs, mask, old, reference, advantages)
    expected, figures = trl_loss(*arguments)
    expected.backward()

    ours, sampled = log_probs.clone().requires_grad_(), mask.bool()
    weights = torch.stack(token_weights(list(mask), critic, generate_max_length=10))
    flat = (old, advantages[:, None].expand(8, 8), weights, reference)
    batch = batch_of(*(x[sampled] for x in flat))
    loss, sums = loss_of(GRPOLoss(eps_low, eps_high, kl_weight), ours[sampled], batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-15)
    metrics = loss_module.loss_metrics([sums], [1.0])
    assert (
        metrics["clip_fraction"] == pytest.approx(figures["clip_ratio/region_mean"])
        and metrics["clip_fraction"] > 0
    )
    assert (
        metrics["kl"] == pytest.approx(figures["kl"], rel=1e-6)
        if kl_weight
        else metrics["kl"] is None
    )


# ---------------------------------------------------------------- precision
def test_trained_weights_are_float32_whatever_the_checkpoint_has(tmp_path):
    """Pitfall 22: in bfloat16 a weight of 1.0 swallows an update of 6e-4,
    and training stands still."""
    make_model().bfloat16().save_pretrained(tmp_path)
    config = experiment.train.Config(model_name=str(tmp_path), precision="bfloat16")
    policy, _ = experiment.model.load_model(config, torch.device("cpu"))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    weight = next(parameter for name, parameter in policy.named_parameters() if "norm" in name)
    with torch.no_grad():
        weight.fill_(1.0)
        weight.sub_(6e-4)
    assert weight.max().item() < 1 and (torch.tensor(1.0).bfloat16() - 6e-4).item() == 1
