"""experiment_async: samplers and a trainer at the same time.

Samplers are scripted first, then real ones of real Ray.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import peft
import psutil
import pytest
import ray
import torch
import tyro
from helpers import POLICY, ROOT, load_experiment, make_model
from safetensors.torch import load_file
from test_accelerate import FLAGS, environment_of, places, torchrun
from test_variants import LESSON, changed_lines

EXPERIMENT = ROOT / "experiment_async"
asynchronous = load_experiment("experiment_async")
samplers = asynchronous.samplers
Config = asynchronous.train.Config


def test_the_diff_to_the_base_is_short():
    """Of the lesson files, header docstrings apart: at most 200 lines."""
    changed = [changed_lines("experiment_async", name, "experiment_base") for name in LESSON]
    assert sum(map(len, changed)) <= 200


# ---------------------------------------------------------------- samplers that are scripted
class ScriptedRay:
    """Ray without processes: what is asked is done when it is fetched."""

    put = staticmethod(lambda weights: weights)
    get = staticmethod(lambda reference: reference())
    shutdown = staticmethod(lambda: None)


class ScriptedSampler:
    """Answers with an experience for each prompt, whose answer is the prompt.

    versions: the weights that it claims to have sampled with, in turn; afterwards those it was
    given.
    """

    def __init__(self, versions=()) -> None:
        self.versions = list(versions)
        self.asked = []
        self.process = 1
        self.sample = SimpleNamespace(remote=self.request)
        self.get_ready = SimpleNamespace(remote=lambda: None)

    def request(self, prompts, key, version, weights):
        self.asked.append(SimpleNamespace(prompts=prompts, key=key, version=version, at=weights))

        def answer():
            made_by = self.versions.pop(0) if self.versions else version
            group = {"completion_ids": [torch.tensor([1, 2])], "version": made_by}
            groups = [SimpleNamespace(answer=prompt, **group) for prompt in prompts]
            return samplers.Part(groups, 0.0, 1.0, 0.25, 0.5, self.process)

        return answer


@pytest.fixture
def scripted(monkeypatch):
    """A function that makes `Samplers` whose samplers are scripted."""

    def make(count: int = 1, versions=(), **constants):
        actors = [ScriptedSampler(versions) for _ in range(count)]
        monkeypatch.setattr(samplers, "ray", ScriptedRay)
        monkeypatch.setattr(samplers, "start_ray", lambda config: None)
        monkeypatch.setattr(samplers, "start_actors", lambda config, ranks: actors)
        monkeypatch.setattr(samplers, "plain_weights", lambda policy, config: policy)
        monkeypatch.setattr(samplers, "to_arrays", lambda weights: weights)
        ranks = SimpleNamespace(is_first=True, count=1, gather=lambda item: [item])
        return samplers.Samplers(Config(num_samplers=count, **constants), ranks)

    return make


def answers(taken) -> list[str]:
    return [experience.answer for experience in taken.experiences]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_groups_come_back_in_the_order_of_the_prompts(scripted, count):
    found = scripted(count)
    found.publish(0, "weights")
    found.ask(1, list("abcdefg"))
    assert answers(found.take(1)) == list("abcdefg")
    assert [len(actor.asked) for actor in found.actors] == [1] * count


def test_a_step_is_asked_for_once_with_the_newest_weights(scripted):
    found = scripted()
    found.publish(0, "first")
    found.ask(1, ["a"])
    found.publish(2, "second")
    found.ask(1, ["a"])
    found.ask(2, ["b"])
    asked = found.actors[0].asked
    assert [(request.version, request.at) for request in asked] == [(0, ["first"]), (2, ["second"])]


def test_no_two_requests_have_the_same_random_numbers(scripted):
    """With one sampler they are those of experiment_base, which depend on (seed, step)."""
    for count in (1, 2, 3):
        found = scripted(count)
        found.publish(0, "weights")
        for step in (1, 2, 3):
            found.ask(step, list("abc"))
        keys = [request.key for actor in found.actors for request in actor.asked]
        assert len(set(keys)) == 3 * count
    assert [request.key for request in scripted_keys(scripted)] == [(42, "sample", 5)]


def scripted_keys(scripted):
    found = scripted()
    found.publish(0, "weights")
    found.ask(5, ["a"])
    return found.actors[0].asked


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("updates", [1, 2, 4])
def test_nothing_is_older_than_the_bound(scripted, max_staleness, updates):
    """The loop of `main`: as far ahead as staleness permits, and no further."""
    found = scripted(train_batch_size=128 // updates, max_staleness=max_staleness)
    assert samplers.updates_per_step(found.config) == updates

    version = 0
    found.publish(version, "weights")
    oldest = 0
    most_open = 0
    for step in range(1, 13):
        for later in range(step, step + found.steps_ahead + 1):
            found.ask(later, ["a", "b"])
        most_open = max(most_open, len(found.requests))
        taken = found.take(step)
        oldest = max(oldest, version - taken.experiences[0].version)
        assert taken.dropped == 0
        version += updates
        found.publish(version, "weights")
    assert oldest == max_staleness // updates * updates <= max_staleness
    assert most_open == max_staleness // updates + 1  # the queue is bounded


@pytest.mark.parametrize(
    "constants, updates",
    [
        ({}, 2),
        ({"train_batch_size": 128}, 1),
        ({"train_batch_size": 8}, 16),
        ({"epochs_per_step": 3}, 6),
    ],
)
def test_updates_of_a_step(constants, updates):
    assert samplers.updates_per_step(Config(**constants)) == updates


def test_what_is_too_old_is_dropped_counted_and_sampled_again(scripted):
    """Pitfall 47."""
    found = scripted(max_staleness=2, versions=[0, 1])
    found.publish(0, "weights")
    found.ask(1, ["a", "b"])
    found.publish(4, "newer")
    taken = found.take(1)
    assert taken.dropped == 4  # two groups, twice
    assert answers(taken) == ["a", "b"]
    assert [experience.version for experience in taken.experiences] == [4, 4]
    metrics = samplers.async_metrics(taken, version=4, sync_seconds=0.0)
    assert metrics["dropped_fraction"] == 4 / 6
    assert metrics["staleness_max"] == 0


def test_metrics_by_hand():
    """Two samplers, whose times overlap by a second; versions 3 and 5, trained from 6 on."""
    groups = []
    for version in (3, 3, 3, 5):
        ids = [torch.zeros(4), torch.zeros(6)]
        groups.append(SimpleNamespace(completion_ids=ids, version=version))
    parts = [
        samplers.Part(groups[:3], 10.0, 13.0, 0.5, 0.1, 1),
        samplers.Part(groups[3:], 12.0, 15.0, 0.25, 0.0, 2),
    ]
    taken = samplers.Step(groups, parts, waited_from=11.5, waited_until=13.0, dropped=1)
    assert samplers.async_metrics(taken, 6, 0.125) == {
        "staleness_mean": 2.5,
        "staleness_max": 3,
        "dropped_fraction": 0.2,
        "trainer_idle_seconds": 1.5,
        "trainer_waited_from": 11.5,
        "trainer_waited_until": 13.0,
        "sample_tokens_per_second": 40 / 5,
        "sync_seconds": 0.125,
        "sampler_0_idle_seconds": 0.5,
        "sampler_0_loading_seconds": 0.1,
        "sampler_0_began": 10.0,
        "sampler_0_ended": 13.0,
        "sampler_1_idle_seconds": 0.25,
        "sampler_1_loading_seconds": 0.0,
        "sampler_1_began": 12.0,
        "sampler_1_ended": 15.0,
    }


def test_a_sampler_that_was_started_anew_is_told(scripted, capsys):
    found = scripted()
    found.publish(0, "weights")
    for step in (1, 2, 3):
        found.ask(step, ["a"])
        found.actors[0].process = step // 2
        found.take(step)
    assert capsys.readouterr().out.count("sampler 0 had ended, and was started anew") == 1


@pytest.mark.parametrize(
    "constants, said",
    [
        ({"num_samplers": 17}, "--num-samplers 17: more than the 16 prompts of a step"),
        ({"gpus_per_sampler": 2.0}, "--gpus-per-sampler 2: a sampler uses one GPU at most"),
        ({"engine": "vllm"}, "--engine vllm: vLLM is missing"),
        ({"importance_cap": 0.5}, "--importance-cap 0.5: must be 0 or at least 1"),
        ({"sampling_weights": "layers"}, "--sampling-weights layers: samplers hold whole weights"),
    ],
)
def test_what_does_not_go_together_ends_in_one_line(constants, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"^error: {said}"):
        samplers.check(Config(**constants))


def test_a_bound_below_a_steps_updates_is_told(capsys):
    samplers.check(Config(max_staleness=1))
    expected = "--max-staleness 1 is below the 2 updates of a step: samplers and trainer take turns"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("address", ["", "nonsense", "ray://x:1", ":6379", "host:"])
def test_an_address_of_another_form_ends_in_one_line(address):
    with pytest.raises(SystemExit, match="must be auto, or host:port"):
        samplers.check_address(address)


# ---------------------------------------------------------------- the importance weight
def micro_batch(old, sampled):
    return SimpleNamespace(
        old_log_probs=torch.tensor(old),
        sampled_log_probs=torch.tensor(sampled),
        advantages=torch.tensor([1.0, -1.0, 1.0]),
        weights=torch.tensor([0.5, 0.25, 0.25]),
    )


def test_importance_weights_by_hand():
    """Pitfall 44. exp(0) = 1; exp(1) = 2.7 is cut to 2; exp(-0.5) = 0.60653."""
    batch = micro_batch([-1.0, -1.0, -1.0], [-1.0, -2.0, -0.5])
    found = asynchronous.loss.importance_weights(batch, cap=2.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 0.60653]))
    assert asynchronous.loss.importance_weights(batch, cap=0).tolist() == [1, 1, 1]


def test_the_loss_is_weighted_and_the_weight_has_no_gradient():
    """At the first update every ratio is 1, so token t's gradient is -w_t * importance_t * A_t."""
    objective = asynchronous.loss.GRPOLoss(0.2, 0.2, kl_weight=0, importance_cap=2.0)
    log_probs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    batch = micro_batch([0.0, 0.0, 0.0], [-1.0, -2.0, -0.5])
    batch.old_log_probs = None  # the first batch of a step
    objective(log_probs, batch).backward()
    expected = torch.tensor([-0.5 * 1.0, 0.25 * 2.0, -0.25 * 0.60653])
    torch.testing.assert_close(log_probs.grad, expected)
    metrics = asynchronous.loss.loss_metrics(objective.token_sums, [1.0])
    assert metrics["importance_mean"] == pytest.approx((1 + 2 + 0.60653) / 3)
    assert metrics["importance_capped_fraction"] == pytest.approx(1 / 3)


def test_without_a_cap_it_is_the_parents_loss():
    base = load_experiment()
    losses = []
    for module, more in ((base, {}), (asynchronous, {"importance_cap": 0})):
        log_probs = torch.tensor([-1.0, -1.5, -0.5], requires_grad=True)
        objective = module.loss.GRPOLoss(0.2, 0.2, kl_weight=0, **more)
        loss = objective(log_probs, micro_batch([-1.0, -1.0, -1.0], [-1.0, -2.0, -0.5]))
        loss.backward()
        losses.append((loss.item(), log_probs.grad.tolist()))
    assert losses[0] == losses[1]


def test_the_weighted_mean_is_that_of_the_old_policys_samples():
    """Of one token, whose earlier ones are given: sum q p / q f = sum p f, over five tokens."""
    torch.manual_seed(0)
    old = torch.randn(5).log_softmax(-1)
    sampled = torch.randn(5).log_softmax(-1)
    f = torch.randn(5)
    batch = SimpleNamespace(old_log_probs=old, sampled_log_probs=sampled, weights=torch.ones(5))
    weights = asynchronous.loss.importance_weights(batch, cap=1e9)
    torch.testing.assert_close((sampled.exp() * weights * f).sum(), (old.exp() * f).sum())


# ---------------------------------------------------------------- weights
def adapted(model):
    """The model with an adapter that is not 0."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_sent_are_the_models_own_merged_weights(precision, lora):
    policy = make_model()
    names = {name for name, _ in policy.named_parameters()}
    if lora:
        policy = adapted(policy)
    config = SimpleNamespace(precision=precision)
    arrays = samplers.to_arrays(samplers.plain_weights(policy, config))
    found = samplers.from_arrays(arrays)
    expected = policy.merge_and_unload() if lora else policy
    assert set(found) == names
    for name, parameter in expected.named_parameters():
        rounded = parameter.detach().to(getattr(torch, precision))
        torch.testing.assert_close(found[name], rounded, rtol=1e-6, atol=1e-6)
        assert found[name].dtype == rounded.dtype


def test_four_bit_weights_are_sent_as_what_they_stand_for(tmp_path):
    """An adapter over nf4: the layer's product with the unit vectors is the whole weight."""
    config, device = asynchronous.model.resolve(Config(lora_rank=4, load_in_4bit=True, kl_weight=0))
    policy, _ = asynchronous.model.load_model(config, device)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    weights = samplers.plain_weights(policy, config)
    name = "model.layers.0.mlp.up_proj"
    layer = policy.get_submodule(f"base_model.model.{name}")
    ones = torch.eye(layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(layer(ones).T, weights[f"{name}.weight"], rtol=0, atol=0.02)


def test_a_sampler_has_the_weights_that_it_was_sent():
    """Those of an adapter too: its log-probs are the policy's own. It knows the same end tokens."""
    config, device = asynchronous.model.resolve(Config(lora_rank=4, kl_weight=0))
    policy, _ = asynchronous.model.load_model(config, device)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    engines = asynchronous.engines
    sampler, tokenizer = engines.load_engine(config)
    engines.load_weights(sampler, samplers.plain_weights(policy, config))
    eos_ids = asynchronous.model.find_eos_ids(policy, tokenizer)
    history = tokenizer("What is 5 + 8?").input_ids
    found = []
    for model in (sampler, policy):
        generator = torch.Generator().manual_seed(0)
        found.append(engines.sample(model, [history] * 4, eos_ids, config, generator)[1])
    for sent, own in zip(*found):
        torch.testing.assert_close(sent, own, rtol=0, atol=1e-4)
    of_vllm = SimpleNamespace(generation_config=engines.load_generation_config(POLICY))
    assert asynchronous.model.find_eos_ids(of_vllm, tokenizer) == eos_ids


# ---------------------------------------------------------------- real Ray
@pytest.fixture(scope="module")
def cases() -> dict:
    """What ray_worker.py found."""
    worker = ROOT / "tests" / "ray_worker.py"
    command = [sys.executable, str(worker)]
    values = environment_of(False)
    del values["CUDA_VISIBLE_DEVICES"]  # Ray believes in GPUs that are made up, but not against it
    done = subprocess.run(command, env=values, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_trainer_must_have_the_gpus_that_ray_keeps_for_it(cases):
    assert cases["kept"] == {"samplers": 1, "line": ""}
    line = "error: Ray keeps GPU 0 for a trainer on 1: --trainer-gpus counts those of all"
    assert cases["another"]["line"].startswith(line)


def test_a_card_is_shared_and_what_does_not_fit_is_named(cases):
    """On two GPUs that Ray believes in. Three times 0.5 beside 0.5 fit."""
    assert cases["fractions"] == {"samplers": 3, "line": ""}
    assert "4 sampler(s) with 1 CPU and 0.5 GPU each" in cases["too many"]["line"]
    assert "and 2 GPU (2 free)" in cases["too many"]["line"]
    # 0.5 + 0.75 + 0.75 are two GPUs, but no two of them are one.
    assert cases["no room"]["line"].startswith("error: Ray has no place for 2 sampler(s)")


def test_real_samples_that_are_too_old_are_dropped(cases):
    assert cases["dropped"] == {"groups": 4, "versions": [3, 3, 3, 3]}


def test_what_fails_in_a_sampler_is_said_by_the_trainer(cases):
    assert cases["wrong"]["line"] == "error: sampler 0: index out of range in self"


def test_a_request_that_kills_its_sampler_is_not_repeated_for_ever(cases):
    line = "error: sampler 0 ended, also when it was started anew: see "
    assert cases["deadly"]["line"].startswith(line)


def start(folder, name: str, *flags: str, launcher=(), sharded=False) -> subprocess.Popen:
    command = [*launcher, str(EXPERIMENT / "train.py"), *FLAGS, *places(folder)]
    command += ["--run-name", name]
    return subprocess.Popen(
        [*(command if launcher else [sys.executable, *command]), *flags],
        env=environment_of(sharded),
        stdout=open(folder / f"{name}.log", "a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(folder, name: str, *flags: str, **how) -> str:
    process = start(folder, name, *flags, **how)
    assert process.wait(timeout=200) == 0, (folder / f"{name}.log").read_text()[-3000:]
    return (folder / f"{name}.log").read_text()


def lines_of(folder, name: str) -> list[dict]:
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(folder, name: str, step: int, process) -> None:
    until = time.time() + 100
    while len(lines_of(folder, name)) <= step:
        assert process.poll() is None and time.time() < until
        time.sleep(0.05)


def base_metrics(folder) -> list[dict]:
    base = load_experiment()
    flags = [*FLAGS, *places(folder), "--run-name", "base", "--max-steps", "4"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base.train.main(tyro.cli(base.train.Config, args=flags))
    torch.set_num_threads(threads)
    return lines_of(folder, "base")


def test_without_staleness_it_is_the_base(tmp_path):
    """One sampler, four steps: to the last digit without the importance weights, and to rounding
    with them. The second run is stopped by SIGINT, after which no process is left."""
    expected = base_metrics(tmp_path)
    finish(tmp_path, "plain", "--max-steps", "4", "--max-staleness", "0", "--importance-cap", "0")
    for found, line in zip(lines_of(tmp_path, "plain"), expected, strict=True):
        for name, value in line.items():
            if "second" not in name and name != "peak_memory":
                assert found[name] == value, name

    process = start(tmp_path, "weighted", "--max-staleness", "0")
    wait_for_step(tmp_path, "weighted", 4, process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("Sampler" in child.name() for child in children)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
    assert process.wait(timeout=60) == 0
    log = (tmp_path / "weighted.log").read_text()
    assert re.search(r"checkpoint: .*step_\d+", log)
    assert psutil.wait_procs(children, timeout=60)[1] == []
    for found, line in zip(lines_of(tmp_path, "weighted"), expected[:4]):
        assert not found["step"] or found["importance_mean"] == pytest.approx(1, abs=1e-4)
        for name in ("reward", "loss", "kl", "grad_norm", "entropy", "completion_length"):
            if name in line:
                assert found[name] == pytest.approx(line[name], rel=1e-3, abs=1e-5), name


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True])
def test_two_trainers_are_one(tmp_path, sharded):
    """Two ranks, DDP and FSDP2, get the same groups from rank 0, and add their gradients."""
    flags = ("--max-steps", "4", "--max-staleness", "0", "--num-samplers", "1")
    finish(tmp_path, "two", *flags, launcher=torchrun(2), sharded=sharded)
    lines = lines_of(tmp_path, "two")
    for found, line in zip(lines, base_metrics(tmp_path), strict=True):
        for name in ("reward", "loss", "kl", "grad_norm", "entropy", "completion_length"):
            if name in line:
                assert found[name] == pytest.approx(line[name], rel=1e-3, abs=1e-5), name


@pytest.mark.long
def test_without_staleness_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    flags = ("--max-staleness", "0", "--num-samplers", "2")
    finish(tmp_path, "whole", *flags, "--max-steps", "4")
    finish(tmp_path, "resumed", *flags, "--max-steps", "2")
    finish(tmp_path, "resumed", *flags, "--max-steps", "4", "--resume")
    expected = weights_of(tmp_path, "whole", 4)
    for name, weight in weights_of(tmp_path, "resumed", 4).items():
        assert torch.equal(weight, expected[name])


def weights_of(folder, name: str, step: int) -> dict:
    run = folder / "out" / "experiment_async" / name
    return load_file(run / f"step_{step:06d}" / "model.safetensors")


@pytest.mark.long  # benchmarks/async_kills.py does it 17 times
def test_a_killed_sampler_changes_nothing(tmp_path):
    """Two samplers, one of which dies (kill -9): the same weights in the end, bit for bit."""
    flags = ("--max-steps", "6", "--num-samplers", "2")
    finish(tmp_path, "whole", *flags)
    process = start(tmp_path, "killed", *flags)
    wait_for_step(tmp_path, "killed", 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    [child for child in children if "Sampler" in child.name()][0].kill()
    assert process.wait(timeout=100) == 0
    assert "was started anew" in (tmp_path / "killed.log").read_text()
    expected = weights_of(tmp_path, "whole", 6)
    for name, weight in weights_of(tmp_path, "killed", 6).items():
        assert torch.equal(weight, expected[name])
    # Two updates a step, one step ahead: from the second step on the samples are two updates old.
    stale = [line["staleness_max"] for line in lines_of(tmp_path, "whole")[1:]]
    assert stale == [0, 2, 2, 2, 2, 2]


@pytest.mark.long
def test_a_killed_trainer_is_resumed(tmp_path):
    """What was in flight is sampled again: every step is logged once, updates go on counting."""
    process = start(tmp_path, "run", "--max-steps", "40")
    wait_for_step(tmp_path, "run", 3, process)
    process.kill()
    process.wait()
    last = max((tmp_path / "out" / "experiment_async" / "run").glob("step_*"))
    state = torch.load(last / "trainer.pt", weights_only=True)
    step = int(last.name.removeprefix("step_"))
    assert state["version"] == 2 * step
    finish(tmp_path, "run", "--resume", "--max-steps", str(step + 3))
    lines = lines_of(tmp_path, "run")
    assert [line["step"] for line in lines] == list(range(step + 4))
    assert [line["staleness_max"] for line in lines[step + 1 :]] == [0, 2, 2]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--ray-address", "127.0.0.1:1"), "error: --ray-address 127.0.0.1:1: cannot be reached"),
        (("--gpus-per-sampler", "0.5"), "error: Ray has no place for 1 sampler"),
    ],
)
def test_what_ray_lacks_is_one_line(tmp_path, flags, said):
    process = start(tmp_path, "run", *flags)
    assert process.wait(timeout=150) == 1
    errors = [line for line in (tmp_path / "run.log").read_text().splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith(said)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "out").exists()


def test_without_ray_it_says_what_to_install(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('none here')")
    command = [sys.executable, str(EXPERIMENT / "train.py")]
    path = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment_of(False) | path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: Ray is missing: pip install -r requirements-async.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_requirements_name_the_same_versions():
    """requirements-vllm.txt has a transformers of its own, and else those of the others."""
    pins = {}
    for name in ("requirements.txt", "requirements-async.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if "==" in line:
                pins.update([line.split("==")])
    of_vllm = dict(
        line.split("==")
        for line in (ROOT / "requirements-vllm.txt").read_text().splitlines()
        if "==" in line
    )
    assert pins["ray"] == ray.__version__
    assert set(pins) | {"vllm"} == set(of_vllm)
    assert {name for name in pins if pins[name] != of_vllm[name]} == {"transformers"}
