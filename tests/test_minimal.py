"""experiment_minimal: the plain file is right, and experiment_base computes the same gradient."""

import ast
import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ROOT, chat_template, load_experiment, make_model
from test_sampling import END, OTHER_END, TOKENIZER, make_tokenizer

PATH = ROOT / "experiment_minimal" / "train.py"
spec = importlib.util.spec_from_file_location("minimal", PATH)
minimal = importlib.util.module_from_spec(spec)
spec.loader.exec_module(minimal)
minimal.DEVICE = "cpu"  # where the tests' tensors are
base = load_experiment()

PROMPTS = [[11, 12, 13, 14, 15], [20, 21], [30, END, 31, 0, 32, 33, END, 34, 35]]


def padded(rows: list[list[int]]):
    """(ids, mask), padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def sampled(model, group_size=4, eos_ids=(END,), **arguments):
    """(ids, mask, width of the prompts) of completions of PROMPTS."""
    ids, mask = padded([row for row in PROMPTS for _ in range(group_size)])
    eos_ids = torch.tensor(sorted(eos_ids))
    return *minimal.sample(model, ids, mask, eos_ids, **arguments), ids.shape[1]


MANY_ENDS = (END, *range(10, 400, 10))  # so that rows end at different times


# ---------------------------------------------------------------- the file
def test_it_fits_one_sitting_and_copies_nothing():
    text = PATH.read_text()
    assert len(text.splitlines()) <= 220
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    standard = {"copy", "json", "re", "sys", "pathlib"}
    assert imported - standard <= {"torch", "transformers", "tqdm"}


def test_its_first_lines_name_its_dependencies_as_the_requirements_pin_them():
    """Inline script metadata (PEP 723): `uv run experiment_minimal/train.py` needs nothing else."""
    import tomllib

    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", PATH.read_text())
    metadata = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    assert metadata["requires-python"] == ">=3.11"
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert metadata["dependencies"] and set(metadata["dependencies"]) <= set(pinned)


def test_every_equation_of_the_docstring_is_marked_in_the_code():
    docstring = ast.get_docstring(ast.parse(PATH.read_text()))
    numbers = re.findall(r"^ +(\(\d\))", docstring, re.MULTILINE)
    assert numbers == ["(1)", "(2)", "(3)", "(4)", "(5)", "(6)"]
    code = PATH.read_text().split("import copy")[1]
    assert all(number in code for number in numbers)


# ---------------------------------------------------------------- the same gradient as the base
class Float64Norm(torch.nn.Module):
    """transformers' norms compute in float32, whatever their input is."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        self.epsilon = norm.variance_epsilon

    def forward(self, hidden):
        variance = hidden.square().mean(-1, keepdim=True)
        return self.weight * hidden * torch.rsqrt(variance + self.epsilon)


def float64_model():
    model = make_model("qwen2").double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Qwen2RMSNorm":
                setattr(module, name, Float64Norm(child))
    model.config._attn_implementation = "sdpa"
    return model


def gradient_of(loss, model):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def experiences_of(ids, mask, width, advantages, group_size):
    """What the base would make of the same completions."""
    experiences = []
    for start in range(0, len(ids), group_size):
        completions = []
        for row in range(start, start + group_size):
            length = int(mask[row, width:].sum())
            completions.append(ids[row, width : width + length])
        experience = base.replay_buffer.Experience(
            prompt_ids=ids[start, :width][mask[start, :width].bool()],
            completion_ids=completions,
            # In float64, so that the weights 1 / length are not rounded to float32.
            completion_masks=[torch.ones(len(row)).double() for row in completions],
            sampled_log_probs=[torch.zeros(len(row)).double() for row in completions],
            truncated=torch.zeros(group_size),
            completions=[""] * group_size,
            answer="",
            advantages=advantages[start : start + group_size],
        )
        experiences.append(experience)
    return experiences


@pytest.mark.parametrize("micro_batch_tokens", [4096, 60])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_that_of_the_base(temperature, micro_batch_tokens, monkeypatch):
    """Padded rows, log_softmax, gather and means, against packed rows, prefix trees, the chunked
    head and token weights: the same completions give the same loss and gradient in float64."""
    monkeypatch.setattr(minimal, "TEMPERATURE", temperature)
    torch.manual_seed(3)
    model = float64_model()
    ids, mask, width = sampled(model, eos_ids=MANY_ENDS)
    length = ids.shape[1] - width
    assert len(set(mask[:, width:].sum(-1).tolist())) > 3  # ragged
    advantages = minimal.group_advantages(torch.randn(3, 4).double()).flatten()
    drift = 0.4 * torch.randn(2, *ids.shape).double()  # of old and reference, by position in `ids`
    drift = drift[:, :, width:]

    log_probs = minimal.completion_log_probs(model, ids, mask, length)
    old = log_probs.detach() + drift[0]
    reference = log_probs.detach() + drift[1]
    arguments = (log_probs, old, reference, advantages, mask[:, width:])
    loss = minimal.grpo_loss(*arguments)
    gradient = gradient_of(loss, model)

    config = base.train.Config(
        precision="float32",
        temperature=temperature,
        group_size=4,
        train_batch_size=12,
        micro_batch_tokens=micro_batch_tokens,
    )
    assert (config.clip_eps_low, config.clip_eps_high) == (minimal.CLIP_EPS, minimal.CLIP_EPS)
    assert config.kl_weight == minimal.KL_WEIGHT
    experiences = experiences_of(ids, mask, width, advantages, group_size=4)
    for number, experience in enumerate(experiences):
        for i, row in enumerate(experience.sampled_log_probs):
            row += 1000 * (4 * number + i) + torch.arange(len(row))  # says which token it is
    replay_buffer = base.replay_buffer.ReplayBuffer(packed=True)
    replay_buffer.extend(experiences)
    (batch,) = replay_buffer.batches(config, torch.Generator().manual_seed(0))
    assert len(batch) == 1 if micro_batch_tokens == 4096 else len(batch) >= 3
    objective = base.loss.GRPOLoss(config.clip_eps_low, config.clip_eps_high, config.kl_weight)
    base_loss = 0
    base_gradient = 0
    for micro_batch in batch:
        number = micro_batch.sampled_log_probs.long()
        row = number // 1000
        position = number % 1000
        micro_batch.old_log_probs = old[row, position]
        micro_batch.reference_log_probs = reference[row, position]
        found = base.train.sequences_log_probs(model, micro_batch, config)
        torch.testing.assert_close(found, log_probs[row, position], rtol=1e-9, atol=1e-9)
        part = objective(found, micro_batch)
        base_loss += part.item()
        base_gradient = base_gradient + gradient_of(part, model)
    assert sum(sums["clipped"] for sums in objective.token_sums) > 0  # the clip is at work
    assert base_loss == pytest.approx(loss.item(), rel=1e-9)
    assert gradient.dtype == torch.float64 and gradient.norm() > 0
    assert (base_gradient - gradient).norm() <= 1e-9 * gradient.norm()


def test_the_form_of_the_reward_is_that_of_the_base():
    """On what the embedded policy writes, both rewards are the same."""
    texts = [
        "<think>1+2=3</think>\n<answer>3</answer>",
        "<answer>3</answer>",
        "<think>1+2=3</think><answer>4</answer>",
        "<think>1+2=3</think> 3",
        "<answer>3",
        "3",
        "",
        "<answer>2</answer><answer>3</answer>",
        "<think><answer>3</answer></think><answer>3</answer>",
    ]
    for text in texts:
        expected = base.train.accuracy_reward(text, "3") + 0.1 * base.train.format_reward(text)
        assert minimal.reward(text, "3") == pytest.approx(expected), text


@pytest.mark.parametrize(
    "text", ["<answer>13</answer>", "<answer>3 or 4</answer>", "<answer></answer>"]
)
def test_an_answer_that_merely_contains_the_right_digits_is_not_paid(text):
    """Pitfall 24."""
    assert minimal.reward(text, "3") == 0
    assert minimal.reward("<answer>" + "9" * 5000 + "</answer>", "3") == 0


# ---------------------------------------------------------------- sampling
def test_the_mask_runs_through_the_first_end_token():
    """Pitfall 1: masked out where pad == eos, the end token is never learnt."""
    ids, mask, width = sampled(make_model(), eos_ids=MANY_ENDS)
    ends = torch.tensor(MANY_ENDS)
    lengths = set()
    for row, row_mask in zip(ids[:, width:], mask[:, width:]):
        is_end = torch.isin(row, ends)
        length = int(is_end.long().argmax()) + 1 if is_end.any() else len(row)
        assert row_mask.tolist() == [1] * length + [0] * (len(row) - length)
        lengths.add(length)
    assert len(lengths) > 3


def test_what_follows_the_end_token_is_no_text():
    """Bug: rows are filled up with id 0, which is a letter in many vocabularies."""
    model = make_model()
    ids, mask, width = sampled(model, eos_ids=MANY_ENDS)
    after_the_end = ids[:, width:][mask[:, width:] == 0]
    assert len(after_the_end) and set(after_the_end.tolist()) == {END}


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_log_probs_are_those_of_an_unpadded_forward(temperature, monkeypatch):
    """Pitfalls 2, 5 and 7: end and padding ids inside a prompt, the temperature, off by one."""
    monkeypatch.setattr(minimal, "TEMPERATURE", temperature)
    model = make_model()
    ids, mask, width = sampled(model, eos_ids=MANY_ENDS)
    length = ids.shape[1] - width
    log_probs = minimal.completion_log_probs(model, ids, mask, length)
    for row in range(len(ids)):
        prompt = PROMPTS[row // 4]
        completion = ids[row, width:][mask[row, width:].bool()]
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor(prompt), completion])[None]).logits[0]
        expected = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        expected = expected.gather(1, completion[:, None])[:, 0]
        found = log_probs[row, : len(completion)]
        torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=0)


class Scripted:
    """A model whose logits are the same at every position."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, ids, **_):
        logits = self.logits.expand(*ids.shape, -1)
        return SimpleNamespace(logits=logits, past_key_values=None)


def test_sampling_is_a_plain_softmax_at_its_temperature(monkeypatch):
    """Pitfalls 4 and 5: no top_k, and the temperature in the distribution."""
    monkeypatch.setattr(minimal, "TEMPERATURE", 0.5)
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1e9])
    ids, mask = padded([[1]] * 400)
    found, _ = minimal.sample(Scripted(logits), ids, mask, torch.tensor([3]))
    shares = found[:, 1:].flatten().bincount(minlength=3)[:3] / found[:, 1:].numel()
    assert (shares - (logits[:3] / 0.5).softmax(0)).abs().max() < 0.02
    flat = -1e-4 * torch.arange(300.0)
    found, _ = minimal.sample(Scripted(flat), ids, mask, torch.tensor([299]))
    assert (found[:, 1:] > 50).float().mean() > 0.75  # ranks above 50 are sampled too


def test_the_generation_config_changes_nothing():
    """Pitfall 4."""
    model = make_model()
    torch.manual_seed(1)
    plain, _, _ = sampled(model)
    for name, value in dict(top_k=1, top_p=0.01, repetition_penalty=9.0, temperature=0.1).items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(1)
    warped, _, _ = sampled(model)
    assert plain.equal(warped)


def test_every_end_token_ends():
    """Pitfall 3: the tokenizer knows one, the generation config often more."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[OTHER_END, 77]))
    assert minimal.find_eos_ids(model, TOKENIZER).tolist() == [END, OTHER_END, 77]
    model.generation_config.eos_token_id = None
    assert minimal.find_eos_ids(model, TOKENIZER).tolist() == [END]


def test_one_bos_and_masks_from_lengths():
    """Pitfalls 2, 6 and 8: no second BOS; the prompt that is sampled from is trained on."""
    tokenizer = make_tokenizer(chat_template("llama3"), bos="<start>")
    ids, mask = minimal.encode_prompts(tokenizer, ["What is 1 + 1?", "What is 10 + 123 - 4?"])
    start = tokenizer.convert_tokens_to_ids("<start>")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "."}], tokenize=False)
    for row, row_mask in zip(ids, mask):
        tokens = row[row_mask.bool()]
        assert (tokens == start).sum() == rendered.count("<start>")
        assert row_mask.tolist() == sorted(row_mask.tolist())  # padded on the left
    assert mask.sum(-1)[0] < mask.sum(-1)[1]


# ---------------------------------------------------------------- advantages and loss
@pytest.mark.parametrize("reward", [0.1, 0.3, 1.1, 1e-3, -0.7])
def test_equal_rewards_have_no_advantage(reward):
    """Pitfall 10: by rounding alone the mean of equal numbers may differ from them."""
    for size in range(2, 17):
        assert not minimal.group_advantages(torch.full((3, size), reward)).any()


def test_advantages_are_the_bases():
    """And shifting one group's rewards leaves the others unchanged."""
    rewards = torch.tensor([[1.0, 0.0, 0.1, 1.1], [0.0, 0.0, 0.0, 0.1], [1.1, 1.1, 1.1, 1.1]])
    found = minimal.group_advantages(rewards)
    for row, expected in zip(found, rewards):
        torch.testing.assert_close(row, base.train.group_advantages(expected), rtol=0, atol=1e-7)
    shifted = rewards + torch.tensor([[5.0], [0.0], [0.0]])
    assert minimal.group_advantages(shifted)[1:].equal(found[1:])


def losses(log_probs, mask, advantages=(1.0, -1.0), old=None, reference=None):
    old = log_probs.detach() if old is None else old
    reference = log_probs.detach() if reference is None else reference
    return minimal.grpo_loss(log_probs, old, reference, torch.tensor(advantages), mask)


def test_padding_leaves_the_loss_unchanged():
    """Pitfall 14: a mean that runs over padding too; and a completion without a token is finite."""
    torch.manual_seed(0)
    log_probs = -torch.rand(2, 5)
    old = log_probs + 0.3
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    short = losses(log_probs[:, :3], mask[:, :3], old=old[:, :3])
    changed = log_probs.clone()
    changed[mask == 0] = 7.0
    torch.testing.assert_close(losses(changed, mask, old=old), short)
    assert losses(log_probs, torch.zeros(2, 5)).isfinite()


def test_the_first_loss_is_zero_and_its_gradient_is_not():
    """Pitfalls 16 and 18: ratio 1 and KL 0 at the first update, which nothing is wrong with."""
    model = make_model()
    ids, mask, width = sampled(model, eos_ids=MANY_ENDS)
    length = ids.shape[1] - width
    log_probs = minimal.completion_log_probs(model, ids, mask, length)
    with torch.no_grad():
        old = minimal.completion_log_probs(model, ids, mask, length)
    assert old.equal(log_probs.detach())
    advantages = minimal.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 3)).flatten()
    loss = minimal.grpo_loss(log_probs, old, old, advantages, mask[:, width:])
    assert abs(loss.item()) < 1e-6 and gradient_of(loss, model).norm() > 1e-3


@pytest.mark.parametrize("gap", [30.0, 100.0, 1000.0])
def test_extreme_log_ratios_are_finite_and_of_the_right_sign(gap):
    """Pitfall 17: k3 overflows, or a bound inside its exponent alone turns its gradient's sign."""
    for sign in (1.0, -1.0):
        log_probs = torch.full((1, 2), -1.0, requires_grad=True)
        reference = torch.full((1, 2), -1.0 + sign * gap)
        mask = torch.ones(1, 2)
        loss = losses(log_probs, mask, (0.0,), reference=reference)
        (gradient,) = torch.autograd.grad(loss, log_probs)
        assert loss.isfinite() and gradient.isfinite().all()
        assert (sign * gradient <= 0).all()  # never away from the reference


def test_the_loss_by_hand():
    """One token each: ratios 1.5 and 0.5, advantages 1 and -1, both clipped; KL of log 2."""
    log_probs = torch.log(torch.tensor([[0.6], [0.2]]))
    old = torch.log(torch.tensor([[0.4], [0.4]]))
    reference = torch.log(torch.tensor([[0.6], [0.4]]))
    loss = losses(log_probs, torch.ones(2, 1), (1.0, -1.0), old, reference)
    kl = 2.0 - torch.log(torch.tensor(2.0)) - 1
    expected = (-1.2 + 0.8 + 0.01 * kl) / 2
    torch.testing.assert_close(loss, expected)


# ---------------------------------------------------------------- the whole file
def test_it_runs(monkeypatch, capsys):
    """Two steps, end to end, on the embedded policy: the policy moves, the reference does not."""
    found = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def load_and_keep(*arguments, **named):
        found.append(load(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(minimal.AutoModelForCausalLM, "from_pretrained", load_and_keep)
    copies = []
    deepcopy = minimal.copy.deepcopy
    copy_and_keep = lambda model: copies.append(deepcopy(model)) or copies[-1]  # noqa: E731
    monkeypatch.setattr(minimal, "copy", SimpleNamespace(deepcopy=copy_and_keep))
    monkeypatch.setattr(minimal, "STEPS", 2)
    monkeypatch.setattr(minimal, "PROMPTS_PER_STEP", 4)
    monkeypatch.setattr(minimal, "PROMPTS_PER_UPDATE", 2)
    read = minimal.read_tasks
    monkeypatch.setattr(minimal, "read_tasks", lambda path: read(path)[:20])
    minimal.main(seed=1)
    output = capsys.readouterr().out
    assert "step 2/2: reward" in output and "held out, greedy (20 prompts)" in output
    (policy,) = found
    (reference,) = copies
    moved = [not a.equal(b) for a, b in zip(policy.parameters(), reference.parameters())]
    assert all(moved)
