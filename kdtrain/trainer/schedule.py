"""The schedule of learning rates of a resumed run: that of its options, from where the run stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


def rates_of_beginning(trainer: GKDTrainerWithMetrics) -> list[float] | None:
    """The rates that the schedule's factors apply to, one for each group; None where it is no function of the step."""
    scheduler = trainer.lr_scheduler
    if not isinstance(scheduler, LambdaLR) or not trainer._created_lr_scheduler:
        return None
    return [float(rate) for rate in scheduler.base_lrs]


def go_on(trainer: GKDTrainerWithMetrics, rates: Sequence[float] | None, moved: int) -> None:
    """Set the rates of the next step, after optimizer and scheduler were loaded.

    They hold the rate that the run before would have gone on with: 0 at its end, where one that goes on for longer
    would take a step with it.

    Args:
        rates: of `rates_of_beginning`, before it was loaded.
        moved: steps by which the run stands further on in the schedule than the one before; or back.
    """
    scheduler = trainer.lr_scheduler
    if rates is None or not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = list(rates)
    scheduler.last_epoch = max(scheduler.last_epoch + moved, 0)
    groups = scheduler.optimizer.param_groups
    scheduler._last_lr = [
        rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate, first in zip(groups, scheduler._last_lr, rates, strict=True):
        group["initial_lr"] = first
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
