"""How fast the page of tools/view.py opens, and what completions.jsonl costs.

    python benchmarks/view_speed.py             # trains what is missing first: half an hour
    python benchmarks/view_speed.py --no-cost   # the pages alone

    opening     the pages of a default run of each experiment (of experiment_ifeval nine steps, of
                which as many are logged as of the default's), and of a run that logged 200 steps,
                in headless Chromium: from the call to the tokens on the screen, the median of five.
                Sizes too
    cost        the default run of experiment_base with completions.jsonl and without, in pairs that
                take turns to be first: seconds of training, evaluations left out. Beside it, the
                share of these seconds that the log itself says it takes

Writes results/view_speed.json and results/view.png. Needs Chromium (on Debian: apt install
chromium) and experiment_ifeval's model (python data/get_smollm2.py); without that its page is left
out.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from base_curve import ROOT, run_once
from playwright.sync_api import sync_playwright
from vs_trl import describe_machine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# As many logged steps as the default's 32 have, in a fifth of its 25 minutes.
SHORT = "--max-steps 9 --log-completions-interval 3 --eval-interval 0 --max-eval-prompts 16"
FLAGS = {"experiment_ifeval": SHORT.split()}
LONG = ["--log-completions-interval", "1", "--max-steps", "200", "--epochs", "4"]
# Trains by main, and says how long its steps took without evaluations, and the log's part of them.
TIMED_RUN = """
import json, sys, time
sys.path.insert(0, "experiment_base")
import train, tyro
spent = {"evaluate": 0.0, "log": 0.0}
def timed(function, name):
    def call(*arguments):
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            spent[name] += time.perf_counter() - start
    return call
train.evaluate = timed(train.evaluate, "evaluate")
log = train.CompletionLog
log.choose = timed(log.choose, "log")
log.write = timed(log.write, "log")
prompts_of_step = train.prompts_of_step
def begin(*arguments):
    spent.setdefault("began", time.perf_counter())
    spent.setdefault("before", spent["evaluate"])
    return prompts_of_step(*arguments)
train.prompts_of_step = begin
save = train.Run.save
def stop(*arguments):
    spent["ended"] = time.perf_counter()
    save(*arguments)
train.Run.save = stop
train.main(tyro.cli(train.Config))
seconds = spent["ended"] - spent["began"] - spent["evaluate"] + spent["before"]
print("timed", json.dumps({"seconds": seconds, "log": spent["log"]}))
"""


@dataclass
class Config:
    pairs: int = 7
    opened: int = 5  # times that each page is opened
    cost: bool = True
    log_dir: Path = ROOT / "runs" / "view_speed"
    checkpoint_path: Path = ROOT / "output" / "view_speed"
    output: Path = ROOT / "results" / "view_speed.json"


def seconds_of_a_run(*flags: str) -> dict[str, float]:
    """Of the default run of experiment_base: {"seconds", "log"}."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TIMED_RUN, "--log-dir", f"{folder}/runs", *flags]
        command += ["--checkpoint-path", f"{folder}/output", "--checkpoint-interval", "0"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: a run has ended early: {done.stderr[-1000:]}")
    return json.loads(done.stdout.split("timed ")[-1])


def cost_of_logging(pairs: int) -> dict:
    ratios = []
    shares = []
    for i in range(pairs):
        turns = ["10", "0"] if i % 2 else ["0", "10"]
        times = {}
        for interval in turns:
            times[interval] = seconds_of_a_run("--log-completions-interval", interval)
        ratios.append(times["10"]["seconds"] / times["0"]["seconds"])
        shares.append(times["10"]["log"] / times["10"]["seconds"])
        print(f"pair {i + 1}: {ratios[-1]:.3f}, the log's share {shares[-1]:.4f}", flush=True)
    return {
        "pairs": [round(ratio, 4) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 4),
        "median_share": round(statistics.median(shares), 4),
    }


def opening(run: Path, browser, times: int) -> dict:
    """Seconds until a page is drawn and its size."""
    command = [sys.executable, str(ROOT / "tools" / "view.py"), str(run)]
    subprocess.run(command, check=True)
    path = run / "view.html"
    seconds = []
    for _ in range(times):
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        start = time.perf_counter()
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("#groups .token")
        seconds.append(time.perf_counter() - start)
        page.close()
    size = path.stat().st_size / 1e6
    return {"seconds": round(statistics.median(seconds), 3), "megabytes": round(size, 2)}


def take_picture(run: Path, browser, path: Path) -> None:
    """The completions of step 1, with what is said of one token."""
    page = browser.new_page(viewport={"width": 1250, "height": 700})
    page.goto((run / "view.html").resolve().as_uri())
    page.wait_for_selector("#groups .token")
    page.eval_on_selector("#step-title", "title => title.scrollIntoView()")
    page.mouse.wheel(0, 100)
    page.hover("#groups .card .card:nth-child(1) .token:nth-child(1)")
    page.wait_for_timeout(300)
    page.screenshot(path=path)
    page.close()


def trained_runs(config: Config) -> dict[str, Path]:
    """Name -> directory. Default runs, and one of 200 logged steps."""
    runs = {}
    for path in sorted(ROOT.glob("experiment_*/run.py")):
        experiment = path.parent
        if experiment.name == "experiment_ifeval" and not (ROOT / "data" / "smollm2").is_dir():
            print("experiment_ifeval is left out: python data/get_smollm2.py fetches its model")
            continue
        run_once(experiment.name, FLAGS.get(experiment.name, []), config, experiment)
        runs[experiment.name] = config.log_dir / experiment.name
    run_once("200_logged_steps", LONG, config, ROOT / "experiment_base")
    runs["200 logged steps"] = config.log_dir / "200_logged_steps"
    return runs


def main(config: Config) -> None:
    if not CHROMIUM:
        sys.exit("error: no Chromium; on Debian: apt install chromium")
    runs = trained_runs(config)
    report = {"machine": describe_machine(), "opening": {}}
    if config.output.is_file():
        report |= {"cost": json.loads(config.output.read_text()).get("cost")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, run in runs.items():
            report["opening"][name] = opening(run, browser, config.opened)
            print(name, report["opening"][name], flush=True)
        take_picture(runs["experiment_base"], browser, config.output.with_name("view.png"))
        browser.close()
    if config.cost:
        report["cost"] = cost_of_logging(config.pairs)
    config.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
