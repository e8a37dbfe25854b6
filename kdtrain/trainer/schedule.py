"""The schedule of learning rates of a resumed run: that of its options, from where the run stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


# Of an optimizer's groups; what else is in them may have been computed while training.
_OPTIONS = ("weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha", "amsgrad")


def group_options(trainer: GKDTrainerWithMetrics) -> list[dict[str, Any]]:
    """What the arguments say of each group of the optimizer: a state that is loaded puts the earlier run's over it."""
    groups = [] if trainer.optimizer is None or trainer.is_deepspeed_enabled else trainer.optimizer.param_groups
    return [{name: group[name] for name in _OPTIONS if name in group} for group in groups]


def set_group_options(trainer: GKDTrainerWithMetrics, options: list[dict[str, Any]]) -> None:
    """Put them back after loading."""
    if options:
        for group, own in zip(trainer.optimizer.param_groups, options, strict=True):
            group.update(own)


def rates_of_beginning(trainer: GKDTrainerWithMetrics) -> list[float] | None:
    """The rates that the schedule's factors apply to, one for each group; None where it is no function of the step."""
    scheduler = trainer.lr_scheduler
    if not isinstance(scheduler, LambdaLR) or not trainer._created_lr_scheduler:
        return None
    return [float(rate) for rate in scheduler.base_lrs]


def go_on(trainer: GKDTrainerWithMetrics, rates: Sequence[float] | None, step: int | None) -> None:
    """Set the rates of the next step, after optimizer and scheduler were loaded.

    They hold the rate that the run before would have gone on with: 0 at its end, where one that goes on for longer
    would take a step with it.

    Args:
        rates: of `rates_of_beginning`, before it was loaded.
        step: of the schedule, counted from 0; None is the one that was loaded.
    """
    scheduler = trainer.lr_scheduler
    if rates is None or not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = list(rates)
    if step is not None:
        scheduler.last_epoch = step
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
