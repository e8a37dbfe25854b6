"""What a run asks at each step, of all its ranks together: to stop, and whether they train one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.runs.launch import check_wrapped
from kdtrain.runs.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdtrain.trainer import GKDTrainerWithMetrics


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM finish the step, save a checkpoint and end training.

    At every step's end the ranks agree on the largest signal noted, so that a signal to one rank stops all of them at
    the same step: otherwise the others would wait in a collective for ever.
    """

    def __init__(self, accelerator: Accelerator, request: StopRequest) -> None:
        self._accelerator, self._request = accelerator, request
        self.signum = 0
        """The signal the run was stopped by, on every rank; 0 if none."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.signum = self._agreed()
        if self.signum:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def _agreed(self) -> int:
        if self._accelerator.num_processes == 1:
            return self._request.noted
        noted = torch.tensor([self._request.noted], device=self._accelerator.device)
        return int(self._accelerator.gather(noted).max())


class CheckWrapped(TrainerCallback):
    """Asks `check_wrapped` once upstream has wrapped the model, before the first step."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        check_wrapped(self._trainer)
