"""Hidden-state KD: layers of the student's language model beside layers of the teacher's.

A depth f of a model with L layers is its layer round(f·L), a half upwards, and at least the first one; what is compared
is that layer's output. 1.0 is the output of the last layer, before the final norm. So models with different numbers of
layers are compared at the same depths.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from kdtrain.config.section import Flag, NonNegative, Number, Section, wrong
from kdtrain.losses.kinds import Distance

HIDDEN_TERM = "hidden_kd_loss"
"""The term's name in the log; that of a layer has its depth behind it."""

Depth = Annotated[Number, Field(gt=0, le=1)]


def _depths(value: Any) -> Any:
    """Several, or a single one."""
    depths = [value] if isinstance(value, int | float) else value
    if not isinstance(depths, list | tuple):
        raise wrong("expected depths, such as [0.33, 0.66, 1.0]: shares of the layers")
    names = [f"{depth:g}" for depth in depths if isinstance(depth, int | float)]
    if len(set(names)) < len(names):
        raise wrong("the same depth is listed twice")
    return tuple(depths)


class HiddenTargets(Section):
    """What of the language model is compared."""

    layer: Annotated[tuple[Depth, ...], BeforeValidator(_depths)] = (0.33, 0.66, 1.0)
    """Layers whose outputs are compared, as shares of the layers, the same in both models. Of L layers f is layer
    round(f·L), at least the first; 1.0 is the last one's output, before the final norm."""


class HiddenKdConfig(Section):
    """Distillation of the language model's hidden states, for text as well. Needs a teacher in this process."""

    enabled: Flag = False
    """Whether the term is computed at all."""
    weight: NonNegative = 1.0
    """Multiplies the mean over the layers."""
    distance: Distance = "mse"
    """Mean squared error over the features, or 1 - cosine; of each supervised token, where it is predicted."""
    targets: HiddenTargets = HiddenTargets()
    """The layers."""

    @field_validator("targets")
    @classmethod
    def _some(cls, value: HiddenTargets, info: ValidationInfo) -> HiddenTargets:
        if not value.layer and info.data.get("enabled"):
            raise wrong("no layer to compare: name depths such as layer: [0.5, 1.0], or set enabled: false")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """What the log calls the parts of the layers, in their order; they add up to the term."""
        return tuple(f"{HIDDEN_TERM}_layer_{depth:g}" for depth in self.targets.layer)

    def in_force(self) -> HiddenKdConfig | None:
        """What is computed: None where it is switched off or weighs nothing."""
        return self if self.enabled and self.weight > 0 and self.targets.layer else None


def layer_number(depth: float, layers: int) -> int:
    """The layer at a depth, counted from 1. In whole numbers, so that it is the same on every machine."""
    return max(1, int(Fraction(str(depth)) * layers + Fraction(1, 2)))
