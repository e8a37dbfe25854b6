"""Options of optimizer and schedule that a resumed run changes on purpose, where the saved state decides."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import SchedulerType

from kdtrain.errors import CheckpointError

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

_OF_OPTIMIZER = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
_OF_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")


def check_can_change(trainer: GKDTrainerWithMetrics, changed: Collection[str]) -> None:
    """Refuse a change that the state to be loaded would take back; `schedule.py` makes the others take effect.

    Args:
        changed: fields of GKDConfig.

    Raises:
        CheckpointError: the saved state decides, and cannot be told otherwise.
    """
    ours = sorted(name for name in changed if name in _OF_OPTIMIZER or name in _OF_SCHEDULE)
    fixed = [name for name in ours if name in _OF_SCHEDULE and not isinstance(trainer.lr_scheduler, LambdaLR)]
    if ours and (trainer.is_deepspeed_enabled or fixed):
        schedule = SchedulerType(trainer.args.lr_scheduler_type).value
        what = "DeepSpeed's state" if trainer.is_deepspeed_enabled else f"the state of {schedule}"
        raise CheckpointError(
            f"training.{(fixed or ours)[0]} cannot change here: {what} in the checkpoint holds the values of before. "
            "Take it back, or begin anew from the checkpoint's weights, with model.model and another "
            "training.output_dir."
        )
