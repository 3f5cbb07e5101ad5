"""Loading a causal LM: device, precision, attention, adapters and 4-bit, and which model is the reference.

Nothing here is particular to GRPO but `load_model`'s choice of the reference. It is a file of its own so that train.py
stays as long as its lesson, and the same in every experiment.
"""

import math
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jinja2
import torch
from run import fail  # before peft: it quiets bitsandbytes
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # the training has one, and it is enough


def resolve(config):
    """(config, device): CUDA, else Apple's, else the CPU; `precision` auto becomes what that device is good at."""
    if torch.cuda.is_available():
        if (config.device_index or 0) >= torch.cuda.device_count():
            fail(f"--device-index {config.device_index}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        device = torch.device("cuda", config.device_index or 0)
        half = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    else:
        device, half = torch.device("mps" if torch.backends.mps.is_available() else "cpu"), "float32"
    return replace(config, precision=half if config.precision == "auto" else config.precision), device


def autocast(config, device: torch.device, sampling: bool = False):
    """Matrix products in `precision`; sampling on a CPU in float32: ever new small shapes make bfloat16 slow there."""
    enabled = config.precision != "float32" and not (sampling and device.type == "cpu")
    return torch.autocast(device.type, getattr(torch, config.precision), enabled=enabled)


def load_pretrained(name: str, config, device: torch.device, trainable: bool):
    """A causal LM without dropout, which would make the log-probs of one and the same policy differ.

    Float32 where its weights are trained (bfloat16 would swallow small updates), else half precision or 4-bit.
    """
    half = getattr(torch, config.precision)
    double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": half}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **double)
    try:
        model_config = AutoConfig.from_pretrained(name)
        for key, value in model_config.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(model_config, key, 0.0)
        for key in ("logit_scale", "logits_scaling"):  # Cohere, Granite
            if getattr(model_config.get_text_config(), key, None) not in (None, 1, 1.0):
                fail(f"--model-name {name}: models that scale their logits ({key}) are not supported")
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=model_config,
            dtype=torch.float32 if trainable else half,
            attn_implementation=choose_attention(config, model_config),
            quantization_config=nf4 if config.load_in_4bit else None,
            device_map={"": device},
        )
    except (OSError, ValueError, SafetensorError) as error:
        fail_to_load(name, error)


def load_tokenizer(name: str):
    """The model's tokenizer; an adapter that was saved without one has that of its base model."""
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "tokenizer_config.json").is_file():
        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, SafetensorError) as error:
        fail_to_load(name, error)
    if not tokenizer.chat_template:
        fail(f"{name}: its tokenizer has no chat template; take an instruction-tuned (-Instruct) model")
    try:
        tokenizer.apply_chat_template([{"role": role, "content": "."} for role in ("system", "user")], tokenize=False)
    except jinja2.TemplateError as error:
        fail(f"{name}: its chat template takes no system message ({error})")
    return tokenizer


def fail_to_load(name: str, error: Exception):
    hint = (
        "name a local model by its directory; for a gated one accept its licence on huggingface.co and `hf auth login`"
    )
    fail(f"--model-name {name}: cannot be loaded ({hint}): {str(error).splitlines()[0]}")


def choose_attention(config, model_config) -> str:
    """flash-attention where it is installed and rows cannot be packed anyway, else torch's own."""
    if config.attention != "auto":
        return config.attention
    flash = torch.cuda.is_available() and is_flash_attn_2_available() and config.precision != "float32"
    return "flash_attention_2" if flash and not can_pack(model_config, config.max_length) else "sdpa"


def can_pack(model_config, max_length: int) -> bool:
    """Whether packed rows are exact: full attention, or windows that a whole row fits into; flash takes no mask."""
    text_config = model_config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    exact = {"full_attention", "sliding_attention"} if not window or window >= max_length else {"full_attention"}
    rotary = getattr(text_config, "rope_parameters", None) and not getattr(text_config, "alibi", False)
    return bool(rotary) and set(layer_types) <= exact and model_config._attn_implementation != "flash_attention_2"


def load_model(config, device: torch.device, checkpoint: Path | None = None):
    """(policy, reference). The reference is the policy that training began with, also when `checkpoint` continues it:
    in full training a frozen copy; None without a KL term, or where the policy itself serves (see `as_reference`).
    """
    torch.manual_seed(config.seed)  # of LoRA's first weights
    is_adapter = (Path(config.model_name) / "adapter_config.json").is_file()
    lora = is_adapter or config.lora_rank > 0
    base = PeftConfig.from_pretrained(config.model_name).base_model_name_or_path if is_adapter else config.model_name
    policy = load_pretrained(str(checkpoint) if checkpoint and not lora else base, config, device, trainable=not lora)
    reference = None
    if is_adapter:
        policy = PeftModel.from_pretrained(policy, config.model_name, is_trainable=True)
        policy.load_adapter(config.model_name, "reference")
    elif lora:
        adapter = LoraConfig(r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear")
        policy = get_peft_model(policy, adapter)
    elif config.kl_weight:
        reference = load_pretrained(base, config, device, trainable=True).requires_grad_(False).eval()
    if checkpoint and lora:
        set_peft_model_state_dict(policy, load_peft_weights(str(checkpoint), device=str(device)))
    if config.gradient_checkpointing:
        unwrap(policy).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):  # an adapter brings its own
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would pack its weights in the first eval pass,
            module.support_avx512bf16_for_cpu = False  # and then no gradient comes through them
    return policy.eval(), reference


def unwrap(policy):
    """The transformers model inside a PEFT model, its LoRA layers in place."""
    return policy.get_base_model() if isinstance(policy, PeftModel) else policy


@contextmanager
def as_reference(policy, reference):
    """The reference: its frozen copy, or the policy with the adapter that training began from, or with none."""
    if reference is not None:
        yield reference
    elif "reference" in policy.peft_config:
        policy.set_adapter("reference")
        yield policy
        policy.set_adapter("default")
    else:
        with policy.disable_adapter():
            yield policy


def make_optimizer(policy, config, state: dict | None = None):
    """AdamW over what trains, without weight decay; adamw8bit keeps its two moments in 8 bits. A resumed run brings
    the optimizer's state; the learning rate is the config's all the same."""
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(parameters, lr=config.lr, weight_decay=0.0)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    if state:
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = config.lr
    return optimizer


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in GiB: of the CUDA device, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@contextmanager
def out_of_memory_names(constant: str):
    """End the program with the constant to lower when the device or the machine runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            fail(f"out of memory: lower {constant}; the last checkpoint is untouched ({str(error).splitlines()[:1]})")
        raise


def end_token_ids(policy, tokenizer) -> list[int]:
    """Every id that ends a turn: the tokenizer knows one, the generation config of a chat model often more."""
    more = policy.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})
