"""What upstream finds out only while training begins, tried before: steps, optimizer, scheduler, the best metric.

And what nobody else finds out: a few rows through both models (`first_look.py`). What is wrong is raised together.

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

from kdtrain.disk import failure_of
from kdtrain.errors import KdtrainError, PreflightError
from kdtrain.memory import is_out_of_memory, open_files_limit
from kdtrain.models.probe import OPTION_OF
from kdtrain.preflight.findings import Together
from kdtrain.trainer.best_metric import set_direction
from kdtrain.trainer.first_look import look_at_losses
from kdtrain.trainer.row_order import planned_steps, rows_per_batch

_OPEN_FILES = 64  # of the process itself: libraries, rows, logs, sockets
_FILES_OF_WORKER = 8
_FILES_OF_BATCH = 8

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


def check_startup(trainer: GKDTrainerWithMetrics, greater_is_better: bool | None = None) -> None:
    """Try what training will begin with.

    Args:
        greater_is_better: as the config has it, see `set_direction`.
    """
    together = Together()
    with together.check(("training", "dataloader_drop_last")):
        _check_steps(trainer)
    with together.check(("training", "dataloader_num_workers")):
        _check_open_files(trainer)
    with together.check(("training", "metric_for_best_model")):
        set_direction(trainer, greater_is_better)
    if not trainer.is_deepspeed_enabled:  # which makes them itself
        with together.check(("training", "optim")):
            _try_optimizer(trainer)
        with together.check(("training", "lr_scheduler_type")):
            _try_scheduler(trainer)
    with together.check(OPTION_OF["teacher"]):
        look_at_losses(trainer)
    together.done()
    trainer.startup_checked = True


@contextmanager
def naming(option: str, value: Any) -> Iterator[None]:
    """Turn an error of a library into one that names the option that led to it."""
    try:
        yield
    except KdtrainError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip() or type(error).__name__
        raise PreflightError(f"training.{option}: {value}: {reason}") from error


@contextmanager
def readable_beginning(trainer: GKDTrainerWithMetrics) -> Iterator[None]:
    """What is raised before the first batch comes from an option, a callback or a tracker, not from the training."""
    try:
        yield
    except (KdtrainError, OSError):
        raise
    except Exception as error:
        if trainer.begun or is_out_of_memory(error) or failure_of(error):
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


def _check_open_files(trainer: GKDTrainerWithMetrics) -> None:
    """Each tensor that a data loader's worker hands over is an open file until it is used.

    Where one is too many, Python says so without an end, and nothing goes on.
    """
    args = trainer.args
    limit = open_files_limit()
    if not args.dataloader_num_workers or limit is None:
        return
    batches = args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
    wanted = _OPEN_FILES + args.dataloader_num_workers * _FILES_OF_WORKER + batches * _FILES_OF_BATCH
    if limit < wanted:
        raise PreflightError(
            f"This process may have {limit} files open, and {args.dataloader_num_workers} workers of the data loader "
            f"need about {wanted} (training.dataloader_num_workers). Let it open more, ulimit -n "
            f"{max(4096, 2 * wanted)}, or set training.dataloader_num_workers: 0."
        )


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
