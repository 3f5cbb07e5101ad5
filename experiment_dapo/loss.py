"""The GRPO objective (2402.03300, equations 3 and 4), as one weighted sum over sampled tokens.

The paper maximises, over groups of G completions o_1 ... o_G of a prompt q,

    1/G sum_i 1/|o_i| sum_t { min[ ratio_it A_it, clip(ratio_it, 1 - eps, 1 + eps) A_it ]
                                - beta KL_it }

        ratio_it = pi(o_it | q, o_i,<t) / pi_old(o_it | q, o_i,<t)
        KL_it    = pi_ref / pi - log(pi_ref / pi) - 1

    paper              here
    o_i, |o_i|         a completion, the number of its sampled tokens
    log pi             log_probs: of the policy, with gradient
    log pi_old         old_log_probs: of the policy before this step's first update
    log pi_ref         reference_log_probs: of the policy that training began with
    A_it               advantages: one number for a completion, repeated for each of its tokens
    eps                clip_eps_low, clip_eps_high: two bounds, as in 2503.14476
    beta               kl_weight
    1/G 1/|o_i|        weights: 1/n 1/|o_i| with n = all completions of the optimizer batch.
                       Groups are equal in size, so it is the mean over them (`token_weights`)

A loss is minimised, so the sign is turned. The weights are computed once, over a whole optimizer
batch. A micro-batch that took its own mean would weigh a token by what happens to lie beside it.
So the losses of micro-batches just add up, and but for rounding, how a batch is cut never changes
the gradient.
"""

import math

import torch
from torch import Tensor, nn

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside any ratio in training, far inside float32


def log_ratio(log_probs: Tensor, other: Tensor) -> Tensor:
    """log_probs - other, in at least float32, bounded to +-20 so that its exponential is finite."""
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    difference = log_probs.to(dtype) - other.to(dtype)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def approx_kl_divergence(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || pi_ref) for each token: exp(x) - x - 1, x = log(pi_ref / pi).

    Its value is unbiased for tokens sampled from pi, as they are at a step's first update, and
    never negative (Schulman 2020, joschu.net/blog/kl-approx.html); its expected gradient there
    is that of KL(pi_ref || pi).

    Beyond the bound on x it is flat. If exp(x) alone were bounded, -x would remain and push the
    wrong way.
    """
    x = log_ratio(reference_log_probs, log_probs)
    return x.exp() - x - 1


def token_weights(
    completion_masks: list[Tensor], critic_type: str, generate_max_length: int
) -> list[Tensor]:
    """The weight of every token of an optimizer batch, completion by completion.

    completion_masks: for each completion (tokens,), 1 = sampled by the policy, 0 = given to it.
        All completions of the batch, also those whose advantage is zero.
    generate_max_length: the most tokens that a completion may sample, fixed for a run.

    critic_type changes only this average: by itself, drgrpo still divides advantages by the
    standard deviation, and dapo samples as ever. With n completions in the batch, and `length`
    the sampled tokens of one of them:

                the formula's nested means                          the weight of each token
        grpo    mean over completions (mean over its tokens)        1 / (n * length)
        drgrpo  mean over completions (sum / generate_max_length)   1 / (n * generate_max_length)
        dapo    mean over all tokens of the batch                   1 / (all sampled tokens)

    (2402.03300; 2503.20783; 2503.14476)
    """
    n = len(completion_masks)
    lengths = [mask.sum().item() for mask in completion_masks]
    if critic_type == "grpo":
        denominators = [n * max(length, 1) for length in lengths]
    elif critic_type == "drgrpo":
        denominators = [n * generate_max_length] * n
    elif critic_type == "dapo":
        denominators = [max(sum(lengths), 1)] * n
    else:
        raise ValueError(f"critic_type must be grpo, drgrpo or dapo, is {critic_type!r}")
    return [mask / denominator for mask, denominator in zip(completion_masks, denominators)]


class GRPOLoss(nn.Module):
    """A weighted sum over sampled tokens t.

    loss = sum_t w_t * ( policy_loss_t + kl_weight * KL_t )
    policy_loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - clip_eps_low, 1 + clip_eps_high) A_t)
    """

    def __init__(self, clip_eps_low: float, clip_eps_high: float, kl_weight: float) -> None:
        super().__init__()
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.kl_weight = kl_weight
        self.token_sums: list[dict[str, Tensor]] = []  # of each call, for `loss_metrics`

    def forward(self, log_probs: Tensor, micro_batch) -> Tensor:
        """The loss of a MicroBatch, a scalar. log_probs: (sampled tokens,), of the policy.

        Every field of the batch that is read is (sampled tokens,) too; reference_log_probs is
        not read where kl_weight is 0.
        """
        if micro_batch.old_log_probs is None:
            # The first batch of a step: no update came before it, so the old policy is the
            # present one. The ratio is pi / (pi as a constant): its value is exactly 1, its
            # gradient is that of log pi. It is kept for further passes over the batch.
            micro_batch.old_log_probs = log_probs.detach()

        ratio = log_ratio(log_probs, micro_batch.old_log_probs).exp()
        clipped_ratio = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
        surrogate = ratio * micro_batch.advantages
        clipped_surrogate = clipped_ratio * micro_batch.advantages
        # min: once the advantage has pushed the ratio past its bound, the gradient is 0. Past the
        # other bound it is not, so the token can still be pulled back.
        policy_loss = -torch.min(surrogate, clipped_surrogate)

        kl = None
        token_loss = policy_loss
        if self.kl_weight:
            kl = approx_kl_divergence(log_probs, micro_batch.reference_log_probs)
            token_loss = policy_loss + self.kl_weight * kl

        weights = micro_batch.weights
        loss = (weights * token_loss).sum()
        clipped = clipped_surrogate < surrogate
        # For the logs. Neither line changes the loss or its gradient.
        self.remember(loss, ratio, clipped, kl, micro_batch)
        micro_batch.seen = tokens_seen(policy_loss, log_probs, weights, ratio, clipped, kl)
        return loss

    @torch.no_grad()
    def remember(self, loss, ratio, clipped, kl, micro_batch) -> None:
        """Note what metrics.jsonl needs: sums over tokens, and the largest gap."""
        gap = (micro_batch.old_log_probs - micro_batch.sampled_log_probs).abs()
        sums = {
            "loss": loss.detach(),
            "tokens": torch.tensor(ratio.numel()),
            "clipped": clipped.sum(),
            "ratio": ratio.detach().sum(),
            "ratio_squared": ratio.detach().square().sum(),
            "gap": gap.max(),
        }
        if kl is not None:
            sums["kl"] = kl.detach().sum()
        self.token_sums.append(sums)


def tokens_seen(policy_loss, log_probs, weights, ratio, clipped, kl) -> dict[str, Tensor | None]:
    """What completions.jsonl tells of each token at this update, (sampled tokens,) each.

    push is minus the derivative of the loss, but for its KL term, by the token's log-prob: above 0
    the update makes the token likelier.
    """
    (gradient,) = torch.autograd.grad(policy_loss, log_probs, weights, retain_graph=True)
    return {
        "ratio": ratio.detach(),
        "clipped": clipped,
        "kl": None if kl is None else kl.detach(),
        "push": 0.0 - gradient,
    }


def loss_metrics(
    token_sums: list[dict[str, Tensor]], grad_norms: list[float], max_norm: float = math.inf
) -> dict[str, float | None]:
    """Figures of a step: means over tokens; of loss and gradient norm over updates."""
    max_norm = max_norm or math.inf  # 0: no clipping
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    of_updates = {
        "skipped_updates": len(grad_norms) - len(finite),
        "grad_clip_fraction": sum(n > max_norm for n in grad_norms) / max(len(grad_norms), 1),
    }
    if not finite:
        names = ("loss", "grad_norm", "kl", "clip_fraction", "ess", "max_log_prob_gap")
        return {**dict.fromkeys(names), **of_updates}
    total = {}
    for name in token_sums[0]:
        total[name] = sum(part[name].item() for part in token_sums)
    return {
        "loss": total["loss"] / len(grad_norms),
        "grad_norm": sum(finite) / len(finite),  # before it is scaled down to max_norm
        "kl": total["kl"] / total["tokens"] if "kl" in total else None,
        "clip_fraction": total["clipped"] / total["tokens"],
        # Effective sample size, a share: 1 where all ratios are equal, less the more they differ.
        "ess": total["ratio"] ** 2 / (total["tokens"] * total["ratio_squared"]),
        # Sampled against recomputed, where old log-probs are recomputed: in a step's first batch,
        # and in half precision in all. Rounding alone, or a bug in masks or positions.
        "max_log_prob_gap": max(part["gap"].item() for part in token_sums),
        **of_updates,
    }
