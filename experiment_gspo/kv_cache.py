"""The KV cache: prompts forwarded at once, room for new tokens, and a memory between turns.

Plumbing, the same in every experiment.
"""

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens for which the KV cache makes room at once


def distinct_rows(histories, device):
    """(rows, row_of): each distinct history as a tuple, and for each history the row that it is."""
    rows = list(dict.fromkeys(tuple(history) for history in histories))
    number = {row: i for i, row in enumerate(rows)}
    return rows, torch.tensor([number[tuple(history)] for history in histories], device=device)


def prefill(policy, rows, memory):
    """Forward of each row what `memory` does not hold.

    rows: token ids, a tuple each. memory: forwarded ids -> keys and values of every layer.
    Where memory is empty, what all rows begin with (a system prompt) is forwarded once.

    Rows end at different tokens, and what is new of them has different lengths. So there is
    padding in two places: left of what is remembered, and left of what is new.

        remembered    new            mask
        . . a b       . c d e        0 0 1 1  0 1 1 1
        a b c d       e f g h        1 1 1 1  1 1 1 1

    Returns (cache, mask (rows, tokens), logits (rows, 1, vocabulary)).
    """
    device = policy.device
    if memory == {}:
        remember_common_beginning(policy, rows, memory)
    cache = None
    known = [0] * len(rows)  # tokens of each row that the cache holds
    if memory:
        cache, known = recall(memory, rows)
    past = max(known)
    width = max(len(row) - n for row, n in zip(rows, known))

    input_ids = []
    mask = []  # from lengths, never from ids: a prompt may hold the padding token
    for row, n in zip(rows, known):
        new = len(row) - n
        input_ids.append([0] * (width - new) + list(row[n:]))
        mask.append([0] * (past - n) + [1] * n + [0] * (width - new) + [1] * new)
    input_ids = torch.tensor(input_ids, device=device)  # (rows, width)
    mask = torch.tensor(mask, device=device)  # (rows, past + width)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # (rows, width)
    output = policy(
        input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    leave_room(output.past_key_values)
    return output.past_key_values, mask, output.logits


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room for more tokens.

    transformers' own copies all earlier keys and values for each new token.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        vars(self).update(vars(layer))
        self.make_room(torch.stack([layer.keys, layer.values]))

    def make_room(self, past) -> None:
        """past: (2, rows, heads, tokens, head size), keys and values."""
        tokens = past.shape[-2]
        self.room = past.new_empty(*past.shape[:-2], tokens + ROOM, past.shape[-1])
        self.room[..., :tokens, :] = past
        self.keys, self.values = self.room[..., :tokens, :]

    def update(self, keys, values, *_, **__):
        past = self.keys.shape[-2]
        end = past + keys.shape[-2]
        if end > self.room.shape[-2]:
            self.make_room(self.room[..., :past, :])
        self.room[0, ..., past:end, :] = keys
        self.room[1, ..., past:end, :] = values
        self.keys, self.values = self.room[..., :end, :]
        return self.keys, self.values

    def reorder_cache(self, rows) -> None:
        past = self.keys.shape[-2]
        self.room = self.room.index_select(1, rows)
        self.keys, self.values = self.room[..., :past, :]


def leave_room(cache) -> None:
    """Let a KV cache grow without copying. Layers of another kind (sliding window) stay."""
    if not isinstance(cache, DynamicCache):
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer)


def remember_common_beginning(policy, rows, memory) -> None:
    """Forward once what all rows begin with, at most all but the last token of the shortest."""
    same = 0
    while same < min(len(row) for row in rows) - 1 and len({row[same] for row in rows}) == 1:
        same += 1
    beginning = rows[0][:same]
    if beginning:
        input_ids = torch.tensor([beginning], device=policy.device)
        output = policy(input_ids, use_cache=True, logits_to_keep=1)
        remember(memory, beginning, output.past_key_values, 0, torch.ones_like(input_ids[0]))


def remember(memory, forwarded, cache, row: int, mask) -> None:
    """Keep the keys and values of a row of the cache, by the ids that were forwarded.

    mask: (tokens,), 0 for the row's padding. Of each layer (heads, tokens, head size), twice.
    """
    columns = mask.nonzero()[:, 0]  # looked up once, not once a layer
    memory[forwarded] = []
    for layer in cache.layers:
        keys = layer.keys[row].index_select(1, columns)
        values = layer.values[row].index_select(1, columns)
        memory[forwarded].append((keys, values))


def recall(memory, rows):
    """A KV cache of the longest beginning of each row that `memory` holds, and their lengths.

    It is padded on the left. Afterwards the memory is empty.
    """
    lengths = sorted({len(ids) for ids in memory}, reverse=True)
    found = []
    for row in rows:
        known = [row[:length] for length in lengths if row[:length] in memory]
        found.append(known[0])  # the longest
    most = max(len(ids) for ids in found)
    cache = DynamicCache()
    for layer in range(len(memory[found[0]])):
        keys = [memory[ids][layer][0] for ids in found]
        values = [memory[ids][layer][1] for ids in found]
        keys = torch.stack([pad(x, (0, 0, most - x.shape[1], 0)) for x in keys])
        values = torch.stack([pad(x, (0, 0, most - x.shape[1], 0)) for x in values])
        cache.update(keys, values, layer)  # (rows, heads, most, head size)
    memory.clear()
    return cache, [len(ids) for ids in found]
