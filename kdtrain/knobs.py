"""The knobs of the loss that GKDConfig has no field for, as the trainer reads them from its arguments.

They arrive as attributes that were set on a GKDConfig after it was built, so that its constructor never sees them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from kdtrain.losses.divergence import Divergence, check_divergence_arguments
from kdtrain.losses.topk import Tail
from kdtrain.losses.visual import Distance


@dataclass(frozen=True)
class VisualTargetKnobs:
    """One feature target: its weight, its distance, and the module path in each model."""

    weight: float
    distance: Distance
    student_module: str
    teacher_module: str


@dataclass(frozen=True)
class VisualKnobs:
    """Visual-feature KD that is switched on."""

    weight: float
    targets: Mapping[str, VisualTargetKnobs]

    def module_paths(self, side: str) -> dict[str, str]:
        """Target name -> module path of "student" or "teacher"."""
        return {name: getattr(target, f"{side}_module") for name, target in self.targets.items()}


@dataclass(frozen=True)
class Knobs:
    """Weights and options of the loss, resolved."""

    llm_kd_weight: float = 1.0
    sft_alpha: float = 0.0
    divergence: Divergence = "jsd"
    kd_temperature: float = 1.0
    eval_kd: bool = True
    tail: Tail = "bucket"
    visual_kd: VisualKnobs | None = None

    @classmethod
    def from_args(cls, args: Any) -> Knobs:
        """Read the attributes of a GKDConfig; absent ones have their default.

        Raises:
            ValueError: a value out of range.
        """
        knobs = cls(
            llm_kd_weight=getattr(args, "llm_kd_weight", 1.0),
            sft_alpha=getattr(args, "sft_alpha", 0.0),
            divergence=getattr(args, "divergence", "jsd"),
            kd_temperature=getattr(args, "kd_temperature", 1.0),
            eval_kd=getattr(args, "eval_kd", True),
            tail=getattr(args, "tail", "bucket"),
            visual_kd=_visual_knobs(getattr(args, "visual_kd", None)),
        )
        for name in ("llm_kd_weight", "sft_alpha"):
            value = getattr(knobs, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be non-negative and finite, got {value}")
        check_divergence_arguments(args.beta, knobs.kd_temperature, knobs.divergence)
        if not 0 <= args.lmbda <= 1:
            raise ValueError(f"lmbda must be in [0, 1], got {args.lmbda}")
        return knobs

    @property
    def lm_kd_active(self) -> bool:
        return self.llm_kd_weight > 0

    @property
    def needs_teacher(self) -> bool:
        return self.lm_kd_active or self.visual_kd is not None

    @property
    def ce_weight(self) -> float:
        """c: `sft_alpha` beside LM KD; 1 without it, where CE is the only thing the language model learns from."""
        return self.sft_alpha if self.lm_kd_active else 1.0

    def without_kd(self) -> Knobs:
        """The same run with every teacher term off: CE only."""
        return replace(self, llm_kd_weight=0.0, visual_kd=None)


def _visual_knobs(value: Any) -> VisualKnobs | None:
    """From None, an object or a mapping with `enabled`, `weight`, `distance` and `targets`; None where it is off."""
    if value is None:
        return None
    enabled, weight = _get(value, "enabled", True), _get(value, "weight", 1.0)
    if weight < 0:
        raise ValueError(f"visual_kd.weight must be non-negative, got {weight}")
    if not enabled or weight == 0:
        return None
    distance = _get(value, "distance", "mse")
    targets = _get(value, "targets", None) or {}
    return VisualKnobs(weight, {name: _visual_target(name, target, distance) for name, target in targets.items()})


def _visual_target(name: str, target: Any, distance: Distance) -> VisualTargetKnobs:
    module = _get(target, "module", None)
    student, teacher = _get(target, "student_module", module), _get(target, "teacher_module", module)
    if student is None or teacher is None:
        raise ValueError(f"visual_kd target {name!r} needs `module`, or `student_module` and `teacher_module`")
    weight = _get(target, "weight", 1.0)
    if weight < 0:
        raise ValueError(f"visual_kd target {name!r}: weight must be non-negative, got {weight}")
    distance = _get(target, "distance", None) or distance
    if distance not in get_args(Distance):
        raise ValueError(f"visual_kd target {name!r}: distance must be one of {get_args(Distance)}, got {distance!r}")
    return VisualTargetKnobs(weight, distance, student, teacher)


def _get(value: Any, name: str, default: Any) -> Any:
    return value.get(name, default) if isinstance(value, Mapping) else getattr(value, name, default)
