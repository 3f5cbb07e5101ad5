"""From completions to the tensors of a training forward.

    groups -> optimizer batches; the groups of each -> rows -> micro-batches

A group is packed as one row, or as several where it is too long: the prompt once, then the prefix
tree of its completions, which stores shared beginnings once. A token attends to itself and its
ancestors, and its position is its depth, so every log-prob equals that of the completion forwarded
alone. Only the forward is shared: a token that two completions sampled is in the loss twice, with
each one's advantage and weight.

Two completions of the prompt "p q", which agree in their first token ("." is the end token):

    completion 0    a b .
    completion 1    a c .

    index       0 1 2 3 4        The last token of a completion is left out: nothing is
    token       p q a b c        predicted from it, and nobody attends to it.
    position    0 1 2 3 3

    attends to  p q a b c        completion 0 (a b .) is predicted from indices 1 2 3
             p  1 0 0 0 0        completion 1 (a c .) is predicted from indices 1 2 4
             q  1 1 0 0 0
             a  1 1 1 0 0
             b  1 1 1 1 0
             c  1 1 1 0 1        c sees p, q and a, but not b
"""

from dataclasses import dataclass, field, replace

import torch
from loss import token_weights
from torch import Tensor


@dataclass
class Experience:
    """One prompt and its group of G completions (G = group_size), on the CPU.

    For example "What is 2 + 3?", G = 2, whose second completion was cut off by the token budget:

        prompt_ids        [ 5, 9, 4]
        completion_ids    [[7, 8, 2],  [7, 6, 6]]       2 is the end token
        completion_masks  [[1, 1, 1],  [1, 1, 1]]       all of it was sampled by the policy
        truncated         [0, 1]
        rewards           [1.1, 0.0]
        advantages        [0.71, -0.71]
    """

    prompt_ids: Tensor  # (prompt tokens,)
    completion_ids: list[Tensor]  # G x (tokens,), through the end token where there is one
    completion_masks: list[Tensor]  # G x (tokens,), 1 = in the loss; 0: given, as a tool's result
    sampled_log_probs: list[Tensor]  # G x (tokens,), of each token when it was sampled
    truncated: Tensor  # (G,), 1 where the token budget ended the completion
    completions: list[str]  # G texts
    answer: str
    reward_parts: dict[str, Tensor] | None = None  # name -> (G,)
    rewards: Tensor | None = None  # (G,), the sum of the parts
    advantages: Tensor | None = None  # (G,)


@dataclass
class PrefixTree:
    """A row: the prompt of a group, and the tree of some of its completions."""

    experience: Experience
    weights: list[Tensor]  # G x (tokens,), of all completions of the group
    ids: list[int]  # (tokens,), the prompt's at first
    # completion -> (tokens,), the index from which each of its tokens is predicted
    paths: dict[int, Tensor] = field(default_factory=dict)
    children: dict[tuple[int, int], int] = field(default_factory=dict)  # (index, token) -> index

    def add(self, number: int) -> None:
        """Add completion `number`, but for its last token, from which nothing is predicted.

        paths[number][t] becomes the index from which its token t is predicted.
        """
        index = len(self.experience.prompt_ids) - 1  # the prompt's last token predicts the first
        path = [index]
        for token in self.experience.completion_ids[number].tolist()[:-1]:
            key = (index, token)
            if key not in self.children:
                self.children[key] = len(self.ids)
                self.ids.append(token)
            index = self.children[key]
            path.append(index)
        self.paths[number] = torch.tensor(path)


@dataclass
class MicroBatch:
    """Rows that are forwarded together. `sampled` is the number of their sampled tokens."""

    input_ids: Tensor  # (rows, tokens)
    position_ids: Tensor  # (rows, tokens)
    members: Tensor  # (rows, tokens, G), 1 where the token belongs to that completion of the row
    predicted_from: Tensor  # (sampled,), index into the rows * tokens hidden states
    targets: Tensor  # (sampled,), the sampled tokens
    completion: Tensor  # (sampled,), its completion, counted from 0 here; for losses by sequence
    sampled_log_probs: Tensor  # (sampled,)
    advantages: Tensor  # (sampled,)
    weights: Tensor  # (sampled,)
    packed: bool  # whether rows may hold several completions
    origins: list[tuple[Experience, int]]  # of each completion its group, and its number in it
    old_log_probs: Tensor | None = None  # (sampled,)
    reference_log_probs: Tensor | None = None  # (sampled,)
    seen: dict[str, Tensor] | None = None  # what the loss tells of each token, for the log

    def to(self, device) -> "MicroBatch":
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Which tokens attend to which.

        Rows of one completion: the usual (rows, tokens), 1 for tokens and 0 for padding. Packed
        rows: (rows, 1, tokens, tokens), 0 where a token attends and a huge negative number where
        not. A token attends to itself and to earlier ones that share a completion with it: in a
        tree these are its ancestors.

        Not a bool mask: eager attention adds whatever it is given and would be silently wrong.
        Padding attends to itself: a softmax over nothing is NaN.
        """
        if not self.packed:
            return self.members.any(-1).long()
        shared = self.members @ self.members.mT  # (rows, tokens, tokens), completions in common
        attends = (shared > 0).tril()
        attends |= torch.eye(attends.shape[-1], dtype=torch.bool, device=attends.device)  # padding
        is_hidden = (~attends).to(dtype)
        return is_hidden[:, None] * torch.finfo(dtype).min


class ReplayBuffer:
    """The groups of one step, cut into batches. GRPO replays nothing: `clear` ends the step.

    packed: whether a row holds a whole group, or one completion.
    """

    def __init__(self, packed: bool) -> None:
        self.packed = packed
        self.experiences: list[Experience] = []

    def extend(self, experiences: list[Experience]) -> None:
        self.experiences.extend(experiences)

    def clear(self) -> None:
        self.experiences.clear()

    def batches(self, config, generator: torch.Generator) -> list[list[MicroBatch]]:
        """Optimizer batches of `train_batch_size` completions, each a list of micro-batches.

        Whole groups in random order. Without a KL term, groups whose rewards are all equal
        (advantages 0) have no gradient and are not forwarded; the weights count them all the same.
        """
        order = torch.randperm(len(self.experiences), generator=generator)
        batches = []
        for chosen in order.split(config.train_batch_size // config.group_size):
            groups = [self.experiences[i] for i in chosen]
            masks = []
            for group in groups:
                masks += group.completion_masks
            weights = token_weights(masks, config.critic_type, config.generate_max_length)

            rows = []
            first = 0  # the number, in the batch, of the group's first completion
            for group in groups:
                group_weights = weights[first : first + len(group.completion_masks)]
                first += len(group.completion_masks)
                if config.kl_weight == 0 and not group.advantages.any():
                    continue
                if self.packed:
                    rows += packed_rows(group, group_weights, config.micro_batch_tokens)
                else:
                    rows += single_rows(group, group_weights)
            batches.append(cut_into_micro_batches(rows, config.micro_batch_tokens, self.packed))
        return batches


def numbers_to_forward(experience: Experience) -> list[int]:
    """The completions that have a token in the loss."""
    return [i for i, mask in enumerate(experience.completion_masks) if mask.any()]


def packed_rows(
    experience: Experience, weights: list[Tensor], most_tokens: int
) -> list[PrefixTree]:
    """A group as one row, or as several where one would exceed `most_tokens`.

    A row is filled until the next completion would exceed `most_tokens`, counting it whole, as if
    it shared nothing but the prompt. A row holds at least one.
    """
    rows = []
    for number in numbers_to_forward(experience):
        new_tokens = len(experience.completion_ids[number]) - 1
        if not rows or len(rows[-1].ids) + new_tokens > most_tokens:
            rows.append(PrefixTree(experience, weights, experience.prompt_ids.tolist()))
        rows[-1].add(number)
    return rows


def single_rows(experience: Experience, weights: list[Tensor]) -> list[PrefixTree]:
    """A row for each completion: for models in which packing is not exact (see `can_pack`)."""
    rows = []
    for number in numbers_to_forward(experience):
        rows.append(PrefixTree(experience, weights, experience.prompt_ids.tolist()))
        rows[-1].add(number)
    return rows


def cut_into_micro_batches(
    rows: list[PrefixTree], most_tokens: int, packed: bool
) -> list[MicroBatch]:
    """Rows of like length together, as many as keep rows x longest row within `most_tokens`.

    A micro-batch holds at least one row.
    """
    parts = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if not parts or (len(parts[-1]) + 1) * len(parts[-1][0].ids) > most_tokens:
            parts.append([])
        parts[-1].append(row)
    return [join_experience_batch(part, packed) for part in parts]


def join_experience_batch(rows: list[PrefixTree], packed: bool) -> MicroBatch:
    """The tensors of rows, padded on the right to the longest."""
    width = max(len(row.ids) for row in rows)
    group_size = max(len(row.weights) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    members = torch.zeros(len(rows), width, group_size)
    parts = []  # of each completion, its sampled tokens
    origins = []
    for i, row in enumerate(rows):
        prompt_length = len(row.experience.prompt_ids)
        input_ids[i, : len(row.ids)] = torch.tensor(row.ids)
        position_ids[i, :prompt_length] = torch.arange(prompt_length)
        members[i, :prompt_length] = 1  # the prompt belongs to every completion
        for number, path in row.paths.items():
            # A path begins at the prompt's last token. A token on several paths has one depth.
            position_ids[i, path] = prompt_length - 1 + torch.arange(len(path))
            members[i, path, number] = 1
            parts.append(sampled_tokens(row, number, len(parts), first_index=i * width))
            origins.append((row.experience, number))
    tokens = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return MicroBatch(input_ids, position_ids, members, packed=packed, origins=origins, **tokens)


def sampled_tokens(row: PrefixTree, number: int, completion: int, first_index: int) -> dict:
    """What a MicroBatch holds of a completion's sampled tokens, (sampled,) each."""
    experience = row.experience
    sampled = experience.completion_masks[number].bool()  # (tokens,)
    count = int(sampled.sum())
    return {
        "predicted_from": first_index + row.paths[number][sampled],
        "targets": experience.completion_ids[number][sampled],
        "completion": torch.full((count,), completion),
        "sampled_log_probs": experience.sampled_log_probs[number][sampled],
        "advantages": experience.advantages[number].expand(count),
        "weights": row.weights[number][sampled],
    }
