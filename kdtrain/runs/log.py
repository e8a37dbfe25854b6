"""`logging.jsonl`: one strict JSON object per logging step and per evaluation."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.ranks import is_main
from kdtrain.runs.folder import SameFolder, write_atomically, writing_record
from kdtrain.runs.records import read_records

logger = logging.getLogger(__name__)


class JsonlLogger(TrainerCallback):
    """Writes the records on rank 0, the last step's always: a run shorter than `logging_steps` would leave none.

    On resume, records of steps after the one resumed from are dropped, and so is a torn last line.

    Args:
        kept: around each record that is written: what becomes of a `RecordError`.
    """

    def __init__(
        self, path: Path, kept: Callable[[TrainingArguments], AbstractContextManager[None]] = lambda args: nullcontext()
    ) -> None:
        self._path, self._kept = path, kept
        self._folder: SameFolder | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._folder = SameFolder(self._path.parent)
        if is_main() and self._path.exists():
            records, torn = read_records(self._path)
            if torn:
                logger.warning("%s: %d torn lines were left out.", self._path, torn)
            kept = [record for record in records if record.get("step", 0) <= state.global_step]
            write_atomically(self._path, "".join(_line(record) for record in kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if is_main() and is_record(logs):
            if self._folder is not None:
                self._folder.check()
            with self._kept(args), writing_record(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": state.global_step, **logs}))


def is_record(logs: Mapping[str, Any]) -> bool:
    """Whether logs belong to a step or an evaluation, and not to the summary at the end."""
    return "loss" in logs or any(key.startswith("eval_") for key in logs)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({key: _strict(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no number."""
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
