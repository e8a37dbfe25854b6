"""What upstream finds out only while training begins, tried before: steps, optimizer, scheduler, the best metric.

And whether the teacher's targets stand at the right tokens, which nobody else finds out.

Optimizer and scheduler are built over a weight of their own and thrown away: the model and the run stay as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import SchedulerType, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.training_args import OptimizerNames

from kdtrain.data.batch import right_padded
from kdtrain.data.collate import Collator
from kdtrain.errors import KdtrainError, PreflightError, TeacherError
from kdtrain.models.probe import own_random_state
from kdtrain.preflight.alignment import check_alignment, few_rows
from kdtrain.preflight.model_checks import report
from kdtrain.teachers import teacher_autocast
from kdtrain.trainer.best_metric import set_direction
from kdtrain.trainer.row_order import planned_steps, rows_per_batch

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


def check_startup(trainer: GKDTrainerWithMetrics, greater_is_better: bool | None = None) -> None:
    """Try what training will begin with.

    Args:
        greater_is_better: as the config has it, see `set_direction`.
    """
    _check_steps(trainer)
    set_direction(trainer, greater_is_better)
    if not trainer.is_deepspeed_enabled:  # which makes them itself
        _try_optimizer(trainer)
        _try_scheduler(trainer)
    _check_alignment(trainer)
    trainer.startup_checked = True


@contextmanager
def naming(option: str, value: Any) -> Iterator[None]:
    """Turn an error of a library into one that names the option that led to it."""
    try:
        yield
    except (KdtrainError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise PreflightError(f"training.{option}: {value}: {reason}") from error


@contextmanager
def readable_beginning(trainer: GKDTrainerWithMetrics) -> Iterator[None]:
    """What is raised before the first batch comes from an option, a callback or a tracker, not from the training."""
    try:
        yield
    except (KdtrainError, torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        if trainer.begun:
            raise
        reason = str(error).strip() or type(error).__name__
        raise PreflightError(
            f"Training could not begin: {reason}\nThis comes from an option in training, a callback or a tracker; "
            "--debug shows where it was raised."
        ) from error


def _check_steps(trainer: GKDTrainerWithMetrics) -> None:
    rows, batch, own = trainer.rows_per_epoch(), rows_per_batch(trainer), trainer._train_batch_size
    if trainer.args.dataloader_drop_last and rows < batch:
        raise PreflightError(
            f"An epoch has {rows} rows, and a batch takes {batch} ({own} x {batch // own} processes): with "
            "training.dataloader_drop_last not one is left, and nothing would be trained. Lower "
            "training.per_device_train_batch_size, or remove dataloader_drop_last."
        )


def _check_alignment(trainer: GKDTrainerWithMetrics) -> None:
    """Ask the teacher about a few rows of the data, once in the life of a trainer."""
    if trainer.alignment_checked or trainer.teacher is None or not trainer.options.lm_kd_active:
        return
    trainer.alignment_checked = True
    with own_random_state(trainer.args.device):  # a user's collator may draw
        batch = few_rows(trainer.train_dataset, trainer.data_collator, trainer.args.per_device_train_batch_size)
    if batch is None:
        return
    batch = trainer.receiver.accept(trainer._prepare_inputs(batch))
    if not isinstance(trainer.data_collator, Collator):
        batch = right_padded(batch)
    try:
        with own_random_state(trainer.args.device), teacher_autocast(trainer.accelerator):
            report(check_alignment(trainer.teacher, batch, any_rank=lambda own: _on_any_rank(trainer, own)))
    except TeacherError as error:
        raise PreflightError(str(error)) from error  # nothing is trained yet, and nothing to be saved


def _on_any_rank(trainer: GKDTrainerWithMetrics, own: bool) -> bool:
    return bool(trainer.accelerator.gather(torch.tensor([own], device=trainer.accelerator.device)).any())


def _try_optimizer(trainer: GKDTrainerWithMetrics) -> None:
    args = trainer.args
    name = OptimizerNames(args.optim).value
    if trainer.optimizer is not None or "layerwise" in name:  # to ask for a layer-wise one puts hooks on the model
        return
    with naming("optim", name if not args.optim_args else f"{name} with optim_args {args.optim_args}"):
        made, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        if not is_optimizer_factory(made) and not {"params", "model", "optimizer_dict"} & options.keys():
            made([torch.nn.Parameter(torch.zeros(2, 2, device=args.device))], **options)


def _try_scheduler(trainer: GKDTrainerWithMetrics) -> None:
    args = trainer.args
    if trainer.lr_scheduler is not None:
        return
    steps, _ = planned_steps(trainer, trainer.rows_per_epoch())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    name = SchedulerType(args.lr_scheduler_type).value
    with naming("lr_scheduler_type", f"{name} with lr_scheduler_kwargs {args.lr_scheduler_kwargs or {}}"):
        warmup = args.get_warmup_steps(steps)
        scheduler = get_scheduler(name, optimizer, warmup, steps, args.lr_scheduler_kwargs)
        # Some options are used only when a step asks for its rate: ask at the ends, the middle and around the warmup.
        for factor in getattr(scheduler, "lr_lambdas", []):
            for step in {0, 1, warmup, warmup + 1, (warmup + steps) // 2, steps - 1, steps}:
                float(factor(step))
