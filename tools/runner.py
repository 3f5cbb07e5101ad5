"""Finish many runs: begin what is not there, resume what was cut, skip what is finished.

For tools/sweep.py and the benchmarks. A run is a process, of this machine or, as a task, of a Ray
cluster. It can be killed at any moment, and so can what started it. Its marker <name>.done is
written once it has ended by itself.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from plot import read_metrics

try:
    import fcntl  # locks of files
except ImportError:  # Windows
    fcntl = None

ATTEMPT = "=== tools/runner.py:"  # before what a process prints, in the log of its run
STOPPED = "finishing this step, then saving"  # as run.py prints; such a run ends with 0 too
LEFT_BY_A_KILL = {"lock", "run.json.tmp"}  # in a directory of checkpoints, in its first moment
SECONDS_BETWEEN_LOOKS = 0.2
# Runs a command that gets SIGTERM when its parent dies, even by SIGKILL. Linux alone can do that.
TIED = """
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
if os.getppid() == parent:  # else it has died already
    os.execv(command[0], command)
"""


@dataclass
class Job:
    """A run that is to be finished. `finish_runs` makes it."""

    name: str
    command: list[str]  # starts it; with --resume it goes on
    log_dir: Path  # holds <name>/metrics.jsonl, <name>.log and, once it is finished, <name>.done
    checkpoints: Path  # the run's own directory
    settings: dict[str, str]  # what must be the same where the run exists

    @property
    def done(self) -> Path:
        return self.log_dir / f"{self.name}.done"

    @property
    def log(self) -> Path:
        return self.log_dir / f"{self.name}.log"


def fail(message: str):
    sys.exit(f"error: {message}")


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def write_aside(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that it is whole or as it was."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def train_job(
    name: str, experiment: Path, flags: list[str], log_dir, checkpoint_path, settings: dict
) -> Job:
    """A run of an experiment's train.py."""
    command = [sys.executable, str(experiment / "train.py"), "--run-name", name, *flags]
    command += ["--log-dir", str(log_dir), "--checkpoint-path", str(checkpoint_path)]
    checkpoints = Path(checkpoint_path) / experiment.name / name
    return Job(name, command, Path(log_dir), checkpoints, settings)


# ---------------------------------------------------------------- one run
def is_run(folder: Path) -> bool:
    """Whether a run can be resumed from this directory of checkpoints."""
    return (folder / "run.json").is_file() or any(folder.glob("step_*/trainer.pt"))


def is_locked(folder: Path) -> bool:
    """Whether a process trains the run of this directory, such as one that a killed sweep left."""
    path = folder / "lock"
    if fcntl is None or not path.is_file():
        return False
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def clear_beginning(job: Job) -> None:
    """Take away what a run has left that was killed before it could be resumed.

    That is empty directories, and files of its first moment. Whatever else is there stays.
    """
    if is_run(job.checkpoints):
        return
    if job.checkpoints.is_dir():
        names = {path.name for path in job.checkpoints.iterdir()}
        for name in names if names <= LEFT_BY_A_KILL else ():
            (job.checkpoints / name).unlink()
    for folder in (job.checkpoints, job.log_dir / job.name):
        with contextlib.suppress(OSError):  # it is not there, or not empty: the run says so
            folder.rmdir()


def last_line(path: Path) -> str:
    """Of a log; progress bars write \\r."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    lines = [line.strip() for line in re.split("[\r\n]", text) if line.strip()]
    if not lines or lines[-1].startswith(ATTEMPT):
        return "it printed nothing"
    line = lines[-1]
    return line if len(line) <= 500 else f"{line[:200]} ... {line[-300:]}"  # advice stands last


def has_evaluation(path: Path) -> bool:
    """Whether a metrics.jsonl has a figure that was measured on held-out prompts."""
    if not path.is_file():
        return False
    return '"eval_' in path.read_text("utf-8", errors="replace")


def parts_of(job: "Job") -> str:
    """What to delete so that a run begins anew."""
    return f"{job.log_dir / job.name}, {job.done} and {job.checkpoints}"


class Process:
    """A run as a process of this machine. It begins once no other process trains the run."""

    def __init__(self, job: Job, threads: int | None) -> None:
        self.job = job
        self.threads = threads
        self.process = None
        self.is_stopping = False
        say_start(job)

    def begin(self) -> None:
        job = self.job
        clear_beginning(job)
        how = "resumes" if is_run(job.checkpoints) else "starts"
        command = job.command + (["--resume"] if how == "resumes" else [])
        if sys.platform == "linux":
            command = [sys.executable, "-c", TIED, str(os.getpid()), *command]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with open(job.log, "ab") as log:
            log.write(f"{ATTEMPT} {how}\n".encode())
            self.log_start = log.tell()
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            # A session of its own: a terminal's Ctrl-C reaches the sweep alone.
            self.process = subprocess.Popen(
                command, start_new_session=True, env=environment, **streams
            )

    def poll(self) -> str | None:
        """None while it runs, then "done", "failed" or "stopped"."""
        if self.process is None and self.is_stopping:
            return "stopped"
        if self.process is None:
            if not is_locked(self.job.checkpoints):
                self.begin()
            return None
        code = self.process.poll()
        if code is None:
            return None
        log = self.job.log
        said = log.read_bytes()[self.log_start :] if log.is_file() else b""
        if self.is_stopping or STOPPED.encode() in said:
            return "stopped"
        if code < 0:
            return self.failed(f"it was killed by signal {-code}; 9 is often for lack of memory")
        if code:
            return "failed"
        if not has_evaluation(self.job.log_dir / self.job.name / "metrics.jsonl"):
            return self.failed(f"it has logged no evaluation; delete {parts_of(self.job)}")
        write_aside(self.job.done, json.dumps(self.job.settings, indent=1) + "\n")
        return "done"

    def failed(self, why: str) -> str:
        with open(self.job.log, "a") as log:
            log.write(f"\nerror: {why}\n")
        return "failed"

    def stop(self, number: int) -> None:
        """Pass a signal on: SIGTERM, upon which the run saves and ends, or SIGKILL."""
        self.is_stopping = True
        if self.process is None or self.process.poll() is not None:
            return
        if number == signal.SIGKILL:
            os.killpg(self.process.pid, number)  # what it has started, too
        else:
            self.process.send_signal(number)


# ---------------------------------------------------------------- many runs
@contextlib.contextmanager
def held(folder: Path):
    """The lock of a directory of runs: two sweeps do not work in one."""
    with open(folder / "sweep.lock", "w") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another sweep works in {folder}; wait for it, or stop it")
        yield


@contextlib.contextmanager
def noting_signals():
    """A list, to which signals to stop are added instead of what they would do."""
    came = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):  # of a terminal that is closed
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in before:
            signal.signal(number, lambda number, _: came.append(number))
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def known_settings(job: Job) -> dict[str, str]:
    """What a run was made with: by its marker, by its directory's list, or by itself."""
    places = [
        (job.done, lambda found: found),
        (job.log_dir / "sweep.json", lambda found: found.get(job.name)),
        (job.checkpoints / "run.json", lambda found: found.get("config")),
    ]
    for path, settings_in in places:
        if not path.is_file() or not path.stat().st_size:  # a marker of an earlier version is empty
            continue
        try:
            settings = dict(settings_in(json.loads(path.read_text("utf-8"))) or {})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fail(f"{path}: cannot be read ({error}); delete it")
        if settings:
            return settings
    return {}


def check_existing(jobs: list[Job]) -> None:
    """Refuse runs that exist with other settings, and what cannot be gone on with."""
    for job in jobs:
        run = job.log_dir / job.name
        if job.log.is_dir():
            fail(f"{job.log}: is a directory; the run's output belongs there")
        if job.done.exists() or is_run(job.checkpoints):
            for field, value in known_settings(job).items():
                if job.settings.get(field, value) != value:
                    was = f"was made with {field} {value}, not {job.settings[field]}"
                    advice = f"choose another --sweep-name, or delete {parts_of(job)}"
                    fail(f"run {run} {was}; {advice}")
            if not has_evaluation(run / "metrics.jsonl") and job.done.exists():
                fail(f"run {run} has no figures; delete {parts_of(job)} to train it again")
            continue
        for folder in (job.checkpoints, run):
            names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            if not names <= LEFT_BY_A_KILL:
                fail(f"{folder}: holds no run that can be resumed; delete it to begin anew")
    path = jobs[0].log_dir / "sweep.json"  # the settings of each run, by its name
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known |= {job.name: job.settings for job in jobs}
    write_aside(path, json.dumps(known, indent=1) + "\n")


def finish_runs(
    jobs: list[Job], at_once: int = 1, threads: int | None = None, launch=Process
) -> dict[str, str]:
    """Begin what is not there, resume what was cut, skip what is finished.

    jobs: all with the same log_dir. at_once: processes at a time. threads: of each of them; None:
    PyTorch's choice. launch: makes a `Process` of a job and threads, or what behaves like one.
    Returns name -> "done" or "failed". Ends the program where it was told to stop.
    """
    if not jobs:
        return {}
    jobs = list({job.name: job for job in jobs}.values())  # each once
    jobs[0].log_dir.mkdir(parents=True, exist_ok=True)
    with held(jobs[0].log_dir), noting_signals() as signals:
        check_existing(jobs)
        waiting = [job for job in jobs if not job.done.exists()]
        outcomes = {job.name: "done" for job in jobs if job not in waiting}
        if outcomes:
            print(f"{len(outcomes)} of {len(jobs)} runs are finished", flush=True)
        active = {}  # name -> process
        passed_on = 0  # signals
        while active or (waiting and not signals):
            while waiting and len(active) < at_once and not signals:
                job = waiting.pop(0)
                active[job.name] = launch(job, threads)
            if len(signals) > passed_on:
                passed_on = len(signals)
                pass_on(passed_on, list(active.values()))
            for job in jobs:
                outcome = active[job.name].poll() if job.name in active else None
                if outcome is not None:
                    del active[job.name]
                    outcomes[job.name] = outcome
                    say_end(job, outcome)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if "stopped" in outcomes.values() or waiting:
        sys.exit("stopped; the same command goes on with what is left")
    return outcomes


def pass_on(count: int, processes: list) -> None:
    """The first signal stops the runs, the second one kills them."""
    if count == 1:
        message = "the runs finish their step and save; a second signal kills them"
        print(f"\n{message}", flush=True)
    for process in processes:
        process.stop(signal.SIGTERM if count == 1 else signal.SIGKILL)


def say_start(job: Job) -> None:
    how = "resumes" if is_run(job.checkpoints) else "starts"
    if is_locked(job.checkpoints):
        how = "waits for a process of an earlier sweep that still trains it"
    print(f"{job.name}: {how}", flush=True)


def say_end(job: Job, outcome: str) -> None:
    message = "stopped"
    if outcome == "done":
        lines = read_metrics(job.log_dir / job.name)
        figure = default_figure(lines)
        value = lines[-1].get(figure)
        told = f"{value:.4f}" if isinstance(value, float) else value
        message = f"{figure} {told} in {seconds_of(lines):.0f} s"
    if outcome == "failed":
        message = f"failed: {last_line(job.log)} (see {job.log})"
    print(f"{job.name}: {message}", flush=True)


def finish_run(job: Job, threads: int | None = None) -> list[dict]:
    """The lines of metrics.jsonl of a run, which is finished where it is not. For benchmarks."""
    return finish_all([job], threads=threads)[job.name]


def finish_all(jobs: list[Job], at_once: int = 1, threads: int | None = None) -> dict:
    """name -> lines of metrics.jsonl, of runs that are finished where they are not.

    Ends the program where one failed. For benchmarks.
    """
    failed = [name for name, how in finish_runs(jobs, at_once, threads).items() if how == "failed"]
    if failed:
        fail(f"ended early: {', '.join(failed)}, see above")
    return {job.name: read_metrics(job.log_dir / job.name) for job in jobs}


# ---------------------------------------------------------------- Ray
def check_address(address: str) -> None:
    """Whether anybody listens there; Ray itself would end the program without a word of Python."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        fail(f"--ray {address}: must be auto, or host:port as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        fail(f"--ray {address}: cannot be reached ({error})")


def join_ray(options):
    """What starts a job on a cluster: `launch` of `finish_runs`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers
    try:
        import ray
    except ImportError as error:
        fail(f"--ray: Ray is missing: pip install -r requirements-async.txt ({error})")
    check_address(options.ray)
    try:
        ray.init(address=options.ray, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        hint = "where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fail(f"--ray {options.ray}: cannot be reached ({reason}); {hint}")
    needs = {"CPU": options.ray_cpus, "GPU": options.ray_gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(has.get(kind, 0) >= needs[kind] for kind in needs) for has in nodes):
        fail(f"--ray: no machine has {needs['CPU']:g} CPU and {needs['GPU']:g} GPU for a run")
    if not options.ray_gpus and any(has.get("GPU") for has in nodes):
        print("the cluster has GPUs, of which no run asks for one: --ray-gpus 1", flush=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker imports this file
    task = ray.remote(num_cpus=options.ray_cpus, num_gpus=options.ray_gpus)(run_in_task)
    return lambda job, threads: RayProcess(ray, task, job, threads)


def run_in_task(job: Job, threads: int | None, folder: str) -> str:
    """A run, on the machine that Ray has chosen. Returns how it ended.

    folder: what relative paths are meant from.
    """
    os.chdir(folder)
    process = Process(job, threads)
    outcome = None
    while outcome is None:
        if stop_file_of(job).exists() and not process.is_stopping:
            process.stop(signal.SIGTERM)
        outcome = process.poll()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return outcome


def stop_file_of(job: Job) -> Path:
    """Where this file exists, a task stops its run. Ray's own way of stopping does not wait."""
    return job.log_dir / f"{job.name}.stop"


class RayProcess:
    """A run as a task of a Ray cluster. Behaves like `Process`."""

    def __init__(self, ray, task, job: Job, threads: int | None) -> None:
        self.ray = ray
        self.job = job
        self.is_stopping = False
        stop_file_of(job).unlink(missing_ok=True)
        self.reference = task.remote(job, threads, os.getcwd())
        print(f"{job.name}: is handed to Ray", flush=True)

    def poll(self) -> str | None:
        if not self.ray.wait([self.reference], timeout=0)[0]:
            return None
        stop_file_of(self.job).unlink(missing_ok=True)
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            if self.is_stopping:
                return "stopped"
            with open(self.job.log, "a") as log:
                log.write(f"\nRay: {(str(error).strip().splitlines() or [''])[0]}\n")
            return "failed"

    def stop(self, number: int) -> None:
        self.is_stopping = True
        stop_file_of(self.job).touch()
        if number == signal.SIGKILL:
            self.ray.cancel(self.reference, force=True)


# ---------------------------------------------------------------- what a run came to
def default_figure(lines: list[dict]) -> str:
    """The first figure of the first evaluation, which is logged as step 0."""
    return [name for line in lines for name in line if name.startswith("eval_")][0]


def seconds_of(lines: list[dict]) -> float:
    """Of training, over all resumed parts."""
    return lines[-1].get("elapsed_seconds", 0.0)
