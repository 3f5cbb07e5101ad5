"""Cases of test_async.py that need Ray, with logical GPUs that no machine has. Prints JSON."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ray
from ray.util.placement_group import PlacementGroup

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiment_async"))
import samplers  # noqa: E402
import train  # noqa: E402
from model import load_model, load_tokenizer, resolve  # noqa: E402

RANKS = SimpleNamespace(is_first=True, count=1, gather=lambda item: [item])
SMALL = {"group_size": 2, "train_batch_size": 4, "rollouts_per_step": 4, "max_new_tokens": 8}


def line_of(function) -> str:
    """The line that it ends with; "" where it does not."""
    try:
        function()
    except SystemExit as error:
        return str(error)
    return ""


def places(config) -> dict:
    """How many samplers get a place; the line that says what is lacking. All are freed again."""
    actors = []
    line = line_of(lambda: actors.extend(samplers.start_actors(config, RANKS)))
    for actor in actors:
        ray.kill(actor)
    for number, group in ray.util.placement_group_table().items():
        if group["state"] != "REMOVED":
            number = ray.PlacementGroupID.from_hex(number)
            ray.util.remove_placement_group(PlacementGroup(number))
    until = time.time() + 20
    while ray.available_resources().get("GPU", 0) < 2 and time.time() < until:
        time.sleep(0.1)
    return {"samplers": len(actors), "line": line}


def main() -> None:
    config = train.Config(**SMALL, max_staleness=0)
    config, device = resolve(config)
    samplers.SECONDS_FOR_PLACES = 3
    samplers.MOST_REPEATS = 1
    paths = f"{ROOT / 'experiment_async'}:{ROOT / 'tests'}"
    ray.init(
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )
    samplers.start_ray = lambda config: None
    report = {}
    half = replace(config, num_samplers=3, trainer_gpus=0.5, gpus_per_sampler=0.5)
    report["fractions"] = places(half)
    report["too many"] = places(replace(half, num_samplers=4))
    report["no room"] = places(replace(half, num_samplers=2, gpus_per_sampler=0.75))

    available = samplers.torch.cuda.is_available
    samplers.torch.cuda.is_available = lambda: True
    samplers.torch.cuda.device_count = lambda: 2
    report["kept"] = places(replace(config, trainer_gpus=1, gpus_per_sampler=1))
    report["another"] = places(replace(config, trainer_gpus=1, device_index=1))
    samplers.torch.cuda.is_available = available

    # What is too old is dropped and sampled again, by a real sampler.
    policy, _ = load_model(replace(config, kl_weight=0.0), device)
    prompts, _ = train.read_prompts(config, load_tokenizer(config))
    actors = samplers.Samplers(config, RANKS)
    actors.publish(0, policy)
    actors.ask(1, prompts[:4])
    for parameter in policy.parameters():
        parameter.data.add_(0.01)
    actors.publish(3, policy)
    taken = actors.take(1)
    versions = [experience.version for experience in taken.experiences]
    report["dropped"] = {"groups": taken.dropped, "versions": versions}

    # What is wrong inside a sampler is said by the trainer.
    broken = replace(prompts[0], ids=[10**6])
    actors.ask(2, [broken])
    report["wrong"] = {"line": line_of(lambda: actors.take(2))}

    # A request that kills its sampler each time is not repeated for ever.
    deadly = replace(prompts[0], ids=Deadly())
    actors.ask(3, [deadly])
    report["deadly"] = {"line": line_of(lambda: actors.take(3))}
    print(json.dumps(report))


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


if __name__ == "__main__":
    main()
