"""Options of the optimizer that a resumed run changes on purpose: its saved state would bring those of before."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import SchedulerType

from kdtrain.errors import CheckpointError

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

# By field of GKDConfig, the entries of a parameter group.
_ENTRIES = {
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
    "optim_args": ("weight_decay", "betas", "eps", "momentum", "alpha"),
}
_OF_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")


def entries_of_beginning(trainer: GKDTrainerWithMetrics, changed: Collection[str]) -> list[dict[str, Any]]:
    """What the options say, for each parameter group, before the saved state is loaded; empty where none has changed.

    Args:
        changed: fields of GKDConfig.

    Raises:
        CheckpointError: the saved state decides, and cannot be told otherwise.
    """
    ours = sorted(name for name in changed if name in _ENTRIES or name in _OF_SCHEDULE)
    fixed = [name for name in ours if name in _OF_SCHEDULE and not isinstance(trainer.lr_scheduler, LambdaLR)]
    if ours and (trainer.is_deepspeed_enabled or fixed):
        schedule = SchedulerType(trainer.args.lr_scheduler_type).value
        what = "DeepSpeed's state" if trainer.is_deepspeed_enabled else f"the state of {schedule}"
        raise CheckpointError(
            f"training.{(fixed or ours)[0]} cannot change here: {what} in the checkpoint holds the values of before. "
            "Take it back, or begin anew from the checkpoint's weights, with model.model and another "
            "training.output_dir."
        )
    wanted = {entry for name in ours for entry in _ENTRIES.get(name, ())}
    if not wanted:
        return []
    assert trainer.optimizer is not None
    return [{name: group[name] for name in wanted & group.keys()} for group in trainer.optimizer.param_groups]


def take_back(trainer: GKDTrainerWithMetrics, entries: Sequence[dict[str, Any]]) -> None:
    """Put what the options say in the place of what was loaded."""
    assert trainer.optimizer is not None
    for group, own in zip(trainer.optimizer.param_groups, entries, strict=False):
        group.update(own)
