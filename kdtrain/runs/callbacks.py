"""What a run adds to the training loop: stopping on a signal, a check of the wrapper, the end of a dry run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.errors import PreflightError
from kdtrain.runs.signals import StopRequest
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
        self.signum = self._request.noted
        if self._accelerator.num_processes > 1:
            noted = torch.tensor([self.signum], device=self._accelerator.device)
            self.signum = int(self._accelerator.gather(noted).max())
        if self.signum:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False


class CheckWrapped(TrainerCallback):
    """Refuses to train several ranks that would never average their gradients, or without the DeepSpeed asked for.

    Some ways of launching give a world of two without the wrapper that reduces gradients, and exit with 0. Upstream
    wraps the model shortly before the first step.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer, accelerator = self._trainer, self._trainer.accelerator
        if trainer.args.deepspeed and not trainer.is_deepspeed_enabled:
            # accelerate takes ACCELERATE_USE_CPU, which some launchers set, for a wish to go without.
            raise PreflightError(
                "training.deepspeed is set, but this run is without DeepSpeed (its distributed type is "
                f"{accelerator.distributed_type.value}). Unset ACCELERATE_USE_CPU, or remove the option."
            )
        wrapped = trainer.is_sharded or isinstance(trainer.model_wrapped, DistributedDataParallel)
        if accelerator.num_processes > 1 and not wrapped:
            raise PreflightError(
                f"{accelerator.num_processes} processes, but the model is wrapped in "
                f"{type(trainer.model_wrapped).__name__} (distributed type {accelerator.distributed_type}): gradients "
                "would not be averaged. Launch with `kdtrain fit` and launch.num_processes, or with torchrun."
            )


class _WindowDone(Exception):
    """Ends a dry run where the optimizer step would be."""


class _EndBeforeTheStep(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        raise _WindowDone


def one_window(trainer: GKDTrainerWithMetrics) -> dict[str, float]:
    """One optimizer window forward and backward through everything a real run uses, without the step; its metrics."""
    trainer.add_callback(_EndBeforeTheStep())
    trainer.read_ahead.lookahead = 0  # nothing is asked of a teacher that is not used
    with suppress(_WindowDone):
        trainer.train()
    return trainer.window_metrics()
