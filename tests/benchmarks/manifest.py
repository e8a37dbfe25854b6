"""What the manifest adds to saving a checkpoint: reading every file again, to hash it.

A save is what a run of full fine-tuning writes: weights by safetensors, Adam's two moments by torch.save, and all of it
brought onto the disk.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kdtrain.runs.manifest import write_manifest

_TENSORS = 16


@dataclass(frozen=True)
class ManifestCase:
    """A checkpoint with so many bytes of float32 weights, and twice as many of Adam's moments."""

    weights: int = 2**30

    def __str__(self) -> str:
        return f"{self.weights / 2**30:g} GiB of weights, with Adam's moments"


CASES = [ManifestCase()]


def measure(case: ManifestCase, rounds: int) -> dict[str, Any]:
    """Seconds of a save, of bringing it onto the disk, and of the manifest; medians."""
    torch.manual_seed(0)
    weights = {str(i): torch.randn(case.weights // 4 // _TENSORS) for i in range(_TENSORS)}
    moments = {name: {"exp_avg": weight * 0.1, "exp_avg_sq": weight**2} for name, weight in weights.items()}
    found: dict[str, list[float]] = {"save_s": [], "sync_s": [], "manifest_s": []}
    with tempfile.TemporaryDirectory() as name:
        checkpoint = Path(name) / "checkpoint-1"
        checkpoint.mkdir()

        def save() -> None:
            save_file(weights, checkpoint / "model.safetensors")
            torch.save(moments, checkpoint / "optimizer.pt")

        def sync() -> None:
            for path in checkpoint.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

        def manifest() -> None:
            write_manifest(checkpoint, step=1, world_size=1, finite=True)

        for _ in range(rounds):
            for key, what in (("save_s", save), ("sync_s", sync), ("manifest_s", manifest)):
                found[key].append(_seconds(what))
    medians = {key: statistics.median(values) for key, values in found.items()}
    shares = [m / (s + y + m) for s, y, m in zip(*(found[k] for k in ("save_s", "sync_s", "manifest_s")), strict=True)]
    return {"case": vars(case), "title": str(case), **medians, "share": statistics.median(shares)}


def _seconds(what: Callable[[], None]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began
