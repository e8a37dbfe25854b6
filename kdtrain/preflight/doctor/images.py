"""Whether the teacher has seen the image: its targets must be others where the image is another.

A teacher that is served the text alone, or whose projector is broken, gives a distribution all the same: that of a
model which guesses what the picture shows, and the student learns to guess.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.batch import Batch
from kdtrain.models.probe import OPTION_OF
from kdtrain.preflight.context import context_kl
from kdtrain.teachers.base import Teacher, targets_of

# Nats per token: a teacher that names what it sees moves by whole nats at the word that says it.
_HARDLY = 1e-3
_FEW_TOKENS = 8


def image_findings(teacher: Teacher, batch: Batch, option: KeyPath = OPTION_OF["teacher"]) -> list[Problem]:
    """What a teacher in this process says with the images of a few rows, and with noise in their place.

    Args:
        batch: rows with images and supervised tokens, where the teacher will run.
    """
    if teacher.module is None or not teacher.answers_anything or not batch.has_images:
        return []
    seen = batch.as_teacher_sees_it()
    noisy = replace(seen, model_inputs=_with_noise(seen.model_inputs))
    teacher.prepare([seen, noisy])
    with_it, without = targets_of(teacher, seen), targets_of(teacher, noisy)
    if with_it.covered_S is not None or without.covered_S is not None:
        return []
    kl_S = context_kl(with_it.scores, without.scores, teacher.vocab_size)
    kl = float(kl_S.double().mean())
    figure = f"with noise in place of the image its distributions move by {kl:.2g} nats per token ({len(kl_S)} tokens)"
    hint = "Is it a model that reads images, with its own processor files and a trained projector?"
    if not bool(kl_S.any()) and len(kl_S) < _FEW_TOKENS:  # these may all stand in front of the image
        return []
    if not bool(kl_S.any()):
        return [Problem(option, f"The teacher does not see the images: {figure}.", hint)]
    if kl < _HARDLY:
        return [Problem(option, f"The teacher hardly looks at the images: {figure}.", hint, level="warning")]
    return [Problem(option, f"The teacher sees the images: {figure}.", level="info")]


def _with_noise(inputs: Any) -> dict[str, Any]:
    """The inputs with other pixels; crops that only fill up a batch, all zero, stay as they are."""
    generator = torch.Generator().manual_seed(0)

    def noise(pixels: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(pixels.shape, generator=generator).to(pixels.device, pixels.dtype)
        return torch.where(pixels != 0, drawn, pixels)

    def changed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return noise(value) if value.is_floating_point() else value
        return [changed(one) for one in value] if isinstance(value, list | tuple) else value

    return {name: changed(value) if name.startswith("pixel_values") else value for name, value in inputs.items()}
