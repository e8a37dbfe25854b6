"""`kdtrain env`: what is installed and what the devices can do, without importing torch."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
from typing import Any

logger = logging.getLogger("kdtrain")

_PACKAGES = ("kdtrain", "torch", "trl", "transformers", "accelerate", "peft", "datasets", "safetensors", "pydantic")
_OPTIONAL = {
    "pillow": "vision",
    "torchvision": "torchvision",
    "matplotlib": "report",
    "bitsandbytes": "quant",
    "deepspeed": "training.deepspeed",
    "flash-attn": "model.attn_implementation",
    "vllm": "rlhf.generation.backend",
    "tensorboard": "training.report_to",
    "wandb": "training.report_to",
}
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
_VARIABLES = ("HF_HUB_OFFLINE", "HF_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def environment() -> dict[str, Any]:
    """Versions, devices, optional parts and variables; a secret is only ever "set" or "unset"."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) or "not installed" for name in _PACKAGES},
        "optional": {name: _version(name) or f"not installed ({used_by})" for name, used_by in _OPTIONAL.items()},
        "devices": gpus() or ["cpu: float32"],
        "secrets": {name: "set" if os.environ.get(name) else "unset" for name in _SECRETS},
        "variables": {name: os.environ.get(name, "unset") for name in _VARIABLES},
    }


def gpus() -> list[str]:
    """Name, memory and number types of each NVIDIA device, as `nvidia-smi` lists them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    devices = []
    for line in output.strip().splitlines():
        name, memory, capability = (part.strip() for part in line.split(","))
        types = "float32, float16, bfloat16" if float(capability) >= 8 else "float32, float16"
        devices.append(f"{name}: {memory}, {types}")
    return devices


def visible_gpus() -> int:
    """Number of NVIDIA devices that CUDA_VISIBLE_DEVICES leaves visible."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([device for device in chosen.split(",") if device.strip() not in ("", "-1")])
    return len(gpus())


def warn_of_unseen_gpus() -> None:
    """Say that training runs on the CPU of a machine with GPUs, which a CPU build of torch would do without a word."""
    import torch

    if visible_gpus() and not torch.cuda.is_available():
        logger.warning(
            "nvidia-smi lists GPUs (%s), and torch %s sees none of them: this runs on the CPU. Install a torch for "
            "CUDA %s.",
            "; ".join(gpus()) or "CUDA_VISIBLE_DEVICES",
            torch.__version__,
            "and a newer driver" if torch.version.cuda else "(https://pytorch.org/get-started)",
        )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
