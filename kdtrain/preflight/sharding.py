"""Which of a run's parts its devices share: plain data parallelism, FSDP, DeepSpeed's ZeRO."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from kdtrain.config import RunConfig
from kdtrain.config.launching import launching, read_map

Kind = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]


DEEPSPEED_BUCKET = 500_000_000
"""Numbers of the buffer in which DeepSpeed adds up gradients over the devices, unless its config says otherwise."""


class Divided(NamedTuple):
    """By how many devices each part is divided."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    is_ddp: bool


@dataclass(frozen=True)
class Sharding:
    """How the devices of a run share its parts."""

    kind: Kind = "ddp"
    teacher_in_pieces: bool | None = None
    """None is as the student's weights are."""
    bucket: int = 0
    """Numbers of DeepSpeed's buffer of gradients; 0 without DeepSpeed."""

    def divided(self, world: int, micro_batches: int = 1) -> Divided:
        """For so many devices. FSDP 2 keeps whole gradients from a micro-batch to the next, and reduces the last."""
        whole = self.kind in ("zero3", "fsdp")
        in_pieces = (whole and not (self.kind == "fsdp" and micro_batches > 1)) or self.kind == "zero2"
        of_teacher = whole if self.teacher_in_pieces is None else self.teacher_in_pieces
        return Divided(
            weights=world if whole else 1,
            gradients=world if in_pieces else 1,
            optimizer=world if self.kind != "ddp" else 1,
            teacher=world if of_teacher else 1,
            is_ddp=self.kind == "ddp",
        )

    def weight_scale(self, autocast: torch.dtype | None) -> float:
        """DeepSpeed holds weights and gradients in half precision, and a float32 copy beside the optimizer's states."""
        return 0.5 if self.kind.startswith("zero") and autocast is not None else 1.0


def sharding_of(config: RunConfig) -> Sharding:
    """What `training.deepspeed`, `training.fsdp` or accelerate's own file say."""
    training, of_launch = config.training, launching(config)
    if training.get("deepspeed"):
        return _zero(_map(training["deepspeed"]))
    if training.get("fsdp"):
        return Sharding("fsdp")
    if of_launch.kind == "FSDP":
        return Sharding("fsdp")
    if of_launch.kind == "DEEPSPEED":
        options = of_launch.of_file.get("deepspeed_config") or {}
        nested = options.get("deepspeed_config_file")
        return _zero(_map(nested) if nested else {"zero_optimization": {"stage": options.get("zero_stage", 2)}})
    return Sharding()


def _zero(options: Mapping[str, Any]) -> Sharding:
    stage = (options.get("zero_optimization") or {}).get("stage", 0)
    kinds: dict[Any, Kind] = {1: "zero1", 2: "zero2", 3: "zero3"}
    if stage not in kinds:
        return Sharding()
    bucket = (options.get("zero_optimization") or {}).get("reduce_bucket_size", DEEPSPEED_BUCKET)
    return Sharding(kinds[stage], bucket=int(bucket) if isinstance(bucket, int | float) else 0)


def _map(value: Any) -> dict[str, Any]:
    """A map, or what the file of that name holds; empty where there is none, which others refuse."""
    if isinstance(value, dict):
        return value
    file = Path(str(value))
    if file.suffix != ".json":
        return read_map(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
