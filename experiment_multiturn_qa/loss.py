"""The GRPO objective, written as one weighted sum over the sampled tokens of an optimizer batch.

The weights are computed once, over the whole batch, so the losses of its micro-batches add up: how it is cut for memory
never changes the gradient. GRPO, Dr. GRPO and DAPO differ by the denominator in `token_weights`.
"""

import math

import torch
from torch import Tensor, nn

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside any ratio that training should meet, far inside float32


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is 1, over `dim` or over everything; 0 where nothing is marked."""
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def log_ratio(log_probs: Tensor, other: Tensor) -> Tensor:
    """log_probs - other in at least float32, bounded to +-20, so that its exponential is finite."""
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    return (log_probs.to(dtype) - other.to(dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def approx_kl_divergence(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) for each token: exp(x) - x - 1 with x = log(reference / policy).

    Unbiased for tokens sampled from the policy, and never negative (Schulman 2020, joschu.net/blog/kl-approx.html).
    Beyond the bound on x it is flat; a bound inside the exponent alone would turn the sign of the gradient there.
    """
    x = log_ratio(reference_log_probs, log_probs)
    return x.exp() - x - 1


def token_weights(masks: list[Tensor], critic_type: str, generate_max_length: int) -> list[Tensor]:
    """The weight of every token of an optimizer batch, completion by completion.

    masks: per completion (tokens,), 1 = sampled by the policy, 0 = given to it; all completions of the batch,
    also those that are not forwarded because their advantage is zero. `generate_max_length` is the most tokens that
    a completion may sample, fixed for a run. With n completions, the one at hand of `length` sampled tokens:

        grpo     1 / (length * n)                 a mean over each completion, then over completions (2402.03300)
        drgrpo   1 / (generate_max_length * n)    the same constant for every token (2503.20783)
        dapo     1 / (all sampled tokens)         a mean over all tokens (2503.14476)
    """
    lengths = [mask.sum().item() for mask in masks]
    denominators = {
        "grpo": [max(length, 1) * len(masks) for length in lengths],
        "drgrpo": [generate_max_length * len(masks)] * len(masks),
        "dapo": [max(sum(lengths), 1)] * len(masks),
    }[critic_type]
    return [mask / denominator for mask, denominator in zip(masks, denominators)]


class GRPOLoss(nn.Module):
    """Clipped surrogate with a KL penalty, summed over tokens t with their weights w:

        sum_t w_t * ( -min(r_t A_t, clip(r_t, 1 - clip_eps_low, 1 + clip_eps_high) A_t) + kl_weight * k3_t )

    where r_t = policy / old policy (equation 3 of 2402.03300; two clip bounds as in 2503.14476).
    """

    def __init__(self, clip_eps_low: float, clip_eps_high: float, kl_weight: float) -> None:
        super().__init__()
        self.clip_eps_low, self.clip_eps_high, self.kl_weight = clip_eps_low, clip_eps_high, kl_weight

    def forward(self, log_probs: Tensor, batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and sums over tokens for `loss_metrics`. log_probs, and of a MicroBatch old_log_probs,
        reference_log_probs (not read where kl_weight is 0), advantages and weights: (sampled tokens,)."""
        ratio = log_ratio(log_probs, batch.old_log_probs).exp()
        clipped_ratio = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
        surrogate, clipped_surrogate = ratio * batch.advantages, clipped_ratio * batch.advantages
        token_loss = -torch.min(surrogate, clipped_surrogate)
        sums = {"tokens": torch.tensor(ratio.numel()), "clipped": (clipped_surrogate < surrogate).sum()}
        sums |= {"ratio": ratio.sum(), "ratio_squared": ratio.square().sum()}
        if self.kl_weight:
            kl = approx_kl_divergence(log_probs, batch.reference_log_probs)
            token_loss, sums["kl"] = token_loss + self.kl_weight * kl, kl.sum()
        loss = sums["loss"] = (batch.weights * token_loss).sum()
        sums["gap"] = (batch.old_log_probs - batch.sampled_log_probs).abs().max()
        return loss, {name: value.detach() for name, value in sums.items()}


def loss_metrics(sums: list[dict[str, Tensor]], grad_norms: list[float]) -> dict[str, float | None]:
    """Figures of a step from GRPOLoss's sums: means over tokens; loss and gradient norm are means over updates."""
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    if not finite:
        figures = dict.fromkeys(("loss", "grad_norm", "kl", "clip_fraction", "ess", "max_log_prob_gap"))
        return {**figures, "skipped_updates": len(grad_norms)}
    total = {name: sum(part[name].item() for part in sums) for name in sums[0]}
    return {
        "loss": total["loss"] / len(grad_norms),
        "grad_norm": sum(finite) / len(finite),  # before it is scaled down to max_norm
        "kl": total["kl"] / total["tokens"] if "kl" in total else None,
        "clip_fraction": total["clipped"] / total["tokens"],
        "ess": total["ratio"] ** 2 / (total["tokens"] * total["ratio_squared"]),
        "max_log_prob_gap": max(part["gap"].item() for part in sums),  # sampled against recomputed
        "skipped_updates": len(grad_norms) - len(finite),
    }
