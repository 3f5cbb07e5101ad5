"""Sampling on a CUDA device. Plumbing, the same in every experiment.

It draws what the loop in sampling.py draws, from equal random numbers. (Log-probs differ by
rounding. In half precision that may turn a draw, and then the rest of that completion differs.)
There each token takes one to three thousand kernel launches, and the GPU waits for Python most of
the time. Here the forward of one token is recorded once, as a CUDA graph, and replayed:

    weights       one set, in the precision of the products; LoRA's B A is added to W in float32
    KV cache      has its full size from the start, and a token is written into the next column,
                  because a graph finds its tensors where they were when it was recorded
    blocks        completions that have ended leave only now and then: every 128 tokens, or once
                  half have ended. Then the forward is recorded again, for the rows that are left
                  and for the columns that will be in use 128 tokens later
"""

from contextlib import nullcontext

import torch
from kv_cache import distinct_rows, prefill
from model import can_pack, check_finite, next_log_probs, unwrap
from torch.func import functional_call
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 128  # tokens


def can_capture(policy, config) -> bool:
    """Whether the policy is on a CUDA device, not in 4 bits, and attends to all earlier tokens."""
    if not isinstance(policy, torch.nn.Module):  # held in parts, by several processes
        return False
    if policy.device.type != "cuda" or config.load_in_4bit:
        return False
    return can_pack(unwrap(policy).config, config.max_length)


@torch.no_grad()
def sample_captured(policy, histories, eos_ids, config, generator=None):
    """As `sample_plainly` in sampling.py, for a single turn."""
    device = policy.device
    rows, row_of = distinct_rows(histories, device)
    eos_ids = torch.tensor(sorted(eos_ids), device=device)

    shape = (len(histories), config.max_new_tokens)
    ids = torch.zeros(shape, dtype=torch.long, device=device)  # (completions, new tokens)
    log_probs = torch.zeros(shape, device=device)  # (completions, new tokens)
    lengths = torch.zeros_like(ids[:, 0])  # (completions,), new tokens so far
    unfinished = torch.arange(len(ids), device=device)  # (unfinished,), numbers of completions

    with PlainModel(policy, config) as model:
        cache, mask, logits = prefill(model, rows, None)
        decoder = Decoder(model, cache, mask, config)
        row_log_probs = next_log_probs(logits, config)  # (rows, vocabulary)
        for t in range(config.max_new_tokens):
            tokens, token_log_probs = draw_tokens(row_log_probs, row_of, generator)
            ids[unfinished, t] = tokens
            log_probs[unfinished, t] = token_log_probs
            lengths[unfinished] += 1

            goes_on = (~torch.isin(tokens, eos_ids)).nonzero()[:, 0]  # Python waits for the GPU
            if len(goes_on) < len(tokens):
                unfinished, row_of, tokens = unfinished[goes_on], row_of[goes_on], tokens[goes_on]
            if len(unfinished) == 0 or t + 1 == config.max_new_tokens:
                break
            if t % BLOCK == 0 or 2 * len(unfinished) <= decoder.rows:
                decoder.begin_block(row_of)
                row_of = torch.arange(len(unfinished), device=device)
            row_log_probs = decoder.forward(row_of, tokens)
    check_finite(log_probs, config)
    return ids, log_probs, lengths


def draw_tokens(row_log_probs, row_of, generator):
    """The next token of every unfinished completion, and its log-prob, (unfinished,) each.

    argmax(log p - log e), with e from an exponential distribution for each token, is a draw of p
    (the Gumbel-max trick). torch.multinomial draws the same random numbers and waits for the GPU.
    """
    log_probs = row_log_probs
    if len(row_of) != len(row_log_probs):
        log_probs = row_log_probs[row_of]  # (unfinished, vocabulary)
    scores = log_probs
    if generator is not None:
        noise = torch.empty_like(log_probs).exponential_(generator=generator)
        scores = log_probs - noise.log_()
    tokens = scores.argmax(-1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


class PlainModel:
    """The policy in the precision of its products, without autocast and without adapters.

    A context, because it takes memory: the weights in that precision.
    """

    def __init__(self, policy, config) -> None:
        self.policy = policy
        self.device = policy.device
        self.without_adapter = nullcontext()
        if hasattr(policy, "peft_config"):
            self.without_adapter = policy.disable_adapter()
        self.weights = merged_weights(policy, getattr(torch, config.precision))

    def __call__(self, input_ids, **arguments):
        return functional_call(self.policy, self.weights, (input_ids,), arguments)

    def __enter__(self):
        self.without_adapter.__enter__()
        return self

    def __exit__(self, *error):
        self.weights = {}
        self.without_adapter.__exit__(*error)


def merged_weights(policy, dtype) -> dict[str, torch.Tensor]:
    """Every weight of the policy; where it has an adapter, W + scale B A, added in float32.

    W may be in 4 bits.
    """
    weights = {name: parameter.to(dtype) for name, parameter in policy.named_parameters()}
    if not hasattr(policy, "peft_config"):
        return weights
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    for name, module in policy.named_modules():
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            weight = dequantize_module_weight(module.base_layer).float()
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).float()
            weights[f"{name}.base_layer.weight"] = weight.to(dtype)
    return weights


class FullLayer(DynamicLayer):
    """A layer of the KV cache with a column for every token that may come."""

    def __init__(self, layer: DynamicLayer, more: int) -> None:
        vars(self).update(vars(layer))
        rows, heads, past, size = layer.keys.shape
        self.all_keys = layer.keys.new_zeros(rows, heads, past + more, size)
        self.all_values = layer.values.new_zeros(rows, heads, past + more, size)
        self.all_keys[:, :, :past] = layer.keys
        self.all_values[:, :, :past] = layer.values

    def begin_block(self, row_of, column, width: int) -> None:
        """Keep these rows; attention sees the first `width` columns; `column` is the next one."""
        self.all_keys = self.all_keys[row_of]
        self.all_values = self.all_values[row_of]
        self.keys = self.all_keys[:, :, :width]
        self.values = self.all_values[:, :, :width]
        self.column = column  # (1,), on the device, where the graph reads it

    def update(self, keys, values, *_, **__):
        self.keys.index_copy_(2, self.column, keys)
        self.values.index_copy_(2, self.column, values)
        return self.keys, self.values


class Decoder:
    """The forward of one token for every row, recorded as a graph once a block."""

    def __init__(self, model, cache, mask, config) -> None:
        self.model = model
        self.config = config
        self.is_first = True
        self.past = mask.shape[1]  # columns in use
        self.mask = torch.cat([mask, mask.new_zeros(len(mask), config.max_new_tokens)], dim=1)
        self.positions = mask.sum(-1, keepdim=True)  # (rows, 1), of the next token
        self.cache = DynamicCache()
        self.cache.layers = [FullLayer(layer, config.max_new_tokens) for layer in cache.layers]

    def begin_block(self, row_of) -> None:
        """Keep these rows, one for each unfinished completion."""
        self.graph = None
        self.rows = len(row_of)
        self.mask = self.mask[row_of]
        self.positions = self.positions[row_of]
        self.ids = torch.zeros_like(self.positions)
        self.column = torch.tensor([self.past], device=row_of.device)
        width = min(self.past + BLOCK, self.mask.shape[1])
        for layer in self.cache.layers:
            layer.begin_block(row_of, self.column, width)
        dtype = self.cache.layers[0].keys.dtype
        is_hidden = (self.mask[:, None, None, :width] == 0).to(dtype)  # (rows, 1, 1, width)
        self.attention_mask = is_hidden * torch.finfo(dtype).min

    def forward(self, row_of, tokens):
        """Log-probs of the next token, (rows, vocabulary). Rows not in row_of have ended."""
        self.ids[row_of, 0] = tokens
        if self.is_first or not self.ids.is_cuda:
            self.one_token()  # the first of all: libraries set themselves up outside of a graph
            self.is_first = False
        elif self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.one_token()
            self.graph.replay()  # recording computes nothing
        else:
            self.graph.replay()
        self.mask[:, self.past] = 1
        self.past += 1
        return self.log_probs

    def one_token(self) -> None:
        self.attention_mask.index_fill_(3, self.column, 0)
        output = self.model(
            self.ids,
            attention_mask=self.attention_mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.log_probs = next_log_probs(output.logits, self.config)
        self.positions += 1
        self.column += 1
