"""Samplers: processes of their own that sample while the trainer trains. Ray runs them.

Plumbing of this experiment alone. The trainer asks ahead: before it trains on step s, it has asked
for the steps up to s + steps_ahead. A request carries the weights to sample with, the newest of
that moment, and a sampler answers its requests in turn. With one step ahead:

    trainer     asks for 1, 2 | waits    | train 1, asks for 3 | train 2, asks for 4 | ...
    sampler                   | sample 1 | sample 2            | sample 3            | ...

So the requests decide which weights sample a step, and not who is fast. A run can be repeated bit
for bit, also where a sampler dies: Ray starts it anew and repeats its requests.

Ray's words:

    actor                  an object that lives in a process of its own
    actor.sample.remote()  calls its method there, and returns at once, with a
    reference              to the result, which `ray.get` waits for and fetches
    ray.put                stores an object in memory that the machine's processes share, and
                           returns a reference to it. It is freed when no reference is left
    placement group        CPUs and GPUs that are reserved together
"""

import importlib.util
import os
import socket
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from captured import merged_weights
from run import fail, first_line

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of `get_ready`: `sample` has them too
os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "20")  # then a run without Ray ends
# A process that asks Ray for no GPU sees them all, and takes the first.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    fail(f"Ray is missing: pip install -r requirements-async.txt ({first_line(error)})")

FOLDER = Path(__file__).resolve().parent
MOST_RESTARTS = 100  # of a sampler, in a run
MOST_REPEATS = 10  # of a request whose sampler died, while it waited too
SECONDS_FOR_PLACES = 30  # a run that has just ended may still hold its GPUs


@dataclass
class Part:
    """What a sampler made of its part of a step's prompts."""

    experiences: list  # one a prompt, all sampled with the same weights
    began: float  # by the clock, as time.time()
    ended: float
    idle_seconds: float  # without a request before this one
    loading_seconds: float  # spent on taking over weights
    process: int  # its id; another one where the sampler was started anew


@dataclass
class Step:
    """All parts of a step, and what it took to get them."""

    experiences: list  # in the order of the step's prompts
    parts: list[Part]  # by sampler
    waited_from: float  # by the clock
    waited_until: float = 0.0
    dropped: int = 0  # groups that were too old, and so were sampled again


class Sampler:
    """The process that samples."""

    def __init__(self, config) -> None:
        self.config = config
        self.policy = None
        self.version = None
        self.free_since = time.time()

    def get_ready(self) -> None:
        """Load the model. Not in __init__, whose errors Ray tells with many tracebacks."""
        from engines import load_engine  # not above: the trainer imports no vLLM

        if self.policy is None:
            with errors_for_the_trainer():
                self.policy, self.tokenizer = load_engine(self.config)
            self.free_since = time.time()

    def sample(self, prompts: list, key: tuple, version: int, weights: list) -> Part:
        """A group for each prompt.

        key: decides the random numbers. weights: [a reference to them]. Ray fetches arguments that
        are references themselves; one in a list is fetched here, only where it is new.
        """
        from engines import load_weights
        from train import make_generator, rollout  # not above: train.py imports this file

        self.get_ready()  # where it was started anew, nobody else has called it
        start = time.time()
        idle_seconds = start - self.free_since
        if version != self.version:
            load_weights(self.policy, from_arrays(ray.get(weights[0])))
            self.version = version
        began = time.time()
        time.sleep(self.config.sampler_delay)
        generator = make_generator(self.policy.device, *key)
        with errors_for_the_trainer():
            arguments = (self.policy, self.tokenizer, prompts, self.config.group_size, self.config)
            experiences = rollout(*arguments, generator)
        for experience in experiences:
            experience.version = version
        self.free_since = time.time()
        times = (began, self.free_since, idle_seconds, began - start)
        return Part(experiences, *times, os.getpid())


@contextmanager
def errors_for_the_trainer():
    """`fail` ends a program. In a sampler it is an error, whose line the trainer says."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(str(error).removeprefix("error: ")) from error


class Samplers:
    """All samplers, as the trainer sees them. Of its ranks, rank 0 alone talks to them."""

    def __init__(self, config, ranks) -> None:
        self.config = config
        self.ranks = ranks
        self.steps_ahead = config.max_staleness // updates_per_step(config)
        self.requests = {}  # step -> for each sampler (prompts, a reference to its Part)
        self.actors = []
        self.processes = {}  # sampler -> the id of its process
        check(config)
        if ranks.is_first and config.max_steps != 0:
            self.logs = start_ray(config)
            self.actors = start_actors(config, ranks)
            loading = [actor.get_ready.remote() for actor in self.actors]
            if config.engine == "vllm" and 0 < config.gpus_per_sampler < 1:
                # vLLM measures how much of the card is free: nobody else may load meanwhile.
                for number, reference in enumerate(loading):
                    self.fetch(number, reference)

    def publish(self, version: int, policy) -> float:
        """From now on ask for samples of these weights. Returns the seconds that it took."""
        start = time.time()
        self.version = version
        if self.ranks.is_first:
            self.weights = ray.put(to_arrays(plain_weights(policy, self.config)))
        return time.time() - start

    def ask(self, step: int, prompts: list) -> None:
        """Ask for a step, unless that has been done. Each sampler gets a part."""
        if not self.ranks.is_first or step in self.requests:
            return
        count = len(self.actors)
        self.requests[step] = []
        for number in range(count):
            part = prompts[number::count]
            self.requests[step].append((part, self.request(step, number, part)))

    def request(self, step: int, number: int, prompts: list):
        # With one sampler the random numbers are those of experiment_base.
        key = (self.config.seed, "sample", step * len(self.actors) + number)
        return self.actors[number].sample.remote(prompts, key, self.version, [self.weights])

    def take(self, step: int) -> Step:
        """A step's groups, once all are there; the same on every rank of the trainer."""
        taken = self.wait_for(step) if self.ranks.is_first else None
        return self.ranks.gather(taken)[0]

    def wait_for(self, step: int) -> Step:
        requests = self.requests.pop(step)
        groups = sum(len(prompts) for prompts, _ in requests)
        taken = Step([None] * groups, [], waited_from=time.time())
        for number, (prompts, reference) in enumerate(requests):
            part = self.fetch(number, reference)
            # A guard: `ask` is never called further ahead than the bound permits.
            while self.version - part.experiences[0].version > self.config.max_staleness:
                taken.dropped += len(prompts)
                part = self.fetch(number, self.request(step, number, prompts))
            if self.processes.setdefault(number, part.process) != part.process:
                print(f"\nsampler {number} had ended, and was started anew", flush=True)
                self.processes[number] = part.process
            taken.experiences[number :: len(requests)] = part.experiences
            taken.parts.append(part)
        taken.waited_until = time.time()
        return taken

    def fetch(self, number: int, reference):
        """What a sampler returns; where it fails, its line ends the program."""
        try:
            return ray.get(reference)
        except RayTaskError as error:
            fail(f"sampler {number}: {first_line(error.cause)}")
        except RayError as error:
            again = f"sampler {number} ended, also when it was started anew"
            fail(f"{again}: see {self.logs} ({first_line(error)})")

    def close(self) -> None:
        if self.actors:
            ray.shutdown()


def updates_per_step(config) -> int:
    completions = config.rollouts_per_step * config.group_size
    return completions // config.train_batch_size * config.epochs_per_step


def async_metrics(taken: Step, version: int, sync_seconds: float) -> dict:
    """Figures of a step that weights `version` began to train on."""
    staleness = [version - experience.version for experience in taken.experiences]
    tokens = sum(len(ids) for group in taken.experiences for ids in group.completion_ids)
    metrics = {
        "staleness_mean": sum(staleness) / len(staleness),
        "staleness_max": max(staleness),
        "dropped_fraction": taken.dropped / (taken.dropped + len(staleness)),
        "trainer_idle_seconds": taken.waited_until - taken.waited_from,
        "trainer_waited_from": taken.waited_from,
        "trainer_waited_until": taken.waited_until,
        # Of all samplers, while they sample; experiment_base divides by the time until training.
        "sample_tokens_per_second": tokens / seconds_of_any(taken.parts),
        "sync_seconds": sync_seconds,
    }
    for number, part in enumerate(taken.parts):
        metrics[f"sampler_{number}_idle_seconds"] = part.idle_seconds
        metrics[f"sampler_{number}_loading_seconds"] = part.loading_seconds
        metrics[f"sampler_{number}_began"] = part.began
        metrics[f"sampler_{number}_ended"] = part.ended
    return metrics


def seconds_of_any(parts: list[Part]) -> float:
    """Seconds in which one sampler or more sampled."""
    seconds = 0.0
    until = 0.0
    for part in sorted(parts, key=lambda part: part.began):
        seconds += max(0.0, part.ended - max(part.began, until))
        until = max(until, part.ended)
    return seconds


# ---------------------------------------------------------------- weights
@torch.no_grad()
def plain_weights(policy, config) -> dict[str, torch.Tensor]:
    """The weights of the model without an adapter, by its own names, on the CPU, in `precision`.

    An adapter is merged, W + scale B A, in float32. Ends the program where it has more than that.
    """
    weights = {}
    for name, weight in merged_weights(policy, getattr(torch, config.precision)).items():
        if "lora_magnitude" in name or ".modules_to_save." in name:
            fail(f"--model-name: samplers know no adapter with {name}; merge it into its model")
        if "lora_" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        weights[name] = weight.cpu()
    return weights


def to_arrays(weights: dict[str, torch.Tensor]) -> dict:
    """Bytes in arrays, which Ray shares between processes without a copy; tensors it would copy."""
    arrays = {}
    for name, weight in weights.items():
        array = weight.contiguous().view(-1).view(torch.uint8).numpy()
        arrays[name] = (array, weight.dtype, weight.shape)
    return arrays


def from_arrays(arrays: dict) -> dict[str, torch.Tensor]:
    """Tensors over shared memory: not to be written to."""
    weights = {}
    for name, (array, dtype, shape) in arrays.items():
        weights[name] = torch.from_numpy(array).view(dtype).view(shape)
    return weights


# ---------------------------------------------------------------- Ray
def check(config) -> None:
    """End the program where these constants do not go together."""
    if 0 < config.importance_cap < 1:
        fail(f"--importance-cap {config.importance_cap:g}: must be 0 or at least 1")
    if 0 < config.max_staleness < updates_per_step(config):
        below = f"is below the {updates_per_step(config)} updates of a step"
        print(f"--max-staleness {config.max_staleness} {below}: samplers and trainer take turns")
    if config.num_samplers > config.rollouts_per_step:
        wanted = f"more than the {config.rollouts_per_step} prompts of a step"
        fail(f"--num-samplers {config.num_samplers}: {wanted}")
    if config.gpus_per_sampler > 1:
        fail(f"--gpus-per-sampler {config.gpus_per_sampler:g}: a sampler uses one GPU at most")
    if config.engine == "vllm" and torch.cuda.is_available() and not config.gpus_per_sampler:
        hint = "--gpus-per-sampler 0.5 --trainer-gpus 0.5 share one card"
        fail(f"--engine vllm: it takes nine tenths of a GPU, if nothing is said: {hint}")
    if config.engine == "vllm" and not importlib.util.find_spec("vllm"):
        fail("--engine vllm: vLLM is missing; see vLLM in experiment_async/README.md")
    if config.sampling_weights == "layers":
        fail("--sampling-weights layers: samplers hold whole weights")


def start_ray(config) -> str:
    """Join a cluster, or start Ray on this machine, whose cores all processes share evenly.

    Returns the directory of Ray's logs.
    """
    environment = {"PYTHONPATH": str(FOLDER)}
    arguments = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.ray_address is not None:
        check_address(config.ray_address)
        arguments["address"] = config.ray_address
    else:
        cores = os.cpu_count() or 1
        threads = max(1, cores // (1 + config.num_samplers))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", threads)))
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
        arguments["num_cpus"] = max(cores, config.num_samplers)
        arguments["include_dashboard"] = False
        arguments["address"] = "local"  # else it joins whatever cluster this machine is part of
    try:
        context = ray.init(runtime_env={"env_vars": environment}, **arguments)
    except Exception as error:
        if config.ray_address is None:
            fail(f"Ray cannot be started: {first_line(error)}")
        hint = "where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        fail(f"--ray-address {config.ray_address}: cannot be reached ({first_line(error)}); {hint}")
    return f"{context.address_info['session_dir']}/logs"


def check_address(address: str) -> None:
    """Whether anybody listens there; Ray itself would end the program without a word of Python."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        fail(f"--ray-address {address}: must be auto, or host:port as `ray start --head` prints it")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        fail(f"--ray-address {address}: cannot be reached ({error})")


def start_actors(config, ranks) -> list:
    """Reserve what the trainer and the samplers need, all at once, and start the samplers."""
    places = [{"CPU": 1, "GPU": config.gpus_per_sampler}] * config.num_samplers
    if config.trainer_gpus:
        here = f"node:{ray.util.get_node_ip_address()}"  # a resource of this machine alone
        places = [{"GPU": config.trainer_gpus, here: 0.001}, *places]
    places = [{kind: count for kind, count in place.items() if count} for place in places]
    has = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        if sum(place.get(kind, 0) for place in places) > has.get(kind, 0):
            fail(what_is_lacking(config))
    group = placement_group(places, strategy="PACK")
    if not group.wait(SECONDS_FOR_PLACES):
        fail(what_is_lacking(config))
    if config.trainer_gpus:
        check_trainers_gpus(config, ranks, group)
    first = len(places) - config.num_samplers
    actors = []
    for number in range(config.num_samplers):
        actor = ray.remote(Sampler).options(
            num_cpus=1,
            num_gpus=config.gpus_per_sampler,
            max_restarts=MOST_RESTARTS,
            max_task_retries=MOST_REPEATS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, first + number),
        )
        actors.append(actor.remote(config))
    return actors


def what_is_lacking(config) -> str:
    needs = f"{config.num_samplers} sampler(s) with 1 CPU and {config.gpus_per_sampler:g} GPU each"
    if config.trainer_gpus:
        needs += f", and a trainer with {config.trainer_gpus:g} GPU on this machine"
    total = ray.cluster_resources()
    free = ray.available_resources()
    has = [f"{total.get(k, 0):g} {k} ({free.get(k, 0):g} free)" for k in ("CPU", "GPU")]
    return f"Ray has no place for {needs}: it has {' and '.join(has)}"


def check_trainers_gpus(config, ranks, group) -> None:
    """The trainer's processes take the first GPUs. Are these what Ray keeps for them?"""
    strategy = PlacementGroupSchedulingStrategy(group, 0)
    ask = ray.remote(ray.get_gpu_ids).options(
        num_cpus=0, num_gpus=config.trainer_gpus, scheduling_strategy=strategy
    )
    kept = [str(number) for number in ray.get(ask.remote())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
    first = config.device_index or 0
    used = names[first : first + ranks.count]
    if torch.cuda.is_available() and set(used) != set(kept):
        hint = "--trainer-gpus counts those of all its processes; --device-index chooses one"
        fail(f"Ray keeps GPU {', '.join(kept)} for a trainer on {', '.join(used)}: {hint}")
