"""What the KV cache that lasts from turn to turn is worth in experiment_multiturn_tool_calling.

    # the embedded policy, about a minute on 2 cores
    python benchmarks/kv_cache.py
    # a trained one, which calls in every row
    python benchmarks/kv_cache.py --model-name output/.../step_000064

Samples the same steps, from the same random numbers, in three ways, in turns:

    anew        every turn forwards its whole histories
    beginning   every turn forwards what all histories begin with once, and the rest of each
    kept        what is shipped: later turns forward what is new

Prints the median seconds of a step's rollout (16 prompts x 8 trajectories), the medians over steps
of the ratios to what is shipped, and the largest difference between the log-probs of the same
tokens.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiment_multiturn_tool_calling"))
import train  # noqa: E402

WAYS = {"anew": lambda memory: None, "beginning": lambda memory: {}, "kept": lambda memory: memory}


@dataclass
class Options:
    model_name: str = train.Config.model_name
    steps: int = 10  # timed, after one to warm up


def sampling_with(change, sample):
    """`sample`, with another memory than the one that the rollout keeps."""

    def wrapped(policy, histories, eos_ids, config, generator, memory):
        return sample(policy, histories, eos_ids, config, generator, change(memory))

    return wrapped


def main(options: Options) -> None:
    config, device = train.resolve(train.Config(model_name=options.model_name, kl_weight=0))
    tokenizer = train.load_tokenizer(config)
    prompts, _ = train.read_prompts(config, tokenizer)
    policy, _ = train.load_model(config, device)
    sample = train.sample
    seconds = {way: [] for way in WAYS}
    gap = 0.0
    for step in range(1, options.steps + 2):
        sampled = {}
        for way, change in WAYS.items():
            train.sample = sampling_with(change, sample)
            step_prompts = train.prompts_of_step(prompts, step, config)
            generator = train.make_generator(device, step)
            start = time.perf_counter()
            sampled[way] = train.rollout(
                policy,
                tokenizer,
                step_prompts,
                config.group_size,
                config,
                generator,
                tool=train.calculator,
            )
            seconds[way].append(time.perf_counter() - start)
        for way in WAYS:
            for one, other in zip(sampled[way], sampled["kept"]):
                for a, b, x, y in zip(
                    one.completion_ids,
                    other.completion_ids,
                    one.sampled_log_probs,
                    other.sampled_log_probs,
                ):
                    gap = max(gap, (x - y).abs().max().item()) if a.equal(b) else gap
    ratios = {
        way: median(a / b for a, b in zip(seconds[way][1:], seconds["kept"][1:])) for way in WAYS
    }
    figures = {
        "seconds": {way: median(times[1:]) for way, times in seconds.items()},
        "ratio": ratios,
    }
    figures["max_log_prob_difference"] = gap
    figures["calls"] = train.trajectory_metrics(
        [t for e in sampled["kept"] for t in e.trajectories]
    )["calls"]
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
