"""Run by test_accelerate.py in several processes: a few updates on made-up groups for each of some
settings, and what came of them. Groups and weights do not depend on the number of processes.

    torchrun --nproc_per_node 2 tests/ranks_worker.py settings.json results.pt
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiment_accelerate"))

import train  # noqa: E402
from ranks import Ranks, process_group, without_ddp  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402


def make_groups(config, without_spread: list[int]):
    """Ragged groups of random ids. Those named by number have advantages of 0."""
    generator = torch.Generator().manual_seed(5)
    groups = []
    for number in range(config.rollouts_per_step):
        lengths = torch.randint(1, 12, (config.group_size,), generator=generator).tolist()
        draw = lambda n: torch.randint(3, 40, (n,), generator=generator)  # noqa: E731
        advantages = torch.linspace(-1.0, 1.5, config.group_size)
        if number in without_spread:
            advantages = torch.zeros(config.group_size)
        groups.append(
            train.Experience(
                prompt_ids=draw(4 + number),
                completion_ids=[draw(length) for length in lengths],
                completion_masks=[torch.ones(length) for length in lengths],
                sampled_log_probs=[
                    -5 - torch.rand(length, generator=generator) for length in lengths
                ],
                truncated=torch.zeros(config.group_size),
                completions=[""] * config.group_size,
                answer="0",
                advantages=advantages,
            )
        )
    return groups


def whole(tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norms_in_float64(model: torch.nn.Module) -> None:
    """Qwen2's own compute in float32, whatever the weights' precision."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Qwen2RMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


def updates(ranks: Ranks, settings: dict) -> dict:
    """Gradients of each update, weights after the last, and figures."""
    dtype = getattr(torch, settings.pop("dtype"))
    without_spread = settings.pop("without_spread")
    config = train.Config(**settings)
    device = torch.device("cpu")
    policy, reference = train.load_model(config, device)
    for model in filter(None, (policy, reference)):
        if not config.load_in_4bit:
            model.to(dtype)
        if dtype == torch.float64:
            norms_in_float64(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:  # else the adapter does nothing, and A has no gradient
            parameter.data.normal_(std=0.05, generator=generator)
    model = ranks.wrap(policy)
    reference = reference and ranks.wrap(reference)
    optimizer = train.make_optimizer(policy, config)
    scaler = train.make_scaler(config, device)
    objective = train.GRPOLoss(config.clip_eps_low, config.clip_eps_high, config.kl_weight)
    buffer = train.ReplayBuffer(True, ranks)
    buffer.extend(make_groups(config, without_spread))
    batches = buffer.batches(config, torch.Generator().manual_seed(2))
    train.add_old_and_reference_log_probs(model, reference, batches, config)
    gradients = []
    model.train()
    for batch in batches:
        if not batch:
            continue
        for micro_batch in batch:
            with ranks.without_sync(model, is_last=micro_batch is batch[-1]):
                log_probs = model(train.sequences_log_probs, micro_batch, config)
                loss = objective(log_probs, micro_batch)
                if micro_batch.is_filler:
                    objective.token_sums.pop()
                scaler.scale(loss).backward()
        found = {}
        for name, parameter in without_ddp(model).policy.named_parameters():
            if parameter.requires_grad:
                found[name] = whole(parameter.grad) / scaler.get_scale()
        gradients.append(found)
        train.optimizer_step(policy, optimizer, scaler, config)
    weights = {}
    for name, parameter in without_ddp(model).policy.named_parameters():
        weights[name] = whole(parameter).detach().clone()
    sums = ranks.sums_of_all(objective.token_sums)
    figures = train.loss_metrics(sums, [1.0] * len(gradients))
    return {"gradients": gradients, "weights": weights, "figures": figures}


def main(settings_path: str, result_path: str) -> None:
    ranks = Ranks()
    results = {}
    for name, settings in json.loads(Path(settings_path).read_text()).items():
        results[name] = updates(ranks, settings)
    if ranks.is_first:
        torch.save(results, result_path)


if __name__ == "__main__":
    with process_group():
        main(*sys.argv[1:])
