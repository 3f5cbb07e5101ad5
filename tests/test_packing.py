"""Groups packed as one row must give the log-probs and the gradient of completions
forwarded one by one."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, load_experiment, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

experiment = load_experiment()
train, buffer = experiment.train, experiment.replay_buffer
sequences_log_probs = train.sequences_log_probs
END = 2
MAX_LENGTH = 128


def config_of(**changes):
    """Two groups of two an update and no limit on the row, unless changed."""
    defaults = dict(
        precision="float32",
        max_length=MAX_LENGTH,
        group_size=2,
        train_batch_size=4,
        rollouts_per_step=2,
    )
    return train.Config(**{**defaults, "micro_batch_tokens": 4096, "max_new_tokens": 10, **changes})


def group(prompt_length, lengths, seed=0, advantages=None, masks=None, dtype=torch.float32):
    """A group of random ids, none of them 0 to 2. In place of sampled log-probs every token has a
    number of its own, by which it is found again wherever it is packed."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 400, (n,), generator=generator)  # noqa: E731
    numbers = torch.arange(sum(lengths), dtype=dtype) + 1000 * seed
    experience = buffer.Experience(
        prompt_ids=draw(prompt_length),
        completion_ids=[draw(length) for length in lengths],
        completion_masks=masks or [torch.ones(length, dtype=dtype) for length in lengths],
        sampled_log_probs=list(numbers.split(lengths)),
        truncated=torch.zeros(len(lengths)),
        completions=[""] * len(lengths),
        answer="0",
    )
    advantages = (
        torch.linspace(-1, 1.5, len(lengths)) if advantages is None else torch.tensor(advantages)
    )
    experience.advantages = advantages.to(dtype)
    return experience


def batches_of(experiences, config, packed=True, seed=0):
    replay_buffer = buffer.ReplayBuffer(packed)
    replay_buffer.extend(experiences)
    return replay_buffer.batches(config, torch.Generator().manual_seed(seed))


def one_batch(experiences, config, packed=True):
    """All of some groups' completions in one optimizer batch."""
    count = sum(len(experience.completion_masks) for experience in experiences)
    config.train_batch_size, config.group_size = count, count // len(experiences)
    (batch,) = batches_of(experiences, config, packed)
    return batch


def by_number(batch, values):
    """{number of a token: its value} over the micro-batches of a batch."""
    pairs = zip(batch, values)
    return {n.item(): v.item() for b, row in pairs for n, v in zip(b.sampled_log_probs, row)}


def packed_log_probs(model, batch, config):
    with torch.no_grad():
        return by_number(
            batch, [sequences_log_probs(model, micro_batch, config) for micro_batch in batch]
        )


def plain_log_probs(model, experience, number, temperature=1.0):
    """Log-probs of a completion alone behind its prompt: no padding, no packing, no mask."""
    prompt, ids = experience.prompt_ids, experience.completion_ids[number]
    with torch.no_grad():
        logits = model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
    return (logits.float() / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]  # (tokens,)


def one_by_one(model, experiences, temperature=1.0):
    found = {}
    for experience in experiences:
        for number, mask in enumerate(experience.completion_masks):
            log_probs = plain_log_probs(model, experience, number, temperature)
            numbers = experience.sampled_log_probs[number]
            found |= {n.item(): v.item() for n, v, m in zip(numbers, log_probs, mask) if m}
    return found


def assert_same(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in expected) < tolerance


def ragged_groups(dtype=torch.float32):
    """In the first group a completion parts from another after 3 tokens,
    in the second two are the same."""
    groups = [
        group(7, [5, 1, 9, 4], seed=1, dtype=dtype),
        group(12, [3, 10, 3, 6], seed=2, dtype=dtype),
    ]
    groups[0].completion_ids[2][:3] = groups[0].completion_ids[0][:3]
    groups[1].completion_ids[2] = groups[1].completion_ids[0].clone()
    return groups


# ---------------------------------------------------------------- log-probs
@pytest.mark.parametrize("micro_batch_tokens", [4096, 60, 20])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_one_by_one(architecture, attention, micro_batch_tokens):
    """Pitfall 9: packed sequences that see each other have log-probs that are wrong by 0.5, and
    nothing fails.

    Where the model cannot be packed, the same packer lays one completion to a row.
    """
    model = make_model(architecture, attention)
    config = config_of(micro_batch_tokens=micro_batch_tokens)
    packed = experiment.model.can_pack(model.config, MAX_LENGTH)
    assert packed == (architecture != "gemma3-short-window")
    groups = ragged_groups()
    batch = one_batch(groups, config, packed)
    assert_same(packed_log_probs(model, batch, config), one_by_one(model, groups))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_a_short_window_would_be_wrong(attention):
    """The test above has teeth: what `can_pack` refuses differs by much more than rounding."""
    model, groups = make_model("gemma3-short-window", attention), [group(20, [10, 10])]
    found = packed_log_probs(model, one_batch(groups, config_of()), config_of())
    expected = one_by_one(model, groups)
    assert max(abs(found[key] - expected[key]) for key in expected) > 0.01


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_completions_do_not_see_each_other(attention):
    """Pitfall 9, seen from the other side: other tokens in completion 2 change nothing in
    completions 1 and 3."""
    model, config, experience = make_model("qwen2", attention), config_of(), group(6, [5, 4, 7])
    before = packed_log_probs(model, one_batch([experience], config), config)
    experience.completion_ids[1] = torch.tensor([9, 8, 7, 6])
    after = packed_log_probs(model, one_batch([experience], config), config)
    second = {n.item() for n in experience.sampled_log_probs[1]}
    assert all(abs(after[key] - before[key]) < 1e-5 for key in before.keys() - second)
    assert all(abs(after[key] - before[key]) > 1e-3 for key in second)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_temperature_is_in_the_log_probs(temperature):
    """Pitfall 5: at T = 0.5 the policy that sampled is not the softmax of the bare logits."""
    model, groups, config = make_model(), ragged_groups(), config_of(temperature=temperature)
    found = packed_log_probs(model, one_batch(groups, config), config)
    assert_same(found, one_by_one(model, groups, temperature))
    assert abs(found[1000] - one_by_one(model, groups)[1000]) > 0.1


@pytest.mark.parametrize("packed", [True, False])
def test_end_and_padding_tokens_inside_the_prompt(packed):
    """Pitfall 2: a mask inferred from ids hides every end-of-turn token of a chat prompt, and every
    id 0."""
    model, config, groups = make_model(), config_of(), ragged_groups()
    for experience in groups:
        experience.prompt_ids[torch.tensor([0, 3, 4, 6])] = torch.tensor([END, 0, END, 0])
        experience.completion_ids[2][torch.tensor([0, 1])] = torch.tensor([0, END])
    found = packed_log_probs(model, one_batch(groups, config, packed), config)
    assert_same(found, one_by_one(model, groups))


def test_one_marked_token_selects_exactly_its_own_log_prob():
    """Pitfall 7: off by one between logits and targets trains the token before or after."""
    model, config = make_model(), config_of()
    for number, position in [(0, 0), (0, 4), (1, 0), (1, 2), (2, 6)]:
        masks = [torch.zeros(length) for length in (5, 3, 7)]
        masks[number][position] = 1
        experience = group(6, [5, 3, 7], masks=masks)
        (micro_batch,) = one_batch([experience], config)
        log_probs = sequences_log_probs(model, micro_batch, config)
        assert micro_batch.targets.tolist() == [experience.completion_ids[number][position]]
        expected = plain_log_probs(model, experience, number)
        assert log_probs.shape == (1,) and abs(log_probs.item() - expected[position].item()) < 1e-4
        others = torch.cat([expected[:position], expected[position + 1 :]])
        assert (others - log_probs).abs().min() > 1e-3  # so that a neighbour would be noticed


@pytest.mark.parametrize("packed", [True, False])
def test_given_tokens_are_context_and_nothing_else(packed):
    """Pitfall 26: a tool's tokens (mask 0) are seen,
    but neither trained on nor counted in a denominator."""
    masks = [torch.tensor([1, 1, 0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([0, 0])]
    model = make_model()
    config = config_of(max_new_tokens=20)
    experience = group(6, [5, 3, 2], masks=masks)
    for critic, expected in [
        ("grpo", [1 / 9] * 3 + [1 / 6] * 2),
        ("drgrpo", [1 / 60] * 5),
        ("dapo", [1 / 5] * 5),
    ]:
        config.critic_type = critic
        batch = one_batch([experience], config, packed)
        weights = by_number(batch, [micro_batch.weights for micro_batch in batch])
        assert [weights[number] for number in (0, 1, 4, 6, 7)] == pytest.approx(expected) and len(
            weights
        ) == 5
    found = packed_log_probs(model, batch, config)
    assert_same(found, one_by_one(model, [experience]))
    experience.completion_ids[0][2] = 7  # a given token: what comes after it sees it
    changed = packed_log_probs(model, one_batch([experience], config, packed), config)
    assert changed[1] == pytest.approx(found[1], abs=1e-5) and abs(changed[4] - found[4]) > 1e-3


def test_final_logit_softcapping_is_applied():
    """Gemma caps its logits after the output head, which `sequences_log_probs` calls itself."""
    model, groups, config = make_model("gemma3"), ragged_groups(), config_of()
    uncapped = packed_log_probs(model, one_batch(groups, config), config)
    model.config.final_logit_softcapping = 1.5
    found = packed_log_probs(model, one_batch(groups, config), config)
    assert_same(found, one_by_one(model, groups))  # transformers' own forward caps too
    assert max(abs(found[key] - uncapped[key]) for key in found) > 0.1


def test_chunked_log_softmax_equals_the_naive_one_and_its_gradient():
    """Pitfall 19: the logits of a whole row in float32 fill the card.
    The head sees a chunk of tokens at a time."""
    model, config, groups = make_model("qwen2-untied"), config_of(temperature=0.7), ragged_groups()
    (micro_batch,) = one_batch(groups, config)
    factors = torch.randn(len(micro_batch.targets), generator=torch.Generator().manual_seed(0))

    def gradients(log_probs):
        return torch.autograd.grad((factors * log_probs).sum(), list(model.parameters()))

    naive = []  # in the micro-batch's order
    where = {
        n.item(): (e, i, t)
        for e in groups
        for i, row in enumerate(e.sampled_log_probs)
        for t, n in enumerate(row)
    }
    for number in micro_batch.sampled_log_probs:
        e, i, t = where[number.item()]
        logits = model(torch.cat([e.prompt_ids, e.completion_ids[i]])[None]).logits[
            0, len(e.prompt_ids) - 1 + t
        ]
        naive.append((logits / 0.7).log_softmax(-1)[e.completion_ids[i][t]])
    naive = torch.stack(naive)
    expected = gradients(naive)

    model.config.vocab_size = 2**26 // 6  # so that a chunk is six tokens
    sizes = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    log_probs = sequences_log_probs(model, micro_batch, config)
    assert sizes == [6] * 6 + [5] and len(micro_batch.targets) == 41
    torch.testing.assert_close(log_probs, naive, atol=1e-4, rtol=0)
    for gradient, reference in zip(gradients(log_probs), expected):
        assert (gradient - reference).norm() <= 1e-4 * reference.norm()
    # the backward pass computes a chunk's logits again, in place of keeping them
    assert len(sizes) == 2 * 7


def test_log_probs_are_at_least_float32():
    model, config = make_model().bfloat16(), config_of()
    assert (
        sequences_log_probs(model, one_batch(ragged_groups(), config)[0], config).dtype
        == torch.float32
    )


# ---------------------------------------------------------------- what is packed
def test_a_packed_row_by_hand():
    """Prompt of 3, completions of 3 and 2, each without its last token:
    positions restart, the mask is by segment."""
    experience = group(3, [3, 2])
    (micro_batch,) = one_batch([experience], config_of())
    parts = [experience.prompt_ids, *(ids[:-1] for ids in experience.completion_ids)]
    assert micro_batch.input_ids.tolist() == [torch.cat(parts).tolist()]
    assert micro_batch.targets.tolist() == torch.cat(experience.completion_ids).tolist()
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert micro_batch.predicted_from.tolist() == [2, 3, 4, 2, 5]
    visible = micro_batch.attention_mask(torch.float32)[0, 0] == 0
    assert visible.long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_is_additive_and_every_query_sees_something(dtype):
    """A bool mask is silently wrong in eager attention,
    and a query (padding too) that sees nothing is NaN."""
    config = config_of()
    (micro_batch,) = one_batch([group(3, [2, 1]), group(9, [5, 8], seed=1)], config)
    mask = micro_batch.attention_mask(dtype)
    assert mask.dtype == dtype and mask.shape == (2, 1, 20, 20)
    assert set(mask.unique().tolist()) == {torch.finfo(dtype).min, 0.0}
    assert (mask == 0).any(-1).all() and mask.isfinite().all()
    unpacked = one_batch([group(3, [2, 1])], config, packed=False)[0]
    assert unpacked.attention_mask(dtype).tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_a_shared_beginning_stands_once():
    """Completions A B C, A B D E, A B C and A:
    A and B are forwarded once, and D parts from C after them."""
    experience, (a, b, c, d, e) = group(3, [3, 4, 3, 1]), [50, 51, 52, 53, 54]
    experience.completion_ids = [
        torch.tensor(ids) for ids in ([a, b, c], [a, b, d, e], [a, b, c], [a])
    ]
    (micro_batch,) = one_batch([experience], config_of())
    assert micro_batch.input_ids.tolist() == [[*experience.prompt_ids.tolist(), a, b, d]]
    assert micro_batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert micro_batch.predicted_from.tolist() == [2, 3, 4, 2, 3, 4, 5, 2, 3, 4, 2]
    assert micro_batch.targets.tolist() == [a, b, c, a, b, d, e, a, b, c, a]
    experience.completion_ids[1][0] = (
        d  # now they part at once, and nobody of A's family sees D B D
    )
    (micro_batch,) = one_batch([experience], config_of())
    assert micro_batch.input_ids[0, 3:].tolist() == [a, b, d, b, d]
    assert micro_batch.position_ids[0, 3:].tolist() == [3, 4, 3, 4, 5]
    visible = micro_batch.attention_mask(torch.float32)[0, 0] == 0
    assert visible[3:].long().tolist() == [
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 1, 1, 1],
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=6), min_size=2, max_size=6))
def test_any_tree_gives_the_log_probs_of_its_completions(completions):
    """Three different tokens only, so that completions share beginnings, contain and equal
    each other."""
    model, experience = make_model(), group(4, [len(ids) for ids in completions])
    experience.completion_ids = [torch.tensor(ids) for ids in completions]
    batch = one_batch([experience], config_of())
    assert_same(packed_log_probs(model, batch, config_of()), one_by_one(model, [experience]))
    prefixes = {tuple(ids[:n]) for ids in completions for n in range(1, len(ids))}
    assert batch[0].input_ids.shape == (1, 4 + len(prefixes))  # every prefix stands once


def cut(experience, most_tokens):
    rows = buffer.packed_rows(experience, experience.completion_masks, most_tokens)
    return [list(row.paths) for row in rows]


def test_rows_are_split_by_the_token_limit():
    """Prompt of 10, completions of 5, 5, 20, 3, 3 less a token each:
    18 tokens hold the prompt and two short ones."""
    experience = group(10, [5, 5, 20, 3, 3])
    assert cut(experience, 4096) == [[0, 1, 2, 3, 4]]
    assert cut(experience, 18) == [[0, 1], [2], [3, 4]]  # 29 tokens alone: at least one to a row
    assert cut(experience, 17) == [[0], [1], [2], [3, 4]]
    assert cut(experience, 0) == [[0], [1], [2], [3], [4]]
    rows = buffer.single_rows(experience, experience.completion_masks)
    assert [list(row.paths) for row in rows] == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 33, 50, 100, 4096])
def test_micro_batches_hold_every_token_once_within_the_limit(micro_batch_tokens, packed):
    groups = [*ragged_groups(), group(4, [6, 6, 6, 6], seed=3)]
    batch = one_batch(groups, config_of(micro_batch_tokens=micro_batch_tokens), packed)
    for micro_batch in batch:
        assert (
            micro_batch.input_ids.numel() <= micro_batch_tokens or len(micro_batch.input_ids) == 1
        )
    for experience in groups:
        masks = experience.completion_masks
        rows = buffer.single_rows(experience, masks)
        if packed:
            rows = buffer.packed_rows(experience, masks, micro_batch_tokens)
        for row in rows:
            assert len(row.paths) == 1 or packed and len(row.ids) <= micro_batch_tokens
    numbers = torch.cat([micro_batch.sampled_log_probs for micro_batch in batch]).tolist()
    assert sorted(numbers) == sorted(
        n.item() for e in groups for row in e.sampled_log_probs for n in row
    )
    if micro_batch_tokens == 4096:
        assert len(batch) == 1 and batch[0].input_ids.shape == ((3, 28) if packed else (12, 21))


@pytest.mark.parametrize("packed", [True, False])
def test_padding_leaves_log_probs_loss_and_figures_unchanged(packed):
    """Pitfall 14: a short row alone, and beside one of three times its length that weighs
    nothing."""
    model, config = make_model(), config_of()
    objective = experiment.loss.GRPOLoss(0.2, 0.2, 0.1)
    short = group(6, [5, 3], seed=1)
    long = group(30, [9, 9], seed=2, masks=[torch.zeros(9), torch.zeros(9)])

    def figures(groups):
        weights = [torch.full((5,), 0.1), torch.full((3,), 0.2)], [torch.zeros(9), torch.zeros(9)]
        rows = []  # made here, since packed_rows leaves out what has no sampled token
        for experience, group_weights in zip(groups, weights):
            for numbers in [(0, 1)] if packed else [(0,), (1,)]:
                prompt_ids = experience.prompt_ids.tolist()
                rows.append(buffer.PrefixTree(experience, group_weights, prompt_ids))
                for number in numbers:
                    rows[-1].add(number)
        micro_batch = buffer.join_experience_batch(rows, packed)
        log_probs = sequences_log_probs(model, micro_batch, config)
        generator = torch.Generator().manual_seed(0)
        micro_batch.old_log_probs, micro_batch.reference_log_probs = (
            log_probs.detach() + 0.3 * torch.randn(2, 8, generator=generator)
        )
        loss = objective(log_probs, micro_batch)
        (gradient,) = torch.autograd.grad(loss, model.model.embed_tokens.weight)
        return (
            micro_batch.input_ids.shape[1],
            log_probs,
            gradient,
            experiment.loss.loss_metrics(objective.token_sums[-1:], [1.0]),
        )

    width, log_probs, gradient, metrics = figures([short])
    padded_width, *padded, padded_metrics = figures([short, long])
    assert padded_width > 3 * width
    torch.testing.assert_close(padded[0], log_probs, atol=1e-5, rtol=0)
    assert (padded[1] - gradient).norm() <= 1e-4 * gradient.norm()
    # of the numbers in place of log-probs
    metrics.pop("max_log_prob_gap")
    padded_metrics.pop("max_log_prob_gap")
    assert padded_metrics == pytest.approx(metrics, rel=1e-4) and metrics["clip_fraction"] > 0


def test_a_fully_masked_completion_and_row_are_finite():
    """Pitfall 14: 0 / 0 in one row makes the whole update NaN."""
    model, objective = make_model(), experiment.loss.GRPOLoss(0.2, 0.2, 0.1)
    masks = [torch.zeros(5), torch.ones(3)]
    for critic in ("grpo", "drgrpo", "dapo"):
        config = config_of(critic_type=critic)
        (micro_batch,) = one_batch(
            [group(6, [5, 3], masks=masks), group(4, [2, 2], 1, masks=[torch.zeros(2)] * 2)], config
        )
        log_probs = sequences_log_probs(model, micro_batch, config)
        micro_batch.old_log_probs = micro_batch.reference_log_probs = log_probs.detach()
        loss = objective(log_probs, micro_batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert (
            len(log_probs) == 3
            and loss.isfinite()
            and all(gradient.isfinite().all() for gradient in gradients)
        )


def test_can_pack_is_decided_from_the_config():
    """Where packing cannot be exact nothing fails, so the decision must be right."""
    can_pack = experiment.model.can_pack
    windows = ARCHITECTURES["gemma3"]()  # of 256 tokens
    assert can_pack(windows, 256) and not can_pack(windows, 257)
    assert can_pack(transformers.MistralConfig(sliding_window=None), 10**6)
    assert can_pack(transformers.MistralConfig(sliding_window=64), 64)
    assert not can_pack(transformers.MistralConfig(sliding_window=64), 65)
    assert can_pack(transformers.Qwen2Config(use_sliding_window=False), 10**6)
    assert not can_pack(transformers.Qwen3NextConfig(num_hidden_layers=4), 64)  # linear attention
    flash = ARCHITECTURES["qwen2"]()
    flash._attn_implementation = "flash_attention_2"  # takes no mask
    assert not can_pack(flash, 64)


# ---------------------------------------------------------------- optimizer batches
def test_groups_are_never_split_over_optimizer_batches():
    """The weights of a group, and what its advantages sum to, belong to one update."""
    groups = [group(4, [2, 3, 1, 2], seed=seed) for seed in range(6)]
    config = config_of(group_size=4, train_batch_size=8, rollouts_per_step=6)
    orders = set()
    for seed in range(4):
        batches = batches_of(groups, config, seed=seed)
        found = [torch.cat([m.sampled_log_probs for m in batch]).tolist() for batch in batches]
        assert [len(numbers) for numbers in found] == [16, 16, 16]
        order = tuple(tuple(sorted({n // 1000 for n in numbers})) for numbers in found)
        assert sorted(sum(order, ())) == [0, 1, 2, 3, 4, 5] and all(
            len(chosen) == 2 for chosen in order
        )
        # the seed decides
        assert batches_of(groups, config, seed=seed)[0][0].targets.equal(batches[0][0].targets)
        orders.add(order)
    assert len(orders) > 1


@pytest.mark.parametrize(
    "critic, expected", [("grpo", 1 / (3 * 4)), ("drgrpo", 1 / (10 * 4)), ("dapo", 1 / 11)]
)
def test_groups_without_spread_are_not_forwarded_but_count(critic, expected):
    """Pitfall 13: they teach nothing, so without a KL term they are skipped;
    the others must not weigh more for it."""
    groups = [group(4, [3, 3], seed=1), group(4, [2, 3], seed=2, advantages=[0.0, 0.0])]
    (batch,) = batches_of(groups, config_of(kl_weight=0.0, critic_type=critic))
    weights = by_number(batch, [micro_batch.weights for micro_batch in batch])
    assert weights == pytest.approx({1000 + i: expected for i in range(6)})
    # the KL pulls on them too
    (batch,) = batches_of(groups, config_of(kl_weight=0.01, critic_type=critic))
    weights = by_number(batch, [micro_batch.weights for micro_batch in batch])
    assert len(weights) == 11 and weights[1000] == pytest.approx(expected)


def test_a_batch_of_groups_without_spread_is_empty():
    groups = [group(4, [3, 3], seed=seed, advantages=[0.0, 0.0]) for seed in (1, 2)]
    assert batches_of(groups, config_of(kl_weight=0.0)) == [[]]


def test_the_same_prompt_twice_stays_two_groups():
    """Pitfall 12: groups keyed by the prompt's text merge,
    and each is then compared with the other's completions."""
    first, second = group(4, [2, 2], seed=1), group(4, [2, 2], seed=2)
    second.prompt_ids = first.prompt_ids.clone()
    first.advantages = train.group_advantages(torch.tensor([1.0, 0.0]))
    # shifted: the same advantages
    second.advantages = train.group_advantages(torch.tensor([11.0, 10.0]))
    (micro_batch,) = one_batch([first, second], config_of())
    assert len(micro_batch.input_ids) == 2
    advantages = by_number([micro_batch], [micro_batch.advantages])
    high, low = first.advantages.tolist()
    assert (
        advantages == {number: high if number % 1000 < 2 else low for number in advantages}
        and len(advantages) == 8
    )


# ---------------------------------------------------------------- one update
class Bigram(nn.Module):
    """A float64 policy whose next token depends on the last alone:
    transformers' norms are float32 inside."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Embedding(400, 6).double()
        self.head = nn.Linear(6, 400, bias=False).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=400))

    def get_decoder(self):
        return lambda ids, **_: SimpleNamespace(last_hidden_state=self.embedding(ids))

    def get_output_embeddings(self):
        return self.head


def update(model, config, dtype, packed=True, change=None):
    """(loss, gradient) of one update on two ragged groups, with old and reference log-probs
    some way off."""
    batch = one_batch(ragged_groups(dtype), config, packed)
    objective, total = experiment.loss.GRPOLoss(0.2, 0.28, config.kl_weight), 0
    model.zero_grad()
    for micro_batch in batch:
        log_probs = sequences_log_probs(model, micro_batch, config)
        # by the token's number, so that cutting changes nothing
        shift = torch.sin(micro_batch.sampled_log_probs)
        micro_batch.old_log_probs = log_probs.detach() + 0.3 * shift
        micro_batch.reference_log_probs = log_probs.detach() - 0.5 * shift
        loss = objective(log_probs, micro_batch)
        loss.backward()
        total += loss.item()
    return (
        len(batch),
        total,
        torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
    )


@pytest.mark.parametrize("critic", ["grpo", "drgrpo", "dapo"])
@pytest.mark.parametrize(
    "make, dtype, tolerance", [(Bigram, torch.float64, 1e-9), (make_model, torch.float32, 1e-4)]
)
def test_micro_batch_tokens_never_changes_the_gradient(make, dtype, tolerance, critic):
    """Pitfall 15: however the batch is cut into rows and micro-batches.
    1 x 8 equals 4 x 2 equals 8 x 1."""
    model, config = make(), config_of(critic_type=critic, kl_weight=0.1)
    count, loss, gradient = update(model, config, dtype)
    assert count == 1 and gradient.dtype == dtype
    counts = set()
    for micro_batch_tokens, packed in [(64, True), (26, True), (1, True), (50, False), (1, False)]:
        config.micro_batch_tokens = micro_batch_tokens
        count, other_loss, other = update(model, config, dtype, packed)
        assert (other - gradient).norm() <= tolerance * gradient.norm()
        assert other_loss == pytest.approx(loss, rel=tolerance)
        counts.add(count)
    assert len(counts) >= 3 and max(counts) == 8


@pytest.mark.parametrize("critic", ["grpo", "drgrpo", "dapo"])
def test_the_whole_update_equals_the_formula(critic):
    """The papers' nested means, written out for completions forwarded one by one, in float64."""
    model = Bigram()
    config = config_of(critic_type=critic, kl_weight=0.1)
    groups = ragged_groups(torch.float64)
    terms = []
    for e in groups:
        for ids, advantage, numbers in zip(e.completion_ids, e.advantages, e.sampled_log_probs):
            context = torch.cat([e.prompt_ids[-1:], ids[:-1]])
            log_probs = (
                model.head(model.embedding(context)).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            )
            shift = torch.sin(numbers)
            ratio = (log_probs - log_probs.detach() - 0.3 * shift).exp()
            x = log_probs.detach() - 0.5 * shift - log_probs
            surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
            terms.append(-surrogate + 0.1 * (x.exp() - x - 1))
    if critic == "grpo":
        expected = torch.stack([term.mean() for term in terms]).mean()
    elif critic == "drgrpo":
        expected = torch.stack([term.sum() / 10 for term in terms]).mean()
    else:
        expected = torch.cat(terms).mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    _, loss, gradient = update(model, config, torch.float64)
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(
        gradient, torch.cat([g.flatten() for g in gradients]), rtol=1e-9, atol=1e-15
    )


def test_gradients_repeat_bit_for_bit_on_two_threads():
    """Bug: hidden[indices] adds up in its backward pass whatever thread comes first, where an index
    occurs often, and a run with the same seed drifts away from itself."""
    torch.set_num_threads(2)
    model, config = make_model().train(), config_of(micro_batch_tokens=8192)
    (batch,) = one_batch([group(5, [30] * 40)], config)
    gradients = []
    for _ in range(10):
        model.zero_grad()
        experiment.train.sequences_log_probs(model, batch, config).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(a.equal(b) for other in gradients[1:] for a, b in zip(gradients[0], other))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_old_and_reference_log_probs_are_those_of_the_training_forward(precision):
    """Pitfall 16: a ratio that is not 1 before the policy has moved, by dropout or another code
    path.

    In float32 the old ones are the sampler's: test_sampled_log_probs_equal_the_recomputed_ones.
    """
    model = make_model()
    config = config_of(micro_batch_tokens=40, train_batch_size=2, precision=precision)
    batches = batches_of([group(7, [5, 4], seed=1), group(12, [3, 6], seed=2)], config)
    train.add_old_and_reference_log_probs(model, model, batches, config)
    assert len(batches) == 2 and all(
        micro_batch.old_log_probs is None for micro_batch in batches[0]
    )
    model.train()
    for number, batch in enumerate(batches):
        for micro_batch in batch:
            log_probs = sequences_log_probs(model, micro_batch, config).detach()
            # so the KL of the first update is exactly 0
            assert log_probs.equal(micro_batch.reference_log_probs)
            expected = micro_batch.sampled_log_probs if precision == "float32" else log_probs
            assert number == 0 or expected.equal(micro_batch.old_log_probs)


def test_without_a_kl_term_no_reference_is_asked():
    model, config = make_model(), config_of(kl_weight=0.0, train_batch_size=2)
    batches = batches_of([group(7, [5, 4], seed=1), group(12, [3, 6], seed=2)], config)
    train.add_old_and_reference_log_probs(model, None, batches, config)
    assert [micro_batch.reference_log_probs for micro_batch in sum(batches, [])] == [None, None]
