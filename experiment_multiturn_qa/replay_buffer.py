"""From completions to the tensors of a training forward: groups -> optimizer batches -> packed micro-batches.

A group is packed as one row: its prompt, then the tree of its completions, which holds once what they share from the
start on. A token sees those that lead to it, and its position is their number: log-probs are those of G separate rows.
"""

from dataclasses import dataclass, field, replace

import torch
from loss import token_weights
from torch import Tensor


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
class Row:
    """A packed row: the prompt of a group and the tree of some of its completions."""

    experience: Experience
    weights: list[Tensor]  # G x (tokens,), of all completions
    ids: list[int]  # (tokens,), the prompt's at first
    paths: dict[int, Tensor] = field(default_factory=dict)  # completion -> (tokens,), the index each is predicted from
    children: dict[tuple[int, int], int] = field(default_factory=dict)  # (index, next token) -> index of the next

    def add(self, number: int) -> None:
        """Add a completion, but for its last token, which predicts nothing and which nobody sees."""
        path = [len(self.experience.prompt_ids) - 1]  # the prompt's last token predicts the first one
        for token in self.experience.completion_ids[number].tolist()[:-1]:
            path.append(self.children.setdefault((path[-1], token), len(self.ids)))
            if path[-1] == len(self.ids):  # it is new
                self.ids.append(token)
        self.paths[number] = torch.tensor(path)


@dataclass
class MicroBatch:
    """Packed rows that are forwarded together; `sampled` is the number of their sampled tokens."""

    input_ids: Tensor  # (rows, tokens)
    position_ids: Tensor  # (rows, tokens)
    members: Tensor  # (rows, tokens, G), 1 where the token belongs to that completion; the prompt's belong to all
    predicted_from: Tensor  # (sampled,), index into the rows * tokens hidden states
    targets: Tensor  # (sampled,)
    sampled_log_probs: Tensor  # (sampled,)
    advantages: Tensor  # (sampled,)
    weights: Tensor  # (sampled,)
    packed: bool  # whether rows may hold several completions
    old_log_probs: Tensor | None = None  # (sampled,)
    reference_log_probs: Tensor | None = None  # (sampled,)

    def to(self, device) -> "MicroBatch":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask (rows, 1, tokens, tokens) for packed rows, else the usual (rows, tokens) of ones and zeros.

        A token sees itself (padding too: a softmax over nothing is NaN) and the earlier ones that share a completion
        with it. Additive, because eager attention adds what it is given: a bool mask would be silently wrong there."""
        if not self.packed:
            return self.members.any(-1).long()
        visible = (self.members @ self.members.mT > 0).tril()  # (rows, tokens, tokens)
        visible |= torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device)
        return (~visible).to(dtype)[:, None] * torch.finfo(dtype).min


def join_experience_batch(rows: list[Row], packed: bool) -> MicroBatch:
    """The tensors of rows, padded to the longest."""
    width = max(len(row.ids) for row in rows)
    input_ids, position_ids = torch.zeros(2, len(rows), width, dtype=torch.long)
    members = torch.zeros(len(rows), width, max(len(row.weights) for row in rows))
    tokens = {"predicted_from": [], "targets": [], "sampled_log_probs": [], "advantages": [], "weights": []}
    for i, row in enumerate(rows):
        experience, prompt_length = row.experience, len(row.experience.prompt_ids)
        input_ids[i, : len(row.ids)] = torch.tensor(row.ids)
        position_ids[i, :prompt_length] = torch.arange(prompt_length)
        members[i, :prompt_length] = 1
        for number, path in row.paths.items():
            position_ids[i, path] = prompt_length - 1 + torch.arange(len(path))
            members[i, path, number] = 1
            sampled = experience.masks[number].bool()
            tokens["predicted_from"].append(i * width + path[sampled])
            tokens["targets"].append(experience.completion_ids[number][sampled])
            tokens["sampled_log_probs"].append(experience.sampled_log_probs[number][sampled])
            tokens["advantages"].append(experience.advantages[number].expand(len(path))[sampled])
            tokens["weights"].append(row.weights[number][sampled])
    return MicroBatch(input_ids, position_ids, members, packed=packed, **{k: torch.cat(v) for k, v in tokens.items()})


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
        order, batches = torch.randperm(len(self.experiences), generator=generator), []
        for chosen in order.split(config.train_batch_size // config.group_size):
            groups = [self.experiences[i] for i in chosen]
            masks = [mask for experience in groups for mask in experience.masks]
            weights = iter(token_weights(masks, config.critic_type, config.generate_max_length))
            rows = []
            for experience in groups:
                group_weights = [next(weights) for _ in experience.masks]
                if config.kl_weight or experience.advantages.any():
                    rows += cut_into_rows(experience, group_weights, config.micro_batch_tokens if packed else 0)
            batches.append(cut_into_micro_batches(rows, config.micro_batch_tokens, packed))
        return batches


def cut_into_rows(experience: Experience, weights: list[Tensor], most_tokens: int) -> list[Row]:
    """As many completions to a row as fit even if they share only the prompt, at least one. Masked ones need no row."""
    rows, prompt = [], experience.prompt_ids.tolist()
    for number in [number for number, mask in enumerate(experience.masks) if mask.any()]:
        if not rows or len(rows[-1].ids) + len(experience.completion_ids[number]) - 1 > most_tokens:
            rows.append(Row(experience, weights, prompt.copy()))
        rows[-1].add(number)
    return rows


def cut_into_micro_batches(rows: list[Row], most_tokens: int, packed: bool) -> list[MicroBatch]:
    """Rows of like length together, as many as keep rows x longest row within `most_tokens`, at least one."""
    micro_batches = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if not micro_batches or (len(micro_batches[-1]) + 1) * len(micro_batches[-1][0].ids) > most_tokens:
            micro_batches.append([])
        micro_batches[-1].append(row)
    return [join_experience_batch(rows, packed) for rows in micro_batches]
