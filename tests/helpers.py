"""What the tests share: loading an experiment in isolation,
small models of the real architectures, tokenizers."""

import importlib
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted({path.stem for path in ROOT.glob("experiment_*/*.py")})
POLICY = ROOT / "data" / "policy_math"


def load_experiment(name: str = "experiment_base") -> SimpleNamespace:
    """The modules of an experiment by name, loaded once:
    with and without the default the cache would hold two."""
    return import_modules(name)


@cache
def import_modules(name: str) -> SimpleNamespace:
    names = [module for module in MODULES if (ROOT / name / f"{module}.py").exists()]
    with without_modules():
        sys.path.insert(0, str(ROOT / name))
        return SimpleNamespace(**{module: importlib.import_module(module) for module in names})


def load_benchmark(name: str):
    """A script of benchmarks/ as a module."""
    with without_modules():
        sys.path.insert(0, str(ROOT / "benchmarks"))
        return importlib.import_module(name)


@contextmanager
def without_modules():
    """Every experiment has a `train`, so none may stay in sys.modules."""
    saved = {module: sys.modules.pop(module) for module in MODULES if module in sys.modules}
    path = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        for module in MODULES:
            sys.modules.pop(module, None)
        sys.modules.update(saved)


SIZES = dict(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
)
ARCHITECTURES = {
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-untied": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    # windows that hold a whole row (packed) and windows that do not (one completion a row)
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=256, layer_types=["sliding_attention", "full_attention"]
    ),
    "gemma3-short-window": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}


def make_model(architecture: str = "qwen2", attention: str = "sdpa", seed: int = 0):
    """A small model of a real architecture with random float32 weights,
    as large as makes its log-probs differ."""
    torch.manual_seed(seed)
    config = ARCHITECTURES[architecture]()
    config._attn_implementation = attention
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 0, None
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    ).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else None
    return model.eval()


def embedded_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(POLICY)


def chat_template(name: str) -> str:
    """A real chat template that the trl package ships:
    qwen2_5, qwen3, llama3_2, phi3_5, gemma3, ..."""
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
