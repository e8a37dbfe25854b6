"""What a run adds to the training loop: stopping on a signal, its status, a check of the wrapper."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch.nn.parallel import DistributedDataParallel
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from kdtrain.errors import Interrupted, PreflightError
from kdtrain.ranks import is_main
from kdtrain.runs.folder import CHECKPOINT, RecordError
from kdtrain.runs.lock import require_held
from kdtrain.runs.log import is_record
from kdtrain.runs.signals import StopRequest
from kdtrain.runs.status import write_progress
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.best_step import BestStep, as_object

logger = logging.getLogger(__name__)


class LeftEvaluationError(Interrupted):
    """A signal came while the model was evaluated between two steps. All ranks raise it, after the same batch."""


class Records:
    """What rank 0 writes between two steps, and what becomes of it where that cannot be written.

    Alone, it raises at once. Of several ranks it goes on to the end of the next step, where all of them stop and save
    their state together: see `StopOnSignal`.
    """

    def __init__(self) -> None:
        self.error: RecordError | None = None
        """Of this rank."""

    @contextmanager
    def writing(self, args: TrainingArguments) -> Iterator[None]:
        """Write inside."""
        try:
            yield
        except RecordError as error:
            if args.world_size == 1:
                raise
            self.error = self.error or error


class StopOnSignal(TrainerCallback):
    """Signals finish the step, save a checkpoint and end training; an evaluation is left after its batch.

    Before every step of the optimizer, and at every batch of an evaluation, the ranks agree on the largest signal
    noted, so that a signal to one rank stops all of them at the same place: otherwise the others would wait in a
    collective for ever. A log that rank 0 cannot write stops them in the same way, at the end of a step. This
    goes with the check of what is not finite (`guard.py`): what comes behind it is heard at the next one.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics, request: StopRequest, records: Records) -> None:
        self._trainer, self._request, self._records = trainer, request, records
        self.signum = 0
        """The signal the run was stopped by, on every rank; 0 if none."""
        trainer.agreements.update(signal=lambda: request.noted, lost=lambda: records.error is not None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate now what an earlier process was stopped in, or before: log and best step then miss nothing."""
        if state.global_step and _evaluation_is_due(args, state):
            logger.info("The evaluation of step %d, which was left out, is made now.", state.global_step)
            metrics = self._trainer._evaluate(None, None)
            self._trainer._determine_best_metric(metrics=metrics, trial=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._is_lost() or self.signum:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self._is_lost()
        if self.signum:
            raise LeftEvaluationError(self.signum, "Stopped in an evaluation.")

    def raise_lost(self) -> None:
        """Raise on all ranks where a record of one could not be written; a collective.

        Raises:
            RecordError: the same on all.
        """
        error = self._records.error
        said = [error and str(error)]
        message = next(
            filter(None, said if self._trainer.accelerator.num_processes == 1 else gather_object(said)), None
        )
        if message is not None:
            raise error or RecordError(message)

    def _is_lost(self) -> bool:
        """Whether a record was lost on any rank; `signum` is then agreed upon as well."""
        if self._trainer.accelerator.num_processes == 1:
            self.signum = self._request.noted
            return self._records.error is not None
        agreed = self._trainer.agreed
        self.signum = int(agreed["signal"])
        return bool(agreed["lost"])


def _evaluation_is_due(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether a checkpoint was saved at a step that is evaluated, and was not."""
    flow, control = DefaultFlowCallback(), TrainerControl()
    flow.on_step_end(args, state, control)
    if state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-6:
        flow.on_epoch_end(args, state, control)
    of_step = (record for record in state.log_history if record.get("step") == state.global_step)
    return control.should_evaluate and not any(key.startswith("eval_") for record in of_step for key in record)


class WriteProgress(TrainerCallback):
    """Keeps step, last checkpoint and best step of `status.json` up to date, with every record.

    And ends a run whose folder another one has taken, before it writes there again.
    """

    def __init__(self, run_dir: Path, best_step: BestStep, records: Records) -> None:
        self._run_dir, self._best_step, self._records = run_dir, best_step, records

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        require_held(self._run_dir)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if is_record(logs):
            self._write(args, step=state.global_step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(args, step=state.global_step, best=as_object(self._best_step.best))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._write(args, step=state.global_step, last_checkpoint=f"{CHECKPOINT}{state.global_step}")

    def _write(self, args: TrainingArguments, **progress: Any) -> None:
        if is_main():
            with self._records.writing(args):
                write_progress(self._run_dir, **progress)


class CheckWrapped(TrainerCallback):
    """Refuses to train several ranks that would never average their gradients, or without the DeepSpeed asked for.

    Some ways of launching give a world of two without the wrapper that reduces gradients, and exit with 0. Upstream
    wraps the model shortly before the first step.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer, accelerator = self._trainer, self._trainer.accelerator
        if trainer.args.deepspeed_plugin is not None and not trainer.is_deepspeed_enabled:
            # accelerate takes ACCELERATE_USE_CPU, which some launchers set, for a wish to go without.
            raise PreflightError(
                "DeepSpeed is asked for, but this run is without DeepSpeed (its distributed type is "
                f"{accelerator.distributed_type.value}). Unset ACCELERATE_USE_CPU, or remove the option."
            )
        wrapped = trainer.is_sharded or isinstance(trainer.model_wrapped, DistributedDataParallel)
        if accelerator.num_processes > 1 and not wrapped:
            raise PreflightError(
                f"{accelerator.num_processes} processes, but the model is wrapped in "
                f"{type(trainer.model_wrapped).__name__} (distributed type {accelerator.distributed_type}): gradients "
                "would not be averaged. Launch with `kdtrain fit` and launch.num_processes, or with torchrun."
            )


def name_tensorboard(trainer: GKDTrainerWithMetrics, run_dir: Path) -> None:
    """Let TensorBoard write into a folder with the run's name, which is what it shows.

    Upstream's is named by host and time, so that each resume would be another run.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:  # TENSORBOARD_LOGGING_DIR
            name = trainer.args.run_name or run_dir.name
            callback.logging_dir = str(run_dir / re.sub(r"[^\w.=-]+", "_", name))
