"""Where and with what the numbers were measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "trl", "transformers", "liger-kernel", "kdtrain")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system, versions and date; a GPU where there is one. Nothing that names the host."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "os": f"{_system()}, Python {platform.python_version()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "blas": "MKL" if torch.backends.mkl.is_available() else "no MKL",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    # Major and minor number of the kernel only: the rest is a local name.
    return f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {name}".strip()


def _cpu_model() -> str:
    """Model and, since virtual machines often hide it, family, widest vectors and matrix units."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        model += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    units = ", AMX" if "amx_tile" in fields.get("flags", "").split() else ""
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}{units}"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--tags"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
