"""experiment_accelerate/train.py, with completions that depend on the prompt alone: whoever samples
them, they are the same. Run by test_accelerate.py.
"""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiment_accelerate"))

import ranks  # noqa: E402
import train  # noqa: E402
import tyro  # noqa: E402


def rollout(policy, tokenizer, prompts, group_size, config, generator=None):
    """Groups of the parent's shape: ragged completions of random ids."""
    experiences = []
    for prompt in prompts:
        seed = random.Random(repr(prompt.ids)).getrandbits(32)
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 20, (group_size,), generator=generator).tolist()
        ids = [torch.randint(3, 300, (length,), generator=generator) for length in lengths]
        experiences.append(
            train.Experience(
                prompt_ids=torch.tensor(prompt.ids),
                completion_ids=ids,
                completion_masks=[torch.ones_like(row) for row in ids],
                sampled_log_probs=[torch.full((length,), -5.0) for length in lengths],
                truncated=torch.zeros(group_size),
                completions=[str(row.sum().item()) for row in ids],
                answer=prompt.answer,
            )
        )
    return experiences


def accuracy_reward(completion: str, answer: str, tolerance: float = 0.0) -> float:
    return float(completion) % 7 / 7


train.rollout = rollout
train.accuracy_reward = accuracy_reward
with ranks.process_group():
    train.main(tyro.cli(train.Config))
