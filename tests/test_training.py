"""What training does: the first step's figures, the reference, adapters, precision, skipped
updates, and learning."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import ARCHITECTURES, POLICY, ROOT, SIZES, load_experiment
from safetensors.torch import load_file
from test_run import (
    KINDS,
    assert_same_run,
    checkpoints,
    fingerprint,
    flat,
    make_adapter,
    metrics,
    read_weights,
    run_main,
    save_model,
    settings_of,
    tiny_settings,
)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, model):
    return make_adapter(tmp_path_factory.mktemp("adapter"), model)


@pytest.fixture
def base(monkeypatch):
    """The base experiment, with every completion rewarded differently."""
    monkeypatch.setattr(load_experiment().train, "accuracy_reward", fingerprint)
    return load_experiment()


@pytest.fixture
def loaded(monkeypatch):
    """The policy and the reference of the run, and copies of their weights as they were loaded."""
    found, load_model = SimpleNamespace(), load_experiment().train.load_model

    def load_and_keep(*args):
        found.policy, found.reference = load_model(*args)
        found.before = {name: value.clone() for name, value in found.policy.state_dict().items()}
        found.reference_before = found.reference and {
            n: v.clone() for n, v in found.reference.state_dict().items()
        }
        return found.policy, found.reference

    monkeypatch.setattr(load_experiment().train, "load_model", load_and_keep)
    return found


def moved(found) -> set[str]:
    """The names of the weights that are not what they were."""
    return {
        name
        for name, value in found.policy.state_dict().items()
        if not torch.equal(value, found.before[name])
    }


# ---------------------------------------------------------------- the first step
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_first_step(kind, precision, tmp_path, model, adapter, base):
    """KL exactly 0, ratio exactly 1, loss 0, and a gradient all the same. Bug: old log-probs from
    another code path, a reference that is not the policy that training began with (from an adapter:
    the model without it), or one that follows the policy. With one update a step the ratio is 1 in
    later steps too."""
    run_main(
        tmp_path, **settings_of(kind, model, adapter), precision=precision, train_batch_size=16
    )
    _, first, second = metrics(tmp_path)
    assert first["kl"] == 0 and second["kl"] > 1e-6
    for line in (first, second):
        assert line["ess"] == 1 and line["clip_fraction"] == 0 and line["grad_norm"] > 1e-3
    assert abs(first["loss"]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_that_are_sampled_are_the_weights_that_are_trained(
    kind, tmp_path, model, adapter, base, loaded
):
    """Bug: a sampler with a copy of the weights that is not renewed. A step's log-probs are
    recomputed by the policy that the steps before have moved."""
    run_main(tmp_path, **settings_of(kind, model, adapter), max_steps=3)
    gaps = [line["max_log_prob_gap"] for line in metrics(tmp_path)[1:]]
    assert len(gaps) == 3 and max(gaps) < 1e-4 and moved(loaded)


@pytest.mark.parametrize("critic_type", ["grpo", "drgrpo", "dapo"])
def test_first_loss_is_minus_the_weighted_mean_advantage(
    critic_type, tmp_path, model, base, monkeypatch
):
    """0 for GRPO, whose completions weigh the same;
    not for the other two, where long ones weigh more."""
    seen, rollout_metrics = [], base.train.rollout_metrics
    monkeypatch.setattr(
        base.train, "rollout_metrics", lambda groups: seen.extend(groups) or rollout_metrics(groups)
    )
    run_main(
        tmp_path, model, critic_type=critic_type, max_steps=1, train_batch_size=16, kl_weight=0.0
    )
    lengths = torch.tensor(
        [len(ids) for e in seen for ids in e.completion_ids], dtype=torch.float64
    )
    advantages = torch.cat([e.advantages for e in seen]).double()
    assert len(lengths.unique()) > 3
    expected = {
        "grpo": 0.0,
        "drgrpo": -(advantages * lengths).sum() / (8 * 16),
        "dapo": -(advantages * lengths).sum() / lengths.sum(),
    }
    assert metrics(tmp_path)[1]["loss"] == pytest.approx(float(expected[critic_type]), abs=1e-6)
    assert critic_type == "grpo" or abs(expected[critic_type]) > 1e-3


def test_dropout_is_off(tmp_path, base, loaded):
    """Bug: a checkpoint whose config has dropout: the training forward, in train mode, is another
    model than the one that sampled, and the ratio is not 1."""
    model = save_model(tmp_path / "model", attention_dropout=0.5)
    run_main(tmp_path, model, train_batch_size=16)
    assert [line["max_log_prob_gap"] < 1e-5 for line in metrics(tmp_path)[1:]] == [True, True]
    assert (
        metrics(tmp_path)[1]["kl"] == 0
        and json.loads((Path(model) / "config.json").read_text())["attention_dropout"]
    )
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(loaded.policy.train()(ids).logits, loaded.policy.eval()(ids).logits)


def test_dropout_of_an_adapter_is_off(tmp_path, model, adapter, base):
    """Bug: as above, from the adapter's lora_dropout, which most published adapters have."""
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text()) | {"lora_dropout": 0.5}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    run_main(tmp_path, str(folder), train_batch_size=16)
    assert metrics(tmp_path)[1]["kl"] == 0
    assert [line["max_log_prob_gap"] < 1e-5 for line in metrics(tmp_path)[1:]] == [True, True]


@pytest.mark.parametrize(
    "architecture", ["qwen3", "llama", "gemma3", "gemma3-short-window", "qwen2-untied"]
)
def test_architectures_train(architecture, tmp_path, base, loaded):
    """A step in each family, packed or, where the window is shorter than a row,
    one completion a row."""
    model = save_model(tmp_path / "model", architecture)
    run_main(tmp_path, model, max_steps=1)
    assert base.train.can_pack(loaded.policy.config, 128) == (architecture != "gemma3-short-window")
    (line,) = metrics(tmp_path)[1:]
    assert (
        line["max_log_prob_gap"] < 1e-4 and line["grad_norm"] > 0 and line["skipped_updates"] == 0
    )
    assert moved(loaded) == set(loaded.before)


# ---------------------------------------------------------------- adapters and the reference
def test_lora_trains_the_adapter_and_nothing_else(tmp_path, model, base, loaded):
    """Bug: with LoRA no gradient reaches the B matrices, or the frozen weights move with them."""
    run_main(tmp_path, model, lora_rank=4, max_steps=1, train_batch_size=16)
    b_matrices = {name for name in loaded.before if "lora_B" in name}
    assert len(b_matrices) == 2 * 7 and b_matrices <= moved(loaded) <= {
        n for n in loaded.before if "lora_" in n
    }
    assert read_weights(checkpoints(tmp_path)[1]).keys() == {
        name.replace(".default", "") for name in loaded.before if "lora_" in name
    }


def test_reference_stays_the_adapter_that_training_began_from(tmp_path, adapter, base, loaded):
    """Bug: switching adapters for the reference trains it, or leaves it active."""
    run_main(tmp_path, adapter, lr=1e-2)
    began = load_file(Path(adapter) / "adapter_model.safetensors")
    now = loaded.policy.state_dict()
    for name, value in began.items():
        here = name.removesuffix(".weight")
        assert torch.equal(now[f"{here}.reference.weight"], value)
        assert not torch.equal(now[f"{here}.default.weight"], value)
    assert loaded.policy.active_adapter == "default"
    assert not [
        name
        for name, p in loaded.policy.named_parameters()
        if p.requires_grad and ".reference." in name
    ]


def test_an_adapter_without_a_tokenizer_takes_its_base_models(tmp_path, adapter, base):
    bare = shutil.copytree(
        adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "*.jinja")
    )
    assert not list(bare.glob("token*"))
    run_main(tmp_path, str(bare), max_steps=0)


def test_reference_of_full_training_stays(tmp_path, model, base, loaded):
    run_main(tmp_path, model, lr=1e-2)
    now = loaded.reference.state_dict()
    assert all(torch.equal(now[name], value) for name, value in loaded.reference_before.items())
    assert moved(loaded) == set(loaded.before)


def test_no_kl_needs_no_reference(tmp_path, model, base, loaded):
    run_main(tmp_path, model, kl_weight=0.0, max_steps=1)
    assert loaded.reference is None and moved(loaded)


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind, tmp_path, model, adapter, base, loaded, monkeypatch):
    """The layers run twice, and training is the same to the last bit. Bug: transformers does not
    checkpoint in eval mode and says nothing; with LoRA, whose inputs need no gradient, the
    reentrant kind yields none."""
    calls, load_model = [], base.train.load_model  # as the `loaded` fixture wraps it

    def load_and_count(*args):
        policy, reference = load_model(*args)
        mlp = base.model.unwrap(policy).get_decoder().layers[0].mlp
        mlp.register_forward_pre_hook(
            lambda *_: calls.append(1) if torch.is_grad_enabled() else None
        )
        return policy, reference

    monkeypatch.setattr(base.train, "load_model", load_and_count)
    counts = []
    for folder, on in ((tmp_path / "off", False), (tmp_path / "on", True)):
        folder.mkdir()
        data = dict(data_path=tiny_settings(tmp_path, model)["data_path"])
        run_main(folder, **settings_of(kind, model, adapter), **data, gradient_checkpointing=on)
        counts.append(len(calls))
        calls.clear()
    assert counts[0] > 0 and counts[1] == 2 * counts[0]
    assert_same_run(tmp_path / "off", tmp_path / "on", 2)
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "on")[1:])


def test_4bit_base_with_lora(tmp_path, base, loaded, monkeypatch):
    """nf4 weights under an adapter: the matrices are 4-bit, the adapter is float32 and learns, KL 0
    at the first step, and the checkpoint is the adapter alone. Bug: on some CPUs bitsandbytes packs
    the weights in the first eval pass, and later training forwards lose the gradient."""
    pytest.importorskip("bitsandbytes")
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}  # nf4 comes in blocks of 64
    monkeypatch.setitem(ARCHITECTURES, "wide", lambda: transformers.Qwen2Config(**sizes))
    model = save_model(tmp_path / "model", "wide")
    settings = dict(model=model, lora_rank=4, load_in_4bit=True, train_batch_size=16, lr=1e-2)
    run_main(tmp_path, **settings)
    layer = base.model.unwrap(loaded.policy).get_decoder().layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "Linear4bit" and layer.weight.quant_type == "nf4"
    assert {name for name in loaded.before if "lora_B" in name} <= moved(loaded)
    assert not [name for name in moved(loaded) if "lora_" not in name]
    assert layer(torch.ones(1, 64, requires_grad=True)).requires_grad
    _, first, second = metrics(tmp_path)
    assert first["kl"] == 0 and second["kl"] > 0 and first["ess"] == second["ess"] == 1
    assert all("lora_" in name for name in read_weights(checkpoints(tmp_path)[2]))
    assert all(
        p.dtype == torch.float32 for name, p in loaded.policy.named_parameters() if "lora_" in name
    )
    run_main(tmp_path, **settings, max_steps=3, resume=True)
    assert metrics(tmp_path)[3]["kl"] > 0


def test_8bit_optimizer(tmp_path, model, base, loaded):
    """Its moments are bytes where a weight is large enough,
    and a resumed run equals the uninterrupted one."""
    pytest.importorskip("bitsandbytes")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data = dict(data_path=tiny_settings(tmp_path, model)["data_path"], optimizer="adamw8bit")
    for folder, steps in ((whole, [4]), (parts, [2, 4])):
        folder.mkdir()
        for last in steps:
            run_main(folder, model, **data, max_steps=last, resume=last != steps[0])
    assert_same_run(whole, parts, 4)
    state = flat(
        torch.load(checkpoints(whole)[4] / "trainer.pt", weights_only=True)["optimizer"]["state"]
    )
    assert torch.uint8 in {value.dtype for value in state.values() if torch.is_tensor(value)}


@pytest.mark.parametrize(
    ("function", "error", "constant"),
    [
        (
            "sample",
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "sample_rows",
        ),
        (
            "sequences_log_probs",
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB."),
            "micro_batch_tokens",
        ),
        (
            "sequences_log_probs",
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
            "micro_batch_tokens",
        ),
        ("sequences_log_probs", MemoryError(), "micro_batch_tokens"),
    ],
)
def test_out_of_memory_names_the_constant_to_lower(
    function, error, constant, tmp_path, model, base, monkeypatch
):
    """Bug: a traceback out of attention, with forty constants to choose from."""
    run_main(tmp_path, model)

    def run_out(*_):
        raise error

    monkeypatch.setattr(base.train, function, run_out)
    with pytest.raises(SystemExit, match=f"^error: out of memory: lower .*{constant}"):
        run_main(tmp_path, model, resume=True, max_steps=4)
    assert list(checkpoints(tmp_path)) == [2]


def test_other_errors_keep_their_traceback(tmp_path, model, base, monkeypatch):
    """Bug: any RuntimeError is called out of memory."""

    def fail(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(base.train, "sequences_log_probs", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_main(tmp_path, model)


# ---------------------------------------------------------------- precision
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_small_updates_are_not_swallowed(precision, tmp_path, model, base, loaded):
    """Master weights are float32: the norms' weights, 1.0, move by Adam's first step of 6e-4, which
    bfloat16 rounds away."""
    run_main(tmp_path, model, precision=precision, lr=6e-4, max_steps=1, train_batch_size=16)
    assert {p.dtype for p in loaded.policy.parameters()} == {torch.float32}
    weights = read_weights(checkpoints(tmp_path)[1])
    norms = torch.cat([value for name, value in weights.items() if "norm" in name])
    assert norms.dtype == torch.float32 and torch.isfinite(norms).all()
    steps = (norms - 1).abs()
    assert steps.max() < 6.1e-4 and (steps > 5e-4).float().mean() > 0.9
    assert metrics(tmp_path)[1]["skipped_updates"] == 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lora_keeps_frozen_weights_in_half_precision(precision, tmp_path, model, base, loaded):
    run_main(tmp_path, model, precision=precision, lora_rank=4)
    dtypes = {
        "lora_" in name: parameter.dtype for name, parameter in loaded.policy.named_parameters()
    }
    assert dtypes == {True: torch.float32, False: getattr(torch, precision)}
    assert {name for name in loaded.before if "lora_B" in name} <= moved(loaded)


def test_float16_scale_survives_a_resume(tmp_path, model, base, monkeypatch):
    """Bug: the resumed run begins at 65536 again and skips the updates until it has come down."""
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled, f=torch.amp.GradScaler: f(device, 2.0**40, enabled=enabled),
    )
    run_main(tmp_path, model, precision="float16")
    state = torch.load(checkpoints(tmp_path)[2] / "trainer.pt", weights_only=True)
    assert (
        sum(line["skipped_updates"] for line in metrics(tmp_path)[1:]) == 4
        and state["scaler"]["scale"] == 2.0**36
    )
    run_main(tmp_path, model, precision="float16", resume=True, max_steps=3)
    state = torch.load(checkpoints(tmp_path)[3] / "trainer.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0**34


# ---------------------------------------------------------------- updates that are left out
def spoil(patch, updates) -> None:
    """NaN in place of the log-probs of the training forwards with these numbers;
    one forward is one update here."""
    train, count = load_experiment().train, iter(range(1, 1000))
    sequences_log_probs = train.sequences_log_probs

    def maybe_nan(*args):
        log_probs = sequences_log_probs(*args)
        return (
            log_probs * math.nan
            if torch.is_grad_enabled() and next(count) in updates
            else log_probs
        )

    patch.setattr(train, "sequences_log_probs", maybe_nan)


def test_non_finite_gradients_are_skipped(tmp_path, model, base, loaded, monkeypatch):
    """Bug: one NaN and every weight is NaN. Both updates of each step are bad here, so nothing
    moves; all is logged."""
    spoil(monkeypatch, range(1, 5))
    run_main(tmp_path, model)
    assert [line["skipped_updates"] for line in metrics(tmp_path)[1:]] == [2, 2]
    assert not moved(loaded)
    saved = read_weights(checkpoints(tmp_path)[2])
    assert all(torch.equal(value, loaded.before[name]) for name, value in saved.items())


def test_the_updates_between_are_made(tmp_path, model, base, loaded, monkeypatch):
    """The count in a row begins again after a good one,
    and the good one's figures are not lost in a mean with NaN."""
    spoil(monkeypatch, {1, 2, 4, 5})
    monkeypatch.setattr(base.run, "MAX_SKIPPED", 3)
    run_main(tmp_path, model, max_steps=3)
    lines = metrics(tmp_path)[1:]  # which refuses NaN, as strict readers of JSON do
    assert [line["skipped_updates"] for line in lines] == [2, 1, 1]
    assert lines[0]["grad_norm"] is None and lines[1]["grad_norm"] > 0 and lines[2]["grad_norm"] > 0
    assert moved(loaded) == set(loaded.before)
    assert all(torch.isfinite(value).all() for value in loaded.policy.state_dict().values())


def test_many_in_a_row_end_the_run(tmp_path, model, base, monkeypatch):
    """With the last good checkpoint named and intact. Bug: a run of days that has trained on
    nothing for most of it."""
    monkeypatch.setattr(base.run, "MAX_SKIPPED", 3)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, range(5, 100))
        with pytest.raises(SystemExit) as exit:
            run_main(tmp_path, model, max_steps=8, epochs=4)
    (checkpoint,) = checkpoints(tmp_path).values()
    assert (
        "no finite gradient in 3 updates" in exit.value.code and str(checkpoint) in exit.value.code
    )
    assert checkpoint.name == "step_000002"
    run_main(tmp_path, model, max_steps=3, epochs=4, resume=True)
    assert metrics(tmp_path)[3]["skipped_updates"] == 0


def test_equal_rewards_without_kl_forward_nothing(tmp_path, model, base, loaded, monkeypatch):
    """Bug: groups without spread cost a forward each and, with momentum or weight decay,
    still move the weights."""
    forwards = []
    sequences_log_probs = base.train.sequences_log_probs
    monkeypatch.setattr(
        base.train, "sequences_log_probs", lambda *a: forwards.append(1) or sequences_log_probs(*a)
    )
    monkeypatch.setattr(base.train, "accuracy_reward", lambda *_: 0.0)
    run_main(tmp_path, model, kl_weight=0.0, log_groups=0)
    assert not forwards and not moved(loaded)
    for line in metrics(tmp_path)[1:]:
        assert (
            line["zero_std_fraction"] == 1
            and line["reward_std"] == 0
            and line["skipped_updates"] == 0
        )
    run_main(tmp_path, model, kl_weight=0.1, run_name="with KL")
    assert forwards  # the same groups are forwarded where the KL pulls


# ---------------------------------------------------------------- learning
@pytest.mark.skipif(not (POLICY / "model.safetensors").exists(), reason="needs data/policy_math")
def test_embedded_policy_learns(tmp_path):
    """The reward goes up within eight steps of half the default size:
    the one test that sees the whole algorithm."""
    data = ROOT / "data" / "math_tasks_eval.jsonl"
    (tmp_path / "few.jsonl").write_text("".join(data.read_text().splitlines(keepends=True)[:8]))
    config = load_experiment().train.Config(
        model_name=str(POLICY),
        eval_data_path=str(tmp_path / "few.jsonl"),
        log_dir=str(tmp_path / "runs"),
        checkpoint_path=str(tmp_path / "o"),
        run_name="run",
        rollouts_per_step=8,
        train_batch_size=32,
        max_steps=8,
    )
    load_experiment().train.main(config)
    rewards = [line["reward"] for line in metrics(tmp_path)[1:]]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.1, rewards
