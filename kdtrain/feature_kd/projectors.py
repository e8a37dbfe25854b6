"""Learned linear layers from the student's feature width to the teacher's.

They belong to the run and not to the student: its optimizer trains them and they are saved beside the model, but they
never become a part of what is exported. Under FSDP and DeepSpeed they are put into the model for the training, so that
what is done with its weights and gradients there is done with theirs.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from kdtrain.config.options import VisualKdConfig
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.hooks import Features
from kdtrain.feature_kd.taps import SECTION, named
from kdtrain.models.pieces import full_tensor


class Projector(nn.Linear):
    """A linear layer that computes in float32, whatever its weights are held in, and whether or not in pieces."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        weight, bias = full_tensor(self.weight), full_tensor(self.bias)
        return functional.linear(features.float(), weight.float(), bias.float())


def build_projectors(wanted: VisualKdConfig, student: Features, teacher: Features, seed: int) -> nn.ModuleDict:
    """A linear layer for every target and level whose widths differ, in float32.

    The weights depend on the seed and the name only, so all ranks have the same ones, and the global random state is
    left as it is.
    """
    student_widths, teacher_widths = feature_widths(student), feature_widths(teacher)
    projectors = nn.ModuleDict()
    for target in wanted.targets:
        pairs = list(zip(student_widths[target], teacher_widths[target], strict=True))
        device = student[target][0][0].device
        projectors.update(dict(linear_projectors(target, pairs, seed).to(device).items()))
    return projectors


def linear_projectors(target: str, widths: Sequence[tuple[int, int]], seed: int) -> nn.ModuleDict:
    """One for each level of a target at which the widths of student and teacher differ."""
    projectors = nn.ModuleDict()
    for level, (width, teacher_width) in enumerate(widths):
        if width != teacher_width:
            name = projector_name(target, level, len(widths))
            projectors[name] = _linear(width, teacher_width, seed, name)
    return projectors


def feature_widths(features: Features) -> dict[str, list[int]]:
    """Target -> width of every level, as a forward produced them: configs do not say it for every family."""
    for target, levels in features.items():
        if not all(levels):
            raise PreflightError(
                f"{named(target)}: a batch with images fired no module of this target, so the width of its features is "
                f"not known. Check the modules set in {SECTION}.targets."
            )
    return {target: [passes[0].shape[-1] for passes in levels] for target, levels in features.items()}


def projector_name(target: str, level: int, levels: int) -> str:
    """The target's name, with the level behind it where there are several."""
    return target if levels == 1 else f"{target}_{level}"


def _linear(width: int, wanted: int, seed: int, name: str) -> Projector:
    linear: Projector = torch.nn.utils.skip_init(Projector, width, wanted, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(width)  # as nn.Linear's own
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)
    return linear
