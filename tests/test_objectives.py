"""GSPO and CISPO: numbers computed by hand, the papers' formulas, and TRL's own losses."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import load_experiment, make_model
from test_loss import LENGTHS, token_weights, trl_loss
from test_packing import config_of, one_batch, ragged_groups

EXPERIMENTS = {name: load_experiment(f"experiment_{name}") for name in ("base", "gspo", "cispo")}


def batch_of(old, advantages, lengths, weights=None, reference=None):
    """What the losses read of a MicroBatch. old: (sampled tokens,). advantages: of completions."""
    lengths = torch.tensor(lengths)
    if weights is None:
        weights = torch.ones(len(old), dtype=old.dtype)
    return SimpleNamespace(
        sampled_log_probs=old.detach(),
        old_log_probs=old,
        advantages=torch.tensor(advantages, dtype=old.dtype).repeat_interleave(lengths),
        weights=weights,
        reference_log_probs=reference,
        completion=torch.arange(len(lengths)).repeat_interleave(lengths),
        origins=[(None, i) for i in range(len(lengths))],
    )


def objective_of(name, kl_weight=0.0):
    """An experiment's objective with its own bounds."""
    config = EXPERIMENTS[name].train.Config()
    loss = EXPERIMENTS[name].loss
    return loss.GRPOLoss(config.clip_eps_low, config.clip_eps_high, kl_weight)


def pushes(name, ratios, advantage):
    """What an update does to each token of a completion: minus the gradient by its log-prob."""
    old = torch.full((len(ratios),), -1.0, dtype=torch.float64)
    log_probs = (old + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    loss = objective_of(name)(log_probs, batch_of(old, [advantage], [len(ratios)]))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return [pytest.approx(-g, abs=1e-4) for g in gradient.tolist()]


# ---------------------------------------------------------------- by hand
MOVED = [1.5, 1, 1, 1]  # one token's ratio; their geometric mean is 1.5 ** (1 / 4) = 1.1067
BALANCED = [1.5, 0.8, 0.9, 1 / 1.08]  # the others have fallen; the geometric mean is 1


@pytest.mark.parametrize(
    "name, ratios, advantage, expected",
    [
        # The first update: every objective is the plain policy gradient.
        *[(name, [1, 1, 1, 1], 1, [1, 1, 1, 1]) for name in EXPERIMENTS],
        *[(name, [1, 1, 1, 1], -1, [-1, -1, -1, -1]) for name in EXPERIMENTS],
        # GRPO leaves out the token, GSPO the completion, CISPO nothing.
        ("base", MOVED, 1, [0, 1, 1, 1]),
        ("gspo", MOVED, 1, [0, 0, 0, 0]),
        ("cispo", MOVED, 1, [1.5, 1, 1, 1]),
        ("base", MOVED, -1, [-1.5, -1, -1, -1]),
        ("gspo", MOVED, -1, [-1.1067] * 4),
        ("cispo", MOVED, -1, [-1.5, -1, -1, -1]),
        ("base", BALANCED, 1, [0, 0.8, 0.9, 0.9259]),
        ("gspo", BALANCED, 1, [1, 1, 1, 1]),
        ("cispo", BALANCED, 1, [1.5, 0.8, 0.9, 0.9259]),
        # Beyond the bounds of CISPO's weight: 5 above, none below.
        ("cispo", [7, 0.01], 1, [5, 0.01]),
        ("cispo", [7, 0.01], -1, [-5, -0.01]),
        ("base", [7, 0.01], -1, [-7, 0]),
    ],
)
def test_what_an_update_does_to_each_token(name, ratios, advantage, expected):
    """The worked numbers of the READMEs of experiment_gspo and experiment_cispo."""
    assert expected == pushes(name, ratios, advantage)


def test_gspos_ratio_is_the_geometric_mean_and_not_the_product():
    """Pitfall 48: with a sum over tokens long completions are clipped because they are long."""
    ratios = torch.tensor([1.0002] * 1000 + [0.5, 2.0, 1.1], dtype=torch.float64)
    batch = batch_of(torch.zeros(1003, dtype=torch.float64), [1.0, 1.0], [1000, 3])
    found = EXPERIMENTS["gspo"].loss.sequence_ratio(ratios.log(), batch)
    assert found[:1000].tolist() == pytest.approx([1.0002] * 1000, rel=1e-9)
    assert found[1000:].tolist() == pytest.approx([1.1 ** (1 / 3)] * 3, rel=1e-9)


def test_gspo_clips_all_tokens_of_a_completion_or_none():
    old = torch.full((6,), -2.0, dtype=torch.float64)
    log_probs = (old + torch.tensor([0.9, 0.0, 0.0, 2e-4, -1e-4, 3e-4])).requires_grad_()
    objective = objective_of("gspo")
    batch = batch_of(old, [1.0, 1.0], [3, 3])
    objective(log_probs, batch)
    assert batch.seen["clipped"].tolist() == [True] * 3 + [False] * 3
    assert objective.token_sums[-1]["clipped"] == 3


# ---------------------------------------------------------------- the papers' formulas
def off_policy(dtype=torch.float64, seed=3):
    """Padded (8 completions, 8 tokens): log-probs, old and reference ones, mask, advantages."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = -3 * torch.rand(8, 8, generator=generator, dtype=dtype)
    noise = 0.3 * torch.randn(2, 8, 8, generator=generator, dtype=dtype)
    noise[:, :4] /= 1000  # some completions within GSPO's bounds
    noise[:, 4:] *= 5  # and some tokens beyond CISPO's
    mask = (torch.arange(8) < torch.tensor(LENGTHS)[:, None]).to(dtype)
    mask[3, 2:4] = 0  # tokens that were given to the policy
    advantages = torch.randn(8, generator=generator, dtype=dtype)
    return log_probs, log_probs + noise[0], log_probs + noise[1], mask, advantages


def ours(objective, critic, log_probs, old, reference, mask, advantages):
    """(loss, gradient by the padded log-probs, what the objective was given)."""
    log_probs = log_probs.clone().requires_grad_()
    weights = torch.stack(token_weights(list(mask), critic, generate_max_length=10))
    sampled = mask.bool()
    lengths = mask.sum(1).long().tolist()
    batch = batch_of(
        old[sampled], advantages.tolist(), lengths, weights[sampled], reference[sampled]
    )
    loss = objective(log_probs[sampled], batch)
    loss.backward()
    return loss, log_probs.grad, batch


CRITIC = {"gspo": "grpo", "cispo": "dapo"}


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("name", CRITIC)
def test_loss_and_gradient_equal_the_formula(name, kl_weight):
    """Equation 5 of 2507.18071, equations 4 and 5 of 2506.13585, one completion at a time."""
    log_probs, old, reference, mask, advantages = off_policy()
    objective = objective_of(name, kl_weight)
    loss, gradient, batch = ours(
        objective, CRITIC[name], log_probs, old, reference, mask, advantages
    )
    policy = log_probs.clone().requires_grad_()
    terms = []
    for i in range(8):
        is_sampled = mask[i].bool()
        now, before = policy[i][is_sampled], old[i][is_sampled]
        x = reference[i][is_sampled] - now
        kl = kl_weight * (x.exp() - x - 1)
        ratio = now.exp() / before.exp()
        if name == "gspo":
            s = ratio.prod() ** (1 / len(now))
            bounded = s.clamp(1 - 3e-4, 1 + 4e-4)
            surrogate = torch.min(s * advantages[i], bounded * advantages[i])
            terms.append((-surrogate + kl.mean())[None])
        else:
            with torch.no_grad():
                weight = ratio.clamp(max=5)
            terms.append(-weight * advantages[i] * now + kl)
    expected = torch.cat(terms).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, policy.grad, rtol=1e-9, atol=1e-15)
    assert 0 < batch.seen["clipped"].sum() < len(batch.advantages)


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("eps_low, eps_high", [(3e-4, 4e-4), (0.01, 0.02)])
def test_gspo_is_trls_sequence_level_ratio(eps_low, eps_high, kl_weight):
    log_probs, old, reference, mask, advantages = off_policy()
    theirs = log_probs.clone().requires_grad_()
    tensors = (theirs, mask, old, reference, advantages)
    expected, figures = trl_loss("grpo", eps_low, eps_high, kl_weight, *tensors, level="sequence")
    expected.backward()
    objective = EXPERIMENTS["gspo"].loss.GRPOLoss(eps_low, eps_high, kl_weight)
    loss, gradient, _ = ours(objective, "grpo", log_probs, old, reference, mask, advantages)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, theirs.grad, rtol=1e-9, atol=1e-15)
    assert figures["clip_ratio/region_mean"] > 0 and gradient[mask.bool()].abs().max() > 0


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("cap", [1.1, 5.0])
def test_cispo_is_trls(cap, kl_weight):
    """TRL's epsilon_high is the cap itself, where the paper's and ours is the cap minus 1."""
    log_probs, old, reference, mask, advantages = off_policy()
    theirs = log_probs.clone().requires_grad_()
    tensors = (theirs, mask, old, reference, advantages)
    expected, _ = trl_loss("cispo", 0.2, cap, kl_weight, *tensors)
    expected.backward()
    objective = EXPERIMENTS["cispo"].loss.GRPOLoss(1.0, cap - 1, kl_weight)
    loss, gradient, batch = ours(objective, "dapo", log_probs, old, reference, mask, advantages)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, theirs.grad, rtol=1e-9, atol=1e-15)
    assert 0 < batch.seen["clipped"].sum() < len(batch.weights)


# ---------------------------------------------------------------- properties
@pytest.mark.parametrize("name", CRITIC)
def test_the_first_update_is_grpos(name):
    """Before any update every ratio is 1, and the gradient does not depend on how ratios are
    clipped. The token weights are the same on both sides here."""
    log_probs, _, _, mask, advantages = off_policy()
    arguments = (CRITIC[name], log_probs, log_probs, log_probs, mask, advantages)
    _, gradient, _ = ours(objective_of(name), *arguments)
    _, expected, _ = ours(objective_of("base"), *arguments)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CRITIC)
def test_how_a_batch_is_cut_never_changes_the_gradient(name):
    """Pitfall 48: a completion is in one micro-batch, so GSPO's mean is over all of its tokens."""
    experiment, model = EXPERIMENTS[name], make_model()
    gradients, counts = [], []
    for micro_batch_tokens, packed in [(4096, True), (64, True), (26, True), (1, True), (1, False)]:
        config = config_of(critic_type=CRITIC[name], micro_batch_tokens=micro_batch_tokens)
        batch = one_batch(ragged_groups(torch.float32), config, packed)
        objective = objective_of(name)
        model.zero_grad()
        for micro_batch in batch:
            log_probs = experiment.train.sequences_log_probs(model, micro_batch, config)
            # by the token's number; small and odd, so that GSPO clips some completions
            shift = 1e-3 * torch.sin(micro_batch.sampled_log_probs)
            micro_batch.old_log_probs = log_probs.detach() + shift
            objective(log_probs, micro_batch).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        counts.append(len(batch))
        if name == "gspo":
            clipped = sum(sums["clipped"] for sums in objective.token_sums)
            assert 0 < clipped < sum(sums["tokens"] for sums in objective.token_sums)
    assert counts[0] == 1 and max(counts) == 8
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-4 * gradients[0].norm() > 0


@pytest.mark.parametrize("name", CRITIC)
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("difference", [-1e4, -100.0, -5.0, 5.0, 100.0, 1e4])
def test_extreme_ratios_stay_finite(name, difference, advantage):
    """Bug: the ratio overflows, and inf * 0 is NaN."""
    old = torch.tensor([-1.0, -1.0])
    log_probs = (old + torch.tensor([difference, 0.0])).requires_grad_()
    loss = objective_of(name)(log_probs, batch_of(old, [advantage], [2]))
    loss.backward()
    assert loss.isfinite() and log_probs.grad.isfinite().all()
    assert (log_probs.grad * advantage <= 0).all()


def test_a_completion_goes_as_far_as_its_bound():
    """Gradient ascent on one completion of two tokens: it stops soon after 1 + 4e-4, GRPO's goes
    on to 1.2."""
    ends = {}
    for name in ("base", "gspo"):
        log_probs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
        batch = batch_of(log_probs.detach().clone(), [1.0], [2])
        for _ in range(10_000):
            (gradient,) = torch.autograd.grad(objective_of(name)(log_probs, batch), log_probs)
            with torch.no_grad():
                log_probs -= 1e-4 * gradient
        ends[name] = (log_probs - batch.old_log_probs).exp().tolist()
    assert ends["gspo"] == pytest.approx([1 + 4e-4] * 2, abs=2e-4)
    assert ends["base"] == pytest.approx([1.2] * 2, abs=2e-4)


def test_the_constants_of_both():
    gspo, cispo = EXPERIMENTS["gspo"].train.Config(), EXPERIMENTS["cispo"].train.Config()
    assert (gspo.clip_eps_low, gspo.clip_eps_high, gspo.critic_type) == (3e-4, 4e-4, "grpo")
    assert (cispo.clip_eps_low, cispo.clip_eps_high, cispo.critic_type) == (1.0, 4.0, "dapo")
    assert cispo.kl_weight == 0 and math.isfinite(cispo.clip_eps_high)
