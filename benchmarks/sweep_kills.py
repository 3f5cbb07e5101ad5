"""Kill a sweep at random moments, start it again, and compare its table with an undisturbed one.

    python benchmarks/sweep_kills.py           # 5 kills, 8 minutes on two cores

The sweep has eight runs of experiment_base, two at a time: four learning rates, two seeds. It is
killed with SIGKILL, which it cannot notice. After each kill its runs must end by themselves. In the
end its Markdown and JSON must be those of the undisturbed sweep byte for byte, but for times.
Writes results/sweep_kills.json. Exits with 1 where something differs.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro
from vs_trl import describe_machine

ROOT = Path(__file__).resolve().parents[1]
FLAGS = """--lr 1e-5 2e-5 5e-5 1e-4 --seed 42 1 --max-steps 12 --rollouts-per-step 4
--train-batch-size 16 --eval-interval 2 --checkpoint-interval 3 --max-eval-prompts 64 --jobs 2
--threads 1"""


@dataclass
class Config:
    kills: int = 5
    # Decides when the sweep is killed.
    random_seed: int = 0
    results: Path = ROOT / "results" / "sweep_kills.json"


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), "experiment_base", *FLAGS.split()]
    with open(folder / "sweep.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def finish(folder: Path) -> float:
    """Seconds of a sweep that is let alone."""
    began = time.time()
    if start(folder).wait():
        sys.exit(f"error: a sweep failed\n{(folder / 'sweep.log').read_text()[-2000:]}")
    return time.time() - began


def table(folder: Path) -> tuple[str, str]:
    """(the Markdown file without its last column, the JSON file without "seconds")."""
    runs = folder / "runs" / "experiment_base"
    lines = (runs / "table.md").read_text().splitlines()
    markdown = [line.rsplit("|", 2)[0] if line.startswith("|") else line for line in lines]
    results = json.loads((runs / "table.json").read_text())
    del results["seconds"]
    return "\n".join(markdown), json.dumps(results, indent=1)


def state_of(folder: Path) -> dict:
    """What a kill found: finished runs, and the steps that each unfinished one has logged."""
    runs = folder / "runs" / "experiment_base"
    unfinished = {}
    for path in sorted(runs.glob("*/metrics.jsonl")):
        if not path.parent.with_name(f"{path.parent.name}.done").exists():
            unfinished[path.parent.name] = len(path.read_text().splitlines())
    return {"finished": len(list(runs.glob("*.done"))), "lines_of_unfinished": unfinished}


def kill_after(delay: float, folder: Path) -> dict | None:
    """Start the sweep, kill it after so many seconds, and wait for its runs to end.

    None where it has ended before.
    """
    process = start(folder)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    killed = time.time()
    _, left = psutil.wait_procs(children, timeout=60)
    row = {"delay": round(delay, 2), **state_of(folder), "processes": len(children)}
    return row | {"left": len(left), "seconds_until_gone": round(time.time() - killed, 2)}


def main(config: Config) -> None:
    rng = random.Random(config.random_seed)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        killed = Path(temporary) / "killed"
        seconds = finish(whole)
        print(f"the undisturbed sweep took {seconds:.0f} s", flush=True)
        while len(rows) < config.kills:
            row = kill_after(rng.uniform(0, 0.4 * seconds), killed)
            if row is None:
                sys.exit("error: it was finished before the last kill; take another --random-seed")
            rows.append(row)
            print(f"{len(rows)}/{config.kills}: {row}", flush=True)
        finish(killed)
        is_same = table(killed) == table(whole)
        markdown = table(whole)[0]
    left = sum(row["left"] for row in rows)
    report = {"machine": describe_machine(), "flags": " ".join(FLAGS.split()), "kills": rows}
    report |= {"same_table": is_same, "table": markdown.splitlines()}
    config.results.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{markdown}\nsame table, byte for byte but times: {is_same}; processes left: {left}")
    if left or not is_same:
        sys.exit(1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
