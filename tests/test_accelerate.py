"""experiment_accelerate: several processes compute what one computes."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from helpers import POLICY, ROOT

WORKER = ROOT / "tests" / "ranks_worker.py"
KILLED = ROOT / "tests" / "killed_rank.py"
EXPERIMENT = ROOT / "experiment_accelerate"


DEFAULTS = dict(
    dtype="float64",
    precision="float32",
    without_spread=[],
    model_name=str(POLICY),
    group_size=4,
    rollouts_per_step=9,
    train_batch_size=12,  # 3 updates, of 3 groups each
    micro_batch_tokens=40,  # a group fills one
    kl_weight=0.01,
    lr=1e-4,
)
HOW = [(2, False), (3, False), (2, True), (3, True)]  # processes, and whether FSDP


def all_settings() -> dict[str, dict]:
    found = {}
    for critic_type, kl_weight, lora_rank in product(["grpo", "drgrpo", "dapo"], [0, 0.01], [0, 4]):
        name = f"{critic_type}-kl{kl_weight}-lora{lora_rank}"
        found[name] = dict(critic_type=critic_type, kl_weight=kl_weight, lora_rank=lora_rank)
    # Without KL, groups without spread are left out. With one that has it, all but one rank take
    # part with weights of 0.
    for count in (2, 8):
        changes = dict(kl_weight=0, without_spread=list(range(count)), train_batch_size=36)
        found[f"{count} groups without spread"] = changes
    found["float32"] = dict(dtype="float32")
    found["float32-lora"] = dict(dtype="float32", lora_rank=4)
    # A micro-batch is rounded alike on every rank, so their sum is as exact as in float32.
    for precision, lora_rank in product(["bfloat16", "float16"], [0, 4]):
        changes = dict(dtype="float32", precision=precision, lora_rank=lora_rank)
        found[f"{precision}-lora{lora_rank}"] = changes
    for lora_rank in (0, 4):
        changes = dict(gradient_checkpointing=True, lora_rank=lora_rank)
        found[f"checkpointing-lora{lora_rank}"] = changes
    return {name: DEFAULTS | changes for name, changes in found.items()}


SETTINGS = all_settings()


def run_worker(folder: Path, processes: int, sharded: bool, settings: dict[str, dict]) -> dict:
    """What `processes` processes of one thread each come to."""
    given = folder / "settings.json"
    results = folder / "results.pt"
    given.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--standalone", str(WORKER), str(given), str(results)]
    environment = environment_of(sharded)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(results, weights_only=True)


def environment_of(sharded: bool) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_FSDP": str(sharded).lower(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(processes, whether FSDP) -> name of the settings -> what came of them."""
    found = {}
    for processes, sharded in [(1, False), *HOW]:
        folder = tmp_path_factory.mktemp("ranks")
        found[processes, sharded] = run_worker(folder, processes, sharded, SETTINGS)
    return found


def assert_same(found: dict, expected: dict, tolerance: float) -> None:
    """tolerance: of the first gradient, relative. Those of later updates are at other weights,
    which differ by rounding, so there it is ten times as large."""
    assert len(found["gradients"]) == len(expected["gradients"]) >= 1
    compared = 0
    for update, (ours, theirs) in enumerate(zip(found["gradients"], expected["gradients"])):
        assert ours.keys() == theirs.keys()
        length = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
        gap = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).norm()
        if length.isfinite():  # float16's first loss scales are too large, and updates skipped
            assert gap <= tolerance * length * (10 if update else 1)
            compared += 1
        else:
            assert not gap.isfinite()
    assert compared
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-5, rtol=1e-5)
    for name, figure in expected["figures"].items():
        assert found["figures"][name] == pytest.approx(figure, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_number_of_processes_has_the_gradient_of_one(results, name, how):
    """And the same weights after the last update, and the same figures."""
    is_exact = SETTINGS[name]["dtype"] == "float64"
    assert_same(results[how][name], results[1, False][name], 1e-10 if is_exact else 1e-6)


def test_4_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = {"4 bit": DEFAULTS | dict(dtype="float32", load_in_4bit=True, lora_rank=4)}
    expected = run_worker(tmp_path, 1, False, settings)["4 bit"]
    assert_same(run_worker(tmp_path, 2, False, settings)["4 bit"], expected, tolerance=1e-6)


# ---------------------------------------------------------------- whole runs
FLAGS = (
    "--max-prompts 64 --max-eval-prompts 24 --rollouts-per-step 4 --group-size 4 "
    "--train-batch-size 8 --max-new-tokens 24 --checkpoint-interval 1 --eval-interval 0 "
    "--log-completions-interval 0"
).split()


def launch(
    tmp_path, processes: int, *flags: str, sharded: bool = False, script=EXPERIMENT / "train.py"
) -> subprocess.Popen:
    """experiment_accelerate/train.py in processes of one thread each, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--standalone", str(script), *FLAGS]
    command += ["--log-dir", str(tmp_path / "runs"), "--checkpoint-path", str(tmp_path / "out")]
    return subprocess.Popen(
        [*command, *flags],
        env=environment_of(sharded),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 200) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-3000:]
    return output


def weights_of(tmp_path, run_name: str, step: int) -> dict:
    folder = tmp_path / "out" / "experiment_accelerate" / run_name / f"step_{step:06d}"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def lines_of(tmp_path, run_name: str) -> list[dict]:
    text = (tmp_path / "runs" / run_name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "processes, sharded, more",
    [
        (2, False, ()),
        (2, True, ()),
        (3, False, ()),
        (2, False, ("--lora-rank", "4")),
        (2, True, ("--lora-rank", "4")),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path, processes, sharded, more):
    size = ("--rollouts-per-step", "6", *more)
    for name, steps in (("whole", "4"), ("parts", "2")):
        flags = ("--run-name", name, "--max-steps", steps, *size)
        finish(launch(tmp_path, processes, *flags, sharded=sharded))
    flags = ("--run-name", "parts", "--max-steps", "4", "--resume", *size)
    finish(launch(tmp_path, processes, *flags, sharded=sharded))
    expected = weights_of(tmp_path, "whole", 4)
    for name, weight in weights_of(tmp_path, "parts", 4).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    "first, then", [((2, False), (1, False)), ((1, False), (2, True)), ((2, True), (3, False))]
)
def test_any_number_of_processes_resumes(tmp_path, first, then):
    name = ("--run-name", "run")
    # 12 groups divide among 1, 2 and 3.
    size = ("--rollouts-per-step", "12")
    finish(launch(tmp_path, first[0], *name, *size, "--max-steps", "1", sharded=first[1]))
    resume = ("--max-steps", "2", "--resume")
    output = finish(launch(tmp_path, then[0], *name, *size, *resume, sharded=then[1]))
    assert "resuming run" in output
    assert [line["step"] for line in lines_of(tmp_path, "run")] == [0, 1, 2]


def test_the_evaluation_is_that_of_one_process(tmp_path):
    for processes, sharded in ((1, False), (2, False), (3, True)):
        name = f"{processes}_{sharded}"
        flags = ("--run-name", name, "--max-steps", "1", "--rollouts-per-step", "12")
        finish(launch(tmp_path, processes, *flags, sharded=sharded))
    figures = [lines_of(tmp_path, name)[0] for name in ("1_False", "2_False", "3_True")]
    assert figures[0]["eval_accuracy"] == figures[1]["eval_accuracy"] == figures[2]["eval_accuracy"]


def test_layer_by_layer_samples_what_whole_weights_do(tmp_path):
    for how in ("whole", "layers"):
        flags = ("--run-name", how, "--max-steps", "2", "--sampling-weights", how)
        finish(launch(tmp_path, 2, *flags, sharded=True))
    whole, layers = (lines_of(tmp_path, how) for how in ("whole", "layers"))
    for a, b in zip(whole, layers, strict=True):
        assert a.get("reward") == b.get("reward")
    expected = weights_of(tmp_path, "whole", 2)
    for name, weight in weights_of(tmp_path, "layers", 2).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)


def test_a_signal_stops_all_ranks_after_the_same_step(tmp_path):
    flags = ("--run-name", "run", "--max-steps", "200", "--checkpoint-interval", "0")
    process = launch(tmp_path, 2, *flags)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
    output, _ = process.communicate(timeout=60)
    assert "finishing this step, then saving" in output
    step = lines_of(tmp_path, "run")[-1]["step"]
    assert 2 <= step < 200
    weights_of(tmp_path, "run", step)
    finish(launch(tmp_path, 2, "--run-name", "run", "--max-steps", str(step + 1), "--resume"))


@pytest.mark.parametrize("where", ["sampling", "training", "saving"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(tmp_path, where, rank, monkeypatch):
    """With a line, within 30 seconds; the last checkpoint is whole and can be resumed."""
    monkeypatch.setenv("KILL_IN", where)
    monkeypatch.setenv("KILL_RANK", str(rank))
    monkeypatch.setenv("KILL_AT_STEP", "2")
    process = launch(tmp_path, 2, "--run-name", "run", "--max-steps", "4", script=KILLED)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process has ended" in output
    finish(launch(tmp_path, 2, "--run-name", "run", "--max-steps", "3", "--resume"))
    weights_of(tmp_path, "run", 3)
