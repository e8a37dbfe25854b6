"""Model FLOPs utilisation: what of a device's peak the models' own work takes.

The work of a micro-batch is three forwards of the student (one, and two for the backward) and the teacher's forward, of
all tokens that are not padding. What is computed again for checkpointing is not counted, nor is the writing of
answers, whose time is. With LoRA or frozen parts the backward takes less than twice a forward: it is counted as if it
did not, so that runs can be compared by one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdtrain.data.batch import Batch
from kdtrain.models.flops import ForwardFlops, forward_flops, peak_of

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


@dataclass(frozen=True)
class ModelFlops:
    """What the models of a run take, and what its device can do."""

    student: ForwardFlops
    teacher: ForwardFlops | None
    """None where no model in this process answers."""
    peak: float
    """Operations a second."""

    def of(self, batch: Batch, asks_teacher: bool) -> torch.Tensor:
        """Operations of one micro-batch, a scalar float64 tensor on its device: nothing is waited for."""
        supervised = batch.num_supervised
        total = 3 * self.student.of(_lengths(batch.model_inputs), supervised)
        if asks_teacher and self.teacher is not None:
            seen = batch.model_inputs if batch.teacher_tokens is None else batch.teacher_tokens.inputs
            total = total + self.teacher.of(_lengths(seen), supervised)
        return total


def model_flops(trainer: GKDTrainerWithMetrics) -> ModelFlops | None:
    """Of a run; None where the device's peak is not known, or what a model takes."""
    device, model = trainer.accelerator.device, trainer.model
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    peak = peak_of(device, mixed or model.dtype)
    student = None if peak is None else forward_flops(_plain(model))
    if peak is None or student is None:
        return None
    teacher = trainer.teacher
    if teacher is not None and len(teacher.members) > 1 and any(one.module is not None for one in teacher.members):
        return None  # whose forward a row takes is another matter for each
    module = None if teacher is None else model if teacher.is_student else teacher.module
    of_teacher = None if module is None else forward_flops(_plain(module))
    if module is not None and of_teacher is None:
        return None
    return ModelFlops(student, of_teacher, peak)


def _plain(model: nn.Module) -> nn.Module:
    """A model without what trains or holds it in pieces, which keeps its layers' sizes."""
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module  # type: ignore[assignment]
    return model


def _lengths(inputs: Any) -> torch.Tensor:
    """Tokens of each row that are not padding, [R]; of rows that lie behind each other, 0 but at their last tokens."""
    mask, positions, ids = inputs.get("attention_mask"), inputs.get("position_ids"), inputs["input_ids"]
    if mask is not None:
        return mask.sum(1)
    if positions is None:
        return torch.full((len(ids),), ids.shape[1], device=ids.device)
    # A row begins where its positions do, and its last position says how long it is.
    flat = positions.reshape(-1)
    last = torch.cat([flat[1:] == 0, torch.ones(1, dtype=torch.bool, device=flat.device)])
    return (flat + 1) * last
