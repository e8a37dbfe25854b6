"""The visual term of a run: one batch's weighted distances, its share of the optimizer window, and the projectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.config.options import VisualKdConfig
from kdtrain.data.batch import Batch
from kdtrain.disk import save_tensors
from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.feature_kd.distance import feature_distance
from kdtrain.feature_kd.grids import NOTHING_KNOWN, TargetGrids, image_grids
from kdtrain.feature_kd.hooks import Features, tapped
from kdtrain.feature_kd.projectors import build_projectors, projector_name
from kdtrain.feature_kd.taps import named
from kdtrain.models.pieces import fill, put_together_by_module

PROJECTORS = "visual_projectors.safetensors"
_IN_MODEL = "kdtrain_visual_projectors"
"""Where they are in a student that is trained in pieces."""


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
    """Visual KD of one run, over the unwrapped models."""

    def __init__(
        self, options: VisualKdConfig, student: nn.Module, teacher: nn.Module, accelerator: Accelerator, seed: int
    ) -> None:
        self.options, self.student, self.teacher = options, student, teacher
        self.projectors = nn.ModuleDict()
        self.in_model = False
        """Whether the projectors are in the model that is trained; see `put_into`."""
        self._accelerator, self._seed = accelerator, seed
        self._window_units: torch.Tensor | None = None

    # ---- one batch ---------------------------------------------------------------------------------------------------

    def tapped(self) -> AbstractContextManager[tuple[Features, Features]]:
        return tapped(self.options, self.student, self.teacher)

    def terms(self, student: Features, teacher: Features, batch: Batch, whole: bool) -> dict[str, torch.Tensor]:
        """The weighted terms of a batch with images: of a part of the counted window, or of a `whole` (evaluation).

        Those of a stand-in are 0, with a graph: projectors in pieces are put together by all ranks.
        """
        share: torch.Tensor | float = 0.0 if batch.stand_in is not None else 1.0
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
        """
        modes = {module: module.training for module in (self.student, self.teacher)}
        try:
            with torch.random.fork_rng(), self.tapped() as (student, teacher):
                with torch.no_grad():
                    self._on_own_device(self.teacher, batch.teacher_inputs)
                with put_together_by_module(self.student), torch.set_grad_enabled(not is_deepspeed_zero3_enabled()):
                    self._on_own_device(self.student, batch.model_inputs)
        finally:
            for module, mode in modes.items():
                module.train(mode)
        projectors = build_projectors(self.options, student, teacher, self._seed)
        self.projectors = projectors.to(self._accelerator.device)
        with torch.set_grad_enabled(not is_deepspeed_zero3_enabled()):
            self.terms(student, teacher, batch, whole=True)

    @staticmethod
    def _on_own_device(model: nn.Module, inputs: Mapping[str, Any]) -> None:
        device = next(model.parameters()).device
        moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        model.eval()(**moved, use_cache=False)

    # ---- projectors --------------------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        return list(self.projectors.parameters())

    def put_into(self, model: nn.Module) -> None:
        """Make the projectors a part of the student as it is trained, before FSDP or DeepSpeed wrap it."""
        if self.projectors:
            model.add_module(_IN_MODEL, self.projectors)
            self.in_model = True

    def taken_out(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a student's whole state holds of the projectors, by their own names; it is then no more in that."""
        names = [name for name in state if _IN_MODEL in name.split(".")]
        return {name.split(f"{_IN_MODEL}.")[1]: state.pop(name) for name in names}

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
        leaves them alone: with a zero it would decay them, and move them by its momentum. In the model, the gradients
        are reduced with its own.
        """
        if self._window_units is not None and not self._window_units:
            self.projectors.zero_grad()
            return
        if self.in_model:
            return
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")

    def save(self, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the projectors' file, of their `state` where they are in pieces themselves."""
        if self.projectors:
            whole = self.projectors.state_dict() if state is None else state
            save_tensors({k: v.detach().cpu().contiguous() for k, v in whole.items()}, Path(folder) / PROJECTORS)

    def load(self, folder: str | Path) -> None:
        """Read it back. What DeepSpeed has in its model it has loaded with that."""
        if not self.projectors or (self.in_model and self._accelerator.distributed_type == DistributedType.DEEPSPEED):
            return
        path = Path(folder) / PROJECTORS
        try:
            saved, parameters = load_file(path), dict(self.projectors.named_parameters())
            if saved.keys() != parameters.keys():
                raise RuntimeError(f"It holds {', '.join(saved) or 'none'}.")
            for name, parameter in parameters.items():
                fill(parameter, saved[name])
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} does not hold the projectors of this run's visual targets ({', '.join(self.projectors)}): "
                f"{str(error).splitlines()[0]} Resume with the visual_kd targets that the checkpoint was made with, or "
                "start anew."
            ) from error
