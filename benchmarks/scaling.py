"""experiment_accelerate in one process and in two, of one thread each: step time, the bytes that a
process sends, and what is learnt.

    python benchmarks/scaling.py        # 10 minutes; a machine with two cores and no GPU

The embedded policy, two updates a step, KL 0.01. The runs take turns, and of each the median over
its steps after the first two counts. Prints, and writes into results/scaling.json,

    efficiency    the step's seconds in one process, over twice those in two: of the default step
                  (16 prompts x 8 completions), and of one with four times the prompts and batch
    bytes         sent a step by one process, read off the loopback device, in which gloo's packets
                  travel; other programs must be silent. Beside it the theory of n processes:

        DDP      2 (n - 1) / n  x  the gradient      for each update                 (all-reduce)
        FSDP2      (n - 1) / n  x  the weights       for each forward of a micro-batch  (gather)
                   (n - 1) / n  x  the weights       for each backward, which gathers them again
                   (n - 1) / n  x  the gradient      for each backward          (reduce-scatter,
                                                     for which gloo sends twice as much)
                   (n - 1) / n  x  the weights       once, for sampling

                  The completions, which the ranks tell each other, come on top.

    learning      held-out accuracy over the whole run, seeds 42, 1 and 2 in two processes with DDP,
                  and seed 42 with FSDP2
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro
from vs_trl import ROOT, describe_machine

EXPERIMENT = ROOT / "experiment_accelerate"
COUNTING = Path(__file__).with_name("counted_ranks.py")
sys.path.insert(0, str(EXPERIMENT))
import train  # noqa: E402
from model import load_model  # noqa: E402


@dataclass
class Options:
    rounds: int = 3  # runs of each
    steps: int = 8  # of a run, the first two of which do not count
    output: Path = ROOT / "results" / "scaling.json"


def run(how: str, folder: str, *flags, script: Path = EXPERIMENT / "train.py") -> list[dict]:
    """Lines of metrics.jsonl. how: the name of a configuration file, without its ending."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXPERIMENT / f"{how}.yaml"), "--num_cpu_threads_per_process=1"]
    command += [str(script), "--run-name", how, "--log-dir", folder]
    command += ["--checkpoint-path", folder, "--checkpoint-interval", "0", *flags]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
    path = Path(folder) / how / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def few_steps(steps: int) -> tuple:
    return "--max-steps", str(steps), "--eval-interval", "0", "--max-eval-prompts", "16"


def seconds_a_step(lines: list[dict]) -> float:
    """Without the first two steps, in which much happens for the first time."""
    ends = [line["elapsed_seconds"] for line in lines if line["step"]]
    return median(after - before for before, after in zip(ends[1:], ends[2:]))


def loopback_bytes() -> int:
    """Bytes that all programs of this machine have sent to one another."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    sys.exit("error: /proc/net/dev has no loopback device")


def bytes_a_step(how: str) -> tuple[float, float]:
    """Sent by one of two processes, and the micro-batches of each: what four more steps bring, so
    that the start and the last evaluation do not count."""
    sent = []
    micro_batches = []
    for steps in (2, 6):
        with tempfile.TemporaryDirectory() as folder:
            before = loopback_bytes()
            run(how, folder, *few_steps(steps), script=COUNTING)
            sent.append(loopback_bytes() - before)
            micro_batches.append(int((Path(folder) / "micro_batches").read_text()))
    return (sent[1] - sent[0]) / 4 / 2, (micro_batches[1] - micro_batches[0]) / 4


def bytes_in_theory(how: str, micro_batches: float) -> float:
    """A step of two processes in float32 with a KL term, as in the header.

    micro_batches: those of one rank in a step, each of which the reference forwards too.
    """
    config = train.Config(precision="float32")
    policy, _ = load_model(config, train.torch.device("cpu"))
    weights = 4 * sum(parameter.numel() for parameter in policy.parameters())
    if how == "cpu":
        updates = config.rollouts_per_step * config.group_size // config.train_batch_size
        return weights * updates
    forwards = 2 * micro_batches  # the policy's and the reference's
    return 0.5 * weights * (forwards + 2 * micro_batches + 1)


def efficiency(options: Options, *larger: str) -> dict:
    times = {"single": [], "cpu": [], "fsdp": []}
    for _ in range(options.rounds):
        for how, seconds in times.items():
            with tempfile.TemporaryDirectory() as folder:
                lines = run(how, folder, *few_steps(options.steps), *larger)
                seconds.append(seconds_a_step(lines))
    return {
        "seconds": times,
        "efficiency_ddp": median(a / (2 * b) for a, b in zip(times["single"], times["cpu"])),
        "efficiency_fsdp": median(a / (2 * b) for a, b in zip(times["single"], times["fsdp"])),
    }


def main(options: Options) -> None:
    larger = ("--rollouts-per-step", "64", "--train-batch-size", "256")
    report = {
        "command": "python benchmarks/scaling.py",
        "machine": describe_machine(),
        "default_step": efficiency(options),
        "four_times_as_large": efficiency(options, *larger),
    }
    for how in ("cpu", "fsdp"):
        sent, micro_batches = bytes_a_step(how)
        report[f"bytes_{how}"] = {"a_step": sent, "theory": bytes_in_theory(how, micro_batches)}
    report["learning"] = {}
    for how, seed in (("cpu", 42), ("cpu", 1), ("cpu", 2), ("fsdp", 42)):
        with tempfile.TemporaryDirectory() as folder:
            lines = run(how, folder, "--seed", str(seed))
        accuracy = {
            line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line
        }
        report["learning"][f"{how}, seed {seed}"] = {
            "eval_accuracy": accuracy,
            "training_seconds": lines[-1]["elapsed_seconds"],
        }
    print(json.dumps(report, indent=1))
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
