"""The visual terms of a batch: which modules are tapped, and how the terms share the window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kdtrain.knobs import VisualKnobs
from kdtrain.losses.visual import feature_distance
from kdtrain.vision.hooks import capture


@contextmanager
def tapped(
    visual: VisualKnobs | None, student: nn.Module, teacher: nn.Module | None
) -> Iterator[tuple[Mapping[str, list[torch.Tensor]], Mapping[str, list[torch.Tensor]]]]:
    """Capture both models' features on the forward passes inside; nothing where visual KD is off."""
    with contextlib.ExitStack() as hooks:
        if visual is None or teacher is None:
            yield {}, {}
            return
        yield (
            hooks.enter_context(capture(student, visual.module_paths("student"), "student")),
            hooks.enter_context(capture(teacher, visual.module_paths("teacher"), "teacher")),
        )


def visual_terms(
    visual: VisualKnobs,
    student: Mapping[str, list[torch.Tensor]],
    teacher: Mapping[str, list[torch.Tensor]],
    share: torch.Tensor | float,
) -> dict[str, torch.Tensor]:
    """weight · weight_t · distance_t per target and their sum, each scaled to the batch's share of the window."""
    terms = {}
    for target, options in visual.targets.items():
        distance = feature_distance(student[target], teacher[target], options.distance, target)
        terms[f"vision_kd_loss_{target}"] = visual.weight * options.weight * share * distance
    terms["vision_kd_loss"] = torch.stack(list(terms.values())).sum()
    return terms


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch carries pixels."""
    return any(key.startswith("pixel_values") and value is not None for key, value in inputs.items())


def visual_units(batch: Mapping[str, Any]) -> float:
    """What a mean over image features weighs a batch by: patches where the batch says how many, images elsewhere."""
    units = 0.0
    for key in ("image_grid_thw", "video_grid_thw"):
        if batch.get(key) is not None:
            units += float(batch[key].prod(-1).sum())
    if units:
        return units
    images = (value for key, value in batch.items() if key.startswith("pixel_values") and value is not None)
    return float(sum(len(value) for value in images))
