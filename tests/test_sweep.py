"""tools/sweep.py: names, refusals, what is skipped, resumed, reported; the table, the picture.

Most runs are of a scripted stand-in for train.py, which keeps a run's directories as run.py does.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, load_benchmark, without_modules

spec = importlib.util.spec_from_file_location("sweep", ROOT / "tools" / "sweep.py")
sweep = importlib.util.module_from_spec(spec)
sys.modules["sweep"] = sweep
spec.loader.exec_module(sweep)
runner = sys.modules["runner"]

# The figure of a step is known: lr x step + kl_weight + seed / 1000.
SCRIPTED = """
import fcntl, json, os, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
import tyro

@dataclass
class Config:
    run_name: str | None = None
    log_dir: str = "runs"
    checkpoint_path: str = "./output"
    resume: bool = False
    wandb: bool = False
    max_steps: int | None = 3
    seed: int = 42
    lr: float = 0.5
    kl_weight: float = 0.0
    model_name: str = "data/policy"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    eval_data_path: str | None = None
    seconds: float = 0.0  # of a step
    fails: bool = False
    before: float = 0.0  # seconds until the run can be resumed

def check_config(config):
    if config.lr * config.kl_weight > 1:
        sys.exit("error: --kl-weight: must be below 1 / --lr")

def main(config):
    stopped = []
    def stop(*_):
        print("SIGTERM: finishing this step, then saving; a second signal stops", flush=True)
        stopped.append(1)
    run = Path(config.checkpoint_path) / Path(__file__).resolve().parent.name / config.run_name
    log = Path(config.log_dir) / config.run_name / "metrics.jsonl"
    assert config.resume == (run / "run.json").exists(), "resumed wrongly"
    for folder in (run, log.parent):
        if folder.exists() and not config.resume:
            sys.exit(f"error: run {config.run_name} exists")
    if config.fails and not (Path(config.log_dir) / "mended").exists():
        print("a progress bar \\r 50 %", file=sys.stderr)
        sys.exit("error: this run fails")
    run.mkdir(parents=True, exist_ok=True)
    lock = open(run / "lock", "w")
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    time.sleep(config.before)
    (run / "run.json").write_text("{}")
    log.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    done = log.read_text().splitlines(keepends=True) if log.exists() else []
    done = [line for line in done if line.endswith("\\n")]
    log.write_text("".join(done))
    for step in range(len(done), config.max_steps + 1):
        time.sleep(config.seconds)
        figure = config.lr * step + config.kl_weight + config.seed / 1000
        line = {"step": step, "eval_accuracy": figure, "elapsed_seconds": time.time() % 100}
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\\n")
        if stopped:
            return

if __name__ == "__main__":
    main(tyro.cli(Config))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty directory, to work in, with the scripted experiment."""
    experiment = tmp_path / "experiment_scripted"
    experiment.mkdir()
    (experiment / "train.py").write_text(SCRIPTED)
    (experiment / "run.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tools" / "sweep.py"),
        str(folder / "experiment_scripted"),
    ] + [*flags]


def start(folder: Path, *flags: str) -> subprocess.Popen:
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(folder, *flags), cwd=folder, **how)


def finish(folder: Path, *flags: str, code: int = 0) -> str:
    """What a sweep prints."""
    process = start(folder, *flags)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    return said


def table_of(folder: Path, name: str = "experiment_scripted") -> tuple[dict, list[str]]:
    """(the JSON file, the lines of the Markdown one), without times."""
    stem = folder / "runs" / name / "table"
    results = json.loads(stem.with_suffix(".json").read_text())
    assert all(seconds >= 0 for seconds in results.pop("seconds").values())
    lines = stem.with_suffix(".md").read_text().splitlines()
    return results, [re.sub(r"[^|]*\|$", "", line) for line in lines]


def wait_for(condition) -> None:
    until = time.time() + 30
    while not condition():
        assert time.time() < until
        time.sleep(0.02)


def plan(folder: Path, *flags: str):
    """What the sweep would run, without a process."""
    with without_modules():
        options = sweep.Options(str(folder / "experiment_scripted"))
        return sweep.plan(options, list(flags))


# ---------------------------------------------------------------- product and names
def test_the_product_and_its_names(folder):
    jobs, values = plan(folder, "--lr", "1e-5", ".5", "--kl-weight=0", "0.01", "--seed", "42", "1")
    assert [job.name for job in jobs] == [
        "lr=1e-05,kl_weight=0,seed=42",
        "lr=1e-05,kl_weight=0,seed=1",
        "lr=1e-05,kl_weight=0.01,seed=42",
        "lr=1e-05,kl_weight=0.01,seed=1",
        "lr=0.5,kl_weight=0,seed=42",
        "lr=0.5,kl_weight=0,seed=1",
        "lr=0.5,kl_weight=0.01,seed=42",
        "lr=0.5,kl_weight=0.01,seed=1",
    ]
    assert values[2] == {"lr": 1e-5, "kl_weight": 0.01, "seed": 42}
    assert "--lr=1e-5" in jobs[0].command and "--seed=42" in jobs[0].command
    assert jobs[0].log_dir == Path("runs/experiment_scripted")
    checkpoints = "output/experiment_scripted/experiment_scripted/lr=1e-05,kl_weight=0,seed=42"
    assert jobs[0].checkpoints == Path(checkpoints)


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--lr", "1"], ["run"]),
        (["--lr", "1", "--seed", "7"], ["seed=7"]),
        (["--wandb", "True", "False"], ["wandb=True", "wandb=False"]),
        (["--max-steps", "None", "3"], ["max_steps=None", "max_steps=3"]),
        (["--lr", "0.1234567891", "1e10"], ["lr=0.1234567891", "lr=1e+10"]),
        (["--model-name", "data/a/", "Qwen/b"], ["model_name=a", "model_name=b"]),
        (["--model-name", "a..b", "c d|e"], ["model_name=a_b", "model_name=c_d_e"]),
        (["--eval_data_path", "None", "x.json"], ["eval_data_path=None", "eval_data_path=x.json"]),
    ],
)
def test_names_tell_what_varies(folder, flags, names):
    assert [job.name for job in plan(folder, *flags)[0]] == names


def test_two_settings_never_share_a_name(folder):
    """Bug: two directories of the same last name, and the second run is taken for the first."""
    long = "x" * 120
    flags = ["--model-name", "one/policy", "two/policy", "three/other", long, f"{long}y"]
    names = [job.name for job in plan(folder, *flags)[0]]
    assert len(set(names)) == 5 and max(map(len, names)) <= 100
    assert re.fullmatch("model_name=policy,[0-9a-f]{8}", names[0])
    assert names[2] == "model_name=other"


def test_booleans_and_values_that_look_like_flags(folder):
    jobs, values = plan(folder, "--fails", "--no-wandb", "--model-name=--x", "-1")
    assert "--fails" in jobs[0].command and "--no-wandb" in jobs[0].command
    assert [of["model_name"] for of in values] == ["--x", "-1"]
    jobs, _ = plan(folder, "--wandb", "False", "True")
    assert "--no-wandb" in jobs[0].command and "--wandb" in jobs[1].command


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "flags, said",
    [
        (["1e-5"], "1e-5: is no flag; flags begin with --"),
        (["--lrr", "1"], "--lrr: the experiment has no such flag"),
        (["--lr", "x"], "--lr 'x': is no such value"),
        (["--seed", "1", "1.5"], "--seed '1.5': is no such value"),
        (["--optimizer", "sgd"], "--optimizer 'sgd': is no such value"),
        (["--wandb", "maybe"], "--wandb 'maybe': must be True or False"),
        (["--lr"], "--lr: needs one value or several"),
        (["--wandb", "--no-wandb"], "--wandb: needs one value or several, behind one flag"),
        (["--lr", "1", "--lr", "2"], "--lr: is given twice"),
        (["--lr", "1e-5", "0.00001"], "--lr 0.00001: this value is given twice"),
        (["--run-name", "a"], "--run-name: is set by the sweep"),
        (["--resume"], "--resume: is set by the sweep"),
        (["--max-steps", "0", "1"], "--max-steps 0: trains nothing"),
        (["--lr", "1", "9", "--kl-weight", "0", "1"], "below 1 / --lr (run lr=9,kl_weight=1)"),
    ],
)
def test_flags_are_refused_before_the_first_run(folder, flags, said):
    with pytest.raises(SystemExit) as refusal:
        plan(folder, *flags)
    assert refusal.value.code.startswith("error: ") and said in refusal.value.code
    assert "\n" not in refusal.value.code and not (folder / "runs").exists()


@pytest.mark.parametrize("experiment", ["experiment_none", "experiment_minimal", "tests"])
def test_what_is_no_experiment(experiment):
    with pytest.raises(SystemExit, match="is no experiment with flags; there are experiment_acc"):
        sweep.load_train(experiment)


def test_the_experiments_own_check_of_ranges_and_combinations():
    with without_modules():
        options = sweep.Options("experiment_base")
        for flags, said in (
            (["--group-size", "4", "7"], "--train-batch-size 64: must be a multiple of"),
            (["--kl-weight", "0", "-1"], "--kl-weight -1.0: must be a number from 0"),
        ):
            with pytest.raises(SystemExit, match=said):
                sweep.plan(options, flags)
        names = [job.name for job in sweep.plan(options, ["--load-in-4bit", "--lora-rank=4"])[0]]
    assert names == ["run"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"jobs": 0}, "--jobs 0: must be at least 1"),
        ({"threads": 0}, "--threads 0: must be at least 1"),
        ({"output": Path("file/c")}, "--output file/c: cannot be written"),
        ({"output": Path("notes")}, "notes.md exists, and is not of a sweep"),
        ({"ray": "nonsense"}, "--ray nonsense: must be auto, or host:port"),
        ({"ray": "127.0.0.1:1"}, "--ray 127.0.0.1:1: cannot be reached"),
    ],
)
def test_options_are_refused(folder, changes, said):
    (folder / "file").touch()
    (folder / "notes.md").write_text("my notes")
    options = sweep.Options(str(folder / "experiment_scripted"), **changes)
    with without_modules(), pytest.raises(SystemExit) as refusal:
        sweep.main(options, ["--seed", "1"])
    assert said in refusal.value.code and not list(folder.rglob("*.jsonl"))


def test_without_ray_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="Ray is missing: pip install -r requirements-async.txt"):
        runner.join_ray(sweep.Options("experiment_base", ray="auto"))


# ---------------------------------------------------------------- runs
FLAGS = ("--lr", "1", "2", "--seed", "10", "20")


def test_finished_is_skipped_cut_is_resumed_failed_is_reported(folder):
    """In a directory that another sweep with another value of a fixed flag may not have."""
    flags = ("--max-steps", "2", "--fails", "True", "False", "--seed", "10", "20", "--jobs", "4")
    said = finish(folder, *flags, code=1)
    assert "fails=True,seed=10: failed: error: this run fails (see runs/exp" in said
    assert "2 of 4 runs failed; once that is mended, the same command tries them again" in said
    results, lines = table_of(folder)
    assert lines[6:] == [
        "| fails | seeds | final | best |",
        "|---|---|---|---|",
        "| False | 2 | 1.0150 [1.0100, 1.0200] | 1.0150 [1.0100, 1.0200] |",
        "| True | 0 (2 failed) | - | - |",
        "",
        "Failed: fails=True,seed=10; fails=True,seed=20.",
    ]
    assert [run["outcome"] for run in results["settings"][1]["runs"]] == ["failed"] * 2

    log_dir = folder / "runs" / "experiment_scripted"
    (log_dir / "mended").touch()
    metrics = log_dir / "fails=False,seed=10" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:2]) + '{"step": 2, "ev')
    (log_dir / "fails=False,seed=10.done").unlink()
    said = finish(folder, *flags)
    assert "1 of 4 runs are finished" in said and "fails=False,seed=20: " not in said
    assert "fails=False,seed=10: resumes" in said and "fails=True,seed=10: starts" in said
    assert len(metrics.read_text().splitlines()) == 3
    assert table_of(folder)[1][8].startswith("| False | 2 | 1.0150 [1.0100, 1.0200]")
    assert "4 of 4 runs are finished" in finish(folder, *flags)

    other = ("--max-steps", "3", *flags[2:])
    said = finish(folder, *other, code=1)
    assert "run runs/experiment_scripted/fails=True,seed=10 was made with max_steps 2" in said
    finish(folder, *flags, "--wandb")  # which decides no figure


def test_other_settings_are_noticed_whatever_was_deleted(folder):
    """Bug: with the list of the sweep's runs gone, old figures are shown as those of other flags,
    or old checkpoints are trained on with them."""
    finish(folder, "--seed", "10")
    log_dir = folder / "runs" / "experiment_scripted"
    (log_dir / "sweep.json").unlink()
    said = finish(folder, "--seed", "10", "--lr", "0.25", code=1)
    assert "was made with lr 0.5, not 0.25; choose another --sweep-name, or delete" in said
    run = folder / "output" / "experiment_scripted" / "experiment_scripted" / "seed=10"
    (run / "run.json").write_text('{"config": {"lr": "0.5", "seed": "10"}}')
    for path in (log_dir / "seed=10.done", log_dir / "seed=10" / "metrics.jsonl"):
        path.unlink()
    assert "was made with lr 0.5" in finish(folder, "--seed", "10", "--lr", "0.25", code=1)
    said = finish(folder, "--seed", "10")
    assert "seed=10: resumes" in said


@pytest.mark.parametrize(
    "damaged, said",
    [
        ("sweep.json", "sweep.json: cannot be read"),
        pytest.param("seed=10.done", "seed=10.done: cannot be read", marks=pytest.mark.long),
        pytest.param(
            "seed=10/metrics.jsonl", "seed=10 has no figures; delete", marks=pytest.mark.long
        ),
        ("seed=10/", "seed=10 has no figures; delete"),
        pytest.param("table.md", "table.md exists, and is not of a sweep", marks=pytest.mark.long),
    ],
)
def test_damaged_files_are_named(folder, damaged, said):
    finish(folder, "--seed", "10")
    path = folder / "runs" / "experiment_scripted" / damaged
    if damaged.endswith("/"):
        (path / "metrics.jsonl").unlink()
    else:
        path.write_bytes(b"\xff[")
    if damaged == "sweep.json":
        (path.parent / "seed=10.done").write_text("")
    output = finish(folder, "--seed", "10", code=1)
    assert said in output and "Traceback" not in output


def test_a_run_that_is_killed_says_so(folder):
    """And not what an earlier attempt has said."""
    finish(folder, "--fails", code=1)
    (folder / "runs" / "experiment_scripted" / "mended").touch()
    process = start(folder, "--fails", "--seconds", "5")
    wait_for(lambda: steps_of(folder / "runs"))
    for child in children_of(process):
        if child.is_running():
            child.kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "failed: error: it was killed by signal 9" in said


def test_a_value_behind_a_flag_of_the_sweep_joins_no_other_flag(folder):
    """Bug: `--lr 1 2 --jobs 2 3` trains with a learning rate of 3, too."""
    said = finish(folder, "--lr", "1", "2", "--jobs", "2", "3", code=1)
    assert "error: 3: stands behind --jobs, which takes one value" in said
    assert "--jobs: is given twice" in finish(folder, "--jobs", "2", "--jobs=3", code=1)


def test_a_run_killed_in_its_first_second_is_begun_anew(folder):
    """What it left goes; what a user has put there does not, and is named."""
    run = folder / "output" / "experiment_scripted" / "experiment_scripted" / "seed=10"
    run.mkdir(parents=True)
    (run / "lock").touch()
    (folder / "runs" / "experiment_scripted" / "seed=10").mkdir(parents=True)
    run.with_name("seed=20").mkdir()
    (run.with_name("seed=20") / "notes").touch()
    said = finish(folder, "--seed", "20", code=1)
    assert "seed=20: holds no run that can be resumed; delete it to begin anew" in said
    assert (run.with_name("seed=20") / "notes").exists()
    assert "seed=10: eval_accuracy 1.5100 in" in finish(folder, "--seed", "10")


def children_of(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def steps_of(folder: Path) -> list[int]:
    """How many steps each run has logged."""
    return [len(path.read_text().splitlines()) for path in folder.rglob("metrics.jsonl")]


def test_a_killed_sweep_leaves_no_process_and_is_gone_on_with(folder):
    """Its table is that of an undisturbed one."""
    finish(folder, *FLAGS, "--seconds", "0.3", "--jobs", "4", "--sweep-name", "whole")
    flags = (*FLAGS, "--seconds", "0.3", "--jobs", "2")
    process = start(folder, *flags)
    logs = folder / "runs" / "experiment_scripted"
    wait_for(lambda: steps_of(logs) and min(steps_of(logs)) >= 1 and len(steps_of(logs)) == 2)
    children = children_of(process)
    process.kill()
    process.communicate()
    assert len(children) == 2
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert "failed" not in finish(folder, *flags)
    assert table_of(folder) == table_of(folder, "whole")


def test_a_run_that_another_process_still_trains_is_waited_for(folder):
    """Bug: the start after a kill fails, as what was killed still holds the run's lock."""
    flags = ("--seed", "10", "--seconds", "0.1")
    run = folder / "output" / "experiment_scripted" / "experiment_scripted" / "seed=10"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    hold = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)"
    )
    hold += "; print('held', flush=True); time.sleep(4)"
    holder = [sys.executable, "-c", hold, str(run / "lock")]
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        said = finish(folder, *flags)
        assert process.poll() == 0
    assert "seed=10: waits for a process of an earlier sweep that still trains it" in said
    assert "seed=10: eval_accuracy 1.5100 in" in said


def test_ctrl_c_stops_the_runs_after_their_step(folder):
    """Bug: a run that was told to stop ends with 0, and was taken for a finished one."""
    flags = (*FLAGS, "--seconds", "0.3", "--jobs", "2")
    process = start(folder, *flags)
    wait_for(lambda: steps_of(folder) and min(steps_of(folder)) >= 1)
    children = children_of(process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and psutil.wait_procs(children, timeout=10)[1] == []
    assert said.endswith("stopped; the same command goes on with what is left\n")
    assert "Traceback" not in said and not list(folder.rglob("*.done"))
    before = steps_of(folder)
    assert "lr=1,seed=10: resumes" in finish(folder, *flags)
    assert len(before) == 2 and max(before) < 4 and steps_of(folder) == [4] * 4


def test_a_run_that_is_stopped_by_another_hand_is_not_finished(folder):
    process = start(folder, "--seed", "1", "--seconds", "0.3")
    wait_for(lambda: steps_of(folder) == [1])
    (child,) = children_of(process)
    child.terminate()
    said, _ = process.communicate(timeout=30)
    assert "seed=1: stopped" in said and "the same command goes on" in said
    assert not list(folder.rglob("*.done"))


def test_a_second_signal_kills(folder):
    process = start(folder, "--seed", "1", "--seconds", "20")
    wait_for(lambda: list(folder.rglob("metrics.jsonl")))
    (child,) = children_of(process)
    process.terminate()
    assert any("a second signal kills" in line for line in process.stdout)
    process.terminate()
    process.communicate(timeout=30)
    assert psutil.wait_procs([child], timeout=10)[1] == []


def test_two_sweeps_do_not_work_in_one_directory(folder):
    process = start(folder, "--seed", "1", "--seconds", "0.5")
    wait_for(lambda: list(folder.rglob("metrics.jsonl")))
    assert "another sweep works in runs/experiment_scripted" in finish(folder, *FLAGS, code=1)
    assert process.communicate(timeout=30) and process.returncode == 0


def test_what_run_py_prints_when_it_is_told_to_stop():
    for path in ROOT.glob("experiment_*/run.py"):
        assert runner.STOPPED in path.read_text()


@pytest.mark.long  # benchmarks/sweep_kills.py does it too
def test_the_base_is_swept(tmp_path):
    flags = ["--seed", "1", "--max-steps", "1", "--max-eval-prompts", "8"]
    flags += ["--rollouts-per-step", "4", "--train-batch-size", "16", "--threads", "1"]
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), "experiment_base", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results, _ = table_of(tmp_path, "experiment_base")
    assert results["figure"] == "eval_accuracy"
    assert [row["curve"]["steps"] for row in results["settings"]] == [[0, 1]]


# ---------------------------------------------------------------- Ray
@pytest.mark.long
def test_on_a_ray_cluster_of_two_workers(folder):
    """The table is the local one. A run per worker; a machine that dies is no failed run."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    slow = (*FLAGS, "--seconds", "0.5")
    finish(folder, *slow, "--jobs", "4", "--sweep-name", "local")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            node = cluster.add_node(num_cpus=1)
        flags = (*slow, "--ray", cluster.address)
        process = start(folder, *flags)
        logs = folder / "runs" / "experiment_scripted"
        wait_for(lambda: len(steps_of(logs)) == 2)
        cluster.remove_node(node)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert table_of(folder) == table_of(folder, "local")
        said = finish(folder, *flags, "--ray-cpus", "64", "--sweep-name", "none", code=1)
        assert "--ray: no machine has 64 CPU and 0 GPU for a run" in said
        cases_of_a_stopped_driver(folder, (*flags, "--sweep-name", "stopped"))
    finally:
        cluster.shutdown()


def cases_of_a_stopped_driver(folder: Path, flags: tuple) -> None:
    """It is told to stop, then it dies; both times no run goes on, and in the end all is there."""
    logs = folder / "runs" / "stopped"
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(folder, *flags)
        wait_for_a_step(logs)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
        if number == signal.SIGTERM:
            assert said.endswith("the same command goes on with what is left\n")
        wait_for(lambda: not [p for p in psutil.process_iter() if trains(p, "stopped")])
    finish(folder, *flags)
    assert table_of(folder, "stopped") == table_of(folder, "local")


def wait_for_a_step(logs: Path) -> None:
    before = sum(steps_of(logs))
    wait_for(lambda: sum(steps_of(logs)) > before)


def trains(process: psutil.Process, name: str) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return any(part.endswith("train.py") for part in line) and f"runs/{name}" in line


# ---------------------------------------------------------------- the table and the picture
def write_runs(folder: Path, figures: dict[str, list[float]]) -> list:
    """A finished job for each name, with these held-out figures at steps 0, 10, 20, ..."""
    jobs = []
    for name, values in figures.items():
        (folder / name).mkdir()
        lines = []
        for i, value in enumerate(values):
            lines.append({"step": 10 * i, "eval_accuracy": value, "elapsed_seconds": 7.0 * i})
            lines.append({"step": 10 * i + 5, "reward": 1.0, "elapsed_seconds": 7.0 * i + 1})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / "metrics.jsonl").write_text(text)
        jobs.append(runner.Job(name, [], folder, folder / "none", {}))
    return jobs


def results_of(folder: Path, runs: list[tuple[dict, list[float]]], **more) -> dict:
    jobs = write_runs(folder, {f"run_{i}": figures for i, (_, figures) in enumerate(runs)})
    outcomes = {job.name: "done" for job in jobs} | more.get("outcomes", {})
    values = [of for of, _ in runs]
    return sweep.summarise("experiment_x", values, jobs, outcomes, more.get("figure"))


def test_the_table_by_hand(tmp_path):
    """Means over seeds, ranges, the best evaluation of each seed, and the order: by the final mean,
    then by the best, then by the values as numbers."""
    runs = [
        ({"lr": 10.0, "seed": 1, "steps": 3}, [0.0, 0.5, 0.5]),
        ({"lr": 10.0, "seed": 2, "steps": 3}, [0.0, 0.75, 0.5]),
        ({"lr": 9.0, "seed": 1, "steps": 3}, [0.0, 0.5, 0.5]),
        ({"lr": 9.0, "seed": 2, "steps": 3}, [0.0, 0.5, 0.5]),
        ({"lr": 1.0, "seed": 1, "steps": 3}, [0.0, 0.25, 1.0]),
        ({"lr": 1.0, "seed": 2, "steps": 3}, [0.0, 0.25, 0.5]),
        ({"lr": 20.0, "seed": 1, "steps": 3}, [0.0, 0.5, 0.5]),
        ({"lr": 20.0, "seed": 2, "steps": 3}, [0.0]),
        ({"lr": 30.0, "seed": 1, "steps": 3}, [0.0]),
    ]
    results = results_of(tmp_path, runs, outcomes={"run_7": "failed", "run_8": "failed"})
    assert sweep.to_markdown(results) == (
        "# Sweep of experiment_x: eval_accuracy\n"
        "\n"
        "Seeds: 1, 2.\n"
        "\n"
        "All with --steps 3.\n"
        "\n"
        "| lr | seeds | final | best | seconds |\n"
        "|---|---|---|---|---|\n"
        "| 1 | 2 | 0.7500 [0.5000, 1.0000] | 0.7500 [0.5000, 1.0000] | 15 |\n"
        "| 10 | 2 | 0.5000 [0.5000, 0.5000] | 0.6250 [0.5000, 0.7500] | 15 |\n"
        "| 9 | 2 | 0.5000 [0.5000, 0.5000] | 0.5000 [0.5000, 0.5000] | 15 |\n"
        "| 20 | 1 (1 failed) | 0.5000 [0.5000, 0.5000] | 0.5000 [0.5000, 0.5000] | 15 |\n"
        "| 30 | 0 (1 failed) | - | - | - |\n"
        "\n"
        "Failed: run_7; run_8.\n"
    )
    first = results["settings"][0]
    assert first["curve"] == {
        "steps": [0, 10, 20],
        "mean": [0.0, 0.25, 0.75],
        "least": [0.0, 0.25, 0.5],
        "most": [0.0, 0.25, 1.0],
    }
    assert first["runs"][0]["values"] == [0.0, 0.25, 1.0] and first["runs"][0]["seed"] == 1
    assert results["seconds"]["run_0"] == 15.0 and "run_7" not in results["seconds"]


def test_another_figure_and_one_that_no_run_has(tmp_path):
    results = results_of(tmp_path, [({"seed": 1}, [0.5, 0.75])], figure="reward")
    assert results["settings"][0]["curve"]["steps"] == [5, 15]
    assert sweep.to_markdown(results).count("1.0000 [1.0000, 1.0000]") == 2
    jobs = [runner.Job("run_0", [], tmp_path, tmp_path, {})]
    with pytest.raises(
        SystemExit, match="--figure kl: in none of the runs, which are kept; they have"
    ):
        sweep.summarise("experiment_x", [{"seed": 1}], jobs, {"run_0": "done"}, "kl")


def test_a_run_that_ends_without_a_figure_is_last(tmp_path):
    """Bug: a NaN is logged as null, is left out of the mean, and the seeds that are left win."""
    runs = [({"lr": 9, "seed": 1}, [0.5, 1.0]), ({"lr": 9, "seed": 2}, [0.5, None])]
    runs += [({"lr": 10, "seed": 1}, [0.5, 0.25]), ({"lr": 10, "seed": 2}, [0.5, 0.25])]
    lines = sweep.to_markdown(results_of(tmp_path, runs)).splitlines()
    assert lines[6].startswith("| 10 | 2 | 0.2500 [0.2500, 0.2500] | 0.5000")
    assert lines[7] == "| 9 | 2 | - | 0.7500 [0.5000, 1.0000] | 8 |"


def test_values_are_escaped_in_markdown(tmp_path):
    runs = [({"system_prompt": "a|b\nc", "lr": 1e-5}, [0.5]), ({"system_prompt": "d"}, [0.25])]
    runs[1][0]["lr"] = 1e-5
    text = sweep.to_markdown(results_of(tmp_path, runs))
    assert r"| a\|b c | 1 |" in text and "All with --lr 1e-05." in text


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_heat_map_only_where_two_flags_vary(tmp_path, count, monkeypatch):
    from matplotlib.figure import Figure

    values = [{"seed": 1}]
    for name in ("lr", "kl_weight", "operators")[:count]:
        values = [{**of, name: value} for of in values for value in ("+$", "-$", None)]
    results = results_of(tmp_path, [(of, [0.0, i / 30]) for i, of in enumerate(values)])
    maps = []
    save = Figure.savefig

    def keep(figure, *arguments, **more):
        maps.append([image.get_array().tolist() for axes in figure.axes for image in axes.images])
        save(figure, *arguments, **more)

    monkeypatch.setattr(Figure, "savefig", keep)
    sweep.draw(results, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000
    if count == 2:  # texts by the alphabet, None too
        ((grid,),) = maps
        assert grid == [
            [pytest.approx(i / 30) for i in row] for row in ((0, 1, 2), (3, 4, 5), (6, 7, 8))
        ]
    else:
        assert maps == [[]]


def test_a_picture_where_all_runs_failed(tmp_path):
    runs = [({"lr": lr, "kl_weight": kl}, [0.0]) for lr in (1, 2) for kl in (3, 4)]
    outcomes = {f"run_{i}": "failed" for i in range(4)}
    results = results_of(tmp_path, runs, outcomes=outcomes)
    sweep.draw(results, tmp_path / "table.png")
    assert "| 1 | 3 | 0 (1 failed) | - | - | - |" in sweep.to_markdown(results)


# ---------------------------------------------------------------- benchmarks
def test_benchmarks_finish_their_runs_by_the_sweep(folder):
    """A marker of an earlier version is empty, and its run is not repeated."""
    base_curve = load_benchmark("base_curve")
    experiment = folder / "experiment_scripted"
    config = base_curve.Config(log_dir=folder / "runs", checkpoint_path=folder / "output")
    lines = base_curve.run_once("a", ["--seed", "5"], config, experiment, threads=1)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["eval_accuracy"] == 1.505 and (folder / "runs" / "a.done").exists()
    assert base_curve.run_once("a", ["--seed", "5"], config, experiment) == lines
    with pytest.raises(SystemExit, match="was made with flags --seed 5, not --seed 6"):
        base_curve.run_once("a", ["--seed", "6"], config, experiment)
    with pytest.raises(SystemExit, match="error: ended early: b, see above"):
        base_curve.run_once("b", ["--fails"], config, experiment)

    (folder / "old" / "c").mkdir(parents=True)
    (folder / "old" / "c" / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": 1}\n')
    (folder / "old" / "c.done").touch()
    config.log_dir = folder / "old"
    assert base_curve.run_once("c", ["--seed", "5"], config, experiment)[0]["step"] == 0


def test_variants_run_by_their_own_command(tmp_path):
    """It measures more than train.py. A run with fewer --steps goes on."""
    variants = load_benchmark("variants")
    config = variants.Config(log_dir=tmp_path / "runs", checkpoint_path=tmp_path / "out", steps=20)
    job = variants.job_of("experiment_dapo", 1, config)
    assert job.command[1:5] == [variants.__file__, "--only", "experiment_dapo", "1"]
    assert job.checkpoints == tmp_path / "out" / "experiment_dapo" / "experiment_dapo_seed_1"
    config.steps = 40
    assert variants.job_of("experiment_dapo", 1, config).settings == job.settings


def test_overoptimisation_runs_each_combination_once():
    overoptimisation = load_benchmark("overoptimisation")
    job = overoptimisation.job(8000, 0.0, 42, overoptimisation.Config())
    assert job.name == "8000_kl0_42" and job.settings["experiment"] == "experiment_reward_model"
    flags = job.settings["flags"]
    assert "--kl-weight 1e-09" in flags and "data/reward_math" in flags
    assert os.path.basename(job.command[1]) == "train.py"
