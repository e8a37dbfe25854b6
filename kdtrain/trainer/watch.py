"""What the first steps do to the weights: tensors without a gradient, and updates that round away."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.models.kinds import sees_images
from kdtrain.models.layouts import layout_of
from kdtrain.models.parts import part_of
from kdtrain.ranks import is_main
from kdtrain.trainer.guard import local_part

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_WINDOWS = 3
_SAMPLE = 4096  # numbers of a tensor that are compared
_ROUNDED_AWAY = 0.1  # share of updates that is worth a warning


class WatchGradients(TrainerCallback):
    """Warns once of trained tensors that had no gradient in the first windows: they stay what they were.

    Tensors of a vision encoder or aligner have a gradient in windows with images only: those are counted for them. An
    expert has one where a token was sent to it, and is left out.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        # By whether they are visual: tensors that had no gradient so far, and windows that should have given them one.
        self._without: dict[bool, dict[str, nn.Parameter]] = {}
        self._windows: dict[bool, int] = {}
        self._trained = 0

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self._without, self._windows = {}, {False: 0, True: 0}
        if self._trainer.is_deepspeed_enabled:  # it takes gradients out of the parameters
            return
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        projectors = [] if self._trainer.visual is None else self._trainer.visual.parameters()
        visual_ids = {id(p) for p in (*_visual_parameters(model), *projectors)}
        self._trained = len(trained)
        self._without = {False: {}, True: {}}
        for name, parameter in trained.items():
            if ".experts." not in name:
                self._without[id(parameter) in visual_ids][name] = parameter

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for visual in [key for key in self._without if not key or self._trainer.window_has_images]:
            self._windows[visual] += 1
            self._without[visual] = {name: p for name, p in self._without[visual].items() if p.grad is None}
            if self._windows[visual] == _WINDOWS or not self._without[visual]:
                self._warn(visual)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for visual in [key for key in self._without if self._windows[key]]:
            self._warn(visual)

    def _warn(self, visual: bool) -> None:
        names = list(self._without.pop(visual))
        if names and is_main():
            logger.warning(
                "%d of %d trained tensors had no gradient in the first %d windows%s, and are not trained: %s%s. Leave "
                "them out (%s), or look for what cuts them off (reentrant gradient checkpointing, a layer whose output "
                "is not used).",
                len(names),
                self._trained,
                self._windows[visual],
                " with images" if visual else "",
                ", ".join(names[:4]),
                ", …" if len(names) > 4 else "",
                "tuner.target_modules, tuner.freeze_vit" if visual else "tuner.target_modules",
            )


def _visual_parameters(model: Any) -> Iterator[nn.Parameter]:
    if layout_of(model) is not None:
        for part in ("vit", "aligner"):
            yield from part_of(model, part).values()
    elif sees_images(model.config):
        yield from model.parameters()  # which are the visual ones is not known


class WatchRounding(TrainerCallback):
    """Warns of the share of the first step's updates that is too small for weights in half precision to take.

    bfloat16 has 8 bits: an update below 1/512 of a weight changes nothing, and AdamW's are of the size of the learning
    rate. Measured on a sample, at the first step whose learning rate is not 0.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self._done = False
        # Of each trained tensor around one step: some of its numbers, the same before it, and which have a gradient.
        self._watched: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **__: Any) -> None:
        rates = [group["lr"] for group in optimizer.param_groups]
        if self._done or self._trainer.is_deepspeed_enabled or not any(rates):
            return
        self._done = True
        for parameter in model.parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16) and parameter.grad is not None:
                now = _sample(parameter)
                self._watched.append((now, now.clone(), _sample(parameter.grad) != 0))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        watched, self._watched = self._watched, []
        if self._trainer.accelerator.optimizer_step_was_skipped:  # a gradient scaler's doing: watch the next
            self._done, watched = False, []
        if not watched:
            return
        updates = sum(int(has_gradient.sum()) for _, _, has_gradient in watched)
        lost = sum(int(((now == before) & has_gradient).sum()) for now, before, has_gradient in watched)
        if updates and lost / updates >= _ROUNDED_AWAY and is_main():
            logger.warning(
                "%.0f%% of the updates of step %d (learning rate %.1e) rounded away: the trained weights are %s, whose "
                "steps are larger. Set model.dtype: auto, which trains float32 weights; with training.bf16: true the "
                "forward is bfloat16 all the same.",
                100 * lost / updates,
                state.global_step + 1,
                max(group["lr"] for group in kwargs["optimizer"].param_groups),
                str(watched[0][0].dtype).removeprefix("torch."),
            )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of some numbers of a tensor."""
    flat = local_part(tensor).detach().reshape(-1)
    return flat[:: max(flat.numel() // _SAMPLE, 1)]
