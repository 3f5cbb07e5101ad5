"""Real vLLM in the loop of experiment_async, on a CPU. `tests/vllm-cpu/run` runs this.

The trainer forwards what vLLM sampled, with the same weights (--max-staleness 0), and compares
log-probs, after every change of the weights (pitfalls 44 and 45). Rewards are compared with those
of --engine hf. SmolLM2, where it is there, earns nothing on these sums within two steps, so its
weights stay. Therefore noise changes them too, without Ray. Exits with 1 where something is off.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "data" / "smollm2"
MOST_GAP = 1e-3
FLAGS = "--precision float32 --checkpoint-interval 0 --eval-interval 0 --max-eval-prompts 128"
SMALL = "--rollouts-per-step 4 --group-size 4 --train-batch-size 8"
failures = []


def run(folder: str, name: str, flags: str) -> list[dict]:
    """The metrics of the run's steps."""
    script = ROOT / "experiment_async" / "train.py"
    places = ["--log-dir", folder, "--checkpoint-path", folder, "--run-name", name]
    command = [sys.executable, str(script), *FLAGS.split(), *places, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    lines = (Path(folder) / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def report(name: str, steps: list[dict], most_gap: float = MOST_GAP) -> None:
    rewards = [step["reward"] for step in steps]
    gaps = [step["max_log_prob_gap"] for step in steps]
    print(f"\n{name}: held out {steps[-1]['eval_accuracy']:.3f}")
    print("  reward             ", *[f"{reward:.2f}" for reward in rewards])
    print("  log-probs differ by", *[f"{gap:.0e}" for gap in gaps], flush=True)
    expect(max(gaps) <= most_gap, f"{name}: log-probs differ by {max(gaps):.1e}")


def expect(condition: bool, what: str) -> None:
    if not condition:
        failures.append(what)


def change_weights(model_name: str) -> list[float]:
    """Log-probs of vLLM's samples against the model's own, at first and after three changes."""
    sys.path.insert(0, str(ROOT / "experiment_async"))
    import torch
    from engines import VLLM, load_weights, sample
    from model import find_eos_ids, load_model, load_tokenizer, resolve
    from train import Config

    config = Config(model_name=model_name, kl_weight=0, max_new_tokens=16, precision="float32")
    config, device = resolve(config)
    policy, _ = load_model(config, device)
    tokenizer = load_tokenizer(config)
    sampler = VLLM(config)
    history = tokenizer("What is 5 + 8? " * 10).input_ids
    gaps = []
    for change in range(4):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.02 * bool(change) * parameter.std() * torch.randn_like(parameter))
        load_weights(sampler, {name: p.detach().clone() for name, p in policy.named_parameters()})
        eos_ids = find_eos_ids(policy, tokenizer)
        generator = torch.Generator().manual_seed(change)
        gap = 0.0
        for row, log_probs in zip(*sample(sampler, [history] * 4, eos_ids, config, generator)):
            with torch.no_grad():
                logits = policy(torch.tensor([[*history, *row.tolist()]])).logits[0]
            own = logits.log_softmax(-1)[len(history) - 1 : -1].gather(1, row[:, None])[:, 0]
            gap = max(gap, (own - log_probs).abs().max().item())
        gaps.append(gap)
    return gaps


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        means = {}
        for engine in ("hf", "vllm"):
            for seed in (42, 1, 2):
                name = f"{engine}_{seed}"
                flags = f"--max-steps 10 --max-staleness 0 --seed {seed} --engine {engine}"
                steps = run(folder, name, flags)
                report(name, steps)
                means[name] = sum(step["reward"] for step in steps) / 10
        print("\nmean reward of 10 steps:", {k: round(v, 3) for k, v in means.items()})
        ours, theirs = ([means[f"{e}_{s}"] for s in (42, 1, 2)] for e in ("hf", "vllm"))
        gap = abs(sum(ours) - sum(theirs)) / 3
        spread = max(ours) - min(ours)
        expect(gap < max(spread, 0.03), f"mean rewards differ by {gap:.3f}; seeds by {spread:.3f}")

        again = run(folder, "again", "--max-steps 3 --max-staleness 0 --engine vllm")
        first = (Path(folder) / "vllm_42" / "metrics.jsonl").read_text().splitlines()[1:4]
        same = [step["reward"] for step in again] == [json.loads(line)["reward"] for line in first]
        expect(same, "the same seed gave other rewards")

        report(
            "LoRA",
            run(
                folder,
                "lora",
                "--max-steps 3 --max-staleness 0 --engine vllm --lora-rank 4 --lr 1e-3",
            ),
        )
        flags = "--max-steps 10 --engine vllm"
        steps = run(folder, "stale", flags)
        report("at the same time", steps, most_gap=float("inf"))
        expect(steps[-1]["staleness_max"] == 2, "no sample is older than the weights")
        means = [round(step["importance_mean"], 3) for step in steps]
        print("  importance weights ", *means)
        expect(all(0.9 < mean <= 1.05 for mean in means), f"importance weights are {means}")
        if SMOLLM2.is_dir():
            flags = f"--model-name {SMOLLM2} --lr 1e-5 {SMALL} --max-steps 2 --max-staleness 0"
            report("SmolLM2", run(folder, "smollm2", f"{flags} --engine vllm"))
            gaps = change_weights(str(SMOLLM2))
            print("  after noise on all weights", *[f"{gap:.0e}" for gap in gaps])
            expect(max(gaps) <= MOST_GAP, f"SmolLM2: log-probs differ by {max(gaps):.1e}")
        else:
            print("\nSmolLM2: left out, python data/get_smollm2.py fetches it")
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
