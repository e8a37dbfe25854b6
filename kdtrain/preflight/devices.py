"""What the machine has: memory of a device, free disk."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch

_CGROUP = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def device_memory(device: torch.device, processes: int) -> int | None:
    """Bytes that a process has for itself: all of a GPU, or its share of what is free on the CPU; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    free = [found for found in (_available(), _left_in_container()) if found is not None]
    return min(free) // processes if free else None


def free_disk(folder: Path) -> int:
    """Bytes that can be written at a folder, which need not be there yet."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _available() -> int | None:
    """Linux's own estimate of what a program can have without swapping."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_container() -> int | None:
    for limit, used in _CGROUP:
        with suppress(OSError, ValueError):  # "max" is no number
            return max(int(limit.read_text()) - int(used.read_text()), 0)
    return None
