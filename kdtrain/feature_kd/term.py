"""The visual term of a run: one batch's weighted distances, its share of the optimizer window, and the projectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdtrain.data.batch import Batch
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.distance import feature_distance
from kdtrain.feature_kd.grids import NOTHING_KNOWN, TargetGrids, image_grids
from kdtrain.feature_kd.hooks import Features, tapped
from kdtrain.feature_kd.projectors import build_projectors, load_projectors, projector_name, save_projectors
from kdtrain.feature_kd.targets import named

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdtrain.config.options import VisualKdConfig


def feature_terms(
    visual: VisualKdConfig,
    student: Features,
    teacher: Features,
    share: torch.Tensor | float,
    *,
    projectors: nn.ModuleDict | None = None,
    grids: TargetGrids = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """weight · weight_t · distance_t per target and their sum, each scaled to the batch's share of the window.

    The distance of a target with several levels (deepstack) is the mean over them.

    Args:
        student, teacher: what `tapped` captured.
        share: this batch's part of the window's `visual_units`.
        projectors: of `build_projectors`, where widths differ.
        grids: of `image_grids`, where a target is interpolated.

    Returns:
        `vision_kd_loss_<target>` and `vision_kd_loss`, scalars.

    Raises:
        PreflightError: nothing captured, features that do not fit, or features of the student that carry no gradient.
    """
    found = {} if projectors is None else dict(projectors.items())
    terms = {}
    for target, options in visual.targets.items():
        student_grids, teacher_grids = grids.get(target, (NOTHING_KNOWN, NOTHING_KNOWN))
        distances = []
        levels = len(student[target])
        for level, (s, t) in enumerate(zip(student[target], teacher[target], strict=True)):
            _check_gradient(target, s)
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


def _check_gradient(target: str, student: list[torch.Tensor]) -> None:
    """A term without a gradient would be logged, and teach nothing."""
    if torch.is_grad_enabled() and not all(features.requires_grad for features in student):
        raise PreflightError(
            f"{named(target)}: the student's features carry no gradient, so this term cannot teach it. Everything "
            "before them is frozen (tuner.freeze_vit, tuner.freeze_aligner, or LoRA whose target_modules do not reach "
            "it): train some of it or remove the target. Or reentrant gradient checkpointing cuts the graph: set "
            "training.gradient_checkpointing_kwargs: {use_reentrant: false}."
        )


class VisualTerm:
    """Visual KD of one run.

    Args:
        options: weights and targets.
        student, teacher: unwrapped.
        accelerator: of the trainer.
        seed: of the projectors' first weights.
    """

    def __init__(
        self, options: VisualKdConfig, student: nn.Module, teacher: nn.Module, accelerator: Accelerator, seed: int
    ) -> None:
        self.options, self.student, self.teacher = options, student, teacher
        self.projectors = nn.ModuleDict()
        self._accelerator, self._seed = accelerator, seed
        self._window_units: torch.Tensor | None = None

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def tapped(self) -> AbstractContextManager[tuple[Features, Features]]:
        """Capture (student's, teacher's) features on the forwards inside."""
        return tapped(self.options, self.student, self.teacher)

    def terms(self, student: Features, teacher: Features, batch: Batch, whole: bool) -> dict[str, torch.Tensor]:
        """The weighted terms of a batch with images, see `feature_terms`.

        Args:
            student, teacher: what `tapped` captured.
            batch: as collated.
            whole: the batch stands for itself (evaluation); else it is a part of the window that was counted.
        """
        share: torch.Tensor | float = 1.0
        if not whole and self._window_units is not None:
            share = batch.image_units / self._window_units.clamp(min=1)
        grids = image_grids(self.options, self.student, self.teacher, batch.model_inputs, batch.teacher_inputs)
        return feature_terms(self.options, student, teacher, share, projectors=self.projectors, grids=grids)

    def count(self, batches: Sequence[Batch]) -> None:
        """Count the window's image features on all ranks, over which the terms are means; a collective."""
        local = torch.tensor(float(sum(batch.image_units for batch in batches)), device=self._accelerator.device)
        self._window_units = self._accelerator.gather(local[None]).sum()

    def probe(self, batch: Batch) -> None:
        """Run both models on a batch with images, as they will be run: what does not fit is found before training.

        Where widths differ this makes the projectors: widths are read from features, since configs do not say them for
        every family. The models' modes and the random state are left as they were.

        Raises:
            PreflightError: a module is missing, features do not fit, or the term could not teach.
        """
        modes = {module: module.training for module in (self.student, self.teacher)}
        try:
            with torch.random.fork_rng(), self.tapped() as (student, teacher):
                with torch.no_grad():
                    self._on_own_device(self.teacher, batch.teacher_inputs)
                self._on_own_device(self.student, batch.model_inputs)
        finally:
            for module, mode in modes.items():
                module.train(mode)
        projectors = build_projectors(self.options, student, teacher, self._seed)
        self.projectors = projectors.to(self._accelerator.device)
        self.terms(student, teacher, batch, whole=True)

    @staticmethod
    def _on_own_device(model: nn.Module, inputs: Mapping[str, Any]) -> None:
        device = next(model.parameters()).device
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        model.eval()(**moved, use_cache=False)

    # ---- projectors --------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """The projectors' parameters; none where the widths are equal."""
        return list(self.projectors.parameters())

    def add_to(self, optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
        """Have the projectors trained by the student's optimizer: their weights decay, their biases do not."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if known.issuperset(map(id, self.parameters())):
            return
        named = list(self.projectors.named_parameters())
        weights, biases = ([p for name, p in named if name.endswith("bias") is is_bias] for is_bias in (False, True))
        optimizer.add_param_group({"params": weights, "weight_decay": weight_decay})
        optimizer.add_param_group({"params": biases, "weight_decay": 0.0})

    def synchronise(self) -> None:
        """Average the projectors' gradients over the ranks, as DDP does with the student's; a collective.

        A rank whose window had no image brings zeros. Where none had one there is no gradient, so that the optimizer
        leaves them alone: with a zero it would decay them, and move them by its momentum.
        """
        if self._window_units is not None and not self._window_units:
            self.projectors.zero_grad()
            return
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")

    def save(self, folder: str | Path) -> None:
        """Write the projectors beside a model."""
        save_projectors(self.projectors, folder)

    def load(self, folder: str | Path) -> None:
        """Read the projectors of a checkpoint.

        Raises:
            CheckpointError: it has none, or others.
        """
        load_projectors(self.projectors, folder)
