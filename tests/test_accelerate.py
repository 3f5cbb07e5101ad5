"""experiment_accelerate: several processes compute what one computes.

Starting processes takes most of the time. So the tests share runs, and a part of the matrix, marked
`long`, is a command of its own: pytest -m long tests/test_accelerate.py (7 minutes).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
import tyro
from helpers import POLICY, ROOT, load_experiment

WORKER = ROOT / "tests" / "ranks_worker.py"
KILLED = ROOT / "tests" / "killed_rank.py"
MADE_UP = ROOT / "tests" / "made_up_rollouts.py"
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
# Processes, and whether FSDP.
HOW = [(2, False), (3, False), (2, True), pytest.param(3, True, marks=pytest.mark.long)]


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
    for lora_rank in (0, 4):
        found[f"float32-lora{lora_rank}"] = dict(dtype="float32", lora_rank=lora_rank)
        # A micro-batch is rounded alike on every rank, so their sum is as exact as in float32.
        for precision in ("bfloat16", "float16"):
            changes = dict(dtype="float32", precision=precision, lora_rank=lora_rank)
            found[f"{precision}-lora{lora_rank}"] = changes
        changes = dict(gradient_checkpointing=True, lora_rank=lora_rank)
        found[f"checkpointing-lora{lora_rank}"] = changes
    found[FOUR_BITS] = dict(dtype="float32", load_in_4bit=True, lora_rank=4)
    return {name: DEFAULTS | changes for name, changes in found.items()}


FOUR_BITS = "4 bits"  # not with FSDP
SETTINGS = all_settings()
# Each value of each setting, and each pair with the critic_type: the others are marked `long`.
SHORT = [
    *("grpo-kl0-lora4", "drgrpo-kl0-lora4", "dapo-kl0-lora4"),
    *("grpo-kl0.01-lora0", "drgrpo-kl0.01-lora0", "dapo-kl0.01-lora0"),
    *("8 groups without spread", "float32-lora0", "bfloat16-lora0", "float16-lora4"),
    *("checkpointing-lora4", FOUR_BITS),
]


def run_worker(folder: Path, processes: int, sharded: bool, settings: dict[str, dict]) -> dict:
    """What `processes` processes of one thread each come to."""
    given = folder / "settings.json"
    results = folder / "results.pt"
    given.write_text(json.dumps(settings))
    command = [*torchrun(processes), str(WORKER), str(given), str(results)]
    environment = environment_of(sharded)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(results, weights_only=True)


def torchrun(processes: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc_per_node", str(processes)]


def places(folder: Path) -> list[str]:
    return ["--log-dir", str(folder / "runs"), "--checkpoint-path", str(folder / "out")]


def environment_of(sharded: bool) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_FSDP": str(sharded).lower(),
    }


@cache
def results(processes: int, sharded: bool, names: tuple[str, ...]) -> dict:
    """What came of the settings with these names."""
    chosen = {name: SETTINGS[name] for name in names if not (sharded and name == FOUR_BITS)}
    with tempfile.TemporaryDirectory() as folder:
        return run_worker(Path(folder), processes, sharded, chosen)


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
        if figure is None:  # kl, where its weight is 0
            assert found["figures"][name] is None
        else:
            assert found["figures"][name] == pytest.approx(figure, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("processes, sharded", HOW)
@pytest.mark.parametrize(
    "names", [tuple(SHORT), pytest.param(tuple(set(SETTINGS) - set(SHORT)), marks=pytest.mark.long)]
)
def test_every_number_of_processes_has_the_gradient_of_one(processes, sharded, names):
    """And the same weights after the last update, and the same figures."""
    expected = results(1, False, names)
    for name, found in results(processes, sharded, names).items():
        print(name)  # which of them, where it fails
        is_exact = SETTINGS[name]["dtype"] == "float64"
        assert_same(found, expected[name], 1e-10 if is_exact else 1e-6)


# ---------------------------------------------------------------- whole runs
def test_whole_runs_train_alike_on_the_same_completions(tmp_path):
    """`main`, with completions that depend on the prompt alone and not on who samples."""
    flags = ("--run-name", "run", "--rollouts-per-step", "6", "--max-steps", "2")
    flags += ("--log-completions-interval", "1", "--log-alternatives", "2")
    expected = None
    completions = None
    for processes, sharded in ((1, False), (2, False), (2, True)):
        folder = tmp_path / f"{processes}_{sharded}"
        finish(launch(folder, processes, *flags, sharded=sharded, script=MADE_UP))
        found = weights_of(folder, "run", 2)
        expected = expected or found
        for name, weight in found.items():
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)
        found = (folder / "runs" / "run" / "completions.jsonl").read_text().splitlines()
        completions = completions or found
        assert len(found) == 6  # two groups in each step, and the first two again
        for line, expected_line in zip(found, completions):
            assert_alike(json.loads(line), json.loads(expected_line))


def assert_alike(found, expected) -> None:
    """Two contents of JSON, equal but for rounding."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    else:
        assert found == expected


FLAGS = (
    "--max-prompts 64 --max-eval-prompts 24 --rollouts-per-step 4 --group-size 4 "
    "--train-batch-size 8 --max-new-tokens 24 --checkpoint-interval 1 --eval-interval 0 "
    "--log-completions-interval 0"
).split()


def launch(
    tmp_path, processes: int, *flags: str, sharded: bool = False, script=EXPERIMENT / "train.py"
) -> subprocess.Popen:
    """experiment_accelerate/train.py in processes of one thread each, in a session of its own."""
    command = [*torchrun(processes), str(script), *FLAGS, *places(tmp_path)]
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


@pytest.fixture(scope="module")
def run_of_three_steps(tmp_path_factory):
    """A function: (processes, sharded, further flags) -> the folder of such a run. It runs once."""

    @cache
    def folder_of(processes: int, sharded: bool = False, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        finish(launch(folder, processes, *SIZE, "--max-steps", "3", *more, sharded=sharded))
        return folder

    return folder_of


def resume_after_step_2(
    folder: Path, target: Path, processes: int, *more: str, sharded: bool
) -> str:
    """Continue a copy of a run whose last checkpoint is that of step 2, to its end."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    shutil.rmtree(target / "out" / "experiment_accelerate" / "run" / "step_000003")
    flags = (*SIZE, "--max-steps", "3", "--resume", *more)
    output = finish(launch(target, processes, *flags, sharded=sharded))
    assert "resuming run" in output
    assert [line["step"] for line in lines_of(target, "run")] == [0, 1, 2, 3]
    return output


# 6 groups divide among 1, 2 and 3.
SIZE = ("--run-name", "run", "--rollouts-per-step", "6")
LORA = ("--lora-rank", "4")
STEPS_2_AND_3 = ("step_000002", "step_000003")


@pytest.mark.parametrize(
    "processes, sharded, more",
    [
        pytest.param(2, False, (), marks=pytest.mark.long),
        (2, True, ()),
        pytest.param(3, False, (), marks=pytest.mark.long),
        pytest.param(3, True, (), marks=pytest.mark.long),
        pytest.param(2, False, LORA, marks=pytest.mark.long),
        pytest.param(2, True, LORA, marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(
    tmp_path, run_of_three_steps, processes, sharded, more
):
    folder = run_of_three_steps(processes, sharded, *more)
    resume_after_step_2(folder, tmp_path, processes, *more, sharded=sharded)
    expected = weights_of(folder, "run", 3)
    for name, weight in weights_of(tmp_path, "run", 3).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    "first, then",
    [
        pytest.param((2, False), (1, False), marks=pytest.mark.long),
        ((2, False), (2, True)),
        pytest.param((1, False), (2, False), marks=pytest.mark.long),
        pytest.param((1, False), (2, True), marks=pytest.mark.long),
        pytest.param((2, True), (3, False), marks=pytest.mark.long),
    ],
)
def test_any_number_of_processes_resumes(tmp_path, run_of_three_steps, first, then):
    """Other samples and so other weights, but the optimizer goes on."""
    output = resume_after_step_2(run_of_three_steps(*first), tmp_path, then[0], sharded=then[1])
    assert ("other samples are drawn" in output) == (first[0] != then[0])
    folder = tmp_path / "out" / "experiment_accelerate" / "run" / "step_000003"
    state = torch.load(folder / "trainer.pt", weights_only=True)["optimizer"]["state"]
    names = {f"policy.{name}" for name in weights_of(tmp_path, "run", 3)}
    assert state.keys() == names
    for of_a_weight in state.values():
        assert of_a_weight["step"] == 9  # updates, 3 a step
    sizes = [
        (folder.with_name(step) / "model.safetensors").stat().st_size for step in STEPS_2_AND_3
    ]
    assert sizes[0] == sizes[1]  # a tied weight is written once


@pytest.mark.parametrize(
    "processes, sharded",
    [(2, False), (2, True), pytest.param(3, False, marks=pytest.mark.long)],
)
def test_the_evaluation_is_that_of_one_process(run_of_three_steps, processes, sharded):
    expected = lines_of(run_of_three_steps(1), "run")[0]["eval_accuracy"]
    found = lines_of(run_of_three_steps(processes, sharded), "run")[0]["eval_accuracy"]
    assert found == expected > 0


def test_each_rank_samples_whole_groups_of_its_own(monkeypatch):
    """The ranks' prompts are those of the step, each once, and come back in the step's order."""
    accelerate = load_experiment("experiment_accelerate")
    ranks = accelerate.ranks.Ranks.__new__(accelerate.ranks.Ranks)
    ranks.layerwise = None
    prompts = list(range(12))
    for count in (1, 2, 3, 4):
        ranks.count = count
        shares = []
        for rank in range(count):
            ranks.rank = rank
            shares.append(ranks.own(prompts))
        assert sorted(number for share in shares for number in share) == prompts
        monkeypatch.setattr(ranks, "gather", lambda part, shares=shares: shares)
        assert ranks.all_of([]) == prompts


@pytest.mark.parametrize(
    "name, said",
    [
        ("cpu", "2 processes, DDP, gloo"),
        pytest.param("single", "1 process", marks=pytest.mark.long),
        pytest.param("fsdp", "2 processes, FSDP2", marks=pytest.mark.long),
    ],
)
def test_the_configuration_files(tmp_path, name, said):
    """Each starts what it says, and says what it starts (ddp.yaml and cpu.yaml start the same)."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXPERIMENT / f"{name}.yaml"), str(EXPERIMENT / "train.py")]
    command += [*FLAGS, *places(tmp_path), "--max-steps", "0"]
    done = subprocess.run(
        command, env=environment_of(False), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0].startswith(said)
    assert "destroy_process_group" not in done.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--rollouts-per-step", "5"), "must be a multiple of the 2 processes"),
        *[
            pytest.param(flags, flags[1], marks=pytest.mark.long)
            for flags in [("--data-path", "/nowhere.jsonl"), ("--no-such-flag", "no-such-flag")]
        ],
    ],
)
def test_bad_input_is_said_once(tmp_path, flags, said):
    output, _ = launch(tmp_path, 2, "--max-steps", "1", *flags).communicate(timeout=120)
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert "another process" not in output
    assert len(lines) <= 1 and said in output
    assert not (tmp_path / "out").exists()


def test_one_process_is_experiment_base(tmp_path, run_of_three_steps):
    """Bit for bit."""
    base = load_experiment()
    flags = [*FLAGS, *places(tmp_path), *SIZE, "--max-steps", "3"]
    base.train.main(tyro.cli(base.train.Config, args=flags))
    (tmp_path / "out" / "experiment_base").rename(tmp_path / "out" / "experiment_accelerate")
    expected = weights_of(tmp_path, "run", 3)
    for name, weight in weights_of(run_of_three_steps(1), "run", 3).items():
        assert torch.equal(weight, expected[name]), name


def test_layer_by_layer_samples_what_whole_weights_do(tmp_path, run_of_three_steps):
    flags = (*SIZE, "--max-steps", "3", "--sampling-weights", "layers")
    finish(launch(tmp_path, 2, *flags, sharded=True))
    folder = run_of_three_steps(2, True)
    for layers, whole in zip(lines_of(tmp_path, "run"), lines_of(folder, "run"), strict=True):
        assert layers.get("reward") == whole.get("reward")
    expected = weights_of(folder, "run", 3)
    for name, weight in weights_of(tmp_path, "run", 3).items():
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


@pytest.mark.parametrize(
    "rank, where",
    [
        (0, "saving"),
        *[
            pytest.param(rank, where, marks=pytest.mark.long)
            for rank in (0, 1)
            for where in ("sampling", "training", "saving")
            if (rank, where) != (0, "saving")
        ],
    ],
)
def test_a_killed_rank_ends_the_others(tmp_path, rank, where, monkeypatch):
    """With a line, within 30 seconds; the last checkpoint is whole and can be resumed."""
    monkeypatch.setenv("KILL_IN", where)
    monkeypatch.setenv("KILL_RANK", str(rank))
    monkeypatch.setenv("KILL_AT_STEP", "2")
    process = launch(tmp_path, 2, "--run-name", "run", "--max-steps", "4", script=KILLED)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process has ended" in output
    weights_of(tmp_path, "run", 1)
    if where == "saving":
        finish(launch(tmp_path, 2, "--run-name", "run", "--max-steps", "3", "--resume"))
        weights_of(tmp_path, "run", 3)
