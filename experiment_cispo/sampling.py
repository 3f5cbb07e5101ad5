"""Sampling: token ids in, token ids and log-probs out. Plumbing, the same in every experiment.

It computes this, for every history at once:

    ids = history
    repeat until the new token is an end token, or the budget is used up:
        logits = policy(ids)[-1]                                 # (vocabulary,)
        log_probs = log_softmax(logits / temperature)            # (vocabulary,)
        token = multinomial(exp(log_probs))                      # or argmax, without a generator
        ids = ids + [token]

Three things make it fast. Keys and values of earlier tokens are kept in a KV cache (kv_cache.py).
Completions of one prompt share a row of the cache for as long as they agree. Rows that have ended
leave. On a CUDA device captured.py samples single turns in another way, with the same result.
"""

import math

import torch
from captured import can_capture, sample_captured
from kv_cache import distinct_rows, prefill, remember
from model import autocast, check_finite, next_log_probs

LARGE_VOCABULARY = 4096  # entries; see `draw`


def sample(policy, histories, eos_ids, config, generator=None, memory=None):
    """Sample how each history goes on; without a generator, take the likeliest token each time.

    The distribution is a plain softmax at `temperature`, whatever top_k, top_p or penalty the
    checkpoint's generation config asks for: the loss takes the log-probs of this distribution.

    histories: token ids, one list for each completion; a group repeats its prompt.
    eos_ids: ids that end a completion; the end token is part of it.
    memory: None for a single turn. For dialogues a dict, empty in the first turn, which keeps
        keys and values from turn to turn, so that each turn forwards only its new tokens.

    Returns (ids, log_probs), for each history the new tokens, (tokens,) each, on the CPU.
    """
    arguments = (policy, histories, eos_ids, config, generator)
    if memory is None and can_capture(policy, config):
        ids, log_probs, lengths = sample_captured(*arguments)
    else:
        ids, log_probs, lengths = sample_plainly(*arguments, memory)
    return cut(ids, lengths), cut(log_probs, lengths)


def cut(rows, lengths) -> list:
    """Rows of their own lengths, on the CPU. rows: (n, tokens), lengths: (n,)."""
    return [row[:length] for row, length in zip(rows.cpu(), lengths.tolist())]


@torch.no_grad()  # not inference_mode: it would cast every weight again for every token (autocast)
def sample_plainly(policy, histories, eos_ids, config, generator=None, memory=None):
    """The loop of the header. Returns (ids, log_probs, lengths).

    Shapes: (completions, max_new_tokens) twice, and (completions,), the new tokens of each.
    """
    device = policy.device
    rows, row_of = distinct_rows(histories, device)
    eos_ids = torch.tensor(sorted(eos_ids), device=device)

    shape = (len(histories), config.max_new_tokens)
    ids = torch.zeros(shape, dtype=torch.long, device=device)  # (completions, new tokens)
    log_probs = torch.zeros(shape, device=device)  # (completions, new tokens)
    lengths = torch.zeros_like(ids[:, 0])  # (completions,), new tokens so far
    unfinished = torch.arange(len(ids), device=device)  # (unfinished,), numbers of completions

    with autocast(config, device, sampling=True):
        cache, mask, logits = prefill(policy, rows, memory)
        history_lengths = mask.sum(-1)  # (rows,), so the t-th new token has position length + t
        for t in range(config.max_new_tokens):
            tokens, token_log_probs = choose_tokens(logits, row_of, config, generator)
            ids[unfinished, t] = tokens
            log_probs[unfinished, t] = token_log_probs
            lengths[unfinished] += 1

            ended = torch.isin(tokens, eos_ids)  # (unfinished,)
            if memory is not None:
                for i, row in zip(unfinished[ended].tolist(), row_of[ended].tolist()):
                    forwarded = (*histories[i], *ids[i, :t].tolist())
                    remember(memory, forwarded, cache, row, mask[row])
            unfinished = unfinished[~ended]
            if len(unfinished) == 0 or t + 1 == config.max_new_tokens:
                break

            vocabulary = logits.shape[-1]
            # A row is repeated where its completions part, and dropped where all have ended.
            parents, row_tokens, row_of = split_rows(row_of[~ended], tokens[~ended], vocabulary)
            if not torch.equal(parents, torch.arange(len(mask), device=device)):
                mask = mask[parents]
                history_lengths = history_lengths[parents]
                cache.reorder_cache(parents)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)  # (rows, tokens)
            positions = history_lengths[:, None] + t  # (rows, 1)
            arguments = {"attention_mask": mask, "position_ids": positions}
            output = policy(row_tokens[:, None], past_key_values=cache, **arguments)
            logits = output.logits  # (rows, 1, vocabulary)
    return ids, log_probs, lengths


def choose_tokens(logits, row_of, config, generator):
    """The next token of every unfinished completion, and its log-prob, (unfinished,) each.

    logits: (rows, 1, vocabulary); row_of: (unfinished,), the row of each unfinished completion.
    """
    row_log_probs = next_log_probs(logits, config)
    check_finite(row_log_probs, config)
    log_probs = row_log_probs[row_of]  # (unfinished, vocabulary)
    if generator is None:
        tokens = log_probs.argmax(-1)
    else:
        tokens = draw(log_probs.exp(), generator)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def draw(probs, generator):
    """A token for each row, with its probability. (rows, vocabulary) -> (rows,).

    multinomial draws a random number for every entry of the vocabulary. On a CPU, with 49,152
    entries, that takes a fifth of all sampling. So there a block of the vocabulary is drawn first,
    and then a token of that block: two random numbers a row.
    """
    vocabulary = probs.shape[-1]
    if probs.device.type != "cpu" or vocabulary < LARGE_VOCABULARY:
        return torch.multinomial(probs, 1, generator=generator)[:, 0]
    size = math.gcd(vocabulary, 256)  # of a block
    blocks = probs.unflatten(-1, (-1, size))  # (rows, blocks, size)
    block = draw_by_sums(blocks.sum(-1), generator)  # (rows,)
    token = draw_by_sums(blocks[torch.arange(len(probs)), block], generator)  # (rows,)
    return block * size + token


def draw_by_sums(probs, generator):
    """The first index at which the sum so far exceeds u, uniform in [0, sum of all).

    probs: (rows, n), in any scale. Returns (rows,).
    """
    sums = probs.cumsum(-1, dtype=torch.float64)  # (rows, n)
    u = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, u, right=True)[:, 0]  # right: nothing of probability 0


def split_rows(row_of, tokens, vocabulary: int):
    """One row for each distinct pair (row, next token): completions that have just parted, part.

    Completions 0 to 3 share row 0, completion 4 has row 1. They sampled the tokens 7, 9, 7, 7, 7:

        row_of       [0, 0, 0, 0, 1]
        tokens       [7, 9, 7, 7, 7]

    Three pairs (row, token) occur, (0, 7), (0, 9), (1, 7), and each becomes a row:

        parents      [0, 0, 1]           the row that each new row continues
        row_tokens   [7, 9, 7]           the token that it continues with
        row_of       [0, 1, 0, 0, 2]     the new row of each completion

    Returns (parents, row_tokens, row_of).
    """
    pairs = row_of * vocabulary + tokens  # a number for each pair (row, token)
    pairs, row_of = torch.unique(pairs, return_inverse=True)
    return pairs // vocabulary, pairs % vocabulary, row_of
