"""What happens around the steps of a run: stopping on a signal, writing `logging.jsonl`, showing progress."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.errors import Interrupted, PreflightError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdtrain.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

# A terminal sends Ctrl-C to every process of the group, and a launcher passes its own copy on to the workers: signals
# this close together are one request.
_SAME_REQUEST_S = 1.0


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM finish the step, save a checkpoint and end training; a second one ends the process at once.

    The handler only notes the signal. At every step's end the ranks agree on the largest one noted, so that a signal to
    one rank stops all of them at the same step: otherwise the others would wait in a collective for ever.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._noted = 0
        self._noted_at = 0.0
        self.signum = 0
        """The signal the run was stopped by, on every rank; 0 if none."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle both signals inside; the previous handlers come back on every way out.

        Only the main thread of a process may: in another one signals are left to it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {signum: signal.signal(signum, self._note) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._noted and time.monotonic() - self._noted_at > _SAME_REQUEST_S:
            raise Interrupted(signum, "Second signal: stopped at once; what was saved before it is intact.")
        if not self._noted:
            self._noted, self._noted_at = signum, time.monotonic()
            logger.warning("%s: finishing this step, then saving.", signal.Signals(signum).name)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.signum = self._agreed()
        if self.signum:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False
        return control

    def _agreed(self) -> int:
        if self._accelerator.num_processes == 1:
            return self._noted
        noted = torch.tensor([self._noted], device=self._accelerator.device)
        return int(self._accelerator.gather(noted).max())


class CheckWrapped(TrainerCallback):
    """Refuse to train several ranks that would never average their gradients, or without the DeepSpeed asked for.

    Some ways of launching give a world of two without the wrapper that reduces gradients, and exit with 0.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self._trainer
        if args.deepspeed and not trainer.is_deepspeed_enabled:
            # accelerate takes ACCELERATE_USE_CPU, which some launchers set, for a wish to go without.
            raise PreflightError(
                "training.deepspeed is set, but this run is without DeepSpeed (its distributed type is "
                f"{trainer.accelerator.distributed_type.value}). Unset ACCELERATE_USE_CPU, or remove the option."
            )
        if trainer.accelerator.num_processes == 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return
        if not isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel):
            raise PreflightError(
                f"{trainer.accelerator.num_processes} processes, but the model is wrapped in "
                f"{type(trainer.model_wrapped).__name__} (distributed type {trainer.accelerator.distributed_type}): "
                "gradients would not be averaged. Launch with `kdtrain fit` and launch.num_processes, or with torchrun."
            )


class JsonlLogger(TrainerCallback):
    """`logging.jsonl`: one strict JSON object per logging step and per evaluation, on rank 0.

    Args:
        path: the file. On resume, records of steps after the one resumed from are dropped, and so is a torn last line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self._path.exists():
            kept = [record for record in read_records(self._path) if record.get("step", 0) <= state.global_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            os.replace(temporary, self._path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or not is_record(logs):
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": state.global_step, **logs}))


class LogLastStep(TrainerCallback):
    """The last step is always logged: a run shorter than `logging_steps` would leave no record at all."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and str(args.logging_strategy.value) != "no":
            control.should_log = True


def is_record(logs: Mapping[str, Any]) -> bool:
    """Whether logs belong to a step or an evaluation, and not to the summary at the end."""
    return "loss" in logs or any(key.startswith("eval_") for key in logs)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `logging.jsonl`; a torn line, as a killed process leaves it, is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            logger.warning("%s: a torn line was left out.", path)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _strict(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no number."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
