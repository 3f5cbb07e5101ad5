"""Several processes, called ranks: who they are, what they exchange, which of them writes.

Plumbing. `accelerate launch` starts the processes and says by environment variables how the weights
are held:

    one process     nothing below exchanges anything
    DDP             every rank has all weights; gradients are added in the backward pass
    FSDP2           sharded: every rank has a part of each weight, and gathers a layer when it is
                    its turn

A method is called a collective where every rank has to call it, or the others wait forever. Here
these are `gather`, `all_of`, `sums_of_all`, `micro_batches`, `gather_weights`, the methods of
`RankCompletionLog`, and whatever loads or saves.
"""

import io
import os
import pickle
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import partialmethod

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env
from completions import CompletionLog
from model import halve_linear_layers, load_model, unwrap
from replay_buffer import cut_into_micro_batches
from run import Run, default_name, fail, first_line
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# Whole tensors, on the CPU of rank 0.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# What gloo and NCCL say where another process has ended.
SIGNS_OF_LOSS = ("onnection", "Broken pipe", "Timed out waiting", "ncclRemoteError")
# A launcher passes on a signal that its processes may have had already; that is no second Ctrl-C.
SECONDS_OF_ONE_SIGNAL = 5


class Inside(nn.Module):
    """function(policy, ...) as the forward of one module.

    DDP and FSDP act in the forward of the module that they wrap. A decoder that is called past it
    would have no gradients added, and no weights gathered.
    """

    def __init__(self, policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, function, *arguments):
        return function(self.policy, *arguments)


class Ranks:
    """The processes of a run, as one of them sees them."""

    def __init__(self) -> None:
        # Else Accelerate has rank 0 alone read the weights, and expects a broadcast.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # while rank 0 saves, say
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(), kwargs_handlers=[patience]
        )
        self.count = self.accelerator.num_processes
        self.rank = self.accelerator.process_index
        self.is_first = self.rank == 0
        self.sharded = parse_flag_from_env("ACCELERATE_USE_FSDP") and self.count > 1
        self.layerwise = None  # what samples layer by layer
        self.offloaded = parse_flag_from_env("FSDP_OFFLOAD_PARAMS") and torch.cuda.is_available()
        if self.sharded:
            # Autocast keeps the half-precision copy of a weight until its context ends. Of weights
            # that are gathered layer by layer, these copies would add up to a whole model.
            torch.set_autocast_cache_enabled(False)
        how = "FSDP2" if self.sharded else "DDP"
        if self.count == 1:
            print("1 process")
        elif self.is_first:
            print(f"{self.count} processes, {how}, {dist.get_backend()}")
        else:
            sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
            transformers.logging.set_verbosity_error()

    def check(self, config) -> None:
        """End the program where the config and the number of ranks do not go together."""
        if config.rollouts_per_step % self.count:
            wanted = f"must be a multiple of the {self.count} processes: each samples whole groups"
            fail(f"--rollouts-per-step {config.rollouts_per_step}: {wanted}")
        if self.count > 1 and torch.backends.mps.is_available():
            fail("on Apple's GPU one process alone works: start train.py with python")
        own = self.accelerator.local_process_index
        if self.count > 1 and config.device_index not in (None, own):
            fail(f"--device-index {config.device_index}: each process has a device of its own")
        if self.sharded and (config.load_in_4bit or config.optimizer == "adamw8bit"):
            fail("--load-in-4bit and --optimizer adamw8bit: not with FSDP; take ddp.yaml")
        if config.sampling_weights == "layers" and not self.sharded:
            print("--sampling-weights is not used: without FSDP each process has whole weights")

    def add_device_and_run_name(self, config, experiment: str):
        """The config with this rank's device, and with a run's name that all ranks share."""
        if torch.cuda.is_available() and self.count > 1 and config.device_index is None:
            config = replace(config, device_index=self.accelerator.local_process_index)
        if config.resume or config.run_name:
            return config
        return replace(config, run_name=self.gather(default_name(experiment))[0])

    # ------------------------------------------------------------ collectives
    def wait_for_first(self) -> None:
        """The other ranks wait until rank 0 is ready; where it fails, they end too."""
        if self.is_first:
            return
        try:
            self.accelerator.wait_for_everyone()
        except RuntimeError:
            sys.exit(1)  # rank 0 has said why

    def first_is_ready(self) -> None:
        if self.is_first:
            self.accelerator.wait_for_everyone()

    def gather(self, item) -> list:
        """The items of all ranks, by rank. Tensors in them are on the CPU, and in no bfloat16."""
        if self.count == 1:
            return [item]
        gathered = [None] * self.count
        dist.all_gather_object(gathered, pickled(item))
        return [pickle.loads(content) for content in gathered]

    def all_of(self, parts: list) -> list:
        """The items of all ranks, in the order of the whole: rank r has items r, r + count, ...

        No other collective may stand between sampling and this: where the weights are sampled from
        layer by layer, it first forwards along until all ranks have sampled.
        """
        if self.layerwise:
            self.layerwise.wait()
        gathered = self.gather(parts)
        whole = [None] * sum(len(part) for part in gathered)
        for rank, part in enumerate(gathered):
            whole[rank :: self.count] = part
        return whole

    def own(self, whole: list) -> list:
        """This rank's items: r, r + count, ..."""
        return whole[self.rank :: self.count]

    def sums_of_all(self, token_sums: list[dict]) -> list[dict]:
        """What GRPOLoss noted of the micro-batches of all ranks."""
        on_cpu = [{name: sum_.cpu() for name, sum_ in sums.items()} for sums in token_sums]
        return [sums for part in self.gather(on_cpu) for sums in part]

    def micro_batches(self, rows: list, most_tokens: int, packed: bool) -> list:
        """This rank's micro-batches of an optimizer batch's rows, as many on every rank.

        The rows are sorted by length and dealt out in turn. Every rank has to take part in every
        collective. So a rank with fewer micro-batches than another forwards the batch's shortest
        row again, with weights of 0, which add nothing to the gradient.
        """
        rows = sorted(rows, key=lambda row: len(row.ids), reverse=True)
        own = cut_into_micro_batches(self.own(rows), most_tokens, packed)
        for _ in range(max(self.gather(len(own))) - len(own)):
            (filler,) = cut_into_micro_batches(rows[-1:], most_tokens, packed)
            nothing = torch.zeros_like(filler.weights)
            own.append(replace(filler, weights=nothing, is_filler=True))
        return own

    # ------------------------------------------------------------ weights
    def loading_device(self, device: torch.device) -> torch.device:
        """Where whole weights are read: with FSDP no device need hold them all."""
        return torch.device("cpu") if self.sharded else device

    def wrap(self, policy) -> nn.Module:
        """`Inside(policy)`, whose weights and gradients are shared as the launcher says.

        Gradients are added over the ranks, not averaged: each rank's loss is its part of the
        batch's weighted sum.
        """
        model = Inside(policy)
        if self.sharded:
            device = self.accelerator.device.type
            arguments = {
                "mesh": init_device_mesh(device, (self.count,)),
                "offload_policy": CPUOffloadPolicy() if self.offloaded else OffloadPolicy(),
                "reshard_after_forward": True,  # the root too, whose default is False
            }
            for part in [*unwrap(policy).get_decoder().layers, model]:
                fully_shard(part, **arguments)
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
            return model
        is_trained = any(parameter.requires_grad for parameter in policy.parameters())
        if self.count > 1 and is_trained:
            model = DistributedDataParallel(
                model, gradient_as_bucket_view=True, forward_sync_buffers=False
            )
            model.register_comm_hook(None, add_over_ranks)
        return model

    def without_sync(self, model, is_last: bool):
        """A context for a micro-batch. DDP exchanges gradients once a batch, with the last one.

        FSDP exchanges them every time: to keep them whole until the end would take their memory.
        """
        if is_last or not isinstance(model, DistributedDataParallel):
            return nullcontext()
        return model.no_sync()

    def gather_weights(self, policy, sampler) -> None:
        """Give the sampler, a model with whole weights, those of the policy."""
        if sampler is policy or isinstance(sampler, LayerwiseSampler):
            return
        with torch.no_grad():
            for source, target in zip(policy.parameters(), sampler.parameters(), strict=True):
                if not source.requires_grad:
                    continue  # frozen, and so the same in both
                whole = source.full_tensor() if isinstance(source, DTensor) else source
                target.copy_(whole)

    def make_sampler(self, policy, model, config, device):
        """What samples: the policy itself, or, where its weights are in parts, by
        `config.sampling_weights`

            whole      a second model, in half precision on a GPU. It takes the memory of all
                       weights. They are gathered once a step
            layers     the policy's own parts, a layer gathered when it is its turn, for every token
        """
        if not self.sharded:
            return policy
        if config.sampling_weights == "layers":
            self.layerwise = LayerwiseSampler(model, device)
            return self.layerwise
        sampler, _ = load_model(replace(config, kl_weight=0.0), self.loading_device(device))
        if device.type != "cpu" and not config.lora_rank:  # on a CPU sampling is in float32
            halve_linear_layers(sampler, config)
        return sampler.to(device)

    # ------------------------------------------------------------ the state of a run
    def weights_to_save(self, policy) -> dict | None:
        """Whole weights on rank 0, where the ranks have parts; else None. Every rank calls it.

        With LoRA those of the adapter, which is what is saved.
        """
        if not self.sharded:
            return None
        is_adapter = hasattr(policy, "peft_config")
        options = replace(WHOLE, ignore_frozen_params=is_adapter)
        weights = get_model_state_dict(policy, options=options)
        for name in weights.keys() - names_of_weights(policy):  # a second name of a tied weight
            del weights[name]
        return weights

    def optimizer_state(self, model, optimizer) -> dict:
        """The optimizer's whole state, by the names of the weights: it fits any number of ranks."""
        if not optimizer.state:  # no update yet; PyTorch would make one, with a gradient of 0
            return {}
        return get_optimizer_state_dict(without_ddp(model), optimizer, options=WHOLE)

    def load_optimizer_state(self, model, optimizer, state: dict | None) -> None:
        if state:
            lr = optimizer.param_groups[0]["lr"]
            set_optimizer_state_dict(
                without_ddp(model), optimizer, state, options=StateDictOptions(full_state_dict=True)
            )
            for group in optimizer.param_groups:
                group["lr"] = lr  # the config's, not the checkpoint's


class LayerwiseSampler:
    """A policy in parts, forwarded by all ranks at the same time.

    Each forward is an exchange. Where the completions of one rank end first, it forwards a single
    token until those of all have ended (`wait`).
    """

    def __init__(self, model, device: torch.device) -> None:
        self.model = model  # Inside(policy)
        self.policy = model.policy
        self.device = device

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def __call__(self, input_ids, **arguments):
        count_of_all(True, self.device)
        return self.model(lambda policy: policy(input_ids, **arguments))

    def wait(self) -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        while count_of_all(False, self.device):
            with torch.no_grad():
                self.model(lambda policy: policy(token))


def pickled(item) -> bytes:
    """Tensors as arrays, which takes a tenth of the time for many small ones."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = {torch.Tensor: lambda tensor: (torch.from_numpy, (tensor.numpy(),))}
    pickler.dump(item)
    return file.getvalue()


def add_over_ranks(state, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does with a part of the gradient. Its default divides by the number of ranks."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def count_of_all(flag: bool, device) -> int:
    """Of how many ranks the flag is true."""
    count = torch.tensor(int(flag), device=device)
    dist.all_reduce(count)
    return int(count)


@contextmanager
def process_group():
    """Leave the group at the end. Where another rank has died, end with a line, no traceback."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS_OF_LOSS):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's; this rank ends anyway
        print(file=sys.stderr)  # after the progress bar
        hint = "it may have said why; --resume goes on from the last checkpoint"
        fail(f"another process has ended: {hint} ({first_line(error)[:100]})")
    except KeyboardInterrupt:  # before `RankRun` listens
        sys.exit("\nstopped before training began" if is_rank_0() else 1)
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads may hold tensors for longer, and Python, shutting down, is aborted by them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_rank_0() -> bool:
    """What the launcher says, before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def names_of_weights(policy) -> set[str]:
    return {name for name, _ in [*policy.named_parameters(), *policy.named_buffers()]}


class WithWeights:
    """A policy that saves weights that were gathered from all ranks."""

    def __init__(self, policy, weights: dict) -> None:
        self.policy = policy
        self.weights = weights
        if hasattr(policy, "peft_config"):  # which `Run.save` looks for
            self.peft_config = policy.peft_config

    def save_pretrained(self, folder, **arguments) -> None:
        self.policy.save_pretrained(folder, state_dict=self.weights, **arguments)


def without_ddp(model):
    """The module inside DDP's wrapper."""
    return getattr(model, "module", model)


class RankRun(Run):
    """A run of which rank 0 writes. The others count its steps along."""

    def __init__(self, config, experiment: str, prompts, ranks: Ranks) -> None:
        self.ranks = ranks
        self.signalled = None  # when
        super().__init__(config, experiment, prompts)
        before = self.state.get("ranks", ranks.count)
        if before != ranks.count:
            print(f"processes: {ranks.count}, were {before}: other samples are drawn")

    def open(self) -> None:
        self.ranks.accelerator.wait_for_everyone()  # all have seen which directories there were
        if self.ranks.is_first:
            super().open()
        else:
            signal.signal(signal.SIGINT, self.on_signal)
            signal.signal(signal.SIGTERM, self.on_signal)
        if hasattr(signal, "SIGHUP"):  # of a terminal that is closed; the launcher passes it on
            signal.signal(signal.SIGHUP, self.on_signal)
        self.agree_on_checkpoint()

    def agree_on_checkpoint(self) -> None:
        """Every rank may have to say which is the last one; rank 0 knows. It also waits for it."""
        self.last_checkpoint = self.ranks.gather(self.last_checkpoint)[0]

    def start(self, evaluation: dict) -> None:
        if self.ranks.is_first:
            return super().start(evaluation)
        self.began = time.time() - self.state.get("elapsed_seconds", 0)

    def on_signal(self, number: int, frame) -> None:
        """A signal is noted here. `log` agrees on it, so that all ranks stop after one step."""
        now = time.time()
        if self.signalled and now - self.signalled < SECONDS_OF_ONE_SIGNAL:
            return
        agreed = self.stop_requested
        self.stop_requested = self.signalled is not None
        super().on_signal(number, frame)  # ends the program where it is the second one
        self.stop_requested = agreed
        self.signalled = now

    def log(self, step: int, metrics: dict, text: str | None = None) -> None:
        if step:  # of step 0, rank 0 alone calls it
            self.stop_requested = any(self.ranks.gather(self.signalled is not None))
            if self.stop_requested and self.signalled is None:
                print("\nanother process was asked to stop: saving", flush=True)
        if self.ranks.is_first:
            super().log(step, metrics, text)

    def save(self, step: int, policy, tokenizer, state: dict) -> None:
        weights = self.ranks.weights_to_save(policy)
        if self.ranks.is_first:
            saved = WithWeights(policy, weights) if weights else policy
            super().save(step, saved, tokenizer, {**state, "ranks": self.ranks.count})
        self.saved_step = step
        self.agree_on_checkpoint()

    def close(self) -> None:
        if self.ranks.is_first:
            super().close()


class RankCompletionLog(CompletionLog):
    """A log of completions that rank 0 writes. All ranks forward them, each a copy.

    The policy that it is given is `Ranks.wrap(policy)`.
    """

    def open(self) -> list[tuple]:
        first = super().open() if self.run.ranks.is_first else None
        return self.run.ranks.gather(first)[0]

    @torch.no_grad()
    def forward(self, function, *arguments):
        self.policy.eval()
        return self.policy(function, *arguments)

    def device(self) -> torch.device:
        ranks = self.run.ranks
        if ranks.accelerator.device.type == "cuda":
            return ranks.accelerator.device
        return self.model().device

    def model(self):
        return without_ddp(self.policy).policy

    def trained_tokens(self, batches) -> dict[tuple, dict]:
        own = []
        for batch in batches:
            own.append([micro_batch for micro_batch in batch if not micro_batch.is_filler])
        found = {}
        for part in self.run.ranks.gather(super().trained_tokens(own)):
            found |= part
        return found

    def append(self, lines: list[dict]) -> None:
        if self.run.ranks.is_first:
            super().append(lines)
