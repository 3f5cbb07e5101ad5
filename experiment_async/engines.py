"""What samples inside a sampler: a model of transformers (hf), or vLLM (vllm).

`sample` and `load_weights` take either. Token ids in, token ids and log-probs out: both draw from a
plain softmax at `temperature`, and give each drawn token's log-prob in it.
"""

import os
from dataclasses import replace

import sampling
import torch
from model import base_model_of, halve_linear_layers, load_model, load_tokenizer, resolve
from transformers import AutoConfig, GenerationConfig


class VLLM:
    """vLLM inside this process, in the place of a model: has what `rollout` asks of one."""

    def __init__(self, config) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights need not be pickled
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        has_cuda = torch.cuda.is_available()
        if not has_cuda:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            # Else it keeps a packed copy of an output head that is tied to the embedding, and
            # reload_weights does not renew that: log-probs were off by 0.2.
            from vllm import _custom_ops

            _custom_ops._supports_onednn = False
        from vllm import LLM

        name = base_model_of(config.model_name)
        self.device = torch.device("cpu")  # of the generator
        self.generation_config = load_generation_config(name)
        self.llm = LLM(
            model=name,
            dtype=config.precision,
            max_model_len=config.max_length,
            gpu_memory_utilization=0.9 * (config.gpus_per_sampler or 1),
            enforce_eager=not has_cuda,
            generation_config="vllm",  # no top_k and the like of the checkpoint
            logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
            seed=config.seed,
        )

    def eval(self) -> None:
        pass

    def sample(self, histories, eos_ids, config, generator):
        from vllm import SamplingParams

        seeds = torch.randint(2**31, (len(histories),), generator=generator).tolist()
        torch.manual_seed(seeds[0])
        parameters = []
        for seed in seeds:
            one = SamplingParams(
                temperature=config.temperature,
                top_p=1.0,
                top_k=-1,
                min_p=0.0,
                max_tokens=config.max_new_tokens,
                stop_token_ids=sorted(eos_ids),
                logprobs=0,  # of the drawn token alone
                detokenize=False,
                # The CPU build fails on seeds of requests. It draws from torch's own numbers.
                seed=seed if torch.cuda.is_available() else None,
            )
            parameters.append(one)
        prompts = [{"prompt_token_ids": history} for history in histories]
        ids = []
        log_probs = []
        for answer in self.llm.generate(prompts, parameters, use_tqdm=False):
            output = answer.outputs[0]
            tokens = list(output.token_ids)
            ids.append(torch.tensor(tokens))
            log_probs.append(
                torch.tensor([at[t].logprob for at, t in zip(output.logprobs, tokens)])
            )
        return ids, log_probs

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        arguments = {"weights_iterator": list(weights.items())}
        self.llm.collective_rpc("reload_weights", kwargs=arguments)
        # Else prompts that it has seen before continue from keys and values of the old weights.
        self.llm.reset_prefix_cache()


def sample(policy, histories, eos_ids, config, generator=None):
    """(ids, log-probs): for each history its new tokens, (tokens,) each, on the CPU.

    policy: a model or a VLLM. The rest as in sampling.py.
    """
    if isinstance(policy, VLLM):
        return policy.sample(histories, eos_ids, config, generator)
    return sampling.sample(policy, histories, eos_ids, config, generator)


@torch.no_grad()
def load_weights(policy, weights: dict[str, torch.Tensor]) -> None:
    """Take over all weights, by the model's own names."""
    if isinstance(policy, VLLM):
        return policy.load_weights(weights)
    for name, parameter in policy.named_parameters():
        parameter.copy_(weights[name])


def load_engine(config):
    """(policy, tokenizer) of a sampler, with the model's first weights."""
    config, device = resolve(replace(config, device_index=None))  # a sampler sees its GPU alone
    tokenizer = load_tokenizer(config)
    if config.engine == "vllm":
        return VLLM(config), tokenizer
    # It is sent whole weights, an adapter merged into them. They stay trainable, though nothing
    # trains them: CPU kernels for frozen weights round otherwise than the trainer does.
    name = base_model_of(config.model_name)
    changes = {"kl_weight": 0.0, "lora_rank": 0, "load_in_4bit": False, "model_name": name}
    policy, _ = load_model(replace(config, **changes), device)
    if device.type != "cpu":
        halve_linear_layers(policy, config)
    return policy, tokenizer


def load_generation_config(name: str) -> GenerationConfig:
    """That of a model, which names its end tokens, as `from_pretrained` gives it to the model."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:  # it has none
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(name))
