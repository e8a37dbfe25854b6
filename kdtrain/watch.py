"""What the first steps do to the weights, and whether all of them are numbers before they are saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.errors import NonFiniteError
from kdtrain.model_kinds import sees_images
from kdtrain.vision.layouts import layout_of
from kdtrain.vision.parts import part_of

if TYPE_CHECKING:
    from kdtrain.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_WINDOWS = 3
_SAMPLE = 4096
_ROUNDED_AWAY = 0.1


class WatchGradients(TrainerCallback):
    """Says once which trained tensors have had no gradient in the first windows: they stay what they were.

    Tensors of a vision encoder or aligner have a gradient in windows with images only, and those of an expert where a
    token was sent to it.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self._left: dict[bool, dict[str, nn.Parameter]] = {}
        self._windows = {False: 0, True: 0}
        self._trained = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._left, self._windows = {}, {False: 0, True: 0}
        if self._trainer.is_deepspeed_enabled:  # it takes gradients out of the parameters
            return
        model = kwargs["model"]
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        visual = {id(p) for p in _visual_parameters(model)}
        self._trained = len(trained)
        for sees in (False, True):
            self._left[sees] = {
                name: p for name, p in trained.items() if (id(p) in visual) is sees and ".experts." not in name
            }

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for sees in [key for key in self._left if not key or self._trainer.window_has_images]:
            self._windows[sees] += 1
            self._left[sees] = {name: p for name, p in self._left[sees].items() if p.grad is None}
            if self._windows[sees] == _WINDOWS or not self._left[sees]:
                self._tell(sees)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for sees in [key for key in self._left if self._windows[key]]:
            self._tell(sees)

    def _tell(self, sees: bool) -> None:
        names = list(self._left.pop(sees))
        if names and self._trainer.is_world_process_zero():
            logger.warning(
                "%d of %d trained tensors had no gradient in the first %d windows%s, and are not trained: %s%s. Leave "
                "them out (%s), or look for what cuts them off (reentrant gradient checkpointing, a layer whose output "
                "is not used).",
                len(names),
                self._trained,
                self._windows[sees],
                " with images" if sees else "",
                ", ".join(names[:4]),
                ", …" if len(names) > 4 else "",
                "tuner.target_modules, tuner.freeze_vit" if sees else "tuner.target_modules",
            )


def _visual_parameters(model: Any) -> Iterator[nn.Parameter]:
    if layout_of(model) is not None:
        for part in ("vit", "aligner"):
            yield from part_of(model, part).values()
    elif sees_images(model.config):
        yield from model.parameters()  # which are the visual ones is not known


class WatchRounding(TrainerCallback):
    """Says which share of the first step's updates is too small for weights in half precision to take.

    bfloat16 has 8 bits: an update below 1/512 of a weight changes nothing, and AdamW's are of the size of the learning
    rate. Measured on a sample, at the first step whose learning rate is not 0.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self._done = False
        self._before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rates = [group["lr"] for group in kwargs["optimizer"].param_groups]
        if self._done or self._trainer.is_deepspeed_enabled or not any(rates):
            return
        self._done = True
        for parameter in kwargs["model"].parameters():
            if parameter.dtype in (torch.bfloat16, torch.float16) and parameter.grad is not None:
                now = _sample(parameter)
                self._before.append((now, now.clone(), _sample(parameter.grad) != 0))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.accelerator.optimizer_step_was_skipped:  # a gradient scaler's doing
            self._before.clear()
            self._done = False
        if not self._before:
            return
        counts = torch.stack(
            [torch.stack([moved.sum(), ((now == then) & moved).sum()]) for now, then, moved in self._before]
        ).sum(0)
        dtype = str(self._before[0][0].dtype).removeprefix("torch.")
        self._before.clear()
        updates, lost = (int(n) for n in counts)
        if updates and lost / updates >= _ROUNDED_AWAY and self._trainer.is_world_process_zero():
            logger.warning(
                "%.0f%% of the updates of step %d (learning rate %.1e) rounded away: the trained weights are %s, whose "
                "steps are larger. Set model.dtype: auto, which trains float32 weights; with training.bf16: true the "
                "forward is bfloat16 all the same.",
                100 * lost / updates,
                state.global_step + 1,
                max(group["lr"] for group in kwargs["optimizer"].param_groups),
                dtype,
            )


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of some numbers of a tensor, of this rank's part of one that is in pieces."""
    flat = _local(tensor).detach().reshape(-1)
    return flat[:: max(flat.numel() // _SAMPLE, 1)]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # ZeRO-3's


def check_weights(trainer: GKDTrainerWithMetrics, together: bool) -> None:
    """Refuse to go on with trained weights that are not finite: only the next step would look at them. Reads each once.

    Args:
        together: ask all ranks; a collective.

    Raises:
        NonFiniteError: naming some.
    """
    trained = {name: _local(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
    if trainer.visual is not None:
        trained |= {f"visual projector {name}": p for name, p in trainer.visual.projectors.named_parameters()}
    device = trainer.accelerator.device
    good = torch.tensor([True], device=device)
    if trained:
        good = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in trained.values()])
    bad = [name for name, is_good in zip(trained, good.tolist(), strict=False) if not is_good]
    if together and not bool(trainer.accelerator.gather(good.all()[None]).all()):
        bad = bad or ["those of another rank"]
    if bad:
        raise NonFiniteError(
            f"Not finite after step {trainer.state.global_step}: trained weights, the first {', '.join(bad[:3])}. They "
            "were not saved. Lower training.learning_rate, or go on from an earlier checkpoint with --resume PATH."
        )
