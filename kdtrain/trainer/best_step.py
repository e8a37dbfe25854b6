"""Which step is the best so far, by the evaluations; and early stopping, where none gets better any more.

Upstream's `EarlyStoppingCallback` forgets on a resume how long it has waited, and its best step is known only where
checkpoints are saved. Here both are in the checkpoint's `trainer_state.json`, so a resumed run ends where the
uninterrupted one does.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kdtrain.ranks import is_main

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)

_STATE = "kdtrain.best_step"  # among `stateful_callbacks` of a trainer_state.json


@dataclass(frozen=True)
class Best:
    """The evaluation that won."""

    step: int
    metric: str
    """As in the log: `eval_loss`."""
    value: float


class BestStep(TrainerCallback):
    """Keeps the best evaluation, by `metric_for_best_model` or the loss, and stops where `patience` is used up.

    The first of equal ones is the best. An evaluation before the first step is none of a trained step.

    Args:
        patience: evaluations in a row without a better one that end training; None trains to the end.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best: Best | None = None
        self.waited = 0
        """Evaluations since the best one."""
        self._began_at = 0

    @property
    def stops(self) -> bool:
        """Whether patience is used up."""
        return self.patience is not None and self.waited >= self.patience

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._restore(state.stateful_callbacks if state.global_step else {})
        self._began_at = state.global_step
        _find_best_checkpoint(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log_with_evaluations(args, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._log_with_evaluations(args, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        name = metric_name(args)
        if name not in metrics or state.global_step == self._began_at:  # one of several sets; `eval_on_start`
            return
        self._compare(Best(state.global_step, name, metrics[name]), bool(args.greater_is_better))
        state.stateful_callbacks[_STATE] = {"best": as_object(self.best), "waited": self.waited}
        if self.stops and state.global_step < state.max_steps:
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stops and is_main() and state.global_step < state.max_steps:
            message = "Stopped early at step %d of %d: %s has not improved in %d evaluations."
            logger.info(message, state.global_step, state.max_steps, metric_name(args), self.waited)

    def _compare(self, found: Best, higher_is_better: bool) -> None:
        best = self.best
        if math.isnan(found.value):
            better = False
        elif best is None or best.metric != found.metric:  # a resumed run may compare by another one
            better = True
        else:
            better = found.value > best.value if higher_is_better else found.value < best.value
        self.best, self.waited = (found, 0) if better else (best, self.waited + 1)

    def _log_with_evaluations(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Training may end with any evaluation: the steps before it shall have a record."""
        if self.patience is not None and control.should_evaluate and args.logging_strategy != "no":
            control.should_log = True

    def restore_from(self, checkpoint: Path) -> None:
        """Read the state that a checkpoint holds, where no training begins from it."""
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        self._restore(state.get("stateful_callbacks") or {})

    def _restore(self, states: dict[str, Any]) -> None:
        state = states.get(_STATE) or {"best": None, "waited": 0}
        self.best, self.waited = state["best"] and Best(**state["best"]), state["waited"]


def best_so_far(state: TrainerState) -> Best | None:
    """The best step that a state knows of."""
    found = (state.stateful_callbacks.get(_STATE) or {}).get("best")
    return found and Best(**found)


def as_object(best: Best | None) -> dict[str, Any] | None:
    """As `status.json` has it."""
    return None if best is None else asdict(best)


def step_of_model(trainer: GKDTrainerWithMetrics) -> int:
    """The step whose weights the trainer holds after training."""
    best = trainer.state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best is not None:
        return int(Path(best).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))
    return trainer.state.global_step


def load_end(trainer: GKDTrainerWithMetrics, checkpoint: Path) -> None:
    """Load what training to the end would have left: the last checkpoint, or the best one where that is asked for."""
    trainer._load_from_checkpoint(str(checkpoint))
    saved = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    _find_best_checkpoint(trainer.args, saved)
    for name in ("global_step", "max_steps", "log_history", "best_metric", "best_global_step", "best_model_checkpoint"):
        setattr(trainer.state, name, getattr(saved, name))
    if trainer.args.load_best_model_at_end and saved.best_model_checkpoint is not None:
        trainer._load_best_model()


def _find_best_checkpoint(args: TrainingArguments, state: TrainerState) -> None:
    """Put the path of the best checkpoint right where the run folder was moved: upstream keeps the old one."""
    here = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if here.is_dir() and (state.best_model_checkpoint is None or not Path(state.best_model_checkpoint).is_dir()):
        state.best_model_checkpoint = str(here)


def metric_name(args: TrainingArguments) -> str:
    """The metric that steps are compared by, as evaluations name it."""
    return f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
