"""--attention flex_attention: what packed rows hide is skipped, not computed and masked.

Plumbing, the same in every experiment. In a row of eight completions most pairs of tokens belong to
two completions, and torch's usual attention computes their scores for nothing. flex_attention is
compiled once a run, which takes 20 s. It skips each block of 128 queries x 128 keys in which no
query sees a key. Everything else goes to torch's usual attention: sampling, and rows of one
completion.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "packed_rows"  # of this attention, among those that transformers knows
compiled = torch.compile(flex_attention, dynamic=True)  # dynamic: once for rows of all lengths


def register() -> str:
    """Make it known to transformers. Returns its name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attend(module, query, key, value, attention_mask, scaling=None, **arguments):
    """query: (rows, heads, tokens, head size), key and value: of key-value heads.

    Returns (rows, tokens, heads, head size), and None for the attention weights.
    """
    if not is_of_packed_rows(attention_mask):
        tensors = (query, key, value, attention_mask)
        return sdpa_attention_forward(module, *tensors, scaling=scaling, **arguments)
    if not hasattr(attention_mask, "blocks"):  # every layer is given this very tensor
        attention_mask.blocks = block_mask(attention_mask)
    # flex_attention's own way, enable_gqa, has a backward pass that is three times slower.
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = compiled(query, key, value, block_mask=attention_mask.blocks, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def is_of_packed_rows(mask) -> bool:
    """Whether it is MicroBatch.attention_mask of packed rows: square, and added to the scores."""
    is_added = mask is not None and mask.is_floating_point()
    return is_added and mask.shape[-1] == mask.shape[-2] > 1


def block_mask(mask) -> BlockMask:
    """The blocks of a mask (rows, 1, tokens, tokens), 0 where a token attends."""

    def attends(row, head, query, key):
        return mask[row, 0, query, key] == 0

    rows, _, tokens, _ = mask.shape
    return create_block_mask(attends, rows, None, tokens, tokens, device=mask.device)
