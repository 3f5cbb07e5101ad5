"""From completions to the tensors of a training forward: groups -> optimizer batches -> packed micro-batches.

A group is packed as one row, `prompt | completion 1 | ... | completion G`. A completion sees the prompt and itself, and
its positions go on where the prompt's end: the log-probs of G separate rows, with the prompt forwarded once.
"""

from dataclasses import dataclass, fields

import torch
from loss import token_weights
from torch import Tensor

PROMPT, PADDING = 0, -1  # segments of a row; its completions are 1, 2, ...


@dataclass
class Experience:
    """One prompt and its group of G completions (G = group_size), on the CPU."""

    prompt_ids: Tensor  # (prompt tokens,)
    completion_ids: list[Tensor]  # G x (tokens,), through the end token where there is one
    masks: list[Tensor]  # G x (tokens,), 1 = sampled by the policy, 0 = given to it
    sampled_log_probs: list[Tensor]  # G x (tokens,), the log-prob of each token when it was sampled
    truncated: Tensor  # (G,), 1 where the token budget ended the completion
    completions: list[str]  # G texts
    answer: str
    reward_parts: dict[str, Tensor] | None = None  # (G,) each; one of them is "reward_accuracy"
    rewards: Tensor | None = None  # (G,), their sum
    advantages: Tensor | None = None  # (G,)


@dataclass
class MicroBatch:
    """Packed rows that are forwarded together; `sampled` is the number of their sampled tokens."""

    input_ids: Tensor  # (rows, tokens)
    position_ids: Tensor  # (rows, tokens), going on after the prompt for each completion
    segments: Tensor  # (rows, tokens)
    predicted_from: Tensor  # (sampled,), index into the rows * tokens hidden states
    targets: Tensor  # (sampled,)
    sampled_log_probs: Tensor  # (sampled,)
    advantages: Tensor  # (sampled,)
    weights: Tensor  # (sampled,)
    packed: bool  # whether rows may hold several completions
    old_log_probs: Tensor | None = None  # (sampled,)
    reference_log_probs: Tensor | None = None  # (sampled,)

    def to(self, device) -> "MicroBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return MicroBatch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask (rows, 1, tokens, tokens) for packed rows, else the usual (rows, tokens) of ones and zeros.

        Additive, because eager attention adds what it is given: a bool mask would be silently wrong there. Padding
        sees itself, because a softmax over nothing is NaN.
        """
        if not self.packed:
            return (self.segments != PADDING).long()
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        visible = ((key == query) | (key == PROMPT)).tril()  # (rows, tokens, tokens)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def row_length(experience: Experience, numbers: list[int]) -> int:
    """Tokens that are forwarded: all but the last of each completion, which predicts nothing and which nobody sees."""
    return len(experience.prompt_ids) + sum(len(experience.completion_ids[number]) - 1 for number in numbers)


def join_experience_batch(rows: list[tuple[Experience, list[int], list[Tensor]]], packed: bool) -> MicroBatch:
    """Pack rows, each (experience, numbers of its completions, weights of all completions), padded to the longest."""
    width = max(row_length(experience, numbers) for experience, numbers, _ in rows)
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)
    segments = torch.full((len(rows), width), PADDING)
    tokens = {"predicted_from": [], "targets": [], "sampled_log_probs": [], "advantages": [], "weights": []}
    for row, (experience, numbers, weights) in enumerate(rows):
        start = prompt_length = len(experience.prompt_ids)
        input_ids[row, :start] = experience.prompt_ids
        position_ids[row, :start] = torch.arange(start)
        segments[row, :start] = PROMPT
        for segment, number in enumerate(numbers, start=1):
            ids, sampled = experience.completion_ids[number], experience.masks[number].bool()
            end = start + len(ids) - 1
            input_ids[row, start:end] = ids[:-1]
            position_ids[row, start:end] = prompt_length + torch.arange(len(ids) - 1)
            segments[row, start:end] = segment
            # The token at position p is predicted from position p - 1, a completion's first from the prompt's last.
            source = torch.arange(start - 1, end)
            source[0] = prompt_length - 1
            tokens["predicted_from"].append(row * width + source[sampled])
            tokens["targets"].append(ids[sampled])
            tokens["sampled_log_probs"].append(experience.sampled_log_probs[number][sampled])
            tokens["advantages"].append(experience.advantages[number].expand(len(ids))[sampled])
            tokens["weights"].append(weights[number][sampled])
            start = end
    return MicroBatch(input_ids, position_ids, segments, packed=packed, **{k: torch.cat(v) for k, v in tokens.items()})


class ReplayBuffer:
    def __init__(self) -> None:
        self.experiences: list[Experience] = []

    def extend(self, experiences: list[Experience]) -> None:
        self.experiences.extend(experiences)

    def clear(self) -> None:
        self.experiences.clear()

    def batches(self, config, packed: bool, generator: torch.Generator) -> list[list[MicroBatch]]:
        """Optimizer batches of `train_batch_size` completions, whole groups in random order, as lists of micro-batches.

        Without a KL term, groups without spread (advantage 0) are not forwarded, but they count in the weights.
        """
        order = torch.randperm(len(self.experiences), generator=generator)
        batches = []
        for chosen in order.split(config.train_batch_size // config.group_size):
            groups = [self.experiences[i] for i in chosen]
            masks = [mask for experience in groups for mask in experience.masks]
            weights = iter(token_weights(masks, config.critic_type, config.generate_max_length))
            rows = []
            for experience in groups:
                group_weights = [next(weights) for _ in experience.masks]
                if config.kl_weight or experience.advantages.any():
                    cut = cut_into_rows(experience, config.micro_batch_tokens if packed else 0)
                    rows += [(experience, numbers, group_weights) for numbers in cut]
            batches.append(cut_into_micro_batches(rows, config.micro_batch_tokens, packed))
        return batches


def cut_into_rows(experience: Experience, most_tokens: int) -> list[list[int]]:
    """The completions of each row of a group, by number: as many to a row as fit, at least one."""
    rows = []
    for number in range(len(experience.completion_ids)):
        if rows and row_length(experience, rows[-1] + [number]) <= most_tokens:
            rows[-1].append(number)
        else:
            rows.append([number])
    return rows


def cut_into_micro_batches(rows: list, most_tokens: int, packed: bool) -> list[MicroBatch]:
    """Rows of like length together, as many as keep rows x longest row within `most_tokens`, at least one."""
    micro_batches = []
    for row in sorted(rows, key=lambda row: row_length(*row[:2]), reverse=True):
        if micro_batches and (len(micro_batches[-1]) + 1) * row_length(*micro_batches[-1][0][:2]) <= most_tokens:
            micro_batches[-1].append(row)
        else:
            micro_batches.append([row])
    return [join_experience_batch(rows, packed) for rows in micro_batches]
