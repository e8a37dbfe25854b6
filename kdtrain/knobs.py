"""The options of the loss and of the sampling, as the trainer reads them from its arguments.

Those that GKDConfig has no field for arrive as attributes that were set on it after it was built, so that its
constructor never sees them. They live in one object, a new one for each change: `trainer.beta = 1.0` in a callback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, get_args

from kdtrain.losses.divergence import Divergence, check_divergence_arguments
from kdtrain.losses.topk import Tail
from kdtrain.losses.visual import Distance, Match


@dataclass(frozen=True)
class VisualTargetKnobs:
    """One feature target: its weight and distance, and what is done where token counts differ.

    The modules are paths, one for each model; None is what the layout table says about the model's family.
    """

    weight: float = 1.0
    distance: Distance = "mse"
    student_module: str | None = None
    teacher_module: str | None = None
    match: Match = "exact"


@dataclass(frozen=True)
class VisualKnobs:
    """Visual-feature KD that is switched on."""

    weight: float
    targets: Mapping[str, VisualTargetKnobs]


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
    beta: float = 0.5
    lmbda: float = 0.5
    temperature: float = 0.9
    """Of the sampling; that of the loss is `kd_temperature`."""
    seq_kd: bool = False

    @classmethod
    def from_args(cls, args: Any) -> Knobs:
        """Read the attributes of a GKDConfig; absent ones have their default.

        Raises:
            ValueError: a value out of range.
        """
        names = [field.name for field in fields(cls) if field.name != "visual_kd" and hasattr(args, field.name)]
        given = {name: getattr(args, name) for name in names}
        return cls(**given, visual_kd=_visual_knobs(getattr(args, "visual_kd", None))).checked()

    def checked(self) -> Knobs:
        """These options.

        Raises:
            ValueError: a value is out of range.
        """
        for name in ("llm_kd_weight", "sft_alpha", "beta", "kd_temperature", "lmbda", "temperature"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.seq_kd, bool):
            raise ValueError(f"seq_kd must be true or false, got {self.seq_kd!r}")
        for name in ("llm_kd_weight", "sft_alpha"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be non-negative and finite, got {value}")
        check_divergence_arguments(self.beta, self.kd_temperature, self.divergence)
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"lmbda must be in [0, 1], got {self.lmbda}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature (of the sampling) must be positive and finite, got {self.temperature}")
        return self

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


class LiveOption:
    """An attribute of a trainer that is a field of its `knobs`: what a callback sets, the next window uses."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type) -> Any:
        return self if trainer is None else getattr(trainer.knobs, self._name)

    def __set__(self, trainer: Any, value: Any) -> None:
        trainer.knobs = replace(trainer.knobs, **{self._name: value})


_VISUAL_KEYS = ("enabled", "weight", "distance", "targets")
_TARGET_KEYS = ("weight", "distance", "module", "student_module", "teacher_module", "match")
_TARGETS = ("vit", "aligner", "deepstack")


def _visual_knobs(value: Any) -> VisualKnobs | None:
    """From None, an object or a mapping with `enabled`, `weight`, `distance` and `targets`; None where it is off.

    `targets` is a list of names or a map of options; one of weight 0 is not computed.
    """
    if value is None:
        return None
    _check_keys(value, _VISUAL_KEYS, "visual_kd")
    enabled, weight = _get(value, "enabled", True), _weight(value, "visual_kd")
    if not enabled or weight == 0:
        return None
    distance = _get(value, "distance", "mse")
    targets = _get(value, "targets", ["aligner"])
    if not isinstance(targets, Mapping):
        targets = dict.fromkeys(targets)
    if not targets:
        raise ValueError(f"visual_kd has no targets: name some of {', '.join(_TARGETS)}, or set enabled: false.")
    knobs = {name: _visual_target(name, {} if target is None else target, distance) for name, target in targets.items()}
    active = {name: target for name, target in knobs.items() if target.weight > 0}
    return VisualKnobs(weight, active) if active else None


def _visual_target(name: str, target: Any, distance: Distance) -> VisualTargetKnobs:
    where = f"visual_kd target {name!r}"
    if name not in _TARGETS:
        raise ValueError(f"{where}: the targets are {', '.join(_TARGETS)}.")
    _check_keys(target, _TARGET_KEYS, where)
    module = _get(target, "module", None)
    knobs = VisualTargetKnobs(
        weight=_weight(target, where),
        distance=_get(target, "distance", distance),
        student_module=_get(target, "student_module", module),
        teacher_module=_get(target, "teacher_module", module),
        match=_get(target, "match", "exact"),
    )
    for option, choices in (("distance", get_args(Distance)), ("match", get_args(Match))):
        if getattr(knobs, option) not in choices:
            raise ValueError(f"{where}: {option} must be one of {choices}, got {getattr(knobs, option)!r}")
    return knobs


def _weight(value: Any, where: str) -> float:
    weight = _get(value, "weight", 1.0)
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"{where}: weight must be non-negative and finite, got {weight}")
    return weight


def _check_keys(value: Any, known: Sequence[str], where: str) -> None:
    unknown = [str(key) for key in value if key not in known] if isinstance(value, Mapping) else []
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; the options are {', '.join(known)}.")


def _get(value: Any, name: str, default: Any) -> Any:
    """An option of a mapping or an object; the default also where it is None."""
    found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
    return default if found is None else found
