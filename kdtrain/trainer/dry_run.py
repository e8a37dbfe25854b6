"""A dry run: one optimizer window of each kind that the run will have, forward and backward, without a step.

And how long the run will take: windows of each kind again, timed, and an optimizer step that moves nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from kdtrain.config.options import DistillationOptions
from kdtrain.trainer.row_order import planned_steps

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


class _Done(Exception):
    """Ends a dry run where the optimizer step would be."""


@dataclass(frozen=True)
class StepTimes:
    """What a step of the run will take."""

    step_s: float
    """Seconds of a step, over the kinds of windows that the run will have."""
    steps: int
    """Of the run."""

    @property
    def run_s(self) -> float:
        """Seconds of all steps; evaluation, saving and what comes before the first step are not among them."""
        return self.steps * self.step_s


class _EndBeforeTheStep(TrainerCallback):
    def __init__(self, trainer: GKDTrainerWithMetrics, kinds: Mapping[float, float], tokens: float | None) -> None:
        self._trainer, self._kinds, self._tokens = trainer, kinds, tokens
        self.metrics: dict[str, float] = {}
        self.times: StepTimes | None = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        for lmbda in list(self._kinds)[1:]:
            self._trainer.lmbda = lmbda
            _train_again(self._trainer)
        self.metrics = self._trainer.window_metrics()
        if self._tokens is not None:
            self.times = _step_times(self._trainer, self._kinds, self._tokens)
        raise _Done


def windows_without_a_step(trainer: GKDTrainerWithMetrics) -> dict[str, float]:
    """The metrics of a window of each kind, on the same rows, through everything that a real run uses; a collective.

    Answers may be as long as they ever will be. The student's come first: they take the most memory.
    """
    return _run(trainer, None).metrics


def timed_windows(trainer: GKDTrainerWithMetrics, tokens_per_row: float) -> tuple[dict[str, float], StepTimes]:
    """`windows_without_a_step`, and then how long the run's steps will take; a collective.

    Three windows of each kind are timed, or one where that takes a minute, and an optimizer step at a learning rate
    of 0.

    Args:
        tokens_per_row: mean of the rows that the run trains on, for the timed ones may be longer or shorter; 0 where it
            is not known.
    """
    ended = _run(trainer, tokens_per_row)
    assert ended.times is not None
    return ended.metrics, ended.times


def _run(trainer: GKDTrainerWithMetrics, tokens_per_row: float | None) -> _EndBeforeTheStep:
    options, kinds = trainer.options, _kinds(trainer.options)
    ended = _EndBeforeTheStep(trainer, kinds, tokens_per_row)
    trainer.lmbda, trainer.max_new_tokens = next(iter(kinds)), options.most_new_tokens
    trainer.add_callback(ended)
    trainer.read_ahead.lookahead = 0  # nothing is asked of a teacher that is not used
    with suppress(_Done):
        trainer.train()
    trainer.options = options
    return ended


def _kinds(options: DistillationOptions) -> dict[float, float]:
    """The `lmbda` at which every window is of one kind, and the share of the run's windows that are of it: where the
    student does not write, the others are on the data's answers, or with `seq_kd` on the teacher's."""
    if options.lm_kd_active and 0 < options.lmbda < 1:
        return {1.0: options.lmbda, 0.0: 1 - options.lmbda}
    return {options.lmbda: 1.0}


def _train_again(trainer: GKDTrainerWithMetrics) -> None:
    """The rows of the last window forward and backward once more, with the options as they are now."""
    model = trainer.model_wrapped
    model.zero_grad()
    rows = trainer.read_ahead.last_again()
    batches, num_items = trainer.get_batch_samples(rows, trainer.args.gradient_accumulation_steps, trainer.args.device)
    for i, batch in enumerate(batches):
        trainer.accelerator.gradient_state._set_sync_gradients(i == len(batches) - 1)
        trainer.training_step(model, batch, num_items)
    trainer._guard.check_losses()


# ---- how long it takes -----------------------------------------------------------------------------------------------

_TIMED, _LONG_S = 3, 60.0
clock = time.perf_counter


def _step_times(trainer: GKDTrainerWithMetrics, kinds: Mapping[float, float], tokens_per_row: float) -> StepTimes:
    seconds = 0.0
    for lmbda, share in kinds.items():
        trainer.lmbda = lmbda
        seconds += share * _seconds_of_window(trainer, tokens_per_row)
    steps, _ = planned_steps(trainer, trainer.rows_per_epoch())
    return StepTimes(seconds + _seconds(trainer, lambda: _step_that_moves_nothing(trainer)), steps)


def _seconds_of_window(trainer: GKDTrainerWithMetrics, tokens_per_row: float) -> float:
    """Of a window of average rows; one whose answers are written is taken as long as it is."""
    times = [_seconds(trainer, lambda: _train_again(trainer))]
    while len(times) < _TIMED and times[0] < _LONG_S:
        times.append(_seconds(trainer, lambda: _train_again(trainer)))
    batches = trainer.read_ahead.last_batches
    writes = trainer.options.lm_kd_active and (trainer.lmbda == 1 or trainer.options.seq_kd)
    tokens, rows = sum(int(batch.num_input_tokens) for batch in batches), sum(map(len, batches))
    return median(times) * (tokens_per_row * rows / tokens if tokens_per_row and tokens and not writes else 1.0)


def _seconds(trainer: GKDTrainerWithMetrics, work: Callable[[], None]) -> float:
    """On the slowest rank: all of them have to come to the same end."""
    started = clock()
    work()
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor([clock() - started], device=trainer.args.device)
    return float(trainer.accelerator.gather(took).max())


def _step_that_moves_nothing(trainer: GKDTrainerWithMetrics) -> None:
    """A step of the optimizer at a learning rate of 0; DeepSpeed has taken its own within the backward pass."""
    optimizer = trainer.optimizer
    if optimizer is None or trainer.is_deepspeed_enabled:
        return
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    inner.step()  # past accelerate's, whose gradient scaler may skip it
