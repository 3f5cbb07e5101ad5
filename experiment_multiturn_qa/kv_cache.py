"""The KV cache between two turns. What a turn was sampled behind is not forwarded again when the next one is.

Rows end at different tokens and get results of different lengths, so the cache of the next turn is ragged: it is padded
on the left in front of what is remembered, and again in front of what is new. Positions and mask leave both out.
"""

import torch
from torch.nn.functional import pad
from transformers import DynamicCache


def prefill(policy, rows: list[tuple[int, ...]], memory: dict | None):
    """Forward what `memory` does not hold of each row: (KV cache, mask (rows, tokens), logits (rows, 1, vocabulary)).

    `memory` is the KV cache between two turns: forwarded ids -> keys and values of every layer. In the first turn it is
    empty, and what all rows begin with, the system prompt at least, is forwarded once. None forwards all of each row.
    """
    device = policy.device
    if memory == {}:
        same = [*(len(set(column)) == 1 for column in zip(*rows)), False].index(False)
        beginning = rows[0][: min(same, min(map(len, rows)) - 1)]
        if beginning:
            output = policy(torch.tensor([beginning], device=device), use_cache=True, logits_to_keep=1)
            memory[beginning] = keys_and_values(output.past_key_values, 0, slice(None))
    cache, known = recall(memory, rows) if memory else (None, [0] * len(rows))
    past, width = max(known), max(len(row) - n for row, n in zip(rows, known))
    input_ids = torch.tensor([[0] * (width - len(row) + n) + [*row[n:]] for row, n in zip(rows, known)], device=device)
    mask = torch.tensor(  # (rows, past + width), padded on the left in both parts; from lengths, never from ids
        [
            [0] * (past - n) + [1] * n + [0] * (width - len(row) + n) + [1] * (len(row) - n)
            for row, n in zip(rows, known)
        ],
        device=device,
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]  # (rows, width)
    arguments = dict(attention_mask=mask, position_ids=positions, past_key_values=cache)
    output = policy(input_ids, **arguments, use_cache=True, logits_to_keep=1)
    return output.past_key_values, mask, output.logits


def keys_and_values(cache, row: int, columns) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer, (heads, tokens, head size)."""
    return [(layer.keys[row][:, columns], layer.values[row][:, columns]) for layer in cache.layers]


def recall(memory: dict, rows: list[tuple[int, ...]]) -> tuple[DynamicCache, list[int]]:
    """A KV cache of the longest beginning of each row that `memory` holds, which it forgets; and their lengths."""
    lengths = sorted({len(ids) for ids in memory}, reverse=True)
    found = [next(row[:n] for n in lengths if row[:n] in memory) for row in rows]
    most, cache = max(map(len, found)), DynamicCache()
    for layer in range(len(memory[found[0]])):
        parts = zip(*(memory[ids][layer] for ids in found))  # the keys of all rows, then their values
        cache.update(*(torch.stack([pad(x, (0, 0, most - x.shape[1], 0)) for x in part]) for part in parts), layer)
    memory.clear()
    return cache, [len(ids) for ids in found]
