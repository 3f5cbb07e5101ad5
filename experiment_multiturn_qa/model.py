"""A causal LM and its optimizer: device, precision, attention, adapters, 4-bit, the reference.

Plumbing, the same in every experiment. Nothing here is particular to GRPO but the choice of the
reference in `load_model`. peft takes seconds to import: the functions that need it do.
"""

import math
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from run import DAMAGED, fail, first_line
from torch.nn.utils import clip_grad_norm_
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # the training has one, and it is enough
# PEFT 0.21 asks by a name that transformers 5.23 has replaced.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")

# cuDNN's attention gives NaN gradients for some masks (pytorch#196678), and it makes a new plan for
# every length of the KV cache, that is for every sampled token.
torch.backends.cuda.enable_cudnn_sdp(False)

# Llama's template would print today's date, and a run could not be repeated.
DATE = {"date_string": "26 Jul 2024"}
TEST_AT_MOST = {"max_prompts": 100, "max_eval_prompts": 100, "max_steps": 100}
TEST_CHECKPOINT_INTERVAL = 50


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, of its matrix library's own memory, or of the machine."""
    texts = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory", "overflowed")
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


@contextmanager
def out_of_memory_names(constant: str):
    """Where memory runs out, end the program with a line that names the constant to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            untouched = "the last checkpoint is untouched"
            fail(f"out of memory: lower {constant}; {untouched} ({first_line(error)})")
        raise


def resolve(config):
    """(config, device). The device is CUDA, else Apple's, else the CPU.

    `precision` auto becomes what that device is good at; --test makes the run small.
    """
    has_cuda = torch.cuda.is_available()
    if config.device_index is not None and not has_cuda:
        fail(f"--device-index {config.device_index}: this machine has no CUDA device")
    if has_cuda:
        count = torch.cuda.device_count()
        index = config.device_index or 0
        if index >= count:
            fail(f"--device-index {index}: this machine has {count} CUDA device(s)")
        device = torch.device("cuda", index)
        precision = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        precision = "float32"
    changes = {}
    if config.precision == "auto":
        changes["precision"] = precision
    if config.attention in ("flex_attention", "flash_attention_2") and not has_cuda:
        fail(f"--attention {config.attention}: needs a CUDA device; take sdpa")
    if config.attention == "flash_attention_2":
        if changes.get("precision", config.precision) == "float32":
            fail("--attention flash_attention_2: needs --precision bfloat16 or float16")
    if config.test:
        for name, most in TEST_AT_MOST.items():
            value = getattr(config, name)
            changes[name] = most if value is None else min(value, most)
        changes["checkpoint_interval"] = TEST_CHECKPOINT_INTERVAL
    return replace(config, **changes), device


def autocast(config, device: torch.device, sampling: bool = False):
    """Matrix products in `precision`.

    Sampling on a CPU is in float32: ever new small shapes make bfloat16 slow there.
    """
    enabled = config.precision != "float32" and not (sampling and device.type == "cpu")
    return torch.autocast(device.type, getattr(torch, config.precision), enabled=enabled)


def next_log_probs(logits, config) -> torch.Tensor:
    """Log-probs of each row's next token at the temperature.

    (rows, tokens, vocabulary) -> (rows, vocabulary).
    """
    return (logits[:, -1].float() / config.temperature).log_softmax(-1)


def check_finite(log_probs, config) -> None:
    """End the program with a line where sampled log-probs are NaN."""
    if log_probs.isnan().any():
        fail(
            f"the model's logits are not finite in --precision {config.precision}; "
            "take --precision bfloat16 or float32, a higher --temperature or a lower --lr; "
            "the last checkpoint is untouched"
        )


def load_pretrained(name: str, config, device: torch.device, trainable: bool):
    """A causal LM without dropout, which would give one policy two log-probs for a token.

    Float32 where its weights are trained: bfloat16 would swallow small updates. Else half
    precision or 4-bit.
    """
    half = getattr(torch, config.precision)
    double = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": half}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **double)
    model_config = load_model_config(name)
    for key, value in model_config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(model_config, key, 0.0)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            config=model_config,
            dtype=torch.float32 if trainable else half,
            attn_implementation=choose_attention(config, model_config),
            quantization_config=nf4 if config.load_in_4bit else None,
            device_map={"": device},
            output_loading_info=True,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        fail_to_load(name, error)
    check_model(name, model, report["missing_keys"])
    if device.type == "cpu":
        align_weights(model)
    return model


def load_model_config(name: str):
    """The config of a model, where it is a causal LM that the loss can be taken of."""
    try:
        model_config = AutoConfig.from_pretrained(name)
    except Exception as error:
        fail_to_load(name, error)
    architectures = model_config.architectures or []
    heads = ("CausalLM", "LMHead", "ConditionalGeneration")
    is_causal = not architectures or any(head in architectures[0] for head in heads)
    if not is_causal or getattr(model_config, "is_encoder_decoder", False):
        fail(f"--model-name {name}: {architectures} is no causal language model")
    for key in ("logit_scale", "logits_scaling"):  # Cohere, Granite
        if getattr(model_config.get_text_config(), key, None) not in (None, 1, 1.0):
            reason = f"models that scale their logits ({key}) are not supported"
            fail(f"--model-name {name}: {reason}")
    return model_config


def check_model(name: str, model, missing_keys) -> None:
    """Refuse a model that lacks weights, which would be random, or that holds NaN or infinity."""
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos or 0]
    if not all(isinstance(number, int) for number in ends):
        fail(f"--model-name {name}: eos_token_id must be a number or a list of them, is {eos!r}")
    if missing_keys:
        some = ", ".join(sorted(missing_keys)[:3])
        fail(f"--model-name {name}: {len(missing_keys)} weights are missing, such as {some}")
    key = weight_that_is_not_finite(model)
    if key:
        fail(f"--model-name {name}: the weight {key} holds NaN or infinity")


def weight_that_is_not_finite(model) -> str:
    """The name of the first weight that holds NaN or infinity; "" where none does."""
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            return key
    return ""


def align_weights(model) -> None:
    """Give every weight memory of its own, at an address that allocators choose.

    A float32 weight may lie in the mapped file, at any address. Matrix products round otherwise
    there, and a run that is resumed from its own checkpoint would leave the uninterrupted one.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def load_tokenizer(config):
    """The model's tokenizer, which must fit its model and have a chat template.

    An adapter that was saved without one has that of its base model.
    """
    name = config.model_name
    base = base_model_of(name)
    if base != name and not (Path(name) / "tokenizer_config.json").is_file():
        name = base
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        fail_to_load(name, error)
    if not tokenizer.chat_template:
        advice = "take an instruction-tuned (-Instruct) model"
        fail(f"--model-name {name}: its tokenizer has no chat template; {advice}")
    text_config = load_model_config(base).get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None) or math.inf
    if config.max_length > positions:
        fail(f"--max-length {config.max_length}: {base} has {positions} positions; take fewer")
    if len(tokenizer) > (text_config.vocab_size or 0):
        sizes = f"has {len(tokenizer)} tokens, its model only {text_config.vocab_size}"
        fail(f"--model-name {name}: its tokenizer {sizes}; they do not belong together")
    try:
        text = render_prompt(tokenizer, "SYSTEM", "QUESTION")
        text = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    except Exception as error:  # whatever a template does
        fail(f"--model-name {name}: its chat template cannot be used ({first_line(error)})")
    for part in ("system", "question"):
        if part not in text.lower():
            lost = f"its chat template or tokenizer loses the {part}: {text[:100]!r}"
            fail(f"--model-name {name}: {lost}; a file may be missing")
    if not takes_system_message(tokenizer):
        where = "the system prompt is put before the question"
        print(f"warning: {name}: its chat template drops a system message; {where}", flush=True)
    return tokenizer


def base_model_of(name: str) -> str:
    """The model that an adapter's directory belongs to; any other name as it is."""
    if not (Path(name) / "adapter_config.json").is_file():
        return name
    from peft import PeftConfig

    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except Exception as error:
        fail_to_load(name, error)
    if not base:
        fail(f"--model-name {name}: its adapter_config.json names no base model")
    return base


def read_adapter(name: str, policy, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights in an adapter's directory.

    Raises ValueError where it lacks weights, which would be fresh, or where one holds NaN.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    found = load_peft_weights(name, device=str(device))
    for key in get_peft_model_state_dict(policy):
        if key not in found:
            raise ValueError(f"the weight {key} is missing")
        if not found[key].isfinite().all():
            raise ValueError(f"the weight {key} holds NaN or infinity")
    return found


def fail_to_load(name: str, error: Exception):
    hint = "name a local model by its directory; "
    hint += "for a gated one accept its licence on huggingface.co and `hf auth login`"
    if (Path(name) / "trainer.pt").is_file():
        hint = DAMAGED
    elif Path(name).is_dir():
        hint = "a file in this directory is missing, damaged, or of no model that is known here"
    fail(f"--model-name {name}: cannot be loaded ({hint}): {first_line(error)}")


def render_prompt(tokenizer, system: str, question: str) -> str:
    """The text of a prompt as the chat template writes it, up to where the policy goes on."""
    chat = prompt_messages(system, question, takes_system_message(tokenizer))
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **DATE)


def prompt_messages(system: str, question: str, has_system_message: bool) -> list[dict[str, str]]:
    """A prompt as messages. Without a system message its text stands before the question."""
    if has_system_message:
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return [{"role": "user", "content": f"{system}\n\n{question}"}]


def pattern_of(tokens) -> re.Pattern:
    """Any of these texts; of two that begin alike, the longer one."""
    longest_first = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in longest_first) or "(?!)")


def take_out(pattern: re.Pattern, text: str) -> str:
    """A text without what matches, also where taking one out has joined another."""
    while pattern.search(text):
        text = pattern.sub("", text)
    return text


def takes_system_message(tokenizer) -> bool:
    """Whether the chat template writes a system message, and neither drops nor refuses it."""
    chat = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "."}]
    try:
        return "SYSTEM" in tokenizer.apply_chat_template(chat, tokenize=False, **DATE)
    except Exception:  # jinja2's own or Python's, such as of a sum of a list and a number
        return False


def choose_attention(config, model_config) -> str:
    """flash-attention where it is installed and rows cannot be packed anyway, else torch's own."""
    if config.attention == "flex_attention":
        from flex import register  # torch's compiler takes seconds to import

        return register()
    if config.attention != "auto":
        return config.attention
    has_flash = torch.cuda.is_available() and is_flash_attn_2_available()
    if (
        has_flash
        and config.precision != "float32"
        and not can_pack(model_config, config.max_length)
    ):
        return "flash_attention_2"
    return "sdpa"


def can_pack(model_config, max_length: int) -> bool:
    """Whether packed rows are exact: rotary positions, and attention to all earlier tokens.

    A sliding window is no obstacle where a whole row fits into it. flash-attention takes no mask.
    """
    text_config = model_config.get_text_config()
    window = getattr(text_config, "sliding_window", None)
    layer_types = getattr(text_config, "layer_types", None)
    if not layer_types:
        layer_types = ["sliding_attention" if window else "full_attention"]
    exact = {"full_attention"}
    if not window or window >= max_length:
        exact.add("sliding_attention")
    has_rotary = bool(getattr(text_config, "rope_parameters", None))
    has_alibi = getattr(text_config, "alibi", False)
    takes_a_mask = model_config._attn_implementation != "flash_attention_2"
    return has_rotary and not has_alibi and takes_a_mask and set(layer_types) <= exact


@out_of_memory_names("the size of model_name, or lora_rank")
def load_model(config, device: torch.device, checkpoint: Path | None = None):
    """(policy, reference). The reference is the policy that training began with, also on a resume.

    In full training it is a frozen copy. It is None without a KL term, and with LoRA, where the
    policy itself serves (see `as_reference`). checkpoint: of the policy, where a run is resumed.
    """
    torch.manual_seed(config.seed)  # of LoRA's first weights
    base = base_model_of(config.model_name)
    lora = base != config.model_name or config.lora_rank > 0
    name = str(checkpoint) if checkpoint and not lora else base
    policy = load_pretrained(name, config, device, trainable=not lora)
    reference = None
    if lora:
        policy = add_adapter(policy, config, is_saved=base != config.model_name)
        if checkpoint:
            load_adapter(policy, checkpoint, device)
    elif config.kl_weight:
        reference = load_pretrained(base, config, device, trainable=True)
        reference.requires_grad_(False).eval()
        halve_linear_layers(reference, config)
    if config.gradient_checkpointing:
        arguments = {"use_reentrant": False}
        unwrap(policy).activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    if device.type != "cpu":
        let_autocast_cast(policy)
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):  # an adapter brings its own
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack its weights in the first eval pass, and then no gradient
            # comes through them.
            module.support_avx512bf16_for_cpu = False
    return policy.eval(), reference


def halve_linear_layers(reference, config) -> None:
    """Hold the decoder's linear layers in half precision where autocast takes their products in
    half precision anyway. The products are the same, and the reference needs half the memory."""
    if config.precision == "float32":
        return
    for module in reference.get_decoder().modules():
        if isinstance(module, torch.nn.Linear):
            module.to(getattr(torch, config.precision))


def let_autocast_cast(policy) -> None:
    """Keep LoRA layers from casting their input to float32, only for autocast to cast it back.

    The bits are the same. Not on a CPU, where sampling runs without autocast.
    """
    for module in policy.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def add_adapter(policy, config, is_saved: bool):
    """The policy with a LoRA adapter: a fresh one, or the saved one that model_name is.

    Of a saved one there is a second copy, which is the reference.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if not is_saved:
        rank = config.lora_rank
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        return get_peft_model(policy, adapter)
    if config.lora_rank:
        print(f"--lora-rank is not used: {config.model_name} is an adapter, with its own rank")
    try:
        policy = PeftModel.from_pretrained(policy, config.model_name, is_trainable=True)
        policy.load_adapter(config.model_name, "reference")
        read_adapter(config.model_name, policy, policy.device)  # PEFT only warns of what is missing
    except Exception as error:
        fail_to_load(config.model_name, error)
    return policy


def load_adapter(policy, checkpoint: Path, device: torch.device) -> None:
    """Give the adapter the weights that a checkpoint has of it."""
    from peft import set_peft_model_state_dict

    try:
        set_peft_model_state_dict(policy, read_adapter(str(checkpoint), policy, device))
    except Exception as error:
        fail_to_load(str(checkpoint), error)


def unwrap(policy):
    """The transformers model inside a PEFT model, its LoRA layers in place."""
    return policy.get_base_model() if hasattr(policy, "peft_config") else policy


@contextmanager
def as_reference(policy, reference):
    """The reference: its frozen copy, or the policy with the adapter that training began from.

    Training with LoRA that began from no adapter has the policy without adapter as reference.
    """
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
    """AdamW over what trains, without weight decay; adamw8bit keeps its two moments in 8 bits.

    A resumed run brings the optimizer's state; the learning rate is the config's all the same.
    """
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


def make_scaler(config, device: torch.device, state: dict | None = None):
    """For float16, whose small gradients would vanish: the loss is multiplied by a large number.

    In every other precision scaler.scale(loss) is the loss.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    if state:
        scaler.load_state_dict(state)
    return scaler


def optimizer_step(policy, optimizer, scaler, config) -> float:
    """One update: scale a gradient longer than `max_norm` down to it, step, clear the gradient.

    An update whose gradient is not finite is skipped: one NaN would make every weight NaN.
    Returns the gradient's norm before it is scaled down.
    """
    scaler.unscale_(optimizer)  # before clipping, whose bound is in the loss's own scale
    max_norm = config.max_norm or math.inf  # 0: no clipping
    norm = clip_grad_norm_(policy.parameters(), max_norm)
    if hasattr(norm, "full_tensor"):  # of weights that processes hold in parts (FSDP)
        norm = norm.full_tensor()
    norm = norm.item()
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has used so far, in GiB: of the CUDA device, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )


def find_eos_ids(policy, tokenizer) -> set[int]:
    """Every id that ends a turn. The tokenizer knows one, a chat model's generation config more."""
    more = policy.generation_config.eos_token_id
    if not isinstance(more, list):
        more = [more]
    return {tokenizer.eos_token_id, *more} - {None}
