"""Small tests of the plumbing: rows of the KV cache, the pictures in docstrings, casts, precision,
the optimizer step, --test, the warning that nothing is learnt, the copies.

The docstring of each names the bug that it prevents.
"""

import ast
import copy
import importlib.util
import io
import re
import shutil
import tokenize
from types import SimpleNamespace

import peft
import pytest
import torch
from helpers import ROOT, load_experiment, make_model
from test_run import metrics, run_main
from torch.utils._python_dispatch import TorchDispatchMode

base = load_experiment()
train = base.train
model_file = base.model
buffer = base.replay_buffer
sampling = base.sampling
sample = sampling.sample
EXPERIMENTS = sorted(path.parent.name for path in ROOT.glob("experiment_*/run.py"))
CPU = torch.device("cpu")
PROMPTS = [(11, 12, 13), (20, 21)]


def config_of(**changes):
    return train.Config(**{"precision": "float32", **changes})


def generator_of(seed=0):
    return torch.Generator().manual_seed(seed)


def bfloat16_autocast(*_, **__):
    return torch.autocast("cpu", torch.bfloat16)


def group(prompt, completions, masks=None, first_number=0):
    """A group of these ids. The number `first_number` + 100 * i + t stands in place of the sampled
    log-prob of token t of completion i, so that the token is known wherever it is packed."""
    numbers = []
    for i, ids in enumerate(completions):
        numbers.append(first_number + 100.0 * i + torch.arange(len(ids)))
    return buffer.Experience(
        prompt_ids=torch.tensor(prompt),
        completion_ids=[torch.tensor(ids) for ids in completions],
        completion_masks=masks or [torch.ones(len(ids)) for ids in completions],
        sampled_log_probs=numbers,
        truncated=torch.zeros(len(completions)),
        completions=[""] * len(completions),
        answer="0",
        advantages=torch.linspace(-1, 1, len(completions)),
    )


def ragged_groups():
    """Two groups of three. In the first, two completions agree in two tokens; in the second, the
    middle one was given to the policy (a tool's result), so that it has no token in the loss."""
    given = [torch.ones(2), torch.zeros(3), torch.tensor([1.0, 0.0, 1.0, 1.0])]
    return [
        group([5, 6], [[31, 32, 33, 2], [31, 32, 40, 41, 2], [50, 2]]),
        group([7, 8, 9], [[60, 2], [61, 62, 63], [60, 70, 71, 2]], given, first_number=1000),
    ]


def one_batch(groups, config, packed=True):
    """The micro-batches of one update on all the groups, in their order."""
    config.group_size = len(groups[0].completion_ids)
    config.train_batch_size = len(groups) * config.group_size
    replay_buffer = buffer.ReplayBuffer(packed)
    replay_buffer.extend(groups)
    (batch,) = replay_buffer.batches(config, generator_of())
    return batch


# ---------------------------------------------------------------- pictures that must stay true
def test_split_rows_does_what_its_docstring_shows():
    """Bug: an example that the code has left behind, or completions that share a row after they
    have sampled different tokens, and so go on from each other's text."""
    text = sampling.split_rows.__doc__
    examples = re.findall(r"^ +(\w+) +(\[[\d, ]+\])", text, re.MULTILINE)
    names = [name for name, _ in examples]
    row_of, tokens, *expected = [ast.literal_eval(values) for _, values in examples]
    assert names == ["row_of", "tokens", "parents", "row_tokens", "row_of"]
    assert row_of == [0, 0, 0, 0, 1] and tokens == [7, 9, 7, 7, 7]
    assert expected == [[0, 0, 1], [7, 9, 7], [0, 1, 0, 0, 2]]
    found = sampling.split_rows(torch.tensor(row_of), torch.tensor(tokens), vocabulary=10)
    assert [part.tolist() for part in found] == expected


def picture_of_a_row() -> SimpleNamespace:
    """What the docstring of replay_buffer.py shows, read from its text."""
    text = buffer.__doc__
    seen = SimpleNamespace(completions=[], attends={}, predicted_from=[])
    seen.prompt = re.search(r'of the prompt "([a-z ]+)"', text).group(1).split()
    for line in text.splitlines():
        name, *rest = re.split(r" {2,}", line.strip())
        cells = rest[0].split() if rest else []
        if re.fullmatch(r"completion \d", name):
            seen.completions.append(cells)
        elif name in ("index", "token", "position", "attends to"):
            setattr(seen, name.replace(" ", "_"), cells)
        elif re.fullmatch(r"[a-z]", name):
            seen.attends[name] = [int(cell) for cell in cells]
    seen.matrix = list(seen.attends.values())
    sentences = re.findall(r"completion \d \(([^)]+)\) is predicted from indices ([\d ]+\d)", text)
    for tokens, indices in sentences:
        seen.predicted_from.append((tokens.split(), [int(index) for index in indices.split()]))
    return seen


def test_the_picture_of_a_packed_row_is_what_the_code_builds():
    """Bug: a picture that teaches a mask or positions other than the ones the code makes."""
    seen = picture_of_a_row()
    assert len(seen.completions) == 2 and len(seen.matrix) == 5  # the picture was found
    number_of = {letter: number for number, letter in enumerate(".pqabc", start=2)}
    letter_of = {number: letter for letter, number in number_of.items()}
    completions = [[number_of[letter] for letter in tokens] for tokens in seen.completions]
    experience = group([number_of[letter] for letter in seen.prompt], completions)
    weights = experience.completion_masks

    row = buffer.PrefixTree(experience, weights, experience.prompt_ids.tolist())
    row.add(0)
    row.add(1)
    batch = buffer.join_experience_batch([row], packed=True)

    ids = batch.input_ids[0].tolist()
    assert ids == row.ids and [letter_of[number] for number in ids] == seen.token
    assert seen.attends_to == seen.token == list(seen.attends)
    assert [str(index) for index in range(len(ids))] == seen.index
    assert [str(position) for position in batch.position_ids[0].tolist()] == seen.position
    attends = (batch.attention_mask(torch.float32)[0, 0] == 0).int()  # (tokens, tokens)
    assert attends.tolist() == seen.matrix
    for number, (tokens, indices) in enumerate(seen.predicted_from):
        assert tokens == seen.completions[number]
        assert batch.predicted_from[batch.completion == number].tolist() == indices
        assert batch.targets[batch.completion == number].tolist() == completions[number]


# ---------------------------------------------------------------- MicroBatch.completion
def test_completion_of_each_token_by_hand():
    """Bug: a number within the group, or one that counts completions without a sampled token. A
    sum over a completion would then add up two of them. The second group is the longer row."""
    rows = []
    for experience in ragged_groups():
        rows += buffer.packed_rows(experience, experience.completion_masks, most_tokens=100)
    batch = buffer.join_experience_batch(rows, packed=True)
    lengths = [4, 5, 2, 2, 3]  # sampled tokens; the given completion is not there
    expected = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    assert batch.completion.tolist() == expected.tolist()
    assert batch.targets[batch.completion == 4].tolist() == [60, 71, 2]  # 70 was given


@pytest.mark.parametrize("micro_batch_tokens", [100, 16, 1])
@pytest.mark.parametrize("packed", [True, False])
def test_completion_counts_from_0_in_every_micro_batch(packed, micro_batch_tokens):
    """Bug: as above, where a group is cut into several rows, or a batch into micro-batches."""
    config = config_of(micro_batch_tokens=micro_batch_tokens)
    tokens_of = {}  # (group, completion) -> tokens seen
    for batch in one_batch(ragged_groups(), config, packed):
        assert batch.completion.unique().tolist() == list(range(int(batch.completion.max()) + 1))
        owner_of = {}
        for completion, number in zip(batch.completion.tolist(), batch.sampled_log_probs.tolist()):
            owner = number // 100  # of which group, and which completion of it
            assert owner_of.setdefault(completion, owner) == owner
            tokens_of[owner] = tokens_of.get(owner, 0) + 1
        assert len(set(owner_of.values())) == len(owner_of)
    assert tokens_of == {0: 4, 1: 5, 2: 2, 10: 2, 12: 3}


# ---------------------------------------------------------------- log-probs
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_four_naive_lines_of_the_docstring(temperature):
    """Bug: the fast way (packed rows, the head on a part of the hidden states) computes something
    else than its docstring says. Over all architectures: test_packed_equals_one_by_one."""
    model = make_model()
    config = config_of(temperature=temperature)
    groups = ragged_groups()
    expected = {}
    for experience in groups:
        prompt_ids = experience.prompt_ids
        for ids, numbers in zip(experience.completion_ids, experience.sampled_log_probs):
            logits = model(torch.cat([prompt_ids, ids])[None]).logits[0] / temperature
            logits = logits[len(prompt_ids) - 1 : -1]
            log_probs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            expected |= dict(zip(numbers.tolist(), log_probs))
    (batch,) = one_batch(groups, config)
    found = train.sequences_log_probs(model, batch, config)
    naive = torch.stack([expected[number] for number in batch.sampled_log_probs.tolist()])
    torch.testing.assert_close(found, naive, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- casts
class CountCasts(TorchDispatchMode):
    """Counts how often each of a model's parameters is cast from float32 to bfloat16."""

    def __init__(self, model):
        super().__init__()
        self.name_of = {weight.data_ptr(): name for name, weight in model.named_parameters()}
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to):
            is_cast = args[0].dtype == torch.float32 and output.dtype == torch.bfloat16
            name = self.name_of.get(args[0].data_ptr())
            if is_cast and name is not None:
                self.counts[name] = self.counts.get(name, 0) + 1
        return output


def casts_of_a_rollout(monkeypatch, inference_mode: bool) -> dict[str, int]:
    """Casts of each weight while 8 tokens are sampled under bfloat16 autocast."""
    model = make_model()
    monkeypatch.setattr(sampling, "autocast", bfloat16_autocast)
    with torch.inference_mode(inference_mode), CountCasts(model) as seen:
        ids, _ = sample(model, PROMPTS, set(), config_of(max_new_tokens=8), generator_of())
    assert [len(row) for row in ids] == [8, 8]
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    count = sum(len(list(m.parameters())) for m in linear)
    assert len(seen.counts) == count == 2 * (7 + 3) + 1  # 2 layers, 7 weights, 3 biases; the head
    return seen.counts


def test_sampling_casts_each_weight_once(monkeypatch):
    """Pitfall 37: under inference_mode autocast keeps no cast weights, so that every sampled token
    casts every weight again, 9.3 GB of them in a model of 1.5B."""
    assert set(casts_of_a_rollout(monkeypatch, inference_mode=False).values()) == {1}


def test_inference_mode_would_cast_each_weight_for_every_token(monkeypatch):
    """The test above has teeth."""
    assert set(casts_of_a_rollout(monkeypatch, inference_mode=True).values()) == {8}


def lora_policy():
    """Frozen bfloat16 weights and float32 adapters, whose B is not 0, on all linear layers."""
    model = make_model().to(torch.bfloat16)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    policy = peft.get_peft_model(model, settings)
    generator = generator_of(1)
    for name, weight in policy.named_parameters():
        assert weight.dtype == (torch.float32 if weight.requires_grad else torch.bfloat16)
        if "lora_B" in name:
            weight.data.normal_(std=0.1, generator=generator)
    return policy


def logits_and_gradients(policy):
    """Of one forward and backward under bfloat16 autocast."""
    ids = torch.randint(3, 400, (2, 9), generator=generator_of(2))
    with bfloat16_autocast():
        logits = policy(ids).logits
    logits.float().log_softmax(-1)[..., 7].sum().backward()
    gradients = {}
    for name, weight in policy.named_parameters():
        if weight.requires_grad:
            gradients[name] = weight.grad
            weight.grad = None
    return logits.detach(), gradients


def test_lora_without_its_own_casts_has_the_same_bits():
    """Bug: the casts that `let_autocast_cast` leaves out were rounding after all."""
    policy = lora_policy()
    logits, gradients = logits_and_gradients(policy)
    model_file.let_autocast_cast(policy)
    layers = [m for m in policy.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 14 and not any(layer.cast_input_dtype_enabled for layer in layers)
    logits_now, gradients_now = logits_and_gradients(policy)
    assert torch.equal(logits, logits_now)
    assert len(gradients) == 28 and gradients.keys() == gradients_now.keys()
    for name, gradient in gradients.items():
        assert gradient.any() and torch.equal(gradient, gradients_now[name]), name


# ---------------------------------------------------------------- precision
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("forward", [1, 3])
@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_end_the_run_with_a_line(greedy, forward, value):
    """Pitfall 39: float16 overflows in some models. Greedy sampling takes any token then and
    multinomial raises a puzzle (on CUDA: it ends the process)."""
    forwards = []

    def spoil(module, arguments, output):
        forwards.append(module)
        if len(forwards) == forward:
            output.logits[-1, -1, 5] = value

    model = make_model()
    model.register_forward_hook(spoil)
    config = config_of(precision="float16", max_new_tokens=4)
    generator = None if greedy else generator_of()
    with pytest.raises(SystemExit) as exit:
        sample(model, PROMPTS, set(), config, generator)
    message = exit.value.code
    assert message.startswith("error: ") and "\n" not in message
    assert "--precision float16" in message and "bfloat16 or float32" in message
    assert len(forwards) == forward


@pytest.mark.parametrize("architecture", ["qwen2", "qwen2-untied", "qwen3", "gemma3"])
def test_a_reference_in_half_precision_gives_the_same_bits(architecture):
    """Bug: halving what autocast does not (embeddings, norms, a tied head) moves the reference
    away from the policy, and the first step's KL is not 0."""
    reference = make_model(architecture)
    config = config_of(precision="bfloat16")
    (batch,) = one_batch(ragged_groups(), config)
    halved = copy.deepcopy(reference)
    model_file.halve_linear_layers(halved, config)
    with torch.no_grad():
        expected = train.sequences_log_probs(reference, batch, config)
        found = train.sequences_log_probs(halved, batch, config)
    assert torch.equal(found, expected)

    linear = 0
    for name, weight in halved.named_parameters():
        is_linear = name.split(".")[-2].endswith("_proj")
        linear += is_linear
        assert weight.dtype == (torch.bfloat16 if is_linear else torch.float32), name
    assert linear >= 14


def test_a_reference_in_float32_stays_as_it_is():
    """Bug: a reference that is rounded where products are taken in float32."""
    reference = make_model()
    before = {name: weight.clone() for name, weight in reference.state_dict().items()}
    model_file.halve_linear_layers(reference, config_of(precision="float32"))
    for name, weight in reference.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name])


def test_cudnn_attention_is_off():
    """Pitfall 36: NaN gradients for some masks, and a new plan for every sampled token."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


# ---------------------------------------------------------------- the optimizer's step
def one_weight(precision="float32"):
    """(policy, optimizer, scaler, config): a weight of two numbers, and plain SGD at rate 1."""
    policy = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(policy.weight)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    config = config_of(precision=precision, max_norm=1.0)
    return policy, optimizer, model_file.make_scaler(config, CPU), config


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(
    "gradient, moved, norm", [([3, 4], [-0.6, -0.8], 5), ([0.3, 0.4], [-0.3, -0.4], 0.5)]
)
def test_the_gradient_is_scaled_down_to_max_norm(gradient, moved, norm, precision):
    """Bug: the norm after scaling down is logged, small gradients are blown up to max_norm, the
    gradient is added to the next one, or (float16) the scaled gradient is clipped."""
    policy, optimizer, scaler, config = one_weight(precision)
    loss = (policy.weight * torch.tensor([gradient])).sum()
    scaler.scale(loss).backward()
    assert model_file.optimizer_step(policy, optimizer, scaler, config) == pytest.approx(norm)
    assert policy.weight.tolist() == [pytest.approx(moved, abs=1e-5)]
    assert policy.weight.grad is None


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_is_skipped(value, precision):
    """Bug: one NaN makes every weight NaN, now or, where the gradient stays, in the next update."""
    policy, optimizer, scaler, config = one_weight(precision)
    policy.weight.grad = torch.tensor([[1.0, value]])
    scaler.scale(torch.zeros(()))  # the scaler wants to have been used
    assert not torch.isfinite(
        torch.tensor(model_file.optimizer_step(policy, optimizer, scaler, config))
    )
    assert policy.weight.tolist() == [[0, 0]] and policy.weight.grad is None
    scaler.scale(policy.weight.sum()).backward()
    model_file.optimizer_step(policy, optimizer, scaler, config)
    assert policy.weight.tolist() == [pytest.approx([-(0.5**0.5)] * 2, abs=1e-5)]


# ---------------------------------------------------------------- --test
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_test_makes_any_run_small(name):
    """Bug: --test that raises a number which is smaller already, trains where --max-steps 0 only
    evaluates, or forgets the held-out prompts, which then take longer than the steps."""
    experiment = load_experiment(name)

    def numbers(**changes):
        config, _ = experiment.model.resolve(experiment.train.Config(**changes))
        names = ("max_prompts", "max_eval_prompts", "max_steps", "checkpoint_interval")
        return [getattr(config, name) for name in names]

    smaller = dict(max_prompts=30, max_eval_prompts=20, max_steps=10, checkpoint_interval=5)
    large = dict(max_prompts=3000, max_eval_prompts=2000, max_steps=1000, checkpoint_interval=500)
    assert numbers(test=True, **large) == [100, 100, 100, 50]
    assert numbers(test=True, **smaller) == [30, 20, 10, 50]
    assert numbers(test=True, max_steps=0)[2] == 0
    steps = min(100, experiment.train.Config.max_steps or 100)  # None: all there are
    assert numbers(test=False, **large) == [3000, 2000, 1000, 500]
    experiment.run.check_config(experiment.model.resolve(experiment.train.Config(test=True))[0])
    assert numbers(test=True) == [100, 100, steps, 50]


# ---------------------------------------------------------------- nothing is learnt
class Letters:
    """In place of a tokenizer: one letter an id."""

    def decode(self, ids):
        return "".join(chr(number) for number in ids.tolist())


def rewarded(accuracy, form=(0, 0, 0, 0), truncated=(0, 0, 0, 0)):
    """A group of four completions "no" of the prompt "2 + 3 =" with these rewards."""
    texts = [[ord(letter) for letter in "no"]] * 4
    experience = group([ord(letter) for letter in "2 + 3 ="], texts)
    experience.answer = "5"
    experience.completions = ["no", "No", "nope", "none"]
    experience.truncated = torch.tensor(truncated, dtype=torch.float32)
    experience.reward_parts = {
        "reward_accuracy": torch.tensor(accuracy, dtype=torch.float32),
        "reward_format": 0.1 * torch.tensor(form, dtype=torch.float32),
    }
    experience.rewards = sum(experience.reward_parts.values())
    experience.advantages = train.group_advantages(experience.rewards)
    return experience


WRONG = (0, 0, 0, 0)
RIGHT = (1, 1, 1, 1)
SPREAD = (1, 0, 0, 0)


def make_run(tmp_path):
    places = dict(log_dir=str(tmp_path / "runs"), checkpoint_path=str(tmp_path / "output"))
    return train.Run(config_of(run_name="run", **places), "experiment_base", [])


def watch(run, steps, capsys) -> dict[int, str]:
    """The warnings of these steps, a list of groups each. Returns step -> text."""
    warnings = {}
    for step, groups in enumerate(steps, start=1):
        run.watch(step, groups, Letters())
        text = capsys.readouterr().out
        if text:
            warnings[step] = text
    return warnings


def test_a_run_that_is_always_wrong_says_why_and_what_to_change(tmp_path, capsys):
    """Bug: an hour of a run whose curves are flat, and nobody says that nothing can be learnt, or
    says it at every step. Three of the eight completions of a step are cut off, which is 38 %."""
    groups = [rewarded(WRONG, truncated=(1, 1, 0, 0)), rewarded(WRONG, truncated=(1, 0, 0, 0))]
    run = make_run(tmp_path)
    warnings = watch(run, [groups] * 46, capsys)
    assert list(warnings) == [5, 25, 45]
    warning, completion = warnings[5].strip().split("\n", 1)
    assert warning == (
        "warning: in 5 steps in a row, the last of them 5, no group had spread, so nothing is "
        "learnt: every reward_accuracy is 0, every reward_format is 0, the token budget cut off "
        "38% of the completions. What to change: take easier prompts, or a model that is right "
        "now and then; show the form in --system-prompt, or take a model that knows it; raise "
        "--max-new-tokens (and --max-length). One completion:"
    )
    assert completion == "2 + 3 =no\n[right answer: 5, reward 0.00, advantage +0.00]"
    assert warnings[25].startswith("\nwarning: in 25 steps in a row, the last of them 25, ")


def test_a_group_is_shown_by_its_best_and_worst_completion():
    """Bug: what is shown has advantage 0, or is one completion, and nothing can be compared."""
    mixed = rewarded(SPREAD)
    mixed.completion_ids[0] = torch.tensor([ord("5")])
    assert base.run.show_group([rewarded(WRONG), mixed], Letters()) == (
        "2 + 3 =5\n[right answer: 5, reward 1.00, advantage +1.50]\n"
        "no\n[right answer: 5, reward 0.00, advantage -0.50]"
    )


def test_a_run_that_is_always_right_is_told_to_take_harder_prompts(tmp_path, capsys):
    """Bug: advice for a policy that is never right, given to one that always is."""
    (warning,) = watch(make_run(tmp_path), [[rewarded(RIGHT, RIGHT)]] * 5, capsys).values()
    assert "every reward_accuracy is 1, every reward_format is 0.1. " in warning
    assert "What to change: take harder prompts. " in warning
    assert "easier" not in warning and "--max-new-tokens" not in warning


def test_groups_that_are_all_right_or_all_wrong_are_told_to_vary(tmp_path, capsys):
    """Bug: "every accuracy is 0" of a step in which one group was all wrong and one all right."""
    groups = [rewarded(WRONG, RIGHT), rewarded(RIGHT, RIGHT)]
    (warning,) = watch(make_run(tmp_path), [groups] * 5, capsys).values()
    assert "reward_accuracy differs" in warning and "every reward_accuracy" not in warning
    assert "raise --temperature or --group-size" in warning


def test_spread_in_one_group_is_enough(tmp_path, capsys):
    """Bug: a warning while something is learnt, or one that counts steps that are not in a row."""
    nothing = [rewarded(WRONG), rewarded(RIGHT)]
    something = [rewarded(WRONG), rewarded(SPREAD)]
    assert not watch(make_run(tmp_path), [something] * 30, capsys)
    only_form = [rewarded(WRONG, SPREAD)]
    assert not watch(make_run(tmp_path), [only_form] * 30, capsys)
    steps = [nothing] * 4 + [something] + [nothing] * 6
    warnings = watch(make_run(tmp_path), steps, capsys)
    assert list(warnings) == [10]
    assert "in 5 steps in a row, the last of them 10, " in warnings[10]


def test_what_is_not_trained_on_has_nothing_to_teach(tmp_path, capsys):
    """Bug: DAPO leaves out groups whose accuracy has no spread, and the form's spread within them
    keeps the warning away; or it is said that the form did not differ within a group."""
    run = make_run(tmp_path)
    for step in range(1, 6):
        run.watch(step, [rewarded(WRONG, SPREAD)], Letters(), trained_on=[])
    text = capsys.readouterr().out
    assert text.count("warning") == 1 and "every reward_accuracy is 0" in text
    assert "reward_format differs" in text and "within no group that is trained on" in text
    run.watch(6, [rewarded(SPREAD)], Letters(), trained_on=[rewarded(SPREAD)])
    assert run.without_spread == 0


def run_wrongly(tmp_path, model, capsys, monkeypatch, name, form, **settings) -> str:
    """What a run prints whose completions are all wrong; `form` is its format_reward."""
    experiment = load_experiment(name)
    monkeypatch.setattr(experiment.train, "accuracy_reward", lambda *_: 0.0)
    monkeypatch.setattr(experiment.train, "format_reward", form)
    # Nothing else is written about a step.
    settings |= dict(lr=0.0, kl_weight=0.0, log_completions_interval=100, checkpoint_interval=100)
    run_main(tmp_path, model, name, eval_interval=100, max_new_tokens=4, **settings)
    return capsys.readouterr().out


def test_a_whole_run_that_learns_nothing_says_so(tmp_path, model, capsys, monkeypatch):
    """Bug: a watch that `main` does not call, calls twice, or that says nothing at the end."""
    form = lambda completion: 0.0  # noqa: E731
    places = (tmp_path, model, capsys, monkeypatch)
    out = run_wrongly(*places, "experiment_base", form, epochs=7, max_steps=26)
    assert len(metrics(tmp_path)) == 1 + 26
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    beginnings = [re.search(r"in (the last )?\d+ steps", line).group() for line in warnings]
    assert beginnings == ["in 5 steps", "in 25 steps", "in the last 26 steps"]
    for warning in warnings:
        assert "every reward_accuracy is 0, every reward_format is 0" in warning
        assert re.search(r"the token budget cut off [1-9]\d?0?% of the completions", warning)
        assert "raise --max-new-tokens" in warning
    # a completion with each of the first two, and that of step 1
    assert out.count("[right answer: ") == 3


def test_completions_that_are_all_the_same_ask_for_a_higher_temperature():
    """Bug: at a temperature of 0.02 a policy that is right now and then is told to take easier
    prompts."""
    experience = rewarded(WRONG)
    experience.completions = ["no"] * 4
    text = base.run.why_nothing_is_learnt([experience])
    assert "the completions of a group are all the same" in text and "raise --temperature" in text
    assert "--temperature" not in base.run.why_nothing_is_learnt([rewarded(WRONG)])


@pytest.mark.parametrize("name", ["max_steps", "epochs", "micro_batch_tokens"])
def test_numbers_that_leave_an_empty_run_are_refused(name):
    """Bug: --epochs 0 uses up the run's name, and ends with nothing done."""
    flag = name.replace("_", "-")
    with pytest.raises(SystemExit, match=f"error: --{flag} -1: must be"):
        base.run.check_config(base.train.Config(**{name: -1}))


def test_dapo_says_so_where_it_keeps_no_group(tmp_path, model, capsys, monkeypatch):
    """Bug: DAPO's main watches all groups that were sampled, in which the form has spread."""
    form = lambda completion: len(completion) % 7 / 7  # noqa: E731
    places = (tmp_path, model, capsys, monkeypatch)
    out = run_wrongly(*places, "experiment_dapo", form, max_sampling_rounds=1, max_steps=6)
    assert all(line["groups"] == 0 and line["reward_std"] > 0 for line in metrics(tmp_path)[1:])
    warnings = [line for line in out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: in 5 steps in a row, the last of them 5, ")
    assert warnings[1].startswith("warning: in the last 6 steps ")
    assert "every reward_accuracy is 0" in warnings[0]


# ---------------------------------------------------------------- copies
def load_sync():
    spec = importlib.util.spec_from_file_location("sync", ROOT / "tools" / "sync.py")
    sync = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sync)
    return sync


@pytest.fixture
def sync(tmp_path, monkeypatch):
    """tools/sync.py over a copy of the experiments in `tmp_path`, all of them in step."""
    sync = load_sync()
    for train_file in ROOT.glob("experiment_*/train.py"):
        folder = tmp_path / train_file.parent.name
        folder.mkdir()
        for path in train_file.parent.iterdir():
            if path.suffix in (".py", ".md"):
                shutil.copy(path, folder)
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    sync.main(sync.Config())
    sync.main(sync.Config(check=True))  # finds nothing any more
    return sync


def check(sync, capsys) -> str:
    """What --check prints where it finds that something differs."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        sync.main(sync.Config(check=True))
    assert "run `python tools/sync.py`" in exit.value.code
    return capsys.readouterr().out


def test_the_copies_of_the_repository_are_in_step():
    """Bug: a fix that reaches one experiment and not the others."""
    sync = load_sync()
    sync.main(sync.Config(check=True))
    found = {str(copied.relative_to(ROOT)) for _, copied in sync.copies(ROOT)}
    for name in set(EXPERIMENTS) - {"experiment_base"}:
        for file in (
            "sampling.py",
            "captured.py",
            "kv_cache.py",
            "model.py",
            "flex.py",
            "run.py",
            "data.py",
        ):
            is_own = file in sync.own_plumbing(ROOT / name)
            assert is_own or f"{name}/{file}" in found
    assert "experiment_multiturn_qa/calls.py" in found
    assert "experiment_multiturn_tool_calling/calls.py" not in found  # the owner's


@pytest.mark.parametrize(
    "name, file", [("experiment_dapo", "run.py"), ("experiment_multiturn_qa", "calls.py")]
)
@pytest.mark.parametrize("is_missing", [True, False])
def test_sync_finds_and_mends_a_copy(is_missing, name, file, sync, tmp_path, capsys):
    """Bug: --check that passes over a difference, or a sync that copies from the copy."""
    changed = tmp_path / name / file
    before = changed.read_bytes()
    changed.write_bytes(before + b"\n# changed\n")
    if is_missing:
        changed.unlink()
    state = "is missing" if is_missing else "differs"
    assert check(sync, capsys) == f"{name}/{file} {state}\n"
    assert changed.exists() != is_missing  # --check copies nothing
    sync.main(sync.Config())
    assert capsys.readouterr().out == f"{name}/{file} copied\n"
    assert changed.read_bytes() == before
    sync.main(sync.Config(check=True))


def test_sync_without_an_owners_file(sync, tmp_path):
    (tmp_path / "experiment_base" / "data.py").unlink()
    with pytest.raises(SystemExit, match="^error: .*experiment_base/data.py is missing"):
        sync.main(sync.Config())


def test_sync_leaves_an_experiments_own_plumbing_alone(sync, tmp_path, capsys):
    """Bug: a sampler that an experiment has changed on purpose is written over."""
    experiment = tmp_path / "experiment_drgrpo"
    own = experiment / "sampling.py"
    own.write_text("own = True\n")
    assert check(sync, capsys) == "experiment_drgrpo/sampling.py differs\n"
    with open(experiment / "README.md", "a") as readme:
        readme.write("\nOwn plumbing: `sampling.py`\n")
    copied = {str(copied.relative_to(tmp_path)) for _, copied in sync.copies(tmp_path)}
    assert "experiment_drgrpo/sampling.py" not in copied and "experiment_drgrpo/run.py" in copied
    sync.main(sync.Config())
    sync.main(sync.Config(check=True))
    assert own.read_text() == "own = True\n"


# ---------------------------------------------------------------- density
LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER"}


def tokens_a_line(text: str, with_docstrings: bool) -> float:
    """Tokens of code over the lines that hold any part of one."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                docstrings.add((node.lineno, node.col_offset))
    count = 0
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if tokenize.tok_name[token.type] in LAYOUT:
            continue
        if token.start in docstrings and not with_docstrings:
            continue
        count += 1
        lines.update(range(token.start[0], token.end[0] + 1))
    return count / len(lines)


def test_tokens_a_line_by_hand():
    """The count itself: 3 + 4 tokens on 2 lines, and a docstring of two lines."""
    text = '"""Of\ntwo lines."""\n\nx = 1  # one\n\nprint(x)\n'
    assert tokens_a_line(text, with_docstrings=False) == 7 / 2
    assert tokens_a_line(text, with_docstrings=True) == 8 / 4


@pytest.mark.parametrize("with_docstrings", [True, False])
def test_the_lesson_is_not_dense(with_docstrings):
    """Bug: lines that hold more than one thought. Newcomers' favourites have 5.5 to 7.2 tokens a
    line; this file once had 11.2."""
    text = (ROOT / "experiment_base" / "train.py").read_text()
    assert tokens_a_line(text, with_docstrings) <= 9


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_peft_is_imported_only_where_an_adapter_is(name):
    """Bug: --help and every wrong flag took eight seconds longer."""
    for file in sorted((ROOT / name).glob("*.py")):
        tree = ast.parse(file.read_text())
        imported = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
        assert not any("peft" in ast.unparse(node) for node in imported), file
