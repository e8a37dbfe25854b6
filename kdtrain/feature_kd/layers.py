"""The layers of a model's language model, and those that are compared with another model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kdtrain.config.hidden_kd import layer_number
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.taps import LAYER, named, section_of
from kdtrain.models.layouts import Tap, model_type, unwrapped
from kdtrain.models.probe import Side


@dataclass(frozen=True)
class Layers:
    """Where a model's language model has its layers."""

    path: str
    """Of the list of them, in the model without wrappers."""
    count: int
    width: int
    """Of the hidden states."""

    def tap(self, number: int) -> Tap:
        """The output of a layer, counted from 1."""
        return Tap(f"{self.path}.{number - 1}", "output", explicit=True)


@dataclass(frozen=True)
class LayerPair:
    """Two layers at the same depth, counted from 1."""

    depth: float
    student: int
    teacher: int


def find_layers(model: nn.Module, side: Side) -> Layers:
    """The one list of modules in a model's decoder that is as long as its config has layers, nearest to its top.

    Raises:
        PreflightError: there is none, or several.
    """
    base: Any = unwrapped(model)
    kind = f"{named(LAYER)}: the {side} is a {type(base).__name__} of model type {model_type(model)!r}"
    config = base.config.get_text_config(decoder=True)
    count, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    names = {id(module): name for name, module in base.named_modules()}
    found = [
        (name.count("."), name)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    nearest = [name for depth, name in found if depth == min(found)[0]]
    if count is None or width is None or len(nearest) != 1:
        what = f"{len(nearest)} lists of {count} modules" if nearest else f"no list of {count} modules"
        raise PreflightError(
            f"{kind}, whose layers cannot be told: {what} in its decoder. Disable {section_of(LAYER)}."
        )
    path = names[id(decoder.get_submodule(nearest[0]))]
    return Layers(path, count, width)


def pair_layers(depths: Sequence[float], student: Layers, teacher: Layers) -> list[LayerPair]:
    """The layers of both models at each depth."""
    return [
        LayerPair(depth, layer_number(depth, student.count), layer_number(depth, teacher.count)) for depth in depths
    ]
