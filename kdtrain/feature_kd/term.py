"""The visual term of a run: one batch's weighted distances, and its share of the optimizer window."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from accelerate import Accelerator
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.config.options import DistillationOptions, VisualKdConfig
from kdtrain.data.batch import Batch
from kdtrain.feature_kd.distance import feature_distance
from kdtrain.feature_kd.grids import NOTHING_KNOWN, TargetGrids, image_grids
from kdtrain.feature_kd.hooks import Features, capture, tapped
from kdtrain.feature_kd.projected import FeatureTerm, NumItems, Predicting, check_gradient
from kdtrain.feature_kd.projectors import build_projectors, projector_name
from kdtrain.feature_kd.taps import taps_of_both
from kdtrain.host import send


def feature_terms(
    visual: VisualKdConfig,
    student: Features,
    teacher: Features,
    share: torch.Tensor | float,
    *,
    projectors: nn.ModuleDict | None = None,
    grids: TargetGrids = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """weight · weight_t · distance_t per target and their sum, each scaled to the batch's `share` of the window.

    The distance of a target with several levels (deepstack) is the mean over them.
    """
    found = dict(projectors.items()) if projectors else {}
    terms = {}
    for target, options in visual.targets.items():
        student_grids, teacher_grids = grids.get(target, (NOTHING_KNOWN, NOTHING_KNOWN))
        distances = []
        levels = len(student[target])
        for level, (s, t) in enumerate(zip(student[target], teacher[target], strict=True)):
            check_gradient(target, s)
            distances.append(
                feature_distance(
                    s,
                    t,
                    options.distance or visual.distance,
                    target,
                    projector=found.get(projector_name(target, level, levels)),
                    match=options.match,
                    student_grids=student_grids,
                    teacher_grids=teacher_grids,
                )
            )
        terms[f"vision_kd_loss_{target}"] = visual.weight * options.weight * share * torch.stack(distances).mean()
    terms["vision_kd_loss"] = torch.stack(list(terms.values())).sum()
    return terms


class VisualTerm(FeatureTerm):
    """Visual KD of one run."""

    name = "vision_kd_loss"
    file = "visual_projectors.safetensors"
    targets = "visual targets"
    section = "visual_kd"
    in_model_name = "kdtrain_visual_projectors"

    def __init__(
        self, options: VisualKdConfig, student: nn.Module, teacher: nn.Module, accelerator: Accelerator, seed: int
    ) -> None:
        super().__init__(student, teacher, accelerator, seed)
        self.options = options
        self._window_units: torch.Tensor | None = None

    def applies(self, options: DistillationOptions, batch: Batch) -> bool:
        """See `FeatureTerm.applies`."""
        return options.visual_kd is not None and batch.has_images

    def of_teacher(self) -> AbstractContextManager[Features]:
        """See `FeatureTerm.of_teacher`."""
        return capture(self.teacher, taps_of_both(self.options, self.student, self.teacher)[1], "teacher")

    def of_student(self) -> AbstractContextManager[Features]:
        """See `FeatureTerm.of_student`."""
        return capture(self.student, taps_of_both(self.options, self.student, self.teacher)[0], "student")

    def terms(
        self, student: Features, teacher: Features, batch: Batch, predicting: Predicting, num_items: NumItems
    ) -> dict[str, torch.Tensor]:
        """The weighted terms of a batch with images, a mean over the image features of its window or its own.

        Those of a stand-in are 0, with a graph: projectors in pieces are put together by all ranks.
        """
        share: torch.Tensor | float = 0.0 if batch.stand_in is not None else 1.0
        if num_items is not None and self._window_units is not None:
            share = send(batch.image_units, self._window_units.device).float() / self._window_units.clamp(min=1)
        return self._shared(student, teacher, batch, share)

    def _shared(
        self, student: Features, teacher: Features, batch: Batch, share: torch.Tensor | float
    ) -> dict[str, torch.Tensor]:
        grids = image_grids(self.options, self.student, self.teacher, batch.model_inputs, batch.teacher_inputs)
        return feature_terms(self.options, student, teacher, share, projectors=self.projectors, grids=grids)

    def count(self, batches: Sequence[Batch]) -> None:
        """Count the window's image features on all ranks, over which the terms are means; a collective."""
        device, found = self._accelerator.device, [batch.image_units for batch in batches]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        local = sum((send(units.to(dtype), device) for units in found), torch.zeros((), dtype=dtype, device=device))
        self._window_units = self._accelerator.gather(local.float()[None]).sum()

    def window_units(self) -> torch.Tensor | float:
        """See `FeatureTerm.window_units`."""
        return 1.0 if self._window_units is None else self._window_units

    def probe(self, batch: Batch) -> None:
        """Run both models on a batch with images, as they will be run: what does not fit is found before training.

        Where widths differ this makes the projectors: widths are read from features, since configs do not say them for
        every family. The models' modes and the random state are left as they were.
        """
        modes = {module: module.training for module in (self.student, self.teacher)}
        try:
            with torch.random.fork_rng(), tapped(self.options, self.student, self.teacher) as (student, teacher):
                self.run_once("teacher", batch.teacher_inputs)
                self.run_once("student", batch.model_inputs)
        finally:
            for module, mode in modes.items():
                module.train(mode)
        projectors = build_projectors(self.options, student, teacher, self._seed)
        self.projectors = projectors.to(self._accelerator.device)
        with torch.set_grad_enabled(not is_deepspeed_zero3_enabled()):
            self._shared(student, teacher, batch, 1.0)
