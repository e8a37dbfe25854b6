"""The teacher is told of every step that the optimizer takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


class TellTeacher(TrainerCallback):
    """Calls `Teacher.stepped` before anything else sees the new weights: an evaluation, a checkpoint."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        # In float16 a step is left out where its gradient overflows.
        if self._trainer.teacher is not None and not self._trainer.accelerator.optimizer_step_was_skipped:
            self._trainer.teacher.stepped()
